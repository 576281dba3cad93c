"""LoRA on the GPU: which products a kernel takes over from cuBLAS, and block sizes by architecture.

NOTHING HERE WAS MEASURED ON A GPU. Block sizes are the largest tried that compile without spilling
(tests/kernels/aot/lora.py). Which products to fuse, FUSED_UP_TO, is predicted from two numbers:

RIDGE, FLOPs in the time of a byte: 270 TFLOP/s over 1.84 TB/s on an A100 80 GB, 788 over 4.3 on an H200, 1580 over 7.2 on
a B200, which half-precision products and nine tenths of the bandwidth are taken to give. A product of layers 1 ... n with
its low-rank term in the accumulator saves 2 n - 1 passes over its result: writing the term, and reading and writing the
result for each layer after the first. (cuBLAS reads it for the first, too, which is taken to be hidden.) It pays where
the kernel reaches 1 / (1 + (2 n - 1) * RIDGE / depth) of cuBLAS's speed.

EFFICIENCY, what the kernel will reach of that, is taken from what others measured of Triton's own matrix product, and with
a mask, whose tile is half as large, assumed to be a tenth less:

    sm_80   0.94   0.89 to 0.99 at 2176 and more, triton-lang/triton#6523
    sm_90   0.94   one tile a program: 0.945 with pointers, in 8 bits. Descriptors bring 3.5 % more, in 16 bits 13 %, to
                   programs of many tiles, triton-lang/triton#5461
    sm_100  0.80   a guess: there one warp should issue products while others load and store, and here all do all

Whoever has measured an entry of FUSED_UP_TO writes what he found in its place, and takes it out of its test.
"""

import torch

from fastft_kernels.triton._lora_product import LAYERS

RIDGE = {80: 147, 90: 183, 100: 220}
EFFICIENCY = {80: 0.94, 90: 0.94, 100: 0.80}
MASKED = 0.1

# (architecture, with a mask) -> the depth in all, for 1, 2, 3 layers, up to which the fused kernel is taken. 0: it spills.
FUSED_UP_TO = {
    (80, False): (2303, 6909, 11515),
    (80, True): (771, 2315, 3858),
    (90, False): (2867, 8601, 14335),
    (90, True): (960, 0, 0),
    (100, False): (880, 2640, 4400),
    (100, True): (513, 0, 0),
}

MIN_ROWS, MIN_COLS = 1024, 1024
"""of a fused product: below, tiles are too few for the GPU, and cuBLAS splits the depth"""

MAX_RANK = 64
"""of a layer: above, the low-rank products are large enough for cuBLAS"""

BLOCK_R = 32
"""ranks in a step: fewer are padded to it, more take several"""

# (kernel, architecture) -> (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages); `branch` is the masked low-rank term alone.
PRODUCT = {
    ("forward", 80): (128, 256, 64, 8, 3),
    ("input", 80): (128, 256, 64, 8, 3),
    ("masked", 80): (128, 128, 64, 8, 3),
    ("branch", 80): (64, 64, 64, 4, 1),
    ("forward", 90): (128, 256, 64, 8, 4),
    ("input", 90): (128, 256, 64, 8, 4),
    ("masked", 90): (128, 128, 64, 8, 4),
    ("branch", 90): (64, 64, 64, 4, 1),
    ("forward", 100): (128, 256, 64, 8, 4),
    ("input", 100): (128, 256, 64, 8, 4),
    ("masked", 100): (128, 128, 64, 4, 4),
    ("branch", 100): (64, 64, 64, 4, 1),
}

# (kernel, architecture) -> (BLOCK_M, BLOCK_N, warps, stages); `gradients` is dS with dB, `adapter` dA.
THIN = {
    ("down", 80): (64, 128, 4, 3),
    ("gradients", 80): (32, 256, 4, 3),
    ("adapter", 80): (64, 128, 4, 3),
    ("down", 90): (64, 128, 4, 3),
    ("gradients", 90): (64, 256, 8, 3),
    ("adapter", 90): (64, 128, 4, 3),
    ("down", 100): (64, 128, 4, 3),
    ("gradients", 100): (64, 256, 8, 3),
    ("adapter", 100): (64, 128, 4, 2),
}

MAX_STRIDE = 2**23
"""of rows: a tile of 256 of them spans less than 2^31 elements"""

GROUP = 8
"""tiles of rows that go over the columns together: their x and the W of a column fit the L2 cache"""

PROGRAMS_PER_SM = 2
"""of the thin products, which wait for memory"""

ARCHITECTURES = {(8, 0): 80, (9, 0): 90, (10, 0): 100, (10, 3): 100}
"""compute capability -> architecture. The others have less shared memory than the tables take: cuBLAS serves them."""

INTERPRETER = None
"""the architecture of a CPU: small blocks, and nothing is left to PyTorch"""


def architecture(device):
    return ARCHITECTURES.get(torch.cuda.get_device_capability(device), 0) if device.type == "cuda" else INTERPRETER


def product_blocks(kernel, device):
    arch = architecture(device)
    return (32, 64, 32, 4, 1) if arch is INTERPRETER else PRODUCT[kernel, arch]


def thin_blocks(kernel, device):
    arch = architecture(device)
    return (32, 64, 4, 1) if arch is INTERPRETER else THIN[kernel, arch]


def takes_thin(x, ranks, fewer_bytes):
    """Whether a kernel is to compute a thin product of x. fewer_bytes: than PyTorch's products read and write."""
    arch = architecture(x.device)
    if len(ranks) > LAYERS or not x.numel():
        return False
    return arch is INTERPRETER or (fewer_bytes and _serves(arch, ranks, x.dtype, [x]))


def takes_product(low, xs, weights, n_cols, ranks, masked):
    """Whether a kernel is to compute the sum of low-rank terms and of xs[i] times weights[i], if any, in one."""
    arch = architecture(low.device)
    if len(ranks) > LAYERS or not all(t.numel() for t in (low, *xs, *weights)):
        return False
    if arch is INTERPRETER:
        return True
    if not _serves(arch, ranks, low.dtype, xs + weights) or n_cols % 8 != 0:
        return False
    if not xs:
        return masked  # without a mask it is a product like any other
    depth = sum(x.shape[1] for x in xs)
    _, block_n, block_k, *_ = PRODUCT["input", arch]
    if arch == 80 and (n_cols % block_n or any(x.shape[1] % block_k for x in xs)):  # masks in each step take registers
        return False
    return low.shape[0] >= MIN_ROWS and n_cols >= MIN_COLS and depth <= FUSED_UP_TO[arch, masked][len(xs) - 1]


def _serves(arch, ranks, dtype, matrices):
    known = arch in RIDGE and max(ranks) <= MAX_RANK and dtype != torch.float32
    return known and all(map(_is_aligned, matrices))


def describes(matrices):
    """Whether tensor descriptors stand for these: on Hopper and later, and in the interpreter, where they can."""
    return bool(matrices) and architecture(matrices[0].device) != 80 and all(map(_is_aligned, matrices))


def _is_aligned(x):
    """Whether the rows of `x` begin and end at multiples of 16 bytes, as copies of whole tiles want them."""
    return x.data_ptr() % 16 == 0 and all(n * x.element_size() % 16 == 0 for n in (x.stride(0), x.shape[1]))


def parallel(device, programs):
    """Into how many parts to split a thin product of so many programs; under the interpreter any number would do."""
    if device.type != "cuda":
        return 1
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, PROGRAMS_PER_SM * count // programs)
