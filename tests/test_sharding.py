"""
--sharding=fsdp: a model that is split between ranks equals the same model in one process, for every head; its
checkpoints go on at another number of ranks; what cannot run is refused.

The ranks are processes with gloo on one machine. Nothing here has seen two machines, or more than one GPU.

$ pytest tests/test_sharding.py
"""
import copy
import datetime
import hashlib
import io
import os
import pickle
import re
import traceback
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from helpers import (
    FORKS,
    HARD,
    SETTINGS,
    ended,
    fork_ranks,
    load,
    metrics,
    rank_environments,
    refused,
    run_script,
    train,
)
from small_models import EVERY_DISTANCE, new_model
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, BytesStorageMetadata, Metadata

import bench
import fsdp
import run
from distances import DISTANCES, DistanceHead
from distances_parallel import ParallelHead
from families import load_run
from model_bert import mask_tokens
from model_qwen2 import Qwen2, Qwen2Config
from muon import MuonAdamW

# -----------------------------------------------------------------------------
# every head, in one process and in several, in fp64: there a slope of |h - w| jumps where no rounding comes

HEADS = [dict(distance="baseline"), dict(distance="baseline", bias=True),
         dict(distance="baseline", variant="unit", learn_n=True, learn_scale=True, head_bias=True, softcap=2.0),
         dict(distance="euclidean", variant="unit", link="gaussian", learn_scale=True, learn_eps=True),
         dict(distance="bray_curtis", variant="normalized", learn_eps=True)]
for distance, variant in EVERY_DISTANCE:
    if variant != "covariance": # refused, see below
        HEADS += [dict(distance=distance, variant=variant, link=link, learn_n=link == "softmin")
                  for link in ("harmonic", "softmin")]
MODELS = [dict(distance="cosine", tie_weights=True), dict(distance="offset_l2", tie_weights=True, learn_n=True),
          dict(distance="euclidean", family="qwen2", tie_weights=True), dict(distance="manhattan", family="qwen2"),
          dict(distance="cosine", family="bert", tie_weights=True), dict(distance="mahalanobis", family="bert")]
MUON = [dict(distance="cosine", family=family, optimizer="muon") for family in ("gpt", "bert", "qwen2")]
DEFAULTS = {distance: next(iter(variants)) for distance, variants in DISTANCES.items()}
SOME = [head for head in HEADS # all variants by one link, and all distances by both
        if head.get("link") != "softmin" or head["variant"] == DEFAULTS[head["distance"]]]
PARTS, STEPS = 4, 2 # of a batch, which so many ranks may share


def model_of(head, bias=False, family="gpt", **config):
    """A model in fp64 whose head has no parameter at its initial value."""
    shape = dict(n_layer=1, n_embd=16)
    if family == "qwen2":
        shape["intermediate_size"] = 24
    model = new_model(family, **shape, **config).double()
    if bias:
        model.head.bias = torch.nn.Parameter(torch.zeros(model.head.num_prototypes, dtype=torch.float64))
    with torch.no_grad():
        for name, p in model.head.named_parameters():
            if name != "weight":
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        model.head.weight[50] = 0
    if config.get("variant") == "gumbel":
        model.head.eval() # without noise, of which ranks have other samples
    return model


def part_of_batch(family, step, i):
    """A part of a step's batch. Some targets of GPT do not count, as many in every part; BERT's labels are fewer."""
    g = torch.Generator().manual_seed(100 * step + i)
    x = torch.randint(0, 97, (2, 13), generator=g)
    if family == "bert":
        return mask_tokens(x[:, 1:], np.random.RandomState([step, i]), 97, 97)
    targets = x[:, 1:].clone()
    targets[0, i] = -1
    return x[:, :-1], targets


def trained(config, rank=0, ranks=1):
    """Losses of STEPS steps, the norms of their gradients, and the weights after them."""
    config = dict(config)
    with_muon = config.pop("optimizer", "") == "muon"
    model = model_of(config, **config)
    if ranks > 1:
        fsdp.shard(model, "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    if with_muon:
        optimizer = MuonAdamW(model, run.parameter_groups(model, 0.1), lr=1e-2, betas=(0.9, 0.95), fused=True)
    numbers = []
    for step in range(STEPS):
        total = 0.0
        for i in range(rank, PARTS, ranks):
            loss = model(*part_of_batch(config.get("family"), step, i))[1] * (ranks / PARTS)
            loss.backward()
            total += loss.detach() / ranks
        norm = fsdp.clip_gradients(model, 0.5) if ranks > 1 else torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        if ranks > 1:
            dist.all_reduce(total)
        numbers += [total.item(), norm.item()]
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    if ranks > 1:
        weights = {name: p.full_tensor() for name, p in weights.items()}
    return numbers, weights


MEMORY = dict(N=16, V=65536, D=32) # N of each rank


def memory_of_ranks(ranks):
    """The most bytes that a rank holds in an embedding or a loss and its gradients, beyond the model and the batch."""
    found = {}
    for distance in ("baseline", "euclidean", "cosine", "manhattan"):
        torch.manual_seed(0)
        body = torch.nn.Module()
        body.head = DistanceHead(MEMORY["D"], MEMORY["V"], distance, n=8.0)
        body.transformer = torch.nn.ModuleDict(dict(wte=torch.nn.Embedding(MEMORY["V"], MEMORY["D"])))
        mesh = fsdp.init_device_mesh("cpu", (1, ranks), mesh_dim_names=("nodes", "rows"))
        fsdp.split_rows(body, mesh, "cpu")
        h = torch.randn(MEMORY["N"], MEMORY["D"], requires_grad=True)
        y = torch.randint(0, MEMORY["V"], (MEMORY["N"],))

        def loss(body=body, h=h, y=y):
            body.head.loss(h, y, chunk=2).backward()
            h.grad = body.head.weight.grad = None

        def embedding(body=body, y=y):
            body.transformer.wte(y).square().sum().backward()
            body.transformer.wte.weight.grad = None
        loss()
        found[distance] = bench.peak_bytes(loss)
    embedding()
    found["embedding"] = bench.peak_bytes(embedding)
    return found


def work(env, out, heads, with_memory):
    """What a rank does; what it finds, or its error, is left in a file."""
    torch.set_num_threads(1)
    os.environ.update(env)
    rank, ranks = int(env["RANK"]), int(env["WORLD_SIZE"])
    try:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
        found = {"heads": [trained(head, rank, ranks) for head in heads]}
        if with_memory:
            found["bytes"] = memory_of_ranks(ranks)
        dist.destroy_process_group()
    except Exception:
        found = {"error": traceback.format_exc()}
    torch.save(found, f"{out}{rank}.pt")


def on_ranks(folder, count, heads, nodes=1, with_memory=False):
    out = str(folder / f"{count}ranks")
    started = [FORKS.Process(target=work, args=(env, out, heads, with_memory))
               for env in rank_environments(count, nodes)]
    for process in started:
        process.start()
    for process in started:
        process.join(400)
        process.kill()
    results = [torch.load(f"{out}{rank}.pt") for rank in range(count)]
    errors = [result["error"] for result in results if "error" in result]
    assert not errors, "\n".join(errors)
    return results


def assert_equal_one_process(results, heads):
    for i, head in enumerate(heads):
        numbers, weights = trained(head)
        for result in results:
            theirs, their_weights = result["heads"][i]
            assert theirs == pytest.approx(numbers, rel=1e-9), head
            assert their_weights.keys() == weights.keys()
            for name, p in weights.items():
                torch.testing.assert_close(their_weights[name], p, rtol=1e-8, atol=1e-8,
                                           msg=lambda m, name=name, head=head: f"{head} {name}: {m}")


@pytest.mark.parametrize("ranks, nodes, heads", [
    (2, 1, SOME + MUON), (4, 2, MODELS + MUON),
    *(pytest.param(ranks, nodes, HEADS + MODELS + MUON, marks=pytest.mark.torture)
      for ranks, nodes in ((2, 1), (4, 1), (4, 2)))],
    ids=["two ranks", "two nodes of two", "two ranks, all", "four ranks, all", "two nodes of two, all"])
def test_ranks_equal_one_process(ranks, nodes, heads, tmp_path):
    results = on_ranks(tmp_path, ranks, heads, nodes, with_memory=ranks == 4)
    assert_equal_one_process(results, heads)
    # neither all prototypes nor the scores of all tokens fit into what a rank has held
    for result in results:
        for name, peak in result.get("bytes", {}).items():
            assert 0 < peak < 4 * MEMORY["V"] * MEMORY["D"], (name, peak)
            assert peak < 4 * 4 * MEMORY["N"] * MEMORY["V"] / 2, (name, peak)


# -----------------------------------------------------------------------------
# train.py


def test_a_sharded_run_goes_on_at_other_numbers_of_ranks_and_equals_one_process(here):
    """Two ranks, then four on two nodes, then one: the same samples, losses and weights as in one process that has
    the whole model."""
    settings = dict(max_iters=9, eval_interval=3, gradient_accumulation_steps=4, tie_weights=True,
                    test_fraction=0.4, **HARD)
    sharded = {**SETTINGS, **settings, "out_dir": "sharded", "sharding": "fsdp"}
    text, other = ended(fork_ranks(2, **{**sharded, "max_iters": 3}))
    assert "2 rank(s)" in text and "done:" in text and other == "" # rank 0 alone speaks
    assert not re.search("Warning|Traceback", text), text
    resume = ("train.py", "--init_from=resume", "--out_dir=sharded")
    ended(fork_ranks(4, *resume, nodes=2, max_iters=6))
    ended(fork_ranks(1, *resume, max_iters=9))
    train(out_dir="whole", **settings)
    of_one = load("whole")
    for x, y in zip(metrics("sharded"), metrics("whole"), strict=True):
        missing = y.keys() - x.keys() # no rank has what they take
        assert missing in (set(), {"mean_accuracy", "prototype_offset", "own_variance_ratio"})
        for key, value in y.items():
            if type(value) not in (str, type(None)) and key not in missing:
                assert x[key] == pytest.approx(value, rel=1e-5, abs=1e-5), (key, x)
    nll = [np.load(f"{name}/predictions.npz")["nll"] for name in ("sharded", "whole")]
    assert nll[0] == pytest.approx(nll[1], rel=1e-4) and len(nll[0]) == 9 * 16
    model, config, step = load_run("sharded", "ckpt.pt")
    assert step == 9 and config["sharding"] == "fsdp"
    best = load("sharded", "best.pt") # which all tools read
    assert best["step"] == load("whole", "best.pt")["step"] == 9
    assert load("sharded")["step"] == 9 and not load("sharded")["model"]
    for weights in (model.state_dict(), best["model"]):
        assert weights.keys() == of_one["model"].keys()
        for name, p in weights.items():
            torch.testing.assert_close(p, of_one["model"][name], rtol=1e-5, atol=1e-5)
    printed, _ = run_script("sample.py", "--out_dir=sharded", "--checkpoint=ckpt.pt", "--device=cpu", "--nearest=a",
                            "--num_samples=1", "--max_new_tokens=3")
    assert "nearest" in printed
    folders = {load("sharded", name)["shards"]["folder"] for name in ("ckpt.pt", "ckpt_before.pt")}
    assert len(folders) == 2 and folders == {name for name in os.listdir("sharded") if name.startswith("shards")}


@pytest.fixture
def one_rank(monkeypatch):
    """This process is the only rank; train.py begins its process group and ends it."""
    env, = rank_environments(1)
    for key, value in env.items():
        monkeypatch.setenv(key, value)


def saved(out_dir):
    """All tensors of the last checkpoint by name, weights and the optimizer's state."""
    reader = fsdp.PlainReader(os.path.join(out_dir, load(out_dir)["shards"]["folder"]))
    tensors = {name: torch.empty(x.size, dtype=x.properties.dtype)
               for name, x in reader.read_metadata().state_dict_metadata.items()}
    with warnings.catch_warnings(): # that there is one process is meant
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


SHARDED = dict(sharding="fsdp", distance="cosine", learn_n=True, eval_interval=2)


def test_a_sharded_run_that_is_stopped_is_saved(here, one_rank):
    train(out_dir="whole", max_iters=4, **SHARDED)
    with pytest.raises(SystemExit) as e:
        train(out_dir="out", max_iters=4, time_limit=1e-6, **SHARDED)
    assert e.value.code == 124 and load("out")["step"] == 1
    run_script("train.py", "--init_from=resume", "--out_dir=out", "--time_limit=0")
    assert metrics("out", "eval") == metrics("whole", "eval")
    a, b = load_run("out", "ckpt.pt"), load_run("whole", "ckpt.pt")
    assert all(torch.equal(p, q) for p, q in zip(a[0].parameters(), b[0].parameters()))


def test_muon_goes_on_to_the_last_bit_and_at_another_number_of_ranks(here, one_rank):
    settings = dict(optimizer="muon", gradient_accumulation_steps=2, eval_interval=2, **HARD)
    sharded = dict(settings, sharding="fsdp")
    train(out_dir="whole", max_iters=4, **sharded)
    train(out_dir="half", max_iters=2, **sharded)
    ended(fork_ranks(2, **{**SETTINGS, **sharded, "max_iters": 2, "out_dir": "two"}))
    train(out_dir="unsplit", max_iters=4, **settings)
    for out_dir in ("half", "two"):
        printed, _ = run_script("train.py", "--init_from=resume", f"--out_dir={out_dir}", "--max_iters=4")
        assert "Muon: " in printed and "resuming with" not in printed
    assert metrics("half") == metrics("whole")
    for name, p in saved("whole").items():
        assert torch.equal(p, saved("half")[name]), name
    assert any("momentum_buffer" in name for name in saved("whole"))
    # in fp64 the ranks equal one process to 1e-9; here a last bit of fp32 can turn a rounding to bf16 in Muon, which
    # small singular values feel, so that the weights say little: other samples would show in the losses
    for x, y in zip(metrics("two", "train"), metrics("unsplit", "train"), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-3)


def test_a_damaged_share_is_noticed_and_the_checkpoint_before_goes_on(here, one_rank):
    train(out_dir="whole", max_iters=6, **SHARDED)
    train(out_dir="out", max_iters=4, **SHARDED)
    folder = "out/" + load("out")["shards"]["folder"]
    file, = (name for name in os.listdir(folder) if name.endswith(".distcp"))
    content = bytearray(open(f"{folder}/{file}", "rb").read())
    content[len(content) // 2] ^= 1
    open(f"{folder}/{file}", "wb").write(content)
    with pytest.raises(SystemExit, match="its part .* is not what was written"):
        load_run("out", "ckpt.pt")
    printed, _ = run_script("train.py", "--init_from=resume", "--out_dir=out", "--max_iters=6")
    assert f"{file} is not what was written. Going on from the checkpoint before it, of step 2" in printed
    assert metrics("out") == metrics("whole")
    folder = "out/" + load("out")["shards"]["folder"]
    for state in (load("out"), load("out", "ckpt_before.pt")):
        os.remove(f"out/{state['shards']['folder']}/.metadata")
    message = refused("--init_from=resume", "--out_dir=out", "--max_iters=8")
    assert f"its part {folder}/.metadata is not there" in message and "no whole out/ckpt_before.pt" in message
    os.replace("out/best.pt", "out/ckpt.pt")
    message = refused("--init_from=resume", "--out_dir=out", "--max_iters=8")
    assert "out/ckpt.pt has the weights alone, and a sharded run goes on from its shards" in message


class Attribute:
    """What a pickle has as getattr(owner, name), which an early Python 3.11 says of the member of an enum."""
    def __init__(self, owner, name):
        self.asked = owner, name

    def __reduce__(self):
        return getattr, self.asked


def test_shares_of_an_early_python_3_11_can_be_read():
    for member in _MEM_FORMAT_ENCODING:
        text = pickle.dumps(Attribute(_MEM_FORMAT_ENCODING, member.name))
        assert fsdp.PlainUnpickler(io.BytesIO(text)).load() is member


def test_a_share_that_could_run_code_is_refused(here, one_rank):
    train(out_dir="out", max_iters=2, **SHARDED)
    state = load("out")
    path = f"out/{state['shards']['folder']}/.metadata"
    for content, word in ((pickle.dumps(os.system), "system"), (pickle.dumps(BytesStorageMetadata()), "Bytes"),
                          (pickle.dumps(Attribute(Metadata, "__init__")), "'__init__' of .*Metadata"),
                          (pickle.dumps(Attribute(_MEM_FORMAT_ENCODING, "__init__")), "KeyError"),
                          (b"no pickle", "UnpicklingError")):
        open(path, "wb").write(content)
        state["shards"]["files"][".metadata"] = hashlib.sha256(content).hexdigest()
        torch.save(state, "out/ckpt.pt")
        with pytest.raises(SystemExit, match=f"{path} cannot be read as part of a checkpoint: .*{word}"):
            load_run("out", "ckpt.pt")


def test_a_full_disk_leaves_the_checkpoint_that_there_is(here, one_rank, monkeypatch):
    train(out_dir="out", max_iters=2, **SHARDED)
    before = {name: open(f"out/{name}", "rb").read() for name in ("ckpt.pt", "best.pt")}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed.checkpoint.filesystem, "_write_item", full)
        message = refused("--init_from=resume", "--out_dir=out", "--max_iters=4")
    assert re.search("out/shards_1 cannot be written: .*No space left on device.*; ckpt.pt is as it was", message)
    assert before == {name: open(f"out/{name}", "rb").read() for name in before}
    run_script("train.py", "--init_from=resume", "--out_dir=out", "--max_iters=4")
    assert load("out")["step"] == 4


def test_a_new_run_takes_away_the_shares_of_a_former_one(here, one_rank):
    train(out_dir="out", max_iters=2, **SHARDED)
    assert os.path.exists("out/shards_0")
    train(out_dir="out", max_iters=2, **{**SHARDED, "sharding": "none"}, overwrite=True)
    assert not os.path.exists("out/shards_0")


@pytest.mark.parametrize("settings, message", [
    (dict(sharding="zero"), "sharding is 'zero': use none, fsdp"),
    (dict(sharding="fsdp"), "splits a model between the ranks that torchrun starts"),
    (dict(sharding="fsdp", dtype="float16"), "use bfloat16 or float32"),
    (dict(sharding="fsdp", distance="mahalanobis", variant="covariance"), "use another variant of mahalanobis")])
def test_refused(settings, message, here):
    assert message in refused(**{**SETTINGS, **settings})
    assert not os.path.exists("out")


def test_a_run_keeps_its_kind_of_sharding(here, one_rank):
    for there, asked in (("none", "fsdp"), ("fsdp", "none")):
        train(out_dir=there, max_iters=1, sharding=there)
        message = refused("--init_from=resume", f"--out_dir={there}", f"--sharding={asked}", "--max_iters=2")
        assert f"cannot resume {there}: it has sharding={there}, here it is {asked}" in message


@pytest.mark.parametrize("of_a_node, message", [
    ("3", "splits 128 rows of prototypes between the 3 ranks of a node, which must divide them"),
    ("2", "wants as many ranks on each node, got 1 in all and 2 here")])
def test_ranks_that_do_not_divide_are_refused(of_a_node, message, here, one_rank, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", of_a_node)
    assert message in refused(**{**SETTINGS, "sharding": "fsdp"})


def test_sharded_blocks_compute_in_bfloat16(here, one_rank):
    settings = dict(max_iters=3, dtype="bfloat16", distance="cosine", model="qwen2", n_kv_head=1, intermediate_size=24)
    _, script = train(out_dir="sharded", sharding="fsdp", **settings)
    train(out_dir="whole", **settings)
    assert all(p.dtype == torch.float32 for p in script["raw_model"].parameters())
    for x, y in zip(metrics("sharded", "train"), metrics("whole", "train"), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-3)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=2e-2)


def test_a_loss_that_is_not_finite_stops_a_sharded_run(here, one_rank):
    message = refused(**{**SETTINGS, **SHARDED, "learning_rate": 1e30, "warmup_iters": 0, "grad_clip": 0})
    assert "not finite" in message and "|w| " in message


@pytest.mark.parametrize("distance", ["euclidean", "cosine", "offset_l2", "manhattan"])
def test_a_split_head_is_precise_where_h_comes_close_to_prototypes(distance, one_rank):
    """h lies by its target, by another prototype, by both or by none: fp32 equals fp64, value and gradient."""
    torch.manual_seed(0)
    head = DistanceHead(8, 40, distance, n=3.0, num_classes=37)
    h, y = 3 * torch.randn(12, 8), torch.arange(12)
    for i, prototype in ((0, 0), (1, 20), (2, 2), (3, 21)):
        h[i] = head.weight[prototype].detach() * (1 + 1e-3) + 1e-3
    y[5] = -100
    oracle = copy.deepcopy(head).double()
    x = h.double().requires_grad_()
    expected = F.cross_entropy(oracle(x), y)
    expected.backward()
    dist.init_process_group("gloo")
    try:
        body = torch.nn.Module()
        body.head, body.transformer = head, torch.nn.ModuleDict(dict(wte=torch.nn.Embedding(40, 8)))
        fsdp.split_rows(body, fsdp.init_device_mesh("cpu", (1, 1), mesh_dim_names=("nodes", "rows")), "cpu")
        h.requires_grad_()
        loss = head.loss(h, y, chunk=5)
        loss.backward()
        each, measures = head.loss(h, y, reduction="none", measures=True)
        by_h, = torch.autograd.grad(each.sum(), h) # of each token alone
        found = {name: p.grad.full_tensor() for name, p in head.named_parameters()}
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(each.double(), F.cross_entropy(oracle(x), y, reduction="none"), rtol=1e-4, atol=1e-4)
    p = oracle(x).softmax(1)
    torch.testing.assert_close(measures.entropy.double(), -(p * p.log()).sum(1), rtol=1e-4, atol=1e-4)
    assert torch.equal(measures.predicted, p.argmax(1))
    torch.testing.assert_close(by_h, 11 * h.grad, rtol=1e-5, atol=1e-5)
    for name, p in [("h", x), *oracle.named_parameters()]:
        gradient = h.grad if name == "h" else found[name]
        torch.testing.assert_close(gradient.double(), p.grad, rtol=1e-3, atol=1e-4 * p.grad.abs().max().item())


def test_a_split_head_has_a_loss_only():
    head = DistanceHead(4, 8)
    head.__class__ = ParallelHead
    for f in (head, head.distances):
        with pytest.raises(NotImplementedError, match="a loss only"):
            f(torch.zeros(2, 4))


# -----------------------------------------------------------------------------
# what is computed in RESULTS.md


def test_the_estimate_counts_what_a_model_has_and_keeps():
    shape = dict(n_layer=3, n_embd=256, n_kv_head=2, n_head=8, intermediate_size=1024, vocab_size=640)
    memory, traffic, seconds = fsdp.estimate(1, **shape, **{**fsdp.ASSUMED, "tokens": 128, "node": 1})
    model = Qwen2(Qwen2Config(**shape, block_size=128))
    parameters = sum(p.numel() for p in model.parameters())
    assert memory["blocks"] + memory["embedding and head"] == pytest.approx(16 * parameters, rel=0.01)
    assert traffic["blocks"] == traffic["head"] == 0 # nobody else is there
    flops = run.flops_per_token(model) * 128
    products = sum(value for name, value in seconds.items() if name.startswith("products")) * fsdp.ASSUMED["products"]
    assert products == pytest.approx(flops, rel=0.01)

    block, kept = model.transformer.h[0].bfloat16(), {}
    for norm in (block.ln_1, block.ln_2):
        norm.float()
    of_others = {x.untyped_storage().data_ptr() for x in (model.rope, *block.parameters())}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        y = block(torch.randn(1, 128, 256, requires_grad=True), *model.rope[:, :128])
    of_tokens = sum(x.untyped_storage().nbytes() for pointer, x in kept.items() if pointer not in of_others)
    assert y.shape == (1, 128, 256) and 3 * of_tokens == pytest.approx(memory["activations"], rel=0.01)
