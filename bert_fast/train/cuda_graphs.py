"""CUDA graphs: functions recorded once and replayed with one call, so that the CPU stays out of a training step.

A micro-batch of BERT is about a thousand small launches. Over packed batches of fixed capacities nothing in it depends
on what a tensor holds, so it can be recorded; bert_fast/train/recorded.py says what is, this module how.

    memory      recorded functions share one pool. That is right in whatever order they are replayed, as long as
                nothing that one leaves in the pool is read by another: they take their inputs from, and leave their
                results in, tensors that were there before.
    dropout     the key of a forward comes from torch's generator. A replay begins by writing the generator's seed and
                offset into two tensors that the recorded kernels read, and ends by advancing the offset as eager
                kernels would have (torch's Note [CUDA Graph-safe RNG states], aten/src/ATen/cuda/CUDAGeneratorImpl.h;
                ``replay_prologue`` in CUDAGeneratorImpl.cpp, and pytorch/pytorch#84967 for the seed). So
                ``torch.manual_seed`` before a replay gives the keys that it gives before the eager function.
    tables      what a kernel reads and no caller holds belongs to what was recorded (bert_fast/graph_memory.py).
    failure     recording runs nothing, so one that fails changes no tensor; what it leaves open is ended here.

Source of the method: PyTorch's notes on CUDA graphs, "Whole-network capture" and "Graph memory management".
"""

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bert_fast import graph_memory


@dataclass(frozen=True)
class Recording:
    """A recorded function: a call replays it. It owns the ``tables`` that its launches read."""

    replay: Callable[[], None]
    tables: list[torch.Tensor]

    def __call__(self) -> None:
        self.replay()


class Recorder:
    """Records functions without arguments that train ``parameters``, all on one GPU.

    Recorded or not, a function finds its inputs in tensors that stay where they are, and may read no value of them.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]):
        self.parameters = list(parameters)
        self.device = self.parameters[0].device
        if self.device.type != "cuda":
            raise ValueError(f"the parameters are on {self.device}, and only a GPU has CUDA graphs")
        self._stream = torch.cuda.Stream(self.device)
        self._pool: Any = None  # a handle

    def warm(self, function: Callable[[], None]) -> None:
        """Runs ``function`` where it will be recorded, which makes what it keeps: kernels, workspaces, state."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            function()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def record(self, function: Callable[[], None]) -> Recording:
        """What runs ``function`` again as it is now: its launches, none of its Python. Now nothing is run.

        The parameters keep the gradients that they have. Whatever ``function`` raises is raised; everything is as it
        was then.
        """
        tables: list[torch.Tensor] = []
        with self._gradients_kept(), graph_memory.owned_by(tables):
            recording = Recording(self._recorded(function), tables)
        weakref.finalize(recording, self._wait).atexit = False  # it may go while a replay reads its tables
        return recording

    def forget(self) -> None:
        """Waits for what is being replayed, before what was recorded goes; then a pool of its own begins."""
        self._wait()
        self._pool = None

    def _wait(self) -> None:
        torch.cuda.synchronize(self.device)

    @contextlib.contextmanager
    def _gradients_kept(self) -> Iterator[None]:
        gradients = [p.grad for p in self.parameters]
        try:
            yield
        finally:
            for p, grad in zip(self.parameters, gradients, strict=True):
                p.grad = grad

    def _recorded(self, function: Callable[[], None]) -> Callable[[], None]:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(self.device)
        gc.collect()
        torch.cuda.empty_cache()  # while recording, the allocator takes nothing back
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            graph = torch.cuda.CUDAGraph()
            # relaxed: pinned memory may be allocated meanwhile (the optimiser's table of addresses, a loader's
            # thread); what would wait for the recorded stream is an error all the same
            graph.capture_begin(pool=self._pool, capture_error_mode="relaxed")
            try:
                function()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # says no more than that the recording is broken
                    graph.capture_end()
                self._end_what_failed()
                raise
            try:
                graph.capture_end()
            except BaseException:
                self._end_what_failed()
                raise
        return graph.replay

    def _end_what_failed(self) -> None:
        """Where a recording broke, ``capture_end`` raises half way in some versions of torch: the allocator goes on
        serving that recording, and the generator refuses to draw until one has ended well."""
        pool, self._pool = self._pool, None
        with contextlib.suppress(RuntimeError):  # "not currently recording": it was ended properly
            torch._C._cuda_endAllocateToPool(self.device.index, pool)
            torch._C._cuda_releasePool(self.device.index, pool)
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="relaxed")
        torch.zeros((), device=self.device)
        graph.capture_end()
