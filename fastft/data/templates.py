"""Rows -> pieces of text, each marked as trained or as context.

A row is plain text or a conversation. A conversation is rendered by the tokenizer's chat template where it has one,
and otherwise as turns that a separator ends, the assistant's by the end token: `prompt`, newline, `completion`, end
token, or for instructions with blank lines between instruction, input and output.
"""

import os
from dataclasses import dataclass

import jinja2

from fastft.data.columns import cell, check_unicode, text_cell
from fastft.data.errors import DataError, brief

ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "system": "system",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """Text that is tokenised on its own. `trained`: all of it, nothing, or the (start, end) character ranges that are.
    `ends`: the end token follows, trained like the piece.
    """

    text: str
    trained: bool | tuple[tuple[int, int], ...]
    ends: bool = False


def to_messages(row, columns, where, *, with_reply=True):
    """Conversation of a row, [{"role": ..., "content": ...}, ...]; without the reply it ends before the answer."""
    if columns.messages is not None:
        messages = _messages(cell(row, columns.messages, where), where, columns.messages)
        if not with_reply and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
    else:
        messages = _turns(cell(row, columns.prompt, where), "user", where, columns.prompt)
        extra = row.get(columns.input) if columns.input is not None else None
        if extra:
            question = messages[-1]["content"] + columns.separator + text_cell(row, columns.input, where)
            messages = [*messages[:-1], {"role": "user", "content": question}]
    if with_reply and columns.completion is not None:
        messages = messages + _turns(cell(row, columns.completion, where), "assistant", where, columns.completion)
    return messages


def chat_examples(messages, tokenizer, where, *, completion_only=True):
    """Examples (lists of pieces) of a conversation under the chat template; all the assistant's turns are trained.

    A turn's text is what the template adds after its generation prompt. Most templates prolong a conversation without
    rewriting its beginning, which makes one example. Some rewrite it (they drop the reasoning of earlier turns): then
    each turn becomes its own example, rendered as the model will see it.
    """
    full = _render(tokenizer, messages, where)
    if not completion_only:
        return [[Piece(full, True)]]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
    ends = [full if i == len(messages) - 1 else _render(tokenizer, messages[: i + 1], where) for i in turns]
    prompts = [_render(tokenizer, messages[:i], where, prompt=True) for i in turns]
    spans = [(_common_length(prompt, end), len(end)) for prompt, end in zip(prompts, ends, strict=True)]
    if all(full.startswith(end) for end in ends):
        return [[Piece(full, tuple(spans))]]
    return [[Piece(end, (span,))] for end, span in zip(ends, spans, strict=True)]


def plain_examples(messages, separator, *, completion_only=True):
    """The one example (a list of pieces) of a conversation without a chat template."""
    pieces = _plain_pieces(messages, separator, completion_only)
    if pieces and not pieces[-1].trained:  # a question that nobody answers
        pieces = pieces[:-1]
    return [pieces]


def text_examples(text):
    """The one example of a document: all of it is trained, and the end token closes it. Of a blank one nothing is."""
    return [[Piece(text, True, ends=True)] if text.strip() else []]


def prompt_pieces(messages, tokenizer, separator, where):
    """What the model is to continue: the conversation up to the place where its answer begins, as in training."""
    if tokenizer.chat_template:
        return [Piece(_render(tokenizer, messages, where, prompt=True), False)]
    return _plain_pieces(messages, separator, completion_only=True)


def _plain_pieces(messages, separator, completion_only):
    pieces, context = [], ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i == 0:
            context += message["content"] + separator
            continue
        # The context is tokenised by itself, as it is when the model is prompted with it.
        pieces += [Piece(context, not completion_only), Piece(message["content"], True, ends=True)]
        context = ""
    return [*pieces, Piece(context, not completion_only)] if context else pieces


def _turns(value, role, where, column):
    """Messages from a cell that holds a text, one message or a list of messages."""
    if isinstance(value, str):
        check_unicode(value, f"{where}: column {column!r}")
        return [{"role": role, "content": value}]
    return _messages(value if isinstance(value, list) else [value], where, column)


def _messages(value, where, column):
    """Checked messages from `role`/`content` or ShareGPT's `from`/`value`."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: column {column!r} must hold a list of messages, not {brief(value)}")
    messages = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise DataError(f"{where}: message {number} of {column!r} must be an object, not {brief(message)}")
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise DataError(
                f"{where}: message {number} of {column!r} has role {brief(role)}; must be one of {', '.join(ROLES)}"
            )
        if not isinstance(content, str):
            raise DataError(f"{where}: message {number} of {column!r} has content {brief(content)}; must be text")
        check_unicode(content, f"{where}: message {number} of {column!r}")
        messages.append({"role": ROLES[role], "content": content})
    return messages


def _render(tokenizer, messages, where, *, prompt=False):
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except jinja2.TemplateError as error:
        raise DataError(f"{where}: the tokenizer's chat template refuses this conversation: {error}") from None


def _common_length(prompt, text):
    """Characters of `text` that the generation prompt gives; it may open with more than the answer does."""
    return len(prompt) if text.startswith(prompt) else len(os.path.commonprefix([prompt, text]))
