"""Which random bits an element gets: Philox4x32-10 (Salmon et al., 2011, doi:10.1145/2063384.2063405).

The key is the 64-bit seed. One counter (c0, c1, c2, c3) gives four 32-bit words, read as eight draws of 16 bits, the low
half of each word first. An element is kept iff its draw is at least `drop_threshold(p)`.

    dropout of x      element i in row-major order: counter (i // 8 mod 2^32, i // 2^35, 0, 0), draw i mod 8
    attention scores  query row i (packed: of all tokens), head h + batch * H, key j within its sequence:
                      counter (j // 8, i, head, 1), draw j mod 8

The same in csrc/common/philox.h and Triton's tl.philox: all backends drop the same elements for the same seed.
"""

import torch

_MASK = 0xFFFFFFFF


def drop_threshold(p):
    """p as an integer over 2^16: the exact probability that an element is dropped is this / 65536."""
    return min(round(p * 65536), 65535)


def keep_scale(p):
    """What kept elements are multiplied with, so that the expectation stays: 1 / probability of being kept."""
    return 1 / (1 - drop_threshold(p) / 65536)


def draws(seed, c0, c1, c2, c3):
    """int64 tensors (or ints) of one broadcast shape -> [..., 8], the eight 16-bit draws of each counter."""
    c = [torch.as_tensor(x, dtype=torch.int64, device=c0.device) for x in (c0, c1, c2, c3)]
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57  # the low 64 bits, which int64 keeps when it wraps
        high = lambda product: (product >> 32) & _MASK
        c = [high(second) ^ c[1] ^ k0, second & _MASK, high(first) ^ c[3] ^ k1, first & _MASK]
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    c = torch.broadcast_tensors(*c)
    return torch.stack([half for word in c for half in (word & 0xFFFF, word >> 16)], dim=-1)


def new_seed(seed=None):
    """int64 scalar tensor on the CPU: `seed` (int, or a tensor of one), by default a draw from torch's CPU generator.

    That generator serves every device: no synchronisation, and activation checkpointing, which restores it before it
    recomputes, sees the same masks again.
    """
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
    return seed if isinstance(seed, torch.Tensor) else torch.tensor(seed, dtype=torch.int64, device="cpu")


def keep_mask(shape, p, seed, device="cpu"):
    """seed: int or a tensor of one. bool mask of the elements of `shape` that dropout keeps."""
    elements = torch.Size(shape).numel()
    block = torch.arange(-(-elements // 8), device=device)
    return (draws(seed, block & _MASK, block >> 32, 0, 0).flatten()[:elements] >= drop_threshold(p)).view(shape)
