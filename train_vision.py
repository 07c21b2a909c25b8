"""
Train an image classifier whose output layer is a distance head. Read distances.py, model_vision.py, then this file from top to bottom.

scikit-learn's digits with an MLP, no download, half a minute:
$ python train_vision.py --distance=cosine
The paper's backbones on its datasets, at its settings:
$ python train_vision.py config/mlp.py --dataset=mnist --distance=euclidean --out_dir=out/mnist_euclidean
$ torchrun --standalone --nproc_per_node=4 train_vision.py config/resnet50.py --dataset=cifar100 --distance=cosine --out_dir=out/cifar100_cosine
Prototypes that one can look at, a head straight on pixels:
$ python train_vision.py config/mlp.py --dataset=mnist --model=pixels --distance=euclidean --out_dir=out/pixels
Go on with a run that was stopped, with its own settings:
$ python train_vision.py --init_from=resume --out_dir=out/cifar100_cosine

A part of the training set is set aside for validation: it chooses the epoch and when to stop. The test set is touched once, at the end,
with the best weights. A run's folder: see run.py; curves.png and learned.png show the training and what the head learned.
"""
import json
import math
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, fields
from datetime import timedelta

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import metrics
import run
from configurator import fail
from data_vision import AUGMENTATIONS, STATS, Batches, load, split
from distances import DistanceHead, parse_head
from emissions import Emissions
from model_vision import BACKBONES, VisionConfig, VisionNet

# -----------------------------------------------------------------------------
# defaults: the MLP with the linear head on scikit-learn's digits; every line can be set in a config file or as --key=value
# I/O
out_dir = "out/digits" # the run's folder
overwrite = False # True: start afresh in an out_dir that holds a run already
init_from = "scratch" # or 'resume'
eval_interval = 1 # epochs between evaluations on the validation split; each also writes a checkpoint and a row of emissions.csv
log_interval = 100 # steps between log lines; there is one at each epoch's end as well
plots = True # curves.png and learned.png at the end
wandb_log = False # also log to Weights & Biases (rank 0)
wandb_project = "distance-heads"
wandb_run_name = "" # '': the name of out_dir
wandb_mode = "online" # or 'offline', which needs neither key nor network
# data
data_dir = "data" # where datasets lie, a folder each
dataset = "digits" # 'digits' (scikit-learn's own, 8x8), 'mnist', 'cifar10', 'cifar100'
val_fraction = 0.1 # of the training set, for validation
batch_size = 64 # images per step, over all ranks
augment = "none" # 'crop' (and rotate), 'standard' (and flip), 'strong' (and colours)
normalize = "half" # (x - 0.5) / 0.5, or 'digits', 'mnist', 'cifar10', 'cifar100': the dataset's mean and deviation
image_size = 0 # pixels, to resize to; 0: as they are
channels = 0 # 3: grey images in three channels; 0: as they are
# model
model = "mlp" # 'pixels' (no backbone), 'mlp', 'cnn', 'resnet50', 'pvtv2_b0', 'vgg16', 'vit_tiny'
# head, see `python distances.py`
distance = "baseline" # baseline, euclidean, manhattan, chebyshev, minkowski, cosine, hamming, canberra, bray_curtis, mahalanobis, offset_l2
variant = "" # '': the distance's default
distance_params = "" # such as 'p=3'
link = "harmonic" # p proportional to d^-n, or 'softmin': to exp(-n d)
n = 1.0 # the exponent (paper, Table 8)
learn_n = False # learn log n, from n
eps = 1e-4 # where it enters is part of each distance's formula
feature_scale = 1.0 # features are multiplied by it before the head
# optimizer
optimizer = "adam" # 'adam', 'adamw', 'sgd'
learning_rate = 1e-3
epochs = 40
weight_decay = 0.0 # of matrices and kernels; not of norms, biases, and the head's extra parameters
beta1 = 0.9
beta2 = 0.999
momentum = 0.9 # of sgd
grad_clip = 0.0 # clip the gradient's norm at this value, 0: never
# schedule, by epochs
lr_schedule = "none" # 'step' (every lr_step epochs), 'multistep' (at each of lr_milestones): times lr_gamma; 'cosine': to min_lr
lr_step = 30
lr_milestones = "60,100,140"
lr_gamma = 0.1
min_lr = 0.0
# early stopping
patience = 15 # epochs without a better validation accuracy, 0: never stop early
min_improvement = 0.01 # what counts as better, in percentage points
# energy
country_iso_code = "USA" # whose grid's average g CO2eq per kWh
carbon_intensity = 0.0 # g CO2eq per kWh of your own grid, instead; 0: the country's
track_emissions = True
# system
seed = 1337 # of initial weights, the validation split, the order of images and their augmentation
device = "auto" # 'cuda', 'mps', 'cpu', or the first of these that there is
dtype = "auto" # 'float32', 'bfloat16', or 'float16' (with loss scaling); auto: bfloat16 on a GPU that has it, else float32
compile = False # torch.compile: worth it for the larger backbones
# -----------------------------------------------------------------------------
config, sources, _, problems = run.configure(globals()) # every violation goes into one report
optimizer_name = optimizer

# distributed
rank, local_rank, world_size = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
ddp, master = "RANK" in os.environ, rank == 0


def print0(*args):
    if master:
        print(*args, flush=True)


# what cannot run is said now, all of it at once
device, device_type, dtype = run.choose_device(device, dtype, problems, print0)
for key, legal in (("model", BACKBONES), ("normalize", STATS), ("augment", AUGMENTATIONS), ("optimizer", ("adam", "adamw", "sgd")),
                   ("lr_schedule", ("none", "step", "multistep", "cosine"))):
    if config[key] not in legal:
        problems.append(f"{key} is {config[key]!r}: use {', '.join(legal)}")
for key in ("eval_interval", "log_interval", "batch_size", "lr_step"):
    if config[key] < 1:
        problems.append(f"{key} is {config[key]}, it must be at least 1")
for key, legal, ok in (("val_fraction", "in (0, 1)", 0 < val_fraction < 1), ("learning_rate", ">= 0", learning_rate >= 0), ("min_lr", ">= 0", min_lr >= 0),
                       ("epochs", ">= 0", epochs >= 0), ("weight_decay", ">= 0", weight_decay >= 0), ("beta1", "in [0, 1)", 0 <= beta1 < 1),
                       ("beta2", "in [0, 1)", 0 <= beta2 < 1), ("momentum", "in [0, 1)", 0 <= momentum < 1), ("grad_clip", ">= 0", grad_clip >= 0),
                       ("patience", ">= 0", patience >= 0), ("min_improvement", ">= 0", min_improvement >= 0), ("lr_gamma", "> 0", lr_gamma > 0),
                       ("image_size", ">= 0", image_size >= 0), ("channels", "0 or 3", channels in (0, 3)), ("n", "> 0", n > 0),
                       ("out_dir", "the name of a folder", out_dir != ""), ("seed", "in [0, 2^32)", 0 <= seed < 2 ** 32)):
    if not ok:
        problems.append(f"{key} is {config[key]!r}, it must be {legal}")
if init_from not in ("scratch", "resume"):
    problems.append(f"init_from is {init_from!r}: use scratch or resume")
if batch_size % world_size:
    problems.append(f"batch_size {batch_size} is shared by the {world_size} ranks and must divide by them")
try:
    milestones = [int(epoch) for epoch in lr_milestones.split(",")]
except ValueError:
    problems.append(f"lr_milestones is {lr_milestones!r}: write epochs, comma separated, such as 60,100,140")
try:
    DistanceHead(8, 8, **parse_head(distance, variant, distance_params), link=link, n=n if n > 0 else 1.0, learn_n=learn_n, eps=eps)
except ValueError as e:
    problems.append(str(e))
if not problems:
    try:
        images = load(dataset, data_dir)
        if normalize != "half" and len(STATS[normalize][0]) not in (1, channels or images.train_x.shape[1]):
            problems.append(f"normalize is {normalize!r}, of {len(STATS[normalize][0])} channels, but {dataset} has {images.train_x.shape[1]}: use half or {dataset}")
        train_idx, val_idx = split(images.train_y, val_fraction, seed)
        if min(batch_size, len(train_idx)) % world_size:
            problems.append(f"the {len(train_idx)} training images are one batch, which {world_size} ranks cannot share evenly: use a smaller batch_size")
        C, H, W = images.train_x.shape[1:]
        settings = {**{f.name: config[f.name] for f in fields(VisionConfig) if f.name in config}, "num_classes": images.num_classes,
                    "image_shape": (channels or C, image_size or H, image_size or W)} # as the model sees them
        with torch.device("meta"): # takes neither time nor memory
            VisionNet(VisionConfig(**settings))
    except (ValueError, OSError) as e:
        problems.append(str(e))
fail(problems)

if ddp:
    if device_type == "cuda":
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(backend="nccl" if device_type == "cuda" else "gloo", timeout=timedelta(minutes=30))
os.makedirs(out_dir, exist_ok=True)
torch.set_float32_matmul_precision("high") # tf32 where the hardware has it
torch.backends.cudnn.benchmark = True # of convolutions: one shape, the fastest kernel
autocast = nullcontext() if dtype == "float32" else torch.amp.autocast(device_type, getattr(torch, dtype))
scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")

# -----------------------------------------------------------------------------
# data, model, optimizer


def batches(x, y, augment="none"):
    """uint8 on the device from here on; a batch is a gather"""
    return Batches(x, y, batch_size, seed, normalize=normalize, augment=augment, image_size=image_size, channels=channels, device=device)


train_data = batches(images.train_x[train_idx], images.train_y[train_idx], augment)
val_data = batches(images.train_x[val_idx], images.train_y[val_idx])
test_data = batches(images.test_x, images.test_y)
steps_per_epoch = train_data.steps_per_epoch
num_classes, image_shape, step_size = images.num_classes, settings["image_shape"], train_data.batch_size

torch.manual_seed(seed)
model = VisionNet(VisionConfig(**settings))
model.head.validate = False # it waits for the device; load() has checked the labels, and this script stops at a loss that is not finite
model.to(device, memory_format=torch.channels_last)
groups = run.parameter_groups(model, weight_decay)
if optimizer_name == "sgd":
    optimizer = torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, fused=device_type != "mps")
else: # without decay Adam and AdamW are the same
    Adam = torch.optim.AdamW if optimizer_name == "adamw" else torch.optim.Adam
    optimizer = Adam(groups, lr=learning_rate, betas=(beta1, beta2), fused=device_type != "mps")

step, best_accuracy, best_epoch = 0, -1.0, 0
if init_from == "resume":
    ckpt = torch.load(os.path.join(out_dir, "ckpt.pt"), map_location="cpu", weights_only=True)
    differ = [f"{k} is {v!r} here, {ckpt['model_args'].get(k)!r} in the checkpoint" for k, v in asdict(model.config).items() if v != ckpt["model_args"].get(k)]
    if images.hash != ckpt["data_hash"]:
        differ.append(f"the data are others: hash {images.hash} here, {ckpt['data_hash']} in the checkpoint")
    for key in ("seed", "val_fraction", "batch_size", "optimizer"): # others would validate on images that were trained on, or count other epochs
        if config[key] != ckpt["config"][key]:
            differ.append(f"{key} is {config[key]!r} here, {ckpt['config'][key]!r} in the checkpoint")
    fail([f"cannot resume {out_dir}: {d}" for d in differ])
    model.load_state_dict(ckpt["model"])
    run.load_optimizer(optimizer, ckpt["optimizer"], print0, weight_decay, **({"momentum": momentum} if optimizer_name == "sgd" else {"betas": (beta1, beta2)}))
    scaler.load_state_dict(ckpt["scaler"])
    step, best_accuracy, best_epoch = ckpt["step"], ckpt["best_accuracy"], ckpt["best_epoch"]
    del ckpt
resumed_at = step if init_from == "resume" else None
raw_model = model
if compile:
    eager, state = model.features, {k: v.clone() for k, v in model.state_dict().items()}
    try:
        print0("compiling the model, this takes a minute...")
        model.features = torch.compile(model.features)
        model.head.compile_loss()
        model.head.eval() # in training mode it may update its statistics, from all ranks
        with autocast:
            model(*train_data.train(step, rank, world_size))[1].backward()
    except Exception as e:
        print0(f"torch.compile does not work here, going on without it ({type(e).__name__}: {str(e).splitlines()[0][:120] if str(e) else ''})")
        model.features = eager
        model.head.compile_loss(False)
    model.zero_grad(set_to_none=True)
    model.load_state_dict(state) # the statistics of norms
    model.train()
if ddp:
    model = DDP(model, device_ids=[local_rank] if device_type == "cuda" else None)
num_params = sum(p.numel() for p in raw_model.parameters())
print0(f"{dataset}: {len(train_data.y):,} training, {len(val_data.y):,} validation, {len(test_data.y):,} test images ({images.source}), {'x'.join(map(str, image_shape))}")
print0(f"{config['model']}: {num_params / 1e6:.2f}M parameters; head: {raw_model.head.extra_repr()}")
print0(f"{steps_per_epoch:,} steps of {step_size:,} images per epoch, on {world_size} rank(s), {device_type}, {dtype}")

# -----------------------------------------------------------------------------
# schedule, evaluation


def get_lr(epoch):
    """The learning rate of an epoch (paper, Table 6), as StepLR, MultiStepLR and CosineAnnealingLR have it."""
    if lr_schedule == "step":
        return learning_rate * lr_gamma ** (epoch // lr_step)
    if lr_schedule == "multistep":
        return learning_rate * lr_gamma ** sum(epoch >= m for m in milestones)
    if lr_schedule == "cosine":
        return min_lr + (learning_rate - min_lr) * (1 + math.cos(math.pi * epoch / epochs)) / 2
    return learning_rate


@torch.no_grad()
def outputs(data, keep=None):
    """(h (keep or N, D), z (N, K)) of every image of a Batches, in order, on the CPU; each rank works on its share of the batches."""
    if ddp: # the statistics of norms are each rank's own, what is saved is rank 0's
        for buffer in raw_model.buffers():
            torch.distributed.broadcast(buffer, 0)
    raw_model.eval()
    parts = []
    for first in range(rank * batch_size, len(data.y), world_size * batch_size):
        x, _ = data.fixed(first, min(batch_size, len(data.y) - first))
        with autocast:
            h = raw_model.features(x)
        z = raw_model.head(h.float())
        parts.append((first, (h.float() if keep is None or first < keep else h[:0].float()).cpu(), z.cpu()))
    raw_model.train()
    if ddp:
        gathered = [None] * world_size
        torch.distributed.all_gather_object(gathered, parts)
        parts = sorted((part for rank_parts in gathered for part in rank_parts), key=lambda part: part[0])
    _, h, z = zip(*parts)
    return torch.cat(h)[:keep], torch.cat(z)


def quality(z, y):
    """(mean -log p_y in nats, accuracy) of scores z (N, K)"""
    return F.cross_entropy(z.double(), y.cpu()).item(), (z.argmax(1) == y.cpu()).double().mean().item()


def test():
    """On rank 0: what summary.json says of the best epoch's weights on the test set, its features (N, D), and its labels (N,)."""
    if master: # from the disk: copies, not references to weights that moved on
        raw_model.load_state_dict(torch.load(os.path.join(out_dir, "best.pt"), map_location="cpu", weights_only=True)["model"])
    if ddp:
        for t in raw_model.state_dict().values():
            torch.distributed.broadcast(t, 0)
    h, z = outputs(test_data)
    y = test_data.y.cpu()
    if not master:
        return None, h, y
    loss, _ = quality(z, y)
    result = metrics.classification(y.numpy(), z.argmax(1).numpy(), num_classes)
    standardised = metrics.spectrum(metrics.standardised(h.numpy()))
    means = torch.as_tensor(metrics.class_means(h.numpy(), y.numpy(), num_classes), dtype=torch.float32)
    with torch.no_grad():
        alignment = metrics.prototype_alignment(raw_model.head.eval()(means.to(device)).cpu().numpy())
    return dict(test_loss=loss, test_accuracy=result["accuracy"], f1_macro=result["f1_macro"],
                pc2_ev=metrics.explained_variance(metrics.spectrum(h.numpy()), 2), pca90=metrics.components_for(standardised, 0.9, cap=50),
                pca90_uncapped=metrics.components_for(standardised, 0.9), prototype_alignment=alignment, confusion=result["confusion"]), h, y

# -----------------------------------------------------------------------------
# the run's folder


def exponent():
    return torch.as_tensor(raw_model.head.n).item()


def log(row):
    run.log(out_dir, row)
    if wandb_log:
        wandb.log({k: v for k, v in row.items() if k != "kind"}, step=row["step"])


def save(name):
    run.save(os.path.join(out_dir, name), {
        "model": raw_model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
        "step": step, "best_accuracy": best_accuracy, "best_epoch": best_epoch, "model_args": asdict(raw_model.config), "config": config,
        "data_hash": images.hash})


def plot_curves(rows, plt):
    """curves.png: loss and accuracy over epochs"""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    evals, logs = ([r for r in rows if r["kind"] == kind] for kind in ("eval", "train"))
    left.plot([r["step"] / steps_per_epoch for r in logs], [r["loss"] for r in logs], color="0.7", lw=1, label="training")
    left.plot([r["epoch"] for r in evals], [r["val_loss"] for r in evals], color="C0", lw=2, label="validation")
    left.set(xlabel="epoch", ylabel="loss (nats)")
    left.legend(frameon=False)
    right.plot([r["epoch"] for r in evals], [100 * r["val_accuracy"] for r in evals], color="C0", lw=2)
    right.plot(best_epoch, 100 * best_accuracy, "o", color="C0")
    right.set_title(f"best {best_accuracy:.2%} at epoch {best_epoch}", fontsize=9, color="C0")
    right.set(xlabel="epoch", ylabel="validation accuracy (%)")
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    fig.suptitle(f"{dataset}, {config['model']}, head {raw_model.head.extra_repr()}", fontsize=9)
    fig.savefig(os.path.join(out_dir, "curves.png"), dpi=150)


def plot_learned(h, y, plt):
    """learned.png: prototypes and class means in the plane of the features' top two components; of a head straight on pixels, its prototypes."""
    w = raw_model.head.weight.detach().float().cpu()[:num_classes]
    if config["model"] == "pixels":
        columns = 5 if num_classes <= 10 else 10
        rows = -(-num_classes // columns)
        fig, axes = plt.subplots(rows, columns, figsize=(1.1 * columns, 1.25 * rows + 0.3), layout="constrained", squeeze=False)
        pictures = w.reshape(num_classes, *image_shape)
        for k, ax in enumerate(axes.flat):
            ax.axis("off")
            if k < num_classes:
                picture = (pictures[k] - pictures[k].min()) / (pictures[k].max() - pictures[k].min()).clamp(min=1e-12)
                ax.imshow(picture.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray")
                ax.set_title(k, fontsize=9, pad=2)
    else:
        from sklearn.decomposition import PCA
        if distance == "cosine": # what it compares are directions
            h, w = F.normalize(h, dim=1), F.normalize(w, dim=1)
        means = metrics.class_means(h.numpy(), y.numpy(), num_classes)
        pca = PCA(2).fit(h.numpy())
        points, centres, prototypes = (pca.transform(a) for a in (h[:2000].numpy(), means, w.numpy()))
        fig, ax = plt.subplots(figsize=(6, 5), layout="constrained")
        colours = plt.get_cmap("tab10" if num_classes <= 10 else "gist_ncar")
        for k in range(num_classes):
            colour = colours(k if num_classes <= 10 else k / num_classes)
            mine = points[y[:2000].numpy() == k]
            ax.scatter(*mine.T, s=5, color=colour, alpha=0.5, lw=0)
            ax.plot(*zip(centres[k], prototypes[k]), color=colour, lw=1)
            ax.scatter(*centres[k], s=40, color=colour, edgecolor="k", lw=0.8, zorder=3)
            ax.scatter(*prototypes[k], s=90, color=colour, edgecolor="k", lw=0.8, marker="*", zorder=4)
            if num_classes <= 10:
                ax.annotate(k, prototypes[k], (6, 4), textcoords="offset points", fontsize=9)
        for marker, size, name in ((".", 6, "test images"), ("o", 6, "class mean"), ("*", 10, "prototype")):
            ax.plot([], [], marker, color="0.6", mec="k" if marker != "." else "0.6", mew=0.8, ms=size, label=name)
        ax.legend(frameon=False, fontsize=8)
        share = pca.explained_variance_ratio_
        ax.set(xlabel=f"first component ({share[0]:.0%} of the variance)", ylabel=f"second component ({share[1]:.0%})")
        ax.spines[["top", "right"]].set_visible(False)
    fig.suptitle(f"{dataset}, {config['model']}, {raw_model.head.extra_repr()}", fontsize=9)
    fig.savefig(os.path.join(out_dir, "learned.png"), dpi=150)


def plot(h, y):
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return print0("no curves.png and learned.png: pip install matplotlib")
    plot_curves(run.read_metrics(out_dir)[0], plt)
    plot_learned(h, y, plt)
    plt.close("all")
    print0(f"curves and prototypes: {os.path.join(out_dir, 'curves.png')}, {os.path.join(out_dir, 'learned.png')}")


def stop_non_finite(at, loss, norm):
    """The numbers one needs to see why, then the end."""
    path = os.path.join(out_dir, "ckpt.pt")
    good = path + " (continue with --init_from=resume)" if os.path.exists(path) else "none yet"
    raise SystemExit(f"step {at}: loss {loss}, gradient norm {norm}: not finite. lr {optimizer.param_groups[0]['lr']:.3e}, "
                     f"|w| {raw_model.head.weight.norm(dim=-1).mean().item():.3e}. last good checkpoint: {good}. try a lower learning_rate, --grad_clip=1, or dtype=float32")

# -----------------------------------------------------------------------------
# training


def stops(epoch):
    """Whether training ends with this epoch, after which the model was evaluated."""
    return epoch >= epochs or 0 < patience <= epoch - best_epoch


emissions, cumulative = None, {}
ended = resumed_at is not None and stops(step // steps_per_epoch) and os.path.exists(os.path.join(out_dir, "summary.json"))
try:
    if master and not ended:
        run.begin(out_dir, dict(config={**config, "init_from": "scratch"}, sources=sources, script="train_vision.py", model_args=asdict(raw_model.config),
                                num_params=num_params, n=exponent(), device=device_type, device_name=run.device_name(device_type), dtype=dtype, world_size=world_size,
                                data=dict(source=images.source, hash=images.hash, num_classes=num_classes, train_images=len(train_data.y),
                                          val_images=len(val_data.y), test_images=len(test_data.y))), resumed_at)
        if wandb_log:
            import wandb
            wandb.init(project=wandb_project, name=wandb_run_name or os.path.basename(os.path.normpath(out_dir)), config=config, mode=wandb_mode)
    emissions = Emissions(out_dir, country_iso_code, carbon_intensity, track_emissions and local_rank == 0, resume_step=resumed_at,
                          node=int(os.environ.get("GROUP_RANK", 0)))
    raw_model.train()
    pending, seconds, width = [], 0.0, len(str(epochs)) # (loss, gradient norm) since the last log line, still on the device; training time since the last evaluation
    start = last = time.time()
    first_step = step
    while True:
        epoch = step // steps_per_epoch
        evaluates = step % steps_per_epoch == 0 and (epoch % eval_interval == 0 or epoch == epochs)
        if evaluates and step != resumed_at:
            h, z = outputs(val_data, keep=run.PROBE_SIZE)
            val_loss, val_accuracy = quality(z, val_data.y)
            if not math.isfinite(val_loss):
                stop_non_finite(step, f"of the validation split {val_loss}", "not taken")
            cumulative = emissions.read(step, val_loss=val_loss)
            improved = 100 * val_accuracy > 100 * best_accuracy + min_improvement
            if improved:
                best_accuracy, best_epoch = val_accuracy, epoch
            if master:
                print0(f"epoch {epoch:>{width}}/{epochs} | val loss {val_loss:.4f} | val accuracy {val_accuracy:7.2%} | best {best_accuracy:7.2%} at epoch {best_epoch}"
                       + (f" | {cumulative['energy_kwh_total']:.4g} kWh, {cumulative['emissions_g_total']:.3g} g CO2eq" if cumulative else ""))
                log(dict(kind="eval", step=step, epoch=epoch, images=step * step_size, val_loss=val_loss, val_accuracy=val_accuracy, best_accuracy=best_accuracy,
                         n=exponent(), seconds=seconds, **run.probe(raw_model.head, h.to(device), val_data.y[:len(h)]), **cumulative))
                if improved:
                    save("best.pt")
                save("ckpt.pt") # last: what it tells is there
            last, seconds = time.time(), 0.0 # evaluation is not part of an epoch's time
        if evaluates and stops(epoch):
            break

        lr = get_lr(epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        x, y = train_data.train(step, rank, world_size)
        torch.manual_seed(hash((seed, step, rank))) # dropout and the head's noise belong to the step: resuming changes nothing
        with autocast:
            loss = model(x, y)[1]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
        pending.append(torch.stack([loss.detach().float(), norm.float()]))
        logging = (step + 1) % log_interval == 0 or (step + 1) % steps_per_epoch == 0
        if logging: # one wait for the device per log line
            values = torch.stack(pending) # (steps, 2)
            if ddp:
                torch.distributed.all_reduce(values)
                values /= world_size
            for i, (loss_value, norm_value) in enumerate(values.tolist()):
                # with loss scaling an infinite gradient is a step that the scaler skips
                if not math.isfinite(loss_value) or not math.isfinite(norm_value) and not scaler.is_enabled():
                    stop_non_finite(step + 2 - len(pending) + i, loss_value, norm_value)
            mean_loss, num_steps, pending = values[:, 0].mean().item(), len(pending), []
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if logging:
            now = time.time()
            ms, last, seconds = (now - last) / num_steps * 1000, now, seconds + now - last
            eta = (now - start) / (step - first_step) * (epochs * steps_per_epoch - step)
            print0(f"epoch {step / steps_per_epoch:>{width + 3}.2f}/{epochs} | loss {mean_loss:.4f} | lr {lr:.2e} | norm {norm_value:7.3f} | {ms:7.1f} ms | "
                   f"{step_size / ms * 1000:>8,.0f} images/s | eta {timedelta(seconds=round(eta))}")
            if master:
                log(dict(kind="train", step=step, epoch=epoch, images=step * step_size, loss=mean_loss, lr=lr, grad_norm=norm_value, ms=ms))
    if ended:
        print0(f"nothing to do: {out_dir} has ended at epoch {epoch}, after patience or all {epochs} epochs")
    else:
        tested, h, y = test()
        if master:
            rows = [row for row in run.read_metrics(out_dir)[0] if row["kind"] == "eval"]
            errors = [1 - row["val_accuracy"] for row in rows]
            per_epoch = [row["seconds"] / (row["epoch"] - before["epoch"]) for before, row in zip(rows, rows[1:])]
            energies = [row.get("energy_kwh_total") for row in rows]
            counted = None not in energies and energies == sorted(energies) # else emissions.csv was lost on the way
            summary = dict(epochs=epoch, step=step, images=step * step_size, best_epoch=best_epoch, val_accuracy=best_accuracy, **tested, n=exponent(), num_params=num_params,
                           seconds_per_epoch=float(np.median(per_epoch)) if per_epoch else None, steps_to_90=metrics.time_to([row["step"] for row in rows], errors),
                           energy_kwh_to_90=metrics.time_to(energies, errors) if counted else None,
                           peak_memory_bytes=torch.cuda.max_memory_allocated() if device_type == "cuda" else None,
                           **{k: v for k, v in rows[-1].items() if k.endswith("_total")})
            run.save_probe(out_dir, h[:run.PROBE_SIZE], y[:run.PROBE_SIZE])
            run.write(os.path.join(out_dir, "summary.json"), json.dumps(summary, indent=1))
            if plots:
                plot(h, y)
            print0(f"test accuracy {tested['test_accuracy']:.2%}, macro F1 {tested['f1_macro']:.4f} with the weights of epoch {best_epoch}; PC2 EV {tested['pc2_ev']:.3f}, "
                   f"PCA@90% {tested['pca90_uncapped']}, prototypes at their own class {tested['prototype_alignment']:.0%}")
            print0(f"energy: {emissions.describe()}")
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
