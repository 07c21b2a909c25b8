"""
The prepare scripts: what they write is what the text says, even after a kill. The tests need no network and no real
corpus.

$ pytest tests/test_prepare.py
"""
import base64
import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT

import data
import prepare_openwebtext
import prepare_stdlib
from data import EOT, load_encoding, load_meta

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
