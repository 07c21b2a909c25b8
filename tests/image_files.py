"""Small datasets of random images, written in the original formats of MNIST and CIFAR."""
import gzip
import struct

import numpy as np

RNG = np.random.RandomState(0)
TRAIN = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def images(n, C, H, W):
    return RNG.randint(256, size=(n, C, H, W)).astype(np.uint8)


def labels(n, num_classes=10):
    return (np.arange(n) * 7 % num_classes).astype(np.uint8) # 7 and 10, 100 have no common divisor: every class


def write(path, raw):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw, 1) if path.suffix == ".gz" else raw)


def idx(a, magic=None):
    """Pack an array in MNIST's IDX format: a magic number, the sizes, the bytes."""
    return struct.pack(f">{1 + a.ndim}I", magic or 0x800 + a.ndim, *a.shape) + a.tobytes()


def write_mnist(root, n=30, m=20, ending="", dot=False, size=(28, 28)):
    """Write the four files of MNIST, n images for training and m for testing. Returns their arrays."""
    arrays = []
    for names, count in (TRAIN, n), (TEST, m):
        x, y = images(count, 1, *size), labels(count)
        for name, a in zip(names, (x[:, 0], y)):
            if dot:
                name = name.replace("-idx", ".idx")
            write(root / "mnist" / (name + ending), idx(a))
        arrays += [x, y]
    return arrays


def cifar_arrays(num_classes, n=None, m=10):
    n = n or 2 * num_classes
    return [images(n, 3, 32, 32), labels(n, num_classes), images(m, 3, 32, 32), labels(m, num_classes)]


def records(x, y, num_classes):
    """
    Pack images as the binary version of CIFAR has them. The coarse label of CIFAR-100 comes first, and is not the one
    that is wanted.
    """
    columns = [y[:, None], x.reshape(len(x), 3072)]
    if num_classes == 100:
        columns.insert(0, np.full((len(y), 1), 99, np.uint8))
    return np.concatenate(columns, 1).tobytes()
