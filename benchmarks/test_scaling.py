"""How the LoRA job scales: `pytest benchmarks/test_scaling.py --benchmark-only`; longer curves with --full.

One size changes at a time: the length of sequences, their number, the rank of the adapters, the width of the model, each
against the careful loop (transformers, PEFT, SDPA); and the ranks of a ZeRO-1 run on one machine, one thread each. The two
loops take turns at each point. Tokens per second and the most memory that a step holds go into the result.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import _llama
from benchmarks._harness import ROOT, Replay, measure, peak_bytes, speedup

replay = Replay()
BASE = replace(_llama.Job(), batch_size=2, length=256, num_hidden_layers=4)
CURVES = {
    "length": ([128, 1024], [128, 512, 2048], [8192, 32768]),  # by default; with --full; and then on a GPU
    "batch_size": ([1, 4], [1, 4, 16], [64]),
    "lora_r": ([4, 64], [1, 4, 16, 64, 256], []),
    "hidden_size": ([256, 512], [256, 512, 1024], [2048, 4096]),
}
TOY_CURVES = {"length": [8, 16], "batch_size": [1, 2], "lora_r": [2, 4], "hidden_size": [16, 32]}


def job_of(base, size, value):
    if size == "hidden_size":
        return replace(base, hidden_size=value, intermediate_size=value * 43 // 16)
    return replace(base, **{size: value})


def measured(job, rounds, compare_steps):
    """{side: runs with peak_bytes}; a side that has no room for its step is left out."""
    bench = _llama.Bench(job)
    sides = {"careful": bench.hugging_face("sdpa"), "fastft": bench.fastft()}
    batches = [bench.batch(number) for number in range(1 + rounds)]
    prepared = {name: [side.prepare(batch) for batch in batches] for name, side in sides.items()}
    steps = {name: lambda n, name=name: sides[name].step(prepared[name][n]) for name in sides}
    for name in list(steps):
        try:
            steps[name](0)
        except (RuntimeError, MemoryError) as error:
            if "memory" not in str(error):
                raise
            del steps[name]
    runs = compare_steps(steps, most=rounds, warmup=1)
    for name in steps:
        runs[name]["peak_bytes"] = peak_bytes(lambda name=name: steps[name](0))
    return runs


@pytest.fixture(scope="module", params=list(CURVES))
def curve(request, compare_steps, result):
    toy, full = (request.config.getoption(option) for option in ("--toy", "--full"))
    rounds = min(request.config.getoption("--rounds"), 4)
    size = request.param
    short, long, longest = CURVES[size]
    values = TOY_CURVES[size] if toy else short if not full else long + (longest if torch.cuda.is_available() else [])
    base = replace(_llama.TOY, num_attention_heads=2, num_key_value_heads=1) if toy else BASE
    points = []
    for value in values:
        job = job_of(base, size, value)
        points.append(
            {"value": value, "tokens": job.batch_size * job.length, "sides": measured(job, rounds, compare_steps)}
        )
    result["scaling"][size] = points
    return size, points


@pytest.mark.parametrize("side", ["careful", "fastft"])
@pytest.mark.benchmark(timer=replay.clock)
def test_scaling(benchmark, curve, side):
    size, points = curve
    benchmark.group = f"scaling over {size}: a step of training at the largest {size}"
    runs = points[-1]["sides"]
    if side not in runs:
        pytest.skip(f"{side} has no room for {size} = {points[-1]['value']}")
    for point in points:
        seconds = speedup(point["sides"][side]["wall"], [1.0] * len(point["sides"][side]["wall"]))[0]
        benchmark.extra_info[f"tokens_per_second_at_{point['value']}"] = point["tokens"] / seconds
    replay(benchmark, runs[side]["wall"])


@pytest.fixture(scope="module")
def ranks(request, result, tmp_path_factory):
    """Tokens per second of `fastft train` on one rank and on two, taking turns."""
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        pytest.skip("two ranks need two GPUs")
    toy, full = (request.config.getoption(option) for option in ("--toy", "--full"))
    folder = tmp_path_factory.mktemp("ranks")
    job = _llama.TOY if toy else replace(_llama.Job(), num_hidden_layers=4)
    arguments = write_run(folder, job, steps=4 if toy else 8)
    sides = {
        count: lambda number, count=count: train_on(
            count, [*arguments, "--output_dir", str(folder / f"{count}-{number}")]
        )
        for count in (1, 2)
    }
    runs = measure(sides, 3 if full else 1, warmup=0)
    result["scaling"]["ranks"] = [{"value": count, "tokens_per_second": run["values"]} for count, run in runs.items()]
    return runs


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.benchmark(timer=replay.clock, group="scaling over ranks: a run of ZeRO-1, one thread a rank")
def test_ranks(benchmark, ranks, count):
    benchmark.extra_info["tokens_per_second"] = ranks[count]["values"]
    replay(benchmark, ranks[count]["wall"])


def write_run(folder, job, steps):
    """A random Llama with a tokenizer of its words, random text; the arguments that train on it."""
    import random

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

    words = [f"w{i}" for i in range(job.vocab_size - 2)]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "model")
    shape = {k: getattr(job, k) for k in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers")}
    heads = {"num_attention_heads": job.num_attention_heads, "num_key_value_heads": job.num_key_value_heads}
    set_seed(0)
    config = AutoConfig.for_model("llama", **shape, **heads, max_position_embeddings=job.length, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(words, k=job.length - 1)) for _ in range(2 * job.batch_size * steps)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return [
        "--model_name_or_path", str(folder / "model"), "--train_file", str(folder / "text.jsonl"), "--task", "causal_lm",
        "--use_peft", "true", "--lora_target_modules", "all-linear", "--max_length", str(job.length), "--zero_stage", "1",
        "--per_device_train_batch_size", str(job.batch_size), "--max_steps", str(steps), "--report_to", "none",
        "--cache_dir", str(folder / "cache"),
    ]  # fmt: skip


CLI = "import sys; from fastft.cli import main; sys.exit(main())"


def train_on(count, arguments):
    """`fastft train` on so many ranks; returns its tokens per second."""
    command = [sys.executable, "-c", CLI, "train", "--num_accelerators", str(count), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with open(os.path.join(arguments[-1], "all_results.json"), encoding="utf-8") as file:
        return json.load(file)["train_tokens_per_second"]
