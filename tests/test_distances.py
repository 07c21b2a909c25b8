"""
The distances, their heads and their losses are compared with independent oracles: scipy, float64 loops over the
formulas, gradcheck, and F.cross_entropy.

$ pytest tests/test_distances.py
"""
import copy
import math
import os
import runpy
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cdist

import distances
from bench import peak_bytes
from distances import (
    DISTANCES,
    LINKS,
    Distance,
    DistanceHead,
    HarmonicLoss,
    Tiles,
    pairwise,
    parse_head,
    within_class_scatter,
)
from model import GPTConfig, lm_head

pytestmark = pytest.mark.usefixtures("large")
ALL = [(distance, variant) for distance, variants in DISTANCES.items() for variant in variants]
every_distance = pytest.mark.parametrize("distance, variant", ALL)
every_head = pytest.mark.parametrize("distance, variant", [("baseline", None), *ALL])
PRODUCTS = ("euclidean", "minkowski", "mahalanobis", "cosine", "offset_l2") # from matrix products
every_link = pytest.mark.parametrize("link", LINKS)


def rand(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(distance, variant, D=6, V=9, dtype=torch.float64, seed=0, **kwargs):
    """Make a head whose tensors are all random, so that no parameter hides behind its initial value."""
    head = DistanceHead(D, V, distance, variant, **{"n": 3.0, **kwargs}).to(dtype).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, D, generator=g))
        for name in head.spec.tensors:
            tensor = getattr(head, name)
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=g))
        for name in head.spec.buffers:
            x = torch.randn(3 * D, D, generator=g)
            x = x.T @ x / len(x)
            # a machine's matrix product need not be symmetric to the last bit, so that we make it so
            getattr(head, name).copy_((x + x.T) / 2)
    return head


# -----------------------------------------------------------------------------
# values


def positive(*shape, seed):
    return rand(*shape, seed=seed).abs()


def probabilities(*shape, seed):
    return positive(*shape, seed=seed).softmax(-1)


EYE = torch.eye(6, dtype=torch.float64)
ROOT = rand(6, 6, seed=5)
SPD = ROOT.T @ ROOT + 0.1 * EYE # symmetric and positive definite
LOWER = torch.linalg.cholesky(SPD)
LOG_CHOLESKY = LOWER.tril(-1) + LOWER.diagonal().log().diag() # the head stores the logarithm of the diagonal
MEAN_VARIANCE = SPD.diagonal().mean()
# Each entry holds our arguments, the name and the arguments of scipy's metric, and data on which the two definitions
# agree.
SCIPY = {
    "euclidean": (dict(distance="euclidean"), "euclidean", {}, rand),
    "manhattan": (dict(distance="manhattan"), "cityblock", {}, rand),
    "chebyshev": (dict(distance="chebyshev"), "chebyshev", {}, rand),
    "minkowski 1.0": (dict(distance="minkowski", p=1.0), "minkowski", dict(p=1.0), rand),
    "minkowski 1.5": (dict(distance="minkowski", p=1.5), "minkowski", dict(p=1.5), rand),
    "minkowski 2.0": (dict(distance="minkowski", p=2.0), "minkowski", dict(p=2.0), rand),
    "minkowski 3.0": (dict(distance="minkowski", p=3.0), "minkowski", dict(p=3.0), rand),
    "minkowski 7.0": (dict(distance="minkowski", p=7.0), "minkowski", dict(p=7.0), rand),
    "cosine": (dict(distance="cosine"), "cosine", {}, rand),
    "cosine unstable": (dict(distance="cosine", variant="unstable"), "cosine", {}, rand),
    "canberra": (dict(distance="canberra"), "canberra", {}, rand),
    # Scipy divides by sum |h + w|, as the variant signed does. The other variants differ from it and from each other,
    # unless all coordinates are positive.
    "bray_curtis signed": (dict(distance="bray_curtis", variant="signed"), "braycurtis", {}, rand),
    "bray_curtis": (dict(distance="bray_curtis"), "braycurtis", {}, positive),
    "bray_curtis abs": (dict(distance="bray_curtis", variant="abs"), "braycurtis", {}, positive),
    "bray_curtis normalized": (dict(distance="bray_curtis", variant="normalized"), "braycurtis", {}, probabilities),
    "mahalanobis": (
        dict(distance="mahalanobis", A=LOWER.T, reg_lambda=1e-2),
        "mahalanobis", dict(VI=SPD + 1e-2 * EYE), rand,
    ),
    "mahalanobis diagonal": (
        dict(distance="mahalanobis", variant="diagonal", theta=SPD.diagonal().log(), reg_lambda=0.5),
        "mahalanobis", dict(VI=SPD.diagonal().diag() + 0.5 * EYE), rand,
    ),
    "mahalanobis cholesky": (
        dict(distance="mahalanobis", variant="cholesky", L=LOG_CHOLESKY, reg_lambda=0.5),
        "mahalanobis", dict(VI=SPD + 0.5 * EYE), rand,
    ),
    "mahalanobis covariance": (
        dict(distance="mahalanobis", variant="covariance", covariance=SPD, shrinkage=0.2, reg_lambda=0.3),
        "mahalanobis", dict(VI=(0.8 * SPD + (0.2 + 0.3) * MEAN_VARIANCE * EYE).inverse()), rand,
    ),
}


@pytest.mark.parametrize("name", SCIPY)
def test_equals_scipy(name):
    ours, metric, kwargs, data = SCIPY[name]
    h, w = data(40, 6, seed=1), data(30, 6, seed=2)
    h[7] = w[3] * (1 + 1e-6) # a close pair
    if name == "bray_curtis normalized":
        h = h / h.sum(-1, keepdim=True)
    d = pairwise(h, w, eps=0.0, **ours).numpy()
    arrays = {key: np.asarray(value) for key, value in kwargs.items()}
    oracle = cdist(h.numpy(), w.numpy(), metric, **arrays)
    if metric == "cosine": # scipy's 1 - h.w/(|h||w|) cancels there, ours does not
        d[7, 3] = oracle[7, 3] = 0
    np.testing.assert_allclose(d, oracle, rtol=1e-9, atol=0)


def test_hamming_of_bits_equals_scipy():
    h, w = rand(40, 16, seed=1), rand(30, 16, seed=2)
    for threshold in (0.0, 0.5):
        d = pairwise(h, w, "hamming", "hard", eps=0.0, threshold=threshold)
        oracle = cdist(h.numpy() > threshold, w.numpy() > threshold, "hamming")
        np.testing.assert_allclose(d, oracle, rtol=1e-9)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def canberra_robust(h, w, eps, o):
    total = 0.0
    for a, b in zip(h, w):
        total += abs(a - b) / max(abs(a) + abs(b) + eps, 1e-2)
    return total + eps


def canberra_weighted(h, w, eps, o):
    q = abs(h) + abs(w) + eps
    weights = q ** 0.5 / sum(q ** 0.5)
    return sum(weights * abs(h - w) / q) + eps


def bray_curtis_normalized(h, w, eps, o):
    u = (abs(h) + eps) / sum(abs(h) + eps)
    v = (abs(w) + eps) / sum(abs(w) + eps)
    return sum(abs(u - v)) / (sum(u + v) + eps) + eps


def mahalanobis(h, w, eps, P):
    return math.sqrt((h - w) @ P @ (h - w) + eps ** 2)


def mahalanobis_standard(h, w, eps, o):
    return mahalanobis(h, w, eps, o["A"].T @ o["A"] + 0.01 * np.eye(len(h)))


def mahalanobis_diagonal(h, w, eps, o):
    return mahalanobis(h, w, eps, np.diag(np.exp(o["theta"])) + 0.01 * np.eye(len(h)))


def mahalanobis_cholesky(h, w, eps, o):
    L = np.tril(o["L"], -1) + np.diag(np.exp(np.diag(o["L"])))
    return mahalanobis(h, w, eps, L @ L.T + 0.01 * np.eye(len(h)))


def mahalanobis_covariance(h, w, eps, o):
    covariance = o["covariance"]
    mean_variance = np.trace(covariance) / len(h)
    # the shrinkage is 0.1 and reg_lambda is 0.01, both relative to the mean variance
    return mahalanobis(h, w, eps, np.linalg.inv(0.9 * covariance + 0.11 * mean_variance * np.eye(len(h))))


# Each formula takes one pair of vectors, eps, and the head's further tensors by name.
NAIVE = {
    ("euclidean", "standard"): lambda h, w, eps, o: math.sqrt(sum((h - w) ** 2) + eps ** 2),
    ("manhattan", "standard"): lambda h, w, eps, o: sum(abs(h - w)) + eps,
    ("chebyshev", "standard"): lambda h, w, eps, o: max(abs(h - w)) + eps,
    ("chebyshev", "smooth"): lambda h, w, eps, o: math.log(sum(np.exp(10 * abs(h - w)))) / 10 + eps,
    ("chebyshev", "cosh"): lambda h, w, eps, o: math.log(sum(2 * np.cosh(10 * (h - w)))) / 10 + eps,
    ("minkowski", "standard"): lambda h, w, eps, o: sum(abs(h - w) ** 1.5) ** (1 / 1.5) + eps,
    ("cosine", "stable"): lambda h, w, eps, o: 1 - h @ w / math.sqrt(h @ h) / math.sqrt(w @ w) + eps,
    ("cosine", "unstable"): lambda h, w, eps, o: 1 - h @ w / (math.sqrt(h @ h) * math.sqrt(w @ w) + eps) + eps,
    ("hamming", "soft"): lambda h, w, eps, o: np.mean(abs(sigmoid(h) - sigmoid(w))) + eps,
    # outside training there is no noise
    ("hamming", "gumbel"): lambda h, w, eps, o: np.mean(abs(sigmoid(h / 0.5) - sigmoid(w / 0.5))) + eps,
    ("hamming", "hard"): lambda h, w, eps, o: np.mean((h > 0) != (w > 0)) + eps,
    ("canberra", "standard"): lambda h, w, eps, o: sum(abs(h - w) / (abs(h) + abs(w) + eps)) + eps,
    ("canberra", "robust"): canberra_robust,
    ("canberra", "weighted"): canberra_weighted,
    ("bray_curtis", "standard"): lambda h, w, eps, o: sum(abs(h - w)) / (abs(sum(h + w)) + eps) + eps,
    ("bray_curtis", "abs"): lambda h, w, eps, o: sum(abs(h - w)) / (sum(abs(h) + abs(w)) + eps) + eps,
    ("bray_curtis", "normalized"): bray_curtis_normalized,
    ("bray_curtis", "signed"): lambda h, w, eps, o: sum(abs(h - w)) / (sum(abs(h + w)) + eps) + eps,
    ("mahalanobis", "standard"): mahalanobis_standard,
    ("mahalanobis", "diagonal"): mahalanobis_diagonal,
    ("mahalanobis", "cholesky"): mahalanobis_cholesky,
    ("mahalanobis", "covariance"): mahalanobis_covariance,
    ("offset_l2", "standard"): lambda h, w, eps, o: math.sqrt(sum(o["alpha_k"] ** 2 * (h - w) ** 2) + eps ** 2),
}


@every_distance
def test_equals_a_loop_over_its_formula(distance, variant):
    h = rand(12, 6, seed=3)
    formula = NAIVE[distance, variant]
    for eps in (1e-4, 0.05):
        head = make(distance, variant, eps=eps)
        tensors = {}
        for name in [*head.spec.tensors, *head.spec.buffers]:
            tensors[name] = getattr(head, name).detach().numpy()
        oracle = np.empty((12, 9))
        for k, w in enumerate(head.weight.detach().numpy()):
            if "alpha" in tensors:
                tensors["alpha_k"] = tensors["alpha"][k] # each class has its own scales
            for i, x in enumerate(h.numpy()):
                oracle[i, k] = formula(x, w, eps, tensors)
        np.testing.assert_allclose(head.distances(h).detach(), oracle, rtol=1e-9)
        # the scores of the two links, in nats
        np.testing.assert_allclose(head(h).detach(), -3.0 * np.log(oracle), rtol=1e-9, atol=1e-12)
        head.link = "softmin"
        np.testing.assert_allclose(head(h).detach(), -3.0 * oracle, rtol=1e-9)


def test_gumbel_is_a_binary_concrete_sample_while_training():
    h, w = rand(4, 5), rand(3, 5, seed=1)
    head = make("hamming", "gumbel", D=5, V=3).train()
    head.weight.data.copy_(w)
    torch.manual_seed(7)
    d = head.distances(h)
    torch.manual_seed(7)
    uh, uw = torch.rand_like(h), torch.rand_like(w)

    def concrete(x, u):
        return torch.sigmoid((x + u.log() - (1 - u).log()) / 0.5) # log u - log(1 - u) is logistic

    oracle = (concrete(h, uh)[:, None] - concrete(w, uw)[None]).abs().mean(-1) + 1e-4
    torch.testing.assert_close(d, oracle)
    assert not torch.equal(d, head.distances(h)) # each call draws new noise
    noise = torch.logit(torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
    assert abs(noise.std().item() - math.pi / math.sqrt(3)) < 0.02 # a logistic variable, not a Gumbel one (1.28)


def test_covariance_is_the_pooled_within_class_estimate():
    g = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=g).double()
    y = torch.randint(0, 5, (20_000,), generator=g)
    x = torch.randn(len(y), 4, generator=g).double() @ root.T + 10 * torch.randn(5, 4, generator=g).double()[y]
    scatter, freedom = within_class_scatter(x, y)
    assert freedom == len(y) - 5
    truth = root @ root.T
    # the estimate is unbiased, whatever the class means
    assert ((scatter / freedom - truth).norm() / truth.norm()).item() < 0.03
    by_class = torch.zeros_like(scatter)
    for k in range(5):
        members = x[y == k]
        by_class += torch.cov(members.T) * (len(members) - 1)
    torch.testing.assert_close(scatter / freedom, by_class / freedom)

    head = DistanceHead(4, 5, "mahalanobis", "covariance", momentum=0.5).double()
    head.loss(x, y)
    torch.testing.assert_close(head.covariance, 0.5 * torch.eye(4).double() + 0.5 * scatter / freedom)
    before = head.covariance.clone()
    head.eval().loss(x, y)
    head.train().loss(x[:5], torch.arange(5)) # no class occurs twice: there is nothing to estimate from
    head.loss(x[:3], torch.full((3,), -100)) # no position has a target
    assert torch.equal(head.covariance, before)
    assert not any(p is head.covariance for p in head.parameters())


@pytest.mark.parametrize("variant", ["stable", "unstable"])
def test_the_zero_vector_is_orthogonal_to_all(variant):
    """The cosine of 0 with any vector, 0 included, counts as 0, so that d = 1 + eps."""
    zero = torch.zeros(6, dtype=torch.float64)
    h, w = torch.stack([zero, rand(6)]), torch.stack([rand(6, seed=1), zero])
    d = pairwise(h, w, "cosine", variant, eps=1e-3)
    for pair in (d[0, 0], d[1, 1], d[0, 1]):
        assert pair.item() == pytest.approx(1.001, abs=1e-12)


def test_every_rank_estimates_the_covariance_from_the_whole_batch(monkeypatch):
    """The scatter and the degrees of freedom are summed over both ranks before one is divided by the other."""
    h, y = rand(40, 4), torch.arange(40) % 5
    parts = [within_class_scatter(h[:20], y[:20]), within_class_scatter(h[20:], y[20:])]
    others = list(parts[1])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.add_(others.pop(0)))
    head = DistanceHead(4, 5, "mahalanobis", "covariance", momentum=0.0).double()
    head.loss(h[:20], y[:20])
    (scatter1, freedom1), (scatter2, freedom2) = parts
    assert not others
    torch.testing.assert_close(head.covariance, (scatter1 + scatter2) / (freedom1 + freedom2))


# -----------------------------------------------------------------------------
# gradients

@every_link
@every_distance
def test_gradcheck(distance, variant, link):
    head = make(distance, variant, link=link, learn_n=True, V=5)
    h, y = rand(4, 6, seed=4).requires_grad_(), torch.tensor([1, 4, 0, -100])
    if variant == "hard":
        return check_straight_through(head, h, y)
    params = dict(head.named_parameters())

    def call(method, *args):
        """Return the method as a function of h and of the head's parameters, for gradcheck to differentiate."""
        module = Method(head, method)

        def f(h, *tensors):
            named = {f"head.{name}": tensor for name, tensor in zip(params, tensors)}
            return torch.func.functional_call(module, named, (h, *args))
        return f

    assert torch.autograd.gradcheck(call("__call__"), (h, *params.values()))
    assert torch.autograd.gradcheck(call("loss", y), (h, *params.values()))


class Method(torch.nn.Module):
    """functional_call only calls modules: this one calls a head's method by name."""

    def __init__(self, head, name):
        super().__init__()
        self.head, self.name = head, name

    def forward(self, *args):
        return getattr(self.head, self.name)(*args)


def check_straight_through(head, h, y):
    """The distance is that of the bits, and its gradient is that of the soft variant."""
    soft = make("hamming", "soft", link=head.link, learn_n=True, V=5)
    g = rand(4, 5, seed=9)
    ours = torch.autograd.grad((head.distances(h) * g).sum(), (h, head.weight))
    oracle = torch.autograd.grad((soft.distances(h) * g).sum(), (h, soft.weight))
    for a, b in zip(ours, oracle):
        torch.testing.assert_close(a, b)
    d = head.distances(h).detach()
    n = torch.tensor(2.0).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda n: F.cross_entropy(-n * d.log(), y), n)


@every_link
@every_distance
def test_finite_gradients_where_it_is_hard(distance, variant, link):
    D, V = 6, 5
    w = rand(V, D, seed=1).float()
    zeros = torch.zeros(V, D)
    cases = {
        "h = w": (w.clone(), w),
        "zeros": (zeros.clone(), w),
        "all zero": (zeros.clone(), zeros),
        "ties": (w + 1.0, w),
        "large": (1e4 * rand(V, D, seed=2).float(), w),
        "both large": (1e4 * w + 1, 1e4 * w),
        "nearly equal": (w * (1 + 1e-6), w),
    }
    options = {}
    if distance == "minkowski":
        options["p"] = 7.0
    for name, (h, weight) in cases.items():
        head = make(distance, variant, D, V, torch.float32, link=link, learn_n=True, **options)
        if link == "softmin" and name == "large":
            head.log_n.data.fill_(-8.0) # else exp(-n d) is 0 for every prototype but one
        head.weight.data.copy_(weight)
        h = h.requires_grad_()
        if variant == "cosh" and "large" in name:
            with pytest.raises(ValueError, match=r"chebyshev \(cosh\): alpha .* hold up to 81: lower alpha"):
                head(h)
            continue
        for loss in (head.loss(h, torch.arange(V)), F.cross_entropy(head(h), torch.arange(V))):
            grads = torch.autograd.grad(loss, [h, *head.parameters()])
            assert math.isfinite(loss.item()), (name, loss)
            assert all(torch.isfinite(g).all() for g in grads), (name, grads)


def test_precision_of_the_euclidean_identity_in_fp32():
    """
    The identity |h|^2 + |w|^2 - 2 h.w loses everything where h is close to w. At D = 768 the target's distance in the
    loss must be right to 1e-6, and every other distance to 1e-4.
    """
    D, V = 768, 64
    w = rand(V, D, seed=1)
    y = torch.arange(V)
    direction = F.normalize(rand(V, D, seed=2), dim=-1)
    for ratio in (1.0, 0.1, 0.03, 0.01, 1e-3, 1e-4):
        h = w + ratio * w.norm(dim=-1, keepdim=True) * direction
        h32, w32 = h.float(), w.float()
        # the exact distances are those of the rounded inputs
        exact = torch.cdist(h32.double(), w32.double(), compute_mode="donot_use_mm_for_euclid_dist")
        head = DistanceHead(D, V, n=1.0, eps=0.0)
        head.weight.data.copy_(w32)
        d = head.distances(h32).double()
        assert ((d - exact) / exact).abs().max() < 1e-4, ratio
        # The loss shows the error of log d at the target.
        nll = head.loss(h32, y, reduction="none").double()
        oracle = F.cross_entropy(-exact.log(), y, reduction="none")
        assert (nll - oracle).abs().max() < 3e-6, ratio
        s = distances.all_pairs(head.core, h32, w32).double()
        scale = (h32 ** 2).sum(-1, dtype=torch.float64)[:, None] + (w32 ** 2).sum(-1, dtype=torch.float64)
        assert ((s - exact ** 2).abs() / scale).max() < 16 * 2 ** -24 # 9 were seen
        # A matrix product would lose the gradient of the target's term as well.
        h32.requires_grad_()
        grad, = torch.autograd.grad(head.loss(h32, y), h32)
        h64 = h32.detach().double().requires_grad_()
        d64 = (h64[:, None] - w32.double()).norm(dim=-1)
        oracle, = torch.autograd.grad(F.cross_entropy(-d64.log(), y), h64)
        # at the closest 4e-5 was seen, which comes from the other columns
        assert ((grad - oracle).norm() / oracle.norm()).item() < 1e-4, ratio


def loss_in_float64(head, h, y):
    """Loss and gradients of h and of all parameters from core.dense, which holds every difference and cancels none."""
    head, h = copy.deepcopy(head).double(), h.detach().double().requires_grad_()
    o = head._options(h, head.weight).updated(**{name: getattr(head, name) for name in head.spec.tensors})
    a, b, terms = distances.prepared(head.spec, o, h, head.weight)
    d = head.spec.finish(head.core.dense(a, b), terms.get("a"), terms.get("b"), o)
    d = d.sqrt() if head.spec.squared else d
    loss = F.cross_entropy(distances.link_scores(d, head.n, head.link), y)
    return [loss.detach(), *torch.autograd.grad(loss, [h, *head.parameters()])]


GAPS = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7]
# a distance that transforms h and w first, and so rounds them
ROUNDED = ("mahalanobis", "cosine", "hamming", "bray_curtis")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@every_link
@every_distance
def test_a_close_prototype_that_is_not_the_target(distance, variant, link, reduction):
    """
    The loss and cross-entropy of the scores in fp32 equal float64's, at every gap |h - w_k| / |h|, also where a third
    of the prototypes are close. The bound of distances that round is that of the docstring of DistanceHead.loss.
    """
    if variant in ("hard", "gumbel"):
        pytest.skip("a straight-through gradient is none, and noise differs between precisions")
    D, V, N = 32, 24, 8
    for gap in GAPS:
        head = make(distance, variant, D, V, torch.float32, eps=1e-3 if variant == "unstable" else 1e-8)
        if distance == "minkowski":
            head = make(distance, variant, D, V, torch.float32, eps=1e-8, p=2.0)
        h, y = rand(N, D, seed=3).float(), torch.arange(N)
        aside = rand(N, D, seed=4).float()
        aside = gap * h.norm(dim=1, keepdim=True) * aside / aside.norm(dim=1, keepdim=True)
        aside = aside.sign() * aside.abs().clamp_min(0.3 * gap) # no two coordinates are equal, where slopes jump
        with torch.no_grad():
            head.weight[N:2 * N] = h + aside
        expected = loss_in_float64(head, h, y)
        h.requires_grad_()
        for loss in (head.loss(h, y, reduction=reduction, chunk=3).mean(), F.cross_entropy(head(h), y)):
            actual = [loss.detach(), *torch.autograd.grad(loss, [h, *head.parameters()])]
            tolerance = 1e-5 + (3e-7 / gap if distance in ROUNDED else 0)
            if variant == "unstable":
                tolerance = 3e-3 # the formula itself cancels, up to eps
            moved = (head.weight[N:2 * N] != h).any()
            if distance not in PRODUCTS and gap < 1e-4 or not moved:
                actual, expected = actual[:1], expected[:1] # some coordinates are equal by rounding: a slope jumps
            for a, b in zip(actual, expected, strict=True):
                assert (a - b).norm() <= min(tolerance, 1) * b.norm() + 1e-9, (gap, (a - b).norm() / b.norm())


@pytest.mark.parametrize("distance, variant", [("chebyshev", "smooth"), ("chebyshev", "cosh"), ("cosine", "unstable")])
@pytest.mark.parametrize("D", [1, 5])
def test_d_is_at_least_eps_where_h_is_a_prototype(distance, variant, D):
    h = rand(50, D, seed=1).float()
    d = pairwise(h, h.clone(), distance, variant, eps=1e-12)
    assert (d >= 1e-12).all()


def test_cosh_of_nothing_and_of_too_much():
    empty = torch.zeros(0, 4)
    assert pairwise(empty, rand(3, 4).float(), "chebyshev", "cosh").shape == (0, 3)
    assert pairwise(rand(3, 4).float(), empty, "chebyshev", "cosh").shape == (3, 0)
    with pytest.raises(ValueError, match="lower alpha"):
        pairwise(torch.full((1, 4), 20.0), torch.zeros(3, 4), "chebyshev", "cosh")


# -----------------------------------------------------------------------------
# what a distance head promises

@every_link
@every_distance
def test_the_nearest_prototype_wins(distance, variant, link):
    head = make(distance, variant, D=8, V=20, link=link)
    h = rand(200, 8, seed=6)
    d, log_p = head.distances(h), head(h).log_softmax(-1)
    assert torch.equal(d.gather(1, log_p.argmax(1, keepdim=True)), d.min(1, keepdim=True).values)
    nearer = d[:, :, None] < d[:, None, :] - 1e-9
    assert (log_p[:, :, None] > log_p[:, None, :])[nearer].all() # the whole order, not only the first


@every_link
@every_head
def test_cross_entropy_goes_to_zero_on_separable_data(distance, variant, link):
    torch.manual_seed(0)
    n = 16.0 if link == "harmonic" else 40.0
    head = DistanceHead(16, 4, distance, variant, link=link, n=n)
    y = torch.arange(32) % 4
    h = (torch.randn(4, 16)[y] + 0.1 * torch.randn(32, 16)).requires_grad_()
    optimizer = torch.optim.Adam([h, *head.parameters()], lr=0.05)
    for _ in range(300):
        loss = head.loss(h, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert head.eval().loss(h, y).item() < 0.02
    assert torch.equal(head(h).argmax(-1), y)


HOMOGENEOUS = [
    ("euclidean", "standard"),
    ("manhattan", "standard"),
    ("chebyshev", "standard"),
    ("minkowski", "standard"),
    ("mahalanobis", "standard"),
    ("mahalanobis", "diagonal"),
    ("mahalanobis", "cholesky"),
    ("mahalanobis", "covariance"),
    ("offset_l2", "standard"),
]
SCALE_FREE = [
    ("cosine", "stable"),
    ("cosine", "unstable"),
    ("canberra", "standard"),
    ("canberra", "weighted"),
    ("bray_curtis", "standard"),
    ("bray_curtis", "abs"),
    ("bray_curtis", "normalized"),
    ("bray_curtis", "signed"),
    ("hamming", "hard"),
]


@every_distance
def test_scale_invariance(distance, variant):
    """
    Theorem 1: with the harmonic link and eps = 0, p does not change from (h, w) to (c h, c w) when d is homogeneous of
    degree 1. It holds trivially where d is homogeneous of degree 0. A positive eps, the softmin link and the distances
    with a scale of their own (soft Hamming, smooth Chebyshev, robust Canberra) break it.
    """
    h, c = rand(20, 12, seed=1), 7.0
    options = {}
    if variant == "robust":
        options["min_denom"] = 1.5

    def p(scale, eps, link="harmonic"):
        head = make(distance, variant, D=12, eps=eps, link=link, **options)
        head.weight.data *= scale
        return head(scale * h).softmax(-1), head.distances(scale * h)

    (p1, d1), (p2, d2) = p(1.0, 0.0), p(c, 0.0)
    homogeneous = (distance, variant) in HOMOGENEOUS
    scale_free = (distance, variant) in SCALE_FREE
    if homogeneous:
        torch.testing.assert_close(d2, c * d1, rtol=1e-9, atol=0)
    elif scale_free:
        torch.testing.assert_close(d2, d1, rtol=1e-9, atol=1e-12)
    assert torch.allclose(p1, p2, rtol=1e-9, atol=1e-12) == (homogeneous or scale_free)
    if homogeneous:
        assert not torch.allclose(p(1.0, 0.0, "softmin")[0], p(c, 0.0, "softmin")[0], rtol=1e-3)
        assert not torch.allclose(p(1.0, 0.3)[0], p(c, 0.3)[0], rtol=1e-9) # eps is a length that stays as it is


def test_chebyshev_ties_share_the_gradient():
    h, w = torch.tensor([[1.0, -1.0, 0.5]]).requires_grad_(), torch.zeros(1, 3)
    grad, = torch.autograd.grad(pairwise(h, w, "chebyshev").sum(), h)
    # a subgradient lies in the convex hull of the two, as [1, -1, 0] would not
    assert grad.tolist() == [[0.5, -0.5, 0.0]]


# -----------------------------------------------------------------------------
# parameters reach the numbers

CHANGED = dict(
    alpha=3.0,
    p=3.0,
    T=2.0,
    threshold=0.4,
    min_denom=1.5,
    weight_power=2.0,
    reg_lambda=0.7,
    momentum=0.1,
    shrinkage=0.6,
)


def config_scores(text="", train=False, **kwargs):
    torch.manual_seed(3)
    head = lm_head(GPTConfig(vocab_size=7, n_embd=6, distance_params=text, **kwargs)).double()
    with torch.no_grad():
        head.weight *= 0.01 # small coordinates let a floor of the denominator bite
        for name in head.spec.tensors: # at the start A = I, theta = 0 and L = I give the same distance
            tensor = getattr(head, name)
            tensor.add_(0.3 * torch.randn_like(tensor))
    h = 0.01 * rand(30, 6, seed=8)
    if train: # some parameters only act on what training estimates or draws
        torch.manual_seed(4)
        head.train().loss(100 * h, torch.arange(30) % 7)
    return head.eval()(h).detach()


@every_distance
def test_every_variant_and_parameter_changes_the_numbers(distance, variant):
    def scores(text="", **changes):
        settings = {"distance": distance, "variant": variant, **changes}
        return config_scores(text, train=True, **settings)

    base = scores()
    for other in DISTANCES[distance]:
        if other != variant:
            assert not torch.allclose(base, scores(variant=other), rtol=1e-6), other
    for name in DISTANCES[distance][variant].params:
        assert not torch.allclose(base, scores(f"{name}={CHANGED[name]}"), rtol=1e-6), name
    for changes in (dict(link="softmin"), dict(n=5.0), dict(eps=0.05)):
        changed = scores(**changes)
        if "eps" in changes and variant in ("smooth", "cosh"):
            continue # these two formulas have no eps
        assert not torch.allclose(base, changed, rtol=1e-9), changes
    if variant == next(iter(DISTANCES[distance])):
        assert torch.equal(base, config_scores(distance=distance, train=True)) # the first variant is the default
    assert not torch.allclose(base, config_scores(distance="baseline", train=True))


def test_parse_head():
    """Both ways to write a head give the arguments of DistanceHead."""
    minkowski = dict(distance="minkowski", variant=None, p=3.0)
    assert parse_head("minkowski:p=3") == parse_head("minkowski", "", "p=3") == minkowski
    assert parse_head("x", params="p=3, alpha=0.5") == dict(distance="x", variant=None, p=3.0, alpha=0.5)
    assert parse_head(" chebyshev:smooth:alpha=5 ") == dict(distance="chebyshev", variant="smooth", alpha=5.0)
    assert DistanceHead(8, 4, **parse_head("chebyshev:smooth:alpha=5")).options.alpha == 5
    bad = {
        "p=three": ("x", "", "p=three"),
        "must read name=number": ("x", "", "p:3"),
        "a head is written": ("x:p", "q"),
    }
    for message, args in bad.items():
        with pytest.raises(ValueError, match=message):
            parse_head(*args)


def test_a_distance_of_ones_own_gets_everything(monkeypatch):
    """A distance needs one core and one entry: autograd finds the gradient, and the loss keeps to its tiles."""
    def squared_chord(h, w):
        return ((h.abs() + 1e-6).sqrt() - (w.abs() + 1e-6).sqrt()).square().sum(-1)

    entry = {"standard": Distance(lambda o: Tiles(squared_chord))}
    monkeypatch.setitem(DISTANCES, "squared_chord", entry)
    head = make("squared_chord", None, V=30)
    h, y = rand(50, 6).requires_grad_(), torch.arange(50) % 30
    d = squared_chord(h[:, None], head.weight) + 1e-4
    oracle = F.cross_entropy(-3 * d.log(), y)
    loss = head.loss(h, y, chunk=7)
    torch.testing.assert_close(loss, oracle)
    ours = torch.autograd.grad(loss, (h, head.weight))
    theirs = torch.autograd.grad(oracle, (h, head.weight))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)


# -----------------------------------------------------------------------------
# the loss

def plain(head, h, y, ignore_index=-100, reduction="mean"):
    return F.cross_entropy(head(h), y, ignore_index=ignore_index, reduction=reduction)


def compare(head, h, loss, oracle, upstream, rtol):
    """Compare two losses, and their gradients in h and in the parameters given the gradient from upstream."""
    torch.testing.assert_close(loss, oracle, rtol=rtol, atol=rtol)
    inputs = {"h": h, **dict(head.named_parameters())}
    ours = torch.autograd.grad((loss * upstream).sum(), list(inputs.values()))
    theirs = torch.autograd.grad((oracle * upstream).sum(), list(inputs.values()))
    for (name, x), a, b in zip(inputs.items(), ours, theirs):
        assert a.dtype == x.dtype
        assert (a - b).norm() <= rtol * b.norm() + 1e-12, (name, ((a - b).norm() / b.norm()).item())


@every_link
@every_head
def test_loss_equals_cross_entropy_of_the_scores(distance, variant, link):
    N, V = 37, 50
    learn_n = distance != "baseline"
    y = torch.randint(0, 45, (N,), generator=torch.Generator().manual_seed(1))
    y[[0, 5, N - 1]] = -100
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        head = make(distance, variant, V=V, dtype=dtype, link=link, learn_n=learn_n, num_classes=45)
        h = rand(N, 6, seed=3).to(dtype).requires_grad_()
        for chunk in (1, 7, N, None):
            compare(head, h, head.loss(h, y, chunk=chunk), plain(head, h, y), torch.tensor(-2.7), rtol)
        for reduction, upstream in (("sum", torch.tensor(0.3)), ("none", rand(N, seed=5).to(dtype))):
            loss = head.loss(h, y, reduction=reduction, chunk=8)
            compare(head, h, loss, plain(head, h, y, reduction=reduction), upstream, rtol)
        with torch.no_grad():
            torch.testing.assert_close(head.loss(h, y), plain(head, h, y), rtol=rtol, atol=rtol)


def test_offset_l2_beyond_one_slice_of_the_vocabulary():
    head = make("offset_l2", None, D=5, V=5000)
    h, y = rand(8, 5).requires_grad_(), torch.arange(8) * 700
    d = ((head.alpha * (h[:, None] - head.weight)).square().sum(-1) + 1e-8).sqrt()
    oracle = F.cross_entropy(-3 * d.log(), y)
    compare(head, h, head.loss(h, y, chunk=3), oracle, torch.tensor(1.0), 1e-12)


def test_loss_ignores_and_shapes():
    head = make("euclidean", None)
    h, y = rand(2, 3, 6).requires_grad_(), torch.tensor([[1, 2, -100], [0, -100, 8]])
    flat = head.loss(h.reshape(6, 6), y.reshape(6), ignore_index=-100)
    torch.testing.assert_close(head.loss(h, y, ignore_index=-100), flat)
    assert head.loss(h, y, ignore_index=-100, reduction="none").shape == (2, 3)
    assert head(h).shape == (2, 3, 9) and head.distances(h).shape == (2, 3, 9)
    grad, = torch.autograd.grad(head.loss(h, y, ignore_index=-100), h)
    assert (grad[0, 2] == 0).all() and (grad[1, 1] == 0).all() and (grad[0, 0] != 0).any()
    # the mean of nothing is nan, as F.cross_entropy has it
    assert math.isnan(head.loss(h, torch.full_like(y, -100), ignore_index=-100).item())
    # the backward pass can be asked for twice
    loss = head.loss(h, y, ignore_index=-100)
    first = torch.autograd.grad(loss, h, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, h)[0])


@pytest.mark.parametrize("distance, variant", [
    ("baseline", None),
    ("euclidean", None),
    ("manhattan", None),
    ("mahalanobis", "standard"),
    ("cosine", "unstable"),
])
def test_loss_under_autocast_is_the_fp32_loss(distance, variant):
    head = make(distance, variant, D=32, V=50, dtype=torch.float32)
    x, layer, y = rand(20, 32).float(), torch.nn.Linear(32, 32), torch.arange(20)
    with torch.autocast("cpu", torch.bfloat16):
        h = layer(x)
        assert h.dtype == torch.bfloat16
        loss, scores = head.loss(h, y, chunk=6), head(h)
    assert loss.dtype == scores.dtype == torch.float32
    h32 = h.detach().float().requires_grad_()
    oracle = plain(head, h32, y)
    torch.testing.assert_close(loss, oracle, rtol=1e-5, atol=1e-5)
    loss.backward()
    got = head.weight.grad.clone()
    head.weight.grad = None
    oracle.backward()
    torch.testing.assert_close(got, head.weight.grad, rtol=1e-4, atol=1e-6)
    assert layer.weight.grad is not None and torch.isfinite(layer.weight.grad).all()


@pytest.mark.parametrize("distance", ["euclidean", "manhattan", "baseline"])
def test_weight_gradients_accumulate_in_fp32(distance):
    """With a bf16 weight and 512 chunks, the gradient is the one in fp32, rounded once and not 512 times."""
    head = make(distance, None, D=16, V=20, dtype=torch.float32)
    head.weight.data = head.weight.data.bfloat16().float()
    h, y = rand(512, 16).float(), torch.arange(512) % 20
    oracle, = torch.autograd.grad(plain(head, h, y), head.weight)
    head.weight.data = head.weight.data.bfloat16()
    got, = torch.autograd.grad(head.loss(h, y, chunk=1), head.weight)
    assert got.dtype == torch.bfloat16
    atol = 2 ** -8 * oracle.abs().max().item() * 0.01
    torch.testing.assert_close(got.float(), oracle, rtol=2 ** -8, atol=atol)


def warm_peak_bytes(f):
    f() # the first call allocates what later ones keep
    return peak_bytes(f)


@every_head
def test_loss_needs_a_quarter_of_the_memory_of_dense_logits(distance, variant, monkeypatch):
    monkeypatch.setattr(distances, "CACHE_ELEMENTS", 2 ** 14) # the tiles are as small as the rest of this test
    N, V, D = 512, 4096, 16
    h, y = rand(N, D).float().requires_grad_(), torch.arange(N)
    w = torch.nn.Parameter(rand(V, D).float())
    dense = warm_peak_bytes(lambda: torch.autograd.grad(F.cross_entropy(h @ w.T, y), (h, w)))
    assert dense > 2 * 4 * N * V # the count includes the logits and their log-softmax at least
    options = {}
    if variant == "cosh":
        options["alpha"] = 5.0 # the coordinates stay in its range
    head = make(distance, variant, D, V, torch.float32, **options)
    ours = warm_peak_bytes(lambda: torch.autograd.grad(head.loss(h, y, chunk=16), (h, *head.parameters())))
    assert ours < dense / 4, (ours / 2 ** 20, dense / 2 ** 20)


def test_compiled_tiles_equal_eager_ones():
    head = make("canberra", None, D=8, V=600, dtype=torch.float32)
    h, y = rand(300, 8).float().requires_grad_(), torch.arange(300)
    eager = torch.autograd.grad(head.loss(h, y), (h, head.weight))
    head.compile_loss()
    try:
        compiled = torch.autograd.grad(head.loss(h, y), (h, head.weight))
    except Exception as e: # there may be no C++ compiler
        pytest.skip(f"torch.compile does not work here: {type(e).__name__}")
    for a, b in zip(compiled, eager):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# -----------------------------------------------------------------------------
# the modules

def shapes(module):
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def test_head_is_a_drop_in_for_linear():
    linear, head = torch.nn.Linear(16, 7, bias=False), DistanceHead(16, 7, "baseline")
    head.weight.data.copy_(linear.weight)
    x = torch.randn(3, 16)
    torch.testing.assert_close(head(x), linear(x))
    assert shapes(head) == shapes(linear)
    torch.manual_seed(0)
    start = torch.nn.Linear(64, 1000, bias=False).weight
    torch.manual_seed(0)
    assert torch.equal(DistanceHead(64, 1000, "cosine").weight, start) # both start from the same weight


def test_padding_rows_are_masked_out():
    full, padded = make("euclidean", None, V=9), make("euclidean", None, V=9, num_classes=7)
    h, y = rand(10, 6), torch.arange(10) % 7
    assert padded(h).shape == (10, 7)
    torch.testing.assert_close(padded.loss(h, y), F.cross_entropy(full(h)[:, :7], y))
    loss = padded.loss(h, y, chunk=3)
    loss.backward()
    assert (padded.weight.grad[7:] == 0).all() and (padded.weight.grad[:7] != 0).any()


def test_criterion():
    criterion = HarmonicLoss(6, 9, distance="manhattan", n=2.0)
    h, y = torch.randn(5, 6, requires_grad=True), torch.tensor([0, 8, -100, 3, 3])
    loss = criterion(h, y)
    torch.testing.assert_close(loss, F.cross_entropy(criterion.head(h), y))
    loss.backward()
    assert h.grad is not None and criterion.head.weight.grad is not None
    assert [name for name, _ in criterion.named_parameters()] == ["head.weight"]


def test_learn_n_moves_n():
    head = DistanceHead(6, 9, "euclidean", n=2.0, learn_n=True)
    assert head.n.item() == pytest.approx(2.0)
    head.loss(torch.randn(5, 6), torch.arange(5)).backward()
    assert head.log_n.grad.item() != 0
    assert "log_n" not in DistanceHead(6, 9, "euclidean", n=2.0).state_dict()


def test_the_list_of_heads_prints(capsys):
    runpy.run_path(distances.__file__, run_name="__main__")
    text = capsys.readouterr().out
    assert all(name in text for name in ("baseline", *DISTANCES))
    assert "p=1.5" in text and "alpha (learned)" in text
    with open(os.path.join(os.path.dirname(distances.__file__), "README.md")) as f:
        assert text in f.read() # the README shows the output of `python distances.py`


def test_the_list_of_heads_ends_quietly_where_nobody_reads():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, distances.__file__], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == -signal.SIGPIPE and done.stderr == b""


# -----------------------------------------------------------------------------
# bad input

NOT_FINITE = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.nan, 0.0, math.inf, 0.0]])
BAD = {
    "unknown distance 'euclidian', did you mean 'euclidean'": lambda: DistanceHead(4, 3, "euclidian"),
    "legal: baseline, euclidean, manhattan": lambda: DistanceHead(4, 3, "wasserstein"),
    "unknown cosine variant 'stabel', did you mean 'stable'": lambda: DistanceHead(4, 3, "cosine", "stabel"),
    "baseline has no variants, got 'stable'": lambda: DistanceHead(4, 3, "baseline", "stable"),
    r"cosine has no parameter 'p' \(legal: none\)": lambda: DistanceHead(4, 3, "cosine", p=3.0),
    r"minkowski has no parameter 'q' \(legal: p\)":
        lambda: pairwise(torch.zeros(1, 2), torch.zeros(1, 2), "minkowski", q=1.0),
    "unknown link 'harmonics', did you mean 'harmonic'": lambda: DistanceHead(4, 3, link="harmonics"),
    "p must be at least 1 .*, got 0.5": lambda: DistanceHead(4, 3, "minkowski", p=0.5),
    "p must be at least 1 .*, got nan": lambda: DistanceHead(4, 3, "minkowski", p=float("nan")),
    "n must be > 0 and finite, got 0": lambda: DistanceHead(4, 3, n=0.0),
    "n must be > 0 and finite, got -1": lambda: DistanceHead(4, 3, n=-1.0),
    "eps must be >= 0, got -0.1": lambda: DistanceHead(4, 3, eps=-0.1),
    "alpha must be > 0, got -1": lambda: DistanceHead(4, 3, "chebyshev", "smooth", alpha=-1.0),
    r"momentum must lie in \[0, 1\], got 2": lambda: DistanceHead(4, 3, "mahalanobis", "covariance", momentum=2.0),
    "alpha belongs to the head": lambda: DistanceHead(4, 3, "offset_l2", alpha=1.0),
    r"num_classes must lie in 1..3 .*, got 5": lambda: DistanceHead(4, 3, num_classes=5),
    r"features of size 4, got \(2, 5\)": lambda: DistanceHead(4, 3)(torch.zeros(2, 5)),
    r"\(N, D\) and \(V, D\), got \(2, 5\) and \(3, 4\)":
        lambda: pairwise(torch.zeros(2, 5), torch.zeros(3, 4), "euclidean"),
    r"target 3 is out of range: the head has classes 0..2":
        lambda: DistanceHead(4, 3).loss(torch.zeros(2, 4), torch.tensor([0, 3])),
    r"target -5 is out of range": lambda: DistanceHead(4, 3).loss(torch.zeros(2, 4), torch.tensor([-100, -5])),
    r"h is not finite: 2 of 8 values, the first in row 1":
        lambda: DistanceHead(4, 3).loss(NOT_FINITE, torch.tensor([0, 1])),
    r"h is not finite": lambda: DistanceHead(4, 3)(torch.full((1, 4), math.nan)),
    r"h \(2, 4\) and targets \(3,\) do not fit":
        lambda: DistanceHead(4, 3).loss(torch.zeros(2, 4), torch.zeros(3, dtype=torch.long)),
    "reduction must be mean, sum or none, got 'max'":
        lambda: DistanceHead(4, 3).loss(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long), reduction="max"),
    "baseline is a linear head": lambda: DistanceHead(4, 3, "baseline").distances(torch.zeros(2, 4)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()
