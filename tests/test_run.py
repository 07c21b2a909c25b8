"""run.py: the probe against formulas, and a run's folder."""
import json
import sys

import numpy as np
import pytest
import torch

import metrics
import run
from distances import DistanceHead


def test_the_probe_of_a_linear_head_by_its_formulas():
    torch.manual_seed(0)
    h, y = torch.randn(64, 12, dtype=torch.float64).float(), torch.randint(0, 7, (64,))
    head = DistanceHead(12, 8, "baseline", num_classes=7)
    found = run.probe(head, h, y)
    w = head.weight[:7].detach()
    p = (h @ w.T).softmax(1)
    gradient = (p - torch.nn.functional.one_hot(y, 7)) @ w # of -log p_y
    assert found["h_grad_norm"] == pytest.approx(gradient.norm(dim=1).mean().item(), rel=1e-5)
    assert found["prototype_norm"] == pytest.approx(w.norm(dim=1).mean().item(), rel=1e-6) # without the padding
    assert found["h_norm"] == pytest.approx(h.norm(dim=1).mean().item(), rel=1e-6)
    s = np.linalg.svd(h.numpy() - h.numpy().mean(0), compute_uv=False)
    assert found["pca5"] == pytest.approx((s[:5] ** 2).sum() / (s ** 2).sum(), rel=1e-5) and found["pc2_ev"] < found["pca5"]
    assert found["effective_rank"] == pytest.approx(metrics.effective_rank(s), rel=1e-5) and 0 < found["collapse_score"] < 1
    assert found["active_ratio"] == ((1 - p[torch.arange(64), y]) > 0.01).float().mean().item()
    json.dumps(found, allow_nan=False)


def test_the_probe_leaves_the_head_as_it_was():
    torch.manual_seed(0)
    h, y = torch.randn(32, 6), torch.randint(0, 3, (32,))
    for distance, variant in (("mahalanobis", "covariance"), ("hamming", "gumbel")):
        head = DistanceHead(6, 3, distance, variant).train()
        before = {k: v.clone() for k, v in head.state_dict().items()}
        assert run.probe(head, h, y) == run.probe(head, h, y) # in eval mode: no noise
        assert head.training and all(torch.equal(v, before[k]) for k, v in head.state_dict().items()) and head.weight.grad is None


def test_what_has_no_value_is_none():
    found = run.probe(DistanceHead(4, 9, "euclidean"), torch.randn(3, 4), torch.tensor([0, 1, 2])) # no class has two samples
    assert found["variance_ratio"] is None and found["intra_variance"] is None and found["effective_rank"] > 0
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
    run.begin(tmp_path, dict(n=1.0))
    for step in (0, 5, 10):
        run.log(tmp_path, dict(kind="eval", step=step))
    (tmp_path / "best.pt").write_text("")
    monkeypatch.setattr(sys, "argv", ["train.py", "--init_from=resume"])
    run.begin(tmp_path, dict(n=1.0), resume_step=5)
    assert [row["step"] for row in run.read_metrics(tmp_path)[0]] == [0, 5] and (tmp_path / "best.pt").exists()
    assert json.loads((tmp_path / "config.json").read_text())["command"] == "train.py --seed=3 '--start=a b'"
    run.begin(tmp_path, dict(n=1.0)) # afresh
    assert run.read_metrics(tmp_path) == ([], True) and not (tmp_path / "best.pt").exists()


def test_a_device_that_is_not_there():
    problems = []
    assert run.choose_device("auto", "auto", problems)[1] in ("cuda", "mps", "cpu") and not problems
    run.choose_device("tpu", "float8", problems)
    assert len(problems) == 2 and "'tpu'" in problems[0] and "'float8'" in problems[1]
