"""``bert-fast plot``: the losses of runs in one picture."""

import argparse
from pathlib import Path

from bert_fast.output import Output, add_command


def add_parser(subparsers) -> None:
    """Adds the command."""
    parser = add_command(
        subparsers,
        "plot",
        run,
        "draw the losses of one or more runs",
        details="MLM and NSP loss against updates: training smoothed, validation as points. It works on a run that is "
        "still going.",
        examples="""
bert-fast plot run
bert-fast plot run-adamw run-lamb --out compared.svg""",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of `bert-fast pretrain`")
    parser.add_argument(
        "--out", metavar="FILE", help="the picture: .png, .svg or .pdf (default: RUN/loss.png, of several losses.png)"
    )


def run(options: argparse.Namespace) -> None:
    """Draws the picture."""
    from bert_fast.run.plot import plot_runs

    if options.out is not None:
        picture = Path(options.out)
    else:
        picture = Path(options.runs[0], "loss.png") if len(options.runs) == 1 else Path("losses.png")
    plot_runs(options.runs, picture)
    Output.of(options).result({"out": str(picture), "runs": options.runs}, f"{picture}: the losses of "
                              f"{', '.join(options.runs)}")  # fmt: skip
