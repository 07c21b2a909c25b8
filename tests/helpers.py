"""Several test files share this: datasets, scripts run in this process or their own, runs compared to the last bit."""
import contextlib
import io
import json
import multiprocessing
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

import configurator
import data
import run
import study

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CHARS = [chr(c) for c in range(32, 127)] + ["\n", "\t"] # 97, so that 31 of 128 rows are padding
SETTINGS = dict(dataset="tiny", n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=4,
                gradient_accumulation_steps=2, compile=False, device="cpu", learning_rate=1e-2, min_lr=1e-3,
                warmup_iters=5, max_iters=20, lr_decay_iters=20, log_interval=1, eval_interval=10, eval_iters=-1,
                track_emissions=False, dtype="float32")
# noise, and a head that learns: they make it hard to resume or to split a run
HARD = dict(dropout=0.1, distance="euclidean", learn_n=True)


def make_dataset(folder, train_tokens=6000, val_tokens=16 * 21 + 5, dtype="uint16", **meta):
    """
    nanoGPT's char-level format: the alphabet over and over, a tenth of it noise. 21 validation blocks, which 4 does not
    divide.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, size in (("train", train_tokens), ("val", val_tokens)):
        ids = np.where(rng.random(size) < 0.1, rng.integers(0, 97, size), np.arange(size) % 97)
        ids.astype(dtype).tofile(folder / f"{split}.bin")
    meta = dict(vocab_size=97, stoi={c: i for i, c in enumerate(CHARS)}, itos=dict(enumerate(CHARS)),
                hash=data.file_hash(folder), val_tokens=val_tokens, val_bytes=val_tokens) | meta
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def flags(**settings):
    return [f"--{key}={value}" for key, value in settings.items()]


def run_script(name, *args):
    """
    python name *args, but in this process: (what it printed, its globals). SystemExit comes through, unless it is the
    early end of a run that has nothing to do, which leaves no globals.
    """
    argv, precision, threads = sys.argv, torch.get_float32_matmul_precision(), torch.get_num_threads()
    sys.argv = [os.path.join(ROOT, name), *args]
    out, found = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(out):
            found = runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as e:
        if e.code is not None:
            raise
    finally:
        run.closing.close()
        sys.argv = argv
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close("all")
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads) # else --threads holds for all later tests
    return out.getvalue(), found


def train(*args, **settings):
    return run_script("train.py", *args, *flags(**{**SETTINGS, **settings}))


def refused(*args, script="train.py", **settings):
    """The message with which the script ends: python prints it to stderr and exits with 1, there is no traceback."""
    with pytest.raises(SystemExit) as e:
        run_script(script, *args, *flags(**settings))
    assert isinstance(e.value.code, str), e.value.code
    return e.value.code


def processes(cwd, *commands):
    """Run them side by side: [(exit code, stdout, stderr)]. None may hang."""
    env = {**os.environ, "WANDB_DIR": str(cwd), "PYTHONPATH": ""} # the scripts find their own imports
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started = [subprocess.Popen([sys.executable, *command], cwd=cwd, env=env, **pipes) for command in commands]
    try:
        results = [p.communicate(timeout=120) for p in started]
    finally:
        for p in started:
            p.kill()
    return [(p.returncode, *result) for p, result in zip(started, results)]


def train_processes(cwd, *runs, codes=0):
    command = [os.path.join(ROOT, "train.py")]
    results = processes(cwd, *([*command, *flags(**{**SETTINGS, **settings})] for settings in runs))
    for code, out, err in results:
        assert code == codes, out + err
    return [out + err for _, out, err in results]


# runs of which there are many are forks of a process that has only imported what they need
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["codecarbon", "data_vision", "families", "figures", "helpers", "model_vision",
                              "sklearn.datasets", "sklearn.metrics", "torch._dynamo"])


def forked(cwd, env, kill_at, script, args, log):
    """What such a process does: python script *args in cwd, its output in the folder log."""
    os.chdir(cwd)
    os.environ.update(env)
    if kill_at:
        sys.addaudithook(killer(kill_at))
    study.child(os.path.join(ROOT, script), args, log)


def killer(at):
    """An audit hook that kills the process at the at-th time that it touches a file of the folder out."""
    def hook(event, args):
        nonlocal at
        if event in ("open", "os.remove", "os.rename", "os.link") and str(args[0]).startswith("out/"):
            at -= 1
            if at == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    return hook


def fork(script="train.py", *args, env=(), kill_at=0, log="log", **settings):
    """Begin a run in a process of its own in the current folder, and return that process."""
    os.makedirs(log, exist_ok=True)
    args = [*args, *flags(**settings)]
    process = FORKS.Process(target=forked, args=(os.getcwd(), dict(env), kill_at, script, args, log))
    process.start()
    return process


def rank_environments(count, nodes=1):
    """The environment variables of each process that `torchrun --nproc_per_node=...` begins on so many nodes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = dict(WORLD_SIZE=count, LOCAL_WORLD_SIZE=count // nodes, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    of_each = [dict(RANK=i, LOCAL_RANK=i % (count // nodes), **common) for i in range(count)]
    return [{key: str(value) for key, value in env.items()} for env in of_each]


def fork_ranks(count, script="train.py", *args, nodes=1, **settings):
    """What `torchrun --nproc_per_node=count script *args` begins: the processes, whose logs are in log0, log1, ..."""
    return [fork(script, *args, env=env, log=f"log{i}", **settings)
            for i, env in enumerate(rank_environments(count, nodes))]


def ended(ranks, *codes):
    """What each of these processes has printed. They have to end, with these exit codes or without an error."""
    for process in ranks:
        process.join(120)
        process.kill()
    texts = [log_of(f"log{i}") for i in range(len(ranks))]
    assert [process.exitcode for process in ranks] == list(codes or [0] * len(ranks)), "\n\n".join(texts)
    return texts


def log_of(folder):
    with open(os.path.join(folder, "log.txt")) as f:
        return f.read()


def metrics(out_dir, kind=None):
    """The lines of metrics.jsonl without what differs from run to run: times and energy."""
    with open(os.path.join(out_dir, "metrics.jsonl")) as f:
        rows = [json.loads(line) for line in f]
    times = ("ms", "tokens_per_s", "mfu", "cpu_seconds")
    return [{k: v for k, v in row.items() if k not in times and not k.endswith("_total")}
            for row in rows if kind in (None, row["kind"])]


def load(out_dir, name="ckpt.pt"):
    return torch.load(os.path.join(out_dir, name), weights_only=True)


def assert_same(a, b, path=""):
    """Equal to the last bit, through dicts and lists."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
    if isinstance(a, (dict, list, tuple)):
        assert len(a) == len(b), path
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_same(a[key], b[key], f"{path}/{key}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, (path, a, b)


def assert_same_training(a, b):
    x, y = load(a), load(b)
    for key in ("model", "optimizer", "scaler", "step", "best_val_loss", "best_step", "val_loss"):
        assert_same(x[key], y[key], key)
    assert metrics(a) == metrics(b)


def assert_close_runs(a, b, tolerance=1e-5):
    """Equal up to the order in which fp32 sums are taken."""
    for x, y in zip(metrics(a), metrics(b), strict=True):
        for key, value in y.items():
            if type(value) not in (str, type(None)):
                y[key] = pytest.approx(value, rel=tolerance, abs=tolerance)
        assert x == y
    x, y = load(a)["model"], load(b)["model"]
    for name in x:
        torch.testing.assert_close(x[name], y[name], rtol=tolerance, atol=tolerance,
                                   msg=lambda m, name=name: f"{name}: {m}")


def run_script_loud(script, arg, monkeypatch):
    monkeypatch.setattr(sys, "argv", [os.path.join(ROOT, script), arg])
    runpy.run_path(sys.argv[0], run_name="__main__")


def defaults_of(script):
    """The namespace that a script gives to configure, and no step further."""
    class Reached(Exception):
        pass

    def reach(namespace, *args, **kwargs):
        raise Reached({k: v for k, v in namespace.items() if k[0] != "_" and type(v) in configurator.SCALARS})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Reached) as e:
        patch.setattr(configurator, "configure", reach)
        patch.setattr(sys, "argv", [script, "head"]) # a word that bench.py takes
        runpy.run_path(os.path.join(ROOT, script), run_name="__main__")
    return e.value.args[0]
