"""
Writes a run as a folder that transformers loads and that can be uploaded as it is: config, weights, tokenizer, and a
model card (README.md) with data, settings, validation loss and energy.

$ python export_hf.py --out_dir=out/gpt2_cosine --to=gpt2_cosine_hf
>>> transformers.AutoModelForCausalLM.from_pretrained('gpt2_cosine_hf', trust_remote_code=True)

BERT is loaded by AutoModelForMaskedLM. transformers has no layer for a distance head, so its folder brings the code:
distances.py as it is, and the models. A run with the linear head becomes one of transformers' own classes.
"""
import json
import os
import re
import shutil
from dataclasses import asdict

import torch

from configurator import configure, fail
from data import JsonTokenizer, load_encoding, load_meta
from emissions import PARTS
from families import load_run
from model import import_transformers
from model_bert import BERT
from run_folder import read_config, read_emissions, read_rows

# -----------------------------------------------------------------------------
# defaults
out_dir = "out/gpt2" # the run's folder
checkpoint = "best.pt" # or 'ckpt.pt', the last one
to = "" # the folder to write
# -----------------------------------------------------------------------------

_HERE = os.path.dirname(os.path.abspath(__file__)) # a public text would be a setting
CODE = ("configuration_distance_head", "modeling_distance_head", "distances", "model", "model_bert", "model_qwen2")


def with_distance_head(model, family):
    """Return a run's model with a distance head as a model of transformers, whose config names the copied code."""
    from configuration_distance_head import DistanceHeadConfig
    from modeling_distance_head import DistanceHeadForCausalLM, DistanceHeadForMaskedLM
    Model = DistanceHeadForMaskedLM if isinstance(model, BERT) else DistanceHeadForCausalLM
    config = DistanceHeadConfig(family=family, head_kind=model.head.kind, **asdict(model.config))
    config.auto_map = {
        "AutoConfig": "configuration_distance_head.DistanceHeadConfig",
        auto_class(model): f"modeling_distance_head.{Model.__name__}",
    }
    hf = Model(config)
    hf.model = model
    return hf


def auto_class(model):
    return "AutoModelForMaskedLM" if isinstance(model, BERT) else "AutoModelForCausalLM"


def save(hf, folder):
    """
    Write transformers' files, and the code that with_distance_head names. In such a folder files import each other by a
    dot; distances.py, which imports none of them, stays as it is.
    """
    hf.save_pretrained(folder)
    if not hasattr(hf.config, "auto_map"):
        return
    for name in CODE:
        with open(os.path.join(_HERE, f"{name}.py"), encoding="utf-8") as f:
            text = f.read()
        text = re.sub(rf"^from ({'|'.join(CODE)}) import", r"from .\1 import", text, flags=re.MULTILINE)
        with open(os.path.join(folder, f"{name}.py"), "w", encoding="utf-8", newline="\n") as f:
            f.write(text)
    shutil.copy(os.path.join(_HERE, "LICENSE"), folder)


# -----------------------------------------------------------------------------
# the tokenizer

# a text that is hard to cut: the converted tokenizer must give the same ids of it
_SAMPLE = """def naïve(x):\n\n\n    return [x, '日本語', "🙂🏽"]  # it's 12345 times\tfaster,  isn't it?   \r\n \n"""


def converted(meta, encoding):
    """Return a dataset's tokenizer, of a JSON, characters or tiktoken's ranks, as one of the tokenizers library."""
    import tokenizers
    if isinstance(encoding.tokenizer, JsonTokenizer):
        return tokenizers.Tokenizer.from_str(encoding.tokenizer._pat_str)
    if encoding.tokenizer is None: # characters
        found = tokenizers.Tokenizer(tokenizers.models.WordLevel(meta["stoi"]))
        found.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        found.decoder = tokenizers.decoders.Fuse()
        return found
    from transformers.convert_slow_tokenizer import TikTokenConverter
    converter = TikTokenConverter(encoding.tokenizer._mergeable_ranks, encoding.tokenizer._pat_str,
                                  extra_special_tokens=encoding.tokenizer._special_tokens)
    converter.load_tiktoken_bpe = lambda ranks: ranks # they are here, not in a file
    return converter.converted()


def hf_tokenizer(data_dir, model, data_hash=None):
    """
    Return the tokenizer of a dataset for transformers, with BERT's [MASK] and [PAD]. Raises OSError where it is not
    there, and ValueError where the data have not this hash any more, or the tokenizer would not give the same ids.
    """
    import tokenizers
    from transformers import PreTrainedTokenizerFast
    meta = load_meta(data_dir)
    if data_hash is not None and meta.get("hash") != data_hash:
        raise ValueError(f"{data_dir} holds other data than those of the run, of the hash {data_hash[:16]}...")
    encoding = load_encoding(meta, data_dir)
    tokenizer = converted(meta, encoding)
    text = "".join(meta["stoi"]) if encoding.tokenizer is None else _SAMPLE
    if not isinstance(encoding.tokenizer, JsonTokenizer) and tokenizer.encode(text).ids != encoding.encode(text):
        raise ValueError("the tokenizers library cuts a text in other tokens than the data's own tokenizer")
    names = {}
    if meta["eot"] is not None:
        names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), tokenizer.id_to_token(meta["eot"]))
    vocabulary = tokenizer.get_vocab()
    for key in ("pad", "unk", "cls", "sep", "mask"): # WordPiece has them
        if f"[{key.upper()}]" in vocabulary:
            names[f"{key}_token"] = f"[{key.upper()}]"
    if isinstance(model, BERT) and model.config.mask_id == -1: # two ids after the text's
        has_words = encoding.tokenizer is not None
        with_space = has_words and len(encoding.encode(" a")) == 1 # it belongs to the word behind it, which is masked
        mask = tokenizers.AddedToken("[MASK]", lstrip=with_space, special=True)
        tokenizer.add_special_tokens([mask, "[PAD]"])
        names |= {"mask_token": mask, "pad_token": "[PAD]"}
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=model.config.block_size,
                                    model_input_names=["input_ids", "attention_mask"], **names)
    if isinstance(model, BERT) and (found.mask_token_id, found.pad_token_id) != (model.mask_id, model.pad_id):
        raise ValueError(f"[MASK] and [PAD] have the ids {found.mask_token_id} and {found.pad_token_id} there, "
                         f"{model.mask_id} and {model.pad_id} in the model")
    return found


# -----------------------------------------------------------------------------
# the model card

_DISTANCE_HEAD = """
## Its output layer is not a plain dot product

`{head}`: each token k has a prototype w_k, and softmax of the logits {z} of a hidden state h is the probability, with

    d(h, w) = {formula}

**Only transformers itself runs this model as it was trained,** with `trust_remote_code=True`, which runs the Python
files beside this one: read them first. **vLLM, SGLang, TGI, llama.cpp (GGUF) and whatever else builds an output layer
of its own would put a dot product in the head's place, without a word, and give wrong probabilities.** The class says
that it is not made for them (`_supports_attention_backend = False`, which vLLM asks for): do not force it.

There is no key-value cache: `use_cache` is taken and has no effect, each token costs a full forward pass. In training,
`labels` give the loss alone, which then never holds tokens x vocabulary; in evaluation the logits come too.
"""
LOGITS = {"harmonic": "z_k = -n log d(h, w_k)", "softmin": "z_k = -n d(h, w_k)", "gaussian": "z_k = -n d(h, w_k)^2"}


def front_matter(model, settings, info, energy):
    """Return what the hub reads of a model card, as YAML. energy is the last row of emissions.csv, or None."""
    from huggingface_hub import ModelCardData
    head = model.head
    link = [] if head.distance == "baseline" else [f"{head.link}-link"]
    about = dict(
        library_name="transformers",
        pipeline_tag="fill-mask" if isinstance(model, BERT) else "text-generation",
        tags=["distance-heads", head.distance, *link],
    )
    if energy:
        parts = ", ".join(f"{part} {energy[f'{part}_source']}" for part in PARTS)
        about["co2_eq_emissions"] = dict(
            emissions=float(energy["emissions_g_total"]), # in grams
            source=f"CodeCarbon, at {energy['g_per_kwh']} g CO2eq per kWh ({parts})",
            training_type="pre-training" if settings["init_from"] == "scratch" else "fine-tuning",
            geographical_location=f"{settings['country_iso_code']} (the run's setting)",
            hardware_used=f"{info['world_size']} x {info['device_name']}",
        )
    return f"---\n{ModelCardData(**about).to_yaml()}\n---\n"


def model_card(model, step, info, note):
    """Return the text of README.md. info is the run's config.json. Raises Damaged where its other files are."""
    energy = read_emissions(out_dir)
    _, evals, _ = read_rows(out_dir, "train.py")
    settings, head, auto, name = info["config"], model.head, auto_class(model), os.path.basename(os.path.normpath(to))
    is_linear = head.is_linear
    losses = [row["val_loss"] for row in evals if row["step"] == step]
    sequences = settings["batch_size"] * settings["gradient_accumulation_steps"]
    facts = {
        "model": f"{type(model).__name__}, {info['num_params']:,} parameters, {model.config.block_size} positions",
        "head": f"{head.extra_repr()}, features x {head.feature_scale:.4g}",
        "data": f"{settings['dataset']} ({info['data']['source']}), hash {info['data'].get('hash')}",
        "training": f"{step} steps of {sequences} x {settings['block_size']} tokens, from {settings['init_from']}",
        "validation loss": f"{losses[-1]:.4f} nats per token" if losses else "not known",
        "energy": f"{float(energy['energy_kwh_total']):.4g} kWh, the whole run's" if energy else "not recorded",
        "made by": f"`{info.get('command')}` at commit {info.get('git')}",
        "with": f"torch {info['versions']['torch']}, {info['dtype']}, {info['world_size']} x {info['device_name']}",
    }
    if isinstance(model, BERT):
        facts["validation loss"] += " that is masked"
    parts = [front_matter(model, settings, info, energy), f"# {name}\n", "| | |\n|---|---|"]
    parts += [f"| {key} | {value} |" for key, value in facts.items()]
    trust = "" if is_linear else ", trust_remote_code=True"
    parts += ["\n```python", f"from transformers import AutoTokenizer, {auto}",
              f'model = {auto}.from_pretrained("{name}"{trust})',
              f'tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})', f"```\n{note}"]
    if not is_linear:
        z = LOGITS.get(head.link, f"of the link {head.link}")
        about = dict(head=head.extra_repr(), z=z, formula=head.spec.formula)
        if head.distance == "baseline":
            about["formula"] = "-<h, w>, of unit vectors" if head.variant else "-<h, w>"
        parts.append(_DISTANCE_HEAD.format(**about))
    own = {key: value for key, value in settings.items() if key not in ("out_dir", "data_dir")}
    parts.append(f"## All settings\n\n```json\n{json.dumps(own, indent=1)}\n```\n")
    return "\n".join(parts)


# -----------------------------------------------------------------------------

def main():
    problems = []
    configure(globals(), problems=problems)
    if not to:
        problems.append("say where to write, --to=folder")
    elif os.path.exists(to):
        problems.append(f"{to} exists: name another folder")
    fail(problems)
    model, settings, step = load_run(out_dir, checkpoint, "cpu")
    is_linear = model.head.is_linear
    try:
        transformers = import_transformers("export_hf.py writes a folder for transformers")
        info = read_config(out_dir)
        hf = model.to_hf() if is_linear else with_distance_head(model, settings.get("model", "gpt"))
        tokenizer, note = None, ""
        try:
            data_dir = os.path.join(settings["data_dir"], settings["dataset"])
            tokenizer = hf_tokenizer(data_dir, model, info["data"].get("hash"))
        except (OSError, ValueError) as e:
            note = f"without a tokenizer: {e}"
        card = model_card(model, step, info, note)
    except (ImportError, ValueError) as e:
        raise SystemExit(str(e)) from None
    eot = tokenizer.eos_token_id if tokenizer else None
    hf.config.bos_token_id = hf.config.eos_token_id = eot
    if hf.can_generate():
        hf.generation_config = transformers.GenerationConfig(bos_token_id=eot, eos_token_id=eot, pad_token_id=eot,
                                                             use_cache=is_linear)
    try:
        save(hf, to)
        if tokenizer:
            tokenizer.save_pretrained(to)
        with open(os.path.join(to, "README.md"), "w", encoding="utf-8") as f:
            f.write(card)
        difference = read_back(transformers, model)
    except BaseException as e:
        shutil.rmtree(to, ignore_errors=True) # half a folder would pass for a whole one
        if isinstance(e, OSError):
            raise SystemExit(f"cannot write {to}: {e}") from None
        raise
    print(f"{to}: {type(hf).__name__} from {os.path.join(out_dir, checkpoint)} at step {step}, "
          f"logits differ by at most {difference:.1e}")
    if note:
        print(note)


def read_back(transformers, model):
    """Load the folder and return the largest difference between its logits and the model's."""
    hf = getattr(transformers, auto_class(model)).from_pretrained(to, trust_remote_code=True)
    num_tokens = model.config.vocab_size
    idx = torch.arange(min(64, model.config.block_size))[None] % num_tokens # (1, T)
    with torch.no_grad():
        theirs, ours = hf(idx).logits[..., :num_tokens], model.head(model.features(idx)) # (1, T, V)
    return (theirs - ours).abs().max().item()


if __name__ == "__main__":
    main()
