"""fastft.ops.attention through its Triton kernels: autograd, torch.compile, what is refused. Numbers: tests/kernels/."""

import pytest
import torch

import fastft
from fastft.ops import attention
from fastft.ops.attention import _backward_op, _op

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def triton():
    with fastft.backend("triton"):
        yield


def packed(heads=(4, 2), D=16, dtype=torch.float32):
    q = torch.randn(20, heads[0], D, device=DEVICE, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(20, heads[1], D, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(2))
    return (q, k, v), torch.tensor([0, 7, 7, 20], dtype=torch.int32, device=DEVICE)


def run(inputs, do=None, **options):
    """o and the gradients."""
    o = attention(*inputs, **options)
    return o, *torch.autograd.grad(o, inputs, torch.ones_like(o) if do is None else do)


@pytest.mark.parametrize(
    "options", [{"causal": True}, {"window": (3, 2), "softcap": 2.0}, {"dropout_p": 0.4, "seed": 7}], ids=str
)
def test_equals_the_reference(triton, options):
    inputs, bounds = packed()
    do = torch.randn_like(inputs[0])
    ours = run(inputs, do, cu_seqlens_q=bounds, **options)
    with fastft.backend("reference"):
        theirs = run(inputs, do, cu_seqlens_q=bounds, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_grouped_heads_share_keys(triton):
    inputs, bounds = packed((8, 1))
    ours = run(inputs, cu_seqlens_q=bounds)
    with fastft.backend("reference"):
        torch.testing.assert_close(ours, run(inputs, cu_seqlens_q=bounds), rtol=1e-5, atol=1e-5)


def test_strided_inputs_and_expanded_gradients(triton):
    qkv = torch.randn(2, 9, 3, 2, 16, device=DEVICE, requires_grad=True)
    apart = [x.detach().contiguous().requires_grad_() for x in qkv.unbind(2)]
    backwards = [x.detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_() for x in qkv.unbind(2)]
    expected = torch.stack(torch.autograd.grad(attention(*apart).sum(), apart), 2)
    assert torch.equal(torch.autograd.grad(attention(*qkv.unbind(2)).sum(), qkv)[0], expected)
    assert torch.equal(torch.stack(torch.autograd.grad(attention(*backwards).sum(), backwards), 2), expected)


def test_nothing_leaks_between_sequences(triton):
    inputs, bounds = packed()
    with torch.no_grad():
        for x in inputs:
            x[7:] = torch.nan
    for x in run(inputs, cu_seqlens_q=bounds, causal=True):
        assert x[7:].isnan().any() and not x[:7].isnan().any()


def test_nothing_leaks_from_padding(triton):
    q, k, v = (torch.randn(2, 6, 2, 16, device=DEVICE) for _ in range(3))
    for x in (k, v):
        x[0, :2] = x[1, 4:] = torch.nan
    inputs = [x.requires_grad_() for x in (q, k, v)]
    results = run(inputs, key_lengths=torch.tensor([[2, 6], [0, 4]]))
    assert not any(x.isnan().any() for x in results)
    assert not any(x[0, :2].any() or x[1, 4:].any() for x in results[2:])


@pytest.mark.parametrize("tokens", [0, 3])
def test_nothing_to_attend(triton, tokens):
    inputs = [torch.randn(1, n, 2, 16, device=DEVICE, requires_grad=True) for n in (tokens, 0, 0)]
    o, lse = attention(*inputs, return_lse=True)
    assert not o.any() and lse.isneginf().all()
    assert not any(x.any() for x in torch.autograd.grad(o.sum(), inputs))


def test_dropout_is_drawn_anew_and_reproducibly(triton):
    inputs, bounds = packed()
    draw = lambda: attention(*inputs, cu_seqlens_q=bounds, dropout_p=0.5)
    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(first, draw()) and not torch.equal(first, second)


@pytest.mark.parametrize("options", [{}, {"return_lse": True}, {"dropout_p": 0.4, "seed": 7}], ids=str)
def test_compiles_without_a_graph_break(triton, options):
    inputs, bounds = packed()

    def step(q, k, v):
        result = attention(q, k, v, cu_seqlens_q=bounds, causal=True, **options)
        return result[0].sin() * result[1][..., None] if isinstance(result, tuple) else result.sin()

    expected, o = step(*inputs), torch.compile(step, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(o, expected)
    do = torch.randn_like(o)
    torch.testing.assert_close(torch.autograd.grad(o, inputs, do), torch.autograd.grad(expected, inputs, do))


def test_custom_ops_obey_the_rules():
    inputs, bounds = packed()
    settings = (16**-0.5, None, 0, None, bounds, bounds, None, 0.0, None, True, "triton")
    torch.library.opcheck(_op, (*inputs, *settings))
    q, k, v = (x.detach() for x in inputs)
    o, lse = _op(q, k, v, *settings)
    for dlse in (None, torch.randn_like(lse)):
        torch.library.opcheck(_backward_op, (torch.randn_like(o), dlse, q, k, v, o, lse, *settings))


def test_what_the_kernels_refuse(triton):
    inputs, bounds = packed(dtype=torch.float64)
    with pytest.raises(fastft.BackendError, match="q is torch.float64"):
        attention(*inputs, cu_seqlens_q=bounds)
    inputs, bounds = packed()
    with pytest.raises(fastft.BackendError, match="a scale above 0, and this one is -1.0"):
        attention(*inputs, cu_seqlens_q=bounds, scale=-1)
