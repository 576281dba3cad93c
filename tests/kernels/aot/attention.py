"""Every entry of the tables of block sizes, with all that its kind may switch on: where registers are tightest."""

POINTERS = ("q_ptr", "k_ptr", "v_ptr", "o_ptr", "do_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
UNEVEN = {("half", 64): (48,), ("special", 64): (48,)}
"""head dimensions that share an entry, but have two parts"""
FLOATS = ("factor", "inner", "kept", "scale")


def variants():
    from fastft_kernels.triton._attention_config import BLOCKS, SIZES

    for (kernel, arch, kind), row in BLOCKS.items():
        for D, blocks in zip(SIZES[kernel], row, strict=True):
            for size in (D, *UNEVEN.get((kind, D), ())):
                yield variant(kernel, arch, kind, size, *blocks)


def variant(kernel, arch, kind, D, block_m, block_n, warps, stages):
    """kind: `half` without and `special` with left window, softcap and dropout, in bfloat16; `float` with them, in float32."""
    import importlib

    from fastft_kernels.triton._attention_config import parts

    function = "dkdv_kernel" if kernel in ("dkdv", "dk", "dv") else f"{kernel}_kernel"
    file = {"forward_kernel": "attention", "dkdv_kernel": "_attention_dkdv", "dq_kernel": "_attention_dq"}[function]
    module = f"fastft_kernels.triton.{file}"
    names = getattr(importlib.import_module(module), function).arg_names
    D0, D1 = parts(D, 4 if kind == "float" else 2)
    constants = {
        **{"HEADS": 32, "GROUP": 4, "PACKED": True, "PADDED": False, "LEFT": kind != "half", "RIGHT": True},
        **{"SOFTCAP": kind != "half", "DROPOUT": kind != "half", "SEED_THERE": False},
        **({"DK": "dk" in kernel, "DV": "dv" in kernel} if function == "dkdv_kernel" else {}),
        **{"PRECISION": "ieee", "D": D, "D0": D0, "D1": D1, "BLOCK_M": block_m, "BLOCK_N": block_n},
    }
    rows = block_n if function == "dkdv_kernel" else block_m  # of the products, which Hopper multiplies by 64 at least
    signature = {}
    for name in names:
        if name in POINTERS:
            signature[name] = "*fp32" if kind == "float" else "*bf16"
        elif name in ("cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "key_lengths_ptr", "seed_ptr"):
            signature[name] = "*i64" if name == "seed_ptr" else "*i32"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32"
        elif name in FLOATS:
            signature[name] = "fp32"
        elif name not in constants:
            signature[name] = "i64" if name == "seed" else "i32"
    aligned = [name for name in names if name.endswith(("_ptr", "_batch", "_row", "_head"))]
    return {
        "kernel": f"{module}:{function}",
        "signature": signature,
        "constants": constants,
        "divisible_by_16": [name for name in aligned if not name.startswith("lse_")],
        "num_warps": warps,
        "num_stages": stages,
        "archs": [arch],
        "expect": {"HGMMA": 1} if kind != "float" and rows >= 64 else {},
    }
