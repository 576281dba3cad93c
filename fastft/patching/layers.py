"""Roles `norm`, `dropout` and `linear`: forwards that are bound to single layers in place of their class's own."""

from types import MethodType

from torch import nn

from fastft import ops


def bind(modules, forward):
    """Gives each module this forward, of any role; returns their number."""
    for module in modules:
        module.forward = MethodType(forward, module)
    return len(modules)


def rms_norm(self, hidden_states):
    return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def gemma_norm(self, hidden_states):
    return ops.rms_norm(hidden_states, self.weight, self.eps, offset=1.0)


def layer_norm(self, input):
    return ops.layer_norm(input, self.weight, self.bias, self.eps)


def add_and_norm(self, hidden_states, input_tensor):
    """The end of a BERT block, LayerNorm(input + dropout(dense(hidden))), behind its product in one pass."""
    norm, p = self.LayerNorm, self.dropout.p if self.dropout.training else 0.0
    hidden_states = self.dense(hidden_states)
    # PEFT may have put a layer of its own around the norm; under autocast the dtypes differ.
    if type(norm) is not nn.LayerNorm or hidden_states.dtype != input_tensor.dtype or p >= 1:
        return norm(self.dropout(hidden_states) + input_tensor)
    y, _ = ops.layer_norm(hidden_states, norm.weight, norm.bias, norm.eps, residual=input_tensor, dropout_p=p)
    return y


def dropout(self, input):
    if self.inplace or not self.training:
        return type(self).forward(self, input)
    return ops.dropout(input, self.p)


def linear(self, input):
    return ops.linear(input, self.weight, self.bias)
