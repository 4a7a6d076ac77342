"""Which files a corpus is: links, circles of them, and what may not be read."""

import os
import tempfile
from pathlib import Path

import pytest

from bert_fast.data import expand_paths, prepare, read_documents
from tests.support.other_user import not_root


@pytest.fixture
def tree(tmp_path):
    """corpus/a.txt, corpus/sub/b.txt, corpus/linked -> elsewhere (c.txt, deep/d.txt)."""
    for name in ("corpus/a.txt", "corpus/sub/b.txt", "elsewhere/c.txt", "elsewhere/deep/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    return tmp_path / "corpus"


@pytest.mark.parametrize("pattern", ["", "**", "*", "**/*", "**/*.txt", "../corp*"])
def test_links_to_folders_are_followed_by_folders_and_patterns_alike(tree, pattern):
    assert [path.name for path in expand_paths(tree / pattern)] == ["a.txt", "c.txt", "d.txt", "b.txt"]


@pytest.mark.parametrize("pattern", ["", "**", "**/*.txt"])
def test_circles_of_links_end_and_each_file_is_there_once(tree, pattern):
    (tree / "here").symlink_to(tree)
    (tree / "sub" / "up").symlink_to("..")
    (tree.parent / "elsewhere" / "back").symlink_to(tree)
    (tree / "aa").symlink_to(tree / "sub")  # sorts before what it leads to
    (tree / "0.txt").symlink_to(tree / "a.txt")
    files = expand_paths(tree / pattern)
    assert [path.relative_to(tree) for path in files] == [
        Path(name) for name in ("a.txt", "linked/c.txt", "linked/deep/d.txt", "sub/b.txt")
    ]
    again = expand_paths([tree / "0.txt", tree, tree / "sub" / ".." / "a.txt"])
    assert [path.name for path in again] == ["0.txt", "c.txt", "d.txt", "b.txt"]


@pytest.mark.parametrize("pattern", ["", "**", "**/*.txt", "*/*.txt", "*"])
@pytest.mark.parametrize("closed", ["sub", "linked"])
def test_a_folder_that_may_not_be_read_is_an_error_that_names_it(pattern, closed):
    with tempfile.TemporaryDirectory() as top:  # everybody may enter it, unlike pytest's
        corpus = Path(top, "corpus")
        (corpus / "sub").mkdir(parents=True)
        (corpus / "a.txt").write_text("Readable.")
        (Path(top) / "elsewhere").mkdir()
        (corpus / "linked").symlink_to(Path(top, "elsewhere"))
        os.chmod(top, 0o755)
        (corpus / closed).chmod(0o000)
        with not_root(), pytest.raises(PermissionError) as error:
            expand_paths(corpus / pattern)
        assert error.value.filename == str(corpus / closed)
        (corpus / closed).chmod(0o755)


@pytest.mark.parametrize("name", ["b.txt", "b.jsonl.gz", "b.parquet"])
def test_a_file_that_may_not_be_read_is_an_error_that_names_it(tokenizer, name):
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        corpus = Path(top, "corpus")
        corpus.mkdir()
        (corpus / "a.txt").write_text("Readable.")
        (corpus / name).touch(0o000)
        for read in (read_documents, lambda corpus: prepare(corpus, tokenizer, Path(top, "out"), workers=1)):
            with not_root(), pytest.raises(PermissionError) as error:
                read(corpus)
            assert error.value.filename == str(corpus / name)
        assert not Path(top, "out").exists()


@pytest.mark.parametrize("pattern", ["", "**", "*"])
def test_a_link_to_nothing_is_an_error_that_names_it(tree, pattern):
    (tree / "sub" / "gone.txt").symlink_to("nothing")
    with pytest.raises(FileNotFoundError) as error:
        expand_paths(tree / pattern)
    assert error.value.filename == str(tree / "sub" / "gone.txt")
    assert len(expand_paths(tree / "**" / "[a-d].txt")) == 4  # a pattern that does not match it


def test_hidden_files_and_pipes_in_folders_are_left_out(tree):
    os.mkfifo(tree / "pipe")
    (tree / ".git").mkdir()
    (tree / ".git" / "x.txt").write_text("hidden")
    (tree / ".lock").symlink_to("nothing")
    for pattern in ("", "**", "*"):
        assert [path.name for path in expand_paths(tree / pattern)] == ["a.txt", "c.txt", "d.txt", "b.txt"]
    assert [path.name for path in expand_paths(tree / ".g*" / "*")] == ["x.txt"]
    assert expand_paths([tree / "pipe", "-"]) == [tree / "pipe", Path("-")]
    (tree / "[1].txt").write_text("a name like a pattern")
    assert expand_paths(tree / "[1].txt") == [tree / "[1].txt"]
