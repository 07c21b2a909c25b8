"""
metrics.py against sklearn, scipy, explicit loops and numbers worked out by hand.

$ pytest tests/test_metrics.py
"""
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

import metrics

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
shapes = pytest.mark.parametrize("N, D", [(200, 30), (40, 70)])


def close(x, **kwargs):
    return pytest.approx(x, **{"rel": 1e-9, "abs": 1e-12, "nan_ok": True, **kwargs})


def features(N, D, seed=0):
    """
    (N, D) of anisotropic features, off the origin and of very different scale, so that centring and standardising each
    change the answer.
    """
    rng = np.random.default_rng(seed)
    mixed = (rng.normal(size=(N, D)) * 0.9 ** np.arange(D)) @ rng.normal(size=(D, D))
    return mixed * 10.0 ** rng.uniform(-2, 2, D) + rng.normal(size=D) * 30


def test_importing_it_costs_numpy_only():
    code = "import sys, metrics; print(sorted({'scipy', 'sklearn', 'torch', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

# -----------------------------------------------------------------------------
# the shape of the features


@shapes
def test_the_spectrum_and_its_shares_are_pca_s(N, D):
    decomposition = pytest.importorskip("sklearn.decomposition")
    h = features(N, D)
    s, pca = metrics.spectrum(h), decomposition.PCA(svd_solver="full").fit(h)
    assert s.shape == (min(N, D),) and (np.diff(s) <= 0).all()
    np.testing.assert_allclose(s, pca.singular_values_, rtol=1e-9, atol=1e-9 * s[0])
    for k in (1, 2, 5, min(N, D)):
        assert metrics.explained_variance(s, k) == close(pca.explained_variance_ratio_[:k].sum())
    assert metrics.explained_variance(s, 1000) == close(1)


@shapes
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_components_are_those_of_pca_on_standardised_features(N, D, share):
    decomposition = pytest.importorskip("sklearn.decomposition")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    h = features(N, D)
    x = metrics.standardised(h)
    np.testing.assert_allclose(x, preprocessing.StandardScaler().fit_transform(h), rtol=1e-7, atol=1e-9)
    k = metrics.components_for(metrics.spectrum(x), share)
    assert type(k) is int and k == decomposition.PCA(n_components=share, svd_solver="full").fit(x).n_components_
    assert k > metrics.components_for(metrics.spectrum(h), share) # standardising decides
    assert metrics.components_for(metrics.spectrum(x), share, cap=2) == 2
    assert metrics.components_for(metrics.spectrum(x), share, cap=50) == min(k, 50)


def test_components_at_the_edges():
    s = np.full(10, 0.3)
    shares = (0.05, 0.1, 0.11, 0.3, 0.7, 0.9, 0.91, 1.0)
    assert [metrics.components_for(s, share) for share in shares] == [1, 1, 2, 3, 7, 9, 10, 10]
    assert metrics.components_for([2, 1], 0.8) == 1
    assert metrics.components_for([2, 1], 0.81) == 2 # 4/5 of the variance, not 2/3
    assert metrics.components_for([3, 1, 0, 0], 1.0) == 2
    assert metrics.explained_variance([3e200, 1e200], 1) == close(0.9)
    for n in range(2, 40): # whatever the rounding of 1/n and of its sums
        assert [metrics.components_for(np.full(n, 0.3), k / n) for k in range(1, n + 1)] == list(range(1, n + 1))


def test_constant_features_are_as_good_as_absent():
    h = features(50, 6)
    more = np.insert(h, [2, 4], [0.1, 1e6], axis=1)
    x = metrics.standardised(more)
    assert not x[:, [2, 5]].any() and np.isfinite(x).all()
    np.testing.assert_allclose(metrics.spectrum(x)[:6], metrics.spectrum(metrics.standardised(h)), rtol=1e-9)


def test_the_spectrum_keeps_its_tail_and_ignores_an_offset():
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(40, 40)))[0] for _ in range(2))
    u = np.linalg.qr(u[:, :4] - u[:, :4].mean(0))[0] # orthonormal columns of mean 0
    s = np.array([1, 1e-3, 1e-9, 1e-11])
    np.testing.assert_allclose(metrics.spectrum((u * s) @ v[:4])[:4], s, rtol=1e-3) # eigenvalues of h^T h end at 1e-8
    h = rng.integers(-8, 8, (30, 5)) / 8
    np.testing.assert_allclose(metrics.spectrum(h + 2.0 ** 40), metrics.spectrum(h), rtol=1e-12)


def test_effective_rank():
    for D in (4, 11):
        eye = np.eye(D) # centred, its spectrum is 1 (D - 1 times) and 0
        assert metrics.effective_rank(metrics.spectrum(eye)) == close(D - 1)
        assert metrics.collapse_score(metrics.spectrum(eye)) == close(1 / D)
        s = metrics.spectrum(np.concatenate([eye, -eye])) # of mean 0: D times sqrt 2
        assert s == close(2 ** 0.5) and metrics.effective_rank(s) == close(D) and metrics.collapse_score(s) == close(0)
    line = metrics.spectrum(np.outer(np.arange(9.0), np.arange(1.0, 6.0)) + 7)
    assert metrics.effective_rank(line) == close(1) and metrics.collapse_score(line) == close(0.8)
    assert metrics.effective_rank([3, 1]) == close(0.75 ** -0.75 * 0.25 ** -0.25) # 3/4 and 1/4, not their squares
    assert metrics.effective_rank([3, 1, 0]) == close(metrics.effective_rank([3e200, 1e200]))
    assert metrics.collapse_score([5, 0]) == close(0.5)


def test_collapsed_features_have_nothing_to_explain():
    h = np.full((50, 7), 0.1, dtype=np.float32) + np.arange(7, dtype=np.float32) # no mean of it is exact
    s = metrics.spectrum(h)
    assert s.shape == (7,) and not s.any()
    assert math.isnan(metrics.explained_variance(s, 5))
    assert metrics.effective_rank(s) == 0
    assert metrics.collapse_score(s) == 1
    assert metrics.components_for(metrics.spectrum(metrics.standardised(h))) == 0

# -----------------------------------------------------------------------------
# the course of the training


def test_gradient_stability():
    assert metrics.gradient_stability([0.1] * 7) == 1 and metrics.gradient_stability([3.0]) == 1
    assert metrics.gradient_stability([1, 3]) == close(1 / 1.5) # mean 2, std 1 (ddof 0)
    assert metrics.gradient_stability([1, 1, 4]) == close(1 / (1 + 2 ** 0.5 / 2))
    assert metrics.gradient_stability([10, 10, 40]) == close(1 / (1 + 2 ** 0.5 / 2))
    assert math.isnan(metrics.gradient_stability([0, 0]))


def test_clipping_quality():
    assert metrics.clipping_quality([0.5, 1, 2, 4], 1.0) == close((1 + 1 + 1 / 2 + 1 / 4) / 4)
    assert metrics.clipping_quality([0, 0.5, 1], 1.0) == 1 and metrics.clipping_quality([0, 1e9], 0) == 1
    assert metrics.clipping_quality([4, 4], 0.1) == close(0.025)


def test_learning_quality():
    assert metrics.learning_quality(4, 1, math.e ** 2) == close((3 / 4 + 1 / 2) / 2)
    assert metrics.learning_quality(10, 5, 2) == close((1 / 2 + 0) / 2) # worse than a guess: 1 - 5 / log 2 < 0
    assert metrics.learning_quality(1, 2, math.e ** 8) == close((0 + 3 / 4) / 2) # worse than its beginning
    assert metrics.learning_quality(2, 0, 10) == 1 and metrics.learning_quality(3, 9, 2) == 0


def test_time_to():
    steps, values = [0, 10, 20, 30, 40, 50], [10, 6, 3, 1.2, 1, 0] # 90% of the way is at 1
    assert metrics.time_to(steps, values) == 40 and type(metrics.time_to(steps, values)) is int
    assert metrics.time_to(steps, values, share=0.5) == 20 and metrics.time_to(steps, values, 1) == 50
    assert metrics.time_to([0, 1e-3, 3e-3], [4, 1.1, 1]) == 1e-3 # kWh
    assert metrics.time_to([0, 1, 2, 3, 4], [5, 7, 1, 3, 1]) == 2 # the first time, whatever follows
    assert metrics.time_to([0, 1, 2], [5, 1, 50]) == 1 # v_best, not the last value
    assert metrics.time_to([0, 1, 2], [5, 5, 6]) is None and metrics.time_to([3], [1]) is None
    for seed in range(200): # v_0 - (v_0 - v_best) may round to less than v_best
        v = np.random.default_rng(seed).random(5) * 10 + [20, 0, 0, 0, 0]
        assert metrics.time_to(range(5), v, 1.0) == v.argmin()

# -----------------------------------------------------------------------------
# classes and their prototypes


def test_prototype_alignment():
    eye = np.eye(5)
    assert metrics.prototype_alignment(eye) == 1 == metrics.prototype_alignment(-10 - 1 / (eye + 0.1))
    assert metrics.prototype_alignment(eye[[1, 0, 2, 3, 4]]) == close(3 / 5)
    assert metrics.prototype_alignment(eye[[1, 2, 3, 4, 0]]) == 0
    assert metrics.prototype_alignment([[3, 2, 1], [3, 2, 1], [0, 0, 1]]) == close(2 / 3) # by rows; by columns it is 1
    assert metrics.prototype_alignment(np.zeros((4, 4))) == 0 # all prototypes the same
    eye[1] = np.nan
    assert metrics.prototype_alignment(eye[[0, 1, 3, 2, 4]]) == close(2 / 4) # four classes have samples


def test_class_means():
    h, y = features(60, 4), np.random.default_rng(1).integers(0, 5, 60)
    y[y == 3] = 2
    means = metrics.class_means(h, y, 6)
    for c in (0, 1, 2, 4):
        np.testing.assert_allclose(means[c], h[y == c].mean(0), rtol=1e-12)
    assert means.shape == (6, 4) and np.isnan(means[[3, 5]]).all()


def test_nearest_prototype_of_class_means_end_to_end():
    w = np.random.default_rng(0).normal(size=(4, 3))
    y = np.repeat([0, 1, 3], 10) # class 2 has no samples
    h = w[y] + 0.01 * np.random.default_rng(1).normal(size=(30, 3))

    def z(means):
        return -np.linalg.norm(means[:, None] - w, axis=-1)
    assert metrics.prototype_alignment(z(metrics.class_means(h, y, 4))) == 1
    assert metrics.prototype_alignment(z(metrics.class_means(h, np.repeat([1, 0, 3], 10), 4))) == close(1 / 3)


def test_class_variance_by_a_loop():
    h, y = features(80, 6), np.random.default_rng(1).integers(0, 4, 80) * 7
    y[[5, 50]] = 3, 100 # one sample each: they must not count, neither in the means nor in the number
    h[[5, 50]] += 1e4
    kept = [i for i in range(80) if i not in (5, 50)]
    mu = sum(h[i] for i in kept) / 78
    intra = inter = 0
    for i in kept:
        mine = [h[j] for j in kept if y[j] == y[i]]
        centre = sum(mine) / len(mine)
        intra += ((h[i] - centre) ** 2).sum() / 78
        inter += ((centre - mu) ** 2).sum() / 78
    expected = dict(intra=intra, inter=inter, ratio=intra / inter, samples=78, classes=4)
    got = metrics.class_variance(h, y)
    assert got == {key: close(value) for key, value in expected.items()}
    assert got["intra"] + got["inter"] == close(h[kept].var(0).sum())
    json.dumps(got) # plain numbers


def test_class_variance_by_hand():
    h = [[0, 0], [2, 0], [10, 0], [12, 0], [14, 0]] # means 1 and 12, of all 7.6
    expected = dict(intra=2, inter=(2 * 6.6 ** 2 + 3 * 4.4 ** 2) / 5, ratio=2 / 29.04, samples=5, classes=2)
    assert metrics.class_variance(h, [0, 0, 1, 1, 1]) == close(expected)
    one = metrics.class_variance(np.array(h) + 0.1, [4] * 5)
    assert one["inter"] == 0
    assert math.isnan(one["ratio"])
    assert one["intra"] == close(np.var([0, 2, 10, 12, 14]))
    assert one["classes"] == 1
    # where a sum and a mean round differently
    assert math.isnan(metrics.class_variance(np.random.default_rng(0).normal(size=(1001, 50)), [4] * 1001)["ratio"])
    apart = metrics.class_variance([[0.1], [0.1], [0.3], [0.3]], [0, 0, 1, 1])
    assert apart["intra"] == 0 == apart["ratio"] and apart["inter"] == close(0.01)
    # all rows are the same, but for one that does not count
    collapsed = metrics.class_variance([[5]] + [[0.1]] * 7, [9, 0, 0, 0, 1, 1, 1, 1])
    assert collapsed["intra"] == collapsed["inter"] == 0 and math.isnan(collapsed["ratio"])
    # no class has two samples
    nothing = dict(intra=math.nan, inter=math.nan, ratio=math.nan, samples=0, classes=0)
    assert metrics.class_variance(h, range(5)) == close(nothing)


def test_active_ratio():
    assert metrics.active_ratio([4, 2.1, 2, 0.1]) == 0.5 # half of the largest is not more than half of it
    assert metrics.active_ratio([4, 2.1, 2, 0.1], 0.01) == 1 and metrics.active_ratio([4, 2.1, 2, 0.1], 0.6) == 0.25
    assert metrics.active_ratio([0, 0, 1e-30, 1e-31], 0) == 0.5
    assert metrics.active_ratio([0.3] * 7) == 1 and math.isnan(metrics.active_ratio([0, 0]))
    norms = np.random.default_rng(0).random(50)
    assert metrics.active_ratio(norms) == metrics.active_ratio(1e6 * norms) # whatever the loss's scale


def test_active_ratio_separates_heads_that_the_share_of_wrong_probability_does_not():
    """Two heads that are far from certain of every sample: one pulls on all of them alike, one on a few."""
    torch = pytest.importorskip("torch")
    from distances import DistanceHead
    torch.manual_seed(0)
    y = torch.arange(200) % 5
    h = 4 * torch.eye(8)[y] + torch.randn(200, 8)
    ratios = {}
    for distance, n in (("euclidean", 1.0), ("baseline", 1.0)):
        head = DistanceHead(8, 5, distance, n=n)
        head.weight.data = (4 if distance == "euclidean" else 0.6) * torch.eye(5, 8)
        x = h.clone().requires_grad_()
        nll = torch.nn.functional.cross_entropy(head(x), y, reduction="none")
        gradient, = torch.autograd.grad(nll.sum(), x)
        assert (1 - (-nll).exp() > 0.01).double().mean() > 0.98 # the old threshold
        ratios[distance] = metrics.active_ratio(gradient.norm(dim=1).numpy())
    assert ratios["baseline"] < ratios["euclidean"] - 0.2


def test_classification_by_hand():
    pytest.importorskip("sklearn")
    # class 3 occurs nowhere: it has a row of zeros, and no part in F1
    got = metrics.classification([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2], 4)
    assert got == dict(accuracy=close(4 / 6), f1_macro=close((4 / 5 + 1 / 2 + 2 / 3) / 3),
                       confusion=[[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    assert type(got["confusion"]) is list and json.loads(json.dumps(got)) == got
    # a class that is never predicted has F1 0
    assert metrics.classification([0, 0, 0, 1], [0, 0, 0, 0], 2)["f1_macro"] == close((6 / 7 + 0) / 2)

# -----------------------------------------------------------------------------
# comparisons


@pytest.mark.parametrize("value, base, lower_is_better, expected", [
    (50, 9, True, -455.56), (9, 50, True, 82.0), (0.81, 0.9, False, -10.0), (0.99, 0.9, False, 10.0),
    (3, 2, True, -50.0), (2, 2, True, 0.0), (-1, -2, False, 50.0)])
def test_percent_change(value, base, lower_is_better, expected):
    assert metrics.percent_change(value, base, lower_is_better) == pytest.approx(expected, abs=0.005)


def test_percent_change_of_nothing():
    assert math.isnan(metrics.percent_change(1, 0)) and math.isnan(metrics.percent_change(0, 0, True))


def test_paired_by_hand():
    stats = pytest.importorskip("scipy.stats")
    t = 2 / (1 / 3 ** 0.5) # differences 1, 2, 3; with 2 degrees of freedom p and quantile have closed forms
    half = 4.302652729911275 / 3 ** 0.5
    assert metrics.paired([11, 22, 33], [10, 20, 30]) == close(
        dict(n=3, mean=2, std=1, t=t, p=1 - t / (t ** 2 + 2) ** 0.5, effect_size=2, low=2 - half, high=2 + half))
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 8)) + 5
    got, test = metrics.paired(a, b), stats.ttest_rel(a, b)
    assert (got["t"], got["p"]) == close((test.statistic, test.pvalue))
    assert (got["low"], got["high"]) == close(tuple(test.confidence_interval(0.95)))
    assert got["effect_size"] == close((a - b).mean() / (a - b).std(ddof=1))
    assert got["p"] != pytest.approx(stats.ttest_ind(a, b).pvalue)
    assert metrics.paired(b, a)["t"] == close(-got["t"])
    json.dumps(got, allow_nan=False)


def test_paired_without_a_test():
    no_test = dict(t=None, p=None, effect_size=None, low=None, high=None)
    assert metrics.paired([3], [1.5]) == dict(n=1, mean=1.5, std=None, **no_test)
    for values, baseline, mean in (([2, 3, 4], [1, 2, 3], 1), ([0.3, 0.5], [0.2, 0.4], 0.1), ([7, 8], [7, 8], 0)):
        # the differences are equal up to rounding
        assert metrics.paired(values, baseline) == dict(n=len(values), mean=close(mean), std=0, **no_test)
    assert metrics.paired([0.3, 0.5 + 1e-9], [0.2, 0.4])["p"] < 1e-6 # small, and real


def test_corrected_is_the_example_of_benjamini_and_hochberg():
    pytest.importorskip("scipy")
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590,
         1.0]
    expected = [0.0015, 0.003, 0.0095, 0.035625, 0.0603, 0.0298 * 15 / 7, 0.0298 * 15 / 7, 0.0645, 0.0765, 0.486,
                0.4262 * 15 / 11, 0.714875, 0.6528 * 15 / 13, 0.759 * 15 / 14, 1.0]
    assert metrics.corrected(p) == close(expected) and sum(q < 0.05 for q in metrics.corrected(p)) == 4
    order = np.random.default_rng(0).permutation(15)
    mixed, answer = [[x[i] for i in order] for x in (p, expected)]
    for x in mixed, answer:
        x[3:3], x[10:10] = [None], [None, None]
    got = metrics.corrected(mixed)
    assert [q is None for q in got] == [q is None for q in answer] and got.count(None) == 3
    assert [q for q in got if q is not None] == close([q for q in answer if q is not None])
    assert metrics.corrected([None, None]) == [None, None] and metrics.corrected((0.2, None)) == [close(0.2), None]

# -----------------------------------------------------------------------------
# bad input


NAN, INF, H = float("nan"), float("inf"), [[0, 1], [1, 0], [2, 2]]

BAD = {
    "spectrum": [
        (([[0, NAN], [1, 1]],), "finite"), ((np.zeros((0, 3)),), "empty"), ((np.zeros((3, 0)),), "empty"),
        (([1, 2, 3],), "2-dimensional"), (([[1, 2]],), "one row"), (([[1, 2], [3]],), "numbers"), (({},), "numbers"),
        (([["a"]],), "numbers")],
    "standardised": [(([[INF], [1]],), "finite")],
    "explained_variance": [
        ((H, 2), "1-dimensional"), (([1, 2], 1), "descending"), (([1, -1], 1), "singular"), (([2, 1], 0), "k must"),
        (([2, 1], 1.5), "k must")],
    "components_for": [(([2, 1], 90), "share"), (([2, 1], 0), "share"), (([2, 1], 0.9, 0), "cap"), (([],), "empty")],
    "effective_rank": [(([NAN, 1],), "finite"), (([],), "empty")],
    "collapse_score": [(([1, 2],), "descending")],
    "gradient_stability": [
        (([],), "empty"), (([1, INF],), "finite"), (([1, -1],), "negative"), (([1, None],), "finite")],
    "clipping_quality": [
        (([1, NAN], 1), "finite"), (([1], -1), "grad_clip"), (([1], INF), "grad_clip"), (([-1], 1), "negative")],
    "learning_quality": [
        ((NAN, 1, 10), "finite"), ((1, [1], 10), "0-dimensional"), ((0, 0, 10), "loss_0"),
        ((1, -1, 10), "loss_best"), ((1, 1, 1), "two classes")],
    "time_to": [
        (([0, 1], [1]), "2 steps"), (([0, 1], [1, NAN]), "finite"), (([], []), "empty"),
        (([1, 0], [2, 1]), "ascending"), (([0, 1], [2, 1], 90), "share")],
    "class_means": [
        ((H, [0, 1], 3), "2 for 3"), ((H, [0, 1, 3], 3), "0 to 2"), ((H, [0, 1, -1], 3), "ignored"),
        ((H, [0., 1., 1.], 3), "integers")],
    "prototype_alignment": [
        (([[1, 0, 0], [0, 1, 0]],), r"\(K, K\)"), (([[1]],), "K >= 2"), (([[1, NAN], [0, 1]],), "finite"),
        (([[NAN, NAN]] * 2,), "all scores")],
    "class_variance": [((H, [0, 1]), "2 for 3"), (([[NAN], [1]], [0, 0]), "finite"), ((H, [0, 0, -100]), "ignored")],
    "active_ratio": [
        (([],), "empty"), (([1, INF],), "finite"), (([-1],), "negative"), (([1], 1.0), "fraction"),
        (([[1]],), "1-dimensional")],
    "classification": [
        (([], [], 2), "integers"), (([0, 1], [0], 2), "1 for 2"), (([0, 2], [0, 1], 2), "y must"),
        (([0, 1], [0, 2], 2), "predicted must")],
    "percent_change": [((NAN, 1), "value"), ((1, INF), "base"), ((1, None), "base"), (([1], 1), "0-dimensional")],
    "paired": [
        (([1, 2], [1]), "2 values and 1"), (([], []), "empty"), (([1, NAN], [1, 2]), "finite"),
        (([1, 2], [1, None]), "baseline")],
    "corrected": [
        (([],), "empty"), (([0.5, NAN],), "finite"), (([0.5, 1.5],), r"\[0, 1\]"), (([None, -0.1],), r"\[0, 1\]")],
}


BAD_CASES = [(function, *case) for function, cases in BAD.items() for case in cases]


@pytest.mark.parametrize("function, args, message", BAD_CASES)
def test_bad_input_is_refused(function, args, message):
    if function == "classification":
        pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match=message):
        getattr(metrics, function)(*args)


def test_nothing_given_is_changed():
    h, y, scores, norms = features(9, 3), np.arange(9) % 3, np.eye(4), np.array([2.0, 1.0])
    before = [x.copy() for x in (h, y, scores, norms)]
    for function, args in ((metrics.spectrum, (h,)), (metrics.standardised, (h,)), (metrics.class_means, (h, y, 3)),
                           (metrics.class_variance, (h, y)), (metrics.prototype_alignment, (scores,)),
                           (metrics.gradient_stability, (norms,)), (metrics.clipping_quality, (norms, 1.0)),
                           (metrics.explained_variance, (norms, 1)), (metrics.effective_rank, (norms,))):
        function(*args)
    assert all(np.array_equal(a, b) for a, b in zip((h, y, scores, norms), before))


def test_the_nearest_mean_and_the_offset_by_hand():
    others = [[math.inf, 2], [math.inf, 1], [3, math.inf], [0.5, math.inf]]
    assert metrics.mean_accuracy([1, 1, 1, 1], others) == 0.5 # nearer, a tie, nearer, farther
    assert metrics.prototype_offset([1, 3], [2, 2]) == 1.0 and metrics.prototype_offset([0, 0], [1, 5]) == 0
    assert math.isnan(metrics.prototype_offset([1, 3], [2, 0]))
    for wrong in ([1, 1], [[1, 1]]), ([1], [[math.nan, 2]]), ([1], [2]):
        with pytest.raises(ValueError, match="1 samples take|2 samples take"):
            metrics.mean_accuracy(*wrong)
    with pytest.raises(ValueError, match="2 prototypes have 1 spreads"):
        metrics.prototype_offset([1, 2], [1])
