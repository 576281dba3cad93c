"""Role `lora`: PEFT's lora.Linear, over whole weights or 4 bits, LoRA or DoRA, through fastft.ops.lora_*: alone, as q, k
and v of attention, or as a gated MLP.

PEFT may add, switch, merge or disable adapters at any time, so each call looks at the state of its layer; what the ops do
not compute goes to the layer's own forward. Parameters are read as attributes inside a module's __call__ and saved as the
Parameters they are, which is what ZeRO-3 needs to gather them. Where a backend was asked for, an update that it would not
compute is an error that names the layer.
"""

import sys

import torch
from torch import nn

from fastft import ops
from fastft.nn import Linear4bit
from fastft.ops import dispatch
from fastft.patching.families import gate_of, layer_class

QKV = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))
"""What the three layers that read the hidden states are called in attention."""


def find(inner):
    """{name: module} of the layers that hold a LoRA adapter, of any kind."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.lora.layer import LoraLayer

    return {name: module for name, module in inner.named_modules() if isinstance(module, LoraLayer)}


def kept(inner):
    """{name: why the layer computes as PEFT does}, in the state that it is in."""
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    reasons = {}
    for name, module in find(inner).items():
        reason = "an adapter on the output embedding" if module is head else _why_not_class(module) or why_not(module)
        if reason is not None:
            reasons[name] = reason
    return reasons


def replaceable(inner):
    """([lora.Linear ...], [gated MLPs of such ...], [attentions with q, k and v of such ...]): whose forward can be bound."""
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    linears = [m for m in find(inner).values() if _why_not_class(m) is None and m is not head]
    MLP = layer_class(inner.config, "MLP")
    parts = lambda m: [getattr(m, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    mlps = [m for m in inner.modules() if type(m) is MLP] if gate_of(inner.config) and linears else []
    ours = set(linears)
    attentions = [m for m in inner.modules() if ours.issuperset(_qkv(m))] if linears else []
    return linears, [m for m in mlps if all(part in ours for part in parts(m))], attentions


def check_forced(inner, not_served):
    """Raises BackendError where a backend was asked for and some layer's update would be computed by PEFT.

    not_served: why the backend has no kernel for LoRA layers at all, or None.
    """
    name, layers = dispatch.requested(), find(inner)
    if name not in ("triton", "cpp"):
        return
    reasons = {n: reason for n, reason in kept(inner).items() if not _has_no_update(layers[n])}
    if not_served is not None:
        reasons = {n: not_served for n, layer in layers.items() if not _has_no_update(layer)}
    if reasons:
        layer, reason = next(iter(reasons.items()))
        raise dispatch.BackendError(
            f"lora: backend {name!r} was asked for but cannot serve {len(reasons)} layers, first {layer}: {reason}"
        )


def linear(self, x, *args, **kwargs):
    ready = self.__dict__.pop("fastft_ready", None)
    if ready is not None and ready[0] is x:
        return ready[1]
    reason = "it was called with arguments of PEFT's own" if args or kwargs else _why_not_served(x, self)
    if reason is None:
        return ops.lora_linear(x, *_parameters(self), dropout_p=_dropout(self))
    if dispatch.requested() in ("triton", "cpp") and not _has_no_update(self):
        raise dispatch.BackendError(
            f"lora: backend {dispatch.requested()!r} was asked for but cannot serve {self.fastft_name}: {reason}"
        )
    return type(self).forward(self, x, *args, **kwargs)


def attention(self, hidden_states, *args, **kwargs):
    """Forward of attention: q, k and v are computed together, with a mask each, and handed to the layers that are asked."""
    layers = [getattr(self, name) for name in _qkv_names(self)]
    forward = self.__dict__.get("fastft_rotating", type(self).forward)
    # ZeRO-3 has a dictionary of its own there, and would hold the weights of a layer that is called but does not compute.
    is_sharded = any(type(getattr(layer, "base_layer", layer)._parameters) is not dict for layer in layers)
    p = None if is_sharded else _shared_dropout(hidden_states, layers)
    if p is None:
        return forward(self, hidden_states, *args, **kwargs)
    ys = ops.lora_group(hidden_states, [_parameters(layer) for layer in layers], dropout_p=p)
    for layer, y in zip(layers, ys, strict=True):
        layer.__dict__["fastft_ready"] = hidden_states, y
    try:
        return forward(self, hidden_states, *args, **kwargs)
    finally:  # else they would be kept where something interrupts, as activation checkpointing does
        for layer in layers:
            layer.__dict__.pop("fastft_ready", None)


def mlp(self, x):
    layers = self.gate_proj, self.up_proj, self.down_proj
    p = _shared_dropout(x, layers)
    if p is None:
        return type(self).forward(self, x)
    return ops.lora_mlp(x, *map(_parameters, layers), activation=gate_of(self.config), dropout_p=p)


def why_not(layer):
    """Why a lora.Linear cannot take the fast path in its present state, or None."""
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapter is merged into the weight"
    active = _active(layer)
    if len(active) != 1:
        return f"{len(active)} of its adapters are active"
    name = active[0]
    if name in layer.lora_variant and not _is_dora(layer, name):
        return f"its adapter is a variant, {type(layer.lora_variant[name]).__name__}"
    if layer.ephemeral_gpu_offload:
        return "its adapter is kept on the CPU (ephemeral_gpu_offload)"
    if layer.lora_bias.get(name):
        return "its adapter has a bias (lora_bias)"
    if type(layer.lora_dropout[name]) not in (nn.Identity, nn.Dropout):
        return f"its dropout is a {type(layer.lora_dropout[name]).__name__}"
    if not layer.cast_input_dtype_enabled:
        return "the cast of its input is disabled"
    return None


def _why_not_class(layer):
    from peft.tuners.lora.layer import Linear

    if type(layer) is not Linear:
        return f"a PEFT layer of class {type(layer).__name__}"
    if type(layer.base_layer) not in (nn.Linear, Linear4bit) or layer.fan_in_fan_out:
        return f"an adapter on a {type(layer.base_layer).__name__}"
    return None


def _has_no_update(layer):
    """Whether the layer is its frozen base alone: nothing of LoRA is left to compute."""
    held = {*layer.lora_A, *layer.lora_embedding_A}
    return layer.disable_adapters or bool(layer.merged) or held.isdisjoint(layer.active_adapters)


def _why_not_served(x, layer):
    """Why `x` goes through the layer's own forward, or None."""
    reason, base = why_not(layer), layer.base_layer
    if reason is not None or isinstance(base, Linear4bit) or torch.is_autocast_enabled(x.device.type):
        return reason
    return None if base.weight.dtype == x.dtype else f"its input is {x.dtype} and its weight {base.weight.dtype}"


def _shared_dropout(x, layers):
    """The dropout of layers that can be computed as a group; None where they cannot."""
    if any(_why_not_served(x, layer) is not None or is_watched(layer) for layer in layers):
        return None
    first, *others = map(_dropout, layers)
    return first if all(p == first for p in others) else None


def _qkv_names(module):
    return next((names for names in QKV if all(name in module._modules for name in names)), None)


def _qkv(module):
    """The layers of q, k and v, or [None]."""
    names = _qkv_names(module)
    return [None] if names is None else [module._modules[name] for name in names]


def _active(layer):
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _is_dora(layer, name):
    from peft.tuners.lora.dora import DoraLinearLayer
    from peft.tuners.lora.variants import DoraLinearVariant

    holder = layer.lora_magnitude_vector[name] if name in layer.lora_magnitude_vector else None
    return type(layer.lora_variant[name]) is DoraLinearVariant and type(holder) is DoraLinearLayer


def _parameters(layer):
    name = _active(layer)[0]
    base = layer.base_layer
    weight = base.quantized if isinstance(base, Linear4bit) else base.weight
    magnitude = layer.lora_magnitude_vector[name].weight if name in layer.lora_variant else None
    return weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], magnitude


def _dropout(layer):
    dropout = layer.lora_dropout[_active(layer)[0]]
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def is_watched(layer):
    """Whether somebody other than DeepSpeed, whose hooks follow parameters wherever they are read, has hooks on it."""
    hooks = (*layer._forward_pre_hooks.values(), *layer._forward_hooks.values(), *layer._backward_hooks.values())
    return any(not getattr(hook, "__module__", "").startswith("deepspeed.") for hook in hooks)
