"""Updates with their packed micro-batches, made ahead by worker processes."""

import copy
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bert_fast.data import Capacities, open_corpus, pack_samples
from bert_fast.data.dataset import PretrainingDataset
from bert_fast.train.plan import Place, Stream, Update, deal, micro_batches
from bert_fast.train.schedule import Phase

ROUND_TOKENS, ROUND_MASKED = 64, 16  # capacities are multiples of these: few different shapes, hardly any waste


class Order(NamedTuple):
    """A micro-batch to be made: all that a worker must know, so that it needs no plan of the epoch.

    ``slots`` (n,) are the sequences' numbers in their update, under which the model keys their dropout masks; the
    other fields are those of Update, of these sequences.
    """

    seq: int
    slots: np.ndarray
    epochs: np.ndarray
    indices: np.ndarray
    rows: np.ndarray
    size: Capacities


@dataclass
class Work:
    """One update as this rank computes it: the slots of each micro-batch, and the batches themselves."""

    update: Update
    slots: list[np.ndarray]
    batches: list[dict]


class BatchMaker(Dataset):
    """Makes the packed batch of an :class:`Order`; travels to worker processes without plan or corpus.

    ``folder`` is where a worker that was not forked opens the corpus again; None pickles the corpus.
    """

    def __init__(self, dataset: PretrainingDataset, folder: str | Path | None = None):
        self.dataset, self.folder = copy.copy(dataset), folder
        self.dataset.plan = None

    def __getitem__(self, order: Order) -> dict:
        dataset = self.dataset
        if dataset.corpus is None:
            dataset.corpus = open_corpus(self.folder)
        turns = np.argsort(order.epochs, kind="stable")
        samples = []
        for epoch in np.unique(order.epochs).tolist():
            here = turns[order.epochs[turns] == epoch]
            samples += dataset.make(epoch, order.indices[here], order.rows[here], order.seq)
        batch = pack_samples(samples, order.size, pad_id=dataset.special.pad)
        batch["sample_ids"][: len(samples)] = torch.from_numpy(order.slots[turns])
        if not dataset.nsp:
            del batch["next_sentence_label"]
        return batch

    def __getstate__(self) -> dict:
        if self.folder is None:
            return self.__dict__
        dataset = copy.copy(self.dataset)
        dataset.corpus = dataset.plan = None  # pickling a memory map would copy the whole file
        return {**self.__dict__, "dataset": dataset}


def updates(dataset: PretrainingDataset, phases: list[Phase], step: int, place: Place) -> Iterator[Update]:
    """The updates from ``step`` (from 0) to the last, the first at ``place`` of its phase's stream.

    A phase begins with an epoch of its own, numbered after the last one of the phase before: no mask comes twice.
    """
    for phase in phases:
        if step >= phase.last:
            continue
        stream = Stream(dataset, phase.seq, place)
        for number in range(step, phase.last):
            yield stream.take(number, phase.batch_size)
        step, place = phase.last, Place(stream.place.epoch + 1, 0)


def load_updates(
    maker: BatchMaker, stream: Iterable[Update], *, rank: int, ranks: int, tokens: int, workers: int, pin: bool
) -> Iterator[Work]:
    """This rank's work of each update, made ahead by ``workers`` processes (0: in this one), pinned with ``pin``.

    ``tokens`` is the budget of a micro-batch.
    """
    ordered: deque[tuple[Update, list[np.ndarray]]] = deque()

    def orders() -> Iterator[Order]:
        for update in stream:
            parts = micro_batches(update.lengths, deal(update.lengths, ranks)[rank], max(tokens, update.seq))
            ordered.append((update, parts))
            for slots in parts:
                size = Capacities(
                    _rounded(update.lengths[slots].sum(), ROUND_TOKENS),
                    len(slots),
                    _rounded(update.masked[slots].sum(), ROUND_MASKED),
                )
                yield Order(update.seq, slots, update.epochs[slots], update.indices[slots], update.rows[slots], size)

    batches = iter(
        DataLoader(
            maker,
            batch_size=None,
            sampler=orders(),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=pin,
            worker_init_fn=_start_worker,
        )
    )
    for first in batches:
        update, slots = ordered.popleft()
        yield Work(update, slots, [first, *(next(batches) for _ in slots[1:])])


def _rounded(count: int, multiple: int) -> int:
    return -(-int(count) // multiple) * multiple


def _start_worker(number: int) -> None:
    """The main process decides when to stop: it finishes its update and saves first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
