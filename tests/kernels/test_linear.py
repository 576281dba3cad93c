"""The linear layer for CPUs without half-precision arithmetic, against fp64: no worse than PyTorch in the same dtype."""

import pytest
import torch
import torch.nn.functional as F

from fastft import ops
from fastft_kernels.reference.linear import linear as widened

SHAPES = [((5, 7), 3), ((2, 3, 16), 8), ((1, 1), 1), ((0, 4), 2), ((33, 65), 17)]


def compute(function, x, weight, bias, dy):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves)
    y.backward(dy.to(y.dtype))
    return [y, *(t.grad for t in leaves if t is not None)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("shape", "out"), SHAPES)
def test_no_worse_than_pytorch(dtype, with_bias, shape, out):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=g).to(dtype), torch.randn(out, shape[-1], generator=g).to(dtype)
    bias = torch.randn(out, generator=g).to(dtype) if with_bias else None
    dy = torch.randn(*shape[:-1], out, generator=g).to(dtype)
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    exact, plain, ours = (
        compute(*run)
        for run in ((F.linear, *wide, dy), (F.linear, x, weight, bias, dy), (widened, x, weight, bias, dy))
    )
    for e, p, o in zip(exact, plain, ours, strict=True):
        assert o.dtype == dtype and o.shape == e.shape
        if e.numel():
            rounding = torch.finfo(dtype).eps * e.abs().max()  # half a unit of the largest element, for either rounding
            assert (o.double() - e).abs().max() <= (p.double() - e).abs().max() + 0.5 * rounding


def test_frozen_weight_and_expanded_gradient():
    x = torch.randn(4, 6, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(3, 6, dtype=torch.bfloat16)
    widened(x, weight).sum().backward()
    torch.testing.assert_close(x.grad.float(), weight.float().sum(0).expand(4, 6), rtol=1e-2, atol=1e-2)
    assert weight.grad is None


@pytest.mark.parametrize("native", [True, False])
def test_chosen_by_the_cpu_not_by_the_caller(monkeypatch, native):
    import importlib

    module = importlib.import_module("fastft.ops.linear")
    called = []
    monkeypatch.setattr(module, "native", lambda dtype: native or dtype == torch.float32)
    monkeypatch.setattr(module, "widened", lambda *a: called.append(a) or widened(*a))
    x, weight = torch.randn(2, 3, dtype=torch.bfloat16), torch.randn(4, 3, dtype=torch.bfloat16)
    ops.linear(x, weight)
    ops.linear(x.float(), weight.float())
    assert len(called) == (not native)
