"""``bert-fast evaluate``: held-out loss and accuracy beside the loss of predicting by word frequency."""

import argparse
import json
import math
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
        "measure a model on prepared data: MLM loss, perplexity, accuracy, NSP accuracy",
        details="Beside the MLM loss stands that of the unigram baseline, which predicts every token by how frequent "
        "it is: a model that has learned is well below. Where DIR is what a run was trained on, the documents that it "
        "held out are measured. Masks and pairs are drawn from --seed alone, so figures of several models can be "
        "compared.",
        examples="""
bert-fast evaluate run --data data
bert-fast prepare heldout/ --tokenizer tok --out heldout
bert-fast evaluate run --data heldout --baseline data --max-sequences 2000 --json
bert-fast evaluate path/to/bert-base-uncased --data heldout --seq 512""",
    )
    add_model_argument(parser)
    parser.add_argument("--data", metavar="DIR", required=True, help="what `bert-fast prepare` wrote")
    parser.add_argument(
        "--baseline",
        metavar="DIR",
        help="prepared data whose token frequencies the unigram baseline knows, as the training data (default: those "
        "the run was trained on, where --data is its data; else --data itself)",
    )
    parser.add_argument("--seq", metavar="N", type=int, help="longest sequence (default: the run's, else 128)")
    parser.add_argument("--max-sequences", metavar="N", type=positive, help="so many sequences at most (default: all)")
    parser.add_argument("--no-nsp", action="store_true", help="runs of sentences of one document in place of pairs")
    parser.add_argument("--whole-word", action="store_true", help="mask whole words")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of pairs and masks")
    parser.add_argument("--batch-tokens", metavar="N", type=positive, default=8192, help="tokens of a packed batch")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of matrix products")
    add_device_argument(parser)


def run(options: argparse.Namespace) -> None:
    """Measures and prints."""
    from bert_fast import BertForPreTraining, data
    from bert_fast.train.evaluation import evaluate, token_counts, unigram_loss
    from bert_fast.use.inference import load_model

    out = Output.of(options)
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
        corpus, tokenizer, max_length=length, seed=options.seed, nsp=has_nsp, whole_word=options.whole_word
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
