"""Examples -> a batch: packed in one row without padding, or padded to the longest."""

import numpy as np
import torch

from fastft.data.tokens import IGNORED, first_position


class Collator:
    """Makes batches of CPU tensors from examples (dicts of `input_ids`, `labels` and perhaps `token_type_ids`).

    packing=True: one row of T tokens; `input_ids`, `position_ids` (restarting with each example) int64 [1, T],
    `cu_seq_lens_q` and `_k` int32 [n + 1], `max_length_q` and `_k` ints; `labels` int64 [1, T] with -100 at each
    example's first token, or one per example [n], int64 or float32. packing=False: `input_ids`, `attention_mask`
    int64 [b, S], padded on the right; `labels` [b, S] or [b]. Both: `token_type_ids` of the shape of `input_ids`
    where examples have them.
    """

    def __init__(self, tokenizer, model_config, *, packing):
        self.packing = packing
        self.first_position = first_position(model_config)
        self.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if not packing and self.pad_token_id is None:
            raise ValueError(
                "the tokenizer has neither a padding nor an end token to fill shorter rows with; set pad_token in its "
                "tokenizer_config.json, or use --packing true, which needs no padding"
            )

    def __call__(self, examples):
        lengths = np.fromiter((len(e["input_ids"]) for e in examples), np.int64, len(examples))
        return self._pack(examples, lengths) if self.packing else self._pad(examples, lengths)

    def ignored(self, example):
        """The same example with all its labels ignored: a rank computes it and nothing comes of it."""
        labels = example["labels"]
        if isinstance(labels, float):
            return {**example, "labels": float("nan")}
        return {**example, "labels": IGNORED if isinstance(labels, int) else np.full(len(labels), IGNORED, np.int32)}

    def _pack(self, examples, lengths):
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        starts, total, longest = bounds[:-1], int(bounds[-1]), int(lengths.max())
        positions = np.arange(self.first_position, total + self.first_position) - np.repeat(starts, lengths)
        cu_seq_lens = torch.from_numpy(bounds.astype(np.int32))
        batch = {name: _row([e[name] for e in examples]) for name in _token_columns(examples)}
        batch["position_ids"] = torch.from_numpy(positions)[None]
        batch |= {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens}
        batch |= {"max_length_q": longest, "max_length_k": longest}
        if _labels_tokens(examples):
            batch["labels"] = _row([e["labels"] for e in examples])
            batch["labels"][0, starts] = IGNORED
        else:
            batch["labels"] = _per_example(examples)
        return batch

    def _pad(self, examples, lengths):
        inside = np.arange(lengths.max()) < lengths[:, None]
        fill = {"input_ids": self.pad_token_id, "token_type_ids": 0}
        batch = {name: _filled([e[name] for e in examples], inside, fill[name]) for name in _token_columns(examples)}
        batch["attention_mask"] = torch.from_numpy(inside.astype(np.int64))
        if _labels_tokens(examples):
            batch["labels"] = _filled([e["labels"] for e in examples], inside, IGNORED)
        else:
            batch["labels"] = _per_example(examples)
        return batch


def _token_columns(examples):
    return [name for name in ("input_ids", "token_type_ids") if name in examples[0]]


def _labels_tokens(examples):
    return not isinstance(examples[0]["labels"], (int, float))


def _row(arrays):
    return torch.from_numpy(np.concatenate(arrays, dtype=np.int64))[None]


def _filled(arrays, inside, fill):
    rows = np.full(inside.shape, fill, np.int64)
    rows[inside] = np.concatenate(arrays)
    return torch.from_numpy(rows)


def _per_example(examples):
    """Labels [n] of classes (int64) or scores (float32)."""
    labels = [e["labels"] for e in examples]
    return torch.tensor(labels, dtype=torch.float32 if isinstance(labels[0], float) else torch.int64)
