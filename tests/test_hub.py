"""
A run that export_hf.py wrote is a folder that transformers loads, with the head's scores, loss and gradients.

$ pytest tests/test_hub.py
"""
import csv
import filecmp
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CHARS, ROOT, make_dataset, processes, refused, run_script, train
from small_models import EVERY_DISTANCE, masked, new_model, tokens

import data
import sample
from distances import DistanceHead
from families import load_run
from model import GPT
from prepare_stdlib import train_bpe

transformers = pytest.importorskip("transformers")
import export_hf  # noqa: E402 after it is known that transformers is there
from modeling_distance_head import DistanceHeadForCausalLM  # noqa: E402

pytestmark = pytest.mark.usefixtures("here")
COSINE = dict(distance="cosine", tie_weights=True)
every_family = pytest.mark.parametrize("family", ["gpt", "bert", "qwen2"])


def randomised(family, **config):
    """A small model in evaluation mode in which no two weights are alike."""
    model = new_model(family, **config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval()


def exported(model, family, folder="hf"):
    """That model in a folder, and as transformers loads it in this process."""
    export_hf.save(export_hf.with_distance_head(model, family), folder)
    Auto = getattr(transformers, export_hf.auto_class(model))
    return Auto.from_pretrained(folder, trust_remote_code=True)


def logits(model, idx):
    with torch.no_grad():
        return model.head(model.features(idx))


# -----------------------------------------------------------------------------
# the folder

LOAD = """
import os, torch, transformers
for folder in sorted(os.listdir()):
    idx, expected, auto = torch.load(folder + "/expected.pt")
    Auto = getattr(transformers, auto)
    hf, info = Auto.from_pretrained(folder + "/hf", trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), (folder, info)
    with torch.no_grad():
        print(folder, (hf(idx).logits - expected).abs().max().item(), hf.get_output_embeddings().extra_repr())
"""


def test_every_head_loads_in_a_fresh_process(here):
    cases = [("gpt", *head) for head in EVERY_DISTANCE]
    cases += [(family, *head) for family in ("bert", "qwen2") for head in (("cosine", ""), ("offset_l2", ""))]
    os.makedirs("all")
    heads = {}
    for i, (family, distance, variant) in enumerate(cases):
        params = "p=3" if distance == "minkowski" else ""
        model = randomised(family, distance=distance, variant=variant, distance_params=params, learn_n=i % 2 == 0,
                           tie_weights=i % 3 == 0, link="softmin" if i % 5 == 0 else "harmonic")
        folder = f"all/{family}-{distance}-{variant or 'default'}"
        export_hf.save(export_hf.with_distance_head(model, family), f"{folder}/hf") # of one name: one copy of the code
        idx = tokens(2, 24)
        torch.save((idx, logits(model, idx), export_hf.auto_class(model)), f"{folder}/expected.pt")
        assert filecmp.cmp(f"{folder}/hf/distances.py", os.path.join(ROOT, "distances.py"), shallow=False)
        heads[os.path.basename(folder)] = model.head.extra_repr()
    (code, out, err), = processes(here / "all", ["-c", LOAD])
    assert code == 0, err
    found = dict(re.match(r"(\S+) \S+ (.*)", line).groups() for line in out.splitlines())
    assert found == heads
    assert max(float(line.split()[1]) for line in out.splitlines()) < 1e-5


@pytest.fixture(scope="module")
def run(tmp_path_factory, datasets):
    """A folder with a run that has measured its energy, out, and what was exported of it, hf."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("run")
        patch.chdir(folder)
        (folder / "data").symlink_to(datasets / "data")
        train(out_dir="out", max_iters=60, eval_interval=30, lr_decay_iters=60, track_emissions=True, learn_n=True,
              country_iso_code="FRA", **COSINE)
        printed, _ = run_script("export_hf.py", "--out_dir=out", "--checkpoint=ckpt.pt", "--to=hf")
        assert "hf: DistanceHeadForCausalLM from out/ckpt.pt at step 60, logits differ by at most 0.0e+00" in printed
    return folder


@pytest.fixture
def loaded(run):
    return transformers.AutoModelForCausalLM.from_pretrained(run / "hf", trust_remote_code=True)


def test_the_folder_is_what_the_hub_expects(run):
    config = json.loads((run / "hf/config.json").read_text())
    assert config["auto_map"] == {"AutoConfig": "configuration_distance_head.DistanceHeadConfig",
                                  "AutoModelForCausalLM": "modeling_distance_head.DistanceHeadForCausalLM"}
    assert config["architectures"] == ["DistanceHeadForCausalLM"] and config["distance"] == "cosine"
    assert json.loads((run / "hf/generation_config.json").read_text())["use_cache"] is False
    assert {"model.safetensors", "tokenizer.json", "tokenizer_config.json", "LICENSE"} <= set(os.listdir(run / "hf"))
    for name in ("config.json", "tokenizer_config.json", "README.md"): # no machine's paths
        assert str(run) not in (run / "hf" / name).read_text()


def test_the_model_card(run):
    from huggingface_hub import ModelCard
    card, summary = ModelCard.load(run / "hf/README.md"), json.loads((run / "out/summary.json").read_text())
    with open(run / "out/emissions.csv", newline="") as f:
        *_, last_row = csv.DictReader(f)
    carbon = card.data.co2_eq_emissions
    assert card.data.tags == ["distance-heads", "cosine", "harmonic-link"]
    assert carbon["emissions"] == pytest.approx(float(last_row["emissions_g_total"])) and carbon["emissions"] > 0
    assert carbon["training_type"] == "pre-training" and carbon["geographical_location"].startswith("FRA")
    info = json.loads((run / "out/config.json").read_text())
    assert carbon["hardware_used"] == f"1 x {info['device_name']}" and "CodeCarbon" in carbon["source"]
    assert f"{summary['val_loss']:.4f} nats per token" in card.text
    for words in ("vLLM", "put a dot", info["command"], info["data"]["hash"], "cosine (stable), harmonic, n=",
                  '"learning_rate": 0.01'):
        assert words in card.text, words
    code, = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    names = {}
    exec(code.replace('"hf"', repr(str(run / "hf"))), names) # it runs, and asks nothing
    assert names["model"].config.distance == "cosine" and names["tokenizer"]("a").input_ids == [CHARS.index("a")]


@every_family
def test_saved_again_nothing_is_lost(family):
    model = randomised(family, distance="mahalanobis", learn_n=True, tie_weights=True)
    hf = exported(model, family)
    hf.save_pretrained("again")
    same, different, missing = filecmp.cmpfiles("hf", "again", os.listdir("hf"), shallow=False)
    assert set(missing) <= {"LICENSE"} and "distances.py" in same
    assert not different, different
    back = type(hf).from_pretrained("again")
    assert back.get_output_embeddings().weight is back.get_input_embeddings().weight
    assert back.config.tie_word_embeddings and torch.equal(back(tokens(2, 9)).logits, logits(model, tokens(2, 9)))
    back.load_state_dict(hf.state_dict())


def test_a_config_of_another_head_is_refused():
    exported(randomised("gpt", distance="cosine"), "gpt")
    path = Path("hf/config.json")
    path.write_text(path.read_text().replace('"cosine"', '"euclidean"'))
    with pytest.raises(ValueError, match="those of a cosine stable harmonic head, the config says euclidean standard"):
        transformers.AutoModelForCausalLM.from_pretrained("hf", trust_remote_code=True)


# -----------------------------------------------------------------------------
# the model

def test_generate_is_sample(loaded, run):
    model, _, _ = load_run(run / "out", "ckpt.pt")
    idx = torch.tensor([[3, 4, 5, 6], [50, 51, 52, 53]])
    expected = sample.generate(model, idx, 20, temperature=0) # beyond the 16 positions
    assert expected[0, 4:8].tolist() == [7, 8, 9, 10] # it has learned the alphabet: the comparison means something
    for options in (dict(), dict(use_cache=True), dict(attention_mask=torch.ones_like(idx))):
        found = loaded.generate(idx, max_new_tokens=20, do_sample=False, pad_token_id=0, **options)
        assert torch.equal(found, expected), options
    beams = loaded.generate(idx, max_new_tokens=4, num_beams=3, do_sample=False, pad_token_id=0, use_cache=True)
    assert beams[0, 4:].tolist() == [7, 8, 9, 10]
    short = sample.generate(model, idx[:1, 2:], 9, temperature=0)
    padded, mask = torch.tensor([[0, 0, 5, 6], [50, 51, 52, 53]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    found = loaded.generate(padded, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert torch.equal(found[0, 2:], short[0]) and torch.equal(found[1], expected[1, :13])


def test_the_tokenizer_of_characters(run):
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "hf", trust_remote_code=True)
    text = "def f(x):\n\treturn  x"
    assert tokenizer(text).input_ids == [CHARS.index(c) for c in text]
    assert tokenizer.decode(tokenizer(text).input_ids) == text and tokenizer.model_max_length == 16


@pytest.mark.parametrize("family", ["gpt", "qwen2"])
def test_labels_give_the_heads_own_loss(family):
    model = randomised(family, distance="euclidean", learn_n=True)
    hf, idx = exported(model, family), tokens(3, 12)
    labels = idx.clone()
    labels[0, :5] = -100
    targets = labels[:, 1:].clone()
    by_hand = F.cross_entropy(logits(model, idx)[:, :-1].flatten(0, 1), targets.flatten())
    out = hf(idx, labels=labels)
    assert out.logits.shape == (3, 12, 97) and out.loss.item() == pytest.approx(by_hand.item(), abs=1e-5)
    hf.train()
    out = hf(idx, labels=labels)
    assert out.logits is None
    out.loss.backward()
    _, loss = model(idx[:, :-1], targets.masked_fill(targets == -100, -1))
    loss.backward()
    for (name, p), q in zip(hf.named_parameters(), model.parameters(), strict=True):
        assert p.grad.abs().max() > 0 or "k_proj.bias" in name
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    mean, items = out.loss.item(), (targets != -100).sum()
    assert hf(idx, labels=labels, num_items_in_batch=2 * items).loss.item() == pytest.approx(mean / 2, rel=1e-5)


def test_labels_of_masked_tokens():
    model = randomised("bert", **COSINE)
    hf = exported(model, "bert").train()
    inputs, targets, positions = masked(tokens(3, 24))
    labels = torch.full(inputs.shape, -100).scatter(1, positions, targets)
    out = hf(inputs, labels=labels)
    out.loss.backward()
    _, loss = model(inputs, targets, positions)
    assert out.logits is None and out.loss.item() == pytest.approx(loss.item(), abs=1e-5)
    assert hf.get_input_embeddings().weight.grad.abs().max() > 0


@every_family
def test_padding_changes_nothing(family):
    model = randomised(family, distance="cosine")
    hf, idx = exported(model, family), tokens(4, 9)
    mask = torch.tensor([[1] * 9, [0] * 3 + [1] * 6, [1] * 4 + [0] * 5, [0] * 9])
    with torch.no_grad():
        found = hf(idx, attention_mask=mask).logits
    for row, kept in enumerate((slice(9), slice(3, 9), slice(4), slice(9))):
        torch.testing.assert_close(found[row, kept], logits(model, idx[row:row + 1, kept])[0], rtol=0, atol=1e-5)
    assert found.isfinite().all()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("new", [90, 120, 150]) # fewer, within the padding, and beyond it
def test_tokens_are_added_and_taken_away(new, tied):
    model = randomised("gpt", distance="offset_l2", tie_weights=tied)
    idx = tokens(2, 9, high=90)
    expected, hf = logits(model, idx), exported(model, "gpt")
    hf.resize_token_embeddings(new)
    found = hf(idx).logits
    assert found.shape == (2, 9, new) and hf.config.vocab_size == new
    assert torch.equal(found[..., :90], expected[..., :90])
    assert (hf.get_output_embeddings().weight is hf.get_input_embeddings().weight) == tied
    hf(torch.full((1, 3), new - 1), labels=torch.full((1, 3), new - 1)).loss.backward()
    hf.save_pretrained("resized")
    back = transformers.AutoModelForCausalLM.from_pretrained("resized", trust_remote_code=True)
    assert torch.equal(back(idx).logits, found)


def test_what_a_distance_head_cannot_do_is_one_line():
    hf, idx = exported(randomised("bert", distance="cosine"), "bert"), tokens(1, 4)
    assert not hf.is_backend_compatible() # what vLLM asks before it builds an output layer of its own
    with pytest.raises(ValueError, match=r"more tokens would take the id of \[MASK\]"):
        hf.resize_token_embeddings(120)
    assert hf.resize_token_embeddings() is hf.get_input_embeddings()
    with pytest.raises(ValueError, match="Linear.* cannot take its place"):
        hf.set_output_embeddings(torch.nn.Linear(32, 97))
    hf.set_output_embeddings(DistanceHead(32, 128, "cosine", num_classes=97))
    assert hf(idx).logits.shape == (1, 4, 97)
    with pytest.raises(ValueError, match="takes input_ids and attention_mask, no position_ids"):
        hf(idx, position_ids=torch.arange(4)[None])
    with pytest.raises(ValueError, match=r"attention_mask \(1, 1, 4, 4\) must have the shape of input_ids \(1, 4\)"):
        hf(idx, attention_mask=torch.zeros(1, 1, 4, 4))


@every_family
def test_half_precision(family):
    model = randomised(family, **COSINE)
    exported(model, family)
    Auto = getattr(transformers, export_hf.auto_class(model))
    hf = Auto.from_pretrained("hf", trust_remote_code=True, dtype=torch.bfloat16)
    with torch.no_grad():
        found = hf(tokens(2, 9)).logits
    assert found.dtype == torch.float32 # the head computes so
    torch.testing.assert_close(found, logits(model, tokens(2, 9)), rtol=0, atol=1.0)


def test_a_new_model_of_a_config_starts_as_ours():
    config = export_hf.with_distance_head(new_model("gpt", distance="cosine"), "gpt").config
    torch.manual_seed(0)
    hf = DistanceHeadForCausalLM(config)
    for (name, p), q in zip(hf.model.named_parameters(), new_model("gpt", distance="cosine").parameters(), strict=True):
        assert torch.equal(p, q), name


# -----------------------------------------------------------------------------
# tokenizers

TEXT = Path(ROOT, "data.py").read_text().replace("[MASK]", "") + "naïve 日本語 🙂🏽 it's 12345  \t\r\n\n   x \n "


def tokenizer_of(meta, folder, model):
    """The dataset's tokenizer and the one for transformers, written and read."""
    export_hf.hf_tokenizer(folder, model).save_pretrained("tokenizer")
    return data.load_encoding(meta, folder), transformers.AutoTokenizer.from_pretrained("tokenizer")


def dataset(enc):
    """A dataset of a few tokens with this tokenizer: (meta, its folder)."""
    ids = np.array([1, 2, 3, enc.eot_token])
    meta = data.write_dataset("data_of_it", (pair for pair in [(ids, ids)]), enc, "a test")
    return meta, "data_of_it"


@every_family
def test_byte_level_bpe(family):
    meta, folder = dataset(data.own_encoding(train_bpe([TEXT], 600)))
    model = new_model(family, vocab_size=600)
    ours, theirs = tokenizer_of(meta, folder, model)
    assert theirs(TEXT).input_ids == ours.encode(TEXT) and theirs.decode(ours.encode(TEXT)) == TEXT
    assert theirs.eos_token_id == ours.eot == 599 and theirs("a<|endoftext|>b").input_ids[1] == 599
    if family == "bert":
        assert (theirs.mask_token_id, theirs.pad_token_id) == (model.mask_id, model.pad_id) == (600, 601)
        assert theirs("self [MASK].").input_ids == [*ours.encode("self"), 600, *ours.encode(".")] # the space goes along


def test_wordpiece():
    tokenizers = pytest.importorskip("tokenizers")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {word: i for i, word in enumerate([*special, "the", "cat", "##s"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(special)
    meta, folder = dataset(data.JsonTokenizer(tokenizer.to_str()))
    _, theirs = tokenizer_of(meta, folder, new_model("bert", vocab_size=8, mask_id=4))
    assert theirs("the cats [MASK]").input_ids == [5, 6, 7, 4]
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, 3, 1)


def test_gpt2s_bpe():
    encoding = pytest.importorskip("tiktoken")
    try:
        data.named_encoding("gpt2")
    except ConnectionError as e:
        pytest.skip(str(e))
    meta, folder = dataset(encoding.get_encoding("gpt2"))
    ours, theirs = tokenizer_of(meta, folder, new_model("gpt"))
    assert theirs(TEXT).input_ids == ours.encode(TEXT) and theirs.eos_token_id == 50256


def test_a_run_without_its_data_goes_without_a_tokenizer():
    train(out_dir="out", max_iters=1, **COSINE)
    os.remove("data")
    make_dataset(Path("data/tiny"), train_tokens=5000)
    printed, _ = run_script("export_hf.py", "--out_dir=out", "--checkpoint=ckpt.pt", "--to=other/")
    assert "without a tokenizer: data/tiny holds other data than those of the run" in printed
    os.remove("data/tiny/train.bin")
    printed, _ = run_script("export_hf.py", "--out_dir=out", "--checkpoint=ckpt.pt", "--to=hf")
    assert "without a tokenizer: data/tiny/train.bin is not there" in printed
    assert "without a tokenizer" in Path("hf/README.md").read_text() and not os.path.exists("hf/tokenizer.json")


# -----------------------------------------------------------------------------
# other tools, and the way back

def test_lm_evaluation_harness(run, here, monkeypatch):
    """A task of three questions from a local file, through its command line. Given "abc", the alphabet goes on."""
    pytest.importorskip("lm_eval")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"): # else it asks the hub for each file, again and again
        monkeypatch.setenv(name, "1")
    pytest.importorskip("accelerate") # of lm_eval[hf]
    letters = "".join(CHARS)
    questions = [dict(start=letters[i:i + 5], choices=[letters[i + 5:i + 8], letters[i - 20:i - 17]])
                 for i in (33, 40, 66)]
    Path("questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    Path("alphabet.yaml").write_text(f"""
task: alphabet
dataset_path: json
dataset_kwargs: {{data_files: {{test: {here}/questions.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
""")
    arguments = f"pretrained={run}/hf,trust_remote_code=True,prefix_token_id=95" # characters have no end of text
    command = ["-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", "alphabet",
               "--include_path", str(here), "--device", "cpu", "--batch_size", "2"]
    (code, out, err), = processes(here, command, timeout=400) # its imports alone take long
    assert code == 0 and re.search(r"\|alphabet\|.*\|acc +\|.*\| +1\|", out), out + err


def test_half_a_folder_does_not_stay(monkeypatch):
    train(out_dir="out", max_iters=1, **COSINE)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", full)
    message = refused("--out_dir=out", "--checkpoint=ckpt.pt", "--to=hf", script="export_hf.py")
    assert message == "cannot write hf: [Errno 28] No space left on device" and not os.path.exists("hf")


def test_weights_of_another_kind_are_refused():
    """transformers would fill in random ones, and go on. Published GPT-2, without the tied head, is whole."""
    config = transformers.GPT2Config(vocab_size=97, n_positions=24, n_embd=32, n_layer=1, n_head=2)
    published = transformers.GPT2Model(config)
    published.save_pretrained("published")
    assert torch.equal(GPT.from_pretrained("published").transformer.wte.weight[:97], published.wte.weight)
    exported(randomised("gpt", distance="cosine"), "gpt")
    message = refused(init_from="hf", dataset="tiny", device="cpu", out_dir="out", block_size=16, max_iters=0)
    assert "hf lacks" in message and "GPT2LMHeadModel" in message
