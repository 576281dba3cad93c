"""Softmax cross-entropy of rows of logits: what the kernels must compute.

    z       = softcap * tanh(logits / softcap)                      (logits themselves without a softcap)
    lse     = log(sum(exp(z)))
    loss    = (1 - s) * (lse - z[label]) + s * (lse - mean(z)) + z_loss * lse ** 2        with s = label_smoothing
    dlogits = scale * (exp(z - lse) * (1 + 2 * z_loss * lse) - (1 - s) * onehot(label) - s / cols) * (1 - (z / softcap) ** 2)

and of the same pass, as statistics without a gradient: log_prob = z[label] - lse, correct = the first largest z is the
label's, entropy = lse - sum(exp(z - lse) * z).

logits: [rows, cols], float32, bfloat16, float16 or float64; labels: int64 [rows]; all results: [rows] in float32 (float64
for float64), correct: bool. Rows whose label is `ignore_index` give zeros and False. A label outside [0, cols) gives NaN.
"""

import torch


def cross_entropy(logits, labels, ignore_index=-100, label_smoothing=0.0, softcap=None, z_loss=0.0):
    """(loss, log_prob, correct, entropy); loss and log_prob are differentiable, any number of times."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    kept = labels != ignore_index
    inside = (labels >= 0) & (labels < z.shape[1])
    at = torch.where(inside, labels, 0)[:, None]
    lse = z.logsumexp(1)
    log_prob = torch.where(inside, z.gather(1, at)[:, 0] - lse, torch.nan)
    loss = -log_prob
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * (lse - z.mean(1))
    if z_loss:
        loss = loss + z_loss * lse.square()
    correct = (z.argmax(1) == labels) & kept
    p = torch.exp(z.detach() - lse.detach()[:, None])
    entropy = lse.detach() - torch.where(p > 0, p * z.detach(), 0).sum(1)
    return tuple(torch.where(kept, t, 0) for t in (loss, log_prob)) + (correct, torch.where(kept, entropy, 0))


def forward(logits, labels, scale, ignore_index, label_smoothing, softcap, z_loss, needs_gradient):
    """(loss, log_prob, correct, entropy), and `logits` become their gradient, where asked for.

    scale: what the gradient of each row is multiplied by, in the dtype of the results; None for 1.
    """
    results = cross_entropy(logits, labels, ignore_index, label_smoothing, softcap, z_loss)
    if not needs_gradient or logits.numel() == 0:
        return results
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    slope = 1.0
    if softcap is not None:
        t = torch.tanh(z / softcap)
        z, slope = softcap * t, 1 - t * t
    lse = z.logsumexp(1, keepdim=True)
    g = torch.exp(z - lse) * (1 + 2 * z_loss * lse) - label_smoothing / z.shape[1]
    at = labels.clamp(0, z.shape[1] - 1)[:, None]
    g.scatter_add_(1, at, torch.full_like(lse, label_smoothing - 1))
    g = g * slope if scale is None else g * slope * scale[:, None]
    logits.copy_(torch.where((labels == ignore_index)[:, None], 0, g))
    return results
