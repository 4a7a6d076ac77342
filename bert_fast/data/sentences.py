"""Sentences of a text, by `sentencex` (Wikimedia; MIT; compiled; rules for about 300 languages), or by its lines.

It is linear in the length of the text and about ten times faster than WordPiece encoding, so that splitting is
never what `prepare` waits for. It rather leaves two sentences together than cut one in the middle.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator

from bert_fast import extras

RULES = ("auto", "lines", "split")
PARAGRAPH = re.compile(r"\n\s*\n")
# A "sentence" of this many characters is a table, a log or a text without punctuation; pieces of it are kept apart.
LONGEST = 10_000

# Unicode's Sentence_Terminal as far as a script in use has one, and Tibetan's shads, which are none there.
SPACED = ".!?\u203c\u203d\u2047\u2048\u2049"  # end a sentence before white space alone
UNSPACED = (
    "\u0589\u061d\u061e\u061f\u06d4\u0700\u0701\u0702\u0964\u0965\u104a\u104b\u1362\u1367\u1368\u1803\u1809\u1c7e\u1c7f"
    "\u3002\ua8ce\ua8cf\uabeb\ufe52\ufe56\ufe57\uff01\uff0e\uff1f\uff61"
)
KHMER, TIBETAN = "\u17d4\u17d5", "\u0f0d\u0f0e\u0f0f\u0f10\u0f11\u0f12\u0f14"  # which sentencex 1.0 does not know
ENDS = frozenset(SPACED + UNSPACED + KHMER + TIBETAN)
CLOSING = "\"'\u2019\u201d\u00bb\u203a)]}*_`\u300d\u300f\uff09"
MARK = re.compile(rf"[{SPACED}][{re.escape(CLOSING)}]*(?!\S)|[{UNSPACED}{KHMER}{TIBETAN}]")
MORE_MARK = re.compile(f"[{KHMER}{TIBETAN}]")
# U+17D4 U+179B U+17D4 is Khmer's "etc."; shads that follow each other end one sentence.
MORE_ENDS = re.compile(
    rf"(?:(?<!\u17d4\u179b)[{KHMER}]+(?!\u179b\u17d4)|[{TIBETAN}](?:\s*[{TIBETAN}])*)[{re.escape(CLOSING)}]*"
)

# Of lines that were filled up to a width: that width is at least so many columns, ...
NARROWEST = 36
# ... it explains at least this share of the line ends without a mark, and so many lines have a mark in them.
FILLED, MARKED = 0.2, 0.05
LONGEST_WORD = 20  # a longer one, as an address, may well stand on the line before
WIDE = re.compile(
    "[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\U00020000-\U0003fffd]"
)
# Scripts without spaces between words, which are wrapped within four columns (two ideographs) of the width.
WITHOUT_SPACES = re.compile("[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\ufaff\U00020000-\U0003fffd]")


def split_sentences(text: str, language: str = "en", sentences: str = "auto") -> list[str]:
    """The sentences of ``text`` in order, without surrounding white space and never empty.

    ``sentences`` is the rule. ``"lines"``: every line is a sentence. ``"split"``: marks end a sentence, and so does a
    blank line, a single line break does not. ``"auto"``: as ``"split"``, but where most lines that another one
    follows lack a mark at their end, a line's end ends a sentence as well. Lines that were filled up to a width (mail,
    Project Gutenberg's books) are no such: see :func:`lines_are_sentences`.

    ``language`` is an ISO 639 code and chooses the abbreviations ("Dr.", "z.B.") that do not end a sentence; the
    marks that do end one (. ! ? 。 ！ ？ । ؟ ། ។ ...) are known whatever the language, so Chinese text splits under
    "en" too. Thai and Lao have none, and spaces between phrases as well as between sentences: what their lines do not
    tell stays together. A stretch of more than 10 000 characters without an end is cut at white space (or at the limit
    where there is none). Raises ValueError for another rule.
    """
    if sentences not in RULES:
        raise ValueError(f"sentences {sentences!r} is none of {', '.join(RULES)}")
    if sentences == "lines":
        return [piece for line in text.splitlines() for piece in _pieces(line)]
    by_lines = sentences == "auto" and lines_are_sentences(text)
    stretches: list[str] = []
    for paragraph in PARAGRAPH.split(text):
        stretches += paragraph.splitlines() if by_lines and lines_are_sentences(paragraph) else [paragraph]
    return [piece for stretch in stretches for sentence in _by_marks(stretch, language) for piece in _pieces(sentence)]


def lines_are_sentences(text: str) -> bool:
    """Whether the lines of ``text`` are its sentences: most that another one follows lack a mark at their end, and
    they were not filled up to a width.

    A break is one of filled lines where the next line's first word had not fitted in, and goes on with the sentence:
    in lower case, or in a paragraph with a mark at its end. The width is the one that explains the most such breaks,
    less the lines that are longer; one break alone may always be of filled lines. Text with hardly a mark has no other
    sentences than its lines, however long.
    Linear in the text.
    """
    lines = marks = breaks = unended = best = 0
    steps: Counter = Counter()  # at width: breaks it begins to explain, or ends to, and lines that are no longer beyond
    following, closed = "", False  # the line after, and whether the paragraph ends with a mark
    for line in reversed(text.splitlines()):
        line = line.rstrip()
        if line:
            lines += 1
            columns = _columns(line)
            steps[columns] += 1
            mark = line.rstrip(CLOSING)[-1:]
            marked = mark in ENDS or (mark == ":" and not following)
            marks += marked
            if not following:
                closed = marked
            else:
                breaks += 1
                if not marked:
                    unended += 1
                    word = following.split(maxsplit=1)[0]
                    if closed or not word[0].isupper():
                        more = 4 if WITHOUT_SPACES.match(word) else 1 + _columns(word[:LONGEST_WORD])
                        steps[columns] += 1
                        steps[columns + more] -= 1
        following = line
    if 2 * unended <= breaks:
        return False
    explained = -lines
    widths = sorted(steps)
    for width, wider in zip(widths, [*widths[1:], math.inf], strict=True):
        explained += steps[width]
        if wider > NARROWEST:
            best = max(best, explained)
    if best < FILLED * unended and unended > 1:
        return True
    return marks < MARKED * lines and len(MARK.findall(text)) < MARKED * lines


def _columns(text: str) -> int:
    """The width of ``text`` on a terminal, where ideographs are twice as wide as letters."""
    return len(text) if text.isascii() else len(text) + len(WIDE.findall(text))


def _by_marks(text: str, language: str) -> Iterator[str]:
    sentencex = extras.load("sentencex")  # here: packing, batches and benchmarks run without it

    for sentence in sentencex.segment(language, text):
        if sentence.isascii() or not MORE_MARK.search(sentence):
            yield sentence
            continue
        start = 0
        for end in MORE_ENDS.finditer(sentence):
            yield sentence[start : end.end()]
            start = end.end()
        yield sentence[start:]


def _pieces(sentence: str) -> Iterator[str]:
    """``sentence`` without the white space around it, in pieces of at most ``LONGEST``; nothing where it is empty."""
    sentence = sentence.strip()
    start = 0  # by position: a text of many megabytes is not copied for each piece
    while len(sentence) - start > LONGEST:
        cut = sentence.rfind(" ", start + 1, start + LONGEST)
        cut = start + LONGEST if cut < 0 else cut
        yield sentence[start:cut].rstrip()
        start = cut
        while sentence[start].isspace():
            start += 1
    if sentence:
        yield sentence[start:]
