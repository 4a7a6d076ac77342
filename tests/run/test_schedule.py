"""Learning rate and phases."""

import pytest

from bert_fast.data.phase import Phase
from bert_fast.run.config import ConfigError, PretrainConfig, phases
from bert_fast.train.schedule import learning_rate, phase_of


def config(**options) -> PretrainConfig:
    return PretrainConfig(data="d", out="r", **options)


def rates(phase: Phase, **kind) -> list[float]:
    return [learning_rate(step, phase, **kind) for step in range(phase.schedule_first, phase.schedule_last)]


def test_linear_warm_up_then_linear_decay():
    (phase,) = phases(config(steps=10, warmup=4.0, lr=1.0))
    assert rates(phase) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_polynomial_and_constant():
    (phase,) = phases(config(steps=5, warmup=1.0, lr=2.0))
    decay = [1, 0.75, 0.5, 0.25]
    assert rates(phase, schedule="polynomial", power=0.5) == pytest.approx([2.0] + [2 * x**0.5 for x in decay])
    assert rates(phase, schedule="polynomial", power=1.0) == rates(phase)
    assert rates(phase, schedule="constant") == [2.0] * 5


def test_cosine():
    (phase,) = phases(config(steps=6, warmup=2.0, lr=4.0))
    assert rates(phase, schedule="cosine") == pytest.approx([2, 4, 4, 2 + 2**0.5 * 1, 2, 2 - 2**0.5 * 1])


def test_warm_up_stable_decay():
    (phase,) = phases(config(steps=8, warmup=2.0, lr=2.0, schedule="wsd", decay_steps=4.0))
    decay = [2 * (1 - x**0.5) for x in (0, 0.25, 0.5, 0.75)]
    assert rates(phase, schedule="wsd") == pytest.approx([1, 2, 2, 2, *decay])
    (share,) = phases(config(steps=8, warmup=2.0, lr=2.0, schedule="wsd", decay_steps=0.5))
    assert share == phase
    (stable,) = phases(config(steps=8, warmup=2.0, lr=2.0, schedule="wsd"))
    assert rates(stable, schedule="wsd") == rates(stable, schedule="constant")


def test_decay_is_of_wsd_alone():
    with pytest.raises(ConfigError, match="--decay-steps needs --schedule wsd; --schedule is linear"):
        config(decay_steps=4.0)
    with pytest.raises(ConfigError, match="--decay-steps must be above 0"):
        config(schedule="wsd", decay_steps=0.0)


def test_warm_up_below_one_is_a_share_and_may_be_none():
    assert phases(config(steps=1000, warmup=0.01))[0].warmup == 10
    (phase,) = phases(config(steps=4, warmup=0.0, lr=1.0))
    assert rates(phase) == [1.0, 0.75, 0.5, 0.25]


def test_phases_share_one_schedule_as_bert_does():
    first, second = phases(config(phases="128:900,512:100", warmup=100.0, lr=1.0, batch_size=4))
    assert (first.seq, first.first, first.last, first.batch_size) == (128, 0, 900, 4)
    assert (second.seq, second.first, second.last) == (512, 900, 1000)
    assert (second.schedule_first, second.schedule_last, second.warmup) == (0, 1000, 100)
    assert learning_rate(950, second) == pytest.approx(50 / 900)
    assert [phase_of(step, [first, second]) for step in (0, 899, 900, 999)] == [0, 0, 1, 1]
    with pytest.raises(IndexError):
        phase_of(1000, [first, second])


def test_a_phase_with_its_own_rate_has_its_own_schedule_as_lamb_does():
    text = "128:70:lr=6e-3:warmup=0.1:batch=64, 512:10:lr=4e-3:warmup=2:batch=32, 512:20:batch=16"
    one, two, three = phases(config(phases=text))
    assert (one.lr, one.warmup, one.batch_size, one.schedule_last) == (6e-3, 7, 64, 70)
    assert (two.lr, two.warmup, two.batch_size, two.schedule_first, two.schedule_last) == (4e-3, 2, 32, 70, 100)
    assert (three.lr, three.batch_size, three.schedule_first, three.schedule_last) == (4e-3, 16, 70, 100)
    assert learning_rate(71, two) == 4e-3


@pytest.mark.parametrize(
    "text",
    ["128", "128:x", "0:10", "128:10:rate=1", "128:10:lr=-1", "128:10:lr=nan", "128:10:warmup=inf", "128:10,",
     "128:10:batch=0"],
)  # fmt: skip
def test_wrong_phases_are_refused(text):
    with pytest.raises(ConfigError, match="--phases"):
        phases(config(phases=text))
