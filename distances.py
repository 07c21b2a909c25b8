""" Distance heads: an output layer with one prototype vector w_k per class (or token), whose probabilities fall with
distance:

    z_k = log kappa(d(h, w_k)),    p = softmax(z),    loss = -log p_y    (nats)

    link "harmonic":  z = -n log d,  so that p_k is proportional to d^-n    ("Non-Euclidean Harmonic Losses", Eq. 1)
    link "softmin":   z = -n d                                              (the same paper's appendix B)
    link "gaussian":  z = -n d^2                                            (prototypical networks, Snell et al. 2017)

The harmonic n is the exponent of d, never of d squared, for every distance alike. `baseline` is the linear head
z = n W h, by default with n = 1.

This file needs torch and nothing else; copy it into any project.

    head = DistanceHead(768, 50304, distance="cosine", n=28.0)     # in place of nn.Linear(768, 50304, bias=False)
    z = head(h)                                                    # (N, V) scores, softmax(z) is p
    loss = head.loss(h, targets)                                   # the same loss, exact, without ever holding N x V

    criterion = HarmonicLoss(128, 10, distance="euclidean")        # or as a criterion that owns its prototypes
    loss = criterion(features, labels)

    d = pairwise(h, w, "minkowski", p=3.0)                         # or as a plain function (N, D), (V, D) -> (N, V)

    python distances.py                                            # prints every distance, variant and parameter

It has four parts: the distances, a table and the small functions that it names; the cores, which compute all pairs; the
loss, which goes through them chunk by chunk; and the modules. """
import functools
import inspect
import math
import os
import signal
import warnings
from collections import namedtuple
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from types import FunctionType, SimpleNamespace

import torch
from torch import nn

try: # torch's compiler, which a decorator below imports, ends the program where it cannot make this folder
    os.makedirs(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or ".", exist_ok=True)
except OSError:
    del os.environ["TORCHINDUCTOR_CACHE_DIR"] # it then takes one among the temporary files

# -----------------------------------------------------------------------------
# the distances


@dataclass(frozen=True)
class Distance:
    """d(h, w) = finish(core(prep(h), prep(w))). The core alone costs N x V x D: it is a matrix product, or tiles of a
    sum, a maximum or a ratio over the D coordinates. Autograd differentiates prep and finish, and a core without a
    gradient of its own. `o` holds eps, in_features, the distance's numbers and its tensors.

    To add a distance write its core, one line such as Tiles(lambda h, w: (h - w).abs().sum(-1)), and one entry of
    DISTANCES."""
    core: Callable                                   # o -> the core, from the next part of this file
    finish: Callable = lambda s, a, b, o: s + o.eps  # the core's s (N, V) -> d; a (N, 1), b (V,) are row terms of h, w
    prep: Callable = lambda h, w, o: (h, w)          # h (N, D), w (V, D) -> what the core compares
    row_term: Callable | None = None                 # x (..., D) -> (...,): what finish needs of every row on its own
    noise: Callable | None = None                    # x (N, D) -> what prep adds in training: o.noise, for h and for w
    squared: bool = False                            # finish gives d^2, and the link takes the root: 1/2 in log d
    params: dict = field(default_factory=dict)       # numbers and their defaults
    tensors: dict = field(default_factory=dict)      # learned: name -> (V, D) -> initial value
    buffers: dict = field(default_factory=dict)      # estimated while training, likewise
    formula: str = ""


class Options:
    """`o`: eps, in_features, the distance's numbers and its tensors, as attributes."""

    def __init__(self, **values):
        for name, value in values.items():
            setattr(self, name, value)

    def updated(self, **values):
        return Options(**{**self.__dict__, **values})


def plus_eps2(s, a, b, o):
    return s + o.eps ** 2


def mean_plus_eps(s, a, b, o):
    return s / o.in_features + o.eps


def over_sum(s, a, b, o):
    return s / (a + b + o.eps) + o.eps


LAMBDA = dict(reg_lambda=1e-2)
# The first variant of each distance is its default.
DISTANCES = {
    "euclidean": {
        "standard": Distance(lambda o: SquaredL2(), plus_eps2, squared=True, formula="sqrt(sum (h-w)^2 + eps^2)"),
        "unit": Distance(lambda o: SquaredL2(), plus_eps2, lambda h, w, o: (unit(h), unit(w)), squared=True,
                         formula="the same of h/|h| and w/|w|"),
    },
    "manhattan": {
        "standard": Distance(lambda o: l1(), formula="sum |h-w| + eps"),
    },
    "chebyshev": {
        "standard": Distance(lambda o: linf(), formula="max |h-w| + eps"),
        "smooth": Distance(lambda o: smooth_linf(o.alpha), params=dict(alpha=10.0),
                           formula="logsumexp(alpha |h-w|) / alpha + eps"),
        # One matrix product of twice the length. It exceeds the smooth form by at most log(2) / alpha, where h = w.
        "cosh": Distance(lambda o: Dot(), lambda s, a, b, o: s.log() / o.alpha + o.eps,
                         lambda h, w, o: exponentials(h, w, o), params=dict(alpha=10.0),
                         formula="log(sum 2 cosh(alpha (h-w))) / alpha + eps"),
    },
    "minkowski": {
        "standard": Distance(lambda o: lp(o.p), lambda s, a, b, o: root_of_lp(s, o.p) + o.eps, params=dict(p=1.5),
                             formula="(sum |h-w|^p)^(1/p) + eps"),
    },
    "cosine": {
        # 1 - cos = |h' - w'|^2 / 2 for unit vectors h' and w', which does not cancel when they are close.
        "stable": Distance(lambda o: SquaredL2(), lambda s, a, b, o: torch.add(b, s, alpha=0.5) + (a + o.eps),
                           lambda h, w, o: (unit(h), unit(w)), row_term=lambda x: is_zero(x) / 2,
                           formula="1 - <h/|h|, w/|w|> + eps"),
        # It cancels, so that rounding alone could take it below 0.
        "unstable": Distance(lambda o: Dot(), lambda s, a, b, o: (1 - s / (a * b + o.eps)).clamp_min(0) + o.eps,
                             row_term=lambda x: x.norm(dim=-1), formula="1 - h.w / (|h||w| + eps) + eps"),
    },
    "hamming": {
        "soft": Distance(lambda o: l1(), mean_plus_eps, lambda h, w, o: soft_bits(h, w, o.T), params=dict(T=1.0),
                         formula="mean |s(h/T) - s(w/T)| + eps, s the sigmoid"),
        "gumbel": Distance(lambda o: l1(), mean_plus_eps, lambda h, w, o: soft_bits(h, w, o.T, o.noise),
                           noise=lambda x: logistic_noise(x), params=dict(T=0.5),
                           formula="the same on binary-concrete samples while training"),
        "hard": Distance(lambda o: HardBits(), mean_plus_eps, params=dict(threshold=0.0),
                         prep=lambda h, w, o: (hard_bits(h, o.threshold), hard_bits(w, o.threshold)),
                         formula="mean (h>t != w>t) + eps, straight-through"),
    },
    "canberra": {
        "standard": Distance(lambda o: canberra(o.eps), formula="sum |h-w| / (|h|+|w|+eps) + eps"),
        "robust": Distance(lambda o: canberra(o.eps, o.min_denom), params=dict(min_denom=1e-2),
                           formula="the denominator at least min_denom"),
        "weighted": Distance(lambda o: canberra_weighted(o.eps, o.weight_power), params=dict(weight_power=0.5),
                             formula="the terms weighted by (|h|+|w|+eps)^weight_power, weights of sum 1"),
    },
    "bray_curtis": {
        "standard": Distance(lambda o: l1(), lambda s, a, b, o: s / ((a + b).abs() + o.eps) + o.eps,
                             row_term=lambda x: x.sum(-1), formula="sum |h-w| / (|sum (h+w)| + eps) + eps"),
        "abs": Distance(lambda o: l1(), over_sum, row_term=lambda x: x.abs().sum(-1),
                        formula="sum |h-w| / (sum (|h|+|w|) + eps) + eps"),
        "normalized": Distance(lambda o: l1(), over_sum, lambda h, w, o: (shares(h, o.eps), shares(w, o.eps)),
                               row_term=lambda x: x.sum(-1),
                               formula="abs, after |h|+eps and |w|+eps are scaled to sum 1"),
        "signed": Distance(lambda o: signed_bray_curtis(o.eps), formula="sum |h-w| / (sum |h+w| + eps) + eps, scipy's"),
    },
    "mahalanobis": { # P = root root', d^2 = |(h - w) root|^2 + eps^2
        "standard": Distance(lambda o: SquaredL2(), plus_eps2, lambda h, w, o: whitened(h, w, gram_root(o.A.T, o)),
                             squared=True, params=LAMBDA, tensors=dict(A=lambda V, D: torch.eye(D)),
                             formula="sqrt((h-w)' P (h-w) + eps^2), P = A'A + lambda I"),
        "diagonal": Distance(lambda o: SquaredL2(), plus_eps2,
                             lambda h, w, o: whitened(h, w, (o.theta.exp() + o.reg_lambda).sqrt()),
                             squared=True, params=LAMBDA, tensors=dict(theta=lambda V, D: torch.zeros(D)),
                             formula="P = diag(exp theta) + lambda I"),
        "cholesky": Distance(lambda o: SquaredL2(), plus_eps2,
                             lambda h, w, o: whitened(h, w, gram_root(o.L.tril(-1) + o.L.diagonal().exp().diag(), o)),
                             squared=True, params=LAMBDA, tensors=dict(L=lambda V, D: torch.zeros(D, D)),
                             formula="P = LL' + lambda I, L lower triangular"),
        "covariance": Distance(lambda o: SquaredL2(), plus_eps2, lambda h, w, o: whitened(h, w, covariance_root(o)),
                               squared=True, params=dict(momentum=0.99, shrinkage=0.1, **LAMBDA),
                               buffers=dict(covariance=lambda V, D: torch.eye(D)),
                               formula="P = (within-class covariance)^-1, estimated"),
    },
    "offset_l2": {
        "standard": Distance(lambda o: WeightedSquaredL2(), plus_eps2, lambda h, w, o: (h, torch.cat([w, o.alpha], -1)),
                             squared=True, tensors=dict(alpha=lambda V, D: torch.ones(V, D)),
                             formula="sqrt(sum alpha_k^2 (h-w_k)^2 + eps^2), alpha learned"),
    },
}
# The linear head in the same clothes: z = -d with d = -h.w.
BASELINE = Distance(lambda o: Dot(), lambda s, a, b, o: -s, formula="z = W h, the linear head (cross-entropy)")
UNIT_BASELINE = replace(BASELINE, prep=lambda h, w, o: (unit(h), unit(w)), formula="z = <h/|h|, w/|w|>")
LINKS = ("harmonic", "softmin", "gaussian")


class _Unit(torch.autograd.Function):
    """F.normalize(x, dim=-1), whose own backward pass holds four copies of x: too many for a large vocabulary."""
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        inverse = 1 / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return x * inverse, inverse

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx, g, _):
        x, inverse = ctx.saved_tensors
        if torch.is_grad_enabled(): # this gradient is to be differentiated again
            return torch.func.vjp(lambda x: nn.functional.normalize(x, dim=-1), x)[1](g)[0]
        along = torch.linalg.vecdot(x, g)[..., None] * inverse ** 2 * (inverse < 1e12) # the zero vector does not turn
        return g.mul_(inverse).addcmul_(x, along * inverse, value=-1) # in place: _Pairs and _Loss made g for this alone


def unit(x):
    is_large = not torch.compiler.is_compiling() and x.numel() > CACHE_ELEMENTS # in this order: any batch exports
    return _Unit.apply(x)[0] if is_large else nn.functional.normalize(x, dim=-1)


def is_zero(x):
    """1 for the zero vector among unit vectors x (..., D), whose cosine with anything counts as 0; 0 for all others."""
    return (norm2(x.detach()) < 0.5).to(x.dtype)


def soft_bits(h, w, T, noise=None):
    if noise is not None:
        h, w = h + noise[0], w + noise[1]
    return torch.sigmoid(h / T), torch.sigmoid(w / T)


def logistic_noise(x):
    """The difference of two Gumbel variables: the sigmoid becomes a binary-concrete sample (Maddison et al. 2017)."""
    return torch.logit(torch.rand_like(x), eps=torch.finfo(x.dtype).eps)


def hard_bits(x, threshold):
    """The sigmoid of x - threshold, but above 0.5 exactly where x > threshold: close to it the sigmoid is rounded."""
    soft, half = torch.sigmoid(x - threshold), x.new_full((), 0.5) # new_tensor would wait for a GPU
    above = torch.nextafter(half, 2 * half)
    exact = torch.where(x > threshold, soft.clamp_min(above), soft.clamp_max(half))
    return soft + (exact - soft).detach()


def exponentials(h, w, o):
    """sum 2 cosh(alpha (h - w)) = <[e^(alpha h), e^(-alpha h)], [e^(-alpha w), e^(alpha w)]>. Raises ValueError where
    exp would overflow."""
    if o.validate and h.numel() and w.numel() and has_values(h):
        limit = math.log(torch.finfo(h.dtype).max) - 8 # of a term, so that the sum too stays in range
        reach = o.alpha * (h.detach().abs().amax() + w.detach().abs().amax()).item()
        if not reach < limit:
            raise ValueError(f"chebyshev (cosh): alpha (max |h| + max |w|) is {reach:.4g}, its exponentials hold up to "
                             f"{limit:.0f}: lower alpha, scale the features down, or use the variant smooth")
    h, w = o.alpha * h, o.alpha * w
    return torch.cat([h.exp(), (-h).exp()], -1), torch.cat([(-w).exp(), w.exp()], -1)


def root_of_lp(s, p):
    """The core of p = 2 gives the squared norm, all others the norm itself. The clamp makes the slope 0 at h = w."""
    return s.clamp_min(torch.finfo(s.dtype).tiny).sqrt() if p == 2 else s


def shares(x, eps):
    x = x.abs() + eps
    return x / x.sum(-1, keepdim=True)


def whitened(h, w, root):
    """root is a matrix (D, D), or the diagonal (D,) of one."""
    return (h * root, w * root) if root.ndim == 1 else (h @ root, w @ root)


def gram_root(A, o):
    """The lower triangular root of AA' + lambda I."""
    return torch.linalg.cholesky(A @ A.T + o.reg_lambda * torch.eye(len(A), dtype=A.dtype, device=A.device))


def covariance_root(o):
    """C^-T, a root of P = (CC')^-1, where CC' = (1 - shrinkage) S + (shrinkage + lambda) v I and v is the mean variance
    trace(S)/D. The ridge is relative to the features' own scale: an absolute one would either drown the estimate or do
    nothing."""
    S = o.covariance
    eye = torch.eye(len(S), dtype=S.dtype, device=S.device)
    C = torch.linalg.cholesky((1 - o.shrinkage) * S + (o.shrinkage + o.reg_lambda) * S.diagonal().mean() * eye)
    return torch.linalg.solve_triangular(C, eye, upper=False).T


def within_class_scatter(h, targets):
    """The sum over samples of (h - m_y)(h - m_y)', where m_y is the mean of the sample's class in this batch, and its
    degrees of freedom N - (classes present): h (N, D), targets (N,) -> (D, D), (). Their ratio is the pooled
    within-class covariance."""
    _, index, count = targets.unique(return_inverse=True, return_counts=True)
    means = h.new_zeros(len(count), h.shape[1]).index_add_(0, index, h) / count[:, None]
    x = h - means[index]
    return x.T @ x, torch.tensor(float(len(h) - len(count)), device=h.device)


# -----------------------------------------------------------------------------
# the cores: s for all pairs of rows of h (N, D) and w (V, D)

CACHE_ELEMENTS = 2 ** 18 # of a temporary on a CPU: 1 MB in fp32 stays in cache, more costs more than the arithmetic
# Up to these sizes what one would have written is fastest: operations left to autograd, cross-entropy of the scores.
SMALL = {"N x V x D": 2 ** 18, "N x V": 2 ** 18}


class Core:
    """Every core has
        value(h, w)                          s of pairs that broadcast: (..., D), (..., D) -> (...)
        forward(h, w, precomputed, out)      fills out (N, V) with s, or with the product of which assemble makes s
        backward(h, w, s, g, dh, dw)         adds the sums of g ds/dh to dh (N, D) and of g ds/dw to dw (V, D), but for
                                             what add_sums adds at the end
    and, with these defaults,"""
    is_product = False       # s is made of a matrix product: backward does without s
    bf16_operands = False    # that product may take operands rounded to bf16 under autocast
    min_chunk_rows = 256     # the loss takes at least so many rows of h at a time on a CPU,
    chunk_elements = 2 ** 22 # and more as long as a chunk (rows, V) stays below so many elements

    def gradient(self, h, w, s, g):
        """g ds/dh and g ds/dw of pairs of one shape (..., D), for s and g (...)."""
        with torch.enable_grad():
            h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
            return torch.autograd.grad(self.value(h, w), (h, w), g)

    def precompute(self, w):
        """What every chunk of h needs of w."""
        return None

    def assemble(self, out, h, precomputed):
        """s of what forward left in out. It is apart from forward, as torch.compile fuses it with what follows."""
        return out

    def add_sums(self, w, sums, dw):
        """Add to dw what depends on h only through sums (V,), the total of what backward returned for all rows of h."""

    def dense(self, h, w):
        """s (N, V) by operations that autograd differentiates as often as one likes. It holds N x V x D."""
        return self.value(h[:, None], w[None])

    def traced(self, h, w):
        """s (N, V) by operations that torch.compile, torch.export and vmap take whole; close pairs are not refined."""
        return self.assemble(h @ w.T, h, self.precompute(w)) if self.is_product else self.dense(h, w)


def at_least_fp32(*dtypes):
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def norm2(x):
    """|x|^2 without a temporary of x's size: (..., D) -> (...), in fp32 at least."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=at_least_fp32(x.dtype)).square()


def slices(n, step):
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def add_rows(out, rows, x):
    """Add x (c, D) to these rows of out; rows may repeat. On a GPU index_add_ adds in any order, index_put_ in one."""
    if out.is_cuda:
        out.index_put_((rows,), x, accumulate=True)
    else:
        out.index_add_(0, rows, x)


def rows_of(pairs):
    """Of pairs (count, 2) the first and the second entries, 65,536 at a time, as each will hold D elements."""
    return (part.unbind(1) for part in pairs.split(2 ** 16))


def add_product(out, a, b, alpha=1.0, beta=1.0):
    """out = beta out + alpha a @ b in out's dtype. A GPU takes bf16 operands as they are: their products are exact in
    fp32."""
    if a.dtype != out.dtype and a.is_cuda:
        return torch.addmm(out, a, b, out_dtype=out.dtype, alpha=alpha, beta=beta, out=out)
    return torch.addmm(out, a.to(out.dtype), b.to(out.dtype), alpha=alpha, beta=beta, out=out)


class SquaredL2(Core):
    """s = |h - w|^2 by one matrix product. The identity |h|^2 + |w|^2 - 2 h.w cancels when h and w are close: in fp32
    its absolute error is up to 16 x 2^-24 (|h|^2 + |w|^2). So close pairs are computed directly, value and gradient.
    The norms of bf16 operands are those of the rounded vectors, or the difference of the roundings would count as a
    distance."""
    is_product = bf16_operands = True
    close = 2e-2 # a pair is close where s < close * |w|^2; beyond it the relative error of d is below 1e-4

    def value(self, h, w):
        return ((h - w) ** 2).sum(-1)

    def gradient(self, h, w, s, g):
        gh = 2 * g[..., None] * (h - w)
        return gh, -gh

    def precompute(self, w):
        return norm2(w)

    def forward(self, h, w, precomputed, out):
        add_product(out, h, w.T, beta=0)

    def assemble(self, out, h, precomputed):
        return torch.add(precomputed, out, alpha=-2).add_(norm2(h)[:, None]).clamp_min_(0)

    def margin(self, s, precomputed):
        """Below 0 (N, V) where a pair is close."""
        return s - self.close * precomputed

    def close_pairs(self, s, precomputed):
        """The rows of h and of w of close pairs, (pairs, 2)."""
        return (s < self.close * precomputed).nonzero()

    def refine(self, h, w, s, pairs):
        """s with these pairs computed directly, in place."""
        for i, j in rows_of(pairs):
            s[i, j] = self.value(h[i].to(s.dtype), w[j].to(s.dtype))

    def backward_of_pairs(self, h, w, s, g, pairs, dh, dw):
        """backward of these pairs alone, directly."""
        for i, j in rows_of(pairs):
            gh, gw = self.gradient(h[i], w[j], s[i, j], g[i, j])
            add_rows(dh, i, gh)
            add_rows(dw, j, gw)

    def backward(self, h, w, s, g, dh, dw):
        g = g.to(w.dtype) # before the sums, so that they are those of the g in the products
        add_product(dh.addcmul_(h, g.sum(1, dtype=dh.dtype)[:, None], value=2), g, w, alpha=-2)
        add_product(dw, g.T, h, alpha=-2)
        return g.sum(0, dtype=dw.dtype)

    def add_sums(self, w, sums, dw):
        dw.addcmul_(w, sums[:, None], value=2)


class WeightedSquaredL2(SquaredL2):
    """s = sum alpha_k^2 (h - w_k)^2 with a weight per prototype and dimension, where w holds [w, alpha] side by side
    (V, 2D). It goes through slices of the prototypes, so that copies of them stay small."""
    bf16_operands = False # the products are of derived matrices
    slice = 1024

    def value(self, h, w):
        w, alpha = w.chunk(2, -1)
        return ((alpha * (h - w)) ** 2).sum(-1)

    gradient = Core.gradient # by autograd

    def precompute(self, w):
        return torch.cat([norm2(torch.mul(*w[j].chunk(2, -1))) for j in slices(len(w), self.slice)])

    def forward(self, h, w, precomputed, out):
        h2 = h * h
        for j in slices(len(w), self.slice):
            w_j, alpha = w[j].chunk(2, -1)
            a2 = alpha ** 2
            out[:, j] = torch.addmm(precomputed[j], h, (a2 * w_j).T, alpha=-2).addmm_(h2, a2.T)

    def assemble(self, out, h, precomputed):
        return out.clamp_min(0)

    def traced(self, h, w):
        w, alpha = w.chunk(2, -1)
        a2 = alpha ** 2
        return ((a2 * w * w).sum(-1) - 2 * h @ (a2 * w).T + (h * h) @ a2.T).clamp_min(0)

    def backward(self, h, w, s, g, dh, dw):
        for j in slices(len(w), self.slice):
            w_j, alpha = w[j].chunk(2, -1)
            dw_j, dalpha = dw[j].chunk(2, -1)
            g_j, a2 = g[:, j], alpha ** 2
            g_h, g_sum = g_j.T @ h, g_j.sum(0)[:, None]
            dh += 2 * (h * (g_j @ a2) - g_j @ (a2 * w_j))
            dw_j += 2 * a2 * (w_j * g_sum - g_h)
            dalpha += 2 * alpha * (g_j.T @ (h * h) - 2 * w_j * g_h + w_j * w_j * g_sum)

    add_sums = Core.add_sums


class Dot(Core):
    """s = h.w"""
    is_product = bf16_operands = True

    def value(self, h, w):
        return (h * w).sum(-1)

    def gradient(self, h, w, s, g):
        return g[..., None] * w, g[..., None] * h

    def dense(self, h, w):
        return h @ w.T

    def forward(self, h, w, precomputed, out):
        add_product(out, h, w.T, beta=0)

    def backward(self, h, w, s, g, dh, dw):
        g = g.to(w.dtype)
        add_product(dh, g, w)
        add_product(dw, g.T, h)


class Tiles(Core):
    """Any other s = value(h, w), tile by tile, so that N x V x D is never held.

    slope(h, w, s, g) is the gradient per coordinate, (g ds/dh, g ds/dw) with s and g (..., 1); where it is None
    autograd finds it. pair(h, w, s, g) replaces s and g (...) by what slope takes of a pair as a whole: made once where
    slope needs it D times. kernel names the same function in distances_triton.py, for GPUs. norm is p where s is a norm
    of h - w whose gradient torch.cdist has fast, on a CPU.

    Tiles run eagerly; or, with compile = True, larger and of one fixed shape through torch.compile, where nothing of
    size N x V x D is held either; or, unless triton = False, as hand-written kernels where there are a GPU, triton and
    a kernel."""
    tile = 128, 512 # rows of h and of w in a compiled tile: measured best on CPUs
    min_chunk_rows, chunk_elements = 128, 2 ** 20

    def __init__(self, value, slope=None, pair=None, kernel=None, norm=None):
        self.value, self.slope, self.pair, self.kernel, self.norm = value, slope, pair, kernel, norm
        self.compile, self.triton = False, True

    def gradient(self, h, w, s, g):
        if self.slope is None:
            return super().gradient(h, w, s, g)
        if self.pair is not None:
            s, g = self.pair(h, w, s, g)
        return self.slope(h, w, s[..., None], g[..., None])

    def forward(self, h, w, precomputed, out):
        kernels = self.gpu_kernels(h)
        if kernels:
            kernels.forward(self.kernel, h, w, out)
            return
        tile_forward = self.compiled_forward if self.compile else self.eager_forward
        for i, j in self.tiles(h, w):
            out[i, j] = tile_forward(h[i], w[j])

    def backward(self, h, w, s, g, dh, dw):
        kernels = self.gpu_kernels(h)
        if kernels:
            kernels.backward(self.kernel, h, w, s, g, dh, dw)
            return
        if self.norm and not self.compile and h.device.type == "cpu":
            self.backward_of_norm(h, w, s, g, dh, dw)
            return
        tile_backward = self.compiled_backward if self.compile else self.eager_backward
        for i, j in self.tiles(h, w):
            gh, gw = tile_backward(h[i], w[j], s[i, j], g[i, j])
            dh[i] += gh
            dw[j] += gw

    def tiles(self, h, w):
        """The rows of h and of w of every tile."""
        n, v = self.tile_on(h)
        if not self.compile:
            elements = CACHE_ELEMENTS * (128 if h.is_cuda else 1)
            n, v = 16, max(1, elements // (16 * h.shape[1]))
        for i in slices(len(h), n):
            for j in slices(len(w), v):
                yield i, j

    def tile_on(self, h):
        """The rows of a compiled tile; 3,000 small ones a chunk would keep a GPU waiting for their launches."""
        return (1024, 8192) if h.is_cuda else self.tile

    def eager_forward(self, h, w):
        return self.value(h[:, None], w[None])

    def eager_backward(self, h, w, s, g):
        gh, gw = self.gradient(h[:, None], w[None], s, g) # (n, v, D) each, or already summed by autograd
        return gh.sum(1), gw.sum(0)

    def backward_of_norm(self, h, w, s, g, dh, dw):
        if self.norm == math.inf: # coordinates that reach the maximum share the gradient, as in share_ties
            g = g.clone()
            for i, j in self.tiles(h, w):
                x = (h[i][:, None] - w[j]).abs_()
                g[i, j] /= x.eq_(s[i, j][..., None]).sum(-1)
        gradient = torch.ops.aten._cdist_backward
        for j in slices(len(w), 512): # it adds one term after the other, so that long sums lose digits
            dh += gradient(g[:, j].contiguous(), h, w[j], self.norm, s[:, j].contiguous())
        for i in slices(len(h), 512):
            dw += gradient(g[i].T.contiguous(), w, h[i], self.norm, s[i].T.contiguous())

    def compiled_forward(self, h, w):
        n, v = self.tile_on(h)
        return self.functions.forward(padded_rows(h, n), padded_rows(w, v))[:len(h), :len(w)]

    def compiled_backward(self, h, w, s, g):
        (rows, columns), (n, v) = s.shape, self.tile_on(h)
        h, w = padded_rows(h, n), padded_rows(w, v)
        s = padded_rows(padded_rows(s, n).T, v).T.contiguous()
        g = nn.functional.pad(g, (0, v - columns, 0, n - rows))
        if self.pair is not None:
            s, g = self.functions.pair(h, w, s, g) # (n, v)
        gh = self.functions.dh(h, w, s, g)
        gw = self.functions.dw(h, w, s.T.contiguous(), g.T.contiguous())
        return gh[:rows], gw[:columns]

    @functools.cached_property
    def functions(self):
        """The compiled functions of one tile (n, v): forward, pair, and each gradient on its own with its sum
        innermost, since a kernel that sums along both n and v would store the tile. dw takes s and g transposed (v,
        n)."""
        def pair(h, w, s, g):
            return self.pair(h[:, None], w[None], s, g)

        def dh(h, w, s, g):
            if self.slope is None:
                return torch.func.vjp(self.eager_forward, h, w)[1](g)[0]
            return self.slope(h[:, None], w[None], s[..., None], g[..., None])[0].sum(1)

        def dw(h, w, s, g):
            if self.slope is None:
                return torch.func.vjp(self.eager_forward, h, w)[1](g.T)[1]
            return self.slope(h[None], w[:, None], s[..., None], g[..., None])[1].sum(1)

        def forward(h, w):
            return self.eager_forward(h, w)

        fixed_shape = dict(dynamic=False, fullgraph=True)
        return SimpleNamespace(**{f.__name__: with_own_cache(f, **fixed_shape) for f in (forward, pair, dh, dw)})

    def gpu_kernels(self, h):
        """The module of GPU kernels where it has one for this core, else None."""
        if not (self.triton and self.kernel and h.is_cuda and h.dtype == torch.float32):
            return None
        try:
            import distances_triton
        except Exception as e:
            self.triton = False
            if not isinstance(e, ImportError): # which says that there is no triton, or that this file was copied alone
                warnings.warn(f"distances_triton.py does not work here, torch's tiles replace it: {e!r}", stacklevel=2)
            return None
        return distances_triton if distances_triton.supports(self.kernel) else None


def padded_rows(x, rows):
    """x with its last row repeated up to so many rows: a ragged tile in the one shape that is compiled, of values like
    its own."""
    return x if len(x) == rows else torch.cat([x, x[-1:].expand(rows - len(x), -1)])


def with_own_cache(function, **options):
    """torch.compile with a cache of its own. Dynamo counts recompilations per code object, and many heads share this
    file's: past the eighth it would go on eagerly, for a tile with N x V x D in memory, and say so in a log line
    only."""
    code = function.__code__.replace()
    copy = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    return torch.compile(copy, **options)


def tiles_of_difference(value, slope, pair=None, kernel=None, norm=None):
    """Tiles of a function of x = h - w, whose gradients by h and by w are opposite."""
    def slopes(h, w, s, g):
        gh = slope(h - w, s, g)
        return gh, -gh

    def pair_of_difference(h, w, s, g):
        return pair(h - w, s, g)
    return Tiles(lambda h, w: value(h - w), slopes, pair_of_difference if pair else None, kernel, norm)


def signed(x, g):
    """g sign(x) by one comparison, twice as fast as sign(). At x = 0, where |x| has every slope in [-1, 1], it takes
    -1."""
    return torch.where(x > 0, g, -g)


def l1():
    return tiles_of_difference(lambda x: x.abs().sum(-1), lambda x, s, g: signed(x, g), kernel=("l1",), norm=1.0)


def linf():
    def slope(x, s, g):
        return torch.where(x.abs() == s, signed(x, g), 0)

    def share_ties(x, s, g): # the mean over the coordinates that reach the maximum is a true subgradient
        return s, g / (x.abs() == s[..., None]).to(x.dtype).sum(-1)
    return tiles_of_difference(lambda x: x.abs().amax(-1), slope, share_ties, ("linf",), math.inf)


def smooth_linf(alpha):
    def value(x):
        return torch.logsumexp(alpha * x.abs(), -1) / alpha

    def slope(x, s, g):
        return signed(x, g) * torch.exp(alpha * (x.abs() - s))
    return tiles_of_difference(value, slope)


def power(k):
    """x -> x^k for x >= 0; the usual exponents go without pow, which is 10 to 100 times slower."""
    usual = {-0.5: torch.rsqrt, 0.5: torch.sqrt, 1.0: lambda x: x, 2.0: lambda x: x * x}
    return usual.get(k, lambda x: x ** k)


def lp(p):
    """The norm itself, not its p-th power: its slope sign(x) (|x| / s)^(p-1) lies in [-1, 1] however large or small x
    is."""
    if p == 1:
        return l1()
    if p == 2:
        return SquaredL2() # and root_of_lp takes the root
    power_less_1 = power(p - 1)

    def value(x):
        x = x.abs()
        if p <= 4: # |x|^p stays in range for |x| from 1e-9 to 1e9
            return (x * power_less_1(x)).sum(-1) ** (1 / p)
        top = x.amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) # comes out of the sum, or 1e4^p overflows
        return top[..., 0] * ((x / top) ** p).sum(-1) ** (1 / p)

    def invert(x, s, g):
        return 1 / s.clamp_min(torch.finfo(s.dtype).tiny), g

    def slope(x, inverse, g):
        return signed(x, g) * power_less_1(x.abs() * inverse)
    tiles = tiles_of_difference(value, slope, invert, ("lp", p))
    # pow's derivatives are finite where coordinates are equal, those of the faster value are not
    tiles.dense = lambda h, w: ((h[:, None] - w).abs() ** p).sum(-1).clamp_min(torch.finfo(h.dtype).tiny) ** (1 / p)
    return tiles


class HardBits(Tiles):
    """The number of mismatched bits, by one matrix product; its gradient is that of the soft form sum |h - w| (straight
    through)."""

    def __init__(self):
        soft = l1()
        super().__init__(self.mismatches, soft.slope, kernel=soft.kernel, norm=soft.norm)

    def bits(self, x):
        return (x > 0.5).to(x.dtype)

    def mismatches(self, h, w):
        return (self.bits(h) - self.bits(w)).abs().sum(-1)

    def precompute(self, w):
        return self.bits(w)

    def forward(self, h, w, precomputed, out):
        h, w = self.bits(h), precomputed
        torch.addmm(w.sum(-1), h, w.T, alpha=-2, out=out).add_(h.sum(-1)[:, None]) # |h - w|^2, exact for bits

    def dense(self, h, w):
        soft = (h[:, None] - w).abs().sum(-1)
        return soft + (self.mismatches(h[:, None], w) - soft).detach()


def canberra(eps, min_denom=0.0):
    """sum |h-w| / q, q = |h| + |w| + eps, at least min_denom"""
    def denominator(h, w):
        return (h.abs() + w.abs() + eps).clamp_min(min_denom)

    def value(h, w):
        return ((h - w).abs() / denominator(h, w)).sum(-1)

    def slope(h, w, s, g):
        q = denominator(h, w)
        term = (h - w).abs() / q * (q > min_denom) # a denominator at its floor does not move
        g = g / q
        through_x, through_q = signed(h - w, g), g * term
        return through_x - through_q * h.sign(), -through_x - through_q * w.sign()
    return Tiles(value, slope, kernel=("canberra", eps, min_denom))


def canberra_weighted(eps, k):
    """sum q^k |h-w| / q  /  sum q^k, q = |h| + |w| + eps"""
    power_k, power_less_1 = power(k), power(k - 1)

    def denominator(h, w):
        return h.abs() + w.abs() + eps

    def value(h, w):
        q = denominator(h, w)
        return ((h - w).abs() * power_less_1(q)).sum(-1) / power_k(q).sum(-1)

    def divide_by_weights(h, w, s, g):
        return s, g / power_k(denominator(h, w)).sum(-1)

    def slope(h, w, s, g):
        x, q = h - w, denominator(h, w)
        g = g * power_less_1(q)
        through_x, through_q = signed(x, g), g * ((k - 1) * x.abs() / q - s * k)
        return through_x + through_q * h.sign(), -through_x + through_q * w.sign()
    return Tiles(value, slope, divide_by_weights)


def signed_bray_curtis(eps):
    """sum |h-w| / (sum |h+w| + eps)"""
    def value(h, w):
        return (h - w).abs().sum(-1) / ((h + w).abs().sum(-1) + eps)

    def divide_by_sum(h, w, s, g):
        return s, g / ((h + w).abs().sum(-1) + eps)

    def slope(h, w, s, g):
        through_difference, through_sum = signed(h - w, g), s * signed(h + w, g)
        return through_difference - through_sum, -through_difference - through_sum
    return Tiles(value, slope, divide_by_sum)


# -----------------------------------------------------------------------------
# all pairs, and the loss

def full_fp32(x):
    """The context of matrix products without tf32: where a GPU rounds the operands, the identity of SquaredL2 keeps
    three digits."""
    return without_tf32() if x.is_cuda else nullcontext()


@contextmanager
def without_tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def all_pairs(core, h, w):
    precomputed = core.precompute(w)
    out = h.new_empty(len(h), len(w), dtype=at_least_fp32(h.dtype))
    with full_fp32(h):
        core.forward(h, w, precomputed, out)
    s = core.assemble(out, h, precomputed)
    if isinstance(core, SquaredL2):
        core.refine(h, w, s, core.close_pairs(s, precomputed))
    return s


class _Pairs(torch.autograd.Function):
    """s for all pairs (N, V), with the core's own gradients; second derivatives go through core.dense."""

    @staticmethod
    def forward(core, h, w):
        return all_pairs(core, h, w)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.core, *tensors = inputs
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    def backward(ctx, g):
        h, w, s = ctx.saved_tensors
        if torch.is_grad_enabled(): # this gradient is to be differentiated again
            return None, *torch.func.vjp(ctx.core.dense, h, w)[1](g)
        core, dh, dw = ctx.core, torch.zeros_like(h), torch.zeros_like(w)
        if isinstance(core, SquaredL2):
            pairs = core.close_pairs(s, core.precompute(w))
            core.backward_of_pairs(h, w, s, g, pairs, dh, dw)
            g = g.index_put(pairs.unbind(1), g.new_zeros(()))
        with full_fp32(h):
            core.add_sums(w, core.backward(h, w, s, g, dh, dw), dw)
        return None, dh, dw

    @staticmethod
    def vmap(info, in_dims, core, h, w):
        return torch.func.vmap(core.traced, in_dims[1:])(h, w), 0


def all_distances(spec, o, h, w, core):
    traced = torch.compiler.is_compiling() or h.is_meta
    with nullcontext() if traced else full_fp32(h):
        h, w, terms = prepared(spec, o, h, w)
    if traced:
        s = core.traced(h, w)
    elif not h.is_cuda and (isinstance(core, Dot) or h.numel() * len(w) <= SMALL["N x V x D"]):
        s = core.dense(h, w)
    else:
        s = _Pairs.apply(core, h, w)
    d = spec.finish(s, terms.get("a"), terms.get("b"), o)
    return d.sqrt() if spec.squared else d


def without_autocast(x):
    is_off = x.is_meta or not torch.is_autocast_enabled(x.device.type)
    return nullcontext() if is_off else torch.autocast(x.device.type, enabled=False)


def saved_tensor_hooks():
    """Whether the hooks of checkpoint, save_on_cpu or the like are on."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: None)
    return top(False) is not None


def has_values(x):
    """Whether one can look at x: it is no meta tensor, and neither a compiler nor vmap is tracing."""
    if torch.compiler.is_compiling() or x.is_meta:
        return False
    try:
        x.detach().reshape(-1)[:1].sum().item()
    except RuntimeError: # vmap
        return False
    return True


def prepared(spec, o, h, w):
    """What the core compares, and a dict of the row terms, a (N, 1) and b (V,), where the distance has them."""
    h, w = spec.prep(h, w, o)
    if spec.row_term is None:
        return h, w, {}
    return h, w, {"a": spec.row_term(h)[:, None], "b": spec.row_term(w)}


def link_scores(d, n, link, squared=False):
    """z (N, V) of distances d, or of their squares."""
    if link == "harmonic":
        return -(d.log() * (n / 2 if squared else n)) # so written, torch.compile makes one pass less of a softmax
    if link == "gaussian":
        return -n * (d if squared else d.square())
    return -n * (d.sqrt() if squared else d)


@dataclass(frozen=True)
class Rule:
    """How distances become scores, and what a row of scores costs."""
    link: str
    n: float | None              # None where it is learned: one of the terms then
    softcap: float = 0.0         # z goes through c tanh(z / c); 0: it stays
    # of the loss in training only, 0 in evaluation
    z_loss: float = 0.0          # that many times log(sum exp z)^2
    label_smoothing: float = 0.0 # that share of the target's 1 is spread over all classes
    margin: float = 0.0          # the target's d is larger by it
    angular_margin: float = 0.0  # the angle (radians) of the target's cosine distance is larger by it

    @property
    def has_margin(self):
        return bool(self.margin or self.angular_margin)

    def with_margin(self, d, squared, eps):
        """What becomes of distances to the targets, or of their squares. Beyond pi - m, where cos(angle + m) would rise
        again, ArcFace's code goes on with cos(angle) - m sin(m)."""
        d, m = d.sqrt() if squared else d, self.angular_margin
        if m:
            x = (d - eps).clamp(torch.finfo(d.dtype).tiny, 2) # 1 - cos
            turned = 1 - (1 - x) * math.cos(m) + (x * (2 - x)).clamp_min(1e-30).sqrt() * math.sin(m)
            d = torch.where(x <= 1 + math.cos(m), turned, x + m * math.sin(m)) + eps
        d = d + self.margin
        return d.square() if squared else d

    def scores(self, d, terms, squared=False, is_target=None, eps=0.0):
        """z (N, V) of distances d, or of their squares, and of the dict of terms n, scale and bias (V,), where there
        are. is_target (N, V) says where margins apply, None: nowhere."""
        if is_target is not None and self.has_margin:
            d = torch.where(is_target, self.with_margin(d, squared, eps), d)
        z = link_scores(d, terms.get("n", self.n), self.link, squared)
        if "scale" in terms:
            z = z * terms["scale"]
        if "bias" in terms:
            z = z + terms["bias"]
        if self.softcap:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z

    @property
    def adds(self):
        """Whether the loss is more than -log p_y."""
        return bool(self.z_loss or self.label_smoothing or self.has_margin)

    def cost(self, nll, z, num_classes):
        """The loss (c,) of scores z (c, V), whose columns from num_classes on are -inf, and of -log p_y (c,)."""
        if self.label_smoothing:
            log_p = z.log_softmax(1)[:, :num_classes]
            nll = (1 - self.label_smoothing) * nll - self.label_smoothing * log_p.mean(1)
        if self.z_loss:
            nll = nll + self.z_loss * z.logsumexp(1) ** 2
        return nll

    def slope(self, p, is_target, z, num_classes):
        """The gradient of that by z; the columns from num_classes on do not matter."""
        wanted = is_target.to(z.dtype)
        if self.label_smoothing:
            wanted = (1 - self.label_smoothing) * wanted + self.label_smoothing / num_classes
        if self.z_loss:
            p = p * (1 + 2 * self.z_loss * z.logsumexp(1)[:, None])
        return p - wanted # softmax less one-hot


@dataclass
class Plan:
    """What a call of DistanceHead.loss has decided before it looks at numbers."""
    core: Core
    spec: Distance
    o: Options                # eps, the distance's numbers, its estimates and the noise of this call
    rule: Rule
    num_classes: int
    chunk: int                # rows of h at a time
    matmul_dtype: torch.dtype # of the operands of matrix products
    per_row: bool             # the loss is a vector, whose upstream gradient is known in the backward pass only
    at_once: bool             # the gradients are made in the forward pass
    compiled: bool
    chunk_loss: Callable = None
    measures: tuple | None = None # of vectors (N,) that are filled: see Measures
    careful: bool = False     # on a GPU too, each chunk is asked whether it has close pairs

    def prepare(self, inputs):
        """What the core compares, and a dict of all else that varies: the row terms, and of n, bias, scale and eps
        those that are learned. inputs holds h, weight, the learned tensors and these by name."""
        o = self.o.updated(**inputs)
        h, w, terms = prepared(self.spec, o, inputs["h"], inputs["weight"])
        return h, w, {**terms, **{name: inputs[name] for name in ("n", "bias", "scale", "eps") if name in inputs}}

    def scores(self, s, terms, is_target=None):
        """z (c, V) of s (c, V), with the margin where is_target (c, V)."""
        o = self.o.updated(eps=terms["eps"]) if "eps" in terms else self.o
        d = self.spec.finish(s, terms.get("a"), terms.get("b"), o)
        z = self.rule.scores(d, terms, self.spec.squared, is_target, o.eps)
        if self.num_classes == z.shape[1]:
            return z
        padding = torch.arange(z.shape[1], device=z.device) >= self.num_classes # prototypes of nothing
        return z.masked_fill(padding, -math.inf)


def local_vjp(scores, s, terms):
    """torch.func.vjp by autograd, which works under the saved-tensor hooks of checkpoint and save_on_cpu too: they do
    not see this graph."""
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        s = s.detach().requires_grad_()
        terms = {name: x.detach().requires_grad_() for name, x in terms.items()}
        z = scores(s, terms)

    def pull(dz):
        ds, *dterms = torch.autograd.grad(z, [s, *terms.values()], dz)
        return ds, dict(zip(terms, dterms))
    return z.detach(), pull


def of_targets(x, is_target, targets):
    """The targets' entries (c,) of x (c, V). Compiled for a GPU, a gather would keep all of x, a sum does not."""
    if x.is_cuda:
        return x.where(is_target, 0).sum(1)
    return x.gather(1, targets[:, None])[:, 0]


# Compiled for a GPU, chunk_loss computes the scores anew in each pass over them, which costs less than to keep them.
KEEP_NOTHING = {"realize_reads_threshold": 64, "realize_opcount_threshold": 1000}


def chunk_loss_of(core, plan, vjp, is_measured):
    """The function chunk_loss: all that a chunk of rows needs besides matrix products and tiles, in one piece, so that
    torch.compile makes a few passes over the chunk of it."""
    scores, rule, num_classes = plan.scores, plan.rule, plan.num_classes

    def chunk_loss(s, s_target, ds, h, precomputed, targets, weights, terms, constants, differentiate):
        """The loss (c,), and the gradients of sum(weights * loss) by the targets' s (c,) and by every tensor of terms;
        constants are terms that ask for none. Then Measures, or None. At last (c,), below 0 where a pair that is no
        target is close, so that all this is not precise enough; None for a core that is always precise.

        s (c, V) comes from core.forward. s_target (c,) comes from core.value and takes the place of the targets'
        entries. The gradient by all other entries of s is written into ds (c, V), or into s where ds is None."""
        is_target = torch.arange(s.shape[1], device=targets.device) == targets[:, None]
        written = s if ds is None else ds
        s, margin = core.assemble(s, h, precomputed), None
        if isinstance(core, SquaredL2):
            margin = core.margin(s, precomputed).masked_fill(is_target, math.inf).amin(1) # with the passes over rows
        s = torch.where(is_target, s_target[:, None], s)
        if differentiate:
            z, pull = vjp(lambda s, terms: scores(s, {**terms, **constants}, is_target), s, terms)
        else:
            z = scores(s, {**terms, **constants}, is_target)
        log_p = z.log_softmax(1) # not z - logsumexp: of a z of 100, fp32 keeps 1e-5
        nll, measured = rule.cost(-of_targets(log_p, is_target, targets), z, num_classes), None
        if is_measured:
            measured = measures_of(z, log_p)
        if not differentiate:
            return nll, None, {}, measured, margin
        dz = rule.slope(log_p.exp(), is_target, z, num_classes) * weights[:, None]
        ds_all, dterms = pull(dz)
        written.copy_(ds_all.masked_fill(is_target, 0))
        return nll, of_targets(ds_all, is_target, targets), dterms, measured, margin
    return chunk_loss


Measures = namedtuple("Measures", "predicted entropy") # the class of the largest p, and -sum p log p in nats


def measures_of(z, log_p):
    """The Measures (c,) of scores z (c, V), of which those of padding are -inf."""
    finite = log_p.clamp_min(torch.finfo(z.dtype).min) # 0 times -inf would be nan
    return Measures(z.argmax(1), -(log_p.exp() * finite).sum(1))


def chunked_loss(plan, h, w, terms, constants, targets, weights):
    """The loss per row (N,), and the gradients of sum(weights * loss) by h, by w, and by every tensor of the dict
    terms, if they are made at once.

    One chunk of rows at a time: nothing is larger than chunk x V. The target's own term, value and gradient, is
    computed directly from operands that are not rounded to matmul_dtype: the target is what comes close to h, where a
    matrix product cancels. Where another prototype does, its block of rows is done again."""
    core, differentiate, sums, margins = plan.core, plan.at_once, [], []
    if isinstance(core, Tiles):
        core.compile = plan.compiled
    nll = h.new_empty(len(h))
    dh, dw, dterms = None, None, {}
    if differentiate:
        dh, dw = torch.zeros_like(h), torch.zeros_like(w)
        dterms = {name: torch.zeros_like(x) for name, x in terms.items()}
    w_matmul = w.to(plan.matmul_dtype)
    precomputed = core.precompute(w_matmul)
    # every chunk's; the gradient of a matrix product takes the place of s, that of tiles needs s
    s_buffer = h.new_empty(min(plan.chunk, len(h)), len(w))
    ds_buffer = s_buffer
    if differentiate and w_matmul.dtype != h.dtype and h.is_cuda: # what the products take: a third of the traffic less
        ds_buffer = torch.empty_like(s_buffer, dtype=w_matmul.dtype)
    elif differentiate and not core.is_product:
        ds_buffer = torch.empty_like(s_buffer)
    block = plan.chunk if h.is_cuda else max(1, CACHE_ELEMENTS // len(w)) # rows whose scores stay in a CPU's cache

    for chunk in slices(len(h), plan.chunk):
        h_c, targets_c = h[chunk], targets[chunk]
        dh_c = dh[chunk] if differentiate else None
        w_target = w[targets_c] # (c, D)
        h_matmul = h_c.to(plan.matmul_dtype)
        s = s_buffer[:len(h_c)] # (c, V)
        ds = s if ds_buffer is s_buffer else ds_buffer[:len(h_c)]
        s_target = core.value(h_c, w_target) # (c,)
        ds_target = torch.empty_like(s_target)
        core.forward(h_matmul, w_matmul, precomputed, s)
        for j in slices(len(h_c), block):
            rows = slice(chunk.start + j.start, chunk.start + j.stop)
            written = None if ds is s else ds[j]
            arguments = (s_target[j], written, h_matmul[j], precomputed, targets[rows], weights[rows],
                         of_rows(terms, rows), of_rows(constants, rows), differentiate)
            nll_block, ds_block, dterms_block, measured, margin = plan.chunk_loss(s[j], *arguments)
            if margin is not None and h.is_cuda and not plan.careful:
                margins.append(margin)
            elif margin is not None and margin.amin() < 0:
                core.forward(h_matmul[j], w_matmul, precomputed, s[j])
                gradients = (dh_c[j], dw) if differentiate else None
                results = refined_chunk_loss(plan, h_c[j], w, gradients, s[j], *arguments)
                nll_block, ds_block, dterms_block, measured = results
            nll[rows] = nll_block
            for all_rows, x in zip(plan.measures or (), measured or ()):
                all_rows[rows] = x
            if differentiate:
                ds_target[j] = ds_block
            for name, total in of_rows(dterms, rows).items():
                total += dterms_block[name]
        if differentiate:
            if not core.is_product:
                s.scatter_(1, targets_c[:, None], s_target[:, None])
            sums.append(core.backward(h_matmul, w_matmul, s, ds, dh_c, dw)) # all but the targets, whose ds is 0
            gh, gw = core.gradient(h_c, w_target, s_target, ds_target)
            dh_c += gh
            add_rows(dw, targets_c, gw)
    if margins and torch.cat(margins).amin() < 0: # the one wait for a GPU; nothing depends on it but this
        del s_buffer, ds_buffer, s, ds, written, arguments, dh, dh_c, dw # some are views of the others
        return chunked_loss(replace(plan, careful=True), h, w, terms, constants, targets, weights)
    if sums and sums[0] is not None:
        core.add_sums(w_matmul, sum(sums), dw)
    return nll, dh, dw, dterms


def refined_chunk_loss(plan, h, w, gradients, s, s_target, written, h_matmul, precomputed, targets, *arguments):
    """chunk_loss with the close pairs computed directly: what they add to the gradients (dh, dw) of w and of these rows
    of h is added here, and their ds is 0. gradients is None where none are wanted."""
    core = plan.core
    s.copy_(core.assemble(s, h_matmul, precomputed))
    pairs = core.close_pairs(s, precomputed)
    pairs = pairs[pairs[:, 1] != targets[pairs[:, 0]]] # the targets' own are done already
    core.refine(h, w, s, pairs)
    ds = torch.empty_like(s)
    chunk_loss = chunk_loss_of(Core(), plan, local_vjp, plan.measures is not None) # of an s that is whole
    *results, _ = chunk_loss(s, s_target, ds, h_matmul, precomputed, targets, *arguments)
    if gradients:
        core.backward_of_pairs(h, w, s, ds, pairs, *gradients)
        written = s if written is None else written
        written.copy_(ds)[pairs.unbind(1)] = 0
    return results


def of_rows(terms, rows):
    """terms of some rows of h: the row term a has a row for each, the others are the same for all."""
    return {name: x[rows] if name == "a" else x for name, x in terms.items()}


def dense_loss(plan, inputs, targets, weights):
    """The loss by operations that autograd differentiates as often as one likes; it holds N x V x D."""
    h, w, terms = plan.prepare(inputs)
    is_target = torch.arange(len(w), device=targets.device) == targets[:, None]
    z = plan.scores(plan.core.dense(h, w), terms, is_target)
    nll = nn.functional.cross_entropy(z, targets, reduction="none")
    loss = weights * plan.rule.cost(nll, z, plan.num_classes)
    return loss if plan.per_row else loss.sum()


class _Loss(torch.autograd.Function):
    """sum(weights * loss), or the vector of its terms with plan.per_row. The gradients of the sum are made in the
    forward pass, chunk by chunk, and only scaled in the backward pass. That one computes them anew in three cases: of a
    vector, whose upstream gradient it needs; when it runs a second time; and where checkpoint or the like would have
    kept the gradients.

    It takes the inputs by name twice: as they are, and prepared (h, w and terms). First derivatives go through the
    prepared ones; all others begin with those as they are, which costs no memory to keep."""

    @staticmethod
    def forward(ctx, plan, targets, weights, names, term_names, *tensors):
        asked = ctx.needs_input_grad[len(ctx.needs_input_grad) - len(term_names):]
        inputs, (h, w, *rest) = tensors[:len(names)], tensors[len(names):]
        constants = dict(zip(term_names, rest))
        terms = {name: constants.pop(name) for name, is_asked in zip(term_names, asked) if is_asked}
        with full_fp32(h):
            nll, dh, dw, dterms = chunked_loss(plan, h, w, terms, constants, targets, weights)
        ctx.plan, ctx.names, ctx.num_terms = plan, names, len(term_names)
        ctx.grads = [dh, dw, *(dterms.get(name) for name in term_names)] if plan.at_once else None
        ctx.save_for_backward(targets, weights, *inputs)
        return weights * nll if plan.per_row else (weights * nll).sum()

    @staticmethod
    def backward(ctx, g):
        targets, weights, *inputs = ctx.saved_tensors
        names, nothing = ctx.names, [None] * 5 # for plan, targets, weights, names and term_names
        if torch.is_grad_enabled(): # these gradients are to be differentiated again
            def loss(*tensors):
                return dense_loss(ctx.plan, dict(zip(names, tensors)), targets, weights)
            return *nothing, *torch.func.vjp(loss, *inputs)[1](g), *[None] * (2 + ctx.num_terms)

        grads, ctx.grads = ctx.grads, None # they are given away: whoever gets them may change them
        if grads is not None:
            for x in grads:
                if x is not None and (g.is_cuda or g != 1):
                    x *= g
            return *nothing, *[None] * len(names), *grads

        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in inputs]
            plan = replace(ctx.plan, per_row=False, at_once=True, measures=None)
            loss = loss_of(plan, dict(zip(names, inputs)), targets, weights * g)
        return *nothing, *torch.autograd.grad(loss, inputs), *[None] * (2 + ctx.num_terms)


def loss_of(plan, inputs, targets, weights):
    """sum(weights * loss), or the vector of its terms with plan.per_row, of inputs by name."""
    with full_fp32(inputs["h"]):
        h, w, terms = plan.prepare(inputs)
    return _Loss.apply(plan, targets, weights, tuple(inputs), tuple(terms), *inputs.values(), h, w, *terms.values())


# -----------------------------------------------------------------------------
# the modules and the plain function

def one_of(what, name, legal):
    if name in legal:
        return name
    close = get_close_matches(str(name), legal, n=1)
    suggestion = f", did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown {what} {name!r}{suggestion} (legal: {', '.join(legal)})")


def find(distance, variant=None):
    """(the variant's name, its entry in DISTANCES); variant None or "" is the default one, of which the baseline's has
    no name.
    Raises ValueError with the legal names."""
    if distance == "baseline":
        if variant == "unit":
            return variant, UNIT_BASELINE
        if variant:
            raise ValueError(f"baseline has no variants, got {variant!r}, but for unit")
        return None, BASELINE
    variants = DISTANCES[one_of("distance", distance, ["baseline", *DISTANCES])]
    variant = one_of(f"{distance} variant", variant or next(iter(variants)), list(variants))
    return variant, variants[variant]


def checked_options(spec, distance, in_features, eps, params):
    """The namespace o that a distance takes. Raises ValueError for an unknown parameter or an illegal value."""
    legal = [*spec.params, *spec.tensors, *spec.buffers]
    for name in params:
        if name not in legal:
            raise ValueError(f"{distance} has no parameter {name!r} (legal: {', '.join(legal) or 'none'})")
    o = Options(eps=eps, in_features=in_features, noise=None, validate=True, **{**spec.params, **params})
    for name in ("eps", *spec.params):
        value = getattr(o, name)
        if name == "eps" and not value >= 0:
            raise ValueError(f"eps must be >= 0, got {value}")
        if name == "eps" and value >= 1e19:
            raise ValueError(f"eps must be below 1e19, as its square is taken in fp32, got {value}")
        if name in ("alpha", "T", "min_denom", "reg_lambda") and not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")
        if name in ("momentum", "shrinkage") and not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")
        if name == "p" and not 1 <= value < math.inf:
            raise ValueError(f"p must be at least 1 and finite (for infinity use chebyshev), got {value}")
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    return o


def core_takes_eps(spec, o):
    """Whether a distance's core has eps inside, as a number, and so no gradient by it."""
    others = {name: x for name, x in o.__dict__.items() if name != "eps"}
    try:
        spec.core(Options(**others))
    except AttributeError:
        return True
    return False


def pairwise(h, weight, distance, variant=None, eps=1e-4, **params):
    """d(h, w) for all pairs: h (N, D), weight (V, D) -> (N, V). params are the distance's own, learned tensors included
    (mahalanobis A, L, covariance (D, D), theta (D,); offset_l2 alpha (V, D)); left out, they have their initial values.
    Memory O(N V); second derivatives take O(N V D). Raises ValueError for an unknown distance, variant or parameter and
    for sizes that do not fit."""
    if h.ndim != 2 or weight.ndim != 2 or h.shape[1] != weight.shape[1]:
        raise ValueError(f"pairwise takes (N, D) and (V, D), got {tuple(h.shape)} and {tuple(weight.shape)}")
    if distance == "baseline":
        raise ValueError("baseline is a linear head, it has no distance")
    _, spec = find(distance, variant)
    makers = {**spec.tensors, **spec.buffers}
    initial = {name: make(*weight.shape).to(weight) for name, make in makers.items() if name not in params}
    o = checked_options(spec, distance, h.shape[1], eps, {**initial, **params})
    return all_distances(spec, o, h, weight, spec.core(o))


# From these sizes on, elementwise distances by N x V x D and the others by N x V, a compiled step saves about 20 ms (on
# two CPU threads), so that compiling, which takes 5 to 15 s, pays within a thousand steps.
WORTH_COMPILING = {"N x V x D": 2 ** 24, "N x V": 2 ** 22}


class DistanceHead(nn.Module):
    """An output layer of prototypes, in place of nn.Linear(in_features, num_prototypes, bias=False).

    distance, variant, params: see DISTANCES (`python distances.py` lists them); "baseline" is the linear head itself.
    link: "harmonic" (z = -n log d), "softmin" (z = -n d) or "gaussian" (z = -n d^2).
    n: > 0; learn_n=True learns log n. 1 to 4 suits ten classes. A vocabulary needs about sqrt(in_features) or more, on
        features of unit norm: language_model_head in model.py gives both. The linear head is z = n W h.
    eps: bounds -n log d at h = w; where it enters is part of each formula.
    num_classes: rows of the weight from there on are padding (50,257 tokens in 50,304 rows), masked out of p.
    learn_eps: learn log eps, from eps. Not for distances whose core has eps inside (Canberra, signed Bray-Curtis).
    bias: a learned offset per class in z.
    learn_scale: a learned factor per class of z, before the bias, from 1: the exponent n s_k of a harmonic head.
    softcap: c > 0 makes c tanh(z / c) of the scores (Gemma 2: 30, with linear heads 15 to 20 are in use too).
    z_loss, label_smoothing: in training the loss is (1 - s) (-log p_y) + s mean_k(-log p_k) + c log(sum exp z)^2, with
        s = label_smoothing and c = z_loss (PaLM: 1e-4). In evaluation it is -log p_y, whatever these are.
    margin, angular_margin: in training the target's distance is larger by margin, or its angle by so many radians (of
        cosine only). With cosine, softmin and n the scale, these are CosFace's and ArcFace's margins.
    device, dtype: of all parameters, as in nn.Linear.

    Prototypes start as nn.Linear's weight does (kaiming_uniform, a = sqrt 5: +-1/sqrt D), the bias of a linear head as
    its bias does, that of a distance at 0. Raises ValueError for illegal values."""

    def __init__(self, in_features, num_prototypes, distance="euclidean", variant=None, link="harmonic", n=1.0,
                 learn_n=False, eps=1e-4, num_classes=None, bias=False, softcap=0.0, z_loss=0.0, label_smoothing=0.0,
                 margin=0.0, angular_margin=0.0, learn_scale=False, learn_eps=False, device=None, dtype=None, **params):
        super().__init__()
        self.softcap, self.z_loss, self.label_smoothing = softcap, z_loss, label_smoothing
        self.margin, self.angular_margin = margin, angular_margin
        self.in_features, self.num_prototypes = in_features, num_prototypes
        self.num_classes = num_prototypes if num_classes is None else num_classes
        self.distance, self.link, self.eps, self.params = distance, one_of("link", link, LINKS), eps, params
        self.variant, spec = find(distance, variant)
        if not 0 < self.num_classes <= num_prototypes:
            raise ValueError(f"num_classes must lie in 1..{num_prototypes} (the prototypes), got {num_classes}")
        if not n > 0 or not math.isfinite(n):
            raise ValueError(f"n must be > 0 and finite, got {n}")
        ends = dict(softcap=math.inf, z_loss=math.inf, label_smoothing=1, margin=math.inf, angular_margin=math.pi)
        for name, end in ends.items():
            if not 0 <= getattr(self, name) < end:
                raise ValueError(f"{name} must lie in [0, {end:.4g}), got {getattr(self, name)}")
        if angular_margin and distance != "cosine":
            raise ValueError(f"angular_margin is one of angles, which cosine has, got {distance}: use margin")
        if margin and distance == "baseline":
            raise ValueError("margin is one of distances, of which a linear head has none: use cosine, softmin")
        for name in (*spec.tensors, *spec.buffers):
            if name in params:
                raise ValueError(f"{name} belongs to the head (head.{name}), it is not an argument")
        self.options = checked_options(spec, distance, in_features, eps, params)
        if learn_eps and (distance == "baseline" or core_takes_eps(spec, self.options)):
            raise ValueError(f"learn_eps is for distances to which eps is added at the end, got {distance}")
        if learn_eps and not eps > 0:
            raise ValueError(f"learn_eps begins with eps, which must be > 0 then, got {eps}")
        self.weight = nn.Parameter(torch.empty(num_prototypes, in_features))
        for name, make in spec.tensors.items():
            self.register_parameter(name, nn.Parameter(make(num_prototypes, in_features)))
        for name, make in spec.buffers.items():
            self.register_buffer(name, make(num_prototypes, in_features))
        if distance == "baseline":
            self.link = "softmin"
        self.fixed_n = None if learn_n else float(n)
        if learn_n:
            self.log_n = nn.Parameter(torch.tensor(math.log(n)))
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_prototypes)) if bias else None)
        self.register_parameter("scale", nn.Parameter(torch.ones(num_prototypes)) if learn_scale else None)
        self.register_parameter("log_eps", nn.Parameter(torch.tensor(math.log(eps))) if learn_eps else None)
        self.compiled = None # see compile_loss
        self.mm_dtype = None # of the loss's matrix products; None: bf16 on a GPU under autocast to bf16, else as h is
        self.validate = True # check h and targets at every call: it waits for the device, a training loop may skip it
        self._look_up()
        nn.init.kaiming_uniform_(self.weight, a=5 ** 0.5)
        if bias and distance == "baseline":
            nn.init.uniform_(self.bias, -in_features ** -0.5, in_features ** -0.5)
        self.to(device=device, dtype=dtype)

    def _look_up(self):
        """What holds functions, and is no part of a pickle."""
        _, self.spec = find(self.distance, self.variant)
        self.core, self._chunk_losses = self.spec.core(self.options), {}
        self.compile_loss(self.compiled)

    def __getstate__(self):
        return {name: x for name, x in self.__dict__.items() if name not in ("spec", "core", "_chunk_losses")}

    def __setstate__(self, state):
        super().__setstate__(state)
        for name in ("scale", "log_eps"): # a pickle of an earlier version has neither these
            self._parameters.setdefault(name, None)
        for name in ("softcap", "z_loss", "label_smoothing", "margin", "angular_margin"): # nor these
            self.__dict__.setdefault(name, 0.0)
        if self.distance not in DISTANCES and self.distance != "baseline":
            raise ValueError(f"this head has the distance {self.distance!r}, which DISTANCES does not hold here: "
                             "register it before the head is loaded, as was done where it was made")
        self._look_up()

    @property
    def out_features(self):
        return self.num_classes

    @property
    def kind(self):
        """What the head is, in words that two heads share only if they have the same link and, given the same weights
        and eps, the same distances."""
        if self.distance == "baseline":
            return " ".join(["linear", *filter(None, [self.variant])])
        numbers = {name: x for name, x in {**self.spec.params, **self.params}.items() if name != "momentum"}
        words = [f"{name}={x:g}" for name, x in sorted(numbers.items())]
        return " ".join([self.distance, self.variant, self.link, *words])

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """The state dict gets the kind too, as bytes: a linear layer refuses it."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kind != "linear":
            destination[f"{prefix}kind"] = torch.tensor(list(self.kind.encode()), dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        """The weights of another head are refused: they would load without a word, and score otherwise."""
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        saved = state_dict.get(f"{prefix}kind")
        if saved is not None:
            unexpected[:] = [key for key in unexpected if key != f"{prefix}kind"]
        saved = "linear" if saved is None else bytes(saved.byte().tolist()).decode(errors="replace")
        if f"{prefix}weight" in state_dict and saved != self.kind:
            errors.append(f"the weights of {prefix}weight are those of a {saved} head, this is a {self.kind} head")

    @torch.no_grad()
    def resize(self, num_prototypes):
        """Change the number of prototypes, in place: the first ones stay, new ones start as those of a new head do. The
        parameters are new ones, which the optimizer has to be told. Returns self, for
        model.set_output_embeddings(head.resize(n))."""
        arguments = dict(self.params, bias=self.bias is not None, learn_scale=self.scale is not None)
        fresh = DistanceHead(self.in_features, num_prototypes, self.distance, self.variant, **arguments)
        for name in ("weight", "bias", "scale", *self.spec.tensors):
            old, new = getattr(self, name), getattr(fresh, name)
            if old is None or old.shape == new.shape:
                continue
            new, kept = new.to(old), min(len(old), len(new))
            new[:kept] = old[:kept]
            setattr(self, name, nn.Parameter(new, requires_grad=old.requires_grad))
        self.num_prototypes = self.num_classes = num_prototypes
        self._chunk_losses = {}
        return self

    def extra_repr(self):
        padding = f" of {self.num_prototypes}" if self.num_classes < self.num_prototypes else ""
        words = [f"{self.in_features} -> {self.num_classes}{padding}, {self.distance}"]
        learned = " learned" if self.fixed_n is None else ""
        n = f"n={torch.as_tensor(self.n).item():.4g}{learned}"
        if self.distance != "baseline":
            words = [f"{words[0]} ({self.variant})", self.link, n, f"eps={self.eps:g}"]
            if self.log_eps is not None:
                words[-1] = f"eps={self.log_eps.exp().item():g} learned"
        else:
            words += [] if self.variant is None else [self.variant]
            words += [] if self.fixed_n == 1 else [n]
        numbers = {**self.spec.params, **self.params}
        words += [f"{name}={value}" for name, value in numbers.items()]
        if self.bias is not None:
            words.append("bias")
        if self.scale is not None:
            words.append("learned scale")
        for name in ("softcap", "z_loss", "label_smoothing", "margin", "angular_margin"):
            if getattr(self, name):
                words.append(f"{name}={getattr(self, name):g}")
        return ", ".join(words)

    @property
    def is_linear(self):
        """Whether the scores are those of nn.Linear without a bias, z = W h and nothing else: the baseline."""
        is_bare = self.bias is None and self.scale is None and not self.softcap
        return self.kind == "linear" and self.fixed_n == 1 and is_bare

    @property
    def n(self):
        return self.log_n.exp() if self.fixed_n is None else self.fixed_n

    def prototype_norms(self):
        """|w_k| of every class (num_classes,), in fp32."""
        return self.weight.detach()[:self.num_classes].float().norm(dim=1)

    def compile_loss(self, on=True):
        """Whether what is not a matrix product goes through torch.compile: the tiles of elementwise distances (but see
        Tiles.triton), and the way from distances to the loss and back. None, the default: where a call of loss is large
        enough to be worth the 5 to 15 seconds that compiling takes once, and where there is a compiler (C++ on a CPU,
        triton on a GPU)."""
        self.compiled, self._chunk_losses = on, {}

    def distances(self, h):
        """d(h, w_k): h (..., D) -> (..., num_classes). In fp32 the relative error is at most about 1e-4, that of close
        pairs too; but a compiled graph does not refine close pairs, and promises nothing of them."""
        if self.distance == "baseline":
            raise ValueError("baseline is a linear head, it has no distance")
        with without_autocast(h):
            return self._distances(*self._inputs(h)).reshape(*h.shape[:-1], self.num_classes)

    def forward(self, h):
        """z, the scores whose softmax is p: h (..., D) -> (..., num_classes)."""
        with without_autocast(h):
            return self._scores(*self._inputs(h)).reshape(*h.shape[:-1], self.num_classes)

    def _scores(self, *inputs):
        d, terms = self._distances(*inputs), {"n": self.n}
        for name in ("bias", "scale"):
            if getattr(self, name) is not None:
                terms[name] = getattr(self, name)[:self.num_classes].to(d.dtype)
        return self._rule().scores(d, terms)

    def _rule(self):
        in_training = ()
        if self.training:
            in_training = self.z_loss, self.label_smoothing, self.margin, self.angular_margin
        return Rule(self.link, self.fixed_n, self.softcap, *in_training)

    def _distances(self, h, weight, tensors):
        if isinstance(self.core, Tiles):
            self.core.compile = bool(self.compiled)
        d = all_distances(self.spec, self._options(h, weight).updated(**tensors), h, weight, self.core)
        return d[:, :self.num_classes]

    def _inputs(self, h):
        """h (..., D) -> (N, D), the weight, and the learned tensors by name, with eps if it is one, all in fp32 (fp64
        stays)."""
        if h.shape[-1] != self.in_features:
            raise ValueError(f"the head takes features of size {self.in_features}, got {tuple(h.shape)}")
        h = h.reshape(-1, self.in_features)
        if self.validate and has_values(h) and not math.isfinite(h.detach().sum().item()): # a sum may overflow
            wrong = ~torch.isfinite(h)
            if wrong.any():
                row = wrong.any(1).nonzero()[0].item()
                raise ValueError(f"h is not finite: {wrong.sum().item()} of {h.numel()} values, the first in row {row}")
        dtype = at_least_fp32(h.dtype, self.weight.dtype)
        h, weight = h.to(dtype), self.weight.to(dtype)
        tensors = {name: getattr(self, name).to(dtype) for name in self.spec.tensors}
        if self.log_eps is not None:
            tensors["eps"] = self.log_eps.to(dtype).exp()
        return h, weight, tensors

    def _options(self, h, weight):
        """The options of this call, with the estimates and a sample of the noise, as the backward pass may need
        them."""
        changing = {name: getattr(self, name).to(h.dtype, copy=True) for name in self.spec.buffers}
        if self.spec.noise and self.training:
            changing["noise"] = self.spec.noise(h), self.spec.noise(weight)
        return self.options.updated(validate=self.validate, **changing)

    @torch.compiler.disable # the chunk loop and its own gradients stay out of the compiled graph
    def loss(self, h, targets, ignore_index=-100, reduction="mean", chunk=None, weights=None, measures=False):
        """-log p_y in nats, F.cross_entropy(head(h), targets) without N x V in memory; in training, what z_loss,
        label_smoothing and margins make of it. Value and gradients are equal but for rounding, however close h comes to
        a prototype. A distance that transforms h and w first (of unit vectors, Mahalanobis, Hamming, normalized
        Bray-Curtis) rounds them: at a gap |h - w| = e |h| in fp32 a gradient is right to some 3e-7 / e.

        h (..., D), targets (...) of the same leading shape; entries equal to ignore_index do not count. reduction:
        "mean" over the targets that count, "sum", or "none", per target, whose backward pass computes the distances
        again. chunk: rows at a time, by default 256 (elementwise 128 on a CPU), and more where a buffer of scores stays
        below 16 MB (4 MB; 512 MB on a GPU).

        weights (...): how much each target counts, without a gradient; "mean" divides by their sum. measures: return
        (loss, Measures) of the same pass, with predicted (...), so that (predicted == targets) is token accuracy, and
        entropy (...) of p, in nats, both without a gradient, and in training with the target's margin if there is one.

        Everything runs in fp32 with autocast off, but for the operands of matrix products (mm_dtype), and gradients of
        the weight accumulate in fp32. Second derivatives are right, and hold N x V x D. torch.compile runs the loss
        outside of its graph, or raises with fullgraph=True, and torch.func's transforms raise RuntimeError ("must
        override the setup_context") beyond SMALL: both take F.cross_entropy(head(h), targets).

        Raises ValueError for shapes that do not fit, a target out of range and an h that is not finite."""
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
        if h.shape[:-1] != targets.shape:
            raise ValueError(f"h {tuple(h.shape)} and targets {tuple(targets.shape)} do not fit: h needs one more "
                             "dimension, the features")
        if targets.is_floating_point() or targets.dtype == torch.bool:
            raise ValueError(f"targets are class numbers, of an integer type, got {targets.dtype}")
        autocast_dtype = torch.get_autocast_dtype("cuda") if h.is_cuda and torch.is_autocast_enabled("cuda") else None
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        if weights is not None and weights.shape != targets.shape:
            raise ValueError(f"weights {tuple(weights.shape)} and targets {tuple(targets.shape)} do not fit: each "
                             "target has one")
        shape, targets = targets.shape, targets.reshape(-1).long()
        counts = targets != ignore_index
        if self.validate:
            self._check_targets(targets.where(counts, torch.zeros_like(targets)), ignore_index)
        with without_autocast(h):
            h, weight, tensors = self._inputs(h)
            if self.spec.buffers and self.training:
                self._update_covariance(h.detach()[counts], targets[counts])
            differentiate = torch.is_grad_enabled() and any(x.requires_grad for x in (h, *self.parameters()))
            is_plain = weights is None and not self._rule().adds and not self._is_compiled(h, differentiate)
            if chunk is None and self._is_small(h) and is_plain:
                z = self._scores(h, weight, tensors)
                loss = nn.functional.cross_entropy(z, targets, ignore_index=ignore_index, reduction=reduction)
                loss, z = loss.reshape(shape) if reduction == "none" else loss, z.detach()
                return with_measures(loss, shape, measures_of(z, z.log_softmax(1))) if measures else loss
            o = self._options(h, weight)
            inputs = {"h": h, "weight": weight, **tensors}
            if self.fixed_n is None:
                inputs["n"] = self.n.to(h.dtype)
            for name in ("bias", "scale"):
                if getattr(self, name) is not None:
                    inputs[name] = getattr(self, name).to(h.dtype)
            given, weights = weights, counts.to(h.dtype)
            if given is not None:
                weights = weights * given.detach().reshape(-1).to(h.dtype)
            if reduction == "mean":
                weights = weights / (counts.sum().clamp_min(1) if given is None else weights.sum())
            targets = targets.where(counts, torch.zeros_like(targets))
            filled = None
            if measures:
                filled = Measures(torch.empty_like(targets), h.new_empty(len(h)))
            plan = self._plan(inputs, o, chunk, autocast_dtype, reduction == "none", filled)
            try:
                loss = self._loss_of(plan, inputs, targets, weights)
            except Exception as e:
                of_the_compiler = type(e).__module__.startswith(("torch._dynamo", "torch._inductor"))
                if self.compiled is not None or not plan.compiled or not of_the_compiler:
                    raise
                reason = repr(e)[:200]
                warnings.warn(f"torch.compile does not work here, large batches take longer: {reason}", stacklevel=2)
                self.compile_loss(False)
                plan = self._plan(inputs, o, chunk, autocast_dtype, reduction == "none", filled)
                loss = self._loss_of(plan, inputs, targets, weights)
        if reduction == "none":
            loss = loss.reshape(shape)
        if reduction == "mean": # the mean of nothing, as F.cross_entropy has it, with gradients of 0
            loss = loss.where(counts.any(), torch.nan)
        return with_measures(loss, shape, filled) if measures else loss

    def _is_small(self, h):
        return self.mm_dtype is None and len(h) * self.num_prototypes <= SMALL["N x V"]

    def _loss_of(self, plan, inputs, targets, weights): # distances_parallel.py has another one
        return loss_of(plan, inputs, targets, weights)

    def _check_targets(self, targets, ignore_index):
        if len(targets) == 0:
            return
        least, most = targets.aminmax()
        if least < 0 or most >= self.num_classes:
            illegal = targets[(targets < 0) | (targets >= self.num_classes)]
            raise ValueError(f"target {illegal[0].item()} is out of range: the head has classes "
                             f"0..{self.num_classes - 1} (ignore_index={ignore_index})")

    def _plan(self, inputs, o, chunk, autocast_dtype, per_row, measures=None):
        h, core = inputs["h"], self.core
        if chunk is None and h.is_cuda:
            rows = max(1, 2 ** 27 // self.num_prototypes) # 512 MB of scores, and half of that for their gradient
            chunk = max(256, 2 ** (rows.bit_length() - 1)) # a power of two: no ragged last chunk, which compiles again
        elif chunk is None:
            chunk = max(core.min_chunk_rows, core.chunk_elements // self.num_prototypes)
        matmul_dtype = h.dtype
        if core.bf16_operands:
            automatic = torch.bfloat16 if autocast_dtype == torch.bfloat16 else h.dtype
            matmul_dtype = self.mm_dtype or automatic
        differentiate = torch.is_grad_enabled() and any(x.requires_grad for x in inputs.values())
        compiled = self._is_compiled(h, differentiate)
        rule, num_classes = self._rule(), self.num_classes
        at_once = differentiate and not per_row and not saved_tensor_hooks()
        plan = Plan(core, self.spec, o, rule, num_classes, chunk, matmul_dtype, per_row, at_once, compiled)
        key = rule, num_classes, compiled, measures is not None
        if key not in self._chunk_losses:
            vjp = torch.func.vjp if compiled else local_vjp # the compiler takes the one, hooks allow the other
            kept = replace(plan, o=self.options) # it must not hold this call's noise
            chunk_loss = chunk_loss_of(core, kept, vjp, measures is not None)
            options = KEEP_NOTHING if h.is_cuda else None
            self._chunk_losses[key] = with_own_cache(chunk_loss, options=options) if compiled else chunk_loss
        plan.chunk_loss, plan.measures = self._chunk_losses[key], measures
        return plan

    def _is_compiled(self, h, differentiate):
        """Whether this call goes through torch.compile. The choice hangs on sizes alone, so that equal runs stay
        equal."""
        if saved_tensor_hooks():
            return False # they forbid torch.func.vjp
        if self.compiled is not None:
            return self.compiled
        if isinstance(self.core, Tiles):
            gain = 1 if differentiate else 1 / 8 # a forward pass alone has less to gain
            return gain * len(h) * self.weight.numel() >= WORTH_COMPILING["N x V x D"]
        return differentiate and len(h) * self.num_prototypes >= WORTH_COMPILING["N x V"]

    @torch.no_grad()
    def _update_covariance(self, h, targets):
        scatter, freedom = within_class_scatter(h, targets)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(scatter) # every rank estimates from the whole batch
            torch.distributed.all_reduce(freedom)
        if freedom.item() > 0: # some class was seen twice
            self.covariance.lerp_((scatter / freedom).to(self.covariance.dtype), 1 - self.options.momentum)


def with_measures(loss, shape, measures):
    return loss, Measures(*(x.reshape(shape) for x in measures))


class HarmonicLoss(nn.Module):
    """A criterion like nn.CrossEntropyLoss that owns its prototypes: criterion(features (..., D), targets (...)) ->
    loss in nats. Takes DistanceHead's arguments; pass its parameters to the optimizer. criterion.head(features) gives
    the scores."""

    def __init__(self, in_features, num_classes, ignore_index=-100, reduction="mean", **kwargs):
        super().__init__()
        self.head = DistanceHead(in_features, num_classes, **kwargs)
        self.ignore_index, self.reduction = ignore_index, reduction

    def forward(self, features, targets):
        return self.head.loss(features, targets, self.ignore_index, self.reduction)


def parse_head(text, variant="", params=""):
    """DistanceHead's arguments: parse_head("minkowski:p=3"), written distance[:variant][:name=number,...], and the
    three settings parse_head("minkowski", "", "p=3") both give {"distance": "minkowski", "variant": None, "p": 3.0}.
    Raises ValueError for what does not read so."""
    distance, *parts = text.strip().split(":")
    variants = [name for name in (*parts, variant) if name and "=" not in name]
    if len(variants) > 1:
        raise ValueError(f"a head is written distance[:variant][:name=value], got {text!r}")
    arguments = {"distance": distance, "variant": variants[0] if variants else None}
    params = ",".join([*(part for part in parts if "=" in part), params])
    not_of_a_distance = inspect.signature(DistanceHead.__init__).parameters # such as eps
    for item in params.split(","):
        name, _, number = item.partition("=")
        name = name.strip()
        if not item.strip():
            continue
        if name in not_of_a_distance:
            raise ValueError(f"{name} is no parameter of a distance but of every head, got {params!r}: set it apart")
        try:
            arguments[name] = float(number)
        except ValueError:
            message = f"distance_params must read name=number, comma separated, such as p=3, got {params!r}"
            raise ValueError(message) from None
    return arguments


# DistanceHead's arguments that are settings of the scripts by the same name; their `head_bias` is its bias, as a model
# has a bias of its own
OF_EVERY_HEAD = ("link", "n", "learn_n", "eps", "learn_eps", "learn_scale", "softcap", "z_loss", "label_smoothing",
                 "margin", "angular_margin")


def head_arguments(settings):
    """DistanceHead's arguments in a dict of settings, which may hold others and need not have all. Raises ValueError as
    parse_head does."""
    arguments = parse_head(settings["distance"], settings["variant"], settings["distance_params"])
    arguments.update({name: settings[name] for name in OF_EVERY_HEAD if name in settings})
    return {**arguments, "bias": settings.get("head_bias", False)}


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL) # `python distances.py | head` ends without a word
    print(f"{'distance':<12}{'variant':<11}{'parameters':<33}d(h, w)")
    for distance, variants in {"baseline": {"": BASELINE, "unit": UNIT_BASELINE}, **DISTANCES}.items():
        for variant, spec in variants.items():
            numbers = [f"{name}={value:g}" for name, value in spec.params.items()]
            params = ", ".join([*numbers, *(f"{name} (learned)" for name in spec.tensors)])
            print(f"{distance:<12}{variant:<11}{params:<32} {spec.formula}")
