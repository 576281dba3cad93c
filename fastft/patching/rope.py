"""Role `rope`: fastft.ops.rope in place of transformers' apply_rotary_pos_emb, in single attention layers.

An attention layer calls the function by its name, from among the globals of the file that defines its class. So the layer
gets its own class's forward, the same code, with globals in which that name means `rotate`: nothing of transformers is
copied or changed, and what the name stands for elsewhere stays.
"""

import sys
import types

from fastft import ops
from fastft.patching.families import layer_class

_NAME = "apply_rotary_pos_emb"


def rotate(q, k, cos, sin, unsqueeze_dim=1):
    return ops.rope(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)


def find(inner):
    """The attention layers that rotate queries and keys: none in a model that knows positions by other means."""
    Attention = layer_class(inner.config, "Attention")
    if Attention is None or not _calls(Attention.forward):
        return []
    return [m for m in inner.modules() if type(m) is Attention]


def why_kept(inner):
    """Why layers that rotate keep transformers' function, or None."""
    Attention = layer_class(inner.config, "Attention")
    if Attention is None or not hasattr(sys.modules[Attention.__module__], _NAME) or _calls(Attention.forward):
        return None
    return f"{Attention.__name__}.forward does not itself call {_NAME}"


def _calls(forward):
    return isinstance(forward, types.FunctionType) and _NAME in forward.__code__.co_names


def forward_of(Attention):
    """The forward of the class, calling `rotate`."""
    original = Attention.forward
    scope = {**original.__globals__, _NAME: rotate}
    del scope["__name__"]  # by which torch.compile would look names up in transformers' module instead
    forward = types.FunctionType(
        original.__code__, scope, original.__name__, original.__defaults__, original.__closure__
    )
    forward.__kwdefaults__ = original.__kwdefaults__
    forward.__qualname__, forward.__doc__ = original.__qualname__, original.__doc__
    forward.__annotations__ = original.__annotations__
    forward.__module__ = __name__
    return forward
