"""The records of a run: its folder, progress, metrics.jsonl, run.json, all_results.json and the loss curve."""

import collections
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import fastft
from fastft.durable import rank, together, write_json, write_text
from fastft.sinks import Screen, TensorBoard, WeightsAndBiases, draw_losses

WARM_UP = 3  # steps that do not count for the throughput: allocators, caches and compilers settle in them
RECORDS = ("metrics.jsonl", "run.json", "all_results.json", "loss_curve.png")


def check_output_dir(output_dir, *, overwrite, resume):
    """Makes sure that a run may write to a folder, and makes the folder. Every rank calls it; rank 0's disk counts.

    overwrite: removes the records and checkpoints of an earlier run, nothing else. Its model stays until the new one
    replaces it, so a run that fails costs no model, and one may start from the model that it will replace.

    Raises ValueError for a file, a folder that cannot be written, and a folder that is not empty without either flag.
    """
    output_dir = Path(output_dir)
    with together(f"--output_dir {output_dir}"):
        if rank() != 0:
            return
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise ValueError(f"--output_dir {output_dir}: is a file; name a folder") from None
        except OSError as error:
            raise ValueError(f"--output_dir {output_dir}: {error.strerror}; name one that can be written") from None
        if resume or not any(output_dir.iterdir()):
            return
        if not overwrite:
            raise ValueError(
                f"--output_dir {output_dir}: not empty; name another folder, or give --overwrite_output_dir true "
                "or --resume_from_checkpoint auto"
            )
        for name in RECORDS:
            (output_dir / name).unlink(missing_ok=True)
        for events in output_dir.glob("tensorboard/**/events.out.tfevents.*"):
            events.unlink()
        for state in output_dir.glob("checkpoints/step-*/state.json"):
            shutil.rmtree(state.parent)
        (output_dir / "checkpoints" / "latest").unlink(missing_ok=True)


class Recorder:
    """Follows one run. Every rank makes one and calls the same methods; rank 0 writes and prints.

    args: the run's Arguments. ranks: its Ranks. state: its TrainState, whose totals the recorder keeps, so that a
    resumed run goes on counting; metrics.jsonl loses the lines after `state.step` and stays one history.

    Raises ValueError for a `--report_to` that is not installed.
    """

    def __init__(self, args, ranks, total_steps, state):
        check_report_to(args.report_to)
        self.args, self.ranks, self.total_steps, self.state = args, ranks, total_steps, state
        self.output_dir = Path(args.output_dir)
        self.steps_per_epoch = None
        self._losses = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # sum and number since settle()
        self._recent, self._timed = _Throughput(), _Throughput()
        self._steps = 0  # of this process
        self._screen = Screen(total_steps) if ranks.first else None
        self._sinks = []
        if ranks.first:
            self._file = self._open_history()
            if "tensorboard" in args.report_to:
                self._sinks.append(TensorBoard(self.output_dir / "tensorboard" / (args.run_name or ""), state.step))
            if "wandb" in args.report_to:
                self._sinks.append(WeightsAndBiases(args))
        self._mark = time.perf_counter()

    def describe(self, *, task, dtype, packing, splits, plan, model, patch, report, model_kwargs=None):
        """Prints what was decided and writes run.json.

        task: what is learnt, and why it was taken to be that.
        patch, report: the patch report as text and as a dict. model_kwargs: what the task gave the model's constructor,
        with which an adapter's base model is made again.
        """
        self.steps_per_epoch = plan.steps_per_epoch
        if self.ranks.first:
            run = {
                "arguments": dataclasses.asdict(self.args),
                "task": task,
                "model_kwargs": model_kwargs or {},
                "dtype": str(dtype).removeprefix("torch."),
                "world_size": self.ranks.world_size,
                "packing": packing,
                **plan.padding(),
                "steps": self.total_steps,
                "device": _device_name(self.ranks.device),
                "data": {name: split.report for name, split in splits.items()},
                "patch": report,
                "versions": versions(),
                "commit": _commit(),
                "python": platform.python_version(),
                "platform": platform.platform(),
            }
            write_json(self.output_dir / "run.json", _plain(run))
            self._screen.print(self._summary(run, splits, plan, model, patch))
        self._mark = time.perf_counter()

    def step(self, loss, engine, schedule, lengths):
        """After an optimizer step, with `state.step` counting it.

        loss: this rank's, a tensor that is read only when a line is due. lengths: token counts of all ranks' examples.
        """
        loss = loss.detach().double()
        finite = torch.isfinite(loss)
        self._losses += torch.stack([torch.where(finite, loss, 0.0), finite.double()])
        self._schedule, self._engine = schedule, engine
        self._steps += 1
        now = time.perf_counter()
        tokens, samples, seconds = int(lengths.sum()), len(lengths), now - self._mark
        self._mark = now
        self.state.tokens += tokens
        self.state.samples += samples
        self.state.seconds += seconds
        self._recent.add(tokens, samples, seconds)
        self._timed.add(tokens, samples, seconds)
        if self._steps == WARM_UP and self.state.step < self.total_steps:
            _synchronize(self.ranks.device)
            self._timed, self._mark = _Throughput(), time.perf_counter()
        if self.state.step % self.args.logging_steps == 0 or self.state.step == self.total_steps:
            self._log()
        if self.ranks.first:
            self._screen.advance(self.state.step)

    def settle(self):
        """Brings `state` up to date with the losses of all ranks. Every rank calls it before it saves a checkpoint."""
        if self.ranks.world_size > 1:
            dist.all_reduce(self._losses)
        total, count = self._losses.tolist()
        self._losses.zero_()
        self.state.recent_loss = [self.state.recent_loss[0] + total, self.state.recent_loss[1] + count]

    @contextlib.contextmanager
    def pause(self):
        """Time spent in here, evaluating or saving, is not training time."""
        _synchronize(self.ranks.device)
        self._count_seconds()
        yield
        _synchronize(self.ranks.device)
        self._mark = time.perf_counter()

    def evaluation(self, step, metrics):
        """Records the metrics of an evaluation, named `eval_loss` and so on."""
        if self.ranks.first:
            self._write(step, metrics)
            self._screen.print(f"step {step}: {_listed(metrics)}")

    def note(self, text):
        """Tells something worth knowing, a skipped step or an early stop."""
        if self.ranks.first:
            self._screen.print(text)

    def finish(self, results):
        """Writes all_results.json and the loss curve, says where the model is, and returns the results.

        results: the last metrics, `eval_loss`, `test_loss` and so on.
        """
        _synchronize(self.ranks.device)
        self._count_seconds()
        if self._recent.steps:
            self._log()
        peak = torch.tensor(peak_memory(self.ranks.device), device=self.ranks.device)
        if self.ranks.world_size > 1:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        results = {
            "train_loss": self.state.loss_sum / self.state.loss_count if self.state.loss_count else None,
            "train_runtime": self.state.seconds,
            "train_samples_per_second": self._timed.per_second(self._timed.samples),
            "train_tokens_per_second": self._timed.per_second(self._timed.tokens),
            "train_steps": self.state.step,
            "peak_memory_bytes": peak.item(),
            **results,
        }
        file = self.args.test_file or self.args.validation_file or "FILE"
        if self.ranks.first:
            self._file.close()
            for sink in self._sinks:
                sink.close()
            draw_losses(_history(self.output_dir / "metrics.jsonl"), self.output_dir / "loss_curve.png")
            write_json(self.output_dir / "all_results.json", _plain(results))
            self._screen.stop()
            self._screen.print(
                f"{_listed(results)}\n"
                f"The model is in {self.output_dir}\n"
                f"Use it: fastft predict --model {self.output_dir} --file {file}"
            )
        return results

    def _log(self):
        self.settle()
        total, count = self.state.recent_loss
        self.state.loss_sum += total
        self.state.loss_count += count
        self.state.recent_loss = [0.0, 0]
        norm = self._engine.get_global_grad_norm()
        line = {
            "loss": total / count if count else math.nan,
            "learning_rate": self._schedule.get_last_lr()[0],
            "grad_norm": math.nan if norm is None else float(norm),
            "tokens_per_second": self._recent.per_second(self._recent.tokens),
            "samples_per_second": self._recent.per_second(self._recent.samples),
            "tokens": self.state.tokens,
            "seconds": self.state.seconds,
            "peak_memory_bytes": peak_memory(self.ranks.device),
        }
        self._recent = _Throughput()
        if self.ranks.first:
            if is_spike(line["loss"], self._logged):
                usual = statistics.median(self._logged)
                self.note(
                    f"step {self.state.step}: loss {line['loss']:.4f} is a spike, it was about {usual:.4f} before"
                )
            self._logged.append(line["loss"])
            self._write(self.state.step, line)
            left = (self.total_steps - self.state.step) * self._timed.seconds / max(1, self._timed.steps)
            self._screen.show(self.state.step, line, left)

    def _count_seconds(self):
        """The time since the last step belongs to training, if to no step: the device was finishing it."""
        now = time.perf_counter()
        if self._steps:
            for seconds in (self._recent, self._timed):
                seconds.seconds += now - self._mark
            self.state.seconds += now - self._mark
        self._mark = now

    def _write(self, step, values):
        epoch = {} if self.steps_per_epoch is None else {"epoch": step / self.steps_per_epoch}
        self._file.write(json.dumps(_plain({"step": step, **epoch, **values})) + "\n")
        for sink in self._sinks:
            sink.log(step, values)

    def _open_history(self):
        path = self.output_dir / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _history(path) if line["step"] <= self.state.step] if self.state.step else []
        self._logged = collections.deque((line["loss"] for line in kept if line.get("loss") is not None), maxlen=50)
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        return open(path, "a", encoding="utf-8", buffering=1)

    def _summary(self, run, splits, plan, model, patch):
        count = lambda p: (
            getattr(p, "ds_numel", p.numel()) * (2 if p.dtype == torch.uint8 else 1)
        )  # 4 bits: two in a byte
        sizes = [(count(p), p.requires_grad) for p in model.parameters()]
        trained, total = sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)
        defaults = dataclasses.asdict(type(self.args)())
        said = {
            name: value for name, value in run["arguments"].items() if value != defaults[name] and name != "local_rank"
        }
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
        batch = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.ranks.world_size
        rows = [
            ("versions", versions),
            ("device", f"{run['world_size']} x {run['device']}, {run['dtype']}, ZeRO stage {self.args.zero_stage}"),
            ("arguments", ", ".join(f"{name}={value}" for name, value in said.items()) or "all defaults"),
            ("task", run["task"].removeprefix("task ")),
            ("model", f"{type(model).__name__}, {total:,} parameters, {trained:,} trained"),
            *((name, split.summary()) for name, split in splits.items()),
            ("batches", _batches(run)),
            ("steps", f"{self.total_steps} of {batch} examples, {self.total_steps / plan.steps_per_epoch:.3g} epochs"),
            ("layers", patch),
            ("output", f"{self.output_dir} (everything decided is in its run.json)"),
        ]
        if self.state.step:
            rows.append(("resumed", f"after step {self.state.step}"))
        return "\n".join(f"{name:<11}" + text.replace("\n", "\n" + " " * 11) for name, text in rows)


@dataclasses.dataclass
class _Throughput:
    tokens: int = 0
    samples: int = 0
    seconds: float = 0.0
    steps: int = 0

    def add(self, tokens, samples, seconds):
        self.tokens, self.samples = self.tokens + tokens, self.samples + samples
        self.seconds, self.steps = self.seconds + seconds, self.steps + 1

    def per_second(self, count):
        return count / self.seconds if self.seconds else 0.0


def is_spike(loss, before):
    """Whether a loss stands out above the last logged ones: twice their median, and ten times further than they differ."""
    before = [value for value in before if math.isfinite(value)]
    if len(before) < 10 or not math.isfinite(loss):
        return False
    median = statistics.median(before)
    spread = statistics.median(abs(value - median) for value in before)
    return loss > 2 * median and loss > median + 10 * spread


def check_report_to(names):
    """Raises ValueError for a place that metrics should go to, but whose package is not installed."""
    for name in names:
        if name != "none" and importlib.util.find_spec(name) is None:
            raise ValueError(f"--report_to {name}: {name} is not installed; pip install {name}, or leave it out")


def peak_memory(device):
    """Most bytes in use so far: allocated on the GPU, or resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def versions():
    """{package: version}, None where it is not installed."""
    found = {"fastft": fastft.__version__}
    for name in ("torch", "transformers", "deepspeed", "peft", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _commit():
    """The commit of a source checkout; None for an installed package, or without git."""
    checkout = Path(fastft.__file__).parent.parent
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return None
    git = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True)
    return git.stdout.strip() if git.returncode == 0 else None


def _device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _history(path):
    """The lines of a metrics.jsonl, up to one that a crash cut short."""
    if not path.exists():
        return []
    history = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            history.append(json.loads(line))
        except ValueError:
            break
    return history


def _batches(run):
    tokens, padding = f"{run['tokens_per_micro_batch']:,.0f} tokens in a micro-batch", f"{run['padding_fraction']:.0%}"
    if run["packing"]:
        return f"packed: {tokens}, none of them padding ({padding} would be in padded batches)"
    return f"padded: {tokens}, and {padding} of each batch is padding"


def _listed(metrics):
    shown = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in metrics.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if isinstance(value, (int, str)))


def _plain(value):
    """What standard JSON can hold: NumPy scalars become numbers, NaN and infinities null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
