"""What phases 2 and 5 of `make gpu` keep of checks that crash, of processes that die and of sweeps that are cut off."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.gpu_phases import new_results, script, smoke_phase

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


pytestmark = pytest.mark.usefixtures("benchmark_scripts")


def phase_from_disk(phase: int, path: Path, seconds: float = 120.0) -> dict:
    """A phase as a process of its own runs it: from what is on disk, to what is there after it."""
    smoke_phase(phase, script("gpu_results").Results(path), seconds)
    return json.loads(path.read_text())


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


# --------------------------------------------------------------------------------------------------------------
# Parity

BROKEN_COMMAND = """
import os, sys
sys.path.insert(0, {benchmarks!r})
import gpu, gpu_parity, numerical_parity, torch

compare = numerical_parity.compare

def broken(config, batch, device, dtype, **options):
    if dtype == torch.bfloat16:
        raise ZeroDivisionError("no such gradient")
    return compare(config, batch, device, dtype, **options)

gpu_parity.compare = broken
begin = gpu_parity.subprocess.Popen

def dying(*arguments, **options):
    begin(*arguments, **options).wait()
    os.kill(os.getpid(), 9)

gpu_parity.subprocess.Popen = dying
sys.exit(gpu.main())
"""


def test_a_check_that_crashes_is_told_and_a_process_that_dies_in_the_tests_loses_nothing(tmp_path, monkeypatch):
    """The phase in processes of its own: the check in bfloat16 raises, and the first process dies while its tests run.
    The second one keeps all that the first had found out, and the phase has failed."""
    gpu = script("gpu")
    command = tmp_path / "command.py"
    command.write_text(BROKEN_COMMAND.format(benchmarks=str(BENCHMARKS)))
    monkeypatch.setattr(gpu, "__file__", str(command))
    results = new_results(tmp_path / "r.json", smoke=True)
    results.add("phases", gpu.supervise(2, results, SimpleNamespace(until=time.time() + 240, smoke=True)))
    (outcome,) = results.data["phases"]
    assert outcome["state"] == "failed"
    assert "whole models that were not found right, see their lines: micro bfloat16" in outcome["error"]
    parity = json.loads((tmp_path / "r.json").read_text())["parity"]
    right, crashed = parity["models"]
    assert (right["dtype"], right["passed"]) == ("float32", right["compared"])
    assert (crashed["dtype"], crashed["failed"]) == ("bfloat16", "ZeroDivisionError: no such gradient")
    assert "in broken" in crashed["traceback"]
    assert parity["passed"] > 0
    assert parity["failed"] == []
    text = script("gpu_results").markdown(results.data)
    assert f"{parity['passed']} tests passed, 0 failed when the process that had started them ended." in text
    assert f"Whole model (micro, float32): {right['passed']} of {right['compared']} within" in text
    assert "Whole model (micro, bfloat16): **not compared**: ZeroDivisionError: no such gradient." in text
    assert f"whole model micro bfloat16:\n```\n{crashed['traceback']}```" in text.partition("## What failed")[2]
    assert "| 2 parity | failed |" in text
    assert [path.name for path in tmp_path.glob("r-tests.*")] == []


def test_a_check_that_kills_its_process_or_finds_an_error_is_told(tmp_path, monkeypatch):
    parity, path = script("gpu_parity"), tmp_path / "r.json"
    new_results(path, smoke=True)

    def compare(config, batch, device, dtype, **options):
        if dtype == parity.torch.float32:
            raise Killed
        return [{"what": "loss", "error": 2.0, "bound": 1.0, "passed": False}]

    monkeypatch.setattr(parity, "compare", compare)
    monkeypatch.setattr(parity, "run_tests", lambda *_: None)
    with pytest.raises(Killed):
        phase_from_disk(2, path)
    with pytest.raises(RuntimeError, match="see their lines: micro float32, micro bfloat16"):
        phase_from_disk(2, path)
    text = script("gpu_results").parity_text(json.loads(path.read_text()))
    assert "Whole model (micro, float32): **not compared**: its process died, or hung and was ended." in text
    assert "Whole model (micro, bfloat16): **not right**, 0 of 1 within" in text


@pytest.fixture
def right_models(monkeypatch):
    """The whole models are found right at once."""
    row = {"what": "loss", "error": 0.0, "bound": 1.0, "passed": True}
    monkeypatch.setattr(script("gpu_parity"), "compare", lambda *_, **__: [row])


@pytest.mark.usefixtures("right_models")
def test_tests_that_cannot_run_are_told_with_the_reason(tmp_path, monkeypatch):
    new_results(tmp_path / "r.json", smoke=True)
    monkeypatch.setitem(sys.modules, "pytest", None)  # as where it is not installed
    data = phase_from_disk(2, tmp_path / "r.json")
    text = script("gpu_results").markdown(data)
    assert "Parity on the GPU: the tests were not run, as pytest is not installed." in text
    assert "0 tests passed" not in text
    # a process that goes on knows no other reason
    assert phase_from_disk(2, tmp_path / "r.json")["parity"] == data["parity"]


@pytest.mark.usefixtures("right_models")
@pytest.mark.parametrize(
    ("options", "seconds", "why"),
    [(["--no-such-option"], 120.0, "pytest ended with status 4"), ([], 0.0, "the time was up")],
)
def test_tests_that_do_not_end_are_told_with_the_reason(tmp_path, monkeypatch, options, seconds, why):
    new_results(tmp_path / "r.json", smoke=True)
    parity = script("gpu_parity")
    monkeypatch.setattr(parity, "PYTEST", [*parity.PYTEST, *options])
    data = phase_from_disk(2, tmp_path / "r.json", seconds)
    assert f"0 tests passed, 0 failed when {why}." in script("gpu_results").parity_text(data)
    assert all(option in data["parity"]["log_tail"] for option in options)


@pytest.mark.usefixtures("right_models")
def test_while_tests_are_collected_the_phase_is_seen_at_work(tmp_path, monkeypatch):
    """A phase that writes nothing for long is ended, and a first outcome may take long: imports, compilation."""
    new_results(tmp_path / "r.json", smoke=True)
    collecting = """if True:
        import os, sys, time
        written, deadline = os.stat(sys.argv[1]).st_mtime_ns, time.time() + 20
        while os.stat(sys.argv[1]).st_mtime_ns == written:
            time.sleep(0.05)
            assert time.time() < deadline
        sys.exit(0)"""
    command = [sys.executable, "-c", collecting, str(tmp_path / "r.json")]
    monkeypatch.setattr(script("gpu_parity"), "PYTEST", command)
    data = phase_from_disk(2, tmp_path / "r.json")
    assert "stopped" not in data["parity"]
    assert data["parity"]["finished"]


def test_the_tests_of_real_graphs_come_first():
    files = script("gpu_parity").device_tests()
    assert [str(path.relative_to(ROOT / "tests")) for path in files[:3]] == [
        "test_captured_step.py", "train/test_pretrain_recorded.py", "test_attention.py",
    ]  # fmt: skip
    assert {path.name for path in files} >= set(script("gpu_parity").FIRST)
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *map(str, files[:3])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ)
    order = list(dict.fromkeys(line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line))
    assert order == [str(path.relative_to(ROOT)) for path in files[:3]]


# --------------------------------------------------------------------------------------------------------------
# Launch configurations


@pytest.mark.parametrize("ending", ["killed", "lost"])
def test_a_sweep_that_is_ended_goes_on_after_the_configuration_that_ended_it(tmp_path, monkeypatch, ending):
    """Killed, as where a kernel hangs, or as the device was lost: the second configuration of three."""
    pytest.importorskip("triton")
    tune, gpu_results, path = script("gpu_tune"), script("gpu_results"), tmp_path / "r.json"
    choices = [{"num_warps": 2}, {"num_warps": 4}, {"num_warps": 8}]
    monkeypatch.setattr(tune, "configurations", lambda *_: choices)
    monkeypatch.setattr(tune, "KERNELS", {"bias_gelu": (("fwd", "forward"),), "feed_forward": ()})
    applied, began = tune.applied, []

    def ended(operator, kernel, changed):
        began.append(changed)
        if changed == choices[1]:
            raise Killed if ending == "killed" else RuntimeError("an illegal memory access")
        return applied(operator, kernel, changed)

    def lost():
        raise gpu_results.DeviceLost("an illegal memory access")

    monkeypatch.setattr(tune, "applied", ended)
    new_results(path, smoke=True)
    with monkeypatch.context() as patch:
        if ending == "lost":
            patch.setattr(tune, "raise_if_device_lost", lost)
            patch.setattr(gpu_results, "raise_if_device_lost", lost)
        with pytest.raises(Killed if ending == "killed" else gpu_results.DeviceLost):
            phase_from_disk(5, path)
    data = json.loads(path.read_text())
    first = data["tune"][0]["tried"][0]
    assert first["us"] > 0
    assert data["begun"]["5"][-1] == "bias_gelu fwd, micro 24: num_warps=4"  # who supervises tells it
    count = len(data["tune"][0]["tried"])
    assert count == (1 if ending == "killed" else 2)
    text = gpu_results.markdown(data)
    assert f"cut off after {count} configurations; the fastest: num_warps=2 |" in text

    data = phase_from_disk(5, path)
    row = data["tune"][0]
    assert began == choices  # each once
    assert [tried["changed"] for tried in row["tried"]] == choices
    assert row["tried"][0] == first
    told = "its process died, or hung and was ended" if ending == "killed" else "RuntimeError: an illegal memory access"
    assert row["tried"][1]["failed"] == told
    assert row["tried"][2]["us"] > 0
    assert row["write"]
    assert "cut off" not in gpu_results.markdown(data)
    assert phase_from_disk(5, path) == data  # all is done


def test_a_sweep_whose_first_configuration_never_ran_says_so():
    row = {"what": "attention fwd, base 512", "default_us": 20.0, "tried": []}
    line = script("gpu_results").tune_table({"tune": [row]}).splitlines()[-1]
    assert line == "| attention fwd, base 512 | 20 |  | cut off after 0 configurations; the fastest: none ran |"
