"""The fast paths give what the plain one gives: low-precision products, compiled tiles, GPU kernels."""
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import distances
from distances import DISTANCES, Distance, DistanceHead, SquaredL2, Tiles, pairwise

ELEMENTWISE = [(d, v) for d, variants in DISTANCES.items() for v in variants if isinstance(DistanceHead(4, 3, d, v).core, Tiles)] + [("minkowski", "p=3"), ("minkowski", "p=7")]


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(distance, variant, D, V, **kwargs):
    p = float(variant[2:]) if variant and variant.startswith("p=") else None
    head = DistanceHead(D, V, distance, None if p else variant, **{"n": 3.0, **({"p": p} if p else {}), **kwargs}).eval()
    with torch.no_grad():
        head.weight.copy_(rand(V, D, seed=1))
    return head


def loss_and_gradients(head, h, y, **kwargs):
    h = h.clone().requires_grad_()
    loss = head.loss(h, y, **kwargs)
    return [loss.detach(), *torch.autograd.grad(loss, [h, *head.parameters()])]


def check(actual, expected, rtol):
    for a, b in zip(actual, expected, strict=True):
        assert ((a - b).norm() <= rtol * b.norm() + 1e-9), ((a - b).norm() / b.norm()).item()


# -----------------------------------------------------------------------------
# matrix products of rounded operands

@pytest.mark.parametrize("n, ratio", [(27.7, 2.0), (4.0, 0.1), (2.0, 0.03), (1.0, 0.01)])
def test_the_target_stays_out_of_the_rounded_product(n, ratio):
    """Features at ratio x |w_y| from their targets, everything representable in bf16. Before: the identity under autocast. After: the loss
    on bf16 operands. The error of the gradient, relative to the gradient, before and after."""
    D, V, y = 768, 256, torch.arange(64)
    head = make("euclidean", None, D, V, n=n, eps=0.0)
    with torch.no_grad():
        head.weight.copy_(head.weight.bfloat16())
    w = head.weight.detach()
    h = (w[y] + ratio * w[y].norm(dim=1, keepdim=True) * F.normalize(rand(64, D, seed=2), dim=1)).bfloat16().float().requires_grad_()

    def gradient(d2, x):
        return torch.autograd.grad(F.cross_entropy(-n / 2 * d2.log(), y), x)[0]

    h64 = h.detach().double().requires_grad_()
    exact = gradient((h64[:, None] - w.double()).square().sum(-1), h64)
    with torch.autocast("cpu", torch.bfloat16):
        d2 = (h ** 2).sum(-1)[:, None] + (w ** 2).sum(-1) - 2 * h @ w.T
    before = gradient(d2.clamp_min(1e-8), h)
    head.mm_dtype = torch.bfloat16
    after = loss_and_gradients(head, h.detach(), y)[1]
    before, after = (((g - exact).norm() / exact.norm()).item() for g in (before, after))
    # seen: 5e-3 -> 2e-4, 0.31 -> 2e-5, 0.65 -> 3e-6, 0.96 -> 6e-7
    assert before > 3e-3 and after < 1e-3 and after < before / 5, (before, after)


def test_norms_are_those_of_the_rounded_operands():
    """s of two bf16 vectors is their own distance to fp32's accuracy; norms of the unrounded vectors would be off by 2^-9."""
    h, w = rand(20, 256), rand(30, 256, seed=1)
    h16, w16 = h.bfloat16(), w.bfloat16()
    s = distances.all_pairs(SquaredL2(), h16, w16)
    assert s.dtype == torch.float32
    exact = torch.cdist(h16.double(), w16.double()) ** 2
    assert ((s - exact).abs() / exact).max() < 2e-6


@pytest.mark.parametrize("distance, variant", [("baseline", None), ("euclidean", None), ("cosine", "stable"), ("cosine", "unstable"), ("mahalanobis", "standard"),
                                               ("chebyshev", "cosh")])
def test_bf16_operands_change_little(distance, variant):
    head = make(distance, variant, 64, 200, n=8.0)
    h, y = rand(50, 64) / 4, torch.arange(50)
    with torch.no_grad():
        head.weight /= 4
    exact = loss_and_gradients(head, h, y)
    head.mm_dtype = torch.bfloat16
    rounded = loss_and_gradients(head, h, y)
    assert not torch.equal(rounded[1], exact[1]) # it was used
    check(rounded, exact, 0.02)


# -----------------------------------------------------------------------------
# compiled tiles. That torch.compile is right about one function of each kind is tested below; the tiles around it for every distance

@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(Tiles, "tile", (4, 8))
    monkeypatch.setattr(distances.torch, "compile", lambda fn, **kwargs: fn)


@pytest.mark.parametrize("distance, variant", ELEMENTWISE)
def test_ragged_tiles(distance, variant, small_tiles):
    head = make(distance, variant, 6, 19, learn_n=True, num_classes=18)
    h, y = rand(11, 6), torch.arange(11)
    h[3] = head.weight[3].detach() # the target itself
    y[5] = -1
    eager = loss_and_gradients(head, h, y, chunk=7)
    head.compile_loss()
    check(loss_and_gradients(head, h, y, chunk=7), eager, 2e-5)
    torch.testing.assert_close(head.distances(h), make(distance, variant, 6, 19, num_classes=18).distances(h), rtol=1e-5, atol=1e-6)


def test_many_heads_keep_their_compiled_functions(monkeypatch):
    """Dynamo's caches belong to a code object, eight entries each: with more heads than that in one process every tile is still compiled."""
    real = torch.compile
    monkeypatch.setattr(distances.torch, "compile", lambda fn, **kwargs: real(fn, backend="eager", **kwargs)) # fullgraph: past the limit it raises
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


@pytest.mark.parametrize("distance, variant", [("manhattan", None), ("minkowski", "standard"), ("chebyshev", "standard"), ("canberra", "weighted"), ("euclidean", None)])
def test_compiled_equals_eager(distance, variant, compiler):
    head = make(distance, variant, 8, 600, learn_n=True, num_classes=590)
    h, y = rand(300, 8), torch.arange(300)
    eager = loss_and_gradients(head, h, y)
    head.compile_loss()
    check(loss_and_gradients(head, h, y), eager, 1e-5)
    part = loss_and_gradients(make(distance, variant, 8, 600, learn_n=True, num_classes=590), h[:100], y[:100])
    check(loss_and_gradients(head, h[:100], y[:100]), part, 1e-5) # other sizes, in the same functions
    with torch.no_grad():
        torch.testing.assert_close(head.loss(h[:7], y[:7]), make(distance, variant, 8, 600, num_classes=590).loss(h[:7], y[:7]))


def test_a_distance_of_ones_own_is_compiled_with_its_gradient(compiler, monkeypatch):
    """From one line: torch.compile fuses the gradient that autograd finds, and never holds N x V x D."""
    entry = {"standard": Distance(lambda o: Tiles(lambda h, w: ((h.abs() + 1e-3).sqrt() - (w.abs() + 1e-3).sqrt()).square().sum(-1)))}
    monkeypatch.setitem(DISTANCES, "squared_chord", entry)
    head = make("squared_chord", None, 8, 600)
    h, y = rand(300, 8), torch.arange(300)
    eager = loss_and_gradients(head, h, y)
    head.compile_loss()
    check(loss_and_gradients(head, h, y), eager, 1e-5)


# -----------------------------------------------------------------------------
# GPU kernels

@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:overflow") # the interpreter's, where log2(0) = -inf and clamp(inf) are meant
@pytest.mark.parametrize("distance, variant", ELEMENTWISE)
def test_heads_on_the_gpu_kernels(distance, variant, monkeypatch):
    """The whole loss on the kernels of distances_triton.py: in its interpreter, or on the GPU where there is one."""
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
    head.core.triton, calls = True, []
    if device == "cpu":
        monkeypatch.setattr(Tiles, "gpu_kernels", lambda core, h: calls.append(h) or distances_triton)
    check(loss_and_gradients(head, h, y), eager, 1e-5)
    torch.testing.assert_close(head.distances(h), d, rtol=1e-5, atol=1e-6)
    assert calls or device == "cuda"


def test_distances_needs_torch_only(tmp_path):
    """Copied alone, without distances_triton.py, it imports and runs."""
    (tmp_path / "distances.py").write_bytes(open(distances.__file__, "rb").read())
    code = "import sys, torch, distances; sys.modules['numpy'] = None; print(distances.DistanceHead(4, 3, 'manhattan').loss(torch.ones(2, 4), torch.tensor([0, 1])) > 0)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""})
    assert run.returncode == 0 and "True" in run.stdout, run.stderr


# -----------------------------------------------------------------------------
# values

def test_hard_bits_at_the_threshold():
    """A coordinate just above the threshold is a 1 although its sigmoid rounds to 0.5."""
    h, w = torch.tensor([[1e-9, -1e-9, 0.0, 1e-30]]), torch.tensor([[-1.0] * 4, [1.0] * 4])
    torch.testing.assert_close(pairwise(h, w, "hamming", "hard", eps=0.0), torch.tensor([[0.5, 0.5]]))
    assert pairwise(torch.tensor([[0.3, 0.30001]]), torch.zeros(1, 2), "hamming", "hard", eps=0.0, threshold=0.3).item() == 0.5


def test_cosh_is_smooth_chebyshev_but_for_close_coordinates():
    """Both signs of every coordinate in the sum: above logsumexp(alpha |x|) / alpha by at most log(2) / alpha, at h = w."""
    h, w = rand(20, 30).double() / 4, rand(25, 30, seed=1).double() / 4
    smooth, cosh = pairwise(h, w, "chebyshev", "smooth", alpha=20.0), pairwise(h, w, "chebyshev", "cosh", alpha=20.0)
    assert (cosh > smooth).all() and (cosh - smooth).max() < 0.01 and (cosh - smooth).median() < 1e-3
    same = pairwise(h, h, "chebyshev", "cosh", alpha=20.0) - pairwise(h, h, "chebyshev", "smooth", alpha=20.0)
    torch.testing.assert_close(same.diagonal(), torch.full((20,), 0.6931471805599453 / 20).double())


def test_minkowski_in_fp32_from_tiny_to_large():
    """(sum |x|^p)^(1/p) without over- or underflow on the way, for coordinates from 1e-6 to 1e6."""
    for p in (1.2, 1.5, 3.0, 4.0, 5.0, 40.0):
        for scale in (1e-6, 1.0, 1e6):
            h, w = scale * rand(10, 8), scale * rand(12, 8, seed=1)
            exact = ((h.double()[:, None] - w.double()).abs() / scale).pow(p).sum(-1).pow(1 / p) * scale
            torch.testing.assert_close(pairwise(h, w, "minkowski", eps=0.0, p=p).double(), exact, rtol=1e-5, atol=0)
