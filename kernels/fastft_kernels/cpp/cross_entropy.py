"""Cross-entropy on the CPU: Python face of csrc/cpu/cross_entropy.cpp. Equation: reference/cross_entropy.py.

logits: [rows, cols], one of float32, bfloat16, float16, adjacent elements in a row; overwritten by their gradient.
The numbers do not depend on the thread count or the instruction set.

Bytes moved, for n elements of s bytes: n s, and with the gradient 2 n s.
"""

import torch

from fastft_kernels.cpp.extension import DTYPES, C, address, row_stride


def forward(logits, labels, scale, ignore_index, label_smoothing, softcap, z_loss, needs_gradient):
    """(loss, log_prob, correct, entropy), and `logits` become their gradient, where asked for."""
    labels = labels.contiguous()
    scale = None if scale is None else scale.contiguous()
    loss, log_prob, entropy = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(3))
    correct = logits.new_empty(logits.shape[0], dtype=torch.bool)
    C.cross_entropy_forward(
        address(logits),
        row_stride(logits),
        address(labels),
        address(scale),
        address(loss),
        address(log_prob),
        address(correct),
        address(entropy),
        *logits.shape,
        ignore_index,
        label_smoothing,
        softcap or 0.0,
        z_loss,
        needs_gradient,
        DTYPES[logits.dtype],
        torch.get_num_threads(),
    )
    return loss, log_prob, correct, entropy
