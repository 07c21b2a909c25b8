"""
Run a grid over one config: models x heads x links x n x seeds, each run in a process and a folder of its own; then report.py shows it.

$ python study.py config/study_digits.py
$ python study.py config/study_digits.py --dry-run       # prints the list
$ python study.py config/study_digits.py --shard=2/4     # every fourth run from the second on: for several machines, or array jobs
$ python study.py config/study_digits.py --retry         # also the runs that broke
$ python study.py --script=train.py --base=config/cpu.py --heads=baseline,cosine,minkowski:p=3 --settings=--max_iters=500 --out_dir=out/study_cpu

A run that has ended (summary.json) is skipped, one that was stopped half-way goes on from its checkpoint, one that broke (error.txt) is
reported and left until --retry. A folder that was made with other arguments (arguments.json) is refused. Ctrl-C stops the run and the
study; the same command goes on. What a run prints is in its log.txt.
Runs of the same seed start from the same backbone weights and see the same batches: the training scripts see to that.
One run at a time, as the energy of a run is the machine's: for more at once, use --shard on several machines.
"""
import glob
import json
import multiprocessing
import os
import runpy
import shlex
import signal
import sys
import time
import traceback
from itertools import product

from tqdm import tqdm

from configurator import configure, fail

# -----------------------------------------------------------------------------
# defaults
script = "train_vision.py" # or 'train.py'
base = "" # config files of every run, separated by spaces
settings = "" # flags of every run, separated by spaces, such as '--epochs=10 --plots=false'
models = "" # comma separated, such as 'mlp,cnn'; '': the config's
heads = "all" # comma separated distance[:variant][:name=value], such as 'baseline,cosine,minkowski:p=3'; all: every one there is
links = "harmonic" # comma separated: harmonic, softmin
ns = "default" # comma separated: numbers, 'default' (the config's), 'learn' (learn_n, from the default)
seeds = "1,2,3"
out_dir = "out/study" # a folder per run is made in it
shard = "1/1" # i/k: only every k-th run, from the i-th on
retry = False # run again what broke
dry_run = False # only print the list
# -----------------------------------------------------------------------------
_ROOT = os.path.dirname(os.path.abspath(__file__))


def all_heads():
    from distances import DISTANCES
    return ["baseline"] + [f"{distance}:{variant}" for distance, variants in DISTANCES.items() for variant in variants] + ["minkowski:p=3"]


def words(text):
    return [word.strip() for word in text.split(",") if word.strip()]


def parsed(key, text, kind, legal):
    """The entries of a setting, by kind(entry); ValueError that names the setting."""
    try:
        return [kind(word) for word in words(text)]
    except ValueError:
        raise ValueError(f"{key} is {text!r}: write {legal}, comma separated") from None


def exponent(word):
    if word not in ("default", "learn") and not 0 < float(word) < float("inf"):
        raise ValueError
    return word


def grid():
    """[(the run's name, its flags)], seed by seed, so that a study that is stopped half-way has all heads; ValueError for what cannot be read."""
    from distances import DistanceHead, parse_head
    runs, exponents = {}, parsed("ns", ns, exponent, "numbers > 0, 'default' or 'learn'")
    names = all_heads() if heads == "all" else words(heads)
    for seed, model, head, link, n in product(parsed("seeds", seeds, int, "integers"), words(models) or [""], names, words(links), exponents):
        arguments = parse_head(head)
        made = DistanceHead(8, 8, **arguments, link=link) # what a run would refuse is refused here
        distance, variant = arguments.pop("distance"), arguments.pop("variant")
        params = ",".join(f"{key}={value:g}" for key, value in arguments.items())
        if distance == "baseline":
            link, n = "harmonic", "default" # which it does not have
        flags = [f"--distance={distance}", f"--link={link}", f"--seed={seed}"]
        flags += [f"--model={model}"] * bool(model) + [f"--variant={variant}"] * bool(variant) + [f"--distance_params={params}"] * bool(params)
        flags += {"default": [], "learn": ["--learn_n=true"]}.get(n, [f"--n={n}"])
        parts = [model, distance, made.variant if distance != "baseline" else "", params.replace("=", ""), link if link != "harmonic" else "",
                 {"default": ""}.get(n, f"n{n}"), f"s{seed}"]
        runs["_".join(part for part in parts if part)] = flags # a variant by its name and by default is one run
    return list(runs.items())


def state(folder):
    """'ended', 'broken', 'stopped' (half-way, with a checkpoint) or 'new'"""
    for name, word in (("summary.json", "ended"), ("error.txt", "broken"), ("ckpt.pt", "stopped")):
        if os.path.exists(os.path.join(folder, name)):
            return word
    return "new"


def arguments(folder, flags):
    """Of the training script, for a run in whatever state it is."""
    if os.path.exists(os.path.join(folder, "ckpt.pt")):
        return ["--init_from=resume", f"--out_dir={folder}"]
    return [*shlex.split(base), *shlex.split(settings), *flags, f"--out_dir={folder}", "--overwrite=true"]


def made_with(folder):
    """The arguments that a folder's run was begun with, None for a new one."""
    path = os.path.join(folder, "arguments.json")
    if not os.path.exists(path):
        return None
    with open(path) as f:
        return json.load(f)


def wanted(flags):
    return [script, *shlex.split(base), *shlex.split(settings), *flags]


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


def run_one(folder, flags):
    """Run it to its end, or leave error.txt. KeyboardInterrupt passes through, when the run has stopped."""
    os.makedirs(folder, exist_ok=True)
    error, log = os.path.join(folder, "error.txt"), os.path.join(folder, "log.txt")
    for name in (error, log):
        if os.path.exists(name) and (name == error or state(folder) != "stopped"):
            os.remove(name)
    sys.stdout.flush() # or the child would have it too
    with open(os.path.join(folder, "arguments.json"), "w") as f:
        json.dump(wanted(flags), f)
    process = context.Process(target=child, args=(os.path.join(_ROOT, script), arguments(folder, flags), folder))
    process.start()
    try:
        process.join()
    except KeyboardInterrupt: # from a terminal the run has it too
        process.join(1)
        process.terminate()
        process.join(10)
        process.kill()
        process.join()
        raise
    if state(folder) != "ended":
        with open(log, encoding="utf-8", errors="replace") as f:
            lines = f.read().splitlines()
        with open(error, "w", encoding="utf-8") as f:
            f.write("\n".join([f"exit status {process.exitcode}", *lines[-15:]]) + "\n")


def why(folder):
    with open(os.path.join(folder, "error.txt"), encoding="utf-8", errors="replace") as f:
        lines = [line for line in f.read().splitlines() if line.strip()]
    return ": ".join([lines[0], *lines[1:][-1:]])[:200]


def main():
    problems = []
    configure(globals(), problems=problems)
    try:
        i, k = (int(part) for part in shard.split("/"))
        if not 1 <= i <= k:
            raise ValueError
    except ValueError:
        problems.append(f"shard is {shard!r}: write i/k with 1 <= i <= k, such as 2/4")
        i, k = 1, 1
    if script not in ("train.py", "train_vision.py"):
        problems.append(f"script is {script!r}: use train.py or train_vision.py")
    problems += [f"base: there is no {path}" for path in shlex.split(base) if not os.path.exists(path)]
    try:
        runs = grid()
        if not runs:
            problems.append("the grid is empty: models, heads, links, ns and seeds need an entry each")
    except ValueError as e:
        problems.append(str(e))
    fail(problems)
    runs = [(os.path.join(out_dir, name), flags) for name, flags in runs[i - 1::k]]
    others = {folder: made for folder, flags in runs if (made := made_with(folder)) not in (None, wanted(flags))}
    fail([f"{folder} was made with other arguments ({shlex.join(args)}): use another --out_dir, or delete it" for folder, args in list(others.items())[:5]]
         + [f"and {len(others) - 5} more"] * (len(others) > 5))
    states = {folder: state(folder) for folder, _ in runs}
    todo = [(folder, flags) for folder, flags in runs if states[folder] != "ended" and (retry or states[folder] != "broken")]
    counts = ", ".join(f"{list(states.values()).count(word)} {word}" for word in ("ended", "stopped", "broken", "new") if word in states.values())
    print(f"{len(runs)} runs in {out_dir}" + (f", shard {shard}" if k > 1 else "") + f": {counts}; {len(todo)} to run")
    if dry_run:
        for folder, flags in runs:
            print(f"{states[folder]:>8}  python {script} {shlex.join(arguments(folder, flags))}")
        return
    if context.get_start_method() == "fork": # what every run imports is imported once
        import codecarbon.input  # noqa: F401
        import sklearn.datasets  # noqa: F401
        import sklearn.metrics  # noqa: F401
        import torch._dynamo  # noqa: F401
    signal.signal(signal.SIGTERM, signal.default_int_handler) # the run must not outlive the study
    start, done = time.time(), 0
    bar = tqdm(todo, unit="run", dynamic_ncols=True)
    try:
        for folder, flags in bar:
            bar.set_description(os.path.basename(folder))
            run_one(folder, flags)
            if state(folder) == "broken":
                bar.write(f"broken: {folder}: {why(folder)}")
            else:
                done += 1
    except KeyboardInterrupt:
        bar.close()
        raise SystemExit(f"stopped after {done} of {len(todo)} runs: the same command goes on") from None
    broken = [folder for folder, _ in runs if state(folder) == "broken"]
    print(f"{done} runs in {time.time() - start:.0f} s; {sum(state(folder) == 'ended' for folder, _ in runs)} of {len(runs)} have ended")
    if broken:
        raise SystemExit("\n".join([f"{len(broken)} broken, --retry runs them again:", *(f"  {folder}: {why(folder)}" for folder in broken)]))
    print(f"python report.py {out_dir}")


# a forked process has its imports already; with a GPU it could not use it
context = multiprocessing.get_context("fork" if sys.platform == "linux" and not glob.glob("/dev/nvidia*") else "spawn")
if __name__ == "__main__":
    main()
