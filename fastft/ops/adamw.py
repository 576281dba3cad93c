"""Optimizer steps over lists of tensors, in place, and the norm that clipping needs. `fastft.optim` calls them.

    adamw(...)        float32 moments            fastft_kernels.reference.adamw
    adamw8bit(...)    moments in 8 bits          fastft_kernels.reference.adamw8bit
    lion8bit(...)     one moment, in 8 bits
    global_norm(...)  of many tensors at once, accumulated in double

On CUDA, adamw is torch's fused kernel, one launch for all tensors already, also where Triton's kernels were asked for.
"""

import torch

from fastft.ops import dispatch
from fastft_kernels.reference import adamw as reference
from fastft_kernels.reference import adamw8bit as reference8bit

BLOCK = reference8bit.BLOCK
CODES = ("companded", "dynamic")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAPS = {}


def _why_not(*tensors):
    for t in tensors:
        if t.dtype not in (*_DTYPES, torch.uint8):
            return f"it computes float32, bfloat16 and float16, and not {t.dtype}"
    return None


_KERNELS = {"reference": reference} | dispatch.register("adamw", cpp=_why_not)
_KERNELS8 = {"reference": reference8bit} | dispatch.register("adamw8bit", triton=_why_not, cpp=_why_not)


def adamw(params, grads, masters, ms, vs, *, lr, betas, eps, weight_decay, step, grad_divisor=1.0):
    """One step of AdamW. masters: the float32 weights of low-precision params, or None where params are float32.

    grads: dense, or all of them coalesced sparse float32 tensors of rows; the C++ kernel reads those as they are.
    """
    if not params:
        return
    if params[0].device.type == "cuda" and dispatch.requested() in ("auto", "triton"):
        return _torch_fused(params, grads, masters, ms, vs, lr, betas, eps, weight_decay, step, grad_divisor)
    backend = dispatch.choose("adamw", params[0], grads[0])
    scalars = reference.scalars(lr, *betas, eps, weight_decay, step, grad_divisor)
    by_rows = grads[0].is_sparse and backend == "cpp"
    with _Contiguous(params, grads if by_rows else _dense_all(grads), masters) as (weights, grads, copies):
        kernels = _KERNELS[backend]
        (kernels.adamw_by_rows if by_rows else kernels.adamw)(weights, grads, copies, ms, vs, scalars)


def adamw8bit(params, grads, masters, states, *, lr, betas, eps, weight_decay, step, code, grad_divisor=1.0):
    """One step of 8-bit AdamW. states: (m codes, m absmax, v codes, v absmax), each a list."""
    if not params:
        return
    backend = _backend8(params[0], grads[0])
    scalars = reference.scalars(lr, *betas, eps, weight_decay, step, grad_divisor)
    with _Contiguous(params, _dense_all(grads), masters) as (weights, grads, copies):
        _KERNELS8[backend].adamw8bit(weights, grads, copies, *states, scalars, _maps(code, params[0].device))


def _backend8(param, grad):
    """The extension serves CUDA tensors too where nvcc built it: its own kernel, in one launch."""
    on_gpu = param.device.type == "cuda" and "cpp" in _KERNELS8 and dispatch.requested() in ("auto", "cpp")
    if on_gpu and _KERNELS8["cpp"].why_not_cuda() is None:
        return "cpp"
    return dispatch.choose("adamw8bit", param, grad)


def lion8bit(params, grads, masters, states, *, lr, betas, weight_decay, code, grad_divisor=1.0):
    """One step of 8-bit Lion. states: (m codes, m absmax), each a list."""
    if not params:
        return
    backend = _backend8(params[0], grads[0])
    beta1, beta2 = betas
    scalars = (1 / grad_divisor, 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, lr, 1.0, 0.0)
    with _Contiguous(params, _dense_all(grads), masters) as (weights, grads, copies):
        _KERNELS8[backend].lion8bit(weights, grads, copies, *states, scalars, _maps(code, params[0].device))


def lion(params, grads, masters, ms, *, lr, betas, weight_decay, grad_divisor=1.0):
    """One step of Lion with a float32 moment, in plain PyTorch: for the small tensors of groups that keep float32 state.

    As in 8 bits, an element whose gradient is not finite stays as it is: the sign of a NaN moment is 0, and it would never
    move again.
    """
    for i, p in enumerate(params):
        w, m, g = p if masters is None else masters[i], ms[i], grads[i].to_dense().float() / grad_divisor
        sign, moment = (m * betas[0] + g * (1 - betas[0])).sign(), m * betas[1] + g * (1 - betas[1])
        good = moment.isfinite()
        w.copy_(torch.where(good, w * (1 - lr * weight_decay) - lr * sign, w))
        m.copy_(torch.where(good, moment, m))
        if masters is not None:
            p.copy_(w)


def quantize8(x, *, signed, code):
    """(codes [blocks, 256] uint8, absmax [blocks]) of a float32 tensor. ValueError where it holds NaN or infinity."""
    if not torch.isfinite(x).all() or not (signed or (x >= 0).all()):
        raise ValueError(f"quantize8: x must be finite{'' if signed else ' and not negative'}")
    kernel = _KERNELS8[dispatch.choose("adamw8bit", x)]
    return kernel.quantize(x.float(), signed, _maps(code, x.device))


def dequantize8(codes, absmax, numel, *, signed, code):
    """The float32 values of codes."""
    kernel = _KERNELS8[dispatch.choose("adamw8bit", codes)]
    return kernel.dequantize(codes, absmax, numel, signed, _maps(code, codes.device))


def global_norm(tensors):
    """The Euclidean norm of all elements of all tensors, a 0-d float64 tensor. One pass; the tensors may differ in dtype.

    A sparse tensor is coalesced.
    """
    by_dtype = {}
    for t in tensors:
        t = t._values() if t.is_sparse else t
        by_dtype.setdefault(t.dtype, []).append(t if _dense(t) else t.contiguous())
    total = torch.zeros((), dtype=torch.float64, device=tensors[0].device if tensors else None)
    for group in by_dtype.values():
        if group[0].device.type == "cuda":
            norms = torch._foreach_norm(group, 2, dtype=torch.float32)
            total += torch.stack(norms).double().square().sum()
        else:
            total += _KERNELS[dispatch.choose("adamw", group[0])].square_sum(group)
    return total.sqrt()


def _dense_all(grads):
    return [g.to_dense() if g.is_sparse else g for g in grads]


def _dense(t):
    """Whether the elements of t fill one piece of memory, in whatever order."""
    return t.is_contiguous() or (t.dim() > 1 and t.mT.is_contiguous())


class _Contiguous:
    """Context: (weights, gradients, copies) that kernels can take; parameters of another layout are copied back at its end."""

    def __init__(self, params, grads, masters):
        self.params, self.grads = params, [g if g.is_sparse or g.is_contiguous() else g.contiguous() for g in grads]
        self.dense = [p if p.is_contiguous() else p.contiguous() for p in params]
        self.masters = masters

    def __enter__(self):
        if self.masters is None:
            return self.dense, self.grads, [None] * len(self.dense)
        return self.masters, self.grads, self.dense

    def __exit__(self, *error):
        for p, dense in zip(self.params, self.dense, strict=True):
            if p is not dense:
                p.copy_(dense)


def _maps(code, device):
    """The table of a code map on a device; None for the arithmetic one."""
    if code == "companded":
        return None
    if device not in _MAPS:
        _MAPS[device] = reference8bit.dynamic_maps().to(device)
    return _MAPS[device]


def _torch_fused(params, grads, masters, ms, vs, lr, betas, eps, weight_decay, step, grad_divisor):
    device = params[0].device
    weights = params if masters is None else masters
    torch._fused_adamw_(
        weights,
        [g.to_dense().float() for g in grads],
        ms,
        vs,
        [],
        [torch.full((), float(step), device=device)] * len(weights),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=None if grad_divisor == 1.0 else torch.full((), grad_divisor, device=device),
    )
    if masters is not None:
        torch._foreach_copy_(params, masters)
