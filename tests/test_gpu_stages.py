"""
gpu.py and gpu_runs.py at tiny sizes on the CPU: every stage writes its files, keeps its time, and goes on after what
fails. Scripts run in this process where nothing hangs on processes.

$ pytest tests/test_gpu_stages.py
"""
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, run_script

import bench
import bench_rivals
import distances
import gpu
import gpu_runs
from configurator import configure


class FakeMeter:
    """Counts 3 joules at each reading."""
    def __init__(self):
        self.count = 0

    def joules(self):
        self.count += 3
        return self.count

    def limit_watts(self):
        return 700.0

    def driver(self):
        return "1.2.3"


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch):
    """The settings of gpu.py and bench.py for functions that are called one by one; what they change is undone."""
    before, before_bench = dict(vars(gpu)), dict(vars(bench))
    configure(vars(bench), ["--device=cpu", "--dtype=float32", "--compile=false"])
    configure(vars(gpu), ["--tiny=true", f"--out_dir={tmp_path / 'out'}"])
    os.mkdir(tmp_path / "out")
    monkeypatch.setattr(distances, "WORTH_COMPILING", dict(distances.WORTH_COMPILING))
    monkeypatch.setenv("GPU_TESTS", str(tmp_path / "out" / "tests.json"))
    yield
    vars(gpu).update(before)
    vars(bench).update(before_bench)


def run_in_process(command, limit_s, watch=None, quiet=None):
    """What gpu.execute does, without a process."""
    script, *arguments = command
    if script == "bench.py":
        settings, precision = dict(vars(bench)), torch.get_float32_matmul_precision()
        bench.main(arguments)
        vars(bench).update(settings)
        torch.set_float32_matmul_precision(precision)
    elif script == "bench_rivals.py":
        bench_rivals.LOOPS[arguments[0]](SimpleNamespace(**json.loads(arguments[1])))
    elif script == "gpu_runs.py":
        gpu_runs.first_steps(arguments[0], json.loads(arguments[1]), arguments[2:])
    else:
        run_script(script, *arguments)
    if watch is not None:
        watch()
    return dict(command=" ".join(command), seconds=1.0, code=0, output=[])


def read(tmp_path, name):
    with open(tmp_path / "out" / name) as f:
        return list(csv.DictReader(f)) if name.endswith(".csv") else json.load(f)

# -----------------------------------------------------------------------------
# stages


def test_the_benches(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "execute", run_in_process)
    stage = gpu.Stage("bench", FakeMeter())
    assert gpu.run_benches(stage) == []
    rows = read(tmp_path, "bench.csv")
    assert [(row["head"], row["rival"]) for row in rows[:2]] == [("euclidean", "linear + CE"),
                                                                 ("euclidean", "dense distance")]
    assert {row["head"] for row in rows} == {"euclidean", "manhattan"} and all(float(row["ms"]) > 0 for row in rows)
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")
    record = read(tmp_path, "stage_bench.json")
    assert record["left_out"] == [] and record["machine"]["driver"] == "1.2.3" and record["seconds"] > 0


def test_a_bench_that_dies_keeps_what_it_has(tmp_path, monkeypatch):
    def die(command, *args, **kwargs):
        if "--heads=c,d" in command:
            return dict(command="bench", seconds=1.0, code=1, output=["no"])
        path, = (word.partition("=")[2] for word in command if word.startswith("--json_file"))
        row = {"size": "1x2x3", "head": "a", "ms": 2.0, "rival": "its (slow)", "rival's ms": None}
        with open(path, "w") as f:
            json.dump(dict(rows=[row, {**row, "rival's ms": 3.0}]), f)
        return dict(command="bench", seconds=1.0, code="its time was over", output=["bye"])
    monkeypatch.setattr(gpu, "execute", die)
    monkeypatch.setattr(gpu, "TINY_BENCHES", {"x": ("1x2x3", "a,b"), "y": ("4x5x6", "c,d")})
    stage = gpu.Stage("bench", FakeMeter())
    assert gpu.run_benches(stage) == ["x", "y"]
    assert read(tmp_path, "stage_bench.json")["left_out"] == ["b at 1x2x3", "c at 4x5x6", "d at 4x5x6"]
    assert len(read(tmp_path, "bench.csv")) == 2


def test_the_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "execute", run_in_process)
    stage = gpu.Stage("runs", FakeMeter())
    assert gpu_runs.run_all(stage) == []
    rows = read(tmp_path, "runs.json")
    names = ["GPT-2, nanoGPT's loop", "GPT-2, linear", "GPT-2, cosine", "GPT-2, euclidean", "mlp, cosine"]
    assert [row["run"] for row in rows] == [row["run"] for row in read(tmp_path, "runs.csv")] == names
    for row in rows:
        assert row["ms"] > 0 and row["loss"] > 0
    for row in rows[:4]:
        assert row["steps"] == 6 and row["per second"] == pytest.approx(64_000 / row["ms"])
        assert row["speed / nanoGPT's"] == pytest.approx(rows[0]["ms"] / row["ms"])
    assert rows[0]["losses"][0][1] == pytest.approx(rows[1]["losses"][0][1], rel=0.1) # one model, other batches
    found = read(tmp_path, "first_steps.json")
    assert list(found) == ["baseline", "cosine"]
    for row in found.values():
        assert row["error"] is None and len(row["losses"]) == 6 and row["ms"] > 0
    assert (tmp_path / "out" / "runs.png").exists()


def test_first_steps_go_on_after_a_head_that_fails(tmp_path, monkeypatch):
    """A process that dies takes one head with it; a head that fails says why."""
    def run_here(script, arguments):
        distance, = (word for word in arguments if word.startswith("--distance="))
        if distance == "--distance=euclidean":
            raise KeyboardInterrupt # as good as dead
        return "did not work" if distance == "--distance=cosine" else None

    def execute(command, *args, **kwargs):
        try:
            return run_in_process(command, *args)
        except KeyboardInterrupt:
            return dict(command="", seconds=1.0, code=-9, output=[])
    monkeypatch.setattr(gpu, "execute", execute)
    monkeypatch.setattr(gpu_runs, "run_here", run_here)
    monkeypatch.setattr(gpu_runs, "all_heads", lambda: ["baseline", "euclidean", "cosine", "manhattan"])
    stage = gpu.Stage("runs", FakeMeter())
    stage.tiny = False
    assert gpu_runs.train_first_steps(stage, str(tmp_path)) == ["euclidean", "cosine"]
    errors = {head: row["error"] for head, row in read(tmp_path, "first_steps.json").items()}
    assert errors == dict(baseline=None, euclidean="the process died", cosine="did not work", manhattan=None)


def test_energy_of_a_step(tmp_path):
    """Counted between two log lines, and by the power limit times the seconds."""
    meter = FakeMeter()
    watch = gpu_runs.Watch(str(tmp_path), meter)
    rows = []
    for step in (20, 40, 60):
        rows.append(dict(kind="train", step=step, ms=100.0))
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        watch()
        watch() # the second time there is no new line, so nothing is read
    assert watch.joules == {20: 3, 40: 6, 60: 9}
    energy = watch.energy(rows[1:])
    assert energy["joules a step"] == 3 / 20 and energy["limit x seconds, J"] == pytest.approx(70.0)
    assert energy["more than counted, %"] == pytest.approx(100 * (70 / 0.15 - 1))
    assert watch.energy(rows[:1]) == {}
    watch.joules = dict.fromkeys(watch.joules)
    assert watch.energy(rows) == {}


def test_random_tokens_replace_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "execute", lambda *args: dict(command="", seconds=1.0, code=1, output=["no tokenizers"]))
    stage = gpu.Stage("runs", FakeMeter())
    stage.tiny = False
    assert gpu_runs.prepare_corpus(stage, str(tmp_path)) == "random tokens"
    assert (tmp_path / "stdlib" / "train.bin").exists()


def test_a_stage_without_time_leaves_everything_out(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "minutes", 0.0)
    for name in gpu.STAGES:
        gpu.STAGES[name](gpu.Stage(name, FakeMeter()))
        record = read(tmp_path, f"stage_{name}.json")
        assert record["commands"] == [] and record["left_out"]

# -----------------------------------------------------------------------------
# the rivals of gpu-bench that others have made, by stand-ins


class Pairs:
    """What KeOps makes of h (N, 1, D) and w (1, V, D), as far as a rival uses it: here the numbers are made at once."""
    def __init__(self, x):
        self.x = x

    def __sub__(self, other):
        return Pairs(self.x - other.x)

    def __add__(self, other):
        return Pairs(self.x + getattr(other, "x", other))

    def __truediv__(self, other):
        return Pairs(self.x / other.x)

    def __pow__(self, exponent):
        return Pairs(self.x ** exponent)

    def __rmul__(self, factor):
        return Pairs(factor * self.x)

    def abs(self):
        return Pairs(self.x.abs())

    def log(self):
        return Pairs(self.x.log())

    def sum(self, dim):
        return Pairs(self.x.sum(dim))

    def logsumexp(self, dim):
        return self.x.logsumexp(dim, keepdim=True)


class FusedLoss:
    """What Liger has: a module that takes the weight first."""
    def __init__(self, accum_dtype):
        assert accum_dtype == torch.float32

    def __call__(self, weight, h, y):
        return torch.nn.functional.cross_entropy(h @ weight.T, y)


def exact_only(h, weight, y, filter_eps="high"):
    """What Apple's cut cross-entropy has: it drops small gradients unless it is told not to."""
    assert filter_eps is None
    return torch.nn.functional.cross_entropy(h @ weight.T, y)


STAND_INS = {"liger_kernel.transformers": SimpleNamespace(LigerFusedLinearCrossEntropyLoss=FusedLoss),
             "cut_cross_entropy": SimpleNamespace(linear_cross_entropy=exact_only),
             "pykeops.torch": SimpleNamespace(LazyTensor=Pairs)}


@pytest.fixture
def installed(monkeypatch):
    """Stand-ins of the packages that bench.py meets on a GPU, with a torch.compile that does nothing."""
    monkeypatch.setattr(bench_rivals, "optional", STAND_INS.get)
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: f)
    bench_rivals.compiled_linear_loss.cache_clear()
    yield
    bench_rivals.compiled_linear_loss.cache_clear()


def as_on_gpu(head):
    """Which rivals it would meet there."""
    names = ("distance", "variant", "in_features")
    return SimpleNamespace(weight=SimpleNamespace(is_cuda=True), **{name: getattr(head, name) for name in names})


@pytest.mark.parametrize("text", ["baseline", "cosine"])
def test_fused_linear_rivals(text, installed):
    head, h, y = bench.make_case(text, 37, 50, 24)
    fused = bench_rivals.rivals_of(as_on_gpu(head), compile=True)
    assert {"linear + CE, compiled", "Liger", "cut cross-entropy"} < fused.keys()
    expected = bench_rivals.linear(head, h, y)
    for name in fused.keys() - {"dense distance"}:
        assert name in bench_rivals.LINEAR
        loss, gradients = fused[name](head, h, y)
        for got, want in zip((loss, *gradients), (expected[0], *expected[1]), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("text", ["manhattan", "minkowski:p=3", "canberra"])
def test_keops(text, installed):
    head, h, y = bench.make_case(text, 37, 50, 24)
    rivals = bench_rivals.rivals_of(as_on_gpu(head), compile=True)
    assert list(rivals) == ["chunked broadcast" if text == "canberra" else "cdist", "KeOps", "broadcast"]
    expected = bench.ours(head, h, y)
    loss, gradients = rivals["KeOps"](head, h, y)
    for got, want in zip((loss, *gradients), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    head.in_features = 768
    assert "KeOps" not in bench_rivals.rivals_of(as_on_gpu(head))


def test_rivals_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr(bench_rivals, "optional", lambda module: None)
    assert bench_rivals.left_out() == {"Liger": "liger-kernel", "cut cross-entropy": "cut-cross-entropy",
                                       "KeOps": "pykeops"}
    head, _, _ = bench.make_case("baseline", 1, 8, 8)
    assert bench_rivals.rivals_of(as_on_gpu(head)).keys().isdisjoint(bench_rivals.OPTIONAL)


def test_liger_itself():
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    head, h, y = bench.make_case("baseline", 37, 50, 24)
    expected, (loss, gradients) = bench_rivals.linear(head, h, y), bench_rivals.liger(head, h, y)
    for got, want in zip((loss, *gradients), (expected[0], *expected[1])):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)

# -----------------------------------------------------------------------------
# processes


def test_execute():
    done = gpu.execute(["-c", "import sys; print('one'); sys.exit(3)"], 60)
    assert done["code"] == 3 and done["output"] == ["one"] and done["command"].startswith("python -c")


@pytest.mark.parametrize("limits, words", [(dict(limit_s=0.7), "its time was over"),
                                           (dict(limit_s=60, quiet="nowhere"), "nothing came for 1 s")])
def test_a_process_that_takes_too_long_ends_with_its_children(tmp_path, monkeypatch, limits, words):
    monkeypatch.setattr(gpu, "_QUIET_S", 1)
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(tmp_path / 'alive')!r}).touch()"
    parent = f"import subprocess, sys; print('x', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    started, calls = time.time(), []
    done = gpu.execute(["-c", parent], watch=lambda: calls.append(1), **limits)
    assert done["code"] == words and done["output"] == ["x"] and calls
    assert time.time() - started < 2
    time.sleep(max(0, started + 2.7 - time.time()))
    assert not (tmp_path / "alive").exists()


@pytest.mark.parametrize("kind, outcome", [(None, "passed"), ("Skipped", "skipped"), ("AssertionError", "failed")])
def test_the_plugin_writes_each_result(kind, outcome):
    session = SimpleNamespace(items=[SimpleNamespace(nodeid=name) for name in "abc"], config=SimpleNamespace())
    gpu.write_results({"a": dict(outcome="died", seconds=1.0, message="")}) # of a process before
    gpu.pytest_collection_finish(session)
    assert [item.nodeid for item in session.items] == ["b", "c"]
    item = SimpleNamespace(nodeid="b", config=session.config, session=session)
    gpu.pytest_runtest_protocol(item)
    assert gpu.read_results()["b"]["outcome"] == "running" and gpu.read_results()["c"]["outcome"] == "not run"
    for when in ("setup", "call", "teardown"):
        error = SimpleNamespace(typename=kind, value="CUDA error: no") if kind and when == "call" else None
        gpu.pytest_runtest_makereport(item, SimpleNamespace(when=when, duration=1.0, excinfo=error))
    assert gpu.read_results()["b"] == dict(outcome=outcome, seconds=3.0, message="CUDA error: no" if kind else "")
    assert hasattr(session, "shouldstop") == bool(kind) # no test of this process can pass any more


def test_another_process_goes_on_where_the_first_died(tmp_path, monkeypatch):
    codes = iter([-11, 0])

    def execute(command, *args, **kwargs):
        results = gpu.read_results() or {name: dict(outcome="not run", seconds=0.0, message="") for name in "abc"}
        for row in results.values():
            if row["outcome"] == "not run":
                row["outcome"] = "running"
                gpu.write_results(results)
                if row is results["b"]:
                    return dict(command="", seconds=1.0, code=next(codes), output=["Segmentation fault"])
                row["outcome"] = "passed"
        gpu.write_results(results)
        return dict(command="", seconds=1.0, code=next(codes), output=[])
    monkeypatch.setattr(gpu, "execute", execute)
    assert gpu.run_tests(gpu.Stage("tests", FakeMeter())) == ["b"]
    results = read(tmp_path, "tests.json")
    assert [row["outcome"] for row in results.values()] == ["passed", "died", "passed"]
    assert "Segmentation fault" in results["b"]["message"]
    assert [command["code"] for command in read(tmp_path, "stage_tests.json")["commands"]] == [-11, 0]


def test_gpu_tests_as_a_command(tmp_path):
    out = tmp_path / "elsewhere"
    command = [sys.executable, os.path.join(ROOT, "gpu.py"), "tests", "--tiny=true", f"--out_dir={out}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / "tests.json").read_text())
    passed = [name for name, row in results.items() if row["outcome"] == "passed"]
    assert "tests/test_gpu.py::test_tiny_close_prototypes" in passed
    if not torch.cuda.is_available():
        assert results["tests/test_gpu.py::test_more_pairs_than_int32_can_count"]["outcome"] == "skipped"

# -----------------------------------------------------------------------------
# what is said


def test_without_a_gpu_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words in ([], ["tests"], ["bench", "runs"]):
        with pytest.raises(SystemExit, match="^this needs an NVIDIA GPU[^\n]*$"):
            gpu.main([*words, "--tiny=false"])
    with pytest.raises(SystemExit, match="there is no stage 'benches': use tests, bench, runs"):
        gpu.main(["benches"])


def test_what_is_missing_is_said_at_the_start(monkeypatch, capsys):
    here = ("tqdm", "matplotlib", "tiktoken")
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda module: module if module in here else None)
    monkeypatch.setattr(bench_rivals, "optional", lambda module: None)
    gpu.say_what_is_missing(["tests", "bench", "runs"])
    out = capsys.readouterr().out
    assert out.startswith("not here: pytest (without it: no gpu-tests), triton")
    assert out.endswith("  pip install pytest triton tokenizers liger-kernel cut-cross-entropy pykeops\n")


def test_a_machine_without_the_drivers_library():
    meter = gpu.Meter()
    if meter.handle is None:
        assert meter.joules() is meter.limit_watts() is meter.driver() is None
    about = gpu.machine(meter)
    assert about["torch"] == torch.__version__ and about["cores"] == os.cpu_count()


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make(tmp_path):
    def planned(*arguments):
        alone = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")} # not under `make test`
        return subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True,
                              env=alone).stdout.splitlines()
    python = f"PYTHON={tmp_path}/python3"
    assert planned("gpu", python, "VENV=nowhere") == [f"{tmp_path}/python3 gpu.py"]
    for stage in ("tests", "bench", "runs"):
        assert planned(f"gpu-{stage}", python, "VENV=nowhere") == [f"{tmp_path}/python3 gpu.py {stage}"]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    assert planned("gpu", python, f"VENV={tmp_path}") == [f"{tmp_path}/bin/python gpu.py"]
