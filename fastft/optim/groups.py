"""Which parameters are decayed, and which keep float32 moments."""

import torch

from fastft.ops import checks


def parameter_groups(model, weight_decay, state_bits=None):
    """Trainable parameters in groups: decayed, and not (biases and norms: everything with fewer than two dimensions).

    state_bits: 8 makes groups for an 8-bit optimizer: norms, biases and embeddings, whose rows meet rare and large gradients,
    get state_bits=32, as Dettmers et al. advise (2022, https://arxiv.org/abs/2110.02861).
    ZeRO-3 leaves empty shards in place of the tensors; their true shape is in `ds_shape`.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"parameter_groups: model is {checks.shown(model)}; it must be a torch.nn.Module")
    checks.numbers("parameter_groups", weight_decay=weight_decay)
    if isinstance(state_bits, torch.Tensor) or state_bits not in (None, 8, 32):
        raise ValueError(f"parameter_groups: state_bits is {checks.shown(state_bits)}; it must be 8, 32 or None")
    tables = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    embeddings = {id(weight) for weight in tables}
    groups = {}
    for p in model.parameters():
        if p.requires_grad:
            is_matrix = len(getattr(p, "ds_shape", p.shape)) > 1
            key = (weight_decay if is_matrix else 0.0, state_bits if is_matrix and id(p) not in embeddings else 32)
            groups.setdefault((not is_matrix, *key) if state_bits else (not is_matrix, key[0], None), []).append(p)
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], item[0][2] == 32))
    bits = lambda value: {} if state_bits is None else {"state_bits": value}
    return [{"params": params, "weight_decay": decay, **bits(value)} for (_, decay, value), params in ordered]
