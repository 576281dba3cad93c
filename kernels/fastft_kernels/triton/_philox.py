"""The mask of reference/_philox.py, drawn within a kernel."""

import triton
import triton.language as tl


@triton.jit
def aligned_draws(seed, counter):
    """The draws of int64 counters [..., n] as [..., 8 n]: eight neighbours in one thread, as a load of 16 bytes has them."""
    zero = tl.zeros_like(counter).to(tl.uint32)
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
    even = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    odd = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    return tl.join(even, odd)


@triton.jit
def element_draws(seed, element):
    """The draws of int64 elements, wherever they lie: each draws all eight of its counter and keeps its own."""
    counter, place = element >> 3, element & 7
    zero = tl.zeros_like(counter).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, counter.to(tl.uint32), (counter >> 32).to(tl.uint32), zero, zero)
    word = tl.where(place < 4, tl.where(place < 2, w0, w1), tl.where(place < 6, w2, w3))
    return tl.where((place & 1) == 0, word & 0xFFFF, word >> 16)


@triton.jit
def keep_mask(
    seed, rows, start, n_cols, threshold, ALIGNED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    """Which elements of int64 `rows` of n_cols are kept, BLOCK_COLS of each from column `start`, a multiple of 8.

    ALIGNED: rows are whole counters, so that one draw serves eight elements.
    """
    if ALIGNED:
        counter = rows[:, None] * (n_cols // 8) + start // 8 + tl.arange(0, BLOCK_COLS // 8)[None, :]
        draws = aligned_draws(seed, counter).reshape([BLOCK_ROWS, BLOCK_COLS])
    else:
        draws = element_draws(seed, rows[:, None] * n_cols + start + tl.arange(0, BLOCK_COLS)[None, :])
    return draws.to(tl.int32) >= threshold
