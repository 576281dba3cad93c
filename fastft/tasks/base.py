"""What every task offers, and what they share."""

import contextlib
import itertools

import torch
import torch.distributed as dist
from transformers import AutoConfig

from fastft.data.build import build
from fastft.data.splits import open_splits
from fastft.data.tokens import longest_input

SMALLER_IS_BETTER = ("loss", "perplexity", "mse", "mae")


class BaseTask:
    """A task: how rows become examples, which head the model gets, its loss, its metrics and its predictions.

    A subclass sets `auto_model`, `peft_type`, `default_metric` and implements the methods that raise here.
    """

    auto_model = None
    peft_type = None
    default_metric = "loss"

    def __init__(self, args, reason):
        self.args = args
        self.reason = reason
        self.name = type(self).__module__.rsplit(".", 1)[-1]

    @classmethod
    def guess(cls, columns, args):
        """Why these columns suggest this task, or None."""
        raise NotImplementedError

    def encoder(self, source, tokenizer, max_length):
        """A frozen dataclass that turns a list of (where, row) into `fastft.data.build.Encoded`."""
        raise NotImplementedError

    def finisher(self, split):
        """For a split, a frozen dataclass that turns its `Encoded` into (labels array, more entries for the report)."""
        raise NotImplementedError

    def model_kwargs(self):
        """What the model's configuration must hold, known after `load_data` or `restore`."""
        return {}

    def loss(self, model, batch, num_items):
        """Scalar: the sum of the loss of each item (token or example) of the batch, divided by `num_items`."""
        raise NotImplementedError

    def evaluate(self, model, batches):
        """Metrics over all batches of all ranks, equal on every rank."""
        raise NotImplementedError

    def predict(self, model, tokenizer, rows, batch_size, **options):
        """Each row, in order, with its `prediction`."""
        raise NotImplementedError

    def restore(self, config):
        """Takes what the task needs from the configuration of a model that was trained before."""

    @property
    def metric_for_best_model(self):
        """Name of the metric that decides, without a prefix."""
        return (self.args.metric_for_best_model or self.default_metric).removeprefix("eval_")

    @property
    def greater_is_better(self):
        return self.metric_for_best_model not in SMALLER_IS_BETTER

    def load_data(self, tokenizer):
        """{"train": TokenDataset, "validation": ..., "test": ...}, those that the arguments give."""
        max_length = longest_input(self.args.max_length, tokenizer, self._config())
        limits = {"train": self.args.max_train_samples, "validation": self.args.max_eval_samples, "test": None}
        datasets = {}
        for split, source in open_splits(self.args).items():
            datasets[split] = build(
                source,
                self.encoder(source, tokenizer, max_length),
                self.finisher(split),
                limit=limits[split],
                workers=self.args.preprocessing_num_workers,
                cache_dir=self.args.cache_dir,
                on_bad_row=self.args.on_bad_row,
            )
            self.learn(datasets[split])
        return datasets

    def learn(self, dataset):
        """Takes from a split what the next ones need (the training split comes first)."""

    def _config(self):
        name = self.args.model_name_or_path
        if name is None:
            return None
        try:
            return AutoConfig.from_pretrained(name, trust_remote_code=self.args.trust_remote_code)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--model_name_or_path {name}: no configuration there: {str(error).splitlines()[0]}"
            ) from None


@contextlib.contextmanager
def evaluating(model):
    """No gradients, no dropout; the model's mode comes back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def sum_over_ranks(sums):
    """A float64 tensor summed over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()


def gather_over_ranks(value):
    """[value of rank 0, value of rank 1, ...] on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def windows(rows, size):
    """Lists of `size` consecutive (where, row): enough to sort by length, few enough to keep the first answer near."""
    numbered = ((f"row {number}", row) for number, row in enumerate(rows, 1))
    while window := list(itertools.islice(numbered, size)):
        yield window


def without(batch, *names):
    """The batch without some of its entries."""
    return {name: value for name, value in batch.items() if name not in names}
