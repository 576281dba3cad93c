"""How kernels look at tensors: as matrices whose rows are adjacent in memory."""


def matrix(x):
    """`x` [..., cols] as [rows, cols] with adjacent elements in a row; a view where the strides of `x` allow one."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()
