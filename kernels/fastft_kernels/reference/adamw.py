"""AdamW (Loshchilov & Hutter, 2019) in plain PyTorch: what the kernels must compute, in float32 or float64.

    m = beta1 m + (1 - beta1) g      v = beta2 v + (1 - beta2) g^2
    w = (1 - lr weight_decay) w - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Lists of tensors, updated in place: weights, m, v float32; gradients of any float dtype; copies, rounded copies of the
weights, or None for a weight that is the parameter itself. `scalars` come from `scalars()` and are the same for all.
"""


def scalars(lr, beta1, beta2, eps, weight_decay, step, grad_divisor=1.0):
    """(grad_scale, decay, beta1, 1 - beta1, beta2, 1 - beta2, rate, root_scale, eps) of step 1, 2, ..., in double."""
    rate, root_scale = lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
    return (1 / grad_divisor, 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, rate, root_scale, eps)


def adamw(weights, grads, copies, ms, vs, scalars):
    scale, decay, beta1, rest1, beta2, rest2, rate, root_scale, eps = scalars
    for w, g, copy, m, v in zip(weights, grads, copies, ms, vs, strict=True):
        g = g.to(w.dtype) * scale
        m.mul_(beta1).add_(g * rest1)
        v.mul_(beta2).add_(g * g * rest2)
        w.mul_(decay).sub_(m / (v.sqrt() * root_scale + eps) * rate)
        if copy is not None:
            copy.copy_(w)


def square_sum(tensors):
    """The sum of squares of all elements of all tensors, as a float64 scalar tensor."""
    return sum(t.double().square().sum() for t in tensors)
