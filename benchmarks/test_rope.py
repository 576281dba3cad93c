"""RoPE of queries and keys against PyTorch: `pytest benchmarks/test_rope.py --benchmark-only`.

    eager      the formula as transformers writes it (fastft_kernels.reference), one PyTorch call after the other
    compiled   the formula under torch.compile, not with --toy
    fastft     fastft.ops.rope
    copy       clones of as many bytes as one pass forward and one backward read and write, and nothing computed: the floor

2048 tokens on a CPU, 8192 on a GPU; q and k lie in memory as projections leave them, [B, S, H, D].
The sides take turns while they are measured; each test then replays the times of its side for pytest-benchmark's table.
"""

import pytest
import torch

import fastft
from benchmarks._harness import Replay, elementwise, speedup

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = 8192 if DEVICE == "cuda" else 2048
HEADS = [(32, 8, 128)] if DEVICE == "cuda" else [(12, 12, 32), (16, 16, 64), (32, 8, 128)]  # of q, of k, and their size
SIDES = ["eager", "compiled", "fastft", "copy"]

replay = Replay()


def eager(q, k, cos, sin):
    with fastft.backend("reference"):
        return fastft.ops.rope(q, k, cos, sin)


def sides_of(tokens, heads, dtype, toy):
    """{side: f(round)}, forward and backward."""
    heads_q, heads_k, size = heads
    by_head = lambda n: torch.randn(1, tokens, n, size, device=DEVICE).to(dtype).transpose(1, 2)
    q, k, dq, dk = (by_head(n) for n in (heads_q, heads_k, heads_q, heads_k))
    angles = 100 * torch.rand(1, tokens, size // 2, device=DEVICE).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    leaves = [q.requires_grad_(), k.requires_grad_()]

    def run(function):
        def once(_):
            results = function(q, k, cos, sin)
            return *results, *torch.autograd.grad(results, leaves, (dq, dk))

        return once

    functions = {"eager": eager, "fastft": fastft.ops.rope}
    if not toy:
        torch.compiler.reset()  # each case is compiled for its own shape
        functions["compiled"] = torch.compile(eager)
    sides = {name: run(function) for name, function in functions.items()}
    for ours, theirs in zip(sides["fastft"](0), sides["eager"](0), strict=True):
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < 8 * torch.finfo(dtype).eps, f"fastft differs from eager by {error:.1e}: nothing is timed"
    sides["copy"] = lambda _: [x.detach().clone() for x in (q, k, dq, dk)]
    # What a side returns would be kept for the result: tensors are dropped instead.
    return {name: lambda number, side=side: (side(number), None)[1] for name, side in sides.items()}


@pytest.fixture(scope="module")
def runs(request, compare):
    heads, dtype = request.param
    toy = request.config.getoption("--toy")
    sides = sides_of(8 if toy else TOKENS, heads, dtype, toy)
    return compare(sides, warmup=3)


CASES = [(heads, dtype) for heads in HEADS for dtype in (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("runs", CASES, indirect=True, ids=lambda case: f"{case[0]}-{case[1]}")
@pytest.mark.benchmark(timer=replay.clock)
def test_rope(request, benchmark, runs, side):
    (heads_q, heads_k, size), dtype = request.node.callspec.params["runs"]
    if side not in runs:
        pytest.skip(f"{side} is not measured here")
    tokens = "toy" if request.config.getoption("--toy") else f"{TOKENS} x"
    benchmark.group = f"rope {tokens} ({heads_q} + {heads_k}) x {size}, {dtype}, forward and backward"
    shape = 8 if tokens == "toy" else TOKENS, heads_q + heads_k, size
    benchmark.extra_info["work"] = elementwise(dtype, shape, tensors=4, operations=6)
    benchmark.extra_info["speedup_of_fastft"] = speedup(runs[side]["wall"], runs["fastft"]["wall"])
    replay(benchmark, runs[side]["wall"])
