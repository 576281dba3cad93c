"""Whole heads, heads with a rest that is not turned, and a number of pairs that is no power of two; both ways."""


def variants():
    from fastft_kernels.triton.rope import WARPS, tiles

    tensors = ("q", "k", "q_out", "k_out")
    strides = [f"{x}_{of}" for x in tensors for of in ("batch", "token", "head")]
    strides += [f"{x}_{of}" for x in ("cos", "sin") for of in ("batch", "token")]
    pointers = [f"{x}_ptr" for x in (*tensors, "cos", "sin")]
    counts = dict.fromkeys(["q_blocks", "n_tokens", "all_tokens"], "i32")
    for size, half in ((128, 64), (64, 8), (96, 48)):
        for inverse in (False, True):
            yield {
                "kernel": "fastft_kernels.triton.rope:rope_kernel",
                "signature": dict.fromkeys(pointers, "*bf16") | dict.fromkeys(strides, "i32") | counts,
                "constants": {"HEADS_Q": 32, "HEADS_K": 8, "SIZE": size, "HALF": half, "INVERSE": inverse}
                | tiles(size, half),
                "divisible_by_16": [*pointers, *strides],
                "num_warps": WARPS,
            }
