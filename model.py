"""
GPT with any distance head as its output layer. Read distances.py first: it is the only other file that this one needs.

What BERT (model_bert.py) and Qwen2 (model_qwen2.py) have in common with GPT stands in the first part of this file:
how a config becomes a head, the initial weights, and the way from and to transformers.

1) GPT-2 by OpenAI: https://github.com/openai/gpt-2/blob/master/src/model.py
2) nanoGPT, whose names are kept: https://github.com/karpathy/nanoGPT/blob/master/model.py

    model = GPT(GPTConfig(vocab_size=50257, distance="cosine"))
    h = model.features(idx)                 # (B, T, D), what the head sees
    z = model.head(h)                       # (B, T, V), softmax(z) is p
    _, loss = model(idx, targets)           # head.loss(h, targets): exact, never holds B*T x V
"""
import math
import os
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from distances import DistanceHead, find, head_arguments

# -----------------------------------------------------------------------------
# the head of a language model

# Training goes well when the scores z of a new model are spread over the classes by 0.6 to 2.3 nats (standard
# deviation): so says the tuning of eight heads in a small GPT (claims.py, assets/claims/runs.csv). By these defaults a
# distance head's are spread by about one at n_embd = 128 (normalized Bray-Curtis 0.6, Gumbel-Hamming 0.2): n is
# 2 sqrt(n_embd), or the table's multiple, and hidden states have unit norm, near the 0.58 of new prototypes. The linear
# head is that of GPT-2, with half a nat: tuning multiplies its hidden states by 4. Every run can set n and
# feature_scale, and no formula depends on these numbers.
N_SCALES = { # (distance, variant): the default n as a multiple of sqrt(n_embd), where that is not 2
    ("cosine", "stable"): 1.0, # 1 - cos is half the square of Euclid's distance of unit vectors
    ("cosine", "unstable"): 1.0,
    ("chebyshev", "standard"): 1.0,
    ("chebyshev", "smooth"): 10.0,
    ("chebyshev", "cosh"): 13.0,
    ("hamming", "hard"): 1.0,
    ("bray_curtis", "standard"): 0.1,
    ("bray_curtis", "normalized"): 1.0,
    ("bray_curtis", "signed"): 1.0,
}


def default_scales(distance, variant, D):
    """
    Return (n, feature_scale), the defaults of a language model with hidden states of D dimensions.
    A variant of None or "" stands for the distance's default one.
    """
    variant, _ = find(distance, variant)
    if (distance, variant) == ("baseline", None):
        return 1.0, 1.0 # dot products with hidden states of unit variance, as they are
    n = N_SCALES.get((distance, variant), 2.0) * math.sqrt(D)
    if (distance, variant) == ("hamming", "gumbel"):
        return n, 1.0 # beside its noise, of standard deviation 1.8, vectors of unit norm would hardly count
    return n, D ** -0.5 # from unit variance to unit norm


def padded(vocab_size, multiple=64):
    """Return the rows of an embedding or a head for so many tokens: matrix products like round sizes."""
    return -(-vocab_size // multiple) * multiple


def language_model_head(D, vocab_size, distance="cosine", variant=None, n=0.0, feature_scale=0.0, rows=0, **arguments):
    """
    Make a head for hidden states of D dimensions and a vocabulary: language_model_head(768, 50257, "minkowski", p=3.0).
    An n or a feature_scale of 0 stands for the distance's default above.

    The model has to multiply its last hidden states, of unit variance, by head.feature_scale. The weight has `rows`
    rows, by default the vocabulary padded to round sizes. The other arguments are DistanceHead's.
    """
    default_n, default_scale = default_scales(distance, variant, D)
    head = DistanceHead(D, rows or padded(vocab_size), distance, variant, n=n or default_n, num_classes=vocab_size,
                        **arguments)
    head.feature_scale = feature_scale or default_scale
    return head


def settled(config):
    """Return a model's config with numbers in the place of defaults: a checkpoint must not depend on what these are."""
    head = head_arguments(vars(config)) # "minkowski:p=3" is a distance with its parameters
    n, feature_scale = default_scales(head["distance"], head["variant"], config.n_embd)
    return replace(config, n=config.n or n, feature_scale=config.feature_scale or feature_scale)


def lm_head(config, num_ids=0):
    """
    Make the head that a model's config describes. num_ids is for a model that reads ids which it never predicts, as
    BERT reads [MASK]: the weight, which may be tied to the embedding, then has rows for them too.
    """
    return language_model_head(config.n_embd, config.vocab_size, feature_scale=config.feature_scale,
                               rows=padded(num_ids or config.vocab_size), **head_arguments(vars(config)))


# -----------------------------------------------------------------------------
# initial and published weights

class LanguageModel(nn.Module):
    """
    The base of GPT, BERT and Qwen2: a model with a backbone `transformer` and a `head`.

    Its features(idx) are the hidden states (B, T, D) that the head sees, and its forward is no more than features, head
    and loss. from_hf and to_hf exchange weights with the transformers model that has the same shape.
    """
    hf_class = None # the name of that model's class in transformers

    def init_weights(self, module):
        """Give one module the initial weights of GPT-2 and BERT; self.apply calls it for all of them."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, name, **overrides):
        """
        Load published weights, by their name on the huggingface hub or from a folder; overrides are those of from_hf.
        Raises ImportError without transformers, OSError where there are none, and ValueError for what does not load.
        """
        transformers = import_transformers(f"init_from={name!r} reads the weights with transformers")
        with readable_weights(name):
            hf_model, info = getattr(transformers, cls.hf_class).from_pretrained(name, output_loading_info=True)
        missing = sorted(info["missing_keys"]) # transformers has filled in random ones
        if missing:
            raise ValueError(f"{name} lacks {len(missing)} weights of a {type(hf_model).__name__}, such as "
                             f"{missing[0]}: it holds another kind of model")
        return cls.from_hf(hf_model, **overrides)

    def hf_weights(self, name, theirs):
        """Return the tensors of theirs, transformers' state dict, that are stacked in our weight of that name."""
        raise NotImplementedError

    def matched_weights(self, hf_model, with_head):
        """
        Yield (name, ours, theirs) for each of our weights. The tensors are views of the same shape, so that one can be
        copied into the other: rows that only one model has (positions, padding of the vocabulary) are left out.
        """
        state = hf_model.state_dict()
        for name, p in self.state_dict().items():
            if name.startswith("head.") and not (with_head and name == "head.weight"): # theirs have nothing else
                continue
            parts = self.hf_weights(name, state)
            for ours, theirs in zip(p.chunk(len(parts)), parts):
                rows = min(len(ours), len(theirs))
                yield name, ours[:rows], theirs[:rows]

    @torch.no_grad()
    def copy_from_hf(self, hf_model):
        """
        Copy transformers' weights into this model. A distance head that is not tied to the embedding keeps its own
        prototypes: the output vectors of theirs were made for dot products.
        """
        with_head = self.head.kind == "linear" and not self.config.tie_weights
        for _, ours, theirs in self.matched_weights(hf_model, with_head):
            ours.copy_(theirs)

    @torch.no_grad()
    def copy_to_hf(self, hf_model):
        """Copy this model's weights into transformers' model, and return that in evaluation mode."""
        hf_model = hf_model.to(self.head.weight).eval()
        for name, ours, theirs in self.matched_weights(hf_model, with_head=True):
            if name.startswith("transformer.ln_f."): # theirs has no other place for the feature scale
                ours = ours * self.head.feature_scale
            theirs.copy_(ours)
        return hf_model

    def refuse_other_heads(self):
        """Raise ValueError for a head that transformers cannot hold without code of ours."""
        if not self.head.is_linear:
            raise ValueError(f"transformers has no layer for the {self.config.distance} head as it is here "
                             f"({self.head.extra_repr()}): export_hf.py writes a folder that brings it")


@contextmanager
def readable_weights(name):
    """Whatever goes wrong while weights are read becomes a ValueError of one line, but for OSError and ImportError."""
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as e: # torch's own message advises to load a pickle that could run code
        raise ValueError(f"{name} does not load ({type(e).__name__}): it is damaged, holds no weights, or asks for "
                         "code that weights do not need") from None


def import_transformers(purpose):
    """Return the package transformers, which is optional. Raises ImportError that says what it is needed for."""
    try:
        import transformers
    except ImportError as e:
        raise ImportError(f"{purpose}: pip install transformers") from e
    return transformers


def pretrained_config(config, overrides, fixed):
    """
    Return the config of pretrained weights with overrides, a dict of its fields, put in.

    Raises ValueError for an override that is no field, that changes one of the `fixed` fields, which the weights
    decide, or that asks for more positions than the weights have.
    """
    unknown = set(overrides) - {f.name for f in fields(config)}
    if unknown:
        raise ValueError(f"{type(config).__name__} has no {', '.join(sorted(unknown))}")
    changed = [key for key in fixed if overrides.get(key, getattr(config, key)) != getattr(config, key)]
    if changed:
        differences = ", ".join(f"{key}={getattr(config, key)} (asked: {overrides[key]})" for key in changed)
        raise ValueError(f"the pretrained weights fix {differences}")
    if overrides.get("block_size", 0) > config.block_size:
        raise ValueError(f"block_size {overrides['block_size']} is beyond the {config.block_size} positions "
                         "of the pretrained weights")
    return replace(config, **overrides)


# -----------------------------------------------------------------------------
# GPT

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257 # tokens; embedding and head are padded to a multiple of 64 rows, which p leaves out
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
    learn_eps: bool = False
    head_bias: bool = False
    learn_scale: bool = False
    softcap: float = 0.0
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    feature_scale: float = 0.0 # hidden states are multiplied by it; 0: the distance's default


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias."""

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
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) # (B, nh, T, hs)
        dropout_p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True) # (B, nh, T, hs)
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
    """GPT-2. Raises ValueError for a config that does not fit together."""
    hf_class = "GPT2LMHeadModel"

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} must be a multiple of n_head {config.n_head}")
        self.config = settled(config)
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
        self.head = lm_head(self.config)
        if config.tie_weights:
            self.transformer.wte.weight = self.head.weight

    def features(self, idx):
        """Map token ids idx (B, T) to hidden states (B, T, D), the head's feature scale applied."""
        B, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"sequence of {T} tokens, but block_size is {self.config.block_size}")
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[:T] # (B, T, D)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            x = block(x)
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
    def from_pretrained(cls, name, **overrides):
        """Load published weights as every language model does; name may also be the ckpt.pt of a run of nanoGPT."""
        if os.path.isfile(name):
            with readable_weights(name):
                checkpoint = dict(torch.load(name, map_location="cpu", weights_only=True))
            return cls.from_nanogpt(checkpoint, **overrides)
        return super().from_pretrained(name, **overrides)

    @classmethod
    def from_nanogpt(cls, checkpoint, **overrides):
        """
        Make a GPT of a checkpoint of nanoGPT's train.py, a dict; overrides are those of from_hf. Its names are ours,
        but for the head's. Raises ValueError for what is no such checkpoint, or does not fit.
        """
        weights = {name.removeprefix("_orig_mod."): p for name, p in checkpoint.get("model", {}).items()}
        if "lm_head.weight" not in weights or "model_args" not in checkpoint:
            raise ValueError("this is no checkpoint of nanoGPT's train.py: model_args or lm_head.weight is missing")
        names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
        config = GPTConfig(**{name: checkpoint["model_args"][name] for name in names}, tie_weights=True)
        model = cls(pretrained_config(config, overrides, ("n_layer", "n_head", "n_embd", "vocab_size", "bias")))
        weights["head.weight"] = weights["lm_head.weight"]
        state = model.state_dict()
        names = [name for name in state if not name.startswith("head.")]
        if model.head.kind == "linear" and not model.config.tie_weights:
            names.append("head.weight")
        missing = [name for name in names if name not in weights]
        if missing:
            raise ValueError(f"this checkpoint of nanoGPT's train.py has no {missing[0]}: it is damaged")
        for name in names: # rows that only one has, of positions or padding, are left out
            rows = min(len(state[name]), len(weights[name]))
            state[name][:rows] = weights[name][:rows]
        return model

    @classmethod
    def from_hf(cls, hf_model, **overrides):
        """
        Make a GPT of a transformers GPT2LMHeadModel in memory. overrides are fields of GPTConfig, such as dropout, a
        smaller block_size, or a distance, whose prototypes start afresh unless tie_weights. Raises ValueError for
        what does not fit.
        """
        hf = hf_model.config
        if hf.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
            raise ValueError(f"this GPT has the tanh GELU, the model has {hf.activation_function!r}")
        if hf.layer_norm_epsilon != 1e-5 or hf.n_inner not in (None, 4 * hf.n_embd):
            raise ValueError("this GPT has layer_norm_epsilon 1e-5 and n_inner 4 n_embd, "
                             f"the model has {hf.layer_norm_epsilon} and {hf.n_inner}")
        config = GPTConfig(
            block_size=hf.n_positions,
            vocab_size=hf.vocab_size,
            n_layer=hf.n_layer,
            n_head=hf.n_head,
            n_embd=hf.n_embd,
            dropout=hf.resid_pdrop,
            bias=True,
            tie_weights=hf.tie_word_embeddings,
        )
        model = cls(pretrained_config(config, overrides, ("n_layer", "n_head", "n_embd", "vocab_size", "bias")))
        model.copy_from_hf(hf_model)
        return model

    def to_hf(self):
        """
        Make a transformers GPT2LMHeadModel that gives the same scores. With bias=False its biases keep their initial
        zeros. Raises ValueError for any head but the plain linear one, ImportError without transformers.
        """
        self.refuse_other_heads()
        transformers, c = import_transformers("to_hf makes a model of transformers"), self.config
        return self.copy_to_hf(transformers.GPT2LMHeadModel(transformers.GPT2Config(
            n_positions=c.block_size,
            vocab_size=c.vocab_size,
            n_layer=c.n_layer,
            n_head=c.n_head,
            n_embd=c.n_embd,
            resid_pdrop=c.dropout,
            embd_pdrop=c.dropout,
            attn_pdrop=c.dropout,
            tie_word_embeddings=c.tie_weights,
        )))

    def hf_weights(self, name, theirs):
        if name == "head.weight":
            return [theirs["lm_head.weight"]]
        if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")): # transformers keeps GPT-2's Conv1D layout
            return [theirs[name].T]
        return [theirs[name]]
