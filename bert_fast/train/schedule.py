"""Phases and the learning rate: pure functions of the update's number.

Sources: linear decay after linear warm-up as in Devlin et al., BERT, section A.2; polynomial decay of power 0.5 as
in NVIDIA's DeepLearningExamples for LAMB; 128 then 512 tokens, google-research/bert README.
"""

from dataclasses import dataclass

from bert_fast.train.config import ConfigError, PretrainConfig


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


def phases(config: PretrainConfig) -> list[Phase]:
    """The phases of a run, in order; one of ``--seq`` and ``--steps`` where none are given. ConfigError if wrong."""
    drafts = [_parsed(text, config) for text in (config.phases or f"{config.seq}:{config.steps}").split(",")]
    found, first = [], 0
    for number, draft in enumerate(drafts):
        if number == 0 or draft["own"]:
            schedule_first = first
            steps = draft["steps"]
            for later in drafts[number + 1 :]:
                if later["own"]:
                    break
                steps += later["steps"]
            warmup = draft["warmup"] * steps if draft["warmup"] < 1 else draft["warmup"]
            shared = {
                "lr": draft["lr"],
                "warmup": round(warmup),
                "schedule_first": schedule_first,
                "schedule_last": schedule_first + steps,
            }
        found.append(Phase(draft["seq"], first, first + draft["steps"], draft["batch"], **shared))
        first += draft["steps"]
    return found


def _parsed(text: str, config: PretrainConfig) -> dict:
    parts = [part.strip() for part in text.split(":")]
    try:
        if len(parts) < 2:
            raise ValueError("it needs SEQ:STEPS")
        draft = {"seq": int(parts[0]), "steps": int(parts[1]), "own": False}
        draft |= {"lr": config.lr, "warmup": config.warmup, "batch": config.batch_size}
        for part in parts[2:]:
            name, _, value = part.partition("=")
            if name not in ("lr", "warmup", "batch"):
                raise ValueError(f"{part!r} is none of lr=, warmup=, batch=")
            draft[name] = int(value) if name == "batch" else float(value)
            draft["own"] = draft["own"] or name != "batch"
        rates = all(0 <= draft[name] < float("inf") for name in ("lr", "warmup"))  # false for NaN
        if min(draft["seq"], draft["steps"], draft["batch"]) < 1 or not rates:
            raise ValueError("lengths, steps and batch sizes are at least 1, rates and warm-up at least 0")
    except ValueError as error:
        raise ConfigError(f"--phases: {text!r} is not a phase: {error}") from error
    return draft


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
