"""The wheel: with and without the compiled extension, and where there is no compiler. Each is imported from an empty folder."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "csrc", "fastft", "kernels")
BUILDS = {
    "without": {"FASTFT_BUILD_EXT": "0"},
    "with": {"FASTFT_BUILD_EXT": "1", "CXXFLAGS": "-O0"},  # compiled in a fifth of the time
    "no-compiler": {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++", "NVCC_CCBIN": "/nonexistent"},
}
CODE = """
import pathlib, torch, fastft, fastft_kernels, fastft.ops
from fastft.ops import dispatch
for package in (fastft, fastft_kernels, fastft.ops):
    assert pathlib.Path(package.__file__).is_relative_to(pathlib.Path.cwd().parent / "wheel"), package.__file__
x, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8, requires_grad=True)
fastft.ops.rms_norm(x, weight).sum().backward()
assert x.grad is not None and weight.grad is not None
print(dispatch.instruction_set())
if dispatch.instruction_set():  # with CUDA kernels where nvcc is; they load where there is no driver
    import shutil, fastft_kernels._C as C
    assert C.has_cuda == (shutil.which("nvcc") is not None), "csrc/cuda/ was left out"
    assert not C.has_cuda or C.cuda_device_count() == torch.cuda.device_count()
"""


@pytest.fixture(scope="module", params=BUILDS)
def build(request, tmp_path_factory):
    """(name, folder that the wheel is unpacked in) for each way to build it."""
    if importlib.util.find_spec("pybind11") is None:
        pytest.skip("building without isolation needs pybind11: pip install pybind11")
    folder = tmp_path_factory.mktemp(request.param)
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    environment = {k: v for k, v in os.environ.items() if k != "FASTFT_BUILD_EXT"} | BUILDS[request.param]
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(folder),
    ]
    done = subprocess.run([*command, str(source)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "wheel")
    return request.param, folder / "wheel"


def test_contents(build):
    name, wheel = build
    assert {path.name.split("-")[0] for path in wheel.iterdir()} == {"fastft", "fastft_kernels"}
    assert bool(list((wheel / "fastft_kernels").glob("_C.*"))) == (name == "with")
    packaged = {path.relative_to(wheel) for path in wheel.rglob("*.py")}
    written = {path.relative_to(ROOT) for path in (ROOT / "fastft").rglob("*.py")}
    written |= {path.relative_to(ROOT / "kernels") for path in (ROOT / "kernels").rglob("*.py")}
    assert packaged == written
    assert list(wheel.glob("*.dist-info/licenses/LICENSE"))


def test_imports_from_an_empty_folder(build):
    name, wheel = build
    empty = wheel.parent / "empty"
    empty.mkdir()
    # -S leaves out what site-packages would add, such as an editable install of this repository
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(wheel), *sorted(libraries)])
    done = subprocess.run(
        [sys.executable, "-S", "-c", CODE], cwd=empty, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout.strip() != "None") == (name == "with")
