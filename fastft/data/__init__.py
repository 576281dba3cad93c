"""Files -> examples -> packed batches.

- files, hub, splits: a file or hub dataset as a stream of rows
- columns, labels: which column means what
- templates: a row as pieces of text, trained or context
- tokens: pieces as token ids and labels
- build: the whole file, tokenised in parallel and kept on the disk
- token_dataset: the result, flat arrays
- order: which examples meet in a step
- packing: examples as one batch of tensors
"""

from fastft.data.files import read_rows
from fastft.data.order import StepPlan, eval_batches
from fastft.data.packing import Collator
from fastft.data.token_dataset import TokenDataset

__all__ = ["Collator", "StepPlan", "TokenDataset", "eval_batches", "read_rows"]
