"""
What is measured of hidden states and the head above them. Each number is defined in metrics.py.
"""
import math

import torch

import metrics
import run
from distances import DISTANCES, all_distances, unit
from distances_parallel import has_rows

PROBE_SIZE = 512 # hidden states of an evaluation: their rank can be seen up to this number
# what the probe tells about classes
OF_CLASSES = ("variance_ratio", "active_ratio", "mean_accuracy", "prototype_offset", "own_variance_ratio")
# the linear head has no distance; and cosh is the smooth form but for features that it was not trained on, where its
# exponentials overflow
STAND_INS = {("baseline", None): ("euclidean", "standard"), ("chebyshev", "cosh"): ("chebyshev", "smooth")}


def probe(head, h, y):
    """
    Numbers by name about hidden states h (N, D), the head's input, with classes y (N,), for an evaluation's row. Each
    is defined in metrics.py, and None where it has no value; h_grad_norm is the mean over the samples of
    |d(-log p_y)/dh|, prototype_norm the mean of |w_k|, and own_geometry, below, adds three. A single sample has no
    variance: what is made of it is left out.
    """
    training = head.training
    head.eval() # in training it may update its statistics, or add noise
    with torch.enable_grad(), torch.autocast(h.device.type, enabled=False):
        h = h.detach().float().requires_grad_()
        nll = head.loss(h, y, reduction="none") # (N,)
        norms = torch.autograd.grad(nll.sum(), h)[0].norm(dim=1) # (N,)
    of_its_own = own_geometry(head, h.detach(), y)
    head.train(training)
    features = h.detach().cpu().numpy()
    of_several = {}
    if len(features) > 1:
        s, variance = metrics.spectrum(features), metrics.class_variance(features, y.cpu().numpy())
        of_several = dict(
            effective_rank=metrics.effective_rank(s),
            collapse_score=metrics.collapse_score(s),
            pc2_ev=metrics.explained_variance(s, 2),
            pca5=metrics.explained_variance(s, 5),
            intra_variance=variance["intra"],
            inter_variance=variance["inter"],
            variance_ratio=variance["ratio"],
        )
    return for_json(dict(
        **of_several,
        **of_its_own,
        active_ratio=metrics.active_ratio(norms.cpu().numpy()) if norms.isfinite().all() else math.nan,
        h_grad_norm=norms.mean().item(),
        h_norm=h.detach().norm(dim=1).mean().item(),
        prototype_norm=head.prototype_norms().mean().item(),
    ))


def of_layers(blocks, passes):
    """
    The shape of the hidden states (N, D) behind each of a model's blocks, as lists by name: layer_pc2_ev, the share of
    the variance in the top 2 principal components, and layer_pca90, how many hold 90% of it once the features are
    standardised; None and 0 where all states are equal. passes: an iterator in whose every turn the model is called,
    and which gives a number to sort by, and the positions (B, k) of the states that count. All ranks call it.
    """
    seen, parts = [], []
    hooks = [block.register_forward_hook(lambda *args: seen.append(args[-1])) for block in blocks] # (B, T, D)
    with torch.compiler.set_stance("force_eager"): # a compiled graph does not call hooks
        for i, at in passes:
            rows = torch.arange(len(at), device=at.device)[:, None]
            parts.append((i, [x[rows, at].flatten(0, 1).float().cpu() for x in seen[-len(blocks):]]))
            seen.clear()
    for hook in hooks:
        hook.remove()
    found = dict(layer_pc2_ev=[], layer_pca90=[])
    for states in zip(*(of_blocks for _, of_blocks in run.gather(parts))):
        h = torch.cat(states)[:PROBE_SIZE].numpy()
        h = h.repeat(2, 0) if len(h) == 1 else h # neither has a variance
        share = metrics.explained_variance(metrics.spectrum(h), 2)
        found["layer_pc2_ev"].append(None if math.isnan(share) else share)
        found["layer_pca90"].append(metrics.components_for(metrics.spectrum(metrics.standardised(h))))
    return found


def for_json(numbers):
    """The numbers by name, where None takes the place of those that are not finite: JSON has no nan."""
    return {key: value if math.isfinite(value) else None for key, value in numbers.items()}


@torch.no_grad()
def own_geometry(head, h, y):
    """
    How classes y (N,) and prototypes lie among features h (N, D), the head's input, in the head's own distance, which
    for the linear head, that has none, is Euclid's: dict of
      mean_accuracy        metrics.mean_accuracy
      prototype_offset     metrics.prototype_offset; nan for the linear head, whose weights are directions, not points
      own_variance_ratio   the ratio of metrics.class_variance of the features as the distance sees them: of unit length
                           for cosine, whitened for Mahalanobis, and so on
    Class means are those of the features, for cosine of the unit vectors: else the longest features would decide. Only
    classes of two samples and more count, and without two of these all three are nan. A head that is split between
    ranks has none of this.
    """
    if hasattr(head.weight, "to_local"):
        return {}
    classes, index, counts = y.unique(return_inverse=True, return_counts=True)
    keep = counts[index] > 1
    h, (classes, y, counts) = h[keep], y[keep].unique(return_inverse=True, return_counts=True)
    if len(classes) < 2:
        return dict.fromkeys(("mean_accuracy", "prototype_offset", "own_variance_ratio"), math.nan)
    with torch.autocast(h.device.type, enabled=False):
        h = as_points(head, h.float())
        sums = torch.zeros(len(classes), h.shape[1], device=h.device).index_add_(0, y, h)
        means = sums / counts[:, None]
        d = distances_to(head, h, means, classes) # (N, C)
        d[torch.arange(len(h)), y] = math.inf
        own = []
        for rows in torch.arange(len(h), device=h.device).split(64): # each has a mean of its own, without itself
            k = y[rows]
            rest = (sums[k] - h[rows]) / (counts[k, None] - 1)
            own.append(distances_to(head, h[rows], rest, classes[k]).diagonal())
        own = torch.cat(own)
        spreads = torch.zeros(len(classes), device=h.device).index_add_(0, y, own) / counts
        seen = as_seen(head, h)
        offset = math.nan
        if head.distance != "baseline":
            to_prototypes = distances_to(head, means, head.weight[classes].float(), classes).diagonal()
            offset = metrics.prototype_offset(to_prototypes.cpu().numpy(), spreads.cpu().numpy())
    return dict(
        mean_accuracy=metrics.mean_accuracy(own.cpu().numpy(), d.cpu().numpy()),
        prototype_offset=offset,
        own_variance_ratio=metrics.class_variance(seen.cpu().numpy(), y.cpu().numpy())["ratio"])


def as_points(head, h):
    """Features h (N, D) that have the same distances and may be averaged: to cosine all lengths are the same."""
    return unit(h) if head.distance == "cosine" else h


def as_seen(head, h):
    """Features h (N, D) as the head's core compares them, (N, D)."""
    h, weight, tensors = head._inputs(as_points(head, h))
    seen, _ = spec_of(head).prep(h, weight, head._options(h, weight).updated(**tensors))
    return seen


def spec_of(head):
    """The head's distance, or the one that stands in for it."""
    stands_in = STAND_INS.get((head.distance, head.variant))
    return head.spec if stands_in is None else DISTANCES[stands_in[0]][stands_in[1]]


def distances_to(head, h, points, classes):
    """d (N, C) of h (N, D) to points (C, D), in the place of the prototypes of these classes (C,), eagerly."""
    spec = spec_of(head)
    h, _, tensors = head._inputs(h)
    for name, x in tensors.items():
        tensors[name] = x[classes] if has_rows(head, name) else x
    return all_distances(spec, head._options(h, points).updated(**tensors), h, points, spec.core(head.options))
