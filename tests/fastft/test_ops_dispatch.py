"""The choice of a backend, and what every op must bring along."""

import importlib
import inspect
import re
import threading
from pathlib import Path

import pytest
import torch

import fastft
from fastft.ops import dispatch

ROOT = Path(__file__).resolve().parents[2]
has_cpp = pytest.mark.skipif(dispatch.unavailable("cpp") is not None, reason=str(dispatch.unavailable("cpp")))


@pytest.fixture(autouse=True)
def automatic():
    dispatch.set_backend("auto")
    yield
    dispatch.set_backend("auto")


def tensors(cols=16, dtype=torch.float32, device="cpu"):
    return torch.ones(2, cols, dtype=dtype, device=device), torch.ones(cols, dtype=dtype, device=device)


@has_cpp
def test_automatic_choice_on_the_cpu():
    assert dispatch.choose("rms_norm", *tensors()) == "cpp"
    assert dispatch.choose("rms_norm", *tensors(dtype=torch.float64)) == "reference"


def test_automatic_choice_without_the_extension(monkeypatch):
    monkeypatch.setattr(dispatch.extension, "missing", "no compiler")
    assert dispatch.choose("rms_norm", *tensors()) == "reference"
    assert "not cpp: no compiler" in dispatch.explain("rms_norm", *tensors())
    with fastft.backend("cpp"), pytest.raises(fastft.BackendError, match="'cpp' was asked for .*: no compiler"):
        fastft.ops.rms_norm(*tensors())


def test_meta_tensors_take_the_reference():
    x, weight = tensors(device="meta")
    assert fastft.ops.rms_norm(x, weight).device.type == "meta"


def test_interpreter_is_used_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    monkeypatch.setattr(dispatch, "_no_triton", None)
    assert dispatch.choose("rms_norm", *tensors()) != "triton"
    assert "not triton: Triton's interpreter" in dispatch.explain("rms_norm", *tensors())


def test_triton_without_a_gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with (
        fastft.backend("triton"),
        pytest.raises(fastft.BackendError, match="serves CUDA tensors, and these are on cpu"),
    ):
        fastft.ops.rms_norm(*tensors())


def test_long_rows_are_refused_by_name():
    kernel = pytest.importorskip("fastft_kernels.triton.rms_norm")
    with fastft.backend("triton"):
        assert dispatch.choose("rms_norm", *tensors(kernel.MAX_COLS)) == "triton"
        with pytest.raises(fastft.BackendError, match=f"at most {kernel.MAX_COLS} elements.*{kernel.MAX_COLS + 1}"):
            fastft.ops.rms_norm(*tensors(kernel.MAX_COLS + 1))
        x, weight = tensors(kernel.MAX_COLS)
        with pytest.raises(fastft.BackendError, match=f"at most {kernel.MAX_TRAINED_COLS} elements"):
            fastft.ops.rms_norm(x, weight.requires_grad_())


@has_cpp
def test_forced_backend_gives_its_reason():
    with fastft.backend("cpp"), pytest.raises(fastft.BackendError, match="cannot serve: it computes .*torch.float64"):
        fastft.ops.rms_norm(*tensors(dtype=torch.float64))
    with fastft.backend("cpp"):
        assert dispatch.explain("rms_norm", *tensors()).startswith("rms_norm: cpp, as asked for")


@has_cpp
def test_explain():
    text = dispatch.explain("rms_norm", *tensors())
    assert text.splitlines()[0] == "rms_norm: cpp, chosen automatically"
    assert "not reference: cpp comes first" in text and "not triton: " in text


def test_contexts_nest_and_end():
    with fastft.backend("reference"):
        with pytest.raises(KeyError), fastft.backend("cpp"):
            assert dispatch.requested() == "cpp"
            raise KeyError
        assert dispatch.requested() == "reference"
    assert dispatch.requested() == "auto"


def test_context_belongs_to_its_thread_and_default_to_the_process():
    fastft.set_backend("reference")
    seen = []
    with fastft.backend("cpp"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.requested()))
        thread.start()
        thread.join()
        assert dispatch.requested() == "cpp"
    assert seen == ["reference"]


@pytest.mark.parametrize("use", [fastft.set_backend, lambda name: fastft.backend(name).__enter__()])
def test_unknown_backend(use):
    with pytest.raises(ValueError, match="backend 'cuda' is unknown: choose one of auto, reference, triton, cpp"):
        use("cuda")


@pytest.mark.parametrize("op", [name for name in fastft.ops.__all__ if not inspect.isclass(getattr(fastft.ops, name))])
def test_every_op_has_its_parts(op):
    """A function that stays one when its submodule is imported, tests, and for what has kernels a reference."""
    function = getattr(fastft.ops, op)
    assert inspect.isfunction(function)
    file = function.__module__.rpartition(".")[2]
    importlib.import_module(f"fastft.ops.{file}")
    assert inspect.isfunction(getattr(fastft.ops, op))
    if file in dispatch._predicates:
        importlib.import_module(f"fastft_kernels.reference.{file}")
    tests = [*(ROOT / "tests" / "kernels").glob("test_*.py"), *(ROOT / "tests" / "fastft").glob("test_ops_*.py")]
    assert any(re.search(rf"\b{op}\b", path.read_text()) for path in tests)


@pytest.mark.parametrize("op", dispatch._predicates)
def test_kernels_of_an_op_share_signatures(op):
    modules = [
        importlib.import_module(f"fastft_kernels.{name}.{op}")
        for name in dispatch._predicates[op]
        if dispatch.unavailable(name) is None
    ]
    public = lambda module: {name for name, f in inspect.getmembers(module, inspect.isfunction) if name[0] != "_"}
    own = lambda module: {name for name in public(module) if getattr(module, name).__module__ == module.__name__}
    shared = set.intersection(*map(own, modules)) if modules else set()
    assert shared or len(modules) < 2
    for function in shared:
        assert len({str(inspect.signature(getattr(module, function))) for module in modules}) == 1
