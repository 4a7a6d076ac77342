"""pretrain --dry-run: what it says is what the run then is, and nothing is written."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bert_fast.cli import main
from bert_fast.data import load_tokenizer, open_corpus, read_manifest
from bert_fast.data.dataset import PretrainingDataset
from bert_fast.optim import AdamW
from bert_fast.run.checkpoint import CheckpointError
from bert_fast.run.config import ConfigError
from bert_fast.run.dry_run import dry_run
from bert_fast.train.step import Step
from tests.support.training_runs import train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def short(monkeypatch):
    """The shortest measurement."""
    monkeypatch.setattr("bert_fast.run.dry_run.SECONDS", 0.0)


def test_what_it_says_is_what_the_run_is(configure, prepared, short):
    config = configure(phases="16:6,32:6:batch=5", validation=0, keep=1)
    before = sorted(Path(config.data).parent.rglob("*"))
    facts = dry_run(config)
    assert sorted(Path(config.data).parent.rglob("*")) == before
    assert not Path(config.out).exists()

    dataset = PretrainingDataset(open_corpus(prepared / "data"), load_tokenizer(prepared / "tokenizer"), max_length=16)
    data, tokens = facts["data"], read_manifest(prepared / "data")["tokens"]
    assert (data["tokens"], data["tokens_looked_at"], data["held"]) == (tokens, tokens, dataset.plan.held / tokens)
    assert (data["samples_an_epoch"], data["tokens_an_epoch"]) == (len(dataset), dataset.plan.length.sum())
    first, second = facts["phases"]
    assert (first["updates"], first["updates_left"], second["batch_size"]) == (6, 6, 5)
    assert first["tokens_an_update"] == pytest.approx(8 * dataset.plan.length.mean())
    assert first["epochs"] == pytest.approx(6 * 8 / len(dataset))
    assert facts["speed"]["tokens_per_s"] > 0
    assert facts["updates"] == 12

    assert train(config) == 0
    sizes = {path.name: path.stat().st_size for path in (Path(config.out) / "checkpoints" / "step-00000012").iterdir()}
    assert facts["memory"]["weights"] == pytest.approx(sizes["model.safetensors"], rel=0.05)
    assert facts["disk"]["checkpoint"] == pytest.approx(sum(sizes.values()), rel=0.3)  # of so small a model
    model = json.loads((Path(config.out) / "model" / "config.json").read_text())
    assert sum(facts["parameters"].values()) * 4 == facts["memory"]["weights"]
    assert facts["parameters"]["embeddings"] == (model["vocab_size"] + 64 + 2 + 2) * 32


def test_a_run_that_goes_on(configure, short):
    train(configure(steps=8))
    facts = dry_run(configure(steps=20))
    assert (facts["updates"], facts["phases"][0]["updates"]) == (12, 20)


def test_beside_a_budget_it_says_which_updates_fit(configure, capsys):
    config = configure(phases="16:6000000,32:2000000:batch=6", max_hours=0.02, validation=0)
    facts = dry_run(config)
    first, second = facts["phases"]
    assert first["updates"] == pytest.approx(3 * second["updates"], abs=2)
    assert 0.015 < facts["hours"] < 0.02
    assert f"{facts['updates']:,} updates: --phases 16:{first['updates']}:batch=8" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--max-hours 1e-12 is too short"):  # on any machine
        dry_run(configure(max_hours=1e-12))


def test_an_update_that_takes_long_is_measured_in_part(configure, monkeypatch):
    """A clock that goes on by what micro-batches, tokens and the optimiser take: the update is what they make it."""
    now, tokens = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    differentiate = Step._differentiate

    def timed(step, batch, *into):
        tokens.append(int(batch["cu_seq_lens_q"][-1]))
        now[0] += 0.5 + 0.01 * tokens[-1]
        return differentiate(step, batch, *into)

    def step(optimizer, *args, **kwargs):
        now[0] += 0.25

    monkeypatch.setattr(Step, "_differentiate", timed)
    monkeypatch.setattr(AdamW, "step", step)
    facts = dry_run(configure(batch_size=2048))
    (phase,) = facts["phases"]
    assert max(tokens) < phase["tokens_an_update"] / 20
    micro = 0.5 * math.ceil(phase["tokens_an_update"] / 4096) + 0.01 * phase["tokens_an_update"]
    assert phase["seconds_an_update"] == pytest.approx(0.25 + micro)
    assert facts["speed"]["tokens_per_s"] == pytest.approx(phase["tokens_an_update"] / micro)
    assert facts["speed"]["seconds_of_the_optimizer"] == pytest.approx(0.25)


@pytest.mark.parametrize("wrong", [{"phases": "9999:5"}, {"model": "nowhere.json"}])
def test_what_pretrain_refuses_it_refuses(configure, wrong):
    messages = []
    for start in (dry_run, train):
        with pytest.raises((ConfigError, CheckpointError, OSError)) as error:
            start(configure(**wrong))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_from_the_command_line(configure, capsys, short):
    config = configure()
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in config.as_dict().items() if value is not None
            and not isinstance(value, bool)]  # fmt: skip
    assert main(["pretrain", *argv, "--dry-run"]) == 0
    out = capsys.readouterr().out
    for said in ("million parameters", "samples of", "tokens a second", "updates to the end take", "a checkpoint"):
        assert said in out
    assert not Path(config.out).exists()


@pytest.mark.slow
def test_two_processes(configure):
    config = configure()
    (path := Path(config.data).parent / "options.json").write_text(json.dumps(config.as_dict()))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        "-m",
        "bert_fast",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "pretrain", "--config", path, "--dry-run", "--json"],
        capture_output=True, text=True, env=environment, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (result,) = [line for line in map(json.loads, done.stdout.splitlines()) if line["kind"] == "result"]
    assert result["memory"]["optimizer"] < 0.8 * result["memory"]["optimizer_all"]  # the two share it
