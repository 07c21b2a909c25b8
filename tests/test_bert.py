"""
These tests concern BERT alone: segments, masks, the ids of [MASK] and [PAD], and a head at masked positions only.
Those in test_models.py hold for every family.

$ pytest tests/test_bert.py
"""
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import AS_THEIRS, SMALL, hf_features, hf_model, in_dtype, masked, new_model, num_parameters, tokens

from distances import DistanceHead
from model_bert import BERT, BERTConfig, mask_tokens


def bert(**config):
    return new_model("bert", **config)


def hf_bert(tied=True, **config):
    return hf_model("bert", tied, **config)

# -----------------------------------------------------------------------------
# BERT's weights


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_hidden_states_and_logits_are_those_of_transformers(tied, dtype, tolerance):
    hf = in_dtype(hf_bert(tied), dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error") # nothing is dropped
        model = BERT.from_hf(hf, mask_id=3).to(dtype).eval()
    assert model.config == BERTConfig(**{**SMALL["bert"], "tie_weights": tied, "mask_id": 3, **AS_THEIRS})
    for length in (24, 7, 1): # all positions, and fewer
        idx = tokens(3, length)
        for segments in (None, torch.zeros_like(idx), torch.ones_like(idx), tokens(3, length, seed=2, high=2)):
            with torch.no_grad():
                hidden = hf.bert(idx, token_type_ids=segments).last_hidden_state
                logits = hf(idx, token_type_ids=segments).logits
                assert logits.std() > 0.5 # the agreement is not one of zeros
                torch.testing.assert_close(model.encode(idx, segments), hidden, rtol=0, atol=tolerance)
                h = model.features(idx, segments=segments)
                expected_h = hf_features(hf, idx, token_type_ids=segments)
                torch.testing.assert_close(h, expected_h, rtol=0, atol=tolerance)
                torch.testing.assert_close(model.head(h), logits, rtol=0, atol=tolerance)
                if segments is None:
                    torch.testing.assert_close(model(idx)[0], logits, rtol=0, atol=tolerance)


def test_segments_count():
    model, idx = BERT.from_hf(hf_bert()), tokens(2, 8)
    assert (model.encode(idx, torch.ones_like(idx)) - model.encode(idx)).abs().max() > 0.1


def test_dropout_falls_where_that_of_transformers_does():
    hf, idx = hf_bert(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3).train(), tokens(3, 24)
    model = BERT.from_hf(hf)
    assert model.config.dropout == 0.3
    torch.manual_seed(7)
    expected = hf(idx).logits
    torch.manual_seed(7)
    torch.testing.assert_close(model(idx)[0], expected, rtol=0, atol=1e-4)
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


def test_another_head_has_no_use_for_the_decoders_bias():
    hf, idx = hf_bert(), tokens(2, 8)
    torch.nn.init.ones_(hf.cls.predictions.decoder.bias)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = BERT.from_hf(hf, distance="cosine", tie_weights=False)
        tied = BERT.from_hf(hf, distance="cosine", tie_weights=True)
    for same in (model, tied):
        torch.testing.assert_close(same.encode(idx), hf.bert(idx).last_hidden_state, rtol=0, atol=1e-4)


def test_the_decoders_bias_is_dropped_aloud():
    hf, idx = hf_bert(), tokens(2, 8)
    with torch.no_grad():
        hf.cls.predictions.decoder.bias[5] = -1.5
    with pytest.warns(UserWarning, match="bias, up to 1.5, is dropped"):
        model = BERT.from_hf(hf)
    torch.testing.assert_close(model(idx)[0] + hf.cls.predictions.decoder.bias, hf(idx).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("overrides, message", [
    (dict(bias=False), "has no bias"), (dict(mask_id=97), "mask_id 97 must lie within the 97 tokens")])
def test_overrides_that_the_weights_do_not_allow(overrides, message):
    hf = hf_bert()
    with pytest.raises(ValueError, match=message):
        BERT.from_hf(hf, **overrides)


@pytest.mark.parametrize("key, value, message", [
    ("hidden_act", "gelu_new", "hidden_act 'gelu' .the model: 'gelu_new'"),
    ("layer_norm_eps", 1e-5, "layer_norm_eps 1e-12 .the model: 1e-05"),
    ("type_vocab_size", 1, "type_vocab_size 2"),
    ("intermediate_size", 64, "intermediate_size 128 .the model: 64"),
    ("position_embedding_type", "relative_key", "position_embedding_type 'absolute'"),
    ("is_decoder", True, "is_decoder False"),
])
def test_another_architecture_is_refused(key, value, message):
    hf = hf_bert()
    setattr(hf.config, key, value)
    with pytest.raises(ValueError, match=message):
        BERT.from_hf(hf)


def test_pretrained_takes_the_id_of_mask_from_the_vocabulary(tmp_path):
    hf = hf_bert()
    hf.save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "[MASK]"] + [f"w{i}" for i in range(91)]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    model = BERT.from_pretrained(str(tmp_path), distance="cosine")
    assert (model.mask_id, model.pad_id, model.config.distance) == (5, 0, "cosine")
    assert BERT.from_pretrained(str(tmp_path), mask_id=7).mask_id == 7
    hidden = hf.bert(tokens(2, 8)).last_hidden_state
    torch.testing.assert_close(model.encode(tokens(2, 8)), hidden, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_export_brings_the_special_ids_along(tied):
    pytest.importorskip("transformers")
    model = bert(tie_weights=tied, feature_scale=2.5, dropout=0.2).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            of_a_norm = "ln_" in name and name.endswith("weight")
            p.normal_(mean=1.0 if of_a_norm else 0.0, std=0.2)
    hf, idx = model.to_hf(), tokens(3, 24, high=99)
    with torch.no_grad():
        logits = hf(idx).logits
        assert logits.shape == (3, 24, 99) and not hf.training
        assert hf.config.hidden_dropout_prob == 0.2 and hf.config.pad_token_id == 98
        torch.testing.assert_close(model(idx)[0], logits[..., :97], rtol=0, atol=1e-4)
        assert logits[..., 97:].max() < -9000 # nobody predicts them, and they have no part in p
        inputs, targets, positions = masked(idx[:, :20] % 97)
        labels = torch.full(inputs.shape, -100).scatter(1, positions, targets)
        _, loss = model(inputs, targets, positions)
        assert hf(inputs, labels=labels).loss.item() == pytest.approx(loss.item(), abs=1e-5)


def test_bert_base_has_as_many_parameters_as_bert_base():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"): # shapes without memory
        hf = transformers.BertForMaskedLM(transformers.BertConfig())
        ours = BERT(BERTConfig(vocab_size=30522, mask_id=103))
        own_ids = BERT(BERTConfig(vocab_size=30522))
        untied = BERT(BERTConfig(vocab_size=30522, mask_id=103, tie_weights=False))
    assert num_parameters(hf) == 109_514_298
    # no bias of the decoder, 6 rows of padding
    assert num_parameters(ours) == 109_514_298 - 30522 + (30528 - 30522) * 768 == 109_488_384
    assert num_parameters(own_ids) == num_parameters(ours) # [MASK] and padding take two of these rows
    assert num_parameters(untied) == num_parameters(ours) + 30528 * 768

# -----------------------------------------------------------------------------
# features -> head -> loss


def test_both_sides_are_seen():
    model, idx, t = bert(), tokens(2, 24), 10
    changed = idx.clone()
    changed[:, t] = (changed[:, t] + 1) % 97
    assert (model.features(idx) - model.features(changed)).abs().amax(-1).min() > 1e-4 # at all positions


@pytest.mark.parametrize("distance", ["baseline", "cosine"])
def test_features_at_positions(distance):
    model, idx = bert(distance=distance), tokens(3, 24)
    positions = torch.tensor([[0, 5, 23], [1, 2, 3], [23, 0, 9]])
    for segments in (None, tokens(3, 24, seed=2, high=2)):
        everywhere, there = model.features(idx, segments=segments), model.features(idx, positions, segments)
        assert there.shape == (3, 3, 32)
        torch.testing.assert_close(there, everywhere[torch.arange(3)[:, None], positions], rtol=0, atol=1e-6)
    z, none = model(idx, positions=positions)
    assert none is None and z.shape == (3, 3, 97) # no [MASK], padding or other rows
    torch.testing.assert_close(z, model.head(model.features(idx, positions)))


def test_transform_and_head_run_only_at_masked_positions(monkeypatch):
    model, shapes, loss = bert(), {}, DistanceHead.loss

    def seen_loss(head, h, targets, **options):
        shapes["loss"] = tuple(h.shape)
        return loss(head, h, targets, **options)

    for name in ("mlm", "ln_f"):
        def hook(module, inputs, output, name=name):
            shapes[name] = tuple(output.shape)
        model.transformer[name].register_forward_hook(hook)
    monkeypatch.setattr(DistanceHead, "loss", seen_loss)
    inputs, labels, positions = masked(tokens(3, 24))
    model(inputs, labels, positions)
    assert shapes == {"mlm": (3, 4, 32), "ln_f": (3, 4, 32), "loss": (3, 4, 32)}


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
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
    for g, e in zip(gradients, torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-6)
    # and the mean over micro-batches is the mean over the masked tokens of the step
    first = model(inputs[:1], labels[:1], positions[:1])[1].item()
    others = model(inputs[1:], labels[1:], positions[1:])[1].item()
    assert (first + 3 * others) / 4 == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("distance", ["baseline", "euclidean"])
def test_special_ids_are_never_predicted(distance):
    model, idx, targets = bert(distance=distance), tokens(2, 24), tokens(2, 24, seed=2)
    assert (model.mask_id, model.pad_id) == (97, 98)
    assert (model.transformer.wte.num_embeddings, model.head.num_prototypes) == (128, 128)
    before = model(idx)[0]
    with torch.no_grad():
        model.head.weight[97:] = model.features(idx)[0, 0] # no row could be closer, or have a larger product
    assert torch.equal(model(idx)[0], before) and before.shape[-1] == 97
    by_hand = F.cross_entropy(before.flatten(0, 1), targets.flatten())
    assert model(idx, targets)[1].item() == pytest.approx(by_hand.item(), rel=1e-5)
    with pytest.raises(ValueError, match="target 97 is out of range"):
        model(idx, torch.full_like(idx, 97))


@pytest.mark.parametrize("vocab_size, rows", [(62, 64), (63, 128), (64, 128)])
def test_special_ids_have_rows_of_their_own(vocab_size, rows):
    model = bert(vocab_size=vocab_size)
    assert model.transformer.wte.num_embeddings == model.head.num_prototypes == rows and model.pad_id < rows
    within = bert(vocab_size=64, mask_id=3)
    assert (within.mask_id, within.pad_id, within.transformer.wte.num_embeddings) == (3, 0, 64)

# -----------------------------------------------------------------------------
# masks


def test_masks_by_hand():
    x = tokens(64, 41)
    inputs, labels, positions = masked(x)
    assert inputs.shape == (64, 41) and labels.shape == positions.shape == (64, 6) # 15% of 41 is 6.15
    assert inputs.dtype == labels.dtype == positions.dtype == torch.int64
    assert (positions.diff(dim=1) > 0).all() # sorted, and no position twice
    assert 0 <= positions.min() and positions.max() < 41
    assert torch.equal(x, tokens(64, 41)) and torch.equal(labels, x.gather(1, positions))
    assert torch.equal(inputs.scatter(1, positions, labels), x) # nothing else was changed


@pytest.mark.parametrize("T, probability, k", [
    (512, 0.15, 77), (128, 0.15, 19), (20, 0.15, 3), (3, 0.15, 1), (1, 0.15, 1), (10, 0.99, 10), (10, 0.5, 5)])
def test_the_number_of_masked_positions(T, probability, k):
    assert masked(tokens(5, T), probability=probability)[1].shape == (5, k)


def test_shares_of_mask_random_and_kept():
    def within_4_sigma(count, p, N):
        assert abs(count - p * N) < 4 * (N * p * (1 - p)) ** 0.5, (count / N, p)

    special = (0, 50, 96)
    x = tokens(2000, 100)
    inputs, labels, positions = masked(x, special=special)
    found, N = inputs.gather(1, positions), labels.numel()
    changed = (found != labels) & (found != 97)
    real = ~torch.isin(labels, torch.tensor(special))
    within_4_sigma((found == 97).sum().item(), 0.8, N)
    # of the random ids one in 94 is the token itself, if it is a real one
    within_4_sigma(changed[real].sum().item(), 0.1 * 93 / 94, real.sum().item())
    within_4_sigma(changed[~real].sum().item(), 0.1, (~real).sum().item())
    drawn = found[changed]
    assert not torch.isin(drawn, torch.tensor(special)).any()
    assert drawn.min() >= 0 and drawn.max() < 97
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
    assert all(torch.equal(a, b) for a, b in zip(first, masked(x)))
    assert not torch.equal(first[2], masked(x, seed=1)[2])
    torch.manual_seed(1)
    np.random.seed(1) # none was drawn from
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()
    # where the positions fall does not depend on the tokens
    assert torch.equal(first[2], masked(tokens(4, 24, seed=9))[2])
    rank = mask_tokens(x, np.random.RandomState([0, 0, 0, 1]), 97, 97)
    assert not torch.equal(first[2], rank[2])


def test_the_stream_of_masks_is_frozen():
    """A run that is resumed with another numpy meets the same masks."""
    x, rng = torch.arange(80).reshape(2, 40), np.random.RandomState([1337, 3, 1, 0])
    inputs, labels, positions = mask_tokens(x, rng, 97, 97, special=(96,))
    assert positions.tolist() == [[8, 15, 21, 22, 35, 38], [14, 15, 23, 28, 32, 35]]
    found = inputs.gather(1, positions).tolist()
    assert found == [[97, 97, 21, 22, 97, 97], [71, 97, 97, 97, 97, 97]] # of all three kinds


@pytest.mark.parametrize("probability", [0, 1, -0.1, 15, float("nan")])
def test_an_illegal_probability(probability):
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\)"):
        masked(tokens(2, 24), probability=probability)

# -----------------------------------------------------------------------------
# construction


def test_mask_is_learned_from_where_it_is_read():
    model = bert(distance="cosine")
    inputs, labels, positions = masked(tokens(2, 24))
    model(inputs, labels, positions)[1].backward()
    grad = model.head.weight.grad.abs().sum(1)
    assert (grad[:97] > 0).all() # tokens that were only predicted, too
    assert grad[97] > 0 and (grad[98:] == 0).all() # [MASK] was only read, and no other row was
    assert all(p.grad is not None for p in model.parameters()) # or DDP would wait for it


@pytest.mark.parametrize("config, message", [
    (dict(mask_id=97), "mask_id 97 must lie within"), (dict(mask_id=-2), "mask_id -2 must lie within")])
def test_a_config_that_does_not_fit_together(config, message):
    with pytest.raises(ValueError, match=message):
        bert(**config)


@pytest.mark.parametrize("distance", ["baseline", "cosine"])
def test_it_learns_from_the_other_tokens(distance):
    """Every sequence repeats one token, drawn anew: nothing but the other positions tells what is behind a mask."""
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
