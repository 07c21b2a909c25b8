"""
What keeps a run whole when something breaks: files that are written whole or not at all and are checked when they are
read, one writer in a folder, and an end that loses no step. What happens, and what is left then:

  kill -9, a crash        the last checkpoint, and the energy up to the last minute
  SIGTERM, Ctrl-C, ...    the step that was being made, saved: see Halt
  a full disk             every file as it was, and a message that names the one that could not be written
  a damaged checkpoint    a line that says so, and the one before it
  a second run            none: it is refused while the first one lives, see lock
  a closed stdout         the run, silent
"""
import contextlib
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import sys
import time
import zipfile
from datetime import datetime

import torch

from data import replacing

try:
    import fcntl
except ImportError: # Windows, where nothing is locked
    fcntl = None


# -----------------------------------------------------------------------------
# who speaks

def ranks():
    """(rank, local rank, number of ranks) as torchrun gives them to its processes; (0, 0, 1) without it."""
    rank, local_rank = os.environ.get("RANK", 0), os.environ.get("LOCAL_RANK", 0)
    return int(rank), int(local_rank), int(os.environ.get("WORLD_SIZE", 1))


def say(*args):
    """Print. Where that fails, as when the reader of a pipe has left, nothing is printed any more."""
    try:
        print(*args, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print0(*args):
    """Print, on rank 0 only."""
    rank, _, _ = ranks()
    if rank == 0:
        say(*args)


# -----------------------------------------------------------------------------
# files

@contextlib.contextmanager
def explained(path):
    """Make an error of the disk a SystemExit that names the file, the reason, what is intact and how to go on."""
    try:
        yield
    except OSError as e:
        folder = os.path.dirname(path)
        intact = ""
        if os.path.exists(os.path.join(folder, "ckpt.pt")):
            intact = f"; ckpt.pt is as it was, --init_from=resume --out_dir={folder} goes on from it"
        raise SystemExit(f"{path} cannot be written: {e.strerror or e}{intact}") from None


def write(path, text):
    """Write a text file, whole or not at all. Raises SystemExit where the disk does not take it."""
    with explained(path), replacing(path) as (f,):
        f.write(text.encode())


def before(path):
    """Where save keeps the checkpoint before the one at path: ckpt_before.pt for ckpt.pt."""
    stem, ending = os.path.splitext(path)
    return f"{stem}_before{ending}"


def save(path, state, keep=False):
    """
    Write a checkpoint, whole or not at all; with keep the one that it replaces stays, as recover needs it.
    Raises SystemExit where the disk does not take it.
    """
    with explained(path), replacing(path) as (f,):
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno()) # the one before goes only when this one is whole
        if keep and os.path.exists(path):
            with contextlib.suppress(FileNotFoundError):
                os.remove(before(path))
            try:
                os.link(path, before(path)) # so that there is a file at path all the time
            except OSError: # there are disks without links
                shutil.copyfile(path, before(path))


def load(path):
    """
    Return the checkpoint in a file, on the CPU. Raises ValueError that says what is wrong with the file: it is not
    there, it is damaged, it was not written by these scripts, ...
    """
    try:
        with zipfile.ZipFile(path) as archive: # torch stores a checksum of each tensor there, but does not look at it
            damaged = archive.testzip()
            for part in archive.infolist():
                if part.external_attr: # torch takes it for a folder, and skips it
                    damaged = part.filename
        if damaged:
            raise ValueError(f"its part {damaged} is not what was written")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not {"model", "model_args", "config", "step"} <= state.keys():
            raise ValueError("it holds no run")
    except pickle.UnpicklingError: # torch's own message tells how to load it all the same
        raise ValueError(f"{path} cannot be read as a checkpoint: it asks for code that none needs") from None
    except Exception as e: # a damaged file can raise anything
        first_line, *_ = str(e).splitlines() or [""]
        raise ValueError(f"{path} cannot be read as a checkpoint ({type(e).__name__}: {first_line})") from None
    return state


def hashes(folder, names):
    """
    The sha256 of each of these files, by name, or None where it cannot be read. All ranks call it, and each reads its
    share of the files.
    """
    found, rank, count = {}, 0, 1
    if torch.distributed.is_initialized():
        rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for name in sorted(names)[rank::count]:
        found[name] = None
        with contextlib.suppress(OSError), open(os.path.join(folder, name), "rb") as f:
            sha = hashlib.sha256()
            while chunk := f.read(2**20):
                sha.update(chunk)
            found[name] = sha.hexdigest()
    if torch.distributed.is_initialized():
        of_each_rank = [None] * count
        torch.distributed.all_gather_object(of_each_rank, found)
        found = {name: sha for part in of_each_rank for name, sha in part.items()}
    return found


def check_shards(path, state):
    """Raise ValueError where a file in the folder of a sharded checkpoint, see fsdp.py, is not what was written."""
    if "shards" not in state:
        return
    folder, written = os.path.join(os.path.dirname(path), state["shards"]["folder"]), state["shards"]["files"]
    found = hashes(folder, written)
    for name in written:
        if found.get(name) != written[name]:
            what = "is not there" if found.get(name) is None else "is not what was written"
            raise ValueError(f"{path} cannot be read as a checkpoint: its part {os.path.join(folder, name)} {what}")


def recover(path):
    """
    Return the checkpoint at path, or where it is damaged the one before it, which takes its place; a line says so.
    All ranks call it. Raises SystemExit where neither can be read.
    """
    try:
        state = load(path)
        if "shards" not in state and state["config"].get("sharding") == "fsdp":
            raise ValueError(f"{path} has the weights alone, and a sharded run goes on from its shards")
        check_shards(path, state)
        return state
    except ValueError as e:
        damage = str(e)
    try:
        state = load(before(path))
        check_shards(before(path), state)
    except ValueError:
        raise SystemExit(f"{damage}. There is no whole {before(path)} either; best.pt is a checkpoint as well, "
                         "copied over ckpt.pt it can be resumed, unless the run was sharded") from None
    if torch.distributed.is_initialized(): # all ranks have read both
        torch.distributed.barrier()
    print0(f"{damage}. Going on from the checkpoint before it, of step {state['step']}")
    rank, _, _ = ranks()
    if rank == 0:
        os.replace(before(path), path)
    return state


def read_metrics(out_dir):
    """
    The rows of metrics.jsonl, and whether each line could be read; ([], True) without one. A crash, or a full disk, may
    leave a last line that is cut short.
    """
    path, rows, whole = os.path.join(out_dir, "metrics.jsonl"), [], True
    if not os.path.exists(path):
        return rows, whole
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            try:
                row = json.loads(line)
                is_row = isinstance(row["step"], int)
            except (ValueError, LookupError, TypeError, RecursionError):
                is_row = False
            if is_row:
                rows.append(row)
            else:
                whole = False
    return rows, whole


# -----------------------------------------------------------------------------
# one writer

def lock(folder):
    """
    Make a folder, if need be, and keep other processes from locking it until this one ends, however it ends; its file
    `lock` says whose it is. Returns a function that sets it free. Raises SystemExit that names who has it, or why there
    can be no such folder.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        f = open(os.path.join(folder, "lock"), "a+", encoding="utf-8")
        if not is_free(f):
            f.seek(0)
            raise SystemExit(f"{folder} is in use by {f.read() or 'another process'}: wait for its end, stop it, or "
                             "name another folder with --out_dir")
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        f.truncate(0)
        f.write(f"process {os.getpid()} on {socket.gethostname()} since {now}")
        f.flush()
    except OSError as e:
        raise SystemExit(f"{folder} cannot be a run's folder, name another one with --out_dir: {e.strerror}") from None

    def release():
        f.truncate(0)
        f.close()

    return release


def is_free(f):
    """Lock an open file, if no other process has done so, until it is closed or this process ends."""
    try:
        if fcntl:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError: # some network disks know no locks
        pass
    return True


# -----------------------------------------------------------------------------
# the end

ENDS = {143: "SIGTERM", 130: "Ctrl-C", 129: "the end of its terminal or study", 124: "its time_limit"} # by exit code


class Halt:
    """
    Ends a run after a whole step: on a signal, after time_limit minutes (0: never), or where the study that runs it has
    been killed. The exit codes are those of shells, 128 + signal, and that of `timeout`.

        is_last = halt.asked()      # in each step, on every rank: all get the same answer
        halt.end(step, out_dir)     # after a last step, when it is saved

    Before the first step, when there is nothing to save, a signal ends the process at once. So does a second one of its
    kind, unless it comes within a second, or the 30 that torchrun and Slurm wait: launchers pass on what their
    processes have received already, and more than once.
    """

    def __init__(self, time_limit=0.0):
        self.study = multiprocessing.parent_process()
        self.start, self.time_limit = time.monotonic(), time_limit
        self.code, self.has_begun = 0, False
        self.window = 30 if {"TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"} & os.environ.keys() else 1 # seconds
        self.came, self.handlers = {}, {} # by signal: when it came first, who had it before
        self.listen("SIGINT") # for python it is an exception, with a traceback

    def listen(self, *names):
        for name in names:
            signum = getattr(signal, name, None) # Windows has no SIGHUP
            if signum and signal.getsignal(signum) != signal.SIG_IGN: # as nohup wants it
                self.handlers[signum] = signal.signal(signum, self.receive)

    def receive(self, signum, frame):
        """Note a signal, or end the process. It may interrupt any line, even a print."""
        now = time.monotonic()
        if not self.has_begun:
            with contextlib.suppress(OSError):
                os.write(2, f"stopped by {ENDS[128 + signum]} before the first step\n".encode())
            raise SystemExit(128 + signum)
        if now - self.came.setdefault(signum, now) > self.window:
            os._exit(128 + signum)
        self.code = max(self.code, 128 + signum)

    def asked(self):
        """Whether the step that is being made is the last one. All ranks ask in each step, and wait for each other."""
        if not self.has_begun:
            self.has_begun = True
            self.listen("SIGTERM", "SIGHUP") # not before: a rank that waits for one that is dead could not hear it
        if 0 < 60 * self.time_limit < time.monotonic() - self.start:
            self.code = max(self.code, 124)
        if self.study and not self.study.is_alive():
            self.code = max(self.code, 129)
        if not torch.distributed.is_initialized():
            return self.code > 0
        code = torch.tensor(self.code) # on the CPU: the GPUs work on
        torch.distributed.all_reduce(code, torch.distributed.ReduceOp.MAX)
        if code.item() > 0: # else a signal that came meanwhile, which the others have not heard of, waits for a step
            self.code = code.item()
        return code.item() > 0

    def end(self, step, out_dir):
        """Leave with the exit code of the reason; raises SystemExit. All ranks call it, rank 0 after it has saved."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        print0(f"stopped by {ENDS[self.code]} after step {step}, which is saved: "
               f"--init_from=resume --out_dir={out_dir} goes on")
        rank, _, _ = ranks() # on a code other than 0 torchrun kills the others, while rank 0 still closes its files
        raise SystemExit(self.code if rank == 0 else 0)

    def forget(self):
        """Give the signals back to who had them before."""
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
