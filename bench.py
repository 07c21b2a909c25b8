"""
Speed and memory. All sides of a comparison run in turn, round by round, so that a busy machine slows them alike.

$ python bench.py head             # loss and gradients of the output layer, against its rivals
$ python bench.py head --heads=cosine,minkowski:p=3 --sizes=512x8192x256 --rounds=9 --json_file=head.json
$ python bench.py head --growth=true   # time and memory over N, V and D: a figure
$ python bench.py model            # forward and backward pass of the whole GPT, by head
$ python bench.py step             # a step of the training script, against nanoGPT's loop
$ python bench.py data             # the fetching of batches, against nanoGPT's
$ python bench.py vision           # a step of the script for images, against a loop over a DataLoader

It prints a table in Markdown; --json_file=path keeps every time that was taken, from the first head on. Sizes are
tokens x prototypes x dimensions. The rivals stand in bench_rivals.py. step and vision time train.py and
train_vision.py themselves, as processes (bench_train.py).
"""
import copy
import json
import math
import os
import statistics
import sys
import time
from functools import partial
from types import SimpleNamespace

os.environ.setdefault("KINETO_LOG_LEVEL", "6") # torch's profiler writes two lines on each use

import torch
from tqdm import tqdm

import bench_rivals
import bench_train
import figures
from bench_rivals import linear, rivals_of, with_gradients
from configurator import configure, fail
from data import Blocks, load_meta
from distances import DistanceHead, parse_head
from model import GPT, GPTConfig, default_scales
from run import device_name
from safe import write

# -----------------------------------------------------------------------------
# defaults
heads = "" # comma separated distance[:variant][:name=value], such as cosine,minkowski:p=3; '': the word's own
json_file = "" # a file for the machine, the settings, the table and every time
rounds = 5 # each side runs once per round
budget_s = 60.0 # a side that has been timed for so long sits the other rounds out
compile = True # torch.compile, as train.py uses it; vision compiles nothing
triton = True # hand-written kernels, where there are a GPU and triton
device = "auto" # 'cuda', 'cpu', or the first of these that there is
dtype = "auto" # 'float32', or autocast to 'bfloat16'; auto: bfloat16 on a GPU that has it, else float32
threads = 0 # of the CPU; 0: torch's default
# head: sizes are NxVxD, comma separated
sizes = "" # '': 512x8192x256,1024x16384x384; on a GPU those of GPT-2, Qwen2, Llama 3 and Gemma 2, see SIZES
slow_s = 10.0 # a rival that would run for longer is timed on a part of the rows and scaled
growth = False # draw time and memory over N, V and D instead
growth_base = "256x4096x128" # and its doublings, one axis at a time
doublings = 4
figure = "assets/bench_growth.png"
# model, step, data: 0 stands for the shape of config/cpu.py with 4096 tokens, or for GPT-2 124M at 16 x 1024 on a GPU
n_layer = 0
n_head = 0
n_embd = 0
block_size = 0
batch_size = 0
vocab_size = 0 # tokens; 0 with a dataset: as many as it has
gradient_accumulation_steps = 0 # micro-batches per step; 0: 1, or 4 on a GPU
steps = 0 # training steps that a turn of `step` times, after as many to warm up; 0: 10, or 20 on a GPU
data_dir = "data"
dataset = "" # a folder in data_dir; '': random tokens, in a temporary one
peak_tflops = 0.0 # of the device at this dtype, for the MFU: 989 for bfloat16 on H100 and H200; 0: no MFU
# -----------------------------------------------------------------------------

FEW_HEADS = ("baseline", "euclidean", "cosine", "manhattan", "minkowski:p=3", "canberra")
HEADS = { # of each word, where `heads` names none
    "head": ("baseline", "euclidean", "cosine", "mahalanobis", "offset_l2", "chebyshev:cosh", "manhattan", "hamming",
             "bray_curtis:abs", "minkowski:p=1.5", "minkowski:p=3", "chebyshev", "canberra", "chebyshev:smooth"),
    "growth": FEW_HEADS,
    "model": FEW_HEADS,
    "step": ("baseline", "cosine"),
    "data": (),
    "vision": (),
}
SIZES = {"cpu": "512x8192x256,1024x16384x384",
         "cuda": "16384x50304x768,16384x151936x896,8192x128256x4096,8192x262144x2304"}
_SAMPLE = 32 # rows whose gradients are compared with float64
SHAPES = {
    "cpu": dict(n_layer=4, n_head=4, n_embd=128, block_size=128, batch_size=16, vocab_size=4096,
                gradient_accumulation_steps=1, steps=10),
    "cuda": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=16, vocab_size=50257,
                 gradient_accumulation_steps=4, steps=20),
}

# -----------------------------------------------------------------------------
# measuring


def seconds_of(f):
    """The seconds that f() takes. Its result is released before anything else allocates."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = f()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del result
    return seconds


def race(runners, warm_up=True, clock=seconds_of):
    """
    Let runners, a dict, run in turn, every other round backwards. clock(runner) runs one and returns its seconds; those
    of the warm-up round do not count. Returns ({name: [seconds, ...]}, {name: median}).
    """
    times = {name: [] for name in runners}
    if warm_up:
        for name in reversed(runners):
            clock(runners[name])
    for i in progress(range(rounds)):
        order = list(runners) if i % 2 == 0 else list(reversed(runners))
        for name in order:
            if not times[name] or sum(times[name]) < budget_s:
                times[name].append(clock(runners[name]))
    return times, {name: statistics.median(seconds) for name, seconds in times.items()}


def peak_bytes(f):
    """
    The peak of what f() allocates, its result included: on a CPU exactly, from every allocation and release that
    torch's allocator reports, on a GPU by torch's own count. Call f once before, or what is made only once (compiled
    code, caches) counts too.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = f()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = f() # noqa: F841 its release would be reported too
    held, peak = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def progress(items):
    return tqdm(list(items), desc="measuring", leave=False) # on stderr, with its ETA


def autocast():
    return bench_rivals.autocast(device, dtype)

# -----------------------------------------------------------------------------
# head


def as_in_training(head):
    """The head, with the switches that train.py sets."""
    head.validate = False
    if hasattr(head.core, "triton"):
        head.core.triton = triton
    if compile:
        head.compile_loss()
    return head


def make_case(text, N, V, D):
    """A head, hidden states h (N, D) at the scale that it is made for, and classes y (N,); h and y are random."""
    torch.manual_seed(bench_train.SEED)
    arguments = parse_head(text)
    n, feature_scale = default_scales(arguments["distance"], arguments["variant"], D)
    head = DistanceHead(D, V, **arguments, n=n).to(device)
    h = torch.randn(N, D, device=device) * feature_scale
    y = torch.randint(V, (N,), device=device)
    return as_in_training(head), h.requires_grad_(), y


def ours(head, h, y):
    return with_gradients(head.loss(h, y), h, *head.parameters())


def in_fp16(head):
    """The same head on the kernels of distances_triton.py that take two coordinates an instruction."""
    head = as_in_training(copy.deepcopy(head))
    head.core.kernel = (*head.core.kernel, "half")
    return head


def all_distances(head, h):
    """The forward pass of the distances alone: all of them are made, a chunk at a time, and none is kept."""
    with torch.no_grad():
        for part in h.split(1024 if device == "cuda" else 128):
            head.distances(part)


def exact_rows(f, head, h, y):
    """The gradient by the first _SAMPLE rows of h of the sum of their losses, by f in float64; None where f is None."""
    if f is None:
        return None
    head, h = copy.deepcopy(head).double(), h.detach()[:_SAMPLE].double().requires_grad_()
    _, (dh, *_) = f(head, h, y[:_SAMPLE])
    return dh * len(h)


def examine(run, exact, peak, peak_rows):
    """
    What a run tells besides its time: the error of its gradient by h relative to the exact rows, and the MB of `peak`,
    its bytes with so many rows, beyond the gradients.
    """
    _, (dh, *others) = run()
    beyond = (peak - peak_rows * dh[0].nbytes - sum(x.nbytes for x in others)) / 1e6
    if exact is None:
        return None, beyond
    exact = exact[:len(dh)]
    error = (len(dh) * dh[:len(exact)].double() - exact).norm() / exact.norm()
    return error.item(), beyond


def one_pass(f, head, h, y):
    """f is `ours` or a rival: loss and gradients, in the dtype of training."""
    with autocast():
        return f(head, h, y)


def prepare(name, f, head, h, y):
    """
    A rival that is ready to race: `run`, which is f on its first `rows` rows, as many as slow_s allows, and
    `peak_bytes`, the peak of `peak_rows` rows.
    """
    def on(rows):
        return partial(one_pass, f, head, h.detach()[:rows].requires_grad_(), y[:rows])

    N, (V, D) = len(h), head.weight.shape
    rows = N
    if name == "broadcast":
        rows = min(N, max(1, 2 ** 27 // (V * D))) # more than 512 MB for each of its temporaries may not fit
    probe = min(rows, max(16, min(N // 16, 256)))
    seconds_per_row = min(seconds_of(on(probe)), seconds_of(on(probe))) / probe
    too_slow = seconds_per_row * N >= 30 * slow_s
    while rows > probe and seconds_per_row * rows > slow_s:
        rows = max(probe, rows // 2)
    # The peak of a part is less than that of all rows, though for chunks only by the gradient of h.
    in_chunks = isinstance(f, partial) and f.keywords["chunk"] is not None
    peak_rows = rows if name == "broadcast" or in_chunks or too_slow else N
    return SimpleNamespace(run=on(rows), rows=rows, peak_bytes=peak_bytes(on(peak_rows)), peak_rows=peak_rows)


def prepare_or_say(name, f, head, h, y):
    """prepare(), or in words why it cannot be: it runs out of memory, or is of others and fails."""
    try:
        return prepare(name, f, head, h, y)
    except Exception as e: # of others' code any
        if isinstance(e, torch.OutOfMemoryError) or "allocate memory" in str(e):
            return "out of memory"
        if name not in bench_rivals.OPTIONAL:
            raise
        first_line, *_ = str(e).splitlines() or [""]
        return f"fails, {type(e).__name__}: {first_line[:100]}"


def head_case(text, N, V, D):
    """The rows of the table for one head at one size: a row for each rival."""
    head, h, y = make_case(text, N, V, D)
    side = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, side, side, device=device, dtype=getattr(torch, dtype))
    runners = {"ours": partial(one_pass, ours, head, h, y), "mm": partial(torch.mm, a, b)}
    if device == "cpu" or not compile: # else it is the same once more
        as_built = as_in_training(copy.deepcopy(head))
        as_built.compile_loss(None) # the head decides for itself
        runners["as built"] = partial(one_pass, ours, as_built, h, y)
    flops = bench_rivals.flops(head, N, V, D)
    if flops is None:
        runners["forward"] = partial(all_distances, head, h)
    for f in runners.values():
        f() # warm-up
    peak = peak_bytes(runners["ours"])
    functions = rivals_of(head, compile)
    if device == "cuda" and triton and getattr(head.core, "kernel", None) == ("l1",):
        packed = in_fp16(head)
        functions["ours, in fp16"] = lambda _, h, y: ours(packed, h, y)
    rivals = {name: prepare_or_say(name, f, head, h, y) for name, f in functions.items()}
    runners |= {name: rival.run for name, rival in rivals.items() if not isinstance(rival, str)}
    times, median = race(runners, warm_up=False)
    seconds = median["ours"]
    floor_s = bench_rivals.floor(head, N, V, D, flops_per_s=2 * side ** 3 / median["mm"])
    exact = exact_rows(bench_rivals.own_distance(head, rows=max(1, 2 ** 27 // (V * D))), head, h, y)
    exact_linear = exact_rows(linear, head, h, y)
    error, beyond = examine(runners["ours"], exact, peak, N)

    rows = []
    for name, rival in rivals.items():
        row = {"size": f"{N}x{V}x{D}", "head": text, "as built, ms": median.get("as built", seconds) * 1e3,
               "ms": seconds * 1e3, "TFLOP/s": None, "forward, ms": None, "T elements/s": None, "error": error,
               "rival": name, "rival's ms": None, "ratio": None, "rival's error": None,
               "MiB": peak / 2 ** 20, "rival's MiB": None, "MiB ratio": None,
               "MB beyond gradients": beyond, "rival's MB": None,
               "floor ms": None, "% of floor": None}
        raw = dict(n=head.n, rival_rows=N, seconds=times["ours"], as_built_seconds=times.get("as built"),
                   forward_seconds=times.get("forward"), rival_seconds=None, mm_seconds=times["mm"],
                   peak_bytes=peak, rival_peak_bytes=None)
        if isinstance(rival, str):
            row["rival"] += f" ({rival})"
        else:
            if rival.rows < N:
                row["rival"] += f" (on {rival.rows} of {N} rows, scaled)"
            if rival.peak_rows < N:
                row["rival"] += ", its MiB those of the part"
            rival_seconds = median[name] * N / rival.rows
            its_exact = exact_linear if name in bench_rivals.LINEAR else exact
            its_error, its_beyond = examine(rival.run, its_exact, rival.peak_bytes, rival.peak_rows)
            row |= {"rival's ms": rival_seconds * 1e3, "ratio": seconds / rival_seconds, "rival's error": its_error,
                    "rival's MiB": rival.peak_bytes / 2 ** 20, "MiB ratio": peak / rival.peak_bytes,
                    "rival's MB": its_beyond}
            raw |= dict(rival_rows=rival.rows, rival_seconds=times[name], rival_peak_bytes=rival.peak_bytes)
        if flops is None:
            row |= {"forward, ms": median["forward"] * 1e3, "T elements/s": N * V * D / median["forward"] / 1e12}
        else:
            row["TFLOP/s"] = flops / seconds / 1e12
        if floor_s is not None:
            row |= {"floor ms": floor_s * 1e3, "% of floor": 100 * floor_s / seconds}
        rows.append({**row, "raw": raw})
    return rows


def bench_head():
    rows = []
    cases = [(name, *size) for size in parse_sizes(sizes or SIZES[device]) for name in names_of("head")]
    for case in progress(cases):
        rows += head_case(*case)
        keep(rows)
    return rows


def bench_growth():
    base = parse_sizes(growth_base)[0]
    grown = {base}
    for axis in range(3):
        for doubling in range(1, doublings + 1):
            size = list(base)
            size[axis] *= 2 ** doubling
            grown.add(tuple(size))
    rows = []
    for size in progress(sorted(grown, key=math.prod)):
        runners = {name: partial(one_pass, ours, *make_case(name, *size)) for name in names_of("growth")}
        runners["linear + CE"] = partial(one_pass, linear, *make_case("baseline", *size))
        times, median = race(runners)
        for name, f in runners.items():
            rows.append({"size": "{}x{}x{}".format(*size), "head": name, "ms": median[name] * 1e3,
                         "MiB": peak_bytes(f) / 2 ** 20, "raw": dict(NVD=size, seconds=times[name])})
    figures.growth(rows, base, figure)
    return rows

# -----------------------------------------------------------------------------
# model and data


def make_model(text):
    torch.manual_seed(bench_train.SEED)
    model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, bias=False, tie_weights=True, distance=text))
    model.to(device)
    as_in_training(model.head)
    if compile:
        model.features = torch.compile(model.features)
    return model


def random_batch():
    return torch.randint(vocab_size, (2, batch_size, block_size), device=device) # x and y, (B, T) each


def forward_backward(model, x, y):
    with autocast():
        _, loss = model(x, y)
    loss.backward()
    model.zero_grad(set_to_none=True)


def bench_model():
    x, y = random_batch()
    names = list(dict.fromkeys(("baseline", *names_of("model"))))
    runners = {}
    for name in names:
        model = make_model(name)
        with torch.no_grad(), autocast():
            h = model.features(x)
        runners[name] = partial(forward_backward, model, x, y)
        runners[f"{name}, head"] = partial(one_pass, ours, model.head, h.requires_grad_(), y)
    times, median = race(runners)
    rows = []
    for name in names:
        seconds, head_seconds = median[name], median[f"{name}, head"]
        rows.append({"head": name, "ms": seconds * 1e3, **bench_train.speed(settings(), name, x.numel(), seconds),
                     "time / baseline": seconds / median["baseline"], "head, % of it": 100 * head_seconds / seconds,
                     "raw": dict(seconds=times[name], head_seconds=times[f"{name}, head"])})
    return rows


def bench_data():
    batches = 20 # of a turn, as one is too short to time
    with bench_train.token_source(settings()) as source:
        folder = os.path.join(source["data_dir"], source["dataset"])
        token_dtype = load_meta(folder)["dtype"]
        blocks = Blocks(folder, "train", block_size, vocab_size, bench_train.SEED)
        first = 0

        def nanogpt():
            for _ in range(batches):
                bench_rivals.get_batch(folder, token_dtype, block_size, batch_size)

        def in_blocks():
            nonlocal first
            for _ in range(batches):
                blocks.batch(first, batch_size)
                first += batch_size

        need = partial(forward_backward, make_model("baseline"), *random_batch())
        times, median = race({"nanoGPT's get_batch": nanogpt, "Blocks.batch": in_blocks, "forward and backward": need})
    rows = []
    for name in times:
        fetches = name != "forward and backward"
        rate = batch_size * block_size / median[name]
        rows.append({"what": name, "tokens/s": rate * batches if fetches else rate,
                     "speed / nanoGPT's": median["nanoGPT's get_batch"] / median[name] if fetches else None,
                     "raw": dict(seconds=times[name])})
    for row in rows:
        row["times the need"] = row["tokens/s"] / rows[-1]["tokens/s"]
    return rows

# -----------------------------------------------------------------------------
# step and vision


def bench_step():
    return bench_train.step(settings(), names_of("step"), race)


def bench_vision():
    return bench_train.vision(settings(), race)

# -----------------------------------------------------------------------------
# the command line


arguments = [] # of the command line, for the file
WORDS = {"head": bench_head, "model": bench_model, "step": bench_step, "data": bench_data, "vision": bench_vision}
NOTES = { # printed below each table
    "head": "Times are medians of a forward and backward pass. Both sides make and hold the gradients of h and of all "
            "parameters. 'As built' is our head without a call of compile_loss, 'ms' after one unless --compile=false, "
            "and a ratio is the latter over the rival's. Forward is the distances alone; elements are tokens x "
            "prototypes x dimensions. An error is that of the gradient by h, on 32 rows, against float64, and that of "
            "a linear rival against its own. 'MB beyond gradients', and the rival's MB, are the peak memory less all "
            "gradients. The floor of matrix products is at the rate of a square torch.mm in the same rounds; that of "
            "elementwise distances, on a GPU only, is a model (lane instructions per clock).",
    "growth": "Times are medians of a forward and backward pass. Time and memory include all gradients.",
    "model": "Times are medians of a forward and backward pass of the whole model. The head's share is that of its "
             "loss and gradients on their own.",
    "step": "Times are medians of a training step: data, forward and backward pass, clipping, AdamW. Each side is a "
            "process: train.py with each head, and nanoGPT's loop over the same model with a linear head. A turn "
            "takes as many steps to warm up as it times.",
    "data": "Times are medians of 20 batches, to a tensor in memory. The need is that of a forward and backward pass "
            "of the model with a linear head.",
    "vision": "Times are medians of a step. Ours is train_vision.py: images on the device, batches gathered and "
              "augmented there, a fused optimizer, one wait for the device per epoch. The other is a loop over a "
              "DataLoader of single images, with up to 4 workers, and loss.item() at each step. Both are processes. "
              "The pipeline is the batches alone, in this process. Nothing is compiled.",
}


def settings():
    return SimpleNamespace(**{key: globals()[key] for key in globals()["_defaults"]}) # which configure() has collected


def names_of(word):
    if not heads:
        return list(HEADS[word])
    return [name.strip() for name in heads.split(",")]


def parse_sizes(text):
    """[(N, V, D), ...] from NxVxD, comma separated. Raises ValueError for anything else."""
    parsed = []
    for size in text.split(","):
        numbers = size.strip().split("x")
        if len(numbers) != 3 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
            raise ValueError(f"a size is written NxVxD, such as 512x8192x256, got {text!r}")
        parsed.append(tuple(int(number) for number in numbers))
    return parsed


def machine():
    return dict(cpu=device_name("cpu"), cores=os.cpu_count(), threads=torch.get_num_threads(),
                gpu=device_name("cuda") if device == "cuda" else "none", torch=torch.__version__, dtype=dtype,
                compile=compile)


def keep(rows):
    """Write what was measured so far into json_file, if there is one."""
    if json_file:
        found = dict(command=" ".join(["python bench.py", *arguments]), machine=machine(), settings=vars(settings()),
                     rows=rows)
        os.makedirs(os.path.dirname(json_file) or ".", exist_ok=True)
        write(json_file, json.dumps(found, indent=1))


def cell(value):
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def table(rows):
    """The rows in Markdown, with a column for each key but `raw` that has a value in some row."""
    keys = []
    for key in dict.fromkeys(key for row in rows for key in row):
        if key != "raw" and any(row.get(key) is not None for row in rows):
            keys.append(key)
    lines = [keys, ["---"] * len(keys)]
    lines += [[cell(row.get(key)) for key in keys] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def resolve():
    """Put what it stands for into each setting that is 'auto' or 0, and refuse what cannot run."""
    global device, dtype, vocab_size
    has_gpu = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if has_gpu else "cpu"
    if dtype == "auto":
        has_bfloat16 = device == "cuda" and has_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if has_bfloat16 else "float32"
    problems = []
    if device not in SHAPES or (device == "cuda" and not has_gpu):
        problems.append(f"device is {device!r}: use auto, cpu, or cuda where there is one")
    if dtype not in ("float32", "bfloat16"):
        problems.append(f"dtype is {dtype!r}: use auto, float32 or bfloat16")
    if min(rounds, doublings) < 1:
        problems.append("rounds and doublings must be at least 1")
    if min(threads, *(globals()[key] for key in SHAPES["cpu"])) < 0:
        problems.append("threads, steps and the model's sizes must be >= 0")
    fail(problems)
    if dataset and vocab_size == 0:
        vocab_size = load_meta(os.path.join(data_dir, dataset))["vocab_size"]
    for key, value in SHAPES[device].items():
        globals()[key] = globals()[key] or value


def main(argv):
    """Measure what the first word of argv says, print the table, and write the file. Returns the rows."""
    word, *flags = argv or ["nothing"]
    arguments[:] = argv
    if "-h" in argv or "--help" in argv:
        flags = argv
    elif word not in WORDS:
        raise SystemExit(f"say what to measure, one of {', '.join(WORDS)} (python bench.py head), got {word}")
    configure(globals(), flags)
    measure = WORDS[word]
    if word == "head" and growth:
        word, measure = "growth", bench_growth
    try:
        resolve()
        torch.set_num_threads(threads or torch.get_num_threads())
        torch.set_float32_matmul_precision("high") # as in training
        for name in names_of(word): # a head that cannot be made is refused before anything is measured
            make_case(name, 1, 8, 8)
        rows = measure()
    except (ValueError, OSError) as e:
        raise SystemExit(str(e)) from None
    here = machine()
    described = ", ".join(f"{key} {value}" for key, value in here.items())
    print(f"{described}\n\n{table(rows)}\n\n{NOTES[word]}")
    missing = bench_rivals.left_out() if word == "head" and device == "cuda" else {}
    if missing:
        print(f"left out, as they are not here: {', '.join(missing)} (pip install {' '.join(missing.values())})")
    keep(rows)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
