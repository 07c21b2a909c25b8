"""
The tables and the figure of a study of train_metric.py, from its run folders.

$ python figures_metric.py out/study_metric_digits
$ python figures_metric.py out/study_metric_digits out/study_metric_mnist

Into each folder go course.csv (each loss at each epoch: means and standard deviations over seeds), table.csv (the end
of each loss) and tests.csv (paired tests of what Variance & Greediness claims); into the first variance.png, a panel
for each folder.
"""
import sys
from itertools import pairwise, product

import numpy as np

import metrics
import results
from figures import legend, new_figure, save
from figures_toy import write_table
from run_folder import Damaged

COURSE = ("val_loss", "loss_decay", "val_accuracy", "val_map_at_r", "intra_variance", "inter_variance",
          "variance_ratio", "class_distance", "class_distance_cv", "active_ratio", "h_grad_norm", "grad_norm")
TABLE = ("recall_at_1", "recall_at_2", "recall_at_4", "map_at_r", "zero_shot_recall_at_1", "zero_shot_map_at_r",
         "probe_accuracy", "test_intra_variance", "test_inter_variance", "within_share", "test_class_distance",
         "test_class_distance_cv", "active", "gradient", "early_ratio", "compact_epochs", "loss_steps_to_90")
SLOW, FAST = ("triplet", "scl"), ("contrastive", "infonce")
PAIRED = ("contrastive", "triplet", "npair", "infonce", "arcface", "scl", "ccl")
# (the claim, what is compared, of which losses, less which)
CLAIMS = [
    ("higher within-class variance", "test_intra_variance", SLOW, FAST),
    ("higher within-class variance", "within_share", SLOW, FAST),
    ("better top-1", "recall_at_1", SLOW, FAST),
    ("better top-1", "zero_shot_recall_at_1", SLOW, FAST),
    ("compact fast", "early_ratio", FAST, SLOW),
    ("compact fast", "compact_epochs", FAST, SLOW),
    ("many updates", "active", FAST[:1], SLOW[:1]), # shares of pairs and triplets
    ("many updates", "active", FAST[1:], SLOW[1:]), # shares of samples
    ("small updates", "gradient", FAST, SLOW),
    ("large separation", "test_class_distance", ("npair",), PAIRED),
    ("uneven separation", "test_class_distance_cv", ("npair",), PAIRED),
    *(("heads against cross-entropy", key, ("euclidean", "cosine", "cosine, softmin, n=16"), ("baseline",))
      for key in ("within_share", "recall_at_1", "zero_shot_recall_at_1", "probe_accuracy")),
    *(("the exponent", key, ("euclidean, n=4",), ("euclidean",)) for key in ("within_share", "zero_shot_recall_at_1")),
]
# of arXiv 2010.16402: over the losses of one seed, the rank correlation of the two
TRANSFER = list(product(("within_share", "recall_at_1", "map_at_r"), ("zero_shot_recall_at_1", "probe_accuracy")))
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#e69f00", "#56b4e9", "#cc79a7", "#6a3d9a", # of PAIRED, then of heads
           "#000000", "#8c564b", "#9acd32", "#999999", "#b2182b")


def read_study(folder):
    """{label: {seed: Run}} of the runs of train_metric.py that have ended. Raises ValueError for none, or repeats."""
    runs, broken = results.read_runs([folder])
    for message in broken:
        print(message)
    runs = [r for r in runs if r.info["script"] == "train_metric.py" and r.summary is not None and r.evals]
    if not runs:
        raise ValueError(f"{folder} holds no run of train_metric.py that has ended")
    heads = results.by_head(runs)
    for own in heads.values():
        for a, b in pairwise(own): # in the order of seeds
            if a.seed == b.seed:
                raise ValueError(f"{a.path} and {b.path} are runs of one loss and seed: give a folder for each study")
    labels = results.make_labels(heads, results.usual_settings(runs))
    study = {labels[head]: {r.seed: r for r in own} for head, own in heads.items()}
    order = {label: PAIRED.index(label) if label in PAIRED else len(PAIRED) for label in study}
    return {label: study[label] for label in sorted(study, key=lambda label: (order[label], label))}


# -----------------------------------------------------------------------------
# numbers of a run

def course(r, key):
    """{epoch: value} of an evaluation's number, of the loss's decay, or of the gradient norm before each evaluation."""
    if key == "grad_norm":
        return {row["epoch"] + 1: row["grad_norm"] for row in r.logs if results.finite(row.get("grad_norm"))}
    if key == "loss_decay": # the share of its loss that an epoch takes off
        pairs = zip(r.evals, r.evals[1:])
        return {b["epoch"]: 1 - b["val_loss"] / a["val_loss"] for a, b in pairs if a["val_loss"] > 0}
    return {row["epoch"]: row[key] for row in r.evals if results.finite(row.get(key))}


def at_end(r, key):
    """
    A number of the run: of its summary, or
      within_share      of the test images, the variance within classes over all of it
      active, gradient  the means over its epochs of the active ratio, and of the gradient's norm at the end of each
      early_ratio       the variance ratio after the first epoch
      compact_epochs    the epochs until 90% of the fall of log(variance ratio) was made
    None where there is none, as of the course of a net that was not trained.
    """
    if key == "within_share":
        intra, inter = r.summary["test_intra_variance"], r.summary["test_inter_variance"]
        return intra / (intra + inter)
    if key in ("active", "gradient"):
        values = course(r, {"active": "active_ratio", "gradient": "grad_norm"}[key])
        trained = [x for epoch, x in values.items() if epoch > 0]
        return float(np.mean(trained)) if trained else None
    if key in ("early_ratio", "compact_epochs"):
        ratios = course(r, "variance_ratio")
        if key == "early_ratio":
            return ratios.get(1)
        return metrics.time_to(list(ratios), np.log(list(ratios.values())))
    return r.summary.get(key)


def shown(values):
    """The mean and the standard deviation (ddof 1) of the numbers that there are, in words for a CSV."""
    values = [x for x in values if x is not None]
    mean = f"{np.mean(values):.5g}" if values else ""
    return mean, f"{np.std(values, ddof=1):.3g}" if len(values) > 1 else ""


# -----------------------------------------------------------------------------
# tables

def course_rows(study):
    rows = []
    for label, runs in study.items():
        courses = {key: [course(r, key) for r in runs.values()] for key in COURSE}
        for epoch in courses["val_loss"][0]:
            row = dict(loss=label, epoch=epoch, seeds=len(runs))
            for key, values in courses.items():
                row[f"{key}_mean"], row[f"{key}_std"] = shown([value.get(epoch) for value in values])
            rows.append(row)
    return rows


def end_rows(study):
    rows = []
    for label, runs in study.items():
        row = dict(loss=label, seeds=len(runs))
        for key in TABLE:
            row[f"{key}_mean"], row[f"{key}_std"] = shown([at_end(r, key) for r in runs.values()])
        rows.append(row)
    return rows


def compared(claim, key, a, b, x, y):
    """A row of tests.csv: the paired test of x - y over seeds, and the effect that it finds with probability 0.8."""
    test = metrics.paired(x, y)
    row = dict(claim=claim, number=key, of=a, less=b, **test)
    if test["std"]:
        from scipy import stats
        quantiles = stats.t.ppf(0.975, len(x) - 1) + stats.t.ppf(0.8, len(x) - 1)
        row["detectable"] = quantiles * test["std"] / len(x) ** 0.5
    return row


def test_rows(study):
    rows = []
    for claim, key, first, second in CLAIMS:
        for a in first:
            for b in second:
                seeds = [s for s in study.get(a, ()) if s in study.get(b, ())]
                pairs = [(at_end(study[a][s], key), at_end(study[b][s], key)) for s in seeds]
                pairs = [pair for pair in pairs if None not in pair]
                if a != b and pairs:
                    rows.append(compared(claim, key, a, b, *zip(*pairs)))
    seeds = set.intersection(*(set(runs) for runs in study.values()))
    for x, y in TRANSFER:
        correlations = [rank_correlation(study, seed, x, y) for seed in sorted(seeds)]
        correlations = [rho for rho in correlations if rho is not None]
        if correlations:
            rows.append(compared("transfer", f"rank correlation of {x} and {y}", "all losses", "0", correlations,
                                 [0.0] * len(correlations)))
    corrected = metrics.corrected([row["p"] for row in rows]) if rows else []
    for row, p in zip(rows, corrected):
        row["p_corrected"] = p
    columns = ("claim", "number", "of", "less", "n", "mean", "low", "high", "p", "p_corrected", "detectable")
    return [{key: in_words(row.get(key)) for key in columns} for row in rows]


def rank_correlation(study, seed, x, y):
    """Spearman's, over the losses, of two numbers at the end; None where one is missing or constant."""
    from scipy import stats
    points = [(at_end(runs[seed], x), at_end(runs[seed], y)) for runs in study.values()]
    if None in sum(points, ()) or min(np.ptp(points, axis=0)) == 0:
        return None
    return float(stats.spearmanr(*zip(*points)).statistic)


def in_words(x):
    if x is None:
        return ""
    return f"{x:.4g}" if isinstance(x, float) else x


# -----------------------------------------------------------------------------
# the figure

def draw(studies, titles, path):
    """The variance within classes against that between them over training: a panel a study, a line a loss."""
    fig, axes = new_figure(1.5 + 4.4 * len(studies), 4.6, 1, len(studies), squeeze=False)
    labels = list(dict.fromkeys(label for study in studies for label in study))
    for ax, study, title in zip(axes[0], studies, titles):
        for label, runs in study.items():
            i, is_head = labels.index(label), label not in PAIRED
            means = []
            for key in ("inter_variance", "intra_variance"):
                by_epoch = [course(r, key) for r in runs.values()]
                means.append([np.mean([values[e] for values in by_epoch]) for e in by_epoch[0]])
            settings = dict(color=COLOURS[i % len(COLOURS)], ls="--" if is_head else "-", lw=1.4, label=label)
            ax.plot(*means, marker="s" if is_head else "o", ms=3, markevery=slice(1, -1), alpha=0.8, **settings)
            ax.plot(means[0][-1], means[1][-1], marker="s" if is_head else "o", ms=9, color=settings["color"], mec="k")
        ax.plot(means[0][0], means[1][0], marker="*", ms=13, color="k", ls="", label="untrained")
        ax.set(xscale="log", yscale="log", xlabel="variance between classes", ylabel="variance within classes",
               title=title)
    legend(fig, axes[0], below=True)
    save(fig, path)
    return path


def main(folders):
    studies = [read_study(folder) for folder in folders]
    for folder, study in zip(folders, studies):
        for name, rows in (("course", course_rows(study)), ("table", end_rows(study)), ("tests", test_rows(study))):
            if rows:
                print(write_table(f"{folder}/{name}.csv", rows))
    runs = [next(iter(next(iter(study.values())).values())) for study in studies]
    print(draw(studies, [f"{r.dataset}, {r.model}" for r in runs], f"{folders[0]}/variance.png"))


if __name__ == "__main__":
    if not sys.argv[1:]:
        raise SystemExit(f"which studies? python {sys.argv[0]} out/study_metric_digits")
    try:
        main(sys.argv[1:])
    except (Damaged, ImportError, OSError, ValueError) as e:
        raise SystemExit(str(e)) from None
