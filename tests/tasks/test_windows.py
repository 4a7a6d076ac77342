"""Windows over texts that are longer than a sequence."""

import random

import pytest

from bert_fast.data.tokenizer import SPECIAL_TOKENS, berts_tokenizer
from bert_fast.tasks.windows import spans, windows, with_most_context

WORDS = [f"w{n}" for n in range(60)]
TOKENIZER = berts_tokenizer({token: n for n, token in enumerate([*SPECIAL_TOKENS, *WORDS])}, lowercase=True)


def text(count):
    return " ".join(WORDS[n % len(WORDS)] for n in range(count))


@pytest.mark.parametrize("length", [1, 13, 14, 15, 29, 100])
@pytest.mark.parametrize("overlap", [0, 3, 7])
def test_windows_are_those_of_tokenizers(length, overlap):
    """Its own truncation with a stride, and every piece in a window that has it farthest from both ends."""
    encoding = TOKENIZER.encode(text(length))
    found = windows(encoding, 16, overlap=overlap)
    TOKENIZER.enable_truncation(16, stride=overlap)
    theirs = TOKENIZER.encode(text(length))
    TOKENIZER.no_truncation()
    assert [list(window.ids) for window in found] == [part.ids for part in (theirs, *theirs.overflowing)]
    for piece in range(length):
        number = with_most_context(piece, found)
        context = [min(piece - w.begin, w.end - 1 - piece) if w.begin <= piece < w.end else -1 for w in found]
        assert number == context.index(max(context))
        assert max(context) >= 0


def test_windows_over_a_context_are_those_of_tokenizers():
    for _ in range(20):
        question, context, overlap = random.randint(1, 10), random.randint(1, 80), random.randint(0, 8)
        encoding = TOKENIZER.encode(text(question), text(context))
        found = windows(encoding, 32, text=1, overlap=overlap)
        TOKENIZER.enable_truncation(32, stride=overlap, strategy="only_second")
        theirs = TOKENIZER.encode(text(question), text(context))
        TOKENIZER.no_truncation()
        parts = [theirs, *theirs.overflowing]
        assert [(list(w.ids), list(w.segments)) for w in found] == [(part.ids, part.type_ids) for part in parts]
        assert all(w.first == question + 2 for w in found)


def test_the_other_text_is_cut_to_its_beginning():
    (window,) = windows(TOKENIZER.encode(text(20), "w5 w6"), 16, text=1, longest_other=3)
    tokens = [TOKENIZER.id_to_token(number) for number in window.ids]
    assert tokens == ["[CLS]", "w0", "w1", "w2", "[SEP]", "w5", "w6", "[SEP]"]
    assert list(window.segments) == [0] * 5 + [1] * 3
    assert window.first == 5


def test_a_text_without_pieces_has_one_window():
    (window,) = windows(TOKENIZER.encode("\u200b"), 16)
    assert (window.begin, window.end, len(window.ids)) == (0, 0, 2)


def test_no_room_is_refused():
    with pytest.raises(ValueError, match="no room for a text: 13 go around"):
        windows(TOKENIZER.encode(text(10), text(4)), 13, text=1)


def test_windows_with_gaps_are_refused():
    with pytest.raises(ValueError, match="overlap by 0 pieces or more, got -1"):
        spans(20, 8, -1)


def test_an_overlap_beyond_half_a_window_is_half():
    assert spans(20, 8, 128) == spans(20, 8, 4) == [(0, 8), (4, 12), (8, 16), (12, 20)]
