"""Texts longer than a model's sequences: overlapping windows of their pieces."""

import unicodedata
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Encoding

OVERLAP = 128  # pieces that neighbouring windows share; transformers' run_qa.py calls it the stride


class Window(NamedTuple):
    """Part of an encoded text as a model's sequence: its pieces ``begin`` to ``end`` lie from ``first`` on."""

    ids: Sequence[int]
    segments: Sequence[int]
    first: int
    begin: int
    end: int


def spans(length: int, room: int, overlap: int = OVERLAP) -> list[tuple[int, int]]:
    """[begin, end) of windows over ``length`` pieces, ``room`` long but the last; neighbours share ``overlap`` pieces.

    Where ``overlap`` is more than half of ``room``, that half is. Source: the truncation of `tokenizers`.
    """
    if overlap < 0:
        raise ValueError(f"windows must overlap by 0 pieces or more, got {overlap}: others would leave some out")
    step = room - min(overlap, room // 2)
    count = max(0, -(-(length - room) // step)) + 1
    return [(number * step, min(number * step + room, length)) for number in range(count)]


def windows(
    encoding: Encoding, max_length: int, *, text: int = 0, overlap: int = OVERLAP, longest_other: int | None = None
) -> list[Window]:
    """The windows of ``encoding`` over its text number ``text`` (1: the second of a pair), each within ``max_length``.

    Each has all that the tokenizer puts around that text, and the first ``longest_other`` pieces of the other one.
    """
    ids, segments, texts = encoding.ids, encoding.type_ids, encoding.sequence_ids
    places = [place for place, number in enumerate(texts) if number == text]
    other = [place for place, number in enumerate(texts) if number not in (None, text)]
    dropped = set() if longest_other is None else set(other[longest_other:])
    # a text without a piece lies where its end would: before the last token that is not of a text
    first, last = (places[0], places[-1] + 1) if places else (len(ids) - 1, len(ids) - 1)
    before = [place for place in range(first) if place not in dropped]
    after = [place for place in range(last, len(ids)) if place not in dropped]
    room = max_length - len(before) - len(after)
    if room < 1:
        raise ValueError(
            f"sequences of {max_length} tokens have no room for a text: {len(before) + len(after)} go around"
        )
    found = []
    for begin, end in spans(len(places), room, overlap):
        kept = [*before, *range(first + begin, first + end), *after]
        # arrays take a tenth of the memory of lists, and SQuAD has twenty million pieces
        parts = array("i", [ids[p] for p in kept]), array("b", [segments[p] for p in kept])
        found.append(Window(*parts, len(before), begin, end))
    return found


def with_marks(text: str, offsets: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
    """The ``offsets`` of the pieces of ``text``, each up to the end of its last letter's marks: where accents are
    stripped, one that is a character of its own is in no piece, and café would end before it."""
    if text.isascii() or not offsets:
        return offsets
    found = []
    for (begin, end), limit in zip(offsets, [*(begin for begin, _ in offsets[1:]), len(text)], strict=True):
        while end < limit and unicodedata.category(text[end]) == "Mn":
            end += 1
        found.append((begin, end))
    return found


def with_most_context(piece: int, found: Sequence[Window]) -> int:
    """The number of the window in which ``piece`` is farthest from both ends, the first of several.

    Source: Google's run_squad.py, ``_check_is_max_context``.
    """
    if len(found) == 1:
        return 0
    last = bisect_right(found, piece, key=lambda window: window.begin) - 1
    holding = [number for number in range(last, -1, -1) if found[number].end > piece]
    return min(holding, key=lambda n: (-min(piece - found[n].begin, found[n].end - 1 - piece), n))
