"""
The stage gpu-runs of gpu.py: whole training runs on a GPU, by the training scripts as they are.

$ make gpu-runs         # -> runs.json, runs.csv, runs.png, first_steps.json

    GPT-2 124M, 300 steps with the linear, the cosine and the Euclidean head, beside nanoGPT's loop: step time,
        tokens per second, MFU, peak memory
    ResNet-50 and PVTv2-B0 with the cosine head, an epoch of CIFAR-10, or of random images of its size without it
    every head's first 100 steps in a small GPT

The energy of a step is the difference of the GPU's own counter between two log lines. Beside it stands the usual model,
the power limit times the seconds.
"""
import json
import math
import os
import runpy
import statistics
import sys
import tempfile
from types import SimpleNamespace

import torch

import bench_train
import distances
import figures
import run
import safe
from study import all_heads, one_of_grid

HERE = os.path.dirname(os.path.abspath(__file__))

SAME = dict(seed=bench_train.SEED, track_emissions=False)
GPT2 = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=16, gradient_accumulation_steps=2,
            vocab_size=50257, tie_weights=True, max_iters=300, log_interval=20, eval_interval=300, eval_iters=10,
            learning_rate=3e-4, decay_lr=False, warmup_iters=0, dtype="auto", compile=True)
FIRST = dict(n_layer=4, n_head=4, n_embd=128, block_size=128, batch_size=16, gradient_accumulation_steps=1,
             max_iters=100, log_interval=1, eval_interval=100, eval_iters=10, learning_rate=1e-3, warmup_iters=20,
             dtype="auto", compile=False)
TINY = dict(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=4, gradient_accumulation_steps=1, vocab_size=300,
            max_iters=6, eval_interval=6, eval_iters=1, dtype="float32", compile=False)
VISION = {"resnet50": 512, "pvtv2_b0": 256} # images a batch, as in config/
TINY_VISION = {"mlp": 20}
CIFAR10 = ("cifar10", "cifar-10-batches-bin", "cifar-10-batches-py") # the folders in data/ where it may lie

# -----------------------------------------------------------------------------
# data


def flags(settings):
    return [f"--{key}={value}" for key, value in settings.items()]


def prepare_corpus(stage, data_dir):
    """Write data_dir/stdlib: the standard library's source or, where that cannot be, random tokens. Returns which."""
    folder = os.path.join(data_dir, "stdlib")
    if not stage.tiny:
        done = stage.run("corpus", ["prepare_stdlib.py", f"--out_dir={folder}"])
        if done is not None and done["code"] == 0:
            return "the standard library's source"
    os.makedirs(folder, exist_ok=True)
    vocab_size, count = (300, 2 ** 12) if stage.tiny else (4096, 2 ** 22)
    bench_train.write_tokens(folder, vocab_size, count, count // 4)
    return "random tokens"


def prepare_images(stage, data_dir):
    """Return (the folder with CIFAR-10, "CIFAR-10"), or write random images of its size and return where they are."""
    folder = os.path.join(HERE, "data")
    if not stage.tiny and any(os.path.isdir(os.path.join(folder, name)) for name in CIFAR10):
        return folder, "CIFAR-10"
    num_train, num_test = (200, 20) if stage.tiny else (50000, 10000)
    bench_train.write_images(data_dir, "cifar10", num_train, num_test)
    return data_dir, "random images"

# -----------------------------------------------------------------------------
# what a run tells


def log_lines(folder):
    return [row for row in safe.read_metrics(folder)[0] if row["kind"] == "train"]


class Watch:
    """Notes the GPU's energy counter as a run writes its log lines: joules by step."""

    def __init__(self, folder, meter):
        self.folder, self.meter, self.joules = folder, meter, {}

    def __call__(self):
        rows = log_lines(self.folder)
        if rows and rows[-1]["step"] not in self.joules:
            self.joules[rows[-1]["step"]] = self.meter.joules()

    def energy(self, rows):
        """The joules of a step between the first and the last of these log lines, counted and by the power limit."""
        first, last, limit = rows[0]["step"], rows[-1]["step"], self.meter.limit_watts()
        counted = [self.joules.get(step) for step in (first, last)]
        if first == last or limit is None or None in counted or counted[0] == counted[1]:
            return {}
        joules = (counted[1] - counted[0]) / (last - first)
        model = limit * statistics.mean(row["ms"] for row in rows[1:]) / 1000
        return {"joules a step": joules, "power limit, W": limit, "limit x seconds, J": model,
                "more than counted, %": 100 * (model / joules - 1)}


def measured(folder, watch, per_step):
    """
    Columns for a run: the median ms of a step after the first third of its log lines, tokens or images per second (a
    step has per_step of them), loss, peak memory and energy. {} where it wrote fewer than two lines.
    """
    rows = log_lines(folder)
    if len(rows) < 2:
        return {}
    late = rows[(len(rows) + 2) // 3:]
    ms = statistics.median(row["ms"] for row in late)
    end = dict(rows[-1])
    summary = os.path.join(folder, "summary.json")
    if os.path.exists(summary):
        with open(summary) as f:
            end.update(json.load(f))
    peak = end.get("peak_memory_bytes")
    return {"ms": ms, "per second": 1000 * per_step / ms, "steps": rows[-1]["step"], "loss": rows[-1]["loss"],
            "validation loss": end.get("val_loss"), "peak GB": peak / 1e9 if peak else None, **watch.energy(late),
            "losses": [(row["step"], row["loss"]) for row in rows]}


def keep(stage, rows):
    stage.write("runs.json", rows)
    stage.write_table("runs.csv", rows)
    stage.draw("runs.png", losses, rows)


def losses(rows):
    """The language models' losses over their steps."""
    fig, ax = figures.new_figure(7, 4.2)
    for row in rows:
        if row["run"].startswith("GPT-2") and "losses" in row:
            ax.plot(*zip(*row["losses"]), lw=1.5, label=row["run"])
    ax.set(xlabel="steps", ylabel="training loss (nats per token)")
    figures.legend(fig, [ax])
    return fig

# -----------------------------------------------------------------------------
# the runs


def train_gpts(stage, scratch, rows):
    corpus = prepare_corpus(stage, scratch)
    settings = {**SAME, **GPT2, **(TINY if stage.tiny else {}), "data_dir": scratch, "dataset": "stdlib"}
    if stage.tiny:
        settings["log_interval"] = 2
    device, _, dtype = run.choose_device("auto", settings["dtype"], [])
    settings.update(device=device, dtype=dtype)
    heads = {"nanoGPT's loop": "baseline", "linear": "baseline", "cosine": "cosine", "euclidean": "euclidean"}
    for name, head in heads.items():
        folder = os.path.join(scratch, f"gpt_{len(rows)}")
        os.mkdir(folder)
        if name == "nanoGPT's loop":
            command = ["bench_rivals.py", "nanogpt", json.dumps({**settings, "out_dir": folder})]
        else:
            command = ["train.py", *flags({**settings, "out_dir": folder, "distance": head})]
        watch = Watch(folder, stage.meter)
        stage.run(f"GPT-2, {name}", command, watch=watch)
        tokens = settings["batch_size"] * settings["block_size"] * settings["gradient_accumulation_steps"]
        row = {"run": f"GPT-2, {name}", "data": corpus, "dtype": dtype, **measured(folder, watch, tokens)}
        if "ms" in row:
            peak = run.peak_flops(run.device_name(device), dtype) or 0
            c = SimpleNamespace(**settings, peak_tflops=peak / 1e12)
            row["MFU %"] = bench_train.speed(c, head, tokens, row["ms"] / 1000).get("MFU %")
            loop = rows[0] if rows else row
            row["speed / nanoGPT's"] = loop["ms"] / row["ms"] if "ms" in loop else None
        rows.append(row)
        keep(stage, rows)


def train_vision(stage, scratch, rows):
    data_dir, images = prepare_images(stage, scratch)
    for name, batch_size in (TINY_VISION if stage.tiny else VISION).items():
        folder = os.path.join(scratch, name)
        settings = dict(SAME, dataset="cifar10", data_dir=data_dir, out_dir=folder, distance="cosine", epochs=1,
                        batch_size=batch_size, log_interval=1 if stage.tiny else 10, compile=False, plots=False)
        watch = Watch(folder, stage.meter)
        stage.run(f"{name}, cosine", ["train_vision.py", f"config/{name}.py", *flags(settings)], watch=watch)
        rows.append({"run": f"{name}, cosine", "data": images, **measured(folder, watch, batch_size)})
        keep(stage, rows)


def train_first_steps(stage, scratch):
    """Every head's first steps, in as many processes as it takes. Returns the heads that failed."""
    heads = ["baseline", "cosine"] if stage.tiny else all_heads()
    settings = {**SAME, **FIRST, **(TINY if stage.tiny else {}), "data_dir": scratch, "dataset": "stdlib"}
    path = stage.path("first_steps.json")
    stage.remove("first_steps.json")
    before, waiting = None, heads
    while waiting and waiting != before: # a process that dies takes one head with it
        before = waiting
        stage.run("every head's first steps", ["gpu_runs.py", path, json.dumps(settings), *waiting], quiet=path)
        found = stage.read("first_steps.json", {})
        waiting = [head for head in heads if head not in found]
    for head in waiting:
        stage.leave_out(f"the first steps of {head}")
    return [head for head, row in found.items() if row["error"]]


def run_all(stage):
    """All of it. Returns what failed."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        train_gpts(stage, scratch, rows)
        train_vision(stage, scratch, rows)
        failed = train_first_steps(stage, scratch)
    return stage.failed() + failed

# -----------------------------------------------------------------------------
# a process of train_first_steps


def first_steps(path, settings, heads):
    """Train each head for some steps, in this process, and add its losses to the file, or why there are none."""
    nothing = dict.fromkeys(distances.WORTH_COMPILING, math.inf)
    distances.WORTH_COMPILING.update(nothing) # compiling would take most of the time
    found = {}
    if os.path.exists(path):
        with open(path) as f:
            found = json.load(f)
    for head in heads:
        found[head] = dict(error="the process died", losses=[], ms=None)
        safe.write(path, json.dumps(found, indent=1))
        with tempfile.TemporaryDirectory() as folder:
            _, of_head = one_of_grid(bench_train.SEED, "", head, "harmonic", "default")
            error = run_here("train.py", [*flags({**settings, "out_dir": folder}), *of_head])
            rows = log_lines(folder)
        ms = statistics.median(row["ms"] for row in rows) if rows else None
        found[head] = dict(error=error, losses=[row["loss"] for row in rows], ms=ms)
        safe.write(path, json.dumps(found, indent=1))


def run_here(script, arguments):
    """Run a script in this process, which saves the imports. Returns its error in words, or None."""
    before, sys.argv = sys.argv, [os.path.join(HERE, script), *arguments]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as e:
        return None if e.code is None else str(e.code)
    except Exception as e:
        if "CUDA error" in str(e): # nothing works in this process any more
            raise
        return f"{type(e).__name__}: {e}"
    finally:
        run.closing.close()
        sys.argv = before
        torch.cuda.empty_cache()
    return None


if __name__ == "__main__":
    first_steps(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:])
