"""Roles `norm`, `dropout` and `linear`: forwards that are bound to single layers in place of their class's own."""

from fastft import ops


def rms_norm(self, hidden_states):
    return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def gemma_norm(self, hidden_states):
    return ops.rms_norm(hidden_states, self.weight, self.eps, offset=1.0)


def dropout(self, input):
    if self.inplace or not self.training:
        return type(self).forward(self, input)
    return ops.dropout(input, self.p)


def linear(self, input):
    return ops.linear(input, self.weight, self.bias)
