"""
What runs on a GPU, against float64 on the CPU: products of bf16 operands, kernels, heads in every precision, training.
`make gpu-tests` runs it, with test_triton.py; without a GPU every test is skipped. GPU_TINY=1 in the environment runs
on a CPU what can run there, to try the tests themselves.

$ make gpu-tests
$ python -m pytest tests/test_gpu.py -k deterministic
"""
import copy
import importlib.util
import os
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import HARD, assert_close_runs, assert_same_training, load, metrics, run_script, train

import bench_rivals
import distances
from distances import DISTANCES, DistanceHead, add_product, parse_head

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
HAS_TRITON = importlib.util.find_spec("triton") is not None
pytestmark = [
    pytest.mark.skipif(not ON_GPU and "GPU_TINY" not in os.environ, reason="there is no GPU"),
    pytest.mark.filterwarnings("ignore:divide by zero", "ignore:overflow"), # of Triton's interpreter
]
gpu_only = pytest.mark.skipif(not ON_GPU, reason="there is no GPU")

HEADS = ["baseline", *(f"{distance}:{variant}" for distance in DISTANCES for variant in DISTANCES[distance]),
         "minkowski:p=2", "minkowski:p=3"]
KERNELS = [("l1",), ("l1", "half"), ("linf",), ("lp", 1.5), ("lp", 3.0), ("lp", 2.5), ("canberra", 1e-4, 0.0),
           ("canberra", 1e-4, 0.01)]
all_heads = pytest.mark.parametrize("text", HEADS)
N, V, D = (320, 1000, 64) if ON_GPU else (40, 300, 16)


@pytest.fixture(autouse=True)
def as_in_training():
    """Scripts allow tf32; nothing of a test stays."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(text, rows=N, columns=V, dimensions=D):
    """An eager head on the device that checks nothing, and h (rows, D), y (rows,); ten prototypes are padding."""
    torch.manual_seed(0)
    head = DistanceHead(dimensions, columns, **parse_head(text), n=8.0, num_classes=columns - 10)
    head.validate = False
    head.compile_loss(False)
    y = torch.randint(columns - 10, (rows,), generator=torch.Generator().manual_seed(1))
    y[1::7] = y[0] # a word that comes often
    h = dimensions ** -0.5 * rand(rows, dimensions)
    return head.to(DEVICE).eval(), h.to(DEVICE).requires_grad_(), y.to(DEVICE) # eval: no noise


def exact(head, h, y):
    """Loss and gradients of h and all parameters in float64, on the CPU, from the scores of all pairs."""
    head, h = copy.deepcopy(head).cpu().double(), h.detach().cpu().double().requires_grad_()
    loss = F.cross_entropy(head(h), y.cpu())
    return loss.detach(), *torch.autograd.grad(loss, [h, *head.parameters()])


def loss_and_gradients(head, h, y, chunk=100, dtype=None):
    with torch.autocast(DEVICE, dtype=dtype, enabled=dtype is not None):
        loss = head.loss(h, y, chunk=chunk) # three chunks and a part of one
    return loss.detach(), *torch.autograd.grad(loss, [h, *head.parameters()])


def error(actual, expected):
    """The norm of the error relative to that of what is expected; 0 where both are 0."""
    difference = (actual.detach().cpu().double() - expected.detach().cpu().double()).norm()
    return (difference / expected.detach().cpu().double().norm().clamp_min(1e-300)).item()


def check(actual, expected, tolerance):
    assert actual[0].item() == pytest.approx(expected[0].item(), rel=tolerance)
    for x, y in zip(actual[1:], expected[1:], strict=True):
        assert x.isfinite().all()
        assert error(x, y) < tolerance

# -----------------------------------------------------------------------------
# what all others stand on


@gpu_only
@pytest.mark.parametrize("K", [64, 768, 4096])
def test_products_of_bf16_operands_add_up_in_fp32(K):
    """add_product in the three forms that a head takes: into a part of a matrix, with transposed operands, onto it."""
    a, b = rand(300, K).cuda().bfloat16(), rand(500, K, seed=1).cuda().bfloat16()
    expected = a.double() @ b.double().T
    out = torch.full((400, 500), torch.nan, device="cuda")
    add_product(out[50:350], a, b.T, beta=0) # scores
    assert error(out[50:350], expected) < 1e-5 and out[:50].isnan().all() and out[350:].isnan().all()
    g = out[50:350].bfloat16()
    dh, dw = torch.ones(300, K, device="cuda"), torch.ones(500, K, device="cuda")
    add_product(dh, g, b, alpha=-2)
    add_product(dw, g.T, a, alpha=-2)
    assert error(dh, 1 - 2 * g.double() @ b.double()) < 1e-5
    assert error(dw, 1 - 2 * g.double().T @ a.double()) < 1e-5


LARGE = [(129, 1003, 768), (64, 130, 4096), (1280, 4096, 96)] if ON_GPU else [(5, 66, 9)]


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: "-".join(map(str, kernel)))
@pytest.mark.parametrize("size", LARGE, ids=str)
def test_kernels_at_the_sizes_of_models(kernel, size):
    import distances_triton as dt
    rows, columns, dimensions = size
    h, w, g = rand(rows, dimensions), rand(columns, dimensions, seed=1), rand(rows, columns, seed=2)
    if kernel == ("l1", "half"): # whose gradient is that of rounded coordinates
        h, w = h.half().float(), w.half().float()
    on_device = [x.to(DEVICE) for x in (h, w, g)]
    s = dt.forward(kernel, *on_device[:2])
    dh, dw = (torch.zeros_like(x) for x in on_device[:2])
    dt.backward(kernel, *on_device[:2], s, on_device[2], dh, dw)
    expected = exact_pairs(kernel, *on_device)
    for actual, of_formula, tolerance in zip((s, dh, dw), expected, (2e-6, 2e-5, 2e-5)):
        assert error(actual, of_formula) < (2e-3 if "half" in kernel else tolerance)


def exact_pairs(kernel, h, w, g):
    """s (N, V) and the gradients of sum(g s) in float64, from the formula, a few rows at a time."""
    h, w = h.double().requires_grad_(), w.double().requires_grad_()
    parts = []
    for h_part, g_part in zip(h.split(8), g.split(8)):
        x = h_part[:, None] - w
        x = x.where(x > 0, -x) if kernel[0] == "l1" else x.abs() # whose slope is -1 at 0
        if kernel[0] == "l1":
            part = x.sum(-1)
        elif kernel[0] == "linf":
            part = x.amax(-1)
        elif kernel[0] == "lp":
            part = (x ** kernel[1]).sum(-1) ** (1 / kernel[1])
        else:
            part = (x / (h_part.abs()[:, None] + w.abs() + kernel[1]).clamp_min(kernel[2])).sum(-1)
        (g_part.double() * part).sum().backward()
        parts.append(part.detach())
    return torch.cat(parts), h.grad, w.grad


@gpu_only
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_more_pairs_than_int32_can_count():
    import distances_triton as dt
    rows, columns = 43_008, 50_304 # 2.16e9 pairs
    if torch.cuda.mem_get_info()[0] < 60e9:
        pytest.skip("it takes 60 GB of memory")
    h, w = rand(rows, 8).cuda(), rand(columns, 8, seed=1).cuda()
    for kernel in (("l1",), ("linf",)):
        s = dt.forward(kernel, h, w)
        last_rows, last_columns = exact_pairs(kernel, h[-4:], w, s[-4:]), exact_pairs(kernel, h, w[-4:], s[:, -4:])
        assert error(s[-4:], last_rows[0]) < 2e-6 and error(s[:, -4:], last_columns[0]) < 2e-6
        dh, dw = torch.zeros_like(h), torch.zeros_like(w)
        dt.backward(kernel, h, w, s, s, dh, dw) # weighted by s itself, which saves another matrix
        assert error(dh[-4:], last_rows[1]) < 1e-4 and error(dw[-4:], last_columns[2]) < 1e-4

# -----------------------------------------------------------------------------
# heads


@all_heads
def test_tiny_heads_in_fp32(text):
    head, h, y = case(text)
    check(loss_and_gradients(head, h, y), exact(head, h, y), 2e-4)


@all_heads
def test_heads_under_bf16_autocast(text):
    """Only operands of matrix products are rounded, to 2^-9 of themselves."""
    head, h, y = case(text)
    check(loss_and_gradients(head, h, y, dtype=torch.bfloat16), exact(head, h, y), 3e-2)


@gpu_only
@all_heads
def test_heads_in_fp16_with_the_scaler(text):
    head, h, y = case(text)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0 ** 16)
    optimizer = torch.optim.SGD([h, *head.parameters()], lr=0.0)
    with torch.autocast("cuda", dtype=torch.float16):
        loss = head.loss(h.half(), y)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    expected = exact(head, h.half(), y)
    check([loss, h.grad, *(p.grad for p in head.parameters())], expected, 2e-3)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0 ** 16 # no step was skipped


@gpu_only
@pytest.mark.parametrize("text", ["euclidean", "cosine", "manhattan", "chebyshev:smooth"])
def test_compiled_heads(text):
    """What torch.compile makes of a head is the same, for a ragged last chunk too."""
    head, h, y = case(text)
    head.compile_loss(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=RuntimeWarning)
        compiled = loss_and_gradients(head, h, y)
    check(compiled, exact(head, h, y), 2e-4)
    check(loss_and_gradients(head, h, y, dtype=torch.bfloat16), exact(head, h, y), 3e-2)


@all_heads
def test_tiny_heads_do_not_hang_on_tf32(text):
    """Scripts allow tf32, which keeps three digits; the loss is the same where it is forbidden."""
    head, h, y = case(text)
    allowed = loss_and_gradients(head, h, y)
    torch.set_float32_matmul_precision("highest")
    check(loss_and_gradients(head, h, y), allowed, 1e-5)
    assert torch.get_float32_matmul_precision() == "highest"


def test_tiny_close_prototypes():
    """However close h comes to its own prototype or another one, under autocast too."""
    for text in ("euclidean", "cosine", "manhattan"):
        head, h, y = case(text)
        with torch.no_grad():
            h[::3] = head.weight[y[::3]] + 1e-3 * h[::3]
            h[1::3] = head.weight[(y[1::3] + 1) % 50] + 1e-3 * h[1::3]
        for dtype in (None, torch.bfloat16):
            check(loss_and_gradients(head, h, y, dtype=dtype), exact(head, h, y), 3e-2 if dtype else 1e-3)


@all_heads
def test_heads_are_deterministic(text):
    """Equal calls give equal bits, also where targets repeat, whose gradients add up."""
    head, h, y = case(text)
    first = loss_and_gradients(head, h, y, dtype=torch.bfloat16)
    for _ in range(3):
        for a, b in zip(first, loss_and_gradients(head, h, y, dtype=torch.bfloat16)):
            assert torch.equal(a, b)


@gpu_only
@all_heads
def test_losses_do_not_wait_for_the_device(text):
    """
    A loss that checks nothing waits at most once a chunk, for whether a prototype is close, and one that is no squared
    distance never. A Cholesky factor is waited for; so is the estimated covariance, in training only.
    """
    head, h, y = case(text)
    loss_and_gradients(head, h, y) # compiles kernels
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss_and_gradients(head, h, y, chunk=80)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in caught if "synchronizing" in str(w.message)]
    allowed = N // 80 if isinstance(head.core, distances.SquaredL2) else 0
    assert len(waits) <= allowed + (head.distance == "mahalanobis"), waits


@gpu_only
@pytest.mark.parametrize("text", ["euclidean", "cosine", "mahalanobis", "chebyshev:cosh"])
def test_memory_of_a_large_vocabulary(text):
    """Beyond the gradients a head holds a few rows of scores, and copies of its weight: never all scores."""
    rows, columns, dimensions = 8192, 131_072, 256
    torch.manual_seed(0)
    head = DistanceHead(dimensions, columns, **parse_head(text), n=8.0, device="cuda")
    head.validate = False
    h = (dimensions ** -0.5 * torch.randn(rows, dimensions, device="cuda")).requires_grad_()
    y = torch.randint(columns, (rows,), device="cuda")
    for _ in range(2): # the first call compiles, and cublas takes its workspace
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients = loss_and_gradients(head, h, y, chunk=None, dtype=torch.bfloat16)
        peak = torch.cuda.max_memory_allocated() - before
        held = sum(x.nbytes for x in gradients)
        del gradients
    assert peak - held < 1500 * columns * 4 + 8 * head.weight.nbytes < rows * columns * 4 / 2


@gpu_only
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_memory_of_an_elementwise_head():
    rows, columns, dimensions = 2048, 50_304, 256
    head = DistanceHead(dimensions, columns, "manhattan", n=8.0, device="cuda")
    head.validate = False
    h, y = torch.randn(rows, dimensions, device="cuda").requires_grad_(), torch.randint(columns, (rows,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss_and_gradients(head, h, y, chunk=512)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 12 * 512 * columns * 4 + 6 * head.weight.nbytes # N x V x D is 105 GB


def test_tiny_state_moves_between_devices(tmp_path):
    head, h, y = case("minkowski:p=3")
    torch.save(head.state_dict(), tmp_path / "head.pt")
    other = DistanceHead(D, V, "minkowski", p=3.0, n=8.0, num_classes=V - 10)
    other.load_state_dict(torch.load(tmp_path / "head.pt", map_location="cpu", weights_only=True))
    torch.testing.assert_close(other(h.detach().cpu()), head(h).detach().cpu(), rtol=1e-4, atol=1e-4)


@gpu_only
def test_rivals_on_the_gpu():
    """Whatever is installed computes the loss that it is timed for."""
    head, h, y = case("baseline", 256, 1024, 128)
    head.num_classes = 1024
    with torch.autocast("cuda", dtype=torch.bfloat16):
        results = {name: f(head, h, y) for name, f in bench_rivals.rivals_of(head, compile=True).items()}
    expected = exact(head, h, y)
    for name, (loss, gradients) in results.items():
        assert loss.item() == pytest.approx(expected[0].item(), rel=1e-2), name
        for gradient, of_exact in zip(gradients, expected[1:]):
            assert error(gradient, of_exact) < 3e-2, name

# -----------------------------------------------------------------------------
# training: the scripts as they are


BF16 = dict(device=DEVICE, dtype="bfloat16")
SOME_HEADS = ["baseline", "cosine", "manhattan"]


@pytest.mark.parametrize("distance", SOME_HEADS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_is_deterministic(here, distance, dtype):
    """Equal commands give equal numbers, without torch.compile: what it makes of an embedding adds atomically."""
    for name in "ab":
        train(distance=distance, device=DEVICE, dtype=dtype, out_dir=name)
    assert_same_training("a", "b")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"] if ON_GPU else ["bfloat16"])
def test_a_resumed_run_is_the_same(here, dtype):
    here_too = dict(device=DEVICE, dtype=dtype)
    train(**HARD, **here_too, out_dir="whole")
    train(**HARD, **here_too, out_dir="parts", max_iters=10)
    train(**here_too, init_from="resume", out_dir="parts", max_iters=20)
    assert_same_training("whole", "parts")


@gpu_only
@pytest.mark.parametrize("distance", SOME_HEADS)
def test_training_in_fp16(here, distance):
    train(distance=distance, device="cuda", dtype="float16", out_dir="fp16")
    train(distance=distance, device="cuda", dtype="float32", out_dir="fp32")
    losses = {name: [row["loss"] for row in metrics(name, "train")] for name in ("fp16", "fp32")}
    assert losses["fp16"][-1] == pytest.approx(losses["fp32"][-1], rel=0.05)
    assert load("fp16")["scaler"]["scale"] > 1


@gpu_only
@pytest.mark.parametrize("distance", ["cosine", "manhattan"])
def test_compiled_training(here, distance):
    train(**BF16, distance=distance, out_dir="eager")
    out, _ = train(**BF16, distance=distance, out_dir="compiled", compile=True)
    assert "going on without it" not in out
    losses = {name: [row["loss"] for row in metrics(name, "train")] for name in ("eager", "compiled")}
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=0.02)


@gpu_only
def test_one_rank_with_nccl(here, monkeypatch):
    """The whole way through DistributedDataParallel and nccl, on the one GPU that there is."""
    train(**HARD, device="cuda", out_dir="alone")
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=29517).items():
        monkeypatch.setenv(name, str(value))
    train(**HARD, device="cuda", out_dir="nccl")
    assert_close_runs("alone", "nccl")


@gpu_only
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_training_on_images(here, dtype):
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    settings = dict(distance="cosine", epochs=5, dtype=dtype, plots=False, track_emissions=False)
    for name in "ab":
        run_script("train_vision.py", *(f"--{key}={value}" for key, value in settings.items()), f"--out_dir={name}")
    assert load("a")["best_accuracy"] > 0.8
    assert metrics("a", "eval") == metrics("b", "eval")


@gpu_only
def test_the_energy_counter_counts():
    import gpu
    meter = gpu.Meter()
    before, a = meter.joules(), torch.randn(8192, 8192, device="cuda")
    if before is None:
        pytest.skip("the driver has no energy counter")
    for _ in range(40):
        a @ a
    torch.cuda.synchronize()
    assert 0 < meter.joules() - before < 1e5 and 50 < meter.limit_watts() < 2000 and meter.driver()
