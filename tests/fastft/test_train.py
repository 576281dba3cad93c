"""One rank, end to end: what a run leaves behind, both families, evaluation and best model, and input that cannot be used."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig

from fastft.arguments import Arguments
from fastft.train import train

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    """run(**arguments) -> (results, output folder)."""

    def start(**arguments):
        arguments = {
            "output_dir": str(tmp_path / "out"),
            "report_to": ["none"],
            "logging_steps": 1,
            "bf16": False,
        } | arguments
        return train(Arguments(**arguments)), Path(arguments["output_dir"])

    return start


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory, tiny_llama):
    """A random two-layer BERT over the character tokenizer of `tiny_llama`."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    for file in Path(tiny_llama).glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Texts whose first word decides the label; a training, a validation and a test file."""
    folder = tmp_path_factory.mktemp("colours")
    for name, start in (("train", 0), ("validation", 400), ("test", 500)):
        rows = [
            f"{('warm', 'cold')[i % 2]} {'abcdefgh'[i % 8] * (i % 23)}\t{('red', 'blue')[i % 2]}"
            for i in range(start, start + (240 if name == "train" else 41))
        ]
        (folder / f"{name}.tsv").write_text("text\tlabel\n" + "\n".join(rows))
    return folder


def test_classification_learns_and_leaves_everything(run, tiny_bert, colours):
    results, folder = run(
        model_name_or_path=tiny_bert,
        train_file=str(colours / "train.tsv"),
        validation_file=str(colours / "validation.tsv"),
        test_file=str(colours / "test.tsv"),
        learning_rate=3e-3,
        num_train_epochs=3,
        report_to=["tensorboard"],
    )
    assert results["eval_accuracy"] > 0.9 and results["test_accuracy"] > 0.9
    assert {"blue", "red"} == set(results["eval_per_class"])
    written = json.loads((folder / "all_results.json").read_text())
    wanted = {"train_loss", "train_runtime", "train_samples_per_second", "train_tokens_per_second", "peak_memory_bytes"}
    assert wanted | {"eval_loss", "eval_macro_f1"} <= set(written)
    assert (folder / "loss_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert list((folder / "tensorboard").glob("**/events*"))
    record = json.loads((folder / "run.json").read_text())
    assert record["packing"] and record["arguments"]["learning_rate"] == 3e-3 and record["versions"]["torch"]
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.id2label == {0: "blue", 1: "red"}


def test_sentence_pairs(run, tiny_bert, tmp_path):
    """Two texts and a label in each row: the label says whether they begin alike, so one text alone tells nothing."""
    rows = [f"{a} {a * 3}\t{b} {b * 2}\t{'same' if a == b else 'other'}" for a in "abcdefgh" for b in "abcdefgh" * 2]
    rows += [f"{a}\t{a}\tsame" for a in "abcdefgh" * 8]
    file = tmp_path / "pairs.tsv"
    file.write_text("sentence1\tsentence2\tlabel\n" + "\n".join(rows))
    results, folder = run(
        model_name_or_path=tiny_bert,
        train_file=str(file),
        validation_file=str(file),
        learning_rate=3e-3,
        num_train_epochs=2,
    )
    assert set(results["eval_per_class"]) == {"other", "same"} and results["eval_accuracy"] > 0.6
    first, last = (json.loads((folder / "metrics.jsonl").read_text().splitlines()[i])["loss"] for i in (0, -2))
    assert last < first


def test_seventy_seven_classes(run, tiny_bert, shared):
    data = shared / "data" / "banking77"
    results, folder = run(
        model_name_or_path=tiny_bert,
        train_file=str(data / "train.csv"),
        validation_file=str(data / "test.csv"),
        max_steps=3,
        max_eval_samples=64,
    )
    assert len(results["eval_per_class"]) == 77
    assert (
        json.loads((folder / "config.json").read_text())["id2label"]["76"] == "wrong_exchange_rate_for_cash_withdrawal"
    )


@pytest.mark.parametrize("use_peft", [False, True])
def test_the_saved_model_has_the_last_evaluation_loss(run, tiny_llama, sums_file, use_peft):
    from fastft.data import Collator, eval_batches
    from fastft.models import load_for_inference

    results, folder = run(
        model_name_or_path=tiny_llama, train_file=sums_file, validation_file=sums_file, max_steps=6, learning_rate=1e-2,
        use_peft=use_peft,
    )  # fmt: skip
    assert (folder / "adapter_model.safetensors").exists() == use_peft
    assert (folder / "model.safetensors").exists() != use_peft
    model, tokenizer, task = load_for_inference(folder, validation_file=sums_file)
    split = task.load_data(tokenizer)["validation"]
    batches = eval_batches(split, Collator(tokenizer, model.config, packing=True), 16, 0, 1)
    assert task.evaluate(model, batches)["loss"] == pytest.approx(results["eval_loss"], rel=1e-5)


def test_packing_does_not_change_the_curve(run, tiny_llama, tiny_bert, sums_file, colours, tmp_path):
    for name, model, file in (("llama", tiny_llama, sums_file), ("bert", tiny_bert, str(colours / "train.tsv"))):
        curves = []
        for packing in (True, False):
            _, folder = run(
                model_name_or_path=model, train_file=file, max_steps=10, learning_rate=1e-3, packing=packing,
                output_dir=str(tmp_path / f"{name}-{packing}"), kernels="auto", label_smoothing_factor=0.1,
            )  # fmt: skip
            assert json.loads((folder / "run.json").read_text())["packing"] is packing
            curves.append([line["loss"] for line in lines(folder)])
        if name == "llama":  # BERT has dropout, whose masks depend on the layout; without it see test_packing_models.py
            assert curves[0] == pytest.approx(curves[1], rel=1e-4)
        assert len(curves[0]) == len(curves[1]) == 10


def test_best_model_and_early_stopping(run, tiny_llama, sums_file):
    """The learning rate explodes after a good start: the saved model is the best one, and the run ends early."""
    results, folder = run(
        model_name_or_path=tiny_llama, train_file=sums_file, validation_file=sums_file, max_steps=40, eval_steps=2,
        learning_rate=0.5, warmup_steps=40, load_best_model_at_end=True, early_stopping_patience=3, max_grad_norm=0,
        save_total_limit=1,
    )  # fmt: skip
    evaluations = [(line["step"], line["eval_loss"]) for line in lines(folder) if "eval_loss" in line]
    best = min(loss for _, loss in evaluations)
    assert max(step for step, _ in evaluations) < 40
    assert results["eval_loss"] == pytest.approx(best, rel=1e-6)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert all(p.isfinite().all() for p in model.parameters())


def test_resume_on_one_rank_is_bit_exact_with_dropout(run, tiny_bert, colours, tmp_path):
    arguments = {
        "model_name_or_path": tiny_bert, "train_file": str(colours / "train.tsv"), "max_steps": 9, "save_steps": 4,
        "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine",
    }  # fmt: skip
    _, folder = run(**arguments)
    whole = [line["loss"] for line in lines(folder)]
    _, folder = run(**arguments, resume_from_checkpoint=str(folder / "checkpoints" / "step-000004"))
    assert [line["loss"] for line in lines(folder)] == whole and len(whole) == 9


def test_too_many_skipped_steps_end_the_run(run, tiny_llama, sums_file, monkeypatch, capsys):
    """From step 3 on; the message tells the last good checkpoint, the notes the rows whose loss was not finite."""
    from fastft.tasks.causal_lm import Task

    whole, calls = Task.loss, [0]

    def loss(*args):
        calls[0] += 1
        return whole(*args) * (float("inf") if calls[0] > 2 else 1.0)

    monkeypatch.setattr(Task, "loss", loss)
    sentence = (
        "3 steps in a row had NaN or infinite gradients, the last is step 5: .*last good checkpoint: .*step-000004"
    )
    with pytest.raises(FloatingPointError, match=sentence):
        run(model_name_or_path=tiny_llama, train_file=sums_file, max_steps=9, max_skipped_steps=3, save_steps=2)
    told = [
        line for line in capsys.readouterr().out.splitlines() if "skipped: NaN or infinite loss (rank 0: lines" in line
    ]
    assert len(told) == 3 and len(re.findall(r"\d+", told[0].split("lines or rows")[1])) == 8


# Bad input: one sentence, and nothing written or lost


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (None, "gone.jsonl", "--train_file .*gone.jsonl: no such file"),
        (b"", "empty.jsonl", "empty.jsonl: is empty"),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "c"}\n', "rows.jsonl", "rows.jsonl:2: .*completion"),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": \n', "bad.jsonl", "bad.jsonl:2: malformed JSON"),
        (b'{"prompt": "\xff", "completion": "b"}\n', "latin.jsonl", "latin.jsonl:1: not UTF-8"),
        (b"x", "data.xlsx", "unknown extension '.xlsx'"),
    ],
)
def test_bad_training_files(run, tiny_llama, tmp_path, content, name, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        run(model_name_or_path=tiny_llama, train_file=str(tmp_path / name), max_steps=1)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_label_unseen_in_training(run, tiny_bert, colours, tmp_path):
    (tmp_path / "v.tsv").write_text("text\tlabel\nwarm a\tred\ncold b\tgreen\n")
    with pytest.raises(ValueError, match=r"v.tsv:3: .*green.*blue, red"):
        run(
            model_name_or_path=tiny_bert, train_file=str(colours / "train.tsv"), validation_file=str(tmp_path / "v.tsv")
        )  # fmt: skip


def test_long_texts_are_truncated_and_counted(run, tiny_llama, sums_file):
    _, folder = run(model_name_or_path=tiny_llama, train_file=sums_file, max_steps=1, max_length=12)
    report = json.loads((folder / "run.json").read_text())["data"]["train"]
    assert report["truncated"] > 0 and report["longest"] == 12


def test_models_that_cannot_be_loaded(run, tiny_llama, sums_file, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in Path(tiny_llama).iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="bare: no weights in that folder"):
        run(model_name_or_path=str(bare), train_file=sums_file, output_dir=str(tmp_path / "a"))
    with pytest.raises(ValueError, match="/nowhere: no such folder"):
        run(model_name_or_path=str(tmp_path / "nowhere"), train_file=sums_file, output_dir=str(tmp_path / "b"))
    with pytest.raises(ValueError, match="--model_name_or_path is missing"):
        run(train_file=sums_file, output_dir=str(tmp_path / "c"))


def test_a_tokenizer_without_pad_token_pads_with_the_end_token(run, tiny_llama, sums_file, tmp_path):
    copy = tmp_path / "no-pad"
    copy.mkdir()
    for file in Path(tiny_llama).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "pad_token"}))
    results, _ = run(model_name_or_path=str(copy), train_file=sums_file, max_steps=2, packing=False)
    assert results["train_loss"] > 0
    del config["eos_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "pad_token"}))
    with pytest.raises(ValueError, match="neither a padding nor an end token"):
        run(model_name_or_path=str(copy), train_file=sums_file, max_steps=2, output_dir=str(tmp_path / "other"))


def test_an_output_folder_in_use_is_kept(run, tiny_llama, sums_file, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    arguments = {"model_name_or_path": tiny_llama, "train_file": sums_file, "max_steps": 1}
    with pytest.raises(ValueError, match="not empty; .*--overwrite_output_dir true"):
        run(**arguments)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    run(**arguments, overwrite_output_dir=True)
    assert (folder / "thesis.txt").read_text() == "mine" and (folder / "model.safetensors").exists()


def test_a_checkpoint_of_another_model_is_refused(run, tiny_llama, tiny_bert, sums_file, colours, tmp_path):
    _, folder = run(model_name_or_path=tiny_llama, train_file=sums_file, max_steps=2, save_steps=1)
    checkpoint = str(folder / "checkpoints" / "step-000002")
    with pytest.raises(ValueError, match="of another model"):
        run(
            model_name_or_path=tiny_bert, train_file=str(colours / "train.tsv"), resume_from_checkpoint=checkpoint,
            output_dir=str(tmp_path / "other"),
        )  # fmt: skip


def test_a_full_disk_while_saving_is_told_and_loses_nothing(tiny_llama, sums_file, tmp_path):
    """`ulimit -f` stands in for a full disk: the checkpoint cannot be written, and the earlier one stays."""
    out = tmp_path / "out"
    command = [
        sys.executable, str(ROOT / "fastft" / "train.py"), "--model_name_or_path", tiny_llama, "--train_file", sums_file,
        "--output_dir", str(out), "--report_to", "none", "--bf16", "false", "--save_steps", "1",
    ]  # fmt: skip
    assert subprocess.run([*command, "--max_steps", "1"], capture_output=True).returncode == 0
    size = (out / "model.safetensors").stat().st_size
    limit = f"ulimit -f {size // 2 // 1024}; trap '' XFSZ; exec " + " ".join(command)
    resumed = f"{limit} --max_steps 2 --resume_from_checkpoint auto"
    failed = subprocess.run(["bash", "-c", resumed], capture_output=True, text=True)
    assert failed.returncode == 1
    assert "step-000002 was not written (earlier ones are kept)" in failed.stderr
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["latest", "step-000001"]
    resumed = subprocess.run(["bash", "-c", f"{resumed} --on_save_error continue"], capture_output=True, text=True)
    assert (
        "step-000002 was not written (earlier ones are kept)" in resumed.stdout and "the run goes on" in resumed.stdout
    )
    assert "was not saved" in resumed.stderr  # the model at the end does not fit either, and that is an error
    assert (out / "model.safetensors").stat().st_size == size
    AutoModelForCausalLM.from_pretrained(out)


def test_the_script_refuses_with_one_sentence(tmp_path):
    command = [sys.executable, str(ROOT / "fastft" / "train.py"), "--zero_stage", "4"]
    refused = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines()[-1] == "fastft train: error: --zero_stage 4: must be one of 0, 1, 2, 3"
    assert not list(tmp_path.iterdir())
