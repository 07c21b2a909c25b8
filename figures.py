"""
Every picture, drawn from what a run has left in its folder, or from a table: nothing is trained, no script is imported.

$ python figures.py out/demo
$ python figures.py out/digits out/pixels

This draws a run's pictures again: loss.png of a run of train.py, curves.png and learned.png of one of train_vision.py.
The training scripts call the same functions at their end; bench.py and report.py draw their tables with those below.
matplotlib is imported when the first picture is made, so that who draws none does not need it.
"""
import json
import math
import os
import pickle
import sys
import zipfile
from operator import itemgetter

import numpy as np
import torch

import metrics
from distances import find, parse_head
from run import read_metrics


def new_figure(width, height, rows=1, columns=1, **settings):
    """
    A matplotlib Figure of so many inches, and its axes as Figure.subplots gives them. It is drawn by agg, without a
    window and without pyplot, which would keep every figure until it is closed. Raises ImportError without matplotlib.
    """
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure
    except ImportError as e:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from e
    fig = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    matplotlib.backends.backend_agg.FigureCanvasAgg(fig)
    return fig, fig.subplots(rows, columns, **settings)


def colormap(name):
    import matplotlib
    return matplotlib.colormaps[name]


def tidy(ax):
    ax.spines[["top", "right"]].set_visible(False)


def plot(ax, rows, x, y, **style):
    """A line through the points (row[x], row[y])."""
    ax.plot([row[x] for row in rows], [row[y] for row in rows], **style)

# -----------------------------------------------------------------------------
# a run's folder


def read_config(out_dir):
    """The contents of config.json. Raises ValueError where the folder is not that of a run."""
    path = os.path.join(out_dir, "config.json")
    try:
        with open(path, encoding="utf-8") as f:
            info = json.load(f)
        known = info["script"] in PICTURES
    except FileNotFoundError:
        raise ValueError(f"{out_dir} is not a run's folder: it has no config.json") from None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is not that of a run ({type(e).__name__}: {e})") from None
    if not known:
        raise ValueError(f"{path}: there are no pictures of runs of {info['script']!r}, only of {', '.join(PICTURES)}")
    return info


def read_log(out_dir):
    """(log lines, evaluations) of metrics.jsonl, as dicts. Raises ValueError before the first evaluation."""
    rows, _ = read_metrics(out_dir)
    logs = [row for row in rows if row["kind"] == "train"]
    evals = [row for row in rows if row["kind"] == "eval"]
    if not evals:
        raise ValueError(f"{out_dir}: metrics.jsonl has no evaluation yet, there is nothing to draw")
    return logs, evals


def read_probe(out_dir):
    """The arrays of probe.npz by name: h (N, D), y (N,), and in some runs class_means (K, D). Raises ValueError."""
    path = os.path.join(out_dir, "probe.npz")
    try:
        with np.load(path) as f:
            arrays = dict(f)
        h, y = arrays.pop("h"), arrays.pop("y")
        return dict(h=h.astype(np.float64), y=y, **arrays)
    except FileNotFoundError:
        raise ValueError(f"there is no {path}: it is written when a run ends") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise ValueError(f"{path} cannot be read ({type(e).__name__})") from None


def read_prototypes(out_dir):
    """head.weight (V, D) of best.pt, as a float32 array. Raises ValueError."""
    path = os.path.join(out_dir, "best.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["model"]
        return state["head.weight"].float().numpy()
    except FileNotFoundError:
        raise ValueError(f"there is no {path}, whose prototypes would be drawn") from None
    except (OSError, RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as e:
        raise ValueError(f"{path} cannot be read ({type(e).__name__})") from None


def head_in_words(info):
    """The description of the head in config.json; older runs have none there, and their settings stand in for it."""
    if "head" in info:
        return info["head"]
    c = info["config"]
    arguments = parse_head(c["distance"], c["variant"], c["distance_params"])
    variant, _ = find(arguments["distance"], arguments["variant"])
    if variant is None:
        return arguments["distance"]
    return f"{arguments['distance']} ({variant}), {c['link']}, n={info['n']:.4g}" + " learned" * c["learn_n"]


def save(fig, path, **settings):
    fig.savefig(path, **{"dpi": 150, **settings})
    return path


def loss(out_dir):
    """loss.png: training and validation loss over tokens."""
    info, (logs, evals) = read_config(out_dir), read_log(out_dir)
    fig, ax = new_figure(7, 4.2)
    from matplotlib.ticker import EngFormatter
    plot(ax, logs, "tokens", "loss", color="0.7", lw=1, label="training")
    plot(ax, evals, "tokens", "val_loss", color="C0", lw=2, marker="o", ms=4, label="validation")
    end, val_loss = evals[-1]["tokens"], evals[-1]["val_loss"]
    ax.annotate(f"{val_loss:.3f}", (end, val_loss), (6, 0), textcoords="offset points", va="center", color="C0",
                annotation_clip=False)
    uniform = math.log(info["model_args"]["vocab_size"])
    ax.axhline(uniform, color="0.5", lw=1, ls=":")
    ax.annotate("uniform guess", (end, uniform), (0, 3), textcoords="offset points", ha="right", color="0.5",
                fontsize=8)
    ax.set(xlabel="training tokens", ylabel="loss (nats per token)")
    ax.set_title(f"{info['config']['dataset']}, head {head_in_words(info)}", fontsize=9)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    tidy(ax)
    ax.legend(frameon=False, loc="center right")
    return save(fig, os.path.join(out_dir, "loss.png"))


def curves(out_dir):
    """curves.png: loss and validation accuracy over epochs."""
    info, (logs, evals) = read_config(out_dir), read_log(out_dir)
    fig, (left, right) = new_figure(9, 3.6, 1, 2)
    last = evals[-1]
    if last["epoch"] > 0: # an evaluation stands at an epoch's end, and tells how many steps an epoch has
        steps_per_epoch = last["step"] / last["epoch"]
        epochs = [row["step"] / steps_per_epoch for row in logs]
        left.plot(epochs, [row["loss"] for row in logs], color="0.7", lw=1, label="training")
    plot(left, evals, "epoch", "val_loss", color="C0", lw=2, label="validation")
    left.set(xlabel="epoch", ylabel="loss (nats)")
    left.legend(frameon=False)
    best = next(row for row in evals if row["val_accuracy"] == last["best_accuracy"])
    right.plot([row["epoch"] for row in evals], [100 * row["val_accuracy"] for row in evals], color="C0", lw=2)
    right.plot(best["epoch"], 100 * best["val_accuracy"], "o", color="C0")
    right.set_title(f"best {best['val_accuracy']:.2%} at epoch {best['epoch']}", fontsize=9, color="C0")
    right.set(xlabel="epoch", ylabel="validation accuracy (%)")
    for ax in (left, right):
        tidy(ax)
    fig.suptitle(f"{info['config']['dataset']}, {info['config']['model']}, head {head_in_words(info)}", fontsize=9)
    return save(fig, os.path.join(out_dir, "curves.png"))


def learned(out_dir):
    """
    learned.png: prototypes and class means in the plane of the features' top two components; the prototypes of a head
    straight on pixels are drawn as the images that they are.
    """
    info = read_config(out_dir)
    c, num_classes = info["config"], info["data"]["num_classes"]
    prototypes = read_prototypes(out_dir)[:num_classes]
    if c["model"] == "pixels":
        fig = images(prototypes.reshape(num_classes, *info["model_args"]["image_shape"]))
    else:
        directions = parse_head(c["distance"])["distance"] == "cosine"
        fig = plane(prototypes, directions=directions, **read_probe(out_dir))
    fig.suptitle(f"{c['dataset']}, {c['model']}, {head_in_words(info)}", fontsize=9)
    return save(fig, os.path.join(out_dir, "learned.png"))


def images(pictures):
    """The Figure of pictures (K, C, H, W), each from black at its least value to white at its largest."""
    num_classes = len(pictures)
    columns = 5 if num_classes <= 10 else 10
    rows = -(-num_classes // columns)
    fig, axes = new_figure(1.1 * columns, 1.25 * rows + 0.3, rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for k, (picture, ax) in enumerate(zip(pictures, axes.flat)):
        picture = (picture - picture.min()) / max(np.ptp(picture), 1e-12)
        ax.imshow(picture.transpose(1, 2, 0).squeeze(), cmap="gray")
        ax.set_title(k, fontsize=9, pad=2)
    return fig


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def plane(prototypes, h, y, class_means=None, directions=False):
    """
    The Figure of features h (N, D) of the classes y (N,), their class means (K, D) and the prototypes (K, D), in the
    plane of the top two principal components of h. class_means: those of h, unless given. directions: every vector is
    first scaled to length 1, as the cosine distance compares directions.
    """
    num_classes = len(prototypes)
    if class_means is None:
        class_means = metrics.class_means(h, y, num_classes)
    if directions:
        h, class_means, prototypes = unit(h), unit(class_means), unit(prototypes)
    centre = h.mean(0)
    _, s, components = np.linalg.svd(h - centre, full_matrices=False)
    first = metrics.explained_variance(s, 1)
    second = metrics.explained_variance(s, 2) - first
    points, means, stars = ((x - centre) @ components[:2].T for x in (h, class_means, prototypes))
    fig, ax = new_figure(6, 5)
    few = num_classes <= 10
    colours = colormap("tab10") if few else colormap("gist_ncar").resampled(num_classes)
    for k in range(num_classes):
        colour = colours(k)
        ax.scatter(*points[y == k].T, s=7, color=colour, alpha=0.5, lw=0)
        ax.plot(*zip(means[k], stars[k]), color=colour, lw=1)
        ax.scatter(*means[k], s=40, color=colour, edgecolor="k", lw=0.8, zorder=3)
        ax.scatter(*stars[k], s=90, color=colour, edgecolor="k", lw=0.8, marker="*", zorder=4)
        if few:
            ax.annotate(k, stars[k], (6, 4), textcoords="offset points", fontsize=9)
    marks = (".", 6, "test images", "0.6"), ("o", 6, "class mean", "k"), ("*", 10, "prototype", "k")
    for marker, size, name, edge in marks:
        ax.plot([], [], marker, color="0.6", mec=edge, mew=0.8, ms=size, label=name)
    ax.legend(frameon=False, fontsize=8)
    ax.set(xlabel=f"first component ({first:.0%} of the variance)", ylabel=f"second component ({second:.0%})")
    tidy(ax)
    return fig


# the pictures of a run, by the script that made it
PICTURES = {"train.py": (loss,), "train_vision.py": (curves, learned)}


def draw(out_dir):
    """
    Draw every picture of the run in this folder and return their paths. Raises ValueError where the folder is not that
    of a run, or lacks what a picture shows, and ImportError without matplotlib.
    """
    return [picture(out_dir) for picture in PICTURES[read_config(out_dir)["script"]]]

# -----------------------------------------------------------------------------
# tables


def growth(rows, base, path):
    """
    Save a picture of the time and memory of heads over N, V and D, one of which grows at a time from `base` (N, V, D),
    and return its path. rows: dicts with head, ms, MiB, and the size as raw["NVD"].
    """
    names = list(dict.fromkeys(row["head"] for row in rows))
    colours = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9") # Okabe and Ito's, for every eye
    styles = {name: dict(color=colours[i % 6], marker="osD^vP"[i % 6]) for i, name in enumerate(names)}
    styles["linear + CE"] = dict(color="black", marker="x", ls="--")
    fig, axes = new_figure(10, 6, 2, 3, sharey="row", sharex="col")
    for j, letter in enumerate("NVD"):
        others = [k for k in range(3) if k != j]
        cases = []
        for row in rows:
            NVD = row["raw"]["NVD"]
            if all(NVD[k] == base[k] for k in others):
                cases.append({**row, "size": NVD[j]})
        cases.sort(key=itemgetter("size"))
        sizes = sorted({case["size"] for case in cases})
        fixed = ", ".join(f"{'NVD'[k]} = {base[k]:,}" for k in others)
        for ax, key, title in zip(axes[:, j], ("ms", "MiB"), ("ms, forward and backward", "peak memory, MiB")):
            for name in names:
                mine = [case for case in cases if case["head"] == name]
                plot(ax, mine, "size", key, ms=5, lw=1.5, label=name, **styles[name])
            low = min(case[key] for case in cases) / 2
            ax.plot(sizes, [low * size / sizes[0] for size in sizes], color="0.6", lw=1, ls=":", label="proportional")
            ax.set(xscale="log", yscale="log", ylabel=title if j == 0 else "")
            ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
            ax.minorticks_off()
            tidy(ax)
            ax.grid(color="0.92")
        axes[1, j].set_xlabel(f"{letter} ({fixed})")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    return save(fig, path)


def main(argv):
    if "-h" in argv or "--help" in argv:
        print(__doc__.strip())
        return
    if not argv:
        raise SystemExit("no folder given: python figures.py out/demo")
    problems = []
    for out_dir in argv:
        try:
            for picture in PICTURES[read_config(out_dir)["script"]]:
                print(picture(out_dir))
        except (ValueError, ImportError) as e:
            problems.append(str(e))
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main(sys.argv[1:])
