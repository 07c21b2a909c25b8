"""
Runs, read from their folders, measured, and grouped into sections that may be averaged.

    runs, broken = results.read_runs(["out/study_digits"])
    ended = [results.measure(run) for run in runs if run.summary is not None]
    for section in results.make_sections(results.group(ended)):
        for head in section.heads:
            print(section.labels[head], section.mean(head, section.quality), section.std(head, section.quality))

Nothing here writes: neither into a folder, nor into a Run that was read. Each pass makes new Runs or a new Section.
"""
import json
import math
import os
import re
import statistics
from collections import Counter, defaultdict, namedtuple
from dataclasses import dataclass, field, replace
from operator import attrgetter

import numpy as np
from tqdm import tqdm

import metrics
from distances import DISTANCES, find
from metrics import METRICS
from run_folder import (
    HEAD_KEYS,
    Damaged,
    Head,
    finite,
    head_of,
    read_config,
    read_emissions,
    read_error,
    read_rows,
    read_summary,
    readable,
)

QUALITY = {"vision": "test_accuracy", "language": "val_loss"}
VALIDATION = {"vision": "val_accuracy", "language": "val_loss"}
# what decides neither a result nor its energy. All other settings have to agree where runs are averaged
IGNORED = (*HEAD_KEYS, "seed", "out_dir", "data_dir", "overwrite", "plots", "wandb_log", "tracker",
           "wandb_project", "wandb_run_name", "wandb_mode", "device", "dtype", "time_limit")
# the distances that the paper names as the best for something, always drawn
FAVOURITES = ("euclidean", "cosine", "manhattan", "bray_curtis", "mahalanobis")
# what is compared with the baseline in percent; of what may be near 0 there, as losses and ratios, it would say nothing
IN_PERCENT = ("test_accuracy", "val_accuracy", "f1_macro", "pc2_ev", "energy_kwh", "emissions_g", "cpu_seconds",
              "emissions_per_1000_steps", "seconds_per_epoch", "seconds_per_step", "seconds_to_90", "steps_to_90",
              "wh_to_90", "wh_to_target", "quality_per_wh")
# what is a difference to the baseline already
DIFFERENCES = ("model_health", "speed", "speed_steps")
LEAST_PROGRESS = 0.1 # of the baseline's way from guessing to its best, below which a run has learned nothing

# -----------------------------------------------------------------------------
# reading


@dataclass(frozen=True)
class Run:
    """A run's folder as it was read. measure() and add_baseline_metrics() make new Runs, with more values."""
    path: str
    info: dict # config.json
    head: Head
    seed: int
    dataset: str
    model: str
    family: str # 'vision' or 'language'
    fingerprint: dict # all that has to agree where runs are averaged
    evals: list # the evaluations in metrics.jsonl
    logs: list # its log lines
    whole: bool # whether metrics.jsonl was read to its end
    summary: dict | None # summary.json, None: the run has not ended
    emissions: dict | None # the last row of emissions.csv
    notes: tuple # what a reader should know about this run
    error: str = "" # the last line of error.txt, of a run that broke
    values: dict = field(default_factory=dict) # numbers by their names in METRICS

    @property
    def diverged(self):
        """Whether it ended because a number was not finite, as run.stop_non_finite says it: a failure of its head."""
        return self.summary is None and "not finite" in self.error


def find_runs(folders, name="config.json", without=()):
    """The paths of the folders with a file of that name at or below the given ones, but for those in without."""
    found = {}
    for folder in folders:
        for path, below, files in os.walk(folder):
            if path in without:
                below.clear()
            elif name in files:
                found[os.path.realpath(path)] = path
    return sorted(found.values())


def fingerprint_of(info):
    """All settings, versions and devices that have to agree where runs are averaged."""
    result = {key: value for key, value in info["config"].items() if key not in IGNORED}
    result["data hash"] = info["data"].get("hash")
    result["torch"] = info["versions"]["torch"]
    for key in ("git", "dtype", "device", "device_name", "cpus", "threads", "world_size"):
        result[key] = info.get(key)
    return result


def read_runs(folders, without=()):
    """
    (the Runs at and below these folders, but for those in without; messages about the folders that hold none but look
    like one)
    """
    runs, broken = [], []
    for path in tqdm(find_runs(folders, without=without), desc="reading", leave=False):
        try:
            runs.append(read_run(path))
        except Damaged as e:
            broken.append(str(e))
    return runs, broken


def read_run(path):
    """The Run in a folder; what else is damaged there is in its notes. Raises Damaged where config.json is."""
    info = read_config(path)
    with readable(os.path.join(path, "config.json")):
        c = info["config"]
        family = "language" if info["script"] == "train.py" else "vision"
        about = dict(info=info, head=head_of(info), seed=c["seed"], dataset=c["dataset"], model=c.get("model", "gpt"),
                     family=family, fingerprint=fingerprint_of(info))
    notes = []

    def if_readable(read, otherwise):
        try:
            return read()
        except Damaged as e:
            notes.append(str(e))
            return otherwise
    logs, evals, whole = if_readable(lambda: read_rows(path, info["script"]), ([], [], False))
    summary = if_readable(lambda: read_summary(path), None)
    emissions = if_readable(lambda: read_emissions(path), None)
    if any(name.startswith("emissions_node") for name in os.listdir(path)):
        notes.append("several nodes: the energy is that of node 0")
    if info.get("runs_at_once", 1) > 1:
        notes.append(f"energy: the machine's, which {info['runs_at_once']} runs shared, so that each counts the others")
    broke = summary is None and os.path.exists(os.path.join(path, "error.txt"))
    return Run(path=path, **about, evals=evals, logs=logs, whole=whole, summary=summary, emissions=emissions,
               notes=tuple(notes), error=read_error(path) if broke else "")

# -----------------------------------------------------------------------------
# measuring


def errors(run):
    """What falls as the run learns, at each evaluation: 1 - validation accuracy, or the validation loss."""
    if run.family == "vision":
        return [1 - row["val_accuracy"] for row in run.evals]
    return [row["val_loss"] for row in run.evals]


def guess_error(run):
    """The error, see errors, of guessing among the classes or tokens."""
    if run.family == "vision":
        return 1 - 1 / run.info["data"]["num_classes"]
    return math.log(run.info["model_args"]["vocab_size"])


def progress(runs):
    """How far below guessing the best error of the runs comes, a mean over those that have evaluations, or None."""
    found = [guess_error(run) - min(errors(run)) for run in runs if run.evals]
    return statistics.mean(found) if found else None


def numbers(rows, key):
    """The finite values of the key."""
    return [row[key] for row in rows if finite(row.get(key))]


def settled_norms(run):
    """(the gradient norms of the log lines after warm-up, notes)"""
    if run.family == "vision":
        late = [row for row in run.logs if row["epoch"] >= 1]
    else:
        late = [row for row in run.logs if row["step"] > run.info["config"]["warmup_iters"]]
    norms = numbers(late, "grad_norm")
    if len(norms) >= 2 or not numbers(run.logs, "grad_norm"):
        return norms, ()
    note = "gradient norms: fewer than 2 log lines after warm-up (vision: the first epoch), all are used"
    return numbers(run.logs, "grad_norm"), (note,)


def measure(run):
    """
    The Run with its values: of METRICS those that it has, but for what its section's baseline defines. Raises Damaged
    where its numbers do not make sense together.
    """
    with readable(run.path, "has numbers that make no sense"):
        return measured(run)


def measured(run):
    vision = run.family == "vision"
    classes = run.info["data"]["num_classes"] if vision else run.info["model_args"]["vocab_size"]
    last = run.evals[-1] if run.evals else {}
    values = {key: value for key, value in {**last, **run.summary}.items() if key in METRICS}
    values |= {key: run.summary.get(f"{key}_total") for key in ("energy_kwh", "emissions_g")}
    times = numbers(run.logs, "ms")
    if times and not vision:
        values["seconds_per_step"] = statistics.median(times) / 1000
    norms, notes = settled_norms(run)
    if norms:
        values["gradient_stability"] = metrics.gradient_stability(norms)
        values["grad_norm"] = statistics.median(norms)
        values["clipping_quality"] = metrics.clipping_quality(norms, run.info["config"]["grad_clip"])
    course = errors(run)
    if run.evals and not vision:
        values["learning_quality"] = metrics.learning_quality(course[0], min(course), classes)
    values["steps_to_90"] = metrics.time_to([row["step"] for row in run.evals], course) if course else None
    if finite(values["emissions_g"]) and run.summary.get("step"):
        values["emissions_per_1000_steps"] = 1000 * values["emissions_g"] / run.summary["step"]
    if run.evals and all("energy_kwh_total" in row for row in run.evals):
        values["seconds_to_90"] = metrics.time_to([row["seconds_total"] for row in run.evals], course)
        values["wh_to_90"] = metrics.time_to([1000 * row["energy_kwh_total"] for row in run.evals], course)
    if values["energy_kwh"]:
        quality = 100 * (values["test_accuracy"] - 1 / classes) if vision else math.log(classes) - values["val_loss"]
        values["quality_per_wh"] = quality / (1000 * values["energy_kwh"])
    values = {key: value for key, value in values.items() if finite(value)}
    return replace(run, values=values, notes=(*run.notes, *notes))


def measure_all(runs, broken):
    """The runs that have ended, measured. Those whose numbers make no sense are left out, with a line in broken."""
    ended = []
    for run in runs:
        if run.summary is not None:
            try:
                ended.append(measure(run))
            except Damaged as e:
                broken.append(str(e))
    return ended

# -----------------------------------------------------------------------------
# grouping


# kind: the dataset and model; name: the kind, numbered where there are several groups of it; runs: one per head and
# seed; differ: {key: value} of what tells the groups of a kind apart; repeats: pairs of a run and the one it repeats
Group = namedtuple("Group", "kind name runs differ repeats")


def group(runs):
    """The Groups of runs that agree in all but head and seed, by name."""
    parts = defaultdict(dict)
    for run in runs:
        kind, fingerprint = f"{run.dataset}, {run.model}", json.dumps(run.fingerprint, sort_keys=True)
        parts[kind].setdefault(fingerprint, []).append(run)
    groups = []
    for kind in sorted(parts):
        several = list(parts[kind].values())
        prints = [part[0].fingerprint for part in several]
        keys = differing_keys(prints)
        for i, (part, fingerprint) in enumerate(zip(several, prints), 1):
            name = f"{kind} ({i})" if len(several) > 1 else kind
            kept, repeats = without_repeats(part)
            groups.append(Group(kind, name, kept, {key: fingerprint.get(key) for key in keys}, repeats))
    return groups


def differing_keys(prints):
    """The keys whose values are not the same in all these dicts, in the order in which they appear."""
    values = defaultdict(set)
    for fingerprint in prints:
        for key in fingerprint:
            values[key] |= {json.dumps(other.get(key)) for other in prints}
    return [key for key in values if len(values[key]) > 1]


def without_repeats(runs):
    """(the first run of each head and seed, the others as pairs with the one that they repeat)"""
    first, repeats = {}, []
    for run in runs:
        kept = first.setdefault((run.head, run.seed), run)
        if kept is not run:
            repeats.append((run, kept))
    return list(first.values()), repeats


def by_head(runs):
    """{head: its runs by seed}"""
    heads = defaultdict(list)
    for run in sorted(runs, key=attrgetter("seed")):
        heads[run.head].append(run)
    return dict(heads)


def label(head, usual):
    """The head in words: what is not the default, or not usual in its section, is said."""
    if head.is_baseline:
        return "baseline"
    usual_variant = find(head.distance)[0] if head.distance in DISTANCES else ""
    variant = "" if head.variant == usual_variant else f" {head.variant}"
    words = [head.distance + variant, head.params]
    if head.link != "harmonic":
        words.append(head.link) # a loss that is no head has none, nor has a linear head
    if head.setting == "given":
        words.append(f"n={head.n:g}")
    elif head.setting == "learned":
        words.append("learned n")
    words.append(head.extras)
    for key, value in usual.items():
        if getattr(head, key) != value and head.distance != "baseline":
            words.append(f"{key}={getattr(head, key):g}")
    return ", ".join(word for word in words if word)


def usual_settings(runs):
    """The eps and feature_scale that most runs have."""
    usual = {}
    for key in ("eps", "feature_scale"):
        counts = Counter(getattr(run.head, key) for run in runs if run.head.distance != "baseline")
        for value, _ in counts.most_common(1):
            usual[key] = value
    return usual


def make_labels(heads, usual):
    """{head: its label}, each label once."""
    labels = {head: label(head, usual) for head in heads}
    counts = Counter(labels.values())
    for head, text in labels.items():
        if head.distance == "baseline" and (counts[text] > 1 or head.feature_scale != 1): # the scale is its temperature
            labels[head] = f"{text} (features x {head.feature_scale:g})"
        elif counts[text] > 1: # fixed n from several files
            labels[head] = f"{text} ({head.n:g})"
    return labels


def target_error(baseline_runs):
    """The error at which the baseline has made 90% of its progress, the mean over its seeds; None without baseline."""
    targets = []
    for run in baseline_runs:
        course = errors(run)
        if course:
            targets.append(course[0] - 0.9 * (course[0] - min(course)))
    return statistics.mean(targets) if targets else None


def add_baseline_metrics(runs, baseline_runs, target):
    """The runs with those values that are defined by the baseline of the same seed, or by its target."""
    baselines = {run.seed: run for run in baseline_runs}
    result = []
    for run in runs:
        values, base = dict(run.values), baselines.get(run.seed)
        for key, of in (("model_health", "collapse_score"), ("speed", "seconds_to_90"), ("speed_steps", "steps_to_90")):
            if base and of in values and of in base.values:
                values[key] = base.values[of] - values[of]
        if target is not None:
            for row, error in zip(run.evals, errors(run)):
                if error <= target and "energy_kwh_total" in row:
                    values["wh_to_target"] = 1000 * row["energy_kwh_total"]
                    break
        result.append(replace(run, values=values))
    return result


@dataclass(frozen=True)
class Section:
    """
    Runs that may be averaged: heads maps each Head to its runs that have ended, a seed each; the baseline first, then
    the best. diverged: {Head: its runs that did}. floor: a run whose progress is no more than that has learned nothing.
    """
    name: str
    slug: str
    family: str
    heads: dict
    diverged: dict
    floor: float
    baseline: Head | None
    target: float | None
    usual: dict
    labels: dict

    @property
    def quality(self):
        return QUALITY[self.family]

    @property
    def x(self):
        """What the evaluations are counted in."""
        return "epoch" if self.family == "vision" else "step"

    @property
    def runs(self):
        return [run for runs in self.heads.values() for run in runs]

    @property
    def drawn(self):
        """The heads in figures: those with a fixed n, as n has a section of its own."""
        fixed = [head for head in self.heads if head.setting == "fixed"]
        return fixed if len(fixed) > 1 else list(self.heads)

    def few(self, count):
        """
        The heads in figures that have room for a few: the baseline, the best of each of the FAVOURITES, and the best
        others, `count` of them.
        """
        first = [self.baseline] if self.baseline else []
        for distance in FAVOURITES:
            first += [head for head in self.drawn if head.distance == distance][:1]
        others = [head for head in self.drawn if head not in first]
        return first + others[:count]

    def failures(self, head):
        """The runs of the head that diverged, or learned nothing."""
        ended = [run for run in self.heads.get(head, ()) if run.evals and progress([run]) <= self.floor]
        return [*self.diverged.get(head, ()), *ended]

    def values(self, head, key):
        """{seed: value} of the runs that have one"""
        return {run.seed: run.values[key] for run in self.heads[head] if key in run.values}

    def known(self, key):
        """Whether any run has the number."""
        return any(key in run.values for run in self.runs)

    def course(self, head, key, rows="evals"):
        """(x (T,), values (seeds, T)) of a number of each evaluation, or log line, that every seed has"""
        by_seed = []
        x = "step" if rows == "logs" else self.x
        for run in self.heads[head]:
            by_seed.append({row[x]: row[key] for row in getattr(run, rows) if finite(row.get(key))})
        x = sorted(set.intersection(*map(set, by_seed)))
        return x, np.array([list(map(values.get, x)) for values in by_seed])

    def n_at_end(self, head):
        """The mean over seeds of the n at which learning ended, or None."""
        ended = [run.summary["n"] for run in self.heads[head] if finite(run.summary.get("n"))]
        return statistics.mean(ended) if ended else None

    def mean(self, head, key):
        values = self.values(head, key).values()
        return statistics.mean(values) if values else None

    def std(self, head, key):
        values = self.values(head, key).values()
        return statistics.stdev(values) if len(values) > 1 else None

    def complete(self, head, key):
        """Whether every run of the head has the number."""
        return len(self.values(head, key)) == len(self.heads[head])

    def paired(self, head, key):
        """(values, the baseline's values) of the seeds that both have"""
        if self.baseline is None or head == self.baseline:
            return [], []
        mine, base = self.values(head, key), self.values(self.baseline, key)
        seeds = [seed for seed in mine if seed in base]
        return list(map(mine.get, seeds)), list(map(base.get, seeds))

    def difference(self, head, key):
        """The mean difference to the baseline, over the seeds that both have, or None."""
        mine, base = self.paired(head, key)
        return statistics.mean(mine) - statistics.mean(base) if mine else None

    def is_better(self, head, key):
        """Whether its mean is better than the baseline's, over the seeds that both have."""
        difference = self.difference(head, key)
        return difference is not None and (difference < 0 if METRICS[key].lower else difference > 0)

    def change(self, head, key):
        """
        The percent of change against the baseline, over the seeds that both have; positive is better. None where there
        is none, and of what is not IN_PERCENT.
        """
        mine, base = self.paired(head, key)
        if not mine or key not in IN_PERCENT:
            return None
        change = metrics.percent_change(statistics.mean(mine), statistics.mean(base), METRICS[key].lower)
        return change if finite(change) else None

    def tests(self, key):
        """
        {head: the result of metrics.paired, with p_corrected} over the heads of this section. A head with a failed run
        is not tested: it would make the family of the correction larger by what nobody asks.
        """
        tests = {}
        for head in self.heads:
            mine, base = self.paired(head, key)
            if mine and not self.failures(head) and not self.failures(self.baseline):
                tests[head] = metrics.paired(mine, base)
        if not tests:
            return {}
        adjusted = metrics.corrected([test["p"] for test in tests.values()])
        return {head: {**test, "p_corrected": p} for (head, test), p in zip(tests.items(), adjusted)}

    def best(self, key, tests, significance):
        """The head with the best mean, if its difference to the baseline has a lower corrected p; else None."""
        means = {}
        for head in self.heads:
            values = self.values(head, key)
            lost = self.baseline and not set(values) >= set(self.values(self.baseline, key))
            if values and not lost and not self.failures(head): # a head that lost a seed does not compete
                means[head] = self.mean(head, key)
        if not means:
            return None
        head = (min if METRICS[key].lower else max)(means, key=means.get)
        supported = significant(tests.get(head), significance) and self.is_better(head, key)
        return head if supported else None


def significant(test, significance):
    return test is not None and test["p_corrected"] is not None and test["p_corrected"] < significance


def make_section(name, slug, runs):
    """The Section of these runs: labels, what the baseline defines, and the order of the heads."""
    heads, diverged = by_head([run for run in runs if not run.diverged]), by_head([run for run in runs if run.diverged])
    baseline, most = None, 0
    for head in heads:
        if head.is_baseline and len(heads[head]) > most:
            baseline, most = head, len(heads[head])
    target = target_error(heads.get(baseline, []))
    usual = usual_settings(runs)
    reference = progress(heads[baseline]) if baseline else max(filter(None, map(progress, heads.values())), default=0)
    floor = max(0, LEAST_PROGRESS * (reference or 0))
    ended = [run for runs in heads.values() for run in runs]
    heads = by_head(add_baseline_metrics(ended, heads.get(baseline, []), target))
    labels = make_labels({**heads, **diverged}, usual)
    section = Section(name, slug, runs[0].family, heads, diverged, floor, baseline, target, usual, labels)
    return replace(section, heads=ordered(section))


def ordered(section):
    """The section's heads: the baseline, then from the best mean on."""
    places = {}
    for head in section.heads:
        mean = section.mean(head, section.quality)
        if mean is None:
            mean = math.inf
        elif not METRICS[section.quality].lower:
            mean = -mean
        places[head] = (head != section.baseline, mean)
    return {head: section.heads[head] for head in sorted(section.heads, key=places.get)}


def make_sections(groups):
    """
    A Section per Group with a run that has ended, each with a slug for its files: names may differ in what a file's
    name cannot hold.
    """
    sections, slugs = [], []
    for i, (_, name, runs, _, _) in enumerate(groups):
        if all(run.diverged for run in runs):
            continue
        slug = re.sub(r"\W+", "_", name).strip("_")[:80] # it is part of file names
        if slug in slugs:
            slug += f"_{i}"
        slugs.append(slug)
        sections.append(make_section(name, slug, runs))
    return sections
