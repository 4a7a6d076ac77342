"""The rule by which a challenger takes a default's place. It knows neither a device nor a clock."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

MARGIN = 0.03  # by which a challenger must win, in both orders: two kernels as fast as each other change nothing

DEFAULT_WRONG = "default wrong"  # how a candidate is out where what it would be held against is wrong itself

Choices = dict[str, dict]


class Lost(Exception):
    """A candidate is out, with the reason: ``how`` is "wrong", "failed", "hung" or DEFAULT_WRONG."""

    def __init__(self, how: str, why: str):
        super().__init__(why)
        self.how = how


@dataclass(frozen=True)
class Question:
    """One thing to decide: which of ``candidates`` serves in the default's place, timed as a part of ``subject``."""

    name: str
    subject: str
    candidates: Sequence[Choices]


@dataclass(frozen=True)
class Times:
    """Seconds of the incumbent and of the challenger, measured with the one first and with the other first; and for
    each name of the challenger's choices the default that it replaced."""

    incumbent_first: tuple[list[float], list[float]]
    challenger_first: tuple[list[float], list[float]]
    replaced: dict[str, dict] = field(default_factory=dict)

    def ratios(self) -> tuple[float, float]:
        """Median time of the challenger over that of the incumbent, in both orders."""
        return tuple(  # type: ignore[return-value]
            statistics.median(theirs) / statistics.median(ours)
            for ours, theirs in (self.incumbent_first, self.challenger_first)
        )


@dataclass
class Decision:
    """``chosen``: (name, default, what serves in its place); ``rows``: what was tried, and how each came out."""

    chosen: list[tuple[str, dict, dict]]
    rows: list[dict]

    @property
    def tried(self) -> bool:
        """Whether any candidate came to be timed."""
        return any("seconds" in row for row in self.rows)

    @property
    def wrong(self) -> str | None:
        """Which defaults gave wrong results, and how; None where none did."""
        lines = {f"{x['question']}: {x['why']}": None for x in self.rows if x["outcome"] == DEFAULT_WRONG}
        return "; ".join(lines) or None


def wins(times: Times) -> bool:
    """Whether the challenger takes the incumbent's place."""
    return max(times.ratios()) < 1 - MARGIN


def decide(
    questions: Sequence[Question],
    compare: Callable[[str, Choices, Choices], Times],
    *,
    seconds: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
    stopped: Callable[[], bool] = lambda: False,
    tell: Callable[[dict], None] = lambda row: None,
) -> Decision:
    """Asks one question after the other, each with what the ones before have decided about the same subject in use.

    ``compare(subject, incumbent, challenger)`` measures, or raises Lost. Candidates go in their order; the first of
    equals stays. What ``seconds`` (of ``clock``) leave no room for is left out, and said, and so is all that
    comes after ``stopped``. ``tell`` gets each row.
    """
    until, chosen, rows = clock() + seconds, [], []
    decided: dict[str, Choices] = {}
    for question in questions:
        before = decided.get(question.subject, {})
        best, replaced = before, {}
        for candidate in question.candidates:
            row: dict = {"question": question.name, "candidate": candidate, "outcome": "left out"}
            rows.append(row)
            if clock() < until and not stopped():
                try:
                    times = compare(question.subject, best, before | candidate)
                    row |= {"ratios": list(times.ratios()), "seconds": statistics.median(times.challenger_first[1])}
                    row["outcome"] = "won" if wins(times) else "within the margin" if _close(times) else "slower"
                    if wins(times):
                        best, replaced = before | candidate, times.replaced
                except Lost as lost:
                    row |= {"outcome": lost.how, "why": str(lost)}
            tell(row)
        decided[question.subject] = best
        chosen += [
            (name, replaced[name], replaced[name] | best[name]) for name in best if before.get(name) != best[name]
        ]
    return Decision(chosen, rows)


def _close(times: Times) -> bool:
    return min(times.ratios()) < 1 + MARGIN
