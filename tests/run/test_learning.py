"""It learns: dev/learning.py, once small, once as the proof that it is (`make test-all` runs it by itself)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("BERT_FAST_TEST_DATA", ROOT.parent / "shared" / "data"))
WIKITEXT = DATA / "wikitext-2"


def learn(tmp_path, *arguments) -> dict:
    """What the script measures, without Triton's interpreter, as a user runs it."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "dev" / "learning.py", *arguments, "--json", "--out", tmp_path / "proof"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print({key: found[key] for key in ("mlm_loss", "unigram_loss", "mlm_accuracy", "nsp_accuracy")})
    return found


@pytest.mark.slow
def test_held_out_loss_falls_well_below_word_frequency(tmp_path):
    found = learn(tmp_path, "--model", "tiny", "--lr", "3e-3", "--steps", "600")
    assert found["mlm_loss"] < found["unigram_loss"] - 0.4
    assert found["mlm_accuracy"] > 0.15


@pytest.mark.proof
@pytest.mark.skipif(not WIKITEXT.is_dir(), reason="no WikiText-2; BERT_FAST_TEST_DATA names the folder that has it")
def test_a_mini_bert_learns_from_wikipedia(tmp_path):
    """Sixty articles, a quarter of an hour on two cores: the MLM loss of other articles is far below what the frequency
    of words gives, their NSP is right more often than guessing by three standard errors, and fine-tuned for SST-2 the
    model beats the same one from random weights."""
    wikitext = "--train", WIKITEXT / "valid.txt", "--heldout", WIKITEXT / "test.txt"
    found = learn(tmp_path, *wikitext, "--sst2", DATA / "sst2")
    assert found["mlm_loss"] < found["unigram_loss"] - 1.5
    assert found["nsp_standard_errors"] > 3
    accuracy = {kind: sum(found["sst2"][kind]) / len(found["sst2"][kind]) for kind in ("pretrained", "random")}
    print(found["sst2"])
    assert accuracy["pretrained"] > accuracy["random"] + 0.01  # 872 sentences: one standard error is 0.015
