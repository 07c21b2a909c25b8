"""
verdicts.py against a second computation that shares no line with it (pandas and scipy), against published tables and
statsmodels, and its error rates by simulation.

$ pytest tests/test_verdicts.py
"""
import csv
import functools
import math
import os
import re
import sys

import numpy as np
import pandas as pd
import pytest
from scipy import integrate, optimize, special, stats

import verdicts

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PLAIN, SPLIT, ONCE, LATE = (6, 12), (8, 16, 24), (10,), (4, 8)

# -----------------------------------------------------------------------------
# the second computation


def outside(bound, looks):
    """The probability that a random walk is outside +-bound at one of up to three looks, by nested integrals."""
    def between(x, steps):
        scale = (2 * steps) ** 0.5
        return (math.erf((bound - x) / scale) - math.erf((-bound - x) / scale)) / 2

    def density(x, steps):
        return math.exp(-x * x / (2 * steps)) / (2 * math.pi * steps) ** 0.5

    first, exact = looks[0], dict(epsabs=1e-13, epsrel=1e-12)
    if len(looks) == 1:
        return 1 - between(0, first)
    if len(looks) == 2:
        return 1 - integrate.quad(lambda x: density(x, first) * between(x, looks[1] - first), -bound, bound, **exact)[0]
    second, third = looks[1] - first, looks[2] - looks[1]
    return 1 - integrate.dblquad(lambda y, x: density(x, first) * density(y - x, second) * between(y, third),
                                 -bound, bound, -bound, bound, **exact)[0]


@functools.cache
def levels_again(looks, alpha):
    bound = optimize.brentq(lambda b: outside(b, looks) - alpha, looks[-1] ** 0.5, 5 * looks[-1] ** 0.5)
    return [2 * stats.norm.sf(bound / math.sqrt(n)) for n in looks]


def numbers_again(design, frame, claim):
    """A claim's numbers from a data frame of the rows, without Holm; None where there is no interval."""
    setting = design["settings"][claim["setting"]]
    quality, metric = setting["quality"], claim.get("metric", setting["quality"])
    heads, looks = list(claim["contrast"]), setting["looks"]
    own = frame.query("stage == 'confirm' and setting == @claim['setting'] and head in @heads").copy()
    bad = (own["status"] == "failed") | np.isinf(own[quality])
    own["score"] = own[metric].where(~bad, setting["failed"] if metric == quality else np.nan)
    if claim.get("log"):
        own["score"] = np.log(own["score"])
    late = pd.Series(False, own.index)
    if metric.endswith("_to_target"):
        late = own["arrived"].astype(str) == "False"
    own["late"] = late * np.sign(own["head"].map(claim["contrast"]).astype(float))
    counts = own.groupby("seed")["head"].nunique()
    seeds = sorted(counts.index[counts == len(heads)])
    look = len([n for n in looks if n <= len(seeds)])
    if look == 0:
        return dict(look=0)
    seeds = seeds[:looks[look - 1]]
    own = own[own["seed"].isin(seeds)]
    above, below = (own.groupby("seed")["late"].agg(f) == bound for f, bound in (("max", 1), ("min", -1)))
    table = own.pivot(index="seed", columns="head", values="score")[~(above & below)].dropna()
    difference = sum(weight * table[head] for head, weight in claim["contrast"].items())
    result = dict(look=look, seeds=len(table), failed=int(bad[own.index].sum()),
                  estimate=difference.mean(), values=difference.to_dict(), low=None, p_overall=1.0,
                  above=int(above.sum()), below=int(below.sum()), quality=metric == quality)
    if len(table) < 2 or difference.max() - difference.min() < 1e-13:
        return result
    level = levels_again(tuple(looks), 1 - design["confidence"])[look - 1]
    error = math.sqrt(difference.var() * (1 / len(table) + setting.get("test_share", 0)))
    law = stats.t(len(table) - 1, loc=difference.mean(), scale=error)
    if claim.get("equal"):
        p = max(law.cdf(-abs(claim["effect"])), law.sf(abs(claim["effect"])))
        sided = 2 # its bound is that of a two-sided test with twice the error
    else:
        p = 2 * min(law.cdf(0), law.sf(0))
        sided = 1
    z = stats.norm.isf(min(1, sided * p) / 2)
    p_overall = outside(z * looks[look - 1] ** 0.5, looks) / sided if z > 1e-9 else 1 / sided
    low, high = law.interval(1 - level)
    return result | dict(std=difference.std(), level=level, low=low, high=high, p=p, p_overall=max(p, p_overall),
                         noncentrality=special.nctdtrinc(len(table) - 1, 1 - design["power"],
                                                         stats.t.isf(level / 2, len(table) - 1)) * error)


def verdict_again(claim, own, p_holm, alpha):
    if own["look"] == 0:
        return "not run yet"
    if own["low"] is None:
        return "inconclusive"
    effect = claim["effect"]
    above, below = own["above"], own["below"]
    if own["failed"] and not own["quality"] or claim.get("equal") and above + below:
        return "inconclusive"
    if claim.get("equal"):
        apart = own["low"] > abs(effect) or own["high"] < -abs(effect)
        if apart:
            return "refuted"
        return "supported" if p_holm <= alpha else "inconclusive"
    if effect < 0: # as a claim of the opposite contrast
        own = own | dict(low=-own["high"], high=-own["low"], estimate=-own["estimate"])
        above, below = below, above
    if own["high"] < abs(effect):
        return "inconclusive" if above else "refuted"
    agreed = own["low"] > 0 and own["estimate"] >= abs(effect) and p_holm <= alpha and not below
    return "supported" if agreed else "inconclusive"


def agree(design, rows):
    """Judge twice, compare, and return {name: the verdict's dict}."""
    frame, judged = pd.DataFrame(rows), verdicts.judge(design, rows)
    texts = ["setting", "head", "stage", "status", "rung", "git", "folder", "chosen", "arrived"]
    numeric = frame.columns.difference(texts)
    frame[numeric] = frame[numeric].apply(pd.to_numeric)
    again = [numbers_again(design, frame, claim) for claim in design["claims"]]
    for primary in (True, False):
        family = [own for claim, own in zip(design["claims"], again) if claim.get("primary", False) == primary]
        ascending, reached = sorted(family, key=lambda own: own.get("p_overall", 1.0)), 0
        for rank, own in enumerate(ascending):
            reached = own["p_holm"] = max(reached, min(1, (len(family) - rank) * own.get("p_overall", 1.0)))
    for claim, own, result in zip(design["claims"], again, judged):
        name = claim["name"]
        assert result["name"] == name and result["look"] == own["look"], name
        assert result["verdict"] == verdict_again(claim, own, own["p_holm"], 1 - design["confidence"]), (name, result)
        if own["look"] == 0:
            assert result["low"] is result["p"] is result["level"] is None, name
            continue
        for key in ("seeds", "failed", "above", "below"):
            assert result[key] == own[key], (name, key)
        if own["seeds"] == 0:
            assert result["estimate"] is result["low"] is None and result["values"] == {}, name
            continue
        assert result["estimate"] == pytest.approx(own["estimate"], rel=1e-12, abs=1e-12), name
        assert result["values"] == pytest.approx(own["values"], rel=1e-12, abs=1e-12), name
        if own["low"] is None:
            assert result["low"] is result["p"] is result["p_holm"] is None, name
            continue
        for key in ("low", "high", "std", "level", "p"):
            assert result[key] == pytest.approx(own[key], rel=1e-9, abs=1e-9), (name, key)
        for key in ("p_overall", "p_holm"):
            assert result[key] == pytest.approx(own[key], rel=1e-6, abs=1e-9), (name, key)
        assert result["detectable"] == pytest.approx(own["noncentrality"], rel=1e-6), name
    return {result["name"]: result for result in judged}

# -----------------------------------------------------------------------------
# a small study with every case


def row(setting, head, seed, stage="confirm", status="ended", **numbers):
    return dict(setting=setting, head=head, seed=seed, stage=stage, status=status, **numbers)


def study():
    """(design, rows): heads differ by what their names say, in units of 0.01 accuracy or nats; see the claims below."""
    rng = np.random.default_rng(5)
    settings = {
        "plain": dict(quality="accuracy", looks=list(PLAIN), failed=0.1),
        "split": dict(quality="accuracy", looks=list(SPLIT), failed=0.1, test_share=0.2),
        "once": dict(quality="loss", looks=list(ONCE), failed=math.log(10)),
        "late": dict(quality="accuracy", looks=list(LATE), failed=0.1)}
    means = {"zero": 0.8, "same": 0.8, "one": 0.81, "three": 0.83, "fails": 0.83}
    runs = {"plain": 12, "split": 25, "once": 10, "late": 3}
    rows = []
    for setting, count in runs.items():
        for seed in range(1, count + 1):
            common = rng.normal(0, 0.02)
            for head, mean in means.items():
                x = mean + common + rng.normal(0, 0.004)
                rows.append(row(setting, head, seed, accuracy=x, loss=3 - x, seconds=100 * x, spread=x * x))
            x = rows[-5]["accuracy"] + 0.25
            rows.append(row(setting, "shifted", seed, accuracy=x, loss=1, seconds=1, spread=1))
            rows.append(row(setting, "slow", seed, accuracy=0.5, loss=rows[-6]["loss"] + rng.normal(-0.03, 0.004),
                            seconds=rows[-6]["seconds"] * math.exp(rng.normal(0.2, 0.01)), spread=""))
    for r in rows:
        if r["head"] == "fails" and r["setting"] in ("plain", "split") and r["seed"] % 5 == 0:
            r["status"], r["accuracy"], r["spread"] = "failed", "", ""
        if r["head"] == "same" and r["setting"] == "split" and r["seed"] == 7:
            r["accuracy"] = math.inf # it ended, but diverged
    for r in rows: # how long it took to arrive; three arrives first, slow last, and some do not
        steps = {"three": 50, "zero": 70, "slow": 100}.get(r["head"], 60) + rng.integers(0, 3)
        r["steps_to_target"], r["arrived"] = steps, not (r["head"] in ("slow", "same") and r["seed"] % 2)
    lost = {("plain", "one", 3), ("plain", "one", 9)}
    rows = [r for r in rows if (r["setting"], r["head"], r["seed"]) not in lost]
    rows.append(row("plain", "three", 1, stage="tune", accuracy=0.0, loss=9, seconds=1, spread=1)) # of another kind
    heads = {head: {} for head in [*means, "shifted", "slow"]}
    return dict(confidence=0.95, power=0.9, heads=heads, settings=settings, claims=claims()), rows


def claims():
    def claim(name, setting, contrast, effect, **more):
        return dict(name=name, says=f"{name}.", setting=setting, contrast=contrast, effect=effect, **more)

    return [
        claim("null", "plain", {"same": 1, "zero": -1}, 0.02, primary=True),
        claim("effect", "plain", {"three": 1, "zero": -1}, 0.02, primary=True),
        claim("other side", "plain", {"zero": 1, "three": -1}, 0.02, primary=True),
        claim("downward", "plain", {"zero": 1, "three": -1}, -0.02, primary=True),
        claim("small", "plain", {"one": 1, "zero": -1}, 0.005, primary=True),
        claim("tie", "plain", {"shifted": 1, "zero": -1}, 0.02, primary=True),
        claim("factorial", "plain", {"three": 0.5, "fails": 0.5, "zero": -0.5, "same": -0.5}, 0.005),
        claim("failures", "split", {"fails": 1, "zero": -1}, 0.01, primary=True),
        claim("diverged", "split", {"same": 1, "zero": -1}, 0.005),
        claim("split", "split", {"three": 1, "zero": -1}, 0.01, primary=True),
        claim("split, equal", "split", {"same": 1, "zero": -1}, 0.02, equal=True, metric="loss"),
        claim("once, equal", "once", {"same": 1, "zero": -1}, 0.02, equal=True, metric="accuracy"),
        claim("apart", "split", {"three": 1, "zero": -1}, 0.01, equal=True),
        claim("not surely equal", "plain", {"same": 1, "zero": -1}, 0.001, equal=True),
        claim("what failed has no spread", "split", {"fails": 1, "zero": -1}, 0.01, metric="spread"),
        claim("no spread at all", "split", {"slow": 1, "zero": -1}, 0.01, metric="spread"),
        claim("one look", "once", {"slow": 1, "zero": -1}, -0.02, primary=True),
        claim("less than it says", "once", {"three": 1, "zero": -1}, 0.031, metric="accuracy"),
        claim("ratio", "once", {"slow": 1, "zero": -1}, math.log(1.1), metric="seconds", log=True),
        claim("steps", "once", {"three": 1, "zero": -1}, -5, metric="steps_to_target"),
        claim("late, so slower", "once", {"slow": 1, "zero": -1}, 5, metric="steps_to_target"),
        claim("late, so not slower yet", "once", {"same": 1, "zero": -1}, 5, metric="steps_to_target"),
        claim("late, so not faster", "once", {"same": 1, "zero": -1}, -5, metric="steps_to_target"),
        claim("the other late", "once", {"zero": 1, "same": -1}, 5, metric="steps_to_target"),
        claim("both late", "once", {"same": 1, "slow": -1}, -5, metric="steps_to_target"),
        claim("late and equal", "once", {"same": 1, "zero": -1}, 20, metric="steps_to_target", equal=True),
        claim("not yet", "late", {"three": 1, "zero": -1}, 0.01, primary=True)]


def test_a_second_computation_gives_the_same_verdicts():
    design, rows = study()
    judged = agree(design, rows)
    assert {result["verdict"] for result in judged.values()} == {"supported", "refuted", "inconclusive", "not run yet"}
    expected = {
        "null": "refuted", "effect": "supported", "other side": "refuted", "downward": "supported",
        "tie": "inconclusive", "split": "supported", "failures": "inconclusive", "split, equal": "inconclusive",
        "once, equal": "supported", "apart": "refuted", "no spread at all": "inconclusive", "one look": "supported",
        "ratio": "supported", "what failed has no spread": "inconclusive", "steps": "supported",
        "late, so slower": "supported", "late, so not slower yet": "inconclusive",
        "late, so not faster": "inconclusive", "the other late": "inconclusive", "both late": "inconclusive",
        "late and equal": "inconclusive", "not yet": "not run yet"}
    assert {name: judged[name]["verdict"] for name in expected} == expected
    assert judged["small"]["look"] == 1 and judged["small"]["run"] == 10 # two seeds are missing: the others wait
    assert judged["effect"]["look"] == 2 and judged["split"]["look"] == 3 and judged["split"]["seeds"] == 24
    assert judged["failures"]["failed"] == 4 and judged["failures"]["std"] > 0.2 # chance counts against the head
    assert "may be smaller" in judged["less than it says"]["why"]
    assert judged["diverged"]["failed"] == 1
    assert "4 runs failed, which have no such number" in judged["what failed has no spread"]["why"]
    assert judged["both late"]["seeds"] == 5 and judged["late, so not faster"]["above"] == 5
    assert "In 5 seeds a head did not arrive" in judged["late, so not slower yet"]["why"]
    assert judged["what failed has no spread"]["seeds"] == 20
    assert judged["what failed has no spread"]["why"].endswith(" 4 seeds lack the number.")
    assert "same difference" in judged["tie"]["why"] and judged["tie"]["estimate"] == pytest.approx(0.25)
    assert "3 of the 4" in judged["not yet"]["why"] and judged["not yet"]["estimate"] is not None
    assert "would have shown" in judged["not surely equal"]["why"]


def test_rows_of_a_csv_are_read_as_their_numbers_are():
    design, rows = study()
    texts = [{key: str(value) for key, value in r.items()} for r in rows]
    assert verdicts.judge(design, texts) == verdicts.judge(design, rows)
    agree(design, texts)


@pytest.mark.parametrize("seed", range(2))
def test_a_second_computation_agrees_on_claims_at_the_margin(seed):
    """Effects and standard deviations of one size, so that every rule decides some claim."""
    rng = np.random.default_rng(seed)
    design, _ = study()
    rows, heads = [], [f"h{i}" for i in range(8)]
    for setting, count in (("plain", 12), ("split", 16), ("once", 10)):
        for head in heads:
            mean = rng.normal(0.8, 0.006)
            for s in range(count):
                value = mean + rng.normal(0, 0.006)
                rows.append(row(setting, head, s, accuracy=value, loss=-value))
    design |= dict(heads=dict.fromkeys(heads), claims=[])
    for i in range(24):
        a, b = rng.choice(heads, 2, replace=False)
        design["claims"].append(dict(
            name=str(i), says=".", setting=str(rng.choice(["plain", "split", "once"])), contrast={a: 1, b: -1},
            effect=float(rng.choice([-0.005, 0.005])), primary=bool(i % 3 == 0), equal=bool(i % 4 == 0)))
    assert len({result["verdict"] for result in agree(design, rows).values()}) == 3


def test_a_second_computation_agrees_on_the_study_of_claims_and_so_does_its_table():
    folder = os.path.join(ROOT, "assets", "claims")
    with open(os.path.join(folder, "claims.toml"), encoding="utf-8") as f:
        design = verdicts.load(f.read())
    with open(os.path.join(folder, "runs.csv"), newline="", encoding="utf-8") as f:
        judged = agree(design, list(csv.DictReader(f)))
    with open(os.path.join(ROOT, "RESULTS.md"), encoding="utf-8") as f:
        section = f.read().split("## Verdicts\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    shown = {name: rest for name, *rest in rows[1:]}
    assert set(shown) == {name for name, result in judged.items() if result["look"]} and shown
    for name, (verdict, difference, _, _, seeds, p_holm) in shown.items():
        result, is_log = judged[name], difference.endswith("%]")
        assert (verdict, int(seeds)) == (result["verdict"], result["seeds"])
        if result["estimate"] is None:
            assert (difference, p_holm) == ("none arrived", "1") and "did not arrive" in result["why"]
            continue
        numbers = [float(x) for x in re.findall(r"[+-][0-9.]+", difference)]
        expected = [result["estimate"], result["low"], result["high"]]
        if is_log:
            expected = [100 * math.expm1(x) for x in expected]
        assert numbers == pytest.approx(expected, abs=0.05 if is_log else 0.0005)
        assert float(p_holm) == pytest.approx(result["p_holm"], rel=0.1)


def test_the_table_of_what_a_loss_costs_is_that_of_the_evaluations():
    """The steps and CPU seconds to some losses, in percent of the linear head's of the same seed."""
    evals = pd.read_csv(os.path.join(ROOT, "assets", "claims", "evaluations.csv"))
    with open(os.path.join(ROOT, "RESULTS.md"), encoding="utf-8") as f:
        section = f.read().split("### What a loss costs\n")[1].split("\n## ")[0]
    header, *lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    numbers = 0
    for head, *cells in lines:
        for title, cell in zip(header[1:], cells):
            key = "step" if title.startswith("steps") else "cpu_seconds"
            there = evals.groupby(["head", "seed"])[key].last()
            if " to " in title:
                loss = float(title.split(" to ")[1])
                there = evals[evals.val_loss <= loss].groupby(["head", "seed"])[key].first()
            costs = there.unstack("head")
            if cell == "not reached":
                assert head not in costs
                continue
            ratios = np.log(costs[head] / costs["linear"])
            low, high = stats.t.interval(0.95, len(ratios) - 1, ratios.mean(), stats.sem(ratios))
            expected = [100 * math.expm1(x) for x in (ratios.mean(), low, high)]
            assert len(ratios) == 6 and not ratios.isna().any()
            assert [float(x) for x in re.findall(r"[+-][0-9.]+", cell)] == pytest.approx(expected, abs=0.5)
            numbers += 1
    assert numbers == 26

# -----------------------------------------------------------------------------
# its parts


@pytest.mark.parametrize("looks, z", [
    ((1, 2, 3), (3.471, 2.454, 2.004)), ((1, 2), (2.797, 1.977)), ((1,), (1.960,)), # Jennison and Turnbull 2000, 2.3
    ((1, 2, 3, 4, 5), (4.562, 3.226, 2.634, 2.281, 2.040)), ((8, 16, 24), (3.471, 2.454, 2.004))])
def test_the_levels_are_the_published_ones(looks, z):
    levels = verdicts.nominal_levels(looks, 0.05)
    np.testing.assert_allclose(stats.norm.isf(np.array(levels) / 2), z, atol=6e-4)


@pytest.mark.parametrize("looks", [(6, 12), (8, 16, 24), (5, 6, 30)])
def test_the_bounds_have_their_multivariate_normal_probability(looks):
    n = np.array(looks)
    z = stats.norm.isf(np.array(verdicts.nominal_levels(looks, 0.05)) / 2)
    law = stats.multivariate_normal(cov=np.sqrt(np.minimum.outer(n, n) / np.maximum.outer(n, n)), seed=0)
    assert 1 - law.cdf(z, lower_limit=-z) == pytest.approx(0.05, abs=1e-4)
    for look, level in enumerate(verdicts.nominal_levels(looks, 0.02), 1):
        assert verdicts.overall(level, looks, look) == pytest.approx(0.02, abs=1e-10)
    assert all(verdicts.overall(p, looks, len(looks)) >= p for p in (1, 0.9, 0.3, 1e-6, 1e-12, 0))


def test_holm_by_hand():
    assert verdicts.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02]) # R's p.adjust
    assert verdicts.holm([0.01, None, 0.5]) == [pytest.approx(0.03), None, 1] # a claim without a test still counts
    assert verdicts.holm([None]) == [None] and verdicts.holm([]) == []


@pytest.mark.parametrize("change, message", [
    (dict(contrast={"three": 1, "zero": -0.5}), "sum to 0"), (dict(contrast={"three": 1, "nobody": -1}), "nobody"),
    (dict(effect=0), "effect"), (dict(effect=math.nan), "effect"), (dict(setting="nowhere"), "nowhere"),
    (dict(primry=True), "primry"), (dict(name="effect"), "twice")])
def test_a_design_that_is_not_one_is_refused(change, message):
    design, rows = study()
    design["claims"][0] = {**design["claims"][0], **change}
    with pytest.raises(ValueError, match=message):
        verdicts.judge(design, rows)


@pytest.mark.parametrize("change, message", [
    (dict(like="nowhere"), "there is no .'nowhere'"), (dict(heads=["zero", "nobody"]), "there is no .'nobody'"),
    (dict(heads=["zero"]), "of the setting's heads")])
def test_a_setting_that_names_what_is_not_there_is_refused(change, message):
    design, rows = study()
    design["settings"] = {name: {**setting, **change} for name, setting in design["settings"].items()}
    with pytest.raises(ValueError, match=message):
        verdicts.judge(design, rows)


def test_a_claim_with_effects_is_one_for_each_setting():
    text = """
        [[claims]]
        name = "better"
        says = "It is."
        contrast = { a = 1, b = -1 }
        effects = { here = 0.1, there = -2 }
        primary = true
        [[claims]]
        name = "alone"
        setting = "here"
    """
    shared = dict(says="It is.", contrast=dict(a=1, b=-1), primary=True, question="better")
    assert verdicts.load(text)["claims"] == [
        dict(name="better, here", setting="here", effect=0.1, **shared),
        dict(name="better, there", setting="there", effect=-2, **shared), dict(name="alone", setting="here")]


def test_bad_runs_are_refused():
    design, rows = study()
    with pytest.raises(ValueError, match="two runs of plain, zero, seed 1"):
        verdicts.judge(design, [*rows, row("plain", "zero", 1, accuracy=1)])
    del design["settings"]["plain"]["failed"]
    with pytest.raises(ValueError, match="add failed"):
        verdicts.judge(design, rows)
    design, rows = study()
    with pytest.raises(ValueError, match="log = true does not fit once"):
        verdicts.judge(design, [{**r, "seconds": -1} for r in rows])
    with pytest.raises(ValueError, match="power"):
        verdicts.judge({**design, "power": 90}, rows)
    assert verdicts.judge({**design, "claims": []}, rows) == []
    assert {result["verdict"] for result in verdicts.judge(design, [])} == {"not run yet"}

# -----------------------------------------------------------------------------
# error rates


def simulated(truth, looks, count, effect, **more):
    """Judge `count` claims whose contrast is `truth` standard deviations; return the verdicts at each look."""
    rng = np.random.default_rng(len(looks))
    heads = [f"h{i}" for i in range(count)]
    rows = [row("s", "zero", seed, accuracy=0.0) for seed in range(looks[-1])]
    for head in heads:
        rows += [row("s", head, seed, accuracy=x) for seed, x in enumerate(rng.normal(truth, 1, looks[-1]))]
    design = dict(confidence=0.95, power=0.9, heads=dict.fromkeys(["zero", *heads]),
                  settings={"s": dict(quality="accuracy", looks=list(looks))}, claims=[])
    for head in heads:
        contrast = {head: 1, "zero": -1}
        design["claims"].append(dict(name=head, says=".", setting="s", contrast=contrast, effect=effect, **more))
    return [verdicts.judge(design, [r for r in rows if r["seed"] < n]) for n in looks]


def rate(judged, condition):
    """The share of the claims for which the condition holds at one of the looks."""
    return np.mean([any(map(condition, at_looks)) for at_looks in zip(*judged)])


@pytest.mark.parametrize("looks", [(6, 12), (8, 16, 24)])
def test_the_t_tests_of_all_looks_err_together_in_one_study_of_twenty(looks):
    x, hit = np.random.default_rng(1).normal(size=(40_000, looks[-1])), False
    for n, level in zip(looks, verdicts.nominal_levels(looks, 0.05)):
        t = x[:, :n].mean(1) / (x[:, :n].std(1, ddof=1) / n ** 0.5)
        hit = hit | (np.abs(t) > stats.t.isf(level / 2, n - 1))
    assert hit.mean() == pytest.approx(0.05, abs=0.005) # the standard error is 0.0011


def test_verdicts_err_as_they_say():
    looks = 8, 16, 24
    judged = simulated(0, looks, 200, 1e-6)
    found = rate(judged, lambda r: r["p_overall"] <= 0.05)
    assert 0.015 < found < 0.09 # the standard error is 0.015
    assert found == rate(judged, lambda r: r["low"] > 0 or r["high"] < 0) # the interval and p are of one mind
    assert rate(judged, lambda r: r["verdict"] == "supported") <= 0.005 # Holm, over 200
    true = simulated(0.6, looks, 200, 0.6)
    assert 0.005 < rate(true, lambda r: r["verdict"] == "refuted") < 0.055 # it is as large as claimed: half of 5%


def test_the_detectable_effect_is_found_with_the_power_of_the_design():
    factor = verdicts.detectable(11, 0.05, 0.9) / 12 ** 0.5
    judged = simulated(factor, (12,), 200, 1e-6)
    assert rate(judged, lambda r: r["low"] > 0) == pytest.approx(0.9, abs=0.05) # the standard error is 0.021
    assert np.mean([r["detectable"] for r in judged[0]]) == pytest.approx(factor, rel=0.06)


def test_equality_is_rarely_found_where_there_is_none():
    looks = 8, 16, 24
    at_margin = simulated(0.5, looks, 200, 0.5, equal=True)
    assert 0.01 < rate(at_margin, lambda r: r["p_overall"] <= 0.05) < 0.09
    equal = simulated(0, looks, 200, 0.8, equal=True)
    assert rate(equal, lambda r: r["p_overall"] <= 0.05) > 0.8
    assert rate(equal, lambda r: r["verdict"] == "refuted") == 0

# -----------------------------------------------------------------------------
# across settings, and along a run


def question(values):
    """A design with a question, and a verdict for each (estimate, error, effect)."""
    design = dict(confidence=0.95, claims=[dict(question="one") for _ in values])
    results = []
    for i, (estimate, error, effect) in enumerate(values):
        results.append(dict(setting=f"s{i}", estimate=estimate, error=error, effect=effect, low=estimate - error))
    return design, results


@pytest.mark.parametrize("values, verdict", [
    ([(0.006, 0.001, 0.005), (0.02, 0.004, 0.01), (-0.03, 0.004, -0.02), (0.011, 0.001, 0.005)], "supported"),
    ([(0.001, 0.001, 0.005), (0.001, 0.004, 0.01), (-0.001, 0.004, -0.02)], "refuted"),
    ([(0.009, 0.001, 0.005), (-0.01, 0.004, 0.01), (-0.02, 0.004, -0.02)], "inconclusive")])
def test_settings_are_pooled_by_a_random_effects_model(values, verdict):
    pytest.importorskip("statsmodels")
    answer, = verdicts.across(*question(values))
    estimate, error, effect = np.array(values).T
    x, v, k = estimate / effect, (error / effect) ** 2, len(values)

    def excess(tau2): # Paule and Mandel 1982
        w = 1 / (v + tau2)
        return (w * (x - (w * x).sum() / w.sum()) ** 2).sum() - (k - 1)

    tau2 = optimize.brentq(excess, 0, 1e3) if excess(0) > 0 else 0.0
    w = 1 / (v + tau2)
    mean, half = (w * x).sum() / w.sum(), stats.t.isf(0.025, k - 1) / w.sum() ** 0.5
    assert (answer["estimate"], answer["low"], answer["high"], answer["tau"]) == pytest.approx(
        (mean, mean - half, mean + half, tau2 ** 0.5), rel=1e-6)
    assert answer["verdict"] == verdict


def test_what_cannot_be_pooled_says_so(monkeypatch):
    values = [(0.01, 0.001, 0.005)] * 3
    design, results = question(values)
    results[0]["low"] = None
    answer, = verdicts.across(design, results)
    assert answer["verdict"] is None and answer["why"] == "Fewer than three settings have an interval."
    monkeypatch.setitem(sys.modules, "statsmodels.stats.meta_analysis", None)
    answer, = verdicts.across(*question(values))
    assert answer["verdict"] is None and "pip install statsmodels" in answer["why"]
    design, results = study()
    assert verdicts.across(design, verdicts.judge(design, results)) == [] # none asks a question


def curves(kind, length, noise=0.002, seeds=5):
    t = np.unique(np.geomspace(1, length, 200).astype(int)) - 1 # from step 0 on
    x = {"log": 1 + 0.3 * np.log1p(t), "limit": 3 - 2 * np.exp(-t / 60), "slow limit": 3 - 2 / np.sqrt(1 + t),
         "flat": 0 * t + 2.0, "shrinks": 3 - 0.2 * np.log1p(t)}[kind]
    rng = np.random.default_rng(length)
    return t, x * (1 + rng.normal(0, 0.05, (seeds, 1))) + rng.normal(0, noise, (seeds, len(t)))


@pytest.mark.parametrize("kind, verdict", [("log", "grows"), ("limit", "settles"), ("flat", "settles"),
                                           ("shrinks", "settles")])
@pytest.mark.parametrize("length", [1_000, 4_000, 16_000, 64_000, 1_000_000])
def test_whether_norms_grow_does_not_depend_on_the_length_of_the_run(kind, verdict, length):
    t, norms = curves(kind, length)
    result = verdicts.late_slope(t, norms)
    assert result["verdict"] == verdict and result["low"] < result["slope"] < result["high"]


def test_the_late_slope_is_that_of_a_regression_and_knows_what_it_cannot_say():
    t, norms = curves("log", 5000, noise=0.01)
    late, slopes = t >= t[-1] / 4, []
    for curve in norms[:, late]:
        slopes.append(stats.linregress(np.log(t[late]), curve).slope * math.log(2) / curve.mean())
    interval = stats.t.interval(0.95, len(slopes) - 1, np.mean(slopes), stats.sem(slopes))
    result = verdicts.late_slope(t, norms)
    assert (result["slope"], result["low"], result["high"]) == pytest.approx((np.mean(slopes), *interval), rel=1e-9)
    assert verdicts.late_slope(t, curves("flat", 5000, noise=2)[1])["verdict"] == "undecided"
    assert verdicts.late_slope(t, norms[:1])["verdict"] == "undecided" # one seed
    assert verdicts.late_slope(t, norms[[0, 0]])["verdict"] == "undecided" # two seeds that are one
    assert verdicts.late_slope([0, 100], norms[:, :2])["slope"] is None
    assert verdicts.late_slope(t, norms * 100)["slope"] == pytest.approx(result["slope"]) # no units
