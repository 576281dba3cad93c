"""Source -> TokenDataset: rows are tokenised in chunks, by several processes if there are many, and kept on the disk.

An encoder is a frozen dataclass that a task provides, called with a list of (where, row) and returning `Encoded`. Its
fields, the tokenizer, the file's content and the code are the key under which the result is kept.
"""

import collections
import contextlib
import dataclasses
import hashlib
import inspect
import itertools
import multiprocessing
import operator
import os
import re
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import filelock
import numpy as np
import tokenizers
import transformers
from huggingface_hub.constants import HF_HOME

from fastft.data.errors import DataError
from fastft.data.token_dataset import TokenDataset

CHUNK_ROWS = 512
_NUMBER = re.compile(r"\d+$")
LARGE = 64 << 20  # bytes: below, starting processes costs more than it saves, for the tokenizer itself uses all cores


@dataclass
class Encoded:
    """Tokenised rows. labels: an int32 array per example, or what the label column holds. wheres: of each example."""

    input_ids: list[np.ndarray] = field(default_factory=list)
    labels: list = field(default_factory=list)
    token_type_ids: list[np.ndarray] = field(default_factory=list)
    wheres: list[str] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0
    bad: list[str] = field(default_factory=list)  # what was wrong with each row that was left out

    def extend(self, other):
        """Appends another chunk's result."""
        for f in dataclasses.fields(self):
            setattr(self, f.name, operator.iadd(getattr(self, f.name), getattr(other, f.name)))


def build(source, encoder, finish, *, limit=None, workers=None, cache_dir=None, on_bad_row="error"):
    """The TokenDataset of a source's first `limit` rows, from the cache where it holds it.

    on_bad_row: `error`, or `skip` to leave rows out that cannot be used; the report counts them and shows a few.
    finish(encoded) -> (labels array, more entries for the report). The first process of a machine that comes here
    builds, the others wait at a file lock and then load: that needs neither a shared disk nor a process group, whose
    time-outs a long tokenisation would exceed. Raises ValueError for rows that cannot be used, and for a cache folder
    that cannot be written.
    """
    folder = _cache_root(cache_dir) / _fingerprint(source, encoder, finish, (limit, on_bad_row))
    lock = filelock.FileLock(f"{folder}.lock")
    with _cache_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        if not folder.exists():
            encoded = _encode(source, encoder, finish, limit, workers, skip=on_bad_row == "skip")
            dataset = _assemble(source, encoded, encoder.max_length, finish)
            with _cache_errors(folder.parent):
                _publish(dataset, folder)
    finally:
        lock.release()
    return TokenDataset.load(folder)


@contextlib.contextmanager
def _cache_errors(folder):
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"cannot keep tokenised data in {folder}: {reason}; choose another folder with --cache_dir"
        ) from error


def _encode(source, encoder, finish, limit, workers, skip):
    encoded = Encoded()
    if skip:
        encoder = SkipBadRows(encoder)
    chunks = _chunks(source.rows(limit, (lambda error: encoded.bad.append(str(error))) if skip else None))
    workers = workers or _default_workers(source.size)
    results = map(encoder, chunks) if workers == 1 else _map_in_processes(encoder, chunks, workers)
    for result in results:
        encoded.extend(result)
    if skip:
        _without_bad_labels(encoded, finish)
    return encoded


def _without_bad_labels(encoded, finish):
    """What is left where labels are refused that only mean something beside all the others."""
    problems = finish.problems(encoded) if hasattr(finish, "problems") else {}
    for name in ("input_ids", "labels", "token_type_ids", "wheres") if problems else ():
        values = getattr(encoded, name)
        setattr(encoded, name, [value for i, value in enumerate(values) if i not in problems])
    encoded.bad.extend(problems.values())


@dataclass(frozen=True)
class SkipBadRows:
    """An encoder that leaves out the rows which the given one refuses."""

    encoder: object

    def __call__(self, rows):
        try:
            return self.encoder(rows)
        except ValueError as error:
            if len(rows) == 1:
                return Encoded(bad=[str(error)])
        encoded = Encoded()
        for row in rows:
            encoded.extend(self([row]))
        return encoded


def _chunks(rows):
    while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
        yield chunk


def _default_workers(size):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return 1 if size < LARGE else min(cores, 16)


def _map_in_processes(encoder, chunks, workers):
    """encoder(chunk) of each chunk, in order, with at most two chunks per process under way."""
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(encoder,)) as pool:
        pending = collections.deque(pool.submit(_work, chunk) for chunk in itertools.islice(chunks, 2 * workers))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(_work, chunk) for chunk in itertools.islice(chunks, 1))
            yield result


def _start_worker(encoder):
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process per core is enough
    _encoder = encoder


def _work(chunk):
    return _encoder(chunk)


def _assemble(source, encoded, max_length, finish):
    if not encoded.input_ids and encoded.bad:
        raise DataError(
            f"{source.name}: nothing is left to train on: {len(encoded.bad)} bad rows, of which {encoded.bad[0]}"
        )
    if not encoded.input_ids:
        raise DataError(
            f"{source.name}: nothing is left to train on: all {encoded.dropped} examples have no trained token within "
            f"--max_length {max_length}"
        )
    lengths = np.array([len(ids) for ids in encoded.input_ids], np.int64)
    labels, more = finish(encoded)
    arrays = {
        "input_ids": np.concatenate(encoded.input_ids).astype(np.int32),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
        "labels": labels,
        "rows": np.array([int(_NUMBER.search(where)[0]) for where in encoded.wheres], np.int64),
    }
    if encoded.token_type_ids:
        arrays["token_type_ids"] = np.concatenate(encoded.token_type_ids).astype(np.int8)
    report = {
        "examples": len(lengths),
        "tokens": int(lengths.sum()),
        "mean_length": float(lengths.mean()),
        "longest": int(lengths.max()),
        "truncated": encoded.truncated,
        "dropped": encoded.dropped,
        "max_length": max_length,
        **({"bad_rows": len(encoded.bad), "bad_rows_shown": encoded.bad[:10]} if encoded.bad else {}),
        **more,
    }
    return TokenDataset(arrays, report)


def _publish(dataset, folder):
    """Writes beside the folder and renames, so that a folder of that name is always whole."""
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        dataset.save(unfinished)
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _cache_root(cache_dir):
    return Path(cache_dir or os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets") / "fastft"


def _fingerprint(source, encoder, finish, limit):
    """Hash of what decides the result: content, tokenizer, the fields of encoder and finish, this code, libraries."""
    files = [*Path(__file__).parent.glob("*.py"), Path(inspect.getsourcefile(type(encoder)))]
    parts = [source.digest(), limit, tokenizers.__version__, transformers.__version__]
    parts += [path.read_bytes() for path in sorted(files)]
    for settings in (encoder, finish):
        values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
        parts += [type(settings).__name__, _tokenizer_identity(values.pop("tokenizer", None)), sorted(values.items())]
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _tokenizer_identity(tokenizer):
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary = sorted(tokenizer.get_vocab().items())
    else:
        backend.no_truncation()  # state of the last call, which the next one sets anew
        backend.no_padding()
        vocabulary = backend.to_str()
    return type(tokenizer).__name__, vocabulary, tokenizer.chat_template, tokenizer.special_tokens_map
