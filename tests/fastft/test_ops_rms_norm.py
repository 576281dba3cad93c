"""fastft.ops.rms_norm: gradients, torch.compile, autocast and errors, through every backend that runs here."""

import pytest
import torch

import fastft
from fastft.ops import dispatch, rms_norm
from fastft_kernels.reference.rms_norm import rms_norm as reference

BACKENDS = ["reference", "cpp", "triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def forget_compiled_graphs():
    torch.compiler.reset()


@pytest.fixture(params=BACKENDS)
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
    x, residual = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2))
    weight = torch.randn(shape[-1], device=device).to(dtype).requires_grad_()
    return x, weight, residual


def both(x, weight, residual, function):
    """y, h and the gradients of a loss that uses both."""
    y, h = function(x, weight, residual)
    loss = y.sin().sum() + (h * h).sum()
    return y, h, *torch.autograd.grad(loss, (x, weight, residual))


def expected(x, weight, residual, offset=0.0):
    return both(x, weight, residual, lambda x, weight, residual: reference(x, weight, 1e-6, offset, residual))


def close(ours, others):
    for a, b in zip(ours, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gradients(backend, device, offset):
    args = leaves(device)
    close(both(*args, lambda x, w, r: rms_norm(x, w, offset=offset, residual=r)), expected(*args, offset))


def test_gradients_numerically():
    """The reference, which the kernels are compared with, against finite differences; also twice differentiated."""
    args = [t.detach().double().requires_grad_() for t in leaves(shape=(3, 7))]
    for offset in (0.0, 1.0):
        function = lambda x, w, r: rms_norm(x, w, offset=offset, residual=r)  # noqa: B023
        assert torch.autograd.gradcheck(function, args)
    assert torch.autograd.gradgradcheck(lambda x, w: rms_norm(x, w), args[:2])


@pytest.mark.parametrize("used", ["y", "h"])
def test_only_one_result_is_used(backend, device, used):
    x, weight, residual = leaves(device)
    y, h = rms_norm(x, weight, residual=residual)
    (y if used == "y" else h).sum().backward()
    if used == "h":
        assert torch.equal(x.grad, torch.ones_like(x)) and torch.equal(residual.grad, x.grad) and weight.grad is None
    else:
        assert torch.equal(x.grad, residual.grad) and weight.grad.abs().sum() > 0


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_arguments_get_no_gradient(backend, device, frozen):
    args = leaves(device)
    args[frozen].requires_grad_(False)
    y, h = rms_norm(args[0], args[1], residual=args[2])
    (y.sum() + h.sum()).backward()
    for i, leaf in enumerate(args):
        assert (leaf.grad is None) == (i == frozen)


def test_kernel_is_not_asked_for_the_gradient_of_a_frozen_weight(monkeypatch):
    asked = []
    kernel = _kernel("cpp")
    backward = kernel.backward
    monkeypatch.setattr(kernel, "backward", lambda *args: asked.append(args[-1]) or backward(*args))
    for requires_grad in (True, False):
        x, weight, _ = leaves()
        with fastft.backend("cpp"):
            rms_norm(x, weight.requires_grad_(requires_grad)).sum().backward()
    assert asked == [True, False]


def _kernel(name):
    if dispatch.unavailable(name):
        pytest.skip(dispatch.unavailable(name))
    return pytest.importorskip(f"fastft_kernels.{name}.rms_norm")


def test_saves_only_its_input_and_a_number_per_row():
    _kernel("cpp")
    x, weight, _ = leaves()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), fastft.backend("cpp"):
        rms_norm(x, weight)
    assert [t.data_ptr() for t in saved[:2]] == [x.data_ptr(), weight.data_ptr()]
    assert [t.numel() for t in saved[2:]] == [10]


def test_backend_of_the_forward_pass_serves_the_backward_pass(monkeypatch):
    kernel = _kernel("cpp")
    x, weight, _ = leaves()
    with fastft.backend("cpp"):
        y = rms_norm(x, weight)
    served = []
    backward = kernel.backward
    monkeypatch.setattr(kernel, "backward", lambda *args: served.append("cpp") or backward(*args))
    with fastft.backend("reference"):
        y.sum().backward()
    assert served == ["cpp"]


def test_second_derivatives_are_refused():
    _kernel("cpp")
    x, weight, _ = leaves()
    with fastft.backend("cpp"):
        (dx,) = torch.autograd.grad(rms_norm(x, weight).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice.*once_differentiable"):
        dx.sum().backward()


def test_checkpointing(backend, device):
    args = leaves(device)
    run = lambda x, w, r: rms_norm(x, w, residual=r)
    checkpointed = lambda *args: torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False)
    for ours, plain in zip(both(*args, checkpointed), both(*args, run), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_dtype_of_x(backend, device, dtype):
    x, _, residual = leaves(device, dtype)
    weight = torch.ones(24, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        y, h = rms_norm(x, weight, residual=residual)
        compiled, _ = torch.compile(rms_norm, backend="aot_eager", fullgraph=True)(x, weight, residual=residual)
    assert y.dtype == h.dtype == compiled.dtype == dtype
    y.float().sum().backward()
    assert x.grad.dtype == dtype and weight.grad.dtype == torch.float32


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_compiles_into_one_graph(backend, device, compiler, with_residual):
    x, weight, residual = leaves(device)
    if not with_residual:
        run = lambda x, w, r: (rms_norm(x, w), x + r)
    else:
        run = lambda x, w, r: rms_norm(x, w, residual=r)
    compiled = torch.compile(run, backend=compiler, fullgraph=True)
    close(both(x, weight, residual, compiled), both(x, weight, residual, run))


def test_compiled_graph_follows_the_backend():
    """A change of backend, of this thread or of the process, is seen by the guards: no stale graph runs."""
    _kernel("cpp")
    graphs = []

    def record(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    compiled = torch.compile(lambda x, w: rms_norm(x, w), backend=record, fullgraph=True)
    x, weight, _ = leaves()
    with fastft.backend("cpp"):
        compiled(x, weight)
    with fastft.backend("reference"):
        compiled(x, weight)
    fastft.set_backend("reference")
    try:
        compiled(x, weight)
    finally:
        fastft.set_backend("auto")
    with fastft.backend("cpp"):
        compiled(x, weight)
    assert ["fastft.rms_norm.default" in graph for graph in graphs] == [True, False, False]


def test_one_graph_serves_any_number_of_rows(backend, device):
    compiled = torch.compile(rms_norm, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 5, 9):
        x, weight, _ = leaves(device, shape=(rows, 24))
        torch.testing.assert_close(compiled(x, weight), rms_norm(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_custom_ops_obey_the_rules(name):
    """opcheck: schema, fake tensors, autograd registration, and AOT dispatch with dynamic shapes."""
    _kernel(name)
    device = DEVICE if name == "triton" else "cpu"
    x, weight, residual = leaves(device)
    for r in (None, residual):
        torch.library.opcheck(torch.ops.fastft.rms_norm.default, (x, weight, 1e-6, 1.0, r, name))
    dy, dh, h, rstd = (torch.randn_like(x), torch.randn_like(x), x.detach(), torch.rand(10, device=device))
    for through, needs_dweight in ((dh, True), (None, False)):
        args = (dy, through, h, weight.detach(), rstd, 0.0, needs_dweight, name)
        torch.library.opcheck(torch.ops.fastft.rms_norm_backward.default, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, r: (x.long(), w, r), "x is .* of torch.int64; it must be .* of a floating dtype"),
        (lambda x, w, r: (x[0, 0, 0], w, r), r"x is \[\]"),
        (lambda x, w, r: (x, w[1:], r), r"weight is \[23\] .* it must be \[24\]"),
        (lambda x, w, r: (x, w.to("meta"), r), "on meta; .* on cpu"),
        (lambda x, w, r: (x, w, r[..., 1:]), r"residual is \[2, 5, 23\] .* like x: \[2, 5, 24\]"),
        (lambda x, w, r: (x, w, r.double()), "residual is .* of torch.float64 .* of torch.float32"),
    ],
)
def test_bad_arguments(change, message):
    x, weight, residual = change(*(t.detach() for t in leaves()))
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, residual=residual)
