"""Role `attention`: fastft.ops.attention behind transformers' attention interface, under the name "fastft".

transformers asks twice: once per forward for a mask, once per layer for the attention itself. Self-attention over a whole
padded or packed batch goes to the op; what the op has no arguments for (a key-value cache, a mask the user made) gets a
dense mask and goes to transformers' own attention, whose results in generation are thereby kept to the bit.
"""

import sys

import torch
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastft import ops

NAME = "fastft"

_real_tokens = WeakIdKeyDictionary()


def make_mask(
    batch_size, q_length, kv_length, q_offset=0, kv_offset=0, attention_mask=None, use_vmap=False, **settings
):
    """The mask that all layers get: [B, S] as it came (None: no padding) for a batch that attends to itself, else dense."""
    whole = isinstance(q_offset, int) and q_offset == kv_offset == 0 and q_length == kv_length
    if torch.compiler.is_compiling() and attention_mask is not None and "local_size" in settings:
        whole = False  # whether the mask has gaps, over which a window cannot pass, cannot be asked in a graph
    if whole and not use_vmap and (attention_mask is None or attention_mask.shape[-1] == kv_length):
        return attention_mask
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        use_vmap=use_vmap,
        **settings,
    )


def attend(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    is_causal=None,
    sliding_window=None,
    softcap=None,
    cu_seq_lens_q=None,
    cu_seq_lens_k=None,
    max_length_q=None,
    max_length_k=None,
    **others,
):
    """transformers' attention function: query [B, H, S, D], key and value [B, H', S', D] -> (o [B, S, H, D], None)."""
    whole = query.shape[2] == key.shape[2] and (attention_mask is None or attention_mask.dim() == 2)
    if not whole and softcap:
        return _soft_capped(module, query, key, value, attention_mask, dropout, scaling, softcap)
    if not whole:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    settings = {
        "causal": causal,
        "scale": scaling,
        "window": None if sliding_window is None else (sliding_window - 1, 0 if causal else sliding_window - 1),
        "softcap": softcap,
        "dropout_p": dropout,
    }
    if cu_seq_lens_q is not None:
        lengths = {"cu_seqlens_q": cu_seq_lens_q, "cu_seqlens_k": cu_seq_lens_k}
        longest = {"max_seqlen_q": max_length_q, "max_seqlen_k": max_length_k}
        out = ops.attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), **lengths, **longest, **settings)
        return out.view(q.shape), None
    if attention_mask is None:
        return ops.attention(q, k, v, **settings), None
    compiling = torch.compiler.is_compiling()
    real = _padding_last(attention_mask) if compiling else real_tokens(attention_mask, sliding_window is not None)
    if real is None:
        return ops.attention(q, k, v, **settings), None
    index, cu_seqlens = real
    packed = ops.attention(
        *(x.flatten(0, 1).index_select(0, index) for x in (q, k, v)), cu_seqlens_q=cu_seqlens, **settings
    )
    out = packed.new_zeros(q.flatten(0, 1).shape).index_copy(0, index, packed).view(q.shape)
    return torch.where(attention_mask.bool()[..., None, None], out, 0) if compiling else out, None


def _soft_capped(module, query, key, value, allowed, dropout, scaling, softcap):
    """The model's own eager attention under a dense mask, bool or additive: PyTorch's has no soft-capping."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    if allowed is not None and allowed.dtype == torch.bool:
        allowed = torch.where(allowed, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    return eager(module, query, key, value, allowed, dropout=dropout, scaling=scaling, softcap=softcap)


def _padding_last(mask):
    """mask [B, S] -> (index of all tokens, cu_seqlens): the examples, and after them the padding as one more.

    A graph has fixed shapes, so here the padding is computed too; nobody reads it.
    """
    mask = mask.bool()
    index = torch.argsort((~mask).flatten().to(torch.uint8), stable=True)
    ends = torch.nn.functional.pad(mask.sum(1).cumsum(0), (0, 1), value=mask.numel())
    return index, torch.nn.functional.pad(ends, (1, 0)).int()


@torch.compiler.disable
def real_tokens(mask, windowed):
    """mask [B, S] -> (index of the real tokens in [B * S], cu_seqlens of the examples), or None where nothing is padded.

    Read from the device once per mask, which all layers of a forward share.
    """
    version = None if mask.is_inference() else mask._version
    if mask not in _real_tokens or _real_tokens[mask][0] != version:
        _real_tokens[mask] = version, *_find_real_tokens(mask)
    _, found, gaps = _real_tokens[mask]
    if gaps and windowed:
        raise ValueError(
            "attention_mask has gaps within an example, which a sliding window cannot pass over: pad at the ends"
        )
    return found


def _find_real_tokens(mask):
    mask = mask.bool()
    if mask.all():
        return None, False
    lengths = mask.sum(1)
    position = torch.arange(mask.shape[1], device=mask.device)
    first = torch.where(mask, position, mask.shape[1]).amin(1)
    last = torch.where(mask, position, -1).amax(1)
    gaps = bool((last - first + 1 > lengths).any())
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return (mask.flatten().nonzero().squeeze(1), cu_seqlens), gaps


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, make_mask)
