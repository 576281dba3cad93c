"""Wrong types are refused where they come in, by the name of the argument: `rms_norm: x is a str; it must be a tensor`.

What fits together (shapes, dtypes, devices) each op checks itself, with ValueError.
"""

import torch


def tensors(op, **values):
    """TypeError unless all are tensors, ValueError unless they are dense."""
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            raise _wrong(op, name, value, "a tensor")
        if value.layout is not torch.strided:
            raise ValueError(f"{op}: {name} is {value.layout}; it must be dense: use .to_dense()")


def optional_tensors(op, **values):
    """The same for tensors that may be None."""
    tensors(op, **{name: value for name, value in values.items() if value is not None})


def numbers(op, **values):
    """TypeError unless all are numbers."""
    for name, value in values.items():
        if not _is_number(value):
            raise _wrong(op, name, value, "a number")


def optional_numbers(op, **values):
    """TypeError unless all are numbers or None."""
    for name, value in values.items():
        if value is not None and not _is_number(value):
            raise _wrong(op, name, value, "a number, or None")


def flags(op, **values):
    """TypeError unless all are bool: a text like "no" would count as true."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise _wrong(op, name, value, "True or False")


def whole_numbers(op, at_least=-(2**63), **values):
    """TypeError unless all are whole numbers, ValueError unless they have 64 bits and are not below `at_least`."""
    for name, value in values.items():
        if isinstance(value, (bool, torch.Tensor)) or not hasattr(type(value), "__index__"):
            raise _wrong(op, name, value, "a whole number")
        if value < at_least or value >= 2**63:
            limit = f"at least {at_least}" if value < at_least else "below 2 ** 63"
            raise ValueError(f"{op}: {name} is {value}; it must be {limit}")


def choice(op, choices, **values):
    """ValueError unless all are among the texts `choices`."""
    for name, value in values.items():
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{op}: {name} is {shown(value)}; it must be one of {', '.join(choices)}")


def factory(op, device, dtype):
    """What a layer makes its parameters with: ValueError for an unknown device, TypeError for what is no dtype at all."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise _wrong(op, "dtype", dtype, "a torch.dtype, or None")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"{op}: dtype is {dtype}; it must be floating")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(f"{op}: device is {shown(device)}: {str(error).splitlines()[0]:.200}") from None


def autocasts(device_type):
    """Whether autocast is on for such a device; PyTorch knows of none for meta."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def shown(value):
    """A value in a sentence: small ones as they are, others by their type."""
    if isinstance(value, (str, int, float, torch.device)) or value is None:
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    return f"a {type(value).__name__}"


def _is_number(value):
    return isinstance(value, (int, float)) or (
        hasattr(type(value), "__float__") and not isinstance(value, torch.Tensor)
    )


def _wrong(op, name, value, allowed):
    return TypeError(f"{op}: {name} is {shown(value)}; it must be {allowed}")
