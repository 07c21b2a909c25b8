"""
The data format: what is written is what is read, even after a kill, and Blocks gives it out in a fixed order. The tests
need no network and no real corpus.

$ pytest tests/test_data.py
"""
import base64
import hashlib
import json
import os
import pickle
import random
import re
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import ROOT

import data
import prepare_openwebtext
import prepare_stdlib
from data import EOT, Blocks, load_encoding, load_meta

TEXT = ("The cat sat on the mat.\nIt's 3 o'clock, naïve café owners sing: ♪ 日本 🙂!\n\n"
        "\tdef f(x):\n\t\treturn x  # done   \n")
MERGES = [b"th", b"the", b" t", b" th", b" the", b"at", b"\xc3\xa9", b"  "]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def ranks_file(tmp_path):
    """The ranks of 256 bytes and a few merges: they are 264, so that end-of-text is 264."""
    return write_ranks(tmp_path / "own.tiktoken", [bytes([b]) for b in range(256)] + MERGES)


def write_ranks(path, tokens):
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)))
    return path


def documents(n):
    rng = random.Random(1)
    words = TEXT.split() + ["the", "cat"]
    return [f"{i}: " + " ".join(rng.choices(words, k=rng.randint(1, 12))) for i in range(n)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def prepare(*args):
    prepare_openwebtext.main([str(a) for a in args])


def file_bytes(folder):
    """{file name: its bytes}. Nothing temporary may be left."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert sorted(found) == sorted(os.listdir(folder)) == ["meta.pkl", "tokenizer.tiktoken", "train.bin", "val.bin"]
    return found


def read_bin(folder, split):
    return np.fromfile(folder / f"{split}.bin", load_meta(folder)["dtype"]).tolist()


def write_folder(folder, train, val=(), dtype="uint16", **meta):
    folder.mkdir(exist_ok=True)
    np.array(train, dtype).tofile(folder / "train.bin")
    np.array(val, dtype).tofile(folder / "val.bin")
    if meta:
        meta = {"dtype": dtype, "encoding": "gpt2", "eot": None, "source": "test"} | meta
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder

# -----------------------------------------------------------------------------
# prepare_openwebtext.py


def test_round_trip_of_one_document_cut_at_the_tail(tmp_path, ranks_file, capsys):
    source, out = tmp_path / "book.txt", tmp_path / "book"
    source.write_text(TEXT * 20, encoding="utf-8")
    prepare(source, "--ranks", ranks_file, "--split", "tail", "--val_fraction", 0.1, "--out_dir", out, "--num_proc", 1)
    assert f"python train.py --data_dir={tmp_path} --dataset=book" in capsys.readouterr().out
    meta, train, val = load_meta(out), read_bin(out, "train"), read_bin(out, "val")
    assert load_encoding(meta, out).decode(train + val) == TEXT * 20 + EOT
    assert len(val) == int(0.1 * len(train + val)) == meta["val_tokens"] and len(train) == meta["train_tokens"]
    assert meta["train_bytes"] + meta["val_bytes"] == len((TEXT * 20).encode())
    assert (meta["train_docs"], meta["val_docs"]) == (1, 1) # cut in two
    assert (meta["vocab_size"], meta["eot"], meta["dtype"]) == (265, 264, "uint16")
    shas = "".join(hashlib.sha256((out / name).read_bytes()).hexdigest() for name in ("train.bin", "val.bin"))
    assert meta["hash"] == hashlib.sha256(shas.encode()).hexdigest()


def test_round_trip_of_documents_drawn_at_random(tmp_path, ranks_file):
    texts = documents(120) + ["", f"the marker {EOT} in a text is text"]
    source = write_jsonl(tmp_path / "texts.jsonl", texts)
    outs = [tmp_path / "one", tmp_path / "two", tmp_path / "other_seed"]
    args = [source, "--ranks", ranks_file, "--val_fraction", 0.2, "--shard_mb", 0.0003] # shards of 300 characters
    for out, num_proc, seed in zip(outs, (1, 2, 1), (5, 5, 6)):
        prepare(*args, "--out_dir", out, "--num_proc", num_proc, "--seed", seed)
    one, two, other = map(file_bytes, outs)
    assert one == two
    assert one["val.bin"] != other["val.bin"]
    meta, train, val = load_meta(outs[0]), read_bin(outs[0], "train"), read_bin(outs[0], "val")
    assert train[-1] == val[-1] == meta["eot"]
    assert (train.count(meta["eot"]), val.count(meta["eot"])) == (meta["train_docs"], meta["val_docs"])

    def decode(ids):
        ends = [i for i, t in enumerate(ids) if t == meta["eot"]]
        return [load_encoding(meta, outs[0]).decode(ids[a + 1:b]) for a, b in zip([-1] + ends, ends)]

    kept = [text for text in texts if text]
    drawn = [data.in_val(5, i, 0.2) for i in range(len(kept))]
    assert decode(val) == [text for text, d in zip(kept, drawn) if d]
    assert decode(train) == [text for text, d in zip(kept, drawn) if not d]
    assert 10 < sum(drawn) < 40


def test_killed_and_run_again_gives_the_same_bytes(tmp_path, ranks_file):
    source = write_jsonl(tmp_path / "texts.jsonl", documents(1500))
    args = [source, "--ranks", ranks_file, "--val_fraction", 0.1, "--shard_mb", 1e-6] # a shard per document
    prepare(*args, "--out_dir", tmp_path / "unbroken", "--num_proc", 2)

    out = tmp_path / "killed"
    script = os.path.join(ROOT, "prepare_openwebtext.py")
    command = [sys.executable, script, *map(str, args), "--out_dir", str(out), "--num_proc", "2"]
    env = os.environ | {"HF_HOME": str(tmp_path / "home")}
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not list(out.glob("shards-*/*.bin")):
        assert process.poll() is None and time.time() < deadline, "no shard was written"
        time.sleep(0.002)
    process.kill()
    assert process.wait() != 0
    shards = {path.name: path.stat().st_mtime_ns for path in out.glob("shards-*/*.bin")}
    assert 0 < len(shards) < 1500 and not (out / "train.bin").exists()

    # another run's shards do not get in the way, and are not taken
    other = [*args[:3], "--val_fraction", 0.1, "--docs", 100, "--out_dir", out, "--num_proc", 1]
    prepare(*other)
    assert load_meta(out)["train_docs"] + load_meta(out)["val_docs"] == 100
    assert set(shards) <= {path.name for path in out.glob("shards-*/*.bin")}

    with pytest.raises(SystemExit, match="killed holds a dataset: .*--overwrite"):
        prepare(*args, "--out_dir", out)
    again = subprocess.run(command[:-1] + ["1", "--overwrite"], cwd=tmp_path, env=env, capture_output=True, text=True,
                           check=False)
    assert again.returncode == 0, again.stderr
    finished = int(again.stdout.split("continuing: ")[1].split()[0])
    assert len(shards) <= finished < 1500 # a worker may have finished its last one after the kill
    assert file_bytes(out) == file_bytes(tmp_path / "unbroken")


def test_parquet_and_streaming_give_what_jsonl_gives(tmp_path, ranks_file):
    import datasets
    texts = documents(40)
    write_jsonl(tmp_path / "texts.jsonl", texts)
    datasets.Dataset.from_dict({"text": texts, "n": range(40)}).to_parquet(tmp_path / "texts.parquet")
    (tmp_path / "folder").mkdir()
    lines = "\n\n".join(texts) + "\n" # empty lines are no documents
    (tmp_path / "folder" / "lines.txt").write_text(lines, encoding="utf-8")
    runs = [["texts.jsonl"], ["texts.parquet"], ["texts.parquet", "--docs", 40], ["folder", "--sample_by", "line"]]
    for i, (name, *args) in enumerate(runs):
        args += ["--ranks", ranks_file, "--val_fraction", 0.2, "--num_proc", 1]
        prepare(tmp_path / name, *args, "--out_dir", tmp_path / f"out{i}")
    bins = [(tmp_path / f"out{i}" / "train.bin").read_bytes() for i in range(4)]
    assert bins == [bins[0]] * 4


def test_a_large_vocabulary_is_uint32(tmp_path):
    tokens = [bytes([b]) for b in range(256)]
    tokens += [b"%05d" % i for i in range(65_279)] # 65,535 ranks, so that end-of-text is 65,535
    for extra, dtype in ([], "uint16"), ([b"end"], "uint32"):
        ranks = write_ranks(tmp_path / "large.tiktoken", tokens + extra)
        source, out = write_jsonl(tmp_path / "texts.jsonl", documents(20)), tmp_path / dtype
        prepare(source, "--ranks", ranks, "--val_fraction", 0.2, "--out_dir", out, "--num_proc", 1)
        assert load_meta(out)["dtype"] == dtype
        assert read_bin(out, "train")[-1] == load_meta(out)["eot"] == len(tokens + extra)


def test_ranks_of_a_prepared_folder_bring_their_pattern(tmp_path, ranks_file):
    source = write_jsonl(tmp_path / "texts.jsonl", documents(20))
    args = ["--val_fraction", 0.2, "--num_proc", 1, "--out_dir"]
    prepare(source, "--ranks", ranks_file, "--pat_str", r"\w+|\W+", *args, tmp_path / "first")
    prepare(source, "--ranks", tmp_path / "first" / "tokenizer.tiktoken", *args, tmp_path / "second")
    assert load_meta(tmp_path / "second")["pat_str"] == r"\w+|\W+"
    assert file_bytes(tmp_path / "first") == file_bytes(tmp_path / "second")


@pytest.mark.parametrize("name, args, message", [
    ("texts.jsonl", ["--val_fraction", "0"], "val split is empty, of 20 document.*--val_fraction.*--split tail"),
    ("texts.jsonl", ["--text_column", "body"], r"no column 'body', only \['text'\].*--text_column"),
    ("texts.csv", [], "cannot tell how to read"),
    ("nowhere.txt", [], "nowhere.txt: no such file"),
    ("latin1.txt", [], "cannot read the text: 'utf-8' codec can't decode"),
    ("latin1.txt", ["--docs", "5"], "cannot read the text: 'utf-8' codec can't decode"),
    ("broken.jsonl", [], "cannot read the text: .*JSON"),
    ("texts.jsonl", ["--ranks", "nowhere.tiktoken"], "nowhere.tiktoken"),
    ("texts.jsonl", ["--ranks", "partial.tiktoken"], "lack 1 of the 256 single bytes, first b'\\\\xff'"),
    ("texts.jsonl", ["--ranks", "damaged.tiktoken"], "damaged.tiktoken, line 1"),
    ("texts.jsonl", ["--encoding", "gpt5"], "no encoding 'gpt5', it has"),
])
def test_mistakes_are_named(tmp_path, ranks_file, monkeypatch, name, args, message):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "texts.jsonl", documents(20))
    (tmp_path / "texts.csv").write_text("text\na\n")
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    write_ranks(tmp_path / "partial.tiktoken", [bytes([b]) for b in range(255)])
    (tmp_path / "damaged.tiktoken").write_text("no base64 0\n")
    if not set(args) & {"--ranks", "--encoding"}:
        args = [*args, "--ranks", ranks_file]
    with pytest.raises(SystemExit, match=message):
        prepare(name, *args, "--out_dir", "out", "--num_proc", 1)
    assert not os.path.exists("out/train.bin")


def test_no_network_is_one_line_within_seconds(tmp_path):
    with socket.socket() as silent: # takes a connection and never answers, like a network that drops packets
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "no_proxy": "127.0.0.1"}
        del env["HF_HUB_OFFLINE"]
        started = time.time()
        run = subprocess.run([sys.executable, os.path.join(ROOT, "prepare_openwebtext.py")],
                             cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 1 and run.stdout == "" and run.stderr.count("\n") == 1, run.stderr
    assert "no network" in run.stderr and "python prepare_stdlib.py" in run.stderr and "local files" in run.stderr
    assert time.time() - started < 15


def test_an_encoding_that_cannot_be_downloaded(monkeypatch):
    import requests
    import tiktoken

    def no_network(name):
        raise requests.exceptions.ConnectionError("a wall\nof text")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(ConnectionError, match="cannot download the encoding 'gpt2'.*python prepare_stdlib.py") as error:
        load_encoding({"encoding": "gpt2", "eot": 50256}, "data/x")
    assert "\n" not in str(error.value)
    with pytest.raises(TimeoutError):
        data.within(0.05, time.sleep, 1)

# -----------------------------------------------------------------------------
# prepare_stdlib.py


def test_stdlib_twice_gives_the_same_bytes(tmp_path, capsys):
    library = tmp_path / "library"
    for i, text in enumerate(documents(30)):
        (library / f"package{i % 3}").mkdir(parents=True, exist_ok=True)
        (library / f"package{i % 3}" / f"module{i}.py").write_text(f"# {text}\n{TEXT}", encoding="utf-8")
    for folder in "test", "site-packages", "package0/idle_test", "package1/lib2to3":
        (library / folder).mkdir()
        (library / folder / "no.py").write_text("not this")
    (library / "_sysconfigdata_x.py").write_text("not this")
    assert len(prepare_stdlib.python_files(library)) == 30
    for out in "one", "two":
        prepare_stdlib.main(["--src", str(library), "--out_dir", str(tmp_path / out), "--vocab_size", "300",
                             "--val_fraction", "0.2"])
    assert file_bytes(tmp_path / "one") == file_bytes(tmp_path / "two")
    meta = load_meta(tmp_path / "one")
    assert (meta["vocab_size"], meta["eot"], meta["train_docs"] + meta["val_docs"]) == (300, 299, 30)
    enc = load_encoding(meta, tmp_path / "one")
    assert enc.decode(enc.encode(TEXT)) == TEXT and len(enc.encode(TEXT)) < len(TEXT.encode())
    assert enc.encode("a" + EOT)[-1] == enc.eot == 299
    with pytest.raises(SystemExit, match="--vocab_size 256 is too small"):
        prepare_stdlib.main(["--vocab_size", "256"])


def test_the_exported_ranks_cut_text_as_the_trained_tokenizer_does():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    texts = [f"{TEXT}{text}\r\n\r\n  {text}\n" for text in documents(200)]
    enc = data.own_encoding(prepare_stdlib.train_bpe(texts, 400))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=399, initial_alphabet=alphabet))
    assert enc.n_vocab == 400
    assert [enc.encode_ordinary(text) for text in texts] == [e.ids for e in tokenizer.encode_batch(texts)]

# -----------------------------------------------------------------------------
# meta.pkl and nanoGPT's folders


def test_a_pickle_with_code_in_it_is_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    folder = write_folder(tmp_path / "x", range(100))
    for content in pickle.dumps({"vocab_size": Malicious()}), pickle.dumps([1]), b"", b"garbage":
        (folder / "meta.pkl").write_bytes(content)
        with pytest.raises(ValueError, match="meta.pkl was refused"):
            load_meta(folder)
    assert not (tmp_path / "it ran").exists()
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 5}))
    with pytest.raises(ValueError, match="has no 'dtype'"):
        load_meta(folder)


def test_nanogpt_folders_load_as_they_are(tmp_path):
    folder = write_folder(tmp_path / "openwebtext", range(100), range(50))
    meta = load_meta(folder)
    assert (meta["vocab_size"], meta["dtype"], meta["encoding"], meta["eot"]) == (50257, "uint16", "gpt2", 50256)
    assert "assumed" in meta["source"]
    assert Blocks(folder, "val", 8).fixed(0, 1)[0].tolist() == [list(range(8))]

    chars = sorted(set(TEXT))
    stoi = {c: i for i, c in enumerate(chars)}
    folder = write_folder(tmp_path / "shakespeare_char", [stoi[c] for c in TEXT])
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    enc = load_encoding(load_meta(folder), folder)
    assert enc.decode(enc.encode(TEXT)) == TEXT == enc.decode(read_bin(folder, "train")) and enc.eot is None
    assert Blocks(folder, "train", 8).vocab_size == len(chars)
    with pytest.raises(ValueError, match="characters .'€'. are not in"):
        enc.encode("€")


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("name, script, arguments", [
    ("stdlib", "prepare_stdlib.py", ""),
    ("openwebtext", "prepare_openwebtext.py", ""),
    ("mine", "prepare_openwebtext.py", " --out_dir data/mine FILES"),
])
def test_a_missing_file_names_the_command(tmp_path, monkeypatch, name, script, arguments, elsewhere):
    """The command works from where one is: in the scripts' folder, or in another one."""
    monkeypatch.chdir(tmp_path)
    if not elsewhere:
        monkeypatch.setattr(data, "__file__", str(tmp_path / "data.py"))
    path = os.path.relpath(os.path.join(ROOT, script)) if elsewhere else script
    assert not elsewhere or os.path.exists(path)
    command = re.escape(f"python {path}{arguments}")
    with pytest.raises(FileNotFoundError, match=f"{name}.train.bin is not there. make it with: {command}"):
        load_meta(f"data/{name}")
    os.makedirs(f"data/{name}")
    np.arange(100, dtype=np.uint16).tofile(f"data/{name}/train.bin")
    with pytest.raises(FileNotFoundError, match=f"val.bin is not there. make it with: {command}"):
        Blocks(f"data/{name}", "val", 8)

# -----------------------------------------------------------------------------
# Blocks


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "x", range(1000), range(100), vocab_size=1000)


def test_every_block_once_per_epoch(folder):
    T = 16
    blocks, orders, phases = Blocks(folder, "train", T, seed=3), [], []
    assert (blocks.num_blocks, blocks.num_fixed) == (61, 62)
    for epoch in range(20):
        x, y = blocks.batch(epoch * 61, 61)
        assert x.shape == y.shape == (61, T) and x.dtype == y.dtype == torch.int64
        assert torch.equal(y, x + 1) # the tokens are 0, 1, 2, ...
        phase = int(x.min())
        assert 0 <= phase < T
        assert sorted(x[:, 0].tolist()) == [phase + T * i for i in range(61)]
        phases.append(phase)
        orders.append([(int(t) - phase) // T for t in x[:, 0]])
    assert len(set(phases)) > 5 and orders[0] != orders[1] != sorted(orders[1])
    assert torch.equal(blocks.batch(0, 61)[0][:, 0], T * torch.tensor(orders[0]) + phases[0])


def test_the_order_is_a_function_of_seed_and_index(folder):
    ask = Blocks(folder, "train", 16, seed=3)
    single = {i: ask.batch(i, 1) for i in random.Random(0).sample(range(200), 200)} # across epochs, in any order
    for first, count in (0, 8), (56, 16), (0, 200):
        x, y = Blocks(folder, "train", 16, seed=3).batch(first, count)
        assert torch.equal(x, torch.cat([single[i][0] for i in range(first, first + count)]))
        assert torch.equal(y, torch.cat([single[i][1] for i in range(first, first + count)]))
    assert not torch.equal(Blocks(folder, "train", 16, seed=4).batch(0, 8)[0], ask.batch(0, 8)[0])
    # a change of these numbers is a change of everybody's data order
    assert ask.batch(0, 4)[0][:, 0].tolist() == [94, 686, 302, 286]


def test_ranks_get_different_blocks(folder):
    batch_size, world_size = 5, 3
    seen = []
    for step in range(4):
        for rank in range(world_size):
            first = (step * world_size + rank) * batch_size
            seen += Blocks(folder, "train", 16).batch(first, batch_size)[0][:, 0].tolist()
    assert len(set(seen)) == len(seen) == 60


def test_fixed_blocks_are_the_file_in_order(folder):
    blocks = Blocks(folder, "val", 16)
    x, y = blocks.fixed(0, blocks.num_fixed)
    assert x.flatten().tolist() == list(range(96)) and y.flatten().tolist() == list(range(1, 97))
    assert torch.equal(blocks.fixed(2, 3)[0], x[2:5])
    with pytest.raises(ValueError, match="blocks 5..6 were asked for, .*val.bin has 6"):
        blocks.fixed(5, 2)


@pytest.mark.parametrize("extra", range(40))
def test_blocks_fit_into_any_length(tmp_path, extra):
    folder = write_folder(tmp_path / "x", range(17 + extra))
    blocks = Blocks(folder, "train", 16)
    tokens = torch.cat([torch.stack(blocks.batch(i, 1)) for i in range(50)])
    assert tokens.max() <= 16 + extra # short reads would not stack


def test_an_id_beyond_the_vocabulary_is_refused(folder):
    with pytest.raises(ValueError, match="train.bin has id 990 at position 990, vocab_size is 990"):
        Blocks(folder, "train", 16, vocab_size=990).fixed(0, 62)
    with pytest.raises(ValueError, match="vocab_size is 500"):
        Blocks(folder, "train", 16, vocab_size=500).batch(0, 61)


def test_damaged_and_short_files_are_refused(tmp_path, folder):
    with pytest.raises(ValueError, match="val.bin has 100 tokens, fewer than block_size . 1 = 101"):
        Blocks(folder, "val", 100)
    assert Blocks(folder, "val", 99).batch(7, 1)[1][0, -1] == 99 # one block just fits
    with open(folder / "val.bin", "ab") as f:
        f.write(b"x")
    with pytest.raises(ValueError, match="val.bin is damaged: 201 bytes of uint16"):
        Blocks(folder, "val", 16)
    cut = write_folder(tmp_path / "cut", range(100), vocab_size=1000, train_tokens=110)
    with pytest.raises(ValueError, match="train.bin is damaged: 200 bytes of uint16, expected 110 tokens"):
        Blocks(cut, "train", 16)


def test_uint32_ids_are_read_as_such(tmp_path):
    folder = write_folder(tmp_path / "x", range(151_000, 151_100), dtype="uint32", vocab_size=151_936)
    assert Blocks(folder, "train", 16).fixed(1, 1)[0][0, 0] == 151_016
