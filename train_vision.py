"""
Train an image classifier whose output layer is a distance head. Read distances.py, then model_vision.py, then this file
from top to bottom; what surrounds the loop is in run.py.

scikit-learn's digits with an MLP, no download, half a minute:
$ python train_vision.py --distance=cosine
The paper's backbones on its datasets, at its settings:
$ python train_vision.py config/mlp.py --dataset=mnist --distance=euclidean --out_dir=out/mnist_euclidean
$ torchrun --standalone --nproc_per_node=4 train_vision.py config/resnet50.py --dataset=cifar100 --distance=cosine
Prototypes that one can look at, a head straight on pixels:
$ python train_vision.py config/mlp.py --dataset=mnist --model=pixels --distance=euclidean --out_dir=out/pixels
Go on with a run that was stopped, with its own settings:
$ python train_vision.py --init_from=resume --out_dir=out/cifar100_resnet50

A part of the training set is set aside for validation: it chooses the epoch and when to stop. The test set is touched
once, at the end, with the best weights. The files in a run's folder are listed in run.py; curves.png and learned.png
show the training and what the head learned.
"""
import json
import math
import os
import time
from dataclasses import fields
from datetime import timedelta

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import figures
import metrics
import probing
import run
import safe
from configurator import fail
from data_vision import AUGMENTATIONS, STATS, Batches, load, split
from model_vision import BACKBONES, VisionConfig, VisionNet
from run import print0

# -----------------------------------------------------------------------------
# defaults: the MLP with the linear head on scikit-learn's digits; each can be set in a config file or as --key=value
# I/O
out_dir = "out/digits" # the run's folder
overwrite = False # True: start afresh in an out_dir that holds a run already
init_from = "scratch" # or 'resume'
eval_interval = 1 # epochs between evaluations; each also writes a checkpoint and a row of emissions.csv
log_interval = 100 # steps between log lines; there is one at each epoch's end as well
plots = True # curves.png and learned.png at the end
wandb_log = False # also log to Weights & Biases (rank 0)
tracker = "wandb" # or 'trackio', which takes its place and keeps all on this machine
wandb_project = "distance-heads"
wandb_run_name = "" # '': the name of out_dir
wandb_mode = "online" # or 'offline', which needs neither key nor network
# data
data_dir = "data" # where datasets lie, a folder each
dataset = "digits" # 'digits' (scikit-learn's own, 8x8), 'mnist', 'cifar10', 'cifar100'
train_images = 0 # how many of the training set, the first ones of the files; 0: all
test_images = 0 # likewise
resplit = False # True: training and test images, as many of each, are drawn by the seed from both together
val_fraction = 0.1 # of the training set, for validation
batch_size = 64 # images per step, over all ranks
augment = "none" # 'crop' (and rotate), 'standard' (and flip), 'strong' (and colours)
normalize = "half" # (x - 0.5) / 0.5, or 'digits', 'mnist', 'cifar10', 'cifar100': the dataset's mean and deviation
image_size = 0 # pixels, to resize to; 0: as they are
channels = 0 # 3: grey images in three channels; 0: as they are
# model
model = "mlp" # 'pixels' (no backbone), 'mlp', 'cnn', 'resnet50', 'pvtv2_b0', 'vgg16', 'vit_tiny'
# head, see `python distances.py`
# 'baseline' (the linear head), 'euclidean', 'manhattan', 'chebyshev', 'minkowski', 'cosine', 'hamming', 'canberra',
# 'bray_curtis', 'mahalanobis', 'offset_l2'
distance = "baseline"
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
decay_head = True # False: the prototypes do not decay either
beta1 = 0.9
beta2 = 0.999
momentum = 0.9 # of sgd
grad_clip = 0.0 # clip the gradient's norm at this value, 0: never
# schedule, by epochs
# 'step' multiplies by lr_gamma every lr_step epochs, 'multistep' at each of lr_milestones; 'cosine' goes to min_lr
lr_schedule = "none"
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
time_limit = 0.0 # minutes after which the run saves itself and ends with exit code 124, to be resumed; 0: none
seed = 1337 # of initial weights, the splits of the data, the order of images and their augmentation
device = "auto" # 'cuda', 'mps', 'cpu', or the first of these that there is
dtype = "auto" # 'float32', 'bfloat16', 'float16' (with loss scaling); auto: bfloat16 where a GPU has it, else float32
threads = 0 # of torch on the CPU, 0: its own choice
compile = False # torch.compile: worth it for the larger backbones
# -----------------------------------------------------------------------------
config, sources, saved, problems = run.configure(globals()) # problems: all that cannot run, for one report
rank, local_rank, world_size = run.ranks()
ddp, master = "RANK" in os.environ, rank == 0


# -----------------------------------------------------------------------------
# checks

problems += run.check(config, model=BACKBONES, normalize=STATS, augment=AUGMENTATIONS, init_from=("scratch", "resume"),
                      optimizer=("adam", "adamw", "sgd"), lr_schedule=("none", "step", "multistep", "cosine"))
device, device_type, dtype = run.choose_device(device, dtype, problems) # "auto" no more
try:
    milestones = [int(epoch) for epoch in lr_milestones.split(",")]
except ValueError:
    problems.append(f"lr_milestones is {lr_milestones!r}: write epochs, comma separated, such as 60,100,140")
if batch_size % world_size:
    problems.append(f"batch_size {batch_size} is shared by the {world_size} ranks and must divide by them")
if not problems: # else the data could not be read
    try:
        images = load(dataset, data_dir, train_images, test_images, seed if resplit else None)
        C, H, W = images.train_x.shape[1:]
        image_shape = (channels or C, image_size or H, image_size or W) # as the model sees them
        arguments = {f.name: config[f.name] for f in fields(VisionConfig) if f.name in config}
        net_config = VisionConfig(**arguments, num_classes=images.num_classes, image_shape=image_shape)
        with torch.device("meta"): # which takes neither time nor memory
            VisionNet(net_config)
        num_means = len(STATS[normalize][0])
        if normalize != "half" and num_means not in (1, channels or C):
            problems.append(f"normalize is {normalize!r}, of {num_means} channels, but {dataset} has {C}: "
                            f"use half or {dataset}")
        train_idx, val_idx = split(images.train_y, val_fraction, seed)
        if min(batch_size, len(train_idx)) % world_size:
            problems.append(f"the {len(train_idx)} training images are one batch, which {world_size} ranks cannot "
                            "share evenly: use a smaller batch_size")
    except (ImportError, ValueError, OSError) as e:
        problems.append(str(e))
fail(problems)

halt = run.guard(config) # out_dir is this run's own; a signal or time_limit ends it after a whole step
if ddp:
    device = run.start_ddp(device_type)
if threads:
    torch.set_num_threads(threads)
autocast, scaler = run.precision(device_type, dtype)
torch.backends.cudnn.benchmark = True # of convolutions: one shape, the fastest kernel


# -----------------------------------------------------------------------------
# batches, model and optimizer

def batches(x, y, augmentation):
    """Batches of images x (N, C, H, W) with labels y (N,), which lie on the device as uint8: a batch is a gather."""
    return Batches(x, y, batch_size, seed, normalize, augmentation, image_size, channels, device)


train_data = batches(images.train_x[train_idx], images.train_y[train_idx], augment)
val_data = batches(images.train_x[val_idx], images.train_y[val_idx], "none")
test_data = batches(images.test_x, images.test_y, "none")
seen_idx = train_idx[:len(val_idx)] # for the training loss: as many as for validation
seen_data = batches(images.train_x[seen_idx], images.train_y[seen_idx], "none")
steps_per_epoch, images_per_step = train_data.steps_per_epoch, train_data.batch_size

torch.manual_seed(seed)
raw_model = VisionNet(net_config)
# to validate waits for the device; load() has checked the labels, and the run stops at a loss that is not finite
raw_model.head.validate = False
raw_model.to(device, memory_format=torch.channels_last)
groups, fused = run.parameter_groups(raw_model, weight_decay, decay_head), device_type != "mps"
if optimizer == "sgd":
    moments = dict(momentum=momentum)
    opt = torch.optim.SGD(groups, lr=learning_rate, **moments, fused=fused)
else: # without decay Adam and AdamW are the same
    moments = dict(betas=(beta1, beta2))
    Adam = torch.optim.AdamW if optimizer == "adamw" else torch.optim.Adam
    opt = Adam(groups, lr=learning_rate, **moments, fused=fused)


def stops(epoch):
    """Whether training ends with this epoch, after which the model was evaluated."""
    return epoch >= epochs or 0 < patience <= epoch - best_epoch


step, best_accuracy, best_epoch, resumed_at, evaluated_at = 0, -1.0, 0, None, None
if init_from == "resume":
    # others would validate on images that were trained on, or count other epochs
    fixed_settings = ("seed", "val_fraction", "batch_size", "optimizer")
    ckpt = run.load_checkpoint(out_dir, raw_model, config, images.hash, fixed_settings)
    run.load_optimizer(opt, ckpt["optimizer"])
    scaler.load_state_dict(ckpt["scaler"])
    step, best_accuracy, best_epoch = ckpt["step"], ckpt["best_accuracy"], ckpt["best_epoch"]
    resumed_at, evaluated_at = step, ckpt.get("evaluated_at", step) # which older checkpoints do not have
    del ckpt
    epoch = step // steps_per_epoch
    if stops(epoch) and os.path.exists(os.path.join(out_dir, "summary.json")):
        print0(f"nothing to do: {out_dir} has ended at epoch {epoch}, after patience or all {epochs} epochs")
        raise SystemExit
if compile:
    run.try_compile(raw_model, train_data.train(step, rank, world_size), autocast)
ddp_model = raw_model
if ddp:
    ddp_model = DDP(raw_model, device_ids=[local_rank] if device_type == "cuda" else None)


# -----------------------------------------------------------------------------
# learning rate, evaluation, checkpoints

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
def outputs(data, keep):
    """h (keep, D) and z (N, K) of the images of a Batches, in order, on the CPU; every rank takes its share of them."""
    if ddp: # the statistics of norms are each rank's own; those of rank 0 are saved
        for buffer in raw_model.buffers():
            torch.distributed.broadcast(buffer, 0)
    raw_model.eval()
    parts = []
    for first in range(rank * batch_size, len(data.y), world_size * batch_size):
        x, _ = data.fixed(first, min(batch_size, len(data.y) - first))
        with run.forward_pass(autocast, stop_non_finite):
            h = raw_model.features(x).float() # (B, D)
            z = raw_model.head(h) # (B, K)
        parts.append((first, h[:max(0, keep - first)].cpu(), z.cpu()))
    raw_model.train()
    parts = run.gather(parts)
    return torch.cat([h for _, h, _ in parts]), torch.cat([z for _, _, z in parts])


def quality(z, y):
    """The mean of -log p_y in nats, and the accuracy, of scores z (N, K)."""
    loss = F.cross_entropy(z.double(), y.cpu())
    correct = z.argmax(1) == y.cpu()
    return loss.item(), correct.double().mean().item()


def test():
    """
    Test the weights of the best epoch, of which every rank takes its share. Returns on rank 0: the numbers by name, the
    features h (N, D) of the test images, the mean of h in each class (K, D), and the arrays of predictions.npz by name;
    on the other ranks None.
    """
    if master: # from the disk: copies, not references to weights that moved on
        try:
            best = safe.load(os.path.join(out_dir, "best.pt"))
        except ValueError as e:
            raise SystemExit(f"{e}. Those of ckpt.pt, copied over it, can be tested by resuming") from None
        raw_model.load_state_dict(best["model"])
    if ddp:
        for tensor in raw_model.state_dict().values():
            torch.distributed.broadcast(tensor, 0)
    _, z_seen = outputs(seen_data, keep=0)
    h, z = outputs(test_data, keep=len(test_data.y))
    if not master:
        return None
    y, features = test_data.y.cpu().numpy(), h.numpy()
    loss, _ = quality(z, test_data.y)
    nll = F.cross_entropy(z.double(), test_data.y.cpu(), reduction="none").float().numpy()
    predictions = dict(y=y, predicted=z.argmax(1).numpy(), nll=nll)
    result = metrics.classification(y, predictions["predicted"], images.num_classes)
    class_means = metrics.class_means(features, y, images.num_classes)
    standardised = metrics.spectrum(metrics.standardised(features))
    probed = probing.probe(raw_model.head, h.to(device), test_data.y)
    with torch.no_grad():
        scores = raw_model.head.eval()(torch.as_tensor(class_means, dtype=torch.float32).to(device)) # (K, K)
    numbers = dict(
        train_loss=quality(z_seen, seen_data.y)[0], test_loss=loss, test_accuracy=result["accuracy"],
        f1_macro=result["f1_macro"], confusion=result["confusion"],
        pc2_ev=metrics.explained_variance(metrics.spectrum(features), 2),
        pca90=metrics.components_for(standardised, 0.9, cap=50),
        pca90_uncapped=metrics.components_for(standardised, 0.9),
        prototype_alignment=metrics.prototype_alignment(scores.cpu().numpy()),
        **{key: probed.get(key) for key in probing.OF_CLASSES})
    return numbers, h, class_means, predictions


def save(name):
    safe.save(os.path.join(out_dir, name), {
        "model": raw_model.state_dict(), "optimizer": opt.state_dict(), "scaler": scaler.state_dict(), "step": step,
        "best_accuracy": best_accuracy, "best_epoch": best_epoch, "evaluated_at": evaluated_at,
        "model_args": about["model_args"], "config": config, "data_hash": images.hash,
    }, keep=name == "ckpt.pt")


def stop_non_finite(loss, norm, at=None):
    """End the run at a step, by default the one that is made."""
    at = step + 1 if at is None else at
    advice = "a lower learning_rate, --grad_clip=1, or dtype=float32"
    run.stop_non_finite(out_dir, raw_model.head, opt, at, loss, norm, advice)


# -----------------------------------------------------------------------------
# what is said before the first step, and the run's folder

about = run.describe(raw_model, device_type, dtype)
print0(f"{dataset}: {len(train_data.y):,} training, {len(val_data.y):,} validation, {len(test_data.y):,} test images "
       f"({images.source}), {'x'.join(map(str, image_shape))}")
if images.note:
    print0(f"note: {images.note}")
print0(f"{model}: {about['num_params'] / 1e6:.2f}M parameters; head: {about['head']}")
print0(f"{steps_per_epoch:,} steps of {images_per_step:,} images per epoch, on {world_size} rank(s), "
       f"{device_type}, {dtype}")

cpu_seconds = run.cpu_seconds(out_dir, resumed_at) # of training
if master:
    data = dict(source=images.source, hash=images.hash, num_classes=images.num_classes, train_images=len(train_data.y),
                val_images=len(val_data.y), test_images=len(test_data.y))
    run.begin(out_dir, dict(about, script="train_vision.py", config=config, sources=sources, data=data), resumed_at)
wandb_run = run.start_wandb(config)
emissions = run.start_emissions(config, resumed_at, lambda: step)


# -----------------------------------------------------------------------------
# training

raw_model.train()
pending = [] # (loss, gradient norm) of the steps since the last log line, still on the device
seconds = 0.0 # of training since the last evaluation
first_step, width = step, len(str(epochs))
start, t0, cpu0 = time.time(), time.time(), time.process_time()
while True:

    # at the end of an epoch: validate, log, save. A run that is resumed may have done so at its first step
    epoch = step // steps_per_epoch
    is_evaluated = step % steps_per_epoch == 0 and (epoch % eval_interval == 0 or epoch == epochs)
    if is_evaluated and step != evaluated_at:
        h, z = outputs(val_data, keep=probing.PROBE_SIZE)
        val_loss, val_accuracy = quality(z, val_data.y)
        if not math.isfinite(val_loss): # before it is saved over a good checkpoint
            stop_non_finite(f"of the validation split {val_loss}", "not taken", at=step)
        improved = 100 * val_accuracy > 100 * best_accuracy + min_improvement
        if improved:
            best_accuracy, best_epoch = val_accuracy, epoch
        evaluated_at = step
        energy = emissions.read(step, val_loss=val_loss)
        if master:
            print0(f"epoch {epoch:>{width}}/{epochs} | val loss {val_loss:.4f} | val accuracy {val_accuracy:7.2%} | "
                   f"best {best_accuracy:7.2%} at epoch {best_epoch}{run.energy_text(energy)}")
            run.log(out_dir, dict(
                kind="eval", step=step, epoch=epoch, images=step * images_per_step, val_loss=val_loss,
                val_accuracy=val_accuracy, best_accuracy=best_accuracy, n=run.exponent(raw_model.head), seconds=seconds,
                cpu_seconds=cpu_seconds,
                **probing.probe(raw_model.head, h.to(device), val_data.y[:len(h)]), **energy), wandb_run)
            if improved:
                save("best.pt")
            save("ckpt.pt") # last: what it tells is there
        t0, cpu0, seconds = time.time(), time.process_time(), 0.0 # evaluation is not part of an epoch's time
    if is_evaluated and stops(epoch):
        break

    # one step
    lr = get_lr(epoch)
    for group in opt.param_groups:
        group["lr"] = lr
    x, y = train_data.train(step, rank, world_size)
    torch.manual_seed(hash((seed, step, rank))) # dropout and noise belong to the step: resuming changes nothing
    with run.forward_pass(autocast, stop_non_finite):
        loss = ddp_model(x, y)[1]
    scaler.scale(loss).backward()
    scaler.unscale_(opt)
    norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
    pending.append(torch.stack([loss.detach().float(), norm.float()]))

    # for a log line the numbers are read, one wait for the device, and have to be finite before the weights move
    is_last = halt.asked() # all ranks have the same answer
    is_logged = is_last or (step + 1) % log_interval == 0 or (step + 1) % steps_per_epoch == 0
    if is_logged:
        values = run.read_pending(pending, step + 1, scaler, stop_non_finite) # (steps, 2)
    scaler.step(opt)
    scaler.update()
    opt.zero_grad(set_to_none=True)
    step += 1

    if is_logged:
        mean_loss, last_norm = values[:, 0].mean().item(), values[-1, 1].item()
        t1, cpu1 = time.time(), time.process_time()
        ms = (t1 - t0) / len(values) * 1000 # per step
        seconds += t1 - t0
        cpu_seconds += cpu1 - cpu0
        t0, cpu0, pending = t1, cpu1, []
        eta = timedelta(seconds=round((t1 - start) / (step - first_step) * (epochs * steps_per_epoch - step)))
        print0(f"epoch {step / steps_per_epoch:>{width + 3}.2f}/{epochs} | loss {mean_loss:.4f} | lr {lr:.2e} | "
               f"norm {last_norm:7.3f} | {ms:7.1f} ms | {images_per_step / ms * 1000:>8,.0f} images/s | eta {eta}")
        if master:
            run.log(out_dir, dict(
                kind="train", step=step, epoch=epoch, images=step * images_per_step, loss=mean_loss, lr=lr,
                grad_norm=last_norm, ms=ms, cpu_seconds=cpu_seconds), wandb_run)
        emissions.note(step)
    if is_last:
        if master:
            save("ckpt.pt")
        halt.end(step, out_dir)


# -----------------------------------------------------------------------------
# the end result: the test images, for the first and only time

tested = test()
if master:
    numbers, h, class_means, predictions = tested
    rows = [row for row in run.read_metrics(out_dir)[0] if row["kind"] == "eval"]
    errors = [1 - row["val_accuracy"] for row in rows]
    seconds_per_epoch = [row["seconds"] / (row["epoch"] - before["epoch"]) for before, row in zip(rows, rows[1:])]
    energies = [row.get("energy_kwh_total") for row in rows]
    counted = None not in energies and energies == sorted(energies) # else emissions.csv was lost on the way
    summary = dict(
        epochs=epoch, step=step, images=step * images_per_step, best_epoch=best_epoch,
        best_share=best_epoch / epoch if epoch else None, val_accuracy=best_accuracy, **numbers,
        n=run.exponent(raw_model.head), num_params=about["num_params"],
        seconds_per_epoch=float(np.median(seconds_per_epoch)) if seconds_per_epoch else None,
        steps_to_90=metrics.time_to([row["step"] for row in rows], errors),
        energy_kwh_to_90=metrics.time_to(energies, errors) if counted else None,
        peak_memory_bytes=run.peak_memory(device_type), cpu_seconds=cpu_seconds,
        **{key: value for key, value in rows[-1].items() if key.endswith("_total")})
    run.save_probe(out_dir, h[:probing.PROBE_SIZE], test_data.y[:probing.PROBE_SIZE], class_means=class_means)
    run.save_arrays(out_dir, "predictions.npz", **predictions)
    safe.write(os.path.join(out_dir, "summary.json"), json.dumps(summary, indent=1))
    if plots:
        try:
            print0(f"curves and prototypes: {', '.join(figures.draw(out_dir))}")
        except (ImportError, OSError, ValueError) as e: # matplotlib, the disk, a damaged file
            print0(f"no curves.png and learned.png: {e}")
    print0(f"test accuracy {numbers['test_accuracy']:.2%}, macro F1 {numbers['f1_macro']:.4f} with the weights of "
           f"epoch {best_epoch}; PC2 EV {numbers['pc2_ev']:.3f}, PCA@90% {numbers['pca90_uncapped']}, "
           f"nearest class mean {numbers['mean_accuracy'] or 0:.2%}")
    print0(f"energy: {emissions.describe()}")
if ddp: # no rank leaves while another still works
    torch.distributed.barrier()
run.closing.close()
