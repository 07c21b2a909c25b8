"""
Write a run with the linear head as a checkpoint of transformers, which loads it and scores the same:

$ python export_hf.py --out_dir=out/gpt2 --to=gpt2_hf
>>> transformers.AutoModelForCausalLM.from_pretrained('gpt2_hf')        # BERT: AutoModelForMaskedLM

A distance head is refused: transformers has no layer for it. The tokenizer stays in the dataset's folder.
"""
import os

import torch

from configurator import configure, fail
from families import load_run

# -----------------------------------------------------------------------------
# defaults
out_dir = "out/gpt2" # the run's folder
checkpoint = "best.pt" # or 'ckpt.pt', the last one
to = "" # the folder to write
# -----------------------------------------------------------------------------

if __name__ == "__main__":
    configure(globals())
    fail([message for bad, message in ((not to, "say where to write, --to=folder"), (to and os.path.exists(to), f"{to} exists: name another folder")) if bad])
    model, config, step = load_run(out_dir, checkpoint, "cpu")
    try:
        hf = model.to_hf()
    except (ImportError, ValueError) as e:
        raise SystemExit(str(e)) from None
    idx = torch.arange(min(64, config["block_size"]))[None] % model.config.vocab_size
    with torch.no_grad():
        difference = (hf(idx).logits[..., :model.config.vocab_size] - model.head(model.features(idx))).abs().max().item()
    hf.save_pretrained(to)
    print(f"{to}: {type(hf).__name__} from {os.path.join(out_dir, checkpoint)} at step {step}, logits differ by at most {difference:.1e}")
