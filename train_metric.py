"""
Train embeddings of images by one of seven metric-learning losses, or by any distance head, and measure what it does to
the spread of the classes, how greedily it optimises, and how well it retrieves. Read model_metric.py, then this file
from top to bottom; what surrounds the loop is in run.py.

scikit-learn's digits, half of their classes held out, no download, half a minute:
$ python train_metric.py config/metric_digits.py --loss=triplet
$ python train_metric.py config/metric_digits.py --loss=head --distance=euclidean
A loss of pairs with another distance between them:
$ python train_metric.py config/metric_digits.py --loss=contrastive --distance=manhattan
Your own images, a folder for each class:
$ python train_metric.py --dataset=cars --image_size=224 --model=resnet50 --loss=scl --held_out=98
On the features of a trained net, of this repository or a ViT of transformers:
$ python train_metric.py --dataset=mnist --frozen=out/mnist_mlp --loss=scl
$ python train_metric.py --dataset=cub --image_size=224 --frozen=google/vit-base-patch32-224-in21k --loss=triplet
Go on with a run that was stopped:
$ python train_metric.py --init_from=resume --out_dir=out/metric_digits
All losses, then their tables and figure:
$ python study.py config/study_metric_digits.py
$ python figures_metric.py out/study_metric_digits

A part of the training images is set aside for validation, on which every number of an evaluation is taken. Nothing is
chosen by it: the weights at the end are tested, as what is compared is what a loss does in so many steps. The test
images are touched once, those of the classes that were trained on and those of the classes held out. The files in a
run's folder are listed in run.py.
"""
import json
import math
import os
import time
from dataclasses import fields
from datetime import timedelta

import numpy as np
import torch

import metrics
import probing
import run
import safe
from configurator import fail
from data_metric import ClassBatches, load_any, parts
from data_vision import AUGMENTATIONS, STATS, Batches
from model_vision import BACKBONES
from run import print0

# -----------------------------------------------------------------------------
# defaults: the optimizer, batch and epochs of Variance & Greediness, with an MLP on scikit-learn's digits
# I/O
out_dir = "out/metric_digits" # the run's folder
overwrite = False # True: start afresh in an out_dir that holds a run already
init_from = "scratch" # or 'resume'
eval_interval = 1 # epochs between evaluations; each also writes a checkpoint and a row of emissions.csv
log_interval = 100 # steps between log lines; there is one at each epoch's end as well
wandb_log = False # also log to Weights & Biases
tracker = "wandb" # or 'trackio', which takes its place and keeps all on this machine
wandb_project = "distance-heads"
wandb_run_name = "" # '': the name of out_dir
wandb_mode = "online" # or 'offline', which needs neither key nor network
# data
data_dir = "data" # where datasets lie, a folder each
dataset = "digits" # 'digits', 'mnist', 'fashion_mnist', 'cifar10', 'cifar100', or a folder of images in data_dir
held_out = 0 # classes that are not trained on, drawn by the seed: for retrieval and a linear probe
val_fraction = 0.1 # of the training images, for validation
batch_size = 512 # images per step, as many of each class
classes_per_batch = 0 # 0: all of them
augment = "none" # 'crop' (and rotate), 'standard' (and flip), 'strong' (and colours)
normalize = "half" # (x - 0.5) / 0.5, or 'digits', 'mnist', 'cifar10', 'cifar100': the dataset's mean and deviation
image_size = 0 # pixels, to resize to; 0: as they are
channels = 0 # 3: grey images in three channels; 0: as they are
# model
model = "mlp" # 'pixels' (no backbone), 'mlp', 'cnn', 'resnet50', 'pvtv2_b0', 'vgg16', 'vit_tiny'
frozen = "" # in its place a trained net whose weights stay: a run's folder, or a ViT of transformers by name
embedding_size = 128
# loss, with the library's margins and temperatures
# 'contrastive', 'triplet', 'npair', 'infonce', 'arcface', 'scl', 'ccl', or 'head': an output layer of distances.py
loss = "contrastive"
pos_margin = 0.0 # of contrastive
neg_margin = 1.0
triplet_margin = 0.05
infonce_temperature = 0.07
arcface_margin = 28.6 # degrees
arcface_scale = 64.0
scl_temperature = 0.1
ccl_margin = 0.2
ccl_scale = 64.0
ccl_weight = 1.0 # of the distance to the own centre
# the head of loss=head, see `python distances.py`; with another loss the distance between samples, where 'baseline' is
# the library's own
distance = "baseline"
variant = "" # '': the distance's default
distance_params = "" # such as 'p=3'
link = "harmonic" # p proportional to d^-n, or 'softmin': to exp(-n d)
n = 1.0 # the exponent
learn_n = False # learn log n, from n
eps = 1e-4 # where it enters is part of each distance's formula
feature_scale = 1.0 # embeddings are multiplied by it before the head
active_fraction = 0.5 # of smooth losses: a sample is active whose gradient exceeds this part of the largest
# optimizer
learning_rate = 1e-4 # of Adam; with weight_decay of AdamW
epochs = 100
weight_decay = 0.0 # of matrices and kernels; not of norms, biases, and what the loss learns
beta1 = 0.9
beta2 = 0.999
grad_clip = 0.0 # clip the gradient's norm at this value, 0: never
# energy
country_iso_code = "USA" # whose grid's average g CO2eq per kWh
carbon_intensity = 0.0 # g CO2eq per kWh of your own grid, instead; 0: the country's
track_emissions = True
# system
time_limit = 0.0 # minutes after which the run saves itself and ends with exit code 124, to be resumed; 0: none
seed = 1337 # of initial weights, the classes held out, the validation split, the batches and their augmentation
device = "auto" # 'cuda', 'mps', 'cpu', or the first of these that there is
dtype = "auto" # 'float32', 'bfloat16', 'float16' (with loss scaling); auto: bfloat16 where a GPU has it, else float32
threads = 0 # of torch on the CPU, 0: its own choice
# -----------------------------------------------------------------------------
config, sources, saved, problems = run.configure(globals()) # problems: all that cannot run, for one report
LOSS_SIZE = 128 # validation samples on which the loss is taken: triplets grow with the cube
PROBE_TRAIN = 2000 # training images of the classes held out that a linear probe is fitted on


# -----------------------------------------------------------------------------
# checks

problems += run.check(config, model=BACKBONES, normalize=STATS, augment=AUGMENTATIONS, init_from=("scratch", "resume"))
if "RANK" in os.environ and run.ranks()[2] > 1:
    problems.append(f"{run.ranks()[2]} ranks: the pairs of a batch lie on one device, start it without torchrun")
device, device_type, dtype = run.choose_device(device, dtype, problems) # "auto" no more
try:
    from model_metric import HINGES, EmbeddingNet, MetricConfig, active_terms, class_spacing, gradient_norms, retrieval
except ImportError as e:
    problems.append(str(e))
if not problems: # else the data could not be read
    try:
        images = load_any(dataset, data_dir, image_size)
        sets = parts(images, held_out, val_fraction, seed)
        C, H, W = images.train_x.shape[1:]
        image_shape = (channels or C, image_size or H, image_size or W) # as the model sees them
        num_means = len(STATS[normalize][0])
        if normalize != "half" and num_means not in (1, channels or C):
            problems.append(f"normalize is {normalize!r}, of {num_means} channels, but {dataset} has {C}: use half")
        arguments = {f.name: config[f.name] for f in fields(MetricConfig) if f.name in config}
        torch.manual_seed(seed)
        net = EmbeddingNet(MetricConfig(**arguments, num_classes=len(sets.classes), image_shape=image_shape))
        if not problems:
            train_data = ClassBatches(*sets.train, batch_size, classes_per_batch, seed, normalize, augment,
                                      image_size, channels, device)
    except (ImportError, ValueError, OSError) as e:
        problems.append(str(e))
fail(problems)

halt = run.guard(config) # out_dir is this run's own; a signal or time_limit ends it after a whole step
if threads:
    torch.set_num_threads(threads)
autocast, scaler = run.precision(device_type, dtype)


# -----------------------------------------------------------------------------
# batches, net and optimizer

def batches(x, y):
    """Batches of images x (N, C, H, W) with labels y (N,), as they are."""
    return Batches(x, y, batch_size, seed, normalize, "none", image_size, channels, device)


val_data = batches(*sets.val)
steps_per_epoch, images_per_step = train_data.steps_per_epoch, train_data.batch_size
net.to(device)
if loss == "head":
    net.head.validate = False # it waits for the device; labels are checked, and a loss that is not finite stops the run
groups = run.parameter_groups(net, weight_decay)
opt = torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), fused=device_type != "mps")

step, resumed_at, evaluated_at = 0, None, None
if init_from == "resume":
    fixed_settings = ("seed", "val_fraction", "held_out", "batch_size", "classes_per_batch")
    ckpt = run.load_checkpoint(out_dir, net, config, images.hash, fixed_settings)
    run.load_optimizer(opt, ckpt["optimizer"])
    for group in opt.param_groups: # there is no schedule that would set it
        group["lr"] = learning_rate
    scaler.load_state_dict(ckpt["scaler"])
    step, evaluated_at = ckpt["step"], ckpt["evaluated_at"]
    resumed_at = step
    if step >= epochs * steps_per_epoch and os.path.exists(os.path.join(out_dir, "summary.json")):
        print0(f"nothing to do: {out_dir} has ended at epoch {step // steps_per_epoch}")
        raise SystemExit


# -----------------------------------------------------------------------------
# evaluation, checkpoints

@torch.no_grad()
def embeddings(data):
    """e (N, D) of the images of a Batches and their labels y (N,), in order, on the CPU."""
    net.eval()
    found = []
    for first in range(0, len(data.y), batch_size):
        x, _ = data.fixed(first, min(batch_size, len(data.y) - first))
        with run.forward_pass(autocast, stop_non_finite):
            found.append(net.features(x).cpu())
    net.train()
    return torch.cat(found), data.y.cpu()


def geometry(e, y):
    """Numbers by name of embeddings e (N, D) with labels y (N,), their variance, spacing and rank; None for nan."""
    h, y = e.double().numpy(), y.numpy()
    variance, spacing = metrics.class_variance(h, y), class_spacing(h, y)
    found = dict(intra_variance=variance["intra"], inter_variance=variance["inter"], variance_ratio=variance["ratio"],
                 class_distance=spacing["mean"], class_distance_cv=spacing["cv"],
                 effective_rank=metrics.effective_rank(metrics.spectrum(h)))
    return {key: value if math.isfinite(value) else None for key, value in found.items()}


def greediness(e, y):
    """The loss of some embeddings, spread evenly over e (N, D), and how many of them it still works on."""
    chosen = torch.linspace(0, len(y) - 1, min(len(y), LOSS_SIZE)).long()
    e, y = e[chosen].to(device), y[chosen].to(device)
    with torch.no_grad():
        net.eval()
        value = net.loss(e, y).item()
        net.train()
    norms = gradient_norms(net, e, y).cpu().numpy()
    if loss in HINGES:
        active = active_terms(net, e, y)
    else:
        active = metrics.active_ratio(norms, active_fraction) if np.isfinite(norms).all() else math.nan
    active = active if math.isfinite(active) else None
    return dict(val_loss=value, active_ratio=active, h_grad_norm=float(norms.mean()))


def linear_probe():
    """The test accuracy of logistic regression on the embeddings of the classes held out."""
    from sklearn.linear_model import LogisticRegression
    e, y = embeddings(batches(*sets.other_train))
    chosen = torch.linspace(0, len(y) - 1, min(len(y), PROBE_TRAIN)).long()
    fitted = LogisticRegression(max_iter=1000).fit(e[chosen].numpy(), y[chosen].numpy())
    return fitted.score(*(part.numpy() for part in embeddings(batches(*sets.other_test))))


def test():
    """The numbers of the end, by name: of the test images of the trained classes, and of those of the others."""
    e, y = embeddings(batches(*sets.test))
    found = retrieval(e, y)
    result = dict(test_accuracy=found["recall_at_1"], **found)
    result |= {f"test_{key}": value for key, value in geometry(e, y).items()}
    if held_out:
        other_e, other_y = embeddings(batches(*sets.other_test))
        result |= {f"zero_shot_{key}": value for key, value in retrieval(other_e, other_y).items()}
        result["probe_accuracy"] = linear_probe()
    return result, e, y


def save():
    safe.save(os.path.join(out_dir, "ckpt.pt"), {
        "model": net.state_dict(), "optimizer": opt.state_dict(), "scaler": scaler.state_dict(), "step": step,
        "evaluated_at": evaluated_at, "model_args": about["model_args"], "config": config, "data_hash": images.hash,
    }, keep=True)


def stop_non_finite(value, norm, at=None):
    """End the run at a step, by default the one that is made."""
    at = step + 1 if at is None else at
    advice = "a lower learning_rate, --grad_clip=1, or dtype=float32"
    run.stop_non_finite(out_dir, net.head, opt, at, value, norm, advice)


# -----------------------------------------------------------------------------
# what is said before the first step, and the run's folder

about = run.describe(net, device_type, dtype)
print0(f"{dataset}: {len(sets.train[1]):,} training, {len(sets.val[1]):,} validation and {len(sets.test[1]):,} test "
       f"images of {len(sets.classes)} classes, {len(sets.other_test[1]):,} of {held_out} held out ({images.source})")
if images.note:
    print0(f"note: {images.note}")
print0(f"{frozen or model}: {about['num_params'] / 1e6:.2f}M parameters; loss: {about['head']}")
print0(f"{steps_per_epoch:,} steps of {images_per_step:,} images per epoch, {train_data.per_class} of each class, "
       f"{device_type}, {dtype}")
run.begin(out_dir, dict(
    about, script="train_metric.py", config=config, sources=sources,
    data=dict(source=images.source, hash=images.hash, num_classes=len(sets.classes), classes=sets.classes,
              train_images=len(sets.train[1]), val_images=len(sets.val[1]), test_images=len(sets.test[1]),
              zero_shot_images=len(sets.other_test[1]))), resumed_at)
wandb_run = run.start_wandb(config)
emissions = run.start_emissions(config, resumed_at, lambda: step)


# -----------------------------------------------------------------------------
# training

net.train()
pending = [] # (loss, gradient norm) of the steps since the last log line, still on the device
seconds = 0.0 # of training since the last evaluation
first_step, width = step, len(str(epochs))
start = t0 = time.time()
while True:

    # at the end of an epoch: evaluate, log, save. A run that is resumed may have done so at its first step
    epoch = step // steps_per_epoch
    is_evaluated = step % steps_per_epoch == 0 and (epoch % eval_interval == 0 or epoch == epochs)
    if is_evaluated and step != evaluated_at:
        e, y = embeddings(val_data)
        if not e.isfinite().all():
            stop_non_finite("of the validation split nan", "not taken", at=step)
        greedy, found = greediness(e, y), retrieval(e, y)
        if not math.isfinite(greedy["val_loss"]): # before it is saved over a good checkpoint
            stop_non_finite(f"of the validation split {greedy['val_loss']}", "not taken", at=step)
        evaluated_at = step
        energy = emissions.read(step, val_loss=greedy["val_loss"])
        spread = geometry(e, y)
        print0(f"epoch {epoch:>{width}}/{epochs} | val loss {greedy['val_loss']:.4f} | recall@1 "
               f"{found['recall_at_1']:7.2%} | MAP@R {found['map_at_r']:.3f} | within {spread['intra_variance']:.4f}, "
               f"between {spread['inter_variance']:.4f} | active {greedy['active_ratio'] or 0:.3f}"
               f"{run.energy_text(energy)}")
        run.log(out_dir, dict(
            kind="eval", step=step, epoch=epoch, images=step * images_per_step, val_accuracy=found["recall_at_1"],
            val_map_at_r=found["map_at_r"], n=run.exponent(net.head), seconds=seconds, **greedy, **spread, **energy),
            wandb_run)
        save()
        t0, seconds = time.time(), 0.0 # evaluation is not part of an epoch's time
    if step >= epochs * steps_per_epoch:
        break

    # one step
    x, y = train_data.train(step)
    torch.manual_seed(hash((seed, step))) # dropout and noise belong to the step: resuming changes nothing
    with run.forward_pass(autocast, stop_non_finite):
        value = net(x, y)
    scaler.scale(value).backward()
    scaler.unscale_(opt)
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip or math.inf)
    pending.append(torch.stack([value.detach().float(), norm.float()]))

    # for a log line the numbers are read, one wait for the device, and have to be finite before the weights move
    is_last = halt.asked()
    is_logged = is_last or (step + 1) % log_interval == 0 or (step + 1) % steps_per_epoch == 0
    if is_logged:
        values = run.read_pending(pending, step + 1, scaler, stop_non_finite) # (steps, 2)
    scaler.step(opt)
    scaler.update()
    opt.zero_grad(set_to_none=True)
    step += 1

    if is_logged:
        t1 = time.time()
        ms = (t1 - t0) / len(values) * 1000 # per step
        seconds += t1 - t0
        t0, pending = t1, []
        eta = timedelta(seconds=round((t1 - start) / (step - first_step) * (epochs * steps_per_epoch - step)))
        print0(f"epoch {step / steps_per_epoch:>{width + 3}.2f}/{epochs} | loss {values[:, 0].mean():.4f} | "
               f"norm {values[-1, 1]:7.3f} | {ms:7.1f} ms | {images_per_step / ms * 1000:>8,.0f} images/s | eta {eta}")
        run.log(out_dir, dict(
            kind="train", step=step, epoch=epoch, images=step * images_per_step, loss=values[:, 0].mean().item(),
            lr=learning_rate, grad_norm=values[-1, 1].item(), ms=ms), wandb_run)
        emissions.note(step)
    if is_last:
        save()
        halt.end(step, out_dir)


# -----------------------------------------------------------------------------
# the end result: the test images, for the first and only time

def steps_to_90(values):
    """The step at which 90% of the fall of these values, one for each evaluation, was made; None where none fell."""
    return metrics.time_to([row["step"] for row in rows], values)


numbers, e, y = test()
rows = [row for row in run.read_metrics(out_dir)[0] if row["kind"] == "eval"]
seconds_per_epoch = [row["seconds"] / (row["epoch"] - before["epoch"]) for before, row in zip(rows, rows[1:])]
summary = dict(
    epochs=epoch, step=step, images=step * images_per_step, val_accuracy=rows[-1]["val_accuracy"], **numbers,
    n=run.exponent(net.head), num_params=about["num_params"],
    seconds_per_epoch=float(np.median(seconds_per_epoch)) if seconds_per_epoch else None,
    steps_to_90=steps_to_90([1 - row["val_accuracy"] for row in rows]),
    loss_steps_to_90=steps_to_90([row["val_loss"] for row in rows]),
    peak_memory_bytes=run.peak_memory(device_type),
    **{key: value for key, value in rows[-1].items() if key.endswith("_total")})
probed = torch.linspace(0, len(y) - 1, min(len(y), probing.PROBE_SIZE)).long()
class_means = metrics.class_means(e.double().numpy(), y.numpy(), len(sets.classes))
run.save_probe(out_dir, e[probed], y[probed], class_means=class_means)
safe.write(os.path.join(out_dir, "summary.json"), json.dumps(summary, indent=1))
others = f", of classes held out {numbers['zero_shot_recall_at_1']:.2%}" if held_out else ""
print0(f"test recall@1 {numbers['recall_at_1']:.2%}, MAP@R {numbers['map_at_r']:.3f}{others}")
print0(f"energy: {emissions.describe()}")
run.closing.close()
