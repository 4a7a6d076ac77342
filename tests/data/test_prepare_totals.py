"""What prepare counts: documents that are kept, copies whatever they look like, documents of one sentence."""

import json

import numpy as np
import pytest

from bert_fast.data import PretrainingDataset, encode_documents, open_corpus, prepare, read_manifest, split_sentences
from bert_fast.data.encoding import SentenceEncoder
from bert_fast.data.shards import COUNTED

STORY = "The value of an expression is its result. It is kept. Nobody asked."


def make(documents, tokenizer, out, **more):
    """The manifest of ``documents``, a str each."""
    path = out.with_suffix(".jsonl")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return prepare(path, tokenizer, out, **{"workers": 1, **more})


@pytest.mark.parametrize("unit", [1, 200, 1 << 20])
def test_totals_are_those_of_what_is_kept(tokenizer, tmp_path, unit):
    draw = np.random.default_rng()
    own = [f"Number {n} is odd. {'It is what it is. ' * draw.integers(4)}Яя {n}. " for n in range(11)]
    own.append(f"A word {'x' * 101} and \u0439 or \u0438\u0306. {'y' * 200}. ")
    dropped = [own[n] for n in draw.integers(12, size=40)]
    manifest = make(own + dropped, tokenizer, tmp_path / "out", unit_bytes=unit)
    alone = make(own, tokenizer, tmp_path / "alone", unit_bytes=unit)
    assert (manifest["duplicate_documents"], alone["duplicate_documents"]) == (40, 0)
    encoder = SentenceEncoder(tokenizer)
    assert manifest["duplicate_tokens"] == sum(len(encoder(split_sentences(text))[0]) for text in dropped)
    for key in ("documents", "sentences", "tokens", "one_sentence_documents", "one_sentence_tokens"):
        assert manifest[key] == alone[key]
    for key in ("documents", "tokens", *COUNTED):
        assert manifest["counts"].get(key) == alone["counts"].get(key)
    assert (alone["counts"]["long_words"], alone["counts"]["marks_stripped"]) == (2, 2)
    assert alone["counts"]["text_characters"] == sum(len(s) for text in own for s in split_sentences(text))
    corpus = open_corpus(tmp_path / "out")
    kept = corpus.sentence_ends[corpus.documents]
    assert manifest["tokens"] == (kept[:, 1] - kept[:, 0]).sum()
    assert manifest["sentences"] == np.diff(corpus.documents).sum()


@pytest.mark.parametrize(
    "copy",
    [STORY.replace(" ", "\n"), STORY.replace(" ", "\r\n"), STORY.replace(". ", ".  "), STORY.upper(), f"\n{STORY}\n",
     STORY.replace(". ", ".\n\n"), STORY.replace("of an", "of\n\nan"), STORY.replace("value", "valu\u00e9")],
)  # fmt: skip
def test_documents_of_the_same_ids_are_copies(tokenizer, tmp_path, copy):
    manifest = make([STORY, "Another. One.", copy], tokenizer, tmp_path / "out", unit_bytes=30)
    assert (manifest["documents"], manifest["duplicate_documents"]) == (2, 1)
    assert open_corpus(tmp_path / "out").documents.tolist() == [[0, 3], [3, 5]]


def test_documents_of_other_ids_are_kept(tokenizer, tmp_path):
    texts = [STORY, STORY[:-1], STORY + " And.", STORY.replace("kept", "found"), STORY.replace("is its", "its is")]
    assert make(texts, tokenizer, tmp_path / "out")["duplicate_documents"] == 0


def test_documents_of_one_sentence_are_counted(tokenizer, tmp_path):
    texts = ["One sentence alone here.", "Two are here. This one.", "no mark at all", "a line\nand another"]
    manifest = make([*texts, texts[0]], tokenizer, tmp_path / "out")
    corpus = encode_documents([[texts[0]], [texts[2]]], tokenizer)
    assert manifest["one_sentence_documents"] == 2
    assert manifest["one_sentence_tokens"] == len(corpus.tokens)


def test_the_rule_of_sentences(tokenizer, tmp_path):
    texts = ["the first line\nthe second line\nthe third line", "A wall. A door.\nA roof."]
    found = {rule: make(texts, tokenizer, tmp_path / rule, sentences=rule) for rule in ("auto", "lines", "split")}
    assert {rule: manifest["sentences"] for rule, manifest in found.items()} == {"auto": 6, "lines": 5, "split": 4}
    assert [manifest["made_by"]["sentences"] for manifest in found.values()] == list(found)
    assert make(texts, tokenizer, tmp_path / "default")["sentences"] == 6
    with pytest.raises(ValueError, match="'none' is none of auto, lines, split"):
        make(texts, tokenizer, tmp_path / "none", sentences="none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match=r"sentences was 'lines', now 'auto'.*another folder"):
        make(texts, tokenizer, tmp_path / "lines")


def test_a_folder_begun_without_a_rule_is_refused_in_words(tokenizer, tmp_path):
    make([STORY, STORY], tokenizer, tmp_path / "out")
    settings = tmp_path / "out" / "settings.json"
    before = json.loads(settings.read_text())
    del before["sentences"]
    settings.write_text(json.dumps(before))
    with pytest.raises(ValueError, match=r"sentences was not said, now 'auto'.*another folder"):
        make([STORY, STORY], tokenizer, tmp_path / "out")
    for damaged in ("", "[]", "{}", '{"files": 1}', '{"files": [1]}', "\xff"):
        settings.write_bytes(damaged.encode("latin-1"))
        with pytest.raises(ValueError, match=r"settings\.json is damaged"):
            make([STORY, STORY], tokenizer, tmp_path / "out")


def test_finished_folders_of_the_first_version_open(tokenizer, tmp_path, as_first_version):
    make([STORY, "Another. One.", STORY], tokenizer, tmp_path / "out")
    as_first_version(tmp_path / "out")
    assert read_manifest(tmp_path / "out")["tokens"] > 2 * len(SentenceEncoder(tokenizer)([STORY])[0])
    corpus = open_corpus(tmp_path / "out", verify=True)
    assert corpus.documents.tolist() == [[0, 3], [3, 5]]
    assert len(PretrainingDataset(corpus, tokenizer)[0].input_ids)
