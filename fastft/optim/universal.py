"""From DeepSpeed's shards of a run to its universal checkpoint, which any number of ranks and any ZeRO stage can load.

DeepSpeed's converter knows float32 `exp_avg` and `exp_avg_sq` only: 8-bit moments are widened on their way into it, and
quantised again, to the same codes where the blocks fall alike, at the first step after loading.
"""

import argparse
import contextlib
import io
import os
import shutil
import tempfile
from pathlib import Path

import torch

from fastft.ops import adamw as ops
from fastft.shards import executing_nothing, load_shard


def to_universal(shards, universal):
    """Writes the universal checkpoint of DeepSpeed's shards (`step-000100/deepspeed`), for ZeRO stages 1 to 3.

    Nothing of the shards is executed, though they are pickles. Raises ValueError where there is nothing to convert, or
    where a universal checkpoint cannot be exact.
    """
    shards, universal = Path(shards), Path(universal)
    files = sorted(shards.glob("*_optim_states.pt"))
    if not files:
        raise ValueError(
            f"{shards}: holds no optimizer shards (*_optim_states.pt); give the folder `deepspeed` of a checkpoint"
        )
    if universal.exists():
        raise ValueError(f"{universal}: exists already")
    from deepspeed.checkpoint import ds_to_universal

    with tempfile.TemporaryDirectory(dir=universal.parent, prefix=f".{universal.name}.") as folder:
        for file in shards.iterdir():
            if file in files:
                torch.save(_widened(load_shard(file, "cpu")), Path(folder) / file.name)
            else:
                os.symlink(file.resolve(), Path(folder) / file.name)
        arguments = argparse.Namespace(
            input_folder=folder,
            output_folder=str(universal),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        try:
            with executing_nothing(), contextlib.redirect_stdout(io.StringIO()):
                ds_to_universal.main(arguments)
        except BaseException:
            shutil.rmtree(universal, ignore_errors=True)
            raise


def widen_state(state, numel, code):
    """The state of one tensor with float32 moments instead of codes; Lion gets a second moment of zeros for the converter."""
    state = dict(state)
    for name in ("exp_avg", "exp_avg_sq"):
        if f"{name}_codes" in state:
            codes, absmax = state.pop(f"{name}_codes"), state.pop(f"{name}_absmax")
            state[name] = ops.dequantize8(codes, absmax, numel, signed=name == "exp_avg", code=code)
    if "exp_avg" in state:
        state.setdefault("exp_avg_sq", torch.zeros_like(state["exp_avg"]))
    return state


def _widened(shard):
    """An optimizer shard whose base optimizer's moments are all float32."""
    zero = shard["optimizer_state_dict"]
    stage3 = "fp32_flat_groups" in zero
    base = zero["optimizer_state_dict"] if stage3 else zero["base_optimizer_state"]
    weights = zero["fp32_flat_groups"] if stage3 else zero["single_partition_of_fp32_groups"]
    groups = base["param_groups"]
    if any(group.get("code", "companded") != "companded" for group in groups):
        raise ValueError(
            "a universal checkpoint needs the code map 'companded': the dynamic one is not exact when read back"
        )
    for i, state in base["state"].items():
        base["state"][i] = widen_state(state, weights[i].numel(), "companded")
    return shard


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=to_universal.__doc__.split("\n")[0])
    parser.add_argument("shards", help="the folder `deepspeed` of a checkpoint")
    parser.add_argument("universal", help="folder to write")
    given = parser.parse_args()
    to_universal(given.shards, given.universal)
