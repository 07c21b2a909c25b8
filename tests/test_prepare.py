"""
The prepare scripts: what they write is what the text says, and the same bytes come out after any harm: a kill -9 at any
file operation, a full disk, a damaged shard. The tests need no network and no real corpus.

$ pytest tests/test_prepare.py
$ pytest tests/test_prepare.py -m torture   # kills at every file operation and at random moments, disks of many sizes
"""
import base64
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
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


def test_killed_and_run_again_gives_the_same_bytes(tmp_path, ranks_file, capsys):
    source = write_jsonl(tmp_path / "texts.jsonl", documents(300))
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
    assert 0 < len(shards) < 300 and not (out / "train.bin").exists()

    # another run's shards do not get in the way, and are not taken
    other = [*args[:3], "--val_fraction", 0.1, "--docs", 100, "--out_dir", out, "--num_proc", 1]
    prepare(*other)
    assert load_meta(out)["train_docs"] + load_meta(out)["val_docs"] == 100
    assert set(shards) <= {path.name for path in out.glob("shards-*/*.bin")}

    with pytest.raises(SystemExit, match="killed holds a dataset: .*--overwrite"):
        prepare(*args, "--out_dir", out)
    capsys.readouterr()
    prepare(*args, "--out_dir", out, "--num_proc", 1, "--overwrite")
    finished = int(capsys.readouterr().out.split("continuing: ")[1].split()[0])
    assert len(shards) <= finished < 300 # a worker may have finished its last one after the kill
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

# -----------------------------------------------------------------------------
# harm: kills, full disks, damaged shards


# Every Python of a command imports a sitecustomize.py, its workers too. This one counts the operations on files that a
# pattern matches, in all of these processes together, and kills at one of them, before it is done.
KILLER = """
import os, re, signal, sys

pattern, at, whom = os.environ["KILL_AT"].split("|")
count = os.open(os.path.join(os.path.dirname(__file__), "count"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def hook(event, args):
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "shutil.rmtree") \\
            and re.search(pattern, f"{event} {args[0]}"):
        os.write(count, b".")
        if os.fstat(count).st_size == int(at):
            os.kill(0 if whom == "all" else os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
"""


@pytest.fixture
def corpus(tmp_path, ranks_file, monkeypatch):
    """
    The arguments for 10 shards of some 10 kB and, in out/, an older dataset of other documents. Nothing is compiled
    to disk, as a full one could leave half of a *.pyc.
    """
    source = write_jsonl(tmp_path / "texts.jsonl", documents(1500))
    other = write_jsonl(tmp_path / "older.jsonl", documents(60)[30:])
    args = ["--ranks", ranks_file, "--val_fraction", 0.1, "--shard_mb", 0.005, "--num_proc", 1]
    prepare(other, *args, "--out_dir", tmp_path / "out")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return [source, *args, "--overwrite"]


def whole(folder, args, *more):
    """The bytes that an undisturbed run gives. It also leaves the documents in the cache."""
    prepare(*args, *more, "--out_dir", folder)
    return file_bytes(folder)


def kill_at(folder, pattern, at=1, whom="all"):
    """The environment of a command that is killed at the at-th operation on files that the pattern matches."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(KILLER)
    (folder / "count").unlink(missing_ok=True)
    return {"PYTHONPATH": str(folder), "KILL_AT": f"{pattern}|{at}|{whom}"}


def started(tmp_path, args, env=()):
    """Start the script, with the cache of these tests, in a session of its own, so that a kill reaches the workers."""
    command = [sys.executable, os.path.join(ROOT, "prepare_openwebtext.py"), *map(str, args)]
    env = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), **dict(env)}
    return subprocess.Popen(command, cwd=tmp_path, env=env, start_new_session=True, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def is_a_dataset_or_none(folder):
    """Whether a folder holds one that its meta.pkl describes, or none that could be taken for one."""
    if (folder / "train.bin").exists():
        assert data.file_hash(folder) == load_meta(folder)["hash"]
    return True


@pytest.mark.parametrize("split", ["random", "tail"])
@pytest.mark.parametrize("at", [
    r"os.rename .*000003-.*tmp$", # a shard is written, but not there
    r"open .*000004-\d+-\d+\.bin$", # train.bin is half written
    r"os.rename .*val\.bin\.tmp$", # all is written, nothing there
    r"os.rename .*train\.bin\.tmp$", # all but train.bin is there
])
def test_killed_at_a_chosen_moment(tmp_path, corpus, at, split):
    if split == "tail" and "000003" in at:
        pytest.skip("a shard does not know of the split")
    expected = whole(tmp_path / "whole", corpus, "--split", split)
    args = [*corpus, "--split", split, "--out_dir", tmp_path / "out"]
    process = started(tmp_path, args, kill_at(tmp_path / "killer", at))
    _, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, err
    assert list((tmp_path / "out").rglob("*.tmp")) and is_a_dataset_or_none(tmp_path / "out")
    prepare(*args)
    assert file_bytes(tmp_path / "out") == expected


def test_a_killed_worker_is_one_line(tmp_path, corpus):
    expected = whole(tmp_path / "whole", corpus)
    args, before = [*corpus, "--out_dir", tmp_path / "out"], file_bytes(tmp_path / "out")
    process = started(tmp_path, args, kill_at(tmp_path / "killer", "os.rename .*000003-.*tmp$", whom="itself"))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in err, (process.returncode, err)
    assert re.fullmatch("a worker was killed, .*--num_proc.* 3 finished shards are intact in .*: "
                        "the same command continues from there", err.splitlines()[-1]), err
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before
    prepare(*args)
    assert file_bytes(tmp_path / "out") == expected


@contextlib.contextmanager
def files_of_at_most(num_bytes):
    """A full disk, as the kernel shows it to this process and its workers: a file takes so many bytes and no more."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def left(folder):
    """The files below a folder, by name: none is temporary."""
    names = [path.name for path in folder.rglob("*") if path.is_file()]
    assert not [name for name in names if "tmp" in name]
    return sorted(names)


@pytest.mark.parametrize("split", ["random", "tail"])
def test_a_full_disk_loses_nothing(tmp_path, corpus, split):
    out, args = tmp_path / "out", [*corpus, "--split", split]
    expected, before = whole(tmp_path / "whole", args), file_bytes(tmp_path / "out")
    # C's stdio, through which ndarray.tofile goes, writes the bytes after the last multiple of 4,096 when it closes
    with files_of_at_most(8192), pytest.raises(SystemExit, match="^cannot write to .*shards-.*File too large") as e:
        prepare(*args, "--out_dir", out)
    assert "\n" not in e.value.code and "same command" in e.value.code
    assert set(left(out)) >= set(before) and not [name for name in left(out) if name.startswith("000000")]

    for size in 65536, len(expected["train.bin"]) - 1: # the shards are there, the bins are half written
        with files_of_at_most(size), pytest.raises(SystemExit, match="^cannot write to .*out: .*File too large") as e:
            prepare(*args, "--out_dir", out)
        assert "the dataset in it is as it was. 10 finished shards are intact in" in e.value.code
        assert "\n" not in e.value.code and len(left(out)) == 10 + len(before)
        assert {name: (out / name).read_bytes() for name in before} == before
    prepare(*args, "--out_dir", out)
    assert file_bytes(out) == expected


@pytest.mark.parametrize("split", ["random", "tail"])
def test_damaged_shards_are_made_again(tmp_path, corpus, capsys, split):
    expected = whole(tmp_path / "whole", corpus, "--split", split)
    out, args = tmp_path / "out", [*corpus, "--split", split, "--out_dir", tmp_path / "out"]
    with pytest.raises(SystemExit, match="val split is empty, .*the shards are kept"):
        prepare(*args, "--val_fraction", 0)
    first, second, third, *_ = sorted(out.glob("shards-*/*.bin"))
    first.write_bytes(first.read_bytes()[:-288])
    second.write_bytes(second.read_bytes() + b"\1\0")
    third.write_bytes(b"")
    prepare(*args)
    assert capsys.readouterr().out.count(" is damaged, ") == 3
    assert file_bytes(out) == expected


def test_a_run_whose_shards_are_all_finished_goes_on(tmp_path, corpus):
    expected = whole(tmp_path / "whole", corpus, "--split", "tail")
    with pytest.raises(SystemExit, match="or use --split tail.*the shards are kept for it"):
        prepare(*corpus, "--val_fraction", 0, "--out_dir", tmp_path / "out")
    prepare(*corpus, "--split", "tail", "--out_dir", tmp_path / "out")
    assert file_bytes(tmp_path / "out") == expected


def test_a_shard_that_cannot_be_read_is_not_left_out(tmp_path, corpus, monkeypatch):
    read = np.fromfile
    with monkeypatch.context() as m:
        m.setattr(np, "fromfile", lambda path, dtype: read(path, dtype)[:-1]) # what a broken disk gives
        with pytest.raises(SystemExit, match=r"000000-\d+-(\d+).bin gave \d+ of its \1 tokens. .* finished shards"):
            prepare(*corpus, "--out_dir", tmp_path / "out")
    assert load_meta(tmp_path / "out")["train_docs"] < 30 # still the older one


@pytest.mark.parametrize("out", ["a_file", "a_file/x", "locked/x"])
def test_a_folder_that_cannot_be_written_is_known_at_once(tmp_path, ranks_file, monkeypatch, out):
    (tmp_path / "a_file").write_text("mine")
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0o500)
    if out == "locked/x" and os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("root may write anywhere")
    monkeypatch.setattr(prepare_openwebtext, "load_documents", lambda *args: pytest.fail("nothing may be read yet"))
    with pytest.raises(SystemExit, match=f"^cannot write to .*{out}: .*nothing was changed: .*--out_dir$"):
        prepare(write_jsonl(tmp_path / "texts.jsonl", documents(20)), "--ranks", ranks_file,
                "--out_dir", tmp_path / out)
    assert (tmp_path / "a_file").read_text() == "mine"


def test_a_full_disk_leaves_the_older_stdlib_as_it_was(tmp_path):
    (tmp_path / "library").mkdir()
    for i, text in enumerate(documents(40)):
        (tmp_path / "library" / f"module{i}.py").write_text(f"# {text}\n{TEXT}" * 3, encoding="utf-8")
    args = ["--src", str(tmp_path / "library"), "--out_dir", str(tmp_path / "out"), "--val_fraction", "0.2"]
    with files_of_at_most(4096), pytest.raises(SystemExit, match="^cannot write to .*it holds no dataset.*--out_dir"):
        prepare_stdlib.main([*args, "--vocab_size", "300"])
    assert left(tmp_path / "out") == []
    prepare_stdlib.main([*args, "--vocab_size", "300"])
    before = file_bytes(tmp_path / "out")
    with files_of_at_most(4096), pytest.raises(SystemExit, match="File too large.*the dataset in it is as it was"):
        prepare_stdlib.main([*args, "--vocab_size", "280"])
    assert file_bytes(tmp_path / "out") == before
    with pytest.raises(SystemExit, match="cannot write to .*module1.py: .*exists"):
        prepare_stdlib.main([*args[:2], "--out_dir", str(tmp_path / "library" / "module1.py"), "--vocab_size", "300",
                             "--val_fraction", "0.2"])


def test_replacing_is_all_or_nothing(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for path in one, two:
        path.write_bytes(b"old")

    def contents():
        assert sorted(os.listdir(tmp_path)) == ["one", "two"]
        return one.read_bytes(), two.read_bytes()

    with pytest.raises(KeyboardInterrupt), data.replacing(one, two) as files:
        files[0].write(b"new")
        raise KeyboardInterrupt
    with files_of_at_most(100), pytest.raises(OSError, match="too large"), data.replacing(one, two) as files:
        files[0].write(b"new")
        files[1].write(b"x" * 101) # stays in the buffer until the end
    assert contents() == (b"old", b"old")
    with data.replacing(one, two) as files:
        for f in files:
            f.write(b"new")
        assert (one.read_bytes(), two.read_bytes()) == (b"old", b"old")
    assert contents() == (b"new", b"new")
    if os.path.exists("/dev/full"): # a device that is always full
        (tmp_path / "one.tmp").symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left"), data.replacing(one) as (f,):
            f.write(b"newer")
        assert contents() == (b"new", b"new")

# -----------------------------------------------------------------------------
# shards, and the datasets that have a name


def in_shards(folder, split):
    """The tokens of a split's shards, read as llm.c reads them, and how many each has."""
    tokens = []
    for path in sorted(folder.glob(f"{split}_*.bin")):
        raw = path.read_bytes()
        magic, version, count = struct.unpack("<3i", raw[:12])
        assert (magic, version) == (20240520, 1) and raw[12:1024] == bytes(1012) and len(raw) == 1024 + 2 * count
        tokens.append(raw[1024:])
    return b"".join(tokens), [len(part) // 2 for part in tokens]


def test_shards_hold_what_the_bins_hold_and_take_their_place(tmp_path, corpus, capsys):
    expected, out = whole(tmp_path / "whole", corpus), tmp_path / "out"
    meta = load_meta(tmp_path / "whole")
    for size in 7000, 2**31 - 1: # each replaces what is there, the first one an older train.bin
        prepare(*corpus, "--shard_tokens", size, "--out_dir", out)
        for split in "train", "val":
            tokens, counts = in_shards(out, split)
            assert tokens == expected[f"{split}.bin"]
            assert counts[:-1] == [size] * (len(counts) - 1) and 0 < counts[-1] <= size
        assert load_meta(out) == meta and data.file_hash(out) == meta["hash"]
        names = {path.name for path in out.iterdir()} - {"meta.pkl", "tokenizer.tiktoken"}
        assert all(re.fullmatch(r"(train|val)_\d{6}.bin", name) for name in names)
        assert f"{len(names)} shards" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="out holds a dataset: .*--overwrite"):
        prepare(*corpus[:-1], "--out_dir", out)
    prepare(*corpus, "--out_dir", out)
    assert file_bytes(out) == expected


@pytest.mark.parametrize("at", [
    r"os.remove .*out.train_000001\.bin$", # some of the older ones are gone
    r"os.rename .*out.train_000001\.bin\.tmp$", # some have their names
    r"os.rename .*meta\.pkl\.tmp$", # all but meta.pkl is there
])
def test_killed_while_shards_are_written(tmp_path, corpus, at):
    args, out = [*corpus, "--shard_tokens", 20_000, "--out_dir", tmp_path / "out"], tmp_path / "out"
    prepare(*args[1:], write_jsonl(tmp_path / "other.jsonl", documents(1600)[700:])) # an older dataset, in shards too
    older, expected = load_meta(out)["hash"], whole(tmp_path / "whole", corpus)
    process = started(tmp_path, args, kill_at(tmp_path / "killer", at))
    _, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, err
    try:
        assert load_meta(out)["hash"] == older == data.file_hash(out)
    except (FileNotFoundError, ValueError, AssertionError):
        with pytest.raises((FileNotFoundError, ValueError), match="prepare the dataset again|is not there"):
            data.Blocks(out, "train", 8)
        args.remove("--overwrite") # nobody has to say that nothing is there
        if (out / "meta.pkl").exists():
            args.append("--overwrite")
    prepare(*args)
    assert in_shards(out, "train")[0] == expected["train.bin"] and data.file_hash(out) == load_meta(out)["hash"]
    assert not list(out.glob("*.tmp")) and not list(out.glob("shards-*"))


def test_a_full_disk_leaves_the_older_dataset_and_no_shard(tmp_path, corpus):
    out, before = tmp_path / "out", file_bytes(tmp_path / "out")
    with files_of_at_most(65536), pytest.raises(SystemExit, match="File too large.*the dataset in it is as it was"):
        prepare(*corpus, "--shard_tokens", 10**6, "--out_dir", out)
    assert {name: (out / name).read_bytes() for name in before} == before
    assert not list(out.glob("*_000000.bin")) and not list(out.glob("*.tmp"))


def test_shards_that_cannot_be_are_refused(tmp_path, ranks_file):
    source = write_jsonl(tmp_path / "texts.jsonl", documents(20))
    with pytest.raises(SystemExit, match="--shard_tokens -1 must be below 2.31"):
        prepare(source, "--shard_tokens", -1)
    tokens = [bytes([b]) for b in range(256)] + [b"%06d" % i for i in range(2**16)]
    ranks = write_ranks(tmp_path / "large.tiktoken", tokens)
    with pytest.raises(SystemExit, match="shards hold uint16, which does not do for 65793 tokens"):
        prepare(source, "--ranks", ranks, "--shard_tokens", 1000, "--out_dir", tmp_path / "out", "--num_proc", 1)
    with pytest.raises(SystemExit):
        prepare(source, "--dataset", "fineweb2")


@pytest.mark.parametrize("args, pattern, folder", [
    ([], "hf://datasets/Skylion007/openwebtext@refs%2Fpr%2F20/data/*.parquet", "openwebtext"),
    (["--dataset", "fineweb"], "hf://datasets/HuggingFaceFW/fineweb@main/sample/10BT/*.parquet", "fineweb"),
    (["--dataset", "fineweb-edu", "--data_files", "sample/100BT/*.parquet"],
     "hf://datasets/HuggingFaceFW/fineweb-edu@main/sample/100BT/*.parquet", "fineweb-edu"),
    (["--id", "me/mine", "--revision", "main"], "hf://datasets/me/mine@main/data/*.parquet", "mine"),
])
def test_datasets_with_a_name(tmp_path, ranks_file, monkeypatch, args, pattern, folder):
    import datasets
    asked, load = [], datasets.load_dataset
    monkeypatch.chdir(tmp_path)
    local = tmp_path / "000_00000.parquet" # FineWeb's name, and more columns
    datasets.Dataset.from_dict({"text": documents(30), "id": list(range(30)), "dump": ["x"] * 30}).to_parquet(local)

    def of_the_hub(builder, data_files, **options):
        asked.append((builder, data_files))
        return load("parquet", data_files=[str(local)], **options)

    common = [*args, "--ranks", ranks_file, "--val_fraction", 0.3, "--num_proc", 1]
    with monkeypatch.context() as m:
        m.setattr(datasets, "load_dataset", of_the_hub)
        m.setattr(prepare_openwebtext, "hub_answers", lambda: True)
        prepare(*common)
    assert asked == [("parquet", pattern)]
    of_hub = file_bytes(tmp_path / "data" / folder)
    if "--dataset" in args: # its files, downloaded before
        shutil.rmtree(tmp_path / "data")
        prepare(local, *common)
        assert load_meta(tmp_path / "data" / folder)["source"].startswith(f"{folder}: 000_00000.parquet; split")
        assert file_bytes(tmp_path / "data" / folder)["train.bin"] == of_hub["train.bin"]

# -----------------------------------------------------------------------------
# tortures


@pytest.mark.torture
@pytest.mark.parametrize("split", ["random", "tail"])
def test_killed_at_every_file_operation(tmp_path, corpus, split):
    """A run is killed at its first operation below out/, the next at its second, and so on, until one gets through."""
    args = [*corpus, "--split", split, "--shard_mb", 0.02]
    expected = whole(tmp_path / "whole", args)
    out, older = tmp_path / "out", tmp_path / "older"
    shutil.copytree(out, older)
    args, code, at = [*args, "--out_dir", out], None, 0
    while code != 0:
        at += 1
        shutil.rmtree(out)
        shutil.copytree(older, out)
        process = started(tmp_path, args, kill_at(tmp_path / "killer", f" {out}", at))
        _, err = process.communicate(timeout=120)
        code = process.returncode
        assert code in (0, -signal.SIGKILL) and is_a_dataset_or_none(out), (at, err)
        prepare(*args)
        assert file_bytes(out) == expected, at
    assert at > 20


@pytest.mark.torture
def test_killed_at_random_moments(tmp_path, corpus):
    """Twelve times over: kill at random until a run gets through, the parent alone or the workers with it."""
    expected, rng = whole(tmp_path / "whole", corpus), random.Random(2)
    out, args = tmp_path / "out", [*corpus, "--num_proc", 2, "--out_dir", tmp_path / "out"]
    for _ in range(12):
        for _ in range(rng.randint(1, 3)):
            process = started(tmp_path, args)
            time.sleep(rng.uniform(0.8, 3.5))
            if rng.random() < 0.5:
                process.kill()
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=120)
            assert is_a_dataset_or_none(out)
        prepare(*args)
        assert file_bytes(out) == expected


@pytest.mark.torture
@pytest.mark.parametrize("split", ["random", "tail"])
def test_disks_of_many_sizes(tmp_path, corpus, split):
    """A file system in memory, of a size at which each part of the work meets its end."""
    expected = whole(tmp_path / "whole", corpus, "--split", split)
    mount = tmp_path / "mount"
    mount.mkdir()
    # in a name space of its own, so that nobody else sees it and it goes with the last process
    space = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o size=$0k none {mount} && exec sh -c "$1"']
    if shutil.which("unshare") is None or subprocess.run([*space, "4", "true"], check=False).returncode:
        pytest.skip("only root may mount a disk")
    script = os.path.join(ROOT, "prepare_openwebtext.py")
    command = " ".join(map(str, [sys.executable, script, *corpus, "--split", split, "--out_dir", mount / "out"]))
    env = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    total, sizes = sum(map(len, expected.values())), range(8, 400, 40)
    codes = []
    for size in sizes:
        again = (f"{command}; echo first $?; find {mount} -name '*.tmp'; mount -o remount,size=100m {mount}; "
                 f"{command} && cp -r {mount}/out {tmp_path}/{size}")
        run = subprocess.run([*space, str(size), again], env=env, capture_output=True, text=True, check=False)
        assert run.returncode == 0 and "Traceback" not in run.stderr and ".tmp" not in run.stdout, run.stderr
        assert file_bytes(tmp_path / str(size)) == expected, size
        code = run.stdout.split("first ")[1].split()[0]
        codes.append(code)
        assert (code == "0") == ("No space left on device" not in run.stderr), run.stderr
    assert codes[0] == "1" and codes[-1] == "0" and 2 * total < 400e3
