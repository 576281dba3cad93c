"""Gradients of queries, a program per tile of queries and head. Equations: attention_backward.py."""

import triton
import triton.language as tl

from fastft_kernels.triton._attention_tiles import (
    INFINITY,
    bounds,
    keep,
    key_range,
    load,
    place,
    store,
    tanh,
    visible,
)


@triton.jit
def dq_tiles(
    dq0,
    dq1,
    q0,
    q1,
    do0,
    do1,
    lse2,
    delta,
    k_ptr,
    k_stride,
    v_ptr,
    v_stride,
    low,
    turn,
    shift,
    count,
    rows,
    offset,
    left,
    right,
    first,
    end,
    factor,
    inner,
    seed,
    row,
    head,
    threshold,
    kept,
    EDGE: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds what a walk of keys contributes; EDGE: some of them are not seen by all queries."""
    for i in range(0, count):
        start = low + i * BLOCK_N
        if EDGE:
            start += tl.where(i < turn, 0, shift)
        k0 = load(k_ptr, start, k_stride, first, end, BLOCK_N, 0, D0, D, EDGE)
        v0 = load(v_ptr, start, v_stride, first, end, BLOCK_N, 0, D0, D, EDGE)
        s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        dp = tl.dot(do0, tl.trans(v0), input_precision=PRECISION)
        if D1 > 0:
            k1 = load(k_ptr, start, k_stride, first, end, BLOCK_N, D0, D1, D, EDGE)
            v1 = load(v_ptr, start, v_stride, first, end, BLOCK_N, D0, D1, D, EDGE)
            s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
            dp = tl.dot(do1, tl.trans(v1), dp, input_precision=PRECISION)
        if SOFTCAP:
            s = tanh(s * inner)
        p = tl.exp2(s * factor - lse2[:, None])
        if EDGE:
            cols = start + tl.arange(0, BLOCK_N)
            see = visible(rows[:, None], cols[None, :], offset, left, right, first, end, LEFT, RIGHT)
            p = tl.where(see, p, 0.0)
        if DROPOUT:
            dp = tl.where(keep(seed, row, start, head, threshold, BLOCK_M, BLOCK_N), dp * kept, 0.0)
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds = ds * (1 - s * s)
        ds = ds.to(k0.dtype)
        dq0 = tl.dot(ds, k0, dq0, input_precision=PRECISION)
        if D1 > 0:
            dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
    return dq0, dq1


@triton.jit(do_not_specialize=["tiles", "pairs", "section", "sequences", "q_len", "k_len", "left", "right", "seed"])
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse2_ptr,
    delta_ptr,
    dq_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    key_lengths_ptr,
    seed_ptr,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    do_batch,
    do_row,
    do_head,
    dq_batch,
    dq_row,
    dq_head,
    total,
    scale,
    tiles,
    pairs,
    section,
    sequences,
    q_len,
    k_len,
    left,
    right,
    factor,
    inner,
    seed,
    threshold,
    kept,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    SEED_THERE: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile, pair = place(tl.program_id(0), tiles, pairs, section, RIGHT)
    batch, head, start, q_start, k_start, q_len, k_len, first, end = bounds(
        tile,
        pair,
        HEADS,
        sequences,
        q_len,
        k_len,
        cu_seqlens_q_ptr,
        cu_seqlens_k_ptr,
        key_lengths_ptr,
        False,
        PACKED,
        PADDED,
        BLOCK_M,
    )
    if start >= q_len:
        return
    b, h = batch.to(tl.int64), head.to(tl.int64)
    q_start, k_start = tl.cast(q_start, tl.int64), tl.cast(k_start, tl.int64)
    q_ptr += b * q_batch + h * q_head + q_start * q_row
    k_ptr += b * k_batch + h // GROUP * k_head + k_start * k_row
    v_ptr += b * v_batch + h // GROUP * v_head + k_start * v_row
    do_ptr += b * do_batch + h * do_head + q_start * do_row
    dq_ptr += b * dq_batch + h * dq_head + q_start * dq_row
    spread = pair.to(tl.int64) * total + q_start
    offset = k_len - q_len
    rows = start + tl.arange(0, BLOCK_M)
    full_low, full_count, low, before, jump, count = key_range(
        start, q_len, offset, left, right, first, end, LEFT, RIGHT, BLOCK_M, BLOCK_N
    )
    if SEED_THERE:
        seed = tl.load(seed_ptr)
    row = q_start.to(tl.int32) + start

    q0 = load(q_ptr, start, q_row, 0, q_len, BLOCK_M, 0, D0, D, True)
    do0 = load(do_ptr, start, do_row, 0, q_len, BLOCK_M, 0, D0, D, True)
    lse2 = tl.load(lse2_ptr + spread + rows, rows < q_len, other=INFINITY)
    delta = tl.load(delta_ptr + spread + rows, rows < q_len, other=0.0)
    dq0 = tl.zeros([BLOCK_M, D0], tl.float32)
    q1, do1, dq1 = q0, do0, delta
    if D1 > 0:
        q1 = load(q_ptr, start, q_row, 0, q_len, BLOCK_M, D0, D1, D, True)
        do1 = load(do_ptr, start, do_row, 0, q_len, BLOCK_M, D0, D1, D, True)
        dq1 = tl.zeros([BLOCK_M, D1], tl.float32)

    for part in tl.static_range(2):  # the full tiles, then those that a mask crosses
        if part == 0:
            lo, turn, shift, tiles_here = full_low, full_count, 0, full_count
        else:
            lo, turn, shift, tiles_here = low, before, jump, count
        dq0, dq1 = dq_tiles(
            dq0,
            dq1,
            q0,
            q1,
            do0,
            do1,
            lse2,
            delta,
            k_ptr,
            k_row,
            v_ptr,
            v_row,
            lo,
            turn,
            shift,
            tiles_here,
            rows,
            offset,
            left,
            right,
            first,
            end,
            factor,
            inner,
            seed,
            row,
            pair,
            threshold,
            kept,
            part == 1,
            LEFT,
            RIGHT,
            SOFTCAP,
            DROPOUT,
            PRECISION,
            D,
            D0,
            D1,
            BLOCK_M,
            BLOCK_N,
        )

    store(dq_ptr, start, dq_row, q_len, dq0 * scale, BLOCK_M, 0, D0, D)
    if D1 > 0:
        store(dq_ptr, start, dq_row, q_len, dq1 * scale, BLOCK_M, D0, D1, D)
