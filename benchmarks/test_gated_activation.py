"""SwiGLU and GEGLU against PyTorch: `pytest benchmarks/test_gated_activation.py --benchmark-only`.

    eager      the formula as transformers writes it (fastft_kernels.reference), one PyTorch call after the other
    compiled   the formula under torch.compile, not with --toy
    fastft     fastft.ops.swiglu or geglu
    copy       clones of as many bytes as one pass forward and one backward read and write, and nothing computed: the floor

The sides take turns while they are measured; each test then replays the times of its side for pytest-benchmark's table.
"""

import pytest
import torch

import fastft
from benchmarks._harness import Replay, elementwise, speedup

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(8192, 4096), (8192, 14336)] if DEVICE == "cuda" else [(2048, 384), (2048, 1024), (2048, 4096)]
OPS = {
    "swiglu": fastft.ops.swiglu,
    "geglu": fastft.ops.geglu,
    "geglu_tanh": lambda gate, up: fastft.ops.geglu(gate, up, approximate="tanh"),
}
SIDES = ["eager", "compiled", "fastft", "copy"]

replay = Replay()


def sides_of(op, shape, dtype, toy):
    """{side: f(round)}, forward and backward."""
    gate, up = (torch.randn(shape, device=DEVICE).to(dtype).requires_grad_() for _ in range(2))
    dy = torch.randn_like(gate, requires_grad=False)
    half = torch.randn(4, *shape, device=DEVICE).to(dtype)  # cloned: 8 tensors move, 3 of forward and 5 of backward

    def eager(gate, up):
        with fastft.backend("reference"):
            return op(gate, up)

    def run(function):
        def once(_):
            y = function(gate, up)
            return y, *torch.autograd.grad(y, (gate, up), dy)

        return once

    functions = {"eager": eager, "fastft": op}
    if not toy:
        torch.compiler.reset()  # each case is compiled for its own shape
        functions["compiled"] = torch.compile(eager)
    sides = {name: run(function) for name, function in functions.items()}
    for ours, theirs in zip(sides["fastft"](0), sides["eager"](0), strict=True):
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < 8 * torch.finfo(dtype).eps, f"fastft differs from eager by {error:.1e}: nothing is timed"
    sides["copy"] = lambda _: [part.clone() for part in half]  # in as many allocations as results, and one more
    # What a side returns would be kept for the result: tensors are dropped instead.
    return {name: lambda number, side=side: (side(number), None)[1] for name, side in sides.items()}


@pytest.fixture(scope="module")
def runs(request, compare):
    op, shape, dtype = request.param
    toy = request.config.getoption("--toy")
    sides = sides_of(OPS[op], (8, 64) if toy else shape, dtype, toy)
    return compare(sides, warmup=3)


CASES = [(op, shape, torch.bfloat16) for op in OPS for shape in SHAPES]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("runs", CASES, indirect=True, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}")
@pytest.mark.benchmark(timer=replay.clock)
def test_gated_activation(request, benchmark, runs, side):
    op, shape, dtype = request.node.callspec.params["runs"]
    if side not in runs:
        pytest.skip(f"{side} is not measured here")
    size = "toy" if request.config.getoption("--toy") else f"{shape[0]} x {shape[1]}"
    benchmark.group = f"{op} {size}, {dtype}, forward and backward"
    shape = (8, 64) if size == "toy" else shape
    benchmark.extra_info["work"] = elementwise(dtype, shape, tensors=8, operations=18)
    benchmark.extra_info["speedup_of_fastft"] = speedup(runs[side]["wall"], runs["fastft"]["wall"])
    replay(benchmark, runs[side]["wall"])
