"""
The small studies: what a distance head does where one can see all of it. Twenty seeds train at once, as one batch of
nets (model_toy.py), and each leaves a run's folder of its own, so that report.py pairs and averages them as any others.

Modular addition, Figure 9 of "Non-Euclidean Harmonic Losses" and its comparison of seeds (Baek et al.):
$ python train_toy.py config/toy_modular.py
$ python train_toy.py config/toy_case.py
What that paper's theorems say, on points in the plane:
$ python train_toy.py config/toy_points.py
Oursland's two-layer nets on MNIST, or on the digits without a download; a night on a CPU, minutes on a GPU:
$ python train_toy.py config/toy_two_layer.py --dataset=mnist
Their figure and their table again, from the folders:
$ python figures_toy.py out/toy_modular

A study is a grid of groups, the heads or nets of one; a group is a batch of seeds. A seed that has ended is skipped,
one that was stopped half-way starts anew. The held-out part is watched over time, since when it is learned is what is
studied: val_accuracy in metrics.jsonl is its course, test_accuracy in summary.json its value after the last epoch.
Nothing is chosen by it. A folder has no ckpt.pt and no emissions.csv: a run is not resumed, and its energy is not
measured.
"""
import functools
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

import figures_toy
import metrics
import model_toy
import probing
import run
import safe
from configurator import configure, fail
from data_vision import load
from distances import LINKS, DistanceHead, parse_head
from model_toy import Net, Seeds, losses, spread
from study import all_heads, words

# -----------------------------------------------------------------------------
# defaults: modular addition with the linear head, its two controls and Euclid; a minute and a half each
# I/O
out_dir = "out/toy_modular" # the study's folder: a folder per group, in it one per seed
overwrite = False # True: train again what has ended
eval_interval = 5 # epochs between evaluations
plots = True # the figure and the table at the end
# the grid
study = "modular" # 'modular', 'points' (in the plane), 'two_layer'
# of modular: 'mlp', 'transformer'; of two_layer: 'relu', 'abs2_neg', 'relu2_bias', 'abs_l2' and so on; or 'all'
models = "mlp"
# comma separated distance[:variant][:name=value], or 'all' of them, as in study.py. Two linear heads are controls
# beside them: 'stablemax', and 'matched', whose scores have at each epoch the spread that Euclid's have at the first n
heads = "baseline,matched,stablemax,euclidean"
ns = "2" # comma separated exponents of the distance; Baek et al. count on d^2, where 1 is 2 here
link = "harmonic" # or 'softmin', 'gaussian'
eps = 1e-4
seeds = 20 # how many, from seed on
seed = 0 # the first: of initial weights, splits or points, and the order of batches
# data
prime = 31 # of modular
train_fraction = 0.8 # of all pairs, drawn without replacement
with_replacement = False # of modular: as in the published code, where about half of the test pairs are trained on
point_set = "separable" # of points: or 'skewed'
dataset = "digits" # of two_layer: or 'mnist'
data_dir = "data"
inputs = "raw" # of two_layer: 0 to 255, or 'standard': zero mean and unit variance
# model
tied = True # of modular: the embedding is the matrix of prototypes
# optimizer
optimizer = "adamw" # or 'sgd', without momentum
learning_rate = 2e-3
weight_decay = 0.01 # of matrices
batch_size = 32 # 0: all
epochs = 1000
# of modular: times the mean over dimensions of the embedding's RMS. Published is 0.01, without effect on tied MLPs, as
# the code takes the .data of the tensor, which has no gradient
embedding_penalty = 0.0
# system
device = "auto"
threads = 0 # of torch on the CPU, 0: its own choice
# -----------------------------------------------------------------------------
CONTROLS = {"baseline": "linear", "matched": "linear, Euclid's scale", "stablemax": "linear, StableMax"}
GRID = ("models", "heads", "ns", "seeds") # they say which runs there are, and not what one is
# what runs of one study may differ in
UNLIKE = ("out_dir", "overwrite", "plots", "device", "threads", "data_dir", "eval_interval")
_LEVEL, _WINDOW = 0.9, 20 # an accuracy is reached when it is above 0.9 on average over 20 epochs


@dataclass
class Group:
    """Seeds that train at once."""
    name: str # of its folder
    label: str # in tables
    config: dict # what tells it from the others
    make: Callable # returns a net
    follows: str = "" # the Group whose scale its scores are given


# -----------------------------------------------------------------------------
# the grid

def chosen(key, everything):
    """The words of a setting of the grid; 'all': everything. Raises ValueError where it names nothing."""
    setting = globals()[key]
    found = list(everything) if setting == "all" else words(setting)
    if not found:
        raise ValueError(f"{key} is {setting!r}: name one at least, or write all")
    return found


def exponents():
    """The numbers of ns. Raises ValueError for what is no exponent."""
    try:
        numbers = [float(word) for word in words(ns)]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < n < math.inf for n in numbers):
        raise ValueError(f"ns is {ns!r}: write numbers > 0, comma separated, such as 1,2,4,16")
    return numbers


def head_groups(model, net):
    """The Groups of a model with every head of the grid. net(output=None, **arguments of DistanceHead) makes one."""
    groups, listed = [], exponents()
    for word in chosen("heads", all_heads()):
        if word in CONTROLS:
            groups.append(linear_group(model, word, net, listed[0]))
        else:
            groups += [head_group(model, word, net, n) for n in listed]
    names = {group.name for group in groups}
    for group in groups:
        if group.follows and group.follows not in names:
            raise ValueError(f"heads is {heads!r}: 'matched' has the scale of euclidean, which has to be there too")
    return sorted(groups, key=lambda group: group.follows != "") # after what they follow


def head_group(model, word, net, n):
    """The Group of a distance head. Raises ValueError for what is no head."""
    arguments, scales = parse_head(word), {"link": link, "eps": eps}
    distance, params = arguments["distance"], words_of_numbers(arguments)
    variant = DistanceHead(2, 2, **arguments, **scales).variant
    parts = model, distance, variant, params.replace("=", ""), "" if link == "harmonic" else link, f"n{n:g}"
    config = dict(model=model, distance=distance, variant=variant, distance_params=params, n=n, control="")
    label = f"{word} n={n:g}" if link == "harmonic" else f"{word} {link} n={n:g}"
    make = functools.partial(net, n=n, **arguments, **scales)
    return Group("_".join(filter(None, parts)), label, config, make)


def words_of_numbers(arguments):
    numbers = {name: x for name, x in arguments.items() if name not in ("distance", "variant")}
    return ",".join(f"{name}={x:g}" for name, x in numbers.items())


def linear_group(model, word, net, n):
    """The Group of the linear head, or of one of its controls."""
    output, follows, label = None, "", CONTROLS[word]
    if word == "stablemax":
        output = model_toy.stablemax
    if word == "matched":
        follows, label = head_group(model, "euclidean", net, n).name, f"{label} at n={n:g}"
    config = dict(model=model, distance="baseline", variant="", distance_params="", n=n,
                  control="" if word == "baseline" else label)
    make = functools.partial(net, output=output, distance="baseline")
    return Group(f"{model}_{word}", label, config, make, follows)


def make_study():
    """(Task, Groups) of the study. Raises ValueError, OSError or ImportError for what cannot run."""
    if study == "two_layer":
        task = model_toy.pictures(load(dataset, data_dir), inputs)
        return task, two_layer_groups(task)
    data = functools.partial(model_toy.points, point_set)
    if study == "modular":
        data = functools.partial(model_toy.modular_addition, prime, train_fraction, with_replacement=with_replacement)
    task = data(all_seeds())
    if study == "points":
        return task, head_groups("points", point_net)
    groups = []
    for model in chosen("models", model_toy.MODULAR):
        check_word(model, model_toy.MODULAR)
        net = functools.partial(model_toy.modular_net, model, prime, tied)
        groups += head_groups(model, net)
    return task, groups


def two_layer_groups(task):
    nets, groups = model_toy.two_layer_nets(), []
    for model in chosen("models", nets):
        check_word(model, nets)
        distance, variant = ("offset_l2", "standard") if nets[model].l2 else ("baseline", "")
        config = dict(model=model, distance=distance, variant=variant, distance_params="", n=1.0, control="")
        make = functools.partial(nets[model].net, task.train_x.shape[-1], classes=task.num_classes)
        groups.append(Group(model, model, config, make))
    return groups


def point_net(output=None, **arguments):
    """Points are their own features."""
    return Net(torch.nn.Identity(), DistanceHead(2, 3, **arguments), output)


def check_word(model, legal):
    if model not in legal:
        raise ValueError(f"models: there is no {model!r}, only {', '.join(legal)}")


def all_seeds():
    return range(seed, seed + seeds)


# -----------------------------------------------------------------------------
# what is measured, a number for each seed

@torch.no_grad()
def evaluate(batch, task):
    """Numbers by name, each a list over seeds."""
    batch.net.eval()
    h, z = batch(task.train_x, task.shared)
    found = dict(train_loss=losses(z, task.train_y), train_accuracy=(z.argmax(2) == task.train_y).double().mean(1),
                 score_scale=spread(z))
    if study == "points":
        found |= on_points(batch, z, task)
    if study == "two_layer":
        found |= activity(batch.net, h, z)
    _, z = batch(task.test_x, task.shared)
    found |= dict(val_loss=losses(z, task.test_y), val_accuracy=(z.argmax(2) == task.test_y).double().mean(1),
                  prototype_norm=batch.prototypes.norm(dim=2).mean(1))
    batch.net.train()
    numbers = {name: x.double().tolist() for name, x in found.items()}
    if study == "modular":
        embeddings = batch.params["backbone.embedding.weight"].detach().cpu().double().numpy() # (S, p, D)
        numbers["embedding_pc2_ev"], numbers["circularity"] = zip(*map(shape_of, embeddings))
    return numbers


def shape_of(embedding):
    """The share of the variance of its top two components, and its circularity; nan where it is not finite."""
    if not np.isfinite(embedding).all():
        return math.nan, math.nan
    return metrics.explained_variance(metrics.spectrum(embedding), 2), metrics.circularity(embedding)


def on_points(batch, z, task):
    """
    Of the theorems: the margin, min over the points of (d to the nearest other prototype) - (d to the own), positive
    where all are separated (Definition 2 has it with the sign reversed, and then divides by it); the bound of Theorem
    2 without its constant and its second term, R |W| / (margin sqrt N), with R the largest |x| and |W| the Frobenius
    norm, nan unless the margin is positive; and how far prototypes are from their class's centres, as shares of its
    spread.
    """
    x, y, prototypes = task.train_x, task.train_y, batch.prototypes
    d = -z / batch.net.head.fixed_n # of the linear head, whose n is 1, and of softmin
    if batch.net.head.link == "harmonic":
        d = d.exp()
    elif batch.net.head.link == "gaussian":
        d = d.sqrt()
    own = d.gather(2, y[..., None])[..., 0] # (S, N)
    other = d.scatter(2, y[..., None], math.inf).amin(2)
    margin = (other - own).amin(1) # (S,)
    capacity = x.norm(dim=2).amax(1) * prototypes.flatten(1).norm(dim=1)
    bound = capacity / (margin * x.shape[1] ** 0.5)
    found = dict(margin=margin, bound=bound.where(margin > 0, math.nan))
    for name, centres in task.centres.items():
        found[f"to_{name}"] = ((prototypes - centres).norm(dim=2) / task.spreads).mean(1)
    return found


def activity(net, h, z):
    """Shares of hidden and of output nodes that are active for no image, for under 1%, and for under 5% of them."""
    found = {}
    for name, x in (("hidden", h), ("output", z)):
        active = (x.abs() > 1e-6).double().mean(1) # (S, nodes), the published threshold
        for word, share in (("dead", 0.0), ("rare1", 0.01), ("rare5", 0.05)):
            few = active == 0 if share == 0 else active < share
            found[f"{name}_{word}"] = few.double().mean(1)
    return found


# -----------------------------------------------------------------------------
# a group

def start(group, task, batch, todo, config, sources):
    """Write config.json of each seed that is to be trained. Returns their folders."""
    folders = []
    for seed_i in todo:
        folder = folder_of(group.name, seed_i)
        os.makedirs(folder, exist_ok=True)
        if os.path.exists(os.path.join(folder, "error.txt")):
            os.remove(os.path.join(folder, "error.txt"))
        data = dict(source=task.source, hash=task.hash, num_classes=task.num_classes)
        num_params = sum(p.numel() for p in batch.net.parameters())
        run.begin(folder, dict(
            script="train_toy.py", config=run_config(group, seed_i, config), data=data,
            sources={**sources, "n": "command line" if len(words(ns)) > 1 else "default"}, # for results.head_of
            label=group.label, head=batch.net.head.extra_repr(), n=run.exponent(batch.net.head),
            seeds_at_once=len(todo), num_params=num_params, model_args={},
            device=device_type, device_name=run.device_name(device_type),
            dtype="float32", world_size=1))
        folders.append(folder)
    return folders


def run_config(group, seed_i, config):
    """The settings of one seed's run, with those that results.py knows a head by."""
    settings = {key: value for key, value in config.items() if key not in GRID}
    data_name = {"modular": f"modular_{prime}", "points": point_set, "two_layer": dataset}[study]
    fixed = dict(learn_n=False, feature_scale=1.0, grad_clip=0.0)
    return {**settings, **fixed, "dataset": data_name, **group.config, "seed": seed_i}


def unfinished(group, config):
    """
    The seeds that are still to be trained: those without summary.json and without error.txt. Raises ValueError where
    a folder's run has other settings.
    """
    todo = []
    for seed_i in all_seeds():
        folder = folder_of(group.name, seed_i)
        has_ended = any(os.path.exists(os.path.join(folder, name)) for name in ("summary.json", "error.txt"))
        if overwrite or not has_ended:
            todo.append(seed_i)
            continue
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            saved = json.load(f)["config"]
        for key, value in run_config(group, seed_i, config).items():
            if key not in UNLIKE and saved.get(key) != value:
                raise ValueError(f"{folder} has a run with {key} {saved.get(key)!r}, here it is {value!r}: write "
                                 "elsewhere (--out_dir=...), or discard it (--overwrite=true)")
    return todo


def folder_of(name, seed_i):
    return os.path.join(out_dir, name, f"s{seed_i}")


def followed_scale(group, todo):
    """(epochs (E,), the scale of the scores of the Group that this one follows, (seeds, E))."""
    courses = [safe.read_metrics(folder_of(group.follows, seed_i))[0] for seed_i in todo]
    scales = [[row["score_scale"] for row in rows] for rows in courses]
    return [row["epoch"] for row in courses[0]], np.array(scales)


def make_optimizer(batch):
    decay, _ = run.parameter_groups(batch.net, weight_decay) # of the net alone: a matrix of many seeds has three
    decaying = {id(p) for p in decay["params"]}
    names = {name for name, p in batch.net.named_parameters() if id(p) in decaying}
    groups = [dict(params=[p for name, p in batch.params.items() if name in names], weight_decay=weight_decay),
              dict(params=[p for name, p in batch.params.items() if name not in names], weight_decay=0.0)]
    if optimizer == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate)
    return torch.optim.AdamW(groups, lr=learning_rate, fused=device_type != "mps")


def batches(task, seed_numbers, epoch):
    """
    The batches x (S, B, ...), y (S, B) of an epoch, and whether the seeds share them. The order is a function of the
    seed and the epoch alone; what is left over is dropped.
    """
    N = task.train_y.shape[-1]
    if batch_size == 0 or batch_size >= N:
        yield task.train_x, task.train_y, task.shared
        return
    orders = np.stack([np.random.RandomState([s, epoch]).permutation(N) for s in seed_numbers])
    orders = torch.from_numpy(orders).to(task.train_y.device)
    for i in range(0, N - batch_size + 1, batch_size):
        rows = orders[:, i:i + batch_size] # (S, B)
        if task.shared:
            yield task.train_x[rows], task.train_y[rows], False
        else:
            s = torch.arange(len(rows), device=rows.device)[:, None]
            yield task.train_x[s, rows], task.train_y[s, rows], False


def train(group, task, todo, config, sources):
    """Train the seeds of a group from their first to their last epoch, and write their folders."""
    is_small = study != "two_layer" # (S, N, K, D) of all images is not
    batch = Seeds(group.make, todo, device, exact=is_small)
    follows = followed_scale(group, todo) if group.follows else None
    folders, opt = start(group, task, batch, todo, config, sources), make_optimizer(batch)
    courses, broken = [[] for _ in todo], set()
    step, width, t0 = 0, len(str(epochs)), time.time()
    for epoch in range(epochs + 1):
        if follows is not None:
            batch.scale = torch.tensor([np.interp(epoch, follows[0], scales) for scales in follows[1]]).to(device)

        # at the end of an epoch, and before the first: evaluate
        if epoch % eval_interval == 0 or epoch == epochs:
            numbers = evaluate(batch, task)
            for i, folder in enumerate(folders):
                row = dict(kind="eval", step=step, epoch=epoch, n=run.exponent(batch.net.head),
                           **{name: finite(values[i]) for name, values in numbers.items()})
                if i in broken:
                    continue
                if None in (row["train_loss"], row["score_scale"]): # a loss is finite beside an infinitely far class
                    what = "loss is" if row["train_loss"] is None else "scores are"
                    why = f"the {what} not finite at epoch {epoch}"
                    broken.add(i)
                    safe.write(os.path.join(folder, "error.txt"), f"{why}\n")
                    print(f"{group.label}, seed {todo[i]}: {why}, it ends here")
                    continue
                courses[i].append(row)
                run.log(folder, row)
        shown = [rows[-1] for i, rows in enumerate(courses) if i not in broken]
        if shown and (epoch == epochs or epoch % max(eval_interval, epochs // 10) == 0):
            means = [np.mean([row[key] for row in shown]) for key in ("train_accuracy", "val_accuracy", "train_loss")]
            print(f"{group.label} | epoch {epoch:>{width}}/{epochs} | train {means[0]:7.2%} | test {means[1]:7.2%} | "
                  f"loss {means[2]:.4g} | {time.time() - t0:6.1f} s", flush=True)
        if epoch == epochs or len(broken) == len(todo):
            break

        # an epoch
        for x, y, shared in batches(task, todo, epoch):
            torch.manual_seed(hash((seed, step))) # dropout and noise, which belong to the step
            batch.update_covariance(x, y, shared)
            _, z = batch(x, shared)
            loss = losses(z, y).sum() # over seeds: each has the gradient of its own
            if study == "modular" and embedding_penalty:
                rms = batch.params["backbone.embedding.weight"].square().mean(1).sqrt() # (S, D)
                loss = loss + embedding_penalty * rms.mean(1).sum()
            loss.backward()
            opt.step()
            opt.zero_grad(set_to_none=True)
            step += 1

    for i, folder in enumerate(folders):
        if i not in broken:
            finish(folder, batch, task, i, courses[i], step, (time.time() - t0) / len(todo))


def train_or_say_why(group, task, todo, config, sources):
    """
    Train a group. A mahalanobis matrix that is not finite has no Cholesky factor, which torch reports as an error: it
    ends the seeds that are trained together.
    """
    try:
        train(group, task, todo, config, sources)
    except torch.linalg.LinAlgError as e:
        print(f"{group.label}: {e}")
        for number in todo:
            safe.write(os.path.join(folder_of(group.name, number), "error.txt"), f"{e}\n")


def finite(x):
    return x if math.isfinite(x) else None # JSON has no nan


def finish(folder, batch, task, i, rows, step, seconds):
    """Write what a seed has at the end: weights, probe.npz, and summary.json, which says that it has ended."""
    x, y = (task.test_x, task.test_y) if task.shared else (task.test_x[i:i + 1], task.test_y[i])
    batch.net.eval()
    with torch.no_grad():
        (h,), (z,) = batch.one(i)(x, task.shared)
    result = metrics.classification(y.cpu().numpy(), z.argmax(1).cpu().numpy(), task.num_classes)
    epochs_seen = [row["epoch"] for row in rows]
    reached = {}
    for name, key in (("train", "train_accuracy"), ("test", "val_accuracy")):
        reached[name] = metrics.first_above(epochs_seen, [row[key] for row in rows], _LEVEL, _WINDOW)
    delay = None if None in reached.values() else reached["test"] - reached["train"]
    last = {key: value for key, value in rows[-1].items() if key not in ("kind", "val_loss")}
    safe.save(os.path.join(folder, "best.pt"), {"model": batch.state(i)})
    probed = torch.linspace(0, len(y) - 1, min(len(y), probing.PROBE_SIZE)).long() # of all classes, however they lie
    more = dict(class_means=metrics.class_means(h.cpu().numpy(), y.cpu().numpy(), task.num_classes))
    if study == "two_layer":
        own = batch.state(i)
        more["pre"] = x.cpu()[probed] @ own["backbone.linear.weight"].T + own["backbone.linear.bias"]
    run.save_probe(folder, h.cpu()[probed], y.cpu()[probed], **more)
    safe.write(os.path.join(folder, "summary.json"), json.dumps(dict(
        last, test_accuracy=result["accuracy"], f1_macro=result["f1_macro"], test_loss=rows[-1]["val_loss"],
        epochs_to_train=reached["train"], epochs_to_test=reached["test"], delay=delay, seconds=seconds), indent=1))


def main():
    global device, device_type

    # what cannot run is said before anything does
    problems = []
    config, sources = configure(globals(), problems=problems)
    counts, sizes = ("eval_interval", "seeds", "prime"), ("epochs", "batch_size", "learning_rate", "weight_decay")
    problems += [f"{key} is {config[key]!r}, it must be at least 1" for key in counts if config[key] < 1]
    for key in (*sizes, "train_fraction", "embedding_penalty", "seed", "threads"):
        if not 0 <= config[key] < math.inf:
            problems.append(f"{key} is {config[key]!r}, it must be >= 0 and finite")
    for key, legal in dict(study=("modular", "points", "two_layer"), optimizer=("adamw", "sgd"), link=LINKS,
                           inputs=("raw", "standard"), point_set=("separable", "skewed")).items():
        if config[key] not in legal:
            problems.append(f"{key} is {config[key]!r}: use {', '.join(legal)}")
    device, device_type, _ = run.choose_device(device, "float32", problems)
    fail(problems)
    if threads:
        torch.set_num_threads(threads)
    try:
        task, groups = make_study()
        groups = list({group.name: group for group in groups}.values()) # a variant by its name and by default are one
        todo = {group.name: unfinished(group, config) for group in groups}
    except (ValueError, OSError, ImportError) as e:
        fail([str(e)])

    # do it
    run.closing.callback(safe.lock(out_dir))
    seed_numbers = list(all_seeds())
    for group in groups:
        mine = todo[group.name]
        if group.follows: # only those that there is something to follow of
            mine = [i for i in mine if os.path.exists(os.path.join(folder_of(group.follows, i), "summary.json"))]
        if not mine:
            print(f"{group.label}: no seed is left to train")
            continue
        rows = [seed_numbers.index(number) for number in mine]
        train_or_say_why(group, task.of_seeds(rows).to(device), mine, config, sources)
    if plots:
        try:
            for path in figures_toy.draw(out_dir):
                print(path)
        except ValueError as e: # no run has ended, or one of another study is in the folder too
            raise SystemExit(str(e)) from None


if __name__ == "__main__":
    main()
