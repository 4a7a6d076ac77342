"""A phase of pre-training: updates at one sequence length and batch size."""

from dataclasses import dataclass

from bert_fast.data.masking import MASK_PROB


@dataclass(frozen=True)
class Phase:
    """Updates ``first .. last - 1`` (counted from 0) at one sequence length and batch size.

    The learning rate of its updates follows a schedule over updates ``schedule_first .. schedule_last - 1``, which
    phases share unless one names a learning rate or warm-up of its own. ``warmup`` and ``decay``, the schedule's last
    part where it has one, are in updates. ``mask_probs`` are the shares of tokens that its first and its last update
    predict.
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

    def mask_prob(self, step: int) -> float:
        """The share of tokens that update ``step`` (from 0) predicts: linear from the first update to the last."""
        first, last = self.mask_probs
        return first + (last - first) * (step - self.first) / max(1, self.last - 1 - self.first)
