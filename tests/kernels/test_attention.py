"""fastft.ops.attention against attention written out in fp64, one sequence at a time."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastft
from fastft.ops import attention
from fastft.ops.attention import _op
from fastft_kernels.reference import _segments

LENGTHS = {
    "even": ([7, 7, 7], [7, 7, 7]),
    "ragged": ([3, 17, 1, 9, 30, 4], [3, 17, 1, 9, 30, 4]),
    "one": ([65], [65]),
    "empty sequences": ([0, 5, 0, 4, 3], [2, 5, 0, 0, 3]),
    "more keys": ([2, 6, 1], [9, 6, 20]),
    "more queries": ([9, 6, 20], [2, 6, 1]),
    "no tokens": ([0, 0], [0, 0]),
}
MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (3, 2)},
    "causal window": {"causal": True, "window": (4, 0)},
    "left window": {"window": (5, None)},
    "wide window": {"causal": True, "window": (100, None)},
}
HEADS = [(4, 4, 16), (4, 2, 40), (6, 1, 8), (2, 2, 112)]


def written_out(q, k, v, *, causal=False, window=None, scale=None, softcap=None, first=0, end=None, keep=None):
    """One sequence: q [n, H, D], k and v [m, H', D] -> o [n, H, D], lse [n, H]; keep: dropout's scaled mask [H, n, m]."""
    n, H, D = q.shape
    m = k.shape[0]
    k, v = (x.repeat_interleave(H // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * (D**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    left, right = window or (None, None)
    right = 0 if causal else right
    position, key = torch.arange(n)[:, None] + m - n, torch.arange(m)
    allowed = (key >= first) & (key < (m if end is None else end))
    allowed = allowed & (key >= position - (m + n if left is None else left))
    allowed = allowed & (key <= position + (m + n if right is None else right))
    sees = allowed.any(-1, keepdim=True)
    probabilities = torch.where(sees, torch.where(allowed, scores, -torch.inf).masked_fill(~sees, 0).softmax(-1), 0)
    out = torch.einsum("hij,jhd->ihd", probabilities * (1 if keep is None else keep), v)
    return out, torch.where(allowed, scores, -torch.inf).logsumexp(-1).T


def packed_inputs(lengths, heads, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    H, heads_k, D = heads
    shapes = [(sum(lengths[0]), H, D), (sum(lengths[1]), heads_k, D), (sum(lengths[1]), heads_k, D)]
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes)
    bounds = [torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in lengths]
    return (q, k, v), {"cu_seqlens_q": bounds[0], "cu_seqlens_k": bounds[1]}


def packed_written_out(tensors, lengths, **options):
    parts = zip(*(x.split(n) for x, n in zip(tensors, (lengths[0], lengths[1], lengths[1]), strict=True)), strict=True)
    outs, lses = zip(*(written_out(*part, **options) for part in parts), strict=True)
    return torch.cat(outs), torch.cat(lses)


def gradients(out, inputs, dout):
    return torch.autograd.grad(out, inputs, dout.to(out.dtype))


def assert_same(actual, expected, tolerance):
    for x, y in zip(actual, expected, strict=True):
        assert x.shape == y.shape and not x.isnan().any()
        torch.testing.assert_close(x.double(), y.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_packed(lengths, mask):
    """Forward and gradients, over heads, softcap and lse; fp64, so that only a wrong formula can fail."""
    for heads, softcap, return_lse in zip(HEADS, (None, 1.5, None, 0.7), (False, False, True, True), strict=True):
        inputs, sequences = packed_inputs(lengths, heads)
        expected, expected_lse = packed_written_out(inputs, lengths, softcap=softcap, **mask)
        result = attention(*inputs, **sequences, softcap=softcap, return_lse=return_lse, **mask)
        dout = torch.randn_like(expected)
        if return_lse:
            torch.testing.assert_close(result[1].double(), expected_lse)
            visible = expected_lse.isfinite()
            actual, wanted = ((o * dout).sum() + lse[visible].sum() for o, lse in (result, (expected, expected_lse)))
            outs = result[0], expected
        else:
            actual, wanted, outs = (result * dout).sum(), (expected * dout).sum(), (result, expected)
        assert_same(outs[:1], outs[1:], 1e-10)
        if inputs[0].numel():
            assert_same(torch.autograd.grad(actual, inputs), torch.autograd.grad(wanted, inputs), 1e-10)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("sizes", [(13, 13), (5, 13), (13, 5), (1, 8)], ids=str)
def test_padded(sizes, mask):
    """Batches [B, S, H, D], alone and with key_lengths in both forms, among them an example without keys."""
    (Sq, Sk), (H, heads_k, D), B = sizes, (4, 2, 24), 3
    q = torch.randn(B, Sq, H, D, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(B, Sk, heads_k, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ends = [Sk, 3, 0]
    firsts = [1, 2, 0]
    for key_lengths, first, end in (
        (None, [0] * B, [Sk] * B),
        (torch.tensor(ends), [0] * B, ends),
        (torch.tensor([firsts, ends], dtype=torch.int32).T, firsts, ends),
    ):
        for softcap in (None, 2.0):
            expected = torch.stack(
                [
                    written_out(q[b], k[b], v[b], softcap=softcap, first=first[b], end=end[b], **mask)[0]
                    for b in range(B)
                ]
            )
            out = attention(q, k, v, key_lengths=key_lengths, softcap=softcap, **mask)
            dout = torch.randn_like(expected)
            assert_same([out], [expected], 1e-10)
            assert_same(gradients(out, (q, k, v), dout), gradients(expected, (q, k, v), dout), 1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "softcap": 1.5},
        {"window": (2, 1), "return_lse": True},
        {"causal": True, "dropout_p": 0.3, "seed": 5},
    ],
    ids=str,
)
def test_gradients_are_differences(options):
    """By finite differences, of sequences among which one has no keys and one more keys than queries."""
    inputs, sequences = packed_inputs(([3, 2, 1], [3, 0, 4]), (2, 1, 4))
    if options.get("return_lse"):  # of a row that sees nothing it is -inf
        inputs, sequences = packed_inputs(([3, 1], [3, 4]), (2, 1, 4))
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, **sequences, **options), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (4, 4), "softcap": 3.0}], ids=str)
def test_no_worse_than_pytorch(dtype, options, no_worse, poisoned):
    lengths = LENGTHS["ragged"]
    inputs, sequences = packed_inputs(lengths, (4, 2, 40), dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    outs = (
        attention(*inputs, **sequences, **options),
        packed_written_out(inputs, lengths, **options)[0],
        packed_written_out(exact, lengths, **options)[0],
    )
    dout = torch.randn_like(outs[0])
    grads = [gradients(out, x, dout) for out, x in zip(outs, (inputs, inputs, exact), strict=True)]
    no_worse("o", *outs)
    for name, *results in zip(("dq", "dk", "dv"), *grads, strict=True):
        no_worse(name, *results)


def test_strided_inputs_and_expanded_gradients():
    lengths = ([8, 12], [8, 12])
    qkv = torch.randn(20, 3, 4, 16, dtype=torch.float64, requires_grad=True)
    out = attention(*qkv.unbind(1), **packed_inputs(lengths, (4, 4, 16))[1])
    expected, _ = packed_written_out(qkv.unbind(1), lengths)
    assert_same([out], [expected], 1e-10)
    assert_same(torch.autograd.grad(out.sum(), qkv), torch.autograd.grad(expected.sum(), qkv), 1e-10)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"dropout_p": 0.3}], ids=str)
def test_nothing_leaks_between_sequences(options):
    """A sequence of NaNs spoils itself, but not those that share its batch."""
    inputs, sequences = packed_inputs(([5, 7, 6], [5, 7, 6]), (2, 2, 16))
    with torch.no_grad():
        for x in inputs:
            x[5:12] = torch.nan
    out = attention(*inputs, **sequences, **options)
    for x in (out, *torch.autograd.grad(out.sum(), inputs)):
        assert x[5:12].isnan().any() and not torch.cat([x[:5], x[12:]]).isnan().any()


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("options", [{"causal": True}, {"dropout_p": 0.1}], ids=str)
def test_memory_grows_with_tokens_not_with_their_square(options):
    lengths = [[100 + i % 5 for i in range(40)]] * 2
    inputs, sequences = packed_inputs(lengths, (2, 2, 8), torch.float32)
    tokens, scores = sum(lengths[0]), 2 * sum(n * n for n in lengths[0])
    with Largest() as largest:
        out = attention(*inputs, **sequences, **options)
        gradients(out, inputs, torch.ones_like(out))
    assert largest.elements < (1.3 * scores if "dropout_p" in options else 1.3 * tokens * 2 * 8)


def test_long_sequences_keep_no_scores():
    inputs, sequences = packed_inputs(([1500, 900], [1500, 900]), (1, 1, 16), torch.float32)
    with Largest() as largest:
        out = attention(*inputs, **sequences, causal=True)
        gradients(out, inputs, torch.ones_like(out))
    assert largest.elements < 1500 * 900


# Dropout


def dropped(lengths, heads, p, seed):
    """The scaled dropout masks [H, n, n] of each sequence: with v the identity, o is the matrix of dropped probabilities."""
    H, D = heads[0], max(lengths)
    q = torch.zeros(sum(lengths), H, D)
    v = torch.cat([torch.eye(D)[:n] for n in lengths])[:, None].expand(-1, H, -1)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    out = attention(q, q, v, cu_seqlens_q=bounds, dropout_p=p, seed=seed)
    return [x[..., :n].transpose(0, 1) * n for x, n in zip(out.split(lengths), lengths, strict=True)]


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_statistics(p):
    masks = dropped([40, 33, 17, 17], (8, 8), p, seed=3)
    values = torch.cat([x.flatten() for x in masks])
    kept = values > 0
    deviation = (p * (1 - p) / values.numel()) ** 0.5
    assert abs(kept.double().mean() - (1 - p)) < 4 * deviation
    torch.testing.assert_close(values[kept], torch.full_like(values[kept], 1 / (1 - p)), rtol=1e-4, atol=0)
    heads = torch.stack([x.flatten(1) for x in masks[2:]]).flatten(0, 1) > 0
    agreement = (heads[:, None] == heads[None]).double().mean(-1).triu(1)
    chance = p * p + (1 - p) ** 2
    assert (agreement[agreement > 0] - chance).abs().max() < 5 * (chance * (1 - chance) / heads.shape[1]) ** 0.5


def test_dropout_is_a_function_of_the_seed():
    inputs, sequences = packed_inputs(LENGTHS["ragged"], (2, 2, 16), torch.float32)
    run = lambda seed: attention(*inputs, **sequences, dropout_p=0.3, seed=seed)
    assert torch.equal(run(5), run(torch.tensor(5))) and not torch.equal(run(5), run(6))
    torch.manual_seed(1)
    first = run(None)
    second = run(None)
    torch.manual_seed(1)
    assert torch.equal(first, run(None)) and not torch.equal(first, second)


def test_dropout_backward():
    """With the mask read back, forward and gradients equal the formula with that mask."""
    lengths, seed = [6, 9, 9], 11
    masks = dropped(lengths, (2, 2), 0.25, seed)
    inputs, sequences = packed_inputs((lengths, lengths), (2, 2, 16))
    out = attention(*inputs, **sequences, dropout_p=0.25, seed=seed)
    parts = zip(*(x.split(lengths) for x in inputs), masks, strict=True)
    expected = torch.cat([written_out(q, k, v, keep=keep)[0] for q, k, v, keep in parts])
    dout = torch.randn_like(expected)
    assert_same([out], [expected], 1e-6)  # the mask was read back in fp32
    assert_same(gradients(out, inputs, dout), gradients(expected, inputs, dout), 1e-5)


def test_checkpointing_recomputes_the_same_dropout():
    inputs, sequences = packed_inputs(LENGTHS["ragged"], (2, 2, 16))
    run = lambda q, k, v: attention(q, k, v, **sequences, dropout_p=0.5)
    torch.manual_seed(4)
    plain = gradients(run(*inputs), inputs, torch.ones(64, 2, 16))
    torch.manual_seed(4)
    assert_same(gradients(checkpoint(run, *inputs, use_reentrant=False), inputs, torch.ones(64, 2, 16)), plain, 0)


# torch.compile, autocast, backends, bad input


@pytest.mark.parametrize("options", [{}, {"return_lse": True, "softcap": 2.0}, {"dropout_p": 0.4, "seed": 7}], ids=str)
def test_compiles_without_a_graph_break(options):
    inputs, sequences = packed_inputs(LENGTHS["ragged"], (4, 2, 16), torch.float32)

    def step(q, k, v):
        result = attention(q, k, v, **sequences, causal=True, **options)
        return result[0].sin() * result[1][..., None] if isinstance(result, tuple) else result.sin()

    expected, out = step(*inputs), torch.compile(step, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    for x, y in zip(gradients(out, inputs, dout), gradients(expected, inputs, dout), strict=True):
        torch.testing.assert_close(x, y)


def test_opcheck():
    inputs, sequences = packed_inputs(([3, 4], [5, 2]), (4, 2, 8), torch.float32)
    bounds = sequences["cu_seqlens_q"], sequences["cu_seqlens_k"]
    settings = (8**-0.5, None, 0, None, *bounds, None, 0.0, None, True, "reference")
    torch.library.opcheck(_op, (*inputs, *settings))


def test_autocast():
    """As with PyTorch's attention, autocast decides the dtype, whatever mixture comes in."""
    q, k, v = torch.randn(1, 6, 2, 16), torch.randn(1, 6, 2, 16), torch.randn(1, 6, 2, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, k, v, causal=True)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attention(*(x.bfloat16() for x in (q, k, v)), causal=True))


@fastft.backend("reference")
def test_layers_share_one_plan():
    inputs, sequences = packed_inputs(LENGTHS["ragged"], (2, 2, 16), torch.float32)
    _segments._plan.cache_clear()
    for _ in range(3):
        attention(*inputs, **sequences)
    assert _segments._plan.cache_info()[:2] == (2, 1)
    bounds = torch.tensor([0, 30, 64], dtype=torch.int32)
    first = attention(*inputs, cu_seqlens_q=bounds)
    bounds[1] = 20
    assert_same([attention(*inputs, cu_seqlens_q=bounds)], [packed_written_out(inputs, ([20, 44], [20, 44]))[0]], 1e-6)
    assert not torch.equal(first, attention(*inputs, cu_seqlens_q=bounds))


def test_a_backend_without_a_kernel():
    x = torch.randn(1, 4, 2, 8, dtype=torch.float64)
    with fastft.backend("triton"), pytest.raises(fastft.BackendError, match="triton"):
        attention(x, x, x)
    with fastft.backend("reference"):
        attention(x, x, x)


def bounds(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


PADDED, PACKED = torch.randn(2, 6, 4, 8), torch.randn(12, 4, 8)
BAD = {
    r"q \[2, 6, 4, 8\], k \[12, 4, 8\]": (PADDED, PACKED, {}),
    r"last dimension": (PADDED, PADDED[..., :4], {}),
    r"from 1 to 256": (torch.randn(1, 1, 1, 300),) * 2 + ({},),
    r"4 heads of q must be a multiple of the 3": (PADDED, PADDED[:, :, :3], {}),
    r"equally large": (PADDED, PADDED[:1], {}),
    r"q torch.float32 on cpu, k torch.float64": (PADDED, PADDED.double(), {}),
    r"q torch.int64": (PADDED.long(), PADDED.long(), {}),
    r"window's left side is -1": (PADDED, PADDED, {"window": (-1, 0)}),
    r"causal=True and window \(2, 2\) contradict": (PADDED, PADDED, {"window": (2, 2), "causal": True}),
    r"softcap 0": (PADDED, PADDED, {"softcap": 0}),
    r"dropout_p is 1.0": (PADDED, PADDED, {"dropout_p": 1.0}),
    r"q \[12, 4, 8\] without cu_seqlens_q": (PACKED, PACKED, {}),
    r"key_lengths \[3\] of torch.int64": (PADDED, PADDED, {"key_lengths": bounds(1, 2, 3, dtype=torch.int64)}),
    r"key_lengths \[6, 7\]: must lie within the 6 keys": (PADDED, PADDED, {"key_lengths": bounds(6, 7)}),
    r"cu_seqlens_q with q \[2, 6, 4, 8\]": (PADDED, PADDED, {"cu_seqlens_q": bounds(0, 6)}),
    r"cu_seqlens_q \[0, 5, 11\]: must rise from 0 to the 12": (PACKED, PACKED, {"cu_seqlens_q": bounds(0, 5, 11)}),
    r"cu_seqlens_q \[0, 8, 5, 12\]": (PACKED, PACKED, {"cu_seqlens_q": bounds(0, 8, 5, 12)}),
    r"cu_seqlens_q is \[2\] of torch.int64": (PACKED, PACKED, {"cu_seqlens_q": bounds(0, 12, dtype=torch.int64)}),
    r"has 1 sequences and cu_seqlens_k 2": (
        PACKED,
        PACKED,
        {"cu_seqlens_q": bounds(0, 12), "cu_seqlens_k": bounds(0, 3, 12)},
    ),
    r"cu_seqlens_k \[0, 12\]: must rise from 0 to the 9": (PACKED, PACKED[:9], {"cu_seqlens_q": bounds(0, 12)}),
    r"max_seqlen_q 6: the longest sequence has 7": (
        PACKED,
        PACKED,
        {"cu_seqlens_q": bounds(0, 5, 12), "max_seqlen_q": 6},
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    q, k, options = BAD[message]
    with pytest.raises(ValueError, match=message):
        attention(q, k, k, **options)
