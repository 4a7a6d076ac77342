"""Fine-tuning and prediction, beside transformers' own Trainer as its example scripts use it.

Ours is the loop of ``bert-fast finetune``. Of Trainer it is the sampler, collator, training step, clipping,
optimiser and schedule, in its order; its logs and callbacks are left out, which is in its favour. Ids are random, their
lengths are those of two data sets. Every contender reads the same examples, in the batches that it makes of them; a
round is a few updates, and what is compared are real tokens a second.
"""

import math
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import transformers

from benchmarks import clock, parity, tables
from benchmarks.contenders import RATE
from benchmarks.limits import NAMES
from benchmarks.results import Results
from benchmarks.steps import DROPOUT, release
from benchmarks.workload import model_config
from bert_fast.data.tokenizer import SPECIAL_NAMES, SPECIAL_TOKENS, berts_tokenizer
from bert_fast.devices import has_matrix_unit
from bert_fast.flops import step_flops
from bert_fast.optim.reference import optimizer_norm
from bert_fast.tasks.finetuning import TOKENS
from bert_fast.tasks.prediction import scored
from bert_fast.tasks.task import Item, make_task
from bert_fast.tasks.training import Parts, Settings, Training
from bert_fast.train.distributed import Ranks

# Of the 6,920 training sentences of SST-2 (binary, whole sentences) how many have 0, 1, 2 ... tokens of BERT's
# vocabulary with [CLS] and [SEP]: 23.3 in the mean.
SST2 = (
    0, 0, 0, 12, 43, 66, 86, 128, 135, 157, 173, 193, 210, 202, 205, 206, 235, 237, 259, 248, 220, 233, 245, 241, 222,
    242, 230, 205, 198, 191, 163, 187, 155, 150, 143, 132, 113, 103, 82, 86, 94, 79, 62, 50, 46, 51, 19, 28, 22, 22, 18,
    19, 21, 14, 11, 9, 3, 2, 2, 5, 0, 2, 0, 0, 1, 1, 2, 1,
)  # fmt: skip
# A model of SQuAD's windows of 384 tokens, not its data: log-normal, these the mean and deviation of the logarithm.
SQUAD_LIKE = (5.05, 0.36)
EXAMPLES = 6920

# name: (what it is, Trainer's sampling, padded to the full length)
PEERS = {
    "trainer": ("transformers.Trainer, batches padded to their longest", "random", False),
    "trainer-grouped": ("the same, examples of like lengths together", "group_by_length", False),
    "trainer-padded": ("the same, padded to 384 tokens as run_qa.py does by default", "random", True),
}
BOUND = 1e-4  # of a loss and a norm in float32, relative


@dataclass(frozen=True)
class Work:
    """Examples of a ``task``: an update has ``batch``, cut to ``seq`` tokens; a round has ``updates``, and predicts
    ``predicted`` examples."""

    name: str
    task: str
    seq: int
    batch: int
    updates: int
    predicted: int

    def lengths(self, seq: int) -> np.ndarray:
        draw = np.random.default_rng(0)
        if self.task == "classify":
            found = draw.choice(len(SST2), EXAMPLES, p=np.array(SST2) / sum(SST2))
        else:
            found = np.exp(draw.normal(*SQUAD_LIKE, EXAMPLES))
        return np.clip(found.astype(np.int64), 8, seq)

    def items(self, vocabulary: int, seq: int) -> list[Item]:
        draw = np.random.default_rng(1)
        made = []
        for number, length in enumerate(self.lengths(seq).tolist()):
            target = number % 2 if self.task == "classify" else tuple(sorted(draw.integers(1, length, 2).tolist()))
            ids = draw.integers(len(SPECIAL_TOKENS), vocabulary, length).tolist()
            made.append(Item([(ids, [0] * length)], number, target))
        return made


# Batches of the examples' own commands in transformers: run_glue.py and run_qa.py.
WORKS = (Work("SST-2's lengths", "classify", 128, 32, 4, 512), Work("SQuAD-like lengths", "qa", 384, 12, 2, 48))


class Contender:
    """One who trains and predicts, and remembers what: of each call the real lengths and those computed."""

    padding = "packed"

    def __init__(self, bf16: bool):
        self.dtype = NAMES[torch.bfloat16 if bf16 else torch.float32]
        self.calls: list[tuple[list[int], list[int]]] = []

    def train(self) -> None:
        """A round of updates."""
        raise NotImplementedError

    def predict(self) -> None:
        """A round of predictions."""
        raise NotImplementedError


class Ours(Contender):
    """The loop of ``bert-fast finetune``."""

    def __init__(self, work: Work, config, items: list[Item], device: str, bf16: bool):
        super().__init__(bf16)
        self.work, self.items, self.task = work, items, make_task(work.task)
        settings = Settings(
            epochs=10**6, batch_size=work.batch, learning_rate=RATE, warmup=0.0, weight_decay=0.0, layer_decay=1.0,
            patience=None, checkpoint_every=None, seed=0, bf16=bf16, tokens=TOKENS[device],
        )  # fmt: skip
        torch.manual_seed(0)
        model, ranks = self.task.model(config), Ranks(0, 1, torch.device(device))
        self.training, self.step = Training(self.task, model, None, Parts(items, [], []), settings, ranks), 0

    def train(self) -> None:
        lengths: list[int] = []
        for _ in range(self.work.updates):
            lengths += [self.items[i].length for i in self.training.members(self.step)]
            self.training.one(self.step)
            self.step += 1
        self.calls.append((lengths, lengths))

    def predict(self) -> None:
        items = [item._replace(target=None) for item in self.items[: self.work.predicted]]
        settings = self.training.settings
        scored(self.task, self.training.model, items, tokens=settings.tokens, bf16=settings.bf16)
        lengths = [item.length for item in items]
        self.calls.append((lengths, lengths))


class Trainers(Contender):
    """transformers' model and Trainer."""

    def __init__(self, name: str, work: Work, config, items: list[Item], device: str, bf16: bool, seq: int):
        super().__init__(bf16)
        _, sampling, full = PEERS[name]
        self.work, self.padding = work, "padded" if full else "longest"
        padding = {"padding": "max_length", "max_length": seq} if full else {"padding": True}
        rows = [row_of(item) for item in items]
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=berts_tokenizer({token: n for n, token in enumerate(SPECIAL_TOKENS)}, lowercase=True),
            model_input_names=["input_ids", "token_type_ids", "attention_mask"], **SPECIAL_NAMES,
        )  # fmt: skip
        torch.manual_seed(0)
        kind = getattr(transformers, make_task(work.task).model.__name__)
        self.folder = tempfile.TemporaryDirectory()  # Trainer wants one; nothing is written there
        collate = transformers.DataCollatorWithPadding(tokenizer, **padding)
        self.trainer = transformers.Trainer(
            model=kind(config),
            args=transformers.TrainingArguments(
                output_dir=self.folder.name, per_device_train_batch_size=work.batch, learning_rate=RATE, bf16=bf16,
                per_device_eval_batch_size=work.batch, max_steps=10**6, train_sampling_strategy=sampling, report_to=[],
                use_cpu=device == "cpu", dataloader_pin_memory=device != "cpu", save_strategy="no", disable_tqdm=True,
            ),
            train_dataset=rows, data_collator=self._noting(collate),
        )  # fmt: skip
        self.rows = [{k: v for k, v in row.items() if "label" not in k and "positions" not in k} for row in rows]
        self.noted: tuple[list[int], list[int]] = ([], [])
        self.trainer.create_optimizer()
        self.network, self.trainer.optimizer = self.trainer.accelerator.prepare(
            self.trainer.model, self.trainer.optimizer
        )
        self.trainer.create_scheduler(num_training_steps=10**6)
        self.batches = self._batches()

    def _noting(self, collate):
        def noting(rows: list[dict]) -> dict:
            batch = collate(rows)
            self.noted[0].extend(len(row["input_ids"]) for row in rows)
            self.noted[1].extend([batch["input_ids"].shape[1]] * len(rows))
            return batch

        return noting

    def _batches(self) -> Iterator[list[dict]]:
        """The batches that Trainer's sampler makes of the examples, in any order: it has the longest ones first."""
        draw = np.random.default_rng(0)
        while True:
            batches = list(self.trainer.get_train_dataloader().batch_sampler)
            for number in draw.permutation(len(batches)):
                yield [self.trainer.train_dataset[i] for i in batches[number]]

    def next_batch(self) -> tuple[dict, object]:
        """(a batch, what Trainer divides its loss by)."""
        batch = self.trainer.data_collator(next(self.batches))
        self.trainer.current_gradient_accumulation_steps = 1
        (inputs,), count = self.trainer.get_batch_samples(iter([batch]), 1, self.trainer.args.device)
        return inputs, count

    def train(self) -> None:
        trainer, self.noted = self.trainer, ([], [])
        for _ in range(self.work.updates):
            inputs, count = self.next_batch()
            trainer.training_step(self.network, inputs, count)
            trainer.accelerator.clip_grad_norm_(self.network.parameters(), trainer.args.max_grad_norm)
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
            self.network.zero_grad()
        self.calls.append(self.noted)

    def predict(self) -> None:
        self.noted = ([], [])
        self.trainer.predict(self.rows[: self.work.predicted])
        self.calls.append(self.noted)


def row_of(item: Item) -> dict:
    """An item as a row of transformers' data sets."""
    ((ids, segments),) = item.sequences
    row = {"input_ids": ids, "token_type_ids": segments, "attention_mask": [1] * len(ids)}
    if isinstance(item.target, tuple):
        return row | dict(zip(("start_positions", "end_positions"), item.target, strict=True))
    return row | {"labels": item.target}


def groups(device: str, named: str) -> list[tuple[bool, bool]]:
    """Of each table whether ours multiplies in bfloat16, and whether Trainer does: of the dtype that is ``named``;
    "auto": float32 as published beside ours as it chooses, and where that is bfloat16 a second table of it alone."""
    if named != "auto":
        return [(named == "bfloat16",) * 2]
    automatic = has_matrix_unit(torch.device(device), torch.bfloat16)
    return [(automatic, False)] + [(True, True)] * automatic


def compare(asked, file: Results) -> int:
    """Parity and the tables of both works; the exit status."""
    config = model_config(asked.model, dropout=DROPOUT)
    works = [(work, min(work.seq, config.max_position_embeddings)) for work in WORKS]
    file.data["work"] = {
        "model": asked.model, "seq": max(work.seq for work in WORKS), "dtype": asked.dtype, "mode": "finetune",
        "rounds": asked.rounds, "lengths": "those of SST-2, and a model of SQuAD's", "dropout": DROPOUT,
    }  # fmt: skip
    file.data["steps"] = []
    verdict = parity.summary([row for work, seq in works for row in parity_rows(work, asked.model, asked.device, seq)])
    file.put("parity", verdict)
    tables.parity(verdict).show()
    if not verdict["passed"]:
        print("benchmarks/run.py: parity failed, so no speed is measured", file=sys.stderr)
        return 1
    for work, seq in works:
        for group in asked.groups:
            for rows in measured(asked, work, config, seq, group, file.data["limits"]):
                title = f"{rows[0]['mode']}, {work.name}, BERT-{asked.model}, Trainer in {rows[-1]['dtype']}"
                tables.steps(rows, tables.FINETUNE, title).show()
                file.add("steps", *rows)
    return 0


def parity_rows(work: Work, model: str, device: str, seq: int) -> list[dict]:
    """Rows of parity, in float32 without dropout: the loss of a batch, ours packed, transformers' padded, and the norm
    of its gradients. For labels of texts weights are ten times as large as BERT's at first, so that every token counts;
    for answers every token does, and such weights make gradients that are noise."""
    config = model_config(model, dropout=0.0)
    items = work.items(config.vocab_size, seq)[: work.batch]
    if work.task == "qa":  # beside padding, transformers' softmax reads the padding's scores, too
        items = cut_alike(items)
    else:
        config.initializer_range *= 10
    ours = Ours(work, config, items, device, bf16=False)
    theirs = Trainers("trainer", work, config, items, device, bf16=False, seq=seq)
    theirs.network.load_state_dict(ours.training.model.state_dict())
    loss, _, _, norm = ours.training.one(0).scalars.tolist()
    expected = theirs.trainer.training_step(theirs.network, *theirs.next_batch()).item()
    # by float64: PyTorch's own norm on a CPU adds float32's squares, and loses up to a thousandth of such a model's
    norms = optimizer_norm([p.grad for p in theirs.network.parameters() if p.grad is not None]).item()
    release()
    pairs = {f"loss, {work.name}": (loss, expected), f"norm of gradients, {work.name}": (norm, norms)}
    return [parity.row(what, abs(a - b) / abs(b), 0.0, BOUND, contender="bert_fast") for what, (a, b) in pairs.items()]


def cut_alike(items: list[Item]) -> list[Item]:
    """Questions' ``items``, each as long as the shortest."""
    length = min(item.length for item in items)
    return [
        item._replace(
            sequences=[(ids[:length], segments[:length]) for ids, segments in item.sequences],
            target=tuple(min(place, length - 1) for place in item.target),
        )
        for item in items
    ]


def measured(asked, work: Work, config, seq: int, group: tuple[bool, bool], limits: dict) -> Iterator[list[dict]]:
    """The rows of training, then those of prediction."""
    automatic, theirs = group
    items = work.items(config.vocab_size, seq)
    contenders: dict[str, Contender] = {"bert_fast": Ours(work, config, items, asked.device, automatic)}
    if automatic and not theirs:
        contenders["bert_fast-fp32"] = Ours(work, config, items, asked.device, False)
    for name in asked.peers:
        if name != "trainer-padded" or work.task == "qa":
            contenders[name] = Trainers(name, work, config, items, asked.device, theirs, seq)
    own = clock.Clock(asked.device)
    for mode in ("finetune", "predict"):
        steps = {name: c.train if mode == "finetune" else c.predict for name, c in contenders.items()}
        with tables.Bar() as bar, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bar.phase(f"{work.name}, {mode}: warming up {', '.join(steps)}")
            for step in steps.values():
                step()
            for contender in contenders.values():
                contender.calls.clear()
            bar.phase(f"{work.name}, {mode}: {asked.rounds} rounds", total=asked.rounds * len(steps))
            times = clock.interleave(steps, asked.rounds, own.step, bar.tick)
        rounds = {name: rounds_of(contender.calls, asked.rounds) for name, contender in contenders.items()}
        rows = []
        for name, contender in contenders.items():
            facts = {"contender": name, "key": name, "dtype": contender.dtype, "padding": contender.padding}
            facts |= {"model": asked.model, "seq": seq, "lengths": work.name, "sequences": work.batch, "mode": mode}
            row = facts | rates(work, facts, rounds[name], times[name], config, limits)
            if name != "bert_fast":
                each = [tokens_a_second(rounds[key], times[key]) for key in ("bert_fast", name)]
                row["ours_is"] = float(np.median(each[0] / each[1]))
            rows.append(row)
        yield rows
    contenders.clear()
    release()


def tokens_a_second(rounds: list, times: list[float]) -> np.ndarray:
    """Real tokens a second in each round."""
    tokens = [sum(sum(real) for real, _ in calls) / len(calls) for calls in rounds]
    return np.array(tokens) / np.array(times)


def rates(work: Work, facts: dict, rounds: list, times: list[float], config, limits: dict) -> dict:
    """What follows from the times of all rounds."""
    train, calls = facts["mode"] == "finetune", [call for some in rounds for call in some]
    real, computed = ([n for call in calls for n in call[part]] for part in (0, 1))
    seconds = sum(times) * len(rounds[0])  # of a round with several calls the time is their mean
    read = len(real) if facts["padding"] == "packed" and work.task == "classify" else None
    executed = step_flops(config, computed, 0, train=train, read=read) / seconds / 1e12
    useful = step_flops(config, real, 0, train=train) / seconds / 1e12
    limit = limits["matmul_tflops"].get(facts["dtype"])
    steps = work.updates if train else math.ceil(work.predicted / work.batch)
    return {
        "optimizer": "adamw" if train else "none", "real_tokens": sum(real) // len(calls),
        "step_s": clock.quantiles([t / steps for t in times]), "sequences_per_s": len(real) / seconds,
        "real_tokens_per_s": sum(real) / seconds, "executed_tflops": executed,
        "share_of_peak": executed / limit if limit else None, "mfu": useful / limit if limit else None,
    }  # fmt: skip


def rounds_of(calls: list, rounds: int) -> list[list]:
    """The calls that were timed of each round: of several in a row all but the first (see :class:`Clock`)."""
    each = len(calls) // rounds
    return [calls[n * each + (each > 1) : (n + 1) * each] for n in range(rounds)]
