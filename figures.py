"""
Every picture, drawn from what a run has left in its folder or from a table: nothing is trained, no script is imported.

$ python figures.py out/demo
$ python figures.py out/digits out/pixels

This draws a run's pictures again: loss.png of a run of train.py, curves.png and learned.png of one of train_vision.py.
The training scripts call the same functions at their end; bench.py and report.py draw their tables with those below.
matplotlib is imported when the first picture is made, so that a script that draws none does not need it.
"""
import io
import math
import os
import sys
import textwrap
from collections import namedtuple
from operator import itemgetter

import numpy as np

import metrics
from data import replacing
from distances import DISTANCES, find, parse_head
from metrics import METRICS
from run_folder import Damaged, read_config, read_probe, read_prototypes, read_rows, readable

# -----------------------------------------------------------------------------
# what the pictures share


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
    axes = fig.subplots(rows, columns, **settings)
    for ax in fig.axes:
        ax.tick_params(labelsize=9)
        if "top" in ax.spines:
            ax.spines[["top", "right"]].set_visible(False)
    return fig, axes


def plot_rows(ax, rows, x, y, **settings):
    """A line through the points (row[x], row[y])."""
    ax.plot([row[x] for row in rows], [row[y] for row in rows], **settings)


def plain(text):
    """The text as it is: matplotlib takes what follows a dollar sign for mathematics."""
    return text.replace("$", r"\$")


def legend(fig, axes, below=False):
    """One legend for several axes, each label once, right of them or below."""
    handles = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    place = dict(loc="outside lower center", ncols=min(3, len(handles))) if below else dict(loc="outside right upper")
    if handles:
        fig.legend(handles.values(), handles.keys(), frameon=False, fontsize=9, **place)


def vector(fig):
    """The bytes of an SVG and of a PDF file, cut to what is drawn, and the same whenever it is drawn again."""
    from matplotlib import rc_context
    files = []
    for kind, date in (("svg", "Date"), ("pdf", "CreationDate")):
        file = io.BytesIO()
        with rc_context({"svg.hashsalt": "distance heads", "pdf.fonttype": 42}): # fonts as publishers ask for
            fig.savefig(file, format=kind, dpi=200, bbox_inches="tight", metadata={date: None})
        files.append(file.getvalue())
    return files


def principal_plane(h):
    """The centre (D,) of h (N, D), its top two principal axes (2, D), and each axis's share of the variance."""
    centre = h.mean(0)
    _, s, axes = np.linalg.svd(h - centre, full_matrices=False)
    first = metrics.explained_variance(s, 1)
    return centre, axes[:2], (first, metrics.explained_variance(s, 2) - first)

# -----------------------------------------------------------------------------
# a run's folder


def read_log(out_dir):
    """(log lines, evaluations) of metrics.jsonl, as dicts. Raises Damaged before the first evaluation."""
    logs, evals, _ = read_rows(out_dir, read_config(out_dir)["script"])
    if not evals:
        raise Damaged(f"{out_dir}: metrics.jsonl has no evaluation yet, there is nothing to draw")
    return logs, evals


def head_in_words(info):
    """The description of the head in config.json; older runs have none there, and their settings stand in for it."""
    if info.get("head"):
        return info["head"]
    c = info["config"]
    arguments = parse_head(c["distance"], c["variant"], c["distance_params"])
    variant, _ = find(arguments["distance"], arguments["variant"])
    if variant is None:
        return arguments["distance"]
    return f"{arguments['distance']} ({variant}), {c['link']}, n={info['n']:.4g}" + " learned" * c["learn_n"]


def title(info, *words):
    """What was trained on what, and the head, in lines that fit over a picture."""
    return plain(textwrap.fill(", ".join([info["config"]["dataset"], *words, f"head {head_in_words(info)}"]), 80))


def save(fig, path):
    """Save a Figure, whole or not at all, and return the path. Raises OSError where the disk does not take it."""
    with replacing(path) as (f,):
        fig.savefig(f, format="png", dpi=150)
    return path


def loss(out_dir):
    """loss.png: training and validation loss over tokens."""
    info, (logs, evals) = read_config(out_dir), read_log(out_dir)
    fig, ax = new_figure(7, 4.2)
    from matplotlib.ticker import EngFormatter
    plot_rows(ax, logs, "tokens", "loss", color="0.7", lw=1, label="training")
    plot_rows(ax, evals, "tokens", "val_loss", color="C0", lw=2, marker="o", ms=4, label="validation")
    end, val_loss = evals[-1]["tokens"], evals[-1]["val_loss"]
    ax.annotate(f"{val_loss:.3f}", (end, val_loss), (6, 0), textcoords="offset points", va="center", color="C0",
                annotation_clip=False)
    uniform = math.log(info["model_args"]["vocab_size"])
    ax.axhline(uniform, color="0.5", lw=1, ls=":")
    ax.annotate("uniform guess", (end, uniform), (0, 3), textcoords="offset points", ha="right", color="0.5",
                fontsize=8)
    ax.set(xlabel="training tokens", ylabel="loss (nats per token)")
    ax.set_title(title(info), fontsize=9)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
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
    plot_rows(left, evals, "epoch", "val_loss", color="C0", lw=2, label="validation")
    left.set(xlabel="epoch", ylabel="loss (nats)")
    left.legend(frameon=False)
    best = next(row for row in evals if row["val_accuracy"] == last["best_accuracy"])
    right.plot([row["epoch"] for row in evals], [100 * row["val_accuracy"] for row in evals], color="C0", lw=2)
    right.plot(best["epoch"], 100 * best["val_accuracy"], "o", color="C0")
    right.set_title(f"best {best['val_accuracy']:.2%} at epoch {best['epoch']}", fontsize=9, color="C0")
    right.set(xlabel="epoch", ylabel="validation accuracy (%)")
    fig.suptitle(title(info, info["config"]["model"]), fontsize=9)
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
    fig.suptitle(title(info, c["model"]), fontsize=9)
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
    centre, axes, shares = principal_plane(h)
    points, means, stars = ((x - centre) @ axes.T for x in (h, class_means, prototypes))
    fig, ax = new_figure(6, 5)
    few = num_classes <= 10
    colours = [f"C{k}" for k in range(10)]
    if not few:
        from matplotlib import colormaps
        colours = colormaps["gist_ncar"](np.arange(num_classes) / num_classes)
    for k, colour in zip(range(num_classes), colours):
        ax.scatter(*points[y == k].T, s=7, color=colour, alpha=0.5, lw=0)
        ax.plot(*zip(means[k], stars[k]), color=colour, lw=1)
        ax.scatter(*means[k], s=40, color=colour, edgecolor="k", lw=0.8, zorder=3)
        ax.scatter(*stars[k], s=90, color=colour, edgecolor="k", lw=0.8, marker="*", zorder=4)
        if few:
            away = -1 if means[k, 0] < stars[k, 0] else 1 # the number stands where the prototype is not
            ax.annotate(k, means[k], (8 * away, 4), textcoords="offset points", fontsize=9, ha="center", zorder=5)
    marks = (".", 6, "test images", "0.6"), ("o", 6, "class mean", "k"), ("*", 10, "prototype", "k")
    for marker, size, name, edge in marks:
        ax.plot([], [], marker, color="0.6", mec=edge, mew=0.8, ms=size, label=name)
    ax.legend(frameon=False, fontsize=8)
    ax.set(xlabel=f"first component ({shares[0]:.0%} of the variance)", ylabel=f"second component ({shares[1]:.0%})")
    return fig


# the pictures of a run, by the script that made it
PICTURES = {"train.py": (loss,), "train_vision.py": (curves, learned), "train_toy.py": ()} # see figures_toy.py


def pictures(out_dir):
    """
    Draw every picture of the run in this folder, and yield the path of each. Raises Damaged where the folder is not
    that of a run, lacks what a picture shows, or cannot be written, and ImportError where matplotlib is missing.
    """
    script = read_config(out_dir)["script"]
    if script not in PICTURES:
        raise Damaged(f"{out_dir} is a run of {script}, whose pictures figures_toy.py or figures_metric.py draws, of a "
                      "whole study")
    for picture in PICTURES[script]:
        with readable(out_dir, "cannot be drawn"):
            path = picture(out_dir)
        yield path


def draw(out_dir):
    """Draw every picture of the run in this folder, see pictures, and return their paths."""
    return list(pictures(out_dir))

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
        for ax, key, name in zip(axes[:, j], ("ms", "MiB"), ("ms, forward and backward", "peak memory, MiB")):
            for head in names:
                mine = [case for case in cases if case["head"] == head]
                plot_rows(ax, mine, "size", key, ms=5, lw=1.5, label=head, **styles[head])
            low = min(case[key] for case in cases) / 2
            ax.plot(sizes, [low * size / sizes[0] for size in sizes], color="0.6", lw=1, ls=":", label="proportional")
            ax.set(xscale="log", yscale="log", ylabel=name if j == 0 else "")
            ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
            ax.minorticks_off()
            ax.grid(color="0.92")
        axes[1, j].set_xlabel(f"{letter} ({fixed})")
    legend(fig, [axes[0, 0]])
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    return save(fig, path)


# -----------------------------------------------------------------------------
# the report's figures: each returns a Figure of a results.Section, for the heads that report.py names

# of different lightness, to be told apart in grey; the baseline is black
COLOURS = dict(baseline="#000000", euclidean="#d55e00", manhattan="#14397d", chebyshev="#8c564b", minkowski="#9acd32",
               cosine="#56b4e9", hamming="#e377c2", canberra="#e6c229", bray_curtis="#009e73", mahalanobis="#6a3d9a",
               offset_l2="#b2182b")


def style(head):
    """Colour by distance, line and marker by variant, hollow markers for the softmin link, grey for gaussian: the same
    in every figure."""
    variants = list(DISTANCES.get(head.distance, ()))
    i = variants.index(head.variant) % 4 if head.variant in variants else 0
    colour = COLOURS.get(head.distance, "#777777")
    face = {"softmin": "w", "gaussian": "#cccccc"}.get(head.link, colour)
    width = 2.2 if head.is_baseline else 1.6
    return dict(color=colour, ls=("-", "--", ":", "-.")[i], lw=width, marker="os^D"[i], ms=5, mfc=face)


def log_if_wide(ax, x):
    """A logarithmic x axis for numbers that lie far apart."""
    if len(x) and max(x) > 8 * min(x) > 0:
        ax.set_xscale("log")


def draw_course(ax, section, heads, key, over=None, rows="evals"):
    """
    Lines of the number `key` of the evaluations or log lines, a mean over seeds per head, over epochs or steps, or over
    the mean of another number, `over`. Returns {head: (x (T,), values (seeds, T))}, both scaled.
    """
    drawn, scale = {}, METRICS[key].scale if key in METRICS else 1
    for head in heads:
        x, values = section.course(head, key, rows)
        if over:
            steps, others = section.course(head, over)
            x = list(1000 * others.mean(0)) if steps == x else []
        if x:
            drawn[head] = x, scale * values
            ax.plot(x, scale * values.mean(0), **style(head), markevery=max(1, len(x) // 8),
                    label=plain(section.labels[head]))
    x = "step" if rows == "logs" else section.x
    ax.set(xlabel="energy (Wh)" if over else x, ylabel=METRICS[key].title if key in METRICS else key)
    return drawn


def leave_out_the_untrained(ax, drawn):
    """Set the limits of the axis of values to what comes after the first one, which would press the rest together."""
    limits = []
    for x, values in drawn.values():
        if len(x) > 2:
            limits += [values[:, 1:].min(), values[:, 1:].max()]
    if limits:
        margin = 0.05 * (max(limits) - min(limits) or 1)
        ax.set_ylim(min(limits) - margin, max(limits) + margin)


def section_curves(section, heads):
    """Validation accuracy and loss over epochs, or validation loss over steps and energy, with bands over the seeds."""
    panels = ("val_accuracy", None), ("val_loss", None)
    if section.family == "language":
        panels = ("val_loss", None), ("val_loss", "energy_kwh_total")
    fig, axes = new_figure(10, 4.3, 1, 2)
    for ax, (key, over) in zip(axes, panels):
        drawn = draw_course(ax, section, heads, key, over)
        for head, (x, values) in drawn.items():
            ax.fill_between(x, values.min(0), values.max(0), color=style(head)["color"], alpha=0.15, lw=0)
        leave_out_the_untrained(ax, drawn)
        if over:
            log_if_wide(ax, [x[-1] for x, _ in drawn.values()])
    legend(fig, axes, below=True)
    return fig


# what is logged over training, and where: a panel each
LOGGED = {"grad_norm": ("gradient norm", "logs"), "prototype_norm": ("mean prototype norm |w|", "evals"),
          "effective_rank": ("effective rank", "evals"), "variance_ratio": ("variance ratio", "evals"),
          "active_ratio": ("active ratio", "evals")}


def courses(section, heads):
    """The courses of those numbers in LOGGED that the heads have, or None."""
    keys = [key for key, (_, rows) in LOGGED.items() if any(section.course(head, key, rows)[0] for head in heads)]
    if not keys:
        return None
    fig, axes = panel_grid(len(keys), 3)
    for ax, key in zip(axes, keys):
        name, rows = LOGGED[key]
        drawn = draw_course(ax, section, heads, key, rows=rows)
        ax.set_ylabel(name)
        if key == "grad_norm" and min(values.min() for _, values in drawn.values()) > 0:
            ax.set_yscale("log")
    legend(fig, axes, below=True)
    return fig


def panel_grid(count, columns, width=3.6, height=3.1):
    """A Figure with so many panels, row by row, and the list of their axes."""
    columns = min(columns, count)
    rows = -(-count // columns)
    fig, axes = new_figure(width * columns, height * rows + 0.6, rows, columns, squeeze=False)
    for ax in axes.flat[count:]:
        ax.axis("off")
    return fig, list(axes.flat[:count])


def all_curves(sections):
    """The validation quality over training, a panel per section, of the heads that are always drawn, or None."""
    sections = [section for section in sections if section.few(0)]
    if not sections:
        return None
    fig, axes = panel_grid(len(sections), 3)
    for ax, section in zip(axes, sections):
        key = "val_accuracy" if section.family == "vision" else "val_loss"
        leave_out_the_untrained(ax, draw_course(ax, section, section.few(0), key))
        ax.set_title(plain(textwrap.fill(section.name, 40)), fontsize=9)
    legend(fig, axes, below=True)
    return fig


def axis_title(key):
    """The metric, and which way is better where that is not upwards."""
    return METRICS[key].title + (", lower is better" if METRICS[key].lower else "")


# a panel of small multiples; points: (label, look as of style(), x, its std or None, y, its std or None)
Panel = namedtuple("Panel", "title xlabel ylabel points")


def multiples(panels):
    """Panels of points with bars of their standard deviations, and one legend."""
    fig, axes = panel_grid(len(panels), 2 if len(panels) in (2, 4) else 3)
    for ax, panel in zip(axes, panels):
        for label, look, x, x_std, y, y_std in panel.points:
            ax.errorbar(x, y, xerr=x_std, yerr=y_std, label=plain(label), **{**look, "ls": "", "ms": 7}, elinewidth=0.8)
        ax.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
        ax.set_title(plain(textwrap.fill(panel.title, 40)), fontsize=9)
        ax.margins(0.12)
        ax.grid(color="0.93")
    legend(fig, axes, below=True)
    return fig


def bars(panels, columns=2):
    """
    Panels of horizontal bars with texts at their ends, the first on top. panels: (xlabel, rows) each, with rows (label,
    look as of style(), value, std or None, text). A row whose value is None has only its text.
    """
    fig, axes = panel_grid(len(panels), columns, 6, 0.6 + 0.34 * max(len(rows) for _, rows in panels))
    for ax, (xlabel, rows) in zip(axes, panels):
        for i, (_, look, value, std, text) in enumerate(rows):
            end, right = 0, True
            if value is not None:
                end, right = value + math.copysign(std or 0, value), value >= 0
                ax.barh(i, value, color=look["color"], height=0.65, xerr=std,
                        error_kw=dict(ecolor="0.35", lw=1, capsize=2))
            ax.annotate(text, (end, i), (4 if right else -4, 0), textcoords="offset points", va="center", fontsize=8,
                        ha="left" if right else "right",
                        color="0.4" if value is None else "k")
        ax.set_yticks(range(len(rows)), [plain(label) for label, *_ in rows], fontsize=9)
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.set_xlabel(plain(textwrap.fill(xlabel, 60)))
        ax.margins(x=0.2)
        ax.axvline(0, color="k", lw=0.8)
    return fig


def pareto(section, points, front):
    """points: {head: (Wh, quality)}; a step line through the heads `front`, from the least energy on."""
    fig, ax = new_figure(7.5, 4.8)
    steps = sorted(points[head] for head in front)
    ax.step(*zip(*steps), where="post", color="0.6", lw=1.2, zorder=0)
    for head, point in points.items():
        ax.plot(*point, **{**style(head), "ls": "", "ms": 8})
    log_if_wide(ax, [wh for wh, _ in points.values()])
    ax.margins(0.16)
    ax.set(xlabel="energy per run (Wh)", ylabel=METRICS[section.quality].title)
    place_labels(ax, [(section.labels[head], point) for head, point in points.items()], steps)
    return fig


def place_labels(ax, labelled, steps):
    """
    Each label beside its point, at the nearest place that holds no other label or point, nor the line through `steps`.
    A label that lies far from its point is joined to it by a thin line.
    """
    from matplotlib.transforms import Bbox
    ax.figure.canvas.draw() # until then nothing has its place
    frame, renderer = ax.get_window_extent(), ax.figure.canvas.get_renderer()
    pixels = ax.transData.transform([point for _, point in labelled])
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in pixels]
    for (x0, y0), (x1, y1) in zip(steps, steps[1:]):
        start, corner, end = ax.transData.transform([(x0, y0), (x1, y0), (x1, y1)])
        taken += [Bbox([start, corner]).padded(1), Bbox([end, corner]).padded(1)]
    directions = [(1, 0, "left"), (-1, 0, "right"), (0.7, 0.7, "left"), (0.7, -0.7, "left"), (-0.7, 0.7, "right"),
                  (-0.7, -0.7, "right"), (0, 1, "center"), (0, -1, "center")]
    places = [(r, r * x, r * y, side) for r in (9, 16, 26, 38, 52, 70) for x, y, side in directions]
    for text, point in labelled:
        for place in places:
            r, dx, dy, side = place
            line = dict(arrowstyle="-", color="0.6", lw=0.6, shrinkA=0, shrinkB=3) if r > 20 else None
            note = ax.annotate(plain(text), point, (dx, dy), textcoords="offset points", fontsize=8, va="center",
                               ha=side, arrowprops=line)
            note.update_positions(renderer)
            box = super(type(note), note).get_window_extent(renderer) # the text without its line
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if (inside and not any(map(box.overlaps, taken))) or place == places[-1]:
                taken.append(box)
                break
            note.remove()


def spectra(section, probes):
    """The singular values of each head's hidden states, divided by the largest. probes: {head: (h (N, D), y (N,))}."""
    fig, ax = new_figure(8, 4.4)
    for head, (h, _) in probes.items():
        s = metrics.spectrum(h)
        s = s[s > 1e-7 * s[0]] / s[0]
        ax.loglog(range(1, len(s) + 1), s, **{**style(head), "marker": None}, label=plain(section.labels[head]))
    ax.set(xlabel="component", ylabel="singular value / the largest")
    legend(fig, [ax])
    return fig


def pca(section, probes, classes):
    """
    Hidden states on their first two principal components, a panel per head on its own scale. probes: {head: (h (N, D),
    y (N,))}. classes: {class: name} of those that are coloured; the rest is grey.
    """
    fig, axes = panel_grid(len(probes), 3, 3.5, 3.2)
    for ax, (head, (h, y)) in zip(axes, probes.items()):
        centre, directions, shares = principal_plane(h)
        points = (h - centre) @ directions.T
        rest = ~np.isin(y, list(classes))
        ax.scatter(*points[rest].T, s=5, color="0.8", lw=0, label="others" if rest.any() else None, rasterized=True)
        for i, (k, name) in enumerate(classes.items()):
            ax.scatter(*points[y == k].T, s=11, color=f"C{i}", lw=0, label=plain(name), rasterized=True)
        ax.set(xticks=[], yticks=[])
        ax.set_title(f"{plain(section.labels[head])} ({sum(shares):.0%})", fontsize=9)
        ax.spines[:].set(color="0.7", visible=True)
    legend(fig, axes, below=True)
    return fig


def exponents(section, by_link):
    """Quality over n, a panel per link. by_link: {link: {label: heads that differ in n}}; a star is a learned n."""
    from matplotlib.ticker import NullLocator
    m = METRICS[section.quality]
    fig, axes = new_figure(1.8 + 5.2 * len(by_link), 4, 1, len(by_link), squeeze=False, sharey=True)
    for ax, (link, lines) in zip(axes.flat, by_link.items()):
        ticks = set()
        for label, heads in lines.items():
            points = []
            for head in heads:
                quality, n_at_end = m.scale * section.mean(head, section.quality), section.n_at_end(head)
                if head.setting != "learned":
                    points.append((section.heads[head][0].info["n"], quality))
                elif n_at_end is not None:
                    star = {**style(head), "marker": "*", "ms": 13, "ls": ""}
                    ax.plot(n_at_end, quality, **star)
            if points:
                ax.plot(*zip(*sorted(points)), **style(heads[0]), label=plain(label))
                ticks |= {float(f"{n:.3g}") for n, _ in points}
        if section.baseline:
            ax.axhline(m.scale * section.mean(section.baseline, section.quality), color="k", lw=1, ls=":",
                       label="baseline")
        ax.plot([], [], "*", color="w", mec="k", ms=11, label="learned n")
        ax.set(xscale="log", xlabel="n", title=f"{link} link" if len(by_link) > 1 else "")
        ax.set_xticks(sorted(ticks), [f"{n:g}" for n in sorted(ticks)], minor=False)
        ax.xaxis.set_minor_locator(NullLocator())
    axes[0, 0].set_ylabel(m.title)
    legend(fig, axes.flat)
    return fig

# -----------------------------------------------------------------------------


def main(argv):
    if "-h" in argv or "--help" in argv:
        print(__doc__.strip())
        return
    if not argv:
        raise SystemExit("no folder given: python figures.py out/demo")
    problems = []
    for out_dir in argv:
        try:
            for path in pictures(out_dir):
                print(path)
        except (Damaged, ImportError) as e:
            problems.append(str(e))
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main(sys.argv[1:])
