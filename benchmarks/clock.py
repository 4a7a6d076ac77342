"""The one clock: seconds of a step, of its kernels, or of a call with cold caches; rounds interleaved, their quantiles
and ratios."""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

CACHE_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # more than any last-level cache
GPU_CYCLES = 2e9  # a second, at the highest clock of any GPU so far or above it
MOST_WAITING = 0.03  # seconds; a first call compiles, and takes longer
STEPS_A_ROUND = 3  # on a GPU


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Seconds on ``device`` ("cpu" or "cuda"): the host's clock on a CPU, CUDA's events on a GPU."""

    def __init__(self, device: str):
        self.device = device
        self._launching = 0.0  # seconds of the host, of the last cold call
        self._scratch: torch.Tensor | None = None

    def step(self, run: Callable[[], object]) -> float:
        """Seconds of one step as training has it.

        On a GPU the mean of STEPS_A_ROUND steps behind one that is not timed: the host launches ahead of the device,
        which has its next step when it is done with one.
        """
        if self.device != "cuda":
            begun = time.perf_counter()
            run()
            return time.perf_counter() - begun
        run()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(STEPS_A_ROUND):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / STEPS_A_ROUND

    def empty_caches(self) -> None:
        """Reads more than they hold: what is written would be evicted later, while a call is timed."""
        if self._scratch is None:
            self._scratch = torch.zeros(CACHE_BYTES[self.device] // 4, device=self.device)
        self._scratch.max()

    def call(self, call: Callable[[], object]) -> float:
        """Seconds of one call with cold caches.

        A GPU is kept busy before the call for as long as the host took to launch the last one: what an optimiser needs
        on the host for hundreds of parameters is no time of its kernels.
        """
        self.empty_caches()
        if self.device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(int(GPU_CYCLES * min(1.5 * self._launching, MOST_WAITING)))
            start.record()
            begun = time.perf_counter()
            call()
            self._launching = time.perf_counter() - begun
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1e3
        begun = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - begun
        del result  # kept until here: giving its memory back is not the operator's time
        return elapsed

    def calls(self, call: Callable[[], object], repeat: int) -> list[float]:
        """Seconds of ``repeat`` cold calls, after two that compile and find their memory."""
        for _ in range(min(2, repeat)):
            self.call(call)
        return [self.call(call) for _ in range(repeat)]


def interleave(
    steps: dict[str, Callable[[], object]], rounds: int, seconds: Callable[[Callable[[], object]], float],
    tick: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:  # fmt: skip
    """``seconds`` of every step in every round: one of each, then again, so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step))
            tick(name)
    return times


def quantiles(times: list[float]) -> dict[str, float]:
    p20, p50, p80 = np.percentile(times, [20, 50, 80])
    return {"p20": float(p20), "p50": float(p50), "p80": float(p80)}


def paired_ratio(times: list[float], ours: list[float]) -> float:
    """The median over rounds of theirs / ours: above 1 where ours is faster."""
    return float(np.median(np.array(times) / np.array(ours)))


def kernels_of(run: Callable[[], object], device: str, steps: int = 5) -> list[dict]:
    """The kernels and copies of a step by name, those that take longest in all first: "kernel", "calls" and "us" of a
    step. Of a CPU, which has none, PyTorch's operators, each without those that it calls."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            run()
        synchronize(device)
    lines: dict[str, dict] = {}
    for event in profiler.events():
        if device == "cuda" and (event.device_type != DeviceType.CUDA or event.is_user_annotation):
            continue
        line = lines.setdefault(event.name, {"kernel": event.name, "calls": 0, "us": 0.0})
        line["calls"] += 1
        line["us"] += event.time_range.elapsed_us() if device == "cuda" else event.self_cpu_time_total
    found = [{"kernel": x["kernel"], "calls": x["calls"] / steps, "us": x["us"] / steps} for x in lines.values()]
    return sorted(found, key=lambda line: -line["us"])
