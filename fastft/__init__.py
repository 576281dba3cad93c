"""fastft: fused kernels, packed batches and DeepSpeed ZeRO for fine-tuning transformers.

    fastft.patch(model), fastft.unpatch(model)    swap a transformers/PEFT model's layers, reversibly, with a report
    fastft.attention_map(model, inputs, ...)      what one head attends to in one sample, as numbers and as a picture
    fastft.backend(name)                          context manager: auto, reference, triton or cpp
    fastft.ops.<op>                               the ops as functions
    fastft.nn.<Layer>                             the ops as drop-in layers
    fastft.optim.AdamW                            the optimizer

Names are imported when first used: `import fastft` costs nothing and `fastft train --help` needs no torch.
"""

import importlib

__version__ = "0.1.0"

_SUBMODULES = ("nn", "ops", "optim")
_FUNCTIONS = {
    "patch": "fastft.patching",
    "unpatch": "fastft.patching",
    "attention_map": "fastft.patching.attention_map",
    "backend": "fastft.ops.dispatch",
    "set_backend": "fastft.ops.dispatch",
    "BackendError": "fastft.ops.dispatch",
}
__all__ = [*_SUBMODULES, *_FUNCTIONS]  # noqa: PLE0604 - the names are strings


def __getattr__(name):
    if name in _SUBMODULES:
        return importlib.import_module(f"fastft.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'fastft' has no attribute {name!r}")


def __dir__():
    return [*globals(), *__all__]
