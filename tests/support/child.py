"""A Python of its own, with packages that it does not find."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Code that comes first there.
WITHOUT = """
import sys
from importlib.machinery import PathFinder
found = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *rest: None if name.partition(".")[0] in {missing} else found(name, *rest)
)
"""


def run(*command, check=True, cwd=ROOT, **environment):
    """A child process in the repository's root (or ``cwd``), Triton's interpreter off."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "BERT_FAST_BACKEND")} | environment
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done
