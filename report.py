"""
A report of finished runs: tables, tests against the linear head, and figures, from what the runs have written.

$ python report.py out/study_digits
$ python report.py out/study_digits out/study_stdlib --out_dir=report

It reads every folder below the given ones that holds a config.json of a training script, and writes
index.html (one file, opens from disk), index.md, a CSV per table in tables/, every number of every run in
tables/runs.csv, and figures/*.png. Nothing is trained; checkpoints are read for the nearest prototypes only.

Runs are averaged over seeds, and only when all else agrees: data, settings, commit, torch's version, device. Where
something differs the runs come in sections of their own, and the top of the report says what it was. results.py reads
and groups the runs, metrics.py defines every number, figures.py draws every figure.
"""
import math
import os
import re
import statistics
import sys
from collections import Counter, defaultdict

import numpy as np
from tqdm import tqdm

import figures
import metrics
import results
from configurator import configure, fail
from data import load_encoding, load_meta
from families import load_run
from metrics import METRICS, RADAR, TABLES
from page import Cell, Heading, Paragraph, Picture, Pre, Table, number, shown, write_csv, write_page
from run_folder import Damaged, read_error, read_probe, readable
from sample import nearest_prototypes

# -----------------------------------------------------------------------------
# defaults
out_dir = "report"
top = 4 # heads that radar plots and curves show beside the baseline and Euclid: the best by quality
tokens = "self,return,True,int,if" # whose nearest prototypes to show, of language models; '': none
num_nearest = 6
significance = 0.05 # of the corrected p, for a best value to be marked
dpi = 130 # of the figures
# -----------------------------------------------------------------------------
# tables and tests


def n_text(section, head):
    if head.is_baseline:
        return ""
    text, n_at_end = f"{section.heads[head][0].info['n']:.3g}", section.n_at_end(head)
    if head.setting == "learned" and n_at_end is not None:
        text += f", ended at {n_at_end:.3g}"
    return text


def findings(section):
    """Paragraphs that say what the tests support, and what not."""
    blocks = []
    if not section.baseline:
        blocks.append(Paragraph("There is no baseline here (--distance=baseline with the same settings): no "
                                "differences, no tests."))
    elif max(map(len, section.heads.values())) < 2:
        blocks.append(Paragraph("One seed: no standard deviations and no test. Differences may be chance."))
    for key in (section.quality, "energy_kwh"):
        tests = section.tests(key)
        if tests:
            blocks.append(Paragraph(f"{METRICS[key].title}: {finding(section, key, tests)}"))
    return blocks


def finding(section, key, tests):
    if all(test["p"] is None for test in tests.values()):
        if all(test["n"] < 2 for test in tests.values()):
            return "no test. No head shares two seeds with the baseline."
        return "no test. The differences are the same for every seed."
    better, worse = [], []
    for head, test in tests.items():
        if results.significant(test, significance):
            side = better if section.change(head, key) > 0 else worse
            side.append(f"{section.labels[head]} (p = {test['p_corrected']:.2g})")
    best = section.best(key, tests, significance)
    mark = "No value is marked: the best mean does not beat the baseline so."
    if best:
        mark = f"The best mean, of {section.labels[best]}, is in bold."
    return (f"better than the baseline with corrected p < {significance:g}: {', '.join(better) or 'none'}; "
            f"worse: {', '.join(worse) or 'none'}. {mark}")


def head_table(section, title):
    """The table of that title in TABLES: heads by metrics, with the tests of the quality metric and of the energy."""
    keys = [key for key in TABLES[section.family][title] if section.known(key)]
    if not keys:
        return []
    tests = {}
    for key in keys:
        if key in (section.quality, "energy_kwh") and title != "interpretability":
            tests[key] = section.tests(key)
    columns = ["head", "n", "seeds"]
    for key in keys:
        columns.append(column_title(section, key))
        if tests.get(key):
            columns += ["difference [95%]", "d_z", "p, corrected"]
    rows, records = [], []
    for head, runs in section.heads.items():
        label, n, seeds = section.labels[head], n_text(section, head), " ".join(str(r.seed) for r in runs)
        row = [label, n, str(len(runs))]
        record = dict(head=label, n=n, n_setting="" if head == section.baseline else head.setting, seeds=seeds)
        for key in keys:
            cells, entries = entry(section, head, key, tests.get(key))
            row += cells
            record.update(entries)
        rows.append(row)
        records.append(record)
    return [Heading(title.capitalize(), 3), Table(f"{section.slug}_{title}", columns, rows, records)]


def column_title(section, key):
    if key != "emissions_g":
        return METRICS[key].title
    factors = sorted({f"{float(r.emissions['g_per_kwh']):.4g}" for r in section.runs if r.emissions})
    return f"emissions (g CO2eq, at {', '.join(factors)} g/kWh)"


def entry(section, head, key, tests):
    """The cells of one head and metric, and their numbers by name for the CSV. tests: those of the metric, or None."""
    m, mean, std, change = METRICS[key], section.mean(head, key), section.std(head, key), section.change(head, key)
    if head == section.baseline and key in ("model_health", "speed"):
        mean = std = None # 0, by definition
    text = shown(m, mean, std)
    if text and not section.complete(head, key):
        text += f" (of {len(section.values(head, key))})" # some seeds have none
    marked = bool(tests) and section.best(key, tests, significance) == head
    cells = [Cell(text, "" if change is None else f"{change:+.1f}%", marked)]
    entries = {f"{key}_mean": mean, f"{key}_std": std, f"{key}_change_percent": change}
    if not tests:
        return cells, entries
    test = tests.get(head, {})
    entries |= {f"{key}_pairs": test.get("n"), f"{key}_difference": test.get("mean"), f"{key}_best": int(marked)}
    for name in ("low", "high", "effect_size", "p", "p_corrected"):
        entries[f"{key}_{name}"] = test.get(name)
    mean, low, high = (signed(m, test.get(name)) for name in ("mean", "low", "high"))
    cells.append(Cell(mean, f"[{low}, {high}]" if low else ""))
    cells += [number(test.get("effect_size"), "+.2f"), number(test.get("p_corrected"), ".3g")]
    return cells, entries


def signed(metric, difference):
    return "" if difference is None else number(metric.scale * difference, "+" + metric.spec)

# -----------------------------------------------------------------------------
# figures of a section, and the tables that belong to them


def figure_blocks(section, probes):
    blocks = [Heading("Figures", 3)]
    if len(section.drawn) < len(section.heads):
        blocks.append(Paragraph("Figures show the heads with their fixed n; other n are in the section on n."))
    for part in (radar, curves, pareto, efficiency, emissions, geometry):
        blocks += part(section)
    return blocks + states(section, probes)


def picture(section, name, fig, caption):
    return Picture(f"{section.slug}_{name}", figures.png(fig, dpi), f"{section.name}: {caption}")


def radar(section):
    heads, axes = section.few(top), []
    for sector, keys in RADAR[section.family].items():
        for key in keys:
            if all(section.values(head, key) for head in heads):
                axes.append((sector, key))
    if len(axes) < 3 or len(heads) < 2:
        return [Paragraph("No radar plot: it takes two heads and three metrics that all of them have.")]
    return [picture(section, "radar", figures.radar(section, heads, axes),
                    f"means over seeds, min-max normalised on each axis over the {len(heads)} heads drawn, so that the "
                    "outer ring is the best of them and the innermost the worst, however little lies between; where "
                    "lower is better the axis is turned round.")]


def curves(section):
    energy = " (right: at their mean energy)" if section.family == "language" else ""
    return [picture(section, "curves", figures.section_curves(section, section.few(top)),
                    "mean over seeds, bands from the least to the largest seed, not normalised; "
                    f"{section.x}s that every seed of the head has{energy}. The axis leaves out the untrained model.")]


def pareto(section):
    points, front, outside = results.trade_off(section)
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
    return [picture(section, "efficiency", figures.bars(panels, 1 + 5.2 * len(panels)), caption)]


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
        rows.append((section.labels[head], head, means[head], section.std(head, key), text))
    return rows + [(section.labels[head], head, None, None, "not by every seed") for head in missing]


def emissions(section):
    rows = []
    for head, d in results.emission_differences(section).items():
        rows.append((section.labels[head], head, d["mean"], d["std"], number(d["mean"], "+.3g")))
    if not rows:
        return []
    return [picture(section, "emissions", figures.bars([("g CO2eq per run, less the baseline", rows)]),
                    "g CO2eq per run less the baseline's of the same seed, mean and standard deviation over seeds, not "
                    "normalised; negative emits less.")]


def geometry(section):
    blocks = [picture(section, "geometry", figures.geometry(section, section.few(top)),
                      "prototypes and hidden states of validation samples over training, mean over seeds, not "
                      "normalised. Variance and active ratio are defined below.")]
    records = results.prototype_growth(section)
    if not records:
        return blocks
    rows, growing, others = [], [], []
    for r in records:
        rows.append([r["head"], f"{r['start']:.3g}", f"{r['end']:.3g}", f"{r['end_over_start']:.3f}",
                     f"{r['end_over_middle']:.3f}"])
        (growing if r["end_over_middle"] > 1.01 else others).append(r["head"])
    columns = ["head", "|w| at the start", "|w| at the end", "end / start", "end / middle"]
    blocks.append(Paragraph(
        "Norms of the prototypes, mean over seeds. The paper's Theorem 1 lets cross-entropy's grow without bound and "
        "a harmonic head's not; a finite run can show growth, not a bound. Still growing in the second half "
        f"(end / middle above 1.01): {', '.join(growing) or 'none'}; not: {', '.join(others) or 'none'}."))
    return [*blocks, Table(f"{section.slug}_prototype_norms", columns, rows, records)]


def read_probes(section):
    """({head: (h (N, D), y (N,))} of each drawn head's first seed, notes about those that cannot be read)"""
    probes, notes = {}, []
    for head in section.few(top):
        try:
            probe = read_probe(section.heads[head][0].path)
        except Damaged as e:
            notes.append(f"no figure of hidden states: {e}")
            continue
        h = probe["h"]
        if min(len(h) - 1, h.shape[1]) > 1 and np.isfinite(h).all() and np.ptp(h, 0).any():
            probes[head] = h, probe["y"]
    return probes, notes


def states(section, probes):
    if not probes:
        return [Paragraph("No figure of hidden states: no probe.npz.")]
    _, y = next(iter(probes.values()))
    classes = class_names(section, y)
    what = "classes" if section.family == "vision" else "target tokens"
    return [picture(section, "spectrum", figures.spectra(section, probes), "singular values of the centred hidden "
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


def nearest(section):
    """The nearest prototypes of the tokens asked for, in the first run of each drawn head."""
    lines, skipped = [], []
    for head in section.few(top):
        r = section.heads[head][0]
        try:
            encoding = run_encoding(r)
            name = "best.pt" if os.path.exists(os.path.join(r.path, "best.pt")) else "ckpt.pt"
            with readable(os.path.join(r.path, name)):
                model, _, _ = load_run(r.path, name, "cpu")
                found = nearest_prototypes(model, encoding, tokens.split(","), num_nearest)
        except (ImportError, OSError, ValueError, KeyError, SystemExit) as e:
            reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            skipped.append(f"{section.labels[head]}: {reason}")
            continue
        kind = "largest dot products" if head.distance == "baseline" else "distances"
        lines += [f"{section.labels[head]} ({kind}), seed {r.seed}", *found, ""]
    blocks = [Heading("Nearest prototypes", 3)]
    if lines:
        blocks.append(Pre("\n".join(lines).strip()))
    if skipped:
        blocks.append(Paragraph("Skipped: " + "; ".join(skipped)))
    return blocks

# -----------------------------------------------------------------------------
# the exponent n


def exponents(section):
    """Tables and a figure that compare the fixed n, the best one by validation, and the learned one, per link."""
    by_link, several = {}, False
    for head in section.heads:
        if head.distance != "baseline" and section.values(head, section.quality):
            name = results.label(head._replace(setting="", n=0.0), section.usual)
            same = by_link.setdefault(head.link, {}).setdefault(name, [])
            same.append(head)
            several = several or len(same) > 1
    if not several:
        return []
    m = METRICS[section.quality]
    choice = "It is chosen on the same validation data that it is reported on, which favours it."
    if section.family == "vision":
        choice = "The test set had no part in that choice."
    validation = METRICS[results.VALIDATION[section.family]].title
    blocks = [Heading("The exponent n", 3), Paragraph(
        "Fixed n: the one that the script or a config file gives. Own best: of the fixed one and those from the "
        f"command line, the n with the best mean {validation} over seeds. {choice}")]
    for link, lines in by_link.items():
        blocks += [Paragraph(f"Link {link}; {m.title}:"), *exponent_table(section, link, lines)]
    caption = f"{m.title} over n, mean over seeds, not normalised; a star is the n at which learning ended."
    return [*blocks, picture(section, "n", figures.exponents(section, by_link), caption)]


def exponent_table(section, link, lines):
    """The table of one link, and the rankings of its heads. lines: {label: heads that differ in n}"""
    m, validation = METRICS[section.quality], results.VALIDATION[section.family]
    rows, records, fixed_means, best_means = [], [], {}, {}
    for name, heads in lines.items():
        by_setting = {head.setting: head for head in reversed(heads)}
        tried = [head for head in heads if head.setting != "learned" and section.values(head, validation)]
        means = {head: section.mean(head, validation) for head in tried}
        best = (min if METRICS[validation].lower else max)(tried, key=means.get, default=None)
        fixed = by_setting.get("fixed")
        row, record = [name, str(len(tried))], {"head": name, "tried": len(tried)}
        for what, head in (("fixed", fixed), ("own_best", best), ("learned", by_setting.get("learned"))):
            n, mean, std = "", None, None
            if head:
                n, mean = n_text(section, head), section.mean(head, section.quality)
                std = section.std(head, section.quality)
            row += [n, shown(m, mean, std)]
            record.update({f"{what}_n": n, f"{what}_{section.quality}": mean})
        rows.append(row)
        records.append(record)
        if fixed and len(tried) > 1:
            fixed_means[name] = section.mean(fixed, section.quality)
            best_means[name] = section.mean(best, section.quality)
    columns = ["head", "n tried", "fixed n", "quality", "own best n", "quality", "learned n", "quality"]
    blocks = [Table(f"{section.slug}_n_{link}", columns, rows, records)]
    if len(fixed_means) > 2:
        blocks.append(Paragraph(rankings(fixed_means, best_means, m.lower)))
    elif fixed_means:
        blocks.append(Paragraph("Fewer than three heads have several n: no rank correlation."))
    return blocks


def rankings(fixed_means, best_means, lower):
    """The heads' order under fixed n and under their own best n, as a sentence. Both are {label: quality}."""
    from scipy.stats import spearmanr
    rho = math.nan
    if len(set(fixed_means.values())) > 1 and len(set(best_means.values())) > 1:
        rho = spearmanr(list(fixed_means.values()), list(best_means.values())).statistic
    fixed = sorted(sorted(fixed_means), key=fixed_means.get, reverse=not lower)
    best = sorted(sorted(best_means), key=best_means.get, reverse=not lower)
    return (f"Ranking of the {len(fixed)} heads with several n: under fixed n {', '.join(fixed)}; each under its own "
            f"best n {', '.join(best)}. Spearman's rho between the two is {rho:.2f}.")

# -----------------------------------------------------------------------------
# over sections, and what there was


def over_sections(sections):
    rows = [[label, *map(str, counts.values())] for label, counts in results.wins(sections).items()]
    blocks = [Heading("Over all sections"), Paragraph(
        "In how many sections a head has the best mean, or one of the five best: of test accuracy or validation loss, "
        "and of energy (kWh). Heads with their fixed n, where there are any. Counts say nothing of how much lies "
        "between."), Table("wins", ["head", *results.WINS], rows)]
    rows = []
    for label, head, values in results.pooled_emissions(sections):
        mean = statistics.mean(values)
        std = statistics.stdev(values) if len(values) > 1 else None
        rows.append((f"{label} ({len(values)})", head, mean, std, number(mean, "+.3g")))
    if rows:
        fig = figures.bars([("g CO2eq per run, less the baseline", rows)])
        blocks.append(Picture("emissions_all", figures.png(fig, dpi), "g CO2eq per run less the baseline's, mean and "
                              "standard deviation over sections (how many: in brackets), not normalised: sections "
                              "with long runs weigh most."))
    return blocks


def commands(runs):
    """The command lines of these runs; those that differ in the seed and its folder only become one loop."""
    seeds = defaultdict(list)
    for r in runs:
        words = [word for word in r.info.get("command", "").split() if not word.startswith(("--seed=", "--out_dir="))]
        alone = rf"(?<!\d){r.seed}(?!\d)"
        folder = re.sub(rf"{alone}(?!.*{alone})", "$seed", r.info["config"]["out_dir"]) # the last place that names it
        seeds[" ".join(words), folder].append(r.seed)
    lines = []
    for (line, folder), found in seeds.items():
        loop = " ".join(map(str, sorted(found)))
        lines.append(f"for seed in {loop}; do python {line} --seed=$seed --out_dir={folder}; done")
    return lines


def provenance(sections):
    rows, lines = [], []
    for section in sections:
        lines += commands(section.runs)
        info = section.runs[0].info
        sources = []
        for part in ("cpu_source", "gpu_source", "ram_source"):
            found = {r.emissions.get(part) or "unknown" for r in section.runs if r.emissions}
            sources.append(", ".join(sorted(found)) or "not recorded")
        seeds = " ".join(map(str, sorted({r.seed for r in section.runs})))
        machine = [str(info.get(key, 1)) for key in ("device_name", "cpus", "threads", "runs_at_once", "dtype")]
        versions = " ".join(f"{name} {version}" for name, version in info["versions"].items() if version)
        rows.append([section.name, str(len(section.runs)), seeds, *sources, *machine, versions, str(info.get("git"))])
    columns = ["section", "runs", "seeds", "CPU energy", "GPU energy", "RAM energy", "device", "CPUs", "threads",
               "runs at once", "dtype", "versions", "commit"]
    return [Heading("What was measured, and how to make it again"), Paragraph(
        "Energy is measured where a counter gives it, and modelled where it is inferred: the CPU's from its TDP and "
        "load, the RAM's from its size. Losses, accuracies and times are measured. tables/runs.csv has every number of "
        "every run."),
        Table("provenance", columns, rows), Pre("\n".join(lines), "The commands that make these runs again")]


def definitions(sections):
    shown_keys = set()
    for section in sections:
        shown_keys.update(*TABLES[section.family].values())
    rows = []
    for key, m in METRICS.items():
        if key in shown_keys:
            rows.append([m.title, "lower" if m.lower else "higher", m.definition])
    return [Heading("Definitions", 3), Paragraph(
        "± is the standard deviation over seeds (ddof 1). Percentages are against the baseline, of the mean over the "
        "seeds that both have; positive is better whichever way the number goes. Differences are head - baseline, over "
        f"the same seeds; d_z has their sign. {metrics.PAIRED_TEST}"),
        Table("definitions", ["number", "better", "definition"], rows)]


def what_was_read(runs, ended, broken, error_folders):
    """Paragraphs that say which runs there are, and which are in no average."""
    seeds = ", ".join(map(str, sorted({r.seed for r in ended})))
    kinds = "; ".join(sorted({f"{r.dataset}, {r.model}" for r in ended}))
    texts = [f"{len(ended)} runs that have ended, seeds {seeds}, dataset and model: {kinds}."]
    unfinished = []
    for r in runs:
        if r.summary is None:
            last = r.evals[-1]["step"] if r.evals else "none"
            unfinished.append(f"{r.path} (last evaluation at step {last})")
    if unfinished:
        texts.append("Not ended, and in no average: " + ", ".join(unfinished))
    for path in error_folders:
        texts.append(f"Broken, and in no average: {path}: {read_error(path)}")
    if broken:
        texts.append("Skipped: " + "; ".join(broken))
    torn = [r.path for r in runs if not r.whole]
    if torn:
        texts.append("metrics.jsonl is damaged, and used without what cannot be read: " + ", ".join(torn))
    commits = [r.info.get("git") for r in ended]
    if any(not commit or "with changes" in commit for commit in commits):
        texts.append("Some runs are of files that no commit holds (config.json says 'with changes', or none): nothing "
                     "here tells whether all had the same.")
    return [Paragraph(text) for text in texts]


def what_differs(groups):
    """Blocks that say what keeps the groups of one dataset and model apart, and which runs are left out."""
    blocks = []
    for kind in dict.fromkeys(g.kind for g in groups):
        mine = [g for g in groups if g.kind == kind]
        if len(mine) > 1:
            differ, slug = list(mine[0].differ), re.sub(r"[^a-zA-Z0-9]+", "_", kind)
            rows = [[g.name, str(len(g.runs) + len(g.repeats)), *map(str, g.differ.values())] for g in mine]
            blocks.append(Paragraph(f"Not averaged together: the runs of {kind} differ in {', '.join(differ)}, and "
                                    f"come in {len(mine)} sections."))
            blocks.append(Table(f"differences_{slug}", ["section", "runs", *differ], rows))
        for g in mine:
            for left_out, kept in g.repeats:
                blocks.append(Paragraph(f"{left_out.path} repeats {kept.path}, same head and seed: left out."))
    return blocks


def note_blocks(runs):
    paths = defaultdict(list)
    for r in runs:
        for note in r.notes:
            paths[note].append(r.path)
    blocks = []
    for note, found in paths.items():
        where = ", ".join(found) if len(found) < 4 else f"{len(found)} runs"
        blocks.append(Paragraph(note if found[0] in note else f"{note}: {where}"))
    return blocks


def check_settings(folders):
    problems = [] if folders else ["no folder given: python report.py out/study_digits"]
    problems += [f"there is no folder {folder}" for folder in folders if not os.path.isdir(folder)]
    checks = ((out_dir != "", "out_dir is '', it must be the name of a folder"),
              (os.path.isdir(out_dir) or not os.path.exists(out_dir), f"out_dir is {out_dir!r}, which is no folder"),
              (top >= 0, f"top is {top}, it must be >= 0"),
              (num_nearest >= 1, f"num_nearest is {num_nearest}, it must be at least 1"),
              (0 < significance < 1, f"significance is {significance}, it must lie in (0, 1)"),
              (dpi >= 30, f"dpi is {dpi}, it must be at least 30"))
    fail(problems + [message for legal, message in checks if not legal])


def main(argv):
    configure(globals(), [arg for arg in argv if arg.startswith("-")])
    folders = [arg for arg in argv if not arg.startswith("-")]
    check_settings(folders)
    below = f"below {', '.join(folders)}"

    # read and measure the runs
    runs, broken = results.read_runs(folders)
    if not runs:
        message = f"no runs {below}: a run is a folder with a config.json of train.py or train_vision.py"
        raise SystemExit("\n  - skipped ".join([message, *broken]))
    ended = results.measure_all(runs, broken)
    if not ended:
        message = f"{len(runs)} runs {below}, but none has ended (summary.json): go on with --init_from=resume"
        raise SystemExit("\n  - skipped ".join([message, *broken]))

    # group them
    groups = results.group(ended)
    sections = results.make_sections(groups)

    # what there is to say
    unfinished = [r for r in runs if r.summary is None]
    top_of_page = [Heading("Distance heads: a report", 1),
                   *what_was_read(runs, ended, broken, results.find_runs(folders, "error.txt")),
                   *what_differs(groups), *note_blocks(unfinished + ended)]
    body = []
    for section in tqdm(sections, desc="sections", leave=False):
        probes, notes = read_probes(section)
        top_of_page += map(Paragraph, notes)
        body += [Heading(section.name), *findings(section)]
        for title in TABLES[section.family]:
            body += head_table(section, title)
        body += figure_blocks(section, probes) + exponents(section)
        if section.family == "language" and tokens:
            body += nearest(section)
    if len(sections) > 1:
        body += over_sections(sections)
    body += provenance(sections) + definitions(sections)

    write_page(out_dir, "Distance heads: a report", top_of_page + body)
    write_csv(os.path.join(out_dir, "tables", "runs.csv"), results.records(sections))
    index = os.path.join(out_dir, "index.html")
    print(f"{len(ended)} runs in {len(sections)} sections: {index}, index.md, tables, figures")


if __name__ == "__main__":
    main(sys.argv[1:])
