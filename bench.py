"""
Speed and memory. All sides of a comparison run in one process and in turn, round by round, so that a busy machine slows them alike.

$ python bench.py head                                   # loss and gradients of the output layer, against its rivals
$ python bench.py head --heads=cosine,minkowski:p=3 --sizes=512x8192x256 --rounds=9 --json=head.json
$ python bench.py head --growth=true                     # time and memory over N, V and D: a figure
$ python bench.py model                                  # forward and backward pass of the whole GPT, by head
$ python bench.py step                                   # the training step, against nanoGPT's loop
$ python bench.py data                                   # the fetching of batches, against nanoGPT's
$ python bench.py vision                                 # training on images, against a loop over a DataLoader

It prints a table in Markdown; --json=path keeps every time that was taken. Sizes are tokens x prototypes x dimensions.
"""
import math
import os
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from json import dump
from types import SimpleNamespace

os.environ.setdefault("KINETO_LOG_LEVEL", "6") # torch's profiler writes two lines on each use

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from configurator import configure, fail
from data import Blocks, load_meta
from data_vision import AUGMENTATIONS, STATS, Batches
from distances import DISTANCES, DistanceHead, parse_head
from model import GPT, GPTConfig, default_scales
from model_vision import VisionConfig, VisionNet
from run import device_name, parameter_groups

# -----------------------------------------------------------------------------
# defaults
heads = "" # comma separated distance[:variant][:name=value], such as cosine,chebyshev:smooth,minkowski:p=3; '': the word's own
json = "" # a file for the machine, the settings, the table and every time
rounds = 5 # each side runs once per round, after a warm-up
budget_s = 60.0 # a side that has run for so long sits the other rounds out
compile = True # torch.compile, as train.py uses it
triton = True # hand-written kernels, where there are a GPU and triton
device = "auto" # 'cuda', 'cpu', or the first of these that there is
dtype = "auto" # 'float32', or autocast to 'bfloat16'; auto: bfloat16 on a GPU that has it, else float32
threads = 0 # of the CPU; 0: torch's default
seed = 1337
# head
sizes = "" # NxVxD, comma separated; '': 512x8192x256,1024x16384x384, or on a GPU 16384x50304x768,16384x151936x896 (GPT-2's and Qwen2's)
n = 0.0 # the exponent; 0: the distance's default
slow_s = 10.0 # a rival that would run longer is timed on a part of the rows and scaled; its memory too is a part's beyond 30 times that
growth = False # draw time and memory over N, V and D instead
growth_base = "256x4096x128" # and its doublings, one axis at a time
doublings = 4
figure = "assets/bench_growth.png"
# model, step, data; 0: the shape of config/cpu.py (and 4096 tokens in the vocabulary), or GPT-2 124M at 16 x 1024 tokens on a GPU
n_layer = 0
n_head = 0
n_embd = 0
block_size = 0
batch_size = 0
vocab_size = 0
gradient_accumulation_steps = 0 # micro-batches per step; 0: 1, or 4 on a GPU
steps = 0 # training steps per round; 0: 1, or 5 on a GPU
tie_weights = True
data_dir = "data"
dataset = "" # a folder in data_dir; '': random tokens, in a temporary one
peak_tflops = 0.0 # of the device at this dtype, for the MFU: 989 for bfloat16 on H100 and H200; 0: no MFU
# -----------------------------------------------------------------------------

PRODUCTS, L1, SLOW = ("euclidean", "cosine", "mahalanobis", "offset_l2"), ("manhattan", "hamming", "bray_curtis:abs"), ("chebyshev", "canberra", "chebyshev:smooth")
FEW = "baseline", "euclidean", "cosine", "manhattan", "minkowski:p=3", "canberra"
HEADS = {"head": ("baseline", *PRODUCTS, "chebyshev:cosh", *L1, "minkowski:p=1.5", "minkowski:p=3", *SLOW), "growth": FEW, "model": FEW,
         "step": ("baseline", "cosine"), "data": (), "vision": ()}
SIZES = {"cpu": "512x8192x256,1024x16384x384", "cuda": "16384x50304x768,16384x151936x896"}
# what is to be reached at those sizes (on a GPU the first): head -> rival -> column of the table -> its largest value
_MM, _CHUNKED = {"linear + CE": {"ratio": 1.1}, "dense distance": {"MiB ratio": 0.5}}, {"chunked broadcast": {"ratio": 1 / 15, "MiB ratio": 0.3}}
_GPU_MM, _GPU_L1 = {"linear + CE": {"ratio": 1.15, "MB beside": 2000}, "F.linear_cross_entropy": {"ratio": 1.0}}, {"cdist": {"ms": 200, "MB beside": 2000}}
TARGETS = {"cpu": {**dict.fromkeys(PRODUCTS, _MM), **dict.fromkeys(L1, {"cdist": {"ratio": 1 / 4, "MiB ratio": 0.3}}), **dict.fromkeys(SLOW, _CHUNKED),
                   "minkowski:p=1.5": {"cdist": {"ratio": 1 / 10, "MiB ratio": 0.3}}, "minkowski:p=3": {"cdist": {"ratio": 1 / 30, "MiB ratio": 0.3}}},
           "cuda": {**dict.fromkeys(("euclidean", "cosine"), _GPU_MM), **dict.fromkeys(L1, _GPU_L1),
                    "minkowski:p=3": {"cdist": {"ms": 260}}, "canberra": {"chunked broadcast": {"ms": 800}}}}
SHAPES = {"cpu": dict(n_layer=4, n_head=4, n_embd=128, block_size=128, batch_size=16, vocab_size=4096, gradient_accumulation_steps=1, steps=1),
          "cuda": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=16, vocab_size=50257, gradient_accumulation_steps=4, steps=5)}
# model -> images per step (of config/, on a GPU) and steps per epoch; the pipeline has no model
VISION = {"cpu": {"pipeline": (8192, 3), "mlp": (512, 20), "cnn": (512, 6), "resnet50": (32, 2)},
          "cuda": {"pipeline": (8192, 7), "mlp": (2048, 29), "cnn": (8192, 7), "resnet50": (512, 20)}}

# -----------------------------------------------------------------------------
# measuring


def autocast():
    return nullcontext() if dtype == "float32" else torch.autocast(device, getattr(torch, dtype))


def seconds_of(f):
    """How long f takes; its result is released before the next one allocates."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = f()
    wait()
    seconds = time.perf_counter() - start
    del result
    return seconds


def race(runners, warm=True):
    """({name: [seconds, ...]}, {name: median}) of functions that run in turn, every other round backwards; the warm-up does not count."""
    times = {name: [] for name in runners}
    for i in progress(range(-1 if warm else 0, rounds)):
        for name in list(runners)[::-1 if i % 2 else 1]:
            if i < 0:
                runners[name]()
            elif not times[name] or sum(times[name]) < budget_s:
                times[name].append(seconds_of(runners[name]))
    return times, {name: statistics.median(seconds) for name, seconds in times.items()}


def peak_bytes(f):
    """Peak of what f allocates, its result included: on a CPU exactly, from every allocation and release that torch's allocator reports,
    on a GPU by torch's own count. Call f once before, or what is made only once (compiled code, caches) counts too."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before, result = torch.cuda.memory_allocated(), f()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = f() # noqa: F841 a release counts as one
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(0, *np.cumsum([0, *changes]).tolist())

# -----------------------------------------------------------------------------
# a head and its rivals: functions of (head, h, y) that give the loss and the gradients of h and of the parameters


def ready(head):
    head.validate = False # as in training
    if hasattr(head.core, "triton"):
        head.core.triton = triton
    if compile:
        head.compile_loss()
    return head


def make_case(text, N, V, D):
    """head, h (N, D), y (N,)"""
    torch.manual_seed(seed)
    arguments = parse_head(text)
    default_n, feature_scale = default_scales(arguments["distance"], arguments["variant"], D)
    head = DistanceHead(D, V, **arguments, n=n or default_n).to(device)
    h = torch.randn(N, D, device=device) * feature_scale
    return ready(head), h.requires_grad_(), torch.randint(V, (N,), device=device)


def with_gradients(loss, *inputs):
    return loss.detach(), torch.autograd.grad(loss, inputs)


def ours(head, h, y):
    return with_gradients(head.loss(h, y), h, *head.parameters())


def linear(head, h, y):
    return with_gradients(F.cross_entropy(F.linear(h, head.weight), y), h, head.weight)


def chunked_linear(head, h, y):
    low = getattr(torch, dtype) # autocast does not know this function
    return with_gradients(F.linear_cross_entropy(h.to(low), head.weight.to(low), y, options=torch.nn.LinearCrossEntropyOptions()), h, head.weight)


def plain(distances, chunk, head, h, y):
    """Autograd does it all: d (rows, V) = distances(head, h, w), -n log d, cross-entropy; all rows at once, or `chunk` at a time."""
    total, ghs, sums = 0.0, [], None
    for h_i, y_i in zip(h.split(chunk or len(h)), y.split(chunk or len(h))):
        h_i = h_i.detach().requires_grad_()
        loss = F.cross_entropy(-head.n * distances(head, h_i, head.weight).log(), y_i, reduction="sum") / len(h)
        loss, (gh, *gp) = with_gradients(loss, h_i, *head.parameters())
        total, sums = total + loss, gp if sums is None else [a.add_(b) for a, b in zip(sums, gp)]
        ghs.append(gh)
        del gp, gh, h_i # or two chunks are held
    return total, (ghs[0] if len(ghs) == 1 else torch.cat(ghs), *sums)

# every distance a second time, from its formula: nothing of a rival is taken from distances.py


def options(head):
    return SimpleNamespace(eps=head.eps, **{**DISTANCES[head.distance][head.variant].params, **head.params})


def by_products(head, h, w):
    o = options(head)
    if head.distance == "cosine":
        return 1 - F.normalize(h, dim=-1) @ F.normalize(w, dim=-1).T + o.eps
    if head.distance == "chebyshev":
        return ((o.alpha * h).exp() @ (-o.alpha * w).exp().T + (-o.alpha * h).exp() @ (o.alpha * w).exp().T).log() / o.alpha
    if head.distance == "offset_l2":
        a2 = head.alpha ** 2
        s = (h * h) @ a2.T + (a2 * w * w).sum(-1) - 2 * h @ (a2 * w).T
    else:
        if head.distance == "mahalanobis":
            root = torch.linalg.cholesky(head.A.T @ head.A + o.reg_lambda * torch.eye(len(head.A), device=h.device))
            h, w = h @ root, w @ root
        s = (h * h).sum(-1)[:, None] + (w * w).sum(-1) - 2 * h @ w.T
    return (s.clamp_min(0) + o.eps ** 2).sqrt()


def by_cdist(head, h, w):
    o = options(head)
    if head.distance == "hamming":
        return torch.cdist(torch.sigmoid(h / o.T), torch.sigmoid(w / o.T), p=1.0) / h.shape[1] + o.eps
    if head.distance == "bray_curtis":
        return torch.cdist(h, w, p=1.0) / (h.abs().sum(-1)[:, None] + w.abs().sum(-1) + o.eps) + o.eps
    return torch.cdist(h, w, p=getattr(o, "p", 1.0)) + o.eps


BROADCAST = { # and how many lane instructions an element takes on a GPU in all three passes, a reciprocal, root or exponential counting as 8
    "manhattan:standard": (6, lambda h, w, o: (h - w).abs().sum(-1) + o.eps),
    "hamming:soft": (6, lambda h, w, o: (torch.sigmoid(h / o.T) - torch.sigmoid(w / o.T)).abs().mean(-1) + o.eps),
    "bray_curtis:abs": (6, lambda h, w, o: (h - w).abs().sum(-1) / (h.abs().sum(-1) + w.abs().sum(-1) + o.eps) + o.eps),
    "minkowski:standard": ({1.5: 24, 3.0: 9}, lambda h, w, o: ((h - w).abs() ** o.p).sum(-1) ** (1 / o.p) + o.eps),
    "chebyshev:standard": (8, lambda h, w, o: (h - w).abs().amax(-1) + o.eps),
    "chebyshev:smooth": (14.2, lambda h, w, o: torch.logsumexp(o.alpha * (h - w).abs(), -1) / o.alpha),
    "canberra:standard": (22.8, lambda h, w, o: ((h - w).abs() / (h.abs() + w.abs() + o.eps)).sum(-1) + o.eps),
}


def by_broadcast(head, h, w):
    return BROADCAST[f"{head.distance}:{head.variant}"][1](h[:, None], w[None], options(head))


def rivals_of(head):
    """{name: function}, the one with a target first"""
    key = f"{head.distance}:{head.variant}"
    if key in BROADCAST: # cdist 64 rows at a time on a GPU, as its backward pass holds rows x V x D there
        chunked = head.distance in ("chebyshev", "canberra")
        return {**({"chunked broadcast": partial(plain, by_broadcast, 8)} if chunked else {"cdist": partial(plain, by_cdist, 64 if device == "cuda" else None)}),
                "broadcast": partial(plain, by_broadcast, None)}
    dense = key in ("euclidean:standard", "cosine:stable", "mahalanobis:standard", "offset_l2:standard", "chebyshev:cosh")
    return {"linear + CE": linear, **({"dense distance": partial(plain, by_products, None)} if dense else {}),
            **({"F.linear_cross_entropy": chunked_linear} if hasattr(torch.nn, "LinearCrossEntropyOptions") else {})} # torch 2.13 has it


def floor(head, N, V, D, flops_per_s):
    """Seconds that the arithmetic alone takes. Matrix products: at the rate of a square torch.mm, timed in the same rounds. Elementwise on a
    GPU: a model, one instruction per lane and clock, 128 lanes on each multiprocessor. Elementwise on a CPU: None, no honest one is known."""
    key = f"{head.distance}:{head.variant}"
    if head.distance in ("baseline", *PRODUCTS) or key == "chebyshev:cosh":
        whiten = 6 * (N + V) * D * D if key in ("mahalanobis:standard", "mahalanobis:cholesky") else 0
        return ((12 if key in ("offset_l2:standard", "chebyshev:cosh") else 6) * N * V * D + whiten) / flops_per_s
    slots = BROADCAST.get(key, (None,))[0]
    slots = slots.get(options(head).p) if isinstance(slots, dict) else slots
    lanes_hz = 128 * torch.cuda.get_device_properties(0).multi_processor_count * 1.98e9 if device == "cuda" else 0 # the clock of H100 and H200
    return N * V * D * slots / lanes_hz if slots and lanes_hz else None

# -----------------------------------------------------------------------------
# head


def run(f, head, h, y):
    with autocast():
        return f(head, h, y)


def prepared(name, f, head, h, y):
    """(the function to time, on how many rows it works, its peak memory, whether that is the peak of all rows)"""
    N, (V, D) = len(h), head.weight.shape

    def on(rows):
        return partial(run, f, head, h.detach()[:rows].requires_grad_(), y[:rows])
    rows = min(N, max(1, 2 ** 27 // (V * D))) if name == "broadcast" else N # whose temporaries, of 512 MB, it survives
    probe = min(rows, max(16, N // 16))
    seconds = min(seconds_of(on(probe)), seconds_of(on(probe))) / probe
    # the peak of a part is less than the whole's, though for chunks only by the gradient of h
    whole = name != "broadcast" and not (isinstance(f, partial) and f.args[1]) and seconds * N < 30 * slow_s
    while rows > probe and seconds * rows > slow_s:
        rows = max(probe, rows // 2)
    return on(rows), rows, peak_bytes(on(N if whole else rows)), whole or rows == N


def head_case(text, N, V, D):
    """A row of the table for each rival of this head."""
    head, h, y = make_case(text, N, V, D)
    side = 8192 if device == "cuda" else 1024
    runners = {"ours": partial(run, ours, head, h, y), "mm": partial(torch.mm, *torch.randn(2, side, side, device=device, dtype=getattr(torch, dtype)))}
    for f in runners.values():
        f() # warm-up
    peak, rivals = peak_bytes(runners["ours"]), {}
    for name, f in rivals_of(head).items():
        try:
            runners[name], *rivals[name] = prepared(name, f, head, h, y)
        except RuntimeError as e: # some rivals cannot run at every size
            if not isinstance(e, torch.OutOfMemoryError) and "allocate memory" not in str(e):
                raise
            rivals[name] = None
    times, median = race(runners, warm=False)
    limit, rows = floor(head, N, V, D, 2 * side ** 3 / median["mm"]), []
    targets = TARGETS[device].get(text, {}) if f"{N}x{V}x{D}" in SIZES[device].split(",")[:2 if device == "cpu" else 1] else {}
    for name, rival in rivals.items():
        few, rival_peak, whole = rival or (N, None, True)
        row = {"size": f"{N}x{V}x{D}", "head": text, "ms": median["ours"] * 1e3, "rival": name + ("" if few == N else f" (on {few} of {N} rows, scaled)") + (
               "" if rival else " (out of memory)"), "rival's ms": None, "ratio": None, "MiB": peak / 2 ** 20, "rival's MiB": None, "MiB ratio": None,
               "MB beside": (peak - sum(p.nbytes for p in head.parameters())) / 1e6}
        if rival:
            rival_ms = median[name] * 1e3 * N / few
            row |= {"rival's ms": rival_ms, "ratio": row["ms"] / rival_ms, "rival's MiB": rival_peak / 2 ** 20, "MiB ratio": peak / rival_peak}
        row["rival"] += "" if whole else ", its MiB those of the part"
        row["target"] = ", ".join(f"{key} <= {most:.3g} {verdict(row[key], most)}" for key, most in targets.get(name, {}).items())
        row |= {"floor ms": limit and limit * 1e3, "% of floor": limit and 100 * limit / median["ours"],
                "raw": dict(n=head.n, rival_rows=few, seconds=times["ours"], rival_seconds=times.get(name), mm_seconds=times["mm"], peak_bytes=peak, rival_peak_bytes=rival_peak)}
        rows.append(row)
    return rows


def verdict(value, most):
    return "not measured" if value is None else "met" if value <= most else "missed"


def bench_head():
    """Medians of forward and backward pass; the gradients of h and of all parameters are made and held on both sides. A ratio is ours over the
    rival's. MB beside: peak memory less the gradients of the parameters. Floor: matrix products at the rate of a square torch.mm in the same
    rounds; elementwise, on a GPU only, a model (lane instructions per clock)."""
    cases = [(name, *size) for size in parse_sizes(sizes or SIZES[device]) for name in names_of("head")]
    return [row for case in progress(cases) for row in head_case(*case)]


def bench_growth():
    """Medians of forward and backward pass, all gradients included."""
    base, rows = parse_sizes(growth_base)[0], []
    grown = {tuple(s * 2 ** (k * (i == axis)) for i, s in enumerate(base)) for axis in range(3) for k in range(doublings + 1)}
    for size in progress(sorted(grown, key=np.prod)):
        runners = {name: partial(run, ours, *make_case(name, *size)) for name in names_of("growth")}
        runners["linear + CE"] = partial(run, linear, *make_case("baseline", *size))
        times, median = race(runners)
        rows += [{"size": "{}x{}x{}".format(*size), "head": name, "ms": median[name] * 1e3, "MiB": peak_bytes(f) / 2 ** 20, "raw": dict(NVD=size, seconds=times[name])}
                 for name, f in runners.items()]
    plot_growth(rows, base)
    return rows


def plot_growth(rows, base):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names = list(dict.fromkeys(r["head"] for r in rows))
    colors = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9") # Okabe and Ito's
    fig, axes = plt.subplots(2, 3, figsize=(10, 6), layout="constrained", sharey="row", sharex="col")
    for (i, j), ax in np.ndenumerate(axes):
        mine = sorted((r["raw"]["NVD"][j], r["head"], r["MiB" if i else "ms"]) for r in rows if all(r["raw"]["NVD"][k] == base[k] for k in range(3) if k != j))
        for k, name in enumerate(names):
            style = dict(color="black", marker="x", ls="--") if name == "linear + CE" else dict(color=colors[k % 6], marker="osD^vP"[k % 6])
            ax.plot(*zip(*[(x, value) for x, head, value in mine if head == name]), ms=5, lw=1.5, label=name, **style)
        xs, low = [base[j] * 2 ** k for k in range(doublings + 1)], min(value for *_, value in mine) / 2
        ax.plot(xs, [low * x / xs[0] for x in xs], color="0.6", lw=1, ls=":", label="proportional")
        ax.set(xscale="log", yscale="log", ylabel="" if j else ("ms, forward and backward", "peak memory, MiB")[i],
               xlabel="NVD"[j] + " (" + ", ".join(f"{'NVD'[k]} = {base[k]:,}" for k in range(3) if k != j) + ")" if i else "")
        ax.set_xticks(xs, [f"{x:,}" for x in xs])
        ax.minorticks_off()
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="0.92")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    os.makedirs(os.path.dirname(figure) or ".", exist_ok=True)
    fig.savefig(figure, dpi=150)
    plt.close(fig)

# -----------------------------------------------------------------------------
# model, step, data


def make_model(text):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, bias=False, tie_weights=tie_weights, distance=text, n=n)).to(device)
    ready(model.head)
    return model


def compiled(model):
    if compile:
        model.features = torch.compile(model.features)
    return model


def speed(tokens, seconds, model):
    """MFU: 6 flops per token and parameter that multiplies (embeddings do not), and attention, of what the device can do."""
    c, rate = model.config, tokens / seconds
    multiply = sum(p.numel() for p in model.parameters()) - c.n_embd * c.block_size - (0 if c.tie_weights else model.transformer.wte.weight.numel())
    flops = (6 * multiply + 12 * c.n_layer * c.n_embd * c.block_size) * rate
    return {"tokens/s": rate, "MFU %": flops / peak_tflops / 1e10 if peak_tflops else None}


def backward(model, x, y):
    with autocast():
        loss = model(x, y)[1]
    loss.backward()
    model.zero_grad(set_to_none=True)


def bench_model():
    """Medians of forward and backward pass of the whole model; the head's part is that of its loss and gradients on its own."""
    (x, y), runners = torch.randint(vocab_size, (2, batch_size, block_size), device=device), {}
    models = {name: compiled(make_model(name)) for name in dict.fromkeys(("baseline", *names_of("model")))}
    for name, model in models.items():
        with torch.no_grad(), autocast():
            h = model.features(x)
        runners |= {name: partial(backward, model, x, y), f"{name}, head": partial(run, ours, model.head, h.requires_grad_(), y)}
    times, median = race(runners)
    return [{"head": name, "ms": median[name] * 1e3, **speed(x.numel(), median[name], model), "time / baseline": median[name] / median["baseline"],
             "head, % of it": 100 * median[f"{name}, head"] / median[name],
             "raw": dict(seconds=times[name], head_seconds=times[f"{name}, head"])} for name, model in models.items()]


def our_batches(folder):
    """() -> the next x, y, as train.py fetches them"""
    blocks, index = Blocks(folder, "train", block_size, vocab_size, seed), iter(range(2 ** 62))
    return lambda: blocks.batch(next(index) * batch_size, batch_size)


def nanogpt_batches(folder):
    """() -> x, y as nanoGPT fetches them: slices at random places of a new memmap"""
    path, kind = os.path.join(folder, "train.bin"), load_meta(folder)["dtype"]

    def get_batch():
        data = np.memmap(path, dtype=kind, mode="r")
        ix = torch.randint(len(data) - block_size, (batch_size,))
        x = torch.stack([torch.from_numpy(data[i:i + block_size].astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy(data[i + 1:i + 1 + block_size].astype(np.int64)) for i in ix])
        return x, y
    return get_batch


class NanoGPT(torch.nn.Module):
    """nanoGPT's forward pass over the same weights: the logits of the whole micro-batch, in the autocast dtype, and cross-entropy."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def forward(self, idx, targets):
        logits = F.linear(self.gpt.features(idx), self.gpt.head.weight)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def training(model, batches, nanogpt=False):
    """() -> so many steps of train.py's loop, or of nanoGPT's, and one wait for the device at the end, as for a log line. Both fetch the next
    batch while the device works, clip, step; train.py also seeds each micro-batch, and keeps every loss and gradient norm."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1}, {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=device == "cuda")
    scaler = torch.amp.GradScaler(device, enabled=False) # as for every dtype but float16

    def fetch():
        x, y = batches()
        return (x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)) if device == "cuda" else (x, y)
    batch, index = fetch(), 0

    def train():
        nonlocal batch, index
        kept = []
        for _ in range(steps):
            loss_sum = 0.0
            for _ in range(gradient_accumulation_steps):
                if not nanogpt:
                    torch.manual_seed(hash((seed, index)))
                with autocast():
                    loss = model(*batch)[1] / gradient_accumulation_steps
                batch, index = fetch(), index + 1
                scaler.scale(loss).backward()
                loss_sum = loss_sum + loss.detach() if not nanogpt else loss.detach() * gradient_accumulation_steps # it logs the last micro-batch
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            kept = [*kept, torch.stack([loss_sum.float(), norm.float()])] if not nanogpt else [loss_sum]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
        return torch.stack(kept).tolist()
    return train


def bench_step():
    """Medians of the whole training step: data, forward, backward, clipping, AdamW."""
    with data_folder() as folder:
        nano, loop = NanoGPT(make_model("baseline")), "nanoGPT's loop"
        models = {name: compiled(make_model(name)) for name in dict.fromkeys(("baseline", *names_of("step")))}
        times, median = race({loop: training(torch.compile(nano) if compile else nano, nanogpt_batches(folder), nanogpt=True),
                              **{name: training(model, our_batches(folder)) for name, model in models.items()}})
    rows = [{"loop": name, "ms": median[name] / steps * 1e3, **speed(steps * gradient_accumulation_steps * batch_size * block_size, median[name], models.get(name, nano.gpt)),
             "speed / nanoGPT's": median[loop] / median[name], "speed / baseline": median["baseline"] / median[name], "raw": dict(seconds=times[name])} for name in times]
    for row in rows if device == "cuda" else []:
        key, least = {"baseline": ("speed / nanoGPT's", 1.0), "cosine": ("speed / baseline", 0.97)}.get(row["loop"], ("", 0))
        row["target"] = key and f"{key} >= {least} {'met' if row[key] >= least else 'missed'}"
    return rows


def bench_data():
    """Medians of 20 batches, to a tensor in memory. The last column is against forward and backward pass of the model with the linear head."""
    with data_folder() as folder:
        fetch = {"nanoGPT's get_batch": nanogpt_batches(folder), "Blocks.batch": our_batches(folder)}
        runners = {name: partial(lambda f: [f() for _ in range(20)], f) for name, f in fetch.items()} # one is too short to time
        runners["forward and backward"] = partial(backward, compiled(make_model("baseline")), *torch.randint(vocab_size, (2, batch_size, block_size), device=device))
        times, median = race(runners)
    rate = {name: batch_size * block_size * (20 if name in fetch else 1) / median[name] for name in runners}
    return [{"what": name, "tokens/s": rate[name], "speed / nanoGPT's": rate[name] / rate["nanoGPT's get_batch"] if name in fetch else None,
             "times the need": rate[name] / rate["forward and backward"], "raw": dict(seconds=times[name])} for name in runners]


@contextmanager
def data_folder():
    with tempfile.TemporaryDirectory() as folder:
        if not dataset:
            tokens = np.random.default_rng(seed).integers(min(vocab_size, 2 ** 16), size=max(2 ** 22, 4 * batch_size * block_size), dtype=np.uint16)
            tokens.tofile(os.path.join(folder, "train.bin"))
        yield os.path.join(data_dir, dataset) if dataset else folder

# -----------------------------------------------------------------------------
# vision


class PlainImages(torch.utils.data.Dataset):
    """One image at a time, as one writes it: to floats, augmentation, normalisation."""

    def __init__(self, x, y, normalize, augment):
        self.x, self.y, self.spec = x, y, AUGMENTATIONS[augment]
        self.mean, self.std = (torch.tensor(s)[:, None, None] for s in STATS[normalize])

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        x, spec = self.x[i].float() / 255, self.spec
        if any(spec.values()):
            u = torch.rand(4)
            dy, dx = (u[1:3] * (2 * spec["padding"] + 1)).long().tolist()
            x = self.augmented(x, u[0] < spec["flip"], dy, dx, math.radians((2 * u[3].item() - 1) * spec["degrees"]))
        return (x - self.mean) / self.std, self.y[i]

    def augmented(self, x, flip, dy, dx, angle):
        x = x.flip(2) if flip else x
        x = F.pad(x, (self.spec["padding"],) * 4)[:, dy:dy + x.size(1), dx:dx + x.size(2)]
        theta = torch.tensor([[[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]]])
        return F.grid_sample(x[None], F.affine_grid(theta, (1, *x.shape), align_corners=False), align_corners=False)[0]


def vision_model(name, shape, plain=False):
    """(the model, its optimizer with the settings of config/), of our loop or of the plain one"""
    torch.manual_seed(seed)
    model = VisionNet(VisionConfig(name, shape, num_classes=10)).to(device)
    model.head.validate = False
    if not plain:
        model.to(memory_format=torch.channels_last)
    decay = 1e-4 if name == "resnet50" else 0.0
    groups, how = ([{"params": list(model.parameters()), "weight_decay": decay}], {}) if plain else (parameter_groups(model, decay), {"fused": True})
    return model, torch.optim.SGD(groups, lr=0.1, momentum=0.9, **how) if name == "resnet50" else torch.optim.Adam(groups, lr=3e-4, **how)


def vision_epoch(model, optimizer, data):
    """() -> the losses of the next epoch of train_vision.py's loop: one wait for the device, at the end"""
    index, scaler = iter(range(2 ** 62)), torch.amp.GradScaler(device, enabled=False) # as for every dtype but float16

    def train():
        kept = []
        for _ in range(data.steps_per_epoch):
            step = next(index)
            x, y = data.train(step)
            torch.manual_seed(hash((seed, step, 0)))
            with autocast():
                loss = model(x, y)[1]
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
            kept.append(torch.stack([loss.detach().float(), norm.float()]))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
        return torch.stack(kept)[:, 0].tolist()
    return train


def plain_epoch(model, optimizer, loader):
    """() -> the losses of an epoch of the loop that one writes"""
    def train():
        losses = []
        for x, y in loader:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            optimizer.zero_grad()
            with autocast():
                loss = F.cross_entropy(model(x)[0], y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses
    return train


def drain(batches):
    for _ in batches(): # each is let go of as the next one comes
        pass


def bench_vision():
    """Medians of an epoch. Ours: images on the device, batches gathered and augmented there, a fused optimizer, one wait for the device. The other:
    a DataLoader with up to 4 workers over single images, loss.item() at each step. The pipeline is the batches alone. Nothing is compiled."""
    torch.backends.cudnn.benchmark, rows = True, [] # of both
    for name, (size, steps) in VISION[device].items():
        shape, normalize, augment = ((3, 32, 32), "cifar10", "standard") if name == "resnet50" else ((1, 28, 28), "half", "none")
        x, y = torch.randint(256, (steps * size, *shape), dtype=torch.uint8), torch.randint(10, (steps * size,))
        data, index = Batches(x, y, size, seed, normalize, augment, device=device), iter(range(2 ** 62))
        loader = torch.utils.data.DataLoader(PlainImages(x, y, normalize, augment), size, shuffle=True, num_workers=min(os.cpu_count(), 4), pin_memory=device == "cuda",
                                             drop_last=True, persistent_workers=True)
        if name == "pipeline":
            runners = {"ours": partial(drain, lambda: (data.train(next(index)) for _ in range(steps))), # noqa: B023 run in this turn of the loop
                       "plain": partial(drain, lambda: ([t.to(device, non_blocking=True) for t in batch] for batch in loader))} # noqa: B023
        else:
            runners = {"ours": vision_epoch(*vision_model(name, shape), data), "plain": plain_epoch(*vision_model(name, shape, plain=True), loader)}
        times, median = race(runners)
        rows.append({"what": name, "images": "{}x{}x{}".format(*shape), "batch": size, "steps": steps, "images/s": steps * size / median["ours"],
                     "batches/s": steps / median["ours"], "DataLoader's images/s": steps * size / median["plain"], "speed / DataLoader's": median["plain"] / median["ours"],
                     "raw": dict(seconds=times["ours"], rival_seconds=times["plain"], workers=loader.num_workers)})
    return rows

# -----------------------------------------------------------------------------
# the command line


def names_of(word):
    return [name.strip() for name in heads.split(",")] if heads else HEADS[word]


def parse_sizes(text):
    try:
        parsed = [tuple(int(s) for s in size.split("x")) for size in text.split(",")]
        if all(len(size) == 3 and min(size) > 0 for size in parsed):
            return parsed
    except ValueError:
        pass
    raise ValueError(f"a size is written NxVxD, such as 512x8192x256, got {text!r}")


def progress(items):
    return tqdm(list(items), desc="measuring", leave=False) # on stderr, with its ETA


def machine():
    return dict(cpu=device_name("cpu"), cores=os.cpu_count(), threads=torch.get_num_threads(), gpu=device_name("cuda") if device == "cuda" else "none",
                torch=torch.__version__, dtype=dtype, compile=compile)


def table(rows):
    """Markdown: a column for each key with something in it, but for what is not a number or a word."""
    keys = [key for key in {key: 0 for row in rows for key in row} if any(isinstance(row.get(key), (int, float, str)) and row[key] != "" for row in rows)]

    def cell(x):
        return "" if x is None else x if isinstance(x, str) else f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"
    return "\n".join(f"| {' | '.join(line)} |" for line in (keys, ["---"] * len(keys), *([cell(row.get(key)) for key in keys] for row in rows)))


def main(argv):
    """Measure, print, write; the rows."""
    global device, dtype
    words = dict(head=bench_head, model=bench_model, step=bench_step, data=bench_data, vision=bench_vision)
    if not {"-h", "--help"} & set(argv) and (not argv or argv[0] not in words):
        raise SystemExit(f"say what to measure, one of {', '.join(words)} (python bench.py head), got {argv[0] if argv else 'nothing'}")
    configure(globals(), argv[argv[0] in words:])
    word = "growth" if growth and argv[0] == "head" else argv[0]
    device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    fail([message for bad, message in (
        (device not in SHAPES or device == "cuda" and not torch.cuda.is_available(), f"device is {device!r}: use auto, cpu, or cuda where there is one"),
        (dtype not in ("auto", "float32", "bfloat16"), f"dtype is {dtype!r}: use auto, float32 or bfloat16"),
        (min(rounds, doublings) < 1, "rounds and doublings must be at least 1"), (n < 0, f"n is {n}: it must be > 0, or 0 for the distance's default"),
        (min(threads, *(globals()[key] for key in SHAPES["cpu"])) < 0, "threads, steps and the model's sizes must be >= 0")) if bad])
    dtype = dtype if dtype != "auto" else "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    globals().update({key: globals()[key] or value for key, value in SHAPES[device].items()})
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.set_float32_matmul_precision("high") # as in training
    try:
        for name in names_of(word): # before anything is measured
            make_case(name, 1, 8, 8)
        bench = bench_growth if word == "growth" else words[word]
        rows, here = bench(), machine()
    except (ValueError, OSError) as e:
        raise SystemExit(str(e)) from None
    print(f"{', '.join(f'{key} {value}' for key, value in here.items())}\n\n{table(rows)}\n\n{' '.join(bench.__doc__.split())}")
    if json:
        with open(json, "w") as f:
            dump(dict(command=" ".join(["python bench.py", *argv]), machine=here, settings={key: globals()[key] for key in globals()["_defaults"]}, rows=rows), f, indent=1)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
