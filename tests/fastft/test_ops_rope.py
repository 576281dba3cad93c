"""fastft.ops.rope: gradients, torch.compile, autocast and errors, through every backend that runs here."""

import pytest
import torch

import fastft
from fastft.ops import dispatch, rope
from fastft_kernels.reference.rope import rope as reference

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


def arguments(device="cpu", dtype=torch.float32, tokens=5):
    """q, k, cos, sin as transformers passes them: views of [B, S, H * D], two angles of each value, heads partly turned."""
    q, k = (torch.randn(2, tokens, heads * 16, device=device).to(dtype).requires_grad_() for heads in (4, 2))
    angles = torch.rand(1, tokens, 6, device=device).repeat(1, 1, 2)
    by_head = [x.view(2, tokens, -1, 16).transpose(1, 2) for x in (q, k)]
    return *by_head, angles.cos().to(dtype), angles.sin().to(dtype)


def with_gradients(function, q, k, cos, sin):
    results = function(q, k, cos, sin)
    return *results, *torch.autograd.grad(sum(y.sin().sum() for y in results), (q, k))


def close(ours, others):
    for a, b in zip(ours, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradients(backend, device):
    args = arguments(device)
    close(with_gradients(rope, *args), with_gradients(reference, *args))


def test_layouts_of_the_same_heads(backend, device):
    q, k, cos, sin = (x.detach() for x in arguments(device))
    expected = rope(q, k, cos, sin)
    by_token = rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
    packed = rope(
        *(x.transpose(1, 2).flatten(0, 1) for x in (q, k)), *(x.repeat(2, 1, 1).flatten(0, 1) for x in (cos, sin))
    )
    for y, same, flat in zip(expected, by_token, packed, strict=True):
        assert torch.equal(same.transpose(1, 2), y) and torch.equal(flat, same.flatten(0, 1))
        assert backend == "reference" or y.transpose(1, 2).is_contiguous(), "kernels leave q in memory as it lay"


def test_gradients_numerically():
    """The reference, against finite differences, in cos and sin too."""
    q, k, cos, sin = (x.detach().double() for x in arguments(tokens=2))
    args = [x.contiguous().requires_grad_() for x in (q[:1, :2, :, :5], k[:1, :1, :, :5], cos[..., :4], sin[..., :4])]
    assert torch.autograd.gradcheck(rope, args)
    assert torch.autograd.gradgradcheck(rope, args)


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_inputs_get_no_gradient(backend, device, frozen):
    args = [x.detach().requires_grad_(i == 1 - frozen) for i, x in enumerate(arguments(device))]
    sum(y.sin().sum() for y in rope(*args)).backward()
    assert args[frozen].grad is None and args[1 - frozen].grad.abs().sum() > 0


def test_only_one_result_is_used(backend, device):
    q, k, cos, sin = arguments(device)
    q, k = (x.detach().requires_grad_() for x in (q, k))
    rope(q, k, cos, sin)[1].sin().sum().backward()
    assert (q.grad is None or not q.grad.any()) and k.grad.abs().sum() > 0


def test_saves_cos_and_sin_alone():
    _needs("cpp")
    args = arguments()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x), fastft.backend("cpp"):
        rope(*args)
    assert [x.data_ptr() for x in saved] == [x.data_ptr() for x in args[2:]]


def test_inputs_are_not_written(backend, device):
    args = arguments(device)
    before = [x.detach().clone() for x in args]
    results = with_gradients(rope, *args)
    assert all(torch.equal(x, y) for x, y in zip(args, before, strict=True)) and not torch.equal(results[0], args[0])


def test_angles_that_are_trained(backend):
    """Only the reference computes their gradient: it serves unless another backend was asked for."""
    q, k, cos, sin = arguments()
    cos = cos.requires_grad_()
    if backend != "reference":
        with pytest.raises(fastft.BackendError, match="cos or sin requires a gradient"):
            rope(q, k, cos, sin)
    with fastft.backend("auto"):
        rope(q, k, cos, sin)[0].sum().backward()
    assert cos.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_dtype_of_q(backend, device, dtype):
    q, k, cos, sin = arguments(device, dtype)
    cos, sin = cos.float(), sin.float()  # as where weights are float32 and projections come in the autocast dtype
    with torch.autocast(device, torch.bfloat16):
        results = rope(q, k, cos, sin)
    assert all(y.dtype == dtype for y in results)
    assert all(dx.dtype == dtype for dx in torch.autograd.grad(sum(y.float().sum() for y in results), (q, k)))


@pytest.mark.parametrize(("name", "dynamic"), [("cpp", False), ("cpp", True), ("triton", False)])
def test_compiles_into_one_graph(name, dynamic):
    _needs(name)
    compiled = torch.compile(rope, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for tokens in (3, 5, 8) if dynamic else (5,):
        args = arguments(DEVICE if name == "triton" else "cpu", tokens=tokens)
        with fastft.backend(name):
            close(with_gradients(compiled, *args), with_gradients(rope, *args))


def test_checkpointing(backend, device):
    args = arguments(device)
    checkpointed = lambda *args: torch.utils.checkpoint.checkpoint(rope, *args, use_reentrant=False)
    for ours, plain in zip(with_gradients(checkpointed, *args), with_gradients(rope, *args), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_custom_ops_obey_the_rules(name):
    """opcheck: schema, fake tensors, autograd registration, and AOT dispatch with dynamic shapes."""
    _needs(name)
    q, k, cos, sin = arguments(DEVICE if name == "triton" else "cpu")
    torch.library.opcheck(torch.ops.fastft.rope.default, (q, k, cos, sin, 1, name))
    dq, dk = torch.randn_like(q), torch.ones((), device=k.device).expand(k.shape)
    torch.library.opcheck(torch.ops.fastft.rope_backward.default, (dq.detach(), dk, cos, sin, 1, name))


def _needs(name):
    if dispatch.unavailable(name):
        pytest.skip(dispatch.unavailable(name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, c, s: (q.long(), k, c, s), "q is .* of torch.int64"),
        (lambda q, k, c, s: (q[0, 0], k, c, s), r"q is \[5, 16\]"),
        (lambda q, k, c, s: (q, k[..., 1:], c, s), r"k is \[2, 2, 5, 15\].* like q but for its heads: \[2, 4, 5, 16\]"),
        (lambda q, k, c, s: (q, k.double(), c, s), "k is .* of torch.float64"),
        (lambda q, k, c, s: (q, k, c[:, 1:], s), r"cos is \[1, 4, 12\].* must be \[2, 5, 'R'\]"),
        (lambda q, k, c, s: (q, k, c, s.long()), "sin is .* of torch.int64"),
        (lambda q, k, c, s: (q, k, c, s.double()), "they must be alike"),
        (lambda q, k, c, s: (q, k, c[..., :5], s[..., :5]), "cos has 5 angles; .* even in number and at most 16"),
        (lambda q, k, c, s: (q, k, c.repeat(1, 1, 2), s.repeat(1, 1, 2)), "cos has 24 angles"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        rope(*change(*(x.detach() for x in arguments())))


def test_bad_dimension():
    with pytest.raises(ValueError, match="unsqueeze_dim is 3; for q with 4 dimensions it must be 1 or 2"):
        rope(*arguments(), unsqueeze_dim=3)
