"""
A report of finished runs: tables, tests against the linear head, and figures, from what the runs have written.

$ python report.py out/study_digits
$ python report.py out/study_digits out/study_stdlib --out_dir=report

It reads every folder below the given ones that holds a config.json of train.py or train_vision.py, and writes index.html (one file, opens from
disk), index.md, a CSV per table in tables/, and figures/*.png. Nothing is trained; checkpoints are read for the nearest prototypes only.

Runs are averaged over seeds, and only when all else agrees: data, settings, commit, torch's version, device. Where something differs the runs come in
sections of their own, and the top of the report says what it was. Every number is defined in metrics.py, or below in METRICS.
"""
import base64
import csv
import html
import inspect
import json
import math
import os
import re
import statistics
import sys
import zipfile
from collections import Counter, defaultdict, namedtuple
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

import metrics
import run
from configurator import configure, fail
from data import load_encoding, load_meta
from distances import DISTANCES, parse_head
from families import load_run
from sample import nearest_prototypes

plt.switch_backend("agg") # files only

# -----------------------------------------------------------------------------
# defaults
out_dir = "report"
top = 4 # heads that radar plots and curves show beside the baseline and Euclid: the best by quality
tokens = "self,return,True,int,if" # whose nearest prototypes to show, of language models; '': none
num_nearest = 6
significance = 0.05 # of the corrected p, for a best value to be marked
dpi = 130 # of the figures
# -----------------------------------------------------------------------------


def doc(function):
    """Of a docstring of metrics.py the first sentence, the formula, and those that say whose definition it is, in one line."""
    first, *rest = re.split(r"(?<=[.]) (?=[A-Z])", " ".join(inspect.getdoc(function).split()))
    return " ".join([first, *(sentence for sentence in rest if re.search(r"definition|\bours?\b|BH|Benjamini", sentence))])


# title, digits, factor to the unit of the title, whether lower is better, definition
Metric = namedtuple("Metric", "title spec scale lower definition")
_TO_90 = doc(metrics.time_to) + " Of validation loss, or 1 - validation accuracy for vision; each head's own 90%."
METRICS = dict(
    test_accuracy=Metric("test accuracy (%)", ".2f", 100, False, "Share of the test set classified right, with the weights of the best epoch by validation accuracy. Standard."),
    f1_macro=Metric("macro F1", ".4f", 1, False, "Mean over classes of 2 TP / (2 TP + FP + FN), on the test set. Standard; that it is the macro average is our reading."),
    test_loss=Metric("test loss (nats)", ".4f", 1, True, "Mean -log p_y on the test set, the true loss, with the weights of the best epoch by validation accuracy."),
    val_accuracy=Metric("validation accuracy (%)", ".2f", 100, False, "Of the best epoch."),
    val_loss=Metric("validation loss (nats)", ".4f", 1, True, "Mean -log p_y at the end over a fixed part of the validation split, the true loss. BERT: of masked tokens."),
    perplexity=Metric("perplexity", ".4g", 1, True, "exp(validation loss)."),
    gradient_stability=Metric("gradient stability", ".3f", 1, False, doc(metrics.gradient_stability)),
    clipping_quality=Metric("clipping quality", ".3f", 1, False, doc(metrics.clipping_quality)),
    learning_quality=Metric("learning quality", ".3f", 1, False, doc(metrics.learning_quality)),
    model_health=Metric("model health", "+.4f", 1, False, "-(collapse score - the baseline's of the same seed): positive collapses less. Named in the paper, ours."),
    pc2_ev=Metric("PC2 EV", ".3f", 1, False, doc(metrics.explained_variance)),
    pca90=Metric("PCA@90% (to 50)", ".1f", 1, True, doc(metrics.components_for)),
    pca90_uncapped=Metric("PCA@90%", ".1f", 1, True, "As above, without a cap."),
    prototype_alignment=Metric("prototype alignment", ".3f", 1, False, doc(metrics.prototype_alignment)),
    pca5=Metric("PCA5", ".3f", 1, False, doc(metrics.explained_variance)),
    effective_rank=Metric("effective rank", ".1f", 1, False, doc(metrics.effective_rank)),
    collapse_score=Metric("collapse score", ".3f", 1, True, doc(metrics.collapse_score)),
    variance_ratio=Metric("variance ratio", ".3f", 1, True, "Mean |h_i - mu_y|^2 within classes over mean |mu_y - mu|^2 between them, of validation samples at the last "
                          "evaluation, classes of two samples and more. The 'variance' of Variance & Greediness, whose formulas are not public: the definition is ours."),
    active_ratio=Metric("active ratio", ".3f", 1, True, doc(metrics.active_ratio) + " That lower is better is a convention of this table."),
    energy_kwh=Metric("energy (kWh)", ".3g", 1, True, "CPU, GPU and RAM of the machine from step 0 to the last evaluation, evaluations included (emissions.py)."),
    emissions_g=Metric("emissions (g CO2eq)", ".3g", 1, True, "kWh times the g CO2eq per kWh of the grid, one factor for a run."),
    seconds_per_epoch=Metric("s per epoch", ".3g", 1, True, "Median over epochs, evaluations not included."),
    seconds_per_step=Metric("s per step", ".3g", 1, True, "Median over log lines, evaluations not included."),
    seconds_to_90=Metric("time to 90% (s)", ".3g", 1, True, _TO_90),
    speed=Metric("speed (s)", "+.3g", 1, False, "-(time to 90% - the baseline's of the same seed): positive is faster. The paper names it, the definition is ours."),
    wh_to_90=Metric("energy to 90% (Wh)", ".3g", 1, True, _TO_90),
    wh_to_target=Metric("energy to target (Wh)", ".3g", 1, True, "Energy to the first evaluation as good as the target, the same for all heads: where the baseline's mean over "
                        "seeds has made 90% of its progress. Runs that never get there have none. Ours."),
    quality_per_wh=Metric("quality per Wh", ".3g", 1, False, "Vision: points of test accuracy above chance (100/K) per Wh. Language: (log V - validation loss) per Wh. Ours."))
TABLES = {"vision": {"quality": ("test_accuracy", "f1_macro", "test_loss", "gradient_stability", "clipping_quality"),
                     "interpretability": ("test_accuracy", "pc2_ev", "pca90", "pca90_uncapped", "prototype_alignment", "variance_ratio", "active_ratio"),
                     "sustainability": ("energy_kwh", "emissions_g", "seconds_per_epoch", "seconds_to_90", "speed", "wh_to_90", "wh_to_target", "quality_per_wh")},
          "language": {"quality": ("val_loss", "perplexity", "gradient_stability", "clipping_quality", "learning_quality", "model_health"),
                       "interpretability": ("val_loss", "pca5", "effective_rank", "collapse_score", "variance_ratio", "active_ratio"),
                       "sustainability": ("energy_kwh", "emissions_g", "seconds_per_step", "seconds_to_90", "speed", "wh_to_90", "wh_to_target", "quality_per_wh")}}
RADAR = {"vision": {"model quality": ("f1_macro", "test_accuracy"), "interpretability": ("pc2_ev", "pca90"), "sustainability": ("seconds_per_epoch", "emissions_g")},
         "language": {"model quality": ("val_loss", "model_health", "gradient_stability", "learning_quality", "clipping_quality"), "interpretability": ("pca5",),
                      "sustainability": ("emissions_g",)}}
QUALITY, VALIDATION = {"vision": "test_accuracy", "language": "val_loss"}, {"vision": "val_accuracy", "language": "val_loss"}
# what a head is, and what neither decides a result nor its energy; every other setting has to agree where runs are averaged
HEAD_KEYS = ("distance", "variant", "distance_params", "link", "n", "learn_n", "eps", "feature_scale")
IGNORED = (*HEAD_KEYS, "seed", "out_dir", "data_dir", "overwrite", "plots", "wandb_log", "wandb_project", "wandb_run_name", "wandb_mode", "device", "dtype")
Head = namedtuple("Head", "distance variant params link setting n eps feature_scale") # setting: 'fixed', 'given' or 'learned' n

# -----------------------------------------------------------------------------
# reading


def finite(x):
    return isinstance(x, (int, float)) and math.isfinite(x)


def find_runs(folders, name="config.json"):
    """paths of the folders with a file of that name at or below the given ones, each once"""
    found = {os.path.realpath(path): path for folder in folders for path, _, files in os.walk(folder) if name in files}
    return sorted(found.values())


def read_json(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def head_of(info):
    c = info["config"]
    if c["distance"] == "baseline": # has neither n nor link
        return Head("baseline", "", "", "", "fixed", 0.0, 0.0, c["feature_scale"])
    setting = "learned" if c["learn_n"] else "given" if info["sources"]["n"] == "command line" and c["n"] else "fixed"
    variant = c["variant"] or next(iter(DISTANCES.get(c["distance"], [""])))
    params = parse_head(c["distance"], params=c["distance_params"])
    params = ", ".join(f"{k}={v:g}" for k, v in sorted(params.items()) if k not in ("distance", "variant"))
    return Head(c["distance"], variant, params, c["link"], setting, c["n"], c["eps"], c["feature_scale"])


def read_run(path):
    """A run's folder as a namespace. ValueError where config.json is not that of a run."""
    try:
        info = read_json(os.path.join(path, "config.json"))
        c = info["config"]
        r = SimpleNamespace(path=path, info=info, config=c, head=head_of(info), seed=c["seed"], dataset=c["dataset"], model=c.get("model", "gpt"),
                            family="vision" if info["script"] == "train_vision.py" else "language", notes=[])
        r.fingerprint = {**{k: v for k, v in c.items() if k not in IGNORED}, "data hash": info["data"].get("hash"), "torch": info["versions"]["torch"],
                         **{k: info.get(k) for k in ("git", "dtype", "device", "device_name", "cpus", "threads", "world_size")}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"config.json is not that of a run ({type(e).__name__}: {e})") from None
    rows, r.whole = run.read_metrics(path)
    r.evals, r.train = ([row for row in rows if row.get("kind") == kind] for kind in ("eval", "train"))
    r.summary = r.emissions = None
    try:
        r.summary = dict(read_json(os.path.join(path, "summary.json")))
    except FileNotFoundError:
        pass
    except (ValueError, TypeError) as e:
        r.notes.append(f"summary.json cannot be read ({e})")
    if os.path.exists(os.path.join(path, "emissions.csv")):
        with open(os.path.join(path, "emissions.csv"), newline="", encoding="utf-8", errors="replace") as f:
            r.emissions = next((row for row in reversed(list(csv.DictReader(f))) if None not in row.values()), None) # a whole row
    if any(name.startswith("emissions_node") for name in os.listdir(path)):
        r.notes.append("several nodes: the energy is that of node 0")
    return r


def measure(r):
    """r.values, by name of METRICS: numbers, without those that the run does not have."""
    s, last, vision = r.summary, r.evals[-1] if r.evals else {}, r.family == "vision"
    classes = r.info["data"]["num_classes"] if vision else r.info["model_args"]["vocab_size"]
    v = {key: source.get(key) for source in (last, s) for key in METRICS if key in source}
    v.update(energy_kwh=s.get("energy_kwh_total"), emissions_g=s.get("emissions_g_total"))
    if not vision and (ms := [row["ms"] for row in r.train if finite(row.get("ms"))]):
        v["seconds_per_step"] = statistics.median(ms) / 1000
    norms = lambda rows: [row["grad_norm"] for row in rows if finite(row.get("grad_norm"))]
    late = norms([row for row in r.train if (row["epoch"] >= 1 if vision else row["step"] > r.config["warmup_iters"])])
    if len(late) < 2 and norms(r.train):
        late = norms(r.train)
        r.notes.append("gradient norms: fewer than 2 log lines after warm-up (vision: the first epoch), all are used")
    if late:
        v["gradient_stability"], v["clipping_quality"] = metrics.gradient_stability(late), metrics.clipping_quality(late, r.config["grad_clip"])
    r.errors = [1 - row["val_accuracy"] if vision else row["val_loss"] for row in r.evals]
    if r.evals:
        if not vision:
            v["learning_quality"] = metrics.learning_quality(r.errors[0], min(r.errors), classes)
        if all("energy_kwh_total" in row for row in r.evals):
            to = {key: metrics.time_to([row[f"{key}_total"] for row in r.evals], r.errors) for key in ("seconds", "energy_kwh")}
            v["seconds_to_90"], v["wh_to_90"] = to["seconds"], to["energy_kwh"] and 1000 * to["energy_kwh"]
    if v["energy_kwh"]:
        v["quality_per_wh"] = (100 * (v["test_accuracy"] - 1 / classes) if vision else math.log(classes) - v["val_loss"]) / (1000 * v["energy_kwh"])
    r.values = {key: value for key, value in v.items() if finite(value)}


class Section:
    """Runs that may be averaged: heads maps each Head to its runs, a seed each."""
    def __init__(self, runs, name):
        self.runs, self.name, self.family = runs, name, runs[0].family
        self.slug = re.sub(r"\W+", "_", name).strip("_")
        self.quality = QUALITY[self.family]
        heads = defaultdict(list)
        for r in sorted(runs, key=lambda r: r.seed):
            heads[r.head].append(r)
        self.usual = {key: Counter(getattr(r.head, key) for r in runs if r.head.distance != "baseline").most_common(1) for key in ("eps", "feature_scale")}
        self.labels = {head: label(head, self.usual) for head in heads}
        same = Counter(self.labels.values()) # fixed n from several files
        self.labels = {head: f"{text} ({head.n:g})" if same[text] > 1 else text for head, text in self.labels.items()}
        baselines = [head for head in heads if head.distance == "baseline"]
        self.baseline = max(baselines, key=lambda head: len(heads[head]), default=None)
        for r in runs if self.baseline else (): # what is defined by the baseline
            base = {b.seed: b for b in heads[self.baseline]}.get(r.seed)
            for key, source in (("model_health", "collapse_score"), ("speed", "seconds_to_90")):
                if base and source in r.values and source in base.values:
                    r.values[key] = base.values[source] - r.values[source]
        targets = [b.errors[0] - 0.9 * (b.errors[0] - min(b.errors)) for b in heads.get(self.baseline, ()) if b.errors]
        self.target = statistics.mean(targets) if targets else None
        for r in runs if targets else ():
            reached = [row["energy_kwh_total"] for row, e in zip(r.evals, r.errors) if e <= self.target and "energy_kwh_total" in row]
            r.values.update({"wh_to_target": 1000 * reached[0]} if reached else {})
        self.heads = heads
        best = lambda head: (head != self.baseline, -self.mean(head, self.quality) * (1 - 2 * METRICS[self.quality].lower) if self.seeds(head, self.quality) else math.inf)
        self.heads = {head: heads[head] for head in sorted(heads, key=best)} # the baseline, then from the best on
        drawn = [head for head in self.heads if head.setting == "fixed"] # n has a section of its own
        self.drawn = drawn if len(drawn) > 1 else list(self.heads)
        euclid = [head for head in self.drawn if head.distance == "euclidean"][:1]
        self.few = [*([self.baseline] if self.baseline else []), *euclid, *[head for head in self.drawn if head not in (self.baseline, *euclid)][:top]]

    def seeds(self, head, key):
        return {r.seed: r.values[key] for r in self.heads[head] if key in r.values}

    def mean(self, head, key):
        values = self.seeds(head, key).values()
        return statistics.mean(values) if values else None

    def std(self, head, key):
        values = list(self.seeds(head, key).values())
        return statistics.stdev(values) if len(values) > 1 else None

    def paired(self, head, key):
        """(values, baseline's values) of the seeds that both have"""
        mine, base = self.seeds(head, key), self.seeds(self.baseline, key) if self.baseline and head != self.baseline else {}
        return tuple([side[seed] for seed in mine if seed in base] for side in (mine, base))

    def change(self, head, key):
        """percent against the baseline, over the seeds that both have; positive is better"""
        mine, base = self.paired(head, key)
        change = metrics.percent_change(statistics.mean(mine), statistics.mean(base), METRICS[key].lower) if mine else math.nan
        return change if finite(change) else None

    def tests(self, key):
        """{head: metrics.paired with p_corrected}, over the heads of this section"""
        pairs = {head: self.paired(head, key) for head in self.heads}
        result = {head: metrics.paired(*pair) for head, pair in pairs.items() if pair[0]}
        for test, p in zip(result.values(), metrics.corrected([test["p"] for test in result.values()]) if result else ()):
            test["p_corrected"] = p
        return result

    def best(self, key, tests):
        """The head with the best mean, if its difference to the baseline is supported; else None."""
        seeds = {head: self.seeds(head, key) for head in self.heads} # a head that lost a seed does not compete
        means = {head: self.mean(head, key) for head in self.heads if seeds[head] and (not self.baseline or set(seeds[head]) >= set(seeds[self.baseline]))}
        head = (min if METRICS[key].lower else max)(means, key=means.get, default=None)
        p = tests.get(head, {}).get("p_corrected")
        return head if p is not None and p < significance and self.change(head, key) > 0 else None


def label(head, usual):
    variant = "" if head.variant == next(iter(DISTANCES.get(head.distance, [""]))) else " " + head.variant
    extra = [head.params, head.link.replace("harmonic", ""), f"n={head.n:g}" if head.setting == "given" else "learned n" if head.setting == "learned" else ""]
    extra += [f"{key}={getattr(head, key):g}" for key in ("eps", "feature_scale") if head.distance != "baseline" and usual[key][0][0] != getattr(head, key)]
    return ", ".join([head.distance + variant, *filter(None, extra)])


def sections(runs, page):
    """Runs by dataset and model, split wherever they do not agree; what differs goes to the top of the page."""
    groups, result = defaultdict(lambda: defaultdict(list)), []
    for r in runs:
        groups[f"{r.dataset}, {r.model}"][json.dumps(r.fingerprint, sort_keys=True)].append(r)
    for name, parts in sorted(groups.items()):
        parts = list(parts.values())
        letters = [""] if len(parts) == 1 else [f" ({i + 1})" for i in range(len(parts))]
        if len(parts) > 1:
            prints = [part[0].fingerprint for part in parts]
            differ = [key for key in dict.fromkeys(k for p in prints for k in p) if len({json.dumps(p.get(key)) for p in prints}) > 1]
            page.paragraph(f"Not averaged together: the runs of {name} differ in {', '.join(differ)}, and come in {len(parts)} sections.")
            page.table(f'differences_{re.sub(r"[^a-zA-Z0-9]+", "_", name)}', ["section", "runs", *differ],
                       [[name + letter, str(len(part)), *(str(p.get(key)) for key in differ)] for letter, part, p in zip(letters, parts, prints)])
        for letter, part in zip(letters, parts):
            once = {}
            for r in part:
                if (first := once.setdefault((r.head, r.seed), r)) is not r:
                    page.paragraph(f"{r.path} repeats {first.path}, same head and seed: left out.")
            result.append(Section(list(once.values()), name + letter))
    for i, section in enumerate(result): # names that differ in what a file's name cannot hold
        section.slug += f"_{i}" * (section.slug in [other.slug for other in result[:i]])
    return result

# -----------------------------------------------------------------------------
# writing: the page is a list of blocks, rendered once as Markdown and once as HTML


class Cell(str):
    """Text of a table's cell, with a second line in small, and bold or not."""
    def __new__(cls, text, small="", bold=False):
        cell = super().__new__(cls, text)
        cell.small, cell.bold = small, bold
        return cell


_CSS = """body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1180px; margin: 2em auto; padding: 0 1.5em }
h1, h2, h3 { line-height: 1.2 } h2 { margin-top: 2.5em; border-bottom: 1px solid #ccc; padding-bottom: .2em }
.scroll { overflow-x: auto } table { border-collapse: collapse; margin: .5em 0 1em; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .3em .7em; text-align: right; vertical-align: top; border-bottom: 1px solid #e4e4e4 } th { border-bottom: 1px solid #888; vertical-align: bottom }
th:first-child, td:first-child, td.text { text-align: left } td { white-space: nowrap } td.text { white-space: normal; max-width: 60em } small { color: #666 }
figure { margin: 1.5em 0 } figure img { max-width: 100%; height: auto } figcaption { color: #444; font-size: 13px; max-width: 70em }
pre { background: #f6f6f6; padding: .8em; overflow-x: auto; font-size: 12px; line-height: 1.4 } p { max-width: 70em }"""


def plain_md(text):
    return text.replace("<", "&lt;")


class Page:
    def __init__(self, folder):
        self.folder, self.blocks = folder, []
        for name in ("tables", "figures"):
            os.makedirs(os.path.join(folder, name), exist_ok=True)

    def heading(self, text, level=2):
        self.blocks.append((f"{'#' * level} {plain_md(text)}", f"<h{level}>{html.escape(text)}</h{level}>"))

    def paragraph(self, text):
        self.blocks.append((plain_md(text), f"<p>{html.escape(text)}</p>"))

    def pre(self, text, summary=""):
        inner = f"<pre>{html.escape(text)}</pre>"
        self.blocks.append((f"{summary}\n\n```\n{text}\n```".strip(), f"<details><summary>{html.escape(summary)}</summary>{inner}</details>" if summary else inner))

    def table(self, name, columns, rows, records=None):
        """rows of text or Cells, a CSV beside them: of records (dicts of full precision), or of the text."""
        def md(cell):
            text = " ".join(filter(None, (str(cell), getattr(cell, "small", ""))))
            text = plain_md(text).replace("|", "\\|").replace("\n", " ")
            return f"**{text}**" if getattr(cell, "bold", False) else text

        def td(cell):
            text, small = html.escape(str(cell)), html.escape(getattr(cell, "small", ""))
            text = (f"<b>{text}</b>" if getattr(cell, "bold", False) else text) + (f"<br><small>{small}</small>" if small else "")
            return f"<td{' class=text' if len(cell) > 40 else ''}>{text}</td>"
        self.blocks.append(("\n".join(f"| {' | '.join(line)} |" for line in (map(md, columns), ["---"] * len(columns), *([md(c) for c in row] for row in rows))),
                            f"<div class=scroll><table><thead><tr>{''.join(f'<th>{html.escape(c)}</th>' for c in columns)}</tr></thead><tbody>"
                            + "".join(f"<tr>{''.join(map(td, row))}</tr>" for row in rows) + "</tbody></table></div>"))
        records = records or [dict(zip(columns, row)) for row in rows]
        with open(os.path.join(self.folder, "tables", name + ".csv"), "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, list(dict.fromkeys(key for record in records for key in record)), lineterminator="\n")
            writer.writeheader()
            writer.writerows(records)

    def figure(self, fig, section, name, caption):
        if section:
            name, caption = f"{section.slug}_{name}", f"{section.name}: {caption}"
        path = os.path.join("figures", name + ".png")
        fig.savefig(os.path.join(self.folder, path), dpi=dpi, bbox_inches="tight") # labels at the edge too
        plt.close(fig)
        with open(os.path.join(self.folder, path), "rb") as f:
            data = base64.b64encode(f.read()).decode()
        self.blocks.append((f"![{name}]({path})\n\n*{plain_md(caption)}*",
                            f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}"><figcaption>{html.escape(caption)}</figcaption></figure>'))

    def write(self, title):
        run.write(os.path.join(self.folder, "index.md"), "\n\n".join(md for md, _ in self.blocks) + "\n")
        run.write(os.path.join(self.folder, "index.html"), f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
                  f'<style>{_CSS}</style></head><body>\n' + "\n".join(text for _, text in self.blocks) + "\n</body></html>\n")


def number(x, spec):
    return "" if x is None else f"{x:{'+' if '+' in spec else ''},.0f}" if "g" in spec and abs(x) >= 1000 else f"{x:{spec}}"


def shown(metric, mean, std, count=0):
    """mean ± std in the metric's unit, both to its digits; (count) where some seeds have none"""
    if mean is None:
        return ""
    text = number(metric.scale * mean, metric.spec)
    if std is not None:
        text += f" ± {number(metric.scale * std, metric.spec.lstrip('+').replace('.3g', '.2g'))}"
    return text + (f" (of {count})" if count else "")

# -----------------------------------------------------------------------------
# tables


def n_text(section, head):
    runs = section.heads[head]
    if head.distance == "baseline":
        return ""
    ended = [r.summary["n"] for r in runs if finite(r.summary.get("n"))]
    return f"{runs[0].info['n']:.3g}" if head.setting != "learned" or not ended else f"{runs[0].info['n']:.3g}, ended at {statistics.mean(ended):.3g}"


def head_table(page, section, title):
    """One of TABLES: heads by metrics, with the test for the section's quality metric or its energy."""
    keys = [key for key in TABLES[section.family][title] if any(section.seeds(head, key) for head in section.heads)]
    tested = {key: section.tests(key) for key in keys if key in (section.quality, "energy_kwh") and title != "interpretability"}
    columns, rows, records = ["head", "n", "seeds"], [], []
    factors = sorted({f"{float(r.emissions['g_per_kwh']):.4g}" for r in section.runs if r.emissions})
    for key in keys:
        columns.append(METRICS[key].title.replace("CO2eq)", f"CO2eq, at {', '.join(factors)} g/kWh)") if key == "emissions_g" else METRICS[key].title)
        columns += ["difference [95%]", "d_z", "p, corrected"] if tested.get(key) else []
    for head, runs in section.heads.items():
        row = [section.labels[head], n_text(section, head), str(len(runs))]
        record = dict(head=section.labels[head], n=row[1], n_setting=head.setting if head != section.baseline else "", seeds=" ".join(str(r.seed) for r in runs))
        for key in keys:
            m, mean, std, change, tests = METRICS[key], section.mean(head, key), section.std(head, key), section.change(head, key), tested.get(key, {})
            count = len(section.seeds(head, key))
            marked = bool(tests) and section.best(key, tests) == head
            if head == section.baseline and key in ("model_health", "speed"):
                mean = std = None # 0, by definition
            row.append(Cell(shown(m, mean, std, count if count < len(runs) else 0), f"{change:+.1f}%" if change is not None else "", marked))
            record.update({f"{key}_mean": mean, f"{key}_std": std, f"{key}_change_percent": change})
            if tests:
                t = tests.get(head, {})
                record.update({f"{key}_pairs": t.get("n"), f"{key}_difference": t.get("mean"), f"{key}_best": int(marked),
                               **{f"{key}_{k}": t.get(k) for k in ("low", "high", "effect_size", "p", "p_corrected")}})
                signed = lambda x, m=m: number(m.scale * x, "+" + m.spec)
                row += [Cell(signed(t["mean"]), f"[{signed(t['low'])}, {signed(t['high'])}]" if t["low"] is not None else "") if t else "",
                        number(t.get("effect_size"), "+.2f"), number(t.get("p_corrected"), ".3g")]
        rows.append(row)
        records.append(record)
    page.heading(title.capitalize(), 3)
    page.table(f"{section.slug}_{title}", columns, rows, records)


def findings(page, section):
    """In words: what the tests support, and what not."""
    for key in (section.quality, "energy_kwh"):
        what, tests = METRICS[key].title, section.tests(key)
        if not tests:
            continue
        if all(t["p"] is None for t in tests.values()):
            page.paragraph(f"{what}: no test. " + ("No head shares two seeds with the baseline." if all(t["n"] < 2 for t in tests.values())
                                                   else "The differences are the same for every seed."))
        else:
            better, worse = [], []
            for head, t in tests.items():
                if t["p_corrected"] is not None and t["p_corrected"] < significance:
                    (better if section.change(head, key) > 0 else worse).append(f"{section.labels[head]} (p = {t['p_corrected']:.2g})")
            best = section.best(key, tests)
            page.paragraph(f"{what}: better than the baseline with corrected p < {significance:g}: {', '.join(better) or 'none'}; worse: {', '.join(worse) or 'none'}. "
                           + (f"The best mean, of {section.labels[best]}, is in bold." if best else
                              "No value is marked: the best mean does not beat the baseline so."))


def exponents(page, section):
    """n: fixed, best on validation, learned; the rankings; quality over n."""
    m, lower = METRICS[section.quality], METRICS[section.quality].lower
    by_link = defaultdict(lambda: defaultdict(list))
    for head in section.heads:
        if head.distance != "baseline" and section.seeds(head, section.quality):
            by_link[head.link][head._replace(setting="", n=0.0)].append(head)
    if all(len(heads) < 2 for link in by_link.values() for heads in link.values()):
        return
    page.heading("The exponent n", 3)
    value, validation = VALIDATION[section.family], METRICS[VALIDATION[section.family]]
    page.paragraph("Fixed n: the one that the script or a config file gives. Own best: of the fixed one and those from the command line, the n with the best mean "
                   f"{validation.title} over seeds. " + ("The test set had no part in that choice." if section.family == "vision" else
                                                         "It is chosen on the same validation data that it is reported on, which favours it."))
    for link, bases in by_link.items():
        rows, records, pairs = [], [], []
        for base, heads in bases.items():
            fixed, learned = (next((head for head in heads if head.setting == s), None) for s in ("fixed", "learned"))
            tried = [head for head in heads if head.setting != "learned" and section.seeds(head, value)]
            own = (min if validation.lower else max)(tried, key=lambda head: section.mean(head, value), default=None)
            name, row, record = label(base, section.usual), [], {}
            for what, head in (("fixed", fixed), ("own_best", own), ("learned", learned)):
                row += [n_text(section, head), shown(m, section.mean(head, section.quality), section.std(head, section.quality))] if head else ["", ""]
                record.update({f"{what}_n": row[-2], f"{what}_{section.quality}": section.mean(head, section.quality) if head else None})
            rows.append([name, str(len(tried)), *row])
            records.append({"head": name, "tried": len(tried), **record})
            if fixed and own and len(tried) > 1:
                pairs.append((name, section.mean(fixed, section.quality), section.mean(own, section.quality)))
        page.paragraph(f"Link {link}; {m.title}:")
        page.table(f"{section.slug}_n_{link}", ["head", "n tried", "fixed n", "quality", "own best n", "quality", "learned n", "quality"], rows, records)
        rank = lambda i, pairs=pairs: ", ".join(name for _, name in sorted((pair[i] if lower else -pair[i], pair[0]) for pair in pairs))
        if len(pairs) > 2:
            from scipy.stats import spearmanr
            rho = spearmanr([pair[1] for pair in pairs], [pair[2] for pair in pairs]).statistic if min(len({x for _, x, _ in pairs}), len({x for *_, x in pairs})) > 1 else math.nan
            page.paragraph(f"Ranking of the {len(pairs)} heads with several n: under fixed n {rank(1)}; each under its own best n {rank(2)}. "
                           f"Spearman's rho between the two is {rho:.2f}.")
        elif pairs:
            page.paragraph("Fewer than three heads have several n: no rank correlation.")
    fig, axes = plt.subplots(1, len(by_link), figsize=(1.8 + 5.2 * len(by_link), 4), layout="constrained", squeeze=False, sharey=True)
    for ax, (link, bases) in zip(axes[0], by_link.items()):
        for base, heads in bases.items():
            points = sorted((section.heads[head][0].info["n"], m.scale * section.mean(head, section.quality)) for head in heads if head.setting != "learned")
            name = label(base, section.usual)
            ax.plot(*zip(*points), **style(base), label=name) if points else None
            for head in heads:
                ended = [r.summary["n"] for r in section.heads[head] if finite(r.summary.get("n"))]
                if head.setting == "learned" and ended:
                    ax.plot(statistics.mean(ended), m.scale * section.mean(head, section.quality), **{**style(base), "marker": "*", "ms": 13, "ls": "", "mec": "k", "mew": 0.6})
        if section.baseline:
            ax.axhline(m.scale * section.mean(section.baseline, section.quality), color="k", lw=1, ls=":", label="baseline")
        ax.plot([], [], "*", color="w", mec="k", ms=11, label="learned n")
        ticks = sorted({float(f"{section.heads[head][0].info['n']:.3g}") for heads in bases.values() for head in heads if head.setting != "learned"})
        ax.set(xscale="log", xlabel="n", title=f"{link} link" if len(by_link) > 1 else "")
        ax.set_xticks(ticks, [f"{x:g}" for x in ticks], minor=False)
        ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        tidy(ax)
    axes[0, 0].set_ylabel(m.title)
    fig.legend(*unique(axes.flat), loc="outside right upper", frameon=False, fontsize=9)
    page.figure(fig, section, "n", f"{m.title} over n, mean over seeds, not normalised; a star is the n at which learning ended.")


# -----------------------------------------------------------------------------
# figures

# of different lightness, to be told apart in grey; the baseline is black
COLOURS = dict(baseline="#000000", euclidean="#d55e00", manhattan="#14397d", chebyshev="#8c564b", minkowski="#9acd32", cosine="#56b4e9", hamming="#e377c2",
               canberra="#e6c229", bray_curtis="#009e73", mahalanobis="#6a3d9a", offset_l2="#b2182b")
_LINES, _MARKERS = ("-", "--", ":", "-."), "os^D"


def style(head):
    """Colour by distance, line and marker by variant; the softmin link has hollow markers. The same in every figure."""
    i = list(DISTANCES.get(head.distance, [""])).index(head.variant) % 4 if head.variant in DISTANCES.get(head.distance, ()) else 0
    colour = COLOURS.get(head.distance, "#777777")
    return dict(color=colour, ls=_LINES[i], marker=_MARKERS[i], ms=5, lw=2.2 if head.distance == "baseline" else 1.6, mfc="w" if head.link == "softmin" else colour)


def tidy(ax):
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9)


def unique(axes):
    """handles and labels of a legend for several axes, each label once"""
    found = {}
    for ax in axes:
        for handle, text in zip(*ax.get_legend_handles_labels()):
            found.setdefault(text, handle)
    return list(found.values()), list(found)


def legend_below(fig, axes, columns=3):
    handles, texts = unique(axes)
    fig.legend(handles, texts, loc="outside lower center", ncols=min(columns, len(texts)), frameon=False, fontsize=9)


def plain(text):
    return text.replace("$", r"\$") # matplotlib's mathematics begins there


def place_labels(ax, points, texts, steps=()):
    """Each text beside its point, at the nearest place that no other text or point has, nor the line through steps; with a line to it if that is far."""
    ax.figure.canvas.draw()
    box = lambda a, b, pad: matplotlib.transforms.Bbox.from_extents(*(np.minimum(a, b) - pad), *(np.maximum(a, b) + pad))
    taken = [box(p, p, 6) for p in ax.transData.transform(points)]
    corners = [corner for (x, y), (x2, y2) in zip(steps, steps[1:]) for corner in ((x, y), (x2, y), (x2, y2))]
    taken += [box(a, b, 1) for a, b in zip(*(ax.transData.transform(corners)[i:] for i in (0, 1)))] if corners else []
    frame = ax.get_window_extent()
    offsets = [(r * math.cos(a), r * math.sin(a)) for r in (9, 16, 26, 38, 52, 70) for a in np.pi * np.array((0, 1, 0.25, -0.25, 0.75, -0.75, 0.5, -0.5))]
    for point, text in zip(points, texts):
        for dx, dy in offsets:
            note = ax.annotate(plain(text), point, (dx, dy), textcoords="offset points", fontsize=8, va="center", ha="left" if dx > 1 else "right" if dx < -1 else "center",
                               arrowprops=dict(arrowstyle="-", color="0.6", lw=0.6, shrinkA=0, shrinkB=3) if math.hypot(dx, dy) > 20 else None)
            note.update_positions(ax.figure.canvas.get_renderer())
            extent = matplotlib.text.Text.get_window_extent(note) # without the line
            if frame.x0 <= extent.x0 and extent.x1 <= frame.x1 and frame.y0 <= extent.y0 and extent.y1 <= frame.y1 and not any(extent.overlaps(other) for other in taken):
                break
            if (dx, dy) != offsets[-1]:
                note.remove()
        taken.append(extent)


def radar(page, section):
    axes = [(sector, key) for sector, keys in RADAR[section.family].items() for key in keys if all(section.seeds(head, key) for head in section.few)]
    if len(axes) < 3 or len(section.few) < 2:
        return page.paragraph("No radar plot: it takes two heads and three metrics that all of them have.")
    angles = np.linspace(0, 2 * np.pi, len(axes), endpoint=False)
    values = np.array([[section.mean(head, key) * (1 - 2 * METRICS[key].lower) for _, key in axes] for head in section.few])
    low, spread = values.min(0), np.ptp(values, 0)
    values = np.where(spread > 0, (values - low) / np.where(spread > 0, spread, 1), 1)
    fig, ax = plt.subplots(figsize=(8, 5.2), layout="constrained", subplot_kw=dict(projection="polar"))
    for i, sector in enumerate(dict.fromkeys(sector for sector, _ in axes)):
        mine = angles[[s == sector for s, _ in axes]]
        ax.bar(mine.mean(), 1.2, width=np.ptp(mine) + 2 * np.pi / len(axes), bottom=-0.2, color=str(0.9 if i % 2 else 0.96), lw=0, zorder=0)
    for head, row in zip(section.few, values):
        ax.plot([*angles, angles[0]], [*row, row[0]], **style(head), label=plain(section.labels[head]), clip_on=False)
    ax.set(ylim=(-0.2, 1), theta_offset=np.pi / 2, theta_direction=-1, yticks=[0, 0.5, 1], yticklabels=[])
    ax.set_xticks(angles, [])
    for angle, (sector, key) in zip(angles, axes):
        side = "left" if np.sin(angle) > 0.1 else "right" if np.sin(angle) < -0.1 else "center"
        up = np.cos(angle) > 0.5
        for text, dy, size, colour in ((METRICS[key].title.split(" (")[0], 12 if up else -4, 10, "k"), (sector, 0 if up else -18, 8, "0.45")):
            ax.annotate(text, (angle, 1.06), (0, dy), textcoords="offset points", ha=side, va="bottom" if up else "top", fontsize=size, color=colour, annotation_clip=False)
    ax.spines["polar"].set_visible(False)
    ax.grid(color="0.75", lw=0.6)
    fig.legend(*unique([ax]), loc="outside right upper", frameon=False, fontsize=9)
    page.figure(fig, section, "radar", f"means over seeds, min-max normalised on each axis over the {len(section.few)} heads drawn, so that the outer ring is the "
                "best of them and the innermost the worst, however little lies between; where lower is better the axis is turned round.")


def course(section, head, key):
    """(x (T,), values (seeds, T)) of an evaluation's number, at the x that every seed has"""
    x = "epoch" if section.family == "vision" else "step"
    runs = [{row[x]: row[key] for row in r.evals if finite(row.get(key))} for r in section.heads[head]]
    common = sorted(set.intersection(*map(set, runs)))
    return common, np.array([[values[c] for c in common] for values in runs])


def curves(page, section):
    vision, limits = section.family == "vision", defaultdict(list)
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.3), layout="constrained")
    for ax, key, over in zip(axes, ("val_accuracy", "val_loss") if vision else ("val_loss", "val_loss"), (None, None) if vision else (None, "energy_kwh_total")):
        m = METRICS[key]
        for head in section.few:
            x, values = course(section, head, key)
            if over:
                energies = course(section, head, over)
                if not len(x) or energies[0] != x:
                    continue
                x = 1000 * energies[1].mean(0)
            if len(x):
                ax.plot(x, m.scale * values.mean(0), **style(head), markevery=max(1, len(x) // 8), label=plain(section.labels[head]))
                ax.fill_between(x, m.scale * values.min(0), m.scale * values.max(0), color=style(head)["color"], alpha=0.15, lw=0)
                limits[ax] += [m.scale * values[:, 1:].min(), m.scale * values[:, 1:].max()] if len(x) > 2 else []
        if limits[ax]: # the untrained model would press the rest together
            low, high = min(limits[ax]), max(limits[ax])
            ax.set_ylim(low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1))
        ends = [line.get_xdata()[-1] for line in ax.lines]
        if over and ends and max(ends) > 8 * min(ends) > 0:
            ax.set_xscale("log")
        ax.set(xlabel="energy (Wh)" if over else "epoch" if vision else "step", ylabel=m.title)
        tidy(ax)
    legend_below(fig, axes)
    page.figure(fig, section, "curves", f"mean over seeds, bands from the least to the largest seed, not normalised; {'epochs' if vision else 'steps'} that every "
                f"seed of the head has{'' if vision else ' (right: at their mean energy)'}. The axis leaves out the untrained model.")


def bars(ax, items, xlabel, spec):
    """Horizontal bars of (label, head, mean, std or None), with their values; None is a bar that is not there."""
    for i, (_, head, mean, std) in enumerate(items):
        if mean is None:
            ax.annotate(" not by every seed", (0, i), va="center", fontsize=8, color="0.4")
            continue
        ax.barh(i, mean, color=style(head)["color"], height=0.65, xerr=std, error_kw=dict(ecolor="0.35", lw=1, capsize=2))
        end = mean + math.copysign(std or 0, mean)
        ax.annotate(number(mean, spec), (end, i), (4 if mean >= 0 else -4, 0), textcoords="offset points", va="center", ha="left" if mean >= 0 else "right", fontsize=8)
    ax.set_yticks(range(len(items)), [plain(item[0]) for item in items], fontsize=9)
    ax.set_ylim(len(items) - 0.4, -0.6) # the first on top
    ax.set_xlabel(xlabel)
    ax.margins(x=0.2)
    ax.axvline(0, color="k", lw=0.8)
    tidy(ax)


def emission_bars(page, section):
    items = []
    for head in section.drawn:
        mine, base = section.paired(head, "emissions_g")
        if mine:
            d = metrics.paired(mine, base)
            items.append((section.labels[head], head, d["mean"], d["std"]))
    if items:
        items.sort(key=lambda item: item[2])
        fig, ax = plt.subplots(figsize=(8, 1.2 + 0.34 * len(items)), layout="constrained")
        bars(ax, items, "g CO2eq per run, less the baseline", "+.3g")
        page.figure(fig, section, "emissions", "g CO2eq per run less the baseline's of the same seed, mean and standard deviation over seeds, not normalised; "
                    "negative emits less.")
    return {section.labels[head]: (head, mean) for _, head, mean, _ in items}


def efficiency(page, section):
    panels = []
    for key in ("wh_to_target", "quality_per_wh"):
        if any(section.seeds(head, key) for head in section.drawn):
            every = lambda h, key=key: len(section.seeds(h, key)) == len(section.heads[h])
            items = [(section.labels[h], h, section.mean(h, key) if every(h) else None, section.std(h, key)) for h in section.drawn if section.seeds(h, "energy_kwh")]
            panels.append((key, sorted(items, key=lambda item, sign=1 if METRICS[key].lower else -1: (item[2] is None, sign * (item[2] or 0)))))
    if not panels:
        return
    fig, axes = plt.subplots(1, len(panels), figsize=(1 + 5.2 * len(panels), 1.2 + 0.34 * len(panels[0][1])), layout="constrained", squeeze=False)
    for ax, (key, items) in zip(axes[0], panels):
        unit = "accuracy points above chance per Wh" if section.family == "vision" else "(log V - validation loss) per Wh"
        bars(ax, items, f"Wh to {'an error of' if section.family == 'vision' else 'a loss of'} {section.target:.3g}" if key == "wh_to_target" else unit, ".3g")
    page.figure(fig, section, "efficiency", "" + ("energy to the quality at which the baseline has made 90% of its progress (left), and " if len(panels) > 1 else "")
                + "quality per energy; mean and standard deviation over seeds, not normalised.")


def pareto(page, section):
    m = METRICS[section.quality]
    points = {h: (1000 * section.mean(h, "energy_kwh"), m.scale * section.mean(h, section.quality)) for h in section.drawn
              if section.seeds(h, "energy_kwh") and section.seeds(h, section.quality)}
    if len(points) < 2:
        return
    better = lambda a, b: a < b if m.lower else a > b
    qualities = [q for _, q in points.values()]
    best, median = (min if m.lower else max)(qualities), statistics.median(qualities)
    outside = [h for h, (_, q) in points.items() if abs(q - best) > 5 * abs(median - best) > 0 and h != section.baseline] # they would squeeze the rest
    points = {h: point for h, point in points.items() if h not in outside}
    front = sorted(p for p in points.values() if not any(q != p and q[0] <= p[0] and (q[1] == p[1] or better(q[1], p[1])) for q in points.values()))
    fig, ax = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    ax.step(*zip(*front), where="post", color="0.6", lw=1.2, zorder=0)
    for head, point in points.items():
        ax.plot(*point, **{**style(head), "ls": "", "ms": 8})
    if max(x for x, _ in points.values()) > 8 * min(x for x, _ in points.values()):
        ax.set_xscale("log")
    ax.margins(0.16)
    ax.set(xlabel="energy per run (Wh)", ylabel=m.title)
    tidy(ax)
    place_labels(ax, list(points.values()), [section.labels[head] for head in points], front)
    on = [section.labels[head] for head, point in points.items() if point in front]
    page.figure(fig, section, "pareto", f"quality against energy, means over seeds, not normalised; the line joins the heads that no other beats in both ({', '.join(on)})."
                + (f" Far below the frame: {', '.join(section.labels[head] for head in outside)}." if outside else ""))


def geometry(page, section):
    keys = [("prototype_norm", "mean prototype norm |w|"), *((key, METRICS[key].title) for key in ("effective_rank", "variance_ratio", "active_ratio"))]
    fig, axes = plt.subplots(2, 2, figsize=(10, 6.8), layout="constrained")
    rows, records = [], []
    for ax, (key, title) in zip(axes.flat, keys):
        for head in section.few:
            x, values = course(section, head, key)
            if len(x):
                ax.plot(x, values.mean(0), **style(head), markevery=max(1, len(x) // 8), label=plain(section.labels[head]))
        ax.set(xlabel="epoch" if section.family == "vision" else "step", ylabel=title)
        tidy(ax)
    legend_below(fig, axes.flat)
    page.figure(fig, section, "geometry", "prototypes and hidden states of validation samples over training, mean over seeds, not normalised. "
                "Variance and active ratio are the variance and greediness of METRICS' definitions below.")
    for head in section.drawn:
        x, values = course(section, head, "prototype_norm")
        if len(x) > 1 and (values[:, 0] > 0).all():
            growth, late = (values[:, -1] / values[:, i] for i in (0, len(x) // 2))
            rows.append([section.labels[head], f"{values[:, 0].mean():.3g}", f"{values[:, -1].mean():.3g}", f"{growth.mean():.3f}", f"{late.mean():.3f}"])
            records.append(dict(head=section.labels[head], start=values[:, 0].mean(), end=values[:, -1].mean(), end_over_start=growth.mean(), end_over_middle=late.mean()))
    if rows:
        named = lambda growing: ", ".join(r["head"] for r in records if (r["end_over_middle"] > 1.01) == growing)
        page.paragraph("Norms of the prototypes, mean over seeds. The paper's Theorem 1 lets cross-entropy's grow without bound and a harmonic head's not; a finite run can show "
                       f"growth, not a bound. Still growing in the second half (end / middle above 1.01): {named(True) or 'none'}; not: {named(False) or 'none'}.")
        page.table(f"{section.slug}_prototype_norms", ["head", "|w| at the start", "|w| at the end", "end / start", "end / middle"], rows, records)


def load_probe(r):
    try:
        with np.load(os.path.join(r.path, "probe.npz")) as f:
            return f["h"].astype(np.float64), f["y"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        r.notes.append(f"probe.npz cannot be read ({type(e).__name__})")


def data_folder(r):
    """(meta, folder) of a language run's dataset, the same that it was trained on; ValueError or OSError where it is not there."""
    folder = os.path.join(r.config["data_dir"], r.dataset)
    meta = load_meta(folder)
    if meta.get("hash") != r.info["data"].get("hash"):
        raise ValueError(f"{folder} holds other data than the run's")
    return meta, folder


def states(page, section):
    """The spectrum of the hidden states and their first two components, from probe.npz of each head's first seed."""
    probes = {head: p for head in section.few if (p := load_probe(section.heads[head][0])) and len(p[0]) > 2 and np.isfinite(p[0]).all() and np.ptp(p[0], 0).any()}
    if not probes:
        return page.paragraph("No figure of hidden states: no probe.npz.")
    fig, ax = plt.subplots(figsize=(8, 4.4), layout="constrained")
    for head, (h, _) in probes.items():
        s = metrics.spectrum(h)
        s = s[s > 1e-7 * s[0]] / s[0]
        ax.loglog(np.arange(1, len(s) + 1), s, **{**style(head), "marker": None}, label=plain(section.labels[head]))
    ax.set(xlabel="component", ylabel="singular value / the largest")
    tidy(ax)
    fig.legend(*unique([ax]), loc="outside right upper", frameon=False, fontsize=9)
    page.figure(fig, section, "spectrum", "singular values of the centred hidden states at the end (first seed), each divided by the head's largest.")
    y = next(iter(probes.values()))[1]
    often = [k for k, _ in Counter(y.tolist()).most_common(6 if section.family == "language" else 10)]
    often = sorted(often) if section.family == "vision" else often
    name = str
    if section.family == "language":
        try:
            encoding = load_encoding(*data_folder(section.runs[0]))
            name = lambda k: repr(encoding.decode([k]))
        except (ImportError, OSError, ValueError, KeyError):
            name = lambda k: f"token {k}"
    columns = min(3, len(probes))
    fig, axes = plt.subplots(-(-len(probes) // columns), columns, figsize=(3.5 * columns + 1.4, 3.2 * -(-len(probes) // columns)), layout="constrained", squeeze=False)
    colours = plt.get_cmap("tab10")
    for ax, (head, (h, y)) in zip(axes.flat, probes.items()):
        h = h - h.mean(0)
        u, s, _ = np.linalg.svd(h, full_matrices=False)
        rest = ~np.isin(y, often)
        ax.scatter(*(u * s)[rest, :2].T, s=5, color="0.8", lw=0, label="others" if rest.any() else None)
        for i, k in enumerate(often):
            ax.scatter(*(u * s)[y == k, :2].T, s=11, color=colours(i), lw=0, label=plain(name(k)))
        ax.set(xticks=[], yticks=[])
        ax.set_title(f"{plain(section.labels[head])} ({metrics.explained_variance(metrics.spectrum(h), 2):.0%})", fontsize=9)
        ax.spines[["top", "right", "left", "bottom"]].set_color("0.7")
    for ax in axes.flat[len(probes):]:
        ax.axis("off")
    fig.legend(*unique(axes.flat), loc="outside right center", frameon=False, fontsize=9, markerscale=2)
    page.figure(fig, section, "pca", f"hidden states at the end (first seed) on their first two principal components, each panel on its own scale, with their share of "
                f"the variance; coloured are the {len(often)} most frequent {'target tokens' if section.family == 'language' else 'classes'}.")


def nearest(page, section):
    """The nearest prototypes of the asked tokens, one run of each head."""
    lines, notes = [], []
    for head in section.few:
        r = section.heads[head][0]
        try:
            encoding = load_encoding(*data_folder(r))
            model = load_run(r.path, "best.pt" if os.path.exists(os.path.join(r.path, "best.pt")) else "ckpt.pt", "cpu")[0]
            found = nearest_prototypes(model, encoding, tokens.split(","), num_nearest)
            lines += [f"{section.labels[head]} ({'largest dot products' if head.distance == 'baseline' else 'distances'}), seed {r.seed}", *found, ""]
        except (ImportError, OSError, ValueError, KeyError, RuntimeError, SystemExit) as e:
            notes.append(f"{section.labels[head]}: {str(e).splitlines()[0] if str(e) else type(e).__name__}")
    page.heading("Nearest prototypes", 3)
    if lines:
        page.pre("\n".join(lines).strip())
    if notes:
        page.paragraph("Skipped: " + "; ".join(notes))

# -----------------------------------------------------------------------------
# over sections, and what there was


def over_sections(page, parts, differences):
    page.heading("Over all sections")
    counts = defaultdict(Counter)
    for section in parts:
        for key, what in ((section.quality, "quality"), ("energy_kwh", "energy")):
            means = {head: section.mean(head, key) for head in section.drawn if section.seeds(head, key)}
            for place, head in enumerate(sorted(means, key=lambda head: means[head] * (1 if METRICS[key].lower else -1))):
                counts[section.labels[head]].update({f"{what} sections": 1, f"{what} wins": int(place == 0), f"{what} top 5": int(place < 5)})
    columns = [f"{what} {count}" for what in ("quality", "energy") for count in ("sections", "wins", "top 5")]
    order = sorted(counts, key=lambda name: [-counts[name][c] for c in ("quality wins", "quality top 5", "energy wins")])
    page.paragraph("In how many sections a head has the best mean, or one of the five best: of test accuracy or validation loss, and of energy (kWh). "
                   "Heads with their fixed n, where there are any. Counts say nothing of how much lies between.")
    page.table("wins", ["head", *columns], [[name, *(str(counts[name][c]) for c in columns)] for name in order])
    pooled = defaultdict(list)
    for by_label in differences:
        for name, (head, mean) in by_label.items():
            pooled[name, head._replace(n=0.0, eps=0.0, feature_scale=0.0)].append(mean)
    items = sorted(((f"{name} ({len(d)})", head, statistics.mean(d), statistics.stdev(d) if len(d) > 1 else None) for (name, head), d in pooled.items()), key=lambda item: item[2])
    if items:
        fig, ax = plt.subplots(figsize=(8, 1.2 + 0.34 * len(items)), layout="constrained")
        bars(ax, items, "g CO2eq per run, less the baseline", "+.3g")
        page.figure(fig, None, "emissions_all", "g CO2eq per run less the baseline's, mean and standard deviation over sections (how many: in brackets), not normalised: "
                    "sections with long runs weigh most.")


def commands(runs):
    """The command lines, those that differ in the seed and its folder only as one loop."""
    found = defaultdict(list)
    for r in runs:
        words = [word for word in r.info.get("command", "").split() if not word.startswith(("--seed=", "--out_dir="))]
        found[" ".join(words), re.sub(rf"(?<!\d){r.seed}(?!\d)(?!.*(?<!\d){r.seed}(?!\d))", "$seed", r.config["out_dir"])].append(r.seed)
    return [f"for seed in {' '.join(map(str, sorted(seeds)))}; do python {line} --seed=$seed --out_dir={folder}; done" for (line, folder), seeds in found.items()]


def provenance(page, parts):
    page.heading("What was measured, and how to make it again")
    rows = []
    for section in parts:
        r, e = section.runs[0], [r.emissions for r in section.runs if r.emissions]
        source = lambda part, e=e: ", ".join(sorted({row.get(f"{part}_source") or "unknown" for row in e})) or "not recorded"
        versions = " ".join(f"{k} {v}" for k, v in r.info["versions"].items() if v)
        seeds = " ".join(map(str, sorted({r.seed for r in section.runs})))
        rows.append([section.name, str(len(section.runs)), seeds, *map(source, ("cpu", "gpu", "ram")),
                     *(str(r.info.get(key)) for key in ("device_name", "cpus", "threads", "dtype")), versions, str(r.info.get("git"))])
    page.paragraph("Energy is measured where a counter gives it, and modelled where it is inferred: the CPU's from its TDP and load, the RAM's from its size. "
                   "Losses, accuracies and times are measured.")
    page.table("provenance", ["section", "runs", "seeds", "CPU energy", "GPU energy", "RAM energy", "device", "CPUs", "threads", "dtype", "versions", "commit"], rows)
    page.pre("\n".join(line for section in parts for line in commands(section.runs)), "The commands that make these runs again")
    page.heading("Definitions", 3)
    keys = dict.fromkeys(key for section in parts for table in TABLES[section.family].values() for key in table)
    page.paragraph("± is the standard deviation over seeds (ddof 1). Percentages are against the baseline, of the mean over the seeds that both have; "
                   "positive is better whichever way the number goes. Differences are head - baseline, over the same seeds; d_z has their sign. "
                   "The test: " + doc(metrics.paired) + " " + doc(metrics.corrected))
    page.table("definitions", ["number", "better", "definition"], [[METRICS[key].title, "lower" if METRICS[key].lower else "higher", METRICS[key].definition] for key in keys])


def main(argv):
    configure(globals(), [arg for arg in argv if arg.startswith("-")])
    folders = [arg for arg in argv if not arg.startswith("-")]
    fail([message for bad, message in (
        (not folders, "no folder given: python report.py out/study_digits"),
        *((not os.path.isdir(folder), f"there is no folder {folder}") for folder in folders),
        (out_dir == "", "out_dir is '', it must be the name of a folder"), (top < 0, f"top is {top}, it must be >= 0"),
        (num_nearest < 1, f"num_nearest is {num_nearest}, it must be at least 1"),
        (not 0 < significance < 1, f"significance is {significance}, it must lie in (0, 1)"), (dpi < 30, f"dpi is {dpi}, it must be at least 30")) if bad])
    runs, ended, broken = [], [], []
    for path in tqdm(find_runs(folders), desc="reading", leave=False):
        try:
            runs.append(read_run(path))
        except ValueError as e:
            broken.append(f"{path}: {e}")
    if not runs:
        raise SystemExit(f"no runs below {', '.join(folders)}: a run is a folder with a config.json of train.py or train_vision.py" + "".join(f"\n  - skipped {b}" for b in broken))
    for r in runs:
        if r.summary is not None:
            try:
                measure(r)
                ended.append(r)
            except (ValueError, KeyError, TypeError) as e:
                broken.append(f"{r.path}: its numbers do not make sense ({type(e).__name__}: {e})")
    if not ended:
        raise SystemExit(f"{len(runs)} runs below {', '.join(folders)}, but none has ended (summary.json): go on with --init_from=resume")
    page = Page(out_dir)
    page.heading("Distance heads: a report", 1)
    page.paragraph(f"{len(ended)} runs that have ended, seeds {', '.join(map(str, sorted({r.seed for r in ended})))}, "
                   f"dataset and model: {'; '.join(sorted({f'{r.dataset}, {r.model}' for r in ended}))}.")
    unfinished = [r for r in runs if r.summary is None]
    if unfinished:
        page.paragraph("Not ended, and in no average: " + ", ".join(f"{r.path} (last evaluation at step {r.evals[-1]['step'] if r.evals else 'none'})" for r in unfinished))
    for path in find_runs(folders, "error.txt"):
        with open(os.path.join(path, "error.txt"), encoding="utf-8", errors="replace") as f:
            page.paragraph(f"Broken, and in no average: {path}: {(f.read().strip() or 'no reason').splitlines()[-1]}")
    if broken:
        page.paragraph("Skipped: " + "; ".join(broken))
    if torn := [r.path for r in runs if not r.whole]:
        page.paragraph("metrics.jsonl is truncated, and used up to its last whole line: " + ", ".join(torn))
    if any(not r.info.get("git") or "with changes" in r.info["git"] for r in ended):
        page.paragraph("Some runs are of files that no commit holds (config.json says 'with changes', or none): nothing here tells whether all had the same.")
    parts, differences = sections(ended, page), []
    top_of_page = len(page.blocks)
    for section in tqdm(parts, desc="sections", leave=False):
        page.heading(section.name)
        if not section.baseline:
            page.paragraph("There is no baseline here (--distance=baseline with the same settings): no differences, no tests.")
        elif max(map(len, section.heads.values())) < 2:
            page.paragraph("One seed: no standard deviations and no test. Differences may be chance.")
        findings(page, section)
        for title in TABLES[section.family]:
            head_table(page, section, title)
        page.heading("Figures", 3)
        if len(section.drawn) < len(section.heads):
            page.paragraph("Figures show the heads with their fixed n; other n are in the section on n.")
        for draw in (radar, curves, pareto, efficiency):
            draw(page, section)
        differences.append(emission_bars(page, section))
        geometry(page, section)
        states(page, section)
        exponents(page, section)
        if section.family == "language" and tokens:
            nearest(page, section)
    if len(parts) > 1:
        over_sections(page, parts, differences)
    provenance(page, parts)
    notes = defaultdict(list)
    for r in runs:
        for note in r.notes:
            notes[note].append(r.path)
    for note, paths in notes.items(): # some were found while drawing, and belong to the top
        page.paragraph(f"{note}: {', '.join(paths) if len(paths) < 4 else f'{len(paths)} runs'}")
        page.blocks.insert(top_of_page, page.blocks.pop())
    page.write("Distance heads: a report")
    print(f"{len(ended)} runs in {len(parts)} sections: {os.path.join(out_dir, 'index.html')}, index.md, tables, figures")


if __name__ == "__main__":
    main(sys.argv[1:])
