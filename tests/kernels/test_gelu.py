"""GELU kernels against float64: no worse than PyTorch in the same dtype, on memory that held NaN."""

import importlib
import importlib.util

import pytest
import torch

from fastft_kernels.cpp import extension
from fastft_kernels.reference.gelu import gelu as reference

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
APPROXIMATIONS = ["none", "tanh"]


@pytest.fixture(params=["cpp", "triton"])
def kernel(request):
    if request.param == "cpp" and extension.missing:
        pytest.skip(extension.missing)
    if request.param == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return importlib.import_module(f"fastft_kernels.{request.param}.gelu")


@pytest.fixture
def device(kernel):
    return "cuda" if kernel.__name__.startswith("fastft_kernels.triton") and torch.cuda.is_available() else "cpu"


def inputs(shape, dtype, device="cpu"):
    """dy, x, bias."""
    dy, x = (torch.randn(shape, device=device) for _ in range(2))
    return dy.to(dtype), (3 * x).to(dtype), torch.randn(shape[-1], device=device).to(dtype)


def compute(kernel, dy, x, bias, approximate):
    dx, dbias = kernel.backward(dy, x, bias, approximate, bias is not None)
    return (
        (kernel.forward(x, bias, approximate), dx)
        if bias is None
        else (kernel.forward(x, bias, approximate), dx, dbias)
    )


def differentiate(dy, x, bias, approximate, dtype):
    dy, x, bias = (None if t is None else t.detach().to(dtype) for t in (dy, x, bias))
    leaves = [t.requires_grad_() for t in (x, bias) if t is not None]
    y = reference(x, bias, approximate)
    return y, *torch.autograd.grad(y, leaves, dy)


def check(no_worse, kernel, dy, x, bias, approximate):
    ours = compute(kernel, dy, x, bias, approximate)
    plain = differentiate(dy, x, bias, approximate, x.dtype)
    exact = differentiate(dy, x, bias, approximate, torch.float64)
    for name, *results in zip(("y", "dx", "dbias"), ours, plain, exact, strict=False):
        # gelu and its derivative have roots, and a sum over rows may vanish: near them the terms cancel.
        terms = {"y": x if bias is None else x.abs() + bias.abs(), "dx": dy, "dbias": dy.abs().sum(0)}[name]
        no_worse(name, *results, scale=float(terms.abs().max()) if terms.numel() else 0.0)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "biased"), [((1, 1), True), ((19,), False), ((3, 5, 33), True), ((70, 130), True), ((2, 1100), False)]
)
def test_forward_and_backward(kernel, device, no_worse, shape, biased, dtype, approximate):
    dy, x, bias = inputs(shape, dtype, device)
    check(no_worse, kernel, dy, x, bias if biased else None, approximate)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value(kernel, device, no_worse, dtype, approximate):
    """From where gelu is 0 to where it is x, in steps finer than 16 bits; both sides of every case distinction."""
    x = torch.linspace(-14, 14, 2801, device=device).to(dtype)
    check(no_worse, kernel, torch.ones_like(x), x, None, approximate)


def test_a_bias_of_another_dtype(kernel, device):
    dy, x, bias = inputs((9, 40), torch.bfloat16, device)
    y, dx, dbias = compute(kernel, dy, x, bias.float(), "none")
    same = compute(kernel, dy, x, bias, "none")
    assert torch.equal(y, same[0]) and torch.equal(dx, same[1])
    assert dbias.dtype == torch.float32 and torch.equal(dbias.bfloat16(), same[2])


def test_the_gradient_of_the_bias_is_summed_in_float32(kernel, device):
    """601 ones, of which a sum in bfloat16 would keep 256."""
    x = torch.full((601, 3), 20.0, device=device).bfloat16()
    _, dbias = kernel.backward(torch.ones_like(x), x, torch.zeros(3, device=device), "none", True)
    assert torch.equal(dbias, torch.full((3,), 601.0, device=device))


def test_a_frozen_bias_gets_no_gradient(kernel, device):
    dy, x, bias = inputs((5, 40), torch.float32, device)
    dx, dbias = kernel.backward(dy, x, bias, "none", False)
    assert dbias is None and torch.equal(dx, kernel.backward(dy, x, bias, "none", True)[0])


@pytest.mark.parametrize("shape", [(0, 16), (3, 0), (2, 0, 8)])
def test_empty(kernel, device, shape):
    dy, x, bias = inputs(shape, torch.float32, device)
    y, dx, dbias = compute(kernel, dy, x, bias, "none")
    assert y.shape == dx.shape == shape and torch.equal(dbias, torch.zeros_like(bias))


def misaligned(x):
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), float("nan"), dtype=x.dtype, device=x.device)
    wide[..., 3:-2] = x
    return wide[..., 3:-2]


def transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def repeated(x):
    return x[:1].expand(x.shape)


@pytest.mark.parametrize("layout", [misaligned, transposed, repeated])
def test_any_strides(kernel, device, layout):
    dy, x, bias = inputs((7, 90), torch.bfloat16, device)
    for strided in ((layout(dy), x), (dy, layout(x)), (layout(dy), layout(x))):
        args = (*strided, bias.repeat_interleave(2)[::2], "tanh")
        expected = compute(kernel, *(t.contiguous() for t in args[:3]), "tanh")
        for ours, contiguous in zip(compute(kernel, *args), expected, strict=True):
            assert ours.is_contiguous() and torch.equal(ours, contiguous)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, in the interpreter
@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_far_and_special_values(kernel, device, dtype, approximate):
    """Far out gelu is 0 or x; NaN stays NaN and stays where it is."""
    x = torch.tensor([-2000.0, -100.0, 100.0, 2000.0, 0.0, float("nan")], device=device).to(dtype)
    y, dx = compute(kernel, torch.ones_like(x), x, None, approximate)
    assert torch.equal(y[:5], x[:5].relu())
    assert torch.equal(dx[:5], torch.tensor([0.0, 0.0, 1.0, 1.0, 0.5], device=device).to(dtype))
    assert y[5].isnan() and dx[5].isnan()
