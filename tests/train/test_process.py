"""A run as a process."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from bert_fast.train.process import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
for step in range(4):
    if step == 1:  # the first step's memory is new in any case
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    freed = [torch.ones(64 << 18) for _ in range(3)]  # 64 MiB each
    del freed
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> tuple[int, int]:
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True)
    kept, count = done.stdout.split()
    return int(kept), int(count)


def test_freed_memory_is_used_again():
    kept, count = faults("keep")
    if not kept:
        pytest.skip("the C library has no mallopt")
    assert count < 1000  # of 147456 pages of 4 KiB
    assert count < faults("leave")[1] / 10
