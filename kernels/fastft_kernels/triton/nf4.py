"""Weights in 4 bits on the GPU, in Triton: for GPUs where no nvcc was at build time. Equation and layout: reference/nf4.py.

A program quantises one block, or reads 2048 elements. The 16 values lie in one line of the first level cache. Nothing is
contracted and divisions are rounded correctly, so the numbers are those of the other rooms.
"""

import torch
import triton
import triton.language as tl

from fastft_kernels.reference.nf4 import BLOCK, VALUES

BYTES = 1024
WARPS = 4


@triton.jit
def code_of(x, values_ptr):
    code = tl.zeros_like(x).to(tl.int32)
    for i in tl.static_range(15):
        middle = (tl.load(values_ptr + i) + tl.load(values_ptr + i + 1)) * 0.5
        code += tl.where(x > middle, 1, 0)
    return code


@triton.jit(do_not_specialize=["numel"])
def quantize_kernel(x_ptr, values_ptr, codes_ptr, absmax_ptr, numel, BLOCK: tl.constexpr):
    number = tl.program_id(0).to(tl.int64)
    byte = number * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    first = tl.load(x_ptr + 2 * byte, 2 * byte < numel, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + 2 * byte + 1, 2 * byte + 1 < numel, other=0.0).to(tl.float32)
    absmax = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), axis=0)
    scale = tl.div_rn(absmax * 0.0 + 1.0, tl.maximum(absmax, 1e-38))
    code = code_of(first * scale, values_ptr) << 4 | code_of(second * scale, values_ptr)
    tl.store(codes_ptr + byte, code.to(tl.uint8), 2 * byte < numel)
    tl.store(absmax_ptr + number, absmax)


@triton.jit(do_not_specialize=["offset", "numel"])
def dequantize_kernel(
    codes_ptr,
    absmax_ptr,
    map_ptr,
    nested_ptr,
    values_ptr,
    y_ptr,
    offset,
    numel,
    BLOCK: tl.constexpr,
    DOUBLE: tl.constexpr,
    BYTES: tl.constexpr,
):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    mask = 2 * byte < numel
    block = 2 * byte // BLOCK
    packed = tl.load(codes_ptr + byte, mask, other=0).to(tl.int32)
    absmax = tl.load(absmax_ptr + block, mask, other=0)
    if DOUBLE:
        absmax = tl.load(map_ptr + absmax.to(tl.int32)) * tl.load(nested_ptr + block // 256, mask, other=0.0) + offset
    first = tl.load(values_ptr + (packed >> 4)) * absmax
    second = tl.load(values_ptr + (packed & 15)) * absmax
    element = tl.program_id(0).to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    y = tl.interleave(first, second).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + element, y, element < numel)


_VALUES = {}


def _values(device):
    if device not in _VALUES:
        _VALUES[device] = VALUES.to(device)
    return _VALUES[device]


def quantize(x, block=BLOCK):
    x = x.contiguous()
    codes = x.new_empty((x.numel() + 1) // 2, dtype=torch.uint8)
    absmax = x.new_empty(triton.cdiv(x.numel(), block), dtype=torch.float32)
    if x.numel():
        with torch.cuda.device_of(x):
            quantize_kernel[absmax.shape](
                x, _values(x.device), codes, absmax, x.numel(), BLOCK=block, num_warps=1, enable_fp_fusion=False
            )
    return codes, absmax


def dequantize(codes, absmax, double, y, block=BLOCK):
    values, nested, offset = double or (_values(y.device), _values(y.device), 0.0)
    if y.numel():
        with torch.cuda.device_of(y):
            dequantize_kernel[(triton.cdiv(codes.numel(), BYTES),)](
                codes,
                absmax,
                values,
                nested,
                _values(y.device),
                y,
                offset,
                y.numel(),
                BLOCK=block,
                DOUBLE=double is not None,
                BYTES=BYTES,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
