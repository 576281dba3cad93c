"""Tokenised examples as flat arrays, and what was done to get them."""

import json
from pathlib import Path

import numpy as np

from fastft.data.tokens import IGNORED

PER_TOKEN = ("input_ids", "token_type_ids")


class TokenDataset:
    """Examples behind each other in flat arrays, so that a million of them are a handful of objects and may stay on
    the disk.

    input_ids int32 [T], offsets int64 [N + 1] (example i is tokens offsets[i] to offsets[i + 1]), labels int32 [T]
    (-100: not trained) or int64 [N] (classes) or float32 [N] (scores), token_type_ids int8 [T] where the tokenizer
    makes them. lengths int32 [N]; num_items int64 [N]: what an example adds to the loss's divisor, its trained tokens
    after the shift or 1. rows int64 [N], where they are known: which line or row of the file an example came from.
    """

    def __init__(self, arrays, report):
        self.arrays = arrays
        self.report = report
        self.offsets = arrays["offsets"]
        self.lengths = np.diff(self.offsets).astype(np.int32)
        self.has_token_labels = arrays["labels"].dtype == np.int32
        self.has_scores = arrays["labels"].dtype == np.float32
        self.num_items = self._trained_tokens() if self.has_token_labels else np.ones(len(self), np.int64)

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, index):
        start, end = self.offsets[index], self.offsets[index + 1]
        example = {name: self.arrays[name][start:end] for name in PER_TOKEN if name in self.arrays}
        labels = self.arrays["labels"]
        example["labels"] = labels[start:end] if self.has_token_labels else labels[index].item()
        return example

    def take(self, indices):
        """The examples at `indices`, a list of dicts. Their arrays are views: nothing is copied."""
        return [self[index] for index in indices]

    def where(self, indices):
        """Names a few examples for a message: by their lines or rows in the file, otherwise by their numbers from 0."""
        known = "rows" in self.arrays
        numbers = sorted({int(self.arrays["rows"][i]) if known else int(i) for i in indices})
        shown = ", ".join(map(str, numbers[:10])) + (f" and {len(numbers) - 10} more" if len(numbers) > 10 else "")
        return f"{'lines or rows' if known else 'examples'} {shown}"

    def _trained_tokens(self):
        trained = self.arrays["labels"] != IGNORED
        trained[self.offsets[:-1]] = False  # nothing predicts an example's first token
        return np.add.reduceat(trained, self.offsets[:-1], dtype=np.int64)

    def summary(self):
        """One readable line."""
        r = self.report
        trained = f" ({r['trained_tokens']:,} trained)" if "trained_tokens" in r else ""
        labels = f"; {r['labels']}" if "labels" in r else ""
        bad = f"; {r['bad_rows']:,} bad rows skipped, the first: {r['bad_rows_shown'][0]}" if r.get("bad_rows") else ""
        return (
            f"{r['examples']:,} examples, {r['tokens']:,} tokens{trained}, {r['mean_length']:.1f} on average, "
            f"{r['longest']:,} at most; {r['truncated']:,} truncated to {r['max_length']:,}, {r['dropped']:,} dropped"
            f"{bad}{labels}"
        )

    def save(self, folder):
        """Writes the arrays and the report into a folder."""
        for name, array in self.arrays.items():
            np.save(Path(folder) / f"{name}.npy", array)
        (Path(folder) / "report.json").write_text(json.dumps(self.report), encoding="utf-8")

    @classmethod
    def load(cls, folder):
        """The dataset in a folder; its arrays are mapped, not read."""
        arrays = {file.stem: np.asarray(np.load(file, mmap_mode="r")) for file in Path(folder).glob("*.npy")}
        arrays["offsets"] = np.array(arrays["offsets"])  # read at every access
        return cls(arrays, json.loads((Path(folder) / "report.json").read_text(encoding="utf-8")))
