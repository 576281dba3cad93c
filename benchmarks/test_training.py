"""Whole training steps against their rivals: `pytest benchmarks/test_training.py --benchmark-only`.

The loops alternate while they are measured, once for the module; each test then replays the times of its loop for
pytest-benchmark's table. The ratios, which pair the loops round by round, follow at the end.
"""

import pytest

from benchmarks import _llama, _sentiment, _trainer
from benchmarks._harness import Replay, speedup

replay = Replay()


@pytest.fixture(scope="module")
def sides(request, tmp_path_factory, result):
    try:
        toy = request.config.getoption("--toy")
        job = _sentiment.toy_job(tmp_path_factory.mktemp("toy")) if toy else _sentiment.sst2_job()
    except FileNotFoundError as error:
        pytest.skip(f"{error} (--toy needs nothing)")
    result["jobs"]["sentiment"] = _sentiment.run(job, request.config.getoption("--rounds"))
    return result["jobs"]["sentiment"]["sides"]


@pytest.mark.benchmark(group="sentiment: a step of training", timer=replay.clock)
@pytest.mark.parametrize("side", _sentiment.SIDES)
def test_sentiment(benchmark, sides, side):
    if side not in sides:
        pytest.skip(_trainer.why_not())
    benchmark.extra_info["speedup_of_fastft"] = speedup(sides[side]["wall"], sides["fastft"]["wall"])
    replay(benchmark, sides[side]["wall"])


@pytest.fixture(scope="module")
def lora_sides(request, result):
    toy, full = (request.config.getoption(option) for option in ("--toy", "--full"))
    job = _llama.TOY if toy else _llama.Job()
    result["jobs"]["lora"] = _llama.run(job, request.config.getoption("--rounds"), full)
    return result["jobs"]["lora"]["sides"]


@pytest.mark.benchmark(group="lora: a step of training", timer=replay.clock)
@pytest.mark.parametrize("side", _llama.SIDES)
def test_lora(benchmark, lora_sides, side):
    if side not in lora_sides:
        pytest.skip(_trainer.why_not() if side == "trainer" else f"{side} is measured with --full only")
    benchmark.extra_info["speedup_of_fastft"] = speedup(lora_sides[side]["wall"], lora_sides["fastft"]["wall"])
    replay(benchmark, lora_sides[side]["wall"])
