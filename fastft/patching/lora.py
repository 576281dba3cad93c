"""Role `lora`: PEFT's lora.Linear, and gated MLPs whose three layers are such, through fastft.ops.lora_*.

PEFT may add, switch, merge or disable adapters at any time, so each call looks at the state of its layer; what the ops do
not compute goes to the layer's own forward. Parameters are read as attributes inside a module's __call__ and saved as the
Parameters they are, which is what ZeRO-3 needs to gather them.
"""

import sys

import torch
from torch import nn

from fastft import ops
from fastft.ops import dispatch
from fastft.patching.families import layer_class


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
    """([lora.Linear ...], [gated MLPs of such ...]): those whose forward can be bound."""
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    linears = [m for m in find(inner).values() if _why_not_class(m) is None and m is not head]
    MLP = layer_class(inner.config, "MLP")
    parts = lambda m: [getattr(m, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    is_silu = getattr(inner.config, "hidden_act", None) == "silu"
    mlps = [m for m in inner.modules() if type(m) is MLP] if is_silu and linears else []
    return linears, [m for m in mlps if all(part in linears for part in parts(m))]


def check_forced(inner):
    """Raises BackendError where a backend was asked for and some layer would compute as PEFT does."""
    name, reasons = dispatch.requested(), kept(inner)
    if name in ("triton", "cpp") and reasons:
        layer, reason = next(iter(reasons.items()))
        raise dispatch.BackendError(
            f"lora: backend {name!r} was asked for but cannot serve {len(reasons)} layers, first {layer}: {reason}"
        )


def linear(self, x, *args, **kwargs):
    if args or kwargs or not _serves(x, self):
        return type(self).forward(self, x, *args, **kwargs)
    return ops.lora_linear(x, *_parameters(self), dropout_p=_dropout(self))


def mlp(self, x):
    layers = self.gate_proj, self.up_proj, self.down_proj
    p = _dropout(layers[0]) if _serves(x, *layers) else None
    if p is None or any(_dropout(layer) != p for layer in layers) or any(map(is_watched, layers)):
        return type(self).forward(self, x)
    return ops.lora_mlp(x, *map(_parameters, layers), dropout_p=p)


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
    if name in layer.lora_variant:
        return f"its adapter is a variant, {type(layer.lora_variant[name]).__name__}"
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
    if type(layer.base_layer) is not nn.Linear or layer.fan_in_fan_out:
        return f"an adapter on a {type(layer.base_layer).__name__}"
    return None


def _serves(x, *layers):
    if any(why_not(layer) is not None for layer in layers):
        return False
    if torch.is_autocast_enabled(x.device.type):
        return True
    return all(layer.base_layer.weight.dtype == x.dtype for layer in layers)


def _active(layer):
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _parameters(layer):
    name = _active(layer)[0]
    base = layer.base_layer
    return base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


def _dropout(layer):
    dropout = layer.lora_dropout[_active(layer)[0]]
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def is_watched(layer):
    """Whether somebody other than DeepSpeed, whose hooks follow parameters wherever they are read, has hooks on it."""
    hooks = (*layer._forward_pre_hooks.values(), *layer._forward_hooks.values(), *layer._backward_hooks.values())
    return any(not getattr(hook, "__module__", "").startswith("deepspeed.") for hook in hooks)
