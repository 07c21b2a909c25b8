"""
A report of finished runs: tables, tests against the linear head, and figures, from what the runs have written.

$ python report.py out/study_digits
$ python report.py out/study_digits out/study_gpt --out_dir=report
$ python report.py out/claims        # the study of claims.py: its verdicts come first

It reads every folder below the given ones that holds a config.json of a training script, and writes
index.html (one file, opens from disk), index.md, each table as CSV and as LaTeX in tables/, every number of every run
in tables/runs.csv, and each figure as SVG and as PDF in figures/. Nothing is trained; checkpoints are read for the
nearest prototypes only.

Runs are averaged over seeds, and only when all else agrees: data, settings, commit, torch's version, device. Where
something differs the runs come in sections of their own, and the top of the report says what it was. results.py reads
and groups the runs, comparisons.py compares them, metrics.py defines every number, figures.py draws every figure.
"""
import math
import os
import re
import sys
from collections import defaultdict

from tqdm import tqdm

import comparisons
import figures
import metrics
import report_claims
import report_figures
import results
import verdicts
from configurator import configure, fail
from families import load_run
from metrics import METRICS, TABLES
from page import Cell, Heading, Paragraph, Pre, Table, number, shown, write_csv, write_page
from run_folder import read_error, readable
from sample import nearest_prototypes

# -----------------------------------------------------------------------------
# defaults
out_dir = "report"
top = 2 # heads that curves show beside the baseline and the paper's favourites: the best others by quality
tokens = "self,return,True,int,if" # whose nearest prototypes to show, of language models; '': none
num_nearest = 6
significance = 0.05 # of the corrected p, for a best value to be marked
# -----------------------------------------------------------------------------
_POWER = 0.9 # with which a difference of the detectable size is found

# -----------------------------------------------------------------------------
# tables and tests


def n_text(section, head):
    if head.is_baseline:
        return ""
    first, *_ = section.heads.get(head) or section.diverged[head]
    n_at_end = section.n_at_end(head) if head.setting == "learned" and head in section.heads else None
    return f"{first.info['n']:.3g}" + ("" if n_at_end is None else f", ended at {n_at_end:.3g}")


def findings(section):
    """Paragraphs that say what the tests support, and what not."""
    blocks = []
    if not section.baseline:
        blocks.append(Paragraph("There is no baseline here (--distance=baseline with the same settings): no "
                                "differences, no tests."))
    elif max(map(len, section.heads.values())) < 2:
        blocks.append(Paragraph("One seed: no standard deviations and no test. Differences may be chance."))
    failed = []
    for head in {**section.heads, **section.diverged}:
        for run in section.failures(head):
            reason = run.error if run.diverged else "it learned nothing"
            failed.append(f"{section.labels[head]}, seed {run.seed} ({reason:.120})")
    if failed:
        blocks.append(Paragraph(
            f"Failed runs, whose heads are not tested: {'; '.join(failed)}. A run has learned nothing where its best "
            f"validation result is no further from guessing than {results.LEAST_PROGRESS:.0%} of the baseline's."))
    for key in (section.quality, "energy_kwh"):
        tests = section.tests(key)
        if tests:
            blocks.append(Paragraph(f"{METRICS[key].title}: {finding(section, key, tests)}"))
    return blocks


def finding(section, key, tests):
    if all(test["n"] < 2 for test in tests.values()):
        return "no test. No head shares two seeds with the baseline."
    m, better, worse, equal, sizes = METRICS[key], [], [], [], []
    for head, test in tests.items():
        label = section.labels[head]
        if results.significant(test, significance):
            side = better if section.is_better(head, key) else worse
            side.append(f"{label} (p = {test['p_corrected']:.2g})")
        elif test["std"] == 0:
            equal.append(f"{label} ({signed(m, test['mean'])})")
        elif test["p"] is not None:
            sizes.append(detectable(test))
    best = section.best(key, tests, significance)
    text = (f"better than the baseline with corrected p < {significance:g}: {', '.join(better) or 'none'}; "
            f"worse: {', '.join(worse) or 'none'}; undecided: {len(sizes)}")
    if sizes:
        span = sorted({number(m.scale * size, m.spec.lstrip("+")) for size in (min(sizes), max(sizes))}, key=float)
        text += f", of which a true difference of {' to '.join(span)} would have been found with a power of {_POWER:g}"
    if equal:
        text += f"; the same difference in every seed, which allows no test: {', '.join(equal)}"
    if best:
        return f"{text}. The best mean, of {section.labels[best]}, is in bold."
    return f"{text}. No value is marked: the best mean does not beat the baseline so."


def detectable(test):
    """The true difference that a test of so many seeds finds with a power of _POWER, before the correction of p."""
    if test.get("p") is None:
        return None
    return test["std"] / test["n"] ** 0.5 * verdicts.detectable(test["n"] - 1, significance, _POWER)


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
            columns += ["difference [95%]", "detectable", "d_z", "p, corrected"]
    rows, records = [], []
    for head, runs in section.heads.items():
        label, n, seeds = section.labels[head], n_text(section, head), " ".join(str(r.seed) for r in runs)
        failed = len(section.failures(head))
        row = [label, n, f"{len(runs)}, {failed} failed" if failed else str(len(runs))]
        setting = "" if head == section.baseline else head.setting
        record = dict(head=label, n=n, n_setting=setting, seeds=seeds, failed=failed)
        for key in keys:
            cells, entries = entry(section, head, key, tests.get(key))
            row += cells
            record.update(entries)
        rows.append(row)
        records.append(record)
    for head, runs in section.diverged.items():
        if head not in section.heads:
            label, n = section.labels[head], n_text(section, head)
            rows.append([label, n, f"0, {len(runs)} failed"] + [""] * (len(columns) - 3))
            records.append(dict(head=label, n=n, failed=len(runs)))
    return [Heading(title.capitalize(), 3), Table(f"{section.slug}_{title}", columns, rows, records)]


def column_title(section, key):
    if key != "emissions_g":
        return METRICS[key].title
    factors = sorted({f"{float(r.emissions['g_per_kwh']):.4g}" for r in section.runs if r.emissions})
    return f"emissions (g CO2eq, at {', '.join(factors)} g/kWh)"


def entry(section, head, key, tests):
    """The cells of one head and metric, and their numbers by name for the CSV. tests: those of the metric, or None."""
    m, mean, std = METRICS[key], section.mean(head, key), section.std(head, key)
    difference, change = section.difference(head, key), section.change(head, key)
    if head == section.baseline and key in results.DIFFERENCES:
        mean = std = None # 0, by definition
    text, small = shown(m, mean, std), ""
    if text and not section.complete(head, key):
        text += f" (of {len(section.values(head, key))})" # some seeds have none
    entries = {f"{key}_mean": mean, f"{key}_std": std}
    if key in results.IN_PERCENT:
        entries[f"{key}_change_percent"] = change
        small = "" if change is None else f"{change:+.1f}%"
    elif key not in results.DIFFERENCES:
        entries[f"{key}_change"] = difference
        small = signed(m, difference)
    if not tests:
        return [Cell(text, small)], entries
    test, marked = tests.get(head, {}), section.best(key, tests, significance) == head
    entries |= {f"{key}_pairs": test.get("n"), f"{key}_difference": test.get("mean"), f"{key}_best": int(marked),
                f"{key}_detectable": detectable(test)}
    for name in ("low", "high", "effect_size", "p", "p_corrected"):
        entries[f"{key}_{name}"] = test.get(name)
    mean, low, high, least = (signed(m, x) for x in (test.get("mean"), test.get("low"), test.get("high"),
                                                     detectable(test)))
    interval = "in every seed" if test.get("std") == 0 else low and f"[{low}, {high}]"
    cells = [Cell(text, small, marked), Cell(mean, interval), least.lstrip("+")]
    cells += [number(test.get("effect_size"), "+.2f"), number(test.get("p_corrected"), ".3g")]
    return cells, entries


def signed(metric, difference):
    return "" if difference is None else number(metric.scale * difference, "+" + metric.spec.lstrip("+"))

# -----------------------------------------------------------------------------
# nearest prototypes


def nearest(section):
    """The nearest prototypes of the tokens asked for, in the first run of each drawn head."""
    lines, skipped = [], []
    for head in section.few(top):
        r = section.heads[head][0]
        try:
            encoding = report_figures.run_encoding(r)
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
    return [*blocks, report_figures.picture(section, "n", figures.exponents(section, by_link), caption)]


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


def definitions(sections, others):
    shown_keys = set(others)
    for section in sections:
        shown_keys.update(*TABLES[section.family].values())
    rows = []
    for key, m in METRICS.items():
        if key in shown_keys:
            rows.append([m.title, "lower" if m.lower else "higher", m.definition])
    return [Heading("Definitions", 3), Paragraph(
        "± is the standard deviation over seeds (ddof 1). Percentages are against the baseline, of the mean over the "
        "seeds that both have; positive is better whichever way the number goes. Differences, and small numbers "
        "without a percent sign, are head - baseline, over the same seeds; the detectable one is what a single test "
        f"finds with a power of {_POWER:g}; d_z has their sign. {metrics.PAIRED_TEST}"),
        Table("definitions", ["number", "better", "definition"], rows)]


def what_was_read(runs, ended, broken, error_folders):
    """Paragraphs that say which runs there are, and which are in no average."""
    if not runs:
        return []
    seeds = ", ".join(map(str, sorted({r.seed for r in ended})))
    kinds = "; ".join(sorted({f"{r.dataset}, {r.model}" for r in ended}))
    texts = [f"{len(ended)} runs that have ended, seeds {seeds}, dataset and model: {kinds}."]
    unfinished = []
    for r in runs:
        if r.summary is None and not r.error:
            last = r.evals[-1]["step"] if r.evals else "none"
            unfinished.append(f"{r.path} (last evaluation at step {last})")
    if unfinished:
        texts.append("Not ended, and in no average: " + ", ".join(unfinished))
    diverged = {r.path: r.error for r in runs if r.diverged}
    for path, error in diverged.items():
        texts.append(f"Diverged, a failure of its head: {path}: {error}")
    for path in error_folders:
        if path not in diverged:
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
              (0 < significance < 1, f"significance is {significance}, it must lie in (0, 1)"))
    fail(problems + [message for legal, message in checks if not legal])


def main(argv):
    configure(globals(), [arg for arg in argv if arg.startswith("-")])
    folders = [arg for arg in argv if not arg.startswith("-")]
    check_settings(folders)
    below = f"below {', '.join(folders)}"

    # read and measure the runs
    claims = report_claims.studies(folders)
    without = [study.path for study in claims] # their runs are in their tables
    runs, broken = results.read_runs(folders, without)
    if not runs and not claims:
        message = f"no runs {below}: a run is a folder with a config.json of train.py or train_vision.py"
        raise SystemExit("\n  - skipped ".join([message, *broken]))
    ended = results.measure_all(runs, broken)
    if not ended and not claims:
        message = f"{len(runs)} runs {below}, but none has ended (summary.json): go on with --init_from=resume"
        raise SystemExit("\n  - skipped ".join([message, *broken]))

    # group them
    groups = results.group([*ended, *[r for r in runs if r.diverged]])
    sections = results.make_sections(groups)

    # what there is to say
    unfinished = [r for r in runs if r.summary is None]
    top_of_page = [Heading("Distance heads: a report", 1),
                   *[block for study in claims for block in report_claims.blocks(study)],
                   *what_was_read(runs, ended, broken, results.find_runs(folders, "error.txt", without)),
                   *what_differs(groups), *note_blocks(unfinished + ended)]
    body = []
    for section in tqdm(sections, desc="sections", leave=False):
        body += [Heading(section.name), *findings(section)]
        for title in TABLES[section.family]:
            body += head_table(section, title)
        body += report_figures.figure_blocks(section, section.few(top)) + exponents(section)
        if section.family == "language" and tokens:
            body += nearest(section)
    if len(sections) > 1:
        body += report_figures.over_sections(sections)
    if sections:
        body += provenance(sections)
    body += definitions(sections, [key for study in claims for key in report_claims.metrics_shown(study)])

    write_page(out_dir, "Distance heads: a report", top_of_page + body)
    write_csv(os.path.join(out_dir, "tables", "runs.csv"), comparisons.records(sections))
    index = os.path.join(out_dir, "index.html")
    tabled = f"{sum(len(study.rows) for study in claims)} runs of claims, " if claims else ""
    print(f"{tabled}{len(ended)} runs in {len(sections)} sections: {index}, index.md, tables, figures")


if __name__ == "__main__":
    main(sys.argv[1:])
