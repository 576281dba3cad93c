"""Checks of checkpoints and exports under DeepSpeed: `python checkpoint_checks.py OUT_DIR`, started once per rank.

Starting DeepSpeed costs more than any check, so one launch runs them all. Every check is a function that raises what went
wrong; rank 0 writes OUT_DIR/outcomes.json: {check: null or the error}.
"""

import json
import os
import random
import resource
import sys
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from fastft.arguments import Arguments
from fastft.checkpoint import TrainState, find_checkpoint, load_checkpoint, loading, save_checkpoint
from fastft.checkpoint.manifest import SMALL
from fastft.engine import backward, build_engine, deepspeed_config, init_ranks, leave
from fastft.export import save_model
from fastft.shards import load_shard

STEPS = 3


def model(seed, dtype, lora, hidden=32):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.1,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    if not lora:
        # not `.to(dtype)`, which would round the rotary frequencies too, and no loaded model has them rounded
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    base = AutoModelForCausalLM.from_pretrained(lora, dtype=dtype, attn_implementation="eager")
    adapter = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM")
    return get_peft_model(base, adapter, autocast_adapter_dtype=False)


def engine(stage, precision, lora, *, seed=0, hidden=32, optim="adamw_torch"):
    """A fresh engine. Its own weights come from `seed`; a base model under LoRA comes from the folder `lora`."""
    args = Arguments(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        zero_stage=stage,
        optim=optim,
        bf16=precision == "bf16",
        learning_rate=1e-2,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=2,
    )
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    config = deepspeed_config(args, dtype, dist.get_world_size())
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 100  # both kinds: sharded, and kept whole
    built, _ = build_engine(model(seed, dtype, lora, hidden), args, config, dtype, total_steps=20)
    built.train()
    return built


def batch(*seed):
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(hash(seed)))
    return {"input_ids": ids, "labels": ids}


def train(engine, first, last):
    losses = []
    for step in range(first, last):
        for micro in range(2):
            loss = engine(**batch(step, micro, dist.get_rank())).loss
            backward(engine, loss / 2)
            engine.step()
            losses.append(loss.item())
    return losses


def evaluate(model):
    model.eval()
    with torch.no_grad():
        loss = model(**batch(12345)).loss.item()
    model.train()
    return loss


def streams():
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


def reseed(seed=7):
    seed += dist.get_rank()
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)


def interrupted(built, folder):
    """Trains, saves, trains on: (checkpoint, losses after it)."""
    reseed()
    train(built, 0, STEPS)
    path = save_checkpoint(built, folder, TrainState(step=STEPS))
    return path, train(built, STEPS, 2 * STEPS)


def resume_and_export(out, stage, precision, lora):
    lora = str(out.parent / "base") if lora else None
    built = engine(stage, precision, lora)
    reseed()
    train(built, 0, STEPS)
    before = streams()
    path = save_checkpoint(built, out / "checkpoints", TrainState(step=STEPS, best_metric=0.5))
    save_model(built, out / "model")
    assert streams() == before, "saving drew random numbers"
    seen = evaluate(built)
    expected = train(built, STEPS, 2 * STEPS)

    fresh = engine(stage, precision, lora, seed=1)
    reseed(99)
    state = load_checkpoint(fresh, find_checkpoint(out / "checkpoints", "auto"))
    assert state == TrainState(step=STEPS, best_metric=0.5, last_checkpoint=state.last_checkpoint), state
    resumed = train(fresh, STEPS, 2 * STEPS)
    assert resumed == expected, f"after resuming: {resumed}, uninterrupted: {expected}"

    load_checkpoint(fresh, path, weights_only=True)
    assert evaluate(fresh) == seen, "going back to saved weights gives other weights"
    if dist.get_rank() == 0:
        auto_class = AutoPeftModelForCausalLM if lora else AutoModelForCausalLM
        loaded = auto_class.from_pretrained(out / "model", dtype="auto", attn_implementation="eager")
        assert next(loaded.parameters()).dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
        assert evaluate(loaded) == seen, f"exported: {evaluate(loaded)}, in training: {seen}"
        size = sum(file.stat().st_size for file in path.rglob("*model_states.pt"))
        assert not lora or size < 2e5, f"the frozen base model is in the checkpoint: {size} bytes"


def broken_restore_is_noticed(out, what):
    """A restore that drops a part must change the losses: otherwise the checks above prove nothing."""
    path, expected = interrupted(engine(2, "bf16", None), out)
    fresh = engine(2, "bf16", None, seed=1)
    reseed(99)
    whole = loading.restore_streams
    if what == "random streams":
        loading.restore_streams = lambda streams: None
    else:
        drop = {"optimizer": "load_optimizer_states", "schedule": "load_lr_scheduler_states"}[what]
        fresh.load_checkpoint = partial(fresh.load_checkpoint, **{drop: False})
    try:
        load_checkpoint(fresh, path)
    finally:
        loading.restore_streams = whole
    assert train(fresh, STEPS, 2 * STEPS) != expected, f"nobody noticed that {what} was not restored"


def refusals(out):
    path = save_checkpoint(engine(0, "fp32", None), out, TrainState(step=1))
    error = "model.embed_tokens.weight is [64, 32] there and [64, 48] in this run"
    refused(engine(0, "fp32", None, hidden=48), path, "of another model: " + error)
    refused(engine(0, "bf16", None), path, "weights in float32 there, bfloat16 in this run")
    plan = {"examples": 9, "lengths": "a", "seed": 1, "examples_per_step": 8}
    built = engine(0, "fp32", None)
    path = save_checkpoint(built, out, TrainState(step=2), data=plan)
    load_checkpoint(built, path, data=plan)
    for change, why in (({"seed": 2}, "--seed 1 there, 2 in"), ({"examples_per_step": 4}, "step 8 there, 4 in")):
        refused(built, path, why, data={**plan, **change})


def other_base_is_refused(out):
    base = str(out.parent / "base")
    path = save_checkpoint(engine(0, "fp32", base), out, TrainState(step=1))
    other = engine(0, "fp32", base)
    with torch.no_grad():
        next(other.module.parameters())[0, 0] += 1
    refused(other, path, "base model with other weights")


def refused(engine, path, why, **options):
    try:
        load_checkpoint(engine, path, **options)
    except ValueError as error:
        assert why in str(error), error
        assert "\n" not in str(error), error
    else:
        raise AssertionError(f"not refused: {why}")


def other_layout(out, precision, lora, stages):
    """From one ZeRO stage to the next: the first loss is the same to 1e-6, the second, after an update, to rounding."""
    lora = str(out.parent / "base") if lora else None
    built = engine(stages[0], precision, lora)
    for step, stage in enumerate(stages[1:], 1):
        built.module.eval()  # no dropout: its masks stay the same, and yet a stage may draw in another order
        train(built, step, step + 1)
        path = save_checkpoint(built, out, TrainState(step=step, tokens=step))
        expected = train(built, step + 1, step + 3)
        built = engine(stage, precision, lora, seed=step)
        built.module.eval()
        state = load_checkpoint(built, path)
        found = train(built, step + 1, step + 3)
        close = np.allclose(found[:2], expected[:2], rtol=1e-6, atol=0)
        close &= np.allclose(found, expected, rtol=1e-5 if precision == "fp32" else 2e-2, atol=0)
        assert close and state.tokens == step, f"stage {stages[step - 1]} to {stage}: {found}, expected {expected}"
    load_checkpoint(built, path)  # converted once more, into an engine that has trained
    assert sorted(path.name for path in out.iterdir())[0] == "latest", list(out.iterdir())


def nothing_moves(out, stage, precision, optim):
    """A NaN on one rank: weights, moments, master weights and schedule are as before, bit for bit."""
    built = engine(stage, precision, None, optim=optim)
    train(built, 0, 2)
    before = contents(save_checkpoint(built, out, TrainState(step=2)))
    for micro in range(2):
        loss = built(**batch(2, micro, dist.get_rank())).loss * (float("nan") if dist.get_rank() == 1 else 1.0)
        backward(built, loss / 2)
        built.step()
    assert not built.was_step_applied()
    after = contents(save_checkpoint(built, out, TrainState(step=3)))
    assert before.keys() == after.keys() and len(before) > 30
    moved = {name.split(".")[-1] for name in before if not same(before[name], after[name])}
    assert moved <= {"skipped_steps", "global_steps", "global_samples", "overflow"}, moved
    train(built, 3, 4)
    moved = contents(save_checkpoint(built, out, TrainState(step=4)))
    assert not all(same(before[name], moved[name]) for name in before), "nothing moves it at all"


def contents(path):
    """{where: value} of everything in DeepSpeed's files."""
    found = {}

    def walk(name, value):
        if isinstance(value, dict):
            for key, part in value.items():
                walk(f"{name}.{key}" if name else str(key), part)
        elif isinstance(value, (list, tuple)):
            for i, part in enumerate(value):
                walk(f"{name}.{i}", part)
        elif isinstance(value, (torch.Tensor, int, float, str)):
            found[name] = value

    for file in sorted((path / "deepspeed").iterdir()):
        content = load_shard(file, "cpu")
        walk("" if "module" in content else file.stem, content)
    dist.barrier()
    return found


def same(left, right):
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def full_disk(out, stage, full_rank):
    """One rank cannot write: all ranks raise, nothing is left of it, and the checkpoint before it is still there."""
    built = engine(stage, "bf16", None)
    train(built, 0, 1)
    first = save_checkpoint(built, out, TrainState(step=1), keep=1)
    train(built, 1, 2)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if dist.get_rank() == full_rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        save_checkpoint(built, out, TrainState(step=2), keep=1)
    except OSError as error:
        assert f"step-000002 was not written (earlier ones are kept): rank {full_rank}: " in str(error), error
    else:
        raise AssertionError("the save did not fail")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    dist.barrier()  # rank 0 has cleaned up
    assert sorted(path.name for path in out.iterdir()) == ["latest", "step-000001"], list(out.iterdir())
    assert find_checkpoint(out, "auto") == first
    second = save_checkpoint(built, out, TrainState(step=2), keep=1)
    dist.barrier()
    assert sorted(path.name for path in out.iterdir()) == ["latest", "step-000002"], list(out.iterdir())
    assert find_checkpoint(out, "auto") == second and (out / "latest").read_text() == "step-000002\n"


def rotation(out):
    """The newest and the best stay. `auto` means written last: a run that went back to an earlier step counts from there."""
    built = engine(0, "fp32", None)
    names = lambda: sorted(path.name for path in out.iterdir() if path.name != "latest")
    for step in range(1, 6):
        state = TrainState(step=step, best_step=min(step, 2))
        save_checkpoint(built, out, state, keep=2)
    assert names() == ["step-000002", "step-000004", "step-000005"], names()
    path = save_checkpoint(built, out, TrainState(step=4, tokens=1, best_step=2), keep=2)
    assert find_checkpoint(out, "auto") == path and names() == ["step-000002", "step-000004", "step-000005"], names()
    path = save_checkpoint(built, out, TrainState(step=3, best_step=2), keep=2)
    assert find_checkpoint(out, "auto") == path and names() == ["step-000002", "step-000003", "step-000004"], names()
    best = load_checkpoint(built, out / "step-000002")
    assert best.best_checkpoint == str(out / "step-000002"), best
    assert load_checkpoint(built, out / "step-000004").tokens == 1


def separate_disks(out, stage):
    """Two nodes without a common disk: each keeps what its ranks need."""
    local_rank, os.environ["LOCAL_RANK"] = os.environ["LOCAL_RANK"], "0"
    disk = out / f"node-{dist.get_rank()}"
    try:
        path, expected = interrupted(engine(stage, "bf16", None), disk)
        fresh = engine(stage, "bf16", None, seed=1)
    finally:
        os.environ["LOCAL_RANK"] = local_rank
    assert (disk / path.name / "state.json").exists(), list(disk.rglob("*"))
    load_checkpoint(fresh, disk / path.name)
    assert train(fresh, STEPS, 2 * STEPS) == expected


def reads_once(out, stage):
    """Finding and loading a checkpoint reads no more than this rank's part of it, and that once."""
    built = engine(stage, "fp32", None, hidden=256)
    train(built, 0, 1)
    path = save_checkpoint(built, out, TrainState(step=1))
    other = f"rank_{1 - dist.get_rank()}_"
    mine = sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and other not in file.name)
    load_checkpoint(built, path)  # what Python imports on the way is read here
    read = lambda: int(Path("/proc/self/io").read_text().split()[1])
    before = read()
    load_checkpoint(built, find_checkpoint(out, "auto"))
    found = read() - before
    small = sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and file.stat().st_size <= SMALL)
    assert mine > 5 * small and mine <= found + small and found <= mine + 2 * small, (mine, found, small)


def failed_export(out):
    """The disk fills while rank 0 writes the model: all ranks raise, and the model that was there still loads."""
    built = engine(3, "bf16", None)
    save_model(built, out)
    files = {path.name: path.read_bytes() for path in out.iterdir()} if dist.get_rank() == 0 else {}
    train(built, 0, 1)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if dist.get_rank() == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        save_model(built, out)
    except OSError as error:
        assert "was not saved" in str(error) and "\n" not in str(error), error
    else:
        raise AssertionError("the save did not fail")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    if dist.get_rank() == 0:
        assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    train(built, 1, 2)  # the engine goes on


CHECKS = {}
for stage in range(4):
    CHECKS[f"stage {stage}"] = partial(resume_and_export, stage=stage, precision="bf16", lora=False)
    CHECKS[f"stage {stage}, LoRA"] = partial(resume_and_export, stage=stage, precision="fp32", lora=True)
for part in ("random streams", "optimizer", "schedule"):
    CHECKS[f"resume without {part}"] = partial(broken_restore_is_noticed, what=part)
for precision, lora, stages in (  # each of the twelve ways from one stage to another once
    ("fp32", False, (1, 3, 2, 0, 1)),
    ("bf16", False, (0, 3, 1, 2)),
    ("fp32", True, (2, 1, 0, 2, 3, 0)),
):
    kind = f"{precision}{', LoRA' if lora else ''}"
    CHECKS[f"other stage, {kind}"] = partial(other_layout, precision=precision, lora=lora, stages=stages)
for stage, precision, optim in ((0, "bf16", "adamw_8bit"), (1, "bf16", "adamw_torch"), (2, "fp32", "adamw_torch"),
                                (3, "bf16", "adamw_8bit"), (0, "fp32", "adamw_torch"), (3, "fp32", "adamw_torch")):  # fmt: skip
    kind = f"NaN, stage {stage}, {precision}, {optim}"
    CHECKS[kind] = partial(nothing_moves, stage=stage, precision=precision, optim=optim)
CHECKS |= {
    "refusals": refusals,
    "another base model": other_base_is_refused,
    "rotation": rotation,
    "disk full on rank 0": partial(full_disk, stage=0, full_rank=0),
    "disk full on rank 1": partial(full_disk, stage=2, full_rank=1),
    "disk full during export": failed_export,
    "reading once, stage 2": partial(reads_once, stage=2),
    "reading once, stage 3": partial(reads_once, stage=3),
    "separate disks, stage 0": partial(separate_disks, stage=0),
    "separate disks, stage 3": partial(separate_disks, stage=3),
}


def main(out):
    torch.set_num_threads(1)
    ranks = init_ranks()
    outcomes = {}
    if ranks.first:
        model(0, torch.float32, None).save_pretrained(out / "base")
    dist.barrier()
    for name, check in CHECKS.items():
        if sys.argv[2:] and name not in sys.argv[2:]:
            continue
        try:
            check(out / name)
            outcome = None
        except Exception:
            outcome = traceback.format_exc(limit=-3)
        gathered = [None] * ranks.world_size
        dist.all_gather_object(gathered, outcome)
        outcomes[name] = next((f"rank {r}: {text}" for r, text in enumerate(gathered) if text), None)
    if ranks.first:
        (out / "outcomes.json").write_text(json.dumps(outcomes))
    dist.barrier()
    leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
