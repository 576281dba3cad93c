"""fastft.nn.LoRALinear: what it computes, trains and merges to."""

import pytest
import torch
from torch import nn

import fastft.nn


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_starts_as_the_layer_it_wraps_and_merges_to_what_it_became(bias, use_dora):
    linear = nn.Linear(12, 7, bias)
    layer = fastft.nn.LoRALinear.from_linear(linear, r=3, lora_alpha=6, use_rslora=True, use_dora=use_dora)
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(layer(x), linear(x))
    assert layer.weight is linear.weight and layer.scale == pytest.approx(6 / 3**0.5)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    before = {name: p.clone() for name, p in layer.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    moved = {name for name, p in layer.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"lora_A", "lora_B"} | ({"lora_magnitude"} if use_dora else set())
    torch.testing.assert_close(layer.merge()(x), layer(x), rtol=1e-5, atol=1e-5)


def test_dropout_is_for_training():
    layer = fastft.nn.LoRALinear(12, 7, r=3, lora_dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 12)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"r": 0}, "r is 0; it must be at least 1"), ({"lora_dropout": 1.0}, "lora_dropout is 1.0; .* below 1")],
)
def test_bad_settings(bad, message):
    with pytest.raises(ValueError, match=message):
        fastft.nn.LoRALinear(12, 7, **bad)
