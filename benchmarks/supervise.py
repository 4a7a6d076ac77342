"""Cases in a process of their own, in the order of what is to be known first: a hang or a lost device costs one.

A worker runs the cases of a list one after the other and writes down each before it begins. Where it dies, or writes
nothing for longer than its case should take, the supervisor ends it and another goes on behind that case. A case whose
price is more than the time that is left is left out, a cheaper one behind it may still run.
"""

import contextlib
import gc
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.results import Results, reason
from bert_fast.supervised import DeviceLost, end_with_parent, raise_if_device_lost

CONTINUE = 75  # exit status of a worker whose device was lost
GRACE_SECONDS = 10
LEAST_PATIENCE = 120  # seconds without a word; a worker's first imports and compilations are among them


@dataclass(frozen=True)
class Case:
    """``run(results)`` fills tables of the results; ``seconds`` is its price on a GPU, compilation included."""

    name: str
    seconds: float
    run: Callable[[Results], None]


def work(cases: Sequence[Case], results: Results, until: float) -> int:
    """Run what no worker before has begun; the exit status of this one. ``until`` is in seconds of time.time."""
    end_with_parent()
    known = {row["case"] for row in results.data.setdefault("cases", [])}
    for case in (case for case in cases if case.name not in known):
        row = {"case": case.name, "price": case.seconds, "state": "begun"}
        if time.time() + case.seconds > until:
            results.add("cases", row | {"state": "left out"})
            continue
        results.add("cases", row)
        begun = time.monotonic()
        try:
            case.run(results)
            row["state"] = "done"
        except Exception as error:
            # One case may fail for reasons of its own (out of memory, a peer's bug); its row says so, the others run.
            row |= {"state": "failed", "error": reason(error), "traceback": traceback.format_exc(limit=-6)}
        row["seconds"] = time.monotonic() - begun
        results.save()
        print(f"   {case.name}: {row.get('error', row['state'])} ({row['seconds']:.1f} s)", flush=True)
        gc.collect()
        torch.compiler.reset()
        try:
            raise_if_device_lost()
        except DeviceLost as error:
            row |= {"state": "lost", "error": f"the device was lost: {reason(error)}"}
            results.save()
            return CONTINUE
    return 0


def supervise(
    command: list[str], environment: dict[str, str], results: Results, until: float, patience: float = LEAST_PATIENCE
) -> None:
    """Start workers (``command``) until one has come to the end of the cases, or the time is up."""
    while True:
        before = len(results.data.get("cases", []))
        process = subprocess.Popen(command, env=environment)
        try:
            ended = watch(process, results, until, patience)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        results.reload()
        cases = results.data.setdefault("cases", [])
        for row in cases:
            if row["state"] == "begun":
                row |= {"state": "lost", "error": ended or f"its process ended with status {process.returncode}"}
        if process.returncode not in (0, CONTINUE) and len(cases) == before:
            cases.append({"case": "a worker's start", "price": 0, "state": "failed",
                          "error": f"it ended with status {process.returncode} before its first case"})  # fmt: skip
            results.save()
            return
        results.save()
        if process.returncode == 0 or time.time() > until:
            return


def watch(process: subprocess.Popen, results: Results, until: float, patience: float) -> str | None:
    """Why the worker was ended; None where it ended by itself."""
    seen = time.time()
    while time.time() < until + GRACE_SECONDS:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
            return None
        results.reload()
        seen = max(seen, results.path.stat().st_mtime)
        cases = results.data.get("cases") or [{"price": 0}]
        if time.time() - seen > max(patience, 2 * cases[-1]["price"]):
            process.kill()
            process.wait()
            return "it wrote nothing for too long, and was ended"
    return "the time was up"
