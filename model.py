"""
GPT, with any distance head as its output layer: read distances.py first, it is the only other file this one needs. What BERT and
Qwen2 share with it stands here too: their head's defaults, the initial weights, and the way from published weights.

1) GPT-2 by OpenAI: https://github.com/openai/gpt-2/blob/master/src/model.py
2) nanoGPT, whose names are kept: https://github.com/karpathy/nanoGPT/blob/master/model.py

    model = GPT(GPTConfig(vocab_size=50257, distance="cosine"))
    h = model.features(idx)                 # (B, T, D), what the head sees
    z = model.head(h)                       # (B, T, V), softmax(z) is p
    _, loss = model(idx, targets)           # head.loss(h, targets): exact, never holds B*T x V
"""
import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from distances import DistanceHead, find, parse_head

# -----------------------------------------------------------------------------
# what language models share

# A language model starts with z spread by about half a nat. Most distances do so at n = sqrt(n_embd), on hidden states of unit norm, the
# scale at which prototypes start. Those that need another multiple of sqrt(n_embd), or hidden states of unit variance, stand here.
# Measured on 77,000 tokens only (config/heads.py): defaults to begin with, and no part of any formula.
N_SCALES = {("chebyshev", "smooth"): 8.0, ("chebyshev", "cosh"): 8.0, ("hamming", "hard"): 0.3, ("bray_curtis", "standard"): 0.2,
            ("bray_curtis", "normalized"): 0.5}
UNIT_VARIANCE = {("baseline", None), ("hamming", "gumbel")} # the noise of the latter has a standard deviation of 1.8


def padded(vocab_size, multiple=64):
    """Rows of an embedding or head for vocab_size tokens: matrix products like round sizes. The rows in excess are masked out of p."""
    return -(-vocab_size // multiple) * multiple


def default_scales(distance, variant, D):
    """(n, feature_scale) with which a language model with D-dimensional hidden states begins; variant None or "" is the default one."""
    kind = distance, find(distance, variant)[0]
    return N_SCALES.get(kind, 1.0) * math.sqrt(D), 1.0 if kind in UNIT_VARIANCE else D ** -0.5


def lm_head(config, rows=0):
    """The head that a model's config describes (vocab_size, n_embd, distance, variant, distance_params, link, n, learn_n, eps,
    feature_scale), with the default n and feature scale where the config leaves 0. The model multiplies its last hidden states, which
    have unit variance, by head.feature_scale. rows: of the weight, where it has more than the tokens."""
    arguments = parse_head(config.distance, config.variant, config.distance_params)
    n, feature_scale = default_scales(arguments["distance"], arguments["variant"], config.n_embd)
    head = DistanceHead(config.n_embd, padded(rows or config.vocab_size), **arguments, link=config.link, n=config.n or n,
                        learn_n=config.learn_n, eps=config.eps, num_classes=config.vocab_size)
    head.feature_scale = config.feature_scale or feature_scale
    return head


class LanguageModel(nn.Module):
    """A model with features(idx) (B, T, D) and head, whose forward is the two and the loss; from_hf makes it from transformers' model."""
    hf_class = None # the name in transformers of the model with the same weights

    def init_weights(self, module):
        """GPT-2's and BERT's initial weights, for self.apply."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, name, **overrides):
        """Published weights by name, or a folder that holds them, read by transformers. Raises ImportError where it is missing."""
        hf_class = transformers_class(cls.hf_class, f"init_from={name!r} reads the weights with transformers")
        return cls.from_hf(hf_class.from_pretrained(name), **overrides)

    def refuse_distance_head(self):
        if self.config.distance != "baseline":
            raise ValueError(f"transformers has no layer for the {self.config.distance} head: only a baseline head can be exported")


def transformers_class(name, purpose="a model of transformers is made with it"):
    """transformers.<name>. The package is optional, so that the ImportError says for what it is needed."""
    try:
        import transformers
    except ImportError as e:
        raise ImportError(f"{purpose}: pip install transformers") from e
    return getattr(transformers, name)


def pretrained_config(config, overrides, fixed):
    """The config of pretrained weights with overrides, none of which may change a field of `fixed` or reach beyond the positions.
    Raises ValueError for one that does, or that is no field."""
    unknown = set(overrides) - {f.name for f in fields(config)}
    if unknown:
        raise ValueError(f"{type(config).__name__} has no {', '.join(sorted(unknown))}")
    changed = [k for k in fixed if overrides.get(k, getattr(config, k)) != getattr(config, k)]
    if changed:
        differences = ", ".join(f"{k}={getattr(config, k)} (asked: {overrides[k]})" for k in changed)
        raise ValueError(f"the pretrained weights fix {differences}")
    if overrides.get("block_size", 0) > config.block_size:
        raise ValueError(f"block_size {overrides['block_size']} is beyond the {config.block_size} positions of the pretrained weights")
    return replace(config, **overrides)


# -----------------------------------------------------------------------------
# GPT

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257 # tokens; embedding and head have as many rows rounded up to a multiple of 64, the rest masked out of p
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True # True: biases in Linears and LayerNorms, like GPT-2. False: a bit better and faster
    tie_weights: bool = False # one matrix for token embeddings and prototypes
    # the head, see distances.py
    distance: str = "baseline"
    variant: str = "" # "": the distance's default
    distance_params: str = "" # such as "p=3"
    link: str = "harmonic"
    n: float = 0.0 # exponent; 0: the distance's default
    learn_n: bool = False
    eps: float = 1e-4
    feature_scale: float = 0.0 # hidden states are multiplied by it; 0: the distance's default


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias"""

    def __init__(self, n_embd, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias) # q, k, v for all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2)) # (B, nh, T, hs)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(LanguageModel):
    """Raises ValueError for a config that does not fit together."""
    hf_class = "GPT2LMHeadModel"

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} must be a multiple of n_head {config.n_head}")
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(padded(config.vocab_size), config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=LayerNorm(config.n_embd, config.bias),
        ))
        self.apply(self.init_weights)
        for name, p in self.named_parameters(): # scaled init of the residual projections, per GPT-2 paper
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))
        # the head is made last, so that every head meets the same backbone for the same seed
        self.head = lm_head(config)
        if config.tie_weights:
            self.transformer.wte.weight = self.head.weight

    def features(self, idx):
        """idx (B, T) token ids -> (B, T, D) hidden states, the head's feature scale applied."""
        B, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"sequence of {T} tokens, but block_size is {self.config.block_size}")
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[:T]
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x) * self.head.feature_scale

    def forward(self, idx, targets=None):
        """With targets (B, T), -1 ignored: (None, mean loss in nats). Without: (z of the last position (B, 1, V), None)."""
        h = self.features(idx)
        if targets is None:
            return self.head(h[:, [-1]]), None
        return None, self.head.loss(h, targets)

    @classmethod
    def from_hf(cls, hf_model, **overrides):
        """From a transformers GPT2LMHeadModel in memory. overrides: GPTConfig fields, such as a distance (its prototypes then start
        afresh unless tie_weights), dropout, or a smaller block_size."""
        hf = hf_model.config
        if hf.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
            raise ValueError(f"this GPT has the tanh GELU, the model has {hf.activation_function!r}")
        if hf.layer_norm_epsilon != 1e-5 or hf.n_inner not in (None, 4 * hf.n_embd):
            raise ValueError(f"this GPT has layer_norm_epsilon 1e-5 and n_inner 4 n_embd, the model has {hf.layer_norm_epsilon} and {hf.n_inner}")
        config = GPTConfig(block_size=hf.n_positions, vocab_size=hf.vocab_size, n_layer=hf.n_layer, n_head=hf.n_head, n_embd=hf.n_embd,
                           dropout=hf.resid_pdrop, bias=True, tie_weights=hf.tie_word_embeddings)
        config = pretrained_config(config, overrides, ("n_layer", "n_head", "n_embd", "vocab_size", "bias"))
        model = cls(config)
        ours, theirs = model.state_dict(), hf_model.state_dict()
        with torch.no_grad():
            for name, p in ours.items():
                if name.startswith("transformer."):
                    q = theirs[name]
                    if name.endswith(("attn.c_attn.weight", "c_proj.weight", "c_fc.weight")):
                        q = q.T # transformers keeps GPT-2's Conv1D layout
                    n = min(len(p), len(q)) # fewer positions, or padding rows of the vocabulary
                    p[:n] = q[:n]
            if config.distance == "baseline" and not config.tie_weights:
                model.head.weight[:hf.vocab_size] = theirs["lm_head.weight"]
        return model

    def to_hf(self):
        """A transformers GPT2LMHeadModel with the same weights, those of the tokens alone. ValueError for a distance head."""
        self.refuse_distance_head()
        c = self.config
        hf_config = transformers_class("GPT2Config")(
            vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head, resid_pdrop=c.dropout,
            embd_pdrop=c.dropout, attn_pdrop=c.dropout, tie_word_embeddings=c.tie_weights)
        hf = transformers_class("GPT2LMHeadModel")(hf_config).to(self.head.weight.dtype).eval()
        ours = {**self.state_dict(), "lm_head.weight": self.head.weight}
        with torch.no_grad():
            for name, q in hf.state_dict().items():
                p = ours.get(name)
                if p is None: # bias=False
                    q.zero_()
                else:
                    if name.endswith(("attn.c_attn.weight", "c_proj.weight", "c_fc.weight")):
                        p = p.T # transformers keeps GPT-2's Conv1D layout
                    q.copy_(p[:len(q)] * (self.head.feature_scale if name.startswith("transformer.ln_f") else 1.0))
        return hf
