"""
What transformers reads from the config.json of an exported run. export_hf.py copies this file into its folder.
"""
from transformers import PretrainedConfig


class DistanceHeadConfig(PretrainedConfig):
    """family ("gpt", "bert" or "qwen2"), and the fields of that family's own config: GPTConfig, BERTConfig, ..."""
    model_type = "distance_head"
    attribute_map = { # the names that tools of transformers ask for
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "block_size",
    }

    def __init__(self, family="gpt", **kwargs):
        self.family = family
        kwargs["tie_word_embeddings"] = kwargs.get("tie_weights", False)
        super().__init__(**kwargs)
