"""``bert-fast fill-mask``: the most probable tokens for each [MASK]."""

import argparse
import sys
from collections.abc import Iterator

from bert_fast.cli import FAILED
from bert_fast.cli.device import add_device_argument, chosen_device
from bert_fast.cli.lines import decoded, numbered_lines
from bert_fast.cli.model import add_model_argument
from bert_fast.cli.numbers import positive
from bert_fast.output import Output, add_command
from bert_fast.text import well_formed


def add_parser(subparsers) -> None:
    """Adds the command."""
    parser = add_command(
        subparsers,
        "fill-mask",
        run,
        "fill the [MASK]s of a text",
        details="MODEL is a run of `bert-fast pretrain`, still going or not, or any Hugging Face folder with a BERT. "
        "The command names a text that it cannot fill by its number and goes on; the exit code is then 1. [SEP] and "
        "other special tokens in a text are such tokens, as in transformers.",
        examples="""
bert-fast fill-mask run "The animal didn't cross the street because the [MASK] was too tired."
bert-fast fill-mask run --top-k 10 < texts.txt
bert-fast fill-mask path/to/bert-base-uncased "Paris is the [MASK] of France." --json""",
    )
    add_model_argument(parser)
    parser.add_argument("text", metavar="TEXT", nargs="*", help="texts with [MASK] (default: the lines of stdin)")
    parser.add_argument("--top-k", metavar="K", type=positive, default=5, help="tokens to show for each [MASK]")
    add_device_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Prints the tokens; names a text that fails by its number, and fills the others."""
    from bert_fast import BertForMaskedLM
    from bert_fast.use.inference import load_model

    out = Output.of(options)
    model, tokenizer, _ = load_model(BertForMaskedLM, options.model, device=chosen_device(options), output=out)
    number, failed = 0, 0
    for number, where, given in _texts(options, out):
        try:
            _fill(options, out, model, tokenizer, where, given)
        except ValueError as error:
            failed += 1
            text = given.decode("utf-8", "replace") if isinstance(given, bytes) else well_formed(given)[0]
            out.error({"number": number, "text": text, "error": str(error)}, f"{where}: {error}")
    if not number:
        raise ValueError("no text: the input is empty")
    return FAILED if failed else 0


def _texts(options: argparse.Namespace, out: Output) -> Iterator[tuple[int, str, str | bytes]]:
    """(number, what it is the number of, text) of the arguments, or of stdin's lines that are not blank."""
    if options.text:
        for number, text in enumerate(options.text, 1):
            yield number, f"text {number}", text
        return
    for number, line in numbered_lines(sys.stdin.buffer, "stdin", out):
        if line.strip():
            yield number, f"line {number}", line


def _fill(options: argparse.Namespace, out: Output, model, tokenizer, where: str, given: str | bytes) -> None:
    from bert_fast.use.inference import fill_mask

    text, replaced = well_formed(decoded(given, "it") if isinstance(given, bytes) else given)
    masks = fill_mask(model, tokenizer, text, options.top_k)
    if replaced:
        out.warn(f"{where}: {replaced} bytes that are not UTF-8 became U+FFFD")
    lines = [text]
    for number, candidates in enumerate(masks, 1):
        if len(masks) > 1:
            lines.append(f"[MASK] {number}")
        lines += [f"  {100 * c.probability:5.1f} %  {c.token}" for c in candidates]
    out.result({"text": text, "masks": [[c._asdict() for c in candidates] for candidates in masks]}, "\n".join(lines))
