"""GELU behind a bias against PyTorch: `pytest benchmarks/test_gelu.py --benchmark-only`.

    eager      gelu(x + bias) as the formula is written (fastft_kernels.reference), one PyTorch call after the other
    compiled   the same under torch.compile, not with --toy
    fastft     fastft.ops.gelu
    copy       clones of as many bytes as one pass forward and one backward read and write, and nothing computed: the floor

The sides take turns while they are measured; each test then replays the times of its side for pytest-benchmark's table.
"""

import pytest
import torch

import fastft
from benchmarks._harness import Replay, elementwise, speedup

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(8192, 4096), (8192, 14336)] if DEVICE == "cuda" else [(2048, 384), (2048, 1024), (2048, 4096)]
APPROXIMATIONS = ["none", "tanh"]
SIDES = ["eager", "compiled", "fastft", "copy"]

replay = Replay()


def sides_of(approximate, shape, dtype, toy):
    """{side: f(round)}, forward and backward with the gradient of the bias."""
    x = torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()
    bias = torch.randn(shape[1], device=DEVICE).to(dtype).requires_grad_()
    dy = torch.randn_like(x, requires_grad=False)
    parts = [
        dy.clone(),
        dy.clone(),
        dy[: shape[0] // 2].clone(),
    ]  # cloned: 5 tensors move, 2 of forward and 3 of backward

    def op(x, bias):
        return fastft.ops.gelu(x, bias, approximate=approximate)

    def eager(x, bias):
        with fastft.backend("reference"):
            return op(x, bias)

    def run(function):
        def once(_):
            y = function(x, bias)
            return y, *torch.autograd.grad(y, (x, bias), dy)

        return once

    functions = {"eager": eager, "fastft": op}
    if not toy:
        torch.compiler.reset()  # each case is compiled for its own shape
        functions["compiled"] = torch.compile(eager)
    sides = {name: run(function) for name, function in functions.items()}
    for ours, theirs in zip(sides["fastft"](0), sides["eager"](0), strict=True):
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < 8 * torch.finfo(dtype).eps, f"fastft differs from eager by {error:.1e}: nothing is timed"
    sides["copy"] = lambda _: [part.clone() for part in parts]
    # What a side returns would be kept for the result: tensors are dropped instead.
    return {name: lambda number, side=side: (side(number), None)[1] for name, side in sides.items()}


@pytest.fixture(scope="module")
def runs(request, compare):
    approximate, shape, dtype = request.param
    toy = request.config.getoption("--toy")
    sides = sides_of(approximate, (8, 64) if toy else shape, dtype, toy)
    return compare(sides, warmup=3)


CASES = [(approximate, shape, torch.bfloat16) for approximate in APPROXIMATIONS for shape in SHAPES]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("runs", CASES, indirect=True, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}")
@pytest.mark.benchmark(timer=replay.clock)
def test_gelu(request, benchmark, runs, side):
    approximate, shape, dtype = request.node.callspec.params["runs"]
    if side not in runs:
        pytest.skip(f"{side} is not measured here")
    size = "toy" if request.config.getoption("--toy") else f"{shape[0]} x {shape[1]}"
    benchmark.group = f"gelu ({approximate}) with bias {size}, {dtype}, forward and backward"
    shape = (8, 64) if size == "toy" else shape
    benchmark.extra_info["work"] = elementwise(dtype, shape, tensors=5, operations=24)
    benchmark.extra_info["speedup_of_fastft"] = speedup(runs[side]["wall"], runs["fastft"]["wall"])
    replay(benchmark, runs[side]["wall"])
