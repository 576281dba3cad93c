"""The compiled extension `fastft_kernels._C`, or why there is none. The one place that may miss it.

It is imported after torch, whose OpenMP library then serves both: there is one pool of threads.
"""

import torch

from fastft_kernels.cpp import sources


def _load():
    """(the extension, None), or (None, why there is none)."""
    try:
        from fastft_kernels import _C
    except ImportError as error:
        advice = "FASTFT_BUILD_EXT=1 pip install . builds it or says why not"
        return None, f"fastft_kernels._C cannot be imported ({error}); {advice}"
    if sources.digest() not in (None, getattr(_C, "sources", "")):
        return (
            None,
            "fastft_kernels._C was built from other sources than csrc/ holds now; pip install -e . builds it anew",
        )
    return _C, None


C, missing = _load()

DTYPES = {getattr(torch, name): code for name, code in C.dtypes.items()} if C else {}


def address(tensor):
    """Where the data of `tensor` starts; 0, the null pointer, for None."""
    return 0 if tensor is None else tensor.data_ptr()


def row_stride(matrix):
    """Elements from one row of `matrix` to the next; 0 for None."""
    return 0 if matrix is None else matrix.stride(0)


def why_not_cuda():
    """Why CUDA kernels of the extension cannot run here, or None."""
    if C is None or not C.has_cuda:
        return "the extension was built without CUDA: nvcc was not found, or failed"
    return None if C.cuda_device_count() else "there is no CUDA device, or no driver"
