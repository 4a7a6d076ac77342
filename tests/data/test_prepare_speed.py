"""dev/prepare_speed.py as a user runs it, on little text."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from bert_fast.data import save_tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "dev" / "prepare_speed.py"


def run(*arguments):
    done = subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_speed_and_memory_of_prepare(tokenizer, tmp_path):
    tok = save_tokenizer(tokenizer, tmp_path / "tok")
    common = ("--tokenizer", tok, "--unit-bytes", 100_000, "--megabytes", 0.5, "--work", tmp_path, "--workers", 1)
    facts = json.loads(run(*common, "--rounds", 2, "--json"))
    assert facts["bytes"] > 500_000
    (row,) = facts["speed"]
    ratios = [theirs / ours for ours, theirs in zip(row["prepare_s"], row["tokenizers_s"], strict=True)]
    assert len(ratios) == 2
    assert row["ratio"] == statistics.median(ratios)
    assert row["prepare_mb_s"] == pytest.approx(facts["bytes"] / 1e6 / statistics.median(row["prepare_s"]))
    table = run(*common, "--memory").splitlines()
    assert len(table) == 6
    peaks = [[int(number) for number in line.split()] for line in table[2:]]
    assert peaks == sorted(peaks)
    assert all(5 < own <= anonymous < total for _, total, anonymous, own in peaks)
    assert [path.name for path in tmp_path.iterdir()] == ["tok"]
