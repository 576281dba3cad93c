"""The C++ attention kernel against attention written out in float64, on memory that held NaN.

"PyTorch in the same dtype" is here the formula in float32, whose result is rounded: stricter than the formula in bf16.
"""

import itertools
import random

import pytest
import torch

from fastft_kernels.cpp import extension
from fastft_kernels.reference._philox import draws, drop_threshold

kernel = pytest.importorskip("fastft_kernels.cpp.attention") if not extension.missing else None
pytestmark = [
    pytest.mark.skipif(extension.missing is not None, reason=str(extension.missing)),
    pytest.mark.usefixtures("poisoned"),
]

FACTORS = {
    "lengths": [
        ([7, 7], [7, 7]),
        ([0, 17, 1, 63, 0], [2, 17, 1, 63, 0]),
        ([65, 3], [65, 3]),
        ([200], [200]),
        ([5, 40, 9], [60, 70, 0]),
        ([70, 200], [6, 65]),
    ],
    "padding": [None, None, "right", "left"],
    "heads": [(2, 2, 16), (4, 2, 32), (8, 1, 40), (2, 1, 64), (1, 1, 3), (2, 2, 128), (1, 1, 256)],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "window": [(None, None), (None, 0), (5, 0), (3, 2), (70, None), (None, 9)],
    "softcap": [None, 2.0],
    "dropout_p": [0.0, 0.25],
    "dlse": [False, True],
    "layout": ["contiguous", "strided"],
}


def pairwise(factors, seed=0):
    """Cases such that any two values of two factors meet in one of them."""
    choose = random.Random(seed)
    names = list(factors)
    sizes = [range(len(factors[name])) for name in names]
    missing = {
        (a, i, b, j) for a, b in itertools.combinations(range(len(names)), 2) for i in sizes[a] for j in sizes[b]
    }
    covers = lambda case: {(a, case[a], b, case[b]) for a, b in itertools.combinations(range(len(case)), 2)}
    cases = []
    while missing:
        a, i, b, j = min(missing)
        tries = [[choose.choice(size) for size in sizes] for _ in range(30)]
        for case in tries:
            case[a], case[b] = i, j
        cases.append(max(tries, key=lambda case: len(covers(case) & missing)))
        missing -= covers(cases[-1])
    return [{name: factors[name][i] for name, i in zip(names, case, strict=True)} for case in cases]


def written_out(q, k, v, scale, left, right, softcap, first, end, offset, keep):
    """One sequence: q [n, H, D], k and v [m, H', D] -> o, lse [n, H]; keep: dropout's scaled mask [H, n, m], or None."""
    n, H, _ = q.shape
    m = k.shape[0]
    k, v = (x.repeat_interleave(H // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    position, key = torch.arange(n)[:, None] + offset, torch.arange(m)
    allowed = (key >= first) & (key < end)
    if left is not None:
        allowed = allowed & (key >= position - left)
    if right is not None:
        allowed = allowed & (key <= position + right)
    sees = allowed.any(-1, keepdim=True)
    lse = torch.where(allowed, scores, -torch.inf).masked_fill(~sees, 0).logsumexp(-1, keepdim=True)
    p = torch.where(allowed, (scores - lse).exp(), 0)
    out = torch.einsum("hij,jhd->ihd", p if keep is None else p * keep.to(p.dtype), v)
    return out, lse.masked_fill(~sees, -torch.inf).squeeze(-1).T


def kept(seed, row, n, m, head, H, p):
    """Dropout's scaled mask [H, n, m] by the contract in reference/_philox.py."""
    i, j = torch.arange(row, row + n)[:, None], torch.arange(-(-m // 8))
    mask = [draws(seed, j, i, h, 1).flatten(1)[:, :m] >= drop_threshold(p) for h in range(head, head + H)]
    return torch.stack(mask).double() / (1 - drop_threshold(p) / 65536)


def expected(dtype, q, k, v, do, dlse, bounds, scale, left, right, softcap, dropout_p, seed):
    """o, lse, dq, dk, dv in `dtype`; bounds: (batch, q start, n, k start, m, first, end) of each sequence."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    H = q.shape[-2]
    o, lse, total = torch.zeros(q.shape, dtype=dtype), torch.full(q.shape[:-1], -torch.inf, dtype=dtype), 0
    for batch, q_start, n, k_start, m, first, end in bounds:
        at = lambda x, start, count, b=batch: (x if b is None else x[b])[start : start + count]
        keep = None
        if dropout_p:
            keep = kept(seed, q_start, n, m, 0 if batch is None else batch * H, H, dropout_p)
        part = at(q, q_start, n), at(k, k_start, m), at(v, k_start, m)
        out, part_lse = written_out(*part, scale, left, right, softcap, first, end, m - n, keep)
        at(o, q_start, n).copy_(out.detach())
        at(lse, q_start, n).copy_(part_lse.detach())
        total = total + (out * at(do, q_start, n).to(dtype)).sum()
        if dlse is not None:
            total = total + torch.where(part_lse.isfinite(), part_lse * at(dlse, q_start, n), 0).sum()
    return o, lse, *torch.autograd.grad(total + 0 * (q.sum() + k.sum() + v.sum()), (q, k, v))


def spread(x):
    """The same values, far apart in memory."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), 7.0, dtype=x.dtype)
    wide[..., 2:-1] = x
    return wide[..., 2:-1]


def problem(lengths, padding, heads, dtype, window, softcap, dropout_p, dlse, layout, seed=-7):
    """(q, k, v, do, dlse), settings for the kernel and bounds for `expected`."""
    H, heads_k, D = heads
    scale = 1.5 * D**-0.5
    if padding is None:
        shape_q, shape_k = (sum(lengths[0]),), (sum(lengths[1]),)
        cu = [torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in lengths]
        starts = [x.tolist() for x in cu]
        rows = zip(starts[0], lengths[0], starts[1], lengths[1], strict=False)
        bounds = [(None, a, n, b, m, 0, m) for a, n, b, m in rows]
        sequences = (*cu, None)
    else:
        B, S, keys = len(lengths[0]), max(lengths[0]), max(lengths[1])
        shape_q, shape_k = (B, S), (B, keys)
        ends = [(0, m) if padding == "right" else (keys - m, keys) for m in lengths[1]]
        key_lengths = torch.tensor(lengths[1] if padding == "right" else ends)
        bounds = [(b, 0, S, 0, keys, *ends[b]) for b in range(B)]
        sequences = (None, None, key_lengths)
    q, do = (torch.randn(*shape_q, H, D).to(dtype) for _ in range(2))
    k, v = (torch.randn(*shape_k, heads_k, D).to(dtype) for _ in range(2))
    dlse = torch.randn(*shape_q, H) if dlse else None
    if layout == "strided":
        q, k, v, do = (spread(x) for x in (q, k, v, do))
    settings = (scale, *window, softcap, *sequences, dropout_p, torch.tensor(seed))
    return (q, k, v, do, dlse), settings, (bounds, scale, *window, softcap, dropout_p, seed)


def compute(q, k, v, do, dlse, settings):
    o, lse = kernel.forward(q, k, v, *settings)
    return o, lse, *kernel.backward(do, dlse, q, k, v, o, lse, *settings)


@pytest.fixture
def use(request):
    """use(name): bfloat16 by these matrix instructions from now on, until the test is over."""
    before = extension.C.matrix()
    request.addfinalizer(lambda: extension.C.set_matrix(before))
    return extension.C.set_matrix


CASES = pairwise(FACTORS)
# More rows and keys than a tile has, not a multiple of it; heads that fill the pairs of a product and that do not.
PAIRED = pairwise(FACTORS | {"dtype": [torch.bfloat16], "layout": ["strided"]}, seed=1)
MATRICES = [name for name in extension.C.matrices() if name != "none"] if extension.C else []
name_of = lambda case: "-".join(str(x).replace(" ", "") for x in case.values())


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_forward_and_backward(no_worse, case):
    check(no_worse, case)


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("case", PAIRED, ids=name_of)
def test_products_of_pairs(no_worse, use, case, matrix):
    """P and dS are rounded to bfloat16 there, as the formula in bfloat16 rounds them."""
    use(matrix)
    check(no_worse, case, torch.bfloat16)


def check(no_worse, case, plain_dtype=torch.float32):
    tensors, settings, others = problem(**case)
    ours = compute(*tensors, settings)
    exact = expected(torch.float64, *tensors, *others)
    plain = expected(torch.float32, *tensors, *others)
    if plain_dtype != torch.float32:
        o, _, *gradients = expected(plain_dtype, *tensors, *others)
        plain = o, plain[1], *gradients
    assert torch.equal(ours[1].isfinite(), exact[1].isfinite())
    finite = exact[1].isfinite()
    if not finite.any():
        assert not any(x.any() for i, x in enumerate(ours) if i != 1)
        return
    # The gradients are sums of terms that may cancel: p (dp - delta) k, where delta is as large as dp.
    q, k, v, do, _ = (None if x is None else x.double() for x in tensors)
    largest = lambda x, y: float(x.abs().max() * y.abs().max()) if x.numel() and y.numel() else 0.0
    scales = [0, 0, largest(k, do), largest(q, do), largest(do, do)]
    for i, (name, scale) in enumerate(zip(("o", "lse", "dq", "dk", "dv"), scales, strict=True)):
        result = [x[i][finite] if name == "lse" else x[i] for x in (ours, plain, exact)]
        dtype = torch.float32 if name == "lse" else case["dtype"]
        no_worse(name, result[0], result[1].to(dtype), result[2], scale=scale if case["dtype"] == torch.float32 else 0)


THREADED = {
    "packed": (([200, 17, 150, 65], [200, 30, 150, 65]), None, (4, 2, 32)),
    "padded": (([200, 17, 150, 65], [200, 30, 150, 65]), "left", (4, 2, 32)),
    "keys in parts": (([130, 0, 9], [1100, 3, 70]), None, (2, 1, 16)),
}


def test_keys_in_parts(no_worse):
    """Few units and many keys: backward splits them, here one sequence of which fits in a tile."""
    tensors, settings, others = problem(
        *THREADED["keys in parts"], torch.float32, (None, 0), 2.0, 0.25, True, "strided"
    )
    exact, plain = (expected(dtype, *tensors, *others) for dtype in (torch.float64, torch.float32))
    for name, *result in zip(("o", "lse", "dq", "dk", "dv"), compute(*tensors, settings), plain, exact, strict=True):
        no_worse(name, *result)


@pytest.mark.parametrize("matrix", ["none", *MATRICES])
@pytest.mark.parametrize("case", THREADED.values(), ids=THREADED)
def test_thread_count_changes_nothing(use, case, matrix):
    use(matrix)
    dtype = torch.float32 if matrix == "none" else torch.bfloat16
    tensors, settings, _ = problem(*case, dtype, (None, 0), None, 0.25, True, "strided")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(compute(*tensors, settings))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", extension.C.isas() if extension.C else [])
def test_every_instruction_set(no_worse, isa):
    tensors, settings, others = problem(
        ([65, 17], [70, 30]), None, (4, 2, 40), torch.float32, (None, 0), 2.0, 0.25, True, "contiguous"
    )
    exact, plain = (expected(dtype, *tensors, *others) for dtype in (torch.float64, torch.float32))
    best = extension.C.isa()
    extension.C.set_isa(isa)
    try:
        ours = compute(*tensors, settings)
    finally:
        extension.C.set_isa(best)
    for name, *result in zip(("o", "lse", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        no_worse(name, *result)


@pytest.mark.skipif(not MATRICES, reason="no extension")
def test_matrix_instructions_are_chosen_and_refused(use):
    """Not for a few queries against many keys, where most of a tile would be padding; never where they are not."""
    use(MATRICES[-1])
    with pytest.raises(ValueError, match="'amx' are not supported by this CPU; see matrices()"):
        use("amx")
    assert extension.C.matrix() == MATRICES[-1]
    for queries, differs in ((3, MATRICES[-1] == "emulated"), (40, True)):
        tensors, settings, _ = problem(
            ([queries], [200]), None, (2, 2, 64), torch.bfloat16, (None, None), None, 0.0, False, "contiguous"
        )
        use(MATRICES[-1])
        in_pairs = compute(*tensors, settings)
        use("none")
        in_floats = compute(*tensors, settings)
        assert any(not torch.equal(x, y) for x, y in zip(in_pairs, in_floats, strict=True)) == differs


def test_dropout_is_the_contract():
    """v selects single keys, so that o shows the mask; padded batches count heads over the batch, packed ones do not."""
    B, S, H, p, seed = 2, 19, 3, 0.4, 2**40 + 5
    q, k = torch.zeros(B, S, H, 32), torch.zeros(B, S, H, 32)
    v = torch.eye(S, 32)[None, :, None].expand(B, S, H, 32)
    o, _ = kernel.forward(q, k, v, 1.0, None, None, None, None, None, None, p, torch.tensor(seed))
    for b in range(B):
        mask = kept(seed, 0, S, S, b * H, H, p)
        torch.testing.assert_close(o[b, :, :, :S].transpose(0, 1).double() * S, mask, rtol=1e-6, atol=1e-6)
    cu = torch.tensor([0, S, 2 * S], dtype=torch.int32)
    o, _ = kernel.forward(
        *(x.flatten(0, 1) for x in (q, k, v)), 1.0, None, None, None, cu, cu, None, p, torch.tensor(seed)
    )
    torch.testing.assert_close(
        o[S:, :, :S].transpose(0, 1).double() * S, kept(seed, S, S, S, 0, H, p), rtol=1e-6, atol=1e-6
    )


def test_expanded_gradient_and_garbage_in_the_padding():
    """dout of stride 0, as sum() gives it; NaN in keys and values past the end reaches nothing."""
    q, k, v = torch.randn(2, 9, 2, 16), torch.randn(2, 9, 2, 16), torch.randn(2, 9, 2, 16)
    for x in (k, v):
        x[0, 5:] = torch.nan
        x[1, :3] = torch.nan
    settings = (0.25, None, None, None, None, None, torch.tensor([[0, 5], [3, 9]]), 0.0, None)
    ours = compute(q, k, v, torch.ones(()).expand(q.shape), None, settings)
    same = compute(q, k, v, torch.ones(q.shape), None, settings)
    assert all(torch.equal(x, y) and x.isfinite().all() for x, y in zip(ours, same, strict=True))
    assert not ours[3][0, 5:].any() and not ours[4][1, :3].any()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty(shape):
    q = torch.randn(*shape, 2, 16)
    settings = (1.0, None, 0, None, None, None, None, 0.0, None)
    assert all(x.shape[:2] == shape for x in compute(q, q, q, q, None, settings))
