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
    """Compares candidates in a process of its own. One that hangs, or takes the process with it, is out.

    ``judged`` has of those whose machine code was judged why it is not sound, or None, by :func:`named`.
    """

    def __init__(
        self, worker: Worker, sizes: Sizes, device: str, judged: dict[str, str | None] | None = None,
        limit: float = LIMIT,
    ):  # fmt: skip
        self.worker, self.limit, self.judged = worker, limit, judged or {}
        self.about = {"sizes": sizes.as_dict(), "device": device}

    def __call__(self, subject: str, incumbent: Choices, challenger: Choices) -> Times:
        parts, whole = [named(subject, {name: table}) for name, table in challenger.items()], named(subject, challenger)
        if why := next(filter(None, map(self.judged.get, [*parts, whole])), None):
            raise Lost("wrong", why)
        message = {"subject": subject, "incumbent": incumbent, "challenger": challenger} | self.about
        message["sound"] = whole in self.judged or all(part in self.judged for part in parts)
        try:
            found = self.worker.ask(message, self.limit)
        except Silent as error:
            raise Lost("hung", str(error)) from error
        for how in ("wrong", "failed", DEFAULT_WRONG):
            if how in found:
                raise Lost(how, found[how])
        first, second = ((list(a), list(b)) for a, b in found["times"])
        return Times(first, second, {name: store.table(default) for name, default in found["replaced"].items()})


def named(subject: str, choices: Choices) -> str:
    """A candidate's name among all that are judged."""
    return f"{subject} {sorted(choices.items())}"


def compile_all(asked: Sequence[Question], sizes: Sizes, device: str, processes: int) -> dict[str, str | None]:
    """Has Triton compile all candidates, each process a share, so that trying them finds them in its cache. Gives of
    each, by :func:`named`, why its machine code is not sound, or None; of some nothing is known."""
    wanted = [(question.subject, candidate) for question in asked for candidate in question.candidates]

    def compile_share(number: int) -> dict[str, str | None]:
        share = wanted[number::processes]
        message = {"sizes": sizes.as_dict(), "device": device, "challengers": share}
        with Worker(COMPILED, start=START) as worker:
            try:
                unsound = worker.ask(message, SECONDS / 2)["unsound"]
            except Silent:  # what it has not compiled, trying compiles
                return {}
        found = {named(*candidate): why for candidate, why in zip(share, unsound, strict=True)}
        return {name: why for name, why in found.items() if why is not False}

    if processes < 2:
        return {}
    with ThreadPoolExecutor(processes) as pool:
        return {name: why for share in pool.map(compile_share, range(processes)) for name, why in share.items()}


def processes() -> int:
    """How many compile at once."""
    return min(PROCESSES, (os.cpu_count() or 1) // 2)


def tried(
    asked: Sequence[Question], sizes: Sizes, device: str, *, seconds: float = SECONDS,
    tell: Callable[[dict], None] = lambda row: None, stopped: Callable[[], bool] = lambda: False,
) -> Decision:  # fmt: skip
    """The decision about what is ``asked``, on the current device of that type: compiled, then compared."""
    judged = compile_all(asked, sizes, device, processes())
    with Worker(TRIALS, start=START) as worker:
        return decide(asked, Tried(worker, sizes, device, judged), seconds=seconds, tell=tell, stopped=stopped)


def decide_now(
    sizes: Sizes, device: torch.device, tell: Callable[[dict], None] = lambda row: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Decision:  # fmt: skip
    """Tries all candidates for ``sizes`` on ``device``, and keeps the decision where other runs find it; but one that
    found a default wrong, could try nothing, or was ``stopped``, is made again each time."""
    key = key_of(sizes, device)
    found = tried(questions(sizes, key["machine"]["capability"]), sizes, device.type, tell=tell, stopped=stopped)
    if found.tried and not found.wrong and not stopped():
        store.write(key, found.chosen, found.rows)
    return found
