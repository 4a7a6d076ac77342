"""The run's metrics: lines of metrics.jsonl, and the same scalars for TensorBoard."""

import json
import math
import os
import struct
import time
from pathlib import Path


class MetricsFile:
    """RUN/metrics.jsonl, one JSON object a line, and scalars in RUN/tensorboard.

    A run that goes on from ``step`` first drops what was written after it (and every "end"), so that nothing stands
    there twice; ``step`` 0 begins anew. Numbers that are not finite are null.
    """

    def __init__(self, run: Path, step: int):
        self.path = run / "metrics.jsonl"
        kept = [] if step == 0 else [line for line in read_metrics(self.path) if _stays(line, step)]
        aside = self.path.with_name(".metrics.jsonl")
        aside.write_text("".join(_line(entry) for entry in kept), encoding="utf-8")
        os.replace(aside, self.path)
        self.file = self.path.open("ab", buffering=0)  # a full disk fails where the line is written, not at the end
        self.events = EventFile(run / "tensorboard", restart_at=step + 1)

    def write(self, kind: str, step: int, **values) -> None:
        """Appends a line; numbers among ``values`` become scalars ``kind/name`` of TensorBoard."""
        self.file.write(_line({"kind": kind, "step": step} | values).encode())
        if found := numbers(kind, values):
            self.events.scalars(step, found)

    def flush(self) -> None:
        """Everything written so far is on the disk."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        self.events.close()


def numbers(kind: str, values: dict) -> dict[str, float]:
    """What trackers show of a line: its numbers, called ``kind/name``; of a table in it ``kind/table/name``."""
    found = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, int | float) and k != "epoch"}
    for name, table in values.items():
        if isinstance(table, dict):
            found |= numbers(f"{kind}/{name}", table)
    return found


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line that a kill cut short is left out, none of an absent file."""
    entries = []
    if path.is_file():
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                entries.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}: line {len(entries) + 1} is no JSON: {error}") from error
    return entries


def _stays(entry: dict, step: int) -> bool:
    return entry["step"] <= step and entry["kind"] != "end"


def _line(entry: dict) -> str:
    return json.dumps(_finite(entry)) + "\n"


def _finite(entry: dict) -> dict:
    return {
        k: _finite(v) if isinstance(v, dict) else None if isinstance(v, float) and not math.isfinite(v) else v
        for k, v in entry.items()
    }


class EventFile:
    """A TensorBoard event file of scalars, written without TensorBoard.

    The format: records of (length, masked CRC-32C of the length, data, masked CRC-32C of the data), each data an
    ``Event`` message (tensorboard/compat/proto/event.proto) in protocol-buffer encoding. ``restart_at`` tells
    TensorBoard to hide what earlier files of the folder have from that step on.
    """

    def __init__(self, folder: Path, restart_at: int):
        folder.mkdir(parents=True, exist_ok=True)
        stamp = time.time_ns()
        self.file = (folder / f"events.out.tfevents.{stamp // 10**9:010d}.{stamp}").open("xb", buffering=0)
        self._record(_field(3, b"brain.Event:2"))
        self._record(_field(2, restart_at) + _field(7, _field(1, 1)))  # session_log { status: START }

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Appends ``values`` at ``step``."""
        summary = b"".join(_field(1, _field(1, tag.encode()) + _field(2, float(v))) for tag, v in values.items())
        self._record(_field(2, step) + _field(5, summary))

    def close(self) -> None:
        self.file.close()

    def _record(self, event: bytes) -> None:
        event = b"\x09" + struct.pack("<d", time.time()) + event  # field 1, a double: wall time
        length = struct.pack("<Q", len(event))
        crcs = (struct.pack("<I", _masked_crc(data)) for data in (length, event))
        self.file.write(length + next(crcs) + event + next(crcs))


def _field(number: int, value: int | float | bytes) -> bytes:
    """One protocol-buffer field: a varint, a 32-bit float or bytes."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_CRC = _crc_table()


def _masked_crc(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
