"""Triton kernels compiled ahead of time for Ampere, Hopper and Blackwell: nothing spills, shared memory is within limits.

Each op has a file aot/<op>.py whose `variants()` yields arguments of `compile_report` (tests/aot_report.py), without the
architecture. A variant may say what else must hold: `expect` {instruction: at least so many}, `archs` to leave some out.
"""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("triton.backends.nvidia")

ARCHITECTURES = (80, 90, 100)
OPS = sorted(path.stem for path in Path(__file__).with_name("aot").glob("*.py"))


@pytest.mark.parametrize("op", OPS)
def test_compiles_without_spills(compile_ahead, op):
    cases = []
    for variant in load(op).variants():
        expect, archs = variant.pop("expect", {}), variant.pop("archs", ARCHITECTURES)
        cases += [(variant | {"arch": arch}, expect) for arch in archs]
    for (variant, expect), report in zip(cases, compile_ahead([case for case, _ in cases]), strict=True):
        name = f"sm_{variant['arch']}, {variant['kernel']}, {variant['constants']}: {report}"
        assert report["stack_bytes"] == report["STL"] == report["LDL"] == 0, name
        assert report["shared_bytes"] <= report["shared_limit"], name
        if variant["arch"] == 90:
            for instruction, least in expect.items():
                assert report[instruction] >= least, name


def load(op):
    spec = importlib.util.spec_from_file_location(f"aot_{op}", Path(__file__).with_name("aot") / f"{op}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
