"""Gradients of keys and values, a program per tile of keys and key head. Equations: attention_backward.py.

Scores stand transposed, so that p and ds enter their products from registers.
"""

import triton
import triton.language as tl

from fastft_kernels.triton._attention_tiles import (
    INFINITY,
    bounds,
    keep,
    load,
    place,
    query_range,
    store,
    tanh,
    visible,
)


@triton.jit
def dkdv_tiles(
    dk0,
    dk1,
    dv0,
    dv1,
    k0,
    k1,
    v0,
    v1,
    q_ptr,
    q_stride,
    do_ptr,
    do_stride,
    lse2_ptr,
    delta_ptr,
    low,
    turn,
    shift,
    count,
    key,
    q_len,
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
    DK: tl.constexpr,
    DV: tl.constexpr,
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
    """Adds what a walk of queries of one head contributes; EDGE: some see not all keys, or are not there."""
    for i in range(0, count):
        start = low + i * BLOCK_M
        if EDGE:
            start += tl.where(i < turn, 0, shift)
        rows = start + tl.arange(0, BLOCK_M)
        q0 = load(q_ptr, start, q_stride, 0, q_len, BLOCK_M, 0, D0, D, EDGE)
        s = tl.dot(k0, tl.trans(q0), input_precision=PRECISION)
        if D1 > 0:
            q1 = load(q_ptr, start, q_stride, 0, q_len, BLOCK_M, D0, D1, D, EDGE)
            s = tl.dot(k1, tl.trans(q1), s, input_precision=PRECISION)
        if EDGE:
            lse2 = tl.load(lse2_ptr + rows, rows < q_len, other=INFINITY)
            delta = tl.load(delta_ptr + rows, rows < q_len, other=0.0)
        else:
            lse2 = tl.load(lse2_ptr + rows)
            delta = tl.load(delta_ptr + rows)
        if SOFTCAP:
            s = tanh(s * inner)
        p = tl.exp2(s * factor - lse2[None, :])
        if EDGE:
            cols = key + tl.arange(0, BLOCK_N)
            see = visible(rows[None, :], cols[:, None], offset, left, right, first, end, LEFT, RIGHT)
            p = tl.where(see, p, 0.0)
        do0 = load(do_ptr, start, do_stride, 0, q_len, BLOCK_M, 0, D0, D, EDGE)
        if D1 > 0:
            do1 = load(do_ptr, start, do_stride, 0, q_len, BLOCK_M, D0, D1, D, EDGE)
        if DROPOUT:
            kept_here = tl.trans(keep(seed, row + start, key, head, threshold, BLOCK_M, BLOCK_N))
        if DV:
            dropped = p
            if DROPOUT:
                dropped = tl.where(kept_here, p, 0.0)
            dropped = dropped.to(do0.dtype)
            dv0 = tl.dot(dropped, do0, dv0, input_precision=PRECISION)
            if D1 > 0:
                dv1 = tl.dot(dropped, do1, dv1, input_precision=PRECISION)
        if DK:
            dp = tl.dot(v0, tl.trans(do0), input_precision=PRECISION)
            if D1 > 0:
                dp = tl.dot(v1, tl.trans(do1), dp, input_precision=PRECISION)
            if DROPOUT:
                dp = tl.where(kept_here, dp * kept, 0.0)
            ds = p * (dp - delta[None, :])
            if SOFTCAP:
                ds = ds * (1 - s * s)
            ds = ds.to(q0.dtype)
            dk0 = tl.dot(ds, q0, dk0, input_precision=PRECISION)
            if D1 > 0:
                dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
    return dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=["tiles", "pairs", "section", "sequences", "q_len", "k_len", "left", "right", "seed"])
def dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse2_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
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
    dk_batch,
    dk_row,
    dk_head,
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
    DK: tl.constexpr,
    DV: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv, of one layout, of a tile of keys: both with DK and DV, else one.

    total: the rows of q in all, over which lse2 and delta are spread.
    """
    tile, pair = place(tl.program_id(0), tiles, pairs, section, False)
    batch, head, start, q_start, k_start, q_len, k_len, first, end = bounds(
        tile,
        pair,
        HEADS // GROUP,
        sequences,
        q_len,
        k_len,
        cu_seqlens_q_ptr,
        cu_seqlens_k_ptr,
        key_lengths_ptr,
        True,
        PACKED,
        PADDED,
        BLOCK_N,
    )
    if start >= k_len:
        return
    b, h = batch.to(tl.int64), head.to(tl.int64)
    q_start, k_start = tl.cast(q_start, tl.int64), tl.cast(k_start, tl.int64)
    q_ptr += b * q_batch + q_start * q_row
    k_ptr += b * k_batch + h * k_head + k_start * k_row
    v_ptr += b * v_batch + h * v_head + k_start * v_row
    do_ptr += b * do_batch + q_start * do_row
    dk_ptr += b * dk_batch + h * dk_head + k_start * dk_row
    dv_ptr += b * dk_batch + h * dk_head + k_start * dk_row
    offset = k_len - q_len
    full_low, full_count, low, before, jump, count = query_range(
        start, q_len, offset, left, right, first, end, LEFT, RIGHT, BLOCK_N, BLOCK_M
    )
    if SEED_THERE:
        seed = tl.load(seed_ptr)
    row = q_start.to(tl.int32)

    k0 = load(k_ptr, start, k_row, 0, k_len, BLOCK_N, 0, D0, D, True)
    v0 = load(v_ptr, start, v_row, 0, k_len, BLOCK_N, 0, D0, D, True)
    dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dv0 = tl.zeros([BLOCK_N, D0], tl.float32)
    k1, v1, dk1, dv1 = k0, v0, 0.0, 0.0
    if D1 > 0:
        k1 = load(k_ptr, start, k_row, 0, k_len, BLOCK_N, D0, D1, D, True)
        v1 = load(v_ptr, start, v_row, 0, k_len, BLOCK_N, D0, D1, D, True)
        dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
        dv1 = tl.zeros([BLOCK_N, D1], tl.float32)

    for member in range(GROUP):
        query_head = h * GROUP + member
        number = b * HEADS + query_head
        spread = number * total + q_start
        for part in tl.static_range(2):  # the full tiles, then those that a mask crosses
            if part == 0:
                lo, turn, shift, tiles_here = full_low, full_count, 0, full_count
            else:
                lo, turn, shift, tiles_here = low, before, jump, count
            dk0, dk1, dv0, dv1 = dkdv_tiles(
                dk0,
                dk1,
                dv0,
                dv1,
                k0,
                k1,
                v0,
                v1,
                q_ptr + query_head * q_head,
                q_row,
                do_ptr + query_head * do_head,
                do_row,
                lse2_ptr + spread,
                delta_ptr + spread,
                lo,
                turn,
                shift,
                tiles_here,
                start,
                q_len,
                offset,
                left,
                right,
                first,
                end,
                factor,
                inner,
                seed,
                row,
                number.to(tl.int32),
                threshold,
                kept,
                part == 1,
                DK,
                DV,
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

    keys = start + tl.arange(0, BLOCK_N)
    there = ((keys >= first) & (keys < end))[:, None]
    if DK:
        store(dk_ptr, start, dk_row, k_len, tl.where(there, dk0 * scale, 0.0), BLOCK_N, 0, D0, D)
        if D1 > 0:
            store(dk_ptr, start, dk_row, k_len, tl.where(there, dk1 * scale, 0.0), BLOCK_N, D0, D1, D)
    if DV:
        store(dv_ptr, start, dk_row, k_len, tl.where(there, dv0 * kept, 0.0), BLOCK_N, 0, D0, D)
        if D1 > 0:
            store(dv_ptr, start, dk_row, k_len, tl.where(there, dv1 * kept, 0.0), BLOCK_N, D0, D1, D)
