"""claims.py: a study whose runs are made up, so that one knows where the best point lies, and a small real one."""
import csv
import json
import math
import os
import pathlib
import shutil
import statistics
import sys

import pytest
from helpers import ROOT, run_script

import claims
import study
import verdicts
from page import write_csv

DESIGN = """
confidence = 0.95
power = 0.9
[heads]
linear = { flags = "--distance=baseline", scale = "feature_scale" }
euclidean = { flags = "--distance=euclidean", scale = "n" }
learned = { flags = "--distance=euclidean --learn_n=true", like = "euclidean" }

[settings.digits]
title = "digits"
script = "train_vision.py"
arguments = "--dataset=digits --plots=false --track_emissions=false --device=cpu --epochs=2"
tuned_by = "val_accuracy"
quality = "test_accuracy"
lower = false
seed = 1001
rungs = ["--epochs=1", ""]
kept = 2
learning_rate = [1e-3, 1e-2]
n = [1, 4]
feature_scale = [1, 4]
looks = [2]
"""


def flag(recipe, name, default=None):
    """The value of a flag in a recipe, as a number; the last one counts."""
    values = [float(word.partition("=")[2]) for word in recipe if word.startswith(f"--{name}=")]
    return values[-1] if values else default


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """
    A function of a design and a loss: it calls claims.py in an empty folder, where a run is no more than a summary with
    the loss of its recipe, or broken where that is a text. Returns (the rows of runs.csv, the recipes that were made).
    """
    monkeypatch.chdir(tmp_path)
    made = []

    def call(design, loss, *args):
        def run_all(todo, at_once):
            for folder, recipe in todo:
                made.append(recipe)
                os.makedirs(folder)
                value = loss(recipe)
                if isinstance(value, str):
                    pathlib.Path(folder, "error.txt").write_text(value)
                    continue
                pathlib.Path(folder, "summary.json").write_text(json.dumps({"val_accuracy": -value}))
        (tmp_path / "design.toml").write_text(design)
        monkeypatch.setattr(study, "run_all", run_all)
        monkeypatch.setattr(study, "import_ahead", lambda: None)
        monkeypatch.setattr(claims.results, "read_run", FakeRun)
        monkeypatch.setattr(claims.results, "measure", lambda run: run)
        monkeypatch.setattr(sys, "argv", ["claims.py", "--design=design.toml", "--out_dir=out", *args])
        for key, value in DEFAULTS.items():
            monkeypatch.setattr(claims, key, value)
        made.clear()
        claims.recorded.clear()
        claims.main()
        with open("out/runs.csv") as f:
            return list(csv.DictReader(f)), list(made)
    return call


DEFAULTS = {key: getattr(claims, key) for key in ("design", "out_dir", "stage", "record", "jobs")}


class FakeRun:
    """A run whose validation accuracy rises by 1 a step, from -4 on."""
    info = {"git": "abc"}
    evals = [dict(step=step, cpu_seconds=2.0 * step, val_accuracy=step - 4) for step in range(5)]

    def __init__(self, folder):
        summary = json.loads(pathlib.Path(folder, "summary.json").read_text())
        self.values = {"test_accuracy": 0.5, **summary}


def bowl(recipe):
    """A loss that is lowest at a learning rate of 1e-4 and a scale of 16, both beyond the grid."""
    scale = flag(recipe, "n") or flag(recipe, "feature_scale")
    return math.log10(flag(recipe, "learning_rate") / 1e-4) ** 2 + math.log(scale / 16, 4) ** 2


def test_tuning_goes_beyond_the_edge_until_the_best_lies_inside(made_up):
    rows, made = made_up(DESIGN, bowl, "--stage=tune")
    for head in "linear", "euclidean":
        best, = [row for row in rows if row["head"] == head and row["chosen"] == "True"]
        scale = best["n"] or best["feature_scale"]
        assert (float(best["learning_rate"]), float(scale), best["rung"]) == (1e-4, 16, "2")
        full = {(row["learning_rate"], row["n"] or row["feature_scale"]) for row in rows
                if row["head"] == head and row["rung"] == "2"}
        assert ("1e-05", "16") in full or ("1e-05", "16.0") in full # inside: a worse one on either side was tried
    assert not [row for row in rows if row["head"] == "learned"] # it is like euclidean
    assert {flag(recipe, "seed") for recipe in made} == {1001}
    short = [recipe for recipe in made if flag(recipe, "epochs") == 1]
    assert len(short) == 2 * 4 # the whole grid of both heads


def test_what_is_refined_goes_on_by_factors_of_two(made_up):
    def loss(recipe):
        return bowl(recipe) + math.log2(flag(recipe, "feature_scale", 0.5) / 2) ** 2
    design = DESIGN + "refined = { feature_scale = 0.5 }\n"
    rows, _ = made_up(design, loss, "--stage=tune")
    best, = [row for row in rows if row["head"] == "euclidean" and row["chosen"] == "True"]
    assert (float(best["n"]), float(best["feature_scale"])) == (16, 2)
    named = {float(row["feature_scale"] or 0.5) for row in rows if row["head"] == "euclidean"}
    assert named == {0.25, 0.5, 1, 2, 4}
    assert "0.5" not in {row["feature_scale"] for row in rows} # the default has run before anything was refined


def test_a_head_to_which_the_scale_is_nothing_is_not_refined(made_up):
    design = DESIGN.replace('"--distance=euclidean", scale', '"--distance=euclidean", scale_free = true, scale')
    rows, _ = made_up(design + "refined = { feature_scale = 0.5 }\n", bowl, "--stage=tune")
    assert {row["feature_scale"] for row in rows if row["head"] == "euclidean"} == {""}


def test_confirmation_takes_fresh_seeds_and_what_tuning_found(made_up):
    rows, _ = made_up(DESIGN, bowl)
    judged = [row for row in rows if row["stage"] == "confirm"]
    assert [(row["seed"], row["head"]) for row in judged] == [
        (seed, head) for seed in "12" for head in ("linear", "euclidean", "learned")]
    assert {(float(row["learning_rate"]), row["n"] or row["feature_scale"]) for row in judged} == {(1e-4, "16.0")}
    assert {row["test_accuracy"] for row in judged} == {"0.5"}

    rows, made = made_up(DESIGN, bowl) # again: nothing is left to do
    assert made == [] and len(rows) > len(judged)


def test_a_setting_that_is_like_another_has_its_points_and_a_target_by_its_own_evaluation(made_up):
    """Its evaluations are of other tokens, whose loss is higher by 1: so is the target."""
    of_digits = DESIGN.partition("[settings.digits]")[2].replace('title = "digits"', 'title = "cost"')
    of_digits = of_digits.replace("--epochs=2", "--epochs=2 --eval_iters=4")
    cost = "\n[settings.cost]\nlike = 'digits'\nheads = ['linear', 'learned']" + of_digits
    rows, made = made_up(DESIGN + cost, lambda recipe: bowl(recipe) + ("--eval_iters=4" in recipe))
    judged = [row for row in rows if row["setting"] == "cost" and row["stage"] == "confirm"]
    assert [(row["seed"], row["head"]) for row in judged] == [
        (seed, head) for seed in "12" for head in ("linear", "learned")]
    assert {float(row["learning_rate"]) for row in judged} == {1e-4}
    assert len(made) == len(rows) # no run is there twice
    # the linear head's runs at full length have losses of 0 to 2.25
    tuned = [row for row in rows if row["head"] == "linear" and row["rung"] == "2"]
    again = [row for row in rows if row["stage"] == "target"]
    points = [(row["learning_rate"], row["feature_scale"]) for row in again]
    assert points == [(row["learning_rate"], row["feature_scale"]) for row in tuned]
    assert {(row["seed"], row["head"]) for row in again} == {("1001", "linear")}
    losses = [1 + bowl([f"--learning_rate={rate}", f"--feature_scale={scale}"]) for rate, scale in points]
    steps = math.ceil(4 - statistics.median(losses))
    assert {(row["steps_to_target"], row["cpu_to_target"], row["arrived"]) for row in judged} == {
        (str(steps), str(2.0 * steps), "True")}
    with open("out/evaluations.csv") as f: # the course of what is judged here, for other losses than the target
        course = list(csv.DictReader(f))
    of_run = [("0", "-4", "0.0"), ("1", "-3", "2.0"), ("2", "-2", "4.0"), ("3", "-1", "6.0"), ("4", "0", "8.0")]
    assert [tuple(row.values()) for row in course] == [
        ("cost", row["head"], row["seed"], *numbers) for row in judged for numbers in of_run]


def test_a_run_that_does_not_arrive_has_all_that_it_took():
    setting = dict(lower=True, tuned_by="val_loss")
    evals = [dict(step=10 * i, cpu_seconds=float(i), val_loss=5 - i) for i in range(4)] # 5, 4, 3, 2
    assert claims.to_target(evals, setting, 3.5) == dict(steps_to_target=20, cpu_to_target=2.0, arrived=True)
    assert claims.to_target(evals, setting, 1.5) == dict(steps_to_target=30, cpu_to_target=3.0, arrived=False)


def test_heads_are_not_judged_before_tuning_has_ended(made_up):
    with pytest.raises(SystemExit, match="one of 8 runs of tuning, which comes before confirmation: python claims.py "
                                         "digits --stage=tune"):
        made_up(DESIGN, bowl, "--stage=confirm")
    made_up(DESIGN, bowl, "--stage=tune")
    rows, made = made_up(DESIGN, bowl, "--stage=confirm")
    assert len(made) == 6 == len([row for row in rows if row["stage"] == "confirm"])


def test_a_run_that_fails_is_a_row_and_a_head_that_always_fails_is_not_judged(made_up):
    def loss(recipe):
        return "exit status 1\nthe loss is nan" if "--distance=euclidean" in recipe else bowl(recipe)
    rows, _ = made_up(DESIGN, loss)
    assert {row["status"] for row in rows if row["head"] == "euclidean"} == {"failed"}
    assert {row["head"] for row in rows if row["stage"] == "confirm"} == {"linear"}


def test_a_run_whose_script_refused_to_begin_is_no_failure_of_its_head(made_up, capsys):
    def loss(recipe):
        is_it = "--distance=baseline" in recipe and "--seed=2" in recipe
        return "exit status 1\nthis configuration cannot run, 1 to fix:\n  - no" if is_it else bowl(recipe)
    rows, _ = made_up(DESIGN, loss)
    assert [row["head"] for row in rows if row["seed"] == "2"] == ["euclidean", "learned"]
    assert "is not counted: exit status 1:   - no. remove the folder" in capsys.readouterr().out


def test_the_design_is_frozen_by_the_first_confirmation(made_up):
    made_up(DESIGN, bowl, "--stage=tune")
    made_up(DESIGN + "# other words\n", bowl)
    with pytest.raises(SystemExit, match="is not the design that out.claims.toml is: .*use another --out_dir"):
        made_up(DESIGN, bowl)


def test_a_study_goes_on_from_the_record_of_another_machine(made_up):
    def loss(recipe):
        return "killed" if "--learn_n=true" in recipe and "--seed=1" in recipe else bowl(recipe)
    whole, _ = made_up(DESIGN, loss)
    os.mkdir("record")
    os.rename("out/claims.toml", "record/claims.toml")
    kept = [row for row in whole if row["seed"] != "2" and (row["rung"] != "2" or row["head"] != "linear")]
    write_csv("record/runs.csv", kept)
    shutil.rmtree("out")
    rows, made = made_up(DESIGN, loss, "--record=record/runs.csv")
    assert rows == whole
    assert len(made) == len(whole) - len(kept)
    again, made = made_up(DESIGN, loss) # without the record, and with the folders of what it did not have
    assert again == whole and len(made) == len(kept)


@pytest.mark.parametrize("beside, message", [
    (None, "there is no claims.toml"),
    (DESIGN + "# other words", "claims.toml is not the design design.toml: the runs of record.csv are not of this"),
    (DESIGN, "record.csv cannot be read .KeyError"),
])
def test_a_record_of_another_study_is_a_line(made_up, beside, message):
    pathlib.Path("record.csv").write_text("path,distance\nout/a,cosine\n")
    if beside:
        pathlib.Path("claims.toml").write_text(beside)
    with pytest.raises(SystemExit, match=message):
        made_up(DESIGN, bowl, "--record=record.csv")


@pytest.mark.parametrize("args, message", [
    (["nothing"], "has no setting 'nothing' .legal: digits"),
    (["--stage=all_of_it"], "stage is 'all_of_it': use all, tune"),
    (["--jobs=-1"], "jobs is -1"),
    (["--design=none.toml"], "the design 'none.toml' cannot be read .FileNotFoundError"),
])
def test_bad_input_is_a_line(made_up, args, message):
    with pytest.raises(SystemExit, match=message):
        made_up(DESIGN, bowl, *args)


def test_a_design_that_is_no_toml_is_a_line(made_up):
    with pytest.raises(SystemExit, match="cannot be read .TOMLDecodeError"):
        made_up("[heads", bowl)


def test_a_small_study_of_real_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    design = DESIGN.replace("looks = [2]", "looks = [1]").replace("n = [1, 4]", "n = [1]")
    (tmp_path / "design.toml").write_text(design.replace("feature_scale = [1, 4]", "feature_scale = [1]"))
    arguments = "--design=design.toml", "--out_dir=out"
    run_script("claims.py", *arguments)
    with open("out/runs.csv") as f:
        judged = [row for row in csv.DictReader(f) if row["stage"] == "confirm"]
    assert [row["head"] for row in judged] == ["linear", "euclidean", "learned"]
    for row in judged:
        assert row["status"] == "ended" and 0.3 < float(row["test_accuracy"]) <= 1
        with open(os.path.join("out", row["folder"], "summary.json")) as f:
            assert json.load(f)["test_accuracy"] == float(row["test_accuracy"])


@pytest.mark.parametrize("name", ["claims.toml", "claims_small.toml"])
def test_the_designs_of_the_repository_make_sense(name):
    with open(os.path.join(ROOT, "config", name), "rb") as f:
        plan = verdicts.load(f.read().decode())
    verdicts.check(plan)
    for head in plan["heads"].values():
        assert set(head) <= {"flags", "scale", "scale_free", "like", "settings"}
        assert head.get("like", next(iter(plan["heads"]))) in plan["heads"] and ("like" in head) != ("scale" in head)
    for setting in plan["settings"].values():
        assert set(setting.get("heads", ())) <= set(plan["heads"])
        if "like" in setting:
            assert plan["settings"][setting["like"]]["tuned_by"] == setting["tuned_by"]
            continue
        assert setting["looks"] == sorted(setting["looks"]) and setting["seed"] > setting["looks"][-1]
