"""Rotary position embedding on the GPU, in Triton. Equation: reference/rope.py.

q, k: [..., D], one of float32, bfloat16, float16; cos, sin: without the heads and with [..., R], any of them. Any strides;
results lie in memory as q and k do, the elements of a head side by side. q and k are turned in one launch; each has at
most MAX_HEADS heads, those of all tokens counted.
Saved for backward, which is the transposed rotation: cos and sin alone.

    dx1 = dy1 * cos1 + dy2 * sin2
    dx2 = dy2 * cos2 - dy1 * sin1

Bytes moved, for n elements of s bytes in q and k together: 2 n s each way; the heads of a token share cos and sin in the
cache.
"""

import torch
import triton
import triton.language as tl

from fastft_kernels._layout import angle_strides, rows, token_dim, token_strides

BLOCK = 1024  # pairs of elements per program, 8 per thread: 16-byte accesses in half precision
WARPS = 4
MAX_HEADS = 2**31 - 2**16  # numbered in int32, which divides faster; offsets are int64


@triton.jit
def turn(
    x_ptr,
    x_batch,
    x_token,
    x_head,
    y_ptr,
    y_batch,
    y_token,
    y_head,
    cos_ptr,
    cos_batch,
    cos_token,
    sin_ptr,
    sin_batch,
    sin_token,
    block,
    n_tokens,
    n_rows,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """BLOCK_ROWS heads: those of successive tokens."""
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    head, token = (row % HEADS).to(tl.int64), row // HEADS
    batch, token = (token // n_tokens).to(tl.int64), (token % n_tokens).to(tl.int64)
    x = x_ptr + (batch * x_batch + token * x_token + head * x_head)[:, None]
    y = y_ptr + (batch * y_batch + token * y_token + head * y_head)[:, None]
    cos = cos_ptr + (batch * cos_batch + token * cos_token)[:, None]
    sin = sin_ptr + (batch * sin_batch + token * sin_token)[:, None]

    cols = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (row < n_rows)[:, None] & (cols < HALF)
    x1 = tl.load(x + cols, mask, other=0.0).to(tl.float32)
    x2 = tl.load(x + HALF + cols, mask, other=0.0).to(tl.float32)
    cos1 = tl.load(cos + cols, mask, other=0.0).to(tl.float32)
    cos2 = tl.load(cos + HALF + cols, mask, other=0.0).to(tl.float32)
    sin1 = tl.load(sin + cols, mask, other=0.0).to(tl.float32)
    sin2 = tl.load(sin + HALF + cols, mask, other=0.0).to(tl.float32)
    if INVERSE:
        y1 = x1 * cos1 + x2 * sin2
        y2 = x2 * cos2 - x1 * sin1
    else:
        y1 = x1 * cos1 - x2 * sin1
        y2 = x2 * cos2 + x1 * sin2
    tl.store(y + cols, y1.to(y_ptr.dtype.element_ty), mask)
    tl.store(y + HALF + cols, y2.to(y_ptr.dtype.element_ty), mask)

    if SIZE > 2 * HALF:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        kept = (row < n_rows)[:, None] & (rest < SIZE)
        tl.store(y + rest, tl.load(x + rest, kept), kept)


@triton.jit(do_not_specialize=["q_blocks", "n_tokens", "all_tokens"])
def rope_kernel(
    q_ptr,
    q_batch,
    q_token,
    q_head,
    k_ptr,
    k_batch,
    k_token,
    k_head,
    q_out_ptr,
    q_out_batch,
    q_out_token,
    q_out_head,
    k_out_ptr,
    k_out_batch,
    k_out_token,
    k_out_head,
    cos_ptr,
    cos_batch,
    cos_token,
    sin_ptr,
    sin_batch,
    sin_token,
    q_blocks,
    n_tokens,
    all_tokens,
    HEADS_Q: tl.constexpr,
    HEADS_K: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    block = tl.program_id(0)
    if block < q_blocks:
        turn(
            q_ptr,
            q_batch,
            q_token,
            q_head,
            q_out_ptr,
            q_out_batch,
            q_out_token,
            q_out_head,
            cos_ptr,
            cos_batch,
            cos_token,
            sin_ptr,
            sin_batch,
            sin_token,
            block,
            n_tokens,
            all_tokens * HEADS_Q,
            HEADS_Q,
            SIZE,
            HALF,
            INVERSE,
            BLOCK_ROWS,
            BLOCK_HALF,
            BLOCK_REST,
        )
    else:
        turn(
            k_ptr,
            k_batch,
            k_token,
            k_head,
            k_out_ptr,
            k_out_batch,
            k_out_token,
            k_out_head,
            cos_ptr,
            cos_batch,
            cos_token,
            sin_ptr,
            sin_batch,
            sin_token,
            block - q_blocks,
            n_tokens,
            all_tokens * HEADS_K,
            HEADS_K,
            SIZE,
            HALF,
            INVERSE,
            BLOCK_ROWS,
            BLOCK_HALF,
            BLOCK_REST,
        )


def forward(q, k, cos, sin, unsqueeze_dim):
    """(q, k), turned."""
    return _turn(q, k, cos, sin, unsqueeze_dim, False)


def backward(dq, dk, cos, sin, unsqueeze_dim):
    """(dq, dk), turned back."""
    return _turn(dq, dk, cos, sin, unsqueeze_dim, True)


def _turn(q, k, cos, sin, head_dim, inverse):
    q, k, cos, sin = (rows(x) for x in (q, k, cos, sin))
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    heads_q, heads_k = q.shape[head_dim], k.shape[head_dim]
    tokens = q.shape[token_dim(q, head_dim)]
    all_tokens = tokens * (q.shape[0] if q.dim() == 4 else 1)
    blocks = tiles(q.shape[-1], cos.shape[-1] // 2)
    q_blocks, k_blocks = (triton.cdiv(all_tokens * heads, blocks["BLOCK_ROWS"]) for heads in (heads_q, heads_k))
    if q_blocks + k_blocks:
        pairs = [(x, token_strides(x, head_dim)) for x in (q, k, q_out, k_out)]
        pairs += [(x, angle_strides(x)) for x in (cos, sin)]
        with torch.cuda.device_of(q):
            rope_kernel[(q_blocks + k_blocks,)](
                *(argument for x, strides in pairs for argument in (x, *strides)),
                q_blocks,
                tokens,
                all_tokens,
                HEADS_Q=max(heads_q, 1),
                HEADS_K=max(heads_k, 1),
                SIZE=q.shape[-1],
                HALF=cos.shape[-1] // 2,
                INVERSE=inverse,
                num_warps=WARPS,
                enable_fp_fusion=True,
                **blocks,
            )
    return q_out, k_out


def tiles(size, half):
    """Blocks for heads of `size` elements, of which 2 * half are turned."""
    block_half = triton.next_power_of_2(half)
    rest = triton.next_power_of_2(max(size - 2 * half, 1))
    return {"BLOCK_ROWS": max(BLOCK // block_half, 1), "BLOCK_HALF": block_half, "BLOCK_REST": rest}
