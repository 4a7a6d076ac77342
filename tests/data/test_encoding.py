"""SentenceEncoder: the ids that the tokenizer gives for each sentence alone."""

import json
import sys

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from bert_fast.data import encoding, load_tokenizer, save_tokenizer
from bert_fast.data.encoding import SentenceEncoder
from bert_fast.data.tokenizer import SPECIAL_TOKENS


def assert_same_ids(tokenizer, sentences):
    encoder = SentenceEncoder(tokenizer)
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.encode_special_tokens = True
    expected = [e.ids for e in tokenizer.encode_batch_fast(sentences, add_special_tokens=False)]
    for _ in range(2):  # the second time every stretch is known
        ids, lengths = encoder(sentences)
        assert lengths.tolist() == [len(one) for one in expected]
        np.testing.assert_array_equal(ids, np.concatenate([np.array(one, dtype=int) for one in expected]))
    return encoder


@pytest.mark.parametrize("lowercase", [True, False])
def test_as_the_tokenizer(tokenizer, documents, tmp_path, monkeypatch, lowercase):
    save_tokenizer(tokenizer, tmp_path)
    tokenizer = load_tokenizer(tmp_path / "vocab.txt", lowercase=lowercase)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 2000)
    sentences = [sentence for document in documents[::9] for sentence in document]
    # every character that is white space for Python or a control character for Unicode, and a sample of the others
    points = [c for c in range(0x3100) if chr(c).isspace() or not chr(c).isprintable()]
    points += np.random.default_rng(0).integers(0x80, sys.maxunicode + 1, 1500).tolist()
    around = [f"the{chr(c)}of a{chr(c)} \u0301{chr(c)}" for c in points if not 0xD800 <= c < 0xE000]
    odd = ["", " ", "\x01", "[SEP] [MASK]", "x" * 101 + " y", "a\x0b\x0cb c\x85d", "don't-stop, \u4eca\u5929a"]
    encoder = assert_same_ids(tokenizer, [*sentences, *around, *odd])
    assert encoder.by_word
    assert encoder.dtype == np.uint16


def test_known_stretches_are_forgotten_when_they_take_too_much(tokenizer, documents, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 2000)
    monkeypatch.setattr(encoding, "KNOWN_BYTES", 40_000)
    encoder = assert_same_ids(tokenizer, [sentence for document in documents[:20] for sentence in document])
    assert encoder.known_bytes < 200_000


def test_other_tokenizers_encode_whole_sentences(tokenizer):
    other = Tokenizer.from_str(tokenizer.to_str())
    other.normalizer = normalizers.Replace("a b", "of")  # looks across white space
    assert not assert_same_ids(other, ["a b c", "the a b"]).by_word
    other = Tokenizer.from_str(tokenizer.to_str())
    other.add_tokens([AddedToken("of the", normalized=True)])
    assert not assert_same_ids(other, ["one of the many", ""]).by_word


@pytest.mark.parametrize(
    ("added", "by_word"),
    [
        ([AddedToken("[URL]", normalized=False), AddedToken("@user", normalized=True)], True),
        ([AddedToken("[URL]", special=True), AddedToken("URL", single_word=True)], True),
        ([AddedToken("[URL]", lstrip=True)], False),
        ([AddedToken("[URL] @USER")], False),
        ([AddedToken("\u65b0\u8bcd")], False),  # its normal form has white space
        ([AddedToken("x\x1fURL", normalized=True)], False),
    ],
)
def test_added_tokens_have_their_ids_where_text_holds_them(tokenizer, documents, added, by_word):
    other = Tokenizer.from_str(tokenizer.to_str())
    special = [token for token in added if token.special]
    other.add_special_tokens(special)
    other.add_tokens([token for token in added if not token.special])
    ends = ["", " ", "x", ".", "\u00a0", "\u4eca", "\u0301", "\x0b", "-"]
    texts = [f"see{a}{token.content}{b} {token.content}" for token in added for a in ends for b in ends]
    texts += ["[url] @USER URL [ URL ] [U\x0bRL] \u65b0 \u8bcd [URL]  @USER", *documents[3]]
    encoder = SentenceEncoder(other)
    assert encoder.by_word is by_word
    theirs = PreTrainedTokenizerFast(tokenizer_object=other)
    for _ in range(2):
        for text in texts:
            expected = theirs(text, add_special_tokens=False)["input_ids"]
            assert encoder([text])[0].tolist() == expected, text
    ids = [other.token_to_id(token.content) for token in added]
    assert np.isin(ids, encoder(texts)[0]).all()
    marked = [f"{text} [SEP] a[MASK]" for text in texts]
    assert not np.isin(
        [other.token_to_id(name) for name in SPECIAL_TOKENS if name != "[UNK]"], encoder(marked)[0]
    ).any()


def test_padding_truncation_and_large_ids(tokenizer):
    other = Tokenizer.from_str(tokenizer.to_str())
    other.enable_padding(length=50)
    other.enable_truncation(2)
    ids, lengths = SentenceEncoder(other)(["the value of the expression", "is"])
    assert lengths.sum() == len(ids)
    assert 2 < lengths[0] < 50
    other.add_tokens([f"word{number}" for number in range(66_000)])
    assert SentenceEncoder(other).dtype == np.uint32
    assert SentenceEncoder(other)(["word65999"])[0].max() > 1 << 16


def test_words_that_are_unknown_for_their_length_are_counted(tokenizer):
    described = json.loads(tokenizer.to_str())
    described["model"]["max_input_chars_per_word"] = 20
    others = [Tokenizer.from_str(json.dumps(described)), Tokenizer.from_str(json.dumps(described))]
    others[1].normalizer = normalizers.Lowercase()
    for one, longest, by_word in ((tokenizer, 100, True), (others[0], 20, True), (others[1], 20, False)):
        long, hangul = "y" * (longest + 1), "\uac01" * (longest // 3 + 1)  # which becomes three letters each
        texts = [f"{long} a", f"{long}.{long} {long}", "y" * longest, "\u4e00" * 300, "", "some other words"]
        encoder = SentenceEncoder(one)
        assert encoder.by_word is by_word
        for _ in range(2):
            assert_same_ids(one, texts)
            encoder(texts)
            assert sum(encoder.lost["long_words"]) == 4 + (
                not by_word
            )  # without BERT's normalizer, Chinese is one word
            encoder([texts[2], f"a {hangul}"])
            assert sum(encoder.lost["long_words"]) == by_word


@pytest.mark.parametrize(
    ("normalizer", "marks"),
    [
        (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), 4),
        (normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]), 0),
    ],
)
def test_marks_that_other_tokenizers_strip_are_counted(tokenizer, normalizer, marks):
    other = Tokenizer.from_str(tokenizer.to_str())
    other.normalizer = normalizer
    encoder = SentenceEncoder(other)
    assert not encoder.by_word
    encoder(["\u0439\u043e\u0433\u043e \u0438\u0306", "no mark, \u00e9", "\u092e\u0947\u0902"])
    assert sum(encoder.lost["marks_stripped"]) == marks
