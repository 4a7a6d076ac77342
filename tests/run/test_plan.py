"""Runs that begin at another run's checkpoint: a decay branch of a stable phase, and going on with more data."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from bert_fast.run import checkpoint
from bert_fast.run.config import ConfigError, phases, resolve
from bert_fast.run.plan import text_of
from bert_fast.run.resume import NotTheSameRun
from bert_fast.train.step import Step
from tests.support.training_runs import losses, train, weights


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


def at(config, step: int) -> str:
    return str(checkpoint.folder_of(Path(config.out), step))


def rates(config) -> list[float]:
    return [line["learning_rate"] for line in losses(config, "train")]


@pytest.fixture
def stable(configure):
    """A run of 8 updates at a stable rate, with checkpoints after 4 and 8."""
    config = configure(schedule="wsd", steps=8)
    train(config)
    return config


@pytest.mark.parametrize("options", [{"warmup": 0.2}, {"phases": "16:3,32:9:lr=2e-3:warmup=1"}])
def test_a_phase_list_gives_the_same_phases_as_text(configure, options):
    found = phases(configure(**options))
    assert phases(configure(phases=text_of(found))) == found


def test_a_decay_branch_is_the_run_that_ends_there_and_the_stable_run_goes_on(stable, configure, tmp_path, monkeypatch):
    whole = configure(schedule="wsd", steps=10, decay_steps=6.0, out=str(tmp_path / "whole"))
    train(whole)
    branch = resolve({"decay_from": at(stable, 4), "decay_steps": 6.0, "out": str(tmp_path / "branch")})
    apply, done = Step.__call__, []

    def dying(self, *args, **kwargs):
        if len(done) == 5:
            raise Killed
        done.append(1)
        return apply(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", dying)
        with pytest.raises(Killed):
            train(branch)
    train(dataclasses.replace(stable, steps=16))  # removes the checkpoint that the branch began at
    assert not Path(at(stable, 4)).exists()
    again = resolve({"decay_from": at(stable, 4), "decay_steps": 6.0, "out": branch.out})
    assert train(again) == 0
    assert weights(branch, 10) == weights(whole, 10)
    assert rates(branch) == pytest.approx([1e-3 * (1 - (n / 6) ** 0.5) for n in range(6)])
    assert rates(stable)[2:] == [1e-3] * 14
    by_record = resolve({"out": str(tmp_path / "record"), "decay_from": None}, Path(branch.out) / "config.json")
    assert train(by_record) == 0  # from its first update: the plan needs no other run
    assert weights(by_record, 10) == weights(whole, 10)


def test_a_run_goes_on_with_more_data_and_does_not_warm_up_again(stable, prepared, tmp_path):
    flags = {"continue_from": at(stable, 8), "steps": 100, "warmup": 0.5, "out": str(tmp_path / "more")}
    config = resolve(flags | {"data": str(prepared / "other")})
    with pytest.raises(ConfigError, match=r"--continue-from .* has done the 8 updates"):
        train(resolve({name: value for name, value in flags.items() if name != "steps"}))
    few = dataclasses.replace(config, steps=12)
    assert train(few) == 0
    assert rates(few) == [1e-3] * 4
    assert [line["step"] for line in losses(few, "train")] == [9, 10, 11, 12]
    same = dataclasses.replace(few, data=stable.data, out=str(tmp_path / "same"))
    train(same)
    longer = dataclasses.replace(stable, steps=12)
    train(longer)
    assert weights(same, 12) == weights(longer, 12)
    assert weights(few, 12) != weights(same, 12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decay_steps": None}, "--decay-from needs --decay-steps"),
        ({"decay_steps": 0.5}, "--decay-from needs --decay-steps"),
        ({"continue_from": "x"}, "--decay-from and --continue-from"),
        ({"decay_from": "nowhere"}, "--decay-from nowhere is no checkpoint"),
        ({"lr": 1.0}, "--lr and --warmup are those of that run"),
        ({"seed": 1}, r"--seed \(was 0, now 1\)"),
    ],
)
def test_what_a_branch_cannot_be_is_refused_by_name(stable, tmp_path, changes, message):
    flags = {"decay_from": at(stable, 4), "decay_steps": 2.0, "out": str(tmp_path / "branch")}
    with pytest.raises((ConfigError, NotTheSameRun), match=message):
        train(resolve(flags | changes))


def test_a_branch_begins_at_a_whole_checkpoint_of_a_stable_phase_in_a_folder_of_its_own(configure, stable, tmp_path):
    flags = {"decay_from": at(stable, 4), "decay_steps": 2.0, "out": str(tmp_path / "branch")}
    with pytest.raises(ConfigError, match="choose another --out"):
        resolve(flags | {"out": stable.out})
    train(resolve(flags))
    with pytest.raises(ConfigError, match="planned with another --decay-steps: choose another --out"):
        train(resolve(flags | {"decay_steps": 4.0}))
    with pytest.raises(ConfigError, match="planned with another --decay-from"):
        train(resolve(flags | {"decay_from": at(stable, 8)}))
    warming = configure(schedule="constant", warmup=6.0, steps=4, out=str(tmp_path / "warming"))
    train(warming)
    other = str(tmp_path / "other")
    with pytest.raises(ConfigError, match="no checkpoint of a stable phase"):
        train(resolve(flags | {"decay_from": at(warming, 4), "out": other}))
    linear = configure(steps=4, out=str(tmp_path / "linear"))
    train(linear)
    with pytest.raises(ConfigError, match="--decay-steps needs --schedule wsd; --schedule is linear"):
        resolve(flags | {"decay_from": at(linear, 4), "out": other})
    damaged = tmp_path / "damaged"
    shutil.copytree(at(stable, 4), damaged)
    (damaged / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"is no whole checkpoint: model\.safetensors"):
        train(resolve(flags | {"decay_from": str(damaged), "out": other}))
