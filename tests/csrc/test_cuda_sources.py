"""csrc/cuda/*.cu: nvcc compiles them for every architecture without spills. (test_wheel.py loads an extension with them.)"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastft_kernels.cpp import adamw8bit, extension

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on this machine")


@nvcc
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_without_spills(tmp_path, source, arch):
    flags = ["-std=c++17", "-O3", "--fmad=false", f"-I{ROOT / 'csrc'}", f"-arch=sm_{arch}", "-Xptxas", "-v"]
    command = ["nvcc", *flags, "-c", str(source), "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    assert spills and set(spills) == {"0"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_why_it_cannot_run():
    if extension.missing:
        pytest.skip(extension.missing)
    assert re.search("built without CUDA|no CUDA device", adamw8bit.why_not_cuda())
