"""The picture of losses: what is drawn from metrics.jsonl."""

import json

import numpy as np
import pytest

from bert_fast.run.plot import _points, read_losses, smooth


def test_smoothing_keeps_lines_straight_and_narrows_noise():
    line = np.linspace(3.0, 1.0, 200)
    assert smooth(np.full(50, 2.5), 4.0) == pytest.approx(2.5)
    np.testing.assert_allclose(smooth(line, 5.0)[20:-20], line[20:-20], atol=1e-12)
    noise = np.random.default_rng(0).normal(size=400)
    assert smooth(noise, 4.0).std() < 0.4 * noise.std()
    assert smooth(np.array([1.0]), 3.0) == pytest.approx([1.0])


def test_a_step_repeated_by_a_resume_counts_once_and_what_is_not_finite_is_left_out(tmp_path):
    values = [(1, 5.0), (2, 4.0), (3, 9.0), (3, 3.0), (4, None), (5, float("nan"))]
    lines = [json.dumps({"kind": "train", "step": step, "mlm_loss": loss}) for step, loss in values]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    steps, losses = _points(read_losses(tmp_path), "train", "mlm_loss")
    assert steps.tolist() == [1, 2, 3]
    assert losses.tolist() == [5.0, 4.0, 3.0]
