"""Repairs bfloat16 in Triton's interpreter (TRITON_INTERPRET=1).

The interpreter keeps bfloat16 as raw 16-bit patterns and computes on those: tl.dot, +, -, *, tl.sum return garbage, and
float32 -> bfloat16 truncates (3.6.0, 3.7.1 and 3.9.0). `repair` makes it widen to float32, compute, and round to nearest
even, bit-exact with torch. Still wrong: tl.fma and tl.cumsum on bfloat16, float8 (widen first).
To be dropped once the interpreter of every supported Triton passes tests/kernels/test_interpreter.py without it.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}


def is_bf16(handle):
    return handle.dtype.scalar == tl.bfloat16


def widen(bits):
    """bfloat16 bit patterns (uint16) -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values):
    """float32 -> bfloat16 bit patterns (uint16), to nearest even, NaN kept."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def as_float32(handle):
    return TensorHandle(widen(handle.data), tl.float32) if is_bf16(handle) else handle


def repair():
    """Patches the interpreter of this process, once, before any kernel runs."""
    dot, cast, fp_to_fp = (
        InterpreterBuilder.create_dot,
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.create_fp_to_fp,
    )
    binary, unary, reduce = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op, ReduceOps.apply_impl

    def create_dot(self, a, b, d, *rest):
        return dot(self, as_float32(a), as_float32(b), d, *rest)

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if target == tl.bfloat16 and source != tl.bfloat16:
            return TensorHandle(narrow(src.data.astype(np.float32)), target)
        if source == tl.bfloat16 and target != tl.bfloat16:
            return TensorHandle(widen(src.data).astype(interpreter._get_np_dtype(dst_type)), target)
        return cast(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode=None):
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return fp_to_fp(self, src, dst_type, rounding_mode)

    def binary_op(self, lhs, rhs, op):
        if not is_bf16(lhs):
            return binary(self, lhs, rhs, op)
        result = binary(self, as_float32(lhs), as_float32(rhs), op)
        return result if op in COMPARISONS else TensorHandle(narrow(result.data), tl.bfloat16)

    def unary_op(self, arg, op):
        if not is_bf16(arg):
            return unary(self, arg, op)
        return TensorHandle(narrow(op(widen(arg.data))), tl.bfloat16)

    def get_bf16(self, value):
        return TensorHandle(narrow(np.array([value], np.float32)), tl.bfloat16)

    def reduce_impl(self, inputs):
        if not any(tensor.dtype.scalar == tl.bfloat16 for tensor in inputs):
            return reduce(self, inputs)
        results = reduce(self, tuple(retyped(tensor, as_float32(tensor.handle)) for tensor in inputs))
        results = results if isinstance(results, list | tuple) else (results,)
        return tuple(
            retyped(result, TensorHandle(narrow(result.handle.data), tl.bfloat16)) if is_bf16(tensor.handle) else result
            for tensor, result in zip(inputs, results, strict=True)
        )

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.unary_op = unary_op
    InterpreterBuilder.get_bf16 = get_bf16
    ReduceOps.apply_impl = reduce_impl


def retyped(tensor, handle):
    """A tensor of the interpreter like `tensor`, holding `handle`."""
    scalar = handle.dtype.scalar
    return tl.core.tensor(handle, tl.block_type(scalar, list(handle.data.shape)) if tensor.type.is_block() else scalar)
