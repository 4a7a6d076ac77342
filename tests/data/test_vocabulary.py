"""Training a vocabulary: what is kept of the alphabet, words that are too long, and what is counted."""

import random
import unicodedata
from collections import Counter

import pytest
from tokenizers import Tokenizer, normalizers

from bert_fast.data import train_tokenizer
from bert_fast.data.encoding import SentenceEncoder

HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 2900)]


def chinese(seed: int) -> list[str]:
    """Texts of 2,900 different characters, some of them frequent; every one occurs."""
    draw = random.Random(seed)
    return ["".join(draw.sample(HAN[:400], 20) + draw.sample(HAN, 20)) for _ in range(400)] + ["".join(HAN)]


def unknown(tokenizer: Tokenizer, texts: list[str]) -> int:
    return int((SentenceEncoder(tokenizer)(texts)[0] == tokenizer.token_to_id("[UNK]")).sum())


@pytest.mark.parametrize(("vocab_size", "limit"), [(8000, 8000), (3000, 8000), (2905, 2900)])
def test_an_alphabet_that_fits_is_kept(vocab_size, limit):
    texts, counts = chinese(vocab_size), Counter()
    ours = train_tokenizer(texts, vocab_size, limit_alphabet=limit, counts=counts)
    assert unknown(ours, texts) == 0
    assert ours.get_vocab_size() == 2905
    assert (counts["alphabet_dropped"], counts["characters_dropped"]) == (0, 0)
    assert counts["characters"] == sum(map(len, texts))


@pytest.mark.parametrize(("vocab_size", "limit", "kept"), [(8000, 1000, 1000), (605, 8000, 600), (6, 8000, 1)])
def test_characters_that_are_dropped_are_counted(vocab_size, limit, kept):
    texts, counts = chinese(limit), Counter()
    ours = train_tokenizer(texts, vocab_size, limit_alphabet=limit, counts=counts)
    assert ours.get_vocab_size() == 5 + kept <= vocab_size
    assert counts["alphabet_dropped"] == 2900 - kept
    assert counts["characters_dropped"] == unknown(ours, texts) > 0
    frequent = sorted(Counter("".join(texts)).items(), key=lambda item: (-item[1], item[0]))[:kept]
    assert {character for character, _ in frequent} <= set(ours.get_vocab())


def test_letters_take_two_places():
    texts, counts = ["ab abc b c"] * 5 + ["d.d"], Counter()
    ours = train_tokenizer(texts, 11, counts=counts)  # a, b, c with ##a, ##b, ##c; neither d nor the full stop
    assert set(ours.get_vocab()) >= {"a", "##a", "b", "##b", "c", "##c"}
    assert (ours.get_vocab_size(), counts["alphabet_dropped"], counts["characters_dropped"]) == (11, 2, 3)


@pytest.mark.parametrize("lowercase", [True, False])
def test_the_alphabet_is_that_of_the_normalized_text(lowercase):
    draw = random.Random(7)
    codes = [
        draw.choice((draw.randrange(0x3000), draw.randrange(0x1_0000), draw.randrange(0x11_0000))) for _ in range(3000)
    ]
    text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
    ours = train_tokenizer([text], 20_000, lowercase=lowercase, limit_alphabet=20_000)
    normal = normalizers.BertNormalizer(lowercase=lowercase).normalize_str(text)
    expected = {character for character in normal if not character.isspace()}
    assert {piece for piece in ours.get_vocab() if len(piece) == 1} == expected


def test_special_tokens_in_the_texts_are_text():
    vocabulary = train_tokenizer(["a [SEP] b [MASK]"] * 9, 60).get_vocab()
    assert "sep" in vocabulary
    assert not {"##]", "[sep", "sep]"} & set(vocabulary)


@pytest.mark.parametrize("letters", ["ab", "\uac00\uac01", "\u0e01\u0e33", "Aé"])
def test_words_that_are_always_unknown_are_left_out_and_counted(letters):
    draw = random.Random(len(letters))
    long = "".join(draw.choice(letters) for _ in range(300_000))  # joining its pieces would take minutes
    texts = [f"some words {long}. more words-{long[:150]} end", "", "some more words " * 3, "x" * 100]
    counts: Counter = Counter()
    ours = train_tokenizer(texts, 200, min_frequency=1, limit_alphabet=100, counts=counts)
    normal = ours.normalizer.normalize_str(long)
    assert counts["long_words"] == 2
    assert counts["long_word_characters"] == len(normal) + len(ours.normalizer.normalize_str(long[:150]))
    assert {"some", "words", "x" * 100} <= set(ours.get_vocab())
    plain = train_tokenizer([text.replace(long, "").replace(long[:150], "") for text in texts] + [letters], 200,
                            min_frequency=1, limit_alphabet=100)  # fmt: skip
    learned = {piece.removeprefix("##") for piece in ours.get_vocab()}
    assert {piece for piece in learned if len(piece) > 1} <= {piece.removeprefix("##") for piece in plain.get_vocab()}


def test_long_words_among_punctuation_are_found():
    draw = random.Random(3)
    words = [
        "".join(draw.choice("ab\u0e01") for _ in range(draw.choice([1, 5, 99, 100, 101, 250]))) for _ in range(200)
    ]
    marks = "".join(chr(code) for code in range(33, 127) if not chr(code).isalnum()) + "\u2014\u00bf \u3002"
    texts = ["".join(word + draw.choice(marks) for word in words), "-" * 5000]
    counts: Counter = Counter()
    train_tokenizer(texts, 100, min_frequency=1, counts=counts)
    long = [len(word) for word in words if len(word) > 100]
    assert (counts["long_words"], counts["long_word_characters"]) == (len(long), sum(long))


SCRIPTS = {  # a text and how many of its characters lose a mark that is no decoration
    "Hindi": ("\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902", 3),
    "Thai": ("\u0e17\u0e35\u0e48\u0e19\u0e35\u0e48 \u0e1a\u0e49\u0e32\u0e19", 5),
    "Ukrainian": ("\u0457\u0457 \u0439\u043e\u0433\u043e \u0433\u0430\u0439", 4),
    "Japanese": ("\u304c\u3063\u3053\u3046 \u30d1\u30f3 \u304b\u3099", 3),
    "French": ("\u00e9t\u00e9 \u00e7a e\u0301 \u03ac", 0),
    "emoji": ("\u2764\ufe0f a\ufe0e 1\ufe0f\u20e3", 0),
    "Russian": ("\u0451\u043b\u043a\u0430 \u0437\u0430\u0301\u043c\u043e\u043a", 2),
    "Church Slavonic": ("\u0431\ua657\u0483\u0301", 2),
    "Arabic": ("\u0623\u0643\u0644 \u0643\u064e\u062a\u064e\u0628", 3),
    "Vietnamese": ("Ti\u1ebfng Vi\u1ec7t \u0103", 0),
    "Adlam": ("\U0001e900\U0001e944", 1),
}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_marks_that_go_with_the_accents_are_counted(script, form):
    text, number = SCRIPTS[script]
    text = unicodedata.normalize(form, text)
    counts: Counter = Counter()
    encoder = SentenceEncoder(train_tokenizer([text], 200, counts=counts))
    assert counts["marks_stripped"] == number
    for _ in range(2):  # the second time the words are known
        encoder([f"plain {text}", "", text.replace(" ", "  ")])
        assert sum(encoder.lost["marks_stripped"]) == 2 * number
    for options in ({"lowercase": False}, {"strip_accents": False}):
        counts.clear()
        encoder = SentenceEncoder(train_tokenizer([text], 200, counts=counts, **options))
        encoder([text])
        assert counts["marks_stripped"] == sum(encoder.lost["marks_stripped"]) == 0


def test_an_error_of_the_texts_is_raised_as_it_is():
    class Texts:
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield "some words"
            if self.passes == 2:
                raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        train_tokenizer(Texts(), 50)
