"""probing.py: the geometry of classes against loops over scipy's distances, and the layers of a model by hand."""
import math

import numpy as np
import pytest
import torch
from scipy.spatial import distance as scipy_distance
from sklearn.neighbors import NearestCentroid

import metrics
import probing
from distances import DISTANCES, DistanceHead


def classes(seed=0, N=60, K=5, D=6):
    """Features h (N, D) of classes y (N,) that overlap; the last class has one sample."""
    rng = np.random.RandomState(seed)
    y = np.arange(N) % (K - 1)
    y[-1] = K - 1
    centres = rng.randn(K, D)
    h = (centres[y] + 0.9 * rng.randn(N, D)) * rng.uniform(0.5, 2, (N, 1))
    return torch.tensor(h).float(), torch.tensor(y)


def head_of(distance, variant=None, D=6, V=9):
    torch.manual_seed(1)
    head = DistanceHead(D, V, distance, variant, eps=0.0)
    for p in head.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return head.eval()


def distance_of(head):
    """d(h, w, the class of w) in float64, by scipy."""
    if head.distance == "mahalanobis":
        A = head.A.detach().double().numpy()
        P = A.T @ A + 1e-2 * np.eye(len(A))
        return lambda h, w, k: scipy_distance.mahalanobis(h, w, P)
    if head.distance == "offset_l2":
        alpha = head.alpha.detach().double().numpy()
        return lambda h, w, k: math.sqrt((alpha[k] ** 2 * (h - w) ** 2).sum())
    of_scipy = dict(baseline="euclidean", manhattan="cityblock").get(head.distance, head.distance)
    return lambda h, w, k: getattr(scipy_distance, of_scipy)(h, w)


@pytest.mark.parametrize("distance", ["baseline", "euclidean", "cosine", "manhattan", "chebyshev", "canberra",
                                      "mahalanobis", "offset_l2"])
def test_geometry_in_the_heads_own_distance(distance):
    head, (h, y) = head_of(distance), classes()
    found, d = probing.own_geometry(head, h, y), distance_of(head)
    x, y, w = h.double().numpy(), y.numpy(), head.weight.detach().double().numpy()
    if distance == "cosine":
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    keep = y < 4 # the fifth class has one sample
    x, y = x[keep], y[keep]
    correct, spreads = 0, [[] for _ in range(4)]
    for i in range(len(x)):
        others = np.arange(len(x)) != i
        own = d(x[i], x[others & (y == y[i])].mean(0), y[i])
        spreads[y[i]].append(own)
        correct += own < min(d(x[i], x[y == k].mean(0), k) for k in range(4) if k != y[i])
    assert found["mean_accuracy"] == correct / len(x) and 0.4 < found["mean_accuracy"] < 1
    if distance == "baseline":
        assert math.isnan(found["prototype_offset"])
    else:
        offsets = [d(x[y == k].mean(0), w[k], k) / np.mean(spreads[k]) for k in range(4)]
        assert found["prototype_offset"] == pytest.approx(np.mean(offsets), rel=1e-4)
    if distance == "mahalanobis":
        A = head.A.detach().double().numpy()
        x = x @ np.linalg.cholesky(A.T @ A + 1e-2 * np.eye(6))
    expected = metrics.class_variance(x, y)["ratio"]
    assert found["own_variance_ratio"] == pytest.approx(expected, rel=1e-4)
    euclidean = probing.probe(head, h, classes()[1])["variance_ratio"]
    assert (euclidean == pytest.approx(expected, rel=1e-4)) == (distance not in ("cosine", "mahalanobis"))


def test_the_nearest_class_mean_is_that_of_scikit_learn():
    """A sample more or less in a mean of fifteen changes few answers: sklearn's keeps it in."""
    h, y = classes(N=61)
    found = probing.own_geometry(head_of("euclidean"), h, y)["mean_accuracy"]
    h, y = h[:-1], y[:-1]
    expected, without = NearestCentroid().fit(h, y).score(h, y), 0
    for i in range(60):
        rest = torch.arange(60) != i
        without += NearestCentroid().fit(h[rest], y[rest]).predict(h[i:i + 1])[0] == y[i].item()
    assert found == without / 60 <= expected


def test_geometry_of_every_head_is_finite_and_leaves_it_alone():
    h, y = classes()
    h = h / h.abs().max()
    for distance, variants in {"baseline": {None: 0}, **DISTANCES}.items():
        for variant in variants:
            head = DistanceHead(6, 5, distance, variant).train()
            before = {name: x.clone() for name, x in head.state_dict().items()}
            found = probing.probe(head, h, y)
            assert 0 <= found["mean_accuracy"] <= 1 and found["own_variance_ratio"] > 0, (distance, variant)
            assert (found["prototype_offset"] is None) == (distance == "baseline")
            assert head.training and all(torch.equal(x, before[name]) for name, x in head.state_dict().items())
    large = probing.probe(DistanceHead(6, 5, "chebyshev", "cosh"), 7.5 * h, y) # 2 |h| is beyond its exponentials
    assert large["mean_accuracy"] > 0


def test_without_two_classes_of_two_samples_there_is_no_geometry():
    head, h = head_of("euclidean"), torch.randn(4, 6)
    for y in ([0, 1, 2, 3], [0, 0, 1, 2], [2, 2, 2, 2]):
        found = probing.probe(head, h, torch.tensor(y))
        assert all(found[key] is None for key in ("mean_accuracy", "prototype_offset", "own_variance_ratio"))


def test_layers_by_hand():
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList([torch.nn.Linear(3, 3) for _ in range(2)])
    batches = [torch.randn(4, 5, 3) for _ in range(3)]
    at = torch.tensor([[-1], [-1], [2], [0]]) # a position in each sequence

    def passes():
        for i, x in enumerate(batches):
            for block in blocks:
                x = block(x)
            yield 2 - i, at # sorted, they come in the other order
    with torch.no_grad():
        found = probing.of_layers(blocks, passes())
        x = torch.cat(batches)
        for i, block in enumerate(blocks):
            x = block(x)
            s = metrics.spectrum(x[torch.arange(12), at.flatten().repeat(3)].numpy())
            assert found["layer_pc2_ev"][i] == pytest.approx((s[:2] ** 2).sum() / (s ** 2).sum(), rel=1e-5)
    assert all(1 <= k <= 3 for k in found["layer_pca90"]) and not blocks[0]._forward_hooks
    same = probing.of_layers(blocks[:1], iter([(0, at)] for _ in ()))
    assert same == dict(layer_pc2_ev=[], layer_pca90=[])
