"""What is said of data that cannot be used: one readable line, whatever the data holds."""

import reprlib

LONGEST = 1000  # characters of a message

_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxdict, _short.maxtuple = 3, 6, 6, 6
_short.maxstring = _short.maxother = _short.maxlong = 60


class DataError(ValueError):
    """Data that cannot be used. Its text holds no control characters, none that turn the writing direction, no line ends:
    they are shown as escapes. Of a very long text the middle is left out.
    """

    def __init__(self, text):
        text = str(text)
        if len(text) > LONGEST:
            text = f"{text[: LONGEST * 2 // 3]} ... {text[-LONGEST // 4 :]}"
        super().__init__(readable(text))


def readable(text):
    """The text with escapes in place of what a terminal would act on instead of showing it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def brief(value):
    """The value as Python would write it, in at most 60 characters, however large or deep it is."""
    return f"{_short.repr(value):.60}"
