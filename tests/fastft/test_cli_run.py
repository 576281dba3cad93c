"""The `fastft` command at work: a run through DeepSpeed's launcher, and what is done with the adapter that it leaves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from fastft import cli


def fastft_train(*arguments):
    command = [sys.executable, "-m", "fastft", "train", "--report_to", "none", "--bf16", "false", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_llama, sums_file):
    """The output folder of a short LoRA run on one rank."""
    folder = tmp_path_factory.mktemp("run") / "out"
    arguments = ["--model_name_or_path", tiny_llama, "--train_file", sums_file, "--validation_file", sums_file]
    arguments += ["--max_steps", "2", "--max_eval_samples", "10", "--use_peft", "true"]
    done = fastft_train(*arguments, "--output_dir", str(folder))
    assert done.returncode == 0, done.stderr
    assert f"fastft predict --model {folder}" in done.stdout
    assert json.loads((folder / "run.json").read_text())["world_size"] == 1
    return folder


def run(capsys, *argv):
    code = cli.main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_predict_answers_each_row_in_order(adapter, sums_file, tmp_path, capsys):
    rows, out = read(sums_file)[:5], tmp_path / "answers.jsonl"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["predict", "--model", str(adapter), "--file", str(tmp_path / "rows.jsonl"), "--max_new_tokens", "4"]
    code, _, err = run(capsys, *argv, "--output", str(out))
    assert code == 0, err
    answers = read(out)
    assert [{k: a[k] for k in row} for a, row in zip(answers, rows, strict=True)] == rows
    assert all(isinstance(answer["prediction"], str) for answer in answers)
    code, _, err = run(capsys, *argv, "--output", str(out))
    assert code == 2 and "answers.jsonl: exists" in err and read(out) == answers
    code, _, err = run(capsys, *argv, "--output", str(out), "--overwrite", "--batch_size", "1")
    assert code == 0 and read(out) == answers, err


def test_predict_names_file_and_row_and_leaves_nothing(adapter, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1="}\n{"promt": "1+2="}\n')
    argv = ["predict", "--model", str(adapter), "--file", str(tmp_path / "rows.jsonl")]
    code, _, err = run(capsys, *argv, "--output", str(tmp_path / "out.jsonl"))
    assert code == 2 and "rows.jsonl, row 2: column 'prompt' is missing" in err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_eval_repeats_the_evaluation_of_training(adapter, sums_file, tmp_path, capsys):
    first_ten, of_training = tmp_path / "ten.jsonl", json.loads((adapter / "all_results.json").read_text())["eval_loss"]
    first_ten.write_text("".join(Path(sums_file).read_text().splitlines(keepends=True)[:10]))
    losses = []
    for file in (first_ten, sums_file):
        code, out, err = run(capsys, "eval", "--model", str(adapter), "--file", str(file))
        assert code == 0, err
        losses.append(json.loads(out)["eval_loss"])
    assert losses[0] == pytest.approx(of_training, rel=1e-5)
    assert losses[1] != losses[0]  # training's limit on the number of rows does not hold here


def test_merge_writes_a_plain_model(adapter, tmp_path, capsys):
    merged = tmp_path / "merged"
    code, out, err = run(capsys, "merge", "--model", str(adapter), "--output_dir", str(merged))
    assert code == 0 and f"fastft predict --model {merged}" in out, err
    _, info = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    code, _, err = run(capsys, "merge", "--model", str(adapter), "--output_dir", str(merged))
    assert code == 2 and "not an empty folder" in err


@pytest.mark.distributed
def test_bad_data_ends_both_ranks_with_one_sentence(tiny_llama, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n{"prompt": "1+2="}\n')
    arguments = ["--model_name_or_path", tiny_llama, "--train_file", str(tmp_path / "rows.jsonl")]
    done = fastft_train(*arguments, "--output_dir", str(tmp_path / "out"), "--num_accelerators", "2")
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(said) == 1 and "rows.jsonl:2: column 'completion' is missing" in said[0]
