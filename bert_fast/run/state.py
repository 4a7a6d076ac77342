"""How far a run is: what its checkpoints keep beside weights and optimiser."""

from dataclasses import asdict, dataclass, field

from bert_fast.data.places import Place, Places, place_of
from bert_fast.data.updates import Update


@dataclass
class RunState:
    """The part of state.json that changes while a run trains.

    step                updates that are done
    phase               number of the phase of the last one, ``place`` where it left the data
    skipped             how many were not finite; ``skipped_in_a_row`` how many of the last ones
    seconds             of training, without validation and checkpoints
    validation          what was found after the last update; None where it was not validated
    read                of several sources, by phase: their tokens and epochs, and the epochs at which the phase began
    """

    step: int = 0
    phase: int = 0
    place: Place | Places = field(default_factory=Place)
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    validation: dict | None = None
    read: list[dict] = field(default_factory=list)

    @classmethod
    def of(cls, state: dict) -> "RunState":
        """That of a checkpoint's ``state``."""
        own = {name: state[name] for name in cls.__dataclass_fields__ if name in state}  # earlier ones had fewer
        return cls(**own | {"place": place_of(state["place"])})

    def as_dict(self) -> dict:
        """For state.json."""
        return asdict(self) | {"place": self.place.as_dict()}

    def count(self, update: Update, phase: int, *, finite: bool) -> None:
        """One more ``update``, of ``phase``, is done."""
        if isinstance(update.after, Places):
            self._count_sources(update.after, update.read, phase)
        self.step, self.phase, self.place, self.validation = update.step + 1, phase, update.after, None
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1

    def _count_sources(self, after: Places, read: tuple[float, ...], phase: int) -> None:
        if not self.read or self.read[-1]["phase"] != phase:
            begin = self.place if phase == self.phase else self.place.next_phase()
            assert isinstance(begin, Places)
            self.read.append({"phase": phase, "begin": [place.epoch for place in begin.of]})
        epochs = [now - begin for now, begin in zip(read, self.read[-1]["begin"], strict=True)]
        self.read[-1] |= {"tokens": list(after.tokens), "epochs": epochs}
