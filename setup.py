"""Builds the optional extension `fastft_kernels._C` from csrc/; everything else is in pyproject.toml.

The extension includes no torch header and links no torch library: one build serves every torch version.

FASTFT_BUILD_EXT unset   build it if the compiler can, otherwise install without it
FASTFT_BUILD_EXT=1       build it or fail
FASTFT_BUILD_EXT=0       do not build it
"""

import os
import sys
from glob import glob

from setuptools import Extension, setup

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
    extension = Extension(
        "fastft_kernels._C",
        sources=sorted(glob("csrc/**/*.cpp", recursive=True)),
        depends=sorted(glob("csrc/**/*.h", recursive=True)),
        include_dirs=[pybind11.get_include(), "csrc"],
        language="c++",
        extra_compile_args=COMPILE,
        extra_link_args=LINK,
        optional=mode is None,
    )
    return [extension]


setup(ext_modules=extensions())
