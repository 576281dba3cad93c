"""Which implementation of an op runs: one rule, in one place.

    triton      CUDA tensors (CPU tensors under TRITON_INTERPRET=1, and then only when asked for: it is there for tests)
    cpp         CPU tensors, through the compiled extension
    reference   everything, in plain PyTorch

`auto` takes the first of these that can serve the tensors at hand. A backend that was asked for by name serves, or
raises BackendError with the reason; it is never replaced silently. `explain` says what would run and why.

An op file registers a predicate for each of its kernels: a function of the op's tensors that returns None where the
kernel can serve, else the reason why not. The reference needs none.
"""

import contextlib
import importlib
import importlib.util
import os
import threading

import torch

from fastft.ops.checks import shown
from fastft_kernels.cpp import extension

BACKENDS = ("auto", "reference", "triton", "cpp")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_process = {"backend": "auto"}
_thread = threading.local()  # not a ContextVar: torch.compile cannot trace one
_predicates = {}  # op -> {backend: predicate}, in the order of automatic choice


class BackendError(RuntimeError):
    """The backend that was asked for cannot serve this call."""


@contextlib.contextmanager
def backend(name):
    """Context manager (or decorator): ops called by this thread inside it use backend `name`."""
    _check(name)
    before = getattr(_thread, "backend", None)
    _thread.backend = name
    try:
        yield
    finally:
        _thread.backend = before


def set_backend(name):
    """Makes `name` the backend of the process, wherever no `backend(...)` context says otherwise."""
    _check(name)
    _process["backend"] = name


def requested():
    """The backend asked for here and now; `auto` unless somebody chose."""
    return getattr(_thread, "backend", None) or _process["backend"]


def register(op, **predicates):
    """Declares the kernels of `op` in order of preference. Returns those modules that this machine can run, by name."""
    _predicates[op] = predicates
    runnable = [name for name in predicates if unavailable(name) is None]
    return {name: importlib.import_module(f"fastft_kernels.{name}.{op}") for name in runnable}


def choose(op, *tensors):
    """Name of the backend that serves `op` for these tensors; the first tensor decides the device."""
    name = requested()
    if name == "auto":
        for candidate in _predicates[op]:
            if why_not_automatic(op, candidate, *tensors) is None:
                return candidate
        return "reference"
    reason = why_not(op, name, *tensors)
    if reason is not None:
        raise BackendError(f"{op}: backend {name!r} was asked for but cannot serve: {reason}")
    return name


def why_not(op, name, *tensors):
    """Why backend `name` cannot serve these tensors, or None."""
    if name == "reference":
        return None
    if name not in _predicates[op]:
        return f"{op} has no {name} kernel"
    device = tensors[0].device.type
    if name == "cpp" and device != "cpu":
        return f"it serves CPU tensors, and these are on {device}"
    if name == "triton" and device != "cuda" and not (INTERPRETED and device == "cpu"):
        return f"it serves CUDA tensors, and these are on {device}"
    return unavailable(name) or _predicates[op][name](*tensors)


def why_not_automatic(op, name, *tensors):
    """Why `auto` passes over backend `name`, or None."""
    if INTERPRETED and name == "triton" and tensors[0].device.type == "cpu":
        return "Triton's interpreter is used only when asked for"
    return why_not(op, name, *tensors)


def explain(op, *tensors):
    """What serves `op` for these tensors and why nothing else does, in a few readable lines."""
    chosen = choose(op, *tensors)
    how = "chosen automatically" if requested() == "auto" else "as asked for"
    lines = [f"{op}: {chosen}, {how}"]
    for name in BACKENDS[1:]:
        if name != chosen:
            lines.append(f"  not {name}: {why_not_automatic(op, name, *tensors) or f'{chosen} comes first'}")
    return "\n".join(lines)


def unavailable(name):
    """Why backend `name` cannot run on this machine, whatever the tensors, or None."""
    return {"triton": _no_triton, "cpp": extension.missing}.get(name)


def instruction_set():
    """Which CPU instructions the extension uses (scalar, avx2 or avx512); None without the extension."""
    return extension.C.isa() if extension.C else None


def _find_triton():
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and not INTERPRETED:
        return "there is no CUDA device"
    return None


def _check(name):
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"backend {shown(name)} is unknown: choose one of {', '.join(BACKENDS)}")


_no_triton = _find_triton()
