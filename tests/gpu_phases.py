"""What the tests of `make gpu` share: its scripts, results that are begun, and phases of it on a CPU.

The fixture ``benchmark_scripts`` (conftest.py) makes the scripts importable.
"""

import importlib
import time
from pathlib import Path
from types import SimpleNamespace


def script(name: str):
    return importlib.import_module(name)


def new_results(path: Path, **data):
    return script("gpu_results").Results(path, {"date": "2026-01-01", "commit": "abc", "phases": [], **data})


def smoke_phase(phase: int, results, seconds: float = 120.0):
    options = SimpleNamespace(device="cpu", smoke=True, until=time.time() + seconds)
    script("gpu").run_phase(phase, results, options)
    return results.data
