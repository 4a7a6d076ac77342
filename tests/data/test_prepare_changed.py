"""A corpus that changes between a stop and the resume, between machines or while it is read, or only looks as if."""

import os

import pytest

from bert_fast.data import prepare

UNIT = 300  # bytes: a file here is three units


class Stopped(Exception):
    """What stops a run in these tests."""


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in "abc":
        text = [f"Document {number} of {name} says: {'a value, ' * 10}and so on.\n\n" for number in range(8)]
        (folder / f"{name}.txt").write_text("".join(text))
    return folder


def contents(out):
    named = [out / name for name in ("manifest.json", "sentence_ends.npy", "documents.npy", "settings.json")]
    return {path.name: path.read_bytes() for path in [*named, *sorted((out / "shards").glob("*.safetensors"))]}


def make(files, tokenizer, out, **more):
    return prepare(files, tokenizer, out, **{"workers": 1, "unit_bytes": UNIT, **more})


def stop_after(units):
    def progress(state):
        if state["units"] == units:
            raise Stopped

    return progress


def edit(path, before="a value", after="a vague"):
    """Changes the first of the words, not the size; the file is newer afterwards, as an editor leaves it."""
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


def stopped(files, tokenizer, out, units=4):
    with pytest.raises(Stopped):
        make(files, tokenizer, out, progress=stop_after(units))


def test_an_edit_of_what_is_made_is_refused_and_named(files, tokenizer, tmp_path):
    out = tmp_path / "out"
    stopped(files, tokenizer, out)
    edit(files / "b.txt")  # the third of the four units has its first document
    shards = sorted((out / "shards").iterdir())
    with pytest.raises(ValueError, match=r"b\.txt changed since shard .*00000002.* another folder") as refusal:
        make(files, tokenizer, out)
    assert "a.txt" not in str(refusal.value)
    assert sorted((out / "shards").iterdir()) == shards
    edit(files / "b.txt", "a vague", "a value")
    make(files, tokenizer, out)
    make(files, tokenizer, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_an_edit_of_what_is_not_made_yet_is_taken(files, tokenizer, tmp_path):
    stopped(files, tokenizer, tmp_path / "out")
    edit(files / "c.txt")
    make(files, tokenizer, tmp_path / "out")
    make(files, tokenizer, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_time_of_a_file_is_nothing(files, tokenizer, tmp_path):
    make(files, tokenizer, tmp_path / "whole")
    stopped(files, tokenizer, tmp_path / "out")
    for number, path in enumerate(files.iterdir()):
        os.utime(path, (number, number))
    make(files, tokenizer, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_machines_with_different_text_do_not_make_one_corpus_of_it(files, tokenizer, tmp_path):
    out = tmp_path / "out"
    assert make(files, tokenizer, out, shard=(0, 2)) is None
    edit(files / "a.txt")
    with pytest.raises(ValueError, match=r"a\.txt changed since shard .*00000000"):
        make(files, tokenizer, out, shard=(1, 2))
    assert not (out / "manifest.json").exists()


def test_a_file_that_changes_while_it_is_read(files, tokenizer, tmp_path):
    out = tmp_path / "out"

    def progress(state):
        if state["units"] == 1:
            edit(files / "a.txt")

    with pytest.raises(ValueError, match=r"a\.txt changed while being read"):
        make(files, tokenizer, out, progress=progress)
    assert not (out / "manifest.json").exists()
    with pytest.raises(ValueError, match=r"a\.txt changed since shard"):
        make(files, tokenizer, out)


def test_other_files_are_told_apart_by_name(files, tokenizer, tmp_path):
    stopped(files, tokenizer, tmp_path / "out")
    (files / "b.txt").rename(files / "bb.txt")
    (files / "d.txt").write_text("More.")
    with pytest.raises(ValueError, match="made otherwise") as refusal:
        make(files, tokenizer, tmp_path / "out")
    assert all(name in str(refusal.value) for name in ("b.txt", "bb.txt", "d.txt"))
    assert "a.txt" not in str(refusal.value)


def test_a_result_within_the_corpus_is_no_part_of_it(files, tokenizer, tmp_path):
    make(files, tokenizer, tmp_path / "whole")
    stopped(files, tokenizer, files)
    make(files, tokenizer, files)
    assert contents(files) == contents(tmp_path / "whole")
    make(files, tokenizer, files / "inner")
    make(files, tokenizer, files / "inner")
