"""The loss of a language model, forward and backward: `pytest benchmarks/test_linear_cross_entropy.py --benchmark-only`.

    eager       logits, in fp32 as transformers turns them, torch.nn.functional.cross_entropy
    compiled    the same under torch.compile, not with --toy
    fastft      fastft.ops.linear_cross_entropy
    products    the products that eager takes, over all rows: its floor, and no floor of one that leaves ignored rows out

Half of the labels are ignored, as where prompts are not trained. `peak_mb` is what a pass needs beyond its arguments.
The sides take turns while they are measured; each test then replays the times of its side for pytest-benchmark's table.
"""

import sys

import pytest
import torch
import torch.nn.functional as F

from benchmarks._harness import Replay, multiplied_dtype, speedup, work
from fastft.ops import linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, HIDDEN = (8192, 4096) if DEVICE == "cuda" else (2048, 512)
VOCABULARIES = [32_000, 128_256]
HEADS = ["frozen", "trained"]
SIDES = ["eager", "compiled", "fastft", "products"]

replay = Replay()


def eager(hidden, weight, labels):
    return F.cross_entropy((hidden @ weight.T).float(), labels)


def products(hidden, weight, g):
    logits = hidden.detach() @ weight.detach().T
    return [logits, g @ weight.detach(), *([g.T @ hidden.detach()] if weight.requires_grad else [])]


def sides_of(vocabulary, head, toy):
    """{side: f(round)}."""
    rows, size = (32, 16) if toy else (ROWS, HIDDEN)
    dtype = multiplied_dtype()
    hidden = torch.randn(rows, size, device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, size, device=DEVICE) * size**-0.5).to(dtype).requires_grad_(head == "trained")
    labels = torch.randint(vocabulary, (rows,), device=DEVICE)
    labels[torch.randperm(rows, device=DEVICE)[: rows // 2]] = -100
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    g = torch.randn(rows, vocabulary, device=DEVICE).to(dtype)

    def run(function):
        return lambda _: torch.autograd.grad(function(hidden, weight, labels), leaves)

    sides = {"eager": run(eager), "fastft": run(linear_cross_entropy)}
    if not toy:
        torch.compiler.reset()
        sides["compiled"] = run(torch.compile(eager))
    for ours, theirs in zip(sides["fastft"](0), sides["eager"](0), strict=True):
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < 4 * torch.finfo(dtype).eps, f"fastft differs from eager by {error:.1e}: nothing is timed"
    sides["products"] = lambda _: products(hidden, weight, g)
    # What a side returns would be kept for the result: tensors are dropped instead.
    return {name: lambda number, side=side: (side(number), None)[1] for name, side in sides.items()}


def peak_mb(side):
    """Memory that one call of `side` needs at once beyond what is there before; None where the system does not tell."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side(0)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if sys.platform != "linux":
        return None
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forgets the highest resident size so far
    before = _status("VmRSS")
    side(0)
    return (_status("VmHWM") - before) / 1e3


def _status(name):
    """A line of /proc/self/status in kB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))


@pytest.fixture(scope="module")
def runs(request, compare):
    vocabulary, head = request.param
    toy, full = (request.config.getoption(option) for option in ("--toy", "--full"))
    if vocabulary != VOCABULARIES[0] and not full:
        pytest.skip(f"a vocabulary of {vocabulary:,} is measured with --full only")
    sides = sides_of(64 if toy else vocabulary, head, toy)
    runs = compare(sides, warmup=1)
    return {name: run | {"peak_mb": peak_mb(sides[name])} for name, run in runs.items()}


CASES = [(vocabulary, head) for vocabulary in VOCABULARIES for head in HEADS]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("runs", CASES, indirect=True, ids=lambda case: f"{case[0]}-{case[1]}")
@pytest.mark.benchmark(timer=replay.clock)
def test_linear_cross_entropy(request, benchmark, runs, side):
    vocabulary, head = request.node.callspec.params["runs"]
    if side not in runs:
        pytest.skip(f"{side} is not measured here")
    size = "toy" if request.config.getoption("--toy") else f"{ROWS} x {HIDDEN} x {vocabulary}"
    benchmark.group = f"linear_cross_entropy {size}, {multiplied_dtype()}, {head} head, half the labels ignored"
    benchmark.extra_info["speedup_of_fastft"] = speedup(runs[side]["wall"], runs["fastft"]["wall"])
    benchmark.extra_info["peak_mb"] = runs[side]["peak_mb"]
    rows, hidden, columns = (32, 16, 64) if size == "toy" else (ROWS, HIDDEN, vocabulary)
    products = 3 if head == "trained" else 2  # over the rows whose label is not ignored
    dtype, tensors = multiplied_dtype(), products * hidden * (rows + columns)
    flops = products * 2 * rows // 2 * hidden * columns
    benchmark.extra_info["work"] = work(dtype, moved=tensors * dtype.itemsize, flops=flops)
    replay(benchmark, runs[side]["wall"])
