"""Weights in 4 bits: `pytest benchmarks/test_nf4.py --benchmark-only`.

Reading a weight of 4096 x 4096 (4096 x 14336 on a GPU), absmax in 8 bits:

    fastft        fastft.ops.dequantize_nf4 into memory that is there
    reference     the formula, one PyTorch call after the other
    bitsandbytes  bitsandbytes.functional.dequantize_4bit, where it is installed
    copy          as many bytes copied, the floor: half of those that fastft reads and writes are read, half written

A step of LoRA, forward and backward of the seven linear layers of a Llama block (benchmarks/test_lora.py), rank 16:

    qlora         fastft over weights in 4 bits
    lora          fastft over whole weights: what reading them costs is the difference
    peft          PEFT's lora.Linear over the 4-bit layers, each called on its own

The sides take turns while they are measured; each test then replays the times of its side for pytest-benchmark's table.
"""

import importlib.util

import pytest
import torch

import fastft
from benchmarks import test_lora
from benchmarks._harness import Replay, multiplied_dtype, speedup
from fastft import ops
from fastft.nn import Linear4bit

DEVICE = test_lora.DEVICE
DTYPES = [torch.bfloat16, torch.float32]
READ_SIDES = ["fastft", "reference", "bitsandbytes", "copy"]
STEP_SIDES = ["qlora", "lora", "peft"]

replay = Replay()


def reading(shape, dtype):
    """{side: f(round)}."""
    weight = torch.randn(shape, device=DEVICE).to(dtype)
    made, out = ops.quantize_nf4(weight), torch.empty_like(weight)
    read = made.codes.nbytes + made.absmax.nbytes + made.double[1].nbytes
    half = torch.empty((read + out.nbytes) // 2, dtype=torch.uint8, device=DEVICE)
    other = torch.empty_like(half)

    def reference(_):
        with fastft.backend("reference"):
            ops.dequantize_nf4(made, out=out)

    def copy(_):
        other.copy_(half)

    sides = {"fastft": lambda _: (ops.dequantize_nf4(made, out=out), None)[1], "reference": reference, "copy": copy}
    if importlib.util.find_spec("bitsandbytes"):
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        assert torch.equal(
            dequantize_4bit(codes, state), ops.dequantize_nf4(ops.NF4Weight.from_state(codes, packed(state)))
        )
        sides["bitsandbytes"] = lambda _: (dequantize_4bit(codes, state), None)[1]
    return sides


def packed(state):
    return {name.removeprefix("weight."): t for name, t in state.as_dict(packed=True).items()}


def stepping(hidden, inner, dtype, tokens):
    """{side: f(round)}."""
    torch.manual_seed(0)
    model = test_lora.block(hidden, inner, 0.0).to(dtype)
    for layer in model.values():
        made = Linear4bit.from_linear(layer.base_layer)
        layer.base_layer = made.dequantize(dtype)
        layer.four_bit = [made]  # in a list: not a module of it
    x = torch.randn(tokens, hidden, device=DEVICE).to(dtype).requires_grad_()
    dy = torch.randn_like(x, requires_grad=False)

    def parameters(name, four_bit):
        layer = model[name]
        weight = layer.four_bit[0].quantized if four_bit else layer.base_layer.weight
        return weight, None, layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]

    def fused(four_bit):
        def run(x):
            q, k, v = ops.lora_group(x, [parameters(name, four_bit) for name in "qkv"])
            x = ops.lora_linear(q + k + v, *parameters("o", four_bit))
            return ops.lora_mlp(x, *(parameters(name, four_bit) for name in ("gate", "up", "down")))

        return run

    def peft(name, x):
        layer = model[name]
        low_rank = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
        return layer.four_bit[0](x) + low_rank

    functions = {"qlora": fused(True), "lora": fused(False), "peft": test_lora.by_layers(peft)}
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    run = lambda function: lambda _: torch.autograd.grad(function(x), leaves, dy)
    sides = {name: run(function) for name, function in functions.items()}
    for ours, theirs in zip(sides["qlora"](0), sides["lora"](0), strict=True):
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < 8 * torch.finfo(dtype).eps, f"4 bits differ from their values by {error:.1e}: nothing is timed"
    return {name: lambda number, side=side: (side(number), None)[1] for name, side in sides.items()}


@pytest.fixture(scope="module")
def read_runs(request, compare):
    toy = request.config.getoption("--toy")
    shape = (64, 128) if toy else (4096, 14336) if DEVICE == "cuda" else (4096, 4096)
    return compare(reading(shape, request.param), warmup=3)


@pytest.fixture(scope="module")
def step_runs(request, compare):
    (hidden, inner), dtype = request.param
    toy, full = (request.config.getoption(option) for option in ("--toy", "--full"))
    if (hidden, inner) != test_lora.SHAPES[0] and not full:
        pytest.skip(f"{hidden} x {inner} is measured with --full only")
    sides = stepping(32, 48, dtype, 16) if toy else stepping(hidden, inner, dtype, test_lora.TOKENS)
    return compare(sides, warmup=1)


@pytest.mark.parametrize("side", READ_SIDES)
@pytest.mark.parametrize("read_runs", DTYPES, indirect=True, ids=str)
@pytest.mark.benchmark(timer=replay.clock)
def test_reading(request, benchmark, read_runs, side):
    if side not in read_runs:
        pytest.skip(f"{side} is not installed")
    size = "toy" if request.config.getoption("--toy") else "a layer"
    benchmark.group = f"nf4 {size}, to {request.node.callspec.params['read_runs']}"
    benchmark.extra_info["speedup_of_fastft"] = speedup(read_runs[side]["wall"], read_runs["fastft"]["wall"])
    replay(benchmark, read_runs[side]["wall"])


CASES = [(shape, multiplied_dtype()) for shape in test_lora.SHAPES]


@pytest.mark.parametrize("side", STEP_SIDES)
@pytest.mark.parametrize("step_runs", CASES, indirect=True, ids=lambda case: f"{case[0]}-{case[1]}")
@pytest.mark.benchmark(timer=replay.clock)
def test_step(request, benchmark, step_runs, side):
    (hidden, inner), dtype = request.node.callspec.params["step_runs"]
    size = "toy" if request.config.getoption("--toy") else f"{test_lora.TOKENS} x {hidden} ({inner})"
    benchmark.group = f"qlora block {size}, {dtype}, forward and backward"
    benchmark.extra_info["speedup_of_fastft"] = speedup(step_runs[side]["wall"], step_runs["qlora"]["wall"])
    replay(benchmark, step_runs[side]["wall"])
