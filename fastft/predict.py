"""Using a trained model on a file: `fastft predict` and `fastft eval`."""

import contextlib
import inspect
import json
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import set_seed
from transformers.utils import logging

from fastft.data import Collator, eval_batches, read_rows
from fastft.data.columns import named_columns
from fastft.data.files import open_file
from fastft.models import load_for_inference


def predict(model_dir, file, output=None, *, overwrite=False, batch_size=16, seed=42, options=None, retold=None):
    """Writes each row of `file` with its prediction, a JSON object a line, to the file `output` or to the terminal.

    options: the task's own, such as {"max_new_tokens": 64}. retold: arguments of the training run to replace, such as
    {"text_column": "review"}. Raises ValueError, naming file and row, for input that cannot be used, and for an output
    that exists, unless overwrite. A run that fails leaves no output and an older one as it was.
    """
    options, output = options or {}, None if output is None else Path(output)
    _check_batch_size(batch_size)
    _check_output(output, overwrite)
    open_file(file, "--file", lines=True)  # before the model, which takes its time to load
    model, tokenizer, task = _load(model_dir, **(retold or {}))
    _check_options(task, options)
    set_seed(seed)
    rows = read_rows(file, "--file", named_columns=named_columns(task.args))
    answers = task.predict(model, tokenizer, rows, batch_size, **options)
    with _writing(output) as out, _naming(file):
        for answer in tqdm(answers, unit=" rows", disable=None if output else True):
            out.write(as_line(answer) + "\n")


def as_line(row):
    """A row as one line of JSON that any file can take: dates and bytes as text, half of a surrogate pair as an escape."""
    return json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace").decode()


def evaluate(model_dir, file, *, batch_size=16, retold=None):
    """{metric: value} of a trained model on a file with labels or answers. Raises ValueError as `predict` does."""
    _check_batch_size(batch_size)
    open_file(file, "--file")
    model, tokenizer, task = _load(model_dir, validation_file=str(file), max_eval_samples=None, **(retold or {}))
    dataset = task.load_data(tokenizer)["validation"]
    batches = eval_batches(dataset, Collator(tokenizer, model.config, packing=False), batch_size, 0, 1)
    return task.evaluate(model, (_to(batch, model.device) for batch in batches))


def _load(model_dir, **arguments):
    logging.disable_progress_bar()  # a bar for the files of the weights says nothing here
    return load_for_inference(model_dir, dtype="auto", **arguments)


def _to(batch, device):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def _check_batch_size(batch_size):
    if batch_size < 1:
        raise ValueError(f"--batch_size {batch_size}: must be at least 1")


def _check_output(output, overwrite):
    if output is None:
        return
    if output.exists() and not overwrite:
        raise ValueError(f"--output {output}: exists; give --overwrite to replace it, or name another file")
    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"--output {output}: must be a file in a folder that exists")


def _check_options(task, options):
    parameters = inspect.signature(task.predict).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for name in options:
        if not takes_all and name not in {p.name for p in parameters}:
            raise ValueError(f"--{name}: the model's task, {task.name}, has no such option")


@contextlib.contextmanager
def _writing(output):
    """A text file that appears under its name only when it is complete."""
    if output is None:
        yield sys.stdout
        return
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(file):
    """A task knows rows, not files: errors about them get the file's name."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith("row "):
            raise ValueError(f"{file}, {error}") from None
        if str(error).startswith("the file"):
            raise ValueError(str(error).replace("the file", str(file), 1)) from None
        raise
