"""A phase of pre-training: updates at one sequence length and batch size."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """Updates ``first .. last - 1`` (counted from 0) at one sequence length and batch size.

    The learning rate of its updates follows a schedule over updates ``schedule_first .. schedule_last - 1``, which
    phases share unless one names a learning rate or warm-up of its own. ``warmup`` is in updates.
    """

    seq: int
    first: int
    last: int
    batch_size: int
    lr: float
    warmup: int
    schedule_first: int
    schedule_last: int
