"""RMSNorm kernels against float64: no worse than PyTorch in the same dtype, on memory that held NaN."""

import importlib
import importlib.util

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastft_kernels.cpp import extension
from fastft_kernels.reference.rms_norm import rms_norm as reference

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


@pytest.fixture(params=["cpp", "triton"])
def kernel(request):
    if request.param == "cpp" and extension.missing:
        pytest.skip(extension.missing)
    if request.param == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return importlib.import_module(f"fastft_kernels.{request.param}.rms_norm")


@pytest.fixture
def device(kernel):
    return "cuda" if kernel.__name__.startswith("fastft_kernels.triton") and torch.cuda.is_available() else "cpu"


def inputs(shape, dtype, device="cpu", weight_dtype=None):
    """x, residual, weight, dy, dh."""
    x, residual, dy, dh = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
    weight = (1 + 0.5 * torch.randn(shape[-1], device=device)).to(weight_dtype or dtype)
    return x, residual, weight, dy, dh


def differentiate(h, weight, dy, dh, offset, dtype=None):
    """y, dx, dweight of the reference without a residual, computed in `dtype`, by autograd; dh reaches x directly."""
    h, weight, dy, dh = (None if t is None else t.to(dtype or t.dtype) for t in (h, weight, dy, dh))
    h, weight = h.detach().requires_grad_(), weight.detach().requires_grad_()
    y = reference(h, weight, EPS, offset)
    loss = (y * dy).sum() if dh is None else (y * dy).sum() + (h * dh).sum()
    return y, *torch.autograd.grad(loss, (h, weight))


def compute(kernel, x, residual, weight, dy, dh, offset):
    """y, h, dx, dweight of the kernel; without a residual h is x."""
    y, h, rstd = kernel.forward(x, weight, EPS, offset, residual)
    h = x if residual is None else h
    return y, h, *kernel.backward(dy, dh, h, weight, rstd, offset, True)


def check(no_worse, kernel, x, residual, weight, dy, dh, offset):
    y, h, dx, dweight = compute(kernel, x, residual, weight, dy, dh, offset)
    if residual is not None:
        assert torch.equal(h, x + residual)
    plain = differentiate(h, weight, dy, dh, offset)
    exact = differentiate(h, weight, dy, dh, offset, torch.float64)
    rstd = (h.double().square().mean(-1, keepdim=True) + EPS).rsqrt()
    # dx is a difference, and dweight a sum over rows, of terms that may cancel.
    no_worse("y", y, plain[0], exact[0])
    no_worse("dx", dx, plain[1], exact[1], scale=largest(dy * (offset + weight) * rstd))
    no_worse("dweight", dweight, plain[2], exact[2], scale=largest(dy * h * rstd))


def largest(terms):
    return float(terms.abs().max()) if terms.numel() else 0.0


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(19,), (1, 1), (5, 1), (3, 5, 33), (37, 64), (2, 3, 1000), (70, 257)])
def test_forward_and_backward(kernel, device, no_worse, shape, dtype, offset, with_residual):
    x, residual, weight, dy, dh = inputs(shape, dtype, device)
    if not with_residual:
        residual = dh = None
    check(no_worse, kernel, x, residual, weight, dy, dh, offset)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_rounds_where_the_reference_does(kernel, device, dtype, offset):
    """The last bit of rstd may flip a rounding here and there; rounding at another place would change a third of y."""
    x, _, weight, _, _ = inputs((64, 128), dtype, device)
    y, _, _ = kernel.forward(x, weight, EPS, offset, None)
    assert (y != reference(x, weight, EPS, offset)).float().mean() < 0.01


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_float32_weight_of_a_bfloat16_layer(kernel, device, no_worse, offset):
    check(no_worse, kernel, *inputs((6, 96), torch.bfloat16, device, weight_dtype=torch.float32), offset)


@pytest.mark.parametrize("shape", [(0, 16), (3, 0), (2, 0, 8)])
def test_empty(kernel, device, shape):
    x, residual, weight, dy, dh = inputs(shape, torch.float32, device)
    y, h, dx, dweight = compute(kernel, x, residual, weight, dy, dh, 0.0)
    assert y.shape == h.shape == dx.shape == shape
    assert torch.equal(dweight, torch.zeros_like(weight))


def columns(x):
    """The same values, as columns 3... of a wider matrix: rows far apart and not aligned."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), float("nan"), dtype=x.dtype, device=x.device)
    wide[..., 3:-2] = x
    return wide[..., 3:-2]


def transposed(x):
    """The same values with the last dimension outermost in memory."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def repeated(x):
    """The first row, expanded without memory: stride 0."""
    return x[:1].expand(x.shape)


@pytest.mark.parametrize("layout", [columns, transposed, repeated])
def test_any_strides(kernel, device, layout):
    x, residual, weight, dy, dh = inputs((7, 40), torch.bfloat16, device)
    strided = [layout(t) for t in (x, residual, dy, dh)]
    x, residual, dy, dh = (t.contiguous() for t in strided)
    expected = compute(kernel, x, residual, weight, dy, dh, 0.0)
    x, residual, dy, dh = strided
    for ours, contiguous in zip(compute(kernel, x, residual, weight, dy, dh, 0.0), expected, strict=True):
        assert ours.is_contiguous() and torch.equal(ours, contiguous)


def test_gradient_of_a_sum_is_expanded(kernel, device):
    """y.sum().backward() hands over a single one, with all strides 0."""
    x, _, weight, _, _ = inputs((5, 24), torch.float32, device)
    ones = torch.ones((), device=device).expand(5, 24)
    *_, dx, dweight = compute(kernel, x, None, weight, ones, None, 0.0)
    *_, expected_dx, expected_dweight = compute(kernel, x, None, weight, ones.contiguous(), None, 0.0)
    assert torch.equal(dx, expected_dx) and torch.equal(dweight, expected_dweight)


def test_frozen_weight_costs_no_gradient(kernel, device):
    x, _, weight, dy, dh = inputs((40, 64), torch.float32, device)
    _, _, rstd = kernel.forward(x, weight, EPS, 0.0, None)
    dx, dweight = kernel.backward(dy, dh, x, weight, rstd, 0.0, True)
    dx_alone, nothing = kernel.backward(dy, dh, x, weight, rstd, 0.0, False)
    assert nothing is None and dweight is not None
    assert torch.equal(dx, dx_alone)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, in the interpreter
@pytest.mark.parametrize("in_weight", [1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(kernel, device, dtype, in_weight):
    """NaN and infinity stay in their row or column; a row of zeros gives zeros and a finite gradient."""
    x, _, weight, dy, _ = inputs((5, 33), dtype, device)
    x[1, 7], x[2, 7], x[3], weight[4] = float("nan"), float("inf"), 0.0, in_weight
    ours = compute(kernel, x, None, weight, dy, None, 0.0)
    plain = differentiate(x, weight, dy, None, 0.0)
    assert torch.equal(ours[0].isnan(), plain[0].isnan())
    assert torch.equal(ours[2].isfinite(), plain[1].isfinite())
    assert torch.equal(ours[0].isinf(), plain[0].isinf())
    finite = weight.isfinite()
    assert torch.equal(ours[0][3][finite], torch.zeros_like(x[3][finite]))


def test_large_values_do_not_overflow(kernel, device, no_worse):
    """Squares beyond float16's range, and a norm beyond it, are computed in float32."""
    x, residual, weight, dy, dh = inputs((4, 128), torch.float16, device)
    check(no_worse, kernel, x * 1000, residual * 1000, weight, dy, dh, 0.0)


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from(DTYPES),
    offset=st.sampled_from([0.0, 1.0]),
    with_residual=st.booleans(),
)
@pytest.mark.skipif(extension.missing is not None, reason=str(extension.missing))
def test_cpp_at_any_size(no_worse, rows, cols, dtype, weight_dtype, offset, with_residual):
    x, residual, weight, dy, dh = inputs((rows, cols), dtype, weight_dtype=weight_dtype)
    if not with_residual:
        residual = dh = None
    kernel = importlib.import_module("fastft_kernels.cpp.rms_norm")
    check(no_worse, kernel, x, residual, weight, dy, dh, offset)
