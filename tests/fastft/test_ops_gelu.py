"""fastft.ops.gelu and fastft.nn.GELU: gradients, torch.compile, autocast and errors, through every backend that runs here."""

import pytest
import torch

import fastft
from fastft.nn import GELU
from fastft.ops import dispatch, gelu
from fastft_kernels.reference.gelu import gelu as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request):
    torch.compiler.reset()
    reason = dispatch.unavailable(request.param)
    if reason:
        pytest.skip(reason)
    with fastft.backend(request.param):
        yield request.param


@pytest.fixture
def device(backend):
    return DEVICE if backend == "triton" else "cpu"


def kernel(name):
    if dispatch.unavailable(name):
        pytest.skip(dispatch.unavailable(name))
    return pytest.importorskip(f"fastft_kernels.{name}.gelu")


def leaves(device="cpu", dtype=torch.float32, shape=(2, 5, 24)):
    return [torch.randn(size, device=device).to(dtype).requires_grad_() for size in (shape, shape[-1:])]


def with_gradients(function, *args):
    y = function(*args)
    return y, *torch.autograd.grad(y.sin().sum(), args)


def close(ours, others):
    for a, b in zip(ours, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gradients(backend, device, approximate):
    x, bias = leaves(device)
    run = lambda x, b=None: gelu(x, b, approximate=approximate)
    close(with_gradients(run, x, bias), with_gradients(lambda x, b: reference(x, b, approximate), x, bias))
    close(with_gradients(run, x), with_gradients(lambda x: reference(x, None, approximate), x))


def test_gradients_numerically():
    args = [t.detach().double().requires_grad_() for t in leaves(shape=(3, 7))]
    assert torch.autograd.gradcheck(gelu, args) and torch.autograd.gradgradcheck(gelu, args)


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_arguments_get_no_gradient(backend, device, frozen):
    args = leaves(device)
    args[frozen].requires_grad_(False)
    gelu(*args).sum().backward()
    assert args[frozen].grad is None and args[1 - frozen].grad.abs().sum() > 0


def test_kernel_is_not_asked_for_the_gradient_of_a_frozen_bias(monkeypatch):
    cpp, asked = kernel("cpp"), []
    backward = cpp.backward
    monkeypatch.setattr(cpp, "backward", lambda *args: asked.append(args[-1]) or backward(*args))
    for trained in (True, False):
        x, bias = leaves()
        with fastft.backend("cpp"):
            gelu(x, bias.requires_grad_(trained)).sum().backward()
    assert asked == [True, False]


def test_saves_only_its_inputs():
    kernel("cpp")
    x, bias = leaves()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), fastft.backend("cpp"):
        gelu(x, bias)
    assert [t.data_ptr() for t in saved] == [x.data_ptr(), bias.data_ptr()]


def test_second_derivatives_are_refused():
    kernel("cpp")
    x, bias = leaves()
    with fastft.backend("cpp"):
        (dx,) = torch.autograd.grad(gelu(x, bias).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice.*once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_dtype_of_x(backend, device, dtype):
    x, bias = leaves(device, dtype)[0], leaves(device)[1]
    with torch.autocast(device, torch.bfloat16):
        y = gelu(x, bias)
        compiled = torch.compile(gelu, backend="aot_eager", fullgraph=True)(x, bias)
    assert y.dtype == compiled.dtype == dtype
    y.float().sum().backward()
    assert x.grad.dtype == dtype and bias.grad.dtype == torch.float32


@pytest.mark.parametrize("biased", [True, False])
def test_compiles_into_one_graph(backend, device, biased):
    args = leaves(device)[: 1 + biased]
    close(with_gradients(torch.compile(gelu, backend="aot_eager", fullgraph=True), *args), with_gradients(gelu, *args))


@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_custom_ops_obey_the_rules(name):
    kernel(name)
    x, bias = leaves(DEVICE if name == "triton" else "cpu")
    for b in (None, bias):
        torch.library.opcheck(torch.ops.fastft.gelu.default, (x, b, "tanh", name))
        args = (torch.randn_like(x), x.detach(), None if b is None else b.detach(), "none", b is not None, name)
        torch.library.opcheck(torch.ops.fastft.gelu_backward.default, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, b: (x.long(), b), "x is .* of torch.int64; it must be .* of a floating dtype"),
        (lambda x, b: (x[0, 0, 0], None), r"x is \[\]"),
        (lambda x, b: (x, b[1:]), r"bias is \[23\] .* it must be \[24\]"),
        (lambda x, b: (x, b.to("meta")), "on meta; .* on cpu"),
    ],
)
def test_bad_arguments(change, message):
    x, bias = change(*(t.detach() for t in leaves()))
    with pytest.raises(ValueError, match=message):
        gelu(x, bias)


def test_bad_approximation():
    for call in (lambda: gelu(torch.ones(3), approximate="erf"), lambda: GELU("erf")):
        with pytest.raises(ValueError, match="approximate is 'erf'; it must be one of none, tanh"):
            call()
    with fastft.backend("cpp"), pytest.raises(fastft.BackendError, match=r"gelu: .*float64|cannot be imported"):
        gelu(torch.ones(3).double())


def test_layer_is_that_of_torch(backend, device):
    x = torch.randn(4, 7, 24, device=device)
    for approximate in ("none", "tanh"):
        layer = GELU(approximate)
        torch.testing.assert_close(layer(x), torch.nn.GELU(approximate)(x), rtol=1e-5, atol=1e-5)
        assert not layer.state_dict() and repr(layer) == repr(torch.nn.GELU(approximate))


def test_layer_takes_over_the_bias_of_a_product(backend, device):
    plain = torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.GELU()).to(device)
    ours = torch.nn.Sequential(torch.nn.Linear(24, 16, bias=False), GELU(bias_size=16, device=device)).to(device)
    ours.load_state_dict({"0.weight": plain[0].weight, "1.bias": plain[0].bias})
    x = torch.randn(4, 7, 24, device=device)
    for model in (plain, ours):
        model(x).sin().sum().backward()
    close([ours(x), ours[0].weight.grad, ours[1].bias.grad], [plain(x), plain[0].weight.grad, plain[0].bias.grad])
    assert repr(ours[1]) == "GELU(approximate='none', bias_size=16)"
