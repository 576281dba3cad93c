"""8-bit AdamW and Lion on the GPU, in Triton: for GPUs where no nvcc was at build time. Equations: reference/adamw8bit.py.

One launch for all tensors of a call: a table of addresses, and the number of blocks before each tensor, lie on the GPU. A
program updates one block of 256. Square roots and divisions are rounded correctly and nothing is contracted, so the codes
are those of the other rooms.
"""

import torch
import triton
import triton.language as tl

from fastft_kernels.reference import adamw8bit as reference

BLOCK = 256
WARPS = 1  # eight elements a lane
quantize, dequantize = reference.quantize, reference.dequantize  # once for each checkpoint, not in a step


@triton.jit
def read_signed(codes, absmax, maps_ptr, DYNAMIC: tl.constexpr):
    if DYNAMIC:
        return tl.load(maps_ptr + codes) * absmax
    f = ((codes ^ 128) - 128).to(tl.float32) * (1.0 / 127.0)
    return f * tl.abs(f) * absmax


@triton.jit
def read_unsigned(codes, absmax, maps_ptr, DYNAMIC: tl.constexpr):
    if DYNAMIC:
        return tl.load(maps_ptr + 256 + codes) * absmax
    f = codes.to(tl.float32) * (1.0 / 255.0)
    return f * f * (f * f) * absmax


@triton.jit
def nearest(map_ptr, x):
    low = tl.zeros_like(x).to(tl.int32)
    for i in tl.static_range(8):
        low += tl.where(tl.load(map_ptr + low + (128 >> i)) <= x, 128 >> i, 0)
    high = tl.minimum(low + 1, 255)
    return tl.where(x - tl.load(map_ptr + low) <= tl.load(map_ptr + high) - x, low, high)


@triton.jit
def write_signed(x, scale, maps_ptr, DYNAMIC: tl.constexpr):
    if DYNAMIC:
        return nearest(maps_ptr, x * scale)
    size = (tl.sqrt_rn(tl.abs(x) * scale) * 127.0 + 0.5).to(tl.int32)
    return tl.where(x < 0, -size, size) & 255


@triton.jit
def write_root(root, scale, maps_ptr, DYNAMIC: tl.constexpr):
    ratio = root * scale
    if DYNAMIC:
        code = nearest(maps_ptr + 256, ratio * ratio)
    else:
        code = (tl.sqrt_rn(ratio) * 255.0 + 0.5).to(tl.int32)
    return tl.where((code == 0) & (ratio > 0), 1, code)


@triton.jit
def stored_absmax(x):
    top = tl.max(x, axis=0)
    return tl.where(top < 8.077935669463161e-28, 0.0, top)


@triton.jit
def reciprocal_or_zero(x):
    return tl.where(x > 0, tl.div_rn(x * 0.0 + 1.0, tl.where(x > 0, x, 1.0)), 0.0)


@triton.jit(do_not_specialize=["count"])
def step_kernel(
    rows_ptr,
    first_ptr,
    maps_ptr,
    scalars_ptr,
    grad_like_ptr,
    copy_like_ptr,
    count,
    HAS_COPY: tl.constexpr,
    LION: tl.constexpr,
    DYNAMIC: tl.constexpr,
    FIELDS: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    low = number * 0
    high = low + count
    while high - low > 1:  # the last tensor whose first block is not after this one
        middle = (low + high) // 2
        before = tl.load(first_ptr + middle) <= number
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    row = rows_ptr + low * FIELDS
    block = number - tl.load(first_ptr + low)
    lanes = tl.arange(0, 256)
    j = block * 256 + lanes
    mask = j < tl.load(row)
    w_ptr = tl.load(row + 1).to(tl.pointer_type(tl.float32)) + j
    g_ptr = tl.load(row + 2).to(grad_like_ptr.dtype) + j
    m_ptr = tl.load(row + 4).to(tl.pointer_type(tl.uint8)) + j
    m_absmax_ptr = tl.load(row + 5).to(tl.pointer_type(tl.float32)) + block
    grad_scale = tl.load(scalars_ptr)
    decay = tl.load(scalars_ptr + 1)
    beta1 = tl.load(scalars_ptr + 2)
    rest1 = tl.load(scalars_ptr + 3)
    beta2 = tl.load(scalars_ptr + 4)
    rest2 = tl.load(scalars_ptr + 5)
    rate = tl.load(scalars_ptr + 6)
    root_scale = tl.load(scalars_ptr + 7)
    eps = tl.load(scalars_ptr + 8)

    w = tl.load(w_ptr, mask, other=0.0)
    g = tl.load(g_ptr, mask, other=0.0).to(tl.float32) * grad_scale
    m = read_signed(tl.load(m_ptr, mask, other=0).to(tl.int32), tl.load(m_absmax_ptr), maps_ptr, DYNAMIC)
    m = tl.where(mask, m, 0.0)  # the code 0 of a dynamic map is not zero
    if LION:
        direction = beta1 * m + rest1 * g
        next_m = beta2 * m + rest2 * g
        good = tl.abs(next_m) < 8.507059173023462e37
        change = tl.where(direction > 0, 1.0, 0.0) - tl.where(direction < 0, 1.0, 0.0)
    else:
        v_ptr = tl.load(row + 6).to(tl.pointer_type(tl.uint8)) + j
        v_absmax_ptr = tl.load(row + 7).to(tl.pointer_type(tl.float32)) + block
        v = read_unsigned(tl.load(v_ptr, mask, other=0).to(tl.int32), tl.load(v_absmax_ptr), maps_ptr, DYNAMIC)
        v = tl.where(mask, v, 0.0)
        next_v = beta2 * v + rest2 * (g * g)
        next_m = beta1 * m + rest1 * g
        good = next_v < 8.507059173023462e37
        v = tl.where(good, next_v, v)
        root = tl.sqrt_rn(v)
        denominator = root * root_scale + eps
        kept = tl.where(good, next_m, m)
        change = tl.where(denominator > 0, tl.div_rn(kept, tl.where(denominator > 0, denominator, 1.0)), 0.0)
        v_absmax = stored_absmax(v)
        v_codes = write_root(root, reciprocal_or_zero(tl.sqrt_rn(v_absmax)), maps_ptr, DYNAMIC)
        tl.store(v_ptr, v_codes.to(tl.uint8), mask)
        tl.store(v_absmax_ptr, v_absmax)
    m = tl.where(good, next_m, m)
    w = tl.where(good, decay * w - rate * change, w)
    tl.store(w_ptr, w, mask)
    if HAS_COPY:
        tl.store(tl.load(row + 3).to(copy_like_ptr.dtype) + j, w.to(copy_like_ptr.dtype.element_ty), mask)
    m_absmax = stored_absmax(tl.abs(m))
    tl.store(m_ptr, write_signed(m, reciprocal_or_zero(m_absmax), maps_ptr, DYNAMIC).to(tl.uint8), mask)
    tl.store(m_absmax_ptr, m_absmax)


def adamw8bit(weights, grads, copies, m_codes, m_absmax, v_codes, v_absmax, scalars, maps=None):
    _launch(weights, grads, copies, (m_codes, m_absmax, v_codes, v_absmax), scalars, maps, False)


def lion8bit(weights, grads, copies, m_codes, m_absmax, scalars, maps=None):
    _launch(weights, grads, copies, (m_codes, m_absmax), scalars, maps, True)


def _launch(weights, grads, copies, states, scalars, maps, lion):
    if not weights:
        return
    rows, first = [], [0]
    for w, *others in zip(weights, grads, copies, *states, strict=True):
        rows.append([w.numel(), w.data_ptr(), *(0 if t is None else t.data_ptr() for t in others)])
        first.append(first[-1] + -(-w.numel() // BLOCK))
    if first[-1] == 0:
        return
    device = weights[0].device
    upload = lambda x: x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
    numbers = upload(torch.tensor(scalars, dtype=torch.float32))
    with torch.cuda.device_of(weights[0]):
        step_kernel[(first[-1],)](
            upload(torch.tensor(rows, dtype=torch.int64)),
            upload(torch.tensor(first, dtype=torch.int64)),
            numbers if maps is None else maps,
            numbers,
            grads[0],  # for their dtypes
            weights[0] if copies[0] is None else copies[0],
            len(rows),
            HAS_COPY=copies[0] is not None,
            LION=lion,
            DYNAMIC=maps is not None,
            FIELDS=len(rows[0]),
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
