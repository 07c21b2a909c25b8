"""
BERT and Qwen2 are trained, sampled and exported as GPT is, whose training is tested in test_train.py.

$ pytest tests/test_families.py
"""
import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    HARD,
    SETTINGS,
    assert_close_runs,
    assert_same_training,
    ended,
    flags,
    fork_ranks,
    load,
    metrics,
    refused,
    run_script,
    train,
)
from small_models import SMALL, hf_model

import data
from distances import DistanceHead
from families import FAMILIES, load_run
from model_bert import BERT, mask_tokens
from sample import fill_masks

pytestmark = pytest.mark.usefixtures("here")
FAMILY = dict(bert=dict(model="bert"), qwen2=dict(model="qwen2", n_kv_head=1, intermediate_size=48))
both = pytest.mark.parametrize("family", FAMILY)


@both
def test_it_learns_and_resumes_to_the_last_bit(family):
    settings = dict(**FAMILY[family], **{**HARD, "learn_n": True}, eval_interval=15, lr_decay_iters=30)
    train(out_dir="whole", max_iters=30, **settings)
    train(out_dir="half", max_iters=15, **settings)
    run_script("train.py", "--init_from=resume", "--out_dir=half", "--max_iters=30")
    assert_same_training("whole", "half")
    losses = [row["val_loss"] for row in metrics("whole", "eval")]
    assert losses[0] == pytest.approx(math.log(97), rel=0.25) and max(losses[1:]) < losses[0] - 0.1
    summary = json.load(open("whole/summary.json"))
    assert ("bits_per_byte" in summary) == (family != "bert") # the loss of masked tokens is not the text's
    assert json.load(open("whole/config.json"))["config"]["model"] == family


def test_two_ranks_equal_one_with_twice_the_micro_steps(here):
    settings = dict(max_iters=4, eval_interval=2, dropout=0.1, distance="euclidean", gradient_accumulation_steps=4)
    for name, own in FAMILY.items():
        ended(fork_ranks(2, **{**SETTINGS, **settings, **own, "out_dir": f"{name}2"}))
        train(out_dir=f"{name}1", **settings, **own)
        assert_close_runs(f"{name}2", f"{name}1")


@pytest.mark.torture # two processes that compile take minutes
@both
def test_two_compiled_ranks_equal_one(here, family):
    settings = {**SETTINGS, **FAMILY[family], "n_layer": 1, "max_iters": 4, "eval_interval": 2, "distance": "cosine",
                "compile": True}
    ended(fork_ranks(2, **settings, out_dir="two"))
    run_script("train.py", *flags(**settings, out_dir="one"))
    assert_close_runs("two", "one")


@both
def test_heads_share_batches_masks_and_backbone(family):
    settings = dict(max_iters=1, learning_rate=0, min_lr=0, **FAMILY[family])
    _, baseline = train(out_dir="baseline", distance="baseline", **settings)
    expected = load("baseline")["model"]
    parts = 3 if family == "bert" else 2 # inputs, labels, positions; or inputs, targets
    for distance in ("cosine", "offset_l2"):
        _, script = train(out_dir=distance, distance=distance, **settings)
        found = load(distance)["model"]
        assert all(torch.equal(found[name], expected[name]) for name in found if name.startswith("transformer."))
        for i in (0, 7):
            batch, expected_batch = script["train_batch"](i), baseline["train_batch"](i)
            assert len(batch) == len(expected_batch) == parts
            assert all(torch.equal(x, y) for x, y in zip(batch, expected_batch))
    assert not torch.equal(baseline["train_batch"](0)[0], baseline["train_batch"](1)[0])


@both
def test_the_optimizer_has_every_parameter_once(family):
    _, script = train(out_dir="out", max_iters=2, distance="offset_l2", **FAMILY[family])
    names = {id(p): name for name, p in script["raw_model"].named_parameters()}

    def names_in(group):
        return [names[id(p)] for p in group["params"]]

    decay, other = map(names_in, script["opt"].param_groups)
    assert sorted(decay + other) == sorted(names.values())
    assert "head.alpha" in other and "head.weight" in decay
    assert all(name.endswith("bias") or ".ln_" in name or name.startswith("head.") for name in other)
    assert not any(name.endswith("bias") for name in decay)


# -----------------------------------------------------------------------------
# BERT

def test_the_head_works_at_masked_positions_only(monkeypatch):
    shapes, loss = [], DistanceHead.loss

    def seen_loss(head, h, targets, *args, **options):
        shapes.append((h.shape, targets.shape))
        return loss(head, h, targets, *args, **options)

    monkeypatch.setattr(DistanceHead, "loss", seen_loss)
    train(out_dir="out", max_iters=1, model="bert", batch_size=5, eval_iters=1)
    assert set(shapes) == {((5, 2, 16), (5, 2)), ((10, 16), (10,))} # 15% of 16 tokens; the probe's lie flat


def test_validation_loss_by_hand():
    """It is the mean over all 21 blocks, each with the masks of its number, whatever the batch size and the seed."""
    train(out_dir="out", max_iters=2, eval_interval=2, model="bert", distance="cosine")
    model, _, step = load_run("out", "ckpt.pt", "cpu")
    ids = np.fromfile("data/tiny/val.bin", np.uint16).astype(np.int64)
    x = torch.from_numpy(ids)[:21 * 16].view(21, 16)
    of_blocks = []
    for i in range(21):
        inputs, labels, positions = mask_tokens(x[i:i + 1], np.random.RandomState([0, i, 2]), model.mask_id, 97)
        changed = (inputs != x[i]).nonzero()[:, 1]
        assert torch.isin(changed, positions).all() # nothing else is
        with torch.no_grad():
            z = model.head(model.features(inputs))[0, positions[0]]
        of_blocks.append(F.cross_entropy(z, x[i, positions[0]]).item())
    assert metrics("out", "eval")[-1]["val_loss"] == pytest.approx(np.mean(of_blocks), abs=1e-5) and step == 2
    train(out_dir="tested", max_iters=2, eval_interval=2, model="bert", distance="cosine", test_fraction=0.5)
    found = np.load("tested/predictions.npz")["nll"].reshape(11, 2) # two masks in each of the last 11 blocks
    assert found.mean(1) == pytest.approx(of_blocks[10:], abs=1e-5)
    for settings in (dict(batch_size=9), dict(seed=5)):
        _, script = train(out_dir="other", overwrite=True, max_iters=0, model="bert", **settings)
        _, again = train(out_dir="again", overwrite=True, max_iters=0, model="bert", batch_size=2)
        halves = zip(script["val_batch"](0, 3), script["val_batch"](3, 3))
        for half, whole in zip(halves, again["val_batch"](0, 6), strict=True):
            assert torch.equal(torch.cat(half), whole)


def test_bert_fills_in_masks():
    train(out_dir="out/bert", max_iters=500, eval_interval=250, log_interval=50, lr_decay_iters=500, model="bert",
          distance="euclidean", n=6, n_layer=1, n_embd=32, batch_size=32, gradient_accumulation_steps=1)
    printed, _ = run_script("sample.py", "--out_dir=out/bert", "--device=cpu", '--start=!"#[MASK]%&[MASK]()*+',
                            "--num_nearest=3")
    lines = [line for line in printed.splitlines() if line.startswith("[MASK] ")]
    assert len(lines) == 2
    assert lines[0].startswith("[MASK] 1: '$' 0.") and lines[1].startswith('[MASK] 2: "\'" 0.') # the alphabet goes on
    model, _, _ = load_run("out/bert", "best.pt", "cpu")
    assert isinstance(model, BERT) and model.mask_id == 97 # the first id beyond the 97 characters
    for start, message in (("abc", "there is none in"), ("[MASK]" * 17, "start has 17 tokens, block_size is 16")):
        assert message in refused("--out_dir=out/bert", "--device=cpu", f"--start={start}", script="sample.py")
    printed, _ = run_script("sample.py", "--out_dir=out/bert", "--device=cpu", "--num_samples=0", "--nearest=a,b")
    assert "nearest prototypes, euclidean distance" in printed


class Letters:
    """An encoding that knows single characters only."""

    @staticmethod
    def encode(text):
        return [ord(c) for c in text]

    @staticmethod
    def decode(ids):
        return chr(ids[0])


class Words(Letters):
    """A space belongs to the word behind it, as in GPT-2's tokens."""

    @staticmethod
    def encode(text):
        words = text.replace(" ", "| ").split("|")
        return [ord(word[-1]) for word in words if word]


class Echo(torch.nn.Module):
    """A model that predicts, at every position, the letter with the position's number."""
    mask_id, head = 200, torch.nn.Linear(1, 1)
    config = SimpleNamespace(block_size=9, vocab_size=128)

    def forward(self, idx, positions):
        assert idx.tolist() == [[200, 97, 200, 200, 98, 200]]
        return F.one_hot(65 + positions, 128).float() * 9, None


def test_masks_next_to_each_other_and_at_the_ends():
    lines = fill_masks(Echo(), Letters, "[MASK]a[MASK][MASK]b[MASK]", 2)
    assert [line[:3] for line in lines] == ["'A'", "'C'", "'D'", "'F'"]
    assert len(fill_masks(Echo(), Words, "[MASK] a [MASK] [MASK] b [MASK]", 2)) == 4 # Echo sees no space of its own


# -----------------------------------------------------------------------------
# Qwen2

def test_scale_sets_the_shape():
    shape = [f"--{key}={SETTINGS[key]}" for key in ("dataset", "block_size", "compile", "device", "track_emissions")]
    with open("mine.py", "w") as f:
        f.write("n_layer = 9\nn_embd = 999\n")
    run_script("train.py", "mine.py", *shape, "--model=qwen2", "--scale=tiny", "--n_layer=1", "--max_iters=0",
               "--out_dir=out")
    config = json.load(open("out/config.json"))
    assert config["model_args"]["n_embd"] == config["config"]["n_embd"] == 128
    assert config["model_args"]["n_layer"] == 1 # a flag beats the scale


def test_prototypes_that_never_occur_are_noted():
    printed, _ = train(out_dir="out", max_iters=0, vocab_size=500, **FAMILY["qwen2"])
    assert "note: 403 of 500 prototypes belong to tokens that the data do not have" in printed


# -----------------------------------------------------------------------------
# export

@pytest.mark.parametrize("settings", [
    dict(bias=True, tie_weights=True), dict(bias=False, feature_scale=0.5), *FAMILY.values()],
    ids=["gpt", "gpt-nobias", *FAMILY])
def test_transformers_scores_an_exported_run_the_same(settings):
    transformers = pytest.importorskip("transformers")
    train(out_dir="out", max_iters=5, **settings)
    printed, _ = run_script("export_hf.py", "--out_dir=out", "--checkpoint=ckpt.pt", "--to=hf")
    assert "at step 5, logits differ by at most" in printed
    model, _, _ = load_run("out", "ckpt.pt", "cpu")
    Auto = transformers.AutoModelForMaskedLM if isinstance(model, BERT) else transformers.AutoModelForCausalLM
    hf, idx = Auto.from_pretrained("hf").eval(), torch.arange(14)[None]
    with torch.no_grad():
        torch.testing.assert_close(hf(idx).logits[..., :97], model.head(model.features(idx)), rtol=1e-4, atol=1e-4)
    assert "hf exists" in refused("--out_dir=out", "--to=hf", script="export_hf.py")
    assert "say where to write" in refused("--out_dir=out", script="export_hf.py")
    card = open("hf/README.md").read()
    assert "nats per" in card and "trust_remote_code" not in card and not os.path.exists("hf/distances.py")


# -----------------------------------------------------------------------------
# what cannot run

@pytest.mark.parametrize("settings, message", [
    (dict(model="bort"), "model is 'bort': use gpt, bert, qwen2"),
    (dict(scale="huge", model="qwen2"), "scale is 'huge': it is for model=qwen2, and one of tiny"),
    (dict(scale="tiny"), "scale is 'tiny': it is for model=qwen2"),
    (dict(model="qwen2", n_kv_head=3), "n_head 2 must be a multiple of n_kv_head 3"),
    (dict(model="bert", mask_id=97), "mask_id 97 is beyond the 97 tokens"),
    (dict(model="bert", mlm_probability=1.0), "mlm_probability is 1.0"),
    (dict(model="qwen2", n_embd=6, n_head=2), "n_embd / n_head is 3, it must be even"),
    (dict(model="bert", init_from="gpt2"), "with model=bert, bert*"),
    (dict(model="qwen2", init_from="bert-base-uncased"), "with model=qwen2, Qwen/Qwen2*"),
    (dict(init_from="Qwen/Qwen2-0.5B"), "with model=gpt, gpt2"),
])
def test_refused(settings, message):
    assert message in refused(**{**SETTINGS, "out_dir": "out", **settings})


def test_a_checkpoint_that_does_not_say_its_n_is_refused():
    """Those of earlier versions have 0, for a default that has changed since."""
    train(out_dir="out", max_iters=1, distance="euclidean")
    ckpt = torch.load("out/ckpt.pt", weights_only=True)
    assert ckpt["model_args"]["n"] > 0
    ckpt["model_args"]["n"] = 0.0
    torch.save(ckpt, "out/ckpt.pt")
    with pytest.raises(SystemExit, match="it does not say its n and feature_scale"):
        load_run("out", "ckpt.pt")
    assert "in the checkpoint" in refused(init_from="resume", out_dir="out", distance="euclidean")


def test_a_checkpoint_of_another_family_or_head_is_refused():
    train(out_dir="out", max_iters=1, eval_interval=1, model="bert", distance="cosine")
    message = refused(init_from="resume", out_dir="out", model="gpt")
    assert "cannot resume out: it holds a bert, model is gpt here" in message
    message = refused(init_from="resume", out_dir="out", distance="euclidean")
    assert "cannot resume out: distance is 'euclidean' here, 'cosine' in the checkpoint" in message


# -----------------------------------------------------------------------------
# WordPiece and other tokenizer.json files

TEXT = "The cat sat on the mat, and the dog ran after the cat. " * 60


@pytest.fixture
def wordpiece():
    """A small tokenizer like BERT's, in the file that its library writes."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save("wordpiece.json")
    return tokenizer


def test_bert_on_wordpiece(wordpiece):
    with open("text.txt", "w") as f:
        f.write(TEXT + " [MASK]")
    run_script("prepare_openwebtext.py", "text.txt", "--out_dir=own/words", "--tokenizer=wordpiece.json",
               "--split=tail", "--val_fraction=0.2", "--num_proc=1")
    meta = data.load_meta("own/words")
    assert meta["vocab_size"] == wordpiece.get_vocab_size()
    assert (meta["mask_id"], meta["special_ids"], meta["eot"]) == (4, [0, 1, 2, 3, 4], 3)
    ids = np.concatenate([np.fromfile(f"own/words/{split}.bin", np.uint16) for split in ("train", "val")])
    assert ids[:3].tolist() == wordpiece.encode("The cat sat", add_special_tokens=False).ids
    assert ids[-1] == 3
    assert 4 not in ids # the marker in a text stays text
    settings = dict(data_dir="own", dataset="words", model="bert", distance="cosine", max_iters=3, out_dir="out")
    _, script = train(**settings)
    model, config, _ = load_run("out", "ckpt.pt", "cpu")
    assert model.mask_id == config["mask_id"] == 4 and model.num_ids == meta["vocab_size"]
    assert json.load(open("out/summary.json")).get("bits_per_byte") is None
    inputs = torch.cat([script["train_batch"](i)[0] for i in range(50)])
    assert (inputs == 4).any() # [MASK]
    assert not torch.isin(inputs, torch.tensor([0, 1, 2])).any() # no special token takes the place of a random one
    printed, _ = run_script("sample.py", "--out_dir=out", "--checkpoint=ckpt.pt", "--device=cpu",
                            "--start=the [MASK] sat")
    assert "[MASK] 1: " in printed


@pytest.mark.parametrize("name, message", [
    ("nowhere", "neither a file nor to be had from the huggingface hub"),
    ("broken.json", "not a tokenizer.json"),
    ("endless.json", "has no <|endoftext|>, [SEP] or </s>"),
])
def test_tokenizers_that_cannot_be_used(name, message, wordpiece):
    with open("broken.json", "w") as f:
        f.write("{}")
    with open("wordpiece.json") as f, open("endless.json", "w") as g:
        g.write(f.read().replace("[SEP]", "[END]"))
    with open("text.txt", "w") as f:
        f.write(TEXT)
    assert message in refused("text.txt", f"--tokenizer={name}", "--out_dir=own/x", script="prepare_openwebtext.py")


def test_a_large_vocabulary_takes_uint32():
    from tokenizers import Tokenizer, models
    words = {f"w{i}": i for i in range(70_000)} | {"<|endoftext|>": 70_000}
    tokenizer = data.JsonTokenizer(Tokenizer(models.WordLevel(words, unk_token="w0")).to_str())
    assert tokenizer.n_vocab == 70_001 and data.token_dtype(tokenizer.n_vocab) == "uint32"
    assert tokenizer.encode_to_numpy("w69999").tolist() == [69999]
    assert tokenizer.decode([69999]) == "w69999"


# -----------------------------------------------------------------------------
# published weights from a folder

@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_transformers_in_a_folder(family):
    """They load whatever the folder is called: the validation loss at step 0 is that of transformers' model."""
    hf = hf_model(family)
    hf.save_pretrained("weights")
    if family == "bert": # whose [MASK] is an id of its tokenizer
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(92))]
        transformers = pytest.importorskip("transformers")
        with open("vocab.txt", "w") as f:
            f.write("\n".join(words))
        transformers.BertTokenizer("vocab.txt").save_pretrained("weights")
    train(model=family, init_from="weights", block_size=16, max_iters=0, out_dir="out", bias=family == "gpt",
          **{key: SMALL[family][key] for key in ("n_layer", "n_head", "n_embd")})
    found = metrics("out", "eval")[0]["val_loss"]
    if family == "bert": # its loss is that of masked tokens
        assert json.load(open("out/config.json"))["model_args"]["mask_id"] == words.index("[MASK]")
        assert math.isfinite(found)
        return
    blocks = data.Blocks("data/tiny", "val", 16, 97, 1337)
    x, y = blocks.fixed(0, blocks.num_fixed)
    logits = hf(x).logits
    assert found == pytest.approx(F.cross_entropy(logits.flatten(0, 1), y.flatten()).item(), rel=1e-4)
