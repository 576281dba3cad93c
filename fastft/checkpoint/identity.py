"""What a checkpoint must share with the run that resumes from it: ranks, stage, dtype, optimizer, shapes, data."""

import weakref

import torch

from fastft.checkpoint.streams import load_rank, rank_file
from fastft.durable import rank, share, together


def facts(engine):
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
        "frozen_elsewhere": frozen_come_from_elsewhere(module),
        "order": [names[p] for group in engine.basic_optimizer.param_groups for p in group["params"] if p in names],
    }


def check_same(path, saved, run):
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


def check_data(path, saved, run):
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


def check_convertible(path, saved, run):
    """What the universal conversion cannot carry over. Every rank calls it."""
    was = f"{saved['world_size']} ranks at ZeRO stage {saved['zero_stage']}"
    with together("checkpoint"):
        missing = [r for r in range(saved["world_size"]) if not rank_file(path, r).exists()]
        if missing:
            raise ValueError(
                f"checkpoint {path}: was written by {was}, and the part of rank {missing[0]} is not on this disk: "
                "resume with the same, or copy all parts to one disk"
            )
        if any("frozen" in shape for shape in run["parameters"].values()) and not run["frozen_elsewhere"]:
            raise ValueError(f"checkpoint {path}: was written by {was}; with frozen weights only the same can resume")


def check_frozen(engine, path, saved, converts):
    """ValueError where an adapter's base has other weights than when it was saved. At stage 3 ranks hold parts of it."""
    total = lambda values, stage: sum(values) if stage == 3 else values[0]
    now = share(frozen_checksum(engine.module))
    with together("checkpoint"):
        ranks = range(saved["world_size"]) if converts else [rank()]
        before = [load_rank(path, r, saved["world_size"])[1] for r in ranks]
        same = before == [now[rank()]]
        if converts:
            same = total(before, saved["zero_stage"]) == total(now, engine.zero_optimization_stage())
        if not same:
            raise ValueError(f"checkpoint {path}: its adapter was trained on a base model with other weights")


def frozen_come_from_elsewhere(module):
    """Whether the frozen weights can be left out: those under an adapter whose base model has a name to load it by."""
    configs = getattr(module, "peft_config", {})
    return bool(configs) and all(config.base_model_name_or_path for config in configs.values())


_checksums = weakref.WeakKeyDictionary()  # {model: what it was when it was first saved}


def frozen_checksum_at_first(module):
    """`frozen_checksum`, computed at the first save only: a save must not read all of the base model."""
    if module not in _checksums:
        _checksums[module] = frozen_checksum(module)
    return _checksums[module]


@torch.no_grad()
def frozen_checksum(module):
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
