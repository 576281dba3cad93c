"""LayerNorm kernels against float64: no worse than PyTorch in the same dtype, on memory that held NaN."""

import importlib
import importlib.util

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastft_kernels.cpp import extension
from fastft_kernels.reference.layer_norm import layer_norm as reference

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5
SEED = 77


@pytest.fixture(params=["cpp", "triton"])
def kernel(request):
    if request.param == "cpp" and extension.missing:
        pytest.skip(extension.missing)
    if request.param == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return importlib.import_module(f"fastft_kernels.{request.param}.layer_norm")


@pytest.fixture
def device(kernel):
    return "cuda" if kernel.__name__.startswith("fastft_kernels.triton") and torch.cuda.is_available() else "cpu"


def inputs(shape, dtype, device="cpu", weight_dtype=None):
    """x, residual, weight, bias, dy, dh."""
    x, residual, dy, dh = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
    weight, bias = (torch.randn(shape[-1], device=device).to(weight_dtype or dtype) for _ in range(2))
    return x, residual, weight, bias, dy, dh


def compute(kernel, x, residual, weight, bias, dy, dh, p):
    """y, h, dx, dresidual, dweight, dbias of the kernel."""
    y, h, mean, rstd = kernel.forward(x, weight, bias, EPS, residual, p, SEED)
    h = x if h is None else h
    return y, h, *kernel.backward(dy, dh, h, weight, mean, rstd, p, SEED, residual is not None, True, bias is not None)


def differentiate(h, weight, bias, dy, dh, dtype):
    """y and the gradients of h, weight and bias of torch's own LayerNorm, computed in `dtype`; dh reaches h directly."""
    h, weight, bias, dy, dh = (None if t is None else t.detach().to(dtype) for t in (h, weight, bias, dy, dh))
    leaves = [t.requires_grad_() for t in (h, weight, bias) if t is not None]
    y = reference(h, weight, bias, EPS)
    loss = (y * dy).sum() if dh is None else (y * dy).sum() + (h * dh).sum()
    return y, *torch.autograd.grad(loss, leaves)


def check(no_worse, kernel, x, residual, weight, bias, dy, dh, p):
    y, h, dx, dresidual, dweight, dbias = compute(kernel, x, residual, weight, bias, dy, dh, p)
    if residual is not None or p:
        # The same sum of two numbers of float32, rounded once.
        first = reference(x, weight, bias, EPS, torch.zeros_like(x) if residual is None else residual, p, SEED)[1]
        assert torch.equal(h, first)
    plain = differentiate(h, weight, bias, dy, dh, h.dtype)
    exact = differentiate(h, weight, bias, dy, dh, torch.float64)
    wide = h.double()
    spread = (wide.var(-1, correction=0, keepdim=True) + EPS).sqrt()
    xhat = (wide - wide.mean(-1, keepdim=True)) / spread
    through = largest(dy * weight / spread)
    no_worse("y", y, plain[0], exact[0], scale=largest(xhat * weight))
    if p:
        mask = reference_mask(x, p)
        no_worse("dx", dx, plain[1] * mask.to(plain[1].dtype), exact[1] * mask, scale=through * float(mask.max()))
    else:
        no_worse("dx", dx, plain[1], exact[1], scale=through)
    if residual is not None:
        no_worse("dresidual", dresidual, plain[1], exact[1], scale=through)
    no_worse("dweight", dweight.to(h.dtype), plain[2], exact[2], scale=largest(dy * xhat))
    if bias is not None:
        no_worse("dbias", dbias.to(h.dtype), plain[3], exact[3], scale=largest(dy))


def reference_mask(x, p):
    """What dropout multiplies with, in float64."""
    ones = torch.ones_like(x, dtype=torch.float64)
    return reference(ones, ones[..., :].reshape(-1, x.shape[-1])[0], None, EPS, torch.zeros_like(ones), p, SEED)[1]


def largest(terms):
    return float(terms.abs().max()) if terms.numel() else 0.0


# Every pair of values occurs; the interpreter is slow.
CASES = [
    ((19,), torch.float32, True, 0.0),
    ((1, 1), torch.float32, True, 0.3),
    ((5, 1), torch.bfloat16, False, 0.0),
    ((3, 5, 33), torch.bfloat16, True, 0.3),
    ((37, 64), torch.bfloat16, True, 0.1),
    ((37, 64), torch.float16, True, 0.0),
    ((37, 64), torch.float32, False, 0.5),
    ((2, 3, 1000), torch.float16, True, 0.9),
    ((70, 257), torch.float32, True, 0.1),
    ((70, 257), torch.bfloat16, False, 0.1),
]


@pytest.mark.parametrize(("shape", "dtype", "with_residual", "p"), CASES)
def test_forward_and_backward(kernel, device, no_worse, shape, dtype, with_residual, p):
    x, residual, weight, bias, dy, dh = inputs(shape, dtype, device)
    if not with_residual:
        residual = dh = None
    check(no_worse, kernel, x, residual, weight, bias, dy, dh, p)


def test_without_a_bias(kernel, device, no_worse):
    x, residual, weight, _, dy, dh = inputs((6, 40), torch.float32, device)
    check(no_worse, kernel, x, residual, weight, None, dy, dh, 0.0)


def test_float32_weight_of_a_bfloat16_layer(kernel, device, no_worse):
    check(no_worse, kernel, *inputs((6, 96), torch.bfloat16, device, weight_dtype=torch.float32), 0.2)


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(0, 16), (3, 0)])
def test_empty(kernel, device, shape, p):
    x, residual, weight, bias, dy, dh = inputs(shape, torch.float32, device)
    y, h, dx, dresidual, dweight, dbias = compute(kernel, x, residual, weight, bias, dy, dh, p)
    assert y.shape == h.shape == dx.shape == dresidual.shape == shape
    assert torch.equal(dweight, torch.zeros_like(weight)) and torch.equal(dbias, dweight)


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
    x, residual, weight, bias, dy, dh = inputs((7, 40), torch.bfloat16, device)
    strided = [layout(t) for t in (x, residual, dy, dh)]
    x, residual, dy, dh = (t.contiguous() for t in strided)
    expected = compute(kernel, x, residual, weight, bias, dy, dh, 0.3)
    x, residual, dy, dh = strided
    for ours, contiguous in zip(compute(kernel, x, residual, weight, bias, dy, dh, 0.3), expected, strict=True):
        assert ours.is_contiguous() and torch.equal(ours, contiguous)


def test_what_is_not_asked_for_is_not_computed(kernel, device):
    x, residual, weight, bias, dy, dh = inputs((40, 64), torch.float32, device)
    _, h, mean, rstd = kernel.forward(x, weight, bias, EPS, residual, 0.5, SEED)
    run = lambda *needs: kernel.backward(dy, dh, h, weight, mean, rstd, 0.5, SEED, *needs)
    everything = run(True, True, True)
    for needs in ((False, False, False), (True, False, True), (False, True, False)):
        for needed, ours, expected in zip((True, *needs), run(*needs), everything, strict=True):
            assert torch.equal(ours, expected) if needed else ours is None


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, in the interpreter
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(kernel, device, dtype):
    """NaN and infinity stay in their row; a constant row gives the bias and a finite gradient."""
    x, _, weight, bias, dy, _ = inputs((5, 33), dtype, device)
    x[1, 7], x[2, 7], x[3] = float("nan"), float("inf"), 4.0
    y, _, dx, *_ = compute(kernel, x, None, weight, bias, dy, None, 0.0)
    assert y[1:3].isnan().all() and y[[0, 3, 4]].isfinite().all() and torch.equal(y[3], bias)
    assert dx[1:3].isnan().all() and dx[[0, 3, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_far_from_zero(kernel, device, no_worse, dtype):
    """A mean that is large beside the spread, and squares beyond float16's range."""
    x, residual, weight, bias, dy, dh = inputs((4, 128), dtype, device)
    check(no_worse, kernel, x * 100 + 1000, residual * 100, weight, bias, dy, dh, 0.0)


@settings(max_examples=50, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    p=st.sampled_from([0.0, 0.1, 0.5]),
    with_residual=st.booleans(),
)
@pytest.mark.skipif(extension.missing is not None, reason=str(extension.missing))
def test_cpp_at_any_size(no_worse, rows, cols, dtype, p, with_residual):
    x, residual, weight, bias, dy, dh = inputs((rows, cols), dtype)
    if not with_residual:
        residual = dh = None
    kernel = importlib.import_module("fastft_kernels.cpp.layer_norm")
    check(no_worse, kernel, x, residual, weight, bias, dy, dh, p)
