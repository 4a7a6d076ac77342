# ruff: noqa: RUF001 (text in several scripts)
"""Reading documents and splitting sentences."""

import bz2
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from bert_fast.data import expand_paths, read_documents, split_sentences, stream_documents
from bert_fast.data.corpus import LONGEST_DOCUMENT


@pytest.mark.parametrize(
    ("language", "text", "sentences"),
    [
        ("en", "Dr. Smith paid $3.50! Really? Yes.", ["Dr. Smith paid $3.50!", "Really?", "Yes."]),
        ("de", "Das ist z.B. gut. Am 5. Mai kam er.", ["Das ist z.B. gut.", "Am 5. Mai kam er."]),
        ("zh", "今天天气很好。我们去公园吧！你来吗？", ["今天天气很好。", "我们去公园吧！", "你来吗？"]),
        ("en", "今天天气很好。我们去公园吧！", ["今天天气很好。", "我们去公园吧！"]),
        ("ja", "これは文です。次の文です。", ["これは文です。", "次の文です。"]),
        ("hi", "यह एक वाक्य है। यह दूसरा है।", ["यह एक वाक्य है।", "यह दूसरा है।"]),
        ("ar", "مرحبا. كيف حالك؟ جيد.", ["مرحبا.", "كيف حالك؟", "جيد."]),
        ("ru", "Привет, г. Москва. Как дела?", ["Привет, г. Москва.", "Как дела?"]),
        ("en", "A heading\n\nA line\nand another. \n \n", ["A heading", "A line\nand another."]),
        ("en", " \n ", []),
    ],
)
def test_sentences(language, text, sentences):
    assert split_sentences(text, language) == sentences


def test_endless_sentence_is_cut_and_nothing_lost():
    text = "word " * 7000 + "x" * 25_000
    pieces = split_sentences(text)
    assert max(map(len, pieces)) <= 10_000
    assert "".join(pieces).replace(" ", "") == text.replace(" ", "")


def test_language_reference(documents):
    assert len(documents) > 50
    assert all(sentence.strip() == sentence != "" for document in documents for sentence in document)


def test_formats_agree(tmp_path):
    texts = ["One. Two.\nThree.", "Vier. Fünf.", "六。七。"]
    plain = "\n\n".join(texts).encode()
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    (tmp_path / "a.txt").write_bytes(b"\n\n" + plain.replace(b"\n\n", b"\r\n \n\n\n") + b"\n\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(plain[:9]) + gzip.compress(plain[9:]))  # two members
    (tmp_path / "c.jsonl").write_bytes(lines + b"\n[1]\n{broken\n")
    with pyarrow.output_stream(str(tmp_path / "d.jsonl.zst"), compression="zstd") as file:
        file.write(lines)
    pyarrow.parquet.write_table(pyarrow.table({"text": [*texts, None]}), tmp_path / "e.parquet")
    (tmp_path / "f.txt.bz2").write_bytes(bz2.compress(plain[:9]) + bz2.compress(plain[9:]))
    (tmp_path / ".hidden").write_text("not read")
    files = expand_paths(tmp_path)
    assert [f.name for f in files] == ["a.txt", "b.txt.gz", "c.jsonl", "d.jsonl.zst", "e.parquet", "f.txt.bz2"]
    assert expand_paths([tmp_path / "*.txt*", tmp_path / "a.txt"]) == [*files[:2], files[5]]
    for file in files:
        assert [d.decode() for d in stream_documents(file)] == texts, file
    assert len(list(stream_documents(files[0], one_per_file=True))) == 1
    with pytest.warns(UserWarning, match=r"empty or null \(.*e\.parquet, row 4\); 2 JSON .*line 5: no JSON object"):
        assert len(read_documents(tmp_path)) == 18


def test_one_huge_line_is_cut_between_characters(tmp_path):
    (tmp_path / "line.txt").write_text("é" * (LONGEST_DOCUMENT + 10))
    pieces = list(stream_documents(tmp_path / "line.txt"))
    assert max(map(len, pieces)) <= LONGEST_DOCUMENT
    assert b"".join(pieces).decode() == "é" * (LONGEST_DOCUMENT + 10)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no corpus file"):
        read_documents(tmp_path / "none.txt")
    for content, message in [
        (b" \n\n ", "no text"),
        (b"a\0b", "NUL byte at byte 1"),
        (b"ab\xff", "not UTF-8 at its byte 2"),
    ]:
        (tmp_path / "bad.txt").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_documents(tmp_path / "bad.txt")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(bytes(range(65, 91)) * 100)[:-12])
    with pytest.raises(ValueError, match="decompress"):
        read_documents(tmp_path / "cut.txt.gz")
    (tmp_path / "cut.txt.bz2").write_bytes(bz2.compress(bytes(range(65, 91)) * 100)[:-4])
    with pytest.raises(ValueError, match="decompress"):
        read_documents(tmp_path / "cut.txt.bz2")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="Parquet"):
        read_documents(tmp_path / "x.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "y.parquet")
    with pytest.raises(ValueError, match="body"):
        read_documents(tmp_path / "y.parquet")
