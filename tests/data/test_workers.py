"""Worker processes: how far they read ahead, what an error and a death tell, and that they end with their caller."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from bert_fast.data.workers import in_processes

ROOT = Path(__file__).resolve().parents[2]


def begin(word):
    os.environ["BEGUN"] = word


def square(number):
    return os.environ["BEGUN"], number * number, os.getpid()


def invert(number):
    return 1 / number


def die(number):
    os.kill(os.getpid(), number)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_task_once_and_no_further_ahead_than_there_are_processes():
    taken, ahead, found = [], [], []

    def tasks():
        for number in range(30):
            taken.append(number)
            yield (number,)

    for result in in_processes(2, begin, ("yes",), square, tasks()):
        found.append(result)
        ahead.append(len(taken) - len(found))
    assert {word for word, _, _ in found} == {"yes"}
    assert sorted(square for _, square, _ in found) == [n * n for n in range(30)]
    assert max(ahead) <= 4  # two at work, one waiting, one being read
    assert len({pid for _, _, pid in found}) <= 2
    assert not any(alive(pid) for _, _, pid in found)


def test_an_early_end_and_an_error_leave_no_process():
    with closing(in_processes(2, begin, ("yes",), square, ((n,) for n in range(9)))) as results:
        _, _, pid = next(results)
        assert alive(pid)
    assert not alive(pid)
    with pytest.raises(ZeroDivisionError, match="division by zero") as failure:
        list(in_processes(1, begin, ("yes",), invert, [(1,), (0,), (1,)]))
    assert "in invert" in failure.value.__notes__[0]


def test_a_process_that_dies_is_an_error_that_says_how():
    with pytest.raises(ChildProcessError, match="killed by SIGKILL; for lack of memory"):
        list(in_processes(2, begin, ("yes",), die, [(signal.SIGKILL,)]))


def test_processes_end_when_their_caller_is_killed(tmp_path):
    script = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from tests.data.test_workers import begin, square
from bert_fast.data.workers import in_processes
def tasks():
    yield (1,)
    yield (2,)
    time.sleep(60)
if __name__ == "__main__":
    for _, _, pid in in_processes(1, begin, ("yes",), square, tasks()):
        print(pid, flush=True)
"""
    (tmp_path / "script.py").write_text(script)
    with subprocess.Popen([sys.executable, tmp_path / "script.py"], stdout=subprocess.PIPE, text=True) as caller:
        pid = int(caller.stdout.readline())
        assert alive(pid)
        caller.kill()
    until = time.monotonic() + 30
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.01)
    assert not alive(pid)
