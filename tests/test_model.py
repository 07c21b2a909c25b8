"""
model.py against transformers' GPT-2, and what the training loop takes for granted of it.

$ pytest tests/test_model.py
"""
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1") # before transformers is imported

import pytest
import torch
import torch.nn.functional as F

from distances import DISTANCES
from model import GPT, GPTConfig

SMALL = dict(block_size=24, vocab_size=97, n_layer=2, n_head=4, n_embd=32) # 97 tokens have 128 rows, 31 of them padding
EVERY_HEAD = [("baseline", "")] + [(distance, variant) for distance, variants in DISTANCES.items() for variant in variants]


def gpt(seed=0, **config):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**SMALL, **config}))


def tokens(*shape, seed=1):
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(seed))

# -----------------------------------------------------------------------------
# GPT-2's weights


def hf_gpt2(tied, seed=0):
    """A random GPT-2. Its own initialisation, with biases of 0 and weights of 0.02, would hide a term that was left out."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=97, n_positions=24, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=tied))
    with torch.no_grad():
        for name, p in hf.named_parameters():
            p.normal_(mean=1.0 if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.0, std=0.2)
    return hf.eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_logits_and_loss_are_those_of_transformers(tied, dtype, tolerance):
    hf = hf_gpt2(tied).to(dtype)
    model = GPT.from_hf(hf).to(dtype).eval()
    assert model.config.tie_weights == tied and model.config.bias
    for length in (24, 7): # all positions, and fewer
        idx = tokens(3, length)
        with torch.no_grad():
            expected, z = hf(idx, labels=idx), model.head(model.features(idx))
            assert expected.logits.std() > 0.5 # the agreement is not one of zeros
            torch.testing.assert_close(z, expected.logits, rtol=0, atol=tolerance)
            loss = model(idx[:, :-1], idx[:, 1:])[1]
            by_hand = F.cross_entropy(expected.logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
            torch.testing.assert_close(loss, by_hand, rtol=0, atol=tolerance)
            assert loss.item() == pytest.approx(expected.loss.item(), abs=1e-4) # theirs is always computed in fp32


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_pretrained_weights_tied_the_other_way(tied, tie_weights):
    hf = hf_gpt2(tied)
    model, head = GPT.from_hf(hf, tie_weights=tie_weights), hf.transformer.wte if tie_weights else hf.lm_head
    assert torch.equal(model.head.weight[:97], head.weight) and torch.equal(model.transformer.wte.weight[:97], hf.transformer.wte.weight)
    assert (model.head.weight is model.transformer.wte.weight) == tie_weights


def test_a_shorter_context_keeps_the_first_positions():
    hf, idx = hf_gpt2(True), tokens(2, 8)
    model = GPT.from_hf(hf, block_size=8, dropout=0.0)
    assert model.transformer.wpe.weight.shape == (8, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.head(model.features(idx)), hf(idx).logits, rtol=0, atol=1e-4)


def test_a_distance_head_on_a_pretrained_backbone():
    hf = hf_gpt2(True)
    torch.manual_seed(3)
    model = GPT.from_hf(hf, distance="cosine", tie_weights=False)
    theirs = hf.transformer.state_dict()
    for name, p in model.transformer.state_dict().items():
        q = theirs[name].T if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")) else theirs[name]
        assert torch.equal(p[:len(q)], q), name
    # the prototypes start as those of a new model do: the old output vectors were made for dot products
    assert torch.equal(model.head.weight, gpt(seed=3, distance="cosine", bias=True).head.weight)
    tied = GPT.from_hf(hf, distance="cosine")
    assert tied.head.weight is tied.transformer.wte.weight and torch.equal(tied.head.weight[:97], hf.transformer.wte.weight)


@pytest.mark.parametrize("overrides, message", [
    (dict(n_layer=3, vocab_size=50), r"fix n_layer=2 \(asked: 3\), vocab_size=97 \(asked: 50\)"), (dict(n_layers=2), "has no n_layers"),
    (dict(block_size=25), "25 is beyond the 24 positions"), (dict(distance="cosin"), "did you mean 'cosine'")])
def test_overrides_that_the_weights_do_not_allow(overrides, message):
    with pytest.raises(ValueError, match=message):
        GPT.from_hf(hf_gpt2(True), **overrides)


def test_another_activation_is_refused():
    hf = hf_gpt2(True)
    hf.config.activation_function = "relu"
    with pytest.raises(ValueError, match="tanh GELU, the model has 'relu'"):
        GPT.from_hf(hf)


def test_pretrained_without_transformers_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None) # an import of it fails
    with pytest.raises(ImportError, match="init_from='gpt2' .* pip install transformers"):
        GPT.from_pretrained("gpt2")


def test_gpt2_has_as_many_parameters_as_gpt2():
    with torch.device("meta"): # shapes without memory
        tied, untied = (GPT(GPTConfig(tie_weights=tie)) for tie in (True, False))
    padding = (50304 - 50257) * 768
    assert sum(p.numel() for p in tied.parameters()) == 124_439_808 + padding
    assert sum(p.numel() for p in untied.parameters()) == 124_439_808 + padding + 50304 * 768
    assert sum(p.numel() for p in untied.transformer.parameters()) == 124_439_808 + padding

# -----------------------------------------------------------------------------
# features -> head -> loss


@pytest.mark.parametrize("distance", ["baseline", "cosine", "manhattan", "offset_l2"])
def test_forward_is_features_head_and_cross_entropy(distance):
    model, idx, targets = gpt(distance=distance, learn_n=distance == "cosine"), tokens(3, 24), tokens(3, 24, seed=2)
    targets[0, :5] = targets[2, 20:] = -1 # do not count
    z = model.head(model.features(idx))
    assert z.shape == (3, 24, 97) # no padding rows
    none, loss = model(idx, targets)
    expected = F.cross_entropy(z.flatten(0, 1), targets.flatten(), ignore_index=-1)
    assert none is None and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    # the gradient goes through both paths into the whole model alike
    parameters = list(model.parameters())
    for g, e in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-6)
    last, none = model(idx)
    assert none is None and last.shape == (3, 1, 97)
    torch.testing.assert_close(last, z[:, -1:], rtol=0, atol=1e-4)


def test_the_future_is_not_seen():
    model, idx, t = gpt(), tokens(2, 24), 10
    changed = idx.clone()
    changed[:, t] = (changed[:, t] + 1) % 97
    before, after = model.features(idx), model.features(changed)
    torch.testing.assert_close(before[:, :t], after[:, :t], rtol=0, atol=1e-6)
    assert (before[:, t:] - after[:, t:]).abs().amax(-1).min() > 1e-4 # all that come later see it


@pytest.mark.parametrize("distance, default", [("cosine", 32 ** -0.5), ("baseline", 1.0)])
def test_feature_scale_reaches_the_features(distance, default):
    idx = tokens(2, 24)
    h, h3 = gpt(distance=distance).features(idx), gpt(distance=distance, feature_scale=3.0).features(idx)
    torch.testing.assert_close(h / default, h3 / 3.0)
    assert (h / default).pow(2).mean().item() == pytest.approx(1, abs=0.03) # unit variance before the scale


def test_dropout_only_while_training():
    model, idx = gpt(dropout=0.5), tokens(2, 24)
    assert not torch.equal(model.features(idx), model.features(idx))
    model.eval()
    assert torch.equal(model.features(idx), model.features(idx))

# -----------------------------------------------------------------------------
# construction


@pytest.mark.parametrize("distance, variant", EVERY_HEAD)
def test_every_head_meets_the_same_backbone(distance, variant):
    expected = gpt(seed=5, distance="euclidean").transformer.state_dict()
    for more in ({}, dict(learn_n=True)):
        found = gpt(seed=5, distance=distance, variant=variant, **more).transformer.state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[name], p) for name, p in expected.items())


def test_tied_weights_are_one_parameter_that_learns_from_both_ends():
    model, untied = gpt(tie_weights=True, distance="cosine"), gpt(distance="cosine")
    assert model.head.weight is model.transformer.wte.weight
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(list(untied.parameters())) - 1 and names.count("transformer.wte.weight") + names.count("head.weight") == 1
    idx = tokens(2, 24)
    model(idx, torch.full_like(idx, 96))[1].backward()
    assert (model.head.weight.grad[:97].abs().sum(1) > 0).all() # tokens that were only predicted too


@pytest.mark.parametrize("config, message", [
    (dict(n_embd=30), "30 must be a multiple of n_head 4"), (dict(distance="cosine", variant="exact"), "unknown .*variant 'exact'"),
    (dict(distance="minkowski", distance_params="q=3"), "q")])
def test_a_config_that_does_not_fit_together(config, message):
    with pytest.raises(ValueError, match=message):
        gpt(**config)


def test_a_sequence_beyond_the_context_is_refused():
    with pytest.raises(ValueError, match="25 tokens, but block_size is 24"):
        gpt().features(tokens(1, 25))
