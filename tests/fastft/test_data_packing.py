"""Packed and padded batches hold the same examples, and evaluation sees each example once on all ranks together."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.data import Collator, TokenDataset, eval_batches
from fastft.data.tokens import IGNORED, longest_input

LLAMA = SimpleNamespace(model_type="llama", pad_token_id=0)
ROBERTA = SimpleNamespace(model_type="roberta", pad_token_id=1, max_position_embeddings=514)


def tokenizer(pad=0, end=2):
    return SimpleNamespace(pad_token_id=pad, eos_token_id=end, model_max_length=100)


def make_dataset(lengths, labels="tokens", pairs=False):
    """A dataset whose tokens are all different, with labels per token (every third ignored), classes or scores."""
    total = sum(lengths)
    arrays = {"input_ids": np.arange(10, 10 + total, dtype=np.int32), "offsets": np.cumsum([0, *lengths])}
    arrays["labels"] = {
        "tokens": np.where(np.arange(total) % 3, arrays["input_ids"], IGNORED).astype(np.int32),
        "classes": np.arange(len(lengths), dtype=np.int64),
        "scores": np.arange(len(lengths), dtype=np.float32) / 4,
    }[labels]
    if pairs:
        arrays["token_type_ids"] = (np.arange(total) % 2).astype(np.int8)
    return TokenDataset(arrays, {})


def unpack(batch):
    """The rows of a packed batch, as (input_ids, position_ids, labels) lists."""
    bounds = batch["cu_seq_lens_q"].tolist()
    spans = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    labels = batch["labels"]
    labels = [labels[0, s].tolist() for s in spans] if labels.ndim == 2 else labels.tolist()
    return (
        [batch["input_ids"][0, s].tolist() for s in spans],
        [batch["position_ids"][0, s].tolist() for s in spans],
        labels,
    )


def unpad(batch):
    lengths = batch["attention_mask"].sum(1).tolist()
    assert all(mask[:n].all() for mask, n in zip(batch["attention_mask"], lengths, strict=True)), (
        "padding is on the right"
    )
    labels = batch["labels"]
    if labels.ndim == 2:
        assert all((row[n:] == IGNORED).all() for row, n in zip(labels, lengths, strict=True))
        labels = [row[:n].tolist() for row, n in zip(labels, lengths, strict=True)]
    return [row[:n].tolist() for row, n in zip(batch["input_ids"], lengths, strict=True)], labels


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=8),
    st.sampled_from(["tokens", "classes", "scores"]),
    st.booleans(),
)
def test_packed_and_padded_hold_the_same(lengths, labels, pairs):
    ds = make_dataset(lengths, labels, pairs)
    examples = ds.take(range(len(ds)))
    packed = Collator(tokenizer(), LLAMA, packing=True)(examples)
    padded = Collator(tokenizer(), LLAMA, packing=False)(examples)
    ids, positions, packed_labels = unpack(packed)
    padded_ids, padded_labels = unpad(padded)
    assert ids == padded_ids == [e["input_ids"].tolist() for e in examples]
    assert positions == [list(range(n)) for n in lengths]
    if labels == "tokens":
        assert packed_labels == [[IGNORED, *e["labels"].tolist()[1:]] for e in examples]
        assert [row[1:] for row in padded_labels] == [row[1:] for row in packed_labels]
    else:
        assert packed["labels"].tolist() == padded["labels"].tolist() == [e["labels"] for e in examples]
        assert (
            packed["labels"].dtype == padded["labels"].dtype == (torch.int64 if labels == "classes" else torch.float32)
        )
    if pairs:
        mask = padded["attention_mask"].bool()
        assert packed["token_type_ids"][0].tolist() == padded["token_type_ids"][mask].tolist()
    assert ("token_type_ids" in packed) == ("token_type_ids" in padded) == pairs


def test_types_and_shapes_of_a_packed_batch():
    batch = Collator(tokenizer(), LLAMA, packing=True)(make_dataset([3, 1, 4]).take([2, 0, 1]))
    assert batch["input_ids"].shape == batch["position_ids"].shape == batch["labels"].shape == (1, 8)
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 4, 7, 8]
    assert batch["cu_seq_lens_q"].dtype == torch.int32 and batch["input_ids"].dtype == torch.int64
    assert batch["max_length_q"] == batch["max_length_k"] == 4 and type(batch["max_length_q"]) is int
    assert "attention_mask" not in batch


def test_roberta_counts_positions_after_its_padding_index():
    batch = Collator(tokenizer(), ROBERTA, packing=True)(make_dataset([2, 3]).take([0, 1]))
    assert batch["position_ids"].tolist() == [[2, 3, 2, 3, 4]]
    assert longest_input(1024, tokenizer(), ROBERTA) == 512
    assert longest_input(64, tokenizer(), ROBERTA) == 64
    assert longest_input(1024, tokenizer()) == 100


def test_plain_lists_collate_too():
    examples = [{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7], "labels": [7]}]
    assert Collator(tokenizer(), LLAMA, packing=True)(examples)["labels"].tolist() == [[-100, 6, -100]]
    assert Collator(tokenizer(), LLAMA, packing=False)(examples)["labels"].tolist() == [[-100, 6], [7, -100]]


def test_end_token_that_pads_keeps_its_label():
    """Padding is known by its place, not by its id: a real end token is attended to and trained."""
    examples = [{"input_ids": [5, 2], "labels": [-100, 2]}, {"input_ids": [5, 6, 2], "labels": [-100, 6, 2]}]
    batch = Collator(tokenizer(pad=None), LLAMA, packing=False)(examples)
    assert batch["input_ids"].tolist() == [[5, 2, 2], [5, 6, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 2, -100], [-100, 6, 2]]


def test_no_token_to_pad_with():
    with pytest.raises(
        ValueError, match="neither a padding nor an end token .*; set pad_token in .*, or use --packing true"
    ):
        Collator(tokenizer(None, None), LLAMA, packing=False)
    Collator(tokenizer(None, None), LLAMA, packing=True)


@pytest.mark.parametrize("labels", ["tokens", "classes", "scores"])
def test_ignored_examples_have_no_labels(labels):
    ds = make_dataset([4, 2], labels)
    collate = Collator(tokenizer(), LLAMA, packing=False)
    batch = collate([collate.ignored(ds[0]), ds[1]])
    row = batch["labels"][0]
    assert row.isnan().all() if labels == "scores" else (row == IGNORED).all()
    assert batch["input_ids"][0].tolist() == ds[0]["input_ids"].tolist()
    assert (batch["labels"][1] == collate([ds[1]])["labels"][0]).all() if labels != "tokens" else True


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 4))
def test_evaluation_sees_every_example_once(lengths, batch_size, world_size):
    ds = make_dataset(lengths, "classes")
    collate = Collator(tokenizer(), LLAMA, packing=True)
    ranks = [list(eval_batches(ds, collate, batch_size, rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for batches in ranks for batch in batches]
    assert all(len(batch["labels"]) <= batch_size for batch in batches)
    seen = torch.cat([batch["labels"] for batch in batches])
    assert sorted(seen[seen != IGNORED].tolist()) == list(range(len(lengths)))
    order = [int(batch["max_length_q"]) for batch in ranks[0] if (batch["labels"] != IGNORED).all()]
    assert order == sorted(order, reverse=True)


def test_dataset_counts():
    ds = make_dataset([3, 1, 4])
    assert ds.lengths.tolist() == [3, 1, 4] and ds.lengths.dtype == np.int32
    expected = [int((e["labels"][1:] != IGNORED).sum()) for e in ds.take(range(3))]
    assert ds.num_items.tolist() == expected and ds.num_items.dtype == np.int64
    assert make_dataset([3, 1], "scores").num_items.tolist() == [1, 1]
    assert make_dataset([3, 1], "classes")[1]["labels"] == 1
