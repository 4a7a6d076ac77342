"""``bert-fast finetune``: a classifier of sentences or sentence pairs."""

import argparse
import math
import sys
from pathlib import Path

from bert_fast.cli import NOT_FINITE
from bert_fast.cli.device import add_device_argument, chosen_device
from bert_fast.cli.model import add_model_argument
from bert_fast.cli.numbers import positive
from bert_fast.output import Output, add_command, writable_folder


def add_parser(subparsers) -> None:
    """Adds the command."""
    parser = add_command(
        subparsers,
        "finetune",
        run,
        "train a classifier of sentences or sentence pairs from a pre-trained model",
        details="Runs on transformers.Trainer; writes a Hugging Face folder and prints the accuracy on the validation "
        "examples. Files are .tsv, .csv or .jsonl. Columns are named (the first line is then a header), or numbered "
        "from 0 (there is none), -1 being the last; by default text is the first column and label the last. Labels "
        "that are one value, as 1 and 1.0, are one class. A head that MODEL has keeps its rows for the labels that it "
        "names. [SEP] and other special tokens in a text are such tokens, as in transformers.",
        examples="""
bert-fast finetune run --train sst2/train.tsv --validation sst2/dev.tsv --out sentiment
bert-fast finetune run --train mnli.csv --validation dev.csv --text premise --pair hypothesis --label gold --out nli
bert-fast finetune run --train train.tsv --validation dev.tsv --from-scratch    # what pre-training is worth""",
    )
    add_model_argument(parser)
    parser.add_argument("--train", metavar="FILE", required=True, help="examples to learn from")
    parser.add_argument("--validation", metavar="FILE", required=True, help="examples to measure the accuracy on")
    parser.add_argument("--out", metavar="DIR", help="where the classifier goes (default: it is measured, not kept)")
    parser.add_argument("--text", metavar="COLUMN", help="column or key of the sentence")
    parser.add_argument("--pair", metavar="COLUMN", help="column or key of the second sentence of a pair")
    parser.add_argument("--label", metavar="COLUMN", help="column or key of the label")
    parser.add_argument("--epochs", metavar="N", type=float, default=3.0, help="times through the examples")
    parser.add_argument("--batch-size", metavar="N", type=positive, default=32, help="examples an update")
    parser.add_argument("--lr", metavar="LR", type=float, default=3e-5, help="highest learning rate")
    parser.add_argument("--warmup", metavar="SHARE", type=float, default=0.1, help="share of updates to warm up")
    parser.add_argument("--seq", metavar="N", type=int, help="cut examples to N tokens (default: 128)")
    parser.add_argument("--dropout", metavar="P", type=float, help="dropout while it learns (default: the model's)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the new weights, the order and dropout")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of matrix products")
    parser.add_argument("--from-scratch", action="store_true", help="random weights in place of the model's")
    add_device_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Trains, measures, saves."""
    try:
        _finetune(options)
    except FloatingPointError as error:
        print(f"bert-fast finetune: error: {error}", file=sys.stderr)
        return NOT_FINITE
    return 0


def _finetune(options: argparse.Namespace) -> None:
    if not 0 < options.epochs < math.inf or not 0 <= options.lr < math.inf or not 0 <= options.warmup < 1:
        raise ValueError("--epochs must be above 0, --lr at least 0 (and both finite), --warmup from 0 to below 1")
    from bert_fast.use.classification import finetune, read_examples
    from bert_fast.use.inference import model_folder

    out = Output.of(options)
    columns = {"text": options.text, "pair": options.pair, "label": options.label}
    train, validation = (read_examples(path, **columns) for path in (options.train, options.validation))
    model = model_folder(options.model, out)
    if options.out is not None:
        folder = Path(options.out)
        if folder.resolve() == model.resolve() or (folder / "metrics.jsonl").is_file():
            raise ValueError(f"--out {folder} holds a run, or the model that is fine-tuned: choose another folder")
        writable_folder(folder)
    updates = math.ceil(-(-len(train) // options.batch_size) * options.epochs)  # as Trainer counts
    with out.progress(updates, "fine-tuning", "updates") as bar:
        found = finetune(
            model,
            train,
            validation,
            options.out,
            epochs=options.epochs,
            batch_size=options.batch_size,
            learning_rate=options.lr,
            warmup=options.warmup,
            max_length=options.seq,
            dropout=options.dropout,
            seed=options.seed,
            precision=options.precision,
            device=chosen_device(options),
            from_scratch=options.from_scratch,
            on_step=lambda step, steps, loss: bar.update(step, "" if loss is None else f"loss {loss:.4f}", loss=loss),
            on_epoch=lambda m: out.note(f"epoch {m['epoch']:g}: accuracy {100 * m['accuracy']:.2f} %, "
                                        f"loss {m['loss']:.4f}"),
            on_note=out.note,
            on_warning=out.warn,
        )  # fmt: skip
    text = (
        f"accuracy {100 * found['accuracy']:.2f} % on {found['examples']:,} examples, after {found['epochs']:g} epochs "
        f"(the most frequent label: {100 * found['majority']:.2f} %)"
    )
    if told := _of_the_examples(found):
        text += f"\n{told}"
    if options.out is not None:
        text += f"\n{options.out}: the classifier, as a Hugging Face folder"
    out.result({"model": options.model, "out": options.out, "from_scratch": options.from_scratch} | found, text)


def _of_the_examples(found: dict) -> str:
    """What of the examples was cut, is empty or stands in both files; empty where nothing."""
    counts = {
        f"training examples cut to {found['seq']} tokens": found["cut"]["train"],
        f"validation examples cut to {found['seq']} tokens": found["cut"]["validation"],
        "empty texts": found["empty"],
        "validation examples with texts of training examples": found["shared"],
    }
    return "; ".join(f"{number:,} {what}" for what, number in counts.items() if number)
