"""
Runs the study of claims: the design in config/claims.toml says which heads, settings and comparisons.

$ python claims.py gpt                 # tunes every head in one setting, then makes the runs that judge them
$ python claims.py gpt --stage=tune    # only the first of these
"""
import json
import math
import os
import shlex
import sys
import tomllib

import study
from configurator import configure, fail

# -----------------------------------------------------------------------------
# defaults
design = "config/claims.toml"
out_dir = "out/claims"
stage = "all" # or 'tune'
jobs = 0 # how many run at once; 0: one for each core
# -----------------------------------------------------------------------------


def point_flags(head, setting, point):
    """Return the flags of one point of tuning: of the head, and of each value that is tuned."""
    values = [f"--{key}={value:.6g}" for key, value in sorted(point.items())]
    return [*shlex.split(head["flags"]), *values, f"--seed={setting['seed']}"]


def point_name(point):
    return "_".join(f"{key}{value:.4g}" for key, value in sorted(point.items()))


def grid(head, setting):
    """Return all points of the first rung: dicts of the flags that are tuned."""
    return [{"learning_rate": rate, head["scale"]: scale}
            for rate in setting["learning_rate"] for scale in setting[head["scale"]]]


def key_of(point):
    return tuple(sorted(point.items()))


def score(folder, setting):
    """Return what a run of tuning is judged by, the lower the better: infinity where it has failed."""
    try:
        with open(os.path.join(folder, "summary.json"), encoding="utf-8") as f:
            value = json.load(f)[setting["tuned_by"]]
    except (OSError, ValueError, KeyError):
        return math.inf
    return value if setting["lower"] else -value


def beyond(values, value):
    """Return the value that continues a geometric series at the end where this one stands, or None inside."""
    values = sorted(values)
    if len(values) > 1 and value == values[-1]:
        return value * value / values[-2]
    if len(values) > 1 and value == values[0]:
        return value * value / values[1]
    return None


def next_points(head, setting, tried, full):
    """
    Return the points that tuning still needs, given those tried at any length and {key: score} of those at full length:
    beyond the edge where the best one lies at an edge, and its neighbours in what is refined.
    """
    best = dict(min(full, key=full.get))
    if not math.isfinite(full[key_of(best)]):
        return []
    points = []
    for key in ("learning_rate", head["scale"]):
        value = beyond({dict(point).get(key) for point in tried}, best[key])
        if value is not None:
            points.append({**best, key: value})
    for key, start in setting.get("refined", {}).items():
        if key != head["scale"]:
            value = best.get(key, start)
            points += [{**best, key: value / 2}, {**best, key: value * 2}]
            points[-2:] = [p if p[key] != start else {k: v for k, v in p.items() if k != key} for p in points[-2:]]
    return [point for point in points if key_of(point) not in full]


def tune(name, setting, heads, at_once):
    """Tune every head of a setting; what has ended is not run again."""
    folder = os.path.join(out_dir, name, "tuning")
    tried = {head: {} for head in heads} # {key: point}
    points = {head: grid(heads[head], setting) for head in heads}

    def run(rung):
        todo = []
        for head in heads:
            for point in points[head]:
                flags = [*shlex.split(setting["rungs"][rung]), *point_flags(heads[head], setting, point)]
                made_with = study.recipe(setting["script"], setting["arguments"], flags)
                todo.append((path(head, rung, point), made_with))
                tried[head][key_of(point)] = point
        todo = [run for run in todo if study.state(run[0]) in ("new", "stopped")]
        print(f"{name}, rung {rung + 1}: {len(todo)} runs")
        study.run_all(todo, at_once)

    def path(head, rung, point):
        return os.path.join(folder, head, f"{point_name(point)}_rung{rung + 1}")

    last = len(setting["rungs"]) - 1
    for rung in range(last + 1):
        run(rung)
        if rung < last:
            for head in heads:
                points[head].sort(key=lambda point: score(path(head, rung, point), setting))
                points[head] = points[head][:setting["kept"]]
    full = {head: {key_of(p): score(path(head, last, p), setting) for p in points[head]} for head in heads}
    for _ in range(8):
        points = {head: next_points(heads[head], setting, tried[head], full[head]) for head in heads}
        if not any(points.values()):
            break
        run(last)
        for head in heads:
            full[head].update({key_of(p): score(path(head, last, p), setting) for p in points[head]})
    for head in heads:
        best = min(full[head], key=full[head].get)
        print(f"{head:>24} {full[head][best]:.4f} {dict(best)}")


def main():
    names = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    configure(globals(), [arg for arg in sys.argv[1:] if arg.startswith("-")])
    with open(design, "rb") as f:
        plan = tomllib.load(f)
    legal = ", ".join(plan["settings"])
    fail([f"there is no setting {name!r} (legal: {legal})" for name in names if name not in plan["settings"]])
    study.import_ahead()
    for name in names or plan["settings"]:
        tune(name, plan["settings"][name], plan["heads"], jobs or study.cores())


if __name__ == "__main__":
    main()
