"""--max-hours under a made clock: a run ends in time and at the end of its schedule, and its record gives its bits."""

import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import pytest

from bert_fast.data.phase import paced
from bert_fast.run import checkpoint
from bert_fast.run.config import ConfigError, phases, resolve
from bert_fast.run.pretrain import pretrain
from bert_fast.train.schedule import learning_rate, phase_of
from bert_fast.train.step import Step
from tests.support.training_runs import losses, train, weights


class Machine:
    """A clock that goes on by what updates take: seconds by their number of sequences, at a speed that may change."""

    def __init__(self, monkeypatch):
        self.now, self.speed, self.updates, self.before_update = 1000.0, 1.0, 0, lambda: None
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        apply = Step.__call__

        def timed(step, *args, sequences, lr, **kwargs):
            if lr:  # no rehearsal
                self.updates += 1
                self.before_update()
            self.now += {8: 1.0, 6: 3.0}[sequences] / self.speed
            return apply(step, *args, sequences=sequences, lr=lr, **kwargs)

        monkeypatch.setattr(Step, "__call__", timed)


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


@pytest.fixture
def timed(configure):
    """Two phases, 3:1 in updates and 1:3 in seconds an update; 110 seconds, 32 of which the rehearsal takes."""
    return configure(
        phases="16:600,32:200:batch=6", max_hours=110 / 3600, warmup=0.2, checkpoint_every=20, mask_prob="0.3:0.15"
    )


def recorded(config) -> dict:
    return json.loads((Path(config.out) / "config.json").read_text())


def rates(config) -> list[float]:
    return [line["learning_rate"] for line in losses(config, "train")]


def by_record(config, tmp_path):
    """The run's options as it recorded them, without the budget."""
    flags = {"max_hours": 0.0, "out": str(tmp_path / "record")}
    return resolve(flags, Path(config.out) / "config.json")


def same_bits(config, other) -> bool:
    last = len(rates(config))
    return rates(config) == rates(other) and weights(config, last) == weights(other, last)


def test_a_budget_plans_anew_and_says_what_it_leaves_out(machine, configure, capsys):
    assert pretrain(configure(steps=40, replan="2:3", max_hours=30 / 3600)) == 0
    assert "--replan 2:3 is left out: --max-hours plans the run anew" in capsys.readouterr().err


def test_all_phases_end_in_time_and_the_recorded_steps_give_the_same_bits(machine, timed, tmp_path):
    began = machine.now
    assert train(timed) == 0
    assert 100 < machine.now - began <= 110
    assert recorded(timed).get("replan") is None
    first, second = phases(resolve({}, Path(timed.out) / "config.json"))
    assert first.last == pytest.approx(3 * (second.last - second.first), abs=2)
    assert first.warmup == pytest.approx(0.2 * second.last, abs=1)
    found = rates(timed)
    assert len(found) == second.last == machine.updates
    assert max(found) == timed.lr
    assert found[-1] == pytest.approx(timed.lr / (second.last - first.warmup))
    record = by_record(timed, tmp_path)
    assert train(record) == 0
    assert same_bits(timed, record)


@pytest.mark.parametrize(("speed", "from_update"), [(1 / 3, 5), pytest.param(3.0, 8, marks=pytest.mark.slow)])
def test_a_machine_whose_speed_changes_ends_in_time_all_the_same(machine, timed, tmp_path, speed, from_update):
    def change():
        machine.speed = speed if machine.updates > from_update else 1.0

    machine.before_update = change
    began = machine.now
    assert train(timed) == 0
    assert 90 < machine.now - began <= 110
    found = rates(timed)
    decay = found[found.index(max(found)) :]
    assert decay == sorted(decay, reverse=True)
    assert recorded(timed)["replan"]
    first, second = phases(resolve({}, Path(timed.out) / "config.json"))
    assert len(found) == second.last
    assert second.place(second.last) == pytest.approx(second.planned[1])  # the next update would be at 0
    assert first.last / second.last == pytest.approx(0.75, abs=0.15)  # as in the plan, but for the updates before
    machine.before_update = lambda: None
    record = by_record(timed, tmp_path)
    assert train(record) == 0
    assert same_bits(timed, record)


def test_hours_count_across_resumes(machine, timed, tmp_path):
    def interrupt():
        if machine.updates == 12:
            os.kill(os.getpid(), signal.SIGUSR1)

    machine.before_update = interrupt
    began = machine.now
    assert train(timed) == 138
    first = machine.now - began
    assert checkpoint.newest(Path(timed.out))[0].state["spent"] == pytest.approx(first)
    machine.now += 5000.0  # which no run uses
    began = machine.now
    assert train(timed) == 0
    assert 100 < first + machine.now - began <= 110
    record = by_record(timed, tmp_path)
    assert train(record) == 0
    assert same_bits(timed, record)
    assert train(resolve({}, Path(timed.out) / "config.json")) == 0  # which names the same plan
    with pytest.raises(ConfigError, match="was planned with another --phases"):
        train(dataclasses.replace(timed, phases="16:600,32:100:batch=6"))


def test_a_budget_given_to_a_run_that_goes_on_spreads_what_is_left(machine, configure, tmp_path):
    config = configure(steps=400, warmup=4.0, checkpoint_every=10)
    machine.before_update = lambda: machine.updates == 10 and os.kill(os.getpid(), signal.SIGTERM)
    assert train(config) == 143
    began = machine.now
    longer = dataclasses.replace(config, max_hours=60 / 3600)
    assert train(longer) == 0
    done = checkpoint.newest(Path(config.out))[0].step
    assert 35 < machine.now - began <= 50  # ten seconds are used
    assert recorded(config)["replan"].endswith(f":{done - int(recorded(config)['replan'].partition(':')[0])}")
    assert rates(config)[-1] == pytest.approx(config.lr * (390 / 396) / (done - 10), rel=0.2)


def test_the_rehearsal_leaves_most_of_a_short_budget(machine, timed):
    """Whole, it would take 32 of 36 seconds."""
    began = machine.now
    assert train(dataclasses.replace(timed, max_hours=36 / 3600)) == 0
    assert 30 < machine.now - began <= 36
    assert len(rates(timed)) >= 15


def test_a_branch_decays_from_a_run_whose_plan_changed(machine, timed, tmp_path):
    machine.before_update = lambda: setattr(machine, "speed", 1 / 3 if machine.updates > 5 else 1.0)
    stable = dataclasses.replace(timed, schedule="wsd", warmup=2.0)
    assert train(stable) == 0
    assert recorded(stable)["replan"]
    last = checkpoint.folders(Path(stable.out))[-1]
    branch = resolve({"decay_from": str(last), "decay_steps": 6.0, "out": str(tmp_path / "branch")})
    for _ in range(2):  # and it goes on
        assert train(branch) == 0
        assert rates(branch) == pytest.approx([1e-3 * (1 - (n / 6) ** 0.5) for n in range(6)])
    assert losses(branch, "train")[0]["step"] == int(last.name[5:]) + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_hours": 9 / 3600}, "--max-hours 0.0025 is too short: 2 updates take "),
        ({"replan": "5"}, "--replan 5: '5' is not AT:N"),
        ({"replan": "900:3"}, "--replan 900:3: 900:3 is not within the 800 updates"),
    ],
)
def test_what_cannot_be_is_refused_by_name(machine, timed, options, message):
    hours = options.get("max_hours", 0.0)
    with pytest.raises(ConfigError, match=message):
        train(dataclasses.replace(timed, **options | {"max_hours": hours}))


def test_wrong_budgets_are_refused_by_name(configure):
    with pytest.raises(ConfigError, match="--max-hours must be at least 0"):
        configure(max_hours=-1.0)
    with pytest.raises(ConfigError, match="--max-hours beside --decay-from"):
        configure(max_hours=1.0, schedule="wsd", decay_from="x", decay_steps=2.0)


def test_a_changed_pace_goes_on_with_the_same_schedule_to_its_end(configure):
    """Twice as many updates for the second half: each goes half as far in schedule, masking rate and phases."""
    plan = phases(configure(phases="16:40,32:40", warmup=10.0, mask_prob="0.4:0.2"))
    found = paced(plan, [(20, 120)])
    assert [(phase.first, phase.last) for phase in found] == [(0, 60), (60, 140)]
    for step in range(140):
        place = step if step < 20 else 20 + (step - 20) / 2
        phase, then = found[phase_of(step, found)], plan[phase_of(int(place), plan)]
        assert phase.seq == then.seq
        assert learning_rate(step, phase) == pytest.approx(min(1e-3 * (place + 1) / 10, 1e-3 * (80 - place) / 70))
        assert phase.mask_prob(step) == pytest.approx(max(0.2, 0.4 - 0.2 * (place - then.first) / 39))
    twice = paced(plan, [(20, 120), (80, 30)])
    assert twice[-1].last == 110
    assert learning_rate(109, twice[1]) == pytest.approx(1e-3 / 70)
