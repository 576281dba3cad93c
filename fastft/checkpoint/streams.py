"""The random streams of each rank, in a file of its own: Python, NumPy, torch, and each CUDA device."""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from fastft.durable import rank


def rank_state(frozen):
    """This rank's file as bytes. frozen: the checksum of the frozen weights, where the checkpoint leaves these out."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    rest = {
        "python": [version, gauss],
        "numpy": {**numpy_state, "state": {"pos": numpy_state["state"]["pos"]}},
        "frozen": frozen,
    }
    return save(tensors, metadata={"json": json.dumps(rest)})


def load_rank(folder, wanted, world_size):
    """(streams, checksum of the frozen weights). A rank that the checkpoint does not know gets a new stream."""
    path = rank_file(folder, wanted % world_size)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            rest = json.loads(file.metadata()["json"])
    except FileNotFoundError:
        raise ValueError(f"checkpoint {folder}: {path.name} is missing on this disk") from None
    if wanted >= world_size:
        tensors, rest = _branched(tensors, rest, wanted)
    return (tensors, rest), rest["frozen"]


def _branched(tensors, rest, number):
    """Streams that depend on the given ones and on a number."""
    seed = int.from_bytes(hashlib.sha256(tensors["torch"].numpy().tobytes() + str(number).encode()).digest()[:4], "big")
    version, words, gauss = random.Random(seed).getstate()
    numpy_state = np.random.RandomState(seed).get_state(legacy=False)
    fresh = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "torch": torch.Generator().manual_seed(seed).get_state(),
    }
    numpy_rest = {**numpy_state, "state": {"pos": numpy_state["state"]["pos"]}}
    return {**tensors, **fresh}, {**rest, "python": [version, gauss], "numpy": numpy_rest}


def restore_streams(streams):
    tensors, rest = streams
    version, gauss = rest["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    key = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state({**rest["numpy"], "state": {"key": key, **rest["numpy"]["state"]}})
    torch.set_rng_state(tensors["torch"])
    for i in range(torch.cuda.device_count()):
        if f"cuda:{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda:{i}"], i)


def rank_file(folder, number=None):
    return Path(folder) / f"rank-{rank() if number is None else number:05d}.safetensors"
