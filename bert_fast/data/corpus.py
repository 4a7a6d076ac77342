"""Documents of a corpus: text, JSON lines and Parquet, plain, gzip, bzip2 or zstd; streamed in bounded memory."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from bert_fast.data.paths import expand_paths
from bert_fast.data.sentences import split_sentences

BLANK_LINE = re.compile(rb"\n[ \t\r\f\v]*\n\s*")
BLOCK = 1 << 20
# The longest document (bytes of UTF-8) that stays one: a longer one is cut, which bounds memory.
LONGEST_DOCUMENT = 16 << 20
LONGEST_JSON_LINE = 64 << 20

JSON_LINES = {".jsonl", ".ndjson", ".json"}
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".zstd": "zstd"}


def stream_documents(
    path: str | Path, *, one_per_file: bool = False, text_field: str = "text", counts: Counter | None = None
) -> Iterator[bytes]:
    """The documents of one file as raw bytes, in order, white space around them and empty ones dropped.

    The name tells the format: ``.jsonl``, ``.ndjson`` and ``.json`` hold one JSON object a line, ``.parquet`` rows,
    whose ``text_field`` is the text; anything else is text with blank lines between documents, or one document
    where ``one_per_file``. ``.gz``, ``.bz2`` and ``.zst`` after it decompress. Memory: a document beyond 16 MiB is cut
    there (at white space if there is some) and JSON lines beyond 64 MiB are skipped.

    ``counts`` gets ``documents_cut``, ``invalid_json`` (lines skipped: no object, or no text in ``text_field``).
    Raises ValueError where the file cannot be read in its format (damaged archive, missing Parquet column).
    """
    path = Path(path)
    counts = Counter() if counts is None else counts
    compression = COMPRESSED.get(path.suffix.lower())
    suffix = path.with_suffix("").suffix.lower() if compression else path.suffix.lower()
    if suffix == ".parquet":
        pieces = _parquet(path, text_field)
    else:
        blocks = _blocks(path, compression)
        if suffix in JSON_LINES:
            pieces = _json_lines(blocks, text_field, counts)
        else:
            pieces = _text(blocks, None if one_per_file else BLANK_LINE, counts)
    for piece in pieces:
        document = piece.strip()
        while len(document) > LONGEST_DOCUMENT:
            counts["documents_cut"] += 1
            cut = _cut(document)
            yield document[:cut]
            document = document[cut:].lstrip()
        if document:
            yield document


def skipped_text(counts: dict) -> str | None:
    """What of a corpus was skipped or changed, in words; None where nothing was."""
    words = {
        "invalid_utf8": "documents skipped: not UTF-8",
        "nul_bytes": "documents with NUL bytes, which were removed",
        "empty_documents": "documents without a token",
        "documents_cut": "cuts of documents longer than 16 MiB",
        "invalid_json": "JSON lines skipped: not an object a line with that text field, or beyond 64 MiB",
    }
    found = [f"{counts[key]:,} {text}" for key, text in words.items() if counts.get(key)]
    return "; ".join(found) or None


def _cut(document: bytes) -> int:
    """Where to cut a document that is too long: at white space, else between two characters."""
    space = max(document.rfind(mark, LONGEST_DOCUMENT // 2, LONGEST_DOCUMENT) for mark in (b" ", b"\n"))
    cut = space if space > 0 else LONGEST_DOCUMENT
    while cut > LONGEST_DOCUMENT - 4 and document[cut] & 0xC0 == 0x80:  # a continuation byte of UTF-8
        cut -= 1
    return cut


def _blocks(path: Path, compression: str | None) -> Iterator[bytes]:
    if compression is None:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                yield block
        return
    import pyarrow  # here: plain text needs no Arrow

    try:
        with pyarrow.input_stream(str(path), compression=compression) as file:
            while block := file.read(BLOCK):
                yield block
    except OSError as error:
        raise ValueError(f"{path}: cannot decompress as {compression}: {error}") from error


def _text(blocks: Iterator[bytes], separator: re.Pattern | None, counts: Counter) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        rest += block
        if separator is not None:
            *whole, rest = separator.split(rest)
            yield from whole
        while len(rest) > LONGEST_DOCUMENT + BLOCK:
            counts["documents_cut"] += 1
            cut = _cut(rest)
            yield rest[:cut]
            rest = rest[cut:]
    yield rest


def _json_lines(blocks: Iterator[bytes], field: str, counts: Counter) -> Iterator[bytes]:
    for line in _lines(blocks, counts):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[field]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = None
        if isinstance(text, str):
            yield text.encode("utf-8", "surrogatepass")
        else:
            counts["invalid_json"] += 1


def _lines(blocks: Iterator[bytes], counts: Counter) -> Iterator[bytes]:
    parts: list[bytes] = []
    size, skipping = 0, False
    for block in blocks:
        first, *more = block.split(b"\n")
        for part, ends in [(first, bool(more))] + [(p, i < len(more) - 1) for i, p in enumerate(more)]:
            size += len(part)
            skipping = skipping or size > LONGEST_JSON_LINE
            if skipping:
                parts.clear()
            else:
                parts.append(part)
            if ends:
                if skipping:
                    counts["invalid_json"] += 1
                else:
                    yield b"".join(parts)
                parts, size, skipping = [], 0, False
    if skipping:
        counts["invalid_json"] += 1
    else:
        yield b"".join(parts)


def _parquet(path: Path, field: str) -> Iterator[bytes]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise ValueError(f"{path}: no column {field!r}; its columns are {names}: name one as the text field")
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                column = batch.column(0).cast(pyarrow.binary())
                yield from (value.as_buffer().to_pybytes() for value in column if value.is_valid)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet: {error}") from error


def read_documents(
    paths: str | Path | Iterable[str | Path] | None = None, *, language: str = "en", one_per_file: bool = False
) -> list[list[str]]:
    """All documents of a corpus that fits in memory: a list of documents, each a list of sentences (str).

    ``paths`` are files, folders or patterns in the formats of :func:`stream_documents`; None stands for the
    Python language reference that the standard library ships (``pydoc_data.topics``), each topic a document.
    Strict, unlike ``prepare``: raises FileNotFoundError for a missing file and ValueError for an empty file, a NUL
    byte (binary data) or text that is not UTF-8, with file, document and byte.
    """
    if paths is None:
        from pydoc_data.topics import topics

        documents = [split_sentences(topics[name], language) for name in sorted(topics)]
        return [document for document in documents if document]
    documents = []
    for path in expand_paths(paths):
        before = len(documents)
        for number, raw in enumerate(stream_documents(path, one_per_file=one_per_file)):
            if b"\0" in raw:
                raise ValueError(f"{path}: NUL byte at byte {raw.index(0)} of document {number}: not a text file")
            try:
                text = raw.decode("utf-8").removeprefix("\ufeff")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: document {number} is not UTF-8 at its byte {error.start}") from error
            if sentences := split_sentences(text, language):
                documents.append(sentences)
        if len(documents) == before:
            raise ValueError(f"{path}: no text in this file")
    return documents
