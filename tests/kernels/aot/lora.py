"""Every entry of the tables of block sizes: the product with one layer and with three, thin products of 16-bit matrices."""

LOW_RANK = "fastft_kernels.triton._lora_low_rank"
PRODUCT = "fastft_kernels.triton._lora_product"


def variants():
    from fastft_kernels.triton import _lora_config as config

    for (kind, arch), blocks in config.PRODUCT.items():
        layers = {"forward": [(1, 1)], "branch": [(1, 0), (3, 0)]}.get(kind, [(1, 1), (3, 3)])
        for counts in layers:
            if counts[1] and not config.FUSED_UP_TO[arch, kind == "masked"][counts[1] - 1]:
                continue
            yield product(kind, arch, *counts, *blocks)
    for (kind, arch), blocks in config.THIN.items():
        yield thin(kind, arch, *blocks)


def product(kind, arch, layers, products, block_m, block_n, block_k, warps, stages):
    from fastft_kernels.triton import _lora_config as config

    across, masked, described = kind == "forward", kind in ("masked", "branch"), arch > 80 and products > 0
    constants = {
        **{"LAYERS": layers, "PRODUCTS": products, "HAS_BIAS": across, "DROPOUT": masked, "ALIGNED": True},
        **{"DESCRIPTORS": described, "TRANSPOSED": across, "EVEN_COLS": True, "EVEN_DEPTH": True, "PRECISION": "ieee"},
        **{
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "BLOCK_R": config.BLOCK_R,
            "GROUP": config.GROUP,
        },
        **{f"{side}{i}_ptr": None for side in "xw" for i in range(products, config.LAYERS)},
        # Integers that are 1 are constants: the strides between adjacent elements.
        **dict.fromkeys(
            ["w0_depth", "w1_depth", "w2_depth", "v_rank"] if across else ["w0_col", "w1_col", "w2_col", "v_col"], 1
        ),
    }
    variant = described_by(f"{PRODUCT}:product_kernel", constants, arch, warps, stages)
    if described:
        w_block = (block_n, block_k) if across else (block_k, block_n)
        for side, block in (("x", (block_m, block_k)), ("w", w_block)):
            names = [f"{side}{i}_ptr" for i in range(products)]
            variant["signature"] |= dict.fromkeys(names, f"tensordesc<bf16[{block[0]},{block[1]}]>")
            variant["divisible_by_16"] = [name for name in variant["divisible_by_16"] if name not in names]
    return variant | {"expect": {"HGMMA": 1, "UTMALDG": 1} if products else {}}


def thin(kind, arch, block_m, block_n, warps, stages):
    from fastft_kernels.triton import _lora_config as config

    function = "down_kernel" if kind == "down" else "gradients_kernel"
    constants = {
        **({} if kind == "down" else {"DOWN": kind == "gradients"}),
        **{"DROPOUT": kind != "gradients", "ALIGNED": True, "PRECISION": "ieee"},
        **{"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_R": config.BLOCK_R},
        **dict.fromkeys({"down": ["v_col"], "gradients": ["v_rank", "up_rank"], "adapter": ["up_col"]}[kind], 1),
    }
    return described_by(f"{LOW_RANK}:{function}", constants, arch, warps, stages) | {"expect": {"HGMMA": 1}}


def described_by(kernel, constants, arch, warps, stages):
    """The variant whose tensors are bfloat16, but for sums, and whose strides and columns are multiples of 16."""
    import importlib

    module, function = kernel.split(":")
    names = [name for name in getattr(importlib.import_module(module), function).arg_names if name not in constants]
    kinds = {"down_ptr": "*fp32", "up_ptr": "*fp32"}
    signature = {
        name: kinds.get(name, "*bf16") if name.endswith("_ptr") else "i64" if name.startswith("seed") else "i32"
        for name in names
    }
    whole = (
        "_ptr",
        "_row",
        "_col",
        "_depth",
        "_rank",
        "n_cols",
        *(f"{name}{i}" for name in ("depth", "rank") for i in range(3)),
    )
    return {
        "kernel": kernel,
        "signature": signature,
        "constants": constants,
        "divisible_by_16": [name for name in names if name.endswith(whole)],
        "num_warps": warps,
        "num_stages": stages,
        "archs": [arch],
    }
