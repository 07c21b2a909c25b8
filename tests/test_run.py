"""run.py: the probe against formulas, a run's folder, and what surrounds the loop."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import defaults_of

import metrics
import probing
import run
from distances import DistanceHead
from model import GPT, GPTConfig


def test_the_probe_of_a_linear_head_by_its_formulas():
    torch.manual_seed(0)
    h, y = torch.randn(64, 12, dtype=torch.float64).float(), torch.randint(0, 7, (64,))
    head = DistanceHead(12, 8, "baseline", num_classes=7)
    found = probing.probe(head, h, y)
    w = head.weight[:7].detach()
    p = (h @ w.T).softmax(1)
    gradient = (p - torch.nn.functional.one_hot(y, 7)) @ w # of -log p_y
    assert found["h_grad_norm"] == pytest.approx(gradient.norm(dim=1).mean().item(), rel=1e-5)
    assert found["prototype_norm"] == pytest.approx(w.norm(dim=1).mean().item(), rel=1e-6) # without the padding
    assert found["h_norm"] == pytest.approx(h.norm(dim=1).mean().item(), rel=1e-6)
    s = np.linalg.svd(h.numpy() - h.numpy().mean(0), compute_uv=False)
    assert found["pca5"] == pytest.approx((s[:5] ** 2).sum() / (s ** 2).sum(), rel=1e-5)
    assert found["pc2_ev"] < found["pca5"]
    assert found["effective_rank"] == pytest.approx(metrics.effective_rank(s), rel=1e-5)
    assert 0 < found["collapse_score"] < 1
    norms = gradient.norm(dim=1)
    assert found["active_ratio"] == (norms > 0.5 * norms.max()).float().mean().item()
    json.dumps(found, allow_nan=False)


def test_the_probe_leaves_the_head_as_it_was():
    torch.manual_seed(0)
    h, y = torch.randn(32, 6), torch.randint(0, 3, (32,))
    for distance, variant in (("mahalanobis", "covariance"), ("hamming", "gumbel")):
        head = DistanceHead(6, 3, distance, variant).train()
        before = {k: v.clone() for k, v in head.state_dict().items()}
        assert probing.probe(head, h, y) == probing.probe(head, h, y) # in eval mode: no noise
        assert head.training and head.weight.grad is None
        assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())


def test_what_has_no_value_is_none():
    y = torch.tensor([0, 1, 2]) # no class has two samples
    found = probing.probe(DistanceHead(4, 9, "euclidean"), torch.randn(3, 4), y)
    assert found["variance_ratio"] is None and found["intra_variance"] is None and found["effective_rank"] > 0
    json.dumps(found, allow_nan=False)


def test_a_single_sample_has_no_variance():
    head, h = DistanceHead(4, 9, "euclidean"), torch.randn(1, 4)
    found = probing.probe(head, h, torch.tensor([2]))
    assert found["h_norm"] == pytest.approx(h.norm().item()) and "effective_rank" not in found
    json.dumps(found, allow_nan=False)


def test_metrics_are_read_up_to_the_last_whole_line(tmp_path):
    assert run.read_metrics(tmp_path) == ([], True)
    run.log(tmp_path, dict(kind="eval", step=0))
    run.log(tmp_path, dict(kind="eval", step=5))
    assert run.read_metrics(tmp_path) == ([dict(kind="eval", step=0), dict(kind="eval", step=5)], True)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"kind": "ev')
    assert [row["step"] for row in run.read_metrics(tmp_path)[0]] == [0, 5] and not run.read_metrics(tmp_path)[1]


def test_a_resumed_run_keeps_its_command_and_what_the_checkpoint_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--seed=3", "--start=a b"])
    run.begin(tmp_path, dict(n=1.0, config=dict(init_from="gpt2", seed=3)))
    for step in (0, 5, 10):
        run.log(tmp_path, dict(kind="eval", step=step))
    (tmp_path / "best.pt").write_text("")
    monkeypatch.setattr(sys, "argv", ["train.py", "--init_from=resume"])
    run.begin(tmp_path, dict(n=2.0, config=dict(init_from="resume", seed=4)), resume_step=5)
    assert [row["step"] for row in run.read_metrics(tmp_path)[0]] == [0, 5] and (tmp_path / "best.pt").exists()
    info = json.loads((tmp_path / "config.json").read_text())
    assert info["command"] == "train.py --seed=3 '--start=a b'" and info["n"] == 1
    assert info["config"] == dict(init_from="gpt2", seed=4)
    run.begin(tmp_path, dict(n=1.0)) # afresh
    assert run.read_metrics(tmp_path) == ([], True) and not (tmp_path / "best.pt").exists()


def test_a_device_that_is_not_there():
    problems = []
    assert run.choose_device("auto", "auto", problems)[1] in ("cuda", "mps", "cpu") and not problems
    run.choose_device("tpu", "float8", problems)
    assert len(problems) == 2 and "'tpu'" in problems[0] and "'float8'" in problems[1]


SCRIPTS = ["train.py", "train_vision.py", "train_metric.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_defaults_are_in_their_ranges(script):
    assert run.check(defaults_of(script)) == []


def test_every_range_is_that_of_a_setting():
    names = [name for keys, _, _ in run.RANGES for name in keys.split()]
    assert len(set(names)) == len(names)
    assert set(names) <= {key for script in SCRIPTS for key in defaults_of(script)}


@pytest.mark.parametrize("key, bad", [
    ("eval_interval", 0), ("batch_size", -1), ("learning_rate", -1e-9), ("learning_rate", float("nan")), ("beta1", 1.0),
    ("val_fraction", 0.0), ("val_fraction", 1.0), ("n", -1.0), ("n", float("nan")), ("lr_gamma", 0.0), ("channels", 1),
    ("seed", 2 ** 32), ("out_dir", "")])
def test_a_value_out_of_its_range_is_one_message(key, bad):
    problem, = run.check({**defaults_of("train_vision.py"), key: bad})
    assert problem.startswith(f"{key} is {bad!r}, it must be ")


def test_choices_and_heads_are_checked():
    config = {**defaults_of("train_vision.py"), "optimizer": "lion", "distance": "cosin", "country_iso_code": "US"}
    choice, head, grid = run.check(config, optimizer=("adam", "sgd"), model=("mlp",))
    assert choice == "optimizer is 'lion': use adam, sgd"
    assert "unknown distance 'cosin'" in head and "did you mean 'USA'?" in grid


def test_the_first_number_that_is_not_finite_stops_the_run():
    def stop(*args):
        raise SystemExit(args)
    off, on = (torch.amp.GradScaler("cpu", enabled=enabled) for enabled in (False, True))
    good, bad = torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("inf")])
    assert run.read_pending([good, good], 7, off, stop).tolist() == [[1, 2], [1, 2]]
    assert run.read_pending([bad], 7, on, stop).tolist() == [[1, float("inf")]] # a step that loss scaling skips
    worse = torch.tensor([float("inf"), 1.0])
    for scaler, pending, expected in ((off, [good, bad, bad], (1, float("inf"), 6)),
                                      (on, [good, worse], (float("inf"), 1, 7))):
        with pytest.raises(SystemExit) as e:
            run.read_pending(pending, 7, scaler, stop)
        assert e.value.code == expected


def test_flops_are_those_of_the_parameters_that_multiply():
    model = GPT(GPTConfig(block_size=8, vocab_size=128, n_layer=2, n_head=2, n_embd=16, bias=False))
    matrices = 2 * 12 * 16 * 16 # attention and MLP
    norms, head = 5 * 16, 128 * 16
    attention = 12 * 2 * 16 * 8
    assert run.flops_per_token(model) == 6 * (matrices + norms + head) + attention
    assert run.flops_per_token(model, head_share=0.5) == 6 * (matrices + norms + head / 2) + attention
    tied = GPT(GPTConfig(block_size=8, vocab_size=128, n_layer=2, n_head=2, n_embd=16, bias=False, tie_weights=True))
    assert run.flops_per_token(tied) == run.flops_per_token(model)


def test_flops_of_a_long_context_are_mostly_attentions():
    shape = dict(vocab_size=128, n_layer=3, n_head=2, n_embd=16, bias=False)
    short, long = GPT(GPTConfig(block_size=8, **shape)), GPT(GPTConfig(block_size=4096, **shape))
    assert run.flops_per_token(long) - run.flops_per_token(short) == 12 * 3 * 16 * (4096 - 8)


def test_the_tracker_and_its_mode_are_checked_with_the_rest():
    config = dict(tracker="wandbi", wandb_mode="ofline", distance="cosine", variant="", distance_params="",
                  link="harmonic", n=1.0, learn_n=False, eps=1e-4, track_emissions=False)
    assert run.check(config) == ["tracker is 'wandbi': use wandb, trackio",
                                 "wandb_mode is 'ofline': use online, offline, disabled"]


def test_peak_flops_by_the_name_of_a_gpu():
    assert run.peak_flops("NVIDIA H100 PCIe", "bfloat16") < run.peak_flops("NVIDIA H100 80GB HBM3", "bfloat16")
    assert run.peak_flops("NVIDIA L40S", "float16") > run.peak_flops("NVIDIA L4", "float16")
    assert run.peak_flops("some CPU", "bfloat16") is None and run.peak_flops("NVIDIA H200", "float32") is None


def test_closing_closes_the_last_one_first_and_once():
    closed = []
    for name in ("group", "wandb", "emissions"):
        run.closing.callback(closed.append, name)
    run.closing.close()
    run.closing.close()
    assert closed == ["emissions", "wandb", "group"]


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    assert run.git_commit() is None or len(run.git_commit().split()[0]) == 40
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q",
                    "--allow-empty", "-m", "another project"], check=True)
    monkeypatch.setattr(run, "__file__", str(tmp_path / "run.py"))
    assert run.git_commit() is None # these files may be installed in its folder
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run.git_commit() is None
