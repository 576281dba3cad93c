"""Which architectures can be patched, and what their layers are called: a table."""

import importlib
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of transformers. Its classes are named `<prefix>Model`, `<prefix>RMSNorm` and so on."""

    prefix: str
    decoder: bool
    """causal; reads a sequence's class from its last token. Encoders see both sides and read the first token"""
    rms_norm: bool = False
    positions_follow_padding: bool = False
    """the first position is padding_idx + 1, not 0"""
    layers: str = ""
    """of an encoder: path of the list of layers under the base model; the part of a layer that attends is `attention`"""
    after_attention: str = ""
    """of an encoder: the part of a layer that comes next, and adds the layer's input"""


FAMILIES = {
    "llama": Family(prefix="Llama", decoder=True, rms_norm=True),
    "mistral": Family(prefix="Mistral", decoder=True, rms_norm=True),
    "qwen2": Family(prefix="Qwen2", decoder=True, rms_norm=True),
    "qwen3": Family(prefix="Qwen3", decoder=True, rms_norm=True),
    "bert": Family(prefix="Bert", decoder=False, layers="encoder.layer", after_attention="attention.output"),
    "roberta": Family(
        prefix="Roberta",
        decoder=False,
        positions_follow_padding=True,
        layers="encoder.layer",
        after_attention="attention.output",
    ),
    "distilbert": Family(
        prefix="DistilBert", decoder=False, layers="transformer.layer", after_attention="sa_layer_norm"
    ),
}

PACKED_HEADS = ("Model", "ForCausalLM", "ForMaskedLM", "ForTokenClassification", "ForSequenceClassification")
"""Tops that take packed rows: those that work token by token, and sequence classification with fastft's pooling."""


def family_of(config):
    return FAMILIES[config.model_type]


def first_position(config):
    """The position id of a sequence's first token."""
    return config.pad_token_id + 1 if family_of(config).positions_follow_padding else 0


def layer_class(config, name):
    """The class `<prefix><name>` of the architecture, or None where it has none of that name."""
    module = importlib.import_module(f"transformers.models.{config.model_type}.modeling_{config.model_type}")
    return getattr(module, family_of(config).prefix + name, None)


def why_unsupported(config):
    """Why models of this configuration cannot be patched, or None."""
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        return f"the architecture {model_type!r} is not one of those that fastft patches: {', '.join(FAMILIES)}"
    if not FAMILIES[model_type].decoder and (
        getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False)
    ):
        return f"a {model_type} with is_decoder or add_cross_attention is not one of those that fastft patches"
    if not getattr(config, "is_causal", True):
        return f"a {model_type} with is_causal=False is not one of those that fastft patches"
    return None


def why_not_packed(model):
    """Why a patched `model` cannot take packed rows, or None."""
    if type(model) in (layer_class(model.config, head) for head in PACKED_HEADS):
        return None
    return f"{type(model).__name__} reads positions of a padded row"
