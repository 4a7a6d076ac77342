"""A run as a process: asked to stop by signals, alone in its folder."""

import fcntl
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bert_fast.data.files import FolderInUse
from bert_fast.train.distributed import Ranks

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stop:
    """Which signal asked the run to stop, or None."""

    signal: int | None = None


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """SIGINT, SIGTERM and SIGUSR1 (which schedulers send some time before the end) ask to stop after the update at
    hand; a second one takes its usual way."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals belong to the main thread
        return
    before = {number: signal.getsignal(number) for number in STOPPING}

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
