"""Dropout of LoRA's low-rank branch: a mask drawn from a seed, again wherever it is applied, and never stored."""

import torch
from torch import Tensor

from fastft.ops import dispatch
from fastft_kernels.reference import lora as reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _why_not_dtype(x, *_):
    return None if x.dtype in _DTYPES else f"it computes float32, bfloat16 and float16, and x is {x.dtype}"


KERNELS = dispatch.register("lora", triton=_why_not_dtype, cpp=_why_not_dtype)


def apply_mask(x, p, seed, backend):
    return getattr(KERNELS.get(backend), "apply_mask", reference.apply_mask)(x, p, int(seed))


@torch.library.custom_op("fastft::lora_mask", mutates_args=())
def mask_op(x: Tensor, p: float, seed: Tensor, backend: str) -> Tensor:
    return apply_mask(x, p, seed, backend)


@mask_op.register_fake
def _(x, p, seed, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    _, ctx.p, seed, ctx.backend = inputs
    ctx.save_for_backward(seed)


mask_op.register_autograd(
    lambda ctx, dy: (mask_op(dy, ctx.p, *ctx.saved_tensors, ctx.backend), None, None, None),
    setup_context=_setup_context,
)
