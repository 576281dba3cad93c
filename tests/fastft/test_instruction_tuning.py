"""Instruction tuning of a really trained Llama on real data: the curves of all ZeRO stages agree, and what a run saves
has the loss of its last evaluation.

`make test` runs two of the eight combinations of data, LoRA and dtype; `make matrix` runs all.
"""

import itertools
import json
import os
from pathlib import Path

import pytest
import torch

from fastft.data import Collator, eval_batches
from fastft.models import load_for_inference

pytestmark = pytest.mark.distributed
STAGES, STEPS = (0, 1, 2, 3), 20
ALL = list(itertools.product(("dolly", "gsm8k"), ("full", "lora"), ("fp32", "bf16")))
COMBINATIONS = (
    ALL if os.environ.get("FASTFT_MATRIX") == "full" else [("dolly", "lora", "bf16"), ("gsm8k", "full", "fp32")]
)
FILES = {
    "dolly": ("instruct/dolly_filtered_3k.json", "instruct/dolly_filtered_3k.json"),
    "gsm8k": ("gsm8k/train.jsonl", "gsm8k/test.jsonl"),
}
RELATIVE = {"fp32": 1e-4, "bf16": 5e-3}


@pytest.fixture(scope="module")
def outcomes(launch, shared_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("instruction")
    cases = {}
    for data, kind, dtype in COMBINATIONS:
        train_file, validation_file = (str(shared_folder / "data" / name) for name in FILES[data])
        for stage in STAGES:
            name = f"{data}-{kind}-{dtype}-{stage}"
            cases[name] = {
                "model_name_or_path": str(shared_folder / "models" / "stories260K"),
                "train_file": train_file,
                "validation_file": validation_file,
                "max_train_samples": 400,
                "max_eval_samples": 24,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 2,
                "max_length": 192,
                "max_steps": STEPS,
                "learning_rate": 1e-3,
                "use_peft": kind == "lora",
                "bf16": dtype == "bf16",
                "zero_stage": stage,
                "output_dir": str(out / name),
            }
    return {name: (case, outcome) for (name, case), outcome in zip(cases.items(), launch(cases).values(), strict=True)}


@pytest.mark.parametrize(("data", "kind", "dtype"), COMBINATIONS)
def test_the_stages_agree(outcomes, data, kind, dtype):
    curves = []
    for stage in STAGES:
        _, outcome = outcomes[f"{data}-{kind}-{dtype}-{stage}"]
        assert "error" not in outcome, outcome["traceback"]
        curves.append(outcome["losses"])
    assert len(curves[0]) == STEPS and curves[0][-1] < curves[0][0]
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=RELATIVE[dtype])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("data", "kind", "dtype"), COMBINATIONS)
def test_the_saved_model_has_the_last_evaluation_loss(outcomes, data, kind, dtype, stage):
    case, outcome = outcomes[f"{data}-{kind}-{dtype}-{stage}"]
    assert "error" not in outcome, outcome["traceback"]
    folder = Path(case["output_dir"])
    run = json.loads((folder / "run.json").read_text())
    assert run["dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    assert "loss" in run["patch"]["replaced"]  # no logits, ZeRO 3 included
    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    model, tokenizer, task = load_for_inference(
        folder, dtype=torch_dtype, validation_file=case["validation_file"], max_eval_samples=case["max_eval_samples"]
    )
    split = task.load_data(tokenizer)["validation"]
    loss = task.evaluate(model, eval_batches(split, Collator(tokenizer, model.config, packing=True), 16, 0, 1))["loss"]
    # the batches differ from those of two ranks, so in bf16 the rounding does too
    assert loss == pytest.approx(outcome["results"]["eval_loss"], rel=1e-5 if dtype == "fp32" else 2e-3)
