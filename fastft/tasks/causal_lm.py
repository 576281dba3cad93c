"""Learning to write: instruction tuning on prompts and completions or conversations, and plain text.

Of a conversation the assistant's turns are trained (`--completion_only_loss false`: everything) and what exceeds
max_length is cut off. Plain text is trained whole: each document (a row, or in a .txt file what `<|endoftext|>` lines
separate) is cut in blocks of max_length tokens.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from fastft.data.build import Encoded
from fastft.data.columns import LABELS, DialogColumns, find_dialog_columns, match_dialog_columns, text_cell
from fastft.data.templates import Piece, chat_examples, plain_examples, prompt_pieces, text_examples, to_messages
from fastft.data.tokens import IGNORED, PieceEncoder, blocks, count_items, cut, longest_input
from fastft.patching import why_not_fused
from fastft.tasks.base import BaseTask, evaluating, sum_over_ranks, windows, without

LOGIT_ROWS = 2048  # positions whose logits are turned to fp32 at once in evaluation


class Task(BaseTask):
    auto_model = AutoModelForCausalLM
    peft_type = "CAUSAL_LM"

    @classmethod
    def guess(cls, columns, args):
        found = match_dialog_columns(columns, args)
        if found is None or args.label_column is not None or args.text_pair_column is not None:
            return None
        if found.text is None:
            names = [n for n in (found.messages, found.prompt, found.input, found.completion) if n in columns]
            return f"the columns {', '.join(names)} hold what to answer and the answer"
        is_labelled = any(column.strip().lower() in LABELS for column in columns)
        return None if is_labelled else f"the column {found.text} holds plain text and no column holds labels"

    def encoder(self, source, tokenizer, max_length):
        columns = find_dialog_columns(source.columns(), self.args, source.name)
        return Encoder(tokenizer, columns, max_length, self.args.completion_only_loss)

    def finisher(self, split):
        return TokenLabels()

    def loss(self, model, batch, num_items):
        """Cross-entropy of each trained token given those before it, summed and divided by num_items."""
        smoothing = self.args.label_smoothing_factor
        if not smoothing:
            return model(**batch, num_items_in_batch=num_items).loss
        if why_not_fused(model) is None:
            return model(**batch, num_items_in_batch=num_items, label_smoothing=smoothing).loss
        logits, labels = _trained(model, batch)
        return _cross_entropy(logits, labels, smoothing) / num_items

    def evaluate(self, model, batches):
        """loss: the mean over trained tokens; perplexity: its exponential; accuracy: how many were the likeliest."""
        loss, hits, count = 0, 0, 0
        fused = why_not_fused(model) is None
        with evaluating(model):
            for batch in batches:
                if fused:
                    output = model(**batch, num_items_in_batch=1, return_stats=True)
                    loss, hits = loss + output.loss.double(), hits + output.correct.sum()
                    count += int((batch["labels"][:, 1:] != IGNORED).sum())
                    continue
                logits, labels = _trained(model, batch)
                count += len(labels)
                for part, targets in zip(logits.split(LOGIT_ROWS), labels.split(LOGIT_ROWS), strict=True):
                    loss = loss + _cross_entropy(part, targets).double()
                    hits = hits + (part.argmax(-1) == targets).sum()
        loss, hits, count = sum_over_ranks(torch.stack([loss, hits.double(), loss.new_tensor(count)]))
        loss = loss / count
        return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf, "accuracy": hits / count}

    def predict(self, model, tokenizer, rows, batch_size, *, max_new_tokens=None, **generation):
        """Each row with the text that the model writes: the answer to its prompt or messages, or its `text` continued.

        max_new_tokens: 256 by default, or half of the model's positions where these are few. Further options go to
        `model.generate`; without any, the likeliest token is taken each time. Prompts of equal length are computed
        together, so that nothing is padded. A prompt too long for the model loses its beginning: "truncated": true.
        """
        limit = longest_input(10**9, tokenizer, model.config)
        max_new_tokens = max_new_tokens or min(256, limit // 2)
        if max_new_tokens >= limit:
            raise ValueError(f"--max_new_tokens {max_new_tokens}: must be below the model's {limit} positions")
        ends = model.generation_config.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        options = {"do_sample": False, "eos_token_id": sorted(ends) or None, "pad_token_id": pad, **generation}
        options["max_new_tokens"] = max_new_tokens
        columns = None
        for window in windows(rows, 32 * batch_size):
            columns = columns or find_dialog_columns(list(window[0][1]), self.args, "the file", need_completion=False)
            prompts = self._prompts(window, columns, tokenizer)
            texts = _generate(model, tokenizer, [p[-(limit - max_new_tokens) :] for p in prompts], batch_size, options)
            for (_, row), prompt, text in zip(window, prompts, texts, strict=True):
                cut_off = {"truncated": True} if len(prompt) > limit - max_new_tokens else {}
                yield {**row, "prediction": text, **cut_off}

    def _prompts(self, rows, columns, tokenizer):
        """Token ids to continue, an array per row."""
        if columns.text is not None:
            prompts = [[Piece(text_cell(row, columns.text, where), False)] for where, row in rows]
        else:
            dialogs = [(to_messages(row, columns, where, with_reply=False), where) for where, row in rows]
            prompts = [prompt_pieces(messages, tokenizer, columns.separator, where) for messages, where in dialogs]
        encode = PieceEncoder(tokenizer, begins=columns.text is not None or not tokenizer.chat_template)
        return [ids for ids, _ in encode(prompts)]


@dataclass(frozen=True)
class Encoder:
    """Rows -> token ids and labels, -100 where nothing is trained."""

    tokenizer: PreTrainedTokenizerBase
    columns: DialogColumns
    max_length: int
    completion_only: bool

    def __call__(self, rows):
        is_text = self.columns.text is not None
        encode = PieceEncoder(self.tokenizer, begins=is_text or not self.tokenizer.chat_template)
        result = Encoded()
        examples = [(where, example) for where, row in rows for example in self._examples(row, where)]
        encoded = encode([example for _, example in examples])
        for (where, _), (ids, labels) in zip(examples, encoded, strict=True):
            parts = (blocks if is_text else cut)(ids, labels, self.max_length)
            for part_ids, part_labels in parts:
                if not count_items(part_labels):
                    result.dropped += 1
                    continue
                result.truncated += not is_text and len(part_ids) < len(ids)
                result.input_ids.append(part_ids)
                result.labels.append(part_labels)
                result.wheres.append(where)
        return result

    def _examples(self, row, where):
        if self.columns.text is not None:
            return text_examples(text_cell(row, self.columns.text, where))
        messages = to_messages(row, self.columns, where)
        if self.tokenizer.chat_template:
            return chat_examples(messages, self.tokenizer, where, completion_only=self.completion_only)
        return plain_examples(messages, self.columns.separator, completion_only=self.completion_only)


@dataclass(frozen=True)
class TokenLabels:
    """All labels behind each other."""

    def __call__(self, encoded):
        return np.concatenate(encoded.labels), {"trained_tokens": sum(map(count_items, encoded.labels))}


def _trained(model, batch):
    """(logits [n, V], labels [n]) of the positions that are trained."""
    logits = model(**without(batch, "labels")).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    kept = labels != IGNORED
    return logits[kept], labels[kept]


def _cross_entropy(logits, labels, smoothing=0.0):
    """Summed; 0 with zero gradients where there is no position."""
    return F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)


def _generate(model, tokenizer, prompts, batch_size, options):
    """The texts that continue the prompts, in their order."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    texts = [None] * len(prompts)
    while order:
        length = len(prompts[order[0]])
        group = [i for i in order[:batch_size] if len(prompts[i]) == length]
        order = order[len(group) :]
        ids = torch.tensor(np.stack([prompts[i] for i in group]), dtype=torch.int64, device=model.device)
        with torch.no_grad():
            output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        for i, new in zip(group, output[:, length:], strict=True):
            texts[i] = tokenizer.decode(new, skip_special_tokens=True)
    return texts
