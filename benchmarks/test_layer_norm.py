"""Dropout with p = 0.1 against PyTorch, forward and backward: `pytest benchmarks/test_dropout.py --benchmark-only`.

eager       torch.nn.functional.dropout
compiled    the same under torch.compile, not with --toy
fastft      what fastft.ops.layer_norm chooses on this machine
copy        four clones, the floor: as many bytes read and written, and nothing computed
"""

import pytest
import torch
import torch.nn.functional as F

import fastft
from benchmarks._harness import Replay, elementwise, speedup

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(8192, 4096)] if DEVICE == "cuda" else [(2048, 384), (2048, 1024), (2048, 4096)]
SIDES = ["eager", "compiled", "fastft", "copy"]

P = 0.1

replay = Replay()


def eager(x, weight, bias, residual):
    return F.layer_norm(residual + F.dropout(x, P), weight.shape, weight, bias, 1e-12)


def fused(x, weight, bias, residual):
    return fastft.ops.layer_norm(x, weight, bias, 1e-12, residual=residual, dropout_p=P)[0]


def sides_of(shape, toy):
    """{side: f(round)}."""
    x, residual = (torch.randn(shape, device=DEVICE).bfloat16().requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(shape[1], device=DEVICE).bfloat16().requires_grad_() for _ in range(2))
    dy, leaves = torch.randn_like(x, requires_grad=False), (x, weight, bias, residual)
    functions = {"eager": eager, "fastft": fused}
    if not toy:
        torch.compiler.reset()
        functions["compiled"] = torch.compile(eager)
    sides = {
        name: lambda _, f=function: (torch.autograd.grad(f(*leaves), leaves, dy), None)[1]
        for name, function in functions.items()
    }
    # Forward reads x and residual and writes h and y; backward reads dy and h and writes dx and dresidual.
    sides["copy"] = lambda _: ([t.detach().clone() for t in (x, residual, dy, dy)], None)[1]
    return sides


@pytest.fixture(scope="module")
def runs(request, compare):
    toy = request.config.getoption("--toy")
    return compare(sides_of((8, 64) if toy else request.param, toy), warmup=3)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("runs", SHAPES, indirect=True, ids=str)
@pytest.mark.benchmark(timer=replay.clock)
def test_layer_norm(request, benchmark, runs, side):
    if side not in runs:
        pytest.skip(f"{side} is not measured here")
    shape = request.node.callspec.params["runs"]
    size = "toy" if request.config.getoption("--toy") else f"{shape[0]} x {shape[1]}"
    benchmark.group = f"layer_norm {size}, bfloat16, forward and backward"
    shape = (8, 64) if size == "toy" else shape
    benchmark.extra_info["work"] = elementwise(torch.bfloat16, shape, tensors=8, operations=22)
    benchmark.extra_info["speedup_of_fastft"] = speedup(runs[side]["wall"], runs["fastft"]["wall"])
    replay(benchmark, runs[side]["wall"])
