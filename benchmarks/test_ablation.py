"""What each part of fastft brings: `pytest benchmarks/test_ablation.py --benchmark-only`.

The two jobs of test_training.py, a part at a time, each stage on top of the one before:

    careful     the careful Hugging Face loop (and PEFT) with SDPA
    loop        fastft's loop, engine and optimizer around the same unpatched model
    + layers    norms, dropout, activations, rotary embeddings, products in half precision
    + attention attention, and with it packed rows and their pooling
    + lora      LoRA's products; the LoRA job only
    + loss      the loss from hidden states, without logits; the LoRA job only
    + 8-bit     AdamW8bit in place of AdamW

All stages take turns on the same batches. Time and the most memory that a step holds go into the result.
"""

import pytest

import fastft.patching
from benchmarks import _llama, _sentiment
from benchmarks._harness import Replay, peak_bytes, speedup

replay = Replay()
LATER = ("attention", "pooling", "lora", "loss")
LAYERS = [role for role in fastft.patching.ROLES if role not in LATER]
STAGES = {
    "loop": {"roles": []},
    "+ layers": {"roles": LAYERS},
    "+ attention": {"roles": [*LAYERS, "attention", "pooling"]},
    "+ lora": {"roles": [*LAYERS, "attention", "pooling", "lora"]},
    "+ loss": {"roles": None},
    "+ 8-bit": {"roles": None, "optim": "adamw_8bit"},
}
SIDES = ["careful", *STAGES]


def stages_of(job, names):
    """{stage: side} of a job, of which only the model's and the optimizer's part differ."""
    if isinstance(job, _llama.Job):
        bench = _llama.Bench(job)
        sides = {"careful": bench.hugging_face("sdpa")}
    else:
        bench = _sentiment.Bench(job)
        dtypes = bench.probe_dtypes()
        sides = {"careful": bench.careful(min(dtypes, key=dtypes.get))}
    return bench, sides | {name: bench.fastft(**STAGES[name]) for name in names}


@pytest.fixture(scope="module", params=["sentiment", "lora"])
def ablation(request, tmp_path_factory, compare_steps, result):
    toy, rounds = (request.config.getoption(option) for option in ("--toy", "--rounds"))
    if request.param == "lora":
        job, names = _llama.TOY if toy else _llama.Job(), list(STAGES)
        bench, sides = stages_of(job, names)
        batches = [bench.batch(number) for number in range(2 + rounds)]
    else:
        try:
            job = _sentiment.toy_job(tmp_path_factory.mktemp("toy")) if toy else _sentiment.sst2_job()
        except FileNotFoundError as error:
            pytest.skip(f"{error} (--toy needs nothing)")
        names = [name for name in STAGES if name not in ("+ lora", "+ loss")]  # neither has anything to do here
        bench, sides = stages_of(job, names)
        batches = bench.batches(2 + rounds)
    prepared = {name: [side.prepare(batch) for batch in batches] for name, side in sides.items()}
    steps = {name: lambda n, name=name: sides[name].step(prepared[name][n]) for name in sides}
    runs = compare_steps(steps, most=6, warmup=1)
    for name in sides:
        runs[name]["peak_bytes"] = peak_bytes(lambda name=name: steps[name](0))
    result["ablations"][job.name] = runs
    return request.param, runs


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.benchmark(timer=replay.clock)
def test_ablation(benchmark, ablation, side):
    kind, runs = ablation
    if side not in runs:
        pytest.skip(f"the {kind} job has nothing that {side} would change")
    benchmark.group = f"{kind}: what each part brings, a step of training"
    benchmark.extra_info["speedup_over_careful"] = speedup(runs["careful"]["wall"], runs[side]["wall"])
    replay(benchmark, runs[side]["wall"])
