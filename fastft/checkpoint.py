"""Checkpoints: all that a run needs to go on as if it had never stopped, written so that a broken one is never found.

A checkpoint is a folder `step-000123`:

    state.json             step and counters (TrainState), and what a run must share to resume: world size, ZeRO stage,
                           dtype, optimizer, shapes; written last, so a folder without it is no checkpoint
    rank-00000.safetensors the random streams of each rank: Python, NumPy, torch, and each CUDA device
    deepspeed/             weights, optimizer and schedule, as DeepSpeed shards them

It is written under a hidden name and renamed once every rank is done. DeepSpeed unpickles its shards
(`torch.load(weights_only=False)`), so resume only from folders that you trust as you trust code.
"""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastft.durable import rank, share, sync, together, write_json

FORMAT = 1
SHARDS = "deepspeed"


@dataclass
class TrainState:
    """Where a run stands, beyond weights, optimizer and schedule. Plain values, the same on every rank."""

    step: int = 0  # optimizer steps done
    best_metric: float | None = None
    best_step: int | None = None
    best_checkpoint: str | None = None  # folder of best_step; set by save_checkpoint, which never rotates it out
    evaluations_without_improvement: int = 0
    skipped_steps: int = 0  # in a row, because of NaN or infinite gradients
    tokens: int = 0
    samples: int = 0
    seconds: float = 0.0  # spent in training steps; evaluation and saving left out
    loss_sum: float = 0.0  # over the `loss_count` steps that were logged
    loss_count: int = 0
    recent_loss: list = field(default_factory=lambda: [0.0, 0])  # the same over the steps since the last log line


def step_folder(checkpoints_dir, step):
    return Path(checkpoints_dir) / f"step-{step:06d}"


def save_checkpoint(engine, checkpoints_dir, state, *, keep=None):
    """Writes the checkpoint of `state.step` and returns its folder. Every rank calls it, between two optimizer steps.

    keep: how many checkpoints stay, the newest ones; the best one (`state.best_step`) stays too. None keeps all.
    Ranks that share no disk each keep their own part under the same path.

    Raises OSError (a full disk) or RuntimeError on all ranks if any of them failed; older checkpoints are as before.
    """
    folder = step_folder(checkpoints_dir, state.step)
    failed = f"checkpoint {folder} was not written (earlier ones are kept)"
    temporary = folder.with_name(f".{folder.name}.{share(uuid.uuid4().hex)[0]}")
    if state.best_step == state.step:
        state.best_checkpoint = str(folder)
    owner = False
    try:
        with together(failed):
            owner = rank() == 0 and _create(temporary)
        with together(failed):
            # finds rank 0's folder on a shared disk; on a disk of its own a node makes one
            owner = owner or (engine.local_rank == 0 and _create(temporary))
        with together(failed):
            with _guarded(engine, owner) as writer:
                engine.save_checkpoint(
                    str(temporary),
                    tag=SHARDS,
                    save_latest=False,
                    exclude_frozen_parameters=_frozen_come_from_elsewhere(engine.module),
                )
            if writer.error is not None:
                raise writer.error
            _save_rank(engine, temporary)
        with together(failed):
            if owner:
                sync(temporary / SHARDS)
                serial = 1 + max((_read(old)["serial"] for old in _complete(folder.parent)), default=0)
                content = {"serial": serial, **_facts(engine), "state": dataclasses.asdict(state)}
                write_json(temporary / "state.json", content)
                _publish(temporary, folder)
    except BaseException:
        if owner:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    with together(f"checkpoint {folder} is written, but older ones could not be removed"):
        if owner:
            _rotate(folder.parent, keep, state.best_step)
    return folder


def find_checkpoint(checkpoints_dir, request):
    """The folder to resume from. request: a checkpoint folder, `auto` for the one written last, or None.

    Returns None for None, and for `auto` where there is no checkpoint. Every rank calls it; rank 0's disk decides.
    Raises ValueError if the folder asked for is not a complete checkpoint.
    """
    found = None
    with together("--resume_from_checkpoint"):
        if rank() == 0 and request == "auto":
            found = max(_complete(checkpoints_dir), key=lambda folder: _read(folder)["serial"], default=None)
        elif rank() == 0 and request is not None:
            found = Path(request)
            if not found.is_dir():
                raise ValueError(f"--resume_from_checkpoint {request}: no such folder")
            if not (found / "state.json").exists():
                raise ValueError(
                    f"--resume_from_checkpoint {request}: no complete checkpoint, state.json is missing; "
                    "give a folder like checkpoints/step-000100, or auto"
                )
    return share(found)[0]


def load_checkpoint(engine, path, *, weights_only=False):
    """Puts engine, schedule and random streams back to where `save_checkpoint` found them and returns the TrainState.

    weights_only: to go back to the best weights: the random streams stay as they are. (The optimizer's state comes
    along, because ZeRO keeps the weights there.)

    Raises ValueError, the same on all ranks, where model, rank count, ZeRO stage, dtype or optimizer are not the same.
    """
    path = Path(path)
    with together(f"checkpoint {path} cannot be read"):
        content = _read(path)
        _check_same(path, content, _facts(engine))
        streams, frozen = _load_rank(path)
        if frozen is not None and frozen != _frozen_checksum(engine.module):
            raise ValueError(f"checkpoint {path}: its adapter was trained on a base model with other weights")
    loaded, _ = engine.load_checkpoint(str(path), tag=SHARDS, load_module_strict=frozen is None)
    if loaded is None:
        raise OSError(f"checkpoint {path}: DeepSpeed found no shards in {path / SHARDS}")
    if not weights_only:
        _restore_streams(streams)  # last, so that nothing draws from them before the next step does
    state = TrainState(**content["state"])
    if state.best_checkpoint is not None:  # beside this one, also where the run's folder was moved
        state.best_checkpoint = str(path.parent / Path(state.best_checkpoint).name)
    return state


# What a checkpoint must share with the run that resumes from it


def _facts(engine):
    module = engine.module
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters()})
    shapes = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    return {
        "format": FORMAT,
        "world_size": engine.world_size,
        "zero_stage": engine.zero_optimization_stage(),
        "dtype": "+".join(dtypes),
        "optimizer": type(engine.basic_optimizer).__name__,
        "parameters": {name: f"{shape} frozen" if name in frozen else f"{shape}" for name, shape in shapes.items()},
    }


def _check_same(path, saved, run):
    if saved["format"] != run["format"]:
        raise ValueError(
            f"checkpoint {path}: has format {saved['format']}; this version of fastft reads format {FORMAT}"
        )
    theirs, ours = saved["parameters"], run["parameters"]
    for name in [*ours, *theirs]:
        if theirs.get(name) != ours.get(name):
            raise ValueError(
                f"checkpoint {path}: of another model: {name} is {theirs.get(name, 'absent')} there "
                f"and {ours.get(name, 'absent')} in this run"
            )
    advice = {
        "world_size": ("ranks", "resume with as many"),
        "zero_stage": ("ZeRO stage", "resume with the same --zero_stage"),
        "dtype": ("weights in", "resume with the same --bf16 and --fp16"),
        "optimizer": ("optimizer", "resume with the same --optim"),
    }
    for fact, (name, remedy) in advice.items():
        if saved[fact] != run[fact]:
            raise ValueError(f"checkpoint {path}: {name} {saved[fact]} there, {run[fact]} in this run; {remedy}")


def _frozen_come_from_elsewhere(module):
    """Whether the frozen weights can be left out: those under an adapter whose base model has a name to load it by."""
    configs = getattr(module, "peft_config", {})
    return bool(configs) and all(config.base_model_name_or_path for config in configs.values())


@torch.no_grad()
def _frozen_checksum(module):
    """The sum of all bytes of the frozen weights that this rank holds: an integer, so the order does not matter."""
    total = 0
    for p in module.parameters():
        if not p.requires_grad:
            held = p.detach().reshape(-1) if not hasattr(p, "ds_tensor") else _shard(p)
            total += held.view(torch.uint8).sum(dtype=torch.int64).item()
    return total


def _shard(p):
    """This rank's part of a ZeRO-3 parameter, without the padding at its end, which was never written."""
    size = p.ds_tensor.numel()
    return p.ds_tensor[: max(0, min(size, p.ds_numel - size * rank()))]


# Random streams, one file per rank


def _save_rank(engine, folder):
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
        "frozen": _frozen_checksum(engine.module) if _frozen_come_from_elsewhere(engine.module) else None,
    }
    path = _rank_file(folder)
    save_file(tensors, path, metadata={"json": json.dumps(rest)})
    sync(path)


def _load_rank(folder):
    with safe_open(_rank_file(folder), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        rest = json.loads(file.metadata()["json"])
    return (tensors, rest), rest["frozen"]


def _restore_streams(streams):
    tensors, rest = streams
    version, gauss = rest["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    key = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state({**rest["numpy"], "state": {"key": key, **rest["numpy"]["state"]}})
    torch.set_rng_state(tensors["torch"])
    for i in range(torch.cuda.device_count()):
        if f"cuda:{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda:{i}"], i)


def _rank_file(folder):
    return Path(folder) / f"rank-{rank():05d}.safetensors"


# Folders


def _create(folder):
    """Makes a folder; False where it exists already."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def _complete(checkpoints_dir):
    return [path.parent for path in Path(checkpoints_dir).glob("step-*/state.json")]


def _read(folder):
    return json.loads((Path(folder) / "state.json").read_text(encoding="utf-8"))


def _publish(temporary, folder):
    """Gives a finished folder its name. One that a rewound run wrote at the same step makes way."""
    if folder.exists():
        os.replace(folder, temporary.with_name(f"{temporary.name}.old"))
    os.replace(temporary, folder)
    sync(folder.parent)


def _rotate(checkpoints_dir, keep, best_step):
    """Removes what interrupted saves left, and all but the `keep` checkpoints written last; never the best one."""
    for leftover in checkpoints_dir.glob(".step-*"):
        shutil.rmtree(leftover)
    if keep is None:
        return
    best = best_step is not None and step_folder(checkpoints_dir, best_step)
    by_age = sorted(_complete(checkpoints_dir), key=lambda folder: _read(folder)["serial"])
    for old in by_age[:-keep]:
        if old != best:
            shutil.rmtree(old)


# DeepSpeed's writer


class _Writer:
    """DeepSpeed's checkpoint engine, except that an error waits in `.error`: raised at once, it would leave the other
    ranks in DeepSpeed's barriers."""

    def __init__(self, inner):
        self.inner, self.error = inner, None

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def save(self, state_dict, path):
        try:
            self.inner.save(state_dict, path)
            sync(path)
        except RuntimeError as error:  # torch's C++ writer does not say OSError when the disk is full
            free = shutil.disk_usage(Path(path).parent).free
            self.error = OSError(f"{path} could not be written, {free / 1e6:,.0f} MB are free there: {error}")
        except Exception as error:
            self.error = error


@contextlib.contextmanager
def _guarded(engine, owner):
    """DeepSpeed's saving with its errors deferred, and with the whole weights written once on every disk."""
    inner, writes_weights = engine.checkpoint_engine, engine.save_non_zero_checkpoint
    engine.checkpoint_engine = writer = _Writer(inner)
    engine.save_non_zero_checkpoint = writes_weights or owner
    engine._copy_recovery_script = lambda folder: None  # zero_to_fp32.py: another write that could fail, and not needed
    try:
        yield writer
    finally:
        engine.checkpoint_engine, engine.save_non_zero_checkpoint = inner, writes_weights
        del engine._copy_recovery_script
