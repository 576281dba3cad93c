"""csrc/cpu/gated_activation.cpp: the same bits for every thread count and instruction set."""

import pytest
import torch

from fastft_kernels.cpp import extension

if extension.missing:
    pytest.skip(extension.missing, allow_module_level=True)

from fastft_kernels.cpp import gated_activation
from fastft_kernels.reference.gated_activation import ACTIVATIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def compute(rows, cols, dtype, activation, strided):
    generator = torch.Generator().manual_seed(rows * cols)
    dy, gate, up = (3 * torch.randn(3, rows, cols + 7 * strided, generator=generator)).to(dtype)[..., :cols]
    return gated_activation.forward(gate, up, activation), *gated_activation.backward(dy, gate, up, activation)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def instruction_set():
    before = extension.C.isa()
    yield extension.C.set_isa
    extension.C.set_isa(before)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_thread_count(threads, dtype, strided):
    threads(1)
    alone = compute(333, 500, dtype, "silu", strided)
    for count in (2, 5):
        threads(count)
        for ours, expected in zip(compute(333, 500, dtype, "silu", strided), alone, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_instruction_set(instruction_set, dtype, activation, isa):
    if isa not in extension.C.isas():
        pytest.skip(f"this CPU has no {isa}")
    for rows, cols in [(3, 1), (5, 31), (4, 127), (20, 1000)]:
        instruction_set("scalar")
        expected = compute(rows, cols, dtype, activation, True)
        instruction_set(isa)
        for ours, scalar in zip(compute(rows, cols, dtype, activation, True), expected, strict=True):
            assert torch.equal(ours, scalar)
