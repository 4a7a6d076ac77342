"""The formats of a corpus: how a file is opened, and the texts in it, each with the line or row where it is."""

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate, chain, repeat
from pathlib import Path
from typing import BinaryIO, TypedDict

from bert_fast import extras
from bert_fast.data.hub_datasets import hub_tables, is_hub
from bert_fast.data.losses import Tally
from bert_fast.data.paths import STDIN, is_pipe

FORMATS = ("text", "jsonl", "csv", "tsv", "parquet", "arrow")
COLUMNAR = {"parquet": b"PAR1", "arrow": b"ARROW1"}  # and what their files begin with; a stream of Arrow does not
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"} | {f".{name}": name for name in FORMATS[2:]}
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".zstd": "zstd"}
COMPRESSED_BEGIN = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "bz2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17\x72\x45\x38\x50\x90)"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
}
NO_TEXT_BEGINS = {
    "an xz archive": rb"\xfd7zXZ\0",
    "a zip archive": rb"PK(?:\x03\x04|\x05\x06)",
    "a 7z archive": rb"7z\xbc\xaf\x27\x1c",
    "a rar archive": rb"Rar!\x1a\x07",
    "an lz4 archive": rb"\x04\x22\x4d\x18",
    "a compress (.Z) archive": rb"\x1f\x9d",
    "a tar archive": rb"(?s:.{257}ustar)",
    "PDF": rb"%PDF-",
    "UTF-32": rb"(?:\xff\xfe\0\0|\0\0\xfe\xff)",
    "UTF-16": rb"(?s:(?:\xff\xfe|\xfe\xff)..)",
}

BLANK_LINE = re.compile(rb"(\n[ \t\r\f\v]*\n\s*)")
BLOCK = 1 << 20
HEAD = 1 << 16
# The longest document (bytes of UTF-8) that stays one: a longer one is cut, which bounds memory.
LONGEST_DOCUMENT = 16 << 20
LONGEST_JSON_LINE = 64 << 20  # and the longest line or field of a table
LONG_DOCUMENT = 1 << 20  # of a text file, worth a note: hardly one document

BOM = b"\xef\xbb\xbf"
JSON_BEGINS = re.compile(rb'(?:%b)?\s*(?:\[\s*)*\{\s*"[^"\n]*"\s*:' % BOM)
# Line ends and spaces that Unicode knows, of which no blank line is made here.
LINE_ENDS = {b"\xc2\x85": "U+0085", b"\xe2\x80\xa8": "U+2028", b"\xe2\x80\xa9": "U+2029"}
SPACES = "\xa0\u1680\u2000-\u200f\u202f\u205f\u2060\u3000\ufeff"
LOOKS_BLANK = re.compile(rf"\n[ \t\r\f\v]*([{SPACES}])[ \t\r\f\v{SPACES}]*\n")


class Reading(TypedDict):
    """How a file is read; see :func:`bert_fast.data.stream_documents`."""

    one_per_file: bool
    text_field: str
    file_format: str | None


Readable = BinaryIO | gzip.GzipFile
Text = tuple[bytes, str, int]  # in UTF-8 unless the file is not, and its place: ("FILE, line", 3), row or element


@contextmanager
def opened(path: Path, name: str, file_format: str | None = None) -> Iterator[tuple[io.BufferedReader, str]]:
    """The content of a file from its beginning, decompressed, and its format: one of :data:`FORMATS`.

    What it begins with tells whether it is compressed, Parquet, or a file of Arrow; else its ``name`` tells, where
    ``file_format`` does not. ValueError where it is no text in UTF-8 (archives, UTF-16) or damaged.
    """
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    with nullcontext(sys.stdin.buffer) if path == STDIN else path.open("rb") as file:
        stream, head = _begun(file)
        told = COMPRESSED.get(suffixes[-1] if suffixes else "")
        compression = _compression(head) or told
        try:
            if compression is not None:
                stream, head = _begun(_decompressed(stream, compression))
            suffix = suffixes[-2:-1] if suffixes and suffixes[-1] in COMPRESSED else suffixes[-1:]
            found = file_format or SUFFIXES.get("".join(suffix), "text")
            found = next((kind for kind, begin in COLUMNAR.items() if head.startswith(begin)), found)
            if found not in COLUMNAR:
                _require_text(head, name)
            elif compression is not None or is_pipe(path):
                raise ValueError(
                    f"{name}: {found.title()} is read from a plain file, not from a pipe or compressed again"
                )
            yield stream, found
        except (OSError, EOFError, zlib.error) as error:
            if compression is None:
                raise
            why = "" if compression == told else f"not UTF-8, it begins as {compression} does; "
            raise ValueError(f"{name}: {why}cannot decompress as {compression}: {error}") from error


class _Begun(io.RawIOBase):
    """A stream of which ``head`` has been read already: a pipe cannot go back."""

    def __init__(self, head: bytes, rest: Readable):
        self.head, self.rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self.head[: len(buffer)] or self.rest.read(len(buffer))
        self.head = self.head[len(data) :]
        buffer[: len(data)] = data
        return len(data)


def _begun(file: Readable) -> tuple[io.BufferedReader, bytes]:
    head = file.read(HEAD)
    return io.BufferedReader(_Begun(head, file), HEAD), head


def _compression(head: bytes) -> str | None:
    return next((name for name, begin in COMPRESSED_BEGIN.items() if begin.match(head)), None)


def _decompressed(stream: BinaryIO, compression: str) -> Readable:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=stream)  # unlike Arrow's, it takes zeros behind the end: blocks of a tape
    pyarrow = extras.load("pyarrow")  # here: other files need no Arrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), compression)


def _require_text(head: bytes, name: str) -> None:
    what = next((what for what, begin in NO_TEXT_BEGINS.items() if re.match(begin, head)), None)
    if (again := _compression(head)) is not None:
        what = f"{again} within another compression"
    if what is not None:
        raise ValueError(f"{name} is not text in UTF-8, but {what}: unpack or convert it first, or leave it out")


def require_text(files: Iterable[Path], file_format: str | None = None, *, most_nul: float = 1) -> None:
    """Opens every file that is no pipe: OSError for the first that cannot be read, ValueError for those not text.

    More than one NUL byte, and more than that share of the first 64 KiB, is no text either.
    """
    found = []
    for path in files:
        if is_pipe(path):
            continue
        try:
            with opened(path, str(path), file_format) as (stream, kind):
                head = stream.peek()
                if kind not in COLUMNAR and (nul := head.count(0)) > 1 + most_nul * len(head):
                    where = f"{nul:,} of its first {len(head):,} bytes are NUL"
                    raise ValueError(f"{path} is not text in UTF-8: {where}")
        except ValueError as error:
            found.append(str(error))
    if found:
        raise ValueError("; ".join(found[:3] + ([f"and {len(found) - 3} files more"] if len(found) > 3 else [])))


def texts_of(
    path: Path, name: str, tally: Tally, *, one_per_file: bool, text_field: str, file_format: str | None
) -> Iterator[Text]:
    """The texts of a file, in order, perhaps blank. ``tally`` gets what is left out or doubtful; see ``opened``."""
    if is_hub(path):
        yield from _column(hub_tables(path), name, text_field)
        return
    with opened(path, name, file_format) as (stream, found):
        if found in COLUMNAR:
            yield from (_parquet if found == "parquet" else _arrow)(path, name, text_field)
        elif found == "jsonl":
            yield from _json(_blocks(stream), name, text_field, tally)
        elif found == "text":
            yield from _text(_blocks(stream), name, one_per_file, tally)
        else:
            yield from _table(_blocks(stream), name, text_field, found == "tsv", tally)


def _blocks(stream: BinaryIO) -> Iterator[bytes]:
    while block := stream.read(BLOCK):
        yield block


def _text(blocks: Iterator[bytes], name: str, one_per_file: bool, tally: Tally) -> Iterator[Text]:
    within, first, doubted = f"{name}, line", True, one_per_file
    for pieces, lines in _between_blank_lines(blocks, None if one_per_file else BLANK_LINE, within, tally):
        for piece, line in zip(pieces, lines, strict=True) if not doubted else ():
            if (first or len(piece) >= LONG_DOCUMENT) and (doubt := _doubt(piece, first)):
                tally.note("doubtful_files", f"{within} {line}: {len(piece) / 1e6:,.1f} MB in one document; {doubt}")
                doubted = True
                break
            first = False
        yield from zip(pieces, repeat(within), lines)


def _between_blank_lines(
    blocks: Iterator[bytes], separator: re.Pattern | None, within: str, tally: Tally
) -> Iterator[tuple[list[bytes], list[int]]]:
    """Documents, cut where they are too long, and the lines where they begin: as many as end in a block."""
    rest, line = b"", 1
    for block in blocks:
        rest += block
        if separator is not None:
            parts = separator.split(rest)  # with what separates them
            lines = list(accumulate((part.count(b"\n") for part in parts), initial=line))
            *whole, rest = parts[::2]
            yield _begun_with_text(whole, lines[:-2:2])
            line = lines[-2]
        while len(rest) > LONGEST_DOCUMENT + BLOCK:
            tally.note("documents_cut", f"{within} {line}")
            cut = where_to_cut(rest)
            yield _begun_with_text([rest[:cut]], [line])
            line += rest.count(b"\n", 0, cut)
            rest = rest[cut:]
    yield _begun_with_text([rest], [line])


def _begun_with_text(pieces: list[bytes], lines: list[int]) -> tuple[list[bytes], list[int]]:
    """The same without the white space, perhaps lines of it, before the first, and without the first if it is blank."""
    if pieces and not (text := pieces[0].lstrip()):
        return pieces[1:], lines[1:]
    if pieces and len(text) < len(pieces[0]):
        lines[0] += pieces[0].count(b"\n", 0, len(pieces[0]) - len(text))
        pieces[0] = text
    return pieces, lines


def where_to_cut(document: bytes) -> int:
    """Where to cut a document that is too long: at white space, else between two characters."""
    space = max(document.rfind(mark, LONGEST_DOCUMENT // 2, LONGEST_DOCUMENT) for mark in (b" ", b"\n"))
    cut = space if space > 0 else LONGEST_DOCUMENT
    while cut > LONGEST_DOCUMENT - 4 and document[cut] & 0xC0 == 0x80:  # a continuation byte of UTF-8
        cut -= 1
    return cut


def _doubt(document: bytes, first: bool) -> str | None:
    """Why a document of a text file is perhaps none, and what to do; None where it looks like one."""
    if first and JSON_BEGINS.match(document):
        return "it holds JSON objects: name it .jsonl, or give the format jsonl"
    if len(document) < LONG_DOCUMENT:
        return None
    ends = document.count(b"\n")
    if document.count(b"\r") - document.count(b"\r\n") > ends:
        return "its lines end with carriage returns alone: make line feeds of them, as by tr '\\r' '\\n'"
    for end, which in LINE_ENDS.items():
        if document.count(end) > ends:
            return f"its lines end with {which}: make line feeds of them"
    text = document.decode("utf-8", "replace")
    if blank := LOOKS_BLANK.search(text):
        return f"lines that look blank hold U+{ord(blank[1]):04X}: make them empty"
    lines = text.split("\n", 8)[:8]
    for mark, kind in ((",", "csv"), ("\t", "tsv")):
        if len(lines) > 2 and lines[0].count(mark) and len({line.count(mark) for line in lines[:-1]}) == 1:
            return f"its lines look like those of a table: name it .{kind}, or give the format {kind}"
    return "there is no blank line in it: put one between documents, or read it as one document a file"


def _json(blocks: Iterator[bytes], name: str, field: str, tally: Tally) -> Iterator[Text]:
    within = {place: f"{name}, {place}" for place in ("line", "element")}
    for place, number, value in _json_values(blocks):
        try:
            text = _text_in(value, field)
        except ValueError as error:
            tally.note("invalid_json", f"{within[place]} {number}: {error}")
        else:
            yield text, within[place], number


def _json_values(blocks: Iterator[bytes]) -> Iterator[tuple[str, int, object]]:
    """The values of JSON lines, errors among them, or of what a file of up to 64 MiB is: an array, or one object."""
    begun = [next(blocks, b"")]
    if not isinstance(_parsed(begun[0].lstrip().partition(b"\n")[0]), dict):
        while sum(map(len, begun)) <= LONGEST_JSON_LINE and (block := next(blocks, None)):
            begun.append(block)
        whole = b"".join(begun)
        value = _parsed(whole) if len(whole) <= LONGEST_JSON_LINE else None
        if isinstance(value, (list, dict)):
            for number, element in enumerate(value if isinstance(value, list) else [value], 1):
                yield "element", number, element
            return
    for number, line in enumerate(_lines(chain(begun, blocks)), 1):
        if line is None:
            yield "line", number, ValueError("longer than 64 MiB")
        elif line.strip():
            yield "line", number, _parsed(line)


def _parsed(line: bytes) -> object:
    """The value of a line of JSON, or a ValueError that says why it is none."""
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        return ValueError(not_utf8(error))
    except json.JSONDecodeError as error:
        return ValueError(f"no JSON: {error.msg}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        return ValueError(str(error))


def _text_in(value: object, field: str) -> bytes:
    """The text of a JSON record; ValueError that says why there is none."""
    if isinstance(value, ValueError):
        raise value
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    text = _at(value, field)
    if text is ABSENT:
        raise ValueError(f"no {field!r}, but {shortened(_names(value)) or 'nothing'}")
    if not isinstance(text, str):
        raise ValueError(f"{field!r} is {json.dumps(text)[:20]}, no text")
    return text.encode("utf-8", "surrogatepass")


ABSENT = object()


def _at(value: dict, field: str) -> object:
    """What ``field`` names: a key, or, where there is no such key, a path as "meta.text"; ABSENT if nothing."""
    if field in value:
        return value[field]
    inner = ((key, item) for key, item in value.items() if isinstance(item, dict) and field.startswith(f"{key}."))
    found = (_at(item, field[len(key) + 1 :]) for key, item in inner)
    return next((item for item in found if item is not ABSENT), ABSENT)


def _names(value: dict, before: str = "") -> Iterator[str]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _names(item, f"{before}{key}.")
        else:
            yield f"{before}{key}"


def shortened(names: Iterable[str]) -> str:
    """The first ten of ``names``, in one line."""
    names = [name if len(name) <= 40 else f"{name[:37]}..." for name in names]
    return ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes | None]:
    """Lines without their line feed; None for one that is longer than 64 MiB."""
    parts: list[bytes] = []
    size, too_long = 0, False
    for block in blocks:
        first, *more = block.split(b"\n")
        for part, ends in [(first, bool(more))] + [(p, i < len(more) - 1) for i, p in enumerate(more)]:
            size += len(part)
            too_long = too_long or size > LONGEST_JSON_LINE
            if too_long:
                parts.clear()
            else:
                parts.append(part)
            if ends:
                yield None if too_long else b"".join(parts)
                parts, size, too_long = [], 0, False
    yield None if too_long else b"".join(parts)


def _table(blocks: Iterator[bytes], name: str, field: str, tabs: bool, tally: Tally) -> Iterator[Text]:
    """Rows of the column that the first row names ``field``. In .tsv a quotation mark is a character like others."""
    rows = _rows(blocks, name, tabs)
    within, (_, header) = f"{name}, line", next(rows, (1, []))
    if header:
        _require_column(name, field, header)
    for number, row in rows:
        if len(row) == len(header):
            yield row[header.index(field)].encode("utf-8", "surrogateescape"), within, number
        else:
            tally.note("invalid_rows", f"{within} {number}: {len(row)} columns, the header has {len(header)}")


def _require_column(name: str, field: str, columns: Sequence[str]) -> None:
    """ValueError where not exactly one of ``columns`` is called ``field``."""
    if (number := columns.count(field)) != 1:
        what = f"{number} columns" if number else "no column"
        raise ValueError(
            f"{name}: {what} {field!r}; its columns are {shortened(columns)}: name one as the text field (--text-field)"
        )


def _rows(blocks: Iterator[bytes], name: str, tabs: bool) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, each with the line where it begins; bytes that are not UTF-8 are surrogates."""
    lines = _text_lines(blocks, name)
    if tabs:
        rows = ((number, line.rstrip("\r\n")) for number, line in lines)
        yield from ((number, row.split("\t")) for number, row in rows if row)
        return
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_JSON_LINE))  # of the process: raised, never lowered
    reader = csv.reader((line for _, line in lines), strict=True)
    while True:
        begin = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{name}, the row from line {begin} on: {error}") from error
        if row is None:
            return
        if row:
            yield begin, row


def _text_lines(blocks: Iterator[bytes], name: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(_lines(blocks), 1):
        if line is None:
            raise ValueError(f"{name}, line {number}: longer than 64 MiB")
        yield number, (line.removeprefix(BOM) if number == 1 else line).decode("utf-8", "surrogateescape") + "\n"


def _parquet(path: Path, name: str, field: str) -> Iterator[Text]:
    pyarrow, parquet = extras.load("pyarrow"), extras.load("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            _column_names(file.schema_arrow, name, field)
            yield from _column(file.iter_batches(batch_size=256, columns=[field]), name, field)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
        raise ValueError(f"{name}: cannot be read as Parquet: {error}") from error


def _arrow(path: Path, name: str, field: str) -> Iterator[Text]:
    """Of a stream, as `datasets` saves it, or a file of Arrow; mapped, so that its batches take no memory."""
    pyarrow, ipc = extras.load("pyarrow"), extras.load("pyarrow.ipc")
    try:
        with pyarrow.memory_map(str(path)) as file:
            of_file = file.read(len(COLUMNAR["arrow"])) == COLUMNAR["arrow"]
            file.seek(0)
            reader = ipc.open_file(file) if of_file else ipc.open_stream(file)
            _column_names(reader.schema, name, field)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if of_file else reader
            yield from _column(batches, name, field)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
        raise ValueError(f"{name}: cannot be read as Arrow: {error}") from error


def _column(batches: Iterable, name: str, field: str) -> Iterator[Text]:
    """The texts in column ``field`` of batches or tables of Arrow; no value is an empty text."""
    compute, within, number = extras.load("pyarrow.compute"), f"{name}, row", 0
    for batch in batches:
        top, *inner = _column_names(batch.schema, name, field)
        column = batch.column(batch.schema.get_field_index(top))
        if inner:
            column = compute.struct_field(column, inner)
        for value in _as_bytes(column, name, field):
            number += 1
            yield value.as_buffer().to_pybytes() if value.is_valid else b"", within, number


def _column_names(schema: Iterable, name: str, field: str) -> tuple[str, ...]:
    """The names, from the outermost, of the column that ``field`` names: a whole name before a path."""
    columns = sorted(_columns(schema), key=lambda column: len(column[1]))
    first = next((column for column in columns if column[0] == field), None)
    _require_column(name, field, [column[0] for column in columns if column[0] != field or column == first])
    assert first is not None  # required above
    return first[1]


def _as_bytes(column, name: str, field: str):
    """A column of text as one of bytes; ValueError where it is no text."""
    pyarrow = extras.load("pyarrow")

    try:
        return column.cast(pyarrow.binary())
    except pyarrow.ArrowNotImplementedError as error:
        raise ValueError(f"{name}: the column {field!r} holds {column.type}, no text: name another one") from error


def _columns(fields: Iterable, before: tuple[str, ...] = ()) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The columns of an Arrow schema: of structs what is in them, as "meta.text"."""
    pyarrow = extras.load("pyarrow")

    for field in fields:
        names = (*before, field.name)
        if pyarrow.types.is_struct(field.type):
            yield from _columns(field.type, names)
        else:
            yield ".".join(names), names


def not_utf8(error: UnicodeDecodeError, start: int = 0) -> str:
    """What is not UTF-8, in words; ``start`` is where counting bytes begins."""
    before = error.object[max(start, error.start - 20) : error.start].decode("utf-8", "ignore")
    after = f" after {before!r}" if before else ""
    return f"not UTF-8 at its byte {error.start - start} (0x{error.object[error.start]:02X}{after})"
