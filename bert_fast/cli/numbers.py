"""The numbers that options take."""

import argparse


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse: anything else is wrong usage, exit code 2."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)
