"""
The verdicts of a study of claims, as pure functions of its design (config/claims.toml, read by tomllib) and of its runs
(rows of runs.csv: dicts of numbers or of their texts). They read no files.

    verdicts = judge(design, rows)     # a dict per claim: supported, refuted or inconclusive, and by what numbers
    answers = across(design, verdicts) # a dict per question that is asked in several settings; needs statsmodels

A claim is a contrast of heads, sum_k weight_k value_k of the same seed, and the smallest effect of interest. It is
decided where the design says that one may look (O'Brien and Fleming 1979), by the paired t test over seeds, and its
family is corrected by Holm (1979). All that is computed here is standard; to apply it here is our choice. Needs scipy.
"""
import math
from functools import lru_cache

import numpy as np
from scipy import optimize, stats

import metrics

NODES, WEIGHTS = np.polynomial.legendre.leggauss(256) # of quadrature on [-1, 1]
REQUIRED = {"name", "says", "setting", "contrast", "effect"}
OPTIONAL = {"metric", "primary", "equal", "log", "question"}

# -----------------------------------------------------------------------------
# looking more than once


def crossing(bound, looks):
    """
    The probability that a random walk of standard normal steps is outside +-bound after one of these numbers of steps.
    The walk's density within the bounds is carried from look to look by quadrature (Armitage, McPherson and Rowe
    1969), which is the multivariate normal probability without its random numbers.
    """
    x_before, mass, before = np.zeros(1), np.ones(1), 0 # all of it starts at 0
    for n in looks:
        scale = min(bound, 9 * n ** 0.5) # beyond 9 standard deviations there is nothing to resolve
        x = scale * NODES
        density = stats.norm.pdf(x[:, None], x_before, (n - before) ** 0.5) @ mass
        x_before, mass, before = x, scale * WEIGHTS * density, n
    return 1 - mass.sum()


@lru_cache
def nominal_levels(looks, alpha):
    """
    The two-sided levels of the looks, a tuple of numbers of seeds, that O'Brien and Fleming give a sequence whose error
    is alpha as a whole: the sum over seeds has the same bound at each look. The levels are for t tests as well, with
    the degrees of freedom of their look (Jennison and Turnbull 2000, section 3.8).
    """
    z = stats.norm.isf(alpha / 2), stats.norm.isf(alpha / 2 / len(looks)) + 0.1
    low, high = (value * looks[-1] ** 0.5 for value in z)
    bound = optimize.brentq(lambda b: crossing(b, looks) - alpha, low - 0.1, high)
    return tuple(float(2 * stats.norm.sf(bound / n ** 0.5)) for n in looks)


def overall(p, looks, look):
    """
    The error alpha of the whole sequence whose nominal level at this look (from 1) is p: a p value that may be compared
    with those of other looks. It is at least p.
    """
    z = stats.norm.isf(max(p, 1e-15) / 2) # the quadrature resolves no less
    return float(max(p, crossing(z * looks[look - 1] ** 0.5, looks))) if z > 0 else 1.0


def holm(p_values):
    """
    The p values of a family adjusted by Holm (1979). None, a claim that has no test yet, counts as 1, as the design
    froze the size of the family; it stays None.
    """
    order = sorted(range(len(p_values)), key=lambda i: 1 if p_values[i] is None else p_values[i])
    adjusted, largest = [None] * len(p_values), 0
    for place, i in enumerate(order):
        if p_values[i] is not None:
            largest = max(largest, min(1, p_values[i] * (len(order) - place)))
            adjusted[i] = largest
    return adjusted


def detectable(df, level, power):
    """
    The mean, in standard errors, that the two-sided t test at this level finds on its side with this power: the root of
    the noncentral t.
    """
    critical = stats.t.isf(level / 2, df)
    return float(optimize.brentq(lambda d: stats.nct.sf(critical, df, d) - power, 0, 10 * critical + 10, xtol=1e-12))

# -----------------------------------------------------------------------------
# what is given


def check(design):
    """Raises ValueError with all that is wrong with the claims of the design, a line for each."""
    problems = []
    heads, settings, names = design.get("heads", {}), design.get("settings", {}), set()
    for key in ("confidence", "power"):
        if not 0.5 < design.get(key, 0) < 1:
            problems.append(f"{key} must be between 0.5 and 1, got {design.get(key)}")
    for claim in design.get("claims", []):
        name = claim.get("name", "without a name")
        missing, unknown = REQUIRED - set(claim), set(claim) - REQUIRED - OPTIONAL
        if missing or unknown:
            problems.append(f"claim {name}: missing keys {sorted(missing)}, unknown keys {sorted(unknown)}")
            continue
        if name in names:
            problems.append(f"claim {name} is there twice")
        names.add(name)
        weights, looks = claim["contrast"], settings.get(claim["setting"], {}).get("looks")
        if claim["setting"] not in settings:
            problems.append(f"claim {name}: there is no setting {claim['setting']!r}")
        elif not looks or looks[0] < 2 or sorted(set(looks)) != looks:
            problems.append(f"setting {claim['setting']}: looks must be ascending numbers of seeds from 2, got {looks}")
        if set(weights) - set(heads):
            problems.append(f"claim {name}: there are no heads {sorted(set(weights) - set(heads))}")
        if len(weights) < 2 or abs(sum(weights.values())) > 1e-9:
            problems.append(f"claim {name}: the weights of a contrast must sum to 0, got {weights}")
        if not math.isfinite(claim["effect"]) or claim["effect"] == 0:
            problems.append(f"claim {name}: effect must be a number other than 0, got {claim['effect']}")
    if problems:
        raise ValueError("\n".join(problems))


def number(cell):
    """The number in a cell of a row, or None where there is none."""
    return None if cell in (None, "") else float(cell)


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


def score(row, metric, setting):
    """
    What a run scores: its metric, or None. A run that failed, or whose quality is not finite, scores what the setting
    says (chance), so that it counts against its head; of what was not measured it has nothing.
    """
    value = None if row["status"] == "failed" else number(row.get(metric))
    bad = row["status"] == "failed" or (value is not None and not math.isfinite(value))
    if not bad:
        return value
    if metric != setting["quality"]:
        return None
    if "failed" not in setting:
        raise ValueError(f"setting {row['setting']}: a run failed, and the design does not say what it scores: "
                         "add failed = the quality of chance")
    return setting["failed"]

# -----------------------------------------------------------------------------
# a claim


def measure(claim, design, runs):
    """
    The numbers of a claim (see judge), without Holm and verdict, and p_overall. A look needs its number of seeds of
    every head, and takes the first ones: more seeds wait for the next look.
    """
    setting = design["settings"][claim["setting"]]
    metric, looks = claim.get("metric", setting["quality"]), tuple(setting["looks"])
    heads = {head: runs.get((claim["setting"], head), {}) for head in claim["contrast"]}
    there = sorted(set.intersection(*map(set, heads.values())))
    look = sum(n <= len(there) for n in looks)
    used = there[:looks[look - 1]] if look else there
    sides = {} # {seed: the positive and the negative side of the contrast}
    for seed in used:
        scores = {head: score(rows[seed], metric, setting) for head, rows in heads.items()}
        if None not in scores.values():
            sides[seed] = sides_of(claim, scores)
    failed = sum(rows[seed]["status"] == "failed" for rows in heads.values() for seed in used)
    result = dict(name=claim["name"], says=claim["says"], setting=claim["setting"], metric=metric,
                  primary=claim.get("primary", False), seeds=len(sides), look=look, level=None, estimate=None, low=None,
                  high=None, effect=claim["effect"], detectable=None, std=None, p=None, p_holm=None, failed=failed,
                  values={seed: plus - minus for seed, (plus, minus) in sides.items()}, run=len(there),
                  p_overall=None)
    if not sides:
        return result
    test = metrics.paired(*zip(*sides.values()))
    mean, std, df = test["mean"], test["std"], len(sides) - 1
    result |= dict(estimate=mean, std=std)
    if look == 0 or not std: # before a look, with one seed, or with equal differences there is no interval
        return result
    level = nominal_levels(looks, 1 - design["confidence"])[look - 1]
    error = std * (1 / len(sides) + setting.get("test_share", 0)) ** 0.5 # Nadeau and Bengio 2003
    half = float(stats.t.isf(level / 2, df)) * error
    if claim.get("equal"): # two one-sided tests, whose sequence has half the error of the two-sided one
        margin = abs(claim["effect"])
        p = float(max(stats.t.sf((mean + margin) / error, df), stats.t.cdf((mean - margin) / error, df)))
        p_overall = max(p, overall(min(1, 2 * p), looks, look) / 2)
    else:
        p = float(2 * stats.t.sf(abs(mean) / error, df))
        p_overall = overall(p, looks, look)
    return result | dict(level=level, low=mean - half, high=mean + half, p=p, p_overall=p_overall,
                         detectable=error * detectable(df, level, design["power"]))


def sides_of(claim, scores):
    """(the sum over the heads with positive weights, that over the others), or of logarithms. Raises ValueError."""
    if claim.get("log"):
        if min(scores.values()) <= 0:
            raise ValueError(f"claim {claim['name']}: no logarithm of {min(scores.values())}, log = true does not fit")
        scores = {head: math.log(value) for head, value in scores.items()}
    terms = [weight * scores[head] for head, weight in claim["contrast"].items()]
    return sum(term for term in terms if term > 0), -sum(term for term in terms if term < 0)


def decide(claim, result, looks, alpha):
    """(verdict, why) of a claim, given its numbers with p_holm."""
    if result["look"] == 0:
        return "not run yet", f"{result['run']} of the {looks[0]} seeds that the first look needs have run."
    if result["low"] is None and result["std"] == 0:
        return "inconclusive", f"All {result['seeds']} seeds have the same difference, which gives no interval."
    if result["low"] is None:
        return "inconclusive", f"{result['seeds']} of {result['run']} seeds have the number, which gives no interval."
    effect, p_holm = abs(claim["effect"]), result["p_holm"]
    sign = 1 if claim["effect"] > 0 else -1
    low, high = sorted((sign * result["low"], sign * result["high"]))
    lost = f"After Holm p is {p_holm:.3g}, which does not support it in its family."
    if claim.get("equal"):
        if low > effect or high < -effect:
            return "refuted", f"The whole interval is further from 0 than {effect:.3g}."
        if p_holm <= alpha:
            return "supported", f"Both one-sided tests exclude a difference of {effect:.3g}."
        if result["p"] <= alpha and -effect < low and high < effect:
            return "inconclusive", lost
        return "inconclusive", f"A difference of {effect:.3g} is not excluded."
    if high < 0:
        return "refuted", "The whole interval is on the other side of 0."
    if high < effect:
        return "refuted", f"The whole interval falls short of the effect of interest, {claim['effect']:+.3g}."
    if low <= 0:
        seen = f"{result['seeds']} seeds would have shown {result['detectable']:.3g}."
        return "inconclusive", f"The interval has both 0 and the effect of interest in it; {seen}"
    if sign * result["estimate"] < effect:
        return "inconclusive", "There is a difference in the claim's direction; it may be smaller than is of interest."
    if p_holm > alpha:
        return "inconclusive", lost
    return "supported", "The interval is on the claim's side of 0, and the estimate reaches the effect of interest."


def judge(design, rows):
    """
    A dict per claim, in the order of the design, of
      name, says, setting, metric, primary, effect   as the design has them
      seeds       how many seeds the numbers are of: those of the look for which all heads have the metric
      look        the number of the look that is reached, 0 before the first; run: how many seeds all heads have run
      level       the nominal two-sided level of this look
      estimate, std, values   the mean of the contrast over seeds, its standard deviation (ddof 1), and {seed: contrast}
      low, high   the interval with confidence 1 - level; p: of no difference, or with equal = true of a difference as
                  large as the effect; all None before the first look and where all seeds have the same difference
      detectable  the least difference that so many seeds would have found, at this level and with the design's power,
                  before Holm's correction
      p_overall   p as an error of all looks together; p_holm: that, adjusted within the primary or the other claims
      failed      how many of the runs failed
      verdict     'supported', 'refuted', 'inconclusive' or 'not run yet', and why, a sentence
    Supported: the interval is on the claim's side of 0, the estimate reaches the effect, and p_holm is at most
    1 - confidence. Refuted: the whole interval falls short of the effect. With equal = true it is supported by two
    one-sided tests, and refuted where the interval excludes all of +-effect. Raises ValueError for a design that is
    not one, and for runs that are there twice or fail without a score.
    """
    check(design)
    claims, runs = design.get("claims", []), confirmed(rows)
    results = [measure(claim, design, runs) for claim in claims]
    for primary in (True, False):
        family = [result for result in results if result["primary"] == primary]
        for result, p in zip(family, holm([result["p_overall"] for result in family])):
            result["p_holm"] = p
    for claim, result in zip(claims, results):
        looks = design["settings"][claim["setting"]]["looks"]
        result["verdict"], result["why"] = decide(claim, result, looks, 1 - design["confidence"])
    return results
