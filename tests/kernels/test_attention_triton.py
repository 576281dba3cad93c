"""The Triton attention kernels against float64: no worse than PyTorch in the same dtype, on memory that held NaN.

The cases are a pairwise cover: every pair of settings of two axes occurs in some case.
"""

import itertools
import random

import pytest
import torch

from fastft_kernels.reference import _philox

pytest.importorskip("triton")
from fastft_kernels.triton import _attention_config as config
from fastft_kernels.triton import _attention_hopper as hopper
from fastft_kernels.triton import attention as kernel
from fastft_kernels.triton import attention_backward

pytestmark = pytest.mark.usefixtures("poisoned")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AXES = {
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "D": [16, 24, 32, 40, 48, 64, 72, 80, 96, 112, 128, 160, 192, 256],
    "heads": [(1, 1), (2, 1), (2, 2)],
    "lengths": [  # of the queries and of the keys of each sequence or example
        ([1], [1]),
        ([17, 0, 5], [17, 3, 0]),
        ([63], [65]),
        ([65], [17]),
        ([9, 33], [20, 40]),
        ([1, 40], [70, 40]),
    ],
    "layout": ["packed", "batch", "key_lengths", "left-padded"],
    "mask": [(None, None), (None, 0), (5, 0), (20, 7), (None, 3), (40, None)],
    "softcap": [None, None, 1.5],
    "dropout_p": [0.0, 0.0, 0.3],
    "dlse": [False, True],
    "blocks": [(32, 32, 4, 1), (16, 64, 4, 1), (64, 32, 4, 1)],
}
HOPPER_AXES = AXES | {
    "dtype": [torch.bfloat16, torch.float16],
    "D": [16, 40, 64, 80, 112, 192, 256],
    "dropout_p": [0.0],
    "blocks": [(32, 32, 4, 1), (16, 64, 4, 1), (64, 16, 4, 1)],
    "heads_first": [False, True],  # how transformers' tensors lie in memory
}


def pairwise(axes, seed=0):
    """Cases in which every pair of values occurs: each new case is the best of a few that a yet uncovered pair starts."""
    generator, names = random.Random(seed), list(axes)
    values = {name: range(len(axes[name])) for name in names}
    left = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in values[a] for y in values[b]}
    pairs = lambda case: set(itertools.combinations(case.items(), 2))
    while left:
        start = dict(min(left))
        tries = [{name: start.get(name, generator.choice(values[name])) for name in names} for _ in range(30)]
        best = max(tries, key=lambda case: len(pairs(case) & left))
        left -= pairs(best)
        yield {name: axes[name][i] for name, i in best.items()}


CASES = list(pairwise(AXES))
HOPPER_CASES = list(pairwise(HOPPER_AXES, seed=1))


def name(case):
    values = case | {"dtype": str(case["dtype"])[6:], "blocks": case["blocks"][:2]}
    return "-".join(str(value).replace(" ", "") for value in values.values())


def tensors(case):
    """(q, k, v), the settings of a kernel after the softcap, and what the reference takes for them."""
    (lengths_q, lengths_k), (H, heads_k), D = case["lengths"], case["heads"], case["D"]
    sequences = {"cu_seqlens_q": None, "cu_seqlens_k": None, "key_lengths": None}
    if case["layout"] == "packed":
        shapes = (sum(lengths_q),), (sum(lengths_k),)
        for side, lengths in (("q", lengths_q), ("k", lengths_k)):
            bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
            sequences[f"cu_seqlens_{side}"] = bounds.to(DEVICE)
    else:
        B, Sk = len(lengths_q), max(lengths_k)
        shapes = (B, max(lengths_q)), (B, Sk)
        ends = torch.tensor(lengths_k)
        if case["layout"] == "key_lengths":
            sequences["key_lengths"] = (ends - ends // 3).to(DEVICE)
        elif case["layout"] == "left-padded":
            sequences["key_lengths"] = torch.stack([Sk - ends + ends // 3, torch.full_like(ends, Sk)], 1).to(DEVICE)

    def make(shape, heads):
        x = torch.randn(*shape, heads, D).to(DEVICE, case["dtype"])
        return x.transpose(-2, -3).contiguous().transpose(-2, -3) if case.get("heads_first") else x

    return (make(shapes[0], H), make(shapes[1], heads_k), make(shapes[1], heads_k)), sequences


def differentiate(function, inputs, dtype, do, dlse):
    """o, lse, dq, dk, dv of `function`, computed in `dtype`, by autograd."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    o, lse = function(*inputs)
    loss = (o * do).sum()
    if dlse is not None:
        seen = lse.isfinite()
        loss = loss + (lse[seen] * dlse[seen]).sum()
    return o, lse, *torch.autograd.grad(loss, inputs)


def plain(case, sequences, seed):
    """Attention as PyTorch's calls in the dtype at hand, dropout's mask from the reference."""
    (lengths_q, lengths_k), (left, right) = case["lengths"], case["mask"]
    packed, key_lengths = case["layout"] == "packed", sequences["key_lengths"]

    def part(q, k, v, first, end, rows, number):
        n, m, H = q.shape[0], k.shape[0], q.shape[1]
        k, v = (x.repeat_interleave(H // k.shape[1], 1) for x in (k, v))
        s = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
        if case["softcap"]:
            s = case["softcap"] * torch.tanh(s / case["softcap"])
        i, j = torch.arange(n, device=DEVICE)[:, None] + m - n, torch.arange(m, device=DEVICE)
        see = (j >= first) & (j < end) & (i == i)
        see = see if left is None else see & (j >= i - left)
        see = see if right is None else see & (j <= i + right)
        sees = see.any(-1, keepdim=True)
        s = torch.where(see, s, -torch.inf)
        p = torch.where(sees, s.masked_fill(~sees, 0).softmax(-1), 0)
        if case["dropout_p"]:
            keep = reference_keep(n, m, H, rows, number, case["dropout_p"], seed)
            p = p * keep.to(p.dtype)
        return torch.einsum("hij,jhd->ihd", p, v), s.logsumexp(-1).T

    def run(q, k, v):
        if packed:
            starts = [0, *itertools.accumulate(lengths_q)]
            parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), starts, strict=False)
            results = [part(a, b, c, 0, b.shape[0], start, 0) for a, b, c, start in parts]
            return tuple(torch.cat(x) for x in zip(*results, strict=True))
        results = []
        for b in range(q.shape[0]):
            first, end = 0, k.shape[1]
            if key_lengths is not None:
                first, end = (0, int(key_lengths[b])) if key_lengths.dim() == 1 else key_lengths[b].tolist()
            results.append(part(q[b], k[b], v[b], first, end, 0, b * q.shape[2]))
        return tuple(torch.stack(x) for x in zip(*results, strict=True))

    return run


def reference_keep(n, m, H, row, head, p, seed):
    """Dropout's scaled mask [H, n, m], from the contract itself."""
    block = torch.arange(-(-m // 8))
    rows, heads = row + torch.arange(n)[:, None], head + torch.arange(H)[:, None, None]
    keep = _philox.draws(seed, block, rows, heads, 1).flatten(-2)[..., :m] >= _philox.drop_threshold(p)
    return (keep / (1 - _philox.drop_threshold(p) / 65536)).to(DEVICE)


@pytest.fixture
def on_hopper(monkeypatch):
    """A GPU of compute capability 9.0, or the interpreter in its place, and kernels that are not Hopper's fail."""
    if DEVICE == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setattr(config, "architecture", lambda device: 90)
    for owner, name in (
        (kernel, "forward_kernel"),
        (attention_backward, "dkdv_kernel"),
        (attention_backward, "dq_kernel"),
    ):
        monkeypatch.setattr(owner, name, None)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_no_worse_than_pytorch(case, no_worse, monkeypatch):
    monkeypatch.setattr(config, "blocks", lambda *_: case["blocks"])
    monkeypatch.setattr(hopper, "ENABLED", False)
    check(case, no_worse)


@pytest.mark.parametrize("case", HOPPER_CASES, ids=name)
def test_no_worse_than_pytorch_on_hopper(case, no_worse, on_hopper, monkeypatch):
    if DEVICE == "cpu":  # the compiler divides no smaller tiles among warps than those of the tables
        monkeypatch.setattr(hopper, "blocks", lambda *_: case["blocks"])
    check(case, no_worse)


def check(case, no_worse):
    inputs, sequences = tensors(case)
    if not inputs[0].numel() or not inputs[1].numel():
        pytest.skip("nothing to attend")
    seed = torch.tensor(2**61 + 12345)
    left, right = case["mask"]
    scale = case["D"] ** -0.5
    settings = (scale, left, right, case["softcap"], *sequences.values(), case["dropout_p"], seed)
    o, lse = kernel.forward(*inputs, *settings)
    do, dlse = torch.randn_like(o), torch.randn_like(lse) if case["dlse"] else None
    ours = o, lse, *kernel.backward(do, dlse, *inputs, o, lse, *settings)
    run = plain(case, sequences, int(seed))
    theirs = differentiate(run, inputs, case["dtype"], do, dlse)
    exact = differentiate(run, inputs, torch.float64, do.double(), None if dlse is None else dlse.double())
    seen = exact[1].isfinite()
    assert torch.equal(lse.isfinite(), seen), "which rows see nothing"
    assert not o[~seen].any() and not ours[2][~seen].any(), "a row that sees nothing gives 0"
    no_worse("lse", lse[seen], theirs[1][seen].float(), exact[1][seen])
    # A gradient sums terms that may cancel: with one visible key ds is exactly 0.
    terms = float((do.float() @ inputs[2].float().abs().amax().expand(case["D"], 1)).abs().amax()) * scale
    for label, mine, other, truth in zip(
        ("o", "dq", "dk", "dv"), ours[:1] + ours[2:], theirs[:1] + theirs[2:], exact[:1] + exact[2:], strict=True
    ):
        no_worse(label, mine, other, truth, steps=8, scale=terms if label in ("dq", "dk") else 0.0)


WIDE = {"lengths": ([150, 1, 130], [150, 9, 130]), "heads": (2, 1), "softcap": None, "dropout_p": 0.0, "dlse": False}


@pytest.mark.parametrize("D, mask", [(64, (None, 0)), (128, (None, None))])
def test_hopper_tables(D, mask, no_worse, on_hopper):
    check(WIDE | {"dtype": torch.bfloat16, "D": D, "layout": "packed", "mask": mask}, no_worse)


@pytest.mark.parametrize("mask", [(1, None), (None, 1), (3, 2)])
def test_hopper_windows_that_end_with_a_tile(mask, no_worse, on_hopper, monkeypatch):
    monkeypatch.setattr(hopper, "blocks", lambda *_: (16, 32, 4, 1))
    check(WIDE | {"lengths": ([51], [51]), "dtype": torch.float16, "D": 16, "layout": "batch", "mask": mask}, no_worse)


@pytest.mark.parametrize("where", ["hopper", "elsewhere"])
@pytest.mark.parametrize("layout", ["packed", "key_lengths", "left-padded"])
@pytest.mark.parametrize("right", [None, 0])
def test_what_is_not_seen_may_be_nan(right, layout, where, request, monkeypatch):
    monkeypatch.setattr(hopper, "ENABLED", where == "hopper")
    if where == "hopper":
        request.getfixturevalue("on_hopper")
    case = {"lengths": ([5, 33, 17], [5, 33, 17]), "heads": (2, 1), "layout": layout, "D": 64, "dtype": torch.bfloat16}
    inputs, sequences = tensors(case)
    do = torch.randn_like(inputs[0])
    settings = (0.125, None, right, None, *sequences.values(), 0.0, None)

    def run():
        o, lse = kernel.forward(*inputs, *settings)
        results = o, *kernel.backward(do, None, *inputs, o, lse, *settings)
        return [torch.cat([x[:5], x[38:]]) for x in results] if layout == "packed" else results

    clean = run()
    if layout == "packed":
        for x in (*inputs, do):
            x[5:38] = float("nan")
    else:
        _, k, v = inputs
        for b, bounds in enumerate(sequences["key_lengths"].tolist()):
            first, end = (0, bounds) if layout == "key_lengths" else bounds
            for x in (k, v):
                x[b, :first] = x[b, end:] = float("nan")
    for ours, theirs in zip(run(), clean, strict=True):
        assert torch.equal(ours, theirs)


def served(**changed):
    """Whether Hopper's kernels take a causal call, changed in one respect."""
    q = changed.pop("q", torch.zeros(2, 32, 4, 64, dtype=torch.bfloat16))
    settings = {"left": None, "right": 0, "softcap": None, "dropout_p": 0.0} | changed
    left, right, softcap, dropout_p = settings.values()
    call = config.Call(q, q, q, 0.125, left, right, softcap, None, None, None, dropout_p, torch.tensor(0))
    return hopper.serves(call)


def test_hopper_kernels_serve_what_they_can(monkeypatch):
    x = torch.zeros(2, 32, 4, 80, dtype=torch.bfloat16)
    monkeypatch.setattr(config, "architecture", lambda device: 80)
    assert not served(), "no Hopper GPU"
    monkeypatch.setattr(config, "architecture", lambda device: 90)
    assert served() and served(left=16) and served(softcap=30.0) and served(q=x) and served(q=x.half()[..., 8:72])
    assert not served(dropout_p=0.1)
    assert not served(q=x.float()), "matrix units take half precision"
    assert not served(q=x[..., 1:65]) and not served(q=x[..., :1, :60].contiguous()), "steps of 16 bytes"
    assert not served(q=x[:, :1].expand(2, 32, 4, 80)), "no step of zero"
    monkeypatch.setattr(hopper, "ENABLED", False)
    assert not served()
    monkeypatch.setattr(hopper, "ENABLED", True)
    monkeypatch.setattr(hopper.triton, "__version__", "4.0.0")
    assert not served(), "a Triton that it was not compiled by"
