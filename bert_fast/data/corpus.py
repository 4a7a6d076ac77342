"""Documents of a corpus: text, JSON lines, tables, Parquet and data sets of the Hub; streamed in bounded memory."""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Unpack

from bert_fast.data.formats import LONGEST_DOCUMENT, Reading, not_utf8, texts_of, where_to_cut
from bert_fast.data.hub_datasets import called
from bert_fast.data.losses import Tally
from bert_fast.data.paths import expand_paths
from bert_fast.data.sentences import split_sentences
from bert_fast.text import well_formed


def stream_documents(
    path: str | Path,
    *,
    one_per_file: bool = False,
    text_field: str = "text",
    file_format: str | None = None,
    counts: Counter | None = None,
) -> Iterator[bytes]:
    """The documents of one file as raw bytes, in order, white space around them and empty ones dropped.

    The name tells the format, or ``file_format`` does ("text", "jsonl", "csv", "tsv", "parquet" or "arrow"):
    ``.jsonl``, ``.ndjson`` and ``.json`` hold one JSON object a line (or are one array of objects of up to 64 MiB),
    ``.csv`` and ``.tsv`` rows under a header (in ``.tsv`` a quotation mark is a character like others), ``.parquet``
    and ``.arrow`` (of `datasets`) rows; their ``text_field`` is the text, where "meta.text" is the text in the object
    or struct "meta" unless a key or column has that name. Anything else is text with blank lines between documents, or
    one document where ``one_per_file``. What is compressed by gzip, bzip2 or zstd, whatever its name, is decompressed.
    ``-`` is standard input, ``hf://NAME[:CONFIG][@SPLIT][?revision=REVISION]`` a data set on the
    Hugging Face Hub, streamed.
    Memory: a document beyond 16 MiB is cut there (at white space if there is some), JSON lines beyond 64 MiB are
    skipped, and such rows of a table are an error.

    ``counts`` gets ``documents_cut``, ``invalid_json`` (lines without an object or without text in ``text_field``),
    ``invalid_rows`` (of tables, with more or fewer columns than the header), ``empty_texts``, ``doubtful_files`` (that
    seem to be laid out otherwise) and ``files_without_text``; a :class:`Tally` gets the first places of each as well.
    Raises ValueError where the file cannot be read in its format (archive, damage, missing column).
    """
    tally = Tally()
    reading: Reading = {"one_per_file": one_per_file, "text_field": text_field, "file_format": file_format}
    for document, _, _ in located_documents(Path(path), tally, **reading):
        if counts is not None:
            counts.update(tally)
            tally.clear()
        yield document
    if counts is not None:
        counts.update(tally)


def located_documents(
    path: Path, tally: Tally, *, name: str | None = None, **reading: Unpack[Reading]
) -> Iterator[tuple[bytes, str, int]]:
    """:func:`stream_documents` with the place of each, ("FILE, line", 3); the file is called ``name``."""
    name = called(path) if name is None else name
    empty = True
    for text, within, number in texts_of(path, name, tally, **reading):
        document = text.strip()
        if not document:
            tally.note("empty_texts", f"{within} {number}")
            continue
        empty = False
        while len(document) > LONGEST_DOCUMENT:
            tally.note("documents_cut", f"{within} {number}")
            cut = where_to_cut(document)
            yield document[:cut], within, number
            document = document[cut:].lstrip()
        if document:
            yield document, within, number
    if empty:
        tally.note("files_without_text", name)


def decoded(document: bytes, within: str, number: int, tally: Tally) -> str | None:
    """The text of a document at that place, without byte-order mark and NUL bytes; None where it is not UTF-8.

    Halves of surrogate pairs become U+FFFD. ``tally`` gets what was changed, and the document if it is skipped.
    """
    try:
        text = document.decode("utf-8", "surrogatepass").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = document.rfind(b"\n", 0, error.start) + 1 if within.endswith("line") else 0
        number += document.count(b"\n", 0, line)
        tally.note("invalid_utf8", f"{within} {number}: {not_utf8(error, line)}")
        return None
    text, halves = well_formed(text)
    if halves:
        tally.note("lone_surrogates", f"{within} {number}")
    if "\0" in text:
        tally.note("nul_bytes", f"{within} {number}: NUL byte at byte {document.index(0)}")
        text = text.replace("\0", "")
    return text


def read_documents(
    paths: str | Path | Iterable[str | Path] | None = None,
    *,
    language: str = "en",
    sentences: str = "auto",
    one_per_file: bool = False,
    text_field: str = "text",
    file_format: str | None = None,
) -> list[list[str]]:
    """All documents of a corpus that fits in memory: a list of documents, each a list of sentences (str).

    ``paths`` are files, folders or patterns in the formats of :func:`stream_documents`; None stands for the
    Python language reference that the standard library ships (``pydoc_data.topics``), each topic a document.
    ``language`` and ``sentences`` are those of :func:`split_sentences`.
    Strict, unlike ``prepare``: raises FileNotFoundError for a missing file and ValueError for an empty file, a NUL
    byte (binary data) or text that is not UTF-8, with file, line and byte. A UserWarning says what else was left out.
    """
    if paths is None:
        from pydoc_data.topics import topics

        documents = [split_sentences(topics[name], language, sentences) for name in sorted(topics)]
        return [document for document in documents if document]
    documents, tally = [], Tally()
    reading: Reading = {"one_per_file": one_per_file, "text_field": text_field, "file_format": file_format}
    for path in expand_paths(paths):
        before = len(documents)
        for raw, within, number in located_documents(path, tally, **reading):
            text = decoded(raw, within, number, tally)
            for reason in ("invalid_utf8", "nul_bytes"):
                if tally[reason]:
                    raise ValueError(f"{tally.places[reason][0]}: not a text file in UTF-8")
            assert text is not None  # which is not UTF-8
            if found := split_sentences(text, language, sentences):
                documents.append(found)
        if len(documents) == before:
            raise ValueError("; ".join([f"{path}: no text in this file", *tally.described()]))
    if lost := tally.described():
        warnings.warn(f"of the corpus: {'; '.join(lost)}", stacklevel=2)
    return documents
