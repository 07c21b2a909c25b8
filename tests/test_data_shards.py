"""
The shards of llm.c and modded-nanogpt: many files give what one gives, in the same order, and bad ones are named.

$ pytest tests/test_data_shards.py
"""
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from helpers import SETTINGS, assert_same_training, refused, train

import data
import data_shards
from data import Blocks, load_meta


def write_shard(path, ids, magic=20240520, version=1, count=None):
    """A shard as its description has it, by struct: 256 int32 and uint16."""
    count = len(ids) if count is None else count
    path.write_bytes(struct.pack("<256i", magic, version, count, *[0] * 253) + struct.pack(f"<{len(ids)}H", *ids))
    return path


def cut(ids, pieces, seed=0):
    """The ids in so many pieces of any size; some are shorter than a block, and one has nothing."""
    ends = sorted(np.random.default_rng(seed).integers(0, len(ids), pieces - 2))
    ends = [0, *ends[:2], ends[1], *ends[2:], len(ids)]
    return [ids[a:b] for a, b in zip(ends, ends[1:])]


def write_folder(folder, train, val, pieces=100, **meta):
    """As modded-nanogpt names them: the first file is the validation split."""
    folder.mkdir()
    write_shard(folder / "fineweb_val_000000.bin", val)
    for i, ids in enumerate(cut(train, pieces), 1):
        write_shard(folder / f"fineweb_train_{i:06d}.bin", ids)
    if meta:
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "x", list(range(6000)), list(range(500)))


def test_a_hundred_files_give_the_batches_of_one(tmp_path, folder):
    assert len(os.listdir(folder)) == 101
    whole = tmp_path / "whole"
    whole.mkdir()
    np.arange(6000, dtype=np.uint16).tofile(whole / "train.bin")
    np.arange(500, dtype=np.uint16).tofile(whole / "val.bin")
    for T in 16, 500: # a block of 500 lies in many files
        one, many = (Blocks(x, "train", T, seed=3) for x in (whole, folder))
        assert (one.num_blocks, one.num_phases, one.num_fixed) == (many.num_blocks, many.num_phases, many.num_fixed)
        for first, count in (0, 20), (one.num_blocks - 2, 4), (12345, 3):
            x, y = many.batch(first, count)
            assert torch.equal(x, one.batch(first, count)[0]) and torch.equal(y, x + 1) and y.dtype == torch.int64
        assert torch.equal(torch.cat(many.fixed(0, one.num_fixed)), torch.cat(one.fixed(0, one.num_fixed)))
    assert Blocks(folder, "val", 16).fixed(30, 1)[1].tolist() == [list(range(481, 497))]
    assert data.file_hash(folder) == data.file_hash(whole)
    meta = load_meta(folder)
    assert (meta["vocab_size"], meta["encoding"], meta["eot"]) == (50257, "gpt2", 50256)
    assert "no meta.pkl: assumed to be GPT-2 tokens" in meta["source"]


@pytest.mark.parametrize("change, message", [
    (dict(magic=7), "train_000042.bin is no shard of uint16 tokens: it begins with 7, it must be 20240520.*take it"),
    (dict(version=2), "train_000042.bin is a shard of version 2, .* it must be 1"),
    (dict(count=99), r"42.bin is damaged: its header says 99 tokens, .* 1,222 bytes, it has 1,424. download"),
    (dict(count=201), "its header says 201 tokens, .* 1,426 bytes, it has 1,424"),
    (dict(count=-1), "its header says -1 tokens"),
])
def test_a_shard_that_is_none_is_named(folder, change, message):
    write_shard(folder / "fineweb_train_000042.bin", range(200), **change)
    with pytest.raises(ValueError, match=message) as e:
        Blocks(folder, "train", 16)
    assert "\n" not in str(e.value)
    Blocks(folder, "val", 16)


@pytest.mark.parametrize("size", [0, 5, 1023, 1025, 1423])
def test_a_truncated_one_of_a_hundred_is_named(folder, size):
    path = write_shard(folder / "fineweb_train_000042.bin", range(200))
    blocks = Blocks(folder, "train", 16)
    os.truncate(path, size)
    with pytest.raises(ValueError, match=f"train_000042.bin is damaged: .*{size:,}.* download or prepare it again"):
        Blocks(folder, "train", 16)
    with pytest.raises(ValueError, match=r"train_000042.bin has become shorter, \d+ tokens: position 199 is gone"):
        blocks.fixed(0, blocks.num_fixed)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="train_000042.bin"):
        blocks.fixed(0, blocks.num_fixed)


def test_an_id_beyond_the_vocabulary_is_named_with_its_file(folder):
    count = os.path.getsize(folder / "fineweb_train_000001.bin") // 2 - 512
    with pytest.raises(ValueError, match=f"fineweb_train_00000[2-9].bin has id {count + 5} at position 5"):
        Blocks(folder, "train", count + 1, vocab_size=count + 5).fixed(0, 2)


def test_which_files_are_which(tmp_path, folder):
    os.rename(folder / "fineweb_val_000000.bin", folder / "interval_train_9.bin") # "train" counts before "val"
    assert len(data_shards.shards(folder, "train")) == 101
    with pytest.raises(FileNotFoundError, match=r"x/\*val\*.bin is not there. make it with"):
        Blocks(folder, "val", 16)
    (folder / "meta.pkl").write_bytes(pickle.dumps(dict(vocab_size=70000, dtype="uint32", encoding="gpt2", source="")))
    with pytest.raises(ValueError, match="x/fineweb_train_000001.bin and 100 more hold uint16, meta.pkl says uint32"):
        Blocks(folder, "train", 16)
    with pytest.raises(ValueError, match="fineweb_val_000000.bin has 500 tokens, fewer than block_size"):
        Blocks(write_folder(tmp_path / "y", range(900), range(500)), "val", 500)
    np.arange(99, dtype=np.uint16).tofile(folder / "train.bin") # beside it nothing else counts
    assert data_shards.token_files(folder, "train") == [str(folder / "train.bin")]


def test_what_is_too_large_is_not_read_at_the_start(tmp_path, monkeypatch):
    """The file is sparse: only its header lies on the disk."""
    folder = write_folder(tmp_path / "x", range(100), range(100), pieces=4)
    path = write_shard(folder / "fineweb_train_000009.bin", [], count=10**9)
    os.truncate(path, 1024 + 2 * 10**9)
    meta = dict(vocab_size=1000, dtype="uint16", encoding="gpt2", source="", hash="0" * 64, train_tokens=10**9 + 100)
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    monkeypatch.setattr(data_shards.Stream, "hash", lambda self: pytest.fail("all of it is read"))
    blocks = Blocks(folder, "train", 1024)
    data.check_hash(folder, load_meta(folder))
    assert blocks.num_tokens == 10**9 + 100 and blocks.batch(0, 2)[0].sum() == 0
    meta["train_tokens"] += 1
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(ValueError, match="000001.bin and 4 more is damaged: 2000000200 bytes of uint16, expected 1"):
        Blocks(folder, "train", 16)


def test_the_hash_of_shards_is_that_of_their_tokens(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = write_folder(tmp_path / "x", range(1000), range(100), pieces=7)
    meta = dict(vocab_size=1000, dtype="uint16", encoding="gpt2", source="", hash=data.file_hash(folder))
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    data.main(["x"])
    assert "x: its tokens are what meta.pkl says" in capsys.readouterr().out
    path = folder / "fineweb_train_000004.bin"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(SystemExit, match="one of the 8 shards in x was damaged or changed"):
        data.main(["x"])


def test_training_on_shards_is_training_on_one_file(here):
    """Also when it is resumed; and a shard more is other data."""
    with open("data/tiny/meta.pkl", "rb") as f:
        meta = pickle.load(f)
    ids, val = (np.fromfile(f"data/tiny/{split}.bin", np.uint16).tolist() for split in ("train", "val"))
    with_meta = write_folder(here / "shards", ids, val, pieces=20, **meta)
    short = dict(max_iters=6, lr_decay_iters=6, eval_interval=3)
    train(**short, out_dir="one")
    train(**short, out_dir="many", data_dir=".", dataset="shards")
    assert_same_training("one", "many")
    os.unlink(with_meta / "meta.pkl") # the ids are GPT-2's now
    out, _ = train(**{**short, "max_iters": 3}, eval_iters=1, out_dir="foreign", data_dir=".", dataset="shards")
    assert "6,000 training tokens, vocab_size 50,257 (no meta.pkl: assumed to be GPT-2 tokens" in out
    resume = dict(init_from="resume", max_iters=4, out_dir="foreign")
    write_shard(with_meta / "fineweb_train_000021.bin", ids[:50])
    assert "cannot resume foreign: the data are others" in refused(**resume)
    os.unlink(with_meta / "fineweb_train_000021.bin")
    train(**{**short, **resume}, data_dir=".", dataset="shards")


def test_what_is_wrong_with_shards_is_in_the_report_of_a_run(here):
    folder = write_folder(here / "bad", list(range(900)), list(range(100)), pieces=4)
    write_shard(folder / "fineweb_train_000002.bin", [1, 2, 3], version=9)
    report = refused(**{**SETTINGS, "data_dir": ".", "dataset": "bad"})
    assert "1 to fix" in report and "bad/fineweb_train_000002.bin is a shard of version 9" in report
