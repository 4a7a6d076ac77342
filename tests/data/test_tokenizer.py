"""The tokenizer: as BERT's, the same ids in transformers, any form of it loads."""

import json

import pytest
from transformers import BertTokenizerFast

from bert_fast.data import encode_documents, load_tokenizer, save_tokenizer, train_tokenizer

TEXT = ["Das Café kostet 3.50 CHF!", "我们去公园 today", "unbelievably re-encoded", "a\tb\u0000c"]


@pytest.mark.parametrize("lowercase", [True, False])
def test_transformers_gives_the_same_ids(tmp_path, documents, lowercase):
    texts = [sentence for document in documents[:20] for sentence in document] + TEXT * 2
    ours = train_tokenizer(texts, 1500, lowercase=lowercase)
    assert ours.get_vocab_size() <= 1500
    save_tokenizer(ours, tmp_path)
    theirs = BertTokenizerFast.from_pretrained(tmp_path)
    from_vocab = load_tokenizer(tmp_path / "vocab.txt")
    (tmp_path / "tokenizer.json").rename(tmp_path / "other.json")
    for text in texts[::7] + TEXT:
        ids = ours.encode(text, "and B").ids
        assert theirs(text, "and B")["input_ids"] == ids
        assert from_vocab.encode(text, "and B").ids == ids
        assert load_tokenizer(tmp_path / "other.json").encode(text, "and B").ids == ids
    assert ("Café" in ours.normalizer.normalize_str("Café")) is not lowercase
    assert ours.encode("我们", add_special_tokens=False).tokens == ["我", "们"]
    assert not {"##我", "##."} & set(ours.get_vocab())


@pytest.mark.parametrize(("strip_accents", "kept"), [(False, True), (True, False)])
def test_accents_are_kept_where_asked_in_every_form(tmp_path, documents, strip_accents, kept):
    texts = [sentence for document in documents[:10] for sentence in document] + TEXT * 3
    ours = train_tokenizer(texts, 1200, lowercase=kept, strip_accents=strip_accents)
    assert ("é" in ours.normalizer.normalize_str("Café")) is kept
    save_tokenizer(ours, tmp_path)
    theirs = BertTokenizerFast.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    for text in [*texts[::9], *TEXT]:
        ids = ours.encode(text).ids
        assert theirs(text)["input_ids"] == ids
        assert load_tokenizer(tmp_path).encode(text).ids == ids
        assert load_tokenizer(tmp_path / "vocab.txt", lowercase=kept).encode(text).ids == ids


def test_chinese_characters_together_where_the_configuration_says_so(tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "我", "们", "##们", "we"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "tokenize_chinese_chars": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ids = load_tokenizer(tmp_path).encode("我们 we").ids
    assert ids == [2, 5, 7, 8, 3]
    assert BertTokenizerFast.from_pretrained(tmp_path)("我们 we")["input_ids"] == ids


def test_training_is_reproducible(documents):
    texts = [sentence for document in documents[:10] for sentence in document]
    assert train_tokenizer(texts, 800).get_vocab() == train_tokenizer(texts, 800).get_vocab()


def test_special_tokens_in_text_stay_text(tokenizer):
    tokens = encode_documents([["before [SEP] after [MASK] ."]], tokenizer).tokens
    assert not set(tokens.tolist()) & {tokenizer.token_to_id(t) for t in ("[CLS]", "[SEP]", "[MASK]", "[PAD]")}


def test_bad_vocabularies(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nword\n")
    with pytest.raises(ValueError, match=r"lacks \[MASK\]"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\nword\nword\n")
    with pytest.raises(ValueError, match="repeat"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not a tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no word"):
        train_tokenizer([" "], 50)
    with pytest.raises(ValueError, match="vocab_size"):
        train_tokenizer(["a"], 5)
