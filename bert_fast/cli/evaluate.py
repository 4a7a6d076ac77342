"""``bert-fast evaluate``: a pre-trained model on prepared data beside predicting by word frequency, or a fine-tuned one
on labelled examples."""

import argparse
import json
import math
from collections import Counter
from pathlib import Path

from bert_fast.cli.device import add_device_argument, chosen_device
from bert_fast.cli.model import add_model_argument
from bert_fast.cli.numbers import positive
from bert_fast.output import Output, add_command


def add_parser(subparsers) -> None:
    """Adds the command."""
    parser = add_command(
        subparsers,
        "evaluate",
        run,
        "measure a pre-trained model on prepared data, or a fine-tuned one on labelled examples",
        details="On a folder of `prepare`: MLM loss, perplexity and accuracy, NSP accuracy. Beside the MLM loss stands "
        "that of the unigram baseline, which predicts every token by how frequent it is: a model that has learned is "
        "well below. Where DIR is what a run was trained on, the documents that it held out are measured. Masks and "
        "pairs are drawn from --seed alone, so figures of several models can be compared. On a file of labelled "
        "examples, as `finetune` reads them: the metrics of the task that MODEL was fine-tuned for, its confusion "
        "matrix, and the worst errors with their lines.",
        examples="""
bert-fast evaluate run --data data
bert-fast prepare heldout/ --tokenizer tok --out heldout
bert-fast evaluate run --data heldout --baseline data --max-sequences 2000 --json
bert-fast evaluate path/to/bert-base-uncased --data heldout --seq 512
bert-fast evaluate sentiment --data dev.tsv --plot confusion.png""",
    )
    add_model_argument(parser)
    parser.add_argument(
        "--data", metavar="DIR|FILE", required=True, help="what `bert-fast prepare` wrote, or labelled examples"
    )
    prepared = parser.add_argument_group("on prepared data")
    prepared.add_argument(
        "--baseline",
        metavar="DIR",
        help="prepared data whose token frequencies the unigram baseline knows, as the training data (default: those "
        "the run was trained on, where --data is its data; else --data itself)",
    )
    prepared.add_argument("--max-sequences", metavar="N", type=positive, help="so many at most (default: all)")
    prepared.add_argument("--no-nsp", action="store_true", help="runs of sentences of one document in place of pairs")
    prepared.add_argument("--whole-word", action="store_true", help="mask whole words")
    prepared.add_argument("--seed", metavar="N", type=int, help="of pairs and masks (default: 0)")
    labelled = parser.add_argument_group("on labelled examples")
    labelled.add_argument("--text", metavar="COLUMN", help="column or key of the text, as in finetune")
    labelled.add_argument("--pair", metavar="COLUMN", help="column or key of the second text of a pair")
    labelled.add_argument(
        "--label", metavar="COLUMN", action="append", help="column or key of the label; several as in finetune"
    )
    labelled.add_argument("--worst", metavar="N", type=positive, help="errors to show (default: 10)")
    labelled.add_argument(
        "--plot", metavar="FILE", help="a picture of the confusion matrix or scores: .png, .svg, .pdf"
    )
    labelled.add_argument(
        "--threshold",
        metavar="X",
        type=float,
        help="as in predict",
    )
    parser.add_argument(
        "--seq",
        metavar="N",
        type=int,
        help="longest sequence (default: the run's, else 128; of a fine-tuned model its own, else its positions)",
    )
    parser.add_argument("--batch-tokens", metavar="N", type=positive, default=8192, help="tokens of a packed batch")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of matrix products")
    add_device_argument(parser)


# The options of either kind of data alone.
PREPARED = ("baseline", "max_sequences", "no_nsp", "whole_word", "seed")
LABELLED = ("text", "pair", "label", "worst", "plot", "threshold")


def run(options: argparse.Namespace) -> None:
    """Measures and prints."""
    if not Path(options.data).exists():
        raise FileNotFoundError(
            f"no {options.data}: neither prepared data, with a manifest.json, nor labelled examples"
        )
    folder = Path(options.data).is_dir()
    for names, what, fits in ((PREPARED, "prepared data", folder), (LABELLED, "labelled examples", not folder)):
        given = [name for name in names if not any(getattr(options, name) is unset for unset in (None, False))]
        if given and not fits:
            kind = "a folder, so prepared data" if folder else "no folder, so labelled examples"
            raise ValueError(f"--{given[0].replace('_', '-')} is for {what}, and {options.data} is {kind}")
    (_on_prepared_data if folder else _on_labelled_examples)(options)


def _on_labelled_examples(options: argparse.Namespace) -> None:
    from bert_fast.pictures import picture_path
    from bert_fast.tasks.judgement import judge, plot_judgement
    from bert_fast.tasks.trained import labelled, load_trained, predict

    out = Output.of(options)
    picture = None if options.plot is None else picture_path(options.plot)
    trained = load_trained(
        options.model, max_length=options.seq, device=chosen_device(options), output=out, threshold=options.threshold
    )
    columns = {name: value for name in ("text", "pair", "label") if (value := getattr(options, name)) is not None}
    examples, places = labelled(trained, options.data, **columns)
    counts: Counter[str] = Counter()
    with out.progress(len(examples), "evaluating", "examples") as bar:
        predictions = []
        bf16 = options.precision == "bf16"
        for _, prediction in predict(trained, examples, tokens=options.batch_tokens, bf16=bf16, counts=counts):
            predictions.append(prediction)
            bar.advance()
    found = judge(trained.task, examples, predictions, places, options.worst or 10)
    facts = {"model": options.model, "data": options.data, "task": trained.task.name, "seq": trained.max_length}
    text = f"{options.data}: {trained.task.name}\n{found.text()}"
    if told := trained.told(counts):
        text += f"\n{told}"
    if picture is not None:
        plot_judgement(found, picture, f"{options.model} on {options.data}")
        facts, text = facts | {"plot": str(picture)}, f"{text}\n{picture}: the picture"
    out.result(facts | dict(counts) | found.facts(), text)


def _on_prepared_data(options: argparse.Namespace) -> None:
    from bert_fast import BertForPreTraining, data
    from bert_fast.tasks.trained import task_of
    from bert_fast.train.evaluation import evaluate, token_counts, unigram_loss
    from bert_fast.use.inference import load_model, model_folder

    out = Output.of(options)
    if (task := task_of(model_folder(options.model, Output(silent=True)))) is not None:
        raise ValueError(
            f"{options.model} is fine-tuned for {task}, and prepared data measure a pre-trained model: give --data a "
            "file of labelled examples"
        )
    model, tokenizer, missing = load_model(
        BertForPreTraining, options.model, optional=("cls.seq_relationship.", "bert.pooler."),
        device=chosen_device(options), output=out,
    )  # fmt: skip
    trained = _run_configuration(Path(options.model))
    corpus, baseline = _evaluated(options, trained, out)
    _require_same_tokenizer(tokenizer, options.data)
    if options.baseline is not None:
        _require_same_tokenizer(tokenizer, options.baseline)
        baseline = data.open_corpus(options.baseline)
    untrained = not trained.get("nsp", True)  # such a run's head is as it was drawn
    has_nsp = not missing and not untrained and not options.no_nsp
    if (missing or untrained) and not options.no_nsp:
        why = "was trained without next-sentence prediction"
        if not untrained:
            why = f"lacks {', '.join(missing)}, which next-sentence prediction needs"
        out.note(f"{options.model} {why}: MLM alone is measured")
    positions = model.config.max_position_embeddings
    length = options.seq or min(_longest(trained) or 128, positions)
    if length > positions:
        raise ValueError(f"--seq {length} is beyond the model's {positions} positions")
    dataset = data.PretrainingDataset(
        corpus, tokenizer, max_length=length, seed=options.seed or 0, nsp=has_nsp, whole_word=options.whole_word
    )
    size = data.capacities(max(options.batch_tokens, length), length, whole_word=options.whole_word)
    batches = data.PackedBatches(dataset, size, limit=options.max_sequences)
    with out.progress(len(batches), "evaluating", "batches") as bar:

        def counted():
            for batch in data.packed_loader(batches, workers=0):
                yield batch
                bar.advance()

        found = evaluate(model, counted(), precision=options.precision)
    if not math.isfinite((found["mlm_loss"] or 0) + (found["nsp_loss"] or 0)):
        raise ValueError(f"the loss is MLM {found['mlm_loss']}, NSP {found['nsp_loss']}: the model overflows")
    counts = token_counts(baseline, dataset.vocab_size)
    found["unigram_loss"] = unigram_loss(counts, data.packed_loader(batches, workers=0), dataset.vocabulary)
    lines = ["no token is masked, so there is no MLM loss: more sequences would have some"]
    if found["masked"]:
        lines = [
            f"MLM loss      {found['mlm_loss']:.4f}   unigram baseline {found['unigram_loss']:.4f}",
            f"perplexity    {found['perplexity']:.2f}",
            f"MLM accuracy  {100 * found['mlm_accuracy']:.2f} %",
        ]
    if found["nsp_accuracy"] is not None:
        lines.append(f"NSP accuracy  {100 * found['nsp_accuracy']:.2f} %   loss {found['nsp_loss']:.4f}")
    lines.append(f"over {found['masked']:,} masked tokens in {found['sequences']:,} sequences of up to {length} tokens")
    out.result({"model": options.model, "data": options.data, "seq": length} | found, "\n".join(lines))


def _require_same_tokenizer(tokenizer, folder: str) -> None:
    from bert_fast.data import load_tokenizer
    from bert_fast.data.tokenizer import differences

    if differing := differences(load_tokenizer(Path(folder) / "tokenizer"), tokenizer):
        raise ValueError(
            f"{folder} was prepared with another tokenizer than the model's ({'; '.join(differing)}): prepare it with "
            "--tokenizer MODEL"
        )


def _run_configuration(folder: Path) -> dict:
    """The options of the run that ``folder`` is, or is a checkpoint of; empty for any other model."""
    if (folder / "state.json").is_file():
        return json.loads((folder / "state.json").read_text(encoding="utf-8"))["options"]
    if not (folder / "config.json").is_file():
        return {}
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {} if "model_type" in found else found


def _longest(trained: dict) -> int | None:
    """The longest sequence that a run was trained on."""
    if phases := trained.get("phases"):
        return max(int(phase.partition(":")[0]) for phase in phases.split(","))
    return trained.get("seq")


def _evaluated(options: argparse.Namespace, trained: dict, out: Output):
    """(corpus to evaluate on, corpus whose frequencies the baseline knows)."""
    from bert_fast.data import open_corpus
    from bert_fast.run.config import PretrainConfig, sources
    from bert_fast.run.validation import hold_out

    corpus = open_corpus(options.data)
    folders = sources(PretrainConfig(data=trained["data"], out="-")) if trained else {}
    if Path(options.data).resolve() not in [Path(folder).resolve() for folder in folders]:
        return corpus, corpus
    share = 0.0 if trained.get("validation_data") else trained["validation"]
    learned, held_out = hold_out(corpus, share, seed=trained["seed"], nsp=trained["nsp"])
    if held_out is None:
        out.warn(f"the run was trained on all of {options.data}: what it remembers is measured, not what it learned")
        return corpus, corpus
    out.note(f"the run was trained on {options.data}: measured on the {len(held_out.documents):,} documents held out")
    return held_out, learned
