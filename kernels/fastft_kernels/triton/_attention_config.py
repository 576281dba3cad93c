"""What the launches of the attention kernels share: block sizes by architecture, the order of tiles, scalar arguments.

The sizes are the largest that compile without spilling, with every optional part on (tests/kernels/aot/attention.py).
"""

import contextvars

import torch
import triton

LOG2_E = 1.4426950408889634
NO_LIMIT = 2**30
L2_BYTES = 32 * 2**20
"""keys and values that pairs working side by side may read: less than the L2 cache of an A100 or H100"""

SMALL_SHARED = ((8, 6), (8, 9), (12, 0), (12, 1))
"""compute capabilities with 99 KiB of shared memory per block, of which the tables for wide heads take more"""

# Head dimension up to -> its parts in columns, powers of two of at least 16 each.
PARTS = {
    16: (16, 0),
    32: (32, 0),
    48: (32, 16),
    64: (64, 0),
    80: (64, 16),
    96: (64, 32),
    128: (128, 0),
    160: (128, 32),
    192: (128, 64),
    256: (256, 0),
}

SIZES = {
    "forward": (32, 64, 96, 112, 128, 192, 256),
    "dq": (32, 64, 96, 128, 192, 256),
    "dkdv": (32, 64, 96, 128),
    "dk": (192, 256),
    "dv": (192, 256),
}
"""head dimensions up to which the entries of a row of the table serve"""

# fmt: off
# (kernel, architecture, kind) -> (BLOCK_M, BLOCK_N, warps, stages) by SIZES. Kinds: bfloat16 and float16 as `half`, as
# `special` with a left window, softcap or dropout; float32 as `float`. Where less than 64 rows of a tile fit, Hopper's
# matrix instructions, which take 64, go unused.
BLOCKS = {
    ("forward", 80, "half"):
    ((128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2), (128, 64, 8, 2), (128, 32, 8, 1), (64, 64, 8, 1)),
    ("dkdv", 80, "half"):
    ((64, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 1)),
    ("dk", 80, "half"):
    ((32, 128, 8, 1), (16, 128, 8, 1)),
    ("dv", 80, "half"):
    ((32, 128, 8, 1), (32, 128, 8, 1)),
    ("dq", 80, "half"):
    ((128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 1), (128, 16, 8, 1), (64, 64, 8, 1)),
    ("forward", 90, "half"):
    ((128, 64, 4, 3), (128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 1)),
    ("dkdv", 90, "half"):
    ((64, 128, 8, 2), (64, 128, 8, 1), (32, 128, 8, 1), (16, 128, 8, 1)),
    ("dk", 90, "half"):
    ((16, 128, 8, 1), (32, 32, 4, 1)),
    ("dv", 90, "half"):
    ((32, 128, 8, 1), (16, 128, 8, 1)),
    ("dq", 90, "half"):
    ((128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 1), (128, 32, 8, 1)),
    ("forward", 100, "half"):
    ((128, 64, 4, 3), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 1)),
    ("dkdv", 100, "half"):
    ((64, 128, 8, 1), (64, 128, 8, 1), (32, 128, 8, 1), (32, 128, 8, 1)),
    ("dk", 100, "half"):
    ((32, 128, 8, 1), (32, 64, 8, 1)),
    ("dv", 100, "half"):
    ((64, 128, 8, 1), (32, 128, 8, 1)),
    ("dq", 100, "half"):
    ((128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 1), (128, 64, 8, 2), (128, 64, 8, 1), (128, 32, 8, 1)),
    ("forward", 80, "special"):
    ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (64, 16, 4, 1), (64, 64, 8, 1)),
    ("dkdv", 80, "special"):
    ((64, 128, 8, 1), (32, 128, 8, 1), (16, 128, 8, 1), (16, 128, 8, 1)),
    ("dk", 80, "special"):
    ((32, 32, 4, 1), (32, 64, 8, 1)),
    ("dv", 80, "special"):
    ((16, 128, 8, 1), (16, 128, 8, 1)),
    ("dq", 80, "special"):
    ((128, 64, 8, 1), (128, 32, 8, 1), (64, 32, 8, 1), (128, 32, 8, 1), (64, 16, 4, 1), (64, 64, 8, 1)),
    ("forward", 90, "special"):
    ((128, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (64, 16, 4, 1)),
    ("dkdv", 90, "special"):
    ((64, 128, 8, 1), (32, 128, 8, 2), (16, 128, 8, 1), (16, 128, 8, 1)),
    ("dk", 90, "special"):
    ((32, 32, 4, 1), (32, 32, 4, 1)),
    ("dv", 90, "special"):
    ((32, 128, 8, 1), (16, 128, 8, 1)),
    ("dq", 90, "special"):
    ((128, 64, 8, 1), (128, 64, 8, 2), (128, 64, 8, 1), (128, 32, 8, 1), (128, 32, 8, 1), (32, 32, 8, 1)),
    ("forward", 100, "special"):
    ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
    ("dkdv", 100, "special"):
    ((64, 128, 8, 1), (64, 128, 8, 1), (32, 128, 8, 1), (32, 128, 8, 1)),
    ("dk", 100, "special"):
    ((32, 128, 8, 1), (32, 32, 4, 1)),
    ("dv", 100, "special"):
    ((32, 128, 8, 1), (32, 128, 8, 1)),
    ("dq", 100, "special"):
    ((64, 64, 4, 1), (128, 64, 8, 2), (128, 64, 8, 1), (128, 64, 8, 1), (128, 64, 8, 1), (128, 32, 8, 1)),
    ("forward", 80, "float"):
    ((32, 32, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
    ("dkdv", 80, "float"):
    ((32, 32, 4, 1), (16, 32, 4, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    ("dk", 80, "float"):
    ((16, 32, 8, 1), (32, 16, 8, 1)),
    ("dv", 80, "float"):
    ((32, 16, 8, 1), (32, 16, 8, 1)),
    ("dq", 80, "float"):
    ((64, 32, 4, 2), (64, 32, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
    ("forward", 90, "float"):
    ((32, 32, 4, 1), (32, 16, 4, 1), (32, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
    ("dkdv", 90, "float"):
    ((32, 32, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1), (32, 32, 8, 1)),
    ("dk", 90, "float"):
    ((16, 16, 8, 1), (32, 16, 8, 1)),
    ("dv", 90, "float"):
    ((16, 16, 8, 1), (16, 16, 8, 1)),
    ("dq", 90, "float"):
    ((64, 32, 4, 2), (64, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    ("forward", 100, "float"):
    ((32, 32, 4, 1), (32, 16, 4, 1), (32, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1), (16, 32, 8, 1)),
    ("dkdv", 100, "float"):
    ((32, 32, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1), (32, 32, 8, 1)),
    ("dk", 100, "float"):
    ((16, 16, 8, 1), (32, 16, 8, 1)),
    ("dv", 100, "float"):
    ((16, 16, 8, 1), (16, 16, 8, 1)),
    ("dq", 100, "float"):
    ((64, 32, 4, 2), (64, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1), (16, 32, 8, 1)),
}
# fmt: on


def parts(D, element_size):
    """(D0, D1): the parts that hold a head of D elements. Two wide ones in float32 would spill."""
    return (256, 0) if element_size == 4 and D > 128 else PARTS[min(size for size in PARTS if size >= D)]


def blocks(kernel, arch, D, element_size, special):
    """(BLOCK_M, BLOCK_N, warps, stages) of a kernel."""
    row = BLOCKS[kernel, arch, "float" if element_size == 4 else "special" if special else "half"]
    return next(entry for size, entry in zip(SIZES[kernel], row, strict=True) if size >= D)


def architecture(device):
    """80, 90 or 100, whose tensor cores are the GPU's; 80 under the interpreter."""
    if device.type != "cuda":
        return 80
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100, 11: 100}.get(major, 80)  # 12, the consumer Blackwells, has Ampere's instructions


def why_not(device, D):
    """Why no table fits this device and head dimension, or None."""
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0, and this GPU has {capability[0]}.{capability[1]}"
    if capability in SMALL_SHARED and D > 128:
        return f"this GPU has too little shared memory for heads above 128, and these are {D}"
    return None


def batched(x, dim=4):
    """A packed tensor as a batch of one; elements of a head are adjacent."""
    x = x if x.dim() == dim else x.unsqueeze(0)
    return x if dim == 3 or x.stride(-1) == 1 else x.contiguous()


def strides(*tensors):
    """Strides of batch, row and head, of each."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def launch(kernel, programs, *arguments, blocks, **constants):
    """Starts a kernel, with memory for the tensor descriptors that Hopper's write; the caller's own allocator stays."""
    context = contextvars.copy_context()
    context.run(
        triton.set_allocator, lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda")
    )
    sizes = dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), blocks, strict=True))
    context.run(kernel[(programs,)], *arguments, **constants, **sizes, enable_fp_fusion=True)


class Call:
    """One call's tensors as [B, S, H, D], and the arguments that all its kernels take."""

    def __init__(self, q, k, v, scale, left, right, softcap, cu_seqlens_q, cu_seqlens_k, key_lengths, dropout_p, seed):
        self.q, self.k, self.v = (batched(x) for x in (q, k, v))
        self.packed = cu_seqlens_q is not None
        self.sequences = cu_seqlens_q.numel() - 1 if self.packed else q.shape[0]
        if key_lengths is not None:
            key_lengths = _first_and_end(key_lengths, q.device)
        seed_there = seed is not None and seed.device == q.device and q.is_cuda  # elsewhere the host may read it
        drop = min(round(dropout_p * 65536), 65535)
        self.special = left is not None or softcap is not None or drop > 0
        self.pointers = [
            q if x is None else x for x in (cu_seqlens_q, cu_seqlens_k, key_lengths, seed if seed_there else None)
        ]  # q stands for what the kernel does not look at
        self.numbers = [
            self.sequences,
            self.q.shape[1],
            self.k.shape[1],
            *(NO_LIMIT if side is None else min(side, NO_LIMIT) for side in (left, right)),
            (softcap or scale) * LOG2_E,
            scale / softcap if softcap else 0.0,
            0 if seed is None or seed_there else int(seed),
            drop,
            1 / (1 - drop / 65536),
        ]
        D0, D1 = parts(q.shape[-1], q.element_size())
        self.constants = {
            "HEADS": self.q.shape[2],
            "GROUP": self.q.shape[2] // self.k.shape[2],
            "PACKED": self.packed,
            "PADDED": key_lengths is not None,
            "LEFT": left is not None,
            "RIGHT": right is not None,
            "SOFTCAP": softcap is not None,
            "DROPOUT": drop > 0,
            "SEED_THERE": seed_there,
            "PRECISION": "tf32" if q.is_cuda and torch.backends.cuda.matmul.allow_tf32 else "ieee",
            "D": q.shape[-1],
            "D0": D0,
            "D1": D1,
        }

    def blocks(self, kernel):
        q = self.q
        return blocks(kernel, architecture(q.device), q.shape[-1], q.element_size(), self.special)

    def pairs(self, x):
        """Heads of x [B, S, H, D] in all."""
        return x.shape[0] * x.shape[2]

    def tiles(self, x, block):
        """Tiles of the rows of x per pair; in a packed batch one more per sequence than may be needed."""
        return x.shape[1] // block + self.sequences if self.packed else triton.cdiv(x.shape[1], block)

    def section(self, heads, pairs):
        """How many pairs work side by side: those whose keys and values fit the cache."""
        k = self.k
        group = heads // k.shape[2]
        one = 2 * k.shape[1] * k.shape[3] * k.element_size()
        return min(max(L2_BYTES // one, 1) * group, pairs)


def _first_and_end(key_lengths, device):
    """int32 [B, 2] from [B] or [B, 2]."""
    if key_lengths.dim() == 1:
        key_lengths = torch.stack([torch.zeros_like(key_lengths), key_lengths], 1)
    return key_lengths.to(device, torch.int32).contiguous()
