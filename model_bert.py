"""
BERT, with any distance head as its output layer: read distances.py and model.py first, the two other files that this one needs.

1) BERT by Google: https://arxiv.org/abs/1810.04805, https://github.com/google-research/bert/blob/master/modeling.py
2) transformers, whose BertForMaskedLM has the same weights: https://github.com/huggingface/transformers/blob/main/src/transformers/models/bert

    model = BERT(BERTConfig(vocab_size=50257, distance="cosine"))
    rng = np.random.RandomState([seed, step, micro_step, rank])
    inputs, labels, positions = mask_tokens(x, rng, model.mask_id, 50257)
    h = model.features(inputs, positions)   # (B, k, D), what the head sees: the masked positions only
    z = model.head(h)                       # (B, k, V), softmax(z) is p
    _, loss = model(inputs, labels, positions)
"""
import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import LanguageModel, lm_head, padded, pretrained_config, transformers_class


@dataclass
class BERTConfig:
    block_size: int = 512
    vocab_size: int = 50257 # tokens of the text, those that are predicted; the other rows of embedding and head are masked out of p
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.1
    tie_weights: bool = True # one matrix for token embeddings and prototypes
    mask_id: int = -1 # of [MASK]. -1: vocab_size, the first id beyond the text's, and padding is the one after it. WordPiece has it within: 103
    # the head, see distances.py
    distance: str = "baseline"
    variant: str = "" # "": the distance's default
    distance_params: str = "" # such as "p=3"
    link: str = "harmonic"
    n: float = 0.0 # exponent; 0: the distance's default
    learn_n: bool = False
    eps: float = 1e-4
    feature_scale: float = 0.0 # hidden states are multiplied by it; 0: the distance's default


def mask_tokens(x, rng, mask_id, vocab_size, special=(), probability=0.15):
    """
    x (B, T) token ids on the CPU -> inputs (B, T), labels (B, k), positions (B, k), all int64.

    In every sequence exactly k = round(probability T) positions, at least one, are chosen; they come sorted. Each becomes mask_id (80%),
    a random id below vocab_size that is neither mask_id nor one of special (10%), or stays (10%). As k is the same for all, the mean over
    the micro-batches of a step is the mean over its masked tokens. Nothing but rng is drawn from: a np.random.RandomState, as its stream is
    frozen; RandomState([seed, step, micro_step, rank]) makes the masks a pure function of these. ValueError for an illegal probability.
    """
    if not 0 < probability < 1:
        raise ValueError(f"probability must lie in (0, 1), got {probability}")
    B, T = x.shape
    k = max(1, round(probability * T))
    tokens = x.numpy()
    positions = np.sort(np.argsort(rng.random_sample((B, T)), axis=1, kind="stable")[:, :k], axis=1)
    labels, fate = np.take_along_axis(tokens, positions, 1), rng.random_sample((B, k))
    real = np.delete(np.arange(vocab_size), [i for i in {*special, mask_id} if 0 <= i < vocab_size])
    drawn = real[rng.randint(len(real), size=(B, k), dtype=np.int64)]
    inputs = tokens.copy()
    np.put_along_axis(inputs, positions, np.where(fate < 0.8, mask_id, np.where(fate < 0.9, drawn, labels)), 1)
    return tuple(torch.from_numpy(a.astype(np.int64, copy=False)) for a in (inputs, labels, positions))


class LayerNorm(nn.LayerNorm):
    """with BERT's eps"""

    def __init__(self, n_embd):
        super().__init__(n_embd, eps=1e-12)


class SelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd) # q, k, v for all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2)) # (B, nh, T, hs)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = config.dropout

    def forward(self, x):
        x = self.c_proj(F.gelu(self.c_fc(x)))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """post-LN: each norm comes after the sum"""

    def __init__(self, config):
        super().__init__()
        self.attn = SelfAttention(config)
        self.ln_1 = LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.ln_2 = LayerNorm(config.n_embd)

    def forward(self, x):
        x = self.ln_1(x + self.attn(x))
        x = self.ln_2(x + self.mlp(x))
        return x


# our names and those of transformers' BertForMaskedLM; c_attn holds three of theirs
HF_NAMES = {
    "transformer.wte.": "bert.embeddings.word_embeddings.",
    "transformer.wpe.": "bert.embeddings.position_embeddings.",
    "transformer.wse.": "bert.embeddings.token_type_embeddings.",
    "transformer.ln_e.": "bert.embeddings.LayerNorm.",
    "transformer.h.": "bert.encoder.layer.",
    ".attn.c_attn.": ".attention.self.{}.",
    ".attn.c_proj.": ".attention.output.dense.",
    ".ln_1.": ".attention.output.LayerNorm.",
    ".mlp.c_fc.": ".intermediate.dense.",
    ".mlp.c_proj.": ".output.dense.",
    ".ln_2.": ".output.LayerNorm.",
    "transformer.mlm.": "cls.predictions.transform.dense.",
    "transformer.ln_f.": "cls.predictions.transform.LayerNorm.",
    "head.": "cls.predictions.decoder.",
}


def hf_names(name):
    for ours, theirs in HF_NAMES.items():
        name = name.replace(ours, theirs)
    return [name.format(part) for part in ("query", "key", "value")] if "{}" in name else [name]


class BERT(LanguageModel):
    """Every token sees all others: sequences are full, there is no mask for padding. mask_id and pad_id are the ids to use. Raises
    ValueError for a config that does not fit together."""
    hf_class = "BertForMaskedLM"

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} must be a multiple of n_head {config.n_head}")
        if not -1 <= config.mask_id < config.vocab_size:
            raise ValueError(f"mask_id {config.mask_id} must lie within the {config.vocab_size} tokens, or be -1: an id of its own beyond them")
        self.config = config
        own_ids = config.mask_id == -1
        self.num_ids = config.vocab_size + 2 * own_ids
        self.mask_id, self.pad_id = (config.vocab_size, config.vocab_size + 1) if own_ids else (config.mask_id, 0) # WordPiece pads with 0
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(padded(self.num_ids), config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            wse=nn.Embedding(2, config.n_embd), # segments
            ln_e=LayerNorm(config.n_embd),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            mlm=nn.Linear(config.n_embd, config.n_embd), # the transform between encoder and head
            ln_f=LayerNorm(config.n_embd),
        ))
        self.apply(self.init_weights)
        # the head is made last, so that every head meets the same backbone for the same seed
        self.head = lm_head(config, self.num_ids)
        if config.tie_weights: # in BERT's initialisation, which at this size is the head's own: 0.02 against 1 / sqrt(3 D)
            self.head.weight = self.transformer.wte.weight

    def encode(self, idx, segments=None):
        """idx (B, T) token ids, segments (B, T) of 0 and 1, by default all 0 -> (B, T, D), the last hidden states of the encoder."""
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"sequence of {T} tokens, but block_size is {self.config.block_size}")
        segment = self.transformer.wse.weight[0] if segments is None else self.transformer.wse(segments)
        x = self.transformer.ln_e(self.transformer.wte(idx) + self.transformer.wpe.weight[:T] + segment)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            x = block(x)
        return x

    def features(self, idx, positions=None, segments=None):
        """idx (B, T) token ids -> (B, T, D), or (B, k, D) at positions (B, k): the MLM transform of the hidden states, the head's
        feature scale applied."""
        x = self.encode(idx, segments)
        if positions is not None: # before the transform: it too runs only where a token is predicted
            x = x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[2]))
        return self.transformer.ln_f(F.gelu(self.transformer.mlm(x))) * self.head.feature_scale

    def forward(self, idx, targets=None, positions=None):
        """With targets (B, k) at positions (B, k), or (B, T), -1 ignored: (None, mean loss in nats). Without: (z (B, k or T, V), None)."""
        h = self.features(idx, positions)
        if targets is None:
            return self.head(h), None
        return None, self.head.loss(h, targets)

    @classmethod
    def from_hf(cls, hf_model, **overrides):
        """From a transformers BertForMaskedLM in memory. overrides: BERTConfig fields, such as mask_id (without it [MASK] and padding are two
        new ids), a distance (its prototypes then start afresh unless tie_weights), dropout, or a smaller block_size."""
        hf = hf_model.config
        expected = dict(hidden_act="gelu", layer_norm_eps=1e-12, type_vocab_size=2, intermediate_size=4 * hf.hidden_size,
                        position_embedding_type="absolute", is_decoder=False)
        differ = [f"{k} {v!r} (the model: {getattr(hf, k)!r})" for k, v in expected.items() if getattr(hf, k, v) != v]
        if differ:
            raise ValueError("this BERT has " + ", ".join(differ))
        config = BERTConfig(block_size=hf.max_position_embeddings, vocab_size=hf.vocab_size, n_layer=hf.num_hidden_layers, n_head=hf.num_attention_heads,
                            n_embd=hf.hidden_size, dropout=hf.hidden_dropout_prob, tie_weights=hf.tie_word_embeddings)
        config = pretrained_config(config, overrides, ("n_layer", "n_head", "n_embd", "vocab_size"))
        model = cls(config)
        ours, theirs = model.state_dict(), hf_model.state_dict()
        linear, bias = config.distance == "baseline", theirs["cls.predictions.decoder.bias"].abs().max().item()
        if linear and bias > 0:
            warnings.warn(f"the decoder's bias, up to {bias:.3g}, is dropped: a head here has none, so the logits differ by it", stacklevel=2)
        with torch.no_grad():
            for name, p in ours.items():
                if name.startswith("transformer.") or linear and not config.tie_weights:
                    q = torch.cat([theirs[k] for k in hf_names(name)])
                    n = min(len(p), len(q)) # fewer positions, or rows that the vocabulary does not have
                    p[:n] = q[:n]
        return model

    @classmethod
    def from_pretrained(cls, name, **overrides):
        if overrides.get("mask_id", -1) == -1: # the vocabulary has it, the model's config does not say where
            tokenizer_class = transformers_class("AutoTokenizer", f"init_from={name!r} reads the weights with transformers")
            overrides["mask_id"] = tokenizer_class.from_pretrained(name).mask_token_id
        return super().from_pretrained(name, **overrides)

    def to_hf(self):
        """A transformers BertForMaskedLM with the same weights; [MASK] and padding are the last two tokens of its vocabulary where they
        are ids of their own. Raises ValueError for a distance head."""
        self.refuse_distance_head()
        c = self.config
        hf_config = transformers_class("BertConfig")(
            vocab_size=self.num_ids, hidden_size=c.n_embd, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
            intermediate_size=4 * c.n_embd, hidden_dropout_prob=c.dropout, attention_probs_dropout_prob=c.dropout,
            max_position_embeddings=c.block_size, pad_token_id=self.pad_id, tie_word_embeddings=c.tie_weights)
        hf = transformers_class("BertForMaskedLM")(hf_config).to(self.head.weight.dtype).eval()
        theirs = hf.state_dict()
        for name, p in self.state_dict().items():
            if name.startswith("transformer.ln_f."):
                p = p * self.head.feature_scale
            for k, q in zip(hf_names(name), p.chunk(len(hf_names(name)))):
                theirs[k].copy_(q[:len(theirs[k])]) # without the padding rows
        return hf
