"""The AMX kernels on every CPU with AVX512-BF16: amx.cpp carries out what the CPU does not know."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++17", "-O2", "-g0", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", f"-I{ROOT / 'csrc'}"]


@pytest.mark.skipif(
    shutil.which("g++") is None or not sys.platform.startswith("linux") or platform.machine() != "x86_64",
    reason="g++ on Linux on x86-64 is needed",
)
def test_instructions_of_the_tiles(tmp_path):
    sources = [*sorted((ROOT / "csrc" / "cpu").glob("attention*.cpp")), Path(__file__).with_name("amx.cpp")]
    program = tmp_path / "amx"
    done = subprocess.run(["g++", *FLAGS, *sources, "-o", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    if done.stdout == "no AVX512-BF16\n":
        pytest.skip("the CPU has no AVX512-BF16")
    assert done.stdout in ("native\n", "emulated\n")
