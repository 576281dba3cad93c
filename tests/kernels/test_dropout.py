"""Dropout kernels: the mask and the numbers of the reference, whose distribution is that of torch's dropout."""

import importlib
import importlib.util

import pytest
import torch

from fastft_kernels.cpp import extension
from fastft_kernels.reference import _philox
from fastft_kernels.reference.dropout import dropout as reference

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["cpp", "triton"])
def kernel(request):
    if request.param == "cpp" and extension.missing:
        pytest.skip(extension.missing)
    if request.param == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return importlib.import_module(f"fastft_kernels.{request.param}.dropout").dropout


@pytest.fixture
def device(kernel):
    return "cuda" if "triton" in kernel.__module__ and torch.cuda.is_available() else "cpu"


def test_philox_is_the_published_one():
    """Known answers of Random123 (kat_vectors): philox4x32 with 10 rounds."""
    ones = 0xFFFFFFFF
    cases = [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, (ones, ones, ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ]
    for seed, counter, words in cases:
        draws = _philox.draws(seed, *(torch.tensor([c]) for c in counter))[0].tolist()
        assert [low | high << 16 for low, high in zip(draws[::2], draws[1::2], strict=True)] == list(words)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (3, 5), (2049,), (37, 130)])
def test_equals_the_reference(kernel, device, shape, dtype):
    x = torch.randn(shape, device=device).to(dtype)
    for p, seed in ((0.1, 7), (0.5, -(2**63)), (1 - 1e-7, 2**63 - 1)):
        y = kernel(x, p, torch.tensor(seed))
        assert y.dtype == dtype and torch.equal(y, reference(x, p, seed))


def test_any_strides(kernel, device):
    x = torch.randn(9, 40, device=device)
    for strided in (x[:, 3:], x.t(), x[:1].expand(5, 40)):
        y = kernel(strided, 0.5, 3)
        assert y.is_contiguous() and torch.equal(y, reference(strided.contiguous(), 0.5, 3))


def test_empty_and_special_values(kernel, device):
    assert kernel(torch.ones(0, 4, device=device), 0.5, 3).shape == (0, 4)
    kept = reference(torch.ones(400, device=device), 0.5, 3) != 0
    for value in (float("nan"), float("inf")):
        y = kernel(torch.full((400,), value, device=device), 0.5, 3)
        assert torch.equal(y != 0, kept) and not y[kept].isfinite().any()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1 - 1e-7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics(p, dtype):
    """Share and scale of what is kept, and no more agreement between neighbours, or seeds, than chance gives."""
    y = reference(torch.ones(1001, 201, dtype=dtype), p, 5)
    kept = y > 0
    p = min(round(p * 65536), 65535) / 65536
    assert abs(kept.double().mean() - (1 - p)) <= 4 * (p * (1 - p) / y.numel()) ** 0.5
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)), rtol=1e-6, atol=0)
    bits = kept.flatten()
    other = reference(torch.ones(1001, 201, dtype=dtype), p, 6).flatten() > 0
    pairs = [(bits[step:], bits[:-step]) for step in (1, 2, 3, 4, 8, 201)] + [(bits, other)]
    for first, second in pairs:
        chance = p * p + (1 - p) ** 2
        agreement = (first == second).double().mean()
        assert abs(agreement - chance) <= 5 * (chance * (1 - chance) / bits.numel()) ** 0.5
