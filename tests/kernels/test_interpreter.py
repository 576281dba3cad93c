"""The bfloat16 repair of Triton's interpreter gives torch's numbers, bit for bit."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU, not in the interpreter")


@triton.jit
def arithmetic_kernel(a_ptr, b_ptr, sum_ptr, product_ptr, rounded_ptr, total_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(sum_ptr + i, a + b)
    tl.store(product_ptr + i, a * b)
    tl.store(rounded_ptr + i, a.to(tl.float32) / 3)
    tl.store(total_ptr, tl.sum(a.to(tl.float32)))


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tile = i[:, None] * N + i[None, :]
    tl.store(c_ptr + tile, tl.dot(tl.load(a_ptr + tile), tl.load(b_ptr + tile)))


def test_elementwise_and_rounding_are_torchs():
    a, b = torch.randn(2, 256).bfloat16()
    total, (added, product, rounded) = torch.empty(1), torch.empty(3, 256, dtype=torch.bfloat16)
    arithmetic_kernel[(1,)](a, b, added, product, rounded, total, N=256)
    assert torch.equal(added, a + b)
    assert torch.equal(product, a * b)
    assert torch.equal(rounded, (a.float() / 3).bfloat16())
    torch.testing.assert_close(total[0], a.float().sum())


def test_dot_accumulates_in_float32():
    a, b = torch.randn(2, 16, 16).bfloat16()
    c = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, c, N=16)
    torch.testing.assert_close(c, a.float() @ b.float())
