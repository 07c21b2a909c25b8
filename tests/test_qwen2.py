"""
These tests concern Qwen2 alone: keys and values that queries share, RoPE, and its scales. Those in test_models.py hold
for every family.

$ pytest tests/test_qwen2.py
"""
import math
from types import SimpleNamespace

import pytest
import torch
from small_models import check_parity, hf_model, in_dtype, new_model, num_parameters, tokens

from model_qwen2 import SCALES, Qwen2, Qwen2Config, rotary

# -----------------------------------------------------------------------------
# Qwen2's weights


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_and_hidden_states_are_those_of_transformers(kv_heads, tied):
    hf = hf_model("qwen2", tied, num_key_value_heads=kv_heads)
    model = Qwen2.from_hf(hf).eval()
    assert (model.config.n_kv_head, model.config.tie_weights) == (kv_heads, tied)
    assert (model.config.block_size, model.config.rope_theta) == (24, 1e6)
    check_parity(hf, model, 1e-4)


@pytest.mark.parametrize("config", [
    dict(rope_theta=500.0), dict(rms_norm_eps=0.05), dict(num_attention_heads=2, num_key_value_heads=1),
    dict(num_attention_heads=16, num_key_value_heads=2), dict(num_hidden_layers=3), dict(intermediate_size=17)])
def test_other_shapes_and_constants(config):
    hf = hf_model("qwen2", **config)
    check_parity(hf, Qwen2.from_hf(hf).eval(), 1e-4)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_in_float64_to_ten_digits(kv_heads):
    hf = in_dtype(hf_model("qwen2", num_key_value_heads=kv_heads), torch.float64)
    check_parity(hf, Qwen2.from_hf(hf).double().eval(), 1e-10)


@pytest.mark.parametrize("overrides, message", [
    (dict(n_kv_head=4, rope_theta=1e4), r"fix n_kv_head=2 \(asked: 4\), rope_theta=1000000.0 \(asked: 10000.0\)")])
def test_overrides_that_the_weights_do_not_allow(overrides, message):
    hf = hf_model("qwen2")
    with pytest.raises(ValueError, match=message):
        Qwen2.from_hf(hf, **overrides)


@pytest.mark.parametrize("config, message", [
    (dict(hidden_act="gelu"), "SiLU, the model is 'qwen2' with 'gelu'"),
    (dict(use_sliding_window=True, sliding_window=8, max_window_layers=1), "sliding window"),
    (dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e6)), "rope_type 'default' .* has 'linear'"),
    (dict(head_dim=16), "head_dim 8, the model has .* 16"),
])
def test_another_architecture_is_refused(config, message):
    hf = hf_model("qwen2", **config)
    with pytest.raises(ValueError, match=message):
        Qwen2.from_hf(hf)


def test_another_family_is_refused():
    transformers = pytest.importorskip("transformers")
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=88, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2))
    with pytest.raises(ValueError, match="the model is 'llama'"):
        Qwen2.from_hf(llama)


def test_a_window_that_no_layer_uses_is_no_reason_to_refuse():
    hf = hf_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2)
    check_parity(hf, Qwen2.from_hf(hf).eval(), 1e-4)


def test_a_config_of_transformers_4():
    hf, idx = hf_model("qwen2", rope_theta=500.0), tokens(2, 24)
    new_keys = ("rope_parameters", "layer_types")
    old_config = {key: value for key, value in hf.config.to_dict().items() if key not in new_keys}

    def as_in_version_4(**rope):
        return SimpleNamespace(config=SimpleNamespace(**old_config, **rope), state_dict=hf.state_dict)

    model = Qwen2.from_hf(as_in_version_4(rope_theta=500.0, rope_scaling=None)).eval()
    torch.testing.assert_close(model.head(model.features(idx)), hf(idx).logits, rtol=0, atol=1e-4)
    for key in ("type", "rope_type"):
        with pytest.raises(ValueError, match="yarn"):
            Qwen2.from_hf(as_in_version_4(rope_theta=500.0, rope_scaling={key: "yarn", "factor": 4.0}))

# -----------------------------------------------------------------------------
# construction


def test_the_published_model_has_as_many_parameters():
    with torch.device("meta"): # shapes without memory
        tied, untied = Qwen2(Qwen2Config(tie_weights=True)), Qwen2(Qwen2Config(tie_weights=False))
    assert num_parameters(tied) == 494_032_768
    assert num_parameters(untied) == 494_032_768 + 151_936 * 896
    assert Qwen2Config(**SCALES["0.5B"]) == Qwen2Config() # the defaults


@pytest.mark.parametrize("scale, millions", [("tiny", 0.74), ("small", 9.4), ("medium", 73), ("0.5B", 358)])
def test_scales(scale, millions):
    with torch.device("meta"):
        model = Qwen2(Qwen2Config(**SCALES[scale]))
    assert num_parameters(model.transformer.h) / 1e6 == pytest.approx(millions, rel=0.01)


def test_a_longer_context_takes_the_same_weights():
    model, longer, idx = new_model("qwen2"), new_model("qwen2", seed=1, block_size=48), tokens(2, 24)
    longer.load_state_dict(model.state_dict()) # angles are no weights
    torch.testing.assert_close(longer.features(idx), model.features(idx))
    assert longer.features(tokens(1, 48)).shape == (1, 48, 32)


@pytest.mark.parametrize("config, message", [
    (dict(n_kv_head=3), "n_head 4 must be a multiple of n_kv_head 3"),
    (dict(n_kv_head=0), "n_head 4 must be a multiple of n_kv_head 0"),
    (dict(n_kv_head=8), "n_head 4 must be a multiple of n_kv_head 8"),
    (dict(n_embd=36), "n_embd / n_head is 9, it must be even"),
])
def test_a_config_that_does_not_fit_together(config, message):
    with pytest.raises(ValueError, match=message):
        new_model("qwen2", **config)


def test_the_default_base_of_rope_is_that_of_the_published_models():
    """10^6, where transformers' own default is 10^4: the slowest pair of 64 turns once in 4 million tokens."""
    assert Qwen2Config().rope_theta == 1e6
    cos, sin = rotary(2, 64, Qwen2Config().rope_theta)
    torch.testing.assert_close(sin[1], torch.tensor([math.sin(1e6 ** (-i / 32)) for i in range(32)]))
