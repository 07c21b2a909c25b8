"""
Qwen2 with any distance head as its output layer. Read distances.py and model.py first: this file needs no others.

1) Qwen2 Technical Report: https://arxiv.org/abs/2407.10671
2) transformers, whose Qwen2ForCausalLM gives the same scores:
   https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen2/modeling_qwen2.py

    model = Qwen2(Qwen2Config(**SCALES["tiny"], vocab_size=4096, distance="cosine"))
    h = model.features(idx)                 # (B, T, D), what the head sees
    z = model.head(h)                       # (B, T, V), softmax(z) is p
    _, loss = model(idx, targets)           # head.loss(h, targets): exact, never holds B*T x V
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import LanguageModel, import_transformers, lm_head, padded, pretrained_config, settled


@dataclass
class Qwen2Config:
    block_size: int = 1024 # RoPE has no weights: any length will do
    vocab_size: int = 151936 # tokens; embedding and head are padded to a multiple of 64 rows, which p leaves out
    n_layer: int = 24
    n_head: int = 14 # heads of queries
    n_kv_head: int = 2 # heads of keys and values; n_head / n_kv_head heads of queries share each
    n_embd: int = 896
    intermediate_size: int = 4864 # the width of the MLP
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    dropout: float = 0.0
    tie_weights: bool = False # one matrix for token embeddings and prototypes; the published 0.5B has it
    # the head, see distances.py
    distance: str = "baseline"
    variant: str = "" # "": the distance's default
    distance_params: str = "" # such as "p=3"
    link: str = "harmonic"
    n: float = 0.0 # exponent; 0: the distance's default
    learn_n: bool = False
    eps: float = 1e-4
    learn_eps: bool = False
    head_bias: bool = False
    learn_scale: bool = False
    softcap: float = 0.0
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    feature_scale: float = 0.0 # hidden states are multiplied by it; 0: the distance's default


# shapes by name, each with its number of parameters besides embeddings and head
SCALES = {
    "tiny": dict(n_layer=4, n_head=4, n_kv_head=2, n_embd=128, intermediate_size=352), # 0.7M, for a CPU
    "small": dict(n_layer=6, n_head=6, n_kv_head=2, n_embd=384, intermediate_size=1024), # 9.4M
    "medium": dict(n_layer=12, n_head=12, n_kv_head=2, n_embd=768, intermediate_size=2048), # 73M
    "0.5B": dict(n_layer=24, n_head=14, n_kv_head=2, n_embd=896, intermediate_size=4864), # 358M, Qwen2-0.5B
    "7B": dict(n_layer=28, n_head=28, n_kv_head=4, n_embd=3584, intermediate_size=18944), # 6.5B, Qwen2-7B: see fsdp.py
}


def rotary(block_size, size, theta):
    """Return cos and sin (2, block_size, size / 2) of RoPE's angles t theta^(-2i / size), in fp32."""
    frequencies = 1.0 / theta ** (torch.arange(0, size, 2).float() / size) # (size / 2,)
    angles = torch.arange(block_size).float()[:, None] * frequencies # (block_size, size / 2)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x, cos, sin):
    """Turn the pairs (x_i, x_i+hs/2) of x (B, nh, T, hs) by their position's angles; cos and sin are (T, hs / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.dropout = config.n_head, config.n_kv_head, config.dropout
        size = config.n_embd // config.n_head
        self.q_proj = nn.Linear(config.n_embd, config.n_embd)
        self.k_proj = nn.Linear(config.n_embd, config.n_kv_head * size)
        self.v_proj = nn.Linear(config.n_embd, config.n_kv_head * size)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        size = C // self.n_head
        q = self.q_proj(x).view(B, T, self.n_head, size).transpose(1, 2) # (B, nh, T, hs)
        k = self.k_proj(x).view(B, T, self.n_kv_head, size).transpose(1, 2) # (B, n_kv_head, T, hs)
        v = self.v_proj(x).view(B, T, self.n_kv_head, size).transpose(1, 2) # (B, n_kv_head, T, hs)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        dropout_p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True,
                                           enable_gqa=self.n_kv_head < self.n_head) # (B, nh, T, hs)
        y = self.o_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """SwiGLU: one projection gates the other."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)
        self.dropout = config.dropout

    def forward(self, x):
        x = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin):
        x = x + self.attn(self.ln_1(x), cos, sin)
        x = x + self.mlp(self.ln_2(x))
        return x


# the parts of our weights' names and what transformers' Qwen2ForCausalLM calls them
HF_NAMES = {
    "transformer.wte.": "model.embed_tokens.",
    "transformer.h.": "model.layers.",
    "transformer.ln_f.": "model.norm.",
    ".ln_1.": ".input_layernorm.",
    ".ln_2.": ".post_attention_layernorm.",
    ".attn.": ".self_attn.",
    "head.": "lm_head.",
}


def _hf_name(name):
    """Return the name in transformers of one of our weights."""
    for ours, theirs in HF_NAMES.items():
        name = name.replace(ours, theirs)
    return name


class Qwen2(LanguageModel):
    """Qwen2. Raises ValueError for a config that does not fit together."""
    hf_class = "AutoModelForCausalLM" # loads other families too, which from_hf then refuses by name

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} must be a multiple of n_head {config.n_head}")
        if config.n_kv_head < 1 or config.n_head % config.n_kv_head:
            raise ValueError(f"n_head {config.n_head} must be a multiple of n_kv_head {config.n_kv_head}")
        size = config.n_embd // config.n_head # the dimensions of a head
        if size % 2:
            raise ValueError(f"n_embd / n_head is {size}, it must be even: RoPE turns pairs")
        self.config = settled(config)
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(padded(config.vocab_size), config.n_embd),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.RMSNorm(config.n_embd, config.norm_eps),
        ))
        self.register_buffer("rope", rotary(config.block_size, size, config.rope_theta), persistent=False)
        self.apply(self.init_weights)
        # the head is made last, so that every head meets the same backbone for the same seed
        self.head = lm_head(self.config)
        if config.tie_weights:
            self.transformer.wte.weight = self.head.weight

    def features(self, idx):
        """Map token ids idx (B, T) to hidden states (B, T, D), the head's feature scale applied."""
        B, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"sequence of {T} tokens, but block_size is {self.config.block_size}")
        cos, sin = self.rope[:, :T]
        x = F.dropout(self.transformer.wte(idx), self.config.dropout, self.training)
        for block in self.transformer.h:
            x = block(x, cos, sin)
        return self.transformer.ln_f(x) * self.head.feature_scale

    def forward(self, idx, targets=None):
        """
        With targets (B, T), where -1 does not count, return (None, the mean loss in nats).
        Without, return (z of the last position (B, 1, V), None), which is all that generating needs.
        """
        h = self.features(idx)
        if targets is None:
            return self.head(h[:, [-1]]), None
        return None, self.head.loss(h, targets, ignore_index=-1)

    @classmethod
    def from_hf(cls, hf_model, **overrides):
        """
        Make a Qwen2 in fp32 of a transformers Qwen2ForCausalLM in memory. overrides are fields of Qwen2Config, such as
        dropout, a smaller block_size, or a distance, whose prototypes start afresh unless tie_weights.
        Raises ValueError for what does not fit.
        """
        hf = hf_model.config
        if hf.model_type != "qwen2" or hf.hidden_act != "silu":
            raise ValueError(f"this is Qwen2 with SiLU, the model is {hf.model_type!r} with {hf.hidden_act!r}")
        if hf.use_sliding_window and "sliding_attention" in getattr(hf, "layer_types", ["sliding_attention"]):
            raise ValueError("this Qwen2 sees all that came before, the model has a sliding window")
        rope = getattr(hf, "rope_parameters", None) # transformers 5
        if not rope: # transformers 4
            rope = {**(hf.rope_scaling or {}), "rope_theta": hf.rope_theta}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        size = hf.hidden_size // hf.num_attention_heads
        head_dim = getattr(hf, "head_dim", None) or size
        if rope_type != "default" or head_dim != size:
            raise ValueError(f"this Qwen2 has rope_type 'default' and head_dim {size}, "
                             f"the model has {rope_type!r} and {head_dim}")
        config = Qwen2Config(
            block_size=hf.max_position_embeddings,
            vocab_size=hf.vocab_size,
            n_layer=hf.num_hidden_layers,
            n_head=hf.num_attention_heads,
            n_kv_head=hf.num_key_value_heads,
            n_embd=hf.hidden_size,
            intermediate_size=hf.intermediate_size,
            rope_theta=rope["rope_theta"],
            norm_eps=hf.rms_norm_eps,
            dropout=hf.attention_dropout,
            tie_weights=hf.tie_word_embeddings,
        )
        model = cls(pretrained_config(config, overrides, (
            "n_layer", "n_head", "n_kv_head", "n_embd", "intermediate_size", "rope_theta", "norm_eps", "vocab_size")))
        model.copy_from_hf(hf_model)
        return model

    def to_hf(self):
        """
        Make a transformers Qwen2ForCausalLM that gives the same scores.
        Raises ValueError for any head but the plain linear one, ImportError without transformers.
        """
        self.refuse_other_heads()
        transformers, c = import_transformers("to_hf makes a model of transformers"), self.config
        return self.copy_to_hf(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
            max_position_embeddings=c.block_size,
            vocab_size=c.vocab_size,
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            num_key_value_heads=c.n_kv_head,
            hidden_size=c.n_embd,
            intermediate_size=c.intermediate_size,
            rope_theta=c.rope_theta,
            rms_norm_eps=c.norm_eps,
            attention_dropout=c.dropout,
            tie_word_embeddings=c.tie_weights,
        )))

    def hf_weights(self, name, theirs):
        return [theirs[_hf_name(name)]]
