"""
The images that train_vision.py reads: load() finds a dataset, split() cuts a validation part off, Batches gives batches out.

  digits     1,797 of 8x8, part of scikit-learn: needs no network and no files
  mnist      data/mnist/: the original IDX files, train-images-idx3-ubyte and its three fellows, as they are or as .gz
  cifar10    data/cifar10/, or as the archive unpacks: data/cifar-10-batches-bin/ or data/cifar-10-batches-py/
  cifar100   data/cifar100/, or data/cifar-100-binary/ or data/cifar-100-python/
Without these files: data/<dataset>/images.npz, which the download from the huggingface hub leaves there.
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

from data import PlainUnpickler, within

# mean and standard deviation of pixels in 0..1, for each channel or for all, as in the paper's C.1
STATS = {
    "half": ((0.5,), (0.5,)),
    "digits": ((0.3059,), (0.3764,)), # of the training part
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
# flip: probability of a horizontal one. padding: zeros around, in pixels, before the crop. degrees: rotation, at most, either way.
# the rest is colour jitter: factors from [1 - b, 1 + b], and hue as a part of the circle from [-h, h]
NO_JITTER = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
AUGMENTATIONS = {
    "none": {"flip": 0.0, "padding": 0, "degrees": 0.0, **NO_JITTER},
    "crop": {"flip": 0.0, "padding": 4, "degrees": 10.0, **NO_JITTER}, # a digit must not be mirrored
    "standard": {"flip": 0.5, "padding": 4, "degrees": 10.0, **NO_JITTER},
    "strong": {"flip": 0.5, "padding": 4, "degrees": 15.0,
               "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.1},
}


@dataclass
class Images:
    """A dataset in memory, on the CPU."""
    train_x: torch.Tensor # (N, C, H, W) uint8
    train_y: torch.Tensor # (N,) int64, 0..num_classes-1
    test_x: torch.Tensor # (M, C, H, W) uint8
    test_y: torch.Tensor # (M,) int64
    num_classes: int
    source: str # where it comes from, for people
    hash: str # of all arrays, wherever they come from: which data a run saw


# -----------------------------------------------------------------------------
# reading files

class Parts:
    """
    Stands in for numpy's ndarray and dtype while a pickle is read: keeps what they would be made of, so that none of numpy's own
    code runs on a stranger's values. array() makes the array, of plain numbers only.
    """

    def __init__(self, *args):
        self.args, self.state = args, None

    def __setstate__(self, state):
        self.state = state

    def array(self):
        _, shape, dtype, fortran, raw = self.state
        # from python 2 they come as bytes
        code, order = (s.decode("ascii") if isinstance(s, bytes) else s for s in (dtype.args[0], dtype.state[1]))
        if code[0] not in "biuf" or not code[1:].isdigit() or order not in "<>|=":
            raise ValueError(f"an array of dtype {code!r}")
        return np.frombuffer(raw, np.dtype(order + code)).reshape(shape, order="F" if fortran else "C")


class ArrayUnpickler(PlainUnpickler):
    """builds what PlainUnpickler does, bytes, and Parts for numpy arrays; refuses anything else"""
    allowed = {(module, "_reconstruct"): Parts for module in ("numpy.core.multiarray", "numpy._core.multiarray")}
    allowed |= {("numpy", "ndarray"): Parts, ("numpy", "dtype"): Parts}
    allowed |= {("_codecs", "encode"): bytes} # bytes('text', 'latin1') is what protocol 2 means by it

    def find_class(self, module, name):
        return self.allowed.get((module, name)) or super().find_class(module, name)


def read_bytes(path):
    """what is in a file, or in a .gz. ValueError when the .gz is damaged."""
    with open(path, "rb") as f:
        raw = f.read()
    try:
        return gzip.decompress(raw) if path.endswith(".gz") else raw
    except (OSError, EOFError, zlib.error) as e:
        raise ValueError(f"{path} is damaged, {len(raw)} bytes that do not unpack: {e}") from None


def find(folder, name):
    """The path of a file in folder, or of its .gz, or with the dot that some unpackers put before idx; None when there is none."""
    for variant in name, name.replace("-idx", ".idx"):
        for ending in "", ".gz":
            path = os.path.join(folder, variant + ending)
            if os.path.isfile(path):
                return path
    return None


def idx_array(path, ndim):
    """the uint8 array of ndim dimensions in one IDX file. ValueError when it is damaged or another kind of file."""
    raw, start = read_bytes(path), 4 + 4 * ndim
    if len(raw) < start:
        raise ValueError(f"{path} is truncated: {len(raw)} bytes, its header alone has {start}")
    magic, *shape = (int(n) for n in np.frombuffer(raw, ">u4", 1 + ndim))
    if magic != 0x800 + ndim: # 8: unsigned bytes
        raise ValueError(f"{path} has the magic number {magic}, expected {0x800 + ndim}: "
                         f"it is no IDX file of {ndim} dimension(s)")
    expected = start + math.prod(shape)
    if len(raw) != expected:
        raise ValueError(f"{path} is {'truncated' if len(raw) < expected else 'too long'}: expected {expected} bytes for {shape}, found {len(raw)}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def read_idx(path, num_classes):
    """x (n, 1, H, W), y (n,) of MNIST's pair of files; path is that of the images"""
    folder, name = os.path.split(path)
    name = name.removesuffix(".gz").replace("images", "labels").replace(".idx", "-idx").replace("idx3", "idx1")
    labels = find(folder, name)
    if not labels:
        raise ValueError(f"{path} has no labels: there is no {name} beside it")
    x, y = idx_array(path, 3)[:, None], idx_array(labels, 1)
    return check(f"{path} with {os.path.basename(labels)}", x, y, num_classes)


def read_binary(path, num_classes):
    """x (n, 3, 32, 32), y (n,) of one file of the CIFARs' binary version"""
    raw = read_bytes(path)
    num_labels = 2 if num_classes == 100 else 1 # CIFAR-100: coarse, then fine
    size = num_labels + 3072
    if len(raw) % size:
        raise ValueError(f"{path} is truncated: expected records of {size} bytes, {-(-len(raw) // size) * size} in all, found {len(raw)}")
    records = np.frombuffer(raw, np.uint8).reshape(-1, size)
    return check(path, records[:, num_labels:].reshape(-1, 3, 32, 32), records[:, num_labels - 1], num_classes)


def read_pickle(path, num_classes):
    """x (n, 3, 32, 32), y (n,) of one file of the CIFARs' python version. ValueError when it is damaged or could run code."""
    raw = read_bytes(path)
    try:
        batch = ArrayUnpickler(io.BytesIO(raw), encoding="bytes").load()
        batch = {k.decode() if isinstance(k, bytes) else k: v.array() if isinstance(v, Parts) else v for k, v in batch.items()}
        x, y = np.asarray(batch["data"]), np.asarray(batch["fine_labels" if num_classes == 100 else "labels"])
    except Exception as e: # a damaged pickle can raise nearly anything
        raise ValueError(f"{path} was refused, {len(raw)} bytes: {type(e).__name__}: {e}") from None
    if x.ndim != 2 or x.shape[1] != 3072:
        raise ValueError(f"{path} has data of shape {x.shape}, expected (n, 3072)")
    return check(path, x.reshape(-1, 3, 32, 32), y, num_classes)


def check(path, x, y, num_classes):
    """x uint8, y int64, looked over. ValueError, with the file's name, when they are not images (n, C, H, W) and their labels."""
    if x.dtype != np.uint8 or x.ndim != 4 or not x.size:
        raise ValueError(f"{path} holds no images: {x.dtype} of shape {x.shape}")
    if y.dtype.kind not in "iu" or y.ndim != 1 or len(x) != len(y):
        raise ValueError(f"{path}: {len(x)} images, but labels of shape {y.shape} and {y.dtype}")
    wrong = np.flatnonzero((y < 0) | (y >= num_classes))
    if len(wrong):
        raise ValueError(f"{path}: label {y[wrong[0]]} of image {wrong[0]} is not in 0..{num_classes - 1}")
    return x, y.astype(np.int64)


# -----------------------------------------------------------------------------
# where a dataset comes from: each of these returns (train_x, train_y, test_x, test_y, source), or None where there are no files

BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
# num_classes; how the images are; the hub's name; folders beside its own; kinds of files: reader, for training, for test
DATASETS = {
    "mnist": (10, "L", "ylecun/mnist", [], [(read_idx, ["train-images-idx3-ubyte"], "t10k-images-idx3-ubyte")]),
    "cifar10": (10, "RGB", "uoft-cs/cifar10", ["cifar-10-batches-bin", "cifar-10-batches-py"],
                [(read_binary, [f"{name}.bin" for name in BATCHES], "test_batch.bin"), (read_pickle, BATCHES, "test_batch")]),
    "cifar100": (100, "RGB", "uoft-cs/cifar100", ["cifar-100-binary", "cifar-100-python"],
                 [(read_binary, ["train.bin"], "test.bin"), (read_pickle, ["train"], "test")]),
}


def digits():
    """scikit-learn's digits, 1,437 for training and 360 for the test, always the same. ImportError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise ImportError(f"--dataset=digits is part of scikit-learn: pip install scikit-learn ({e})") from None
    images, y = load_digits(return_X_y=True)
    x = np.rint(images * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    train, test = split(y, 360 / 1797, seed=0)
    y = y.astype(np.int64)
    return x[train], y[train], x[test], y[test], "scikit-learn's digits"


def local_files(dataset, data_dir):
    """the original files. ValueError when some are damaged or missing."""
    num_classes, _, _, folders, kinds = DATASETS[dataset]
    for folder in (os.path.join(data_dir, name) for name in (dataset, *folders)):
        for read, train_names, test_name in kinds:
            train, test = [path for name in train_names if (path := find(folder, name))], find(folder, test_name)
            if train and test:
                parts = [read(path, num_classes) for path in train]
                train_x, train_y = (np.concatenate(part) for part in zip(*parts))
                return train_x, train_y, *read(test, num_classes), f"{folder}: {', '.join(map(os.path.basename, (*train, test)))}"
            if train or test:
                raise ValueError(f"{folder} has {os.path.basename((train or [test])[0])}, but no {test_name if train else train_names[0]}")
    return None


def saved(dataset, data_dir):
    """images.npz. ValueError when it is damaged."""
    path = os.path.join(data_dir, dataset, "images.npz")
    if not os.path.exists(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as f:
            train_x, train_y, test_x, test_y = (f[name] for name in ("train_x", "train_y", "test_x", "test_y"))
    except Exception as e: # not a zip, a truncated one, an array missing, or of objects
        raise ValueError(f"{path} is damaged, delete it to download it again: {type(e).__name__}: {e}") from None
    num_classes = DATASETS[dataset][0]
    return *check(f"{path}, train", train_x, train_y, num_classes), *check(f"{path}, test", test_x, test_y, num_classes), path


def download(dataset, data_dir):
    """From the huggingface hub (or its local cache) into images.npz. ConnectionError, one line, when that fails."""
    num_classes, mode, hub, folders, kinds = DATASETS[dataset]
    folder = os.path.join(data_dir, dataset)
    try:
        import datasets
        builder = within(60, datasets.load_dataset_builder, hub) # then it is known that the hub answers
        builder.download_and_prepare()
        parts = builder.as_dataset()
    except Exception as e: # httpx's errors are not even OSErrors
        files = " or ".join(f"{train[0]}{', ...' if len(train) > 1 else ''} and {test}" for _, train, test in kinds)
        places = ", ".join([folder, *(os.path.join(data_dir, name) for name in folders)])
        raise ConnectionError(f"{dataset} is not there, and cannot be downloaded as {hub} ({type(e).__name__}). looked in {places}. without network: "
                              f"put the original files ({files}) there, or images.npz into {folder}, or use --dataset=digits") from None
    arrays = {}
    for part in "train", "test":
        if part not in parts:
            raise ValueError(f"{hub} has no {part} split, only {sorted(parts)}")
        features = parts[part].features
        image = next((name for name, feature in features.items() if isinstance(feature, datasets.Image)), None)
        label = next((name for name in ("fine_label", "label") if name in features), None)
        if not image or not label:
            raise ValueError(f"{hub} has no column of images and one of labels, only {list(features)}")
        x = [np.asarray(row.convert(mode)) for row in parts[part][image]]
        odd = next((i for i, row in enumerate(x) if row.shape != x[0].shape), None)
        if odd is not None:
            raise ValueError(f"{hub}, {part}: image {odd} is {x[odd].shape}, image 0 is {x[0].shape}")
        x = np.stack(x).reshape(len(x), *x[0].shape[:2], -1).transpose(0, 3, 1, 2) # (n, C, H, W)
        arrays[f"{part}_x"], arrays[f"{part}_y"] = check(f"{hub}, {part}", np.ascontiguousarray(x), np.asarray(parts[part][label]), num_classes)
    os.makedirs(folder, exist_ok=True)
    tmp = os.path.join(folder, f"images.npz.{os.getpid()}.tmp") # ranks may do this side by side
    try:
        with open(tmp, "wb") as f:
            np.savez(f, **arrays)
        os.replace(tmp, os.path.join(folder, "images.npz"))
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)
    return *arrays.values(), f"{hub}, saved as {os.path.join(folder, 'images.npz')}"


def load(dataset, data_dir="data"):
    """
    The Images of 'digits', 'mnist', 'cifar10' or 'cifar100': from files (see the top of this file), else downloaded once.
    ValueError for an unknown name, for damaged, missing or ill-matched files, and for a class without a training image;
    ConnectionError when there are no files and the download fails; ImportError for digits without scikit-learn.
    """
    if dataset == "digits":
        num_classes, found = 10, digits()
    elif dataset in DATASETS:
        num_classes, found = DATASETS[dataset][0], local_files(dataset, data_dir) or saved(dataset, data_dir) or download(dataset, data_dir)
    else:
        raise ValueError(f"there is no dataset {dataset!r}, only digits, {', '.join(DATASETS)}")
    *arrays, source = found
    train_x, train_y, test_x, _ = arrays
    if train_x.shape[1:] != test_x.shape[1:]:
        raise ValueError(f"{source}: training images are {train_x.shape[1:]}, test images {test_x.shape[1:]}")
    empty = np.flatnonzero(np.bincount(train_y, minlength=num_classes) == 0)
    if len(empty):
        raise ValueError(f"{source}: no training image of class {', '.join(map(str, empty))}, "
                         f"{dataset} has {num_classes} classes")
    sha = hashlib.sha256()
    for i, a in enumerate(arrays):
        arrays[i] = np.require(a, requirements="CW") # torch wants to be able to write
        sha.update(f"{a.dtype} {a.shape}".encode())
        sha.update(arrays[i])
    return Images(*map(torch.from_numpy, arrays), num_classes, source, sha.hexdigest()[:16])


def split(labels, val_fraction, seed):
    """
    Cuts the training images (labels (N,)) into train_idx, val_idx: sorted int64 arrays that share nothing and cover 0..N-1.

    Each class gives its part of the round(val_fraction * N) for validation, to within one. A pure function of the arguments.
    ValueError when val_fraction is not between 0 and 1, or a class would have no image left in one of the two.
    """
    labels = np.asarray(labels)
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * val_fraction
    take = np.floor(exact).astype(np.int64)
    take[np.argsort(take - exact, kind="stable")[:round(len(labels) * val_fraction) - take.sum()]] += 1 # the largest remainders
    short = (take == 0) | (take == counts)
    if short.any():
        raise ValueError(f"val_fraction={val_fraction} leaves class {classes[short][0]}, of {counts[short][0]} image(s), without one for "
                         f"{'validation' if take[short][0] == 0 else 'training'}")
    rng = np.random.RandomState(seed) # its stream is frozen: a new numpy may not change the split
    is_val = np.zeros(len(labels), bool)
    for c, n in zip(classes, take):
        is_val[rng.permutation(np.flatnonzero(labels == c))[:n]] = True
    return np.flatnonzero(~is_val).astype(np.int64), np.flatnonzero(is_val).astype(np.int64)


# -----------------------------------------------------------------------------
# augmentation

def draw(rng, count, spec):
    """
    augment's parameters for count images, {name: (count,) tensor} of those that spec, a row of AUGMENTATIONS, uses; rng: a RandomState.
    The same numbers are consumed whatever the row, so that rows can be compared on the same draws.
    """
    u = rng.random_sample((8, count))
    params = {}
    if spec["flip"]:
        params["flip"] = u[0] < spec["flip"]
    if spec["padding"]: # whole pixels
        params["dy"], params["dx"] = np.floor(u[1:3] * (2 * spec["padding"] + 1)) - spec["padding"]
    if spec["degrees"]:
        params["degrees"] = (2 * u[3] - 1) * spec["degrees"]
    for i, name in enumerate(("brightness", "contrast", "saturation"), 4):
        if spec[name]:
            low, high = max(0, 1 - spec[name]), 1 + spec[name]
            params[name] = low + (high - low) * u[i]
    if spec["hue"]:
        params["hue"] = (2 * u[7] - 1) * spec["hue"]
    return {name: torch.from_numpy(p) if p.dtype == bool else torch.from_numpy(p.astype(np.float32)) for name, p in params.items()}


def augment(x, flip=None, dy=None, dx=None, degrees=None, brightness=None, contrast=None, saturation=None, hue=None):
    """
    x (B, C, H, W) float in 0..255, which stays as it is; each parameter is a (B,) tensor on x's device, or None. In this order:

    flip: mirrored where True. dy, dx: the crop of the image in its zero padding starts that many pixels down and right of the image's own
    corner. degrees: rotated about the centre, counter-clockwise. brightness, contrast, saturation: factors as of torchvision's ColorJitter,
    hue: a shift in turns, -0.5..0.5; saturation and hue need 3 channels, and leave other images alone.
    """
    if any(p is not None for p in (flip, dy, dx, degrees)):
        x = warp(x, flip, dy, dx, degrees)
    column = lambda p: p[:, None, None, None]
    if brightness is not None:
        x = (x * column(brightness)).clamp_(0, 255)
    if contrast is not None:
        x = torch.lerp(grey(x).mean((1, 2, 3), keepdim=True), x, column(contrast)).clamp_(0, 255)
    if saturation is not None and x.size(1) == 3:
        x = torch.lerp(grey(x), x, column(saturation)).clamp_(0, 255)
    if hue is not None and x.size(1) == 3:
        x = shift_hue(x, hue)
    return x


def warp(x, flip, dy, dx, degrees):
    """Flip, crop and rotation as one affine map: each pixel of the result is interpolated from one place of x, with zeros around x."""
    B, _, H, W = x.shape
    zeros = x.new_zeros(B)
    side = zeros + 1 if flip is None else 1 - 2 * flip.to(x.dtype) # -1: mirrored
    dy, dx = zeros if dy is None else dy, zeros if dx is None else dx
    angle = zeros if degrees is None else torch.deg2rad(degrees)
    cos, sin = angle.cos(), angle.sin()
    # grid_sample counts in sides of the image; where these are powers of two, no shift by whole pixels is rounded
    h, w = (1 << (n - 1).bit_length() for n in (H, W))
    x = F.pad(x, (0, w - W, 0, h - H)) if (h, w) != (H, W) else x
    v = torch.arange(H, dtype=x.dtype, device=x.device) - (H - 1) / 2 # pixels from the centre, down
    u = torch.arange(W, dtype=x.dtype, device=x.device) - (W - 1) / 2 # and to the right
    # by hand, as affine_grid's matrix product would be rounded to TF32 where that is allowed
    affine = lambda a, b, c, n: (2 / n * torch.outer(a, u))[:, None, :] + (2 / n * (torch.outer(b, v) + c[:, None]) + 1 / n - 1)[:, :, None]
    grid = torch.stack((affine(side * cos, -side * sin, side * dx + (W - 1) / 2, w), affine(sin, cos, dy + (H - 1) / 2, h)), -1) # (B, H, W, 2)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def grey(x):
    """(B, 1, H, W), the luma of (B, 3, H, W), or grey images as they are"""
    if x.size(1) != 3:
        return x
    r, g, b = x.split(1, 1)
    return 0.299 * r + 0.587 * g + 0.114 * b


def shift_hue(x, hue):
    """x (B, 3, H, W) with its hue shifted by hue (B,) turns; saturation and value, in the sense of HSV, stay"""
    r, g, b = x.unbind(1) # (B, H, W)
    value = x.amax(1)
    span = value - x.amin(1)
    safe = torch.where(span > 0, span, 1)
    h = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)) + 6 * hue[:, None, None] # sixths
    channel = lambda n: value - span * torch.minimum(k := (n + h) % 6, 4 - k).clamp_(0, 1)
    return torch.stack((channel(5), channel(3), channel(1)), 1)


# -----------------------------------------------------------------------------
# batches

class Batches:
    """
    Batches of x (N, C, H, W) uint8 and y (N,) int64, which live on the device as they are; images come out float32, normalised.

    An epoch is steps_per_epoch = max(N // batch_size, 1) batches from a permutation of its own, and the rest of that permutation is dropped;
    with fewer than batch_size images, the one batch is all of them. seed: 0..2**32-1. normalize: a name in STATS. augment: a name in
    AUGMENTATIONS, done at the images' own size. image_size: the side that they are then resized to; 0: as they are. channels: 3 makes grey
    images of 3 equal channels, 0: as they are.
    ValueError for what does not fit together.
    """

    def __init__(self, x, y, batch_size, seed, normalize="half", augment="none", image_size=0, channels=0, device="cpu"):
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
        # (x / 255 - mean) / std as x * scale + shift, which also makes three channels of one
        self.scale, self.shift = (s.expand(C).reshape(1, C, 1, 1).float().to(device) for s in (1 / (255 * std), -mean / std))
        self.epoch, self.order = None, None # the current permutation, (N,) on the device

    def train(self, step, rank=0, world_size=1):
        """
        x (b, C, S, S) float32, y (b,): rows rank, rank + world_size, ... of the batch of that step, so that the ranks together have what one would.

        A pure function of (seed, step): what was asked before does not matter, so that evaluating or resuming cannot change it.
        ValueError when the batch has fewer images than there are ranks.
        """
        B = self.batch_size
        if not 0 <= rank < world_size <= B:
            raise ValueError(f"rank {rank} of {world_size} has no part in a batch of {B} images")
        epoch, i = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            order = np.random.RandomState([self.seed, epoch]).permutation(len(self.x)).astype(np.int64)
            self.epoch, self.order = epoch, torch.from_numpy(order).to(self.x.device)
        rows = self.order[i * B + rank:(i + 1) * B:world_size] # (b,)
        x, y = self.x.index_select(0, rows), self.y.index_select(0, rows)
        if any(self.spec.values()):
            # drawn on the CPU and for all ranks, so that neither the device nor their number matters; the 1 keeps it apart from the epochs' streams
            params = draw(np.random.RandomState([self.seed, step, 1]), B, self.spec)
            x = augment(x.float(), **{name: p[rank::world_size].to(x.device) for name, p in params.items()})
        return self.finish(x), y

    def fixed(self, first, count):
        """images first..first+count-1 without augmentation, in the order that they came in: x (count, C, S, S) float32, y (count,)"""
        if not 0 <= first < first + count <= len(self.x):
            raise ValueError(f"images {first}..{first + count - 1} were asked for, there are {len(self.x)}")
        return self.finish(self.x[first:first + count]), self.y[first:first + count]

    def finish(self, x):
        """x (b, C, H, W) uint8, or float in 0..255, which is then overwritten: resized and normalised"""
        x = x.float() # the one copy that bytes need
        if x.shape[2:] != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", align_corners=False, antialias=False)
        return (x.mul_(self.scale) if x.size(1) == self.scale.size(1) else x * self.scale).add_(self.shift)
