"""sentence-transformers' training step, in-batch negatives, on an accelerated model beside transformers' BERT.

    python benchmarks/contrastive.py
    python benchmarks/contrastive.py --batch 64 --cached 16

A step is sentence-transformers' own loss, forward and backward, on what its collator gives: pairs of sentences that
follow each other in a corpus, cut to --seq tokens and padded to the longest of the batch. Losses and gradients are
compared first, at dropout 0; where they differ no speed is printed and the exit status is 1. Contenders run interleaved
in one process.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works on a checkout that is not installed

import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses

import bert_fast
from benchmarks import clock, limits, parity, results, tables
from benchmarks.options import DTYPES
from benchmarks.steps import DROPOUT
from benchmarks.workload import MODELS, VOCABULARY, model_config
from bert_fast import data

CONTENDERS = {"bert_fast": "sdpa", "hf-sdpa": "sdpa", "hf-eager": "eager"}  # with transformers' attention
BOUND = 1e-4  # relative L2 of the gradient, and of the loss, in float32


def pairs(corpus: str | None, count: int) -> tuple[list[str], list[str]]:
    """Sentences of three words at least, and those that follow them; ValueError where the corpus has too few."""
    found = []
    for document in data.read_documents(corpus):
        sentences = [sentence for sentence in document if len(sentence.split()) > 2]
        found += zip(sentences[::2], sentences[1::2], strict=False)
    if len(found) < count:
        raise ValueError(f"the corpus gives {len(found)} pairs of sentences, fewer than --batch {count}")
    places = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:count].tolist()
    return [found[i][0] for i in places], [found[i][1] for i in places]


def bert_folder(folder: Path, texts: list[str], model: str) -> Path:
    """A BERT of size ``model``, drawn at random, with a tokenizer of ``texts``."""
    torch.manual_seed(0)
    config = model_config(model, dropout=DROPOUT)
    transformers.BertModel(config).save_pretrained(folder)
    data.save_tokenizer(data.train_tokenizer(texts, min(VOCABULARY, config.vocab_size)), folder)
    return folder


def build(name: str, folder: Path, options, dropout: float) -> torch.nn.Module:
    """The loss of sentence-transformers around a model of ``folder`` that runs as ``name`` says, in training mode."""
    arguments = {"attn_implementation": CONTENDERS[name]}
    chances = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs=arguments, config_kwargs=chances)
    model.max_seq_length = options.seq
    if name == "bert_fast":
        bert_fast.accelerate(model)
    if options.cached is None:
        return losses.MultipleNegativesRankingLoss(model).train()
    return losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=options.cached).train()


def step_of(loss: torch.nn.Module, texts: tuple[list[str], list[str]], dtype: torch.dtype) -> Callable[[], float]:
    """A forward and a backward; gradients begin at None. The loss, float."""
    features = [loss.model.preprocess(column) for column in texts]

    def step() -> float:
        loss.zero_grad()
        autocast = torch.autocast("cpu", dtype) if dtype != torch.float32 else contextlib.nullcontext()
        with autocast:
            value = loss([dict(batch) for batch in features], None)
        value.backward()
        return value.item()

    return step


def parity_rows(options, folder: Path, texts: tuple[list[str], list[str]]) -> list[dict]:
    """Rows of parity of the loss and of all gradients, ours beside transformers': without dropout, in float32."""
    values, gradients = [], []
    for name in ("bert_fast", "hf-sdpa"):
        loss = build(name, folder, options, dropout=0.0)
        values.append(step_of(loss, texts, torch.float32)())
        found = {key: parameter.grad for key, parameter in loss.named_parameters()}
        gradients.append(torch.cat([g.flatten() for key, g in sorted(found.items()) if g is not None]))
    (ours, theirs), (own, other) = values, gradients
    errors = {"loss": abs(ours - theirs) / abs(theirs), "gradients": float((own - other).norm() / other.norm())}
    return [parity.row(what, error, 0.0, BOUND, contender="bert_fast") for what, error in errors.items()]


def rows_of(options, folder: Path, texts: tuple[list[str], list[str]]) -> list[dict]:
    """A row for each contender, as steps.py has them."""
    steps = {name: step_of(build(name, folder, options, DROPOUT), texts, DTYPES[options.dtype])
             for name in CONTENDERS}  # fmt: skip
    for step in steps.values():
        step()
    times = clock.interleave(steps, options.rounds, clock.Clock("cpu").step)
    model = build("hf-sdpa", folder, options, DROPOUT).model
    masks = [model.preprocess(column)["attention_mask"] for column in texts]
    real, sequences = sum(int(mask.sum()) for mask in masks), 2 * options.batch
    facts = {
        "model": options.model, "seq": options.seq, "lengths": work_of(options),
        "dtype": options.dtype, "sequences": sequences, "mode": "contrastive", "optimizer": "none", "real_tokens": real,
        "share_of_peak": None,
    }  # fmt: skip
    return [
        facts | {
            "contender": name, "step_s": (spread := clock.quantiles(seconds)),
            "sequences_per_s": sequences / spread["p50"], "real_tokens_per_s": real / spread["p50"],
        } | ({} if name == "bert_fast" else {"ours_is": clock.paired_ratio(seconds, times["bert_fast"])})
        for name, seconds in times.items()
    ]  # fmt: skip


def work_of(options) -> str:
    return "pairs of sentences" + (f", cached in parts of {options.cached}" if options.cached else "")


COLUMNS = ("contender", "step ms (p20-p80)", "sequences/s", "real tokens/s", "ours is")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="base")
    parser.add_argument("--batch", type=int, default=32, help="pairs of sentences a step (default 32)")
    parser.add_argument("--seq", type=int, default=128, help="tokens that a sentence is cut to (default 128)")
    parser.add_argument("--cached", metavar="N", type=int, help="CachedMultipleNegativesRankingLoss in parts of N")
    parser.add_argument("--corpus", help="text (default: the Python language reference)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="autocast dtype")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="a file in benchmarks/results/")
    options = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        texts = pairs(options.corpus, options.batch)
    except (OSError, ValueError) as error:
        print(f"benchmarks/contrastive.py: {error}", file=sys.stderr)
        return 2
    found = results.begun("run", "cpu", ["benchmarks/contrastive.py", *(sys.argv[1:] if argv is None else argv)])
    found["limits"] = limits.measure(clock.Clock("cpu"), {DTYPES[options.dtype], torch.float32})
    with tempfile.TemporaryDirectory() as made:
        folder = bert_folder(Path(made), [text for column in texts for text in column], options.model)
        found["parity"] = parity.summary(parity_rows(options, folder, texts))
        tables.parity(found["parity"]).show()
        if not found["parity"]["passed"]:
            print("benchmarks/contrastive.py: parity failed, so no speed is measured", file=sys.stderr)
            return 1
        found["steps"] = rows_of(options, folder, texts)
    facts = found["steps"][0]
    found["work"] = {key: facts[key] for key in ("model", "seq", "lengths", "dtype", "mode")} | {
        "batch": options.batch, "rounds": options.rounds, "dropout": DROPOUT,
    }  # fmt: skip
    title = f"{facts['lengths']}: {options.batch} pairs, {facts['real_tokens']} tokens, BERT-{options.model}"
    tables.steps(found["steps"], COLUMNS, f"{title}, {options.dtype}").show()
    if options.save:
        results.Results(results.new_path(found, "contrastive" + ("-cached" if options.cached else "")), found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
