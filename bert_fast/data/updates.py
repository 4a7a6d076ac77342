"""Which samples form an update, and which process computes them: pure functions of (seed, place in the data).

The stream of a phase is epoch after epoch, each in the order of ``PretrainingDataset.order``; an update takes the
next ``batch_size`` sequences of it, and one that meets the end of an epoch goes on with the next epoch's first. So
every sample is seen exactly once an epoch, whatever the number of ranks and the size of micro-batches: those decide
only how an update's sequences are dealt, not which they are.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import numpy as np

from bert_fast.data.dataset import PretrainingDataset
from bert_fast.data.places import Place, Places


@dataclass(frozen=True)
class Update:
    """The sequences of one update; arrays are (sequences,), int64. A sequence's number in them is its slot.

    epochs, indices   which samples: number ``indices`` of ``epochs``
    lengths, masked   their tokens, and how many of these are predicted (of whole words: how many are expected)
    mask_prob         the share of their tokens that is predicted
    rows              (sequences, 5): a_start, a_end, b_start, b_end, label, what a sample is made from
    after             the place of the next update
    read              of several sources (mixture.py) the epochs of each that are read so far, with a fraction
    """

    step: int
    seq: int
    epochs: np.ndarray
    indices: np.ndarray
    lengths: np.ndarray
    masked: np.ndarray
    rows: np.ndarray
    after: Place | Places
    mask_prob: float
    read: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)


class Stream:
    """The samples of a phase from ``place`` on, of at most ``seq`` tokens each, epoch after epoch without end.

    ``dataset`` gives corpus and settings and stays as it is. A thread plans the next epoch, so that nothing waits
    for it where one ends: it takes microseconds a sample, minutes for all of Wikipedia. ``source`` (k, S) says that it
    is source k of S (mixture.py).
    """

    def __init__(self, dataset: PretrainingDataset, seq: int, place: Place, source: tuple[int, int] = (0, 1)):
        self.dataset, self.seq, self.place, self.source = dataset, seq, place, source
        self.next: Future | None = None  # the dataset and the order of the epoch after this one
        self.dataset, self.order = self._planned(place.epoch)

    def _planned(self, epoch: int) -> tuple[PretrainingDataset, np.ndarray]:
        dataset = self.dataset.replanned(epoch=self._drawn_as(epoch), max_length=self.seq)
        return dataset, dataset.order()

    def _drawn_as(self, epoch: int) -> int:
        number, of = self.source
        return epoch * of + number

    def _turn_to(self, epoch: int) -> None:
        self.dataset, self.order = self._planned(epoch) if self.next is None else self.next.result()
        self.next = None

    def ahead(self, size: int) -> np.ndarray:
        """int64: lengths of the next samples, at least one, ``size`` at most and no further than the epoch."""
        epoch, position = self.place
        if position >= len(self.order):
            self._turn_to(epoch + 1)
            self.place = Place(epoch + 1, 0)
        begin = self.place.position
        return self.dataset.plan.length[self.order[begin : begin + size]]

    @property
    def epochs_read(self) -> float:
        """How many epochs are read so far."""
        return self.place.epoch + self.place.position / len(self.order)

    def take(self, step: int, size: int, mask_prob: float | None = None) -> Update:
        """Update ``step``: the next ``size`` sequences, ``mask_prob`` of whose tokens are predicted (None: as the
        dataset says)."""
        epoch, position = self.place
        taken, missing = [], size
        while missing:
            if position >= len(self.order):
                epoch, position = epoch + 1, 0
                self._turn_to(epoch)
            indices = self.order[position : position + missing]
            plan = self.dataset.plan
            taken.append(
                (np.full(len(indices), self._drawn_as(epoch)), indices, plan.length[indices], plan.rows(indices))
            )
            position, missing = position + len(indices), missing - len(indices)
            if self.next is None and 2 * position >= len(self.order):  # in time, and in vain in few runs
                self.next = in_background(partial(self._planned, epoch + 1))
        self.place = Place(epoch, position)
        epochs, indices, lengths, rows = (np.concatenate(column) for column in zip(*taken, strict=True))
        mask_prob = self.dataset.mask_prob if mask_prob is None else mask_prob
        masked = self.dataset.expected(lengths, mask_prob)
        return Update(step, self.seq, epochs, indices, lengths, masked, rows, self.place, mask_prob)


def in_background(make: Callable) -> Future:
    """What ``make()`` gives or raises, from a thread that does not keep the process from ending."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(make())
        except BaseException as error:  # for the thread that asks for the result
            future.set_exception(error)

    threading.Thread(target=run, name="planning the next epoch", daemon=True).start()
    return future
