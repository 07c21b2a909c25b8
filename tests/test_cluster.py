"""
study.py --launcher, on submitit's local executor and on an sbatch that only notes what it is given, with a script that
trains nothing. tests/slurm.sh does it on a real Slurm.
"""
import glob
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT
from test_study import here  # noqa: F401 a fixture

import study

pytest.importorskip("cluster", reason="there is no submitit")

STEPS = 20
FAKE = f"""
import json, multiprocessing, os, signal, sys, time
flags = dict(arg.lstrip('-').split('=', 1) for arg in sys.argv[1:] if arg.startswith('--'))
out, asked = flags['out_dir'], []
signal.signal(signal.SIGTERM, lambda *args: asked.append(143))
ckpt, first = os.path.join(out, 'ckpt.pt'), 0
if flags.get('init_from') == 'resume':
    with open(ckpt) as f:
        first = int(f.read())
for step in range(first, {STEPS}):
    with open('steps.txt', 'a') as f:
        numbers = [step, os.getpid(), os.getppid(), os.environ['RUNS_AT_ONCE']]
        f.write(' '.join([os.path.basename(out), *map(str, numbers)]) + chr(10))
    time.sleep(0.1)
    with open(ckpt + '.new', 'w') as f:
        f.write(str(step + 1))
    os.replace(ckpt + '.new', ckpt)
    if not multiprocessing.parent_process().is_alive():
        asked.append(129)
    if asked:
        raise SystemExit(asked[0])
if flags.get('seed') == '9':
    raise SystemExit('seed 9 is unlucky')
with open(os.path.join(out, 'summary.json'), 'w') as f:
    json.dump({{}}, f)
"""


@pytest.fixture
def make(here, tmp_path, monkeypatch): # noqa: F811
    """A function that runs study.py on the script above, of the folder where both lie, and returns what it prints."""
    for name in ("study.py", "cluster.py", "configurator.py", "distances.py"): # those that the tasks import
        shutil.copy(os.path.join(ROOT, name), tmp_path)
    (tmp_path / "train_vision.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", "") # which is set for the tasks
    return here


def steps():
    """{run: [(step, process, its parent, how many share the machine)]}, in the order in which they were made."""
    found = {}
    if os.path.exists("steps.txt"):
        with open("steps.txt") as f:
            for line in f:
                name, *numbers = line.split()
                found.setdefault(name, []).append(tuple(map(int, numbers)))
    return found


def wait_for(what):
    for _ in range(600):
        if what():
            return
        time.sleep(0.1)
    logs = [open(path).read() for path in glob.glob("out/tasks/*log*")]
    raise AssertionError(f"it did not come: {steps()}\n" + "\n".join(logs))


def is_free(name):
    """Whether no process makes this run."""
    claimed = study.claim(f"out/{name}")
    return claimed is not None and claimed.close() is None


def end_of(text):
    """Wait for the end of the processes that study.py says it has started."""
    for pid in map(int, re.search(r"processes ([\d, ]+),", text)[1].split(", ")):
        os.waitpid(pid, 0)


def test_three_workers_of_which_one_is_killed_lose_nothing_and_double_nothing(make):
    names = [f"baseline_s{seed}" for seed in range(1, 7)]
    args = ["--heads=baseline", "--seeds=1,2,3,4,5,6", "--launcher=local", "--jobs=3"]
    text = make(*args)
    assert "6 to run, 3 at once" in text and "and sends what has not" in text
    wait_for(lambda: all(len(steps().get(name, [])) > 3 for name in names[:3]))
    _, _, worker, at_once = steps()[names[1]][0]
    assert at_once == 3 # for config.json
    os.kill(worker, signal.SIGKILL)
    end_of(text)
    wait_for(lambda: is_free(names[1])) # the run saves itself when its worker is dead
    assert len(steps()[names[1]]) < STEPS and names[4] not in steps() # which the killed one had yet to do
    text = make(*args)
    assert "4 ended, 1 stopped, 1 new; 2 to run" in text
    make(*args[:2], "--jobs=2") # a study of this process at the same time, on the same folder
    end_of(text)
    assert "6 ended; 0 to run" in make(*args[:2])
    assert {name: [step for step, *_ in made] for name, made in steps().items()} == {
        name: list(range(STEPS)) for name in names}
    assert len({pid for _, pid, *_ in steps()[names[1]]}) == 2


def test_a_task_whose_time_is_over_saves_its_run_and_goes_on_with_it(make):
    text = make("--heads=baseline", "--seeds=1", "--launcher=local")
    wait_for(lambda: len(steps().get("baseline_s1", [])) > 3)
    _, run, task, _ = steps()["baseline_s1"][0]
    for pid in (task, run): # as Slurm sends it, to all processes of the task
        os.kill(pid, signal.SIGURG)
    end_of(text)
    made = steps()["baseline_s1"]
    assert [step for step, *_ in made] == list(range(STEPS)) and len({pid for _, pid, *_ in made}) == 2
    assert os.path.exists("out/baseline_s1/summary.json")


def test_a_broken_run_is_reported_and_its_task_fails(make):
    text = make("--heads=baseline", "--seeds=9", "--launcher=local")
    end_of(text)
    log, = glob.glob("out/tasks/*log.err")
    with open(log) as f:
        assert "out/baseline_s9: exit status 1: seed 9 is unlucky" in f.read()
    text = make("--heads=baseline", "--seeds=9", refused=True)
    assert "1 broken; 0 to run" in text and "seed 9 is unlucky" in text


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder in PATH with an sbatch that keeps what it is given as sent.sh, and an srun that does nothing."""
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "sbatch").write_text("#!/bin/sh\ncp $1 sent.sh && echo Submitted batch job 77\n")
    (bin / "srun").write_text("#!/bin/sh\n")
    for path in bin.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:/usr/bin:/bin")
    return bin


def test_slurm_gets_one_array_and_a_task_makes_its_run(make, slurm):
    args = ["--heads=baseline", "--seeds=1,2,3", "--launcher=submitit", "--jobs=2"]
    text = make(*args, "--slurm=partition=gpu gres=gpu:1 cpus_per_task=2 time=240 mem_gb=8")
    assert "sent to the array 77 of Slurm (squeue --job=77)" in text and not steps()
    with open("sent.sh") as f:
        sent = f.read().splitlines()
    for flag in ("array=0-2%2", "partition=gpu", "gres=gpu:1", "cpus-per-task=2", "time=240", "mem=8GB", "requeue",
                 "signal=URG@90", "job-name=study"):
        assert f"#SBATCH --{flag}" in sent
    command = [sys.executable, "-m", "submitit.core._submit", os.path.abspath("out/tasks")]
    for task, cpus, fit in (("1", "1", os.cpu_count()), ("2", "1000", 1)): # Slurm may think that a node has more
        env = dict(SUBMITIT_EXECUTOR="slurm", SLURM_JOB_ID="79", SLURM_ARRAY_JOB_ID="77", SLURM_ARRAY_TASK_ID=task,
                   SLURM_CPUS_ON_NODE=cpus)
        subprocess.run(command, env={**os.environ, **env}, check=True, capture_output=True, timeout=60)
        made = steps().pop(f"baseline_s{int(task) + 1}")
        assert len(made) == STEPS and made[0][-1] == fit # as many such tasks fit on this machine
    with open("out/tasks/77_1_0_result.pkl", "rb") as f:
        assert pickle.load(f) == ("success", None)
    # a run with a GPU has torch's own number of threads, wherever it is sent from
    with open("out/baseline_s2/arguments.json") as f:
        assert "--threads=1" not in f.read()
    assert "2 ended, 1 new; 1 to run, 1 at once" in make(*args, "--slurm=gres=gpu:1 time=240")


@pytest.mark.parametrize("args, message", [
    (["--launcher=pbs"], "launcher is 'pbs': use submitit or local"),
    (["--launcher=submitit"], "slurm is '': say how many minutes Slurm gives a run"),
    (["--launcher=submitit", "--slurm=time=1-00:00:00"], "such as time=240"),
    (["--launcher=submitit", "--slurm=time=0"], "such as time=240"),
    (["--launcher=submitit", "--slurm=time=9 gpu"], "write key=value pairs, separated by spaces, got 'gpu'"),
    (["--launcher=submitit", "--slurm=time=9 --gres=gpu:1"], "got '--gres=gpu:1'"),
    (["--launcher=submitit", "--slurm=time=9 gres="], "got 'gres='"),
    (["--launcher=submitit", "--slurm='time=9"], "No closing quotation"),
    (["--launcher=submitit", "--slurm=time=9", "--shard=1/2"], "which sends every run: leave out --shard"),
    (["--launcher=submitit", "--slurm=time=9 walltime=9"], "nothing was sent with slurm='time=9 walltime=9': "),
    (["--launcher=submitit", "--slurm=time=9 array_parallelism=x"], "nothing was sent with slurm="),
    (["--launcher=submitit", "--slurm=time=9 partition=no"], "invalid partition specified: no"),
    (["--measure=1"], "measure is 1.0: it needs --dry-run"),
    (["--measure=-1", "--dry-run"], "measure is -1.0, it must be minutes >= 0"),
    (["--measure=1", "--dry-run", "--launcher=local"], "and no --launcher"),
])
def test_one_clear_message(make, slurm, args, message):
    (slurm / "sbatch").write_text("#!/bin/sh\necho sbatch: error: invalid partition specified: no >&2; exit 1\n")
    text = make("--heads=baseline", *args, refused=True)
    assert message in text and "Traceback" not in text and not steps()
    assert max(map(len, text.splitlines())) < 600


def test_without_slurm_or_submitit(make, monkeypatch):
    monkeypatch.setenv("PATH", "")
    text = make("--heads=baseline", "--launcher=submitit", "--slurm=time=9", refused=True)
    assert 'nothing was sent with slurm=\'time=9\': Could not detect "srun"' in text
    monkeypatch.delitem(sys.modules, "cluster")
    monkeypatch.setitem(sys.modules, "submitit", None)
    text = make("--heads=baseline", "--launcher=local", refused=True)
    assert "launcher is 'local', which needs submitit (pip install submitit)" in text
