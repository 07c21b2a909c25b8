"""
Heads that nobody thought of, by hypothesis: head.loss, cross-entropy of the head's scores and the same in float64
agree, in value and in every gradient, as far as the docstrings of distances.py say. See test_fuzz.py.

$ pytest tests/test_fuzz_heads.py
$ pytest tests/test_fuzz_heads.py -m torture
"""
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from small_models import EVERY_HEAD
from test_distances import make

import distances

ROUNDING = 2.0 ** -24 # of fp32, relative
DISTANCE_ERROR = 1e-4 # of d in fp32, relative, as DistanceHead.distances says

FP32, BF16 = torch.float32, torch.bfloat16
cases = st.fixed_dictionaries(dict(
    name=st.sampled_from(EVERY_HEAD),
    link=st.sampled_from(["harmonic", "softmin", "gaussian"]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    n=st.sampled_from([0.1, 1.0, 3.0, 28.0]),
    eps=st.sampled_from([1e-4, 1e-2]),
    learn_n=st.booleans(), # not of a weight in bfloat16, which rounds n as well
    bias=st.booleans(),
    N=st.integers(1, 4),
    V=st.integers(1, 6),
    D=st.integers(1, 9),
    padding=st.integers(0, 2), # rows of the weight that are no class
    dtypes=st.sampled_from([(FP32, FP32)] * 5 + [(BF16, FP32), (FP32, BF16), (BF16, BF16), (torch.float64, FP32)]),
    scale=st.sampled_from([1.0, 1.0, 1.0, 1e-6, 1e-3, 1e3, 1e6]),
    # what each row of h is, and how near it is to a prototype, the target's or another's
    rows=st.lists(st.tuples(st.sampled_from(["random", "grid", "zero", "equal", "near", "near"]),
                            st.sampled_from([1e-1, 1e-2, 1e-3, 1e-4, 1e-5])), min_size=4, max_size=4),
    grid=st.booleans(), # prototypes of small integers: coordinates, and whole prototypes, that are equal
    ignored=st.booleans(), # the first row's target does not count
    chunk=st.sampled_from([None, 1, 3]),
    large=st.booleans(), # goes the way of large batches
    seed=st.integers(0, 10 ** 6),
))


def head_and_batch(case):
    """The head of a case, its features h (N, D) and targets y (N,)."""
    g = torch.Generator().manual_seed(case["seed"])
    N, V, D, scale = (case[key] for key in ("N", "V", "D", "scale"))
    h_dtype, w_dtype = case["dtypes"]
    options = {key: case[key] for key in ("link", "n", "eps", "bias")}
    head = make(*case["name"], D=D, V=V + case["padding"], num_classes=V, seed=case["seed"], **options,
                learn_n=case["learn_n"] and w_dtype == FP32)
    with torch.no_grad():
        if case["grid"]:
            head.weight.copy_(torch.randint(-2, 3, head.weight.shape, generator=g))
        head.weight.mul_(scale)
        if case["bias"]:
            head.bias.copy_(torch.randn(len(head.bias), generator=g))
        head = head.to(w_dtype)
        w = head.weight[:V].double()
        h = torch.randn(N, D, generator=g, dtype=torch.float64) * scale
        for i, (kind, gap) in enumerate(case["rows"][:N]):
            k = torch.randint(V, (), generator=g)
            if kind == "grid":
                h[i] = torch.randint(-2, 3, (D,), generator=g) * scale
            elif kind == "zero":
                h[i] = 0
            elif kind == "equal":
                h[i] = w[k]
            elif kind == "near":
                h[i] = w[k] + gap * w[k].norm() / D ** 0.5 * h[i] / scale
    y = torch.randint(V, (N,), generator=g)
    if case["ignored"]:
        y[0] = -100
    return head, h.to(h_dtype), y


def upstream(case, y):
    """The weight (N,) with which each row's -log p_y counts."""
    counts = (y != -100).double()
    if case["reduction"] == "none":
        return counts * torch.linspace(-1, 2, len(y), dtype=torch.float64)
    return counts / counts.sum() if case["reduction"] == "mean" else counts


def loss_and_gradients(case, head, h, y, by_loss):
    """The loss by head.loss, or by cross-entropy of the scores, and its gradients {name: tensor}, of h too."""
    inputs = {"h": h.detach().requires_grad_(), **dict(head.named_parameters())}
    if by_loss:
        loss = head.loss(inputs["h"], y, reduction=case["reduction"], chunk=case["chunk"])
    else:
        loss = F.cross_entropy(head(inputs["h"]), y, reduction=case["reduction"])
    weights = upstream(case, y).to(loss.dtype) if case["reduction"] == "none" else torch.ones_like(loss)
    gradients = torch.autograd.grad(loss, list(inputs.values()), weights, allow_unused=True)
    found = {}
    for (name, x), gradient in zip(inputs.items(), gradients):
        found[name] = torch.zeros_like(x, dtype=torch.float64) if gradient is None else gradient.double()
    return loss.detach().double(), found


def row_norms(x):
    """x (rows, D) -> (rows,), and all else as one row -> (1,)"""
    return x.norm(dim=1) if x.ndim == 2 else x.norm().reshape(1)


@torch.no_grad()
def has_a_kink(case, head, h):
    """
    Whether some |x| of the distance is at 0, where every slope in [-1, 1] is one: autograd takes 0, tiles -1, and which
    of them a loss goes through hangs on its size. Or whether 1 - cos is, which is cut off there; or h - w, which
    Mahalanobis transforms first, so that rounding decides its direction.
    """
    (distance, variant), w = case["name"], head.weight
    if distance == "hamming": # of sigmoids, which are rounded
        h, w = (2 * h).sigmoid(), (2 * w).sigmoid()
        return ((h[:, None] - w).abs() < 8 * ROUNDING).any()
    if distance == "chebyshev" and variant == "standard":
        largest = (h[:, None] - w).abs().topk(min(2, case["D"]), -1).values # (N, V, 2)
        return (largest[..., 0] == largest[..., -1]).any()
    if variant == "unstable":
        return (head.distances(h) - case["eps"] < 32 * ROUNDING).any()
    if distance == "mahalanobis":
        return ((h[:, None] - w).norm(dim=-1) < 64 * ROUNDING * w.norm(dim=-1)).any()
    is_zero = (h[:, None] == w).any()
    if distance in ("canberra", "bray_curtis"):
        return is_zero or (h[:, None] == -w).any() or (h == 0).any() or (w == 0).any()
    return is_zero and distance in ("manhattan", "chebyshev")


# -----------------------------------------------------------------------------
# what the docstrings allow, all in float64

def moved_by_rounding(case, head, h, y, loss, gradients):
    """How far the loss and each row of the gradients move when h and the parameters are rounded a few times."""
    absolute = 8 * ROUNDING * {"hamming": 1.0, "bray_curtis": case["eps"]}.get(case["name"][0], 0.0) # beside 1, or eps
    loss_moved, moved = torch.zeros_like(loss), {name: 0 * row_norms(x) for name, x in gradients.items()}
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        other_head, other_h = copy.deepcopy(head), h.clone()
        for x in (other_h, *other_head.parameters()):
            x.data += (4 * ROUNDING * x.data.abs() + absolute) * torch.randn(x.shape, generator=g, dtype=x.dtype)
        other_loss, others = loss_and_gradients(case, other_head, other_h, y, by_loss=False)
        loss_moved = torch.maximum(loss_moved, (other_loss - loss).abs())
        for name, other in others.items():
            moved[name] = torch.maximum(moved[name], row_norms(other - gradients[name]))
    return loss_moved, moved


def error_of_scores(case, head, h, z):
    """The error (N,) that each row of z (N, V) may have: that of d, and that of z's own rounding."""
    error = 8 * ROUNDING * z.abs().amax(1)
    if case["name"][0] == "baseline":
        return error
    d = head.distances(h)
    d_max = d.amax(1)
    of_link = {"harmonic": 1.0, "softmin": d_max, "gaussian": 2 * d_max.square()} # d |dz/dd| / n
    error += DISTANCE_ERROR * head.n * of_link[case["link"]]
    if case["name"] == ("cosine", "unstable"): # 1 - cos + eps, whose 1 is rounded
        error += 16 * ROUNDING * head.n * (1 / d).amax(1).clamp_min(1)
    return error


def slope_norms(head, h):
    """{name: the norms (N, V, rows) of the rows of dz_ik / dx} of h and of each parameter x, by name."""
    inputs = {"h": h.detach().requires_grad_(), **dict(head.named_parameters())}
    z = head(inputs["h"])
    norms = {name: torch.zeros(*z.shape, len(row_norms(x)), dtype=z.dtype) for name, x in inputs.items()}
    for i, k in itertools.product(*map(range, z.shape)):
        gradients = torch.autograd.grad(z[i, k], list(inputs.values()), retain_graph=True, allow_unused=True)
        for name, gradient in zip(norms, gradients):
            if gradient is not None:
                norms[name][i, k] = row_norms(gradient)
    return norms


def cancelling_slopes(case, head, h, name):
    """
    |dz/dd| (N, V) times the size of the terms of which the gradients of d by `name` are differences: where these
    cancel, rounding is left.
    """
    (distance, variant), D = case["name"], case["D"]
    if distance == "baseline":
        return torch.zeros(())
    w, d, size = head.weight[:case["V"]], head.distances(h), torch.zeros(())
    if distance == "hamming" or variant == "cosh": # the slope of a sigmoid, and a share of all exponentials
        size += 2.0
    elif variant == "smooth": # exp(alpha (|x| - d))
        size = head.options.alpha * d
    elif distance == "canberra":
        size = (1 / (h.abs()[:, None] + w.abs() + case["eps"])).norm(dim=-1)
    elif distance in ("cosine", "bray_curtis") or variant == "unit":
        size = D ** 0.5 * (1 / h.norm(dim=1, keepdim=True).clamp_min(1e-12) + 1 / w.norm(dim=1).clamp_min(1e-12))
    elif distance == "mahalanobis" and name not in ("h", "weight"): # by its matrix, which multiplies h and w apart
        centred = copy.deepcopy(head)
        centred.weight.zero_()
        size = centred.distances(h)[:, :1] + centred.distances(w)[:, 0]
    slope = {"harmonic": 1 / d, "softmin": 1.0, "gaussian": 2 * d} # |dz/dd| / n
    return size * head.n * slope[case["link"]]


def check(case):
    head, h, y = head_and_batch(case)
    exact, h64 = copy.deepcopy(head).double(), h.double()
    with pytest.MonkeyPatch.context() as patch:
        if case["large"]:
            patch.setattr(distances, "SMALL", {"N x V x D": -1, "N x V": -1})
        try:
            found = [loss_and_gradients(case, head, h, y, by_loss) for by_loss in (True, False)]
        except ValueError as e:
            assert "its exponentials hold up to" in str(e) and case["name"][1] == "cosh"
            return
    loss64, gradients64 = loss_and_gradients(case, exact, h64, y, by_loss=False)
    if (y == -100).all():
        for loss, gradients in found:
            torch.testing.assert_close(loss, loss64, equal_nan=True)
            assert all((gradient == 0).all() for gradient in gradients.values()) # as cross-entropy has it
        return

    loss_moved, moved = moved_by_rounding(case, exact, h64, y, loss64, gradients64)
    weights, norms, kink = upstream(case, y).abs(), slope_norms(exact, h64), has_a_kink(case, exact, h64)
    with torch.no_grad():
        z = exact(h64) # (N, V)
        z_error = error_of_scores(case, exact, h64, z) # (N,)
        p, is_target = z.softmax(1), F.one_hot(y.clamp_min(0), z.shape[1]).bool()
        dz = torch.where(is_target, 1 - p, p) # |dL / dz|, but for the weights
        dz_error = dz * (torch.expm1((2 * z_error).clamp_max(30)) + 4 * DISTANCE_ERROR)[:, None] + 8 * ROUNDING
        bounds = {}
        for name, gradient in gradients64.items():
            bounds[name] = torch.einsum("i,ik,ikr->r", weights, dz_error, norms[name]) + 8 * moved[name] + 1e-30
            bounds[name] += 2 * torch.finfo(h.dtype if name == "h" else head.weight.dtype).eps * row_norms(gradient)
            bounds[name] += 16 * ROUNDING * (weights[:, None] * dz * cancelling_slopes(case, exact, h64, name)).sum()
    loss_error = 2 * z_error if case["reduction"] == "none" else 2 * (z_error * weights).sum()

    for loss, gradients in found:
        assert torch.isfinite(loss).all()
        assert ((loss - loss64).abs() <= loss_error + 8 * loss_moved + 1e-6).all(), f"{loss}, in float64 {loss64}"
        for name, gradient in gradients.items():
            assert torch.isfinite(gradient).all()
            is_close = row_norms(gradient - gradients64[name]) <= bounds[name]
            assert kink or is_close.all(), f"by {name}: {gradient}, in float64 {gradients64[name]}, {bounds[name]}"


def test_loss_cross_entropy_and_float64_agree(fuzz):
    fuzz(check, cases, cases=120)
