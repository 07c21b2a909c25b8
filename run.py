"""
What train.py and train_vision.py share: settings, device, and the run's folder, which study.py and report.py read:

  config.json        every setting and where it came from, git commit, versions, device, the data's hash
  metrics.jsonl      a line per log line (kind 'train') and per evaluation (kind 'eval')
  emissions.csv      a row per evaluation, see emissions.py
  ckpt.pt, best.pt   the last and the best weights: plain values, torch.load(weights_only=True)
  probe.npz          the hidden states of a fixed batch at the end, h (N, D), and their classes y (N,)
  summary.json       the end result; a run without it has not ended
"""
import json
import math
import os
import platform
import shlex
import subprocess
import sys

import numpy as np
import torch
import torch.nn.functional as F

import configurator
import metrics
from configurator import fail
from emissions import grid_factor

PROBE_SIZE = 512 # hidden states: their rank can be seen up to this number


def configure(namespace):
    """
    configurator.configure(namespace), the globals() of a training script; with init_from=resume the run's own settings come first, then files and flags.
    The country or grid of the emissions is checked here too.
    Returns (config, sources, saved, problems): saved is the resumed run's config.json, else None; fail(problems) is the caller's.
    """
    problems, saved = [], None
    config, sources = configurator.configure(namespace, problems=problems)
    if namespace["init_from"] == "resume":
        out_dir = namespace["out_dir"]
        path = os.path.join(out_dir, "config.json")
        if not os.path.exists(os.path.join(out_dir, "ckpt.pt")) or not os.path.exists(path):
            fail([*problems, f"init_from=resume: {out_dir} holds no ckpt.pt with a config.json, name the run's folder with --out_dir"])
        with open(path) as f:
            saved = json.load(f)
        script, here = saved.get("script", "train.py"), os.path.basename(namespace["__file__"])
        if script != here:
            fail([f"init_from=resume: {out_dir} holds a run of {script}, this is {here}"])
        problems = []
        config, sources = configurator.configure(namespace, base={**saved["config"], "init_from": "resume"}, base_name=path, problems=problems)
        sources = {k: saved["sources"].get(k, source) if source == path else source for k, source in sources.items()} # where the run had it from
    elif not namespace["overwrite"] and os.path.exists(os.path.join(namespace["out_dir"], "ckpt.pt")):
        problems.append(f"{namespace['out_dir']} holds a run: go on with it (--init_from=resume), write elsewhere (--out_dir=...), or discard it (--overwrite=true)")
    if config["track_emissions"] and os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            grid_factor(config["country_iso_code"], config["carbon_intensity"])
        except ValueError as e:
            problems.append(str(e))
        except ImportError:
            pass # Emissions says so
    return config, sources, saved, problems


def parameter_groups(model, weight_decay):
    """Every parameter in exactly one of two groups: matrices decay; norms, biases and the head's own metric do not."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad} # a tied matrix is named once
    decay = [p for name, p in params.items() if p.dim() >= 2 and (name == "head.weight" or not name.startswith("head."))]
    ids = {id(p) for p in decay}
    return [{"params": decay, "weight_decay": weight_decay}, {"params": [p for p in params.values() if id(p) not in ids], "weight_decay": 0.0}]


def load_optimizer(optimizer, state, note, weight_decay, **settings):
    """optimizer.load_state_dict(state), which also brings the old settings back, then the settings of now for parameter_groups' two groups;
    note is told of each that changed."""
    optimizer.load_state_dict(state)
    for group, decay in zip(optimizer.param_groups, (weight_decay, 0.0)):
        for key, value in {"weight_decay": decay, **settings}.items():
            if group[key] != value:
                note(f"resuming with {key} {value}, the checkpoint had {group[key]}")
                group[key] = value


def choose_device(device, dtype, problems, note=print):
    """'auto' resolved: (device, its type, dtype by name). What cannot be goes into the list `problems`; note is told of a slow choice."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device_type = device.split(":")[0]
    if device_type not in ("cuda", "mps", "cpu"):
        problems.append(f"device is {device!r}: use auto, cuda, mps or cpu")
    elif device_type == "cuda" and not torch.cuda.is_available() or device_type == "mps" and not torch.backends.mps.is_available():
        problems.append(f"device is {device!r}, which torch does not see here: use auto or cpu")
    if dtype == "auto":
        dtype = "bfloat16" if device_type == "cuda" and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
        if device_type == "cuda" and dtype == "float32":
            note("this GPU has no bfloat16: training in float32 (--dtype=float16 is faster, with loss scaling)")
    if dtype not in ("float32", "bfloat16", "float16"):
        problems.append(f"dtype is {dtype!r}: use auto, float32, bfloat16 or float16")
    return device, device_type, dtype


def device_name(device_type):
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            names = [line.split(":")[1].strip() for line in f if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def write(path, text):
    """A file, whole or not at all."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(path + ".tmp", path)


def save(path, state):
    """A checkpoint, whole or not at all."""
    torch.save(state, path + ".tmp")
    os.replace(path + ".tmp", path)


def git_commit():
    """The commit of these files, 'with changes' if there are any, or None outside of git."""
    def git(*args):
        return subprocess.run(("git", *args), capture_output=True, text=True, cwd=os.path.dirname(os.path.abspath(__file__)))
    head = git("rev-parse", "HEAD")
    return head.stdout.strip() + (" with changes" if git("status", "--porcelain", "-uno").stdout else "") if head.returncode == 0 else None


def begin(out_dir, info, resume_step=None):
    """Write config.json: info, the command, commit and versions. A resumed run keeps its command and first n, has no end any more, and its
    metrics.jsonl is cut back to what its checkpoint knows; a new run takes the place of what was there."""
    path, new = os.path.join(out_dir, "config.json"), resume_step is None
    info = dict(info, command=shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]), git=git_commit(), cpus=os.cpu_count(), threads=torch.get_num_threads(),
                versions=dict(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda, numpy=np.__version__))
    rows = []
    if not new:
        with open(path) as f:
            info.update({k: v for k, v in json.load(f).items() if k in ("command", "n")})
        rows = [row for row in read_metrics(out_dir)[0] if row["step"] <= resume_step]
    for name in os.listdir(out_dir): # before anything is written: no half of one run with half of another
        if name == "summary.json" or new and name in ("ckpt.pt", "best.pt", "probe.npz", "loss.png", "curves.png", "learned.png") or new and name.startswith("emissions"):
            os.remove(os.path.join(out_dir, name))
    write(path, json.dumps(info, indent=1))
    write(os.path.join(out_dir, "metrics.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))


def log(out_dir, row):
    with open(os.path.join(out_dir, "metrics.jsonl"), "a") as f:
        f.write(json.dumps(row) + "\n")


def read_metrics(out_dir):
    """(rows, whole) of metrics.jsonl: up to the last line that is whole, whether that is all of it. No file: ([], True)."""
    path, rows = os.path.join(out_dir, "metrics.jsonl"), []
    if not os.path.exists(path):
        return rows, True
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            try:
                rows.append(json.loads(line if line.endswith("\n") else ""))
            except ValueError: # what a crash, or a full disk, left
                return rows, False
    return rows, True


def save_probe(out_dir, h, y):
    path = os.path.join(out_dir, "probe.npz")
    with open(path + ".tmp", "wb") as f:
        np.savez(f, h=h.float().cpu().numpy(), y=y.cpu().numpy())
    os.replace(path + ".tmp", path)


def probe(head, h, y):
    """What an evaluation says of hidden states h (N, D), the head's input, with classes y (N,): scalars by name, each defined in metrics.py.
    h_grad_norm is the mean over samples of |d(-log p_y)/dh|, prototype_norm that of |w_k|."""
    training = head.training
    head.eval() # in training it may update its statistics, or add noise
    with torch.enable_grad(), torch.autocast(h.device.type, enabled=False):
        h = h.detach().float().requires_grad_()
        nll = F.cross_entropy(head(h), y, reduction="none") # (N,)
        gradient, = torch.autograd.grad(nll.sum(), h)
    head.train(training)
    w = head.weight.detach()[:head.num_classes].float()
    features = h.detach().cpu().numpy()
    s, variance = metrics.spectrum(features), metrics.class_variance(features, y.cpu().numpy())
    result = dict(effective_rank=metrics.effective_rank(s), collapse_score=metrics.collapse_score(s), pc2_ev=metrics.explained_variance(s, 2),
                pca5=metrics.explained_variance(s, 5), intra_variance=variance["intra"], inter_variance=variance["inter"], variance_ratio=variance["ratio"],
                active_ratio=metrics.active_ratio(nll.detach().cpu().numpy()), h_grad_norm=gradient.norm(dim=1).mean().item(),
                h_norm=h.detach().norm(dim=1).mean().item(), prototype_norm=w.norm(dim=1).mean().item())
    return {k: v if math.isfinite(v) else None for k, v in result.items()} # JSON has no nan
