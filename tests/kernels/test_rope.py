"""RoPE kernels against float64: no worse than PyTorch in the same dtype, on memory that held NaN."""

import importlib
import importlib.util

import pytest
import torch

from fastft_kernels.cpp import extension
from fastft_kernels.reference.rope import rope as reference

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["cpp", "triton"])
def kernel(request):
    if request.param == "cpp" and extension.missing:
        pytest.skip(extension.missing)
    if request.param == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return importlib.import_module(f"fastft_kernels.{request.param}.rope")


@pytest.fixture
def device(kernel):
    return "cuda" if kernel.__name__.startswith("fastft_kernels.triton") and torch.cuda.is_available() else "cpu"


def inputs(q_shape, k_shape, angles_shape, dtype, device="cpu", angles_dtype=None):
    """(dq, dk), q, k, cos, sin; the halves of cos and sin differ, as the equation allows."""
    q, dq = torch.randn(2, *q_shape, device=device).to(dtype)
    k, dk = torch.randn(2, *k_shape, device=device).to(dtype)
    angles = 10 * torch.rand(angles_shape, device=device)
    return (dq, dk), q, k, angles.cos().to(angles_dtype or dtype), angles.sin().to(angles_dtype or dtype)


def compute(kernel, gradients, q, k, cos, sin, head_dim):
    return *kernel.forward(q, k, cos, sin, head_dim), *kernel.backward(*gradients, cos, sin, head_dim)


def differentiate(gradients, q, k, cos, sin, head_dim):
    q, k = (x.detach().requires_grad_() for x in (q, k))
    results = reference(q, k, cos, sin, head_dim)
    return *results, *torch.autograd.grad(results, (q, k), gradients)


def check(no_worse, kernel, gradients, q, k, cos, sin, head_dim):
    ours = compute(kernel, gradients, q, k, cos, sin, head_dim)
    plain = differentiate(gradients, q, k, cos, sin, head_dim)
    wide = [x.double() for x in (q, k, cos, sin)]
    exact = differentiate([x.double() for x in gradients], *wide, head_dim)
    for name, *results in zip(("q", "k", "dq", "dk"), ours, plain, exact, strict=True):
        no_worse(name, *results)


# q, k, cos and sin, the dimension of heads: all layouts, grouped heads, one row of angles for all, partial rotation.
SHAPES = [
    ((2, 4, 5, 16), (2, 2, 5, 16), (1, 5, 16), 1),
    ((2, 5, 3, 64), (2, 5, 3, 64), (2, 5, 64), 2),
    ((7, 4, 32), (7, 1, 32), (7, 20), 1),
    ((3, 6, 150), (2, 6, 150), (6, 144), 0),
    ((1, 1, 1, 3), (1, 1, 1, 3), (1, 1, 2), 1),
    ((1, 2, 3, 128), (1, 1, 3, 128), (1, 3, 128), 1),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("q", "k", "angles", "head_dim"), SHAPES)
def test_forward_and_backward(kernel, device, no_worse, q, k, angles, head_dim, dtype):
    check(no_worse, kernel, *inputs(q, k, angles, dtype, device), head_dim)


@pytest.mark.parametrize(("dtype", "angles_dtype"), [(DTYPES[1], DTYPES[0]), (DTYPES[0], DTYPES[1])])
def test_angles_of_another_dtype(kernel, device, no_worse, dtype, angles_dtype):
    check(no_worse, kernel, *inputs(*SHAPES[0][:3], dtype, device, angles_dtype), 1)


def test_backward_is_the_transpose_and_undoes_a_rotation(kernel, device):
    (dq, dk), q, k, cos, sin = inputs(*SHAPES[1][:3], torch.float32, device)
    turned = kernel.forward(q, k, cos, sin, 2)
    back = kernel.backward(dq, dk, cos, sin, 2)
    for x, y, dx, dy in zip((q, k), turned, back, (dq, dk), strict=True):
        torch.testing.assert_close((y * dy).sum(), (x * dx).sum(), rtol=1e-4, atol=1e-4)
    cos, sin = (torch.cat(2 * [x[..., :32]], -1) for x in (cos, sin))
    for x, again in zip((q, k), kernel.backward(*kernel.forward(q, k, cos, sin, 2), cos, sin, 2), strict=True):
        torch.testing.assert_close(again, x)


@pytest.mark.parametrize(
    ("q", "k", "angles"),
    [
        ((0, 2, 3, 8), (0, 1, 3, 8), (1, 3, 8)),
        ((2, 2, 0, 8), (2, 1, 0, 8), (2, 0, 8)),
        ((2, 0, 3, 8), (2, 1, 3, 8), (2, 3, 8)),
    ],
)
def test_empty(kernel, device, q, k, angles):
    for result, shape in zip(compute(kernel, *inputs(q, k, angles, torch.float32, device), 1), 2 * [q, k], strict=True):
        assert result.shape == shape and result.isfinite().all()


def by_token(x):
    """In memory as transformers has it: [B, S, H, D], seen as [B, H, S, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def part_of_a_projection(x):
    wide = torch.full((*x.shape[:-1], 3 * x.shape[-1] + 1), float("nan"), dtype=x.dtype, device=x.device)
    wide[..., 1 : x.shape[-1] + 1] = x
    return wide[..., 1 : x.shape[-1] + 1]


def transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def repeated(x):
    return x[:1, :1, :1, :1].expand(x.shape)


@pytest.mark.parametrize("layout", [by_token, part_of_a_projection, transposed, repeated])
def test_any_strides(kernel, device, layout):
    gradients, q, k, cos, sin = inputs(*SHAPES[0][:3], torch.bfloat16, device)
    gradients, q, k = [layout(x) for x in gradients], layout(q), layout(k)
    cos, sin = (layout(x[None])[0] if layout is not repeated else x for x in (cos, sin))
    expected = compute(kernel, *([x.contiguous() for x in gradients], *(x.contiguous() for x in (q, k, cos, sin))), 1)
    results = compute(kernel, gradients, q, k, cos, sin, 1)
    for ours, contiguous in zip(results, expected, strict=True):
        assert torch.equal(ours, contiguous)
    if layout is by_token:
        assert all(x.stride() == q.stride() for x in (results[0], results[2])), "results lie in memory as q does"


def test_rows_of_angles_that_all_share(kernel, device):
    """cos and sin expanded over the batch, or over the tokens."""
    gradients, q, k, cos, sin = inputs(*SHAPES[0][:3], torch.float32, device)
    expected = compute(kernel, gradients, q, k, cos, sin, 1)
    expanded = compute(kernel, gradients, q, k, cos.expand(2, 5, 16), sin.expand(2, 5, 16), 1)
    assert all(map(torch.equal, expanded, expected))
    same = [x[:, :1].expand(1, 5, 16) for x in (cos, sin)]
    copied = [x.contiguous() for x in same]
    assert all(
        map(torch.equal, compute(kernel, gradients, q, k, *same, 1), compute(kernel, gradients, q, k, *copied, 1))
    )


def test_special_values_stay_where_they_are(kernel, device):
    _, q, k, cos, sin = inputs(*SHAPES[2][:3], torch.bfloat16, device)
    q[0, 0, 3], q[1, 0, 25] = float("nan"), float("inf")
    y, _ = kernel.forward(q, k, cos, sin, 1)
    bad = ~y.isfinite()
    assert y[0, 0, 3].isnan() and y[0, 0, 13].isnan() and y[1, 0, 25] == float("inf") and bad.sum() == 3
