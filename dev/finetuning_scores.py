"""Does fine-tuning reach Trainer's scores? Both fine-tune the same weights with dropout, and their seeds are compared.

    python dev/finetuning_scores.py --model path/to/all-MiniLM-L6-v2 --data sst2

Each seed draws the head, the order and the dropout masks, of ours and of ``transformers.Trainer`` from generators that
have nothing in common, so that runs of one seed are no pairs. Three measures are compared after the last epoch: the
accuracy and the loss on the development sentences, and the mean loss of the last epoch's updates, with dropout.

If both train alike, their measures have one distribution, whatever its spread. So each difference of means has
Student's confidence interval, by the variance of both, and the three together 95 %: each 98.3 % (Bonferroni). The
verdict is "the same" where all three hold 0: half an interval is what the seeds cannot tell from 0. That they tell
something is shown by a control, one run of ours without dropout, of which they must not all hold 0.
"""

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from bert_fast import extras
from bert_fast.run.weights import silent_transformers
from bert_fast.tasks.examples import Example, read_examples
from bert_fast.tasks.finetuning import finetune
from bert_fast.tasks.task import task_class

MEASURES = ("accuracy", "loss", "train_loss")
TOGETHER = 0.95
SETTINGS = {"batch_size": 32, "warmup": 0.1, "weight_decay": 0.01}  # finetune's own, said to both


def ours(options, train: list[Example], dev: list[Example], seed: int, dropout: float | None = None) -> dict:
    """The measures after the last epoch of ``finetune``, in float32."""
    found = finetune(
        options.model, train, dev, task="classify", epochs=options.epochs, learning_rate=options.lr, seed=seed,
        dropout=options.dropout if dropout is None else dropout, precision="fp32", keep="last", **SETTINGS,
    )  # fmt: skip
    return found["history"][-1]


def without_dropout(*args) -> dict:
    """The control: as :func:`ours`, but for the dropout."""
    return ours(*args, dropout=0.0)


def trainers(options, train: list[Example], dev: list[Example], seed: int) -> dict:
    """The same of transformers' model and Trainer, in float32 with batches padded to their longest."""
    transformers.set_seed(seed)
    names = sorted({example.label for example in train})
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        options.model, num_labels=len(names), hidden_dropout_prob=options.dropout,
        attention_probs_dropout_prob=options.dropout, dtype=torch.float32,
    )  # fmt: skip
    length = task_class("classify").max_length
    parts = [
        [{**tokenizer(e.text, truncation=True, max_length=length), "labels": names.index(e.label)} for e in part]
        for part in (train, dev)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = transformers.TrainingArguments(
            output_dir=scratch, num_train_epochs=options.epochs, per_device_train_batch_size=SETTINGS["batch_size"],
            learning_rate=options.lr, warmup_steps=SETTINGS["warmup"], weight_decay=SETTINGS["weight_decay"],
            lr_scheduler_type="linear", seed=seed, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
            logging_strategy="epoch", dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=parts[0], data_collator=transformers.DataCollatorWithPadding(tokenizer)
        )
        trainer.train()
        found = trainer.predict(parts[1])
    logits, gold = torch.from_numpy(found.predictions).double(), torch.from_numpy(found.label_ids)
    return {
        "accuracy": float((logits.argmax(1) == gold).double().mean()),
        "loss": float(torch.nn.functional.cross_entropy(logits, gold)),
        "train_loss": [log["loss"] for log in trainer.state.log_history if "loss" in log][-1],
    }


CONTROL, PEER = "ours, no dropout", "Trainer"
ARMS = {"ours": ours, CONTROL: without_dropout, PEER: trainers}


def interval(found: list[float], expected: list[float]) -> tuple[float, float, float]:
    """(the difference of the means, Student's interval of it): all of :data:`MEASURES` together are 95 %."""
    test = extras.load("scipy.stats").ttest_ind(found, expected)
    low, high = test.confidence_interval(1 - (1 - TOGETHER) / len(MEASURES))
    return statistics.fmean(found) - statistics.fmean(expected), float(low), float(high)


def verdict(runs: dict[str, list[dict]], tell: Callable[[str], None]) -> bool:
    """Tells means, deviations and intervals of ``runs``, a list of measures for each of :data:`ARMS`. Whether all of
    ours hold 0, and not all of the control."""
    values = {arm: {m: [run[m] for run in found] for m in MEASURES} for arm, found in runs.items()}
    held: dict[tuple[str, str], bool] = {}
    for measure in MEASURES:
        tell(measure)
        for arm, found in values.items():
            told = f"  {arm:18}{statistics.fmean(found[measure]):.4f}"
            if arm != CONTROL:
                told += f"  deviation {statistics.stdev(found[measure]):.4f}"
            if arm != PEER:
                difference, low, high = interval(found[measure], values[PEER][measure])
                held[arm, measure] = low <= 0 <= high
                told += f"  minus Trainer {difference:+.4f}, from {low:+.4f} to {high:+.4f}"
            tell(told + f"  ({', '.join(f'{value:.4f}' for value in found[measure])})")
    same = {arm: all(held[arm, measure] for measure in MEASURES) for arm in ("ours", CONTROL)}
    return same["ours"] and not same[CONTROL]


def main(argv: list[str] | None = None) -> int:
    """Trains all, tells each run as it ends, and what they are together; 1 where they differ."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder with a BERT")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with train.tsv and dev.tsv")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each")
    parser.add_argument("--examples", type=int, help="the first so many of train.tsv (default: all)")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--dropout", type=float, default=0.1)
    options = parser.parse_args(argv)
    if options.seeds < 2:
        parser.error("--seeds must be 2 or more: the spread of one is unknown")
    train, dev = read_examples(options.data / "train.tsv")[: options.examples], read_examples(options.data / "dev.tsv")
    runs: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    for seed in range(options.seeds):
        for arm, found in runs.items():
            if arm == CONTROL and seed > 0:
                continue
            with silent_transformers():
                found.append(ARMS[arm](options, train, dev, seed))
            print(f"seed {seed} {arm:18}" + "  ".join(f"{m} {found[-1][m]:.4f}" for m in MEASURES), flush=True)
    if any(not math.isfinite(run[measure]) for found in runs.values() for run in found for measure in MEASURES):
        raise FloatingPointError("a run ended with a measure that is not finite")
    same = verdict(runs, print)
    print(f"{'the same' if same else 'NOT the same, or too few seeds to tell a missing dropout'}: {len(train):,} "
          f"examples, {len(dev):,} sentences to measure on, {options.seeds} seeds")  # fmt: skip
    return not same


if __name__ == "__main__":
    sys.exit(main())
