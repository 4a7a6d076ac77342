"""dev/finetuning_scores.py tells runs of one distribution from others."""

import random

import pytest

from dev import finetuning_scores


def runs(draw, shift: float = 0.0, control: float = -0.1) -> dict:
    """Five made runs of each but the control: of ours the training loss is off by ``shift``, of the control by that."""

    def made(off: float) -> dict:
        return {"accuracy": draw.gauss(0.8, 0.01), "loss": draw.gauss(0.5, 0.01),
                "train_loss": draw.gauss(0.4, 0.01) + off}  # fmt: skip

    return {
        "ours": [made(shift) for _ in range(5)],
        finetuning_scores.CONTROL: [made(control)],
        finetuning_scores.PEER: [made(0.0) for _ in range(5)],
    }


@pytest.mark.parametrize(
    ("differing", "share"),
    [({}, 0.95), ({"shift": 0.06}, 0.0), ({"control": 0.0}, 0.05)],
    ids=["same", "ours", "control"],
)
def test_the_same_is_said_as_often_as_the_interval_promises(differing, share):
    draw, told = random.Random(0), []
    same = sum(finetuning_scores.verdict(runs(draw, **differing), told.append) for _ in range(200)) / 200
    assert abs(same - share) < 0.05
    assert any("minus Trainer" in line for line in told)
