"""SIGKILL: whenever it comes, the same command ends with the same weights and losses, bit for bit."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.run_processes import ENVIRONMENT, HELD, of, run_script
from tests.support.training_runs import losses, weights


def check(config, found: dict, kills: int) -> None:
    assert found["killed"] == kills, found
    assert found["last"] == 0
    whole = of(config, "whole")
    for number in range(found["completed"]):
        assert weights(of(config, number), 12) == weights(whole, 12), found
        assert losses(of(config, number)) == losses(whole), found


def test_killed_three_times(configure, tmp_path):
    config = configure(keep=1, validate_every=6)
    check(config, run_script("kills", config.as_dict(), tmp_path / "options.json", 3, 5), 3)


@pytest.mark.slow
def test_killed_at_twenty_moments(configure, tmp_path):
    config = configure(keep=1, checkpoint_every=2, validate_every=6, nsp=True)
    found = run_script("kills", config.as_dict(), tmp_path / "options.json", 20, 11)
    check(config, found, 20)
    assert found["things"] > 500  # most of them inside a checkpoint


@pytest.mark.slow
def test_the_command_killed_while_workers_make_batches(configure, tmp_path):
    """The command itself, as a user starts it, with worker processes; SIGKILL once the first checkpoint is there."""
    config = configure(steps=40, workers=2)

    def command(out: str, *start: str) -> list[str]:
        path = tmp_path / "options.json"
        path.write_text(json.dumps(dataclasses.replace(config, out=out).as_dict()))
        return [sys.executable, *(start or ("-m", "bert_fast")), "pretrain", "--config", str(path), "--quiet"]

    whole = of(config, "whole")
    assert subprocess.run(command(whole.out), env=ENVIRONMENT).returncode == 0
    child = subprocess.Popen(command(config.out, *HELD, "6"), env=ENVIRONMENT, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (Path(config.out) / "checkpoints" / "step-00000004").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert subprocess.run(command(config.out), env=ENVIRONMENT).returncode == 0
    assert weights(config, 40) == weights(whole, 40)
    assert losses(config) == losses(whole)
