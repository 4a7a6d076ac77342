"""The loop of fine-tuning: updates of packed batches, a measure after each epoch, the best epoch's weights.

What an update does is a pure function of the options, the examples and its number: the order of an epoch is drawn from
(seed, epoch), dropout from (seed, update). So a checkpoint needs weights, the optimiser and a few numbers, and a run
that goes on gives the bits of one that was not interrupted. The learning rate, the optimiser and clipping are those of
``transformers.Trainer``, and so are losses and weights, to rounding, on the same batches.
"""

import math
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor, nn

from bert_fast import optim
from bert_fast.data.bins import micro_batches
from bert_fast.run import checkpoint
from bert_fast.run.export import description
from bert_fast.run.new_model import load_weights
from bert_fast.run.optimizer import load_state, state_tensors
from bert_fast.run.process import Stop
from bert_fast.tasks.network import parameter_groups
from bert_fast.tasks.prediction import scored
from bert_fast.tasks.task import Item, Task, packed
from bert_fast.train.distributed import Ranks
from bert_fast.train.step import Outcome, Step, derived_seed


@dataclass(frozen=True)
class Settings:
    """How a model is trained.

    epochs            times through the items, which may end within one; ``batch_size`` items an update
    learning_rate     the highest, after ``warmup``, a share of all updates; then it falls linearly to 0
    layer_decay       see :func:`bert_fast.tasks.network.parameter_groups`
    keep              the weights of the "best" epoch or of the "last"
    patience          epochs that may be no better than the best before it stops; None: as many as there are
    checkpoint_every  updates; None: an epoch
    tokens            of a micro-batch, at most (one item may have more)
    """

    epochs: float
    batch_size: int
    learning_rate: float
    warmup: float
    weight_decay: float
    layer_decay: float
    patience: int | None
    checkpoint_every: int | None
    seed: int
    bf16: bool
    tokens: int
    keep: str = "best"


class Parts(NamedTuple):
    """The items to train on, and those to measure on with their examples."""

    train: list[Item]
    validation: list[Item]
    examples: list


@dataclass
class State:
    """How far a run is: ``step`` updates, ``skipped`` of them not finite; the measures of its ``history``, one an
    epoch, and the number ``best`` among them, at update ``best_step``."""

    step: int = 0
    skipped: int = 0
    losses: float = 0.0  # of the updates since the last measure
    history: list[dict] = field(default_factory=list)
    best: int = -1
    best_step: int = -1
    stopped: bool = False


class Stopped(Exception):
    """A signal asked the run to stop; its checkpoint is written."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}: the same command goes on from its checkpoint")
        self.signal = number


class _Objective(nn.Module):
    """A task's model as :class:`Step` calls one: with a batch and its counts, to an output with a loss."""

    def __init__(self, task: Task, model: nn.Module):
        super().__init__()
        self.task, self.model = task, model

    def forward(self, *, num_items_in_batch: Tensor, num_sequences_in_batch: Tensor, hidden_dtype, **batch):
        more = {} if hidden_dtype is None else {"hidden_dtype": hidden_dtype}
        loss, _ = self.task.forward(self.model, batch, num_items_in_batch, **more)
        return _Loss(loss)


class _Loss(NamedTuple):
    loss: Tensor


class Training:
    """A run of fine-tuning ``model`` for ``task``, on the ranks' device, ready to go on from its last checkpoint.

    ``folder`` gets checkpoints (None: none); one there that has another ``identity`` is refused with ValueError.
    """

    def __init__(
        self, task: Task, model: Any, tokenizer: Tokenizer, parts: Parts, settings: Settings, ranks: Ranks,
        *, folder: Path | None = None, identity: dict | None = None, tell: Callable[[str], None] = lambda text: None,
    ):  # fmt: skip
        self.task, self.model, self.tokenizer, self.parts = task, model.to(ranks.device), tokenizer, parts
        self.settings, self.ranks, self.folder, self.identity = settings, ranks, folder, identity or {}
        self.optimizer = optim.AdamW(
            parameter_groups(model, settings.weight_decay, settings.layer_decay), lr=settings.learning_rate, eps=1e-8,
            max_grad_norm=1.0,
        )  # fmt: skip
        self.update = Step(_Objective(task, model), self.optimizer, ranks, bf16=settings.bf16)
        self.lengths = np.array([item.length for item in parts.train])
        self.an_epoch = math.ceil(len(parts.train) / settings.batch_size)
        self.total = math.ceil(self.an_epoch * settings.epochs)
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        self.state = State()
        self.best: dict[str, Tensor] = {}  # the weights of the best epoch, on the CPU
        if folder is not None:
            self._go_on(tell)

    def run(
        self, on_step: Callable[[int, int, float], None] | None = None,
        on_epoch: Callable[[dict], None] | None = None, asked_to_stop: Stop | None = None,
    ) -> State:  # fmt: skip
        """Trains to the end, and leaves the best epoch's weights in the model; FloatingPointError where none of the
        measures is finite. ``on_step(step, steps, loss)`` is called after every update. Where ``asked_to_stop`` says
        so, a checkpoint is written and :class:`Stopped` raised."""
        state, on_cpu = self.state, self.ranks.device.type == "cpu"
        waiting: list[tuple[int, Outcome]] = []
        while state.step < self.total and not state.stopped:
            outcome = self.one(state.step)
            state.step += 1
            waiting.append((state.step, outcome))
            measuring = state.step % self.an_epoch == 0 or state.step == self.total
            number = None if asked_to_stop is None else asked_to_stop.signal
            saving = self.folder is not None and (measuring or number is not None or self._every())
            # a GPU is asked for an update's numbers when it has the next one to do
            while waiting and (on_cpu or measuring or saving or len(waiting) > 1):
                self._account(*waiting.pop(0), on_step)
            if measuring:
                self._measure()
                if on_epoch is not None:
                    on_epoch(state.history[-1])
            if saving:
                self._save()
            if number is not None and state.step < self.total:
                raise Stopped(number)
        if not self.best or (self.settings.keep == "last" and state.best != len(state.history) - 1):
            raise FloatingPointError(
                f"the loss is {state.history[-1]['loss']}: nothing was kept; lower the learning rate"
            )
        load_weights(self.model, self.best)
        return state

    def members(self, step: int) -> np.ndarray:
        """The numbers of the items of update ``step`` (from 0)."""
        epoch, place = divmod(step, self.an_epoch)
        if epoch != self._epoch:
            draw = np.random.default_rng(derived_seed(self.settings.seed, "order", epoch))
            self._epoch, self._order = epoch, draw.permutation(len(self.lengths))
        return self._order[place * self.settings.batch_size : (place + 1) * self.settings.batch_size]

    def learning_rate(self, step: int) -> float:
        """As transformers' linear schedule with warm-up, whose first update has 0 where there is any."""
        warmup = math.ceil(self.total * self.settings.warmup)
        if step < warmup:
            return self.settings.learning_rate * step / warmup
        return self.settings.learning_rate * (self.total - step) / max(1, self.total - warmup)

    def one(self, step: int) -> Outcome:
        """Update number ``step``, from 0."""
        members = self.members(step)
        slots = self._slots(members)
        largest = max(self.settings.tokens, int(self.lengths[members].max()))
        batches = []
        for part in micro_batches(self.lengths[members], np.arange(len(members)), largest):
            items = [self.parts.train[members[i]] for i in part]
            batches.append(packed(items, slots[part].tolist()) | self.task.targets(items))
        return self.update(
            batches,
            seed=derived_seed(self.settings.seed, "dropout", step),
            lr=self.learning_rate(step),
            predicted=self.task.weight([self.parts.train[i] for i in members]),  # type: ignore[arg-type]
            sequences=0,
        )

    def _slots(self, members: np.ndarray) -> np.ndarray:
        counts = [len(self.parts.train[i].sequences) for i in members]
        return np.cumsum([0, *counts[:-1]])

    def _account(self, step: int, outcome: Outcome, on_step: Callable[[int, int, float], None] | None) -> None:
        loss, _, _, norm = outcome.scalars.tolist()
        finite = math.isfinite(loss) and math.isfinite(norm)
        self.state.skipped += not finite
        self.state.losses += loss if finite else 0.0
        if on_step is not None:
            on_step(step, self.total, loss)

    def _measure(self) -> None:
        """The measures of an epoch join the history; the best one's weights are kept."""
        state, task, settings = self.state, self.task, self.settings
        scores, loss = scored(task, self.model, self.parts.validation, tokens=settings.tokens, bf16=settings.bf16)
        since = state.step - (state.history[-1]["step"] if state.history else 0)
        measures: dict[str, Any] = {
            "epoch": state.step / self.an_epoch, "step": state.step, "loss": loss, "train_loss": state.losses / since,
        }  # fmt: skip
        state.losses = 0.0
        if math.isfinite(loss or 0.0):
            found = task.predictions(self.parts.examples, self.parts.validation, scores)
            measures |= task.metrics(self.parts.examples, found)
        state.history.append(measures)
        best = state.history[state.best] if state.best >= 0 and settings.keep == "best" else None
        if task.metric in measures and (best is None or rank(task, measures) > rank(task, best)):
            state.best, state.best_step = len(state.history) - 1, state.step
            self.best = {name: p.detach().to("cpu", copy=True) for name, p in self.model.named_parameters()}
        since_best = len(state.history) - 1 - state.best
        state.stopped = settings.patience is not None and since_best >= settings.patience

    def _every(self) -> bool:
        every = self.settings.checkpoint_every
        return every is not None and self.state.step % every == 0

    def _save(self) -> None:
        assert self.folder is not None
        state = asdict(self.state) | {"identity": self.identity}
        weights = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        checkpoint.save(
            self.folder, state, weights, state_tensors(self.optimizer, self.model), self.ranks,
            description=description(self.model, self.tokenizer), keep=1, also=(self.state.best_step,),
        )  # fmt: skip

    def _go_on(self, tell: Callable[[str], None]) -> None:
        """From the folder's newest whole checkpoint, if there is one."""
        assert self.folder is not None
        found, complaints = checkpoint.newest(self.folder)
        for complaint in complaints:
            tell(complaint)
        if found is None:
            return
        require_same(self.folder, found.state["identity"], self.identity)
        load_weights(self.model, found.tensors("model"))
        load_state(self.optimizer, self.model, found.tensors("optimizer"))
        self.state = State(**{name: found.state[name] for name in State.__dataclass_fields__})
        if self.state.best >= 0:
            best = checkpoint.folder_of(self.folder, self.state.best_step)
            try:
                self.best = checkpoint.read(best).tensors("model")
            except (OSError, ValueError) as error:
                raise checkpoint.CheckpointError(
                    f"{best}, with the best epoch's weights, is damaged: {error}. Delete {best.parent} to begin anew"
                ) from error
        tell(f"going on from {found.folder}, update {found.step} of {self.total}")


def rank(task: Task, measures: dict) -> tuple[float, float]:
    """What is greater where an epoch or a seed is better: its metric (NaN is the worst), then its loss."""
    metric = measures[task.metric]
    return (metric if math.isfinite(metric) else -math.inf, -measures["loss"])


def require_same(folder: Path, before: dict, now: dict) -> None:
    """ValueError naming what of the options ``before`` and ``now`` differs."""
    differing = [
        f"{name} (was {before.get(name)}, now {now.get(name)})"
        for name in sorted({*before, *now}) if before.get(name) != now.get(name)
    ]  # fmt: skip
    if differing:
        raise ValueError(
            f"{folder} holds a fine-tuning that has not ended and differs in {'; '.join(differing)}: give the options "
            f"that it was started with, or delete {folder} to begin anew, or choose another --out"
        )
