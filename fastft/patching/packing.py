"""Packed rows: hooks that check them on their way in, and classification that reads each sequence's own token.

A packed batch holds its sequences end to end: input_ids [1, T], position_ids [1, T] that start anew with each sequence,
cu_seq_lens_q = cu_seq_lens_k int32 [n + 1] and max_length_q = max_length_k, no attention_mask. transformers hands these
four down to every layer. A sequence classifier returns logits [n, classes].

An encoder's classifier reads hidden[:, 0], so what it reads is turned into [n, 1, hidden]: one row per sequence, as in a
padded batch. That happens within the last layer, right after attention, for nothing else of that layer is ever read: its
feed-forward network computes n tokens instead of T.
"""

import copy

import torch
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils.generic import can_return_tuple

from fastft.patching.families import family_of, first_position

FIRST_TOKENS_ONLY = "fastft_first_tokens_only"
"""Keyword argument that an encoder's classifier sends down to the last layer, along with those of the packed row."""


def enter(module, args, kwargs):
    """Forward pre-hook of the base model and of the model around it: recognises packed rows and checks them."""
    kwargs = {**dict(zip(module.fastft_arguments, args, strict=False)), **kwargs}
    if kwargs.get("output_attentions") or module.config.output_attentions:
        raise ValueError(
            "output_attentions=True: fused attention keeps no probabilities; call fastft.unpatch(model) first"
        )
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is None:
        cu_seqlens = _recognise(module, kwargs)
    if getattr(module, "pooler", None) is not None:
        module.pooler.fastft_cu_seqlens = None if FIRST_TOKENS_ONLY in kwargs else cu_seqlens
    if cu_seqlens is None:
        return None
    if hasattr(module, "fastft_why_not_packed"):
        raise ValueError(f"packed rows for a {type(module).__name__}: {module.fastft_why_not_packed}")
    kwargs.update(cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens)
    if family_of(module.config).decoder and kwargs.get("use_cache") is None:
        kwargs["use_cache"] = False  # else keys and values would be copied into a cache that nobody reads
    if hasattr(module, "fastft_classifies"):
        kwargs[FIRST_TOKENS_ONLY] = True
    if module.base_model is module and not torch.compiler.is_compiling():
        _check(module, cu_seqlens, kwargs)
    return (), kwargs


def _recognise(module, kwargs):
    """cu_seqlens where position_ids start anew within a row, as transformers' own mask would have recognised, or None."""
    positions = kwargs.get("position_ids")
    if positions is None or kwargs.get("attention_mask") is not None or kwargs.get("past_key_values") is not None:
        return None
    ids = kwargs.get("input_ids")
    rows = (ids if ids is not None else kwargs["inputs_embeds"]).shape[0]
    return _segments(
        positions.expand(rows, -1), None if family_of(module.config).decoder else first_position(module.config)
    )


@torch.compiler.disable
def _segments(positions, first):
    """positions [B, S] -> cu_seqlens of the runs of successive positions, or None where each row is one run.

    first: where every run must start, else the rows count as not packed; None: anywhere.
    """
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions.diff() != 1
    if not starts[:, 1:].any() or (first is not None and (positions[starts] != first).any()):
        return None
    ends = torch.tensor([starts.numel()], device=starts.device)
    return torch.cat([starts.flatten().nonzero().squeeze(1), ends]).int()


def _check(module, cu_seqlens, kwargs):
    """What would go wrong silently; the attention op checks the rest."""
    for name in ("attention_mask", "past_key_values"):
        if kwargs.get(name) is not None:
            raise ValueError(f"packed rows (cu_seq_lens_q) together with {name}: pass only one of them")
    positions = kwargs.get("position_ids")
    if positions is None and not family_of(module.config).decoder:
        raise ValueError(
            f"packed rows for a {module.config.model_type} need position_ids that start anew with each sequence"
        )
    if cu_seqlens.device.type != "cpu":
        return
    if (cu_seqlens.diff() < 1).any():
        raise ValueError(f"cu_seq_lens_q {cu_seqlens.tolist()}: every packed sequence must have a token")
    first = first_position(module.config)
    if positions is not None and (positions.flatten()[cu_seqlens[:-1].long()] != first).any():
        raise ValueError(f"position_ids: every packed sequence of a {module.config.model_type} must start at {first}")


def tell_reader(attention, args, kwargs):
    """Forward pre-hook of the last layer's attention, which gets the keyword arguments: tells `read_first` after it.

    It is no hook of the layer: activation checkpointing recomputes a layer without running its hooks.
    """
    attention.fastft_reader.fastft_cu_seqlens = kwargs.get("cu_seq_lens_q") if FIRST_TOKENS_ONLY in kwargs else None


def read_first(module, args):
    """Forward pre-hook: hidden states [1, T, hidden] of a packed row -> [n, 1, hidden], the first token of each sequence."""
    cu_seqlens = module.fastft_cu_seqlens
    if cu_seqlens is None:
        return None
    return tuple(x.flatten(0, 1).index_select(0, cu_seqlens[:-1]).unsqueeze(1) for x in args)


def pool_output(encoder, args, kwargs, output):
    """Forward hook of an encoder whose classifier pools by itself: [1, T, hidden] -> [n, 1, hidden], one row per sequence."""
    if FIRST_TOKENS_ONLY not in kwargs:
        return None
    hidden, cu_seqlens = output.last_hidden_state.flatten(0, 1), kwargs["cu_seq_lens_q"].long()
    if getattr(encoder.config, "classifier_pooling", "cls") == "mean":
        lengths = cu_seqlens.diff()
        sequence = torch.repeat_interleave(lengths, output_size=len(hidden))
        sums = hidden.new_zeros(len(lengths), hidden.shape[1], dtype=torch.float32).index_add(
            0, sequence, hidden.float()
        )
        pooled = (sums / lengths[:, None]).to(hidden.dtype)
    else:
        pooled = hidden.index_select(0, cu_seqlens[:-1])
    output = copy.copy(output)  # `hidden_states`, where asked for, stays the row as it is
    output["last_hidden_state"] = pooled[:, None]
    return output


def classify(self, *args, **kwargs):
    """Forward of a decoder's sequence classifier: scores the last token of each packed sequence, and only that."""
    if kwargs.get("cu_seq_lens_q") is None:
        return type(self).forward(self, *args, **kwargs)
    return _classify_packed(self, **kwargs)


@can_return_tuple
def _classify_packed(self, cu_seq_lens_q, labels=None, **kwargs):
    outputs = getattr(self, self.base_model_prefix)(cu_seq_lens_q=cu_seq_lens_q, **kwargs)
    last = _last_tokens(kwargs.get("input_ids"), cu_seq_lens_q.long(), self.config.pad_token_id)
    logits = self.score(outputs.last_hidden_state.flatten(0, 1).index_select(0, last))
    loss = None
    if labels is not None:
        loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
    return SequenceClassifierOutputWithPast(
        loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
    )


def _last_tokens(input_ids, cu_seqlens, pad):
    """[n]: the token that transformers reads: each sequence's last, or its last that is not `pad` where ids can be seen."""
    if input_ids is None or pad is None:
        return cu_seqlens[1:] - 1
    token = torch.arange(input_ids.numel(), device=input_ids.device)
    sequence = torch.bucketize(token, cu_seqlens[1:], right=True)
    start = cu_seqlens[:-1]
    candidate = torch.where(input_ids.flatten() != pad, token, start[sequence])
    return start.scatter_reduce(0, sequence, candidate, "amax")
