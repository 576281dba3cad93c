"""Where a run stands, and the folder that a step's checkpoint gets."""

from dataclasses import dataclass, field
from pathlib import Path


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
