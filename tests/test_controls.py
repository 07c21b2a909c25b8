"""
The heads and terms of other papers, each against its published formula, which is written out here on its own; as
settings of the scripts; and in tables, where they are told apart from the baseline.

$ pytest tests/test_controls.py
"""

import json
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import flags, load, metrics, refused, run_script, train
from scipy.stats import multivariate_t
from torch.distributions import MultivariateNormal

import distances
import fsdp
import results
import study
from distances import SMALL, DistanceHead
from distances_parallel import NOT_SPLIT, ParallelHead
from run_folder import head_of, read_config

D, V = 6, 9


def rand(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(distance="baseline", training=True, **arguments):
    """A head in float64 whose tensors are all random: no parameter hides behind its initial value."""
    torch.manual_seed(0)
    head = DistanceHead(D, V, distance, **arguments).double().train(training)
    with torch.no_grad():
        for i, p in enumerate(head.parameters()):
            p.add_(0.5 * rand(*p.shape, seed=10 + i))
    return head


def batch(N=7):
    h, y = rand(N, D, seed=1), torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(2))
    y[2] = -100
    return h.requires_grad_(), y


def assert_loss(head, per_row, monkeypatch):
    """head.loss is per_row(h, y) (N,), of the published formula, in value and in every gradient: of large batches, of
    small ones, as a mean and as a vector."""
    h, y = batch()
    counts = y != -100
    weights = torch.linspace(1, 2, len(y), dtype=torch.float64)
    inputs = [h, *head.parameters()]
    expected = torch.zeros(len(y), dtype=torch.float64).index_put((counts.nonzero()[:, 0],), per_row(h, y)[counts])
    oracles = {"mean": expected.sum() / counts.sum(), "none": (weights * expected).sum()}
    for sizes in (SMALL, {name: -1 for name in SMALL}):
        monkeypatch.setattr(distances, "SMALL", sizes)
        for reduction, oracle in oracles.items():
            for chunk in (None, 3):
                loss = head.loss(h, y, reduction=reduction, chunk=chunk)
                loss = (weights * loss).sum() if reduction == "none" else loss
                torch.testing.assert_close(loss, oracle, rtol=1e-9, atol=1e-9)
                wanted = torch.autograd.grad(oracle, inputs, retain_graph=True)
                for x, found in zip(wanted, torch.autograd.grad(loss, inputs), strict=True):
                    torch.testing.assert_close(found, x, rtol=1e-8, atol=1e-9)


def nll(z, y):
    """-log p_y (N,) of scores z (N, V), by hand."""
    return z.exp().sum(1).log() - z[torch.arange(len(y)), y.clamp_min(0)]


# -----------------------------------------------------------------------------
# the linear head with a bias and a scale

@pytest.mark.parametrize("learn_n", [False, True])
def test_the_linear_head_with_a_scale_and_a_bias(learn_n, monkeypatch):
    head = make(n=2.5, learn_n=learn_n, bias=True)
    n = head.log_n.exp() if learn_n else 2.5
    assert_loss(head, lambda h, y: nll(n * h @ head.weight.T + head.bias, y), monkeypatch)
    assert not head.is_linear and "bias" in head.extra_repr() and ("learned" in head.extra_repr()) == learn_n


def test_the_linear_head_as_it_is():
    head = DistanceHead(D, V, "baseline")
    assert head.is_linear and head.n == 1 and head.extra_repr() == "6 -> 9, baseline"
    assert torch.equal(head(torch.eye(D)), head.weight.T)


# -----------------------------------------------------------------------------
# links

def test_the_gaussian_link_is_the_posterior_of_normal_classes(monkeypatch):
    """z = -n d^2 with Euclid: equal normal densities around the prototypes, of variance 1 / (2 n), by Bayes' rule."""
    head = make("euclidean", link="gaussian", n=0.7)
    h, y = batch()
    of_classes = [MultivariateNormal(w, torch.eye(D).double() / (2 * 0.7)) for w in head.weight]
    density = torch.stack([of_class.log_prob(h).exp() for of_class in of_classes], 1) # (N, V)
    torch.testing.assert_close(head(h).softmax(1), density / density.sum(1, keepdim=True))
    assert_loss(head, lambda h, y: nll(-0.7 * (h[:, None] - head.weight).square().sum(-1), y), monkeypatch)


# -----------------------------------------------------------------------------
# unit vectors: NormFace, nGPT, IsoMax+, CosFace, ArcFace

def cosines(h, w):
    return (h / h.norm(dim=1, keepdim=True)) @ (w / w.norm(dim=1, keepdim=True)).T


def test_normface(monkeypatch):
    head = make("cosine", link="softmin", n=4.0, learn_n=True)
    assert_loss(head, lambda h, y: nll(head.log_n.exp() * cosines(h, head.weight), y), monkeypatch)


@pytest.mark.parametrize("num_classes", [V, V - 2])
def test_ngpt(num_classes, monkeypatch):
    """z = s_z <h, w> of unit vectors; n s_k is its s_z."""
    head = make("baseline", variant="unit", n=3.0, learn_scale=True, num_classes=num_classes)

    def per_row(h, y):
        return nll((3.0 * head.scale * cosines(h, head.weight))[:, :num_classes], y)
    monkeypatch.setattr(torch, "randint", partial(limited, torch.randint, num_classes))
    assert_loss(head, per_row, monkeypatch)
    assert head.kind == "linear unit" and not head.is_linear
    with pytest.raises(RuntimeError, match="those of a linear unit head, this is a linear head"):
        DistanceHead(D, V, "baseline", learn_scale=True).load_state_dict(head.state_dict())
    assert head.resize(V + 2).scale.shape == (V + 2,)


def limited(randint, high, *args, **kwargs):
    return randint(*args, **kwargs).clamp_max(high - 1)


def test_a_scale_per_prototype_is_an_exponent_of_its_own(monkeypatch):
    head = make("manhattan", n=3.0, learn_n=True, learn_scale=True, bias=True, eps=1e-3)

    def per_row(h, y):
        d = (h[:, None] - head.weight).abs().sum(-1) + 1e-3
        return nll(-head.log_n.exp() * head.scale * d.log() + head.bias, y)
    assert_loss(head, per_row, monkeypatch)


def test_isomax_plus(monkeypatch):
    """softmax(-E |s| |h/|h| - w/|w||), E = 10 and s = 1 at the start: n is E |s|."""
    head = make("euclidean", variant="unit", link="softmin", n=10.0, learn_n=True, eps=1e-9)

    def per_row(h, y):
        s = head.log_n.exp() / 10
        distances = s.abs() * torch.cdist(F.normalize(h), F.normalize(head.weight))
        return nll(-10 * distances, y)
    assert_loss(head, per_row, monkeypatch)


def margins(distance="cosine", **arguments):
    return make(distance, link="softmin", n=8.0, eps=1e-7, **arguments)


def test_cosface(monkeypatch):
    head = margins(margin=0.35)

    def per_row(h, y):
        cos = cosines(h, head.weight)
        return nll(8 * (cos - 0.35 * F.one_hot(y.clamp_min(0), V).double()), y)
    assert_loss(head, per_row, monkeypatch)
    h, y = batch()
    torch.testing.assert_close(head.eval().loss(h, y), F.cross_entropy(head(h), y)) # what is reported
    torch.testing.assert_close(head(h), head.train()(h)) # scores have no margin


@pytest.mark.parametrize("m", [0.5, 2.0])
def test_arcface(m, monkeypatch):
    head = margins(angular_margin=m)

    def per_row(h, y):
        cos, of_target = cosines(h, head.weight), F.one_hot(y.clamp_min(0), V).bool()
        angle = cos.acos()
        turned = torch.where(angle <= math.pi - m, (angle + m).cos(), cos - m * math.sin(m))
        return nll(8 * torch.where(of_target, turned, cos), y)
    h, y = batch()
    beyond = cosines(h, head.weight)[torch.arange(7), y.clamp_min(0)].acos() > math.pi - m
    assert beyond.any() == (m == 2.0) # both branches are there
    assert_loss(head, per_row, monkeypatch)


@pytest.mark.parametrize("m", [0.2, 0.5])
def test_margins_are_those_of_pytorch_metric_learning(m):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    h, y = batch()
    h, y = h[y >= 0].detach().requires_grad_(), y[y >= 0]
    for theirs, ours in ((losses.CosFaceLoss(V, D, margin=m, scale=8), margins(margin=m)),
                         (losses.ArcFaceLoss(V, D, margin=math.degrees(m), scale=8), margins(angular_margin=m))):
        theirs.W.data = ours.weight.data.T.clone()
        loss, oracle = ours.loss(h, y), theirs(h, y)
        torch.testing.assert_close(loss, oracle, rtol=1e-6, atol=1e-6)
        mine = torch.autograd.grad(loss, [h, ours.weight])
        other = torch.autograd.grad(oracle, [h, theirs.W])
        torch.testing.assert_close(mine, (other[0], other[1].T), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("distance, link", [("euclidean", "harmonic"), ("manhattan", "softmin")])
def test_a_margin_of_any_distance(distance, link, monkeypatch):
    head = make(distance, link=link, n=2.0, margin=0.7, z_loss=0.1)

    def per_row(h, y):
        d = head.distances(h) + 0.7 * F.one_hot(y.clamp_min(0), V).double()
        z = -2 * d.log() if link == "harmonic" else -2 * d
        return nll(z, y) + 0.1 * z.exp().sum(1).log() ** 2
    assert_loss(head, per_row, monkeypatch)
    h, y = batch(3)
    assert torch.autograd.gradgradcheck(lambda h: head.loss(h, y), h)


# -----------------------------------------------------------------------------
# eps

def test_harmonic_euclid_with_a_learned_eps_is_a_student_t(monkeypatch):
    """Bayes' rule for equal shares of multivariate t classes: n - D degrees of freedom, scale eps / sqrt(n - D)."""
    head = make("euclidean", n=D + 3.0, eps=0.8, learn_eps=True)
    h, y = batch()
    eps = head.log_eps.exp()
    shape = eps.item() ** 2 / 3 * np.eye(D)
    density = [multivariate_t(w, shape, df=3).pdf(h.detach().numpy()) for w in head.weight.detach().numpy()]
    density = torch.tensor(np.stack(density, 1))
    torch.testing.assert_close(head(h).softmax(1), density / density.sum(1, keepdim=True))

    def per_row(h, y):
        eps = head.log_eps.exp()
        return nll(-(D + 3) / 2 * ((h[:, None] - head.weight).square().sum(-1) + eps ** 2).log(), y)
    assert_loss(head, per_row, monkeypatch)


@pytest.mark.parametrize("distance, variant", [("bray_curtis", "normalized"), ("hamming", "soft"), ("cosine", "stable"),
                                               ("mahalanobis", "standard"), ("chebyshev", "cosh")])
def test_a_learned_eps_of_other_distances(distance, variant, monkeypatch):
    head = make(distance, variant=variant, n=3.0, eps=0.3, learn_eps=True)

    def per_row(h, y): # the small way is autograd's, of the formula that test_distances.py checks
        plain = DistanceHead(D, V, distance, variant, n=3.0, eps=1.0).double()
        tensors = {name: p for name, p in head.named_parameters() if name != "log_eps"}
        plain.options = plain.options.updated(eps=head.log_eps.exp())
        plain.core = plain.spec.core(plain.options)
        return nll(torch.func.functional_call(plain, tensors, h), y)
    assert_loss(head, per_row, monkeypatch)


@pytest.mark.parametrize("message, arguments", [
    ("learn_eps is for distances to which eps is added at the end, got canberra", dict(distance="canberra")),
    ("added at the end, got bray_curtis", dict(distance="bray_curtis", variant="signed")),
    ("added at the end, got baseline", dict(distance="baseline")),
    ("must be > 0 then, got 0", dict(distance="euclidean", eps=0.0))])
def test_an_eps_that_cannot_be_learned(message, arguments):
    with pytest.raises(ValueError, match=message):
        DistanceHead(D, V, learn_eps=True, **arguments)


# -----------------------------------------------------------------------------
# softcap, z-loss, label smoothing

@pytest.mark.parametrize("distance", ["baseline", "cosine", "manhattan"])
def test_softcap(distance, monkeypatch):
    head = make(distance, softcap=0.7, bias=True, learn_n=True)
    uncapped = make(distance, bias=True, learn_n=True)
    uncapped.load_state_dict(head.state_dict())
    z = uncapped(batch()[0])
    torch.testing.assert_close(head(batch()[0]), 0.7 * (z / 0.7).tanh())
    assert (z.abs() > 0.7).any() # so that it matters

    def per_row(h, y):
        for name, p in head.named_parameters():
            uncapped.get_parameter(name).data = p.data
        parameters = dict(head.named_parameters())
        z = torch.func.functional_call(uncapped, parameters, h)
        return nll(0.7 * torch.tanh(z / 0.7), y)
    assert_loss(head, per_row, monkeypatch)


def smoothed(z, y, s):
    """Cross-entropy with (1 - s) one-hot + s / V, written out."""
    log_p = z - z.exp().sum(1, keepdim=True).log()
    return -(1 - s) * log_p[torch.arange(len(y)), y.clamp_min(0)] - s * log_p.sum(1) / z.shape[1]


@pytest.mark.parametrize("distance", ["baseline", "cosine", "manhattan", "euclidean"])
@pytest.mark.parametrize("z_loss, label_smoothing", [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
def test_z_loss_and_label_smoothing(distance, z_loss, label_smoothing, monkeypatch):
    head = make(distance, z_loss=z_loss, label_smoothing=label_smoothing, bias=True, softcap=5.0)

    def per_row(h, y):
        z = head(h)
        return smoothed(z, y, label_smoothing) + z_loss * z.exp().sum(1).log() ** 2
    assert_loss(head, per_row, monkeypatch)
    h, y = batch()
    if not z_loss: # torch has it too
        torch.testing.assert_close(head.loss(h, y), F.cross_entropy(head(h), y, label_smoothing=label_smoothing))
    torch.testing.assert_close(head.eval().loss(h, y), F.cross_entropy(head(h), y)) # what is reported


def test_label_smoothing_leaves_padding_out():
    head = make("euclidean", label_smoothing=0.2, z_loss=0.1, num_classes=V - 3)
    h, y = batch()
    y = y.clamp_max(V - 4)
    oracle = F.cross_entropy(head(h), y, label_smoothing=0.2) + 0.1 * head(h)[y >= 0].logsumexp(1).square().mean()
    found, wanted = (torch.autograd.grad(x, [h, head.weight], retain_graph=True) for x in (head.loss(h, y), oracle))
    torch.testing.assert_close(head.loss(h, y), oracle)
    torch.testing.assert_close(found, wanted)


def test_second_derivatives_of_what_training_adds(monkeypatch):
    monkeypatch.setattr(distances, "SMALL", {name: -1 for name in SMALL})
    head = make("cosine", z_loss=0.3, label_smoothing=0.2, softcap=3.0)
    h, y = batch(3)
    assert torch.autograd.gradgradcheck(lambda h: head.loss(h, y), h)


def test_compiled_training_is_that_of_the_formula():
    head = make(z_loss=0.3, label_smoothing=0.2, softcap=3.0)
    h, y = batch()
    eager = torch.autograd.grad(head.loss(h, y, chunk=4), [h, head.weight])
    head.compile_loss()
    torch.testing.assert_close(torch.autograd.grad(head.loss(h, y, chunk=4), [h, head.weight]), eager)


@pytest.mark.parametrize("name", ["z_loss", "label_smoothing"])
def test_a_split_head_refuses_what_it_does_not_add(name):
    config = dict(dtype="float32", optimizer="adamw", variant="", **{**dict.fromkeys(NOT_SPLIT, 0), name: 0.1})
    assert any(f"{name} is 0.1, which the loss over split prototypes does not have" in x for x in fsdp.problems(config))
    head = make(**{name: 0.1})
    head.__class__ = ParallelHead
    with pytest.raises(ValueError, match=f"a head that is split between ranks has no .*{name}"):
        head.loss(*batch())


def test_a_pickle_from_before_is_the_same_head():
    head = make("euclidean", learn_n=True)
    state = head.__getstate__()
    state["_parameters"] = {name: p for name, p in head._parameters.items() if name not in ("scale", "log_eps")}
    older = DistanceHead.__new__(DistanceHead)
    older.__setstate__({name: x for name, x in state.items() if name not in (*NOT_SPLIT, "softcap")})
    h, y = batch()
    assert torch.equal(older.loss(h, y), head.loss(h, y)) and repr(older) == repr(head)
    older.load_state_dict(head.state_dict())


# -----------------------------------------------------------------------------
# measures, and weights of tokens

@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("distance", ["baseline", "euclidean", "cosine", "manhattan"])
def test_measures(distance, large, monkeypatch):
    """Predictions and entropy of p, written out, also where h is so close to a prototype that its block is done again;
    the loss is the one without them, to the last bit."""
    monkeypatch.setattr(distances, "SMALL", {name: -1 if large else 2 ** 20 for name in SMALL})
    head = make(distance, num_classes=V - 2, n=3.0)
    h, y = batch()
    y = y.clamp_max(V - 3)
    with torch.no_grad():
        h[4] = head.weight[5] * (1 + 1e-4)
    p = head(h).softmax(1)
    for reduction in ("mean", "none"):
        loss, measures = head.loss(h, y, reduction=reduction, chunk=3 if large else None, measures=True)
        assert torch.equal(loss, head.loss(h, y, reduction=reduction, chunk=3 if large else None))
        assert torch.equal(measures.predicted, p.argmax(1)) and len(measures.predicted.unique()) > 1
        torch.testing.assert_close(measures.entropy, -(p * p.log()).sum(1))
        assert not measures.entropy.requires_grad
        assert torch.isfinite(torch.autograd.grad(loss.sum(), h)[0]).all()
    loss, measures = head.loss(h[:6].reshape(2, 3, D), y[:6].reshape(2, 3), measures=True)
    assert measures.predicted.shape == measures.entropy.shape == (2, 3)


def test_compiled_measures():
    head = make("euclidean")
    h, y = batch()
    _, expected = head.loss(h, y, measures=True)
    head.compile_loss()
    _, measures = head.loss(h, y, measures=True)
    torch.testing.assert_close(tuple(measures), tuple(expected))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_of_tokens(reduction):
    head = make("cosine", z_loss=0.1, n=3.0)
    h, y = batch()
    weights = torch.linspace(0, 2, len(y))
    each = head.loss(h, y, reduction="none")
    counted = weights * (y != -100)
    oracle = {"mean": (counted * each).sum() / counted.sum(), "sum": (counted * each).sum(), "none": counted * each}
    loss = head.loss(h, y, reduction=reduction, weights=weights)
    torch.testing.assert_close(loss, oracle[reduction])
    found, wanted = (torch.autograd.grad(x.sum(), [h, head.weight]) for x in (loss, oracle[reduction]))
    torch.testing.assert_close(found, wanted)
    with pytest.raises(ValueError, match=r"weights \(2,\) and targets \(7,\) do not fit"):
        head.loss(h, y, weights=torch.ones(2))


def test_language_runs_report_accuracy(here):
    _, script = train(out_dir="out", max_iters=2, distance="cosine", batch_size=5)
    model, right, count = script["raw_model"].eval(), 0, 0
    for first in range(0, script["num_val"], 4): # other batches than those of the run
        x, y = script["val_batch"](first, min(4, script["num_val"] - first))
        right += (model.head(model.features(x)).argmax(-1) == y).sum().item()
        count += y.numel()
    last, summary = metrics("out", "eval")[-1], json.load(open("out/summary.json"))
    assert last["val_accuracy"] == summary["val_accuracy"] == pytest.approx(right / count, rel=1e-6)
    assert 0 < right < count


# -----------------------------------------------------------------------------
# as settings

def text(**settings):
    return train(out_dir="out", overwrite=True, max_iters=1, log_interval=1, **settings)


def vision(**settings):
    settings = dict(epochs=1, plots=False, track_emissions=False, threads=1, overwrite=True, **settings)
    return run_script("train_vision.py", "--out_dir=out", *flags(**settings))


def test_settings_reach_the_head_and_its_name(here):
    for settings, words in ((dict(), "baseline"), (dict(n=2), "baseline, n=2"),
                            (dict(learn_n=True, softcap=15), "baseline, learned n, softcap=15"),
                            (dict(head_bias=True), "baseline, head_bias")):
        text(**settings)
        of_text = head_of(read_config("out"))
        vision(**settings)
        of_images = head_of(read_config("out"))
        for head in (of_text, of_images):
            assert results.label(head, {}) == words and head.is_baseline == (words == "baseline")
        assert ("head.bias" in load("out")["model"]) == ("bias" in words)
        assert ("head.log_n" in load("out")["model"]) == ("learned" in words)


def test_settings_of_images_and_of_text_reach_the_head(here):
    vision(distance="cosine", link="softmin", margin=0.35, angular_margin=0.1, learn_scale=True)
    words = "cosine, softmin, learn_scale, margin=0.35, angular_margin=0.1"
    assert results.label(head_of(read_config("out")), {}) == words
    assert metrics("out", "train")[0]["loss"] > metrics("out", "eval")[0]["val_loss"] # with the margins, and without
    text(distance="euclidean", learn_eps=True)
    assert results.label(head_of(read_config("out")), {}) == "euclidean, learn_eps"
    assert {"head.log_eps", "head.weight", "head.kind"} == {name for name in load("out")["model"] if "head." in name}


def test_evaluations_report_the_loss_without_what_training_adds(here):
    """At step 0 the weights are those of a run without it, and so is what is reported."""
    for run_one in (text, vision):
        rows = []
        for added in (dict(), dict(z_loss=0.5, label_smoothing=0.3)):
            run_one(**added)
            rows.append((metrics("out", "eval")[0]["val_loss"], metrics("out", "train")[0]["loss"]))
        (val, loss), (val_with, loss_with) = rows
        assert val == val_with and loss_with > loss + 0.1
    assert "softcap must lie in [0, inf), got -1.0" in refused(script="train_vision.py", softcap=-1)


def test_a_checkpoint_from_before_a_setting_goes_on(here):
    train(out_dir="out", max_iters=2)
    ckpt = load("out")
    for name in ("head_bias", "softcap"):
        del ckpt["model_args"][name]
    torch.save(ckpt, "out/ckpt.pt")
    run_script("train.py", "--init_from=resume", "--out_dir=out", "--max_iters=3")
    assert load("out")["step"] == 3
    assert "head_bias is True here, False" in refused("--init_from=resume", "--out_dir=out", "--head_bias=true")


def test_such_heads_are_exported_with_their_code(here):
    pytest.importorskip("transformers")
    settings = dict(distance="baseline", softcap=2, head_bias=True, learn_scale=True, n=5)
    train(out_dir="out", max_iters=2, learning_rate=0.1, **settings)
    printed, _ = run_script("export_hf.py", "--out_dir=out", "--checkpoint=ckpt.pt", "--to=hf")
    assert float(re.search("logits differ by at most (.*)", printed)[1]) < 1e-5 and "DistanceHeadForCausalLM" in printed
    assert "baseline, n=5, bias, learned scale, softcap=2" in open("hf/README.md").read()


def test_a_study_tells_such_heads_apart(monkeypatch):
    monkeypatch.setattr(study, "heads", "baseline,baseline+learn_n,baseline+head_bias+n=2,cosine+link=softmin+learn_n")
    monkeypatch.setattr(study, "seeds", "1")
    monkeypatch.setattr(study, "ns", "default,4")
    runs = dict(study.grid())
    assert list(runs) == ["baseline_s1", "baseline_learn_n_s1", "baseline_n2_head_bias_s1",
                          "cosine_stable_softmin_learn_n_s1", "cosine_stable_softmin_n4_learn_n_s1"]
    assert runs["baseline_n2_head_bias_s1"][-2:] == ["--n=2", "--head_bias=true"]
    monkeypatch.setattr(study, "heads", "baseline+depth=2")
    with pytest.raises(ValueError, match="'depth' is no setting of a head .legal: link, n, learn_n"):
        study.grid()
