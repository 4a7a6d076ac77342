"""``bert-fast evaluate``: held-out loss and accuracy beside the loss of predicting by word frequency."""

import argparse
import json
from pathlib import Path

from bert_fast.cli.device import add_device_argument, chosen_device
from bert_fast.cli.output import Output, add_command


def add_parser(subparsers) -> None:
    """Adds the command."""
    parser = add_command(
        subparsers,
        "evaluate",
        run,
        "measure a model on prepared data: MLM loss, perplexity, accuracy, NSP accuracy",
        details="Beside the MLM loss stands that of the unigram baseline, which predicts every token by how frequent "
        "it is: a model that has learned is well below. Masks and pairs are drawn from --seed alone, so figures of "
        "several models compare.",
        examples="""
bert-fast prepare heldout/ --tokenizer tok --out heldout
bert-fast evaluate run --data heldout
bert-fast evaluate run --data heldout --baseline data --max-sequences 2000 --json
bert-fast evaluate path/to/bert-base-uncased --data heldout --seq 512""",
    )
    parser.add_argument("model", metavar="MODEL", help="a run's folder or a Hugging Face folder")
    parser.add_argument("--data", metavar="DIR", required=True, help="what `bert-fast prepare` wrote, of held-out text")
    parser.add_argument(
        "--baseline",
        metavar="DIR",
        help="prepared data whose token frequencies the unigram baseline knows, as the training data (default: those "
        "of --data itself, which no model without context can beat)",
    )
    parser.add_argument("--seq", metavar="N", type=int, help="longest sequence (default: the run's, else 128)")
    parser.add_argument("--max-sequences", metavar="N", type=int, help="so many sequences at most (default: all)")
    parser.add_argument("--no-nsp", action="store_true", help="runs of sentences of one document in place of pairs")
    parser.add_argument("--whole-word", action="store_true", help="mask whole words")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of pairs and masks")
    parser.add_argument("--batch-tokens", metavar="N", type=int, default=8192, help="tokens of a packed batch")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of matrix products")
    add_device_argument(parser)


def run(options: argparse.Namespace) -> None:
    """Measures and prints."""
    from bert_fast import BertForPreTraining, data
    from bert_fast.data.dataset import plan_batches
    from bert_fast.inference import load_model
    from bert_fast.train.evaluation import evaluate, unigram_loss

    out = Output.of(options)
    corpus = data.open_corpus(options.data)
    model, tokenizer, missing = load_model(
        BertForPreTraining, options.model, optional=("cls.seq_relationship.", "bert.pooler."),
        device=chosen_device(options),
    )  # fmt: skip
    _require_same_tokenizer(tokenizer, options.data)
    has_nsp = not missing and not options.no_nsp
    if missing and not options.no_nsp:
        out.note(f"{options.model} has no next-sentence head: MLM alone is measured")
    length = options.seq or min(_run_length(Path(options.model)) or 128, model.config.max_position_embeddings)
    if length > model.config.max_position_embeddings:
        raise ValueError(f"--seq {length} is beyond the model's {model.config.max_position_embeddings} positions")
    dataset = data.PretrainingDataset(
        corpus, tokenizer, max_length=length, seed=options.seed, nsp=has_nsp, whole_word=options.whole_word
    )
    size = data.capacities(max(options.batch_tokens, length), length)
    batches = data.PackedBatches(dataset, size)
    if options.max_sequences is not None:
        if options.max_sequences < 1:
            raise ValueError("--max-sequences must be at least 1")
        order = dataset.order()[: options.max_sequences]
        batches.bins = plan_batches(dataset.plan.length, order, size, nsp=has_nsp)
    with out.progress(len(batches), "evaluating", "batches") as bar:

        def counted():
            for batch in data.packed_loader(batches, workers=0):
                yield batch
                bar.advance()

        found = evaluate(model, counted(), precision=options.precision)
    if options.baseline is not None:
        _require_same_tokenizer(tokenizer, options.baseline)
    counts = token_counts(data.open_corpus(options.baseline or options.data), dataset.vocab_size)
    found["unigram_loss"] = unigram_loss(counts, data.packed_loader(batches, workers=0))
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

    if load_tokenizer(Path(folder) / "tokenizer").get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{folder} was prepared with another vocabulary than the model's: prepare it with --tokenizer MODEL"
        )


def _run_length(folder: Path) -> int | None:
    """The longest sequence that a run was trained on; None for what is no run."""
    if not (folder / "model").is_dir():
        return None
    configuration = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if phases := configuration.get("phases"):
        return max(int(phase.partition(":")[0]) for phase in phases.split(","))
    return configuration.get("seq")


def token_counts(corpus, vocab_size: int):
    """int64 (vocab_size,): how often each token occurs in the documents of ``corpus``."""
    import numpy as np

    counts = np.zeros(vocab_size, dtype=np.int64)
    for first, last in corpus.documents:
        begin, end = int(corpus.sentence_ends[first]), int(corpus.sentence_ends[last])
        values, numbers = np.unique(np.asarray(corpus.tokens[begin:end]), return_counts=True)
        counts[values] += numbers
    return counts
