"""
Write text with a trained model (BERT: fill in [MASK]), and show which tokens its geometry thinks alike.

$ python sample.py --out_dir=out/demo
$ python sample.py --out_dir=out/demo --start='def main(' --temperature=0 --num_samples=1
$ python sample.py --out_dir=out/demo --num_samples=0 --nearest='self,return,True'
$ python sample.py --init_from=gpt2 --start=FILE:prompt.txt
$ python sample.py --out_dir=out/bert --start='    return [MASK].name'

It reads one checkpoint and, for the tokenizer, the dataset folder that the run was trained on. No key-value cache: each token
costs a full forward pass.
"""
import os

import torch

from configurator import configure, fail
from data import load_encoding, load_meta
from families import FAMILIES, load_run
from model import GPT
from model_bert import BERT

# -----------------------------------------------------------------------------
# defaults
out_dir = "out/demo" # the run's folder
checkpoint = "best.pt" # or 'ckpt.pt', the last one
init_from = "run" # 'run': out_dir's checkpoint; or 'gpt2', 'gpt2-medium', ... (needs transformers)
start = "\n" # the prompt; or FILE:name, a file that holds it
num_samples = 3
max_new_tokens = 200
temperature = 0.8 # z is divided by it, for a harmonic head as good as raising n; 0: always the most probable token
top_k = 0 # only the k most probable tokens; 0: all
top_p = 1.0 # only the most probable tokens that together have this probability; 1: all
nearest = "" # tokens, comma separated, whose nearest prototypes to show (a leading space is tried too)
num_nearest = 8
seed = 1337
device = "auto" # 'cuda', 'mps', 'cpu', or the first of these that there is
# -----------------------------------------------------------------------------


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, eot=None, generator=None):
    """Continue idx (B, T) by up to max_new_tokens tokens: (B, T + new). A sequence that has written eot goes on as eot."""
    ended = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
    for _ in range(max_new_tokens):
        z = model(idx[:, -model.config.block_size:])[0][:, -1].float() # (B, V)
        if temperature == 0:
            token = z.argmax(-1)
        else:
            p = (z / temperature).softmax(-1)
            p, ids = p.sort(-1, descending=True)
            if top_k > 0:
                p[:, top_k:] = 0
            p[p.cumsum(-1) - p >= top_p] = 0 # the token that crosses top_p stays
            token = ids.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]
        if eot is not None:
            token = token.masked_fill(ended, eot)
            ended |= token == eot
        idx = torch.cat([idx, token[:, None]], 1)
        if ended.all():
            break
    return idx


@torch.no_grad()
def fill_masks(model, encoding, text, k):
    """Lines of text: for each [MASK] of the text, read from both sides, the k most probable tokens. ValueError where there is none, or no room."""
    if " [MASK]" in text and len(encoding.encode(" a")) == 1: # a space belongs to the word behind it, which is masked
        text = text.replace(" [MASK]", "[MASK]")
    parts = [encoding.encode(part) for part in text.split("[MASK]")]
    ids = [i for part in parts for i in (*part, model.mask_id)][:-1]
    if len(parts) == 1:
        raise ValueError(f"BERT fills in [MASK], there is none in {text!r}")
    if len(ids) > model.config.block_size:
        raise ValueError(f"start has {len(ids)} tokens, block_size is {model.config.block_size}")
    idx = torch.tensor([ids], device=model.head.weight.device)
    positions = (idx == model.mask_id).nonzero()[:, 1][None] # (1, masks)
    p, tokens = model(idx, positions=positions)[0][0].softmax(-1).topk(min(k, model.config.vocab_size)) # (masks, k)
    return ["  ".join(f"{encoding.decode([t])!r} {q:.3f}" for t, q in zip(*row)) for row in zip(tokens.tolist(), p.tolist())]


def nearest_prototypes(model, encoding, words, k):
    """Lines of text: for each word, the tokens whose prototypes lie nearest to its own, by the head's own distance."""
    head, lines = model.head, []
    for word in words:
        try:
            ids = next((i for i in (encoding.encode(" " + word), encoding.encode(word)) if len(i) == 1), None)
        except ValueError as e: # a character that the vocabulary does not have
            lines.append(f"{word!r:>12}  {e}")
            continue
        if ids is None:
            lines.append(f"{word!r:>12} is more than one token")
            continue
        linear = head.distance == "baseline" # has no distance: by dot product, the largest first
        near_by = head(head.weight[ids])[0] if linear else head.distances(head.weight[ids])[0] # (V,)
        near_by[ids] = -torch.inf if linear else torch.inf
        values, near = near_by.topk(min(k, len(near_by) - 1), largest=linear)
        lines.append(f"{encoding.decode(ids)!r:>12}  " + "  ".join(f"{encoding.decode([i])!r} {v:.3g}" for i, v in zip(near.tolist(), values.tolist())))
    return lines


if __name__ == "__main__":
    configure(globals())
    fail([message for bad, message in (
        (init_from not in ("run", *FAMILIES["gpt"].pretrained), f"init_from is {init_from!r}: use run, {', '.join(FAMILIES['gpt'].pretrained)}"),
        (num_samples < 0, f"num_samples is {num_samples}, it must be >= 0"),
        (max_new_tokens < 0, f"max_new_tokens is {max_new_tokens}, it must be >= 0"),
        (num_nearest < 1, f"num_nearest is {num_nearest}, it must be at least 1"),
        (temperature < 0, f"temperature is {temperature}, it must be >= 0"),
        (top_k < 0, f"top_k is {top_k}: use the number of tokens, or 0 for all"),
        (not 0 < top_p <= 1, f"top_p is {top_p}, it must lie in (0, 1]"),
        (start.startswith("FILE:") and not os.path.exists(start[5:]), f"start: there is no file {start[5:]!r}"),
    ) if bad])
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if init_from == "run":
            model, config, step = load_run(out_dir, checkpoint, device)
            data_dir = os.path.join(config["data_dir"], config["dataset"])
            meta = load_meta(data_dir)
        else:
            model, step, data_dir = GPT.from_pretrained(init_from).eval().to(device), 0, None
            meta = dict(encoding="gpt2", eot=50256)
        encoding = load_encoding(meta, data_dir)
        text = open(start[5:], encoding="utf-8").read() if start.startswith("FILE:") else start
        prompt = encoding.encode(text)
    except (ImportError, OSError, ValueError) as e:
        raise SystemExit(str(e)) from None
    if not prompt and not isinstance(model, BERT):
        raise SystemExit("start is empty: give at least one token to go on from")
    print(f"{init_from if step == 0 else os.path.join(out_dir, checkpoint) + f' at step {step}'}: {model.head.extra_repr()}")
    if isinstance(model, BERT):
        try:
            lines = fill_masks(model, encoding, text, num_nearest) if num_samples else []
        except ValueError as e:
            raise SystemExit(str(e)) from None
        print("\n".join([text, *(f"[MASK] {i + 1}: {line}" for i, line in enumerate(lines))]))
        num_samples = 0
    idx = torch.tensor(prompt, device=device).repeat(num_samples, 1) # (B, T)
    generator = torch.Generator(device=device).manual_seed(seed)
    for i, ids in enumerate(generate(model, idx, max_new_tokens, temperature, top_k, top_p, encoding.eot, generator).tolist() if num_samples else []):
        end = ids.index(encoding.eot, len(prompt)) if encoding.eot in ids[len(prompt):] else len(ids)
        print(f"{f' sample {i + 1} ':-^80}\n{encoding.decode(ids[:end])}{' (end of text)' if end < len(ids) else ''}")
    if nearest:
        how = "largest dot products" if model.head.distance == "baseline" else f"{model.head.distance} distance"
        print(f"{f' nearest prototypes, {how} ':-^80}")
        print("\n".join(nearest_prototypes(model, encoding, nearest.split(","), num_nearest)))
