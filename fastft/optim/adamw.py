"""AdamW with float32 state, and what all optimizers here share: lazy state, exact resuming."""

import functools
from collections.abc import Iterable

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastft.ops import adamw as ops
from fastft.ops import checks
from fastft.optim import row_gradients

# What a group of an 8-bit optimizer says of its state: settled when it is made, and the same where the state is loaded.
FIXED = ("state_bits", "code", "block_size", "format")


MARK = "fastft"  # in each group: whose it is


class Fused(torch.optim.Optimizer):
    """What ZeRO needs of an optimizer, and what makes it resume bit for bit.

    State is made at a tensor's first step, because ZeRO swaps the tensors after __init__, and the step is a Python integer
    in it, from which the bias correction is computed anew, in double, each time. A subclass says how a list of tensors
    with the same step is updated (`_apply`) and what its fresh state is (`_fresh`).
    """

    def __init__(self, params, defaults):
        name = type(self).__name__
        _check(name, defaults)
        super().__init__(_listed(name, params), {**defaults, "betas": tuple(defaults["betas"]), MARK: name})
        _watch()

    def add_param_group(self, param_group):
        _check_group(type(self).__name__, param_group)
        _check(type(self).__name__, param_group)
        super().add_param_group(param_group)
        self._remember_groups()

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update({p: p.grad for group in self.param_groups for p in group["params"] if p.grad is not None})
        return loss

    def _update(self, grads, grad_divisor=1.0):
        """One step from {parameter: gradient of any float dtype, dense or of rows}, each divided by `grad_divisor`."""
        for group in self.param_groups:
            alike = {}  # what one call of a kernel takes: tensors of one device, dtype and step
            for p in group["params"]:
                if p not in grads:
                    continue
                grad = row_gradients.summed(grads[p]) if grads[p].is_sparse else grads[p]
                state = self._state(p, group)
                state["step"] += 1
                key = p.device, p.dtype, grad.dtype, grad.layout, state["step"]
                alike.setdefault(key, []).append((p, grad, state))
            for (*_, step), members in alike.items():
                params, gradients, states = map(list, zip(*members, strict=True))
                masters = [state["master"] for state in states] if "master" in states[0] else None
                self._apply(group, params, gradients, masters, states, step, grad_divisor)

    def _state(self, p, group):
        state = self.state[p]
        if "step" not in state:
            if p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(
                    f"{type(self).__name__}: a parameter is {p.dtype}; it must be float32, bfloat16 or float16"
                )
            state["step"] = 0
            state.update(self._fresh(p, group))
            if p.dtype != torch.float32:
                state["master"] = p.detach().float().contiguous()
        elif torch.is_tensor(state["step"]):
            state["step"] = int(state["step"])
        return state

    def load_state_dict(self, state_dict):
        """As torch's, except that state keeps its dtype: torch would cast it to the parameter's.

        Raises ValueError, before anything is changed, for a state that this optimizer cannot go on from.
        """
        name = type(self).__name__
        if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError(f"{name}: state_dict is {checks.shown(state_dict)} that no optimizer has made")
        self._check_saved(state_dict)
        super().load_state_dict(state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        own = lambda p, v: v.to(p.device, copy=True, memory_format=torch.contiguous_format) if torch.is_tensor(v) else v
        for i, p in zip(ids, params, strict=True):
            if i in state_dict["state"]:
                saved = state_dict["state"][i]
                self.state[p] = {key: own(p, value) for key, value in saved.items()}
                if "step" in saved:
                    self.state[p]["step"] = int(saved["step"])

    def __setstate__(self, state):  # of a deep copy, too
        super().__setstate__(state)
        self._remember_groups()

    def restore_groups(self):
        """Gives each group its own settings again: DeepSpeed's universal loader copies those of the first into all."""
        for group, own in self._own:
            group.update(own)

    def _remember_groups(self):
        keys = ("weight_decay", *FIXED)
        self._own = [(group, {key: group[key] for key in keys if key in group}) for group in self.param_groups]

    def _check_saved(self, state_dict):
        """Kernels take addresses, so a tensor that is missing, short or of another dtype must not get that far."""
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [(p, group) for group in self.param_groups for p in group["params"]]
        if len(ids) != len(params):
            return  # torch refuses it
        for i, (p, group) in zip(ids, params, strict=True):
            saved = state_dict["state"].get(i)
            if saved and p.numel():  # what DeepSpeed has swapped to disk is empty
                self._check_saved_of(i, p, saved, group)

    def _check_saved_of(self, i, p, saved, group):
        whose = f"{type(self).__name__}: the state saved of parameter {i}"
        if "step" not in saved:
            raise ValueError(f"{whose} has no step")
        expected = self._expected(saved, p.detach().to("meta"), group)
        if p.dtype != torch.float32:
            expected["master"] = _zeros(p.detach().to("meta"))
        # exp_avg_sq: Lion's in a universal checkpoint
        if foreign := sorted(saved.keys() - expected.keys() - {"step", "exp_avg_sq"}):
            raise ValueError(f"{whose} has {', '.join(foreign)}, which this optimizer does not hold for {p.dtype}")
        for name, like in expected.items():
            value = saved.get(name)
            is_tensor = torch.is_tensor(value)
            if not is_tensor or (value.dtype, value.shape) != (like.dtype, like.shape):
                found = f"{list(value.shape)} of {value.dtype}" if is_tensor else checks.shown(value)
                raise ValueError(f"{whose} has {name} {found}; it must be {list(like.shape)} of {like.dtype}")

    def _expected(self, saved, p, group):
        """Tensors like those that a state must hold; p: a tensor without data."""
        return self._fresh(p, group)


class AdamW(Fused):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019, https://arxiv.org/abs/1711.05101), as torch's.

        m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2
        w = w - lr (weight_decay w + (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps))

    m, v and w are fp32 whatever the parameter's dtype: for bf16 and fp16 parameters the state holds `master`, the fp32
    weights of which the parameter is the rounded copy, so that updates smaller than bf16's resolution add up.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _fresh(self, p, group):
        return {name: _zeros(p) for name in ("exp_avg", "exp_avg_sq")}

    def _apply(self, group, params, grads, masters, states, step, grad_divisor):
        moments = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")]
        hyper = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        ops.adamw(params, grads, masters, *moments, **hyper, step=step, grad_divisor=grad_divisor)


@functools.cache
def _watch():
    """Has every optimizer of the process looked at before it steps; once."""
    register_optimizer_step_pre_hook(_refuse_a_substitute)


def _refuse_a_substitute(optimizer, args, kwargs):
    """Raises RuntimeError where an optimizer of DeepSpeed's steps with the groups of one of ours.

    With optimizer offload Accelerate (1.15, map_pytorch_optim_to_deepspeed), and so HF Trainer, builds a DeepSpeedCPUAdam from
    the groups of whatever optimizer it is given, without decoupled weight decay and without a word.
    """
    group = optimizer.param_groups[0] if optimizer.param_groups else {}
    if MARK in group and type(optimizer).__module__.startswith("deepspeed."):
        name = type(optimizer).__name__
        raise RuntimeError(
            f"{group[MARK]} was replaced by {name}: with offload_optimizer set, Accelerate does so unless the DeepSpeed "
            f'configuration says "zero_force_ds_cpu_optimizer": false; say that, and {group[MARK]} is used'
        )


def _zeros(p):
    return torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format)


def _check(name, hyper):
    """TypeError or ValueError for hyper-parameters that cannot be."""
    for key in ("lr", "eps", "weight_decay"):
        if key in hyper:
            checks.numbers(name, **{key: hyper[key]})
            if not hyper[key] >= 0:
                raise ValueError(f"{name}: {key}={hyper[key]}: must be at least 0")
    if "betas" in hyper:
        betas = hyper["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"{name}: betas is {checks.shown(betas)}; it must be a pair of numbers")
        checks.numbers(name, **{f"betas[{i}]": beta for i, beta in enumerate(betas)})
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"{name}: betas={betas}: both must be at least 0 and below 1")


def _listed(name, params):
    """The parameters or groups as a list; TypeError for what is none of them, ValueError where there are none."""
    if isinstance(params, (torch.Tensor, str, dict)) or not isinstance(params, Iterable):
        raise TypeError(f"{name}: params is {checks.shown(params)}; it must be an iterable of tensors or of groups")
    params = list(params)
    if not params:
        raise ValueError(f"{name}: params is empty; give the tensors to train")
    for p in params:
        if not isinstance(p, (torch.Tensor, tuple)):  # a pair is a name and a tensor
            _check_group(name, p)
    return params


def _check_group(name, group):
    if not isinstance(group, dict) or "params" not in group:
        raise TypeError(f"{name}: params hold {checks.shown(group)}; a group must be a dict with params, else a tensor")
