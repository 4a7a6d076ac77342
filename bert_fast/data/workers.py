"""Worker processes that end with their caller, whatever ends it, and leave no traceback behind."""

import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import connection, get_context, resource_tracker
from multiprocessing.process import BaseProcess
from typing import cast

SIGNALS = {signal.SIGINT, signal.SIGTERM}


def in_processes(
    number: int, start: Callable, arguments: tuple, function: Callable, tasks: Iterable[tuple]
) -> Generator:
    """Results of ``function(*task)``, as they are ready, by up to ``number`` processes that call ``start(*arguments)``.

    ``tasks`` is read no further than there are processes to take what is read, so that it may be larger than memory.
    An error in a process is raised here. However the iteration ends (close it if you end it early), the processes are
    killed, whatever they are doing; and should the caller itself be killed, they end after the task at hand.
    Raises ChildProcessError where a process dies.
    """
    context = get_context("spawn")
    members: dict[connection.Connection, BaseProcess] = {}
    idle: list[connection.Connection] = []
    waiting: deque[tuple] = deque()
    starting = at_work = 0

    def hear() -> Iterator:
        """Waits for what processes have to say, and yields results."""
        nonlocal starting, at_work
        ready = connection.wait([end for end in members if end not in idle])
        for end in cast(list[connection.Connection], ready):
            what, value = _received(end, members[end])
            idle.append(end)
            if what == "started":
                starting -= 1
                continue
            at_work -= 1
            if what == "failed":
                raise value
            yield value

    def hand_out() -> None:
        nonlocal at_work
        while waiting and idle:
            at_work += 1
            end = idle.pop()
            try:
                end.send(waiting.popleft())
            except BrokenPipeError:
                raise _death(members[end]) from None

    try:
        for task in tasks:
            waiting.append(task)
            hand_out()
            if waiting and len(members) < number:
                with _children_begin_with_signals_blocked():
                    end, other = context.Pipe()
                    of_worker = (other, start, arguments, function)
                    process: BaseProcess = context.Process(target=_serve, args=of_worker, daemon=True)
                    process.start()
                    members[end] = process
                    other.close()  # so that reading from `end` fails when the process dies
                starting += 1
            while len(waiting) > starting:
                yield from hear()
                hand_out()
        while waiting or at_work:
            yield from hear()
            hand_out()
    finally:
        for process in members.values():
            process.kill()  # files are written aside and renamed: there is nothing to take leave of
        for end, process in members.items():
            end.close()
            process.join()


def _received(end: connection.Connection, process: BaseProcess) -> tuple:
    try:
        return end.recv()
    except (EOFError, ConnectionResetError):
        raise _death(process) from None


def _death(process: BaseProcess) -> ChildProcessError:
    process.join()
    code = process.exitcode
    assert code is not None  # it has been waited for
    how = f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
    memory = "; for lack of memory? Fewer workers need less" if code == -signal.SIGKILL else ""
    return ChildProcessError(f"a worker process {how}{memory}: what is made is kept, the same call goes on from there")


@contextmanager
def _children_begin_with_signals_blocked() -> Iterator[None]:
    """Ctrl-C reaches the whole process group: one that is still importing would print a traceback.

    Blocked signals are inherited; :func:`_serve` unblocks them when it is ready for them.
    """
    resource_tracker.ensure_running()  # multiprocessing starts it with the first process, and unblocks both
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(end: connection.Connection, start: Callable, arguments: tuple, function: Callable) -> None:
    """The life of a process: starts, then does a task at a time until its caller has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller's to handle
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        start(*arguments)
        end.send(("started", None))
        while True:
            task = end.recv()
            try:
                said = ("done", function(*task))
            except Exception as error:
                error.add_note(f"in a worker process (pid {os.getpid()}):\n{traceback.format_exc()}")
                said = ("failed", error)
            end.send(said)
    except (EOFError, ConnectionResetError, BrokenPipeError):
        return  # the caller has gone
