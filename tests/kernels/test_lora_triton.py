"""The Triton kernels of LoRA against float64: no worse than PyTorch in the same dtype, on memory that held NaN."""

import itertools

import pytest
import torch

from fastft_kernels.reference.lora import apply_mask

pytest.importorskip("triton")
from fastft_kernels.triton import _lora_config as config
from fastft_kernels.triton import lora as kernel
from fastft_kernels.triton._lora_product import LAYERS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SERVED = DTYPES[DEVICE == "cuda" :]  # on a GPU float32 is left to cuBLAS
TAKES = config.takes_thin, config.takes_product
# Rows, in, out, r: several tiles of each or a part of one; 16-byte rows, which descriptors read, and odd ones.
SIZES = [(1, 8, 3, 1), (70, 130, 90, 8), (33, 64, 136, 16), (37, 65, 129, 64), (17, 40, 33, 256)]


@pytest.fixture(autouse=True)
def everything_is_taken(monkeypatch):
    """On a GPU as in the interpreter: its tables leave small matrices to cuBLAS."""
    if DEVICE == "cuda":
        fits = lambda ranks, *matrices: len(ranks) <= LAYERS and all(t.numel() for t in matrices)
        monkeypatch.setattr(config, "takes_thin", lambda x, ranks, fewer_bytes: fits(ranks, x))
        take = lambda low, xs, weights, n_cols, ranks, masked: fits(ranks, low, *xs, *weights)
        monkeypatch.setattr(config, "takes_product", take)


def draw(*shape, dtype, strided=False):
    """About 1 each; strided: every second element of a row, from an address that is no multiple of 16 bytes."""
    x = torch.randn(*shape[:-1], 2 * shape[-1] + 1 if strided else shape[-1], device=DEVICE)
    return x.to(dtype)[..., 1::2] if strided else x.to(dtype)


def wide(*tensors):
    return [None if t is None else t.double() for t in tensors]


def layers_of(columns, outs, ranks, rows, dtype, strided=False):
    """x, and of each layer: W, bias, A, B, S, dy."""
    parts = {
        "x": draw(rows, columns, dtype=dtype, strided=strided),
        "W": [draw(out, columns, dtype=dtype, strided=strided) * columns**-0.5 for out in outs],
        "bias": [torch.randn(out, device=DEVICE) for out in outs],
        "A": [draw(r, columns, dtype=dtype) * columns**-0.5 for r in ranks],
        "B": [draw(out, r, dtype=dtype) * r**-0.5 for out, r in zip(outs, ranks, strict=True)],
        "S": [draw(rows, r, dtype=dtype) for r in ranks],
        "dy": [draw(rows, out, dtype=dtype, strided=strided) for out in outs],
        "seeds": [2**62 + 5 + i for i in range(len(outs))],
    }
    return parts


CASES = [
    (dtype, size, strided)
    for dtype, (i, size) in itertools.product(SERVED, enumerate(SIZES))
    for strided in ([False, True] if i in (1, 2) else [bool(i % 2)])
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("dtype", "size", "strided"), CASES)
class TestOneLayer:
    @pytest.mark.parametrize("with_bias", [True, False])
    def test_product(self, no_worse, dtype, size, strided, with_bias):
        rows, columns, out, r = size
        t = layers_of(columns, [out], [r], rows, dtype, strided)
        arguments = t["x"], t["W"][0], t["bias"][0] if with_bias else None, t["S"][0], t["B"][0]
        formula = lambda x, W, b, S, B: (x @ W.t() + S @ B.t() + (0 if b is None else b)).to(x.dtype)
        no_worse("y", kernel.product(*arguments), formula(*arguments), formula(*wide(*arguments)), steps=16)

    def test_gradients(self, no_worse, dtype, size, strided):
        rows, columns, out, r = size
        t = layers_of(columns, [out], [r], rows, dtype, strided)
        dy, S, B = t["dy"][0], t["S"][0], t["B"][0]
        down, up = kernel.gradients(dy, S, B)
        assert up.dtype == torch.float32
        no_worse("dS", down, dy @ B, dy.double() @ B.double(), steps=16)
        no_worse("dB", up.to(dtype), dy.t() @ S, dy.double().t() @ S.double(), steps=16)

    @pytest.mark.parametrize("p", [0.0, 0.1])
    def test_low_rank(self, no_worse, dtype, size, strided, p):
        rows, columns, out, r = size
        t = layers_of(columns, [out], [r], rows, dtype, strided)
        dropped = apply_mask(t["x"], p, t["seeds"][0]) if p else t["x"]
        S = kernel.low_rank(t["x"], t["A"], p, t["seeds"])
        no_worse("S", S, dropped @ t["A"][0].t(), dropped.double() @ t["A"][0].double().t(), steps=16)
        (da,) = kernel.adapter_gradients(t["x"], t["S"], p, t["seeds"])
        assert da.dtype == torch.float32
        no_worse("dA", da.to(dtype), t["S"][0].t() @ dropped, t["S"][0].double().t() @ dropped.double(), steps=16)


# Rows, in, out of each layer, r of each, parts of a sum.
GROUPS = [
    (40, 136, [70, 24], [8, 5], 3),
    (33, 65, [33, 17, 4], [1, 33, 16], 2),
    (70, 64, [64, 16, 16], [16, 16, 16], 1),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", SERVED)
@pytest.mark.parametrize(("rows", "columns", "outs", "ranks", "parts"), GROUPS)
def test_groups(no_worse, monkeypatch, rows, columns, outs, ranks, parts, dtype, p):
    """Layers that read the same x, a mask each; sums in one part and in several."""
    monkeypatch.setattr(config, "parallel", lambda device, programs: parts)
    t = layers_of(columns, outs, ranks, rows, dtype)
    mask = lambda x, seed: apply_mask(x, p, seed) if p else x

    def low_rank(x, *lora_a):
        return torch.cat([mask(x, seed) @ a.t() for a, seed in zip(lora_a, t["seeds"], strict=True)], 1)

    def adapter_gradients(x, *dlows):
        return [dlow.t() @ mask(x, seed) for dlow, seed in zip(dlows, t["seeds"], strict=True)]

    def branch(dlows, lora_a):
        return sum(mask(dlow @ a, seed) for dlow, a, seed in zip(dlows, lora_a, t["seeds"], strict=True))

    def input_gradient(dys, weights, dlows, lora_a):
        return branch(dlows, lora_a) + sum(dy @ W for dy, W in zip(dys, weights, strict=True))

    ours = kernel.low_rank(t["x"], t["A"], p, t["seeds"])
    no_worse("S", ours, low_rank(t["x"], *t["A"]), low_rank(*wide(t["x"], *t["A"])), steps=16)
    ours = kernel.adapter_gradients(t["x"], t["S"], p, t["seeds"])
    three = ours, adapter_gradients(t["x"], *t["S"]), adapter_gradients(*wide(t["x"], *t["S"]))
    for i, (da, plain, exact) in enumerate(zip(*three, strict=True)):
        no_worse(f"dA {i}", da.to(dtype), plain, exact, steps=16)
    lists = t["S"], t["A"]
    no_worse(
        "branch",
        kernel.branch(*lists, p, t["seeds"]),
        branch(*lists),
        branch(*(wide(*part) for part in lists)),
        steps=16,
    )
    lists = t["dy"], t["W"], *lists
    exact = input_gradient(*(wide(*part) for part in lists))
    no_worse("dx", kernel.input_gradient(*lists, p, t["seeds"]), input_gradient(*lists), exact, steps=16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5, 37), (130,), (257, 128)])
def test_mask_is_the_references(dtype, shape, poisoned):
    x = torch.randn(shape, device=DEVICE).to(dtype)
    for p, seed in ((0.1, 7), (0.5, -(2**63)), (1 - 1e-7, 2**63 - 1)):
        assert torch.equal(kernel.apply_mask(x, p, torch.tensor(seed)), apply_mask(x, p, seed))


def test_the_same_bits_every_time():
    t = layers_of(130, [90], [8], 200, torch.bfloat16)
    run = lambda: [*kernel.gradients(t["dy"][0], t["S"][0], t["B"][0]), kernel.low_rank(t["x"], t["A"], 0.1, [3])]
    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("stride", [2**22, 2**24])
def test_rows_beyond_32_bits(stride):
    """x as every so many elements of a matrix: its last rows begin after 2^31 elements."""
    import numpy

    rows, columns = 2**31 // stride + 5, 16
    if DEVICE == "cuda":
        memory = torch.zeros(rows * stride, dtype=torch.float16, device=DEVICE)
    else:
        memory = torch.from_numpy(numpy.zeros(rows * stride, numpy.int16)).view(
            torch.float16
        )  # pages come when touched
    x = memory.as_strided((rows, columns), (stride, 1))
    x[-1] = torch.arange(columns)
    W, A, B = (torch.ones(shape, dtype=torch.float16, device=DEVICE) for shape in ((8, columns), (1, columns), (8, 1)))
    total = columns * (columns - 1) // 2
    S = kernel.low_rank(x, [A], 0.0, None)
    assert S[-1] == total and not S[:-1].any()
    y = kernel.product(x, W, None, S, B)
    assert (y[-1] == 2 * total).all() and not y[:-1].any()
    (da,) = kernel.adapter_gradients(x, [S], 0.0, None)
    assert torch.equal(da[0], total * x[-1].float())


def test_what_no_kernel_takes():
    """Empty matrices and more layers than fit: the op then leaves them to PyTorch."""
    t = layers_of(16, [8] * (LAYERS + 1), [2] * (LAYERS + 1), 4, torch.float32)
    assert kernel.low_rank(t["x"], t["A"], 0.1, t["seeds"]) is None
    assert kernel.adapter_gradients(t["x"], t["S"], 0.1, t["seeds"]) is None
    assert kernel.input_gradient(t["dy"], t["W"], t["S"], t["A"], 0.0, None) is None
    empty, S = torch.empty(0, 16), torch.empty(0, 2)
    assert kernel.low_rank(empty, t["A"][:1], 0.0, None) is None
    assert kernel.product(empty, t["W"][0], None, S, t["B"][0]) is None
    assert kernel.gradients(torch.empty(0, 8), S, t["B"][0]) is None


MEASURED = set()
"""entries of FUSED_UP_TO, (architecture, masked, layers), that are no longer predictions"""


@pytest.mark.parametrize(("arch", "masked"), config.FUSED_UP_TO)
def test_the_table_says_what_is_predicted(arch, masked):
    """Fused where Triton's share of cuBLAS's speed reaches the break-even of kernels that save passes over the result."""
    share = config.EFFICIENCY[arch] - config.MASKED * masked
    for layers, depth in enumerate(config.FUSED_UP_TO[arch, masked], 1):
        needed = lambda depth, passes=2 * layers - 1: 1 / (1 + passes * config.RIDGE[arch] / depth)
        if depth and (arch, masked, layers) not in MEASURED:
            assert needed(depth) <= share + 1e-9 and needed(depth + 2) > share


def test_what_is_fused_on_a_gpu(monkeypatch):
    """On an H200: short depths, not long ones; nothing of few rows, odd columns, high ranks, or in float32."""
    monkeypatch.setattr(config, "architecture", lambda device: 90)
    takes_thin, takes_product = TAKES
    take = lambda rows, depth, columns, dtype=torch.bfloat16, rank=16, masked=False, layers=1: takes_product(
        torch.empty(rows, layers * rank, dtype=dtype),
        [torch.empty(rows, depth, dtype=dtype)] * layers,
        [torch.empty(columns, depth, dtype=dtype)] * layers,
        columns,
        [rank] * layers,
        masked,
    )
    assert take(2048, 2048, 2048) and not take(2048, 4096, 2048) and take(2048, 4096, 2048, layers=2)
    assert not take(1000, 2048, 2048) and not take(2048, 2048, 1000) and not take(2048, 2052, 2048)
    assert not take(2048, 2048, 2048, torch.float32) and not take(2048, 2048, 2048, rank=128)
    assert not take(2048, 2048, 2048, masked=True) and take(2048, 512, 2048, masked=True)
    x = torch.empty(64, 64, dtype=torch.bfloat16)
    assert takes_thin(x, [16], True) and not takes_thin(x, [16], False)
    assert not takes_thin(x[:, 1:], [16], True) and not takes_thin(x.float(), [16], True)
    monkeypatch.setattr(config, "architecture", lambda device: 80)
    assert take(2048, 2048, 2048) and not take(2048, 2024, 2048) and not take(2048, 2048, 2056)
    monkeypatch.setattr(config, "architecture", lambda device: 0)
    assert not take(2048, 2048, 2048) and not takes_thin(x, [16], True)
