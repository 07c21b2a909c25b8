"""
Muon for the matrices of a language model's blocks and AdamW for all else, as one optimizer.

Muon (https://kellerjordan.github.io/posts/muon) steps along the momentum's nearest orthogonal matrix in place of the
momentum, so that no direction of a matrix lags behind. torch.optim.Muon finds it by five Newton-Schulz steps in
bfloat16. Rows of an embedding and prototypes are points of their own, and vectors have no directions to balance: they
stay with AdamW, as is common practice. torch's defaults hold (momentum 0.95, Nesterov), but for adjust_lr_fn: scaled as
https://arxiv.org/abs/2502.16982 has it, to the size of AdamW's updates, one learning rate, schedule and weight decay
serve both.

With --sharding=fsdp each rank has the momentum of its share. A matrix has to be whole to be made orthogonal: one at a
time is gathered on every rank, which keeps its share of what comes out. All ranks so do the same five steps, whose cost
does not fall with their number.
"""
import torch


def hidden_matrices(model):
    """Return the parameters for Muon: the weights (out, in) of linear layers, but for the head's."""
    modules = [module for name, module in model.named_modules() if not name.startswith("head")]
    return [module.weight for module in modules if isinstance(module, torch.nn.Linear)]


class MuonAdamW(torch.optim.Optimizer):
    """
    Takes a model and run.parameter_groups's groups of its parameters. Of the first, which decays, the hidden matrices
    become a group of their own, for Muon. Both optimizers work on this one's groups and state, so that it is saved,
    loaded and given its learning rate as any other.
    """

    def __init__(self, model, groups, lr, betas, fused):
        ids = {id(p) for p in hidden_matrices(model)}
        decaying, other = groups
        matrices = [p for p in decaying["params"] if id(p) in ids]
        rest = [p for p in decaying["params"] if id(p) not in ids]
        self.muon = torch.optim.Muon([{**decaying, "params": matrices}], lr=lr, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW([{**decaying, "params": rest}, other], lr=lr, betas=betas, fused=fused)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self.is_sharded = any(hasattr(p, "full_tensor") for p in matrices) # DTensors
        self.share()

    def share(self):
        """Give both optimizers the groups and the state of this one, which loading replaces."""
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self.muon.state = self.adamw.state = self.state

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.share()

    def step(self, closure=None):
        if self.is_sharded:
            sharded_step(self.muon)
        else:
            self.muon.step()
        self.adamw.step()


@torch.no_grad()
def sharded_step(muon):
    """torch.optim.Muon's step for matrices that are DTensors, split between ranks. All ranks call it together."""
    # here, as it takes a second that other runs need not wait for
    from torch.distributed.tensor import distribute_tensor
    for group in muon.param_groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            state = muon.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p.grad)
            average = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
            whole = p.full_tensor()
            whole.grad = p.grad.lerp(average, group["momentum"]).full_tensor() # Nesterov's look-ahead
            torch.optim.Muon([{**group, "params": [whole], "momentum": 0.0, "nesterov": False}]).step()
            p.copy_(distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)) # this rank's share
