"""What all benchmarks share: their options, and the result of the session, shown after pytest-benchmark's own tables.

The sides of an op take turns inside one group; `side` is the parameter that names them. Their replayed times are in
pytest-benchmark's session round by round, from where they go into the result.
"""

import functools

import pytest

from benchmarks._harness import ceilings, measure, new_result, step_limits, write_result
from benchmarks.report import render

RESULT = pytest.StashKey[dict]()


def pytest_addoption(parser):
    parser.addoption("--toy", action="store_true", help="benchmarks: tiny inputs, to see that everything runs")
    parser.addoption(
        "--full", action="store_true", help="benchmarks: the large grid and the rivals that compile for minutes"
    )
    parser.addoption("--rounds", type=int, default=10, help="benchmarks: pairs to measure (default: 10)")
    parser.addoption(
        "--seconds",
        type=float,
        default=3.0,
        help="benchmarks: an op begins no more pairs after so many seconds, a training step after eight times as many, but for "
        "the first three (default: 3); --full measures every pair of a training step",
    )
    parser.addoption("--results", metavar="FOLDER", help="benchmarks: keep the result as <machine>-<date>.json there")


def pytest_configure(config):
    config.stash[RESULT] = new_result()


@pytest.fixture(scope="session")
def result(request):
    """The session's result; a benchmark puts what it measured under `jobs`, `ablations` or `scaling`."""
    return request.config.stash[RESULT]


@pytest.fixture(scope="session")
def compare(request):
    """compare(sides, warmup=2, between=None) -> {side: Runs} of an op, as long as the options say."""
    rounds, seconds = (request.config.getoption(option) for option in ("--rounds", "--seconds"))
    return functools.partial(measure, rounds=rounds, seconds=seconds)


@pytest.fixture(scope="session")
def compare_steps(request):
    """compare_steps(sides, most=..., warmup=2) -> {side: Runs} of whole training steps, as long as the options say."""
    rounds, seconds = step_limits(request.config)
    return lambda sides, most=rounds, warmup=2: measure(sides, min(rounds, most), warmup=warmup, seconds=seconds)


def pytest_terminal_summary(terminalreporter, config):
    result, folder = config.stash[RESULT], config.getoption("--results")
    result["ops"] = _ops(getattr(config, "_benchmarksession", None))
    if not any(result[kind] for kind in ("jobs", "ops", "ablations", "scaling", "accuracies")):
        return
    result["ceilings"] = ceilings(config.getoption("--toy"))
    terminalreporter.section("ratios")
    terminalreporter.write_line(render(result))
    if folder:
        terminalreporter.write_line(f"kept in {write_result(result, folder)}")


def _ops(session):
    """{group: {side: {"wall": seconds of each round, "work": what `work` says}}} where fastft has a rival, jobs left out."""
    groups = {}
    for bench in session.benchmarks if session else []:
        side = (bench.params or {}).get("side")
        if side and bench.group and "a step of training" not in bench.group and not bench.has_error:
            run = {"wall": list(bench.stats.data)}
            if "work" in bench.extra_info:
                run["work"] = bench.extra_info["work"]
            groups.setdefault(bench.group, {})[side] = run
    return {group: sides for group, sides in groups.items() if "fastft" in sides and len(sides) > 1}
