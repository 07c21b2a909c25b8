"""
These tests concern GPT alone; those in test_models.py hold for every family.

$ pytest tests/test_model.py
"""
import pytest
import torch
from small_models import hf_model, num_parameters

from model import GPT, GPTConfig


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
