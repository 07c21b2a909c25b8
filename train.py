"""
Pretrain a GPT, BERT or Qwen2 whose output layer is a distance head. Read distances.py, then model.py, then this file
from top to bottom; what surrounds the loop is in run.py.

On a CPU, or one GPU:
$ python train.py config/cpu.py --distance=cosine
On one GPU of 8 to 12 GB:
$ python train.py config/gpu12gb.py --distance=euclidean
BERT by masked tokens, or Qwen2:
$ python train.py config/cpu.py --model=bert --distance=euclidean
$ python train.py config/cpu.py --model=qwen2 --scale=tiny
GPT-2 124M at the paper's settings, on 8 GPUs of one node, or on 2 nodes of 8:
$ torchrun --standalone --nproc_per_node=8 train.py config/gpt2_cosine.py
$ torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=123.456.123.456 train.py config/gpt2_cosine.py
A model larger than a GPU's memory, split between the ranks:
$ torchrun --nproc_per_node=8 train.py config/qwen2.py --scale=7B --gradient_accumulation_steps=64 --sharding=fsdp
Go on with a run that was stopped, with its own settings:
$ python train.py --init_from=resume --out_dir=out/gpt2_cosine

A run writes into out_dir: config.json, metrics.jsonl, emissions.csv, ckpt.pt (last), best.pt (once better than at step
0), probe.npz, summary.json, loss.png. With a test split also predictions.npz, the loss of each of its tokens.
"""
import json
import math
import os
import time
from dataclasses import fields
from datetime import timedelta
from fnmatch import fnmatch

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import figures
import probing
import run
import safe
from configurator import fail
from data import Blocks, check_hash, load_meta
from data_shards import identity
from distances import Tiles
from families import FAMILIES
from model_bert import mask_tokens
from model_qwen2 import SCALES
from muon import MuonAdamW
from run import print0

# -----------------------------------------------------------------------------
# defaults: GPT-2 124M with the linear head on OpenWebText; every line can be set in a config file or as --key=value
# I/O
out_dir = "out/gpt2" # the run's folder
overwrite = False # True: start afresh in an out_dir that holds a run already
init_from = "scratch" # or 'resume', or with transformers a name: 'gpt2', 'bert-base-uncased', 'Qwen/Qwen2-0.5B', ...
eval_interval = 1000 # steps between evaluations; each also writes a checkpoint and a row of emissions.csv
eval_iters = 100 # batches of the validation range, the same tokens every time; -1: the whole split
test_fraction = 0.0 # of the validation split: its last blocks, looked at once, with the last weights; 0: no test
log_interval = 10 # steps between log lines
wandb_log = False # also log to Weights & Biases (rank 0)
tracker = "wandb" # or 'trackio', which takes its place and keeps all on this machine
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
scale = "" # qwen2: a shape by name, such as 'tiny' or '0.5B', in place of n_layer, n_head, n_embd and so on
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
# 'baseline' (the linear head), 'euclidean', 'manhattan', 'chebyshev', 'minkowski', 'cosine', 'hamming', 'canberra',
# 'bray_curtis', 'mahalanobis', 'offset_l2'
distance = "baseline"
variant = "" # '': the distance's default
distance_params = "" # such as 'p=3'
link = "harmonic" # p proportional to d^-n; 'softmin': to exp(-n d), 'gaussian': to exp(-n d^2)
n = 0.0 # the exponent; 0: the distance's default, a multiple of sqrt(n_embd), and 1 for the linear head's z = n W h
learn_n = False # learn log n, from n
eps = 1e-4 # where it enters is part of each distance's formula
learn_eps = False # learn log eps, from eps
head_bias = False # a learned offset of each score
learn_scale = False # a learned factor of each class's scores, from 1
softcap = 0.0 # c tanh(z / c) in place of the scores z; 0: z as they are
# in training only, so that what is reported in an evaluation stays -log p
z_loss = 0.0 # that many times log(sum exp z)^2 is added; PaLM has 1e-4
label_smoothing = 0.0 # that share of the target's 1 is spread over all classes
feature_scale = 0.0 # hidden states are multiplied by it before the head; 0: the distance's default
# optimizer
optimizer = "adamw" # or 'muon': Muon for the matrices of the blocks, AdamW for all else, see muon.py
learning_rate = 6e-4
max_iters = 600000 # steps in all
weight_decay = 1e-1 # of matrices and embeddings; not of norms, biases, and the head's extra parameters
decay_head = True # False: the prototypes do not decay either; where they are tied, with them the embeddings
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
time_limit = 0.0 # minutes after which the run saves itself and ends with exit code 124, to be resumed; 0: none
seed = 1337 # of initial weights, data order and dropout
device = "auto" # 'cuda', 'mps', 'cpu', or the first of these that there is
dtype = "auto" # 'float32', 'bfloat16', 'float16' (with loss scaling); auto: bfloat16 where a GPU has it, else float32
threads = 0 # of torch on the CPU, 0: its own choice
sharding = "none" # every rank has the whole model (DDP), or 'fsdp': a share of it, without torch.compile; see fsdp.py
compile = True # torch.compile, where there is a compiler; False: only large losses compile themselves
triton = True # elementwise distances on a GPU: the kernels of distances_triton.py, given triton; False: compiled tiles
# -----------------------------------------------------------------------------
config, sources, saved, problems = run.configure(globals()) # problems: all that cannot run, for one report
rank, local_rank, world_size = run.ranks()
ddp, master = "RANK" in os.environ, rank == 0


# -----------------------------------------------------------------------------
# checks

if scale and (model != "qwen2" or scale not in SCALES):
    problems.append(f"scale is {scale!r}: it is for model=qwen2, and one of {', '.join(SCALES)}")
elif scale: # it beats config files, not flags
    chosen = {key: value for key, value in SCALES[scale].items() if sources[key] != "command line"}
    config.update(chosen)
    globals().update(chosen)
problems += run.check(config, model=FAMILIES, optimizer=("adamw", "muon"), sharding=("none", "fsdp"))
is_sharded = sharding == "fsdp"
if is_sharded: # what this needs of torch takes a second to import
    import fsdp
    problems += fsdp.problems(config)
device, device_type, dtype = run.choose_device(device, dtype, problems) # "auto" no more
family = FAMILIES.get(model, FAMILIES["gpt"])
pretrained = init_from not in ("scratch", "resume")
is_known = os.path.exists(init_from) or any(fnmatch(init_from, name) for name in family.pretrained)
if pretrained and not is_known:
    legal = ", ".join(family.pretrained)
    problems.append(f"init_from is {init_from!r}: use scratch, resume, a folder of transformers' weights that exists, "
                    f"or, with model={model}, {legal}")
if saved and saved["config"].get("model", "gpt") != model:
    problems.append(f"cannot resume {out_dir}: it holds a {saved['config'].get('model', 'gpt')}, model is {model} here")
if saved and saved["config"].get("optimizer", "adamw") != optimizer: # which older runs do not have
    problems.append(f"cannot resume {out_dir}: its optimizer is {saved['config'].get('optimizer', 'adamw')}, "
                    f"here it is {optimizer}")
if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
    problems.append(f"optimizer is 'muon', which torch has from 2.9 on, here it is {torch.__version__}: use adamw")
if saved and saved["config"].get("sharding", "none") != sharding:
    problems.append(f"cannot resume {out_dir}: it has sharding={saved['config'].get('sharding', 'none')}, "
                    f"here it is {sharding}")
if saved and saved["config"].get("test_fraction", 0.0) != test_fraction: # it has validated on what would be tested
    problems.append(f"cannot resume {out_dir}: its test_fraction is {saved['config'].get('test_fraction', 0.0)}, "
                    f"here it is {test_fraction}")
if gradient_accumulation_steps % world_size:
    lower = gradient_accumulation_steps // world_size * world_size
    nearest = f"{lower + world_size} or {lower}" if lower > 0 else world_size
    problems.append(f"gradient_accumulation_steps {gradient_accumulation_steps} counts the micro-batches of all ranks "
                    f"and must divide by the {world_size} ranks: try {nearest}")
if n_head > 0 and n_embd % n_head:
    problems.append(f"n_embd {n_embd} must be a multiple of n_head {n_head}")
if model == "qwen2" and (n_kv_head < 1 or n_head % n_kv_head):
    problems.append(f"n_head {n_head} must be a multiple of n_kv_head {n_kv_head}")
try:
    data_folder = os.path.join(data_dir, dataset)
    meta = load_meta(data_folder)
    unused = vocab_size - meta["vocab_size"]
    if vocab_size > 0 and unused < 0:
        problems.append(f"vocab_size {vocab_size} is smaller than the {meta['vocab_size']} tokens of the data: "
                        "use 0 for the data's own")
    if unused > 0 and init_from == "scratch":
        print0(f"note: {unused:,} of {vocab_size:,} prototypes belong to tokens that the data do not have "
               "(vocab_size=0 leaves them out)")
    vocab_size = vocab_size or meta["vocab_size"]
    if model == "bert" and mask_id == -1 and meta.get("mask_id") is not None: # WordPiece has one
        mask_id = config["mask_id"] = meta["mask_id"]
    if model == "bert" and mask_id >= vocab_size:
        problems.append(f"mask_id {mask_id} is beyond the {vocab_size} tokens: use -1 for an id of its own")
    if block_size > 0:
        train_data = Blocks(data_folder, "train", block_size, vocab_size, seed)
        val_data = Blocks(data_folder, "val", block_size, vocab_size, seed)
        check_hash(data_folder, meta)
        data_hash = identity(meta, train_data.stream, val_data.stream)
        num_test = math.ceil(min(max(test_fraction, 0), 1) * val_data.num_fixed) # blocks, the last ones
        num_val = val_data.num_fixed - num_test # of an evaluation
        if num_val < 1:
            problems.append(f"test_fraction {test_fraction} of the {val_data.num_fixed} blocks of the validation split "
                            f"is {num_test}, which leaves none for validation: use less, or a smaller block_size")
except (ValueError, OSError) as e:
    problems.append(str(e))
fail(problems)

micro_steps = gradient_accumulation_steps // world_size # on this rank
tokens_per_step = gradient_accumulation_steps * batch_size * block_size
if eval_iters > 0:
    num_val = min(num_val, eval_iters * batch_size)
halt = run.guard(config) # out_dir is this run's own; a signal or time_limit ends it after a whole step
if ddp:
    device = run.start_ddp(device_type)
if threads:
    torch.set_num_threads(threads)
autocast, scaler = run.precision(device_type, dtype)


# -----------------------------------------------------------------------------
# model and optimizer

torch.manual_seed(seed)
arguments = {f.name: config[f.name] for f in fields(family.Config) if f.name in config}
shape = ("n_layer", "n_head", "n_kv_head", "n_embd", "intermediate_size", "bias", "tie_weights")
try:
    if pretrained: # the weights bring their vocabulary and shape; a shape that is asked for must be theirs
        theirs = {"vocab_size", *(key for key in shape if sources[key] == "default")}
        asked = {key: value for key, value in arguments.items() if key not in theirs}
        raw_model = family.Model.from_pretrained(init_from, **asked)
        for key in (*shape, "vocab_size", "mask_id"):
            config[key] = getattr(raw_model.config, key, config[key])
        if vocab_size > raw_model.config.vocab_size:
            raise ValueError(f"{init_from} has {raw_model.config.vocab_size} tokens, the data have {vocab_size}: "
                             "prepare them with its own tokenizer")
    else:
        raw_model = family.Model(family.Config(**{**arguments, "vocab_size": vocab_size}))
except (ImportError, ValueError, OSError) as e:
    raise SystemExit(str(e)) from None
if isinstance(raw_model.head.core, Tiles):
    raw_model.head.core.triton = triton
# to validate waits for the device; Blocks checks the ids, and the run stops at a loss that is not finite
raw_model.head.validate = False
try:
    if is_sharded:
        fsdp.shard(raw_model, device, dtype)
except ValueError as e:
    raise SystemExit(str(e)) from None
raw_model.to(device)
groups = run.parameter_groups(raw_model, weight_decay, decay_head)
adam = dict(lr=learning_rate, betas=(beta1, beta2), fused=device_type != "mps")
opt = MuonAdamW(raw_model, groups, **adam) if optimizer == "muon" else torch.optim.AdamW(groups, **adam)

step, best_val_loss, best_step, resumed_at, evaluated_at = 0, float("inf"), 0, None, None
if init_from == "resume":
    ckpt = run.load_checkpoint(out_dir, raw_model, config, data_hash)
    if is_sharded:
        fsdp.load(out_dir, ckpt, raw_model, opt)
    run.load_optimizer(opt, ckpt["optimizer"])
    scaler.load_state_dict(ckpt["scaler"])
    step, best_val_loss, best_step = ckpt["step"], ckpt["best_val_loss"], ckpt["best_step"]
    val_loss, evaluated_at = ckpt["val_loss"], ckpt.get("evaluated_at", step) # which older checkpoints do not have
    resumed_at = step
    del ckpt
    has_ended = os.path.exists(os.path.join(out_dir, "summary.json"))
    if step > max_iters or (step == max_iters and has_ended):
        print0(f"nothing to do: {out_dir} is at step {step} of {max_iters}")
        raise SystemExit


# -----------------------------------------------------------------------------
# batches

def read(blocks, first, count):
    try:
        return blocks(first, count)
    except (ValueError, OSError) as e: # an id that the vocabulary does not have, a file that is gone
        raise SystemExit(str(e)) from None


def masked(x, *key):
    """BERT's batch of x (B, T): inputs (B, T), labels (B, k), positions (B, k). A pure function of x and key."""
    ends = [] if meta["eot"] is None else [meta["eot"]]
    special = meta.get("special_ids", ends) # they are never drawn as random tokens
    rng = np.random.RandomState(key)
    return mask_tokens(x, rng, raw_model.mask_id, vocab_size, special, mlm_probability)


def to_device(tensors):
    if device_type == "cuda": # pinned, they are copied while the device works
        return tuple(t.pin_memory().to(device, non_blocking=True) for t in tensors)
    return tuple(t.to(device) for t in tensors)


def train_batch(index):
    """The index-th micro-batch of this rank, x and y (B, T) or BERT's: a pure function of (seed, index, rank)."""
    i = index * world_size + rank # among those of all ranks
    x, y = read(train_data.batch, i * batch_size, batch_size)
    return to_device(masked(x, seed, i, 1) if model == "bert" else (x, y))


def val_batch(first, count, data=val_data, key=2):
    """
    Blocks first..first+count-1 of a split in the order of the text, by default of the validation split; BERT's have
    masks of their own, whatever the seed.
    """
    x, y = read(data.fixed, first, count)
    if model != "bert":
        return to_device((x, y))
    blocks = [masked(x[i:i + 1], 0, first + i, key) for i in range(count)]
    return to_device([torch.cat(parts) for parts in zip(*blocks)])


batch = train_batch(step * micro_steps) # the first one, also to try the compiler with
if compile and not is_sharded:
    run.try_compile(raw_model, batch, autocast)
ddp_model = raw_model
if ddp and not is_sharded:
    ddp_model = DDP(raw_model, device_ids=[local_rank] if device_type == "cuda" else None)


# -----------------------------------------------------------------------------
# evaluation, learning rate, checkpoints

@torch.no_grad()
def forwards(start, stop, reduction="mean", **which):
    """
    Forward passes over the blocks start..stop-1 of the validation split, or `which` val_batch is to take, of which
    every rank takes its share. Yields for each batch its first block, the hidden states h (B, T, D), their targets y
    (B, T), the head's loss, and its predictions (B, T); with reduction=None the head is not asked, and these are None.
    """
    raw_model.eval()
    loss = predicted = None
    for of_all in range(start, stop, world_size * batch_size):
        first = of_all + rank * batch_size
        count = min(batch_size, stop - first)
        is_idle = count < 1
        if is_idle and not is_sharded:
            break
        x, y, *positions = val_batch(0, 1) if is_idle else val_batch(first, count, **which)
        with run.forward_pass(autocast, stop_non_finite):
            h = raw_model.features(x, *positions) # (B, T, D)
            if reduction:
                loss, measures = raw_model.head.loss(h, y, reduction=reduction, measures=True)
                predicted = measures.predicted
        if not is_idle: # sharded ranks need each other's forward passes, nobody needs this one's loss
            yield first, h, y, loss, predicted
    raw_model.train()


def evaluate():
    """
    The validation loss, the mean of -log p in nats over the first num_val blocks; the accuracy; and the probe, up to
    PROBE_SIZE hidden states h (N, D) with their targets y (N,): the last token of each block, or BERT's masked ones.
    """
    losses, right, probe = [], [], []
    for first, h, y, loss, predicted in forwards(0, num_val):
        losses.append((first, len(y), loss)) # on the device: no batch waits for it
        right.append((first, len(y), (predicted == y).float().mean()))
        if model != "bert":
            h, y = h[:, -1:], y[:, -1:]
        if first * y.size(1) < probing.PROBE_SIZE:
            probe.append((first, h.flatten(0, 1).clone(), y.flatten())) # a clone, as a view would keep all of h
    probe = run.gather([(first, h.cpu(), y.cpu()) for first, h, y in probe])
    h = torch.cat([h for _, h, _ in probe])[:probing.PROBE_SIZE].to(device)
    y = torch.cat([y for _, _, y in probe])[:probing.PROBE_SIZE].to(device)
    return run.mean_of(losses), run.mean_of(right), h, y


def probed_positions():
    """
    Forward passes over the blocks of the probe: for each its first block, and where (B, k) the probe looks. The head is
    not asked: of_layers runs them eagerly, where an elementwise head is slow.
    """
    for first, _, y, *_ in forwards(0, min(num_val, probing.PROBE_SIZE), reduction=None):
        yield first, val_batch(first, len(y))[2] if model == "bert" else torch.full_like(y[:, :1], -1)


def test():
    """-log p (N,) in float32 of every token of the last num_test blocks, in their order; BERT's of the masked ones."""
    parts = []
    for first, _, _, nll, _ in forwards(val_data.num_fixed - num_test, val_data.num_fixed, reduction="none"):
        parts.append((first, nll.float().flatten().cpu()))
    return torch.cat([nll for _, nll in run.gather(parts)])


def get_lr(step):
    """Linear warm-up, then cosine decay to min_lr (paper C.2); the first step is not at lr 0."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if not decay_lr:
        return learning_rate
    end = lr_decay_iters or max_iters
    ratio = min(1.0, (step - warmup_iters) / max(1, end - warmup_iters))
    return min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (learning_rate - min_lr)


def clip_gradients(max_norm):
    """Shrink the gradients to max_norm, and return their norm before. All ranks call it."""
    if is_sharded:
        return fsdp.clip_gradients(raw_model, max_norm)
    return torch.nn.utils.clip_grad_norm_(raw_model.parameters(), max_norm)


def save(*names):
    """Write these checkpoints. All ranks call it."""
    state = {
        "scaler": scaler.state_dict(), "step": step, "val_loss": val_loss, "best_val_loss": best_val_loss,
        "best_step": best_step, "evaluated_at": evaluated_at, "model_args": about["model_args"], "config": config,
        "data_hash": data_hash,
    }
    if is_sharded:
        fsdp.save(out_dir, names, state, raw_model, opt)
    elif master:
        state.update(model=raw_model.state_dict(), optimizer=opt.state_dict())
        for name in names:
            safe.save(os.path.join(out_dir, name), state, keep=name == "ckpt.pt")


def stop_non_finite(loss, norm, at=None):
    """End the run at a step, by default the one that is made. The weights are those before it if log_interval is 1."""
    at = step + 1 if at is None else at
    h = None
    if not is_sharded:
        with torch.no_grad(), autocast:
            h = raw_model.features(batch[0][:1])[0].float() # (T, D)
    advice = "a lower learning_rate, a longer warmup_iters, or dtype=float32"
    run.stop_non_finite(out_dir, raw_model.head, opt, at, loss, norm, advice, h)


# -----------------------------------------------------------------------------
# what is said before the first step, and the run's folder

about = run.describe(raw_model, device_type, dtype)
print0(f"{dataset}: {train_data.num_tokens:,} training tokens, vocab_size {vocab_size:,} ({meta['source']}); "
       f"validation on {num_val * block_size:,} tokens, test on {num_test * block_size:,}")
print0(f"{family.Model.__name__}: {about['num_params'] / 1e6:.2f}M parameters; "
       f"head: {about['head']}, features x {raw_model.head.feature_scale:.4g}")
if optimizer == "muon":
    of_muon = opt.param_groups[0]["params"]
    print0(f"Muon: {len(of_muon)} matrices, {sum(p.numel() for p in of_muon) / 1e6:.2f}M parameters; AdamW: the others")
print0(f"{tokens_per_step:,} tokens per step = {gradient_accumulation_steps} micro-batches x {batch_size} x "
       f"{block_size}, on {world_size} rank(s), {device_type}, {dtype}")

cpu_seconds = run.cpu_seconds(out_dir, resumed_at) # of training
if master:
    data = {key: value for key, value in meta.items() if key not in ("stoi", "itos")}
    run.begin(out_dir, dict(about, script="train.py", config=config, sources=sources, data=data), resumed_at)
wandb_run = run.start_wandb(config)
emissions = run.start_emissions(config, resumed_at, lambda: step)
flops_per_token = run.flops_per_token(raw_model, mlm_probability if model == "bert" else 1)
peak_flops = run.peak_flops(about["device_name"], dtype)


# -----------------------------------------------------------------------------
# training

raw_model.train()
pending = [] # (loss, gradient norm) of the steps since the last log line, still on the device
first_step, width = step, len(str(max_iters))
start, t0, cpu0 = time.time(), time.time(), time.process_time()
while True:

    # once in a while: validate, log, save. A run that is resumed may have done so at its first step
    is_new = step != evaluated_at
    if (step % eval_interval == 0 and is_new) or step == max_iters:
        val_loss, val_accuracy, *probe = evaluate()
        if not math.isfinite(val_loss): # before it is saved over a good checkpoint
            stop_non_finite(f"of the validation split {val_loss}", "not taken", at=step)
        if val_loss < best_val_loss:
            best_val_loss, best_step = val_loss, step
        evaluated_at = step
        energy = emissions.read(step, val_loss=val_loss)
        if master:
            print0(f"step {step:>{width}}/{max_iters} | val loss {val_loss:.4f} | "
                   f"best {best_val_loss:.4f} at step {best_step}{run.energy_text(energy)}")
        probed = probing.probe(raw_model.head, *probe) if is_new and (master or is_sharded) else {}
        if master and is_new:
            run.log(out_dir, dict(
                kind="eval", step=step, tokens=step * tokens_per_step, val_loss=val_loss, best_val_loss=best_val_loss,
                val_accuracy=val_accuracy, n=run.exponent(raw_model.head), cpu_seconds=cpu_seconds,
                **probed, **energy), wandb_run)
        if is_new and step > 0: # ckpt.pt last, so that the best.pt it tells of is there
            save(*["best.pt"] * (step == best_step), "ckpt.pt")
        t0, cpu0 = time.time(), time.process_time() # evaluation is not part of a step's time
    if step == max_iters:
        break

    # one step: the gradients of this rank's micro-batches
    lr = get_lr(step)
    for group in opt.param_groups:
        group["lr"] = lr
    loss_sum = 0.0
    for micro_step in range(micro_steps):
        index = step * micro_steps + micro_step
        # dropout belongs to the micro-batch: resuming or more ranks change nothing
        torch.manual_seed(hash((seed, index * world_size + rank)))
        if ddp and not is_sharded: # the last micro-step synchronises; the flag must be set before the forward pass
            ddp_model.require_backward_grad_sync = micro_step == micro_steps - 1
        with run.forward_pass(autocast, stop_non_finite):
            loss = ddp_model(*batch)[1] / micro_steps
        batch = train_batch(index + 1) # fetched while the device works on this one
        scaler.scale(loss).backward()
        loss_sum += loss.detach()
    scaler.unscale_(opt)
    norm = clip_gradients(grad_clip or math.inf)
    pending.append(torch.stack([loss_sum.float(), norm.float()]))

    # for a log line the numbers are read, one wait for the device, and have to be finite before the weights move
    is_last = halt.asked() # all ranks have the same answer
    is_logged = is_last or (step + 1) % log_interval == 0 or (step + 1) % eval_interval == 0 or step + 1 == max_iters
    if is_logged:
        values = run.read_pending(pending, step + 1, scaler, stop_non_finite) # (steps, 2)
    scaler.step(opt)
    scaler.update()
    opt.zero_grad(set_to_none=True)
    step += 1

    if is_logged:
        last_loss, last_norm = values[-1].tolist()
        t1, cpu1 = time.time(), time.process_time()
        seconds = (t1 - t0) / len(values) # per step
        cpu_seconds += cpu1 - cpu0
        t0, cpu0, pending = t1, cpu1, []
        tokens_per_s = tokens_per_step / seconds
        mfu = flops_per_token * tokens_per_s / (peak_flops * world_size) if peak_flops else None
        mfu_text = f"mfu {mfu:.1%} | " if mfu else ""
        eta = timedelta(seconds=round((t1 - start) / (step - first_step) * (max_iters - step)))
        print0(f"step {step:>{width}}/{max_iters} | loss {last_loss:.4f} | lr {lr:.2e} | norm {last_norm:6.2f} | "
               f"{seconds * 1000:7.1f} ms | {tokens_per_s:>9,.0f} tok/s | {mfu_text}eta {eta}")
        if master:
            run.log(out_dir, dict(
                kind="train", step=step, tokens=step * tokens_per_step, loss=last_loss, lr=lr, grad_norm=last_norm,
                ms=seconds * 1000, tokens_per_s=tokens_per_s, mfu=mfu, cpu_seconds=cpu_seconds), wandb_run)
        emissions.note(step)
    if is_last:
        save("ckpt.pt")
        halt.end(step, out_dir)


# -----------------------------------------------------------------------------
# the end result

tested = test() if num_test else None
of_layers = probing.of_layers(raw_model.transformer.h, probed_positions())
passes = forwards(0, min(num_val, train_data.num_fixed), data=train_data, key=3) # the estimator of the validation loss
train_loss = run.mean_of([(first, len(y), loss) for first, _, y, loss, _ in passes])
if master:
    run.save_probe(out_dir, *probe, **{key: np.array(values, np.float64) for key, values in of_layers.items()})
    summary = dict(
        step=step, tokens=step * tokens_per_step, val_loss=val_loss, perplexity=math.exp(min(val_loss, 700)),
        best_val_loss=best_val_loss, best_step=best_step, best_share=best_step / step if step else None,
        train_loss=train_loss, val_accuracy=val_accuracy, n=run.exponent(raw_model.head),
        num_params=about["num_params"], peak_memory_bytes=run.peak_memory(device_type), cpu_seconds=cpu_seconds,
        **energy, **of_layers)
    if meta.get("val_bytes") and model != "bert": # whose loss is that of the masked tokens
        summary["bits_per_byte"] = val_loss / math.log(2) * meta["val_tokens"] / meta["val_bytes"]
    if num_test:
        run.save_arrays(out_dir, "predictions.npz", nll=tested.numpy())
        summary["test_loss"] = tested.double().mean().item()
        print0(f"test loss {summary['test_loss']:.4f} nats per token")
    safe.write(os.path.join(out_dir, "summary.json"), json.dumps(summary, indent=1))
    print0(f"done: validation loss {val_loss:.4f} nats per token, perplexity {summary['perplexity']:.1f}")
    print0(f"energy: {emissions.describe()}")
    try:
        print0(f"loss curve: {figures.loss(out_dir)}")
    except (ImportError, OSError, ValueError) as e: # matplotlib, the disk, a damaged file
        print0(f"no loss.png: {e}")
if ddp: # no rank leaves while another still works
    torch.distributed.barrier()
run.closing.close()
