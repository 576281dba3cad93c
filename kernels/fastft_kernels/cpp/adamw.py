"""AdamW on the CPU: Python face of csrc/cpu/adamw.cpp. Equation and arguments: reference/adamw.py.

All tensors of a call are contiguous; weights, m, v are float32, the gradients have one dtype, and so have the copies.
A gradient is read as it is, whatever its dtype: no temporary is made. Numbers do not depend on the thread count.

Bytes moved per element, float32 gradient and no copy: 16 read, 12 written.
"""

from array import array

import torch

from fastft_kernels.cpp.extension import DTYPES, C, address


def adamw(weights, grads, copies, ms, vs, scalars):
    update(C.adamw, weights, grads, copies, (ms, vs), scalars)


def adamw_by_rows(weights, grads, copies, ms, vs, scalars):
    """The same for tables whose gradients are coalesced sparse float32 tensors of rows; no dense gradient is made."""
    numbers, threads = array("f", scalars), torch.get_num_threads()
    for w, grad, copy, m, v in zip(weights, grads, copies, ms, vs, strict=True):
        values = grad.values().contiguous()
        spans = _spans(grad.indices()[0], values, w, copy, m, v)
        copy_dtype = torch.float32 if copy is None else copy.dtype
        arguments = spans.data_ptr(), len(spans), numbers.buffer_info()[0], DTYPES[torch.float32], DTYPES[copy_dtype]
        C.adamw(*arguments, threads)


def _spans(read, values, *tables):
    """A table as rows of addresses, in its own order: what lies before a row that was read, that row, ..., what is left.

    The order matters: 20 % of the time where the rows that were read came first, because memory is then not read in a line.
    """
    before = torch.cat([read.new_zeros(1), read + 1])
    first = torch.stack([before[:-1], read], 1).flatten()
    first = torch.cat([first, before[-1:]])
    sizes = torch.cat([first[1:], first.new_tensor([len(tables[0])])]) - first
    width = values.shape[1:].numel()
    gradient = torch.zeros_like(first)
    gradient[1::2] = address(values) + 4 * width * torch.arange(len(read))
    at = lambda table: torch.zeros_like(first) if table is None else address(table) + table.itemsize * width * first
    w, *others = map(at, tables)
    return torch.stack([width * sizes, w, gradient, *others], 1)


def square_sum(tensors):
    rows = array("q", [x for t in tensors for x in (t.numel(), t.data_ptr())])
    total = torch.zeros((), dtype=torch.float64)
    if tensors:
        C.square_sum(
            rows.buffer_info()[0],
            len(tensors),
            total.data_ptr(),
            DTYPES[tensors[0].dtype],
            torch.get_num_threads(),
        )
    return total


def update(kernel, weights, grads, copies, states, scalars, *maps):
    """Calls a kernel of csrc/cpu/adamw.h with a row of addresses for each tensor."""
    if not weights:
        return
    rows = array("q")
    for w, *others in zip(weights, grads, copies, *states, strict=True):
        rows.append(w.numel())
        rows.append(w.data_ptr())
        rows.extend(map(address, others))
    numbers = array("f", scalars)
    copy_dtype = torch.float32 if copies[0] is None else copies[0].dtype
    kernel(
        rows.buffer_info()[0],
        len(weights),
        numbers.buffer_info()[0],
        *map(address, maps),
        DTYPES[grads[0].dtype],
        DTYPES[copy_dtype],
        torch.get_num_threads(),
    )
