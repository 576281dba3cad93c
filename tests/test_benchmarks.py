"""The benchmarks run, at toy size, so that they never rot; and the arithmetic of their ratios."""

import functools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent

# One process for all, because starting it takes longer than anything it does.
SESSION = """
import sys
import pytest
from benchmarks import _sentiment

folder = sys.argv[1]
right, alternate = _sentiment.Fastft.loss, _sentiment.alternate
_sentiment.Fastft.loss = lambda self, examples: 1.001 * right(self, examples)
_sentiment.alternate = lambda *args, **kwargs: sys.exit("timed a wrong answer")
try:
    _sentiment.run(_sentiment.toy_job(folder), rounds=1)
except AssertionError as error:
    print("refused:", error)
_sentiment.Fastft.loss, _sentiment.alternate = right, alternate

options = ["--benchmark-only", "--toy", "--rounds=3", f"--results={folder}/results", "-p", "no:cacheprovider"]
sys.exit(pytest.main(["benchmarks", *options]))
"""


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """(what a toy session printed, the result it kept, the result's path)."""
    folder = tmp_path_factory.mktemp("benchmarks")
    env = {k: v for k, v in os.environ.items() if k != "PYTEST_XDIST_WORKER"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SESSION, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (folder / "results").glob("*.json")
    return done.stdout, json.loads(path.read_text()), path


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def test_every_loop_is_measured_in_every_round(session):
    printed, result, _ = session
    assert "test_sentiment[careful]" in printed and "rms_norm" in printed
    job = result["jobs"]["sentiment"]
    assert set(job["sides"]) - {"mixed"} == {"textbook", "careful", "trainer", "fastft"}
    for side in job["sides"].values():
        assert len(side["wall"]) == len(side["cpu"]) == len(side["values"]) == 3
        assert all(seconds > 0 for seconds in side["wall"])
    positions = {name: side["positions"] for name, side in job["sides"].items()}
    assert positions["fastft"] == job["tokens"] < positions["careful"] < positions["textbook"] == 4 * 32
    losses = [side["loss"] for side in job["check"].values()]
    assert max(losses) - min(losses) <= 1e-4 * min(losses)


def test_the_table_shows_the_ratio_of_the_times_in_the_result(session):
    printed, result, _ = session
    rows = [line for line in printed.splitlines() if line.startswith("| careful |")][:2]  # those of the ablation follow
    for job, row in zip(("sentiment", "lora"), rows, strict=True):
        sides = result["jobs"][job]["sides"]
        ratios = [a / b for a, b in zip(sides["careful"]["wall"], sides["fastft"]["wall"], strict=True)]
        assert f"| {statistics.median(ratios):.2f} (" in row


def test_ops_of_the_session_are_in_the_result_round_by_round(session):
    _, result, _ = session
    norms = [sides for group, sides in result["ops"].items() if group.startswith("rms_norm")]
    assert norms and all({"eager", "fastft"} <= sides.keys() for sides in norms)
    assert all(len(side["wall"]) == 3 for sides in norms for side in sides.values())
    assert all(rate > 0 for rate in result["ceilings"].values())
    assert "/" not in result["command"].replace("results/", ""), "no paths of this machine"


def test_wrong_answers_are_not_timed(session):
    assert "refused: loss of fastft" in session[0]


def test_report_replaces_only_what_stands_between_its_marks(session, tmp_path, benchmarks):
    from benchmarks import report

    readme = tmp_path / "README.md"
    readme.write_text("# before\n<!-- results: begin -->\nold numbers\n<!-- results: end -->\nafter\n")
    summary = tmp_path / "SUMMARY.md"
    summary.write_text(readme.read_text())
    report.main([str(session[2]), "--readme", str(readme), "--summary", str(summary), "--html", str(tmp_path / "html")])
    short = summary.read_text()
    assert short.startswith("# before\n") and "| LoRA, transformers and PEFT with SDPA |" in short
    assert "| a tiny random BERT on generated sentences | careful |" in short
    text = readme.read_text()
    assert text.startswith("# before\n") and text.endswith("\nafter\n")
    assert "old numbers" not in text and "| fastft |" in text
    shown = (tmp_path / "html" / "report.html").read_text()
    assert "<td>fastft</td>" in shown and "|---" not in shown
    plots = [*(tmp_path / "html").glob("*.png")]
    assert len(plots) > 10  # jobs, ablations, scaling, ops, floors, roofline
    assert any("ceilings" in plot.name for plot in plots)
    for plot in plots:
        assert f'src="{plot.name}"' in shown and plot.read_bytes().startswith(b"\x89PNG")


def test_speedup_is_the_median_of_paired_ratios(benchmarks):
    from benchmarks._harness import speedup

    ours = [1.0, 2.0, 4.0, 1.0, 3.0]
    assert speedup([3 * t for t in ours], ours) == (3.0, 3.0, 3.0)  # pairs share whatever slowed the machine
    median, low, high = speedup([1.0, 4.0, 12.0, 2.0, 6.0], ours)
    assert median == 2.0 and low < median < high


def test_measure_runs_each_side_once_a_round_in_changing_order(benchmarks):
    from benchmarks._harness import measure

    calls = []
    sides = {name: lambda number, name=name: calls.append((number, name)) for name in "abc"}
    runs = measure(sides, 20, warmup=1)
    rounds = [tuple(name for number, name in calls if number == n) for n in range(21)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 2
    assert all(len(run["wall"]) == 20 for run in runs.values()), "warming up is not recorded"


def test_measure_begins_no_round_when_its_time_is_over(benchmarks):
    from benchmarks._harness import LEAST_ROUNDS, measure

    runs = measure({"a": abs}, 1000, warmup=2, seconds=0)
    assert len(runs["a"]["wall"]) == LEAST_ROUNDS
    assert len(measure({"a": abs}, 20, warmup=2, seconds=60)["a"]["wall"]) == 20


def test_loops_take_turns_in_processes_of_their_own(benchmarks):
    from benchmarks._processes import alternate, serve_steps

    # a step asks for a variable, and would return the round's number if it were not set
    ask = (serve_steps, functools.partial(os.getenv, "FASTFT_TEST_LOOP"))
    runs = alternate({"a": ask, "b": ask}, 3, warmup=1, environment={"FASTFT_TEST_LOOP": "set"})
    assert all(run["values"] == ["set"] * 3 and len(run["wall"]) == len(run["cpu"]) == 3 for run in runs.values())
    assert "FASTFT_TEST_LOOP" not in os.environ


def test_a_loop_that_ends_is_named(benchmarks):
    from benchmarks._processes import alternate, serve_steps

    with pytest.raises(RuntimeError, match="the process of the loop broken has ended"):
        alternate({"broken": (serve_steps, os.getenv)}, 3, warmup=1)  # os.getenv(0): a TypeError in the first step


@pytest.mark.parametrize(("full", "seconds"), [(False, 16), (True, None)])
def test_a_full_run_takes_every_pair_of_a_step(benchmarks, full, seconds):
    from benchmarks._harness import step_limits

    options = {"--rounds": 7, "--seconds": 2, "--full": full}
    assert step_limits(SimpleNamespace(getoption=options.get)) == (7, seconds)


def test_accuracies_alone_are_a_result(benchmarks, tmp_path):
    """`pytest benchmarks/test_accuracy.py` keeps what it found, though it compares no times."""
    from benchmarks import conftest

    result = conftest.new_result()
    result["accuracies"].append({"job": "a job", "loop": "fastft", "accuracies": [0.5]})
    options = {"--results": str(tmp_path), "--toy": True}
    lines = []
    reporter = SimpleNamespace(section=lines.append, write_line=lines.append)
    conftest.pytest_terminal_summary(reporter, SimpleNamespace(stash={conftest.RESULT: result}, getoption=options.get))
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["accuracies"] == result["accuracies"]
    assert any("| a job | fastft | 0.500 |" in line for line in lines)
