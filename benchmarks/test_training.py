"""Whole training steps against their rivals: `pytest benchmarks/test_training.py --benchmark-only`.

Each loop has a process of its own, with the memory allocator that it comes with; with --full, the main loops are measured
once more under jemalloc. They alternate while they are measured, once for the module; each test then replays the times of
its loop for pytest-benchmark's table. The ratios, which pair the loops round by round, follow at the end.
"""

import ctypes.util

import pytest

from benchmarks import _llama, _sentiment
from benchmarks._harness import Replay, speedup, step_limits

replay = Replay()
JEMALLOC_SIDES = ("textbook", "careful", "mixed", "fastft")


def compared(benchmark, sides, side, why=""):
    """Replays a loop's times; skips it where it was not measured."""
    if side not in sides:
        pytest.skip(why)
    benchmark.extra_info["speedup_of_fastft"] = speedup(sides[side]["wall"], sides["fastft"]["wall"])
    replay(benchmark, sides[side]["wall"])


def sentiment_job(request, tmp_path_factory):
    try:
        toy = request.config.getoption("--toy")
        return _sentiment.toy_job(tmp_path_factory.mktemp("toy")) if toy else _sentiment.sst2_job()
    except FileNotFoundError as error:
        pytest.skip(f"{error} (--toy needs nothing)")


@pytest.fixture(scope="module")
def sides(request, tmp_path_factory, result):
    job = sentiment_job(request, tmp_path_factory)
    result["jobs"]["sentiment"] = _sentiment.run(job, *step_limits(request.config))
    return result["jobs"]["sentiment"]["sides"]


@pytest.mark.benchmark(group="sentiment: a step of training", timer=replay.clock)
@pytest.mark.parametrize("side", _sentiment.SIDES)
def test_sentiment(benchmark, sides, side):
    compared(benchmark, sides, side, _sentiment.why_not(side))


def llama_sides(request, result, name, job, toy):
    is_toy, full = (request.config.getoption(option) for option in ("--toy", "--full"))
    result["jobs"][name] = _llama.run(toy if is_toy else job, *step_limits(request.config), full)
    return result["jobs"][name]["sides"]


@pytest.fixture(scope="module")
def lora_sides(request, result):
    return llama_sides(request, result, "lora", _llama.Job(), _llama.TOY)


@pytest.mark.benchmark(group="lora: a step of training", timer=replay.clock)
@pytest.mark.parametrize("side", _llama.SIDES)
def test_lora(benchmark, lora_sides, side):
    compared(benchmark, lora_sides, side, _llama.why_not(side, full=False))


@pytest.fixture(scope="module")
def whole_sides(request, result):
    return llama_sides(request, result, "whole", _llama.WHOLE, _llama.WHOLE_TOY)


@pytest.mark.benchmark(group="all weights: a step of training", timer=replay.clock)
@pytest.mark.parametrize("side", _llama.WHOLE_SIDES)
def test_all_weights(benchmark, whole_sides, side):
    compared(benchmark, whole_sides, side)


@pytest.fixture(scope="module")
def qlora_sides(request, result):
    return llama_sides(request, result, "qlora", _llama.QLORA, _llama.QLORA_TOY)


@pytest.mark.benchmark(group="qlora: a step of training", timer=replay.clock)
@pytest.mark.parametrize("side", _llama.QLORA_SIDES)
def test_qlora(benchmark, qlora_sides, side):
    compared(benchmark, qlora_sides, side, _llama.why_not(side, full=False))


@pytest.fixture(scope="module", params=["sentiment", "lora"])
def jemalloc_sides(request, result, tmp_path_factory):
    """(job, its sides): once more under jemalloc, told to keep what is freed as fastft tells glibc."""
    if not request.config.getoption("--full"):
        pytest.skip("jemalloc is measured with --full only")
    library = ctypes.util.find_library("jemalloc")
    if library is None:
        pytest.skip("jemalloc is not installed")
    environment = {"LD_PRELOAD": library, "MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1"}
    settings = {"names": JEMALLOC_SIDES, "environment": environment}
    limits = step_limits(request.config)
    if request.param == "lora":
        job = _llama.run(_llama.Job(), *limits, **settings)
    else:
        job = _sentiment.run(sentiment_job(request, tmp_path_factory), *limits, **settings)
    result["jobs"][f"{request.param}_jemalloc"] = job
    return request.param, job["sides"]


@pytest.mark.parametrize("side", JEMALLOC_SIDES)
@pytest.mark.benchmark(timer=replay.clock)
def test_jemalloc(benchmark, jemalloc_sides, side):
    kind, sides = jemalloc_sides
    benchmark.group = f"{kind} under jemalloc: a step of training"
    compared(benchmark, sides, side, f"the {kind} job has no loop {side}")
