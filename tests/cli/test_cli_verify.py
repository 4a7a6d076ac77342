"""bert-fast verify: what is whole is said to be, and what is damaged is named."""

import functools
import json
import os
import shutil

import numpy as np
import pytest

from bert_fast import data


def flip(path, place: int = -1) -> None:
    """Another byte at ``place``; size and times stay."""
    about, content = path.stat(), bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def edit(path, before: str, after: str) -> None:
    content = path.read_text()
    assert before in content
    path.write_text(content.replace(before, after, 1))


@pytest.fixture
def prepared(folder, tmp_path):
    """Prepared data of several shards, with duplicates within and between them."""
    lines = (folder / "corpus.jsonl").read_text().splitlines()
    (tmp_path / "corpus.jsonl").write_text("\n".join([lines[0], *lines, *lines[5:7], lines[0]]) + "\n")
    data.prepare(tmp_path / "corpus.jsonl", folder / "tok", tmp_path / "data", workers=1, unit_bytes=8_000)
    return tmp_path / "data"


def test_what_was_written_is_whole(run, prepared, pretrained):
    manifest = data.read_manifest(prepared)
    assert manifest["duplicate_documents"] == 4
    shards, step = len(manifest["shards"]), pretrained / "checkpoints" / "step-00000002"
    assert shards > 3
    done = run("verify", prepared, pretrained, step)
    assert done.code == 0
    lines = done.out.splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        f"{prepared}: {shards} shards", f"{pretrained}: 2 checkpoints", f"{step}: 1 checkpoint",
    ]  # fmt: skip
    assert all(line.endswith(", whole") for line in lines)
    found = [line for line in run("verify", prepared, pretrained, "--json").lines if line["kind"] == "result"]
    assert [line["damaged"] for line in found] == [[], []]
    assert found[0]["bytes"] == sum(entry["bytes"] for entry in [*manifest["shards"], *manifest["files"].values()])


def cut_index(folder):
    np.save(folder / "documents.npy", np.load(folder / "documents.npy")[:-1])


def other_index(folder):
    index = np.load(folder / "documents.npy")
    index[2] = index[1]
    np.save(folder / "documents.npy", index)


SHARDS = [
    ("shards/00000001.safetensors", lambda path: flip(path), "is damaged (checksum): delete it and run prepare"),
    ("shards/00000001.safetensors", lambda path: flip(path, 0), "is damaged (checksum)"),
    ("shards/00000001.safetensors", lambda path: os.truncate(path, 99), "has 99 bytes, the manifest says"),
    ("shards/00000001.safetensors", lambda path: path.unlink(), "has 0 bytes"),
]
OTHERS = [
    ("sentence_ends.npy", lambda path: flip(path), "is damaged (checksum): delete it and run prepare again"),
    ("sentence_ends.npy", lambda path: path.unlink(), "has 0 bytes"),
    ("documents.npy", lambda path: os.truncate(path, 3), "has 3 bytes, the manifest says"),
    ("documents.npy", lambda path: cut_index(path.parent), "bytes, the manifest says"),
    ("documents.npy", lambda path: other_index(path.parent), "is damaged (checksum)"),
    ("tokenizer/tokenizer.json", lambda path: os.truncate(path, 50), "has 50 bytes, the manifest says"),
    ("tokenizer/tokenizer.json", lambda path: edit(path, '"lowercase": true', '"lowercase":false'), "(checksum)"),
    ("tokenizer/vocab.txt", lambda path: path.unlink(), "has 0 bytes"),
    ("tokenizer/tokenizer_config.json", lambda path: edit(path, "512", "128"), "is damaged (checksum)"),
    ("settings.json", lambda path: flip(path), "is damaged (checksum)"),
]
WITHOUT_CHECKSUMS = [
    ("sentence_ends.npy", lambda path: flip(path), "is not the index of its shards: delete it and run prepare again"),
    ("sentence_ends.npy", lambda path: path.unlink(), "No such file"),
    ("sentence_ends.npy", lambda path: path.write_bytes(path.read_bytes() + b"1"), "is damaged"),
    ("documents.npy", lambda path: os.truncate(path, 3), "is damaged"),
    ("documents.npy", lambda path: flip(path, 108), "is damaged"),
    ("documents.npy", lambda path: cut_index(path.parent), "is damaged"),
    ("documents.npy", lambda path: other_index(path.parent), "is not the index"),
    ("tokenizer", lambda path: os.truncate(path / "tokenizer.json", 50), "is not a tokenizer"),
    ("tokenizer", lambda path: edit(path / "tokenizer.json", '"lowercase": true', '"lowercase": false'), "is not the"),
]


@pytest.mark.parametrize(
    ("first", "name", "damage", "message"),
    [(False, *row) for row in SHARDS + OTHERS] + [(True, *row) for row in SHARDS + WITHOUT_CHECKSUMS],
)
def test_damaged_data_are_named(run, prepared, as_first_version, first, name, damage, message):
    if first:
        as_first_version(prepared)
    damage(prepared / name)
    done = run("verify", prepared, "--quiet")
    assert done.code == 1
    assert done.err == "bert-fast verify: error: 1 damaged, named in the result\n"
    whole, damaged = done.out.splitlines()
    assert whole.endswith(", damaged:")
    assert str(prepared / name) in damaged
    assert message in damaged


@pytest.mark.parametrize("first", [False, True])
def test_a_manifest_that_is_not_as_it_was_written_is_named(run, prepared, as_first_version, first):
    if first:
        as_first_version(prepared)
    assert run("verify", prepared).code == 0
    path = prepared / "manifest.json"
    manifest = json.loads(path.read_text())
    needed = ("made_by", "documents", "duplicate_documents", "sentences", "tokens", "shards") if first else manifest
    damaged = [{key: value for key, value in manifest.items() if key != left_out} for left_out in needed]
    damaged += [manifest | {"shards": value} for value in (None, {}, [1], [{}], [{"file": 3}])]
    if not first:
        damaged += [manifest | {"tokens": manifest["tokens"] + 1}, manifest | {"more": 1}]
    for content in [*map(json.dumps, damaged), "", "[]", "7", "\xff", json.dumps(manifest)[:-1]]:
        path.write_bytes(content.encode("latin-1"))
        for argv in (("verify", prepared), ("pretrain", "--data", prepared, "--out", prepared / "run", "--steps", 1)):
            done = run(*argv, "--quiet")
            assert done.code == 1
            assert done.err.count("\n") == 1
            assert f"error: {path} is damaged (" in done.err


def test_prepare_makes_again_what_was_damaged(run, folder, prepared):
    flip(prepared / "sentence_ends.npy")
    (prepared / "shards" / "00000001.safetensors").unlink()
    data.prepare(prepared.with_name("corpus.jsonl"), folder / "tok", prepared, workers=1, unit_bytes=8_000)
    assert run("verify", prepared).code == 0


def test_prepare_does_not_go_on_with_what_is_damaged(run, folder, prepared):
    again = ("prepare", prepared.with_name("corpus.jsonl"), "--tokenizer", folder / "tok", "--out", prepared,
             "--workers", 1, "--quiet")  # fmt: skip
    prepare = functools.partial(data.prepare, unit_bytes=8_000)
    shard, manifest = prepared / "shards" / "00000001.safetensors", (prepared / "manifest.json").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "prepare", prepare)
        for place in (-1, -40, -200, len(shard.read_bytes()) // 2):
            flip(shard, place)
            done = run(*again)
            assert done.code == 1
            assert f"shard {shard} is damaged (" in done.err
            assert "delete it and run prepare again" in done.err
            assert (prepared / "manifest.json").read_bytes() == manifest
            flip(shard, place)
        flip(shard)
        shard.unlink()
        assert run(*again).code == 0
    assert (prepared / "manifest.json").read_bytes() == manifest
    assert run("verify", prepared).code == 0


def test_damaged_checkpoints_are_named_beside_what_is_whole(run, folder, pretrained, tmp_path):
    made = tmp_path / "run"
    shutil.copytree(pretrained, made)
    damaged = made / "checkpoints" / "step-00000002"
    flip(damaged / "optimizer.safetensors")
    done = run("verify", folder / "data", made, "--json")
    assert done.code == 1
    found = [line for line in done.lines if line["kind"] == "result"]
    assert [len(line["damaged"]) for line in found] == [0, 1]
    assert f"checkpoint {damaged} is damaged: optimizer.safetensors is altered" in found[1]["damaged"][0]
    assert run("verify", damaged).code == 1
    assert run("verify", damaged.with_name("step-00000004")).code == 0
    (damaged / "checksums.json").unlink()
    assert "checksums.json is missing" in run("verify", damaged).out


def test_what_cannot_be_verified_is_an_error(run, folder, prepared):
    for path in (folder / "model", folder / "nowhere"):
        done = run("verify", path)
        assert done.code == 1
        assert f"error: {path} is neither prepared data nor a run" in done.err
    manifest = prepared / "manifest.json"
    os.truncate(manifest, len(json.dumps(data.read_manifest(prepared))) // 2)
    done = run("verify", prepared)
    assert done.code == 1
    assert f"error: {manifest} is damaged" in done.err
