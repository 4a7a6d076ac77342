"""Five tasks by transformers' Trainer, on this engine by one line: in short what transformers' example scripts do.

    python examples/trainer_tasks.py classify                       # as run_glue.py; ten seconds
    python examples/trainer_tasks.py tokens                         # run_ner.py
    python examples/trainer_tasks.py answers                        # run_qa.py: long texts in windows
    python examples/trainer_tasks.py choice                         # run_swag.py
    python examples/trainer_tasks.py words                          # run_mlm.py
    python examples/trainer_tasks.py classify --model path/to/bert-base-uncased --lr 5e-5

The line is `bert_fast.register()`: transformers' Auto classes then give this engine's models. It does the same in the
scripts that are named, in their first line. Each task is made by a rule, so the right score is known: 100 %.
"""

import argparse
import random
from pathlib import Path

import numpy as np
import transformers
from transformers import Trainer, TrainingArguments

import bert_fast
from bert_fast import data

bert_fast.register()

COLOURS = ["red", "green", "blue", "white", "black", "grey", "pink"]
ANIMALS = ["fox", "cat", "dog", "owl", "cow", "hen", "bee"]
OTHERS = ["the", "a", "is", "was", "near", "under", "over", "with", "and", "not", "of", "it", "they"]


def small_model(folder: Path) -> str:
    """A folder with a small BERT, drawn at random, and a tokenizer that knows the words of the tasks."""
    tokenizer = data.train_tokenizer([" ".join(COLOURS + ANIMALS + OTHERS)] * 20, vocab_size=200, min_frequency=1)
    data.save_tokenizer(tokenizer, folder)
    config = transformers.BertConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
    )  # fmt: skip
    transformers.set_seed(0)
    transformers.BertForPreTraining(config).save_pretrained(folder)
    return str(folder)


def sentences(count: int, seed: int) -> list[list[str]]:
    """Words of sentences of many lengths."""
    draw = random.Random(seed)
    return [draw.choices(COLOURS + ANIMALS + 2 * OTHERS, k=draw.randint(4, 20)) for _ in range(count)]


def train(options, model, train, test, collator, score) -> dict:
    """Trains by the stock Trainer; {"score": of ``test`` by ``score`` of a prediction, "losses": step by step}."""
    arguments = TrainingArguments(
        str(options.out), max_steps=options.steps, per_device_train_batch_size=32, per_device_eval_batch_size=64,
        learning_rate=options.lr, warmup_steps=options.steps // 10, logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=options.device == "cpu", disable_tqdm=True, seed=options.seed,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=train, eval_dataset=test, data_collator=collator,
        compute_metrics=lambda prediction: {"score": score(prediction)},
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"score": trainer.evaluate()["eval_score"], "losses": losses, "kind": type(model)}


def share(right: np.ndarray) -> float:
    return float(np.mean(right))


def classify(options, tokenizer) -> dict:
    """Whether a sentence says "not"."""

    def rows(count, seed):
        for words in sentences(count, seed):
            words = [word for word in words if word != "not"]
            label = random.Random(" ".join(words)).randrange(2)
            yield {**tokenizer(" ".join(["not"] * label + words[::-1])), "labels": label}

    model = transformers.AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=2)
    collator = transformers.DataCollatorWithPadding(tokenizer)
    return train(options, model, list(rows(512, 1)), list(rows(128, 2)), collator,
                 lambda found: share(found.predictions.argmax(-1) == found.label_ids))  # fmt: skip


def tokens(options, tokenizer) -> dict:
    """A label for each word: colour, animal or other; of a word's pieces the first has it, as in run_ner.py."""

    def rows(count, seed):
        for words in sentences(count, seed):
            encoded = tokenizer(words, is_split_into_words=True)
            places = encoded.word_ids()
            firsts = [i for i, place in enumerate(places) if place is not None and place != places[i - 1]]
            labels = [-100] * len(places)
            for i in firsts:
                labels[i] = 1 if words[places[i]] in COLOURS else 2 if words[places[i]] in ANIMALS else 0
            yield {**encoded, "labels": labels}

    model = transformers.AutoModelForTokenClassification.from_pretrained(options.model, num_labels=3)
    collator = transformers.DataCollatorForTokenClassification(tokenizer)
    return train(options, model, list(rows(512, 1)), list(rows(128, 2)), collator, labelled_share)


def labelled_share(found) -> float:
    """The share of right ones where there is a label."""
    labelled = found.label_ids != -100
    return share(found.predictions.argmax(-1)[labelled] == found.label_ids[labelled])


def answers(options, tokenizer) -> dict:
    """Which colour, or which animal, a text names; it is cut into windows that overlap."""

    def made(count, seed):
        draw = random.Random(seed)
        for words in sentences(count, seed):
            words = [word for word in words + words if word in OTHERS]
            named = {"colour": draw.choice(COLOURS), "animal": draw.choice(ANIMALS)}
            for word in named.values():
                words.insert(draw.randint(0, len(words)), word)
            asked = draw.choice(list(named))
            question = "is it red" if asked == "colour" else "is it a fox"
            yield question, " ".join(words), named[asked]

    def windows(examples):
        encoded = tokenizer(
            [question for question, _, _ in examples], [text for _, text, _ in examples], truncation="only_second",
            max_length=24, stride=8, return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        rows, places = [], []
        for window, example in enumerate(encoded["overflow_to_sample_mapping"]):
            _, text, answer = examples[example]
            offsets, sides = encoded["offset_mapping"][window], encoded.sequence_ids(window)
            inside = {offset: place for place, (offset, side) in enumerate(zip(offsets, sides, strict=True)) if side}
            begin = text.split().index(answer)
            first = len(" ".join(text.split()[:begin])) + (begin > 0)
            starts = [place for (start, _), place in inside.items() if start == first]
            ends = [place for (_, end), place in inside.items() if end == first + len(answer)]
            whole = starts and ends  # else the window has no answer, which [CLS] stands for
            row = {key: encoded[key][window] for key in ("input_ids", "token_type_ids", "attention_mask")}
            rows.append(row | {"start_positions": starts[0] if whole else 0, "end_positions": ends[0] if whole else 0})
            places.append((example, {place: offset for offset, place in inside.items()}))
        return rows, places

    test = list(made(128, 2))
    rows, places = windows(test)

    def score(found) -> float:
        best = {}
        for (example, inside), starts, ends in zip(places, *found.predictions, strict=True):
            spans = [
                (starts[i] + ends[j], inside[i][0], inside[j][1]) for i in inside for j in inside if 0 <= j - i < 4
            ]
            best[example] = max(best.get(example, (-np.inf,)), max(spans))
        return share([test[i][1][begin:end] == test[i][2] for i, (_, begin, end) in best.items()])

    model = transformers.AutoModelForQuestionAnswering.from_pretrained(options.model)
    return train(options, model, windows(list(made(512, 1)))[0], rows, transformers.DataCollatorWithPadding(tokenizer),
                 score)  # fmt: skip


def choice(options, tokenizer) -> dict:
    """Which of four endings names a colour."""

    def rows(count, seed):
        draw = random.Random(seed)
        for words in sentences(count, seed):
            label = draw.randrange(4)
            endings = [draw.choices(ANIMALS + OTHERS, k=draw.randint(2, 6)) for _ in range(4)]
            endings[label].insert(0, draw.choice(COLOURS))
            yield {**tokenizer([" ".join(words)] * 4, [" ".join(ending) for ending in endings]), "labels": label}

    model = transformers.AutoModelForMultipleChoice.from_pretrained(options.model)
    collator = transformers.DataCollatorForMultipleChoice(tokenizer)
    return train(options, model, list(rows(512, 1)), list(rows(128, 2)), collator,
                 lambda found: share(found.predictions.argmax(-1) == found.label_ids))  # fmt: skip


def words(options, tokenizer) -> dict:
    """Masked words of sentences that say one word again and again."""

    def rows(count, seed):
        draw = random.Random(seed)
        return [tokenizer(" ".join([draw.choice(COLOURS + ANIMALS)] * draw.randint(8, 20))) for _ in range(count)]

    model = transformers.AutoModelForMaskedLM.from_pretrained(options.model)
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    return train(options, model, rows(512, 1), rows(128, 2), collator, labelled_share)


TASKS = {task.__name__: task for task in (classify, tokens, answers, choice, words)}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--model", help="a BERT's folder (default: a small one, drawn at random)")
    parser.add_argument("--out", type=Path, default=Path("build/trainer_tasks"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.set_seed(options.seed)
    options.model = options.model or small_model(options.out / "model")
    found = TASKS[options.task](options, transformers.AutoTokenizer.from_pretrained(options.model))
    print(
        f"{options.task}: {found['kind'].__module__} scores {found['score']:.1%}, last loss {found['losses'][-1]:.4f}"
    )
    return found


if __name__ == "__main__":
    main()
