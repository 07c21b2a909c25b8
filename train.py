"""
Pretrain a GPT, BERT or Qwen2 whose output layer is a distance head. Read distances.py, then model.py, then this file from top to bottom.

On a CPU, or one GPU:
$ python train.py config/cpu.py --distance=cosine
On one GPU of 8 to 12 GB:
$ python train.py config/gpu12gb.py --distance=euclidean
BERT by masked tokens, or Qwen2:
$ python train.py config/cpu.py --model=bert --distance=euclidean
$ python train.py config/cpu.py --model=qwen2 --scale=tiny
GPT-2 124M at the paper's settings, on 8 GPUs of one node, or on 2 nodes of 8:
$ torchrun --standalone --nproc_per_node=8 train.py config/gpt2_cosine.py
$ torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=123.456.123.456 --master_port=1234 train.py config/gpt2_cosine.py
Go on with a run that was stopped, with its own settings:
$ python train.py --init_from=resume --out_dir=out/gpt2_cosine

A run writes into out_dir: config.json, metrics.jsonl, emissions.csv, ckpt.pt (last), best.pt, loss.png, summary.json.
"""
import json
import math
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, fields
from datetime import timedelta
from fnmatch import fnmatch

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import run
from configurator import fail
from data import Blocks, load_meta
from distances import DistanceHead, Tiles, parse_head
from emissions import Emissions
from families import FAMILIES
from model_bert import mask_tokens
from model_qwen2 import SCALES

# -----------------------------------------------------------------------------
# defaults: GPT-2 124M with the linear head on OpenWebText; every line can be set in a config file or as --key=value
# I/O
out_dir = "out/gpt2" # the run's folder
overwrite = False # True: start afresh in an out_dir that holds a run already
init_from = "scratch" # 'scratch', 'resume', or a name: 'gpt2', 'gpt2-medium', ..., 'bert-base-uncased', ..., 'Qwen/Qwen2-0.5B', ... (needs transformers)
eval_interval = 1000 # steps between evaluations; each also writes a checkpoint and a row of emissions.csv
eval_iters = 100 # batches of the validation range, the same tokens every time; -1: the whole split
log_interval = 10 # steps between log lines
wandb_log = False # also log to Weights & Biases (rank 0)
wandb_project = "distance-heads"
wandb_run_name = "" # '': the name of out_dir
wandb_mode = "online" # or 'offline', which needs neither key nor network
# data
data_dir = "data" # where datasets lie, a folder each
dataset = "openwebtext"
batch_size = 12 # micro-batch: sequences per forward pass of one rank
block_size = 1024 # tokens per sequence
gradient_accumulation_steps = 40 # micro-batches per step, summed over all ranks
# model
model = "gpt" # 'gpt', 'bert' (masked tokens), or 'qwen2'
scale = "" # qwen2: a shape by name, such as 'tiny' or '0.5B', in place of n_layer, n_head, n_kv_head, n_embd and intermediate_size
vocab_size = 0 # tokens; 0: as many as the data have
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0 # for pretraining 0 is good, for finetuning try 0.1+
bias = False # do we use bias inside LayerNorm and Linear layers?
tie_weights = False # one matrix for token embeddings and prototypes
n_kv_head = 2 # qwen2: heads of keys and values
intermediate_size = 4864 # qwen2: width of the MLP
mlm_probability = 0.15 # bert: share of the tokens of each sequence that are to be predicted
mask_id = -1 # bert: the id of [MASK]; -1: the tokenizer's own, or where it has none the first id beyond the text's
# head, see `python distances.py`
distance = "baseline" # baseline, euclidean, manhattan, chebyshev, minkowski, cosine, hamming, canberra, bray_curtis, mahalanobis, offset_l2
variant = "" # '': the distance's default
distance_params = "" # such as 'p=3'
link = "harmonic" # p proportional to d^-n, or 'softmin': to exp(-n d)
n = 0.0 # the exponent; 0: the distance's default, a multiple of sqrt(n_embd)
learn_n = False # learn log n, from n
eps = 1e-4 # where it enters is part of each distance's formula
feature_scale = 0.0 # hidden states are multiplied by it before the head; 0: the distance's default
# optimizer: AdamW
learning_rate = 6e-4
max_iters = 600000 # steps in all
weight_decay = 1e-1 # of matrices and embeddings; not of norms, biases, and the head's extra parameters
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0 # clip the gradient's norm at this value, 0: never
# schedule
decay_lr = True # False: constant after the warm-up
warmup_iters = 2000
lr_decay_iters = 0 # steps until min_lr; 0: max_iters
min_lr = 6e-5
# energy
country_iso_code = "USA" # whose grid's average g CO2eq per kWh
carbon_intensity = 0.0 # g CO2eq per kWh of your own grid, instead; 0: the country's
track_emissions = True
# system
seed = 1337 # of initial weights, data order and dropout
device = "auto" # 'cuda', 'mps', 'cpu', or the first of these that there is
dtype = "auto" # 'float32', 'bfloat16', or 'float16' (with loss scaling); auto: bfloat16 on a GPU that has it, else float32
compile = True # torch.compile, where there is a compiler: of the model, and of what in the head is not a matrix product
triton = True # elementwise distances on a GPU: the kernels of distances_triton.py, where triton is; False: compiled tiles
# -----------------------------------------------------------------------------
config, sources, saved_config, problems = run.configure(globals()) # every violation goes into one report

# distributed
rank, local_rank, world_size = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
ddp, master = "RANK" in os.environ, rank == 0


def print0(*args):
    if master:
        print(*args, flush=True)


# what cannot run is said now, all of it at once
family = model
if family not in FAMILIES:
    problems.append(f"model is {family!r}: use {', '.join(FAMILIES)}")
Model, Config, names = FAMILIES.get(family, FAMILIES["gpt"])
if scale and (family != "qwen2" or scale not in SCALES):
    problems.append(f"scale is {scale!r}: it is for model=qwen2, and one of {', '.join(SCALES)}")
elif scale: # beats config files, not flags
    chosen = {k: v for k, v in SCALES[scale].items() if sources[k] != "command line"}
    config.update(chosen)
    globals().update(chosen)
device, device_type, dtype = run.choose_device(device, dtype, problems, print0)
for key in ("eval_interval", "log_interval", "batch_size", "block_size", "gradient_accumulation_steps", "n_layer", "n_head", "n_embd"):
    if config[key] < 1:
        problems.append(f"{key} is {config[key]}, it must be at least 1")
if gradient_accumulation_steps % world_size:
    lower = gradient_accumulation_steps // world_size * world_size
    problems.append(f"gradient_accumulation_steps {gradient_accumulation_steps} counts the micro-batches of all ranks and must divide by the {world_size} "
                    f"ranks: try {lower + world_size}" + (f" or {lower}" if lower else ""))
if n_head > 0 and n_embd % n_head:
    problems.append(f"n_embd {n_embd} must be a multiple of n_head {n_head}")
if family == "qwen2" and (n_kv_head < 1 or n_head % n_kv_head):
    problems.append(f"n_head {n_head} must be a multiple of n_kv_head {n_kv_head}")
for key, legal, ok in (("dropout", "in [0, 1)", 0 <= dropout < 1), ("learning_rate", ">= 0", learning_rate >= 0), ("min_lr", ">= 0", min_lr >= 0),
                       ("weight_decay", ">= 0", weight_decay >= 0), ("beta1", "in [0, 1)", 0 <= beta1 < 1), ("beta2", "in [0, 1)", 0 <= beta2 < 1),
                       ("grad_clip", ">= 0", grad_clip >= 0), ("max_iters", ">= 0", max_iters >= 0), ("warmup_iters", ">= 0", warmup_iters >= 0),
                       ("vocab_size", ">= 0", vocab_size >= 0),
                       ("mlm_probability", "in (0, 1)", 0 < mlm_probability < 1), ("mask_id", ">= -1", mask_id >= -1), ("intermediate_size", ">= 1", intermediate_size >= 1),
                       ("out_dir", "the name of a folder", out_dir != ""), ("seed", "in [0, 2^32)", 0 <= seed < 2 ** 32)):
    if not ok:
        problems.append(f"{key} is {config[key]!r}, it must be {legal}")
if eval_iters < 1 and eval_iters != -1:
    problems.append(f"eval_iters is {eval_iters}: use the number of batches, or -1 for the whole validation split")
if n < 0:
    problems.append(f"n is {n}: it must be > 0, or 0 for the distance's default")
pretrained = init_from not in ("scratch", "resume")
if pretrained and not any(fnmatch(init_from, name) for name in names):
    problems.append(f"init_from is {init_from!r}: use scratch, resume or, with model={family}, {', '.join(names)}")
try:
    DistanceHead(8, 8, **parse_head(distance, variant, distance_params), link=link, n=n or 1.0, learn_n=learn_n, eps=eps)
except ValueError as e:
    problems.append(str(e))
try:
    meta = load_meta(os.path.join(data_dir, dataset))
    if 0 < vocab_size < meta["vocab_size"]:
        problems.append(f"vocab_size {vocab_size} is smaller than the {meta['vocab_size']} tokens of the data: use 0 for the data's own")
    if vocab_size > meta["vocab_size"] and init_from == "scratch":
        print0(f"note: {vocab_size - meta['vocab_size']:,} of {vocab_size:,} prototypes belong to tokens that the data do not have (vocab_size=0 leaves them out)")
    vocab_size = vocab_size or meta["vocab_size"]
    if family == "bert" and mask_id == -1 and meta.get("mask_id") is not None: # WordPiece has one
        mask_id = config["mask_id"] = meta["mask_id"]
    if family == "bert" and mask_id >= vocab_size:
        problems.append(f"mask_id {mask_id} is beyond the {vocab_size} tokens: use -1 for an id of its own")
    train_data, val_data = (Blocks(os.path.join(data_dir, dataset), split, block_size, vocab_size, seed) for split in ("train", "val"))
except (ValueError, OSError) as e:
    problems.append(str(e))
fail(problems)

micro_steps = gradient_accumulation_steps // world_size
tokens_per_step = gradient_accumulation_steps * batch_size * block_size
num_val = min(val_data.num_fixed, eval_iters * batch_size) if eval_iters > 0 else val_data.num_fixed # blocks
if ddp:
    if device_type == "cuda":
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(backend="nccl" if device_type == "cuda" else "gloo", timeout=timedelta(minutes=30))
os.makedirs(out_dir, exist_ok=True)
torch.set_float32_matmul_precision("high") # tf32 where the hardware has it
torch.manual_seed(seed)
autocast = nullcontext() if dtype == "float32" else torch.amp.autocast(device_type, getattr(torch, dtype))
scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")

# -----------------------------------------------------------------------------
# model and optimizer

step, best_val_loss, best_step = 0, float("inf"), 0
settings = {f.name: config[f.name] for f in fields(Config) if f.name in config}
shape = ("n_layer", "n_head", "n_kv_head", "n_embd", "intermediate_size", "bias", "tie_weights") # pretrained weights bring their own; one that was asked for must be it
try:
    if pretrained:
        model = Model.from_pretrained(init_from, **{k: v for k, v in settings.items() if k != "vocab_size" and (k not in shape or sources[k] != "default")})
    else:
        model = Model(Config(**{**settings, "vocab_size": vocab_size}))
except (ImportError, ValueError, OSError) as e:
    raise SystemExit(str(e)) from None
if pretrained:
    config.update({k: getattr(model.config, k) for k in (*shape, "vocab_size", "mask_id") if hasattr(model.config, k)})
    if vocab_size > model.config.vocab_size:
        raise SystemExit(f"{init_from} has {model.config.vocab_size} tokens, the data have {vocab_size}: prepare them with its own tokenizer")
if isinstance(model.head.core, Tiles):
    model.head.core.triton = triton
model.head.validate = False # it waits for the device; Blocks checks the ids, and this script stops at a loss that is not finite
model.to(device)
optimizer = torch.optim.AdamW(run.parameter_groups(model, weight_decay), lr=learning_rate, betas=(beta1, beta2), fused=device_type != "mps")
if init_from == "resume":
    ckpt = torch.load(os.path.join(out_dir, "ckpt.pt"), map_location="cpu", weights_only=True)
    other = ckpt["config"].get("model", "gpt")
    fail([f"cannot resume {out_dir}: it holds a {other}, model is {family} here"] if other != family else [])
    differ = [f"{k} is {v!r} here, {ckpt['model_args'].get(k)!r} in the checkpoint" for k, v in asdict(model.config).items() if v != ckpt["model_args"].get(k)]
    if meta.get("hash") != ckpt["data_hash"]:
        differ.append(f"the data are others: hash {meta.get('hash')} here, {ckpt['data_hash']} in the checkpoint")
    fail([f"cannot resume {out_dir}: {d}" for d in differ])
    model.load_state_dict(ckpt["model"])
    run.load_optimizer(optimizer, ckpt["optimizer"], print0, weight_decay, betas=(beta1, beta2))
    scaler.load_state_dict(ckpt["scaler"])
    step, best_val_loss, best_step = ckpt["step"], ckpt["best_val_loss"], ckpt["best_step"]
    del ckpt
resumed_at = step if init_from == "resume" else None
raw_model = model


def read(blocks, *args):
    try:
        return blocks(*args)
    except ValueError as e: # an id that the vocabulary does not have
        raise SystemExit(str(e)) from None


def masked(x, *key):
    """What BERT takes of x (B, T): inputs (B, T), labels (B, k), positions (B, k). A pure function of key."""
    special = meta.get("special_ids", [] if meta["eot"] is None else [meta["eot"]]) # no token for a random one
    return mask_tokens(x, np.random.RandomState(key), raw_model.mask_id, vocab_size, special, mlm_probability)


def to_device(tensors):
    return tuple(t.pin_memory().to(device, non_blocking=True) if device_type == "cuda" else t.to(device) for t in tensors)


def train_batch(index):
    """The index-th micro-batch of this rank, (x, y) of (B, T) each or what BERT takes: a pure function of (seed, index, rank)."""
    i = index * world_size + rank
    x, y = read(train_data.batch, i * batch_size, batch_size)
    return to_device(masked(x, seed, i, 1) if family == "bert" else (x, y))


def val_batch(first, count):
    """Blocks first..first+count-1 of the validation split, for BERT each with masks of its own, the same whatever the seed."""
    x, y = read(val_data.fixed, first, count)
    if family != "bert":
        return to_device((x, y))
    return to_device([torch.cat(parts) for parts in zip(*(masked(x[i:i + 1], 0, first + i, 2) for i in range(count)))])


batch = train_batch(step * micro_steps) # the first one, also to try the compiler with
if compile:
    eager = model.features
    try:
        print0("compiling the model, this takes a minute...")
        model.features = torch.compile(model.features)
        model.head.compile_loss()
        model.head.eval() # in training mode it may update its statistics
        with autocast:
            loss = model(*batch)[1]
        loss.backward()
    except Exception as e:
        print0(f"torch.compile does not work here, going on without it ({type(e).__name__}: {str(e).splitlines()[0][:120] if str(e) else ''})")
        model.features = eager
        model.head.compile_loss(False)
    model.zero_grad(set_to_none=True)
    model.train()
if ddp:
    model = DDP(model, device_ids=[local_rank] if device_type == "cuda" else None)
num_params = sum(p.numel() for p in raw_model.parameters())
if resumed_at is None or master:
    print0(f"{dataset}: {meta.get('train_tokens', 0) or os.path.getsize(train_data.path) // train_data.dtype.itemsize:,} training tokens, "
           f"vocab_size {vocab_size:,} ({meta['source']}); validation on {num_val * block_size:,} tokens")
    print0(f"{Model.__name__}: {num_params / 1e6:.2f}M parameters; head: {raw_model.head.extra_repr()}, features x {raw_model.head.feature_scale:.4g}")
    print0(f"{tokens_per_step:,} tokens per step = {gradient_accumulation_steps} micro-batches x {batch_size} x {block_size}, on {world_size} rank(s), {device_type}, {dtype}")

# -----------------------------------------------------------------------------
# schedule, evaluation, speed


def get_lr(it):
    """Linear warm-up, then cosine decay to min_lr (paper C.2); the first step is not at lr 0."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if not decay_lr:
        return learning_rate
    end = lr_decay_iters or max_iters
    ratio = min(1.0, (it - warmup_iters) / max(1, end - warmup_iters))
    return min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (learning_rate - min_lr)


@torch.no_grad()
def evaluate():
    """Mean -log p in nats over the first num_val blocks of the validation split, every rank taking its share; and on rank 0 the probe: up to
    PROBE_SIZE hidden states (N, D) and their targets (N,), the last token of each block, or BERT's masked positions."""
    raw_model.eval()
    losses, probe = [], []
    for first in range(rank * batch_size, num_val, world_size * batch_size):
        count = min(batch_size, num_val - first)
        x, y, *positions = val_batch(first, count)
        with autocast:
            h = raw_model.features(x, *positions) # (B, T, D)
            losses.append((raw_model.head.loss(h, y), count)) # stays on the device
        seen = slice(None) if family == "bert" else slice(-1, None)
        if first * y[0, seen].numel() < run.PROBE_SIZE: # blocks in their order, whatever the number of ranks
            probe += [(first + i, h[i, seen].clone(), y[i, seen]) for i in range(count)] # not views, which would keep all of h
    total = torch.tensor([(loss.item() * count, count) for loss, count in losses], dtype=torch.float64).reshape(-1, 2).sum(0)
    raw_model.train()
    if ddp:
        total = total.to(device)
        torch.distributed.all_reduce(total)
        parts = [None] * world_size
        torch.distributed.all_gather_object(parts, [(i, h.cpu(), y.cpu()) for i, h, y in probe])
        probe = [(i, h.to(device), y.to(device)) for part in parts for i, h, y in part]
    _, h, y = zip(*sorted(probe, key=lambda block: block[0]))
    return (total[0] / total[1]).item(), torch.cat(h)[:run.PROBE_SIZE], torch.cat(y)[:run.PROBE_SIZE]


# dense bf16 peak by name of GPU; where it is not known no MFU is printed
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "A10G": 70e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12}
device_name = run.device_name(device_type)
peak = next((flops for name, flops in PEAKS.items() if name in device_name), None) if dtype != "float32" else None
# PaLM appendix B: 6 per parameter that multiplies (embeddings do not) + attention. A distance head counts as the linear head it replaces;
# BERT's works on the masked tokens only
c = raw_model.config
embeddings = {id(m.weight) for m in raw_model.modules() if isinstance(m, torch.nn.Embedding)} | {id(raw_model.head.weight)}
flops_per_token = 6 * sum(p.numel() for p in raw_model.parameters() if id(p) not in embeddings) + 12 * c.n_layer * c.n_embd * c.block_size \
    + 6 * raw_model.head.weight.numel() * (mlm_probability if family == "bert" else 1)

# -----------------------------------------------------------------------------
# the run's folder


def exponent():
    return torch.as_tensor(raw_model.head.n).item()


def begin_run():
    run.begin(out_dir, dict(config={**config, "init_from": saved_config["config"]["init_from"] if init_from == "resume" else init_from}, sources=sources,
                            script="train.py", model_args=asdict(raw_model.config), num_params=num_params, n=exponent(),
                            data={k: v for k, v in meta.items() if k not in ("stoi", "itos")}, device=device_type, device_name=device_name, dtype=dtype,
                            world_size=world_size), resumed_at)


def log(row):
    run.log(out_dir, row)
    if wandb_log:
        wandb.log({k: v for k, v in row.items() if k != "kind"}, step=row["step"])


def save(name):
    run.save(os.path.join(out_dir, name), {
        "model": raw_model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "step": step, "best_val_loss": best_val_loss,
        "best_step": best_step, "model_args": asdict(raw_model.config), "config": config, "data_hash": meta.get("hash"), "val_loss": val_loss})


def plot():
    """loss.png: training and validation loss over tokens."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return print0("no loss.png: pip install matplotlib")
    rows, _ = run.read_metrics(out_dir)
    fig, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for kind, key, style in (("train", "loss", dict(color="0.7", lw=1, label="training")), ("eval", "val_loss", dict(color="C0", lw=2, marker="o", ms=4, label="validation"))):
        points = [(r["tokens"], r[key]) for r in rows if r["kind"] == kind]
        ax.plot(*zip(*points), **style)
    ax.annotate(f"{points[-1][1]:.3f}", points[-1], (6, 0), textcoords="offset points", va="center", color="C0", annotation_clip=False)
    ax.axhline(math.log(vocab_size), color="0.5", lw=1, ls=":")
    ax.annotate("uniform guess", (points[-1][0], math.log(vocab_size)), (0, 3), textcoords="offset points", ha="right", color="0.5", fontsize=8)
    ax.set(xlabel="training tokens", ylabel="loss (nats per token)")
    ax.set_title(f"{dataset}, head {raw_model.head.extra_repr()}", fontsize=9)
    ax.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="center right")
    fig.savefig(os.path.join(out_dir, "loss.png"), dpi=150)


def stop_non_finite(at, loss, norm):
    """The numbers one needs to see why, then the end. The weights are those before this step when log_interval is 1."""
    with torch.no_grad(), autocast:
        h, d = raw_model.features(batch[0][:1])[0].float(), ""
        if distance != "baseline":
            try:
                d = f", smallest distance {raw_model.head.distances(h).min().item():.3e}"
            except torch.linalg.LinAlgError: # a mahalanobis matrix that is not finite has no factor
                d = ", no distance can be taken"
    path = os.path.join(out_dir, "ckpt.pt")
    good = path + " (continue with --init_from=resume)" if os.path.exists(path) else "none yet"
    raise SystemExit(f"step {at}: loss {loss}, gradient norm {norm}: not finite. lr {optimizer.param_groups[0]['lr']:.3e}, |h| {h.norm(dim=-1).mean().item():.3e}, "
                     f"|w| {raw_model.head.weight.norm(dim=-1).mean().item():.3e}{d}. last good checkpoint: {good}. "
                     "try a lower learning_rate, a longer warmup_iters, or dtype=float32")

# -----------------------------------------------------------------------------
# training


emissions, cumulative, summary, val_loss = None, {}, {}, None
ended = resumed_at is not None and resumed_at >= max_iters and os.path.exists(os.path.join(out_dir, "summary.json"))
try:
    if master and not ended:
        begin_run()
        if wandb_log:
            import wandb
            wandb.init(project=wandb_project, name=wandb_run_name or os.path.basename(os.path.normpath(out_dir)), config=config, mode=wandb_mode)
    emissions = Emissions(out_dir, country_iso_code, carbon_intensity, track_emissions and local_rank == 0, resume_step=resumed_at,
                          node=int(os.environ.get("GROUP_RANK", 0)))
    raw_model.train()
    pending = [] # (loss, gradient norm) of the steps since the last log line, still on the device
    start = last = time.time()
    first_step = step
    while True:
        if step != resumed_at and step % eval_interval == 0 or step == max_iters and not ended:
            val_loss, *probe = evaluate()
            if not math.isfinite(val_loss): # before it is saved over a good checkpoint
                stop_non_finite(step, f"of the validation split {val_loss}", "not taken")
            cumulative = emissions.read(step, val_loss=val_loss)
            if master:
                if val_loss < best_val_loss:
                    best_val_loss, best_step = val_loss, step
                print0(f"step {step:>{len(str(max_iters))}}/{max_iters} | val loss {val_loss:.4f} | best {best_val_loss:.4f} at step {best_step}"
                       + (f" | {cumulative['energy_kwh_total']:.4g} kWh, {cumulative['emissions_g_total']:.3g} g CO2eq" if cumulative else ""))
                log(dict(kind="eval", step=step, tokens=step * tokens_per_step, val_loss=val_loss, best_val_loss=best_val_loss, n=exponent(),
                         **run.probe(raw_model.head, *probe), **cumulative))
                if step > 0:
                    if best_step == step:
                        save("best.pt")
                    save("ckpt.pt") # last: what it tells is there
            last = time.time() # evaluation is not part of a step's time
        if step >= max_iters:
            break

        lr = get_lr(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss_sum = 0.0
        for micro in range(micro_steps):
            index = step * micro_steps + micro
            torch.manual_seed(hash((seed, index * world_size + rank))) # dropout belongs to the micro-batch: resuming or more ranks change nothing
            if ddp: # the last micro-step synchronises; the flag must be set before the forward pass
                model.require_backward_grad_sync = micro == micro_steps - 1
            with autocast:
                loss = model(*batch)[1] / micro_steps
            batch = train_batch(index + 1) # fetched while the device works on this one
            scaler.scale(loss).backward()
            loss_sum += loss.detach()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
        pending.append(torch.stack([loss_sum.float(), norm.float()]))
        logging = (step + 1) % log_interval == 0 or step + 1 == max_iters or (step + 1) % eval_interval == 0
        if logging: # one wait for the device per log line
            values = torch.stack(pending) # (steps, 2)
            if ddp:
                torch.distributed.all_reduce(values)
                values /= world_size
            for i, (loss_value, norm_value) in enumerate(values.tolist()):
                # with loss scaling an infinite gradient is a step that the scaler skips
                if not math.isfinite(loss_value) or not math.isfinite(norm_value) and not scaler.is_enabled():
                    stop_non_finite(step + 2 - len(pending) + i, loss_value, norm_value)
            num_steps, pending = len(pending), []
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if logging and master:
            now = time.time()
            seconds, last = (now - last) / num_steps, now
            speed = tokens_per_step / seconds
            mfu = flops_per_token * speed / (peak * world_size) if peak else None
            eta = (now - start) / (step - first_step) * (max_iters - step)
            print0(f"step {step:>{len(str(max_iters))}}/{max_iters} | loss {loss_value:.4f} | lr {lr:.2e} | norm {norm_value:6.2f} | {seconds * 1000:7.1f} ms | "
                   f"{speed:>9,.0f} tok/s | " + (f"mfu {mfu:.1%} | " if mfu else "") + f"eta {timedelta(seconds=round(eta))}")
            log(dict(kind="train", step=step, tokens=step * tokens_per_step, loss=loss_value, lr=lr, grad_norm=norm_value, ms=seconds * 1000, tokens_per_s=speed, mfu=mfu))
    if master and val_loss is None:
        print0(f"nothing to do: {out_dir} is at step {step} of {max_iters}")
    elif master:
        run.save_probe(out_dir, *probe)
        peak_memory = torch.cuda.max_memory_allocated() if device_type == "cuda" else None
        summary = dict(step=step, tokens=step * tokens_per_step, val_loss=val_loss, perplexity=math.exp(min(val_loss, 700)),
                       best_val_loss=best_val_loss, best_step=best_step, n=exponent(), num_params=num_params, peak_memory_bytes=peak_memory, **cumulative)
        if meta.get("val_bytes") and family != "bert": # whose loss is that of the masked tokens
            summary["bits_per_byte"] = val_loss / math.log(2) * meta["val_tokens"] / meta["val_bytes"]
        run.write(os.path.join(out_dir, "summary.json"), json.dumps(summary, indent=1))
        plot()
        print0(f"done: validation loss {val_loss:.4f} nats per token, perplexity {summary['perplexity']:.1f}")
        print0(f"energy: {emissions.describe()}")
        print0(f"loss curve: {os.path.join(out_dir, 'loss.png')}")
    if ddp: # no rank leaves while another still works
        torch.distributed.barrier()
except torch.linalg.LinAlgError as e: # a mahalanobis matrix
    stop_non_finite(step + 1, f"none ({e})", "none")
finally:
    if emissions is not None:
        emissions.stop(step)
    if wandb_log and master and "wandb" in globals():
        wandb.finish()
    if ddp and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
