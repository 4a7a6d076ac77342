"""Runs in forked processes, which can be killed at any moment; the imports are paid once. A script:

python forked_runs.py kills CONFIG.json NUMBER SEED   the run of CONFIG, killed NUMBER times and started again
python forked_runs.py jobs JOBS.json                  runs one after another, each in several processes (gloo)

Prints JSON. CONFIG holds options of pretrain; the folders of its runs that were completed are OUT-0, OUT-1 ... and
OUT-whole, which was never killed. JOBS is a list of
[options, processes, processes a machine]; the exit codes are printed.
"""

import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from bert_fast.run import checkpoint
from bert_fast.run.config import PretrainConfig
from bert_fast.run.metrics import MetricsFile
from bert_fast.train.step import Step
from tests.support.rendezvous import meeting
from tests.support.training_runs import train


class Moments:
    """Counts what a run does; kills the process when it has done ``last`` things (None: never)."""

    def __init__(self, last: int | None):
        self.count, self.last = 0, last

    def __call__(self, *_):
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, holder, name: str) -> None:
        inner = getattr(holder, name)

        def counted(*args, **kwargs):
            self()
            return inner(*args, **kwargs)

        setattr(holder, name, counted)

    def watch_everything(self) -> None:
        """Updates, lines of metrics, every 4 KiB of a checkpoint's files, every flush, move and removal."""
        checkpoint.CHUNK = 1 << 12
        for holder, name in (
            (Step, "__call__"), (MetricsFile, "write"), (os, "fsync"), (os, "rename"), (os, "replace"),
            (shutil, "rmtree"), (Path, "unlink"),
        ):  # fmt: skip
            self.watch(holder, name)
        digest, moments = checkpoint._digest, self

        class Counted:
            def __init__(self):
                self.inner = digest()
                self.digest, self.hexdigest = self.inner.digest, self.inner.hexdigest
                self.digest_size, self.block_size, self.name = 16, 128, "blake2b"

            def update(self, chunk):
                moments()
                self.inner.update(chunk)

        checkpoint._digest = Counted


def start(config: PretrainConfig, *, last: int | None = None, count_to: Path | None = None, environment=()) -> int:
    """Forks a process that trains and returns its id; it exits with the run's code.

    ``last`` is what :class:`Moments` takes, and ``count_to`` where the count is written.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update(environment)
        moments = Moments(last)
        if last is not None or count_to is not None:
            moments.watch_everything()
        code = train(config)
        if count_to is not None:
            count_to.write_text(str(moments.count))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    """The exit code; that of a killed process is minus the signal's number."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kills(config: PretrainConfig, number: int, seed: int) -> dict:
    """Kills the run ``number`` times, in turn at a random thing it does and at a random time."""
    draw = random.Random(seed)
    counted = Path(config.out + "-count")
    began = time.monotonic()
    assert wait(start(dataclasses.replace(config, out=config.out + "-whole"), count_to=counted)) == 0
    seconds, things = time.monotonic() - began, int(counted.read_text())
    killed, completed, moments = 0, 0, []
    while killed < number:
        if killed % 2:
            moment = draw.uniform(0, 0.8 * seconds)
            child = start(config)
            time.sleep(moment)
            os.kill(child, signal.SIGKILL)
        else:
            moment = draw.randrange(1, things)
            child = start(config, last=moment)
        code = wait(child)
        moments.append([moment, code])
        if code == -signal.SIGKILL:
            killed += 1
        elif code == 0:  # it had less left to do: the next kill meets a new run
            os.rename(config.out, f"{config.out}-{completed}")
            completed += 1
        else:
            break
    code = wait(start(config))
    os.rename(config.out, f"{config.out}-{completed}")
    return {"killed": killed, "completed": completed + 1, "last": code, "things": things, "moments": moments}


def job(config: PretrainConfig, world: int, machine: int) -> list[int]:
    """The run in ``world`` processes, as if ``machine`` of them were on each machine; their exit codes."""
    with meeting(world) as shared:
        environment = shared | {"LOCAL_WORLD_SIZE": str(machine)}
        children = [
            start(config, environment=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(world)
        ]
        return [wait(child) for child in children]


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, path, *numbers = sys.argv[1:]
    given = json.loads(Path(path).read_text())
    out = sys.stdout
    sys.stdout = sys.stderr  # what runs print
    if what == "kills":
        found = kills(PretrainConfig(**given), *map(int, numbers))
    else:
        found = [job(PretrainConfig(**options), *processes) for options, *processes in given]
    print(json.dumps(found), file=out)
