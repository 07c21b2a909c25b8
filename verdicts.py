"""
The verdicts of a study of claims, as pure functions of its design (config/claims.toml) and of its runs (rows of
runs.csv: dicts of numbers or of their texts). They read no files.

    design = load(text)                # the text of a design
    verdicts = judge(design, rows)     # a dict per claim: supported, refuted or inconclusive, and by what numbers
    answers = across(design, verdicts) # a dict per question that is asked in several settings; needs statsmodels

A claim is a contrast of heads, sum_k weight_k value_k of the same seed, and the smallest effect of interest. It is
decided at looks, the numbers of seeds that the design names (O'Brien and Fleming 1979), by the paired t test over
seeds; each family, the primary claims and the others, is corrected by Holm (1979). All of it is standard; to apply it
here is our choice. Needs scipy.
"""
import math
import tomllib
from functools import lru_cache

import numpy as np
from scipy import optimize, stats

import metrics

NODES, WEIGHTS = np.polynomial.legendre.leggauss(256) # of quadrature on [-1, 1]
REQUIRED = {"name", "says", "setting", "contrast", "effect"}
OPTIONAL = {"metric", "primary", "equal", "log", "question"}
TO_TARGET = ("steps_to_target", "cpu_to_target") # of a run that did not arrive they are less than it would have needed


def crossing(bound, looks):
    """
    The probability that a random walk of standard normal steps is outside +-bound after one of these numbers of steps.
    The density within them goes from look to look by quadrature (Armitage, McPherson and Rowe 1969).
    """
    x_before, mass, before = np.zeros(1), np.ones(1), 0 # all of it starts at 0
    for n in looks:
        scale = min(bound, 9 * n ** 0.5) # beyond 9 standard deviations there is nothing to resolve
        x, variance = scale * NODES, n - before
        density = np.exp((x[:, None] - x_before) ** 2 / (-2 * variance)) @ mass / (2 * math.pi * variance) ** 0.5
        x_before, mass, before = x, scale * WEIGHTS * density, n
    return 1 - mass.sum()


@lru_cache
def nominal_levels(looks, alpha):
    """
    The two-sided levels of the looks, a tuple of numbers of seeds, that O'Brien and Fleming give a sequence whose error
    is alpha as a whole: the sum over seeds has the same bound at each look. The levels are for t tests as well, with
    the degrees of freedom of their look (Jennison and Turnbull 2000).
    """
    bonferroni = stats.norm.isf(alpha / 2 / len(looks)) * looks[-1] ** 0.5
    bound = optimize.brentq(lambda b: crossing(b, looks) - alpha, 0, bonferroni + 0.1)
    return tuple(float(2 * stats.norm.sf(bound / n ** 0.5)) for n in looks)


def overall(p, looks, look):
    """The error of the whole sequence whose nominal level at this look (from 1) is p: a p value for all looks."""
    z = stats.norm.isf(max(p, 1e-15) / 2) # the quadrature resolves no less
    return float(max(p, crossing(z * looks[look - 1] ** 0.5, looks))) if z > 0 else 1.0


def holm(p_values):
    """The p values of a family, adjusted. None, a claim without a test yet, counts as 1: the family is frozen."""
    order = sorted(range(len(p_values)), key=lambda i: 1 if p_values[i] is None else p_values[i])
    adjusted, largest = [None] * len(p_values), 0
    for place, i in enumerate(order):
        if p_values[i] is not None:
            largest = max(largest, min(1, p_values[i] * (len(order) - place)))
            adjusted[i] = largest
    return adjusted


@lru_cache
def detectable(df, level, power):
    """The mean in standard errors that the two-sided t test finds on its side with this power (noncentral t)."""
    critical = stats.t.isf(level / 2, df)
    return float(optimize.brentq(lambda d: stats.nct.sf(critical, df, d) - power, 0, 10 * critical + 10, xtol=1e-12))


def load(text):
    """
    The design in a text of TOML, where a claim with `effects`, by setting, becomes one claim for each of them,
    joined by the claim's name as a question. Raises ValueError for a text that is no TOML or has no such claim.
    """
    design, claims = tomllib.loads(text), []
    for claim in design.get("claims", []):
        if "effects" not in claim:
            claims.append(claim)
            continue
        shared = {key: value for key, value in claim.items() if key not in ("name", "effects")}
        for setting, effect in claim["effects"].items():
            name = claim.get("name")
            claims.append(dict(name=f"{name}, {setting}", setting=setting, effect=effect, question=name, **shared))
    return {**design, "claims": claims}


def check(design):
    """Raises ValueError with all that is wrong with the settings and claims of the design, a line for each."""
    problems, names = [], set()
    for key in ("confidence", "power"):
        if not 0.5 < design.get(key, 0) < 1:
            problems.append(f"{key} must be between 0.5 and 1, got {design.get(key)}")
    heads, settings = design.get("heads", {}), design.get("settings", {})
    for name, setting in settings.items():
        strangers = set(setting.get("heads", heads)) - set(heads)
        if setting.get("like", name) not in settings:
            strangers.add(setting["like"])
        if strangers:
            problems.append(f"setting {name}: there is no {sorted(strangers)}")
    for claim in design.get("claims", []):
        name, odd = claim.get("name"), REQUIRED - set(claim) | set(claim) - REQUIRED - OPTIONAL
        if odd or name in names:
            problems.append(f"claim {name} is there twice, or misses or does not know {sorted(odd)}")
            continue
        names.add(name)
        weights, setting = claim["contrast"], settings.get(claim["setting"], {})
        looks, strangers = setting.get("looks", [0]), set(weights) - set(setting.get("heads", heads))
        if looks[0] < 2 or sorted(set(looks)) != looks or "quality" not in setting:
            problems.append(f"claim {name}: setting {claim['setting']!r} needs a quality and looks that ascend from 2 "
                            f"seeds on, got {setting}")
        if strangers or len(weights) < 2 or abs(sum(weights.values())) > 1e-9:
            problems.append(f"claim {name}: a contrast has weights that sum to 0, of the setting's heads, got "
                            f"{weights}")
        if not math.isfinite(claim["effect"]) or claim["effect"] == 0:
            problems.append(f"claim {name}: effect must be a number other than 0, got {claim['effect']}")
    if problems:
        raise ValueError("\n".join(problems))


def confirmed(rows):
    """{(setting, head): {seed: row}} of the runs that may judge. Raises ValueError where a run is there twice."""
    runs = {}
    for row in rows:
        if row["stage"] == "confirm":
            key, seed = (row["setting"], row["head"]), int(row["seed"])
            if seed in runs.setdefault(key, {}):
                raise ValueError(f"two runs of {key[0]}, {key[1]}, seed {seed}: a seed counts once, remove one")
            runs[key][seed] = row
    return runs


def has_failed(row, quality):
    """Whether a run failed, or ended with a quality that is not finite."""
    return row["status"] == "failed" or (row.get(quality) not in (None, "") and not math.isfinite(float(row[quality])))


def score(row, metric, setting):
    """The metric of a run, or None. One that failed has the quality of chance, so that it counts, and nothing else."""
    if not has_failed(row, setting["quality"]):
        value = math.nan if row.get(metric) in (None, "") else float(row[metric])
        return value if math.isfinite(value) else None
    if metric == setting["quality"] and "failed" not in setting:
        raise ValueError(f"setting {row['setting']}: {row['head']} failed with seed {row['seed']}, and the design does "
                         f"not say what that scores: add failed, the {metric} of chance")
    return setting["failed"] if metric == setting["quality"] else None


def late_sides(claim, metric, rows):
    """The signs of the weights of heads that did not arrive, where the metric is what it took to arrive."""
    if metric not in TO_TARGET:
        return set()
    return {math.copysign(1, weight) for head, weight in claim["contrast"].items()
            if rows[head].get("arrived") in (False, "False")}


def sides(claim, scores):
    """(the sum over the heads with positive weights, that over the others), of logarithms with log. Or ValueError."""
    if claim.get("log") and min(scores.values()) <= 0:
        raise ValueError(f"claim {claim['name']}: log = true does not fit {claim['setting']}, which has {scores}")
    sums = {True: 0.0, False: 0.0}
    for head, weight in claim["contrast"].items():
        sums[weight > 0] += abs(weight) * (math.log(scores[head]) if claim.get("log") else scores[head])
    return sums[True], sums[False]


def measure(claim, design, runs):
    """
    The numbers of a claim, see judge(), without p_holm, verdict and why. A look needs its number of seeds of every
    head, and takes the first ones: more seeds wait for the next look.
    """
    setting = design["settings"][claim["setting"]]
    metric, looks = claim.get("metric", setting["quality"]), tuple(setting["looks"])
    heads = {head: runs.get((claim["setting"], head), {}) for head in claim["contrast"]}
    there = sorted(set.intersection(*map(set, heads.values())))
    look = sum(n <= len(there) for n in looks)
    failed, pairs, late = 0, {}, {1: 0, -1: 0}
    for seed in there[:looks[look - 1]] if look else there:
        rows = {head: of_seed[seed] for head, of_seed in heads.items()}
        failed += sum(has_failed(row, setting["quality"]) for row in rows.values())
        scores = {head: score(row, metric, setting) for head, row in rows.items()}
        signs = late_sides(claim, metric, rows)
        for sign in signs:
            late[sign] += 1
        if None not in scores.values() and len(signs) < 2: # with both sides late nothing is known of the difference
            pairs[seed] = sides(claim, scores)
    result = dict.fromkeys(("estimate", "std", "error", "level", "low", "high", "detectable", "p", "p_overall"))
    result |= {key: claim[key] for key in ("name", "says", "setting", "effect")}
    result |= dict(metric=metric, primary=claim.get("primary", False), look=look, run=len(there), seeds=len(pairs),
                   failed=failed, above=late[1], below=late[-1],
                   values={seed: plus - minus for seed, (plus, minus) in pairs.items()})
    if not pairs:
        return result
    test = metrics.paired(*zip(*pairs.values()))
    mean, std, n = test["mean"], test["std"], test["n"]
    result |= dict(estimate=mean, std=std)
    if look == 0 or not std: # None: one seed, 0: equal differences
        return result
    level = nominal_levels(looks, 1 - design["confidence"])[look - 1]
    error = std * (1 / n + setting.get("test_share", 0)) ** 0.5 # test over training samples, Nadeau and Bengio 2003
    half = float(stats.t.isf(level / 2, n - 1)) * error
    if claim.get("equal"): # two one-sided tests; a sequence of one-sided tests has half the error of a two-sided one
        p = float(stats.t.sf((abs(claim["effect"]) - abs(mean)) / error, n - 1)) # the larger p value of the two
        p_overall = max(p, overall(min(1, 2 * p), looks, look) / 2)
    else:
        p = float(2 * stats.t.sf(abs(mean) / error, n - 1))
        p_overall = overall(p, looks, look)
    return result | dict(error=error, level=level, low=mean - half, high=mean + half, p=p, p_overall=p_overall,
                         detectable=error * detectable(n - 1, level, design["power"]))


def weigh(low, estimate, high, effect):
    """(verdict, why) of an interval, where the claim is an effect above 0 of at least this size."""
    if high < effect:
        where = "falls short of the effect of interest"
        if high < 0:
            where = "is on the other side of 0"
        elif low > 0:
            where = "is on the claim's side, and falls short of the effect of interest"
        return "refuted", f"The whole interval {where}."
    if low <= 0:
        return "inconclusive", "The interval has both 0 and the effect of interest in it."
    if estimate < effect:
        return "inconclusive", "There is a difference on the claim's side, which may be smaller than is of interest."
    return "supported", "The interval is on the claim's side of 0, and the estimate reaches the effect of interest."


def doubt(claim, result, verdict, quality):
    """Return why the runs do not bear this verdict, though their interval does, or None."""
    if result["failed"] and result["metric"] != quality:
        return f"{result['failed']} runs failed, which have no such number: those that are left would decide."
    larger, smaller = result["above"], result["below"] # than was counted; below in the direction of the claim
    if claim["effect"] < 0:
        larger, smaller = smaller, larger
    unsure = smaller if verdict == "supported" else larger
    if claim.get("equal"):
        unsure = larger + smaller
    return f"In {unsure} seeds a head did not arrive, with which the difference could be another." if unsure else None


def decide(claim, result, setting, alpha):
    """(verdict, why) of a claim, given its numbers with p_holm."""
    looks = setting["looks"]
    if result["look"] == 0:
        return "not run yet", f"{result['run']} of the {looks[0]} seeds that the first look needs have run."
    missing = looks[result["look"] - 1] - result["seeds"]
    lacking = f" {missing} seeds lack the number." if missing else ""
    if missing and result["above"] and result["below"]:
        lacking = f" {missing} seeds lack the number, in which heads on both sides of the contrast did not arrive."
    if result["low"] is None:
        reason = "All seeds have the same difference" if result["std"] == 0 else "There are not two seeds"
        return "inconclusive", f"{reason}, which gives no interval.{lacking}"
    effect, sign = abs(claim["effect"]), math.copysign(1, claim["effect"])
    low, high = sorted((sign * result["low"], sign * result["high"]))
    if not claim.get("equal"):
        verdict, why = weigh(low, sign * result["estimate"], high, effect)
    elif low > effect or high < -effect:
        verdict, why = "refuted", "The whole interval is further from 0 than the effect."
    elif result["p_overall"] <= alpha:
        verdict, why = "supported", "Both one-sided tests exclude a difference of that size."
    else:
        verdict, why = "inconclusive", "A difference of that size is not excluded."
    doubtful = doubt(claim, result, verdict, setting["quality"])
    if verdict != "inconclusive" and doubtful:
        return "inconclusive", f"By its interval alone it would be {verdict}. {doubtful}{lacking}"
    if verdict == "supported" and result["p_holm"] > alpha:
        return "inconclusive", f"Alone it would be supported; after Holm p is {result['p_holm']:.3g}.{lacking}"
    if verdict == "inconclusive":
        why += f" {result['seeds']} seeds would have shown the detectable one."
    return verdict, why + lacking


def judge(design, rows):
    """
    A dict per claim, in the order of the design, of
      name, says, setting, metric, primary, effect   as the design has them
      look, run   the number of the look that is reached, 0 before the first; how many seeds all heads have run
      seeds, failed   how many seeds the numbers are of: those of the look with the metric; how many runs failed
      above, below   in how many seeds a head did not arrive at its target, so that the true difference may be above
                  or below what is counted; where heads on both sides did not, it may be either, and counts as none
      estimate, std, error, values   the contrast's mean over seeds, its std (ddof 1), standard error, and {seed: it}
      level, low, high   the nominal two-sided level of this look, and the interval with confidence 1 - level
      p, p_overall, p_holm   of no difference (equal = true: of one as large as the effect) at this look; as an error
                  of all looks together; that, adjusted within the primary claims or within the others
      detectable  what difference this level shows in so many seeds with the design's power, before Holm
      verdict     'supported', 'refuted', 'inconclusive' or 'not run yet', and why, a sentence
    What needs an interval is None before the first look, and where all seeds have the same difference. Supported: the
    interval is on the claim's side of 0, the estimate reaches the effect, and p_holm is at most 1 - confidence.
    Refuted: the whole interval falls short of the effect, which Holm does not correct: a claim whose effect is just
    that of interest is refuted with half the error of its look. With equal = true: two one-sided tests support it, an
    interval beyond +-effect refutes it. Neither, where doubt() finds why the runs do not bear it. Raises ValueError for
    a bad design, a run that is there twice, and a failure for which the design has no score.
    """
    check(design)
    runs = confirmed(rows)
    results = [measure(claim, design, runs) for claim in design.get("claims", [])]
    for primary in (True, False):
        family = [result for result in results if result["primary"] == primary]
        for result, p in zip(family, holm([result["p_overall"] for result in family])):
            result["p_holm"] = p
    for claim, result in zip(design.get("claims", []), results):
        setting = design["settings"][claim["setting"]]
        result["verdict"], result["why"] = decide(claim, result, setting, 1 - design["confidence"])
    return results


def across(design, verdicts):
    """
    A dict per question, of the claims that name it, in units of each one's effect of interest: 0 is no difference, 1
    the effect, so that points of accuracy can stand beside nats. settings, estimate, low, high, tau (the standard
    deviation between settings), verdict, why. Needs statsmodels, or says so.
    It is a random-effects meta-analysis (Paule and Mandel) with t quantiles, as settings are few; a mixed model of all
    seeds would give all settings one variance. The interval is not corrected for looks nor for other questions, and it
    takes settings as independent, which two with the same images are not: it is then too narrow.
    """
    questions = {}
    for claim, result in zip(design.get("claims", []), verdicts):
        if "question" in claim and not claim.get("equal"): # equality has no direction
            questions.setdefault(claim["question"], []).append(result)
    return [pool(question, results, design["confidence"]) for question, results in questions.items()]


def pool(question, results, confidence):
    usable = [result for result in results if result["low"] is not None]
    answer = dict(question=question, settings=[result["setting"] for result in usable], estimate=None, low=None,
                  high=None, tau=None, verdict=None)
    if len(usable) < 3:
        return answer | dict(why="Fewer than three settings have an interval.")
    try:
        from statsmodels.stats.meta_analysis import combine_effects
    except ImportError:
        return answer | dict(why="This takes statsmodels: pip install statsmodels.")
    effects, errors = np.array([(r["estimate"] / r["effect"], r["error"] / r["effect"]) for r in usable]).T
    fit = combine_effects(effects, errors ** 2, method_re="iterated", use_t=True, atol=1e-9)
    low, high = fit.conf_int(alpha=1 - confidence)[1].tolist() # random effects, the errors not scaled down
    verdict, why = weigh(low, fit.mean_effect_re, high, 1)
    return answer | dict(estimate=float(fit.mean_effect_re), low=low, high=high, tau=float(fit.tau2) ** 0.5,
                         verdict=verdict, why=why)


def late_slope(t, norms, margin=0.01):
    """
    Whether the norms (S, T) of S seeds still grow at the end of a run: the slope of each over log2 of the steps t (T,),
    by least squares from a quarter of the last step on, in parts of its mean there. dict of slope, low, high (the
    growth per doubling of the steps, 0.01: 1%, mean over seeds and 95% interval) and verdict: 'grows' (the interval is
    above the margin), 'settles' (below it) or 'undecided', also where there is no interval (one seed, equal slopes).
    What grows as log t keeps its slope at any length, what has a limit loses it. A learning rate that decays to 0 stops
    all norms: only a run with a constant one can tell. The definition is ours.
    """
    t, norms = metrics.array(t, "t"), metrics.array(norms, "norms", 2)
    late = (t > 0) & (t >= t[-1] / 4)
    if late.sum() < 3:
        return dict(slope=None, low=None, high=None, verdict="undecided")
    slopes = np.polyfit(np.log2(t[late]), norms[:, late].T, 1)[0] / norms[:, late].mean(1)
    test = metrics.paired(slopes, np.zeros(len(slopes)))
    low, high, verdict = test["low"], test["high"], "undecided"
    if low is not None and (low > margin or high < margin):
        verdict = "grows" if low > margin else "settles"
    return dict(slope=test["mean"], low=low, high=high, verdict=verdict)
