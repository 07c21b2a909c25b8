"""The arithmetic of forecast.py, on runs whose times are given, and what it knows of the scripts, on real ones."""
import csv
import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT, SETTINGS, flags, run_script
from hypothesis import given
from hypothesis import strategies as st

import forecast

STEP, EVALUATION, SAVING, ONCE, WATTS = 0.25, 3.0, 0.5, 11.0, 50.0


def leave(folder, made, batches=10, epochs=100, eval_interval=1, emissions=True, warm=4.0):
    """
    Leave what a run on images does that began at time 1000 and was stopped after so many steps, of 0.25 s each, but the
    first 4 s longer, with an evaluation of 3 s, and 0.5 s to save it, every 10 steps, and 11 s for all that is once.
    """
    os.makedirs(folder)
    now, rows, energy, first = 1000.0 + ONCE - 1, [], [], 0 # a second is for the end
    started = now
    for step in range(made + 1):
        if step % (batches * eval_interval) == 0:
            now += EVALUATION
            rows.append(dict(kind="eval", step=step))
            energy.append((step, now - started))
            now += SAVING
        if step == made:
            break
        now += STEP + (warm if step == 0 else 0)
        if (step + 1) % 5 == 0 or step + 1 == made or (step + 1) % batches == 0:
            mean = STEP + (warm / (step + 1) if first == 0 else 0)
            rows.append(dict(kind="train", step=step + 1, ms=1000 * mean))
            first = step + 1
    energy.append((made, now + 0.7 - started)) # as the run closes
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = dict(epochs=epochs, batch_size=64, eval_interval=eval_interval)
    (folder / "config.json").write_text(json.dumps(dict(config=config, data=dict(train_images=64 * batches + 9))))
    if emissions:
        with open(folder / "emissions.csv", "w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(["step", "seconds_total", "energy_kwh_total"])
            writer.writerows((step, seconds, WATTS * seconds / 3.6e6) for step, seconds in energy)
    (folder / "lock").write_text("")
    (folder / "arguments.json").write_text("[]")
    for path in folder.iterdir():
        os.utime(path, (1000, 1000))
    os.utime(folder / "lock", (now + 1, now + 1)) # what a run writes last


@pytest.mark.parametrize("made", [7, 19, 63])
def test_a_run_is_taken_apart_and_put_together(tmp_path, made):
    leave(tmp_path / "run", made)
    found = forecast.taken_apart(str(tmp_path / "run"), "train_vision.py")
    assert found["step"] == pytest.approx(STEP) and found["made"] == made
    assert (found["steps"], found["evaluations"]) == (1000, 102)
    assert found["watts"] == pytest.approx(WATTS)
    # the first evaluation alone does not tell how long it takes to save it: that is then among what is once
    saved = SAVING if made > 10 else 0
    assert found["evaluation"] == pytest.approx(EVALUATION + saved)
    assert found["rest"] == pytest.approx(ONCE + 4 + SAVING - saved)
    assert found["seconds"] == pytest.approx(found["rest"] + 1000 * STEP + 102 * found["evaluation"])


def test_without_codecarbon_an_evaluation_is_once_and_an_ended_run_is_its_own_forecast(tmp_path):
    leave(tmp_path / "run", 7, emissions=False)
    found = forecast.taken_apart(str(tmp_path / "run"), "train_vision.py")
    assert (found["watts"], found["evaluation"]) == (0, 0)
    assert found["seconds"] == pytest.approx(1000 * STEP + ONCE + 4 + EVALUATION + SAVING)
    leave(tmp_path / "ended", 20, epochs=2)
    (tmp_path / "ended" / "summary.json").write_text("{}")
    os.utime(tmp_path / "ended" / "summary.json", (1000, 1000))
    found = forecast.taken_apart(str(tmp_path / "ended"), "train_vision.py")
    assert found["seconds"] == pytest.approx(ONCE + 4 + 20 * STEP + 3 * (EVALUATION + SAVING))


def test_no_step_is_a_line(tmp_path):
    leave(tmp_path / "run", 0)
    with pytest.raises(ValueError, match="made no step in this time: give --measure more minutes"):
        forecast.taken_apart(str(tmp_path / "run"), "train_vision.py")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 5))
def test_when_the_last_run_ends(seconds, at_once):
    """Beside a clock that ticks second by second."""
    waiting, running, clock = list(seconds), [], 0
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(waiting.pop(0))
        clock += 1
        running = [left - 1 for left in running if left > 1]
    assert forecast.until_the_last(seconds, at_once) == clock


def test_kinds_differ_in_more_than_the_seed():
    todo = [(f"out/{head}_s{seed}", ["train.py", f"--distance={head}", f"--seed={seed}"])
            for seed in (1, 2) for head in ("baseline", "cosine")]
    groups = [[os.path.basename(folder) for folder, _ in group] for group in forecast.kinds(todo)]
    assert groups == [["baseline_s1", "baseline_s2"], ["cosine_s1", "cosine_s2"]]


@pytest.mark.parametrize("script, settings", [
    ("train.py", {**SETTINGS, "max_iters": 5, "eval_interval": 2}),
    ("train.py", {**SETTINGS, "max_iters": 4, "eval_interval": 2}),
    ("train_vision.py", dict(epochs=3, eval_interval=2, plots=False, track_emissions=False)),
    ("train_metric.py", dict(epochs=2, eval_interval=2, track_emissions=False))])
def test_what_is_planned_is_made(datasets, tmp_path, monkeypatch, script, settings):
    monkeypatch.chdir(datasets)
    run_script(script, *flags(**settings, out_dir=tmp_path))
    with open(tmp_path / "config.json") as f:
        steps, evaluations = forecast.planned(script, json.load(f))
    rows = forecast.lines(str(tmp_path / "metrics.jsonl"))
    with open(tmp_path / "summary.json") as f:
        assert json.load(f)["step"] == steps
    tests = int(script != "train.py")
    assert [row["kind"] for row in rows].count("eval") + tests == evaluations


def test_a_dry_run_that_measures(tmp_path):
    """A run that is stopped, another one that ends, and one that breaks; none leaves anything."""
    def measured(*args):
        command = [sys.executable, os.path.join(ROOT, "study.py"), "--dry-run", "--measure=0.02", "--seeds=1,2", *args]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    done = measured("--heads=baseline,cosine", "--settings=--epochs=1000 --patience=0 --plots=false")
    assert done.returncode == 0, done.stderr
    assert "measuring one run of each of 2 kinds, 0.02 minutes each" in done.stdout
    assert "s x 2  baseline_s1: 20,000 steps of " in done.stdout and ", 1002 evaluations of " in done.stdout
    assert "goes on" not in done.stdout + done.stderr
    assert "forecast: " in done.stdout and done.stdout.rstrip().endswith(" kWh") and os.listdir(tmp_path) == []
    done = measured("--heads=baseline", "--settings=--dataset=mnist")
    assert done.returncode == 1 and "no forecast: baseline_s1, to be measured, " in done.stderr
    assert "Traceback" not in done.stderr and os.listdir(tmp_path) == []
