"""Role `mlp`: the activation of an MLP, gated by a second projection or behind the bias of the first, in one pass.

    gated    down(act(gate(x)) * up(x)), with SiLU or GELU         Llama and its kin, Phi-3, Gemma, ModernBERT
    plain    down(gelu(up(x) + bias))                              BERT and its kin, GPT-2, GPT-NeoX

Of a plain MLP the first product is taken without its bias, which the activation then adds. That happens in the product's
own forward, which gets an argument for it, so that ZeRO-3 gathers weight and bias there. Where PEFT has put an adapter
around the product, or somebody watches its output by a hook, it computes as it would, and the activation alone is fused.
"""

import sys

from torch import nn
from transformers import activations
from transformers.pytorch_utils import Conv1D, apply_chunking_to_forward

from fastft import ops
from fastft.patching.families import gate_of, layer_class
from fastft.patching.layers import bind
from fastft.patching.lora import is_watched

APPROXIMATIONS = {  # transformers has five ways to write two functions
    activations.GELUActivation: "none",
    activations.NewGELUActivation: "tanh",
    activations.GELUTanh: "tanh",
    activations.FastGELUActivation: "tanh",
    activations.AccurateGELUActivation: "tanh",
}


def gated(self, x):
    return self.down_proj(_gate(self.config, self.gate_proj(x), self.up_proj(x)))


def phi3(self, hidden_states):
    return self.down_proj(_gate(self.config, *self.gate_up_proj(hidden_states).chunk(2, dim=-1)))


def modernbert(self, hidden_states):
    gate, up = self.Wi(hidden_states).chunk(2, dim=-1)
    return self.Wo(self.drop(ops.geglu(gate, up, approximate=approximation(self.act))))


def product(self, input, approximate=None):
    """Forward of the first product: x W + b, or with `approximate` gelu(x W + b)."""
    is_linear = isinstance(self, nn.Linear)
    if approximate is None:
        return ops.linear(input, self.weight, self.bias) if is_linear else type(self).forward(self, input)
    weight = self.weight if is_linear else self.weight.t()
    return ops.gelu(ops.linear(input, weight), self.bias, approximate=approximate)


def intermediate(self, hidden_states):
    return _activated(self.dense, self.intermediate_act_fn, hidden_states)


def gpt2(self, hidden_states):
    return self.dropout(self.c_proj(_activated(self.c_fc, self.act, hidden_states)))


def gpt_neox(self, hidden_states):
    return self.dense_4h_to_h(_activated(self.dense_h_to_4h, self.act, hidden_states))


def distilbert(self, input):
    chunk = lambda x: self.dropout(self.lin2(_activated(self.lin1, self.activation, x)))
    if self.chunk_size_feed_forward == 0:  # torch.compile cannot look through the chunking
        return chunk(input)
    return apply_chunking_to_forward(chunk, self.chunk_size_feed_forward, self.seq_len_dim, input)


INTERMEDIATE = ("Intermediate", "dense", "intermediate_act_fn", intermediate)
PLAIN = {
    "bert": INTERMEDIATE,
    "roberta": INTERMEDIATE,
    "xlm-roberta": INTERMEDIATE,
    "deberta-v2": INTERMEDIATE,
    "gpt2": ("MLP", "c_fc", "act", gpt2),
    "gpt_neox": ("MLP", "dense_h_to_4h", "act", gpt_neox),
    "distilbert": ("FFN", "lin1", "activation", distilbert),
}
"""model type -> class of the MLP, its first product and its activation, and the forward that replaces its own"""


def op(inner):
    """The op that would serve the MLPs of this model."""
    return "gelu" if inner.config.model_type in PLAIN else "gated_activation"


def why_kept(inner):
    """Why the MLPs of this model stay as they are, or None."""
    model_type = inner.config.model_type
    if model_type == "t5":
        return "its activation, mostly ReLU, has a dropout and a cast behind it"
    if model_type in PLAIN:
        _, _, act, _ = PLAIN[model_type]
        unknown = [getattr(m, act) for m in _plain(inner) if approximation(getattr(m, act)) is None]
        return f"its activation is {type(unknown[0]).__name__}" if unknown else None
    mlps = _gated(inner)
    if not mlps:
        return "its experts lie in stacked weights"
    act = getattr(mlps[0], "act", None) or getattr(mlps[0], "act_fn", None) or mlps[0].activation_fn
    is_known = approximation(act) is not None if model_type == "modernbert" else gate_of(inner.config) is not None
    return None if is_known else f"its activation is {type(act).__name__}"


def replace(model, inner):
    """Binds the forwards; returns how many MLPs were replaced."""
    config = inner.config
    if config.model_type in PLAIN:
        _, name, _, forward = PLAIN[config.model_type]
        mlps = _plain(inner)
        for first in [getattr(m, name) for m in mlps]:
            first = first.get_base_layer() if hasattr(first, "get_base_layer") else first
            if type(first) in (nn.Linear, Conv1D) and "forward" not in first.__dict__:
                bind([first], product)
                first.fastft_activates = True
        return bind(mlps, forward)
    forward = {"modernbert": modernbert, "phi3": phi3}.get(config.model_type, gated)
    return bind([m for m in _gated(inner) if "forward" not in m.__dict__], forward)


def approximation(activation):
    """ "none" or "tanh" of a module that computes GELU, as torch.nn.functional.gelu calls them; None of another."""
    if type(activation) is nn.GELU:
        return activation.approximate
    return APPROXIMATIONS.get(type(activation))


def _gate(config, gate, up):
    return ops.swiglu(gate, up) if gate_of(config) == "silu" else ops.geglu(gate, up, approximate="tanh")


def _activated(first, activation, x):
    """activation(first(x)): in one pass behind a product without bias, where `first` is the layer that was bound."""
    approximate = approximation(activation)
    if approximate is None:
        return activation(first(x))
    if type(first) in (nn.Linear, Conv1D) and hasattr(first, "fastft_activates") and not is_watched(first):
        return first(x, approximate=approximate)
    return ops.gelu(first(x), approximate=approximate)


def _gated(inner):
    MLP = layer_class(inner.config, "MLP")
    return [m for m in inner.modules() if type(m) is MLP]


def _plain(inner):
    name = PLAIN[inner.config.model_type][0]
    MLP = layer_class(inner.config, name) or getattr(sys.modules[type(inner).__module__], name)
    return [m for m in inner.modules() if type(m) is MLP]
