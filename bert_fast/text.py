"""Text as it reaches a tokenizer."""

import re
import unicodedata
from functools import cache

SURROGATE = re.compile("[\ud800-\udfff]")
# Marks that every script may put on its letters, and letters that are neither Latin nor Greek.
SHARED_MARKS = "\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20dc\ufe20-\ufe2f"
SHARED_MARK = re.compile(f"[{SHARED_MARKS}]")
OTHER_LETTERS = "\u0400-\u1cff\u2c80-\ua71f\ua800-\uab2f\uab70-\ufdff\U00010000-\U0001efff"
MARKED = re.compile(f"[{OTHER_LETTERS}][{SHARED_MARKS}]+")


def well_formed(text: str) -> tuple[str, int]:
    """``text`` with U+FFFD for every lone surrogate, and how many there were.

    A surrogate is half of a character: an emoji that JSON was cut within, or a byte of the command line that is not
    UTF-8. No tokenizer takes one.
    """
    return SURROGATE.subn("\ufffd", text)


def strippable_marks(text: str) -> int:
    """How many marks stripping accents takes from letters of ``text`` that are neither Latin nor Greek.

    There a mark is no decoration, but a vowel sign (Hindi, Thai), a tone, or what tells two letters apart (й, が). It
    counts the same as part of a character and as one of its own.
    """
    return 0 if text.isascii() else sum(map(has_mark, text)) + shared_marks(text)


@cache
def has_mark(character: str) -> bool:
    """Whether ``character`` is such a letter with its mark, or a mark of such a script alone."""
    parts = unicodedata.normalize("NFD", character)
    if all(unicodedata.category(part) != "Mn" for part in parts) or SHARED_MARK.match(parts):
        return False
    name = unicodedata.name(parts[0], "")
    return not name.startswith(("LATIN", "GREEK")) and "VARIATION SELECTOR" not in name


def shared_marks(text: str) -> int:
    """Of the marks that all scripts share, how many stand after such letters."""
    return 0 if text.isascii() else sum(len(marked) - 1 for marked in MARKED.findall(text))
