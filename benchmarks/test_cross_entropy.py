"""Cross-entropy of rows of logits against PyTorch: `pytest benchmarks/test_cross_entropy.py --benchmark-only`.

    eager       torch.nn.functional.cross_entropy
    compiled    the same under torch.compile, not with --toy
    fastft      fastft.ops.cross_entropy, whose gradient takes the place of the logits
    copy        a clone of the logits: one tensor of their size read, one written, and nothing computed: the floor

Forward and backward. Before each turn the logits are made anew, which is not timed: fastft uses them up.
The sides take turns while they are measured; each test then replays the times of its side for pytest-benchmark's table.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks._harness import Replay, elementwise, speedup
from fastft.ops import cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, VOCABULARY = 2048, 32_000
DTYPES = [torch.bfloat16, torch.float32]
SIDES = ["eager", "compiled", "fastft", "copy"]

replay = Replay()


def sides_of(rows, vocabulary, dtype, toy):
    """({side: f(round)}, what makes the logits anew)."""
    leaf = torch.randn(rows, vocabulary, device=DEVICE).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (rows,), device=DEVICE)
    logits = None

    def renew(_):
        nonlocal logits
        logits = None
        logits = leaf.clone()

    def run(function):
        def once(_):
            loss = function(logits, labels)
            return loss, *torch.autograd.grad(loss, logits)

        return once

    sides = {"eager": run(F.cross_entropy), "fastft": run(cross_entropy)}
    if not toy:
        torch.compiler.reset()  # each dtype is compiled anew
        sides["compiled"] = run(torch.compile(F.cross_entropy))
    results = []
    for name in ("fastft", "eager"):
        renew(0)
        results.append(sides[name](0))
    for ours, theirs in zip(*results, strict=True):
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < 8 * torch.finfo(dtype).eps, f"fastft differs from eager by {error:.1e}: nothing is timed"
    sides["copy"] = lambda _: logits.detach().clone()
    # What a side returns would be kept for the result: tensors are dropped instead.
    return {name: lambda number, side=side: (side(number), None)[1] for name, side in sides.items()}, renew


@pytest.fixture(scope="module")
def runs(request, compare):
    toy = request.config.getoption("--toy")
    sides, renew = sides_of(*((8, 64) if toy else (ROWS, VOCABULARY)), request.param, toy)
    return compare(sides, warmup=3, between=renew)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("runs", DTYPES, indirect=True, ids=str)
@pytest.mark.benchmark(timer=replay.clock)
def test_cross_entropy(request, benchmark, runs, side):
    if side not in runs:
        pytest.skip(f"{side} is not measured here")
    dtype = request.node.callspec.params["runs"]
    size = "toy" if request.config.getoption("--toy") else f"{ROWS} x {VOCABULARY}"
    benchmark.group = f"cross_entropy {size}, {dtype}, forward and backward"
    shape = (8, 64) if size == "toy" else (ROWS, VOCABULARY)
    benchmark.extra_info["work"] = elementwise(dtype, shape, tensors=2, operations=6)
    benchmark.extra_info["speedup_of_fastft"] = speedup(runs[side]["wall"], runs["fastft"]["wall"])
    replay(benchmark, runs[side]["wall"])
