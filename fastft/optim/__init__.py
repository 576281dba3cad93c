"""Optimizers: ordinary `torch.optim.Optimizer`s that also work under ZeRO, and resume bit for bit.

AdamW                 float32 arithmetic for parameters of any dtype; the float32 master weights live in its state.
AdamW8bit, Lion8bit   the same with moments in 8 bits: 2.03 (1.02) bytes of state per parameter instead of 8 (4).
Replicated...         each of them for parameters that every rank holds whole (ZeRO stage 0): one `step()` sums the
                      gradients over ranks, clips them, and leaves everything untouched when they are not finite.
parameter_groups      which parameters are decayed, and which keep float32 moments.
use_row_gradients     embedding tables whose gradients are rows, for which no dense tensor is filled.
"""

from fastft.optim.adamw import AdamW
from fastft.optim.adamw8bit import AdamW8bit, Lion8bit
from fastft.optim.groups import parameter_groups
from fastft.optim.replicated import (
    Replicated,
    ReplicatedAdamW,
    ReplicatedAdamW8bit,
    ReplicatedLion8bit,
    average_over_ranks,
    buckets,
)
from fastft.optim.row_gradients import use_row_gradients

__all__ = [
    "AdamW", "AdamW8bit", "Lion8bit", "Replicated", "ReplicatedAdamW", "ReplicatedAdamW8bit", "ReplicatedLion8bit",
    "average_over_ranks", "buckets", "parameter_groups", "use_row_gradients",
]  # fmt: skip
