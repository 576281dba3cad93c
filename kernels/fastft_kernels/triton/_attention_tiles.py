"""What the attention kernels share: which tile a program computes, loads, masks, dropout.

A head of D elements is held as one part of D0 columns, or as two of D0 and D1, powers of two: 96 = 64 + 32 costs no more
arithmetic than 96. Columns past D are zeros.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def place(pid, tiles, pairs, section, REVERSED: tl.constexpr):
    """(tile, pair) of a program, a pair being one head of one example.

    Pairs go by sections whose keys and values fit the L2 cache together; within a section all pairs take the same tile
    before the next, from the last to the first where REVERSED: with a causal mask the longest come first.
    """
    number = pid // (section * tiles)
    inside = pid - number * section * tiles
    width = tl.minimum(section, pairs - number * section)
    tile = inside // width
    if REVERSED:
        tile = tiles - 1 - tile
    return tile, number * section + inside % width


@triton.jit
def find_sequence(tile, sequences, cu_seqlens_ptr, BLOCK: tl.constexpr):
    """(sequence, tile within it) of a tile of a packed batch.

    The tiles of sequence b start at number cu_seqlens[b] // BLOCK + b: no prefix sum is needed, at most one tile per
    sequence is empty, and total // BLOCK + sequences tiles are enough.
    """
    before = 0
    for start in range(0, sequences, 256):
        b = start + tl.arange(0, 256)
        first_tile = tl.load(cu_seqlens_ptr + b, b < sequences, other=0) // BLOCK + b
        before += tl.sum(((b < sequences) & (first_tile <= tile)).to(tl.int32))
    sequence = before - 1
    return sequence, tile - (tl.load(cu_seqlens_ptr + sequence) // BLOCK + sequence)


@triton.jit
def bounds(
    tile,
    pair,
    heads,
    sequences,
    q_len,
    k_len,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    key_lengths_ptr,
    OVER_KEYS: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(batch, head, start, q_start, k_start, q_len, k_len, first, end) of a tile of BLOCK queries, or of keys.

    `start` is the tile's first row within its sequence; first ... end - 1 are the keys that are there.
    """
    q_start = 0
    k_start = 0
    batch = pair // heads
    if PACKED:
        if OVER_KEYS:
            sequence, tile = find_sequence(tile, sequences, cu_seqlens_k_ptr, BLOCK)
        else:
            sequence, tile = find_sequence(tile, sequences, cu_seqlens_q_ptr, BLOCK)
        q_start = tl.load(cu_seqlens_q_ptr + sequence)
        k_start = tl.load(cu_seqlens_k_ptr + sequence)
        q_len = tl.load(cu_seqlens_q_ptr + sequence + 1) - q_start
        k_len = tl.load(cu_seqlens_k_ptr + sequence + 1) - k_start
    first = 0
    end = k_len
    if PADDED:
        first = tl.load(key_lengths_ptr + 2 * batch)
        end = tl.load(key_lengths_ptr + 2 * batch + 1)
    return batch, pair % heads, tile * BLOCK, q_start, k_start, q_len, k_len, first, end


@triton.jit
def load(
    base,
    start,
    stride,
    low,
    high,
    ROWS: tl.constexpr,
    COL: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    EDGE: tl.constexpr,
):
    """[ROWS, WIDTH] from row `start`, column COL; zeros past column D and, with EDGE, for rows outside low ... high - 1."""
    rows = tl.arange(0, ROWS)
    cols = COL + tl.arange(0, WIDTH)
    pointers = base + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + cols[None, :])
    if EDGE:
        there = ((start + rows >= low) & (start + rows < high))[:, None]
        if COL + WIDTH > D:
            there = there & (cols < D)[None, :]
        x = tl.load(pointers, there, other=0.0)
    elif COL + WIDTH > D:
        x = tl.load(pointers, (cols < D)[None, :], other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def store(base, start, stride, high, x, ROWS: tl.constexpr, COL: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Writes what `load` reads, rows before `high`, in the dtype of the memory."""
    rows = tl.arange(0, ROWS)
    cols = COL + tl.arange(0, WIDTH)
    pointers = base + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + cols[None, :])
    tl.store(pointers, x.to(base.dtype.element_ty), (start + rows < high)[:, None] & (cols < D)[None, :])


@triton.jit
def visible(rows, cols, offset, left, right, first, end, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Whether queries `rows` may see keys `cols`, two tensors of one broadcast shape."""
    see = (cols >= first) & (cols < end)
    if LEFT:
        see = see & (cols >= rows + (offset - left))
    if RIGHT:
        see = see & (cols <= rows + (offset + right))
    return see


@triton.jit
def key_range(
    start,
    q_len,
    offset,
    left,
    right,
    first,
    end,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """The walk (`cut`) over the keys that ROWS queries from `start` may see; the full tiles are seen by all."""
    last = tl.minimum(start + ROWS, q_len) - 1
    low, high, full_low, full_high = first, end, first, end
    if LEFT:
        low = tl.maximum(low, start + offset - left)
        full_low = tl.maximum(full_low, last + offset - left)
    if RIGHT:
        high = tl.minimum(high, last + offset + right + 1)
        full_high = tl.minimum(full_high, start + offset + right + 1)
    return cut(low, full_low, full_high, high, STEP)


@triton.jit
def query_range(
    start,
    q_len,
    offset,
    left,
    right,
    first,
    end,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """The walk (`cut`) over the queries that may see some of ROWS keys from `start`; those in full tiles see all."""
    last = tl.minimum(start + ROWS, end) - 1
    low, high, full_low, full_high = 0, q_len, 0, q_len
    if RIGHT:
        low = tl.maximum(low, start - offset - right)
        full_low = tl.maximum(full_low, last - offset - right)
    if LEFT:
        high = tl.minimum(high, last - offset + left + 1)
        full_high = tl.minimum(full_high, start - offset + left + 1)
    high = tl.where((start < end) & (start + ROWS > first), high, low)
    return cut(low, full_low, full_high, high, STEP)


@triton.jit
def cut(low, full_low, full_high, high, STEP: tl.constexpr):
    """(full_low, full_count, low, left, jump, count): how to walk low ... high - 1 in tiles of STEP.

    full_count tiles from full_low lie in full_low ... full_high - 1 and need no mask; of the other `count` the first
    `left` start at `low`, and those after them `jump` further on: one loop serves the tiles on both sides of the full.
    """
    low = low // STEP * STEP
    full_low = tl.maximum(tl.cdiv(full_low, STEP) * STEP, low)
    full_count = tl.maximum(tl.minimum(full_high, high) - full_low, 0) // STEP
    rest = full_low + full_count * STEP
    left = tl.cdiv(tl.maximum(tl.minimum(full_low, high) - low, 0), STEP)
    return full_low, full_count, low, left, rest - low - left * STEP, left + tl.cdiv(tl.maximum(high - rest, 0), STEP)


@triton.jit
def keep(seed, row, key, head, threshold, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """bool [ROWS, KEYS] of the scores that dropout keeps: reference/_philox.py. `key` is a multiple of 8."""
    block = key // 8 + tl.arange(0, KEYS // 8)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    rows = row + tl.arange(0, ROWS)[:, None] + tl.zeros_like(block)
    w0, w1, w2, w3 = tl.philox(seed, block, rows, tl.zeros_like(block) + head, tl.zeros_like(block) + 1)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return tl.interleave(words & 0xFFFF, words >> 16) >= threshold


@triton.jit
def tanh(x):
    """To the last bits also near 0, where 1 - 2 / (exp(2x) + 1) would cancel."""
    y = x * x
    small = x + x * y * (
        -3.33332819422e-1
        + y * (1.33314422036e-1 + y * (-5.37397155531e-2 + y * (2.06390887954e-2 - y * 5.70498872745e-3)))
    )
    e = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    large = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def key_limits(
    rows,
    start,
    q_len,
    offset,
    left,
    right,
    first,
    end,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """(low, high, last): queries `rows`, ROWS from `start`, may see none but the keys low ... high - 1; each none after `last`.

    A walk from `low` in tiles of any size that masks by `last` (and LEFT) needs no other bound.
    """
    low, high = first, end
    last = tl.zeros_like(rows) + (end - 1)
    if LEFT:
        low = tl.maximum(low, start + offset - left)
    if RIGHT:
        high = tl.minimum(high, tl.minimum(start + ROWS, q_len) + offset + right)
        last = tl.minimum(rows + (offset + right), last)
    return low, tl.where(start < q_len, high, low), last
