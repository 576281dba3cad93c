"""Every activation, both ways."""


def variants():
    from fastft_kernels.triton.gated_activation import BLOCK, WARPS

    sides = {"forward": ["gate", "up", "y"], "backward": ["dy", "gate", "up", "dgate", "dup"]}
    for direction, tensors in sides.items():
        strides = [f"{name}_stride" for name in tensors if name in ("dy", "gate", "up")]
        pointers = [f"{name}_ptr" for name in tensors]
        for activation in ("silu", "gelu", "gelu_tanh"):
            yield {
                "kernel": f"fastft_kernels.triton.gated_activation:{direction}_kernel",
                "signature": dict.fromkeys(pointers, "*bf16") | dict.fromkeys(strides, "i32") | {"n_cols": "i32"},
                "constants": {"ACTIVATION": activation, "BLOCK": BLOCK},
                "divisible_by_16": [*pointers, *strides, "n_cols"],
                "num_warps": WARPS,
            }
