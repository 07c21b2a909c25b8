"""
A model larger than a GPU's memory, train.py's --sharding=fsdp: how it is split between ranks, how its gradients meet,
and its checkpoints.

The blocks are split by torch's FSDP2: each rank keeps its share of every weight, gradient and optimizer state, and the
weights of one block at a time are gathered where they are needed. What has a row per token, the embedding and the
prototypes, is never gathered: the ranks of a node have a share of the rows each, and distances_parallel.py computes
look-up and loss where the rows are. Nodes hold copies of these rows, whose gradients are averaged once a step: with
every node that joins, the tokens that a rank's prototypes meet would else become more.

A checkpoint has one more part here, a folder shards_0, shards_1 or shards_2, in which every rank writes its share
(torch.distributed.checkpoint, so that any number of ranks can read it). ckpt.pt comes after it, whole or not at all,
and names the folder and the sha256 of each file there: it is as good as its folder, and the one before it keeps its
own. All nodes need one disk. best.pt has the weights of all ranks, as without sharding.
"""
import os
import pickle
import shutil
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, StorageMeta
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard

import safe
from distances_parallel import NOT_SPLIT, ParallelEmbedding, ParallelHead, has_rows, local
from model_qwen2 import SCALES

# -----------------------------------------------------------------------------
# the split


def problems(config):
    """A list with a message for each setting that a sharded run cannot have."""
    found = []
    if "RANK" not in os.environ:
        found.append("sharding is 'fsdp', which splits a model between the ranks that torchrun starts: "
                     "torchrun --nproc_per_node=8 train.py ...")
    if config["dtype"] == "float16":
        found.append("dtype is 'float16', which sharding=fsdp does not scale: use bfloat16 or float32")
    if config["variant"] == "covariance":
        found.append("variant is 'covariance', whose estimate needs what no rank has with sharding=fsdp: "
                     "use another variant of mahalanobis")
    for name in NOT_SPLIT:
        if config.get(name):
            found.append(f"{name} is {config[name]}, which the loss over split prototypes does not have: "
                         "set it to 0, or sharding to 'none'")
    return found


def shard(model, device, dtype="float32"):
    """
    Split a language model between all ranks, which hold the same weights on the CPU; the shares go to the device. Under
    autocast to bfloat16 the blocks are gathered in it, as its own casts would be kept until the backward pass: a copy
    of all of them. Raises ValueError where the rows of the prototypes do not divide by the ranks of a node.
    """
    device_type, ranks = torch.device(device).type, dist.get_world_size()
    of_a_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    rows = model.head.num_prototypes
    if rows % of_a_node:
        raise ValueError(f"sharding=fsdp splits {rows} rows of prototypes between the {of_a_node} ranks of a node, "
                         "which must divide them: use another --nproc_per_node, such as a power of two")
    if ranks % of_a_node:
        raise ValueError(f"sharding=fsdp wants as many ranks on each node, got {ranks} in all and {of_a_node} here")
    mesh = init_device_mesh(device_type, (ranks // of_a_node, of_a_node), mesh_dim_names=("nodes", "rows"))
    apart = split_rows(model, mesh, device)
    of_all = init_device_mesh(device_type, (ranks,))
    precision = MixedPrecisionPolicy()
    if dtype == "bfloat16":
        precision = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        for norm in (block.ln_1, block.ln_2): # apart, as they stay in fp32
            fully_shard(norm, mesh=of_all)
        fully_shard(block, mesh=of_all, mp_policy=precision)
    fully_shard(model, mesh=of_all, ignored_params=apart)
    register_fsdp_forward_method(model, "features")


def split_rows(model, mesh, device):
    """Split embedding and head, which may share their weight. Returns the set of their new parameters."""
    made = {} # by the id of the old one
    for module, split in (model.transformer.wte, ParallelEmbedding), (model.head, ParallelHead):
        for name, p in list(module.named_parameters(recurse=False)):
            is_split = split is ParallelEmbedding or has_rows(module, name)
            if id(p) not in made:
                made[id(p)] = p, nn.Parameter(distributed(p.detach(), is_split, mesh, device))
            setattr(module, name, made[id(p)][1])
        module.__class__, module.group = split, mesh.get_group("rows")
    return {new for _, new in made.values()}


def distributed(x, is_split, mesh, device):
    """x as a DTensor: this rank's share of its rows, with a copy on every node, or a copy on every rank."""
    if is_split:
        x = x.chunk(mesh.size(1))[mesh.get_local_rank("rows")]
    placement = Shard(0) if is_split else Replicate()
    return DTensor.from_local(x.to(device, copy=True), mesh, [Replicate(), placement], run_check=False)


# -----------------------------------------------------------------------------
# the gradients

def clip_gradients(model, max_norm):
    """
    What DDP and torch.nn.utils.clip_grad_norm_ do, for a sharded model: make the gradients those of the mean over the
    ranks, of which FSDP has done its part, and shrink them to max_norm. Returns their norm before.
    """
    ranks, squares = dist.get_world_size(), []
    gradients = [(p, local(p.grad)) for p in model.parameters() if p.grad is not None]
    own = {id(p) for module in (model.transformer.wte, model.head) for p in module.parameters(recurse=False)}
    for p, g in gradients:
        copies = 1
        for dim, placement in enumerate(p.placements):
            if placement.is_replicate():
                copies *= p.device_mesh.size(dim)
                dist.all_reduce(g, group=p.device_mesh.get_group(dim))
        if id(p) in own:
            g /= ranks
        squares.append(g.norm().square() / copies)
    norm = torch.stack(squares).sum()
    dist.all_reduce(norm)
    norm.sqrt_()
    scale = (max_norm / (norm + 1e-6)).clamp_max(1)
    for _, g in gradients:
        g *= scale
    return norm


# -----------------------------------------------------------------------------
# checkpoints

def save(out_dir, names, state, model, optimizer):
    """
    Write the checkpoints `names` of a step, ckpt.pt and perhaps best.pt: state holds what is not split. All ranks call
    it. Raises SystemExit where the disk does not take them; ckpt.pt and its folder are then as they were.
    """
    rank, where = dist.get_rank(), [free_folder(out_dir)] # the first rank's word counts
    dist.broadcast_object_list(where)
    folder = os.path.join(out_dir, *where)
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True) # of a checkpoint that a kill has left unfinished
    dist.barrier()
    with safe.explained(folder):
        try:
            dcp.save(tensors_of(model, optimizer), checkpoint_id=folder)
        except CheckpointException as e: # on every rank, with the errors of all
            (cause, _), *_ = e.failures.values()
            raise OSError(str(cause)) from None
    files = [sorted(os.listdir(folder))] if rank == 0 else [None]
    dist.broadcast_object_list(files)
    hashes = safe.hashes(folder, *files)
    if None in hashes.values():
        raise SystemExit(f"{folder} is not the same on all nodes: out_dir must lie on a disk that they share")
    if rank != 0:
        return
    if "best.pt" in names:
        try:
            whole = {**state, "model": whole_weights(folder), "optimizer": {}}
            safe.save(os.path.join(out_dir, "best.pt"), whole)
        except (MemoryError, RuntimeError) as e: # torch's allocator
            first_line, *_ = str(e).splitlines() or [""]
            safe.print0(f"no best.pt: all weights do not fit into this node's memory ({first_line})")
    groups = optimizer.state_dict()["param_groups"]
    safe.save(os.path.join(out_dir, "ckpt.pt"), {
        **state, "model": {}, "optimizer": {"param_groups": groups}, "shards": {"folder": where[0], "files": hashes},
    }, keep=True)
    for name in set(FOLDERS) - used_folders(out_dir):
        shutil.rmtree(os.path.join(out_dir, name), ignore_errors=True)


FOLDERS = "shards_0", "shards_1", "shards_2" # of ckpt.pt, the one before it, and the one that is being written


def used_folders(out_dir):
    """The names of the folders that ckpt.pt and the checkpoint before it stand for."""
    path, used = os.path.join(out_dir, "ckpt.pt"), set()
    for name in (path, safe.before(path)):
        try:
            used.add(safe.load(name)["shards"]["folder"])
        except (ValueError, KeyError): # there is none, or it is damaged, or of another kind
            pass
    return used


def free_folder(out_dir):
    used = used_folders(out_dir)
    return next(name for name in FOLDERS if name not in used)


def tensors_of(model, optimizer):
    """All tensors of a run by name: weights, and the optimizer's state of each parameter in its order."""
    tensors = {f"model.{name}": x for name, x in model.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{i}.{name}": x for name, x in state.items()})
    return tensors


def load(out_dir, ckpt, model, optimizer):
    """Load a checkpoint's folder into a sharded model, and make ckpt["optimizer"] what its load_state_dict takes."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups: # a step of length 0 makes the state that is to be filled
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    folder = os.path.join(out_dir, ckpt["shards"]["folder"])
    dcp.load(tensors_of(model, optimizer), storage_reader=PlainReader(folder))
    ckpt["optimizer"]["state"] = optimizer.state_dict()["state"]


def whole_weights(folder):
    """The weights of all ranks as one state dict on the CPU, by one process. Raises ValueError for a damaged folder."""
    reader = PlainReader(folder)
    weights = {name: torch.empty(x.size, dtype=x.properties.dtype)
               for name, x in reader.read_metadata().state_dict_metadata.items() if name.startswith("model.")}
    with warnings.catch_warnings(): # that there is one process is meant
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(weights, storage_reader=reader, no_dist=True)
    return {name.removeprefix("model."): x for name, x in weights.items()}


class PlainReader(dcp.FileSystemReader):
    """Reads tensors only: torch's own takes the folder's .metadata, a pickle, to build whatever it asks for."""

    def read_metadata(self, *args, **kwargs):
        path = os.path.join(self.path, ".metadata")
        try:
            with open(path, "rb") as f:
                metadata = PlainUnpickler(f).load()
        except Exception as e: # a damaged pickle can raise anything
            raise ValueError(f"{path} cannot be read as part of a checkpoint: {e!r:.200}") from None
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class PlainUnpickler(pickle.Unpickler):
    """Builds what says where which tensor lies. BytesStorageMetadata is not among it: such bytes are pickles again."""
    LEGAL = {
        "torch": ("Size",), "torch.serialization": ("_get_layout",), "pathlib": ("PosixPath", "WindowsPath"),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.distributed.checkpoint.metadata": (
            "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
            "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    }

    def find_class(self, module, name):
        if (module, name) == ("builtins", "getattr"): # by which an early Python 3.11, as Debian 12's, names a member
            return self.memory_format
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in self.LEGAL.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no tensor needs")
        return super().find_class(module, name)

    @staticmethod
    def memory_format(kind, name):
        """What stands for getattr: the member of this name of torch's enum of memory formats, and of nothing else."""
        if kind is not _MEM_FORMAT_ENCODING:
            raise pickle.UnpicklingError(f"it asks for {name!r:.60} of {kind!r:.60}, which no tensor needs")
        return kind[name]


# -----------------------------------------------------------------------------
# what it would take: `python fsdp.py` computes it

ASSUMED = dict(
    tokens=4096, # of a rank's micro-batch
    node=8, # GPUs
    products=0.4 * 989e12, # FLOP/s that a GPU does, in bf16
    fabric=450e9, # bytes/s of a GPU within its node, each way
    network=50e9, # and to other nodes
)


def estimate(gpus, n_layer, n_embd, n_kv_head, n_head, intermediate_size, vocab_size, tokens, node, products, fabric,
             network):
    """
    What a GPU of so many holds in bytes, moves in bytes and takes in seconds for a Qwen2 and a distance that is a
    matrix product, by name. Weights, gradients and AdamW's two moments are fp32, blocks are gathered in bf16;
    activations are those that autograd keeps of a block under autocast to bf16, without checkpointing.
    """
    kv = n_embd // n_head * n_kv_head
    block = 2 * n_embd * (n_embd + kv) + 3 * n_embd * intermediate_size # norms and biases are nothing beside it
    rows = vocab_size * n_embd # of the embedding, and of the prototypes
    states = tokens * n_embd * 4 # the hidden states of a rank
    memory = {
        "blocks": 16 * n_layer * block / gpus,
        "embedding and head": 16 * 2 * rows / node,
        "gathered blocks": (2 * 2 + 4) * block, # two, one of them ahead of its use, and a gradient
        "loss": 2 * states + 2 * 4 * rows / node + 7 * 4 * ParallelHead.of_one_chunk[1], # with prepared prototypes
        "activations": tokens * n_layer * (32 * n_embd + 4 * kv + 8 * intermediate_size),
    }
    nodes = gpus / node
    traffic = { # that a GPU receives
        "blocks": (2 + 2 + 4) * n_layer * block * (1 - 1 / gpus), # gathered twice, gradients added up
        "head": 2 * (node - 1) * states, # hidden states of the others, and what they add to the gradient of its own
        "head, once a step": 2 * 4 * rows / node * (1 - 1 / nodes), # the nodes' copies of its gradient
    }
    flops_of_blocks = 6 * n_layer * tokens * (block + 2 * n_embd * tokens)
    seconds = {
        "products of blocks": flops_of_blocks / products,
        "products of the head": 6 * tokens * rows / products,
        "traffic of blocks": traffic["blocks"] / (network if nodes > 1 else fabric), # while products are made
        "traffic of the head": traffic["head"] / fabric, # it waits for it
    }
    return memory, traffic, seconds


def print_estimates():
    shape = dict(SCALES["7B"], vocab_size=151936)
    found = {gpus: estimate(gpus, **shape, **ASSUMED) for gpus in (8, 64, 512)}
    print("| of each GPU | " + " | ".join(f"{gpus} GPUs" for gpus in found) + " |")
    print("|---" * (1 + len(found)) + "|")
    for i, (what, unit, scale) in enumerate((("memory", "GB", 1e9), ("traffic", "GB", 1e9), ("time", "ms", 1e-3))):
        parts = [result[i] for result in found.values()]
        for name in parts[0]:
            print(f"| {what}: {name} | " + " | ".join(f"{part[name] / scale:,.1f} {unit}" for part in parts) + " |")
        if what == "memory":
            sums = [f"{sum(part.values()) / scale:,.1f} {unit}" for part in parts]
            print(f"| {what}: all | " + " | ".join(sums) + " |")


if __name__ == "__main__":
    print_estimates()
