"""The thin products of LoRA layers, each of them one read of a wide matrix x [rows, cols].

    down     S = drop(x) V              V [cols, ranks]: Aᵀ of each layer, or sB
    gradients
             dS = x V, dB = xᵀ L        one read of x = dy gives both: V = sB, L = S
             dA = Lᵀ drop(x)            L = dS

Ranks of up to LAYERS layers lie side by side, in blocks of BLOCK_R that hold ranks of one layer, and so have one mask.
What is summed over programs is written as float32 parts, which the launcher adds: in one order, whatever ran first.
"""

import triton
import triton.language as tl

from fastft_kernels.triton._philox import keep_mask


@triton.jit
def ranks_of(block, rank0, rank1, rank2, seed0, seed1, seed2, BLOCK_R: tl.constexpr):
    """(first rank, end, seed) of a block: `end` is the layer's."""
    blocks0, blocks1 = tl.cdiv(rank0, BLOCK_R), tl.cdiv(rank1, BLOCK_R)
    second, third = block >= blocks0, block >= blocks0 + blocks1
    start = tl.where(third, rank0 + rank1, tl.where(second, rank0, 0))
    before = tl.where(third, blocks0 + blocks1, tl.where(second, blocks0, 0))
    end = start + tl.where(third, rank2, tl.where(second, rank1, rank0))
    seed = tl.where(third, seed2, tl.where(second, seed1, seed0))
    return start + (block - before) * BLOCK_R, end, seed


@triton.jit
def dropped(
    x,
    seed,
    rows,
    col,
    n_cols,
    threshold,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    keep = keep_mask(seed, rows, col, n_cols, threshold, ALIGNED, BLOCK_M, BLOCK_N)
    return tl.where(keep, x, 0.0).to(x.dtype)


@triton.jit(
    do_not_specialize=[
        "n_rows",
        "steps",
        "rank0",
        "rank1",
        "rank2",
        "seed0",
        "seed1",
        "seed2",
        "threshold",
        "rank_blocks",
    ]
)
def down_kernel(
    x_ptr,
    x_row,
    v_ptr,
    v_col,
    v_rank,
    down_ptr,
    n_rows,
    n_cols,
    steps,
    rank0,
    rank1,
    rank2,
    seed0,
    seed1,
    seed2,
    threshold,
    rank_blocks,
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """down [parts, rows, ranks]: part i sums over `steps` blocks of columns, from block i * steps."""
    # The blocks of ranks of one tile run side by side, and read it from the cache but once.
    program = tl.program_id(0)
    first_rank, end_rank, seed = ranks_of(program % rank_blocks, rank0, rank1, rank2, seed0, seed1, seed2, BLOCK_R)
    first_row = program // rank_blocks * BLOCK_M
    part = tl.program_id(1)
    rows, cols = first_row.to(tl.int64) + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    ranks = first_rank + tl.arange(0, BLOCK_R)
    rows_there, ranks_there = rows < n_rows, ranks < end_rank
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for step in range(part * steps, tl.minimum((part + 1) * steps, tl.cdiv(n_cols, BLOCK_N))):
        col = step * BLOCK_N
        cols_there = cols < n_cols - col
        x = tl.load(
            x_ptr + rows[:, None] * x_row + (col + cols)[None, :], rows_there[:, None] & cols_there[None, :], other=0.0
        )
        if DROPOUT:
            x = dropped(x, seed, rows, col, n_cols, threshold, ALIGNED, BLOCK_M, BLOCK_N)
        v = tl.load(
            v_ptr + (col + cols).to(tl.int64)[:, None] * v_col + ranks.to(tl.int64)[None, :] * v_rank,
            cols_there[:, None] & ranks_there[None, :],
            other=0.0,
        )
        acc = tl.dot(x, v, acc, input_precision=PRECISION)
    out = (part.to(tl.int64) * n_rows + rows)[:, None] * (rank0 + rank1 + rank2) + ranks[None, :]
    tl.store(down_ptr + out, acc, rows_there[:, None] & ranks_there[None, :])


@triton.jit(do_not_specialize=["n_rows", "seed0", "seed1", "seed2", "threshold", "rank_blocks"])
def gradients_kernel(
    x_ptr,
    x_row,
    v_ptr,
    v_col,
    v_rank,
    low_ptr,
    low_row,
    down_ptr,
    up_ptr,
    up_col,
    up_rank,
    n_rows,
    n_cols,
    rank0,
    rank1,
    rank2,
    seed0,
    seed1,
    seed2,
    threshold,
    rank_blocks,
    DOWN: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """up [lanes, cols, ranks], by its strides: xᵀ L of the rows of each lane; with DOWN also down [parts, rows, ranks].

    A program keeps its columns of the first in registers while it walks over the rows of its lane.
    """
    program = tl.program_id(0)
    first_rank, end_rank, seed = ranks_of(program % rank_blocks, rank0, rank1, rank2, seed0, seed1, seed2, BLOCK_R)
    part = program // rank_blocks
    lane, lanes = tl.program_id(1), tl.num_programs(1)
    total = rank0 + rank1 + rank2
    col = part * BLOCK_N
    cols, ranks = tl.arange(0, BLOCK_N), first_rank + tl.arange(0, BLOCK_R)
    cols_there, ranks_there = cols < n_cols - col, ranks < end_rank
    if DOWN:
        v = tl.load(
            v_ptr + (col + cols).to(tl.int64)[:, None] * v_col + ranks.to(tl.int64)[None, :] * v_rank,
            cols_there[:, None] & ranks_there[None, :],
            other=0.0,
        )
    acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for tile in range(lane, tl.cdiv(n_rows, BLOCK_M), lanes):
        rows = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        rows_there = rows < n_rows
        x = tl.load(
            x_ptr + rows[:, None] * x_row + (col + cols)[None, :], rows_there[:, None] & cols_there[None, :], other=0.0
        )
        if DROPOUT:
            x = dropped(x, seed, rows, col, n_cols, threshold, ALIGNED, BLOCK_M, BLOCK_N)
        low = tl.load(
            low_ptr + rows[:, None] * low_row + ranks[None, :], rows_there[:, None] & ranks_there[None, :], other=0.0
        )
        acc = tl.dot(tl.trans(x), low, acc, input_precision=PRECISION)
        if DOWN:
            down = tl.dot(x, v, input_precision=PRECISION)
            out = (part.to(tl.int64) * n_rows + rows)[:, None] * total + ranks[None, :]
            tl.store(down_ptr + out, down, rows_there[:, None] & ranks_there[None, :])
    up = (
        lane.to(tl.int64) * n_cols * total
        + (col + cols).to(tl.int64)[:, None] * up_col
        + ranks.to(tl.int64)[None, :] * up_rank
    )
    tl.store(up_ptr + up, acc, cols_there[:, None] & ranks_there[None, :])
