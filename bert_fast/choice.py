"""What is tried in place of the engine's own choices: the one means by which a benchmark or a tuner switches them.

A choice is a table or a launch configuration with a name and a default where it is made: "attention.one_pass" (compute
capability -> from which length on), "bias_gelu.fwd" (a launch configuration), "mlm_loss.chunk" (device -> positions).
Nothing here says what is best; the defaults do.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping

_chosen: dict[str, dict] = {}
_served: Counter = Counter()


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


def active() -> bool:
    """Whether anything is in use in place of a default."""
    return bool(_chosen)


def of(name: str, default: dict) -> dict:
    """``default``, with what is in use under ``name`` in its place."""
    return default | _chosen[name] if name in _chosen else default


def served(name: str) -> None:
    """A candidate kernel says that it, and not the default one, has this call."""
    if _chosen:
        _served[name] += 1
