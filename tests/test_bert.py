"""
model_bert.py against transformers' BERT, the masks, and what the training loop takes for granted of both.

$ pytest tests/test_bert.py
"""
import os
import sys
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1") # before transformers is imported

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distances import DISTANCES
from model_bert import BERT, BERTConfig, mask_tokens

SMALL = dict(block_size=24, vocab_size=97, n_layer=2, n_head=4, n_embd=32, dropout=0.0) # 97 tokens and 2 ids have 128 rows
EVERY_HEAD = [("baseline", "")] + [(distance, variant) for distance, variants in DISTANCES.items() for variant in variants]


def bert(seed=0, **config):
    torch.manual_seed(seed)
    return BERT(BERTConfig(**{**SMALL, **config}))


def tokens(*shape, seed=1, high=97):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def masked(x, seed=0, **more):
    return mask_tokens(x, np.random.RandomState([seed, 0, 0, 0]), **{**dict(mask_id=97, vocab_size=97), **more})

# -----------------------------------------------------------------------------
# BERT's weights


def hf_bert(tied=True, seed=0, dropout=0.0):
    """A random BERT. Its own initialisation, with biases of 0 and weights of 0.02, would hide a term that was left out."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    hf = transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=97, max_position_embeddings=24, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, tie_word_embeddings=tied))
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if not name.startswith("cls.predictions.") or "transform" in name or name.endswith("decoder.weight"): # its bias stays 0
                p.normal_(mean=1.0 if name.endswith("LayerNorm.weight") else 0.0, std=0.2)
    return hf.eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_hidden_states_and_logits_are_those_of_transformers(tied, dtype, tolerance):
    hf = hf_bert(tied).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error") # nothing is dropped
        model = BERT.from_hf(hf, mask_id=3).to(dtype).eval()
    assert model.config == BERTConfig(**{**SMALL, "tie_weights": tied, "mask_id": 3})
    for length in (24, 7, 1): # all positions, and fewer
        idx = tokens(3, length)
        for segments in (None, torch.zeros_like(idx), torch.ones_like(idx), tokens(3, length, seed=2, high=2)):
            with torch.no_grad():
                hidden = hf.bert(idx, token_type_ids=segments).last_hidden_state
                logits = hf(idx, token_type_ids=segments).logits
                assert logits.std() > 0.5 # the agreement is not one of zeros
                torch.testing.assert_close(model.encode(idx, segments), hidden, rtol=0, atol=tolerance)
                h = model.features(idx, segments=segments)
                torch.testing.assert_close(h, hf.cls.predictions.transform(hidden), rtol=0, atol=tolerance)
                torch.testing.assert_close(model.head(h), logits, rtol=0, atol=tolerance)
                if segments is None:
                    torch.testing.assert_close(model(idx)[0], logits, rtol=0, atol=tolerance)


def test_segments_count():
    model, idx = BERT.from_hf(hf_bert()), tokens(2, 8)
    assert (model.encode(idx, torch.ones_like(idx)) - model.encode(idx)).abs().max() > 0.1


def test_the_loss_is_that_of_transformers():
    hf = hf_bert()
    model = BERT.from_hf(hf, mask_id=3)
    inputs, labels, positions = masked(tokens(4, 24), mask_id=3)
    theirs = torch.full((4, 24), -100).scatter(1, positions, labels)
    assert model(inputs, labels, positions)[1].item() == pytest.approx(hf(inputs, labels=theirs).loss.item(), abs=1e-4)


def test_dropout_falls_where_that_of_transformers_does():
    hf, idx = hf_bert(dropout=0.3).train(), tokens(3, 24)
    model = BERT.from_hf(hf)
    assert model.config.dropout == 0.3
    torch.manual_seed(7)
    expected = hf(idx).logits
    torch.manual_seed(7)
    torch.testing.assert_close(model(idx)[0], expected, rtol=0, atol=1e-4)
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_pretrained_weights_tied_the_other_way(tied, tie_weights):
    hf = hf_bert(tied)
    model, words = BERT.from_hf(hf, tie_weights=tie_weights), hf.bert.embeddings.word_embeddings
    head = words if tie_weights else hf.cls.predictions.decoder
    assert torch.equal(model.head.weight[:97], head.weight) and torch.equal(model.transformer.wte.weight[:97], words.weight)
    assert (model.head.weight is model.transformer.wte.weight) == tie_weights


def test_a_shorter_context_keeps_the_first_positions():
    hf, idx = hf_bert(), tokens(2, 8)
    model = BERT.from_hf(hf, block_size=8)
    assert model.transformer.wpe.weight.shape == (8, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], hf(idx).logits, rtol=0, atol=1e-4)


def test_a_distance_head_on_a_pretrained_backbone():
    hf = hf_bert()
    torch.nn.init.ones_(hf.cls.predictions.decoder.bias) # not this head's
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(3)
        model = BERT.from_hf(hf, distance="cosine", tie_weights=False)
        tied = BERT.from_hf(hf, distance="cosine")
    # the prototypes start as those of a new model do: the old output vectors were made for dot products
    assert torch.equal(model.head.weight, bert(seed=3, distance="cosine", tie_weights=False).head.weight)
    assert tied.head.weight is tied.transformer.wte.weight and torch.equal(tied.head.weight[:97], hf.bert.embeddings.word_embeddings.weight)
    idx = tokens(2, 8)
    torch.testing.assert_close(model.encode(idx), hf.bert(idx).last_hidden_state, rtol=0, atol=1e-4)


def test_the_decoders_bias_is_dropped_aloud():
    hf, idx = hf_bert(), tokens(2, 8)
    with torch.no_grad():
        hf.cls.predictions.decoder.bias[5] = -1.5
    with pytest.warns(UserWarning, match="bias, up to 1.5, is dropped"):
        model = BERT.from_hf(hf)
    torch.testing.assert_close(model(idx)[0] + hf.cls.predictions.decoder.bias, hf(idx).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("overrides, message", [
    (dict(n_layer=3, vocab_size=50), r"fix n_layer=2 \(asked: 3\), vocab_size=97 \(asked: 50\)"), (dict(n_layers=2), "has no n_layers"),
    (dict(bias=False), "has no bias"), (dict(block_size=25), "25 is beyond the 24 positions"), (dict(distance="cosin"), "did you mean 'cosine'"),
    (dict(mask_id=97), "mask_id 97 must lie within the 97 tokens")])
def test_overrides_that_the_weights_do_not_allow(overrides, message):
    with pytest.raises(ValueError, match=message):
        BERT.from_hf(hf_bert(), **overrides)


@pytest.mark.parametrize("key, value, message", [
    ("hidden_act", "gelu_new", "hidden_act 'gelu' .the model: 'gelu_new'"), ("layer_norm_eps", 1e-5, "layer_norm_eps 1e-12 .the model: 1e-05"),
    ("type_vocab_size", 1, "type_vocab_size 2"), ("intermediate_size", 64, "intermediate_size 128 .the model: 64"),
    ("position_embedding_type", "relative_key", "position_embedding_type 'absolute'"), ("is_decoder", True, "is_decoder False")])
def test_another_architecture_is_refused(key, value, message):
    hf = hf_bert()
    setattr(hf.config, key, value)
    with pytest.raises(ValueError, match=message):
        BERT.from_hf(hf)


def test_pretrained_without_transformers_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None) # an import of it fails
    with pytest.raises(ImportError, match="init_from='bert-base-uncased' .* pip install transformers"):
        BERT.from_pretrained("bert-base-uncased")
    with pytest.raises(ImportError, match="pip install transformers"):
        bert().to_hf()


def test_pretrained_takes_the_id_of_mask_from_the_vocabulary(tmp_path):
    hf = hf_bert()
    hf.save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "[MASK]"] + [f"w{i}" for i in range(91)]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    model = BERT.from_pretrained(str(tmp_path), distance="cosine")
    assert (model.mask_id, model.pad_id, model.config.distance) == (5, 0, "cosine")
    assert BERT.from_pretrained(str(tmp_path), mask_id=7).mask_id == 7
    torch.testing.assert_close(model.encode(tokens(2, 8)), hf.bert(tokens(2, 8)).last_hidden_state, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back_again(tied):
    hf = hf_bert(tied)
    again = BERT.from_hf(hf, mask_id=3).to_hf()
    theirs = again.state_dict()
    assert theirs.keys() == hf.state_dict().keys() and all(torch.equal(theirs[k], p) for k, p in hf.state_dict().items())
    assert {k: getattr(again.config, k) for k in ("hidden_dropout_prob", "attention_probs_dropout_prob", "pad_token_id", "tie_word_embeddings")} \
        == dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0, tie_word_embeddings=tied)


@pytest.mark.parametrize("tied", [True, False])
def test_export_brings_the_special_ids_along(tied):
    pytest.importorskip("transformers")
    model = bert(tie_weights=tied, feature_scale=2.5, dropout=0.2).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(mean=1.0 if name.endswith(("ln_1.weight", "ln_2.weight", "ln_e.weight", "ln_f.weight")) else 0.0, std=0.2)
    hf, idx = model.to_hf(), tokens(3, 24, high=99)
    with torch.no_grad():
        logits = hf(idx).logits
        assert logits.shape == (3, 24, 99) and not hf.training and hf.config.hidden_dropout_prob == 0.2 and hf.config.pad_token_id == 98
        torch.testing.assert_close(model(idx)[0], logits[..., :97], rtol=0, atol=1e-4)
        torch.testing.assert_close(model.features(idx) @ model.head.weight[97:99].T, logits[..., 97:], rtol=0, atol=1e-4)


def test_a_distance_head_cannot_be_exported():
    with pytest.raises(ValueError, match="transformers has no layer for the cosine head"):
        bert(distance="cosine").to_hf()


def test_bert_base_has_as_many_parameters_as_bert_base():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"): # shapes without memory
        hf = transformers.BertForMaskedLM(transformers.BertConfig())
        ours, own, untied = (sum(p.numel() for p in BERT(BERTConfig(**c)).parameters())
                             for c in (dict(vocab_size=30522, mask_id=103), dict(vocab_size=30522), dict(vocab_size=30522, mask_id=103, tie_weights=False)))
    assert sum(p.numel() for p in hf.parameters()) == 109_514_298
    assert ours == 109_514_298 - 30522 + (30528 - 30522) * 768 == 109_488_384 # no bias of the decoder, 6 rows of padding
    assert own == ours # [MASK] and padding take two of these rows
    assert untied == ours + 30528 * 768

# -----------------------------------------------------------------------------
# features -> head -> loss


def test_both_sides_are_seen():
    model, idx, t = bert(), tokens(2, 24), 10
    changed = idx.clone()
    changed[:, t] = (changed[:, t] + 1) % 97
    assert (model.features(idx) - model.features(changed)).abs().amax(-1).min() > 1e-4 # at all positions


@pytest.mark.parametrize("distance", ["baseline", "cosine"])
def test_features_at_positions(distance):
    model, idx, positions = bert(distance=distance), tokens(3, 24), torch.tensor([[0, 5, 23], [1, 2, 3], [23, 0, 9]])
    for segments in (None, tokens(3, 24, seed=2, high=2)):
        everywhere, there = model.features(idx, segments=segments), model.features(idx, positions, segments)
        assert there.shape == (3, 3, 32)
        torch.testing.assert_close(there, everywhere[torch.arange(3)[:, None], positions], rtol=0, atol=1e-6)
    z, none = model(idx, positions=positions)
    assert none is None and z.shape == (3, 3, 97) # no [MASK], padding or other rows
    torch.testing.assert_close(z, model.head(model.features(idx, positions)))


def test_transform_and_head_run_only_at_masked_positions():
    model, seen = bert(), {}
    for name, module in (("mlm", model.transformer.mlm), ("ln_f", model.transformer.ln_f)):
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: tuple(output.shape)}))
    loss, model.head.loss = model.head.loss, lambda h, targets: seen.update(loss=tuple(h.shape)) or loss(h, targets)
    inputs, labels, positions = masked(tokens(3, 24))
    model(inputs, labels, positions)
    assert seen == {"mlm": (3, 4, 32), "ln_f": (3, 4, 32), "loss": (3, 4, 32)}


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("distance", ["baseline", "cosine", "manhattan", "offset_l2"])
def test_loss_is_the_cross_entropy_at_the_masked_positions(distance, tie_weights):
    model = bert(distance=distance, learn_n=distance == "cosine", tie_weights=tie_weights)
    inputs, labels, positions = masked(tokens(4, 24))
    z = model.head(model.features(inputs))[torch.arange(4)[:, None], positions]
    none, loss = model(inputs, labels, positions)
    expected = F.cross_entropy(z.flatten(0, 1), labels.flatten())
    assert none is None and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    # the gradient goes through both paths into the whole model alike
    parameters = list(model.parameters())
    for g, e in zip(torch.autograd.grad(loss, parameters, retain_graph=True), torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-6)
    # and the mean over micro-batches is the mean over the masked tokens of the step
    halves = [model(inputs[i], labels[i], positions[i])[1].item() for i in (slice(0, 1), slice(1, 4))]
    assert (halves[0] + 3 * halves[1]) / 4 == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("distance", ["baseline", "euclidean"])
def test_special_ids_are_never_predicted(distance):
    model, idx = bert(distance=distance), tokens(2, 24)
    assert (model.mask_id, model.pad_id, model.transformer.wte.num_embeddings, model.head.num_prototypes) == (97, 98, 128, 128)
    before = model(idx)[0]
    with torch.no_grad():
        model.head.weight[97:] = model.features(idx)[0, 0] # no row could be closer, or have a larger product
    assert torch.equal(model(idx)[0], before) and before.shape[-1] == 97
    assert model(idx, tokens(2, 24, seed=2))[1].item() == pytest.approx(F.cross_entropy(before.flatten(0, 1), tokens(2, 24, seed=2).flatten()).item(), rel=1e-5)
    with pytest.raises(ValueError, match="target 97 is out of range"):
        model(idx, torch.full_like(idx, 97))


@pytest.mark.parametrize("vocab_size, rows", [(62, 64), (63, 128), (64, 128)])
def test_special_ids_have_rows_of_their_own(vocab_size, rows):
    model = bert(vocab_size=vocab_size)
    assert model.transformer.wte.num_embeddings == model.head.num_prototypes == rows and model.pad_id < rows
    within = bert(vocab_size=64, mask_id=3)
    assert (within.mask_id, within.pad_id, within.transformer.wte.num_embeddings) == (3, 0, 64)


@pytest.mark.parametrize("distance, default", [("cosine", 32 ** -0.5), ("baseline", 1.0)])
def test_feature_scale_reaches_the_features(distance, default):
    idx = tokens(2, 24)
    h, h3 = bert(distance=distance).features(idx), bert(distance=distance, feature_scale=3.0).features(idx)
    torch.testing.assert_close(h / default, h3 / 3.0)
    assert (h / default).pow(2).mean().item() == pytest.approx(1, abs=0.03) # unit variance before the scale

# -----------------------------------------------------------------------------
# masks


def test_masks_by_hand():
    x = tokens(64, 41)
    inputs, labels, positions = masked(x)
    assert inputs.shape == (64, 41) and labels.shape == positions.shape == (64, 6) # 15% of 41 is 6.15
    assert inputs.dtype == labels.dtype == positions.dtype == torch.int64
    assert (positions.diff(dim=1) > 0).all() and 0 <= positions.min() and positions.max() < 41 # sorted, and no position twice
    assert torch.equal(x, tokens(64, 41)) and torch.equal(labels, x.gather(1, positions))
    assert torch.equal(inputs.scatter(1, positions, labels), x) # nothing else was changed


@pytest.mark.parametrize("T, probability, k", [(512, 0.15, 77), (128, 0.15, 19), (20, 0.15, 3), (3, 0.15, 1), (1, 0.15, 1), (10, 0.99, 10), (10, 0.5, 5)])
def test_the_number_of_masked_positions(T, probability, k):
    assert masked(tokens(5, T), probability=probability)[1].shape == (5, k)


def test_shares_of_mask_random_and_kept():
    special = (0, 50, 96)
    x = tokens(2000, 100)
    inputs, labels, positions = masked(x, special=special)
    found, N = inputs.gather(1, positions), labels.numel()
    changed = (found != labels) & (found != 97)
    real = ~torch.isin(labels, torch.tensor(special))

    def within_4_sigma(count, p, N):
        assert abs(count - p * N) < 4 * (N * p * (1 - p)) ** 0.5, (count / N, p)
    within_4_sigma((found == 97).sum().item(), 0.8, N)
    # of the random ids one in 94 is the token itself, if it is a real one
    within_4_sigma(changed[real].sum().item(), 0.1 * 93 / 94, real.sum().item())
    within_4_sigma(changed[~real].sum().item(), 0.1, (~real).sum().item())
    drawn = found[changed]
    assert not torch.isin(drawn, torch.tensor(special)).any() and drawn.min() >= 0 and drawn.max() < 97
    counts = torch.bincount(drawn, minlength=97)
    for i in set(range(97)) - set(special): # every real token alike: 4 sigma, and 94 chances to be beyond it
        assert abs(counts[i] - len(drawn) / 94) < 5 * (len(drawn) / 94) ** 0.5, i
    # every position alike
    counts = torch.bincount(positions.flatten(), minlength=100)
    assert (counts - 300).abs().max() < 5 * (300 * 0.85) ** 0.5


def test_mask_within_the_vocabulary_is_not_a_random_token():
    x = tokens(500, 40, high=3)
    inputs, labels, positions = masked(x, mask_id=3, vocab_size=6, special=(0, 4, 400)) # leaves 1, 2 and 5
    found = inputs.gather(1, positions)
    assert set(found[(found != labels) & (found != 3)].tolist()) == {1, 2, 5}


def test_masks_are_a_pure_function_of_the_rng():
    x = tokens(4, 24)
    torch.manual_seed(1)
    np.random.seed(1)
    first = masked(x)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    torch.manual_seed(2)
    np.random.seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, masked(x))) and not torch.equal(first[2], masked(x, seed=1)[2])
    torch.manual_seed(1)
    np.random.seed(1) # none was drawn from
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()
    # where the positions fall does not depend on the tokens
    assert torch.equal(first[2], masked(tokens(4, 24, seed=9))[2])
    rank = mask_tokens(x, np.random.RandomState([0, 0, 0, 1]), 97, 97)
    assert not torch.equal(first[2], rank[2])


def test_the_stream_of_masks_is_frozen():
    """A run that is resumed with another numpy meets the same masks."""
    inputs, labels, positions = mask_tokens(torch.arange(80).reshape(2, 40), np.random.RandomState([1337, 3, 1, 0]), 97, 97, special=(96,))
    assert positions.tolist() == [[8, 15, 21, 22, 35, 38], [14, 15, 23, 28, 32, 35]]
    assert inputs.gather(1, positions).tolist() == [[97, 97, 21, 22, 97, 97], [71, 97, 97, 97, 97, 97]] # of all three kinds


@pytest.mark.parametrize("probability", [0, 1, -0.1, 15, float("nan")])
def test_an_illegal_probability(probability):
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\)"):
        masked(tokens(2, 24), probability=probability)

# -----------------------------------------------------------------------------
# construction


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("distance, variant", EVERY_HEAD)
def test_every_head_meets_the_same_backbone(distance, variant, tie_weights):
    expected = bert(seed=5, distance="euclidean", tie_weights=tie_weights).transformer.state_dict()
    for more in ({}, dict(learn_n=True)):
        found = bert(seed=5, distance=distance, variant=variant, tie_weights=tie_weights, **more).transformer.state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[name], p) for name, p in expected.items())


def test_initialisation_is_that_of_bert():
    for name, p in bert(n_embd=64).transformer.named_parameters():
        if p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.15) and abs(p.mean().item()) < 0.005, name
        else:
            assert torch.equal(p, torch.full_like(p, "ln_" in name and name.endswith("weight"))), name


def test_tied_weights_are_one_parameter_that_learns_from_both_ends():
    model, untied = bert(distance="cosine"), bert(distance="cosine", tie_weights=False)
    assert model.head.weight is model.transformer.wte.weight
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(list(untied.parameters())) - 1 and names.count("transformer.wte.weight") + names.count("head.weight") == 1
    inputs, labels, positions = masked(tokens(2, 24))
    model(inputs, labels, positions)[1].backward()
    grad = model.head.weight.grad.abs().sum(1)
    assert (grad[:97] > 0).all() and grad[97] > 0 and (grad[98:] == 0).all() # tokens that were only predicted, and [MASK], which was only read
    assert all(p.grad is not None for p in model.parameters()) # or DDP would wait for it


@pytest.mark.parametrize("config, message", [
    (dict(n_embd=30), "30 must be a multiple of n_head 4"), (dict(distance="cosine", variant="exact"), "unknown .*variant 'exact'"),
    (dict(mask_id=97), "mask_id 97 must lie within"), (dict(mask_id=-2), "mask_id -2 must lie within")])
def test_a_config_that_does_not_fit_together(config, message):
    with pytest.raises(ValueError, match=message):
        bert(**config)


def test_a_sequence_beyond_the_context_is_refused():
    with pytest.raises(ValueError, match="25 tokens, but block_size is 24"):
        bert().features(tokens(1, 25))


@pytest.mark.parametrize("distance", ["baseline", "cosine"])
def test_it_learns_from_the_other_tokens(distance):
    """Sequences of one token, a new one each: nothing but the others tells what is behind a mask."""
    model = bert(vocab_size=20, block_size=16, n_layer=1, distance=distance)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step in range(60):
        x = tokens(32, 1, seed=step, high=20).expand(32, 16)
        inputs, labels, positions = mask_tokens(x, np.random.RandomState([0, step, 0, 0]), model.mask_id, 20)
        losses.append(model(inputs, labels, positions)[1])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    first, last = losses[0].item(), torch.stack(losses[-5:]).mean().item()
    assert abs(first - np.log(20)) < 0.5 and last < 1.0, (first, last)
