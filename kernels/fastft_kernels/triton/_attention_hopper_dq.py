"""Gradients of queries for Hopper: _attention_dq.py with bulk copies and one loop in which every tile is masked. No dropout."""

import triton
import triton.language as tl

from fastft_kernels.triton._attention_tiles import INFINITY, bounds, key_limits, place, store, tanh


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
    tl.static_assert(not DROPOUT)
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
    low, high, last = key_limits(rows, start, q_len, offset, left, right, first, end, LEFT, RIGHT, BLOCK_M)

    k0_tiles = tl.make_tensor_descriptor(k_ptr, [end, D], [k_row, 1], [BLOCK_N, D0])
    v0_tiles = tl.make_tensor_descriptor(v_ptr, [end, D], [v_row, 1], [BLOCK_N, D0])
    q0 = tl.make_tensor_descriptor(q_ptr, [q_len, D], [q_row, 1], [BLOCK_M, D0]).load([start, 0])
    do0 = tl.make_tensor_descriptor(do_ptr, [q_len, D], [do_row, 1], [BLOCK_M, D0]).load([start, 0])
    dq0 = tl.zeros([BLOCK_M, D0], tl.float32)
    if D1 > 0:
        k1_tiles = tl.make_tensor_descriptor(k_ptr, [end, D], [k_row, 1], [BLOCK_N, D1])
        v1_tiles = tl.make_tensor_descriptor(v_ptr, [end, D], [v_row, 1], [BLOCK_N, D1])
        q1 = tl.make_tensor_descriptor(q_ptr, [q_len, D], [q_row, 1], [BLOCK_M, D1]).load([start, D0])
        do1 = tl.make_tensor_descriptor(do_ptr, [q_len, D], [do_row, 1], [BLOCK_M, D1]).load([start, D0])
        dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
    lse2 = tl.load(lse2_ptr + spread + rows, rows < q_len, other=INFINITY)
    delta = tl.load(delta_ptr + spread + rows, rows < q_len, other=0.0)

    for key in range(low, high, BLOCK_N):
        k0 = k0_tiles.load([key, 0])
        v0 = v0_tiles.load([key, 0])
        s = tl.dot(q0, tl.trans(k0))
        dp = tl.dot(do0, tl.trans(v0))
        if D1 > 0:
            k1 = k1_tiles.load([key, D0])
            v1 = v1_tiles.load([key, D0])
            s = tl.dot(q1, tl.trans(k1), s)
            dp = tl.dot(do1, tl.trans(v1), dp)
        if SOFTCAP:
            s = tanh(s * inner)
        p = tl.exp2(s * factor - lse2[:, None])
        cols = key + tl.arange(0, BLOCK_N)
        see = cols[None, :] <= last[:, None]
        if LEFT:
            see = see & (cols[None, :] >= (rows + (offset - left))[:, None])
        p = tl.where(see, p, 0.0)
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds = ds * (1 - s * s)
        ds = ds.to(k0.dtype)
        dq0 = tl.dot(ds, k0, dq0)
        if D1 > 0:
            dq1 = tl.dot(ds, k1, dq1)

    store(dq_ptr, start, dq_row, q_len, dq0 * scale, BLOCK_M, 0, D0, D)
    if D1 > 0:
        store(dq_ptr, start, dq_row, q_len, dq1 * scale, BLOCK_M, D0, D1, D)
