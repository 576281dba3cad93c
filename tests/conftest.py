"""What every test sees: where the code under test comes from, the data folder, and Triton that runs without a GPU.

Without a CUDA device the Triton kernels run in Triton's interpreter, which must be chosen before triton is imported.
Tests that compile kernels ahead of time do so in a process of their own (`compile_ahead`).
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("FASTFT_SHARED", ROOT.parent / "shared"))
HAS_TRITON = importlib.util.find_spec("triton") is not None


def load(name):
    """The module tests/<name>.py. This folder is not on sys.path: its fastft/ would shadow the package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1":
    load("interpreter_bf16").repair()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """A process that holds a gloo group ends as training does: torn down by the interpreter, it may abort."""
    import torch.distributed as dist

    if dist.is_initialized() and hasattr(config, "exit_status"):
        from fastft.engine import leave

        leave(config.exit_status)


def pytest_collection_modifyitems(items):
    """Files that launch ranks come first: they take minutes, and a worker that begins one last would leave the others idle."""
    launching = {item.path for item in items if item.get_closest_marker("distributed")}
    items.sort(key=lambda item: item.path not in launching)


def pytest_sessionfinish(session, exitstatus):
    session.config.exit_status = int(exitstatus)


def pytest_report_header():
    import fastft
    import fastft_kernels
    from fastft_kernels.cpp import extension

    built = f"{extension.C.__file__}, {extension.C.isa()}" if extension.C else extension.missing
    return [
        f"fastft: {Path(fastft.__file__).parent}",
        f"fastft_kernels: {Path(fastft_kernels.__file__).parent}",
        f"extension: {built}",
        f"torch {torch.__version__}, CUDA {'yes' if torch.cuda.is_available() else 'no'}",
        f"nvcc: {shutil.which('nvcc') or 'not found, so the CUDA sources are not compiled'}",
    ]


@pytest.fixture
def shared():
    """The folder with data sets and small models."""
    if not SHARED.is_dir():
        pytest.skip(f"no data folder at {SHARED}: set FASTFT_SHARED")
    return SHARED


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory holds NaN, so that an element which a kernel forgets to write is seen."""

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def no_worse():
    """no_worse(name, ours, plain, exact): our error is at most that of plain PyTorch in the same dtype, plus a tolerance.

    `exact` is the result in float64. Errors are relative to its largest element or, where terms cancel, to `scale`, the
    largest of the terms. The tolerance is half a unit of the dtype, the rounding of the result, where either may be
    lucky, and `steps` units of float32, because the arithmetic before it is done in another order.
    """

    def check(name, ours, plain, exact, steps=4, scale=0.0):
        assert ours.shape == exact.shape and ours.dtype == plain.dtype, f"{name}: {ours.shape} of {ours.dtype}"
        if ours.numel() == 0:
            return
        tolerance = 0.5 * torch.finfo(ours.dtype).eps + steps * torch.finfo(torch.float32).eps
        ours, plain, exact = (result.detach().double() for result in (ours, plain, exact))
        scale = max(float(exact.abs().max()), float(scale), torch.finfo(torch.float32).tiny)
        error, allowed = (float((result - exact).abs().max()) / scale for result in (ours, plain))
        assert error <= allowed + tolerance, f"{name}: error {error:.3g}, PyTorch's {allowed:.3g} + {tolerance:.3g}"

    return check


@pytest.fixture(scope="session")
def compile_ahead():
    """compile_ahead(variants) -> reports: see aot_report.py; kernels are compiled for GPUs, in a process of its own."""

    def run(variants, *options):
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        command = [sys.executable, str(Path(__file__).with_name("aot_report.py")), *options]
        done = subprocess.run(command, input=json.dumps(variants), env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout)

    return run
