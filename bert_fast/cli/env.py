"""``bert-fast env``: what ``python -m bert_fast.env`` prints, or the same as JSON."""

import argparse

from bert_fast.output import Output, add_command


def add_parser(subparsers) -> None:
    """Adds the command."""
    add_command(
        subparsers,
        "env",
        run,
        "show versions, devices and which backend runs each operator",
        details="The same as `python -m bert_fast.env`.",
        examples="bert-fast env\nbert-fast env --json",
    )


def run(options: argparse.Namespace) -> None:
    """Prints the report."""
    from bert_fast import env

    if options.json:
        Output.of(options).result(env.environment())
    else:
        env.main()
