"""What is read of every format, packed in every way, and what is refused or said."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import tarfile
import zipfile

import pyarrow
import pyarrow.parquet
import pytest

from bert_fast.data import prepare, read_documents, stream_documents
from bert_fast.data.corpus import decoded, located_documents
from bert_fast.data.losses import Tally

PACKED = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
}


def read(path, **reading):
    """The texts of a file, and what was lost of it."""
    tally = Tally()
    reading = {"one_per_file": False, "text_field": "text", "file_format": None} | reading
    texts = [decoded(*document, tally) for document in located_documents(path, tally, **reading)]
    return [text for text in texts if text is not None], tally


def table(texts, mark=","):
    """A table with the columns number, text and more."""
    file = io.StringIO()
    style = {"quoting": csv.QUOTE_MINIMAL} if mark == "," else {"quoting": csv.QUOTE_NONE, "quotechar": None}
    writer = csv.writer(file, delimiter=mark, **style)
    writer.writerow(["number", "text", "more"])
    writer.writerows([number, text, "x"] for number, text in enumerate(texts))
    return file.getvalue().encode()


def written(folder, texts, kind):
    """The file of that format with ``texts`` in it."""
    path = folder / f"corpus{kind}"
    if kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "more": ["x"] * len(texts)}), path)
    elif kind == ".jsonl":
        path.write_text("".join(json.dumps({"more": "x", "text": text}) + "\n" for text in texts))
    elif kind == ".json":
        path.write_text(json.dumps([{"text": text} for text in texts], indent=random.choice([None, 2])))
    elif kind == ".txt":
        path.write_bytes("\n\n".join(texts).encode())
    else:
        path.write_bytes(table(texts, "," if kind == ".csv" else "\t"))
    return path


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl", ".json", ".txt"])
def test_every_format_packed_in_every_way(tmp_path, kind, bom, packed):
    texts = ['He said "no, no", twice.', "Zwölf Bücher.", "x" * 200_000 + random.choice("äz"), "Last; one."]
    texts += ["Two\nlines,\r\nor three."] if kind in (".csv", ".jsonl", ".json") else []
    path = written(tmp_path, texts, kind)
    content = bom + path.read_bytes()
    path = tmp_path / f"corpus{kind}{packed}"
    path.write_bytes(PACKED[packed](content))
    found, lost = read(path)
    assert found == texts
    assert not lost
    assert len(read_documents(path)) == len(texts)


@pytest.mark.parametrize("packed", [".gz", ".bz2", ".zst"])
def test_what_is_packed_is_known_whatever_its_name(tmp_path, packed):
    (tmp_path / "corpus.txt").write_bytes(PACKED[packed](b"One.\n\nTwo."))
    (tmp_path / "corpus.jsonl").write_bytes(PACKED[packed](b'{"text": "Three."}'))
    assert read(tmp_path / "corpus.txt") == (["One.", "Two."], {})
    assert read(tmp_path / "corpus.jsonl") == (["Three."], {})
    pyarrow.parquet.write_table(pyarrow.table({"text": ["Four."]}), tmp_path / "corpus.pq")
    assert read(tmp_path / "corpus.pq") == (["Four."], {})


@pytest.mark.parametrize("zeros", [1, 511, 10_240, 3_000_000])
def test_zeros_behind_gzip_are_the_padding_of_a_tape(tmp_path, zeros):
    path = tmp_path / "corpus.txt.gz"
    for between in (b"", bytes(zeros)):
        path.write_bytes(gzip.compress(b"One.\n") + between + gzip.compress(b"\nTwo.") + bytes(zeros))
        assert read(path)[0] == ["One.", "Two."]
    path.write_bytes(gzip.compress(b"One.") + b"garbage")
    with pytest.raises(ValueError, match=r"corpus\.txt\.gz: cannot decompress as gzip"):
        read(path)


def archives():
    """Archives of a text, by what an error calls them."""
    text = b"This is text, and a line of it. " * 20
    zipped, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("text.txt", text)
    with tarfile.open(fileobj=tarred, mode="w") as file:
        about = tarfile.TarInfo("text.txt")
        about.size = len(text)
        file.addfile(about, io.BytesIO(text))
    return {
        "an xz archive": lzma.compress(text),
        "a zip archive": zipped.getvalue(),
        "a tar archive": tarred.getvalue(),
        "a 7z archive": b"7z\xbc\xaf\x27\x1c" + text,
        "PDF": b"%PDF-1.7\n" + text,
        "UTF-16": text.decode().encode("utf-16"),
        "UTF-32": text.decode().encode("utf-32"),
    }


@pytest.mark.parametrize("what", archives())
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv", ""])
def test_archives_beside_good_files_are_refused_by_name(tmp_path, tokenizer, what, kind):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "good.txt").write_text("A good one.")
    bad = tmp_path / "corpus" / f"bad{kind}"
    for packed, content in (("", archives()[what]), (".gz", gzip.compress(archives()[what]))):
        path = bad.with_name(bad.name + packed)
        path.write_bytes(content)
        for call in (
            lambda: prepare(tmp_path / "corpus", tokenizer, tmp_path / "out", workers=1),
            lambda: read_documents(tmp_path / "corpus"),
            lambda path=path: list(stream_documents(path)),
        ):
            with pytest.raises(ValueError, match=rf"{path.name} is not text in UTF-8, but {what}"):
                call()
        assert not (tmp_path / "out").exists()
        path.unlink()


def test_all_that_is_refused_is_named_before_anything_is_made(tmp_path, tokenizer):
    for number in range(5):
        (tmp_path / f"{number}.txt").write_bytes(lzma.compress(b"text") if number else b"text")
    (tmp_path / "5.txt.gz").write_bytes(gzip.compress(gzip.compress(b"text")))
    with pytest.raises(ValueError, match=r"1\.txt .*2\.txt .*3\.txt .*and 2 files more"):
        prepare(tmp_path, tokenizer, tmp_path / "out", workers=1)
    with pytest.raises(ValueError, match=r"5\.txt\.gz .*gzip within another"):
        read(tmp_path / "5.txt.gz")


RECORDS = [
    {"meta": {"text": "One.", "n": 1}},
    {"meta": None},
    {"meta": {"text": None}},
    {"meta": {"n": 2, "text": "Two."}},
]


def test_a_text_within_an_object_or_struct(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    for kind, lost in (("jsonl", "invalid_json"), ("parquet", "empty_texts")):
        found, tally = read(tmp_path / f"a.{kind}", text_field="meta.text")
        assert found == ["One.", "Two."]
        assert tally == {lost: 2}
    both = {"meta.text": "The key.", "meta": {"text": "The path."}}
    (tmp_path / "b.jsonl").write_text(
        "\n".join(json.dumps(dict(items)) for items in (both.items(), [*both.items()][::-1]))
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([both, both]), tmp_path / "b.parquet")
    (tmp_path / "b.csv").write_text("meta.text,meta\nThe key.,x\nThe key.,y\n")
    for kind in ("jsonl", "parquet", "csv"):
        assert read(tmp_path / f"b.{kind}", text_field="meta.text") == (["The key."] * 2, {})
    deep = {"a": {}, "a.b": {"c": {"d.e": "Deep."}}}
    (tmp_path / "c.jsonl").write_text(json.dumps(deep))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"a": {"b": {"c": "Deep."}}}]), tmp_path / "c.parquet")
    assert read(tmp_path / "c.jsonl", text_field="a.b.c.d.e") == (["Deep."], {})
    assert read(tmp_path / "c.parquet", text_field="a.b.c") == (["Deep."], {})
    with pytest.raises(ValueError, match=r"no column 'a\.text'; its columns are 'a\.b\.c'"):
        read(tmp_path / "c.parquet", text_field="a.text")


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json"])
def test_json_in_one_piece(tmp_path, kind):
    path = tmp_path / f"corpus{kind}"
    values = [{"text": "One."}, {"body": "x"}, 3, {"text": "Two."}]
    for indent in (None, 1):
        for bom in ("", "\ufeff"):
            path.write_text(bom + "\n" + json.dumps(values, indent=indent))
            found, tally = read(path)
            assert found == ["One.", "Two."]
            assert tally.places == {
                "invalid_json": [f"{path}, element 2: no 'text', but 'body'", f"{path}, element 3: no JSON object"]
            }
    path.write_text(json.dumps(values[0], indent=2))
    assert read(path) == (["One."], {})
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "One."}\n\xef\xbb\xbf{"text": "Two."}\r\n'
    )  # two files, one behind the other
    assert read(path) == (["One.", "Two."], {})


def test_an_array_too_large_to_be_read_at_once_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("bert_fast.data.formats.LONGEST_JSON_LINE", 1 << 20)
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x" * 1000}] * 2100))
    found, tally = read(tmp_path / "a.json")
    assert found == []
    assert tally.places == {
        "invalid_json": [f"{tmp_path / 'a.json'}, line 1: longer than 64 MiB"],
        "files_without_text": [str(tmp_path / "a.json")],
    }


def test_rows_of_a_table_that_do_not_fit_are_named(tmp_path):
    (tmp_path / "a.csv").write_text('n,text\n1,"One\nand more."\n2,Hello, world\n\n3\n4,Two.\n5,\n')
    found, tally = read(tmp_path / "a.csv")
    assert found == ["One\nand more.", "Two."]
    place = f"{tmp_path / 'a.csv'}, line"
    rows = [f"{place} 4: 3 columns, the header has 2", f"{place} 6: 1 columns, the header has 2"]
    assert tally.places == {"invalid_rows": rows, "empty_texts": [f"{place} 8"]}
    (tmp_path / "b.tsv").write_bytes(
        'n\ttext\r\n1\t"Unum.\r\n2\tDuo\tTres\r\n\r\n\t\r\n4\t\u00e9l\u00e8ve\r\n'.encode("latin-1")
    )
    found, tally = read(tmp_path / "b.tsv")
    assert found == ['"Unum.']
    assert tally == {"invalid_rows": 1, "empty_texts": 1, "invalid_utf8": 1}
    assert tally.places["invalid_utf8"] == [f"{tmp_path / 'b.tsv'}, line 6: not UTF-8 at its byte 0 (0xE9)"]
    for content, message in [
        ('n,text\n1,One.\n2,"Two\n3,Three\n', "line 3 on: unexpected end of data"),
        ("n,text\n1,One.\r2,Two\n", "line 2 on: new-line character"),
        ("n;text\n1;One.\n", "no column 'text'; its columns are 'n;text'"),
        ("text,n,text\nOne.,1,Two.\n", "2 columns 'text'; its columns are 'text', 'n', 'text'"),
    ]:
        (tmp_path / "c.csv").write_text(content)
        with pytest.raises(ValueError, match=rf"c\.csv.*{message}"):
            read(tmp_path / "c.csv")


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_halves_of_a_surrogate_pair_become_one_character_each(tmp_path, kind):
    path = written(tmp_path, ["Cut \u00bf off.", "Whole \U0001f600."], kind)
    half, mark = "\ud83d".encode("utf-8", "surrogatepass"), "\u00bf".encode()
    content = path.read_bytes()
    if kind.startswith(".json"):
        content = content.replace(b"\\u00bf", b"\\ud83d")
        assert b"\\ud83d " in content
    elif kind == ".parquet":
        column = pyarrow.array([b"Cut " + half + b" off.", "Whole \U0001f600.".encode()]).view(pyarrow.string())
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
        content = path.read_bytes()
    else:
        content = content.replace(mark, half)
    path.write_bytes(content)
    found, tally = read(path)
    assert found == ["Cut \ufffd off.", "Whole \U0001f600."]
    assert tally == {"lone_surrogates": 1}
    with pytest.warns(UserWarning, match="1 documents with halves of surrogate pairs"):
        assert read_documents(path) == [["Cut \ufffd off."], ["Whole \U0001f600."]]


TYPES = {
    "int64": [1, 2],
    "list<.*string>": [["One."], ["Two."]],
    "bool": [True, False],
}


@pytest.mark.parametrize("kind", TYPES)
def test_a_column_that_is_no_text_is_said_with_its_type(tmp_path, kind):
    pyarrow.parquet.write_table(pyarrow.table({"n": ["x", "y"], "body": TYPES[kind]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=rf"a\.parquet: .*'body'.* {kind}"):
        read(tmp_path / "a.parquet", text_field="body")


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.string_view()])
def test_text_of_every_type_and_twice_a_name(tmp_path, kind):
    column = pyarrow.array(["One.", None, "Two."]).cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": column, "n": [1, 2, 3]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0] == ["One.", "Two."]
    dictionary = pyarrow.table({"text": pyarrow.array(["One.", None, "Two."]).dictionary_encode()})
    pyarrow.parquet.write_table(dictionary, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0] == ["One.", "Two."]
    twice = pyarrow.Table.from_arrays([column, column], names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: 2 columns 'text'"):
        read(tmp_path / "a.parquet")


BIG = 1_200_000
LAYOUTS = {
    "carriage returns": ("A line of it.\r", ".txt"),
    "U+0085": ("A line of it.\u0085", ".txt"),
    "U+2029": ("A line of it.\u2029", ".txt"),
    "U+00A0": ("A line of it.\n\u00a0\n", ".txt"),
    "U+3000": ("A line of it.\n \u3000\t\n", ".txt"),
    "U+200B": ("A line of it.\r\n\u200b\r\n", ".txt"),
    "JSON objects": ('{"text": "A line of it.", "n": 1}\n', ".txt"),
    "format csv": ("1,A line of it.,x\n", ""),
    "format tsv": ("1\tA line, of it.\n2\tA line.\n", ".text"),
    "no blank line": ("A line of it.\nAnd another, it is.\n", ".txt"),
}


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("cause", LAYOUTS)
def test_a_file_that_became_one_large_document_is_said_with_its_cause(tmp_path, cause, packed):
    line, suffix = LAYOUTS[cause]
    path = tmp_path / f"corpus{suffix}{packed}"
    path.write_bytes(PACKED[packed]((line * (BIG // len(line))).encode()))
    found, tally = read(path)
    assert len(found) == 1
    assert tally["doubtful_files"] == 1
    (place,) = tally.places["doubtful_files"]
    assert place.startswith(f"{path}, line 1: 1.")
    assert cause in place
    path.write_bytes(PACKED[packed]((line * 3 if cause != "JSON objects" else "{A line}\n").encode()))
    assert not read(path)[1]  # a small one is nothing to speak of


def test_one_long_document_a_file_is_what_was_asked_for(tmp_path):
    (tmp_path / "book.txt").write_text("A line of it.\n" * (BIG // 10))
    found, tally = read(tmp_path / "book.txt", one_per_file=True)
    assert len(found) == 1
    assert not tally


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("value", [{"text": "A line."}, [{"n": 1, "text": "A line."}], [[{"text": "A line."}]]])
def test_json_in_a_file_of_text_is_said_however_small(tmp_path, value, bom, indent):
    nested = isinstance(value, list) and isinstance(value[0], list)
    (tmp_path / "small.txt").write_text(f"{bom}{json.dumps(value, indent=indent)}\n", encoding="utf-8")
    found, tally = read(tmp_path / "small.txt")
    assert len(found) == 1
    assert "JSON" in tally.places["doubtful_files"][0]
    if not nested:
        assert read(tmp_path / "small.txt", file_format="jsonl") == (["A line."], {})
    for text in ('{A "line"}: of it.', '["A line" of it]', "[1] A line: of it.", '{"A line" of it}'):
        (tmp_path / "small.txt").write_text(f"{bom}{text}\n", encoding="utf-8")
        assert not read(tmp_path / "small.txt")[1]


def test_lines_are_counted_as_an_editor_does(tmp_path):
    draw = random.Random()
    lines = [b"word " * draw.randrange(200) if draw.random() < 0.7 else b" " * draw.randrange(3) for _ in range(20_000)]
    bad = sorted(draw.sample(range(10, 20_000, 10), 3))
    for number in bad:  # the second line of a document
        lines[number - 2 : number + 1] = b" ", b"First.", lines[number] + b"caf\xe9 au lait"
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"\n".join(lines))
    assert path.stat().st_size > 1 << 20  # more than one block
    places = [f"{path}, line {n + 1}: not UTF-8 at its byte {lines[n].index(0xE9)} (0xE9 after" for n in bad]
    for found, place in zip(read(path)[1].places["invalid_utf8"], places, strict=True):
        assert found.startswith(place)
