"""
The heads and terms of other papers, each against its published formula, which is written out here on its own; as
settings of the scripts; and in tables, where they are told apart from the baseline.

$ pytest tests/test_controls.py
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import flags, load, metrics, refused, run_script, train
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
# softcap, z-loss, label smoothing

@pytest.mark.parametrize("distance", ["baseline", "cosine", "manhattan"])
def test_softcap(distance, monkeypatch):
    head = make(distance, softcap=1.5, bias=True, learn_n=True)
    uncapped = make(distance, bias=True, learn_n=True)
    uncapped.load_state_dict(head.state_dict())
    z = uncapped(batch()[0])
    torch.testing.assert_close(head(batch()[0]), 1.5 * (z / 1.5).tanh())
    assert (z.abs() > 1.5).any() # so that it matters

    def per_row(h, y):
        for name, p in head.named_parameters():
            uncapped.get_parameter(name).data = p.data
        parameters = dict(head.named_parameters())
        z = torch.func.functional_call(uncapped, parameters, h)
        return nll(1.5 * torch.tanh(z / 1.5), y)
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
