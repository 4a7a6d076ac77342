"""Runs of pre-training in processes of their own."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
HELD = [str(ROOT / "tests" / "support" / "held_command.py")]


def run_script(what: str, given, path: Path, *arguments):
    path.write_text(json.dumps(given))
    script = ROOT / "tests" / "support" / "forked_runs.py"
    command = [sys.executable, str(script), what, str(path), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=3600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def of(config, suffix) -> object:
    return dataclasses.replace(config, out=f"{config.out}-{suffix}")
