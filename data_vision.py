"""
The images that train_vision.py reads: load() finds a dataset, split() cuts a validation part off, and Batches gives
batches out.

  digits     1,797 images of 8x8, part of scikit-learn: needs no network and no files
  mnist      data/mnist/, or data/fashion_mnist/: IDX files, train-images-idx3-ubyte and its fellows, as they are or .gz
  cifar10    data/cifar10/, or as the archive unpacks: data/cifar-10-batches-bin/ or data/cifar-10-batches-py/
  cifar100   data/cifar100/, or data/cifar-100-binary/ or data/cifar-100-python/
Without these files load() takes data/<dataset>/images.npz, which its download from the huggingface hub leaves there.
"""
import gzip
import hashlib
import io
import math
import os
import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from augmentation import AUGMENTATIONS, augment, draw
from data import PlainUnpickler, replacing, within

# (mean, standard deviation) of pixels in 0..1, for each channel or one for all, as in the paper's C.1
STATS = {
    "half": ((0.5,), (0.5,)),
    "digits": ((0.3059,), (0.3764,)), # measured on the training part
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


@dataclass
class Images:
    """A whole dataset, in memory and on the CPU."""
    train_x: torch.Tensor # (N, C, H, W) uint8
    train_y: torch.Tensor # (N,) int64, 0..num_classes-1
    test_x: torch.Tensor # (M, C, H, W) uint8
    test_y: torch.Tensor # (M,) int64
    num_classes: int
    source: str # where it comes from, for people
    note: str # a warning that this is not all of the dataset, or ""
    hash: str # a hash of the arrays, whatever files they come from: it tells which data a run saw


# -----------------------------------------------------------------------------
# reading files

class Parts:
    """
    Stands in for numpy's ndarray and dtype while a pickle is read. It keeps what they would be made of, so that none of
    numpy's own code runs on a stranger's values.
    """

    def __init__(self, *args):
        self.args, self.state = args, None

    def __setstate__(self, state):
        self.state = state

    def array(self):
        """Return the array that these parts make. Raises ValueError for one of anything but plain numbers."""
        _, shape, dtype, fortran, raw = self.state
        code, byte_order = text(dtype.args[0]), text(dtype.state[1])
        if code[0] not in "biuf" or not code[1:].isdigit() or byte_order not in "<>|=":
            raise ValueError(f"an array of dtype {code!r}")
        return np.frombuffer(raw, np.dtype(byte_order + code)).reshape(shape, order="F" if fortran else "C")


def text(s):
    """Return s as a str: python 2 has pickled its strings as bytes."""
    return s.decode() if isinstance(s, bytes) else s


class ArrayUnpickler(PlainUnpickler):
    """Builds what PlainUnpickler does, bytes, and Parts in place of numpy arrays. It refuses anything else."""
    allowed = {(module, "_reconstruct"): Parts for module in ("numpy.core.multiarray", "numpy._core.multiarray")}
    allowed |= {("numpy", "ndarray"): Parts, ("numpy", "dtype"): Parts}
    allowed |= {("_codecs", "encode"): bytes} # bytes('text', 'latin1') is what protocol 2 means by it

    def find_class(self, module, name):
        return self.allowed.get((module, name)) or super().find_class(module, name)


def read_bytes(path):
    """Return the content of a file, unpacked if it is a .gz. Raises ValueError when the .gz is damaged."""
    with open(path, "rb") as f:
        raw = f.read()
    try:
        return gzip.decompress(raw) if path.endswith(".gz") else raw
    except (OSError, EOFError, zlib.error) as e:
        raise ValueError(f"{path} is damaged, {len(raw)} bytes that do not unpack: {e}") from None


def find(folder, name):
    """
    Return the path of the file of that name in folder, or of its .gz, or None when there is neither. The name may
    have the dot that some unpackers put before idx.
    """
    for variant in name, name.replace("-idx", ".idx"):
        for ending in "", ".gz":
            path = os.path.join(folder, variant + ending)
            if os.path.isfile(path):
                return path
    return None


def idx_array(path, ndim):
    """
    Return the uint8 array of ndim dimensions in one IDX file.
    Raises ValueError when it is damaged or another kind of file.
    """
    raw, start = read_bytes(path), 4 + 4 * ndim # the header: a magic number and the shape
    if len(raw) < start:
        raise ValueError(f"{path} is truncated: {len(raw)} bytes, its header alone has {start}")
    magic, *shape = (int(n) for n in np.frombuffer(raw, ">u4", 1 + ndim))
    if magic != 0x800 + ndim: # 8: unsigned bytes
        raise ValueError(f"{path} has the magic number {magic}, expected {0x800 + ndim}: "
                         f"it is no IDX file of {ndim} dimension(s)")
    expected = start + math.prod(shape)
    if len(raw) != expected:
        wrong = "truncated" if len(raw) < expected else "too long"
        raise ValueError(f"{path} is {wrong}: expected {expected} bytes for {shape}, found {len(raw)}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def read_idx(path, num_classes):
    """Return x (n, 1, H, W), y (n,) from MNIST's file of images and the file of labels beside it."""
    folder, name = os.path.split(path)
    name = name.removesuffix(".gz").replace("images", "labels").replace(".idx", "-idx").replace("idx3", "idx1")
    labels = find(folder, name)
    if not labels:
        raise ValueError(f"{path} has no labels: there is no {name} beside it")
    x, y = idx_array(path, 3)[:, None], idx_array(labels, 1)
    return check(f"{path} with {os.path.basename(labels)}", x, y, num_classes)


def read_binary(path, num_classes):
    """Return x (n, 3, 32, 32), y (n,) from one file of the CIFARs' binary version."""
    raw = read_bytes(path)
    num_labels = 2 if num_classes == 100 else 1 # CIFAR-100 has a coarse label, then the fine one
    size = num_labels + 3072
    if len(raw) % size:
        expected = -(-len(raw) // size) * size
        raise ValueError(f"{path} is truncated: expected records of {size} bytes, {expected} in all, found {len(raw)}")
    records = np.frombuffer(raw, np.uint8).reshape(-1, size)
    x, y = records[:, num_labels:].reshape(-1, 3, 32, 32), records[:, num_labels - 1]
    return check(path, x, y, num_classes)


def read_pickle(path, num_classes):
    """
    Return x (n, 3, 32, 32), y (n,) from one file of the CIFARs' python version.
    Raises ValueError when it is damaged or could run code.
    """
    raw = read_bytes(path)
    labels = "fine_labels" if num_classes == 100 else "labels"
    try:
        batch = {}
        for key, value in ArrayUnpickler(io.BytesIO(raw), encoding="bytes").load().items():
            batch[text(key)] = value.array() if isinstance(value, Parts) else value
        x, y = np.asarray(batch["data"]), np.asarray(batch[labels])
    except Exception as e: # a damaged pickle can raise nearly anything
        raise ValueError(f"{path} was refused, {len(raw)} bytes: {e!r:.200}") from None
    if x.ndim != 2 or x.shape[1] != 3072:
        raise ValueError(f"{path} has data of shape {x.shape}, expected (n, 3072)")
    return check(path, x.reshape(-1, 3, 32, 32), y, num_classes)


def check(path, x, y, num_classes):
    """
    Return x in uint8 and y in int64.
    Raises ValueError, which names the file, when they are not images (n, C, H, W) and labels (n,) in 0..num_classes-1.
    """
    if x.dtype != np.uint8 or x.ndim != 4 or not x.size:
        raise ValueError(f"{path} holds no images: {x.dtype} of shape {x.shape}")
    if y.dtype.kind not in "iu" or y.ndim != 1 or len(x) != len(y):
        raise ValueError(f"{path}: {len(x)} images, but labels of shape {y.shape} and {y.dtype}")
    wrong = np.flatnonzero((y < 0) | (y >= num_classes))
    if len(wrong):
        raise ValueError(f"{path}: label {y[wrong[0]]} of image {wrong[0]} is not in 0..{num_classes - 1}")
    return x, y.astype(np.int64)


# -----------------------------------------------------------------------------
# where a dataset comes from: each of these functions returns (train_x, train_y, test_x, test_y, source)

@dataclass
class Origin:
    """Where the files of a dataset may lie, what they are called, and which reader takes them."""
    num_classes: int
    mode: str # PIL's name for the kind of pixels, L is grey
    sizes: tuple # how many images there are for training and for the test
    hub: str # the dataset's name on the huggingface hub
    folders: list # in the data folder, beside the one that is called as the dataset
    formats: list # tuples (reader, names of the training files, name of the test file)


IDX = [(read_idx, ["train-images-idx3-ubyte"], "t10k-images-idx3-ubyte")]
BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
DATASETS = {
    "mnist": Origin(10, "L", (60000, 10000), "ylecun/mnist", [], IDX),
    "fashion_mnist": Origin(10, "L", (60000, 10000), "zalando-datasets/fashion_mnist", [], IDX),
    "cifar10": Origin(10, "RGB", (50000, 10000), "uoft-cs/cifar10", ["cifar-10-batches-bin", "cifar-10-batches-py"], [
        (read_binary, [f"{name}.bin" for name in BATCHES], "test_batch.bin"),
        (read_pickle, BATCHES, "test_batch"),
    ]),
    "cifar100": Origin(100, "RGB", (50000, 10000), "uoft-cs/cifar100", ["cifar-100-binary", "cifar-100-python"], [
        (read_binary, ["train.bin"], "test.bin"),
        (read_pickle, ["train"], "test"),
    ]),
}


def digits():
    """
    Return scikit-learn's digits, always the same 1,437 for training and 360 for the test.
    Raises ImportError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise ImportError(f"--dataset=digits is part of scikit-learn: pip install scikit-learn ({e})") from None
    images, y = load_digits(return_X_y=True)
    x = np.rint(images * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8) # their pixels are 0..16
    train, test = split(y, 360 / 1797, seed=0)
    y = y.astype(np.int64)
    return x[train], y[train], x[test], y[test], "scikit-learn's digits"


def local_files(dataset, data_dir):
    """Read the original files; None when there are none. Raises ValueError when some are damaged or missing."""
    origin = DATASETS[dataset]
    for folder_name in (dataset, *origin.folders):
        folder = os.path.join(data_dir, folder_name)
        for read, train_names, test_name in origin.formats:
            train = [find(folder, name) for name in train_names]
            train = [path for path in train if path] # not all five of CIFAR-10's need be there, load() says so
            test = find(folder, test_name)
            if train and test:
                parts = [read(path, origin.num_classes) for path in (*train, test)]
                names = [f"{os.path.basename(path)} ({len(y):,})" for path, (_, y) in zip((*train, test), parts)]
                train_x, train_y = (np.concatenate(part) for part in zip(*parts[:-1]))
                return train_x, train_y, *parts[-1], f"{folder}: {', '.join(names)}"
            if train:
                raise ValueError(f"{folder} has {os.path.basename(train[0])}, but no {test_name}")
            if test:
                raise ValueError(f"{folder} has {os.path.basename(test)}, but no {train_names[0]}")
    return None


def saved(dataset, data_dir):
    """Read images.npz; None when there is none. Raises ValueError when it is damaged, OSError when it is unreadable."""
    path = os.path.join(data_dir, dataset, "images.npz")
    if not os.path.exists(path):
        return None
    with open(path, "rb") as f:
        try:
            with np.load(f, allow_pickle=False) as arrays:
                train_x, train_y, test_x, test_y = (arrays[name] for name in ("train_x", "train_y", "test_x", "test_y"))
        except Exception as e: # not a zip, a truncated one, an array missing, or of objects
            raise ValueError(f"{path} is damaged, delete it to download it again: {e!r:.200}") from None
    num_classes = DATASETS[dataset].num_classes
    train_x, train_y = check(f"{path}, train", train_x, train_y, num_classes)
    test_x, test_y = check(f"{path}, test", test_x, test_y, num_classes)
    return train_x, train_y, test_x, test_y, path


def download(dataset, data_dir):
    """
    Read the dataset from the huggingface hub, or its local cache, and save it as images.npz, if that can be.
    Raises ConnectionError, one line, when that fails, and ValueError when the hub has something else.
    """
    origin, hub, folder = DATASETS[dataset], DATASETS[dataset].hub, os.path.join(data_dir, dataset)
    try:
        import datasets
        builder = within(60, datasets.load_dataset_builder, hub) # then it is known that the hub answers
        builder.download_and_prepare()
        parts = builder.as_dataset()
    except Exception as e: # httpx's errors are not even OSErrors
        files = []
        for _, train, test in origin.formats:
            more = ", ..." if len(train) > 1 else ""
            files.append(f"{train[0]}{more} and {test}")
        places = [folder, *(os.path.join(data_dir, name) for name in origin.folders)]
        raise ConnectionError(f"{dataset} is not there, and cannot be downloaded as {hub} ({type(e).__name__}). "
                              f"looked in {', '.join(places)}. without network: put the original files "
                              f"({' or '.join(files)}) there, or images.npz into {folder}, "
                              "or use --dataset=digits") from None
    arrays = {}
    for part in "train", "test":
        if part not in parts:
            raise ValueError(f"{hub} has no {part} split, only {sorted(parts)}")
        arrays[f"{part}_x"], arrays[f"{part}_y"] = hub_arrays(f"{hub}, {part}", parts[part], origin)
    path = os.path.join(folder, "images.npz")
    source = f"{hub}, saved as {path}"
    try:
        os.makedirs(folder, exist_ok=True)
        with replacing(path, tmp=f".{os.getpid()}.tmp") as (f,): # ranks may do this side by side
            np.savez(f, **arrays)
    except OSError as e: # no reason not to go on: the hub's own cache has them too
        source = f"{hub}, not saved as {path}: {e.strerror or e}"
    return *arrays.values(), source


def hub_arrays(name, part, origin):
    """Return x (n, C, H, W), y (n,) from a split of a datasets.Dataset. Raises ValueError when it has others."""
    import datasets
    images = [column for column, feature in part.features.items() if isinstance(feature, datasets.Image)]
    labels = [column for column in ("fine_label", "label") if column in part.features]
    if not images or not labels:
        raise ValueError(f"{origin.hub} has no column of images and one of labels, only {list(part.features)}")
    x = [np.asarray(image.convert(origin.mode)) for image in part[images[0]]]
    for i, image in enumerate(x):
        if image.shape != x[0].shape:
            raise ValueError(f"{name}: image {i} is {image.shape}, image 0 is {x[0].shape}")
    x = np.stack(x).reshape(len(x), *x[0].shape[:2], -1).transpose(0, 3, 1, 2) # (n, C, H, W)
    return check(name, np.ascontiguousarray(x), np.asarray(part[labels[0]]), origin.num_classes)


def load(dataset, data_dir="data", train_images=0, test_images=0, resplit_seed=None):
    """
    Return the Images of digits or of one of DATASETS, from files (see the top of this file) or downloaded once.

        train_images   how many training images there are to be, the first ones in the order of the files; 0: all
        test_images    likewise
        resplit_seed   with a seed training and test images, as many of each, are drawn anew from both together, each
                       class in its share. The hash is the same for all seeds, as the images are: it is that of the
                       data, not of the draw

    Raises ValueError for an unknown name, for damaged, missing or ill-matched files, for fewer images than asked for,
    and for a class without a training image, ConnectionError when there are no files and the download fails,
    ImportError for digits without scikit-learn.
    """
    sizes = None
    if dataset == "digits":
        num_classes, found = 10, digits()
    elif dataset in DATASETS:
        num_classes, sizes = DATASETS[dataset].num_classes, DATASETS[dataset].sizes
        found = local_files(dataset, data_dir) or saved(dataset, data_dir) or download(dataset, data_dir)
    else:
        raise ValueError(f"there is no dataset {dataset!r}, only digits, {', '.join(DATASETS)}")
    *arrays, source = found
    for i, count in enumerate((train_images, train_images, test_images, test_images)):
        if count > len(arrays[i]):
            name = "train_images" if i < 2 else "test_images"
            raise ValueError(f"{name} is {count}, but there are {len(arrays[i])} ({source})")
        arrays[i] = arrays[i][:count or None]
    train_x, train_y, test_x, test_y = arrays
    if train_x.shape[1:] != test_x.shape[1:]:
        raise ValueError(f"{source}: training images are {train_x.shape[1:]}, test images {test_x.shape[1:]}")
    empty = np.flatnonzero(np.bincount(train_y, minlength=num_classes) == 0)
    if len(empty):
        raise ValueError(f"{source}: no training image of class {', '.join(map(str, empty))}, "
                         f"{dataset} has {num_classes} classes")
    note = ""
    if sizes and (len(train_y), len(test_y)) != (train_images or sizes[0], test_images or sizes[1]):
        note = (f"{dataset} has {sizes[0]:,} training and {sizes[1]:,} test images, here are {len(train_y):,} and "
                f"{len(test_y):,}: unless a part is meant, files are missing or cut off ({source})")
    sha = hashlib.sha256()
    for i, a in enumerate(arrays):
        arrays[i] = np.require(a, requirements="CW") # torch wants to be able to write
        sha.update(f"{a.dtype} {a.shape}".encode())
        sha.update(arrays[i])
    if resplit_seed is not None:
        x, y = np.concatenate([train_x, test_x]), np.concatenate([train_y, test_y])
        # a stream of its own: that of the validation split, which has the same seed, must not depend on the first cut
        train, test = split(y, len(test_y) / len(y), [resplit_seed, 0, 2], "resplit's test share", "the test")
        arrays = x[train], y[train], x[test], y[test]
        sha.update(b"resplit")
    return Images(*map(torch.from_numpy, arrays), num_classes, source, note, sha.hexdigest()[:16])


def split(labels, val_fraction, seed, setting="val_fraction", part="validation"):
    """
    Cut the training images, by their labels (N,), into a part for training and one for validation. Of another part,
    with its setting, the messages speak by these names.

    Returns train_idx and val_idx, sorted int64 arrays that share nothing and cover 0..N-1. round(val_fraction * N)
    images go to validation, of each class its share to within one. The cut is a pure function of the arguments.
    Raises ValueError when val_fraction is not between 0 and 1, or when a class would be missing in one of the two.
    """
    labels = np.asarray(labels)
    if not 0 < val_fraction < 1:
        raise ValueError(f"{setting} must lie between 0 and 1, got {val_fraction}")
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * val_fraction
    take = np.floor(exact).astype(np.int64) # how many of each class go to validation
    num_missing = round(len(labels) * val_fraction) - take.sum()
    largest_remainders = np.argsort(take - exact, kind="stable")[:num_missing]
    take[largest_remainders] += 1
    short = (take == 0) | (take == counts)
    if short.any():
        part = part if take[short][0] == 0 else "training"
        raise ValueError(f"{setting}={val_fraction} leaves class {classes[short][0]}, "
                         f"of {counts[short][0]} image(s), without one for {part}")
    rng = np.random.RandomState(seed) # its stream is frozen: a new numpy may not change the split
    is_val = np.zeros(len(labels), bool)
    for c, n in zip(classes, take):
        is_val[rng.permutation(np.flatnonzero(labels == c))[:n]] = True
    return np.flatnonzero(~is_val).astype(np.int64), np.flatnonzero(is_val).astype(np.int64)


# -----------------------------------------------------------------------------
# batches

class Batches:
    """
    Batches of images x (N, C, H, W) uint8 and labels y (N,) int64. They live on the device as they are, and the
    images come out as normalised float32.

    An epoch has steps_per_epoch = max(N // batch_size, 1) batches, from a permutation of its own whose rest is
    dropped. With fewer than batch_size images, the one batch is all of them.

        seed        0..2**32-1
        normalize   a name in STATS
        augment     a name in AUGMENTATIONS; images are augmented at their own size
        image_size  the side that they are then resized to, 0: they stay as they are
        channels    3 gives grey images 3 equal channels, 0: they stay as they are

    Raises ValueError for what does not fit together.
    """

    def __init__(self, x, y, batch_size, seed, normalize="half", augment="none", image_size=0, channels=0,
                 device="cpu"):
        if x.dtype != torch.uint8 or x.dim() != 4 or len(x) != len(y) or not len(x):
            raise ValueError("images are to be uint8 (N, C, H, W) with a label each, "
                             f"got {x.dtype} {tuple(x.shape)} and {len(y)} labels")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if normalize not in STATS or augment not in AUGMENTATIONS:
            raise ValueError(f"normalize is one of {', '.join(STATS)}, augment one of {', '.join(AUGMENTATIONS)}; "
                             f"got {normalize!r} and {augment!r}")
        C = channels or x.size(1)
        if x.size(1) not in (1, C):
            raise ValueError(f"images of {x.size(1)} channels cannot become images of {C}")
        mean, std = (torch.tensor(s, dtype=torch.float64) for s in STATS[normalize])
        if len(mean) not in (1, C):
            raise ValueError(f"normalize={normalize!r} is for {len(mean)} channels, the images have {C}")
        self.x, self.y = x.to(device), y.to(device)
        self.batch_size, self.seed, self.spec = min(batch_size, len(x)), seed, AUGMENTATIONS[augment]
        self.steps_per_epoch = max(len(x) // batch_size, 1)
        self.size = (image_size or x.size(2), image_size or x.size(3))
        # (x / 255 - mean) / std is done as x * scale + shift, which also makes three channels of one
        scale, shift = 1 / (255 * std), -mean / std
        self.scale = scale.expand(C).reshape(1, C, 1, 1).float().to(device)
        self.shift = shift.expand(C).reshape(1, C, 1, 1).float().to(device)
        self.epoch, self.order = None, None # the current permutation, (N,) on the device

    def rows(self, step):
        """Return which images are in the batch of a step, (batch_size,) int64 on the device."""
        epoch, i = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            order = np.random.RandomState([self.seed, epoch]).permutation(len(self.x)).astype(np.int64)
            self.epoch, self.order = epoch, torch.from_numpy(order).to(self.x.device)
        return self.order[i * self.batch_size:(i + 1) * self.batch_size]

    def train(self, step, rank=0, world_size=1):
        """
        Return x (b, C, S, S) float32 and y (b,) for a step: rows rank, rank + world_size, ... of its batch, so that
        all ranks together have what one would have.

        The batch is a pure function of (seed, step): what was asked before does not matter, so that evaluating or
        resuming cannot change it. Raises ValueError when the batch has fewer images than there are ranks.
        """
        B = self.batch_size
        if not 0 <= rank < world_size <= B:
            raise ValueError(f"rank {rank} of {world_size} has no part in a batch of {B} images")
        rows = self.rows(step)[rank::world_size] # (b,)
        x, y = self.x.index_select(0, rows), self.y.index_select(0, rows)
        if any(self.spec.values()):
            # drawn on the CPU and for all ranks, so that neither the device nor the number of ranks matters; the 1
            # keeps this stream apart from those of the epochs
            params = draw(np.random.RandomState([self.seed, step, 1]), B, self.spec)
            own = {name: p[rank::world_size].to(x.device) for name, p in params.items()}
            x = augment(x.float(), **own)
        return self.finish(x), y

    def fixed(self, first, count):
        """
        Return images first..first+count-1 without augmentation, in the order that they came in: x (count, C, S, S)
        float32, y (count,).
        """
        if not 0 <= first < first + count <= len(self.x):
            raise ValueError(f"images {first}..{first + count - 1} were asked for, there are {len(self.x)}")
        return self.finish(self.x[first:first + count]), self.y[first:first + count]

    def finish(self, x):
        """Resize and normalise x (b, C, H, W), which is uint8, or float in 0..255 and then overwritten."""
        x = x.float() # the one copy that bytes need
        if x.shape[2:] != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", align_corners=False, antialias=False)
        if x.size(1) == self.scale.size(1):
            x.mul_(self.scale)
        else:
            x = x * self.scale # one channel becomes three
        return x.add_(self.shift)
