"""The loss of a language model as a layer, from hidden states and a head instead of logits."""

from torch import nn

from fastft import ops
from fastft.ops import checks
from fastft.ops.cross_entropy import check_options


class LinearCrossEntropyLoss(nn.Module):
    """torch.nn.CrossEntropyLoss after a linear head: forward(hidden, weight, labels, bias=None, num_items=None).

    Equation, shapes and options: `fastft.ops.linear_cross_entropy`. It has no parameters; the head's are arguments.
    """

    def __init__(
        self,
        *,
        ignore_index=-100,
        label_smoothing=0.0,
        softcap=None,
        z_loss=0.0,
        reduction="mean",
        return_stats=False,
    ):
        super().__init__()
        checks.flags("LinearCrossEntropyLoss", return_stats=return_stats)
        check_options("LinearCrossEntropyLoss", ignore_index, label_smoothing, softcap, z_loss, reduction)
        self.options = {
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "softcap": softcap,
            "z_loss": z_loss,
            "reduction": reduction,
            "return_stats": return_stats,
        }

    def forward(self, hidden, weight, labels, bias=None, num_items=None):
        return ops.linear_cross_entropy(hidden, weight, labels, bias=bias, num_items=num_items, **self.options)

    def extra_repr(self):
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
