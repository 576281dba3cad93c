"""Every entry of the tables of block sizes, with all that its kind may switch on: where registers are tightest."""

POINTERS = ("q_ptr", "k_ptr", "v_ptr", "o_ptr", "do_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
UNEVEN = {("half", 64): (48,), ("special", 64): (48,)}
"""head dimensions that share an entry, but have two parts"""
HOPPER_UNEVEN = {64: (48,), 112: (80,), 192: (160,)}
MODULES = {"forward": "attention", "dq": "_attention_dq", **dict.fromkeys(("dkdv", "dk", "dv"), "_attention_dkdv")}
FLOATS = ("factor", "inner", "kept", "scale")


def variants():
    from fastft_kernels.triton._attention_config import BLOCKS, SIZES

    for (kernel, arch, kind), row in BLOCKS.items():
        for D, blocks in zip(SIZES[kernel], row, strict=True):
            for size in (D, *UNEVEN.get((kind, D), ())):
                special = kind != "half"
                flags = {"LEFT": special, "SOFTCAP": special, "DROPOUT": special}
                yield variant(MODULES[kernel], kernel, arch, kind == "float", size, blocks, flags)
    yield from hopper_variants()


def hopper_variants():
    from fastft_kernels.triton._attention_config import SIZES
    from fastft_kernels.triton._attention_hopper import BLOCKS

    for (kernel, softcap), row in BLOCKS.items():
        module = f"_attention_hopper_{'dkdv' if kernel in ('dk', 'dv') else kernel}"
        for D, blocks in zip(SIZES[kernel], row, strict=True):
            for size in (D, *HOPPER_UNEVEN.get(D, ())):
                flags = {"LEFT": True, "SOFTCAP": softcap, "DROPOUT": False}
                compiled = variant(module, kernel, 90, False, size, blocks, flags)
                compiled["expect"] |= {"UTMALDG": 1} | ({"warps": 12} if kernel == "forward" else {})
                yield compiled


def variant(module, kernel, arch, is_float, D, blocks, flags):
    """A kernel with `flags`, packed and causal, in bfloat16 or float32."""
    import importlib

    from fastft_kernels.triton._attention_config import parts

    block_m, block_n, warps, stages = blocks
    function = "dkdv_kernel" if kernel in ("dkdv", "dk", "dv") else f"{kernel}_kernel"
    module = f"fastft_kernels.triton.{module}"
    names = getattr(importlib.import_module(module), function).arg_names
    D0, D1 = parts(D, 4 if is_float else 2)
    constants = {
        **{"HEADS": 32, "GROUP": 4, "PACKED": True, "PADDED": False, "LEFT": flags["LEFT"], "RIGHT": True},
        **{"SOFTCAP": flags["SOFTCAP"], "DROPOUT": flags["DROPOUT"], "SEED_THERE": False},
        **({"DK": "dk" in kernel, "DV": "dv" in kernel} if function == "dkdv_kernel" else {}),
        **{"PRECISION": "ieee", "D": D, "D0": D0, "D1": D1, "BLOCK_M": block_m, "BLOCK_N": block_n},
    }
    rows = block_n if function == "dkdv_kernel" else block_m  # of the products, which Hopper multiplies by 64 at least
    signature = {}
    for name in names:
        if name in POINTERS:
            signature[name] = "*fp32" if is_float else "*bf16"
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
        "expect": {"HGMMA": 1} if not is_float and rows >= 64 else {},
    }
