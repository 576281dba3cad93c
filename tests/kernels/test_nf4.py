"""Weights in 4 bits: the kernels equal the reference bit for bit, the reference float64, and codes bitsandbytes'."""

import importlib
import importlib.util

import pytest
import torch

from fastft_kernels.cpp import extension
from fastft_kernels.reference import nf4 as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [0, 1, 2, 31, 32, 33, 63, 64, 65, 130, 1000, 16384 + 77]
INTERPRETED = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, in the interpreter


@pytest.fixture(params=["cpp", "triton"])
def kernel(request):
    if request.param == "cpp" and extension.missing:
        pytest.skip(extension.missing)
    if request.param == "triton" and (importlib.util.find_spec("triton") is None or torch.cuda.is_available()):
        pytest.skip("runs in Triton's interpreter")
    return importlib.import_module(f"fastft_kernels.{request.param}.nf4")


def weight(n, dtype, scale=0.02):
    x = torch.randn(n) * scale * 10.0 ** torch.randint(-3, 1, (n,))
    x[3::11] = 0
    return x.to(dtype)


def read(module, codes, absmax, double, n, dtype, block):
    y = torch.full((n,), float("nan"), dtype=dtype)
    module.dequantize(codes, absmax, double, y, block)
    return y


@INTERPRETED
@pytest.mark.parametrize("dtype, block", list(zip(DTYPES, (32, 64, 256), strict=True)))
def test_kernels_are_the_reference_bit_for_bit(kernel, dtype, block):
    for n in SIZES if kernel.__name__.endswith("cpp.nf4") else (0, 1, 130):
        x = weight(n, dtype)
        codes, absmax = reference.quantize(x, block)
        assert all(torch.equal(a, b) for a, b in zip(kernel.quantize(x, block), (codes, absmax), strict=True)), n
        codes8, double = reference.quantize_absmax(absmax)
        for scales in ((absmax, None), (codes8, double)):
            ours, plain = (read(module, codes, *scales, n, dtype, block) for module in (kernel, reference))
            assert torch.equal(ours, plain) and not plain.isnan().any(), n


@INTERPRETED
def test_extremes(kernel):
    """Blocks of zeros, of denormal numbers, of the largest float: as the reference, finite, and zero stays zero."""
    x = torch.zeros(6 * 64)
    x[64:128], x[128:192], x[192:256], x[256:320] = 1e-45, torch.randn(64) * 1e-39, 3.4e38, -0.0
    x[320:384:3] = -1.5
    codes, absmax = reference.quantize(x)
    ours = kernel.quantize(x)
    assert torch.equal(ours[0], codes) and torch.equal(ours[1], absmax)
    y = read(kernel, codes, absmax, None, x.numel(), torch.float32, 64)
    assert torch.equal(y, read(reference, codes, absmax, None, x.numel(), torch.float32, 64))
    assert y.isfinite().all() and (y[x == 0] == 0).all() and (y[192:256] == 3.4e38).all()
    assert (y[320:384:3] == -1.5).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_against_float64(dtype):
    """The value taken is the nearest of 16 to rounding, and is read as float64 computes it, rounded once."""
    x = weight(64 * 50, dtype)
    codes, absmax = reference.quantize(x)
    values, blocks = reference.VALUES.double(), absmax.double().repeat_interleave(64)
    pairs = torch.stack([codes >> 4, codes & 15], 1).flatten().int()
    exact = values[pairs] * blocks
    best = (x.double()[:, None] - values * blocks[:, None]).abs().amin(1)
    assert ((x.double() - exact).abs() - best <= 1e-7 * blocks).all()
    y = read(reference, codes, absmax, None, x.numel(), dtype, 64)
    assert ((y.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps * 0.501 + torch.finfo(dtype).tiny).all()


def test_double_quantisation_against_float64():
    absmax = torch.rand(700) * 0.1
    codes, (values, nested, offset) = reference.quantize_absmax(absmax)
    assert abs(offset - absmax.double().mean()) < 1e-8
    rest = absmax.double() - offset
    for block in range(3):
        part = slice(256 * block, 256 * (block + 1))
        assert nested[block].double() == pytest.approx(rest[part].abs().max().item(), rel=1e-6)
        candidates = values.double() * nested[block].double()
        best = (rest[part, None] - candidates).abs().amin(1)
        error = (candidates[codes[part].int()] - rest[part]).abs()
        assert (error - best <= 1e-7 * nested[block]).all()
    again = reference.read_absmax(codes, (values, nested, offset))
    assert ((again - absmax).abs() <= 0.012 * absmax.max()).all()


@pytest.mark.skipif(extension.C is None, reason=str(extension.missing))
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_threads_and_instruction_set(dtype):
    from fastft_kernels.cpp import nf4

    x, threads, best = weight(300_001, torch.bfloat16), torch.get_num_threads(), extension.C.isa()
    codes, absmax = reference.quantize(x)
    codes8, double = reference.quantize_absmax(absmax)
    expected = read(reference, codes, codes8, double, x.numel(), dtype, 64)
    try:
        for isa in extension.C.isas():
            extension.C.set_isa(isa)
            for count in (1, 3):
                torch.set_num_threads(count)
                assert torch.equal(nf4.quantize(x)[0], codes)
                assert torch.equal(read(nf4, codes, codes8, double, x.numel(), dtype, 64), expected)
    finally:
        extension.C.set_isa(best)
        torch.set_num_threads(threads)


@INTERPRETED
def test_views_at_odd_addresses(kernel):
    x = weight(515, torch.float32)
    codes, absmax = reference.quantize(x)
    room = torch.full((530,), float("nan"))
    shifted = torch.cat([codes[:1], codes])[1:]
    kernel.dequantize(shifted, torch.cat([absmax[:1], absmax])[1:], None, room[3:518], 64)
    assert torch.equal(room[3:518], read(reference, codes, absmax, None, 515, torch.float32, 64))
    assert room[:3].isnan().all() and room[518:].isnan().all()


def test_published_codes():
    """What bitsandbytes 0.50.2 makes of numbers from -1 to 1."""
    codes, absmax = reference.quantize(torch.linspace(-1, 1, 33))
    assert bytes(codes.tolist()).hex() == "00011112233445667899abbccddeeefff7" and absmax == 1


def test_codes_are_those_of_bitsandbytes():
    """Where it is installed: its codes, and what it reads from them."""
    bnb = pytest.importorskip("bitsandbytes").functional
    for shape in ((64, 64), (33, 70), (300, 256)):
        for dtype in DTYPES:
            x = weight(shape[0] * shape[1], dtype).view(shape)
            theirs, state = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)
            codes, absmax = reference.quantize(x)
            assert torch.equal(theirs.view(-1), codes)
            assert state.offset == absmax.mean() and torch.equal(
                state.state2.absmax, reference.quantize_absmax(absmax)[1][1]
            )
            double = state.state2.code, state.state2.absmax, state.offset.item()
            y = read(reference, codes, state.absmax, double, x.numel(), dtype, 64)
            assert torch.equal(bnb.dequantize_4bit(theirs, state).view(-1), y)
