"""Packed rows [T, H, D] to batches [n, H, S, D] of sequences of nearly equal length, and back."""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch.utils.weak import WeakIdKeyDictionary

BATCH_OVERHEAD = 2**15
"""What one more batch costs, in scores: two groups of sequences share a batch while that wastes fewer on padding."""

_read_back = WeakIdKeyDictionary()


@dataclass(eq=False)
class Mask:
    """Which of `keys` each of `queries` may see, for the n sequences of a batch."""

    queries: int
    keys: int
    device: torch.device
    causal: bool = False
    """a query sees the keys up to its own position, and `allowed` is None"""
    allowed: torch.Tensor | None = None
    """bool, broadcastable to [n, 1, queries, keys]; None: nothing but `causal` forbids"""
    blind: torch.Tensor | None = None
    """bool [n, 1, queries, 1]: queries that see nothing. `allowed` opens all keys to them, so that softmax is finite"""

    @cached_property
    @torch.inference_mode(False)
    def bias(self):
        """`allowed` as 0 and -inf, or None."""
        allowed = self.allowed
        if self.causal:
            allowed = torch.ones(1, 1, self.queries, self.keys, dtype=torch.bool, device=self.device).tril()
        if allowed is None:
            return None
        return torch.zeros(allowed.shape, device=self.device).masked_fill_(~allowed, -torch.inf)


@dataclass(eq=False)
class Rows:
    """How the rows (one token, one head) of a packed tensor go to the slots of its batches, all batches end to end."""

    heads: int
    shapes: list[tuple[int, int, int]]
    """(n, H, S) of each batch"""
    index: torch.Tensor
    """the row of each slot; slots past the end of a sequence repeat its last row, so nothing foreign gets in"""
    slots: torch.Tensor
    """the slot of each row"""
    padding: torch.Tensor
    """the slots past the end"""
    unused: torch.Tensor
    """the rows that are in no batch: those of sequences without a query or without a key"""

    def pad(self, x, dtype):
        """x [T, H, D] -> the batches [n, H, S, D], in `dtype`."""
        batches = _Pad.apply(x, self, dtype).split([n * H * S for n, H, S in self.shapes])
        return [batch.view(*shape, -1) for batch, shape in zip(batches, self.shapes, strict=True)]

    def tokens(self):
        """For each batch int64 [n, S]: the token of each slot, the same for all heads."""
        batches = self.index.div(self.heads, rounding_mode="floor").split([n * H * S for n, H, S in self.shapes])
        return [batch.view(shape)[:, 0] for batch, shape in zip(batches, self.shapes, strict=True)]

    def unpad(self, batches, dtype, fill):
        """Batches [n, H, S, D] -> [T, H, D], in `dtype`, with `fill` in the unused rows."""
        return _Unpad.apply(torch.cat([x.reshape(-1, x.shape[-1]) for x in batches]), self, dtype, fill)


@dataclass(eq=False)
class Segments:
    """Packed sequences as batches; `plan` makes one."""

    queries: Rows
    keys: Rows
    masks: list[Mask]

    def batches(self, q, k, v, dtype):
        """q [T, H, D], k and v [T', H', D] -> for each batch q [n, H, S, D], k and v [n, H', S', D] and its mask."""
        columns = self.queries.pad(q, dtype), self.keys.pad(k, dtype), self.keys.pad(v, dtype), self.masks
        return list(zip(*columns, strict=True))

    def unpack(self, outs, dtype):
        """o of each batch, [n, H, S, D], -> [T, H, D]; zeros for sequences that are in none."""
        return self.queries.unpad(outs, dtype, 0.0)

    def unpack_lse(self, lses):
        """lse of each batch, [n, H, S], -> [T, H]; -inf for sequences that are in none."""
        lses = [lse.unsqueeze(-1) for lse in lses]
        return self.queries.unpad(lses, lses[0].dtype, -torch.inf).squeeze(-1)


def plan(cu_seqlens_q, cu_seqlens_k, heads_q, heads_k, left, right, multiple):
    """How to batch the packed sequences, with batches as long as a multiple of `multiple`.

    All layers of a model ask for the same, so the last few answers are kept.
    """
    lengths_q = _lengths(cu_seqlens_q)
    lengths_k = lengths_q if cu_seqlens_k is cu_seqlens_q else _lengths(cu_seqlens_k)
    return _plan(lengths_q, lengths_k, heads_q, heads_k, left, right, multiple, cu_seqlens_q.device)


def _lengths(cu_seqlens):
    """Lengths as a tuple. An accelerator is asked once per tensor, not once per layer: asking waits for it."""
    if cu_seqlens.device.type == "cpu":
        return tuple(cu_seqlens.diff().tolist())
    version = None if cu_seqlens.is_inference() else cu_seqlens._version
    known, lengths = _read_back.get(cu_seqlens, (None, None))
    if lengths is None or known != version:
        lengths = tuple(cu_seqlens.diff().tolist())
        _read_back[cu_seqlens] = version, lengths
    return lengths


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # what is kept may serve a training step next
def _plan(lengths_q, lengths_k, heads_q, heads_k, left, right, multiple, device):
    groups = _group(lengths_q, lengths_k, heads_q)
    same = lengths_q == lengths_k
    queries = _rows(lengths_q, groups, heads_q, multiple, device)
    keys = queries if same and heads_q == heads_k else _rows(lengths_k, groups, heads_k, multiple, device)
    masks = []
    for group, (_, _, Sq), (_, _, Sk) in zip(groups, queries.shapes, keys.shapes, strict=True):
        n, m = (torch.tensor([lengths[i] for i in group], device=device) for lengths in (lengths_q, lengths_k))
        if left is None and right is None:
            ragged = any(lengths_k[i] < Sk for i in group)
            allowed = torch.arange(Sk, device=device) < m[:, None, None, None] if ragged else None
            masks.append(Mask(Sq, Sk, device, allowed=allowed))
        elif same and right == 0 and (left is None or left >= Sq):
            # Keys past the end of a sequence stand after all its queries, so being causal hides them.
            masks.append(Mask(Sq, Sk, device, causal=True))
        else:
            mask = band(Sq, Sk, m - n, torch.zeros_like(m), m, left, right)
            masks.append(mask if mask.blind.any() else replace(mask, blind=None))
    return Segments(queries, keys, masks)


def _group(lengths_q, lengths_k, heads):
    """Numbers of the sequences, in groups of nearly equal length: each is one batch."""
    groups, allowance = [], BATCH_OVERHEAD // heads
    scores = Sq = Sk = 0
    order = (i for i, (n, m) in enumerate(zip(lengths_q, lengths_k, strict=True)) if n and m)
    for i in sorted(order, key=lambda i: (lengths_q[i], lengths_k[i]), reverse=True):
        n, m = lengths_q[i], lengths_k[i]
        widest = max(Sk, m)
        if groups and (len(groups[-1]) + 1) * Sq * widest - (scores + n * m) <= allowance:
            groups[-1].append(i)
            scores, Sk = scores + n * m, widest
        else:
            groups.append([i])
            scores, Sq, Sk = n * m, n, m
    return groups


def _rows(lengths, groups, heads, multiple, device):
    lengths = torch.tensor(lengths, dtype=torch.int64)
    starts = lengths.cumsum(0) - lengths
    head = torch.arange(heads)[:, None]
    shapes, index, past_end = [], [], []
    for group in groups:
        n, start = lengths[group][:, None, None], starts[group][:, None, None]  # [n, 1, 1], as rows of [n, H, S]
        position = torch.arange(-(-int(n.max()) // multiple) * multiple)
        token = start + torch.minimum(position, n - 1)
        shapes.append((len(group), heads, position.numel()))
        index.append((token * heads + head).flatten())
        past_end.append((position >= n).expand(shapes[-1]).flatten())
    index = torch.cat(index) if index else torch.empty(0, dtype=torch.int64)
    past_end = torch.cat(past_end) if past_end else torch.empty(0, dtype=torch.bool)
    slots = torch.full((int(lengths.sum()) * heads,), -1)
    slots[index[~past_end]] = (~past_end).nonzero().squeeze(1)
    unused = (slots < 0).nonzero().squeeze(1)
    tensors = index, slots.clamp_(min=0), past_end.nonzero().squeeze(1), unused
    return Rows(heads, shapes, *(t.to(device) for t in tensors))


def band(Sq, Sk, offset, first, end, left, right):
    """The mask of queries i that see keys i + offset - left ... i + offset + right, among keys first ... end - 1.

    offset, first, end: int64 [n] or [1]; left, right: None for no limit.
    """
    offset, first, end = (x[:, None, None, None] for x in (offset, first, end))
    key = torch.arange(Sk, device=end.device)
    allowed = (key >= first) & (key < end)
    position = torch.arange(Sq, device=end.device)[:, None] + offset
    if left is not None:
        allowed = allowed & (key >= position - left)
    if right is not None:
        allowed = allowed & (key <= position + right)
    blind = ~allowed.any(-1, keepdim=True)
    return Mask(Sq, Sk, end.device, allowed=allowed | blind, blind=blind)


class _Pad(torch.autograd.Function):
    """A gather whose gradient is a gather too: every row has one slot, and padding slots get no gradient."""

    @staticmethod
    def forward(x, rows, dtype):
        return x.reshape(-1, x.shape[-1]).index_select(0, rows.index).to(dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.rows, _ = inputs
        ctx.shape, ctx.dtype = x.shape, x.dtype

    @staticmethod
    def backward(ctx, grad):
        grad = grad.index_select(0, ctx.rows.slots).index_fill_(0, ctx.rows.unused, 0)
        return grad.view(ctx.shape).to(ctx.dtype), None, None


class _Unpad(torch.autograd.Function):
    """The inverse gather. What stands in padding slots reaches nothing, forward or backward."""

    @staticmethod
    def forward(x, rows, dtype, fill):
        out = x.index_select(0, rows.slots).index_fill_(0, rows.unused, fill)
        return out.view(-1, rows.heads, x.shape[-1]).to(dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.rows, _, _ = inputs
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx, grad):
        grad = grad.reshape(-1, grad.shape[-1]).index_select(0, ctx.rows.index)
        return grad.index_fill_(0, ctx.rows.padding, 0).to(ctx.dtype), None, None, None
