"""From text to a classifier, in Python: tokenizer, shards, pre-training, a filled mask, fine-tuning.

    python examples/pretrain_and_finetune.py                      # the Python language reference, about four minutes
    python examples/pretrain_and_finetune.py --corpus my.txt --train train.tsv --validation dev.tsv

The same steps as commands: bert-fast tokenizer, prepare, pretrain, fill-mask, finetune. Without files of its own it
pre-trains on the reference of the Python language, which every Python ships, and then learns to tell whether a
sentence of it is about objects and their methods or about statements.

Half a megabyte of text teaches a tiny model too little to help there: expect as good an accuracy from random weights,
with differences of a few points that are chance (200 sentences).
"""

import argparse
import json
import random
from pathlib import Path
from pydoc_data.topics import topics

import bert_fast
from bert_fast import data
from bert_fast.run.config import PretrainConfig
from bert_fast.run.pretrain import pretrain
from bert_fast.tasks.examples import Example, read_examples
from bert_fast.tasks.finetuning import finetune
from bert_fast.use.inference import fill_mask, load_model


def python_reference(folder: Path) -> Path:
    """The language reference as a corpus: JSON lines, one topic a document."""
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)), encoding="utf-8")
    return path


def two_kinds_of_sentences() -> tuple[list[Example], list[Example]]:
    """Sentences of two groups of topics, labelled by the group: (to train on, to validate on)."""
    groups = {
        "objects": ("specialnames", "types", "typesmapping"),
        "statements": ("compound", "assignment", "import", "comparisons"),
    }
    examples = [
        Example(sentence, None, label)
        for label, names in groups.items()
        for name in names
        for sentence in data.split_sentences(topics[name])
        if len(sentence.split()) > 5
    ]
    random.Random(0).shuffle(examples)
    return examples[200:], examples[:200]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/example"))
    parser.add_argument("--corpus", help="text with blank lines between documents, JSON lines or Parquet")
    parser.add_argument("--train", help="labelled sentences to fine-tune on (.tsv, .csv, .jsonl)")
    parser.add_argument("--validation", help="labelled sentences to measure on")
    parser.add_argument("--model", default="tiny", help="tiny, mini, small, base or large")
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)

    # 1. A vocabulary. `texts` may be any iterable that can be gone through twice.
    corpus = options.corpus or python_reference(out)
    texts = [sentence for document in data.read_documents(corpus) for sentence in document]
    tokenizer = data.train_tokenizer(texts, vocab_size=4000)

    # 2. Text to token ids on disk: any size of corpus, in bounded memory.
    manifest = data.prepare(corpus, tokenizer, out / "data")
    print(f"{manifest['documents']} documents, {manifest['tokens']:,} tokens")

    # 3. Pre-training. Stopped at any point, the same call goes on where it was.
    config = PretrainConfig(
        data=str(out / "data"), out=str(out / "run"), model=options.model, seq=64, batch_size=16, steps=options.steps,
        lr=3e-3, warmup=0.1, beta2=0.98, dropout=0.0, validation=0.1, validate_every=500, log_every=50,
    )  # fmt: skip
    if pretrain(config) != 0:
        raise SystemExit("pre-training stopped early: start this script again, it goes on from there")

    # 4. What has it learned?
    model, tokenizer, _ = load_model(bert_fast.BertForMaskedLM, out / "run")
    text = "Changed in [MASK] 3.8."
    print(text, *(f"{c.token} {c.probability:.0%}" for c in fill_mask(model, tokenizer, text)[0]), sep="\n  ")

    # 5. Fine-tuning, and the same without pre-training.
    if options.train and options.validation:
        train, validation = read_examples(options.train), read_examples(options.validation)
    else:
        train, validation = two_kinds_of_sentences()
    for name, from_scratch in (("pre-trained", False), ("random weights", True)):
        kept = None if from_scratch else out / "classifier"
        found = finetune(out / "run", train, validation, kept, epochs=3, learning_rate=3e-4, from_scratch=from_scratch)
        print(f"{name}: accuracy {found['accuracy']:.1%} (most frequent label: {found['majority']:.1%})")
    print(f"{out / 'classifier'} loads with transformers.BertForSequenceClassification.from_pretrained")


if __name__ == "__main__":  # worker processes import this file, too
    main()
