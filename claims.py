"""
Runs the study of claims: a design says which heads, settings and comparisons there are. Every head is tuned for itself,
by validation, and then judged on seeds that tuning has not seen. What report.py shows of it opens with the verdicts.

$ python claims.py                                  # all settings of config/claims.toml; gpt alone: 8 hours of 2 cores
$ python claims.py gpt mnist_cnn                    # these settings only
$ python claims.py gpt --stage=tune                 # tuning alone; or --stage=confirm; --stage=table runs nothing
$ python claims.py --design=config/claims_small.toml --out_dir=out/claims_small    # two minutes on 2 cores
$ python report.py out/claims

Tuning is by successive halving: short runs of a grid of learning rate and scale, then the best few at full length, then
what lies beyond an edge of the grid at which the best one lies, until it lies inside, then the design's refinements by
factors of two; all of it in at most 12 rounds. Confirmation goes seed by seed, so that whenever it stops all heads have
the same seeds; a run that fails scores chance. As with study.py, what has ended is not run again, Ctrl-C stops, and the
same command goes on. The folder keeps the design that its first run of confirmation was made for, and refuses another
one. runs.csv there has a row a run, each of which has its own folder; evaluations.csv has the course of those that ask
what a loss costs. A study goes on from another machine's runs.csv where --record names it:

$ python claims.py gpt --record=assets/claims/runs.csv      # only what is not in the table of this repository
"""
import csv
import json
import math
import os
import shlex
import statistics
import sys
from collections import namedtuple

import results
import study
import verdicts
from configurator import configure, fail, find, is_refusal
from metrics import METRICS
from page import write_csv
from run_folder import Damaged, readable

# -----------------------------------------------------------------------------
# defaults
design = "config/claims.toml"
out_dir = "out/claims"
stage = "all" # or 'tune', 'confirm', or 'table': only runs.csv is written, from the runs that there are
record = "" # a runs.csv of this design, from elsewhere: a run that it has is not made here, its row stands
jobs = 0 # how many run at once; 0: one for each core, with a GPU one
# -----------------------------------------------------------------------------
STAGES = ("all", "tune", "confirm", "table")
_ROUNDS = 12 # of suggestions at most
recorded = {} # {folder: row} of the record, see read_record()
# plan, below: the design, as verdicts.load() has it; make, as an argument: make(), list_only() or require()
# rung: of tuning, from 1 on; point: {flag: value} of what is tuned
Run = namedtuple("Run", "setting head stage rung seed point folder recipe")


# -----------------------------------------------------------------------------
# the runs

def make_run(plan, name, head, stage, seed, point, rung=None):
    """Return the Run of a head at one point of tuning, of the setting of this name."""
    setting = plan["settings"][name]
    values = [f"--{key}={value:.6g}" for key, value in sorted(point.items())]
    shorter = setting["rungs"][rung - 1] if rung else ""
    flags = [*shlex.split(shorter), *shlex.split(plan["heads"][head]["flags"]), *values, f"--seed={seed}"]
    words = [f"{key}{value:.4g}" for key, value in sorted(point.items())]
    last = f"rung{rung}" if rung else f"s{seed}"
    folder = os.path.join(out_dir, name, stage, head, "_".join([*words, last]))
    recipe = study.recipe(setting["script"], setting["arguments"], flags)
    return Run(name, head, stage, rung, seed, point, folder, recipe)


def recorded_row(run):
    """Return the row that the record has of a run, or None where it has none or the run was made here."""
    return recorded.get(run.folder) if study.state(run.folder) == "new" else None


def state(run):
    """As study.state(), but a run of the record has ended, or is broken."""
    row = recorded_row(run)
    if row:
        return "ended" if row["status"] == "ended" else "broken"
    return study.state(run.folder)


def make(runs, at_once=0):
    """Make those runs that are new or have been stopped, so many at once; 0: jobs."""
    todo = [(run.folder, run.recipe) for run in runs if state(run) in ("new", "stopped")]
    if todo:
        print(f"{todo[0][0]} and so on: {len(todo)} of {len(runs)} runs to make")
        study.run_all(todo, at_once or jobs or study.cores())


def list_only(runs, at_once=0):
    """Make nothing: what takes this in the place of make() finds the runs that there are."""


def require(runs, at_once=0):
    """Make nothing, and raise SystemExit where a run has not ended: heads are judged at points that do not move."""
    open_ones = [run for run in runs if state(run) not in ("ended", "broken")]
    if open_ones:
        raise SystemExit(f"{open_ones[0].folder} has not ended, one of {len(open_ones)} runs of tuning, which comes "
                         f"before confirmation: python claims.py {open_ones[0].setting} --stage=tune")


def score(run, setting):
    """Return what tuning judges a run by, the lower the better: infinity where it failed or has not ended."""
    summary = recorded_row(run)
    try:
        if not summary:
            with open(os.path.join(run.folder, "summary.json"), encoding="utf-8") as f:
                summary = json.load(f)
        value = float(summary[setting["tuned_by"]])
    except (OSError, ValueError, KeyError, TypeError): # no file, no number, no such number, or null: it was not finite
        return math.inf
    return value if setting["lower"] else -value


# -----------------------------------------------------------------------------
# tuning

def grid(head, setting):
    """Return the points of the first rung."""
    points = []
    for rate in setting["learning_rate"]:
        points += [{"learning_rate": rate, head["scale"]: scale} for scale in setting[head["scale"]]]
    return points


def neighbours(values, value):
    """Return the values beside this one, or where it is the least or the most the next of its geometric series."""
    values = sorted(set(values))
    i = values.index(value)
    ratio = values[1] / values[0] if i == 0 and len(values) > 1 else value / values[i - 1]
    below = values[i - 1] if i > 0 else value / ratio
    above = values[i + 1] if i + 1 < len(values) else value * ratio
    return [float(f"{x:.3g}") for x in (below, above)]


def suggestions(head, setting, best, tried):
    """
    Return the points that the best one asks for: those beside it that were tried at no length, so that it lies at no
    edge, or where there are none its neighbours in what is refined, by factors of two.
    """
    points, of_grid = [], ("learning_rate", head["scale"])
    seen = [tuple(point[key] for key in of_grid) for point in tried]
    for key in of_grid:
        values = [point[key] for point in tried]
        if len(set(values)) > 1:
            points += [{**best, key: value} for value in neighbours(values, best[key])]
    points = [point for point in points if tuple(point[key] for key in of_grid) not in seen]
    if points:
        return points
    for key, default in setting.get("refined", {}).items():
        if key != head["scale"] and not head.get("scale_free"):
            for value in (best.get(key, default) / 2, best.get(key, default) * 2):
                point = {**best, key: value}
                if math.isclose(value, default): # what every point has that does not name it
                    del point[key]
                points.append(point)
    return points


def tune(plan, name, make):
    """
    Tune the heads of a setting, all side by side. Returns ({head: the Run of its best point}, all Runs). One that is
    `like` another setting makes no runs, and has that one's.
    """
    setting = plan["settings"][name]
    if "like" in setting:
        return tune(plan, setting["like"], list_only if make is list_only else require)
    heads = {head: about for head, about in plan["heads"].items() if "like" not in about}
    points = {head: grid(about, setting) for head, about in heads.items()}
    done = {head: [] for head in heads} # its Runs
    last = len(setting["rungs"])

    def run(rung):
        """Make the points, and return for each head its Runs so far at full length, the best one first."""
        new = {head: [make_run(plan, name, head, "tune", setting["seed"], point, rung) for point in points[head]]
               for head in heads}
        make([run for runs in new.values() for run in runs])
        ranked = {}
        for head, runs in new.items():
            done[head] += runs
            ranked[head] = sorted((run for run in done[head] if run.rung == rung), key=lambda run: score(run, setting))
        return ranked

    for rung in range(1, last + 1):
        ranked = run(rung)
        if rung < last:
            points = {head: [run.point for run in runs[:setting["kept"]]] for head, runs in ranked.items()}
    for _ in range(_ROUNDS):
        for head, about in heads.items():
            best, tried = ranked[head][0], [run.point for run in done[head]]
            full = [run.point for run in ranked[head]]
            points[head] = [point for point in suggestions(about, setting, best.point, tried) if point not in full]
            if math.isinf(score(best, setting)):
                points[head] = []
        if not any(points.values()):
            break
        ranked = run(last)
    chosen = {head: runs[0] for head, runs in ranked.items() if math.isfinite(score(runs[0], setting))}
    return chosen, [run for runs in done.values() for run in runs]


# -----------------------------------------------------------------------------
# confirmation

def confirm(plan, name, chosen, tuned, make):
    """Make the runs that judge each head at its best point, seed by seed, and before them those of a target of the
    setting's own. Returns them all."""
    setting = plan["settings"][name]
    runs = [run for run in target_runs(plan, name, tuned) if run not in tuned]
    for seed in range(1, setting["looks"][-1] + 1):
        for head in setting.get("heads", plan["heads"]):
            about = plan["heads"][head]
            best = chosen.get(about.get("like", head))
            if best and name in about.get("settings", [name]):
                runs.append(make_run(plan, name, head, "confirm", seed, best.point))
    make(runs, setting.get("jobs", 0))
    return runs


def target_runs(plan, name, tuned):
    """
    Return the Runs of which a setting has its target: those of the first head, the linear one, at full length in
    tuning. A setting that is `like` another makes them again, as it may evaluate on other tokens than that one.
    """
    setting = plan["settings"][name]
    of_tuning = plan["settings"][setting.get("like", name)]
    first, last = next(iter(plan["heads"])), len(of_tuning["rungs"])
    runs = [run for run in tuned if run.head == first and run.rung == last]
    if "like" in setting:
        return [make_run(plan, name, first, "target", of_tuning["seed"], run.point) for run in runs]
    return runs


def target(plan, name, tuned):
    """
    What a run of the setting has to reach, as score() counts: the median of what its target_runs() have reached. Minus
    infinity where none has ended: nothing reaches it.
    """
    reached = [score(run, plan["settings"][name]) for run in target_runs(plan, name, tuned)]
    return statistics.median(filter(math.isfinite, reached)) if any(map(math.isfinite, reached)) else -math.inf


def to_target(evals, setting, goal):
    """
    {steps_to_target, cpu_to_target, arrived} of the evaluations of a run. One that does not arrive has all that it
    took, which is less than it would have needed: verdicts.py decides nothing that this could turn.
    """
    sign, key = 1 if setting["lower"] else -1, setting["tuned_by"]
    arrived = [row for row in evals if sign * row[key] <= goal]
    row = arrived[0] if arrived else evals[-1]
    return dict(steps_to_target=row["step"], cpu_to_target=row.get("cpu_seconds"), arrived=bool(arrived))


# -----------------------------------------------------------------------------
# the table

def refused(folder):
    """Whether a run broke as its script refused settings or checkpoint (configurator.fail): no failure of its head."""
    with open(os.path.join(folder, "error.txt"), encoding="utf-8", errors="replace") as f:
        return is_refusal(f.read())


def row_of(run, setting, chosen, goal):
    """Return a run as a row of runs.csv, or None where it has not been made. goal: see target()."""
    best, row = chosen.get(run.head), recorded_row(run)
    if row:
        return dict(row, chosen=run == best)
    found = study.state(run.folder)
    if found not in ("ended", "broken"):
        return None
    if found == "broken" and refused(run.folder):
        print(f"{run.folder} is not counted: {study.why(run.folder)}. remove the folder to make the run again")
        return None
    row = dict(setting=run.setting, head=run.head, stage=run.stage, rung=run.rung, seed=run.seed,
               learning_rate=run.point["learning_rate"], n=run.point.get("n"),
               feature_scale=run.point.get("feature_scale"), chosen=run == best,
               status="ended" if found == "ended" else "failed", git=None, folder=os.path.relpath(run.folder, out_dir))
    if found == "ended":
        try:
            read = results.measure(results.read_run(run.folder))
        except Damaged as e:
            print(e)
            return None
        row.update({key: read.values.get(key) for key in METRICS}, git=read.info.get("git"))
        if run.stage == "confirm" and read.evals:
            row.update(to_target(read.evals, setting, goal))
    return row


def evaluations(runs, setting):
    """
    Return a row for each evaluation of the runs of confirmation that were made here. What any loss costs is in them,
    also where no run arrives at the target.
    """
    rows, key = [], setting["tuned_by"]
    for run in runs:
        if run.stage != "confirm" or study.state(run.folder) != "ended":
            continue
        try:
            evals = results.read_run(run.folder).evals
        except Damaged: # row_of() says so
            continue
        for row in evals:
            rows.append({"setting": run.setting, "head": run.head, "seed": run.seed, "step": row["step"], key: row[key],
                         "cpu_seconds": row.get("cpu_seconds")})
    return rows


def table(plan):
    """Write runs.csv, of all settings, and return its rows; for what a loss costs, evaluations.csv."""
    rows, evals = [], []
    for name in plan["settings"]:
        setting = plan["settings"][name]
        chosen, tuned = tune(plan, name, list_only)
        goal, runs = target(plan, name, tuned), confirm(plan, name, chosen, tuned, list_only)
        if "like" not in setting: # whose runs are in the table already
            runs = [*tuned, *runs]
        else:
            evals += evaluations(runs, setting)
        rows += [row for run in runs if (row := row_of(run, setting, chosen, goal))]
    write_csv(os.path.join(out_dir, "runs.csv"), rows)
    if evals:
        write_csv(os.path.join(out_dir, "evaluations.csv"), evals)
    return rows


def read_record(text):
    """
    Return the rows of the record, by the folder that each run would have here. text: the design, which has to be the
    one beside the record. Raises Damaged.
    """
    beside = os.path.join(os.path.dirname(record), "claims.toml")
    with readable(beside), open(beside, encoding="utf-8") as f:
        if f.read() != text:
            raise Damaged(f"{beside} is not the design {design}: the runs of {record} are not of this study")
    with readable(record), open(record, newline="", encoding="utf-8") as f:
        return {os.path.join(out_dir, row["folder"]): row for row in csv.DictReader(f)
                if row["status"] in ("ended", "failed")}


def freeze(text):
    """Keep the design in out_dir. Raises SystemExit where another one is kept there."""
    path = os.path.join(out_dir, "claims.toml")
    if not os.path.exists(path):
        study.write(path, text)
        return
    with open(path, encoding="utf-8") as f:
        if f.read() != text:
            raise SystemExit(f"{design} is not the design that {path} is: {out_dir} has runs of confirmation that were "
                             "made for that one. use another --out_dir")


def main():
    names, problems, plan = [arg for arg in sys.argv[1:] if not arg.startswith("-")], [], {"settings": {}}
    configure(globals(), [arg for arg in sys.argv[1:] if arg.startswith("-")], problems=problems)
    if stage not in STAGES:
        problems.append(f"stage is {stage!r}: use {', '.join(STAGES)}")
    if jobs < 0:
        problems.append(f"jobs is {jobs}, it must be >= 0")
    try:
        with open(find(design), encoding="utf-8") as f:
            text = f.read()
        plan = verdicts.load(text)
        verdicts.check(plan)
        legal = ", ".join(plan["settings"])
        problems += [f"{design} has no setting {name!r} (legal: {legal})" for name in names
                     if name not in plan["settings"]]
    except (OSError, ValueError, KeyError) as e:
        problems += [f"the design {design!r} cannot be read ({type(e).__name__})", *str(e).splitlines()]
    fail(problems)
    try:
        recorded.update(read_record(text) if record else {})
    except Damaged as e:
        fail([str(e)])

    os.makedirs(out_dir, exist_ok=True)
    try:
        if stage != "table":
            study.import_ahead()
            for name in names or plan["settings"]:
                chosen, tuned = tune(plan, name, make if stage != "confirm" else require)
                if stage != "tune":
                    freeze(text)
                    confirm(plan, name, chosen, tuned, make)
    finally: # also where it is stopped
        rows = table(plan)
    print(f"{len(rows)} runs: {os.path.join(out_dir, 'runs.csv')}")
    print(f"python report.py {out_dir}")


if __name__ == "__main__":
    main()
