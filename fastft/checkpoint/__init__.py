"""Checkpoints: all that a run needs to go on as if it had never stopped, written so that a broken one is never used.

A checkpoint is a folder `step-000123`:

    manifest.json          size and SHA-256 of every other file, agreed by all ranks; without it a folder is no checkpoint
    state.json             step and counters (TrainState), and what a run must share to resume: dtype, optimizer, shapes
    rank-00000.safetensors the random streams of each rank: Python, NumPy, torch, and each CUDA device
    deepspeed/             weights, optimizer and schedule, as DeepSpeed shards them

All is written under a hidden name, flushed to the disk and renamed once every rank is done; the file `latest` beside it
names the one written last. Reading trusts nothing: DeepSpeed's shards are pickles, of which only tensors, plain values
and a few named classes of DeepSpeed are ever built (`torch.load(weights_only=True)`), so no code of a checkpoint runs.

- state: where a run stands
- saving, loading: the two protocols
- engine_io: DeepSpeed's part of both
- streams: random streams
- identity: what must be the same in the run that resumes
- manifest, folders: what makes a folder a good checkpoint; naming, ordering, removing
"""

from fastft.checkpoint.loading import find_checkpoint, keep_step_size, load_checkpoint
from fastft.checkpoint.saving import Saver, save_checkpoint
from fastft.checkpoint.state import TrainState, step_folder

__all__ = [
    "Saver",
    "TrainState",
    "find_checkpoint",
    "keep_step_size",
    "load_checkpoint",
    "save_checkpoint",
    "step_folder",
]
