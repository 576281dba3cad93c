"""What all of csrc/ shares: conversions between element types, and the choice of an instruction set."""

import subprocess
import sys

import pytest
import torch

from fastft_kernels.cpp import extension, sources

if extension.missing:
    pytest.skip(extension.missing, allow_module_level=True)

from fastft_kernels.cpp import rms_norm


def add(a, b):
    """a + b as the kernels compute it: widened, added in float32, rounded. (The h of an RMSNorm with a residual.)"""
    return rms_norm.forward(a, torch.ones_like(a[0]), 1.0, 0.0, b)[1]


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def isa(request):
    if request.param not in extension.C.isas():
        pytest.skip(f"this CPU has no {request.param}")
    before = extension.C.isa()
    extension.C.set_isa(request.param)
    yield request.param
    extension.C.set_isa(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_value_survives(isa, dtype):
    """Widening is exact and rounding restores the value, for all 65536 bit patterns (any NaN stays a NaN)."""
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype).view(64, 1024)
    ours = add(every, torch.full_like(every, -0.0))
    assert torch.equal(ours.isnan(), every.isnan())
    kept = ~every.isnan()
    assert torch.equal(ours.view(torch.int16)[kept], every.view(torch.int16)[kept])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_as_torch_does(isa, dtype):
    """To nearest even: normal and subnormal results, ties, overflow to infinity."""
    a, b = torch.randint(-32768, 32768, (2, 256, 1024), dtype=torch.int16).view(dtype)
    for other in (b, a, -a / 2, a / 256, a / 2048):
        ours, expected = add(a, other), a + other
        assert torch.equal(ours.isnan(), expected.isnan())
        kept = ~expected.isnan()
        assert torch.equal(ours.view(torch.int16)[kept], expected.view(torch.int16)[kept])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_within_a_kernel_as_torch_does(isa, dtype):
    """A value that is rounded without being stored, as in Llama's norm; a million products hold about a hundred ties."""
    x = torch.randn(512, 2048).to(dtype)
    x[:256] *= 2.0**-20
    y, _, rstd = rms_norm.forward(x, torch.ones_like(x[0]), 1.0, 0.0, None)
    assert torch.equal(y, (x.float() * rstd[:, None]).to(dtype))


def test_instruction_sets_are_named():
    names = extension.C.isas()
    assert names == ["scalar", "avx2", "avx512"][: len(names)]
    assert extension.C.isa() == names[-1]
    with pytest.raises(ValueError, match="instruction set 'sse9' is not supported"):
        extension.C.set_isa("sse9")


def test_unknown_dtype_code_is_refused():
    with pytest.raises(ValueError, match="unknown dtype code"):
        extension.C.rms_norm_forward(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0, 7, 7, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_shares_torchs_openmp():
    """One OpenMP library in the process, hence one pool of threads."""
    code = "import fastft_kernels.cpp.extension; print(*{l.split()[-1] for l in open('/proc/self/maps') if 'libgomp' in l})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 1


def test_an_extension_of_other_sources_is_refused(monkeypatch, tmp_path):
    assert sources.digest() == extension.C.sources
    monkeypatch.setattr(sources, "digest", lambda: "0123456789abcdef")
    c, missing = extension._load()
    assert c is None and "built from other sources" in missing
    monkeypatch.undo()
    monkeypatch.setattr(sources, "CSRC", tmp_path / "csrc")  # a wheel has none
    assert extension._load() == (extension.C, None)


def test_the_hash_of_sources_tells_every_change(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "CSRC", tmp_path)
    seen = {sources.digest()}
    for name, text in (("a.h", "int a;"), ("a.h", "int b;"), ("cpu/a.h", "int b;"), ("b.cu", ""), ("b.cpp", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        seen.add(sources.digest())
    assert len(seen) == 6
    (tmp_path / "a.h.orig").write_text("what editors leave")
    assert sources.digest() in seen
