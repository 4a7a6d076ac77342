"""``bert-fast encode``: sentences to vectors."""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

from bert_fast.cli.device import add_device_argument, chosen_device
from bert_fast.cli.model import add_model_argument
from bert_fast.cli.numbers import positive
from bert_fast.output import Output, add_command, writable_folder


def add_parser(subparsers) -> None:
    """Adds the command."""
    parser = add_command(
        subparsers,
        "encode",
        run,
        "turn sentences into vectors",
        details="One sentence a line, from FILE or stdin; vectors come in the same order. They are the mean over the "
        "last hidden states of all tokens, or that of [CLS]. Any number of sentences in bounded memory, packed by "
        "length, without padding.",
        examples="""
bert-fast encode run sentences.txt --out vectors.npy
cut -f1 reviews.tsv | bert-fast encode run --out vectors.npy --quiet
echo "A sentence." | bert-fast encode path/to/all-MiniLM-L6-v2 --normalize""",
    )
    add_model_argument(parser)
    parser.add_argument("file", metavar="FILE", nargs="?", help="sentences, one a line (default: stdin)")
    parser.add_argument(
        "--out",
        metavar="FILE.npy",
        help='float32 (sentences, hidden), written whole or not at all (default: a line {"kind": "vector", "index", '
        '"vector"} each on stdout)',
    )
    parser.add_argument("--pooling", choices=("mean", "cls"), default="mean", help="what becomes the vector")
    parser.add_argument("--normalize", action="store_true", help="scale vectors to length 1")
    parser.add_argument(
        "--seq", metavar="N", type=int, help="cut sentences to N tokens (default: the model's positions)"
    )
    parser.add_argument("--batch-tokens", metavar="N", type=positive, default=8192, help="tokens of a packed batch")
    add_device_argument(parser)


def run(options: argparse.Namespace) -> None:
    """Encodes and writes."""
    from bert_fast import BertModel
    from bert_fast.inference import load_model

    out = Output.of(options)
    if options.out is not None:
        writable_folder(Path(options.out).parent)
    # no vector reads the pooler, so its weights may be missing
    model, tokenizer, _ = load_model(
        BertModel, options.model, optional=("pooler.",), device=chosen_device(options), output=out
    )
    with open(options.file, "rb") if options.file else nullcontext(sys.stdin.buffer) as stream:
        lines = _sentences(stream, options.file or "stdin")
        count = _encode(options, out, model, tokenizer, lines)
    if not count:
        raise ValueError("no sentences: the input is empty")
    if options.out is not None:
        facts = {"out": options.out, "sentences": count, "hidden": model.config.hidden_size}
        out.result(facts, f"{options.out}: {count:,} vectors of {model.config.hidden_size}")


def _encode(options: argparse.Namespace, out: Output, model, tokenizer, lines: Iterable[str]) -> int:
    """Writes the vectors of ``lines``; how many there were."""
    from bert_fast.inference import encode_sentences

    with out.progress(None, "encoding", "sentences") as bar:

        def arrays():
            for vectors in encode_sentences(
                model, tokenizer, lines, pooling=options.pooling,
                normalize=options.normalize, max_length=options.seq, tokens=options.batch_tokens,
            ):  # fmt: skip
                bar.advance(len(vectors))
                yield vectors

        if options.out is not None:
            return write_npy(Path(options.out), arrays(), model.config.hidden_size)
        count = 0
        for vectors in arrays():
            for vector in vectors.tolist():
                numbers = [float(f"{x:.9g}") for x in vector]  # nine digits tell float32 numbers apart
                out.json_line({"kind": "vector", "index": count, "vector": numbers})
                count += 1
        return count


def _sentences(stream: BinaryIO, name: str) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: line {number} is not UTF-8 text") from error


def write_npy(path: Path, arrays: Iterable, width: int) -> int:
    """Writes float32 ``arrays`` (n, width) one after another as one .npy file and returns the number of rows.

    The file is written aside and renamed, so ``path`` is whole or as it was; no rows leave it as it was.
    """
    import numpy as np

    def header(rows: int) -> None:
        shape = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
        np.lib.format.write_array_header_1_0(file, shape)

    aside = path.with_name(f".{path.name}.{os.getpid()}")
    rows = 0
    try:
        with aside.open("wb") as file:
            header(0)  # padded, so that the right one fits in its place
            begin = file.tell()
            for array in arrays:
                file.write(array.astype("<f4", copy=False).tobytes())
                rows += len(array)
            file.seek(0)
            header(rows)
            if file.tell() != begin:
                raise ValueError(f"{path}: the header of {rows} rows does not fit")
        if rows:
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return rows
