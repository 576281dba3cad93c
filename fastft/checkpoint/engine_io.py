"""DeepSpeed's saving and loading: writes are hashed and reach the disk, reads execute nothing.

What DeepSpeed saves is either written as it comes, or copied, to be written while training goes on.
"""

import contextlib
import copy
import os
import shutil
from collections import OrderedDict
from pathlib import Path

import psutil
import torch

from fastft.durable import write_hashed
from fastft.shards import load_shard


class EngineIO:
    """In place of DeepSpeed's checkpoint engine. beside: keep copies in `.kept`, which `write_kept` writes later.

    An error while writing waits in `.error`: raised at once, it would leave the other ranks in DeepSpeed's barriers.
    """

    def __init__(self, inner, beside):
        self.inner, self.beside = inner, beside
        self.error, self.kept, self.written = None, {}, {}
        self._seen = None

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def save(self, state_dict, path):
        try:
            copy = self._copy(state_dict)
            if copy is None:
                self._write(state_dict, path)
            else:
                self.kept[path] = copy
        except Exception as error:
            self.error = error

    def write_kept(self):
        for path in list(self.kept):
            self._write(self.kept.pop(path), path)

    def _copy(self, state_dict):
        if not self.beside or not fits_in_memory(state_dict):
            return None
        try:
            return copied(state_dict)
        except MemoryError:
            return None

    def _write(self, state_dict, path):
        try:
            self.written[path] = write_hashed(path, lambda file: torch.save(state_dict, file))
        except Exception as error:
            free = shutil.disk_usage(Path(path).parent).free
            raise OSError(f"{path} could not be written, {free / 1e6:,.0f} MB are free there: {error}") from error

    def load(self, path, map_location=None):
        """DeepSpeed reads a file once to look at it and once to use it: the second time it gets what was read before."""
        seen, self._seen = self._seen, None
        if seen is not None and seen[0] == path:
            return seen[1]
        content = load_shard(path, map_location)
        self._seen = path, content
        return content


@contextlib.contextmanager
def engine_io(engine, owner=False, beside=False):
    """DeepSpeed's saving and loading through `EngineIO`; owner: whether this rank writes what is the same on all."""
    inner, writes_weights = engine.checkpoint_engine, engine.save_non_zero_checkpoint
    engine.checkpoint_engine = io = EngineIO(inner, beside)
    engine.save_non_zero_checkpoint = writes_weights or owner
    engine._copy_recovery_script = lambda folder: None  # zero_to_fp32.py: another write that could fail, and not needed
    try:
        yield io
    finally:
        engine.checkpoint_engine, engine.save_non_zero_checkpoint = inner, writes_weights
        del engine._copy_recovery_script


def copied(value, memo=None):
    """The same state in memory of its own, on the CPU; a tensor that stands in several places is copied once."""
    memo = {} if memo is None else memo
    if isinstance(value, torch.Tensor):
        key = value.device, value.dtype, value.data_ptr(), tuple(value.shape), value.stride()
        if key not in memo:
            memo[key] = value.detach().to("cpu", copy=True)
        return memo[key]
    if type(value) in (dict, OrderedDict):
        return type(value)((key, copied(part, memo)) for key, part in value.items())
    if type(value) in (list, tuple):
        return type(value)(copied(part, memo) for part in value)
    return copy.deepcopy(value)


def fits_in_memory(state):
    """Whether all ranks of this machine can keep a copy of so much in half of the memory that is left."""
    ranks = int(os.environ.get("LOCAL_SIZE", 1))
    return _bytes(state) * ranks <= psutil.virtual_memory().available / 2


def _bytes(value):
    if isinstance(value, torch.Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(_bytes, parts))
