"""fastft.ops.layer_norm: gradients, masks, torch.compile, autocast and errors, through every backend that runs here."""

import pytest
import torch
import torch.nn.functional as F

import fastft
from fastft.nn import LayerNorm
from fastft.ops import dispatch, dropout, layer_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def forget_compiled_graphs():
    torch.compiler.reset()


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request):
    reason = dispatch.unavailable(request.param)
    if reason:
        pytest.skip(reason)
    with fastft.backend(request.param):
        yield request.param


@pytest.fixture
def device(backend):
    return DEVICE if backend == "triton" else "cpu"


def leaves(device="cpu", dtype=torch.float32, shape=(2, 5, 24)):
    """x, weight, bias, residual."""
    x, residual = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(shape[-1], device=device).to(dtype).requires_grad_() for _ in range(2))
    return x, weight, bias, residual


def everything(args, function):
    """y, h and the gradients of a loss that uses both."""
    y, h = function(*args)
    return y, h, *torch.autograd.grad(y.sin().sum() + (h * h).sum(), args)


def in_steps(p):
    """What the op replaces, in torch's own functions after one mask."""

    def run(x, weight, bias, residual):
        h = residual + dropout(x, p, seed=5)
        return F.layer_norm(h, weight.shape, weight, bias, 1e-5), h

    return run


def at_once(p, seed=5):
    return lambda x, weight, bias, residual: layer_norm(x, weight, bias, residual=residual, dropout_p=p, seed=seed)


def close(ours, others):
    for a, b in zip(ours, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_is_dropout_then_sum_then_norm(backend, device, p):
    args = leaves(device)
    close(everything(args, at_once(p)), everything(args, in_steps(p)))


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.3])
def test_without_a_residual(backend, device, p):
    """1e-9 rounds to a probability of 0: nothing is dropped."""
    x, weight, bias, _ = leaves(device)
    y = layer_norm(x, weight, bias, dropout_p=p, seed=5)
    expected = F.layer_norm(dropout(x, p, seed=5), weight.shape, weight, bias, 1e-5)
    dy = torch.randn_like(x)
    gradients = [torch.autograd.grad(result, (x, weight, bias), dy) for result in (y, expected)]
    close((y, *gradients[0]), (expected, *gradients[1]))


@pytest.mark.parametrize("used", ["y", "h"])
def test_only_one_result_is_used(backend, device, used):
    x, weight, bias, residual = leaves(device)
    results = dict(zip("yh", at_once(0.5)(x, weight, bias, residual), strict=True))
    results[used].sum().backward()
    keep = dropout(torch.ones_like(x), 0.5, seed=5)
    torch.testing.assert_close(x.grad, residual.grad * keep)
    if used == "h":
        assert torch.equal(residual.grad, torch.ones_like(x))
        assert weight.grad is None or not weight.grad.any()


@pytest.mark.parametrize("frozen", range(4))
def test_frozen_arguments_get_no_gradient(backend, device, frozen):
    args = leaves(device)
    args[frozen].requires_grad_(False)
    y, h = at_once(0.2)(*args)
    (y.sum() + h.sum()).backward()
    assert [leaf.grad is None for leaf in args] == [i == frozen for i in range(4)]


def test_saves_h_two_numbers_per_row_and_the_seed():
    if dispatch.unavailable("cpp"):
        pytest.skip(dispatch.unavailable("cpp"))
    args, saved = leaves(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), fastft.backend("cpp"):
        _, h = at_once(0.2)(*args)
    assert saved[0].data_ptr() == h.data_ptr() and saved[1].data_ptr() == args[1].data_ptr()
    assert [t.numel() for t in saved[2:]] == [10, 10, 1]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_mask(backend, device, reentrant):
    args = leaves(device)
    results = []
    for run in (
        at_once(0.4, None),
        lambda *args: torch.utils.checkpoint.checkpoint(at_once(0.4, None), *args, use_reentrant=reentrant),
    ):
        torch.manual_seed(1)
        for leaf in args:
            leaf.grad = None
        y, h = run(*args)
        (y.sin().sum() + (h * h).sum()).backward()
        results.append([y, h, *(leaf.grad for leaf in args)])
    assert all(torch.equal(ours, plain) for ours, plain in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_dtype_of_x(backend, device, dtype):
    x, _, _, residual = leaves(device, dtype)
    weight, bias = (torch.ones(24, device=device, requires_grad=True) for _ in range(2))
    with torch.autocast(device, torch.bfloat16):
        y, h = at_once(0.1)(x, weight, bias, residual)
    assert y.dtype == h.dtype == dtype
    y.float().sum().backward()
    assert x.grad.dtype == dtype and weight.grad.dtype == bias.grad.dtype == torch.float32


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiles_into_one_graph(backend, device, compiler, p):
    args, seed = leaves(device), torch.tensor(5)
    compiled = torch.compile(at_once(p, seed), backend=compiler, fullgraph=True)
    close(everything(args, compiled), everything(args, at_once(p)))


@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_custom_ops_obey_the_rules(name):
    """opcheck: schema, fake tensors, autograd registration, and AOT dispatch with dynamic shapes."""
    if dispatch.unavailable(name):
        pytest.skip(dispatch.unavailable(name))
    x, weight, bias, residual = leaves(DEVICE if name == "triton" else "cpu")
    for b, r, p, seed in ((bias, residual, 0.3, torch.tensor(5)), (None, None, 0.0, None)):
        torch.library.opcheck(torch.ops.fastft.layer_norm.default, (x, weight, b, 1e-5, r, p, seed, name))
    h, dy, dh = (torch.randn_like(x, requires_grad=False) for _ in range(3))
    mean, rstd = torch.rand(2, 10, device=x.device).unbind()
    for through, p, needs in ((dh, 0.3, [True, True, True]), (None, 0.0, [False, False, False])):
        args = (dy, through, h, weight.detach(), mean, rstd, p, torch.tensor(5) if p else None, needs, name)
        torch.library.opcheck(torch.ops.fastft.layer_norm_backward.default, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b, r: (x.long(), w, b, r), "x is .* of torch.int64; it must be .* of a floating dtype"),
        (lambda x, w, b, r: (x, w[1:], b, r), r"weight is \[23\] .* it must be \[24\]"),
        (lambda x, w, b, r: (x, w, b.double(), r), "bias is .* of torch.float64 .* like weight: .* of torch.float32"),
        (lambda x, w, b, r: (x, w, b, r[..., 1:]), r"residual is \[2, 5, 23\] .* like x: \[2, 5, 24\]"),
    ],
)
def test_bad_arguments(change, message):
    x, weight, bias, residual = change(*(t.detach() for t in leaves()))
    with pytest.raises(ValueError, match=message):
        layer_norm(x, weight, bias, residual=residual)
    with pytest.raises(ValueError, match="dropout_p is 1"):
        layer_norm(torch.ones(2, 3), torch.ones(3), dropout_p=1)


def test_layer():
    """The state and the results of torch's, and dropout in training alone."""
    theirs, ours = torch.nn.LayerNorm(24), LayerNorm(24, dropout_p=0.5)
    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x, residual = torch.randn(2, 3, 24)
    assert not torch.equal(ours(x, residual)[1], x + residual)
    y, h = ours.eval()(x, residual)
    assert torch.equal(h, x + residual)
    close((y, ours(x)), (theirs(h), theirs(x)))
    assert list(LayerNorm(8, bias=False).state_dict()) == ["weight"]
    assert repr(ours) == "LayerNorm(24, eps=1e-05, bias=True, dropout_p=0.5)"
