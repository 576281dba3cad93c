"""LoRA against PEFT on a Llama-shaped block: `pytest benchmarks/test_lora.py --benchmark-only`.

    peft        peft.tuners.lora.Linear as transformers calls it, adapters in the dtype of the weights
    peft_fp32   the same with float32 adapters, PEFT's default
    fastft      the same modules, patched: fastft.ops.lora_group for q, k, v, lora_linear for o, lora_mlp
    frozen      the seven frozen products and SwiGLU alone, the floor

The same four with DoRA: with dropout it takes each frozen product twice, which its floor does not.

Seven linear layers (q, k, v, o, gate, up, down) of 2048 tokens, forward and backward, rank 16, without attention between
them: q + k + v goes into o. The sides take turns; each test replays the times of its side for the table.
"""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from benchmarks._harness import Replay, multiplied_dtype, speedup, work
from fastft import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, RANK = (8192 if DEVICE == "cuda" else 2048), 16
SHAPES = [(4096, 14336)] if DEVICE == "cuda" else [(512, 2048), (2048, 5632)]  # hidden, inner
SIDES = ["peft", "peft_fp32", "fastft", "frozen"]
NAMES = ["q", "k", "v", "o", "gate", "up", "down"]

replay = Replay()


def block(hidden, inner, dropout, dora=False):
    shapes = [(hidden, hidden)] * 4 + [(hidden, inner)] * 2 + [(inner, hidden)]
    layers = [nn.Linear(*shape, bias=False) for shape in shapes]
    model = nn.ModuleDict(dict(zip(NAMES, layers, strict=True))).to(DEVICE, multiplied_dtype())
    settings = {"lora_dropout": dropout, "use_dora": dora, "init_lora_weights": False}
    config = LoraConfig(r=RANK, lora_alpha=32, target_modules=NAMES, **settings)
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_A" in name or "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * parameter.shape[1] ** -0.5 / 4
    return model.train()


def by_layers(call):
    """x -> y, calling each layer by its name."""

    def run(x):
        x = call("o", call("q", x) + call("k", x) + call("v", x))
        return call("down", F.silu(call("gate", x)) * call("up", x))

    return run


def fused(model, dropout):
    def parameters(name):
        layer = model[name]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        magnitude = layer.lora_magnitude_vector["default"].weight if layer.lora_magnitude_vector else None
        return layer.base_layer.weight, None, a, b, layer.scaling["default"], magnitude

    def run(x):
        q, k, v = ops.lora_group(x, [parameters(name) for name in "qkv"], dropout_p=dropout)
        x = ops.lora_linear(q + k + v, *parameters("o"), dropout_p=dropout)
        return ops.lora_mlp(x, *map(parameters, ("gate", "up", "down")), dropout_p=dropout)

    return run


def sides_of(hidden, inner, dropout, dora, tokens):
    """{side: f(round)}."""
    torch.manual_seed(0)
    model = block(hidden, inner, dropout, dora)
    torch.manual_seed(0)
    wide = block(hidden, inner, dropout, dora)
    for name, parameter in wide.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    x = torch.randn(tokens, hidden, device=DEVICE).to(multiplied_dtype()).requires_grad_()
    dy = torch.randn_like(x, requires_grad=False)
    functions = {
        "peft": by_layers(lambda name, x: model[name](x)),
        "peft_fp32": by_layers(lambda name, x: wide[name](x)),
        "fastft": fused(model, dropout),
        "frozen": by_layers(lambda name, x: model[name].base_layer(x)),
    }

    def run(name):
        trained = [p for p in (wide if name == "peft_fp32" else model).parameters() if p.requires_grad]
        leaves = [x] if name == "frozen" else [x, *trained]
        return lambda _: torch.autograd.grad(functions[name](x), leaves, dy)

    sides = {name: run(name) for name in SIDES}
    if not dropout:
        for ours, theirs in zip(sides["fastft"](0), sides["peft_fp32"](0), strict=True):
            error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
            assert error < 0.03, f"fastft differs from PEFT by {error:.1e}: nothing is timed"
    # What a side returns would be kept for the result: tensors are dropped instead.
    return {name: lambda number, side=side: (side(number), None)[1] for name, side in sides.items()}


@pytest.fixture(scope="module")
def runs(request, compare):
    (hidden, inner), dropout, dora = request.param
    toy, full = (request.config.getoption(option) for option in ("--toy", "--full"))
    if (hidden, inner) != SHAPES[0] and not full:
        pytest.skip(f"{hidden} x {inner} is measured with --full only")
    sides = sides_of(32, 48, dropout, dora, 16) if toy else sides_of(hidden, inner, dropout, dora, TOKENS)
    return compare(sides, warmup=1)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "runs",
    [(shape, p, dora) for shape in SHAPES for p in (0.0, 0.05) for dora in (False, True)],
    indirect=True,
    ids=lambda case: f"{case[0]}-{case[1]}{'-dora' * case[2]}",
)
@pytest.mark.benchmark(timer=replay.clock)
def test_lora(request, benchmark, runs, side):
    (hidden, inner), dropout, dora = request.node.callspec.params["runs"]
    size = "toy" if request.config.getoption("--toy") else f"{TOKENS} x {hidden} ({inner})"
    method = "dora" if dora else "lora"
    benchmark.group = f"{method} block {size}, {multiplied_dtype()}, dropout {dropout}, forward and backward"
    tokens, hidden, inner = (16, 32, 48) if size == "toy" else (TOKENS, hidden, inner)
    weights = 4 * hidden * hidden + 3 * hidden * inner
    moved = 2 * weights + 3 * tokens * (8 * hidden + 3 * (hidden + inner))
    flops = (8 if dora and dropout else 4) * tokens * weights  # forward and the gradient of the input
    benchmark.extra_info["work"] = work(multiplied_dtype(), moved=moved * multiplied_dtype().itemsize, flops=flops)
    benchmark.extra_info["speedup_of_fastft"] = speedup(runs[side]["wall"], runs["fastft"]["wall"])
    replay(benchmark, runs[side]["wall"])
