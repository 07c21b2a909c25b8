"""
train.py from the outside: what a run leaves behind, that it can be stopped, split and repeated bit for bit, and what it
refuses.

A process costs 3 s of imports, so that most runs are made in this one by runpy, exactly as `python train.py` makes
them; where the process itself is the point (another working directory, resuming, ranks, exit codes, trackers) it is a
real one.

$ pytest tests/test_train.py
"""
import csv
import json
import math
import os
import re
import shlex
import sqlite3
import sys
from contextlib import closing

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    HARD,
    ROOT,
    SETTINGS,
    assert_close_runs,
    assert_same,
    assert_same_training,
    defaults_of,
    ended,
    flags,
    fork,
    fork_ranks,
    load,
    make_dataset,
    metrics,
    processes,
    refused,
    run_script,
    run_script_loud,
    train,
    train_processes,
)
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

import configurator
import data
import model as model_module
from distances import DISTANCES
from model import GPT, GPTConfig, default_scales, lm_head

pytestmark = pytest.mark.usefixtures("here")


def model_of(ckpt):
    model = GPT(GPTConfig(**ckpt["model_args"]))
    model.load_state_dict(ckpt["model"])
    return model.eval()


# -----------------------------------------------------------------------------
# one run, in processes of its own: 20 steps, and the same stopped after 10 and resumed


@pytest.fixture(scope="module")
def runs(datasets):
    whole = dict(out_dir="whole", track_emissions=True, carbon_intensity=100, **HARD)
    half = dict(out_dir="half", max_iters=10, **HARD)
    printed = train_processes(datasets, whole, half)
    printed += [run_in(datasets, "--init_from=resume", "--out_dir=half", "--max_iters=20")]
    return datasets, printed


def run_in(cwd, *args):
    (code, out, err), = processes(cwd, [os.path.join(ROOT, "train.py"), *args])
    assert code == 0, out + err
    return out + err


def test_a_run_leaves_its_settings(runs):
    folder, _ = runs
    info = json.loads((folder / "whole" / "config.json").read_text())
    assert info["config"].keys() == info["sources"].keys()
    assert info["config"]["distance"] == "euclidean" and info["config"]["beta2"] == 0.95
    assert info["sources"]["distance"] == "command line" and info["sources"]["beta2"] == "default"
    assert info["device"] == "cpu" and info["dtype"] == "float32" and info["world_size"] == 1 and "git" in info
    assert info["versions"]["torch"] == torch.__version__ and info["versions"]["python"] and info["versions"]["numpy"]
    assert info["data"]["hash"] == data.file_hash(folder / "data" / "tiny")
    assert info["data"]["vocab_size"] == 97 and info["model_args"]["vocab_size"] == 97
    model = model_of(load(folder / "whole"))
    assert info["num_params"] == sum(p.numel() for p in model.parameters())
    assert info["head"].startswith("16 -> 97 of 128, euclidean") and "n=8 learned" in info["head"] and info["n"] == 8


def test_a_run_learns_and_says_so(runs):
    folder, printed = runs
    out, summary = folder / "whole", json.loads((folder / "whole" / "summary.json").read_text())
    losses, evals = metrics(out, "train"), metrics(out, "eval")
    assert [row["step"] for row in losses] == list(range(1, 21)) and [row["step"] for row in evals] == [0, 10, 20]
    for row in losses:
        assert row["tokens"] == row["step"] * 2 * 4 * 16 and row.keys() >= {"loss", "lr", "grad_norm"}
    # a fresh head guesses about uniformly; the sequence is nearly determined by the last token
    assert evals[0]["val_loss"] == pytest.approx(math.log(97), rel=0.25)
    assert evals[0]["val_loss"] > evals[1]["val_loss"] + 0.1 > evals[2]["val_loss"] + 0.2
    # both are a mean over micro-batches, not a sum
    assert losses[0]["loss"] == pytest.approx(evals[0]["val_loss"], rel=0.1)
    default = default_scales("euclidean", None, 16)[0]
    assert evals[0]["n"] == pytest.approx(default) != evals[2]["n"] # learned, from the distance's default
    assert summary["val_loss"] == summary["best_val_loss"] == evals[2]["val_loss"]
    assert summary["step"] == summary["best_step"] == 20
    assert summary["perplexity"] == pytest.approx(math.exp(summary["val_loss"])) and summary["n"] == evals[2]["n"]
    assert summary["bits_per_byte"] == pytest.approx(summary["val_loss"] / math.log(2)) # a byte per token here
    assert summary["best_share"] == 1.0
    with open(out / "metrics.jsonl") as f:
        cpu = [row["cpu_seconds"] for row in map(json.loads, f)]
    assert cpu[0] == 0 < cpu[1] and cpu == sorted(cpu) and cpu[-1] == summary["cpu_seconds"]
    assert (out / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not [name for name in os.listdir(out) if name.endswith(".tmp")]
    assert f"{summary['val_loss']:.4f}" in printed[0]
    assert not [text for text in printed if "Warning" in text or "Traceback" in text]


def test_energy_has_a_row_per_evaluation(runs):
    pytest.importorskip("codecarbon")
    folder, printed = runs
    with open(folder / "whole" / "emissions.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [int(row["step"]) for row in rows] == [0, 10, 20, 20] # the last one at the end: plotting takes energy too
    total = 0.0
    for row in rows:
        total += float(row["energy_kwh_interval"])
        assert float(row["energy_kwh_total"]) == pytest.approx(total)
        assert float(row["emissions_g_total"]) == pytest.approx(total * 100)
    assert total > 0
    with open(folder / "whole" / "metrics.jsonl") as f: # the same totals beside the loss that they bought
        evals = [row for row in map(json.loads, f) if row["kind"] == "eval"]
    assert [row["energy_kwh_total"] for row in evals] == [float(row["energy_kwh_total"]) for row in rows[:3]]
    assert [row["val_loss"] for row in evals] == [float(row["val_loss"]) for row in rows[:3]]
    assert "kWh" in printed[0] and not (folder / "half" / "emissions.csv").exists()


# the first argument says how a run ends in its eighth step, the second who runs it
STOPPED = """
import os, runpy, signal, sys
how, who, path = sys.argv[1:4]
sys.path.insert(0, os.path.dirname(path))
import data
real_batch = data.Blocks.batch
def batch(self, first, count):
    if first // count == 15: # of two micro-batches a step, one of which is fetched ahead
        if how == 'ctrl-c':
            os.kill(os.getpid(), signal.SIGINT)
        else:
            raise RuntimeError('a bug')
    return real_batch(self, first, count)
data.Blocks.batch = batch
if who == 'study':
    import study
    os.mkdir('out')
    study.child(path, sys.argv[4:], 'out')
sys.argv = sys.argv[3:]
runpy.run_path(path, run_name='__main__')
"""


@pytest.mark.parametrize("who, how, expected", [
    ("python", "ctrl-c", 130), ("python", "a bug", 1), ("study", "a bug", 1)])
def test_a_run_that_is_stopped_keeps_its_energy(who, how, expected, here):
    pytest.importorskip("codecarbon")
    settings = {**SETTINGS, "out_dir": "out", "track_emissions": True, "carbon_intensity": 100, "eval_interval": 5}
    command = ["-c", STOPPED, how, who, os.path.join(ROOT, "train.py"), *flags(**settings)]
    (code, out, err), = processes(here, command)
    assert code == expected, out + err
    with open("out/emissions.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [int(row["step"]) for row in rows] == [0, 5, 8 if how == "ctrl-c" else 7] # whose step is made whole
    assert float(rows[2]["seconds_interval"]) > 0
    said = err if who == "python" else open("out/log.txt").read()
    words = {"a bug": "RuntimeError: a bug", "ctrl-c": "stopped by Ctrl-C after step 8"}
    assert words[how] in said + out and ("Traceback" in said) == (how == "a bug")


def test_validation_loss_by_hand(runs):
    folder, _ = runs
    best = load(folder / "whole", "best.pt")
    ids = torch.from_numpy(np.fromfile(folder / "data" / "tiny" / "val.bin", np.uint16).astype(np.int64))
    x, y = ids[:21 * 16].view(21, 16), ids[1:21 * 16 + 1].view(21, 16) # all whole blocks from the start
    model = model_of(best)
    with torch.no_grad():
        expected = F.cross_entropy(model.head(model.features(x)).flatten(0, 1), y.flatten()).item()
    assert best["val_loss"] == pytest.approx(expected, abs=1e-5)
    assert metrics(folder / "whole", "eval")[best["step"] // 10]["val_loss"] == best["val_loss"]


def test_the_evaluated_range_may_be_shorter(runs):
    folder, _ = runs
    train(out_dir="out", eval_iters=2, max_iters=1, **HARD)
    ids = torch.from_numpy(np.fromfile("data/tiny/val.bin", np.uint16).astype(np.int64))[:8 * 16 + 1]
    model = model_of(load("out"))
    with torch.no_grad():
        expected = F.cross_entropy(model.head(model.features(ids[:-1].view(8, 16))).flatten(0, 1), ids[1:]).item()
    assert metrics("out", "eval")[-1]["val_loss"] == pytest.approx(expected, abs=1e-5)


def test_the_training_loss_and_the_layers_by_hand(runs):
    folder, _ = runs
    summary, model = json.loads((folder / "whole" / "summary.json").read_text()), model_of(load(folder / "whole"))
    ids = torch.from_numpy(np.fromfile(folder / "data" / "tiny" / "train.bin", np.uint16).astype(np.int64))
    x, y = ids[:21 * 16].view(21, 16), ids[1:21 * 16 + 1].view(21, 16) # as many blocks as there are for validation
    with torch.no_grad():
        expected = F.cross_entropy(model.head(model.features(x)).flatten(0, 1), y.flatten()).item()
        assert summary["train_loss"] == pytest.approx(expected, abs=1e-5)
        ids = torch.from_numpy(np.fromfile(folder / "data" / "tiny" / "val.bin", np.uint16).astype(np.int64))
        h = model.transformer.wte(ids[:21 * 16].view(21, 16)) + model.transformer.wpe.weight[:16]
        probe = np.load(folder / "whole" / "probe.npz")
        for i, block in enumerate(model.transformer.h):
            h = block(h)
            of_sklearn = PCA().fit(h[:, -1].double()).explained_variance_ratio_
            assert summary["layer_pc2_ev"][i] == pytest.approx(of_sklearn[:2].sum(), rel=1e-4)
            of_sklearn = PCA().fit(StandardScaler().fit_transform(h[:, -1].double())).explained_variance_ratio_
            assert summary["layer_pca90"][i] == (of_sklearn.cumsum() < 0.9).sum() + 1
    assert probe["layer_pc2_ev"].tolist() == summary["layer_pc2_ev"] and len(summary["layer_pca90"]) == 2
    assert probe["layer_pca90"].tolist() == summary["layer_pca90"]


def test_cpu_time_adds_up_over_resumed_runs_and_lost_steps():
    train(out_dir="out", max_iters=2, eval_interval=2)
    before = json.load(open("out/summary.json"))["cpu_seconds"]
    run_script("train.py", "--init_from=resume", "--out_dir=out", "--max_iters=4")
    after = json.load(open("out/summary.json"))["cpu_seconds"]
    assert before < after < before + 60
    with open("out/metrics.jsonl", "a") as f: # a step that a kill has undone
        f.write('{"kind": "train", "step": 5, "loss": 1.0, "cpu_seconds": 1000.0}\n')
    run_script("train.py", "--init_from=resume", "--out_dir=out", "--max_iters=6")
    assert 1000 < json.load(open("out/summary.json"))["cpu_seconds"] < 1060
    train(out_dir="out", max_iters=1, overwrite=True)
    assert 0 < json.load(open("out/summary.json"))["cpu_seconds"] < 60


def test_the_test_split_is_the_end_of_the_validation_split_and_is_seen_once():
    printed, _ = train(out_dir="out", test_fraction=0.25, max_iters=4, eval_interval=2, **HARD)
    ids = torch.from_numpy(np.fromfile("data/tiny/val.bin", np.uint16).astype(np.int64))
    x, y = ids[:21 * 16].view(21, 16), ids[1:21 * 16 + 1].view(21, 16)
    model = model_of(load("out"))
    with torch.no_grad():
        z = model.head(model.features(x))
        nll = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view(21, 16)
    summary, found = json.load(open("out/summary.json")), np.load("out/predictions.npz")["nll"]
    assert found.dtype == np.float32 and found == pytest.approx(nll[15:].flatten().numpy(), abs=1e-5) # 5.25 blocks: 6
    assert summary["test_loss"] == pytest.approx(found.astype(np.float64).mean(), abs=1e-12)
    assert summary["val_loss"] == pytest.approx(nll[:15].mean().item(), abs=1e-5)
    assert "validation on 240 tokens, test on 96" in printed and f"test loss {summary['test_loss']:.4f}" in printed
    # nothing that was logged or chosen before the end can depend on it
    train(out_dir="first", eval_iters=3, max_iters=4, eval_interval=2, **HARD) # 12 blocks of all 21
    train(out_dir="capped", eval_iters=3, test_fraction=0.25, max_iters=4, eval_interval=2, **HARD)
    assert_same_training("first", "capped")
    assert np.load("capped/predictions.npz")["nll"] == pytest.approx(found, abs=1e-5)
    assert not os.path.exists("first/predictions.npz") and "test_loss" not in json.load(open("first/summary.json"))


def test_half_of_an_odd_number_of_blocks_leaves_the_lower_half_for_validation(here):
    make_dataset(here / "own" / "tiny", val_tokens=2 * 1121 + 1)
    settings = dict(data_dir="own", block_size=2, batch_size=16, max_iters=0)
    _, script = train(out_dir="whole", test_fraction=0.5, **settings)
    _, capped = train(out_dir="capped", eval_iters=35, **settings)
    assert script["num_val"] == capped["num_val"] == 560 and script["num_test"] == 561
    assert metrics("whole") == metrics("capped") and len(np.load("whole/predictions.npz")["nll"]) == 2 * 561


def test_the_test_of_a_resumed_run_and_of_ranks_is_that_of_one(here):
    settings = {**SETTINGS, **HARD, "test_fraction": 0.4, "eval_interval": 2}
    train(**{**settings, "out_dir": "whole", "max_iters": 4})
    train(**{**settings, "out_dir": "half", "max_iters": 2})
    run_script("train.py", "--init_from=resume", "--out_dir=half", "--max_iters=4")
    ended(fork_ranks(2, **{**settings, "out_dir": "two", "max_iters": 4}))
    whole, half, two = (np.load(f"{name}/predictions.npz")["nll"] for name in ("whole", "half", "two"))
    assert len(whole) == 9 * 16 and np.array_equal(whole, half) # 8.4 blocks: 9, which neither 4 nor 2 x 4 divides
    assert two == pytest.approx(whole, rel=1e-4)
    before = contents("whole")
    assert "nothing to do" in run_script("train.py", "--init_from=resume", "--out_dir=whole")[0]
    assert contents("whole") == before
    message = refused(init_from="resume", out_dir="half", max_iters=6, test_fraction=0.2)
    assert "its test_fraction is 0.4, here it is 0.2" in message


def test_a_resumed_run_is_the_same_to_the_last_bit(runs):
    folder, printed = runs
    assert_same_training(folder / "whole", folder / "half")
    info = json.loads((folder / "half" / "config.json").read_text())
    assert info["config"]["max_iters"] == 20 and info["sources"]["max_iters"] == "command line"
    # its own settings came back without being said again, with where the run had them from when it began
    assert info["config"]["learning_rate"] == 1e-2 and info["sources"]["learning_rate"] == "command line"
    assert info["config"]["init_from"] == "scratch"


# float16 has a loss scale to restore; the others have state or noise in the head, which the optimizer does not know of
@pytest.mark.parametrize("settings", [
    dict(dtype="float16", distance="offset_l2"),
    dict(distance="mahalanobis", variant="covariance"),
    dict(distance="hamming", variant="gumbel", learn_n=True)],
    ids=lambda settings: settings.get("variant", "float16"))
def test_other_runs_resume_to_the_last_bit_too(settings):
    settings = dict(dropout=0.1, eval_interval=4, lr_decay_iters=8, **settings)
    train(out_dir="whole", max_iters=8, **settings)
    train(out_dir="half", max_iters=4, **settings)
    start = load("half")
    run_script("train.py", "--init_from=resume", "--out_dir=half", "--max_iters=8")
    assert_same_training("whole", "half")
    end = load("half")
    if settings.get("dtype") == "float16":
        assert end["scaler"]["scale"] > 0 and end["scaler"] != start["scaler"]
    if settings.get("variant") == "covariance":
        before, after = (ckpt["model"]["head.covariance"] for ckpt in (start, end))
        assert not torch.equal(before, after) # the estimate is alive


def test_a_compiled_run_resumes_to_the_last_bit_on_two_threads():
    # the compiler's own gradient of the token embedding is added up in the order in which the threads come
    settings = dict(compile=True, batch_size=32, n_layer=1, n_embd=64, eval_interval=4, lr_decay_iters=8, **HARD)
    torch.set_num_threads(2)
    try:
        printed, _ = train(out_dir="whole", max_iters=8, **settings)
        train(out_dir="half", max_iters=4, **settings)
        run_script("train.py", "--init_from=resume", "--out_dir=half", "--max_iters=8")
    finally:
        torch.set_num_threads(1)
    if "does not work here" in printed:
        pytest.skip("no compiler")
    assert_same_training("whole", "half")
    assert len(json.load(open("whole/summary.json"))["layer_pc2_ev"]) == 1 # its graph calls no hooks


def test_lines_behind_the_checkpoint_are_dropped_on_resume():
    train(out_dir="whole", max_iters=8, eval_interval=4, **HARD)
    train(out_dir="half", max_iters=4, eval_interval=4, **{**HARD, "learn_n": True})
    with open("half/metrics.jsonl", "a") as f: # the run went on for a step and a half, then the machine stopped
        f.write('{"kind": "train", "step": 5, "loss": 1.0}\n{"kind": "tra')
    run_script("train.py", "--init_from=resume", "--out_dir=half", "--max_iters=8")
    assert metrics("half") == metrics("whole")


def contents(folder):
    return {name: open(os.path.join(folder, name), "rb").read() for name in os.listdir(folder)}


@pytest.mark.parametrize("settings", [dict(), dict(max_iters=1)], ids=["as it was", "fewer steps than it has"])
def test_resuming_a_finished_run_changes_nothing(settings):
    train(out_dir="out", max_iters=2, track_emissions=True, carbon_intensity=100)
    before = contents("out")
    assert before.keys() >= {"config.json", "ckpt.pt", "best.pt", "metrics.jsonl", "summary.json"}
    printed, _ = run_script("train.py", "--init_from=resume", "--out_dir=out", *flags(**settings))
    assert "nothing to do: out is at step 2 of" in printed
    assert contents("out") == before


def test_a_run_that_ended_without_a_summary_is_evaluated_once_more():
    train(out_dir="out", max_iters=2)
    summary = open("out/summary.json").read()
    os.remove("out/summary.json")
    printed, _ = run_script("train.py", "--init_from=resume", "--out_dir=out")
    assert "done: validation loss" in printed and open("out/summary.json").read() == summary
    assert [row["step"] for row in metrics("out", "train")] == [1, 2]
    assert [row["step"] for row in metrics("out", "eval")] == [0, 2] # the second evaluation of step 2 is no second row


def test_no_steps_at_all_is_an_evaluation():
    train(out_dir="out", max_iters=0)
    row, = metrics("out")
    assert row["step"] == 0 and json.load(open("out/summary.json"))["val_loss"] == row["val_loss"]


def test_how_often_one_evaluates_does_not_change_training():
    train(out_dir="often", max_iters=8, eval_interval=2, **HARD)
    train(out_dir="seldom", max_iters=8, eval_interval=4, log_interval=3, **HARD)
    assert_same(load("often")["model"], load("seldom")["model"])
    often = {row["step"]: row["loss"] for row in metrics("often", "train")}
    assert [row["step"] for row in metrics("seldom", "train")] == [3, 4, 6, 8]
    assert all(often[row["step"]] == row["loss"] for row in metrics("seldom", "train"))


def test_a_smaller_micro_batch_is_the_same_run():
    # what config/gpu12gb.py advises when memory is short. Without dropout, which belongs to the micro-batch
    train(out_dir="two", max_iters=8, batch_size=4, gradient_accumulation_steps=2, distance="cosine")
    train(out_dir="one", max_iters=8, batch_size=8, gradient_accumulation_steps=1, distance="cosine")
    assert_close_runs("two", "one")


def test_heads_share_data_order_and_backbone(monkeypatch):
    seen, read_batch = {}, data.Blocks.batch
    for distance in ("baseline", "cosine", "offset_l2"):
        batches = seen[distance] = []

        def record(*args, batches=batches):
            batches.append(read_batch(*args))
            return batches[-1]
        monkeypatch.setattr(data.Blocks, "batch", record)
        train(out_dir=distance, distance=distance, max_iters=3, learning_rate=0, min_lr=0) # the weights stay
    for distance in ("cosine", "offset_l2"):
        assert_same(seen[distance], seen["baseline"])
        a, b = load(distance)["model"], load("baseline")["model"]
        assert all(torch.equal(a[name], b[name]) for name in a if name.startswith("transformer."))
    first = [x for x, _ in seen["baseline"]]
    assert len(first) == 3 * 2 + 1 # a batch per micro-step, and the one fetched ahead
    assert not torch.equal(first[0], first[1])

# -----------------------------------------------------------------------------
# optimizer and schedule


@pytest.mark.parametrize("name, initial, settings", [
    ("A", torch.eye(16), dict(distance="mahalanobis")),
    ("theta", torch.zeros(16), dict(distance="mahalanobis", variant="diagonal")),
    ("L", torch.zeros(16, 16), dict(distance="mahalanobis", variant="cholesky")),
    ("alpha", torch.ones(128, 16), dict(distance="offset_l2")),
    ("log_n", torch.tensor(2.0).log(), dict(distance="manhattan", learn_n=True, n=2)),
    ("alpha", torch.ones(128, 16), dict(distance="offset_l2", tie_weights=True))])
def test_the_optimizer_has_every_parameter_once_and_the_heads_own_do_not_decay(name, initial, settings):
    _, script = train(out_dir="out", max_iters=2, bias=True, weight_decay=0.3, **settings)
    names = {id(p): n for n, p in script["raw_model"].named_parameters()}
    decaying, others = script["opt"].param_groups
    decay = [names[id(p)] for p in decaying["params"]]
    other = [names[id(p)] for p in others["params"]]
    assert sorted(decay + other) == sorted(names.values())
    assert [group["weight_decay"] for group in script["opt"].param_groups] == [0.3, 0.0]
    assert f"head.{name}" in other
    assert all(n.endswith("bias") or ".ln_" in n or n.startswith("head.") for n in other)
    assert ("transformer.wte.weight" if settings.get("tie_weights") else "head.weight") in decay
    assert not torch.equal(load("out")["model"][f"head.{name}"], initial) # learned, not only there
    assert len(load("out")["optimizer"]["state"]) == len(names)


@pytest.mark.parametrize("tied", [False, True])
def test_prototypes_need_not_decay(tied):
    weights = {}
    for out, settings in dict(none=dict(weight_decay=0), spared=dict(weight_decay=1, decay_head=False),
                              every=dict(weight_decay=1)).items():
        train(out_dir=out, max_iters=1, warmup_iters=0, tie_weights=tied, **settings)
        weights[out] = load(out)["model"]
    none, spared, every = weights.values() # after a step whose gradients are the same
    attention = "transformer.h.0.attn.c_attn.weight"
    for name in ("head.weight", "transformer.wte.weight") if tied else ("head.weight",):
        assert torch.equal(spared[name], none[name]) and not torch.equal(every[name], none[name])
    assert torch.equal(spared[attention], every[attention]) and not torch.equal(none[attention], every[attention])
    assert "the optimizer's groups are others" in refused(init_from="resume", out_dir="every", max_iters=2,
                                                          decay_head=False)


def test_schedule(runs):
    lr = [row["lr"] for row in metrics(runs[0] / "whole", "train")]
    assert lr[:5] == pytest.approx([1e-2 * i / 6 for i in range(1, 6)]) # a straight line, and no first step at 0
    assert lr[5] == pytest.approx(1e-2) and all(a > b for a, b in zip(lr[5:], lr[6:]))
    train(out_dir="out", max_iters=14, lr_decay_iters=12, warmup_iters=2, eval_interval=20)
    lr = [row["lr"] for row in metrics("out", "train")]
    assert lr[2] == pytest.approx(1e-2)
    assert lr[7] == pytest.approx((1e-2 + 1e-3) / 2) # a cosine is half way down at half time
    assert lr[12:] == pytest.approx([1e-3, 1e-3]) # and stays at min_lr
    train(out_dir="flat", max_iters=4, decay_lr=False, warmup_iters=1, eval_interval=20)
    assert [row["lr"] for row in metrics("flat", "train")] == pytest.approx([5e-3, 1e-2, 1e-2, 1e-2])


def test_gradients_are_clipped_and_the_norm_is_from_before(monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def record(self, *args, **kwargs):
        params = [p for group in self.param_groups for p in group["params"]]
        norms.append(torch.stack([p.grad.norm() for p in params]).norm().item())
        return step(self, *args, **kwargs)
    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    train(out_dir="out", max_iters=2, grad_clip=1e-2, distance="cosine")
    assert norms == pytest.approx([1e-2] * 2, rel=1e-3)
    assert all(row["grad_norm"] > 0.1 for row in metrics("out", "train"))


def test_without_a_compiler_training_goes_on(monkeypatch):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("no C++ compiler was found")
    train(out_dir="eager", max_iters=2, distance="manhattan")
    monkeypatch.setattr(torch, "compile", no_compiler)
    printed, _ = train(out_dir="out", max_iters=2, distance="manhattan", compile=True)
    assert "torch.compile does not work here, going on without it (RuntimeError: no C++ compiler" in printed
    assert_same(load("out")["model"], load("eager")["model"])

# -----------------------------------------------------------------------------
# ranks


def test_two_ranks_equal_one_with_twice_the_micro_steps(here):
    settings = dict(max_iters=6, eval_interval=3, dropout=0.1, dtype="float32")
    # the second one has two micro-steps per rank, whose gradients are exchanged once
    heads = dict(euclidean=dict(distance="euclidean", learn_n=True),
                 manhattan=dict(distance="manhattan", gradient_accumulation_steps=4))
    for name, head in heads.items():
        text, other = ended(fork_ranks(2, **{**SETTINGS, **settings, **head, "out_dir": f"{name}2"}))
        assert "2 rank(s)" in text and "done:" in text and other == "" # rank 0 alone speaks
        train(out_dir=f"{name}1", **settings, **head)
        # the slope of |h - w| jumps, so that a rounding can move a coordinate's gradient by a whole step
        assert_close_runs(f"{name}2", f"{name}1", 1e-4 if name == "manhattan" else 1e-5)
        assert json.load(open(f"{name}2/config.json"))["world_size"] == 2


@pytest.mark.torture # two processes that compile
def test_two_compiled_ranks_equal_one(here):
    settings = {**SETTINGS, "n_layer": 1, "max_iters": 4, "eval_interval": 2, "distance": "cosine", "compile": True}
    ended(fork_ranks(2, **settings, out_dir="two"))
    run_script("train.py", *flags(**settings, out_dir="one"))
    assert_close_runs("two", "one")


def test_a_run_goes_on_with_another_number_of_ranks(here):
    settings = {**SETTINGS, **HARD, "dropout": 0.1, "gradient_accumulation_steps": 4, "eval_interval": 3}
    train(**{**settings, "out_dir": "whole", "max_iters": 6})
    for name, first, second in (("fewer", 2, 1), ("more", 1, 4)):
        ended(fork_ranks(first, **{**settings, "out_dir": name, "max_iters": 3}))
        ended(fork_ranks(second, "train.py", "--init_from=resume", out_dir=name, max_iters=6))
        assert_close_runs("whole", name)


@pytest.mark.parametrize("rank", [0, 1])
def test_micro_steps_that_do_not_divide_are_refused_by_every_rank(rank, monkeypatch):
    # before the ranks wait for each other: none of them can hang
    for key, value in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2).items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **kwargs: pytest.fail("waits for the others"))
    message = refused(**{**SETTINGS, "gradient_accumulation_steps": 3})
    assert "3 counts the micro-batches of all ranks" in message and "try 4 or 2" in message

# -----------------------------------------------------------------------------
# what cannot run


def test_everything_that_is_wrong_is_in_one_report(here):
    (here / "mine.py").write_text("learning_rte = 1e-3\nbatch_size = 1.5\n")
    (code, out, err), = processes(here, [os.path.join(ROOT, "train.py"), "mine.py", *flags(
        n_heads=2, n=-1, dtype="float8", device="tpu", init_from="nonsense", distance="cosin", eval_iters=0,
        log_interval=0, dataset="other", n_embd=30, n_head=4, country_iso_code="US", min_lr="low")])
    assert code == 1 and "Traceback" not in err and not os.path.exists("out")
    for part in ("mine.py: unknown key 'learning_rte', did you mean 'learning_rate'?",
                 "mine.py: batch_size wants an int, got 1.5",
                 "command line: unknown key 'n_heads', did you mean 'n_head'?",
                 "command line: min_lr wants a float, got 'low'",
                 "n is -1.0, it must be > 0", "dtype is 'float8': use", "device is 'tpu': use",
                 "init_from is 'nonsense': use scratch", "unknown distance 'cosin', did you mean 'cosine'?",
                 "eval_iters is 0", "log_interval is 0", "n_embd 30 must be a multiple of n_head 4",
                 "make it with: python ", "did you mean 'USA'?"):
        assert part in err, part
    listed = int(re.search(r"(\d+) to fix", err)[1])
    assert listed == err.count("\n  - ") == 14


@pytest.mark.parametrize("settings, message", [
    (dict(variant="exact"), "baseline has no variants"),
    (dict(distance="cosine", variant="hard"), "unknown cosine variant 'hard'"),
    (dict(distance="minkowski", distance_params="q=3"), "minkowski has no parameter 'q' (legal: p)"),
    (dict(distance="minkowski", distance_params="p:3"), "must read name=number"),
    (dict(distance="minkowski", distance_params="p=0.5"), "p must be at least 1"),
    (dict(distance="cosine", link="linear"), "unknown link 'linear'"),
    (dict(distance="cosine", eps=-1), "eps must be >= 0"),
    (dict(block_size=400), "lower block_size or prepare more text"),
    (dict(block_size=0), "block_size is 0"),
    (dict(test_fraction=1.0), "test_fraction is 1.0, it must be in [0, 1)"),
    (dict(test_fraction=0.97), "test_fraction 0.97 of the 21 blocks of the validation split is 21, which leaves none"),
    (dict(vocab_size=90), "vocab_size 90 is smaller than the 97 tokens of the data"),
    (dict(init_from="resume", out_dir="nowhere"), "nowhere holds no ckpt.pt"),
    (dict(init_from="gpt2-small"), "init_from is 'gpt2-small'"),
    (dict(batch_size=-1), "batch_size is -1"),
    (dict(dropout=1.5), "dropout is 1.5"),
    (dict(learning_rate=-1), "learning_rate is -1"),
    (dict(grad_clip=-1), "grad_clip is -1"),
    (dict(beta2=1), "beta2 is 1"),
    (dict(seed=-1), "seed is -1"),
    (dict(vocab_size=-1), "vocab_size is -1"),
    (dict(out_dir=""), "out_dir is ''")])
def test_refused(settings, message):
    assert message in refused(**{**SETTINGS, **settings})
    assert not os.path.exists("out")


@pytest.mark.parametrize("dataset, command", [
    ("openwebtext", r"python (\S*)prepare_openwebtext.py \(see --help .* network: python \1prepare_stdlib.py\)"),
    ("stdlib", r"python \S*prepare_stdlib.py")])
def test_missing_data_names_the_command(dataset, command, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    message = refused(dataset=dataset)
    assert f"data/{dataset}/train.bin is not there" in message and re.search(command, message)
    assert "1 to fix" in message


def test_bits_per_byte_is_the_loss_of_a_token_over_its_bytes(here):
    make_dataset(here / "own" / "tiny", val_tokens=341, val_bytes=4 * 341)
    train(data_dir="own", max_iters=1, out_dir="out")
    summary = json.load(open("out/summary.json"))
    assert summary["bits_per_byte"] == pytest.approx(summary["val_loss"] / math.log(2) / 4) # four bytes per token


def test_a_token_that_the_vocabulary_lacks_is_refused_with_its_place(here):
    make_dataset(here / "own" / "tiny", hash=None)
    ids = np.fromfile("own/tiny/train.bin", np.uint16)
    ids[:] = 97
    ids.tofile("own/tiny/train.bin")
    message = refused(**{**SETTINGS, "data_dir": "own"})
    assert re.search(r"own/tiny/train.bin has id 97 at position \d+, vocab_size is 97", message)


def test_a_run_is_not_overwritten_unless_asked():
    train(out_dir="out", max_iters=2)
    before = open("out/ckpt.pt", "rb").read()
    message = refused(**{**SETTINGS, "out_dir": "out"})
    assert all(part in message for part in ("out holds a run", "--init_from=resume", "--out_dir", "--overwrite=true"))
    assert open("out/ckpt.pt", "rb").read() == before
    train(out_dir="out", max_iters=1, overwrite=True, eval_interval=5)
    assert load("out")["step"] == 1 and [row["step"] for row in metrics("out")] == [0, 1, 1]


def test_another_model_or_other_data_are_not_resumed(here):
    train(out_dir="out", max_iters=2, distance="cosine")
    message = refused(init_from="resume", out_dir="out", max_iters=4, n_layer=3, distance="manhattan", n=2)
    for part in ("n_layer is 3 here, 2 in the checkpoint", "distance is 'manhattan' here, 'cosine' in the checkpoint",
                 "n is 2.0 here, 4.0 in the checkpoint"):
        assert part in message
    make_dataset(here / "own" / "tiny", train_tokens=6001)
    message = refused(init_from="resume", out_dir="out", max_iters=4, data_dir="own")
    before, now = (data.file_hash(f"{folder}/tiny") for folder in ("data", "own"))
    assert f"hash {now} here, {before} in the checkpoint" in message


# mahalanobis fails earlier than its loss: a matrix that is not finite has no Cholesky factor
@pytest.mark.parametrize("settings", [
    dict(distance="baseline"), dict(distance="cosine"), dict(distance="baseline", log_interval=2, eval_interval=4),
    dict(distance="mahalanobis"), dict(distance="mahalanobis", eval_interval=1),
    dict(distance="mahalanobis", variant="covariance")],
    ids=["baseline", "cosine", "seen later", "mahalanobis", "mahalanobis, evaluated", "covariance"])
def test_a_loss_that_is_not_finite_stops_the_run(settings):
    settings = {"max_iters": 2, "eval_interval": 2, **settings}
    train(out_dir="out", **settings)
    before = open("out/ckpt.pt", "rb").read()
    message = refused(init_from="resume", out_dir="out", max_iters=12, learning_rate=1e30, min_lr=1e30, warmup_iters=0,
                      grad_clip=0)
    for part in ("step ", "loss ", "gradient norm ", "not finite", "lr 1.000e+30",
                 "last good checkpoint: out/ckpt.pt", "--init_from=resume", "learning_rate"):
        assert part in message, message
    assert open("out/ckpt.pt", "rb").read() == before
    assert all(torch.isfinite(p).all() for p in load("out")["model"].values())
    assert all(math.isfinite(row.get("loss", row.get("val_loss"))) for row in metrics("out"))


def test_a_loss_that_is_not_finite_from_the_start():
    message = refused(**{**SETTINGS, "learning_rate": 1e30, "warmup_iters": 0, "grad_clip": 0})
    assert "not finite" in message and "last good checkpoint: none yet" in message
    assert not os.path.exists("out/gpt2/ckpt.pt")

# -----------------------------------------------------------------------------
# tools around it


def test_wandb_offline(here):
    pytest.importorskip("wandb")
    printed, = train_processes(here, dict(out_dir="out", max_iters=2, wandb_log=True, wandb_mode="offline"))
    assert "done:" in printed and list((here / "wandb").glob("offline-run-*/*.wandb"))


def test_trackio_needs_no_network(here):
    pytest.importorskip("trackio")
    settings = {**SETTINGS, "out_dir": "out", "max_iters": 2, "wandb_log": True, "tracker": "trackio"}
    printed, = ended([fork("train.py", env=dict(TRACKIO_DIR=str(here / "trackio")), log="log0", **settings)])
    assert "done:" in printed and "going on without" not in printed
    with closing(sqlite3.connect(here / "trackio/distance-heads.db")) as database:
        rows = database.execute("select step, metrics from metrics").fetchall()
    assert [step for step, row in rows if "val_loss" in json.loads(row)] == [0, 2]


def scripts_with_settings():
    names = [name for name in sorted(os.listdir(ROOT)) if name.endswith(".py") and name != "configurator.py"]
    return [name for name in names if "configure(globals()" in read(name)]


def read(*path):
    with open(os.path.join(ROOT, *path), encoding="utf-8") as f:
        return f.read()


@pytest.mark.parametrize("script", scripts_with_settings())
def test_help_is_the_docstring_and_the_settings_and_no_more(script, monkeypatch, capsys):
    with pytest.raises(SystemExit) as e:
        run_script_loud(script, "--help", monkeypatch)
    docstring = read(script).split('"""')[1].strip()
    printed = capsys.readouterr().out
    assert e.value.code in (0, None) and printed.startswith(docstring) and "$ python" in docstring
    settings = printed.removeprefix(docstring).strip().splitlines()
    for name in defaults_of(script):
        assert any(line.startswith(f"{name} = ") for line in settings), name
    for line in settings: # a setting with its comment, a comment, or an empty line
        assert re.fullmatch(r"|#.*|\w+ = [^#]*?(#.*)?", line), line
    assert settings[-1].split(" = ")[0] in defaults_of(script)


PAGES = ("README.md", "RESULTS.md", "Makefile")


def launch_lines():
    """
    (file, script, its arguments) of every `python x.py ...` and `torchrun ... x.py ...` in the pages, configs and
    docstrings, for scripts with settings.
    """
    scripts = [name for name in sorted(os.listdir(ROOT)) if name.endswith(".py")]
    texts = {name: read(name).split('"""')[1] for name in scripts}
    texts |= {name: read(name) for name in PAGES}
    configs = [name for name in sorted(os.listdir(os.path.join(ROOT, "config"))) if name.endswith(".py")]
    texts |= {f"config/{name}": read("config", name) for name in configs}
    for name, text in texts.items():
        for line in text.replace("\\\n", " ").splitlines():
            found = re.search(r"(?:\bpython3? |/python |\btorchrun )(?:[^`]*?\s)?(\w+\.py)\b([^`;)]*)", line)
            if found and found[1] in scripts and "configure(globals()" in read(found[1]):
                yield name, found[1], shlex.split(found[2], comments=True)


def test_every_launch_line_names_files_and_settings_that_there_are(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines, defaults = list(launch_lines()), {}
    assert len(lines) >= 15
    assert {name for name, *_ in lines} >= {*PAGES, "train.py", "sample.py", "data.py", "config/gpt2.py"}
    for name, script, args in lines:
        args = args[script in ("bench.py", "gpu.py"):] # the first word says what to measure
        if script in ("report.py", "claims.py"): # folders, and settings of the design
            args = [arg for arg in args if arg[0] == "-"]
        if script not in defaults:
            defaults[script] = defaults_of(script)
        if args != ["--help"]:
            problems = []
            configurator.configure(dict(defaults[script]), args, problems=problems)
            assert not problems, (name, args, problems)


def test_the_pages_other_commands_name_scripts_flags_and_targets_that_there_are():
    """`python prepare_x.py ...`, whose flags argparse knows, and `make x`."""
    seen = set()
    for page in PAGES:
        for script, arguments in re.findall(r"\bpython (prepare_\w+\.py)([^`#\n]*)", read(page)):
            seen.add(script)
            for flag in re.findall(r"--\w+", arguments):
                assert f'add_argument("{flag}"' in read(script), (page, script, flag)
        for target in re.findall(r"^(?:.*`)?make (\w+)", read(page), re.M):
            seen.add(target)
            assert re.search(rf"^{target}:", read("Makefile"), re.M), (page, target)
    assert seen >= {"prepare_stdlib.py", "prepare_openwebtext.py", "demo", "test", "study"}


def test_links_between_the_pages_lead_somewhere():
    def anchor(heading): # as GitHub makes it
        return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")

    for page in ("README.md", "RESULTS.md"):
        links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", read(page))
        assert len(links) > 10
        for path, fragment in links:
            assert os.path.exists(os.path.join(ROOT, path or page)), (page, path)
            if fragment:
                headings = re.findall(r"^#+ (.*)", read(path or page), re.M)
                assert fragment in map(anchor, headings), (page, path, fragment)


def test_the_papers_settings_take_every_head(monkeypatch):
    monkeypatch.chdir(ROOT)
    defaults = defaults_of("train.py")
    for distance, variants in DISTANCES.items():
        for variant, spec in variants.items():
            params = ",".join(f"{key}={value}" for key, value in spec.params.items())
            args = ["config/gpt2.py", *flags(distance=distance, variant=variant, distance_params=params)]
            config, sources = configurator.configure(dict(defaults), args) # exits with a message if anything is unknown
            arguments = {key: config[key] for key in GPTConfig.__dataclass_fields__}
            head = lm_head(GPTConfig(**arguments | dict(vocab_size=64, n_embd=8)))
            assert (head.distance, head.variant) == (distance, variant)
            assert config["tie_weights"] and sources["tie_weights"] == "config/gpt2.py"

# -----------------------------------------------------------------------------
# GPT-2's weights: random ones in their place, as there is no network


@pytest.fixture
def pretrained(monkeypatch):
    """--init_from=gpt2 gives a model of 3 layers; returns settings that leave its shape to the weights."""
    transformers = pytest.importorskip("transformers")

    def from_pretrained(name, **overrides):
        torch.manual_seed(0)
        hf = transformers.GPT2Config(vocab_size=97, n_positions=24, n_embd=16, n_layer=3, n_head=4, bos_token_id=0,
                                     eos_token_id=0)
        return GPT.from_hf(transformers.GPT2LMHeadModel(hf), **overrides)
    monkeypatch.setattr(model_module.GPT, "from_pretrained", from_pretrained)
    settings = {k: v for k, v in SETTINGS.items() if k not in ("n_layer", "n_head", "n_embd")}
    return settings | dict(init_from="gpt2", eval_interval=2, lr_decay_iters=4)


def test_a_run_from_gpt2_can_be_resumed(pretrained):
    settings = {**pretrained, "distance": "cosine", "tie_weights": True}
    for out_dir, max_iters in (("whole", 4), ("half", 2)):
        run_script("train.py", *flags(**{**settings, "out_dir": out_dir, "max_iters": max_iters}))
    run_script("train.py", "--init_from=resume", "--out_dir=half", "--max_iters=4")
    assert_same_training("whole", "half")
    config = json.load(open("half/config.json"))["config"]
    assert config["n_layer"] == load("half")["model_args"]["n_layer"] == 3 and config["bias"] # what is, not the default


def test_a_shape_that_gpt2_does_not_have_is_refused(pretrained):
    assert "fix n_layer=3 (asked: 6)" in refused(**{**pretrained, "n_layer": 6})


def test_gpt2_without_transformers_is_one_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in refused(**{**SETTINGS, "init_from": "gpt2"})
