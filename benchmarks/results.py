"""The results of a run: one schema in one JSON file, whole and valid after every row.

schema       2
kind         "run" (run.py) or "gpu" (gpu.py); smoke: whether it was a trial whose figures mean nothing
device, date, started, commit, command, environment (bert_fast/env.py), limits (limits.py)
work         of run.py: what was asked for
parity       {"passed", "compared", "failed", "worst": the rows nearest to their bound}; of gpu.py a list of such
steps        a row for each contender of each table (steps.py)
operators    a row for each operator, direction, size and contender (operators.py)
products, profiles, curves, tune, choices, tests, cases   of gpu.py
"""

import datetime
import itertools
import json
import math
import os
import re
import subprocess
from pathlib import Path

import torch

from bert_fast.env import environment

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results"
SCHEMA = 2


class Results:
    """``data`` in the file ``path``, rewritten at once and in one piece by :meth:`save`; in none where that is None."""

    def __init__(self, path: Path | None, data: dict | None = None):
        self.path = path and Path(path)
        self.data = json.loads(self.path.read_text(encoding="utf-8")) if data is None else data
        if data is not None:
            self.save()

    def save(self) -> None:
        """Write the file in one piece: a reader has the old or the new one, also after a kill."""
        if self.path is None:
            return
        part = self.path.with_name(self.path.name + ".part")
        with part.open("w", encoding="utf-8") as file:
            json.dump(plain(self.data), file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path)

    def reload(self) -> None:
        self.data = json.loads(self.path.read_text(encoding="utf-8"))

    def put(self, name: str, value) -> None:
        self.data[name] = value
        self.save()

    def add(self, table: str, *rows: dict) -> None:
        self.data.setdefault(table, []).extend(rows)
        self.save()


def plain(value):
    """``value`` with None for numbers that JSON does not have (NaN, infinities)."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def commit() -> str:
    """The short hash of the checkout, with + where tracked files have changed since; unknown without git or history."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        found = git("rev-parse", "--short=7", "HEAD") or "unknown"
        return found + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except FileNotFoundError:  # no git on this machine
        return "unknown"


def begun(kind: str, device: str, command: list[str], *, smoke: bool = False, version: str | None = None) -> dict:
    """What every results file begins with; ``device`` is "cpu" or "cuda", ``version`` the commit where git is not."""
    now, facts = datetime.datetime.now(datetime.UTC), environment()
    name = torch.cuda.get_device_name(0) if device == "cuda" else f"cpu {facts['machine']['processor']}"
    return {
        "schema": SCHEMA, "kind": kind, "device": "smoke" if smoke else name, "smoke": smoke,
        "date": now.date().isoformat(), "started": now.isoformat(timespec="seconds"), "commit": version or commit(),
        "command": command, "environment": facts,
    }  # fmt: skip


def new_path(data: dict, suffix: str = "", folder: Path | None = None) -> Path:
    """A file that is not there yet, in a folder named after the device unless ``folder`` names one."""
    slug = re.sub(r"[^a-z0-9]+", "-", data["device"].lower()).strip("-")
    folder = folder or FOLDER / slug
    folder.mkdir(parents=True, exist_ok=True)
    version = data["commit"].replace("+", "-dirty")
    stem = "-".join(filter(None, (data["date"], version, suffix)))
    paths = (folder / f"{stem}{'' if number == 1 else f'-{number}'}.json" for number in itertools.count(1))
    return next(path for path in paths if not path.exists())


def reason(error: BaseException) -> str:
    """The type and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
