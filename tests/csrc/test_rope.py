"""csrc/cpu/rope.cpp: the same bits for every thread count and instruction set."""

import pytest
import torch

from fastft_kernels.cpp import extension

if extension.missing:
    pytest.skip(extension.missing, allow_module_level=True)

from fastft_kernels.cpp import rope

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def compute(tokens, heads, size, turned, dtype):
    generator = torch.Generator().manual_seed(tokens * size)
    q, k = torch.randn(2, 2, heads, tokens, size, generator=generator).to(dtype)
    cos, sin = torch.randn(2, 1, tokens, turned, generator=generator).to(dtype)
    return *rope.forward(q, k, cos, sin, 1), *rope.backward(q, k, cos, sin, 1)


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_thread_count(threads, dtype):
    threads(1)
    alone = compute(101, 8, 64, 64, dtype)
    for count in (2, 5):
        threads(count)
        assert all(map(torch.equal, compute(101, 8, 64, 64, dtype), alone))


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_instruction_set(instruction_set, dtype, isa):
    if isa not in extension.C.isas():
        pytest.skip(f"this CPU has no {isa}")
    for tokens, heads, size, turned in [(3, 1, 2, 2), (5, 3, 31, 26), (4, 2, 128, 128), (2, 2, 256, 192)]:
        instruction_set("scalar")
        expected = compute(tokens, heads, size, turned, dtype)
        instruction_set(isa)
        assert all(map(torch.equal, compute(tokens, heads, size, turned, dtype), expected))
