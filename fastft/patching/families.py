"""Which architectures can be patched, and what their layers are called: a table."""

import importlib
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of transformers. Its classes are named `<prefix>Model`, `<prefix>RMSNorm` and so on."""

    prefix: str
    decoder: bool
    """causal; reads a sequence's class from its last token. Encoders see both sides and read the first token"""
    module: str | None = None
    """transformers.models.<module>, where that is not the architecture's own name"""
    names: dict[str, str] = field(default_factory=dict)
    """classes whose name does not follow: {"ForCausalLM": "LMHeadModel"}"""
    norm_offset: float | None = None
    """RMSNorm scales by offset + weight: 0 in Llama, 1 in Gemma. None: LayerNorm"""
    keeps_norm: str | None = None
    """why its RMSNorm stays as it is"""
    keeps_attention: str | None = None
    """why its attention stays as it is, and with it padded rows"""
    positions_follow_padding: bool = False
    """the first position is padding_idx + 1, not 0"""
    holds_dropout: tuple[str, str] = ("SelfAttention", "dropout")
    """the class of attention and its dropout that is never called, for it holds the probability alone"""
    layers: str = ""
    """of an encoder whose last layer can pass over all but the tokens that are read: path of the list of layers under the
    base model; the part of a layer that attends is `attention`. Empty: the pooling follows the whole encoder"""
    after_attention: str = ""
    """then the part of a layer that comes next, and adds the layer's input"""


def _decoder(prefix, **settings):
    return Family(prefix=prefix, decoder=True, **settings)


def _roberta(prefix):
    return Family(
        prefix=prefix,
        decoder=False,
        positions_follow_padding=True,
        layers="encoder.layer",
        after_attention="attention.output",
    )


RELATIVE = "it adds a bias or a product that depends on the distance of two tokens in their row"

FAMILIES = {
    "llama": _decoder("Llama", norm_offset=0.0),
    "mistral": _decoder("Mistral", norm_offset=0.0),
    "mixtral": _decoder("Mixtral", norm_offset=0.0),
    "qwen2": _decoder("Qwen2", norm_offset=0.0),
    "qwen3": _decoder("Qwen3", norm_offset=0.0),
    "qwen3_moe": _decoder("Qwen3Moe", norm_offset=0.0),
    "gemma2": _decoder("Gemma2", norm_offset=1.0),
    "gemma3_text": _decoder(
        "Gemma3",
        module="gemma3",
        norm_offset=1.0,
        names={"Model": "TextModel", "ForSequenceClassification": "TextForSequenceClassification"},
    ),
    "phi3": _decoder("Phi3", norm_offset=0.0),
    "olmo2": _decoder("Olmo2", norm_offset=0.0, keeps_norm="Olmo2RMSNorm rounds once, after the weight multiplied"),
    "gpt2": _decoder("GPT2", names={"ForCausalLM": "LMHeadModel"}, holds_dropout=("Attention", "attn_dropout")),
    "gpt_neox": _decoder("GPTNeoX"),
    "bert": Family(prefix="Bert", decoder=False, layers="encoder.layer", after_attention="attention.output"),
    "roberta": _roberta("Roberta"),
    "xlm-roberta": _roberta("XLMRoberta"),
    "distilbert": Family(
        prefix="DistilBert", decoder=False, layers="transformer.layer", after_attention="sa_layer_norm"
    ),
    "modernbert": Family(prefix="ModernBert", decoder=False),
    "deberta-v2": Family(prefix="DebertaV2", decoder=False, keeps_attention=RELATIVE),
    "t5": Family(prefix="T5", decoder=False, norm_offset=0.0, names={"RMSNorm": "LayerNorm"}, keeps_attention=RELATIVE),
}

GATES = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""activations of gated MLPs: what transformers calls them -> what fastft.ops.lora_mlp does"""

PACKED_HEADS = ("Model", "ForCausalLM", "ForMaskedLM", "ForTokenClassification", "ForSequenceClassification")
"""Tops that take packed rows: those that work token by token, and sequence classification with fastft's pooling."""


def family_of(config):
    return FAMILIES[config.model_type]


def first_position(config):
    """The position id of a sequence's first token."""
    return config.pad_token_id + 1 if family_of(config).positions_follow_padding else 0


def gate_of(config):
    """The activation of gated MLPs as fastft.ops.lora_mlp calls it, or None of one that it does not compute."""
    return GATES.get(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None))


def layer_class(config, name):
    """The class `<prefix><name>` of the architecture, or None where it has none of that name."""
    family = family_of(config)
    module = family.module or config.model_type.replace("-", "_")
    module = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    return getattr(module, family.prefix + family.names.get(name, name), None)


def why_unsupported(config):
    """Why models of this configuration cannot be patched, or None."""
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        return f"the architecture {model_type!r} is not one of those that fastft patches: {', '.join(FAMILIES)}"
    decoder = FAMILIES[model_type].decoder
    if getattr(config, "add_cross_attention", False) or not decoder and getattr(config, "is_decoder", False):
        return f"a {model_type} with is_decoder or add_cross_attention is not one of those that fastft patches"
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        return f"a {model_type} whose decoder is not causal is not one of those that fastft patches"
    return None


def why_not_packed(model):
    """Why a patched `model` cannot take packed rows, or None."""
    if type(model) in (layer_class(model.config, head) for head in PACKED_HEADS):
        return None
    return f"{type(model).__name__} reads positions of a padded row"
