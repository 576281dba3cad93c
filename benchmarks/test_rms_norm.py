"""RMSNorm against PyTorch: `pytest benchmarks/test_rms_norm.py --benchmark-only`.

    eager       the formula as transformers writes it (fastft_kernels.reference), one PyTorch call after the other
    functional  torch.nn.functional.rms_norm
    compiled    the formula under torch.compile, not with --toy
    fastft      what fastft.ops.rms_norm chooses on this machine
    copy        x.clone(), the floor of the forward pass: it reads and writes as many bytes and computes nothing

The sides take turns while they are measured; each test then replays the times of its side for pytest-benchmark's table.
"""

import pytest
import torch
import torch.nn.functional as F

import fastft
from benchmarks._harness import Replay, elementwise, speedup

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(8192, 4096), (16384, 8192)] if DEVICE == "cuda" else [(768, 512), (2048, 4096)]
PASSES = ["forward", "frozen", "trained"]  # forward alone, and with backward where the weight is frozen or trained
SIDES = ["eager", "functional", "compiled", "fastft", "copy"]

replay = Replay()


def eager(x, weight):
    with fastft.backend("reference"):
        return fastft.ops.rms_norm(x, weight)


def functional(x, weight):
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def sides_of(shape, dtype, direction, toy):
    """{side: f(round)}."""
    x = torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(direction != "forward")
    weight = torch.randn(shape[1], device=DEVICE).to(dtype).requires_grad_(direction == "trained")
    dy = torch.randn_like(x, requires_grad=False)
    leaves = [leaf for leaf in (x, weight) if leaf.requires_grad]

    def run(function):
        def once(_):
            y = function(x, weight)
            return torch.autograd.grad(y, leaves, dy) if leaves else [y]

        return once

    functions = {"eager": eager, "functional": functional, "fastft": fastft.ops.rms_norm}
    if not toy:
        torch.compiler.reset()  # each case is compiled for its own shape
        functions["compiled"] = torch.compile(eager)
    sides = {name: run(function) for name, function in functions.items()}
    for ours, theirs in zip(sides["fastft"](0), sides["eager"](0), strict=True):
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < 8 * torch.finfo(dtype).eps, f"fastft differs from eager by {error:.1e}: nothing is timed"
    if direction == "forward":
        sides["copy"] = lambda _: x.clone()
    # What a side returns would be kept for the result: tensors are dropped instead.
    return {name: lambda number, side=side: (side(number), None)[1] for name, side in sides.items()}


@pytest.fixture(scope="module")
def runs(request, compare):
    shape, dtype, direction = request.param
    toy = request.config.getoption("--toy")
    sides = sides_of((8, 64) if toy else shape, dtype, direction, toy)
    return compare(sides, warmup=3)


CASES = [
    (shape, dtype, direction) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16) for direction in PASSES
]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("runs", CASES, indirect=True, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}")
@pytest.mark.benchmark(timer=replay.clock)
def test_rms_norm(request, benchmark, runs, side):
    shape, dtype, direction = request.node.callspec.params["runs"]
    if side not in runs:
        pytest.skip(f"{side} is not measured here")
    size = "toy" if request.config.getoption("--toy") else f"{shape[0]} x {shape[1]}"
    benchmark.group = f"rms_norm {size}, {dtype}, {direction}"
    tensors, operations = (2, 4) if direction == "forward" else (5, 14)  # of the size of x, moved; an element
    shape = (8, 64) if size == "toy" else shape
    benchmark.extra_info["work"] = elementwise(dtype, shape, tensors=tensors, operations=operations)
    benchmark.extra_info["speedup_of_fastft"] = speedup(runs[side]["wall"], runs["fastft"]["wall"])
    replay(benchmark, runs[side]["wall"])
