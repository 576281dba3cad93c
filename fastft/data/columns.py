"""Which column means what: found by its usual name, or named by an argument.

Two layouts: `TextColumns` (a text, perhaps its pair, and a label) and `DialogColumns` (something to answer and the
answer, or plain text to continue). `find_text_columns` and `find_dialog_columns` raise a ValueError that lists the
columns that are there.
"""

from dataclasses import dataclass

from fastft.data.errors import DataError, brief

PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text1", "text2"),
    ("text", "text_pair"), ("question", "sentence"),
)  # fmt: skip
TEXTS = ("text", "sentence")
LABELS = ("label", "labels", "category", "target", "class", "score")
PROMPTS = ("instruction", "prompt", "question")
INPUT = "input"
COMPLETIONS = ("completion", "response", "output", "answer", "chosen")
MESSAGES = ("messages", "conversations", "conversation")

ARGUMENTS = ("text_column", "text_pair_column", "label_column", "prompt_column", "completion_column")

USUAL = {*sum(PAIRS, ()), *TEXTS, *LABELS, *PROMPTS, INPUT, *COMPLETIONS, *MESSAGES}
# Names that nobody uses as a label or as a whole text: one of them makes a first line a header.
STRONG = {"text", "sentence", "label", "labels", "category", "prompt", "instruction", *MESSAGES}


@dataclass(frozen=True)
class TextColumns:
    """Columns of a row to classify or score."""

    text: str
    pair: str | None
    label: str | None


@dataclass(frozen=True)
class DialogColumns:
    """Columns of a row to learn to write. One of three kinds: plain `text`; `messages` (and perhaps the reply,
    `completion`); or a `prompt`, perhaps with its `input`, and a `completion` (None when only prompting). `separator`
    joins them where the tokenizer has no chat template.
    """

    text: str | None = None
    messages: str | None = None
    prompt: str | None = None
    input: str | None = None
    completion: str | None = None
    separator: str = "\n"


def match_text_columns(columns, args):
    """TextColumns among `columns`, perhaps without a label; None where there is no text."""
    text, pair = args.text_column, args.text_pair_column
    if text is None:
        text, pair = _usual_text(columns, pair)
    return TextColumns(text, pair, args.label_column or _usual(columns, LABELS)) if text else None


def match_dialog_columns(columns, args, *, need_completion=True):
    """DialogColumns among `columns`, or None: what arguments name, else messages, else a prompt, else plain text."""
    if args.prompt_column is None and args.text_column is not None:
        return DialogColumns(text=args.text_column)
    messages = _usual(columns, MESSAGES)
    if args.prompt_column is None and messages is not None:
        return DialogColumns(messages=messages, completion=args.completion_column or _usual(columns, ("chosen",)))
    prompt = args.prompt_column or _usual(columns, PROMPTS)
    completion = args.completion_column or _usual(columns, COMPLETIONS)
    if prompt is not None and (completion is not None or not need_completion):
        if prompt.lower() != "instruction":
            return DialogColumns(prompt=prompt, completion=completion)
        input = _usual(columns, (INPUT,)) or INPUT  # optional, so the row that told the columns may lack it
        return DialogColumns(prompt=prompt, input=input, completion=completion, separator="\n\n")
    text = _usual(columns, TEXTS)
    wants_dialog = args.prompt_column is not None or args.completion_column is not None
    return DialogColumns(text=text) if text is not None and not wants_dialog else None


def find_text_columns(columns, args, where, *, need_label=True):
    """TextColumns among `columns`; ValueError where there are none. where: the file's name, for the message."""
    check_named(columns, args, where, except_for=() if need_label else ("label_column",))
    found = match_text_columns(columns, args)
    if found is None:
        raise _missing("text", where, columns, [*TEXTS, "sentence1 and sentence2"], "--text_column")
    if found.label is None and need_label:
        raise _missing("label", where, columns, LABELS, "--label_column")
    return found


def find_dialog_columns(columns, args, where, *, need_completion=True):
    """DialogColumns among `columns`; ValueError where there are none. where: the file's name, for the message."""
    check_named(columns, args, where, except_for=() if need_completion else ("completion_column",))
    found = match_dialog_columns(columns, args, need_completion=need_completion)
    if found is None and (args.prompt_column or _usual(columns, PROMPTS)):
        raise _missing("completion", where, columns, COMPLETIONS, "--completion_column")
    if found is None:
        raise _missing("prompt or text", where, columns, [*PROMPTS, *MESSAGES[:2], *TEXTS], "--prompt_column")
    return found


def check_named(columns, args, where, except_for=()):
    """ValueError for a column that an argument names and that is not there."""
    for argument in ARGUMENTS:
        name = getattr(args, argument)
        if name is not None and name not in columns and argument not in except_for:
            raise DataError(f"--{argument} {name}: {where} has no such column; it has {', '.join(columns)}")


def named_columns(args):
    """The columns that arguments name."""
    return tuple(getattr(args, argument) for argument in ARGUMENTS if getattr(args, argument) is not None)


def cell(row, column, where):
    """The value of a column in a row; ValueError where the row has no such column or nothing in it."""
    value = row.get(column)
    if value is None:
        state = "is null" if column in row else f"is missing; this row has {', '.join(row) or 'no columns'}"
        raise DataError(f"{where}: column {column!r} {state}")
    return value


def text_cell(row, column, where):
    """The text of a column in a row."""
    value = cell(row, column, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: column {column!r} must hold text, not {brief(value)} ({type(value).__name__})")
    check_unicode(value, f"{where}: column {column!r}")
    return value


def check_unicode(text, what):
    """ValueError for text that JSON can hold and no tokenizer reads: half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} holds {text[error.start]!a}, half of a character; repair or remove it") from None


def looks_like_header(cells, named):
    """Whether the first line of a table names its columns. It does when an argument names columns at all."""
    names = [cell.strip().lower() for cell in cells]
    usual = [name for name in names if name in USUAL]
    return bool(named) or bool(STRONG & set(names)) or len(usual) >= 2 or names[0] in USUAL


def headerless_names(count):
    """Names of the columns of a table without a header, by their number; None where it tells nothing."""
    return {1: ["text"], 2: ["text", "label"], 3: ["sentence1", "sentence2", "label"]}.get(count)


def unlike_a_header(first, others):
    """Why a first line that names no known column cannot be a row like the others either, or None.

    Taking a header for a row would silently add a class, taking a text for a label thousands of them.
    """
    labels = [cells[-1] for cells in others if cells]
    if len(first) < 2 or len(labels) < 3:
        return None
    if not _is_number(first[-1]) and all(_is_number(label) for label in labels):
        return f"the other lines end in a number, this one in {first[-1]!r}"
    if _is_number(first[-1]):
        return None
    distinct = len(set(labels))
    if len(labels) >= 20 and distinct > len(labels) / 2:
        return f"the last column holds {distinct} values in {len(labels)} lines, too many for a label"
    if first[-1] not in labels and distinct <= len(labels) / 2:
        return f"the label {first[-1]!r} occurs in no other line"
    return None


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def _usual(columns, names):
    """The column whose name, in any case, comes first in `names`."""
    lower = {column.strip().lower(): column for column in reversed(columns)}
    return next((lower[name] for name in names if name in lower), None)


def _usual_text(columns, pair):
    for names in PAIRS:
        found = [_usual(columns, (name,)) for name in names]
        if pair is None and all(found):
            return tuple(found)
    return _usual(columns, TEXTS), pair


def _missing(what, where, columns, names, argument):
    return DataError(
        f"{where}: no column with the {what} ({', '.join(names)}, or named by {argument}); it has {', '.join(columns)}"
    )
