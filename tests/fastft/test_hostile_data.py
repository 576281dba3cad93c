"""2,000 malformed files, made by hypothesis: each is refused in one readable sentence that names it, or its bad rows are
counted; nothing hangs, and nothing fails in another way.

Derandomised, so that every run meets the same files; HOSTILE_SEED=7 makes others.
"""

import collections
import csv
import io
import json
import os
import shutil
import signal
import unicodedata

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as from_seed
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fastft.arguments import Arguments
from fastft.data import read_rows
from fastft.data.errors import LONGEST
from fastft.predict import as_line
from fastft.tasks import get_task

EXAMPLES = {".jsonl": 550, ".json": 300, ".csv": 400, ".tsv": 300, ".parquet": 250, ".txt": 200}
assert sum(EXAMPLES.values()) == 2000
pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")
PATIENCE = 60  # seconds for one file, a hundred times what the slowest takes

TEXTS = [
    "", " ", "fine", "good", "bad", "0", "1", "-0", "2.5", "1e400", "NaN", "inf", "+-3", "٣", "²", "null",
    "true", "9" * 5000, "x\udfffy",
    "\x00", "a\x00b", "\x1b[31mred\x1b[0m", "\x07\x08\x7f\x85\x9f", "\r", "\n\n", "\t", "\u2028", "\ufeff", "\ud800",
    "\u202egnp.exe", "\u200f\u2066", "שלום עולם", "e\u0301" * 10, "\U0001f600" * 5, "\U0010ffff", '"', '""', "'", ",", ";",
    "<|endoftext|>", "</s>", "{{ 7 * 7 }}", "word " * 500, "a" * 5000, "[", "{", '{"text": "a"}',
]  # fmt: skip
NAMES = [
    "text", "sentence", "label", "labels", "score", "prompt", "completion", "instruction", "input", "output", "messages",
    "conversations", "question", "answer", "sentence1", "sentence2", "id",
]  # fmt: skip
texts = st.one_of(st.sampled_from(TEXTS), st.text(st.characters(), max_size=8))
names = st.one_of(st.sampled_from(NAMES), st.sampled_from(NAMES), st.sampled_from(TEXTS))
roles = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "", "\x1b[2J", 3, None, [], "a" * 5000])
messages = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": roles, "content": texts}),
        st.fixed_dictionaries({"from": roles, "value": st.one_of(texts, st.none(), st.integers())}),
        texts,
        st.none(),
    ),
    max_size=3,
)
numbers = st.sampled_from([0, 1, -1, 2.5, float("nan"), float("inf"), -1e308, 10**400, 2**63, True, False])
values = st.one_of(
    texts, texts, numbers, messages, st.none(), st.lists(texts, max_size=2), st.dictionaries(texts, numbers, max_size=2)
)
rows = st.lists(st.dictionaries(names, values, max_size=4), max_size=4)
alike = st.lists(names, min_size=1, max_size=4, unique=True).flatmap(
    lambda keys: st.lists(st.fixed_dictionaries({key: values for key in keys}), min_size=1, max_size=5)
)
fair = st.sampled_from(["a fine film", "no", "+-3", "שלום", "x\u202ey", "b" * 300, "\x1b[1m", "0", "2.5"])
often = lambda strategy: st.one_of(*[strategy] * 7, values)  # one cell in eight is anything
usual = {
    "text": often(fair), "prompt": often(fair), "completion": often(fair), "id": values,
    "label": often(st.sampled_from(["good", "bad", "bad "])), "score": often(st.sampled_from(["1", "2.5", 0, 1.5, "-2"])),
    "messages": often(messages.filter(bool)),
}  # fmt: skip
sets = [
    ("text", "label"),
    ("text", "score"),
    ("prompt", "completion"),
    ("text",),
    ("messages",),
    ("id", "text", "score"),
]
likely = st.sampled_from(sets).flatmap(
    lambda keys: st.lists(st.fixed_dictionaries({key: usual[key] for key in keys}), min_size=2, max_size=6)
)
tables = st.one_of(rows, alike, likely, likely, likely, likely)
depths = st.sampled_from([3, 100, 900, 990, 2000, 100_000])


@st.composite
def damaged(draw, content):
    """Bytes, as they are or damaged in one of the ways in which files are."""
    data = draw(content)
    data = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    how = draw(st.sampled_from([*["not"] * 8, "cut", "hole", "noise", "flip", "bom", "twice", "utf-16", "latin-1"]))
    at = draw(st.integers(0, max(0, len(data) - 1)))
    if how == "cut":
        return data[:at]
    if how == "hole":
        return data[:at] + data[at + draw(st.integers(1, 20)) :]
    if how == "noise":
        return data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at:]
    if how == "flip" and data:
        return data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
    if how == "bom":
        return b"\xef\xbb\xbf" * draw(st.integers(1, 2)) + data
    if how == "twice":
        return data + data
    if how in ("utf-16", "latin-1"):
        return data.decode("utf-8", "replace").encode(how, "replace")
    return data


def json_of(value):
    return json.dumps(value, ensure_ascii=False)


def nested(depth, name, opening):
    closing = {"[": "]", '{"a":': "}"}[opening]
    return f'{{"{name}": {opening * depth}1{closing * depth}}}'


deep = st.builds(nested, depths, st.sampled_from(["text", "messages", "label", "id"]), st.sampled_from(["[", '{"a":']))
good = st.just('{"text": "a b", "label": "x"}')


def written(table, delimiter, quoting):
    """CSV text of rows; quoting: as csv.writer does, or none at all."""
    keys = list(dict.fromkeys(key for row in table for key in row))
    cells = [keys, *([row.get(key, "") for key in keys] for row in table)]
    if not quoting:
        return "\n".join(delimiter.join(map(str, line)) for line in cells)
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([["" if c is None else c for c in line] for line in cells])
    return out.getvalue()


lines = st.one_of(
    tables.map(lambda table: "\n".join(map(json_of, table))),
    st.lists(st.one_of(good, deep, texts, values.map(json_of)), max_size=4).map("\n".join),
)
arrays = st.one_of(*[tables.map(json_of)] * 4, lines.map(lambda text: f"[{text}]"), values.map(json_of), lines)


def cells(delimiter):
    quoted = st.builds(written, tables, st.just(delimiter), st.booleans())
    without_header = quoted.map(lambda text: text.partition("\n")[2])
    loose = st.lists(st.lists(texts, max_size=4).map(delimiter.join), max_size=5).map("\n".join)
    return st.one_of(quoted, quoted, without_header, loose)


def parquet(columns):
    """A Parquet file of columns; those that Arrow cannot hold are left out."""
    arrays = {}
    for name, kind, column in columns:
        try:
            arrays[name.encode("utf-8", "replace").decode()] = pyarrow.array(
                column[:3] + [None] * (3 - len(column)), kind
            )
        except (pyarrow.ArrowException, OverflowError, TypeError, ValueError):
            pass
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(arrays), out)
    return out.getvalue()


kinds = st.sampled_from(
    [None, pyarrow.string(), pyarrow.binary(), pyarrow.int64(), pyarrow.float16(), pyarrow.timestamp("us"), pyarrow.date32(),
     pyarrow.decimal128(10, 2), pyarrow.list_(pyarrow.string()), pyarrow.bool_(), pyarrow.large_string(), pyarrow.null()]
)  # fmt: skip
members = st.one_of(texts, st.integers(-5, 5), st.binary(max_size=4), st.none(), st.lists(texts, max_size=2))
odd = st.lists(st.tuples(names, kinds, st.lists(members, max_size=3)), max_size=4)
labels = st.lists(st.one_of(st.sampled_from(["good", "bad"]), st.none(), texts), min_size=3, max_size=3)
even = st.builds(
    lambda text, label, kind: [("text", None, text), ("label", kind, label)],
    st.lists(st.one_of(fair, fair, texts, st.none()), min_size=3, max_size=3),
    st.one_of(labels, labels, st.just([0, 1, 1]), st.lists(members, min_size=3, max_size=3)),
    st.one_of(st.none(), kinds),
)
columns = st.one_of(odd, even, even)
CONTENTS = {
    ".jsonl": damaged(lines),
    ".json": damaged(arrays),
    ".csv": damaged(cells(",")),
    ".tsv": damaged(cells("\t")),
    ".parquet": damaged(columns.map(parquet)),
    ".txt": damaged(st.lists(texts, max_size=6).map("\n".join)),
}


@pytest.fixture(scope="module")
def tokenizers(tiny_llama):
    plain, chat = (AutoTokenizer.from_pretrained(tiny_llama) for _ in range(2))
    chat.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}assistant: "
    return plain, chat


def refusal(path, act, *arguments):
    """What `act` returns, or the sentence with which it refuses the file; all else is a failure."""
    try:
        return act(*arguments), None
    except ValueError as error:
        said = str(error)
        assert path.name in said, f"does not name the file: {said!r}"
        bad = [c for c in said if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
        assert not bad, f"not for a terminal: {said!r}"
        assert 10 < len(said) <= LONGEST, len(said)
        assert type(error).__name__ == "DataError", f"by chance: {error!r}"
        return None, said


def load(path, tokenizer, on_bad_row, task=None):
    shutil.rmtree(path.parent / "cache", ignore_errors=True)
    args = Arguments(
        train_file=str(path), on_bad_row=on_bad_row, cache_dir=str(path.parent / "cache"), max_length=64, task=task
    )
    return get_task(args).load_data(tokenizer)["train"]


def check(path, data, tokenizer):
    """The file in each of the ways in which it is used."""
    path.write_bytes(data)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"{PATIENCE} s for {data[:200]!r}"))
    signal.alarm(PATIENCE)
    try:
        strict, said = refusal(path, load, path, tokenizer, "error")
        skipping, said_skipping = refusal(path, load, path, tokenizer, "skip")
        if strict is not None:
            assert skipping.report == strict.report and "bad_rows" not in strict.report
        elif skipping is not None:
            assert skipping.report["bad_rows"] > 0, said
            shown = [*skipping.report["bad_rows_shown"], skipping.summary()]
            assert all(text.isprintable() for text in shown), shown
        refusal(path, lambda: [as_line(row).encode() for row in read_rows(path)])
    finally:
        signal.alarm(0)
    return "used" if strict is not None else "skipped rows" if skipping is not None else "refused"


SEED = os.environ.get("HOSTILE_SEED")


@pytest.mark.parametrize("suffix", EXAMPLES)
def test_hostile_files(tmp_path, tokenizers, suffix):
    outcomes = collections.Counter()

    @settings(
        max_examples=EXAMPLES[suffix], derandomize=SEED is None, database=None, deadline=None, print_blob=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(CONTENTS[suffix], st.sampled_from(tokenizers))
    def run(data, tokenizer):
        outcomes[check(tmp_path / f"a{suffix}", data, tokenizer)] += 1

    (run if SEED is None else from_seed(int(SEED))(run))()
    assert outcomes.total() >= EXAMPLES[suffix]
    for outcome, share in (("used", 0.01), ("skipped rows", 0.05), ("refused", 0.05)):
        assert outcomes[outcome] >= share * EXAMPLES[suffix], f"too much alike to prove anything: {outcomes}"


MEGABYTE = 1 << 20


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("token.jsonl", '{"text": "%s"}' % ("a" * MEGABYTE)),
        ("name.jsonl", '{"%s": 1}' % ("a" * MEGABYTE)),
        ("role.jsonl", '{"messages": [{"role": "%s", "content": ""}]}' % ("a" * MEGABYTE)),
        ("label.jsonl", '{"text": "a", "label": ["%s"]}' % ("a" * MEGABYTE)),
        ("digits.jsonl", '{"text": %s}' % ("1" * MEGABYTE)),
        ("objects.json", "[%s3]" % ('{"text": 1, "a": "%s"},' % ("a" * 100) * (MEGABYTE // 120))),
        ("header.csv", ",".join(["a" * MEGABYTE, "\x1b]0;x\x07", "b", "c"])),
        ("columns.csv", "," * MEGABYTE),
        ("quote.csv", 'text,label\n"' + "a" * MEGABYTE),
        ("cells.tsv", "text\tlabel\n" + "\t" * MEGABYTE),
        ("lines.txt", "<|endoftext|>\n" * (MEGABYTE // 14)),
        ("nul.txt", "\x00" * (MEGABYTE // 8)),
    ],
)
def test_a_megabyte_at_once(tmp_path, tokenizers, name, content):
    check(tmp_path / name, content.encode(), tokenizers[0])


def test_a_terminal_is_not_written_to(tmp_path, tokenizers):
    """The header of a table is shown where it is not understood, its escape sequences as text."""
    path = tmp_path / "a.csv"
    path.write_text("\x1b[2J,\x07bell,\u202ename,d\n1,2,3,4\n")
    _, said = refusal(path, load, path, tokenizers[0], "error")
    assert r"(\x1b[2J, \x07bell, \u202ename, d)" in said
