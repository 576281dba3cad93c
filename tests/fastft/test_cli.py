"""The `fastft` command up to the point where work begins: help, mistakes, and how the launcher is started."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastft import cli, launch
from fastft.arguments import Arguments, parse_arguments

RECIPES = Path(__file__).parents[2] / "recipes"

# Written twice on purpose: a flag that is added, renamed or dropped changes what people's scripts and recipes mean.
FLAGS = """
    adam_beta1 adam_beta2 adam_epsilon bf16 cache_dir completion_column completion_only_loss dataset_config_name
    dataset_name ddp_timeout deepspeed early_stopping_patience eval_on_start eval_steps fp16 gradient_accumulation_steps
    gradient_checkpointing kernels label_column label_smoothing_factor learning_rate load_best_model_at_end load_in_4bit
    local_rank logging_steps lora_alpha lora_dropout lora_r lora_target_modules lr_scheduler_type max_eval_samples max_grad_norm
    max_length max_skipped_steps max_steps max_train_samples metric_for_best_model model_name_or_path num_train_epochs
    offload_optimizer on_bad_row on_save_error optim output_dir overwrite_output_dir packing per_device_eval_batch_size
    per_device_train_batch_size preprocessing_num_workers problem_type prompt_column report_to resume_from_checkpoint
    run_name save_steps save_total_limit seed task test_file text_column text_pair_column tokenizer_name train_file
    trust_remote_code use_dora use_peft use_rslora validation_file verify_checkpoint warmup_ratio
    warmup_steps weight_decay zero_stage
"""


def run(capsys, *argv):
    """(exit code, stdout, stderr) of a command line."""
    try:
        code = cli.main(list(argv))
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def test_the_flags_are_these():
    assert sorted(f.name for f in dataclasses.fields(Arguments)) == sorted(FLAGS.split())


@pytest.mark.parametrize(
    "argv",
    [["train", "--help"], ["predict", "--help"], ["doctor", "--help"], ["--version"], ["train", "--zero_stage", "4"]],
)
def test_answers_at_once(argv):
    """Within two seconds of processor time, and without what takes longer to import."""
    code = f"""if True:
        import sys, time
        from fastft.cli import main
        try:
            main({argv!r})
        except SystemExit:
            pass
        assert not {{"torch", "transformers", "deepspeed", "datasets"}} & set(sys.modules)
        assert time.process_time() < 2
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_names_every_flag(capsys):
    code, out, _ = run(capsys, "train", "--help")
    assert code == 0
    assert not [
        name for name in [*FLAGS.split(), *launch.LAUNCHER_OPTIONS] if f"--{name}" not in out and name != "local_rank"
    ]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["train", "--zero_stage", "4"], "fastft train: error: --zero_stage 4: must be one of 0, 1, 2, 3"),
        (["train", "--learning_rate", "fast"], "--learning_rate: invalid float value: 'fast'"),
        (["train", "--learnin_rate", "1"], "unknown argument --learnin_rate: did you mean --learning_rate?"),
        (["train", "--num_accelerator", "2"], "unknown argument --num_accelerator: did you mean --num_accelerators?"),
        (["train", "--config", "RECIPE"], "unknown key learnin_rate: did you mean learning_rate?"),
        (["train", "--num_accelerators", "0"], "--num_accelerators 0: must be at least 1"),
        (["train", "--num_accelerators", "two"], "invalid int value: 'two'"),
        (["train", "--hostfile", "nowhere"], "--hostfile nowhere: no such file"),
        (["train", "--num_nodes", "2"], "--num_nodes 2: needs --hostfile"),
        (["train", "--include", "localhost:0", "--num_gpus", "1"], "--include and --num_gpus: give one of them"),
        (["train", "--node_rank", "1"], "--no_ssh and --node_rank: each needs the other"),
        (["train", "--master_port", "70000"], "--master_port 70000: must be from 1 to 65535"),
        (["predict", "--file", "x.txt"], "fastft predict: error: the following arguments are required: --model"),
        (["predict", "--modle", "x"], "fastft predict: error: unknown argument --modle: did you mean --model?"),
        (["trian"], "fastft: error: unknown command trian: did you mean train?"),
    ],
)
def test_a_mistake_gets_one_sentence(capsys, tmp_path, monkeypatch, argv, sentence):
    monkeypatch.setattr(launch.subprocess, "Popen", lambda *command, **how: pytest.fail(f"started {command}"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learnin_rate: 1e-3\n")
    code, out, err = run(capsys, *[str(recipe) if arg == "RECIPE" else arg for arg in argv])
    assert (code, out) == (2, "")
    assert sentence in err and err.count("\n") == 1


def test_no_command_shows_the_commands(capsys):
    code, out, _ = run(capsys)
    assert code == 2 and all(name in out for name in ("train", "predict", "eval", "merge", "quantize", "doctor"))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_complete_but_for_the_model_and_the_data(path):
    args = parse_arguments(["--config", str(path), "--model_name_or_path", "x", "--train_file", "x.jsonl"])
    assert args.output_dir == f"outputs/{path.stem}" and args.task
    assert f"--config recipes/{path.name}" in path.read_text()


@pytest.fixture
def started(monkeypatch):
    """started(*argv) -> (command line, environment) that `fastft train` turns into, on a machine without a GPU."""
    for name in ("DS_ACCELERATOR", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "has_gpu", lambda: False)
    monkeypatch.setattr(launch, "_cores", lambda: 8)

    def start(*argv):
        calls = []

        def popen(command, env, **how):
            calls.append((command, env))
            return SimpleNamespace(wait=lambda: 0)

        monkeypatch.setattr(launch.subprocess, "Popen", popen)
        assert cli.main(["train", *argv]) == 0
        return calls[0]

    return start


def flag(command, name):
    return command[command.index(name) + 1]


def test_a_cpu_gets_one_rank_with_all_cores(started):
    command, environment = started("--max_steps", "3", "--lora_target_modules", "q_proj", "v_proj")
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert flag(command, "--num_accelerators") == "1" and 0 < int(flag(command, "--master_port")) < 65536
    assert environment["DS_ACCELERATOR"] == "cpu" and "OMP_NUM_THREADS" not in environment
    script = command.index(str(Path(cli.__file__).with_name("train.py")))
    assert command[script + 1 :] == ["--max_steps", "3", "--lora_target_modules", "q_proj", "v_proj"]


def test_ranks_share_the_cores(started, monkeypatch):
    assert started("--num_gpus", "2")[1]["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert started("--num_accelerators", "2")[1]["OMP_NUM_THREADS"] == "3"


def test_launcher_flags_go_to_the_launcher(started, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("node-1 slots=4\n")
    command, environment = started("--hostfile", str(hosts), "--no_ssh", "--node_rank", "1", "--seed", "1")
    assert flag(command, "--hostfile") == str(hosts) and "--no_ssh" in command and flag(command, "--node_rank") == "1"
    assert "--master_port" not in command and "DS_ACCELERATOR" not in environment
    assert command[-2:] == ["--seed", "1"]


def test_other_nodes_get_no_argument_that_their_shell_would_run(capsys, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("node-1 slots=1\nnode-2 slots=1\n")
    for value in ("$(touch /tmp/x)", "a;b", "it's", "a|b", "`id`", "a\nb", "a&b", "a>b", "*"):
        code, _, err = run(capsys, "train", "--hostfile", str(hosts), "--run_name", value)
        assert code == 2 and "shells of the other nodes" in err


def test_a_gpu_machine_leaves_the_number_of_ranks_to_deepspeed(started, monkeypatch):
    monkeypatch.setattr(launch, "has_gpu", lambda: True)
    command, environment = started("--max_steps", "3")
    assert "--num_accelerators" not in command and "DS_ACCELERATOR" not in environment
    assert "--master_port" in command


def test_predict_refuses_before_it_loads_anything(capsys, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    rows, out = str(tmp_path / "rows.jsonl"), str(tmp_path / "out.jsonl")
    model = ["predict", "--model", str(tmp_path / "nowhere")]
    for argv, sentence in (
        ([*model, "--file", rows, "--output", out], "out.jsonl: exists; give --overwrite to replace it"),
        ([*model, "--file", rows, "--output", str(tmp_path / "no" / "x")], "must be a file in a folder that exists"),
        ([*model, "--file", str(tmp_path / "gone.jsonl")], "gone.jsonl: no such file"),
        ([*model, "--file", rows, "--batch_size", "0"], "--batch_size 0: must be at least 1"),
        ([*model, "--file", rows], "nowhere: no such folder"),
    ):
        code, printed, err = run(capsys, *argv)
        assert (code, printed) == (2, "") and sentence in err and err.count("\n") == 1
    assert (tmp_path / "out.jsonl").read_text() == "mine\n"
