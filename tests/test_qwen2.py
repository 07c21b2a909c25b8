"""
model_qwen2.py against transformers' Qwen2, and what the training loop takes for granted of it.

$ pytest tests/test_qwen2.py
"""
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1") # before transformers is imported

import pytest
import torch
import torch.nn.functional as F

from distances import DISTANCES
from model_qwen2 import SCALES, Qwen2, Qwen2Config, _hf_name

SMALL = dict(block_size=24, vocab_size=97, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, intermediate_size=88) # 97 tokens have 128 rows, 31 of them padding
EVERY_HEAD = [("baseline", "")] + [(distance, variant) for distance, variants in DISTANCES.items() for variant in variants]


def qwen2(seed=0, **config):
    torch.manual_seed(seed)
    return Qwen2(Qwen2Config(**{**SMALL, **config}))


def tokens(*shape, seed=1):
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(seed))

# -----------------------------------------------------------------------------
# Qwen2's weights


def hf_qwen2(seed=0, **config):
    """A random Qwen2. Its own initialisation, with biases of 0, norms of 1 and weights of 0.02, would hide a term that was left out."""
    transformers = pytest.importorskip("transformers")
    hf = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{**dict(
        vocab_size=97, max_position_embeddings=24, hidden_size=32, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        rope_theta=1e6, attn_implementation="eager"), **config})) # eager: attention written out, not the function that our model calls
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in hf.named_parameters():
            p.normal_(mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.3)
    return hf.eval()


def check_parity(hf, model, tolerance):
    assert hf.config.vocab_size == model.config.vocab_size == 97
    for length in (1, 7, 24):
        idx = tokens(3, length)
        with torch.no_grad():
            hidden, z = hf.model(idx).last_hidden_state, hf(idx).logits
            h = model.features(idx)
            assert h.dtype == hidden.dtype and z.std() > 0.5 # the agreement is not one of zeros
            torch.testing.assert_close(h, hidden, rtol=0, atol=tolerance)
            torch.testing.assert_close(model.head(h), z, rtol=0, atol=tolerance)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_and_hidden_states_are_those_of_transformers(kv_heads, tied):
    hf = hf_qwen2(num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    model = Qwen2.from_hf(hf).eval()
    assert (model.config.n_kv_head, model.config.tie_weights, model.config.block_size, model.config.rope_theta) == (kv_heads, tied, 24, 1e6)
    check_parity(hf, model, 1e-4)


@pytest.mark.parametrize("config", [dict(rope_theta=500.0), dict(rms_norm_eps=0.05), dict(num_attention_heads=2, num_key_value_heads=1),
                                    dict(num_attention_heads=16, num_key_value_heads=2), dict(num_hidden_layers=3), dict(intermediate_size=17)])
def test_other_shapes_and_constants(config):
    hf = hf_qwen2(**config)
    check_parity(hf, Qwen2.from_hf(hf).eval(), 1e-4)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_in_float64_to_ten_digits(monkeypatch, kv_heads):
    hf = hf_qwen2(num_key_value_heads=kv_heads, attn_implementation="sdpa").double() # their eager softmax is always in fp32, as is their norm
    monkeypatch.setattr(type(hf.model.norm), "forward", lambda self, x: self.weight * (x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()))
    check_parity(hf, Qwen2.from_hf(hf).double().eval(), 1e-10)


@pytest.mark.parametrize("kv_heads, tied", [(1, False), (2, True), (4, False)])
def test_loss_and_every_gradient_are_those_of_transformers(kv_heads, tied):
    hf, idx = hf_qwen2(num_key_value_heads=kv_heads, tie_word_embeddings=tied), tokens(3, 24)
    model = Qwen2.from_hf(hf)
    expected, (_, loss) = hf(idx, labels=idx).loss, model(idx[:, :-1], idx[:, 1:])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
    expected.backward()
    loss.backward()
    theirs = dict(hf.named_parameters())
    ours = {_hf_name(name): p for name, p in model.named_parameters()}
    assert ours.keys() == theirs.keys() and all(p.grad.abs().max() > 1e-4 for name, p in theirs.items() if "k_proj.bias" not in name)
    for name, p in theirs.items():
        torch.testing.assert_close(ours[name].grad[:len(p)], p.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        assert not ours[name].grad[len(p):].any() # rows that pad the vocabulary


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_pretrained_weights_tied_the_other_way(tied, tie_weights):
    hf = hf_qwen2(tie_word_embeddings=tied)
    model, head = Qwen2.from_hf(hf, tie_weights=tie_weights), hf.model.embed_tokens if tie_weights else hf.lm_head
    assert torch.equal(model.head.weight[:97], head.weight) and torch.equal(model.transformer.wte.weight[:97], hf.model.embed_tokens.weight)
    assert (model.head.weight is model.transformer.wte.weight) == tie_weights


def test_a_shorter_context_has_the_same_scores():
    hf, idx = hf_qwen2(), tokens(2, 8)
    model = Qwen2.from_hf(hf, block_size=8, dropout=0.1).eval()
    assert model.config.block_size == 8 and model.config.dropout == 0.1
    with torch.no_grad():
        torch.testing.assert_close(model.head(model.features(idx)), hf(idx).logits, rtol=0, atol=1e-4)


def test_half_precision_weights_are_read_in_fp32():
    hf = hf_qwen2().bfloat16()
    for name, p in Qwen2.from_hf(hf).state_dict().items():
        assert p.dtype == torch.float32 and torch.equal(p[:97], hf.state_dict()[_hf_name(name)].float()[:97]), name


def test_a_distance_head_on_a_pretrained_backbone():
    hf = hf_qwen2()
    torch.manual_seed(3)
    model, theirs = Qwen2.from_hf(hf, distance="cosine"), hf.state_dict()
    for name, p in model.state_dict().items():
        if name.startswith("transformer."):
            assert torch.equal(p[:len(theirs[_hf_name(name)])], theirs[_hf_name(name)]), name
    # the prototypes start as those of a new model do: the old output vectors were made for dot products
    assert torch.equal(model.head.weight, qwen2(seed=3, distance="cosine").head.weight)
    tied = Qwen2.from_hf(hf, distance="cosine", tie_weights=True)
    assert tied.head.weight is tied.transformer.wte.weight and torch.equal(tied.head.weight[:97], hf.model.embed_tokens.weight)


@pytest.mark.parametrize("config", [dict(tie_weights=True), dict(n_kv_head=1, feature_scale=3.0), dict(rope_theta=500.0, norm_eps=0.05, dropout=0.1)])
def test_to_hf_and_back(config, tmp_path):
    transformers, model, idx = pytest.importorskip("transformers"), qwen2(**config).eval(), tokens(3, 24)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
        expected, hf = model.head(model.features(idx)), model.to_hf()
        assert not hf.training and hf.lm_head.weight.shape == (97, 32) and (hf.lm_head.weight is hf.model.embed_tokens.weight) == model.config.tie_weights
        hf.save_pretrained(tmp_path)
        for same in (hf, transformers.AutoModelForCausalLM.from_pretrained(tmp_path)):
            torch.testing.assert_close(same(idx).logits, expected, rtol=0, atol=1e-4)
        for back in (Qwen2.from_hf(hf).eval(), Qwen2.from_pretrained(str(tmp_path)).eval()):
            assert back.config == replace(model.config, feature_scale=0.0) # it went into the last norm
            torch.testing.assert_close(back.head(back.features(idx)), expected, rtol=0, atol=1e-4)
        before = hf(idx).logits
        model.transformer.ln_f.weight.zero_() # theirs is a copy
        assert torch.equal(hf(idx).logits, before)


def test_a_distance_head_cannot_be_exported():
    with pytest.raises(ValueError, match="transformers has no layer for the cosine head"):
        qwen2(distance="cosine").to_hf()


@pytest.mark.parametrize("overrides, message", [
    (dict(n_layer=3, vocab_size=50), r"fix n_layer=2 \(asked: 3\), vocab_size=97 \(asked: 50\)"), (dict(n_layers=2), "has no n_layers"),
    (dict(n_kv_head=4, rope_theta=1e4), r"fix n_kv_head=2 \(asked: 4\), rope_theta=1000000.0 \(asked: 10000.0\)"),
    (dict(block_size=25), "25 is beyond the 24 positions"), (dict(distance="cosin"), "did you mean 'cosine'")])
def test_overrides_that_the_weights_do_not_allow(overrides, message):
    with pytest.raises(ValueError, match=message):
        Qwen2.from_hf(hf_qwen2(), **overrides)


@pytest.mark.parametrize("config, message", [
    (dict(hidden_act="gelu"), "SiLU, the model is 'qwen2' with 'gelu'"),
    (dict(use_sliding_window=True, sliding_window=8, max_window_layers=1), "sliding window"),
    (dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e6)), "rope_type 'default' .* has 'linear'"),
    (dict(head_dim=16), "head_dim 8, the model has .* 16")])
def test_another_architecture_is_refused(config, message):
    hf = hf_qwen2(**config)
    with pytest.raises(ValueError, match=message):
        Qwen2.from_hf(hf)


def test_another_family_is_refused():
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=88, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(ValueError, match="the model is 'llama'"):
        Qwen2.from_hf(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)))


def test_a_window_that_no_layer_uses_is_no_reason_to_refuse():
    hf = hf_qwen2(use_sliding_window=True, sliding_window=8, max_window_layers=2)
    check_parity(hf, Qwen2.from_hf(hf).eval(), 1e-4)


def test_a_config_of_transformers_4():
    hf, idx = hf_qwen2(rope_theta=500.0), tokens(2, 24)
    old = {k: v for k, v in hf.config.to_dict().items() if k not in ("rope_parameters", "layer_types")}
    as_4 = lambda **rope: SimpleNamespace(config=SimpleNamespace(**old, **rope), state_dict=hf.state_dict)
    model = Qwen2.from_hf(as_4(rope_theta=500.0, rope_scaling=None)).eval()
    torch.testing.assert_close(model.head(model.features(idx)), hf(idx).logits, rtol=0, atol=1e-4)
    for key in ("type", "rope_type"):
        with pytest.raises(ValueError, match="yarn"):
            Qwen2.from_hf(as_4(rope_theta=500.0, rope_scaling={key: "yarn", "factor": 4.0}))


def test_pretrained_without_transformers_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None) # an import of it fails
    with pytest.raises(ImportError, match="init_from='Qwen/Qwen2-0.5B' .* pip install transformers"):
        Qwen2.from_pretrained("Qwen/Qwen2-0.5B")


def test_the_published_model_has_as_many_parameters():
    with torch.device("meta"): # shapes without memory
        tied, untied = (Qwen2(Qwen2Config(tie_weights=tie)) for tie in (True, False))
    assert sum(p.numel() for p in tied.parameters()) == 494_032_768
    assert sum(p.numel() for p in untied.parameters()) == 494_032_768 + 151_936 * 896
    assert Qwen2Config(**SCALES["0.5B"]) == Qwen2Config() # the defaults


@pytest.mark.parametrize("scale, millions", [("tiny", 0.74), ("small", 9.4), ("medium", 73), ("0.5B", 358)])
def test_scales(scale, millions):
    with torch.device("meta"):
        model = Qwen2(Qwen2Config(**SCALES[scale]))
    assert sum(p.numel() for p in model.transformer.h.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)

# -----------------------------------------------------------------------------
# features -> head -> loss


@pytest.mark.parametrize("distance", ["baseline", "cosine"])
def test_forward_is_features_head_and_cross_entropy(distance):
    model, idx, targets = qwen2(distance=distance), tokens(3, 24), tokens(3, 24, seed=2)
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
    model, idx, t = qwen2(), tokens(2, 24), 10
    changed = idx.clone()
    changed[:, t] = (changed[:, t] + 1) % 97
    before, after = model.features(idx), model.features(changed)
    torch.testing.assert_close(before[:, :t], after[:, :t], rtol=0, atol=1e-6)
    assert (before[:, t:] - after[:, t:]).abs().amax(-1).min() > 1e-5 # all that come later see it


@pytest.mark.parametrize("distance, default", [("cosine", 32 ** -0.5), ("baseline", 1.0)])
def test_feature_scale_reaches_the_features(distance, default):
    idx = tokens(2, 24)
    h, h3 = qwen2(distance=distance).features(idx), qwen2(distance=distance, feature_scale=3.0).features(idx)
    torch.testing.assert_close(h / default, h3 / 3.0)
    assert (h / default).pow(2).mean().item() == pytest.approx(1, abs=0.03) # unit variance before the scale


def test_dropout_only_while_training():
    model, idx = qwen2(dropout=0.5), tokens(2, 24)
    assert not torch.equal(model.features(idx), model.features(idx))
    model.eval()
    assert torch.equal(model.features(idx), model.features(idx))


def test_a_distance_head_learns():
    model, idx = qwen2(distance="cosine"), tokens(4, 25)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(30):
        losses.append(model(idx[:, :-1], idx[:, 1:])[1])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0] and all(p.grad.abs().sum() > 0 for p in model.parameters())

# -----------------------------------------------------------------------------
# construction


@pytest.mark.parametrize("distance, variant", EVERY_HEAD)
def test_every_head_meets_the_same_backbone(distance, variant):
    expected = qwen2(seed=5, distance="euclidean").transformer.state_dict()
    found = qwen2(seed=5, distance=distance, variant=variant).transformer.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], p) for name, p in expected.items())


def test_initial_weights():
    for name, p in qwen2(seed=2, n_embd=128).transformer.named_parameters():
        if p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.05) and abs(p.mean().item()) < 1e-3, name # the residual projections as well
        else:
            assert torch.equal(p, torch.full_like(p, name.endswith("weight"))), name


def test_tied_weights_are_one_parameter_that_learns_from_both_ends():
    model, untied = qwen2(tie_weights=True, distance="cosine"), qwen2(distance="cosine")
    assert model.head.weight is model.transformer.wte.weight
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(list(untied.parameters())) - 1 and names.count("transformer.wte.weight") + names.count("head.weight") == 1
    idx = tokens(2, 24)
    model(idx, torch.full_like(idx, 96))[1].backward()
    assert (model.head.weight.grad[:97].abs().sum(1) > 0).all() # tokens that were only predicted too


def test_a_longer_context_takes_the_same_weights():
    model, longer, idx = qwen2(), qwen2(seed=1, block_size=48), tokens(2, 24)
    longer.load_state_dict(model.state_dict()) # angles are no weights
    torch.testing.assert_close(longer.features(idx), model.features(idx))
    assert longer.features(tokens(1, 48)).shape == (1, 48, 32)


@pytest.mark.parametrize("config, message", [
    (dict(n_embd=30), "30 must be a multiple of n_head 4"), (dict(n_kv_head=3), "n_head 4 must be a multiple of n_kv_head 3"),
    (dict(n_kv_head=0), "n_head 4 must be a multiple of n_kv_head 0"), (dict(n_kv_head=8), "n_head 4 must be a multiple of n_kv_head 8"),
    (dict(n_embd=36), "n_embd / n_head is 9, it must be even"), (dict(distance="cosine", variant="exact"), "unknown .*variant 'exact'"),
    (dict(distance="minkowski", distance_params="q=3"), "q")])
def test_a_config_that_does_not_fit_together(config, message):
    with pytest.raises(ValueError, match=message):
        qwen2(**config)


def test_a_sequence_beyond_the_context_is_refused():
    with pytest.raises(ValueError, match="25 tokens, but block_size is 24"):
        qwen2().features(tokens(1, 25))
