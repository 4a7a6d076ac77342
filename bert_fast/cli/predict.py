"""``bert-fast predict``: what a fine-tuned model says of new examples."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from bert_fast.cli.device import add_device_argument, chosen_device
from bert_fast.cli.lines import decoded, numbered_lines
from bert_fast.cli.model import add_model_argument
from bert_fast.cli.numbers import positive
from bert_fast.output import Output, add_command, writable_folder

ESCAPED = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


def add_parser(subparsers) -> None:
    """Adds the command."""
    parser = add_command(
        subparsers,
        "predict",
        run,
        "say labels, scores, entities or answers of new examples with a fine-tuned model",
        details="MODEL is a folder of `bert-fast finetune`, or any Hugging Face BERT with a head; its config.json says "
        "what it predicts. The input is text, an example a line, or a .tsv, .csv, .jsonl or .parquet file without "
        "labels, as `finetune` reads it with them: of tables the first column, of JSON lines the key text, if --text "
        'names no other. Results come in its order, as JSON lines {"kind": "prediction", "index", ...} or as a table. '
        "Any number of examples in bounded memory, packed by length, without padding. A line that is no example ends "
        "the command with its number, after the predictions of those before it.",
        examples="""
bert-fast predict sentiment reviews.txt
cut -f1 reviews.tsv | bert-fast predict sentiment --format tsv --quiet
bert-fast predict nli pairs.csv --text premise --pair hypothesis --out nli.jsonl --top-k 1
bert-fast predict names article.txt        # a model of tokens: its entities, with their characters
bert-fast predict answers squad.json       # a model of qa; or JSON lines with question and context""",
    )
    add_model_argument(parser)
    parser.add_argument("file", metavar="FILE", nargs="?", default="-", help="examples; - is stdin")
    parser.add_argument(
        "--read-as",
        choices=("text", "tsv", "csv", "jsonl", "conll"),
        help="the form of the examples (default: by FILE's name, else text)",
    )
    parser.add_argument("--text", metavar="COLUMN", help="column or key of the text, as in finetune")
    parser.add_argument("--pair", metavar="COLUMN", help="column or key of the second text of a pair")
    parser.add_argument("--format", choices=("jsonl", "tsv"), default="jsonl", help="of the predictions")
    parser.add_argument("--out", metavar="FILE", help="written whole or not at all (default: stdout)")
    parser.add_argument("--top-k", metavar="K", type=positive, help="the K most probable labels alone")
    parser.add_argument(
        "--threshold",
        metavar="X",
        type=float,
        help="of multilabel the lowest probability of a label that is given (default: 0.5); of qa how far having no "
        "answer must score above the best answer to be given (default: as learnt)",
    )
    parser.add_argument(
        "--seq",
        metavar="N",
        type=int,
        help="cut examples to N tokens, or read them in windows of N (default: as in fine-tuning, else its positions)",
    )
    parser.add_argument("--batch-tokens", metavar="N", type=positive, default=8192, help="tokens of a packed batch")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of matrix products")
    add_device_argument(parser)


def run(options: argparse.Namespace) -> None:
    """Predicts and writes."""
    from bert_fast.data.files import written_aside
    from bert_fast.tasks.trained import load_trained, predict

    out = Output.of(options)
    if options.json and options.format == "tsv" and options.out is None:
        raise ValueError("--json fills stdout with JSON lines: give a table a file with --out")
    if options.out is not None:
        writable_folder(Path(options.out).parent)
    trained = load_trained(
        options.model, max_length=options.seq, device=chosen_device(options), output=out, threshold=options.threshold
    )
    counts: Counter[str] = Counter()
    with (
        nullcontext(sys.stdin.buffer) if options.file == "-" else open(options.file, "rb") as stream,
        written_aside(Path(options.out)) if options.out else nullcontext() as file,
        out.progress(None, "predicting", "examples") as bar,
    ):
        write = _writer(options, out, file)
        examples = trained.task.unlabelled(_source(options, out, stream), text=options.text, pair=options.pair)
        found = predict(trained, examples, tokens=options.batch_tokens, bf16=options.precision == "bf16", counts=counts)
        for example, prediction in found:
            write(_top(trained.task.line(example, prediction), options.top_k))
            bar.advance()
        count = int(bar.done)
        if not count:
            raise ValueError("no examples: the input is empty")
    told = "; ".join(filter(None, (f"{count:,} predictions of {trained.task.name}", trained.told(counts))))
    facts = {"task": trained.task.name, "examples": count, "seq": trained.max_length, "out": options.out}
    if options.out is None and not options.json:  # stdout holds predictions alone
        out.note(told)
    else:
        out.result(facts | counts, f"{options.out}: {told}")


def _source(options: argparse.Namespace, out: Output, stream: Any) -> Any:
    """What examples are read from, as they are read."""
    from bert_fast.tasks.tables import KINDS, WHOLE, Source
    from bert_fast.tasks.words import COLUMNS

    name, suffix = options.file, Path(options.file).suffix.lower()
    known = {*KINDS, *WHOLE, *COLUMNS} - {".txt"}
    kind = f".{options.read_as}" if options.read_as else suffix if suffix in known else ".text"
    if kind in WHOLE:
        return Source(name, kind)
    name = "stdin" if name == "-" else name

    def lines() -> Iterator[str]:
        blank = 0
        for number, line in numbered_lines(stream, name, out):
            blank += not line
            yield decoded(line, f"{name}, line {number}")
        if blank and kind == ".tsv":
            out.warn(
                f"{name}: {blank:,} blank lines, which have no prediction in a table (with --read-as text they have)"
            )

    return Source(name, kind, lines())


def _top(line: dict, count: int | None) -> dict:
    """``line`` with the ``count`` most probable labels, best first."""
    if count is None:
        return line
    if not isinstance(line.get("probabilities"), dict):
        raise ValueError("--top-k is for labels with probabilities, which this task does not have")
    best = sorted(line["probabilities"].items(), key=lambda found: -found[1])[:count]
    return line | {"probabilities": dict(best)}


def _writer(options: argparse.Namespace, out: Output, file: BinaryIO | None) -> Callable[[dict], None]:
    """What writes a prediction: to ``file``, or to stdout."""
    count = 0

    def write(line: dict) -> None:
        nonlocal count
        if options.format == "tsv":
            rows = ([] if count else ["\t".join(line)]) + ["\t".join(map(_cell, line.values()))]
            text = "".join(f"{row}\n" for row in rows)
        else:
            text = json.dumps({"kind": "prediction", "index": count, **line}, ensure_ascii=False) + "\n"
        if file is None:
            print(text, end="", flush=True)
        else:
            file.write(text.encode())
        count += 1

    return write


def _cell(value: Any) -> str:
    """A value of a table: text with backslash escapes, else as JSON."""
    return value.translate(ESCAPED) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
