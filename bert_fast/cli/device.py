"""--device of the commands that run a model."""

import argparse


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --device."""
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto takes a GPU where there is one"
    )


def chosen_device(options: argparse.Namespace) -> str:
    """The device; ValueError for a GPU that torch does not see."""
    import torch

    if options.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU (`bert-fast env` shows what it sees)")
    return options.device
