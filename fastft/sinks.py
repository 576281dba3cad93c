"""Where a run's numbers go: the screen, TensorBoard, Weights & Biases, and the picture of the loss."""

import atexit
import dataclasses
import os
import sys
from datetime import timedelta

NUMBERS = (int, float)


class Screen:
    """A progress bar where stdout is a terminal, otherwise a plain line per log."""

    def __init__(self, total_steps):
        self.total_steps = total_steps
        self.progress = None
        if sys.stdout.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            steps, status = TextColumn("step {task.completed}/{task.total}"), TextColumn("{task.fields[status]}")
            console = Console(file=sys.stdout)
            # drawn twice a second: more often, its thread would take percents of a small run on a CPU
            self.progress = Progress(steps, BarColumn(bar_width=None), status, console=console, refresh_per_second=2)
            self.task = self.progress.add_task("", total=total_steps, status="")
            atexit.register(self.progress.stop)  # gives the cursor back when an error ends the run

    def print(self, text):
        if self.progress is None:
            print(text, flush=True)
        else:
            self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, step):
        if self.progress is not None:
            self.progress.start()
            self.progress.update(self.task, completed=step)

    def show(self, step, line, seconds_left):
        """The latest numbers. line: as in metrics.jsonl."""
        status = (
            f"loss {line['loss']:.4f}  lr {line['learning_rate']:.2e}  {line['tokens_per_second']:,.0f} tokens/s  "
            f"{line['peak_memory_bytes'] / 1e9:.2f} GB  {timedelta(seconds=round(seconds_left))} left"
        )
        if self.progress is None:
            self.print(f"step {step}/{self.total_steps}  {status}")
        else:
            self.progress.update(self.task, status=status)

    def stop(self):
        if self.progress is not None:
            self.progress.stop()


class TensorBoard:
    def __init__(self, folder, step):
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an interrupted run wrote after the step that this one resumes from
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def log(self, step, values):
        for name, value in values.items():
            if isinstance(value, NUMBERS):
                self.writer.add_scalar(name if name.startswith(("eval_", "test_")) else f"train/{name}", value, step)

    def close(self):
        self.writer.close()


class WeightsAndBiases:
    def __init__(self, args):
        import wandb

        project = os.environ.get("WANDB_PROJECT", "fastft")
        config = dataclasses.asdict(args)
        self.run = wandb.init(project=project, name=args.run_name, dir=args.output_dir, config=config)

    def log(self, step, values):
        self.run.log({name: value for name, value in values.items() if isinstance(value, NUMBERS)}, step=step)

    def close(self):
        self.run.finish()


def draw_losses(lines, path):
    """A PNG of the training loss, as logged and smoothed, and of the evaluation loss. lines: those of metrics.jsonl."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")  # no pyplot: its global state belongs to the caller
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss")
    steps, losses = _column(lines, "loss")
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1)
    axes.plot(steps, _smoothed(losses), color="tab:blue", label="train (smoothed)")
    steps, losses = _column(lines, "eval_loss")
    if steps:
        axes.plot(steps, losses, "o-", color="tab:orange", label="evaluation")
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)


def _column(lines, name):
    found = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _smoothed(values):
    """Exponential mean over about a twentieth of the curve, unbiased at its start."""
    decay = 1 - 1 / max(1.0, len(values) / 20)
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        smoothed.append(total / weight)
    return smoothed
