"""
bench.py: its rivals compute what the heads compute and train what the scripts train, its numbers follow from the times
that it keeps, and what it refuses. No time is asserted.

$ pytest tests/test_bench.py
"""
import json
import math
import os
import re
import statistics
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, flags, load, run_script

import bench
import bench_rivals
import bench_train
from configurator import configure
from data import Blocks
from data_vision import Batches, augment
from model import GPT, GPTConfig
from model_vision import VisionNet
from run import read_metrics

TINY = ["--device=cpu", "--compile=false", "--rounds=2", "--threads=1"]
MODEL = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4", "--vocab_size=128",
         "--gradient_accumulation_steps=2", "--peak_tflops=1"]
# tied: 128 x 16 prototypes, 12 x 16^2 of the block and 3 norms of 16 multiply; attention 12 x 16 x 16
FLOPS_PER_TOKEN = 6 * (128 * 16 + 12 * 16 ** 2 + 3 * 16) + 12 * 16 * 16


@pytest.fixture(autouse=True)
def tiny():
    """bench's settings for functions that are called one by one; main() sets its own, which are undone here"""
    before = dict(vars(bench))
    configure(vars(bench), [*TINY, *MODEL])
    bench.dtype = "float32"
    yield
    vars(bench).update(before)


def measure(*args, tmp_path, capsys):
    """(rows, the JSON file, the lines of the Markdown table)"""
    path, precision = tmp_path / "bench.json", torch.get_float32_matmul_precision()
    rows = bench.main([args[0], *TINY, *args[1:], f"--json_file={path}"])
    torch.set_float32_matmul_precision(precision)
    out = capsys.readouterr().out.splitlines()
    return rows, json.loads(path.read_text()), [line.strip("| ").split(" | ") for line in out if line.startswith("|")]


def assert_positive(rows, *columns):
    for row in rows:
        for column in columns:
            assert row[column] > 0 and math.isfinite(row[column]), (row, column)

# -----------------------------------------------------------------------------
# the same loss and gradients on both sides


CHUNKED = ["F.linear_cross_entropy"] * hasattr(torch.nn, "LinearCrossEntropyOptions") # torch 2.13 has it
PRODUCTS = ("euclidean", "cosine", "mahalanobis", "offset_l2", "chebyshev:cosh")
ELEMENTWISE = ("manhattan", "hamming", "bray_curtis:abs", "minkowski:p=1.5", "minkowski:p=3")
RIVALS = {"baseline": ["linear + CE", *CHUNKED],
          **{text: ["linear + CE", "dense distance", *CHUNKED] for text in PRODUCTS},
          **{text: ["cdist", "broadcast"] for text in ELEMENTWISE},
          **{text: ["chunked broadcast", "broadcast"] for text in ("chebyshev", "canberra", "chebyshev:smooth")}}


@pytest.mark.parametrize("text, rival", [(text, rival) for text in RIVALS for rival in RIVALS[text]])
def test_rivals_compute_what_the_heads_compute(text, rival):
    head, h, y = bench.make_case(text, 37, 50, 24) # 37 = 4 chunks of 8 and a part of one
    with torch.no_grad():
        for p in head.parameters(): # a learned matrix at its initial value would hide its gradient's form
            p.add_(0.02 * torch.randn_like(p))
    f = bench_rivals.rivals_of(head)[rival]
    if rival in ("linear + CE", "F.linear_cross_entropy") and text != "baseline":
        # what the linear layer is to a distance head: the layer it replaces, with a weight of the same shape
        reference = bench.make_case("baseline", 37, 50, 24)[0]
        reference.weight = head.weight
        expected = bench.ours(reference, h, y)
    else:
        expected = bench.ours(head, h, y)
    loss, gradients = f(head, h, y)
    assert len(gradients) == len(expected[1])
    torch.testing.assert_close(loss, expected[0], rtol=1e-4, atol=0)
    for got, want in zip(gradients, expected[1]):
        assert want.abs().max() > 0
        assert (got - want).abs().max() < 1e-4 * want.abs().max()


def test_every_rival_is_there():
    heads = {text: bench.make_case(text, 1, 8, 8)[0] for text in bench.HEADS["head"]}
    assert {text: list(bench_rivals.rivals_of(head)) for text, head in heads.items()} == RIVALS


def test_cdist_in_chunks_is_the_same():
    head, h, y = bench.make_case("minkowski:p=3", 37, 50, 24)
    loss, gradients = bench_rivals.with_autograd(head, h, y, bench_rivals.by_cdist, chunk=16) # how it runs on a GPU
    whole, expected = bench_rivals.with_autograd(head, h, y, bench_rivals.by_cdist, chunk=None)
    for got, want in zip((loss, *gradients), (whole, *expected)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)

# -----------------------------------------------------------------------------
# the same training on both sides: the real scripts, in this process


def assert_same_weights(model, ckpt, start):
    weights = model.state_dict()
    assert weights.keys() == ckpt["model"].keys()
    for name, expected in ckpt["model"].items():
        assert (expected - start[name]).abs().max() > 1e-4, name
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=2e-5)


def test_nanogpts_loop_and_train_py_make_the_same_weights(tmp_path, monkeypatch):
    # 128 tokens need no padding rows, which nanoGPT's loss does not mask
    bench_train.write_tokens(tmp_path, vocab_size=128, num_train=3000, num_val=65)
    settings = dict(data_dir=str(tmp_path.parent), dataset=tmp_path.name, vocab_size=128, n_layer=1, n_head=2,
                    n_embd=16, block_size=16, tie_weights=True, batch_size=4, gradient_accumulation_steps=2,
                    learning_rate=6e-4, decay_lr=False, warmup_iters=0, max_iters=3, log_interval=1, eval_interval=3,
                    eval_iters=1, track_emissions=False, device="cpu", dtype="float32", compile=False, seed=1337)
    os.makedirs(tmp_path / "theirs")
    run_script("train.py", *flags(**settings, out_dir=tmp_path / "ours"))
    blocks, batches = Blocks(tmp_path, "train", 16, 128, 1337), iter(range(100))
    monkeypatch.setattr(bench_rivals, "get_batch", lambda *args: blocks.batch(4 * next(batches), 4))
    gpt = bench_rivals.nanogpt(SimpleNamespace(**settings, out_dir=str(tmp_path / "theirs")))
    assert next(batches) == 7 # 3 steps of 2 micro-batches, and the one fetched ahead
    lines = {name: read_metrics(tmp_path / name)[0] for name in ("ours", "theirs")}
    steps = {name: [row["step"] for row in rows if row["kind"] == "train"] for name, rows in lines.items()}
    assert steps["ours"] == steps["theirs"] == [1, 2, 3]
    assert all(3 < row["loss"] < 6 for rows in lines.values() for row in rows if row["kind"] == "train")
    torch.manual_seed(1337)
    config = GPTConfig(16, 128, 1, 2, 16, bias=False, tie_weights=True)
    assert_same_weights(gpt, load(tmp_path / "ours"), start=GPT(config).state_dict())


@pytest.mark.parametrize("dataset, normalize, optimizer, lr", [
    ("mnist", "half", "adam", 3e-4), ("cifar10", "cifar10", "sgd", 0.01)])
def test_the_plain_loop_and_train_vision_py_make_the_same_weights(tmp_path, monkeypatch, dataset, normalize, optimizer,
                                                                  lr):
    x, y = bench_train.random_images(80, bench_train.IMAGE_SHAPES[dataset])
    os.makedirs(tmp_path / dataset)
    np.savez(tmp_path / dataset / "images.npz", train_x=x[:68], train_y=y[:68], test_x=x[68:], test_y=y[68:])
    settings = dict(data_dir=str(tmp_path), dataset=dataset, normalize=normalize, augment="none", model="mlp",
                    batch_size=16, optimizer=optimizer, learning_rate=lr, weight_decay=0.0, val_fraction=20 / 68,
                    epochs=2, seed=1337, device="cpu", dtype="float32")
    os.makedirs(tmp_path / "theirs")
    ours = dict(eval_interval=2, patience=0, log_interval=10 ** 9, plots=False, track_emissions=False)
    run_script("train_vision.py", *flags(**settings, **ours, out_dir=tmp_path / "ours"))

    class Loader:
        """A loader over single images in the order of Batches, the next epoch at each turn."""
        def __init__(self, x, y, c):
            self.plain = bench_rivals.PlainImages(x, y, c.normalize, c.augment)
            self.batches, self.epoch = Batches(x, y, 16, c.seed, c.normalize), 0

        def __len__(self):
            return self.batches.steps_per_epoch

        def __iter__(self):
            self.batches.train(self.epoch * len(self)) # it shuffles
            self.epoch += 1
            for rows in self.batches.order.split(16):
                yield torch.utils.data.default_collate([self.plain[i] for i in rows.tolist()])

    monkeypatch.setattr(bench_rivals, "image_loader", Loader)
    model = bench_rivals.dataloader(SimpleNamespace(**settings, workers=0, out_dir=str(tmp_path / "theirs")))
    lines = {name: read_metrics(tmp_path / name)[0] for name in ("ours", "theirs")}
    steps = {name: [row["step"] for row in rows if row["kind"] == "train"] for name, rows in lines.items()}
    assert steps["ours"] == steps["theirs"] == [3, 6]
    torch.manual_seed(1337)
    start = VisionNet(model.config).state_dict()
    assert_same_weights(model, load(tmp_path / "ours"), start)


def test_batches_come_from_the_same_file():
    with bench_train.token_source(bench.settings()) as source:
        folder = os.path.join(source["data_dir"], source["dataset"])
        for split in ("train", "val"):
            assert Blocks(folder, split, 16).vocab_size == 128
        assert Blocks(folder, "val", 16).num_fixed == 4 # the one batch that train.py validates on
        x, y = Blocks(folder, "train", 16).batch(0, 4)
        nx, ny = bench_rivals.get_batch(folder, "uint16", 16, 4)
    for a, b in ((x, y), (nx, ny)):
        assert a.shape == b.shape == (4, 16) and a.dtype == torch.int64 and torch.equal(a[:, 1:], b[:, :-1])
        assert 0 <= a.min() < a.max() < 128
    assert not os.path.exists(folder)


@pytest.mark.parametrize("normalize, shape", [("half", (1, 28, 28)), ("cifar10", (3, 8, 8))])
def test_plain_images_are_ours(normalize, shape):
    x, y = map(torch.from_numpy, bench_train.random_images(30, shape))
    expected_x, expected_y = Batches(x, y, 10, bench_train.SEED, normalize).fixed(0, 30)
    c = SimpleNamespace(normalize=normalize, augment="none", batch_size=10, workers=0, device="cpu")
    loader = bench_rivals.image_loader(x, y, c)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    got_x, got_y = (torch.cat(parts) for parts in zip(*batches))
    assert not torch.equal(got_y, expected_y) # shuffled
    by_pixels = [sorted(images.flatten(1).tolist()) for images in (got_x, expected_x)]
    torch.testing.assert_close(torch.tensor(by_pixels[0]), torch.tensor(by_pixels[1]), rtol=0, atol=1e-5)
    assert torch.equal(got_y.sort().values, expected_y.sort().values)


def test_plain_augmentation_is_ours():
    x = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8).float()
    plain = bench_rivals.PlainImages(x, torch.zeros(1), "cifar10", "standard")
    # a crop that is turned then shows zeros where it was cut, ours shows the image
    for flip, dy, dx, degrees in (True, -4, 3, 0.0), (False, 2, 0, 0.0), (False, 0, 0, 9.0):
        expected = augment(x, *(torch.tensor([value]) for value in (flip, float(dy), float(dx), degrees)))[0]
        got = plain.augmented(x[0], flip, dy + 4, dx + 4, math.radians(degrees))
        torch.testing.assert_close(got, expected, rtol=0, atol=0.05)
    assert not torch.equal(plain[0][0], plain[0][0]) and plain[0][0].shape == (3, 32, 32)

# -----------------------------------------------------------------------------
# measuring


def test_peak_bytes_counts_every_byte():
    def f():
        a = torch.ones(1000) # 4,000 bytes
        b = a + torch.ones(1000) # 12,000 while its operand lives
        del a
        return b + 1 # b and the result
    f()
    assert bench.peak_bytes(f) == 12000
    assert bench.peak_bytes(lambda: torch.empty(12345, dtype=torch.uint8)) == 12345
    held = torch.ones(1000)
    assert bench.peak_bytes(lambda: held.neg_()) == 0 # what was there before is not counted


def test_race_alternates_and_stops_at_its_budget(monkeypatch):
    order = []
    runners = {name: partial(order.append, name) for name in "ab"}
    times, median = bench.race(runners)
    assert order == ["b", "a", "a", "b", "b", "a"] # the warm-up and two rounds
    assert {name: len(t) for name, t in times.items()} == dict(a=2, b=2)
    assert median["a"] == statistics.median(times["a"])
    monkeypatch.setattr(bench, "budget_s", 0.0)
    assert all(len(t) == 1 for t in bench.race(runners)[0].values()) # at least once


def test_race_takes_the_times_of_its_clock():
    seconds = iter([1.0, 2.0, 3.0, 4.0])
    times, median = bench.race({"a": None, "b": None}, warm_up=False, clock=lambda runner: next(seconds))
    assert times == {"a": [1.0, 4.0], "b": [2.0, 3.0]} and median == {"a": 2.5, "b": 2.5}


def test_floor():
    def floor(text, *size):
        return bench_rivals.floor(bench.make_case(text, 1, 8, 8)[0], *size, 1e9)
    assert floor("baseline", 10, 20, 8) == floor("euclidean", 10, 20, 8) == 6 * 10 * 20 * 8 / 1e9
    assert floor("offset_l2", 10, 20, 8) == floor("chebyshev:cosh", 10, 20, 8) == 12 * 10 * 20 * 8 / 1e9
    assert floor("mahalanobis", 10, 20, 8) == (6 * 10 * 20 * 8 + 6 * 30 * 8 * 8) / 1e9
    assert floor("manhattan", 10, 20, 8) is None


SCRIPT = """
import json, os, sys
settings = dict(arg[2:].split("=") for arg in sys.argv[1:])
assert os.environ["OMP_NUM_THREADS"] == "1" and settings["seed"] == "7" and os.listdir(settings["out_dir"]) == []
with open(os.path.join(settings["out_dir"], "metrics.jsonl"), "w") as f:
    for row in json.loads(settings["rows"]):
        print(json.dumps(row), file=f)
for i in range(9):
    print("line", i)
sys.exit(int(settings["code"]))
"""
ROWS = [dict(kind="eval", step=0), dict(kind="train", step=1, ms=100.0), dict(kind="train", step=2, ms=7.0),
        dict(kind="eval", step=2)]


def test_a_process_is_timed_by_its_last_log_line(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(bench_train, "HERE", str(tmp_path))

    def seconds(rows, code=0):
        return bench_train.seconds_per_step(("script.py", dict(rows=json.dumps(rows), code=code, seed=7)))
    assert seconds(ROWS) == 0.007
    end = "\n".join(f"line {i}" for i in range(4, 9))
    with pytest.raises(ChildProcessError, match=f"^script.py failed with exit code 3; the end of its output:\n{end}$"):
        seconds(ROWS, code=3)
    with pytest.raises(ChildProcessError, match="script.py wrote 1 log line"):
        seconds(ROWS[:2])


def test_a_script_that_fails_is_one_message():
    with pytest.raises(SystemExit) as e:
        bench.main(["step", *TINY, *MODEL, "--n_embd=10", "--n_head=3"])
    message = "nanogpt failed with exit code 1; the end of its output:\n.* must be a multiple of .*"
    assert re.fullmatch(message, str(e.value))

# -----------------------------------------------------------------------------
# the words


def test_head(tmp_path, capsys):
    texts, sizes = ("baseline", "cosine", "minkowski:p=3", "canberra"), ("48x64x16", "40x32x8")
    rows, saved, table = measure("head", f"--heads={','.join(texts)}", f"--sizes={','.join(sizes)}", tmp_path=tmp_path,
                                 capsys=capsys)
    expected = [(size, text, rival) for size in sizes for text in texts for rival in RIVALS[text]]
    assert [(r["size"], r["head"], r["rival"]) for r in rows] == expected
    assert saved["rows"] == rows and saved["machine"]["torch"] == torch.__version__ and saved["settings"]["rounds"] == 2
    assert saved["command"].startswith("python bench.py head") and "--heads=baseline" in saved["command"]
    header, _, *body = table
    assert len(body) == len(rows) and [line[:2] for line in body] == [[r["size"], r["head"]] for r in rows]
    assert header == ["size", "head", "as built, ms", "ms", "TFLOP/s", "forward, ms", "T elements/s", "error", "rival",
                      "rival's ms", "ratio", "rival's error", "MiB", "rival's MiB", "MiB ratio", "MB beyond gradients",
                      "rival's MB", "floor ms", "% of floor"]
    assert_positive(rows, "as built, ms", "ms", "rival's ms", "ratio", "MiB", "rival's MiB", "MiB ratio", "error",
                    "rival's error")
    for r in rows:
        raw = r["raw"]
        ours, rival = (statistics.median(raw[key]) for key in ("seconds", "rival_seconds"))
        assert len(raw["seconds"]) == len(raw["rival_seconds"]) == 2
        assert r["ratio"] == pytest.approx(ours / rival) and r["ms"] == pytest.approx(1e3 * ours)
        assert r["as built, ms"] == pytest.approx(1e3 * statistics.median(r["raw"]["as_built_seconds"]))
        assert r["rival's ms"] == pytest.approx(1e3 * rival)
        assert r["MiB ratio"] == pytest.approx(raw["peak_bytes"] / raw["rival_peak_bytes"])
        assert r["MiB ratio"] == pytest.approx(r["MiB"] / r["rival's MiB"])
        assert max(r["error"], r["rival's error"]) < 1e-5
        N, V, D = map(int, r["size"].split("x"))
        gradients = 4 * D * (N + V)
        assert r["MB beyond gradients"] == pytest.approx((r["raw"]["peak_bytes"] - gradients) / 1e6)
        if r["TFLOP/s"] is None:
            forward = statistics.median(r["raw"]["forward_seconds"])
            assert r["T elements/s"] == pytest.approx(N * V * D / forward / 1e12)
        else:
            assert r["TFLOP/s"] == pytest.approx(6 * N * V * D / ours / 1e12)
        if r["floor ms"]:
            assert r["% of floor"] == pytest.approx(100 * r["floor ms"] / r["ms"])
        assert (r["floor ms"] is None) == (r["head"] in ("minkowski:p=3", "canberra"))


def test_a_slow_rival_runs_on_a_part_of_the_rows_and_says_so(monkeypatch):
    monkeypatch.setattr(bench, "slow_s", 0.0)
    row = bench.head_case("canberra", 64, 32, 8)[0]
    assert row["rival"] == "chunked broadcast (on 16 of 64 rows, scaled), its MiB those of the part"
    assert row["raw"]["rival_rows"] == 16
    assert row["rival's ms"] == pytest.approx(4e3 * statistics.median(row["raw"]["rival_seconds"]))
    assert row["ratio"] == pytest.approx(row["ms"] / row["rival's ms"])


def test_a_rival_that_runs_out_of_memory_keeps_its_row(monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("no memory")
    monkeypatch.setattr(bench_rivals, "by_cdist", fail)
    row, broadcast = bench.head_case("manhattan", 16, 32, 8)
    assert row["rival"] == "cdist (out of memory)" and row["ratio"] is row["rival's ms"] is None
    assert broadcast["ratio"] > 0


def test_the_error_is_that_of_a_side(monkeypatch):
    """A distance that is off by a thousandth shows, on the side that has it."""
    by_cdist = bench_rivals.by_cdist
    monkeypatch.setattr(bench_rivals, "by_cdist", lambda *args: by_cdist(*args) ** 1.001)
    row, broadcast = bench.head_case("manhattan", 40, 32, 16)
    assert row["error"] == broadcast["error"] < 1e-6 and broadcast["rival's error"] < 1e-6
    assert 1e-4 < row["rival's error"] < 1e-2
    assert bench.head_case("mahalanobis:diagonal", 40, 32, 16)[0]["error"] is None # its formula stands here only once


def test_a_rival_of_others_that_fails_keeps_its_row(monkeypatch):
    def fail(*args):
        raise TypeError("this torch is too new\nfor it")
    monkeypatch.setattr(bench, "rivals_of", lambda head, compile: {"Liger": fail, "linear + CE": bench_rivals.linear})
    row, linear = bench.head_case("baseline", 16, 32, 8)
    assert row["rival"] == "Liger (fails, TypeError: this torch is too new)" and row["rival's ms"] is None
    assert linear["ratio"] > 0
    monkeypatch.setattr(bench, "rivals_of", lambda head, compile: {"dense distance": fail})
    with pytest.raises(TypeError): # our own code has to work
        bench.head_case("baseline", 16, 32, 8)


def test_what_was_measured_is_kept_when_a_later_head_fails(tmp_path, monkeypatch):
    head_case = bench.head_case

    def fail_at_the_second(text, *size):
        return head_case(text, *size) if text == "baseline" else 1 / 0
    monkeypatch.setattr(bench, "head_case", fail_at_the_second)
    path = tmp_path / "new" / "head.json"
    precision = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError):
        bench.main(["head", *TINY, "--heads=baseline,cosine", "--sizes=16x32x8", f"--json_file={path}"])
    torch.set_float32_matmul_precision(precision)
    assert {row["head"] for row in json.loads(path.read_text())["rows"]} == {"baseline"}


def test_growth(tmp_path, capsys):
    figure = tmp_path / "new" / "growth.png"
    rows, saved, table = measure("head", "--growth=true", "--heads=euclidean,manhattan", "--growth_base=16x32x8",
                                 "--doublings=1", f"--figure={figure}", tmp_path=tmp_path, capsys=capsys)
    assert sorted({r["size"] for r in rows}) == ["16x32x16", "16x32x8", "16x64x8", "32x32x8"]
    assert len(rows) == 4 * 3 == len(table) - 2
    assert {r["head"] for r in rows} == {"euclidean", "manhattan", "linear + CE"}
    assert_positive(saved["rows"], "ms", "MiB")
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_model(tmp_path, capsys):
    rows, saved, table = measure("model", *MODEL, "--heads=cosine,minkowski:p=3", tmp_path=tmp_path, capsys=capsys)
    names = ["baseline", "cosine", "minkowski:p=3"]
    assert [r["head"] for r in saved["rows"]] == [line[0] for line in table[2:]] == names
    baseline = statistics.median(rows[0]["raw"]["seconds"])
    for r in rows:
        seconds = statistics.median(r["raw"]["seconds"])
        assert r["tokens/s"] == pytest.approx(64 / seconds)
        assert r["time / baseline"] == pytest.approx(seconds / baseline)
        assert r["head, % of it"] == pytest.approx(100 * statistics.median(r["raw"]["head_seconds"]) / seconds)
        assert r["MFU %"] == pytest.approx(100 * FLOPS_PER_TOKEN * r["tokens/s"] / 1e12)


def test_step(tmp_path, capsys):
    rows, saved, table = measure("step", *MODEL, "--steps=2", "--rounds=1", "--heads=minkowski:p=3", tmp_path=tmp_path,
                                 capsys=capsys)
    names = ["nanoGPT's loop", "baseline", "minkowski:p=3"]
    assert [r["loop"] for r in saved["rows"]] == [line[0] for line in table[2:]] == names
    assert table[0] == ["loop", "ms", "tokens/s", "MFU %", "speed / nanoGPT's", "speed / baseline"]
    assert_positive(rows, *table[0][1:])
    median = [statistics.median(r["raw"]["seconds"]) for r in rows]
    for r, seconds in zip(rows, median):
        assert len(r["raw"]["seconds"]) == 1
        assert r["tokens/s"] == pytest.approx(2 * 64 / seconds) and r["ms"] == pytest.approx(1e3 * seconds)
        assert r["speed / nanoGPT's"] == pytest.approx(median[0] / seconds)
        assert r["speed / baseline"] == pytest.approx(median[1] / seconds)
        assert r["MFU %"] == pytest.approx(100 * FLOPS_PER_TOKEN * r["tokens/s"] / 1e12)


def test_data(tmp_path, capsys):
    rows, saved, table = measure("data", *MODEL, tmp_path=tmp_path, capsys=capsys)
    names = ["nanoGPT's get_batch", "Blocks.batch", "forward and backward"]
    assert [r["what"] for r in saved["rows"]] == [line[0] for line in table[2:]] == names
    nano, ours, model = (r["tokens/s"] for r in rows)
    assert ours == pytest.approx(20 * 64 / statistics.median(rows[1]["raw"]["seconds"]))
    assert model == pytest.approx(64 / statistics.median(rows[2]["raw"]["seconds"]))
    assert rows[1]["speed / nanoGPT's"] == pytest.approx(ours / nano) and rows[2]["speed / nanoGPT's"] is None
    assert rows[1]["times the need"] == pytest.approx(ours / model)


def test_vision(tmp_path, capsys, monkeypatch):
    sizes = {"pipeline": (32, 2), "resnet50": (10, 1)}
    monkeypatch.setattr(bench_train, "VISION_SIZES", {"cpu": sizes})
    monkeypatch.setattr(bench_train, "HELD_OUT", 10)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    rows, saved, table = measure("vision", "--rounds=1", tmp_path=tmp_path, capsys=capsys)
    assert {r["what"]: (r["batch"], r["steps"]) for r in saved["rows"]} == sizes
    assert table[0][:4] == ["what", "images", "batch", "steps"] and len(table) == 4
    assert_positive(rows, "images/s", "batches/s", "DataLoader's images/s", "speed / DataLoader's")
    for r in rows:
        ours, plain = (statistics.median(r["raw"][key]) for key in ("seconds", "rival_seconds"))
        assert r["images/s"] == pytest.approx(r["batch"] / ours) and r["raw"]["workers"] == 1
        assert r["speed / DataLoader's"] == pytest.approx(plain / ours)

# -----------------------------------------------------------------------------
# refusals


@pytest.mark.parametrize("args, message", [
    ([], "one of head, model, step, data"),
    (["heads"], "got heads"),
    (["head", "--heads=cosin"], "did you mean 'cosine'"),
    (["head", "--heads=minkowski:q=3"], "no parameter 'q'"),
    (["head", "--heads=minkowski:p=half"], "name=number"),
    (["head", "--heads=chebyshev:smooth:cosh"], "distance[:variant][:name=value]"),
    (["model", "--heads=cosine:weighted"], "cosine variant"),
    (["head", "--sizes=512x8192"], "NxVxD"),
    (["head", "--sizes=0x8x8"], "NxVxD"),
    (["head", "--sizes=8x8xhalf"], "NxVxD"),
    (["model", "--n_embd=10", "--n_head=3"], "must be a multiple"),
    (["step", "--n_layer=-1"], "must be >= 0"),
    (["head", "--rounds=0"], "rounds"),
    (["head", "--device=tpu"], "device is 'tpu'"),
    (["head", "--dtype=int8"], "dtype is 'int8'"),
    (["head", "--round=3"], "did you mean 'rounds'"),
    (["data", "--dataset=nowhere"], "train.bin is not there"),
])
def test_refused(args, message):
    with pytest.raises(SystemExit) as e:
        bench.main(args if any(a.startswith("--rounds") for a in args) or not args else [*args, "--compile=false"])
    assert message in str(e.value)


def test_help_and_exit_code():
    done = subprocess.run([sys.executable, os.path.join(ROOT, "bench.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "python bench.py head" in done.stdout and "rounds = 5 #" in done.stdout
    assert "def " not in done.stdout
