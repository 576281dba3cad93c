"""Hopper's own attention kernels: which calls they serve, and their block sizes. Equations and arguments: those of the others.

    _attention_hopper_forward.py   four warps only load, eight compute
    _attention_hopper_dkdv.py      tiles of up to four times as many queries, as no loop needs pointers
    _attention_hopper_dq.py

They copy tiles in bulk, by tensor descriptors. Dropout, float32, memory that a bulk copy cannot address and versions of Triton
that they were not compiled with are left to the other kernels. No GPU has run them: the interpreter proves the arithmetic,
tests/kernels/test_warp_specialised.py that the warps wait for each other, tests/kernels/aot what the compiler makes of it.
"""

import triton

from fastft_kernels.triton import _attention_config as config
from fastft_kernels.triton._attention_hopper_dkdv import dkdv_kernel
from fastft_kernels.triton._attention_hopper_dq import dq_kernel
from fastft_kernels.triton._attention_hopper_forward import forward_kernel

KERNELS = {
    "forward": forward_kernel,
    "dq": dq_kernel,
    **dict.fromkeys(("dkdv", "dk", "dv"), dkdv_kernel),
}

ENABLED = True
"""whether Hopper GPUs take these kernels where they serve; set False to compare, or to rule one out"""

COMPILED_BY = ("3.6.", "3.7.", "3.8.", "3.9.")
"""versions of Triton that are known to split the forward's loop among warps; others may fail to"""

# fmt: off
# (kernel, with a softcap) -> (BLOCK_M, BLOCK_N, warps, stages) by config.SIZES; the forward's loop has 12 warps of its own.
FORWARD = (
    (128, 128, 4, 3), (128, 128, 4, 3), (128, 128, 4, 3), (128, 128, 4, 2), (128, 128, 4, 2), (128, 64, 4, 3), (128, 32, 4, 3)
)
BLOCKS = {
    ("forward", False): FORWARD,
    ("dkdv", False):
    ((128, 128, 8, 2), (64, 128, 8, 3), (64, 128, 8, 3), (64, 128, 8, 2)),
    ("dk", False):
    ((64, 128, 8, 2), (32, 128, 8, 2)),
    ("dv", False):
    ((64, 128, 8, 3), (64, 128, 8, 2)),
    ("dq", False):
    ((128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2)),
    ("forward", True): FORWARD,
    ("dkdv", True):
    ((64, 128, 8, 3), (64, 128, 8, 3), (32, 128, 8, 2), (32, 128, 8, 2)),
    ("dk", True):
    ((32, 128, 8, 2), (32, 128, 8, 2)),
    ("dv", True):
    ((64, 128, 8, 3), (64, 128, 8, 2)),
    ("dq", True):
    ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2)),
}
# fmt: on


def choose(name, kernel, call, *others):
    """(kernel, its blocks) for a call: Hopper's own where it serves, else `kernel`.

    others: the tensors [B, S, H, D] that are loaded beside q, k and v.
    """
    if serves(call, *others):
        return KERNELS[name], blocks(name, call.constants["SOFTCAP"], call.q.shape[-1])
    return kernel, call.blocks(name)


def blocks(name, softcap, D):
    """(BLOCK_M, BLOCK_N, warps, stages) of a kernel."""
    row = BLOCKS[name, softcap]
    return next(entry for size, entry in zip(config.SIZES[name], row, strict=True) if size >= D)


def serves(call, *others):
    """Whether these kernels take a call."""
    return (
        ENABLED
        and config.architecture(call.q.device) == 90
        and triton.__version__.startswith(COMPILED_BY)
        and not call.constants["DROPOUT"]
        and call.q.element_size() == 2
        and all(_bulk(x) for x in (call.q, call.k, call.v, *others))
    )


def _bulk(x):
    """Whether bulk copies can address x [B, S, H, D]: in steps of 16 bytes, none of them zero."""
    steps = [x.element_size() * stride for stride in x.stride()[:3]]
    return x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)
