"""Paired measurement: the sides alternate in one process, so that whatever slows the machine slows them alike."""

import datetime
import functools
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from fastft.ops.linear import native

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LEAST_ROUNDS = 3


def multiplied_dtype():
    """The half precision that models are trained in here: bfloat16 where the device multiplies it, else float32."""
    return torch.bfloat16 if torch.cuda.is_available() or native(torch.bfloat16) else torch.float32


@dataclass
class Runs:
    """What one side did, round by round."""

    wall: list[float] = field(default_factory=list)
    """seconds of real time"""
    cpu: list[float] = field(default_factory=list)
    """seconds of processor time over all threads: on a machine with other work to do, the steadier clock"""
    values: list = field(default_factory=list)
    """what the side returned"""


class Stopwatch:
    """Runs from when it is made; `read()` gives the seconds and the CPU seconds since, once a GPU has done its work."""

    def __init__(self):
        _wait()
        self.start, self.cpu_start = time.perf_counter(), time.process_time()

    def read(self):
        _wait()
        return time.perf_counter() - self.start, time.process_time() - self.cpu_start


def measure(sides, rounds, *, warmup=2, seed=0, between=None, seconds=None, clock=None):
    """{name: Runs} of `sides` {name: f(round number)}: every round runs each side once, in an order drawn anew.

    A round's number stands for its input, the same for all sides. The first `warmup` rounds are not recorded.
    between: called with the number before each side, and not timed. seconds: when they are over, no round begins but the
    first three that are recorded. clock: clock(side, number) takes a step and tells its times, as `timed` does.
    """
    clock = clock or timed
    runs = {name: Runs() for name in sides}
    order = list(sides)
    shuffle = random.Random(seed).shuffle
    end = time.perf_counter() + (math.inf if seconds is None else seconds)
    for number in range(warmup + rounds):
        if number >= warmup + LEAST_ROUNDS and time.perf_counter() > end:
            break
        shuffle(order)
        for name in order:
            if between is not None:
                between(number)
            seconds, cpu_seconds, value = clock(sides[name], number)
            if number >= warmup:
                runs[name].wall.append(seconds)
                runs[name].cpu.append(cpu_seconds)
                runs[name].values.append(value)
    return {name: asdict(run) for name, run in runs.items()}


def step_limits(config):
    """(rounds, seconds) of a training step under pytest's options; None: as many seconds as it takes."""
    rounds, seconds, full = (config.getoption(option) for option in ("--rounds", "--seconds", "--full"))
    return rounds, None if full else 8 * seconds


def work(dtype, *, moved, flops):
    """What an op must do at the least, for extra_info: bytes moved to and from memory, floating-point operations, and the dtype
    of its products. An exponential, a root or a division counts as one operation."""
    return {"bytes": int(moved), "flops": int(flops), "dtype": str(dtype).removeprefix("torch.")}


def elementwise(dtype, shape, *, tensors, operations):
    """`work` of an op that moves so many tensors of one shape and takes so many operations for each of their elements."""
    elements = math.prod(shape)
    return work(dtype, moved=tensors * elements * dtype.itemsize, flops=operations * elements)


def timed(function, *args):
    """(seconds, CPU seconds, what it returned) of one call; on a GPU between two of its events, its L2 cache flushed before."""
    if torch.cuda.is_available():
        _flush_l2()
        return _timed_on_gpu(function, *args)
    watch = Stopwatch()
    value = function(*args)
    return *watch.read(), value


def _timed_on_gpu(function, *args):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _wait()
    cpu_start = time.process_time()
    start.record()
    value = function(*args)
    end.record()
    _wait()
    return start.elapsed_time(end) / 1e3, time.process_time() - cpu_start, value


@functools.cache
def _flushing():
    return torch.empty(2**28, dtype=torch.uint8, device="cuda")  # several times as large as any L2


def _flush_l2():
    _flushing().zero_()


def peak_bytes(function):
    """The most memory that PyTorch held at once during one call, above what it held before; None where it cannot be told."""
    if torch.cuda.is_available():
        _wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        _wait()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(max(held.max(), 0)) if len(held) else None


def speedup(theirs, ours, *, seed=0, resamples=5000):
    """(median, low, high) of their time over ours, round by round; low and high bound a 95 % bootstrap interval."""
    ratios = np.array(theirs) / np.array(ours)
    picks = np.random.default_rng(seed).integers(len(ratios), size=(resamples, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return statistics.median(ratios.tolist()), float(low), float(high)


class Replay:
    """Puts recorded times into pytest-benchmark's table: a clock that stands still except while they are replayed."""

    now = 0.0

    def clock(self):
        return self.now

    def __call__(self, benchmark, seconds):
        def advance(by):
            self.now += by

        durations = iter(seconds)
        benchmark.pedantic(advance, setup=lambda: ((next(durations),), {}), rounds=len(seconds))


def ceilings(toy=False):
    """What this machine reaches at most, measured now: bytes per second of a copy, FLOP per second of a matrix product."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    elements, size = (2**16, 64) if toy else (2**28, 8192) if device == "cuda" else (2**25, 2048)
    x = torch.ones(elements, device=device)
    y = torch.empty_like(x)
    found = {"copy_bytes_per_s": 2 * x.nbytes / min(timed(y.copy_, x)[0] for _ in range(5))}
    for dtype in dict.fromkeys((torch.float32, multiplied_dtype())):  # emulated, bfloat16 would take minutes
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        name = f"{str(dtype).removeprefix('torch.')}_flop_per_s"
        found[name] = 2 * size**3 / min(timed(torch.mm, a, b)[0] for _ in range(5))
    return found


def machine():
    """What a reader must know of the machine and the software to judge a result."""
    cuda = torch.cuda.is_available()
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "native_bf16": native(torch.bfloat16),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "allocator": Path(os.environ.get("LD_PRELOAD", "")).name or " ".join(platform.libc_ver()),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed")},
        "commit": _commit(),
    }


def machine_line(facts):
    """The facts of `machine()` in one line."""
    bf16 = "native bf16" if facts["native_bf16"] else "no native bf16"
    device = f"{facts['gpu']}; " if facts["gpu"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return (
        f"{device}{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, {facts['isa']}, {bf16}, "
        f"allocator {facts['allocator']}; Python {facts['python']}, {versions}; commit {facts['commit']}"
    )


def new_result():
    """The frame of a result: when, where and by which command; the rest is to be filled."""
    module = sys.modules["__main__"].__spec__
    name = Path(sys.argv[0]).name if module is None else f"python -m {module.name.removesuffix('.__main__')}"
    arguments = [_shown(argument) for argument in sys.argv[1:]]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([name, *arguments]),
        "machine": machine(),
        "ceilings": {},
        "jobs": {},
        "ops": {},
        "ablations": {},
        "scaling": {},
        "accuracies": [],
    }


def _shown(argument):
    """An argument of the command without this machine's absolute paths."""
    option, found, value = argument.rpartition("=")
    path = Path(value)
    inside = path.is_absolute() and path.is_relative_to(ROOT)
    shown = path.relative_to(ROOT) if inside else path.name if path.is_absolute() else value
    return f"{option}{found}{shown}"


def write_result(result, folder=RESULTS):
    """Writes a result as <machine>-<date>.json and returns the path."""
    facts = result["machine"]
    machine = facts["gpu"] or f"{facts['cpu']}-{facts['cores']}-cores-{facts['isa']}"
    name = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{result['date'][:10]}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def _wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _cpu_model():
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _commit():
    """The commit of the working tree, with `+` where files differ from it; None outside a repository."""
    git = lambda *args: subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
    try:
        head = git("rev-parse", "--short=12", "HEAD")
    except FileNotFoundError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if git("status", "--porcelain", "--untracked-files=no").stdout else "")
