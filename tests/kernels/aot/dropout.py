"""One block of each dtype that is a load of its own."""


def variants():
    from fastft_kernels.triton.dropout import BLOCK, WARPS

    for dtype in ("*bf16", "*fp32"):
        yield {
            "kernel": "fastft_kernels.triton.dropout:dropout_kernel",
            "signature": {
                "x_ptr": dtype,
                "y_ptr": dtype,
                "n": "i64",
                "threshold": "i32",
                "scale": "fp32",
                "seed": "i64",
            },
            "constants": {"BLOCK": BLOCK},
            "divisible_by_16": ["x_ptr", "y_ptr"],
            "num_warps": WARPS,
        }
