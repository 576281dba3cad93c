"""Reading 4-bit weights into each kind of tensor, and quantising them."""


def variants():
    from fastft_kernels.triton.nf4 import BYTES, WARPS

    pointers = {name: "*fp32" for name in ("map_ptr", "nested_ptr", "values_ptr")}
    for dtype in ("*bf16", "*fp32"):
        for double in (True, False):
            yield {
                "kernel": "fastft_kernels.triton.nf4:dequantize_kernel",
                "signature": {
                    "codes_ptr": "*u8",
                    "absmax_ptr": "*u8" if double else "*fp32",
                    **pointers,
                    "y_ptr": dtype,
                    "offset": "fp32",
                    "numel": "i64",
                },
                "constants": {"BLOCK": 64, "DOUBLE": double, "BYTES": BYTES},
                "divisible_by_16": ["codes_ptr", "y_ptr"],
                "num_warps": WARPS,
                "enable_fp_fusion": False,
            }
    pointers = {"x_ptr": "*bf16", "values_ptr": "*fp32", "codes_ptr": "*u8", "absmax_ptr": "*fp32"}
    yield {
        "kernel": "fastft_kernels.triton.nf4:quantize_kernel",
        "signature": {**pointers, "numel": "i64"},
        "constants": {"BLOCK": 64},
        "num_warps": 1,
        "enable_fp_fusion": False,
    }
