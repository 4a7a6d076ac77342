"""The tokenizer: as BERT's, the same ids in transformers, any form of it loads."""

import json
from itertools import pairwise

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, models, normalizers, processors
from transformers import AutoTokenizer, BertTokenizerFast

from bert_fast.data import encode_documents, load_tokenizer, prepare, save_tokenizer, train_tokenizer
from bert_fast.data.encoding import SentenceEncoder
from bert_fast.data.tokenizer import SPECIAL_TOKENS, berts_tokenizer, differences, special_ids
from tests.support.kinds_of_tokenizers import KINDS, PLAIN, TEXTS, training_ids

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
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not a tokenizer"):
        load_tokenizer(tmp_path)
    for damaged in ('{"do_lower', "[]"):
        (tmp_path / "tokenizer_config.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"tokenizer_config.json is not the configuration"):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(FileNotFoundError):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no word"):
        train_tokenizer([" "], 50)
    with pytest.raises(ValueError, match="vocab_size"):
        train_tokenizer(["a"], 5)


@pytest.fixture(scope="session")
def texts(documents):
    return [sentence for document in documents[:15] for sentence in document] + TEXTS * 3


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_ids_of_training(tmp_path, texts, kind):
    tokenizer = KINDS[kind](texts)
    encoder = SentenceEncoder(tokenizer)
    (tmp_path / "vocab.txt").write_text("what\nwas\nthere\n")
    save_tokenizer(tokenizer, tmp_path)
    save_tokenizer(load_tokenizer(tmp_path), tmp_path / "again")
    named = json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert named == ("BertTokenizerFast" if kind in PLAIN else "PreTrainedTokenizerFast")
    for folder in (tmp_path, tmp_path / "again"):
        assert (folder / "vocab.txt").exists() is (kind in PLAIN)
        for theirs in (AutoTokenizer.from_pretrained(folder), getattr(transformers, named).from_pretrained(folder)):
            for pair in [("",), *((text,) for text in TEXTS), *pairwise(TEXTS)]:
                found = theirs(*pair)
                assert (found["input_ids"], found["token_type_ids"]) == training_ids(encoder, tokenizer, *pair), pair
            assert {name: theirs.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS} == dict(
                zip(SPECIAL_TOKENS, special_ids(tokenizer), strict=True)
            )
            assert theirs.mask_token == "[MASK]"
            assert theirs("a [MASK].")["input_ids"] == load_tokenizer(folder).encode("a [MASK].").ids


def test_what_pre_training_cannot_keep_is_refused(tmp_path, texts):
    (tmp_path / "text.txt").write_text("some text. more.\n")
    tokenizer = KINDS["NFKC, lower case"](texts)
    ids = special_ids(tokenizer)
    tokenizer.post_processor = processors.RobertaProcessing(("[SEP]", ids.sep), ("[CLS]", ids.cls))
    with pytest.raises(ValueError, match="post-processor does not make"):
        prepare(tmp_path / "text.txt", tokenizer, tmp_path / "data")
    save_tokenizer(tokenizer, tmp_path / "kept")  # a tokenizer of another model is saved as it is
    theirs = AutoTokenizer.from_pretrained(tmp_path / "kept")
    assert theirs("a b", "c")["input_ids"] == tokenizer.encode("a b", "c").ids
    names = {"<unk>": 0} | {token: number for number, token in enumerate(SPECIAL_TOKENS, 1)}
    with pytest.raises(ValueError, match="<unk> of what it does not know"):
        save_tokenizer(Tokenizer(models.WordPiece(names, unk_token="<unk>")), tmp_path / "unk")
    with pytest.raises(ValueError, match=r"lacks \[PAD\], \[UNK\], \[CLS\]"):
        save_tokenizer(Tokenizer(models.WordPiece({"<s>": 0, "<unk>": 1}, unk_token="<unk>")), tmp_path / "s")


VOCABULARIES = {
    "repeated": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nword\nother\nword\nlast\n",
    "blank": "[PAD]\n[UNK]\n\n[CLS]\n[SEP]\n[MASK]\nword\n \n\nlast\n\n",
    "line ends": "[PAD]\r\n[UNK]\r\n[CLS]\r\n[SEP]\r\n[MASK]\r\nother\r\nword\r\nlast",
    "white space": "[PAD]\n[UNK] \n[CLS]\n[SEP]\n[MASK]\nword\t\nother\u3000\nlast\nword\n",
}
TOLD = {"repeated": ["6 ('word')"], "blank": ["3, 8, 9, 11 are blank"], "line ends": [], "white space": ["6 ('word')"]}


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_lines_of_a_vocabulary_are_its_ids(tmp_path, kind):
    path = tmp_path / "vocab.txt"
    path.write_bytes(VOCABULARIES[kind].encode())
    told = []
    ours, theirs = load_tokenizer(path, tell=told.append), BertTokenizerFast(str(path))
    assert len(told) == len(TOLD[kind])
    assert all(text in line and str(path) in line for text, line in zip(TOLD[kind], told, strict=True))
    assert ours.get_vocab() == {token: number for token, number in theirs.get_vocab().items() if token}
    save_tokenizer(ours, tmp_path / "saved")
    theirs.save_pretrained(tmp_path / "theirs")  # a tokenizer.json with gaps
    again = [load_tokenizer(tmp_path / name, tell=told.append) for name in ("saved", "theirs")]
    assert (tmp_path / "saved" / "vocab.txt").exists() is (kind == "line ends")
    for other in (*again, AutoTokenizer.from_pretrained(tmp_path / "saved").backend_tokenizer):
        assert differences(ours, other) == []
        assert other.encode("word last. other", "last").ids == theirs("word last. other", "last")["input_ids"]


def _changed(tokenizer, **changes):
    described = json.loads(tokenizer.to_str())
    for part, about in changes.items():
        described[part] |= about
    return Tokenizer.from_str(json.dumps(described))


def test_differences_name_what_gives_other_ids(texts):
    ours = KINDS["uncased"](texts)
    same = [
        _changed(ours, normalizer={"strip_accents": True}),
        KINDS["BertProcessing"](texts),
        _changed(ours, post_processor={"pair": []}),
    ]
    for other in (ours, *same[:1], *same[2:]):
        assert differences(ours, other) == differences(other, ours) == []
    cased = berts_tokenizer(ours.get_vocab(), lowercase=False)
    added = Tokenizer.from_str(ours.to_str())
    added.add_tokens([AddedToken("[URL]")])
    other_model = Tokenizer.from_str(ours.to_str())
    other_model.normalizer = normalizers.NFKC()
    vocabulary = ours.get_vocab()
    pieces = [piece for piece in vocabulary if piece not in SPECIAL_TOKENS][:2]
    swapped = vocabulary | dict(zip(pieces, (vocabulary[piece] for piece in pieces[::-1]), strict=True))
    for other, *said in (
        (cased, "that one is cased, this one is uncased", "that one keeps accents, this one strips accents"),
        (_changed(ours, normalizer={"strip_accents": False}), "that one keeps accents, this one strips accents"),
        (_changed(ours, normalizer={"handle_chinese_chars": False}), "that one keeps Chinese characters together"),
        (_changed(ours, normalizer={"clean_text": False}), "that one keeps control characters"),
        (_changed(ours, model={"max_input_chars_per_word": 50}), "max_input_chars_per_word of the model is 50 in"),
        (_changed(ours, model={"continuing_subword_prefix": "@@"}), "continuing_subword_prefix of the model is '@@'"),
        (other_model, "the normalizer of that one is NFKC, of this one BertNormalizer"),
        (added, "1 tokens have other ids there, '[URL]' for one", "[URL] of the added tokens differs"),
        (berts_tokenizer(swapped, lowercase=True), "2 tokens have other ids there"),
    ):
        found = "; ".join(differences(ours, other))
        assert all(text in found for text in said), found
        assert differences(other, ours)


def test_a_configuration_that_says_otherwise_is_told(tmp_path, texts):
    ours = KINDS["cased"](texts)
    save_tokenizer(ours, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    told = []
    load_tokenizer(tmp_path, tell=told.append)
    assert told == []
    for changes in ({"do_lower_case": True}, {"strip_accents": True}, {"tokenize_chinese_chars": False}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | changes))
        assert (
            load_tokenizer(tmp_path, tell=told.append).to_str()
            == load_tokenizer(tmp_path / "tokenizer.json", tell=print).to_str()
        )
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        assert theirs.backend_tokenizer.normalizer.normalize_str("É我") != ours.normalizer.normalize_str("É我")
    assert len(told) == 3
    assert "that one is uncased, this one is cased" in told[0]
