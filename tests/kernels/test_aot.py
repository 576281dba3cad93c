"""Triton kernels compiled ahead of time for Ampere, Hopper and Blackwell: nothing spills, shared memory is within limits.

Each op has a file aot/<op>.py whose `variants()` yields arguments of `compile_report` (tests/aot_report.py), without the
architecture. A variant may say what else must hold on Hopper: `expect` {instruction or "warps": at least so many}, where
HGMMA also rules HMMA out; `archs` to leave some out.
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
            assert not ("HGMMA" in expect and report["HMMA"]), name


def load(op):
    spec = importlib.util.spec_from_file_location(f"aot_{op}", Path(__file__).with_name("aot") / f"{op}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def adamw8bit_variants():
    signature = dict.fromkeys(["rows_ptr", "first_ptr"], "*i64") | dict.fromkeys(["maps_ptr", "scalars_ptr"], "*fp32")
    signature |= {"grad_like_ptr": "*bf16", "copy_like_ptr": "*bf16", "count": "i32"}
    for lion in (False, True):
        for dynamic in (False, True):
            yield {
                "kernel": "fastft_kernels.triton.adamw8bit:step_kernel",
                "signature": signature,
                "constants": {"HAS_COPY": True, "LION": lion, "DYNAMIC": dynamic, "FIELDS": 6 if lion else 8},
                "num_warps": 1,
                "enable_fp_fusion": False,
            }


def test_adamw8bit(compile_ahead):
    variants = [variant | {"arch": arch} for arch in ARCHITECTURES for variant in adamw8bit_variants()]
    for variant, report in zip(variants, compile_ahead(variants), strict=True):
        name = f"sm_{variant['arch']}, {variant['constants']}: {report}"
        assert report["stack_bytes"] == report["STL"] == report["LDL"] == 0, name
        assert report["shared_bytes"] <= report["shared_limit"], name
