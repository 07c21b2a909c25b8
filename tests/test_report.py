"""
report.py on run folders with known numbers, which are written here: what is averaged, what is tested, what is marked,
and what is said.

$ pytest tests/test_report.py
"""
import copy
import csv
import json
import math
import os
import re
import shutil
import statistics
import subprocess
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from scipy import stats

import comparisons
import figures
import metrics
import page
import report
import report_figures
import results
from run_folder import Head

# test accuracy by seed
BASE, GOOD, SAME = (0.900, 0.920, 0.911, 0.905), (0.951, 0.969, 0.962, 0.953), (0.905, 0.915, 0.912, 0.903)


def write_run(folder, seed=1, distance="baseline", accuracy=0.9, kwh=0.002, val_accuracy=None, ended=True, n=1.0,
              source="default", git="abc", data="d1", dataset="digits", script="train_vision.py", loss=5.0, end_n=None,
              **config):
    """A run folder of train_vision.py, or train.py: five evaluations, whose error halves, and six log lines"""
    folder.mkdir(parents=True)
    vision, val_accuracy = script == "train_vision.py", accuracy if val_accuracy is None else val_accuracy
    config = dict(dict(dataset=dataset, model="mlp" if vision else "gpt", distance=distance, variant="",
                       distance_params="", link="harmonic", n=n, learn_n=False, eps=1e-4, feature_scale=1.0, seed=seed,
                       out_dir=str(folder), data_dir="nowhere", grad_clip=1.0, warmup_iters=2, learning_rate=1e-3),
                  **config)
    info = dict(config=config, sources={**dict.fromkeys(config, "default"), "n": source}, script=script, n=n, git=git,
                dtype="float32", device="cpu", device_name="a CPU", cpus=2, threads=1, world_size=1,
                versions=dict(python="3", torch="2.9", cuda=None, numpy="2"), data=dict(num_classes=10, hash=data),
                model_args=dict(vocab_size=100, image_shape=(1, 2, 4)),
                command=f"{script} --distance={distance} --seed={seed} --out_dir={folder}")
    (folder / "config.json").write_text(json.dumps(info))
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(6):
        rows.append(dict(kind="train", step=5 * i, epoch=i, tokens=500 * i, loss=1.0, grad_norm=1.0 + i % 2, ms=20.0))
    for i in range(5):
        accuracy_now = val_accuracy - 0.8 * 4.0 ** -i * (i < 4)
        rows.append(dict(kind="eval", step=5 * i, epoch=i, tokens=500 * i, val_accuracy=accuracy_now,
                         best_accuracy=accuracy_now, val_loss=loss + 4 * 2.0 ** -i * (i < 4), n=n,
                         prototype_norm=1.0 + 0.1 * i, effective_rank=10.0 - i,
                         collapse_score=0.5 + (distance == "baseline") / 10,
                         variance_ratio=0.5 - 0.1 * i + 0.01 * seed, active_ratio=1 - 0.1 * i, pca5=0.8,
                         seconds_total=10.0 * i, energy_kwh_total=kwh * i / 4, emissions_g_total=400 * kwh * i / 4))
    rows.sort(key=lambda row: row["step"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    header = "step,g_per_kwh,cpu_source,gpu_source,ram_source,energy_kwh_total\n"
    (folder / "emissions.csv").write_text(header + f"20,400.0,modelled,none,modelled,{kwh}\n")
    y = np.arange(60) % 6
    np.savez(folder / "probe.npz", h=rng.normal(size=(60, 8)) + 3 * np.eye(8)[y], y=y)
    weights = {"head.weight": torch.tensor(3 * np.eye(10, 8))}
    torch.save({"model": weights, "model_args": {}, "config": config, "step": 20}, folder / "best.pt")
    if ended:
        result = dict(val_loss=loss, perplexity=math.exp(loss), best_val_loss=loss)
        if vision:
            result = dict(test_accuracy=accuracy, f1_macro=accuracy - 0.01, test_loss=1 - accuracy,
                          val_accuracy=val_accuracy, pc2_ev=0.5, pca90=50, pca90_uncapped=60, prototype_alignment=1.0,
                          seconds_per_epoch=2.0, confusion=[[1]])
        summary = dict(step=20, n=end_n or n, energy_kwh_total=kwh, emissions_g_total=400 * kwh, **result)
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def study(folder, heads, **shared):
    """{distance: accuracies by seed}"""
    for distance, values in heads.items():
        for seed, accuracy in enumerate(values, 1):
            write_run(folder / f"{distance}_{seed}", seed, distance, accuracy, **shared)


def make(folder, *args):
    """The report of the runs in folder: (index.md, index.html, a function from a table's name to its rows by head)"""
    report.main([str(folder), f'--out_dir={folder.parent / "report"}', *args])
    out = folder.parent / "report"

    def table(name):
        with open(out / "tables" / f"{name}.csv", newline="", encoding="utf-8") as f:
            return {next(iter(row.values())): row for row in csv.DictReader(f)}
    return (out / "index.md").read_text(encoding="utf-8"), (out / "index.html").read_text(encoding="utf-8"), table


@pytest.fixture
def quick(monkeypatch):
    """no figures, for what is not about them"""
    def notes_only(section, few):
        return [page.Paragraph(note) for note in report_figures.read_probes(section, few)[1]]
    monkeypatch.setattr(report_figures, "figure_blocks", notes_only)
    monkeypatch.setattr(report_figures, "small_multiples", lambda sections: [])


def close(text, value):
    return float(text) == pytest.approx(value, rel=1e-9)

# -----------------------------------------------------------------------------
# numbers


def test_what_is_counted_in_steps_by_hand(tmp_path):
    for distance in ("baseline", "cosine"):
        write_run(tmp_path / distance, distance=distance, kwh=0.002)
    path = tmp_path / "cosine" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows: # a slower one
        if row["kind"] == "eval" and row["step"] == 10:
            row["val_accuracy"] = 0.2
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs, broken = results.read_runs([str(tmp_path)])
    section, = results.make_sections(results.group(results.measure_all(runs, broken)))
    for head, steps in zip(section.heads, (10, 15)): # 1/4, 1/16, 1/64 and 0 of the way are left at 5, 10, 15, 20
        found, = section.heads[head]
        assert found.values["steps_to_90"] == steps and found.values["speed_steps"] == 10 - steps
        assert found.values["emissions_per_1000_steps"] == pytest.approx(1000 * 400 * 0.002 / 20)
        assert found.values["grad_norm"] == 2.0 # of 2, 1, 2, 1, 2


def test_means_percentages_and_tests_by_hand(tmp_path, quick):
    study(tmp_path / "runs", {"baseline": BASE, "cosine": GOOD, "manhattan": SAME})
    md, html, table = make(tmp_path / "runs")
    rows = table("digits_mlp_quality")
    p = {}
    for head, values in (("cosine", GOOD), ("manhattan", SAME)):
        row, d = rows[head], np.subtract(values, BASE)
        assert close(row["test_accuracy_mean"], np.mean(values))
        assert close(row["test_accuracy_std"], statistics.stdev(values))
        assert close(row["test_accuracy_change_percent"], 100 * (np.mean(values) - np.mean(BASE)) / np.mean(BASE))
        t = d.mean() / (d.std(ddof=1) / 2)
        p[head] = 2 * stats.t.sf(abs(t), 3)
        assert close(row["test_accuracy_p"], p[head])
        assert close(row["test_accuracy_effect_size"], t / 2)
        assert close(row["test_accuracy_difference"], d.mean())
        assert row["seeds"] == "1 2 3 4" and row["test_accuracy_pairs"] == "4"
        assert close(row["test_loss_change"], np.mean(BASE) - np.mean(values)) # no percentage of a loss
    assert p["cosine"] < p["manhattan"] # of Benjamini and Hochberg: the least of two is doubled
    assert close(rows["cosine"]["test_accuracy_p_corrected"], 2 * p["cosine"])
    assert close(rows["manhattan"]["test_accuracy_p_corrected"], p["manhattan"])
    assert rows["baseline"]["test_accuracy_change_percent"] == rows["baseline"]["test_accuracy_p"] == ""
    # after the first epoch: grad norms 2, 1, 2, 1, 2
    assert close(rows["cosine"]["gradient_stability_mean"], 1 / (1 + np.std([2, 1, 2, 1, 2]) / 1.6))
    assert close(rows["cosine"]["grad_norm_mean"], 2)
    energy = table("digits_mlp_sustainability")["cosine"]
    assert close(energy["energy_kwh_mean"], 0.002)
    assert energy["energy_kwh_p"] == ""
    assert close(energy["emissions_g_mean"], 0.8)
    assert close(energy["quality_per_wh_mean"], 100 * (np.mean(GOOD) - 0.1) / 2)
    assert close(energy["seconds_to_90_mean"], 20)
    assert close(energy["wh_to_90_mean"], 1.0) # errors less their end: 0.8, 0.2, 0.05, ...
    assert close(energy["speed_mean"], 0) and "at 400 g/kWh" in md


def test_only_a_supported_best_is_marked(tmp_path, quick):
    study(tmp_path / "a" / "runs", {"baseline": BASE, "cosine": GOOD, "manhattan": SAME})
    md, html, table = make(tmp_path / "a" / "runs")
    best = {head: row["test_accuracy_best"] for head, row in table("digits_mlp_quality").items()}
    assert best == {"baseline": "0", "cosine": "1", "manhattan": "0"}
    assert "<b>95.88 ± 0.83</b>" in html and html.count("<b>") == 1
    assert "**95.88 ± 0.83" in md and "cosine (p = " in md
    study(tmp_path / "b" / "runs", {"baseline": BASE, "manhattan": SAME}) # a better mean, by chance
    md, html, table = make(tmp_path / "b" / "runs")
    assert "<b>" not in html and "No value is marked" in md
    study(tmp_path / "c" / "runs", {"baseline": GOOD, "manhattan": SAME, "cosine": BASE}) # the baseline is the best
    md, html, table = make(tmp_path / "c" / "runs")
    assert "<b>" not in html
    assert "better than the baseline with corrected p < 0.05: none; worse: " in md.replace("&lt;", "<")


def test_one_seed_has_no_test(tmp_path, quick):
    study(tmp_path / "runs", {"baseline": BASE[:1], "cosine": GOOD[:1]})
    md, html, table = make(tmp_path / "runs")
    row = table("digits_mlp_quality")["cosine"]
    assert "One seed" in md and "no test" in md and "<b>" not in html
    assert row["test_accuracy_p"] == row["test_accuracy_std"] == row["test_accuracy_p_corrected"] == ""
    assert close(row["test_accuracy_change_percent"], 100 * (0.951 - 0.9) / 0.9)


def test_without_baseline(tmp_path):
    study(tmp_path / "runs", {"cosine": GOOD, "manhattan": SAME})
    md, html, table = make(tmp_path / "runs")
    row = table("digits_mlp_quality")["cosine"]
    assert "no baseline" in md
    assert row["test_accuracy_change_percent"] == ""
    assert "test_accuracy_p" not in row
    assert close(row["test_accuracy_mean"], np.mean(GOOD))


def test_only_common_seeds_are_compared(tmp_path, quick):
    study(tmp_path / "runs", {"baseline": BASE, "cosine": GOOD[:3]})
    row = make(tmp_path / "runs")[2]("digits_mlp_quality")["cosine"]
    assert row["test_accuracy_pairs"] == "3"
    assert close(row["test_accuracy_change_percent"], 100 * (np.mean(GOOD[:3]) / np.mean(BASE[:3]) - 1))


def test_language(tmp_path):
    for seed in (1, 2, 3):
        write_run(tmp_path / "runs" / f"b{seed}", seed, script="train.py", dataset="text", loss=4.0 + 0.1 * seed)
        write_run(tmp_path / "runs" / f"c{seed}", seed, "cosine", script="train.py", dataset="text",
                  loss=3.5 + 0.11 * seed, kwh=0.001 + 1e-5 * seed)
    md, html, table = make(tmp_path / "runs")
    rows = table("text_gpt_quality")
    # the true loss comes first
    assert re.search(r"seeds \| validation loss \(nats\) .* perplexity .* gradient stability", md)
    assert close(rows["cosine"]["val_loss_mean"], 3.72)
    assert rows["cosine"]["val_loss_best"] == "1"
    assert close(rows["cosine"]["val_loss_change"], 3.72 - 4.2)
    assert close(rows["cosine"]["model_health_mean"], 0.1) and rows["baseline"]["model_health_mean"] == ""
    by_seed = [(4 / (4 + v) + 1 - v / math.log(100)) / 2 for v in (3.61, 3.72, 3.83)]
    assert close(rows["cosine"]["learning_quality_mean"], np.mean(by_seed))
    assert table("text_gpt_sustainability")["cosine"]["energy_kwh_best"] == "1"
    assert "Skipped: baseline: " in md and "nowhere" in md # no dataset, no nearest prototypes


def test_own_best_n_is_chosen_on_validation(tmp_path):
    # the test accuracy would choose 2, the validation accuracy chooses 4
    for distance, shift in (("baseline", 0), ("cosine", 0), ("manhattan", -0.02), ("euclidean", 0.01)):
        for seed in (1, 2):
            def at(name, distance=distance, seed=seed):
                return tmp_path / "runs" / f"{distance}_{name}_{seed}"
            write_run(at("fixed"), seed, distance, 0.90 + shift, val_accuracy=0.90)
            if distance != "baseline":
                write_run(at("n2"), seed, distance, 0.95 + 2 * shift, val_accuracy=0.91, n=2.0, source="command line")
                write_run(at("n4"), seed, distance, 0.93 - shift, val_accuracy=0.94, n=4.0, source="command line")
                write_run(at("learned"), seed, distance, 0.92, learn_n=True, end_n=2.0 + seed)
    md, html, table = make(tmp_path / "runs")
    row = table("digits_mlp_n_harmonic")["cosine"]
    assert row["own_best_n"] == "4"
    assert close(row["own_best_test_accuracy"], 0.93)
    assert row["fixed_n"] == "1"
    assert close(row["fixed_test_accuracy"], 0.90)
    assert row["learned_n"] == "1, ended at 3.5" and close(row["learned_test_accuracy"], 0.92) and row["tried"] == "3"
    # fixed: euclidean, cosine, manhattan; at n = 4 the other way round
    assert "Spearman's rho between the two is -1.00" in md
    assert {"cosine", "cosine, n=2", "cosine, n=4", "cosine, learned n"} <= set(table("digits_mlp_quality"))


def test_every_number_of_every_run_is_in_one_table(tmp_path, quick):
    study(tmp_path / "runs", {"baseline": BASE, "cosine": GOOD})
    write_run(tmp_path / "runs" / "text", script="train.py", dataset="text", loss=1 / 3)
    write_run(tmp_path / "runs" / "n4", 1, "cosine", n=4.0, source="command line")
    write_run(tmp_path / "runs" / "unfinished", 9, ended=False)
    make(tmp_path / "runs")
    with open(tmp_path / "report" / "tables" / "runs.csv", newline="", encoding="utf-8") as f:
        rows = {os.path.basename(row["path"]): row for row in csv.DictReader(f)}
    names = [f"{distance}_{seed}" for distance in ("baseline", "cosine") for seed in (1, 2, 3, 4)]
    assert set(rows) == {*names, "text", "n4"}
    for seed, accuracy in enumerate(GOOD, 1):
        row = rows[f"cosine_{seed}"]
        about = dict(dataset="digits", model="mlp", head="cosine", n_setting="fixed", n="1.0", seed=str(seed))
        assert {key: row[key] for key in about} == about
        assert float(row["test_accuracy"]) == accuracy # to the last digit
        assert float(row["f1_macro"]) == accuracy - 0.01
        assert close(row["variance_ratio"], 0.1 + 0.01 * seed) and close(row["model_health"], 0.1)
        assert close(row["energy_kwh"], 0.002) and row["perplexity"] == ""
    assert rows["baseline_1"]["n_setting"] == rows["baseline_1"]["n"] == ""
    assert rows["n4"]["head"] == "cosine, n=4" and rows["n4"]["n_setting"] == "given" and rows["n4"]["n"] == "4.0"
    assert float(rows["text"]["perplexity"]) == math.exp(1 / 3) and rows["text"]["test_accuracy"] == ""
    assert set(metrics.METRICS) <= set(rows["text"])


def test_the_label_of_a_linear_head_says_the_scale_of_its_features_unless_it_is_one():
    """It is all the temperature that this head has, also where it stands alone."""
    def labels(*scales):
        heads = [Head("baseline", "", "", "", "fixed", 0.0, 0.0, scale) for scale in scales]
        return list(results.make_labels(heads, {}).values())
    assert labels(1.0) == ["baseline"] and labels(4.0) == ["baseline (features x 4)"]
    assert labels(1.0, 4.0) == ["baseline (features x 1)", "baseline (features x 4)"]


def test_what_a_figure_leaves_out_and_which_heads_no_other_beats(tmp_path):
    runs = []
    for distance, accuracy, kwh in (("baseline", 0.90, 0.002), ("cosine", 0.92, 0.003), ("manhattan", 0.91, 0.004),
                                    ("euclidean", 0.90, 0.001), ("canberra", 0.30, 0.0005)):
        folder = write_run(tmp_path / distance, 1, distance, accuracy, kwh)
        runs.append(results.measure(results.read_run(str(folder))))
    section, = results.make_sections(results.group(runs))
    points, front, outside = comparisons.trade_off(section)
    assert {head.distance for head in front} == {"cosine", "euclidean"} # the baseline takes more energy
    assert [head.distance for head in outside] == ["canberra"]
    found = {head.distance: point for head, point in points.items()}
    expected = {"baseline": (2, 90), "cosine": (3, 92), "manhattan": (4, 91), "euclidean": (1, 90)}
    assert found == {distance: pytest.approx(point) for distance, point in expected.items()}


def diverge(folder):
    """Turn a run's folder into that of one that diverged under study.py."""
    (folder / "summary.json").unlink()
    (folder / "error.txt").write_text("exit status 1\nstep 7: loss nan, gradient norm 1.0: not finite. try less\n")


def test_a_head_that_fails_is_listed_and_not_tested(tmp_path, quick):
    heads = {"baseline": BASE, "cosine": GOOD, "manhattan": SAME, "euclidean": SAME, "hamming": (0.1, 0.1, 0.1, 0.1)}
    study(tmp_path / "runs", heads)
    diverge(tmp_path / "runs" / "euclidean_2")
    diverge(write_run(tmp_path / "runs" / "canberra_1", 1, "canberra"))
    (write_run(tmp_path / "runs" / "broken", 9, ended=False) / "error.txt").write_text("MemoryError\n")
    md, html, table = make(tmp_path / "runs")
    rows = table("digits_mlp_quality")
    failed = {head: row["failed"] for head, row in rows.items()}
    assert failed == dict(baseline="0", cosine="0", manhattan="0", euclidean="1", hamming="4", canberra="1")
    assert rows["euclidean"]["test_accuracy_p"] == rows["hamming"]["test_accuracy_p"] == ""
    p = stats.ttest_rel(GOOD, BASE).pvalue # two heads are tested: the family has two members
    assert close(rows["cosine"]["test_accuracy_p_corrected"], 2 * p)
    assert "| 3, 1 failed |" in md and "| 4, 4 failed |" in md and "| 0, 1 failed |" in md
    assert "hamming, seed 4 (it learned nothing)" in md
    assert "canberra, seed 1 (step 7: loss nan, gradient norm 1.0: not finite. try less)" in md
    assert re.search("Broken, and in no average: .*broken: MemoryError", md) and "Not ended" not in md
    with open(tmp_path / "report" / "tables" / "runs.csv", newline="", encoding="utf-8") as f:
        rows = {os.path.basename(row["path"]): row for row in csv.DictReader(f)}
    assert rows["euclidean_2"]["failed"] == "1" and rows["euclidean_2"]["test_accuracy"] == ""


def test_what_is_undecided_and_what_is_the_same_in_every_seed(tmp_path, quick):
    study(tmp_path / "runs", {"baseline": BASE, "manhattan": SAME, "cosine": [x + 0.01 for x in BASE]})
    md, html, table = make(tmp_path / "runs")
    rows = table("digits_mlp_quality")
    found, d = float(rows["manhattan"]["test_accuracy_detectable"]), np.subtract(SAME, BASE)
    critical, shift = stats.t.isf(0.025, 3), found / (d.std(ddof=1) / 2)
    assert stats.nct.sf(critical, 3, shift) == pytest.approx(0.9) # the power
    assert f"undecided: 1, of which a true difference of {100 * found:.2f} would have been found with a power" in md
    assert "the same difference in every seed, which allows no test: cosine (+1.00)" in md
    assert rows["cosine"]["test_accuracy_p"] == "" and "+1.00 in every seed" in md


def test_gradient_norms_and_the_favourites_are_drawn(tmp_path):
    heads = ("baseline", "cosine", "euclidean", "manhattan", "bray_curtis", "mahalanobis", "canberra", "minkowski")
    runs = []
    for i, distance in enumerate(heads):
        folder = write_run(tmp_path / distance, 1, distance, 0.9 + i / 100)
        runs.append(results.measure(results.read_run(str(folder))))
    section, = results.make_sections(results.group(runs))
    always = ["baseline", "euclidean", "cosine", "manhattan", "bray_curtis", "mahalanobis"]
    assert [head.distance for head in section.few(0)] == always
    assert [head.distance for head in section.few(1)] == [*always, "minkowski"]
    ax = figures.courses(section, section.few(0)).axes[0]
    assert ax.get_ylabel() == "gradient norm" and len(ax.lines) == 6
    x, y = ax.lines[0].get_data()
    assert list(y) == [1, 2, 1, 2, 1, 2] and list(x) == [0, 5, 10, 15, 20, 25]


def test_emissions_are_ranked_over_the_same_sections(tmp_path, quick):
    study(tmp_path / "runs" / "a", {"baseline": BASE[:1], "manhattan": BASE[:1]}, kwh=0.004)
    study(tmp_path / "runs" / "b", {"baseline": BASE[:1]}, dataset="other", kwh=0.01)
    study(tmp_path / "runs" / "b", {"manhattan": BASE[:1], "cosine": BASE[:1]}, dataset="other", kwh=0.012)
    read, _ = results.read_runs([str(tmp_path / "runs")])
    sections = results.make_sections(results.group([results.measure(run) for run in read]))
    changes, others = comparisons.emission_changes(sections)
    (label, _, percents), = changes # cosine is in one section only
    assert label == "manhattan" and percents == pytest.approx([0, 20]) and others == ["cosine"]


def test_the_late_slope_of_the_prototypes_is_that_of_their_logarithm(tmp_path):
    runs = []
    for seed in (1, 2, 3):
        folder = write_run(tmp_path / f"{seed}", seed)
        runs.append(results.measure(results.read_run(str(folder))))
    section, = results.make_sections(results.group(runs))
    record, = comparisons.prototype_growth(section)
    norms = np.array([1.1, 1.2, 1.3, 1.4]) # which write_run writes, and at step 0 one of 1
    slope = stats.linregress(np.log2([1, 2, 3, 4]), norms / norms.mean()).slope
    assert record["slope"] == pytest.approx(slope) and record["low"] is None # the same in every seed
    assert record["verdict"] == "undecided" and record["end_over_start"] == pytest.approx(1.4)

# -----------------------------------------------------------------------------
# what is read, and what is kept apart


def test_a_head_written_in_two_ways_is_one(tmp_path, quick):
    write_run(tmp_path / "runs" / "a", 1, "minkowski:p=3", 0.90)
    write_run(tmp_path / "runs" / "b", 2, "minkowski", 0.92, distance_params="p=3")
    write_run(tmp_path / "runs" / "c", 1, "minkowski", 0.94)
    write_run(tmp_path / "runs" / "d", 1, "canberra:weighted", 0.80)
    write_run(tmp_path / "runs" / "e", 2, "canberra", 0.82, variant="weighted")
    rows = make(tmp_path / "runs")[2]("digits_mlp_quality")
    assert set(rows) == {"minkowski, p=3", "minkowski", "canberra weighted"}
    assert close(rows["minkowski, p=3"]["test_accuracy_mean"], 0.91) and rows["minkowski, p=3"]["seeds"] == "1 2"
    assert close(rows["canberra weighted"]["test_accuracy_mean"], 0.81)


def test_what_was_read_stays_as_it_was(tmp_path, quick):
    study(tmp_path / "runs", {"baseline": BASE, "cosine": GOOD})
    files = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    read, _ = results.read_runs([str(tmp_path / "runs")])
    measured = [results.measure(run) for run in read]
    copies = copy.deepcopy((read, measured))
    sections = results.make_sections(results.group(measured))
    comparisons.records(sections)
    assert (read, measured) == copies
    assert "speed" not in measured[0].values and all("speed" in run.values for run in sections[0].runs)
    make(tmp_path / "runs")
    assert {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()} == files


def test_truncated_metrics_unfinished_and_broken_runs(tmp_path, quick):
    study(tmp_path / "runs", {"baseline": BASE[:2], "cosine": GOOD[:2]})
    with open(tmp_path / "runs" / "cosine_1" / "metrics.jsonl", "a") as f:
        f.write('{"kind": "eval", "step": 25, "epoch": 5, "val_accuracy": 0.1, "val_loss": 99.0, "variance_ratio": 77')
    write_run(tmp_path / "runs" / "cosine_3", 3, "cosine", 0.1, ended=False)
    for name, text in (("broken", '{"config": '), ("other", '{"vocab_size": 5}'), ("list", "[]")):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "config.json").write_text(text)
    md, html, table = make(tmp_path / "runs")
    rows = table("digits_mlp_interpretability")
    assert re.search(r"damaged.*cannot be read: \S*cosine_1\n", md)
    assert close(rows["cosine"]["variance_ratio_mean"], 0.1 + 0.015)
    assert re.search(r"Not ended.*cosine_3 \(last evaluation at step 20\)", md) and rows["cosine"]["seeds"] == "1 2"
    for name in ("broken", "other", "list"):
        assert re.search(rf"Skipped: .*{name}.config.json cannot be read", md)


def in_a_row(**values):
    """The first evaluation with other values."""
    def change(text):
        first, *others = [line for line in text.splitlines(keepends=True) if '"eval"' in line]
        return json.dumps({**json.loads(first), **values}) + "\n" + "".join(others)
    return change


def in_the_file(**values):
    return lambda text: json.dumps({**json.loads(text), **values})


@pytest.mark.parametrize("name, change, said", [
    ("config.json", lambda text: text[:100], "Skipped: .*config.json cannot be read .JSONDecodeError"),
    ("config.json", in_the_file(n="three"), "Skipped: .*config.json cannot be read .ValueError: n is 'three'"),
    ("config.json", in_the_file(command=[]), r"Skipped: .*command is \[\], expected a text"),
    ("config.json", in_the_file(versions={}), "Skipped: .*config.json cannot be read .KeyError: 'torch'"),
    ("metrics.jsonl", lambda text: text.replace("{", "[", 1), "metrics.jsonl is damaged, and used without .*: .*bad"),
    ("metrics.jsonl", lambda text: "3\n" + text, "metrics.jsonl is damaged, and used without .*: .*bad"),
    ("metrics.jsonl", in_a_row(val_accuracy=None), "metrics.jsonl is damaged, and used without .*: .*bad"),
    ("metrics.jsonl", in_a_row(seconds_total=99.0), "Skipped: .*bad has numbers that make no sense .*ascending order"),
    ("summary.json", lambda text: text[:50], "bad/summary.json cannot be read .JSONDecodeError"),
    ("summary.json", in_the_file(energy_kwh_total=10 ** 400), "Skipped: .*bad has numbers that make no sense"),
    ("summary.json", lambda text: '{"energy_kwh_total": 1}', "Skipped: .*bad has numbers .*KeyError: 'test_accuracy'"),
    ("emissions.csv", lambda text: text.replace("400.0", "4oo.0"), "bad/emissions.csv cannot be read .*'4oo.0'"),
    ("emissions.csv", lambda text: text.replace("g_per_kwh", "g"), "bad/emissions.csv cannot be read .KeyError"),
    ("probe.npz", lambda text: text[:99], "no figure of hidden states: .*bad/probe.npz cannot be read"),
])
def test_a_damaged_file_is_named_and_the_other_runs_are_reported(tmp_path, quick, name, change, said):
    study(tmp_path / "runs", {"baseline": BASE[:2], "cosine": GOOD[:2]})
    expected = make(tmp_path / "runs")[2]("digits_mlp_quality")["cosine"]["test_accuracy_mean"]
    bad = write_run(tmp_path / "runs" / "bad", 1, "euclidean", 0.5) / name
    bad.write_text(change(bad.read_text(errors="replace")))
    md, html, table = make(tmp_path / "runs")
    assert re.search(said, md) and table("digits_mlp_quality")["cosine"]["test_accuracy_mean"] == expected


def test_where_no_run_can_be_used_each_is_named(tmp_path):
    write_run(tmp_path / "runs" / "a")
    (tmp_path / "runs" / "a" / "summary.json").write_text('{"energy_kwh_total": 1}')
    with pytest.raises(SystemExit, match="none has ended.*\n  - skipped .*a has numbers that make no sense"):
        report.main([str(tmp_path / "runs")])


@pytest.mark.parametrize("name, reason", [
    ("", "which is no folder"), ("tables/runs.csv.tmp", "No space left"), ("index.html.tmp", "No space left")])
def test_a_report_that_cannot_be_written_is_one_line(tmp_path, quick, name, reason):
    write_run(tmp_path / "runs" / "a")
    if name:
        (tmp_path / "report" / name).parent.mkdir(parents=True)
        (tmp_path / "report" / name).symlink_to("/dev/full")
    else:
        (tmp_path / "report").write_text("no folder")
    with pytest.raises(SystemExit, match=reason) as e:
        make(tmp_path / "runs")
    assert isinstance(e.value.code, str) and e.value.code.splitlines()[-1].count(str(tmp_path / "report"))


@pytest.mark.parametrize("key, change", [
    ("data hash", dict(data="d2")), ("learning_rate", dict(learning_rate=0.5)), ("git", dict(git="def"))])
def test_what_differs_is_split_and_said_at_the_top(tmp_path, quick, key, change):
    study(tmp_path / "runs" / "a", {"baseline": BASE[:2], "cosine": GOOD[:2]})
    study(tmp_path / "runs" / "b", {"baseline": SAME[:2], "cosine": BASE[:2]}, **change)
    md, html, table = make(tmp_path / "runs")
    top = md[:md.index("## digits")]
    assert f"differ in {key}," in top and all(str(value) in top for value in change.values())
    assert set("".join("".join(list(row.values())[1:]) for row in table("wins").values())) <= set("0123456789")
    assert close(table("digits_mlp_1_quality")["cosine"]["test_accuracy_mean"], np.mean(GOOD[:2]))
    assert close(table("digits_mlp_2_quality")["cosine"]["test_accuracy_mean"], np.mean(BASE[:2]))
    assert table("wins")["cosine"]["quality sections"] == "2"
    assert table("wins")["cosine"]["quality wins"] == "2" and table("wins")["baseline"]["quality wins"] == "1" # a tie
    assert table("wins")["cosine"]["PC2 EV wins"] == table("wins")["baseline"]["PC2 EV wins"] == "2"
    assert table("wins")["baseline"]["energy top 5"] == "2"


def test_folders_seeds_and_names_do_not_split(tmp_path, quick):
    write_run(tmp_path / "runs" / "x", 1, accuracy=0.9, wandb_run_name="one", plots=True)
    write_run(tmp_path / "runs" / "y" / "z", 2, accuracy=0.8, wandb_run_name="two", plots=False)
    write_run(tmp_path / "runs" / "z", 2, accuracy=0.1)
    md, html, table = make(tmp_path / "runs")
    assert close(table("digits_mlp_quality")["baseline"]["test_accuracy_mean"], 0.85)
    assert re.search(r"z repeats \S*y/z, same head and seed: left out", md.replace("\\", "/"))

# -----------------------------------------------------------------------------
# the page


def test_the_page_stands_alone_and_figures_show_something(tmp_path):
    study(tmp_path / "runs" / "a", {"baseline": BASE[:2], "cosine": GOOD[:2], "euclidean": SAME[:2]})
    study(tmp_path / "runs" / "b", {"baseline": BASE[:2], "cosine": GOOD[:2], "euclidean": SAME[:2]},
          dataset='a|<b>&"$x')
    md, html, table = make(tmp_path / "runs")
    bare = re.sub('src="data:image/svg[+]xml;base64,[^"]*"', "", html)
    # nothing is fetched
    assert not any(text in bare for text in ("src=", "href", "<link", "<script ", "@import", "url(", "//", "fetch"))
    assert "a|&lt;b&gt;&amp;&quot;$x" in html and '<b>&"' not in html and "a|<b>" not in md
    figures = sorted((tmp_path / "report" / "figures").iterdir())
    drawn = [path for path in figures if path.suffix == ".svg"]
    assert html.count('src="data:image/svg+xml;base64,') == len(drawn) >= 15
    assert {"emissions_all.svg", "curves_all.svg", "interpretability_all.svg"} <= {path.name for path in drawn}
    assert [path.with_suffix(".pdf") for path in drawn] == [path for path in figures if path.suffix == ".pdf"]
    for path in drawn:
        shapes = {shape.get("d") for shape in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}path")}
        assert len(shapes) > 20 and path.with_suffix(".pdf").read_bytes().startswith(b"%PDF"), path
        assert f"(figures/{path.name})" in md


def test_the_same_runs_have_the_same_report(tmp_path, quick):
    study(tmp_path / "runs", {"baseline": BASE[:2], "cosine": GOOD[:2]})
    assert make(tmp_path / "runs")[:2] == make(tmp_path / "runs")[:2]
    drawn = []
    for _ in range(2):
        fig, ax = figures.new_figure(3, 2)
        ax.plot([1, 2], label="a line")
        ax.scatter([1, 2], [1, 2], rasterized=True)
        drawn.append(figures.vector(fig))
    (svg, pdf), again = drawn
    assert [svg, pdf] == again and b"<dc:date>" not in svg and b"CreationDate" not in pdf


def test_every_number_of_a_table_is_defined_in_words(tmp_path, quick):
    study(tmp_path / "runs" / "a", {"baseline": BASE[:2]})
    write_run(tmp_path / "runs" / "text", script="train.py", dataset="text")
    md, html, table = make(tmp_path / "runs")
    rows = table("definitions")
    for family in metrics.TABLES.values():
        for keys in family.values():
            for key in keys:
                m = metrics.METRICS[key]
                assert rows[m.title]["definition"] == m.definition and m.definition.endswith(".")
                assert rows[m.title]["better"] == ("lower" if m.lower else "higher")
    assert "not available to us" in rows["active ratio"]["definition"]
    assert metrics.PAIRED_TEST.replace("<", "&lt;") in md


def test_markdown_and_html_say_the_same(tmp_path):
    blocks = [page.Heading("A < b", 1), page.Paragraph("One & two."), page.Pre("x < y", "folded"),
              page.Table("t", ["head", "a|b"], [["one", page.Cell("1", "small", True)]], [dict(head="one", a=1 / 3)]),
              page.Picture("p", b"SVG", b"PDF", "What it shows.")]
    page.write_page(tmp_path, "A < b", blocks)
    md = (tmp_path / "index.md").read_text()
    assert md == ("# A &lt; b\n\nOne & two.\n\nfolded\n\n```\nx < y\n```\n\n| head | a\\|b |\n| --- | --- |\n"
                  "| one | **1 small** |\n\n![p](figures/p.svg)\n\n*What it shows.*\n")
    html = (tmp_path / "index.html").read_text()
    for text in ("<title>A &lt; b</title>", "<h1>A &lt; b</h1>", "<p>One &amp; two.</p>", "<pre>x &lt; y</pre>",
                 "<summary>folded</summary>", "<th>a|b</th>", "<td><b>1</b><br><small>small</small></td>",
                 'src="data:image/svg+xml;base64,U1ZH"', "<figcaption>What it shows.</figcaption>"):
        assert text in html
    assert (tmp_path / "tables" / "t.csv").read_text() == f"head,a\none,{1 / 3}\n"
    assert (tmp_path / "figures" / "p.svg").read_bytes() == b"SVG"
    assert (tmp_path / "figures" / "p.pdf").read_bytes() == b"PDF"


def test_tables_in_latex(tmp_path):
    rows = [["a_b <50%>", page.Cell("1.0 ± 0.1", "[+2]", True), "long, and longer, " * 4], ["$x^2$", "", "short"]]
    blocks = [page.Table("t", ["head", "p | q", "says"], rows), page.Table("none", ["a", "b"], [])]
    page.write_page(tmp_path, "T", blocks)
    tex = (tmp_path / "tables" / "t.tex").read_text()
    assert tex.splitlines() == [
        r"\begin{tabular}{lrp{6cm}}", r"\hline", r"head & p \textbar{} q & says \\", r"\hline",
        r"a\_b \textless{}50\%\textgreater{} & \textbf{1.0 $\pm$ 0.1 {[}+2{]}} & " + ("long, and longer, " * 4).strip()
        + r" \\", r"\$x\textasciicircum{}2\$ &  & short \\", r"\hline", r"\end{tabular}"]
    if not shutil.which("pdflatex"):
        pytest.skip("no pdflatex to set them with")
    (tmp_path / "paper.tex").write_text("\\documentclass{article}\n\\begin{document}\n\\input{tables/t}\n"
                                        "\\input{tables/none}\n\\end{document}\n")
    done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "paper"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]


CLICKS = """<script>
const button = document.querySelectorAll("th button")[COLUMN], seen = []
for (let i = 0; i < 2; i++) {
  button.click()
  const order = [...document.querySelectorAll("tbody tr")].map(row => row.cells[0].innerText).join(" ")
  seen.push(button.parentElement.getAttribute("aria-sort") + " " + order)
}
document.title = seen.join("; ")
</script></body>"""


@pytest.mark.parametrize("column, upwards, downwards", [(0, "a b c d", "d c b a"), (1, "b d a c", "a d b c"),
                                                        (2, "a c b d", "b a c d")])
def test_a_click_sorts_a_table(tmp_path, column, upwards, downwards):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no chromium")
    rows = [["d", page.Cell("2.5 ± 9", "-1%"), ""], ["a", "1,000", "beta"], ["b", "-3e-2", "gamma"], ["c", "", "beta"]]
    page.write_page(tmp_path, "T", [page.Table("t", ["head", "number", "words"], rows)])
    html = (tmp_path / "index.html").read_text().replace("</body>", CLICKS.replace("COLUMN", str(column)))
    (tmp_path / "clicks.html").write_text(html)
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
               "--dump-dom", str(tmp_path / "clicks.html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search("<title>(.*)</title>", done.stdout)[1]
    assert title == f"ascending {upwards}; descending {downwards}"


def test_commands_are_loops_over_seeds(tmp_path, quick):
    study(tmp_path / "runs", {"baseline": BASE[:3]})
    md = make(tmp_path / "runs")[0]
    line = f"python train_vision.py --distance=baseline --seed=$seed --out_dir={tmp_path / 'runs' / 'baseline_'}$seed"
    assert f"for seed in 1 2 3; do {line}; done" in md


def test_bad_input_is_one_message(tmp_path):
    for args, message in ((["--top=3"], "no folder given"), ([str(tmp_path / "none")], "there is no folder"),
                          ([str(tmp_path)], "no runs below"), ([str(tmp_path), "--tpo=3"], "unknown key 'tpo'")):
        with pytest.raises(SystemExit, match=message):
            report.main(args)
    write_run(tmp_path / "runs" / "a", ended=False)
    with pytest.raises(SystemExit, match="none has ended"):
        report.main([str(tmp_path / "runs"), f'--out_dir={tmp_path / "report"}'])
    assert not (tmp_path / "report").exists()


def test_help_lists_the_settings(capsys):
    with pytest.raises(SystemExit) as e:
        report.main(["--help"])
    printed = capsys.readouterr().out
    assert e.value.code == 0
    assert "python report.py" in printed
    assert 'out_dir = "report"' in printed
    assert "tokens = " in printed
