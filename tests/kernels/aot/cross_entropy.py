"""The largest block, with and without the gradient and the softcap."""


def variants():
    from fastft_kernels.triton.cross_entropy import MAX_BLOCK, WARPS

    signature = (
        {"logits_ptr": "*bf16", "labels_ptr": "*i64", "correct_ptr": "*i1"}
        | dict.fromkeys(["scale_ptr", "loss_ptr", "log_prob_ptr", "entropy_ptr"], "*fp32")
        | dict.fromkeys(["stride", "n_cols", "ignore_index"], "i32")
        | dict.fromkeys(["smoothing", "softcap", "z_loss"], "fp32")
    )
    aligned = [name for name in signature if name.endswith(("_ptr", "stride", "n_cols"))]
    for gradient, cap in ((True, False), (True, True), (False, True)):
        yield {
            "kernel": "fastft_kernels.triton.cross_entropy:forward_kernel",
            "signature": signature,
            "constants": {"HAS_SCALE": True, "HAS_SOFTCAP": cap, "NEEDS_GRADIENT": gradient, "BLOCK": MAX_BLOCK},
            "divisible_by_16": aligned,
            "num_warps": WARPS,
        }
