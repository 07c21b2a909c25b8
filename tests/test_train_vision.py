"""
train_vision.py from the outside: what a run leaves behind, that it can be stopped and split, what it never looks at,
and what it refuses. Killed runs are in test_safe.py.

Runs are made in this process by runpy, as in tests/test_train.py; ranks and exit codes are real processes.

$ pytest tests/test_train_vision.py
"""
import csv
import dataclasses
import json
import math
import os
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import (
    ROOT,
    assert_same,
    defaults_of,
    ended,
    flags,
    fork_ranks,
    load,
    make_dataset,
    processes,
    refused,
    run_script,
    run_script_loud,
)
from helpers import SETTINGS as LANGUAGE
from image_files import cifar_arrays, records, write, write_mnist
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, MultiStepLR, StepLR

import configurator
import data_vision
import model_vision
import probing
import safe
from data_vision import Batches, split
from distances import DISTANCES
from model_vision import VisionConfig, VisionNet

SETTINGS = dict(out_dir="out", track_emissions=False, plots=False, device="cpu", dtype="float32", distance="cosine")
PROBE = {"effective_rank", "collapse_score", "pc2_ev", "pca5", "intra_variance", "inter_variance", "variance_ratio",
         "active_ratio", "mean_accuracy", "prototype_offset", "own_variance_ratio", "h_grad_norm", "h_norm",
         "prototype_norm"}
TEST = {"test_loss", "test_accuracy", "f1_macro", "pc2_ev", "pca90", "pca90_uncapped", "prototype_alignment",
        "confusion", "train_loss", "variance_ratio", "active_ratio", "mean_accuracy", "prototype_offset",
        "own_variance_ratio"}
TIMES = {"ms", "cpu_seconds", "seconds", "seconds_per_epoch", "energy_kwh_to_90"}
PNG = b"\x89PNG\r\n\x1a\n"


def train(*args, **settings):
    return run_script("train_vision.py", *args, *flags(**{**SETTINGS, **settings}))


def resume(out_dir, **settings):
    return run_script("train_vision.py", "--init_from=resume", *flags(out_dir=out_dir, **settings))


def refuses(*args, **settings):
    return refused(*args, script="train_vision.py", **settings)


def timeless(row):
    return {k: v for k, v in row.items() if k not in TIMES and not k.endswith("_total")}


def metrics(out_dir, kind=None):
    with open(os.path.join(out_dir, "metrics.jsonl")) as f:
        return [timeless(row) for row in map(json.loads, f) if kind in (None, row["kind"])]


def summary(out_dir):
    with open(os.path.join(out_dir, "summary.json")) as f:
        return timeless(json.load(f))


def assert_same_run(a, b):
    """Equal to the last bit: both checkpoints, every logged number, the end result."""
    for name in "ckpt.pt", "best.pt":
        x, y = load(a, name), load(b, name)
        for key in x.keys() - {"config"}:
            assert_same(x[key], y[key], f"{name}: {key}")
    assert metrics(a) == metrics(b) and summary(a) == summary(b)


def contents(folder):
    return {name: open(os.path.join(folder, name), "rb").read() for name in sorted(os.listdir(folder))}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Hard(nn.Module):
    """A backbone with all that makes resuming hard, and small: statistics and noise."""
    num_features = 32

    def __init__(self, image_shape):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(image_shape), 32), nn.BatchNorm1d(32), nn.ReLU(),
                                    nn.Dropout(0.2))

    def forward(self, x):
        return self.layers(x)


@pytest.fixture
def hard(monkeypatch):
    monkeypatch.setitem(model_vision.BACKBONES, "hard", Hard)

# -----------------------------------------------------------------------------
# one run, a process of its own, in another folder than the scripts


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    settings = {**SETTINGS, "track_emissions": True, "carbon_intensity": 100, "plots": True, "log_interval": 7}
    (code, out, err), = processes(folder, [os.path.join(ROOT, "train_vision.py"), *flags(epochs=5, **settings)])
    assert code == 0 and not err, out + err
    return folder / "out", out


def test_a_run_learns_and_leaves_every_file(first):
    out, printed = first
    files = {"config.json", "metrics.jsonl", "ckpt.pt", "best.pt", "probe.npz", "summary.json", "curves.png",
             "learned.png", "ckpt_before.pt", "lock", "predictions.npz"}
    assert set(os.listdir(out)) - {"emissions.csv"} == files # the energy is tested below, where there is codecarbon
    info, end = json.loads((out / "config.json").read_text()), json.loads((out / "summary.json").read_text())
    energy = {key for key in end if key.endswith("_total")}
    assert end.keys() - energy == TEST | {
        "epochs", "step", "images", "best_epoch", "val_accuracy", "n", "num_params", "seconds_per_epoch", "steps_to_90",
        "energy_kwh_to_90", "peak_memory_bytes", "cpu_seconds", "best_share"}
    assert end["test_accuracy"] > 0.9 and end["f1_macro"] > 0.9 and end["val_accuracy"] > 0.9
    assert end["prototype_alignment"] == 1
    assert end["epochs"] == 5 and end["step"] == 100 and end["images"] == 6400 and end["n"] == 1
    assert end["seconds_per_epoch"] > 0
    confusion = np.array(end["confusion"])
    assert confusion.shape == (10, 10) and confusion.sum() == 360
    assert confusion.trace() / 360 == pytest.approx(end["test_accuracy"])
    assert info["script"] == "train_vision.py" and info["config"].keys() == info["sources"].keys()
    assert info["sources"]["distance"] == "command line"
    assert info["data"] == dict(source="scikit-learn's digits", hash=load(out)["data_hash"], num_classes=10,
                                train_images=1293, val_images=144, test_images=360)
    net = net_of(out)
    assert info["num_params"] == end["num_params"] == sum(p.numel() for p in net.parameters())
    assert info["model_args"]["image_shape"] == [1, 8, 8]
    assert info["head"] == net.head.extra_repr()
    with np.load(out / "probe.npz") as probe: # all test images here, as they are no more than PROBE_SIZE
        h, y = probe["h"], probe["y"]
        assert h.shape == (360, 256) and y.shape == (360,)
        means = np.stack([h[y == k].mean(0) for k in range(10)])
        np.testing.assert_allclose(probe["class_means"], means, rtol=1e-4, atol=1e-5)
    assert f"test accuracy {end['test_accuracy']:.2%}" in printed
    assert f"nearest class mean {end['mean_accuracy']:.2%}" in printed


def test_rows_of_metrics(first):
    losses, evals = metrics(first[0], "train"), metrics(first[0], "eval")
    assert [row["step"] for row in evals] == [0, 20, 40, 60, 80, 100]
    assert [row["epoch"] for row in evals] == list(range(6))
    ends = {*range(20, 101, 20)} # there is a log line at each epoch's end as well
    assert [row["step"] for row in losses] == sorted({*range(7, 101, 7), *ends})
    for row in evals:
        assert row.keys() == PROBE | {
            "kind", "step", "epoch", "images", "val_loss", "val_accuracy", "best_accuracy", "n"}
        assert row["images"] == row["step"] * 64
        assert all(isinstance(row[key], float) for key in PROBE)
        assert 0 < row["active_ratio"] <= 1 < row["effective_rank"] < 144
    for row in losses:
        assert row.keys() == {"kind", "step", "epoch", "images", "loss", "lr", "grad_norm"}
        assert row["lr"] == 1e-3 and row["epoch"] == (row["step"] - 1) // 20
    assert evals[0]["val_loss"] == pytest.approx(math.log(10), rel=0.05)
    assert losses[-1]["loss"] < 0.5 < 1.5 < losses[0]["loss"]
    assert summary(first[0])["steps_to_90"] == evals[ninety(evals)]["step"]


def ninety(evals):
    """The first row by which nine tenths of the way to the best accuracy are made."""
    errors = [1 - row["val_accuracy"] for row in evals]
    return next(i for i, e in enumerate(errors) if e <= errors[0] - 0.9 * (errors[0] - min(errors)) + 1e-12)


def test_rows_of_emissions(first):
    pytest.importorskip("codecarbon")
    with open(first[0] / "emissions.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    # the last one at the end: testing and plotting take energy too
    assert [int(row["step"]) for row in rows] == [0, 20, 40, 60, 80, 100, 100]
    with open(first[0] / "metrics.jsonl") as f:
        evals = [row for row in map(json.loads, f) if row["kind"] == "eval"]
    energy = [float(row["energy_kwh_total"]) for row in rows]
    assert [row["energy_kwh_total"] for row in evals] == energy[:6] == sorted(energy[:6]) and energy[0] > 0
    assert [row["val_loss"] for row in evals] == [float(row["val_loss"]) for row in rows[:6]]
    end = json.loads((first[0] / "summary.json").read_text())
    assert end["energy_kwh_total"] == energy[5] and end["energy_kwh_to_90"] == evals[ninety(evals)]["energy_kwh_total"]


def net_of(out_dir, name="best.pt"):
    ckpt = load(out_dir, name)
    net = VisionNet(VisionConfig(**ckpt["model_args"]))
    net.load_state_dict(ckpt["model"])
    return net.eval()


@torch.no_grad()
def by_hand(net):
    """(loss, accuracy) on the test digits"""
    images = data_vision.load("digits")
    z, _ = net((images.test_x.float() / 255 - 0.5) / 0.5)
    return F.cross_entropy(z, images.test_y).item(), (z.argmax(1) == images.test_y).double().mean().item()


def test_the_end_result_by_hand(first):
    loss, accuracy = by_hand(net_of(first[0]))
    end = summary(first[0])
    assert end["test_loss"] == pytest.approx(loss, rel=1e-5) and end["test_accuracy"] == accuracy


@torch.no_grad()
def test_the_predictions_by_hand(first):
    images = data_vision.load("digits")
    z, _ = net_of(first[0])((images.test_x.float() / 255 - 0.5) / 0.5)
    found = np.load(first[0] / "predictions.npz")
    assert found["y"].tolist() == images.test_y.tolist() and found["predicted"].tolist() == z.argmax(1).tolist()
    nll = F.cross_entropy(z, images.test_y, reduction="none").numpy()
    assert found["nll"].dtype == np.float32 and found["nll"] == pytest.approx(nll, abs=1e-4)
    assert found["nll"].mean(dtype=np.float64) == pytest.approx(summary(first[0])["test_loss"], rel=1e-6)


def test_the_validation_loss_by_hand(first):
    images = data_vision.load("digits")
    train_idx, val_idx = split(images.train_y, 0.1, 1337)
    with torch.no_grad():
        z, _ = net_of(first[0], "ckpt.pt")((images.train_x[val_idx].float() / 255 - 0.5) / 0.5)
    expected = F.cross_entropy(z, images.train_y[val_idx]).item()
    assert metrics(first[0], "eval")[-1]["val_loss"] == pytest.approx(expected, rel=1e-5)


def picture(path):
    """(a picture's pixels, the share of them that differ from its background)"""
    image = pytest.importorskip("matplotlib.image").imread(path)[..., :3]
    return image, (np.abs(image - image[0, 0]).max(-1) > 0.1).mean()


def test_plots(first):
    pytest.importorskip("matplotlib")
    train(out_dir="pixels", epochs=1, model="pixels", plots=True)
    for path in (first[0] / "curves.png", first[0] / "learned.png", "pixels/curves.png", "pixels/learned.png"):
        image, ink = picture(path)
        colours = np.unique(image.reshape(-1, 3).round(1), axis=0)
        assert open(path, "rb").read(8) == PNG and image.shape[0] > 200 and ink > 0.01 and len(colours) > 10, path
    train(out_dir="plain", epochs=1)
    assert not [name for name in os.listdir("plain") if name.endswith(".png")]

# -----------------------------------------------------------------------------
# resuming


@pytest.mark.parametrize("settings", [
    dict(optimizer="sgd", learning_rate=1e-2, weight_decay=1e-3, lr_schedule="step", lr_step=2),
    dict(distance="mahalanobis", variant="covariance"), dict(distance="hamming", variant="gumbel", learn_n=True),
    dict(optimizer="adamw", weight_decay=0.05, distance="offset_l2", dtype="float16", lr_schedule="multistep",
         lr_milestones="1,4")],
    ids=lambda settings: settings.get("variant", settings.get("optimizer")))
def test_a_resumed_run_is_the_same_to_the_last_bit(settings, hard):
    settings = dict(model="hard", augment="crop", **settings)
    train(out_dir="whole", epochs=6, **settings)
    train(out_dir="half", epochs=3, **settings)
    start = load("half")
    resume("half", epochs=6)
    assert_same_run("whole", "half")
    end = load("half")
    changed = {name for name, p in start["model"].items() if not torch.equal(p, end["model"][name])}
    assert {"backbone.layers.2.running_mean", "backbone.layers.1.weight"} <= changed
    assert ("head.covariance" in changed) == (settings.get("variant") == "covariance")
    info = json.load(open("half/config.json"))
    assert info["config"]["epochs"] == 6 and info["config"]["init_from"] == "scratch"
    assert info["config"]["augment"] == "crop"


@pytest.mark.parametrize("after", ["ckpt.pt", "best.pt", "summary.json"])
def test_a_run_that_ends_between_two_files_goes_on(after, monkeypatch):
    class Crash(Exception):
        pass

    def crashing(write, path, content, **options):
        write(path, content, **options)
        if os.path.basename(path) == after and (after == "summary.json" or content["step"] == 40):
            raise Crash
    train(out_dir="whole", epochs=3)
    best_accuracy = [row["best_accuracy"] for row in metrics("whole", "eval")]
    assert summary("whole")["best_epoch"] == 3 and best_accuracy[2] > best_accuracy[1] # epoch 2 is an improvement
    with monkeypatch.context() as patch, pytest.raises(Crash):
        for name in "save", "write":
            patch.setattr(safe, name, partial(crashing, getattr(safe, name)))
        train(out_dir="out", epochs=2) # so that best.pt is the one of the epoch at which it crashes
    resume("out")
    best, expected = load("out", "best.pt"), load("out")
    assert best["best_epoch"] == 2
    assert_same(best["model"], expected["model"])
    resume("out", epochs=3)
    assert_same_run("whole", "out")


def test_a_finished_run_that_is_prolonged_has_not_ended_until_it_has(monkeypatch):
    train(epochs=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        def interrupted(self, step, *ranks, batch=Batches.train):
            if step == 50:
                raise KeyboardInterrupt
            return batch(self, step, *ranks)
        patch.setattr(Batches, "train", interrupted)
        resume("out", epochs=3)
    assert not os.path.exists("out/summary.json") # study.py and report.py would take it for the end result
    resume("out")
    train(out_dir="whole", epochs=3)
    assert_same_run("whole", "out")


# the second ends by patience; the third between two evaluations
@pytest.mark.parametrize("settings", [
    dict(epochs=2), dict(epochs=6, learning_rate=0, patience=2),
    dict(epochs=6, learning_rate=0, patience=3, eval_interval=2)])
def test_resuming_a_finished_run_changes_nothing(settings):
    train(**settings)
    before = contents("out")
    assert load("out")["step"] == summary("out")["step"] # what has been tested has been evaluated
    printed, _ = resume("out")
    assert "nothing to do" in printed
    assert contents("out") == before


def test_how_often_one_evaluates_and_logs_does_not_change_training(hard):
    train(out_dir="often", epochs=4, model="hard", log_interval=1)
    train(out_dir="seldom", epochs=4, model="hard", eval_interval=3)
    assert_same(load("often")["model"], load("seldom")["model"])
    assert [row["epoch"] for row in metrics("seldom", "eval")] == [0, 3, 4]

# -----------------------------------------------------------------------------
# validation, test, early stopping


def test_early_stopping():
    train(epochs=6, learning_rate=0, patience=2)
    assert summary("out")["epochs"] == 2 and summary("out")["best_epoch"] == 0
    assert [row["epoch"] for row in metrics("out", "eval")] == [0, 1, 2]
    train(out_dir="never", epochs=3, learning_rate=0, patience=0)
    assert summary("never")["epochs"] == 3
    # an improvement that is too small is none: accuracy moves by less than 100 points
    train(out_dir="small", epochs=4, patience=2, min_improvement=99.9)
    assert summary("small")["epochs"] == 2 and summary("small")["best_epoch"] == 0
    assert metrics("small", "eval")[2]["val_accuracy"] > 0.5


def test_the_best_weights_are_tested_not_the_last():
    # from epoch 2 on it destroys what it has learned
    train(epochs=4, distance="baseline", lr_schedule="multistep", lr_milestones="2", lr_gamma=3000)
    accuracy = [row["val_accuracy"] for row in metrics("out", "eval")]
    end, best, last = summary("out"), load("out", "best.pt"), load("out")
    assert end["best_epoch"] == best["best_epoch"] == 2 == accuracy.index(max(accuracy))
    assert accuracy[4] < accuracy[2] - 0.1 and end["epochs"] == 4
    assert best["step"] == 40 and last["step"] == 80
    assert not torch.equal(best["model"]["head.weight"], last["model"]["head.weight"])
    assert by_hand(net_of("out")) == (pytest.approx(end["test_loss"], rel=1e-4), end["test_accuracy"])
    images = data_vision.load("digits")
    with torch.no_grad():
        h = net_of("out").features((images.test_x.float() / 255 - 0.5) / 0.5)
        z, _ = net_of("out")((images.train_x[split(images.train_y, 0.1, 1337)[0][:144]].float() / 255 - 0.5) / 0.5)
    found = probing.probe(net_of("out").head, h, images.test_y)
    assert end["prototype_offset"] is None # of a linear head
    for key in set(probing.OF_CLASSES) - {"prototype_offset"}:
        assert end[key] == pytest.approx(found[key], rel=1e-3), key
    y = images.train_y[split(images.train_y, 0.1, 1337)[0][:144]] # as many as there are for validation
    assert end["train_loss"] == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-4)
    assert end["best_share"] == 0.5
    assert by_hand(net_of("out", "ckpt.pt"))[1] < end["test_accuracy"] and end["val_accuracy"] == accuracy[2]


def test_the_test_images_are_touched_once_and_only_at_the_end(monkeypatch):
    seen, fixed, batch = [], Batches.fixed, Batches.train

    def fixed_seen(self, first, count):
        seen.append((len(self.x), first, count))
        return fixed(self, first, count)

    def batch_seen(self, step, *ranks):
        seen.append((len(self.x), "train", step))
        return batch(self, step, *ranks)
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "fixed", fixed_seen)
        patch.setattr(Batches, "train", batch_seen)
        train(epochs=2)
    start = seen.index((360, 0, 64))
    assert seen[start:] == [(360, i, min(64, 360 - i)) for i in range(0, 360, 64)]
    assert all(n in (1293, 144) for n, *_ in seen[:start])
    assert [what for what in seen if what[0] == 1293] == [(1293, "train", step) for step in range(40)]

    def garbage(*args):
        images = real(*args)
        return dataclasses.replace(images, test_x=255 - images.test_x.flip(2), test_y=images.test_y.flip(0))
    real = data_vision.load
    monkeypatch.setattr(data_vision, "load", garbage)
    train(out_dir="garbage", epochs=2)
    for name in "ckpt.pt", "best.pt":
        assert_same(load("out", name)["model"], load("garbage", name)["model"])
    a, b = summary("out"), summary("garbage")
    assert metrics("out") == metrics("garbage") and {key for key in a if a[key] != b[key]} <= TEST
    assert b["test_accuracy"] < 0.3 < a["test_accuracy"]


def test_every_head_meets_the_same_backbone_split_order_and_augmentation(monkeypatch):
    seen, batch = {}, Batches.train
    heads = {"baseline": "", "cosine": "", "hamming": "gumbel", "offset_l2": "", "mahalanobis": "covariance"}
    for distance, variant in heads.items():
        batches = []

        def record(*args, batches=batches):
            batches.append(batch(*args))
            return batches[-1]
        with monkeypatch.context() as patch:
            patch.setattr(Batches, "train", record)
            _, script = train(out_dir=distance, distance=distance, variant=variant, epochs=1, learning_rate=0,
                              augment="crop", batch_size=256)
        backbone = {name: p for name, p in load(distance)["model"].items() if name.startswith("backbone.")}
        val_data = script["val_data"]
        seen[distance] = dict(backbone=backbone, batches=batches, val_x=val_data.x, val_y=val_data.y)
        assert len(backbone) == 4 and len(batches) == 5
        assert_same(seen[distance], seen["baseline"])
    x = [x for x, _ in batches]
    assert not torch.equal(x[0], x[1])
    _, script = train(epochs=0, seed=1, batch_size=256)
    assert not torch.equal(script["train_data"].train(0)[0], x[0])
    assert not torch.equal(load("out")["model"]["backbone.fc1.weight"], backbone["backbone.fc1.weight"])


def test_without_epochs_it_is_an_evaluation():
    train(epochs=0)
    assert [row["step"] for row in metrics("out")] == [0]
    assert summary("out")["epochs"] == 0 and summary("out")["test_accuracy"] < 0.5


def test_a_batch_has_no_more_images_than_there_are():
    train(epochs=2, batch_size=2048)
    assert load("out")["step"] == 2 and summary("out")["images"] == metrics("out")[-1]["images"] == 2 * 1293

# -----------------------------------------------------------------------------
# schedule, optimizer, precision


@pytest.mark.parametrize("settings, scheduler", [
    (dict(lr_schedule="none"), partial(ConstantLR, factor=1.0)),
    (dict(lr_schedule="step", lr_step=3, lr_gamma=0.5), partial(StepLR, step_size=3, gamma=0.5)),
    (dict(lr_schedule="multistep", lr_milestones="2,5,9", lr_gamma=0.2),
     partial(MultiStepLR, milestones=[2, 5, 9], gamma=0.2)),
    (dict(lr_schedule="cosine", min_lr=1e-3), partial(CosineAnnealingLR, T_max=12, eta_min=1e-3))],
    ids=["none", "step", "multistep", "cosine"])
def test_schedules_are_torchs(settings, scheduler):
    train(epochs=12, model="pixels", learning_rate=0.1, patience=0, batch_size=2048, **settings)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule, expected = scheduler(optimizer), []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert [row["lr"] for row in metrics("out", "train")] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name, kind", [
    ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_the_optimizer_decays_matrices_and_kernels_only(name, kind, hard):
    _, script = train(epochs=1, batch_size=512, model="hard", distance="offset_l2", learn_n=True, optimizer=name,
                      weight_decay=0.3, momentum=0.8, beta1=0.7, beta2=0.8)
    opt, names = script["opt"], {id(p): name for name, p in script["raw_model"].named_parameters()}
    decaying, others = opt.param_groups
    decay = {names[id(p)] for p in decaying["params"]}
    other = {names[id(p)] for p in others["params"]}
    assert type(opt) is kind and decay == {"backbone.layers.1.weight", "head.weight"}
    assert decay | other == set(names.values()) and not decay & other
    assert [group["weight_decay"] for group in opt.param_groups] == [0.3, 0]
    for group in opt.param_groups:
        assert group["momentum"] == 0.8 if name == "sgd" else group["betas"] == (0.7, 0.8)


def test_gradients_are_clipped_and_the_norm_is_from_before():
    train(epochs=1, optimizer="sgd", momentum=0, learning_rate=1, grad_clip=1e-3, batch_size=1293)
    train(out_dir="start", epochs=0)
    a, b = load("start")["model"], load("out")["model"]
    change = sum((a[name] - b[name]).square().sum() for name in a).sqrt().item()
    assert change == pytest.approx(1e-3, rel=1e-3) and metrics("out", "train")[0]["grad_norm"] > 0.01


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(dtype):
    train(out_dir=dtype, epochs=2, dtype=dtype)
    train(epochs=2)
    low, full = metrics(dtype, "eval")[-1], metrics("out", "eval")[-1]
    assert low["val_loss"] == pytest.approx(full["val_loss"], rel=0.02) and low["val_loss"] != full["val_loss"]
    assert low["val_accuracy"] > 0.8
    assert all(p.dtype != getattr(torch, dtype) for p in load(dtype)["model"].values())


def losses_of(out_dir):
    return [row.get("loss", row.get("val_loss")) for row in metrics(out_dir)]


def test_compiled():
    # a batch of all validation images: another size would be compiled for itself
    printed, script = train(epochs=1, compile=True, batch_size=144)
    if "does not work here" in printed:
        pytest.skip("no compiler")
    train(out_dir="eager", epochs=1, batch_size=144)
    assert losses_of("out") == pytest.approx(losses_of("eager"), rel=1e-4)
    # names of the model, not of its compiled wrapper
    assert load("out")["model"].keys() == load("eager")["model"].keys()


def test_without_a_compiler_training_goes_on(monkeypatch, hard):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("no C++ compiler was found")
    train(out_dir="eager", epochs=1, model="hard", batch_size=512)
    monkeypatch.setattr(torch, "compile", no_compiler)
    printed, _ = train(epochs=1, model="hard", batch_size=512, compile=True)
    assert "torch.compile does not work here, going on without it (RuntimeError: no C++ compiler" in printed
    assert_same_run("out", "eager")

# -----------------------------------------------------------------------------
# every head, every backbone, every config


VARIANTS = [(distance, variant, "mlp") for distance, variants in DISTANCES.items() for variant in variants]
HEADS = [("baseline", "", "mlp"), *VARIANTS, ("cosine", "", "pixels")]


@pytest.mark.parametrize("distance, variant, model", HEADS)
def test_every_head_trains(distance, variant, model):
    train(epochs=1, distance=distance, variant=variant, model=model, batch_size=128, log_interval=5)
    assert all(map(math.isfinite, losses_of("out"))) and math.isfinite(summary("out")["test_loss"])
    for row in metrics("out", "eval"):
        missing = {key for key in PROBE - {"variance_ratio"} if row[key] is None}
        assert missing == ({"prototype_offset"} if distance == "baseline" else set()) # it has no distance
    start = VisionNet(VisionConfig(**load("out")["model_args"])).state_dict()
    assert start.keys() == load("out")["model"].keys()


def write_cifar(root, num_classes, n=None):
    x, y, test_x, test_y = cifar_arrays(num_classes, n)
    names = ("data_batch_1.bin", "test_batch.bin") if num_classes == 10 else ("train.bin", "test.bin")
    write(root / f"cifar{num_classes}" / names[0], records(x, y, num_classes))
    write(root / f"cifar{num_classes}" / names[1], records(test_x, test_y, num_classes))


# the paper's files with one step, at 32 pixels
@pytest.mark.parametrize("name, dataset, features, shape", [
    ("mlp", "cifar100", 256, (3, 32, 32)), ("cnn", "mnist", 128, (1, 28, 28)),
    ("resnet50", "cifar10", 2048, (3, 32, 32)), ("vgg16", "mnist", 128, (1, 32, 32)),
    ("vit_tiny", "cifar10", 192, (3, 32, 32)), ("pvtv2_b0", "mnist", 256, (3, 32, 32))])
def test_every_backbone_takes_a_step_on_files(name, dataset, features, shape, here):
    if dataset == "mnist":
        write_mnist(here / "data", n=20, m=4)
    else:
        write_cifar(here / "data", int(dataset[5:]))
    batch_size = 100 if dataset == "cifar100" else 10
    image_size = 32 if name in ("vit_tiny", "vgg16", "pvtv2_b0") else 0
    train(os.path.join(ROOT, "config", f"{name}.py"), dataset=dataset, epochs=1, val_fraction=0.5,
          batch_size=batch_size, compile=False, image_size=image_size)
    ckpt, info = load("out"), json.load(open("out/config.json"))
    assert ckpt["step"] == 1 and ckpt["model_args"]["image_shape"] == shape and ckpt["model_args"]["model"] == name
    assert ckpt["model"]["head.weight"].shape == (info["data"]["num_classes"], features)
    assert math.isfinite(summary("out")["test_loss"])
    assert all(torch.isfinite(p).all() for p in ckpt["model"].values())
    assert info["sources"]["learning_rate"].endswith(".py")


# Tables 4 to 7: MNIST, CIFAR-10, CIFAR-100, or one for all
SCHEDULES = {
    "none": dict(lr_schedule="none"),
    "step 50": dict(lr_schedule="step", lr_step=50, lr_gamma=0.5),
    "step 30": dict(lr_schedule="step", lr_step=30, lr_gamma=0.1),
    "resnet": dict(lr_schedule="multistep", lr_milestones="60,100,140", lr_gamma=0.2),
    "vgg": dict(lr_schedule="multistep", lr_milestones="75,125", lr_gamma=0.1),
    "cosine": dict(lr_schedule="cosine"),
}
PAPER = {
    "mlp": dict(learning_rate=3e-4, epochs=(40, 40, 150), optimizer="adam", weight_decay=0,
                batch_size=(2048, 1024, 1024), schedule=("none", "none", "step 50")),
    "cnn": dict(learning_rate=3e-4, epochs=(40, 40, 150), optimizer="adam", weight_decay=0,
                batch_size=(8192, 4096, 512), schedule=("none", "none", "step 50")),
    "resnet50": dict(learning_rate=0.1, epochs=(100, 100, 200), optimizer="sgd", momentum=0.9, weight_decay=1e-4,
                     batch_size=(512, 512, 256), schedule=("step 30", "step 30", "resnet")),
    "vgg16": dict(batch_size=(4096, 2048, 512), schedule=("step 30", "step 30", "vgg")),
    "vit_tiny": dict(batch_size=(256, 128, 128), schedule=("none", "none", "cosine"), image_size=224),
    "pvtv2_b0": dict(learning_rate=(1e-4, 1e-4, 5e-5), epochs=(80, 80, 150), optimizer="adamw", weight_decay=0.05,
                     batch_size=256, schedule=("none", "none", "cosine")),
}


@pytest.mark.parametrize("name", PAPER)
def test_configs_are_the_papers(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    defaults = defaults_of("train_vision.py")
    for i, dataset in enumerate(("mnist", "cifar10", "cifar100")):
        args = [f"config/{name}.py", f"--dataset={dataset}"]
        config, sources = configurator.configure(dict(defaults), args) # exits with a message if anything is unknown
        table = dict(patience=(15, 15, 25), min_improvement=0.01, n=1, eps=1e-4, model=name, dataset=dataset)
        for key, value in {**table, **PAPER[name]}.items():
            table[key] = value[i] if isinstance(value, tuple) else value
        table |= SCHEDULES[table.pop("schedule")]
        assert {key: config[key] for key in table} == table, dataset
        assert config["out_dir"] == f"out/{dataset}_{name}" and sources["batch_size"] == f"config/{name}.py"
        assert config["epochs"] >= 40

# -----------------------------------------------------------------------------
# ranks


# Adam would make whole steps of the rounding errors of gradients that are 0. At this seed no unit lies so close to 0
# that the rounding of a sum of two parts switches it
SPLIT = dict(augment="crop", learn_n=True, batch_size=62, seed=4, optimizer="sgd", learning_rate=0.02)


def assert_close_runs(a, b, tolerance=1e-5):
    for x, y in zip([*metrics(a), summary(a)], [*metrics(b), summary(b)], strict=True):
        for key, value in y.items():
            if isinstance(value, float):
                y[key] = pytest.approx(value, rel=tolerance, abs=tolerance)
        assert x == y
    for name in ("ckpt.pt", "best.pt"):
        x, y = load(a, name), load(b, name)
        assert x["best_epoch"] == y["best_epoch"]
        torch.testing.assert_close(x["model"], y["model"], rtol=tolerance, atol=tolerance)


# the covariance is estimated from all ranks, but around each rank's own class means: it is another estimate, as good
@pytest.mark.parametrize("head, tolerance", [
    (dict(), 1e-5), (dict(distance="mahalanobis", variant="covariance"), 1e-2)], ids=["cosine", "covariance"])
def test_two_ranks_equal_one(here, head, tolerance):
    # 144 images for validation: three batches, the last one short
    settings = {**SETTINGS, **SPLIT, **head, "epochs": 3}
    text, other = ended(fork_ranks(2, "train_vision.py", **{**settings, "out_dir": "two"}))
    assert "2 rank(s)" in text and "test accuracy" in text and other == "" # rank 0 alone speaks
    train(**{**settings, "out_dir": "one"})
    assert summary("one")["best_epoch"] == 3 # saved just before it is tested: the other rank must wait for the file
    assert_close_runs("two", "one", tolerance)
    assert json.load(open("two/config.json"))["world_size"] == 2


@pytest.mark.torture # two processes that compile take minutes
def test_two_compiled_ranks_equal_one(here):
    settings = {**SETTINGS, **SPLIT, "epochs": 2, "compile": True}
    ended(fork_ranks(2, "train_vision.py", **{**settings, "out_dir": "two"}))
    train(**{**settings, "out_dir": "one"})
    assert_close_runs("two", "one")


def test_a_run_goes_on_with_another_number_of_ranks(here):
    settings = {**SETTINGS, **SPLIT}
    train(**{**settings, "epochs": 2, "out_dir": "whole"})
    for name, first, second in (("fewer", 2, 1), ("more", 1, 2)):
        ended(fork_ranks(first, "train_vision.py", **{**settings, "epochs": 1, "out_dir": name}))
        ended(fork_ranks(second, "train_vision.py", "--init_from=resume", out_dir=name, epochs=2))
        assert_close_runs("whole", name)


def as_rank(monkeypatch, rank):
    for key, value in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2).items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **kwargs: pytest.fail("waits for the others"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_batch_that_does_not_divide_is_refused_by_every_rank(rank, monkeypatch):
    as_rank(monkeypatch, rank) # before the ranks wait for each other: none of them can hang
    assert "batch_size 65 is shared by the 2 ranks" in refuses(batch_size=65) and not os.listdir(".")
    # the 1,293 training images are one batch, whose halves differ in size: the mean of the ranks' gradients would not
    # be the batch's
    assert "1293" in refuses(batch_size=2048) and not os.listdir(".")

# -----------------------------------------------------------------------------
# what cannot run


def test_everything_that_is_wrong_is_in_one_report(here):
    (here / "mine.py").write_text("learning_rte = 1e-3\nbatch_size = 1.5\n")
    (code, out, err), = processes(here, [os.path.join(ROOT, "train_vision.py"), "mine.py", *flags(
        model="resnet", augment="flip", normalize="imagenet", optimizer="rmsprop", lr_schedule="linear",
        lr_milestones="60;100", eval_interval=0, log_interval=0, lr_step=0, val_fraction=1, learning_rate=-1, epochs=-1,
        beta1=1, momentum=1, patience=-1, lr_gamma=0, channels=2, n=-1, seed=-1, distance="cosin",
        country_iso_code="US", dtype="float8", device="tpu", init_from="gpt2")])
    assert code == 1 and "Traceback" not in err and os.listdir(".") == ["mine.py"]
    parts = ("mine.py: unknown key 'learning_rte', did you mean 'learning_rate'?",
             "mine.py: batch_size wants an int, got 1.5", "model is 'resnet': use pixels, mlp",
             "augment is 'flip': use none, crop", "normalize is 'imagenet': use half",
             "optimizer is 'rmsprop': use adam", "lr_schedule is 'linear': use none",
             "lr_milestones is '60;100': write epochs", "eval_interval is 0", "log_interval is 0", "lr_step is 0",
             "val_fraction is 1.0, it must be in (0, 1)", "learning_rate is -1", "epochs is -1", "beta1 is 1",
             "momentum is 1", "patience is -1", "lr_gamma is 0", "channels is 2", "n is -1", "seed is -1",
             "unknown distance 'cosin', did you mean 'cosine'?", "did you mean 'USA'?", "dtype is 'float8': use",
             "device is 'tpu': use", "init_from is 'gpt2'")
    for part in parts:
        assert part in err, part
    assert f"{len(parts)} to fix" in err and err.count("\n  - ") == len(parts)


@pytest.mark.parametrize("settings, message", [
    (dict(normalize="cifar10"), "normalize is 'cifar10', of 3 channels, but digits has 1: use half or digits"),
    (dict(dataset="digit"), "there is no dataset 'digit'"),
    (dict(dataset="mnist"), "mnist is not there, and cannot be downloaded"),
    (dict(val_fraction=1e-4), "val_fraction=0.0001 leaves class"),
    (dict(distance="minkowski", distance_params="q=3"), "minkowski has no parameter 'q' (legal: p)"),
    (dict(distance="cosine", variant="hard"), "unknown cosine variant 'hard'"),
    (dict(n=0), "n must be > 0 and finite, got 0.0"),
    (dict(model="vgg16"), "VGG16 takes images of at least 32x32 pixels"), (dict(model="vit_tiny"), "use image_size=16"),
    (dict(init_from="resume", out_dir="nowhere"), "nowhere holds no ckpt.pt"), (dict(out_dir=""), "out_dir is ''")])
def test_refused(settings, message):
    settings = {**SETTINGS, **settings}
    assert message in refuses(**settings) and not os.listdir(".")


def test_a_run_is_not_overwritten_unless_asked():
    train(epochs=1)
    before = contents("out")
    message = refuses(**SETTINGS)
    assert all(part in message for part in ("out holds a run", "--init_from=resume", "--out_dir", "--overwrite=true"))
    assert contents("out") == before
    train(epochs=0, overwrite=True)
    assert load("out")["step"] == 0 and [row["step"] for row in metrics("out")] == [0]


@pytest.mark.parametrize("settings, message", [
    (dict(distance="manhattan"), "distance is 'manhattan' here, 'cosine' in the checkpoint"),
    (dict(model="pixels", n=2), "n is 2.0 here, 1.0 in the checkpoint"),
    (dict(batch_size=128), "batch_size is 128 here, 64 in the checkpoint"),
    (dict(optimizer="sgd"), "optimizer is 'sgd' here, 'adam' in the checkpoint"),
    (dict(batch_size=63), "batch_size is 63"), # as many steps, but other batches
    # the validation images would be among those that were trained on
    (dict(seed=1), "seed is 1"), (dict(val_fraction=0.101), "val_fraction is 0.101")], ids=str)
def test_another_run_is_not_resumed(settings, message):
    train(epochs=1)
    before = contents("out")
    assert message in refuses(init_from="resume", out_dir="out", epochs=2, **settings) and contents("out") == before


def test_a_part_of_the_images_split_anew():
    settings = dict(epochs=1, train_images=400, test_images=80, resplit=True, seed=3)
    _, script = train(**settings)
    expected = data_vision.load("digits", "data", 400, 80, 3)
    train_idx, val_idx = split(expected.train_y, 0.1, 3)
    for name, x in (("train", expected.train_x[train_idx]), ("val", expected.train_x[val_idx]),
                    ("test", expected.test_x)):
        assert torch.equal(script[f"{name}_data"].x, x)
    info = json.load(open("out/config.json"))
    assert info["data"]["hash"] == expected.hash and info["data"]["test_images"] == 80
    assert np.load("out/predictions.npz")["y"].tolist() == expected.test_y.tolist()
    for other in dict(resplit=False), dict(train_images=0), dict(test_images=90):
        assert "the data are others" in refuses(init_from="resume", out_dir="out", epochs=2, **other)
    assert "train_images is 1438, but there are 1437" in refuses(**SETTINGS, overwrite=True, train_images=1438)


def test_other_data_are_not_resumed(here, monkeypatch):
    train(epochs=1)
    before, real = contents("out"), data_vision.load
    monkeypatch.setattr(data_vision, "load", lambda *args: dataclasses.replace(real(*args), hash="123abc"))
    message = refuses(init_from="resume", out_dir="out", epochs=2)
    assert "the data are others: hash 123abc here" in message and contents("out") == before


def test_a_language_model_is_not_resumed(here):
    make_dataset(here / "data" / "tiny")
    run_script("train.py", *flags(**{**LANGUAGE, "out_dir": "out", "max_iters": 1}))
    before = contents("out")
    message = refuses(init_from="resume", out_dir="out")
    assert "out holds a run of train.py, this is train_vision.py" in message and contents("out") == before


# mahalanobis fails earlier than its loss: a matrix that is not finite has no Cholesky factor
@pytest.mark.parametrize("distance", ["baseline", "euclidean", "mahalanobis"])
def test_a_loss_that_is_not_finite_stops_the_run(distance):
    train(epochs=1, distance=distance)
    before = open("out/ckpt.pt", "rb").read()
    message = refuses(init_from="resume", out_dir="out", epochs=3, learning_rate=1e30)
    for part in ("step ", "loss ", "gradient norm ", "not finite", "lr 1.000e+30", "|w| ",
                 "last good checkpoint: out/ckpt.pt", "--init_from=resume", "lower learning_rate"):
        assert part in message, message
    assert open("out/ckpt.pt", "rb").read() == before
    assert all(math.isfinite(row.get("loss", row.get("val_loss"))) for row in metrics("out"))


def test_help(monkeypatch, capsys):
    with pytest.raises(SystemExit) as e:
        run_script_loud("train_vision.py", "--help", monkeypatch)
    out = capsys.readouterr().out
    assert e.value.code == 0 and "$ python train_vision.py --distance=cosine" in out
    assert "augment = \"none\" # 'crop'" in out


def test_a_resumed_run_says_where_its_settings_came_from():
    train(epochs=1, n=2, learn_n=True)
    resume("out", epochs=2)
    info = json.load(open("out/config.json"))
    assert info["sources"]["n"] == "command line" and info["sources"]["eps"] == "default"
    assert info["config"]["epochs"] == 2
    assert info["n"] == 2 and "--n=2" in info["command"] and summary("out")["n"] != 2 # n as it began, and as it ended
    before = contents("out")
    resume("out", epochs=1) # which it has: nothing that it does not keep to is written down
    assert contents("out") == before


def test_seconds_per_epoch_count_epochs():
    train(epochs=4, eval_interval=3)
    with open("out/metrics.jsonl") as f:
        rows = [row for row in map(json.loads, f) if row["kind"] == "eval"]
    with open("out/summary.json") as f:
        found = json.load(f)["seconds_per_epoch"]
    assert found == pytest.approx(np.median([rows[1]["seconds"] / 3, rows[2]["seconds"]]))
