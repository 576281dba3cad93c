"""Weights in 4 bits: Python face of csrc/cpu/nf4.cpp and csrc/cuda/nf4.cu. Equation and layout: reference/nf4.py.

The same bits as the reference, for every thread count and instruction set; float32, bfloat16 and float16.
"""

import torch

from fastft_kernels.cpp.extension import DTYPES, C, address, why_not_cuda
from fastft_kernels.reference.nf4 import BLOCK

__all__ = ["dequantize", "quantize", "why_not_cuda"]


def quantize(x, block=BLOCK):
    x = x.contiguous()
    codes, absmax = torch.empty((x.numel() + 1) // 2, dtype=torch.uint8), torch.empty(-(-x.numel() // block))
    C.nf4_quantize(
        address(x), address(codes), address(absmax), x.numel(), block, DTYPES[x.dtype], torch.get_num_threads()
    )
    return codes, absmax


def dequantize(codes, absmax, double, y, block=BLOCK):
    values, nested, offset = double or (None, None, 0.0)
    arguments = address(codes), address(absmax), address(values), address(nested), offset
    if y.is_cuda:
        with torch.cuda.device_of(y):
            stream = torch.cuda.current_stream().cuda_stream
            C.cuda_nf4_dequantize(*arguments, address(y), y.numel(), block, DTYPES[y.dtype], stream)
    else:
        C.nf4_dequantize(*arguments, address(y), y.numel(), block, DTYPES[y.dtype], torch.get_num_threads())
