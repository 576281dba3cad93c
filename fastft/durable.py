"""Files that are whole or absent, errors that all ranks share, and the points at which tests kill a rank."""

import contextlib
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError


def sync(path):
    """Waits until a file or folder is on the disk itself, so that it outlives a power cut."""
    if os.name == "nt":  # Windows can neither open a folder nor flush a file that was opened for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create(path, mode="w"):
    """Opens a new file in place of what has its name: a link there is removed, never followed."""
    Path(path).unlink(missing_ok=True)
    return open(path, mode.replace("w", "x"), **({} if "b" in mode else {"encoding": "utf-8"}))


def write_text(path, text):
    """Writes text under another name, waits for the disk, and renames: a reader finds the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with create(temporary) as file:
        file.write(text)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def write_json(path, content):
    """`write_text` of a value as JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_hashed(path, write):
    """Makes a file with `write(file)`, waits for the disk, and returns its {"bytes", "sha256"}, hashed on the way."""
    with create(path, "wb") as file:
        hashing = _HashingFile(file)
        write(hashing)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": hashing.bytes, "sha256": hashing.digest.hexdigest()}


class _HashingFile:
    """What torch.save needs of a file that it only appends to."""

    def __init__(self, file):
        self.file, self.bytes, self.digest = file, 0, hashlib.sha256()

    def write(self, data):
        data = memoryview(data).cast("B")
        if not self.bytes:
            fault("mid_shard", lambda: (self.file.write(data[: len(data) // 2]), self.file.flush()))
        self.file.write(data)
        self.digest.update(data)
        self.bytes += len(data)
        return len(data)

    def flush(self):
        self.file.flush()


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fault(point, last_act=lambda: None):
    """Kills this process if FASTFT_FAULT_POINT names the point: `after_shard:rank1`, with `:2` the second time there."""
    name, where, *count = (os.environ.get("FASTFT_FAULT_POINT") or ":").split(":")
    if (name, where) == (point, f"rank{rank()}"):
        _faults[point] = _faults.get(point, 0) + 1
        if _faults[point] == int(count[0] if count else 1):
            last_act()
            os.kill(os.getpid(), signal.SIGKILL)


_faults = {}  # {point: how often it was passed}


def tell(text):
    """A line on standard error from rank 0, for what must be seen before the run has its screen."""
    if rank() == 0:
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def together(what, group=None):
    """A block that succeeds on all ranks or raises on all: every rank enters it, and its end is a barrier.

    group: all ranks in a process group of their own, for a thread beside the one that trains.

    Inside, no rank may wait for another, because one that failed never arrives. Every rank raises the error of the
    first rank that failed: a ValueError as it is, an OSError or RuntimeError as "<what>: rank 1: <error>".
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    failures = [failure for failure in share(_describe(error), group) if failure is not None]
    if failures:
        kind, text = failures[0]
        raise kind(text if kind is ValueError else f"{what}: {text}") from error


def _describe(error):
    if error is None:
        return None
    if isinstance(error, ValueError):
        return ValueError, str(error)
    if isinstance(error, (OSError, SafetensorError)):  # safetensors does not say OSError when the disk is full
        return OSError, f"rank {rank()}: {error}"
    return RuntimeError, f"rank {rank()}: {type(error).__name__}: {error}"


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def share(value, group=None):
    """The value of every rank, in order of rank; group as in `together`."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values
