"""Loading a checkpoint into another number of ranks or another ZeRO stage.

DeepSpeed's universal format holds three whole tensors for each parameter, `zero/<name>/{fp32,exp_avg,exp_avg_sq}.pt`, which
any number of ranks and stages 1 to 3 can read. Its converter makes them from stages 1 to 3; stage 0, where every rank
holds all of the optimizer's state, is converted here, in both directions.
"""

import contextlib
import io
import shutil

import torch

from fastft.durable import rank, together
from fastft.optim.universal import to_universal, widen_state
from fastft.shards import executing_nothing, load_shard

MOMENTS = ("exp_avg", "exp_avg_sq")
REPLICATED = "mp_rank_00_model_states.pt"


@torch.no_grad()
def load_converted(engine, shards, folder, *, saved_stage, order):
    """Puts weights, optimizer and schedule of another layout into `engine`. Every rank calls it.

    shards: the folder with DeepSpeed's files, all of them on a disk that every rank sees. folder: where the converted
    ones may lie meanwhile. order: names of the parameters as the
    optimizer of a stage 0 run numbered them.

    Raises ValueError where the optimizer's moments cannot be carried over exactly: 8-bit ones under the dynamic code map.
    """
    hyperparameters = [{k: v for k, v in g.items() if k != "params"} for g in engine.basic_optimizer.param_groups]
    with executing_nothing(), contextlib.redirect_stdout(io.StringIO()):
        try:
            with together(f"{shards} could not be converted"):
                if rank() == 0:
                    _convert(shards, folder, saved_stage, order)
            if engine.zero_optimization_stage() == 0:
                with together(f"{shards} could not be loaded"):
                    _load_replicated(engine, folder)
            else:
                with _universal(engine):
                    engine.load_checkpoint(str(folder.parent), tag=folder.name)
        finally:
            with together(f"{folder} could not be removed"):
                if rank() == 0:
                    shutil.rmtree(folder, ignore_errors=True)
    # stage 3 copies those of the first group to all; the learning rate is the schedule's
    rates = engine.lr_scheduler.get_last_lr()
    for state in engine.basic_optimizer.state.values():
        state["step"] = int(state["step"])  # stage 3 gives one tensor to all
    for group, kept, rate in zip(engine.basic_optimizer.param_groups, hyperparameters, rates, strict=True):
        group.update({**kept, "lr": rate})


def _convert(shards, folder, saved_stage, order):
    if saved_stage == 0:
        content = load_shard(shards / REPLICATED, "cpu")
        optimizer, module = content.pop("optimizer"), content.pop("module")
        common, step = {}, 0
        codes = {i: group.get("code") for group in optimizer["param_groups"] for i in group["params"]}
        for i, name in enumerate(order):
            state = optimizer["state"].get(i, {})
            weight = state.get("master", module[name]).float()
            state = widen_state(state, weight.numel(), codes[i])
            moments = {key: state.get(key, torch.zeros_like(weight)).view(weight.shape) for key in MOMENTS}
            _write(folder, name, {"fp32": weight, **moments})
            step = max(step, int(state.get("step", 0)))
    else:
        to_universal(shards, folder)
        (folder.parent / "latest_universal").unlink()
        common = load_shard(folder / "zero" / "optimizer_state.pt", "cpu")
        step = int(next(_steps(folder, common)))
        content = load_shard(sorted(folder.glob("*model_states.pt"))[0], "cpu")
        content.pop("module")
        optimizer = {"param_groups": common["param_groups"]}
    step = torch.tensor(float(step))
    # each stage's reader finds its own layout of the same things
    nested = {"state": {0: {"step": step.clone()}}, "param_groups": optimizer["param_groups"]}
    common |= {
        "ds_version": content["ds_version"],
        "param_groups": optimizer["param_groups"],
        "optimizer_state_dict": nested,
    }
    torch.save(common, folder / "zero" / "optimizer_state.pt")
    for file in (folder / "zero").rglob("exp_avg.pt"):  # tied and frozen weights have none
        tensors = {key: _tensor(load_shard(file.with_name(f"{key}.pt"), "cpu")) for key in ("fp32", *MOMENTS)}
        _write(folder, file.parent.name, tensors)
        torch.save(step.clone(), file.with_name("step.pt"))
    for name in (REPLICATED, "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        torch.save({**content, "module": {}}, folder / name)


def _write(folder, name, tensors):
    path = folder / "zero" / name
    path.mkdir(parents=True, exist_ok=True)
    for key, tensor in tensors.items():
        torch.save({"param": tensor.clone()}, path / f"{key}.pt")


def _steps(folder, common):
    for file in (folder / "zero").rglob("step.pt"):  # stages 1 and 2
        yield torch.as_tensor(load_shard(file, "cpu"))
    for state in common["optimizer_state_dict"]["state"].values():  # stage 3
        yield torch.as_tensor(state["step"])


def _tensor(saved):
    return saved["param"] if isinstance(saved, dict) else saved


def _load_replicated(engine, folder):
    optimizer, names = engine.basic_optimizer, {p: name for name, p in engine.module.named_parameters()}
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        path = folder / "zero" / names[p]
        fp32, *moments = (load_shard(path / f"{key}.pt", p.device)["param"].view(p.shape) for key in ("fp32", *MOMENTS))
        p.copy_(fp32)
        state = {"step": int(load_shard(path / "step.pt", "cpu")), **dict(zip(MOMENTS, moments, strict=True))}
        optimizer.state[p] = state if p.dtype == torch.float32 else {**state, "master": fp32}
    content = load_shard(folder / REPLICATED, "cpu")
    engine.lr_scheduler.load_state_dict(content["lr_scheduler"])
    engine.global_steps, engine.global_samples = content["global_steps"], content["global_samples"]
    engine.skipped_steps = content["skipped_steps"]


@contextlib.contextmanager
def _universal(engine):
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False
