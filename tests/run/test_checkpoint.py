"""Checkpoints: whole or not there, read back only when every checksum fits, never unpickled."""

import errno
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file

from bert_fast.run import checkpoint
from bert_fast.run.checkpoint import CheckpointError, folder_of, newest, save, write_safetensors
from bert_fast.train.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
MODEL = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.zeros(0), "half": torch.ones(3).bfloat16()}
DESCRIPTION = {"config.json": b'{"model_type": "bert"}', "vocab.txt": b"[PAD]\n"}
OPTIMIZER = {"exp_avg/a.weight": torch.ones(2, 3), "step/a.weight": torch.tensor(7.0)}


def put(run, step: int, loss: float | None = None, keep: int = 10, seq: int = 128):
    state = {"step": step, "seq": seq, "validation": None if loss is None else {"mlm_loss": loss}}
    return save(run, state, MODEL, OPTIMIZER, ALONE, description=DESCRIPTION, keep=keep)


def steps(run) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)


def test_written_and_read_back(tmp_path):
    folder = put(tmp_path, 5)
    assert sorted(path.name for path in folder.iterdir()) == [
        "checksums.json", "config.json", "model.safetensors", "optimizer.safetensors", "state.json", "vocab.txt",
    ]  # fmt: skip
    assert {name: (folder / name).read_bytes() for name in DESCRIPTION} == DESCRIPTION
    found, complaints = newest(tmp_path)
    assert (found.step, found.folder, complaints) == (5, folder, [])
    assert same(found.tensors("model"), MODEL)
    assert same(found.tensors("optimizer"), OPTIMIZER)
    assert same(found.tensors("optimizer", lambda name: name.startswith("step/")), {"step/a.weight": torch.tensor(7.0)})


def test_files_are_those_of_the_safetensors_library(tmp_path):
    tensors = MODEL | {
        "transposed": torch.arange(6.0).view(2, 3).t(), "whole": torch.arange(3), "flag": torch.tensor(True)
    }  # fmt: skip
    write_safetensors(tmp_path / "x.safetensors", tensors)
    assert same(load_file(tmp_path / "x.safetensors"), tensors)


def test_no_checkpoint(tmp_path):
    assert newest(tmp_path) == (None, [])


def damage_truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    return "model.safetensors"


def damage_flipped_byte(folder):
    path = folder / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    return "optimizer.safetensors is altered"


def damage_missing(folder):
    (folder / "optimizer.safetensors").unlink()
    return "optimizer.safetensors is missing"


def damage_vocabulary(folder):
    (folder / "vocab.txt").write_bytes(b"[UNK]\n")
    return "vocab.txt is altered"


def damage_state(folder):
    (folder / "state.json").write_text("{}")
    return "state.json"


def damage_checksums_missing(folder):
    (folder / "checksums.json").unlink()
    return "checksums.json is missing"


def damage_checksums_cut(folder):
    path = folder / "checksums.json"
    path.write_text(path.read_text()[:20])
    return "checksums.json cannot be read"


def damage_checksums_short(folder):
    path = folder / "checksums.json"
    table = json.loads(path.read_text())
    del table["model.safetensors"]
    path.write_text(json.dumps(table))
    return "does not list model.safetensors"


def damage_foreign_file(folder):
    write_safetensors(folder / "optimizer-00001-of-00002.safetensors", OPTIMIZER)
    return "optimizer-00001-of-00002.safetensors does not belong"


class Malicious:
    def __reduce__(self):
        return os.mkdir, (os.environ["MALICIOUS"],)


def damage_pickle_with_fitting_checksum(folder):
    path = folder / "model.safetensors"
    path.write_bytes(pickle.dumps(Malicious()))
    table = json.loads((folder / "checksums.json").read_text())
    digest = checkpoint._digest()
    digest.update(path.read_bytes())
    table["model.safetensors"] = {"bytes": path.stat().st_size, "blake2b": digest.hexdigest()}
    (folder / "checksums.json").write_text(json.dumps(table))
    return "model.safetensors is no safetensors file"


DAMAGES = [value for name, value in list(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_named_and_the_one_before_it_used(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("MALICIOUS", str(tmp_path / "executed"))
    put(tmp_path, 5)
    what = damage(put(tmp_path, 10))
    found, complaints = newest(tmp_path)
    assert found.step == 5
    assert len(complaints) == 1
    assert str(folder_of(tmp_path, 10)) in complaints[0]
    assert what in complaints[0]
    assert not (tmp_path / "executed").exists()
    put(tmp_path, 10)  # written again, it takes the damaged one's place
    assert newest(tmp_path)[0].step == 10


def test_only_damaged_checkpoints_are_an_error_not_a_fresh_start(tmp_path):
    damage_truncated(put(tmp_path, 5))
    with pytest.raises(CheckpointError, match=r"step-00000005.*No good checkpoint is left"):
        newest(tmp_path)


def test_the_last_and_the_best_are_kept(tmp_path):
    for step, loss in ((1, 3.0), (2, 1.5), (3, None), (4, 2.0), (5, 2.5), (6, 1.9)):
        put(tmp_path, step, loss, keep=2)
    assert steps(tmp_path) == [2, 5, 6]
    put(tmp_path, 7, 9.0, keep=2, seq=512)  # a loss at another length does not compare
    assert steps(tmp_path) == [6, 7]


def test_what_a_kill_left_aside_goes_with_the_next_checkpoint(tmp_path):
    put(tmp_path, 1)
    leftover = tmp_path / "checkpoints" / ".step-00000002"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert newest(tmp_path)[0].step == 1
    put(tmp_path, 2)
    assert not leftover.exists()
    assert newest(tmp_path)[0].step == 2


@pytest.mark.parametrize("when", range(7))
def test_a_full_disk_leaves_the_last_checkpoint_whole_and_nothing_else(tmp_path, monkeypatch, when):
    """The disk fills up after ``when`` flushes: in each of the six files, and in the folder's own."""
    put(tmp_path, 5)
    flushed = []

    def full(handle):
        flushed.append(handle)
        if len(flushed) > when:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(
        CheckpointError, match=r"step-00000010 was not written: the disk is full .*step-00000005, is whole"
    ):
        put(tmp_path, 10)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]
    assert same(newest(tmp_path)[0].tensors("model"), MODEL)


def test_a_write_that_fails_for_another_reason_is_told(tmp_path, monkeypatch):
    def denied(handle):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint.os, "fsync", denied)
    with pytest.raises(CheckpointError, match="Permission denied"):
        put(tmp_path, 10)
