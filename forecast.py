"""
Forecasts the hours and kWh of a study, for --dry-run --measure=MINUTES of study.py.

One run of each kind, the first of those that differ in their seed alone, is made with its own settings for so many
minutes in a folder that is thrown away, as many at once as in the study, if need be with a second one beside it. If it
ends in that time, its time is known. Else it is taken apart, from the files that it leaves: steps, evaluations, and the
rest (imports, data, the compiler, the energy tracker, the warm-up), which any run has once. A step's time is that of
the steps behind the first log line, an evaluation's the mean of those behind the first one, or where there is none the
first one's without its saving.

What is not counted: pictures, what a language model does at its end, and that a run may stop early, by its patience.
Images are tested at the end, which counts as one more evaluation. A run that was stopped counts as a whole one. The
power is that of this machine over what was measured, as emissions.py counts it, and is counted once, whatever runs
beside each other.
"""
import contextlib
import csv
import heapq
import io
import json
import os
import tempfile

import study


def kinds(todo):
    """Return the runs, pairs of a folder and a recipe, that differ in the seed alone, as one list of runs for each."""
    found = {}
    for folder, recipe in todo:
        key = tuple(word for word in recipe if not word.startswith("--seed="))
        found.setdefault(key, []).append((folder, recipe))
    return list(found.values())


def planned(script, info):
    """Return how many steps and evaluations a run makes, from its config.json."""
    config = info["config"]
    if script == "train.py":
        length, steps, tests = config["max_iters"], config["max_iters"], 0
    else:
        per_epoch = max(info["data"]["train_images"] // config["batch_size"], 1)
        length, steps, tests = config["epochs"], config["epochs"] * per_epoch, 1
    whole, rest = divmod(length, config["eval_interval"])
    return steps, 1 + whole + (rest > 0) + tests # the first one before any step


def lines(path):
    """Return the rows of a CSV file, or of a file with a JSON object in each line; none where there is no file."""
    if not os.path.exists(path):
        return []
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f)) if path.endswith(".csv") else [json.loads(line) for line in f]


def taken_apart(folder, script):
    """
    Return the run in a folder as numbers by name: seconds, those of the whole run; step, evaluation and rest, in
    seconds, and how many steps and evaluations it makes; watts, 0 where there is no emissions.csv. Raises
    ValueError where it made no step.
    """
    def when(name):
        return os.path.getmtime(os.path.join(folder, name))
    took = max(map(when, os.listdir(folder))) - when("arguments.json")
    rows = lines(os.path.join(folder, "metrics.jsonl"))
    logs, evals = ([row for row in rows if row["kind"] == kind] for kind in ("train", "eval"))
    if not logs:
        raise ValueError("made no step in this time: give --measure more minutes")
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
        steps, evaluations = planned(script, json.load(f))
    made, first = logs[-1]["step"], 0
    spans = [] # (steps, seconds of each) of the log lines
    for row in logs:
        spans.append((row["step"] - first, row["ms"] / 1000))
        first = row["step"]
    warm = spans[1:] or spans
    step = sum(count * seconds for count, seconds in warm) / sum(count for count, _ in warm)

    energy = lines(os.path.join(folder, "emissions.csv"))
    watts = 3.6e6 * float(energy[-1]["energy_kwh_total"]) / float(energy[-1]["seconds_total"]) if energy else 0.0
    at = {int(row["step"]): float(row["seconds_total"]) for row in energy[:len(evals)]} # the last row is of the end
    evaluation = 0.0 # without emissions.csv it is a part of the rest
    if at:
        evaluation = at[0]
        between = max(at)
        if between: # from the first evaluation to the last one: steps, and evaluations
            of_steps = sum(count * seconds for count, seconds in spans[:sum(row["step"] <= between for row in logs)])
            evaluation = max(at[between] - at[0] - of_steps, 0) / (len(at) - 1)
    rest = max(took - made * step - len(evals) * evaluation, 0)
    seconds = rest + steps * step + evaluations * evaluation
    if os.path.exists(os.path.join(folder, "summary.json")):
        seconds = took
    return dict(seconds=seconds, step=step, steps=steps, evaluation=evaluation, evaluations=evaluations, rest=rest,
                watts=watts, made=made)


def until_the_last(seconds, at_once):
    """Return when the last of the runs ends that take so many seconds each and begin in this order, so many at once."""
    free = [0.0] * at_once
    for took in seconds:
        heapq.heapreplace(free, free[0] + took)
    return max(free)


def forecast(todo, at_once, minutes):
    """Measure these runs, pairs of a folder and a recipe, and print what they will take. Raises SystemExit."""
    groups = kinds(todo)
    print(f"measuring one run of each of {len(groups)} kinds, {minutes:g} minutes each, {at_once} at once")
    of_folder, measured = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        flags = ["--track_emissions=true", "--wandb_log=false", "--log_interval=5", f"--time_limit={minutes}"]
        tried = [(os.path.join(scratch, str(i)), [*group[0][1], *flags]) for i, group in enumerate(groups)]
        beside = -len(tried) % at_once # so that the last ones have as many beside them as all the others
        tried += [(f"{folder}_beside", recipe) for folder, recipe in (tried * at_once)[:beside]]
        study.import_ahead()
        with contextlib.redirect_stdout(io.StringIO()): # it would say how to go on
            broken, _ = study.run_all(tried, at_once)
        for (folder, recipe), group in zip(tried, groups):
            name = os.path.basename(group[0][0])
            try:
                if folder in broken:
                    raise ValueError(broken[folder])
                found = taken_apart(folder, recipe[0])
            except (OSError, ValueError, LookupError) as e:
                raise SystemExit(f"no forecast: {name}, to be measured, {e}") from None
            of_folder.update({path: found["seconds"] for path, _ in group})
            measured.append(found)
            print(f"{found['seconds']:8.0f} s x {len(group)}  {name}: {found['steps']:,} steps of "
                  f"{1000 * found['step']:.1f} ms, {found['evaluations']} evaluations of {found['evaluation']:.2f} s, "
                  f"{found['rest']:.1f} s once; measured {found['made']:,} steps")
    seconds = [of_folder[folder] for folder, _ in todo]
    hours = until_the_last(seconds, at_once) / 3600
    joules = sum(found["watts"] * found["seconds"] for found in measured)
    watts = joules / sum(found["seconds"] for found in measured)
    energy = f"{watts * hours / 1000:.3g} kWh" if watts else "kWh unknown, for want of CodeCarbon"
    print(f"forecast: {hours:.3g} hours, {at_once} at once ({sum(seconds) / 3600:.3g} hours of runs), {energy}")
