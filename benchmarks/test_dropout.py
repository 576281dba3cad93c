"""Dropout with p = 0.1 against PyTorch, forward and backward: `pytest benchmarks/test_dropout.py --benchmark-only`.

eager       torch.nn.functional.dropout
compiled    the same under torch.compile, not with --toy
fastft      what fastft.ops.dropout chooses on this machine
copy        two clones, the floor: as many bytes read and written, and nothing computed
"""

import pytest
import torch
import torch.nn.functional as F

import fastft
from benchmarks._harness import Replay, elementwise, speedup

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(8192, 4096)] if DEVICE == "cuda" else [(2048, 384), (2048, 1024), (2048, 4096)]
SIDES = ["eager", "compiled", "fastft", "copy"]

replay = Replay()


def sides_of(shape, toy):
    """{side: f(round)}."""
    x = torch.randn(shape, device=DEVICE).bfloat16().requires_grad_()
    dy = torch.randn_like(x, requires_grad=False)
    functions = {"eager": lambda x: F.dropout(x, 0.1), "fastft": lambda x: fastft.ops.dropout(x, 0.1)}
    if not toy:
        torch.compiler.reset()
        functions["compiled"] = torch.compile(functions["eager"])
    sides = {name: lambda _, f=f: (torch.autograd.grad(f(x), x, dy), None)[1] for name, f in functions.items()}
    sides["copy"] = lambda _: (x.detach().clone(), dy.clone(), None)[2]
    return sides


@pytest.fixture(scope="module")
def runs(request, compare):
    toy = request.config.getoption("--toy")
    return compare(sides_of((8, 64) if toy else request.param, toy), warmup=3)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("runs", SHAPES, indirect=True, ids=str)
@pytest.mark.benchmark(timer=replay.clock)
def test_dropout(request, benchmark, runs, side):
    if side not in runs:
        pytest.skip(f"{side} is not measured here")
    shape = request.node.callspec.params["runs"]
    size = "toy" if request.config.getoption("--toy") else f"{shape[0]} x {shape[1]}"
    benchmark.group = f"dropout {size}, bfloat16, forward and backward"
    shape = (8, 64) if size == "toy" else shape
    benchmark.extra_info["work"] = elementwise(torch.bfloat16, shape, tensors=4, operations=2)
    benchmark.extra_info["speedup_of_fastft"] = speedup(runs[side]["wall"], runs["fastft"]["wall"])
    replay(benchmark, runs[side]["wall"])
