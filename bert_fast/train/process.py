"""A run as a process: asked to stop by signals, alone in its folder, keeping the memory that its steps free."""

import ctypes
import fcntl
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bert_fast.train.distributed import Ranks


class FolderInUse(ValueError):
    """Another process trains in the same folder."""


class Stop:
    """Which signal asked the run to stop, or None."""

    signal: int | None = None


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """SIGINT and SIGTERM ask to stop after the update at hand; a second one takes its usual way."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals belong to the main thread
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number, frame):
        stop.signal = number
        for which, handler in before.items():
            signal.signal(which, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def locked(run: Path, ranks: Ranks) -> Iterator[None]:
    """One run at a time in a folder. The lock belongs to the process: it goes when the process does."""
    if not ranks.first:
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("wb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderInUse(f"another process trains in {run}: wait for it, or choose another --out") from error
        yield


def keep_freed_memory() -> bool:
    """Has the C library keep the process's freed memory for the next step; False where it cannot be asked (not glibc).

    Gradients and activations are freed in every step, a CPU's from glibc's heap, which gives large blocks back to the
    kernel: the next step gets them zeroed again, page by page. docs/performance.md has what that costs. It holds for
    the rest of the process; memory in use at the same time does not grow by it.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    most = 2**31 - 1
    kept = mallopt(mmap_threshold, most) or mallopt(mmap_threshold, 32 << 20)  # glibc before 2.35 takes no more
    return bool(kept and mallopt(trim_threshold, most))
