"""
The fast paths (low-precision products, compiled tiles, GPU kernels) give the numbers of the plain one.

$ pytest tests/test_fast.py
"""
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import distances
from distances import DISTANCES, Distance, DistanceHead, SquaredL2, Tiles, pairwise

pytestmark = pytest.mark.usefixtures("large")
ALL = [(distance, variant) for distance, variants in DISTANCES.items() for variant in variants]
ELEMENTWISE = [pair for pair in ALL if isinstance(DistanceHead(4, 3, *pair).core, Tiles)]
ELEMENTWISE += [("minkowski", "p=3"), ("minkowski", "p=7")]


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(distance, variant, D, V, **kwargs):
    kwargs = {"n": 3.0, **kwargs}
    if variant and variant.startswith("p="):
        kwargs["p"] = float(variant.removeprefix("p="))
        variant = None
    head = DistanceHead(D, V, distance, variant, **kwargs).eval()
    with torch.no_grad():
        head.weight.copy_(rand(V, D, seed=1))
    return head


def loss_and_gradients(head, h, y, **kwargs):
    h = h.clone().requires_grad_()
    loss = head.loss(h, y, **kwargs)
    return [loss.detach(), *torch.autograd.grad(loss, [h, *head.parameters()])]


def check(actual, expected, rtol):
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).norm() <= rtol * b.norm() + 1e-9, ((a - b).norm() / b.norm()).item()


# -----------------------------------------------------------------------------
# matrix products of rounded operands

@pytest.mark.parametrize("n, ratio", [(27.7, 2.0), (4.0, 0.1), (2.0, 0.03), (1.0, 0.01)])
def test_the_target_stays_out_of_the_rounded_product(n, ratio):
    """
    The features lie at ratio x |w_y| from their targets, and bf16 represents all numbers. The gradient's relative error
    with the identity under autocast ("before") is compared with that of the loss on bf16 operands ("after").
    """
    D, V, y = 768, 256, torch.arange(64)
    head = make("euclidean", None, D, V, n=n, eps=0.0)
    with torch.no_grad():
        head.weight.copy_(head.weight.bfloat16())
    w = head.weight.detach()
    direction = F.normalize(rand(64, D, seed=2), dim=1)
    h = w[y] + ratio * w[y].norm(dim=1, keepdim=True) * direction
    h = h.bfloat16().float().requires_grad_()

    def gradient(d2, x):
        return torch.autograd.grad(F.cross_entropy(-n / 2 * d2.log(), y), x)[0]

    h64 = h.detach().double().requires_grad_()
    exact = gradient((h64[:, None] - w.double()).square().sum(-1), h64)

    def error(g):
        return ((g - exact).norm() / exact.norm()).item()

    with torch.autocast("cpu", torch.bfloat16):
        d2 = (h ** 2).sum(-1)[:, None] + (w ** 2).sum(-1) - 2 * h @ w.T
    before = error(gradient(d2.clamp_min(1e-8), h))
    head.mm_dtype = torch.bfloat16
    after = error(loss_and_gradients(head, h.detach(), y)[1])
    # before and after were seen to be 5e-3 and 2e-4, 0.31 and 2e-5, 0.65 and 3e-6, 0.96 and 6e-7
    assert before > 3e-3 and after < 1e-3 and after < before / 5, (before, after)


def test_norms_are_those_of_the_rounded_operands():
    """The squared distance of bf16 vectors has fp32's accuracy; norms of the unrounded ones would be off by 2^-9."""
    h, w = rand(20, 256), rand(30, 256, seed=1)
    h16, w16 = h.bfloat16(), w.bfloat16()
    s = distances.all_pairs(SquaredL2(), h16, w16)
    assert s.dtype == torch.float32
    exact = torch.cdist(h16.double(), w16.double()) ** 2
    assert ((s - exact).abs() / exact).max() < 2e-6


@pytest.mark.parametrize("distance, variant", [
    ("baseline", None),
    ("euclidean", None),
    ("cosine", "stable"),
    ("cosine", "unstable"),
    ("mahalanobis", "standard"),
    ("chebyshev", "cosh"),
])
def test_bf16_operands_change_little(distance, variant):
    head = make(distance, variant, 64, 200, n=8.0)
    h, y = rand(50, 64) / 4, torch.arange(50)
    with torch.no_grad():
        head.weight /= 4
    exact = loss_and_gradients(head, h, y)
    head.mm_dtype = torch.bfloat16
    rounded = loss_and_gradients(head, h, y)
    assert not torch.equal(rounded[1], exact[1]) # the rounding took place
    check(rounded, exact, 0.02)


# -----------------------------------------------------------------------------
# compiled tiles: the tiles are tested for every distance, torch.compile itself for one function of each kind

@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(Tiles, "tile", (4, 8))
    monkeypatch.setattr(distances.torch, "compile", lambda fn, **kwargs: fn)


@pytest.mark.parametrize("distance, variant", ELEMENTWISE)
def test_ragged_tiles(distance, variant, small_tiles):
    head = make(distance, variant, 6, 19, learn_n=True, num_classes=18)
    h, y = rand(11, 6), torch.arange(11)
    h[3] = head.weight[3].detach() # one feature lies on its target
    y[5] = -100
    eager = loss_and_gradients(head, h, y, chunk=7)
    head.compile_loss()
    check(loss_and_gradients(head, h, y, chunk=7), eager, 2e-5)
    plain = make(distance, variant, 6, 19, num_classes=18)
    torch.testing.assert_close(head.distances(h), plain.distances(h), rtol=1e-5, atol=1e-6)


def test_many_heads_keep_their_compiled_functions(monkeypatch):
    """Dynamo keeps eight entries for a code object: with more heads than that, every tile is still compiled."""
    real = torch.compile

    def compile_to_eager(fn, **kwargs):
        return real(fn, backend="eager", **kwargs) # distances.py asks for fullgraph, so that past the limit this raises

    monkeypatch.setattr(distances.torch, "compile", compile_to_eager)
    for D in range(3, 15):
        head = make("manhattan", None, D, 6)
        h, y = rand(5, D), torch.arange(5)
        eager = head.loss(h, y)
        head.compile_loss()
        torch.testing.assert_close(head.loss(h, y), eager)


@pytest.fixture(scope="module")
def compiler():
    try:
        torch.compile(lambda x: x + 1)(torch.ones(3))
    except Exception as e:
        pytest.skip(f"torch.compile does not work here: {type(e).__name__}")


@pytest.mark.parametrize("distance, variant", [
    ("manhattan", None),
    ("minkowski", "standard"),
    ("chebyshev", "standard"),
    ("canberra", "weighted"),
    ("euclidean", None),
])
def test_compiled_equals_eager(distance, variant, compiler):
    head = make(distance, variant, 8, 600, learn_n=True, num_classes=590)
    h, y = rand(300, 8, seed=2), torch.arange(300) # no coordinate equals one of w: |x| has many slopes there
    eager = loss_and_gradients(head, h, y)
    head.compile_loss()
    check(loss_and_gradients(head, h, y), eager, 1e-5)
    # the same compiled functions take other sizes
    plain = make(distance, variant, 8, 600, learn_n=True, num_classes=590)
    part = loss_and_gradients(plain, h[:100], y[:100])
    check(loss_and_gradients(head, h[:100], y[:100]), part, 1e-5)
    plain = make(distance, variant, 8, 600, num_classes=590)
    with torch.no_grad():
        torch.testing.assert_close(head.loss(h[:7], y[:7]), plain.loss(h[:7], y[:7]))


def test_a_distance_of_ones_own_is_compiled_with_its_gradient(compiler, monkeypatch):
    """One line is enough: torch.compile fuses the gradient that autograd finds, and never holds N x V x D numbers."""
    def squared_chord(h, w):
        return ((h.abs() + 1e-3).sqrt() - (w.abs() + 1e-3).sqrt()).square().sum(-1)

    entry = {"standard": Distance(lambda o: Tiles(squared_chord))}
    monkeypatch.setitem(DISTANCES, "squared_chord", entry)
    head = make("squared_chord", None, 8, 600)
    h, y = rand(300, 8), torch.arange(300)
    eager = loss_and_gradients(head, h, y)
    head.compile_loss()
    check(loss_and_gradients(head, h, y), eager, 1e-5)


# -----------------------------------------------------------------------------
# GPU kernels

# triton's interpreter warns where log2(0) = -inf and clamp(inf) are meant
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:overflow")
@pytest.mark.parametrize("distance, variant", ELEMENTWISE)
def test_heads_on_the_gpu_kernels(distance, variant, monkeypatch):
    """The whole loss runs on the kernels of distances_triton.py, on a GPU if there is one, else in the interpreter."""
    pytest.importorskip("triton", reason="triton is not installed")
    import distances_triton
    device = "cuda" if torch.cuda.is_available() else "cpu"
    head = make(distance, variant, 6, 40, num_classes=38).to(device)
    if not head.core.kernel or not distances_triton.supports(head.core.kernel):
        pytest.skip("has no kernel: compiled tiles on a GPU")
    h, y = rand(9, 6).to(device), torch.arange(9, device=device)
    head.core.triton = False
    eager = loss_and_gradients(head, h, y)
    d = head.distances(h)
    head.core.triton = True
    calls = []

    def gpu_kernels(core, h):
        calls.append(h)
        return distances_triton

    if device == "cpu":
        monkeypatch.setattr(Tiles, "gpu_kernels", gpu_kernels)
    check(loss_and_gradients(head, h, y), eager, 1e-5)
    torch.testing.assert_close(head.distances(h), d, rtol=1e-5, atol=1e-6)
    assert calls or device == "cuda"


ALONE = """
import sys, torch, distances
sys.modules["numpy"] = None
head = distances.DistanceHead(4, 3, "manhattan")
print(head.loss(torch.ones(2, 4), torch.tensor([0, 1])) > 0)
"""


def test_distances_needs_torch_only(tmp_path):
    """Copied alone, without distances_triton.py, the file still imports and runs."""
    shutil.copy(distances.__file__, tmp_path)
    run = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""})
    assert run.returncode == 0 and "True" in run.stdout, run.stderr


# -----------------------------------------------------------------------------
# values

def test_hard_bits_at_the_threshold():
    """A coordinate just above the threshold is a 1 although its sigmoid rounds to 0.5."""
    h = torch.tensor([[1e-9, -1e-9, 0.0, 1e-30]])
    w = torch.tensor([[-1.0] * 4, [1.0] * 4])
    torch.testing.assert_close(pairwise(h, w, "hamming", "hard", eps=0.0), torch.tensor([[0.5, 0.5]]))
    h = torch.tensor([[0.3, 0.30001]])
    assert pairwise(h, torch.zeros(1, 2), "hamming", "hard", eps=0.0, threshold=0.3).item() == 0.5


def test_cosh_is_smooth_chebyshev_but_for_close_coordinates():
    """
    The variant cosh sums over both signs of every coordinate. It exceeds logsumexp(alpha |x|) / alpha by log(2) / alpha
    at most, which is reached at h = w.
    """
    h, w = rand(20, 30).double() / 4, rand(25, 30, seed=1).double() / 4
    smooth = pairwise(h, w, "chebyshev", "smooth", alpha=20.0)
    cosh = pairwise(h, w, "chebyshev", "cosh", alpha=20.0)
    assert (cosh > smooth).all()
    assert (cosh - smooth).max() < 0.01
    assert (cosh - smooth).median() < 1e-3
    same = pairwise(h, h, "chebyshev", "cosh", alpha=20.0) - pairwise(h, h, "chebyshev", "smooth", alpha=20.0)
    torch.testing.assert_close(same.diagonal(), torch.full((20,), 0.6931471805599453 / 20).double())


def test_minkowski_in_fp32_from_tiny_to_large():
    """(sum |x|^p)^(1/p) neither overflows nor underflows on the way, for coordinates from 1e-6 to 1e6."""
    for p in (1.2, 1.5, 3.0, 4.0, 5.0, 40.0):
        for scale in (1e-6, 1.0, 1e6):
            h, w = scale * rand(10, 8), scale * rand(12, 8, seed=1)
            x = (h.double()[:, None] - w.double()).abs() / scale
            exact = x.pow(p).sum(-1).pow(1 / p) * scale
            d = pairwise(h, w, "minkowski", eps=0.0, p=p).double()
            torch.testing.assert_close(d, exact, rtol=1e-5, atol=0)
