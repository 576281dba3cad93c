"""Longest rows of each number of warps, every optional part on: where registers are tightest."""


def variants():
    from fastft_kernels.triton.layer_norm import CONFIG, MAX_COLS, MAX_TRAINED_COLS

    shared = {"n_rows": "i32", "n_cols": "i32", "threshold": "i32", "scale": "fp32", "seed": "i64"}
    shared |= {"mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
    forward = {
        "kernel": "fastft_kernels.triton.layer_norm:forward_kernel",
        "signature": shared
        | dict.fromkeys(["x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "y_ptr", "h_ptr"], "*bf16")
        | dict.fromkeys(["x_stride", "residual_stride"], "i32")
        | {"eps": "fp32"},
        "constants": {"HAS_RESIDUAL": True, "HAS_DROPOUT": True, "HAS_BIAS": True, "ALIGNED": True},
    }
    backward = {
        "kernel": "fastft_kernels.triton.layer_norm:backward_kernel",
        "signature": shared
        | dict.fromkeys(["dy_ptr", "dh_ptr", "h_ptr", "weight_ptr", "dx_ptr", "dresidual_ptr"], "*bf16")
        | dict.fromkeys(["dy_stride", "dh_stride", "h_stride"], "i32")
        | {"partial_ptr": "*fp32"},
        "constants": {
            "HAS_DH": True,
            "HAS_DROPOUT": True,
            "NEEDS_DRESIDUAL": True,
            "NEEDS_DWEIGHT": True,
            "NEEDS_DBIAS": True,
            "ALIGNED": True,
        },
    }
    frozen = backward | {"constants": backward["constants"] | {"NEEDS_DWEIGHT": False, "NEEDS_DBIAS": False}}
    for kernel, sizes in ((forward, [128, MAX_COLS]), (backward, [128, 2048, MAX_TRAINED_COLS]), (frozen, [MAX_COLS])):
        aligned = [name for name in kernel["signature"] if name.endswith(("_ptr", "_stride", "n_cols"))]
        for cols in sizes:
            block_rows, warps = CONFIG[cols]
            constants = kernel["constants"] | {"BLOCK_ROWS": block_rows, "BLOCK_COLS": cols}
            yield kernel | {"constants": constants, "divisible_by_16": aligned, "num_warps": warps}
