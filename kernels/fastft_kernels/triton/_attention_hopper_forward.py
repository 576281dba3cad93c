"""Attention forward for Hopper: attention.py's equation and arguments, with warps that only load. No dropout.

Tiles come by bulk copies (tensor descriptors), which put zeros for what lies outside a sequence or a head. Triton splits
the loop: four warps copy keys and values into a ring of `num_stages` tiles, two groups of four compute 64 queries each.
It does so for a single loop without branches, around which nothing returns early and where every load is a bulk copy;
so every tile of scores is masked, also those that no mask crosses.
"""

import triton
import triton.language as tl

from fastft_kernels.triton._attention_tiles import INFINITY, LN2, bounds, key_limits, place, store, tanh


@triton.jit(do_not_specialize=["tiles", "pairs", "section", "sequences", "q_len", "k_len", "left", "right", "seed"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
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
    o_batch,
    o_row,
    o_head,
    lse_batch,
    lse_row,
    lse_head,
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
    b, h = batch.to(tl.int64), head.to(tl.int64)
    # An empty tile is read all the same, for nothing: from row 0 where its sequence has none, as a copy may not lie
    # outside the tensor.
    q_start = tl.where(q_len > 0, q_start, 0)
    q_start, k_start = tl.cast(q_start, tl.int64), tl.cast(k_start, tl.int64)
    q_ptr += b * q_batch + h * q_head + q_start * q_row
    k_ptr += b * k_batch + h // GROUP * k_head + k_start * k_row
    v_ptr += b * v_batch + h // GROUP * v_head + k_start * v_row
    o_ptr += b * o_batch + h * o_head + q_start * o_row
    lse_ptr += b * lse_batch + h * lse_head + q_start * lse_row
    offset = k_len - q_len
    rows = start + tl.arange(0, BLOCK_M)
    low, high, last = key_limits(rows, start, q_len, offset, left, right, first, end, LEFT, RIGHT, BLOCK_M)

    k0_tiles = tl.make_tensor_descriptor(k_ptr, [end, D], [k_row, 1], [BLOCK_N, D0])
    v0_tiles = tl.make_tensor_descriptor(v_ptr, [end, D], [v_row, 1], [BLOCK_N, D0])
    q_rows = tl.maximum(q_len, 1)
    q0 = tl.make_tensor_descriptor(q_ptr, [q_rows, D], [q_row, 1], [BLOCK_M, D0]).load([start, 0])
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -INFINITY, tl.float32)
    if D1 > 0:
        k1_tiles = tl.make_tensor_descriptor(k_ptr, [end, D], [k_row, 1], [BLOCK_N, D1])
        v1_tiles = tl.make_tensor_descriptor(v_ptr, [end, D], [v_row, 1], [BLOCK_N, D1])
        q1 = tl.make_tensor_descriptor(q_ptr, [q_rows, D], [q_row, 1], [BLOCK_M, D1]).load([start, D0])
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)

    for key in tl.range(low, high, BLOCK_N, warp_specialize=True):
        k0 = k0_tiles.load([key, 0])
        s = tl.dot(q0, tl.trans(k0))
        if D1 > 0:
            k1 = k1_tiles.load([key, D0])
            s = tl.dot(q1, tl.trans(k1), s)
        if SOFTCAP:
            s = tanh(s * inner)
        cols = key + tl.arange(0, BLOCK_N)
        see = cols[None, :] <= last[:, None]
        if LEFT:
            see = see & (cols[None, :] >= (rows + (offset - left))[:, None])
        s = tl.where(see, s, -INFINITY)
        higher = tl.maximum(top, tl.max(s, 1) * factor)
        pivot = tl.where(higher == -INFINITY, 0.0, higher)
        p = tl.exp2(s * factor - pivot[:, None])
        shrink = tl.exp2(top - pivot)
        total = total * shrink + tl.sum(p, 1)
        top = higher
        p = p.to(q0.dtype)
        v0 = v0_tiles.load([key, 0])
        acc0 = tl.dot(p, v0, acc0 * shrink[:, None])
        if D1 > 0:
            v1 = v1_tiles.load([key, D0])
            acc1 = tl.dot(p, v1, acc1 * shrink[:, None])

    blind = total == 0.0
    divisor = tl.where(blind, 0.0, 1.0 / tl.where(blind, 1.0, total))
    store(o_ptr, start, o_row, q_len, acc0 * divisor[:, None], BLOCK_M, 0, D0, D)
    if D1 > 0:
        store(o_ptr, start, o_row, q_len, acc1 * divisor[:, None], BLOCK_M, D0, D1, D)
    lse = tl.where(blind, -INFINITY, (top + tl.log2(total)) * LN2)
    tl.store(lse_ptr + rows.to(tl.int64) * lse_row, lse, rows < q_len)
