"""Pieces added to a vocabulary: they save most, by trying all; all other ids stay; what each replaces."""

import random
from collections import Counter

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, BertTokenizerFast

from bert_fast.data import extend_tokenizer, extension, save_tokenizer
from bert_fast.data.encoding import SentenceEncoder
from bert_fast.data.extension import replaced_pieces, tokens_before
from bert_fast.data.tokenizer import SPECIAL_TOKENS, berts_tokenizer, differences, vocabulary_rows, without_ids_from
from tests.support.kinds_of_tokenizers import KINDS, TEXTS

WORD_PIECES = [kind for kind in KINDS if kind != "byte-level BPE"]


def vocabulary(*pieces: str, letters: str = "") -> Tokenizer:
    """BERT's tokenizer of ``pieces``, and of ``letters`` at any place of a word."""
    singles = [form for letter in letters for form in (letter, f"##{letter}")]
    return berts_tokenizer({piece: n for n, piece in enumerate([*SPECIAL_TOKENS, *singles, *pieces])}, lowercase=True)


def made_words(draw: random.Random, letters: str, number: int, longest: int = 9) -> list[str]:
    """Words of random parts, some of which come again within a word."""
    parts = ["".join(draw.choices(letters, k=draw.randint(1, 4))) for _ in range(8)]
    return ["".join(draw.choices(parts, k=draw.randint(1, 4)))[:longest] for _ in range(number)]


def cut(tokenizer: Tokenizer, words: Counter) -> int:
    """The tokens of ``words``, by `tokenizers` itself."""
    model = tokenizer.model
    return sum(number * len(model.tokenize(word)) for word, number in words.items())


def with_piece(tokenizer: Tokenizer, piece: str) -> Tokenizer:
    known = tokenizer.get_vocab()
    return berts_tokenizer(known | {piece: max(known.values()) + 1}, lowercase=True)


def added(base: Tokenizer, extended: Tokenizer) -> list[str]:
    """The new pieces, by their ids."""
    new = extended.get_vocab().items() - base.get_vocab().items()
    return [piece for piece, _ in sorted(new, key=lambda item: item[1])]


@pytest.mark.parametrize("seed", range(3))
def test_each_piece_is_the_best_of_all_that_there_are(seed):
    draw = random.Random(seed)
    base = vocabulary(*{f"##{w}" for w in made_words(draw, "abc", 5, 3)} - {"##a", "##b", "##c"}, letters="abc")
    words = Counter(made_words(draw, "abc", 40))
    texts = [" ".join(words.elements())]
    every = {("##" if a else "") + w[a:b] for w in words for a in range(len(w)) for b in range(a + 1, len(w) + 1)}
    one = base
    for _ in range(4):
        tried = [cut(with_piece(one, piece), words) for piece in sorted(every - one.get_vocab().keys())]
        assert min(tried) < cut(one, words)  # or there is nothing to find
        counts = Counter()
        better = extend_tokenizer(one, texts, 1, min_frequency=1, counts=counts)
        assert (cut(one, words), cut(better, words)) == (counts["tokens_before"], counts["tokens"])
        assert counts["tokens"] == min(tried)
        one = better
    assert added(base, extend_tokenizer(base, texts, 4, min_frequency=1)) == added(base, one)


def test_a_corpus_of_which_the_savings_are_known():
    base = vocabulary("neuro", "##tox", "##in", letters="abcdefghijklmnopqrstuvwxyz")
    texts = ["Neurotoxin neurotoxin"] * 10 + ["neurotoxins."] * 4 + ["neuroma."] * 3 + ["qz"] * 2
    base = with_piece(base, ".")
    counts = Counter()
    ours = extend_tokenizer(base, texts, 2, counts=counts)
    # neurotoxin saves 2 of 3 tokens twenty times and of neurotoxins four times; ##ma is used three times
    assert added(base, ours) == ["neurotoxin"]
    assert counts == {
        "pieces_added": 1, "words": 36, "tokens_before": 20 * 3 + 4 * 5 + 3 * 4 + 2 * 2,
        "tokens": 20 + 4 * 3 + 3 * 4 + 2 * 2, "unknown_words": 0,
    }  # fmt: skip
    for least, more in ((4, ["neurotoxins"]), (3, ["neuroma", "neurotoxins"]), (2, ["neuroma", "neurotoxins", "qz"])):
        assert added(base, extend_tokenizer(base, texts, 9, min_frequency=least)) == ["neurotoxin", *more]


@pytest.mark.parametrize("seed", range(3))
def test_every_piece_is_used_and_no_word_becomes_unknown(seed):
    draw = random.Random(seed)
    # d, e and f within words have no piece of their own: where a piece ends before one, the word would be [UNK]
    base = vocabulary("##bd", "##ae", "##cef", "bf", "d", "e", "f", letters="abc")
    parts = ["bd", "ae", "cef", "a", "b", "c", "ab", "ca"]
    words = Counter("bf" + "".join(draw.choices(parts, k=draw.randint(1, 5))) for _ in range(150))
    tokens = {word: base.encode(word).tokens for word in words}
    assert not any("[UNK]" in found for found in tokens.values())
    ours = extend_tokenizer(base, [" ".join(words.elements())], 60, min_frequency=2)
    used = {token for word in words for token in ours.encode(word).tokens}
    assert "[UNK]" not in used
    assert len(added(base, ours)) > 20
    assert used.issuperset(added(base, ours))


@pytest.fixture(scope="module")
def domain(documents):
    """(texts that a vocabulary is made of, others that it is extended for)."""
    texts = [sentence for document in sorted(documents, key=len)[30:50] for sentence in document]
    return texts[::2] + TEXTS * 3, texts[1::2] + TEXTS


@pytest.mark.parametrize("kind", WORD_PIECES)
def test_ids_stay_and_transformers_gives_the_new_ones(tmp_path, domain, kind):
    base, texts = KINDS[kind](domain[0]), domain[1]
    ours = extend_tokenizer(base, texts, 60, min_frequency=2)
    first = vocabulary_rows(base)
    assert base.get_vocab().items() < ours.get_vocab().items()
    assert [ours.get_vocab()[piece] for piece in added(base, ours)] == list(range(first, first + 60))
    assert differences(without_ids_from(ours, first), base) == []
    theirs = AutoTokenizer.from_pretrained(save_tokenizer(ours, tmp_path))
    before, after = (SentenceEncoder(one) for one in (base, ours))
    kept = 0
    for text, framed in zip(texts, theirs(texts)["input_ids"], strict=True):
        ids, old = after([text])[0], before([text])[0]
        assert framed[1:-1] == ids.tolist()
        assert tokens_before(base, ours, ids) == len(old)
        if ids.max(initial=0) < first:
            assert ids.tolist() == old.tolist()
            kept += 1
    assert 5 < kept < len(texts) - 5


def test_random_words_have_the_ids_of_berttokenizerfast(tmp_path, tokenizer):
    draw = random.Random(3)
    words = made_words(draw, "aebinotrsé", 400, 14)
    ours = extend_tokenizer(tokenizer, [" ".join(words)], 100)
    theirs = BertTokenizerFast.from_pretrained(save_tokenizer(ours, tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    of_lines = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    encoder = SentenceEncoder(ours)
    for _ in range(200):
        text = draw.choice([" ", "-", ", "]).join(draw.choices(words + made_words(draw, "aebinotrsé", 5), k=9))
        ids = encoder([text])[0].tolist()
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == of_lines(text, add_special_tokens=False)["input_ids"]


def test_the_pieces_that_a_new_one_replaces():
    base = vocabulary("neuro", "##tox", "##in", "tox", letters="abnotx")
    ours = base
    for piece in ("neurotox", "##toxin", "toxin", "##öx", "xa", "##neuro"):
        ours = with_piece(ours, piece)
    named = {
        ours.id_to_token(new): [base.id_to_token(old) for old in ids]
        for new, ids in replaced_pieces(base, ours).items()
    }
    assert named == {
        "neurotox": ["neuro", "##tox"], "##toxin": ["##tox", "##in"], "toxin": ["tox", "##in"], "##öx": ["[UNK]"],
        "xa": ["x", "##a"], "##neuro": ["[UNK]"],
    }  # fmt: skip
    assert replaced_pieces(base, base) == {}


def test_rare_words_are_forgotten_where_there_are_too_many(tokenizer, monkeypatch):
    draw = random.Random(5)
    words = Counter(draw.choices(made_words(draw, "abcdefgh", 300), weights=range(300), k=5000))
    texts = [" ".join(part) for part in np.array_split(list(words.elements()), 50)]
    whole, counts = Counter(), Counter()
    extend_tokenizer(tokenizer, texts, 20, counts=whole)
    assert (whole["words"], whole["words_forgotten"]) == (5000, 0)
    monkeypatch.setattr(extension, "MOST_WORDS", 100)
    monkeypatch.setattr(extension, "STRETCHES", 20)
    monkeypatch.setattr(extension, "CHOSEN_FOR", 1500)
    ours = extend_tokenizer(tokenizer, texts, 20, counts=counts)
    assert 0 < counts["words_forgotten"] == 5000 - counts["words"]
    assert added(tokenizer, ours) == added(tokenizer, extend_tokenizer(tokenizer, texts, 20))


def test_what_cannot_be_extended_is_refused(documents):
    texts = [sentence for document in documents[:5] for sentence in document]
    with pytest.raises(ValueError, match=r"this tokenizer is BPE without: prepare the data with it as it is"):
        extend_tokenizer(KINDS["byte-level BPE"](TEXTS), texts, 5)
    base = KINDS["uncased"](texts)
    with pytest.raises(ValueError, match="no word"):
        extend_tokenizer(base, [" ", ""], 5)
    base.add_tokens([AddedToken("aspirin", normalized=False)])
    with pytest.raises(ValueError, match=r"the added token 'aspirin' .* rename it as \[aspirin\]"):
        extend_tokenizer(base, texts, 5)
