"""MODEL of the commands that run one."""

import argparse


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL, which :func:`bert_fast.use.inference.model_folder` finds."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a run's folder (its newest checkpoint, where it has not ended), RUN/checkpoints/step-..., or a Hugging "
        "Face folder",
    )
