"""
These tests concern GPT alone; those in test_models.py hold for every family.

$ pytest tests/test_model.py
"""
from dataclasses import replace

import pytest
import torch
from small_models import AS_THEIRS, EVERY_HEAD, hf_model, num_parameters

from model import GPT, GPTConfig, language_model_head


def test_another_activation_is_refused():
    hf = hf_model("gpt")
    hf.config.activation_function = "relu"
    with pytest.raises(ValueError, match="tanh GELU, the model has 'relu'"):
        GPT.from_hf(hf)


def test_gpt2_has_as_many_parameters_as_gpt2():
    with torch.device("meta"): # shapes without memory
        tied, untied = GPT(GPTConfig(tie_weights=True)), GPT(GPTConfig(tie_weights=False))
    padding = (50304 - 50257) * 768
    assert num_parameters(tied) == 124_439_808 + padding
    assert num_parameters(untied) == 124_439_808 + padding + 50304 * 768
    assert num_parameters(untied.transformer) == 124_439_808 + padding


def nanogpt_checkpoint(model, prefix=""):
    """The dict that nanoGPT saves of a GPT with these weights: the vocabulary has no padding, the head is tied."""
    c = model.config
    weights = {name: p for name, p in model.state_dict().items() if name.startswith("transformer.")}
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:c.vocab_size]
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    arguments = {name: getattr(c, name) for name in names}
    return {"model": {prefix + name: p for name, p in weights.items()}, "model_args": arguments, "iter_num": 7}


@pytest.mark.parametrize("prefix", ["", "_orig_mod."]) # of a compiled model
def test_a_checkpoint_of_nanogpt(prefix, tmp_path):
    torch.manual_seed(0)
    config = GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=16, bias=False, tie_weights=True)
    model, idx = GPT(config).eval(), torch.randint(65, (2, 16))
    torch.save(nanogpt_checkpoint(model, prefix), tmp_path / "ckpt.pt")
    loaded = GPT.from_pretrained(str(tmp_path / "ckpt.pt")).eval()
    assert loaded.config == replace(config, **AS_THEIRS)
    assert torch.equal(loaded.head(loaded.features(idx)), model.head(model.features(idx)))
    shorter = GPT.from_pretrained(str(tmp_path / "ckpt.pt"), block_size=8, tie_weights=False, distance="cosine").eval()
    scale = shorter.head.feature_scale
    torch.testing.assert_close(shorter.features(idx[:, :8]) / scale, model.features(idx[:, :8]))


def test_another_file_is_no_checkpoint_of_nanogpt():
    model = GPT(GPTConfig(block_size=16, vocab_size=65, n_layer=1, n_head=2, n_embd=16))
    for checkpoint in ({}, {"model": model.state_dict(), "model_args": {}}):
        with pytest.raises(ValueError, match="this is no checkpoint of nanoGPT's train.py"):
            GPT.from_nanogpt(checkpoint)


def test_a_checkpoint_that_lacks_a_weight_is_refused():
    config = GPTConfig(block_size=16, vocab_size=65, n_layer=1, n_head=2, n_embd=16, bias=False, tie_weights=True)
    checkpoint = nanogpt_checkpoint(GPT(config))
    del checkpoint["model"]["transformer.wpe.weight"]
    with pytest.raises(ValueError, match="has no transformer.wpe.weight"):
        GPT.from_nanogpt(checkpoint)


def test_the_head_for_a_vocabulary():
    """n and feature scale are those with which a language model begins, unless they are given."""
    head = language_model_head(64, 1000, "minkowski", p=3.0)
    assert (head.n, head.feature_scale, head.num_classes, head.num_prototypes) == (16.0, 0.125, 1000, 1024)
    assert language_model_head(64, 1000, "chebyshev", "smooth").n == 80.0
    assert language_model_head(64, 1000, "baseline").feature_scale == 1.0
    head = language_model_head(64, 1000, "cosine", n=28.0, feature_scale=0.5, link="softmin")
    assert (head.n, head.feature_scale, head.link) == (28.0, 0.5, "softmin")


@pytest.mark.parametrize("distance, variant", EVERY_HEAD)
def test_a_new_model_begins_with_scores_that_are_spread_by_a_nat(distance, variant):
    """That is what the defaults are for. The linear head is as it is, and Gumbel-Hamming has noise as well."""
    torch.manual_seed(0)
    head = language_model_head(128, 4096, distance, variant).eval()
    with torch.no_grad():
        spread = head(torch.randn(8, 128) * head.feature_scale).std(1).mean()
    expected = {"": 0.58, "gumbel": 0.18, "normalized": 0.63}.get(variant, 1.0) # normalized: as it was tuned
    assert spread.item() == pytest.approx(expected, rel=0.2)


def test_a_model_has_numbers_where_its_config_has_defaults():
    """A checkpoint keeps the model's config, and must not depend on what the defaults are when it is read."""
    config = GPTConfig(block_size=16, vocab_size=65, n_layer=1, n_head=2, n_embd=16, distance="cosine")
    assert GPT(config).config == replace(config, n=4.0, feature_scale=0.25)
    assert GPT(replace(config, distance="minkowski:p=3")).config.n == 8.0
    assert GPT(replace(config, n=5.0, feature_scale=3.0)).config == replace(config, n=5.0, feature_scale=3.0)
