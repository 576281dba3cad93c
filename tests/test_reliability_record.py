"""docs/reliability.md and SECURITY.md name tests that exist, and the record is what was promised and what is shown."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "fastft"
NAMED = re.compile(r"`(?:(test_\w+\.py)::)?(test_\w+)`")


def named(page):
    """(file or None, test) of each test that a page names; one without a file belongs to the file named before it."""
    file = None
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        for found, test in NAMED.findall(line):
            file = found or file
            yield file, test


def functions_in(file):
    return {node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", ["docs/reliability.md", "SECURITY.md"])
def test_a_promise_names_a_test_that_exists(page):
    promised = list(named(page))
    assert len(promised) > 4
    missing = [f"{file}::{test}" for file, test in promised if test not in functions_in(file)]
    assert not missing, f"{page} names {', '.join(missing)}"
    files = re.findall(r"`(test_\w+\.py)`", (ROOT / page).read_text(encoding="utf-8"))
    assert all((TESTS / file).exists() for file in files), files


@pytest.fixture
def reliability():
    spec = importlib.util.spec_from_file_location("reliability", TESTS / "reliability.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_record_is_good_and_shown(reliability):
    record = json.loads((ROOT / "docs" / "reliability.json").read_text())
    assert record and all(reliability.is_good(name, part) for name, part in record.items())
    assert reliability.table(record) in (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_a_matrix_with_a_failure_is_recorded_as_one(reliability, tmp_path):
    cases = "".join(f'<testcase name="test_a_killed_run_is_the_run_x[{i}]"/>' for i in range(294))
    failed = '<testcase name="test_killed_twice"><failure message="x"/></testcase>'
    for extra, good in (('<testcase name="test_killed_twice"/>', True), (failed, False)):
        (tmp_path / "a.xml").write_text(f"<testsuites><testsuite>{cases}{extra}</testsuite></testsuites>")
        record = reliability.matrix_record(tmp_path / "a.xml", 60)
        assert record["kill cases"] == 294 and record["other checks"] == 1
        assert reliability.is_good("matrix", record) is good
