"""Optimizers: ordinary `torch.optim.Optimizer`s that also work under ZeRO, and resume bit for bit.

AdamW            fp32 arithmetic for parameters of any dtype; the fp32 master weights live in its state.
ReplicatedAdamW  the same for parameters that every rank holds whole (ZeRO stage 0): one `step()` sums the gradients over
                 ranks, clips them, and leaves everything untouched when they are not finite.
"""

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019, https://arxiv.org/abs/1711.05101), as torch's.

        m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2
        w = w - lr (weight_decay w + (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps))

    m, v and w are fp32 whatever the parameter's dtype: for bf16 and fp16 parameters the state holds `master`, the fp32
    weights of which the parameter is the rounded copy, so that updates smaller than bf16's resolution add up.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name}={value}: must be at least 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas}: both must be at least 0 and below 1")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None, "AdamW takes no closure"
        self._update({p: p.grad for group in self.param_groups for p in group["params"] if p.grad is not None})

    def _update(self, grads, grad_scale=None):
        """One AdamW step from {parameter: gradient of any float dtype}; `grad_scale` (0-d tensor) divides each gradient."""
        for group in self.param_groups:
            for bucket in buckets([p for p in group["params"] if p in grads]):
                states = [self._state(p) for p in bucket]
                weights = [state.get("master", p) for p, state in zip(bucket, states, strict=True)]
                adamw(
                    weights,
                    [grads[p].float() for p in bucket],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    [],
                    [state["step"] for state in states],
                    fused=True,
                    grad_scale=grad_scale,
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
                for p, weight in zip(bucket, weights, strict=True):
                    if weight is not p:
                        p.copy_(weight)

    def _state(self, p):
        """The state of a parameter, made at its first step: ZeRO swaps the tensors after __init__."""
        state = self.state[p]
        if not state:
            # on the parameter's device, where fused AdamW reads it without a host synchronisation
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
            if p.dtype != torch.float32:
                state["master"] = p.detach().float()
        return state

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        # torch casts every state tensor to the parameter's dtype, which would round fp32 moments to bf16: put them back.
        saved = state_dict["state"]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            if i in saved:
                self.state[p] = {k: v.to(p.device, copy=True) for k, v in saved[i].items()}


class ReplicatedAdamW(AdamW):
    """AdamW with what a training step needs around it when every rank holds all weights.

    `step()` averages the gradients over ranks (in fp32), measures their norm over all parameters, and unless it is NaN
    or infinite clips to `max_grad_norm` and updates. DeepSpeed reads two attributes afterwards: `overflow`, True when
    the step was skipped (the schedule then waits too), and `_global_grad_norm`, the norm before clipping.

    accumulate: gradients of low-precision parameters are summed over micro-batches in fp32 rather than in `.grad`.
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
                if p.dtype != torch.float32:
                    p.register_post_accumulate_grad_hook(self._accumulate)

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None, "ReplicatedAdamW takes no closure"
        grads = {p: self._sums.get(p, p.grad) for p in self._parameters()}
        self._sums = {}
        grads = average_over_ranks(grads)
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads.values()]
        norm = torch.linalg.vector_norm(torch.stack(norms)).item() / self.loss_scale if norms else 0.0
        self._global_grad_norm = norm
        self.overflow = not norm < float("inf")
        if not self.overflow:
            # the fused kernel divides the gradient as it reads it, so unscaling and clipping cost no pass of their own
            divisor = self.loss_scale * (max(1.0, (norm + 1e-6) / self.max_grad_norm) if self.max_grad_norm else 1.0)
            device = next(iter(grads)).device if grads else None
            self._update(grads, None if divisor == 1.0 else torch.tensor(divisor, device=device))
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
        if p in self._sums:
            self._sums[p] += p.grad
        else:
            self._sums[p] = p.grad.float()
        p.grad = None

    def _parameters(self):
        return [p for group in self.param_groups for p in group["params"]]

    def state_dict(self):
        return {**super().state_dict(), "loss_scale": [self.loss_scale, self.good_steps]}

    def load_state_dict(self, state_dict):
        scale, good_steps = state_dict["loss_scale"]
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "loss_scale"})
        if self.dynamic:
            self.loss_scale, self.good_steps = scale, good_steps


def average_over_ranks(grads):
    """{parameter: gradient or None} -> the mean over ranks, without the parameters that no rank has a gradient for.

    Summed in fp32, in buckets. A rank that has none for a parameter, because its tokens never met that expert, counts as zero.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return {p: g for p, g in grads.items() if g is not None}
    present = torch.tensor([g is not None for g in grads.values()], dtype=torch.uint8, device=next(iter(grads)).device)
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    averaged = {}
    for bucket in buckets([p for p, there in zip(grads, present.tolist(), strict=True) if there]):
        zero = lambda p: torch.zeros(p.numel(), dtype=torch.float32, device=p.device)
        flat = torch.cat([zero(p) if grads[p] is None else grads[p].reshape(-1).float() for p in bucket])
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


def parameter_groups(model, weight_decay):
    """Trainable parameters in two groups: decayed, and not (biases and norms: everything with fewer than two dimensions).

    ZeRO-3 leaves empty shards in place of the tensors; their true shape is in `ds_shape`.
    """
    decayed, plain = [], []
    for p in model.parameters():
        if p.requires_grad:
            (decayed if len(getattr(p, "ds_shape", p.shape)) > 1 else plain).append(p)
    groups = ({"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]
