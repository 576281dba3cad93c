"""Role `loss`: a causal language model in training computes its loss from hidden states, and `logits` is None.

The head is entered through its own forward, with an extra argument, so that ZeRO-3 gathers its weight there, and adapters
and hooks around it are seen. Whether the fused loss can serve is decided at each call, by what all ranks know alike; where
it cannot, transformers' own forward computes logits and loss, and `why_not_fused` says why. Evaluation and generation keep
their logits; a task that wants numbers only asks for `return_stats`.
"""

import inspect
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import ModelOutput
from transformers.utils.generic import can_return_tuple

from fastft import ops
from fastft.ops.linear_cross_entropy import KeptRows
from fastft.patching.families import family_of

IGNORED = -100


@dataclass
class FusedLossOutput(ModelOutput):
    """What a causal language model returns, without logits; with `return_stats` also the statistics of each trained row."""

    loss: torch.Tensor | None = None
    logits: None = None
    past_key_values: object | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None
    aux_loss: None = None
    correct: torch.Tensor | None = None
    """whether the label was the likeliest token, for each row that is trained, in order"""
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


def head(self, input, fused=None):
    """Forward of the head: logits, or with `fused` (arguments of the loss) the loss of these rows."""
    if fused is None:
        return ops.linear(input, self.weight, self.bias)
    return ops.linear_cross_entropy(input, self.weight, bias=self.bias, **fused)


def forward(self, *args, return_stats=False, label_smoothing=0.0, **kwargs):
    """Forward of the model. return_stats: the fused loss in evaluation too, with its statistics.

    Raises ValueError for `return_stats` or `label_smoothing` where the fused loss cannot serve.
    """
    reason = "the model is not patched any more"  # but a trainer wrapped this forward when it was
    if "_fastft_patch" in self.__dict__:
        given = {**dict(zip(self.fastft_arguments, args, strict=False)), **kwargs}
        reason = _why_not_now(self, given, return_stats)
    if reason is None:
        return _fused(self, return_stats, label_smoothing, **given)
    if return_stats or label_smoothing:
        raise ValueError(f"return_stats and label_smoothing need the fused loss, which cannot serve here: {reason}")
    return type(self).forward(self, *args, **kwargs)


@can_return_tuple
def _fused(
    self,
    return_stats,
    label_smoothing,
    labels,
    num_items_in_batch=None,
    shift_labels=None,
    ignore_index=IGNORED,
    logits_to_keep=0,
    output_router_logits=None,
    **kwargs,
):
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.flatten()
    kept = None if torch.compiler.is_compiling() else KeptRows(targets, ignore_index)
    outputs = getattr(self, self.base_model_prefix)(**kwargs)
    hidden = outputs.last_hidden_state.flatten(0, -2)
    targets = targets.to(hidden.device)
    if kept is not None:  # in a graph, whose shapes are fixed, the op leaves rows out
        # Where no row is left the head is entered all the same: under ZeRO-3 all ranks gather its weight together.
        index = kept.index().to(hidden.device)
        hidden, targets = hidden.index_select(0, index), targets[index]
    if num_items_in_batch is None and kept is not None and not len(targets):
        warnings.warn(f"every label is {ignore_index}, ignored: the loss is 0, and so are its gradients", stacklevel=2)
    settings = {
        "labels": targets,
        "label_smoothing": label_smoothing,
        "softcap": getattr(self.config, "final_logit_softcapping", None),
        "num_items": num_items_in_batch,
        "ignore_index": ignore_index,
        "return_stats": True,
    }
    loss, stats = self.get_output_embeddings()(hidden, fused=settings)
    return FusedLossOutput(
        loss=loss,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
        **(stats._asdict() if return_stats else {}),
    )


def replace(inner):
    """Binds the forwards; returns how many losses were replaced, 1 or 0."""
    leaves = _leaves(inner.get_output_embeddings())
    inner.fastft_arguments = tuple(inspect.signature(inner.forward).parameters)
    for leaf in leaves:
        leaf.forward = head.__get__(leaf)
    inner.forward = _with_signature_of(type(inner)).__get__(inner)
    return 1


def why_kept(inner):
    """Why the loss of this model stays as it is, or None."""
    if not family_of(inner.config).decoder:
        return "its head transforms the hidden states before it multiplies them"
    if "forward" in inner.__dict__:
        return f"something else, a trainer perhaps, has replaced the forward of {type(inner).__name__}"
    if getattr(inner, "loss_function", None) is not ForCausalLMLoss:
        return "its loss is not that of causal language models"
    if not _leaves(inner.get_output_embeddings()):
        return f"its head is a {type(inner.get_output_embeddings()).__name__}, which has to see its own output"
    return None


def why_not_fused(model):
    """Why this model, which may be wrapped (DeepSpeed, PEFT, DDP), has no fused loss; None if it has."""
    while not hasattr(model, "_fastft_patch") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    inner = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    done = getattr(inner, "_fastft_patch", None)
    if done is None:
        return "the model is not patched"
    if "loss" not in done.report.replaced:
        return done.report.kept.get("loss", "it is no causal language model")
    return _why_not_head(inner)


def _why_not_now(self, given, return_stats):
    """Why this call goes to transformers' own forward, or None."""
    if given.get("labels") is None:
        return "there are no labels"
    if not (self.training or return_stats):
        return "the model is in evaluation mode, where logits are wanted"
    keep = given.get("logits_to_keep", 0)
    if isinstance(keep, torch.Tensor) or keep != 0:
        return "logits_to_keep asks for logits"
    routers = given.get("output_router_logits")
    if getattr(self.config, "output_router_logits", False) if routers is None else routers:
        return "output_router_logits adds a loss of its own"
    if self.loss_function is not ForCausalLMLoss:
        return "the loss function was replaced"
    return _why_not_head(self)


def _why_not_head(self):
    leaf = _active_leaf(self.get_output_embeddings())
    if leaf is None or getattr(leaf.__dict__.get("forward"), "__func__", None) is not head:
        return f"the head is a {type(self.get_output_embeddings()).__name__} that was put there after, or adapts its output"
    return None


def _is_saved_copy(module):
    """Whether it is PEFT's wrapper of a layer that is trained whole: it hands all arguments on."""
    return type(module).__name__ == "ModulesToSaveWrapper"


def _leaves(module):
    """The linear layers that may compute the head; none where something computes on their output."""
    if _is_saved_copy(module):
        return [m for m in (module.original_module, *module.modules_to_save.values()) if type(m) is nn.Linear]
    return [module] if type(module) is nn.Linear else []


def _active_leaf(module):
    """The linear layer that computes the head now, or None."""
    if _is_saved_copy(module):
        active = module.active_adapters
        if module.disable_adapters or not any(name in module.modules_to_save for name in active):
            return module.original_module
        return module.modules_to_save[active[0]] if len(active) == 1 else None
    return module if type(module) is nn.Linear else None


def _with_signature_of(cls):
    """`forward` under the signature of the class's own: Trainer chooses by it which columns of a dataset are kept."""

    def fused_or_plain(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    fused_or_plain.__signature__ = inspect.signature(cls.forward)
    fused_or_plain.__name__ = "forward"
    return fused_or_plain
