"""
The images: every reader on files in the original formats, every refusal, the order of batches, and each augmentation
against an oracle. The tests need no network, and no real data but scikit-learn's digits.

$ pytest tests/test_data_vision.py
"""
import colorsys
import os
import pickle
import random
import socket
import struct
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import flags, refused, run_script
from image_files import TEST, TRAIN, cifar_arrays, idx, images, labels, records, write, write_mnist

import data
import data_vision
from data_vision import AUGMENTATIONS, STATS, Batches, augment, draw, load, split


def params(**values):
    """The parameters of augment() for one image."""
    return {name: torch.tensor([value]) for name, value in values.items()}

# -----------------------------------------------------------------------------
# files in the original formats


def batch(x, y, num_classes):
    """Pickle a batch as the python version of CIFAR has it."""
    if num_classes == 10:
        fine = {b"labels": y.tolist()}
    else:
        fine = {b"fine_labels": y.tolist(), b"coarse_labels": [0] * len(y)}
    columns = {b"batch_label": b"batch 1", b"data": x.reshape(len(x), 3072), **fine, b"filenames": [b"a.png"] * len(y)}
    return pickle.dumps(columns, protocol=2)


def python2_batch(x, y):
    """Pickle a batch as python 2 did, opcode by opcode: strings of bytes, and numpy's old names."""
    def string(b):
        return b"T" + struct.pack("<I", len(b)) + b # BINSTRING

    def integer(n):
        return b"J" + struct.pack("<i", n) # BININT

    dtype = b"cnumpy\ndtype\n" + string(b"u1") + integer(0) + integer(1) + b"\x87R"
    dtype += b"(" + integer(3) + string(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + integer(0) + b"\x85" + string(b"b") + b"\x87R"
    array += b"(" + integer(1) + integer(len(x)) + integer(3072) + b"\x86" + dtype
    array += b"\x89" + string(x.tobytes()) + b"tb"
    numbers = b"".join(integer(int(n)) for n in y)
    return b"\x80\x02}(" + string(b"data") + array + string(b"labels") + b"](" + numbers + b"eu."


def same(found, arrays):
    for tensor, a in zip((found.train_x, found.train_y, found.test_x, found.test_y), arrays):
        assert tensor.dtype == (torch.uint8 if a.ndim == 4 else torch.int64)
        assert np.array_equal(tensor.numpy(), a)
    return True


@pytest.mark.parametrize("ending, dot", [("", False), (".gz", False), ("", True), (".gz", True)])
def test_mnist_files(tmp_path, ending, dot):
    arrays = write_mnist(tmp_path, ending=ending, dot=dot)
    found = load("mnist", str(tmp_path))
    assert same(found, arrays) and found.num_classes == 10 and "mnist" in found.source and len(found.hash) == 16


def test_mixed_names(tmp_path):
    arrays = write_mnist(tmp_path)
    folder = tmp_path / "mnist"
    (folder / TRAIN[0]).rename(folder / "train-images.idx3-ubyte") # its labels keep their name
    write(folder / f"{TEST[1]}.gz", (folder / TEST[1]).read_bytes())
    (folder / TEST[1]).unlink()
    assert same(load("mnist", str(tmp_path)), arrays)


@pytest.mark.parametrize("num_classes, folder", [
    (10, "cifar10"), (10, "cifar-10-batches-bin"), (100, "cifar100"), (100, "cifar-100-binary")])
def test_cifar_binary(tmp_path, num_classes, folder):
    arrays = cifar_arrays(num_classes)
    x, y, test_x, test_y = arrays
    if num_classes == 10:
        parts, test = {"data_batch_1.bin": slice(0, 5), "data_batch_2.bin": slice(5, 20)}, "test_batch.bin"
    else:
        parts, test = {"train.bin": slice(None)}, "test.bin"
    for name, rows in parts.items():
        write(tmp_path / folder / name, records(x[rows], y[rows], num_classes))
    write(tmp_path / folder / test, records(test_x, test_y, num_classes))
    found = load(f"cifar{num_classes}", str(tmp_path))
    assert same(found, arrays) and found.num_classes == num_classes
    assert all(name in found.source for name in parts)


@pytest.mark.parametrize("num_classes, folder", [
    (10, "cifar10"), (10, "cifar-10-batches-py"), (100, "cifar100"), (100, "cifar-100-python")])
def test_cifar_python(tmp_path, num_classes, folder):
    arrays = cifar_arrays(num_classes)
    x, y, test_x, test_y = arrays
    if num_classes == 10:
        write(tmp_path / folder / "data_batch_1", batch(x[:5], y[:5], 10))
        write(tmp_path / folder / "data_batch_2", python2_batch(x[5:], y[5:]))
        write(tmp_path / folder / "test_batch", batch(test_x, test_y, 10))
    else:
        write(tmp_path / folder / "train", batch(x, y, 100))
        write(tmp_path / folder / "test", batch(test_x, test_y, 100))
    assert same(load(f"cifar{num_classes}", str(tmp_path)), arrays)


def test_the_hash_is_of_the_data(tmp_path):
    """It is the same for both formats of the same images, and another one when one pixel changes."""
    x, y, test_x, test_y = cifar_arrays(10)
    hashes = []
    for name, make, ending, change in ("a", records, ".bin", 0), ("b", batch, "", 0), ("c", records, ".bin", 1):
        x[3, 0, 0, 0] += change
        write(tmp_path / name / "cifar10" / f"data_batch_1{ending}", make(x, y, 10))
        write(tmp_path / name / "cifar10" / f"test_batch{ending}", make(test_x, test_y, 10))
        hashes.append(load("cifar10", str(tmp_path / name)).hash)
    assert hashes[0] == hashes[1] != hashes[2]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    x, y, test_x, test_y = cifar_arrays(10)
    write(tmp_path / "cifar10" / "test_batch", batch(test_x, test_y, 10))
    evil = {b"data": Evil(str(tmp_path / "ran")), b"labels": y.tolist()}
    for protocol in 2, 4:
        write(tmp_path / "cifar10" / "data_batch_1", pickle.dumps(evil, protocol))
        with pytest.raises(ValueError, match=r"data_batch_1 was refused.*asks for \w+\.mkdir, only plain values"):
            load("cifar10", str(tmp_path))
    assert not (tmp_path / "ran").exists()
    for asked in b"cbuiltins\neval\n", b"cnumpy\nload\n", b"cnumpy.core.multiarray\nfromfile\n", b"c_codecs\ndecode\n":
        write(tmp_path / "cifar10" / "data_batch_1", b"\x80\x02" + asked + b".")
        with pytest.raises(ValueError, match="asks for"):
            load("cifar10", str(tmp_path))
    for odd in np.array([[{}] * 3072], object), np.zeros((1, 3072), [("a", "u1")]): # no plain numbers
        write(tmp_path / "cifar10" / "data_batch_1", pickle.dumps({b"data": odd, b"labels": [0]}, 2))
        with pytest.raises(ValueError, match="an array of dtype"):
            load("cifar10", str(tmp_path))


def test_damaged_pickles(tmp_path):
    x, y, test_x, test_y = cifar_arrays(10)
    path = tmp_path / "cifar10" / "data_batch_1"
    write(tmp_path / "cifar10" / "test_batch", batch(test_x, test_y, 10))
    raw = batch(x, y, 10)

    def dump(data, labels):
        return pickle.dumps({b"data": data, b"labels": labels}, 2)

    cases = [
        (raw[:5000], "data_batch_1 was refused, 5000 bytes"),
        (raw.replace(b"u1", b"u4"), "was refused"),
        (pickle.dumps([1], 2), "was refused"),
        (pickle.dumps({b"data": 1}, 2), "labels"),
        (batch(x[:3], y, 10), "3 images, but labels of shape .20,"),
        (dump(np.zeros((2, 100), np.uint8), [0, 1]), r"shape \(2, 100\), expected \(n, 3072\)"),
        (dump(np.zeros((2, 3072)), [0, 1]), "no images: float64"),
        (dump(x, ["a"] * 20), "data_batch_1"),
        (dump(x.reshape(20, -1), [0.5] * 20), "float64"),
        (batch(x, y + 5, 10), "data_batch_1: label 12 of image 1 is not in 0..9"),
    ]
    for bad, match in cases:
        write(path, bad)
        with pytest.raises(ValueError, match=match):
            load("cifar10", str(tmp_path))


@pytest.mark.parametrize("name, change, match", [
    (TRAIN[0], lambda raw: raw[:-1], "images-idx3-ubyte is truncated: expected 23536 bytes .* found 23535"),
    (TRAIN[0], lambda raw: raw + b"x", "is too long: expected 23536 bytes .* found 23537"),
    (TRAIN[0], lambda raw: raw[:9], "truncated: 9 bytes, its header alone has 16"),
    (TRAIN[0], lambda raw: b"", "truncated: 0 bytes"),
    (TRAIN[0], lambda raw: b"\x00\x00\x08\x01" + raw[4:],
     "train-images-idx3-ubyte has the magic number 2049, expected 2051"),
    (TEST[1], lambda raw: b"\x00\x00\x08\x03" + raw[4:],
     "t10k-labels-idx1-ubyte has the magic number 2051, expected 2049"),
    (TRAIN[1], lambda raw: idx(labels(29)), r"30 images, but labels of shape \(29,\)"),
    (TRAIN[1], lambda raw: raw[:-3] + b"\x0a" + raw[-2:], "train-labels.*: label 10 of image 27 is not in 0..9"),
    (TRAIN[1], lambda raw: idx(labels(30) % 9), "no training image of class 9, mnist has 10 classes"),
    (TEST[0], lambda raw: idx(images(20, 1, 28, 27)[:, 0]),
     r"training images are \(1, 28, 28\), test images \(1, 28, 27\)"),
    (TEST[0], lambda raw: idx(np.zeros((0, 28, 28), np.uint8)), "holds no images"),
    (TEST[0], None, "has train-images-idx3-ubyte, but no t10k-images-idx3-ubyte"),
    (TRAIN[0], None, "has t10k-images-idx3-ubyte, but no train-images-idx3-ubyte"),
    (TRAIN[1], None, "has no labels: there is no train-labels-idx1-ubyte"),
])
def test_mnist_refusals(tmp_path, name, change, match):
    write_mnist(tmp_path)
    path = tmp_path / "mnist" / name
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=match):
        load("mnist", str(tmp_path))


@pytest.mark.parametrize("damage", [
    lambda raw: raw[:200],
    lambda raw: raw[:100] + bytes(100) + raw[200:],
    lambda raw: raw[:-8] + bytes(8),
    lambda raw: b"no gzip",
])
def test_damaged_gz(tmp_path, damage):
    write_mnist(tmp_path, ending=".gz")
    path = tmp_path / "mnist" / f"{TRAIN[0]}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz is damaged, \d+ bytes"):
        load("mnist", str(tmp_path))


@pytest.mark.parametrize("num_classes", [10, 100])
def test_cifar_binary_refusals(tmp_path, num_classes):
    x, y, test_x, test_y = cifar_arrays(num_classes)
    folder = tmp_path / f"cifar{num_classes}"
    if num_classes == 10:
        train, test, size = "data_batch_1.bin", "test_batch.bin", 3073
    else:
        train, test, size = "train.bin", "test.bin", 3074
    raw = records(x, y, num_classes)
    write(folder / train, raw)
    with pytest.raises(ValueError, match=f"has {train}, but no {test}"):
        load(f"cifar{num_classes}", str(tmp_path))
    write(folder / test, records(test_x, test_y, num_classes))
    truncated = f"{train} is truncated: expected records of {size} bytes, {len(raw)} in all, found {len(raw) - 1}"
    beyond = f"label {num_classes} of image 0 is not in 0..{num_classes - 1}"
    cases = [
        (raw[:-1], truncated),
        (b"", "holds no images"),
        (records(x, np.full_like(y, num_classes), num_classes), beyond),
        (records(x, y // 2, num_classes), "no training image of class"),
    ]
    for bad, match in cases:
        write(folder / train, bad)
        with pytest.raises(ValueError, match=match):
            load(f"cifar{num_classes}", str(tmp_path))


def test_a_part_of_a_dataset_is_named(tmp_path):
    """One of five batches, or a file that was cut off behind a record, cannot be told from a part that is meant."""
    full = {name: 10 for name in ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin")}
    folder = tmp_path / "cifar10"
    for name, count in full.items():
        write(folder / name, records(images(count, 3, 32, 32), labels(count), 10))
    path = folder / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:7 * 3073])
    found = load("cifar10", str(tmp_path))
    assert found.note == (
        "cifar10 has 50,000 training and 10,000 test images, here are 17 and 10: unless a part is meant, files are "
        f"missing or cut off ({folder}: data_batch_1.bin (10), data_batch_2.bin (7), test_batch.bin (10))")
    write_mnist(tmp_path, n=60000, m=10000, size=(1, 1))
    assert load("mnist", str(tmp_path)).note == ""
    write_mnist(tmp_path, n=60000, m=9999, size=(1, 1))
    assert "here are 60,000 and 9,999" in load("mnist", str(tmp_path)).note


def test_the_first_images_of_the_files(tmp_path):
    """They are the same data, by their hash, as files that hold no more."""
    x, y, test_x, test_y = write_mnist(tmp_path / "all", n=40, m=20)
    few = x[:25], y[:25], test_x[:10], test_y[:10]
    for kind, a, b in ("train", *few[:2]), ("t10k", *few[2:]):
        write(tmp_path / "few" / "mnist" / f"{kind}-images-idx3-ubyte", idx(a[:, 0]))
        write(tmp_path / "few" / "mnist" / f"{kind}-labels-idx1-ubyte", idx(b))
    found, expected = load("mnist", str(tmp_path / "all"), 25, 10), load("mnist", str(tmp_path / "few"))
    assert same(found, few) and same(expected, few) and found.hash == expected.hash
    hashes = {load("mnist", str(tmp_path / "all"), *counts).hash for counts in ((), (25,), (0, 10), (25, 10))}
    assert len(hashes) == 4
    assert found.note == "" and "here are 25 and 10" in expected.note # what was asked for is no surprise
    assert "here are 25 and 20" in load("mnist", str(tmp_path / "all"), 25).note # but these should be 10,000
    with pytest.raises(ValueError, match=r"train_images is 41, but there are 40 \(.*mnist"):
        load("mnist", str(tmp_path / "all"), 41)
    with pytest.raises(ValueError, match="test_images is 21, but there are 20"):
        load("mnist", str(tmp_path / "all"), 0, 21)
    with pytest.raises(ValueError, match="no training image of class 1, 2, 3, 5, 6, 8, 9"):
        load("mnist", str(tmp_path / "all"), 3)


def test_images_are_split_anew_by_the_seed():
    plain, a, b = load("digits"), load("digits", "data", 0, 0, 1), load("digits", "data", 0, 0, 2)
    assert same(load("digits", "data", 0, 0, 1), [x.numpy() for x in (a.train_x, a.train_y, a.test_x, a.test_y)])
    rows = [np.concatenate([part.train_x, part.test_x]).reshape(1797, 64) for part in (plain, a, b)]
    y = [np.concatenate([part.train_y, part.test_y]) for part in (plain, a, b)]
    everything = [sorted((int(k), row.tobytes()) for k, row in zip(*pair)) for pair in zip(y, rows)]
    assert everything[0] == everything[1] == everything[2] # each image once, with its own label
    assert not torch.equal(a.test_x, b.test_x) and not torch.equal(a.test_x, plain.test_x)
    for part in (a, b):
        assert part.train_x.shape == plain.train_x.shape and part.test_x.shape == plain.test_x.shape
        assert np.abs(np.bincount(part.test_y) - np.bincount(y[0]) * 360 / 1797).max() <= 1
        assert part.hash == a.hash != plain.hash # runs of all seeds are of the same data
    few = load("digits", "data", 300, 100, 1)
    assert len(few.train_y) == 300 and len(few.test_y) == 100
    pool = {row.tobytes() for row in np.concatenate([plain.train_x[:300], plain.test_x[:100]])}
    assert {row.tobytes() for row in np.concatenate([few.train_x, few.test_x])} == pool
    with pytest.raises(ValueError, match=r"test share=0.0\d+ leaves class \d, .* without one for the test"):
        load("digits", "data", 300, 3, 1)


def test_the_note_is_printed(tmp_path):
    write_mnist(tmp_path, n=300, m=20)
    settings = dict(dataset="mnist", data_dir=tmp_path, out_dir=tmp_path / "out", epochs=0, device="cpu",
                    track_emissions=False, plots=False)
    out, _ = run_script("train_vision.py", *flags(**settings))
    assert out.count("note: mnist has 60,000 training and 10,000 test images, here are 300 and 20: ") == 1


def damaged(raw, rng):
    """Return raw cut off somewhere, or with a byte that is another one."""
    if rng.random() < 0.5:
        return raw[:rng.randrange(len(raw))]
    i = rng.randrange(min(len(raw), 2000)) # headers are at the front
    return raw[:i] + bytes([rng.randrange(256)]) + raw[i + 1:]


@pytest.mark.parametrize("cases", [40, pytest.param(1000, marks=pytest.mark.torture)])
@pytest.mark.parametrize("kind", ["idx", "gz", "binary", "pickle", "npz"])
def test_a_damaged_file_is_one_line_or_makes_sense(tmp_path, kind, cases):
    rng, refusals = random.Random(5), 0
    dataset, folder = "mnist", tmp_path / "mnist"
    if kind in ("idx", "gz"):
        ending = ".gz" if kind == "gz" else ""
        write_mnist(tmp_path, ending=ending, size=(4, 4))
        path = folder / (TRAIN[0] + ending)
    elif kind == "npz":
        path = folder / "images.npz"
        folder.mkdir()
        x, y = images(20, 1, 4, 4), labels(20).astype(np.int64)
        np.savez(path, train_x=x, train_y=y, test_x=x, test_y=y)
    else:
        dataset, x, y = "cifar10", images(10, 3, 32, 32), labels(10)
        name, raw = ("data_batch_1", batch(x, y, 10)) if kind == "pickle" else ("data_batch_1.bin", records(x, y, 10))
        path = tmp_path / "cifar10" / name
        write(path, raw)
        write(path.with_name(name.replace("data_batch_1", "test_batch")), raw)
    raw = path.read_bytes()
    for _ in range(cases):
        path.write_bytes(damaged(raw, rng))
        try:
            load(dataset, str(tmp_path))
        except ValueError as e:
            assert path.name in str(e) and str(e).isprintable()
            refusals += 1
    assert refusals > cases / 3


@pytest.mark.parametrize("dataset, name", [("mnist", "images.npz"), ("cifar10", "images.npz")])
def test_a_folder_in_place_of_a_file(tmp_path, dataset, name):
    (tmp_path / dataset / name).mkdir(parents=True)
    with pytest.raises(OSError, match=name):
        load(dataset, str(tmp_path))


def test_unknown_dataset():
    with pytest.raises(ValueError, match="no dataset 'imagenet', only digits, mnist"):
        load("imagenet")

# -----------------------------------------------------------------------------
# images.npz and the download


class Hub:
    """It stands in for datasets.load_dataset_builder, and gives these images whatever is asked for."""

    def __init__(self, datasets, arrays, image, label):
        from PIL import Image

        def picture(a): # (C, H, W)
            return Image.fromarray(a[0] if len(a) == 1 else a.transpose(1, 2, 0))

        def part(x, y):
            features = {"id": datasets.Value("string"), image: datasets.Image(),
                        "coarse_label": datasets.Value("int64"), label: datasets.Value("int64")}
            columns = {"id": ["a"] * len(y), image: [picture(a) for a in x],
                       "coarse_label": [0] * len(y), label: y.tolist()}
            return datasets.Dataset.from_dict(columns, features=datasets.Features(features))

        self.parts = datasets.DatasetDict(train=part(*arrays[:2]), test=part(*arrays[2:]))

    def __call__(self, hub):
        self.asked = hub
        return self

    def download_and_prepare(self):
        pass

    def as_dataset(self):
        return self.parts


@pytest.mark.parametrize("dataset, hub, image, label", [
    ("mnist", "ylecun/mnist", "image", "label"),
    ("cifar10", "uoft-cs/cifar10", "img", "label"),
    ("cifar100", "uoft-cs/cifar100", "img", "fine_label"),
])
def test_download(tmp_path, monkeypatch, dataset, hub, image, label):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("PIL")
    if dataset == "mnist":
        arrays = [images(20, 1, 28, 28), labels(20), images(5, 1, 28, 28), labels(5)]
    else:
        arrays = cifar_arrays(int(dataset.removeprefix("cifar")))
    fake = Hub(datasets, arrays, image, label)
    monkeypatch.setattr(datasets, "load_dataset_builder", fake)
    found = load(dataset, str(tmp_path))
    assert same(found, arrays) and fake.asked == hub and hub in found.source
    assert os.listdir(tmp_path / dataset) == ["images.npz"] # nothing temporary
    monkeypatch.setattr(datasets, "load_dataset_builder", None) # now without
    again = load(dataset, str(tmp_path))
    assert same(again, arrays) and again.hash == found.hash and again.source.endswith("images.npz")

    monkeypatch.setattr(datasets, "load_dataset_builder", fake)
    (tmp_path / dataset / "images.npz").unlink()

    def on_a_full_disk(f, **arrays):
        f.write(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as m:
        m.setattr(np, "savez", on_a_full_disk)
        found = load(dataset, str(tmp_path)) # goes on without
    assert same(found, arrays) and "not saved as" in found.source and found.source.endswith("no space left")
    assert os.listdir(tmp_path / dataset) == []
    (tmp_path / dataset).rmdir()
    (tmp_path / dataset).write_text("mine") # a file in place of the folder
    assert same(load(dataset, str(tmp_path)), arrays) and (tmp_path / dataset).read_text() == "mine"
    del fake.parts["test"]
    with pytest.raises(ValueError, match="has no test split"):
        load(dataset, str(tmp_path))
    fake.parts["train"] = fake.parts["train"].remove_columns(label)
    with pytest.raises(ValueError, match="no column"):
        load(dataset, str(tmp_path))


def test_original_files_come_first(tmp_path):
    arrays = write_mnist(tmp_path)
    (tmp_path / "mnist" / "images.npz").write_bytes(b"not even read")
    assert same(load("mnist", str(tmp_path)), arrays)


def test_damaged_npz(tmp_path):
    path = tmp_path / "mnist" / "images.npz"
    path.parent.mkdir()
    x, y = images(20, 1, 28, 28), labels(20).astype(np.int64)
    good = dict(train_x=x, train_y=y, test_x=x, test_y=y)
    np.savez(path, **good)
    assert len(load("mnist", str(tmp_path)).train_x) == 20
    raw = path.read_bytes()
    for bad in raw[:1000], b"", b"x" * 100:
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"images.npz is damaged, delete it"):
            load("mnist", str(tmp_path))
    cases = [
        ({"train_x": np.array([Evil("x")] * 20, object)}, "damaged.*allow_pickle"),
        ({"train_x": x[0]}, "holds no images"),
        ({"test_x": x + 0.5}, "float64"),
        ({"test_y": y[:0]}, "labels of shape .0,"),
        ({"test_y": y + 1}, "npz, test: label 10 of image 7"),
        ({"test_y": y - 1}, "label -1 of image 0"),
        ({"train_y": y[1:]}, "20 images, but labels of shape .19"),
    ]
    for change, match in cases:
        np.savez(path, **{**good, **change})
        with pytest.raises(ValueError, match=match):
            load("mnist", str(tmp_path))
    np.savez(path, train_x=x, train_y=y)
    with pytest.raises(ValueError, match="images.npz is damaged.*test_x"):
        load("mnist", str(tmp_path))


@pytest.mark.parametrize("dataset, words", [
    ("mnist", ["ylecun/mnist", "train-images-idx3-ubyte"]),
    ("cifar10", ["cifar-10-batches-bin", "data_batch_1.bin, ... and test_batch.bin"]),
    ("cifar100", ["cifar-100-python", "train.bin and test.bin or train and test"]),
])
def test_without_network(tmp_path, monkeypatch, dataset, words):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("no network in tests"))
    with pytest.raises(ConnectionError) as e:
        load(dataset, str(tmp_path / "d"))
    for word in *words, str(tmp_path / "d" / dataset), "images.npz", "--dataset=digits":
        assert word in str(e.value)
    assert "\n" not in str(e.value) and not (tmp_path / "d").exists()


def test_a_hub_that_does_not_answer(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def silent(hub):
        asked.append(hub)
        time.sleep(60)

    monkeypatch.setattr(datasets, "load_dataset_builder", silent)
    monkeypatch.setattr(data_vision, "within", lambda seconds, f, *args: data.within(0.2, f, *args)) # a minute, else
    message = r"cannot be downloaded as ylecun/mnist \(TimeoutError\).*--dataset=digits"
    with pytest.raises(ConnectionError, match=message):
        load("mnist", str(tmp_path))
    assert asked == ["ylecun/mnist"]

# -----------------------------------------------------------------------------
# digits, statistics, split


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="--dataset=digits is part of scikit-learn: pip install scikit-learn"):
        load("digits")
    assert "1 to fix:\n  - --dataset=digits is part of scikit-learn" in refused(script="train_vision.py", device="cpu")


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return load("digits", "nowhere")


def test_digits(digits):
    assert digits.train_x.shape == (1437, 1, 8, 8) and digits.test_x.shape == (360, 1, 8, 8)
    assert digits.num_classes == 10 and digits.train_x.max() == 255
    assert digits.train_x.dtype == torch.uint8 and digits.train_y.dtype == torch.int64
    share = torch.bincount(digits.test_y) / (torch.bincount(digits.test_y) + torch.bincount(digits.train_y))
    assert (share - 0.2).abs().max() < 0.01
    assert digits.hash == load("digits").hash == "f6dfd5b7e8248a0f" # for ever, as runs are compared by it
    # the whole set, nothing twice
    from sklearn.datasets import load_digits
    together = np.concatenate([digits.train_x.numpy(), digits.test_x.numpy()])
    originals = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    assert sorted(x.tobytes() for x in together) == sorted(x.tobytes() for x in originals)


def test_stats(digits):
    x = digits.train_x.double() / 255
    assert STATS["digits"] == ((round(x.mean().item(), 4),), (round(x.std().item(), 4),))
    assert STATS["half"] == ((0.5,), (0.5,)) and STATS["mnist"] == ((0.1307,), (0.3081,))
    assert STATS["cifar10"] == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert STATS["cifar100"] == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


def test_split():
    y = np.repeat(np.arange(5), [10, 33, 100, 57, 200])[np.random.RandomState(1).permutation(400)]
    for fraction in 0.1, 0.25, 0.333, 0.9:
        train, val = split(y, fraction, 3)
        assert train.dtype == val.dtype == np.int64
        assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(400)) # all, and nothing twice
        assert (np.diff(train) > 0).all() and (np.diff(val) > 0).all() and len(val) == round(400 * fraction)
        assert np.abs(np.bincount(y[val]) - fraction * np.bincount(y)).max() <= 1
    state = np.random.get_state()[1].copy()
    train, val = split(y, 0.25, 3)
    assert np.array_equal(split(torch.from_numpy(y), 0.25, 3)[1], val) # pure, and tensors are welcome
    assert np.array_equal(np.random.get_state()[1], state)
    assert not np.array_equal(split(y, 0.25, 4)[1], val)
    assert split([0, 1] * 4, 0.25, 0)[1].tolist() == split([0, 1] * 4, 0.25, 0)[1].tolist()


def test_split_refusals():
    for fraction in 0, 1, -0.1, 1.5, float("nan"):
        with pytest.raises(ValueError, match="between 0 and 1, got"):
            split([0, 1], fraction, 0)
    with pytest.raises(ValueError, match=r"class 1, of 1 image\(s\), without one for validation"):
        split([0] * 100 + [1], 0.1, 0)
    with pytest.raises(ValueError, match=r"class 1, of 1 image\(s\), without one for training"):
        split([0] * 100 + [1], 0.9, 0)

# -----------------------------------------------------------------------------
# batches


def make(n=50, C=3, H=8, W=8, batch_size=10, seed=7, **options):
    rng = np.random.RandomState(2)
    x = torch.from_numpy(rng.randint(256, size=(n, C, H, W)).astype(np.uint8))
    return Batches(x, torch.arange(n), batch_size, seed, **options) # y: which image it is


@pytest.mark.parametrize("name", list(AUGMENTATIONS))
def test_train_is_a_pure_function_of_seed_and_step(name):
    a, steps = make(augment=name), range(12)
    expected = [a.train(step) for step in steps]
    torch.manual_seed(5)
    np.random.seed(5)
    b = make(augment=name)
    for step in np.random.RandomState(0).permutation(24) % 12: # out of order, each twice, evaluation between
        b.fixed(0, 10)
        x, y = b.train(int(step))
        assert torch.equal(x, expected[step][0]) and torch.equal(y, expected[step][1])
    other = make(augment=name, seed=8).train(0)
    assert not torch.equal(other[1], expected[0][1])
    if name != "none": # other images get other parameters in the next step
        same_image = Batches(a.x[:1].expand(10, -1, -1, -1).contiguous(), a.y[:10], 10, 7, augment=name)
        assert not torch.equal(same_image.train(0)[0], same_image.train(1)[0])


def test_every_image_once_per_epoch():
    b = make()
    assert b.steps_per_epoch == 5

    def seen(batches, steps):
        return torch.cat([batches.train(step)[1] for step in steps]).tolist()

    epochs = [seen(b, range(5 * e, 5 * e + 5)) for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    b = make(n=57) # 7 are left out of an epoch, other ones each time
    assert b.steps_per_epoch == 5 and len(set(seen(b, range(5)))) == 50
    b = make(n=7) # fewer than a batch
    assert b.steps_per_epoch == 1
    assert all(sorted(seen(b, [step])) == list(range(7)) for step in range(3))


@pytest.mark.parametrize("name", list(AUGMENTATIONS))
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_are_one(name, world_size):
    b = make(augment=name, image_size=12)
    for step in 0, 7:
        x, y = b.train(step)
        for rank in range(world_size):
            part_x, part_y = b.train(step, rank, world_size)
            assert torch.equal(part_y, y[rank::world_size])
            torch.testing.assert_close(part_x, x[rank::world_size], rtol=0, atol=1e-5)


def test_images_and_labels_stay_together():
    b = make()
    x, y = b.train(3)
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    torch.testing.assert_close(x, (b.x[y] / 255 - 0.5) / 0.5, rtol=0, atol=1e-6)
    x, y = b.fixed(20, 15)
    assert y.tolist() == list(range(20, 35))
    torch.testing.assert_close(x, (b.x[20:35] / 255 - 0.5) / 0.5, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", list(STATS))
def test_normalisation(name):
    mean, std = (torch.tensor(s).view(1, -1, 1, 1) for s in STATS[name])
    b = make(normalize=name)
    torch.testing.assert_close(b.fixed(0, 50)[0], (b.x / 255 - mean) / std, rtol=0, atol=1e-5)
    grey = make(C=1, normalize=name, channels=3)
    x = grey.fixed(0, 50)[0]
    assert x.shape == (50, 3, 8, 8) and x.is_contiguous()
    torch.testing.assert_close(x, (grey.x.expand(-1, 3, -1, -1) / 255 - mean) / std, rtol=0, atol=1e-5)


def test_normalised_digits_have_mean_0_and_variance_1(digits):
    x = Batches(digits.train_x, digits.train_y, 100, 0, "digits").fixed(0, 1437)[0]
    assert abs(x.mean()) < 1e-3 and abs(x.std() - 1) < 1e-3


def test_resize():
    for C, channels in (3, 0), (1, 3):
        b = make(C=C, H=9, W=7, image_size=16, channels=channels)
        expected = F.interpolate(b.x.float(), (16, 16), mode="bilinear", align_corners=False, antialias=False)
        expected = expected.expand(-1, 3, -1, -1)
        torch.testing.assert_close(b.fixed(0, 50)[0], (expected / 255 - 0.5) / 0.5, rtol=0, atol=1e-5)
    # augmentation comes first, at the images' own size
    b, small = make(image_size=16, augment="strong"), make(augment="strong")
    expected = F.interpolate((small.train(4)[0] + 1) * 127.5, (16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(b.train(4)[0], expected / 127.5 - 1, rtol=0, atol=1e-5)


def test_batches_refusals():
    x, y = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    cases = [
        ((x.float(), y, 2, 0), {}, "uint8.*torch.float32"),
        ((x[0], y, 2, 0), {}, "are to be"),
        ((x, y[:3], 2, 0), {}, "3 labels"),
        ((x[:0], y[:0], 2, 0), {}, "0 labels"),
        ((x, y, 0, 0), {}, "batch_size must be at least 1, got 0"),
        ((x, y, 2, 0), {"normalize": "x"}, "got 'x' and 'none'"),
        ((x, y, 2, 0), {"augment": "x"}, "augment one of none, crop, standard, strong"),
        ((x, y, 2, 0), {"normalize": "cifar10"}, "for 3 channels, the images have 1"),
        ((x.expand(-1, 3, -1, -1), y, 2, 0), {"channels": 1}, "3 channels cannot become images of 1"),
    ]
    for args, options, match in cases:
        with pytest.raises(ValueError, match=match):
            Batches(*args, **options)
    b = Batches(x, y, 2, 0)
    for first, count in (0, 5), (-1, 2), (4, 1), (0, 0):
        with pytest.raises(ValueError, match="were asked for, there are 4"):
            b.fixed(first, count)
    for rank, world_size in (0, 3), (2, 2), (-1, 2):
        with pytest.raises(ValueError, match="has no part in a batch of 2"):
            b.train(0, rank, world_size)

# -----------------------------------------------------------------------------
# augmentation, against oracles


SIZES = [(8, 8), (28, 28), (32, 32), (9, 14)]


def picture(C, H, W, count=1):
    return torch.from_numpy(images(count, C, H, W)).float()


@pytest.mark.parametrize("H, W", SIZES)
def test_identity_flip_and_crop_are_exact(H, W):
    x = picture(3, H, W)
    before = x.clone()
    nothing = params(flip=False, dy=0.0, dx=0.0, degrees=0.0)
    assert torch.equal(augment(x), x) and torch.equal(augment(x, **nothing), x)
    assert torch.equal(augment(x, **nothing, **params(brightness=1.0, contrast=1.0, saturation=1.0)), x)
    torch.testing.assert_close(augment(x, **params(hue=0.0)), x, rtol=0, atol=1e-3) # there and back again
    assert torch.equal(augment(x, **params(flip=True)), x.flip(3))
    padded = F.pad(x, (4, 4, 4, 4))
    flipped = F.pad(x.flip(3), (4, 4, 4, 4))
    for dy, dx in (-4, 4), (3, -1), (0, 2), (4, 0):
        rows, cols = slice(4 + dy, 4 + dy + H), slice(4 + dx, 4 + dx + W)
        crop = params(dy=float(dy), dx=float(dx))
        assert torch.equal(augment(x, **crop), padded[:, :, rows, cols])
        assert torch.equal(augment(x, **params(flip=True), **crop), flipped[:, :, rows, cols]) # flip, then crop
    assert torch.equal(x, before)


def test_each_image_has_its_own_parameters():
    x = picture(3, 12, 12, count=16)
    drawn = draw(np.random.RandomState(0), 16, AUGMENTATIONS["strong"])
    together = augment(x, **drawn)
    for i in range(16):
        alone = augment(x[i:i + 1], **{name: p[i:i + 1] for name, p in drawn.items()})
        torch.testing.assert_close(together[i:i + 1], alone, rtol=0, atol=1e-3)


@pytest.mark.parametrize("quarter", [1, 2, 3, -1])
def test_quarter_turns(quarter):
    x = picture(3, 28, 28)
    a = augment(x, **params(degrees=90.0 * quarter))
    torch.testing.assert_close(a, torch.rot90(x, quarter, (2, 3)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("H, W", SIZES)
@pytest.mark.parametrize("degrees", [-15.0, 3.0, 10.0, 37.0])
def test_rotation(H, W, degrees):
    ndimage = pytest.importorskip("scipy.ndimage")
    x = picture(1, H, W)
    a = augment(x, **params(degrees=degrees))[0, 0].numpy()
    expected = ndimage.rotate(x[0, 0].numpy().astype(np.float64), degrees, reshape=False, order=1)
    # where an interpolated pixel lies wholly inside, as scipy has other ideas of what is beyond the border
    inside = ndimage.rotate(np.pad(np.ones((H - 2, W - 2)), 1), degrees, reshape=False, order=1) > 0.999
    assert inside.sum() > 0.3 * H * W
    assert np.abs(a - expected)[inside].max() < 0.02


def test_flip_crop_and_rotation_compose():
    """One after another they give the same, where the crop has cut nothing off."""
    ndimage = pytest.importorskip("scipy.ndimage")
    x = F.pad(picture(1, 12, 12), (10, 10, 10, 10))
    a = augment(x, **params(flip=True, dy=3.0, dx=-2.0, degrees=12.0))[0, 0].numpy()
    expected = np.roll(x[0, 0].numpy()[:, ::-1], (-3, 2), (0, 1))
    assert np.abs(a - ndimage.rotate(expected.astype(np.float64), 12.0, reshape=False, order=1)).max() < 0.02


@pytest.mark.parametrize("factor", [0.0, 0.8, 0.95, 1.2, 1.7])
@pytest.mark.parametrize("name", ["Brightness", "Contrast", "Color"])
def test_jitter_against_pil(name, factor):
    pytest.importorskip("PIL")
    from PIL import Image, ImageEnhance
    x = picture(3, 16, 16)
    picture_of_pil = Image.fromarray(x[0].byte().permute(1, 2, 0).numpy())
    expected = getattr(ImageEnhance, name)(picture_of_pil).enhance(factor)
    our_name = "saturation" if name == "Color" else name.lower()
    a = augment(x, **params(**{our_name: factor}))
    assert a.min() >= 0 and a.max() <= 255
    difference = a[0].permute(1, 2, 0).numpy() - np.asarray(expected, np.float32)
    assert np.abs(difference).max() < 1 + 0.5 * abs(1 - factor) + 0.01 # PIL rounds the grey value and the result


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.03, 0.1, 0.4])
def test_hue_against_colorsys(shift):
    x = picture(3, 8, 8)
    x[0, :, 0, 0], x[0, :, 0, 1], x[0, :, 0, 2] = 0, 255, 77 # grey ones have no hue
    x[0, :, 0, 3], x[0, :, 0, 4] = torch.tensor([255.0, 0, 0]), torch.tensor([9.0, 200, 200])
    a = augment(x, **params(hue=shift))
    for i in range(8):
        for j in range(8):
            h, s, v = colorsys.rgb_to_hsv(*(x[0, :, i, j].double() / 255).tolist())
            expected = torch.tensor(colorsys.hsv_to_rgb((h + shift) % 1, s, v), dtype=torch.float64) * 255
            assert a[0, :, i, j].tolist() == pytest.approx(expected.tolist(), abs=1e-2)


def test_jitter_of_grey_images():
    x = picture(1, 8, 8)
    assert torch.equal(augment(x, **params(saturation=0.0, hue=0.4)), x)
    torch.testing.assert_close(augment(x, **params(contrast=0.0)), x.mean().expand_as(x), rtol=0, atol=1e-3)
    torch.testing.assert_close(augment(x, **params(brightness=0.5)), x / 2)


def test_order_of_jitter():
    x = picture(3, 8, 8)
    one_by_one = x
    for name, value in {"brightness": 1.7, "contrast": 1.5, "saturation": 0.4, "hue": 0.2}.items():
        one_by_one = augment(one_by_one, **params(**{name: value}))
    together = augment(x, **params(hue=0.2, saturation=0.4, contrast=1.5, brightness=1.7))
    torch.testing.assert_close(together, one_by_one)


@pytest.mark.parametrize("name", list(AUGMENTATIONS))
def test_drawn_parameters(name):
    spec, n = AUGMENTATIONS[name], 20000
    drawn = draw(np.random.RandomState(1), n, spec)
    expected_names = {
        "none": set(), "crop": {"dy", "dx", "degrees"}, "standard": {"flip", "dy", "dx", "degrees"},
        "strong": {"flip", "dy", "dx", "degrees", "brightness", "contrast", "saturation", "hue"}}
    assert set(drawn) == expected_names[name]
    centres = {"degrees": 0, "hue": 0, "brightness": 1, "contrast": 1, "saturation": 1}
    for key, p in drawn.items():
        assert p.shape == (n,)
        if key == "flip":
            assert p.dtype == torch.bool and abs(p.float().mean() - 0.5) < 4 * 0.5 / n ** 0.5
        elif key in ("dy", "dx"): # -4..4, each as often
            counts = torch.bincount((p + 4).long(), minlength=9)
            assert torch.equal(p, p.round()) and len(counts) == 9
            assert (counts - n / 9).abs().max() < 4.5 * (n * 8 / 81) ** 0.5
        else: # uniform in centre +- width, and close to both ends
            u = (p - centres[key]) / spec[key] # in -1..1
            assert -1 - 1e-5 <= u.min() < -0.999 and 0.999 < u.max() <= 1 + 1e-5
            assert abs(u.mean()) < 4 / (3 * n) ** 0.5
            assert abs(u.square().mean() - 1 / 3) < 4 * (4 / 45 / n) ** 0.5
    if len(drawn) > 1: # each its own
        r = torch.corrcoef(torch.stack([p.float() for p in drawn.values()])).fill_diagonal_(0)
        assert r.abs().max() < 4.5 / n ** 0.5


def test_augmentation_of_batches():
    """train() is draw() and augment() on the images of the step. Grey images with "crop" are never mirrored."""
    b = make(C=1, H=28, W=28, augment="crop", normalize="mnist")
    x, y = b.train(6)
    drawn = draw(np.random.RandomState([7, 6, 1]), 10, AUGMENTATIONS["crop"])
    expected = augment(b.x[y].float(), **drawn)
    torch.testing.assert_close(x, (expected / 255 - 0.1307) / 0.3081, rtol=0, atol=1e-5)
    assert "flip" not in drawn


def test_a_row_can_be_added(monkeypatch):
    monkeypatch.setitem(AUGMENTATIONS, "flips", {**AUGMENTATIONS["none"], "flip": 1.0})
    b = make(augment="flips")
    x, y = b.train(0)
    torch.testing.assert_close(x, (b.x[y].flip(3) / 255 - 0.5) / 0.5, rtol=0, atol=1e-6)
