"""The suite's tests that run on a device: which, and their run in a process of its own.

    python -m benchmarks.device_tests      # prints the files, for `make gpu-test`

They are the files that choose a device (``DEVICE`` of tests/support/parity.py). This is a pytest plugin too: it appends
every test's outcome at once to the file that BERT_FAST_TEST_OUTCOMES names, one JSON object a line, so that a run that
is cut off loses nothing; and it ends with the process that started it: tests that go on would disturb what is timed.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.results import ROOT, Results
from bert_fast.supervised import end_with_parent

# The time may be up before the last file. The first two are the only tests of real CUDA graphs, from which the training
# that is timed is replayed; on a CPU a stand-in takes their place. The operators' tests run on a CPU too, interpreted.
FIRST = ("test_captured_step.py", "test_pretrain_recorded.py", "test_attention_hopper.py", "test_attention.py")
# A file whose imports are not all there (packages that only this project's own environment has) keeps no other back.
PYTEST = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "benchmarks.device_tests",
          "-p", "no:cacheprovider", "--continue-on-collection-errors"]  # fmt: skip


def files() -> list[Path]:
    """Those of FIRST first."""
    found = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "import DEVICE" in path.read_text("utf-8")]
    return sorted(found, key=lambda path: FIRST.index(path.name) if path.name in FIRST else len(FIRST))


def run(results: Results, paths: list[Path], until: float) -> None:
    """Fills "tests": {"passed", "skipped", "failed": [...], "finished", ...}, whole after every outcome, until the time
    is up. RuntimeError where some failed: it is told, no more, as some may lack a package here."""
    tests = {"passed": 0, "skipped": 0, "failed": [], "finished": False}
    results.put("tests", tests)
    if importlib.util.find_spec("pytest") is None:
        tests["not_run"] = "pytest is not installed"
        results.save()
        return
    outcomes, log = (results.path.with_name(f"{results.path.stem}-tests.{kind}") for kind in ("jsonl", "log"))
    outcomes.unlink(missing_ok=True)
    command = [*PYTEST]
    if len(paths) > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--maxschedchunk", "2"]
    environment = os.environ | {"BERT_FAST_TEST_OUTCOMES": str(outcomes), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    begun = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*command, *map(str, paths)], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None and time.time() < until:
                time.sleep(0.5)
                read(tests, outcomes)
                results.save()  # also before the first outcome, which may take minutes: the supervisor sees work go on
        finally:
            in_time = process.poll() is not None
            if not in_time:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    read(tests, outcomes)
    tests["finished"] = process.returncode in (0, 1)
    if not tests["finished"]:
        tests["stopped"] = f"pytest ended with status {process.returncode}" if in_time else "the time was up"
    tests["seconds"] = time.monotonic() - begun
    if tests["failed"] or not tests["finished"]:
        tests["log_tail"] = log.read_text(encoding="utf-8", errors="replace")[-3000:]
    outcomes.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    results.save()
    if tests["failed"]:
        raise RuntimeError(f"{len(tests['failed'])} tests failed, the first: {tests['failed'][0]['test']}")


def read(tests: dict, outcomes: Path) -> None:
    """Take what is known by now into ``tests``."""
    if not outcomes.exists():
        return
    lines = outcomes.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    for outcome in ("passed", "skipped"):
        tests[outcome] = sum(row["outcome"] == outcome for row in rows)
    tests["failed"] = [row for row in rows if row["outcome"] == "failed"]


# --------------------------------------------------------------------------------------------------------------
# The plugin


_worker = False


def pytest_configure(config):
    global _worker
    _worker = hasattr(config, "workerinput")  # xdist's workers report to the process that started them, and end with it
    if not _worker:
        end_with_parent()


def pytest_runtest_logreport(report):
    if not _worker and (report.when == "call" or report.outcome != "passed"):
        _append(report, round(report.duration, 3))


def pytest_collectreport(report):
    """A file that could not be imported is a failure too."""
    if not _worker and report.outcome == "failed":
        _append(report, 0.0)


def _append(report, seconds: float) -> None:
    row = {"test": report.nodeid, "outcome": report.outcome, "seconds": seconds}
    if report.outcome == "failed":
        lines = str(report.longrepr).strip().splitlines()
        row["message"] = next((line[4:] for line in lines if line.startswith("E   ")), lines[-1] if lines else "")[:300]
        row["detail"] = "\n".join(lines[-25:])
    with open(os.environ["BERT_FAST_TEST_OUTCOMES"], "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    print(*(path.relative_to(ROOT) for path in files()))
