"""
report.py on run folders with known numbers, which are written here: what is averaged, what is tested, what is marked, and what is said.

$ pytest tests/test_report.py
"""
import csv
import json
import math
import re
import statistics

import matplotlib.image
import numpy as np
import pytest
from scipy import stats

import report

BASE, GOOD, SAME = (0.900, 0.920, 0.911, 0.905), (0.951, 0.969, 0.962, 0.953), (0.905, 0.915, 0.912, 0.903) # test accuracy by seed


def write_run(folder, seed=1, distance="baseline", accuracy=0.9, kwh=0.002, val_accuracy=None, ended=True, train=(), n=1.0, source="default", git="abc", data="d1",
              dataset="digits", script="train_vision.py", loss=5.0, end_n=None, **config):
    """A run folder of train_vision.py, or train.py: five evaluations, whose error halves, and six log lines"""
    folder.mkdir(parents=True)
    vision, val_accuracy = script == "train_vision.py", accuracy if val_accuracy is None else val_accuracy
    config = dict(dict(dataset=dataset, model="mlp" if vision else "gpt", distance=distance, variant="", distance_params="", link="harmonic", n=n, learn_n=False, eps=1e-4,
                       feature_scale=1.0, seed=seed, out_dir=str(folder), data_dir="nowhere", grad_clip=1.0, warmup_iters=2, learning_rate=1e-3), **config)
    info = dict(config=config, sources={**dict.fromkeys(config, "default"), "n": source}, script=script, n=n, git=git, dtype="float32", device="cpu", device_name="a CPU",
                cpus=2, threads=1, world_size=1, versions=dict(python="3", torch="2.9", cuda=None, numpy="2"), data=dict(num_classes=10, hash=data),
                model_args=dict(vocab_size=100), command=f"{script} --distance={distance} --seed={seed} --out_dir={folder}")
    (folder / "config.json").write_text(json.dumps(info))
    rng = np.random.default_rng(seed)
    rows, lines = [], [dict(kind="train", step=5 * i, epoch=i, loss=1.0, grad_norm=1.0 + i % 2, ms=20.0) for i in range(6)]
    for i in range(5):
        quality = dict(val_accuracy=val_accuracy - 0.8 * 2.0 ** -(i * 2) * (i < 4), val_loss=loss + 4 * 2.0 ** -i * (i < 4))
        rows.append(dict(kind="eval", step=5 * i, epoch=i, **quality, n=n, prototype_norm=1.0 + 0.1 * i, effective_rank=10.0 - i,
                         collapse_score=0.5 + (distance == "baseline") / 10, variance_ratio=0.5 - 0.1 * i + 0.01 * seed, active_ratio=1 - 0.1 * i, pca5=0.8,
                         seconds_total=10.0 * i, energy_kwh_total=kwh * i / 4, emissions_g_total=400 * kwh * i / 4))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sorted(lines + rows, key=lambda row: row["step"])))
    header = "step,g_per_kwh,cpu_source,gpu_source,ram_source,energy_kwh_total\n"
    (folder / "emissions.csv").write_text(header + f"20,400.0,modelled,none,modelled,{kwh}\n")
    y = np.arange(60) % 6
    np.savez(folder / "probe.npz", h=rng.normal(size=(60, 8)) + 3 * np.eye(8)[y], y=y)
    if ended:
        result = dict(test_accuracy=accuracy, f1_macro=accuracy - 0.01, test_loss=1 - accuracy, val_accuracy=val_accuracy, pc2_ev=0.5, pca90=50, pca90_uncapped=60,
                      prototype_alignment=1.0, seconds_per_epoch=2.0, confusion=[[1]]) if vision else dict(val_loss=loss, perplexity=math.exp(loss), best_val_loss=loss)
        (folder / "summary.json").write_text(json.dumps(dict(step=20, n=end_n or n, energy_kwh_total=kwh, emissions_g_total=400 * kwh, **result)))
    return folder


def study(folder, heads, **shared):
    """{distance: accuracies by seed}"""
    for distance, values in heads.items():
        for seed, accuracy in enumerate(values, 1):
            write_run(folder / f"{distance}_{seed}", seed, distance, accuracy, **shared)


def make(folder, *args):
    """The report of the runs in folder: (index.md, index.html, a function from a table's name to its rows by head)"""
    report.main([str(folder), f'--out_dir={folder.parent / "report"}', "--dpi=40", *args])
    out = folder.parent / "report"

    def table(name):
        with open(out / "tables" / f"{name}.csv", newline="", encoding="utf-8") as f:
            return {next(iter(row.values())): row for row in csv.DictReader(f)}
    return (out / "index.md").read_text(encoding="utf-8"), (out / "index.html").read_text(encoding="utf-8"), table


@pytest.fixture
def quick(monkeypatch):
    """no figures, for what is not about them"""
    for name in ("radar", "curves", "pareto", "efficiency", "geometry", "states"):
        monkeypatch.setattr(report, name, lambda page, section: None)
    monkeypatch.setattr(report, "emission_bars", lambda page, section: {})


def close(text, value):
    return float(text) == pytest.approx(value, rel=1e-9)

# -----------------------------------------------------------------------------
# numbers


def test_means_percentages_and_tests_by_hand(tmp_path, quick):
    study(tmp_path / "runs", {"baseline": BASE, "cosine": GOOD, "manhattan": SAME})
    md, html, table = make(tmp_path / "runs")
    rows = table("digits_mlp_quality")
    p = {}
    for head, values in (("cosine", GOOD), ("manhattan", SAME)):
        row, d = rows[head], np.subtract(values, BASE)
        assert close(row["test_accuracy_mean"], np.mean(values)) and close(row["test_accuracy_std"], statistics.stdev(values))
        assert close(row["test_accuracy_change_percent"], 100 * (np.mean(values) - np.mean(BASE)) / np.mean(BASE))
        t = d.mean() / (d.std(ddof=1) / 2)
        p[head] = 2 * stats.t.sf(abs(t), 3)
        assert close(row["test_accuracy_p"], p[head]) and close(row["test_accuracy_effect_size"], t / 2) and close(row["test_accuracy_difference"], d.mean())
        assert row["seeds"] == "1 2 3 4" and row["test_accuracy_pairs"] == "4"
        assert close(row["test_loss_change_percent"], 100 * (np.mean(values) - np.mean(BASE)) / (1 - np.mean(BASE))) # lower is better: positive where it fell
    assert p["cosine"] < p["manhattan"] # of Benjamini and Hochberg: the least of two is doubled
    assert close(rows["cosine"]["test_accuracy_p_corrected"], 2 * p["cosine"]) and close(rows["manhattan"]["test_accuracy_p_corrected"], p["manhattan"])
    assert rows["baseline"]["test_accuracy_change_percent"] == rows["baseline"]["test_accuracy_p"] == ""
    # after the first epoch: grad norms 2, 1, 2, 1, 2
    assert close(rows["cosine"]["gradient_stability_mean"], 1 / (1 + np.std([2, 1, 2, 1, 2]) / 1.6)) and close(rows["cosine"]["clipping_quality_mean"], 0.7)
    energy = table("digits_mlp_sustainability")["cosine"]
    assert close(energy["energy_kwh_mean"], 0.002) and energy["energy_kwh_p"] == "" and close(energy["emissions_g_mean"], 0.8)
    assert close(energy["quality_per_wh_mean"], 100 * (np.mean(GOOD) - 0.1) / 2)
    assert close(energy["seconds_to_90_mean"], 20) and close(energy["wh_to_90_mean"], 1.0) # errors less their end: 0.8, 0.2, 0.05, ...
    assert close(energy["speed_mean"], 0) and "at 400 g/kWh" in md


def test_only_a_supported_best_is_marked(tmp_path, quick):
    study(tmp_path / "a" / "runs", {"baseline": BASE, "cosine": GOOD, "manhattan": SAME})
    md, html, table = make(tmp_path / "a" / "runs")
    assert {head: row["test_accuracy_best"] for head, row in table("digits_mlp_quality").items()} == {"baseline": "0", "cosine": "1", "manhattan": "0"}
    assert "<b>95.88 ± 0.83</b>" in html and html.count("<b>") == 1 and "**95.88 ± 0.83" in md and "cosine (p = " in md
    study(tmp_path / "b" / "runs", {"baseline": BASE, "manhattan": SAME}) # a better mean, by chance
    md, html, table = make(tmp_path / "b" / "runs")
    assert "<b>" not in html and "No value is marked" in md
    study(tmp_path / "c" / "runs", {"baseline": GOOD, "manhattan": SAME, "cosine": BASE}) # the baseline itself is the best
    md, html, table = make(tmp_path / "c" / "runs")
    assert "<b>" not in html and "better than the baseline with corrected p < 0.05: none; worse: " in md.replace("&lt;", "<")


def test_one_seed_has_no_test(tmp_path, quick):
    study(tmp_path / "runs", {"baseline": BASE[:1], "cosine": GOOD[:1]})
    md, html, table = make(tmp_path / "runs")
    row = table("digits_mlp_quality")["cosine"]
    assert "One seed" in md and "no test" in md and "<b>" not in html
    assert row["test_accuracy_p"] == row["test_accuracy_std"] == row["test_accuracy_p_corrected"] == "" and close(row["test_accuracy_change_percent"], 100 * (0.951 - 0.9) / 0.9)


def test_without_baseline(tmp_path):
    study(tmp_path / "runs", {"cosine": GOOD, "manhattan": SAME})
    md, html, table = make(tmp_path / "runs")
    row = table("digits_mlp_quality")["cosine"]
    assert "no baseline" in md and row["test_accuracy_change_percent"] == "" and "test_accuracy_p" not in row and close(row["test_accuracy_mean"], np.mean(GOOD))


def test_only_common_seeds_are_compared(tmp_path, quick):
    study(tmp_path / "runs", {"baseline": BASE, "cosine": GOOD[:3]})
    row = make(tmp_path / "runs")[2]("digits_mlp_quality")["cosine"]
    assert row["test_accuracy_pairs"] == "3" and close(row["test_accuracy_change_percent"], 100 * (np.mean(GOOD[:3]) / np.mean(BASE[:3]) - 1))


def test_language(tmp_path):
    for seed in (1, 2, 3):
        write_run(tmp_path / "runs" / f"b{seed}", seed, script="train.py", dataset="text", loss=4.0 + 0.1 * seed)
        write_run(tmp_path / "runs" / f"c{seed}", seed, "cosine", script="train.py", dataset="text", loss=3.5 + 0.11 * seed, kwh=0.001 + 1e-5 * seed)
    md, html, table = make(tmp_path / "runs")
    rows = table("text_gpt_quality")
    assert re.search(r"seeds \| validation loss \(nats\) .* perplexity .* gradient stability", md) # the true loss comes first
    assert close(rows["cosine"]["val_loss_mean"], 3.72) and rows["cosine"]["val_loss_best"] == "1" and float(rows["cosine"]["val_loss_change_percent"]) > 0
    assert close(rows["cosine"]["model_health_mean"], 0.1) and rows["baseline"]["model_health_mean"] == ""
    assert close(rows["cosine"]["learning_quality_mean"], np.mean([(4 / (4 + v) + 1 - v / math.log(100)) / 2 for v in (3.61, 3.72, 3.83)]))
    assert table("text_gpt_sustainability")["cosine"]["energy_kwh_best"] == "1"
    assert "Skipped: baseline: " in md and "nowhere" in md # no dataset, no nearest prototypes


def test_own_best_n_is_chosen_on_validation(tmp_path):
    # the test accuracy would choose 2, the validation accuracy chooses 4
    for distance, shift in (("baseline", 0), ("cosine", 0), ("manhattan", -0.02), ("euclidean", 0.01)):
        for seed in (1, 2):
            at = lambda name, distance=distance, seed=seed: tmp_path / "runs" / f"{distance}_{name}_{seed}"
            write_run(at("fixed"), seed, distance, 0.90 + shift, val_accuracy=0.90)
            if distance != "baseline":
                write_run(at("n2"), seed, distance, 0.95 + 2 * shift, val_accuracy=0.91, n=2.0, source="command line")
                write_run(at("n4"), seed, distance, 0.93 - shift, val_accuracy=0.94, n=4.0, source="command line")
                write_run(at("learned"), seed, distance, 0.92, learn_n=True, end_n=2.0 + seed)
    md, html, table = make(tmp_path / "runs")
    row = table("digits_mlp_n_harmonic")["cosine"]
    assert row["own_best_n"] == "4" and close(row["own_best_test_accuracy"], 0.93) and row["fixed_n"] == "1" and close(row["fixed_test_accuracy"], 0.90)
    assert row["learned_n"] == "1, ended at 3.5" and close(row["learned_test_accuracy"], 0.92) and row["tried"] == "3"
    assert "Spearman's rho between the two is -1.00" in md # fixed: euclidean, cosine, manhattan; at n = 4 the other way round
    assert {"cosine", "cosine, n=2", "cosine, n=4", "cosine, learned n"} <= set(table("digits_mlp_quality"))

# -----------------------------------------------------------------------------
# what is read, and what is kept apart


def test_truncated_metrics_unfinished_and_broken_runs(tmp_path, quick):
    study(tmp_path / "runs", {"baseline": BASE[:2], "cosine": GOOD[:2]})
    with open(tmp_path / "runs" / "cosine_1" / "metrics.jsonl", "a") as f:
        f.write('{"kind": "eval", "step": 25, "epoch": 5, "val_accuracy": 0.1, "val_loss": 99.0, "variance_ratio": 77.0')
    write_run(tmp_path / "runs" / "cosine_3", 3, "cosine", 0.1, ended=False)
    for name, text in (("broken", '{"config": '), ("other", '{"vocab_size": 5}'), ("list", "[]")):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "config.json").write_text(text)
    md, html, table = make(tmp_path / "runs")
    rows = table("digits_mlp_interpretability")
    assert re.search(r"truncated.*last whole line: \S*cosine_1\n", md) and close(rows["cosine"]["variance_ratio_mean"], 0.1 + 0.015)
    assert re.search(r"Not ended.*cosine_3 \(last evaluation at step 20\)", md) and rows["cosine"]["seeds"] == "1 2"
    assert all(re.search(rf"Skipped: .*{name}: config.json is not that of a run", md) for name in ("broken", "other", "list"))


@pytest.mark.parametrize("key, change", [("data hash", dict(data="d2")), ("learning_rate", dict(learning_rate=0.5)), ("git", dict(git="def"))])
def test_what_differs_is_split_and_said_at_the_top(tmp_path, quick, key, change):
    study(tmp_path / "runs" / "a", {"baseline": BASE[:2], "cosine": GOOD[:2]})
    study(tmp_path / "runs" / "b", {"baseline": SAME[:2], "cosine": BASE[:2]}, **change)
    md, html, table = make(tmp_path / "runs")
    top = md[:md.index("## digits")]
    assert f"differ in {key}," in top and all(str(value) in top for value in change.values())
    assert set("".join("".join(list(row.values())[1:]) for row in table("wins").values())) <= set("0123456789")
    assert close(table("digits_mlp_1_quality")["cosine"]["test_accuracy_mean"], np.mean(GOOD[:2]))
    assert close(table("digits_mlp_2_quality")["cosine"]["test_accuracy_mean"], np.mean(BASE[:2]))
    assert table("wins")["cosine"]["quality sections"] == "2" and table("wins")["cosine"]["quality wins"] == "1" and table("wins")["baseline"]["energy top 5"] == "2"


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
    study(tmp_path / "runs" / "b", {"baseline": BASE[:2], "cosine": GOOD[:2], "euclidean": SAME[:2]}, dataset='a|<b>&"$x')
    md, html, table = make(tmp_path / "runs")
    bare = re.sub('src="data:image/png;base64,[^"]*"', "", html)
    assert not any(text in bare for text in ("src=", "href", "<link", "<script", "@import", "url(", "//")) # nothing is fetched
    assert "a|&lt;b&gt;&amp;&quot;$x" in html and '<b>&"' not in html and "a|<b>" not in md
    figures = list((tmp_path / "report" / "figures").iterdir())
    assert html.count('src="data:image/png;base64,') == len(figures) >= 15 and "emissions_all.png" in {f.name for f in figures}
    for path in figures:
        picture = matplotlib.image.imread(path)
        assert picture.std() > 0.01 and len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 20, path
        assert f"(figures/{path.name})" in md


def test_commands_are_loops_over_seeds(tmp_path, quick):
    study(tmp_path / "runs", {"baseline": BASE[:3]})
    md = make(tmp_path / "runs")[0]
    assert f"for seed in 1 2 3; do python train_vision.py --distance=baseline --seed=$seed --out_dir={tmp_path / 'runs' / 'baseline_'}$seed; done" in md


def test_bad_input_is_one_message(tmp_path):
    for args, message in ((["--dpi=50"], "no folder given"), ([str(tmp_path / "none")], "there is no folder"), ([str(tmp_path)], "no runs below"),
                          ([str(tmp_path), "--tpo=3"], "unknown key 'tpo'")):
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
    assert e.value.code == 0 and "python report.py" in printed and 'out_dir = "report"' in printed and "tokens = " in printed
