"""A phase of pre-training: updates at one sequence length and batch size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bert_fast.data.masking import MASK_PROB


@dataclass(frozen=True)
class Phase:
    """Updates ``first .. last - 1`` (counted from 0) at one sequence length and batch size.

    The learning rate of its updates follows a schedule over updates ``schedule_first .. schedule_last - 1``, which
    phases share unless one names a learning rate or warm-up of its own. ``warmup`` and ``decay``, the schedule's last
    part where it has one, are in updates. ``mask_probs`` are the shares of tokens that its first and its last update
    predict.

    Where a run spread what was left of its plan over another number of updates (:func:`paced`), ``first`` and ``last``
    are as they became and the schedule as it was planned; ``planned`` are the ``first`` and ``last`` of the plan.
    ``pace`` has (update, its place in the plan, updates of the plan by which each update from there goes on), in order.
    """

    seq: int
    first: int
    last: int
    batch_size: int
    lr: float
    warmup: int
    schedule_first: int
    schedule_last: int
    decay: int = 0
    mask_probs: tuple[float, float] = (MASK_PROB, MASK_PROB)
    planned: tuple[int, int] | None = None
    pace: tuple[tuple[int, float, float], ...] = ()

    def place(self, step: int) -> float:
        """Where update ``step`` (from 0) stands in the plan: ``step`` itself where that never changed."""
        return next((place + (step - at) * rate for at, place, rate in reversed(self.pace) if step >= at), step)

    def mask_prob(self, step: int) -> float:
        """The share of tokens that update ``step`` (from 0) predicts: linear from the first update to the last."""
        first, last = self.mask_probs
        begin, end = self.planned or (self.first, self.last)
        return first + (last - first) * min(1, (self.place(step) - begin) / max(1, end - 1 - begin))


def paced(found: Sequence[Phase], changes: Sequence[tuple[int, int]]) -> list[Phase]:
    """The phases ``found`` of a run that at update ``at`` spread the rest of its plan over ``number`` updates.

    ``changes`` are (at, number), in order. Schedule and masking rate go on from where they are to the same end, and
    phases keep their share. ValueError for a change that is not within the updates that there are then.
    """
    total = end = found[-1].last
    pace: list[tuple[int, float, float]] = [(0, 0, 1)]
    for at, number in changes:
        begun, place, rate = pace[-1]
        if not begun <= at < end or number < 1:
            raise ValueError(f"{at}:{number} is not within the {end} updates that there are")
        place += (at - begun) * rate
        pace.append((at, place, (total - place) / number))
        end = at + number

    def update_at(planned: int) -> int:
        """The first update at or after a place in the plan."""
        if planned == total:
            return end
        at, place, rate = next(piece for piece in reversed(pace) if piece[1] <= planned)
        return min(end, at + math.ceil(round((planned - place) / rate, 6)))

    if not changes:
        return list(found)
    return [
        replace(
            phase, first=update_at(phase.first), last=update_at(phase.last), planned=(phase.first, phase.last),
            pace=tuple(pace[1:]),
        )
        for phase in found
    ]  # fmt: skip
