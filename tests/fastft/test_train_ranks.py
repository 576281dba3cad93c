"""The loop on two ranks: every ZeRO stage, dtype and cut of a step gives the same curve, and a resumed run is the same run.

All runs share one launch; each test reads its outcome.
"""

import json

import pytest

pytestmark = pytest.mark.distributed
STAGES = (0, 1, 2, 3)
STEPS = 20  # the data make 8 steps an epoch, so the short last step of an epoch is met twice


@pytest.fixture(scope="module")
def arguments(tiny_llama, sums_file):
    return {
        "model_name_or_path": tiny_llama,
        "train_file": sums_file,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-3,
        "weight_decay": 0.01,
        "warmup_steps": 3,
        "max_steps": STEPS,
        "bf16": False,
    }


@pytest.fixture(scope="module")
def outcomes(launch, arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    lora = {"use_peft": True, "lora_r": 4}
    cases = {f"fp32-zero{stage}": {"zero_stage": stage} for stage in STAGES}
    cases |= {f"bf16-zero{stage}": {"zero_stage": stage, "bf16": True} for stage in STAGES}
    cases |= {f"lora-zero{stage}": {"zero_stage": stage, **lora} for stage in STAGES}
    cases |= {f"dora-zero{stage}": {"zero_stage": stage, **lora, "use_dora": True} for stage in (0, 3)}
    cases |= {
        "micro4": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
        "padded": {"packing": False},
        "checkpointing": {"gradient_checkpointing": True, "zero_stage": 3},
        "lora-checkpointing": {"gradient_checkpointing": True, "zero_stage": 3, **lora},
        "dora-checkpointing": {"gradient_checkpointing": True, "zero_stage": 3, **lora, "use_dora": True},
        "offload": {"zero_stage": 2, "offload_optimizer": "cpu"},
        "row-gradients": {"min_elements_of_row_gradients": 0},
        "row-gradients-bf16": {"min_elements_of_row_gradients": 0, "bf16": True},
        "too-many-ranks": {"max_train_samples": 1},
        "nan": {"poison": [8, 1], "max_steps": 8},
        "nan-zero2-bf16": {"poison": [8, 1], "max_steps": 8, "zero_stage": 2, "bf16": True},
        "nan-zero3": {"poison": [8, 1], "max_steps": 8, "zero_stage": 3},
    }
    for stage in (0, 1, 2, 3):
        run = {"zero_stage": stage, "bf16": stage == 2, "output_dir": str(folder / f"{stage}"), "save_steps": 5}
        cases[f"stopped-zero{stage}"] = {**run, "max_steps": 12, "num_train_epochs": 2.5, "save_total_limit": 1}
        cases[f"resumed-zero{stage}"] = {**run, "max_steps": 12, "resume_from_checkpoint": "auto"}
    return launch({name: {**arguments, **case} for name, case in cases.items()}, ranks=2)


@pytest.fixture(scope="module")
def alone(launch, arguments):
    """The same global batches on one rank."""
    one = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    return launch({"alone": {**arguments, **one}}, ranks=1)["alone"]


def losses(outcome):
    assert "error" not in outcome, outcome["traceback"]
    return outcome["losses"]


def agree(left, right, relative):
    assert len(left) == len(right) == STEPS
    assert left == pytest.approx(right, rel=relative)


def test_the_run_learns(outcomes):
    curve = losses(outcomes["fp32-zero0"])
    assert curve[-1] < 0.8 * curve[0]


@pytest.mark.parametrize("stage", STAGES[1:])
@pytest.mark.parametrize(("kind", "relative"), [("fp32", 1e-4), ("bf16", 5e-3), ("lora", 1e-4)])
def test_stages_agree(outcomes, kind, relative, stage):
    agree(losses(outcomes[f"{kind}-zero{stage}"]), losses(outcomes[f"{kind}-zero0"]), relative)


@pytest.mark.parametrize("case", ["micro4", "padded", "checkpointing", "offload", "row-gradients"])
def test_how_a_step_is_computed_does_not_change_it(outcomes, case):
    agree(losses(outcomes[case]), losses(outcomes["fp32-zero0"]), 1e-4)


def test_row_gradients_in_bf16(outcomes):
    agree(losses(outcomes["row-gradients-bf16"]), losses(outcomes["bf16-zero0"]), 5e-3)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_with_checkpointing_under_zero3(outcomes, kind):
    agree(losses(outcomes[f"{kind}-checkpointing"]), losses(outcomes[f"{kind}-zero0"]), 1e-4)


def test_dora_under_zero3_is_another_run_than_lora(outcomes):
    agree(losses(outcomes["dora-zero3"]), losses(outcomes["dora-zero0"]), 1e-4)
    assert losses(outcomes["dora-zero0"]) != losses(outcomes["lora-zero0"])


def test_the_rank_count_does_not_change_it(outcomes, alone):
    agree(losses(alone), losses(outcomes["fp32-zero0"]), 1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_is_the_same_run(outcomes, stage):
    """Stopped after 12 steps with a checkpoint at 10: steps 11 and 12 come out bit for bit, from the same file."""
    whole, resumed = outcomes[f"stopped-zero{stage}"], outcomes[f"resumed-zero{stage}"]
    assert losses(resumed) == losses(whole)


@pytest.mark.parametrize("case", ["nan", "nan-zero2-bf16", "nan-zero3"])
def test_a_nan_on_one_rank_skips_the_step_on_all(outcomes, case):
    """Micro-batch 9 is in step 5: that step is skipped, and the run goes on with finite losses."""
    curve = losses(outcomes[case])
    assert outcomes[case]["results"]["skipped_steps"] == 1
    assert all(value == value for value in curve[5:]) and len(curve) == 8


def test_more_ranks_than_examples(outcomes):
    assert "1 training examples for 2 ranks" in outcomes["too-many-ranks"]["error"]


def test_outcomes_are_json(outcomes):
    assert json.dumps(outcomes["fp32-zero0"]["results"])
