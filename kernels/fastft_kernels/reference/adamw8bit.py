"""AdamW and Lion with moments in 8 bits, in plain PyTorch: what the kernels must compute, bit for bit.

A block of 256 elements shares its largest magnitude, `absmax`, in float32; codes are [blocks, 256] uint8, absmax [blocks].

    companded (maps None)   signed: sign(c) (c / 127)^2 absmax      unsigned: (c / 255)^4 absmax
    dynamic                 maps [2, 256]: the values of bitsandbytes' codes, signed and unsigned; the nearest is taken

Zero is stored as exactly 0, and only zero as an unsigned 0; the largest magnitude comes back exactly. Blocks below 2^-90
are stored as zeros. An element whose next moment would be NaN, infinite or beyond 2^126 stays as it is.
"""

import torch

BLOCK = 256
SMALLEST_ABSMAX, LARGEST_MOMENT = 2.0**-90, 2.0**126


def quantize(x, signed, maps=None):
    """(codes, absmax) of a float32 tensor of any shape; not negative unless `signed`."""
    blocks = _blocks(x)
    absmax = _stored(blocks.abs().amax(1))
    return _codes(blocks if signed else _sqrt(blocks), absmax, signed, maps), absmax


def dequantize(codes, absmax, numel, signed, maps=None):
    """The first `numel` values, float32, of codes and absmax."""
    if maps is not None:
        values = maps[0 if signed else 1].to(codes.device)[codes.int()]
    elif signed:
        values = codes.view(torch.int8).float() * (1 / 127)
        values = values * values.abs()
    else:
        values = codes.float() * (1 / 255)
        values = (values * values) * (values * values)
    return (values * absmax[:, None]).flatten()[:numel]


def adamw8bit(weights, grads, copies, m_codes, m_absmax, v_codes, v_absmax, scalars, maps=None):
    """One step of AdamW for lists of tensors, in place; see reference/adamw.py for `copies` and `scalars`."""
    scale, decay, beta1, rest1, beta2, rest2, rate, root_scale, eps = (_rounded(s) for s in scalars)
    for i, w in enumerate(weights):
        g = grads[i].float() * scale
        m, v = (
            dequantize(codes[i], absmax[i], w.numel(), signed, maps).view(w.shape)
            for codes, absmax, signed in ((m_codes, m_absmax, True), (v_codes, v_absmax, False))
        )
        next_v = v * beta2 + g * g * rest2
        good = next_v < LARGEST_MOMENT
        m = torch.where(good, m * beta1 + g * rest1, m)
        v = torch.where(good, next_v, v)
        denominator = _sqrt(v) * root_scale + eps
        step = torch.where(denominator > 0, m / denominator, 0.0)
        w.copy_(torch.where(good, w * decay - step * rate, w))
        _write(m, m_codes[i], m_absmax[i], True, maps)
        _write(v, v_codes[i], v_absmax[i], False, maps)
        if copies[i] is not None:
            copies[i].copy_(w)


def lion8bit(weights, grads, copies, m_codes, m_absmax, scalars, maps=None):
    """One step of Lion (Chen et al., 2023): w moves by lr along the sign of beta1 m + (1 - beta1) g; m decays by beta2."""
    scale, decay, beta1, rest1, beta2, rest2, rate, *_ = (_rounded(s) for s in scalars)
    for i, w in enumerate(weights):
        g = grads[i].float() * scale
        m = dequantize(m_codes[i], m_absmax[i], w.numel(), True, maps).view(w.shape)
        next_m = m * beta2 + g * rest2
        good = next_m.abs() < LARGEST_MOMENT
        w.copy_(torch.where(good, w * decay - (m * beta1 + g * rest1).sign() * rate, w))
        _write(torch.where(good, next_m, m), m_codes[i], m_absmax[i], True, maps)
        if copies[i] is not None:
            copies[i].copy_(w)


def dynamic_maps():
    """[2, 256]: the values, ascending, of bitsandbytes' signed and unsigned dynamic codes (create_dynamic_map)."""
    maps = []
    for signed in (True, False):
        values = [0.0, 1.0]
        for i in range(7):
            edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float32)
            part = (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
            values += part + ([-x for x in part] if signed else [])
        maps.append(sorted(values))
    return torch.tensor(maps, dtype=torch.float32)


def _write(x, codes, absmax, signed, maps):
    new_codes, new_absmax = quantize(x, signed, maps)
    rest = x.numel() % BLOCK
    if rest:  # what lies beyond the last element is left as it was
        new_codes[-1, rest:] = codes[-1, rest:]
    codes.copy_(new_codes)
    absmax.copy_(new_absmax)


def _codes(blocks, absmax, signed, maps):
    """Codes of blocks; unsigned values come as their square roots."""
    scale = absmax if signed else _sqrt(absmax)
    scale = torch.where(scale > 0, 1 / scale, 0.0)[:, None]
    ratio = blocks * scale
    if maps is not None:
        nearest = _nearest(maps[0 if signed else 1].to(blocks.device), ratio if signed else ratio * ratio)
        return (nearest if signed else nearest.clamp_(min=0) + ((nearest == 0) & (ratio > 0))).to(torch.uint8)
    if signed:
        codes = (_sqrt(ratio.abs()) * 127 + 0.5).int()
        return torch.where(blocks < 0, -codes, codes).to(torch.int8).view(torch.uint8)
    codes = (_sqrt(ratio) * 255 + 0.5).int()
    return (codes + ((codes == 0) & (ratio > 0))).to(torch.uint8)


def _nearest(values, x):
    low = (torch.searchsorted(values, x.contiguous(), right=True) - 1).clamp_(0, 255)
    high = (low + 1).clamp_(max=255)
    return torch.where(x - values[low] <= values[high] - x, low, high)


def _blocks(x):
    """x in rows of 256, the last filled up with zeros."""
    flat = x.reshape(-1).float()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def _sqrt(x):
    """The square root correctly rounded, as every kernel computes it; torch's own, MKL's, may be off by a unit."""
    return x.double().sqrt().float()


def _stored(absmax):
    return torch.where(absmax < SMALLEST_ABSMAX, 0.0, absmax)


def _rounded(scalar):
    """The float32 number that the kernels compute with."""
    return torch.tensor(scalar, dtype=torch.float32).item()
