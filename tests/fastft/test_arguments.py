"""The command line and the recipes, generated from the dataclasses."""

import dataclasses
import subprocess
import sys

import pytest

from fastft.arguments import Arguments, parse_arguments


def parse(*argv):
    return parse_arguments(list(argv), prog="fastft train")


def refusal(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_every_field_has_a_flag_and_both_spellings():
    assert parse("--learning-rate", "1e-3", "--packing", "false", "--report_to", "none").packing is False
    assert parse("--learning_rate", "1e-3").learning_rate == 1e-3
    assert parse("--lora_target_modules", "q_proj", "v_proj").lora_target_modules == ["q_proj", "v_proj"]
    assert parse() == Arguments()


def test_command_line_lies_over_the_recipe(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("learning_rate: 5e-4\nmax_steps: 7\nreport_to: none\nbf16: false\n")
    args = parse("--config", str(recipe), "--max_steps", "9")
    assert (args.learning_rate, args.max_steps, args.report_to, args.bf16) == (5e-4, 9, ["none"], False)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("learnin_rate: 1", "unknown key learnin_rate: did you mean learning_rate?"),
        ("max_steps: many", "max_steps: 'many' is not a N"),
        ("max_steps: 1.5", "max_steps: 1.5 is not a N"),
        ("- a list", "must hold `argument: value` lines, not a list"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_recipes(capsys, tmp_path, recipe, words):
    path = tmp_path / "r.yaml"
    path.write_text(recipe)
    message = refusal(capsys, "--config", str(path))
    assert words in message and "r.yaml" in message


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--zero_stage", "4"], "--zero_stage 4: must be one of 0, 1, 2, 3"),
        (["--learnin_rate", "1"], "unknown argument --learnin_rate: did you mean --learning_rate?"),
        (["--qqqq", "1"], "unknown argument --qqqq; `fastft train --help` lists all"),
        (["--learning_rate", "nan"], "--learning_rate nan: must be at least 0"),
        (["--max_length", "1"], "--max_length 1: must be at least 2"),
        (["--warmup_ratio", "1.5"], "--warmup_ratio 1.5: must be at least 0 and below 1"),
        (["--num_train_epochs", "0"], "--num_train_epochs 0.0: must be above 0"),
        (["--bf16", "true", "--fp16", "true"], "choose one"),
        (["--packing", "maybe"], "maybe: must be true or false"),
        (["--report_to", "mlflow"], "--report_to mlflow: must be tensorboard, wandb or none"),
        (["--offload_optimizer", "cpu"], "needs --zero_stage 1, 2 or 3"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: No such file"),
    ],
)
def test_bad_values_get_one_sentence(capsys, argv, words):
    assert words in refusal(capsys, *argv)


def test_arguments_round_trip_through_run_json():
    args = Arguments(learning_rate=1e-3, report_to=["none"])
    assert Arguments(**dataclasses.asdict(args)) == args


def test_help_needs_no_torch():
    use = "from fastft.arguments import build_parser; build_parser('x').format_help()"
    subprocess.run([sys.executable, "-c", f"{use}; import sys; assert 'torch' not in sys.modules"], check=True)
