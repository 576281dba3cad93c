"""fastft.ops.dropout: the distribution of torch's dropout, from fewer random draws."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastft
from fastft.ops import dropout


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1 - 1e-7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics(p, dtype):
    """Share and scale of what is kept, and no more agreement between neighbours than chance gives."""
    y = dropout(torch.ones(1001, 201, dtype=dtype), p)
    kept = y > 0
    p = min(round(p * 65536), 65535) / 65536
    assert abs(kept.double().mean() - (1 - p)) <= 4 * (p * (1 - p) / y.numel()) ** 0.5
    torch.testing.assert_close(y[kept].double(), torch.full_like(y[kept], 1 / (1 - p)).double(), rtol=1e-6, atol=0)
    bits = kept.flatten()
    for step in (1, 2, 3, 4, 201):
        chance = p * p + (1 - p) ** 2
        agreement = (bits[step:] == bits[:-step]).double().mean()
        assert abs(agreement - chance) <= 5 * (chance * (1 - chance) / bits.numel()) ** 0.5


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (5, 7)])
def test_gradient_is_the_same_mask(shape):
    x = torch.randn(shape, requires_grad=True)
    y = dropout(x, 0.5)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.shape == x.shape
    torch.testing.assert_close(y, x * dx)


def test_torch_generator_and_checkpointing_decide_the_mask():
    x = torch.randn(50, requires_grad=True)
    torch.manual_seed(3)
    y = dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(y, dropout(x, 0.5)) and not torch.equal(y, dropout(x, 0.5))
    y = checkpoint(dropout, x, 0.5, use_reentrant=False)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y == 0, dx == 0)


def test_compiles_and_refuses():
    y = torch.compile(lambda x: dropout(x, 0.5), backend="aot_eager", fullgraph=True)(torch.ones(1000))
    assert 300 < (y == 0).sum() < 700 and (y.max() == 2).all()
    with pytest.raises(ValueError, match=r"p 1.0"):
        dropout(torch.ones(3), 1.0)
    with pytest.raises(ValueError, match=r"torch.int64"):
        dropout(torch.ones(3, dtype=torch.int64), 0.5)
    with fastft.backend("cpp"), pytest.raises(fastft.BackendError, match="dropout has no cpp kernel"):
        dropout(torch.ones(3), 0.5)
