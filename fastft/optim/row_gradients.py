"""Gradients of embedding tables by rows: the rows that a step has read, and no zeros for those that it has not.

They are sparse tensors as `torch.nn.Embedding(sparse=True)` makes them. The update is that of the dense gradient, not a lazy
one: moments decay and weights move in the rows without a gradient too.
"""

import torch
import torch.distributed as dist
from torch import nn

from fastft.ops import checks

MIN_ELEMENTS = 2**20  # below, a dense gradient costs less than the sorting


def use_row_gradients(model):
    """Has the large embedding tables that are trained give their gradients by rows, those that nothing else reads.

    For the optimizers of fastft, under which every rank holds whole parameters; other optimizers refuse sparse gradients.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"use_row_gradients: model is {checks.shown(model)}; it must be a torch.nn.Module")
    readers = [p for module in model.modules() for p in module._parameters.values() if p is not None]
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad and module.weight.numel() >= MIN_ELEMENTS:
            # torch scales by frequency in dense gradients only
            module.sparse = sum(p is module.weight for p in readers) == 1 and not module.scale_grad_by_freq


def summed(grad):
    """A sparse [rows, ...] gradient with each row once, ascending, summed in float32 in the order in which it was read."""
    if grad.sparse_dim() != 1:
        raise ValueError(
            f"a sparse gradient must be of rows, as torch.nn.Embedding's; this one has {grad.sparse_dim()} sparse dimensions"
        )
    if grad.is_coalesced() and grad.dtype == torch.float32:
        return grad
    rows, position = grad._indices()[0].unique(return_inverse=True)
    values = torch.zeros(len(rows), *grad.shape[1:], device=grad.device)
    return _sparse(rows, values.index_add_(0, position, grad._values().float()), grad.shape, is_coalesced=True)


def averaged_over_ranks(grad, like):
    """The mean over ranks of a row gradient, summed in the order of the ranks. None, on a rank that has none, counts as zero.

    like: the parameter.
    """
    ranks = dist.get_world_size()
    if grad is None:
        rows, values = like.new_empty(0, dtype=torch.int64), like.new_empty(0, *like.shape[1:], dtype=torch.float32)
    else:
        grad = summed(grad)
        rows, values = grad.indices()[0], grad.values()
    counts = [torch.empty(1, dtype=torch.int64, device=rows.device) for _ in range(ranks)]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    counts = [count.item() for count in counts]
    everyone = [_gathered(t, counts) for t in (rows, values)]
    total = summed(_sparse(*everyone, like.shape))
    total.values().div_(ranks)
    return total


def _gathered(t, counts):
    """[sum of counts, ...]: the rows of every rank, which has counts[rank] of them."""
    padded = t.new_zeros(max(counts), *t.shape[1:])
    padded[: len(t)] = t
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _sparse(rows, values, shape, is_coalesced=False):
    return torch.sparse_coo_tensor(rows[None], values, shape, is_coalesced=is_coalesced, check_invariants=False)
