"""Optimizers for parameters that every rank holds whole (ZeRO stage 0)."""

import torch
import torch.distributed as dist

from fastft.ops.adamw import global_norm
from fastft.optim import row_gradients
from fastft.optim.adamw import AdamW
from fastft.optim.adamw8bit import AdamW8bit, Lion8bit


class Replicated:
    """Added to an optimizer: what a training step needs around it when every rank holds all weights.

    `step()` averages the gradients over ranks (in fp32), measures their norm over all parameters, and unless it is NaN
    or infinite clips to `max_grad_norm` and updates. DeepSpeed reads two attributes afterwards: `overflow`, True when
    the step was skipped (the schedule then waits too), and `_global_grad_norm`, the norm before clipping.

    accumulate: gradients of low-precision parameters, and those by rows, are summed over micro-batches in fp32 rather than
        in `.grad`.
    loss_scale: fp16 only: gradients arrive multiplied by it; halved on overflow, doubled after 1000 good steps
        (Micikevicius et al., 2018, https://arxiv.org/abs/1710.03740).
    """

    growth_interval = 1000

    def __init__(self, params, *, max_grad_norm=0.0, accumulate=False, loss_scale=1.0, **kwargs):
        super().__init__(params, **kwargs)
        self.max_grad_norm = max_grad_norm
        self.loss_scale, self.dynamic, self.good_steps = float(loss_scale), loss_scale != 1.0, 0
        self.overflow, self._global_grad_norm = False, 0.0
        self._sums = {}
        if accumulate:
            for p in self._parameters():
                p.register_post_accumulate_grad_hook(self._accumulate)

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None, "a replicated step takes no closure"
        grads = {p: self._sums.get(p, p.grad) for p in self._parameters()}
        self._sums = {}
        grads = average_over_ranks(grads)
        norm = global_norm(list(grads.values())).item() / self.loss_scale
        self._global_grad_norm = norm
        self.overflow = not norm < float("inf")
        if not self.overflow:
            # the fused kernel divides the gradient as it reads it, so unscaling and clipping cost no pass of their own
            divisor = self.loss_scale * (max(1.0, (norm + 1e-6) / self.max_grad_norm) if self.max_grad_norm else 1.0)
            self._update(grads, divisor)
        self._adapt_loss_scale()

    def _adapt_loss_scale(self):
        if not self.dynamic:
            return
        self.good_steps = 0 if self.overflow else self.good_steps + 1
        if self.overflow:
            self.loss_scale = max(self.loss_scale / 2, 1.0)
        elif self.good_steps % self.growth_interval == 0:
            self.loss_scale *= 2

    def _accumulate(self, p):
        if p.dtype == torch.float32 and not p.grad.is_sparse and p not in self._sums:
            return
        total, grad = self._sums.get(p), p.grad.float()
        p.grad = None
        if total is None:
            self._sums[p] = row_gradients.summed(grad) if grad.is_sparse else grad
        elif total.is_sparse and grad.is_sparse:  # each row once: left as they come, rows would pile up
            self._sums[p] = row_gradients.summed(total + grad)
        else:
            self._sums[p] = total.to_dense().add_(grad.to_dense())

    def _parameters(self):
        return [p for group in self.param_groups for p in group["params"]]

    def state_dict(self):
        return {**super().state_dict(), "loss_scale": [self.loss_scale, self.good_steps]}

    def load_state_dict(self, state_dict):
        """As the optimizer's; a state of the optimizer alone is taken too, and leaves the loss scale as it is."""
        is_dict = isinstance(state_dict, dict)
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "loss_scale"} if is_dict else state_dict)
        if self.dynamic and "loss_scale" in state_dict:
            self.loss_scale, self.good_steps = state_dict["loss_scale"]


class ReplicatedAdamW(Replicated, AdamW):
    pass


class ReplicatedAdamW8bit(Replicated, AdamW8bit):
    pass


class ReplicatedLion8bit(Replicated, Lion8bit):
    pass


def average_over_ranks(grads):
    """{parameter: gradient or None} -> the mean over ranks, without the parameters that no rank has a gradient for.

    Summed in fp32, in buckets; row gradients one by one, or as dense ones where a rank's is dense. A rank that has none for a
    parameter, because its tokens never met that expert, counts as zero.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return {p: row_gradients.summed(g) if g.is_sparse else g for p, g in grads.items() if g is not None}
    kinds = [0 if g is None else 1 if g.is_sparse else 2 for g in grads.values()]
    kinds = torch.tensor(kinds, dtype=torch.uint8, device=next(iter(grads)).device)
    dist.all_reduce(kinds, op=dist.ReduceOp.MAX)
    kinds = dict(zip(grads, kinds.tolist(), strict=True))
    averaged = {p: row_gradients.averaged_over_ranks(grads[p], p) for p, kind in kinds.items() if kind == 1}
    for bucket in buckets([p for p, kind in kinds.items() if kind == 2]):
        zero = lambda p: torch.zeros(p.numel(), dtype=torch.float32, device=p.device)
        flat = torch.cat([zero(p) if grads[p] is None else grads[p].float().to_dense().reshape(-1) for p in bucket])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        pieces = flat.split([p.numel() for p in bucket])
        averaged.update({p: piece.view(p.shape) for p, piece in zip(bucket, pieces, strict=True)})
    return averaged


def buckets(tensors, size=2**25):
    """Consecutive tensors in lists of at most `size` elements together: few launches, bounded temporaries (128 MB of fp32)."""
    bucket, elements = [], 0
    for tensor in tensors:
        if bucket and elements + tensor.numel() > size:
            yield bucket
            bucket, elements = [], 0
        bucket.append(tensor)
        elements += tensor.numel()
    if bucket:
        yield bucket
