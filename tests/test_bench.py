"""
bench.py: its rivals compute what the heads compute, its numbers follow from the times it keeps, and what it refuses. No time is asserted.

$ pytest tests/test_bench.py
"""
import json
import math
import os
import statistics
import subprocess
import sys
from functools import partial

import pytest
import torch

import bench
from data import Blocks
from data_vision import Batches, augment

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ["--device=cpu", "--compile=false", "--rounds=2", "--threads=1"]
MODEL = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4", "--vocab_size=128", "--gradient_accumulation_steps=2", "--peak_tflops=1"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """bench's settings for functions that are called one by one; main() sets its own, which are undone here"""
    before = dict(vars(bench))
    bench.settings([*TINY, *MODEL])
    bench.dtype, bench.steps = "float32", 2
    yield
    vars(bench).update(before)


def measure(*args, tmp_path, capsys):
    """(rows, the JSON file, the lines of the Markdown table)"""
    path, precision = tmp_path / "bench.json", torch.get_float32_matmul_precision()
    rows = bench.main([*args, *TINY, f"--json={path}"])
    torch.set_float32_matmul_precision(precision)
    out = capsys.readouterr().out.splitlines()
    return rows, json.loads(path.read_text()), [line.strip("| ").split(" | ") for line in out if line.startswith("|")]

# -----------------------------------------------------------------------------
# the same loss and gradients on both sides


CHUNKED = ["F.linear_cross_entropy"] * hasattr(torch.nn, "LinearCrossEntropyOptions") # torch 2.13 has it
RIVALS = {"baseline": ["linear + CE", *CHUNKED],
          **{text: ["linear + CE", "dense distance", *CHUNKED] for text in ("euclidean", "cosine", "mahalanobis", "offset_l2", "chebyshev:cosh")},
          **{text: ["cdist", "broadcast"] for text in ("manhattan", "hamming", "bray_curtis:abs", "minkowski:p=1.5", "minkowski:p=3")},
          **{text: ["chunked broadcast", "broadcast"] for text in ("chebyshev", "canberra", "chebyshev:smooth")}}


@pytest.mark.parametrize("text, rival", [(text, rival) for text in RIVALS for rival in RIVALS[text]])
def test_rivals_compute_what_the_heads_compute(text, rival):
    head, h, y = bench.make_case(text, 37, 50, 24) # 37 = 4 chunks of 8 and a part of one
    with torch.no_grad():
        for p in head.parameters(): # a learned matrix at its initial value would hide its gradient's form
            p.add_(0.02 * torch.randn_like(p))
    f = bench.rivals_of(head)[rival]
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
    assert {text: list(bench.rivals_of(bench.make_case(text, 1, 8, 8)[0])) for text in bench.HEADS["head"]} == RIVALS
    for device in bench.TARGETS: # a target without its row would never be looked at
        for text, targets in bench.TARGETS[device].items():
            assert set(targets) <= set(RIVALS[text]), text


def test_cdist_in_chunks_is_the_same():
    head, h, y = bench.make_case("minkowski:p=3", 37, 50, 24) # how it runs on a GPU
    (loss, gradients), (whole, expected) = (bench.plain(bench.by_cdist, chunk, head, h, y) for chunk in (16, None))
    for got, want in zip((loss, *gradients), (whole, *expected)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_nanogpt_loop_and_ours_make_the_same_weights(monkeypatch):
    monkeypatch.setattr(bench, "vocab_size", 128) # no padding rows, which nanoGPT's loss does not mask
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(128, (2, 4, 16), generator=generator) for _ in range(5)] # 2 steps of 2 micro-batches, and the one fetched ahead
    ours, nano = bench.make_model("baseline"), bench.NanoGPT(bench.make_model("baseline"))
    start = {name: p.clone() for name, p in ours.named_parameters()}
    kept = bench.training(ours, iter(batches).__next__)()
    last = bench.training(nano, iter(batches).__next__, nanogpt=True)()
    assert len(kept) == 2 and len(last) == 1 and all(3 < loss < 6 and norm > 0 for loss, norm in kept) and 3 < last[0] < 6
    for (name, p), q in zip(ours.named_parameters(), nano.gpt.parameters()):
        assert (p - start[name]).abs().max() > 1e-4, name
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5)


def test_batches_come_from_the_same_file():
    with bench.data_folder() as folder:
        (x, y), (nx, ny) = bench.our_batches(folder)(), bench.nanogpt_batches(folder)()
        expected = Blocks(folder, "train", 16, 128, bench.seed).batch(0, 4)
    assert torch.equal(x, expected[0]) and torch.equal(y, expected[1])
    for a, b in ((x, y), (nx, ny)):
        assert a.shape == b.shape == (4, 16) and a.dtype == torch.int64 and torch.equal(a[:, 1:], b[:, :-1])


@pytest.mark.parametrize("normalize, shape", [("half", (1, 28, 28)), ("cifar10", (3, 8, 8))])
def test_plain_loop_and_ours_make_the_same_weights(normalize, shape):
    x, y = torch.randint(256, (48, *shape), dtype=torch.uint8), torch.randint(10, (48,))
    data, plain = Batches(x, y, 16, bench.seed, normalize), bench.PlainImages(x, y, normalize, "none")
    data.train(0)
    loader = [torch.utils.data.default_collate([plain[i] for i in rows.tolist()]) for rows in data.order.split(16)]
    (ours, *our), (model, *theirs) = bench.vision_model("mlp", shape), bench.vision_model("mlp", shape, plain=True)
    start = {name: p.clone() for name, p in ours.named_parameters()}
    losses, expected = bench.vision_epoch(ours, *our, data)(), bench.plain_epoch(model, *theirs, loader)()
    assert len(losses) == 3 and losses == pytest.approx(expected, rel=1e-5) and losses[0] != losses[1]
    for (name, p), q in zip(ours.named_parameters(), model.parameters()):
        assert (p - start[name]).abs().max() > 1e-4, name
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5)


def test_plain_augmentation_is_ours():
    x = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8).float()
    plain, one = bench.PlainImages(x, torch.zeros(1), "cifar10", "standard"), lambda value: torch.tensor([value])
    for flip, dy, dx, degrees in (True, -4, 3, 0.0), (False, 2, 0, 0.0), (False, 0, 0, 9.0): # a crop that is turned then shows zeros where it was cut, ours the image
        expected = augment(x, one(flip), one(float(dy)), one(float(dx)), one(degrees))[0]
        torch.testing.assert_close(plain.augmented(x[0], flip, dy + 4, dx + 4, math.radians(degrees)), expected, rtol=0, atol=0.05)
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
    assert {name: len(t) for name, t in times.items()} == dict(a=2, b=2) and median["a"] == statistics.median(times["a"])
    monkeypatch.setattr(bench, "budget_s", 0.0)
    assert all(len(t) == 1 for t in bench.race(runners)[0].values()) # at least once


def test_floor():
    def floor(text, *size):
        return bench.floor(bench.make_case(text, 1, 8, 8)[0], *size, 1e9)
    assert floor("baseline", 10, 20, 8) == floor("euclidean", 10, 20, 8) == 6 * 10 * 20 * 8 / 1e9
    assert floor("offset_l2", 10, 20, 8) == floor("chebyshev:cosh", 10, 20, 8) == 12 * 10 * 20 * 8 / 1e9
    assert floor("mahalanobis", 10, 20, 8) == (6 * 10 * 20 * 8 + 6 * 30 * 8 * 8) / 1e9
    assert floor("manhattan", 10, 20, 8) is None

# -----------------------------------------------------------------------------
# the words


def test_head(tmp_path, capsys):
    rows, saved, table = measure("head", "--heads=baseline,cosine,minkowski:p=3,canberra", "--sizes=48x64x16,40x32x8", tmp_path=tmp_path, capsys=capsys)
    assert [(r["size"], r["head"], r["rival"]) for r in rows] == [(size, text, rival) for size in ("48x64x16", "40x32x8")
           for text in ("baseline", "cosine", "minkowski:p=3", "canberra") for rival in RIVALS[text]]
    assert saved["rows"] == rows and saved["machine"]["torch"] == torch.__version__ and saved["settings"]["rounds"] == 2
    assert saved["command"].startswith("python bench.py head --heads=baseline")
    header, _, *body = table
    assert len(body) == len(rows) and [line[:2] for line in body] == [[r["size"], r["head"]] for r in rows]
    assert {"ms", "rival", "rival's ms", "ratio", "MiB", "rival's MiB", "MiB ratio", "floor ms", "% of floor"} <= set(header)
    for r in rows:
        raw = r["raw"]
        ours, rival = (statistics.median(raw[key]) for key in ("seconds", "rival_seconds"))
        assert len(raw["seconds"]) == len(raw["rival_seconds"]) == 2
        assert r["ratio"] == pytest.approx(ours / rival) and r["ms"] == pytest.approx(1e3 * ours) and r["rival's ms"] == pytest.approx(1e3 * rival)
        assert r["MiB ratio"] == pytest.approx(raw["peak_bytes"] / raw["rival_peak_bytes"]) == pytest.approx(r["MiB"] / r["rival's MiB"])
        if r["floor ms"]:
            assert r["% of floor"] == pytest.approx(100 * r["floor ms"] / r["ms"])


def test_a_slow_rival_runs_on_a_part_of_the_rows_and_says_so(monkeypatch):
    monkeypatch.setattr(bench, "slow_s", 0.0)
    row = bench.head_case("canberra", 64, 32, 8)[0]
    assert row["rival"] == "chunked broadcast (on 16 of 64 rows, scaled), its MiB those of the part" and row["raw"]["rival_rows"] == 16
    assert row["rival's ms"] == pytest.approx(4e3 * statistics.median(row["raw"]["rival_seconds"]))
    assert row["ratio"] == pytest.approx(row["ms"] / row["rival's ms"])


def test_a_rival_that_runs_out_of_memory_keeps_its_row(monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("no memory")
    monkeypatch.setattr(bench, "by_cdist", fail)
    row, broadcast = bench.head_case("manhattan", 16, 32, 8)
    assert row["rival"] == "cdist (out of memory)" and row["ratio"] is row["rival's ms"] is None and broadcast["ratio"] > 0


def test_targets_are_judged_where_they_hold(monkeypatch):
    monkeypatch.setattr(bench, "SIZES", {"cpu": "16x32x8"})
    monkeypatch.setitem(bench.TARGETS["cpu"], "manhattan", {"cdist": {"ratio": 1e9, "MiB ratio": 1e-9}})
    assert [r["target"] for r in bench.head_case("manhattan", 16, 32, 8)] == ["ratio <= 1e+09 met, MiB ratio <= 1e-09 missed", ""]
    assert [r["target"] for r in bench.head_case("manhattan", 17, 32, 8)] == ["", ""]


def test_growth(tmp_path, capsys):
    figure = tmp_path / "new" / "growth.png"
    rows, saved, table = measure("head", "--growth=true", "--heads=euclidean,manhattan", "--growth_base=16x32x8", "--doublings=1", f"--figure={figure}",
                                 tmp_path=tmp_path, capsys=capsys)
    assert sorted({r["size"] for r in rows}) == ["16x32x16", "16x32x8", "16x64x8", "32x32x8"] and len(rows) == 4 * 3 == len(table) - 2
    assert {r["head"] for r in rows} == {"euclidean", "manhattan", "linear + CE"} and all(r["MiB"] > 0 for r in saved["rows"])
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_model(tmp_path, capsys):
    rows, saved, table = measure("model", *MODEL, "--heads=cosine,minkowski:p=3", tmp_path=tmp_path, capsys=capsys)
    assert [r["head"] for r in saved["rows"]] == [line[0] for line in table[2:]] == ["baseline", "cosine", "minkowski:p=3"]
    for r in rows:
        seconds = statistics.median(r["raw"]["seconds"])
        assert r["tokens/s"] == pytest.approx(64 / seconds) and r["time / baseline"] == pytest.approx(seconds / statistics.median(rows[0]["raw"]["seconds"]))
        assert r["head, % of it"] == pytest.approx(100 * statistics.median(r["raw"]["head_seconds"]) / seconds)
        # tied: 128 x 16 prototypes, 12 x 16^2 of the block and 3 norms of 16 multiply; attention 12 x 16 x 16
        flops = 6 * (128 * 16 + 12 * 16 ** 2 + 3 * 16) + 12 * 16 * 16
        assert r["MFU %"] == pytest.approx(100 * flops * r["tokens/s"] / 1e12)


def test_step(tmp_path, capsys):
    rows, saved, table = measure("step", *MODEL, "--steps=2", tmp_path=tmp_path, capsys=capsys)
    assert [r["loop"] for r in saved["rows"]] == [line[0] for line in table[2:]] == ["nanoGPT's loop", "baseline", "cosine"]
    median = [statistics.median(r["raw"]["seconds"]) for r in rows]
    for r, seconds in zip(rows, median):
        assert r["tokens/s"] == pytest.approx(2 * 2 * 64 / seconds) and r["ms"] == pytest.approx(1e3 * seconds / 2)
        assert r["speed / nanoGPT's"] == pytest.approx(median[0] / seconds) and r["speed / baseline"] == pytest.approx(median[1] / seconds)


def test_data(tmp_path, capsys):
    rows, saved, table = measure("data", *MODEL, tmp_path=tmp_path, capsys=capsys)
    assert [r["what"] for r in saved["rows"]] == [line[0] for line in table[2:]] == ["nanoGPT's get_batch", "Blocks.batch", "forward and backward"]
    nano, ours, model = (r["tokens/s"] for r in rows)
    assert ours == pytest.approx(20 * 64 / statistics.median(rows[1]["raw"]["seconds"]))
    assert rows[1]["speed / nanoGPT's"] == pytest.approx(ours / nano) and rows[1]["times the need"] == pytest.approx(ours / model)


def test_vision(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "VISION", {"cpu": {"pipeline": (32, 2), "mlp": (16, 3), "resnet50": (2, 1)}})
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    rows, saved, table = measure("vision", tmp_path=tmp_path, capsys=capsys)
    assert [(r["what"], r["batch"]) for r in saved["rows"]] == [("pipeline", 32), ("mlp", 16), ("resnet50", 2)] and len(table) == 5
    for r in rows:
        ours, plain = (statistics.median(r["raw"][key]) for key in ("seconds", "rival_seconds"))
        assert r["images/s"] == pytest.approx(r["batch"] * r["steps"] / ours) and r["speed / DataLoader's"] == pytest.approx(plain / ours) and r["raw"]["workers"] == 1

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
    assert done.returncode == 0 and "python bench.py head" in done.stdout and "rounds = 5 #" in done.stdout and "def " not in done.stdout
