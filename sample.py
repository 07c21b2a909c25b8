"""
Writes text with a trained model, or fills in [MASK] with BERT, and shows which tokens the head's geometry takes for
alike.

$ python sample.py --out_dir=out/demo
$ python sample.py --out_dir=out/demo --start='def main(' --temperature=0 --num_samples=1
$ python sample.py --out_dir=out/demo --num_samples=0 --nearest='self,return,True'
$ python sample.py --init_from=gpt2 --start=FILE:prompt.txt
$ python sample.py --out_dir=out/bert --start='    return [MASK].name'

It reads one checkpoint and, for the tokenizer, the dataset folder that the run was trained on. There is no key-value
cache: each token costs a full forward pass.
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
    """
    Continue idx (B, T) by up to max_new_tokens tokens, and return all of them (B, T + new). A sequence that has
    written eot goes on as eot, until all have. The arguments are those of the settings above.
    """
    ended = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
    for _ in range(max_new_tokens):
        z = model(idx[:, -model.config.block_size:])[0][:, -1].float() # (B, V)
        if temperature == 0:
            token = z.argmax(-1)
        else:
            p = (z / temperature).softmax(-1)
            p, ids = p.sort(-1, descending=True) # (B, V)
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
    """
    Return a line of text for each [MASK] in the text: the k tokens that are most probable there, read from both sides.
    Raises ValueError where there is no [MASK], or more text than the model has positions for.
    """
    if " [MASK]" in text and len(encoding.encode(" a")) == 1: # the space belongs to the word behind it, which is masked
        text = text.replace(" [MASK]", "[MASK]")
    parts = [encoding.encode(part) for part in text.split("[MASK]")]
    if len(parts) == 1:
        raise ValueError(f"BERT fills in [MASK], there is none in {text!r}")
    ids = parts[0]
    for part in parts[1:]:
        ids = [*ids, model.mask_id, *part]
    if len(ids) > model.config.block_size:
        raise ValueError(f"start has {len(ids)} tokens, block_size is {model.config.block_size}")
    idx = torch.tensor([ids], device=model.head.weight.device) # (1, T)
    positions = (idx == model.mask_id).nonzero()[:, 1][None] # (1, masks)
    z = model(idx, positions=positions)[0][0] # (masks, V)
    p, tokens = z.softmax(-1).topk(min(k, model.config.vocab_size)) # (masks, k)
    lines = []
    for row_p, row in zip(p.tolist(), tokens.tolist()):
        lines.append("  ".join(f"{encoding.decode([t])!r} {q:.3f}" for t, q in zip(row, row_p)))
    return lines


@torch.no_grad()
def nearest_prototypes(model, encoding, words, k):
    """
    Return a line of text for each word: the k tokens whose prototypes lie nearest to its own, by the head's own
    distance. The linear head has none, so that it takes the largest dot products.
    """
    head, lines = model.head, []
    linear = head.distance == "baseline"
    for word in words:
        try:
            found = [encoding.encode(" " + word), encoding.encode(word)]
        except ValueError as e: # a character that the vocabulary does not have
            lines.append(f"{word!r:>12}  {e}")
            continue
        found = [ids for ids in found if len(ids) == 1]
        if not found:
            lines.append(f"{word!r:>12} is more than one token")
            continue
        own = found[0] # [id]
        values = head(head.weight[own])[0] if linear else head.distances(head.weight[own])[0] # (V,)
        values[own] = -torch.inf if linear else torch.inf # the token itself comes last
        values, tokens = values.topk(min(k, len(values) - 1), largest=linear)
        neighbours = "  ".join(f"{encoding.decode([t])!r} {v:.3g}" for t, v in zip(tokens.tolist(), values.tolist()))
        lines.append(f"{encoding.decode(own)!r:>12}  {neighbours}")
    return lines


def print_samples(model, encoding, prompt, device):
    """Print num_samples continuations of the prompt, a list of ids, each up to the end of its text."""
    idx = torch.tensor(prompt, device=device).repeat(num_samples, 1) # (B, T)
    generator = torch.Generator(device=device).manual_seed(seed)
    idx = generate(model, idx, max_new_tokens, temperature, top_k, top_p, encoding.eot, generator)
    for i, ids in enumerate(idx.tolist()):
        note, new = "", ids[len(prompt):]
        if encoding.eot in new:
            note = " (end of text)"
            new = new[:new.index(encoding.eot)]
        title = f" sample {i + 1} "
        print(f"{title:-^80}\n{encoding.decode(prompt + new)}{note}")


def best_device():
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def main():
    problems = []
    configure(globals(), problems=problems)
    published = FAMILIES["gpt"].pretrained
    if init_from not in ("run", *published):
        problems.append(f"init_from is {init_from!r}: use run, {', '.join(published)}")
    for key, value in (("num_samples", num_samples), ("max_new_tokens", max_new_tokens), ("temperature", temperature)):
        if value < 0:
            problems.append(f"{key} is {value}, it must be >= 0")
    if num_nearest < 1:
        problems.append(f"num_nearest is {num_nearest}, it must be at least 1")
    if top_k < 0:
        problems.append(f"top_k is {top_k}: use the number of tokens, or 0 for all")
    if not 0 < top_p <= 1:
        problems.append(f"top_p is {top_p}, it must lie in (0, 1]")
    prompt_file = start.removeprefix("FILE:") if start.startswith("FILE:") else None
    if prompt_file is not None and not os.path.exists(prompt_file):
        problems.append(f"start: there is no file {prompt_file!r}")
    fail(problems)

    place = best_device() if device == "auto" else device
    try:
        if init_from == "run":
            model, config, step = load_run(out_dir, checkpoint, place)
            data_dir = os.path.join(config["data_dir"], config["dataset"])
            name = f"{os.path.join(out_dir, checkpoint)} at step {step}"
            encoding = load_encoding(load_meta(data_dir), data_dir)
        else:
            model, name = GPT.from_pretrained(init_from).eval().to(place), init_from
            encoding = load_encoding({"encoding": "gpt2", "eot": 50256}, None)
        text = start
        if prompt_file is not None:
            with open(prompt_file, encoding="utf-8") as f:
                text = f.read()
        prompt = encoding.encode(text)
    except (ImportError, OSError, ValueError) as e:
        raise SystemExit(str(e)) from None
    is_bert = isinstance(model, BERT)
    if not prompt and not is_bert:
        raise SystemExit("start is empty: give at least one token to go on from")
    print(f"{name}: {model.head.extra_repr()}")
    if is_bert:
        try:
            lines = fill_masks(model, encoding, text, num_nearest) if num_samples else []
        except ValueError as e:
            raise SystemExit(str(e)) from None
        print(text)
        for i, line in enumerate(lines):
            print(f"[MASK] {i + 1}: {line}")
    elif num_samples:
        print_samples(model, encoding, prompt, place)
    if nearest:
        how = "largest dot products" if model.head.distance == "baseline" else f"{model.head.distance} distance"
        title = f" nearest prototypes, {how} "
        print(f"{title:-^80}")
        print("\n".join(nearest_prototypes(model, encoding, nearest.split(","), num_nearest)))


if __name__ == "__main__":
    main()
