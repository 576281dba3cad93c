"""The report on the machine: complete where all is well, and clear about what is missing."""

import subprocess
import sys

import pytest

from fastft import doctor
from fastft.ops import dispatch


def test_a_machine_that_runs_these_tests_can_train():
    done = subprocess.run([sys.executable, "-m", "fastft", "doctor"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for check in doctor.CHECKS:
        assert f" {check.__name__} " in done.stdout
    assert "a step through DeepSpeed" in done.stdout and "Training can run here" in done.stdout


def test_a_broken_part_is_reported_and_the_rest_goes_on(monkeypatch, capsys):
    def training():
        raise RuntimeError("gloo is not there")

    monkeypatch.setattr(doctor, "CHECKS", (training, doctor.system))
    assert doctor.examine() == 1
    out = capsys.readouterr().out
    assert "BAD  training   RuntimeError: gloo is not there" in out
    assert "system" in out and "Training cannot run here" in out


def test_a_lost_part_is_no_reason_to_fail(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "unavailable", lambda name: "no such module")
    monkeypatch.setattr(doctor, "CHECKS", (doctor.extension,))
    assert doctor.examine() == 0
    out = capsys.readouterr().out
    assert out.startswith("note extension") and "-> no such module" in out


def test_packages_that_do_not_fit(monkeypatch):
    monkeypatch.setattr(
        doctor.importlib.metadata, "requires", lambda _: ["torch>=99", "nosuch>=1", "numpy", "x; extra == 'y'"]
    )
    found = doctor.packages()
    assert found.state == "bad" and "nosuch MISSING" in found.text
    assert found.advice == "pip install 'torch>=99' 'nosuch>=1'"


@pytest.mark.parametrize(("there", "state"), [({}, "note"), ({"g++": sys.executable}, "ok")])
def test_compilers(monkeypatch, there, state):
    monkeypatch.setattr(doctor.shutil, "which", there.get)
    found = doctor.compilers()
    assert found.state == state
    assert ("the extension cannot be built" in found.text) == (state == "note")


def test_a_driver_without_a_torch_that_uses_it(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "has_gpu", lambda: True)
    found = doctor.devices()
    assert found.state == "note" and "torch sees no GPU, but there is a driver" in found.text
