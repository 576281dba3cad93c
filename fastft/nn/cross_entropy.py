"""Cross-entropy of logits as a layer. From hidden states and a head, without logits: LinearCrossEntropyLoss."""

from torch import nn

from fastft import ops
from fastft.ops import checks
from fastft.ops.cross_entropy import check_options


class CrossEntropyLoss(nn.Module):
    """torch.nn.CrossEntropyLoss with the classes in the last dimension: forward(logits [..., V], labels [...], num_items=None).

    Equation, shapes and options: `fastft.ops.cross_entropy`; with `inplace` the gradient takes the place of the logits.
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
        inplace=True,
    ):
        super().__init__()
        checks.flags("CrossEntropyLoss", return_stats=return_stats, inplace=inplace)
        check_options("CrossEntropyLoss", ignore_index, label_smoothing, softcap, z_loss, reduction)
        self.options = {
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "softcap": softcap,
            "z_loss": z_loss,
            "reduction": reduction,
            "return_stats": return_stats,
            "inplace": inplace,
        }

    def forward(self, logits, labels, num_items=None):
        return ops.cross_entropy(logits, labels, num_items=num_items, **self.options)

    def extra_repr(self):
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
