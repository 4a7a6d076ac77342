"""How fast a run trains, and how long it waits for its data."""

import time
from contextlib import contextmanager


class Meter:
    """Time of training (without validation and checkpoints), tokens, FLOPs, and the time spent waiting for data."""

    def __init__(self):
        self.began = self.lap_began = time.perf_counter()
        self.waited = self.off = self.lap_off = 0.0
        self.tokens = self.flops = 0
        self.lasted: dict[str, float] = {}  # seconds of the last validation, and so on

    def timed(self, iterator):
        """``iterator``, with the time that it takes counted as waiting; the first item, which starts workers, not."""
        iterator = iter(iterator)
        first = True
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            waited = time.perf_counter() - start
            if first:
                self.off, self.lap_off, first = self.off + waited, self.lap_off + waited, False
            else:
                self.waited += waited
            yield item

    @contextmanager
    def paused(self, what: str):
        """Time meanwhile does not count; ``lasted`` has it under ``what``."""
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        self.off, self.lap_off = self.off + spent, self.lap_off + spent
        self.lasted[what] = spent

    def count(self, tokens: int, flops: int) -> None:
        self.tokens, self.flops = self.tokens + tokens, self.flops + flops

    def lap(self) -> tuple[int, int, float]:
        """Tokens, FLOPs and seconds since the last lap."""
        now = time.perf_counter()
        found = self.tokens, self.flops, max(now - self.lap_began - self.lap_off, 1e-9)
        self.tokens = self.flops = 0
        self.lap_began, self.lap_off = now, 0.0
        return found

    @property
    def share_waiting(self) -> float:
        """Share of the training time that was spent waiting for data."""
        return self.waited / max(time.perf_counter() - self.began - self.off, 1e-9)
