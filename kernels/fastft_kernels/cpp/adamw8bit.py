"""8-bit AdamW and Lion on the CPU: Python face of csrc/cpu/adamw8bit.cpp. Equations and codes: reference/adamw8bit.py.

Arguments as in cpp/adamw.py. The same bits as the reference, for every thread count and instruction set.

Bytes moved per element, float32 gradient and no copy: AdamW 10 read, 6 written; Lion 9 read, 5 written.
"""

import torch

from fastft_kernels.cpp.adamw import update
from fastft_kernels.cpp.extension import C, address

BLOCK = 256


def adamw8bit(weights, grads, copies, m_codes, m_absmax, v_codes, v_absmax, scalars, maps=None):
    update(C.adamw8bit, weights, grads, copies, (m_codes, m_absmax, v_codes, v_absmax), scalars, maps)


def lion8bit(weights, grads, copies, m_codes, m_absmax, scalars, maps=None):
    update(C.lion8bit, weights, grads, copies, (m_codes, m_absmax), scalars, maps)


def quantize(x, signed, maps=None):
    x = x.contiguous()
    blocks = -(-x.numel() // BLOCK)
    codes, absmax = torch.zeros(blocks, BLOCK, dtype=torch.uint8), torch.zeros(blocks)
    C.quantize8(
        address(x), address(codes), address(absmax), x.numel(), int(signed), address(maps), torch.get_num_threads()
    )
    return codes, absmax


def dequantize(codes, absmax, numel, signed, maps=None):
    x = torch.empty(numel)
    C.dequantize8(
        address(codes), address(absmax), address(x), numel, int(signed), address(maps), torch.get_num_threads()
    )
    return x
