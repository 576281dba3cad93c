"""Files -> rows: JSONL, JSON, CSV, TSV, Parquet and plain text. Every error names the file and the line or row.

A reader goes on after a bad row, which it yields as the ValueError; `Source.rows` raises or counts it. What spoils a
whole file (a JSON array that does not parse, a damaged Parquet file) is raised at once.

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
from fastft.data.errors import DataError

DOCUMENT_SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Source:
    """Rows that can be read again and again. `size` in bytes; `digest` changes when the content does."""

    name: str
    read: Callable[[], Iterator[tuple[str, dict | ValueError]]]
    digest: Callable[[], str]
    size: int

    def rows(self, limit=None, on_bad_row=None):
        """(where, row) of the first `limit` rows; ValueError when there is none, and for a bad row.

        on_bad_row: called with that ValueError instead, and the row is left out.
        """
        rows = itertools.islice(self._good(on_bad_row), limit)
        first = next(rows, None)
        if first is None:
            raise DataError(f"{self.name}: holds no rows")
        yield first
        yield from rows

    def _good(self, on_bad_row):
        for where, row in self.read():
            if not isinstance(row, ValueError):
                yield where, row
            elif on_bad_row is None:
                raise row
            else:
                on_bad_row(row)

    def columns(self):
        """Names of the columns, those of the first row that is not bad."""
        bad = []
        try:
            return list(next(self.rows(on_bad_row=bad.append))[1])
        except ValueError as error:
            raise (bad[0] if bad else error) from None


def open_file(path, argument=None, *, named_columns=(), lines=False):
    """The Source of a file, by its extension.

    argument: the flag that named it, for messages. named_columns: columns that arguments name; a CSV or TSV then has
    a header line. lines: a text file has a row per line, not per document.
    """
    flag = f"{argument} " if argument else ""
    file = Path(path)
    if file.is_dir():
        raise DataError(f"{flag}{path}: is a folder; must be a file ({', '.join(READERS)})")
    if file.suffix.lower() not in READERS:
        raise DataError(f"{flag}{path}: unknown extension {file.suffix!r}; must be one of {', '.join(READERS)}")
    if not file.is_file():
        raise DataError(f"{flag}{path}: no such file")
    if not os.access(file, os.R_OK):
        raise DataError(f"{flag}{path}: may not be read")
    if file.stat().st_size == 0:
        raise DataError(f"{flag}{path}: is empty")
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
    """(number, text with its line end, or a ValueError) of each line, split at line feeds only: JSON may hold others."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                bad = line[error.start]
                yield (
                    number,
                    DataError(
                        f"{path}:{number}: not UTF-8 (byte 0x{bad:02x} at position {error.start + 1}); "
                        f"convert the file, for example with `iconv -f latin1 -t utf-8`"
                    ),
                )


def _text_of(line):
    if isinstance(line, ValueError):
        raise line
    return line


def _parse(text, where):
    """The value of a JSON text; ValueError for what Python's parser refuses in one way or another."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f":{error.lineno}" if where is None else ""
        raise DataError(f"{line}: malformed JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise DataError(": malformed JSON: nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f": malformed JSON: {str(error).split(';')[0]}") from None


def _object(value, where):
    """The value if it is an object with named columns, or the ValueError that says it is not."""
    if isinstance(value, dict):
        return value
    return DataError(f"{where}: must be an object with named columns, not a {type(value).__name__}")


def _read_jsonl(path):
    for number, line in _lines(path):
        where = f"{path}:{number}"
        if isinstance(line, ValueError):
            yield where, line
        elif line.strip():
            try:
                yield where, _object(_parse(line, where), where)
            except ValueError as error:
                yield where, DataError(f"{where}{error}; each line must be one JSON object")


def _read_json(path):
    """A JSON array of objects; a file that starts with an object is read as one object per line."""
    text = "".join(_text_of(line) for _, line in _lines(path))
    if text.lstrip()[:1] == "{":
        yield from _read_jsonl(path)
        return
    try:
        values = _parse(text, None)
    except ValueError as error:
        raise DataError(f"{path}{error}") from None
    if not isinstance(values, list):
        raise DataError(f"{path}: must hold an array of objects, not a {type(values).__name__}")
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
    _text_of(first)  # without its header a table cannot be read
    if looks_like_header(first, named):
        names, rest = [cell.strip() for cell in first], records
        if len(set(names)) < len(names):
            raise DataError(f"{path}:{first_number}: the header names a column twice: {', '.join(names)}")
    else:
        peeked = list(itertools.islice(records, 1000))
        reason = unlike_a_header(first, [cells for _, cells in peeked if not isinstance(cells, ValueError)])
        names = headerless_names(len(first))
        if reason or names is None:
            raise DataError(
                f"{path}:{first_number}: no header with names that fastft knows ({', '.join(first)[:80]}) and "
                f"{reason or f'{len(first)} columns, of which it cannot tell text from label'}; "
                f"name the columns with --text_column and --label_column, or --prompt_column and --completion_column"
            )
        rest = itertools.chain([(first_number, first)], peeked, records)
    for number, cells in rest:
        where = f"{path}:{number}"
        if isinstance(cells, ValueError):
            yield where, cells
        elif len(cells) != len(names):
            yield where, DataError(f"{where}: has {len(cells)} cells, must have {len(names)} ({', '.join(names)})")
        else:
            yield where, dict(zip(names, cells, strict=True))


def _records(path, dialect):
    """(line where the record starts, cells or a ValueError) of each record that is not blank."""
    csv.field_size_limit(2**31 - 1)  # the default refuses documents of more than 128 KB
    undecodable = []

    def lines():
        for _, line in _lines(path):
            if isinstance(line, ValueError):
                undecodable.append(line)
                line = "\n"
            yield line

    reader = csv.reader(lines(), **dialect)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cells = DataError(f"{path}:{number}: malformed CSV: {error}")
        if undecodable:
            cells = undecodable[0]
            undecodable.clear()
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
    except (pyarrow.ArrowException, OSError, OverflowError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a Parquet file: {str(error).strip().splitlines()[0]}") from None


def _read_text(path, lines):
    """Rows {"text": document}. Documents end at a line `<|endoftext|>`; a file without such lines is one document."""
    document, start = [], 1
    for number, line in _lines(path):
        if isinstance(line, ValueError):
            yield f"{path}:{number}", line
            continue
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
