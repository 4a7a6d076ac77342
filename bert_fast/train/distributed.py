"""The processes of a run: which one this is, and the few messages between them.

Started by ``torchrun``, which sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; without it a run is one process.
Gradients are averaged by DistributedDataParallel, overlapped with the backward (bert_fast/train/step.py). The
optimiser's state is sharded by ZeroRedundancyOptimizer over the processes of a machine, and every machine has all of
it (bert_fast/run/optimizer.py). docs/guide/scale.md says why, and what the links must carry.
"""

import os
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run: number ``rank`` of ``world``, on ``device``.

    ``machine`` are the processes that share the optimiser's state with this one, ``shards`` how many they are (None
    and ``world`` where all do). Every machine has the same number of processes, in the order of ranks.
    """

    rank: int
    world: int
    device: torch.device
    shards: int = 1
    machine: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` summed over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def greatest(self, values: torch.Tensor) -> torch.Tensor:
        """The elementwise maximum of ``values`` over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def gather(self, data: bytes) -> list[bytes]:
        """``data`` of every process, of equal length, in the order of ranks."""
        if self.world == 1:
            return [data]
        own = torch.tensor(list(data), dtype=torch.uint8, device=self.device)
        parts = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(parts, own)
        return [bytes(part.tolist()) for part in parts]

    def broadcast(self, text: str) -> str:
        """``text`` of the first process, on every one."""
        if self.world == 1:
            return text
        data = text.encode() if self.first else b""
        size = torch.tensor([len(data)], device=self.device)
        dist.broadcast(size, 0)
        own = torch.tensor(list(data) if self.first else [0] * int(size), dtype=torch.uint8, device=self.device)
        dist.broadcast(own, 0)
        return bytes(own.tolist()).decode()

    def wait(self) -> None:
        """Returns when every process is here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def started(device: str = "auto"):
    """The :class:`Ranks` of this process; under torchrun the process group is open meanwhile."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this machine has no GPU: {torch.cuda.device_count()} are visible")
        torch.cuda.set_device(local)
    where = torch.device("cuda", local) if device == "cuda" else torch.device("cpu")
    if world == 1:
        yield Ranks(0, 1, where)
        return
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        shards, machine = int(os.environ.get("LOCAL_WORLD_SIZE", world)), None
        if shards < world and world % shards == 0:
            machine, _ = dist.new_subgroups(shards)
        else:  # one machine, or machines that are not alike
            shards = world
        yield Ranks(dist.get_rank(), world, where, shards, machine)
    finally:
        dist.destroy_process_group()
