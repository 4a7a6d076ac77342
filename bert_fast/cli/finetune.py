"""``bert-fast finetune``: a pre-trained model learns a task from labelled examples."""

import argparse
import math
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bert_fast.cli import NOT_FINITE
from bert_fast.cli.device import add_device_argument, chosen_device
from bert_fast.cli.model import add_model_argument
from bert_fast.cli.numbers import positive
from bert_fast.output import Output, Progress, add_command, writable_folder

TASKS = (
    "auto",
    "classify",
    "multilabel",
    "regress",
    "tokens",
    "qa",
    "choice",
)  # those of bert_fast.tasks.task, which imports torch


def add_parser(subparsers) -> None:
    """Adds the command."""
    parser = add_command(
        subparsers,
        "finetune",
        run,
        "train a pre-trained model for a task, from labelled examples",
        details="Measures on the validation examples after each epoch, keeps the best epoch, and writes a Hugging Face "
        "folder. The task is guessed from the examples: words with tags (columns as CoNLL's in .conll, .conllu, "
        ".iob, .bio or .txt; tokens and tags or ner_tags) are learnt as tokens, SQuAD's .json and its fields as qa, "
        "endings or choices as choice, labels that are lists as multilabel, numbers of which some have a fraction as "
        "regress, others as classify. Other files are .tsv, .csv, .jsonl or .parquet. Columns of a table are "
        "named (the first line is then a header), or numbered from 0 (there is none), -1 being the last; by default "
        "text is the first column and label the last, of JSON lines and Parquet those of that name. Labels that are "
        "one value, as 1 and 1.0, are one class. A head that MODEL has keeps its rows for the labels that it names. "
        "[SEP] and other special tokens in a text are such tokens, as in transformers. While it trains, --out holds "
        "checkpoints: the same command goes on from the last one.",
        examples="""
bert-fast finetune run --train sst2/train.tsv --validation sst2/dev.tsv --out sentiment
bert-fast finetune run --train mnli.csv --validation dev.csv --text premise --pair hypothesis --label gold --out nli
bert-fast finetune run --train train.conll --validation dev.conll --out names
bert-fast finetune run --train train-v2.0.json --validation dev-v2.0.json --out answers
bert-fast finetune run --train swag/train.csv --validation swag/val.csv --out choices
bert-fast finetune run --train train.tsv --validation dev.tsv --seeds 5 --patience 2
bert-fast finetune run --train train.tsv --validation dev.tsv --from-scratch    # what pre-training is worth""",
    )
    add_model_argument(parser)
    parser.add_argument("--train", metavar="FILE", required=True, help="examples to learn from")
    parser.add_argument("--validation", metavar="FILE", required=True, help="examples to measure on")
    parser.add_argument("--out", metavar="DIR", help="where the model goes (default: it is measured, not kept)")
    parser.add_argument("--task", choices=TASKS, default="auto", help="what is learnt")
    parser.add_argument("--text", metavar="COLUMN", help="column or key of the sentence, or of the words")
    parser.add_argument("--pair", metavar="COLUMN", help="column or key of the second sentence of a pair")
    parser.add_argument(
        "--label", metavar="COLUMN", action="append",
        help="column or key of the label, or of the tags; given several times, columns of 0 and 1 whose names are "
        "the labels",
    )  # fmt: skip
    parser.add_argument("--epochs", metavar="N", type=float, default=3.0, help="times through the examples")
    parser.add_argument("--batch-size", metavar="N", type=positive, default=32, help="examples an update")
    parser.add_argument("--lr", metavar="LR", type=float, default=3e-5, help="highest learning rate")
    parser.add_argument("--warmup", metavar="SHARE", type=float, default=0.1, help="share of updates to warm up")
    parser.add_argument("--seq", metavar="N", type=int, help="tokens of a sequence, to which examples are cut, "
                        "or in windows of which they are read (default: 128, of qa 384)")  # fmt: skip
    parser.add_argument("--dropout", metavar="P", type=float, help="dropout while it learns (default: the model's)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the new weights, the order and dropout")
    parser.add_argument("--seeds", metavar="N", type=positive, default=1, help="train so often, from --seed on; the "
                        "command prints mean and deviation, and keeps the best")  # fmt: skip
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of products and "
                        "hidden states; auto: bf16 where the device multiplies it in hardware")  # fmt: skip
    parser.add_argument("--patience", metavar="N", type=positive, help="stop after N epochs that are no better than "
                        "the best")  # fmt: skip
    parser.add_argument("--keep", choices=("best", "last"), default="best", help="which epoch is kept")
    parser.add_argument("--layer-decay", metavar="X", type=float, default=1.0, help="each layer learns at X times the "
                        "rate of the one above it")  # fmt: skip
    parser.add_argument("--reinit-layers", metavar="N", type=int, default=0, help="draw the N top layers and the "
                        "pooler anew")  # fmt: skip
    parser.add_argument("--class-weights", metavar="W", help="balanced, or LABEL=WEIGHT,...: what each label's loss is "
                        "multiplied by (classify)")  # fmt: skip
    parser.add_argument("--overlap", metavar="N", type=int, help="pieces that windows over a long text share (tokens, "
                        "qa; default: 128, at most half a window)")  # fmt: skip
    parser.add_argument("--longest-answer", metavar="N", type=positive, help="pieces of an answer, at most (qa; "
                        "default: 30)")  # fmt: skip
    parser.add_argument("--checkpoint-every", metavar="N", type=positive, help="updates (default: an epoch)")
    parser.add_argument("--from-scratch", action="store_true", help="random weights in place of the model's")
    add_device_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Trains, measures, saves."""
    from bert_fast.tasks.training import Stopped

    try:
        _finetune(options)
    except Stopped as stop:
        print(f"bert-fast finetune: {stop}", file=sys.stderr)
        return 128 + stop.signal
    except FloatingPointError as error:
        print(f"bert-fast finetune: error: {error}", file=sys.stderr)
        return NOT_FINITE
    return 0


def _finetune(options: argparse.Namespace) -> None:
    if not 0 < options.epochs < math.inf or not 0 <= options.lr < math.inf or not 0 <= options.warmup < 1:
        raise ValueError("--epochs must be above 0, --lr at least 0 (and both finite), --warmup from 0 to below 1")
    from bert_fast.tasks.finetuning import finetune, read_task
    from bert_fast.use.inference import model_folder

    out = Output.of(options)
    columns = {"text": options.text, "pair": options.pair, "label": options.label}
    task, train, validation = read_task(
        options.task, options.train, options.validation, columns=columns, class_weights=_weights(options.class_weights),
        overlap=options.overlap, longest_answer=options.longest_answer,
    )  # fmt: skip
    if options.task == "auto":
        out.note(f"the task is {task.name}, by the examples (--task says otherwise)")
    model = model_folder(options.model, out)
    if options.out is not None:
        folder = Path(options.out)
        if folder.resolve() == model.resolve() or (folder / "metrics.jsonl").is_file():
            raise ValueError(f"--out {folder} holds a run, or the model that is fine-tuned: choose another folder")
        writable_folder(folder)
    with ExitStack() as stack:
        bar = Progress(None, "", "")

        def shown(step: int, steps: int, loss: float) -> None:
            nonlocal bar
            if step == 1 or bar.total is None:  # of a seed, or of a run that goes on
                stack.close()
                bar = stack.enter_context(out.progress(steps, "fine-tuning", "updates", done=step - 1))
            bar.update(step, f"loss {loss:.4f}", loss=loss)

        found = finetune(
            model, train, validation, options.out, task=task, epochs=options.epochs, batch_size=options.batch_size,
            learning_rate=options.lr, warmup=options.warmup, layer_decay=options.layer_decay,
            reinit_layers=options.reinit_layers, keep=options.keep, patience=options.patience, max_length=options.seq,
            dropout=options.dropout, seed=options.seed, seeds=options.seeds, precision=options.precision,
            device=chosen_device(options), from_scratch=options.from_scratch,
            checkpoint_every=options.checkpoint_every, on_step=shown,
            on_epoch=lambda measures: out.note(_epoch(task, measures)), on_note=out.note, on_warning=out.warn,
        )  # fmt: skip
    out.result({"model": options.model, "out": options.out, "from_scratch": options.from_scratch} | found,
               _text(task, found, options))  # fmt: skip


def _weights(text: str | None) -> str | dict[str, float] | None:
    """--class-weights; ValueError where it is neither "balanced" nor pairs."""
    if text is None or text == "balanced":
        return text
    pairs = [part.rpartition("=") for part in text.split(",")]
    try:
        return {name: float(weight) for name, _, weight in pairs}
    except ValueError as error:
        raise ValueError(f"--class-weights must be balanced or LABEL=WEIGHT,LABEL=WEIGHT,..., got {text!r}") from error


def _epoch(task: Any, measures: dict) -> str:
    told = f"{task.told(measures)}, " if task.metric in measures else ""
    return f"epoch {measures['epoch']:g}: {told}loss {measures['loss']:.4f}"


def _text(task: Any, found: dict, options: argparse.Namespace) -> str:
    """What is printed in the end."""
    lines = [f"{task.told(found)} on {found['examples']:,} examples, after {found['epochs']:g} epochs"]
    if "majority" in found:
        lines[0] += f" (the most frequent label: {100 * found['majority']:.2f} %)"
    if "chance" in found:
        lines[0] += f" (guessing: {100 * found['chance']:.2f} %)"
    if found["best_epoch"] != found["epochs"]:
        lines.append(f"the best epoch is kept, {found['best_epoch']:g}")
    measures = found["history"][-1].keys() - {"epoch", "step", "loss", "train_loss", task.metric}
    if others := [f"{name} {found[name]:.4f}" for name in found if name in measures and isinstance(found[name], float)]:
        lines.append(", ".join(others))
    if "seeds" in found:
        seeds = found["seeds"]
        lines.append(
            f"{seeds['metric']} of {len(seeds['values'])} seeds: {seeds['mean']:.4f}, deviation "
            f"{seeds['deviation']:.4f}; the best one is kept"
        )
    if found["precision"] == "bf16":
        lines.append("trained and measured in bfloat16; predict and evaluate are in float32 unless --precision bf16")
    if told := _of_the_examples(task, found):
        lines.append(told)
    if options.out is not None:
        lines.append(f"{options.out}: the model, as a Hugging Face folder")
    return "\n".join(lines)


def _of_the_examples(task: Any, found: dict) -> str:
    """What of the examples was cut, is empty or stands in both files; empty where nothing."""
    counts = {
        **{
            f"{part} {what.format(seq=found['seq'])}": found.get(name, {}).get(key)
            for name, what in task.counted.items()
            for part, key in (("training", "train"), ("validation", "validation"))
        },
        "empty texts": found.get("empty"),
        "validation examples with texts of training examples": found.get("shared"),
    }
    return "; ".join(f"{number:,} {what}" for what, number in counts.items() if number)
