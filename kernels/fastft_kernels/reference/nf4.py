"""Weights in 4 bits, NF4 (Dettmers et al., 2023, arXiv:2305.14314), in bitsandbytes' format and with its numbers.

    y[i] = VALUES[code[i]] * absmax[i // block]                                   in float32, rounded once to y's dtype
    absmax[b] = map[codes8[b]] * nested[b // 256] + offset                        with double quantisation

A tensor is read in row-major order. codes: uint8 [(numel + 1) // 2], element 2 j in the high four bits of byte j and
2 j + 1 in the low ones; an odd tensor's last four bits hold the code of 0. absmax, the largest magnitude of each block:
float32 [blocks], or, with double quantisation, uint8 [blocks] with map [256] and nested [blocks / 256], both float32, and
offset, a float. block: even, 64 by default. Quantising takes the nearest value, of two as near the smaller.

Bytes moved, for n elements of s bytes: n s and n / 2, and the absmax of each block.
"""

import torch

from fastft_kernels.reference import adamw8bit

BLOCK, NESTED_BLOCK = 64, adamw8bit.BLOCK
VALUES = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip
SMALLEST_DIVISOR = 1e-38


def quantize(x, block=BLOCK):
    """(codes, absmax float32) of a finite tensor of any shape and floating dtype."""
    flat = x.reshape(-1).float()
    rows = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    absmax = rows.abs().amax(1)
    scaled = (rows * (1.0 / absmax.clamp(min=SMALLEST_DIVISOR))[:, None]).flatten()[: flat.numel() + flat.numel() % 2]
    values = VALUES.to(x.device)
    codes = torch.bucketize(scaled, (values[:-1] + values[1:]) / 2, out_int32=True).to(torch.uint8)
    return codes[::2] << 4 | codes[1::2], absmax


def dequantize(codes, absmax, double, y, block=BLOCK):
    """Fills y, contiguous. double: None, or (map, nested, offset) where absmax is in 8 bits."""
    pairs = torch.stack([codes >> 4, codes & 15], 1).flatten()[: y.numel()]
    values = VALUES.to(y.device)[pairs.int()]
    blocks = torch.arange(y.numel(), device=y.device) // block
    y.view(-1).copy_(values * read_absmax(absmax, double)[blocks])


def read_absmax(absmax, double):
    """The float32 absmax of each block."""
    if double is None:
        return absmax
    values, nested, offset = double
    return values[absmax.int()] * nested.repeat_interleave(NESTED_BLOCK)[: absmax.numel()] + offset


def quantize_absmax(absmax):
    """(codes8, (map, nested, offset)) of float32 absmax: double quantisation."""
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    maps = adamw8bit.dynamic_maps().to(absmax.device)
    codes, nested = adamw8bit.quantize(absmax - offset, True, maps)
    return codes.flatten()[: absmax.numel()].clone(), (maps[0].clone(), nested, offset.item())
