"""A sentence-transformers model trained on this engine by one line: in-batch negatives, cached if asked.

    python examples/sentence_vectors.py                          # a small model, drawn at random; about ten seconds
    python examples/sentence_vectors.py --cached                 # the same losses, one mini-batch in memory at a time
    python examples/sentence_vectors.py --model path/to/all-MiniLM-L6-v2 --lr 5e-5

The line is `bert_fast.register()`; `bert_fast.accelerate(model)` does the same to a model that is loaded. Two sentences
belong together where they name the same animal and colour, so the right score is known: 100 %.
"""

import argparse
import random
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import cos_sim
from trainer_tasks import ANIMALS, COLOURS, OTHERS, small_model  # beside this file

import bert_fast

bert_fast.register()


def pairs(count: int, seed: int) -> dict[str, list[str]]:
    """Columns "anchor" and "positive"."""
    draw = random.Random(seed)

    def sentence(named: list[str]) -> str:
        words = draw.choices(OTHERS, k=draw.randint(1, 12)) + named
        draw.shuffle(words)
        return " ".join(words)

    both = [[draw.choice(COLOURS), draw.choice(ANIMALS)] for _ in range(count)]
    return {"anchor": [sentence(named) for named in both], "positive": [sentence(named) for named in both]}


def score(model: SentenceTransformer) -> float:
    """The share of sentences whose nearest other is that with the same words, of one for each pair of words."""
    draw = random.Random(2)
    every = [f"{colour} {animal}" for colour in COLOURS for animal in ANIMALS]
    texts = [" ".join(draw.sample(named.split() + draw.choices(OTHERS, k=6), k=8)) for named in every]
    nearest = cos_sim(model.encode(texts), model.encode(every)).argmax(dim=1)
    return float((nearest == torch.arange(len(every))).float().mean())


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a folder of sentence-transformers or a BERT (default: a small one at random)")
    parser.add_argument("--cached", action="store_true", help="CachedMultipleNegativesRankingLoss")
    parser.add_argument("--out", type=Path, default=Path("build/sentence_vectors"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.set_seed(0)
    device = "cpu" if options.device == "cpu" else None
    # of a folder without sentence-transformers' modules the vectors are means over all tokens
    model = SentenceTransformer(options.model or small_model(options.out / "bert"), device=device)
    loss = losses.MultipleNegativesRankingLoss(model)
    if options.cached:
        loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=16)
    arguments = SentenceTransformerTrainingArguments(
        str(options.out), max_steps=options.steps, per_device_train_batch_size=64, learning_rate=options.lr,
        warmup_steps=options.steps // 10, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        use_cpu=options.device == "cpu", batch_sampler="no_duplicates",
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=Dataset.from_dict(pairs(2048, 1)), loss=loss)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    told = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = {"score": score(model), "losses": told, "kind": type(model[0].auto_model)}
    print(f"{found['kind']} scores {found['score']:.1%}, last loss {told[-1]:.4f}")
    return found


if __name__ == "__main__":
    main()
