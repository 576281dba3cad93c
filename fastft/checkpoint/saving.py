"""Saving: DeepSpeed's shards and what it leaves out, under a hidden name until all ranks are done.

The protocol, on every rank; each block of `together` is a barrier, and fails on all ranks where it fails on one:

    1   make the hidden folder, one on each disk
    2   take the state: copies in memory, or files at once
    3   write the files, flush them to the disk, hash them on the way
    4   write the manifest over all files of all ranks, rename the folder
    5   name it in `latest`; only then remove older ones

`save_checkpoint` does all of it. A `Saver` does 1 and 2 between two steps and the rest in a thread, while training goes on.
"""

import contextlib
import dataclasses
import shutil
import threading
import uuid
from pathlib import Path

import torch.distributed as dist

from fastft.checkpoint import identity
from fastft.checkpoint.engine_io import engine_io
from fastft.checkpoint.folders import create, publish, rotate, serial, steps
from fastft.checkpoint.manifest import SHARDS, write_manifest
from fastft.checkpoint.state import step_folder
from fastft.checkpoint.streams import rank_file, rank_state
from fastft.durable import fault, rank, share, together, write_hashed, write_text
from fastft.nn.linear4bit import without_state

LAST_WORDS = 3.0  # seconds that a run which fails gives the checkpoint under way


def save_checkpoint(engine, checkpoints_dir, state, *, keep=None, data=None):
    """Writes the checkpoint of `state.step` and returns its folder. Every rank calls it, between two optimizer steps.

    keep: how many good checkpoints stay, the newest ones; the best one (`state.best_step`) stays too. None keeps all.
    data: `StepPlan.identity()`, which a run must share to resume.
    Ranks that share no disk each keep their own part under the same path.

    Raises OSError (a full disk) or RuntimeError on all ranks if any of them failed; older checkpoints are as before.
    """
    save = _Save(engine, checkpoints_dir, state, keep, data)
    save.finish()
    save.note(state)
    return save.folder


class Saver:
    """`save_checkpoint` beside training: `with Saver(engine, ...) as saver`, and `saver.start(state)` between two steps.

    `start` returns once the state is copied, or written where memory is too small for a copy. Every rank calls `start`
    and `settle` at the same places; `pending` is the same on all of them, `done` is not.
    """

    def __init__(self, engine, checkpoints_dir, *, keep=None, data=None):
        self._arguments = engine, checkpoints_dir
        self._options = {"keep": keep, "data": data}
        self._save = self._thread = self._error = None
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group = (
            dist.new_group(backend="gloo") if several else None
        )  # its messages must not meet those of training

    @property
    def pending(self):
        """Whether a save was started whose outcome nobody has asked for."""
        return self._save is not None

    @property
    def done(self):
        """Whether this rank has nothing more to do for it, so that `settle` returns at once."""
        return not self.pending or not self._thread.is_alive()

    def start(self, state):
        """Begins to save `state.step`, once the save before it is settled. Raises as `save_checkpoint`."""
        assert not self.pending
        engine, checkpoints_dir = self._arguments
        self._save = _Save(engine, checkpoints_dir, state, **self._options, group=self._group, beside=True)
        self._thread = threading.Thread(target=self._finish, daemon=True, name="fastft checkpoint")
        self._thread.start()

    def settle(self, state):
        """Waits for the save under way, if there is one, and notes it in `state`. Raises as `save_checkpoint`."""
        if not self.pending:
            return
        self._thread.join()
        save, error, self._save, self._error = self._save, self._error, None, None
        if error is not None:
            raise error
        save.note(state)

    def _finish(self):
        try:
            self._save.finish()
        except BaseException as error:
            self._error = error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.pending:
            self._thread.join(LAST_WORDS)  # other ranks may be gone: no longer than that


class _Save:
    """One save: made between two steps, with this rank's part of the state; `finish` may run in another thread."""

    def __init__(self, engine, checkpoints_dir, state, keep, data, *, group=None, beside=False):
        self.folder = step_folder(checkpoints_dir, state.step)
        self.best = str(self.folder) if state.best_step == state.step else state.best_checkpoint
        self.best_step, self.keep, self.group = state.best_step, keep, group
        self.failed = f"checkpoint {self.folder} was not written (earlier ones are kept)"
        self.temporary = self.folder.with_name(f".{self.folder.name}.{share(uuid.uuid4().hex)[0]}")
        self.owner = False  # whether this rank writes what is the same on all ranks of its disk
        self.content = {
            **identity.facts(engine),
            "data": data,
            "state": {**dataclasses.asdict(state), "best_checkpoint": self.best},
        }
        with self._or_nothing():
            self._make_folder(engine)
            fault("before_shard")
            with together(self.failed):
                self._take(engine, beside)

    def finish(self):
        with self._or_nothing():
            with together(self.failed, self.group):
                written = self._write()
                fault("after_shard")
            everything = {name: entry for part in share(written, self.group) for name, entry in part.items()}
            fault("before_manifest")
            with together(self.failed, self.group):
                if self.owner:
                    place = 1 + max((serial(old, unreadable=0) for old in steps(self.folder.parent)), default=0)
                    write_manifest(self.temporary, everything, self.content, place)
                fault("before_rename")
                if self.owner:
                    publish(self.temporary, self.folder)
        fault("before_latest")
        with together(f"checkpoint {self.folder} is written, but older ones could not be removed", self.group):
            if self.owner:
                write_text(self.folder.parent / "latest", f"{self.folder.name}\n")
                rotate(self.folder, self.keep, self.best_step)

    def note(self, state):
        state.best_checkpoint, state.last_checkpoint = self.best, str(self.folder)

    @contextlib.contextmanager
    def _or_nothing(self):
        """Removes the hidden folder where the block fails."""
        try:
            yield
        except BaseException:
            if self.owner:
                shutil.rmtree(self.temporary, ignore_errors=True)
            raise

    def _make_folder(self, engine):
        with together(self.failed):
            self.owner = rank() == 0 and create(self.temporary)
        with together(self.failed):
            # finds rank 0's folder on a shared disk; on a disk of its own a node makes one
            self.owner = self.owner or (engine.local_rank == 0 and create(self.temporary))
            if self.owner:
                (self.temporary / ".disk").write_text(str(rank()))  # tells ranks that share a disk from the others

    def _take(self, engine, beside):
        self.excludes = identity.frozen_come_from_elsewhere(engine.module)
        without = without_state() if self.excludes else contextlib.nullcontext()
        with without, engine_io(engine, self.owner, beside) as self.io:
            engine.save_checkpoint(
                str(self.temporary), tag=SHARDS, save_latest=False, exclude_frozen_parameters=self.excludes
            )
        if self.io.error is not None:
            raise self.io.error
        self.streams = rank_state(identity.frozen_checksum_at_first(engine.module) if self.excludes else None)

    def _write(self):
        """Writes this rank's files and returns {name within the checkpoint: {"bytes", "sha256", "rank", "disk"}}."""
        self.io.write_kept()
        path = rank_file(self.temporary)
        written = {**self.io.written, path: write_hashed(path, lambda file: file.write(self.streams))}
        place = {"rank": rank(), "disk": int((self.temporary / ".disk").read_text())}
        return {Path(p).relative_to(self.temporary).as_posix(): {**entry, **place} for p, entry in written.items()}
