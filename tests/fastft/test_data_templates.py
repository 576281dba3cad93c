"""Rows become exactly these tokens, and exactly the completions are trained. The tokenizer's tokens are characters."""

import copy

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fastft.arguments import Arguments
from fastft.data.tokens import IGNORED, blocks, count_items
from fastft.tasks import get_task
from fastft.tasks.causal_lm import Encoder, find_dialog_columns

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETFUL = (  # drops what the assistant thought in all turns but the last, as reasoning models' templates do
    "{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.content if loop.last else m.content.split('=')[-1] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


def make_tokenizer(chat_template=None):
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    characters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 =?\n"
    vocabulary = {token: i for i, token in enumerate([*special, *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=chat_template, model_max_length=10**6
    )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def encode(tokenizer, rows, max_length=1000, completion_only=True, **named):
    columns = find_dialog_columns(list(rows[0]), Arguments(**named), "f")
    return Encoder(tokenizer, columns, max_length, completion_only)([(f"f:{i}", row) for i, row in enumerate(rows, 1)])


def readable(tokenizer, encoded, example=0):
    """(whole text, text with a dot for each token that is not trained)."""
    ids, labels = encoded.input_ids[example], encoded.labels[example]
    assert ids.dtype == labels.dtype == np.int32 and len(ids) == len(labels)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
    marked = ["." if label == IGNORED else token for token, label in zip(tokens, labels, strict=True)]
    return "".join(tokens), "".join(marked)


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yo=Oh"}]
TURNS += [{"role": "user", "content": "So"}, {"role": "assistant", "content": "mm=Ok"}]


@pytest.mark.parametrize(
    ("row", "text", "trained"),
    [
        ({"prompt": "Hi", "completion": "Oh"}, "<s>Hi\nOh</s>", "....Oh</s>"),
        ({"question": "Hi", "answer": "Oh"}, "<s>Hi\nOh</s>", "....Oh</s>"),
        ({"instruction": "Do", "input": "it", "output": "Oh"}, "<s>Do\n\nit\n\nOh</s>", "." * 9 + "Oh</s>"),
        ({"instruction": "Do", "input": "", "output": "Oh"}, "<s>Do\n\nOh</s>", "." * 5 + "Oh</s>"),
        ({"instruction": "Do", "input": None, "output": "Oh"}, "<s>Do\n\nOh</s>", "." * 5 + "Oh</s>"),
        ({"text": "Hi\nOh"}, "<s>Hi\nOh</s>", ".Hi\nOh</s>"),
        ({"messages": TURNS}, "<s>Hi\nyo=Oh</s>So\nmm=Ok</s>", "....yo=Oh</s>...mm=Ok</s>"),
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}],
                "chosen": {"from": "gpt", "value": "Oh"},
                "rejected": "No",
            },
            "<s>Hi\nOh</s>",
            "....Oh</s>",
        ),
        ({"prompt": [{"role": "user", "content": "Hi"}], "completion": "Oh"}, "<s>Hi\nOh</s>", "....Oh</s>"),
    ],
)
def test_plain_templates(tokenizer, row, text, trained):
    assert readable(tokenizer, encode(tokenizer, [row])) == (text, trained)


@pytest.mark.parametrize(
    ("row", "text", "trained"),
    [
        ({"prompt": "Hi", "completion": "Oh"}, "<|user|>Hi<|end|><|assistant|>Oh<|end|>", ".....Oh<|end|>"),
        (
            {"instruction": "Do", "input": "it", "output": "Oh"},
            "<|user|>Do\n\nit<|end|><|assistant|>Oh<|end|>",
            "." * 9 + "Oh<|end|>",
        ),
        (
            {"messages": [{"role": "system", "content": "S"}, *TURNS]},
            "<|system|>S<|end|><|user|>Hi<|end|><|assistant|>yo=Oh<|end|><|user|>So<|end|><|assistant|>mm=Ok<|end|>",
            "." * 8 + "yo=Oh<|end|>" + "." * 5 + "mm=Ok<|end|>",
        ),
        ({"text": "Hi"}, "<s>Hi</s>", ".Hi</s>"),
    ],
)
def test_chat_template(row, text, trained):
    tokenizer = make_tokenizer(CHATML)
    assert readable(tokenizer, encode(tokenizer, [row])) == (text, trained)


def test_template_that_rewrites_history_gives_an_example_per_turn():
    tokenizer = make_tokenizer(FORGETFUL)
    encoded = encode(tokenizer, [{"messages": TURNS}])
    assert len(encoded.input_ids) == 2
    assert readable(tokenizer, encoded, 0) == ("<|user|>Hi<|end|><|assistant|>yo=Oh<|end|>", ".....yo=Oh<|end|>")
    whole = "<|user|>Hi<|end|><|assistant|>Oh<|end|><|user|>So<|end|><|assistant|>mm=Ok<|end|>"
    assert readable(tokenizer, encoded, 1) == (whole, "." * 13 + "mm=Ok<|end|>")


def test_generation_prompt_that_opens_with_more_than_the_answer():
    tokenizer = make_tokenizer(CHATML.replace("<|assistant|>{% endif %}", "<|assistant|>think\n{% endif %}"))
    _, trained = readable(tokenizer, encode(tokenizer, [{"prompt": "Hi", "completion": "Oh"}]))
    assert trained == ".....Oh<|end|>"


def test_slow_tokenizers_are_cut_at_the_ranges(monkeypatch):
    tokenizer = make_tokenizer(CHATML)
    row = {"messages": TURNS}
    expected = readable(tokenizer, encode(tokenizer, [row]))
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert readable(tokenizer, encode(tokenizer, [row])) == expected


@pytest.mark.parametrize("template", [None, CHATML])
def test_all_tokens_are_trained_when_asked(template):
    tokenizer = make_tokenizer(template)
    encoded = encode(tokenizer, [{"messages": TURNS}], completion_only=False)
    first = 1 if template is None else 0  # the begin token stands before everything that could predict it
    assert (encoded.labels[0][first:] == encoded.input_ids[0][first:]).all()


@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize(
    "row",
    [{"messages": TURNS}, {"prompt": "Hi", "completion": "Oh"}, {"instruction": "Do", "input": "it", "output": "Oh"}],
)
def test_a_model_is_prompted_with_what_it_was_trained_after(template, row):
    tokenizer = make_tokenizer(template)
    encoded = encode(tokenizer, [row])
    ids, labels = encoded.input_ids[0], encoded.labels[0]
    answer = 1 + max(i for i in range(len(ids)) if labels[i] == IGNORED)
    columns = find_dialog_columns(list(row), Arguments(), "f", need_completion=False)
    (prompt,) = get_task(Arguments(task="causal_lm"))._prompts([("f:1", row)], columns, tokenizer)
    assert prompt.tolist() == ids[:answer].tolist()


def test_truncated_and_dropped_are_counted(tokenizer):
    rows = [
        {"prompt": "Hi", "completion": "Oh"},
        {"prompt": "Hi", "completion": "Ohhh"},
        {"prompt": "Hiiiiii", "completion": "O"},
    ]
    encoded = encode(tokenizer, rows, max_length=7)
    assert (encoded.truncated, encoded.dropped, len(encoded.input_ids)) == (1, 1, 2)
    assert readable(tokenizer, encoded, 1) == ("<s>Hi\nOhh", "....Ohh")
    nothing = encode(tokenizer, [{"text": " "}, {"messages": TURNS[:1]} | {"text": "a"}], text_column="text")
    assert (nothing.dropped, len(nothing.input_ids)) == (1, 1)


@pytest.mark.parametrize("length", range(2, 12))
def test_blocks_predict_every_token_once(length):
    ids = np.arange(length, dtype=np.int32)
    parts = blocks(ids, ids, 4)
    assert all(2 <= len(part) <= 4 for part, _ in parts)
    assert [token for _, labels in parts for token in labels[1:]] == list(range(1, length))


def test_long_documents_are_tokenised_in_parts(tokenizer, monkeypatch):
    text = "".join(f"line {i}\n" for i in range(300))
    whole = encode(tokenizer, [{"text": text}], max_length=10**6)
    monkeypatch.setattr("fastft.data.tokens.PIECE_CHARACTERS", 100)
    monkeypatch.setattr("fastft.data.tokens.BATCH_CHARACTERS", 250)
    parts = encode(tokenizer, [{"text": text}], max_length=10**6)
    assert (parts.input_ids[0] == whole.input_ids[0]).all() and (parts.labels[0] == whole.labels[0]).all()


def test_count_items_ignores_the_first_label():
    assert count_items(np.array([5, 5, IGNORED, 5])) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "Hi"}, r"f:1: column 'messages' must hold a list of messages, not 'Hi'$"),
        ({"messages": []}, r"f:1: column 'messages' must hold a list of messages, not \[\]$"),
        ({"messages": ["Hi"]}, r"f:1: message 1 of 'messages' must be an object, not 'Hi'$"),
        (
            {"messages": [{"role": "poet", "content": "a"}]},
            r"f:1: message 1 of 'messages' has role 'poet'; must be one of user, ",
        ),
        ({"messages": [{"role": "user"}]}, r"f:1: message 1 of 'messages' has content None; must be text$"),
        ({"prompt": "Hi", "completion": None}, r"f:1: column 'completion' is null$"),
        (
            {"prompt": "Hi", "completion": "\ud83d"},
            r"f:1: column 'completion' holds '\\ud83d', half of a character; repair",
        ),
        ({"text": "a \udc00"}, r"f:1: column 'text' holds '\\udc00', half of a character; repair or remove it$"),
    ],
)
def test_bad_conversation(tokenizer, row, message):
    with pytest.raises(ValueError, match=message):
        encode(tokenizer, [row])


def test_conversation_that_the_template_refuses():
    row = {"messages": [{"role": "system", "content": "S"}, *TURNS]}
    with pytest.raises(
        ValueError, match="f:1: the tokenizer's chat template refuses this conversation: no system role"
    ):
        encode(make_tokenizer(REFUSES_SYSTEM), [row])


def test_real_tokenizer_prompts_as_it_was_trained(shared):
    """In training the prompt has the tokens that it has alone: a model is prompted with what it has seen."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260K")
    encoded = encode(tokenizer, [{"prompt": "Tell me of a cat.", "completion": "Once upon a time"}])
    prompt = tokenizer("Tell me of a cat.\n")["input_ids"]
    answer = tokenizer("Once upon a time", add_special_tokens=False)["input_ids"]
    assert encoded.input_ids[0].tolist() == [*prompt, *answer, tokenizer.eos_token_id]
    assert encoded.labels[0].tolist() == [IGNORED] * len(prompt) + [*answer, tokenizer.eos_token_id]
    assert prompt[0] == tokenizer.bos_token_id
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    encoded = encode(chat, [{"prompt": "A cat", "completion": "Once"}])
    assert (
        encoded.input_ids[0].tolist()
        == chat("user: A cat</s>\nassistant: Once</s>\n", add_special_tokens=False)["input_ids"]
    )
    trained = encoded.labels[0][encoded.labels[0] != IGNORED]
    assert chat.decode(trained).replace(" ", "") == "assistant:Once</s>\n"  # the template has no generation prompt
