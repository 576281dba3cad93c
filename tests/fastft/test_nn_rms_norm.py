"""fastft.nn.RMSNorm against transformers' layers, on the same state dict."""

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import fastft
from fastft.nn import RMSNorm
from fastft.ops import dispatch

LAYERS = [(LlamaRMSNorm, 0.0), (GemmaRMSNorm, 1.0)]


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    if dispatch.unavailable(request.param):
        pytest.skip(dispatch.unavailable(request.param))
    with fastft.backend(request.param):
        yield request.param


def pair(theirs, offset, dtype):
    """Their layer and ours, with the same random weight."""
    theirs = theirs(96, eps=1e-5)
    ours = RMSNorm(96, eps=1e-5, offset=offset)
    assert torch.equal(ours.weight, theirs.weight)
    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(dtype), ours.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("theirs", "offset"), LAYERS)
def test_equals_transformers(backend, theirs, offset, dtype):
    theirs, ours = pair(theirs, offset, dtype)
    x = torch.randn(4, 7, 96).to(dtype).requires_grad_()
    dy = torch.randn(4, 7, 96).to(dtype)
    expected, y = theirs(x), ours(x)
    # The kernels add the squares of a row in another order: a few units in float32, where rounding flips two in half.
    near = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected, rtol=0 if backend == "reference" else near, atol=0)
    gradients = [
        torch.autograd.grad(result, (x, layer.weight), dy) for result, layer in ((y, ours), (expected, theirs))
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=8 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_adds_a_residual(backend):
    layer = RMSNorm(32)
    x, residual = torch.randn(2, 3, 32)
    y, h = layer(x, residual)
    assert torch.equal(h, x + residual) and torch.equal(y, layer(h))


def test_state_is_the_weight_alone():
    layer = RMSNorm(8, eps=1e-5, offset=1.0, dtype=torch.bfloat16)
    assert list(layer.state_dict()) == ["weight"] and layer.weight.dtype == torch.bfloat16
    assert repr(layer) == "RMSNorm(8, eps=1e-05, offset=1.0)"


def test_trains(backend):
    layer = RMSNorm(16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x, target = torch.randn(64, 16), torch.randn(16)
    losses = []
    for _ in range(20):
        loss = (layer(x) - layer(x).detach() * target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(torch.isfinite(torch.tensor(losses))) and layer.weight.grad.abs().min() > 0
