"""Where a run stands in its data: in one source, or in several."""

from typing import NamedTuple


class Place(NamedTuple):
    """Where a run stands in its data: ``position`` sequences of ``epoch`` (in its order) are used."""

    epoch: int = 0
    position: int = 0

    def next_phase(self) -> "Place":
        """The place at which the phase begins that follows one which ends here: no mask comes twice."""
        return Place(self.epoch + 1, 0)

    def as_dict(self) -> dict:
        """For JSON."""
        return self._asdict()


class Places(NamedTuple):
    """Where a run stands in several sources: the place in each, and the tokens taken from each in this phase."""

    of: tuple[Place, ...]
    tokens: tuple[int, ...]

    @property
    def epoch(self) -> int:
        """Of the source that is read least often."""
        return min(place.epoch for place in self.of)

    def next_phase(self) -> "Places":
        """The place at which the phase begins that follows one which ends here."""
        return Places(tuple(place.next_phase() for place in self.of), (0,) * len(self.of))

    def as_dict(self) -> dict:
        """For JSON."""
        return {"of": [place.as_dict() for place in self.of], "tokens": list(self.tokens)}


def place_of(saved: dict) -> Place | Places:
    """What ``as_dict`` of a place gave."""
    if "of" in saved:
        return Places(tuple(Place(**place) for place in saved["of"]), tuple(saved["tokens"]))
    return Place(**saved)
