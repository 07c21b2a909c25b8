"""
report.py on studies of claims with made-up runs: what it says of the verdicts, and that it has a figure and a table of
whatever there is, before and after confirmation.

$ pytest tests/test_report_claims.py
"""
import csv
import itertools
import math
import os
import re
import shutil
import statistics
import tomllib
from xml.etree import ElementTree

import numpy as np
import pytest
from test_report import write_run

import figures
import report
import report_claims
import report_figures
import verdicts
from page import write_csv

HEADS = {"linear": ("--distance=baseline", 4.50), "linear_bias": ("--distance=baseline --head_bias=true", 4.495),
         "cosine": ("--distance=cosine", 4.45), "normface": ("--distance=cosine --link=softmin --learn_n=true", 4.46),
         "euclidean": ("--distance=euclidean", 4.60), "manhattan": ("--distance=manhattan", math.inf)}
DESIGN = """
confidence = 0.95
power = 0.9
[heads]
linear = { flags = "--distance=baseline", scale = "feature_scale" }
linear_bias = { flags = "--distance=baseline --head_bias=true", like = "linear" }
cosine = { flags = "--distance=cosine", scale = "n" }
normface = { flags = "--distance=cosine --link=softmin --learn_n=true", scale = "n" }
euclidean = { flags = "--distance=euclidean", scale = "n" }
manhattan = { flags = "--distance=manhattan", scale = "n" }
[settings.gpt]
title = "GPT on <text>"
script = "train.py"
tuned_by = "val_loss"
quality = "test_loss"
lower = true
seed = 1001
looks = [6, 12]
failed = 6.9
[settings.cnn]
script = "train_vision.py"
tuned_by = "val_loss"
quality = "test_accuracy"
lower = false
seed = 1001
looks = [6, 12]
failed = 0.1
"""
CLAIM = """
[[claims]]
name = "{name}"
says = "{says}"
setting = "{setting}"
contrast = {{ {contrast} }}
effect = {effect}
primary = {primary}
{more}
"""
CLAIMS = [
    dict(name="cosine beats linear", says="Cosine is better than the linear head (section 4).", setting="gpt",
         contrast="cosine = 1, linear = -1", effect=-0.02, primary="true", more=""),
    dict(name="euclid beats linear", says="Euclid is better than the linear head.", setting="gpt",
         contrast="euclidean = 1, linear = -1", effect=-0.02, primary="true", more=""),
    dict(name="a bias does nothing", says="A bias changes nothing.", setting="gpt",
         contrast="linear_bias = 1, linear = -1", effect=0.02, primary="true", more="equal = true"),
    dict(name="manhattan beats linear", says="Manhattan is better than the linear head.", setting="cnn",
         contrast="manhattan = 1, linear = -1", effect=0.01, primary="true", more=""),
    dict(name="cosine takes less energy", says="Cosine takes less energy.", setting="gpt", effect=-0.05,
         contrast="cosine = 1, linear = -1", primary="false", more='log = true\nmetric = "energy_kwh"'),
]


def made_up_rows(seeds, settings=("gpt", "cnn"), heads=HEADS):
    """Rows of runs.csv: of tuning, one of whose runs failed, and of confirmation with so many seeds."""
    rng, rows = np.random.default_rng(0), []
    for setting in settings:
        for head in heads:
            loss = HEADS[head][1]
            about = dict(setting=setting, head=head, status="ended", git="abc", folder="somewhere")
            scale = "feature_scale" if head == "linear" else "n"
            points = list(itertools.product((1e-3, 3e-3, 1e-2), (11.3, 22.6, 45)))
            if head == "linear_bias": # is like another one
                points = []
            for rung, tried in ((1, points), (2, points[3:6])):
                for rate, x in tried:
                    row = dict(about, stage="tune", rung=rung, seed=1001, learning_rate=rate, chosen=False,
                               val_loss=4.9 - 0.2 * rung + abs(math.log(rate / 3e-3)) / 5 + abs(math.log(x / 22.6)) / 4)
                    row[scale] = x
                    row["chosen"] = rung == 2 and x == 22.6
                    rows.append(row)
            for seed in range(1, seeds + 1):
                row = dict(about, stage="confirm", seed=seed, learning_rate=3e-3, chosen=False)
                if math.isinf(loss) and seed < 3:
                    rows.append(row | dict(status="failed"))
                    continue
                quality, better = min(loss, 4.5) + 0.01 * rng.normal(), 4.5 - min(loss, 4.5)
                energy = 0.001 * (1 + 0.1 * (head == "cosine") + 0.02 * rng.random())
                row |= dict(energy_kwh=energy, pca5=rng.random(), pc2_ev=rng.random(), seconds_per_step=0.1)
                row["test_loss"] = quality + max(0, loss - 4.5) if math.isfinite(loss) else quality
                row["test_accuracy"] = 0.98 + better / 10 + 0.001 * rng.normal()
                rows.append(row)
    for row in rows:
        if row["stage"] == "tune" and (row["head"], row["rung"]) == ("cosine", 1) and row["learning_rate"] == 1e-2:
            row |= dict(status="failed", val_loss="")
    return rows


@pytest.fixture
def quick(monkeypatch):
    """Figures are drawn, but not written."""
    monkeypatch.setattr(figures, "vector", lambda fig: (b"SVG", b"PDF"))


def make(folder, rows, claims=CLAIMS, *more):
    """The report of a study with these rows: (index.md, index.html, a function from a table's name to its rows)."""
    folder.mkdir(exist_ok=True)
    (folder / "claims.toml").write_text(DESIGN + "".join(CLAIM.format(**claim) for claim in claims))
    write_csv(folder / "runs.csv", rows)
    out = folder.parent / "report"
    report.main([str(folder), *map(str, more), f"--out_dir={out}"])

    def table(name):
        with open(out / "tables" / f"{name}.csv", newline="", encoding="utf-8") as f:
            return list(csv.DictReader(f))
    return (out / "index.md").read_text(encoding="utf-8"), (out / "index.html").read_text(encoding="utf-8"), table


def test_the_verdicts_open_the_report(tmp_path, monkeypatch):
    for distance in ("baseline", "cosine"):
        write_run(tmp_path / "runs" / distance, distance=distance)
    write_run(tmp_path / "claims" / "gpt" / "confirm" / "cosine" / "s1", dataset="in the table already")
    rows = made_up_rows(6)
    monkeypatch.setattr(report_figures, "figure_blocks", lambda section, few: [])
    md, html, table = make(tmp_path / "claims", rows, CLAIMS, tmp_path / "runs")
    design = tomllib.loads((tmp_path / "claims" / "claims.toml").read_text())
    judged = {result["name"]: result for result in verdicts.judge(design, rows)}
    assert [judged[claim["name"]]["verdict"] for claim in CLAIMS] == [
        "supported", "refuted", "supported", "inconclusive", "refuted"]
    assert md.index("## Claims") < md.index("2 runs that have ended")
    assert "5 claims: 2 supported, 2 refuted, 1 inconclusive." in md
    for row in [*table("claims"), *table("claims_exploratory")]:
        result = judged[row["name"]]
        for key in ("estimate", "low", "high", "detectable", "p_holm", "effect"):
            assert float(row[key]) == pytest.approx(result[key], rel=1e-12)
        assert row["verdict"] == result["verdict"] and row["why"] == result["why"] and row["says"] in md
    cosine, energy = judged["cosine beats linear"], judged["cosine takes less energy"]
    interval = f"[{cosine['low']:+.4f}, {cosine['high']:+.4f}]"
    assert f"| {cosine['estimate']:+.4f} {interval} | -0.0200 test loss (nats) |" in md
    assert f"{100 * math.expm1(energy['estimate']):+.1f}%" in md and "| -4.9% energy (kWh) |" in md
    assert "| ±0.0200 test loss (nats) |" in md and "| 6, 2 failed |" in md # of Manhattan: two seeds score chance
    assert "Supported: the interval" in md and "Inconclusive: these seeds" in md and "Not run yet" not in md
    assert "in the table already" not in md and "GPT on &lt;text>" in md and "GPT on &lt;text&gt;" in html
    names = {path.name for path in (tmp_path / "report" / "figures").iterdir()}
    for name in ("forest", "exploratory_forest", "heat", "interpretability", "cost", "tuning_gpt", "tuning_cnn"):
        assert {f"claims_{name}.svg", f"claims_{name}.pdf"} <= names and f"(figures/claims_{name}.svg)" in md
        shapes = ElementTree.parse(tmp_path / "report" / "figures" / f"claims_{name}.svg")
        assert len({shape.get("d") for shape in shapes.iter("{http://www.w3.org/2000/svg}path")}) > 20


def test_heads_by_settings_and_every_point_of_tuning(tmp_path, quick):
    rows = made_up_rows(3)
    md, html, table = make(tmp_path / "claims", rows)
    assert "5 not run yet" in md and "claims_forest" not in md # what has no verdict has no line
    heads = {row["head"]: row for row in table("claims_heads")}

    def losses(head):
        where = "gpt", head, "confirm"
        return [row["test_loss"] for row in rows if (row["setting"], row["head"], row["stage"]) == where]
    assert float(heads["cosine"]["gpt_mean"]) == pytest.approx(statistics.mean(losses("cosine")))
    difference = statistics.mean(losses("cosine")) - statistics.mean(losses("linear"))
    assert float(heads["cosine"]["gpt_difference"]) == pytest.approx(difference)
    manhattan = [row.get("test_accuracy", 0.1) for row in rows if (row["setting"], row["head"]) == ("cnn", "manhattan")
                 and row["stage"] == "confirm"]
    assert float(heads["manhattan"]["cnn_mean"]) == pytest.approx(statistics.mean(manhattan)) and len(manhattan) == 3
    assert float(heads["cosine"]["mean_rank"]) == 1 and float(heads["manhattan"]["mean_rank"]) == 6
    tuned = table("claims_tuning_gpt")
    assert len(tuned) == 5 * (9 + 3) and sum(row["chosen"] == "chosen" for row in tuned) == 5
    assert [row["status"] for row in tuned].count("failed") == 3


def test_ranks_compare_the_same_seeds(tmp_path, quick):
    """Half-way through a study one head has the seeds that another one has not."""
    losses = {("linear", 1): 4.4, ("linear", 2): 9.0, ("linear", 3): 9.0, ("cosine", 1): 4.5}
    rows = [row for row in made_up_rows(3, ("gpt",), ("linear", "cosine")) if row["stage"] == "confirm"]
    rows = [row | dict(test_loss=losses[key]) for row in rows if (key := (row["head"], row["seed"])) in losses]
    _, _, table = make(tmp_path / "claims", rows)
    assert {row["head"]: float(row["mean_rank"]) for row in table("claims_heads")} == {"linear": 1, "cosine": 2}


def test_a_setting_like_another_is_shown_for_its_cost_alone(tmp_path, quick, monkeypatch):
    """Its runs are the other's again, so that its losses would count twice."""
    monkeypatch.setitem(globals(), "DESIGN", DESIGN + """
[settings.gpt_cost]
like = "gpt"
script = "train.py"
tuned_by = "val_loss"
quality = "test_loss"
lower = true
failed = 6.9
looks = [6]
""")
    rows = [row for row in made_up_rows(3, ("gpt",)) if row["stage"] == "confirm"]
    again = [row | dict(setting="gpt_cost", cpu_seconds=100 + row["seed"]) for row in rows]
    _, _, table = make(tmp_path / "both", rows + again)
    assert not [key for row in table("claims_heads") for key in row if key.startswith("gpt_cost")]
    assert {row["setting"] for row in table("claims_cost")} == {"GPT on <text>", "gpt_cost"}
    md, _, table = make(tmp_path / "alone", again)
    assert "Heads by settings" not in md and len(table("claims_cost")) == len({row["head"] for row in again})


def test_the_design_of_this_repository(tmp_path, quick):
    design = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "config", "claims.toml")
    with open(design, encoding="utf-8") as f:
        text = f.read()
    plan, rows, rng = verdicts.load(text), [], np.random.default_rng(0)
    numbers = ("pc2_ev", "pca90", "variance_ratio", "pca5", "gradient_stability")
    for setting, about in plan["settings"].items():
        for head, seed in itertools.product(plan["heads"], range(1, about["looks"][0] + 1)):
            row = dict(setting=setting, head=head, stage="confirm", seed=seed, status="ended")
            rows.append(row | {key: 1 + rng.random() for key in (*numbers, about["quality"])})
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "claims.toml").write_text(text)
    write_csv(tmp_path / "claims" / "runs.csv", rows)
    report.main([str(tmp_path / "claims"), f"--out_dir={tmp_path / 'report'}"])
    shown = []
    for name in ("claims", "claims_exploratory"):
        with open(tmp_path / "report" / "tables" / f"{name}.csv", newline="", encoding="utf-8") as f:
            shown += [row["name"] for row in csv.DictReader(f)]
    assert sorted(shown) == sorted(claim["name"] for claim in plan["claims"]) and len(shown) > 40
    with open(tmp_path / "report" / "tables" / "claims_questions.csv", newline="", encoding="utf-8") as f:
        answered = {row["question"] for row in csv.DictReader(f)}
    assert "cosine against linear" in answered and "softcap" not in answered
    with open(tmp_path / "report" / "index.md", encoding="utf-8") as f:
        assert "No answer yet: softcap, z-loss" in f.read() # which are of one setting


def test_the_colours_of_tuning_and_what_a_cell_shows():
    runs = (("0.001", "4", "ended", "4.5", False), ("0.001", "4", "ended", "4.4", True),
            ("0.001", "16", "failed", "", False), ("0.01", "4", "ended", "5", False))
    rows = []
    for rate, n, status, loss, chosen in runs:
        rows.append(dict(learning_rate=rate, n=n, status=status, val_loss=loss, seed="1001", chosen=str(chosen)))
    panel = report_claims.tuning_panel("cosine", "2", "n", rows, "val_loss")
    assert panel["rates"] == [0.01, 0.001] and panel["scales"] == [4, 16] and panel["chosen"] == (1, 0)
    assert np.array_equal(panel["values"], [[5, np.nan], [4.4, np.inf]], equal_nan=True)
    assert report_claims.colour_limits(panel["values"], True) == pytest.approx((4.4, 5.0))
    assert report_claims.colour_limits(panel["values"], False) == pytest.approx((4.4, 5.0))
    assert report_claims.colour_limits(np.array([math.nan, math.inf]), True) == (0, 1)


@pytest.mark.parametrize("rows, said", [
    ([], "5 not run yet"), (made_up_rows(0), "No run of confirmation yet"),
    (made_up_rows(1, ("gpt",)), "1 of the 6 seeds"),
    (made_up_rows(6, ("cnn",), ("cosine", "euclidean")), "Without a run of all heads yet: cosine beats linear (gpt); "),
    (made_up_rows(6, ("gpt",), ("linear", "cosine")), "1 supported")])
def test_whatever_there_is_has_a_report(tmp_path, quick, rows, said):
    md, html, table = make(tmp_path / "claims", rows)
    assert said in md
    md, html, table = make(tmp_path / "claims", rows, [])
    assert "The design has no claims" in md


def test_a_copy_of_the_table_alone_shows_the_same(tmp_path, quick, monkeypatch):
    md, html, table = make(tmp_path / "claims", made_up_rows(6, ("gpt",)))
    (tmp_path / "copy" / "config").mkdir(parents=True)
    (tmp_path / "copy" / "assets").mkdir()
    shutil.move(tmp_path / "claims" / "claims.toml", tmp_path / "copy" / "config" / "claims.toml")
    shutil.move(tmp_path / "claims" / "runs.csv", tmp_path / "copy" / "assets" / "runs.csv")
    monkeypatch.chdir(tmp_path / "copy")
    report.main(["assets", f"--out_dir={tmp_path / 'again'}"])
    paths = re.compile(r".*: \d+ runs, by the design .*\n")
    assert paths.sub("", (tmp_path / "again" / "index.md").read_text()) == paths.sub("", md)


@pytest.mark.parametrize("name, text, message", [
    ("claims.toml", "heads = 3", r"claims.toml cannot be read \(ValueError: it has no \[heads\]"),
    ("claims.toml", "[", "claims.toml cannot be read .TOMLDecodeError"),
    ("claims.toml", "[heads]\n[settings.gpt]\nquality = 'loss'", "quality of the setting gpt is 'loss', which is no"),
    ("runs.csv", "setting,head,stage,seed,status\ngpt,cosine,tune,one,ended\n", "runs.csv cannot be read .ValueError")])
def test_what_cannot_be_read_is_said_in_a_line(tmp_path, quick, name, text, message):
    make(tmp_path / "claims", [])
    (tmp_path / "claims" / name).write_text(text)
    with pytest.raises(SystemExit, match=message) as e:
        report.main([str(tmp_path / "claims"), f"--out_dir={tmp_path / 'again'}"])
    assert "\n" not in str(e.value)


def test_two_studies_have_files_of_their_own(tmp_path, quick):
    make(tmp_path / "a", made_up_rows(1, ("gpt",)))
    md, html, table = make(tmp_path / "b", made_up_rows(6, ("gpt",)), CLAIMS, tmp_path / "a")
    seeds = {name: {row["run"] for row in table(name) if row["setting"] == "gpt"} for name in ("claims", "claims_2")}
    assert seeds == {"claims": {"1"}, "claims_2": {"6"}}
    names = set(os.listdir(tmp_path / "report" / "tables"))
    assert {"claims_heads.csv", "claims_2_heads.csv", "claims_2_tuning_gpt.tex"} <= names


def test_a_design_that_is_wrong_has_no_verdicts(tmp_path, quick):
    wrong = [dict(CLAIMS[0], contrast="cosine = 1, linear = 1")]
    md, html, table = make(tmp_path / "claims", made_up_rows(2, ("gpt",)), wrong)
    assert "No verdicts: claim cosine beats linear" in md and "claims_heat" in md
