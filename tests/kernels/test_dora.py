"""DoRA: the reference against PEFT and float64, and the C++ kernels against the reference."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from fastft_kernels.cpp import extension
from fastft_kernels.reference import dora as reference
from fastft_kernels.reference.lora import lora_linear

needs_extension = pytest.mark.skipif(extension.C is None, reason=str(extension.missing))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_reference_computes_what_peft_does(dtype, adapters, bias):
    """To rounding: PEFT rounds B A and its sum with W before it takes the norm."""
    model = nn.ModuleDict({"proj": nn.Linear(13, 7, bias)}).to(dtype)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["proj"], init_lora_weights=False, use_dora=True)
    inject_adapter_in_model(config, model)
    layer = model["proj"].to(adapters)
    layer.base_layer.to(dtype)
    x = torch.randn(2, 5, 13).to(dtype)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    magnitude.data *= torch.linspace(0.5, 2, 7).to(adapters)
    ours = lora_linear(x, layer.base_layer.weight, layer.base_layer.bias, a, b, 2.0, magnitude)
    eps = max(torch.finfo(dtype).eps, torch.finfo(adapters).eps)
    torch.testing.assert_close(ours, layer(x), rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_reference_numerically(p):
    """The norm is a constant for the gradient: it is given as one."""
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64, requires_grad=True)
    tensors = [draw(3, 4), draw(5, 4), draw(5), draw(2, 4), draw(5, 2), draw(5)]
    norms = reference.row_norms(tensors[1], tensors[3], tensors[4], 0.5)
    torch.testing.assert_close(norms, (tensors[1] + 0.5 * tensors[4] @ tensors[3]).norm(dim=1).detach())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastft_kernels.reference.lora.row_norms", lambda *_: norms)
        run = lambda x, w, bias, a, b, m: lora_linear(x, w, bias, a, b, 0.5, m, p, 1)
        assert torch.autograd.gradcheck(run, tensors)


def draw(shape, dtype):
    return torch.randn(shape).to(dtype), torch.randn(shape[-1]), torch.randn(shape[-1]).to(dtype)


SHAPES = [(0, 5), (1, 1), (3, 5, 37), (130, 64), (257, 200)]


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_in_cpp(dtype, shape, poisoned, no_worse):
    from fastft_kernels.cpp import dora

    (z, gain, bias), (u, gain_u, _) = draw(shape, dtype), draw(shape, dtype)
    strided = torch.stack([z, u], -1)[..., 0]
    for arguments in ((z, gain, None), (z, gain, bias.float()), (strided, gain, bias, u, gain_u)):
        exact = reference.forward(*(None if t is None else t.double() for t in arguments))
        no_worse("y", dora.forward(*arguments), reference.forward(*arguments), exact)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_in_cpp(dtype, shape, poisoned, no_worse):
    from fastft_kernels.cpp import dora

    (dy, gain, _), (z, *_) = draw(shape, dtype), draw(shape, dtype)
    ours, plain = dora.backward(dy, z, gain, True), reference.backward(dy, z, gain, True)
    flat = lambda t: t.double().reshape(-1, t.shape[-1])
    terms = flat(dy) * flat(z)
    no_worse("dz", ours[0], plain[0], flat(dy) * gain.double())
    for name, one, other, summed in (("dgain", ours[1], plain[1], terms), ("dbias", ours[2], plain[2], flat(dy))):
        no_worse(name, one, other, summed.sum(0), scale=float(summed.abs().sum(0).max()) if summed.numel() else 0)
    assert dora.backward(dy.expand(2, *dy.shape), None, gain, False)[1:] == (None, None)


@needs_extension
def test_cpp_is_the_same_for_any_threads_and_instruction_set():
    from fastft_kernels.cpp import dora

    (dy, gain, bias), (z, *_), threads, best = (
        draw((300, 333), torch.bfloat16),
        draw((300, 333), torch.bfloat16),
        torch.get_num_threads(),
        extension.C.isa(),
    )
    expected = [dora.forward(z, gain, bias), *dora.backward(dy, z, gain, True)]
    try:
        for isa in extension.C.isas():
            extension.C.set_isa(isa)
            for count in (1, 3):
                torch.set_num_threads(count)
                ours = [dora.forward(z, gain, bias), *dora.backward(dy, z, gain, True)]
                assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    finally:
        extension.C.set_isa(best)
        torch.set_num_threads(threads)
