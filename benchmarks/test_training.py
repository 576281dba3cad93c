"""Whole training steps against their rivals: `pytest benchmarks/test_training.py --benchmark-only`.

The loops alternate while they are measured, once for the module; each test then replays the times of its loop for
pytest-benchmark's table. The ratios, which pair the loops round by round, follow at the end.
"""

import ctypes.util
import json
import os
import subprocess
import sys

import pytest

from benchmarks import _llama, _sentiment, _trainer
from benchmarks._harness import ROOT, Replay, speedup, step_limits

replay = Replay()


@pytest.fixture(scope="module")
def sides(request, tmp_path_factory, result):
    try:
        toy = request.config.getoption("--toy")
        job = _sentiment.toy_job(tmp_path_factory.mktemp("toy")) if toy else _sentiment.sst2_job()
    except FileNotFoundError as error:
        pytest.skip(f"{error} (--toy needs nothing)")
    result["jobs"]["sentiment"] = _sentiment.run(job, *step_limits(request.config))
    return result["jobs"]["sentiment"]["sides"]


@pytest.mark.benchmark(group="sentiment: a step of training", timer=replay.clock)
@pytest.mark.parametrize("side", _sentiment.SIDES)
def test_sentiment(benchmark, sides, side):
    if side not in sides:
        pytest.skip(_trainer.why_not())
    benchmark.extra_info["speedup_of_fastft"] = speedup(sides[side]["wall"], sides["fastft"]["wall"])
    replay(benchmark, sides[side]["wall"])


@pytest.fixture(scope="module")
def jemalloc_sides(request, tmp_path_factory, result):
    """The sentiment job once more, all loops under jemalloc, in a process of its own."""
    if not request.config.getoption("--full"):
        pytest.skip("jemalloc is measured with --full only")
    library = ctypes.util.find_library("jemalloc")
    if library is None:
        pytest.skip("jemalloc is not installed")
    out = tmp_path_factory.mktemp("jemalloc") / "job.json"
    command = [sys.executable, "-m", "benchmarks._sentiment", str(request.config.getoption("--rounds")), str(out)]
    launchers = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    )  # set by the Trainer
    env = {name: value for name, value in os.environ.items() if name not in launchers} | {"LD_PRELOAD": library}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if "is missing" in done.stderr:
        pytest.skip("the model or the data is missing")
    assert done.returncode == 0, done.stdout + done.stderr
    result["jobs"]["sentiment_jemalloc"] = json.loads(out.read_text())
    return result["jobs"]["sentiment_jemalloc"]["sides"]


@pytest.mark.benchmark(group="sentiment under jemalloc: a step of training", timer=replay.clock)
@pytest.mark.parametrize("side", _sentiment.SIDES)
def test_sentiment_jemalloc(benchmark, jemalloc_sides, side):
    if side not in jemalloc_sides:
        pytest.skip(_trainer.why_not())
    benchmark.extra_info["speedup_of_fastft"] = speedup(jemalloc_sides[side]["wall"], jemalloc_sides["fastft"]["wall"])
    replay(benchmark, jemalloc_sides[side]["wall"])


@pytest.fixture(scope="module")
def lora_sides(request, result):
    toy, full = (request.config.getoption(option) for option in ("--toy", "--full"))
    job = _llama.TOY if toy else _llama.Job()
    result["jobs"]["lora"] = _llama.run(job, *step_limits(request.config), full)
    return result["jobs"]["lora"]["sides"]


@pytest.mark.benchmark(group="lora: a step of training", timer=replay.clock)
@pytest.mark.parametrize("side", _llama.SIDES)
def test_lora(benchmark, lora_sides, side):
    if side not in lora_sides:
        reasons = {"trainer": _trainer.why_not(), "liger": _llama.why_not_liger()}
        pytest.skip(reasons.get(side) or f"{side} is measured with --full only")
    benchmark.extra_info["speedup_of_fastft"] = speedup(lora_sides[side]["wall"], lora_sides["fastft"]["wall"])
    replay(benchmark, lora_sides[side]["wall"])


@pytest.fixture(scope="module")
def whole_sides(request, result):
    job = _llama.WHOLE_TOY if request.config.getoption("--toy") else _llama.WHOLE
    result["jobs"]["whole"] = _llama.run(job, *step_limits(request.config))
    return result["jobs"]["whole"]["sides"]


@pytest.mark.benchmark(group="all weights: a step of training", timer=replay.clock)
@pytest.mark.parametrize("side", _llama.WHOLE_SIDES)
def test_all_weights(benchmark, whole_sides, side):
    benchmark.extra_info["speedup_of_fastft"] = speedup(whole_sides[side]["wall"], whole_sides["fastft"]["wall"])
    replay(benchmark, whole_sides[side]["wall"])
