"""fastft.nn.FusedAttention in a small model of one's own, against PyTorch's attention."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastft
from fastft.nn import FusedAttention


class Block(nn.Module):
    """Self-attention as people write it: a projection for q, k and v, four heads, a projection back."""

    def __init__(self, **settings):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.attend = FusedAttention(**settings)

    def split(self, x):
        return self.qkv(x).unflatten(-1, (3, 4, 8)).unbind(-3)

    def forward(self, x, **sequences):
        return self.out(self.attend(*self.split(x), **sequences).flatten(-2))


def by_torch(block, x):
    q, k, v = (t.transpose(1, 2) for t in block.split(x))
    return block.out(F.scaled_dot_product_attention(q, k, v, is_causal=block.attend.causal).transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("causal", [False, True])
def test_equals_pytorch(causal):
    block, x = Block(causal=causal), torch.randn(2, 7, 32)
    results = []
    for out in (block(x), by_torch(block, x)):
        results.append((out, *torch.autograd.grad(out.square().sum(), list(block.parameters()))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_padded_and_packed_are_the_same():
    block, x, lengths = Block(window=(2, 2), softcap=3.0, scale=0.4), torch.randn(3, 9, 32), [9, 4, 1]
    padded = block(x, key_lengths=torch.tensor(lengths))
    packed = block(
        torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)]),
        cu_seqlens_q=torch.tensor([0, 9, 13, 14], dtype=torch.int32),
        max_seqlen_q=9,
        max_seqlen_k=9,
    )
    torch.testing.assert_close(
        packed, torch.cat([row[:n] for row, n in zip(padded, lengths, strict=True)]), rtol=1e-5, atol=1e-5
    )


def test_dropout_in_training_only():
    layer, x = FusedAttention(dropout=0.5), torch.randn(1, 6, 2, 8)
    assert not torch.equal(layer(x, x, x), layer(x, x, x))
    layer.eval()
    assert torch.equal(layer(x, x, x), fastft.ops.attention(x, x, x))


def test_has_no_state_and_says_what_it_does():
    layer = FusedAttention(causal=True, dropout=0.1)
    assert not layer.state_dict()
    assert repr(layer) == "FusedAttention(causal=True, dropout=0.1)"
    with pytest.raises(ValueError, match=r"dropout is 1\.0; it must be at least 0 and below 1"):
        FusedAttention(dropout=1.0)
