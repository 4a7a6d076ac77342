"""The phases of a run where they are not those that were asked for: it begins at another run's checkpoint, or has a
budget of time (budget.py).

They are written down as ``--phases``, in state.json and in config.json: a run that goes on needs no other run for them.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from bert_fast.data.phase import Phase
from bert_fast.run.checkpoint import Checkpoint
from bert_fast.run.config import ConfigError, PretrainConfig, effective, flag, phases
from bert_fast.train.schedule import learning_rate

SHAPE = (  # decide what the phases are
    "phases", "seq", "steps", "batch_size", "lr", "warmup", "schedule", "decay_steps", "decay_from", "continue_from",
)  # fmt: skip
PLANNED = ("phases", "decay_steps", "replan")  # the options that a plan consists of


def text_of(found: Sequence[Phase]) -> str:
    """``found`` as ``--phases``, warm-up in updates."""
    texts = []
    for phase in found:
        text = f"{phase.seq}:{phase.last - phase.first}:batch={phase.batch_size}"
        if phase.schedule_first == (phase.planned or (phase.first,))[0]:
            text += f":lr={phase.lr!r}:warmup={phase.warmup}"
        texts.append(text)
    return ",".join(texts)


def planned(config: PretrainConfig, before: Checkpoint | None) -> PretrainConfig:
    """``config`` with the phases that it has in view of ``before``, the checkpoint that the run goes on from.

    ConfigError where they cannot follow from that checkpoint, or the run in ``out`` was planned from other options.
    """
    if before is None:
        return config
    if config.origin and before.folder == Path(config.origin):
        return dataclasses.replace(config, phases=text_of(_from_origin(config, before)), replan=None)
    plan = before.state.get("plan", {})
    dropped = before.state["options"].get("max_hours") and not config.max_hours  # what is asked for counts again
    if not config.origin and (dropped or not plan):
        return config
    was, now = effective(before.state["options"]), effective(config.as_dict())
    changed = [flag(name) for name in SHAPE if now.get(name) not in (was.get(name), plan.get(name))]
    if changed:
        raise ConfigError(
            f"{config.out} was planned with another {', '.join(changed)}: choose another --out, or the options that it "
            "was started with"
        )
    return dataclasses.replace(config, **plan)


def _from_origin(config: PretrainConfig, before: Checkpoint) -> list[Phase]:
    """The phases of a run that begins at ``before``: no warm-up of the schedule at hand changes its length."""
    origin = PretrainConfig(**before.state["options"] | before.state.get("plan", {}))
    step, number = before.step, before.state["phase"]
    theirs, asked = phases(origin), phases(config)
    here = theirs[number]
    if config.continue_from:
        if asked[-1].last <= step:
            raise ConfigError(
                f"--continue-from {before.folder} has done the {asked[-1].last} updates that are asked for"
            )
        return [
            dataclasses.replace(phase, warmup=here.warmup) if phase.schedule_first == here.schedule_first else phase
            for phase in asked
        ]
    rate = learning_rate(step - 1, here, schedule=origin.schedule, power=origin.power)
    if origin.schedule not in ("wsd", "constant") or rate != here.lr:
        raise ConfigError(
            f"--decay-from {before.folder} is no checkpoint of a stable phase: --schedule {origin.schedule} was at the "
            f"learning rate {rate:g} of {here.lr:g}"
        )
    assert config.decay_steps is not None  # --decay-from needs it
    last = step + round(config.decay_steps)
    branch = [dataclasses.replace(phase, schedule_last=last) for phase in _as_done(theirs[: number + 1])]
    branch[-1] = dataclasses.replace(branch[-1], last=last)
    as_planned = phases(dataclasses.replace(origin, replan=None))  # no option of this run says what became of it
    if text_of(asked) not in map(text_of, (theirs, as_planned, branch)):
        raise ConfigError(
            f"--decay-from {before.folder} decays from the learning rate of its run, in the phase that it was in: "
            f"--phases, --seq, --steps, --replan, --batch-size, --lr and --warmup are those of that run; leave them out"
        )
    return branch


def _as_done(found: Sequence[Phase]) -> list[Phase]:
    """The phases ``found`` with the updates that they became, as if they had been planned so."""
    became = {(phase.planned or (phase.first,))[0]: phase.first for phase in found}
    return [
        dataclasses.replace(phase, schedule_first=became[phase.schedule_first], planned=None, pace=())
        for phase in found
    ]
