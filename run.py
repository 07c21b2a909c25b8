"""
Everything around a training loop: settings and their checks, device and ranks, the stop at a loss that is not finite,
and the run's folder, which study.py, figures.py and report.py read:

  config.json        every setting and where it came from, git commit, versions, device, the data's hash
  metrics.jsonl      a line per log line (kind "train") and per evaluation (kind "eval")
  emissions.csv      a row per evaluation, see emissions.py
  ckpt.pt, best.pt   the last and the best weights: plain values, torch.load(weights_only=True)
  probe.npz          hidden states of a fixed batch at the end, h (N, D), and their classes y (N,); after training on
                     images also class_means (K, D), of all test images; of a language model of L blocks
                     layer_pc2_ev (L,) and layer_pca90 (L,), see probing.of_layers
  predictions.npz    the loss nll (N,) of each test example at the end, where there is a test; images also have their
                     class y (N,) and the predicted one
  summary.json       the end result; a run without it has not ended
  *.png              pictures of all this, see figures.py
  ckpt_before.pt     the checkpoint before the last one, for the case that that is damaged
  shards_*           what ckpt.pt leaves to the ranks of a sharded run, see fsdp.py
  lock               which process writes here, see safe.py; empty where none does
"""
import atexit
import contextlib
import importlib
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from datetime import timedelta
from operator import itemgetter

import numpy as np
import torch

import configurator
import safe
from configurator import fail
from data import replacing
from distances import DistanceHead, parse_head
from emissions import Emissions, grid_factor
from safe import print0, ranks, read_metrics

# All that a run opens (the energy tracker, wandb, the process group) is closed here, the last one first: by the script
# at its end, or however else its process ends. Whoever runs a script inside another process closes it after the script.
closing = contextlib.ExitStack()
atexit.register(closing.close)


# -----------------------------------------------------------------------------
# settings

def configure(namespace):
    """
    Resolve the settings of a training script, whose globals() are the namespace, as configurator.configure does. With
    init_from=resume the run's own settings come before config files and flags.

    Returns (config, sources, saved, problems). saved is the config.json of the run that is resumed, or None; the caller
    adds to problems what else cannot run, and calls fail(problems). Raises SystemExit where there is no run to resume.
    """
    problems = []
    config, sources = configurator.configure(namespace, problems=problems)
    out_dir = config["out_dir"]
    has_checkpoint = os.path.exists(os.path.join(out_dir, "ckpt.pt"))
    if config["init_from"] != "resume":
        if has_checkpoint and not config["overwrite"]:
            problems.append(f"{out_dir} holds a run: go on with it (--init_from=resume), "
                            "write elsewhere (--out_dir=...), or discard it (--overwrite=true)")
        return config, sources, None, problems

    path = os.path.join(out_dir, "config.json")
    if not has_checkpoint or not os.path.exists(path):
        fail([*problems, f"init_from=resume: {out_dir} holds no ckpt.pt with a config.json, "
                         "name the run's folder with --out_dir"])
    try:
        with open(path, encoding="utf-8") as f:
            saved = json.load(f)
        saved["config"].items(), saved["sources"].items()
    except Exception as e: # a damaged file can raise anything
        fail([f"init_from=resume: {path} is damaged ({type(e).__name__}: {e}); ckpt.pt holds the settings as well, "
              f"torch.load({os.path.join(out_dir, 'ckpt.pt')!r})['config']"])
    script, here = saved.get("script", "train.py"), os.path.basename(namespace["__file__"])
    if script != here:
        fail([f"init_from=resume: {out_dir} holds a run of {script}, this is {here}"])
    problems = [] # the second call finds those of the first again
    base = {**saved["config"], "init_from": "resume"}
    config, sources = configurator.configure(namespace, base=base, base_name=path, problems=problems)
    for key, source in sources.items():
        if source == path: # where the run itself had it from
            sources[key] = saved["sources"].get(key, source)
    return config, sources, saved, problems


# the settings that have a range: their names, the range in words, and as a test, in which nan lies nowhere. Counts have
# an upper end, beyond which no time is told in days and no memory holds a shape
RANGES = (
    ("eval_interval log_interval batch_size block_size gradient_accumulation_steps", "in [1, 10^9]",
     lambda x: 1 <= x <= 1e9),
    ("n_embd intermediate_size lr_step embedding_size", "in [1, 10^9]", lambda x: 1 <= x <= 1e9),
    ("n_layer n_head", "in [1, 10,000]", lambda x: 1 <= x <= 1e4),
    ("max_iters warmup_iters lr_decay_iters epochs patience vocab_size train_images test_images",
     "in [0, 10^9]", lambda x: 0 <= x <= 1e9),
    ("image_size held_out classes_per_batch", "in [0, 10,000]", lambda x: 0 <= x <= 1e4),
    ("learning_rate min_lr weight_decay grad_clip feature_scale time_limit pos_margin neg_margin triplet_margin "
     "arcface_margin ccl_margin ccl_weight", ">= 0 and finite", lambda x: 0 <= x < math.inf),
    ("infonce_temperature scl_temperature arcface_scale ccl_scale", "> 0 and finite", lambda x: 0 < x < math.inf),
    ("min_improvement", "in [0, 100)", lambda x: 0 <= x < 100),
    ("dropout beta1 beta2 momentum active_fraction test_fraction", "in [0, 1)", lambda x: 0 <= x < 1),
    ("val_fraction mlm_probability", "in (0, 1)", lambda x: 0 < x < 1),
    ("n", "> 0 and finite, or for a language model 0, the distance's default", lambda x: 0 <= x < math.inf),
    ("lr_gamma", "in (0, 10,000]", lambda x: 0 < x <= 1e4),
    ("mask_id", ">= -1", lambda x: x >= -1),
    ("channels", "0 or 3", lambda x: x in (0, 3)),
    ("threads", "in [0, 1,000]", lambda x: 0 <= x <= 1000),
    ("eval_iters", "the number of batches, or -1 for the whole validation split", lambda x: x >= 1 or x == -1),
    ("seed", "in [0, 2^32)", lambda x: 0 <= x < 2 ** 32),
    ("out_dir", "the name of a folder", lambda x: x != "" and "\0" not in x),
)


def check(config, **choices):
    """
    A list with a message for each setting that no run can have: one out of its range, a head that does not exist, a
    country whose grid is not known. choices: the legal values of settings that are words, as optimizer=("adam", "sgd").
    """
    problems = []
    for names, legal, test in RANGES:
        for key in names.split():
            if key in config and not test(config[key]):
                problems.append(f"{key} is {config[key]!r}, it must be {legal}")
    choices.update(tracker=("wandb", "trackio"), wandb_mode=("online", "offline", "disabled"))
    for key, legal in choices.items():
        if config[key] not in legal:
            problems.append(f"{key} is {config[key]!r}: use {', '.join(legal)}")
    n = config["n"] if config["n"] > 0 else 1.0
    try:
        arguments = parse_head(config["distance"], config["variant"], config["distance_params"])
        DistanceHead(8, 8, **arguments, link=config["link"], n=n, learn_n=config["learn_n"], eps=config["eps"])
    except ValueError as e:
        problems.append(str(e))
    _, local_rank, _ = ranks()
    if config["track_emissions"] and local_rank == 0:
        try:
            grid_factor(config["country_iso_code"], config["carbon_intensity"])
        except ValueError as e:
            problems.append(str(e))
        except ImportError: # Emissions says so
            pass
    return problems


# -----------------------------------------------------------------------------
# device and ranks

def choose_device(device, dtype, problems):
    """Resolve "auto": (device, its type, dtype by name). What cannot be is added to the list `problems`."""
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        device = "cpu"
        if has_mps:
            device = "mps"
        if has_cuda:
            device = "cuda"
    device_type = device.split(":")[0]
    usable = {"cuda": has_cuda, "mps": has_mps, "cpu": True}
    if device_type not in usable:
        problems.append(f"device is {device!r}: use auto, cuda, mps or cpu")
    elif not usable[device_type]:
        problems.append(f"device is {device!r}, which torch does not see here: use auto or cpu")
    else:
        count = torch.cuda.device_count() if device_type == "cuda" else 1
        legal = [device_type, *(f"{device_type}:{i}" for i in range(count))]
        if device not in legal:
            problems.append(f"device is {device!r}: use auto, {', '.join(legal)}")
    if dtype == "auto":
        dtype = "float32"
        on_gpu = device_type == "cuda" and has_cuda
        if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False):
            dtype = "bfloat16"
        elif on_gpu:
            print0("this GPU has no bfloat16: training in float32 (--dtype=float16 is faster, with loss scaling)")
    if dtype not in ("float32", "bfloat16", "float16"):
        problems.append(f"dtype is {dtype!r}: use auto, float32, bfloat16 or float16")
    return device, device_type, dtype


def device_name(device_type):
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def peak_memory(device_type):
    """The most bytes that this process has held on its GPU so far; None elsewhere."""
    return torch.cuda.max_memory_allocated() if device_type == "cuda" else None


def start_ddp(device_type):
    """Join the process group, which `closing` leaves again. Returns the device of this rank."""
    _, local_rank, _ = ranks()
    device, backend = device_type, "gloo"
    if device_type == "cuda":
        device, backend = f"cuda:{local_rank}", "cpu:gloo,cuda:nccl" # Halt's answers do not wait for the GPUs
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(backend=backend, timeout=timedelta(minutes=30))
    closing.callback(torch.distributed.destroy_process_group)
    return device


def guard(config):
    """
    Make the run's folder and let no other process write there, see safe.lock. Returns the safe.Halt that ends the run
    after a whole step. Raises SystemExit where the folder cannot be had.
    """
    rank, local_rank, _ = ranks()
    if rank == 0:
        closing.callback(safe.lock(config["out_dir"]))
    elif local_rank == 0: # a node may have disks of its own, for its emissions
        os.makedirs(config["out_dir"], exist_ok=True)
    halt = safe.Halt(config["time_limit"])
    closing.callback(halt.forget)
    return halt


def precision(device_type, dtype):
    """(the autocast context of a forward pass, the gradient scaler, which does nothing unless dtype is float16)."""
    torch.set_float32_matmul_precision("high") # tf32 where the hardware has it
    autocast = contextlib.nullcontext()
    if dtype != "float32":
        autocast = torch.amp.autocast(device_type, getattr(torch, dtype))
    return autocast, torch.amp.GradScaler(device_type, enabled=dtype == "float16")


def gather(items):
    """The tuples of all ranks in one list, sorted by their first entry, a number. Tensors in them are on the CPU."""
    if torch.distributed.is_initialized():
        of_each_rank = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_each_rank, items)
        items = [item for part in of_each_rank for item in part]
    return sorted(items, key=itemgetter(0))


def mean_of(losses):
    """The mean over the samples of all ranks, a float, of this rank's [(first sample, how many, their mean loss)]."""
    losses = gather([(first, count, loss.item()) for first, count, loss in losses])
    sums = torch.tensor([(loss * count, count) for _, count, loss in losses], dtype=torch.float64).sum(0)
    return (sums[0] / sums[1]).item()


# dense bf16 peak in FLOP/s by part of a GPU's name, a longer name before a shorter one
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(name, dtype):
    """The peak of the GPU of that name, or None where it is not known."""
    if dtype != "float32":
        for part, flops in PEAK_FLOPS.items():
            if part in name:
                return flops
    return None


def flops_per_token(model, head_share=1.0):
    """
    The FLOPs of training a language model on a token (PaLM, appendix B): 6 for each parameter that multiplies, which
    those of embeddings do not, and attention. A distance head counts as the linear head that it replaces, for the share
    of the tokens that it works on.
    """
    c, prototypes = model.config, model.head.weight
    apart = {id(prototypes)}
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            apart.add(id(module.weight))
    multiplying = sum(p.numel() for p in model.parameters() if id(p) not in apart)
    return 6 * multiplying + 6 * head_share * prototypes.numel() + 12 * c.n_layer * c.n_embd * c.block_size


# -----------------------------------------------------------------------------
# model and optimizer

def parameter_groups(model, weight_decay, decay_head=True):
    """
    Every parameter in exactly one of two groups: matrices decay; norms, biases and the head's own metric do not, nor
    without decay_head the prototypes, even where they are the embeddings too.
    """
    decay, other = [], []
    for name, p in model.named_parameters(): # a tied matrix is named once
        if not p.requires_grad:
            continue
        is_matrix = p.dim() >= 2
        of_the_metric = name.startswith("head.") and name != "head.weight"
        is_spared = not decay_head and p is model.head.weight
        if is_matrix and not of_the_metric and not is_spared:
            decay.append(p)
        else:
            other.append(p)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": other, "weight_decay": 0.0}]


def load_checkpoint(out_dir, model, config, data_hash, fixed=()):
    """
    Load the weights of out_dir/ckpt.pt, see safe.recover, into the model, and return the whole checkpoint.
    Raises SystemExit where the model, the data, or one of the settings `fixed` differ from those of the checkpoint.
    """
    ckpt = safe.recover(os.path.join(out_dir, "ckpt.pt"))
    here = {**asdict(model.config), **{key: config[key] for key in fixed}}
    there = {**ckpt["model_args"], **{key: ckpt["config"][key] for key in fixed}}
    differences = []
    for key, value in here.items():
        if value != there.get(key):
            differences.append(f"{key} is {value!r} here, {there.get(key)!r} in the checkpoint")
    if data_hash != ckpt["data_hash"]:
        differences.append(f"the data are others: hash {data_hash} here, {ckpt['data_hash']} in the checkpoint")
    fail([f"cannot resume {out_dir}: {difference}" for difference in differences])
    if "shards" not in ckpt: # fsdp.load does it
        load_weights(model, ckpt["model"])
    return ckpt


def load_weights(model, weights):
    """Load a run's weights, a state dict, into a model of the same config."""
    state = model.state_dict()
    if "head.kind" in state: # earlier runs do not have it, but their config says the same
        weights.setdefault("head.kind", state["head.kind"])
    model.load_state_dict(weights)


def load_optimizer(optimizer, state):
    """Load the optimizer's state, but keep the settings that it has now. A line says which of them changed."""
    now = [dict(group) for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except ValueError as e: # the sizes of its groups
        raise SystemExit("cannot resume: the optimizer's groups are others than in the checkpoint, is decay_head as it "
                         f"was? ({e})") from None
    for group, settings in zip(optimizer.param_groups, now):
        for key in ("weight_decay", "betas", "momentum"):
            if key in group and group[key] != settings[key]:
                print0(f"resuming with {key} {settings[key]}, the checkpoint had {group[key]}")
                group[key] = settings[key]


def try_compile(model, batch, autocast):
    """
    Compile the model's features and the head's loss, and try both on a batch; where that fails, a line says so and the
    model stays as it was. The trial leaves no gradients, and the statistics of norms as they were.

    On a CPU an equal run has equal bits, given as many threads: for that the look-up of tokens stays out of the
    compiled graph, which would add up its gradient in whatever order the threads come. That costs nothing that can be
    measured. On a GPU nothing is promised, as there the backward pass of attention adds so too.
    """
    print0("compiling the model, this takes a minute...")
    eager, buffers = model.features, {name: buffer.clone() for name, buffer in model.named_buffers()}
    on_cpu = model.head.weight.device.type == "cpu"
    try:
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and on_cpu:
                module.forward = torch.compiler.disable(module.forward)
        model.features = torch.compile(model.features)
        model.head.compile_loss()
        model.head.eval() # in training it may update its statistics, from all ranks
        with autocast:
            loss = model(*batch)[1]
        loss.backward()
    except Exception as e: # compilers raise all kinds
        first_line, *_ = str(e).splitlines() or [""]
        print0(f"torch.compile does not work here, going on without it ({type(e).__name__}: {first_line[:120]})")
        model.features = eager
        model.head.compile_loss(False)
    model.zero_grad(set_to_none=True)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    model.train()


# -----------------------------------------------------------------------------
# in the loop

@contextlib.contextmanager
def forward_pass(autocast, stop):
    """
    The context of a forward pass: autocast. A mahalanobis matrix that is not finite has no Cholesky factor, which torch
    reports as an error: it ends the run by stop(loss, norm), as a loss that is not finite does.
    """
    try:
        with autocast:
            yield
    except torch.linalg.LinAlgError as e:
        stop(f"none ({e})", "none")


def read_pending(pending, step, scaler, stop):
    """
    The pairs (loss, gradient norm) of the last steps up to `step`, averaged over the ranks, as one tensor (steps, 2).
    The first pair that is not finite ends the run by stop(loss, norm, its step).
    """
    values = torch.stack(pending)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
        values /= torch.distributed.get_world_size()
    first = step - len(pending) + 1
    for at, (loss, norm) in enumerate(values.tolist(), first): # this waits for the device
        norm_is_bad = not math.isfinite(norm) and not scaler.is_enabled() # loss scaling skips a step with such a norm
        if not math.isfinite(loss) or norm_is_bad:
            stop(loss, norm, at)
    return values


def stop_non_finite(out_dir, head, optimizer, step, loss, norm, advice, h=None):
    """End the run with the numbers that one needs to see why; h (T, D) are hidden states, if any. Raises SystemExit."""
    numbers = [f"lr {optimizer.param_groups[0]['lr']:.3e}"]
    if h is not None:
        numbers.append(f"|h| {h.norm(dim=-1).mean().item():.3e}")
    if hasattr(head, "prototype_norms"): # a loss between samples has none
        numbers.append(f"|w| {head.prototype_norms().mean().item():.3e}")
    if h is not None and head.distance != "baseline":
        try:
            numbers.append(f"smallest distance {head.distances(h).min().item():.3e}")
        except torch.linalg.LinAlgError: # see forward_pass
            numbers.append("no distance can be taken")
    path = os.path.join(out_dir, "ckpt.pt")
    good = "none yet"
    if os.path.exists(path):
        good = f"{path} (continue with --init_from=resume)"
    raise SystemExit(f"step {step}: loss {loss}, gradient norm {norm}: not finite. {', '.join(numbers)}. "
                     f"last good checkpoint: {good}. try {advice}")


def exponent(head):
    """The head's n, learned or not, as a float."""
    return torch.as_tensor(head.n).item()


def energy_text(totals):
    """The end of an evaluation's line: what the run has used so far, as Emissions.read returns it."""
    if not totals:
        return ""
    return f" | {totals['energy_kwh_total']:.4g} kWh, {totals['emissions_g_total']:.3g} g CO2eq"


# -----------------------------------------------------------------------------
# the run's folder

def save_arrays(out_dir, name, **arrays):
    """Write an .npz of numpy arrays into the run's folder, whole or not at all."""
    path = os.path.join(out_dir, name)
    with safe.explained(path), replacing(path) as (f,):
        np.savez(f, **arrays)


def save_probe(out_dir, h, y, **more):
    """Write probe.npz: hidden states h (N, D), their classes y (N,), and more arrays by name."""
    save_arrays(out_dir, "probe.npz", h=h.float().cpu().numpy(), y=y.cpu().numpy(), **more)


def git_commit():
    """The commit of these files, "with changes" if there are any, or None where there is no git, or not of these."""
    if shutil.which("git") is None:
        return None
    here = os.path.dirname(os.path.abspath(__file__))

    def git(*args):
        return subprocess.run(("git", *args), capture_output=True, text=True, cwd=here)
    head, of_these_files = git("rev-parse", "HEAD"), git("ls-files", "--error-unmatch", os.path.basename(__file__))
    if head.returncode != 0 or of_these_files.returncode != 0: # installed, they may lie in another project's folder
        return None
    changes = git("status", "--porcelain", "-uno").stdout
    return head.stdout.strip() + (" with changes" if changes else "")


def describe(model, device_type, dtype):
    """The part of config.json about the model, its head (in words, and the n that it begins with) and the device."""
    return dict(
        model_args=asdict(model.config),
        num_params=sum(p.numel() for p in model.parameters()),
        head=model.head.extra_repr(),
        n=exponent(model.head),
        device=device_type,
        device_name=device_name(device_type),
        dtype=dtype,
        world_size=ranks()[2],
    )


# files that a run leaves besides config.json, metrics.jsonl, summary.json and emissions*.csv
LEFT_OVERS = ("ckpt.pt", "ckpt_before.pt", "best.pt", "probe.npz", "predictions.npz", "loss.png", "curves.png",
              "learned.png")


def begin(out_dir, info, resume_step=None):
    """
    Write config.json: info (with the settings as its config), the command, commit and versions. A new run takes the
    place of what was there. A run that is resumed keeps its command, init_from and first n, has no end any more, and
    its metrics.jsonl is cut back to what its checkpoint knows.
    """
    path, is_new = os.path.join(out_dir, "config.json"), resume_step is None
    info = dict(
        info,
        command=shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        git=git_commit(),
        cpus=os.cpu_count(),
        threads=torch.get_num_threads(),
        runs_at_once=int(os.environ.get("RUNS_AT_ONCE", 1)), # of study.py
        versions=dict(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda,
                      numpy=np.__version__),
    )
    rows = []
    if not is_new:
        with open(path) as f:
            first = json.load(f)
        info.update({key: first[key] for key in ("command", "n") if key in first})
        info["runs_at_once"] = max(info["runs_at_once"], first.get("runs_at_once", 1))
        info["config"] = {**info["config"], "init_from": first["config"].get("init_from", "scratch")}
        rows = [row for row in read_metrics(out_dir)[0] if row["step"] <= resume_step]
    for name in os.listdir(out_dir): # before anything is written: no half of one run with half of another
        of_a_former_run = is_new and (name in LEFT_OVERS or name.startswith(("emissions", "shards_")))
        if name == "summary.json" or of_a_former_run or name.endswith(".tmp"): # which a kill has left
            (shutil.rmtree if name.startswith("shards_") else os.remove)(os.path.join(out_dir, name))
    safe.write(path, json.dumps(info, indent=1))
    safe.write(os.path.join(out_dir, "metrics.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))


def cpu_seconds(out_dir, resume_step):
    """
    The CPU seconds of this process's training so far, on all threads: those of the last line of metrics.jsonl where the
    run is resumed (steps that are lost count, as their energy does), else 0. To be read before begin() cuts the file.
    """
    rows = [] if resume_step is None else read_metrics(out_dir)[0]
    return max((row.get("cpu_seconds", 0.0) for row in rows), default=0.0)


def start_emissions(config, resumed_at, current_step):
    """
    The Emissions of a run, tracked by one rank of each node. `closing` adds the last row, at the step that
    current_step() returns, so that a run keeps its energy however it ends.
    """
    _, local_rank, _ = ranks()
    tracks = config["track_emissions"] and local_rank == 0
    node = int(os.environ.get("GROUP_RANK", 0))
    emissions = Emissions(config["out_dir"], config["country_iso_code"], config["carbon_intensity"], tracks,
                          resume_step=resumed_at, node=node)
    closing.callback(lambda: emissions.stop(current_step()))
    return emissions


def start_wandb(config):
    """
    With wandb_log, on rank 0, a run of the tracker for log(), which `closing` finishes; else None. Where it does not
    start, a line says why: metrics.jsonl has all that it would show.
    """
    rank, _, _ = ranks()
    if not config["wandb_log"] or rank != 0:
        return None
    name = config["wandb_run_name"] or os.path.basename(os.path.normpath(config["out_dir"]))
    tracker, mode = config["tracker"], dict(mode=config["wandb_mode"])
    hint = "wandb_mode=offline needs neither key nor network"
    if tracker == "trackio": # it has wandb's functions, but no mode: all stays on this machine
        mode, hint = {}, "pip install trackio"
    try:
        wandb = importlib.import_module(tracker)
        wandb_run = wandb.init(project=config["wandb_project"], name=name, config=config, **mode)
    except Exception as e: # the package, the key, the network, ...
        first_line, *_ = str(e).splitlines() or [""]
        print0(f"going on without {tracker} ({type(e).__name__}: {first_line}); {hint}")
        return None
    closing.callback(wandb_run.finish)
    return wandb_run


def log(out_dir, row, wandb_run=None):
    """Add a row to metrics.jsonl, and to the run on Weights & Biases if there is one."""
    path = os.path.join(out_dir, "metrics.jsonl")
    with safe.explained(path), open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")
    if wandb_run is not None:
        wandb_run.log({key: value for key, value in row.items() if key != "kind"}, step=row["step"])
