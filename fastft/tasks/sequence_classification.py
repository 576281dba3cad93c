"""Learning to label a text, or a pair of texts, with one of several classes, or with a score (regression)."""

from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from fastft.data.build import Encoded
from fastft.data.columns import (
    TextColumns,
    cell,
    check_unicode,
    find_text_columns,
    match_dialog_columns,
    match_text_columns,
    text_cell,
)
from fastft.data.errors import DataError, brief
from fastft.data.labels import LabelReader
from fastft.data.packing import Collator
from fastft.data.tokens import IGNORED, longest_input
from fastft.tasks.base import BaseTask, evaluating, gather_over_ranks, windows, without


class Task(BaseTask):
    auto_model = AutoModelForSequenceClassification
    peft_type = "SEQ_CLS"

    def __init__(self, args, reason):
        super().__init__(args, reason)
        self.classes = None  # names, by class number; known from the training split or the model's configuration
        self.problem_type = args.problem_type

    @classmethod
    def guess(cls, columns, args):
        found = match_text_columns(columns, args)
        if found is None or found.label is None or args.prompt_column is not None or args.completion_column is not None:
            return None
        dialog = match_dialog_columns(columns, args)
        if args.label_column is None and dialog is not None and dialog.text is None:
            return None
        texts = f"{found.text} and {found.pair} hold texts" if found.pair else f"{found.text} holds text"
        return f"the column{'s' if found.pair else ''} {texts}, the column {found.label} labels"

    @property
    def default_metric(self):
        return "mse" if self.problem_type == "regression" else "accuracy"

    def encoder(self, source, tokenizer, max_length):
        return Encoder(tokenizer, find_text_columns(source.columns(), self.args, source.name), max_length)

    def finisher(self, split):
        known = split != "train"  # the training split's own labels are the classes
        return LabelReader(self.problem_type if known else self.args.problem_type, self.classes if known else None)

    def learn(self, dataset):
        if dataset.has_scores:
            self.problem_type = "regression"
        else:
            self.problem_type, self.classes = "classification", tuple(dataset.report["classes"])

    def restore(self, config):
        if config.num_labels == 1 or config.problem_type == "regression":
            self.problem_type = "regression"
        else:
            self.problem_type = "classification"
            names = {int(number): name for number, name in config.id2label.items()}  # JSON makes the numbers text
            self.classes = tuple(names[number] for number in range(config.num_labels))

    def model_kwargs(self):
        if self.problem_type == "regression":
            return {"num_labels": 1, "problem_type": "regression"}
        return {
            "num_labels": len(self.classes),
            "id2label": dict(enumerate(self.classes)),
            "label2id": {name: i for i, name in enumerate(self.classes)},
            "problem_type": "single_label_classification",
        }

    def loss(self, model, batch, num_items):
        """Cross-entropy (or squared error) of each example, in fp32, summed and divided by num_items."""
        logits, labels = _labelled(model, batch)
        if self.problem_type == "regression":
            return F.mse_loss(logits[:, 0], labels, reduction="sum") / num_items
        smoothing = self.args.label_smoothing_factor
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing) / num_items

    def evaluate(self, model, batches):
        """Classes: loss, accuracy, macro_f1 and per_class {name: {precision, recall, f1, support}}.

        Scores: loss, mse, mae, pearson and spearman.
        """
        outputs, targets = [], []
        with evaluating(model):
            for batch in batches:
                logits, labels = _labelled(model, batch)
                outputs.append(logits.cpu().numpy())
                targets.append(labels.cpu().numpy())
        gathered = gather_over_ranks((np.concatenate(outputs), np.concatenate(targets)))
        logits, labels = (np.concatenate(parts) for parts in zip(*gathered, strict=True))
        if self.problem_type == "regression":
            return score_metrics(logits[:, 0].astype(np.float64), labels.astype(np.float64))
        return class_metrics(logits.astype(np.float64), labels, self.classes)

    def predict(self, model, tokenizer, rows, batch_size, *, packing=False):
        """Each row with its `prediction`: the likeliest class, with the `probabilities` of all, or the score.

        packing: share rows as in training, for a patched model.
        """
        collate = Collator(tokenizer, model.config, packing=packing)
        max_length = longest_input(self.args.max_length, tokenizer, model.config)
        encoder = None
        for window in windows(rows, 32 * batch_size):
            if encoder is None:
                columns = find_text_columns(list(window[0][1]), self.args, "the file", need_label=False)
                encoder = Encoder(tokenizer, TextColumns(columns.text, columns.pair, None), max_length)
            logits = _predict_logits(model, encoder(window), collate, batch_size)
            for (_, row), values in zip(window, logits, strict=True):
                yield {**row, **self._answer(values)}

    def _answer(self, logits):
        if self.problem_type == "regression":
            return {"prediction": logits[0].item()}
        probabilities = logits.softmax(-1).tolist()
        likeliest = self.classes[int(logits.argmax())]
        return {"prediction": likeliest, "probabilities": dict(zip(self.classes, probabilities, strict=True))}


@dataclass(frozen=True)
class Encoder:
    """Rows -> token ids with the tokenizer's special tokens, and what the label column holds."""

    tokenizer: PreTrainedTokenizerBase
    columns: TextColumns
    max_length: int

    def __call__(self, rows):
        texts = [text_cell(row, self.columns.text, where) for where, row in rows]
        pairs = [text_cell(row, self.columns.pair, where) for where, row in rows] if self.columns.pair else None
        labels = [_label(row, self.columns.label, where) for where, row in rows] if self.columns.label else []
        encoding = self.tokenizer(texts, pairs, return_attention_mask=False, verbose=False)
        long = [i for i, ids in enumerate(encoding["input_ids"]) if len(ids) > self.max_length]
        if long:
            cut = self.tokenizer(
                [texts[i] for i in long],
                [pairs[i] for i in long] if pairs else None,
                truncation=True,
                max_length=self.max_length,
                return_attention_mask=False,
            )
            for name, values in cut.items():
                for i, value in zip(long, values, strict=True):
                    encoding[name][i] = value
        if not all(encoding["input_ids"]):
            _fill_empty(encoding, self.tokenizer)
        return Encoded(
            input_ids=[np.array(ids, np.int32) for ids in encoding["input_ids"]],
            labels=labels,
            token_type_ids=[np.array(ids, np.int8) for ids in encoding.get("token_type_ids", [])],
            wheres=[where for where, _ in rows],
            truncated=len(long),
        )


def class_metrics(logits, labels, classes):
    """Metrics of logits [N, C] against class numbers [N]."""
    from sklearn.metrics import f1_score, precision_recall_fscore_support

    shifted = logits - logits.max(-1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(labels)), labels]
    predicted = logits.argmax(-1)
    every = np.arange(len(classes))
    table = precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0)
    names = ("precision", "recall", "f1", "support")
    per_class = [{n: v.item() for n, v in zip(names, values, strict=True)} for values in zip(*table, strict=True)]
    return {
        "loss": losses.mean().item(),
        "accuracy": (predicted == labels).mean().item(),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
        "per_class": dict(zip(classes, per_class, strict=True)),
    }


def score_metrics(scores, labels):
    """Metrics of scores [N] against labels [N]. A correlation with a constant is not defined and counts as 0."""
    from scipy.stats import rankdata

    mse = ((scores - labels) ** 2).mean().item()
    return {
        "loss": mse,
        "mse": mse,
        "mae": np.abs(scores - labels).mean().item(),
        "pearson": _correlation(scores, labels),
        "spearman": _correlation(rankdata(scores), rankdata(labels)),
    }


def _correlation(x, y):
    return np.corrcoef(x, y)[0, 1].item() if np.ptp(x) > 0 and np.ptp(y) > 0 else 0.0


def _labelled(model, batch):
    """(logits fp32 [n, C], labels [n]) of the examples whose label is not ignored."""
    logits, labels = model(**without(batch, "labels")).logits.float(), batch["labels"]
    assert len(logits) == len(labels), "a packed batch needs a patched model, which gives one row of logits per example"
    kept = ~labels.isnan() if labels.is_floating_point() else labels != IGNORED
    return logits[kept], labels[kept]


@torch.no_grad()
def _predict_logits(model, encoded, collate, batch_size):
    """Logits fp32 [C] of each example, in order."""
    order = sorted(range(len(encoded.input_ids)), key=lambda i: -len(encoded.input_ids[i]))
    logits = [None] * len(order)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        examples = [{"input_ids": encoded.input_ids[i], "labels": IGNORED} for i in indices]
        if encoded.token_type_ids:
            for i, example in zip(indices, examples, strict=True):
                example["token_type_ids"] = encoded.token_type_ids[i]
        batch = without(collate(examples), "labels")
        batch = {name: v.to(model.device) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
        for i, values in zip(indices, model(**batch).logits.float().cpu(), strict=True):
            logits[i] = values
    return logits


def _label(row, column, where):
    value = cell(row, column, where)
    if value == "" or not isinstance(value, (str, int, float, Decimal)):
        raise DataError(f"{where}: column {column!r} must hold a label (text or a number), not {brief(value)}")
    if isinstance(value, str):
        check_unicode(value, f"{where}: column {column!r}")
    return value


def _fill_empty(encoding, tokenizer):
    """A text without any token becomes one end token, so that it still has a position to classify."""
    token = next((t for t in (tokenizer.eos_token_id, tokenizer.pad_token_id) if t is not None), 0)
    for i, ids in enumerate(encoding["input_ids"]):
        if not ids:
            encoding["input_ids"][i] = [token]
            if "token_type_ids" in encoding:
                encoding["token_type_ids"][i] = [0]
