"""Pictures by matplotlib, which are whole or not there and need no display."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bert_fast import extras

KINDS = (".png", ".svg", ".pdf")


def picture_path(out: str | Path) -> Path:
    """``out``; ValueError where its name does not end as a picture's, ExtraMissing where matplotlib is not there."""
    extras.load("matplotlib")
    path = Path(out)
    if path.suffix.lower() not in KINDS:
        raise ValueError(f"{path}: the picture's name must end with .png, .svg or .pdf")
    return path


@contextmanager
def written_picture(out: str | Path, size: tuple[float, float]) -> Iterator[Any]:
    """An empty Figure of ``size`` in inches; when the block ends without an error it is written to ``out``."""
    path = picture_path(out)
    figure = extras.load("matplotlib.figure").Figure(figsize=size, layout="constrained")
    extras.load("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    yield figure
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}{path.suffix}")
    figure.savefig(aside, dpi=130)
    aside.replace(path)
