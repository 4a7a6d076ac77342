"""The learning rate: a pure function of the update's number.

Sources: linear decay after linear warm-up as in Devlin et al., BERT, section A.2; polynomial decay of power 0.5 as
in NVIDIA's DeepLearningExamples for LAMB; 128 then 512 tokens, google-research/bert README; cosine decay, Loshchilov
and Hutter, "SGDR", 2017, without restarts; warm-up, a stable rate and a decay at the end ("wsd"), Hu et al., "MiniCPM",
2024, its decay 1 - sqrt as in Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
Durations", 2024.
"""

import math

from bert_fast.data.phase import Phase


def phase_of(step: int, all_phases: list[Phase]) -> int:
    """The number of the phase that update ``step`` (from 0) belongs to."""
    for number, phase in enumerate(all_phases):
        if step < phase.last:
            return number
    raise IndexError(f"update {step} of {all_phases[-1].last}")


def learning_rate(step: int, phase: Phase, *, schedule: str = "linear", power: float = 0.5) -> float:
    """The learning rate of update ``step`` (from 0): warm-up reaches ``phase.lr`` with its last update, then decay.

    i is the update's place in its schedule, which is fractional where its pace changed (:meth:`Phase.place`).
    With w updates of warm-up and n in all: lr (i + 1) / w in the warm-up; after it, with progress
    (i - w) / (n - w), linear lr (1 - progress), polynomial lr (1 - progress)^power, cosine
    lr (1 + cos(pi progress)) / 2, or constant; wsd is constant but for the last d = ``phase.decay`` updates, which have
    lr (1 - sqrt((i - (n - d)) / d)).
    """
    i, n, w = phase.place(step) - phase.schedule_first, phase.schedule_last - phase.schedule_first, phase.warmup
    if i < w:
        return phase.lr * min(i + 1, w) / w
    if schedule == "wsd":
        decayed = max(0, i - (n - phase.decay))
        return phase.lr * (1.0 - math.sqrt(decayed / max(1, phase.decay)))
    left = 1.0 - (i - w) / max(1, n - w)
    cosine = (1.0 + math.cos(math.pi * (1.0 - left))) / 2.0
    return phase.lr * {"linear": left, "polynomial": left**power, "cosine": cosine, "constant": 1.0}[schedule]
