"""
train_toy.py: many seeds as one batch train as each does alone, with every head; no test pair is a training pair; the
nets are the papers'; and a study's folders are those of runs, which report.py and figures_toy.py read.

$ pytest tests/test_toy.py
"""
import csv
import json
import os
import runpy
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import ROOT, flags, refused, run_script
from scipy import stats
from test_figures import assert_shows_something

import figures_toy
import metrics
import model_toy
import results
from data_vision import load
from distances import DistanceHead, parse_head
from model_toy import Seeds, losses
from run import read_metrics
from study import all_heads

# -----------------------------------------------------------------------------
# many seeds at once


def trained_alone(make, seed, x, y, steps):
    """The net's state after steps of torch's own AdamW on the loss of DistanceHead itself, or of the scores where the
    net changes them."""
    torch.manual_seed(seed)
    net = make().double()
    opt = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        opt.zero_grad()
        if net.output is None:
            net.head.loss(net.backbone(x), y).backward()
        else:
            torch.nn.functional.cross_entropy(net(x)[1], y).backward()
        opt.step()
    return net


def assert_seeds_train_alone(make, task, steps=4, is_training=True):
    """In double precision, so that no sum's order matters: AdamW makes steps of what is a zero but for rounding."""
    numbers = [3, 1, 4]
    batch = Seeds(lambda: make().double().train(is_training), numbers)
    opt = torch.optim.AdamW(batch.params.values(), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        opt.zero_grad()
        batch.update_covariance(task.train_x, task.train_y, task.shared)
        losses(batch(task.train_x, task.shared)[1], task.train_y).sum().backward()
        opt.step()
    for i, seed in enumerate(numbers):
        x, y = (task.train_x, task.train_y) if task.shared else (task.train_x[i], task.train_y[i])
        alone = trained_alone(lambda: make().train(is_training), seed, x, y, steps)
        state = batch.state(i)
        for name, value in alone.named_parameters():
            torch.testing.assert_close(state[name], value.detach(), rtol=1e-6, atol=1e-8, msg=f"{name} of seed {seed}")
        for name, value in alone.named_buffers():
            torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-8)
        own_x = x if task.shared else x[None]
        torch.testing.assert_close(batch.one(i)(own_x, task.shared)[1][0], alone(x)[1], rtol=1e-6, atol=1e-8)
    assert not torch.equal(batch.prototypes[0], batch.prototypes[1])


@pytest.mark.parametrize("head", [head for head in all_heads() if head != "hamming:gumbel"])
def test_each_seed_of_a_batch_trains_as_if_it_were_alone_with_every_head(head):
    arguments = parse_head(head)
    task = model_toy.modular_addition(11, 0.6, [3, 1, 4])
    assert_seeds_train_alone(lambda: model_toy.modular_net("mlp", 11, True, n=2.0, **arguments), task)


@pytest.mark.parametrize("tied", [True, False])
def test_each_seed_of_a_transformer_trains_alone(tied):
    task = model_toy.modular_addition(11, 0.6, [3, 1, 4])
    make = lambda: model_toy.modular_net("transformer", 11, tied, distance="cosine") # noqa: E731
    assert_seeds_train_alone(make, task, steps=2, is_training=False) # without dropout, which is drawn for all at once


@pytest.mark.parametrize("name", ["relu2_neg_bias", "abs_l2", "abs"])
def test_each_seed_of_a_two_layer_net_trains_alone_on_what_all_share(name):
    torch.manual_seed(0)
    x, y = torch.randn(50, 12, dtype=torch.float64), torch.arange(50) % 10
    task = model_toy.Task(x, y, x, y, 10, True, "noise", "")
    assert_seeds_train_alone(lambda: model_toy.two_layer_nets()[name].net(12, hidden=20), task)


@pytest.mark.parametrize("head", ["euclidean", "cosine", "mahalanobis", "minkowski:p=2"])
def test_features_close_to_their_prototypes_lose_no_digits(head):
    make = lambda: DistanceHead(16, 31, **parse_head(head), eps=1e-6) # noqa: E731
    batch = Seeds(lambda: model_toy.Net(torch.nn.Identity(), make()), [0, 1])
    h = batch.prototypes.repeat(1, 40, 1) # (2, 1240, 16): too many for the small way of DistanceHead
    h = h + 1e-3 * torch.randn(h.shape, generator=torch.Generator().manual_seed(0))
    for i, seed in enumerate([0, 1]):
        torch.manual_seed(seed)
        alone = make().double()
        torch.testing.assert_close(batch(h)[1][i].double(), alone(h[i].double()), rtol=1e-3, atol=1e-3)


def test_the_noise_of_a_gumbel_head_is_another_for_each_seed():
    head = dict(distance="hamming", variant="gumbel")
    batch = Seeds(lambda: model_toy.modular_net("mlp", 11, True, **head), [5, 5]) # the same numbers
    x = model_toy.modular_addition(11, 0.6, [0]).train_x
    z = batch(x.expand(2, -1, -1))[1]
    assert not torch.equal(z[0], z[1])
    batch.net.eval()
    z = batch(x.expand(2, -1, -1))[1]
    assert torch.equal(z[0], z[1])


# -----------------------------------------------------------------------------
# tasks and nets

@pytest.mark.parametrize("prime, fraction", [(31, 0.8), (31, 0.3), (7, 0.5)])
def test_no_test_pair_is_a_training_pair(prime, fraction):
    task = model_toy.modular_addition(prime, fraction, range(4))
    for train_x, test_x in zip(task.train_x.tolist(), task.test_x.tolist()):
        train, test = {tuple(pair) for pair in train_x}, {tuple(pair) for pair in test_x}
        assert not train & test
        assert len(train) == len(train_x) == int(fraction * prime ** 2) # none is drawn twice
        assert train | test == {(a, b) for a in range(prime) for b in range(prime)}
    for x, y in ((task.train_x, task.train_y), (task.test_x, task.test_y)):
        assert torch.equal(x.sum(-1) % prime, y)
    assert not torch.equal(task.train_x[0], task.train_x[1]) # each seed has its own part,
    alone = model_toy.modular_addition(prime, fraction, [2])
    assert torch.equal(alone.train_x[0], task.train_x[2]) # whoever trains beside it


def test_with_replacement_about_half_of_the_test_pairs_are_training_pairs():
    task = model_toy.modular_addition(31, 0.8, range(20), with_replacement=True)
    assert (task.train_x.shape, task.test_x.shape) == ((20, 800, 2), (20, 200, 2))
    for train_x, test_x in zip(task.train_x.tolist(), task.test_x.tolist()):
        train = {tuple(pair) for pair in train_x}
        share = sum(tuple(pair) in train for pair in test_x) / len(test_x)
        assert 0.45 < share < 0.68 # 1 - (960 / 961)^800 is 0.565
    assert torch.equal(task.train_x.sum(-1) % 31, task.train_y)
    assert task.hash != model_toy.modular_addition(31, 0.8, [0]).hash


def test_the_paper_s_split_has_768_and_193_pairs():
    task = model_toy.modular_addition(31, 0.8, [0])
    assert (task.train_x.shape[1], task.test_x.shape[1]) == (768, 193)


def test_two_layer_nets_are_the_paper_s():
    torch.manual_seed(0)
    x = torch.randn(5, 12)
    activations = {"relu": lambda a: a.clamp_min(0), "abs": lambda a: a.abs()}
    nets = model_toy.two_layer_nets()
    assert len(nets) == 16 and set(nets) == set(figures_toy.PUBLISHED_ACCURACY)
    for name, kind in nets.items():
        net, f = kind.net(12, hidden=20), activations["abs" if name.startswith("abs") else "relu"]
        h = f(x @ net.backbone.linear.weight.T + net.backbone.linear.bias)
        if "l2" in name:
            alpha = torch.rand_like(net.head.alpha) - 0.5 # a negative one counts as its square
            net.head.alpha.data = alpha
            z = torch.stack([(alpha[k] * (h - net.head.weight[k])).norm(dim=1) for k in range(10)], 1)
        else:
            z = h @ net.head.weight.T
            z = z + net.head.bias if name.endswith("bias") else z
            z = f(z) if name[:5] in ("relu2", "abs2_", "abs2") else z
        z = -z if "neg" in name else z
        torch.testing.assert_close(net(x)[1], z, rtol=1e-4, atol=1e-4)
        assert (net.head.bias is not None) == name.endswith("bias")


def test_pictures_are_raw_bytes_or_standardised():
    images = load("digits")
    raw, standard = (model_toy.pictures(images, scale) for scale in ("raw", "standard"))
    assert raw.train_x.shape == (1437, 64) and raw.train_x.max() == 255
    assert standard.train_x.mean().item() == pytest.approx(0, abs=1e-5)
    assert standard.train_x.std().item() == pytest.approx(1, abs=1e-5)
    raw_step = (raw.test_x[0] - raw.test_x[1]) / raw.train_x.std() # the test part is scaled as the training part is
    torch.testing.assert_close(standard.test_x[0] - standard.test_x[1], raw_step)


def test_stablemax():
    z = torch.tensor([[-3.0, 0.0, 2.0]])
    s = torch.tensor([[1 / 4, 1.0, 3.0]])
    torch.testing.assert_close(model_toy.stablemax(z).softmax(1), s / s.sum())


def test_the_geometric_median_has_the_least_sum_of_distances():
    x = torch.from_numpy(np.random.RandomState(0).standard_exponential((40, 2)))
    centre = model_toy.geometric_median(x)
    steps = 1e-3 * torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]])
    least = (x - centre).norm(dim=1).sum()
    assert all((x - centre - step).norm(dim=1).sum() > least for step in steps)


# -----------------------------------------------------------------------------
# numbers

def test_circularity_and_first_above():
    angle = np.arange(31) * 2 * np.pi * 7 / 31
    circle = np.stack([np.cos(angle), np.sin(angle)], 1) @ np.linalg.qr(np.random.RandomState(0).randn(16, 2))[0].T
    assert metrics.circularity(circle + 5) == pytest.approx(0, abs=1e-12)
    assert metrics.circularity(np.array([[3.0, 0], [-3, 0], [0, 1], [0, -1]])) == pytest.approx(0.5)
    epochs = list(range(0, 101, 10))
    values = [0, 1, 0, 0, 0.8, 1, 1, 1, 1, 1, 1] # a single peak is not enough
    assert metrics.first_above(epochs, values, 0.9, 20) == 40
    assert metrics.first_above(epochs, [0] * 9 + [1, 1], 0.9, 20) is None # a window that the end cuts short


def test_the_unpaired_test_is_the_regression_on_the_group():
    rng = np.random.RandomState(0)
    a, b = rng.normal(1, 2, 20), rng.normal(0, 2, 20)
    found = metrics.unpaired(a, b)
    line = stats.linregress([1] * 20 + [0] * 20, np.concatenate([a, b]))
    half = stats.t.ppf(0.975, 38) * line.stderr
    assert found["df"] == 38
    assert (found["mean"], found["t"], found["p"]) == pytest.approx((line.slope, line.slope / line.stderr, line.pvalue))
    assert (found["low"], found["high"]) == pytest.approx((line.slope - half, line.slope + half))
    assert found["d"] == pytest.approx(line.slope / np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2))
    assert metrics.unpaired([1.0], [2.0])["t"] is None
    assert metrics.unpaired([1.0, 1.0], [2.0, 2.0])["t"] is None


# -----------------------------------------------------------------------------
# the script

SMALL = dict(seeds=2, epochs=4, eval_interval=2, device="cpu")
MODULAR = dict(SMALL, prime=11, train_fraction=0.6, heads="baseline,matched,euclidean", plots=False)


def toy(**settings):
    return run_script("train_toy.py", *flags(**settings))


def rows_of(folder):
    return read_metrics(folder)[0]


def test_a_study_leaves_a_run_s_folder_for_each_seed_and_goes_on_with_more_seeds(tmp_path):
    out = tmp_path / "study"
    toy(out_dir=out, **MODULAR)
    runs, broken = results.read_runs([str(out)])
    assert not broken and len(runs) == 6
    section, = results.make_sections([group for group in results.group([results.measure(run) for run in runs])
                                      if group.differ.get("control", "") == ""])
    assert sorted(head.distance for head in section.heads) == ["baseline", "euclidean"]
    assert section.paired([head for head in section.heads if head.distance == "euclidean"][0], "test_accuracy")
    summary = json.loads((out / "mlp_euclidean_standard_n2" / "s1" / "summary.json").read_text())
    assert 0 < summary["embedding_pc2_ev"] < 1 and summary["circularity"] > 0

    before = (out / "mlp_baseline" / "s0" / "summary.json").stat().st_mtime_ns
    toy(out_dir=out, **{**MODULAR, "seeds": 3})
    assert (out / "mlp_baseline" / "s0" / "summary.json").stat().st_mtime_ns == before
    assert "no seed is left to train" in toy(out_dir=out, **{**MODULAR, "seeds": 3})[0]
    together = tmp_path / "together"
    toy(out_dir=together, **{**MODULAR, "seeds": 3, "heads": "euclidean"})
    folder = os.path.join("mlp_euclidean_standard_n2", "s2") # alone in the one, third of three in the other
    for a, b in zip(rows_of(out / folder), rows_of(together / folder), strict=True):
        assert a.pop("kind") == b.pop("kind")
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    assert len(rows_of(out / folder)) == 3

    message = refused(script="train_toy.py", out_dir=out, **{**MODULAR, "learning_rate": 0.5})
    assert "learning_rate" in message and "0.5" in message and "--overwrite=true" in message


def test_the_scores_of_the_matched_control_have_the_spread_of_euclids_throughout(tmp_path):
    toy(out_dir=tmp_path, **{**MODULAR, "ns": "2,8", "learning_rate": 0.02, "epochs": 6})
    for seed in (0, 1):
        control = [row["score_scale"] for row in rows_of(tmp_path / "mlp_matched" / f"s{seed}")]
        euclid = [row["score_scale"] for row in rows_of(tmp_path / "mlp_euclidean_standard_n2" / f"s{seed}")]
        assert control == pytest.approx(euclid, rel=1e-5) and max(euclid) > 1.1 * min(euclid)
    # one whose Euclid has no end is left out
    os.remove(tmp_path / "mlp_euclidean_standard_n2" / "s0" / "summary.json")
    (tmp_path / "mlp_euclidean_standard_n2" / "s0" / "error.txt").write_text("it broke")
    for seed in (0, 1):
        os.remove(tmp_path / "mlp_matched" / f"s{seed}" / "summary.json")
    toy(out_dir=tmp_path, **{**MODULAR, "ns": "2,8", "learning_rate": 0.02, "epochs": 6})
    assert [os.path.exists(tmp_path / "mlp_matched" / f"s{seed}" / "summary.json") for seed in (0, 1)] == [False, True]


def test_a_scale_is_a_factor_that_the_gradient_does_not_see():
    task = model_toy.modular_addition(11, 0.6, [0, 1])
    batch = Seeds(lambda: model_toy.modular_net("mlp", 11, True, distance="baseline"), [0, 1])
    _, plain = batch(task.train_x)
    batch.scale = torch.tensor([3.0, 0.5])
    losses(batch(task.train_x)[1], task.train_y).sum().backward()
    gradient = batch.params["backbone.out.weight"].grad.clone()
    batch.params["backbone.out.weight"].grad, batch.scale = None, None
    factors = [target / plain[i].detach().std(1).mean() for i, target in enumerate((3.0, 0.5))]
    z = batch(task.train_x)[1]
    sum(torch.nn.functional.cross_entropy(factors[i] * z[i], task.train_y[i]) for i in (0, 1)).backward()
    torch.testing.assert_close(gradient, batch.params["backbone.out.weight"].grad)


@pytest.mark.parametrize("settings", [
    dict(study="modular", prime=11, train_fraction=0.6, heads="baseline,euclidean"),
    dict(study="points", heads="baseline,manhattan", batch_size=0),
    dict(study="points", heads="euclidean", point_set="skewed", link="softmin", batch_size=0),
    dict(study="two_layer", models="relu2,relu2_neg,abs_l2", optimizer="sgd", batch_size=0)])
def test_every_study_draws_its_figure_and_its_table(tmp_path, settings):
    pytest.importorskip("matplotlib")
    toy(out_dir=tmp_path / "out", **SMALL, **settings)
    study = settings["study"]
    assert_shows_something(tmp_path / "out" / f"{study}.png")
    with open(tmp_path / "out" / f"{study}.csv") as f:
        assert len(f.readlines()) == 1 + len(settings.get("models", settings.get("heads")).split(","))
    assert figures_toy.draw(str(tmp_path / "out"))[-1] == str(tmp_path / "out" / f"{study}.png")


def test_many_heads_are_seen_by_n(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    toy(out_dir=tmp_path, **SMALL, study="modular", prime=11, train_fraction=0.6, heads="baseline,euclidean", ns="1,4")
    assert not (tmp_path / "modular_heads.png").exists()
    monkeypatch.setattr(figures_toy, "SHOWN", 2)
    assert str(tmp_path / "modular_heads.png") in figures_toy.draw(str(tmp_path))
    assert_shows_something(tmp_path / "modular_heads.png")


def test_folders_that_differ_in_a_setting_are_told_apart_on_one_page(tmp_path):
    for inputs in ("raw", "standard"):
        toy(out_dir=tmp_path / inputs, **SMALL, study="two_layer", models="relu,abs,relu_bias,abs_bias", inputs=inputs,
            optimizer="sgd", batch_size=0, plots=False)
    figures_toy.draw(str(tmp_path))
    with open(tmp_path / "two_layer.csv") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 8 and {row["seeds"] for row in rows} == {"2"}
    assert {row["net"] for row in rows} >= {"relu, inputs raw", "relu, inputs standard", "abs_bias, inputs raw"}
    with open(tmp_path / "two_layer_tests.csv") as f:
        found = {row["contrast"]: row for row in csv.DictReader(f)}
    assert len(found) == 4
    runs, _ = results.read_runs([str(tmp_path / "standard")])
    accuracies = {model: [100 * r.summary["test_accuracy"] for r in runs if r.model == model] for model in
                  ("relu_bias", "abs_bias")}
    test = metrics.unpaired(np.array(accuracies["relu_bias"]), np.array(accuracies["abs_bias"]))
    row = found["relu_bias, inputs standard - abs_bias, inputs standard"]
    published = stats.ttest_ind_from_stats(95.69, 0.17, 20, 95.23, 0.16, 20).statistic # Table 3
    assert {key: value for key, value in row.items() if key != "contrast"} == {
        **{key: "" if value is None else f"{value:.3g}" for key, value in test.items()},
        "published t": f"{published:.3g}"}


def test_heads_are_compared_seed_by_seed_with_the_linear_one_and_its_control(tmp_path):
    for fraction in (0.6, 0.8):
        toy(out_dir=tmp_path / str(fraction), **{**MODULAR, "seeds": 3, "epochs": 10, "train_fraction": fraction})
    figures_toy.draw(str(tmp_path))
    with open(tmp_path / "modular_tests.csv") as f:
        rows = {row["contrast"]: row for row in csv.DictReader(f)}
    assert len(rows) == 2 * 4 # of each fraction: the linear head and its control with each other, Euclid with both
    row = rows["mlp: euclidean n=2, train_fraction 0.8 - linear, train_fraction 0.8"]
    sides = []
    for name in ("mlp_euclidean_standard_n2", "mlp_baseline"):
        paths = [tmp_path / "0.8" / name / f"s{seed}" / "summary.json" for seed in range(3)]
        sides.append([100 * json.loads(path.read_text())["embedding_pc2_ev"] for path in paths])
    test = stats.ttest_rel(*sides)
    low, high = test.confidence_interval()
    found = [float(row[f"two components %, {key}"]) for key in ("mean", "low", "high", "p")]
    assert found == pytest.approx([np.mean(sides[0]) - np.mean(sides[1]), low, high, test.pvalue], rel=5e-3)


def test_the_margin_is_the_distance_to_the_nearest_other_prototype_less_that_to_the_own():
    script = runpy.run_path(os.path.join(ROOT, "train_toy.py"))
    x, y = torch.tensor([[[0.0, 0.0], [3.0, 0.0]]]), torch.tensor([[0, 1]])
    task = model_toy.Task(x, y, x, y, 3, False, "two points", "")
    for link in ("harmonic", "softmin"):
        batch = Seeds(lambda link=link: model_toy.Net(torch.nn.Identity(), DistanceHead(2, 3, n=2.0, link=link)), [0])
        batch.params["head.weight"] = torch.tensor([[[0.0, 1.0], [3.0, 0.0], [9.0, 0.0]]], requires_grad=True)
        found = script["on_points"](batch, batch(x)[1].detach(), task)
        assert found["margin"].item() == pytest.approx(2.0, abs=1e-3) # of the first point: 3 - 1
        assert found["bound"].item() == pytest.approx(3 * 91 ** 0.5 / (2 * 2 ** 0.5), rel=1e-3)
        found = script["on_points"](batch, batch(x)[1].detach(), replace(task, train_y=1 - y))
        assert found["margin"].item() < 0 and np.isnan(found["bound"].item())


@pytest.mark.parametrize("settings, words", [
    (dict(prime=30), ("prime is 30", "no prime")),
    (dict(train_fraction=0.02), ("train_fraction is 0.02", "no training pair", "larger fraction")),
    (dict(train_fraction=1.0), ("train_fraction is 1.0",)),
    (dict(train_fraction=float("nan")), ("train_fraction is nan", "finite")),
    (dict(study="circles"), ("study is 'circles'", "two_layer")),
    (dict(study="two_layer", models="tanh"), ("no 'tanh'", "relu2_neg")),
    (dict(models="rnn"), ("no 'rnn'", "transformer")),
    (dict(models=" ,"), ("models is ' ,'", "write all")),
    (dict(study="two_layer", models=""), ("models is ''", "write all")),
    (dict(heads=""), ("heads is ''", "write all")),
    (dict(heads="euclidian"), ("euclidian", "euclidean")),
    (dict(heads="matched,cosine"), ("'matched' has the scale of euclidean, which has to be there too",)),
    (dict(embedding_penalty=-1.0), ("embedding_penalty is -1.0",)),
    (dict(threads=-1), ("threads is -1",)),
    (dict(ns="1,x"), ("ns is '1,x'",)),
    (dict(seeds=0), ("seeds is 0",)),
    (dict(study="points", point_set="spiral"), ("point_set is 'spiral'", "skewed"))])
def test_bad_input_is_one_message(tmp_path, settings, words):
    message = refused(script="train_toy.py", out_dir=tmp_path / "out", **settings)
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings", [
    dict(study="two_layer", models="abs2_neg", optimizer="sgd", batch_size=0),
    dict(study="modular", prime=11, heads="euclidean"),
    dict(study="modular", prime=11, heads="mahalanobis")]) # its Cholesky factor fails
def test_a_run_that_is_not_finite_leaves_an_error_and_no_end(tmp_path, settings):
    more = dict(epochs=30, learning_rate=1e30, plots=False)
    toy(out_dir=tmp_path / "out", **{**SMALL, **more}, **settings)
    folders = [os.path.dirname(path) for path in sorted((tmp_path / "out").glob("*/*/config.json"))]
    assert len(folders) == 2
    for folder in folders:
        assert os.path.exists(os.path.join(folder, "error.txt"))
        assert not os.path.exists(os.path.join(folder, "summary.json"))
    output, _ = toy(out_dir=tmp_path / "out", **{**SMALL, **more}, **settings)
    assert "no seed is left to train" in output # they are not tried again
    message = refused(script="train_toy.py", out_dir=tmp_path / "out", **{**SMALL, **more, "plots": True}, **settings)
    assert "holds no run of train_toy.py that has ended" in message # nothing can be drawn


def test_a_seed_that_is_not_finite_leaves_the_others_alone(tmp_path):
    def with_one_bad_seed(make, seeds, *args, **kwargs):
        batch = Seeds(make, seeds, *args, **kwargs)
        if len(seeds) == 2:
            batch.params["head.weight"].data[0] = np.nan
        return batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_toy, "Seeds", with_one_bad_seed)
        output, _ = toy(out_dir=tmp_path / "out", **SMALL, study="points", heads="euclidean", batch_size=0, plots=False)
    assert "euclidean n=2, seed 0: the loss is not finite at epoch 0" in output and "seed 1" not in output
    folder = tmp_path / "out" / "points_euclidean_standard_n2"
    assert "not finite at epoch 0" in (folder / "s0" / "error.txt").read_text()
    assert json.loads((folder / "s1" / "summary.json").read_text())["epoch"] == 4
    assert len(rows_of(folder / "s0")) == 0 and len(rows_of(folder / "s1")) == 3


def test_a_seed_whose_scores_are_not_finite_ends_though_its_loss_is(tmp_path):
    def with_one_far_class(z):
        found = spread(z)
        if len(found) == 2:
            found[0] = np.inf
        return found
    spread = model_toy.spread
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_toy, "spread", with_one_far_class)
        output, _ = toy(out_dir=tmp_path / "out", **SMALL, study="points", heads="euclidean", batch_size=0, plots=False)
    assert "euclidean n=2, seed 0: the scores are not finite at epoch 0" in output and "seed 1" not in output
