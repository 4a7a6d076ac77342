"""What the benchmarks change in their process, put back."""

import os

import pytest


@pytest.fixture(autouse=True)
def _interpreter_kept(monkeypatch):
    """A run switches it off in its process, and tests that follow need it."""
    if "TRITON_INTERPRET" in os.environ:
        monkeypatch.setenv("TRITON_INTERPRET", os.environ["TRITON_INTERPRET"])
