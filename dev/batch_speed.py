"""What batches cost at another masking rate, of whole words, and from several sources, beside the plain ones.

    python dev/batch_speed.py [--updates 480] [--batch 256] [--seq 128] [--rounds 3] [--json]

Every round makes the updates of each case in one process and one thread, as `pretrain` makes them: which samples, their
tokens and masks, packed. "ratio" is the median over rounds of a case's processor time over that of the plain case:
other work on the machine disturbs it less than the clock. The text is the Python language reference, each document 256
times: planning an epoch has a part that does not grow with the documents, which two sources have twice, and of a corpus
of real size nobody sees it. Of two sources each has every other document.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works on a checkout that is not installed

import numpy as np

from bert_fast.data import Corpus, PretrainingDataset, encode_documents, read_documents, train_tokenizer
from bert_fast.data.loader import BatchMaker, load_updates, updates
from bert_fast.data.mixture import Mixture, start_of
from bert_fast.data.phase import Phase


def cases(seq: int) -> dict:
    """Datasets by what is said of them."""
    documents = read_documents()
    tokenizer = train_tokenizer((sentence for document in documents for sentence in document), 8000)
    corpus = encode_documents(documents, tokenizer)
    places = np.tile(corpus.documents, (256, 1))
    parts = (places, places[::2], places[1::2])
    whole, *halves = (Corpus(corpus.tokens, corpus.sentence_ends, part) for part in parts)

    def dataset(corpus: Corpus, **options) -> PretrainingDataset:
        return PretrainingDataset(corpus, tokenizer, max_length=seq, **options)

    return {
        "plain": dataset(whole),
        "plain again": dataset(whole),
        "30 % masked": dataset(whole, mask_prob=0.3),
        "whole words": dataset(whole, whole_word=True),
        "two sources": Mixture(("even", "odd"), tuple(map(dataset, halves)), (0.75, 0.25)),
    }


def seconds(dataset, options: argparse.Namespace) -> float:
    """Of the processor, for the updates of ``options``."""
    prob = getattr(dataset, "mask_prob", 0.15)
    phase = Phase(options.seq, 0, options.updates, options.batch, 1e-3, 0, 0, options.updates, mask_probs=(prob, prob))
    maker, began = BatchMaker(dataset), time.process_time()
    for _ in load_updates(
        maker, updates(dataset, [phase], 0, start_of(dataset)), rank=0, ranks=1, tokens=16384, workers=0, pin=False
    ):
        pass
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("updates", 480), ("batch", 256), ("seq", 128), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = parser.parse_args()
    found = cases(options.seq)
    taken: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(options.rounds):
        for name, dataset in found.items():
            taken[name].append(seconds(dataset, options))
    ratios = {
        name: statistics.median(own / plain for own, plain in zip(times, taken["plain"], strict=True))
        for name, times in taken.items()
    }
    samples = options.updates * options.batch
    if options.json:
        print(json.dumps({"seconds": taken, "ratios": ratios, "samples": samples}))
        return
    print(f"{samples:,} samples of at most {options.seq} tokens, {options.rounds} interleaved rounds, medians")
    for name, times in taken.items():
        print(f"{name:12} {1e6 * statistics.median(times) / samples:7.1f} µs a sample, ratio {ratios[name]:.2f}")


if __name__ == "__main__":
    main()
