"""Files that are whole or absent, and errors that all ranks share."""

import contextlib
import json
import os
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


def write_json(path, content):
    """Writes JSON under another name, waits for the disk, and renames: a reader finds the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


@contextlib.contextmanager
def together(what):
    """A block that succeeds on all ranks or raises on all: every rank enters it, and its end is a barrier.

    Inside, no rank may wait for another, because one that failed never arrives. Every rank raises the error of the
    first rank that failed: a ValueError as it is, an OSError or RuntimeError as "<what>: rank 1: <error>".
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    failures = [failure for failure in share(_describe(error)) if failure is not None]
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


def share(value):
    """The value of every rank, in order of rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
