"""
Metric learning: each loss against a float64 loop over its formula or the library's own, distances.py's distances as the
library's, the diagnostics against hand cases, retrieval against scikit-learn's neighbours, and train_metric.py from the
outside.

$ pytest tests/test_metric.py
"""
import csv
import itertools
import json
import math
import os
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, flags, load, refused, run_script

import figures
import results
import study
from data_vision import digits
from distances import DISTANCES

pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import distances as library_distances  # noqa: E402
from pytorch_metric_learning import losses as library_losses  # noqa: E402

import data_metric  # noqa: E402
import figures_metric  # noqa: E402
import model_metric  # noqa: E402
from model_metric import EmbeddingNet, HeadDistance, InfoNCE, MetricConfig, make_loss  # noqa: E402

SETTINGS = dict(out_dir="out", track_emissions=False, device="cpu", dtype="float32", held_out=5, batch_size=80,
                learning_rate=1e-3, epochs=2)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*args, **settings):
    return run_script("train_metric.py", *args, *flags(**{**SETTINGS, **settings}))


def rows(out_dir, kind):
    with open(os.path.join(out_dir, "metrics.jsonl")) as f:
        found = [row for row in map(json.loads, f) if row["kind"] == kind]
    return [{key: x for key, x in row.items() if key not in ("ms", "seconds")} for row in found]


def summary(out_dir):
    with open(os.path.join(out_dir, "summary.json")) as f:
        return {key: x for key, x in json.load(f).items() if key != "seconds_per_epoch"}


def embedded(N=14, D=6, K=3, seed=0):
    """Unit vectors e (N, D) in float32 and labels y (N,) of K classes."""
    rng = np.random.default_rng(seed)
    e = F.normalize(torch.from_numpy(rng.normal(size=(N, D)))).float()
    return e, torch.from_numpy(np.arange(N) % K)

# -----------------------------------------------------------------------------
# losses, by loops over their formulas in float64


def pairs_of(y):
    N = len(y)
    positive = [(i, j) for i in range(N) for j in range(N) if i != j and y[i] == y[j]]
    return positive, [(i, j) for i in range(N) for j in range(N) if y[i] != y[j]]


def mean_of_positive(values):
    values = [x for x in values if x > 0]
    return sum(values) / len(values)


def contrastive(e, y, c, weights):
    positive, negative = pairs_of(y)
    d = np.linalg.norm(e[:, None] - e[None], axis=2)
    pull = mean_of_positive(max(d[i, j] - c.pos_margin, 0) for i, j in positive)
    return pull + mean_of_positive(max(c.neg_margin - d[i, j], 0) for i, j in negative)


def triplet(e, y, c, weights):
    d = np.linalg.norm(e[:, None] - e[None], axis=2)
    positive, negative = pairs_of(y)
    return mean_of_positive(d[a, p] - d[a, n] + c.triplet_margin
                            for a, p in positive for b, n in negative if a == b)


def npair(e, y, c, weights):
    firsts = [np.flatnonzero(y == k)[:2] for k in np.unique(y)]
    total = 0
    for a, p in firsts:
        z = [e[a] @ e[other] for _, other in firsts]
        total += math.log(sum(map(math.exp, z))) - e[a] @ e[p]
    return total / len(firsts)


def infonce(e, y, c, weights):
    positive, negative = pairs_of(y)
    total = 0
    for a, p in positive:
        own = math.exp(e[a] @ e[p] / c.infonce_temperature)
        others = sum(math.exp(e[a] @ e[n] / c.infonce_temperature) for b, n in negative if a == b)
        total -= math.log(own / (own + others))
    return total / len(positive)


def scl(e, y, c, weights):
    values = []
    for i in range(len(e)):
        z = e @ e[i] / c.scl_temperature
        others = [j for j in range(len(e)) if j != i]
        all_of_them = math.log(sum(math.exp(z[j]) for j in others))
        values.append(np.mean([all_of_them - z[j] for j in others if y[j] == y[i]]))
    return mean_of_positive(values)


def arcface(e, y, c, weights):
    w = weights["W"].T / np.linalg.norm(weights["W"].T, axis=1, keepdims=True)
    total = 0
    for x, k in zip(e, y):
        z = w @ x
        angle, margin = math.acos(z[k]), math.radians(c.arcface_margin)
        z[k] = math.cos(angle + margin) if angle <= math.pi - margin else z[k] - margin * math.sin(margin)
        z = c.arcface_scale * z
        total += math.log(np.exp(z).sum()) - z[k]
    return total / len(e)


def ccl(e, y, c, weights):
    w = weights["centers"] / np.linalg.norm(weights["centers"], axis=1, keepdims=True)
    total = 0
    for x, k in zip(e, y):
        own = math.exp(c.ccl_scale * (w[k] @ x - c.ccl_margin))
        others = sum(math.exp(c.ccl_scale * (w[j] @ x)) for j in range(len(w)) if j != k)
        total += -math.log(own / (own + others)) + c.ccl_weight * ((x - w[k]) ** 2).sum()
    return total / len(e)


LOOPS = dict(contrastive=contrastive, triplet=triplet, npair=npair, infonce=infonce, scl=scl, arcface=arcface, ccl=ccl)
OTHER = dict(pos_margin=0.2, neg_margin=1.3, triplet_margin=0.3, infonce_temperature=0.3, scl_temperature=0.5,
             arcface_margin=40.0, arcface_scale=8.0, ccl_margin=0.1, ccl_scale=5.0, ccl_weight=0.3)


def test_there_is_a_loop_for_every_loss():
    assert set(LOOPS) == set(model_metric.LOSSES)


@pytest.mark.parametrize("settings", [{}, OTHER], ids=["defaults", "others"])
@pytest.mark.parametrize("name", LOOPS)
def test_each_loss_is_its_formula(name, settings):
    torch.manual_seed(0)
    e, y = embedded()
    c = MetricConfig("mlp", (1, 8, 8), num_classes=3, embedding_size=6, loss=name, **settings)
    found = make_loss(c)
    weights = {key: p.detach().double().numpy() for key, p in found.criterion.named_parameters()}
    expected = LOOPS[name](e.double().numpy(), y.numpy(), c, weights)
    assert found.loss(e, y).item() == pytest.approx(expected, rel=2e-5)


def test_infonce_is_the_library_s_in_value_and_gradient():
    for distance in (library_distances.CosineSimilarity(), library_distances.LpDistance()):
        gradients, values = [], []
        for kind in (InfoNCE, library_losses.NTXentLoss):
            e, y = embedded(30, 8, 4)
            e.requires_grad_()
            value = kind(temperature=0.2, distance=distance)(e, y)
            value.backward()
            values.append(value.item())
            gradients.append(e.grad)
        assert values[0] == pytest.approx(values[1], rel=1e-5)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    e, _ = embedded()
    assert InfoNCE()(e.requires_grad_(), torch.arange(14)) == 0 # no positive pair


def test_every_head_is_a_loss_on_embeddings():
    net = EmbeddingNet(MetricConfig("mlp", (1, 8, 8), 3, loss="head", distance="euclidean", n=2.0, feature_scale=3.0))
    x, y = torch.randn(9, 1, 8, 8), torch.arange(9) % 3
    d = torch.cdist(3 * net.features(x), net.head.weight).double()
    assert net(x, y).item() == pytest.approx(F.cross_entropy(-2 * d.log(), y).item(), rel=1e-5)
    torch.testing.assert_close(net.features(x).norm(dim=1), torch.ones(9))


def test_every_loss_meets_the_same_net():
    nets = []
    for loss, distance in (("triplet", "baseline"), ("ccl", "baseline"), ("head", "mahalanobis")):
        torch.manual_seed(3)
        nets.append(EmbeddingNet(MetricConfig("mlp", (1, 8, 8), 3, loss=loss, distance=distance)).state_dict())
        assert_same({k: v for k, v in nets[-1].items() if not k.startswith("head.")},
                    {k: v for k, v in nets[0].items() if not k.startswith("head.")})

# -----------------------------------------------------------------------------
# distances.py's distances as the library's


@pytest.mark.parametrize("ours, theirs", [
    (HeadDistance("euclidean", eps=1e-7), library_distances.LpDistance()),
    (HeadDistance("manhattan", eps=1e-7, normalize_embeddings=False),
     library_distances.LpDistance(p=1, normalize_embeddings=False)),
    (HeadDistance("minkowski", eps=1e-7, p=3.0, normalize_embeddings=False),
     library_distances.LpDistance(p=3, normalize_embeddings=False))], ids=["l2", "l1", "l3"])
def test_the_adapter_is_the_library_s_lp_distance(ours, theirs):
    a, b = torch.randn(7, 5), torch.randn(9, 5)
    torch.testing.assert_close(ours(a, b), theirs(a, b), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.pairwise_distance(a, b[:7]), theirs.pairwise_distance(a, b[:7]), rtol=1e-4,
                               atol=1e-4)
    assert not ours.is_inverted


def test_the_adapter_is_one_minus_the_library_s_cosine():
    a, b = torch.randn(7, 5), torch.randn(9, 5)
    similar = library_distances.CosineSimilarity()(a, b)
    torch.testing.assert_close(HeadDistance("cosine", eps=1e-7)(a, b), 1 - similar, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("distance, variant", [(d, v) for d in DISTANCES for v in DISTANCES[d]])
def test_every_distance_serves_a_loss_of_the_library(distance, variant):
    e, y = embedded()
    e.requires_grad_()
    c = MetricConfig("mlp", (1, 8, 8), 3, embedding_size=6, loss="triplet", distance=distance, variant=variant)
    make_loss(c).loss(e, y).backward()
    assert e.grad.isfinite().all()

# -----------------------------------------------------------------------------
# diagnostics


def test_class_spacing_by_hand():
    triangle = np.array([[0, 0], [1, 0], [0.5, 3 ** 0.5 / 2]])
    h, y = np.concatenate([triangle + 0.1, triangle - 0.1]), np.array([0, 1, 2, 0, 1, 2])
    assert model_metric.class_spacing(h, y) == dict(mean=pytest.approx(1), cv=pytest.approx(0, abs=1e-12))
    line = model_metric.class_spacing(np.array([[0.], [1], [3]]), np.array([4, 7, 9])) # distances 1, 2, 3
    assert line == dict(mean=pytest.approx(2), cv=pytest.approx((2 / 3) ** 0.5 / 2))
    alone = model_metric.class_spacing(np.eye(3), np.zeros(3, int))
    assert math.isnan(alone["mean"]) and math.isnan(alone["cv"])
    same = model_metric.class_spacing(np.ones((4, 2)), np.array([0, 0, 1, 1]))
    assert same["mean"] == 0 and math.isnan(same["cv"])


def test_the_share_of_active_pairs_and_triplets_by_hand():
    e = torch.tensor([[1., 0], [0.8, 0.6], [0.6, 0.8], [0, 1]]) # distances 0.632, 0.894, 1.414, 0.283, 0.894, 0.632
    y = torch.tensor([0, 0, 1, 1])
    # all 4 positive pairs pull; of 8 negative ones, two of length 0.894 and one of 0.283 push, both ways
    assert active("contrastive", e, y) == (4 + 6) / 12
    # anchor 0: 0.632 - 0.894, 0.632 - 1.414; anchor 1: 0.632 - 0.283, 0.632 - 0.894; 2 and 3 by symmetry
    assert active("triplet", e, y) == 2 / 8 and active("triplet", e, y, triplet_margin=0.3) == 6 / 8
    assert active("triplet", e, torch.arange(4)) == 0 # no triplets


def active(loss, e, y, **settings):
    net = EmbeddingNet(MetricConfig("mlp", (1, 8, 8), 2, embedding_size=2, loss=loss, **settings))
    return model_metric.active_terms(net, e, y)


def test_gradient_norms_are_those_of_each_sample_s_own_loss():
    torch.manual_seed(0)
    e, y = embedded()
    for loss in ("head", "ccl"):
        net = EmbeddingNet(MetricConfig("mlp", (1, 8, 8), 3, embedding_size=6, loss=loss, distance="baseline"))
        expected = []
        for row, label in zip(e, y):
            row = row[None].clone().requires_grad_()
            net.loss(row, label[None]).backward()
            expected.append(row.grad.norm())
        torch.testing.assert_close(model_metric.gradient_norms(net, e, y), torch.stack(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sizes", [(20, 20, 20), (3, 30, 1, 9), (2, 2)])
def test_retrieval_by_scikit_learn_s_neighbours(sizes):
    neighbors = pytest.importorskip("sklearn.neighbors")
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(len(sizes)), sizes)
    e = rng.normal(size=(len(y), 5)) + 0.8 * np.eye(5)[y]
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    _, order = neighbors.NearestNeighbors().fit(e).kneighbors(n_neighbors=len(y) - 1)
    hits = y[order] == y[:, None] # (N, N - 1), without the query itself
    queries = [i for i in range(len(y)) if (y == y[i]).sum() > 1]
    hits, average = hits[queries], []
    expected = {f"recall_at_{k}": hits[:, :k].any(1).mean() for k in (1, 2, 4)}
    for i, row in zip(queries, hits):
        R = (y == y[i]).sum() - 1
        average.append(sum(row[:k + 1].mean() for k in range(R) if row[k]) / R)
    expected["map_at_r"] = np.mean(average)
    assert model_metric.retrieval(torch.from_numpy(e), torch.from_numpy(y)) == pytest.approx(expected, abs=1e-6)

# -----------------------------------------------------------------------------
# data


def test_classes_held_out_are_not_trained_on():
    x, y, test_x, test_y, _ = digits()
    images = data_metric.load_any("digits", "data", 0)
    for seed in range(3):
        parts = data_metric.parts(images, 4, 0.1, seed)
        others = sorted(set(range(10)) - set(parts.classes))
        assert len(parts.classes) == 6
        assert parts.other_train[1].unique().tolist() == parts.other_test[1].unique().tolist() == others
        assert sorted(parts.train[1].unique().tolist()) == list(range(6))
        for (part_x, part_y), whole in ((parts.test, (test_x, test_y)), (parts.train, (x, y)), (parts.val, (x, y))):
            known = {image.tobytes(): label for image, label in zip(*whole)}
            assert [parts.classes[k] for k in part_y] == [known[image.numpy().tobytes()] for image in part_x]
        assert len(parts.train[1]) + len(parts.val[1]) + len(parts.other_train[1]) == len(y)
        assert len(parts.test[1]) + len(parts.other_test[1]) == len(test_y)
    assert parts.classes != data_metric.parts(images, 4, 0.1, 0).classes
    assert data_metric.parts(images, 0, 0.1, 0).classes == list(range(10))


def test_batches_hold_as_many_images_of_each_class():
    y = torch.tensor([0] * 5 + [1] * 40 + [2] * 40 + [3] * 40)
    x = torch.arange(125, dtype=torch.uint8)[:, None, None, None].expand(125, 1, 2, 2)
    batches = data_metric.ClassBatches(x, y, 20, 3, seed=1)
    assert batches.batch_size == 18 and batches.steps_per_epoch == 6
    seen = set()
    for step in range(30):
        rows = batches.rows(step)
        counts = y[rows].bincount(minlength=4)
        assert sorted(counts.tolist()) == [0, 6, 6, 6]
        assert all(rows[y[rows] == k].unique().numel() == 6 for k in (1, 2, 3) if counts[k])
        seen |= set(y[rows].tolist())
    assert seen == {0, 1, 2, 3}
    again = data_metric.ClassBatches(x, y, 20, 3, seed=1)
    assert torch.equal(again.rows(29), rows) and not torch.equal(again.rows(28), rows)
    other = data_metric.ClassBatches(x, y, 20, 3, seed=2)
    assert not torch.equal(other.rows(29), rows)
    for bad in ((20, 5), (20, 1), (5, 3)):
        with pytest.raises(ValueError, match="two images of each"):
            data_metric.ClassBatches(x, y, *bad, seed=1)


def write_images(folder, counts, size=9):
    Image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for label, (name, count) in enumerate(counts.items()):
        os.makedirs(folder / name)
        for i in range(count):
            pixels = rng.integers(0, 40, (size, size + 2, 3)) + 40 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")


def test_a_folder_of_images(here):
    classes = {"ant": 10, "bee": 15, "cat": 10, "dog": 10}
    write_images(here / "data" / "pets", classes)
    images = data_metric.load_any("pets", "data", 8)
    assert images.train_x.shape == (36, 3, 8, 8) and images.train_y.bincount().tolist() == [8, 12, 8, 8]
    assert images.test_y.bincount().tolist() == [2, 3, 2, 2] and images.num_classes == 4
    assert (images.train_x.float().mean((1, 2, 3)) / 40).long().tolist() == images.train_y.tolist()
    # Tiny-ImageNet's: train and val, and a folder more below each class
    write_images(here / "data" / "tiny" / "train", {f"{name}/images": n for name, n in classes.items()})
    write_images(here / "data" / "tiny" / "val", {"bee": 2, "dog": 3})
    tiny = data_metric.load_any("tiny", "data", 8)
    assert tiny.train_y.bincount().tolist() == [10, 15, 10, 10] and tiny.test_y.bincount().tolist() == [0, 2, 0, 3]
    assert tiny.hash != images.hash == data_metric.load_any("pets", "data", 8).hash
    train(dataset="pets", image_size=8, batch_size=8, held_out=2, loss="triplet", val_fraction=0.25)
    assert 0 <= summary("out")["zero_shot_recall_at_1"] <= 1


def test_folders_that_are_none_are_refused(here):
    write_images(here / "data" / "pets", {"ant": 3, "bee": 3})
    (here / "data" / "pets" / "bee" / "x.jpg").write_bytes(b"no image")
    settings = dict(SETTINGS, held_out=0, script="train_metric.py")
    assert "set --image_size" in refused(dataset="pets", **settings)
    assert "x.jpg cannot be read as an image" in refused(dataset="pets", image_size=8, **settings)
    assert "there is no dataset 'cars', only digits, mnist" in refused(dataset="cars", **settings)
    write_images(here / "data" / "one", {"ant": 30})
    assert "has 1 classes" in refused(dataset="one", image_size=8, **settings)
    os.makedirs("data/empty")
    assert "data/empty holds no class folder" in refused(dataset="empty", image_size=8, **settings)

# -----------------------------------------------------------------------------
# runs


def test_a_run_learns_and_leaves_every_file():
    printed, _ = train(loss="scl", epochs=6)
    assert set(os.listdir("out")) == {"config.json", "metrics.jsonl", "ckpt.pt", "ckpt_before.pt", "probe.npz",
                                      "summary.json", "lock"}
    evals, end, info = rows("out", "eval"), summary("out"), json.load(open("out/config.json"))
    assert [row["epoch"] for row in evals] == list(range(7)) and [row["step"] for row in evals] == list(range(0, 49, 8))
    assert all(0 < row["intra_variance"] + row["inter_variance"] < 1 and 0 < row["active_ratio"] <= 1 for row in evals)
    assert evals[-1]["variance_ratio"] < 0.3 < 1 < evals[0]["variance_ratio"]
    assert end["recall_at_1"] == end["test_accuracy"] > 0.9 and end["map_at_r"] > 0.8
    assert end["recall_at_1"] <= end["recall_at_2"] <= end["recall_at_4"] <= 1
    assert 0.3 < end["zero_shot_recall_at_1"] <= 1 and 0.5 < end["probe_accuracy"] <= 1
    assert len(info["data"]["classes"]) == 5 == info["data"]["num_classes"]
    assert info["head"] == "scl, temperature 0.1" and info["script"] == "train_metric.py"
    assert "loss: scl, temperature 0.1" in printed and "16 of each class" in printed
    net = EmbeddingNet(MetricConfig(**load("out")["model_args"]))
    net.load_state_dict(load("out")["model"])
    parts = data_metric.parts(data_metric.load_any("digits", "data", 0), 5, 0.1, 1337)
    with torch.no_grad():
        e = net.eval().features((parts.test[0].float() / 255 - 0.5) / 0.5)
    assert model_metric.retrieval(e, parts.test[1])["map_at_r"] == pytest.approx(end["map_at_r"], rel=1e-6)


@pytest.mark.parametrize("settings", [
    dict(loss="ccl", augment="crop", weight_decay=0.1), dict(loss="head", distance="cosine", learn_n=True),
    dict(loss="triplet", distance="manhattan", classes_per_batch=3, dtype="float16")],
    ids=lambda settings: settings["loss"])
def test_a_resumed_run_is_the_same_to_the_last_bit(settings):
    train(out_dir="whole", epochs=3, **settings)
    train(out_dir="half", epochs=1, **settings)
    run_script("train_metric.py", "--init_from=resume", "--out_dir=half", "--epochs=3")
    a, b = load("whole"), load("half")
    for key in a.keys() - {"config"}:
        assert_same(a[key], b[key], key)
    for kind in ("eval", "train"):
        assert rows("whole", kind) == rows("half", kind)
    assert summary("whole") == summary("half")
    before = open("half/summary.json").read()
    assert "nothing to do" in run_script("train_metric.py", "--init_from=resume", "--out_dir=half")[0]
    assert open("half/summary.json").read() == before


def test_a_frozen_backbone_stays_as_it_is(here):
    transformers = pytest.importorskip("transformers")
    run_script("train_vision.py", *flags(out_dir="trained", epochs=1, track_emissions=False, plots=False, device="cpu"))
    train(frozen="trained", loss="arcface", epochs=1)
    trained, found = load("trained", "best.pt")["model"], load("out")["model"]
    for name, p in trained.items():
        if name.startswith("backbone."):
            assert torch.equal(found[name.replace("backbone.", "backbone.net.")], p)
    config = transformers.ViTConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                    image_size=8, patch_size=4, num_channels=3)
    vit = transformers.ViTModel(config, add_pooling_layer=False)
    vit.save_pretrained("vit")
    train(out_dir="on_vit", frozen="./vit", loss="scl", epochs=1, channels=3)
    found = load("on_vit")["model"]
    assert all(torch.equal(found[f"backbone.net.{name}"], p) for name, p in vit.state_dict().items())
    x = torch.randn(2, 3, 8, 8)
    net = EmbeddingNet(MetricConfig(**load("on_vit")["model_args"]))
    torch.testing.assert_close(net.train().backbone(x), vit.eval()(x).last_hidden_state[:, 0])
    settings = dict(SETTINGS, script="train_metric.py", out_dir="other")
    assert "use --image_size=8 --channels=3" in refused(frozen="./vit", **settings)
    assert "frozen is 'nowhere': no folder of a run" in refused(frozen="nowhere", **settings)


@pytest.mark.parametrize("settings, message", [
    (dict(loss="tripled"), "loss is 'tripled': use contrastive, triplet"),
    (dict(loss="arcface", distance="manhattan"), "arcface is made of cosines and takes no other distance"),
    (dict(loss="triplet", distance="cosin"), "unknown distance 'cosin', did you mean 'cosine'?"),
    (dict(held_out=9), "held_out is 9: of 10 classes 0, or 2 to 8"), (dict(held_out=1), "held_out is 1"),
    (dict(batch_size=9), "two images of each at least"), (dict(classes_per_batch=6), "a batch takes 2 to 5 classes"),
    (dict(scl_temperature=0), "scl_temperature is 0.0, it must be > 0"),
    (dict(embedding_size=0), "embedding_size is 0"), (dict(triplet_margin=-1), "triplet_margin is -1"),
    (dict(active_fraction=1), "active_fraction is 1.0"),
    (dict(normalize="cifar10"), "normalize is 'cifar10', of 3 channels"), (dict(val_fraction=1e-4), "leaves class"),
    (dict(val_fraction=0.007), "no two validation images are of one class, nothing can be retrieved: there are")])
def test_refused(settings, message):
    found = refused(script="train_metric.py", **{**SETTINGS, **settings})
    assert message in found and "1 to fix" in found and not os.path.exists("out")


def test_another_run_is_not_resumed():
    train(epochs=1)
    for settings, message in ((dict(held_out=4), "held_out is 4 here, 5 in the checkpoint"),
                              (dict(loss="triplet"), "loss is 'triplet' here, 'contrastive'")):
        assert message in refused(script="train_metric.py", init_from="resume", out_dir="out", epochs=2, **settings)


def test_a_loss_that_is_not_finite_stops_the_run():
    train(epochs=1)
    message = refused(script="train_metric.py", init_from="resume", out_dir="out", epochs=3, learning_rate=1e38)
    assert "not finite" in message and "last good checkpoint: out/ckpt.pt" in message and "Traceback" not in message


def test_without_its_library_it_says_what_to_install(monkeypatch):
    for name in ("pytorch_metric_learning", "model_metric"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "model_metric")
    assert "pip install pytorch-metric-learning" in refused(script="train_metric.py", **SETTINGS)

# -----------------------------------------------------------------------------
# studies, reports, figures


def test_a_study_of_losses_and_heads(monkeypatch):
    monkeypatch.setattr(study, "script", "train_metric.py")
    monkeypatch.setattr(study, "heads", "triplet,baseline,cosine")
    monkeypatch.setattr(study, "seeds", "1,2")
    assert study.grid() == [(f"{name}_s{seed}", list_of) for seed in (1, 2) for name, list_of in (
        ("triplet", ["--loss=triplet", f"--seed={seed}"]),
        ("baseline", ["--distance=baseline", "--link=harmonic", f"--seed={seed}", "--loss=head"]),
        ("cosine_stable", ["--distance=cosine", "--link=harmonic", f"--seed={seed}", "--loss=head"]))]
    monkeypatch.setattr(study, "heads", "all")
    names = [name for name, _ in study.grid()]
    assert {"contrastive_s1", "scl_s2", "mahalanobis_covariance_s1"} <= set(names) and len(set(names)) == len(names)
    monkeypatch.setattr(study, "script", "train_vision.py")
    monkeypatch.setattr(study, "heads", "triplet")
    with pytest.raises(ValueError, match="unknown distance 'triplet'"):
        study.grid()


def test_the_report_and_the_figure_of_a_study(monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    heads = {"contrastive": {}, "triplet": {}, "scl": dict(distance="manhattan"), "npair": {},
             "head": dict(distance="euclidean"), "baseline": {}}
    for (loss, settings), seed in itertools.product(heads.items(), (1, 2)):
        name = "head" if loss == "baseline" else loss
        train(out_dir=f"out/{loss}_{seed}", loss=name, seed=seed, epochs=1, **settings)
    run_script("report.py", "out", "--out_dir=report")
    page = open("report/index.md").read()
    for part in ("Retrieval", "recall@1, classes held out", "triplet", "scl manhattan standard", "baseline"):
        assert f"| {part}" in page or f"### {part}" in page, part
    section, = results.make_sections(results.group([results.measure(r) for r in results.read_runs(["out"])[0]]))
    assert section.labels[section.baseline] == "baseline" and len(section.heads) == 6

    figures_metric.main(["out"])
    capsys.readouterr()
    table = open("out/table.csv").read().splitlines()
    assert [line.split(",")[0] for line in table[1:]] == ["contrastive", "triplet", "npair", "baseline", "euclidean",
                                                          "scl manhattan standard"]
    tests = open("out/tests.csv").read()
    assert "higher within-class variance,test_intra_variance,triplet,contrastive,2," in tests
    values = [[summary(f"out/{loss}_{seed}")["test_intra_variance"] for loss in ("triplet", "contrastive")]
              for seed in (1, 2)]
    mean = np.mean([a - b for a, b in values])
    assert f"test_intra_variance,triplet,contrastive,2,{mean:.4g}," in tests
    course = open("out/course.csv").read().splitlines()
    assert len(course) == 1 + 6 * 2 and course[0].startswith("loss,epoch,seeds,val_loss_mean,val_loss_std,loss_decay")
    assert open("out/variance.png", "rb").read(4) == b"\x89PNG"
    with pytest.raises(figures.Damaged, match="figures_metric.py draws"):
        figures.draw("out/triplet_1")
    train(out_dir="out/again", loss="npair", seed=2, epochs=0)
    with pytest.raises(ValueError, match="out/again and out/npair_2 are runs of one loss and seed"):
        figures_metric.main(["out"])
    with pytest.raises(ValueError, match="holds no run of train_metric.py"):
        figures_metric.main(["report"])


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_the_table_of_an_untrained_net_has_its_retrieval_and_no_course(capsys):
    pytest.importorskip("matplotlib")
    train(out_dir="out/npair_1", loss="npair", seed=1, epochs=0)
    figures_metric.main(["out"])
    with open("out/table.csv") as f:
        row, = csv.DictReader(f)
    assert float(row["recall_at_1_mean"]) == pytest.approx(summary("out/npair_1")["recall_at_1"], rel=1e-4)
    assert [row[f"{key}_mean"] for key in ("active", "gradient", "early_ratio", "compact_epochs")] == [""] * 4
    assert not os.path.exists("out/tests.csv") # there is nothing to compare
