"""Columns are found by their usual names or by the arguments; a missing one is named together with those there."""

import pytest

from fastft.arguments import Arguments
from fastft.data.columns import DialogColumns, TextColumns, cell, find_dialog_columns, find_text_columns, text_cell
from fastft.tasks import get_task


@pytest.mark.parametrize(
    ("columns", "named", "found"),
    [
        (["text", "label"], {}, TextColumns("text", None, "label")),
        (["id", "Sentence", "Category"], {}, TextColumns("Sentence", None, "Category")),
        (["sentence1", "sentence2", "target"], {}, TextColumns("sentence1", "sentence2", "target")),
        (["premise", "hypothesis", "label"], {}, TextColumns("premise", "hypothesis", "label")),
        (["question1", "question2", "label"], {}, TextColumns("question1", "question2", "label")),
        (["review", "stars"], {"text_column": "review", "label_column": "stars"}, TextColumns("review", None, "stars")),
        (["a", "b", "label"], {"text_column": "a", "text_pair_column": "b"}, TextColumns("a", "b", "label")),
        (["text", "context", "label"], {"text_pair_column": "context"}, TextColumns("text", "context", "label")),
    ],
)
def test_text_columns(columns, named, found):
    assert find_text_columns(columns, Arguments(**named), "f.csv") == found


@pytest.mark.parametrize(
    ("columns", "named", "found"),
    [
        (["text"], {}, DialogColumns(text="text")),
        (["prompt", "completion"], {}, DialogColumns(prompt="prompt", completion="completion")),
        (["prompt", "response", "text"], {}, DialogColumns(prompt="prompt", completion="response")),
        (["question", "answer"], {}, DialogColumns(prompt="question", completion="answer")),
        (
            ["instruction", "output"],
            {},
            DialogColumns(prompt="instruction", input="input", completion="output", separator="\n\n"),
        ),
        (["id", "messages"], {}, DialogColumns(messages="messages")),
        (["conversations", "chosen", "rejected"], {}, DialogColumns(messages="conversations", completion="chosen")),
        (["q", "a"], {"prompt_column": "q", "completion_column": "a"}, DialogColumns(prompt="q", completion="a")),
        (["messages", "story"], {"text_column": "story"}, DialogColumns(text="story")),
    ],
)
def test_dialog_columns(columns, named, found):
    assert find_dialog_columns(columns, Arguments(**named), "f.csv") == found


@pytest.mark.parametrize(
    ("find", "columns", "named", "message"),
    [
        (find_text_columns, ["a", "b"], {}, r"f\.csv: no column with the text \(.*--text_column\); it has a, b$"),
        (find_text_columns, ["text", "b"], {}, r"f\.csv: no column with the label \(label, .*\); it has text, b$"),
        (
            find_text_columns,
            ["text"],
            {"label_column": "y"},
            r"--label_column y: f\.csv has no such column; it has text$",
        ),
        (
            find_dialog_columns,
            ["prompt", "b"],
            {},
            r"f\.csv: no column with the completion \(completion, .*it has prompt, b$",
        ),
        (find_dialog_columns, ["a"], {}, r"f\.csv: no column with the prompt or text \(.*it has a$"),
        (
            find_dialog_columns,
            ["text"],
            {"prompt_column": "q"},
            r"--prompt_column q: f\.csv has no such column; it has text$",
        ),
    ],
)
def test_missing_column(find, columns, named, message):
    with pytest.raises(ValueError, match=message):
        find(columns, Arguments(**named), "f.csv")


def test_prediction_needs_neither_label_nor_completion():
    assert find_text_columns(["text"], Arguments(label_column="stars"), "f", need_label=False).text == "text"
    named = Arguments(completion_column="reply")
    assert find_dialog_columns(["prompt"], named, "f", need_completion=False).prompt == "prompt"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": 1}, r"f\.jsonl:7: column 'text' is missing; this row has label$"),
        ({"text": None}, r"f\.jsonl:7: column 'text' is null$"),
        ({"text": 5}, r"f\.jsonl:7: column 'text' must hold text, not 5 \(int\)$"),
    ],
)
def test_bad_cell(row, message):
    with pytest.raises(ValueError, match=message):
        text_cell(row, "text", "f.jsonl:7")


def test_cell_keeps_the_value():
    assert cell({"label": 0}, "label", "f") == 0


@pytest.mark.parametrize(
    ("header", "named", "task"),
    [
        ("text,label", {}, "sequence_classification"),
        ("premise,hypothesis,label", {}, "sequence_classification"),
        ("text", {}, "causal_lm"),
        ("prompt,completion", {}, "causal_lm"),
        ("question,answer,category", {}, "causal_lm"),
        ("instruction,input,output,category", {}, "causal_lm"),
        (
            "instruction,input,output,category",
            {"text_column": "output", "label_column": "category"},
            "sequence_classification",
        ),
        ("text,label", {"prompt_column": "text", "completion_column": "label"}, "causal_lm"),
    ],
)
def test_task_is_guessed_from_the_columns(tmp_path, header, named, task):
    path = tmp_path / "f.csv"
    path.write_text(header + "\n" + ",".join("x" * len(header.split(","))) + "\n")
    found = get_task(Arguments(train_file=str(path), **named))
    assert found.name == task
    assert found.reason.startswith(f"task {task}: the column")


def test_task_that_cannot_be_guessed(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"tokens": ["a"], "tags": ["X"]}')
    with pytest.raises(
        ValueError, match=r"f\.jsonl: the columns tokens, tags fit no task; choose with --task \(causal_lm, "
    ):
        get_task(Arguments(train_file=str(path)))
    with pytest.raises(ValueError, match=r"--label_column tag: .*f\.jsonl has no such column; it has tokens, tags"):
        get_task(Arguments(train_file=str(path), label_column="tag"))
    with pytest.raises(ValueError, match="--task poetry: must be one of causal_lm, sequence_classification"):
        get_task(Arguments(task="poetry"))
