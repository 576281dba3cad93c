"""The CPU kernels under the address and undefined-behaviour sanitizers: sanitize.cpp, a program without Python."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++17", "-O0", "-g1", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", f"-I{ROOT / 'csrc'}"]
FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on this machine")
def test_cpu_kernels_are_clean(tmp_path):
    sources = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), Path(__file__).with_name("sanitize.cpp")]
    objects = [tmp_path / f"{source.stem}.o" for source in sources]
    compile_one = lambda pair: subprocess.run(
        ["g++", *FLAGS, "-c", pair[0], "-o", pair[1]], capture_output=True, text=True
    )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(compile_one, zip(sources, objects, strict=True)):
            assert done.returncode == 0, done.stderr[-3000:]
    program = tmp_path / "sanitize"
    done = subprocess.run(["g++", *FLAGS, *objects, "-o", program], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the sanitizers' libraries are missing: {done.stderr[-300:]}")
    done = subprocess.run(
        [program], env={"ASAN_OPTIONS": "detect_leaks=0"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout == "clean\n", done.stderr[-4000:]
