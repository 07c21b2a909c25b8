"""
These tests hold for all three families of language models: each agrees with its transformers model, and has what the
training loop takes for granted. What only one of them has is in test_model.py (GPT), test_bert.py and test_qwen2.py.

$ pytest tests/test_models.py
"""
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_models import (
    AS_THEIRS,
    DECODER_BIAS,
    EVERY_HEAD,
    SMALL,
    check_parity,
    hf_model,
    hf_names,
    hf_tensor,
    in_dtype,
    masked,
    new_model,
    tokens,
)

from families import FAMILIES

every_family = pytest.mark.parametrize("family", FAMILIES)
causal_families = pytest.mark.parametrize("family", ["gpt", "qwen2"])
tied_or_not = pytest.mark.parametrize("tied", [True, False])
fp32_and_fp64 = pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-10)])

NO_NEW_IDS = {"gpt": {}, "bert": dict(mask_id=3), "qwen2": {}} # without it, BERT's [MASK] and [PAD] are two more tokens


def from_hf(family, hf, **overrides):
    return FAMILIES[family].Model.from_hf(hf, **overrides)


def both_losses(family, hf, model, idx):
    """Compute our loss and transformers' on the same text: of every next token, or of the masked ones."""
    if family != "bert":
        return model(idx[:, :-1], idx[:, 1:])[1], hf(idx, labels=idx).loss
    inputs, labels, positions = masked(idx, mask_id=3)
    labels_everywhere = torch.full(idx.shape, -100).scatter(1, positions, labels)
    return model(inputs, labels, positions)[1], hf(inputs, labels=labels_everywhere).loss


def randomise(model, std=0.3):
    """Add noise to all weights of a new model: some of them are all 0 or all 1."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=std)
    return model

# -----------------------------------------------------------------------------
# pretrained weights


@every_family
@tied_or_not
@fp32_and_fp64
def test_logits_and_loss_are_those_of_transformers(family, tied, dtype, tolerance):
    hf = in_dtype(hf_model(family, tied), dtype)
    model = from_hf(family, hf).to(dtype).eval()
    assert model.config == FAMILIES[family].Config(**{**SMALL[family], "tie_weights": tied, **AS_THEIRS})
    check_parity(hf, model, tolerance)
    with torch.no_grad():
        for length in (24, 7): # all positions, and fewer
            idx, targets = tokens(3, length), tokens(3, length, seed=2)
            by_hand = F.cross_entropy(hf(idx).logits.flatten(0, 1), targets.flatten())
            torch.testing.assert_close(model(idx, targets)[1], by_hand, rtol=0, atol=tolerance)
            ours, theirs = both_losses(family, hf, model, idx)
            assert ours.item() == pytest.approx(theirs.item(), abs=1e-4) # theirs is always computed in fp32


@tied_or_not
@pytest.mark.parametrize("family, config", [
    ("gpt", {}), ("bert", {}), ("qwen2", dict(num_key_value_heads=1)), ("qwen2", dict(num_key_value_heads=2)),
    ("qwen2", dict(num_key_value_heads=4))])
def test_loss_and_every_gradient_are_those_of_transformers(family, config, tied):
    hf = hf_model(family, tied, **config)
    model = from_hf(family, hf)
    ours, theirs = both_losses(family, hf, model, tokens(3, 24))
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-4)
    ours.backward()
    theirs.backward()
    gradients = {name: p.grad for name, p in hf.named_parameters() if name not in DECODER_BIAS}
    for name, gradient in gradients.items():
        if "key.bias" not in name and "k_proj.bias" not in name: # the softmax hardly sees it
            assert gradient.abs().max() > 1e-4, name
    seen = set()
    for name, p in model.named_parameters():
        seen.update(hf_names(family, name))
        expected = hf_tensor(family, name, gradients)
        rows = len(expected)
        torch.testing.assert_close(p.grad[:rows], expected, rtol=1e-3, atol=1e-5,
                                   msg=lambda m, name=name: f"{name}: {m}")
        assert not p.grad[rows:].any() # rows that pad the vocabulary
    assert seen == gradients.keys()


@every_family
@tied_or_not
@pytest.mark.parametrize("tie_weights", [True, False])
def test_pretrained_weights_tied_the_other_way(family, tied, tie_weights):
    hf = hf_model(family, tied)
    model = from_hf(family, hf, tie_weights=tie_weights)
    words = hf.get_input_embeddings()
    prototypes = words if tie_weights else hf.get_output_embeddings()
    assert torch.equal(model.head.weight[:97], prototypes.weight)
    assert torch.equal(model.transformer.wte.weight[:97], words.weight)
    assert (model.head.weight is model.transformer.wte.weight) == tie_weights


@every_family
@tied_or_not
def test_a_shorter_context_has_the_same_scores(family, tied):
    hf, idx = hf_model(family, tied), tokens(2, 8)
    model = from_hf(family, hf, block_size=8, dropout=0.1).eval()
    assert model.config.block_size == 8 and model.config.dropout == 0.1
    if family != "qwen2": # which has no positions to keep
        assert model.transformer.wpe.weight.shape == (8, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.head(model.features(idx)), hf(idx).logits, rtol=0, atol=1e-4)


@every_family
@tied_or_not
def test_half_precision_weights_are_read_in_fp32(family, tied):
    hf = hf_model(family, tied).bfloat16()
    for name, p in from_hf(family, hf).state_dict().items():
        expected = hf_tensor(family, name, hf.state_dict()).float()
        assert p.dtype == torch.float32 and torch.equal(p[:len(expected)], expected), name


@every_family
@tied_or_not
def test_a_distance_head_on_a_pretrained_backbone(family, tied):
    hf = hf_model(family, tied)
    torch.manual_seed(3)
    model = from_hf(family, hf, distance="cosine", tie_weights=False)
    for name, p in model.state_dict().items():
        if name.startswith("transformer."):
            expected = hf_tensor(family, name, hf.state_dict())
            assert torch.equal(p[:len(expected)], expected), name
    # the prototypes start as those of a new model do: the old output vectors were made for dot products
    new = new_model(family, seed=3, distance="cosine", tie_weights=False)
    assert torch.equal(model.head.weight, new.head.weight)
    # unless they are the token embeddings too
    shared = from_hf(family, hf, distance="cosine", tie_weights=True)
    assert shared.head.weight is shared.transformer.wte.weight
    assert torch.equal(shared.head.weight[:97], hf.get_input_embeddings().weight)
    # which is so in a new model where it was so in the old one
    as_before = from_hf(family, hf, distance="cosine")
    assert (as_before.head.weight is as_before.transformer.wte.weight) == tied


@every_family
@pytest.mark.parametrize("overrides, message", [
    (dict(n_layer=3, vocab_size=50), r"fix n_layer=2 \(asked: 3\), vocab_size=97 \(asked: 50\)"),
    (dict(n_layers=2), "has no n_layers"),
    (dict(block_size=25), "25 is beyond the 24 positions"),
    (dict(distance="cosin"), "did you mean 'cosine'"),
])
def test_overrides_that_the_weights_do_not_allow(family, overrides, message):
    hf = hf_model(family)
    with pytest.raises(ValueError, match=message):
        from_hf(family, hf, **overrides)


@pytest.mark.parametrize("family, name", [("gpt", "gpt2"), ("bert", "bert-base-uncased"), ("qwen2", "Qwen/Qwen2-0.5B")])
def test_pretrained_without_transformers_says_what_to_install(monkeypatch, family, name):
    monkeypatch.setitem(sys.modules, "transformers", None) # an import of it fails
    with pytest.raises(ImportError, match=f"init_from='{name}' .* pip install transformers"):
        FAMILIES[family].Model.from_pretrained(name)
    with pytest.raises(ImportError, match="to_hf makes a model of transformers: pip install transformers"):
        new_model(family).to_hf()


@every_family
@tied_or_not
def test_there_and_back_again(family, tied):
    hf = hf_model(family, tied)
    again = from_hf(family, hf, **NO_NEW_IDS[family]).to_hf()
    before, after = hf.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert again.config.to_dict() == hf.config.to_dict()


@pytest.mark.parametrize("family, config", [
    ("gpt", dict(tie_weights=True)),
    ("gpt", dict(feature_scale=3.0)),
    ("gpt", dict(dropout=0.1)),
    ("bert", dict(mask_id=3, tie_weights=True)),
    ("bert", dict(mask_id=3, tie_weights=False, feature_scale=3.0)),
    ("bert", dict(mask_id=3, dropout=0.1)),
    ("qwen2", dict(tie_weights=True)),
    ("qwen2", dict(n_kv_head=1, feature_scale=3.0)),
    ("qwen2", dict(rope_theta=500.0, norm_eps=0.05, dropout=0.1)),
])
def test_to_hf_and_back(family, config, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, idx = randomise(new_model(family, **config)).eval(), tokens(3, 24)
    Model = FAMILIES[family].Model
    Auto = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    special = NO_NEW_IDS[family]
    with torch.no_grad():
        expected = model.head(model.features(idx))
        hf = model.to_hf()
        words, prototypes = hf.get_input_embeddings().weight, hf.get_output_embeddings().weight
        assert not hf.training and prototypes.shape == (97, 32)
        assert (prototypes is words) == model.config.tie_weights
        hf.save_pretrained(tmp_path)
        for same in (hf, Auto.from_pretrained(tmp_path)):
            torch.testing.assert_close(same(idx).logits, expected, rtol=0, atol=1e-4)
        for back in (Model.from_hf(hf, **special).eval(), Model.from_pretrained(str(tmp_path), **special).eval()):
            assert back.config == replace(model.config, feature_scale=1.0) # it went into the last norm
            torch.testing.assert_close(back.head(back.features(idx)), expected, rtol=0, atol=1e-4)
        before = hf(idx).logits
        model.transformer.ln_f.weight.zero_() # theirs is a copy
        assert torch.equal(hf(idx).logits, before)


@every_family
def test_a_distance_head_cannot_be_exported(family):
    with pytest.raises(ValueError, match="transformers has no layer for the cosine head as it is here"):
        new_model(family, distance="cosine").to_hf()

# -----------------------------------------------------------------------------
# features -> head -> loss


@causal_families
@pytest.mark.parametrize("distance, learn_n", [
    ("baseline", False), ("cosine", False), ("cosine", True), ("manhattan", False), ("offset_l2", False)])
def test_forward_is_features_head_and_cross_entropy(family, distance, learn_n):
    model = new_model(family, distance=distance, learn_n=learn_n)
    idx, targets = tokens(3, 24), tokens(3, 24, seed=2)
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


@pytest.mark.parametrize("family, visible", [("gpt", 1e-4), ("qwen2", 1e-5)])
def test_the_future_is_not_seen(family, visible):
    model, idx, t = new_model(family), tokens(2, 24), 10
    changed = idx.clone()
    changed[:, t] = (changed[:, t] + 1) % 97
    before, after = model.features(idx), model.features(changed)
    torch.testing.assert_close(before[:, :t], after[:, :t], rtol=0, atol=1e-6)
    assert (before[:, t:] - after[:, t:]).abs().amax(-1).min() > visible # all that come later see it


@every_family
@pytest.mark.parametrize("distance, default", [("cosine", 32 ** -0.5), ("baseline", 1.0)])
def test_feature_scale_reaches_the_features(family, distance, default):
    idx = tokens(2, 24)
    h = new_model(family, distance=distance).features(idx)
    h3 = new_model(family, distance=distance, feature_scale=3.0).features(idx)
    torch.testing.assert_close(h / default, h3 / 3.0)
    assert (h / default).pow(2).mean().item() == pytest.approx(1, abs=0.03) # unit variance before the scale


@every_family
def test_dropout_only_while_training(family):
    model, idx = new_model(family, dropout=0.5), tokens(2, 24)
    assert not torch.equal(model.features(idx), model.features(idx))
    model.eval()
    assert torch.equal(model.features(idx), model.features(idx))


@causal_families
def test_a_distance_head_learns(family):
    model, idx = new_model(family, distance="cosine"), tokens(4, 25)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(30):
        losses.append(model(idx[:, :-1], idx[:, 1:])[1])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0] and all(p.grad.abs().sum() > 0 for p in model.parameters())

# -----------------------------------------------------------------------------
# construction


# tied embeddings are the head's prototypes in GPT and Qwen2, so they differ from head to head; in BERT they do not
@pytest.mark.parametrize("distance, variant", EVERY_HEAD)
@pytest.mark.parametrize("family, config", [
    ("gpt", {}), ("bert", dict(tie_weights=True)), ("bert", dict(tie_weights=False)), ("qwen2", {})])
def test_every_head_meets_the_same_backbone(family, config, distance, variant):
    expected = new_model(family, seed=5, distance="euclidean", **config).transformer.state_dict()
    for learn_n in (False, True):
        model = new_model(family, seed=5, distance=distance, variant=variant, learn_n=learn_n, **config)
        found = model.transformer.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], p) for name, p in expected.items())


@pytest.mark.parametrize("family, n_embd, seed, std_within, mean_within", [
    ("gpt", 128, 2, 0.05, 1e-3), ("bert", 64, 0, 0.15, 5e-3), ("qwen2", 128, 2, 0.05, 1e-3)])
def test_initial_weights(family, n_embd, seed, std_within, mean_within):
    model = new_model(family, n_embd=n_embd, seed=seed)
    for name, p in model.transformer.named_parameters():
        if p.dim() == 2:
            std = 0.02
            if family == "gpt" and name.endswith("c_proj.weight"): # the others have no smaller residual projections
                std = 0.02 / (2 * model.config.n_layer) ** 0.5
            assert p.std().item() == pytest.approx(std, rel=std_within), name
            assert abs(p.mean().item()) < mean_within, name
        else:
            weight_of_a_norm = "ln_" in name and name.endswith("weight")
            assert torch.equal(p, torch.full_like(p, weight_of_a_norm)), name


@every_family
def test_tied_weights_are_one_parameter_that_learns_from_both_ends(family):
    model = new_model(family, tie_weights=True, distance="cosine")
    untied = new_model(family, tie_weights=False, distance="cosine")
    assert model.head.weight is model.transformer.wte.weight
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(list(untied.parameters())) - 1
    assert names.count("transformer.wte.weight") + names.count("head.weight") == 1
    idx = tokens(2, 24)
    model(idx, torch.full_like(idx, 96))[1].backward()
    assert (model.head.weight.grad[:97].abs().sum(1) > 0).all() # tokens that were only predicted too
    assert all(p.grad is not None for p in model.parameters()) # or DDP would wait for it


@every_family
@pytest.mark.parametrize("config, message", [
    (dict(n_embd=30), "30 must be a multiple of n_head 4"),
    (dict(distance="cosine", variant="exact"), "unknown .*variant 'exact'"),
    (dict(distance="minkowski", distance_params="q=3"), "q"),
])
def test_a_config_that_does_not_fit_together(family, config, message):
    with pytest.raises(ValueError, match=message):
        new_model(family, **config)


@every_family
def test_a_sequence_beyond_the_context_is_refused(family):
    with pytest.raises(ValueError, match="25 tokens, but block_size is 24"):
        new_model(family).features(tokens(1, 25))
