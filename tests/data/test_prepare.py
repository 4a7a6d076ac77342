"""prepare: shards equal whatever makes them, resume, duplicates, bad input."""

import hashlib
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from safetensors import safe_open
from safetensors.numpy import save

from bert_fast.data import PretrainingDataset, encode_documents, open_corpus, prepare, read_documents, read_manifest
from bert_fast.data.losses import Tally
from bert_fast.data.prepare import Unit, _digest


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("corpus")
    texts = [topics[name] for name in sorted(topics)][:40]
    for part in range(2):
        lines = [json.dumps({"text": text}) for text in texts[part::2]]
        (folder / f"{part}.jsonl").write_text("\n".join(lines + lines[:3]))
    return folder


def contents(out):
    names = ["manifest.json", "sentence_ends.npy", "documents.npy"]
    return {path.name: path.read_bytes() for path in [*(out / n for n in names), *sorted((out / "shards").iterdir())]}


@pytest.fixture(scope="module")
def prepared(files, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    prepare(files, tokenizer, out, workers=1, unit_bytes=60_000)
    return out


def test_same_as_in_memory_without_duplicates(files, prepared, tokenizer):
    manifest = read_manifest(prepared)
    assert manifest["duplicate_documents"] == 6
    assert manifest["documents"] == 40
    assert len(manifest["shards"]) > 3
    corpus = open_corpus(prepared, verify=True)
    documents = read_documents(files)
    expected = [encode_documents([document], tokenizer) for document in documents[:20] + documents[23:43]]
    assert len(corpus.documents) == len(expected)
    for (first, last), one in zip(corpus.documents, expected, strict=True):
        ends = corpus.sentence_ends[first : last + 1]
        np.testing.assert_array_equal(ends - ends[0], one.sentence_ends)
        np.testing.assert_array_equal(corpus.tokens[ends[0] : ends[-1]], one.tokens)
    assert len(PretrainingDataset(corpus, tokenizer)[0].input_ids)


def test_killed_and_split_runs_give_the_same_bytes(files, prepared, tokenizer, tmp_path):
    class Killed(Exception):
        pass

    def kill(state):
        if state["units"] == 2:
            raise Killed

    with pytest.raises(Killed):
        prepare(files, tokenizer, tmp_path / "a", workers=1, unit_bytes=60_000, progress=kill)
    with pytest.raises(FileNotFoundError, match="manifest"):
        open_corpus(tmp_path / "a")
    states = []
    prepare(files, tokenizer, tmp_path / "a", workers=1, unit_bytes=60_000, progress=states.append)
    assert states[-1]["units_skipped"] == 2
    assert contents(tmp_path / "a") == contents(prepared)
    for part in (2, 0):
        assert prepare(files, tokenizer, tmp_path / "b", workers=1, unit_bytes=60_000, shard=(part, 3)) is None
    assert prepare(files, tokenizer, tmp_path / "b", workers=1, unit_bytes=60_000, shard=(1, 3))
    assert contents(tmp_path / "b") == contents(prepared)
    with pytest.raises(ValueError, match="unit_bytes was 60000"):
        prepare(files, tokenizer, tmp_path / "a", workers=1, unit_bytes=70_000)


@pytest.mark.slow
def test_workers_give_the_same_bytes(files, prepared, tokenizer, tmp_path):
    prepare(files, tokenizer, tmp_path, workers=2, unit_bytes=60_000)
    assert contents(tmp_path) == contents(prepared)


def test_duplicates_are_found_in_several_passes(prepared, monkeypatch):
    from bert_fast.data import shards

    paths = sorted((prepared / "shards").iterdir())
    once = shards._first_of_each(paths, 46)
    monkeypatch.setattr(shards, "DOCUMENTS_A_PASS", 5)
    np.testing.assert_array_equal(shards._first_of_each(paths, 46), once)
    assert (~once).sum() == 6


def test_dirty_text_is_counted(tokenizer, tmp_path):
    (tmp_path / "dirty.txt").write_bytes(
        b"Good one. Two.\n\nbad \xff\xfe utf.\n\nwith \0 NUL.\n\n\x01\x02\n\nGood one. Two."
    )
    (tmp_path / "lines.jsonl").write_bytes(b'{"text": ""}\n{"no": 1}\nnot json\n{"text": "Fine here."}')
    manifest = prepare(tmp_path, tokenizer, tmp_path / "out", workers=1)
    counts = manifest["counts"]
    assert {key: counts[key] for key in ("invalid_utf8", "nul_bytes", "empty_documents", "invalid_json")} == {
        "invalid_utf8": 1,
        "nul_bytes": 1,
        "empty_documents": 1,
        "invalid_json": 2,
    }
    assert (manifest["documents"], manifest["duplicate_documents"]) == (3, 1)


def test_nothing_usable_is_an_error(tokenizer, tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="1 documents skipped: not UTF-8"):
        prepare(tmp_path / "x.txt", tokenizer, tmp_path / "out", workers=1)


def test_damaged_shards_are_named(files, prepared, tokenizer, tmp_path):
    prepare(files, tokenizer, tmp_path, workers=1, unit_bytes=60_000)
    path = sorted((tmp_path / "shards").iterdir())[1]
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        open_corpus(tmp_path, verify=True)
    path.write_bytes(data[:-7])
    with pytest.raises(ValueError, match=f"{path.name} has"):
        open_corpus(tmp_path)
    with pytest.raises(ValueError, match="cut short"):
        prepare(files, tokenizer, tmp_path, workers=1, unit_bytes=60_000)


@pytest.fixture
def lossy(tmp_path):
    """A folder with every kind of loss, and what is to be said of each."""
    folder = tmp_path / "lossy"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"Good one.\n\nAlso\ncaf\xe9.\n\nwith \0 NUL.\n\n\x01\n\n")
    (folder / "b.jsonl").write_text(
        "".join(f"{line}\n" for line in ('{"text": "Fine."}', '{"body": 1, "id": 2}', "no"))
    )
    (folder / "c.csv").write_text("id,text\n1,\n2,Fine, too.\n3,Cut.\n")
    (folder / "d.txt").write_text(" \n\n")
    (folder / "e.jsonl").write_text("".join(json.dumps({"text": f"{n} \ud83d"}) + "\n" for n in range(5)))
    pq = folder / "f.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["Row.", None, ""]}), pq)
    return folder, {
        "invalid_utf8": [f"{folder}/a.txt, line 4: not UTF-8 at its byte 3 (0xE9 after 'caf')"],
        "nul_bytes": [f"{folder}/a.txt, line 6: NUL byte at byte 5"],
        "empty_documents": [f"{folder}/a.txt, line 8"],
        "invalid_json": [f"{folder}/b.jsonl, line 2: no 'text', but 'body', 'id'",
                         f"{folder}/b.jsonl, line 3: no JSON: Expecting value"],
        "empty_texts": [f"{folder}/c.csv, line 2", f"{pq}, row 2", f"{pq}, row 3"],
        "invalid_rows": [f"{folder}/c.csv, line 3: 3 columns, the header has 2"],
        "files_without_text": [f"{folder}/d.txt"],
        "lone_surrogates": [f"{folder}/e.jsonl, line {n + 1}" for n in range(3)],
    }  # fmt: skip


def test_what_was_lost_is_in_the_manifest_by_place(lossy, tokenizer, tmp_path):
    """The same at once, in parts, and where some shards were made before."""
    folder, places = lossy
    whole = prepare(folder, tokenizer, tmp_path / "whole", workers=1, unit_bytes=20)
    assert whole["places"] == dict(sorted(places.items()))
    assert {reason: whole["counts"][reason] for reason in places} == {
        reason: 5 if reason == "lone_surrogates" else len(some) for reason, some in places.items()
    }
    for part in (1, 0):
        prepare(folder, tokenizer, tmp_path / "parts", workers=1, unit_bytes=20, shard=(part, 2))
    assert len(list((tmp_path / "parts" / "shards").iterdir())) > 2
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    next((tmp_path / "parts" / "shards").iterdir()).unlink()
    prepare(folder, tokenizer, tmp_path / "parts", workers=1, unit_bytes=20)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_workers_say_the_same_places(lossy, tokenizer, tmp_path):
    assert prepare(lossy[0], tokenizer, tmp_path / "out", workers=2, unit_bytes=20)["places"] == lossy[1]


def test_shards_without_places_are_taken(lossy, tokenizer, tmp_path):
    """As they were made when only cut documents and JSON lines were counted by the reader, and nothing had a place."""
    out = tmp_path / "out"
    prepare(lossy[0], tokenizer, out, workers=1, unit_bytes=60)
    for path in (out / "shards").iterdir():
        with safe_open(path, framework="np") as file:
            made, arrays = json.loads(file.metadata()["made"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        made.pop("places", None)
        for new in ("empty_texts", "invalid_rows", "lone_surrogates", "files_without_text"):
            made["counts"].pop(new, None)
        path.write_bytes(save(arrays, metadata={"made": json.dumps(made)}))
    (out / "manifest.json").unlink()  # which has the shards' checksums
    assert "places" not in prepare(lossy[0], tokenizer, out, workers=1, unit_bytes=60)


def test_the_digest_of_a_unit_is_that_of_earlier_versions():
    counts = {"documents_cut": 2, "invalid_json": 1}
    unit = Unit(0, [b"One.", b"Two."], counts=Tally(counts | {"empty_texts": 3, "files_without_text": 1}))
    before = hashlib.sha256(json.dumps(counts, sort_keys=True).encode() + b"4:One.4:Two.").hexdigest()
    assert _digest(unit) == before
    assert _digest(Unit(0, [b"One."])) == hashlib.sha256(b"{}4:One.").hexdigest()
