"""
The nets and the data of the small studies, and Seeds, which trains many copies of a net as one. train_toy.py has the
loop.

Every net here is a backbone and a DistanceHead. A study gives it a Task: small arrays, of which each seed has its own
where they are random.
"""
import copy
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from distances import DistanceHead, within_class_scatter

# -----------------------------------------------------------------------------
# nets


class Net(nn.Module):
    """A backbone, a head, and what is made of the head's scores: x -> features h (N, D), outputs z (N, K)."""

    def __init__(self, backbone, head, output=None):
        super().__init__()
        self.backbone, self.head, self.output = backbone, head, output

    def forward(self, x):
        h = self.backbone(x)
        z = self.head(h)
        return h, z if self.output is None else self.output(z)


class ModularMLP(nn.Module):
    """Two numbers (N, 2) -> h (N, D), as Baek et al. have it: their embeddings side by side, a hidden layer, SiLU."""

    def __init__(self, embedding, hidden=100):
        super().__init__()
        self.embedding, D = embedding, embedding.embedding_dim
        self.hidden, self.out = nn.Linear(2 * D, hidden), nn.Linear(hidden, D)

    def forward(self, x):
        x = self.embedding(x).flatten(-2) # (N, 2 D)
        return self.out(nn.functional.silu(self.hidden(x)))


class ModularTransformer(nn.Module):
    """Two numbers (N, 2) -> h (N, D), the state of the second. As Baek et al. have it: torch's encoder layers, each
    with one more residual around it, and learned positions."""

    def __init__(self, embedding, layers=2, heads=2, feed_forward=64, dropout=0.1):
        super().__init__()
        self.embedding, D = embedding, embedding.embedding_dim
        blocks = [nn.TransformerEncoderLayer(D, heads, feed_forward, dropout, batch_first=True) for _ in range(layers)]
        self.blocks = nn.ModuleList(blocks)
        self.positions = nn.Parameter(torch.randn(2, D))
        torch.backends.mha.set_fastpath_enabled(False) # of evaluation: vmap has no rule for it either

    def forward(self, x):
        x = self.embedding(x) + self.positions # (N, 2, D)
        with sdpa_kernel(SDPBackend.MATH): # vmap has no rule for the faster ones
            for block in self.blocks:
                x = x + block(x)
        return x[:, -1]


MODULAR = {"mlp": ModularMLP, "transformer": ModularTransformer}


def modular_net(model, prime, tied, output=None, width=16, **head_arguments):
    """A net for numbers 0..prime-1. Its embedding is the head's prototypes if it is tied, else starts as they do."""
    head = DistanceHead(width, prime, **head_arguments)
    embedding = nn.Embedding(prime, width)
    nn.init.uniform_(embedding.weight, -width ** -0.5, width ** -0.5) # drawn in any case: equal backbones
    if tied:
        embedding.weight = head.weight
    return Net(MODULAR[model](embedding), head, output)


def stablemax(z):
    """z' whose softmax is StableMax of z (Prieto et al. 2025): p proportional to z + 1 above 0, to 1 / (1 - z)
    below."""
    return z.sign() * z.abs().log1p()


ACTIVATIONS = {"relu": torch.relu, "abs": torch.abs}


@dataclass(frozen=True)
class TwoLayer:
    """What a name such as relu2_neg_bias says of one of Oursland's nets ("Neural Networks Learn Distance Metrics",
    Tables 1, 3 and 5)."""
    activation: str    # of the hidden layer
    again: bool        # the same one after the output layer
    l2: bool           # the output layer is OffsetL2 instead of linear: y_k = |alpha_k (h - mu_k)|
    neg: bool          # the outputs are negated
    bias: bool         # of the output layer

    def output(self, z):
        if self.l2:
            return z if self.neg else -z # the head gives -d
        if self.again:
            z = ACTIVATIONS[self.activation](z)
        return -z if self.neg else z

    def net(self, inputs, hidden=128, classes=10):
        backbone = Hidden(inputs, hidden, self.activation)
        if self.l2: # softmin with n = 1: z = -d; alpha is squared, as the paper writes it and its code does not
            head = DistanceHead(hidden, classes, "offset_l2", link="softmin")
            nn.init.normal_(head.weight, std=0.1)
        else:
            head = DistanceHead(hidden, classes, "baseline", bias=self.bias)
        return Net(backbone, head, self.output)


class Hidden(nn.Module):
    def __init__(self, inputs, hidden, activation):
        super().__init__()
        self.linear, self.activation = nn.Linear(inputs, hidden), ACTIVATIONS[activation]

    def forward(self, x):
        return self.activation(self.linear(x))


def two_layer_nets():
    """Every TwoLayer that the paper has, by name."""
    nets = {}
    for activation in ACTIVATIONS:
        for bias in (False, True):
            end = "_bias" if bias else ""
            nets[activation + end] = TwoLayer(activation, False, False, False, bias)
            nets[f"{activation}2{end}"] = TwoLayer(activation, True, False, False, bias)
            nets[f"{activation}2_neg{end}"] = TwoLayer(activation, True, False, True, bias)
        nets[f"{activation}_l2"] = TwoLayer(activation, False, True, False, False)
        nets[f"{activation}_l2_neg"] = TwoLayer(activation, False, True, True, False)
    return nets


# -----------------------------------------------------------------------------
# many seeds at once

class Seeds:
    """
    Copies of the net that make() returns, one for each seed, whose parameters lie side by side (S, ...). torch.func
    runs the net itself once for all of them, so that every head works as it stands. No operation mixes seeds: a sum of
    their losses gives each its own gradient, and an optimizer that treats elements one by one trains each as if it were
    alone. Only random numbers drawn in training (dropout, Gumbel noise) depend on which seeds are together.

    scale (S,), where it is set, is the spread that scores are given, by a factor that the gradient does not see.
    exact: distances hold (S, N, K, D). Without it large ones go through matrix products, which lose digits where a
    feature is close to a prototype.
    """

    def __init__(self, make, seeds, device="cpu", exact=True):
        nets = []
        for seed in seeds:
            torch.manual_seed(seed)
            nets.append(make())
        self.scale = None
        self.net = nets[0].to(device) # the code; its own numbers are not used
        self.net.head.validate = False # features are not looked at under vmap
        if exact:
            self.net.head.core.traced = self.net.head.core.dense # what vmap takes of a core
        params, buffers = stack_module_state(nets)
        self.params = {name: p.detach().to(device).requires_grad_() for name, p in params.items()}
        self.buffers = {name: b.to(device) for name, b in buffers.items()}

    def __call__(self, x, shared=False):
        """x (S, N, ...), or (N, ...) that all seeds share -> h (S, N, D), z (S, N, K)."""
        def forward(params, buffers, x):
            return functional_call(self.net, (params, buffers), (x,))
        x_dim = None if shared else 0
        h, z = vmap(forward, (0, 0, x_dim), randomness="different")(self.params, self.buffers, x)
        if self.scale is not None:
            z = z * (self.scale / spread(z).detach())[:, None, None].to(z.dtype)
        return h, z

    @property
    def prototypes(self):
        """(S, K, D)"""
        name = "head.weight" if "head.weight" in self.params else "backbone.embedding.weight" # of a tied matrix
        return self.params[name].detach()

    @torch.no_grad()
    def update_covariance(self, x, y, shared=False):
        """What DistanceHead.loss does in training, for the head that estimates a covariance: x, y (S, N)."""
        if not self.net.head.spec.buffers:
            return
        h, _ = self(x, shared)
        for h_s, y_s, covariance in zip(h, y.expand(len(h), -1), self.buffers["head.covariance"]):
            scatter, freedom = within_class_scatter(h_s, y_s)
            if freedom > 0:
                covariance.lerp_(scatter / freedom, 1 - self.net.head.options.momentum)

    def one(self, i):
        """The i-th seed alone, as Seeds that share its numbers."""
        alone = copy.copy(self)
        alone.params = {name: p[i:i + 1] for name, p in self.params.items()}
        alone.buffers = {name: b[i:i + 1] for name, b in self.buffers.items()}
        alone.scale = None if self.scale is None else self.scale[i:i + 1]
        return alone

    def state(self, i):
        """The state dict of the i-th seed, on the CPU. A tied matrix has both its names."""
        state = {name: x[i].detach().cpu().clone() for name, x in {**self.params, **self.buffers}.items()}
        return {**state, "head.weight": self.prototypes[i].cpu().clone()}


def spread(z):
    """The effective scale of scores z (S, N, K): their standard deviation over classes, the mean over samples (S,)."""
    return z.std(2).mean(1)


def losses(z, y):
    """-log softmax(z)_y, the mean of each seed: z (S, N, K), y (S, N) or (N,) -> (S,) nats."""
    y = y.expand(z.shape[:-1])
    nll = nn.functional.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none")
    return nll.view(z.shape[:-1]).mean(1)


# -----------------------------------------------------------------------------
# data

@dataclass
class Task:
    """Inputs and classes for training and testing; shared: all seeds have the same, without the dimension S."""
    train_x: torch.Tensor # (S, N, ...) or (N, ...)
    train_y: torch.Tensor # (S, N) or (N,) int64
    test_x: torch.Tensor
    test_y: torch.Tensor
    num_classes: int
    shared: bool
    source: str # in words
    hash: str   # tells which data a run saw: the same for all seeds that may be averaged
    centres: dict = field(default_factory=dict) # of points: the centres of each class by name, (S, K, D)
    spreads: torch.Tensor | None = None         # and its root mean square distance from the mean, (S, K)

    def of_seeds(self, rows):
        """The same of these seeds only, counted from 0."""
        if self.shared:
            return self
        parts = {name: getattr(self, name)[rows] for name in ("train_x", "train_y", "test_x", "test_y")}
        centres = {name: x[rows] for name, x in self.centres.items()}
        spreads = None if self.spreads is None else self.spreads[rows]
        return replace(self, **parts, centres=centres, spreads=spreads)

    def to(self, device):
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if torch.is_tensor(getattr(self, f.name))}
        centres = {name: x.to(device) for name, x in self.centres.items()}
        return replace(self, **{name: x.to(device) for name, x in tensors.items()}, centres=centres)


def modular_addition(prime, train_fraction, seeds, with_replacement=False):
    """
    The Task (x + y) mod prime: all prime^2 pairs, of which each seed trains on a part of its own, drawn without
    replacement. With it, as in the code of Baek et al., there are 1000 pairs, and about half of those for testing are
    trained on. Raises ValueError for a number that is no prime, and for a fraction that leaves nothing to train or
    test on, or of some seed no training pair with a number or a sum.
    """
    if prime < 3 or any(prime % k == 0 for k in range(2, int(prime ** 0.5) + 1)):
        raise ValueError(f"prime is {prime}, which is no prime of at least 3: use 31, 59 or 97")
    x = np.stack(np.divmod(np.arange(prime ** 2), prime), 1) # (prime^2, 2)
    y = x.sum(1) % prime
    count = 1000 if with_replacement else len(x)
    N = int(train_fraction * count)
    if not 0 < N < count:
        raise ValueError(f"train_fraction is {train_fraction}, {N} of {count} pairs: use one between 0 and 1")
    generators = [np.random.RandomState([seed, prime]) for seed in seeds]
    if with_replacement:
        orders = np.stack([rng.randint(len(x), size=count) for rng in generators])
    else:
        orders = np.stack([rng.permutation(count) for rng in generators])
    for seed, order in zip(seeds, orders):
        pairs = x[order[:N]]
        for what, values in (("first number", pairs[:, 0]), ("second number", pairs[:, 1]), ("sum", y[order[:N]])):
            missing = np.setdiff1d(np.arange(prime), values)
            if len(missing):
                raise ValueError(f"train_fraction is {train_fraction}: of seed {seed} no training pair has "
                                 f"{missing[0]} as its {what}, use a larger fraction")
    source = f"(x + y) mod {prime}, {N} for training{', with replacement' if with_replacement else ''}"
    x, y = torch.from_numpy(x[orders]), torch.from_numpy(y[orders])
    return Task(x[:, :N], y[:, :N], x[:, N:], y[:, N:], prime, False, source, source)


def points(kind, seeds, count=60, test_count=2000):
    """
    The Task of three classes in the plane, count points each. Every seed has its own.
      separable   normal clusters around the corners of a triangle, cut off at two and a half deviations
      skewed      the same triangle, but each class exponential in both coordinates, so that means and medians differ
    """
    corners = np.array([[0.0, 2.0], [-1.75, -1.0], [1.75, -1.0]]) # their distance is 3.5
    parts = []
    for seed in seeds:
        rng = np.random.RandomState([seed, 2])
        size = (3, count + test_count, 2)
        if kind == "separable":
            x = rng.standard_normal(size)
            length = np.linalg.norm(x, axis=-1, keepdims=True)
            x = 0.5 * x * np.minimum(1, 2.5 / length)
        elif kind == "skewed":
            x = 0.6 * (rng.standard_exponential(size) - 1)
        else:
            raise ValueError(f"points is {kind!r}: use separable or skewed")
        parts.append(x + corners[:, None])
    x = torch.from_numpy(np.stack(parts)).float() # (S, 3, count + test_count, 2)
    y = torch.arange(3)[:, None].expand(x.shape[:-1])
    train, test = x.split([count, test_count], 2)
    train_y, test_y = (part.flatten(1) for part in y.split([count, test_count], 2))
    mean = train.mean(2) # (S, 3, 2)
    centres = dict(mean=mean, median=train.quantile(0.5, 2), geometric_median=geometric_median(train))
    spreads = (train - mean[:, :, None]).square().sum(3).mean(2).sqrt()
    source = f"{kind} points in the plane"
    return Task(train.flatten(1, 2), train_y, test.flatten(1, 2), test_y, 3, False, source, source, centres, spreads)


def geometric_median(x, iterations=500):
    """The point with the least sum of distances to points x (..., N, D) -> (..., D), by Weiszfeld's iteration."""
    centre = x.mean(-2)
    for _ in range(iterations):
        weights = 1 / (x - centre[..., None, :]).norm(dim=-1, keepdim=True).clamp_min(1e-9)
        centre = (weights * x).sum(-2) / weights.sum(-2)
    return centre


def pictures(images, scale):
    """
    The Task of data_vision's Images, as vectors that all seeds share. scale: 'raw', 0 to 255 as they are, or
    'standard', zero mean and unit variance over all pixels of the training part.
    """
    train, test = (x.flatten(1).float() for x in (images.train_x, images.test_x))
    if scale == "standard":
        mean, std = train.mean(), train.std()
        train, test = (train - mean) / std, (test - mean) / std
    return Task(train, images.train_y, test, images.test_y, images.num_classes, True, images.source, images.hash)
