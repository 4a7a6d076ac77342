"""Several processes (gloo): the same losses as one, and a run that goes on, on another number of them."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bert_fast.run import checkpoint
from tests.support.run_processes import ENVIRONMENT, HELD, of, run_script
from tests.support.training_runs import losses, train

pytestmark = pytest.mark.slow


def assert_same_to_rounding(found: list[dict], expected: list[dict], rtol: float = 2e-4) -> None:
    assert [(line["kind"], line["step"]) for line in found] == [(line["kind"], line["step"]) for line in expected]
    for line, other in zip(found, expected, strict=True):
        assert_near(line, other, rtol)


def assert_near(line: dict, other: dict, rtol: float) -> None:
    for key, value in other.items():
        if isinstance(value, dict):
            assert_near(line[key], value, rtol)
        elif isinstance(value, float):
            assert line[key] == pytest.approx(value, rel=rtol), (key, line, other)
        else:
            assert line[key] == value


def test_the_number_of_processes_changes_nothing(configure, tmp_path):
    """Same seed and batch, dropout on (its masks belong to the samples): 1, 2 and 4 processes, and a run begun on 2
    that goes on on 1 and ends on 4, give the same losses to rounding."""
    config = configure(batch_size=16)
    other = configure(out=str(tmp_path / "other"), batch_size=16, nsp=False, whole_word=True, optimizer="lamb", steps=6)
    steady = configure(out=str(tmp_path / "steady"), batch_size=16, schedule="constant", warmup=0.0)
    jobs = [(of(config, 1), 1), (of(config, 2), 2), (of(config, 4), 4), (of(other, 1), 1)]
    jobs += [(dataclasses.replace(of(other, 2), micro_tokens=64), 2), (of(steady, 1), 1)]
    jobs += [(dataclasses.replace(of(steady, 241), steps=steps), world) for world, steps in ((2, 4), (1, 8), (4, 12))]
    jobs += [(of(config, "two-machines"), 4)]
    given = [[job.as_dict(), world, 2 if job.out.endswith("machines") else world] for job, world in jobs]
    assert run_script("jobs", given, tmp_path / "jobs.json") == [[0] * world for _, world in jobs]
    alone = losses(of(config, 1))
    assert len(alone) == 12 + 3 + 1
    for name, shards in ((2, 2), (4, 4), ("two-machines", 2)):
        assert_same_to_rounding(losses(of(config, name)), alone)
        files = [path.name for path in checkpoint.folder_of(Path(f"{config.out}-{name}"), 12).glob("optimizer*")]
        assert sorted(files) == [f"optimizer-{rank:05d}-of-{shards:05d}.safetensors" for rank in range(shards)]
    four, machines = (checkpoint.newest(Path(f"{config.out}-{name}"))[0] for name in (4, "two-machines"))
    for part in ("model", "optimizer"):  # where the state lies changes no bit
        a, b = four.tensors(part), machines.tensors(part)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert_same_to_rounding(losses(of(other, 2)), losses(of(other, 1)))
    assert_same_to_rounding(losses(of(steady, 241), "train"), losses(of(steady, 1), "train"))


def test_several_sources_are_shared_by_processes_and_a_run_goes_on(configure, prepared, tmp_path):
    """1 and 2 processes, and a run begun on 2 that goes on on 2 and ends on 1, within a source's epoch."""
    data = tuple(f"{prepared / name}:{weight}" for name, weight in (("data", 1), ("other", 3)))
    held = (str(prepared / "other"), str(prepared / "data"))
    mixed = configure(data=data, validation_data=held, batch_size=16, schedule="constant", warmup=0.0)
    jobs = [(of(mixed, 1), 1), (of(mixed, 2), 2)]
    jobs += [(dataclasses.replace(of(mixed, 221), steps=steps), world) for world, steps in ((2, 3), (2, 7), (1, 12))]
    given = [[job.as_dict(), world, world] for job, world in jobs]
    assert run_script("jobs", given, tmp_path / "jobs.json") == [[0] * world for _, world in jobs]
    alone = losses(of(mixed, 1))
    assert set(alone[-2]["sources"]) == {"data", "other"}
    assert_same_to_rounding(losses(of(mixed, 2)), alone)
    assert_same_to_rounding(losses(of(mixed, 221), "train"), losses(of(mixed, 1), "train"))


def torchrun(path: Path, processes: int) -> subprocess.Popen:
    """Its run waits after 20 updates: it is not at its end when the test comes to it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [*HELD, "20", "pretrain", "--config", str(path), "--quiet"]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(run: subprocess.Popen, ready) -> None:
    deadline = time.monotonic() + 150
    while not ready() and time.monotonic() < deadline:
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.01)


def test_torchrun_saves_on_sigterm_and_survives_a_killed_rank(configure, tmp_path):
    """SIGTERM to torchrun: every rank saves and leaves. Started again, one rank is killed; one process ends the run."""
    whole, config = configure(out=str(tmp_path / "whole"), steps=150), configure(steps=150)
    train(whole)
    path, metrics = tmp_path / "options.json", Path(config.out) / "metrics.jsonl"
    path.write_text(json.dumps(config.as_dict()))
    run = torchrun(path, 2)
    wait_for(run, lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 3)
    run.send_signal(signal.SIGTERM)
    told = run.communicate(timeout=100)[1]
    last = losses(config)[-1]
    assert last["kind"] == "end", told
    assert "FutureWarning" not in told  # every process would tell it
    assert last["reason"] == "stopped by a signal"
    stopped = checkpoint.newest(Path(config.out))[0].step
    assert stopped == last["step"] < 140

    run = torchrun(path, 2)
    wait_for(run, lambda: checkpoint.newest(Path(config.out))[0].step > stopped)
    os.kill(children_of(run.pid)[1], signal.SIGKILL)
    run.communicate(timeout=100)
    assert run.returncode != 0
    assert stopped < checkpoint.newest(Path(config.out))[0].step < 150
    assert train(config) == 0
    assert_same_to_rounding(losses(config, "train"), losses(whole, "train"), rtol=1e-2)
