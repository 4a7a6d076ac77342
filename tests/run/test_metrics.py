"""metrics.jsonl and TensorBoard's event files."""

import struct

import pytest

from bert_fast.run.metrics import EventFile, MetricsFile, _masked_crc, numbers, read_metrics


def test_lines_are_appended_and_cut_back_to_the_step_gone_on_from(tmp_path):
    file = MetricsFile(tmp_path, 0)
    for step in (1, 2, 3):
        file.write("train", step, loss=1.0 / step, nsp_loss=None)
    file.write("validation", 3, mlm_loss=float("nan"))
    file.write("end", 3, reason="stopped by a signal")
    file.close()
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as half:
        half.write('{"kind": "train", "st')  # a kill in the middle of a line
    assert [line["kind"] for line in read_metrics(path)] == ["train"] * 3 + ["validation", "end"]
    assert read_metrics(path)[3] == {"kind": "validation", "step": 3, "mlm_loss": None}
    file = MetricsFile(tmp_path, 2)
    file.write("train", 3, loss=0.5)
    file.close()
    assert [(line["kind"], line["step"]) for line in read_metrics(path)] == [("train", 1), ("train", 2), ("train", 3)]
    MetricsFile(tmp_path, 0).close()
    assert path.read_bytes() == b""


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\nnothing\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)


def records(path) -> list[bytes]:
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        assert struct.unpack("<I", data[8:12])[0] == _masked_crc(data[:8])
        event, crc = data[12 : 12 + length], data[12 + length : 16 + length]
        assert struct.unpack("<I", crc)[0] == _masked_crc(event)
        found.append(event)
        data = data[16 + length :]
    return found


def test_the_checksum_is_crc32c_as_the_record_format_masks_it():
    def masked(crc: int) -> int:
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    assert _masked_crc(b"123456789") == masked(0xE3069283)  # the check value of CRC-32C
    assert _masked_crc(bytes(32)) == masked(0x8A9136AA)  # RFC 3720, B.4


def test_event_files_hold_the_messages_tensorboard_reads(tmp_path):
    """Bytes as protocol buffers encode them; 9 bytes of wall time begin every event."""
    events = EventFile(tmp_path, restart_at=301)
    events.scalars(300, {"train/loss": 0.5, "train/mfu": -2.0})
    events.close()
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("events.out.tfevents.")
    version, start, scalars = (event[9:] for event in records(path))
    assert version == b"\x1a\x0dbrain.Event:2"
    assert start == b"\x10\xad\x02" + b"\x3a\x02\x08\x01"
    loss = b"\x0a\x0atrain/loss\x15" + struct.pack("<f", 0.5)
    mfu = b"\x0a\x09train/mfu\x15" + struct.pack("<f", -2.0)
    summary = b"\x0a" + bytes([len(loss)]) + loss + b"\x0a" + bytes([len(mfu)]) + mfu
    assert scalars == b"\x10\xac\x02" + b"\x2a" + bytes([len(summary)]) + summary


def test_what_a_line_says_of_sources_is_kept_and_shown_to_trackers(tmp_path):
    values = {"mlm_loss": 1.0, "sources": {"wiki": {"mlm_loss": 0.5, "nsp_loss": None}, "notes": {"mlm_loss": 1.5}}}
    names = ("validation/mlm_loss", "validation/sources/wiki/mlm_loss", "validation/sources/notes/mlm_loss")
    assert numbers("validation", values) == dict(zip(names, (1.0, 0.5, 1.5), strict=True))
    file = MetricsFile(tmp_path, 0)
    file.write("validation", 1, sources={"wiki": {"mlm_loss": float("inf")}})
    file.close()
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["sources"] == {"wiki": {"mlm_loss": None}}
