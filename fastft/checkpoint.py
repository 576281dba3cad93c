"""Checkpoints: all that a run needs to go on as if it had never stopped, written so that a broken one is never used.

A checkpoint is a folder `step-000123`:

    manifest.json          size and SHA-256 of every other file, agreed by all ranks; without it a folder is no checkpoint
    state.json             step and counters (TrainState), and what a run must share to resume: dtype, optimizer, shapes
    rank-00000.safetensors the random streams of each rank: Python, NumPy, torch, and each CUDA device
    deepspeed/             weights, optimizer and schedule, as DeepSpeed shards them

All is written under a hidden name, flushed to the disk and renamed once every rank is done; the file `latest` beside it
names the one written last. Reading trusts nothing: DeepSpeed's shards are pickles, of which only tensors, plain values
and a few named classes of DeepSpeed are ever built (`torch.load(weights_only=True)`), so no code of a checkpoint runs.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from fastft import universal
from fastft.durable import (
    fault,
    file_sha256,
    rank,
    share,
    sync,
    tell,
    together,
    write_hashed,
    write_json,
    write_text,
)
from fastft.nn.linear4bit import without_state
from fastft.shards import load_shard

FORMAT = 2
SHARDS = "deepspeed"
MANIFEST = "manifest.json"
SMALL = 2**20  # bytes: files up to this size are hashed whenever a checkpoint is looked at


@dataclass
class TrainState:
    """Where a run stands, beyond weights, optimizer and schedule. Plain values, the same on every rank."""

    step: int = 0  # optimizer steps done
    best_metric: float | None = None
    best_step: int | None = None
    best_checkpoint: str | None = None  # folder of best_step; set by save_checkpoint, which never rotates it out
    last_checkpoint: str | None = None  # folder; set by save_checkpoint and load_checkpoint
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


def save_checkpoint(engine, checkpoints_dir, state, *, keep=None, data=None):
    """Writes the checkpoint of `state.step` and returns its folder. Every rank calls it, between two optimizer steps.

    keep: how many good checkpoints stay, the newest ones; the best one (`state.best_step`) stays too. None keeps all.
    data: `StepPlan.identity()`, which a run must share to resume.
    Ranks that share no disk each keep their own part under the same path.

    Raises OSError (a full disk) or RuntimeError on all ranks if any of them failed; older checkpoints are as before.
    """
    folder = step_folder(checkpoints_dir, state.step)
    failed = f"checkpoint {folder} was not written (earlier ones are kept)"
    temporary = folder.with_name(f".{folder.name}.{share(uuid.uuid4().hex)[0]}")
    best = str(folder) if state.best_step == state.step else state.best_checkpoint
    owner = False
    try:
        with together(failed):
            owner = rank() == 0 and _create(temporary)
        with together(failed):
            # finds rank 0's folder on a shared disk; on a disk of its own a node makes one
            owner = owner or (engine.local_rank == 0 and _create(temporary))
        fault("before_shard")
        with together(failed):
            written = _write_shards(engine, temporary, owner)
            fault("after_shard")
        everything = {name: entry for part in share(written) for name, entry in part.items()}
        fault("before_manifest")
        with together(failed):
            if owner:
                content = {
                    **_facts(engine),
                    "data": data,
                    "state": {**dataclasses.asdict(state), "best_checkpoint": best},
                }
                serial = 1 + max((_serial(old, unreadable=0) for old in _steps(folder.parent)), default=0)
                _write_manifest(temporary, everything, content, serial)
            fault("before_rename")
            if owner:
                _publish(temporary, folder)
    except BaseException:
        if owner:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    state.best_checkpoint, state.last_checkpoint = best, str(folder)
    fault("before_latest")
    with together(f"checkpoint {folder} is written, but older ones could not be removed"):
        if owner:
            write_text(folder.parent / "latest", f"{folder.name}\n")
            _rotate(folder, keep, state.best_step)
    return folder


def find_checkpoint(checkpoints_dir, request, *, verify="sizes"):
    """The folder to resume from. request: a checkpoint folder, `auto` for the newest good one, or None.

    verify: `sizes` looks at the size of every file and the hash of small ones, `full` at the hash of all. `auto` names
    each broken checkpoint on standard error and goes on to the one before it. Every rank calls it: rank 0's disk
    decides what is newest, and a checkpoint is good if it is so on the disks of all ranks.

    Returns None for None, and for `auto` where there is no good checkpoint. Raises ValueError if the folder asked for
    is not a good one.
    """
    if request is None:
        return None
    if request != "auto":
        problem = _agreed_problem(Path(request), verify)
        if problem is not None:
            raise ValueError(f"--resume_from_checkpoint {request}: {problem}")
        return Path(request)
    newest_first = share(sorted(_steps(checkpoints_dir), key=_serial, reverse=True))[0]
    for folder in newest_first:
        problem = _agreed_problem(folder, verify)
        if problem is None:
            return folder
        tell(f"checkpoint {folder} cannot be used and is skipped: {problem}")
    if newest_first:
        tell(f"no good checkpoint in {checkpoints_dir}: the run starts from the beginning")
    return None


def load_checkpoint(engine, path, *, data=None, weights_only=False):
    """Puts engine, schedule and random streams back to where `save_checkpoint` found them and returns the TrainState.

    data: `StepPlan.identity()` of the run, to be sure that its steps meet the examples that come next.
    weights_only: to go back to the best weights: the random streams stay as they are. (The optimizer's state comes
    along, because ZeRO keeps the weights there.)

    Another number of ranks or another ZeRO stage is converted on the way; ranks that are new get streams of their own.
    Raises ValueError, the same on all ranks, where model, dtype, optimizer or data are not the same.
    """
    path = Path(path)
    run = _facts(engine)
    with together(f"checkpoint {path} cannot be read"):
        content = _read(path)
        _check_same(path, content, run)
        if not weights_only:
            _check_data(path, content["data"], data)
        converts = (content["world_size"], content["zero_stage"]) != (run["world_size"], run["zero_stage"])
        streams, frozen = _load_rank(path, rank(), content["world_size"])
    if frozen is not None:
        _check_frozen(engine, path, content, converts)
    fault("during_load")
    if converts:
        _check_convertible(path, content, run)
        nonce = share(uuid.uuid4().hex)[0]
        temporary = path.with_name(f".{path.name}.{nonce}")
        universal.load_converted(
            engine,
            path / SHARDS,
            temporary,
            saved_stage=content["zero_stage"],
            order=content["order"],
        )
    else:
        with _deepspeed_io(engine):
            loaded, _ = engine.load_checkpoint(str(path), tag=SHARDS, load_module_strict=frozen is None)
        if loaded is None:
            raise OSError(f"checkpoint {path}: DeepSpeed found no shards in {path / SHARDS}")
    if not weights_only:
        _restore_streams(streams)  # last, so that nothing draws from them before the next step does
    state = TrainState(**{**content["state"], "last_checkpoint": str(path)})
    if state.best_checkpoint is not None:  # beside this one, also where the run's folder was moved
        state.best_checkpoint = str(path.parent / Path(state.best_checkpoint).name)
    return state


def keep_step_size(args, checkpoint, world_size):
    """The arguments, with as many accumulation steps as keep the examples of a step where the number of ranks changed.

    So the data position, a number of steps, stays where it was. Every rank calls it; ValueError where no number does.
    """
    with together("--resume_from_checkpoint"):
        content = {} if checkpoint is None else _read(checkpoint)
        if content.get("world_size", world_size) == world_size or content["data"] is None:
            return args
        step, micro = content["data"]["examples_per_step"], args.per_device_train_batch_size * world_size
        if step % micro:
            raise ValueError(
                f"checkpoint {checkpoint}: a step there has {step} examples, which {world_size} ranks cannot make of "
                f"--per_device_train_batch_size {args.per_device_train_batch_size}; choose one that divides it"
            )
        return dataclasses.replace(args, gradient_accumulation_steps=step // micro)


# What a checkpoint must share with the run that resumes from it


def _facts(engine):
    module = engine.module
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters()})
    shapes = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    names = {p: name for name, p in module.named_parameters()}
    return {
        "world_size": engine.world_size,
        "zero_stage": engine.zero_optimization_stage(),
        "dtype": "+".join(dtypes),
        "optimizer": type(engine.basic_optimizer).__name__.removeprefix("Replicated"),  # stage 0's of the same name
        "parameters": {name: f"{shape} frozen" if name in frozen else f"{shape}" for name, shape in shapes.items()},
        "frozen_elsewhere": _frozen_come_from_elsewhere(module),
        "order": [names[p] for group in engine.basic_optimizer.param_groups for p in group["params"] if p in names],
    }


def _check_same(path, saved, run):
    theirs, ours = saved["parameters"], run["parameters"]
    for name in [*ours, *theirs]:
        if theirs.get(name) != ours.get(name):
            raise ValueError(
                f"checkpoint {path}: of another model: {name} is {theirs.get(name, 'absent')} there "
                f"and {ours.get(name, 'absent')} in this run"
            )
    advice = {
        "dtype": ("weights in", "resume with the same --bf16 and --fp16"),
        "optimizer": ("optimizer", "resume with the same --optim"),
    }
    for fact, (name, remedy) in advice.items():
        if saved[fact] != run[fact]:
            raise ValueError(f"checkpoint {path}: {name} {saved[fact]} there, {run[fact]} in this run; {remedy}")


def _check_data(path, saved, run):
    names = {
        "examples_per_step": "examples in a step",
        "examples": "training examples",
        "lengths": "training data, or a --max_length, of digest",
        "seed": "--seed",
    }
    for fact, name in names.items() if saved and run else ():
        if saved[fact] != run[fact]:
            raise ValueError(
                f"checkpoint {path}: {name} {saved[fact]} there, {run[fact]} in this run; "
                "its place in the data would be lost: resume with the same, or start anew in another --output_dir"
            )


def _check_convertible(path, saved, run):
    """What the universal conversion cannot carry over. Every rank calls it."""
    was = f"{saved['world_size']} ranks at ZeRO stage {saved['zero_stage']}"
    with together("checkpoint"):
        missing = [r for r in range(saved["world_size"]) if not _rank_file(path, r).exists()]
        if missing:
            raise ValueError(
                f"checkpoint {path}: was written by {was}, and the part of rank {missing[0]} is not on this disk: "
                "resume with the same, or copy all parts to one disk"
            )
        if any("frozen" in shape for shape in run["parameters"].values()) and not run["frozen_elsewhere"]:
            raise ValueError(f"checkpoint {path}: was written by {was}; with frozen weights only the same can resume")


def _check_frozen(engine, path, saved, converts):
    """ValueError where an adapter's base has other weights than when it was saved. At stage 3 ranks hold parts of it."""
    total = lambda values, stage: sum(values) if stage == 3 else values[0]
    now = share(_frozen_checksum(engine.module))
    with together("checkpoint"):
        ranks = range(saved["world_size"]) if converts else [rank()]
        before = [_load_rank(path, r, saved["world_size"])[1] for r in ranks]
        same = before == [now[rank()]]
        if converts:
            same = total(before, saved["zero_stage"]) == total(now, engine.zero_optimization_stage())
        if not same:
            raise ValueError(f"checkpoint {path}: its adapter was trained on a base model with other weights")


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


def _rank_state(engine):
    """This rank's file as bytes."""
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
    return save(tensors, metadata={"json": json.dumps(rest)})


def _load_rank(folder, wanted, world_size):
    """(streams, checksum of the frozen weights). A rank that the checkpoint does not know gets a new stream."""
    path = _rank_file(folder, wanted % world_size)
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


def _rank_file(folder, number=None):
    return Path(folder) / f"rank-{rank() if number is None else number:05d}.safetensors"


# Files and folders


def _write_shards(engine, folder, owner):
    """Writes this rank's files and returns {name within the checkpoint: {"bytes", "sha256", "rank", "disk"}}."""
    disk = folder / ".disk"  # tells the ranks that share a disk from the others
    if owner:
        disk.write_text(str(rank()))
    alone = _frozen_come_from_elsewhere(engine.module)
    with _deepspeed_io(engine, owner) as shards, without_state() if alone else contextlib.nullcontext():
        engine.save_checkpoint(
            str(folder),
            tag=SHARDS,
            save_latest=False,
            exclude_frozen_parameters=alone,
        )
    if shards.error is not None:
        raise shards.error
    path = _rank_file(folder)
    written = {path: write_hashed(path, lambda file: file.write(_rank_state(engine))), **shards.written}
    place = {"rank": rank(), "disk": int(disk.read_text())}
    return {Path(path).relative_to(folder).as_posix(): {**entry, **place} for path, entry in written.items()}


def _write_manifest(folder, everything, content, serial):
    """Adds state.json and the manifest: what is on this disk, under a digest of what is on all of them."""
    (folder / ".disk").unlink()
    if (folder / SHARDS).is_dir():
        sync(folder / SHARDS)
    entry = write_hashed(folder / "state.json", lambda file: file.write(json.dumps(content, indent=2).encode()))
    here = {name: e for name, e in everything.items() if e["disk"] == rank()}
    manifest = {
        "format": FORMAT,
        "serial": serial,
        "world_size": content["world_size"],
        "all_disks": _digest({name: e["sha256"] for name, e in everything.items()}),
        "files": {
            "state.json": entry,
            **{name: {"bytes": e["bytes"], "sha256": e["sha256"]} for name, e in here.items()},
        },
    }
    write_json(folder / MANIFEST, {**manifest, "sha256": _digest(manifest)})


def _digest(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder):
    """The manifest of a checkpoint; ValueError where there is none, or not the one that was written."""
    try:
        text = (Path(folder) / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        whole = text.endswith("}\n") and manifest.pop("sha256") == _digest(manifest)
    except FileNotFoundError:
        raise ValueError(f"no complete checkpoint, {MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{MANIFEST} is damaged")
    if manifest["format"] != FORMAT:
        raise ValueError(f"has format {manifest['format']}; this version of fastft reads format {FORMAT}")
    return manifest


def _agreed_problem(folder, verify):
    """Why a checkpoint cannot be used, on whichever disk, or None. The same on all ranks."""
    found = share(_problem(Path(folder), verify))
    for r, (problem, _) in enumerate(found):
        if problem is not None:
            return problem if r == 0 else f"{problem} (rank {r})"
    if len({digest for _, digest in found}) > 1:
        return "the disks of the ranks hold parts of different checkpoints"
    return None


def _problem(folder, verify):
    """(why this disk's part cannot be used or None, digest of all disks' parts)."""
    try:
        if not folder.is_dir():
            raise ValueError("no such folder")
        manifest = _read_manifest(folder)
        local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_SIZE", 1))
        for i, (name, entry) in enumerate(sorted(manifest["files"].items())):
            path, mine = folder / name, i % local_size == local_rank or local_size == 1
            if not path.is_file():
                raise ValueError(f"{name} is missing")
            if path.stat().st_size != entry["bytes"]:
                raise ValueError(f"{name} has {path.stat().st_size} bytes, {entry['bytes']} were written")
            if (entry["bytes"] <= SMALL or (verify == "full" and mine)) and file_sha256(path) != entry["sha256"]:
                raise ValueError(f"{name} is damaged: its SHA-256 is another than when it was written")
    except (ValueError, OSError) as error:
        return str(error), None
    return None, manifest["all_disks"]


def _create(folder):
    """Makes a folder; False where it exists already."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def _steps(checkpoints_dir):
    return [path for path in Path(checkpoints_dir).glob("step-*") if path.is_dir()]


def _serial(folder, unreadable=math.inf):
    """Its place in the order of writing. What cannot be read counts as newest: it is looked at first, and named."""
    try:
        return _read_manifest(folder)["serial"]
    except ValueError:
        return unreadable


def _read(folder):
    return json.loads((Path(folder) / "state.json").read_text(encoding="utf-8"))


def _publish(temporary, folder):
    """Gives a finished folder its name. One that a rewound run wrote at the same step makes way."""
    if folder.exists():
        os.replace(folder, temporary.with_name(f"{temporary.name}.old"))
    os.replace(temporary, folder)
    sync(folder.parent)


def _rotate(newest, keep, best_step):
    """Removes what interrupted saves left, and all but the `keep` newest good checkpoints; never the best one."""
    for leftover in newest.parent.glob(".step-*"):
        shutil.rmtree(leftover)
    if keep is None:
        return
    good = sorted((f for f in _steps(newest.parent) if _problem(f, "sizes")[0] is None), key=_serial)
    kept = {newest, *good[-keep:], *([] if best_step is None else [step_folder(newest.parent, best_step)])}
    for old in set(_steps(newest.parent)) - kept:
        hidden = old.with_name(f".{old.name}.old")  # renamed first: half of a folder must not bear a checkpoint's name
        os.replace(old, hidden)
        fault("during_rotation")
        shutil.rmtree(hidden)


# DeepSpeed's reading and writing


class _ShardIO:
    """In place of DeepSpeed's checkpoint engine: writes are hashed and reach the disk, and reads execute nothing.

    An error while writing waits in `.error`: raised at once, it would leave the other ranks in DeepSpeed's barriers.
    """

    def __init__(self, inner):
        self.inner, self.error, self.written = inner, None, {}

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def save(self, state_dict, path):
        try:
            self.written[path] = write_hashed(path, lambda file: torch.save(state_dict, file))
        except Exception as error:
            free = shutil.disk_usage(Path(path).parent).free
            self.error = OSError(f"{path} could not be written, {free / 1e6:,.0f} MB are free there: {error}")

    def load(self, path, map_location=None):
        return load_shard(path, map_location)


@contextlib.contextmanager
def _deepspeed_io(engine, owner=False):
    """DeepSpeed's saving and loading through `_ShardIO`; owner: whether this rank writes what is the same on all."""
    inner, writes_weights = engine.checkpoint_engine, engine.save_non_zero_checkpoint
    engine.checkpoint_engine = shards = _ShardIO(inner)
    engine.save_non_zero_checkpoint = writes_weights or owner
    engine._copy_recovery_script = lambda folder: None  # zero_to_fp32.py: another write that could fail, and not needed
    try:
        yield shards
    finally:
        engine.checkpoint_engine, engine.save_non_zero_checkpoint = inner, writes_weights
        del engine._copy_recovery_script
