"""
The figure and the table of each small study, from the run folders that train_toy.py has left.

$ python figures_toy.py out/toy_modular

A picture and a CSV of the study's name are written into its folder; the table is printed too.
"""
import csv
import math
import os
import sys
import warnings

import numpy as np
import torch

import metrics
from figures import legend, new_figure, principal_plane, save
from figures_claims import show, write
from results import read_runs
from run_folder import read_probe, readable

# Medians of epochs to a test accuracy above 0.9, and how many of 20 seeds reach it, as the published notebook prints
# them, with the learning rate, weight decay and share for training; 49 to 64% of its test pairs are training pairs
PUBLISHED_SETTINGS = {"mlp": (2e-3, 0.01, 0.8), "transformer": (2e-3, 0.005, 0.8)}
PUBLISHED_EPOCHS = {("mlp", "linear"): "1032 (20)", ("mlp", "euclidean n=2"): "308 (20)",
                    ("transformer", "linear"): "911 (19)", ("transformer", "euclidean n=2"): "4172 (8)"}
# Test accuracy in percent, of 20 runs: Tables 2 and 3, and Table 5 for L2. Table 2 repeats Table 5, of 50,000 epochs
PUBLISHED_RUNS = 20
PUBLISHED_ACCURACY = {
    "relu": "96.62 +- 0.17", "abs": "95.87 +- 0.22", "relu2": "56.31 +- 19.31", "relu2_neg": "96.46 +- 0.17",
    "abs2": "95.95 +- 0.17", "abs2_neg": "92.25 +- 2.07", "relu_bias": "95.69 +- 0.17", "abs_bias": "95.23 +- 0.16",
    "relu2_bias": "39.94 +- 18.84", "relu2_neg_bias": "94.92 +- 0.18", "abs2_bias": "95.38 +- 0.17",
    "abs2_neg_bias": "90.53 +- 2.36", "relu_l2": "97.33 +- 0.13", "relu_l2_neg": "97.36 +- 0.14",
    "abs_l2": "97.61 +- 0.07", "abs_l2_neg": "97.56 +- 0.09"}
SHOWN = 8 # groups of modular addition, in two rows; more are seen in heat maps
# settings that tell groups apart, where the folders of one page differ in them
TOLD_APART = ("train_fraction", "with_replacement", "weight_decay", "inputs", "point_set", "epochs")
CONTRASTS = (("relu", "abs"), ("relu2", "relu"), ("relu2_neg", "relu"), ("abs2", "abs"), ("abs2_neg", "abs"),
             ("relu2_neg", "relu2"), ("abs2_neg", "abs2"), ("relu_l2", "relu_l2_neg"), ("abs_l2", "abs_l2_neg"))


def read_study(out_dir):
    """(the study's name, {(model, label): its runs that have ended, by seed}, how many have not). Raises ValueError."""
    runs, broken = read_runs([out_dir])
    for message in broken:
        print(message)
    runs = [r for r in runs if r.info["script"] == "train_toy.py"]
    settings, groups = [r.info["config"] for r in runs], {}
    differing = [key for key in TOLD_APART if len({c.get(key) for c in settings}) > 1]
    for r in sorted(runs, key=lambda r: r.seed):
        label = ", ".join([r.info["label"], *(f"{key} {r.info['config'][key]}" for key in differing)])
        if r.summary is not None:
            groups.setdefault((r.model, label), []).append(r)
    groups = dict(sorted(groups.items(), key=lambda item: place(item[1])))
    studies = {r.info["config"]["study"] for r in runs}
    if not groups or len(studies) != 1:
        raise ValueError(f"{out_dir} holds no run of train_toy.py that has ended, or those of several studies")
    return studies.pop(), groups, sum(r.summary is None for r in runs)


def place(runs):
    """Oursland's nets in the paper's order; linear heads before others, those by distance and n."""
    r, nets = runs[0], list(PUBLISHED_ACCURACY)
    net = nets.index(r.model) if r.model in nets else len(nets)
    settings = [r.info["config"].get(key, 0) for key in TOLD_APART]
    head = r.head.distance != "baseline", r.head.distance, r.head.variant, r.head.link, r.head.n
    return *settings, net, r.model, *head


def values(runs, key):
    """The finite numbers of the summaries."""
    found = [r.summary.get(key) for r in runs]
    return [x for x in found if x is not None]


def mean(runs, key, scale=1.0, digits=4):
    found = values(runs, key)
    return f"{scale * np.mean(found):.{digits}g}" if found else ""


def deviation(runs, key, scale=1.0):
    found = values(runs, key)
    return f"{scale * np.std(found, ddof=1):.2g}" if len(found) > 1 else ""


def median(runs, key):
    found = values(runs, key)
    return f"{np.median(found):g} ({len(found)})" if found else "none (0)"


def half_interval(runs, key, scale=1.0):
    """Half of the 95% interval of the mean over seeds, by Student's t."""
    found = values(runs, key)
    if len(found) < 2:
        return ""
    from scipy import stats
    return f"{scale * stats.t.ppf(0.975, len(found) - 1) * np.std(found, ddof=1) / len(found) ** 0.5:.2g}"


def write_table(path, rows):
    """Write rows, dicts with the same keys, as CSV, and print them."""
    with open(path, "w", newline="", encoding="utf-8") as f:
        table = csv.DictWriter(f, rows[0])
        table.writeheader()
        table.writerows(rows)
    widths = {key: max(len(str(row[key])) for row in [{key: key}, *rows]) for key in rows[0]}
    for row in [dict(zip(rows[0], rows[0])), *rows]:
        print("  ".join(str(row[key]).ljust(widths[key]) for key in row).rstrip())
    return path


def course(runs, key):
    """(epochs (T,), values (seeds, T)) of the evaluations; a missing value is nan."""
    rows = [[row.get(key) for row in r.evals] for r in runs]
    epochs = [row["epoch"] for row in runs[0].evals]
    return epochs, np.array([[math.nan if x is None else x for x in row] for row in rows])


def band(ax, runs, key, scale=1.0, **settings):
    """The median over seeds, and the range of the middle half."""
    epochs, y = course(runs, key)
    with warnings.catch_warnings(): # before any seed has a value there is no quantile
        warnings.simplefilter("ignore", RuntimeWarning)
        low, middle, high = np.nanquantile(scale * y, (0.25, 0.5, 0.75), axis=0)
    ax.fill_between(epochs, low, high, color=settings["color"], alpha=0.2, lw=0)
    ax.plot(epochs, middle, **settings)


def weights(r, *names):
    """The first of these matrices in a run's best.pt."""
    path = os.path.join(r.path, "best.pt")
    with readable(path):
        state = torch.load(path, map_location="cpu", weights_only=True)["model"]
        return next(state[name] for name in names if name in state).double().numpy()

# -----------------------------------------------------------------------------
# modular addition


def modular(out_dir, groups, columns=4):
    """Figure 9, accuracy over epochs above the embedding of the first seed in the plane of its top two components, and
    below them the scale of the scores; for the first SHOWN groups."""
    shown = list(groups.items())[:SHOWN]
    across = min(columns, len(shown))
    blocks = -(-len(shown) // across)
    heights = [2, 2.4, 1] * blocks
    fig, axes = new_figure(2.7 * across, 7 * blocks, 3 * blocks, across, squeeze=False, height_ratios=heights)
    for i, ((model, label), runs) in enumerate(shown):
        row, column = divmod(i, across)
        accuracy, plane, scale = axes[3 * row:3 * row + 3, column]
        band(accuracy, runs, "train_accuracy", 100, color="0.5", label="training")
        band(accuracy, runs, "val_accuracy", 100, color="C0", label="test")
        accuracy.set(ylim=(-3, 103))
        accuracy.set_title(f"{model}: {label}", fontsize=9)
        band(scale, runs, "score_scale", color="C1")
        scale.set(yscale="log", xlabel="epoch")
        scale.set_yticks([0.01, 0.1, 1, 10, 100], ["0.01", "0.1", "1", "10", "100"])
        scale.minorticks_off()
        if column == 0:
            accuracy.set_ylabel("accuracy (%)")
            scale.set_ylabel("spread of scores")
        embedding = weights(runs[0], "backbone.embedding.weight", "head.weight") # (p, D)
        centre, directions, shares = principal_plane(embedding)
        x, y = directions @ (embedding - centre).T
        for k in range(len(x)):
            plane.annotate(k, (x[k], y[k]), fontsize=7, ha="center", va="center")
        plane.plot(x, y, alpha=0)
        plane.set(xticks=[], yticks=[])
        plane.spines[:].set_visible(False)
        plane.set_aspect("equal", "datalim")
        plane.set_title(f"{sum(shares):.0%} of the variance", fontsize=9)
    for ax in axes.flat:
        ax.axis("on" if ax.has_data() else "off")
    legend(fig, axes.flat, below=True)
    return save(fig, os.path.join(out_dir, "modular.png"))


def heads_by_n(out_dir, groups):
    """
    Heat maps of every head at every n: means of the test accuracy and of the share in the plane, medians of the epoch
    that reaches 90% over the seeds that do, whose number is in brackets where it is not all of them.
    """
    cells = {} # {(head, n): runs}, of linear heads with n = None
    for (_, label), runs in groups.items():
        n = None if runs[0].head.is_baseline else runs[0].info["config"]["n"]
        cells[label if n is None else label.replace(f" n={n:g}", ""), n] = runs
    heads = list(dict.fromkeys(head for head, _ in cells))
    ns = sorted({n for _, n in cells if n is not None})
    panels = [("test accuracy (%)", "test_accuracy", 100, np.mean, "viridis"),
              ("epoch of 90% test accuracy", "epochs_to_test", 1, np.median, "viridis_r"),
              ("variance in two components (%)", "embedding_pc2_ev", 100, np.mean, "viridis")]
    fig, axes = new_figure(10.5, 1.2 + 0.24 * len(heads), 1, len(panels), sharey=True)
    for ax, (title, key, scale, middle, colours) in zip(axes, panels):
        numbers, texts = np.full((len(heads), len(ns)), np.nan), np.full((len(heads), len(ns)), "", object)
        for i, j in np.ndindex(numbers.shape):
            runs = cells.get((heads[i], ns[j])) or cells.get((heads[i], None), [])
            found = values(runs, key)
            if found:
                numbers[i, j] = scale * middle(found)
                texts[i, j] = f"{numbers[i, j]:.3g}" + (f" ({len(found)})" if len(found) < len(runs) else "")
        write(ax, texts, show(ax, numbers, colours), fontsize=7)
        ax.set_xticks(range(len(ns)), [f"n = {n:g}" for n in ns])
        ax.set_yticks(range(len(heads)), heads)
        ax.set_title(title, fontsize=9)
    return save(fig, os.path.join(out_dir, "modular_heads.png"))


def modular_table(groups):
    rows = []
    for (model, label), runs in groups.items():
        _, scales = course(runs, "score_scale")
        c, published = runs[0].info["config"], ""
        if (c["learning_rate"], c["weight_decay"], c["train_fraction"]) == PUBLISHED_SETTINGS[model]:
            published = PUBLISHED_EPOCHS.get((model, runs[0].info["label"]), "")
        rows.append({
            "model": model, "head": label, "seeds": len(runs), "epochs": runs[0].summary["epoch"],
            "train > 0.9": median(runs, "epochs_to_train"), "test > 0.9": median(runs, "epochs_to_test"),
            "delay": median(runs, "delay"), "published test > 0.9": published,
            "test %": mean(runs, "test_accuracy", 100), "std": deviation(runs, "test_accuracy", 100),
            "two components %": mean(runs, "embedding_pc2_ev", 100, 3), "circularity": mean(runs, "circularity", 1, 3),
            "scale at first": f"{scales[:, 0].mean():.3g}", "scale at end": f"{scales[:, -1].mean():.3g}"})
    return rows


def modular_tests(groups):
    """
    Paired t tests over seeds, which have the same pairs and the same initial net but for the head: each head against
    the linear one and against the linear one with Euclid's scale, in percentage points.
    """
    rows = []
    for (model, label), runs in groups.items():
        own = runs[0].info["label"], label.removeprefix(runs[0].info["label"]) # and the settings that differ
        for (other_model, other_label), others in groups.items():
            other = others[0].info["label"], other_label.removeprefix(others[0].info["label"])
            is_control = other[0] == "linear" or other[0].startswith("linear, Euclid's scale")
            if is_control and other_model == model and other[1] == own[1] and other[0] != own[0]:
                rows.append({"contrast": f"{model}: {label} - {other_label}", **paired_test(runs, others)})
    return rows


def paired_test(runs, others):
    by_seed = {r.seed: r for r in others}
    pairs, row = [(r, by_seed[r.seed]) for r in runs if r.seed in by_seed], {}
    for key, name, scale in (("test_accuracy", "test %", 100), ("embedding_pc2_ev", "two components %", 100),
                             ("epochs_to_test", "epochs to 90%", 1)):
        both = [(scale * r.summary[key], scale * other.summary[key]) for r, other in pairs
                if None not in (r.summary[key], other.summary[key])] # an epoch only where both have got there
        test = metrics.paired(*zip(*both)) if both else {}
        row[f"{name}, seeds"] = len(both)
        for number in ("mean", "low", "high", "p"):
            found = test.get(number)
            row[f"{name}, {number}"] = "" if found is None else f"{found:.3g}"
    return row

# -----------------------------------------------------------------------------
# points in the plane


def points(out_dir, groups):
    """A strip of frames: what a seed's prototypes look like, and what the theorems say of all seeds."""
    colours = dict(zip(groups, [f"C{i}" for i in range(10)] * len(groups)))
    fig, axes = new_figure(17, 3.6, 1, 5)
    plane, norms, margins, bounds, centres = axes
    first = next(iter(groups.values()))[0]
    x, y = (read_probe(first.path)[key] for key in ("h", "y"))
    for k in range(3):
        plane.scatter(*x[y == k].T, s=4, color="0.75", lw=0)
    for key, runs in groups.items():
        style = dict(color=colours[key], label=key[1])
        prototypes = weights(runs[0], "head.weight")
        reach = np.abs(x).max() * 1.6
        inside = prototypes[np.abs(prototypes).max(1) < reach]
        plane.scatter(*inside.T, marker="*", s=60, color=colours[key], edgecolor="k", lw=0.5, zorder=3)
        band(norms, runs, "prototype_norm", **style)
        band(margins, runs, "margin", **style)
        band(bounds, runs, "bound", **style)
        epochs, errors = course(runs, "val_accuracy")
        bounds.plot(epochs, 1 - errors.mean(0), color=colours[key], ls=":")
    plane.set_title(f"points of seed {first.seed} and the prototypes\nthat lie near them", fontsize=9)
    norms.set(xscale="symlog", yscale="log", xlabel="epoch")
    norms.set_yticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
    norms.minorticks_off()
    norms.set_title("mean |w|: Theorem 1", fontsize=9)
    margins.set(xscale="symlog", yscale="symlog", xlabel="epoch")
    margins.axhline(0, color="0.6", lw=1)
    margins.set_title("margin, in units of d (of z: linear)", fontsize=9)
    bounds.set(xscale="symlog", yscale="log", xlabel="epoch")
    bounds.axhline(1, color="0.6", lw=1)
    bounds.set_title("R |W| / (margin sqrt N): Theorem 2\ndotted: the test error", fontsize=9)
    names, width = ("mean", "median", "geometric_median"), 0.8 / len(groups)
    for i, (key, runs) in enumerate(groups.items()):
        heights = [np.mean(values(runs, f"to_{name}")) for name in names]
        centres.bar(np.arange(3) + i * width, heights, width, color=colours[key])
    centres.set_xticks(np.arange(3) + 0.4 - width / 2, [name.replace("_", "\n") for name in names])
    centres.set_yscale("log")
    centres.set_title("distance of prototypes to class centres\n(class spreads)", fontsize=9)
    legend(fig, axes.flat)
    return save(fig, os.path.join(out_dir, "points.png"))


def points_table(groups):
    rows = []
    for (_, label), runs in groups.items():
        rows.append({
            "head": label, "seeds": len(runs), "epochs": runs[0].summary["epoch"],
            "|w| at half": f"{course(runs, 'prototype_norm')[1][:, len(runs[0].evals) // 2].mean():.4g}",
            "|w| at end": mean(runs, "prototype_norm"), "train loss": mean(runs, "train_loss"),
            "margin": mean(runs, "margin"), "bound": median(runs, "bound"),
            "test error %": f"{100 - 100 * np.mean(values(runs, 'test_accuracy')):.3g}",
            "to mean": mean(runs, "to_mean", 1, 3), "to median": mean(runs, "to_median", 1, 3),
            "to geometric median": mean(runs, "to_geometric_median", 1, 3)})
    return rows

# -----------------------------------------------------------------------------
# Oursland's nets


def two_layer(out_dir, groups):
    """Accuracy of every seed, output nodes that die, and the first layer's pre-activations by class."""
    fig, axes = new_figure(13, 0.32 * len(groups) + 3, 1, 3)
    accuracy, dead, classes = axes
    names = [label for _, label in groups]
    for i, runs in enumerate(groups.values()):
        found = 100 * np.array(values(runs, "test_accuracy"))
        accuracy.plot(found, np.full(len(found), i), "o", color="C0", alpha=0.4, ms=4)
        accuracy.plot(found.mean(), i, "|", color="k", ms=14)
        for shade, key in (("0.8", "output_rare5"), ("0.55", "output_rare1"), ("k", "output_dead")):
            dead.barh(i, 100 * np.mean(values(runs, key)), color=shade)
    for name, shade in (("active for under 5%", "0.8"), ("under 1%", "0.55"), ("never active", "k")):
        dead.barh(0, 0, color=shade, label=name)
    for ax in (accuracy, dead):
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5) # a net is at one height in both
    accuracy.set(xlabel="test accuracy (%), a dot a seed")
    dead.set(xlabel="output nodes (%)")
    dead.legend(frameon=False, fontsize=8)
    r = next(iter(groups.values()))[0]
    probe = read_probe(r.path)
    node = int(np.argmax(probe["pre"].std(0)))
    classes.violinplot([probe["pre"][probe["y"] == k, node] for k in range(10)], range(10), showextrema=False)
    classes.axhline(0, color="0.5", lw=1)
    classes.set(xlabel="class", xticks=range(10), ylabel="pre-activation")
    classes.set_title(f"{r.model}, seed {r.seed}, hidden node {node}", fontsize=9)
    return save(fig, os.path.join(out_dir, "two_layer.png"))


def two_layer_table(groups):
    rows = []
    for (model, label), runs in groups.items():
        rows.append({
            "net": label, "seeds": len(runs), "epochs": runs[0].summary["epoch"],
            "test %": mean(runs, "test_accuracy", 100), "std": deviation(runs, "test_accuracy", 100),
            "+- 95%": half_interval(runs, "test_accuracy", 100), "published % (MNIST)": PUBLISHED_ACCURACY[model],
            "train %": mean(runs, "train_accuracy", 100),
            **{f"{part} {word} %": mean(runs, f"{part}_{word}", 100, 3)
               for part in ("output", "hidden") for word in ("dead", "rare1", "rare5")}})
    return rows


def two_layer_tests(groups):
    """
    Unpaired t tests of test accuracies in percentage points, since the runs are independent. "published t" is that of
    the published means and standard deviations.
    """
    by_label = {label: runs for (_, label), runs in groups.items()}
    ends = dict.fromkeys(label.removeprefix(model.removesuffix("_bias")) for model, label in groups)
    rows = []
    for a, b in CONTRASTS:
        for end in ends: # "", "_bias", with other inputs
            if a + end in by_label and b + end in by_label:
                x, y = (100 * np.array(values(by_label[name + end], "test_accuracy")) for name in (a, b))
                test = metrics.unpaired(x, y)
                numbers = {key: "" if value is None else f"{value:.3g}" for key, value in test.items()}
                published = published_t(groups, a + end, b + end)
                rows.append({"contrast": f"{a}{end} - {b}{end}", **numbers, "published t": f"{published:.3g}"})
    return rows


def published_t(groups, *labels):
    """Student's t of the published accuracies of two labels' nets, with ddof 1 in what is printed."""
    model_of = {label: model for model, label in groups}
    words = [PUBLISHED_ACCURACY[model_of[label]].split(" +- ") for label in labels]
    (mean_a, std_a), (mean_b, std_b) = (map(float, pair) for pair in words)
    return (mean_a - mean_b) / ((std_a ** 2 + std_b ** 2) / PUBLISHED_RUNS) ** 0.5


TESTS = {"modular": modular_tests, "two_layer": two_layer_tests}

# -----------------------------------------------------------------------------


def draw(out_dir):
    """
    Draw the study in this folder and write its tables. Returns their paths; the figure's is missing where matplotlib
    is. Raises ValueError where there is no study.
    """
    study, groups, missing = read_study(out_dir)
    tables = {study: globals()[f"{study}_table"](groups)}
    if study in TESTS:
        tables[f"{study}_tests"] = TESTS[study](groups)
    paths = [write_table(os.path.join(out_dir, f"{name}.csv"), rows) for name, rows in tables.items() if rows]
    if missing:
        print(f"{missing} runs have not ended, and are in no number")
    try:
        paths.append(globals()[study](out_dir, groups))
        if study == "modular" and len(groups) > SHOWN:
            paths.append(heads_by_n(out_dir, groups))
    except ImportError as e:
        print(e)
    return paths


def main(argv):
    if not argv or "-h" in argv or "--help" in argv:
        print(__doc__.strip())
        return
    try:
        for out_dir in argv:
            print("\n".join(draw(out_dir)))
    except ValueError as e:
        raise SystemExit(str(e)) from None


if __name__ == "__main__":
    main(sys.argv[1:])
