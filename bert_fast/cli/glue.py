"""``bert-fast glue``: GLUE's tasks, several seeds each, beside BERT-base's published scores."""

import argparse
import json
import math
from pathlib import Path

from bert_fast.cli.device import add_device_argument, chosen_device
from bert_fast.cli.model import add_model_argument
from bert_fast.cli.numbers import positive
from bert_fast.output import Output, add_command, writable_folder


def add_parser(subparsers) -> None:
    """Adds the command."""
    parser = add_command(
        subparsers,
        "glue",
        run,
        "fine-tune GLUE's tasks with several seeds: medians beside BERT-base's published scores",
        details="FOLDER has a folder a task (CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, RTE, WNLI, diagnostic), as "
        "GLUE's download script leaves them; tasks whose files are not there are named and left out. Hyperparameters "
        "are those of the BERT paper: batches of 32, 3 epochs, the last one measured, sequences of up to 128 tokens. "
        "The paper takes the best of four learning rates on the development set: --lr 5e-5,4e-5,3e-5,2e-5. With --out "
        "each run is kept as it ends, the same command goes on after a stop, and the table and all numbers are written "
        "to glue.md and glue.json there.",
        examples="""
bert-fast glue run --data glue_data --out glue
bert-fast glue path/to/bert-base-uncased --data glue_data --tasks mrpc,rte,sts-b --seeds 3
bert-fast glue run --data glue_data --lr 5e-5,4e-5,3e-5,2e-5 --out glue-searched""",
    )
    add_model_argument(parser)
    parser.add_argument("--data", metavar="FOLDER", required=True, help="GLUE's files, a folder a task")
    parser.add_argument("--tasks", metavar="NAMES", type=_names, help="with commas between them (default: all)")
    parser.add_argument("--seeds", metavar="N", type=positive, default=5, help="runs of each task, of seeds 0 to N - 1")
    parser.add_argument("--out", metavar="DIR", help="where runs, table and numbers go (default: they are printed)")
    parser.add_argument(
        "--lr", metavar="LR", type=_rates, default=(2e-5,), help="highest learning rate; of several the best of a task"
    )
    parser.add_argument("--epochs", metavar="N", type=float, default=3.0, help="times through the examples")
    parser.add_argument("--batch-size", metavar="N", type=positive, default=32, help="examples an update")
    parser.add_argument("--seq", metavar="N", type=positive, default=128, help="cut examples to N tokens")
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of matrix products, as in finetune"
    )
    add_device_argument(parser)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(rate) for rate in text.split(","))
    except ValueError:
        rates = ()
    if not rates or len({*rates}) < len(rates) or not all(0 < rate < math.inf for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r} is no learning rate above 0, nor several with commas between them")
    return rates


def run(options: argparse.Namespace) -> None:
    """Fine-tunes, prints and writes."""
    if not 0 < options.epochs < math.inf:
        raise ValueError("--epochs must be above 0 and finite")
    from bert_fast.data.files import write_atomically
    from bert_fast.tasks.glue import named_tasks
    from bert_fast.tasks.glue_runs import facts, finetuned, model_digest, run_glue, table
    from bert_fast.use.inference import model_folder

    out = Output.of(options)
    tasks = named_tasks(options.tasks)
    folder = model_folder(options.model, out)
    if options.out is not None:
        writable_folder(options.out)
    settings = {
        "epochs": options.epochs, "batch_size": options.batch_size, "max_length": options.seq,
        "precision": options.precision, "device": chosen_device(options),
    }  # fmt: skip
    fit = finetuned(folder, work=options.out, output=out, **settings)
    done, absent = run_glue(
        fit, options.data, tasks, seeds=options.seeds, rates=options.lr, out=options.out,
        settings=settings | {"model": model_digest(folder)}, output=out,
    )  # fmt: skip
    if not done:
        raise ValueError(f"{options.data} has the files of none of these tasks: {'; '.join(absent.values())}")
    found, text = {"model": options.model, "data": options.data} | settings | facts(done, absent), table(done, absent)
    if options.out is not None:
        write_atomically(Path(options.out, "glue.json"), (json.dumps(found, indent=1) + "\n").encode())
        write_atomically(Path(options.out, "glue.md"), f"# GLUE: {options.model}\n\n{text}\n".encode())
        found |= {"out": options.out}
    out.result(found, text)
