"""Files are tokenised once: the second time, and on the other ranks of a machine, the result is loaded."""

import json
import os
import stat
from dataclasses import dataclass

import numpy as np
import pytest

from fastft.data import TokenDataset
from fastft.data.build import Encoded, build
from fastft.data.files import open_file


@dataclass(frozen=True)
class Encoder:
    """Token ids are the lengths of words; appends the process and the number of rows to `log` at each call."""

    log: str
    max_length: int = 8

    def __call__(self, rows):
        with open(self.log, "a") as log:
            log.write(f"{os.getpid()} {len(rows)}\n")
        if any(row["text"] == "boom" for _, row in rows):
            raise ValueError("boom")
        ids = [np.array([len(word) for word in row["text"].split()], np.int32) for _, row in rows]
        return Encoded(input_ids=ids, labels=ids, wheres=[where for where, _ in rows], truncated=1)


@dataclass(frozen=True)
class Labels:
    """Labels as they are."""

    def __call__(self, encoded):
        return np.concatenate(encoded.labels), {"trained_tokens": 7}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": "ab " * (1 + i % 5) + "x" * (1 + i)}) for i in range(60)))
    return path


@pytest.fixture
def calls(tmp_path):
    log = tmp_path / "log"
    return lambda: log.read_text().splitlines() if log.exists() else []


def run(tmp_path, path, **options):
    encoder = Encoder(str(tmp_path / "log"), **options.pop("encoder", {}))
    return build(open_file(path), encoder, Labels(), cache_dir=tmp_path / "cache", **options)


def test_second_load_does_not_tokenise(tmp_path, data, calls):
    first = run(tmp_path, data)
    assert len(calls()) == 1
    second = run(tmp_path, data)
    assert len(calls()) == 1
    assert first.report == second.report and len(second) == 60
    for a, b in zip(first.take(range(60)), second.take(range(60)), strict=True):
        assert (a["input_ids"] == b["input_ids"]).all()


@pytest.mark.parametrize("change", ["content", "limit", "encoder"])
def test_what_changes_the_result_makes_it_anew(tmp_path, data, calls, change):
    run(tmp_path, data)
    options = {"content": {}, "limit": {"limit": 10}, "encoder": {"encoder": {"max_length": 9}}}[change]
    if change == "content":
        data.write_text(data.read_text().replace("ab", "abc"))
    run(tmp_path, data, **options)
    assert len(calls()) == 2


def test_the_tokenizer_is_part_of_the_key(tmp_path, tiny_llama):
    from transformers import AutoTokenizer

    from fastft.data.build import _tokenizer_identity

    a, b, c = (AutoTokenizer.from_pretrained(tiny_llama) for _ in range(3))
    b("a text", truncation=True, max_length=2)  # leaves its mark in the tokenizer
    c.chat_template = "{{ messages }}"
    assert _tokenizer_identity(a) == _tokenizer_identity(b) != _tokenizer_identity(c)
    c.chat_template = None
    c.add_tokens(["<new>"])
    assert _tokenizer_identity(a) != _tokenizer_identity(c)


def test_processes_give_the_same_result_in_order(tmp_path, data, calls, monkeypatch):
    monkeypatch.setattr("fastft.data.build.CHUNK_ROWS", 7)
    alone = run(tmp_path, data)
    count = len(calls())
    shared = build(open_file(data), Encoder(str(tmp_path / "log")), Labels(), workers=2, cache_dir=tmp_path / "other")
    workers = {line.split()[0] for line in calls()[count:]}
    assert len(calls()) == 2 * count and workers and str(os.getpid()) not in workers
    assert all((alone.arrays[name] == shared.arrays[name]).all() for name in alone.arrays)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_leaves_nothing_behind(tmp_path, workers):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "boom"}')
    with pytest.raises(ValueError, match="boom"):
        run(tmp_path, path, workers=workers)
    assert [p.name for p in (tmp_path / "cache/fastft").iterdir() if p.is_dir()] == []


def test_nothing_left_to_train_on(tmp_path, data):
    class Dropping(Encoder):
        def __call__(self, rows):
            return Encoded(dropped=len(rows))

    with pytest.raises(
        ValueError, match=r"a\.jsonl: nothing is left to train on: all 60 examples .* within --max_length 8"
    ):
        build(open_file(data), Dropping(str(tmp_path / "log")), Labels(), cache_dir=tmp_path)


def test_report_and_summary(tmp_path, data):
    ds = run(tmp_path, data)
    lengths = [1 + i % 5 + 1 for i in range(60)]
    assert ds.report == {
        "examples": 60, "tokens": sum(lengths), "mean_length": np.mean(lengths), "longest": 6, "truncated": 1,
        "dropped": 0, "max_length": 8, "trained_tokens": 7,
    }  # fmt: skip
    assert ds.summary() == (
        "60 examples, 240 tokens (7 trained), 4.0 on average, 6 at most; 1 truncated to 8, 0 dropped"
    )


def test_saved_and_loaded_arrays_are_equal(tmp_path):
    arrays = {
        "input_ids": np.arange(5, dtype=np.int32), "offsets": np.array([0, 2, 5]),
        "labels": np.array([0.5, 2], np.float32), "token_type_ids": np.array([0, 1, 0, 1, 1], np.int8),
    }  # fmt: skip
    TokenDataset(arrays, {"examples": 2}).save(tmp_path)
    loaded = TokenDataset.load(tmp_path)
    plain = lambda arrays: {name: (array.dtype, array.tolist()) for name, array in arrays.items()}
    assert plain(loaded.arrays) == plain(arrays)
    assert loaded[1]["labels"] == 2.0 and type(loaded[1]["labels"]) is float
    assert loaded[1]["token_type_ids"].tolist() == [0, 1, 1]


def test_cache_folder_that_cannot_be_written(tmp_path, data):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=r"cannot keep tokenised data in .*cache/fastft: .*; choose another folder"):
        run(tmp_path, data)


def test_disk_full_while_caching(tmp_path, data, monkeypatch):
    def full(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TokenDataset, "save", full)
    with pytest.raises(ValueError, match="No space left on device; choose another folder"):
        run(tmp_path, data)
    assert [p for p in (tmp_path / "cache/fastft").iterdir() if p.is_dir()] == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_that_may_not_be_read(data):
    data.chmod(stat.S_IWUSR)
    with pytest.raises(ValueError, match=r"--train_file .*a\.jsonl: may not be read"):
        open_file(data, "--train_file")
