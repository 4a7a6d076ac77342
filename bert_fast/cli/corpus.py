"""What the commands that read a corpus share: their arguments, and how far they are."""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from bert_fast.output import Output

MUCH = 0.005  # a share of the characters that is worth a warning
STRIPPED = (
    "are, or have, a vowel sign or another mark that is stripped with the accents, as in Hindi, Thai, Ukrainian or "
    "Japanese, and words become alike: `bert-fast tokenizer --keep-accents` keeps them"
)


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """CORPUS..., --one-per-file, --text-field and --format."""
    parser.add_argument(
        "corpus",
        nargs="+",
        metavar="CORPUS",
        help="files, folders or 'patterns': text with a blank line between documents, JSON lines (.jsonl, .ndjson, "
        ".json), tables with a header (.csv, .tsv), Parquet; plain, .gz, .bz2 or .zst; a folder of `datasets` "
        "(save_to_disk, or a clone of its repository); - for stdin; hf://NAME[:CONFIG][@SPLIT][?revision=REVISION] "
        "streams from the Hub",
    )
    parser.add_argument("--one-per-file", action="store_true", help="a text file is one document")
    parser.add_argument(
        "--text-field",
        metavar="NAME",
        default="text",
        help="key (JSON) or column of the text; meta.text is what is in the object or struct meta",
    )
    parser.add_argument(
        "--format",
        choices=("text", "jsonl", "csv", "tsv", "parquet", "arrow"),
        help="of all the files (default: what the name of each says, text where it says nothing, as of stdin)",
    )


def reading(options: argparse.Namespace) -> dict:
    """The arguments of :func:`bert_fast.data.stream_documents` that the options give."""
    return {"one_per_file": options.one_per_file, "text_field": options.text_field, "file_format": options.format}


def corpus_files(corpus: str | list[str], file_format: str | None, *, without: Iterable[Path] = ()) -> list[Path]:
    """The files of ``corpus``, but for those in ``without`` (see :func:`bert_fast.data.expand_paths`).

    ValueError for one that is no text in UTF-8: archives, programs, pictures, UTF-16.
    """
    from bert_fast.data import expand_paths
    from bert_fast.data.formats import require_text

    files = expand_paths(corpus, without=without)
    require_text(files, file_format, most_nul=0.01)  # a stray NUL is removed and counted; this many are no text
    return files


def corpus_bytes(files: list[Path]) -> int | None:
    """The bytes of text that ``files`` hold, None where only reading would tell."""
    from bert_fast.data.formats import COLUMNAR, COMPRESSED
    from bert_fast.data.paths import is_pipe

    unlike_text = {*COMPRESSED, *(f".{name}" for name in COLUMNAR)}
    if any(path.suffix.lower() in unlike_text or is_pipe(path) for path in files):
        return None
    return sum(path.stat().st_size for path in files)


@contextmanager
def read_twice(files: list[Path]) -> Iterator[list[Path]]:
    """``files``, temporary copies in place of pipes, which give what they have once."""
    from bert_fast.data.hub_datasets import is_hub
    from bert_fast.data.paths import STDIN, is_pipe

    with tempfile.TemporaryDirectory(prefix="bert-fast-") as folder:

        def copied(number: int, path: Path) -> Path:
            copy = Path(folder, str(number))
            with nullcontext(sys.stdin.buffer) if path == STDIN else path.open("rb") as pipe, copy.open("wb") as file:
                shutil.copyfileobj(pipe, file)
            return copy

        yield [
            copied(number, path) if is_pipe(path) and not is_hub(path) else path for number, path in enumerate(files)
        ]


def tell_share(out: Output, number: int, characters: int, text: str) -> None:
    """Says what of the characters is true of ``number`` of them, if any: a warning where it is much, else a note."""
    if number:
        share = number / characters
        (out.warn if share > MUCH else out.note)(f"{number:,} characters ({share:.2%}) {text}")
