"""
The data format: which folders and files are taken, which are refused and how, and in which order Blocks gives out the
tokens.

$ pytest tests/test_data.py
"""
import os
import pickle
import random
import re
import time

import numpy as np
import pytest
import torch
from helpers import ROOT, SETTINGS, refused

import data
from data import Blocks, load_encoding, load_meta

TEXT = ("The cat sat on the mat.\nIt's 3 o'clock, naïve café owners sing: ♪ 日本 🙂!\n\n"
        "\tdef f(x):\n\t\treturn x  # done   \n")


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
# damage


GOOD = {"vocab_size": 1000, "dtype": "uint16", "encoding": "gpt2", "eot": 3, "source": "test", "mask_id": None,
        "special_ids": [3, 4], "train_tokens": 100, "val_tokens": 50, "val_bytes": 200, "hash": None}


@pytest.mark.parametrize("change, message", [
    ({"vocab_size": "many"}, "says vocab_size 'many', it must be of type int"),
    ({"vocab_size": 10**12}, "says vocab_size 1000000000000, with uint16 it must be in 2..65536"),
    ({"vocab_size": 10**12, "dtype": "uint32"}, "says vocab_size 1000000000000, with uint32 it must"),
    ({"vocab_size": 10**30}, "says vocab_size 10{30}, it must be in 0..2..63-1"),
    ({"vocab_size": True}, "says vocab_size True"),
    ({"vocab_size": 0}, "says vocab_size 0"),
    ({"vocab_size": None}, "has no 'vocab_size', only"),
    ({"vocab_size": 5.0}, "says vocab_size 5.0"),
    ({"dtype": "float32"}, "says dtype 'float32', it must be 'uint16' or 'uint32'"),
    ({"dtype": ["uint16"]}, "says dtype .'uint16'., it must be of type str"),
    ({"dtype": "x" * 10**4}, "says dtype 'x{59}, it must"),
    ({"encoding": 7}, "says encoding 7"),
    ({"eot": 1000}, "says eot 1000, an id must be in 0..999"),
    ({"eot": "</s>"}, "says eot '</s>'"),
    ({"mask_id": -1}, "says mask_id -1"),
    ({"special_ids": "all"}, "says special_ids 'all'"),
    ({"special_ids": [1, "2"]}, "says special_ids '2', an id must be"),
    ({"special_ids": list(range(999))}, "says that 999 of 1000 ids are special"),
    ({"train_tokens": "100"}, "says train_tokens '100'"),
    ({"val_tokens": None}, "has no 'val_tokens'"),
    ({"hash": 5}, "says hash 5"),
    ({"encoding": "char"}, "has no 'stoi'"),
    ({"itos": ["a"]}, "says itos .'a'."),
])
def test_a_meta_pkl_that_cannot_be_meant_is_named(tmp_path, change, message):
    folder = write_folder(tmp_path / "x", range(100), range(50), **GOOD)
    assert load_meta(folder) == GOOD
    (folder / "meta.pkl").write_bytes(pickle.dumps({**GOOD, **change}))
    with pytest.raises(ValueError, match=f"x.meta.pkl {message}.*prepare the dataset again$") as e:
        Blocks(folder, "train", 8)
    assert "\n" not in str(e.value)


def test_what_meta_pkl_holds_besides_is_left_out(tmp_path):
    """config.json takes its values, and JSON has no bytes."""
    folder = write_folder(tmp_path / "x", range(100), **GOOD)
    (folder / "meta.pkl").write_bytes(pickle.dumps({**GOOD, "more": b"bytes", 5: {1, 2}}))
    assert load_meta(folder) == GOOD


def damaged(raw, rng):
    """Return raw cut off somewhere, or with a few bits turned over."""
    if rng.random() < 0.3:
        return raw[:rng.randrange(len(raw))]
    wrong = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        wrong[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(wrong)


@pytest.mark.parametrize("cases", [150, pytest.param(5_000, marks=pytest.mark.torture)])
def test_a_damaged_meta_pkl_is_one_line_or_makes_sense(tmp_path, cases):
    folder = write_folder(tmp_path / "x", range(100), range(50), **GOOD)
    raw, rng, refusals = (folder / "meta.pkl").read_bytes(), random.Random(3), 0
    for _ in range(cases):
        (folder / "meta.pkl").write_bytes(damaged(raw, rng))
        try:
            meta = load_meta(folder)
        except ValueError as e:
            assert "meta.pkl" in str(e) and "again" in str(e) and "\n" not in str(e)
            refusals += 1
        else:
            assert type(meta["vocab_size"]) is int and 2 <= meta["vocab_size"] <= 2**16
    assert refusals > cases / 3


def test_a_flipped_bit_is_found_where_reading_is_quick_and_by_the_command_always(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = write_folder(tmp_path / "x", range(1000), range(100), **{**GOOD, "train_tokens": 1000, "val_tokens": 100})
    meta = load_meta(folder)
    data.main(["x"])
    assert "without a hash" in capsys.readouterr().out
    content = {**meta, "hash": data.file_hash(folder)}
    (folder / "meta.pkl").write_bytes(pickle.dumps(content))
    data.main(["x"])
    assert "are what meta.pkl says" in capsys.readouterr().out
    data.check_hash(folder, content)
    for name in "train.bin", "val.bin":
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[:50] + bytes([raw[50] ^ 1]) + raw[51:]) # its size and ids are good
        message = "x/train.bin or .*x/val.bin was damaged or changed .*prepare the dataset again"
        with pytest.raises(ValueError, match=message):
            data.check_hash(folder, content)
        data.check_hash(folder, content, max_bytes=2199) # larger files are not read at the start of a run
        with pytest.raises(SystemExit, match=message):
            data.main(["x"])
        report = refused(**{**SETTINGS, "data_dir": ".", "dataset": "x"})
        assert "x/val.bin was damaged or changed" in report and "1 to fix" in report
        (folder / name).write_bytes(raw)
    for bad in ["nowhere"], ["x", "nowhere"]:
        with pytest.raises(SystemExit, match="nowhere/train.bin is not there"):
            data.main(bad)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.pkl"])
def test_a_folder_in_place_of_a_file(tmp_path, name):
    folder = write_folder(tmp_path / "x", range(100), range(50), **GOOD)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(OSError, match=name):
        Blocks(folder, "train", 8)
        Blocks(folder, "val", 8)

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


def test_a_file_that_shrinks_or_goes_while_it_is_read(folder):
    blocks = Blocks(folder, "train", 16)
    blocks.batch(0, 61)
    os.truncate(folder / "train.bin", 1000)
    with pytest.raises(ValueError, match="train.bin has become shorter, 500 tokens: position .* is gone"):
        blocks.batch(0, 61)
    (folder / "train.bin").unlink()
    with pytest.raises(FileNotFoundError, match="train.bin"):
        blocks.batch(0, 61)


@pytest.mark.parametrize("block_size", [0, -1, 10**20])
def test_a_block_size_that_cannot_be(folder, block_size):
    with pytest.raises(ValueError, match="block_size"):
        Blocks(folder, "train", block_size)


def test_ids_that_are_none_make_no_tokenizer():
    ranks = {bytes([b]): b for b in range(256)}
    for wrong in -1, 2**24, 10**30:
        with pytest.raises(ValueError, match=f"a token has the id {wrong}, ids must be in 0..16777215"):
            data.own_encoding({**ranks, b"ab": wrong})
    with pytest.raises(ValueError, match="has the id 'x'"):
        data.own_encoding(ranks, special_tokens={data.EOT: "x"})


def test_uint32_ids_are_read_as_such(tmp_path):
    folder = write_folder(tmp_path / "x", range(151_000, 151_100), dtype="uint32", vocab_size=151_936)
    assert Blocks(folder, "train", 16).fixed(1, 1)[0][0, 0] == 151_016
