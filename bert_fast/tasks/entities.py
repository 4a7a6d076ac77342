"""Tags of words: the schemes in which they mark entities, what breaks a scheme, and the entities themselves.

Source: conlleval and seqeval, whose default mode reads tags that break their scheme as here; BILOU's L and U are
BIOES's E and S (Ratinov and Roth 2009).
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from bert_fast import extras

TAG = re.compile(r"([BIESLU])(?:-(.*))?", re.DOTALL)


class Entity(NamedTuple):
    """Words ``begin`` to ``end`` (without it) of a sentence, of a ``kind`` such as PER."""

    kind: str
    begin: int
    end: int


def scheme_of(tags: Iterable[str]) -> str | None:
    """The scheme of ``tags``: "IO", "BIO" (IOB1 or IOB2), "BIOES" or "BILOU"; None where they mark no entities.

    Tags without B- and the like beside an O are those of IO, without its prefix. Tags of words that are no entities, as
    parts of speech are, have neither.
    """
    tags = set(tags)
    prefixes = {found[1] for tag in tags - {"O"} if (found := TAG.fullmatch(tag))}
    if all(map(TAG.fullmatch, tags - {"O"})) and prefixes:
        for scheme in ("IO", "BIO", "BIOES", "BILOU"):
            if prefixes <= set(scheme):
                return scheme
        return "BIOES"
    return "IO" if "O" in tags and not prefixes and len(tags) > 1 else None


def _parts(tag: str, scheme: str) -> tuple[str, str]:
    """(prefix, kind) of a tag, ("O", "") of an O."""
    if tag == "O":
        return "O", ""
    found = TAG.fullmatch(tag)
    if found is None:
        return "I", tag
    prefix = {"L": "E", "U": "S"}.get(found[1], found[1])
    return prefix, found[2] or ""


def kind_of(tag: str, scheme: str | None) -> str:
    """What a tag without its prefix is a kind of; the tag itself where no ``scheme`` marks entities."""
    return tag if scheme is None or tag == "O" else _parts(tag, scheme)[1]


def entities(tags: Sequence[str], scheme: str) -> list[Entity]:
    """The entities of a sentence's ``tags``. One begins at a B or S, after an O, E or S, and where the kind changes."""
    found: list[Entity] = []
    before, kind_before = "O", ""
    for place, tag in enumerate(tags):
        prefix, kind = _parts(tag, scheme)
        if prefix != "O":
            if prefix in "BS" or before in "OES" or kind != kind_before:
                found.append(Entity(kind, place, place + 1))
            else:
                found[-1] = found[-1]._replace(end=place + 1)
        before, kind_before = prefix, kind
    return found


def broken(tags: Sequence[str], scheme: str) -> Iterator[tuple[int, str]]:
    """(place, what is wrong there) of each tag of a sentence that its scheme does not allow.

    "BIO" is IOB2 here, whose every entity begins with a B; of IOB1 nothing is said (see :func:`is_iob1`).
    """
    if scheme == "IO":
        return
    closed = "E" if scheme == "BIOES" else "L" if scheme == "BILOU" else None
    before, last = ("O", ""), "O"
    for place, tag in enumerate([*tags, "O"]):
        prefix, kind = parts = _parts(tag, scheme)
        inside = prefix in "IE" and before[0] in "BI" and before[1] == kind
        if prefix in "IE" and not inside:
            yield place, f"{tag} after {last}"
        elif closed and before[0] in "BI" and not inside:
            yield place - 1, f"{last} is not ended by {closed}"
        before, last = parts, tag


def is_iob1(sentences: Iterable[Sequence[str]]) -> bool:
    """Whether sentences in "BIO" are IOB1: a B stands only where an entity of its kind touches another."""
    touching = False
    for tags in sentences:
        before = ("O", "")
        for tag in tags:
            prefix, kind = parts = _parts(tag, "BIO")
            if prefix == "B":
                if before[0] == "O" or before[1] != kind:
                    return False
                touching = True
            before = parts
    return touching


def scores(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], scheme: str) -> dict:
    """F1, precision, recall and number of whole entities, over all kinds (micro) and of each under "kinds".

    By seqeval, in its default mode; 0 where nothing could be found.
    """
    metrics = extras.load("seqeval.metrics")
    real, found = ([[_plain(tag, scheme) for tag in tags] for tags in those] for those in (truth, predicted))
    if all(tag == "O" for tags in (*real, *found) for tag in tags):
        return {"f1": 0.0, "entity_precision": 0.0, "entity_recall": 0.0, "entities": 0, "kinds": {}}
    report = metrics.classification_report(real, found, output_dict=True, zero_division=0)
    each = {
        kind: {"f1": float(row["f1-score"]), "entity_precision": float(row["precision"]),
               "entity_recall": float(row["recall"]), "entities": int(row["support"])}
        for kind, row in report.items()
    }  # fmt: skip
    whole = each.pop("micro avg")
    return whole | {"kinds": {kind: row for kind, row in each.items() if kind not in ("macro avg", "weighted avg")}}


def _plain(tag: str, scheme: str) -> str:
    """``tag`` with a prefix that seqeval knows."""
    prefix, kind = _parts(tag, scheme)
    return prefix if prefix == "O" else f"{prefix}-{kind}"
