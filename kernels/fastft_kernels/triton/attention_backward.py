"""Gradients of attention in Triton, in three passes of which none adds to another's result: deterministic, no atomics.

    delta = sum over D of do * o - dlse
    ds = p * (dropout(do vᵀ) - delta) * (1 - tanh²)        tanh only with a softcap
    dv = dropout(p)ᵀ do,   dk = scale * dsᵀ q              a program per tile of keys, over all heads that share them
    dq = scale * ds k                                      a program per tile of queries

p is computed again from lse; scores stand transposed in the pass over keys, so that p and ds enter their products from
registers. Rounded to the dtype of q: p and ds, for these products.
"""

import torch
import triton
import triton.language as tl

from fastft_kernels.triton import _attention_config as config
from fastft_kernels.triton._attention_tiles import (
    INFINITY,
    LOG2_E,
    bounds,
    keep,
    key_range,
    load,
    place,
    query_range,
    store,
    tanh,
    visible,
)


@triton.jit(do_not_specialize=["q_len"])
def delta_kernel(
    do_ptr,
    o_ptr,
    dlse_ptr,
    lse_ptr,
    delta_ptr,
    lse2_ptr,
    do_batch,
    do_row,
    do_head,
    o_batch,
    o_row,
    o_head,
    dlse_batch,
    dlse_row,
    dlse_head,
    lse_batch,
    lse_row,
    lse_head,
    q_len,
    HEADS: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta, and lse to base 2, both [pairs, q_len]; for rows that see nothing 0 and +inf, which makes p and ds zero."""
    tiles = tl.cdiv(q_len, BLOCK_M)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = pair // HEADS, pair % HEADS
    start = tl.program_id(0) % tiles * BLOCK_M
    do = load(do_ptr + b * do_batch + h * do_head, start, do_row, 0, q_len, BLOCK_M, 0, BLOCK_D, D, True)
    o = load(o_ptr + b * o_batch + h * o_head, start, o_row, 0, q_len, BLOCK_M, 0, BLOCK_D, D, True)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    rows = start + tl.arange(0, BLOCK_M)
    there = rows < q_len
    wide = rows.to(tl.int64)
    lse = tl.load(lse_ptr + b * lse_batch + h * lse_head + wide * lse_row, there, other=0.0)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + b * dlse_batch + h * dlse_head + wide * dlse_row, there, other=0.0)
    blind = lse == -INFINITY
    tl.store(delta_ptr + pair * q_len + rows, tl.where(blind, 0.0, delta), there)
    tl.store(lse2_ptr + pair * q_len + rows, tl.where(blind, INFINITY, lse * LOG2_E), there)


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


def backward(
    do,
    dlse,
    q,
    k,
    v,
    o,
    lse,
    scale,
    left,
    right,
    softcap,
    cu_seqlens_q,
    cu_seqlens_k,
    key_lengths,
    dropout_p,
    seed,
):
    """(dq, dk, dv), contiguous. dlse is None where nothing depends on lse."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if not q.numel() or not k.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    call = config.Call(q, k, v, scale, left, right, softcap, cu_seqlens_q, cu_seqlens_k, key_lengths, dropout_p, seed)
    do, o, lse = config.batched(do), config.batched(o), config.batched(lse, 3)
    dlse_there = lse if dlse is None else config.batched(dlse, 3)
    heads, heads_k, total = call.q.shape[2], call.k.shape[2], call.q.shape[1]
    pairs, pairs_k = call.pairs(call.q), call.pairs(call.k)
    delta, lse2 = q.new_empty(2, pairs, total, dtype=torch.float32)
    with torch.cuda.device_of(q):
        delta_kernel[(triton.cdiv(total, 64) * pairs,)](
            do,
            o,
            dlse_there,
            lse,
            delta,
            lse2,
            *config.strides(do, o, dlse_there, lse),
            total,
            HEADS=heads,
            HAS_DLSE=dlse is not None,
            D=q.shape[-1],
            BLOCK_D=triton.next_power_of_2(q.shape[-1]),
            BLOCK_M=64,
            num_warps=4,
        )
        # Registers hold both accumulators up to 128 columns; wider heads pay one more product for two launches.
        for kernel in ("dkdv",) if q.shape[-1] <= 128 else ("dk", "dv"):
            block_m, block_n, warps, stages = call.blocks(kernel)
            tiles = call.tiles(call.k, block_n)
            dkdv_kernel[(tiles * pairs_k,)](
                call.q,
                call.k,
                call.v,
                do,
                lse2,
                delta,
                dk,
                dv,
                *call.pointers,
                *config.strides(call.q, call.k, call.v, do, config.batched(dk)),
                total,
                scale,
                tiles,
                pairs_k,
                call.section(heads_k, pairs_k),
                *call.numbers,
                **call.constants,
                DK="dk" in kernel,
                DV="dv" in kernel,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                num_warps=warps,
                num_stages=stages,
            )
        block_m, block_n, warps, stages = call.blocks("dq")
        tiles = call.tiles(call.q, block_m)
        dq_kernel[(tiles * pairs,)](
            call.q,
            call.k,
            call.v,
            do,
            lse2,
            delta,
            dq,
            *call.pointers,
            *config.strides(call.q, call.k, call.v, do, config.batched(dq)),
            total,
            scale,
            tiles,
            pairs,
            call.section(heads, pairs),
            *call.numbers,
            **call.constants,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=warps,
            num_stages=stages,
        )
    return dq, dk, dv
