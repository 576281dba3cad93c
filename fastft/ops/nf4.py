"""Weights in 4 bits: NF4 in bitsandbytes' format, and a linear layer of such a weight, which is frozen.

    quantize_nf4(weight)       a tensor as an NF4Weight: 4 bits an element, and 8 (or 32) a block of 64
    dequantize_nf4(weight)     the tensor again
    nf4_linear(x, weight)      y = x Wᵀ + b, W read from its 4 bits in forward and again in backward

What an op needs for a moment is read into one buffer, the same for all weights (`shared`): never are two layers there at
once. Saved for backward: the 4-bit weight itself, which is there anyway.
"""

import contextlib
import functools
import json
import math
import threading
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastft.ops import checks, dispatch
from fastft.ops.linear import native
from fastft_kernels.reference import nf4 as reference

BLOCK, NESTED_BLOCK = reference.BLOCK, reference.NESTED_BLOCK
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STATE = "quant_state.bitsandbytes__nf4"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _why_not(like):
    return None if like.dtype in _DTYPES else f"it computes float32, bfloat16 and float16, and not {like.dtype}"


_KERNELS = {"reference": reference} | dispatch.register("nf4", triton=_why_not, cpp=_why_not)


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A tensor of `shape` in 4 bits. Layout and equation: fastft_kernels/reference/nf4.py.

    codes: uint8, two elements a byte; absmax: float32 [blocks], or uint8 with double = (map, nested absmax, offset);
    dtype: of the tensor that was quantised. ValueError where they do not fit each other.
    """

    codes: Tensor
    absmax: Tensor
    shape: torch.Size
    dtype: torch.dtype
    block: int = BLOCK
    double: tuple | None = None

    def __post_init__(self):
        self._check_types()
        numel, blocks = self.numel, -(-self.numel // self.block)
        nested = -(-blocks // NESTED_BLOCK)
        wanted = [("codes", self.codes, torch.uint8, (numel + 1) // 2)]
        wanted.append(("absmax", self.absmax, torch.uint8 if self.double else torch.float32, blocks))
        if self.double:
            wanted.append(("nested_quant_map", self.double[0], torch.float32, 256))
            wanted.append(("nested_absmax", self.double[1], torch.float32, nested))
        if self.block not in BLOCKS:
            raise ValueError(f"NF4: blocksize is {self.block}; it must be one of {', '.join(map(str, BLOCKS))}")
        for name, t, dtype, size in wanted:
            if t.dtype != dtype or t.numel() != size or t.device != self.codes.device:
                raise ValueError(
                    f"NF4: {name} is {list(t.shape)} of {t.dtype} on {t.device}; the shape {list(self.shape)} in blocks "
                    f"of {self.block} with codes on {self.codes.device} needs {size} elements of {dtype} there"
                )

    def _check_types(self):
        checks.tensors("NF4Weight", codes=self.codes, absmax=self.absmax)
        checks.whole_numbers("NF4Weight", 1, block=self.block)
        if not isinstance(self.shape, (tuple, list)) or not all(isinstance(n, int) and n >= 0 for n in self.shape):
            raise TypeError(f"NF4Weight: shape is {checks.shown(self.shape)}; it must be sizes")
        if not isinstance(self.dtype, torch.dtype):
            raise TypeError(f"NF4Weight: dtype is {checks.shown(self.dtype)}; it must be a torch.dtype")
        if self.double is not None:
            if not isinstance(self.double, (tuple, list)) or len(self.double) != 3:
                raise TypeError(f"NF4Weight: double is {checks.shown(self.double)}; it must be (map, absmax, offset)")
            checks.tensors("NF4Weight", **{"double[0]": self.double[0], "double[1]": self.double[1]})
            checks.numbers("NF4Weight", **{"double[2]": self.double[2]})

    @property
    def numel(self):
        return math.prod(self.shape)

    @property
    def device(self):
        return self.codes.device

    def map(self, function):
        """The same weight with `function` applied to each of its tensors: to move or to copy it."""
        if not callable(function):
            raise TypeError(f"NF4Weight.map: function is {checks.shown(function)}; it must take a tensor and give one")
        double = self.double and (function(self.double[0]), function(self.double[1]), self.double[2])
        return replace(self, codes=function(self.codes), absmax=function(self.absmax), double=double)

    def state(self):
        """{name: tensor}: what bitsandbytes keeps beside `weight` in a safetensors file, under `weight.<name>`."""
        facts = {
            "quant_type": "nf4",
            "blocksize": self.block,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        tensors = {"absmax": self.absmax, "quant_map": reference.VALUES.to(self.device, copy=True)}
        if self.double:
            values, nested, offset = self.double
            tensors |= {"nested_absmax": nested, "nested_quant_map": values}
            facts |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        text = json.dumps(facts).encode()
        return {**tensors, STATE: torch.tensor(list(text), dtype=torch.uint8)}

    @classmethod
    def from_state(cls, codes, state):
        """The weight of a file: codes, and what `state` names. ValueError where it is not NF4, or does not fit."""
        checks.tensors("NF4Weight.from_state", codes=codes)
        if not isinstance(state, dict):
            raise TypeError(f"NF4Weight.from_state: state is {checks.shown(state)}; it must be a dict of tensors")
        if STATE not in state:
            kinds = [name.removeprefix("quant_state.") for name in state if name.startswith("quant_state.")]
            raise ValueError(
                f"NF4: {STATE} is missing; " + (f"{kinds[0]} cannot be read" if kinds else "no 4-bit weight")
            )
        try:
            facts = json.loads(bytes(state[STATE].tolist()))
            shape, block, dtype = torch.Size(facts["shape"]), int(facts["blocksize"]), getattr(torch, facts["dtype"])
            kind, double = facts["quant_type"], None
            if "nested_absmax" in state:
                double = state["nested_quant_map"], state["nested_absmax"].float(), float(facts["nested_offset"])
            nested_block = facts.get("nested_blocksize", NESTED_BLOCK)
            values, absmax = state["quant_map"].float().cpu(), state["absmax"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"NF4: {STATE} is damaged: {type(error).__name__}: {error}") from None
        if kind != "nf4" or not isinstance(dtype, torch.dtype) or nested_block != NESTED_BLOCK:
            raise ValueError(
                f"NF4: quant_type {kind}, dtype {facts['dtype']}, nested_blocksize {nested_block}: unknown"
            )
        if values.shape != (16,) or not torch.allclose(values, reference.VALUES, rtol=0, atol=1e-6):
            raise ValueError("NF4: quant_map does not hold the 16 values of NF4")
        return cls(codes, absmax if double else absmax.float(), shape, dtype, block, double)


@torch.no_grad()
def quantize_nf4(weight, *, block=BLOCK, double_quant=True):
    """The tensor as an NF4Weight. weight: any shape, float32, bfloat16 or float16. double_quant: absmax in 8 bits.

    Raises ValueError for NaN or infinity in it, another dtype or block.
    """
    checks.tensors("quantize_nf4", weight=weight)
    checks.whole_numbers("quantize_nf4", block=block)
    checks.flags("quantize_nf4", double_quant=double_quant)
    if weight.dtype not in _DTYPES or block not in BLOCKS:
        raise ValueError(
            f"quantize_nf4: weight is of {weight.dtype}, block is {block}; it must be float32, bfloat16 or float16, and "
            f"one of {', '.join(map(str, BLOCKS))}"
        )
    if weight.device.type == "meta":
        raise ValueError("quantize_nf4: the weight is on meta, where it has no values")
    codes, absmax = _KERNELS[dispatch.choose("nf4", weight)].quantize(weight, block)
    if not absmax.isfinite().all() or weight.isnan().any():  # a maximum may have passed over NaN
        raise ValueError(f"quantize_nf4: the weight {list(weight.shape)} holds NaN or infinity")
    double = None
    if double_quant:
        absmax, double = reference.quantize_absmax(absmax)
    return NF4Weight(codes[:, None], absmax, weight.shape, weight.dtype, block, double)


@torch.no_grad()
def dequantize_nf4(weight, dtype=None, *, out=None):
    """The tensor of an NF4Weight, in `dtype` (by default its own). out: contiguous memory for it. Not differentiable."""
    _check_weight("dequantize_nf4", weight)
    checks.optional_tensors("dequantize_nf4", out=out)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dequantize_nf4: dtype is {checks.shown(dtype)}; it must be a torch.dtype, or None")
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)
    elif (out.shape, out.device) != (weight.shape, weight.device) or not out.is_contiguous():
        raise ValueError(
            f"dequantize_nf4: out is {list(out.shape)} on {out.device}; it must be contiguous, {list(weight.shape)} on "
            f"{weight.device}"
        )
    flat = lambda t: t.contiguous().view(-1)
    _KERNELS[_backend(out)].dequantize(flat(weight.codes), flat(weight.absmax), weight.double, out, weight.block)
    return out


def _check_weight(op, weight):
    if not isinstance(weight, NF4Weight):
        raise TypeError(f"{op}: weight is {checks.shown(weight)}; it must be an NF4Weight")


def _backend(like):
    """The extension serves CUDA tensors too where nvcc built it."""
    on_gpu = like.device.type == "cuda" and "cpp" in _KERNELS and dispatch.requested() in ("auto", "cpp")
    if on_gpu and _can_run_cuda() and _why_not(like) is None:
        return "cpp"
    return dispatch.choose("nf4", like)


@functools.cache
def _can_run_cuda():
    return _KERNELS["cpp"].why_not_cuda() is None


_BUFFERS = {}  # of a CUDA stream, which is one queue for forward's thread and backward's
_THREAD = threading.local()  # of a thread, on the CPU


def shared(weight, dtype):
    """The weight in `dtype`, in the buffer that the next call of this thread (or CUDA stream) fills anew."""
    if weight.device.type == "cuda":
        buffers, key = _BUFFERS, (weight.device, torch.cuda.current_stream(weight.device).cuda_stream, dtype)
    else:
        buffers, key = _THREAD.__dict__, dtype
    if key not in buffers or buffers[key].numel() < weight.numel:
        buffers.pop(key, None)  # before the larger one is there
        with torch.inference_mode(False):
            buffers[key] = torch.empty(weight.numel, dtype=dtype, device=weight.device)
    return dequantize_nf4(weight, out=buffers[key][: weight.numel].view(weight.shape))


def dense(weight, dtype):
    """A frozen weight for a product in `dtype`: a tensor, or an NF4Weight, valid until the next one is asked for."""
    if not isinstance(weight, NF4Weight):
        return weight.to(dtype)
    return _dense_op(*_parts(weight), dtype) if torch.compiler.is_compiling() else shared(weight, dtype)


def product_dtype(x):
    """In which products of x are taken: float32 in half precision on a CPU without instructions for it."""
    return torch.float32 if x.device.type == "cpu" and not native(x.dtype) else x.dtype


def _forward(x, weight, bias):
    dtype = product_dtype(x)
    return F.linear(x.to(dtype), shared(weight, dtype), None if bias is None else bias.to(dtype)).to(x.dtype)


def _backward(dy, weight):
    dtype = product_dtype(dy)
    return (dy.to(dtype) @ shared(weight, dtype)).to(dy.dtype)


class _NF4Linear(torch.autograd.Function):
    """The eager path."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight, ctx.bias_dtype = weight, None if bias is None else bias.dtype
        return _forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        needs_dx, _, needs_dbias = ctx.needs_input_grad
        dbias = dy.flatten(0, -2).sum(0).to(ctx.bias_dtype) if needs_dbias else None
        return _backward(dy, ctx.weight) if needs_dx else None, None, dbias


# A custom op takes tensors and numbers: the parts of the weight, one by one.
@torch.library.custom_op("fastft::nf4_product", mutates_args=())
def _op(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    values: Tensor | None,
    nested: Tensor | None,
    offset: float,
    shape: list[int],
    block: int,
    transposed: bool,
) -> Tensor:
    weight = _joined(codes, absmax, values, nested, offset, shape, block)
    return _backward(x, weight) if transposed else _forward(x, weight, None)


@_op.register_fake
def _(x, codes, absmax, values, nested, offset, shape, block, transposed):
    return x.new_empty(*x.shape[:-1], shape[1] if transposed else shape[0])


def _setup_context(ctx, inputs, output):
    _, codes, absmax, values, nested, *ctx.numbers = inputs
    ctx.save_for_backward(codes, absmax, values, nested)


def _compiled_backward(ctx, dy):
    return _op(dy, *ctx.saved_tensors, *ctx.numbers[:-1], not ctx.numbers[-1]), *[None] * 8


_op.register_autograd(_compiled_backward, setup_context=_setup_context)


@torch.library.custom_op("fastft::nf4_dequantize", mutates_args=())
def _dense_op(
    codes: Tensor,
    absmax: Tensor,
    values: Tensor | None,
    nested: Tensor | None,
    offset: float,
    shape: list[int],
    block: int,
    dtype: torch.dtype,
) -> Tensor:
    return dequantize_nf4(_joined(codes, absmax, values, nested, offset, shape, block), dtype)


@_dense_op.register_fake
def _(codes, absmax, values, nested, offset, shape, block, dtype):
    return codes.new_empty(shape, dtype=dtype)


def _parts(weight):
    values, nested, offset = weight.double or (None, None, 0.0)
    return weight.codes, weight.absmax, values, nested, offset, list(weight.shape), weight.block


def _joined(codes, absmax, values, nested, offset, shape, block):
    double = None if values is None else (values, nested, offset)
    return NF4Weight(codes, absmax, torch.Size(shape), torch.float32, block, double)


def nf4_linear(x, weight, bias=None):
    """y = x Wᵀ + b for an NF4Weight of [out, in].

    x: [..., in] of a floating dtype, any strides; bias: [out] or None; y: [..., out] of x's dtype. Under autocast x is cast
    as in torch's linear. Differentiable once in x and bias (any number of times under fastft.backend("reference")).
    Raises ValueError for shapes, dtypes or devices that do not fit, BackendError where the backend asked for cannot serve.
    """
    _check_weight("nf4_linear", weight)
    checks.tensors("nf4_linear", x=x)
    checks.optional_tensors("nf4_linear", bias=bias)
    if checks.autocasts(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if len(weight.shape) != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1] or x.device != weight.device:
        raise ValueError(
            f"nf4_linear: x is {list(x.shape)} on {x.device}, the weight {list(weight.shape)} on {weight.device}; "
            "they must be [..., in] and [out, in] on one device"
        )
    if not x.is_floating_point() or (bias is not None and (bias.shape != weight.shape[:1] or bias.device != x.device)):
        shape = None if bias is None else list(bias.shape)
        raise ValueError(f"nf4_linear: x is of {x.dtype}, bias {shape}; x must be floating, bias [{weight.shape[0]}]")
    is_autocast = checks.autocasts(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if is_autocast else contextlib.nullcontext():
        if torch.compiler.is_compiling():
            y = _op(x, *_parts(weight), False)
            return y if bias is None else y + bias.to(y.dtype)
        if dispatch.requested() == "reference":
            dtype = product_dtype(x)
            bias = None if bias is None else bias.to(dtype)
            return F.linear(x.to(dtype), dequantize_nf4(weight, dtype), bias).to(x.dtype)
        return _NF4Linear.apply(x, weight, bias)
