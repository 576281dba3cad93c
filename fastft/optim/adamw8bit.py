"""AdamW and Lion whose moments take one byte per parameter.

A block of 256 elements shares one float32 scale; a step reads the codes, computes in float32, and writes codes again, in one
pass that allocates nothing. Resuming is bit for bit. What is shared with a universal checkpoint is float32: the moments that
`export_moments` gives are read back as the same codes.
"""

import torch

from fastft.ops import adamw as ops
from fastft.ops import checks
from fastft.optim.adamw import FIXED, AdamW, Fused, _check_group, _zeros

FORMAT = 1


class Quantised(Fused):
    """Moments in 8 bits: `<moment>_codes` [blocks, 256] uint8 and `<moment>_absmax` [blocks] float32.

    A group with state_bits=32 has float32 moments under the names of torch instead: `exp_avg` and `exp_avg_sq`.
    """

    moments = ("exp_avg", "exp_avg_sq")  # the first is signed

    def __init__(self, params, defaults, code):
        checks.choice(type(self).__name__, ops.CODES, code=code)
        fixed = {"state_bits": 8, "code": code, "block_size": ops.BLOCK, "format": FORMAT}
        super().__init__(params, {**defaults, **fixed})

    def add_param_group(self, param_group):
        _check_group(type(self).__name__, param_group)
        if param_group.get("state_bits", 8) not in (8, 32):
            raise ValueError(f"state_bits={param_group['state_bits']}: must be 8 or 32")
        checks.choice(type(self).__name__, ops.CODES, code=param_group.get("code", "companded"))
        if param_group.get("block_size", ops.BLOCK) != ops.BLOCK:
            raise ValueError(f"block_size={param_group['block_size']}: must be {ops.BLOCK}")
        super().add_param_group(param_group)

    def _fresh(self, p, group):
        if group["state_bits"] == 32:
            return {name: _zeros(p) for name in self.moments}
        blocks = -(-p.numel() // ops.BLOCK)
        state = {}
        for name in self.moments:
            state[f"{name}_codes"] = torch.zeros(blocks, ops.BLOCK, dtype=torch.uint8, device=p.device)
            state[f"{name}_absmax"] = torch.zeros(blocks, dtype=torch.float32, device=p.device)
        return state

    def _state(self, p, group):
        state = super()._state(p, group)
        if group["state_bits"] == 8 and f"{self.moments[0]}_codes" not in state:
            self._import_moments(state, group["code"])  # a universal checkpoint was loaded: float32 moments
        return state

    def _import_moments(self, state, code):
        for name in self.moments:
            x = state.pop(name).detach()
            codes, absmax = ops.quantize8(x.float(), signed=name == "exp_avg", code=code)
            state[f"{name}_codes"], state[f"{name}_absmax"] = codes, absmax
        state.pop("exp_avg_sq", None)  # of Lion, which has no second moment: written for DeepSpeed's converter only

    def _check_saved(self, state_dict):
        name = type(self).__name__
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False):
            for key in FIXED:
                if saved.get(key) != group[key]:
                    raise ValueError(f"{name}: the saved state has {key}={saved.get(key)}; this one has {group[key]}")
        super()._check_saved(state_dict)

    def _expected(self, saved, p, group):
        if group["state_bits"] == 8 and f"{self.moments[0]}_codes" not in saved:
            return {name: _zeros(p) for name in self.moments}  # of a universal checkpoint
        return super()._expected(saved, p, group)


class AdamW8bit(Quantised):
    """AdamW (see `fastft.optim.AdamW`) with both moments in 8 bits.

    params: tensors, or groups. A group with `state_bits=32` keeps float32 moments: advised for embeddings, norms and biases,
    and what `fastft.optim.parameter_groups(model, weight_decay, state_bits=8)` gives them.
    code: `companded` (the default: quadratic and quartic, exact in 0 and in the largest), or `dynamic`, that of bitsandbytes.

    A gradient element that is NaN or infinite leaves its weight and its moments as they are, so that it cannot spoil the
    256 that share a scale; with `state_bits=32` it makes them NaN, as in AdamW. Raises ValueError for hyper-parameters, dtypes
    or saved states that do not fit.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *, code="companded"):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, code)

    def _apply(self, group, params, grads, masters, states, step, grad_divisor):
        if group["state_bits"] == 32:
            return AdamW._apply(self, group, params, grads, masters, states, step, grad_divisor)
        names = [f"{moment}_{part}" for moment in self.moments for part in ("codes", "absmax")]
        hyper = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "code")}
        lists = [[state[name] for state in states] for name in names]
        ops.adamw8bit(params, grads, masters, lists, **hyper, step=step, grad_divisor=grad_divisor)


class Lion8bit(Quantised):
    """Lion (Chen et al., 2023, https://arxiv.org/abs/2302.06675) with its moment in 8 bits.

        w = w - lr (weight_decay w + sign(b1 m + (1 - b1) g))      m = b2 m + (1 - b2) g

    Good learning rates are 3 to 10 times smaller than AdamW's. Arguments and guarantees are those of AdamW8bit,
    and a gradient that is not finite changes nothing with `state_bits=32` either.
    """

    moments = ("exp_avg",)

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, *, code="companded"):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, code)

    def _apply(self, group, params, grads, masters, states, step, grad_divisor):
        hyper = {name: group[name] for name in ("lr", "betas", "weight_decay")}
        if group["state_bits"] == 32:
            moments = [state["exp_avg"] for state in states]
            return ops.lion(params, grads, masters, moments, **hyper, grad_divisor=grad_divisor)
        lists = [[state[f"exp_avg_{part}"] for state in states] for part in ("codes", "absmax")]
        ops.lion8bit(params, grads, masters, lists, **hyper, code=group["code"], grad_divisor=grad_divisor)
