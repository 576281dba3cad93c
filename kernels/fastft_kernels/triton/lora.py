"""LoRA on the GPU, in Triton: all but the products that cuBLAS computes faster. Equation: reference/lora.py.

    low_rank             S = drop(x) Aᵀ of all layers that read x: one read of it, masks drawn on the way
    product              y = x Wᵀ + S (sB)ᵀ + b in one accumulator
    gradients            dS = dy (sB) and dB = dyᵀ S: one read of dy
    adapter_gradients    dA = dSᵀ drop(x) of all layers: one read of x
    input_gradient       dx = sum of dy W + keep * (dS A), all layers in one accumulator
    branch               its second term alone, which products are then added to
    apply_mask           drop(x), without its scale

x, dy: [rows, cols]; W: [out, in]; A: [r, in]; B: [out, r]; of one dtype: bfloat16, float16, under the interpreter float32
as well. `s` and the division by the probability to be kept have been multiplied into B. Sums are float32 and rounded
once; there are no atomics, so they are the same every time. Each function but the last returns None where its table
(_lora_config.py) leaves the work to PyTorch's products.

Bytes moved, in the dtype of x: low_rank and adapter_gradients x; gradients dy, and 8 r / 256 of its elements as float32
parts; product and input_gradient what their dense products move.
"""

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from fastft_kernels._layout import rows
from fastft_kernels.reference._philox import drop_threshold
from fastft_kernels.triton import _lora_config as config
from fastft_kernels.triton import dropout
from fastft_kernels.triton._lora_low_rank import down_kernel, gradients_kernel
from fastft_kernels.triton._lora_product import LAYERS, product_kernel


def apply_mask(x, p, seed):
    """x, contiguous, where `seed` keeps it, else 0."""
    return dropout.scaled(x, p, seed, 1.0)


def low_rank(x, lora_a, p, seeds):
    """S [rows, sum of r], layers side by side. lora_a: list; seeds: int64 [layers], of no meaning where p is 0."""
    x, (ranks, seeds) = _matrix(x), _masks([a.shape[0] for a in lora_a], p, seeds)
    if not config.takes_thin(x, ranks, fewer_bytes=p > 0):
        return None
    block_m, block_n, warps, stages = config.thin_blocks("down", x.device)
    a, rank_blocks = _matrix(_joined(lora_a, 0)), _blocks(ranks)
    programs = rank_blocks * triton.cdiv(x.shape[0], block_m)
    steps = triton.cdiv(x.shape[1], block_n)
    steps = triton.cdiv(steps, min(steps, config.parallel(x.device, programs)))
    parts = triton.cdiv(x.shape[1], steps * block_n)
    down = x.new_empty(parts, x.shape[0], sum(ranks), dtype=torch.float32)
    with torch.cuda.device_of(x):
        down_kernel[(programs, parts)](
            x,
            x.stride(0),
            a,
            a.stride(1),
            a.stride(0),
            down,
            *x.shape,
            steps,
            *_three(ranks),
            *_three(seeds),
            drop_threshold(p),
            rank_blocks,
            DROPOUT=p > 0,
            ALIGNED=x.shape[1] % 8 == 0,
            PRECISION=_precision(x),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_R=config.BLOCK_R,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,
        )
    return down.sum(0).to(x.dtype)


def gradients(dy, low, lora_b):
    """(dS [rows, r], dB as float32 [out, r]). low: S of this layer."""
    dy, ranks = _matrix(dy), [low.shape[1]]
    if not config.takes_thin(dy, ranks, fewer_bytes=True):
        return None
    down, up = _gradients("gradients", dy, _matrix(lora_b), low, ranks, 0.0, [0])
    return down.sum(0).to(dy.dtype), up


def adapter_gradients(x, dlows, p, seeds):
    """[dA as float32 [r, in]], of each dS [rows, r]."""
    x, widths = _matrix(x), [dlow.shape[1] for dlow in dlows]
    ranks, seeds = _masks(widths, p, seeds)
    if not config.takes_thin(x, ranks, fewer_bytes=p > 0):
        return None
    _, up = _gradients("adapter", x, None, _joined(dlows, 1), ranks, p, seeds)
    return list(up.split(widths))


def _gradients(kind, x, v, low, ranks, p, seeds):
    """(parts of x V, or None, xᵀ L summed): [cols, ranks] where there is a V, [ranks, cols] where not."""
    block_m, block_n, warps, stages = config.thin_blocks(kind, x.device)
    cols, rank_blocks = x.shape[1], _blocks(ranks)
    programs = rank_blocks * triton.cdiv(cols, block_n)
    lanes = min(triton.cdiv(x.shape[0], block_m), config.parallel(x.device, programs))
    shape = (sum(ranks), cols) if v is None else (cols, sum(ranks))
    up = x.new_empty(lanes, *shape, dtype=torch.float32)
    down = None if v is None else x.new_empty(programs // rank_blocks, x.shape[0], sum(ranks), dtype=torch.float32)
    with torch.cuda.device_of(x):
        gradients_kernel[(programs, lanes)](
            x,
            x.stride(0),
            low if v is None else v,
            *(0, 0) if v is None else v.stride(),
            low,
            low.stride(0),
            up if down is None else down,
            up,
            *up.stride()[:0:-1] if v is None else up.stride()[1:],
            *x.shape,
            *_three(ranks),
            *_three(seeds),
            drop_threshold(p),
            rank_blocks,
            DOWN=v is not None,
            DROPOUT=p > 0,
            ALIGNED=cols % 8 == 0,
            PRECISION=_precision(x),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_R=config.BLOCK_R,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,
        )
    return down, up.sum(0)


def product(x, weight, bias, low, lora_b):
    """y [rows, out]. low: S [rows, r]; bias: [out] of any floating dtype, or None."""
    return _products("forward", [x], [weight], low, lora_b.t(), [low.shape[1]], bias, 0.0, [0])


def input_gradient(dys, weights, dlows, lora_a, p, seeds):
    """dx [rows, in] of layers that read the same x: lists of dy, W, dS [rows, r] and A."""
    ranks = [a.shape[0] for a in lora_a]
    kind = "masked" if p else "input"
    return _products(kind, dys, weights, _joined(dlows, 1), _joined(lora_a, 0), ranks, None, p, seeds)


def branch(dlows, lora_a, p, seeds):
    """sum of keep * (dS A) [rows, in]."""
    ranks = [a.shape[0] for a in lora_a]
    return _products("branch", [], [], _joined(dlows, 1), _joined(lora_a, 0), ranks, None, p, seeds)


def _products(kind, xs, weights, low, v, ranks, bias, p, seeds):
    """[rows, cols]: sum of x W (`forward`: x Wᵀ) and of keep * (S V), + b."""
    xs, weights = [_matrix(x) for x in xs], [_matrix(W) for W in weights]
    n_rows, n_cols = low.shape[0], v.shape[1]
    if not config.takes_product(low, xs, weights, n_cols, ranks, p > 0):
        return None
    block_m, block_n, block_k, warps, stages = config.product_blocks(kind, low.device)
    depths, across = [x.shape[1] for x in xs], kind == "forward"
    x_rows, w_strides = [x.stride(0) for x in xs], [W.stride()[::-1] if across else W.stride() for W in weights]
    described = config.describes(xs + weights)
    if described:
        w_block = [block_n, block_k] if across else [block_k, block_n]
        xs = [TensorDescriptor.from_tensor(x, [block_m, block_k]) for x in xs]
        weights = [TensorDescriptor.from_tensor(W, w_block) for W in weights]
    y = low.new_empty(n_rows, n_cols)
    with torch.cuda.device_of(y):
        product_kernel[(triton.cdiv(n_rows, block_m) * triton.cdiv(n_cols, block_n),)](
            *_three(xs, None),
            *_three(x_rows),
            *_three(weights, None),
            *_three([depth for depth, _ in w_strides]),
            *_three([col for _, col in w_strides]),
            low,
            low.stride(0),
            v,
            *v.stride(),
            y if bias is None else bias.contiguous(),
            y,
            n_rows,
            n_cols,
            *_three(depths),
            *_three(ranks),
            *_three([int(seed) for seed in seeds] if p else []),
            drop_threshold(p),
            LAYERS=len(ranks),
            PRODUCTS=len(depths),
            HAS_BIAS=bias is not None,
            DROPOUT=p > 0,
            ALIGNED=n_cols % 8 == 0,
            DESCRIPTORS=described,
            TRANSPOSED=across,
            EVEN_COLS=n_cols % block_n == 0,
            EVEN_DEPTH=all(depth % block_k == 0 for depth in depths),
            PRECISION=_precision(low),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            BLOCK_R=config.BLOCK_R,
            GROUP=config.GROUP,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,
        )
    return y


def _matrix(x):
    """x [rows, cols] with adjacent elements in a row, and rows so near each other that a tile's offsets fit 32 bits."""
    return rows(x) if x.stride(0) < config.MAX_STRIDE else x.contiguous()


def _joined(tensors, dim):
    return torch.cat(tensors, dim) if len(tensors) > 1 else tensors[0]


def _masks(ranks, p, seeds):
    """(ranks, seeds) of the layers; without dropout they are one."""
    return (ranks, [int(seed) for seed in seeds]) if p else ([sum(ranks)], [0])


def _blocks(ranks):
    return sum(triton.cdiv(rank, config.BLOCK_R) for rank in ranks)


def _three(values, filler=0):
    """As many as the kernels take: `filler` where there is no layer."""
    return [*values, *[filler] * (LAYERS - len(values))]


def _precision(x):
    return "tf32" if x.is_cuda and torch.backends.cuda.matmul.allow_tf32 else "ieee"
