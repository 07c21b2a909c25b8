"""
The data format, defined once: the prepare scripts write it, train.py and sample.py read it.

A dataset is a folder data/<dataset>/ with
  train.bin, val.bin   token ids and nothing else: uint16, or uint32 when an id can exceed 65,535; or shards of them
  meta.pkl             a dict of plain values:
    vocab_size, dtype, eot                  dtype is "uint16" or "uint32", eot the id that ends a text
    encoding                                the tokenizer: a tiktoken name, or the name of a file in the folder
    pat_str, special_tokens                 with a rank file: the pattern that cuts text, {text: id}
    special_ids, mask_id                    with tokenizer.json: the ids that are no text, the id of [MASK] or None
    train_tokens, train_docs, train_bytes   counts; the bytes are those of utf-8, 0 where the tokenizer loses the text
    val_tokens, val_docs, val_bytes         the same for the other split
    hash, source                            the sha256 of both splits' hashes; where the text comes from, for people
nanoGPT's folders work as they are: those without meta.pkl (openwebtext and shakespeare, GPT-2 tokens) and the
char-level one. So do the shards of llm.c and modded-nanogpt in place of train.bin and val.bin, see data_shards.py.

Make one, then train on it:
$ python prepare_stdlib.py                     # seconds, no network
$ python prepare_openwebtext.py --docs 1000 --val_fraction 0.05   # a small OpenWebText; without the flags all of it
$ python train.py --dataset=stdlib
Files are compared with the hash in meta.pkl, by train.py where that is quick, and of any size by
$ python data.py data/openwebtext              # all of OpenWebText, 18 GB: 15 s of a core, or what the disk takes
"""
import argparse
import base64
import contextlib
import hashlib
import math
import os
import pickle
import threading
from types import SimpleNamespace

import numpy as np

from data_shards import ShardFile, Stream, holds_dataset, is_half_written, replaced, token_files

EOT = "<|endoftext|>"
# GPT-2's pattern, in the form that tiktoken ships: it cuts text exactly as the original does
GPT2_PAT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

MAX_VOCAB = {"uint16": 2**16, "uint32": 2**24} # the largest tokenizers have some 2**18 tokens


# -----------------------------------------------------------------------------
# meta.pkl

# the keys of meta.pkl by the kind of their values, where None stands for none; others are left out
META = {
    int: ("vocab_size", "eot", "mask_id",
          "train_tokens", "train_docs", "train_bytes", "val_tokens", "val_docs", "val_bytes"),
    str: ("dtype", "encoding", "pat_str", "hash", "source"),
    list: ("special_ids",),
    dict: ("special_tokens", "stoi", "itos"),
}


class PlainUnpickler(pickle.Unpickler):
    """Builds dicts, lists, strings and numbers. A pickle that asks for anything else could run code, and is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, only plain values are allowed")


def refusal(path, reason):
    """Return the ValueError of a meta.pkl that cannot be used."""
    return ValueError(f"{path} {reason}. prepare the dataset again")


def read_meta(path):
    """
    Return the dict in one meta.pkl, the keys of META alone.
    Raises ValueError when it is damaged, holds more than plain values, or a value of another kind.
    """
    with open(path, "rb") as f:
        try:
            content = PlainUnpickler(f).load()
            if not isinstance(content, dict):
                raise pickle.UnpicklingError(f"it holds a {type(content).__name__}, not a dict")
        except Exception as e: # a damaged pickle can raise nearly anything
            raise refusal(path, f"was refused: {e!r:.200}") from e
    meta = {}
    for kind, keys in META.items():
        for key in keys:
            value = content.get(key)
            if value is not None and type(value) is not kind:
                raise refusal(path, f"says {key} {value!r:.60}, it must be of type {kind.__name__}")
            if kind is int and value is not None and not 0 <= value < 2**63:
                raise refusal(path, f"says {key} {value!r:.60}, it must be in 0..2**63-1")
            if key in content:
                meta[key] = value
    return meta


def missing(data_dir, name):
    """Return the FileNotFoundError that says how to make the file."""
    dataset = os.path.basename(os.path.normpath(data_dir))
    out_dir = "" if os.path.normpath(data_dir) == os.path.join("data", dataset) else f" --out_dir {data_dir}"
    here = os.path.relpath(os.path.dirname(os.path.abspath(__file__))) # the scripts lie beside this file
    stdlib, openwebtext = (os.path.normpath(os.path.join(here, f"prepare_{x}.py")) for x in ("stdlib", "openwebtext"))
    if dataset == "stdlib":
        command = f"python {stdlib}{out_dir}"
    elif dataset == "openwebtext":
        command = (f"python {openwebtext}{out_dir} "
                   f"(see --help for a small one; without network: python {stdlib})")
    else:
        command = f"python {openwebtext} --out_dir {data_dir} FILES (text, jsonl or parquet; see --help)"
    return FileNotFoundError(f"{os.path.join(data_dir, name)} is not there. make it with: {command}")


def load_meta(data_dir):
    """
    Return the meta dict of a dataset folder, always with vocab_size, dtype, encoding, eot and source.

    Raises FileNotFoundError, which names the command to run, when there is neither train.bin nor a shard, and
    ValueError when meta.pkl is damaged, not plain, or says what cannot be.
    """
    if not token_files(data_dir, "train"):
        raise missing(data_dir, "train.bin")
    path = os.path.join(data_dir, "meta.pkl")
    if is_half_written(data_dir):
        raise refusal(path, "is not there yet, nor may all shards be")
    if not os.path.exists(path):
        source = "no meta.pkl: assumed to be GPT-2 tokens, as nanoGPT's, llm.c's and modded-nanogpt's are"
        return {"vocab_size": 50257, "dtype": "uint16", "encoding": "gpt2", "eot": 50256, "source": source}
    meta = read_meta(path)
    if "itos" in meta:
        meta = {"dtype": "uint16", "encoding": "char", "eot": None, "source": "nanoGPT's, characters"} | meta
    needed = ["vocab_size", "dtype", "encoding", "source"]
    if meta.get("encoding") == "char":
        needed += ["stoi", "itos"]
    if meta.get("val_bytes"):
        needed.append("val_tokens")
    for key in needed:
        if meta.get(key) is None:
            raise refusal(path, f"has no {key!r}, only {sorted(meta)}")
    meta.setdefault("eot", None)
    V, largest = meta["vocab_size"], MAX_VOCAB.get(meta["dtype"])
    if largest is None:
        raise refusal(path, f"says dtype {meta['dtype']!r:.60}, it must be 'uint16' or 'uint32'")
    if not 2 <= V <= largest:
        raise refusal(path, f"says vocab_size {V}, with {meta['dtype']} it must be in 2..{largest}")
    special_ids = meta.get("special_ids") or []
    for key, ids in ("eot", [meta["eot"]]), ("mask_id", [meta.get("mask_id")]), ("special_ids", special_ids):
        for i in ids:
            if i is not None and (type(i) is not int or not 0 <= i < V):
                raise refusal(path, f"says {key} {i!r:.60}, an id must be in 0..{V - 1}")
    if len(set(special_ids)) > V - 2: # BERT draws random tokens from the others, and the mask is none of them
        raise refusal(path, f"says that {len(special_ids)} of {V} ids are special, which leaves none for text")
    return meta


def file_hash(data_dir):
    """Return the hash of a dataset's tokens, as meta.pkl has it: the same in one file and in shards. All are read."""
    return joint_hash(Stream(token_files(data_dir, split), "uint16").hash() for split in ("train", "val"))


def joint_hash(shas):
    """Return the sha256 of the two splits' sha256, which are given as hashlib's objects."""
    return hashlib.sha256("".join(sha.hexdigest() for sha in shas).encode()).hexdigest()


def check_hash(data_dir, meta, max_bytes=2**28):
    """
    Raise ValueError when the tokens do not have the hash that meta, from load_meta, says. They are not read where it
    says none, nor where the files have more than max_bytes: a core hashes 0.4 to 1.7 GB/s, the default in a second.
    """
    paths = token_files(data_dir, "train") + token_files(data_dir, "val")
    if meta.get("hash") is None or sum(map(os.path.getsize, paths)) > max_bytes:
        return
    found = file_hash(data_dir)
    if found != meta["hash"]:
        where = " or ".join(paths) if len(paths) == 2 else f"one of the {len(paths)} shards in {data_dir}"
        raise ValueError(f"{where} was damaged or changed after it was prepared: their hash is "
                         f"{found[:16]}..., meta.pkl says {meta['hash'][:16]}... prepare the dataset again")


# -----------------------------------------------------------------------------
# tokenizers

def within(seconds, f, *args):
    """
    Return f(*args), or raise TimeoutError when that takes too long. tiktoken's download and a DNS look-up have no
    timeout of their own; f is left behind in its thread.
    """
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
    Return the tiktoken.Encoding of that name, which tiktoken downloads on first use.
    Raises ValueError for an unknown name, ConnectionError (one line, after 15 s at most) when the download fails.
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
    Make a tiktoken.Encoding of ranks {token bytes: id} and special_tokens {text: id}, by default end-of-text with the
    id after the last. Raises ValueError when a single byte has no rank, on which tiktoken would panic, when two tokens
    share an id, or when an id is none.
    """
    import tiktoken
    lacking = [b for b in range(256) if bytes([b]) not in ranks]
    if lacking:
        raise ValueError(f"not a byte-level BPE: its ranks lack {len(lacking)} of the 256 single bytes, "
                         f"first {bytes([lacking[0]])!r}")
    special_tokens = special_tokens or {EOT: max(ranks.values()) + 1}
    ids = [*ranks.values(), *special_tokens.values()]
    wrong = [i for i in ids if type(i) is not int or not 0 <= i < MAX_VOCAB["uint32"]]
    if wrong:
        raise ValueError(f"a token has the id {wrong[0]!r:.60}, ids must be in 0..{MAX_VOCAB['uint32'] - 1}")
    if EOT not in special_tokens or len(set(ids)) < len(ids):
        raise ValueError(f"every token needs an id of its own, {EOT} too; the special tokens are {special_tokens}")
    return tiktoken.Encoding("own ranks", pat_str=pat_str, mergeable_ranks=ranks, special_tokens=special_tokens)


class JsonTokenizer:
    """
    A tokenizer.json of the tokenizers library, such as BERT's WordPiece or Qwen2's BPE. It has the methods and
    attributes of tiktoken.Encoding that the scripts use.
    """
    name = "tokenizer.json"
    _mergeable_ranks = {} # no bytes are counted, as WordPiece does not keep the text

    def __init__(self, source):
        """Take the json itself. Raises ValueError when it is not one, or has no token that ends a text."""
        from tokenizers import Tokenizer
        try:
            self._tokenizer = Tokenizer.from_str(source)
        except Exception as e: # the library raises nothing narrower
            raise ValueError(f"not a tokenizer.json: {e}") from None
        self._tokenizer.encode_special_tokens = True # a marker in a text stays text
        self._pat_str = source # stands for the tokenizer in the name of a folder of shards, as a tiktoken pattern does
        ids = self._tokenizer.get_vocab()
        ends = [token for token in (EOT, "[SEP]", "</s>") if token in ids]
        if not ends:
            raise ValueError(f"the tokenizer has no {EOT}, [SEP] or </s> to end a text with")
        self.n_vocab = max(ids.values()) + 1
        self.eot_token = ids[ends[0]]
        self.mask_id = ids.get("[MASK]")
        added = self._tokenizer.get_added_tokens_decoder() # {id: token}
        self.special_ids = sorted(i for i, token in added.items() if token.special)

    def __reduce__(self):
        """Go to another process as the json: the library's own pickle would forget encode_special_tokens."""
        return JsonTokenizer, (self._pat_str,)

    def encode(self, text, **ignored):
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_to_numpy(self, text, **ignored):
        return np.array(self.encode(text), np.int64)

    def decode(self, ids):
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def read_ranks(path):
    """
    Return {token bytes: id} from a rank file, whose lines are a token in base64, a space and its id.
    Raises ValueError that names a line which does not read so.
    """
    # tiktoken.load.load_tiktoken_bpe caches by path, and would give yesterday's tokens after the file was made anew
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
    Return the tokenizer of a dataset: an object with encode(text) -> list of ids, in which the end-of-text marker
    becomes its own id, decode(ids) -> str, eot, the id of the end-of-text token or None, and tokenizer, what it is
    made of: a tiktoken.Encoding, a JsonTokenizer, or None for characters.

    Raises ConnectionError when a named encoding cannot be downloaded, ValueError for a bad name or rank file.
    """
    if meta["encoding"] == "char":
        return char_encoding(meta)
    if meta["encoding"] == JsonTokenizer.name:
        with open(os.path.join(data_dir, meta["encoding"]), encoding="utf-8") as f:
            enc = JsonTokenizer(f.read())
    elif "pat_str" in meta:
        ranks = read_ranks(os.path.join(data_dir, meta["encoding"]))
        enc = own_encoding(ranks, meta["pat_str"], meta.get("special_tokens"))
    else:
        enc = named_encoding(meta["encoding"])

    def encode(text):
        return enc.encode(text, allowed_special={EOT}, disallowed_special=())
    return SimpleNamespace(encode=encode, decode=enc.decode, eot=meta["eot"], tokenizer=enc)


def char_encoding(meta):
    """Return the tokenizer of a char-level dataset of nanoGPT's."""
    def encode(text):
        unknown = sorted(set(text) - set(meta["stoi"]))
        if unknown:
            raise ValueError(f"the characters {unknown} are not in this dataset's vocabulary "
                             f"of {meta['vocab_size']}")
        return [meta["stoi"][c] for c in text]

    def decode(ids):
        return "".join(meta["itos"][i] for i in ids)
    return SimpleNamespace(encode=encode, decode=decode, eot=None, tokenizer=None)


# -----------------------------------------------------------------------------
# batches

class Blocks:
    """
    One split as blocks of T = block_size tokens. batch() gives them in a shuffled order, for training, and fixed() in
    the order of the text, for evaluation: x, y (count, T) int64, where y is x shifted by one token.

    The shuffled order is a pure function of (seed, index). An epoch visits every one of the num_blocks blocks once,
    in a permutation of its own. What was asked before does not matter, so that evaluating or resuming cannot change
    the order, and ranks that ask for different indices get different blocks.

    Ids at or above vocab_size, by default the dataset's own, are refused.
    Raises OSError when the file is not there or cannot be read, ValueError when it is damaged or shorter than a block.
    """

    def __init__(self, data_dir, split, block_size, vocab_size=None, seed=0):
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        meta = load_meta(data_dir)
        paths = token_files(data_dir, split)
        if not paths:
            in_shards = not os.path.exists(os.path.join(data_dir, "train.bin"))
            raise missing(data_dir, f"*{split}*.bin" if in_shards else f"{split}.bin")
        self.stream = Stream(paths, meta["dtype"])
        self.block_size, self.seed, self.vocab_size = block_size, seed, vocab_size or meta["vocab_size"]
        self.num_tokens = N = len(self.stream)
        T, expected = block_size, meta.get(f"{split}_tokens") # not in nanoGPT's folders
        if expected not in (None, N):
            raise ValueError(f"{self.stream.name} is damaged: {N * self.stream.dtype.itemsize} bytes of "
                             f"{self.stream.dtype}, expected {expected} tokens. prepare the dataset again")
        if N < T + 1:
            raise ValueError(f"{self.stream.name} has {N} tokens, fewer than block_size + 1 = {T + 1}: "
                             "lower block_size or prepare more text")
        self.num_fixed = (N - 1) // T # how many blocks fixed() has
        # one block less than fits leaves room for any phase in [0, T), so that block borders move between epochs
        self.num_blocks = max(1, N // T - 1)
        self.num_phases = min(T, N - self.num_blocks * T)
        self.epoch, self.starts = None, None # the current epoch and where its blocks start, (num_blocks,)

    def batch(self, first, count):
        """Return samples first..first+count-1 of the endless shuffled sequence: x, y (count, T) int64."""
        starts, i, end = [], first, first + count
        while i < end: # at most one turn, or two where an epoch ends
            epoch, j = divmod(i, self.num_blocks)
            if epoch != self.epoch:
                self.epoch, self.starts = epoch, self.shuffled(epoch)
            starts.append(self.starts[j:j + end - i])
            i += len(starts[-1])
        return self.read(np.concatenate(starts))

    def shuffled(self, epoch):
        """Return the token positions (num_blocks,) at which the blocks of an epoch start, in their order."""
        # RandomState has a frozen stream: a new numpy may not change the order of the data. int64 is not the default on
        # Windows
        rng = np.random.RandomState([self.seed, epoch])
        phase = rng.randint(self.num_phases, dtype=np.int64)
        return phase + self.block_size * rng.permutation(self.num_blocks).astype(np.int64)

    def fixed(self, first, count):
        """Return blocks first..first+count-1 of the num_fixed in the file, always the same: x, y (count, T) int64."""
        if first + count > self.num_fixed:
            raise ValueError(f"blocks {first}..{first + count - 1} were asked for, "
                             f"{self.stream.name} has {self.num_fixed} of block_size {self.block_size}")
        return self.read(self.block_size * np.arange(first, first + count, dtype=np.int64))

    def read(self, starts):
        """
        Return x, y (len(starts), T) int64 from these token positions.
        Raises ValueError for an id that the vocabulary does not have, or when the file has become shorter.
        """
        # imported here, as the workers of the prepare scripts import this file and can do without
        import torch
        tokens = self.stream.read(starts, self.block_size + 1) # (count, T+1)
        if tokens.max() >= self.vocab_size:
            row, col = np.argwhere(tokens >= self.vocab_size)[0]
            i, position = self.stream.locate(starts[row] + col)
            raise ValueError(f"{self.stream.paths[i]} has id {tokens[row, col]} at position {position}, "
                             f"vocab_size is {self.vocab_size}: the dataset was made with another tokenizer, "
                             "or vocab_size is too small")
        tokens = torch.from_numpy(tokens)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


# -----------------------------------------------------------------------------
# writing, for the prepare scripts

def token_dtype(vocab_size):
    return "uint16" if vocab_size <= 2**16 else "uint32"


def in_val(seed, key, val_fraction):
    """
    Return whether a document belongs to the validation split. key is its number or its name; the draw depends on (seed,
    key) alone, so that documents can be read as a stream.
    """
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < val_fraction * 2**64


@contextlib.contextmanager
def replacing(*paths, tmp=".tmp", more=(), old=()):
    """
    Open files for writing bytes that get these names, whole or not at all: what is written goes to path + tmp, and to
    the disk, before it takes the name. Of several the last gets its name last: by it others know that all are there.
    more is a list of further paths, which may grow meanwhile, whose path + tmp the caller writes. The files `old` go
    before anything gets its name.

    Raises OSError when they cannot be written. Then, as after any error, no path + tmp is left, and unless that was a
    rename all is as it was. A file that several processes may write at the same time needs a tmp of each one's own.
    """
    renaming = False
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(f"{path}{tmp}", "wb")) for path in paths]
            yield files
            for f in files: # a full disk may come to light with the last bytes, and on some file systems with fsync
                f.flush()
                os.fsync(f.fileno())
        for path in old:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
        renaming = True
        for path in [*paths[:-1], *more, paths[-1]]:
            os.replace(f"{path}{tmp}", path)
    except BaseException:
        names = [f"{path}{tmp}" for path in [*paths, *more]]
        if renaming: # without the last one the others would be taken for something else
            names += more
        for name in names:
            with contextlib.suppress(OSError):
                os.remove(name)
        raise


class SplitWriter:
    """Appends tokens to the file of one split, and counts what meta.pkl says of them."""

    def __init__(self, file, dtype, eot):
        self.file, self.dtype, self.eot = file, dtype, eot
        self.tokens, self.text_bytes, self.ends, self.last = 0, 0, 0, None # last: the last token
        self.sha = hashlib.sha256()

    def append(self, ids, num_bytes):
        """Append ids (n,), where each id stands for num_bytes (vocab_size,) of text."""
        if not len(ids):
            return
        raw = ids.astype(self.dtype).tobytes()
        self.file.write(raw)
        self.sha.update(raw)
        self.tokens += len(ids)
        self.text_bytes += int(num_bytes[ids].sum())
        self.ends += int((ids == self.eot).sum())
        self.last = ids[-1]

    @property
    def docs(self):
        """The number of documents. One that --split tail has cut in two counts in both splits."""
        return self.ends + int(self.last != self.eot)


def write_dataset(out_dir, pairs, enc, source, shard_tokens=0):
    """
    Write train.bin, val.bin and meta.pkl, print what they hold, and return meta. With shard_tokens train_000000.bin,
    ..., val_000000.bin, ... take the place of the bins, shards of so many tokens. A tokenizer that tiktoken does not
    have by name goes into a file of its own, tokenizer.tiktoken or tokenizer.json.

    pairs is a generator of (train ids, val ids), 1-D arrays to append to the two splits. enc is a tiktoken.Encoding
    with end-of-text, or a JsonTokenizer. Killed at any moment it leaves no tokens with another dataset's meta.pkl.
    Raises ValueError when a split stays empty, and OSError, which says what is there now, when it cannot be written.
    """
    meta = {"vocab_size": enc.n_vocab, "dtype": token_dtype(enc.n_vocab), "encoding": enc.name, "eot": enc.eot_token,
            "source": source}
    about_tokenizer, tokenizer_file = describe_tokenizer(enc)
    meta |= about_tokenizer
    num_bytes = np.zeros(enc.n_vocab, np.int64) # the text that each id stands for; special tokens stand for none
    for token, rank in enc._mergeable_ranks.items():
        num_bytes[rank] = len(token)

    # a folder counts as a dataset when it has a train.bin, or shards and no meta.pkl.tmp
    names, shard_paths = ["val.bin", "meta.pkl", *tokenizer_file, "train.bin"], []
    if shard_tokens:
        names = [*tokenizer_file, "meta.pkl"]
    try:
        os.makedirs(out_dir, exist_ok=True)
        paths = [os.path.join(out_dir, name) for name in names]
        old = [*replaced(out_dir), paths[-1]] # tokens without a meta.pkl would be taken for GPT-2's
        with contextlib.closing(pairs), replacing(*paths, more=shard_paths, old=old) as opened, \
                contextlib.ExitStack() as stack: # pairs is closed, and so is its progress bar
            files = dict(zip(names, opened))
            writers = {}
            for split in ("train", "val"):
                file = files.get(f"{split}.bin")
                if shard_tokens:
                    file = stack.enter_context(contextlib.closing(ShardFile(out_dir, split, shard_tokens, shard_paths)))
                writers[split] = SplitWriter(file, meta["dtype"], enc.eot_token)
            for train_ids, val_ids in pairs:
                writers["train"].append(train_ids, num_bytes)
                writers["val"].append(val_ids, num_bytes)
            for split, writer in writers.items():
                if not writer.tokens:
                    num_docs = sum(w.ends for w in writers.values())
                    raise ValueError(f"the {split} split is empty, of {num_docs} document(s) in all: "
                                     "change --val_fraction")
                meta |= {f"{split}_tokens": writer.tokens, f"{split}_bytes": writer.text_bytes,
                         f"{split}_docs": writer.docs}
            meta["hash"] = joint_hash(writer.sha for writer in writers.values())
            pickle.dump(meta, files["meta.pkl"], protocol=4)
            for name, content in tokenizer_file.items():
                files[name].write(content)
    except OSError as e:
        state = "the dataset in it is as it was" if holds_dataset(out_dir) else "it holds no dataset"
        raise OSError(f"cannot write to {out_dir}: {e}. {state}") from e

    shards = [f"{len(shard_paths)} shards"] if shard_paths else []
    print(f"{out_dir}: {', '.join(sorted(names) + shards)}; vocab_size {meta['vocab_size']:,} ({meta['dtype']})")
    for split, writer in writers.items():
        per_token = f" {writer.text_bytes / writer.tokens:.2f} bytes per token" if writer.text_bytes else ""
        print(f"  {split:5s} {writer.docs:>9,} documents {writer.tokens:>13,} tokens{per_token}")
    parent, dataset = os.path.split(os.path.normpath(out_dir))
    data_dir = "" if parent == "data" else f" --data_dir={parent or os.curdir}"
    print(f"next: python train.py{data_dir} --dataset={dataset}")
    return meta


def describe_tokenizer(enc):
    """
    Return what meta.pkl says of a tokenizer, a dict, and {name: content} of its file, empty for one of
    tiktoken's.
    """
    import tiktoken
    if isinstance(enc, JsonTokenizer):
        return {"special_ids": enc.special_ids, "mask_id": enc.mask_id}, {enc.name: enc._pat_str.encode()}
    if enc.name in tiktoken.list_encoding_names():
        return {}, {}
    ranks = sorted(enc._mergeable_ranks.items(), key=lambda item: item[1])
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks]
    about = {"encoding": "tokenizer.tiktoken", "pat_str": enc._pat_str, "special_tokens": dict(enc._special_tokens)}
    return about, {"tokenizer.tiktoken": b"".join(lines)}


# -----------------------------------------------------------------------------
# the command line

def main(argv=None):
    parser = argparse.ArgumentParser(description="Compare the files of prepared datasets with the hash in meta.pkl.")
    parser.add_argument("folders", nargs="+", help="such as data/openwebtext")
    for folder in parser.parse_args(argv).folders:
        try:
            meta = load_meta(folder)
            for split in "train", "val":
                Blocks(folder, split, 1) # whose files have the sizes that meta.pkl says
            check_hash(folder, meta, max_bytes=math.inf)
        except (ValueError, OSError) as e:
            raise SystemExit(str(e)) from None
        cannot = "cannot be checked: it has no meta.pkl, or one without a hash"
        print(f"{folder}: its tokens {'are what meta.pkl says' if meta.get('hash') else cannot}")


if __name__ == "__main__":
    main()
