"""The product of LoRA layers with the low-rank term in the same accumulator: forward, and the gradient of the input.

    y = sum over layers of  x_i W_i + keep_i * (S_i V_i),  + b

x_i: [rows, depth_i], W_i: [depth_i, cols] by any strides, S: [rows, sum of ranks], V: [sum of ranks, cols]; float16,
bfloat16 or float32, accumulated in float32 and rounded once. keep_i is the dropout mask of layer i over y.

    forward             one layer: x Wᵀ + S (sB)ᵀ + b
    input's gradient    up to LAYERS layers that share their input: dy_i W_i + keep_i * (dS_i A_i)

A program computes one tile of y: a walk over the depth of each layer, and a few steps of BLOCK_R ranks. The first of these
is loaded before the walk, where there are registers for it, and multiplied after it; with a mask, which takes more of
them than the walk leaves, the low-rank term comes first.
"""

import triton
import triton.language as tl

from fastft_kernels.triton._philox import keep_mask

LAYERS = 3


@triton.jit
def place(program, n_rows, n_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """(first row, first column) of a program's tile: GROUP tiles of rows go over the columns together, for the L2 cache."""
    row_tiles, col_tiles = tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_cols, BLOCK_N)
    group = program // (GROUP * col_tiles)
    size = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = program % (GROUP * col_tiles)
    return (group * GROUP + within % size) * BLOCK_M, within // size * BLOCK_N


@triton.jit
def low_rank_tiles(
    start,
    low_ptr,
    low_row,
    v_ptr,
    v_rank,
    v_col,
    rows_there,
    cols_there,
    rank,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """S and V from rank `start`, with anything past `rank`. The pointers stand at the tile's first row and column."""
    rows, cols, ranks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), start + tl.arange(0, BLOCK_R)
    there = ranks < rank
    low = tl.load(low_ptr + (rows[:, None] * low_row + ranks[None, :]), rows_there[:, None] & there[None, :])
    v = tl.load(v_ptr + (ranks[:, None] * v_rank + cols[None, :] * v_col), there[:, None] & cols_there[None, :])
    return low, v


@triton.jit
def low_rank(low, v, start, rank, acc, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr):
    """acc + S V of such tiles. What is not there becomes 0 here, so that tiles loaded long before wait in registers."""
    there = start + tl.arange(0, BLOCK_R) < rank
    low, v = tl.where(there[None, :], low, 0.0), tl.where(there[:, None], v, 0.0)
    return tl.dot(low, v, acc, input_precision=PRECISION)


@triton.jit
def product(
    x_ptr,
    x_row,
    w_ptr,
    w_depth,
    w_col,
    rows_there,
    cols_there,
    depth,
    acc,
    EVEN_COLS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + x W. The pointers stand at the tile's first row and column."""
    rows, cols, ks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    x_tile = rows[:, None] * x_row + ks[None, :]
    w_tile = ks[:, None] * w_depth + cols[None, :] * w_col
    for start in range(0, depth, BLOCK_K):
        x_mask = rows_there[:, None]
        if not EVEN_DEPTH:
            x_mask = x_mask & (ks < depth - start)[None, :]
        x = tl.load(x_ptr + x_tile, x_mask, other=0.0)
        if EVEN_DEPTH and EVEN_COLS:
            w = tl.load(w_ptr + w_tile)
        elif EVEN_DEPTH:
            w = tl.load(w_ptr + w_tile, cols_there[None, :], other=0.0)
        else:
            w = tl.load(w_ptr + w_tile, (ks < depth - start)[:, None] & cols_there[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptr += BLOCK_K
        w_ptr += BLOCK_K * w_depth
    return acc


@triton.jit
def described_product(
    x,
    w,
    first_row,
    first_col,
    depth,
    acc,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same of tensor descriptors, which give zeros outside. TRANSPOSED: w is Wᵀ, [cols, depth]."""
    for start in range(0, depth, BLOCK_K):
        if TRANSPOSED:
            tile = tl.trans(w.load([first_col, start]))
        else:
            tile = w.load([start, first_col])
        acc = tl.dot(x.load([first_row, start]), tile, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["n_rows", "seed0", "seed1", "seed2", "threshold"])
def product_kernel(
    x0_ptr,
    x1_ptr,
    x2_ptr,
    x0_row,
    x1_row,
    x2_row,
    w0_ptr,
    w1_ptr,
    w2_ptr,
    w0_depth,
    w1_depth,
    w2_depth,
    w0_col,
    w1_col,
    w2_col,
    low_ptr,
    low_row,
    v_ptr,
    v_rank,
    v_col,
    bias_ptr,
    y_ptr,
    n_rows,
    n_cols,
    depth0,
    depth1,
    depth2,
    rank0,
    rank1,
    rank2,
    seed0,
    seed1,
    seed2,
    threshold,
    LAYERS: tl.constexpr,
    PRODUCTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    EVEN_COLS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y [rows, cols] of LAYERS low-rank terms and PRODUCTS dense ones, as many or none.

    DESCRIPTORS: x0 ... w2 are tensor descriptors, whose strides are not looked at.
    """
    first_row, first_col = place(tl.program_id(0), n_rows, n_cols, BLOCK_M, BLOCK_N, GROUP)
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    rows_there, cols_there = rows < n_rows - first_row, cols < n_cols - first_col
    row, col = first_row.to(tl.int64), first_col.to(tl.int64)
    low_ptr += row * low_row
    v_ptr += col * v_col
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    rank = rank0 + rank1 + rank2
    if DROPOUT:
        # Loops that are loops, so that one mask is in registers at a time, and not pipelined, for its memory.
        for layer in tl.range(0, LAYERS, num_stages=1):
            rank = tl.where(layer == 0, rank0, tl.where(layer == 1, rank1, rank2))
            seed = tl.where(layer == 0, seed0, tl.where(layer == 1, seed1, seed2))
            keep = keep_mask(seed, row + rows, first_col, n_cols, threshold, ALIGNED, BLOCK_M, BLOCK_N)
            part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for start in tl.range(0, rank, BLOCK_R, num_stages=1):
                low, v = low_rank_tiles(
                    start,
                    low_ptr,
                    low_row,
                    v_ptr,
                    v_rank,
                    v_col,
                    rows_there,
                    cols_there,
                    rank,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_R,
                )
                part = low_rank(low, v, start, rank, part, PRECISION, BLOCK_R)
            acc += tl.where(keep, part, 0.0)
            low_ptr += rank
            v_ptr += tl.cast(rank, tl.int64) * v_rank
    elif DESCRIPTORS:
        # Asked for here and used at the end: they come while the products are computed.
        low, v = low_rank_tiles(
            0, low_ptr, low_row, v_ptr, v_rank, v_col, rows_there, cols_there, rank, BLOCK_M, BLOCK_N, BLOCK_R
        )

    for layer in tl.static_range(PRODUCTS):
        x_ptr, x_row, w_ptr, w_depth, w_col, depth = x0_ptr, x0_row, w0_ptr, w0_depth, w0_col, depth0
        if layer == 1:
            x_ptr, x_row, w_ptr, w_depth, w_col, depth = x1_ptr, x1_row, w1_ptr, w1_depth, w1_col, depth1
        elif layer == 2:
            x_ptr, x_row, w_ptr, w_depth, w_col, depth = x2_ptr, x2_row, w2_ptr, w2_depth, w2_col, depth2
        if DESCRIPTORS:
            acc = described_product(x_ptr, w_ptr, first_row, first_col, depth, acc, TRANSPOSED, PRECISION, BLOCK_K)
        else:
            acc = product(
                x_ptr + row * x_row,
                x_row,
                w_ptr + col * w_col,
                w_depth,
                w_col,
                rows_there,
                cols_there,
                depth,
                acc,
                EVEN_COLS,
                EVEN_DEPTH,
                PRECISION,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            )

    if not DROPOUT:
        if DESCRIPTORS:
            acc = low_rank(low, v, 0, rank, acc, PRECISION, BLOCK_R)
        for start in tl.range(BLOCK_R if DESCRIPTORS else 0, rank, BLOCK_R, num_stages=1):
            low, v = low_rank_tiles(
                start, low_ptr, low_row, v_ptr, v_rank, v_col, rows_there, cols_there, rank, BLOCK_M, BLOCK_N, BLOCK_R
            )
            acc = low_rank(low, v, start, rank, acc, PRECISION, BLOCK_R)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + first_col + cols, cols_there, other=0.0).to(tl.float32)[None, :]
    y_tile = y_ptr + row * n_cols + first_col + (rows[:, None] * n_cols + cols[None, :])
    tl.store(y_tile, acc.to(y_ptr.dtype.element_ty), rows_there[:, None] & cols_there[None, :])
