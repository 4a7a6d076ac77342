"""``bert-fast pretrain``: prepared data to a pre-trained BERT. Its flags are the options of bert_fast.run.config."""

import argparse
import gc
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from bert_fast.output import Output, add_command
from bert_fast.run.config import ConfigError, fields, flag, resolve, several

GROUPS = {
    "data": "data and folders",
    "model": "model",
    "updates": "updates",
    "optimizer": "optimiser and learning rate",
    "device": "device",
    "run": "metrics, validation and checkpoints",
    "sharing": "trackers and the Hugging Face Hub",
}


def add_parser(subparsers) -> None:
    """Adds the command."""
    parser = add_command(
        subparsers,
        "pretrain",
        run,
        "pre-train a BERT on prepared data",
        details="A run that was stopped or killed goes on, exactly where it was, when the same command is given "
        "again. Several GPUs or machines: start it with torchrun (docs/guide/scale.md).",
        examples="bert-fast pretrain --data data --out run --model base --steps 100000\n"
        "bert-fast pretrain --data data --out run --phases 128:900000,512:100000 --checkpoint-every 5000\n"
        "bert-fast pretrain --data data --out run --init-from google-bert/bert-base-uncased --lr 5e-5\n"
        "bert-fast pretrain --data wiki:3 --data clinical:1 --out run\n"
        "bert-fast pretrain --config run/config.json\n"
        "bert-fast pretrain --data data --out run --track wandb --push-to-hub user/name\n"
        "torchrun --nproc-per-node 8 -m bert_fast pretrain --data data --out run --model large --optimizer lamb",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="TOML or JSON file with any of these options; flags override it"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="train nothing and write nothing: say what the run will be, its memory, its measured speed and its end",
    )
    add_options(parser, [field.name for field, _ in fields()])


def add_options(parser: argparse.ArgumentParser, names: Collection[str]) -> None:
    """Adds the flags of the options ``names`` of bert_fast.run.config."""
    groups: dict = {}
    for field, kind in fields():
        if field.name not in names:
            continue
        about = field.metadata
        group = about["group"]
        groups[group] = groups.get(group) or parser.add_argument_group(GROUPS[group])
        text = about["help"].replace("%", "%%")
        if kind is bool:
            text += f" [default: {flag(field.name if field.default else f'no_{field.name}')}]"
        elif field.default not in (None, ""):
            text += f" [default: {field.default}]"
        given = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            given["action"] = argparse.BooleanOptionalAction
        elif several(field):
            given |= {"action": "append", "metavar": about["metavar"]}
        else:
            given |= {"type": kind, "metavar": about["metavar"], "choices": about["choices"]}
        groups[group].add_argument(flag(field.name), **given)


def run(options: argparse.Namespace) -> int:
    """Trains; the exit code is that of :func:`bert_fast.run.pretrain.pretrain`."""
    names = {field.name for field, _ in fields()}
    flags = {name: value for name, value in vars(options).items() if name in names}
    try:
        config = resolve(flags, options.config)
        with collecting_no_garbage():
            from bert_fast.run.pretrain import pretrain
        if options.dry_run:
            from bert_fast.run.dry_run import dry_run

            dry_run(config, Output.of(options))
            return 0
        return pretrain(config, Output.of(options))
    except ConfigError as error:
        print(f"bert-fast pretrain: error: {error} (see bert-fast pretrain --help)", file=sys.stderr)
        return 2


@contextmanager
def collecting_no_garbage() -> Iterator[None]:
    """While torch and transformers are imported for the first time in this process: they make no garbage, and looking
    for it takes long. What they made stays to the end, and later collections, the last ones among them, pass over it.
    Afterwards there may be garbage, which would stay too."""
    if "transformers" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
