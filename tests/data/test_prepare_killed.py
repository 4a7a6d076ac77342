"""prepare killed at random moments, without room to write, on one endless line, and its memory on a long corpus."""

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from bert_fast.data import open_corpus, prepare, read_manifest, save_tokenizer, shards

SCRIPT = """
import sys, time
from bert_fast.data import prepare
if __name__ == "__main__":
    prepare(sys.argv[1], sys.argv[2], sys.argv[3], workers=2, unit_bytes=8_000)
    if sys.argv[4:]:
        time.sleep(1000)
"""


@pytest.fixture(scope="module")
def corpus_file(documents, tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("\n\n".join(" ".join(document).replace("\n", " ") for document in documents))
    return path


def contents(out):
    """Bytes of all files that are the result."""
    named = [out / name for name in ("manifest.json", "sentence_ends.npy", "documents.npy")]
    return {path.name: path.read_bytes() for path in [*named, *(out / "shards").glob("*.safetensors")]}


@pytest.mark.slow
def test_killed_at_random_moments(corpus_file, tokenizer, tmp_path):
    prepare(corpus_file, tokenizer, tmp_path / "whole", workers=1, unit_bytes=8_000)
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", str(corpus_file), "tokenizer", "out"]
    draw = random.Random(5)
    total, folder = len(read_manifest(tmp_path / "whole")["shards"]), tmp_path / "out" / "shards"
    assert total > 15
    for least in sorted(draw.randrange(total) for _ in range(6)):
        # its own group: the workers are killed with it; and it stays when it is done
        process = subprocess.Popen([*command, "stay"], cwd=tmp_path, start_new_session=True)
        while len(list(folder.glob("*.safetensors"))) < least:
            assert process.poll() is None
        time.sleep(draw.uniform(0, 0.02))
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command, cwd=tmp_path, check=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    open_corpus(tmp_path / "out", verify=True)


@pytest.mark.slow
def test_one_line_of_50_megabytes(tokenizer, tmp_path):
    line = b"the value of an expression is what it gives " * (50 * 1_000_000 // 44)
    (tmp_path / "line.txt").write_bytes(line)
    manifest = prepare(tmp_path / "line.txt", tokenizer, tmp_path / "out", workers=1)
    assert manifest["counts"]["documents_cut"] in (2, 3)
    corpus = open_corpus(tmp_path / "out")
    words = len(line) // 44 * 9
    assert manifest["tokens"] >= words
    assert np.diff(corpus.sentence_ends).max() < 10_000


def test_full_disk_says_so_and_a_second_run_finishes(corpus_file, tokenizer, tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def fsync(number):
        if "/shards/" in os.readlink(f"/proc/self/fd/{number}"):
            calls.append(number)
        if len(calls) == 3:
            calls.append(number)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"No space left.*/out/shards/00000002\.safetensors"):
        prepare(corpus_file, tokenizer, tmp_path / "out", workers=1, unit_bytes=100_000)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert len(list((tmp_path / "out" / "shards").iterdir())) == 2  # and nothing half written beside them
    prepare(corpus_file, tokenizer, tmp_path / "out", workers=1, unit_bytes=100_000)
    prepare(corpus_file, tokenizer, tmp_path / "whole", workers=1, unit_bytes=100_000)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_no_room_for_the_index(corpus_file, tokenizer, tmp_path):
    """A limit on a file's size stops the index alone, as a full disk would."""
    prepare(corpus_file, tokenizer, tmp_path, workers=1, unit_bytes=8_000)
    whole = contents(tmp_path)
    for name in ("manifest.json", "sentence_ends.npy", "documents.npy"):
        (tmp_path / name).unlink()
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*\.npy"):
            shards.finish(tmp_path, len(whole) - 3, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "settings.json", "shards", "tokenizer"]
    prepare(corpus_file, tokenizer, tmp_path, workers=1, unit_bytes=8_000)
    assert contents(tmp_path) == whole


def test_output_that_is_a_file(corpus_file, tokenizer, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OSError, match="out"):
        prepare(corpus_file, tokenizer, tmp_path / "out", workers=1)
    assert (tmp_path / "out").read_text() == "mine"


def test_vocabulary_without_mask_and_single_sentence(tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("One sentence.")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\none\n")
    with pytest.raises(ValueError, match=r"lacks \[MASK\]"):
        prepare(tmp_path / "text.txt", tmp_path / "vocab.txt", tmp_path / "out", workers=1)
    assert not (tmp_path / "out" / "shards").exists()
    prepare(tmp_path / "text.txt", tokenizer, tmp_path / "out", workers=1)
    assert read_manifest(tmp_path / "out")["sentences"] == 1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(documents, tokenizer, tmp_path):
    """Peak resident memory of a run of one process, with units and documents so small that little is held."""
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    script = """
import resource, sys
from bert_fast.data import prepare
prepare(sys.argv[1], "tokenizer", sys.argv[2], workers=1, unit_bytes=100_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # KiB
"""
    texts = [" ".join(document).replace("\n", " ") for document in documents]
    peaks = []
    for copies in (4, 32):
        corpus = tmp_path / f"{copies}.txt"
        with corpus.open("w") as file:
            for copy in range(copies):
                file.writelines(f"{copy}. {text}\n\n" for text in texts)
        command = [sys.executable, "-c", script, str(corpus), str(tmp_path / f"out{copies}")]
        peaks.append(int(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout))
    assert corpus.stat().st_size > 12_000_000
    assert peaks[1] - peaks[0] < 6_000
