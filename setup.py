"""Builds the optional extension `fastft_kernels._C` from csrc/; everything else is in pyproject.toml.

The extension includes no torch header and links no torch library: one build serves every torch version.

FASTFT_BUILD_EXT unset   build it if the compiler can, otherwise install without it
FASTFT_BUILD_EXT=1       build it or fail
FASTFT_BUILD_EXT=0       do not build it
FASTFT_BUILD_JOBS=n      compile n files at once; by default as many as there are cores
CXXFLAGS, NVCC_APPEND_FLAGS   flags that are to win over the ones below

Where nvcc is found (CUDA_HOME/bin or the PATH), csrc/cuda/*.cu are compiled into it too, with CUDA's run-time library linked
statically: the extension loads where there is no driver. If nvcc fails, the extension is built without them.
"""

import os
import runpy
import shlex
import shutil
import subprocess
import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# No contraction of a * b + c into one rounding: every instruction set computes the same bits. errno and traps, which
# nobody reads, would keep loops from being vectorised.
COMPILE = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"]
COMPILE += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
LINK = []
if sys.platform.startswith("linux"):
    COMPILE += ["-fopenmp"]
    LINK += ["-fopenmp"]
elif sys.platform == "win32":
    COMPILE = ["/std:c++17", "/O2", "/EHsc", "/fp:precise"]

COMPILE += shlex.split(os.environ.get("CXXFLAGS", ""))

# Machine code for Ampere, Hopper and Blackwell, and PTX for what comes later. No fused multiply-add: the CPU's bits.
CUDA_ARCHITECTURES = (80, 90, 100)
NVCC = ["-std=c++17", "-O3", "--fmad=false", "--threads=0", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
NVCC += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHITECTURES]
NVCC += [f"-gencode=arch=compute_{CUDA_ARCHITECTURES[-1]},code=compute_{CUDA_ARCHITECTURES[-1]}"]


def extensions():
    """The extension as a list of one, or of none where it is not wanted or pybind11 is missing."""
    mode = os.environ.get("FASTFT_BUILD_EXT")
    if mode not in (None, "0", "1"):
        raise SystemExit(f"FASTFT_BUILD_EXT is {mode!r}: allowed are 0 (skip), 1 (build or fail) or unset (try)")
    if mode == "0":
        return []
    try:
        import pybind11
    except ImportError:
        if mode == "1":
            raise SystemExit("FASTFT_BUILD_EXT=1 needs pybind11: pip install 'pybind11>=2.13'") from None
        return []
    from pybind11.setup_helpers import ParallelCompile

    ParallelCompile("FASTFT_BUILD_JOBS").install()
    extension = Extension(
        "fastft_kernels._C",
        sources=sorted(glob("csrc/**/*.cpp", recursive=True)),
        depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/cuda/*.cu")),
        include_dirs=[pybind11.get_include(), "csrc"],
        define_macros=[("FASTFT_SOURCES", runpy.run_path("kernels/fastft_kernels/cpp/sources.py")["digest"]())],
        language="c++",
        extra_compile_args=COMPILE,
        extra_link_args=LINK,
        optional=mode is None,
    )
    return [extension]


def find_nvcc():
    """Path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=os.path.join(home, "bin"))) or shutil.which("nvcc")


class BuildWithCuda(build_ext):
    """Adds the objects that nvcc makes of csrc/cuda/*.cu; goes on without them where it cannot."""

    def build_extension(self, ext):
        nvcc = find_nvcc()
        if nvcc and sys.platform.startswith("linux"):
            try:
                ext.extra_objects = [*self.cuda_objects(nvcc), cudart_static(nvcc)]
                ext.extra_link_args = [*ext.extra_link_args, "-ldl", "-lrt", "-lpthread"]
                ext.define_macros = [*ext.define_macros, ("FASTFT_CUDA", "1")]
            except (OSError, subprocess.CalledProcessError) as error:
                print(f"fastft: CUDA kernels are left out: {error}\n{getattr(error, 'stderr', None) or ''}")
        super().build_extension(ext)

    def cuda_objects(self, nvcc):
        os.makedirs(self.build_temp, exist_ok=True)
        objects = []
        for source in sorted(glob("csrc/cuda/*.cu")):
            objects.append(os.path.join(self.build_temp, os.path.basename(source) + ".o"))
            command = [nvcc, *NVCC, "-Icsrc", "-c", source, "-o", objects[-1]]
            subprocess.run(command, check=True, capture_output=True, text=True)
        return objects


def cudart_static(nvcc):
    homes = [os.path.dirname(os.path.dirname(os.path.realpath(nvcc))), "/usr/local/cuda"]
    folders = [f"{home}/{part}" for home in homes for part in ("lib64", "targets/*/lib", "lib")]
    found = [path for folder in folders for path in glob(f"{folder}/libcudart_static.a")]
    if not found:
        raise FileNotFoundError(f"no libcudart_static.a under {' or '.join(homes)}")
    return found[0]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildWithCuda})
