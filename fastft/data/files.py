"""Files -> rows: JSONL, JSON, CSV, TSV, Parquet and plain text. Every error names the file and the line or row.

A row is a dict {column: value}; with it comes `where`, the text by which errors name it: `train.jsonl:12` (line 12)
for files of lines, `train.json, row 12` for JSON arrays, Parquet and hub data. The readers are our own because an
error must name the line, rows may differ in their keys, and a column may mix types, none of which Arrow's readers
allow.
"""

import csv
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fastft.data.columns import headerless_names, looks_like_header, unlike_a_header

DOCUMENT_SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Source:
    """Rows that can be read again and again. `size` in bytes; `digest` changes when the content does."""

    name: str
    read: Callable[[], Iterator[tuple[str, dict]]]
    digest: Callable[[], str]
    size: int

    def rows(self, limit=None):
        """(where, row) of the first `limit` rows; ValueError when there is none."""
        rows = itertools.islice(self.read(), limit)
        first = next(rows, None)
        if first is None:
            raise ValueError(f"{self.name}: holds no rows")
        yield first
        yield from rows

    def columns(self):
        """Names of the columns, those of the first row."""
        return list(next(self.rows())[1])


def open_file(path, argument=None, *, named_columns=(), lines=False):
    """The Source of a file, by its extension.

    argument: the flag that named it, for messages. named_columns: columns that arguments name; a CSV or TSV then has
    a header line. lines: a text file has a row per line, not per document.
    """
    flag = f"{argument} " if argument else ""
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"{flag}{path}: is a folder; must be a file ({', '.join(READERS)})")
    if file.suffix.lower() not in READERS:
        raise ValueError(f"{flag}{path}: unknown extension {file.suffix!r}; must be one of {', '.join(READERS)}")
    if not file.is_file():
        raise ValueError(f"{flag}{path}: no such file")
    if not os.access(file, os.R_OK):
        raise ValueError(f"{flag}{path}: may not be read")
    if file.stat().st_size == 0:
        raise ValueError(f"{flag}{path}: is empty")
    reader = READERS[file.suffix.lower()]
    options = {"named": tuple(named_columns)} if reader in (_read_csv, _read_tsv) else {}
    if reader is _read_text:
        options = {"lines": lines}
    # the options shape the rows, so they belong to the digest; the name does not
    digest = lambda: f"{file.suffix.lower()} {sorted(options.items())} {_content_digest(file)}"
    return Source(str(path), lambda: reader(file, **options), digest, file.stat().st_size)


def read_rows(path, argument=None, *, named_columns=()):
    """Rows of a file as dicts, for prediction: a text file gives one row {"text": line} per line that is not blank."""
    for _, row in open_file(path, argument, named_columns=named_columns, lines=True).rows():
        yield row


def _content_digest(path):
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _lines(path):
    """(number, text with its line end) of each line, split at line feeds only: JSON may hold other line ends."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                bad = line[error.start]
                raise ValueError(
                    f"{path}:{number}: not UTF-8 (byte 0x{bad:02x} at position {error.start + 1}); "
                    f"convert the file, for example with `iconv -f latin1 -t utf-8`"
                ) from None
            yield number, text


def _object(value, where):
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be an object with named columns, not a {type(value).__name__}")
    return value


def _read_jsonl(path):
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: malformed JSON: {error.msg} at column {error.colno}; each line must be one JSON object"
            ) from None
        yield where, _object(value, where)


def _read_json(path):
    """A JSON array of objects; a file that starts with an object is read as one object per line."""
    text = "".join(line for _, line in _lines(path))
    if text.lstrip()[:1] == "{":
        yield from _read_jsonl(path)
        return
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: malformed JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(values, list):
        raise ValueError(f"{path}: must hold an array of objects, not a {type(values).__name__}")
    for number, value in enumerate(values, 1):
        where = f"{path}, row {number}"
        yield where, _object(value, where)


def _read_csv(path, named):
    yield from _read_cells(path, named, delimiter=",", strict=True)


def _read_tsv(path, named):
    """TSV has no quoting: a quotation mark is a character like any other, as in the GLUE files."""
    yield from _read_cells(path, named, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_cells(path, named, **dialect):
    records = _records(path, dialect)
    first_number, first = next(records, (0, None))
    if first is None:
        return
    if looks_like_header(first, named):
        names, rest = [cell.strip() for cell in first], records
        if len(set(names)) < len(names):
            raise ValueError(f"{path}:{first_number}: the header names a column twice: {', '.join(names)}")
    else:
        peeked = list(itertools.islice(records, 1000))
        reason = unlike_a_header(first, [cells for _, cells in peeked])
        names = headerless_names(len(first))
        if reason or names is None:
            raise ValueError(
                f"{path}:{first_number}: no header with names that fastft knows ({', '.join(first)[:80]}) and "
                f"{reason or f'{len(first)} columns, of which it cannot tell text from label'}; "
                f"name the columns with --text_column and --label_column, or --prompt_column and --completion_column"
            )
        rest = itertools.chain([(first_number, first)], peeked, records)
    for number, cells in rest:
        where = f"{path}:{number}"
        if len(cells) != len(names):
            raise ValueError(f"{where}: has {len(cells)} cells, must have {len(names)} ({', '.join(names)})")
        yield where, dict(zip(names, cells, strict=True))


def _records(path, dialect):
    """(line where the record starts, cells) of each record that is not blank."""
    csv.field_size_limit(2**31 - 1)  # the default refuses documents of more than 128 KB
    reader = csv.reader((line for _, line in _lines(path)), **dialect)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path}:{number}: malformed CSV: {error}") from None
        if cells:
            yield number, cells


def _read_parquet(path):
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = itertools.count(1)
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield f"{path}, row {next(number)}", row
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file: {str(error).splitlines()[0]}") from None


def _read_text(path, lines):
    """Rows {"text": document}. Documents end at a line `<|endoftext|>`; a file without such lines is one document."""
    document, start = [], 1
    for number, line in _lines(path):
        ends_document = line.strip() == DOCUMENT_SEPARATOR
        if not ends_document:
            document.append(line)
        if ends_document or lines:
            yield from _document(path, start, document)
            document, start = [], number + 1
    yield from _document(path, start, document)


def _document(path, start, lines):
    text = "".join(lines).strip("\r\n")
    if text.strip():
        yield f"{path}:{start}", {"text": text}


READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
