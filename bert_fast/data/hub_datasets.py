"""Data sets of the package `datasets`: its folders on disk, and names on the Hugging Face Hub, streamed.

A folder that `save_to_disk` wrote and a clone of a data set's repository hold more than text: descriptions, caches, and
several splits, of which a test split in a training corpus would be a fault that nothing shows. So their descriptions
are left out, and of several splits one must be named. What a name on the Hub holds changes with every commit there, so
the commit that is read is part of the name (:func:`pinned`).
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bert_fast import extras

if TYPE_CHECKING:
    import pyarrow

HUB = "hf:/"  # how a path of "hf://NAME" begins
FORM = "hf://NAME[:CONFIG][@SPLIT][?revision=REVISION]"
NAME = re.compile(
    r"hf:/(?P<name>[^:@?]+)(?::(?P<config>[^@?]+))?(?:@(?P<split>[^?]+))?(?:\?revision=(?P<revision>[^?]+))?"
)
COMMIT = re.compile("[0-9a-f]{40}")
SAVED, SPLITS = "state.json", "dataset_dict.json"  # of save_to_disk: what a folder holds, and which folders
CARDS = ("README.md", "dataset_infos.json")  # of a repository
OF_SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}(?:-\w+)?\.parquet")  # the files of a repository
ROWS = 256  # read at a time


def is_hub(path: Path) -> bool:
    """Whether ``path`` is a name on the Hub, ``FORM``, and no file or folder."""
    return str(path).startswith(HUB) and not path.exists()


def called(path: Path) -> str:
    """``path`` as it was given: of a name on the Hub a Path keeps one slash of two."""
    return str(path).replace(HUB, f"{HUB}/", 1) if is_hub(path) else str(path)


def pinned(path: Path) -> Path:
    """``path`` (:func:`is_hub`) with the commit that its revision, or the newest one, is at.

    ValueError where there is no such data set or revision, or a folder of that name is here, which `datasets` would
    read in its place; OSError where the Hub cannot be reached.
    """
    asked = _asked(path)
    if COMMIT.fullmatch(asked["revision"] or ""):
        return path
    extras.load("datasets")  # before the Hub is asked for what could not be read
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        commit = HfApi().dataset_info(asked["name"], revision=asked["revision"]).sha
    except Exception as error:  # of its own classes, and of those of the libraries with which it reads
        kind = ValueError if isinstance(error, (ValueError, HfHubHTTPError)) else OSError
        raise kind(f"{called(path)}: {error}") from error
    return Path(f"{str(path).partition('?')[0]}?revision={commit}")


def _asked(path: Path) -> re.Match:
    """The parts of a name on the Hub; ValueError where it is none, or a folder."""
    name, asked = called(path), NAME.fullmatch(str(path))
    if asked is None:
        raise ValueError(f"{name} is no {FORM}")
    if Path(asked["name"]).exists():
        raise ValueError(f"{name}: {asked['name']} is a folder here, too: give it without hf://, or elsewhere")
    return asked


def without_descriptions(files: list[Path]) -> list[Path]:
    """``files``, found in folders, without what only describes a data set, and what else is in its folder.

    ValueError where a data set has several splits or configurations, and where one lacks a file.
    """
    left_out: set[Path] = set()
    within: dict[Path, list[Path]] = {}
    for file in files:
        within.setdefault(file.parent, []).append(file)
    of_splits = {file: split[1] for file in files if (split := OF_SPLIT.fullmatch(file.name))}
    for about in files:
        folder = about.parent
        if about.name == SPLITS and (found := _json(about).get("splits")) is not None:
            left_out.add(about)
            _require_one(folder, "splits", [f"{folder / name}" for name in found])
        elif about.name == SAVED and "_data_files" in (state := _json(about)):
            names = {entry["filename"] for entry in state["_data_files"]}
            if state.get("_indices_files"):
                raise ValueError(f"{folder} holds rows that were chosen, by an early version of datasets: save it anew")
            if missing := sorted(name for name in names if not (folder / name).is_file()):
                raise ValueError(f"{folder} lacks {', '.join(missing)}, which its {SAVED} names")
            left_out |= {file for file in within[folder] if file.name not in names}
        elif about.name in CARDS and of_splits:  # few files are, and many folders have a README.md
            splits = {f"{file.parent / split}-*" for file, split in of_splits.items() if folder in file.parents}
            if splits:
                left_out.add(about)
                _require_one(folder, "splits or configurations", sorted(splits))
    return [file for file in files if file not in left_out]


def _require_one(folder: Path, what: str, found: list[str]) -> None:
    if len(found) > 1:
        shown = ", ".join(f"'{one}'" for one in found[:10])
        raise ValueError(f"{folder} is a data set with {len(found)} {what}: give one or more by name, as {shown}")


def _json(path: Path) -> dict:
    """The object in a file; empty where there is none, so that it is a file like others."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def hub_tables(path: Path) -> Iterator["pyarrow.Table"]:
    """The rows of the data set at ``path`` (:func:`is_hub`), streamed, as tables.

    ValueError where there is none, or where a split must be named; OSError where the Hub cannot be reached.
    """
    name, asked = called(path), _asked(pinned(path))
    datasets = extras.load("datasets")
    try:
        found = datasets.load_dataset(
            asked["name"], asked["config"], split=asked["split"], revision=asked["revision"], streaming=True
        )
        if isinstance(found, dict):
            if len(found) > 1:
                before, mark, revision = name.partition("?")
                listed = ", ".join(f"{before}@{split}{mark}{revision}" for split in found)
                raise ValueError(f"a data set with {len(found)} splits: give one, as {listed}")
            (found,) = found.values()
        yield from found.with_format("arrow").iter(batch_size=ROWS)
    except Exception as error:  # of its own classes, and of those of the libraries with which it reads
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{name}: {error}") from error
