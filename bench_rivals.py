"""
What bench.py compares with: the same loss and gradients, and the same training, as others would write them.

$ python bench.py head      # the output layer against linear layers and distances left to autograd
$ python bench.py step      # training a GPT, against nanoGPT's loop
$ python bench.py vision    # training on images, against a plain loop over a DataLoader

Every distance stands here a second time, from its formula: of distances.py only numbers such as eps and p are used.
The two loops are processes, as the training scripts are. They are this file run as a script, with a loop's name and, in
JSON, the settings that the training script gets as flags.
"""
import functools
import importlib
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from data import load_meta
from data_vision import AUGMENTATIONS, STATS, load, split
from distances import DISTANCES
from model import GPT, GPTConfig
from model_vision import VisionConfig, VisionNet
from run import device_name, log, peak_memory


def autocast(device, dtype):
    return nullcontext() if dtype == "float32" else torch.autocast(device, getattr(torch, dtype))

# -----------------------------------------------------------------------------
# rivals of a head: functions of (head, h, y) that return the loss and the gradients of h and of the parameters


def with_gradients(loss, *inputs):
    return loss.detach(), torch.autograd.grad(loss, inputs)


def linear(head, h, y):
    """The linear layer that a distance head replaces, with a weight of the same shape."""
    return with_gradients(F.cross_entropy(F.linear(h, head.weight), y), h, head.weight)


@functools.cache # one compiled function for all heads
def compiled_linear_loss():
    return torch.compile(lambda h, w, y: F.cross_entropy(F.linear(h, w), y), dynamic=False) # each size its own kernels


def compiled_linear(head, h, y):
    """The same linear layer, its cross-entropy fused by torch.compile."""
    return with_gradients(compiled_linear_loss()(h, head.weight, y), h, head.weight)


def lowered(head, h):
    """h and the weight in autocast's dtype, if it is on: it does not know the functions below."""
    dtype = F.linear(h[:1], head.weight[:1]).dtype
    return h.to(dtype), head.weight.to(dtype)


def chunked_linear(head, h, y):
    """torch's own linear layer and cross-entropy in one function."""
    options = torch.nn.LinearCrossEntropyOptions()
    return with_gradients(F.linear_cross_entropy(*lowered(head, h), y, options=options), h, head.weight)


def liger(head, h, y):
    """Liger's, which works in chunks of rows and makes the gradients in the forward pass, as our heads do."""
    loss = optional("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
    low_h, low_w = lowered(head, h)
    return with_gradients(loss(low_w, low_h, y), h, head.weight)


def cut_cross_entropy(head, h, y):
    """Apple's, which holds no logits at all. Without its filter, which drops small gradients, it is exact."""
    loss = optional("cut_cross_entropy").linear_cross_entropy
    return with_gradients(loss(*lowered(head, h), y, filter_eps=None), h, head.weight)


def keops(head, h, y):
    """An elementwise distance through KeOps, which compiles a kernel for the formula and never holds N x V either."""
    lazy = optional("pykeops.torch").LazyTensor
    d = elementwise(head, lazy(h[:, None].contiguous()), lazy(head.weight[None].contiguous())) # (N, V), not yet made
    of_target = elementwise(head, h, head.weight[y]) # (N,)
    loss = (-head.n * d.log()).logsumexp(dim=1)[:, 0] + head.n * of_target.log()
    return with_gradients(loss.mean(), h, head.weight)


def nll_sum(distances, head, h, y):
    """The sum of -log p_y. It has a function of its own so that the scores are released before the backward pass."""
    scores = -head.n * distances(head, h, head.weight).log() # (N, V)
    return F.cross_entropy(scores, y, reduction="sum")


def add_to(sums, terms):
    for total, term in zip(sums, terms):
        total.add_(term)


def with_autograd(head, h, y, distances, chunk):
    """
    The loss that distances(head, h, w) -> d (N, V) gives, and its gradients by autograd: from all rows of h at once
    where chunk is None, else from `chunk` rows at a time.
    """
    loss, h_gradients, gradients = 0.0, [], None
    rows = chunk or len(h)
    for h_part, y_part in zip(h.split(rows), y.split(rows)):
        h_part = h_part.detach().requires_grad_()
        part = nll_sum(distances, head, h_part, y_part) / len(h)
        part, (h_gradient, *new) = with_gradients(part, h_part, *head.parameters())
        loss = loss + part
        h_gradients.append(h_gradient)
        if gradients is None:
            gradients = new
        else:
            add_to(gradients, new)
        del new, h_gradient, h_part # or two chunks are held at a time
    h_gradient = h_gradients[0] if len(h_gradients) == 1 else torch.cat(h_gradients)
    return loss, (h_gradient, *gradients)


def params_of(head):
    """eps and the distance's parameters, as attributes."""
    return SimpleNamespace(eps=head.eps, **{**DISTANCES[head.distance][head.variant].params, **head.params})


def by_products(head, h, w):
    """d (N, V) from matrix products."""
    o = params_of(head)
    if head.distance == "cosine":
        return 1 - F.normalize(h, dim=-1) @ F.normalize(w, dim=-1).T + o.eps
    if head.distance == "chebyshev":
        above = (o.alpha * h).exp() @ (-o.alpha * w).exp().T
        below = (-o.alpha * h).exp() @ (o.alpha * w).exp().T
        return (above + below).log() / o.alpha + o.eps
    if head.distance == "offset_l2":
        a2 = head.alpha ** 2
        squares = (h * h) @ a2.T + (a2 * w * w).sum(-1) - 2 * h @ (a2 * w).T
        return (squares.clamp_min(0) + o.eps ** 2).sqrt()
    if head.distance == "mahalanobis":
        root = torch.linalg.cholesky(head.A.T @ head.A + o.reg_lambda * torch.eye(len(head.A), device=h.device))
        h, w = h @ root, w @ root
    squares = (h * h).sum(-1)[:, None] + (w * w).sum(-1) - 2 * h @ w.T
    return (squares.clamp_min(0) + o.eps ** 2).sqrt()


def by_cdist(head, h, w):
    """d (N, V) by torch.cdist."""
    o = params_of(head)
    if head.distance == "minkowski":
        return torch.cdist(h, w, p=o.p) + o.eps
    if head.distance == "hamming":
        return torch.cdist(torch.sigmoid(h / o.T), torch.sigmoid(w / o.T), p=1.0) / h.shape[1] + o.eps
    if head.distance == "bray_curtis":
        return torch.cdist(h, w, p=1.0) / (h.abs().sum(-1)[:, None] + w.abs().sum(-1) + o.eps) + o.eps
    return torch.cdist(h, w, p=1.0) + o.eps # manhattan


def by_broadcast(head, h, w):
    """d (N, V) from all differences, (N, V, D) of them."""
    return elementwise(head, h[:, None], w[None])


def elementwise(head, h, w):
    """d of pairs that broadcast, (..., D), (..., D) -> (...)."""
    o = params_of(head)
    if head.distance == "hamming":
        return (torch.sigmoid(h / o.T) - torch.sigmoid(w / o.T)).abs().mean(-1) + o.eps
    if head.distance == "bray_curtis":
        return (h - w).abs().sum(-1) / (h.abs().sum(-1) + w.abs().sum(-1) + o.eps) + o.eps
    if head.distance == "minkowski":
        return ((h - w).abs() ** o.p).sum(-1) ** (1 / o.p) + o.eps
    if head.distance == "canberra":
        return ((h - w).abs() / (h.abs() + w.abs() + o.eps)).sum(-1) + o.eps
    if head.distance == "manhattan":
        return (h - w).abs().sum(-1) + o.eps
    if head.variant == "smooth":
        return torch.logsumexp(o.alpha * (h - w).abs(), -1) / o.alpha + o.eps
    return (h - w).abs().amax(-1) + o.eps # chebyshev


BY_PRODUCTS = ("euclidean:standard", "cosine:stable", "mahalanobis:standard", "offset_l2:standard", "chebyshev:cosh")
BY_CDIST = ("manhattan:standard", "hamming:soft", "bray_curtis:abs", "minkowski:standard")
BY_BROADCAST = ("chebyshev:standard", "chebyshev:smooth", "canberra:standard") # cdist does not have them


def kind(head):
    return f"{head.distance}:{head.variant}"


OPTIONAL = { # rivals that others have made, for a GPU: the module, its package, and which heads meet it
    "Liger": (liger, "liger_kernel.transformers", "liger-kernel"),
    "cut cross-entropy": (cut_cross_entropy, "cut_cross_entropy", "cut-cross-entropy"),
    "KeOps": (keops, "pykeops.torch", "pykeops"),
}
LINEAR = ("linear + CE", "linear + CE, compiled", "F.linear_cross_entropy", "Liger", "cut cross-entropy")
BY_KEOPS = ("manhattan:standard", "minkowski:standard", "canberra:standard")
KEOPS_DIMENSIONS = 128 # it unrolls them all, and is slow beyond some hundred


@functools.cache
def optional(module):
    """The module, or None where it cannot be imported."""
    try:
        return importlib.import_module(module)
    except Exception: # not there, or not made for this torch
        return None


def left_out():
    """The names of the rivals that are not here, with their packages: {"Liger": "liger-kernel"}."""
    return {name: package for name, (_, module, package) in OPTIONAL.items() if optional(module) is None}


def rivals_of(head, compile=False):
    """
    {name: function}. An elementwise head meets its own distance, others also the linear layer that they replace, which
    torch.compile may fuse, and on a GPU what others have made of it.
    """
    on_gpu = head.weight.is_cuda
    others = {name: f for name, (f, module, _) in OPTIONAL.items() if on_gpu and optional(module) is not None}
    broadcast = partial(with_autograd, distances=by_broadcast, chunk=None)
    if kind(head) in (*BY_CDIST, *BY_BROADCAST):
        chunk = 64 if on_gpu else None # the backward pass of cdist holds rows x V x D there
        if kind(head) in BY_CDIST:
            rivals = {"cdist": partial(with_autograd, distances=by_cdist, chunk=chunk)}
        else:
            rivals = {"chunked broadcast": partial(with_autograd, distances=by_broadcast, chunk=8)}
        if kind(head) in BY_KEOPS and head.in_features <= KEOPS_DIMENSIONS:
            rivals.update({name: f for name, f in others.items() if f is keops})
        return {**rivals, "broadcast": broadcast}
    rivals = {"linear + CE": linear}
    if compile:
        rivals["linear + CE, compiled"] = compiled_linear
    if kind(head) in BY_PRODUCTS:
        rivals["dense distance"] = partial(with_autograd, distances=by_products, chunk=None)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"): # torch 2.13 has it
        rivals["F.linear_cross_entropy"] = chunked_linear
    return {**rivals, **{name: f for name, f in others.items() if f is not keops}}


def own_distance(head, rows):
    """
    The function that computes a head's loss from its formula, so many rows at a time where it broadcasts; None where
    there is none.
    """
    if head.distance == "baseline":
        return linear
    if kind(head) in BY_PRODUCTS:
        return partial(with_autograd, distances=by_products, chunk=None)
    if kind(head) in (*BY_CDIST, *BY_BROADCAST):
        return partial(with_autograd, distances=by_broadcast, chunk=rows)
    return None


# The lane instructions of an element on a GPU, in all three passes. A reciprocal, root or exponential counts as 8.
LANE_INSTRUCTIONS = {
    "manhattan:standard": 6, "hamming:soft": 6, "bray_curtis:abs": 6, "minkowski:p=1.5": 24, "minkowski:p=3": 9,
    "chebyshev:standard": 8, "chebyshev:smooth": 14.2, "canberra:standard": 22.8,
}
CLOCK_HZ = {"H100": 1.98e9, "H200": 1.98e9}


def flops(head, N, V, D):
    """The FLOPs of the matrix products of a head, or None for one that is not made of them."""
    name, of_products = kind(head), ("baseline", "euclidean", "cosine", "mahalanobis", "offset_l2")
    if head.distance not in of_products and name != "chebyshev:cosh":
        return None
    count = 6 * N * V * D # one product forward and two backward
    if name in ("offset_l2:standard", "chebyshev:cosh"):
        count *= 2
    if name in ("mahalanobis:standard", "mahalanobis:cholesky"):
        count += 6 * (N + V) * D * D # h and w are whitened
    return count


def floor(head, N, V, D, flops_per_s):
    """
    The seconds that the arithmetic alone takes, or None where no honest number is known. Matrix products run at
    flops_per_s. Elementwise distances, on a GPU whose clock is known, are a model: one instruction per lane and clock,
    128 lanes on each multiprocessor.
    """
    name, of_products = kind(head), flops(head, N, V, D)
    if of_products is not None:
        return of_products / flops_per_s
    if head.distance == "minkowski":
        name = f"minkowski:p={params_of(head).p:g}"
    gpu = device_name("cuda") if head.weight.is_cuda else ""
    clocks = [hz for model_name, hz in CLOCK_HZ.items() if model_name in gpu]
    if name not in LANE_INSTRUCTIONS or not clocks:
        return None
    lanes = 128 * torch.cuda.get_device_properties(0).multi_processor_count
    return N * V * D * LANE_INSTRUCTIONS[name] / (lanes * clocks[0])

# -----------------------------------------------------------------------------
# nanoGPT's loop, the rival of train.py: https://github.com/karpathy/nanoGPT/blob/master/train.py


def get_batch(folder, dtype, block_size, batch_size):
    """x, y (B, T) as nanoGPT fetches them: slices at random places of a new memmap."""
    data = np.memmap(os.path.join(folder, "train.bin"), dtype=dtype, mode="r")
    ix = torch.randint(len(data) - block_size, (batch_size,))
    x = torch.stack([torch.from_numpy(data[i:i + block_size].astype(np.int64)) for i in ix])
    y = torch.stack([torch.from_numpy(data[i + 1:i + 1 + block_size].astype(np.int64)) for i in ix])
    return x, y


class NanoGPT(torch.nn.Module):
    """nanoGPT's forward pass over our GPT's weights: the logits of a whole micro-batch and their cross-entropy."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def forward(self, idx, targets):
        logits = F.linear(self.gpt.features(idx), self.gpt.head.weight) # (B, T, V)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        return logits, loss


def nanogpt(c):
    """Train a GPT with a linear head in nanoGPT's loop. c holds settings of train.py. Returns the GPT."""
    torch.manual_seed(c.seed)
    torch.set_float32_matmul_precision("high") # tf32, which nanoGPT allows too
    gpt = GPT(GPTConfig(c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd, bias=False, tie_weights=True))
    model = NanoGPT(gpt).to(c.device)
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=c.learning_rate, betas=(0.9, 0.95), fused=c.device == "cuda")
    scaler = torch.amp.GradScaler(c.device, enabled=False) # it is enabled for float16 only
    if c.compile:
        model = torch.compile(model)
    folder = os.path.join(c.data_dir, c.dataset)
    dtype = load_meta(folder)["dtype"]

    def next_batch():
        x, y = get_batch(folder, dtype, c.block_size, c.batch_size)
        if c.device == "cuda":
            x = x.pin_memory().to(c.device, non_blocking=True)
            y = y.pin_memory().to(c.device, non_blocking=True)
        return x, y

    x, y = next_batch()
    last = time.time()
    for step in range(1, c.max_iters + 1):
        for group in optimizer.param_groups:
            group["lr"] = c.learning_rate
        for _ in range(c.gradient_accumulation_steps):
            with autocast(c.device, c.dtype):
                _, loss = model(x, y)
                loss = loss / c.gradient_accumulation_steps
            x, y = next_batch() # fetched while the device works on this one
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if step % c.log_interval == 0:
            loss_value = loss.item() * c.gradient_accumulation_steps # it waits for the device
            now = time.time()
            log(c.out_dir, dict(kind="train", step=step, loss=loss_value, ms=(now - last) / c.log_interval * 1000,
                                peak_memory_bytes=peak_memory(c.device)))
            last = now
    return gpt

# -----------------------------------------------------------------------------
# a plain loop over a DataLoader, the rival of train_vision.py


class PlainImages(torch.utils.data.Dataset):
    """One image at a time, as one writes it: to floats, augmentation, normalisation."""

    def __init__(self, x, y, normalize, augment):
        self.x, self.y, self.spec = x, y, AUGMENTATIONS[augment]
        mean, std = STATS[normalize]
        self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        x = self.x[i].float() / 255
        if any(self.spec.values()):
            u = torch.rand(4)
            dy, dx = (u[1:3] * (2 * self.spec["padding"] + 1)).long().tolist()
            degrees = (2 * u[3].item() - 1) * self.spec["degrees"]
            x = self.augmented(x, u[0] < self.spec["flip"], dy, dx, math.radians(degrees))
        return (x - self.mean) / self.std, self.y[i]

    def augmented(self, x, flip, dy, dx, angle):
        """x (C, H, W) mirrored, cut out of its zero padding at (dy, dx), and turned by angle, in radians."""
        if flip:
            x = x.flip(2)
        _, H, W = x.shape
        x = F.pad(x, (self.spec["padding"],) * 4)[:, dy:dy + H, dx:dx + W]
        cos, sin = math.cos(angle), math.sin(angle)
        grid = F.affine_grid(torch.tensor([[[cos, -sin, 0], [sin, cos, 0]]]), (1, *x.shape), align_corners=False)
        return F.grid_sample(x[None], grid, align_corners=False)[0]


def image_loader(x, y, c):
    """A DataLoader of shuffled batches. c holds batch_size, normalize, augment, device, and the number of workers."""
    return torch.utils.data.DataLoader(PlainImages(x, y, c.normalize, c.augment), c.batch_size, shuffle=True,
                                       num_workers=c.workers, pin_memory=c.device == "cuda", drop_last=True,
                                       persistent_workers=c.workers > 0)


def dataloader(c):
    """Train an image classifier in the loop that one writes first. c holds settings of train_vision.py. Returns it."""
    torch.set_float32_matmul_precision("high") # this and the next line as in train_vision.py
    torch.backends.cudnn.benchmark = True
    images = load(c.dataset, c.data_dir)
    rows, _ = split(images.train_y, c.val_fraction, c.seed)
    loader = image_loader(images.train_x[rows], images.train_y[rows], c)
    torch.manual_seed(c.seed)
    model = VisionNet(VisionConfig(c.model, tuple(images.train_x.shape[1:]), images.num_classes)).to(c.device)
    model.head.validate = False # which would wait for the device
    if c.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), c.learning_rate, momentum=0.9, weight_decay=c.weight_decay)
    else:
        optimizer = torch.optim.Adam(model.parameters(), c.learning_rate)
    step, last = 0, time.time()
    for _ in range(c.epochs):
        for x, y in loader:
            x, y = x.to(c.device, non_blocking=True), y.to(c.device, non_blocking=True)
            optimizer.zero_grad()
            with autocast(c.device, c.dtype):
                logits, _ = model(x)
                loss = F.cross_entropy(logits, y)
            loss.backward()
            optimizer.step()
            loss_value = loss.item()
            step += 1
        now = time.time()
        log(c.out_dir, dict(kind="train", step=step, loss=loss_value, ms=(now - last) / len(loader) * 1000))
        last = now
    return model


LOOPS = {"nanogpt": nanogpt, "dataloader": dataloader}

if __name__ == "__main__":
    name, settings = sys.argv[1:]
    try:
        LOOPS[name](SimpleNamespace(**json.loads(settings)))
    except (ValueError, OSError) as e:
        raise SystemExit(str(e)) from None
