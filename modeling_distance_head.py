"""
A run with a distance head as a model of transformers: generate, Trainer, pipelines, lm-evaluation-harness. export_hf.py
copies this file into its folder, beside the model's own code.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) # BERT: AutoModelForMaskedLM
    model(input_ids).logits              # (B, T, V), softmax is p
    model(input_ids, labels=labels).loss # the head's exact loss; in training without logits, which need memory
    model.generate(input_ids)            # there is no key-value cache: each token costs a full forward pass
    model.get_output_embeddings()        # the DistanceHead
"""
from dataclasses import fields

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput, MaskedLMOutput

from configuration_distance_head import DistanceHeadConfig
from model import GPT, GPTConfig, padded
from model_bert import BERT, BERTConfig
from model_qwen2 import Qwen2, Qwen2Config, rotary

FAMILIES = {"gpt": (GPT, GPTConfig), "bert": (BERT, BERTConfig), "qwen2": (Qwen2, Qwen2Config)}
NOT_TAKEN = ("inputs_embeds", "position_ids", "token_type_ids", "past_key_values") # to pass them over would be wrong


def without_kind(module, state_dict, prefix, metadata):
    """A hook that takes a head's kind, which is no tensor of the module, out of a state dict: the config has it."""
    state_dict.pop(f"{prefix}model.head.kind", None) # a linear head has none


def with_kind(module, state_dict, prefix, *unused):
    """A hook that puts it back, as our head refuses weights that do not say of what kind they are."""
    kind = torch.tensor(list(module.model.head.kind.encode()), dtype=torch.uint8)
    state_dict.setdefault(f"{prefix}model.head.kind", kind)


class DistanceHeadModel(PreTrainedModel):
    """The base of both: one of our models as `model`. Raises ValueError for a config that does not fit together."""
    config_class = DistanceHeadConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"model.head.weight": "model.transformer.wte.weight"} # given tie_word_embeddings
    _supports_sdpa = True
    _supports_attention_backend = False # else vLLM would take the model, and build a dot product in the head's place

    def __init__(self, config):
        super().__init__(config)
        Model, Config = FAMILIES[config.family]
        arguments = {f.name: getattr(config, f.name) for f in fields(Config) if hasattr(config, f.name)}
        self.model = Model(Config(**arguments))
        kind = getattr(config, "head_kind", self.model.head.kind)
        if kind != self.model.head.kind:
            raise ValueError(f"the weights are those of a {kind} head, the config says {self.model.head.kind}")
        self.register_state_dict_post_hook(without_kind)
        self.register_load_state_dict_pre_hook(with_kind)
        self.post_init()

    def init_weights(self):
        """Our models have made their initial weights themselves."""
        self.tie_weights()

    def _init_weights(self, module):
        """Fill what no file of weights has: Qwen2's angles."""
        if isinstance(module, Qwen2):
            c = module.config
            module.rope = rotary(c.block_size, c.n_embd // c.n_head, c.rope_theta).to(module.transformer.ln_f.weight)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self):
        return self.model.transformer.wte

    def set_input_embeddings(self, value):
        self.model.transformer.wte = value

    def get_output_embeddings(self):
        return self.model.head

    def set_output_embeddings(self, value):
        head, rows = self.model.head, len(self.model.transformer.wte.weight)
        if getattr(value, "kind", None) != head.kind or len(value.weight) != rows:
            raise ValueError(f"the output layer is a {head.kind} head of {rows} rows, which resize_token_embeddings "
                             f"changes: {value} cannot take its place")
        value.feature_scale = head.feature_scale
        self.model.head = value

    @torch.no_grad()
    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=False):
        """
        Change the number of tokens: the first ones stay, new ones start as in a new model, and rows are padded as there
        whatever pad_to_multiple_of is. Raises ValueError for a BERT whose [MASK] comes after the text's tokens.
        """
        wte, head = self.model.transformer.wte, self.model.head
        if new_num_tokens is None:
            return wte
        if getattr(self.config, "mask_id", 0) == -1:
            raise ValueError("more tokens would take the id of [MASK], which comes after those of the text")
        rows = padded(new_num_tokens)
        kept = min(rows, len(wte.weight))
        weight = nn.init.normal_(wte.weight.new_empty(rows, wte.embedding_dim), std=0.02)
        weight[:kept] = wte.weight[:kept]
        wte.weight, wte.num_embeddings = nn.Parameter(weight), rows
        head.resize(rows).num_classes = new_num_tokens
        if self.config.tie_word_embeddings:
            head.weight = wte.weight
        self.config.vocab_size = self.model.config.vocab_size = new_num_tokens
        return wte

    def features(self, input_ids, attention_mask=None, **unused):
        """
        Map input_ids (B, T) to hidden states (B, T, D). Our models know no padding: a row that has some goes through
        without it, on its own, and a padded position repeats the state before it.
        """
        for name in NOT_TAKEN:
            if unused.get(name) is not None:
                raise ValueError(f"a model with a distance head takes input_ids and attention_mask, no {name}")
        if attention_mask is None or attention_mask.all():
            return self.model.features(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask {tuple(attention_mask.shape)} must have the shape of input_ids "
                             f"{tuple(input_ids.shape)}: 1 for a token, 0 for padding")
        rows = []
        for ids, mask in zip(input_ids, attention_mask.bool()):
            mask = mask | ~mask.any() # a row of padding alone
            h = self.model.features(ids[mask][None])[0] # (tokens, D)
            rows.append(h[(mask.cumsum(0) - 1).clamp_min(0)]) # (T, D)
        return torch.stack(rows)

    def loss_of(self, h, labels, num_items_in_batch):
        """The loss of h (..., D) and labels (...), where -100 does not count; Trainer gives the number of those that
        do."""
        if num_items_in_batch is None:
            return self.model.head.loss(h, labels)
        return self.model.head.loss(h, labels, reduction="sum") / num_items_in_batch


class DistanceHeadForCausalLM(DistanceHeadModel, GenerationMixin):

    def forward(self, input_ids=None, attention_mask=None, labels=None, logits_to_keep=0, num_items_in_batch=None,
                **kwargs):
        """labels (B, T) are the input_ids: each is predicted from those before it, and -100 does not count."""
        h = self.features(input_ids, attention_mask, **kwargs)
        loss = None
        if labels is not None:
            loss = self.loss_of(h[:, :-1], labels[:, 1:], num_items_in_batch)
            if self.training:
                return CausalLMOutput(loss=loss)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutput(loss=loss, logits=self.model.head(h[:, kept]))

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, logits_to_keep=1, **unused):
        """All tokens each time, or as many as there are positions for, even where generate was asked for a cache."""
        last = slice(-self.config.block_size, None)
        mask = None if attention_mask is None else attention_mask[:, last]
        return dict(input_ids=input_ids[:, last], attention_mask=mask, logits_to_keep=logits_to_keep)


class DistanceHeadForMaskedLM(DistanceHeadModel):

    def forward(self, input_ids=None, attention_mask=None, labels=None, num_items_in_batch=None, **kwargs):
        """labels (B, T) are -100 but where a token is to be predicted."""
        h = self.features(input_ids, attention_mask, **kwargs)
        loss = None
        if labels is not None:
            chosen = labels != -100
            loss = self.loss_of(h[chosen], labels[chosen], num_items_in_batch)
            if self.training:
                return MaskedLMOutput(loss=loss)
        return MaskedLMOutput(loss=loss, logits=self.model.head(h))
