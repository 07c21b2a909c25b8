"""
--optimizer=muon: which parameters it moves and how, that a run with it resumes, and runs on two ranks, as any other.

$ pytest tests/test_muon.py
"""
import re

import pytest
import torch
from helpers import (
    SETTINGS,
    assert_close_runs,
    assert_same_training,
    ended,
    fork_ranks,
    load,
    refused,
    run_script,
    train,
)

pytestmark = pytest.mark.usefixtures("here")


def newton_schulz(g):
    """The nearly orthogonal matrix of g, as Jordan's post defines it, in the precision of g."""
    x = g / g.norm()
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


@pytest.mark.parametrize("family", ["gpt", "bert", "qwen2"])
def test_muon_takes_the_matrices_of_the_blocks_and_adamw_all_else(family):
    settings = dict(model=family, optimizer="muon", bias=True, weight_decay=0.3, distance="offset_l2", warmup_iters=0,
                    decay_lr=False, grad_clip=0.0, n_kv_head=1, intermediate_size=24)
    _, start = train(out_dir="start", max_iters=0, **settings)
    out, script = train(out_dir="out", max_iters=1, **settings)
    names = {id(p): name for name, p in script["raw_model"].named_parameters()}
    muon, decaying, others = script["opt"].param_groups
    of_muon, *rest = [[names[id(p)] for p in group["params"]] for group in (muon, decaying, others)]
    assert sorted(sum(rest, of_muon)) == sorted(names.values())
    assert all(re.fullmatch(r"transformer\.(h\.\d+\..*|mlm)\.weight", name) for name in of_muon)
    assert {p.dim() for p in muon["params"]} == {2} and len(of_muon) >= 8
    assert set(rest[0]) == {name for name in names.values() if re.search(r"\.w[tps]e\.|head.weight", name)}
    assert {group["lr"] for group in script["opt"].param_groups} == {1e-2}
    assert [group["weight_decay"] for group in script["opt"].param_groups] == [0.3, 0.3, 0.0]
    assert f"Muon: {len(of_muon)} matrices" in out

    # the first step, by the formula: momentum and its look-ahead, the scale of AdamW's updates, decay
    before, after, state = start["raw_model"].state_dict(), load("out")["model"], script["opt"].state
    for p in muon["params"]:
        momentum = state[p]["momentum_buffer"].double()
        gradient = momentum / 0.05
        update = newton_schulz(0.05 * gradient + 0.95 * momentum) * 0.2 * max(p.shape) ** 0.5
        made = (before[names[id(p)]].double() * (1 - 1e-2 * 0.3) - after[names[id(p)]]) / 1e-2
        # torch's steps are in bfloat16, which the smallest singular values feel
        assert torch.cosine_similarity(made.flatten(), update.flatten(), dim=0) > 0.95, names[id(p)]
        assert made.norm() / update.norm() == pytest.approx(1, abs=0.05), names[id(p)]
    for name in rest[0]: # Adam's first step is the sign of the gradient
        moved = (after[name] - before[name] * (1 - 1e-2 * 0.3)).abs()
        assert moved.max() <= 1e-2 * 1.001 and "exp_avg" in state[dict(script["raw_model"].named_parameters())[name]]


@pytest.mark.parametrize("settings", [
    dict(distance="mahalanobis", variant="diagonal", bias=True), dict(dtype="float16", distance="offset_l2")],
    ids=["float32", "float16"])
def test_a_run_with_muon_resumes_to_the_last_bit(settings):
    settings = dict(optimizer="muon", dropout=0.1, eval_interval=2, lr_decay_iters=4, **settings)
    train(out_dir="whole", max_iters=4, **settings)
    train(out_dir="half", max_iters=2, **settings)
    out, script = run_script("train.py", "--init_from=resume", "--out_dir=half", "--max_iters=4")
    assert "resuming with" not in out
    assert_same_training("whole", "half")
    changed = ("--weight_decay=0.5", "--beta2=0.9", "--learning_rate=0.5", "--max_iters=5")
    out, script = run_script("train.py", "--init_from=resume", "--out_dir=half", *changed)
    assert "resuming with weight_decay 0.5, the checkpoint had 0.1" in out and "betas (0.9, 0.9)" in out
    assert [group["weight_decay"] for group in script["opt"].param_groups] == [0.5, 0.5, 0.0]
    assert script["opt"].muon.param_groups[0] is script["opt"].param_groups[0] # it works with what was loaded


def test_two_ranks_with_muon_equal_one():
    settings = dict(optimizer="muon", max_iters=4, eval_interval=2, dropout=0.1, distance="euclidean", learn_n=True)
    ended(fork_ranks(2, **{**SETTINGS, **settings, "out_dir": "two"}))
    train(out_dir="one", **settings)
    assert_close_runs("two", "one", 1e-5)


def test_what_muon_cannot_do_is_said(monkeypatch):
    train(out_dir="out", max_iters=1)
    assert "cannot resume out: its optimizer is adamw, here it is muon" in refused(
        init_from="resume", out_dir="out", optimizer="muon", max_iters=2)
    assert "optimizer is 'lion': use adamw, muon" in refused(**{**SETTINGS, "optimizer": "lion"})
    monkeypatch.delattr(torch.optim, "Muon")
    assert "optimizer is 'muon', which torch has from 2.9 on" in refused(**{**SETTINGS, "optimizer": "muon"})
