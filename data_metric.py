"""
What train_metric.py reads beside data_vision.py: folders of images, a part of the classes held out of training, and
batches of some images from each class.

A folder of images has a folder for each class, with .jpg, .jpeg, .png or .bmp files anywhere below it:

    data/cars/train/<class>/..., data/cars/test/<class>/...   as published; val in place of test, as in Tiny-ImageNet
    data/cub/<class>/...                                      without such parts a fifth of each class is the test's

This is how Cars196, CUB-200-2011 and Tiny-ImageNet lie once they are unpacked and sorted by class.
"""
import hashlib
import os
from dataclasses import dataclass

import numpy as np
import torch

from data_vision import DATASETS, Batches, Images, load, split

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp")


# -----------------------------------------------------------------------------
# folders of images

def folders_in(path):
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))


def images_below(path):
    """The paths of the image files at or below a folder, in order."""
    found = []
    for folder, _, names in os.walk(path):
        found += [os.path.join(folder, name) for name in names if name.lower().endswith(ENDINGS)]
    return sorted(found)


def read_image(path, size):
    """The pixels (3, size, size) uint8 of an image file. Raises ValueError where it is none."""
    try:
        from PIL import Image
    except ImportError as e:
        raise ImportError(f"image files need pillow: pip install pillow ({e})") from None
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e: # what PIL raises
        raise ValueError(f"{path} cannot be read as an image ({type(e).__name__}: {e})") from None
    return pixels.transpose(2, 0, 1)


def read_part(folder, classes, size):
    """x (N, 3, size, size), y (N,) of the class folders that are in this one; classes: all names."""
    x, y = [], []
    for label, name in enumerate(classes):
        for path in images_below(os.path.join(folder, name)):
            x.append(read_image(path, size))
            y.append(label)
    if not x:
        raise ValueError(f"{folder} holds no class folder with images ({', '.join(ENDINGS)})")
    return np.ascontiguousarray(np.stack(x)), np.array(y)


def image_folder(path, size):
    """The Images of a folder of images, each resized to a square. Raises ValueError for one that holds no such."""
    names = folders_in(path)
    test = "test" if "test" in names else "val"
    if {"train", test} <= set(names):
        folders = [os.path.join(path, name) for name in ("train", test)]
        classes = sorted({name for folder in folders for name in folders_in(folder)})
        (train_x, train_y), (test_x, test_y) = (read_part(folder, classes, size) for folder in folders)
    else:
        classes = names
        x, y = read_part(path, classes, size)
        train, held = split(y, 0.2, seed=0)
        train_x, train_y, test_x, test_y = x[train], y[train], x[held], y[held]
    few = [name for label, name in enumerate(classes) if (train_y == label).sum() < 2]
    if few or len(classes) < 2:
        raise ValueError(f"{path} has {len(classes)} classes, of fewer than 2 training images: {few or 'none'}; it "
                         "takes two classes, of two images each")
    sha = hashlib.sha256()
    for a in (train_x, train_y, test_x, test_y):
        sha.update(f"{a.dtype} {a.shape}".encode())
        sha.update(a)
    tensors = map(torch.from_numpy, (train_x, train_y, test_x, test_y))
    return Images(*tensors, len(classes), path, "", sha.hexdigest()[:16])


def load_any(dataset, data_dir, size):
    """The Images of a dataset of data_vision.py, or else of the folder data_dir/dataset at this size in pixels."""
    path = os.path.join(data_dir, dataset)
    if dataset == "digits" or dataset in DATASETS:
        return load(dataset, data_dir)
    if not os.path.isdir(path):
        raise ValueError(f"there is no dataset {dataset!r}, only digits, {', '.join(DATASETS)}, and folders of images: "
                         f"{path} is none")
    if not size:
        raise ValueError(f"the images of {path} differ in size: set --image_size, such as 64")
    return image_folder(path, size)


# -----------------------------------------------------------------------------
# classes held out

@dataclass
class Parts:
    """Images x (N, C, H, W) and labels y (N,), those of the classes that are trained on numbered from 0 on."""
    train: tuple
    val: tuple
    test: tuple
    other_train: tuple # of the classes held out, with their own labels; empty where there are none
    other_test: tuple
    classes: list # that are trained on


def parts(images, held_out, val_fraction, seed):
    """
    Hold held_out classes, drawn by the seed, out of training, and a part of the others' training images for
    validation. Raises ValueError where fewer than two classes stay on either side, and for a part that has no two
    images of one class, in which nothing can be retrieved.
    """
    K = images.num_classes
    if K - held_out < 2 or held_out == 1:
        raise ValueError(f"held_out is {held_out}: of {K} classes 0, or 2 to {K - 2}, can be held out")
    order = np.random.RandomState([seed, 3]).permutation(K)
    classes = sorted(order[held_out:].tolist())
    number = torch.full((K,), -1)
    number[classes] = torch.arange(len(classes))

    def of(x, y, is_trained):
        chosen = (number[y] >= 0) == is_trained
        return x[chosen], number[y[chosen]] if is_trained else y[chosen]
    x, y = of(images.train_x, images.train_y, True)
    train, val = split(y, val_fraction, seed)
    found = Parts((x[train], y[train]), (x[val], y[val]), of(images.test_x, images.test_y, True),
                  of(images.train_x, images.train_y, False), of(images.test_x, images.test_y, False), classes)
    retrieved = {"validation images": found.val, "test images": found.test}
    if held_out:
        retrieved["test images of the classes held out"] = found.other_test
    for name, (_, labels) in retrieved.items():
        if not len(labels) or labels.bincount().max() < 2:
            raise ValueError(f"no two {name} are of one class, nothing can be retrieved: there are {len(labels)}; a "
                             "larger val_fraction, or another held_out, may help")
    return found


class ClassBatches(Batches):
    """
    Batches of P classes with batch_size // P images of each, drawn anew for each step: a pure function of (seed, step).
    P is classes_per_batch, or all classes for 0. A class of fewer images gives some of them twice.
    """

    def __init__(self, x, y, batch_size, classes_per_batch, *args, **settings):
        num_classes = int(y.max()) + 1
        P = classes_per_batch or num_classes
        if not 2 <= P <= num_classes or batch_size < 2 * P:
            raise ValueError(f"batch_size={batch_size} and classes_per_batch={classes_per_batch}: a batch takes 2 to "
                             f"{num_classes} classes, and two images of each at least")
        super().__init__(x, y, batch_size, *args, **settings)
        self.steps_per_epoch = max(len(x) // batch_size, 1)
        self.num_classes, self.per_class = num_classes, batch_size // P
        self.batch_size = P * self.per_class
        self.of_class = [torch.nonzero(y == k)[:, 0].numpy() for k in range(num_classes)]

    def rows(self, step):
        rng = np.random.RandomState([self.seed, step, 2])
        rows = []
        for k in rng.permutation(self.num_classes)[:self.batch_size // self.per_class]:
            own = self.of_class[k]
            rows.append(rng.choice(own, self.per_class, replace=len(own) < self.per_class))
        return torch.from_numpy(np.concatenate(rows)).to(self.x.device)
