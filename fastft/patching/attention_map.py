"""Which tokens a model looks at: the attention probabilities of one head for one sample, which a fused kernel hides.

The sample runs once more through the model's own eager attention, whose probabilities are read off on the way.
"""

import struct
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from fastft.ops import checks
from fastft.patching import _unwrap, why_not
from fastft.patching.families import family_of

_NAME = "fastft_attention_map"

_reading = None  # the _Reader of the attention map that is being made


class _Reader:
    """Keeps the probabilities that one layer computes; layers call in their order."""

    def __init__(self, layer):
        self.layer = layer
        self.calls = 0
        self.probabilities = None

    def __call__(self, module, *args, **kwargs):
        eager = sys.modules[type(module).__module__].eager_attention_forward
        out, probabilities = eager(module, *args, **kwargs)
        if self.calls == self.layer:
            self.probabilities = probabilities
        self.calls += 1
        return out, None


def _read(module, *args, **kwargs):
    return _reading(module, *args, **kwargs)


AttentionInterface.register(_NAME, _read)
AttentionMaskInterface.register(_NAME, eager_mask)


def attention_map(model, inputs, layer, head, path=None):
    """The probabilities [S, S] with which each token (row) of one sample attends to each (column), float32 on the CPU.

    model    a transformers or PEFT model, patched or not, of an architecture whose attention fastft.patch replaces
    inputs   what the tokenizer returns for one sample, with return_tensors="pt", or its input_ids, [S] or [1, S]
    layer    counts from 0, or from the end if negative; head likewise
    path     also draw a PNG there: a row per token, the darker the more it attends

    Computed as in evaluation, without dropout and gradients, whatever mode the model is in; the model is left as it was.
    Padding is left out. Raises ValueError for more than one sample, and for a layer, head or model that does not fit.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"attention_map: model is {checks.shown(model)}; it must be a transformers or PEFT model")
    inner = _unwrap(model)
    reason = why_not(inner) if "_fastft_patch" not in inner.__dict__ else None
    if reason is not None:
        raise ValueError(f"attention_map: {reason}")
    kept = family_of(inner.config).keeps_attention
    if kept is not None:
        raise ValueError(f"attention_map: {inner.config.model_type} has an attention of its own: {kept}")
    layer = _index("layer", layer, inner.config.num_hidden_layers)
    head = _index("head", head, inner.config.num_attention_heads)
    inputs, real = _one_sample(inputs, inner.device)
    probabilities = _run(model, inner, inputs, layer)[0, head].float().cpu()
    if real is not None:
        probabilities = probabilities[real][:, real]
    if path is not None:
        Path(path).write_bytes(_png(probabilities))
    return probabilities


def _index(name, index, count):
    checks.whole_numbers("attention_map", **{name: index})
    if not -count <= index < count:
        raise ValueError(f"attention_map: {name} {index}: the model has {count}, from 0 to {count - 1}")
    return index % count


def _one_sample(inputs, device):
    """(inputs of one sample on `device`, bool [S] of its real tokens or None where all are)."""
    if isinstance(inputs, torch.Tensor):
        inputs = {"input_ids": inputs}
    if not isinstance(inputs, Mapping):
        raise TypeError(
            f"attention_map: inputs is {checks.shown(inputs)}; it must be what the tokenizer returns, or input_ids"
        )
    if any(x.is_meta for x in inputs.values() if isinstance(x, torch.Tensor)):
        raise ValueError("attention_map: inputs are on meta, which holds no numbers")
    inputs = {name: x.to(device) for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    inputs.pop("labels", None)
    if "input_ids" not in inputs:
        raise ValueError(f"attention_map: inputs have {', '.join(inputs) or 'no tensors'}: input_ids are missing")
    ids = inputs["input_ids"]
    if ids.dtype not in (torch.int64, torch.int32) or ids.layout is not torch.strided:
        raise ValueError(
            f"attention_map: inputs have input_ids of {ids.dtype}, {ids.layout}; they must be dense and int64"
        )
    inputs = {name: x[None] if x.dim() == 1 else x for name, x in inputs.items()}
    shape = list(inputs["input_ids"].shape)
    if len(shape) != 2 or shape[0] != 1 or shape[1] == 0:
        raise ValueError(f"attention_map: input_ids are {shape}: one sample is needed, [1, S] with S at least 1")
    mask = inputs.get("attention_mask")
    return inputs, None if mask is None or mask.all() else mask[0].bool().cpu()


def _run(model, inner, inputs, layer):
    global _reading
    before, training = inner.config._attn_implementation, [module for module in model.modules() if module.training]
    _reading = reader = _Reader(layer)
    model.eval()
    inner.config._attn_implementation = _NAME
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        inner.config._attn_implementation = before
        for module in training:
            module.training = True
        _reading = None
    return reader.probabilities


def _png(probabilities):
    """A grey image of at least about 600 pixels a side; black is the largest probability."""
    zoom = max(1, -(-600 // len(probabilities)))
    grey = 255 - (probabilities / probabilities.max().clamp(min=1e-12) * 255).round()
    grey = grey.to(torch.uint8).repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    height, width = grey.shape
    rows = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), grey], 1)  # each row says first: no filter
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(rows.flatten().tolist()))),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body
