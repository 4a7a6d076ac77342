"""Peak memory of a step, above the model's and the batch's: of a GPU its allocator's, on a CPU that of a process."""

import multiprocessing
import resource
import sys
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks.contenders import Setting, build
from benchmarks.results import reason
from benchmarks.workload import Batch, model_config, random_batch
from bert_fast.devices import peak_memory, reset_peak_memory


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
        reset_peak_memory(self.device)

    def __exit__(self, *_):
        self.mib = (peak_memory(self.device) - self.before) / 2**20


def in_a_process(name: str, padding: str, model: str, batch: Batch, setting: Setting, dropout: float) -> float | None:
    """Peak MiB of a contender's step in a child process; None where it fails, whose error is printed.

    The child has as many threads as this process, and so finds what torch.compile made here, which depends on their
    number. Its batch is random, in the shape of ``batch``.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        shape = (batch.lengths, batch.predicted, batch.seq)
        try:
            return pool.submit(child, name, padding, model, shape, setting, dropout).result()
        except Exception as error:  # also where the system ended it for want of memory
            print(f"memory of {name}: {reason(error)}", file=sys.stderr)
            return None


def child(name: str, padding: str, model: str, shape: tuple, setting: Setting, dropout: float) -> float:
    """What :func:`in_a_process` asks for, measured in this process."""
    config = model_config(model, dropout=dropout)
    built = build(name, config, setting, padding=padding)
    step = built.step(random_batch(*shape, setting.device, nsp=setting.nsp, vocabulary=config.vocab_size))
    with PeakMemory(setting.device) as peak:
        step()
    return peak.mib
