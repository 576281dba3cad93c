"""One optimizer step over 64 million parameters: `pytest benchmarks/test_adamw.py --benchmark-only`.

    torch           torch.optim.AdamW(fused=True), float32 state
    deepspeed       DeepSpeedCPUAdam, float32 state, where it can be compiled
    bitsandbytes    its AdamW8bit, where it is installed
    fastft          fastft.optim.AdamW, float32 state
    fastft 8-bit    fastft.optim.AdamW8bit; and Lion8bit
    copy            a copy of as many bytes as the 8-bit step moves (10 read, 6 written per parameter)

The sides take turns while they are measured; each test then replays the times of its side for pytest-benchmark's table.
"""

import pytest
import torch

from benchmarks._harness import Replay, speedup
from benchmarks.test_linear_cross_entropy import peak_mb
from fastft.optim import AdamW, AdamW8bit, Lion8bit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PARAMETERS = 2**26
SIDES = ["torch", "deepspeed", "bitsandbytes", "fastft", "fastft 8-bit", "fastft lion 8-bit", "copy"]

replay = Replay()


def optimizers(toy):
    """{side: a function of the parameters that makes its optimizer}; a side that cannot run here is left out."""
    made = {
        "torch": lambda ps: torch.optim.AdamW(ps, fused=True),
        "fastft": AdamW,
        "fastft 8-bit": AdamW8bit,
        "fastft lion 8-bit": Lion8bit,
    }
    try:
        from bitsandbytes.optim import AdamW8bit as theirs

        made["bitsandbytes"] = theirs
    except ImportError:
        pass
    if DEVICE == "cpu" and not toy:  # its compilation takes a minute
        try:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            DeepSpeedCPUAdam([torch.nn.Parameter(torch.zeros(8))])
            made["deepspeed"] = DeepSpeedCPUAdam
        except Exception as error:  # whatever its compilation on the spot may raise
            print(f"DeepSpeedCPUAdam cannot be built here: {error}")
    return made


def sides_of(n, toy=False):
    weight = torch.nn.Parameter(torch.randn(n, device=DEVICE))
    weight.grad = torch.randn_like(weight).mul_(1e-3)  # no temporary: the peak of memory is looked at
    state = sum(t.nbytes for t in sides_state(AdamW8bit([weight]), weight))
    assert state <= 2.1 * n + 4096, f"{state / n} bytes of state per parameter"
    sides = {}
    for name, make in optimizers(toy).items():
        optimizer = make([weight])
        optimizer.step()
        sides[name] = lambda _, optimizer=optimizer: optimizer.step() and None
    source = torch.zeros(n * 2, dtype=torch.int32, device=DEVICE)
    target = torch.empty_like(source)
    sides["copy"] = lambda _: (target.copy_(source), None)[1]
    return sides


def sides_state(optimizer, weight):
    """The state tensors after a step; the step itself allocates next to nothing, which is checked too."""
    optimizer.step()
    grown = peak_mb(lambda _: optimizer.step())
    assert grown is None or grown < 1, f"a step took {grown} MB more memory"
    return [t for t in optimizer.state[weight].values() if torch.is_tensor(t)]


@pytest.fixture(scope="module")
def runs(request, compare):
    toy = request.config.getoption("--toy")
    sides = sides_of(1000 if toy else PARAMETERS, toy)
    return compare(sides, warmup=2)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.benchmark(timer=replay.clock)
def test_adamw(request, benchmark, runs, side):
    if side not in runs:
        pytest.skip(f"{side} is not installed, or cannot be built here")
    n = 1000 if request.config.getoption("--toy") else PARAMETERS
    benchmark.group = f"optimizer step, {n:,} parameters"
    for name in ("fastft", "fastft 8-bit"):
        benchmark.extra_info[f"speedup_of_{name}"] = speedup(runs[side]["wall"], runs[name]["wall"])
    replay(benchmark, runs[side]["wall"])
