"""What the ops of LoRA take: layers, dropout and seeds, checked and made ready once for all of them."""

import contextlib

import torch
from torch import Tensor

from fastft.ops import checks, dispatch
from fastft.ops.nf4 import NF4Weight, dequantize_nf4


def enter(op, x, layers, p, seeds, inner=None):
    """Arguments checked, cast as autocast says, with seeds [layers] and the backend.

    inner: from this layer on, the input is the output of the first one and not x.
    """
    checks.tensors(op, x=x)
    checks.numbers(op, dropout_p=p)
    layers = _layers(op, layers)
    if not 0 <= p < 1:
        raise ValueError(f"{op}: dropout_p is {p}; it must be at least 0 and below 1")
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"{op}: x is {list(x.shape)} of {x.dtype}; it must be [..., in] of a floating dtype")
    device = x.device.type
    if checks.autocasts(device):
        dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype)
        cast = lambda W: W if isinstance(W, NF4Weight) else W.to(dtype)
        layers = [(cast(W), *rest) for W, *rest in layers]
    for i, layer in enumerate(layers):
        _check(op, x, layers[0][0].shape[0] if inner is not None and i >= inner else x.shape[-1], *layer)
    if inner is not None and layers[0][0].shape != layers[1][0].shape:
        shapes = " and ".join(str(list(layer[0].shape)) for layer in layers[:2])
        raise ValueError(f"{op}: the weights of gate and up are {shapes}; they must have the same shape")
    if seeds is not None and not isinstance(seeds, (list, tuple, Tensor)):
        raise TypeError(
            f"{op}: seeds is {checks.shown(seeds)}; it must be a sequence of ints, one for each layer, or None"
        )
    if seeds is not None and len(seeds) != len(layers):
        raise ValueError(f"{op}: {len(seeds)} seeds for {len(layers)} layers; there must be one for each")
    if p and seeds is None:
        seeds = torch.randint(2**63 - 1, (len(layers),), dtype=torch.int64)
    elif p:
        for seed in seeds:
            _check_seed(op, seed)
        seeds = torch.stack([torch.as_tensor(seed, dtype=torch.int64).cpu() for seed in seeds])
    else:
        seeds = torch.zeros(len(layers), dtype=torch.int64)
    return x, layers, seeds, dispatch.choose("lora", x, *(layer[0] for layer in layers))


def as_they_are(x):
    """Products inside in the dtype of their operands. Leaving autocast costs as much as a small product: only where it is."""
    is_autocast = checks.autocasts(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if is_autocast else contextlib.nullcontext()


def plain(layer, x):
    """The layer with a tensor of its own for an NF4Weight: what the reference differentiates."""
    weight, *rest = layer
    return dequantize_nf4(weight, x.dtype) if isinstance(weight, NF4Weight) else weight, *rest


def _layers(op, layers):
    wanted = "layers must be one or more of (weight, bias, lora_a, lora_b, scale[, magnitude])"
    if not isinstance(layers, (list, tuple)) or not layers:
        raise ValueError(f"{op}: {wanted}, and not {checks.shown(layers)}")
    found = []
    for layer in layers:
        if not isinstance(layer, (list, tuple)) or len(layer) not in (5, 6):
            raise ValueError(f"{op}: {wanted}, and one is {checks.shown(layer)}")
        weight, bias, lora_a, lora_b, scale, magnitude = *layer, *[None] * (6 - len(layer))
        checks.tensors(op, lora_a=lora_a, lora_b=lora_b)
        if not isinstance(weight, NF4Weight):
            checks.tensors(op, weight=weight)
        checks.optional_tensors(op, bias=bias, magnitude=magnitude)
        if not isinstance(scale, Tensor) or scale.numel() != 1:
            checks.numbers(op, scale=scale)
        found.append((weight, bias, lora_a, lora_b, float(scale), magnitude))
    return found


def _check_seed(op, seed):
    if not isinstance(seed, Tensor):
        checks.whole_numbers(op, seeds=seed)
    elif seed.numel() != 1 or seed.is_floating_point() or seed.is_complex():
        raise ValueError(f"{op}: seeds hold {list(seed.shape)} of {seed.dtype}; each must be one int")


def _check(op, x, columns, weight, bias, lora_a, lora_b, scale, magnitude):
    fits = len(weight.shape) == 2 and weight.shape[1] == columns and weight.device == x.device
    if not fits or (weight.dtype != x.dtype and not isinstance(weight, NF4Weight)):
        raise ValueError(
            f"{op}: weight is {list(weight.shape)} of {weight.dtype} on {weight.device}; for x {list(x.shape)} of "
            f"{x.dtype} it must be [out, {columns}] of {x.dtype} on {x.device}"
        )
    out = weight.shape[0]
    for name, t in (("bias", bias), ("magnitude", magnitude)):
        if t is not None and (t.shape != (out,) or not t.is_floating_point() or t.device != x.device):
            raise ValueError(
                f"{op}: {name} is {list(t.shape)} of {t.dtype} on {t.device}; it must be [{out}], floating, on {x.device}"
            )
    rank = lora_a.shape[0] if lora_a.dim() == 2 else 0
    for name, t, shape in (("lora_a", lora_a, (rank, columns)), ("lora_b", lora_b, (out, rank))):
        if rank == 0 or t.shape != shape or not t.is_floating_point() or t.device != x.device:
            raise ValueError(
                f"{op}: {name} is {list(t.shape)} of {t.dtype} on {t.device}; lora_a must be [r, {columns}] and lora_b "
                f"[{out}, r] with r at least 1, floating, on {x.device}"
            )
