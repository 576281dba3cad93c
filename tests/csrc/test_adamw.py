"""csrc/cpu/adamw*.cpp: the same bits for every thread count and instruction set; sums that do not overflow."""

import pytest
import torch

from fastft_kernels.cpp import extension

if extension.missing:
    pytest.skip(extension.missing, allow_module_level=True)

from fastft_kernels.cpp import adamw as kernel
from fastft_kernels.cpp import adamw8bit as kernel8
from fastft_kernels.reference.adamw import scalars
from fastft_kernels.reference.adamw8bit import dynamic_maps

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 70_000, 0, 255, 100_001]


def compute(dtype, sizes=SIZES):
    """Everything the kernels write, after two steps of each of them."""
    generator = torch.Generator().manual_seed(1)
    numbers = scalars(1e-2, 0.9, 0.99, 1e-8, 0.1, 3, 1.7)
    draw = lambda: [torch.randn(n, generator=generator) for n in sizes]
    grads = [g.to(dtype) for g in draw()]
    copies = [None] * len(sizes) if dtype == torch.float32 else [torch.zeros_like(g) for g in grads]
    w, m, v = draw(), draw(), [x.abs() for x in draw()]
    kernel.adamw(w, grads, copies, m, v, numbers)
    written = [*w, *m, *v, kernel.square_sum(grads)]
    written += by_rows(dtype, generator, numbers)
    for maps in (None, dynamic_maps()):
        states = [[kernel8.quantize(x, signed, maps) for x in xs] for xs, signed in ((m, True), (v, False))]
        lists = [[pair[i] for pair in state] for state in states for i in (0, 1)]
        kernel8.adamw8bit(w, grads, copies, *lists, numbers, maps)
        kernel8.lion8bit(w, grads, copies, *lists[:2], numbers, maps)
        values = [kernel8.dequantize(c, a, n, True, maps) for c, a, n in zip(*lists[:2], sizes, strict=True)]
        written += [x.clone() for x in (*w, *values)] + [x for part in lists for x in part]
    return written + [c for c in copies if c is not None]


def by_rows(dtype, generator, numbers):
    """What the kernel writes of a table of which few rows have a gradient."""
    table, m, v = (torch.randn(700, 50, generator=generator).abs() for _ in range(3))
    rows, copy = (
        torch.tensor([[0, 1, 400, 699]]),
        None if dtype == torch.float32 else torch.zeros_like(table, dtype=dtype),
    )
    values = torch.randn(4, 50, generator=generator)
    grad = torch.sparse_coo_tensor(rows, values, table.shape, is_coalesced=True, check_invariants=True)
    kernel.adamw_by_rows([table], [grad], [copy], [m], [v], numbers)
    return [table, m, v] if copy is None else [table, m, v, copy]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_thread_count(threads, dtype):
    threads(1)
    alone = compute(dtype)
    for count in (2, 5):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(compute(dtype), alone, strict=True))


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_instruction_set(dtype, isa):
    if isa not in extension.C.isas():
        pytest.skip(f"this CPU has no {isa}")
    before = extension.C.isa()
    try:
        extension.C.set_isa("scalar")
        expected = compute(dtype, [1, 300, 5000])
        extension.C.set_isa(isa)
        assert all(torch.equal(a, b) for a, b in zip(compute(dtype, [1, 300, 5000]), expected, strict=True))
    finally:
        extension.C.set_isa(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(dtype):
    tensors = [torch.randn(n).to(dtype) for n in SIZES]
    exact = sum(t.double().square().sum() for t in tensors)
    torch.testing.assert_close(kernel.square_sum(tensors), exact, rtol=1e-14, atol=0)
    assert kernel.square_sum([]) == 0
    assert kernel.square_sum([torch.full((40,), 3e38)]).isfinite()
    assert kernel.square_sum([torch.tensor([1.0, float("nan")])]).isnan()
    assert kernel.square_sum([torch.tensor([1.0, -float("inf")])]).isinf()
