"""
The training scripts as they are, timed as processes in short turns with their rivals, which are processes as well.

$ python bench.py step      # training a GPT, against nanoGPT's loop
$ python bench.py vision    # training on images, against a plain loop over a DataLoader

Each turn starts a process that makes its own model, trains for a warm-up, then for as many steps again, and writes
metrics.jsonl into a folder of its own. `ms` in the last log line is its time per step. The functions of `c` take the
settings of bench.py as its attributes; `race` is the function of that name there.
"""
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch

from bench_rivals import LOOPS, image_loader
from data import token_dtype
from data_vision import Batches
from model import GPT, GPTConfig
from run import flops_per_token, read_metrics

HERE = os.path.dirname(os.path.abspath(__file__))
SEED = 1337

MNIST = dict(dataset="mnist", normalize="half", augment="none")
CIFAR10 = dict(dataset="cifar10", normalize="cifar10", augment="standard")
ADAM = dict(optimizer="adam", learning_rate=3e-4, weight_decay=0.0)
SGD = dict(optimizer="sgd", learning_rate=0.1, weight_decay=1e-4)
VISION = { # settings of train_vision.py, from config/; the pipeline has no model
    "pipeline": MNIST,
    "mlp": dict(model="mlp", **MNIST, **ADAM),
    "cnn": dict(model="cnn", **MNIST, **ADAM),
    "resnet50": dict(model="resnet50", **CIFAR10, **SGD),
}
VISION_SIZES = { # images per batch, which on a GPU are those of config/, and steps that are timed
    "cpu": {"pipeline": (8192, 3), "mlp": (512, 20), "cnn": (512, 6), "resnet50": (32, 2)},
    "cuda": {"pipeline": (8192, 7), "mlp": (2048, 29), "cnn": (8192, 7), "resnet50": (512, 20)},
}
IMAGE_SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
HELD_OUT = 20 # images that train_vision.py validates on, and as many that it is tested on: two of each class

# -----------------------------------------------------------------------------
# processes


def seconds_per_step(runner):
    """
    Run a training script, or a loop of bench_rivals.py, in a process of its own; runner is (its name, its settings but
    for out_dir). Returns the seconds per step in the last log line. Raises ChildProcessError with the last lines of
    what the process printed when it fails.
    """
    name, settings = runner
    with tempfile.TemporaryDirectory() as out_dir:
        settings = {**settings, "out_dir": out_dir}
        if name in LOOPS:
            command = [os.path.join(HERE, "bench_rivals.py"), name, json.dumps(settings)]
        else:
            command = [os.path.join(HERE, name), *(f"--{key}={value}" for key, value in settings.items())]
        done = subprocess.run(
            [sys.executable, *command], env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        if done.returncode != 0:
            end = "\n".join(done.stdout.splitlines()[-5:])
            raise ChildProcessError(f"{name} failed with exit code {done.returncode}; the end of its output:\n{end}")
        rows, _ = read_metrics(out_dir)
    lines = [row for row in rows if row["kind"] == "train"]
    if len(lines) < 2:
        raise ChildProcessError(f"{name} wrote {len(lines)} log line(s); a warm-up and a timed one were expected")
    return lines[-1]["ms"] / 1000

# -----------------------------------------------------------------------------
# train.py


def speed(c, head, tokens, seconds):
    """Columns of a table: the tokens per second of a GPT with that head, and its MFU if the device's peak is given."""
    rate = tokens / seconds
    columns = {"tokens/s": rate}
    if c.peak_tflops:
        with torch.device("meta"): # takes neither time nor memory
            model = GPT(GPTConfig(c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd, bias=False,
                                  tie_weights=True, distance=head))
        columns["MFU %"] = 100 * flops_per_token(model) * rate / (c.peak_tflops * 1e12)
    return columns


def write_tokens(folder, vocab_size, num_train, num_val):
    """Write a dataset of random token ids in the format of data.py."""
    rng = np.random.default_rng(SEED)
    dtype = token_dtype(vocab_size)
    for name, count in (("train.bin", num_train), ("val.bin", num_val)):
        ids = rng.integers(vocab_size, size=count, dtype=dtype)
        ids.tofile(os.path.join(folder, name))
    meta = dict(vocab_size=vocab_size, dtype=dtype, encoding="none", eot=None, source="random ids")
    with open(os.path.join(folder, "meta.pkl"), "wb") as f:
        pickle.dump(meta, f)


@contextmanager
def token_source(c):
    """The settings data_dir and dataset: those that were asked for, or of random tokens that are removed at the end."""
    if c.dataset:
        yield dict(data_dir=c.data_dir, dataset=c.dataset)
        return
    with tempfile.TemporaryDirectory() as data_dir:
        folder = os.path.join(data_dir, "random")
        os.mkdir(folder)
        tokens = c.batch_size * c.block_size
        write_tokens(folder, c.vocab_size, num_train=max(2 ** 22, 4 * tokens), num_val=tokens + 1)
        yield dict(data_dir=data_dir, dataset="random")


def step(c, heads, race):
    """The rows of the table: train.py with the baseline and each of the heads, and nanoGPT's loop."""
    loop = "nanoGPT's loop"
    model = dict(vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, block_size=c.block_size,
                 tie_weights=True)
    schedule = dict(learning_rate=6e-4, decay_lr=False, warmup_iters=0, max_iters=2 * c.steps, log_interval=c.steps,
                    eval_interval=2 * c.steps, eval_iters=1)
    rest = dict(batch_size=c.batch_size, gradient_accumulation_steps=c.gradient_accumulation_steps, device=c.device,
                dtype=c.dtype, compile=c.compile, triton=c.triton, seed=SEED, track_emissions=False)
    with token_source(c) as source:
        settings = dict(**source, **model, **schedule, **rest)
        runners = {loop: ("nanogpt", settings)}
        for head in dict.fromkeys(("baseline", *heads)):
            runners[head] = ("train.py", {**settings, "distance": head})
        times, median = race(runners, warm_up=False, clock=seconds_per_step)
    tokens = c.gradient_accumulation_steps * c.batch_size * c.block_size
    rows = []
    for name, seconds in median.items():
        head = "baseline" if name == loop else name
        rows.append({"loop": name, "ms": seconds * 1e3, **speed(c, head, tokens, seconds),
                     "speed / nanoGPT's": median[loop] / seconds, "speed / baseline": median["baseline"] / seconds,
                     "raw": dict(seconds=times[name])})
    return rows

# -----------------------------------------------------------------------------
# train_vision.py


def random_images(count, shape):
    """x (count, C, H, W) uint8, which is noise, and y (count,) int64, the labels 0..9 in turn: none is missing."""
    x = np.random.default_rng(SEED).integers(256, size=(count, *shape), dtype=np.uint8)
    return x, np.arange(count) % 10


def write_images(data_dir, dataset, num_train, num_test):
    """Write a dataset of random images in the format of data_vision.py."""
    x, y = random_images(num_train + num_test, IMAGE_SHAPES[dataset])
    os.mkdir(os.path.join(data_dir, dataset))
    np.savez(os.path.join(data_dir, dataset, "images.npz"), train_x=x[num_test:], train_y=y[num_test:],
             test_x=x[:num_test], test_y=y[:num_test])


def race_pipelines(data, workers, num_batches, race):
    """Race epochs of batches alone, data_vision.py's and a DataLoader's. Returns {name: [seconds per batch, ...]}."""
    x, y = random_images(num_batches * data["batch_size"], IMAGE_SHAPES[data["dataset"]])
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    device = data["device"]
    batches = Batches(x, y, data["batch_size"], SEED, data["normalize"], data["augment"], device=device)
    loader = image_loader(x, y, SimpleNamespace(**data, workers=workers))
    first = 0

    def ours():
        nonlocal first
        for i in range(first, first + num_batches):
            batches.train(i)
        first += num_batches

    def plain():
        for x, y in loader:
            x.to(device, non_blocking=True)
            y.to(device, non_blocking=True)

    times, _ = race({"ours": ours, "plain": plain})
    return {name: [epoch / num_batches for epoch in seconds] for name, seconds in times.items()}


def race_trainers(settings, workers, num_batches, race):
    """Race train_vision.py and the plain loop; each trains an epoch, then one that is timed. Returns the same."""
    num_images = num_batches * settings["batch_size"] + HELD_OUT
    with tempfile.TemporaryDirectory() as data_dir:
        write_images(data_dir, settings["dataset"], num_images, HELD_OUT)
        settings = dict(settings, data_dir=data_dir, val_fraction=HELD_OUT / num_images, epochs=2, seed=SEED)
        # a log line at the end of each epoch, and no evaluation between the two
        only_ours = dict(log_interval=10 ** 9, eval_interval=2, patience=0, plots=False, track_emissions=False)
        runners = {"ours": ("train_vision.py", {**settings, **only_ours}),
                   "plain": ("dataloader", {**settings, "workers": workers})}
        times, _ = race(runners, warm_up=False, clock=seconds_per_step)
    return times


def vision(c, race):
    """The rows of the table: the batches alone, and a training step of each backbone."""
    workers = min(os.cpu_count(), 4)
    rows = []
    for what, (size, num_batches) in VISION_SIZES[c.device].items():
        settings = dict(VISION[what], batch_size=size, device=c.device)
        if what == "pipeline":
            times = race_pipelines(settings, workers, num_batches, race)
        else:
            times = race_trainers(dict(settings, dtype=c.dtype), workers, num_batches, race)
        ours, plain = statistics.median(times["ours"]), statistics.median(times["plain"])
        rows.append({"what": what, "images": "{}x{}x{}".format(*IMAGE_SHAPES[settings["dataset"]]), "batch": size,
                     "steps": num_batches, "images/s": size / ours, "batches/s": 1 / ours,
                     "DataLoader's images/s": size / plain, "speed / DataLoader's": plain / ours,
                     "raw": dict(seconds=times["ours"], rival_seconds=times["plain"], workers=workers)})
    return rows
