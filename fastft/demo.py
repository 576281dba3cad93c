"""The run without a model and a file: a small Llama, from scratch, learns to sort letters on command.

    ascending mnitwk   ->  ikmntw
    descending bnlou   ->  uonlb

It shows the whole road (files, tokenizer, training, evaluation before and after, a saved model) in about a minute on
two cores and downloads nothing. No prompt of the validation file is in the training file.
"""

import json
import random
import string
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

from fastft.arguments import Arguments

NEXT = (
    "That was the demonstration. Next, your own: fastft train --model_name_or_path FOLDER --train_file FILE "
    "(add --use_peft true for LoRA; recipes/ holds complete runs)"
)
COMMANDS = {"ascending": False, "descending": True}  # word -> is the order reversed
SHORTEST, LONGEST = 4, 8
TRAIN_ROWS, VALIDATION_ROWS = 6400, 256
BATCH = 64  # examples in an optimizer step: 100 steps to an epoch


def prepare(folder, seed):
    """Writes two JSONL files, a tokenizer and a Llama's configuration; the same bytes for the same seed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = make_rows(TRAIN_ROWS + VALIDATION_ROWS, seed)
    for name, part in (("train", rows[:TRAIN_ROWS]), ("validation", rows[TRAIN_ROWS:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    make_config(tokenizer).save_pretrained(folder)


def overrides(folder, args, world_size=1):
    """{argument: value} that turns `args` into the demo's run; what the user set stays as it is."""
    settings = {
        "per_device_train_batch_size": max(1, BATCH // (world_size * args.gradient_accumulation_steps)),
        "per_device_eval_batch_size": BATCH,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "adam_beta2": 0.98,
        "eval_on_start": True,
        "bf16": None if args.fp16 else False,  # so small a model gains nothing from half precision
    }
    untouched = Arguments()
    settings = {name: value for name, value in settings.items() if getattr(args, name) == getattr(untouched, name)}
    return settings | {
        "task": "causal_lm",
        "model_name_or_path": str(folder),
        "train_file": str(Path(folder) / "train.jsonl"),
        "validation_file": str(Path(folder) / "validation.jsonl"),
    }


def make_rows(count, seed):
    """`count` rows with `prompt` and `completion`, no prompt twice."""
    rng = random.Random(seed)
    completions = {}
    while len(completions) < count:
        command = rng.choice(list(COMMANDS))
        letters = rng.sample(string.ascii_lowercase, rng.randint(SHORTEST, LONGEST))
        completions[f"{command} {''.join(letters)}"] = "".join(sorted(letters, reverse=COMMANDS[command]))
    return [{"prompt": prompt, "completion": completion} for prompt, completion in completions.items()]


def make_tokenizer():
    """One token for each command, letter, space and newline; text comes back from the tokens unchanged."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokens = [*special.values(), "\n", " ", *COMMANDS, *string.ascii_lowercase]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*COMMANDS, r"[\s\S]"])), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **special)


def make_config(tokenizer):
    """A Llama of 0.4 million parameters."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
