"""How kernels look at tensors: as matrices whose rows are adjacent in memory, or as tokens that have heads."""


def matrix(x):
    """`x` [..., cols] as [rows, cols] with adjacent elements in a row; a view where the strides of `x` allow one."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def rows(x):
    """`x` [..., cols] with adjacent elements in a row: itself where they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def token_dim(x, head_dim):
    """Which dimension of x [B, ..., ..., D] or [..., ..., D] counts tokens where `head_dim` counts heads."""
    return (x.dim() - 3) + (x.dim() - 2) - head_dim


def token_strides(x, head_dim):
    """Strides of such an x from one batch element, token and head to the next."""
    return x.stride(0) if x.dim() == 4 else 0, x.stride(token_dim(x, head_dim)), x.stride(head_dim)


def angle_strides(x):
    """Strides of x [B or 1, S, R] or [S, R] from one batch element and token to the next; 0 where all share one."""
    return x.stride(0) if x.dim() == 3 and x.shape[0] > 1 else 0, x.stride(-2)
