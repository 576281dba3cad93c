"""Saving 50 million weights with their optimizer state, 600 MB: `pytest benchmarks/test_checkpoint.py --benchmark-only`.

    copy in memory       of all that is saved: the least that training must wait for
    deepspeed            engine.save_checkpoint: after it the files are in the system's cache, where a power cut loses them
    deepspeed, flushed   the same, and its files flushed to the disk
    fastft, beside       what training waits for: Saver.start; the rest is done meanwhile, in a thread
    fastft               the whole protocol with nothing beside it, hashing left out

The sides take turns. `fastft` against `deepspeed, flushed` is the overhead of the protocol, `fastft, beside` against
`copy in memory` what the promise to training costs.
"""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from benchmarks._harness import Replay, measure, speedup
from fastft import durable
from fastft.arguments import Arguments
from fastft.checkpoint import Saver, TrainState, save_checkpoint
from fastft.engine import backward, build_engine, deepspeed_config, init_ranks

SIDES = ["copy in memory", "deepspeed", "deepspeed, flushed", "fastft, beside", "fastft"]

replay = Replay()


class NoHash:
    """In place of SHA-256."""

    def update(self, data):
        pass

    def hexdigest(self):
        return "0" * 64


def make_engine(width):
    args = Arguments(zero_stage=1, bf16=False, per_device_train_batch_size=1)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(3)))
    config = deepspeed_config(args, torch.float32, 1)
    engine, _ = build_engine(model, args, config, torch.float32, total_steps=10)
    backward(engine, engine(torch.ones(1, width)).sum())
    engine.step()
    return engine


def tensors(value):
    """All tensors in a nested state."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return [t for part in parts for t in tensors(part)]


def sides_of(engine, folder):
    def fresh():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

    def plain(_, flush=False):
        engine.save_checkpoint(str(folder), tag="plain")
        for path in folder.rglob("*") if flush else ():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def whole(_):
        save_checkpoint(engine, folder, TrainState(step=1))

    held = tensors([engine.module.state_dict(), engine.optimizer.state_dict()])
    sides = {
        "copy in memory": lambda _: [t.clone() for t in held] and None,
        "deepspeed": plain,
        "deepspeed, flushed": lambda _: plain(_, flush=True),
        "fastft": whole,
    }
    saver = Saver(engine, folder)

    def beside(number):
        saver.start(TrainState(step=1))

    def settled(number):  # what is under way belongs to nobody's time
        if saver.pending:
            saver.settle(TrainState())
        os.sync()
        fresh()

    return {**sides, "fastft, beside": beside}, settled


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    toy = request.config.getoption("--toy")
    init_ranks()
    engine = make_engine(64 if toy else 4096)
    sides, settled = sides_of(engine, tmp_path_factory.mktemp("saves") / "here")
    whole, durable.hashlib = durable.hashlib, SimpleNamespace(sha256=NoHash)
    try:
        full = request.config.getoption("--full")
        yield measure(sides, min(request.config.getoption("--rounds"), 5 if full else 3), warmup=1, between=settled)
    finally:
        durable.hashlib = whole


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.benchmark(timer=replay.clock)
def test_checkpoint(request, benchmark, runs, side):
    size = "toy" if request.config.getoption("--toy") else "50 million weights"
    benchmark.group = f"checkpoint, {size}"
    benchmark.extra_info["over_fastft"] = speedup(runs[side]["wall"], runs["fastft"]["wall"])
    benchmark.extra_info["over_fastft_beside"] = speedup(runs[side]["wall"], runs["fastft, beside"]["wall"])
    replay(benchmark, runs[side]["wall"])
