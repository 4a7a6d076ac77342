"""Checkpoints: written aside, flushed, renamed; safetensors and JSON alone; read back only when every checksum fits.

RUN/checkpoints/step-00001000/
    model.safetensors       parameters by name, float32
    config.json, tokenizer.json, vocab.txt, tokenizer_config.json
                            with model.safetensors a Hugging Face folder, which every command takes for a model
    optimizer.safetensors   the optimiser's state as KEY/PARAMETER; one file a process that shares it
                            (optimizer-00000-of-00004.safetensors), readable by any other number of processes
    state.json              step, place in the data, and what the run must have in common with one that goes on
    checksums.json          bytes and BLAKE2b of each of the others

Nothing is ever unpickled. A folder without a checksums.json that fits is no checkpoint.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from bert_fast.train.distributed import Ranks

CHUNK = 1 << 22
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class CheckpointError(OSError):
    """A checkpoint could not be written, or none can be read; the message says which and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose checksums fit: its ``folder`` and its ``state`` (state.json)."""

    folder: Path
    state: dict

    @property
    def step(self) -> int:
        return self.state["step"]

    def tensors(self, prefix: str, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
        """The ``wanted`` tensors, on the CPU, of the files whose names begin with ``prefix``."""
        found: dict[str, torch.Tensor] = {}
        for path in sorted(self.folder.glob(f"{prefix}*.safetensors")):
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
        return found


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def folders(run: Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name))


def save(
    run: Path,
    state: dict,
    model: dict[str, torch.Tensor],
    optimizer: dict[str, torch.Tensor],
    ranks: Ranks,
    *,
    description: dict[str, bytes],
    keep: int,
    also: Sequence[int] = (),
) -> Path:
    """Writes the checkpoint of ``state["step"]`` and removes older ones; every process calls it.

    ``model`` is written by the first process, beside it the files of ``description`` (configuration and tokenizer, see
    :func:`bert_fast.run.export.description`); ``optimizer`` is each process's own part, written by those of the first
    machine. The last ``keep`` stay, those of the steps ``also``, and the one with the lowest
    ``state["validation"]["mlm_loss"]`` of those at the newest's ``state["seq"]``. Where it cannot be written (a full
    disk), CheckpointError on every process: what was written aside is removed, and older checkpoints are as they were.
    """
    folder = folder_of(run, state["step"])
    aside = folder.with_name(f".{folder.name}")
    if ranks.first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True, exist_ok=True)
    ranks.wait()
    failure: OSError | None = None
    size, digest = 0, bytes(16)
    try:
        if ranks.rank < ranks.shards:  # the other machines have the same
            size, digest = write_safetensors(aside / _shard(ranks.rank, ranks.shards), optimizer)
    except OSError as error:
        failure = error
    reports = ranks.gather(bytes([failure is None]) + size.to_bytes(8, "little") + digest)
    written = all(report[0] for report in reports)
    if ranks.first and written:
        try:
            checksums = {}
            for rank, report in enumerate(reports[: ranks.shards]):
                checksums[_shard(rank, ranks.shards)] = (int.from_bytes(report[1:9], "little"), report[9:])
            checksums["model.safetensors"] = write_safetensors(aside / "model.safetensors", model)
            for name, content in description.items():
                checksums[name] = _write(aside / name, [content])
            checksums["state.json"] = _write(aside / "state.json", [_json(state)])
            table = {name: {"bytes": count, "blake2b": hashed.hex()} for name, (count, hashed) in checksums.items()}
            _write(aside / "checksums.json", [_json(table)])
            _flush_folder(aside)
            _remove(folder)  # a damaged one that was passed over
            os.rename(aside, folder)
            _flush_folder(folder.parent)
        except OSError as error:
            failure = error
    if not ranks.gather(bytes([written and failure is None]))[0][0]:
        if ranks.first:
            shutil.rmtree(aside, ignore_errors=True)
        if failure is None:
            raise CheckpointError(f"{folder} was not written: another process failed, see its message")
        if failure.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(run, failure, str(folder)) from failure
        raise CheckpointError(f"{folder} was not written: {failure}") from failure
    if ranks.first:
        prune(run, keep, also)
    return folder


def _shard(number: int, shards: int) -> str:
    return "optimizer.safetensors" if shards == 1 else f"optimizer-{number:05d}-of-{shards:05d}.safetensors"


def disk_full(run: Path, error: OSError, what: str | None = None) -> CheckpointError:
    """What to tell where ``what`` (by default something in ``run``) could not be written for lack of space."""
    good = [path.name for path in folders(run)]
    return CheckpointError(
        f"{what or error.filename or run} was not written: the disk is full ({error.strerror or error}). "
        + (f"The last checkpoint, {good[-1]}, is whole" if good else "There is no checkpoint yet")
        + ": make room and start the same command again"
    )


def prune(run: Path, keep: int, also: Sequence[int] = ()) -> None:
    """Removes all checkpoints but the last ``keep``, the best by validation loss and those of the steps ``also``, and
    what a kill left aside."""
    found = folders(run)
    validated = {}  # folder: (sequence length, loss)
    for folder in found:
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            validated[folder] = (state["seq"], state["validation"]["mlm_loss"])
        except (OSError, ValueError, KeyError, TypeError):  # damaged, or not validated at that step
            continue
    newest_seq = next(reversed(validated.values()), (None,))[0]
    losses = {folder: loss for folder, (seq, loss) in validated.items() if seq == newest_seq and _finite(loss)}
    best = min(losses, key=losses.__getitem__, default=None)
    for folder in found[:-keep]:
        if folder != best and folder not in [folder_of(run, step) for step in also]:
            _remove(folder)
    for leftover in (run / "checkpoints").glob(".*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _finite(loss: float | None) -> bool:
    """A validation without a mask has no loss, and a loss that is NaN is no best one."""
    return loss is not None and math.isfinite(loss)


def _remove(folder: Path) -> None:
    """Out of sight in one move, so that a kill leaves no half of it."""
    if folder.exists():
        hidden = folder.with_name(f".removed-{folder.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        os.rename(folder, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def newest(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose checksums fit, and a line for each newer one that is damaged and why.

    None where there is no checkpoint. CheckpointError where there are some and all are damaged.
    """
    complaints: list[str] = []
    for folder in reversed(folders(run)):
        try:
            return read(folder), complaints
        except (OSError, ValueError) as error:
            complaints.append(f"checkpoint {folder} is damaged and passed over: {error}")
    if complaints:
        raise CheckpointError(
            "; ".join(complaints) + f". No good checkpoint is left: delete {run / 'checkpoints'} to begin anew"
        )
    return None, complaints


def read(folder: Path) -> Checkpoint:
    """The checkpoint in ``folder``; ValueError or OSError naming the file that is missing, cut short or altered."""
    try:
        table = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))
        expected = {name: (entry["bytes"], entry["blake2b"]) for name, entry in table.items()}
    except FileNotFoundError as error:
        raise ValueError("checksums.json is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"checksums.json cannot be read ({error})") from error
    for needed in ("model.safetensors", "state.json"):
        if needed not in expected:
            raise ValueError(f"checksums.json does not list {needed}")
    for path in folder.glob("*.safetensors"):
        if path.name not in expected:
            raise ValueError(f"{path.name} does not belong to it")
    for name, (size, digest) in expected.items():
        path = folder / name
        has = path.stat().st_size if path.is_file() else None
        if has != size:
            raise ValueError(f"{name} is missing" if has is None else f"{name} has {has} bytes instead of {size}")
        with path.open("rb") as file:
            if hashlib.file_digest(file, _digest).hexdigest() != digest:
                raise ValueError(f"{name} is altered: its checksum does not fit")
        if name.endswith(".safetensors"):
            try:
                with safe_open(path, framework="pt"):  # checks the header
                    pass
            except SafetensorError as error:
                raise ValueError(f"{name} is no safetensors file ({error})") from error
    return Checkpoint(folder, json.loads((folder / "state.json").read_text(encoding="utf-8")))


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> tuple[int, bytes]:
    """Writes and flushes ``tensors`` tensor by tensor; returns the bytes written and their BLAKE2b.

    ``safetensors.torch.save_file`` would need the file read again for its checksum, and reports a full disk as an
    exception of its own.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # which loaders of Hugging Face folders may ask for
    offset = 0
    for name, tensor in tensors.items():
        shape, end = list(tensor.shape), offset + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterable[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for tensor in tensors.values():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                yield flat.view(torch.uint8).numpy().data

    return _write(path, parts())


def _digest():
    return hashlib.blake2b(digest_size=16)


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> tuple[int, bytes]:
    """Writes ``parts`` and flushes them to the disk; returns the bytes written and their BLAKE2b."""
    size, digest = 0, _digest()
    with path.open("wb", buffering=0) as file:
        for part in parts:
            for start in range(0, len(part), CHUNK):
                chunk = part[start : start + CHUNK]
                while len(chunk):
                    written = file.write(chunk)
                    digest.update(chunk[:written])
                    chunk, size = chunk[written:], size + written
        os.fsync(file.fileno())
    return size, digest.digest()


def _json(values: dict) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()


def _flush_folder(folder: Path) -> None:
    """The names in ``folder`` are on the disk, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
