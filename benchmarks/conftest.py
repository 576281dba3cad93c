"""What all benchmarks share: their options, and the result of the session, shown after pytest-benchmark's own tables."""

import pytest

from benchmarks._harness import new_result, write_result
from benchmarks.report import render

RESULT = pytest.StashKey[dict]()


def pytest_addoption(parser):
    parser.addoption("--toy", action="store_true", help="benchmarks: tiny inputs, to see that everything runs")
    parser.addoption("--rounds", type=int, default=10, help="benchmarks: pairs to measure (default: 10)")
    parser.addoption("--results", metavar="FOLDER", help="benchmarks: keep the result as <machine>-<date>.json there")


def pytest_configure(config):
    config.stash[RESULT] = new_result()


@pytest.fixture(scope="session")
def result(request):
    """The session's result; a benchmark puts what it measured under `jobs`."""
    return request.config.stash[RESULT]


def pytest_terminal_summary(terminalreporter, config):
    result, folder = config.stash[RESULT], config.getoption("--results")
    if not result["jobs"]:
        return
    terminalreporter.section("ratios")
    terminalreporter.write_line(render(result))
    if folder:
        terminalreporter.write_line(f"kept in {write_result(result, folder)}")
