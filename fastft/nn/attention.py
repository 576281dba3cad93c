"""Attention as a layer, for models with projections and positions of their own."""

from torch import nn

from fastft import ops
from fastft.ops import checks
from fastft.ops.attention import check_window


class FusedAttention(nn.Module):
    """o = dropout(softmax(scale * q kᵀ)) v, without a score matrix in memory; it has no parameters.

    causal, scale, window and softcap are those of `fastft.ops.attention`. Scores are dropped with probability `dropout`,
    0 <= dropout < 1, in training only.

    forward(q, k, v): q and o [B, S, H, D], k and v [B, S', H', D], H a multiple of H'; with `key_lengths`, int [B] or
    [B, 2], padded keys are not seen. Packed: [T, H, D] with `cu_seqlens_q`, int32 [n + 1]; keyword arguments and errors
    as in `fastft.ops.attention`.
    """

    def __init__(self, *, causal=False, scale=None, window=None, softcap=None, dropout=0.0):
        super().__init__()
        checks.flags("FusedAttention", causal=causal)
        checks.optional_numbers("FusedAttention", scale=scale, softcap=softcap)
        checks.numbers("FusedAttention", dropout=dropout)
        check_window("FusedAttention", window)
        if not 0 <= dropout < 1:
            raise ValueError(f"FusedAttention: dropout is {dropout}; it must be at least 0 and below 1")
        self.causal = causal
        self.scale = scale
        self.window = window
        self.softcap = softcap
        self.dropout = dropout

    def forward(
        self,
        q,
        k,
        v,
        *,
        key_lengths=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
    ):
        return ops.attention(
            q,
            k,
            v,
            causal=self.causal,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            key_lengths=key_lengths,
            dropout_p=self.dropout if self.training else 0.0,
        )

    def extra_repr(self):
        names = "causal", "scale", "window", "softcap", "dropout"
        return ", ".join(f"{name}={getattr(self, name)}" for name in names if getattr(self, name) not in (None, 0))
