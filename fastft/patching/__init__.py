"""`fastft.patch(model)`: swaps the layers of a transformers or PEFT model for fastft's, reversibly, with a report.

By instance: only this model changes, not its classes and not transformers. By role: a table (families.py) says which
layers of an architecture play which. Forwards are bound to single layers, so parameters, their names and the modules stay
what they are; saving, PEFT, gradient checkpointing and ZeRO-3 see no difference.

    attention   self-attention, padded or packed, as attn_implementation="fastft"    attention.py
    rope        rotary position embedding of queries and keys                        rope.py
    norm        RMSNorm, LayerNorm, and BERT's with dropout and residual in front    layers.py
    dropout     nn.Dropout, with fewer random draws                                  layers.py
    lora        PEFT's lora.Linear: alone, q with k and v, MLPs of three such        lora.py
    mlp         the activation of an MLP, gated or behind a bias                     mlp.py
    linear      nn.Linear in half precision, on a CPU without instructions for it    layers.py
    loss        of a causal language model in training, from hidden states           loss.py
    pooling     classification of each sequence of a packed row                      packing.py
"""

import copy
import inspect
from dataclasses import dataclass

import torch
from torch import nn

from fastft.ops import checks, dispatch
from fastft.ops.linear import native
from fastft.patching import attention, layers, lora, loss, mlp, packing, rope
from fastft.patching.families import family_of, layer_class, why_not_packed, why_unsupported
from fastft.patching.layers import bind
from fastft.patching.loss import why_not_fused
from fastft.patching.report import PatchReport

__all__ = ["ROLES", "PatchReport", "patch", "unpatch", "why_not", "why_not_fused"]

ROLES = ("attention", "rope", "norm", "dropout", "lora", "mlp", "linear", "loss", "pooling")
NOT_ASKED_FOR = "it is not among the roles that were asked for"


@dataclass
class _Patch:
    """What `unpatch` needs; it stays on the model, so that it goes along with a copy."""

    report: PatchReport
    attn_implementation: str
    roles: frozenset


def patch(model, *, roles=None, verbose=True):
    """Patches `model` in place and returns a PatchReport, printed if `verbose`. A patched model is left as it is.

    model: a transformers model of one of the architectures in families.py, or a PEFT model around one. Adapters come first:
    a layer that PEFT wraps later computes as PEFT does.
    roles: names of those to replace, all by default; the others are kept. Without `attention` no packed rows.
    Where a backend was asked for (`fastft.backend`, `--kernels`), a role that has no such kernel is kept, and reported.
    Raises ValueError for other models, with the architectures that are supported, for an unknown role, and for other roles
    than a patched model was patched with; BackendError where a backend was asked for but a LoRA layer would compute as PEFT
    does, in a later call too.
    """
    checks.flags("fastft.patch", verbose=verbose)
    reason = why_not(model)
    if reason is not None:
        raise ValueError(f"fastft.patch: {reason}")
    wanted = _check_roles(roles)
    inner = _unwrap(model)
    if "_fastft_patch" not in inner.__dict__:
        inner._fastft_patch = _patch(model, inner, wanted)
    elif roles is not None and wanted != inner._fastft_patch.roles:
        before = ", ".join(role for role in ROLES if role in inner._fastft_patch.roles)
        raise ValueError(
            f"fastft.patch: the model is patched already, with the roles {before}: call fastft.unpatch first"
        )
    report = inner._fastft_patch.report
    if verbose:
        print(report)
    return report


def unpatch(model):
    """Undoes `patch`: the model computes again, to the bit, what it computed before. Does nothing to another model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastft.unpatch: model is {checks.shown(model)}; it must be a model")
    inner = _unwrap(model)
    done = inner.__dict__.pop("_fastft_patch", None)
    if done is None:
        return
    inner.config._attn_implementation = done.attn_implementation
    for module in model.modules():
        if _is_ours(module):
            del module.__dict__["forward"]
        for name in [name for name in module.__dict__ if name.startswith("fastft_")]:
            del module.__dict__[name]
        for hooks, with_kwargs in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if _of_this_package(hook)]:
                del hooks[key]
                with_kwargs.pop(key, None)


def why_not(model_or_config):
    """Why this model, or a model of this configuration, cannot be patched; None if it can."""
    inner = _unwrap(model_or_config)
    is_model = isinstance(inner, nn.Module)
    config = getattr(inner, "config", None) if is_model else inner
    reason = why_unsupported(config)
    if reason is not None or not is_model or "_fastft_patch" in inner.__dict__:
        return reason
    if not isinstance(inner, layer_class(config, "PreTrainedModel")):
        return f"{type(inner).__name__} is not one of transformers' own {config.model_type} classes"
    for name, module in inner.named_modules():
        if "forward" in module.__dict__ and not (
            module is inner and _is_causal_lm(inner)
        ):  # that one is the loss alone
            return f"something else has replaced the forward of {name or type(inner).__name__} already: undo that first"
    return None


def _unwrap(model):
    """The transformers model inside a PEFT model."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _check_roles(roles):
    """The roles as a set. Raises ValueError for a name that is none."""
    if roles is None:
        return frozenset(ROLES)
    wanted = frozenset([roles] if isinstance(roles, str) else roles)
    unknown = sorted(map(str, wanted - set(ROLES)))
    if unknown:
        raise ValueError(f"fastft.patch: roles has {', '.join(unknown)}: choose among {', '.join(ROLES)}")
    return wanted


def _patch(model, inner, roles):
    if "lora" in roles:
        lora.check_forced(inner, _why_not_served("lora", inner))
    previous = inner.config._attn_implementation
    replaced, kept = {}, {}
    for role, op, replace in (
        ("attention", "attention", _replace_attention),
        ("rope", "rope", _replace_ropes),
        ("norm", "layer_norm" if family_of(inner.config).norm_offset is None else "rms_norm", _replace_norms),
        ("dropout", "dropout", _replace_dropouts),
        ("lora", "lora", _replace_lora),
        ("mlp", mlp.op(inner), mlp.replace),
        ("linear", None, _replace_linears),
    ):
        reason = getattr(family_of(inner.config), f"keeps_{role}", None) or _why_not_served(op, inner)
        reason = reason or {"mlp": mlp.why_kept, "rope": rope.why_kept}.get(role, lambda _: None)(inner)
        reason = reason if role in roles else NOT_ASKED_FOR
        count = replace(model, inner) if reason is None else 0
        if count:
            replaced[role] = count
        elif reason is not None:
            kept[role] = reason
    if _is_causal_lm(inner):
        reason = _why_not_served("cross_entropy", inner) or loss.why_kept(inner)
        reason = reason if "loss" in roles else NOT_ASKED_FOR
        if reason is None:
            replaced["loss"] = loss.replace(inner)
        else:
            kept["loss"] = reason
    packs = f"attention is kept: {kept['attention']}" if "attention" in kept else why_not_packed(inner)
    if packs is None and "pooling" not in roles and _pools(inner):
        kept["pooling"] = NOT_ASKED_FOR
        packs = f"pooling is kept: {NOT_ASKED_FOR}"
    if packs is not None and "attention" in replaced:
        for module in {inner.base_model, inner}:
            module.fastft_why_not_packed = packs
    pooled = _replace_pooling(inner) if packs is None else 0
    if pooled:
        replaced["pooling"] = pooled
    lora_kept = lora.kept(inner) if "lora" in roles else {}
    return _Patch(PatchReport(type(inner).__name__, replaced, kept, packs, lora_kept), previous, roles)


def _is_causal_lm(inner):
    return type(inner) is layer_class(inner.config, "ForCausalLM")


def _why_not_served(op, inner):
    """Why the backend that was asked for has no kernel for `op`, wherever the model will run; None if it has."""
    name = dispatch.requested()
    if op is None or name == "auto":
        return None
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    like = torch.empty(inner.config.hidden_size, dtype=inner.dtype, device=device)
    if op == "attention":
        heads = inner.config.num_attention_heads
        size = getattr(inner.config, "head_dim", None) or like.numel() // heads
        q = like.new_empty(1, 1, heads, size)
        return dispatch.why_not(op, name, q, q, q, 1.0)
    if op == "rope":
        return dispatch.why_not(op, name, like, like, like, like)
    return dispatch.why_not(op, name, like, like)


def _replace_attention(model, inner):
    config = copy.deepcopy(inner.config)  # other models may have been built from the same object
    for module in [m for m in model.modules() if m.__dict__.get("config") is inner.config]:
        module.config = config
    config._attn_implementation = attention.NAME
    for module in {inner.base_model, inner}:
        module.fastft_arguments = tuple(inspect.signature(module.forward).parameters)
        module.register_forward_pre_hook(packing.enter, with_kwargs=True)
    return inner.config.num_hidden_layers


def _replace_ropes(model, inner):
    layers = rope.find(inner)
    if not layers:
        return 0
    forward = rope.forward_of(type(layers[0]))
    for layer in layers:
        layer.__dict__["fastft_rotating"] = forward  # role lora binds the layer again, around this one
    return bind(layers, forward)


def _replace_norms(model, inner):
    offset = family_of(inner.config).norm_offset
    if offset is None:
        bind(_add_and_norm_blocks(inner), layers.add_and_norm)
        norms = [m for m in inner.modules() if type(m) is nn.LayerNorm and len(m.normalized_shape) == 1]
        return bind([m for m in norms if m.elementwise_affine], layers.layer_norm)
    norm = layer_class(inner.config, "RMSNorm")
    return bind([m for m in inner.modules() if type(m) is norm], layers.gemma_norm if offset else layers.rms_norm)


def _add_and_norm_blocks(inner):
    """The modules of BERT and its kin that end a block: dense, dropout, LayerNorm."""
    if family_of(inner.config).layers != "encoder.layer":
        return []
    ends = {layer_class(inner.config, "SelfOutput"), layer_class(inner.config, "Output")}
    return [m for m in inner.modules() if type(m) in ends and type(m.dropout) is nn.Dropout]


def _replace_dropouts(model, inner):
    name, attribute = family_of(inner.config).holds_dropout
    holder = layer_class(inner.config, name)
    unused = {getattr(m, attribute) for m in inner.modules() if holder is not None and type(m) is holder}
    dropouts = [m for m in inner.modules() if type(m) is nn.Dropout and 0 < m.p < 1 and m not in unused]
    return bind(dropouts, layers.dropout)


def _replace_lora(model, inner):
    linears, mlps, attentions = lora.replaceable(inner)
    bind(mlps, lora.mlp)
    bind(attentions, lora.attention)
    kept = lora.kept(inner)
    for name, module in lora.find(inner).items():
        module.__dict__["fastft_name"] = name
    return bind(linears, lora.linear) - sum(
        module in linears for name, module in lora.find(inner).items() if name in kept
    )


def _replace_linears(model, inner):
    linears = [m for m in inner.modules() if type(m) is nn.Linear and "forward" not in m.__dict__]
    return bind([m for m in linears if m.weight.device.type == "cpu" and not native(m.weight.dtype)], layers.linear)


def _pools(inner):
    """Whether its results on packed rows need the role `pooling`."""
    has_pooler = getattr(inner.base_model, "pooler", None) is not None
    return has_pooler or type(inner) is layer_class(inner.config, "ForSequenceClassification")


def _replace_pooling(inner):
    family, encoder = family_of(inner.config), inner.base_model
    is_classifier = type(inner) is layer_class(inner.config, "ForSequenceClassification")
    if family.decoder:
        return bind([inner] if is_classifier else [], packing.classify)
    readers = []
    if getattr(encoder, "pooler", None) is not None:
        readers.append(encoder.pooler)
    if is_classifier:
        inner.fastft_classifies = True
    if is_classifier and not family.layers:
        encoder.register_forward_hook(packing.pool_output, with_kwargs=True)
        readers.append(encoder)
    elif is_classifier:
        layer = encoder.get_submodule(family.layers)[-1]
        reader = layer.get_submodule(family.after_attention)
        layer.attention.__dict__["fastft_reader"] = reader  # as an attribute it would become a child
        layer.attention.register_forward_pre_hook(packing.tell_reader, with_kwargs=True)
        readers.append(reader)
    for reader in readers if family.layers else []:
        reader.fastft_cu_seqlens = None
        reader.register_forward_pre_hook(packing.read_first)
    return len(readers)


def _is_ours(module):
    forward = getattr(module.__dict__.get("forward"), "__func__", None)
    return forward is not None and _of_this_package(forward)


def _of_this_package(function):
    return getattr(function, "__module__", "").startswith(f"{__name__}.")
