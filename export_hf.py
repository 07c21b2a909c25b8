"""
Writes a run with the linear head as a checkpoint of transformers, which loads it and gives the same scores:

$ python export_hf.py --out_dir=out/gpt2 --to=gpt2_hf
>>> transformers.AutoModelForCausalLM.from_pretrained('gpt2_hf')        # BERT: AutoModelForMaskedLM

A distance head is refused, as transformers has no layer for it. The tokenizer stays in the dataset's folder.
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


def main():
    problems = []
    configure(globals(), problems=problems)
    if not to:
        problems.append("say where to write, --to=folder")
    elif os.path.exists(to):
        problems.append(f"{to} exists: name another folder")
    fail(problems)
    model, config, step = load_run(out_dir, checkpoint, "cpu")
    try:
        hf = model.to_hf()
    except (ImportError, ValueError) as e:
        raise SystemExit(str(e)) from None
    num_tokens = model.config.vocab_size
    idx = torch.arange(min(64, config["block_size"]))[None] % num_tokens # (1, T)
    with torch.no_grad():
        theirs, ours = hf(idx).logits[..., :num_tokens], model.head(model.features(idx)) # (1, T, V)
    difference = (theirs - ours).abs().max().item()
    hf.save_pretrained(to)
    print(f"{to}: {type(hf).__name__} from {os.path.join(out_dir, checkpoint)} at step {step}, "
          f"logits differ by at most {difference:.1e}")


if __name__ == "__main__":
    main()
