"""
sample.py: the tokens that generate() chooses, the ranking of --nearest, and the messages of the script. The runs that
it reads are made here.

$ pytest tests/test_sample.py
"""
import ast
import re

import pytest
import torch
from helpers import CHARS, make_dataset, refused, run_script, train
from small_models import EVERY_DISTANCE

import data
from families import load_run
from model import GPT, GPTConfig
from sample import generate, nearest_prototypes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with data/tiny and two runs on it, out/cosine and out/baseline."""
    folder, patch = tmp_path_factory.mktemp("runs"), pytest.MonkeyPatch()
    make_dataset(folder / "data" / "tiny")
    patch.chdir(folder)
    for distance in ("cosine", "baseline"):
        train(out_dir=f"out/{distance}", distance=distance, max_iters=60, warmup_iters=10, lr_decay_iters=60,
              eval_interval=30)
    patch.undo()
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture(params=["cosine", "baseline"])
def run(request):
    return load_run(f"out/{request.param}", "best.pt", "cpu")[0]


def sample(*args, out_dir="out/cosine"):
    return run_script("sample.py", f"--out_dir={out_dir}", "--device=cpu", *args)[0]


def samples_of(printed):
    """The texts, each of which stands under a line of its own: ---- sample 1 ----."""
    return [text.removesuffix("\n") for text in re.split(r"-{30,} sample \d+ -{30,}\n", printed)[1:]]

# -----------------------------------------------------------------------------
# generate


def argmax_loop(model, idx, steps):
    for _ in range(steps):
        z = model.head(model.features(idx[:, -16:])) # no more than block_size
        idx = torch.cat([idx, z[:, -1].argmax(-1, keepdim=True)], 1)
    return idx


def test_temperature_0_is_the_argmax(run):
    idx = torch.tensor([[3, 4, 5], [50, 51, 52]])
    with torch.no_grad():
        expected = argmax_loop(run, idx, 30) # runs beyond the 16 positions
    assert expected[:, 3].tolist() == [6, 53] # the model has learned the alphabet: the comparison means something
    for options in (dict(temperature=0), dict(top_k=1), dict(top_p=1e-6), dict(temperature=0, top_k=5, top_p=0.5)):
        assert torch.equal(generate(run, idx, 30, **options), expected), options


def assert_drawn_from(frequencies, p, kept):
    assert set(frequencies.nonzero()[:, 0].tolist()) <= set(kept.tolist())
    assert (frequencies[kept] - p[kept] / p[kept].sum()).abs().max() < 0.03


def test_samples_follow_the_probabilities_that_are_left(run):
    # one step from the same place, many times
    idx = torch.tensor([[10, 11, 12]]).expand(4000, -1)
    with torch.no_grad():
        p = run(idx[:1])[0][0, 0].softmax(-1)

    def frequencies(**options):
        drawn = generate(run, idx, 1, generator=torch.Generator().manual_seed(0), **options)[:, -1]
        return drawn.bincount(minlength=97) / 4000

    order = p.argsort(descending=True)
    assert (frequencies() - p).abs().max() < 0.03
    p_hot = p ** 0.5 / (p ** 0.5).sum()
    assert (frequencies(temperature=2.0) - p_hot).abs().max() < 0.03
    top = frequencies(top_k=3)
    assert_drawn_from(top, p, order[:3])
    kept = int((p[order].cumsum(0) < 0.9).sum()) + 1 # the smallest set that has 0.9
    nucleus = frequencies(top_p=0.9)
    assert_drawn_from(nucleus, p, order[:kept])


def test_a_seed_repeats_itself(run):
    idx = torch.tensor([[3, 4, 5]] * 2)

    def drawn(seed):
        return generate(run, idx, 20, generator=torch.Generator().manual_seed(seed), temperature=3.0)

    a, b, c = drawn(1), drawn(1), drawn(2)
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a[0], a[1])


def test_end_of_text_stops_each_sequence_by_itself(run):
    idx = torch.tensor([[3, 4, 5], [50, 51, 52]])
    free = generate(run, idx, 8, temperature=0)
    eot = free[0, 5].item() # the third token of the first sequence, which counts up from 6; the second has none
    assert eot not in free[0, :5] and eot not in free[1]
    out = generate(run, idx, 8, temperature=0, eot=eot)
    assert torch.equal(out[1], free[1]) and torch.equal(out[0, :6], free[0, :6]) and (out[0, 5:] == eot).all()
    assert generate(run, idx[:1], 8, temperature=0, eot=eot).shape == (1, 6) # nothing is left to do
    # one in the prompt separates documents, it does not end this one
    assert generate(run, torch.tensor([[eot, 4, 5]]), 2, temperature=0, eot=eot).shape == (1, 5)

# -----------------------------------------------------------------------------
# the script


def test_the_script_writes_what_generate_does():
    arguments = ("--start=%&'", "--max_new_tokens=30", "--temperature=0", "--num_samples=2")
    printed = sample(*arguments)
    assert printed == sample(*arguments) and "out/cosine/best.pt at step " in printed
    model = load_run("out/cosine", "best.pt", "cpu")[0]
    ids = generate(model, torch.tensor([[5, 6, 7]]), 30, temperature=0)[0].tolist()
    expected = "".join(CHARS[i] for i in ids)
    assert samples_of(printed) == [expected] * 2 and expected.startswith("%&'(")

    def hot(seed):
        return samples_of(sample("--start=a", "--temperature=2", "--num_samples=2", seed, "--max_new_tokens=30"))

    a, b, c = hot("--seed=1"), hot("--seed=1"), hot("--seed=2")
    assert a == b != c and a[0] != a[1]


def test_a_prompt_from_a_file_may_be_longer_than_the_context(folder):
    (folder / "prompt.txt").write_text("".join(CHARS[:60]))
    text, = samples_of(sample("--start=FILE:prompt.txt", "--num_samples=1", "--max_new_tokens=5", "--temperature=0"))
    assert text.startswith("".join(CHARS[:60])) and len(text) == 65


@pytest.mark.parametrize("distance", ["cosine", "baseline"])
def test_nearest_is_a_ranking_by_the_heads_own_distance(distance):
    # without samples, as the docstring has it
    out_dir = f"out/{distance}"
    lines = sample("--num_samples=0", "--nearest=a,B,ab,ï", "--num_nearest=5", out_dir=out_dir).splitlines()[-4:]
    everyone = sample("--num_samples=0", "--nearest=a", "--num_nearest=1000", out_dir=out_dir).splitlines()[-1]
    head = load_run(out_dir, "best.pt", "cpu")[0].head
    for line, char, count in ((lines[0], "a", 5), (lines[1], "B", 5), (everyone, "a", 96)):
        own = CHARS.index(char)
        with torch.no_grad():
            if distance == "cosine":
                values = head.distances(head.weight[own])
            else:
                values = head.weight[:97] @ head.weight[own]
        expected = [v for i, v in enumerate(values.tolist()) if i != own]
        largest_first = distance == "baseline" # a dot product is large where a distance is small
        expected = sorted(expected, reverse=largest_first)[:count]
        assert line.strip().startswith(repr(char) + "  ")
        found = re.findall(r"""('(?:\\.|[^'\\])'|"'") (-?[\d.e+-]+)""", line) # [(a token, its value), ...]
        shown_ids = [CHARS.index(ast.literal_eval(token)) for token, _ in found]
        shown = [float(value) for _, value in found]
        assert shown == pytest.approx(expected, rel=0.01) # in this order, and each beside its own token:
        assert shown == pytest.approx(values[shown_ids].tolist(), rel=0.01)
    assert "'ab' is more than one token" in lines[2] and "ï" in lines[3] and "not in" in lines[3]


@pytest.mark.parametrize("distance, variant", EVERY_DISTANCE)
def test_nearest_and_generate_take_every_head(distance, variant):
    torch.manual_seed(0)
    config = GPTConfig(block_size=8, vocab_size=97, n_layer=1, n_head=1, n_embd=8, distance=distance, variant=variant)
    model = GPT(config).eval()
    encoding = data.load_encoding(data.load_meta("data/tiny"), "data/tiny")
    with torch.no_grad():
        line, = nearest_prototypes(model, encoding, ["a"], 3)
    assert len(line.split("  ")) >= 4 and "nan" not in line
    assert generate(model, torch.tensor([[1, 2]]), 3, temperature=0).max() < 97 # never a padding row


@pytest.mark.parametrize("args, message", [
    (["--out_dir=out/none"], "out/none/best.pt is not there: train first"),
    (["--checkpoint=last.pt"], "last.pt is not there"),
    (["--temperature=-1", "--top_p=0", "--top_k=-1", "--start=FILE:none.txt"], "4 to fix"),
    (["--start="], "start is empty"),
    (["--start=naïve"], "['ï'] are not in this dataset's vocabulary of 97"),
    (["--num_nearest=0"], "num_nearest"),
    (["--num_samples=-1"], "num_samples"),
    (["--max_new_tokens=-1"], "max_new_tokens"),
    (["--tempreature=1"], "did you mean 'temperature'?"),
    (["--init_from=gpt3"], "init_from"),
])
def test_refused(args, message):
    assert message in refused("--device=cpu", "--out_dir=out/cosine", *args, script="sample.py")


def test_a_run_on_end_of_text_tokens_says_where_it_ended(monkeypatch):
    load = data.load_encoding

    def with_eot(*args):
        """The char-level format has no such token, so "+" is made to be it."""
        encoding = load(*args)
        encoding.eot = CHARS.index("+")
        return encoding

    monkeypatch.setattr(data, "load_encoding", with_eot)
    text, = samples_of(sample("--start=%&'", "--num_samples=1", "--temperature=0"))
    assert text == "%&'()* (end of text)"
