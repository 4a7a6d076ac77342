"""A decision from end to end: compiled in a pool of processes, tried in one, kept."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from bert_fast.supervised import Silent, Worker
from bert_fast.tuning import store
from bert_fast.tuning.candidates import Sizes, questions
from bert_fast.tuning.rule import DEFAULT_WRONG, Choices, Decision, Lost, Question, Times, decide

TRIALS, COMPILED = "bert_fast.tuning.trials:answer", "bert_fast.tuning.trials:compiled"
# The other ranks wait meanwhile, ten minutes at most by NCCL's default: all limits together are less.
SECONDS = 180.0  # for all of a phase's questions
LIMIT = 45.0  # of one candidate, from its compilation to its last replay
START = 90.0  # of a process that tries: imports, the device's context
PROCESSES = 8


def key_of(sizes: Sizes, device: torch.device) -> dict:
    """What a decision for ``sizes`` on ``device`` holds for. Lengths count by their eighths: the share of each in
    sixteenths of the longest, so that another draw of the same data is the same key."""
    ordered = sorted(sizes.lengths)
    eighths = [ordered[len(ordered) * number // 8] for number in range(8)]
    shape = sizes.as_dict() | {"lengths": [round(16 * length / sizes.longest) for length in eighths]}
    shape |= {"tokens": _rounded(sizes.tokens), "masked": _rounded(sizes.masked)}
    return {"machine": store.machine(device), "sizes": shape}


def _rounded(count: int) -> int:
    """To a power of two's quarters: 14,720 tokens and 15,104 are one."""
    quarter = max(1, 1 << max(0, count.bit_length() - 3))
    return -(-count // quarter) * quarter


class Tried:
    """Compares candidates in a process of its own. One that hangs, or takes the process with it, is out."""

    def __init__(self, worker: Worker, sizes: Sizes, device: str, limit: float = LIMIT):
        self.worker, self.limit = worker, limit
        self.about = {"sizes": sizes.as_dict(), "device": device}

    def __call__(self, subject: str, incumbent: Choices, challenger: Choices) -> Times:
        message = {"subject": subject, "incumbent": incumbent, "challenger": challenger} | self.about
        try:
            found = self.worker.ask(message, self.limit)
        except Silent as error:
            raise Lost("hung", str(error)) from error
        for how in ("wrong", "failed", DEFAULT_WRONG):
            if how in found:
                raise Lost(how, found[how])
        first, second = ((list(a), list(b)) for a, b in found["times"])
        return Times(first, second, {name: store._table(default) for name, default in found["replaced"].items()})


def compile_all(asked: Sequence[Question], sizes: Sizes, device: str, processes: int) -> None:
    """Has Triton compile all candidates, each process a share, so that trying them finds them in its cache."""
    wanted = [[question.subject, candidate] for question in asked for candidate in question.candidates]

    def compile_share(number: int) -> None:
        message = {"sizes": sizes.as_dict(), "device": device, "challengers": wanted[number::processes]}
        with Worker(COMPILED, start=START) as worker:
            try:
                worker.ask(message, SECONDS / 2)
            except Silent:
                return  # what it has not compiled, trying compiles

    if processes > 1:
        with ThreadPoolExecutor(processes) as pool:
            list(pool.map(compile_share, range(processes)))


def processes() -> int:
    """How many compile at once."""
    return min(PROCESSES, (os.cpu_count() or 1) // 2)


def decide_now(
    sizes: Sizes, device: torch.device, tell: Callable[[dict], None] = lambda row: None, *,
    asked: Sequence[Question] | None = None, seconds: float = SECONDS,
) -> Decision:  # fmt: skip
    """Tries all candidates for ``sizes`` on ``device``, and keeps the decision where other runs find it."""
    key = key_of(sizes, device)
    wanted = questions(sizes, key["machine"]["capability"]) if asked is None else asked
    compile_all(wanted, sizes, device.type, processes())
    with Worker(TRIALS, start=START) as worker:
        found = decide(wanted, Tried(worker, sizes, device.type), seconds=seconds, tell=tell)
    if asked is None:
        store.write(key, found.chosen, found.rows)
    return found
