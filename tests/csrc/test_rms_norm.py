"""csrc/cpu/rms_norm.cpp: the same bits for every thread count and instruction set."""

import pytest
import torch

from fastft_kernels.cpp import extension

if extension.missing:
    pytest.skip(extension.missing, allow_module_level=True)

from fastft_kernels.cpp import rms_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def compute(rows, cols, dtype):
    generator = torch.Generator().manual_seed(rows * cols)
    x, residual, dy, dh = (torch.randn(rows, cols, generator=generator).to(dtype) for _ in range(4))
    weight = torch.randn(cols, generator=generator).to(dtype)
    y, h, rstd = rms_norm.forward(x, weight, 1e-6, 0.0, residual)
    return y, h, rstd, *rms_norm.backward(dy, dh, h, weight, rstd, 0.0, True)


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


# Enough elements for 5 threads to be woken, and rows that 5 does not divide.
@pytest.mark.parametrize("rows, cols", [(333, 500), (5000, 33)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_thread_count(threads, dtype, rows, cols):
    threads(1)
    alone = compute(rows, cols, dtype)
    for count in (2, 5):
        threads(count)
        for ours, expected in zip(compute(rows, cols, dtype), alone, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_instruction_set(instruction_set, dtype, isa):
    if isa not in extension.C.isas():
        pytest.skip(f"this CPU has no {isa}")
    for rows, cols in [(3, 1), (5, 31), (7, 32), (4, 127), (20, 1000)]:
        instruction_set("scalar")
        expected = compute(rows, cols, dtype)
        instruction_set(isa)
        for ours, scalar in zip(compute(rows, cols, dtype), expected, strict=True):
            assert torch.equal(ours, scalar)
