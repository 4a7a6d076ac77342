"""Files of words with tags: columns, JSON lines, Parquet, and what is wrong with them, by file and line."""

import json
from collections import Counter

import pytest

from bert_fast.tasks.tables import source_of
from bert_fast.tasks.tokens import doubts, tag_names
from bert_fast.tasks.words import read_sentences, unlabelled_sentences

CONLL = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

Peter NNP B-NP B-PER
Blackburn NNP I-NP I-PER
"""


@pytest.fixture
def file(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize("separator", [" ", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_columns(file, separator, end):
    path = file("train.conll", CONLL.replace(" ", separator).replace("\n", end))
    found = read_sentences(path)
    assert [s.words for s in found] == [("EU", "rejects"), ("Peter", "Blackburn")]
    assert [s.tags for s in found] == [("B-ORG", "O"), ("B-PER", "I-PER")]
    assert [s.where for s in found] == [f"{path}, line 3", f"{path}, line 6"]
    assert [s.tags for s in read_sentences(path, tags="1")] == [("NNP", "VBZ"), ("NNP", "NNP")]


def test_universal_dependencies(file):
    rows = [
        "# text = du vent",
        "1-2\tdu\t_\t_",
        "1\tde\tde\tADP",
        "2\tle\tle\tDET",
        "3\tvent\tvent\tNOUN",
        "3.1\tx\t_\t_",
    ]
    counts = Counter()
    (found,) = read_sentences(file("a.conllu", "\n".join(rows)), counts=counts)
    assert (found.words, found.tags) == (("de", "le", "vent"), ("ADP", "DET", "NOUN"))
    assert counts == {"lines of comment left out": 1, "lines of no word or of several left out": 2}


def test_comments_are_told_from_words(file):
    counts = Counter()
    found = read_sentences(file("a.conll", "a O\n\n# 1 of 2\n# O\nb O\n"), counts=counts)
    assert [s.words for s in found] == [("a",), ("#", "b")]
    assert counts == {"lines of comment left out": 1}


def test_columns_without_tags_are_read_as_those_with_them(file):
    """Comments, documents, separators and widths, too; only the words are wanted."""
    tagged = file("a.conll", CONLL + "\n# comment\na b c d\n")
    words = [sentence.words for sentence in read_sentences(tagged)]
    found = list(unlabelled_sentences(source_of(tagged)))
    assert [sentence.words for sentence in found] == words
    assert {sentence.tags for sentence in found} == {()}
    alone = file("b.conll", "".join("\n".join([*one, "", ""]) for one in words))
    assert [sentence.words for sentence in unlabelled_sentences(source_of(alone))] == words
    with pytest.raises(ValueError, match=r"c.conll, line 2: 2 columns, the lines before 1"):
        list(unlabelled_sentences(source_of(file("c.conll", "a\nb O\n"))))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
@pytest.mark.parametrize("keys", [("tokens", "ner_tags"), ("tokens", "tags"), ("words", "labels")])
def test_records(tmp_path, name, keys):
    rows = [dict(zip(keys, (["EU", "rejects"], ["B-ORG", "O"]), strict=True)), {keys[0]: ["It"], keys[1]: ["O"]}]
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows)))
    found = read_sentences(path)
    assert [(s.words, s.tags) for s in found] == [(("EU", "rejects"), ("B-ORG", "O")), (("It",), ("O",))]


def test_numbers_of_a_parquet_file_have_the_names_that_datasets_left(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    feature = {"feature": {"names": ["O", "B-PER"], "_type": "ClassLabel"}, "_type": "List"}
    table = pyarrow.Table.from_pylist([{"tokens": ["I", "Bob"], "ner_tags": [0, 1]}])
    said = json.dumps({"info": {"features": {"ner_tags": feature}}})
    parquet.write_table(table.replace_schema_metadata({"huggingface": said}), tmp_path / "a.parquet")
    (found,) = read_sentences(tmp_path / "a.parquet")
    assert found.tags == ("O", "B-PER")
    parquet.write_table(table, tmp_path / "b.parquet")
    (found,) = read_sentences(tmp_path / "b.parquet")
    assert found.tags == ("0", "1")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.conll", "a O\nb X O\n", "a.conll, line 2: 3 columns, the lines before 2"),
        ("a.conll", "a\n", "a.conll, line 1: only one column"),
        ("a.conll", "a\tO\nb\t\n", "a.conll, line 2: the word 'b' has no tag"),
        ("a.conll", b"a O\n\xff O\n", "a.conll, line 2 is not UTF-8"),
        ("a.conll", "\n\n", "a.conll holds no sentence"),
        (
            "a.jsonl",
            '{"tokens": ["a"], "tags": ["O"]}\n\n{"tokens": ["a"], "tags": []}',
            "line 3: 1 in 'tokens', but 0",
        ),
        ("a.jsonl", '{"tokens": ["a"]}', "line 1: no tags .*, but 'tokens'"),
        ("a.jsonl", '{"tokens": ["a"], "tags": "O"}', "line 1: 'tags' is no list"),
        ("a.jsonl", '{"tokens": [1], "tags": ["O"]}', r"line 1: 'tokens'\[0\] is no text"),
        ("a.jsonl", '{"tokens": ["a"], "tags": [" "]}', r"line 1: 'tags'\[0\] is no tag"),
        ("a.jsonl", '{"tokens": ["a"], "tags": [null]}', r"line 1: 'tags'\[0\] is no tag"),
        ("a.jsonl", '{"tokens"', "line 1: no JSON"),
        ("a.jsonl", "[]", "line 1: no JSON object"),
        ("a.json", '[{"tokens": ["a"], "tags": ["O"]}, 5]', r"a.json, \[1\]: no JSON object"),
        ("a.xml", "", "must end with"),
    ],
)
def test_what_does_not_fit_is_named(file, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_sentences(file(name, content))


def test_columns_have_numbers(file):
    path = file("a.conll", CONLL)
    with pytest.raises(ValueError, match="columns of words have numbers"):
        read_sentences(path, tags="ner")
    with pytest.raises(ValueError, match="line 3: 4 columns, no 0 or no 7"):
        read_sentences(path, tags="7")


def test_doubtful_tags_are_told(file):
    def told(content, training=None):
        labels = tag_names(read_sentences(file("t.conll", training or content)))
        return list(doubts(read_sentences(file("a.conll", content)), "train", labels))

    assert told(CONLL) == []
    (text,) = told("a O\nb I-PER\n\nc B-PER\nd I-LOC\n")
    assert "2 tags break the scheme BIO, the first of the word 2 ('b') of the sentence at" in text
    assert "a.conll, line 1: I-PER after O" in text
    (text,) = told("a O\nb I-PER\n", training=CONLL)  # of IO by itself
    assert "1 tags break the scheme BIO" in text
    (text,) = told("a I-PER\nb B-PER\n")
    assert "IOB1" in text
    (text,) = told("a B-PER\nb LOC\nc O\n")
    assert "'B-PER' marks entities and 'LOC' does not" in text


def test_names_of_tags_begin_with_o(file):
    assert tag_names(read_sentences(file("a.conll", CONLL))) == ["O", "B-ORG", "B-PER", "I-PER"]
    with pytest.raises(ValueError, match="have only O"):
        tag_names(read_sentences(file("b.conll", "a O\n")))
