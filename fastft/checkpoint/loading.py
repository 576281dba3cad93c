"""Finding a good checkpoint, and going on from it."""

import dataclasses
import json
import uuid
from pathlib import Path

from fastft import universal
from fastft.checkpoint import identity
from fastft.checkpoint.engine_io import engine_io
from fastft.checkpoint.folders import serial, steps
from fastft.checkpoint.manifest import SHARDS, agreed_problem
from fastft.checkpoint.state import TrainState
from fastft.checkpoint.streams import load_rank, restore_streams
from fastft.durable import fault, rank, share, tell, together


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
        problem = agreed_problem(Path(request), verify)
        if problem is not None:
            raise ValueError(f"--resume_from_checkpoint {request}: {problem}")
        return Path(request)
    newest_first = share(sorted(steps(checkpoints_dir), key=serial, reverse=True))[0]
    for folder in newest_first:
        problem = agreed_problem(folder, verify)
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
    run = identity.facts(engine)
    with together(f"checkpoint {path} cannot be read"):
        content = _read(path)
        identity.check_same(path, content, run)
        if not weights_only:
            identity.check_data(path, content["data"], data)
        converts = (content["world_size"], content["zero_stage"]) != (run["world_size"], run["zero_stage"])
        streams, frozen = load_rank(path, rank(), content["world_size"])
    if frozen is not None:
        identity.check_frozen(engine, path, content, converts)
    fault("during_load")
    if converts:
        identity.check_convertible(path, content, run)
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
        with engine_io(engine):
            loaded, _ = engine.load_checkpoint(str(path), tag=SHARDS, load_module_strict=frozen is None)
        if loaded is None:
            raise OSError(f"checkpoint {path}: DeepSpeed found no shards in {path / SHARDS}")
    if not weights_only:
        restore_streams(streams)  # last, so that nothing draws from them before the next step does
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


def _read(folder):
    return json.loads((Path(folder) / "state.json").read_text(encoding="utf-8"))
