"""Times and memory: interleaved rounds, the machine's limits in the same run, peak memory in child processes."""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bert_fast.train.devices import has_matrix_unit


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(step: Callable[[], None], device: str) -> float:
    """How long one call takes, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def matmul_rate(device: str, dtype: torch.dtype, repeat: int = 5) -> float:
    """FLOP/s of the library's matrix product at the model's sizes (the best of several), on random data."""
    size = 8192 if device == "cuda" else 2048
    a, b = torch.randn(size, size, device=device).to(dtype), torch.randn(size, size, device=device).to(dtype)
    if device == "cpu" and not has_matrix_unit(torch.device(device), dtype):
        a, b = a[:512], b[:, :1024].contiguous()
    flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
    seconds(lambda: a @ b, device)
    return flops / min(seconds(lambda: a @ b, device) for _ in range(repeat))


def copy_rate(device: str, repeat: int = 5) -> float:
    """Bytes/s read and written by a large copy."""
    source = torch.empty((1 << 30) if device == "cuda" else (1 << 26), dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source), device) for _ in range(repeat))


def interleave(
    steps: dict[str, Callable[[], None]], rounds: int, device: str, tick: Callable[[str], None]
) -> dict[str, list[float]]:
    """Seconds of every step in every round: one of each, then again, so that drift of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
            tick(name)
    return times


def quantiles(times: list[float]) -> dict[str, float]:
    p20, p50, p80 = np.percentile(times, [20, 50, 80])
    return {"p20": float(p20), "p50": float(p50), "p80": float(p80)}


def paired_ratio(times: list[float], ours: list[float]) -> float:
    """The median over rounds of theirs / ours: above 1 where ours is faster."""
    return float(np.median(np.array(times) / np.array(ours)))


def peak_memory_mib(arguments: dict) -> float | None:
    """Peak memory of a step in MiB, above the model's and the batch's, in a child process of its own.

    ``arguments`` is what ``memory_of`` in run.py takes; None where the child fails (its error is printed). The child
    has as many threads as this process, and so finds what torch.compile made here, which depends on their number.
    """
    command = [sys.executable, str(Path(__file__).with_name("run.py")), "--memory-of", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"memory of {arguments['name']}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return float(done.stdout.strip().splitlines()[-1])


class PeakMemory:
    """Peak bytes above what was held on entry: the device's allocator, or the process's resident set."""

    def __init__(self, device: str):
        self.device = device

    def _now(self) -> int:
        if self.device == "cuda":
            return torch.cuda.memory_allocated()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    def __enter__(self):
        self.before = self._now()
        self.reset()
        return self

    def reset(self) -> None:
        """The peak counts from now on, still above what was held on entry."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            # the high-water mark of the resident set is set back to what is resident now
            Path("/proc/self/clear_refs").write_text("5")

    def __exit__(self, *_):
        if self.device == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:
            status = Path("/proc/self/status").read_text()
            peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
        self.mib = (peak - self.before) / 2**20
