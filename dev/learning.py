"""Does it learn? Pre-trains a small model on real text and measures what it knows about text it never saw.

    python dev/learning.py --train wikitext-2/valid.txt --heldout wikitext-2/test.txt --sst2 sst2
    python dev/learning.py --steps 300          # without files: the Python language reference, a fifth held out

1. Held-out MLM loss beside that of the unigram baseline, which predicts every token by how frequent it is in the
   training text; a model has to use the context to get below it.
2. Held-out NSP accuracy, and how many standard errors of guessing it is above one half.
3. SST-2 accuracy, fine-tuned from the pre-trained weights and from random ones, otherwise alike, seed by seed.

4000 updates of mini take a quarter of an hour on two cores of 100 GFLOP/s. Its matrices begin with a standard deviation
of 0.05: BERT's 0.02 was chosen for width 768, and with it the NSP of so narrow a model needs more updates to leave the
ground. The vocabulary is small, as the text is: pre-training sees every piece often enough to learn how pieces make
words, which fine-tuning on a few thousand sentences cannot (docs/log/learning.md has other sizes, and their results).
"""

import argparse
import json
import math
import re
import sys
import tempfile
from pathlib import Path

from bert_fast import BertForPreTraining, data
from bert_fast.output import Output
from bert_fast.run.config import PretrainConfig
from bert_fast.run.pretrain import pretrain
from bert_fast.tasks.examples import read_examples
from bert_fast.tasks.finetuning import finetune
from bert_fast.train.evaluation import evaluate, token_counts, unigram_loss
from bert_fast.use.inference import load_model

VOCABULARY = 1000
# WikiText: an article begins with a line " = Title = ", its sections with " = = Section = = ".
ARTICLE = re.compile(r"^ = (?!= )[^\n]* = ?$", re.MULTILINE)
HEADING = re.compile(r"^ = [^\n]* = ?$", re.MULTILINE)


def articles(path: str | Path) -> list[str]:
    """The documents of a text file: WikiText's articles without headings, else what blank lines separate."""
    text = Path(path).read_text(encoding="utf-8")
    if not ARTICLE.search(text):
        return [document for document in re.split(r"\n\s*\n", text) if document.strip()]
    return [body for part in ARTICLE.split(text) if (body := HEADING.sub("", part).strip())]


def python_reference() -> tuple[list[str], list[str]]:
    """The topics of the Python language reference: (to train on, every fifth held out)."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    return [topics[n] for i, n in enumerate(names) if i % 5], [topics[n] for n in names[::5]]


def prepared(documents: list[str], tokenizer, folder: Path) -> str:
    """The folder with the shards of ``documents``."""
    corpus = folder.with_suffix(".jsonl")
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    data.prepare(corpus, tokenizer, folder, workers=1)
    return str(folder)


def measure_pretraining(folder: Path, learned: str, heldout: str, *, seq: int) -> dict:
    """Held-out losses and accuracies of RUN ``folder``; NSP over three draws of pairs."""
    model, tokenizer, _ = load_model(BertForPreTraining, folder)
    dataset = data.PretrainingDataset(data.open_corpus(heldout), tokenizer, max_length=seq)
    size = data.capacities(max(4096, seq), seq)
    draws = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        draws.append(evaluate(model, data.packed_loader(data.PackedBatches(dataset, size), workers=0)))
    dataset.set_epoch(0)
    counts = token_counts(data.open_corpus(learned), dataset.vocab_size)
    batches = data.packed_loader(data.PackedBatches(dataset, size), workers=0)
    # a document's pairs share text, and the three draws share documents: only one draw counts as the sample size
    pairs = draws[0]["sequences"]
    accuracy = sum(draw["nsp_accuracy"] for draw in draws) / len(draws)
    return draws[0] | {
        "unigram_loss": unigram_loss(counts, batches),
        "nsp_accuracy": accuracy,
        "nsp_standard_errors": (accuracy - 0.5) / math.sqrt(0.25 / pairs),
    }


def measure_finetuning(folder: Path, sst2: Path, *, seeds: int, epochs: float, examples: int | None) -> dict:
    """SST-2 accuracy from RUN ``folder`` and from random weights, for each of ``seeds``."""
    train, dev = read_examples(sst2 / "train.tsv")[:examples], read_examples(sst2 / "dev.tsv")
    found: dict[str, list[float]] = {"pretrained": [], "random": []}
    for seed in range(seeds):
        for name, accuracies in found.items():
            measured = finetune(
                folder, train, dev, epochs=epochs, learning_rate=5e-4, dropout=0.1, seed=seed,
                from_scratch=name == "random", keep="last", precision="fp32",
            )  # fmt: skip
            accuracies.append(measured["accuracy"])
    return found | {"majority": measured["majority"], "examples": len(dev)}


def main(argv: list[str] | None = None) -> int:
    """Runs the proof and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", metavar="FILE", help="text to pre-train on (default: the Python reference)")
    parser.add_argument("--heldout", metavar="FILE", help="text to measure on")
    parser.add_argument("--sst2", metavar="DIR", type=Path, help="folder with train.tsv and dev.tsv")
    parser.add_argument("--model", default="mini", help="tiny, mini, small, ...")
    parser.add_argument("--steps", type=int, default=4000, help="updates of pre-training")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--seq", type=int, default=104)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3, help="fine-tunings of each kind")
    parser.add_argument("--epochs", type=float, default=3, help="of fine-tuning")
    parser.add_argument("--examples", type=int, help="fine-tune on so many examples (default: all)")
    parser.add_argument("--out", type=Path, help="keep the run here (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of text")
    options = parser.parse_args(argv)
    if (options.train is None) != (options.heldout is None):
        parser.error("--train and --heldout go together")
    with tempfile.TemporaryDirectory() as scratch:
        found = prove(options, options.out or Path(scratch))
    if options.json:
        print(json.dumps(found))
        return 0
    print(f"held-out MLM loss   {found['mlm_loss']:.3f}, unigram baseline {found['unigram_loss']:.3f}")
    print(f"held-out NSP        {found['nsp_accuracy']:.2%} right, {found['nsp_standard_errors']:.1f} standard errors "
          f"above guessing ({found['sequences']:,} pairs)")  # fmt: skip
    if "sst2" in found:
        sst2 = found["sst2"]
        for name in ("pretrained", "random"):
            each = ", ".join(f"{accuracy:.2%}" for accuracy in sst2[name])
            print(f"SST-2 {name:14}{sum(sst2[name]) / len(sst2[name]):.2%}   ({each})")
        print(f"SST-2 {'majority':14}{sst2['majority']:.2%}   over {sst2['examples']} sentences")
    return 0


def prove(options: argparse.Namespace, folder: Path) -> dict:
    """All measurements; what lies in ``folder`` from an earlier call that was cut short is gone on with."""
    folder.mkdir(parents=True, exist_ok=True)
    if options.train is None:
        texts, heldout_texts = python_reference()
    else:
        texts, heldout_texts = articles(options.train), articles(options.heldout)
    tokenizer = data.train_tokenizer(texts, VOCABULARY)
    learned = prepared(texts, tokenizer, folder / "train")
    heldout = prepared(heldout_texts, tokenizer, folder / "heldout")
    config = PretrainConfig(
        data=learned, out=str(folder / "run"), validation_data=heldout, validation_sequences=512, model=options.model,
        seq=options.seq, batch_size=options.batch_size, steps=options.steps, lr=options.lr, warmup=0.1, beta2=0.98,
        dropout=0.0, initializer_range=0.05, checkpoint_every=max(1, options.steps // 4), log_every=20,
    )  # fmt: skip
    if code := pretrain(config, Output(silent=options.json, command="pretrain")):
        sys.exit(code)
    found = measure_pretraining(folder / "run", learned, heldout, seq=options.seq)
    if options.sst2 is not None:
        found["sst2"] = measure_finetuning(
            folder / "run", options.sst2, seeds=options.seeds, epochs=options.epochs, examples=options.examples
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
