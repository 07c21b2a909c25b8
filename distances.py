"""
Distance heads: an output layer with one prototype vector w_k per class (or token), whose probabilities fall with distance:

    z_k = log kappa(d(h, w_k)),    p = softmax(z),    loss = -log p_y    (nats)

    link "harmonic":  z = -n log d,  so that p_k is proportional to d^-n    ("Non-Euclidean Harmonic Losses", Eq. 1)
    link "softmin":   z = -n d                                              (the same paper's appendix B)

n is defined on d, never on d squared, for every distance alike. `baseline` is the linear head z = W h.

This file needs torch and nothing else; copy it into any project.

    head = DistanceHead(768, 50304, distance="cosine", n=28.0)     # in place of nn.Linear(768, 50304, bias=False)
    z = head(h)                                                    # (N, V) scores, softmax(z) is p
    loss = head.loss(h, targets)                                   # the same loss, exact, without ever holding N x V

    criterion = HarmonicLoss(128, 10, distance="euclidean")        # or as a criterion that owns its prototypes
    loss = criterion(features, labels)

    d = pairwise(h, w, "minkowski", p=3.0)                         # or as a plain function (N, D), (V, D) -> (N, V)

    python distances.py                                            # prints every distance, variant and parameter

How it is built. A distance is  d(h, w) = finish(core(prep(h), prep(w))):
    prep    O((N + V) D), differentiated by autograd: normalise, whiten, squash, add noise
    core    O(N V D), the only expensive part: a matrix product, or tiles of a sum, max or ratio over the D differences
    finish  O(N V), differentiated by autograd: a root, a division by row and column sums, + eps
To add a distance write its core, one line such as Tiles(lambda h, w: (h - w).abs().sum(-1)), and one entry of DISTANCES; autograd
finds its gradient where none is written.
"""
import math
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import FunctionType, SimpleNamespace

import torch
from torch import nn

# -----------------------------------------------------------------------------
# cores: s = core(h, w) for all pairs. Each has
#   value(h, w)                       one pair, or any that broadcast: (..., D), (..., D) -> (...)
#   gradient(h, w, s, g)              of those: g ds/dh and g ds/dw (..., D)
#   once(w)                           what all chunks of h need of w
#   forward(h, w, once, out)          all pairs, into out (N, V); of a matrix product just that, which
#   assemble(out, h, once)            then makes s of: apart, as torch.compile fuses it with what follows
#   backward(h, w, s, g, dh, dw)      all pairs: adds the gradients to dh and dw in place, without a copy of w

CACHE_ELEMENTS = 2 ** 18 # of a temporary on a CPU: 1 MB in fp32 stays in cache, where a larger one costs more than the arithmetic


def _sum_d(x):
    return x.sum(-1)


def _wide(x): # the dtype of results
    return torch.promote_types(x.dtype, torch.float32)


def _norm2(x): # without a temporary the size of x
    return torch.linalg.vector_norm(x, dim=-1, dtype=_wide(x)).square_()


def _slices(n, step):
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def _product(a, b, out, alpha=1.0, beta=0.0):
    """out = beta out + alpha a @ b in out's dtype. The products of bf16 numbers are exact in fp32; a GPU takes them as they are and adds in fp32."""
    if a.dtype != out.dtype and a.is_cuda:
        return torch.addmm(out, a, b, out_dtype=out.dtype, alpha=alpha, beta=beta, out=out)
    return torch.addmm(out, a.to(out.dtype), b.to(out.dtype), alpha=alpha, beta=beta, out=out)


class Core:
    is_product = False # of matrices: the backward pass does without s
    rounds = False # its operands to bf16 under autocast
    rows, elements = 256, 2 ** 21 # that the loss takes at a time on a CPU: at least so many rows, or so many of their N x V

    def once(self, w):
        return None

    def assemble(self, out, h, once):
        return out


class SquaredL2(Core):
    """s = |h - w|^2 by one matrix product. The identity |h|^2 + |w|^2 - 2 h.w cancels when h and w are close: its absolute error is
    up to 16 x 2^-24 (|h|^2 + |w|^2) in fp32. So the loss computes the target's s directly, and `distances` all close pairs.
    bf16 operands: the norms are those of the rounded vectors, or the difference of the roundings would be taken for a distance."""
    is_product = rounds = True
    close = 1e-2 # a pair is close where s < close * (|h|^2 + |w|^2); beyond it the relative error of d is below 1e-4

    def value(self, h, w):
        return _sum_d((h - w) ** 2)

    def gradient(self, h, w, s, g):
        gh = 2 * g[..., None] * (h - w)
        return gh, -gh

    def once(self, w):
        return _norm2(w)

    def forward(self, h, w, once, out):
        _product(h, w.T, out)

    def assemble(self, out, h, once):
        return (_norm2(h)[:, None] + once - 2 * out).clamp_min(0)

    def size(self, h, w): # of the terms that cancel
        return _norm2(h)[:, None] + _norm2(w)

    def refine(self, h, w, s):
        for pairs in (s < self.close * self.size(h, w)).nonzero().split(2 ** 16):
            i, j = pairs.T
            s[i, j] = self.value(h[i], w[j])
        return s

    def backward(self, h, w, s, g, dh, dw):
        g = g.to(w.dtype) # the sums are those of the rounded g, as the products are
        _product(g, w, dh.addcmul_(h, g.sum(1, dtype=dh.dtype)[:, None], value=2), -2, 1)
        _product(g.T, h, dw.addcmul_(w, g.sum(0, dtype=dw.dtype)[:, None], value=2), -2, 1)


class WeightedSquaredL2(SquaredL2):
    """s = sum alpha_k^2 (h - w_k)^2 with a weight per prototype and dimension; w holds [w, alpha] side by side (V, 2D)."""
    rounds = False # its products are of derived matrices
    slice = 1024

    def value(self, h, w):
        w, alpha = w.chunk(2, -1)
        return _sum_d((alpha * (h - w)) ** 2)

    def gradient(self, h, w, s, g):
        w, alpha = w.chunk(2, -1)
        x, g = h - w, 2 * g[..., None]
        gh = g * alpha ** 2 * x
        return gh, torch.cat([-gh, g * alpha * x * x], -1)

    def once(self, w):
        return None

    def forward(self, h, w, once, out):
        h2 = h * h
        for j in _slices(len(w), self.slice): # the copies of w stay small
            w_j, alpha = w[j].chunk(2, -1)
            a2 = alpha ** 2
            out[:, j] = torch.addmm(_sum_d(a2 * w_j * w_j), h, (a2 * w_j).T, alpha=-2).addmm_(h2, a2.T)

    def assemble(self, out, h, once):
        return out.clamp_min(0)

    def size(self, h, w):
        w, alpha = w.chunk(2, -1)
        return (h * h) @ (alpha ** 2).T + _sum_d((alpha * w) ** 2)

    def backward(self, h, w, s, g, dh, dw):
        for j in _slices(len(w), self.slice):
            (w_j, alpha), (dw_j, dalpha), g_j = w[j].chunk(2, -1), dw[j].chunk(2, -1), g[:, j]
            a2, g_h, g_v = alpha ** 2, g_j.T @ h, g_j.sum(0)[:, None]
            dh += 2 * (h * (g_j @ a2) - g_j @ (a2 * w_j))
            dw_j += 2 * a2 * (w_j * g_v - g_h)
            dalpha += 2 * alpha * (g_j.T @ (h * h) - 2 * w_j * g_h + w_j * w_j * g_v)


class Dot(Core):
    """s = h.w"""
    is_product = rounds = True

    def value(self, h, w):
        return _sum_d(h * w)

    def gradient(self, h, w, s, g):
        return g[..., None] * w, g[..., None] * h

    def forward(self, h, w, once, out):
        _product(h, w.T, out)

    def backward(self, h, w, s, g, dh, dw):
        g = g.to(w.dtype)
        _product(g, w, dh, 1, 1)
        _product(g.T, h, dw, 1, 1)


class Tiles(Core):
    """Any other s = value(h, w), tile by tile, so that N x V x D is never held.

    slope(h, w, s, g) is the gradient per element, (g ds/dh, g ds/dw) with s and g (..., 1); where it is None autograd finds it.
    pair(h, w, s, g) -> (s, g) is what slope takes of a pair as a whole, made once where it is needed D times.
    kernel names the same function in distances_triton.py, for GPUs.

    Three ways to run it: eager tiles; compile = True: larger tiles of one fixed shape through torch.compile, in which nothing of size
    N x V x D is held either; triton = True: hand-written kernels, where there are a GPU, triton and a kernel."""
    tile = 128, 512 # of torch.compile: measured best on CPUs
    rows, elements = 128, 2 ** 20

    def __init__(self, value, slope=None, pair=None, kernel=None):
        self.value, self.slope, self.pair, self.kernel = value, slope, pair, kernel
        self.compile, self.triton, self._functions = False, True, None

    def gradient(self, h, w, s, g):
        if self.slope is None:
            with torch.enable_grad():
                h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
                return torch.autograd.grad(self.value(h, w), (h, w), g)
        if self.pair is not None:
            s, g = self.pair(h, w, s, g)
        return self.slope(h, w, s[..., None], g[..., None])

    def _kernels(self, h):
        """The module of GPU kernels, if it has one for this core."""
        if not (self.triton and self.kernel and h.is_cuda and h.dtype == torch.float32):
            return None
        try:
            import distances_triton
        except Exception as e:
            if not isinstance(e, ImportError): # no triton, or this file was copied alone
                warnings.warn(f"distances_triton.py does not work here, the tiles of torch take its place ({type(e).__name__}: {e})", stacklevel=2)
            self.triton = False
            return None
        return distances_triton if distances_triton.supports(self.kernel) else None

    def forward(self, h, w, once, out):
        kernels = self._kernels(h)
        if kernels:
            return out.copy_(kernels.forward(self.kernel, h, w))
        for i, j in self._tiles(*out.shape, h.shape[1], h.is_cuda):
            if self.compile:
                h_i, w_j = _fill(h[i], self.tile[0]), _fill(w[j], self.tile[1])
                out[i, j] = self._tile_functions().forward(h_i, w_j)[:i.stop - i.start, :j.stop - j.start]
            else:
                out[i, j] = self.value(h[i][:, None], w[j][None])

    def backward(self, h, w, s, g, dh, dw):
        kernels = self._kernels(h)
        if kernels:
            return kernels.backward(self.kernel, h, w, s, g, dh, dw)
        for i, j in self._tiles(*s.shape, h.shape[1], h.is_cuda):
            if self.compile:
                fn, (n, v) = self._tile_functions(), self.tile
                h_i, w_j, s_ij = _fill(h[i], n), _fill(w[j], v), _fill(_fill(s[i, j], n).T, v).T.contiguous()
                g_ij = nn.functional.pad(g[i, j], (0, v - j.stop + j.start, 0, n - i.stop + i.start))
                if self.pair is not None:
                    s_ij, g_ij = fn.pair(h_i, w_j, s_ij, g_ij) # (n, v)
                dh[i] += fn.dh(h_i, w_j, s_ij, g_ij)[:i.stop - i.start]
                dw[j] += fn.dw(h_i, w_j, s_ij.T.contiguous(), g_ij.T.contiguous())[:j.stop - j.start]
            else: # (n, v, D) each, or already summed by autograd
                gh, gw = self.gradient(h[i][:, None], w[j][None], s[i, j], g[i, j])
                dh[i] += gh.sum(1)
                dw[j] += gw.sum(0)

    def _tiles(self, N, V, D, cuda):
        tn, tv = self.tile if self.compile else (16, max(1, CACHE_ELEMENTS * (128 if cuda else 1) // (16 * D)))
        return ((i, j) for i in _slices(N, tn) for j in _slices(V, tv))

    def _tile_functions(self):
        """Of one tile (n, v): forward, pair, and each gradient on its own with its sum innermost, since a kernel that sums along both
        n and v would store the tile. dw takes s and g transposed (v, n)."""
        def forward(h, w):
            return self.value(h[:, None], w[None])

        def pair(h, w, s, g):
            return self.pair(h[:, None], w[None], s, g)

        def dh(h, w, s, g):
            if self.slope is None:
                return torch.func.vjp(forward, h, w)[1](g)[0]
            return self.slope(h[:, None], w[None], s[..., None], g[..., None])[0].sum(1)

        def dw(h, w, s, g):
            if self.slope is None:
                return torch.func.vjp(forward, h, w)[1](g.T)[1]
            return self.slope(h[None], w[:, None], s[..., None], g[..., None])[1].sum(1)

        if self._functions is None:
            self._functions = SimpleNamespace(**{fn.__name__: _compile(fn, dynamic=False, fullgraph=True) for fn in (forward, pair, dh, dw)})
        return self._functions


def _fill(x, rows):
    """x with its last row repeated up to so many rows: a ragged tile in the one shape that is compiled, of values like its own."""
    return x if len(x) == rows else torch.cat([x, x[-1:].expand(rows - len(x), -1)])


def _compile(fn, **options):
    """torch.compile with a cache of its own. Dynamo counts recompilations per code object, and many heads share this file's: past the
    eighth it would go on eagerly, for a tile with N x V x D in memory, and say so in a log line only."""
    return torch.compile(FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__), **options)


def _of_difference(value, slope, pair=None, kernel=None):
    """Tiles of a function of x = h - w, whose gradients are opposite."""
    def slopes(h, w, s, g):
        gh = slope(h - w, s, g)
        return gh, -gh
    return Tiles(lambda h, w: value(h - w), slopes, pair and (lambda h, w, s, g: pair(h - w, s, g)), kernel)


def _signed(x, g):
    """g sign(x) by one comparison, twice as fast as sign(). At x = 0, where |x| has every slope in [-1, 1], it takes -1."""
    return torch.where(x > 0, g, -g)


def _tiny(x):
    return torch.finfo(x.dtype).tiny


def l1(o):
    return _of_difference(lambda x: _sum_d(x.abs()), lambda x, s, g: _signed(x, g), kernel=("l1",))


def linf(o):
    def pair(x, s, g): # ties share the gradient: a true subgradient
        return s, g / (x.abs() == s[..., None]).to(x.dtype).sum(-1)
    return _of_difference(lambda x: x.abs().amax(-1), lambda x, s, g: torch.where(x.abs() == s, _signed(x, g), 0), pair, ("linf",))


def smooth_linf(o):
    return _of_difference(lambda x: torch.logsumexp(o.alpha * x.abs(), -1) / o.alpha,
                          lambda x, s, g: _signed(x, g) * torch.exp(o.alpha * (x.abs() - s)))


def _power(k):
    """x -> x^k for x >= 0; the usual ones without pow, which is 10 to 100 times slower."""
    return {-0.5: torch.rsqrt, 0.5: torch.sqrt, 1.0: lambda x: x, 2.0: lambda x: x * x}.get(k, lambda x: x ** k)


def lp(o):
    """The norm itself, not its p-th power: its slope sign(x) (|x| / s)^(p-1) lies in [-1, 1] however large or small x is."""
    if o.p == 1:
        return l1(o)
    if o.p == 2:
        return SquaredL2() # minkowski's finish takes the root
    power = _power(o.p - 1)

    def value(x):
        x = x.abs()
        if o.p <= 4: # |x|^p stays in range for |x| from 1e-9 to 1e9
            return _sum_d(x * power(x)) ** (1 / o.p)
        top = x.amax(-1, keepdim=True).clamp_min(_tiny(x)) # out of the sum, or 1e4^p overflows
        return top[..., 0] * _sum_d((x / top) ** o.p) ** (1 / o.p)

    def pair(x, s, g):
        return 1 / s.clamp_min(_tiny(s)), g
    return _of_difference(value, lambda x, inverse, g: _signed(x, g) * power(x.abs() * inverse), pair, ("lp", o.p))


class HardBits(Tiles):
    """Number of mismatched bits, one matrix product; its gradient is the soft form's (straight through), sum |h - w|."""

    def __init__(self):
        def slope(h, w, s, g):
            gh = _signed(h - w, g)
            return gh, -gh
        super().__init__(self.mismatches, slope, kernel=("l1",))

    @staticmethod
    def bits(x):
        return (x > 0.5).to(x.dtype)

    @staticmethod
    def mismatches(h, w):
        return _sum_d((HardBits.bits(h) - HardBits.bits(w)).abs())

    def once(self, w):
        return self.bits(w)

    def forward(self, h, w, once, out):
        h = self.bits(h)
        torch.addmm(_sum_d(once), h, once.T, alpha=-2, out=out).add_(_sum_d(h)[:, None]) # |h - w|^2, exact for bits


def canberra(o, min_denom=0.0):
    """sum |h-w| / q, q = |h| + |w| + eps, at least min_denom."""
    def q(h, w):
        return (h.abs() + w.abs() + o.eps).clamp_min(min_denom)

    def slope(h, w, s, g):
        q_ = q(h, w)
        m = (h - w).abs() / q_ * (q_ > min_denom) # a denominator at its floor does not move
        g = g / q_
        gx, gm = _signed(h - w, g), g * m
        return gx - gm * h.sign(), -gx - gm * w.sign()
    return Tiles(lambda h, w: _sum_d((h - w).abs() / q(h, w)), slope, kernel=("canberra", o.eps, min_denom))


def canberra_weighted(o):
    """sum q^k |h-w| / q  /  sum q^k"""
    k, power, power_less_1 = o.weight_power, _power(o.weight_power), _power(o.weight_power - 1)

    def q(h, w):
        return h.abs() + w.abs() + o.eps

    def value(h, w):
        q_ = q(h, w)
        return _sum_d((h - w).abs() * power_less_1(q_)) / _sum_d(power(q_))

    def slope(h, w, s, g):
        x, q_ = h - w, q(h, w)
        gr = g * power_less_1(q_) # the slope of |x|; through q goes the rest
        gx, through_q = _signed(x, gr), gr * ((k - 1) * x.abs() / q_ - s * k)
        return gx + through_q * h.sign(), -gx + through_q * w.sign()
    return Tiles(value, slope, lambda h, w, s, g: (s, g / _sum_d(power(q(h, w)))))


# -----------------------------------------------------------------------------
# preps: (h, w, o) -> (h, w), where o holds eps and the parameters of the distance

class _Unit(torch.autograd.Function):
    """F.normalize(x, dim=-1), whose own backward pass holds four copies of x: too many for a large vocabulary."""

    @staticmethod
    def forward(ctx, x):
        inverse = 1 / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        ctx.save_for_backward(x, inverse)
        return x * inverse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, inverse = ctx.saved_tensors
        along = torch.linalg.vecdot(x, g)[..., None] * inverse ** 2 * (inverse < 1e12) # the zero vector does not turn
        return g.mul_(inverse).addcmul_(x, along * inverse, value=-1) # in place: g comes fresh from _Loss or _Matrix, and nobody else has it


def _unit(h, w, o):
    return _Unit.apply(h), _Unit.apply(w)


def _bits_soft(h, w, o):
    return torch.sigmoid(h / o.T), torch.sigmoid(w / o.T)


def _bits_gumbel(h, w, o):
    """Binary-concrete samples while training: the difference of two Gumbel variables is logistic (Maddison et al. 2017)."""
    if o.training:
        h, w = (x + torch.logit(torch.rand_like(x), eps=torch.finfo(x.dtype).eps) for x in (h, w))
    return _bits_soft(h, w, o)


def _bits_hard(h, w, o):
    """The soft bits, above 0.5 exactly where x > threshold: close to it the sigmoid rounds to 0.5."""
    def bits(x):
        soft, half = torch.sigmoid(x - o.threshold), x.new_tensor(0.5)
        exact = torch.where(x > o.threshold, soft.clamp_min(torch.nextafter(half, 2 * half)), soft.clamp_max(0.5))
        return soft + (exact - soft).detach()
    return bits(h), bits(w)


def _exponentials(h, w, o):
    """sum 2 cosh(alpha (h - w)) = <[e^(alpha h), e^(-alpha h)], [e^(-alpha w), e^(alpha w)]>, within the range of exp."""
    if o.validate:
        limit = math.log(torch.finfo(h.dtype).max) - 8 # for the sum
        reach = o.alpha * (h.detach().abs().amax() + w.detach().abs().amax()).item()
        if not reach < limit:
            raise ValueError(f"chebyshev (cosh): alpha (max |h| + max |w|) is {reach:.4g}, its exponentials hold up to {limit:.0f}: "
                             "lower alpha, scale the features down, or use the variant smooth")
    return torch.cat([(o.alpha * h).exp(), (-o.alpha * h).exp()], -1), torch.cat([(-o.alpha * w).exp(), (o.alpha * w).exp()], -1)


def _shares(h, w, o):
    return tuple(x / _sum_d(x)[..., None] for x in (h.abs() + o.eps, w.abs() + o.eps))


def _eye_like(x):
    return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def _whiten_standard(h, w, o): # P = A'A + lambda I = L L', d^2 = |(h - w) L|^2
    root = torch.linalg.cholesky(o.A.T @ o.A + o.reg_lambda * _eye_like(o.A))
    return h @ root, w @ root


def _whiten_diagonal(h, w, o):
    root = (o.theta.exp() + o.reg_lambda).sqrt()
    return h * root, w * root


def _whiten_cholesky(h, w, o): # L lower triangular, its diagonal positive through exp
    lower = o.L.tril(-1) + o.L.diagonal().exp().diag()
    root = torch.linalg.cholesky(lower @ lower.T + o.reg_lambda * _eye_like(o.L))
    return h @ root, w @ root


def _whiten_covariance(h, w, o): # P = (covariance, regularised)^-1 = (C C')^-1, d^2 = |(h - w) C^-T|^2
    C = torch.linalg.cholesky(regularised_covariance(o.covariance, o.shrinkage, o.reg_lambda))
    root = torch.linalg.solve_triangular(C, _eye_like(C), upper=False).T
    return h @ root, w @ root


def regularised_covariance(covariance, shrinkage, reg_lambda):
    """(1 - shrinkage) S + (shrinkage + reg_lambda) v I, where v is the mean variance trace(S)/D: relative to the features' own
    scale, since an absolute ridge would either drown the estimate or do nothing, depending on how the features are scaled."""
    v = covariance.diagonal().mean()
    return (1 - shrinkage) * covariance + (shrinkage + reg_lambda) * v * _eye_like(covariance)


def within_class_scatter(h, targets):
    """Sum over the samples of (h - m_y)(h - m_y)', m_y the mean of its own class in this batch, and the degrees of freedom
    N - (number of classes present): their ratio is the pooled within-class covariance. h (N, D), targets (N,)."""
    _, index, count = targets.unique(return_inverse=True, return_counts=True)
    means = h.new_zeros(len(count), h.shape[1]).index_add_(0, index, h) / count[:, None]
    x = h - means[index]
    return x.T @ x, torch.tensor(float(len(h) - len(count)), device=h.device)


def _append_alpha(h, w, o):
    return h, torch.cat([w, o.alpha], -1)


# -----------------------------------------------------------------------------
# finishes: (s, a, b, o) -> d, with a (N, 1) and b (V,) the `side` values of h and w where the distance has them

def _plus_eps(s, a, b, o):
    return s + o.eps


def _plus_eps2(s, a, b, o): # d squared
    return s + o.eps ** 2


def _mean(s, a, b, o):
    return s / o.in_features + o.eps


def _minkowski(s, a, b, o): # the core gives the norm, except for p = 2 its square; the clamp makes the slope 0 at h = w
    return (s.clamp_min(torch.finfo(s.dtype).tiny).sqrt() if o.p == 2 else s) + o.eps


# -----------------------------------------------------------------------------
# the registry

@dataclass(frozen=True)
class Distance:
    core: Callable                      # o -> core
    finish: Callable = _plus_eps
    prep: Callable = lambda h, w, o: (h, w)
    side: Callable | None = None        # x (..., D) -> (...,): what finish needs of each row on its own
    params: dict = field(default_factory=dict)  # plain numbers and their defaults
    tensors: dict = field(default_factory=dict) # learned tensors: name -> (V, D) -> initial value
    buffers: dict = field(default_factory=dict) # estimated, not learned
    squared: bool = False               # finish gives d^2, and the link takes the root: of a logarithm that is a factor 1/2
    formula: str = ""


def _zero_flag(x): # 1 for the zero vector, whose cosine with anything counts as 0
    return (_norm2(x.detach()) < 0.5).to(x.dtype)


_lambda = dict(reg_lambda=1e-2)

# the first variant of each distance is its default
DISTANCES = {
    "euclidean": {
        "standard": Distance(lambda o: SquaredL2(), _plus_eps2, squared=True, formula="sqrt(sum (h-w)^2 + eps^2)"),
    },
    "manhattan": {
        "standard": Distance(l1, formula="sum |h-w| + eps"),
    },
    "chebyshev": {
        "standard": Distance(linf, formula="max |h-w| + eps"),
        "smooth": Distance(smooth_linf, lambda s, a, b, o: s, params=dict(alpha=10.0),
                           formula="logsumexp(alpha |h-w|) / alpha"),
        # two matrix products; above the smooth one by at most log(2) / alpha, where h = w
        "cosh": Distance(lambda o: Dot(), lambda s, a, b, o: s.log() / o.alpha, _exponentials, params=dict(alpha=10.0),
                         formula="log(sum 2 cosh(alpha (h-w))) / alpha"),
    },
    "minkowski": {
        "standard": Distance(lp, _minkowski, params=dict(p=1.5), formula="(sum |h-w|^p)^(1/p) + eps"),
    },
    "cosine": {
        # 1 - cos = |h' - w'|^2 / 2 for unit vectors, which does not cancel when they are close
        "stable": Distance(lambda o: SquaredL2(), lambda s, a, b, o: (s + a + b) / 2 + o.eps, _unit, _zero_flag,
                           formula="1 - <h/|h|, w/|w|> + eps"),
        "unstable": Distance(lambda o: Dot(), lambda s, a, b, o: 1 - s / (a * b + o.eps) + o.eps, side=lambda x: x.norm(dim=-1),
                             formula="1 - h.w / (|h||w| + eps) + eps"),
    },
    "hamming": {
        "soft": Distance(l1, _mean, _bits_soft, params=dict(T=1.0), formula="mean |s(h/T) - s(w/T)| + eps, s the sigmoid"),
        "gumbel": Distance(l1, _mean, _bits_gumbel, params=dict(T=0.5),
                           formula="the same on binary-concrete samples while training"),
        "hard": Distance(lambda o: HardBits(), _mean, _bits_hard, params=dict(threshold=0.0),
                         formula="mean (h>t != w>t) + eps, straight-through"),
    },
    "canberra": {
        "standard": Distance(canberra, formula="sum |h-w| / (|h|+|w|+eps) + eps"),
        "robust": Distance(lambda o: canberra(o, o.min_denom), params=dict(min_denom=1e-2), formula="the denominator at least min_denom"),
        "weighted": Distance(canberra_weighted, params=dict(weight_power=0.5),
                             formula="the terms weighted by (|h|+|w|+eps)^weight_power, weights of sum 1"),
    },
    "bray_curtis": {
        "standard": Distance(l1, lambda s, a, b, o: s / ((a + b).abs() + o.eps) + o.eps, side=_sum_d,
                             formula="sum |h-w| / (|sum (h+w)| + eps) + eps"),
        "abs": Distance(l1, lambda s, a, b, o: s / (a + b + o.eps) + o.eps, side=lambda x: _sum_d(x.abs()),
                        formula="sum |h-w| / (sum (|h|+|w|) + eps) + eps"),
        "normalized": Distance(l1, lambda s, a, b, o: s / (a + b + o.eps) + o.eps, _shares, side=_sum_d,
                               formula="abs, after |h|+eps and |w|+eps are scaled to sum 1"),
    },
    "mahalanobis": {
        "standard": Distance(lambda o: SquaredL2(), _plus_eps2, _whiten_standard, squared=True, params=_lambda, tensors=dict(A=lambda V, D: torch.eye(D)),
                             formula="sqrt((h-w)' P (h-w) + eps^2), P = A'A + lambda I"),
        "diagonal": Distance(lambda o: SquaredL2(), _plus_eps2, _whiten_diagonal, squared=True, params=_lambda,
                             tensors=dict(theta=lambda V, D: torch.zeros(D)), formula="P = diag(exp theta) + lambda I"),
        "cholesky": Distance(lambda o: SquaredL2(), _plus_eps2, _whiten_cholesky, squared=True, params=_lambda,
                             tensors=dict(L=lambda V, D: torch.zeros(D, D)), formula="P = LL' + lambda I, L lower triangular"),
        "covariance": Distance(lambda o: SquaredL2(), _plus_eps2, _whiten_covariance, squared=True, params=dict(momentum=0.99, shrinkage=0.1, **_lambda),
                               buffers=dict(covariance=lambda V, D: torch.eye(D)),
                               formula="P = (running within-class covariance, regularised)^-1, not learned"),
    },
    "offset_l2": {
        "standard": Distance(lambda o: WeightedSquaredL2(), _plus_eps2, _append_alpha, squared=True, tensors=dict(alpha=lambda V, D: torch.ones(V, D)),
                             formula="sqrt(sum alpha_k^2 (h-w_k)^2 + eps^2), alpha learned"),
    },
}
# the linear head in the same clothes: z = h.w
_BASELINE = Distance(lambda o: Dot(), lambda s, a, b, o: -s, formula="z = W h, the linear head (cross-entropy)")
LINKS = ("harmonic", "softmin")


def _one_of(what, name, legal):
    if name in legal:
        return name
    close = get_close_matches(str(name), legal, n=1)
    raise ValueError(f"unknown {what} {name!r}" + (f", did you mean {close[0]!r}?" if close else "") + f" (legal: {', '.join(legal)})")


def find(distance, variant=None):
    """(the variant's name, the registry's entry); variant None or "" is the default one, the baseline has none. Raises ValueError with
    the legal names."""
    if distance == "baseline":
        if variant:
            raise ValueError(f"baseline has no variants, got {variant!r}")
        return None, _BASELINE
    variants = DISTANCES[_one_of("distance", distance, ["baseline", *DISTANCES])]
    variant = _one_of(f"{distance} variant", variant or next(iter(variants)), list(variants))
    return variant, variants[variant]


def _options(spec, distance, in_features, eps, params):
    """eps and the distance's parameters in one namespace, all checked."""
    for name in params:
        legal = [*spec.params, *spec.tensors, *spec.buffers]
        if name not in legal:
            raise ValueError(f"{distance} has no parameter {name!r} (legal: {', '.join(legal) or 'none'})")
    o = SimpleNamespace(eps=eps, in_features=in_features, training=False, validate=True, **{**spec.params, **params})
    for name in ("alpha", "T", "min_denom", "reg_lambda"):
        if name in spec.params and not getattr(o, name) > 0:
            raise ValueError(f"{name} must be > 0, got {getattr(o, name)}")
    for name in ("momentum", "shrinkage"):
        if name in spec.params and not 0 <= getattr(o, name) <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {getattr(o, name)}")
    if "p" in spec.params and not 1 <= o.p < math.inf:
        raise ValueError(f"p must be at least 1 and finite (below 1 it is not a metric; for infinity use chebyshev), got {o.p}")
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    return o


# -----------------------------------------------------------------------------
# the two autograd functions

@contextmanager
def _full_fp32(x):
    """No tf32: where a GPU rounds the operands, the identity of SquaredL2 keeps three digits."""
    before = torch.get_float32_matmul_precision() if x.is_cuda else "highest"
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)


def _all_pairs(core, h, w):
    once, out = core.once(w), h.new_empty(len(h), len(w), dtype=_wide(h))
    core.forward(h, w, once, out)
    return core.assemble(out, h, once)


class _Matrix(torch.autograd.Function):
    """s for all pairs (N, V), with the core's own gradients."""

    @staticmethod
    def forward(ctx, core, h, w):
        with _full_fp32(h):
            s = _all_pairs(core, h, w)
            if hasattr(core, "refine"):
                s = core.refine(h, w, s)
        ctx.core = core
        ctx.save_for_backward(h, w, s)
        return s

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        h, w, s = ctx.saved_tensors
        dh, dw = torch.zeros_like(h), torch.zeros_like(w)
        with _full_fp32(h):
            ctx.core.backward(h, w, s, g, dh, dw)
        return None, dh, dw


def _scores(d, n, link, num_classes, squared=False):
    """z (N, V) of distances, or of their squares"""
    if squared:
        z = -n / 2 * d.log() if link == "harmonic" else -n * d.sqrt()
    else:
        z = -n * (d.log() if link == "harmonic" else d)
    if num_classes < d.shape[1]: # padding rows are prototypes too, but of nothing
        z = z.masked_fill(torch.arange(d.shape[1], device=d.device) >= num_classes, -math.inf)
    return z


def _row_function(core, finish, squared, o, link, n, num_classes):
    """rows(s, s_y, gs, h, once, y, weights, a, b, learned n, need) -> the targets' -log p (c,) and the gradients of
    sum(weights * nll) by the targets' s (c,) and by those of a, b, learned n for which need is true; that by all other s goes into gs
    (c, V), or into s where gs is None (not twice the same tensor: torch.compile would tie itself to their common storage). need = ():
    no gradients. It is all that a chunk needs besides products and tiles, in one function that torch.compile makes few passes of."""
    def rows(s, s_y, gs, h, once, y, weights, a, b, learned, need):
        target = torch.arange(s.shape[1], device=y.device) == y[:, None]
        out, s = s if gs is None else gs, torch.where(target, s_y[:, None], core.assemble(s, h, once))

        def score(s, *given):
            given = iter(given)
            a_, b_, n_ = (next(given) if k else x for k, x in zip(need or (False,) * 3, (a, b, learned)))
            return _scores(finish(s, a_, b_, o), n if n_ is None else n_, link, num_classes, squared)
        given = [x for k, x in zip(need, (a, b, learned)) if k]
        z, vjp = torch.func.vjp(score, s, *given) if need else (score(s), None)
        logp = z.log_softmax(1) # not z - logsumexp: of a z of 100, fp32 keeps 1e-5
        nll = -logp.gather(1, y[:, None])[:, 0]
        if not need:
            return nll, None, None
        g, *g_given = vjp((logp.exp() - target.to(z.dtype)) * weights[:, None]) # dL/dz = p - 1_y
        g_y = g.gather(1, y[:, None])[:, 0]
        out.copy_(g.masked_fill(target, 0))
        return nll, g_y, g_given
    return rows


def _nll(core, rows, h, w, a, b, n, targets, weights, chunk, need, mm_dtype):
    """-log p_y per row (N,) and, unless need is (), the gradients of sum(weights * nll) with respect to h, w, a, b, n. One chunk of rows
    at a time: nothing larger than chunk x V. The target's own column is computed directly, value and gradient, from operands that are
    not rounded to mm_dtype: it is the one that comes close to h, where a matrix product cancels."""
    nll = h.new_empty(len(h))
    needed = (True, True, *need) if need else (False,) * 5
    grads = [torch.zeros_like(x) if k else None for x, k in zip((h, w, a, b, n), needed)]
    w_mm = w.to(mm_dtype)
    once, s = core.once(w_mm), h.new_empty(min(chunk, len(h)), len(w)) # every chunk's
    gs = None if core.is_product or not need else torch.empty_like(s) # tiles need s for their gradient
    block = chunk if h.is_cuda else max(1, CACHE_ELEMENTS // len(w)) # rows
    for i in _slices(len(h), chunk):
        h_i, y = h[i], targets[i]
        w_y = w[y] # (c, D)
        h_mm = h_i.to(mm_dtype)
        s_y = core.value(h_i, w_y)
        s_i, gs_i = s[:len(y)], None if gs is None else gs[:len(y)] # (c, V)
        core.forward(h_mm, w_mm, once, s_i)
        gs_y, a_i, ga_i = torch.empty_like(s_y), *(x if x is None else x[i] for x in (a, grads[2]))
        for j in _slices(len(y), block):
            nll[i][j], g_y, g_given = rows(s_i[j], s_y[j], None if gs is None else gs_i[j], h_mm[j], once, y[j], weights[i][j],
                                           None if a is None else a_i[j], b, n, need)
            if need:
                gs_y[j] = g_y
                for k, g in zip([k for k in range(3) if need[k]], g_given):
                    (grads[2 + k] if k else ga_i[j]).add_(g) # a has a row per row of h
        if need:
            if gs is not None:
                s_i.scatter_(1, y[:, None], s_y[:, None])
            core.backward(h_mm, w_mm, s_i, s_i if gs is None else gs_i, grads[0][i], grads[1]) # without the targets' own terms
            gh_y, gw_y = core.gradient(h_i, w_y, s_y, gs_y)
            grads[0][i] += gh_y
            grads[1].index_add_(0, y, gw_y)
    return nll, grads


class _Loss(torch.autograd.Function):
    """sum(weights * nll) or, with per_row, the vector weights * nll. The gradients of the sum are made in the forward pass, chunk by
    chunk, and only scaled in the backward pass; those of the vector need the upstream gradient, so its backward pass computes again."""

    @staticmethod
    def forward(ctx, core, rows, chunk, mm_dtype, per_row, grad_enabled, targets, weights, h, w, a, b, n):
        need = tuple(ctx.needs_input_grad[-3:]) if grad_enabled and any(ctx.needs_input_grad) else ()
        nll, grads = _nll(core, rows, h, w, a, b, n, targets, weights, chunk, () if per_row else need, mm_dtype)
        ctx.again = (core, rows, chunk, mm_dtype, need) if per_row else None
        ctx.save_for_backward(*(h, w, a, b, n, targets, weights) if per_row else grads)
        return weights * nll if per_row else (weights * nll).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        if ctx.again is None:
            grads = [None if x is None else x * g for x in ctx.saved_tensors]
        else:
            core, rows, chunk, mm_dtype, need = ctx.again
            *inputs, targets, weights = ctx.saved_tensors
            with torch.autocast(g.device.type, enabled=False):
                _, grads = _nll(core, rows, *inputs, targets, g * weights, chunk, need, mm_dtype)
        return *[None] * 8, *grads


# -----------------------------------------------------------------------------
# what one uses

def pairwise(h, weight, distance, variant=None, eps=1e-4, **params):
    """d(h, w) for all pairs, differentiable once: h (N, D), weight (V, D) -> (N, V). params are the distance's own, learned tensors
    included (mahalanobis A, theta, L or covariance (D, D), offset_l2 alpha (V, D)); left out, they have their initial values.
    Memory O(N V). Raises ValueError for an unknown distance, variant or parameter and for sizes that do not fit."""
    if h.ndim != 2 or weight.ndim != 2 or h.shape[1] != weight.shape[1]:
        raise ValueError(f"pairwise takes (N, D) and (V, D), got {tuple(h.shape)} and {tuple(weight.shape)}")
    if distance == "baseline":
        raise ValueError("baseline is a linear head, it has no distance")
    _, spec = find(distance, variant)
    initial = {name: make(*weight.shape).to(weight) for name, make in {**spec.tensors, **spec.buffers}.items() if name not in params}
    return _distances(spec, _options(spec, distance, h.shape[1], eps, {**initial, **params}), h, weight)


def _sides(spec, h, w):
    return (None, None) if spec.side is None else (spec.side(h)[:, None], spec.side(w))


def _distances(spec, o, h, w, core=None):
    h, w = spec.prep(h, w, o)
    s = _Matrix.apply(core or spec.core(o), h, w)
    d = spec.finish(s, *_sides(spec, h, w), o)
    return d.sqrt() if spec.squared else d


class DistanceHead(nn.Module):
    """An output layer of prototypes, in place of nn.Linear(in_features, num_prototypes, bias=False).

    distance, variant, params: see DISTANCES (`python distances.py` lists them); "baseline" is the linear head itself.
    link: "harmonic" (z = -n log d) or "softmin" (z = -n d). n > 0; learn_n=True learns log n.
    eps: bounds -n log d at h = w; where it enters is part of each formula.
    num_classes: rows of the weight from there on are padding (50,257 tokens in 50,304 rows): they are masked out of p.
    Prototypes start as nn.Linear's weight does (kaiming_uniform, a = sqrt 5: +-1/sqrt D). Raises ValueError for unknown or illegal values.
    """

    def __init__(self, in_features, num_prototypes, distance="euclidean", variant=None, link="harmonic", n=1.0, learn_n=False,
                 eps=1e-4, num_classes=None, **params):
        super().__init__()
        self.in_features, self.num_prototypes, self.num_classes = in_features, num_prototypes, num_classes or num_prototypes
        self.distance, self.link, self.eps, self.params = distance, _one_of("link", link, LINKS), eps, params
        self.variant, self.spec = find(distance, variant)
        if not 0 < self.num_classes <= num_prototypes:
            raise ValueError(f"num_classes must lie in 1..{num_prototypes} (the prototypes), got {num_classes}")
        if not n > 0 or not math.isfinite(n):
            raise ValueError(f"n must be > 0 and finite, got {n}")
        self.weight = nn.Parameter(torch.empty(num_prototypes, in_features))
        for name, make in self.spec.tensors.items():
            self.register_parameter(name, nn.Parameter(make(num_prototypes, in_features)))
        for name, make in self.spec.buffers.items():
            self.register_buffer(name, make(num_prototypes, in_features))
        if distance == "baseline":
            self.link, n, learn_n = "softmin", 1.0, False
        self.fixed_n = None if learn_n else float(n)
        if learn_n:
            self.log_n = nn.Parameter(torch.tensor(math.log(n)))
        own = [*self.spec.tensors, *self.spec.buffers]
        if any(name in params for name in own):
            raise ValueError(f"{', '.join(own)} belongs to the head (head.{own[0]}), it is not an argument")
        self.options = _options(self.spec, distance, in_features, eps, params)
        self.core, self._row_functions = self.spec.core(self.options), {}
        self.compiled = False # see compile_loss
        self.mm_dtype = None # of the products' operands in the loss; None: bf16 on a GPU under autocast to bf16, else as h is
        self.validate = True # check h and targets at every call; it waits for the device, so a training loop may switch it off
        nn.init.kaiming_uniform_(self.weight, a=5 ** 0.5)

    def extra_repr(self):
        params = ", ".join(f"{k}={v}" for k, v in {**self.spec.params, **self.params}.items())
        return (f"{self.in_features} -> {self.num_classes}" + (f" of {self.num_prototypes}" * (self.num_classes < self.num_prototypes))
                + f", {self.distance}" + (f" ({self.variant}), {self.link}, n={torch.as_tensor(self.n).item():.4g}{' learned' * (self.fixed_n is None)}"
                                          f", eps={self.eps:g}" if self.distance != "baseline" else "") + (f", {params}" * bool(params)))

    @property
    def n(self):
        return self.log_n.exp() if self.fixed_n is None else self.fixed_n

    def compile_loss(self, on=True):
        """Run what is not a matrix product through torch.compile: the tiles of elementwise distances (but see Tiles.triton), and
        the way from distances to the loss and back. Needs a C++ compiler on a CPU, triton on a GPU."""
        self.compiled, self._row_functions = on, {}
        if isinstance(self.core, Tiles):
            self.core.compile = on

    def _rows(self):
        key = self.link, self.fixed_n
        if key not in self._row_functions:
            rows = _row_function(self.core, self.spec.finish, self.spec.squared, self.options, *key, self.num_classes)
            self._row_functions[key] = _compile(rows) if self.compiled else rows
        return self._row_functions[key]

    def _inputs(self, h):
        """h (..., D) -> (N, D) in fp32 (fp64 stays), with the weight and the options in the same dtype."""
        if h.shape[-1] != self.in_features:
            raise ValueError(f"the head takes features of size {self.in_features}, got {tuple(h.shape)}")
        h = h.reshape(-1, self.in_features)
        if self.validate and not torch.isfinite(h).all():
            row = (~torch.isfinite(h)).any(1).nonzero()[0].item()
            raise ValueError(f"h is not finite: {(~torch.isfinite(h)).sum().item()} of {h.numel()} values, the first in row {row}")
        dtype = torch.promote_types(torch.promote_types(h.dtype, self.weight.dtype), torch.float32)
        o = SimpleNamespace(**vars(self.options))
        o.training, o.validate = self.training, self.validate
        for name in [*self.spec.tensors, *self.spec.buffers]:
            setattr(o, name, getattr(self, name).to(dtype))
        return h.to(dtype), self.weight.to(dtype), o

    def distances(self, h):
        """d(h, w_k): h (..., D) -> (..., num_classes). Close pairs are exact too: relative error about 1e-4 at the worst in fp32."""
        if self.distance == "baseline":
            raise ValueError("baseline is a linear head, it has no distance")
        with torch.autocast(h.device.type, enabled=False):
            x, w, o = self._inputs(h)
            return _distances(self.spec, o, x, w, self.core)[:, :self.num_classes].reshape(*h.shape[:-1], self.num_classes)

    def forward(self, h):
        """z, the scores whose softmax is p: h (..., D) -> (..., num_classes)."""
        with torch.autocast(h.device.type, enabled=False):
            x, w, o = self._inputs(h)
            d = _distances(self.spec, o, x, w, self.core)[:, :self.num_classes]
            return _scores(d, self.n, self.link, self.num_classes).reshape(*h.shape[:-1], self.num_classes)

    @torch.compiler.disable # the chunk loop and its own gradients stay out of the compiled graph
    def loss(self, h, targets, ignore_index=-1, reduction="mean", chunk=None):
        """-log p_y in nats, equal to F.cross_entropy(head(h), targets) in value and in every gradient, without N x V in memory.

        h (..., D), targets (...) of the same leading shape; entries equal to ignore_index do not count. reduction "mean" (over the
        targets that count), "sum" or "none" (per target, whose backward pass computes the distances again). chunk: rows at a time, by
        default 256 (elementwise 128), or 1024 on a GPU, and more where a buffer stays below 8 MB (4 MB; 256 MB on a GPU). Runs in fp32 with
        autocast off, but for the operands of matrix products (mm_dtype); gradients of the weight accumulate in fp32. Raises ValueError
        for shapes that do not fit, a target out of range and a non-finite h.
        """
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
        if h.shape[:-1] != targets.shape:
            raise ValueError(f"h {tuple(h.shape)} and targets {tuple(targets.shape)} do not fit: h needs one more dimension, the features")
        low = h.is_cuda and torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16
        with torch.autocast(h.device.type, enabled=False):
            shape, targets = targets.shape, targets.reshape(-1)
            keep = targets != ignore_index
            if self.validate:
                bad = keep & ((targets < 0) | (targets >= self.num_classes))
                if bad.any():
                    raise ValueError(f"target {targets[bad][0].item()} is out of range: the head has classes 0..{self.num_classes - 1}"
                                     f" (ignore_index={ignore_index})")
            x, w, o = self._inputs(h)
            if self.spec.buffers and self.training:
                self._update_covariance(x[keep].detach(), targets[keep])
                o.covariance = self.covariance.to(x.dtype)
            targets = targets.where(keep, torch.zeros_like(targets))
            weights = keep.to(x.dtype) if reduction != "mean" else keep.to(x.dtype) / keep.sum()
            x, w = self.spec.prep(x, w, o)
            a, b = _sides(self.spec, x, w)
            n = self.n if self.fixed_n is None else None
            chunk = chunk or (max(1024, 2 ** 26 // len(w) // 128 * 128) if x.is_cuda else max(self.core.rows, self.core.elements // len(w)))
            mm_dtype = x.dtype if not self.core.rounds else self.mm_dtype or (torch.bfloat16 if low else x.dtype)
            loss = _Loss.apply(self.core, self._rows(), chunk, mm_dtype, reduction == "none", torch.is_grad_enabled(), targets, weights, x, w, a, b, n)
            return loss if reduction != "none" else loss.reshape(shape)

    @torch.no_grad()
    def _update_covariance(self, h, targets):
        scatter, freedom = within_class_scatter(h, targets)
        if torch.distributed.is_available() and torch.distributed.is_initialized(): # every rank estimates from the whole batch
            torch.distributed.all_reduce(scatter)
            torch.distributed.all_reduce(freedom)
        if freedom.item() > 0: # some class was seen twice
            self.covariance.lerp_((scatter / freedom).to(self.covariance.dtype), 1 - self.options.momentum)


def parse_head(text, variant="", params=""):
    """DistanceHead's arguments: parse_head("minkowski:p=3"), written distance[:variant][:name=number,...], and the three settings
    parse_head("minkowski", "", "p=3") both give {"distance": "minkowski", "variant": None, "p": 3.0}. Raises ValueError for what does
    not read so."""
    distance, *parts = text.strip().split(":")
    variants = [name for name in (*parts, variant) if name and "=" not in name]
    if len(variants) > 1:
        raise ValueError(f"a head is written distance[:variant][:name=value], got {text!r}")
    arguments = {"distance": distance, "variant": variants[0] if variants else None}
    params = ",".join([*(part for part in parts if "=" in part), params])
    for item in params.split(","):
        name, _, number = item.partition("=")
        if not item.strip():
            continue
        try:
            arguments[name.strip()] = float(number)
        except ValueError:
            raise ValueError(f"distance_params must read name=number, comma separated, such as p=3, got {params!r}") from None
    return arguments


class HarmonicLoss(nn.Module):
    """A criterion like nn.CrossEntropyLoss that owns its prototypes: criterion(features (..., D), targets (...)) -> loss in nats.
    Takes DistanceHead's arguments; pass its parameters to the optimizer. criterion.head(features) gives the scores."""

    def __init__(self, in_features, num_classes, ignore_index=-100, reduction="mean", **kwargs):
        super().__init__()
        self.head = DistanceHead(in_features, num_classes, **kwargs)
        self.ignore_index, self.reduction = ignore_index, reduction

    def forward(self, features, targets):
        return self.head.loss(features, targets, self.ignore_index, self.reduction)


if __name__ == "__main__":
    print(f"{'distance':<12} {'variant':<11} {'parameters':<44} d(h, w)")
    for distance, variants in {"baseline": {"": _BASELINE}, **DISTANCES}.items():
        for variant, spec in variants.items():
            params = ", ".join([f"{k}={v:g}" for k, v in spec.params.items()] + [f"{k} (learned)" for k in spec.tensors])
            print(f"{distance:<12} {variant:<11} {params:<44} {spec.formula}")
