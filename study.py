"""
Runs a grid over one config: models x heads x links x n x seeds, each run in a process and a folder of its own. Then
report.py shows what came out.

$ python study.py config/study_digits.py
$ python study.py config/study_digits.py --dry-run       # only prints the list of runs
$ python study.py config/study_digits.py --dry-run --measure=0.5    # makes some of it, to forecast hours and kWh
$ python study.py config/study_digits.py --shard=2/4     # for several machines: every fourth run, from the second on
$ python study.py config/study_gpt.py --launcher=submitit --slurm='partition=gpu gres=gpu:1 cpus_per_task=8 time=240'
$ python study.py config/study_digits.py --retry         # also the runs that broke
$ python study.py --script=train.py --base=config/cpu.py --settings=--max_iters=500 --heads=cosine,minkowski:p=3

A run that has ended (summary.json) is skipped, one that was stopped half-way goes on from its checkpoint, and one that
broke (error.txt) is reported and left until --retry. A folder that was made with other arguments (arguments.json) is
refused, one where they cannot be read is reported and left, and one in which another process makes its run is left
alone. Ctrl-C stops the runs and the study, and the same command goes on. What a run prints is in its log.txt.
Runs of the same seed start from the same backbone weights and see the same batches: the training scripts see to that.

On a CPU every run has one thread, however many there are (--settings='--threads=4' gives each four), so that its
numbers do not depend on how many run at once: --jobs, by default one for each core. With a GPU the default is one. The
energy of a run is the machine's, and counts what ran beside it: it is marked as shared, and --jobs=1 compares energies.
"""
import errno
import glob
import json
import multiprocessing
import os
import re
import runpy
import shlex
import signal
import sys
import time
import traceback
from collections import Counter, deque
from itertools import product
from multiprocessing.connection import wait

from tqdm import tqdm

from configurator import configure, fail, find

try:
    import fcntl
except ImportError: # Windows, where nothing is locked
    fcntl = None

# -----------------------------------------------------------------------------
# defaults
script = "train_vision.py" # or 'train.py', 'train_metric.py'
base = "" # config files of every run, separated by spaces
settings = "" # flags of every run, separated by spaces, such as '--epochs=10 --plots=false'
models = "" # comma separated, such as 'mlp,cnn'; '': the config's
# comma separated distance[:variant][:name=value], such as 'cosine,minkowski:p=3', and with train_metric.py losses, such
# as 'triplet'; all: every one there is
heads = "all"
links = "harmonic" # comma separated: harmonic, softmin
ns = "default" # comma separated: numbers, 'default' (the config's), 'learn' (learn_n, from the default)
seeds = "1,2,3"
out_dir = "out/study" # a folder per run is made in it
shard = "1/1" # i/k: only every k-th run, from the i-th on
jobs = 0 # how many run at once; 0: one for each core, with a GPU one, on Slurm as many as it likes
retry = False # run again what broke
dry_run = False # only print the list
measure = 0.0 # minutes, with dry_run: makes a run of each kind for so long, in vain, to forecast hours and kWh
launcher = "" # 'submitit': Slurm makes the runs, as one array, see cluster.py; 'local': processes in the background do
slurm = "" # what a run gets there, in submitit's words, such as 'partition=gpu gres=gpu:1 cpus_per_task=8 time=240'
# -----------------------------------------------------------------------------
_ROOT = os.path.dirname(os.path.abspath(__file__))
STOPPED = (124, 129, 130, 143) # exit codes of a run that ends early and goes on when resumed: time_limit, and signals
_HAS_GPU = bool(glob.glob("/dev/nvidia*"))
# a forked run has the imports of this process already; but with a GPU a forked process could not use it
CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" and not _HAS_GPU else "spawn")


# -----------------------------------------------------------------------------
# the grid

def words(text):
    """Return the entries of a comma separated setting."""
    return [word.strip() for word in text.split(",") if word.strip()]


def parsed(key, text, kind, legal):
    """Return kind(entry) for each entry of a setting. Raises ValueError that names the setting and what is legal."""
    try:
        return [kind(word) for word in words(text)]
    except ValueError:
        raise ValueError(f"{key} is {text!r}: write {legal}, comma separated") from None


def exponent(word):
    """Return an entry of ns as it is. Raises ValueError when it is none."""
    if word not in ("default", "learn") and not 0 < float(word) < float("inf"):
        raise ValueError
    return word


def all_heads():
    """Return the baseline, every variant of every distance, and Minkowski with p = 3, as parse_head reads them."""
    from distances import DISTANCES
    names = ["baseline"]
    for distance, variants in DISTANCES.items():
        names += [f"{distance}:{variant}" for variant in variants]
    return [*names, "minkowski:p=3"]


def losses():
    """Return the losses of train_metric.py that are no heads; the other scripts have none."""
    if script != "train_metric.py":
        return ()
    from model_metric import LOSSES
    return LOSSES


def grid():
    """
    Return [(the run's name, its flags)], seed by seed, so that a study that is stopped half-way has all heads.
    Raises ValueError for what cannot be read, and for a head that no run could have.
    """
    exponents = parsed("ns", ns, exponent, "numbers > 0, 'default' or 'learn'")
    numbers = parsed("seeds", seeds, int, "integers")
    names = [*losses(), *all_heads()] if heads == "all" else words(heads)
    runs = {}
    for seed, model, head, link, n in product(numbers, words(models) or [""], names, words(links), exponents):
        name, flags = one_of_grid(seed, model, head, link, n)
        runs[name] = flags # a variant by its name and the same one by default are one run
    return list(runs.items())


def one_of_grid(seed, model, head, link, n):
    """Return (the run's name, its flags) for one point of the grid. A model "" and an n "default" are the config's."""
    from distances import DistanceHead, parse_head
    if head in losses():
        model_flags = [f"--model={model}"] if model else []
        return "_".join(filter(None, [model, head, f"s{seed}"])), [f"--loss={head}", f"--seed={seed}", *model_flags]
    arguments = parse_head(head)
    full_variant = DistanceHead(8, 8, **arguments, link=link).variant # making it refuses here what a run would refuse
    distance, variant = arguments.pop("distance"), arguments.pop("variant")
    params = ",".join(f"{key}={value:g}" for key, value in arguments.items())
    if distance == "baseline": # it has neither
        link, n = "harmonic", "default"

    flags = [f"--distance={distance}", f"--link={link}", f"--seed={seed}"]
    if script == "train_metric.py":
        flags.append("--loss=head")
    if model:
        flags.append(f"--model={model}")
    if variant:
        flags.append(f"--variant={variant}")
    if params:
        flags.append(f"--distance_params={params}")
    if n == "learn":
        flags.append("--learn_n=true")
    elif n != "default":
        flags.append(f"--n={n}")

    parts = [model, distance, full_variant, params.replace("=", "")]
    if link != "harmonic":
        parts.append(link)
    if n != "default":
        parts.append(f"n{n}")
    parts.append(f"s{seed}")
    return "_".join(part for part in parts if part), flags


# -----------------------------------------------------------------------------
# one run

def state(folder):
    """
    Return "damaged" (nobody can tell which run it is), "ended", "broken", "stopped" (half-way, with a checkpoint) or
    "new".
    """
    try:
        saved_recipe(folder)
    except ValueError:
        return "damaged"
    for name, word in (("summary.json", "ended"), ("error.txt", "broken"), ("ckpt.pt", "stopped")):
        if os.path.exists(os.path.join(folder, name)):
            return word
    return "new"


def is_in_use(folder):
    """Whether some process makes this run now: training scripts hold a lock on the file `lock` in their folder."""
    try:
        with open(os.path.join(folder, "lock"), encoding="utf-8") as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (OSError, AttributeError): # no such file, no locks on this disk, Windows
        pass
    return False


def recipe(script, shared, flags):
    """
    Return what a run is made with, the script and its arguments: those that runs share, as a line, and the run's own.
    The run's folder keeps it in arguments.json.
    """
    has_gpu = "gpu" in slurm if launcher == "submitit" else _HAS_GPU # the machine that makes the run
    threads = [] if has_gpu else ["--threads=1"] # the last flag counts: settings may say otherwise
    return [script, *threads, *shlex.split(shared), *flags]


def saved_recipe(folder):
    """Return the recipe that a folder's run was begun with, or None for a new one. Raises ValueError for no recipe."""
    path = os.path.join(folder, "arguments.json")
    try:
        with open(path, encoding="utf-8") as f:
            saved = json.load(f)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path} cannot be read ({e})") from None
    if not isinstance(saved, list) or not all(isinstance(word, str) for word in saved):
        raise ValueError(f"{path} holds no list of arguments")
    return saved


def arguments(folder, made_with):
    """Return the arguments with which a recipe's script begins a run, or goes on with it from its checkpoint."""
    if os.path.exists(os.path.join(folder, "ckpt.pt")):
        return ["--init_from=resume", f"--out_dir={folder}"]
    return [*made_with[1:], f"--out_dir={folder}", "--overwrite=true"]


def write(path, text):
    """Write a text file, whole or not at all. Raises OSError where the disk does not take it."""
    try:
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            f.write(text)
        os.replace(path + ".tmp", path)
    finally:
        if os.path.lexists(path + ".tmp"):
            os.remove(path + ".tmp")


def child(path, args, folder):
    """One run, in a process of its own: everything it prints goes to log.txt."""
    log = open(os.path.join(folder, "log.txt"), "a", buffering=1)
    for number in (1, 2): # also of what is not python
        os.dup2(log.fileno(), number)
    sys.stdout = sys.stderr = log
    sys.argv = [os.path.basename(path), *args]
    sys.path.insert(0, os.path.dirname(path))
    try:
        try:
            runpy.run_path(path, run_name="__main__")
        finally:
            if "run" in sys.modules: # its atexit is not called below
                sys.modules["run"].closing.close()
    except KeyboardInterrupt:
        os._exit(130)
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    else:
        status = 0
    sys.stdout.flush()
    os._exit(status) # without the parent's own clean-up


def claim(folder):
    """
    Return a file whose lock keeps other studies from this run, until it is closed here and in the run's process, or
    None where another study has it.
    """
    f = open(os.path.join(folder, "claim"), "w")
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        f.close()
        return None
    except (OSError, AttributeError): # no locks on this disk, Windows
        pass
    return f


def begin(folder, made_with):
    """
    Return the process of a run of this recipe that begins, or None where another process makes it, or has made it since
    this study began. Raises OSError where the folder cannot be written.
    """
    if is_in_use(folder):
        return None
    os.makedirs(folder, exist_ok=True)
    claimed = claim(folder)
    if claimed is None:
        return None
    if state(folder) == "ended":
        claimed.close()
        return None
    error, log = os.path.join(folder, "error.txt"), os.path.join(folder, "log.txt")
    if os.path.exists(error):
        os.remove(error)
    if os.path.exists(log) and state(folder) != "stopped": # one that goes on adds to its log
        os.remove(log)
    sys.stdout.flush() # what is still in the buffer would be the child's too
    write(os.path.join(folder, "arguments.json"), json.dumps(made_with))
    path = os.path.join(_ROOT, made_with[0])
    process = CONTEXT.Process(target=child, args=(path, arguments(folder, made_with), folder))
    process.start()
    process.claimed = claimed
    return process


def end(folder, process):
    """Leave error.txt where a run has broken. Raises OSError where the folder cannot be written."""
    process.join()
    process.claimed.close()
    if state(folder) != "ended" and process.exitcode not in STOPPED and not is_in_use(folder):
        with open(os.path.join(folder, "log.txt"), encoding="utf-8", errors="replace") as f:
            lines = f.read().splitlines()
        write(os.path.join(folder, "error.txt"), "\n".join([f"exit status {process.exitcode}", *lines[-15:]]) + "\n")


def stop(processes):
    """Stop these runs: each ends its step, and saves it."""
    for process in processes:
        process.join(1) # from a terminal it has Ctrl-C too
        process.terminate()
    for process in processes:
        process.join(60)
        process.kill()
        process.join()


def why(folder):
    """Return in a line what is wrong with a run, or why it broke: its exit status and the last line that it printed."""
    try:
        saved_recipe(folder)
        with open(os.path.join(folder, "error.txt"), encoding="utf-8", errors="replace") as f:
            lines = [line for line in f.read().splitlines() if line.strip()]
    except (OSError, ValueError) as e:
        return str(e)
    return ": ".join([*lines[:1], *lines[1:][-1:]])[:200] or "error.txt is empty"


# -----------------------------------------------------------------------------
# the study

def read_shard():
    """Return (i, k) of the setting shard. Raises ValueError when it does not read i/k with 1 <= i <= k."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"shard is {shard!r}: write i/k with 1 <= i <= k, such as 2/4")
    return int(match[1]), int(match[2])


def refuse_other_recipes(runs):
    """Raise SystemExit that names the first folders whose runs were made with other arguments."""
    problems = []
    for folder, made_with in runs:
        saved = None if state(folder) == "damaged" else saved_recipe(folder)
        if saved not in (None, made_with):
            problems.append(f"{folder} was made with other arguments ({shlex.join(saved)}): "
                            "use another --out_dir, or delete it")
    if len(problems) > 5:
        problems[5:] = [f"and {len(problems) - 5} more"]
    fail(problems)


def not_on_this_machine():
    """Return what is wrong with the settings of a study that is measured or sent elsewhere."""
    problems = []
    if not 0 <= measure < 1e6:
        problems.append(f"measure is {measure}, it must be minutes >= 0")
    elif measure and (launcher or not dry_run):
        problems.append(f"measure is {measure}: it needs --dry-run, where the runs will be made, and no --launcher")
    if not launcher:
        return problems
    if launcher not in ("submitit", "local"):
        problems.append(f"launcher is {launcher!r}: use submitit or local")
    if shard != "1/1":
        problems.append(f"launcher is {launcher!r}, which sends every run: leave out --shard")
    try:
        import cluster
        if launcher == "submitit":
            cluster.read(slurm)
    except ImportError as e:
        problems.append(f"launcher is {launcher!r}, which needs submitit (pip install submitit): {e}")
    except ValueError as e:
        problems.append(str(e))
    return problems


def cores():
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def import_ahead():
    """Import once what every run imports, where a run is a fork of this process."""
    if CONTEXT.get_start_method() == "fork":
        import codecarbon.input  # noqa: F401
        import sklearn.datasets  # noqa: F401
        import sklearn.metrics  # noqa: F401
        import torch._dynamo  # noqa: F401


def run_all(todo, at_once):
    """
    Run them, pairs of a folder and a recipe, so many at once, and return ({folder: reason} of those that broke, how
    many have ended). Raises SystemExit on Ctrl-C or SIGTERM, and on a full disk, after the runs have stopped.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler) # no run must outlive the study
    os.environ["RUNS_AT_ONCE"] = str(at_once) # for config.json: their energy is shared
    waiting, running, broken, done = deque(todo), {}, {}, 0 # running: {sentinel: (folder, process)}

    def attempt(act, folder, *arguments):
        try:
            return act(folder, *arguments)
        except OSError as e:
            broken[folder] = f"it cannot be written ({e})"
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise SystemExit(f"stopped after {done} of {len(todo)} runs: {folder}: {broken[folder]}. what has "
                                 "ended is whole: make room, and the same command goes on") from None

    bar = tqdm(total=len(todo), unit="run", dynamic_ncols=True)
    try:
        while waiting or running:
            over = []
            if waiting and len(running) < at_once:
                folder, made_with = waiting.popleft()
                process = attempt(begin, folder, made_with)
                if process is None:
                    over.append(folder)
                else:
                    running[process.sentinel] = folder, process
            else:
                for sentinel in wait(running):
                    folder, process = running.pop(sentinel)
                    attempt(end, folder, process)
                    over.append(folder)
            for folder in over:
                done += state(folder) == "ended"
                outcome(folder, broken, bar.write)
                bar.update()
            bar.set_description(", ".join(os.path.basename(folder) for folder, _ in running.values()))
    except KeyboardInterrupt:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN) # a second one ends the runs at once, but not who waits for them
        raise SystemExit(f"stopped after {done} of {len(todo)} runs: the same command goes on") from None
    finally:
        stop([process for _, process in running.values()])
        bar.close()
    return broken, done


def outcome(folder, broken, say):
    """Say what became of a run that has not ended well; the reason why it broke goes into broken."""
    found = state(folder)
    if found == "broken":
        broken.setdefault(folder, why(folder))
    if folder in broken:
        say(f"broken: {folder}: {broken[folder]}")
    elif found == "ended":
        return
    elif is_in_use(folder):
        say(f"left alone: {folder}: another process makes it")
    else:
        say(f"stopped: {folder}: the same command goes on")


def main():
    # what cannot run is said before anything does
    problems, named = [], []
    configure(globals(), problems=problems)
    i, k = 1, 1
    try:
        i, k = read_shard()
    except ValueError as e:
        problems.append(str(e))
    if jobs < 0:
        problems.append(f"jobs is {jobs}, it must be >= 0")
    problems += not_on_this_machine()
    if script not in ("train.py", "train_vision.py", "train_metric.py"):
        problems.append(f"script is {script!r}: use train.py, train_vision.py or train_metric.py")
    if os.path.exists(out_dir) and not os.path.isdir(out_dir):
        problems.append(f"out_dir is {out_dir!r}, which is no folder")
    for key, text in (("base", base), ("settings", settings)):
        try:
            split = shlex.split(text)
        except ValueError as e:
            problems.append(f"{key} is {text!r}, which does not split into words ({e})")
            continue
        if key == "base":
            problems += [f"base: there is no {path}" for path in split if not os.path.exists(find(path))]
    try:
        named = grid()
        if not named:
            problems.append("the grid is empty: models, heads, links, ns and seeds need an entry each")
    except (ImportError, ValueError) as e:
        problems.append(str(e))
    fail(problems)
    shared = f"{base} {settings}"
    runs = [(os.path.join(out_dir, name), recipe(script, shared, flags)) for name, flags in named[i - 1::k]]
    refuse_other_recipes(runs)

    # what there is to do
    states = {folder: state(folder) for folder, _ in runs}
    skipped = ("damaged", "ended") if retry else ("damaged", "ended", "broken")
    todo = [(folder, made_with) for folder, made_with in runs if states[folder] not in skipped]
    count, every = Counter(states.values()), ("ended", "stopped", "broken", "damaged", "new")
    counts = ", ".join(f"{count[word]} {word}" for word in every if count[word])
    part = f", shard {shard}" if k > 1 else ""
    here = 1 if _HAS_GPU else cores()
    at_once = min(jobs or (len(todo) if launcher == "submitit" else here), max(len(todo), 1))
    print(f"{len(runs)} runs in {out_dir}{part}: {counts}; {len(todo)} to run, {at_once} at once")
    if dry_run:
        for folder, made_with in runs:
            print(f"{states[folder]:>8}  python {script} {shlex.join(arguments(folder, made_with))}")
        if measure and todo:
            import forecast
            forecast.forecast(todo, at_once, measure)
        return
    if launcher and todo:
        import cluster
        folder = os.path.join(out_dir, "tasks")
        sent = cluster.send(launcher, slurm, todo, at_once, folder)
        where = f"array {sent} of Slurm (squeue --job={sent})" if launcher == "submitit" else f"processes {sent}"
        print(f"sent to the {where}, whose logs are in {folder}. The same command says what has ended, and sends what "
              "has not; a run that is being made is not made twice")
        return

    # do it
    import_ahead()
    start = time.time()
    broken, done = run_all(todo, at_once)
    states = {folder: state(folder) for folder, _ in runs}
    ended = list(states.values()).count("ended")
    print(f"{done} runs in {time.time() - start:.0f} s; {ended} of {len(runs)} have ended")
    found = {"broken": broken, "damaged": {}}
    for folder, word in states.items():
        if word in found:
            found[word][folder] = why(folder)
    lines = []
    for word, advice in (("broken", "--retry runs them again"), ("damaged", "delete a folder to make its run again")):
        if found[word]:
            lines += [f"{len(found[word])} {word}, {advice}:"]
            lines += [f"  {folder}: {reason}" for folder, reason in found[word].items()]
    if lines:
        raise SystemExit("\n".join(lines))
    print(f"python report.py {out_dir}")


if __name__ == "__main__":
    main()
