"""The DeepSpeed configuration of a run, and the choice of dtype. What the engine computes is in test_train_ranks.py."""

import json

import pytest
import torch

from fastft.arguments import Arguments
from fastft.engine import check_launcher, choose_dtype, deepspeed_config
from fastft.train import run

CPU = torch.device("cpu")


def config_from(tmp_path, content, **arguments):
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return deepspeed_config(Arguments(deepspeed=str(path), **arguments), torch.float32, world_size=2)


def test_written_here():
    config = deepspeed_config(Arguments(zero_stage=2, gradient_accumulation_steps=3), torch.bfloat16, world_size=2)
    assert config["train_batch_size"] == 8 * 3 * 2
    assert config["zero_optimization"]["stage"] == 2 and config["zero_optimization"]["overlap_comm"] is False
    assert config["bf16"]["enabled"] and config["data_types"]["grad_accum_dtype"] == "fp32"


def test_a_file_lies_over_ours_and_auto_is_filled_in(tmp_path):
    theirs = {
        "train_batch_size": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 7, "reduce_bucket_size": "auto"},
    }
    config = config_from(tmp_path, theirs)
    assert config["train_batch_size"] == 16
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["stage3_param_persistence_threshold"] == 7
    assert "reduce_bucket_size" not in config["zero_optimization"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"train_batch_size": 5}, "train_batch_size is 5, but the arguments give 16; say auto there"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"optimizer": {"type": "Adam"}}, "'optimizer' is not used"),
        ({"scheduler": {}}, "'scheduler' is not used"),
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object, not a list"),
    ],
)
def test_a_file_that_contradicts_is_refused(tmp_path, content, words):
    with pytest.raises(ValueError, match="ds.json") as refusal:
        config_from(tmp_path, content)
    assert words in str(refusal.value)


def test_a_missing_file_is_refused():
    with pytest.raises(ValueError, match="--deepspeed nowhere.json: No such file"):
        deepspeed_config(Arguments(deepspeed="nowhere.json"), torch.float32, world_size=1)


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bf16_is_the_default_where_it_is_native(monkeypatch, native, dtype):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native, raising=False)
    assert choose_dtype(Arguments(), CPU) == dtype
    assert choose_dtype(Arguments(bf16=True), CPU) == torch.bfloat16
    assert choose_dtype(Arguments(bf16=False), CPU) == torch.float32


def test_fp16_on_a_cpu_that_cannot_is_refused(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False, raising=False)
    with pytest.raises(ValueError, match="this CPU has no fp16 arithmetic; use --bf16 true"):
        choose_dtype(Arguments(fp16=True), CPU)


WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "LOCAL_RANK": "1"}


@pytest.mark.parametrize("environment", [{}, WHOLE, {"WORLD_SIZE": "1"}, {"MASTER_PORT": "29500"}, {"LOCAL_RANK": "0"}])
def test_a_launcher_or_none(environment):
    check_launcher(environment)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"MASTER_ADDR": None}, "RANK=1 and WORLD_SIZE=2 is set, but not MASTER_ADDR"),
        ({"MASTER_ADDR": "", "MASTER_PORT": None}, "but not MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": None}, "RANK=1 is set, but not WORLD_SIZE"),
        ({"RANK": None}, "WORLD_SIZE=2 is set, but not RANK"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is set, which must be a whole number"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE='-2' is set, which must be a whole number"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE=0 is set, which must be from 1"),
        ({"RANK": "2"}, "RANK=2 is set, which must be from 0 to 1"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is set, which must be from 1 to 65535"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x' is set, which must be a whole number"),
        ({"LOCAL_SIZE": "9" * 5000}, "LOCAL_SIZE='9999"),
    ],
)
def test_half_a_launcher_is_one_sentence(change, sentence):
    environment = {name: value for name, value in {**WHOLE, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=r"start ranks with `fastft train`, .* to train alone$") as error:
        check_launcher(environment)
    assert sentence in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 250


def test_a_run_under_half_a_launcher_ends_at_once(monkeypatch, capsys):
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    assert run(Arguments()) == 2
    assert capsys.readouterr().err.startswith("fastft train: error: RANK=3 is set, but not WORLD_SIZE, MASTER_ADDR")
