"""A process of its own for what may hang, die or lose the device: it is asked with a limit, and ended past it.

    python -m bert_fast.supervised MODULE:FUNCTION READ WRITE

answers each line of JSON on the file descriptor READ by a line on WRITE: what FUNCTION gives for it. A process that
imports the caller's main module again, as multiprocessing's do, would run a script that has no guard.
"""

import ctypes
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch


class Silent(RuntimeError):
    """The process died, or was ended since it gave no answer in time; the message says which."""


class DeviceLost(RuntimeError):
    """The device answers with an error to everything: the process has to end, another can go on."""


def raise_if_device_lost() -> None:
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(str(error)) from error


def end_with_parent() -> None:
    """No process outlives the one that started it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Worker:
    """``function`` ("module:name") in a process of its own, started when it is first asked, and again after it ended.

    :meth:`ask` sends a JSON object and returns the answer, an object. Raises Silent where none came within ``limit``
    seconds; a start (imports, a device's context) may take ``start`` seconds more.
    """

    def __init__(self, function: str, *, start: float = 120.0, environment: dict[str, str] | None = None):
        self.function, self.start = function, start
        self.environment = dict(os.environ if environment is None else environment)
        root = str(Path(__file__).resolve().parent.parent)
        self.environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [self.environment.get("PYTHONPATH")])])
        self._process: subprocess.Popen | None = None
        self._to = self._from = -1
        self._rest = b""

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.end()

    def ask(self, message: dict, limit: float) -> dict:
        begun = self._process is None
        if begun:
            self._begin()
        try:
            os.write(self._to, json.dumps(message).encode() + b"\n")
            return json.loads(self._line(time.monotonic() + limit + self.start * begun))
        except (Silent, OSError) as error:
            assert self._process is not None
            code = self._process.poll()
            self.end()
            if isinstance(error, Silent) and code is None:
                raise
            raise Silent(f"its process ended with status {code}") from error

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            os.close(self._to)
            os.close(self._from)
            self._process = None

    def _begin(self) -> None:
        theirs, self._to = os.pipe()
        self._from, back = os.pipe()
        self._rest = b""
        command = [sys.executable, "-m", "bert_fast.supervised", self.function, str(theirs), str(back)]
        self._process = subprocess.Popen(
            command, pass_fds=(theirs, back), env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,  # a Ctrl-C is for its parent, which ends it
        )  # fmt: skip
        os.close(theirs)
        os.close(back)

    def _line(self, until: float) -> bytes:
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise Silent("it gave no answer in time, and its process was ended")
            read = os.read(self._from, 1 << 16)
            if not read:
                assert self._process is not None
                self._process.wait()
                raise Silent("its process ended")
            self._rest += read
        line, _, self._rest = self._rest.partition(b"\n")
        return line


def main(function: str, read: str, write: str) -> None:
    end_with_parent()
    module, _, name = function.partition(":")
    answer = getattr(importlib.import_module(module), name)
    with open(int(read), encoding="utf-8") as asked, open(int(write), "w", encoding="utf-8") as answers:
        for line in asked:
            print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
