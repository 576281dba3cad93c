"""Both approximations, both ways, with a bias; backward also where the bias is frozen. Wide rows and the narrowest."""


def variants():
    from fastft_kernels.triton.gelu import WARPS, tile_of

    sizes = {"n_rows": "i32", "n_cols": "i32"}
    forward = {
        "kernel": "fastft_kernels.triton.gelu:forward_kernel",
        "signature": dict.fromkeys(["x_ptr", "bias_ptr", "y_ptr"], "*bf16") | {"x_stride": "i32"} | sizes,
        "constants": {"HAS_BIAS": True},
    }
    backward = {
        "kernel": "fastft_kernels.triton.gelu:backward_kernel",
        "signature": dict.fromkeys(["dy_ptr", "x_ptr", "bias_ptr", "dx_ptr"], "*bf16")
        | {"partial_ptr": "*fp32", "dy_stride": "i32", "x_stride": "i32"}
        | sizes,
        "constants": {"HAS_BIAS": True, "NEEDS_DBIAS": True},
    }
    frozen = backward | {"constants": {"HAS_BIAS": True, "NEEDS_DBIAS": False}}
    for kernel, activation, cols in (
        (forward, "gelu", 4096),
        (forward, "gelu_tanh", 4096),
        (backward, "gelu", 4096),
        (backward, "gelu_tanh", 4096),
        (backward, "gelu", 64),
        (frozen, "gelu", 4096),
    ):
        block_rows, block_cols = tile_of(cols)
        sizes = {"ACTIVATION": activation, "BLOCK_ROWS": block_rows, "BLOCK_COLS": block_cols}
        aligned = [name for name in kernel["signature"] if name.endswith(("_ptr", "_stride", "n_cols"))]
        yield kernel | {"constants": kernel["constants"] | sizes, "divisible_by_16": aligned, "num_warps": WARPS}
