"""
Reads the files of a run's folder, which run.py lists, for results.py and figures.py. A file that is damaged raises
Damaged, one line that names it: what comes through has every key that these two use, each of its own kind.
"""
import csv
import json
import os
import sys
from collections import namedtuple
from contextlib import contextmanager

import numpy as np

import safe
from distances import OF_EVERY_HEAD, find, parse_head

SCRIPTS = ("train.py", "train_vision.py", "train_metric.py", "train_toy.py")
WORDS = {int: "an integer", float: "a finite number", bool: "true or false", str: "a text", dict: "a dict",
         list: "a list"}


class Damaged(ValueError):
    """A file is missing or makes no sense. The message is one line, which names it."""


@contextmanager
def readable(path, problem="cannot be read"):
    """Whatever goes wrong in here becomes a Damaged with this path and this problem, but for a missing package."""
    try:
        yield
    except (Damaged, ImportError):
        raise
    except FileNotFoundError as e:
        raise Damaged(f"there is no {e.filename or path}") from None
    except Exception as e: # a damaged file can raise nearly anything
        reason = " ".join(str(e).split())
        raise Damaged(f"{path} {problem} ({type(e).__name__}: {reason:.150})") from None


def finite(x):
    """Whether x is a number that a float can hold."""
    return isinstance(x, (int, float)) and type(x) is not bool and abs(x) <= sys.float_info.max


def check(values, **kinds):
    """Raise ValueError where values, a dict, lacks one of the keys in kinds, or has it of another kind."""
    for key, kind in kinds.items():
        value = values.get(key)
        is_right = finite(value) if kind is float else type(value) is kind
        if not is_right:
            raise ValueError(f"{key} is {value!r:.60}, expected {WORDS[kind]}")


def read_json(path):
    """Return the dict in a JSON file. Raises Damaged."""
    with readable(path), open(path, encoding="utf-8") as f:
        values = json.load(f)
        check({"it": values}, it=dict)
        return values


def read_config(folder):
    """Return the contents of config.json. Raises Damaged where the folder is not that of a run."""
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        raise Damaged(f"{folder} is not a run's folder: it has no config.json")
    info = read_json(path)
    with readable(path):
        check(info, script=str, n=float, config=dict, sources=dict, data=dict, versions=dict, model_args=dict)
        if info["script"] not in SCRIPTS:
            raise ValueError(f"it is that of a run of {info['script']!r}, not of {' or '.join(SCRIPTS)}")
        check(info["config"], distance=str, variant=str, distance_params=str, link=str, n=float, learn_n=bool,
              eps=float, feature_scale=float, seed=int, dataset=str, out_dir=str, data_dir=str, grad_clip=float)
        if info["script"] == "train.py":
            check(info["config"], warmup_iters=int)
            check(info["model_args"], vocab_size=int)
        else:
            check(info["config"], model=str)
            check(info["data"], num_classes=int)
        if info["script"] == "train_vision.py":
            check(info["model_args"], image_shape=list)
        optional = {"head": str, "git": str, "command": str} # earlier runs have no head, others no git
        check(info, **{key: kind for key, kind in optional.items() if info.get(key) is not None})
    return info


def read_rows(folder, script):
    """
    Return (log lines, evaluations, whether that is all) of metrics.jsonl of a run of this script, as dicts, without the
    lines that are damaged. Raises Damaged where the file cannot be read at all.
    """
    with readable(os.path.join(folder, "metrics.jsonl")):
        rows, whole = safe.read_metrics(folder)
    logs, evals = [], []
    for row in rows:
        try:
            check_row(row, script)
        except ValueError:
            whole = False
            continue
        (logs if row["kind"] == "train" else evals).append(row)
    return logs, evals, whole


def check_row(row, script):
    """Raise ValueError where a line of metrics.jsonl is not what the script writes."""
    check({"it": row}, it=dict)
    kinds = dict(step=int, tokens=int) if script == "train.py" else dict(step=int, epoch=int)
    if row.get("kind") == "train":
        kinds |= dict(loss=float)
    elif row.get("kind") == "eval":
        kinds |= dict(val_loss=float)
        if script in ("train_vision.py", "train_metric.py"):
            kinds |= dict(val_accuracy=float)
        if script == "train_vision.py":
            kinds |= dict(best_accuracy=float)
    else:
        raise ValueError(f"kind is {row.get('kind')!r:.60}")
    check(row, **kinds, **{key: float for key in row if key.endswith("_total")})


def read_summary(folder):
    """Return summary.json, or None where there is none: the run has not ended. Raises Damaged."""
    path = os.path.join(folder, "summary.json")
    return read_json(path) if os.path.exists(path) else None


def read_emissions(folder):
    """Return the last row of emissions.csv, or None where there is none. Raises Damaged."""
    path = os.path.join(folder, "emissions.csv")
    if not os.path.exists(path):
        return None
    with readable(path), open(path, newline="", encoding="utf-8") as f:
        rows = [row for row in csv.DictReader(f) if None not in row.values()] # a crash may have cut the last one
        for row in rows[-1:]:
            check({"g_per_kwh": float(row["g_per_kwh"])}, g_per_kwh=float)
            return row
    return None


def read_error(folder):
    """Return the last line of error.txt, which study.py leaves where a run broke."""
    try:
        with open(os.path.join(folder, "error.txt"), encoding="utf-8", errors="replace") as f:
            lines = f.read().strip().splitlines()
    except OSError as e:
        return str(e)
    return lines[-1] if lines else "no reason"


def read_probe(folder):
    """Return the arrays of probe.npz by name: h (N, D), y (N,), and in some runs class_means (K, D). Raises Damaged."""
    path = os.path.join(folder, "probe.npz")
    with readable(path), np.load(path) as f:
        arrays = dict(f)
        h, y = arrays["h"].astype(np.float64), arrays["y"]
        shapes = [x.shape for x in arrays.values()]
        if h.ndim != 2 or min(h.shape) < 1 or y.shape != h.shape[:1] or y.dtype.kind not in "iu" or y.min() < 0:
            raise ValueError(f"its arrays are no hidden states with their classes, but of the shapes {shapes}")
        if "class_means" in arrays and arrays["class_means"].shape[1:] != h.shape[1:]:
            raise ValueError(f"the class means do not fit to the hidden states, the shapes are {shapes}")
        return {**arrays, "h": h, "y": y}


def read_prototypes(folder):
    """Return head.weight (V, D) of best.pt, as a float32 array. Raises Damaged."""
    path = os.path.join(folder, "best.pt")
    try:
        weights = safe.load(path)["model"]
    except ValueError as e:
        raise Damaged(str(e)) from None
    with readable(path):
        return weights["head.weight"].float().numpy()


# -----------------------------------------------------------------------------
# the head of a run, by what its config.json says

OF_ANY_AGE = "link", "n", "learn_n", "eps"
# settings that name a head where they are on; runs from before they were there have them off
EXTRAS = ("head_bias", *(name for name in OF_EVERY_HEAD if name not in OF_ANY_AGE))
HEAD_KEYS = ("loss", "distance", "variant", "distance_params", "feature_scale", *OF_ANY_AGE, *EXTRAS)


class Head(namedtuple("Head", "distance variant params link setting n eps feature_scale extras", defaults=("",))):
    """What runs that may be averaged share of their settings in HEAD_KEYS. setting is that of n: 'fixed', 'given' (on
    the command line) or 'learned'; extras are those of EXTRAS that are on, in words. A loss of train_metric.py that is
    no head has its name in the place of the distance, and in that of the variant the distance between samples, if it
    is not the loss's own."""

    @property
    def is_baseline(self):
        """Whether it is the linear head as it is, with which others are compared."""
        plain = self.setting == "fixed" and not self.variant and not self.extras
        return self.distance == "baseline" and plain


def head_of(info):
    """The Head of a config.json. "minkowski:p=3" is the same one as "minkowski" with the parameters "p=3"."""
    c = info["config"]
    params = parse_head(c["distance"], c["variant"], c["distance_params"])
    distance, variant = params.pop("distance"), params.pop("variant")
    variant, _ = find(distance, variant)
    if c.get("loss", "head") != "head":
        words = [] if distance == "baseline" else [distance, variant, c["distance_params"]]
        return Head(c["loss"], " ".join(filter(None, words)), "", "", "fixed", 0.0, c["eps"], c["feature_scale"])
    link, n, eps, learns = c["link"], c["n"], c["eps"], c["learn_n"]
    is_given = n != 0 and info["sources"]["n"] == "command line"
    if distance == "baseline": # it has no link and no eps, and once had no n: what was set then did nothing
        n = 0.0 if info["n"] == 1 else info["n"]
        link, eps, learns, is_given = "", 0.0, "learned" in (info.get("head") or ""), n != 0
    setting = "fixed"
    if learns:
        setting = "learned"
    elif is_given:
        setting = "given"
    params = ", ".join(f"{name}={value:g}" for name, value in sorted(params.items()))
    return Head(distance, variant or "", params, link, setting, n, eps, c["feature_scale"], extras_of(c))


def extras_of(config):
    """The settings of EXTRAS that are on, in words: "head_bias, softcap=15"."""
    words = []
    for name in EXTRAS:
        value = config.get(name, False)
        if value:
            words.append(name if value is True else f"{name}={value:g}")
    return ", ".join(words)
