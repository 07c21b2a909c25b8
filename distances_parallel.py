"""
The exact loss of distances.py over prototypes that are split between ranks, for a vocabulary that one GPU should not
hold: each rank has its share of the rows of the weight, and no rank ever holds V x D, or the scores of all tokens.

    head.__class__ = ParallelHead       # fsdp.py does so, once the weight is a DTensor that is split by its rows
    loss = head.loss(h, targets)        # on every rank of the group at once, each with tokens of its own

The ranks' tokens take turns. A chunk of the hidden states of one rank goes to all, each computes distances and scores
to its own prototypes; of every token the maximum, the sum of exponentials and the target's score are reduced over the
ranks, which makes the same log-sum-exp everywhere. The gradient of the prototypes stays where they are; that of the
chunk is added up at the rank whose tokens they are. For N tokens on each of R ranks a rank so receives R N D numbers
and adds up as many, whatever V is, and holds one chunk x V / R of scores.

All distances and links are those of distances.py: this file needs it, torch and a process group, and nothing else.
"""
import math
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from distances import DistanceHead, SquaredL2, Tiles, add_rows, full_fp32, local_vjp, slices


def local(x):
    """This rank's part of a parameter that is split between ranks, or its copy of one that is not."""
    return x.to_local() if hasattr(x, "to_local") else x


# what a DistanceHead adds to the loss in training, and this one refuses
NOT_SPLIT = "z_loss", "label_smoothing", "margin", "angular_margin"


def has_rows(head, name):
    """Whether that parameter of a head has a row for each prototype, and is split with them."""
    if name in ("weight", "bias", "scale"):
        return True
    make = head.spec.tensors.get(name)
    return make is not None and make(1, 1).shape != make(2, 1).shape


class ParallelHead(DistanceHead):
    """A DistanceHead that is split between the ranks of `group`: its weight, and whatever else has a row for each
    prototype, are DTensors of which rank r holds the r-th share of the rows. All ranks call loss together, as often as
    each other, and each gets the loss of its own tokens.

    The backward pass gives to h its own gradient; to this rank's prototypes that of the sum of all ranks' losses; and
    to a parameter without rows, such as log_n, this rank's part of that, for the caller to add up over the ranks. The
    upstream gradient has to be the same on all ranks. With reduction="none" h alone gets a gradient. There are no
    second derivatives."""
    group = None # by default all ranks
    of_one_chunk = 2 ** 22, 2 ** 25 # scores that a rank holds at a time, on a CPU and on a GPU: there 128 MB

    def forward(self, h):
        raise NotImplementedError("the prototypes are split between ranks, of which none holds all scores: "
                                  "a head like this one has a loss only")

    distances = forward

    @property
    def n(self):
        return local(self.log_n).exp() if self.fixed_n is None else self.fixed_n

    def prototype_norms(self):
        """Every rank gets those of all, as this is V numbers only."""
        norms = local(self.weight).detach().float().norm(dim=1)
        of_each_rank = [torch.empty_like(norms) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(of_each_rank, norms, self.group)
        return torch.cat(of_each_rank)[:self.num_classes]

    def _inputs(self, h):
        h, weight, tensors = super()._inputs(h)
        return h, local(weight), {name: local(x) for name, x in tensors.items()}

    def _is_small(self, h):
        return False # no rank has the scores of all prototypes

    def _is_compiled(self, h, differentiate):
        return False # the compiler would have to see what lies between ranks

    def _plan(self, inputs, o, chunk, autocast_dtype, per_row, measures=None):
        if self._rule().adds:
            raise ValueError(f"a head that is split between ranks has no {' and no '.join(NOT_SPLIT)}")
        on_cpu, on_gpu = self.of_one_chunk
        rows = max(1, (on_gpu if inputs["h"].is_cuda else on_cpu) // len(inputs["weight"]))
        plan = super()._plan(inputs, o, chunk or rows, autocast_dtype, per_row, measures)
        first = dist.get_rank(self.group) * len(inputs["weight"])
        own_classes = min(max(self.num_classes - first, 0), len(inputs["weight"])) # the rest of this share is padding
        return replace(plan, num_classes=own_classes)

    def _loss_of(self, plan, inputs, targets, weights):
        inputs = {name: local(x) for name, x in inputs.items()}
        if plan.per_row:
            inputs = {name: x if name == "h" else x.detach() for name, x in inputs.items()}
        with full_fp32(inputs["h"]):
            h, w, terms = plan.prepare(inputs)
        return _ParallelLoss.apply(plan, self.group, targets, weights, tuple(terms), h, w, *terms.values())


class _ParallelLoss(torch.autograd.Function):
    """sum(weights * -log p_y) of this rank's tokens, or the vector of its terms with plan.per_row. Gradients are made
    in the forward pass, while the hidden states are here, and only scaled in the backward pass."""

    @staticmethod
    def forward(ctx, plan, group, targets, weights, names, h, w, *terms):
        with full_fp32(h):
            nll, dh, dw, dterms = parallel_loss(plan, group, h, w, dict(zip(names, terms)), targets, weights,
                                                differentiate=any(ctx.needs_input_grad))
        ctx.per_row, ctx.grads = plan.per_row, (dh, dw, dterms)
        return weights * nll if plan.per_row else (weights * nll).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        dh, dw, dterms = ctx.grads
        nothing = [None] * 5 # for plan, group, targets, weights and names
        if ctx.per_row: # h alone is asked for, and its term
            g = g[:, None]
            return *nothing, dh * g, None, *(x * g if name == "a" else None for name, x in dterms.items())
        for x in (dh, dw, *dterms.values()):
            x *= g
        return *nothing, dh, dw, *dterms.values()


def parallel_loss(plan, group, h, w, terms, targets, weights, differentiate):
    """-log p_y (N,) of this rank's tokens, and the gradients of the sum over all ranks of sum(weights * -log p_y): by
    this rank's h (N, D) and term a (N, 1), whole; by its w (V / R, D) and term b, whole; by n, what these w add to it.

    All that distances.chunked_loss says of numbers holds here too: the target's term and close pairs are computed
    directly, value and gradient."""
    core, rank = plan.core, dist.get_rank(group)
    if isinstance(core, Tiles):
        core.compile = False
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.long, device=h.device)
    sizes[rank] = len(h) # tokens, which may differ: at the end of an evaluation, or where masks do
    dist.all_reduce(sizes, group=group)
    sizes = sizes.tolist()
    w_matmul = w.to(plan.matmul_dtype)
    precomputed = core.precompute(w_matmul)
    s_buffer = h.new_empty(min(plan.chunk, max(sizes)), len(w)) # every chunk's
    nll, dh, dw, dterms, sums = h.new_empty(len(h)), None, None, {}, 0
    if differentiate:
        dh, dw = torch.zeros_like(h), torch.zeros_like(w)
        dterms = {name: torch.zeros_like(x) for name, x in terms.items()}

    for owner, size in enumerate(sizes):
        for rows in slices(size, plan.chunk):
            c = rows.stop - rows.start
            tokens = {"h": h, "targets": targets, "weights": weights}
            if "a" in terms:
                tokens["a"] = terms["a"]
            for name, x in tokens.items(): # from their owner to all
                tokens[name] = x[rows].contiguous() if rank == owner else x.new_empty(c, *x.shape[1:])
                dist.broadcast(tokens[name], group_src=owner, group=group)
            h_c = tokens["h"]
            terms_c = {name: tokens.get(name, x) for name, x in terms.items()}
            own_targets = tokens["targets"] - rank * len(w) # a row of w, if the target is this rank's
            i = ((own_targets >= 0) & (own_targets < len(w))).nonzero()[:, 0] # the tokens whose target is
            j = own_targets[i]

            # s (c, V / R), where the targets and close pairs are computed directly
            h_matmul, s = h_c.to(plan.matmul_dtype), s_buffer[:c]
            core.forward(h_matmul, w_matmul, precomputed, s)
            s = core.assemble(s, h_matmul, precomputed)
            s_target = core.value(h_c[i], w[j])
            s[i, j] = math.inf # no close pair
            pairs = None
            if isinstance(core, SquaredL2):
                pairs = core.close_pairs(s, precomputed)
                core.refine(h_c, w, s, pairs)
            s[i, j] = s_target

            # z (c, V / R), and log p over the prototypes of all ranks
            if differentiate:
                z, pull = local_vjp(plan.scores, s, terms_c)
            else:
                z = plan.scores(s, terms_c)
            z_max, own_max = z.amax(1), z.amax(1)
            predicted = z.argmax(1) + rank * len(w) if plan.measures else None
            dist.all_reduce(z_max, dist.ReduceOp.MAX, group)
            z -= z_max[:, None]
            of_targets = z.new_zeros(c).index_put_((i,), z[i, j])
            of_entropy = [(z.exp() * z.clamp_min(torch.finfo(z.dtype).min)).sum(1)] if plan.measures else []
            p = z.exp_()
            parts = torch.stack([p.sum(1), of_targets, *of_entropy])
            dist.all_reduce(parts, group=group)
            total, of_targets, *of_entropy = parts
            if rank == owner:
                nll[rows] = total.log() - of_targets
            if plan.measures:
                predicted[own_max < z_max] = torch.iinfo(predicted.dtype).max # another rank has the largest
                dist.all_reduce(predicted, dist.ReduceOp.MIN, group)
                if rank == owner:
                    plan.measures.predicted[rows] = predicted
                    plan.measures.entropy[rows] = total.log() - of_entropy[0] / total
            if not differentiate:
                continue

            # the gradients: dz is softmax less one-hot
            p /= total[:, None]
            p[i, j] -= 1
            ds, dterms_c = pull(p.mul_(tokens["weights"][:, None]))
            dh_c = torch.zeros_like(h_c)
            gh, gw = core.gradient(h_c[i], w[j], s_target, ds[i, j])
            add_rows(dh_c, i, gh)
            add_rows(dw, j, gw)
            ds[i, j] = 0
            if pairs is not None:
                core.backward_of_pairs(h_c, w, s, ds, pairs, dh_c, dw)
                ds[pairs.unbind(1)] = 0
            of_chunk = core.backward(h_matmul, w_matmul, s, ds, dh_c, dw) # all but these, whose ds is 0
            if of_chunk is not None:
                sums = of_chunk + sums
            dist.reduce(dh_c, group_dst=owner, group=group)
            if "a" in terms:
                da = dterms_c.pop("a").contiguous()
                dist.reduce(da, group_dst=owner, group=group)
            if rank == owner:
                dh[rows] = dh_c
                if "a" in terms:
                    dterms["a"][rows] = da
            for name, total in dterms_c.items():
                dterms[name] += total
    if isinstance(sums, torch.Tensor):
        core.add_sums(w_matmul, sums, dw)
    return nll, dh, dw, dterms


class ParallelEmbedding(nn.Embedding):
    """An nn.Embedding whose weight is split between ranks as ParallelHead's is; the two may share it. Every rank asks
    the owners of its tokens' rows for them, and sends their gradients back: D numbers a token each way. The gradient
    of the weight is that of the sum of all ranks' losses. All ranks call it together."""
    group = None # by default all ranks

    def forward(self, idx):
        weight, R = local(self.weight), dist.get_world_size(self.group)
        flat = idx.reshape(-1)
        owner = flat // len(weight)
        order = owner.argsort(stable=True)
        asked = owner.bincount(minlength=R) # of each rank
        wanted = torch.empty_like(asked) # by each rank
        dist.all_to_all_single(wanted, asked, group=self.group)
        asked, wanted = asked.tolist(), wanted.tolist()
        rows = flat.new_empty(sum(wanted))
        dist.all_to_all_single(rows, flat[order] % len(weight), wanted, asked, group=self.group)
        x = _Exchange.apply(self.group, F.embedding(rows, weight), asked, wanted) # (N, D), in the order of owners
        return x[order.argsort()].reshape(*idx.shape, -1)


class _Exchange(torch.autograd.Function):
    """x (sum of sent, D), whose rows go to the ranks in turn, as many as sent says: received from all, likewise."""

    @staticmethod
    def forward(ctx, group, x, received, sent):
        ctx.arguments = group, sent, received
        out = x.new_empty(sum(received), x.shape[1])
        dist.all_to_all_single(out, x, received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx, g):
        group, received, sent = ctx.arguments
        return None, _Exchange.apply(group, g.contiguous(), received, sent), None, None
