"""fastft.nn.RotaryEmbedding: the angles of transformers' Llama, padded and packed."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import fastft


def test_as_in_a_llama():
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    )
    q, k = torch.randn(2, 9, 4, 16, requires_grad=True), torch.randn(2, 9, 2, 16)
    positions = torch.tensor([[*range(9)], [*range(3), *range(6)]])
    layer = fastft.nn.RotaryEmbedding(16, theta=500.0)
    for position_ids in (None, positions):
        cos, sin = LlamaRotaryEmbedding(config)(q, positions[:1] if position_ids is None else position_ids)
        expected = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
        results = layer(q, k, position_ids)
        for ours, theirs in zip(results, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        (dq,), (wanted,) = (torch.autograd.grad(y[0].sin().sum(), q) for y in (results, expected))
        torch.testing.assert_close(dq, wanted)
    packed = layer(q.flatten(0, 1), k.flatten(0, 1), positions.flatten())
    for flat, rows in zip(packed, results, strict=True):
        assert torch.equal(flat, rows.flatten(0, 1))


def test_part_of_a_head():
    q, k = torch.randn(1, 3, 2, 10).bfloat16(), torch.randn(1, 3, 1, 10).bfloat16()
    turned, _ = results = fastft.nn.RotaryEmbedding(4)(q, k)
    assert torch.equal(turned[..., 4:], q[..., 4:]) and not torch.equal(turned[:, 1:, :, :4], q[:, 1:, :, :4])
    assert torch.equal(turned[:, 0], q[:, 0]) and all(x.dtype == torch.bfloat16 for x in results)


def test_bad_arguments():
    with pytest.raises(ValueError, match="dim is 5; it must be a positive even number"):
        fastft.nn.RotaryEmbedding(5)
    with pytest.raises(ValueError, match="packed q and k need position_ids"):
        fastft.nn.RotaryEmbedding(4)(torch.ones(3, 2, 4), torch.ones(3, 2, 4))
