"""fastft.ops.*_nf4 and fastft.nn.Linear4bit: values, gradients, one buffer, state dicts in bitsandbytes' format, bad input."""

import copy
import json
import threading

import pytest
import torch
from torch import nn

import fastft
import fastft.nn
from fastft import ops
from fastft.ops import nf4

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def quantized(out, columns, dtype=torch.float32, **options):
    weight = (torch.randn(out, columns) * columns**-0.5).to(dtype)
    return ops.quantize_nf4(weight, **options)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_there_and_back(dtype, double_quant):
    weight = torch.randn(33, 70).to(dtype)
    made = ops.quantize_nf4(weight, double_quant=double_quant)
    back = ops.dequantize_nf4(made)
    assert back.dtype == dtype and back.shape == weight.shape
    error = (back.float() - weight.float()).norm() / weight.float().norm()
    assert 0.05 < error < 0.12  # of normal numbers, 0.09
    for other in FLOATS:
        out = torch.full((33, 70), float("nan"), dtype=other)
        assert ops.dequantize_nf4(made, out=out) is out
        assert torch.equal(out, ops.dequantize_nf4(made, torch.float32).to(other))
    again = ops.quantize_nf4(back.float(), double_quant=False)
    if not double_quant and dtype == torch.float32:
        assert torch.equal(again.codes, made.codes) and torch.equal(again.absmax, made.absmax)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_linear_is_no_worse_than_pytorch_of_the_same_weight(dtype, bias):
    made = quantized(31, 66, dtype)
    exact = ops.dequantize_nf4(made, torch.float32).double()
    x = torch.randn(5, 3, 66, 2)[..., 0].to(dtype).requires_grad_()
    b = torch.randn(31).to(dtype).requires_grad_() if bias else None
    dy = torch.randn(3, 31).to(dtype).expand(5, 3, 31)
    leaves = [x] if b is None else [x, b]

    def run(function, cast=lambda t: t):
        y = function(cast(x), None if b is None else cast(b))
        return [y, *torch.autograd.grad(y, leaves, cast(dy))]

    truth = run(lambda x, b: nn.functional.linear(x, exact, b), lambda t: t.double())
    plain = run(lambda x, b: nn.functional.linear(x, ops.dequantize_nf4(made, dtype), b))
    for ours, theirs, true in zip(run(lambda x, b: ops.nf4_linear(x, made, b)), plain, truth, strict=True):
        assert ours.dtype == dtype
        worst = (theirs.double() - true).abs().max() + 2 * torch.finfo(dtype).eps * true.abs().max()
        assert (ours.double() - true).abs().max() <= worst


def test_lora_of_a_4_bit_weight_is_lora_of_its_values():
    made = [quantized(24, 20), quantized(24, 20), quantized(20, 24)]
    x = torch.randn(2, 7, 20, requires_grad=True)
    low_rank = [
        (torch.randn(3, W.shape[1], requires_grad=True), torch.randn(W.shape[0], 3, requires_grad=True)) for W in made
    ]

    def run(weights, function):
        y = function(x, *((W, None, a, b, 0.5) for W, (a, b) in zip(weights, low_rank, strict=True)))
        return [y, *torch.autograd.grad(y.square().sum(), [x, *(t for pair in low_rank for t in pair)])]

    mlp = lambda x, *layers: ops.lora_mlp(x, *layers, dropout_p=0.1, seeds=[3, 4, 5])
    all_of_them = lambda x, *layers: (
        mlp(x, *layers) + ops.lora_linear(sum(ops.lora_group(x, layers[:2], dropout_p=0.2, seeds=[1, 2])), *layers[2])
    )
    whole = [ops.dequantize_nf4(W) for W in made]
    assert all(torch.equal(a, b) for a, b in zip(run(made, all_of_them), run(whole, all_of_them), strict=True))
    with fastft.backend("reference"):
        plain = run(made, all_of_them)
    compiled = run(made, torch.compile(mlp, backend="aot_eager", fullgraph=True))
    for ours, theirs in ((run(whole, all_of_them), plain), (run(whole, mlp), compiled)):
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).norm() <= 1e-5 * a.norm()


def test_autocast():
    made, x = quantized(8, 16), torch.randn(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.nf4_linear(x, made).dtype == torch.bfloat16


def test_one_buffer_for_all_and_no_copy_saved():
    """Forward and backward of 8 layers hold one dequantised weight between them, in the threads' own buffers."""
    layers = nn.Sequential(*(fastft.nn.Linear4bit(64, 64, False) for _ in range(8)))
    x = torch.randn(2, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = layers(x)
    assert all(t.numel() < 64 * 64 for t in saved)
    first = nf4.shared(layers[0].quantized, torch.float32).data_ptr()
    assert all(nf4.shared(layer.quantized, torch.float32).data_ptr() == first for layer in layers)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        layers(x).sum().backward()
    events = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert max(events) < 64 * 64 * 4 and y.isfinite().all()
    others = []
    thread = threading.Thread(target=lambda: others.append(nf4.shared(layers[0].quantized, torch.float32).data_ptr()))
    thread.start(), thread.join()
    assert others != [first]


def test_layer():
    linear = nn.Linear(70, 33).bfloat16()
    layer = fastft.nn.Linear4bit.from_linear(linear)
    x = torch.randn(4, 70)
    y = layer(x)
    assert torch.equal(y, nn.functional.linear(x, layer.dequantize(torch.float32).weight, linear.bias.float()))
    moved = copy.deepcopy(layer).half().to(torch.float64).float()
    assert torch.equal(moved(x), y) and torch.equal(layer.dequantize().weight, ops.dequantize_nf4(layer.quantized))
    assert not layer.weight.requires_grad and layer.bias is linear.bias
    torch.compiler.reset()
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), y)

    state = layer.state_dict()
    assert set(state) == {"bias", "weight", *(f"weight.{name}" for name in fastft.nn.linear4bit.NAMES)}
    facts = json.loads(bytes(state[f"weight.{nf4.STATE}"].tolist()))
    assert {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [33, 70]}.items() <= facts.items()
    fresh = fastft.nn.Linear4bit(70, 33)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), y)
    fresh.load_state_dict(linear.state_dict())  # whole weights are quantised
    assert torch.equal(fresh.weight, layer.weight)
    with fastft.nn.linear4bit.without_state():
        assert set(layer.state_dict()) == {"bias", "weight"}


def changed(state, name, function):
    return {**state, name: function(state[name])}


def facts(state, **changes):
    text = json.dumps({**json.loads(bytes(state[nf4.STATE].tolist())), **changes}).encode()
    return {**state, nf4.STATE: torch.tensor(list(text), dtype=torch.uint8)}


DAMAGE = {
    "absmax is .50.": lambda s: changed(s, "absmax", lambda t: t[:-1].clone()[:50]),
    "nested_absmax is .2.": lambda s: changed(s, "nested_absmax", lambda t: t.repeat(2)),
    "nested_quant_map is .16.": lambda s: changed(s, "nested_quant_map", lambda t: t[:16]),
    "does not hold the 16 values": lambda s: changed(s, "quant_map", lambda t: t.flip(0)),
    "blocksize is 48": lambda s: facts(s, blocksize=48),
    "codes is .2048, 1.": lambda s: facts(s, shape=[64, 65]),
    "quant_type fp4": lambda s: facts(s, quant_type="fp4"),
    "bitsandbytes__fp4 cannot be read": lambda s: {
        "quant_state.bitsandbytes__fp4" if name == nf4.STATE else name: t for name, t in s.items()
    },
    "is damaged: JSONDecodeError": lambda s: changed(s, nf4.STATE, lambda t: t[:20]),
    "is damaged: KeyError": lambda s: {name: t for name, t in s.items() if name != "quant_map"},
    "is damaged: AttributeError": lambda s: facts(s, dtype="bf17"),
}


@pytest.mark.parametrize("sentence", DAMAGE)
def test_a_state_that_does_not_fit_is_refused(sentence):
    made = quantized(64, 64)
    with pytest.raises(ValueError, match=sentence):
        ops.NF4Weight.from_state(made.codes, DAMAGE[sentence](made.state()))
    layer = nn.Sequential(fastft.nn.Linear4bit(64, 64, False))
    state = {f"0.weight.{name}": t for name, t in DAMAGE[sentence](made.state()).items()}
    with pytest.raises(RuntimeError, match=f"0.weight: .*{sentence}|[Uu]nexpected"):
        layer.load_state_dict({"0.weight": made.codes, **state})


def test_bad_input():
    made = quantized(8, 16)
    for bad in (float("nan"), float("inf")):
        weight = torch.zeros(8, 16)
        weight[3, 4] = bad
        with pytest.raises(ValueError, match="holds NaN or infinity"):
            ops.quantize_nf4(weight)
    with pytest.raises(ValueError, match="float64, block is 64"):
        ops.quantize_nf4(torch.zeros(8, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match="block is 63"):
        ops.quantize_nf4(torch.zeros(8, 16), block=63)
    with pytest.raises(ValueError, match="out is .16, 8."):
        ops.dequantize_nf4(made, out=torch.empty(16, 8))
    with pytest.raises(ValueError, match=r"x is \[2, 8\] on cpu, the weight \[8, 16\]"):
        ops.nf4_linear(torch.zeros(2, 8), made)
    with pytest.raises(ValueError, match="bias .3."):
        ops.nf4_linear(torch.zeros(2, 16), made, torch.zeros(3))
    with pytest.raises(ValueError, match=r"weight is \[8, 16\]"):
        ops.lora_linear(torch.zeros(2, 8), made, None, torch.zeros(1, 8), torch.zeros(8, 1), 1.0)
    with pytest.raises(ValueError, match=r"the weight is \[8, 16\]; this layer needs \[16, 8\]"):
        fastft.nn.Linear4bit(8, 16).quantize(torch.zeros(8, 16))
    with pytest.raises(ValueError, match="no weight has been loaded"):
        fastft.nn.Linear4bit(8, 16, device="meta")(torch.zeros(2, 8))
    with fastft.backend("triton"), pytest.raises(fastft.BackendError):
        ops.dequantize_nf4(made, torch.float64)


def test_empty():
    made = quantized(0, 16)
    assert ops.nf4_linear(torch.randn(3, 16), made).shape == (3, 0)
    assert ops.nf4_linear(torch.randn(0, 16), quantized(8, 16)).shape == (0, 8)
