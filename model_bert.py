"""
BERT with any distance head as its output layer. Read distances.py and model.py first: this file needs no others.

1) BERT by Google: https://arxiv.org/abs/1810.04805, https://github.com/google-research/bert/blob/master/modeling.py
2) transformers, whose BertForMaskedLM has the same weights:
   https://github.com/huggingface/transformers/blob/main/src/transformers/models/bert

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

from model import LanguageModel, import_transformers, lm_head, padded, pretrained_config, settled


@dataclass
class BERTConfig:
    block_size: int = 512
    vocab_size: int = 50257 # tokens of the text, the only ones that p covers; embedding and head may have more rows
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.1
    tie_weights: bool = True # one matrix for token embeddings and prototypes
    mask_id: int = -1 # the id of [MASK] within the vocabulary (WordPiece: 103); -1: an id of its own, after the text's
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


def mask_tokens(x, rng, mask_id, vocab_size, special=(), probability=0.15):
    """
    Choose the tokens of x (B, T), ids on the CPU, that BERT has to predict, and hide most of them.

    Returns inputs (B, T), labels (B, k) and positions (B, k), all int64. In every sequence k = round(probability T)
    positions, at least one, are chosen and sorted. 80% of them become mask_id, 10% a random id below vocab_size that
    is neither mask_id nor in special, and 10% stay. As k is the same for every sequence, the mean loss over the
    micro-batches of a step is the mean over its masked tokens.

    All random numbers come from rng, a np.random.RandomState, whose stream no new version of numpy may change;
    RandomState([seed, step, micro_step, rank]) makes the masks a pure function of these four.
    Raises ValueError for a probability outside of (0, 1).
    """
    if not 0 < probability < 1:
        raise ValueError(f"probability must lie in (0, 1), got {probability}")
    B, T = x.shape
    k = max(1, round(probability * T))
    tokens = x.numpy()
    order = np.argsort(rng.random_sample((B, T)), axis=1, kind="stable")
    positions = np.sort(order[:, :k], axis=1) # (B, k)
    labels = np.take_along_axis(tokens, positions, 1) # (B, k)

    fate = rng.random_sample((B, k))
    excluded = [i for i in {*special, mask_id} if 0 <= i < vocab_size]
    candidates = np.delete(np.arange(vocab_size), excluded)
    drawn = candidates[rng.randint(len(candidates), size=(B, k), dtype=np.int64)]
    shown = np.where(fate < 0.9, drawn, labels)
    shown[fate < 0.8] = mask_id
    inputs = tokens.copy()
    np.put_along_axis(inputs, positions, shown, 1)
    return tuple(torch.from_numpy(a.astype(np.int64, copy=False)) for a in (inputs, labels, positions))


class LayerNorm(nn.LayerNorm):
    """LayerNorm with BERT's eps."""

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
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) # (B, nh, T, hs)
        dropout_p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p) # (B, nh, T, hs), no mask: all see all
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
    """A block with post-LN: each norm comes after the sum."""

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


# the parts of our weights' names and what transformers' BertForMaskedLM calls them; our c_attn stacks three of theirs
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
    """Return the names in transformers of the weights that are stacked in one of ours."""
    for ours, theirs in HF_NAMES.items():
        name = name.replace(ours, theirs)
    if "{}" in name:
        return [name.format(part) for part in ("query", "key", "value")]
    return [name]


class BERT(LanguageModel):
    """
    BERT for masked tokens. Every token sees all others: sequences are full, so there is no mask for padding.

    mask_id and pad_id are the ids of [MASK] and of padding; num_ids counts all ids that the model reads.
    Raises ValueError for a config that does not fit together.
    """
    hf_class = "BertForMaskedLM"

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} must be a multiple of n_head {config.n_head}")
        if not -1 <= config.mask_id < config.vocab_size:
            raise ValueError(f"mask_id {config.mask_id} must lie within the {config.vocab_size} tokens, "
                             "or be -1: an id of its own beyond them")
        self.config = settled(config)
        if config.mask_id == -1: # the two ids come after the text's
            self.mask_id, self.pad_id, self.num_ids = config.vocab_size, config.vocab_size + 1, config.vocab_size + 2
        else: # they are among the text's: WordPiece pads with 0
            self.mask_id, self.pad_id, self.num_ids = config.mask_id, 0, config.vocab_size
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(padded(self.num_ids), config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            wse=nn.Embedding(2, config.n_embd), # segments
            ln_e=LayerNorm(config.n_embd), # after the sum of the three embeddings
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            mlm=nn.Linear(config.n_embd, config.n_embd), # the transform between encoder and head
            ln_f=LayerNorm(config.n_embd),
        ))
        self.apply(self.init_weights)
        # the head is made last, so that every head meets the same backbone for the same seed
        self.head = lm_head(self.config, self.num_ids)
        if config.tie_weights: # the embedding's initial weights stay; their 0.02 is nearly the head's 1 / sqrt(3 D)
            self.head.weight = self.transformer.wte.weight

    def encode(self, idx, segments=None):
        """
        Map token ids idx (B, T) and segments (B, T) of 0 and 1, by default all 0, to the encoder's last hidden states
        (B, T, D).
        """
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"sequence of {T} tokens, but block_size is {self.config.block_size}")
        segment = self.transformer.wse.weight[0] if segments is None else self.transformer.wse(segments)
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[:T] + segment # (B, T, D)
        x = self.transformer.ln_e(x)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            x = block(x)
        return x

    def features(self, idx, positions=None, segments=None):
        """
        Map token ids idx (B, T) to (B, T, D), or to (B, k, D) at positions (B, k): BERT's transform of the hidden
        states, the head's feature scale applied.
        """
        x = self.encode(idx, segments)
        if positions is not None: # before the transform, which then runs only where a token is predicted
            x = x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[2])) # (B, k, D)
        x = F.gelu(self.transformer.mlm(x))
        return self.transformer.ln_f(x) * self.head.feature_scale

    def forward(self, idx, targets=None, positions=None):
        """
        With targets (B, k) at positions (B, k), or (B, T) without positions, return (None, the mean loss in nats);
        targets of -1 do not count. Without targets, return (z (B, k, V) or (B, T, V), None).
        """
        h = self.features(idx, positions)
        if targets is None:
            return self.head(h), None
        return None, self.head.loss(h, targets, ignore_index=-1)

    @classmethod
    def from_hf(cls, hf_model, **overrides):
        """
        Make a BERT of a transformers BertForMaskedLM in memory. overrides are fields of BERTConfig, such as mask_id,
        without which [MASK] and padding are two new ids, dropout, a smaller block_size, or a distance, whose
        prototypes start afresh unless tie_weights. Raises ValueError for what does not fit.
        """
        hf = hf_model.config
        expected = dict(
            hidden_act="gelu",
            layer_norm_eps=1e-12,
            type_vocab_size=2,
            intermediate_size=4 * hf.hidden_size,
            position_embedding_type="absolute",
            is_decoder=False,
        )
        differences = []
        for key, value in expected.items():
            found = getattr(hf, key, value)
            if found != value:
                differences.append(f"{key} {value!r} (the model: {found!r})")
        if differences:
            raise ValueError("this BERT has " + ", ".join(differences))
        config = BERTConfig(
            block_size=hf.max_position_embeddings,
            vocab_size=hf.vocab_size,
            n_layer=hf.num_hidden_layers,
            n_head=hf.num_attention_heads,
            n_embd=hf.hidden_size,
            dropout=hf.hidden_dropout_prob,
            tie_weights=hf.tie_word_embeddings,
        )
        model = cls(pretrained_config(config, overrides, ("n_layer", "n_head", "n_embd", "vocab_size")))
        bias = hf_model.state_dict()["cls.predictions.decoder.bias"].abs().max().item()
        if bias > 0 and model.config.distance == "baseline":
            warnings.warn(f"the decoder's bias, up to {bias:.3g}, is dropped: a head here has none, "
                          "so the logits differ by it", stacklevel=2)
        model.copy_from_hf(hf_model)
        return model

    @classmethod
    def from_pretrained(cls, name, **overrides):
        """Load published weights; the id of [MASK] is the tokenizer's, as the model's own config does not name it."""
        if overrides.get("mask_id", -1) == -1:
            transformers = import_transformers(f"init_from={name!r} reads the weights with transformers")
            overrides["mask_id"] = transformers.AutoTokenizer.from_pretrained(name).mask_token_id
        return super().from_pretrained(name, **overrides)

    def to_hf(self):
        """
        Make a transformers BertForMaskedLM that gives the same scores and loss. Where [MASK] and padding have ids of
        their own, they are the last two of its vocabulary, and a bias keeps them out of p, as here. Raises ValueError
        for any head but the plain linear one, ImportError without transformers.
        """
        self.refuse_other_heads()
        transformers, c = import_transformers("to_hf makes a model of transformers"), self.config
        hf_model = self.copy_to_hf(transformers.BertForMaskedLM(transformers.BertConfig(
            max_position_embeddings=c.block_size,
            vocab_size=self.num_ids,
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            hidden_size=c.n_embd,
            intermediate_size=4 * c.n_embd,
            hidden_dropout_prob=c.dropout,
            attention_probs_dropout_prob=c.dropout,
            pad_token_id=self.pad_id,
            tie_word_embeddings=c.tie_weights,
        )))
        with torch.no_grad():
            hf_model.get_output_embeddings().bias[c.vocab_size:] = -1e4 # which half precision has, too
        return hf_model

    def hf_weights(self, name, theirs):
        return [theirs[part] for part in hf_names(name)]
