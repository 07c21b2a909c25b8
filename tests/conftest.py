"""
One thread per process, as the tensors are small, and threads that wait for each other make a busy machine crawl; the
fixtures; and what a torture says at its end.
"""
import os
import signal
import tempfile
import time
from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import HealthCheck, given, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1") # before anything imports transformers
MODULES = tempfile.TemporaryDirectory() # code that transformers copies, away from the user's and from other processes
os.environ["HF_MODULES_CACHE"] = MODULES.name
os.environ["OMP_NUM_THREADS"] = "1" # of the scripts that the tests run
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1" # before anything imports triton: its kernels then run on the CPU
torch.set_num_threads(1)
# what nohup or `make test &` has ignored stays so in every run that a test starts and stops, which respects it
for signum, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(signum) == signal.SIG_IGN:
        signal.signal(signum, handler)

from helpers import make_dataset  # noqa: E402 after the environment is set

import distances  # noqa: E402
import run  # noqa: E402


@pytest.fixture(autouse=True)
def signals():
    """
    What a script has done with signals ends with its test: after `python distances.py`, run in this process, a pipe
    that breaks would end the process, in any later test.
    """
    before = {signum: signal.getsignal(signum) for signum in signal.valid_signals()}
    yield
    for signum, handler in before.items():
        if signal.getsignal(signum) != handler:
            signal.signal(signum, handler)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    make_dataset(folder / "data" / "tiny")
    return folder


@pytest.fixture
def here(datasets, tmp_path, monkeypatch):
    """An empty folder, far from the scripts, with data/tiny in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(datasets / "data")
    return tmp_path


@pytest.fixture
def large(monkeypatch):
    """No batch is small: losses go chunk by chunk, and scores through the cores."""
    monkeypatch.setattr(distances, "SMALL", {"N x V x D": -1, "N x V": -1})


@pytest.fixture(params=[pytest.param(1, id="some"), pytest.param(20, id="many", marks=pytest.mark.torture)])
def fuzz(request, record_property):
    """A function that tries check(case) for cases of a strategy; in a torture 20 times as many, new ones each time."""
    def try_all(check, strategy, cases):
        cases *= request.param
        record_property("cases", cases)
        how = settings(max_examples=cases, derandomize=request.param == 1, deadline=None, database=None,
                       suppress_health_check=list(HealthCheck))
        how(given(strategy)(check))()
    return try_all


def pytest_runtest_setup(item):
    """Note how many cases a test has, or kills, where that is a parameter of it."""
    for key, value in item.callspec.params.items() if hasattr(item, "callspec") else ():
        if key in ("cases", "kills"):
            item.user_properties.append(("cases", value))


def pytest_terminal_summary(terminalreporter, config):
    """After a torture: a table for RESULTS.md, with a line for each test, whatever its parameters."""
    if config.option.markexpr != "torture":
        return
    cases, seconds, outcomes = Counter(), Counter(), defaultdict(Counter)
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.getreports(outcome):
            file, _, name = report.nodeid.split("[")[0].partition("::")
            test = os.path.basename(file), name.removeprefix("test_").replace("_", " ")
            recorded = getattr(report, "user_properties", ()) # a file that does not import has neither
            cases[test] += dict(recorded).get("cases", 1)
            seconds[test] += getattr(report, "duration", 0)
            outcomes[test][outcome] += 1
    where = f"torch {torch.__version__}, {os.cpu_count()} CPUs ({run.device_name('cpu')})"
    total, minutes = sum(cases.values()), sum(seconds.values()) / 60
    lines = [f"{time.strftime('%Y-%m-%d')}, commit {run.git_commit()}, {where}:",
             f"{total:,} cases in {minutes:.1f} minutes of one CPU.", "",
             "| file | test | cases | minutes | outcome |", "|---|---|---|---|---|"]
    for (file, name), count in sorted(cases.items()):
        words = ", ".join(f"{n} {outcome}" if n > 1 else outcome for outcome, n in outcomes[file, name].items())
        lines.append(f"| {file} | {name} | {count:,} | {seconds[file, name] / 60:.1f} | {words} |")
    terminalreporter.section("torture")
    terminalreporter.write_line("\n".join(lines))
