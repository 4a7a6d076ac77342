"""What the commands that read a corpus share: their arguments, and how far they are."""

import argparse
from collections.abc import Iterable
from pathlib import Path

PACKED_SUFFIXES = {".gz", ".bz2", ".zst", ".zstd", ".parquet"}


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """CORPUS..., --one-per-file and --text-field."""
    parser.add_argument(
        "corpus",
        nargs="+",
        metavar="CORPUS",
        help="files, folders or 'patterns': text with a blank line between documents, JSON lines, Parquet; "
        "plain, .gz, .bz2 or .zst",
    )
    parser.add_argument("--one-per-file", action="store_true", help="a text file is one document")
    parser.add_argument(
        "--text-field", metavar="NAME", default="text", help="key (JSON lines) or column (Parquet) of the text"
    )


def corpus_files(paths: list[str], *, without: Iterable[Path] = ()) -> list[Path]:
    """The files of the corpus, but for those in ``without`` (see :func:`bert_fast.data.expand_paths`).

    ValueError for one that is no text in UTF-8: programs, pictures, UTF-16.
    """
    from bert_fast.data import expand_paths

    files = expand_paths(paths, without=without)
    for path in files:
        if path.suffix.lower() in PACKED_SUFFIXES:
            continue  # their readers tell
        with path.open("rb") as file:
            head = file.read(1 << 16)
        if head.count(0) > len(head) // 100:  # a stray NUL is removed and counted; this many are no text
            raise ValueError(f"{path} is not text in UTF-8: {head.count(0):,} of its first {len(head):,} bytes are NUL")
    return files


def corpus_bytes(files: list[Path]) -> int | None:
    """The bytes of text that ``files`` hold, None where only unpacking would tell."""
    if any(path.suffix.lower() in PACKED_SUFFIXES for path in files):
        return None
    return sum(path.stat().st_size for path in files)
