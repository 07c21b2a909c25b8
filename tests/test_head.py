"""
A head behaves like a torch module: derivatives of any order, pickles, hooks, transforms, arguments, state dicts.

$ pytest tests/test_head.py
"""
import copy
import io
import pickle
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from torch.utils.checkpoint import checkpoint

import distances
from distances import DISTANCES, SMALL, Distance, DistanceHead, HarmonicLoss, Tiles, pairwise

pytestmark = pytest.mark.usefixtures("large")
HEADS = [("baseline", None), *((d, v) for d, variants in DISTANCES.items() for v in variants)]
SMOOTH = [(d, v) for d, v in HEADS if v != "hard"] # whose gradient is that of another function, straight through
every = pytest.mark.parametrize("distance, variant", HEADS)
smooth = pytest.mark.parametrize("distance, variant", SMOOTH)
some = pytest.mark.parametrize("distance", ["baseline", "euclidean", "cosine", "manhattan", "mahalanobis", "offset_l2"])


def make(distance, variant=None, D=5, V=4, **kwargs):
    torch.manual_seed(0)
    head = DistanceHead(D, V, distance, variant, **{"n": 3.0, **kwargs}).double().eval()
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, D))
    return head


def batch(N=3, D=5, V=4):
    g = torch.Generator().manual_seed(1)
    return torch.randn(N, D, dtype=torch.float64, generator=g), torch.randint(0, V, (N,), generator=g)


# -----------------------------------------------------------------------------
# small batches

@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@every
def test_small_batches_go_another_way_to_the_same_numbers(distance, variant, reduction, monkeypatch):
    """Value and gradients, with a bias, padding, a learned n and ignored targets; noise is off, in eval."""
    def run():
        head = make(distance, variant, V=6, num_classes=4, bias=True, learn_n=distance != "baseline")
        h, y = batch(N=4)
        y[1] = -100
        h.requires_grad_()
        weights = torch.arange(1.0, 5.0, dtype=torch.float64)
        loss = head.loss(h, y, reduction=reduction)
        d = torch.zeros(1) if distance == "baseline" else head.distances(h)
        gradients = torch.autograd.grad((loss * weights).sum(), [h, *head.parameters()])
        return [loss, d, *gradients]
    expected = run()
    monkeypatch.setattr(distances, "SMALL", SMALL)
    for actual, wanted in zip(run(), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_a_second_backward_pass_gives_the_same_gradients():
    """Those of the first one were given away, and may have been changed since."""
    head = make("cosine")
    h, y = batch()
    h.requires_grad_()
    loss = 3 * head.loss(h, y)
    first = torch.autograd.grad(loss, [h, head.weight], retain_graph=True)
    expected = [g.clone() for g in first]
    for g in first:
        g.zero_()
    second = torch.autograd.grad(loss, [h, head.weight])
    for a, b in zip(second, expected, strict=True):
        torch.testing.assert_close(a, b)


# -----------------------------------------------------------------------------
# second derivatives

def hessian_by_differences(loss, h, step=1e-6):
    """The Jacobian of the gradient, a central difference at a time."""
    def gradient(h):
        h = h.clone().requires_grad_()
        return torch.autograd.grad(loss(h), h)[0].flatten()
    columns = []
    for i in range(h.numel()):
        shift = torch.zeros_like(h)
        shift.view(-1)[i] = step
        columns.append((gradient(h + shift) - gradient(h - shift)) / (2 * step))
    return torch.stack(columns, 1)


@smooth
def test_hessians_are_right(distance, variant):
    head, (h, y) = make(distance, variant), batch()
    losses = {"loss": lambda h: head.loss(h, y), "vector": lambda h: head.loss(h, y, reduction="none").square().sum(),
              "scores": lambda h: F.cross_entropy(head(h), y)}
    if distance != "baseline":
        losses["pairwise"] = lambda h: head.distances(h).square().sum()
    for name, loss in losses.items():
        hessian = torch.autograd.functional.hessian(loss, h).reshape(h.numel(), h.numel())
        assert hessian.norm() > 1e-3, name
        oracle = hessian_by_differences(loss, h)
        assert (hessian - oracle).norm() < 1e-6 * oracle.norm() + 1e-6, name


@smooth
def test_a_gradient_penalty_reaches_every_parameter(distance, variant):
    """Its gradient through head.loss is that through the scores."""
    head, (h, y) = make(distance, variant, learn_n=distance != "baseline"), batch()
    found = []
    for loss in (lambda h: head.loss(h, y), lambda h: F.cross_entropy(head(h), y)):
        x = h.clone().requires_grad_()
        gradient, = torch.autograd.grad(loss(x), x, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), [x, *head.parameters()]))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert all(g.norm() > 0 for g in found[0][:2])


@pytest.mark.parametrize("distance", ["euclidean", "cosine", "manhattan", "mahalanobis", "offset_l2", "minkowski"])
def test_gradgradcheck(distance):
    head, (h, y) = make(distance), batch()
    h.requires_grad_()
    assert torch.autograd.gradgradcheck(head, h)
    assert torch.autograd.gradgradcheck(lambda h: head.loss(h, y), h)


# -----------------------------------------------------------------------------
# pickles

@every
def test_a_head_pickles(distance, variant):
    head, (h, y) = make(distance, variant, learn_n=distance != "baseline"), batch()
    file = io.BytesIO()
    torch.save(torch.nn.Sequential(head), file)
    file.seek(0)
    copies = pickle.loads(pickle.dumps(head)), copy.deepcopy(head), torch.load(file, weights_only=False)[0]
    for other in copies:
        assert torch.equal(other(h), head(h)) and torch.equal(other.loss(h, y), head.loss(h, y))
        other.weight.data.zero_()
    assert head.weight.abs().sum() > 0


SPAWNED = """
import distances, torch, torch.multiprocessing as mp

def loss(head):
    return head.loss(torch.ones(2, 4), torch.tensor([0, 1])).item()

def work(rank, head, queue):
    queue.put(loss(head))

if __name__ == "__main__":
    head, queue = distances.DistanceHead(4, 3, "manhattan"), mp.get_context("spawn").SimpleQueue()
    mp.spawn(work, (head, queue))
    print(queue.get() == loss(head))
"""


def test_a_head_goes_to_another_process():
    with open("spawned.py", "w") as f:
        f.write(SPAWNED)
    env = {"PYTHONPATH": ROOT, "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "spawned.py"], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "True", done.stderr


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_head_of_ones_own_distance_says_what_it_needs(monkeypatch):
    chord = Distance(lambda o: Tiles(lambda h, w: (h - w).abs().sqrt().sum(-1)))
    monkeypatch.setitem(DISTANCES, "chord", {"standard": chord})
    pickled = pickle.dumps(DistanceHead(4, 3, "chord"))
    assert pickle.loads(pickled).distance == "chord"
    monkeypatch.delitem(DISTANCES, "chord")
    with pytest.raises(ValueError, match="'chord', which DISTANCES does not hold here: register it before the head"):
        pickle.loads(pickled)


# -----------------------------------------------------------------------------
# hooks and transforms

@some
def test_checkpointing_and_offloading(distance):
    head, (h, y) = make(distance), batch()
    layer = torch.nn.Linear(5, 5).double()

    def run(call):
        x = h.clone().requires_grad_()
        loss = call(lambda x: head.loss(layer(x), y), x)
        return [loss, *torch.autograd.grad(loss, [x, *layer.parameters(), *head.parameters()])]

    def offloaded(f, x):
        with torch.autograd.graph.save_on_cpu():
            return f(x)
    expected = run(lambda f, x: f(x))
    for call in (partial(checkpoint, use_reentrant=False), offloaded):
        for a, b in zip(run(call), expected, strict=True):
            torch.testing.assert_close(a, b)
    with torch.autograd.graph.save_on_cpu(): # the backward pass inside, too
        for a, b in zip(run(lambda f, x: f(x)), expected, strict=True):
            torch.testing.assert_close(a, b)


@some
def test_transforms_of_the_scores(distance):
    head, (h, y) = make(distance), batch()

    def loss(h, y):
        return F.cross_entropy(head(h), y)
    x = h.clone().requires_grad_()
    gradient, = torch.autograd.grad(loss(x, y), x)
    torch.testing.assert_close(torch.func.grad(loss)(h, y), gradient)
    torch.testing.assert_close(torch.func.vmap(head)(h), head(h))
    per_sample = torch.func.vmap(torch.func.grad(loss))(h[:, None], y[:, None])[:, 0]
    torch.testing.assert_close(per_sample, gradient * len(h))
    with pytest.raises(RuntimeError, match="must override the setup_context"): # as its docstring says
        torch.func.grad(lambda h: head.loss(h, y))(h)


@some
def test_export_and_whole_graphs(distance):
    head, (h, _) = make(distance), batch()
    h.requires_grad_()
    gradient, = torch.autograd.grad(head(h).square().sum(), h)
    exported = torch.export.export(head, (h.detach(),)).module()
    torch.testing.assert_close(exported(h.detach()), head(h))
    of_any_batch = ({0: torch.export.Dim("N", max=10 ** 6)},)
    any_batch = torch.export.export(head, (h.detach(),), dynamic_shapes=of_any_batch).module()
    torch.testing.assert_close(any_batch(h[1:].detach()), head(h[1:]))
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(h), head(h))
    torch.testing.assert_close(torch.autograd.grad(compiled(h).square().sum(), h)[0], gradient)


# -----------------------------------------------------------------------------
# in place of nn.Linear

def test_device_and_dtype():
    head = DistanceHead(4, 3, "mahalanobis", device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in head.parameters())
    assert head(torch.empty(2, 4, device="meta")).shape == (2, 3)
    assert DistanceHead(4, 3, "offset_l2", dtype=torch.float64).alpha.dtype == torch.float64
    assert DistanceHead(4, 64, num_classes=50).out_features == 50 and DistanceHead(4, 3).in_features == 4


@every
def test_bias(distance, variant):
    head, (h, y) = make(distance, variant, bias=True, num_classes=3), batch(V=3)
    plain = make(distance, variant, num_classes=3)
    with torch.no_grad():
        head.weight.copy_(plain.weight)
        head.bias.copy_(torch.tensor([0.3, -1.0, 2.0, 9.0]))
    torch.testing.assert_close(head(h), plain(h) + head.bias[:3])
    h.requires_grad_()
    loss, oracle = head.loss(h, y), F.cross_entropy(head(h), y)
    for a, b in zip(torch.autograd.grad(loss, [h, head.bias]), torch.autograd.grad(oracle, [h, head.bias])):
        torch.testing.assert_close(a, b)


def test_the_linear_head_with_a_bias_starts_as_a_linear_layer():
    torch.manual_seed(0)
    linear = torch.nn.Linear(16, 7)
    torch.manual_seed(0)
    head = DistanceHead(16, 7, "baseline", bias=True)
    assert torch.equal(head.weight, linear.weight) and torch.equal(head.bias, linear.bias)
    assert torch.equal(DistanceHead(16, 7, "cosine", bias=True).bias, torch.zeros(7))
    assert DistanceHead(16, 7).bias is None


@every
def test_resize(distance, variant):
    head, (h, y) = make(distance, variant, bias=True), batch()
    before, parameters = head(h), {name for name, _ in head.named_parameters()}
    assert head.resize(9) is head and head(h).shape == (3, 9) and head.out_features == 9
    torch.testing.assert_close(head(h)[:, :4], before)
    assert {name for name, _ in head.named_parameters()} == parameters and torch.isfinite(head.loss(h, y + 5))
    assert torch.equal(head.resize(4)(h), before)


@every
def test_batches_of_nothing(distance, variant):
    """As F.cross_entropy has them: a sum of 0, a mean that is nan, gradients of 0."""
    head, (features, targets) = make(distance, variant), batch()
    for h, y in ((features[:0], targets[:0]), (features, torch.full_like(targets, -100))):
        h.requires_grad_()
        for reduction in ("sum", "mean", "none"):
            loss = head.loss(h, y, reduction=reduction)
            oracle = F.cross_entropy(torch.zeros(len(h), 4, dtype=torch.float64), y, reduction=reduction)
            torch.testing.assert_close(loss, oracle, equal_nan=True)
            for gradient in torch.autograd.grad(loss.sum(), [h, head.weight]):
                assert torch.equal(gradient, torch.zeros_like(gradient))


def test_float_targets_are_one_line():
    for call in (DistanceHead(4, 3).loss, HarmonicLoss(4, 3)):
        with pytest.raises(ValueError, match="targets are class numbers, of an integer type, got torch.float32"):
            call(torch.zeros(2, 4), torch.zeros(2))


def test_the_criterion_and_the_head_ignore_the_same():
    h, y = torch.randn(3, 4), torch.tensor([0, -100, 2])
    criterion = HarmonicLoss(4, 3)
    assert torch.equal(criterion(h, y), criterion.head.loss(h, y))


# -----------------------------------------------------------------------------
# state dicts

def test_weights_of_another_head_are_refused():
    linear, cosine = torch.nn.Linear(4, 3, bias=False), DistanceHead(4, 3, "cosine")
    with pytest.raises(RuntimeError, match="Unexpected key.*kind"):
        linear.load_state_dict(cosine.state_dict())
    with pytest.raises(RuntimeError, match="those of a cosine stable harmonic head, this is a linear head"):
        DistanceHead(4, 3, "baseline").load_state_dict(cosine.state_dict())
    with pytest.raises(RuntimeError, match="those of a linear head, this is a cosine stable harmonic head"):
        cosine.load_state_dict(linear.state_dict())
    within = torch.nn.Sequential(DistanceHead(4, 3, "minkowski", p=3.0))
    with pytest.raises(RuntimeError, match="of 0.weight are .* cosine .*, this is a minkowski .* p=3 head"):
        within.load_state_dict({f"0.{name}": x for name, x in cosine.state_dict().items()})
    with pytest.raises(RuntimeError, match="a cosine stable harmonic head, this is a cosine stable softmin head"):
        DistanceHead(4, 3, "cosine", link="softmin").load_state_dict(cosine.state_dict())
    backbone = torch.nn.ModuleDict({"layer": torch.nn.Linear(4, 4), "head": DistanceHead(4, 3)})
    backbone.load_state_dict({"layer.weight": torch.eye(4)}, strict=False) # a checkpoint without a head
    equal = DistanceHead(4, 3, "minkowski", "standard", p=3)
    equal.load_state_dict(DistanceHead(4, 3, "minkowski", p=3.0).state_dict())
    DistanceHead(4, 3, "minkowski").load_state_dict(DistanceHead(4, 3, "minkowski", p=1.5).state_dict())
    other = DistanceHead(4, 3, "cosine", n=5.0)
    other.load_state_dict(cosine.state_dict())
    assert torch.equal(other.weight, cosine.weight)
    DistanceHead(4, 3, "baseline").load_state_dict(linear.state_dict())


def test_a_head_is_made_without_memory_and_filled_later():
    source, head = DistanceHead(4, 3, "cosine"), DistanceHead(4, 3, "cosine", device="meta")
    head.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(head.weight, source.weight)
    head = DistanceHead(4, 3, "cosine", device="meta").to_empty(device="cpu")
    head.load_state_dict({name: x.half() for name, x in source.state_dict().items()})
    torch.testing.assert_close(head.weight, source.weight, rtol=1e-3, atol=1e-3)


def test_a_transformer_with_a_distance_head(tmp_path):
    """Saved and loaded as what it is not, it says so; resized by hand; loaded as what it is, it scores the same."""
    transformers = pytest.importorskip("transformers")
    shape = dict(vocab_size=40, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    config = transformers.GPT2Config(**shape, tie_word_embeddings=False)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.lm_head = DistanceHead(8, 40, "cosine", n=5.0)
    idx = torch.arange(10)[None]
    logits = model(idx).logits
    model.save_pretrained(tmp_path)
    _, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert "lm_head.kind" in info["unexpected_keys"]
    model.set_output_embeddings(model.get_output_embeddings().resize(50))
    assert torch.equal(model(idx).logits[..., :40], logits)


# -----------------------------------------------------------------------------
# fast by default

@pytest.fixture
def compiler(monkeypatch):
    """torch.compile replaced by a list of what it is asked for."""
    asked = []
    monkeypatch.setattr(distances.torch, "compile", lambda fn, **options: asked.append(fn.__name__) or fn)
    monkeypatch.setattr(distances, "WORTH_COMPILING", {"N x V x D": 3 * 4 * 5, "N x V": 3 * 4})
    return asked


@pytest.mark.parametrize("distance", ["manhattan", "euclidean"])
def test_large_batches_are_compiled_by_themselves(distance, compiler):
    head, (h, y) = make(distance), batch()
    h.requires_grad_()
    small = head.loss(h[:2], y[:2])
    with torch.no_grad():
        head.loss(h, y)
    assert not compiler # neither small batches nor those without gradients
    loss = head.loss(h, y)
    assert "chunk_loss" in compiler and ("dh" in compiler) == (distance == "manhattan")
    assert torch.equal(head.loss(h[:2], y[:2]), small)
    times = len(compiler)
    assert torch.equal(head.loss(h, y), loss) and len(compiler) == times # once
    with torch.no_grad():
        head.loss(h.repeat(8, 1), y.repeat(8))
    assert distance != "manhattan" or head.core.compile # a forward pass is worth it from eight times the size on
    head.compile_loss(False)
    torch.testing.assert_close(head.loss(h, y), loss)
    assert len(compiler) == times


def test_without_a_compiler_there_is_one_line(monkeypatch, compiler):
    def broken(fn, **options):
        def run(*args):
            raise torch._dynamo.exc.TorchDynamoException("no C++ compiler")
        return run
    monkeypatch.setattr(distances.torch, "compile", broken)
    head, (h, y) = make("manhattan"), batch()
    with pytest.warns(UserWarning, match="torch.compile does not work here, .*: .*no C.. compiler") as seen:
        loss = head.loss(h.requires_grad_(), y)
    assert len(seen) == 1 and torch.equal(loss, F.cross_entropy(head(h), y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(head.loss(h, y), loss)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException): # who asked for it hears of it
        head.compile_loss()
        head.loss(h, y)


def test_a_users_own_error_is_no_compilers(compiler):
    head, (h, y) = make("chebyshev", "cosh"), batch()
    with pytest.raises(ValueError, match="its exponentials hold up to"):
        head.loss(1e6 * h.requires_grad_(), y)
    assert head.compiled is None


def test_the_scores_do_not_depend_on_the_losses_before(compiler):
    head, (h, y) = make("manhattan"), batch()
    before = head(h)
    head.loss(h.requires_grad_(), y)
    assert torch.equal(head(h), before) and not head.core.compile


# -----------------------------------------------------------------------------
# precision

def test_the_gradient_of_a_learned_n_accumulates_in_fp32():
    """Over 1024 chunks of a bf16 head: it is the fp32 one but for the rounding of n and of the result."""
    torch.manual_seed(0)
    head = DistanceHead(8, 50, "euclidean", n=3.0, learn_n=True).bfloat16()
    h, y = torch.randn(1024, 8).bfloat16().float(), torch.arange(1024) % 50
    gradient, = torch.autograd.grad(head.loss(h, y, reduction="sum", chunk=1), head.log_n)
    oracle, = torch.autograd.grad(head.float().loss(h, y, reduction="sum"), head.log_n)
    torch.testing.assert_close(gradient.float(), oracle, rtol=0.02, atol=0)


def test_minkowski_where_coordinates_are_equal():
    """Gradients under transforms are finite at h = w too. (Second ones are not, for p < 2: |x|^p has none at 0.)"""
    head, (h, _) = make("minkowski", p=1.5), batch()
    h[0], h[1, 2] = head.weight[0].detach(), head.weight[1, 2].detach()
    gradient = torch.func.vmap(torch.func.grad(lambda h: head(h).sum()))(h[:, None])
    assert torch.isfinite(gradient).all()
    x = h.clone().requires_grad_()
    torch.testing.assert_close(gradient[:, 0], torch.autograd.grad(head(x).sum(), x)[0])


def test_targets_of_any_integer_type():
    head, h = DistanceHead(4, 3), torch.randn(2, 4)
    expected = head.loss(h, torch.tensor([0, 2]))
    for dtype in (torch.uint8, torch.int8, torch.int32):
        assert torch.equal(head.loss(h, torch.tensor([0, 2], dtype=dtype)), expected)
    for chunk in (0, -1):
        with pytest.raises(ValueError, match=f"chunk must be at least 1, got {chunk}"):
            head.loss(h, torch.tensor([0, 2]), chunk=chunk)
    with pytest.raises(ValueError, match="num_classes must lie in 1..3"):
        DistanceHead(4, 3, num_classes=0)


# -----------------------------------------------------------------------------
# Bray-Curtis

def test_which_bray_curtis_is_whose():
    """On data of both signs scipy's is `signed`; the other three differ from it."""
    from scipy.spatial.distance import cdist
    h, w = (torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    oracle = torch.as_tensor(cdist(h, w, "braycurtis"))
    for variant in DISTANCES["bray_curtis"]:
        equal = torch.allclose(pairwise(h, w, "bray_curtis", variant, eps=0.0), oracle)
        assert equal == (variant == "signed"), variant
