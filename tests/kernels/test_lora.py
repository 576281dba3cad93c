"""LoRA: the reference against PEFT and float64, and the C++ dropout mask against the reference."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from fastft_kernels.cpp import extension
from fastft_kernels.reference.lora import apply_mask, keep_probability, lora_linear, lora_mlp

needs_extension = pytest.mark.skipif(extension.C is None, reason=str(extension.missing))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_reference_computes_what_peft_does(dtype, adapters):
    model = nn.ModuleDict({"proj": nn.Linear(13, 7)}).to(dtype)
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, target_modules=["proj"], init_lora_weights=False), model)
    layer = model["proj"]
    layer.lora_A.to(adapters), layer.lora_B.to(adapters)
    x = torch.randn(2, 5, 13).to(dtype)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert torch.equal(lora_linear(x, layer.base_layer.weight, layer.base_layer.bias, a, b, 2.0), layer(x))


def test_reference_numerically():
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64, requires_grad=True)
    layer = lambda out, columns: (draw(out, columns), draw(out), draw(2, columns), draw(out, 2))
    flat = [draw(3, 4), *layer(5, 4), *layer(5, 4), *layer(4, 5)]
    run = lambda x, *t: lora_mlp(x, *((*t[i : i + 4], 0.5) for i in (0, 4, 8)), "gelu_tanh", 0.25, (1, 2, 3))
    assert torch.autograd.gradcheck(run, flat)


def test_dropout_keeps_the_expectation():
    x = torch.ones(1000, 100)
    y = apply_mask(x, 0.1, 5) / keep_probability(0.1)
    kept = y[y > 0]
    assert kept.unique().numel() == 1 and abs(kept.numel() / x.numel() - 0.9) < 0.005
    assert abs(y.mean() - 1) < 0.005
    assert not torch.equal(apply_mask(x, 0.1, 6) > 0, y > 0)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5, 37), (130,), (257, 128)])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_mask_in_cpp(dtype, shape, p, poisoned):
    from fastft_kernels.cpp.lora import apply_mask as compiled

    x = torch.randn(shape).to(dtype)
    assert torch.equal(compiled(x, p, 2**62 + 5), apply_mask(x, p, 2**62 + 5))


@needs_extension
def test_mask_in_cpp_is_the_same_for_any_threads_and_instruction_set():
    from fastft_kernels.cpp.lora import apply_mask as compiled

    x, threads, best = torch.randn(300, 333), torch.get_num_threads(), extension.C.isa()
    expected = compiled(x, 0.1, -7)
    assert torch.equal(expected, apply_mask(x, 0.1, -7))
    try:
        for isa in extension.C.isas():
            extension.C.set_isa(isa)
            for count in (1, 3):
                torch.set_num_threads(count)
                assert torch.equal(compiled(x.t().contiguous().t(), 0.1, -7), expected)
    finally:
        extension.C.set_isa(best)
        torch.set_num_threads(threads)
