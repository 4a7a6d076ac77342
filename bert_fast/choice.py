"""What serves in place of the engine's own choices: tried for a block, or settled for this process.

A choice is a table or a launch configuration with a name and a default where it is made: "attention.one_pass" (compute
capability -> from which length on), "bias_gelu.fwd" (a launch configuration), "mlm_loss.chunk" (device -> positions).
Nothing here says what is best; the defaults do, and what bert_fast/tuning/ decides on the machine where it runs.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

_chosen: dict[str, dict] = {}
_settled: dict[str, list[tuple[dict, dict]]] = {}  # name -> defaults, and what serves in the place of each
_held = False
_served: Counter = Counter()
_replaced: dict[str, dict] = {}  # name -> the default in whose place something was tried last


@contextlib.contextmanager
def use(choices: Mapping[str, dict]) -> Iterator[Counter]:
    """Has ``choices`` (name -> what replaces entries of the default) in use for the length of a ``with`` block.

    Gives a counter that says how often each candidate kernel has served in the block so far.
    """
    global _served
    before, _served = (dict(_chosen), _served), Counter()
    _chosen.update(choices)
    try:
        yield _served
    finally:
        _chosen.clear()
        _chosen.update(before[0])
        before[1].update(_served)
        _served = before[1]


def settle(decided: Iterable[tuple[str, dict, dict]]) -> None:
    """From here on what was ``decided`` serves: (name, default, what serves in that very default's place).

    Where the default is another one, for other sizes or a dtype that nothing was decided for, it stays.
    """
    for name, default, instead in decided:
        rest = [pair for pair in _settled.get(name, []) if pair[0] != default]
        _settled[name] = [*rest, (default, instead)]


@contextlib.contextmanager
def held() -> Iterator[None]:
    """For the length of a ``with`` block nothing is settled but what the block settles; then it is as it was before."""
    global _held
    before, was_held = dict(_settled), _held
    forget()
    _held = True
    try:
        yield
    finally:
        forget()
        _settled.update(before)
        _held = was_held


def is_held() -> bool:
    """Whether somebody else says what is settled: models then take nothing up that was decided before."""
    return _held


def forget() -> None:
    """Nothing is settled any more."""
    _settled.clear()


def active() -> bool:
    """Whether anything is in use in place of a default."""
    return bool(_chosen or _settled)


def of(name: str, default: dict) -> dict:
    """``default``, or what is in use under ``name`` in its place."""
    if name in _chosen:
        _replaced[name] = default
        return default | _chosen[name]
    for replaced, instead in _settled.get(name, ()):
        if replaced == default:
            return instead
    return default


def replaced(name: str) -> dict:
    """The default in whose place something was tried under ``name`` last; KeyError where nothing was."""
    return _replaced[name]


def served(name: str) -> None:
    """A candidate kernel says that it, and not the default one, has this call."""
    if _chosen:
        _served[name] += 1
