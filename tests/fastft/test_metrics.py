import io
import json
import math
import sys
import time
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastft import metrics
from fastft.arguments import Arguments
from fastft.checkpoint import TrainState
from fastft.metrics import Recorder, check_output_dir

ENGINE = SimpleNamespace(get_global_grad_norm=lambda: 0.5)
SCHEDULE = SimpleNamespace(get_last_lr=lambda: [2e-5])
PLAN = SimpleNamespace(steps_per_epoch=4, padding=lambda: {"tokens_per_micro_batch": 120.0, "padding_fraction": 0.25})


def ranks(rank=0):
    return SimpleNamespace(rank=rank, world_size=1, local_rank=rank, device=torch.device("cpu"), first=rank == 0)


def recorder(folder, total_steps=10, state=None, rank=0, **arguments):
    arguments = {"report_to": ["none"], "logging_steps": 2, **arguments}
    return Recorder(Arguments(output_dir=str(folder), **arguments), ranks(rank), total_steps, state or TrainState())


def describe(recorder):
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    split = SimpleNamespace(summary=lambda: "40 examples", report={"examples": 40})
    report = {"replaced": {"rms_norm": 5}, "kept": {}, "packing": None}
    recorder.describe(
        task="task causal_lm: given by --task",
        dtype=torch.bfloat16,
        packing=True,
        splits={"train": split},
        plan=PLAN,
        model=model,
        patch="5 norms",
        report=report,
    )


def steps(recorder, first, last, loss=lambda step: float(step), tokens=(6, 4)):
    for step in range(first, last + 1):
        recorder.state.step = step
        recorder.step(torch.tensor(loss(step)), ENGINE, SCHEDULE, np.array(tokens))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def clock(monkeypatch):
    """A perf_counter that only `clock.now += seconds` moves."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def test_a_line_per_log_with_the_mean_loss_since_the_last(tmp_path, capsys):
    run = recorder(tmp_path, logging_steps=4)
    describe(run)
    steps(run, 1, 10)
    assert [line["step"] for line in lines(tmp_path)] == [4, 8, 10]
    assert [line["loss"] for line in lines(tmp_path)] == [2.5, 6.5, 9.5]
    last = lines(tmp_path)[-1]
    assert (last["epoch"], last["learning_rate"], last["grad_norm"], last["tokens"]) == (2.5, 2e-5, 0.5, 100)
    assert last["peak_memory_bytes"] > 1e6
    printed = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split("  ")[:3] for line in printed] == [
        ["step 4/10", "loss 2.5000", "lr 2.00e-05"],
        ["step 8/10", "loss 6.5000", "lr 2.00e-05"],
        ["step 10/10", "loss 9.5000", "lr 2.00e-05"],
    ]
    assert "tokens/s" in printed[0] and "GB" in printed[0] and "left" in printed[0]


def test_the_start_shows_what_was_decided_and_run_json_keeps_it(tmp_path, capsys):
    describe(recorder(tmp_path, learning_rate=3e-4))
    printed = capsys.readouterr().out
    for text in (
        "1 x CPU",
        "given by --task",
        "packed: 120 tokens in a micro-batch",
        "bfloat16",
        "learning_rate=0.0003",
        "8 parameters, 6 trained",
        "40 examples",
        "5 norms",
    ):
        assert text in printed, printed
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["arguments"]["learning_rate"] == 3e-4 and run["patch"]["replaced"] == {"rms_norm": 5}
    assert run["versions"]["torch"] == torch.__version__.split("+")[0] or run["versions"]["torch"] == torch.__version__
    assert run["versions"].keys() == {"fastft", "torch", "transformers", "deepspeed", "peft", "triton"}
    assert (run["world_size"], run["dtype"], run["packing"]) == (1, "bfloat16", True)


def test_throughput_leaves_out_warm_up_and_pauses(tmp_path, clock):
    run = recorder(tmp_path, total_steps=10)
    for step in range(1, 11):
        clock.now += 50.0 if step <= metrics.WARM_UP else 0.5
        steps(run, step, step)
        if step == 6:
            with run.pause():
                clock.now += 1000.0
    results = run.finish({})
    assert results["train_tokens_per_second"] == 20.0 and results["train_samples_per_second"] == 4.0
    assert results["train_runtime"] == 3 * 50.0 + 7 * 0.5
    assert [line["tokens_per_second"] for line in lines(tmp_path)][-2:] == [20.0, 20.0]


def test_all_results(tmp_path, capsys):
    run = recorder(tmp_path, total_steps=5)
    describe(run)
    steps(run, 1, 3)
    run.evaluation(3, {"eval_loss": 0.5, "eval_report": {"a": {"f1": 1.0}}})
    results = run.finish({"eval_loss": 0.5, "eval_accuracy": np.float32(0.75), "eval_report": {"a": {"f1": 1.0}}})
    written = json.loads((tmp_path / "all_results.json").read_text())
    assert written["train_loss"] == results["train_loss"] == 2.0  # step 3 counts, though no line was due yet
    assert lines(tmp_path)[-1]["loss"] == 3.0
    assert written["eval_accuracy"] == 0.75 and written["eval_report"] == {"a": {"f1": 1.0}}
    assert written.keys() >= {"train_runtime", "train_samples_per_second", "train_tokens_per_second", "eval_loss"}
    assert written["peak_memory_bytes"] > 1e6
    end = capsys.readouterr().out.splitlines()[-2:]
    assert end == [f"The model is in {tmp_path}", f"Use it: fastft predict --model {tmp_path} --file FILE"]
    png = (tmp_path / "loss_curve.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 5000


def test_a_skipped_step_spoils_neither_the_mean_nor_the_json(tmp_path):
    run = recorder(tmp_path, total_steps=4)
    steps(run, 1, 4, loss=lambda step: {1: 1.0, 2: math.nan, 3: math.inf, 4: math.nan}[step])
    assert [line["loss"] for line in lines(tmp_path)] == [1.0, None]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert run.finish({})["train_loss"] == 1.0


def test_a_resumed_run_writes_the_same_history(tmp_path):
    """Interrupted between two log lines, and with lines of lost steps and half a line already in the file."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    values = np.random.default_rng(0).random(12).tolist()
    run = recorder(whole, total_steps=12, logging_steps=4)
    steps(run, 1, 12, loss=lambda step: values[step - 1])
    expected = run.finish({})

    run = recorder(cut, total_steps=12, logging_steps=4)
    steps(run, 1, 6, loss=lambda step: values[step - 1])
    run.settle()
    saved = json.dumps(vars(run.state))
    steps(run, 7, 9, loss=lambda step: -1.0)
    with open(cut / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "lo')
    run = recorder(cut, total_steps=12, logging_steps=4, state=TrainState(**json.loads(saved)))
    assert [line["step"] for line in lines(cut)] == [4]
    steps(run, 7, 12, loss=lambda step: values[step - 1])
    results = run.finish({})
    assert [(line["step"], line["loss"], line["tokens"]) for line in lines(cut)] == [
        (line["step"], line["loss"], line["tokens"]) for line in lines(whole)
    ]
    assert results["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-12)


def test_a_fresh_run_starts_a_new_history(tmp_path):
    steps(recorder(tmp_path), 1, 4)
    recorder(tmp_path)
    assert lines(tmp_path) == []


def test_only_the_first_rank_writes(tmp_path, capsys):
    run = recorder(tmp_path / "out", rank=1, report_to=["tensorboard"])
    describe(run)
    steps(run, 1, 10)
    run.evaluation(10, {"eval_loss": 1.0})
    run.note("hello")
    assert run.finish({})["train_loss"] == 5.5
    assert not (tmp_path / "out").exists() and capsys.readouterr().out == ""


def test_tensorboard(tmp_path):
    run = recorder(tmp_path, report_to=["tensorboard"], run_name="mine")
    steps(run, 1, 4)
    run.evaluation(4, {"eval_loss": 0.25, "eval_report": {"a": 1}})
    run.finish({})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "mine"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(2, 1.5), (4, 3.5)]
    assert [(event.step, event.value) for event in events.Scalars("eval_loss")] == [(4, 0.25)]


def test_weights_and_biases(tmp_path, monkeypatch):
    """With a stand-in for the package: what it is told, and that its absence is noticed before anything is written."""
    with pytest.raises(ValueError, match="--report_to wandb: wandb is not installed; pip install wandb"):
        monkeypatch.setitem(sys.modules, "wandb", None)
        recorder(tmp_path / "none", report_to=["wandb"])
    assert not (tmp_path / "none").exists()

    told = []
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = SimpleNamespace(name="wandb")
    wandb.init = lambda **kwargs: (
        told.append(kwargs["name"])
        or SimpleNamespace(log=lambda *a, **k: told.append((a, k)), finish=lambda: told.append("end"))
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = recorder(tmp_path, report_to=["wandb"], run_name="mine", total_steps=2)
    steps(run, 1, 2)
    run.finish({})
    assert told[0] == "mine" and told[-1] == "end"
    assert told[1][0][0]["loss"] == 1.5 and told[1][1] == {"step": 2}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_one_bar(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    run = recorder(tmp_path, total_steps=4)
    steps(run, 1, 4)
    run.evaluation(4, {"eval_loss": 0.25})
    run.finish({})
    screen = sys.stdout.getvalue()
    assert "step 4/4" in screen and "loss 3.5000" in screen and "tokens/s" in screen and "left" in screen
    assert "step 4: eval_loss 0.2500" in screen
    assert screen.count("loss 3.5000") <= 8  # the bar is redrawn in place, a few times; lines would be one per step
    assert screen.rstrip().endswith("--file FILE")


def test_output_dir_must_be_a_folder_that_is_empty_or_given_up(tmp_path):
    check_output_dir(tmp_path / "new" / "run", overwrite=False, resume=False)
    assert (tmp_path / "new" / "run").is_dir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="--output_dir .*file: is a file; name a folder"):
        check_output_dir(tmp_path / "file", overwrite=True, resume=True)
    with pytest.raises(ValueError, match="--output_dir .*: Not a directory; name one that can be written"):
        check_output_dir(tmp_path / "file" / "run", overwrite=False, resume=False)
    with pytest.raises(
        ValueError, match="not empty; name another folder, or give --overwrite_output_dir true or --resume"
    ):
        check_output_dir(tmp_path, overwrite=False, resume=False)
    check_output_dir(tmp_path, overwrite=False, resume=True)
    assert (tmp_path / "file").read_text() == "x"


def test_overwriting_removes_records_and_nothing_else(tmp_path):
    ours = ["metrics.jsonl", "run.json", "all_results.json", "loss_curve.png", "checkpoints/step-000001/state.json"]
    ours += ["tensorboard/events.out.tfevents.1.host.2.0", "tensorboard/mine/events.out.tfevents.1.host.2.0"]
    kept = [
        "model.safetensors",
        "thesis.txt",
        "checkpoints/notes.txt",
        "checkpoints/step-final/weights.pt",
        "tensorboard/x",
    ]
    for name in ours + kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    check_output_dir(tmp_path, overwrite=True, resume=True)
    assert all((tmp_path / name).exists() for name in ours + kept)
    check_output_dir(tmp_path, overwrite=True, resume=False)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(kept)


def test_a_loss_spike_is_one_only_where_the_losses_before_agree():
    from fastft.metrics import is_spike

    steady = [1.0 + 0.01 * (i % 5) for i in range(20)]
    assert is_spike(3.0, steady) and not is_spike(1.2, steady)
    assert not is_spike(3.0, steady[:9]) and not is_spike(float("nan"), steady)
    assert not is_spike(3.0, [0.5, 1.5] * 10)
    assert is_spike(3.0, [*steady, float("nan")])
