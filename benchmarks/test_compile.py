"""torch.compile with and without the patch: `pytest benchmarks/test_compile.py --benchmark-only --full`.

    eager             transformers, SDPA
    compiled          the same under torch.compile
    fastft            patched
    fastft_compiled   patched, under torch.compile

Forward and backward of a Llama-shaped model with a loss over a vocabulary of 32,000, equally long sequences without padding, in
bf16 where the device computes it and fp32 elsewhere. The compiled sides take minutes to compile and run with --full only.
"""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastft
from benchmarks._harness import Replay, multiplied_dtype, speedup

SIDES = ["eager", "compiled", "fastft", "fastft_compiled"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

replay = Replay()


def sides_of(full, toy):
    """{side: f(round)}."""
    hidden, layers, vocabulary, rows, length = (32, 1, 64, 2, 16) if toy else (512, 4, 32_000, 2, 512)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64 or 1,
        num_key_value_heads=hidden // 128 or 1,
        vocab_size=vocabulary,
        use_cache=False,
    )
    torch.manual_seed(0)
    plain = LlamaForCausalLM(config).to(DEVICE, multiplied_dtype()).train()
    patched = copy.deepcopy(plain)
    fastft.patch(patched, verbose=False)
    ids = torch.randint(vocabulary, (rows, length), device=DEVICE)
    calls = {"eager": plain, "fastft": patched}
    if full:
        torch.compiler.reset()
        calls |= {"compiled": torch.compile(plain), "fastft_compiled": torch.compile(patched, fullgraph=True)}

    def run(name):
        model = plain if name in ("eager", "compiled") else patched

        def step(_):
            loss = calls[name](input_ids=ids, labels=ids).loss
            loss.backward()
            model.zero_grad()
            return loss.item()

        return step

    sides = {name: run(name) for name in calls}
    losses = {name: step(0) for name, step in sides.items()}
    assert max(losses.values()) - min(losses.values()) < 0.01 * losses["eager"], f"{losses}: nothing is timed"
    return sides


@pytest.fixture(scope="module")
def runs(request, compare_steps):
    toy, full = (request.config.getoption(option) for option in ("--toy", "--full"))
    return compare_steps(sides_of(full, toy))


@pytest.mark.benchmark(group="llama, patched and compiled, forward and backward", timer=replay.clock)
@pytest.mark.parametrize("side", SIDES)
def test_compile(benchmark, runs, side):
    if side not in runs:
        pytest.skip(f"{side} is measured with --full only")
    benchmark.extra_info["speedup_of_fastft"] = speedup(runs[side]["wall"], runs["fastft"]["wall"])
    replay(benchmark, runs[side]["wall"])
