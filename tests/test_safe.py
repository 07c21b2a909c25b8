"""
safe.py: what a run leaves when it is killed, stopped, damaged, or has no room. What is killed here is a process of its
own, killed for good.

$ pytest tests/test_safe.py
"""
import csv
import errno
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    FORKS,
    HARD,
    ROOT,
    SETTINGS,
    assert_close_runs,
    assert_same,
    assert_same_training,
    ended,
    flags,
    fork,
    fork_ranks,
    load,
    log_of,
    metrics,
    refused,
    run_script,
    train,
)

import data
import data_vision
import run
import safe
import study

VISION = dict(track_emissions=False, plots=False, device="cpu", dtype="float32", distance="cosine", patience=0)
LONG = {**SETTINGS, "max_iters": 10 ** 6, "eval_interval": 1} # it ends by being stopped
STATE = dict(model={"w": torch.arange(40.0)}, model_args=dict(n=2), config=dict(lr=0.1, name="x"), step=3)

# -----------------------------------------------------------------------------
# files


def test_a_file_is_there_whole_or_as_it_was(tmp_path):
    path = str(tmp_path / "a.txt")
    safe.write(path, "ä\n")
    with pytest.raises(KeyboardInterrupt), data.replacing(path) as (f,):
        f.write(b"half of it")
        raise KeyboardInterrupt
    assert open(path, "rb").read() == "ä\n".encode() and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full disk here")
def test_a_full_disk_is_one_message_and_every_file_is_as_it_was(here, monkeypatch):
    def batch(self, first, count, read=data.Blocks.batch):
        if first // count == 2 * 14: # between the checkpoints of steps 10 and 15
            os.symlink("/dev/full", "out/ckpt.pt.tmp")
        return read(self, first, count)
    settings = {**SETTINGS, "eval_interval": 5, **HARD}
    with monkeypatch.context() as patch:
        patch.setattr(data.Blocks, "batch", batch)
        message = refused(**{**settings, "out_dir": "out"})
    assert message == ("out/ckpt.pt cannot be written: No space left on device; ckpt.pt is as it was, "
                       "--init_from=resume --out_dir=out goes on from it")
    assert load("out")["step"] == 10 and not [name for name in os.listdir("out") if name.endswith(".tmp")]
    run_script("train.py", "--init_from=resume", "--out_dir=out")
    train(**{**settings, "out_dir": "whole"})
    assert_same_training("whole", "out")
    os.remove("out/metrics.jsonl")
    os.symlink("/dev/full", "out/metrics.jsonl")
    with pytest.raises(SystemExit, match="out/metrics.jsonl cannot be written: No space left on device; ckpt.pt is as"):
        run.log("out", dict(kind="eval", step=1))


@pytest.mark.parametrize("has_links", [True, False])
def test_the_checkpoint_before_is_kept(tmp_path, monkeypatch, has_links):
    def no_links(*args):
        raise OSError("this disk has no links")
    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    path = str(tmp_path / "ckpt.pt")
    for step in (1, 2, 3):
        safe.save(path, {**STATE, "step": step}, keep=True)
    assert safe.load(path)["step"] == 3 and safe.load(safe.before(path))["step"] == 2
    safe.save(path, {**STATE, "step": 4})
    assert safe.load(path)["step"] == 4 and safe.load(safe.before(path))["step"] == 2
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "ckpt_before.pt"]


def test_a_flipped_bit_of_a_checkpoint_is_named(tmp_path):
    path, rng = str(tmp_path / "ckpt.pt"), random.Random(0)
    safe.save(path, STATE)
    whole = open(path, "rb").read()
    tensor = whole.index(STATE["model"]["w"].numpy().tobytes())
    named = 0
    # all of a tensor's first numbers, and others: in the padding between two records a bit means nothing
    for i in [*range(tensor, tensor + 20), *(rng.randrange(len(whole)) for _ in range(300))]:
        damaged = bytearray(whole)
        damaged[i] ^= 1 << rng.randrange(8)
        open(path, "wb").write(damaged)
        try:
            assert_same(safe.load(path), STATE)
            assert not tensor <= i < tensor + 160
        except ValueError as e:
            named += 1
            assert path in str(e) and "\n" not in str(e)
    assert named > 200
    for size in range(0, len(whole), 50):
        open(path, "wb").write(whole[:size])
        with pytest.raises(ValueError, match="ckpt.pt cannot be read as a checkpoint"):
            safe.load(path)


def test_what_is_no_checkpoint_is_one_line(tmp_path):
    path = str(tmp_path / "ckpt.pt")
    for content in (dict(model={}), [1], dict(STATE, config=os.system)): # the last one would run code
        torch.save(content, path)
        with pytest.raises(ValueError, match="ckpt.pt cannot be read as a checkpoint") as e:
            safe.load(path)
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="No such file"):
        safe.load(str(tmp_path / "none.pt"))


def flip_a_bit(path):
    """Of the largest tensor."""
    with open(path, "rb+") as f:
        content = f.read()
        weights = max(load(*os.path.split(path))["model"].values(), key=torch.numel)
        f.seek(content.index(weights.numpy().tobytes()) + 2)
        byte = f.read(1)
        f.seek(-1, 1)
        f.write(bytes([byte[0] ^ 8]))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(here):
    train(out_dir="out", eval_interval=5, **HARD)
    train(out_dir="whole", eval_interval=5, **HARD)
    os.remove("out/summary.json")
    flip_a_bit("out/ckpt.pt")
    printed, _ = run_script("train.py", "--init_from=resume", "--out_dir=out")
    assert "out/ckpt.pt cannot be read" in printed and "the checkpoint before it, of step 15\n" in printed
    assert_same_training("whole", "out")
    for name in ("ckpt.pt", "ckpt_before.pt", "best.pt"):
        flip_a_bit(f"out/{name}")
    message = refused(init_from="resume", out_dir="out", max_iters=30)
    assert "out/ckpt.pt cannot be read" in message and "no whole out/ckpt_before.pt" in message
    for script in ("sample.py", "export_hf.py"):
        to = [] if script == "sample.py" else ["--to=hf"]
        assert "out/best.pt cannot be read" in refused(*to, script=script, out_dir="out")


def test_damaged_best_weights_are_not_tested(here, monkeypatch):
    run_script("train_vision.py", *flags(out_dir="out", epochs=1, **VISION))
    os.remove("out/summary.json")
    flip_a_bit("out/best.pt")
    message = refused(script="train_vision.py", init_from="resume", out_dir="out")
    assert "out/best.pt cannot be read" in message and "ckpt.pt, copied over it" in message
    open("out/best.pt", "wb").write(open("out/ckpt.pt", "rb").read())
    run_script("train_vision.py", "--init_from=resume", "--out_dir=out")
    assert os.path.exists("out/summary.json")


@pytest.mark.parametrize("content", ["", '{"config": {"n": 1}', "[]", '{"config": 3}', "\0\0"])
def test_a_damaged_config_is_one_message(here, content):
    train(out_dir="out", max_iters=2)
    open("out/config.json", "w").write(content)
    message = refused(init_from="resume", out_dir="out")
    assert "out/config.json is damaged" in message and "1 to fix" in message
    assert "torch.load('out/ckpt.pt')['config']" in message and load("out")["config"]["max_iters"] == 2


def test_a_damaged_line_of_metrics_costs_no_other(here):
    train(out_dir="out", max_iters=4, eval_interval=2)
    lines = open("out/metrics.jsonl").read().splitlines(keepends=True)
    open("out/metrics.jsonl", "w").write("".join([*lines[:2], '{"kind": "tr\0\n', "3\n", *lines[3:]]))
    run_script("train.py", "--init_from=resume", "--out_dir=out", "--max_iters=6")
    steps = [(row["kind"], row["step"]) for row in metrics("out")]
    assert steps == [("eval", 0), ("train", 1), ("eval", 2), ("train", 3), ("train", 4), ("eval", 4), ("train", 5),
                     ("train", 6), ("eval", 6)]

# -----------------------------------------------------------------------------
# one writer


def hold(folder):
    release = safe.lock(folder)
    open(os.path.join(folder, "held"), "w").close()
    time.sleep(60)
    release()


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)


def test_a_folder_has_one_writer_until_that_one_is_killed(tmp_path):
    folder = str(tmp_path / "out")
    other = FORKS.Process(target=hold, args=(folder,))
    other.start()
    wait_for(lambda: os.path.exists(os.path.join(folder, "held")))
    with pytest.raises(SystemExit) as e:
        safe.lock(folder)
    assert f"{folder} is in use by process {other.pid} on " in e.value.code and " since 2" in e.value.code
    other.kill()
    other.join()
    release = safe.lock(folder)
    with pytest.raises(SystemExit, match=f"process {os.getpid()} on"):
        safe.lock(folder)
    release()
    assert open(os.path.join(folder, "lock")).read() == ""
    safe.lock(folder)()


def test_a_second_run_is_refused_and_the_first_one_goes_on(here):
    first = fork(**{**LONG, "out_dir": "out"})
    wait_for(lambda: os.path.exists("out/ckpt.pt"))
    assert f"out is in use by process {first.pid}" in refused(**{**SETTINGS, "out_dir": "out", "overwrite": True})
    assert f"out is in use by process {first.pid}" in refused(init_from="resume", out_dir="out")
    step = load("out")["step"]
    wait_for(lambda: load("out")["step"] > step)
    first.kill()
    first.join()
    run_script("train.py", "--init_from=resume", "--out_dir=out", f"--max_iters={load('out')['step'] + 1}")


@pytest.mark.parametrize("out_dir, reason", [("file", "File exists"), ("file/run", "Not a directory"),
                                             ("disk", "Read-only file system")])
def test_what_cannot_be_a_runs_folder_is_one_message(here, monkeypatch, out_dir, reason):
    def makedirs(path, make=os.makedirs, **options):
        if path == "disk":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        make(path, **options)
    open("file", "w").close()
    monkeypatch.setattr(os, "makedirs", makedirs)
    message = refused(**{**SETTINGS, "out_dir": out_dir})
    assert message == f"{out_dir} cannot be a run's folder, name another one with --out_dir: {reason}"

# -----------------------------------------------------------------------------
# the end


def stopping(read, at, send):
    """What takes the place of `read`, and calls send when it is called for the at-th time."""
    def stopped_read(*args):
        nonlocal at
        at -= 1
        if at == 0:
            send()
        return read(*args)
    return stopped_read


def sending(signum):
    """A function that sends this process a signal, unless nobody listens for it: it would be the end of the tests."""
    def send():
        assert getattr(signal.getsignal(signum), "__func__", None) is safe.Halt.receive
        os.kill(os.getpid(), signum)
    return send


def exit_code_of(script, *args):
    with pytest.raises(SystemExit) as e:
        run_script(script, *args)
    return e.value.code


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_run_after_a_whole_step(here, monkeypatch, signum, code, capfd):
    before = signal.getsignal(signum)
    settings = {**SETTINGS, **HARD, "dropout": 0.1, "track_emissions": True, "carbon_intensity": 100}
    with monkeypatch.context() as patch: # of two micro-batches a step, of which one is read ahead
        patch.setattr(data.Blocks, "batch", stopping(data.Blocks.batch, 15, sending(signum)))
        assert exit_code_of("train.py", *flags(**settings, out_dir="out")) == code
    assert signal.getsignal(signum) == before
    assert load("out")["step"] == 7 and load("out")["evaluated_at"] == 0 and not os.path.exists("out/summary.json")
    assert [row["step"] for row in metrics("out", "train")] == list(range(1, 8))
    if os.path.exists("out/emissions.csv"):
        assert [row["step"] for row in csv.DictReader(open("out/emissions.csv"))] == ["0", "7"]
    run_script("train.py", "--init_from=resume", "--out_dir=out")
    run_script("train.py", *flags(**settings, out_dir="whole"))
    assert_same_training("whole", "out")


def test_a_signal_at_an_evaluation_changes_nothing_either(here, monkeypatch):
    run_script("train_vision.py", *flags(out_dir="whole", epochs=3, learn_n=True, **VISION))
    for at in (20, 11): # at an epoch's end, and in an epoch
        with monkeypatch.context() as patch:
            patch.setattr(data_vision.Batches, "train",
                          stopping(data_vision.Batches.train, at, sending(signal.SIGTERM)))
            args = ["--init_from=resume"] if at == 11 else flags(epochs=3, learn_n=True, **VISION)
            assert exit_code_of("train_vision.py", "--out_dir=out", *args) == 143
    assert load("out")["step"] == 31 and load("out")["evaluated_at"] == 20
    run_script("train_vision.py", "--init_from=resume", "--out_dir=out")
    for name in ("ckpt.pt", "best.pt"):
        assert_same(load("whole", name)["model"], load("out", name)["model"])
    assert [{**row, "seconds": 0} for row in metrics("whole", "eval")] == [
        {**row, "seconds": 0} for row in metrics("out", "eval")]


def test_a_signal_before_the_first_step_ends_at_once(here, monkeypatch, capfd):
    monkeypatch.setattr(data.Blocks, "fixed", stopping(data.Blocks.fixed, 1, sending(signal.SIGINT)))
    assert exit_code_of("train.py", *flags(**SETTINGS, out_dir="out")) == 130
    assert capfd.readouterr().err == "stopped by Ctrl-C before the first step\n"
    assert not os.path.exists("out/ckpt.pt") and open("out/lock").read() == ""


@pytest.mark.parametrize("launcher, seconds_between", [(None, 1), ("TORCHELASTIC_RUN_ID", 30), ("SLURM_JOB_ID", 30)])
def test_the_second_signal_of_a_kind_ends_at_once(monkeypatch, launcher, seconds_between):
    """But not where a launcher, its own launcher and the study each pass on the same one, while a long step is made."""
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    if launcher:
        monkeypatch.setenv(launcher, "7")
    codes, now = [], [100.0]
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(safe.time, "monotonic", lambda: now[0])
    halt = safe.Halt()
    try:
        assert not halt.asked()
        for part, signum in ((0, signal.SIGINT), (0.9, signal.SIGINT), (1.1, signal.SIGTERM)):
            now[0] += part * seconds_between
            sending(signum)()
            assert not codes and halt.asked()
        now[0] += 1.1 * seconds_between
        sending(signal.SIGTERM)()
        assert codes == [143]
    finally:
        halt.forget()


def test_a_signal_that_is_ignored_stays_ignored(): # as nohup wants it
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        halt = safe.Halt()
        assert not halt.asked() and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == halt.receive
        halt.forget()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_time_limit_ends_a_run_again_and_again(here):
    settings = {**SETTINGS, "max_iters": 3, "eval_interval": 2, **HARD}
    assert exit_code_of("train.py", *flags(**settings, out_dir="out", time_limit=1e-6)) == 124
    assert load("out")["step"] == 1
    for step in (2, 3): # each process makes a step
        assert exit_code_of("train.py", "--init_from=resume", "--out_dir=out") == 124
        assert load("out")["step"] == step
    printed, _ = run_script("train.py", "--init_from=resume", "--out_dir=out")
    assert "done" in printed # the last evaluation
    train(out_dir="whole", **{**settings, **HARD})
    assert_same_training("whole", "out")


def a_study(folder):
    study.begin(folder, study.recipe("train.py", "", flags(**LONG))).join()


def test_a_run_whose_study_is_killed_ends_after_a_whole_step(here):
    process = FORKS.Process(target=a_study, args=("out",))
    process.start()
    wait_for(lambda: os.path.exists("out/ckpt.pt"))
    process.kill()
    wait_for(lambda: "after step" in log_of("out"))
    assert "stopped by the end of its terminal or study after step " in log_of("out")
    wait_for(lambda: open("out/lock").read() == "")
    assert load("out")["step"] == metrics("out")[-1]["step"]

# -----------------------------------------------------------------------------
# what is around a run


def test_a_run_needs_neither_a_reader_nor_a_compile_cache(here):
    open("file", "w").close()
    command = [sys.executable, os.path.join(ROOT, "train.py"), *flags(**{**SETTINGS, "out_dir": "out"})]
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": "file/cache"} # which cannot be made
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "training tokens" in process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0
    assert load("out")["step"] == 20 and os.path.exists("out/summary.json")


@pytest.mark.parametrize("problem", [RuntimeError("No API key configured.\nlogin"), ImportError("no wandb")])
@pytest.mark.parametrize("tracker, hint", [("wandb", "wandb_mode=offline needs neither key nor network"),
                                           ("trackio", "pip install trackio")])
def test_a_tracker_that_does_not_start_is_one_line(here, monkeypatch, problem, tracker, hint):
    def init(project, name, config, **mode):
        assert (mode == dict(mode="online")) == (tracker == "wandb")
        raise problem
    monkeypatch.setitem(sys.modules, tracker, SimpleNamespace(init=init))
    printed, _ = train(out_dir="out", max_iters=2, wandb_log=True, tracker=tracker)
    line, = [line for line in printed.splitlines() if "going on without" in line]
    assert line == f"going on without {tracker} ({type(problem).__name__}: {str(problem).splitlines()[0]}); {hint}"
    assert printed.index(line) < printed.index("step 0/2") and load("out")["step"] == 2

# -----------------------------------------------------------------------------
# ranks


def test_a_signal_to_one_rank_ends_all_at_the_same_step(here):
    ranks = fork_ranks(2, **{**LONG, "out_dir": "out", "eval_interval": 10 ** 9, "dropout": 0.1})
    wait_for(lambda: os.path.exists("out/metrics.jsonl") and len(metrics("out")) > 5)
    os.kill(ranks[1].pid, signal.SIGTERM)
    first, second = ended(ranks, 143, 0) # so that torchrun does not kill the one that saves
    step = load("out")["step"]
    assert f"stopped by SIGTERM after step {step}, which is saved" in first and second == ""
    assert metrics("out")[-1]["step"] == step
    run_script("train.py", "--init_from=resume", "--out_dir=out", f"--max_iters={step + 3}")
    train(**{**LONG, "out_dir": "whole", "eval_interval": 10 ** 9, "dropout": 0.1, "max_iters": step + 3})
    assert_close_runs("whole", "out")


def test_a_signal_that_comes_while_ranks_agree_is_not_lost(monkeypatch):
    halt = safe.Halt()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda code, op: halt.receive(signal.SIGTERM, None))
    try:
        assert not halt.asked() # nor is it for this rank, as the others have not heard of it
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda code, op: None)
        assert halt.asked() and halt.code == 143
    finally:
        halt.forget()


def test_torchrun_is_stopped_by_sigterm(here):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               os.path.join(ROOT, "train.py"), *flags(**{**LONG, "out_dir": "out", "eval_interval": 10 ** 9})]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: os.path.exists("out/metrics.jsonl") and len(metrics("out")) > 5)
        process.terminate() # what a scheduler does; the launcher passes it on to its ranks
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    step = load("out")["step"]
    assert process.returncode != 0 and 'train.py", line' not in err
    assert out.count(f"stopped by SIGTERM after step {step}, which is saved") == 1, out + err
    assert metrics("out")[-1]["step"] == step


def test_a_dead_rank_ends_the_others(here):
    ranks = fork_ranks(2, **{**LONG, "out_dir": "out"})
    wait_for(lambda: os.path.exists("out/ckpt.pt"))
    ranks[1].kill()
    ranks[0].join(20)
    assert ranks[0].exitcode == 1 and load("out")["step"] > 0

# -----------------------------------------------------------------------------
# kills


def compare(whole, out):
    """Two runs are the same: the last and the best weights, and every number of the log."""
    for name in ("ckpt.pt", "best.pt"):
        x, y = load(whole, name), load(out, name)
        for key in x.keys() - {"config"}:
            assert_same(x[key], y[key], f"{name}: {key}")
    a, b = ([{**row, "seconds": 0} for row in metrics(folder)] for folder in (whole, out))
    assert a == b and os.path.exists(os.path.join(out, "summary.json"))


def begin_or_resume(script, settings, **options):
    if os.path.exists("out/ckpt.pt"):
        return fork(script, "--init_from=resume", "--out_dir=out", **options)
    return fork(script, **settings, out_dir="out", overwrite=True, **options)


KILLED = {
    "gpt": ("train.py", {**SETTINGS, **HARD, "dropout": 0.1, "max_iters": 60, "eval_interval": 5}),
    "vision": ("train_vision.py", dict(VISION, epochs=4, augment="crop", learn_n=True)),
    "bert": ("train.py", {**SETTINGS, "model": "bert", "max_iters": 60, "eval_interval": 7, "distance": "cosine"}),
    "qwen2": ("train.py", {**SETTINGS, "model": "qwen2", "n_kv_head": 1, "intermediate_size": 48, "max_iters": 60,
                           "eval_interval": 5, "dtype": "float16", "distance": "offset_l2"}),
    "covariance": ("train_vision.py", dict(VISION, epochs=4, distance="mahalanobis", variant="covariance")),
    "noise": ("train_vision.py", dict(VISION, epochs=4, distance="hamming", variant="gumbel", optimizer="sgd",
                                      learning_rate=0.01, dtype="float16")),
}


@pytest.mark.parametrize("name, kills", [
    ("gpt", 2), ("vision", 2), *(pytest.param(name, 25, marks=pytest.mark.torture) for name in KILLED)])
def test_a_run_that_is_killed_at_random_moments_ends_as_the_same_run(here, name, kills):
    script, settings = KILLED[name]
    length = "max_iters" if script == "train.py" else "epochs"
    settings = {**settings, length: kills * settings[length]} # long enough for as many kills
    run_script(script, *flags(**settings, out_dir="whole"))
    for _ in range(kills):
        process = begin_or_resume(script, settings)
        process.join(random.uniform(0.3, 1.3)) # of which it takes about 0.5 s to begin
        process.kill()
        process.join()
    process = begin_or_resume(script, settings)
    process.join()
    assert process.exitcode == 0, log_of("log")
    compare("whole", "out")


@pytest.mark.parametrize("name", ["gpt", "vision"])
@pytest.mark.parametrize("stride", [23, pytest.param(1, marks=pytest.mark.torture)])
def test_a_run_that_is_killed_at_a_file_ends_as_the_same_run(here, name, stride):
    script, settings = KILLED[name]
    settings = {**settings, **(dict(max_iters=12) if name == "gpt" else dict(epochs=2))}
    run_script(script, *flags(**settings, out_dir="whole"))
    for kill_at in range(min(stride, 7), 10 ** 6, stride):
        process = fork(script, **settings, out_dir="out", overwrite=True, kill_at=kill_at)
        process.join()
        if process.exitcode == 0: # it has ended before that
            break
        assert process.exitcode == -signal.SIGKILL, log_of("log")
        process = begin_or_resume(script, settings)
        process.join()
        assert process.exitcode == 0, log_of("log")
        compare("whole", "out")
    assert kill_at > 30
