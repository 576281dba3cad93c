"""fastft.ops.swiglu and geglu: gradients, torch.compile and errors, through every backend that runs here."""

import pytest
import torch

import fastft
from fastft.ops import dispatch, geglu, swiglu
from fastft_kernels.reference.gated_activation import gated_activation as reference

OPS = {
    "silu": swiglu,
    "gelu": geglu,
    "gelu_tanh": lambda gate, up: geglu(gate, up, approximate="tanh"),
}


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request):
    reason = dispatch.unavailable(request.param)
    if reason:
        pytest.skip(reason)
    with fastft.backend(request.param):
        yield request.param


def leaves(shape=(2, 5, 24), dtype=torch.float32):
    return [torch.randn(shape).to(dtype).requires_grad_() for _ in range(2)]


def with_gradients(function, gate, up):
    y = function(gate, up)
    return y, *torch.autograd.grad(y.sin().sum(), (gate, up))


@pytest.mark.parametrize("activation", OPS)
def test_gradients(backend, activation):
    gate, up = leaves()
    expected = with_gradients(lambda g, u: reference(g, u, activation), gate, up)
    for ours, theirs in zip(with_gradients(OPS[activation], gate, up), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_inputs_get_no_gradient(backend, frozen):
    inputs = leaves()
    inputs[frozen].requires_grad_(False)
    swiglu(*inputs).sum().backward()
    assert inputs[frozen].grad is None and inputs[1 - frozen].grad.abs().sum() > 0


def test_compiles_into_one_graph(backend):
    torch.compiler.reset()
    gate, up = leaves()
    compiled = torch.compile(swiglu, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(with_gradients(compiled, gate, up), with_gradients(swiglu, gate, up), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_opcheck():
    if dispatch.unavailable("cpp"):
        pytest.skip(dispatch.unavailable("cpp"))
    torch.library.opcheck(torch.ops.fastft.gated_activation.default, (*leaves(), "gelu", "cpp"))


def test_bad_input():
    gate, up = leaves()
    with pytest.raises(ValueError, match="approximate is 'erf'"):
        geglu(gate, up, approximate="erf")
    with pytest.raises(ValueError, match="swiglu"):
        swiglu(gate, up[..., :3])
    with pytest.raises(ValueError, match="swiglu"):
        swiglu(gate, up.half())


@pytest.mark.parametrize("activation", OPS)
def test_the_layer(activation):
    gate, up = leaves()
    layer = fastft.nn.GatedActivation(activation)
    assert torch.equal(layer(gate, up), OPS[activation](gate, up))
    assert not layer.state_dict() and repr(layer) == f"GatedActivation({activation!r})"
