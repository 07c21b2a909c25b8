"""
The files of one split as one stream of tokens: train.bin, or the many shards of llm.c and modded-nanogpt, unchanged.

A shard is a header of 256 little-endian int32 and then its tokens, uint16. The header begins with 20240520, the version
1 and the number of tokens; its other numbers are 0. In a folder without train.bin, "train" is all *.bin with "train" in
their names, "val" all others with "val" in theirs, each in the order of the names:
  fineweb_val_000000.bin  fineweb_train_000001.bin  fineweb_train_000002.bin  ...
What is checked when: every header, against the file's size, when a run starts, which reads 12 bytes of each file; the
ids, when a batch has them; all that the files hold, only against a hash (see data.py).
"""
import glob
import hashlib
import os
import re

import numpy as np

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4


def shards(data_dir, split):
    """Return the paths of a split's shards, in order. There may be none."""
    found = []
    for path in sorted(glob.glob(os.path.join(glob.escape(data_dir), "*.bin"))):
        name = os.path.basename(path)
        if split in name and (split == "train" or "train" not in name):
            found.append(path)
    return found


def token_files(data_dir, split):
    """Return the paths of a split's files, in order: train.bin or val.bin where there is a train.bin, else shards."""
    if os.path.exists(os.path.join(data_dir, "train.bin")):
        return [path for path in [os.path.join(data_dir, f"{split}.bin")] if os.path.exists(path)]
    return shards(data_dir, split)


def is_half_written(data_dir):
    """Return whether a command that was killed has left shards, but not yet the meta.pkl that tells what they are."""
    path = os.path.join(data_dir, "meta.pkl")
    in_shards = not os.path.exists(os.path.join(data_dir, "train.bin"))
    return in_shards and os.path.exists(path + ".tmp") and not os.path.exists(path)


def holds_dataset(data_dir):
    """Return whether a folder has tokens to train on that a prepare script must not replace unless it is told to."""
    return bool(token_files(data_dir, "train")) and not is_half_written(data_dir)


def replaced(data_dir):
    """Return the token files that go when a dataset is written here: the old one's, and what a kill has left of one."""
    ours = [path for path in shards(data_dir, "train") + shards(data_dir, "val")
            if re.fullmatch(r"(train|val)_\d{6}\.bin", os.path.basename(path))]
    if holds_dataset(data_dir):
        ours += token_files(data_dir, "train") + token_files(data_dir, "val")
    return list(dict.fromkeys(ours))


def header(num_tokens):
    """Return the header of a shard, as bytes."""
    numbers = np.zeros(256, "<i4")
    numbers[:3] = MAGIC, VERSION, num_tokens
    return numbers.tobytes()


def read_header(path):
    """Return the number of a shard's tokens. Raises ValueError when the file is no shard, or not as long as it says."""
    size = os.path.getsize(path)
    numbers = np.fromfile(path, "<i4", count=3)
    again = "download or prepare it again"
    if size < HEADER_BYTES:
        raise ValueError(f"{path} is damaged: {size:,} bytes, a shard's header alone has {HEADER_BYTES:,}. {again}")
    magic, version, num_tokens = numbers.tolist()
    if magic != MAGIC:
        raise ValueError(f"{path} is no shard of uint16 tokens: it begins with {magic}, it must be {MAGIC}. take it "
                         "out of the folder, or prepare the text with prepare_openwebtext.py")
    if version != VERSION:
        raise ValueError(f"{path} is a shard of version {version}, which cannot be read here: it must be {VERSION}")
    expected = HEADER_BYTES + 2 * num_tokens
    if size != expected:
        raise ValueError(f"{path} is damaged: its header says {num_tokens:,} tokens, which make {expected:,} bytes, "
                         f"it has {size:,}. {again}")
    return num_tokens


class Stream:
    """
    The tokens of one split, in one file or in many, as one sequence of len(stream) tokens, memory-mapped.

    dtype is that of meta.pkl. Raises OSError when a file cannot be read, ValueError when one is damaged.
    """

    def __init__(self, paths, dtype):
        self.paths, self.dtype = paths, np.dtype(dtype)
        self.name = paths[0] # for messages
        if paths[1:]:
            self.name += f" and {len(paths) - 1} more"
        self.is_sharded = os.path.basename(paths[0]) not in ("train.bin", "val.bin")
        self.offset = HEADER_BYTES if self.is_sharded else 0 # where in a file its tokens begin
        if self.is_sharded and self.dtype != np.uint16:
            raise ValueError(f"{self.name} hold uint16, meta.pkl says {dtype}. prepare the dataset again")
        self.counts = np.array([self.count(path) for path in paths], np.int64) # tokens of each file, (files,)
        self.begins = np.cumsum(self.counts) - self.counts # the position of its first one, (files,)

    def __len__(self):
        return int(self.counts.sum())

    def count(self, path):
        """Return the number of tokens in a file."""
        with open(path, "rb"): # a folder, or a file that may not be read, is better known now
            pass
        if self.is_sharded:
            return read_header(path)
        size = os.path.getsize(path)
        if size % self.dtype.itemsize:
            raise ValueError(f"{path} is damaged: {size} bytes of {self.dtype}, expected whole tokens. "
                             "prepare the dataset again")
        return size // self.dtype.itemsize

    def locate(self, position):
        """Return where a token is: the number of its file, and its position there."""
        i = int(np.searchsorted(self.begins, position, side="right")) - 1 # of files without tokens the one after them
        return i, int(position - self.begins[i])

    def read(self, starts, size):
        """
        Return the size tokens from each of these positions on, (len(starts), size) int64; they may lie in several
        files. Raises ValueError when a file has become shorter.
        """
        # new memmaps per batch, as in nanoGPT: those that are kept hold every page they have touched in resident memory
        opened = {}
        rows = np.empty((len(starts), size), np.int64)
        for row, start in zip(rows, starts):
            done = 0
            while done < size:
                i, first = self.locate(start + done)
                if i not in opened:
                    opened[i] = self.memmap(i)
                part = opened[i][first:first + size - done]
                row[done:done + len(part)] = part
                done += len(part)
        return rows

    def memmap(self, i):
        """Return the tokens of the i-th file, as an array that reads them when they are used."""
        path, count = self.paths[i], int(self.counts[i])
        left = max(0, os.path.getsize(path) - self.offset) // self.dtype.itemsize
        if left < count:
            raise ValueError(f"{path} has become shorter, {left} tokens: position {count - 1} is gone")
        return np.memmap(path, dtype=self.dtype, mode="r", offset=self.offset, shape=(count,))

    def hash(self):
        """Return hashlib's sha256 of all tokens: the same in one file and in shards. This reads them all."""
        sha = hashlib.sha256()
        for path in self.paths:
            with open(path, "rb") as f:
                f.seek(self.offset)
                while chunk := f.read(2**20):
                    sha.update(chunk)
        return sha

    def listing(self):
        """Return the names of the files and how many tokens each has, as a text: what the order of the data is of."""
        return "\n".join(f"{os.path.basename(path)} {count}" for path, count in zip(self.paths, self.counts))


def identity(meta, *streams):
    """
    Return the hash by which a run that is resumed knows its data: meta.pkl's own, else that of the shards' names and
    sizes, as one shard more would be another order of batches. None for nanoGPT's folders, which have neither.
    """
    listing = "\n".join(stream.listing() for stream in streams if stream.is_sharded)
    if meta.get("hash") is None and listing:
        return hashlib.sha256(listing.encode()).hexdigest()
    return meta.get("hash")


# -----------------------------------------------------------------------------
# writing

class ShardFile:
    """
    A file for writing that cuts what it is given into shards of shard_tokens tokens, the last one shorter. Each is
    whole, and on the disk, as path + ".tmp" before the next one begins; its path is added to the list paths.
    """

    def __init__(self, out_dir, split, shard_tokens, paths):
        self.out_dir, self.split, self.shard_bytes, self.paths = out_dir, split, 2 * shard_tokens, paths
        self.file, self.number, self.size = None, 0, 0 # the current shard, how many there are, its bytes of tokens

    def write(self, raw):
        """Append tokens, as bytes of uint16."""
        view = memoryview(raw)
        while view:
            if self.file is None:
                path = os.path.join(self.out_dir, f"{self.split}_{self.number:06d}.bin")
                self.paths.append(path)
                self.file, self.size = open(path + ".tmp", "wb"), 0
                self.number += 1
                self.file.write(header(0))
            part = view[:self.shard_bytes - self.size]
            self.file.write(part)
            self.size += len(part)
            view = view[len(part):]
            if self.size == self.shard_bytes:
                self.close()

    def close(self):
        """Finish the current shard: its header says how many tokens it has."""
        if self.file is None:
            return
        f, self.file = self.file, None
        with f:
            f.seek(0)
            f.write(header(self.size // 2))
            f.flush()
            os.fsync(f.fileno())
