"""Prepared data damaged on the disk: every command that reads them says in one line which file, or is right."""

import dataclasses
import json
import multiprocessing
import random
import shutil
import time

import numpy as np
import pytest
from safetensors import safe_open

from bert_fast import data
from bert_fast.data.shards import INDEX


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """Prepared data of several shards, one document twice."""
    made = tmp_path_factory.mktemp("whole")
    lines = (folder / "corpus.jsonl").read_text().splitlines()
    (made / "corpus.jsonl").write_text("\n".join([*lines, lines[3]]) + "\n")
    data.prepare(made / "corpus.jsonl", folder / "tok", made / "data", workers=1, unit_bytes=20_000)
    return made / "data"


@pytest.fixture
def prepared(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "data")


@pytest.fixture
def commands(run, pretrained, prepared, tmp_path):
    """commands(workers) -> what evaluate and pretrain leave, on ``prepared``."""

    def commands(workers=0):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        common = ("--data", prepared, "--seq", 32, "--device", "cpu", "--quiet")
        yield run("evaluate", pretrained, *common)
        yield run("pretrain", *common, "--out", tmp_path / "run", "--model", pretrained.parent / "size.json", "--steps",
                  20, "--batch-size", 8, "--workers", workers, "--validation", 0, "--peak-tflops", 1)  # fmt: skip

    return commands


def refused(done, *message):
    assert done.code == 1
    assert done.out == ""
    assert done.err.count("\n") == 1
    assert "unexpected" not in done.err
    assert "Traceback" not in done.err
    assert all(str(part) in done.err for part in message), done.err


def place_of_tokens(shard):
    """Where a shard's token ids begin, in bytes, and how many there are."""
    with shard.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        about = json.loads(file.read(size))["tokens"]
    return 8 + size + about["data_offsets"][0], about["shape"][0]


@pytest.mark.parametrize("wrong", [600, 65_535])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_id_beyond_the_vocabulary(commands, prepared, wrong, workers):
    shard = sorted((prepared / "shards").iterdir())[1]
    place, tokens = place_of_tokens(shard)
    content = bytearray(shard.read_bytes())
    content[place : place + 2 * tokens] = np.full(tokens, wrong, "<u2").tobytes()
    shard.write_bytes(content)
    for done in commands(workers):
        refused(
            done, f"shard {shard} is damaged", f"has id {wrong}, of a vocabulary of 600", f"bert-fast verify {prepared}"
        )
    assert not multiprocessing.active_children()  # a process waits for its workers at its end


def test_an_id_beyond_the_vocabulary_in_memory(folder):
    tokenizer = data.load_tokenizer(folder / "tok")
    corpus = data.encode_documents([["one", "two"], ["three", "four"]], tokenizer)
    tokens = corpus.tokens.copy()
    tokens[1] = 900
    corpus = dataclasses.replace(corpus, tokens=tokens)
    with pytest.raises(ValueError, match="has id 900, of a vocabulary of 600: encode it with the tokenizer"):
        list(data.PretrainingDataset(corpus, tokenizer, nsp=False))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_header_that_says_something_else(commands, prepared, workers):
    shard = sorted((prepared / "shards").iterdir())[0]
    content = shard.read_bytes()
    for damaged in (content.replace(b"U16", b"I16"), content.replace(b'"tokens"', b'"tokenS"'), b"\xff" * len(content)):
        shard.write_bytes(damaged)
        for done in commands(workers):
            refused(done, f"shard {shard} is damaged or cut short", "delete it and run prepare again")


def changed(name):
    def change(folder):
        array = np.load(folder / name)
        array.reshape(-1)[len(array) // 2] += 1 << 33
        np.save(folder / name, array)

    return change


INDEX_DAMAGES = {
    **{f"{name} points far": (name, changed(name)) for name in INDEX},
    **{f"{name} lacks the end": (name, lambda f, n=name: np.save(f / n, np.load(f / n)[:-1])) for name in INDEX},
    **{f"{name} is reversed": (name, lambda f, n=name: np.save(f / n, np.load(f / n)[::-1])) for name in INDEX},
    **{f"{name} of floats": (name, lambda f, n=name: np.save(f / n, np.load(f / n).astype(float))) for name in INDEX},
    **{f"{name} is text": (name, lambda f, n=name: (f / n).write_text("text")) for name in INDEX},
    **{f"{name} is empty": (name, lambda f, n=name: (f / n).write_bytes(b"")) for name in INDEX},
}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("damage", INDEX_DAMAGES)
def test_a_changed_index(commands, prepared, as_first_version, first, damage):
    if first:
        as_first_version(prepared)
    name, change = INDEX_DAMAGES[damage]
    change(prepared)
    for done in commands():
        refused(done, prepared / name, "delete it and run prepare again", f"bert-fast verify {prepared}")


def test_another_tokenizer_than_the_manifest_says(commands, prepared):
    path = prepared / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"lowercase": true', '"lowercase":false'))
    for done in commands():
        refused(done, f"{path} is damaged (checksum)", f"bert-fast verify {prepared}")


def damaged(path, draw):
    """``path`` with some bytes changed, added or missing."""
    content = bytearray(path.read_bytes())
    place = draw.randrange(min(len(content), draw.choice([150, len(content)])))
    how = draw.choice(["bit", "byte", "zeros", "cut", "more"])
    if how == "bit":
        content[place] ^= 1 << draw.randrange(8)
    elif how == "byte":
        content[place] ^= draw.randrange(1, 256)
    elif how == "zeros":
        content[place : place + 9] = bytes(len(content[place : place + 9]))
    path.write_bytes(content[:place] if how == "cut" else content + draw.randbytes(9) if how == "more" else content)
    return f"{path} {how} {place}"


@pytest.mark.parametrize("first", [False, True])
def test_whatever_is_damaged(commands, run, whole, prepared, as_first_version, first):
    """Verify names every damage that is in a checksum's reach; the others name it, or find nothing wrong."""
    seed = time.time_ns()
    draw = random.Random(seed)
    if first:
        as_first_version(prepared)
    good = {path: path.read_bytes() for path in prepared.rglob("*") if path.is_file() and path.name != ".lock"}
    for path in draw.choices(sorted(good), k=6):
        what = f"{damaged(path, draw)}, seed {seed}"
        verified = run("verify", prepared, "--quiet")
        if not first and path.read_bytes() != good[path] and path.name != "manifest.json":
            assert verified.code == 1, what
        for done in (verified, *commands()):
            assert done.code in (0, 1), what
            assert "unexpected" not in done.err, (what, done.err)
            assert "unexpected" not in done.out, (what, done.out)
            assert done.err.count("\n") <= 1, (what, done.err)
            if done.code == 1:
                named = {"tokenizer": "tokenizer"}.get(path.parent.name, path.name)
                if first and path.name == "manifest.json":  # which has no checksum: it and the file differ
                    named = "manifest" if "manifest" in done.err + done.out else "(checksum)"
                assert named in done.err + done.out, (what, done)
        path.write_bytes(good[path])
    assert run("verify", prepared).code == 0


def test_header_of_shards_is_read_by_safetensors(whole):
    with safe_open(sorted((whole / "shards").iterdir())[0], framework="np") as file:
        assert set(file.keys()) == {"tokens", "sentence_lengths", "document_sentences", "document_counts", "digests"}
