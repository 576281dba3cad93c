"""The generated task: its rows, its tokenizer, and that a small Llama learns it."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from fastft import demo
from fastft.arguments import Arguments


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo")
    demo.prepare(path, seed=42)
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    demo.prepare(tmp_path, seed=42)
    assert {p.name for p in folder.iterdir()} == {p.name for p in tmp_path.iterdir()}
    assert all(p.read_bytes() == (tmp_path / p.name).read_bytes() for p in folder.iterdir())
    assert demo.make_rows(100, seed=1) != demo.make_rows(100, seed=2)


def test_rows_are_right_and_validation_is_new(folder):
    train, validation = read(folder / "train.jsonl"), read(folder / "validation.jsonl")
    assert (len(train), len(validation)) == (demo.TRAIN_ROWS, demo.VALIDATION_ROWS)
    prompts = [row["prompt"] for row in train + validation]
    assert len(set(prompts)) == len(prompts)
    for row in train + validation:
        command, letters = row["prompt"].split()
        assert row["completion"] == "".join(sorted(letters, reverse=command == "descending"))


def test_text_comes_back_from_its_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row in read(folder / "validation.jsonl"):
        text = f"{row['prompt']}\n{row['completion']}"
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert len(ids) == 4 + len(row["prompt"].split()[1]) + len(row["completion"])  # a command is one token
    assert AutoConfig.from_pretrained(folder).vocab_size == len(tokenizer)


def test_what_the_user_sets_stays(folder):
    args = Arguments(learning_rate=1e-4, max_steps=7, output_dir="here")
    changed = demo.overrides(folder, args, world_size=4)
    assert not {"learning_rate", "max_steps", "output_dir"} & set(changed)
    assert changed["per_device_train_batch_size"] == demo.BATCH // 4
    assert changed["task"] == "causal_lm" and changed["eval_on_start"]
    assert demo.overrides(folder, Arguments(fp16=True)).get("bf16") is None
    assert "bf16" not in demo.overrides(folder, Arguments(bf16=True))


def test_a_small_llama_learns_it():
    """The whole run is 300 steps of 64 rows and ends with a loss below 0.01; 40 steps already show the way down."""
    rows, tokenizer = demo.make_rows(40 * demo.BATCH, seed=0), demo.make_tokenizer()
    model = LlamaForCausalLM(demo.make_config(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    losses = []
    for start in range(0, len(rows), demo.BATCH):
        texts = [f"{row['prompt']}\n{row['completion']}</s>" for row in rows[start : start + demo.BATCH]]
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt", return_token_type_ids=False)
        answered = (batch.input_ids == tokenizer.convert_tokens_to_ids("\n")).cumsum(1).bool()
        answered[:, 1:] &= answered[:, :-1].clone()  # the newline itself belongs to the prompt
        answered[:, 0] = False
        labels = batch.input_ids.masked_fill(~answered | (batch.attention_mask == 0), -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 3.4 and losses[-1] < losses[0] / 2, losses
