"""Updates with their packed micro-batches, made ahead by worker processes."""

import dataclasses
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bert_fast.data import Capacities, open_corpus, pack_samples
from bert_fast.data.bins import deal, fitted, micro_batches
from bert_fast.data.dataset import PretrainingDataset
from bert_fast.data.graph_shapes import rounded
from bert_fast.data.mixture import Mixture, joined, stream_of
from bert_fast.data.phase import Phase
from bert_fast.data.places import Place, Places
from bert_fast.data.updates import Update

ROUND_TOKENS, ROUND_MASKED = 64, 16  # capacities are multiples of these: few different shapes, hardly any waste


class Order(NamedTuple):
    """A micro-batch to be made: all that a worker must know, so that it needs no plan of the epoch.

    ``slots`` (n,) are the sequences' numbers in their update, under which the model keys their dropout masks;
    ``longest`` is what the batch calls the length of its longest sequence, None for what it is. The other fields are
    those of Update, of these sequences.
    """

    slots: np.ndarray
    epochs: np.ndarray
    indices: np.ndarray
    rows: np.ndarray
    size: Capacities
    mask_prob: float
    longest: int | None = None


@dataclasses.dataclass
class Work:
    """One update as this rank computes it: the slots of each micro-batch, and the batches themselves."""

    update: Update
    slots: list[np.ndarray]
    batches: list[dict]


@dataclasses.dataclass
class Parcel:
    """A batch as one block of bytes: a worker hands over one tensor, and one is pinned, in place of ten."""

    block: Tensor
    contents: dict[str, tuple[int, torch.dtype, torch.Size] | int]  # offset, dtype, shape; or a number as it is

    ALIGNMENT = 16

    @classmethod
    def of(cls, batch: dict[str, Tensor | int]) -> "Parcel":
        contents: dict[str, tuple[int, torch.dtype, torch.Size] | int] = {}
        size = 0
        for name, value in batch.items():
            if isinstance(value, Tensor):
                contents[name] = size, value.dtype, value.shape
                size += rounded(value.nbytes, cls.ALIGNMENT)
            else:
                contents[name] = value
        parcel = cls(torch.empty(size, dtype=torch.uint8), contents)
        for ours, given in zip(parcel.opened().values(), batch.values(), strict=True):
            if isinstance(ours, Tensor) and isinstance(given, Tensor):
                ours.copy_(given)
        return parcel

    def opened(self) -> dict[str, Tensor | int]:
        """The batch, its tensors views of the block."""
        return {
            name: self._view(*about) if isinstance(about, tuple) else about for name, about in self.contents.items()
        }

    def _view(self, offset: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        return self.block[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)

    def pin_memory(self) -> "Parcel":
        """For DataLoader, which calls it in its thread."""
        return Parcel(self.block.pin_memory(), self.contents)


class BatchMaker(Dataset):
    """Makes the packed batch of an :class:`Order`; travels to worker processes without plan or corpus.

    ``folder``, or a folder for each source, is where a worker that was not forked opens the corpus again; None pickles
    the corpus.
    """

    def __init__(self, dataset: PretrainingDataset | Mixture, folder: str | Path | Sequence[str | Path] | None = None):
        self.make = dataset.maker()
        self.folders = [folder] if isinstance(folder, (str, Path)) else folder

    def __getitem__(self, order: Order) -> dict:
        make = self.make
        if make.corpus is None:
            assert self.folders is not None  # else it was pickled
            make.corpus = joined([open_corpus(folder) for folder in self.folders])
        turns = np.argsort(order.epochs, kind="stable")
        samples = make(order.epochs[turns], order.indices[turns], order.rows[turns], order.mask_prob)
        size, masked = order.size, sum(len(sample.masked_labels) for sample in samples)
        if masked > size.masked:  # whole words: how many there are is known here alone
            size = size._replace(masked=rounded(masked, ROUND_MASKED))
        batch = pack_samples(samples, size, pad_id=make.special.pad)
        batch["sample_ids"][: len(samples)] = torch.from_numpy(order.slots[turns])
        if not make.nsp:
            del batch["next_sentence_label"]
        return batch if order.longest is None else {**batch, "max_length_q": order.longest}

    def __getstate__(self) -> dict:
        if self.folders is None:
            return self.__dict__
        # pickling a memory map would copy the whole file
        return {**self.__dict__, "make": dataclasses.replace(self.make, corpus=None)}  # type: ignore[arg-type]  # a worker opens it


def updates(
    dataset: PretrainingDataset | Mixture, phases: list[Phase], step: int, place: Place | Places
) -> Iterator[Update]:
    """The updates from ``step`` (from 0) to the last, the first at ``place`` of its phase's stream.

    A phase begins with an epoch of its own, numbered after the last one of the phase before.
    """
    for phase in phases:
        if step >= phase.last:
            continue
        stream = stream_of(dataset, phase.seq, place)
        for number in range(step, phase.last):
            yield stream.take(number, phase.batch_size, phase.mask_prob(number))
        step, place = phase.last, stream.place.next_phase()


def load_updates(
    maker: BatchMaker, stream: Iterable[Update], *, rank: int, ranks: int, tokens: int, workers: int, pin: bool,
    sizes: Mapping[tuple[int, int], Sequence[Capacities]] | None = None,
) -> Iterator[Work]:  # fmt: skip
    """This rank's work of each update, made ahead by ``workers`` processes (0: in this one), pinned with ``pin``.

    ``tokens`` is the budget of a micro-batch. ``sizes``, by the updates' (longest sequence, number of sequences), are
    the only capacities that micro-batches have (graph_shapes.py; of one rank); without them each has its own.
    """
    ordered: deque[tuple[Update, list[np.ndarray]]] = deque()

    def orders() -> Iterator[Order]:
        for update in stream:
            size, longest = None, None
            if sizes is None:
                parts = micro_batches(update.lengths, deal(update.lengths, ranks)[rank], max(tokens, update.seq))
            else:
                parts, size = fitted(update.lengths, update.masked, sizes[update.seq, len(update)])
                longest = update.seq
            ordered.append((update, parts))
            for slots in parts:
                yield Order(
                    slots, update.epochs[slots], update.indices[slots], update.rows[slots],
                    size or _own_size(update, slots), update.mask_prob, longest,
                )  # fmt: skip

    batches = iter(
        DataLoader(
            maker,
            batch_size=None,
            sampler=orders(),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            collate_fn=cast(Callable, Parcel.of),  # of one batch, for batch_size is None
            pin_memory=pin,
            worker_init_fn=_start_worker,
        )
    )
    try:
        for first in batches:
            update, slots = ordered.popleft()
            parcels = [first, *(next(batches) for _ in slots[1:])]
            yield Work(update, slots, [parcel.opened() for parcel in parcels])
    except Exception as error:
        if workers:
            # A frame of DataLoader holds a worker's error, whose traceback holds the frame: a cycle that keeps the
            # workers, which ignore signals, until the process waits for them at its end.
            error.__traceback__ = None
        raise


def _own_size(update: Update, slots: np.ndarray) -> Capacities:
    tokens, masked = int(update.lengths[slots].sum()), int(update.masked[slots].sum())
    return Capacities(rounded(tokens, ROUND_TOKENS), len(slots), rounded(masked, ROUND_MASKED))


def _start_worker(number: int) -> None:
    """The main process decides when to stop: it finishes its update and saves first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    torch.set_num_threads(1)
