"""
Writes OpenWebText, FineWeb, FineWeb-Edu, or text of your own, to data/<name>/train.bin, val.bin and meta.pkl (data.py
says what they hold), or in the shards of llm.c and modded-nanogpt (data_shards.py).

$ python prepare_openwebtext.py --docs 1000 --val_fraction 0.05           # a small one: a small download, too
$ python prepare_openwebtext.py --num_proc 16                             # all 8 million documents, 9 billion tokens
$ python prepare_openwebtext.py --dataset fineweb-edu --shard_tokens 100_000_000      # the sample of 10 billion tokens
$ python prepare_openwebtext.py --dataset fineweb /disk/fineweb/sample/10BT           # its parquet files, downloaded
$ python prepare_openwebtext.py corpus/ --val_fraction 0.01               # local files, folders or 'quoted globs'
$ python prepare_openwebtext.py book.txt --split tail --val_fraction 0.1  # a single document is cut, not drawn

All of OpenWebText takes 18 GB, twice that while it is prepared, and some 60 GB in the huggingface cache. Local files
are text, jsonl or parquet. Every document ends with the end-of-text token; empty ones are left out. A command that
was killed half-way, or found the disk full, continues when it is run again: finished shards lie in
<out_dir>/shards-<hash of the settings> until the bins are written. Without network use python prepare_stdlib.py, or
local files.

You can bring a tokenizer of your own:
  --ranks FILE       is in tiktoken's format: per line a token in base64, a space and its id. In a prepared folder the
                     meta.pkl beside it gives its pattern and special tokens; elsewhere the pattern is --pat_str, and
                     end-of-text gets the id after the last.
  --tokenizer NAME   is a tokenizer.json, or a model on the huggingface hub: bert-base-uncased for BERT's WordPiece,
                     Qwen/Qwen2-0.5B for Qwen2's vocabulary, whose ids take uint32.
"""
import argparse
import errno
import glob
import hashlib
import multiprocessing
import os
import re
import shutil
import signal
import ssl
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from tqdm import tqdm

from data import (
    GPT2_PAT,
    JsonTokenizer,
    in_val,
    named_encoding,
    own_encoding,
    read_meta,
    read_ranks,
    replacing,
    token_dtype,
    within,
    write_dataset,
)
from data_shards import holds_dataset

# the datasets on the hub that have a name here: id, revision, files. OpenWebText's main branch has no parquet files;
# FineWeb's other samples are sample/100BT and sample/350BT, and all of it is data/*/*
HUB = {
    "openwebtext": ("Skylion007/openwebtext", "refs/pr/20", "data/*.parquet"),
    "fineweb": ("HuggingFaceFW/fineweb", "main", "sample/10BT/*.parquet"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "main", "sample/10BT/*.parquet"),
}
BUILDERS = {"txt": "text", "text": "text", "json": "json", "jsonl": "json", "parquet": "parquet"}


# -----------------------------------------------------------------------------
# where documents come from

def ending(name):
    """Return the ending of a file name, one of BUILDERS, that says how to read the file, compression aside, or None."""
    match = re.search(r"\.(\w+)(\.gz|\.xz|\.zst)?$", name)
    return match[1] if match and match[1] in BUILDERS else None


def local_files(paths):
    """Return the files, all of one kind, that paths name: files, folders, which are searched through, and globs."""
    files = []
    for path in paths:
        if os.path.isdir(path):
            everything = glob.glob(os.path.join(glob.escape(path), "**", "*"), recursive=True)
            found = [f for f in everything if ending(f)]
            if not found:
                raise SystemExit(f"{path} holds no *.{', *.'.join(BUILDERS)}")
        elif os.path.isfile(path):
            found = [path]
        else:
            found = [f for f in glob.glob(path, recursive=True) if os.path.isfile(f)]
            if not found:
                raise SystemExit(f"{path}: no such file")
        files += sorted(found)
    kinds = {BUILDERS.get(ending(f)) for f in files}
    if len(kinds) > 1 or None in kinds:
        more = " ..." if files[3:] else ""
        raise SystemExit(f"cannot tell how to read {', '.join(files[:3])}{more}: "
                         f"give files of one kind, by their ending one of {', '.join(BUILDERS)}")
    return [os.path.abspath(f) for f in files]


def hub_answers():
    """Return whether the huggingface hub can be reached, through whatever proxy is set."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        within(5, urllib.request.urlopen, urllib.request.Request(hub, method="HEAD"))
    except urllib.error.HTTPError: # an error status is an answer too
        return True
    except OSError as e: # and so is a certificate that only urllib distrusts
        return isinstance(getattr(e, "reason", None), ssl.SSLError)
    return True


def load_documents(args, files, offline):
    """Return the documents as a datasets.Dataset, or as an IterableDataset when only the first --docs are wanted."""
    if offline: # must be set before datasets is imported, else it retries for 20 s
        os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets
    options = {"split": "train", "streaming": args.docs is not None and not offline}
    if not options["streaming"] and args.num_proc > 1:
        options["num_proc"] = min(args.num_proc, len(files)) if files else args.num_proc
    try:
        if files:
            builder = BUILDERS[ending(files[0])]
            if builder == "text":
                options["sample_by"] = args.sample_by
            ds = datasets.load_dataset(builder, data_files=files, **options)
        elif offline: # what an earlier load_dataset(id) has left in the cache
            ds = datasets.load_dataset(args.id, **options)
        else: # the files themselves, not the repository: datasets>=4 refuses one with a loading script in it
            pattern = f"hf://datasets/{args.id}@{urllib.parse.quote(args.revision, safe='')}/{args.data_files}"
            ds = datasets.load_dataset(BUILDERS[ending(args.data_files)], data_files=pattern, **options)
        first = next(iter(ds), None)
    except OSError as e:
        if offline:
            raise SystemExit(f"no network: {args.id} is neither within reach nor in the local cache. "
                             "what works without: python prepare_stdlib.py, "
                             "or local files: python prepare_openwebtext.py FILES") from None
        raise SystemExit(f"cannot load {files[0] if files else args.id}: {str(e) or type(e).__name__}") from None
    except Exception as e:
        raise SystemExit(str(unreadable(e))) from None
    if first is None:
        raise SystemExit("there are no documents")
    if args.text_column not in first:
        raise SystemExit(f"there is no column {args.text_column!r}, only {list(first)}: choose one with --text_column")
    ds = ds.select_columns([args.text_column])
    return ds if args.docs is None else ds.take(args.docs)


def unreadable(e):
    """Return the OSError, one line, for whatever a reader of datasets has raised: each format has errors of its own."""
    reason = e.__cause__ or e
    text = " ".join(str(reason).split()) or type(reason).__name__
    if getattr(reason, "errno", None) == errno.ENOSPC:
        text += ", for huggingface's cache: HF_HOME names another place"
    return OSError(f"cannot read the text: {text}")


# -----------------------------------------------------------------------------
# documents -> shards -> bins

def start_worker(encoding):
    """Prepare a worker process for tokenise."""
    global enc
    enc = encoding
    signal.signal(signal.SIGINT, signal.SIG_IGN) # ctrl-c is for the parent
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """
    End this worker when its parent ends: a parent that was killed cannot do it, and the worker would wait for
    ever.
    """
    multiprocessing.parent_process().join()
    os._exit(1)


def tokenise(stem, texts):
    """Write one shard: the tokens of its documents, each with end-of-text behind it. Its name tells their number."""
    # encode_ordinary would make a list of Python ints, ten times the memory, which is too much for a large document.
    # An end-of-text marker within a text stays text
    ids = [np.append(enc.encode_to_numpy(text, disallowed_special=()), enc.eot_token) for text in texts]
    ids = np.concatenate(ids or [[]]).astype(token_dtype(enc.n_vocab))
    # not with ndarray.tofile, which does not say that the disk was full at the last bytes. The worker of a run that was
    # killed may write the same shard for a moment yet
    with replacing(f"{stem}-{len(ids)}.bin", tmp=f".{os.getpid()}.tmp") as (f,):
        f.write(ids.tobytes())


def batches(ds):
    """Yield a dataset's documents, 100 at a time. With --docs they are read, or downloaded, only now."""
    try:
        yield from ds.iter(batch_size=100)
    except Exception as e:
        raise unreadable(e) from e


def shards(ds, text_column, shard_mb):
    """Cut the documents into shards: yield (the number of documents, the texts that are not empty)."""
    num, size, texts = 0, 0, []
    for batch in batches(ds):
        for text in batch[text_column]:
            num += 1
            if text:
                if not isinstance(text, str):
                    raise SystemExit(f"column {text_column!r} holds {type(text).__name__}, not text: "
                                     "choose another with --text_column")
                texts.append(text)
                size += len(text)
            if size >= shard_mb * 1e6:
                yield num, texts
                num, size, texts = 0, 0, []
    if num:
        yield num, texts


def finished(folder, dtype):
    """
    Return {shard: (path, number of documents, number of tokens)} of the finished shards, in order. One whose size is
    not that of its tokens is none: it is made again.
    """
    found = {}
    for name in os.listdir(folder):
        match = re.fullmatch(r"(\d+)-(\d+)-(\d+)\.bin", name)
        if not match:
            continue
        shard, docs, tokens = map(int, match.groups())
        path = os.path.join(folder, name)
        if os.path.getsize(path) == tokens * np.dtype(dtype).itemsize:
            found[shard] = path, docs, tokens
        else:
            print(f"{path} is damaged, {os.path.getsize(path)} bytes for {tokens} tokens of {dtype}: not used")
    return dict(sorted(found.items()))


def what_is_left(folder, dtype):
    """Return the sentence with which a command ends that did not get through."""
    count = len(finished(folder, dtype)) if os.path.isdir(folder) else 0
    if not count:
        return "no shard was finished: run the same command again"
    return f"{count} finished shards are intact in {folder}: the same command continues from there"


def write_shards(ds, args, encoding, folder):
    """
    Tokenise the shards that are not there yet, in parallel. What a shard holds depends neither on num_proc nor on where
    the last run was killed. Raises OSError, which says why, when it cannot go on.
    """
    os.makedirs(folder, exist_ok=True)
    done = finished(folder, token_dtype(encoding.n_vocab))
    start, docs = 0, 0
    while start in done:
        docs += done[start][1]
        start += 1
    if done:
        print(f"continuing: {len(done)} finished shards in {folder}")
    total = len(ds) if hasattr(ds, "__len__") else args.docs
    to_come = ()
    if docs < total: # else there is nothing to skip to
        to_come = shards(ds.skip(docs), args.text_column, args.shard_mb)
    # workers are spawned on every platform: forking a process with threads, which datasets has by now, can hang
    with tqdm(total=total, initial=docs, desc="tokenising", unit=" docs") as bar, \
            ProcessPoolExecutor(args.num_proc, multiprocessing.get_context("spawn"), start_worker, (encoding,)) as pool:
        pending = {} # {future: number of documents}

        def collect(limit):
            """Wait until at most limit shards are in work: the pool's queue would read all of the text into memory."""
            while len(pending) > limit:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    try:
                        future.result()
                    except OSError as e:
                        raise OSError(f"cannot write to {folder}: {e}") from None
                    bar.update(pending.pop(future))
        try:
            for shard, (num, texts) in enumerate(to_come, start):
                if shard in done:
                    bar.update(num)
                    continue
                stem = os.path.join(folder, f"{shard:06d}-{num}")
                pending[pool.submit(tokenise, stem, texts)] = num
                collect(2 * args.num_proc - 1)
            collect(0)
        except (BrokenProcessPool, MemoryError):
            pool.shutdown(cancel_futures=True)
            raise OSError("a worker was killed, perhaps as memory ran out: lower --num_proc or --shard_mb") from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def split_shards(folder, encoding, args):
    """Yield (train ids, val ids) per shard, in the order of the documents."""
    dtype = token_dtype(encoding.n_vocab)
    done = finished(folder, dtype).values()
    num_tokens = sum(tokens for _, _, tokens in done)
    left = num_tokens - int(num_tokens * args.val_fraction) # train tokens yet to come, with --split tail
    doc = 0 # the number of the shard's first document
    for path, _, tokens in tqdm(done, desc="writing bins", unit=" shards"):
        ids = np.fromfile(path, dtype)
        if len(ids) != tokens: # fromfile does not raise where a disk fails
            raise OSError(f"{path} gave {len(ids)} of its {tokens} tokens")
        if args.split == "tail":
            yield ids[:left], ids[left:]
            left -= min(left, len(ids))
        else:
            ends = np.flatnonzero(ids == encoding.eot_token)
            lengths = np.diff(ends, prepend=-1) # tokens per document
            val_docs = [in_val(args.seed, d, args.val_fraction) for d in range(doc, doc + len(ends))]
            is_val = np.repeat(np.array(val_docs, bool), lengths)
            doc += len(ends)
            yield ids[~is_val], ids[is_val]


# -----------------------------------------------------------------------------
# the command line

def json_tokenizer(name):
    """Return the JsonTokenizer of a file or of a model on the hub. Raises ValueError when there is neither."""
    if os.path.exists(name):
        with open(name, encoding="utf-8") as f:
            return JsonTokenizer(f.read())
    from tokenizers import Tokenizer
    try:
        return JsonTokenizer(within(60, Tokenizer.from_pretrained, name).to_str())
    except ValueError:
        raise
    except Exception as e: # no network, no such model
        raise ValueError(f"--tokenizer {name}: neither a file nor to be had from the huggingface hub "
                         f"({type(e).__name__})") from None


def choose_encoding(args):
    """Return the tokenizer that the arguments ask for. Raises SystemExit when it cannot be had."""
    try:
        if args.tokenizer:
            return json_tokenizer(args.tokenizer)
        if not args.ranks:
            return named_encoding(args.encoding)
        meta, meta_path = {}, os.path.join(os.path.dirname(args.ranks), "meta.pkl")
        if os.path.exists(meta_path):
            meta = read_meta(meta_path)
            if meta.get("encoding") != os.path.basename(args.ranks): # it belongs to another tokenizer
                meta = {}
        pat_str = args.pat_str or meta.get("pat_str", GPT2_PAT)
        return own_encoding(read_ranks(args.ranks), pat_str, meta.get("special_tokens"))
    except (OSError, ValueError) as e:
        raise SystemExit(str(e)) from None


def parse(argv):
    """Return the arguments. Raises SystemExit for one that is out of range."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*",
                        help="local files, folders or globs (default: OpenWebText from the huggingface hub)")
    parser.add_argument("--docs", type=int, help="only the first so many documents (default: all)")
    parser.add_argument("--out_dir", help="default: data/ and the name of the dataset, or of the first local file")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset that is there")
    parser.add_argument("--encoding", default="gpt2", help="a tiktoken encoding (default: %(default)s)")
    parser.add_argument("--ranks", help="a rank file of your own instead")
    parser.add_argument("--tokenizer", help="a tokenizer.json instead, or the name of a model on the hub that has one")
    parser.add_argument("--pat_str",
                        help="the pattern of --ranks that cuts text into words (default: see above, else GPT-2's)")
    parser.add_argument("--split", choices=["random", "tail"], default="random",
                        help="random: draws documents for val.bin; tail: takes the last tokens (default: %(default)s)")
    parser.add_argument("--val_fraction", type=float, default=0.0005,
                        help="share that goes to val.bin (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=2357, help="the seed of --split random (default: %(default)s)")
    parser.add_argument("--num_proc", type=int, default=max(1, (os.cpu_count() or 1) // 2),
                        help="worker processes, about half the number of cores is good (default: %(default)s)")
    parser.add_argument("--shard_mb", type=float, default=8,
                        help="millions of characters per shard: what a worker holds, and what a kill loses "
                             "(default: %(default)s)")
    parser.add_argument("--sample_by", choices=["document", "paragraph", "line"], default="document",
                        help="what a document is in text files: a whole file, or a part of it (default: %(default)s)")
    parser.add_argument("--text_column", default="text",
                        help="where jsonl and parquet have the text (default: %(default)s)")
    parser.add_argument("--shard_tokens", type=int, default=0,
                        help="write shards of so many tokens, in place of train.bin and val.bin (default: no shards)")
    parser.add_argument("--dataset", choices=HUB,
                        help="which one from the hub (default: openwebtext); with local files, what they are a part of")
    parser.add_argument("--id", help="another dataset on the hub (default: the id of --dataset)")
    parser.add_argument("--revision", help="its branch (default: that of --dataset which holds parquet files)")
    parser.add_argument("--data_files", help="its files, such as sample/100BT/*.parquet (default: those of --dataset)")
    args = parser.parse_args(argv)
    for key, value in zip(("id", "revision", "data_files"), HUB[args.dataset or "openwebtext"]):
        if getattr(args, key) is None:
            setattr(args, key, value)
    for key in "docs", "num_proc", "shard_mb":
        if getattr(args, key) is not None and not getattr(args, key) > 0: # not nan either
            raise SystemExit(f"--{key} {getattr(args, key)} must be above 0")
    if not 0 <= args.shard_tokens < 2**31: # a header's int32
        raise SystemExit(f"--shard_tokens {args.shard_tokens} must be below 2^31, and 0 means no shards")
    if not 0 <= args.val_fraction <= 1:
        raise SystemExit(f"--val_fraction {args.val_fraction} must lie between 0 and 1")
    if not ending(args.data_files):
        raise SystemExit(f"--data_files {args.data_files} must end with one of {', '.join(BUILDERS)}")
    return args


def check_out_dir(out_dir):
    """Raise SystemExit when nothing can be written there, which is better known before a download of hours."""
    parent = os.path.abspath(out_dir) # or the nearest folder above that exists
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as e:
        raise SystemExit(f"cannot write to {out_dir}: {e.strerror}: {parent}. nothing was changed: "
                         "choose another folder with --out_dir") from None


def main(argv=None):
    args = parse(argv)
    files = local_files(args.files)
    name = args.id.split("/")[-1]
    if files and not args.dataset:
        name = os.path.basename(files[0]).split(".")[0]
    out_dir = args.out_dir or os.path.join("data", name)
    if holds_dataset(out_dir) and not args.overwrite:
        raise SystemExit(f"{out_dir} holds a dataset: write elsewhere (--out_dir ...), or replace it (--overwrite)")
    check_out_dir(out_dir)
    offline = not files and not hub_answers()
    if offline:
        ds = load_documents(args, files, offline)
        encoding = choose_encoding(args)
    else: # the tokenizer comes first: that it cannot be had is better known before the download
        encoding = choose_encoding(args)
        ds = load_documents(args, files, offline)
    if args.shard_tokens and token_dtype(encoding.n_vocab) != "uint16":
        raise SystemExit(f"--shard_tokens: shards hold uint16, which does not do for {encoding.n_vocab} tokens. "
                         "leave it out, for train.bin and val.bin")

    if files:
        source = ", ".join(map(os.path.basename, files[:3]))
        if files[3:]:
            source += f" and {len(files) - 3} more"
        if args.dataset:
            source = f"{args.dataset}: {source}"
    elif offline:
        source = f"{args.id}, local cache"
    else:
        source = f"{args.id}@{args.revision}/{args.data_files}"

    # the folder's name is a hash of all that the shards depend on, so that another run's are never mixed in. The
    # split is not part of it, as it is made from finished shards
    states = [(f, os.path.getsize(f), os.stat(f).st_mtime_ns) for f in files]
    settings = [source, states, args.text_column, args.sample_by, args.docs, args.shard_mb, encoding._pat_str,
                encoding.eot_token, sorted(encoding._mergeable_ranks.items())]
    digest = hashlib.sha256(repr(settings).encode()).hexdigest()
    folder = os.path.join(out_dir, f"shards-{digest[:12]}")
    dtype = token_dtype(encoding.n_vocab)
    if args.docs is not None:
        source += f", first {args.docs} documents"
    source += f"; split {args.split}, val_fraction {args.val_fraction}, seed {args.seed}"
    try:
        write_shards(ds, args, encoding, folder)
        try:
            pairs = split_shards(folder, encoding, args)
            write_dataset(out_dir, pairs, encoding, source, args.shard_tokens)
        except ValueError as e:
            raise SystemExit(f"{e}, or use --split tail, which cuts within a document. "
                             "the shards are kept for it") from None
    except KeyboardInterrupt:
        raise SystemExit(f"\nstopped. {what_is_left(folder, dtype)}") from None
    except OSError as e:
        raise SystemExit(f"{e}. {what_is_left(folder, dtype)}") from None
    shutil.rmtree(folder)
    others = glob.glob(os.path.join(glob.escape(out_dir), "shards-*"))
    if others:
        print(f"note: unfinished runs with other settings have left {', '.join(sorted(others))}")


if __name__ == "__main__":
    main()
