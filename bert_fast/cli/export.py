"""``bert-fast export``: a model for other runtimes."""

import argparse
from pathlib import Path
from typing import Any

from bert_fast.cli.lines import decoded, numbered_lines, warn_of_columns
from bert_fast.cli.model import add_model_argument
from bert_fast.output import Output, add_command

WHAT = ("auto", "encoder", "vectors", "classifier", "tokens", "answers", "words")  # auto, and onnx_export.KINDS


def add_parser(subparsers) -> None:
    """Adds the command."""
    parser = add_command(
        subparsers,
        "export",
        run,
        "write a model for other runtimes: ONNX, also in int8",
        details="By PyTorch's exporter, from transformers' class and the saved weights; batches and texts may have any "
        "size. The graph is compared with this engine on real text, which --data gives, and is refused where they "
        "differ. DIR gets model.onnx, with --int8 model_int8.onnx by ONNX Runtime's dynamic quantisation, the "
        "tokenizer, config.json and export.json, which says what was measured. On --data it measures what int8 "
        "costs: cosine similarity of vectors, the share of answers that stay, and a classifier's accuracy.",
        examples="""
bert-fast export run --onnx encoder
bert-fast export path/to/all-MiniLM-L6-v2 --onnx vectors --int8 --data sentences.txt
bert-fast export sentiment --onnx sentiment-onnx --int8 --data sst2/dev.tsv
bert-fast export run --what vectors --pooling mean --normalize --onnx vectors""",
    )
    add_model_argument(parser)
    parser.add_argument("--onnx", metavar="DIR", required=True, help="where the graph goes, a new folder")
    parser.add_argument(
        "--what",
        choices=WHAT,
        default="auto",
        help="hidden states, vectors with pooling and scaling inside, or what a head says; auto: vectors of a folder "
        "of sentence-transformers, a fine-tuned model's head, else encoder",
    )
    parser.add_argument("--int8", action="store_true", help="also in int8")
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="what to compare on: a text a line, or of a classifier labelled examples (.tsv, .csv, .jsonl, .parquet, "
        "read as by finetune) (default: sentences of the Python language reference)",
    )
    parser.add_argument("--text", metavar="COLUMN", help="column or key of the text")
    parser.add_argument("--pair", metavar="COLUMN", help="column or key of the second text of a pair")
    parser.add_argument("--label", metavar="COLUMN", help="column or key of the label")
    parser.add_argument("--seq", metavar="N", type=int, help="cut texts to N tokens (default: the model's)")
    parser.add_argument("--pooling", help="of vectors, as in encode (default: the model's, else mean)")
    parser.add_argument("--normalize", action=argparse.BooleanOptionalAction, help="scale vectors to length 1")
    parser.add_argument("--prompt", metavar="TEXT", help="goes before each text (default: the model's, if any)")
    parser.add_argument("--prompt-name", metavar="NAME", help="that of the model's prompts, such as query")


def run(options: argparse.Namespace) -> None:
    """Exports, compares, tells."""
    from bert_fast.use.inference import model_folder
    from bert_fast.use.onnx_export import export_onnx, guess_kind

    out = Output.of(options)
    source = model_folder(options.model, out)
    what = guess_kind(source) if options.what == "auto" else options.what
    texts, labels = _data(options, source, what, out)
    vectors: dict[str, Any] = {
        name: getattr(options, name) for name in ("pooling", "normalize", "prompt", "prompt_name")
    }
    facts = export_onnx(
        source, options.onnx, what=what, int8=options.int8, texts=texts, labels=labels, max_length=options.seq,
        output=out, **vectors,
    )  # fmt: skip
    shown = [f"{options.onnx}: {what} as an ONNX graph, largest difference from this engine {facts['difference']:.1e}"]
    shown += [f"of its largest number, over {facts['texts']:,} texts"]
    if "accuracy" in facts:
        shown += [f"accuracy {facts['accuracy']:.4f}"]
    if options.int8:
        shown += ["in int8: " + ", ".join(_cost(facts["int8"]))]
    out.result({"onnx": options.onnx} | facts, " ".join(shown[:2]) + "".join(f"; {text}" for text in shown[2:]))


def _cost(found: dict[str, Any]) -> list[str]:
    """What int8 changes, in words."""
    told = {
        "cosine": lambda x: f"cosine similarity {x['mean']:.4f} on average, {x['lowest']:.4f} at least",
        "agreement": lambda x: f"{x:.2%} of answers stay",
        "difference": lambda x: f"largest difference {x:.1e} of the largest number",
        "accuracy": lambda x: f"accuracy {x:.4f}",
    }
    return [told[name](value) for name, value in found.items()]


def _data(options: argparse.Namespace, source: Path, what: str, out: Output) -> tuple[list | None, list[int] | None]:
    """(texts or pairs of --data, the row of the head that each one's label names; None where there are none)."""
    named = [f"--{name}" for name in ("text", "pair", "label") if getattr(options, name) is not None]
    if options.data is None:
        if named:
            raise ValueError(f"{named[0]} is for --data, which is missing")
        return None, None
    from bert_fast.tasks.tables import KINDS

    path = Path(options.data)
    if what == "classifier" and path.suffix.lower() in KINDS:
        return _labelled(options, source, path)
    if named:
        raise ValueError(f"{named[0]} is for a classifier's labelled examples; {path} is read a text a line")
    warn_of_columns(options.data, out)
    with path.open("rb") as stream:
        lines = [decoded(line, f"{path}: line {n}") for n, line in numbered_lines(stream, str(path), out)]
    if not any(line.strip() for line in lines):
        raise ValueError(f"{path} holds no text")
    return lines, None


def _labelled(options: argparse.Namespace, source: Path, path: Path) -> tuple[list, list[int] | None]:
    """The examples of a file; of a model of single labels each has to be one that it knows."""
    from transformers import BertConfig

    from bert_fast.tasks.task import make_task
    from bert_fast.tasks.trained import known_examples, task_of

    task: Any = make_task(task_of(source) or "classify")
    task.restore(BertConfig.from_pretrained(source))
    columns = {name: value for name in ("text", "pair", "label") if (value := getattr(options, name)) is not None}
    examples, _ = known_examples(task, path, **columns)
    texts = [one.text if one.pair is None else (one.text, one.pair) for one in examples]
    return texts, [task.target(one) for one in examples] if task.name == "classify" else None
