"""Gradients of keys and values for Hopper: _attention_dkdv.py with bulk copies, and one loop over all. No dropout.

The heads that share a key head and the tiles of their queries are one loop, which pipelines across heads; every tile is
masked. Nothing in it needs pointers, so that registers hold both accumulators beside the scores of 64 queries.
"""

import triton
import triton.language as tl

from fastft_kernels.triton._attention_tiles import bounds, place, store, tanh

NEVER = tl.constexpr(2**30)
"""the first query that sees a key which is not there"""


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

    total: the rows of lse2 and delta per head, a multiple of 4, since a bulk copy's stride and start are of 16 bytes.
    """
    tl.static_assert(not DROPOUT)
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
    q_ptr += b * q_batch + h * GROUP * q_head + q_start * q_row
    k_ptr += b * k_batch + h * k_head + k_start * k_row
    v_ptr += b * v_batch + h * v_head + k_start * v_row
    do_ptr += b * do_batch + h * GROUP * do_head + q_start * do_row
    lse2_ptr += (b * HEADS + h * GROUP) * total
    delta_ptr += (b * HEADS + h * GROUP) * total
    before = q_start.to(tl.int32)
    offset = k_len - q_len
    keys = start + tl.arange(0, BLOCK_N)
    low, high = 0, q_len
    since = tl.zeros_like(keys)
    if RIGHT:
        low = tl.maximum(low, start - offset - right)
        since = tl.maximum(since, keys - (offset + right))
    if LEFT:
        high = tl.minimum(high, tl.minimum(start + BLOCK_N, end) - offset + left)
    some = (start < end) & (start + BLOCK_N > first) & (low < high)
    low -= (before + low) % 4  # back into the sequence before, of which no row is seen
    high = tl.where(some, high, low)
    since = tl.where((keys >= first) & (keys < end), since, NEVER)
    steps = GROUP * tl.maximum(tl.cdiv(high - low, BLOCK_M), 0)

    q0_tiles = tl.make_tensor_descriptor(q_ptr, [GROUP, q_len, D], [q_head, q_row, 1], [1, BLOCK_M, D0])
    do0_tiles = tl.make_tensor_descriptor(do_ptr, [GROUP, q_len, D], [do_head, do_row, 1], [1, BLOCK_M, D0])
    lse2_tiles = tl.make_tensor_descriptor(lse2_ptr, [GROUP, before + q_len], [total, 1], [1, BLOCK_M])
    delta_tiles = tl.make_tensor_descriptor(delta_ptr, [GROUP, before + q_len], [total, 1], [1, BLOCK_M])
    k0 = tl.make_tensor_descriptor(k_ptr, [k_len, D], [k_row, 1], [BLOCK_N, D0]).load([start, 0])
    v0 = tl.make_tensor_descriptor(v_ptr, [k_len, D], [v_row, 1], [BLOCK_N, D0]).load([start, 0])
    dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dv0 = tl.zeros([BLOCK_N, D0], tl.float32)
    if D1 > 0:
        q1_tiles = tl.make_tensor_descriptor(q_ptr, [GROUP, q_len, D], [q_head, q_row, 1], [1, BLOCK_M, D1])
        do1_tiles = tl.make_tensor_descriptor(do_ptr, [GROUP, q_len, D], [do_head, do_row, 1], [1, BLOCK_M, D1])
        k1 = tl.make_tensor_descriptor(k_ptr, [k_len, D], [k_row, 1], [BLOCK_N, D1]).load([start, D0])
        v1 = tl.make_tensor_descriptor(v_ptr, [k_len, D], [v_row, 1], [BLOCK_N, D1]).load([start, D0])
        dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
        dv1 = tl.zeros([BLOCK_N, D1], tl.float32)

    member, query = 0, low
    for _ in range(0, steps):
        rows = query + tl.arange(0, BLOCK_M)
        q0 = q0_tiles.load([member, query, 0]).reshape(BLOCK_M, D0)
        s = tl.dot(k0, tl.trans(q0))
        if D1 > 0:
            q1 = q1_tiles.load([member, query, D0]).reshape(BLOCK_M, D1)
            s = tl.dot(k1, tl.trans(q1), s)
        do0 = do0_tiles.load([member, query, 0]).reshape(BLOCK_M, D0)
        if D1 > 0:
            do1 = do1_tiles.load([member, query, D0]).reshape(BLOCK_M, D1)
        if DK:
            dp = tl.dot(v0, tl.trans(do0))
            if D1 > 0:
                dp = tl.dot(v1, tl.trans(do1), dp)
        lse2 = lse2_tiles.load([member, before + query]).reshape(BLOCK_M)
        if SOFTCAP:
            s = tanh(s * inner)
        p = tl.exp2(s * factor - lse2[None, :])
        see = rows[None, :] >= since[:, None]
        if LEFT:
            see = see & (rows[None, :] <= (keys + (left - offset))[:, None])
        p = tl.where(see, p, 0.0)
        if DV:
            rounded = p.to(do0.dtype)
            dv0 = tl.dot(rounded, do0, dv0)
            if D1 > 0:
                dv1 = tl.dot(rounded, do1, dv1)
        if DK:
            delta = delta_tiles.load([member, before + query]).reshape(BLOCK_M)
            ds = p * (dp - delta[None, :])
            if SOFTCAP:
                ds = ds * (1 - s * s)
            ds = ds.to(q0.dtype)
            dk0 = tl.dot(ds, q0, dk0)
            if D1 > 0:
                dk1 = tl.dot(ds, q1, dk1)
        query += BLOCK_M  # carried on: a division would take the registers that are left
        member += tl.where(query < high, 0, 1)
        query = tl.where(query < high, query, low)

    dk_ptr += b * dk_batch + h * dk_head + k_start * dk_row
    dv_ptr += b * dk_batch + h * dk_head + k_start * dk_row
    keys = start + tl.arange(0, BLOCK_N)
    there = ((keys >= first) & (keys < end))[:, None]
    if DK:
        store(dk_ptr, start, dk_row, k_len, tl.where(there, dk0 * scale, 0.0), BLOCK_N, 0, D0, D)
        if D1 > 0:
            store(dk_ptr, start, dk_row, k_len, tl.where(there, dk1 * scale, 0.0), BLOCK_N, D0, D1, D)
    if DV:
        store(dv_ptr, start, dk_row, k_len, tl.where(there, dv0, 0.0), BLOCK_N, 0, D0, D)
        if D1 > 0:
            store(dv_ptr, start, dk_row, k_len, tl.where(there, dv1, 0.0), BLOCK_N, D0, D1, D)
