"""A sample of `make families` (tests/families.py), which takes every text architecture of transformers; and its rule."""

import importlib.util
import re
from pathlib import Path

import pytest

import fastft
from fastft.patching.families import FAMILIES

ROOT = Path(__file__).parents[3]
spec = importlib.util.spec_from_file_location("families", ROOT / "tests" / "families.py")
families = importlib.util.module_from_spec(spec)
spec.loader.exec_module(families)


@pytest.mark.parametrize(
    ("model_type", "head", "outcome"),
    [
        ("qwen2", "causal", "patched"),
        ("bert", "classes", "patched"),
        ("t5", "seq2seq", "patched"),
        ("opt", "causal", "refused"),
        ("bart", "seq2seq", "refused"),
        ("electra", "masked", "refused"),
    ],
)
def test_sample(model_type, head, outcome):
    row = families.run(model_type, head)
    assert row.outcome == outcome
    assert outcome == "refused" or re.match(r"(attention|norm) \(\d+\)", row.detail)


@pytest.mark.parametrize("fault", ["a wrong result", "something left behind", "patched although unknown"])
def test_broken_rules_are_seen(fault, monkeypatch):
    words = {
        "a wrong result": "off by",
        "something left behind": "left something",
        "patched although unknown": "not in",
    }
    if fault == "a wrong result":
        right = fastft.ops.rms_norm
        monkeypatch.setattr("fastft.ops.rms_norm", lambda *args: 1.0001 * right(*args))
    elif fault == "something left behind":
        monkeypatch.setattr("fastft.unpatch", lambda model: None)
    else:
        monkeypatch.setattr("fastft.patch", lambda model, verbose: None)
    with pytest.raises(AssertionError, match=words[fault]):
        families.run("opt" if "unknown" in fault else "llama", "causal")


def test_the_record_has_every_family():
    record = (ROOT / "docs" / "families.md").read_text()
    patched, refused = record.split("## Refused")
    assert {row.split(" | ")[0].removeprefix("| ") for row in patched.splitlines()} >= FAMILIES.keys()
    assert not FAMILIES.keys() & set(re.findall(r"[\w-]+", refused.split("## Not built")[0]))
