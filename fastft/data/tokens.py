"""Pieces of text -> token ids and labels."""

import itertools
from dataclasses import replace

import numpy as np

IGNORED = -100
BATCH_CHARACTERS = 4_000_000  # texts tokenised at once: bounds the memory that the tokenizer's own records take
COUNTS_AFTER_PADDING = {"roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert"}
PIECE_CHARACTERS = 50_000  # a longer document is tokenised in parts of whole lines, on several cores


class PieceEncoder:
    """Turns examples (lists of pieces) into (input_ids, labels): int32 arrays, labels -100 where nothing is trained.

    begins: put the tokenizer's own beginning (as a rule the begin token) first; a chat template writes it itself.
    """

    def __init__(self, tokenizer, *, begins):
        self.tokenizer = tokenizer
        self.prefix = _beginning(tokenizer) if begins else []

    def __call__(self, examples):
        examples = [[part for piece in pieces for part in self._split(piece)] for pieces in examples]
        encoded = iter(self._encode([piece for pieces in examples for piece in pieces]))
        return [self._join(list(itertools.islice(encoded, len(pieces)))) for pieces in examples]

    def _join(self, pieces):
        ids = np.concatenate([np.array(self.prefix, np.int32), *(ids for ids, _ in pieces)])
        trained = np.concatenate([np.zeros(len(self.prefix), bool), *(trained for _, trained in pieces)])
        return ids, np.where(trained, ids, np.int32(IGNORED))

    def _split(self, piece):
        """Parts to tokenise one by one: a long document's lines, and the ranges where a tokenizer tells no offsets."""
        if not isinstance(piece.trained, bool):
            return [piece] if self.tokenizer.is_fast else _split_at_ranges(piece)
        if len(piece.text) <= PIECE_CHARACTERS:
            return [piece]
        *parts, last = _split_at_lines(piece.text)
        return [*(replace(piece, text=text, ends=False) for text in parts), replace(piece, text=last)]

    def _encode(self, pieces):
        """(ids, trained) of each piece, in order."""
        for batch in _batches(pieces):
            ranged = any(not isinstance(piece.trained, bool) for piece in batch)
            encoding = self.tokenizer(
                [piece.text for piece in batch],
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                return_offsets_mapping=ranged,
                verbose=False,
            )
            offsets = encoding["offset_mapping"] if ranged else [None] * len(batch)
            for piece, ids, where in zip(batch, encoding["input_ids"], offsets, strict=True):
                yield self._finish(piece, np.array(ids, np.int32), where)

    def _finish(self, piece, ids, offsets):
        if isinstance(piece.trained, bool):
            trained = np.full(len(ids), piece.trained)
        else:
            starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
            trained = np.zeros(len(ids), bool)
            for start, end in piece.trained:  # a token that straddles the border carries some of the answer
                trained |= (starts < end) & (ends > start)
        end = self.tokenizer.eos_token_id
        if piece.ends and end is not None:
            ids, trained = np.append(ids, np.int32(end)), np.append(trained, bool(piece.trained))
        return ids, trained


def cut(ids, labels, max_length):
    """An example as the one (ids, labels) of its first `max_length` tokens."""
    return [(ids[:max_length], labels[:max_length])]


def blocks(ids, labels, max_length):
    """A document as (ids, labels) of at most `max_length` tokens. A block begins with the last token of the one
    before, so that every token of the document except its first is predicted exactly once.
    """
    stride = max_length - 1
    return [(ids[s : s + max_length], labels[s : s + max_length]) for s in range(0, max(len(ids) - 1, 1), stride)]


def count_items(labels):
    """Tokens that are trained once the model has shifted the labels by one."""
    return int(np.count_nonzero(labels[1:] != IGNORED))


def longest_input(max_length, tokenizer, config=None):
    """max_length, or less where the model (or, without its configuration, the tokenizer) takes less."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        limit = tokenizer.model_max_length
    elif first_position(config):
        limit -= first_position(config)
    return min(max_length, int(limit))


def first_position(config):
    """Position id of a sequence's first token: RoBERTa and its kin count from after the padding index."""
    return config.pad_token_id + 1 if getattr(config, "model_type", None) in COUNTS_AFTER_PADDING else 0


def _beginning(tokenizer):
    """Tokens that the tokenizer puts before a text."""
    with_special, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    starts = range(len(with_special) - len(bare) + 1)
    return next((with_special[:s] for s in starts if with_special[s : s + len(bare)] == bare), [])


def _split_at_lines(text):
    parts, size = [[]], 0
    for line in text.splitlines(keepends=True):
        if size + len(line) > PIECE_CHARACTERS and parts[-1]:
            parts.append([])
            size = 0
        parts[-1].append(line)
        size += len(line)
    return ["".join(part) for part in parts]


def _split_at_ranges(piece):
    borders = [0, *(border for span in piece.trained for border in span), len(piece.text)]
    parts = [piece.text[start:end] for start, end in itertools.pairwise(borders)]
    return [replace(piece, text=text, trained=i % 2 == 1) for i, text in enumerate(parts) if text]


def _batches(pieces):
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
