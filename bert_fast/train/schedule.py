"""The learning rate: a pure function of the update's number.

Sources: linear decay after linear warm-up as in Devlin et al., BERT, section A.2; polynomial decay of power 0.5 as
in NVIDIA's DeepLearningExamples for LAMB; 128 then 512 tokens, google-research/bert README.
"""

from bert_fast.data.phase import Phase


def phase_of(step: int, all_phases: list[Phase]) -> int:
    """The number of the phase that update ``step`` (from 0) belongs to."""
    for number, phase in enumerate(all_phases):
        if step < phase.last:
            return number
    raise IndexError(f"update {step} of {all_phases[-1].last}")


def learning_rate(step: int, phase: Phase, *, schedule: str = "linear", power: float = 0.5) -> float:
    """The learning rate of update ``step`` (from 0): warm-up reaches ``phase.lr`` with its last update, then decay.

    With w updates of warm-up and n in all: lr (i + 1) / w in the warm-up; after it, with progress
    (i - w) / (n - w), linear lr (1 - progress), polynomial lr (1 - progress)^power, or constant.
    """
    i, n, w = step - phase.schedule_first, phase.schedule_last - phase.schedule_first, phase.warmup
    if i < w:
        return phase.lr * (i + 1) / w
    left = 1.0 - (i - w) / max(1, n - w)
    return phase.lr * {"linear": left, "polynomial": left**power, "constant": 1.0}[schedule]
