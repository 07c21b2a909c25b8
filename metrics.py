"""
The definition of every reported number, as pure functions of numpy arrays. They read no files and need no torch:
convert tensors first, with h.float().cpu().numpy().

    s = metrics.spectrum(h) # one SVD of the hidden states h (N, D); the rest follows from it
    ev, rank = metrics.explained_variance(s, 5), metrics.effective_rank(s)
    pca90 = metrics.components_for(metrics.spectrum(metrics.standardised(h)), cap=50)

The table METRICS, in metrics_table.py, gives each number of the report its title, its direction and its definition in
words.

"The paper" is Non-Euclidean Harmonic Losses. It names most of these numbers and gives formulas for none, so that each
docstring says whose definition it is; compare with the paper's tables in direction, not digit by digit.

Everything is computed in float64. Every function raises ValueError for input that is empty, not finite (nan from a
diverged run, None from a missing one) or of another shape than its docstring says; this is not repeated below. A number
that its formula leaves undefined for good input (0/0) is nan, or None where there is no test to report; the docstring
says where that can happen.
"""
import numpy as np

from metrics_table import METRICS, PAIRED_TEST, TABLES  # noqa: F401 a part of this file that has become long


def array(x, what, ndim=1):
    """x as a finite float64 array of `ndim` dimensions, none of them empty. The ValueError's message names `what`."""
    try:
        x = np.asarray(x, dtype=np.float64)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{what} must be an array of numbers: {e}") from e
    if x.ndim != ndim or x.size == 0:
        raise ValueError(f"{what} must be {ndim}-dimensional and not empty, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{what} must be finite, {np.count_nonzero(~np.isfinite(x))} of {x.size} values are not")
    return x


def labels(y, what, size=None, num_classes=None):
    """y as an int64 array (N,) of class ids from 0 to num_classes - 1, with N = size where a size is given."""
    y = np.asarray(y)
    if y.ndim != 1 or y.size == 0 or y.dtype.kind not in "iu":
        raise ValueError(f"{what} must be integers of shape (N,), N > 0, got {y.dtype} of shape {y.shape}")
    if size is not None and len(y) != size:
        raise ValueError(f"{what} must have one entry per sample, got {len(y)} for {size}")
    y = y.astype(np.int64)
    if y.min() < 0 or (num_classes is not None and y.max() >= num_classes):
        last = "..." if num_classes is None else num_classes - 1
        raise ValueError(f"{what} must be class ids from 0 to {last}, got {y.min()} to {y.max()} "
                         "(drop ignored positions first)")
    return y


def rows(h):
    """
    h (N, D) with N >= 2, less its first row: means and variances then lose no digits to a large offset, and rows that
    are equal give exact zeros.
    """
    h = array(h, "h", 2)
    if len(h) < 2:
        raise ValueError("h has one row, variance needs two")
    return h - h[0]

# -----------------------------------------------------------------------------
# the shape of the features


def spectrum(h):
    """
    The singular values (min(N, D),) of the centred rows of h (N, D), descending, in the units of h. s_i^2 / N are the
    variances along the principal components. They come from an SVD, as the Gram matrix would square the condition
    number and drown the tail below 1e-8 s_0.
    """
    h = rows(h)
    return np.linalg.svd(h - h.mean(0), compute_uv=False)


def standardised(h):
    """
    (N, D): every feature of h (N, D) centred and divided by its standard deviation (ddof 0), as sklearn's
    StandardScaler does. A constant feature has no variance to standardise and becomes 0, which is the same as
    dropping it.
    """
    h = rows(h)
    h = h - h.mean(0)
    std = h.std(0)
    return h / np.where(std > 0, std, 1)


def shares(s):
    """The principal components' shares of the variance (K,), s_i^2 / sum s^2, or None when all of s (K,) is 0."""
    s = array(s, "the spectrum")
    if s.min() < 0 or (np.diff(s) > 0).any():
        raise ValueError("the spectrum must be singular values in descending order, take them from spectrum(h)")
    if s[0] == 0:
        return None
    v = (s / s[0]) ** 2 # divided first, as the squares of large values overflow
    return v / v.sum()


def explained_variance(s, k):
    """
    The top k principal components' share of the variance, sum_{i<k} s_i^2 / sum_i s_i^2, in [0, 1], of s = spectrum(h).
    It is 1 for k >= len(s). The paper's names are PCA5 (k=5, final hidden states) and PC2 EV (k=2, penultimate
    features); the definition, which is PCA's, and that the features are not standardised first, are ours. nan when
    all rows of h are equal: there is no variance to share out, and 1 would give a collapsed model the best score.
    """
    if k < 1 or k != int(k):
        raise ValueError(f"k must be an integer of 1 or more, got {k}")
    v = shares(s)
    return float("nan") if v is None else float(v[:int(k)].sum() / v.sum())


def components_for(s, share=0.9, cap=None):
    """
    The least number of principal components that together hold `share` of the variance, an int:
    min {k: sum_{i<k} s_i^2 >= share sum_i s_i^2}. No more than cap are counted (the paper's tables stop at 50). 0 when
    there is no variance.
    The paper's PCA@90% is s = spectrum(standardised(h)), share=0.9; the paper names it, the definition is ours.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    if cap is not None and cap < 1:
        raise ValueError(f"cap must be 1 or more, got {cap}")
    v = shares(s)
    if v is None:
        return 0
    total = np.cumsum(v)
    wanted = share * total[-1] * (1 - 1e-12) # nine of ten equal components hold 0.9, whatever the rounding
    k = int(np.searchsorted(total, wanted)) + 1
    return k if cap is None else min(k, cap)


def effective_rank(s):
    """
    exp(H(p)) with p_i = s_i / sum s and H the entropy in nats, of s = spectrum(h): between 1 and the rank of the
    centred features. The definition is Roy and Vetterli's (2007), who take the singular values, not the variances,
    for p. The paper names an effective rank; that it is this one is our reading. 0 when all of s is 0: this is the
    rank of the zero matrix, for which Roy and Vetterli define none.
    """
    if shares(s) is None:
        return 0.0
    p = array(s, "the spectrum")
    p = p[p > 0] / p[0] # 0 log 0 = 0
    p = p / p.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def collapse_score(s):
    """
    1 - effective_rank(s) / min(N, D), in [0, 1], of s = spectrum(h), whose length is min(N, D); 1 is complete collapse.
    The paper names it, the definition is ours. Compare it at equal N and D only: with N <= D it cannot reach 0, as
    centring takes one dimension.
    """
    return 1 - effective_rank(s) / len(s)

# -----------------------------------------------------------------------------
# the course of the training


def gradient_norms(norms):
    """The norms (T,) as an array. Leave out steps that a loss scaler skipped: they have inf, and were not taken."""
    norms = array(norms, "the gradient norms")
    if norms.min() < 0:
        raise ValueError(f"gradient norms cannot be negative, got {norms.min()}")
    return norms


def gradient_stability(norms):
    """
    1 / (1 + std/mean), ddof 0, of the gradient norms before clipping (T,), in (0, 1]; 1 is constant. Pass the logged
    steps after warm-up, as the large first gradients are no instability. The paper names it, the definition is ours.
    nan when every norm is 0.
    """
    norms = gradient_norms(norms)
    if norms.max() == 0:
        return float("nan")
    norms = norms / norms.max() # exactly 1 for a constant, so that its std is exactly 0
    return float(1 / (1 + norms.std() / norms.mean()))


def clipping_quality(norms, grad_clip):
    """
    The mean over the logged steps of min(1, grad_clip / g_t), the factor that clipping leaves of each gradient, with
    the norms g (T,) before clipping. It is in (0, 1], and 1 when nothing was clipped or grad_clip is 0 (no clipping).
    The paper names it, the definition is ours.
    """
    norms = gradient_norms(norms)
    if not 0 <= grad_clip < float("inf"):
        raise ValueError(f"grad_clip must be 0 (none) or positive, got {grad_clip}")
    return 1.0 if grad_clip == 0 else float((grad_clip / np.maximum(norms, grad_clip)).mean())


def learning_quality(loss_0, loss_best, num_classes):
    """
    The mean of two numbers, each clipped to [0, 1]: (L_0 - L_best) / L_0, the share of its first loss that the run took
    off, and 1 - L_best / log V, how far it came from guessing among V = num_classes. L are validation losses in nats.
    The second number does not depend on the initial loss, which differs between heads. The paper names it, the
    definition is ours.
    """
    loss_0, loss_best = float(array(loss_0, "loss_0", 0)), float(array(loss_best, "loss_best", 0))
    if loss_0 <= 0 or loss_best < 0 or num_classes < 2:
        raise ValueError("it takes loss_0 > 0, loss_best >= 0 and two classes, "
                         f"got {loss_0}, {loss_best} and {num_classes}")
    parts = (loss_0 - loss_best) / loss_0, 1 - loss_best / np.log(num_classes)
    return float(np.clip(parts, 0, 1).mean())


def time_to(steps, values, share=0.9):
    """
    The first of the steps (T,) at which the values v (T,) have come down to v_0 - share (v_0 - v_best): when `share` of
    all progress was made. Lower v is better: the validation loss, or the error rate = 1 - accuracy for vision. v_0 is
    the first value, v_best the least. The steps may be anything that does not fall: tokens, seconds, or kWh for the
    energy of that progress, time_to(energies, losses). None when v never falls below v_0. The paper names a time to
    90%, the definition is ours.
    """
    t, v = array(steps, "steps"), array(values, "values")
    if len(t) != len(v):
        raise ValueError(f"{len(t)} steps have {len(v)} values")
    if (np.diff(t) < 0).any():
        raise ValueError("steps must be in ascending order")
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    if v.min() >= v[0]:
        return None
    target = max(v[0] - share * (v[0] - v.min()), v.min()) # rounding must not put it below the best
    return np.asarray(steps)[np.argmax(v <= target)].item() # an int step stays an int


def first_above(epochs, values, level, window):
    """
    The first of the ascending epochs (T,), as an int, for which the values (T,) from it up to `window` epochs later are
    above the level on average; None where there is none. A window that the last epoch cuts short does not count.
    """
    epochs, values = array(epochs, "epochs"), array(values, "values")
    for e in epochs[epochs + window <= epochs[-1]]:
        if values[(epochs >= e) & (epochs <= e + window)].mean() > level:
            return int(e)
    return None

# -----------------------------------------------------------------------------
# classes and their prototypes


def circularity(h):
    """
    How far points h (N, D) are from a circle around their mean in the plane of their top two principal components: the
    standard deviation of the radius over its mean. 0 is a circle.
    """
    h = rows(h)
    _, _, axes = np.linalg.svd(h - h.mean(0), full_matrices=False)
    radius = np.linalg.norm((h - h.mean(0)) @ axes[:2].T, axis=1)
    return float(radius.std() / radius.mean())


def sums_by_class(h, y):
    """(classes (C,) ascending, the index (N,) of each sample's class among them, counts (C,), sums of h (C, D))"""
    classes, index, counts = np.unique(y, return_inverse=True, return_counts=True)
    order = np.argsort(index, kind="stable")
    return classes, index, counts, np.add.reduceat(h[order], np.cumsum(counts) - counts, axis=0)


def class_means(h, y, num_classes):
    """
    (num_classes, D): the mean of the features h (N, D) over each class, y (N,). A class without samples has no mean.
    Its row is nan, which goes through a head as nan and which prototype_alignment leaves out; zeros would be a point
    like any other.
    """
    h = array(h, "h", 2)
    classes, _, counts, sums = sums_by_class(h, labels(y, "y", len(h), num_classes))
    means = np.full((num_classes, h.shape[1]), np.nan)
    means[classes] = sums / counts[:, None]
    return means


def prototype_alignment(scores):
    """
    The share of the classes whose mean feature is nearest to their own prototype. Row j of the scores (K, K) holds the
    head's scores z at the mean feature of class j, and counts when z_jj is larger than every other score of the row. z
    falls with the distance, so that "nearest" is meant in the head's own distance, and the linear head is judged
    alike. A tie is a miss, or prototypes that are all the same would be aligned. Rows of nan only belong to classes
    without samples (class_means) and do not count. The paper names it, the definition is ours.
    """
    scores = np.array(scores, dtype=np.float64) # a copy, changed below
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or len(scores) < 2:
        raise ValueError(f"scores must be (K, K), K >= 2, got shape {scores.shape}")
    there = ~np.isnan(scores).all(1)
    if not there.any():
        raise ValueError("all scores are nan")
    array(scores[there], "scores", 2)
    own = scores.diagonal().copy()
    np.fill_diagonal(scores, -np.inf)
    return float((own[there] > scores[there].max(1)).mean())


def class_variance(h, y):
    """
    How tight the classes are in feature space, for features h (N, D) of the classes y (N,): dict of
      intra     the mean over samples of |h_i - mu_{y_i}|^2, with mu_c the mean of class c
      inter     the mean over samples of |mu_{y_i} - mu|^2, with mu the mean of all samples that count
      ratio     intra / inter, lower is tighter; nan when there is one class, or all means coincide
      samples, classes   how many counted
    intra + inter is the total variance. Only classes of two samples and more count: one sample is its own mean, and a
    language model's rare tokens would look like collapse. Without such a class all three numbers are nan.
    This stands for the "variance" of Variance & Greediness (arXiv 2601.21450), whose exact formulas are not available
    to us: the definition is ours.
    """
    h = rows(h)
    y = labels(y, "y", len(h))
    _, index, counts, _ = sums_by_class(h, y)
    keep = counts[index] >= 2
    if not keep.any():
        return dict(intra=float("nan"), inter=float("nan"), ratio=float("nan"), samples=0, classes=0)
    h = h[keep] - h[keep][0] # as rows() does, now that the first row may be another
    classes, index, counts, sums = sums_by_class(h, y[keep])
    means = sums / counts[:, None]
    intra = float(((h - means[index]) ** 2).sum(1).mean())
    inter = float(((means - h.mean(0)) ** 2).sum(1) @ counts / len(h)) if len(classes) > 1 else 0.0
    ratio = intra / inter if inter > 0 else float("nan")
    return dict(intra=intra, inter=inter, ratio=ratio, samples=len(h), classes=len(classes))


def active_ratio(norms, fraction=0.5):
    """
    The share of the samples whose gradient norm exceeds `fraction` of the largest one, of norms (N,), |dL_i/dh_i| with
    L_i the loss of sample i and h_i its features. 1 where all samples pull alike, 1 / N where one does all the work. It
    does not depend on the loss's scale. A tenth would read 1 for most distance heads at n = 1, whose gradients are all
    of one size. nan when every norm is 0.
    This stands for the "active ratio" of Variance & Greediness (arXiv 2601.21450), whose exact formulas are not
    available to us: the definition is ours.
    """
    norms = gradient_norms(norms)
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be in [0, 1), got {fraction}")
    if norms.max() == 0:
        return float("nan")
    return float((norms > fraction * norms.max()).mean())


def classification(y, predicted, num_classes):
    """
    dict of accuracy and f1_macro (both in [0, 1]) and confusion (K, K), a list of lists of counts with a row for each
    true class of y (N,) and a column for each predicted (N,). f1_macro is the plain mean of 2 TP / (2 TP + FP + FN)
    over the classes that occur in y or predicted, which is sklearn's default. The definitions are standard; the paper
    reports accuracy and F1, and that its F1 is the macro average is our reading. Needs sklearn.
    """
    from sklearn.metrics import confusion_matrix, f1_score
    y = labels(y, "y", None, num_classes)
    predicted = labels(predicted, "predicted", len(y), num_classes)
    f1 = f1_score(y, predicted, average="macro", zero_division=0)
    confusion = confusion_matrix(y, predicted, labels=np.arange(num_classes))
    return dict(accuracy=float((y == predicted).mean()), f1_macro=float(f1), confusion=confusion.tolist())


def mean_accuracy(own, others):
    """
    The share of the samples that are nearer to the mean of their own class than to that of any other, from distances:
    own (N,) to the mean of the other samples of the own class, as with itself in it a sample would draw the mean near;
    others (N, C) to the means of all classes, where the entry of the own class is inf. A tie is a miss. The nearest
    class mean is standard (Papyan, Han and Donoho 2020 have it as NC4); that it is judged on the same samples, less the
    one in question, is our choice.
    """
    own, others = array(own, "the distances to the own mean"), np.asarray(others, dtype=np.float64)
    if others.ndim != 2 or len(others) != len(own) or np.isnan(others).any() or np.isneginf(others).any():
        raise ValueError(f"{len(own)} samples take distances to class means (N, C), got shape {others.shape}")
    return float((own < others.min(1)).mean())


def prototype_offset(offsets, spreads):
    """
    The mean over classes of the distance of a class's prototype to its mean (C,), over the mean distance of its samples
    to that mean (C,). 0: prototypes are class means; 1: they lie as far off as the samples do. nan where a spread is 0.
    The definition is ours.
    """
    offsets, spreads = array(offsets, "the distances of prototypes"), array(spreads, "the spreads of classes")
    if len(offsets) != len(spreads):
        raise ValueError(f"{len(offsets)} prototypes have {len(spreads)} spreads")
    return float((offsets / spreads).mean()) if spreads.min() > 0 else float("nan")

# -----------------------------------------------------------------------------
# comparisons


def percent_change(value, base, lower_is_better=False):
    """
    100 (value - base) / |base| in percent, or 100 (base - value) / |base| where lower is better, so that positive is
    always better. These are the paper's conventions: the first sign for accuracy, F1 and explained variance, the second
    for emissions, duration and PCA@90%. nan for base 0.
    """
    value, base = float(array(value, "value", 0)), float(array(base, "base", 0))
    if base == 0:
        return float("nan")
    return 100 * (base - value if lower_is_better else value - base) / abs(base)


def paired(values, baseline):
    """
    The paired t test, two-sided, of the differences d_i = value_i - baseline_i over seeds, both (n,) in the order of
    the same seeds: dict of
      n, mean, std    of d, ddof 1
      t, p            scipy.stats.ttest_rel: t = mean / (std / sqrt n), n - 1 degrees of freedom
      effect_size     Cohen's d_z = mean / std
      low, high       95% interval of the mean difference, mean -+ t_{0.975, n-1} std / sqrt n
    One pair has n and mean, and None for the rest: there is no test. Where all differences are equal (up to rounding)
    std is 0, and t, p, effect_size, low and high are None: t would be infinite and the interval a point, a certainty
    that n equal numbers do not give. The definitions are standard, to apply them here is our choice. p is for one
    comparison, see corrected(). Needs scipy.
    """
    values, baseline = array(values, "values"), array(baseline, "baseline")
    if len(values) != len(baseline):
        raise ValueError("pairs need the same seeds on both sides, "
                         f"got {len(values)} values and {len(baseline)} of the baseline")
    d, n = values - baseline, len(values)
    result = dict(n=n, mean=float(d.mean()), std=None, t=None, p=None, effect_size=None, low=None, high=None)
    if n == 1:
        return result
    std = float(d.std(ddof=1))
    rounding = 1e-14 * max(np.abs(values).max(), np.abs(baseline).max()) # 0.3 - 0.2 is not quite 0.5 - 0.4
    if np.ptp(d) <= rounding:
        return result | dict(std=0.0)
    from scipy import stats
    test = stats.ttest_rel(values, baseline)
    half = float(stats.t.ppf(0.975, n - 1)) * std / n ** 0.5
    mean = result["mean"]
    return result | dict(std=std, t=float(test.statistic), p=float(test.pvalue), effect_size=mean / std,
                         low=mean - half, high=mean + half)


def unpaired(a, b):
    """
    Student's t test, two-sided, of two independent samples a and b with equal variances, scipy.stats.ttest_ind: dict of
      mean        mean(a) - mean(b)
      t, p, df    with len(a) + len(b) - 2 degrees of freedom
      d           Cohen's d, the mean over the pooled standard deviation
      low, high   95% interval of the mean
    With fewer than three values in all, or none that differ, all but mean and df are None. Needs scipy.
    """
    a, b = array(a, "a"), array(b, "b")
    mean, df = float(a.mean() - b.mean()), len(a) + len(b) - 2
    result = dict(mean=mean, df=df, t=None, p=None, d=None, low=None, high=None)
    squares = ((a - a.mean()) ** 2).sum() + ((b - b.mean()) ** 2).sum()
    if df < 1 or squares == 0:
        return result
    from scipy import stats
    pooled = float(np.sqrt(squares / df))
    test = stats.ttest_ind(a, b)
    half = float(stats.t.ppf(0.975, df)) * pooled * (1 / len(a) + 1 / len(b)) ** 0.5
    return result | dict(t=float(test.statistic), p=float(test.pvalue), d=mean / pooled, low=mean - half,
                         high=mean + half)


def corrected(p_values):
    """
    The p values of a table (a sequence) adjusted for their number by Benjamini and Hochberg 1995 (false discovery
    rate), as a list of floats: min_{j >= i} p_(j) m / j in the order of size. None, a comparison without test, stays
    None in its place and is not counted in m. This is scipy.stats.false_discovery_control. Needs scipy.
    """
    p_values = list(p_values)
    given = [p for p in p_values if p is not None]
    if p_values and not given:
        return p_values
    p = array(given, "the p values")
    if p.min() < 0 or p.max() > 1:
        raise ValueError(f"p values are in [0, 1], got {p.min()} to {p.max()}")
    from scipy import stats
    adjusted = iter(stats.false_discovery_control(p, method="bh").tolist())
    return [None if p is None else next(adjusted) for p in p_values]
