"""
distances_triton.py against float64 autograd of the plain formulas: on the GPU where there is one, else through Triton's
interpreter.
"""
import itertools
import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

pytest.importorskip("triton", reason="triton is not installed")
import distances  # noqa: E402
import distances_triton as dt  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-4
L1, LINF, CANBERRA, FLOOR = ("l1",), ("linf",), ("canberra", EPS, 0.0), ("canberra", EPS, 0.5)
HALF = ("l1", "half")
LP = [("lp", p) for p in (1.5, 3.0, 2.5, 1.1, 4.0)]
ALL = [L1, LINF, *LP, CANBERRA, FLOOR]
every = pytest.mark.parametrize("kernel", ALL, ids=lambda k: "-".join(map(str, k)))
all_but_l1 = pytest.mark.parametrize("kernel", [k for k in ALL if k != L1], ids=lambda k: "-".join(map(str, k)))
# log2(0) = -inf and clamp(inf) are meant
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:overflow")


def rand(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def formula(kernel, h, w):
    """s (N, V), which broadcasting writes out."""
    x = (h[:, None] - w[None]).abs()
    if kernel[0] == "l1":
        return x.sum(-1)
    if kernel[0] == "linf":
        return x.amax(-1) # ties share its gradient
    if kernel[0] == "lp":
        return (x ** kernel[1]).sum(-1) ** (1 / kernel[1])
    return (x / (h.abs()[:, None] + w.abs()[None] + kernel[1]).clamp(min=kernel[2])).sum(-1)


def run(kernel, h, w, g=None):
    """The kernels' s, dh and dw, in float64."""
    h, w = h.to(DEVICE), w.to(DEVICE)
    s = dt.forward(kernel, h, w)
    assert s.dtype == torch.float32 and s.shape == (len(h), len(w))
    dh, dw = torch.zeros_like(h), torch.zeros_like(w)
    dt.backward(kernel, h, w, s, torch.ones_like(s) if g is None else g.to(DEVICE), dh, dw)
    return [x.cpu().double() for x in (s, dh, dw)]


def oracle(kernel, h, w, g):
    h, w = h.double().requires_grad_(), w.double().requires_grad_()
    s = formula(kernel, h, w)
    return s.detach(), *torch.autograd.grad(s, (h, w), g.double())


def close(actual, expected, rtol=5e-6):
    """rtol is relative to the tensor's largest entry."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=rtol * expected.abs().max().item())


# -----------------------------------------------------------------------------
# values and gradients

@every
@pytest.mark.parametrize("N, V, D", [(48, 96, 72), (5, 130, 33), (130, 3, 5), (1, 1, 1)])
def test_matches_autograd(kernel, N, V, D):
    h, w, g = rand(N, D), rand(V, D, seed=1), rand(N, V, seed=2)
    for actual, expected in zip(run(kernel, h, w, g), oracle(kernel, h, w, g)):
        close(actual, expected)


@every
def test_scale(kernel):
    """Coordinates may be of 1e4 and of 1e-3, beside each other and apart."""
    cases = [
        (rand(6, 9, scale=1e4), rand(7, 9, seed=1, scale=1e4)),
        (rand(6, 9, scale=1e-3), rand(7, 9, seed=1, scale=1e-3)),
        (rand(6, 9) * 10.0 ** torch.arange(-3, 3)[:, None], rand(7, 9, seed=1)),
    ]
    for h, w in cases:
        g = rand(6, 7, seed=2)
        for actual, expected in zip(run(kernel, h, w, g), oracle(kernel, h, w, g)):
            close(actual, expected, 1e-5)


def test_adds_in_place():
    h, w, g = rand(5, 7), rand(130, 7, seed=1), rand(5, 130, seed=2)
    s, dh, dw = run(L1, h, w, g)
    for kind in (torch.ones, torch.zeros): # dh is a sum of parts, dw is not
        a, b = kind(5, 7).to(DEVICE), kind(130, 7).to(DEVICE)
        dt.backward(L1, h.to(DEVICE), w.to(DEVICE), s.float().to(DEVICE), g.to(DEVICE), a, b)
        close(a.cpu().double(), dh + kind(1).item())
        close(b.cpu().double(), dw + kind(1).item())


def test_views():
    """h and w may be rows of a larger matrix, g expanded or transposed."""
    h, w = rand(9, 12), rand(8, 12, seed=1)
    for g in (torch.ones(1, 1).expand(4, 8), rand(8, 4).T):
        for actual, expected in zip(run(L1, h[3:7, ::2], w[:, ::2], g), oracle(L1, h[3:7, ::2], w[:, ::2], g)):
            close(actual, expected)


def test_empty():
    for N, V in ((0, 3), (3, 0)):
        s, dh, dw = run(L1, rand(N, 4), rand(V, 4))
        assert s.numel() == 0 and not dh.any() and not dw.any()


# -----------------------------------------------------------------------------
# hard points

@all_but_l1
def test_equal_rows(kernel):
    """Where h = w, s is 0 and there is no gradient at all."""
    h = rand(6, 10)
    h[0], h[1] = 0, -0.0
    s, dh, dw = run(kernel, h, h.clone(), torch.eye(6))
    assert not s.diagonal().any() and not dh.any() and not dw.any()


@all_but_l1
def test_ties_have_no_sign(kernel):
    """Every other coordinate is equal: the gradient is exactly 0 there."""
    h, w = rand(4, 8), rand(1, 8, seed=1)
    h[:, ::2] = w[:, ::2]
    s, dh, dw = run(kernel, h, w)
    assert not dh[:, ::2].any() and not dw[:, ::2].any() and (dh[:, 1::2] != 0).any(1).all()


@pytest.mark.parametrize("kernel", [L1, HALF], ids=str)
def test_l1_where_coordinates_are_equal(kernel):
    """Its slope is what torch's own tiles take there, -1 for h and 1 for w: one comparison is enough for that."""
    h = rand(3, 10)
    w = rand(4, 10, seed=1)
    w[1:, ::2] = h[:, ::2]
    g = rand(3, 4, seed=2)
    s, dh, dw = run(kernel, h, w, g)
    dh_, dw_ = distances.l1().eager_backward(h, w, s, g)
    close(dh, dh_.double(), 2e-3)
    close(dw, dw_.double(), 2e-3)
    s, dh, dw = run(kernel, h, h.clone(), torch.eye(3))
    assert not s.diagonal().any() and (dh == -1).all() and (dw == 1).all()


def test_sign_is_exact():
    """The slope of l1 is -1, 0 or 1, even between neighbouring numbers, tiny or huge ones."""
    w = torch.tensor([[1.0, 1e4, -1e4, 1e-20, 0.0, 3.0, -7e-12]])
    h = torch.nextafter(w, torch.tensor(9e9)) # 0 becomes subnormal, where the slope may be less
    s, dh, dw = run(L1, h, w)
    assert (dh[0, [0, 1, 2, 3, 5, 6]] == 1).all() and 0 <= dh[0, 4] <= 1 and torch.equal(dh, -dw)


def relative(actual, expected):
    """The norm of the error, relative to that of what is expected."""
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("N, V, D", [(48, 96, 72), (5, 130, 33), (130, 3, 5), (1, 1, 1)])
@pytest.mark.parametrize("scale", [2.0 ** 13, 1.0, 2.0 ** -66])
def test_half(N, V, D, scale):
    """In fp16 values keep three digits, and the gradient is that of the rounded coordinates, at any scale of them."""
    h, w = rand(N, D), rand(V, D, seed=1)
    g = rand(N, V, seed=2) * 10.0 ** torch.arange(-N, 0).clamp(min=-30)[:, None] # rows of very different sizes
    s, dh, dw = run(HALF, scale * h, scale * w, g)
    torch.testing.assert_close(s, scale * formula(L1, h.double(), w.double()), rtol=2e-3, atol=0)
    dh_, dw_ = distances.l1().eager_backward(h.half().double(), w.half().double(), s, g.double())
    assert ((dh - dh_).abs().amax(1) < 2e-3 * g.double().abs().sum(1)).all()
    assert ((dw - dw_).abs().amax(1) < 2e-3 * g.double().abs().sum(0)).all()


def test_half_beside_bf16():
    """RESULTS.md has these errors: of 768 dimensions, a sum in fp16 errs less than a product of bf16 operands does."""
    h, w = rand(24, 768), rand(64, 768, seed=1)
    s, _, _ = run(HALF, h, w)
    exact = formula(L1, h.double(), w.double())
    bf16 = formula(L1, h.bfloat16().double(), w.bfloat16().double())
    error, error_of_bf16 = s / exact - 1, bf16 / exact - 1
    assert error.square().mean().sqrt() < 6e-5 < error_of_bf16.square().mean().sqrt()
    assert error.abs().max() < 3e-4
    assert abs(error.mean()) < 5e-6 # it is not biased


@every
def test_tiny_and_large(kernel):
    """Nothing overflows or vanishes into NaN, and no norm has a slope beyond 1."""
    for scales in ((1e-20,), (1e4,), (1e-20, 1e4), (0.0, 1e-30, 1e15)):
        h = torch.cat([rand(3, 8, seed=i, scale=x) for i, x in enumerate(scales)])
        w = torch.cat([rand(3, 8, seed=9 + i, scale=x) for i, x in enumerate(scales)])
        w[0] = h[0]
        for pair in itertools.product((0, len(h) - 1), (0, len(w) - 1)):
            g = torch.zeros(len(h), len(w))
            g[pair] = 1
            results = run(kernel, h, w, g)
            assert all(x.isfinite().all() for x in results)
            if kernel[0] != "canberra":
                assert max(x.abs().max() for x in results[1:]) <= 1 + 1e-5
                close(results[0], formula(kernel, h.double(), w.double()), 1e-5)
            if len(scales) == 1 and pair != (0, 0):
                i, j = pair # alone, as autograd of a norm is NaN where the row's own h = w
                _, dh, dw = oracle(kernel, h[i:i + 1], w[j:j + 1], torch.ones(1, 1))
                close(results[1][i:i + 1], dh, 1e-5)
                close(results[2][j:j + 1], dw, 1e-5)


@pytest.mark.parametrize("kernel", [LINF, *LP], ids=str)
def test_close_pairs_beside_large_ones(kernel):
    """The differences are those of the given numbers: a pair of nearly equal rows is as exact as any other."""
    w = rand(5, 9)
    h = w + rand(5, 9, seed=1, scale=1e-4)
    w[4] *= 1e4
    for actual, expected in zip(run(kernel, h, w, torch.eye(5)), oracle(kernel, h, w, torch.eye(5))):
        close(actual, expected)
    close(run(kernel, h, w)[0].diagonal()[:4], formula(kernel, h.double(), w.double()).diagonal()[:4])


def test_linf_shares_ties():
    h, w = torch.tensor([[1.0, -1.0, 1.0, 0.5], [2.0, 0.0, 0.0, 0.0]]), torch.zeros(1, 4)
    s, dh, dw = run(LINF, h, w)
    close(dh, torch.tensor([[1, -1, 1, 0], [3, 0, 0, 0]]).double() / 3)
    close(dw, -dh.sum(0, keepdim=True))


def test_masked_target():
    """A pair whose s was put in from elsewhere counts for nothing if its g is 0."""
    for kernel in ALL:
        h, w, g = rand(3, 6), rand(4, 6, seed=1), rand(3, 4, seed=2)
        g[1, 2] = 0
        h, w, g = (x.to(DEVICE) for x in (h, w, g))
        s = dt.forward(kernel, h, w)
        for value in (0.0, 1e-38, 1e-20, 1e20):
            s[1, 2] = value
            dh, dw = torch.zeros_like(h), torch.zeros_like(w)
            dt.backward(kernel, h, w, s, g, dh, dw)
            _, dh_, dw_ = oracle(kernel, h.cpu(), w.cpu(), g.cpu())
            close(dh.cpu().double(), dh_)
            close(dw.cpu().double(), dw_)


def test_canberra_floor_and_zeros():
    h, w = torch.tensor([[0.1, 0.2, 0.0, 3.0, -2.0]]), torch.tensor([[0.2, 0.1, 0.3, 0.0, 1.0]])
    for kernel in (CANBERRA, FLOOR, ("canberra", 0.0, 0.0)):
        for actual, expected in zip(run(kernel, h, w), oracle(kernel, h, w, torch.ones(1, 1))):
            close(actual, expected)
    s, dh, dw = run(("canberra", 0.0, 0.0), torch.zeros(1, 3), torch.zeros(1, 3))
    assert not s.any() and not dh.any() and not dw.any() # 0 / 0 is 0


def test_supports():
    assert all(dt.supports(k) for k in [*ALL, HALF])
    assert not any(dt.supports(k) for k in [("lp", 1.0), ("lp", 4.5), ("mm",), ("l1", "full"), ("linf", "half")])


def test_a_given_place_is_filled():
    """forward(..., out) fills a matrix, or a part of one, and returns it."""
    h, w = rand(3, 6).to(DEVICE), rand(4, 6, seed=1).to(DEVICE)
    for kernel in (L1, HALF, CANBERRA):
        expected = dt.forward(kernel, h, w)
        for out in (torch.full((3, 4), torch.nan), torch.full((3, 9), torch.nan)[:, ::2][:, :4]):
            out = out.to(DEVICE)
            assert dt.forward(kernel, h, w, out) is out and torch.equal(out, expected)


# -----------------------------------------------------------------------------
# the budget: what a GPU would execute, compiled here

BUDGET = { # instructions per element: forward, backward
    "l1": (2.4, 2.5), "l1 half": (1.5, 1.6), "linf": (2.4, 3.9), "ties": (3.4, None), "l1.5": (3.5, 5.8),
    "l3": (3.5, 3.8), "lp": (5.4, 7.8), "canberra": (6.5, 11.5),
    "canberra with floor": (7.5, 16.6), # backward, Triton 3.9 makes 14.4 of it, 3.6 16.5
}


def test_budget():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, os.path.join(ROOT, "distances_triton.py")]
    out = subprocess.run(command, capture_output=True, text=True, env=env)
    if out.returncode == 1 and "cannot be compiled" in out.stderr:
        pytest.skip(out.stderr.strip().splitlines()[-1])
    assert out.returncode == 0, out.stderr
    rows = re.findall(r"^(\S.*?) +(forward|backward) +(\S+) +(\d+) +(\d+)$", out.stdout, re.M)
    budget = {}
    for name, (forward, backward) in BUDGET.items():
        budget[name, "forward"] = forward
        if backward is not None:
            budget[name, "backward"] = backward
    assert {(name, step) for name, step, *_ in rows} == budget.keys()
    for name, step, instructions, registers, spills in rows:
        assert 1.25 < float(instructions) <= budget[name, step], (name, step, instructions)
        assert int(registers) <= 255 and int(spills) == 0, (name, step, registers, spills)
