"""Files that are whole or not there, and one writer at a time in a folder."""

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # what a file system without locks answers

ASIDE = f".*.{'[0-9a-f]' * 16}.aside"  # the names that `aside` makes


class FolderInUse(ValueError):
    """Another process writes into the same folder."""


def aside(path: Path) -> Path:
    """A hidden name beside ``path`` that no other process takes, on whatever machine: process ids may well be equal."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.aside")


@contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """A file to write; when the block ends without an error it is flushed to the disk and renamed to ``path``.

    An OSError that does not say where (a full disk) gets ``path`` as its file name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    other = aside(path)
    try:
        with other.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(other, path)
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    finally:
        other.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes aside, flushes to the disk and renames: ``path`` is whole or not there."""
    with written_aside(path) as file:
        file.write(data)


def checksum(path: Path) -> str:
    """BLAKE2b of a file's content, 32 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which is renamed to ``path`` when the block ends without an error.

    Raises ValueError at once where ``path`` is there and not an empty folder: nothing is overwritten.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is there already: name a new folder, or remove it")
    part = aside(path)
    try:
        part.mkdir(parents=True)
        yield part
        os.replace(part, path)  # an empty folder gives way
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def sole_writer(folder: Path, part: int, of: int) -> Iterator[None]:
    """Keeps others from writing part ``part`` of ``of`` in ``folder`` (made where missing); other parts may be written.

    Raises :class:`FolderInUse` at once where another process has it, here or on a machine to which the file system
    passes locks on. The lock (byte ``part`` of ``.lock``, or all bytes for the whole) belongs to the process and goes
    when it does, however it ends. A file system without locks is a warning: two writers cost time, not the result.
    Who had the whole removes on leaving what killed processes left half written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = of == 1
    with (folder / ".lock").open("ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, *((0, 0) if whole else (1, part)))
        except BlockingIOError as error:
            what = "" if whole else f"part {part}/{of} of "
            raise FolderInUse(f"another process prepares {what}{folder}: wait for it, or use another folder") from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warnings.warn(f"{folder} cannot be locked ({error.strerror}): start one process a part", stacklevel=3)
            whole = False
        try:
            yield
        finally:
            if whole:
                for left in [*folder.glob(ASIDE), *folder.glob(f"*/{ASIDE}")]:
                    left.unlink(missing_ok=True)
