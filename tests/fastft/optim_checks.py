"""8-bit optimizers under DeepSpeed: `python optim_checks.py OUT_DIR`, started once per rank; as checkpoint_checks.py.

Rank 0 writes OUT_DIR/outcomes.json: {check: null or the error}.
"""

import json
import sys
import traceback
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from fastft.arguments import Arguments
from fastft.checkpoint import TrainState, load_checkpoint, save_checkpoint
from fastft.engine import backward, build_engine, deepspeed_config, init_ranks, leave
from fastft.optim import average_over_ranks
from fastft.optim.universal import to_universal

STEPS, CURVES = 3, {}


class Net(torch.nn.Module):
    """An embedding, a norm and two matrices: groups with 8 and with 32 bits of state, decayed and not."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(16, 24)
        self.norm = torch.nn.LayerNorm(24)
        self.body = torch.nn.Linear(24, 50)
        self.head = torch.nn.Linear(50, 16)

    def forward(self, ids, labels):
        logits = self.head(torch.tanh(self.body(self.norm(self.table(ids)))))
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def engine(stage, optim, offload, precision, seed=0, **extra):
    args = Arguments(
        per_device_train_batch_size=2,
        zero_stage=stage,
        offload_optimizer=offload,
        bf16=precision == "bf16",
        optim=optim,
        learning_rate=3e-3 if optim == "lion_8bit" else 1e-2,
        weight_decay=0.1,
    )
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    config = deepspeed_config(args, dtype, dist.get_world_size())
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 100
        config["zero_optimization"]["sub_group_size"] = 700
    config |= extra
    torch.manual_seed(seed)
    built, _ = build_engine(Net().to(dtype), args, config, dtype, total_steps=20)
    built.train()
    return built


def train(engine, first, last):
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        ids = torch.randint(0, 16, (2, 12), generator=generator)
        loss = engine(ids, (ids * 3 + 1) % 16)
        backward(engine, loss)
        engine.step()
        losses.append(loss.item())
    return losses


def settings(engine):
    return [
        {key: group.get(key) for key in ("state_bits", "weight_decay", "code")}
        for group in engine.basic_optimizer.param_groups
    ]


def resume(out, stage, optim, offload="none", precision="bf16"):
    """Resuming is bit for bit, groups keep their settings, and the state has the size it should have."""
    built = engine(stage, optim, offload, precision)
    groups = settings(built)
    assert {group["state_bits"] for group in groups} == {8, 32} and {g["weight_decay"] for g in groups} == {0.1, 0.0}
    train(built, 0, STEPS)
    path = save_checkpoint(built, out / "checkpoints", TrainState(step=STEPS))
    expected = train(built, STEPS, 3 * STEPS)
    fresh = engine(stage, optim, offload, precision, seed=1)
    load_checkpoint(fresh, path)
    assert settings(fresh) == groups, settings(fresh)
    states = [state for state in fresh.basic_optimizer.state.values() if state]
    assert any("exp_avg_codes" in state for state in states)
    for state in states:
        assert type(state["step"]) is int and state["step"] == STEPS
        assert all(
            v.dtype == (torch.uint8 if k.endswith("_codes") else torch.float32) for k, v in state.items() if k != "step"
        )
    resumed = train(fresh, STEPS, 3 * STEPS)
    assert resumed == expected, f"after resuming: {resumed}, uninterrupted: {expected}"
    assert expected[-1] < expected[0]
    CURVES[optim, precision, stage, offload] = expected


def stages_agree(out):
    """Bit for bit where the same arithmetic runs elsewhere; closely where gradients are clipped or blocks fall otherwise."""
    curve = lambda stage, offload="none": torch.tensor(CURVES["adamw_8bit", "bf16", stage, offload])
    assert torch.equal(curve(1, "cpu"), curve(2, "cpu"))
    for other in (curve(1), curve(2, "cpu")):
        torch.testing.assert_close(other, curve(2), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(curve(3), curve(3, "cpu"), rtol=1e-3, atol=1e-3)
    for stage in (0, 3):
        torch.testing.assert_close(curve(stage), curve(1), rtol=0.05, atol=0.02)


def close_to_float32(out):
    plain = engine(2, "adamw_torch", "none", "bf16")
    train(plain, 0, STEPS)
    ours = torch.tensor(CURVES["adamw_8bit", "bf16", 2, "none"])
    torch.testing.assert_close(ours, torch.tensor(train(plain, STEPS, 3 * STEPS)), rtol=0.05, atol=0.02)


def universal(out, stage, optim):
    """A universal checkpoint gives the same weights and, on as many ranks, the same losses bit for bit."""
    built = engine(stage, optim, "none", "bf16")
    train(built, 0, STEPS)
    path = save_checkpoint(built, out, TrainState(step=STEPS))
    seen = weights(built)
    expected = train(built, STEPS, 2 * STEPS)
    if dist.get_rank() == 0:
        to_universal(path / "deepspeed", out / "universal")
        (out / "seen.json").write_text(json.dumps(seen))
    dist.barrier()
    assert reload(out, stage, optim) == (seen, expected)


def reload(out, stage, optim):
    fresh = engine(stage, optim, "none", "bf16", seed=1, checkpoint={"load_universal": True})
    groups = settings(fresh)
    fresh.load_checkpoint(str(out), tag="universal")
    fresh.basic_optimizer.restore_groups()
    assert settings(fresh) == groups, f"{settings(fresh)}, before: {groups}"
    return weights(fresh), train(fresh, STEPS, 2 * STEPS)


def weights(engine):
    """{name: all elements} of the model, whole on every rank."""
    named = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: p.detach().float().flatten().tolist() for name, p in named.items()}


def on_another_number_of_ranks(out, stage, optim):
    seen, losses = reload(out, stage, optim)
    before = json.loads((out / "seen.json").read_text())
    assert seen == before, [name for name in seen if seen[name] != before[name]]
    assert losses[-1] < losses[0], losses


def row_gradients(out):
    """Rows on every rank, on one of them, none anywhere, and rows beside a dense gradient: always the mean."""
    rank, generator = dist.get_rank(), torch.Generator().manual_seed(0)
    dense = torch.randn(2, 16, 24, generator=generator)
    dense[:, 5:] = 0
    sparse = [part.to_sparse(1) for part in dense]
    none = torch.sparse_coo_tensor(torch.empty(1, 0, dtype=torch.int64), torch.empty(0, 24), (16, 24))
    for name, given, whole in (
        ("all", sparse, dense.mean(0)),
        ("one", [sparse[0], None], dense[0] / 2),
        ("no row", [none, none], 0 * dense[0]),
        ("beside dense", [sparse[0], dense[1]], dense.mean(0)),
        ("before nothing", [dense[0], none], dense[0] / 2),
    ):
        p = torch.nn.Parameter(torch.zeros(16, 24))
        averaged = average_over_ranks({p: given[rank]})[p]
        torch.testing.assert_close(averaged.to_dense(), whole, msg=name)


def other_optimizer_is_refused(out):
    path = save_checkpoint(engine(1, "adamw_torch", "none", "fp32"), out, TrainState(step=1))
    try:
        load_checkpoint(engine(1, "adamw_8bit", "none", "fp32"), path)
    except ValueError as error:
        assert "optimizer AdamW there, AdamW8bit in this run" in str(error), error
    else:
        raise AssertionError("not refused")


CHECKS = {}
for stage in range(4):
    for offload in ("none", "cpu") if stage else ("none",):
        CHECKS[f"adamw_8bit, stage {stage}, offload {offload}"] = partial(
            resume, stage=stage, optim="adamw_8bit", offload=offload
        )
CHECKS |= {
    "adamw_8bit, stage 0, fp32": partial(resume, stage=0, optim="adamw_8bit", precision="fp32"),
    "adamw_8bit, stage 2, fp32": partial(resume, stage=2, optim="adamw_8bit", precision="fp32"),
    "lion_8bit, stage 0": partial(resume, stage=0, optim="lion_8bit"),
    "lion_8bit, stage 3": partial(resume, stage=3, optim="lion_8bit"),
    "stages agree": stages_agree,
    "close to float32": close_to_float32,
    **{
        f"universal, {optim}, stage {stage}": partial(universal, stage=stage, optim=optim)
        for optim in ("adamw_8bit", "adamw_torch")
        for stage in (1, 2, 3)
    },
    "universal, lion_8bit, stage 1": partial(universal, stage=1, optim="lion_8bit"),
    "row gradients": row_gradients,
    "another optimizer": other_optimizer_is_refused,
}


RELOADED = {
    name: partial(on_another_number_of_ranks, **check.keywords)
    for name, check in CHECKS.items()
    if name.startswith("universal")
}


def main(out):
    torch.set_num_threads(1)
    ranks = init_ranks()
    outcomes = {}
    for name, check in (CHECKS if ranks.world_size == 2 else RELOADED).items():
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
