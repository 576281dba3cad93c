"""Whole training steps against their rivals: `pytest benchmarks/test_training.py --benchmark-only`.

The loops alternate while they are measured, once for the module; each test then replays the times of its loop for
pytest-benchmark's table. The ratios, which pair the loops round by round, follow at the end.
"""

import pytest

from benchmarks import _sentiment
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
    benchmark.extra_info["speedup_of_fastft"] = speedup(sides[side]["wall"], sides["fastft"]["wall"])
    replay(benchmark, sides[side]["wall"])
