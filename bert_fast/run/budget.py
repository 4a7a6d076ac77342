"""``--max-hours``: how many updates a run's time is enough for, as this machine does them.

At each start a copy of the model rehearses a few updates of each phase (rehearsal.py). At the first all phases get
shorter or longer by one factor, so that the last one ends in time. They are written down as ``--phases``. Speed drifts:
where the plan would end too late, or far too early, what is left of it is spread over another number of updates
(:func:`bert_fast.data.phase.paced`), written down as ``--replan``. A run with these options and without ``--max-hours``
does the same updates.
"""

import bisect
import dataclasses
import json
import time
from collections.abc import Callable, Sequence

from bert_fast.data.phase import Phase
from bert_fast.run.config import ConfigError, PretrainConfig, phases
from bert_fast.run.meter import Meter
from bert_fast.run.plan import text_of
from bert_fast.run.rehearsal import TIMED, Costs
from bert_fast.train.distributed import Ranks

MARGIN = 0.02  # of the time left, that a plan leaves free
UNUSED = 0.05  # of the budget: a plan that leaves less as it is does not get longer
DECISIONS = 16  # until the next decision a run does this part of the updates left


class Budget:
    """The time of a run of ``config``, ``spent`` seconds of which are used, and what its parts cost."""

    def __init__(self, config: PretrainConfig, spent: float, costs: Costs):
        assert config.max_hours is not None  # else a run has no budget
        self.seconds, self.began, self.costs = config.max_hours * 3600, time.perf_counter() - spent, costs
        self.left, self.measured = self.seconds - spent, TIMED

    @property
    def spent(self) -> float:
        """Seconds of all starts."""
        return time.perf_counter() - self.began

    def agree(self, ranks: Ranks) -> None:
        """Sets ``left``, the seconds to the end. Every process takes the first one's clock, and so the same plan."""
        costs = self.costs
        own = [self.spent, list(costs.update.items()), list(costs.validation.items()), costs.checkpoint]
        spent, update, validation, costs.checkpoint = json.loads(ranks.broadcast(json.dumps(own)))
        costs.update, costs.validation = {tuple(shape): took for shape, took in update}, dict(validation)
        self.left = self.seconds - spent

    def first_plan(self, config: PretrainConfig) -> PretrainConfig:
        """``config`` with the phases that fit; ConfigError where one update of each does not."""
        asked = phases(dataclasses.replace(config, replan=None))
        left, fewest = self.left, len(asked)
        number = self._fitting(lambda n: phases(scaled(config, asked, n)), 0, config)
        plan = scaled(config, asked, max(number, fewest))
        if (need := self.needed(phases(plan), 0, config)) > left:
            raise ConfigError(
                f"--max-hours {config.max_hours:g} is too short: {fewest} updates take {need:.0f} seconds"
            )
        return plan

    def watch(self, step: int, found: Sequence[Phase], meter: Meter) -> None:
        """Speed is measured from update ``step`` on; the next decision is some part of what is left later."""
        phase = next(phase for phase in found if step < phase.last)
        self.next = min(step + max(1, (found[-1].last - step) // DECISIONS), phase.last)
        self.shape, self.mark = (phase.seq, phase.batch_size), (step, time.perf_counter(), meter.off)

    def measure(self, step: int, meter: Meter) -> None:
        """Takes the updates since :meth:`watch` into the costs, and what the last checkpoint and validation took."""
        first, began, off = self.mark
        self.measured = step - first
        took = (time.perf_counter() - began - (meter.off - off)) / self.measured
        weight = min(0.5, self.measured / (self.measured + 4))  # one stall is not the new speed
        change = 1 + weight * (took / self.costs.update[self.shape] - 1)
        self.costs.update = {shape: change * cost for shape, cost in self.costs.update.items()}  # it is the machine's
        self.costs.checkpoint = meter.lasted.get("checkpoint", self.costs.checkpoint)
        if "validation" in meter.lasted:
            self.costs.validation[self.shape[0]] = meter.lasted.pop("validation")

    def new_plan(self, config: PretrainConfig, step: int) -> PretrainConfig:
        """``config``; where it would end too late or leave much time unused, what it becomes at update ``step``."""
        need = self.needed(phases(config), step, config)
        unused = max(UNUSED * self.seconds, self.left / (self.measured + 1))  # few updates do not tell the speed well
        if self.left - unused <= need <= self.left:
            return config

        def spread(number: int) -> PretrainConfig:
            before = f"{config.replan}," if config.replan else ""
            return dataclasses.replace(config, replan=f"{before}{step}:{number}")

        number = self._fitting(lambda n: phases(spread(n)), step, config)
        return config if number == phases(config)[-1].last - step else spread(number)

    def needed(self, found: Sequence[Phase], step: int, config: PretrainConfig) -> float:
        """Seconds from update ``step`` to the end of ``found``, with a last checkpoint and the model's folder."""
        every, costs, need = config.validate_every or config.checkpoint_every, self.costs, 0.0
        for phase in found:
            first = max(step, phase.first)
            if first < phase.last:
                validations = phase.last // every - first // every + (phase.last == found[-1].last)
                need += (phase.last - first) * costs.update[phase.seq, phase.batch_size]
                need += validations * costs.validation.get(phase.seq, 0.0)
        checkpoints = found[-1].last // config.checkpoint_every - step // config.checkpoint_every + 2
        return need + checkpoints * costs.checkpoint

    def told(self, before: PretrainConfig, plan: PretrainConfig, step: int) -> str:
        """What to say of the ``plan`` that the run has from update ``step`` on."""
        found = phases(plan)
        text = f"--max-hours {plan.max_hours:g}, of which {self.left / 3600:.3g} are left: "
        text += ", ".join(
            f"{took:.3g} s an update of {n} x {seq} tokens" for (seq, n), took in self.costs.update.items()
        )
        if plan is before:
            return f"{text}; {found[-1].last - step:,} updates go on to the end as planned"
        if plan.replan:
            was = phases(before)[-1].last - step
            return f"{text}; the {was:,} updates left become {found[-1].last - step:,}"
        return f"{text}; {found[-1].last:,} updates: --phases {plan.phases}"

    def _fitting(self, plan: Callable[[int], Sequence[Phase]], step: int, config: PretrainConfig) -> int:
        """The most updates, at least 1, with which ``plan`` ends within the time left but for a margin."""
        most = max(1, int(self.left / max(min(self.costs.update.values()), 1e-9)))
        in_time = bisect.bisect_right(
            range(1, most + 1), self.left * (1 - MARGIN), key=lambda number: self.needed(plan(number), step, config)
        )
        return max(1, in_time)


def scaled(config: PretrainConfig, asked: Sequence[Phase], number: int) -> PretrainConfig:
    """``config`` with the phases ``asked`` in about ``number`` updates, warm-up and decay with them; none is empty."""
    factor = number / asked[-1].last
    found, places = [], {0: 0}
    for phase in asked:
        places[phase.last] = max(places[phase.first] + 1, round(phase.last * factor))
    for phase in asked:
        found.append(
            dataclasses.replace(
                phase,
                first=places[phase.first],
                last=places[phase.last],
                warmup=_at_least_one(phase.warmup, factor),
                schedule_first=places[phase.schedule_first],
                schedule_last=places[phase.schedule_last],
            )
        )
    decay = config.decay_steps
    if decay is not None and decay >= 1:
        decay = float(_at_least_one(decay, factor))
    return dataclasses.replace(config, phases=text_of(found), decay_steps=decay, replan=None)


def _at_least_one(number: float, factor: float) -> int:
    return max(1, round(number * factor)) if number else 0
