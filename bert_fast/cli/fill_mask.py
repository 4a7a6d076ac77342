"""``bert-fast fill-mask``: the most probable tokens for each [MASK]."""

import argparse
import sys

from bert_fast.cli.device import add_device_argument, chosen_device
from bert_fast.cli.model import add_model_argument
from bert_fast.cli.numbers import positive
from bert_fast.output import Output, add_command


def add_parser(subparsers) -> None:
    """Adds the command."""
    parser = add_command(
        subparsers,
        "fill-mask",
        run,
        "fill the [MASK]s of a text",
        details="MODEL is a run of `bert-fast pretrain`, still going or not, or any Hugging Face folder with a BERT.",
        examples="""
bert-fast fill-mask run "The animal didn't cross the street because the [MASK] was too tired."
bert-fast fill-mask run --top-k 10 < texts.txt
bert-fast fill-mask path/to/bert-base-uncased "Paris is the [MASK] of France." --json""",
    )
    add_model_argument(parser)
    parser.add_argument("text", metavar="TEXT", nargs="*", help="texts with [MASK] (default: the lines of stdin)")
    parser.add_argument("--top-k", metavar="K", type=positive, default=5, help="tokens to show for each [MASK]")
    add_device_argument(parser)


def run(options: argparse.Namespace) -> None:
    """Prints the tokens."""
    from bert_fast import BertForMaskedLM
    from bert_fast.inference import fill_mask, load_model

    out = Output.of(options)
    model, tokenizer, _ = load_model(BertForMaskedLM, options.model, device=chosen_device(options), output=out)
    texts = options.text or (line.rstrip("\n") for line in sys.stdin if line.strip())
    text = None
    for text in texts:
        masks = fill_mask(model, tokenizer, text, options.top_k)
        lines = [text]
        for number, candidates in enumerate(masks, 1):
            if len(masks) > 1:
                lines.append(f"[MASK] {number}")
            lines += [f"  {100 * c.probability:5.1f} %  {c.token}" for c in candidates]
        out.result({"text": text, "masks": [[c._asdict() for c in candidates] for candidates in masks]},
                   "\n".join(lines))  # fmt: skip
    if text is None:
        raise ValueError("no text: the input is empty")
