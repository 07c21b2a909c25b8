"""
What report.py shows of a study of claims (claims.py): the verdicts, and the tuning and the runs that they rest on. It
reads the study's runs.csv and design only, so that a copy of these two shows the same as the folders of the runs.
"""
import csv
import math
import os
import shlex
import statistics
from collections import Counter, namedtuple
from types import SimpleNamespace

import numpy as np
from scipy.stats import rankdata

import figures
import figures_claims
import verdicts
from configurator import find
from metrics import METRICS
from page import Cell, Heading, Paragraph, Picture, Table, number, shown
from report_figures import INTERPRETABILITY
from results import find_runs
from run_folder import Damaged, readable

# slug: what the names of its files begin with; design: the frozen one; rows: those of runs.csv, dicts of texts; notes:
# what a reader should know
Study = namedtuple("Study", "path slug design rows notes")
MEANINGS = {
    "supported": "the interval lies on the claim's side of 0, the estimate reaches the effect of interest, and p "
                 "after Holm's correction allows it (a claim of equality: two one-sided tests exclude both effects).",
    "refuted": "the whole interval falls short of the effect of interest: whatever there is, it is smaller than the "
               "claim says, or points the other way (a claim of equality: the interval excludes equality). Holm's "
               "correction is for what is supported; each refutation stands by its own interval.",
    "inconclusive": "these seeds cannot tell. The detectable effect is the difference that they would have told from "
                    "none, before Holm: where it is larger than the effect of interest, more seeds are needed.",
    "not run yet": "some head of the contrast has fewer seeds than the first look needs.",
}
COSTS = ("emissions_per_1000_steps", "cpu_seconds", "energy_kwh", "seconds_per_step", "seconds_per_epoch")

# -----------------------------------------------------------------------------
# reading


def studies(folders):
    """
    The Studies at and below these folders: where there is a claims.toml, or a runs.csv of claims.py, whose design is
    then config/claims.toml. Raises SystemExit where one cannot be read.
    """
    found = []
    for path in sorted({*find_runs(folders, "claims.toml"), *find_runs(folders, "runs.csv")}):
        design = os.path.join(path, "claims.toml")
        try:
            rows = read_rows(os.path.join(path, "runs.csv"))
            if rows is None and not os.path.exists(design):
                continue # another table
            slug = f"claims_{len(found) + 1}" if found else "claims"
            design = design if os.path.exists(design) else find("config/claims.toml")
            found.append(read(path, slug, design, rows or []))
        except Damaged as e:
            raise SystemExit(f"{e}: python claims.py --stage=table writes the table of a study again") from None
    return found


def read_rows(path):
    """The rows of a runs.csv of claims.py, or None where there is none, or that of another script. Raises Damaged."""
    if not os.path.exists(path):
        return None
    with readable(path), open(path, newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
        if rows and not {"setting", "head", "stage", "seed", "status"} <= set(rows[0]):
            return None
        for row in rows:
            int(row["seed"])
    return rows


def read(path, slug, design, rows):
    with readable(design), open(design, encoding="utf-8") as f:
        plan = verdicts.load(f.read())
        for key in ("heads", "settings"):
            if not isinstance(plan.get(key), dict):
                raise ValueError(f"it has no [{key}]")
        for name, setting in plan["settings"].items():
            for key in ("quality", "tuned_by"):
                if setting.get(key) not in METRICS:
                    raise ValueError(f"{key} of the setting {name} is {setting.get(key)!r}, which is no metric")
    known = [row for row in rows if row["setting"] in plan["settings"] and row["head"] in plan["heads"]]
    notes = [f"{path}: {len(rows)} runs, by the design {design}."]
    if len(known) < len(rows):
        notes.append(f"{len(rows) - len(known)} of them are of heads or settings that this design does not have: left "
                     "out.")
    return Study(path, slug, plan, known, notes)


def value(row, key):
    """The number of a row, or None where it has none that is finite."""
    found = float(row[key]) if row.get(key) else math.nan
    return found if math.isfinite(found) else None


def numbers(study, name, head, key):
    """{seed: number} of the runs of confirmation of a head in a setting; one that failed has the quality of chance."""
    setting, result = study.design["settings"][name], {}
    for row in study.rows:
        if (row["setting"], row["head"], row["stage"]) == (name, head, "confirm"):
            try:
                found = verdicts.score(row, key, setting)
            except ValueError: # the design does not say what chance is
                found = None
            if found is not None:
                result[int(row["seed"])] = found
    return result


def tuned_settings(study, stage):
    """The settings with runs of this stage, in the order of the design."""
    there = {row["setting"] for row in study.rows if row["stage"] == stage}
    return [name for name in study.design["settings"] if name in there]


def judged_settings(study):
    """Those of confirmation but for the ones `like` another, whose runs are the other's again, for what they cost."""
    return [name for name in tuned_settings(study, "confirm") if "like" not in study.design["settings"][name]]


def title(study, name):
    return study.design["settings"][name].get("title", name)


def baseline(study):
    """The first head of the design that is linear, or None."""
    linear = [head for head, about in study.design["heads"].items() if "--distance=baseline" in about["flags"]]
    return linear[0] if linear else None


def looks(study):
    """{head: its look in figures, as of figures.style}, each with a marker of its own where they would be the same."""
    result, seen = {}, Counter()
    for head, about in study.design["heads"].items():
        flags = dict(word[2:].split("=", 1) for word in shlex.split(about["flags"]) if "=" in word)
        look = figures.style(SimpleNamespace(distance=flags.get("distance", ""), variant=flags.get("variant", ""),
                                             link=flags.get("link", "harmonic"), is_baseline=head == baseline(study)))
        same = look["color"], look["mfc"]
        result[head] = {**look, "marker": "os^DvPX*"[seen[same] % 8]}
        seen[same] += 1
    return result

# -----------------------------------------------------------------------------
# the claims


def blocks(study):
    """All blocks of a study, the verdicts first."""
    opening = [Heading("Claims")]
    try:
        results = verdicts.judge(study.design, study.rows)
        answers = verdicts.across(study.design, results)
    except ValueError as e:
        return [*opening, Paragraph(f"No verdicts: {e}"), *evidence(study)]
    claims = {claim["name"]: claim for claim in study.design.get("claims", [])}
    if not claims:
        return [*opening, Paragraph("The design has no claims."), *evidence(study)]
    counts = Counter(result["verdict"] for result in results)
    opening.append(Paragraph(f"{len(results)} claims: " + ", ".join(
        f"{counts[verdict]} {verdict}" for verdict in MEANINGS if counts[verdict]) + "."))
    meanings = [Paragraph(f"{verdict.capitalize()}: {words}") for verdict, words in MEANINGS.items() if counts[verdict]]
    meanings.append(Paragraph(
        "An interval has the confidence that O'Brien and Fleming leave at its look (all looks together: "
        f"{study.design['confidence']:.0%}), the detectable effect is found with a power of "
        f"{study.design['power']:.0%}. The estimate is the contrast of the design, a mean over the same seeds."))
    primary, others = [], []
    for result in results:
        (primary if result["primary"] else others).append(result)
    return [*opening, *family(study, study.slug, "Primary claims", primary, claims), *meanings,
            *questions(study, answers),
            *family(study, f"{study.slug}_exploratory", "Exploratory claims, a family of their own", others, claims),
            *evidence(study)]


def family(study, name, words, results, claims):
    """The claims that are corrected together: a table and a forest, and a line of those of which nothing has run."""
    if not results:
        return []
    blocks, waiting = [Heading(words, 3)], {}
    for result in results:
        if not result["run"]:
            question = claims[result["name"]].get("question", result["name"])
            waiting.setdefault(question, []).append(result["setting"])
    if any(result["run"] for result in results):
        blocks += [claims_table(study, name, results, claims), *forest(name, results, claims)]
    if waiting:
        listed = "; ".join(f"{question} ({', '.join(settings)})" for question, settings in waiting.items())
        blocks.append(Paragraph(f"Without a run of all heads yet: {listed}."))
    return blocks


def forest(name, results, claims):
    there = [result for result in results if result["estimate"] is not None and result["verdict"] != "not run yet"]
    if not there:
        return []
    fig = figures_claims.forest([forest_entry(result, claims[result["name"]]) for result in there])
    return [Picture(f"{name}_forest", *figures.vector(fig), "The claims of the table above: estimate, interval, and "
                    "every seed, in effects of interest.")]


def amount(x, claim, metric, sign="+"):
    """A difference in the metric's unit, or of logarithms in percent."""
    if x is None:
        return ""
    if claim.get("log"):
        return f"{100 * math.expm1(x):{sign}.1f}%"
    m = METRICS.get(metric)
    if m is None:
        return f"{x:{sign}.3g}"
    return number(m.scale * x, sign + m.spec.lstrip("+"))


def claims_table(study, name, results, claims):
    """The claims of which something has run; its CSV has all."""
    rows, records = [], []
    for r in results:
        records.append({key: x for key, x in r.items() if key != "values"})
        if not r["run"]:
            continue
        claim = claims[r["name"]]
        estimate, low, high, effect, detectable = (
            amount(x, claim, r["metric"]) for x in (r["estimate"], r["low"], r["high"], r["effect"], r["detectable"]))
        metric = METRICS[r["metric"]].title if r["metric"] in METRICS else r["metric"]
        seeds = f"{r['seeds']}, {r['failed']} failed" if r["failed"] else str(r["seeds"])
        rows.append([Cell(claim.get("question", r["name"]), title(study, r["setting"])),
                     Cell(r["verdict"], bold=r["verdict"] == "supported"),
                     Cell(estimate, f"[{low}, {high}]" if low else ""),
                     Cell(("±" + effect.lstrip("+-")) if claim.get("equal") else effect, metric),
                     detectable.lstrip("+"), seeds, number(r["p_holm"], ".3g"),
                     Cell(r["says"], r["why"])])
    columns = ["claim", "verdict", "estimate [interval]", "effect of interest", "detectable", "seeds", "p, Holm",
               "in words, and why"]
    return Table(name, columns, rows, records)


def forest_entry(r, claim):
    """A line of figures_claims.forest."""
    unit = abs(r["effect"]) if claim.get("equal") else r["effect"]
    low, high = r["low"], r["high"]
    if low is not None:
        low, high = sorted((low / unit, high / unit))
    text = f"{r['verdict']}, {amount(r['estimate'], claim, r['metric'])} ({r['seeds']} seeds)"
    label = f"{claim.get('question', r['name'])}, {r['setting']}"
    return dict(label=label, text=text, verdict=r["verdict"], estimate=r["estimate"] / unit,
                low=low, high=high, values=[x / unit for x in r["values"].values()])


def questions(study, answers):
    if not answers or len(study.design["settings"]) < 3: # fewer have no answer
        return []
    rows, open_ones = [], {}
    for a in answers:
        if not a["verdict"]:
            open_ones.setdefault(a["why"], []).append(a["question"])
            continue
        interval = "" if a["low"] is None else f"[{a['low']:+.2f}, {a['high']:+.2f}]"
        rows.append([a["question"], a["verdict"], Cell(number(a["estimate"], "+.2f"), interval),
                     number(a["tau"], ".2f"), ", ".join(a["settings"]), a["why"]])
    columns = ["question", "answer", "estimate [interval]", "std between settings", "settings", "why"]
    blocks = [Heading("Over all settings", 3), Paragraph(
        "Claims that ask the same in several settings, in effects of interest, pooled with random effects of the "
        "settings.")]
    if rows:
        blocks.append(Table(f"{study.slug}_questions", columns, rows))
    return blocks + [Paragraph(f"No answer yet: {', '.join(names)}. {why}") for why, names in open_ones.items()]

# -----------------------------------------------------------------------------
# what they rest on


def evidence(study):
    result = [Paragraph(note) for note in study.notes]
    if tuned_settings(study, "confirm"):
        result += [*heat_map(study), *multiples(study), *costs(study)]
    else:
        result.append(Paragraph("No run of confirmation yet."))
    for name in tuned_settings(study, "tune"):
        result += tuning(study, name)
    return result


def effect_unit(study, name):
    """The least effect of interest of the setting's claims about its quality, or None."""
    setting = study.design["settings"][name]
    effects = [abs(claim["effect"]) for claim in study.design.get("claims", []) if claim["setting"] == name
               and claim.get("metric", setting["quality"]) == setting["quality"] and not claim.get("log")]
    return min(effects, default=None)


def heat_map(study):
    """The heads' differences to the linear one in every setting: a figure and a table."""
    first, settings = baseline(study), judged_settings(study)
    if not settings:
        return []
    heads = [head for head in study.design["heads"]
             if any(numbers(study, name, head, study.design["settings"][name]["quality"]) for name in settings)]
    gains, ranks = np.full((len(heads), len(settings)), np.nan), np.full((len(heads), len(settings)), np.nan)
    texts, cells, records = np.full(gains.shape, "", object), {}, {head: dict(head=head) for head in heads}
    for j, name in enumerate(settings):
        setting = study.design["settings"][name]
        key, unit = setting["quality"], effect_unit(study, name)
        scores = {head: numbers(study, name, head, key) for head in heads}
        there = [i for i, head in enumerate(heads) if scores[head]]
        common = set.intersection(*(set(scores[heads[i]]) for i in there)) # ranks compare the same seeds
        means = [statistics.mean(scores[heads[i]][seed] for seed in common or scores[heads[i]]) for i in there]
        sign = -1 if METRICS[key].lower else 1 # that makes more better
        ranks[there, j] = rankdata([-sign * mean for mean in means])
        for i, head in enumerate(heads):
            seeds = sorted(set(scores[head]) & set(scores.get(first, {})))
            cells[head, name] = quality_cell(scores[head], key)
            records[head] |= {f"{name}_mean": cells[head, name][1], f"{name}_seeds": len(scores[head])}
            if seeds and head != first:
                difference = statistics.mean(scores[head][seed] - scores[first][seed] for seed in seeds)
                texts[i, j] = f"{amount(difference, {}, key)} ({len(seeds)})"
                records[head][f"{name}_difference"] = difference
                if unit:
                    gains[i, j] = sign * difference / unit
        if first in heads:
            texts[heads.index(first), j] = "reference"
    order = np.argsort(np.nanmean(ranks, 1), kind="stable")
    rank_texts = [f"{np.nanmean(ranks[i]):.1f}" + ("" if not np.isnan(ranks[i]).any() else "*") for i in order]
    rows = []
    for i, rank in zip(order, rank_texts):
        head = heads[i]
        row = [head, rank]
        for j, name in enumerate(settings):
            row.append(Cell(cells[head, name][0], "" if head == first else texts[i, j]))
        rows.append(row)
        records[head]["mean_rank"] = float(np.nanmean(ranks[i]))
    columns = ["head", "mean rank", *[f"{title(study, name)}: {METRICS[quality].title}" for name in settings
                                      if (quality := study.design["settings"][name]["quality"])]]
    found = [Heading("Heads by settings", 3), Paragraph(
        "Mean ± standard deviation over the seeds of confirmation, and the mean difference to the tuned linear head "
        "over the seeds of both (how many). A failed run counts as chance. * not in all settings."),
        Table(f"{study.slug}_heads", columns, rows, [records[heads[i]] for i in order])]
    if np.isfinite(gains).any():
        fig = figures_claims.heads_by_settings([heads[i] for i in order], [title(study, name) for name in settings],
                                               gains[order], texts[order], rank_texts)
        caption = ("Differences to the tuned linear head in each setting's own unit (seeds), coloured in effects of "
                   "interest: blue is better. The rank is a mean over settings, 1 is the best.")
        found.insert(2, Picture(f"{study.slug}_heat", *figures.vector(fig), caption))
    return found


def quality_cell(scores, key):
    """(mean ± std in words, the mean or None) of {seed: score}"""
    if not scores:
        return "", None
    values = list(scores.values())
    mean, std = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
    return shown(METRICS[key], mean, std), mean


def multiples(study):
    """Quality against interpretability, a panel for each setting and metric."""
    panels, look = [], looks(study)
    for name in judged_settings(study):
        setting = study.design["settings"][name]
        family = "language" if setting["script"] == "train.py" else "vision"
        for key in INTERPRETABILITY[family]:
            points = []
            for head in study.design["heads"]:
                x, y = numbers(study, name, head, key), numbers(study, name, head, setting["quality"])
                y = {seed: y[seed] for seed in x if seed in y} # one that failed has nothing to interpret
                if y:
                    points.append((head, look[head], *mean_and_std(x, key), *mean_and_std(y, setting["quality"])))
            if len(points) > 1:
                panels.append(figures.Panel(title(study, name), figures.axis_title(key),
                                            figures.axis_title(setting["quality"]), points))
    if not panels:
        return []
    return [Heading("Quality against interpretability", 3),
            Picture(f"{study.slug}_interpretability", *figures.vector(figures.multiples(panels)), "Means and standard "
                    "deviations over the seeds of confirmation, not normalised; each head as it was tuned.")]


def mean_and_std(scores, key):
    values = [METRICS[key].scale * x for x in scores.values()]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def costs(study):
    """What training costs against the linear head, of the first of COSTS that a setting's runs have, and a table."""
    first, look, panels, rows = baseline(study), looks(study), [], []
    for name in tuned_settings(study, "confirm"):
        keys = [key for key in COSTS if numbers(study, name, first, key)]
        for head in study.design["heads"]:
            cells = [quality_cell(numbers(study, name, head, key), key)[0] for key in COSTS]
            if any(cells):
                rows.append([head, title(study, name), *cells])
        bars = []
        for head in study.design["heads"]:
            base, mine = (numbers(study, name, which, keys[0]) if keys else {} for which in (first, head))
            changes = [100 * (mine[seed] / base[seed] - 1) for seed in mine if base.get(seed)]
            if changes and head != first:
                mean, std = statistics.mean(changes), statistics.stdev(changes) if len(changes) > 1 else None
                bars.append((head, look[head], mean, std, f"{mean:+.1f}%"))
        if bars:
            bars.sort(key=lambda bar: bar[2])
            panels.append((f"{title(study, name)}: {METRICS[keys[0]].title}, % of the linear head's", bars))
    if not rows:
        return []
    shown_columns = [i for i in range(2 + len(COSTS)) if any(row[i] for row in rows)]
    columns = ["head", "setting", *[METRICS[key].title if key in METRICS else key for key in COSTS]]
    found = [Heading("Cost", 3)]
    if panels:
        caption = ("What training costs against the linear head of the same seed, mean and standard deviation over "
                   "seeds; negative costs less. Energy that is modelled as watts x time says no more than the time.")
        found.append(Picture(f"{study.slug}_cost", *figures.vector(figures.bars(panels)), caption))
    return [*found, Table(f"{study.slug}_cost", [columns[i] for i in shown_columns],
                          [[row[i] for i in shown_columns] for row in rows], summary="The cost of every head")]

# -----------------------------------------------------------------------------
# tuning


def tuning(study, name):
    """Every point of tuning of a setting, as heat maps per head and as a table."""
    setting, panels, rows = study.design["settings"][name], [], []
    key = setting["tuned_by"]
    m = METRICS[key]
    tried = [row for row in study.rows if (row["setting"], row["stage"]) == (name, "tune")]
    rungs = sorted({row["rung"] for row in tried}, key=lambda rung: int(rung or 0))
    for head, about in study.design["heads"].items():
        for rung in rungs:
            mine = [row for row in tried if (row["head"], row["rung"]) == (head, rung)]
            if mine:
                panels.append(tuning_panel(head, rung, about.get("scale", "n"), mine, key))
            for row in mine:
                point = [number(value(row, flag), ".3g") for flag in ("learning_rate", "n", "feature_scale")]
                rows.append([head, rung, *point, quality_cell(ended(row, key), key)[0], row["status"],
                             "chosen" if row.get("chosen") == "True" else ""])
    for rung in rungs:
        same = [panel for panel in panels if panel["rung"] == rung]
        low, high = colour_limits(np.concatenate([panel["values"].ravel() for panel in same]), m.lower)
        for panel in same:
            panel |= dict(low=low, high=high)
    columns = ["head", "rung", "learning rate", "n", "feature scale", m.title, "status", "chosen"]
    return [Heading(f"Tuning: {title(study, name)}", 3), Paragraph(
        f"Every head was tuned for itself by {m.title}, with seed {setting.get('seed', '')} that judges nothing, by "
        "successive halving: rung 1 is all points, shortened, the last one is at full length. Where a cell has several "
        "points, which differ in the feature scale, it shows the best."),
        Picture(f"{study.slug}_tuning_{name}", *figures.vector(figures_claims.tuning(panels)), f"{title(study, name)}: "
                f"{m.title} over learning rate and scale, every point that was tried; framed is the chosen one."),
        Table(f"{study.slug}_tuning_{name}", columns, rows, summary=f"All {len(rows)} points of tuning")]


def ended(row, key):
    """{seed: number} of one run, empty where it failed."""
    x = value(row, key) if row["status"] == "ended" else None
    return {} if x is None else {row["seed"]: x}


def colour_limits(values, lower):
    """From the best value to twice the median's distance from it: what is worse looks the same."""
    values = values[np.isfinite(values)]
    if not len(values):
        return 0, 1
    best = values.min() if lower else values.max()
    distance = 2 * (np.median(values) - best) or 1
    return min(best, best + distance), max(best, best + distance)


def tuning_panel(head, rung, scale, rows, key):
    """A panel of figures_claims.tuning, without its limits of colours."""
    m = METRICS[key]
    rates = sorted({value(row, "learning_rate") for row in rows}, reverse=True)
    scales = sorted({value(row, scale) for row in rows if value(row, scale) is not None}) or [1.0]
    values, chosen = np.full((len(rates), len(scales)), np.nan), None
    for row in rows:
        i, x = rates.index(value(row, "learning_rate")), value(row, scale)
        j = scales.index(x) if x in scales else 0
        for found in ended(row, key).values():
            found, best = m.scale * found, values[i, j]
            if not math.isfinite(best) or (found < best if m.lower else found > best):
                values[i, j] = found
        if np.isnan(values[i, j]):
            values[i, j] = math.inf # it failed
        if row.get("chosen") == "True":
            chosen = i, j
    return dict(title=f"{head}, rung {rung}", rung=rung, scale=scale.replace("_", " "), rates=rates, scales=scales,
                values=values, chosen=chosen, spec=m.spec.replace(".4f", ".3f"),
                colours="viridis_r" if m.lower else "viridis")


def metrics_shown(study):
    """The metrics whose definitions a reader of the study needs."""
    keys = {claim["metric"] for claim in study.design.get("claims", []) if "metric" in claim}
    for setting in study.design["settings"].values():
        keys |= {setting["quality"], setting["tuned_by"]}
    return [key for key in METRICS if key in keys or (key in COSTS and any(row.get(key) for row in study.rows))]
