"""
What follows from the sections of results.py: over the heads of one, and over several sections. Nothing here is drawn or
written, see report.py.
"""
import statistics
from collections import defaultdict
from itertools import chain

import metrics
import verdicts
from metrics import METRICS


def records(sections):
    """A dict per run: what it is, and every number of METRICS that it has, which is none where it diverged."""
    result = []
    for section in sections:
        for run in [*section.runs, *chain(*section.diverged.values())]:
            setting, n = run.head.setting, run.info["n"]
            if run.head.is_baseline: # has no n
                setting = n = ""
            values = {key: run.values.get(key) for key in METRICS}
            failed = run in section.failures(run.head)
            result.append(dict(dataset=run.dataset, model=run.model, head=section.labels[run.head], n_setting=setting,
                               n=n, seed=run.seed, path=run.path, section=section.name, failed=int(failed), **values))
    return result


def emission_differences(section):
    """{head: metrics.paired} of the emissions against the baseline's, from the least on."""
    found, means = {}, {}
    for head in section.drawn:
        mine, base = section.paired(head, "emissions_g")
        if mine:
            found[head] = metrics.paired(mine, base)
            means[head] = found[head]["mean"]
    return {head: found[head] for head in sorted(means, key=means.get)}


def trade_off(section):
    """
    ({head: (energy in Wh, quality)} of means over seeds, the heads that no other beats in both, the heads left out:
    they are so much worse than the median that a figure with them would show nothing of the rest).
    """
    m, points = METRICS[section.quality], {}
    for head in section.drawn:
        if section.values(head, "energy_kwh") and section.values(head, section.quality):
            quality = m.scale * section.mean(head, section.quality)
            points[head] = (1000 * section.mean(head, "energy_kwh"), quality)
    if len(points) < 2:
        return points, [], []
    qualities = [quality for _, quality in points.values()]
    best, median = (min if m.lower else max)(qualities), statistics.median(qualities)
    outside = []
    for head, (_, quality) in points.items():
        if abs(quality - best) > 5 * abs(median - best) > 0 and head != section.baseline:
            outside.append(head)
    inside = {head: point for head, point in points.items() if head not in outside}
    front = []
    for head, point in inside.items():
        if not any(beats(other, point, m.lower) for other in inside.values()):
            front.append(head)
    return inside, front, outside


def beats(a, b, lower):
    """Whether a (energy, quality) is not b, needs no more energy, and is no worse; lower: a lower quality is better."""
    no_worse = a[1] <= b[1] if lower else a[1] >= b[1]
    return a[0] <= b[0] and no_worse and a != b


def prototype_growth(section):
    """
    Records of the mean norm |w| of the prototypes over training, means over seeds, with how it grows at the end: see
    verdicts.late_slope, whose t is the epoch or step.
    """
    result = []
    for head in section.drawn:
        x, norms = section.course(head, "prototype_norm")
        if len(x) > 1 and (norms[:, 0] > 0).all():
            start, end = norms[:, 0], norms[:, -1]
            result.append(dict(head=section.labels[head], start=start.mean(), end=end.mean(),
                               end_over_start=(end / start).mean(), **verdicts.late_slope(x, norms)))
    return result

# -----------------------------------------------------------------------------
# over several sections


# what is counted, and by which metric of a family
WINS = {"quality": {"vision": "test_accuracy", "language": "val_loss"}, "F1": {"vision": "f1_macro"},
        "PC2 EV": {"vision": "pc2_ev"}, "PCA@90%": {"vision": "pca90"},
        "energy": {"vision": "energy_kwh", "language": "energy_kwh"}}


def wins(sections):
    """
    {label: {"<what> sections", "<what> wins", "<what> top 5": count}} for each of WINS: in how many sections a head is
    the best, or has less than five better ones. Heads that tie have the same place. Best first.
    """
    counts, known = {}, []
    for what, by_family in WINS.items():
        for section in sections:
            key = by_family.get(section.family)
            means = {head: section.mean(head, key) for head in section.drawn if key and section.values(head, key)}
            if means and what not in known:
                known.append(what)
            for head, mean in means.items():
                better = sum(is_better(other, mean, METRICS[key].lower) for other in means.values())
                count = counts.setdefault(section.labels[head], defaultdict(int))
                count[f"{what} sections"] += 1
                count[f"{what} wins"] += better == 0
                count[f"{what} top 5"] += better < 5
    columns = [f"{what} {column}" for what in known for column in ("sections", "wins", "top 5")]
    table = {label: {column: count[column] for column in columns} for label, count in counts.items()}
    order = [column for column in ("quality wins", "quality top 5", "energy wins") if column in columns]
    return dict(sorted(table.items(), key=lambda item: [-item[1][column] for column in order]))


def is_better(a, b, lower):
    """Whether the mean a is better than b by more than rounding: sums of the same numbers in another order tie."""
    better = a < b if lower else a > b
    return better and abs(a - b) > 1e-12 * max(abs(a), abs(b))


def emission_changes(sections):
    """
    ([(label, head, percent by section)] of the heads that are in all sections that have emissions, from the least mean
    on; the labels of the others). A percent is that of the mean over the seeds of both, and negative emits less.
    """
    changes, count = defaultdict(list), 0
    for section in sections:
        differences = emission_differences(section)
        count += bool(differences)
        for head in differences:
            mine, base = section.paired(head, "emissions_g")
            anywhere = head._replace(n=0.0, eps=0.0, feature_scale=0.0)
            changes[section.labels[head], anywhere].append(metrics.percent_change(sum(mine), sum(base)))
    everywhere = {key: values for key, values in changes.items() if len(values) == count}
    order = sorted(everywhere, key=lambda key: statistics.mean(everywhere[key]))
    others = sorted({label for label, _ in changes} - {label for label, _ in everywhere})
    return [(*key, everywhere[key]) for key in order], others
