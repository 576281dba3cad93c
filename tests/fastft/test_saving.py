"""A save beside training: the state is copied at once and written later, and nothing that happens meanwhile shows in it."""

import json
import threading
from collections import OrderedDict

import pytest
import torch

from fastft import train as loop
from fastft.arguments import Arguments
from fastft.checkpoint import engine_io, find_checkpoint, saving
from fastft.train import train


@pytest.fixture
def run(tiny_llama, sums_file, tmp_path):
    """run(name, **arguments) -> losses of a run in the folder `name`."""

    def make(name, **arguments):
        out = tmp_path / name
        train(
            Arguments(
                model_name_or_path=tiny_llama, train_file=sums_file, output_dir=str(out), report_to=["none"], bf16=False,
                max_steps=4, zero_stage=2, learning_rate=1e-2, logging_steps=1, optim="adamw_8bit", **arguments,
            )
        )  # fmt: skip
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if "loss" in line]

    return make


def test_training_goes_on_while_a_checkpoint_is_written(run, tmp_path, monkeypatch):
    """The writing of step 2 waits for the backward pass of step 4; what it then writes is the state of step 2."""
    whole = run("whole")
    far_enough, in_time, steps = threading.Event(), [], [0]
    finish, backward = saving._Save.finish, loop.backward

    def late(save):
        in_time.append(far_enough.wait(60))
        finish(save)

    def counted(*args):
        steps[0] += 1
        if steps[0] == 4:
            far_enough.set()
        backward(*args)

    with monkeypatch.context() as patched:
        patched.setattr(saving._Save, "finish", late)
        patched.setattr(loop, "backward", counted)
        assert run("late", save_steps=2) == whole
    assert in_time == [True, True], "training waited for the checkpoint"
    step2 = tmp_path / "late" / "checkpoints" / "step-000002"
    assert find_checkpoint(step2.parent, str(step2), verify="full") == step2
    assert run("late", resume_from_checkpoint=str(step2)) == whole


def test_short_memory_means_no_copy(run, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_io, "fits_in_memory", lambda state: False)
    monkeypatch.setattr(engine_io, "copied", lambda state: pytest.fail("a copy, though memory is short"))
    whole = run("whole", save_steps=2)
    assert run("whole", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoints" / "step-000002")) == whole


@pytest.mark.parametrize("action", ["stop", "continue"])
def test_a_write_that_fails_in_the_thread_is_the_loops_error(run, tmp_path, monkeypatch, capsys, action):
    write, calls = engine_io.write_hashed, [0]

    def failing(path, content):
        calls[0] += 1
        if calls[0] == 3:  # of the second save
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(engine_io, "write_hashed", failing)
    if action == "stop":
        with pytest.raises(
            OSError, match=r"step-000002 was not written .* rank 0: .*MB are free there: .*No space left"
        ):
            run("full", save_steps=1, on_save_error="stop")
    else:
        run("full", save_steps=1, on_save_error="continue")
        assert "step-000002 was not written" in capsys.readouterr().out
    kept = sorted(path.name for path in (tmp_path / "full" / "checkpoints").glob("*step-*"))
    assert kept == ["step-000001", *(["step-000003", "step-000004"] if action == "continue" else [])]


def test_a_copy_shares_nothing_but_its_own_aliases():
    weight = torch.nn.Parameter(torch.arange(6.0))
    state = {
        "a": weight,
        "tied": weight,
        "deep": OrderedDict(x=[weight.data[1:3], (1, {"lr": 0.1})]),
        "size": torch.Size([2]),
    }
    copy = engine_io.copied(state)
    state["deep"]["x"][1][1]["lr"] = 5
    with torch.no_grad():
        weight.zero_()
    assert copy["a"].tolist() == list(range(6)) and copy["a"] is copy["tied"] and not copy["a"].requires_grad
    assert copy["deep"]["x"][0].tolist() == [1, 2] and copy["deep"]["x"][1] == (1, {"lr": 0.1})
    assert type(copy["deep"]) is OrderedDict and copy["size"] == (2,)


def test_memory_is_short_where_the_ranks_of_a_machine_fill_half_of_what_is_left(monkeypatch):
    monkeypatch.setattr(engine_io.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    state = {"a": torch.zeros(50), "b": [torch.zeros(50, dtype=torch.bfloat16)]}  # 300 bytes
    assert engine_io.fits_in_memory(state)
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert not engine_io.fits_in_memory(state)
