"""
The data format, defined once: train.py and sample.py read it, the prepare scripts write it.

A dataset is a folder data/<dataset>/ with
  train.bin, val.bin   token ids, nothing else: uint16, or uint32 when an id can exceed 65,535
  meta.pkl             a dict of plain values: vocab_size, dtype, encoding (a tiktoken name; or the name of a rank file in the folder,
                       then with pat_str and special_tokens; or tokenizer.json, in the folder too, then with special_ids and mask_id),
                       eot, hash, source; train_tokens, train_docs, train_bytes (of the text in utf-8, for bits per byte; 0 where the
                       tokenizer does not keep the text) and the same for val
nanoGPT's own folders work as they are: without meta.pkl (openwebtext, shakespeare: GPT-2 tokens) and with the char-level one.

Make one, then train on it:
$ python prepare_stdlib.py                     # seconds, no network
$ python prepare_openwebtext.py --docs 1000 --val_fraction 0.05   # a small OpenWebText; without the flags all of it
$ python train.py --dataset=stdlib
"""
import base64
import contextlib
import hashlib
import os
import pickle
import threading
from types import SimpleNamespace

import numpy as np

EOT = "<|endoftext|>"
# GPT-2's pattern in the form that tiktoken ships, it cuts text exactly as the original does
GPT2_PAT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


# -----------------------------------------------------------------------------
# meta.pkl

class PlainUnpickler(pickle.Unpickler):
    """builds dicts, lists, strings and numbers; a pickle that asks for anything else can run code, and is refused"""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, only plain values are allowed")


def read_meta(path):
    """The dict in one meta.pkl. ValueError when it is damaged or holds more than plain values."""
    try:
        with open(path, "rb") as f:
            meta = PlainUnpickler(f).load()
        if not isinstance(meta, dict):
            raise pickle.UnpicklingError(f"it holds a {type(meta).__name__}, not a dict")
    except FileNotFoundError:
        raise
    except Exception as e: # a damaged pickle can raise nearly anything
        raise ValueError(f"{path} was refused: {e}. prepare the dataset again") from e
    return meta


def missing(data_dir, name):
    """the FileNotFoundError that says how to make the file"""
    dataset = os.path.basename(os.path.normpath(data_dir))
    out_dir = "" if os.path.normpath(data_dir) == os.path.join("data", dataset) else f" --out_dir {data_dir}"
    if dataset == "stdlib":
        command = f"python prepare_stdlib.py{out_dir}"
    elif dataset == "openwebtext":
        command = (f"python prepare_openwebtext.py{out_dir} "
                   "(see --help for a small one; without network: python prepare_stdlib.py)")
    else:
        command = f"python prepare_openwebtext.py --out_dir {data_dir} FILES (text, jsonl or parquet; see --help)"
    return FileNotFoundError(f"{os.path.join(data_dir, name)} is not there. make it with: {command}")


def load_meta(data_dir):
    """
    The meta dict of a dataset folder, always with vocab_size, dtype, encoding, eot and source (see the top of this file).
    FileNotFoundError, with the command to run, when there is no train.bin; ValueError when meta.pkl is damaged or not plain.
    """
    if not os.path.exists(os.path.join(data_dir, "train.bin")):
        raise missing(data_dir, "train.bin")
    path = os.path.join(data_dir, "meta.pkl")
    if not os.path.exists(path):
        return {"vocab_size": 50257, "dtype": "uint16", "encoding": "gpt2", "eot": 50256,
                "source": "no meta.pkl: assumed to be nanoGPT's, GPT-2 tokens"}
    meta = read_meta(path)
    if "itos" in meta:
        meta = {"dtype": "uint16", "encoding": "char", "eot": None, "source": "nanoGPT's, characters"} | meta
    for key in "vocab_size", "dtype", "encoding", "eot", "source":
        if key not in meta:
            raise ValueError(f"{path} has no {key!r}, only {sorted(map(str, meta))}. prepare the dataset again")
    if meta["dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"{path} says dtype {meta['dtype']!r}, it must be 'uint16' or 'uint32'")
    return meta


# -----------------------------------------------------------------------------
# tokenizers

def within(seconds, f, *args):
    """f(*args), given up on with a TimeoutError: neither tiktoken's download nor a DNS look-up has a timeout of its own"""
    result, error = [], []

    def run():
        try:
            result.append(f(*args))
        except Exception as e: # raised again below, in the caller's thread
            error.append(e)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if error:
        raise error[0]
    if not result:
        raise TimeoutError(f"no answer within {seconds} s")
    return result[0]


def named_encoding(name):
    """
    The tiktoken.Encoding of that name, downloaded on first use.
    ValueError when tiktoken has no such name, ConnectionError (one line, after 15 s at most) when the download fails.
    """
    import tiktoken
    if name not in tiktoken.list_encoding_names():
        raise ValueError(f"tiktoken has no encoding {name!r}, it has {', '.join(tiktoken.list_encoding_names())}")
    try:
        return within(15, tiktoken.get_encoding, name)
    except OSError as e: # requests' errors and the timeout alike
        raise ConnectionError(f"cannot download the encoding {name!r} ({type(e).__name__}). without network: "
                              "python prepare_stdlib.py trains one of its own, --ranks takes yours, and "
                              "TIKTOKEN_CACHE_DIR may name tiktoken's cache") from None


def own_encoding(ranks, pat_str=GPT2_PAT, special_tokens=None):
    """
    A tiktoken.Encoding from ranks {token bytes: id}; special_tokens {text: id}: by default end-of-text, after the last rank.
    ValueError when a single byte has no rank (tiktoken would panic on it) or the end-of-text marker has no id of its own.
    """
    import tiktoken
    lacking = [b for b in range(256) if bytes([b]) not in ranks]
    if lacking:
        raise ValueError(f"not a byte-level BPE: its ranks lack {len(lacking)} of the 256 single bytes, "
                         f"first {bytes([lacking[0]])!r}")
    special_tokens = special_tokens or {EOT: max(ranks.values()) + 1}
    ids = [*ranks.values(), *special_tokens.values()]
    if EOT not in special_tokens or len(set(ids)) < len(ids):
        raise ValueError(f"every token needs an id of its own, {EOT} too; the special tokens are {special_tokens}")
    return tiktoken.Encoding("own ranks", pat_str=pat_str, mergeable_ranks=ranks, special_tokens=special_tokens)


class JsonTokenizer:
    """
    A tokenizer.json of the tokenizers library, such as BERT's WordPiece or Qwen2's BPE, with what is used here of tiktoken.Encoding.
    source: the json itself. ValueError when it is not one, or has no token that ends a text.
    """
    name, _mergeable_ranks = "tokenizer.json", {} # WordPiece does not keep the text, so that no bytes are counted

    def __init__(self, source):
        from tokenizers import Tokenizer
        try:
            self._tokenizer = Tokenizer.from_str(source)
        except Exception as e: # the library raises nothing narrower
            raise ValueError(f"not a tokenizer.json: {e}") from None
        self._tokenizer.encode_special_tokens = True # a marker in a text stays text
        self._pat_str, ids = source, self._tokenizer.get_vocab()
        end = next((token for token in (EOT, "[SEP]", "</s>") if token in ids), None)
        if end is None:
            raise ValueError(f"the tokenizer has no {EOT}, [SEP] or </s> to end a text with")
        self.n_vocab, self.eot_token, self.mask_id = max(ids.values()) + 1, ids[end], ids.get("[MASK]")
        self.special_ids = sorted(i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special)

    def __reduce__(self): # to another process, with the setting above, which the library's own pickle forgets
        return JsonTokenizer, (self._pat_str,)

    def encode(self, text, **ignored):
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_to_numpy(self, text, **ignored):
        return np.array(self.encode(text), np.int64)

    def decode(self, ids):
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def read_ranks(path):
    """{token bytes: id} of a rank file: per line the token in base64, a space, its id. ValueError names a line that is not."""
    # not tiktoken.load.load_tiktoken_bpe: it caches by path, and would give yesterday's tokens after the file was made anew
    ranks = {}
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError:
                raise ValueError(f"{path}, line {number}: {line[:60]!r} is not a token in base64, "
                                 "a space and an id") from None
    return ranks


def load_encoding(meta, data_dir):
    """
    The tokenizer of a dataset: an object with encode(text) -> list of ids (the end-of-text marker becomes its own id),
    decode(ids) -> str, and eot, the id of the end-of-text token or None.
    ConnectionError when a named encoding cannot be downloaded, ValueError for a bad name or rank file.
    """
    if meta["encoding"] == "char":
        def encode(text):
            unknown = sorted(set(text) - set(meta["stoi"]))
            if unknown:
                raise ValueError(f"the characters {unknown} are not in this dataset's vocabulary "
                                 f"of {meta['vocab_size']}")
            return [meta["stoi"][c] for c in text]
        return SimpleNamespace(encode=encode, decode=lambda ids: "".join(meta["itos"][i] for i in ids), eot=None)
    if meta["encoding"] == JsonTokenizer.name:
        with open(os.path.join(data_dir, meta["encoding"]), encoding="utf-8") as f:
            enc = JsonTokenizer(f.read())
    elif "pat_str" in meta:
        enc = own_encoding(read_ranks(os.path.join(data_dir, meta["encoding"])), meta["pat_str"], meta["special_tokens"])
    else:
        enc = named_encoding(meta["encoding"])

    def encode(text):
        return enc.encode(text, allowed_special={EOT}, disallowed_special=())
    return SimpleNamespace(encode=encode, decode=enc.decode, eot=meta["eot"])


# -----------------------------------------------------------------------------
# batches

class Blocks:
    """
    One split, cut into num_blocks blocks of block_size tokens (and each block's next token), for training in a shuffled order.

    The order is a pure function of (seed, index): an epoch visits every block once, in a permutation of its own. What was asked before does
    not matter, so that evaluating or resuming cannot change it, and ranks that ask for different indices get different blocks.
    vocab_size: ids at or above it are refused; by default the dataset's own.
    FileNotFoundError when the file is not there; ValueError when it is damaged or shorter than a block.
    """

    def __init__(self, data_dir, split, block_size, vocab_size=None, seed=0):
        meta = load_meta(data_dir)
        self.path = os.path.join(data_dir, f"{split}.bin")
        if not os.path.exists(self.path):
            raise missing(data_dir, f"{split}.bin")
        self.block_size, self.seed, self.dtype = block_size, seed, np.dtype(meta["dtype"])
        self.vocab_size = vocab_size or meta["vocab_size"]
        size, N, T = os.path.getsize(self.path), os.path.getsize(self.path) // self.dtype.itemsize, block_size
        if size % self.dtype.itemsize or N != meta.get(f"{split}_tokens", N):
            expected = f"{meta[f'{split}_tokens']} tokens" if f"{split}_tokens" in meta else "whole tokens"
            raise ValueError(f"{self.path} is damaged: {size} bytes of {self.dtype}, expected {expected}. "
                             "prepare the dataset again")
        if N < T + 1:
            raise ValueError(f"{self.path} has {N} tokens, fewer than block_size + 1 = {T + 1}: "
                             "lower block_size or prepare more text")
        self.num_fixed = (N - 1) // T # blocks from the start of the file, for evaluation
        # one block less than fits leaves room for any phase in [0, T), so that block borders move between epochs
        self.num_blocks = max(1, N // T - 1)
        self.num_phases = min(T, N - self.num_blocks * T)
        self.epoch, self.starts = None, None # the current permutation

    def batch(self, first, count):
        """samples first..first+count-1 of the endless shuffled sequence: x, y (count, T) int64, y is x shifted by one"""
        starts, i = [], first
        while i < first + count: # at most one turn, or two where an epoch ends
            epoch, j = divmod(i, self.num_blocks)
            if epoch != self.epoch:
                # RandomState, as its stream is frozen: a new numpy may not change the order of the data. int64, as windows has int32 else
                rng = np.random.RandomState([self.seed, epoch])
                phase = rng.randint(self.num_phases, dtype=np.int64)
                self.epoch, self.starts = epoch, phase + self.block_size * rng.permutation(self.num_blocks).astype(np.int64)
            starts.append(self.starts[j:j + first + count - i])
            i += len(starts[-1])
        return self.read(np.concatenate(starts))

    def fixed(self, first, count):
        """blocks first..first+count-1 from the start of the file, of num_fixed: x, y (count, T) int64, the same on every call"""
        if first + count > self.num_fixed:
            raise ValueError(f"blocks {first}..{first + count - 1} were asked for, "
                             f"{self.path} has {self.num_fixed} of block_size {self.block_size}")
        return self.read(self.block_size * np.arange(first, first + count, dtype=np.int64))

    def read(self, starts):
        """x, y (len(starts), T) int64 from token positions. ValueError for an id that the vocabulary does not have."""
        # imported here, as the workers of the prepare scripts import this file and can do without
        import torch
        # nanoGPT's way: a new memmap per batch, as one that is kept holds every page it has touched in resident memory
        data = np.memmap(self.path, dtype=self.dtype, mode="r")
        tokens = np.stack([data[s:s + self.block_size + 1] for s in starts]).astype(np.int64) # (count, T+1)
        if tokens.max() >= self.vocab_size:
            row, col = np.argwhere(tokens >= self.vocab_size)[0]
            raise ValueError(f"{self.path} has id {tokens[row, col]} at position {starts[row] + col}, "
                             f"vocab_size is {self.vocab_size}: the dataset was made with another tokenizer, "
                             "or vocab_size is too small")
        tokens = torch.from_numpy(tokens)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


# -----------------------------------------------------------------------------
# writing, for the prepare scripts

def token_dtype(vocab_size):
    return "uint16" if vocab_size <= 2**16 else "uint32"


def in_val(seed, key, val_fraction):
    """is this document (its number, or its name) in the validation split? drawn from (seed, key) alone, so that it streams"""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "big") < val_fraction * 2**64


def write_dataset(out_dir, pairs, enc, source):
    """
    Writes train.bin, val.bin, meta.pkl (and tokenizer.tiktoken for ranks of one's own, or tokenizer.json) and prints what they hold.
    Returns meta.

    pairs: yields (train ids, val ids), 1-D arrays to be appended to the two files; enc: the tiktoken.Encoding, which has end-of-text, or
    a JsonTokenizer.
    Killed at any moment it leaves no train.bin with another dataset's meta.pkl. ValueError when a split stays empty.
    """
    import tiktoken
    os.makedirs(out_dir, exist_ok=True)
    meta = {"vocab_size": enc.n_vocab, "dtype": token_dtype(enc.n_vocab), "encoding": enc.name, "eot": enc.eot_token, "source": source}
    own = None # the tokenizer's file
    if isinstance(enc, JsonTokenizer):
        own = enc.name, enc._pat_str.encode()
        meta |= {"special_ids": enc.special_ids, "mask_id": enc.mask_id}
    elif enc.name not in tiktoken.list_encoding_names():
        own = "tokenizer.tiktoken", b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(enc._mergeable_ranks.items(), key=lambda item: item[1]))
        meta |= {"encoding": own[0], "pat_str": enc._pat_str, "special_tokens": dict(enc._special_tokens)}
    num_bytes = np.zeros(enc.n_vocab, np.int64) # of text per id, none for special tokens
    for token, rank in enc._mergeable_ranks.items():
        num_bytes[rank] = len(token)

    splits, names = ("train", "val"), ["val.bin", "meta.pkl", *([own[0]] if own else []), "train.bin"]
    tokens, text_bytes, docs, last, shas = [0, 0], [0, 0], [0, 0], [None, None], [hashlib.sha256(), hashlib.sha256()]

    def tmp(name):
        return os.path.join(out_dir, name + ".tmp")
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(tmp(f"{split}.bin"), "wb")) for split in splits]
        for pair in pairs:
            for i, ids in enumerate(pair):
                if len(ids):
                    raw = ids.astype(meta["dtype"]).tobytes()
                    files[i].write(raw)
                    shas[i].update(raw)
                    tokens[i] += len(ids)
                    text_bytes[i] += int(num_bytes[ids].sum())
                    docs[i] += int((ids == enc.eot_token).sum())
                    last[i] = ids[-1]
    for i, split in enumerate(splits):
        if not tokens[i]:
            for name in splits:
                os.remove(tmp(f"{name}.bin"))
            raise ValueError(f"the {split} split is empty, of {sum(docs)} document(s) in all: change --val_fraction")
        # a document cut in two by --split tail counts in both
        meta |= {f"{split}_tokens": tokens[i], f"{split}_bytes": text_bytes[i], f"{split}_docs": docs[i] + int(last[i] != enc.eot_token)}
    meta["hash"] = hashlib.sha256("".join(sha.hexdigest() for sha in shas).encode()).hexdigest()
    with open(tmp("meta.pkl"), "wb") as f:
        pickle.dump(meta, f, protocol=4)
    if own:
        with open(tmp(own[0]), "wb") as f:
            f.write(own[1])
    # a folder counts as a dataset when it has a train.bin: the old one goes first, the new one comes last
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(out_dir, "train.bin"))
    for name in names:
        os.replace(tmp(name), os.path.join(out_dir, name))

    parent, dataset = os.path.split(os.path.normpath(out_dir))
    print(f"{out_dir}: {', '.join(sorted(names))}; vocab_size {meta['vocab_size']:,} ({meta['dtype']})")
    for i, split in enumerate(splits):
        print(f"  {split:5s} {meta[f'{split}_docs']:>9,} documents {tokens[i]:>13,} tokens"
              + (f" {text_bytes[i] / tokens[i]:.2f} bytes per token" if text_bytes[i] else ""))
    print(f"next: python train.py{'' if parent == 'data' else f' --data_dir={parent or os.curdir}'} --dataset={dataset}")
    return meta
