"""
Makes a corpus that needs no network: the Python standard library's own source, about 12 MB in 660 files, one document
each. It trains a small byte-level BPE on them, GPT-2's kind, and writes data/stdlib/. Every run gives the same bytes
on the same version of Python.

$ python prepare_stdlib.py                     # 4,096 tokens in all, the end-of-text token included
$ python prepare_stdlib.py --vocab_size 8192 --out_dir data/stdlib8k
$ python prepare_stdlib.py --src ~/my_project  # the *.py files of any other folder
"""
import argparse
import os
import platform
import tokenize

import numpy as np
from tqdm import tqdm

from data import MAX_VOCAB, in_val, own_encoding, write_dataset

SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}


def python_files(src):
    """Return the *.py files under src, relative, with forward slashes, sorted: the same list on every platform."""
    files = []
    for folder, subfolders, names in os.walk(src):
        subfolders[:] = [s for s in subfolders if s not in SKIP]
        # _sysconfigdata_* is made at build time and holds the paths of the machine that built it
        names = [n for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata_")]
        files += [os.path.relpath(os.path.join(folder, n), src).replace(os.sep, "/") for n in names]
    return sorted(files)


def train_bpe(texts, vocab_size):
    """Train a byte-level BPE: ranks {token bytes: id} of vocab_size - 1 tokens, which leaves one for end-of-text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) # cuts text with GPT-2's pattern
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet))
    # GPT-2 writes bytes as printable characters: printable latin-1 ones stand for themselves, the others are counted up
    # from 256
    printable = [b for b in range(256) if chr(b) in alphabet]
    others = [b for b in range(256) if chr(b) not in alphabet]
    char_to_byte = {chr(b): b for b in printable}
    char_to_byte |= {chr(256 + i): b for i, b in enumerate(others)}
    ranks = {}
    for token, rank in tokenizer.get_vocab().items(): # ids are in the order of the merges, which is what a rank is
        ranks[bytes(char_to_byte[c] for c in token)] = rank
    return ranks


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src", default=os.path.dirname(os.__file__),
                        help="folder with *.py (default: this Python's standard library)")
    parser.add_argument("--out_dir", default=os.path.join("data", "stdlib"), help="default: %(default)s")
    parser.add_argument("--vocab_size", type=int, default=4096,
                        help="all tokens, end-of-text included (default: %(default)s)")
    parser.add_argument("--val_fraction", type=float, default=0.05,
                        help="share of the files that go to val.bin (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=2357, help="the seed of that choice (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.vocab_size < 257:
        raise SystemExit(f"--vocab_size {args.vocab_size} is too small: 256 bytes and end-of-text make 257")
    if args.vocab_size > MAX_VOCAB["uint32"]:
        raise SystemExit(f"--vocab_size {args.vocab_size} is too large: at most {MAX_VOCAB['uint32']}")
    files = python_files(args.src)
    if not files:
        raise SystemExit(f"there are no *.py files in {args.src}: give a folder that has some with --src")

    texts = []
    for name in files:
        try:
            with tokenize.open(os.path.join(args.src, name)) as f: # honours a coding line, gives \n on every platform
                texts.append(f.read())
        except (SyntaxError, UnicodeDecodeError) as e:
            raise SystemExit(f"{os.path.join(args.src, name)} is not Python source in its declared encoding: "
                             f"{e}") from None
        except OSError as e:
            raise SystemExit(f"cannot read {os.path.join(args.src, name)}: {e.strerror}. nothing was written") from None
    print(f"{len(files)} files, {sum(len(t.encode()) for t in texts):,} bytes from {args.src}")
    enc = own_encoding(train_bpe(texts, args.vocab_size))
    if enc.n_vocab < args.vocab_size:
        print(f"note: the text has pairs to merge for {enc.n_vocab} tokens only, not for {args.vocab_size}")

    def pairs():
        for name, text in zip(tqdm(files, desc="tokenising", unit=" files"), texts):
            ids = np.array(enc.encode_ordinary(text) + [enc.eot_token])
            nothing = ids[:0]
            yield (nothing, ids) if in_val(args.seed, name, args.val_fraction) else (ids, nothing)

    if os.path.samefile(args.src, os.path.dirname(os.__file__)):
        source = f"Python {platform.python_version()} standard library"
    else:
        source = f"folder {os.path.basename(os.path.abspath(args.src))}"
    source += f", {len(files)} *.py files; split by file, val_fraction {args.val_fraction}, seed {args.seed}"
    try:
        write_dataset(args.out_dir, pairs(), enc, source)
    except ValueError as e:
        raise SystemExit(str(e)) from None
    except OSError as e:
        raise SystemExit(f"{e}. mend that, or write elsewhere (--out_dir ...)") from None


if __name__ == "__main__":
    main()
