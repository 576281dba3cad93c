"""The DeepSpeed configuration of a run, and the choice of dtype. What the engine computes is in test_train_ranks.py."""

import json

import pytest
import torch

from fastft.arguments import Arguments
from fastft.engine import choose_dtype, deepspeed_config

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
