"""
The heads and terms of other papers, each against its published formula, which is written out here on its own; as
settings of the scripts; and in tables, where they are told apart from the baseline.

$ pytest tests/test_controls.py
"""
import json

import pytest
import torch
import torch.nn.functional as F
from helpers import SETTINGS, load, metrics, refused, run_script, train

import distances
import results
import study
from distances import SMALL, DistanceHead
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
# as settings

def vision(**settings):
    args = [f"--{key}={value}" for key, value in dict(
        epochs=1, plots=False, track_emissions=False, threads=1, out_dir="out", overwrite=True, **settings).items()]
    return run_script("train_vision.py", *args)


def test_settings_reach_the_head_and_its_name(here):
    for settings, words in ((dict(), "baseline"), (dict(n=2), "baseline, n=2"), (dict(learn_n=True),
                            "baseline, learned n"), (dict(head_bias=True), "baseline, head_bias")):
        train(out_dir="out", overwrite=True, max_iters=1, distance="baseline", **settings)
        of_text = head_of(read_config("out"))
        vision(**settings)
        of_images = head_of(read_config("out"))
        for head in (of_text, of_images):
            assert results.label(head, {}) == words and head.is_baseline == (words == "baseline")
        assert ("head.bias" in load("out")["model"]) == ("bias" in words)
        assert ("head.log_n" in load("out")["model"]) == ("learned" in words)


def test_a_checkpoint_from_before_a_setting_goes_on(here):
    train(out_dir="out", max_iters=2)
    ckpt = load("out")
    del ckpt["model_args"]["head_bias"]
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
