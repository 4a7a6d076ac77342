"""Text as it reaches a tokenizer."""

import re

SURROGATE = re.compile("[\ud800-\udfff]")


def well_formed(text: str) -> tuple[str, int]:
    """``text`` with U+FFFD for every lone surrogate, and how many there were.

    A surrogate is half of a character: an emoji that JSON was cut within, or a byte of the command line that is not
    UTF-8. No tokenizer takes one.
    """
    return SURROGATE.subn("\ufffd", text)
