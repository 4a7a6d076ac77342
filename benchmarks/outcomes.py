"""A pytest plugin that appends every test's outcome to a file at once, so that a run that is cut off loses nothing, and
that ends with the process that started it: tests that go on would disturb what is timed next.

Loaded with ``-p benchmarks.outcomes``; the file is named by BERT_FAST_TEST_OUTCOMES, one JSON object a line.
"""

import ctypes
import json
import os
import signal
import sys

_worker = False


def pytest_configure(config):
    global _worker
    _worker = hasattr(config, "workerinput")  # xdist's workers report to the process that started them, and end with it
    if not _worker and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


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
