"""What reading a corpus left out or changed: how much of it by reason, and the first few places."""

from array import array
from bisect import bisect_right
from collections import Counter

FIRST = 3  # places that are kept of each reason

WORDS = {
    "invalid_utf8": "documents skipped: not UTF-8",
    "lone_surrogates": "documents with halves of surrogate pairs (a cut emoji), which became U+FFFD",
    "nul_bytes": "documents with NUL bytes, which were removed",
    "empty_documents": "documents without a token",
    "empty_texts": "rows or lines skipped: their text is empty or null",
    "documents_cut": "cuts of documents longer than 16 MiB",
    "invalid_json": "JSON lines skipped: not an object a line with that text field, or beyond 64 MiB",
    "invalid_rows": "rows of tables skipped: not as many columns as the header",
    "doubtful_files": "files that seem to be laid out otherwise than they are read",
    "files_without_text": "files without text",
}


class Tally(Counter):
    """Counts, as a Counter, and in ``places`` the first :data:`FIRST` places ("FILE, line 3: what is wrong") of each.

    A JSON object of the one and one of the other (``places`` is empty where nothing was lost) make it again.
    """

    def __init__(self, counts: dict | None = None, places: dict[str, list[str]] | None = None):
        self.places: dict[str, list[str]] = {reason: list(some) for reason, some in (places or {}).items()}
        super().__init__(counts)

    def note(self, reason: str, place: str) -> None:
        """One more of ``reason``, which is at ``place``."""
        self[reason] += 1
        self._keep(reason, [place])

    def update(self, other=(), /, **counts: int) -> None:
        """Adds the counts of ``other``, a mapping, and its places if it is a tally."""
        super().update(other, **counts)
        for reason, places in getattr(other, "places", {}).items():
            self._keep(reason, places)

    def _keep(self, reason: str, places: list[str]) -> None:
        kept = self.places.setdefault(reason, [])
        kept += places[: FIRST - len(kept)]

    def clear(self) -> None:
        """Forgets counts and places."""
        super().clear()
        self.places.clear()

    def __reduce__(self):
        return Tally, (dict(self), self.places)

    def described(self) -> list[str]:
        """What was lost or changed, a sentence a reason; empty where nothing was."""
        found = []
        for reason, words in WORDS.items():
            if number := self.get(reason):
                places = self.places.get(reason, [])
                more = [f"and {number - len(places):,} more"] if places and number > len(places) else []
                found.append(f"{number:,} {words}" + (f" ({'; '.join(places + more)})" if places else ""))
        return found


class Places:
    """Where documents are, in eight bytes each: place i is ("FILE, line", 3). Few first parts follow one another."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.within: list[str] = []
        self.numbers = array("Q")

    def append(self, within: str, number: int) -> None:
        """The place of one more document."""
        if not self.within or within != self.within[-1]:
            self.starts.append(len(self.numbers))
            self.within.append(within)
        self.numbers.append(number)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.within[bisect_right(self.starts, index) - 1], self.numbers[index]
