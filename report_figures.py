"""
The blocks of report.py that hold figures: those of a section, of its heads `few`, and those over several sections.
"""
import os
import statistics
from collections import Counter

import numpy as np

import comparisons
import figures
from data import load_encoding, load_meta
from metrics import METRICS
from page import Cell, Heading, Paragraph, Picture, Table, number
from run_folder import Damaged, read_probe

# -----------------------------------------------------------------------------
# figures of a section, and the tables that belong to them


def figure_blocks(section, few):
    blocks = [Heading("Figures", 3)]
    if len(section.drawn) < len(section.heads):
        blocks.append(Paragraph("Figures show the heads with their fixed n; other n are in the section on n."))
    blocks += [*curves(section, few), *pareto(section), *efficiency(section), *emissions(section)]
    return [*blocks, *training(section, few), *states(section, few)]


def picture(section, name, fig, caption):
    return Picture(f"{section.slug}_{name}", *figures.vector(fig), f"{section.name}: {caption}")


def curves(section, few):
    energy = " (right: at their mean energy)" if section.family == "language" else ""
    return [picture(section, "curves", figures.section_curves(section, few),
                    "mean over seeds, bands from the least to the largest seed, not normalised; "
                    f"{section.x}s that every seed of the head has{energy}. The axis leaves out the untrained model.")]


def pareto(section):
    points, front, outside = comparisons.trade_off(section)
    if len(points) < 2:
        return []
    on = ", ".join(section.labels[head] for head in points if head in front)
    caption = ("quality against energy, means over seeds, not normalised; the line joins the heads that no other beats "
               f"in both ({on}).")
    if outside:
        caption += f" Far below the frame: {', '.join(section.labels[head] for head in outside)}."
    return [picture(section, "pareto", figures.pareto(section, points, front), caption)]


def efficiency(section):
    vision, panels = section.family == "vision", []
    if any(section.values(head, "wh_to_target") for head in section.drawn):
        what = "an error" if vision else "a loss"
        panels.append((f"Wh to {what} of {section.target:.3g}", efficiency_rows(section, "wh_to_target")))
    if any(section.values(head, "quality_per_wh") for head in section.drawn):
        unit = "accuracy points above chance per Wh" if vision else "(log V - validation loss) per Wh"
        panels.append((unit, efficiency_rows(section, "quality_per_wh")))
    if not panels:
        return []
    caption = "quality per energy; mean and standard deviation over seeds, not normalised."
    if len(panels) > 1:
        caption = f"energy to the quality at which the baseline has made 90% of its progress (left), and {caption}"
    return [picture(section, "efficiency", figures.bars(panels), caption)]


def efficiency_rows(section, key):
    """Rows for figures.bars, from the best on; a head that misses the number for a seed comes last, without a bar."""
    means, missing = {}, []
    for head in section.drawn:
        if section.complete(head, key):
            means[head] = section.mean(head, key)
        elif section.values(head, "energy_kwh"):
            missing.append(head)
    rows = []
    for head in sorted(means, key=means.get, reverse=not METRICS[key].lower):
        text = number(means[head], ".3g")
        rows.append((section.labels[head], figures.style(head), means[head], section.std(head, key), text))
    return rows + [(section.labels[head], figures.style(head), None, None, "not by every seed") for head in missing]


def emission_rows(section):
    """Rows for figures.bars: of each drawn head, from the least on."""
    rows = []
    for head, d in comparisons.emission_differences(section).items():
        rows.append((section.labels[head], figures.style(head), d["mean"], d["std"], number(d["mean"], "+.3g")))
    return rows


def emissions(section):
    rows = emission_rows(section)
    if not rows:
        return []
    return [picture(section, "emissions", figures.bars([("g CO2eq per run, less the baseline", rows)]),
                    "g CO2eq per run less the baseline's of the same seed, mean and standard deviation over seeds, not "
                    "normalised; negative emits less.")]


def training(section, few):
    """The courses of what is logged, and the table of the prototypes' norms."""
    fig, blocks = figures.courses(section, few), []
    if fig:
        blocks.append(picture(section, "training", fig, "means over seeds, not normalised: gradient norms before "
                              "clipping, prototypes, and hidden states of validation samples. Variance and active "
                              "ratio are defined below."))
    records = comparisons.prototype_growth(section)
    if not records:
        return blocks
    rows = []
    for r in records:
        interval = "" if r["low"] is None else f"[{100 * r['low']:+.1f}, {100 * r['high']:+.1f}]"
        growth = number(None if r["slope"] is None else 100 * r["slope"], "+.1f")
        rows.append([r["head"], f"{r['start']:.3g}", f"{r['end']:.3g}", f"{r['end_over_start']:.3f}",
                     Cell(growth, interval), r["verdict"]])
    columns = ["head", "|w| at the start", "|w| at the end", "end / start", "late growth, % per doubling", "it"]
    text = (
        "Norms of the prototypes, mean over seeds. The paper's Theorem 1 lets cross-entropy's grow without bound, as "
        f"log t, and a harmonic head's not. Late growth is that per doubling of the {section.x}s, in the last three "
        "quarters of them, and does not change with the length of a run that grows as log t. It decides nothing where "
        "weights decay, or where the learning rate does: both hold any norm.")
    return [*blocks, Paragraph(text), Table(f"{section.slug}_prototype_norms", columns, rows, records)]

# -----------------------------------------------------------------------------
# hidden states


def read_probes(section, few):
    """({head: (h (N, D), y (N,))} of each head's first seed, notes about those that cannot be read)"""
    probes, notes = {}, []
    for head in few:
        try:
            probe = read_probe(section.heads[head][0].path)
        except Damaged as e:
            notes.append(f"no figure of hidden states: {e}")
            continue
        h = probe["h"]
        if min(len(h) - 1, h.shape[1]) > 1 and np.isfinite(h).all() and np.ptp(h, 0).any():
            probes[head] = h, probe["y"]
    return probes, notes


def states(section, few):
    probes, notes = read_probes(section, few)
    blocks = [Paragraph(note) for note in notes]
    if not probes:
        return [*blocks, Paragraph("No figure of hidden states: no probe.npz.")]
    _, y = next(iter(probes.values()))
    classes = class_names(section, y)
    what = "classes" if section.family == "vision" else "target tokens"
    return [*blocks,
            picture(section, "spectrum", figures.spectra(section, probes), "singular values of the centred hidden "
                    "states at the end (first seed), each divided by the head's largest."),
            picture(section, "pca", figures.pca(section, probes, classes), "hidden states at the end (first seed) on "
                    "their first two principal components, each panel on its own scale, with their share of the "
                    f"variance; coloured are the {len(classes)} most frequent {what}.")]


def class_names(section, y):
    """{class: name} of the most frequent classes or tokens in y (N,)"""
    vision = section.family == "vision"
    often = [k for k, _ in Counter(y.tolist()).most_common(10 if vision else 6)]
    if vision:
        return {k: str(k) for k in sorted(often)}
    try:
        encoding = run_encoding(section.runs[0])
        return {k: repr(encoding.decode([k])) for k in often}
    except (ImportError, OSError, ValueError, LookupError, OverflowError):
        return {k: f"token {k}" for k in often}


def run_encoding(r):
    """The encoding of a language run's dataset. Raises ValueError or OSError where that is not there any more."""
    folder = os.path.join(r.info["config"]["data_dir"], r.dataset)
    meta = load_meta(folder)
    if meta.get("hash") != r.info["data"].get("hash"):
        raise ValueError(f"{folder} holds other data than the run's")
    return load_encoding(meta, folder)

# -----------------------------------------------------------------------------
# over several sections


# the metrics that quality is drawn against: in the head's own geometry, and the paper's
INTERPRETABILITY = {"vision": ("own_variance_ratio", "mean_accuracy", "pc2_ev"),
                    "language": ("own_variance_ratio", "mean_accuracy", "pca5")}


def over_sections(sections):
    counts = comparisons.wins(sections)
    columns = list(next(iter(counts.values()), {}))
    rows = [[label, *map(str, count.values())] for label, count in counts.items()]
    return [Heading("Over all sections"), *small_multiples(sections), Paragraph(
        "In how many sections a head has the best mean, or fewer than five better ones; heads that tie have the same "
        "place. Quality is test accuracy or validation loss, energy is in kWh. Heads with their fixed n, where there "
        "are any. Counts say nothing of how much lies between."), Table("wins", ["head", *columns], rows),
        *emission_changes(sections)]


def small_multiples(sections):
    """Figures with a panel for each section, of the heads that are always drawn."""
    panels = []
    for section in sections:
        panels += [panel for key in INTERPRETABILITY[section.family] if (panel := trade_off_panel(section, key))]
    blocks = []
    if panels:
        blocks.append(Picture("interpretability_all", *figures.vector(figures.multiples(panels)), "quality against "
                              "interpretability, means and standard deviations over seeds, not normalised."))
    fig = figures.all_curves(sections)
    if fig:
        blocks.append(Picture("curves_all", *figures.vector(fig), "validation quality over training, mean over seeds, "
                              "not normalised; the axes leave out the untrained model."))
    rows = {section.name: emission_rows(section) for section in sections}
    panels = [(f"{name}: g CO2eq per run, less the baseline", rows) for name, rows in rows.items() if rows]
    if panels:
        blocks.append(Picture("emissions_by_section", *figures.vector(figures.bars(panels)), "g CO2eq per run less the "
                              "baseline's of the same seed, mean and standard deviation over seeds, not normalised; "
                              "negative emits less."))
    return blocks


def trade_off_panel(section, key):
    """The figures.Panel of the quality over another metric, or None where fewer than two heads have both."""
    points = []
    for head in section.few(0):
        if section.values(head, key) and section.values(head, section.quality):
            scaled = []
            for which in (key, section.quality):
                scale, std = METRICS[which].scale, section.std(head, which)
                scaled += [scale * section.mean(head, which), None if std is None else scale * std]
            points.append((section.labels[head], figures.style(head), *scaled))
    if len(points) < 2:
        return None
    return figures.Panel(section.name, figures.axis_title(key), figures.axis_title(section.quality), points)


def emission_changes(sections):
    changes, others = comparisons.emission_changes(sections)
    rows = []
    for label, head, values in changes:
        mean = statistics.mean(values)
        std = statistics.stdev(values) if len(values) > 1 else None
        rows.append((label, figures.style(head), mean, std, number(mean, "+.3g")))
    if not rows:
        return []
    caption = ("emissions against the baseline's in percent, mean and standard deviation over sections, of the heads "
               "that all sections have; negative emits less.")
    if others:
        caption += f" Not in all of them: {', '.join(others)}."
    fig = figures.bars([("% of the baseline's g CO2eq", rows)])
    return [Picture("emissions_all", *figures.vector(fig), caption)]
