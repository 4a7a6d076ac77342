"""prepare beside another one in the same folder, within one thread, and where it may not write."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from bert_fast.data import open_corpus, prepare, save_tokenizer, train_tokenizer
from bert_fast.data.files import FolderInUse, aside, sole_writer
from tests.support.other_user import not_root

# Writes part I of N of a folder until its input is closed or it is killed.
HOLDER = """
import sys
from pathlib import Path
from bert_fast.data.files import sole_writer
with sole_writer(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])):
    print("at work", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Document {number} has a value. It has another.\n\n" for number in range(40)))
    return path


class Holder:
    """Another process that is at work in ``folder`` until ``with`` ends."""

    def __init__(self, folder, part=0, of=1):
        self.arguments = [sys.executable, "-c", HOLDER, str(folder), str(part), str(of)]

    def __enter__(self):
        self.process = subprocess.Popen(self.arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "at work\n"
        return self.process

    def __exit__(self, *_):
        self.process.communicate()


def test_a_second_one_is_refused_at_once_until_the_first_is_gone(text, tokenizer, tmp_path):
    out = tmp_path / "out"
    with Holder(out) as other:
        with pytest.raises(FolderInUse, match=r"another process prepares .*out"):
            prepare(text, tokenizer, out, workers=1)
        with pytest.raises(FolderInUse, match="part 1/2"):
            prepare(text, tokenizer, out, workers=1, shard=(1, 2))
        assert [path.name for path in out.iterdir()] == [".lock"]
        other.kill()
        other.wait()
        prepare(text, tokenizer, out, workers=1)  # the lock went with it
    open_corpus(out, verify=True)


def test_other_parts_are_written_beside_each_other(text, tokenizer, tmp_path):
    out = tmp_path / "out"
    with Holder(out, 1, 3):
        assert prepare(text, tokenizer, out, workers=1, unit_bytes=500, shard=(0, 3)) is None
        with pytest.raises(FolderInUse, match="part 1/3 of"):
            prepare(text, tokenizer, out, workers=1, unit_bytes=500, shard=(1, 3))
        with pytest.raises(FolderInUse):
            prepare(text, tokenizer, out, workers=1, unit_bytes=500)


def test_what_killed_processes_left_is_removed_and_names_differ(text, tokenizer, tmp_path):
    out = tmp_path / "out"
    (out / "shards").mkdir(parents=True)
    names = [aside(out / "shards" / "00000000.safetensors") for _ in range(50)]
    assert len(set(names)) == 50
    for path in [*names, aside(out / "manifest.json")]:
        path.write_bytes(b"half")
    prepare(text, tokenizer, out, workers=1)
    assert not list(out.rglob("*.aside"))


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    left = aside(tmp_path / "manifest.json")
    left.write_bytes(b"perhaps another process is writing this")
    with pytest.warns(UserWarning, match="cannot be locked"), sole_writer(tmp_path, 0, 1):
        pass
    assert left.exists()


def test_one_worker_is_one_thread(text, tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "tok")
    script = """
import os, sys
from bert_fast.data import load_tokenizer, prepare
tokenizer = load_tokenizer("tok")
before = os.listdir("/proc/self/task")
prepare("text.txt", tokenizer, "out", workers=1, progress=lambda _: print(os.environ["TOKENIZERS_PARALLELISM"]))
sys.exit(len(os.listdir("/proc/self/task")) - len(before))
"""
    environment = os.environ | {"RAYON_NUM_THREADS": "3", "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0  # threads more than before
    assert done.stdout == "true\n"


def test_two_in_one_process_keep_their_tokenizers_apart(text, tokenizer, tmp_path):
    """The one begins while the other is at work, as in two threads."""
    other = train_tokenizer([text.read_text()], 60)
    alone = [tmp_path / "alone", tmp_path / "other alone"]
    for out, which in zip(alone, (tokenizer, other), strict=True):
        prepare(text, which, out, workers=1, unit_bytes=500)

    def progress(state):
        if state["units"] == 1:
            prepare(text, other, tmp_path / "other", workers=1, unit_bytes=500)

    prepare(text, tokenizer, tmp_path / "out", workers=1, unit_bytes=500, progress=progress)
    for out, same in zip(alone, (tmp_path / "out", tmp_path / "other"), strict=True):
        assert (out / "manifest.json").read_bytes() == (same / "manifest.json").read_bytes()


@pytest.mark.parametrize("setting", [None, "true"])
def test_one_worker_leaves_the_environment_as_it_was(text, tokenizer, tmp_path, monkeypatch, setting):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if setting is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", setting)
    prepare(text, tokenizer, tmp_path / "out", workers=1)
    assert os.environ.get("TOKENIZERS_PARALLELISM") == setting
    (tmp_path / "file" / "shards").mkdir(parents=True)
    (tmp_path / "file" / "shards" / "00000000.safetensors").mkdir()  # where a shard should go
    with pytest.raises(IsADirectoryError):
        prepare(text, tokenizer, tmp_path / "file", workers=1)
    assert os.environ.get("TOKENIZERS_PARALLELISM") == setting


def test_read_only_folder(text, tokenizer):
    with tempfile.TemporaryDirectory() as top:  # everybody may enter and read it, unlike pytest's
        corpus, out = shutil.copy(text, top), Path(top, "out")
        os.chmod(top, 0o555)
        with not_root(), pytest.raises(PermissionError, match=str(out)):
            prepare(corpus, tokenizer, out, workers=1)
        assert not out.exists()
        os.chmod(top, 0o755)
        prepare(corpus, tokenizer, out, workers=1)
        (out / "shards" / "00000000.safetensors").unlink()  # to be made again
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        folders = [out, out / "shards", out / "tokenizer"]
        for path in [*before, *folders]:
            path.chmod(0o555)
        with not_root(), pytest.raises(PermissionError, match=str(out)):
            prepare(corpus, tokenizer, out, workers=1)
        for path in folders:
            path.chmod(0o755)
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
