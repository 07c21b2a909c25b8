"""Lists the families of language models that train.py knows, and loads the model of a run again."""
import os
from collections import namedtuple

import safe
from model import GPT, GPTConfig
from model_bert import BERT, BERTConfig
from model_qwen2 import Qwen2, Qwen2Config
from run import load_weights

# pretrained: the names of the published weights that init_from takes, where * stands for anything
Family = namedtuple("Family", "Model Config pretrained")
FAMILIES = {
    "gpt": Family(GPT, GPTConfig, ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")),
    "bert": Family(BERT, BERTConfig, ("bert*",)),
    "qwen2": Family(Qwen2, Qwen2Config, ("Qwen/Qwen2*",)),
}


def load_run(out_dir, checkpoint="best.pt", device="cpu"):
    """
    Return (the run's model in evaluation mode, the run's config, a dict, and the step of the checkpoint).
    Raises SystemExit where there is no such checkpoint, or a damaged one, or one that does not say its n.
    """
    path = os.path.join(out_dir, checkpoint)
    if not os.path.exists(path):
        raise SystemExit(f"{path} is not there: train first (python train.py --out_dir={out_dir}), "
                         "or name another --out_dir or --checkpoint")
    try:
        ckpt = safe.load(path)
        safe.check_shards(path, ckpt)
        if "shards" in ckpt: # ckpt.pt of a sharded run
            import fsdp
            ckpt["model"] = fsdp.whole_weights(os.path.join(out_dir, ckpt["shards"]["folder"]))
    except ValueError as e:
        raise SystemExit(str(e)) from None
    if not (ckpt["model_args"].get("n") and ckpt["model_args"].get("feature_scale")):
        raise SystemExit(f"{path} is of an earlier version: it does not say its n and feature_scale, whose defaults "
                         f"have changed since. read it with the commit that {out_dir}/config.json names as git")
    family = FAMILIES[ckpt["config"].get("model", "gpt")]
    model = family.Model(family.Config(**ckpt["model_args"]))
    load_weights(model, ckpt["model"])
    return model.eval().to(device), ckpt["config"], ckpt["step"]
