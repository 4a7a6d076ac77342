"""What the parts of a run cost on this machine, measured by updates that change no weight."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from bert_fast.data import Capacities
from bert_fast.data.dataset import PretrainingDataset
from bert_fast.data.graph_shapes import examples, of_few_documents, sample_lengths, sizes_of_phases
from bert_fast.data.loader import BatchMaker, load_updates, updates
from bert_fast.data.mixture import Mixture, start_of
from bert_fast.data.phase import Phase
from bert_fast.run.validation import Validation, ValidationBySource
from bert_fast.train.distributed import Ranks
from bert_fast.train.step import Step

SKIPPED, TIMED = 2, 6  # updates: the first ones are slow
LITTLE, SOME = 32, 512  # tokens of a process: of an update that is nearly all weights, and of the first with many
DISK = 2e8  # bytes a second, until a checkpoint is timed


@dataclasses.dataclass
class Costs:
    """Seconds of an update by (longest sequence, batch size), of a validation by longest sequence, of a checkpoint.

    ``optimizer`` is what an update takes beside its tokens, of which the last one measured had ``tokens``.
    """

    update: dict[tuple[int, int], float]
    validation: dict[int, float]
    checkpoint: float
    optimizer: float = 0.0
    tokens: int = 0


@dataclasses.dataclass
class Rehearsal:
    """What updates are measured with: the ``step``, samples of some documents of ``dataset``, and the loader's settings
    (see :func:`bert_fast.data.loader.load_updates`). ``settle`` says which kernels serve in a phase."""

    step: Step
    dataset: PretrainingDataset | Mixture
    ranks: Ranks
    tokens: int
    sizes: Mapping[tuple[int, int], Sequence[Capacities]] | None
    settle: Callable[[Phase], None]

    def __post_init__(self):
        self.few = of_few_documents(self.dataset)
        self.least: tuple[float, float] | None = None  # an update of few tokens: seconds without the optimiser, tokens

    def timed(
        self, phase: Phase, number: int, skipped: int, timed: int, most: float = math.inf
    ) -> tuple[float, float, float]:
        """(seconds, seconds of the optimiser, tokens) of an update of ``number`` sequences, those of the slowest
        process: means over ``timed`` updates after ``skipped`` ones, or over what is done after ``most`` seconds."""
        short = dataclasses.replace(phase, first=0, last=skipped + timed, batch_size=number)
        sizes, cpu = self.sizes, self.ranks.device.type == "cpu"
        if sizes is not None:
            if (phase.seq, number) not in sizes:
                sizes = sizes_of_phases(self.dataset, [short], self.tokens)
            self.step.prepare(examples(self.dataset, sizes[phase.seq, number], phase.seq))
        taken = []  # by update
        for work in load_updates(
            BatchMaker(self.few), updates(self.few, [short], 0, start_of(self.few)), rank=self.ranks.rank,
            ranks=self.ranks.world, tokens=self.tokens, workers=0, pin=not cpu, sizes=sizes,
        ):  # fmt: skip
            began = time.perf_counter()
            with _seconds_of(self.step.optimizer) as of_optimizer:
                self.step(
                    work.batches, seed=0, lr=0.0, predicted=int(work.update.masked.sum()),
                    sequences=len(work.update) if self.dataset.nsp else 0,
                ).scalars.tolist()  # fmt: skip
            seconds = [time.perf_counter() - began, sum(of_optimizer) * cpu]  # a GPU has not done the second yet
            slowest = self.ranks.greatest(torch.tensor(seconds, dtype=torch.float64, device=self.ranks.device))
            taken.append([*slowest.tolist(), float(work.update.lengths.sum())])
            if sum(took for took, *_ in taken) >= most:
                break
        kept = taken[min(skipped, len(taken) - 1) :]
        whole, of_optimizer, tokens = (sum(values) / len(kept) for values in zip(*kept, strict=True))
        return whole, of_optimizer, tokens

    def measured(self, phase: Phase, costs: Costs, seconds: float | None, most: float) -> None:
        """Adds what an update of ``phase`` takes to ``costs``; see :func:`rehearsed`."""
        self.settle(phase)
        if seconds is None:
            took, costs.optimizer, had = self.timed(phase, phase.batch_size, SKIPPED, TIMED, most)
        else:
            took, costs.optimizer, had = self.extrapolated(phase, seconds)
        costs.update[phase.seq, phase.batch_size], costs.tokens = took, int(had)

    def extrapolated(self, phase: Phase, seconds: float) -> tuple[float, float, float]:
        """(seconds of an update, those of the optimiser, tokens of the largest that was done), within some ``seconds``.

        A line through two updates gives what a micro-batch takes whatever it holds, weights being read and their
        gradients written, and what a token does.
        """
        ranks, length = self.ranks.world, float(sample_lengths(self.dataset, phase.seq).mean())
        full = min(phase.batch_size, math.ceil(self.tokens * ranks / length))  # sequences: a micro-batch a process
        if self.least is None:
            took, of_optimizer, had = self.timed(dataclasses.replace(phase, seq=min(phase.seq, LITTLE)), ranks, 1, 1)
            self.least = took - of_optimizer, had
        number = min(full, max(ranks, round(SOME * ranks / length)))
        while True:
            took, of_optimizer, had = self.timed(phase, number, 0, 1)
            if number == full or took >= seconds / 2:
                break
            number = min(full, max(2 * number, int(number * seconds / took)))
        if number == phase.batch_size:
            return took, of_optimizer, had
        took -= of_optimizer
        token = (took - self.least[0]) / max(had - self.least[1], 1.0)
        if not 0 <= token * had <= took:  # noise is all that the two differ by
            token = took / had
        whole = phase.batch_size * length
        fixed = math.ceil(whole / (self.tokens * ranks)) * (took - token * had)
        return of_optimizer + fixed + token * whole, of_optimizer, had


def rehearsed(
    rehearsal: Rehearsal, found: Sequence[Phase], validation: Validation | ValidationBySource | None,
    *, seconds: float | None = None, most: float = math.inf,
) -> Costs:  # fmt: skip
    """The costs of the phases ``found``. The model of the rehearsal's step gets an optimiser's state and no update.

    The batches are samples of a few documents, and making them is not timed: a run makes them ahead. With ``seconds``
    an update that takes longer is done in part (see :meth:`Rehearsal.extrapolated`). After ``most`` seconds no
    more updates of a phase are done. Every process calls it.
    """
    model = rehearsal.step.model
    costs = Costs({}, {}, 3 * 4 * sum(p.numel() for p in model.parameters()) / DISK)  # weights and two moments
    for phase in found:
        if (phase.seq, phase.batch_size) not in costs.update:
            rehearsal.measured(phase, costs, seconds, most)
        if validation is not None and phase.seq not in costs.validation:
            began = time.perf_counter()
            validation(model, phase.seq)
            costs.validation[phase.seq] = time.perf_counter() - began
    return costs


@contextmanager
def _seconds_of(optimizer: torch.optim.Optimizer) -> Iterator[list[float]]:
    """The seconds of the steps that ``optimizer`` does meanwhile."""
    taken: list[float] = []
    hooks = [
        optimizer.register_step_pre_hook(lambda *arguments: taken.append(-time.perf_counter())),
        optimizer.register_step_post_hook(lambda *arguments: taken.append(time.perf_counter())),
    ]
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()
