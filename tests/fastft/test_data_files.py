"""Every format gives the same rows, and every bad file one sentence that names the file and the line or row."""

import json

import datasets
import pytest

from fastft.arguments import Arguments
from fastft.data import read_rows
from fastft.data.files import open_file
from fastft.data.splits import open_splits

ROWS = [
    {"text": "a, fine\nfilm", "label": "1"},
    {"text": 'he said "no"', "label": "0"},
    {"text": "ünï \u2028", "label": "1"},
]


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def rows_of(path, **options):
    return list(open_file(path, **options).rows())


def test_every_format_gives_the_same_rows(tmp_path):
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    quoted = ['"a, fine\nfilm",1', '"he said ""no""",0', "ünï \u2028,1"]
    files = {
        "a.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
        "lines.json": "\n\n".join(json.dumps(row) for row in ROWS) + "\n",
        "a.json": json.dumps(ROWS, indent=2),
        "a.csv": "\n".join(["text,label", *quoted]),
        "bom.csv": "\ufeff" + "\r\n".join(["text,label", *quoted]) + "\r\n\r\n",
        "headerless.csv": "\n".join(quoted),
    }
    for name, text in files.items():
        write(tmp_path / name, text)
    for name in [*files, "a.parquet"]:
        assert [row for _, row in rows_of(tmp_path / name)] == ROWS, name


def test_tsv_takes_quotation_marks_as_they_are(tmp_path):
    path = write(tmp_path / "a.tsv", '"unbalanced\t1\nan "odd" one\t0\n')
    assert [row for _, row in rows_of(path)] == [
        {"text": '"unbalanced', "label": "1"},
        {"text": 'an "odd" one', "label": "0"},
    ]


def test_where_names_the_line_or_the_row(tmp_path):
    lines = write(tmp_path / "a.csv", 'text,label\n"two\nlines",1\n\nthree,0\n')
    assert [where for where, _ in rows_of(lines)] == [f"{lines}:2", f"{lines}:5"]
    array = write(tmp_path / "a.json", '[{"text": "a"}, {"text": "b"}]')
    assert [where for where, _ in rows_of(array)] == [f"{array}, row 1", f"{array}, row 2"]


def test_text_documents(tmp_path):
    path = write(tmp_path / "a.txt", "\none\ntwo\n<|endoftext|>\n\n<|endoftext|>\n  three\n")
    assert rows_of(path) == [(f"{path}:1", {"text": "one\ntwo"}), (f"{path}:7", {"text": "  three"})]
    assert list(read_rows(path)) == [{"text": "one"}, {"text": "two"}, {"text": "  three"}]


def test_rows_can_be_limited_and_read_again(tmp_path):
    source = open_file(write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "b"}\n{"text":'))
    assert source.columns() == ["text"]
    assert [row["text"] for _, row in source.rows(2)] == ["a", "b"]
    assert [row["text"] for _, row in source.rows(1)] == ["a"]


def test_digest_is_that_of_the_content(tmp_path):
    a, b = write(tmp_path / "a.jsonl", '{"text": "a"}'), write(tmp_path / "b.jsonl", '{"text": "a"}')
    assert open_file(a).digest() == open_file(b).digest()
    write(tmp_path / "b.jsonl", '{"text": "b"}')
    assert open_file(a).digest() != open_file(b).digest()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "a"}\n\n{"text": \n',
            r"a\.jsonl:3: malformed JSON: .* at column \d+; each line must be one",
        ),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"a\.jsonl:2: must be an object with named columns, not a list$"),
        (
            "a.json",
            '[\n{"text": "a"},\n{"text" "b"}]',
            r"a\.json:3: malformed JSON: Expecting ':' delimiter at column 9$",
        ),
        ("a.json", '[{"text": "a"}, 3]', r"a\.json, row 2: must be an object with named columns, not a int$"),
        ("a.json", '"text"', r"a\.json: must hold an array of objects, not a str$"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "caf\xe9"}\n',
            r"a\.jsonl:2: not UTF-8 \(byte 0xe9 at position 14\); convert",
        ),
        ("a.txt", b"\xff\xfea\x00", r"a\.txt:1: not UTF-8 \(byte 0xff at position 1\)"),
        ("a.csv", "text,label\na,1\nb\n", r"a\.csv:3: has 1 cells, must have 2 \(text, label\)$"),
        ("a.tsv", "a\t1\nb\tx\t0\n", r"a\.tsv:2: has 3 cells, must have 2 \(text, label\)$"),
        ("a.csv", 'text,label\n"a,1\n', r"a\.csv:2: malformed CSV: unexpected end of data$"),
        ("a.csv", "text,label,label\n", r"a\.csv:1: the header names a column twice: text, label, label$"),
        ("a.csv", "text,label\n", r"a\.csv: holds no rows$"),
        ("a.jsonl", "\n\n", r"a\.jsonl: holds no rows$"),
        ("a.json", "[]", r"a\.json: holds no rows$"),
        ("a.csv", "", r"--train_file .*a\.csv: is empty$"),
        ("a.parquet", "PAR2", r"a\.parquet: not a Parquet file: "),
        ("a.xlsx", "x", r"--train_file .*a\.xlsx: unknown extension '\.xlsx'; must be one of \.jsonl, .*\.txt$"),
        (
            "a.csv",
            "w,x,y,z\n1,2,3,4\n",
            r"a\.csv:1: no header with names that fastft knows \(w, x, y, z\) and 4 columns",
        ),
    ],
)
def test_bad_file(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        rows_of(path, argument="--train_file")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ValueError, match=r"--validation_file .*none\.csv: no such file$"):
        open_file(tmp_path / "none.csv", "--validation_file")
    with pytest.raises(ValueError, match=r"--train_file .*: is a folder; must be a file \(\.jsonl, "):
        open_file(tmp_path, "--train_file")


LINES = [f"film {i}\t{'good' if i % 2 else 'bad'}" for i in range(30)]


@pytest.mark.parametrize(
    ("first", "others", "reason"),
    [
        ("review\tsentiment", LINES, "the label 'sentiment' occurs in no other line"),
        ("review\tstars", [f"film {i}\t{i % 5}" for i in range(30)], "the other lines end in a number"),
        ("stars\treview", [f"{i % 5}\tfilm {i}" for i in range(30)], "30 values in 30 lines, too many for a label"),
    ],
)
def test_a_header_with_unknown_names_is_not_taken_for_a_row(tmp_path, first, others, reason):
    path = write(tmp_path / "a.tsv", "\n".join([first, *others]))
    with pytest.raises(
        ValueError, match=rf"a\.tsv:1: no header with names .*{reason}.*; name the columns with --text_column"
    ):
        rows_of(path)
    columns = first.split("\t")
    assert open_file(path, named_columns=columns[:1]).columns() == columns


@pytest.mark.parametrize(
    "lines", [LINES, LINES[:2], ["how are you\tquestion", "fine\tanswer"], [f"a\t{i / 7}" for i in range(30)]]
)
def test_files_without_a_header(tmp_path, lines):
    rows = rows_of(write(tmp_path / "a.tsv", "\n".join(lines)))
    assert [row for _, row in rows] == [dict(zip(("text", "label"), line.split("\t"), strict=True)) for line in lines]


def test_splits_of_a_dataset_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    labels = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    parts = {"train": [0, 1, 1], "dev": [1, 0], "test": [-1, -1]}
    loaded = datasets.DatasetDict(
        {
            k: datasets.Dataset.from_dict({"sentence": ["x"] * len(v), "label": v}, features=labels)
            for k, v in parts.items()
        }
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: loaded)
    extra = write(tmp_path / "extra.jsonl", '{"sentence": "y", "label": "pos"}')
    sources = open_splits(Arguments(dataset_name="some/films", validation_file=extra))
    assert list(sources) == ["train", "validation"], "hidden labels are no test set"
    assert [row["label"] for _, row in sources["train"].rows()] == ["neg", "pos", "pos"]
    assert [where for where, _ in sources["train"].rows()][-1] == "some/films/train, row 3"
    assert sources["validation"].name == extra


def test_dataset_that_cannot_be_had(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"--dataset_name .*none: "):
        open_splits(Arguments(dataset_name=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="no data: give --train_file or --dataset_name"):
        open_splits(Arguments())


def test_real_files(shared):
    counts = {
        "sst2/train.tsv": 6920, "sst2/dev.tsv": 872, "sst2/test.tsv": 1821, "banking77/train.csv": 10003,
        "banking77/test.csv": 3080, "gsm8k/train.jsonl": 7473, "gsm8k/test.jsonl": 1319,
        "instruct/dolly_filtered_3k.json": 2996, "preference/dpo_en_demo.json": 300,
        "text/tinyshakespeare.txt": 1, "text/tinystories_sample.txt": 5,
    }  # fmt: skip
    for name, count in counts.items():
        assert len(rows_of(shared / "data" / name)) == count, name
