"""8-bit AdamW and Lion: Python face of csrc/cpu/adamw8bit.cpp and csrc/cuda/adamw8bit.cu.

Equations and codes: reference/adamw8bit.py.
Arguments as in cpp/adamw.py. The same bits as the reference, for every thread count and instruction set.

Bytes moved per element, float32 gradient and no copy: AdamW 10 read, 6 written; Lion 9 read, 5 written.
"""

from array import array

import torch

from fastft_kernels.cpp.adamw import update
from fastft_kernels.cpp.extension import DTYPES, C, address, why_not_cuda

__all__ = ["adamw8bit", "dequantize", "lion8bit", "quantize", "why_not_cuda"]

BLOCK = 256


def adamw8bit(weights, grads, copies, m_codes, m_absmax, v_codes, v_absmax, scalars, maps=None):
    if weights and weights[0].is_cuda:
        states = (m_codes, m_absmax, v_codes, v_absmax)
        return _on_gpu(C.cuda_adamw8bit, weights, grads, copies, states, scalars, maps)
    update(C.adamw8bit, weights, grads, copies, (m_codes, m_absmax, v_codes, v_absmax), scalars, maps)


def lion8bit(weights, grads, copies, m_codes, m_absmax, scalars, maps=None):
    if weights and weights[0].is_cuda:
        return _on_gpu(C.cuda_lion8bit, weights, grads, copies, (m_codes, m_absmax), scalars, maps)
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


def _on_gpu(kernel, weights, grads, copies, states, scalars, maps):
    """One launch for all tensors; the table of addresses is copied to the GPU without waiting for it."""
    columns = [weights, grads, copies, *states]
    rows = [[column[0].numel(), *map(address, column)] for column in zip(*columns, strict=True)]
    first = [0]
    for row in rows:
        first.append(first[-1] + -(-row[0] // BLOCK))
    device = weights[0].device
    table = torch.tensor([*(x for row in rows for x in row), *first], dtype=torch.int64)
    table = table.pin_memory().to(device, non_blocking=True)
    numbers = array("f", scalars)
    with torch.cuda.device(device):
        kernel(
            address(table),
            address(table) + 8 * sum(map(len, rows)),
            len(rows),
            first[-1],
            numbers.buffer_info()[0],
            address(maps),
            DTYPES[grads[0].dtype],
            DTYPES[torch.float32 if copies[0] is None else copies[0].dtype],
            torch.cuda.current_stream().cuda_stream,
        )
