"""Language models that are small enough to test: one of each family, and the transformers model that is its oracle."""
from types import MethodType

import numpy as np
import pytest
import torch

import model_bert
import model_qwen2
from distances import DISTANCES
from families import FAMILIES

EVERY_DISTANCE = [(distance, variant) for distance, variants in DISTANCES.items() for variant in variants]
EVERY_HEAD = [("baseline", ""), *EVERY_DISTANCE]

# 97 tokens have 128 rows; the other 31 are padding, or BERT's [MASK] and [PAD] and padding
SMALL = {
    "gpt": dict(block_size=24, vocab_size=97, n_layer=2, n_head=4, n_embd=32),
    "bert": dict(block_size=24, vocab_size=97, n_layer=2, n_head=4, n_embd=32, dropout=0.0),
    "qwen2": dict(block_size=24, vocab_size=97, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, intermediate_size=88),
}

# the same shapes, as transformers writes them
HF_SMALL = {
    "gpt": ("GPT2LMHeadModel", "GPT2Config", dict(
        vocab_size=97, n_positions=24, n_layer=2, n_head=4, n_embd=32,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
    "bert": ("BertForMaskedLM", "BertConfig", dict(
        vocab_size=97, max_position_embeddings=24, num_hidden_layers=2, num_attention_heads=4, hidden_size=32,
        intermediate_size=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", dict(
        vocab_size=97, max_position_embeddings=24, num_hidden_layers=2, num_attention_heads=4, hidden_size=32,
        num_key_value_heads=2, intermediate_size=88, rope_theta=1e6,
        attn_implementation="eager")), # attention written out, not the function that our model calls
}

AS_THEIRS = dict(n=1.0, feature_scale=1.0) # in the config of a model that was read from transformers
DECODER_BIAS = {"cls.predictions.bias", "cls.predictions.decoder.bias"} # BERT's, by both names; our heads have none


def new_model(family, seed=0, **config):
    """Make a small model with new weights. config overrides SMALL."""
    torch.manual_seed(seed)
    return FAMILIES[family].Model(FAMILIES[family].Config(**{**SMALL[family], **config}))


def hf_model(family, tied=False, seed=0, **config):
    """
    Make a small transformers model with random weights. config overrides HF_SMALL. Its own initialisation, with biases
    of 0, norms of 1 and weights of 0.02, would hide a term that was left out. Only the bias of BERT's decoder stays 0.
    """
    transformers = pytest.importorskip("transformers")
    model_class, config_class, shape = HF_SMALL[family]
    hf_config = getattr(transformers, config_class)(**{**shape, "tie_word_embeddings": tied, **config})
    hf = getattr(transformers, model_class)(hf_config)
    torch.manual_seed(seed)
    std = 0.3 if family == "qwen2" else 0.2
    with torch.no_grad():
        for name, p in hf.named_parameters():
            of_a_norm = p.dim() == 1 and name.endswith("weight")
            if name not in DECODER_BIAS:
                p.normal_(mean=1.0 if of_a_norm else 0.0, std=std)
    return hf.eval()


def in_dtype(hf, dtype):
    """
    Turn hf to dtype throughout. Qwen2's eager softmax and its norms compute in fp32 whatever the dtype of the weights
    is, so float64 needs others.
    """
    def norm(self, x):
        return self.weight * (x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt())

    if hf.config.model_type == "qwen2" and dtype == torch.float64:
        hf.set_attn_implementation("sdpa")
        for module in hf.modules():
            if isinstance(module, type(hf.model.norm)):
                module.forward = MethodType(norm, module)
    return hf.to(dtype)


def hf_features(hf, idx, **options):
    """Return the hidden states (B, T, D) that transformers' head sees."""
    hidden = hf.base_model(idx, **options).last_hidden_state
    if hf.config.model_type == "bert":
        hidden = hf.cls.predictions.transform(hidden)
    return hidden


def hf_names(family, name):
    """Return transformers' names for our parameter `name`. BERT's queries, keys and values are one matrix here."""
    if family == "bert":
        return model_bert.hf_names(name)
    if family == "qwen2":
        return [model_qwen2._hf_name(name)]
    return ["lm_head.weight" if name == "head.weight" else name]


def hf_tensor(family, name, tensors):
    """Find, in tensors by transformers' names, what our parameter `name` must equal. It comes in our layout."""
    tensor = torch.cat([tensors[part] for part in hf_names(family, name)])
    if family == "gpt" and name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):
        tensor = tensor.T # GPT-2's Conv1D has the inputs first
    return tensor


def tokens(*shape, seed=1, high=97):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def masked(x, seed=0, **more):
    """Mask x as mask_tokens does. [MASK] is the first id beyond the 97 tokens. Returns inputs, labels, positions."""
    rng = np.random.RandomState([seed, 0, 0, 0])
    return model_bert.mask_tokens(x, rng, **{**dict(mask_id=97, vocab_size=97), **more})


def num_parameters(module):
    return sum(p.numel() for p in module.parameters())


def check_parity(hf, model, tolerance):
    """Features and scores are those of transformers, at all positions and at fewer."""
    assert hf.config.vocab_size == model.config.vocab_size == 97
    for length in (24, 7, 1):
        idx = tokens(3, length)
        with torch.no_grad():
            expected_h, expected_z = hf_features(hf, idx), hf(idx).logits
            h = model.features(idx)
            assert h.dtype == expected_h.dtype
            assert expected_z.std() > 0.5 # the agreement is not one of zeros
            torch.testing.assert_close(h, expected_h, rtol=0, atol=tolerance)
            torch.testing.assert_close(model.head(h), expected_z, rtol=0, atol=tolerance)
