"""Peak memory of a step, above the model's and the batch's: of a GPU its allocator's, on a CPU that of a process."""

import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.contenders import Setting, build
from benchmarks.workload import Batch, model_config, random_batch

ROOT = Path(__file__).resolve().parent.parent


class PeakMemory:
    """Peak MiB above what was held on entry, in a ``with`` block: in ``mib`` at its end."""

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


def in_a_process(name: str, padding: str, model: str, batch: Batch, setting: Setting, dropout: float) -> float | None:
    """Peak MiB of a contender's step in a child process; None where it fails, whose error is printed.

    The child has as many threads as this process, and so finds what torch.compile made here, which depends on their
    number. Its batch is random, in the shape of ``batch``.
    """
    asked = {
        "name": name, "padding": padding, "model": model, "lengths": batch.lengths, "predicted": batch.predicted,
        "seq": batch.seq, "dropout": dropout, **asdict(setting), "dtype": str(setting.dtype).removeprefix("torch."),
    }  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        print(f"memory of {name}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return float(done.stdout.strip().splitlines()[-1])


def child(asked: dict) -> float:
    """What :func:`in_a_process` asks for, measured in this process."""
    setting = Setting(asked["device"], getattr(torch, asked["dtype"]), asked["train"], asked["nsp"], asked["optimizer"])
    config = model_config(asked["model"], dropout=asked["dropout"])
    built = build(asked["name"], config, setting, padding=asked["padding"])
    batch = random_batch(
        asked["lengths"], asked["predicted"], asked["seq"], setting.device, nsp=setting.nsp,
        vocabulary=config.vocab_size,
    )  # fmt: skip
    step = built.step(batch)
    with PeakMemory(setting.device) as peak:
        step()
    return peak.mib


if __name__ == "__main__":
    print(child(json.loads(sys.argv[1])))
