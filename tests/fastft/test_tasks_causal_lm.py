"""Loss, metrics and generated text of causal_lm, against plain loops over single examples."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput

from fastft.arguments import Arguments
from fastft.data import Collator, eval_batches
from fastft.tasks import get_task

ROWS = ["ab=ba", "abc=cba", "a=a", "hello=olleh", "xy=yx"]


class Bigram(torch.nn.Module):
    """A model that takes packed and padded batches alike, because a token's logits depend on that token alone."""

    def __init__(self, vocabulary):
        super().__init__()
        self.table = torch.nn.Embedding(vocabulary, vocabulary)

    def forward(self, input_ids, labels=None, num_items_in_batch=None, **kwargs):
        logits = self.table(input_ids)
        if labels is None:
            return CausalLMOutput(logits=logits)
        loss = ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch)
        return CausalLMOutput(loss=loss, logits=logits)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def setup(tmp_path, tokenizer):
    """(task, dataset, model) on the rows above; arguments may be given."""
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\n" + "\n".join(row.replace("=", "=,") for row in ROWS))

    def make(**args):
        task = get_task(Arguments(train_file=str(path), cache_dir=str(tmp_path), **args))
        return task, task.load_data(tokenizer)["train"], Bigram(len(tokenizer))

    return make


def logits_and_labels(model, ds):
    """Per example, the logits of the trained positions and what they should predict."""
    for example in ds.take(range(len(ds))):
        labels = torch.tensor(example["labels"][1:].tolist())
        logits = model(torch.tensor(example["input_ids"].tolist())[None]).logits[0, :-1]
        yield logits[labels != -100], labels[labels != -100]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_sum_over_trained_tokens(setup, tokenizer, packing, smoothing):
    task, ds, model = setup(label_smoothing_factor=smoothing)
    batch = Collator(tokenizer, None, packing=packing)(ds.take(range(len(ds))))
    loss = task.loss(model, batch, 7.5)
    expected = sum(
        F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        for logits, labels in logits_and_labels(model, ds)
    )
    torch.testing.assert_close(loss, expected / 7.5, rtol=1e-6, atol=0)


def test_micro_batches_add_up(setup, tokenizer):
    """The losses of the parts of a batch sum to the loss of the whole, with the same divisor: so do their gradients."""
    task, ds, model = setup()
    collate = Collator(tokenizer, None, packing=True)
    total = ds.num_items.sum()
    whole = torch.autograd.grad(task.loss(model, collate(ds.take(range(5))), total), model.parameters())[0]
    parts = [task.loss(model, collate(ds.take(part)), total) for part in ([0, 3], [1], [2, 4])]
    torch.testing.assert_close(torch.autograd.grad(sum(parts), model.parameters())[0], whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ignored_batch_gives_zero_and_zero_gradients(setup, tokenizer, packing, smoothing):
    task, ds, model = setup(label_smoothing_factor=smoothing)
    collate = Collator(tokenizer, None, packing=packing)
    loss = task.loss(model, collate([collate.ignored(ds[0])]), 3.0)
    loss.backward()
    assert loss.item() == 0.0
    assert (model.table.weight.grad == 0).all()


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation(setup, tokenizer, packing, monkeypatch):
    monkeypatch.setattr("fastft.tasks.causal_lm.LOGIT_ROWS", 3)
    task, ds, model = setup(label_smoothing_factor=0.1)  # which training alone uses
    metrics = task.evaluate(model, eval_batches(ds, Collator(tokenizer, None, packing=packing), 2, 0, 1))
    pairs = list(logits_and_labels(model, ds))
    logits, labels = torch.cat([l for l, _ in pairs]), torch.cat([l for _, l in pairs])
    assert metrics["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert metrics["accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    assert model.training and len(labels) == ds.num_items.sum()


def test_evaluation_without_dropout_and_gradients(setup, tokenizer):
    task, ds, model = setup()
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append((module.training, torch.is_grad_enabled())))
    task.evaluate(model, [Collator(tokenizer, None, packing=True)(ds.take([0]))])
    assert seen == [(False, False)] and model.training


def test_ignored_examples_do_not_count_in_evaluation(setup, tokenizer):
    task, ds, model = setup()
    collate = Collator(tokenizer, None, packing=False)
    batch, ignored = collate(ds.take([0, 1])), collate([collate.ignored(ds[2])])
    assert task.evaluate(model, [batch, ignored]) == task.evaluate(model, [batch])


def test_infinite_perplexity_is_not_an_error(setup, tokenizer):
    task, ds, model = setup()
    model.table.weight.data.mul_(1e4)
    metrics = task.evaluate(model, [Collator(tokenizer, None, packing=True)(ds.take([0]))])
    assert metrics["perplexity"] == math.inf


def test_real_model_on_real_stories(shared, tmp_path):
    """The mean loss over the five stories, as a loop over the texts gives it, in one pass over a padded batch."""
    folder = shared / "models/stories260K"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    stories = shared / "data/text/tinystories_sample.txt"
    task = get_task(
        Arguments(
            model_name_or_path=str(folder), validation_file=str(stories), task="causal_lm", cache_dir=str(tmp_path)
        )
    )
    ds = task.load_data(tokenizer)["validation"]
    metrics = task.evaluate(model, eval_batches(ds, Collator(tokenizer, model.config, packing=False), 5, 0, 1))
    losses, ends, count = 0.0, 0.0, 0
    for story in filter(str.strip, stories.read_text(encoding="utf-8").split("<|endoftext|>")):
        ids = tokenizer(story.strip())["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        losses += F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum").item()
        ends += F.cross_entropy(logits[-1], torch.tensor(tokenizer.eos_token_id)).item()
        count += len(ids) - 1
    assert losses / count == pytest.approx(1.2664, abs=1e-4)
    assert metrics["loss"] == pytest.approx((losses + ends) / (count + 5), rel=1e-5)
    assert metrics["accuracy"] > 0.5


def test_predictions_are_those_of_single_prompts(tiny_llama, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    task = get_task(Arguments(task="causal_lm"))
    rows = [{"id": i, "prompt": "ab" * (1 + i % 3) + "="} for i in range(7)]
    answers = list(task.predict(model, tokenizer, iter(rows), 2, max_new_tokens=5))
    assert [{k: v for k, v in answer.items() if k != "prediction"} for answer in answers] == rows
    for row, answer in zip(rows, answers, strict=True):
        ids = tokenizer(row["prompt"] + "\n", return_tensors="pt")["input_ids"]
        new = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert answer["prediction"] == tokenizer.decode(new, skip_special_tokens=True)


def test_prediction_continues_text_and_real_model_writes_a_story(shared):
    folder = shared / "models/stories260K"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    task = get_task(Arguments(task="causal_lm", model_name_or_path=str(folder)))
    (answer,) = task.predict(model, tokenizer, [{"text": "Once upon a time, there was a"}], 4, max_new_tokens=10)
    assert answer["prediction"].startswith("little girl named Lily.")


def test_prompts_too_long_for_the_model_lose_their_beginning(tiny_llama, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    task = get_task(Arguments(task="causal_lm"))
    long, short = task.predict(model, tokenizer, [{"prompt": "a" * 500}, {"prompt": "a"}], 2, max_new_tokens=6)
    assert long["truncated"] and "truncated" not in short
    with pytest.raises(ValueError, match="--max_new_tokens 256: must be below the model's 256 positions"):
        list(task.predict(model, tokenizer, [{"prompt": "a"}], 2, max_new_tokens=256))


def test_rows_without_a_prompt(tiny_llama, tokenizer):
    task = get_task(Arguments(task="causal_lm"))
    with pytest.raises(ValueError, match="the file: no column with the prompt or text .* it has id"):
        list(task.predict(AutoModelForCausalLM.from_pretrained(tiny_llama), tokenizer, [{"id": 1}], 2))
