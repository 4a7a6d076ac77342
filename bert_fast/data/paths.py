"""The files of a corpus: folders and patterns, in which nothing is passed over without a word."""

import fnmatch
import os
import stat
from collections.abc import Iterable
from glob import has_magic
from pathlib import Path

from bert_fast.data.hub_datasets import is_hub, pinned, without_descriptions

STDIN = Path("-")


def is_pipe(path: Path) -> bool:
    """Whether ``path`` is standard input (``-``), a pipe, a device or a name on the Hub: what it holds, and how much,
    only reading tells."""
    return path == STDIN or is_hub(path) or (path.exists() and not path.is_file())


def expand_paths(paths: str | Path | Iterable[str | Path], *, without: Iterable[Path] = ()) -> list[Path]:
    """The files that ``paths`` (files, folders, glob patterns) name, each once, sorted within a folder or pattern.

    Links to folders are followed; a file that is reached by several ways is there by one, without a link where it can
    be. A folder that a pattern matches stands for what is in it. Of folders and patterns, hidden files and folders,
    pipes and devices are left out, and the files and folders ``without``: results made within the corpus; so is what
    only describes a data set of the package `datasets`. ``-`` is standard input, and
    ``hf://NAME[:CONFIG][@SPLIT][?revision=REVISION]`` a data set on the Hugging Face Hub, whose path gets the commit
    that is read. Raises FileNotFoundError for a path or pattern that matches nothing else and for a link to nothing,
    PermissionError for a folder that may not be read, ValueError for a folder with several splits.
    """
    files: dict[str, Path] = {}
    without = {left_out.resolve() for left_out in without}
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        path = Path(path)
        path = pinned(path) if is_hub(path) else path
        if path == STDIN or is_hub(path) or (path.exists() and not path.is_dir()):
            found = {os.path.realpath(path): path}
        else:
            found = _files([path] if path.is_dir() else _matching(path))
            found = {real: file for real, file in found.items() if not _within(Path(real), without)}
        if not found:
            raise FileNotFoundError(f"no corpus file at {str(path)!r}: give a file, a folder with files or a pattern")
        for real, file in found.items():
            files.setdefault(real, file)
    return list(files.values())


def _within(path: Path, those: set[Path]) -> bool:
    return path in those or not those.isdisjoint(path.parents)


def _matching(pattern: Path) -> list[Path]:
    """What ``pattern`` matches. glob.glob passes over what it may not read, and hardly ends where links are circles."""
    found = [Path(pattern.anchor)]
    for part in pattern.parts[len(found[0].parts) :]:
        if part == "**":
            found = _folders(found)
        elif has_magic(part):
            found = [path for folder in found if folder.is_dir() for path in _within_folder(folder, part)]
        else:
            found = [folder / part for folder in found if (folder / part).exists()]
    return found


def _files(paths: Iterable[Path]) -> dict[str, Path]:
    """The files among ``paths`` and in the folders among them, sorted, by their real paths."""
    paths = set(paths)
    paths.update(path for folder in _folders(filter(Path.is_dir, paths)) for path in _within_folder(folder))
    files: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: (path.is_symlink(), path)):  # links last: by its own name if it can be
        if stat.S_ISREG(path.stat().st_mode):  # which says so where a link leads to nothing
            files.setdefault(os.path.realpath(path), path)
    data = set(without_descriptions(sorted(files.values())))
    return {real: file for real, file in sorted(files.items(), key=lambda item: item[1]) if file in data}


def _folders(tops: Iterable[Path]) -> list[Path]:
    """``tops`` and the folders in them; each real folder once, by a way without links where there is one."""
    found: dict[str, Path] = {}
    to_do, links = list(tops), list[Path]()
    while to_do or links:
        folder = to_do.pop() if to_do else links.pop(0)
        real = os.path.realpath(folder)
        if real in found:
            continue
        found[real] = folder
        for path in filter(Path.is_dir, _within_folder(folder)):
            (links if path.is_symlink() else to_do).append(path)
        links.sort()
    return list(found.values())


def _within_folder(folder: Path, pattern: str = "*") -> list[Path]:
    """What in ``folder`` matches ``pattern``, hidden ones if that begins with a dot; PermissionError where closed."""
    names = fnmatch.filter((entry.name for entry in os.scandir(folder)), pattern)
    return [folder / name for name in names if pattern.startswith(".") or not name.startswith(".")]
