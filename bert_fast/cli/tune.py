"""``bert-fast tune``: which kernels are the fastest for a run on this machine, decided and shown."""

import argparse
import sys

from bert_fast.cli.pretrain import add_options
from bert_fast.output import Output, add_command
from bert_fast.run.config import ConfigError, resolve

OPTIONS = (
    "data", "model", "init_from", "dropout", "seq", "batch_size", "phases", "micro_tokens", "nsp", "mask_prob",
    "device", "precision", "attention",
)  # fmt: skip


def add_parser(subparsers) -> None:
    """Adds the command."""
    parser = add_command(
        subparsers,
        "tune",
        run,
        "choose the fastest kernels for a run on this GPU, and show what was tried",
        details="`bert-fast pretrain` does the same at the start of each phase, and finds what was decided here. What "
        "was decided before is shown; --again decides anew. Needs a GPU.",
        examples="bert-fast tune --data data --model base --seq 512\nbert-fast tune --config run/config.json --again",
    )
    parser.add_argument("--config", metavar="FILE", help="file with options of pretrain; flags override it")
    parser.add_argument("--again", action="store_true", help="decide anew what was decided before")
    add_options(parser, OPTIONS)


def run(options: argparse.Namespace) -> int:
    """Decides and prints the table."""
    flags = {name: value for name, value in vars(options).items() if name in OPTIONS}
    try:
        config = resolve({"out": "none", **flags, "tune": "again" if options.again else "auto"}, options.config)
        from bert_fast.run.tune import tune

        tune(config, Output.of(options))
    except ConfigError as error:
        print(f"bert-fast tune: error: {error} (see bert-fast tune --help)", file=sys.stderr)
        return 2
    return 0
