"""SwiGLU and GEGLU kernels against float64: no worse than PyTorch in the same dtype, on memory that held NaN."""

import importlib
import importlib.util

import pytest
import torch

from fastft_kernels.cpp import extension
from fastft_kernels.reference.gated_activation import ACTIVATIONS
from fastft_kernels.reference.gated_activation import gated_activation as reference

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["cpp", "triton"])
def kernel(request):
    if request.param == "cpp" and extension.missing:
        pytest.skip(extension.missing)
    if request.param == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return importlib.import_module(f"fastft_kernels.{request.param}.gated_activation")


@pytest.fixture
def device(kernel):
    return "cuda" if kernel.__name__.startswith("fastft_kernels.triton") and torch.cuda.is_available() else "cpu"


def inputs(shape, dtype, device="cpu"):
    """dy, gate, up."""
    dy, gate, up = (torch.randn(shape, device=device) for _ in range(3))
    return dy.to(dtype), (3 * gate).to(dtype), up.to(dtype)


def compute(kernel, dy, gate, up, activation):
    return kernel.forward(gate, up, activation), *kernel.backward(dy, gate, up, activation)


def differentiate(dy, gate, up, activation, dtype):
    dy, gate, up = (t.detach().to(dtype) for t in (dy, gate, up))
    gate.requires_grad_(), up.requires_grad_()
    y = reference(gate, up, activation)
    return y, *torch.autograd.grad(y, (gate, up), dy)


def check(no_worse, kernel, dy, gate, up, activation):
    ours = compute(kernel, dy, gate, up, activation)
    plain = differentiate(dy, gate, up, activation, gate.dtype)
    exact = differentiate(dy, gate, up, activation, torch.float64)
    for name, *results in zip(("y", "dgate", "dup"), ours, plain, exact, strict=True):
        # act and its derivative have roots, near which their terms cancel.
        terms = {"y": gate * up, "dgate": dy * up, "dup": dy * gate}[name]
        no_worse(name, *results, scale=float(terms.abs().max()) if terms.numel() else 0.0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(19,), (1, 1), (3, 5, 33), (2, 1100)])
def test_forward_and_backward(kernel, device, no_worse, shape, dtype, activation):
    check(no_worse, kernel, *inputs(shape, dtype, device), activation)


@pytest.mark.parametrize("shape", [(0, 16), (3, 0), (2, 0, 8)])
def test_empty(kernel, device, shape):
    for result in compute(kernel, *inputs(shape, torch.float32, device), "silu"):
        assert result.shape == shape


def halves(x):
    """The same values as the right half of a wider matrix, as a fused projection leaves them."""
    return torch.cat((torch.full_like(x, float("nan")), x), -1)[..., x.shape[-1] :]


def misaligned(x):
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), float("nan"), dtype=x.dtype, device=x.device)
    wide[..., 3:-2] = x
    return wide[..., 3:-2]


def transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def repeated(x):
    return x[:1].expand(x.shape)


@pytest.mark.parametrize("layout", [halves, misaligned, transposed, repeated])
def test_any_strides(kernel, device, layout):
    strided = [layout(t) for t in inputs((7, 40), torch.bfloat16, device)]
    expected = compute(kernel, *(t.contiguous() for t in strided), "silu")
    for ours, contiguous in zip(compute(kernel, *strided, "silu"), expected, strict=True):
        assert ours.is_contiguous() and torch.equal(ours, contiguous)


def test_each_tensor_may_have_its_own_strides(kernel, device):
    tensors = inputs((7, 40), torch.bfloat16, device)
    expected = compute(kernel, *tensors, "gelu")
    for odd in range(3):
        mixed = [halves(t) if i == odd else t for i, t in enumerate(tensors)]
        for ours, contiguous in zip(compute(kernel, *mixed, "gelu"), expected, strict=True):
            assert torch.equal(ours, contiguous)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, in the interpreter
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_far_and_special_values(kernel, device, dtype, activation):
    """Far out the gate is closed or open; NaN stays NaN and stays where it is."""
    gate = torch.tensor([-2000.0, -100.0, 100.0, 2000.0, 0.0, float("nan")], device=device).to(dtype)
    up, dy = torch.full_like(gate, 2.0), torch.ones_like(gate)
    y, dgate, dup = compute(kernel, dy, gate, up, activation)
    opened = (gate > 0).to(dtype)
    assert torch.equal(y[:4], (2 * opened * gate)[:4]) and torch.equal(dup[:4], (opened * gate)[:4])
    assert torch.equal(dgate[:5], torch.tensor([0.0, 0.0, 2.0, 2.0, 1.0], device=device).to(dtype))
    assert y[4] == dup[4] == 0
    assert y[5].isnan() and dgate[5].isnan() and dup[5].isnan()
