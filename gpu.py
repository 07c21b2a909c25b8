"""
What only a GPU can show, in three stages of eight minutes at most. They need one NVIDIA GPU and requirements.txt, and
no network; what is missing is said at the start.

$ make gpu              # all three; or python gpu.py
$ make gpu-tests        # kernels, heads and training on the GPU against float64     -> tests.json
$ make gpu-bench        # heads beside their rivals: bench.py head at four sizes     -> bench_*.json, bench.csv, .png
$ make gpu-runs         # training, its energy, every head's first 100 steps: see gpu_runs.py
$ python gpu.py bench --minutes=5 --out_dir=out/gpu

Everything goes into assets/gpu as it is found, so that a stage that is cut off keeps what it has. A stage does what
matters most first, in processes of its own, and ends them when its time is over; stage_*.json lists the commands with
their seconds and exit codes, and what was left out.
"""
import csv
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time

import torch

import bench_rivals
import figures
import gpu_runs
import run
import safe
from configurator import configure

# -----------------------------------------------------------------------------
# defaults
out_dir = "assets/gpu"
minutes = 8.0 # of each stage
tiny = False # sizes that only show that everything works; a CPU is enough for them
# -----------------------------------------------------------------------------
_HERE = os.path.dirname(os.path.abspath(__file__))
_QUIET_S = 150 # a test, or a head's first steps, that takes longer hangs

# what the stages import beside torch and numpy: module, package, and what is left out without it
NEEDED = {
    "tests": [("pytest", "pytest", "gpu-tests"), ("triton", "triton", "the kernels and what is compiled")],
    "bench": [("tqdm", "tqdm", "gpu-bench"), ("triton", "triton", "the kernels and what is compiled"),
              ("matplotlib", "matplotlib", "pictures")],
    "runs": [("tqdm", "tqdm", "the corpus"), ("tokenizers", "tokenizers", "the corpus"),
             ("tiktoken", "tiktoken", "the corpus"), ("triton", "triton", "the kernels and what is compiled"),
             ("matplotlib", "matplotlib", "pictures")],
}

# -----------------------------------------------------------------------------
# the machine


class Meter:
    """
    The energy counter of the first GPU that torch sees, from the driver's own library, which is there wherever the GPU
    is. Without it every reading is None.
    """

    def __init__(self):
        self.handle = None
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        handle = ctypes.c_void_p()
        try:
            self.nvml = ctypes.CDLL("libnvidia-ml.so.1")
            self.nvml.nvmlInit_v2()
            if visible.isdigit():
                code = self.nvml.nvmlDeviceGetHandleByIndex_v2(int(visible), ctypes.byref(handle))
            else:
                code = self.nvml.nvmlDeviceGetHandleByUUID(visible.encode(), ctypes.byref(handle))
        except (OSError, AttributeError): # no such library, or one without these functions
            return
        if code == 0:
            self.handle = handle

    def thousandths(self, function, kind):
        value = kind()
        if self.handle is None or getattr(self.nvml, function)(self.handle, ctypes.byref(value)) != 0:
            return None
        return value.value / 1000

    def joules(self):
        """The energy that the GPU has used since its driver was loaded."""
        return self.thousandths("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong)

    def limit_watts(self):
        """The power that the GPU may draw. Times the seconds it is the usual model of energy."""
        return self.thousandths("nvmlDeviceGetEnforcedPowerLimit", ctypes.c_uint)

    def driver(self):
        text = ctypes.create_string_buffer(96)
        if self.handle is None or self.nvml.nvmlSystemGetDriverVersion(text, 96) != 0:
            return None
        return text.value.decode()


def machine(meter):
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None
    return dict(gpu=run.device_name("cuda") if torch.cuda.is_available() else "none", driver=meter.driver(),
                cuda=torch.version.cuda, torch=torch.__version__, triton=triton, python=platform.python_version(),
                cpu=run.device_name("cpu"), cores=os.cpu_count(), git=run.git_commit(), date=time.strftime("%Y-%m-%d"))


def say_what_is_missing(names):
    missing = {}
    for name in names:
        for module, package, without in NEEDED[name]:
            if importlib.util.find_spec(module) is None:
                missing[package] = f"{package} (without it: no {without})"
    if "bench" in names:
        for rival, package in bench_rivals.left_out().items():
            missing[package] = f"{package} (without it: no {rival})"
    if missing:
        print(f"not here: {', '.join(missing.values())}\n  pip install {' '.join(missing)}", flush=True)

# -----------------------------------------------------------------------------
# a stage and its processes


def execute(command, limit_s, watch=None, quiet=None):
    """
    Run a Python script or module for at most limit_s, and end its whole process group then, or when the file `quiet`
    has not changed for _QUIET_S; watch() is called some twenty times a second. Returns a dict: command, seconds, the
    exit code or in words why there is none, and the end of what it printed.
    """
    started, end = time.time(), None
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen([sys.executable, *command], cwd=_HERE, stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while process.poll() is None and end is None:
                if watch is not None:
                    watch()
                if time.time() - started > limit_s:
                    end = "its time was over"
                elif quiet is not None and time.time() - max(changed_at(quiet), started) > _QUIET_S:
                    end = f"nothing came for {_QUIET_S} s"
                time.sleep(0.05)
        finally:
            if process.poll() is None: # after Ctrl-C too
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        lines = output.read().splitlines()
    return dict(command=f"python {shlex.join(command)}", seconds=round(time.time() - started, 1),
                code=process.returncode if end is None else end, output=lines[-40:])


def changed_at(path):
    return os.path.getmtime(path) if os.path.exists(path) else 0.0


class Stage:
    """The time of a stage, its files in out_dir, the commands that it ran, and what it left out."""

    def __init__(self, name, meter):
        self.name, self.meter, self.tiny = name, meter, tiny
        self.deadline = time.time() + 60 * minutes
        self.record = dict(stage=name, machine=machine(meter), minutes=minutes, tiny=tiny, left_out=[], commands=[])
        self.save()

    def save(self):
        self.record["seconds"] = round(60 * minutes - self.left_s(), 1)
        self.write(f"stage_{self.name}.json", self.record)

    def left_s(self):
        return self.deadline - time.time()

    def run(self, what, command, **watching):
        """Run a command in the time that is left. Returns what execute() does, or None where no time is left."""
        if self.left_s() < 5:
            self.leave_out(what)
            return None
        print(f"gpu-{self.name}: {what} ...", flush=True)
        done = execute(command, self.left_s(), **watching)
        self.record["commands"].append(dict(what=what, **done))
        self.save()
        if done["code"] != 0:
            print("\n  ".join([f"gpu-{self.name}: {what}: {done['code']}", *done["output"][-5:]]), flush=True)
        return done

    def leave_out(self, what):
        print(f"gpu-{self.name}: left out: {what}", flush=True)
        self.record["left_out"].append(what)
        self.save()

    def failed(self):
        return [command["what"] for command in self.record["commands"] if command["code"] != 0]

    def path(self, name):
        return os.path.join(os.path.abspath(out_dir), name)

    def remove(self, name):
        if os.path.exists(self.path(name)):
            os.remove(self.path(name))

    def write(self, name, value):
        safe.write(self.path(name), json.dumps(value, indent=1))

    def read(self, name, default):
        if not os.path.exists(self.path(name)):
            return default
        with open(self.path(name)) as f:
            return json.load(f)

    def write_table(self, name, rows):
        """The rows as CSV, but for lists and dicts in them."""
        columns = {}
        for row in rows:
            columns.update({key: None for key, value in row.items() if not isinstance(value, (dict, list))})
        with open(self.path(name), "w", newline="") as f:
            writer = csv.DictWriter(f, list(columns), extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def draw(self, name, draw, rows):
        """Save the picture draw(rows), if matplotlib is here."""
        try:
            figures.save(draw(rows), self.path(name))
        except ImportError:
            pass

# -----------------------------------------------------------------------------
# gpu-tests. pytest loads this file as a plugin that writes each result at once. After an error of CUDA's, or where the
# process has died, another one goes on with the rest.


TESTS = ("tests/test_gpu.py", "tests/test_triton.py", "tests/test_fast.py::test_heads_on_the_gpu_kernels")
TINY_TESTS = ("tests/test_gpu.py", "-k", "tiny_close or tiny_state or int32")


def write_results(results):
    """A test a line, {name: {outcome, seconds, message}}."""
    lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in results.items()]
    safe.write(os.environ["GPU_TESTS"], "{\n" + ",\n".join(lines) + "\n}\n")


def read_results():
    """What write_results() has written; {} before."""
    if not os.path.exists(os.environ["GPU_TESTS"]):
        return {}
    with open(os.environ["GPU_TESTS"]) as f:
        return json.load(f)


def pytest_collection_finish(session):
    results = session.config.results = read_results()
    for item in session.items:
        results.setdefault(item.nodeid, dict(outcome="not run", seconds=0.0, message=""))
    session.items[:] = [item for item in session.items if results[item.nodeid]["outcome"] == "not run"]
    write_results(results)


def pytest_runtest_protocol(item):
    item.config.results[item.nodeid]["outcome"] = "running"
    write_results(item.config.results)


def pytest_runtest_makereport(item, call):
    row = item.config.results[item.nodeid]
    row["seconds"] = round(row["seconds"] + call.duration, 3)
    if call.excinfo is not None:
        row["outcome"] = "skipped" if call.excinfo.typename == "Skipped" else "failed"
        row["message"] = str(call.excinfo.value)[:2000]
        if "CUDA error" in row["message"]: # no test of this process can pass any more
            item.session.shouldstop = "an error of CUDA's"
    elif call.when == "call":
        row["outcome"] = "passed"
    write_results(item.config.results)


def run_tests(stage):
    """All tests, in as many processes as it takes. Returns the names of those that went wrong."""
    stage.remove("tests.json")
    path = os.environ["GPU_TESTS"] = stage.path("tests.json")
    if tiny:
        os.environ["GPU_TINY"] = "1" # see test_gpu.py
    command = ["-m", "pytest", "-q", "-p", "gpu", "-p", "no:cacheprovider", *(TINY_TESTS if tiny else TESTS)]
    before, waiting = None, ["all of them"]
    while waiting and waiting != before: # as long as it gets further
        before = waiting
        done = stage.run("pytest", command, quiet=path)
        results = read_results()
        for row in results.values():
            if row["outcome"] == "running":
                row.update(outcome="died", message="\n".join([str(done["code"]), *done["output"][-20:]]))
        write_results(results)
        waiting = [name for name, row in results.items() if row["outcome"] == "not run"]
    outcomes = [row["outcome"] for row in results.values()]
    counts = [f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes)]
    print(f"gpu-tests: {', '.join(counts) or 'none ran'}", flush=True)
    if waiting:
        stage.leave_out(f"{len(waiting)} tests, which are 'not run' in tests.json")
    return [name for name, row in results.items() if row["outcome"] in ("failed", "died")] or not results

# -----------------------------------------------------------------------------
# gpu-bench


BENCHES = { # what matters most first: its sizes and heads
    "gpt2": ("16384x50304x768", "baseline,euclidean,cosine"),
    "gemma2": ("8192x262144x2304", "euclidean,cosine,baseline"),
    "gpt2_elementwise": ("16384x50304x768", "manhattan,canberra,minkowski:p=3"),
    "llama3": ("4096x128256x4096,8192x128256x4096", "euclidean,cosine,baseline"),
    "qwen2": ("16384x151936x896", "euclidean,cosine,baseline,manhattan"),
    "few_dimensions": ("16384x50304x64", "manhattan,canberra,minkowski:p=3"), # where KeOps fits
    "gpt2_others": ("16384x50304x768", "chebyshev,hamming,bray_curtis:abs,minkowski:p=1.5,mahalanobis,offset_l2,"
                                       "chebyshev:cosh,chebyshev:smooth"),
}
TINY_BENCHES = {"tiny": ("64x128x16", "euclidean,manhattan")}
BENCH_FLAGS = ("--rounds=5", "--slow_s=0.5", "--budget_s=3")
TINY_FLAGS = ("--rounds=1", "--compile=false", "--threads=1")


def run_benches(stage):
    rows = []
    for name, (sizes, heads) in (TINY_BENCHES if tiny else BENCHES).items():
        file = f"bench_{name}.json"
        stage.remove(file)
        command = ["bench.py", "head", f"--sizes={sizes}", f"--heads={heads}", f"--json_file={stage.path(file)}"]
        done = stage.run(name, command + list(TINY_FLAGS if tiny else BENCH_FLAGS))
        found = stage.read(file, {"rows": []})["rows"]
        measured = {(row["size"], row["head"]) for row in found}
        for size in sizes.split(",") if done is not None else []:
            for head in heads.split(","):
                if (size, head) not in measured:
                    stage.leave_out(f"{head} at {size}")
        rows += found
        if found:
            stage.write_table("bench.csv", rows)
            stage.draw("bench.png", bars_of_benches, rows)
    return stage.failed()


def bars_of_benches(rows):
    """A panel for each size: the time of each head in blue, and of its rivals in grey below it."""
    panels = {}
    for row in rows:
        panel = panels.setdefault(row["size"], [])
        if not panel or panel[-1]["head"] != row["head"]:
            panel.append(dict(head=row["head"], label=row["head"], ms=row["ms"], color="#0072B2"))
        if row["rival's ms"] is not None:
            rival = row["rival"].partition(" (")[0]
            panel.append(dict(head=row["head"], label=rival, ms=row["rival's ms"], color="0.7"))
    most = max(len(panel) for panel in panels.values())
    fig, axes = figures.new_figure(6 * len(panels), 1.2 + 0.3 * most, 1, len(panels), squeeze=False)
    for ax, (size, panel) in zip(axes.flat, panels.items()):
        ax.barh(range(len(panel)), [bar["ms"] for bar in panel], color=[bar["color"] for bar in panel])
        for i, bar in enumerate(panel):
            ax.annotate(f"{bar['ms']:.3g}", (bar["ms"], i), (4, 0), textcoords="offset points", va="center", fontsize=8)
        ax.set_yticks(range(len(panel)), [bar["label"] for bar in panel])
        ax.set_ylim(most - 0.4, -0.6)
        ax.set(xscale="log", xlabel="ms, forward and backward", title=size)
    return fig

# -----------------------------------------------------------------------------
# the command line


STAGES = {"tests": run_tests, "bench": run_benches, "runs": gpu_runs.run_all}


def main(argv):
    names = [word for word in argv if not word.startswith("-")]
    configure(globals(), [word for word in argv if word.startswith("-")])
    for name in names:
        if name not in STAGES:
            raise SystemExit(f"there is no stage {name!r}: use {', '.join(STAGES)}, or none of them for all")
    if not tiny and not torch.cuda.is_available():
        raise SystemExit("this needs an NVIDIA GPU, and torch sees none here (torch.cuda.is_available() is False)")
    names = names or list(STAGES)
    os.makedirs(out_dir, exist_ok=True)
    say_what_is_missing(names)
    meter, failed = Meter(), []
    for name in names:
        stage = Stage(name, meter)
        if STAGES[name](stage):
            failed.append(f"gpu-{name}")
        stage.save()
        print(f"gpu-{name}: {stage.record['seconds']:.0f} s, its files are in {out_dir}", flush=True)
    if failed:
        raise SystemExit(f"not all went well in {', '.join(failed)}: see stage_*.json and tests.json in {out_dir}")


if __name__ == "__main__":
    main(sys.argv[1:])
