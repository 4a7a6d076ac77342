"""bert-fast tokenizer and bert-fast prepare, and what they say of a bad corpus."""

import errno
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import transformers

from bert_fast import data

TEXT = "The quick brown fox jumps over the lazy dog.\nÉcole crème.\n\nPack my box with five dozen jugs. It is full.\n"


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_tokenizer_is_what_transformers_loads(run, folder):
    tokenizer = data.load_tokenizer(folder / "tok")
    text = "The assert statement: école [MASK]."
    assert transformers.BertTokenizerFast.from_pretrained(folder / "tok")(text).input_ids == tokenizer.encode(text).ids


def test_tokenizer_reports_what_it_made(run, corpus, tmp_path):
    done = run("tokenizer", corpus, "--vocab-size", 80, "--min-frequency", 1, "--out", tmp_path / "t", "--json")
    assert done.code == 0
    assert done.err == ""
    found = done.result
    assert found["documents"] == 2
    assert found["bytes"] == len(TEXT.encode()) - 3  # without the blank line and the last line's end
    assert found["vocab_size"] == data.load_tokenizer(tmp_path / "t").get_vocab_size() <= 80
    assert any(line["kind"] == "progress" for line in done.lines)


@pytest.mark.parametrize(
    ("flags", "there", "missing"), [((), "et", "éÉ"), (("--cased",), "ÉT", "é"), (("--keep-accents",), "ét", "É")]
)
def test_tokenizer_keeps_case_and_accents_where_asked(run, corpus, tmp_path, flags, there, missing):
    out = tmp_path / "t"
    assert run("tokenizer", corpus, "--min-frequency", 1, "--out", out, *flags).code == 0
    alphabet = set(data.load_tokenizer(out).get_vocab())
    assert set(there) <= alphabet
    assert not set(missing) & alphabet


@pytest.mark.parametrize(
    ("text", "flags", "kind", "said", "facts"),
    [
        (TEXT, ("--vocab-size", 30), "warning", "different ones) are in no piece", "characters_dropped"),
        (TEXT + "\u7684" * 9, ("--limit-alphabet", 3), "warning", "--limit-alphabet", "alphabet_dropped"),
        ("the dog. " * 800 + "z" * 2, ("--limit-alphabet", 7), "note", "2 characters (0.04%)", "characters_dropped"),
        (TEXT * 999 + "x" * 101, (), "note", ") are in 1 words of more than 100", "long_words"),
        ("x" * 101 + " " + TEXT, (), "warning", "101 characters (", "long_word_characters"),
        ("\u0939\u093f\u0928\u094d\u0926\u0940", (), "warning", "--keep-accents` keeps them", "marks_stripped"),
        (TEXT, ("--min-frequency", 9), "note", "pieces, not 30,522: no other pair", "vocab_size"),
    ],
)  # fmt: skip
def test_tokenizer_says_what_of_the_text_is_lost(run, tmp_path, text, flags, kind, said, facts):
    (tmp_path / "c.txt").write_text(text, encoding="utf-8")
    done = run("tokenizer", tmp_path / "c.txt", "--out", tmp_path / "t", *flags, "--json")
    assert done.code == 0
    assert [line["kind"] for line in done.lines if said in line.get("text", "")] == [kind]
    found = done.result
    assert (found["counts"] | found)[facts] > 0
    shown = run("tokenizer", tmp_path / "c.txt", "--out", tmp_path / "t", *flags, "--overwrite")
    assert said in shown.err


def test_tokenizer_says_nothing_where_nothing_is_lost(run, folder, tmp_path):
    done = run("tokenizer", folder / "corpus.jsonl", "--vocab-size", 600, "--out", tmp_path / "t")
    assert not [line for line in done.err.splitlines() if not line.startswith("reading")]


def test_tokenizer_does_not_replace_another_unasked(run, corpus, folder, tmp_path):
    out = tmp_path / "t"
    assert run("tokenizer", corpus, "--out", out).code == 0
    before = (out / "tokenizer.json").read_bytes()
    done = run("tokenizer", folder / "corpus.jsonl", "--out", out)
    assert done.code == 1
    assert "--overwrite" in done.err
    assert (out / "tokenizer.json").read_bytes() == before
    assert run("tokenizer", folder / "corpus.jsonl", "--out", out, "--overwrite").code == 0
    assert (out / "tokenizer.json").read_bytes() != before


def test_quiet_is_quiet(run, corpus, folder, tmp_path):
    for argv in (
        ("tokenizer", corpus, "--out", tmp_path / "t"),
        ("prepare", corpus, "--tokenizer", folder / "tok", "--out", tmp_path / "d", "--workers", 1),
    ):
        done = run(*argv, "--quiet")
        assert done.code == 0
        assert done.err == ""
        assert done.out


def test_prepare_counts_resumes_and_refuses_other_input(run, corpus, folder, tmp_path):
    (tmp_path / "again.txt").write_text(TEXT + "\nAnother document.\n", encoding="utf-8")
    argv = ("prepare", corpus, tmp_path / "again.txt", "--tokenizer", folder / "tok", "--out", tmp_path / "d",
            "--workers", 1)  # fmt: skip
    done = run(*argv)
    assert done.code == 0
    assert "3 documents" in done.out
    assert "2 duplicate documents dropped" in done.out
    assert "preparing" in done.err
    manifest = data.read_manifest(tmp_path / "d")
    again = run(*argv, "--json").result
    assert (again["shards_made"], again["shards_found"]) == (0, 1)
    assert again["tokens"] == manifest["tokens"]
    assert again["duplicate_documents"] == 2
    other = run(*argv, "--language", "de")
    assert other.code == 1
    assert "language was 'en', now 'de'" in other.err


def test_prepare_in_shards_is_prepare_at_once(run, folder, tmp_path, monkeypatch):
    argv = ("prepare", folder / "corpus.jsonl", "--tokenizer", folder / "tok", "--workers", 1, "--json", "--out")
    original = data.prepare
    monkeypatch.setattr(data, "prepare", lambda *a, **k: original(*a, **k, unit_bytes=8_000))
    whole = run(*argv, tmp_path / "whole").result
    assert whole["shards"] > 2
    parts = [run(*argv, tmp_path / "parts", "--shard", f"{i}/2").result for i in range(2)]
    assert [part["complete"] for part in parts] == [False, True]
    assert parts[1]["tokens"] == whole["tokens"]
    for path in (tmp_path / "whole" / "shards").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / "shards" / path.name).read_bytes()


def test_prepare_takes_a_plain_vocabulary_and_other_formats(run, folder, tmp_path):
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(json.dumps({"body": "Assert. That."}) + "\n" + json.dumps({"body": "Break now."}) + "\nbroken\n")
    argv = ("prepare", tmp_path / "c.jsonl.gz", "--text-field", "body", "--tokenizer", folder / "tok" / "vocab.txt",
            "--workers", 1, "--json")  # fmt: skip
    done = run(*argv, "--out", tmp_path / "d")
    assert done.result["documents"] == 2
    assert done.result["counts"]["invalid_json"] == 1
    assert any("JSON lines skipped" in line.get("text", "") for line in done.lines if line["kind"] == "warning")
    cased = run(*argv, "--cased", "--out", tmp_path / "cased").result
    assert cased["documents"] == 2
    tokens = [data.open_corpus(tmp_path / name).tokens for name in ("d", "cased")]
    assert tokens[0][0 : len(tokens[0])].tolist() != tokens[1][0 : len(tokens[1])].tolist()


def test_language_splits_sentences(run, folder, tmp_path):
    (tmp_path / "zh.txt").write_text("今天天气很好。我们去公园。\n", encoding="utf-8")
    done = run("prepare", tmp_path / "zh.txt", "--tokenizer", folder / "tok", "--language", "zh", "--workers", 1,
               "--out", tmp_path / "d", "--json")  # fmt: skip
    assert done.result["sentences"] == 2


def test_text_that_the_tokenizer_does_not_know_is_told(run, folder, tmp_path):
    (tmp_path / "ar.txt").write_text("ذهب الطبيب إلى المستشفى. قال نعم.\n", encoding="utf-8")
    argv = ("--tokenizer", folder / "tok", "--workers", 1, "--json")
    done = run("prepare", tmp_path / "ar.txt", *argv, "--out", tmp_path / "d")
    assert done.code == 0
    assert done.result["counts"]["unknown_tokens"] == 6  # all but two full stops
    unknown, marks = [line["text"] for line in done.lines if line["kind"] == "warning"]
    assert unknown.startswith("75.0% of the tokens are [UNK]")
    assert marks.startswith("1 characters (")  # the hamza of \u0625
    known = run("prepare", folder / "corpus.jsonl", *argv, "--out", tmp_path / "known")
    assert not [line for line in known.lines if line["kind"] == "warning"]


@pytest.mark.parametrize(
    ("text", "long", "told", "others"),
    [
        (f"A {'x' * 101} here. {'y' * 500} there.\n\n{'x' * 101}\n", 3, "warning: 3 words (", False),
        ("The value of the object. " * 99 + "z" * 101 + "\n", 1, "1 word (", False),
        ("\u0fd0 " * 9 + "the value of the object is here " * 9 + "z" * 101, 1, "warning: 1 word (", True),
    ],
)
def test_words_that_are_too_long_are_told_apart_from_other_unknown_ones(
    run, folder, tmp_path, text, long, told, others
):
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    argv = ("prepare", tmp_path / "long.txt", "--tokenizer", folder / "tok", "--workers", 1, "--out")
    counts = run(*argv, tmp_path / "d", "--json").result["counts"]
    assert counts["long_words"] == long
    lines = run(*argv, tmp_path / "e").err.splitlines()
    (line,) = [line for line in lines if "more characters than the tokenizer takes (BERT's: 100) became [UNK]" in line]
    assert line.removeprefix("bert-fast prepare: ").startswith(told)
    share = (counts["unknown_tokens"] - long) / counts["tokens"]
    assert any(f"{share:.1%} of the tokens are [UNK], of which" in line for line in lines) is others


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("workers", [1, 2])
def test_prepare_says_what_goes_with_the_accents(run, folder, tmp_path, form, workers):
    marked = unicodedata.normalize(form, "\u0439\u043e\u0433\u0443\u0440\u0442, \u0e17\u0e35\u0e48.")
    plain = "The value of the object is what it is. "
    (tmp_path / "few.txt").write_text(plain * 99 + marked, encoding="utf-8")
    (tmp_path / "many.txt").write_text("\n\n".join([plain, *(f"{n} {marked}" for n in range(9))]), encoding="utf-8")
    argv = ("--tokenizer", folder / "tok", "--workers", workers, "--json", "--out")
    for name, kind, number in (("few", "note", 3), ("many", "warning", 27)):
        done = run("prepare", tmp_path / f"{name}.txt", *argv, tmp_path / name)
        (told,) = [line for line in done.lines if "--keep-accents" in line.get("text", "")]
        counts = done.result["counts"]
        assert (told["kind"], counts["marks_stripped"]) == (kind, number)
        assert told["text"].startswith(f"{number} characters ({number / counts['text_characters']:.2%})")
        assert data.read_manifest(tmp_path / name)["counts"] == counts
    same = run("tokenizer", tmp_path / "many.txt", "--out", tmp_path / "stripped").err
    assert [line for line in same.splitlines() if f"warning: {told['text'][:30]}" in line]  # and the same share
    tokenizer = run("tokenizer", tmp_path / "many.txt", "--keep-accents", "--out", tmp_path / "kept")
    assert "--keep-accents" not in tokenizer.err
    kept = run("prepare", tmp_path / "many.txt", "--tokenizer", tmp_path / "kept", *argv[2:], tmp_path / "whole")
    assert "marks_stripped" not in kept.result["counts"]


def test_a_tokenizer_that_says_its_case_is_not_overruled(run, corpus, folder, tmp_path):
    argv = ("prepare", corpus, "--tokenizer", folder / "tok", "--workers", 1, "--out", tmp_path / "d")
    done = run(*argv, "--cased")
    assert done.code == 1
    assert "says itself that it is uncased, but cased was asked for" in done.err
    assert run(*argv, "--uncased").code == 0


BAD = {
    "missing": (None, "no corpus file"),
    "empty": (b"", "no "),
    "blank": (b" \n\n \n", "no "),
    "program": (b"\x7fELF\0\0\0\1" * 500, "is not text in UTF-8"),
    "utf16": (TEXT.encode("utf-16"), "is not text in UTF-8"),
    "packed": (b"BZh91AY&SY\xff\xfe" + bytes(range(1, 256)), "not UTF-8"),
    "latin1": ("élève à l'école".encode("latin-1"), "not UTF-8"),
}


@pytest.mark.parametrize("command", ["tokenizer", "prepare"])
@pytest.mark.parametrize("kind", BAD)
def test_bad_corpus_is_one_line_and_exit_code_1(run, folder, tmp_path, command, kind):
    content, message = BAD[kind]
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    more = ("--tokenizer", folder / "tok", "--workers", 1) if command == "prepare" else ()
    done = run(command, path, "--out", tmp_path / "out", *more, "--quiet")
    assert done.code == 1
    assert done.out == ""
    assert done.err.count("\n") == 1
    assert message in done.err
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_what_is_skipped_of_a_corpus_is_told(run, folder, tmp_path):
    path = tmp_path / "c.txt"
    path.write_bytes(TEXT.encode() + b"\n\nbad \xff bytes\n\nwith a \0 NUL byte\n")
    for argv in (("tokenizer", path), ("prepare", path, "--tokenizer", folder / "tok", "--workers", 1)):
        done = run(*argv, "--out", tmp_path / f"out-{argv[0]}", "--quiet")
        assert done.code == 0
        assert "1 documents skipped: not UTF-8" in done.err
        assert "1 documents with NUL bytes" in done.err


def test_places_of_what_is_skipped_are_told(run, folder, tmp_path):
    (tmp_path / "corpus").mkdir()
    path = tmp_path / "corpus" / "c.jsonl"
    path.write_text('{"text": "Fine."}\n' + '{"body": "x", "title": "y"}\n' * 7 + '{"text": "\\ud83d cut"}\n')
    (tmp_path / "corpus" / "none.txt").touch()
    lines = [f"{path}, line {number}: no 'text', but 'body', 'title'" for number in (2, 3, 4)]
    for command, *more in (("tokenizer",), ("prepare", "--tokenizer", folder / "tok", "--workers", 1)):
        argv = (command, tmp_path / "corpus", *more, "--out", tmp_path / f"out-{command}")
        done = run(*argv, "--quiet")
        assert f"({'; '.join(lines)}; and 4 more)" in done.err
        assert "1 documents with halves of surrogate pairs" in done.err
        assert f"1 files without text ({tmp_path / 'corpus' / 'none.txt'})" in done.err
        again = run(*argv, "--json", *(["--overwrite"] if command == "tokenizer" else []))
        assert again.result["places"]["invalid_json"] == lines
        assert again.result["counts"]["invalid_json"] == 7
        assert again.result["documents"] == 2


def test_what_cannot_be_used_at_all_is_told_by_place(run, folder, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"body": "x"}\n')
    for argv in (("tokenizer", path), ("prepare", path, "--tokenizer", folder / "tok", "--workers", 1)):
        done = run(*argv, "--out", tmp_path / f"out-{argv[0]}", "--quiet")
        assert done.code == 1
        assert f"{path}, line 1: no 'text', but 'body'" in done.err


@contextmanager
def written(pipe, content):
    """Writes to the pipe (a path or a descriptor) in another thread, as a process before `|` does."""

    def write():
        with open(pipe, "wb") as file:
            file.write(content)

    thread = threading.Thread(target=write)
    thread.start()
    yield
    thread.join()


def pipes(tmp_path, content):
    """stdin, a named pipe and that of a process substitution, each with how to fill it."""
    yield "-", {"stdin": content}, nullcontext()
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    yield pipe, {}, written(pipe, content)
    pipe.unlink()
    read, write = os.pipe()
    yield f"/dev/fd/{read}", {}, written(write, content)
    os.close(read)


@pytest.mark.parametrize("packed", [bytes, gzip.compress])
def test_a_pipe_gives_what_its_file_gives(run, folder, tmp_path, packed):
    content = (folder / "corpus.jsonl").read_bytes()
    make = ("--tokenizer", folder / "tok", "--workers", 1, "--json")
    file = run("prepare", folder / "corpus.jsonl", *make, "--out", tmp_path / "file").result
    for number, (path, stdin, filling) in enumerate(pipes(tmp_path, packed(content))):
        with filling:
            done = run("prepare", path, "--format", "jsonl", *make, "--out", tmp_path / f"data{number}", **stdin)
        assert {**done.result, "out": file["out"]} == file
        shards = [tmp_path / name / "shards" / "00000000.safetensors" for name in ("file", f"data{number}")]
        assert shards[0].read_bytes() == shards[1].read_bytes()
        assert data.read_manifest(tmp_path / f"data{number}")["made_by"]["files"] == [["-", None]]
    for number, (path, stdin, filling) in enumerate(pipes(tmp_path, packed(content))):
        out = tmp_path / f"tok{number}"
        with filling:
            done = run("tokenizer", path, "--format", "jsonl", "--vocab-size", 600, "--out", out, "--json", **stdin)
        assert (done.code, done.result["documents"]) == (0, 15)
        assert (out / "tokenizer.json").read_bytes() == (folder / "tok" / "tokenizer.json").read_bytes()


def test_a_pipe_goes_on_where_it_was_if_it_gives_the_same(run, folder, tmp_path, monkeypatch):
    content = (folder / "corpus.jsonl").read_bytes()
    argv = ("prepare", "-", "--format", "jsonl", "--tokenizer", folder / "tok", "--workers", 1, "--json", "--out")
    original = data.prepare
    monkeypatch.setattr(data, "prepare", lambda *a, **k: original(*a, **k, unit_bytes=8_000))
    whole = run(*argv, tmp_path / "whole", stdin=content).result
    assert run(*argv, tmp_path / "out", "--shard", "0/3", stdin=content).code == 0
    other = run(*argv, tmp_path / "out", stdin=content.replace(b" the ", b" thy "))
    assert other.code == 1
    assert "- changed since shard" in other.err
    done = run(*argv, tmp_path / "out", stdin=content).result
    assert done["shards_found"] == -(-whole["shards"] // 3) > 1
    for path in (tmp_path / "whole" / "shards").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / "shards" / path.name).read_bytes()


def test_a_pipe_without_text_or_with_parquet_is_an_error(run, folder, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["One. Two."]}), tmp_path / "x.parquet")
    content = (tmp_path / "x.parquet").read_bytes()
    make = ("prepare", "-", "--tokenizer", folder / "tok", "--workers", 1, "--out", tmp_path / "d")
    assert "1 files without text (-)" in run(*make).err
    (tmp_path / "d" / "settings.json").unlink()
    assert "-: Parquet is read from a plain file" in run(*make, stdin=content).err
    argv = ("tokenizer", "-", "--min-frequency", 1, "--out", tmp_path / "t", "--json")
    assert run(*argv, stdin=content).result["documents"] == 1  # of a copy


def test_folders_without_permission_and_links_to_nothing_are_errors(run, folder, tmp_path, monkeypatch):
    (tmp_path / "corpus" / "closed").mkdir(parents=True)
    (tmp_path / "corpus" / "a.txt").write_text(TEXT)
    scandir = os.scandir

    def as_for_others(path="."):  # root may read everything
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", as_for_others)
    for argv in (("tokenizer",), ("prepare", "--tokenizer", folder / "tok", "--workers", 1)):
        for corpus in (tmp_path / "corpus", tmp_path / "corpus" / "**"):
            done = run(argv[0], corpus, *argv[1:], "--out", tmp_path / "out", "--quiet")
            assert done.code == 1
            assert f"{tmp_path / 'corpus' / 'closed'}: Permission denied" in done.err


def test_vocabulary_without_mask_is_refused(run, corpus, tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe\n")
    done = run("prepare", corpus, "--tokenizer", tmp_path / "vocab.txt", "--out", tmp_path / "d")
    assert done.code == 1
    assert done.err.count("\n") == 1
    assert "[MASK]" in done.err
    assert not (tmp_path / "d").exists()


def test_a_vocabulary_without_room_is_refused(run, corpus, tmp_path):
    done = run("tokenizer", corpus, "--out", tmp_path / "t", "--vocab-size", 5, "--quiet")
    assert done.code == 1
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("command", ["tokenizer", "prepare"])
def test_output_folder_that_cannot_be_written(run, corpus, folder, tmp_path, command):
    (tmp_path / "file").write_text("kept")
    more = ("--tokenizer", folder / "tok") if command == "prepare" else ()
    done = run(command, corpus, "--out", tmp_path / "file" / "inside", *more)
    assert done.code == 1
    assert done.err.count("\n") == 1
    assert str(tmp_path / "file") in done.err
    assert (tmp_path / "file").read_text() == "kept"


# The command itself, with units so small that there is something to stop; held before its last step, it is never done
# too early. A shell's background jobs, and what they start, ignore SIGINT: not here.
PREPARE = """
import functools, os, signal, sys, time
from bert_fast import cli, data
signal.signal(signal.SIGINT, signal.default_int_handler)
if "HELD" in os.environ:
    sys.modules[data.prepare.__module__].finish = lambda *arguments: time.sleep(1000)
data.prepare = functools.partial(data.prepare, unit_bytes=4_000)
sys.exit(cli.main(sys.argv[1:]))
"""


LEARN = """
import signal, sys
from bert_fast import cli
from bert_fast.data import vocabulary
signal.signal(signal.SIGINT, signal.default_int_handler)
given = vocabulary._without_long_words
def told(*arguments):
    yield from given(*arguments)
    print("all is read", flush=True)
vocabulary._without_long_words = told
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_training_of_a_tokenizer(tmp_path, number, code):
    draw = random.Random(code)
    words = ("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=90)) for _ in range(60_000))
    (tmp_path / "c.txt").write_text("\n\n".join(words))  # minutes of work
    argv = [sys.executable, "-c", LEARN, "tokenizer", str(tmp_path / "c.txt"), "--out", str(tmp_path / "t"), "--quiet"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "all is read\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (code, "", 1)
    assert not list((tmp_path / "t").iterdir())


@pytest.fixture
def start(folder, tmp_path):
    """start() -> the command on 300 documents with two workers, as a process group of its own; tmp_path / "out".

    start(HELD="1") has one that does not end by itself.
    """
    lines = (folder / "corpus.jsonl").read_text().splitlines()
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(line.replace("the", f"the {n}", 3) for n in range(20) for line in lines))
    argv = ["prepare", corpus, "--tokenizer", folder / "tok", "--out", tmp_path / "out", "--workers", 2, "--quiet"]
    command = [sys.executable, "-c", PREPARE, *map(str, argv)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return lambda **more: subprocess.Popen(command, **pipes, env=os.environ | more, start_new_session=True)


def wait_for(what, process=None):
    """Until ``what()`` is true, and no longer than ``process`` lives."""
    until = time.monotonic() + 100
    while not what():
        assert process is None or process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.001)


def group_is_gone(number):
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_prepare_and_the_same_command_finishes_it(start, folder, tmp_path, number, code):
    out = tmp_path / "out"

    def workers_are_starting():
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        return len(children.split()) > 1

    def some_shards_are_made():
        return len(list(out.glob("shards/*.safetensors"))) > 2

    for moment in (workers_are_starting, some_shards_are_made):
        process = start(HELD="1")
        wait_for(moment, process)
        os.killpg(process.pid, number)
        assert process.communicate(timeout=100) == (
            "",
            "bert-fast prepare: stopped; the same command goes on from there\n",
        )
        assert process.returncode == code
        wait_for(lambda group=process.pid: group_is_gone(group))
        assert not (out / "manifest.json").exists()
        assert not list(out.rglob("*.aside"))
    process = start()
    assert process.communicate()[1] == ""
    assert process.returncode == 0
    data.prepare(tmp_path / "corpus.jsonl", folder / "tok", tmp_path / "whole", workers=1, unit_bytes=4_000)
    whole = {path.relative_to(tmp_path / "whole"): path.read_bytes() for path in (tmp_path / "whole").rglob("*.*")}
    assert len(whole) > 20
    assert whole == {path.relative_to(out): path.read_bytes() for path in out.rglob("*.*")}


@pytest.mark.parametrize("place", [".", "tok"])
def test_a_tokenizer_within_the_corpus_is_no_part_of_it(run, tmp_path, place):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    out = folder / place
    options = ("--vocab-size", 80, "--min-frequency", 1, "--out", out)
    assert run("tokenizer", folder, *options).code == 0
    first = (out / "tokenizer.json").read_bytes()
    again = run("tokenizer", folder, *options, "--overwrite", "--json")
    assert again.result["documents"] == 2
    assert (out / "tokenizer.json").read_bytes() == first
    for number, tokenizer in enumerate((out, out / "tokenizer.json", out / "vocab.txt")):
        made = run("prepare", folder, "--tokenizer", tokenizer, "--out", tmp_path / f"data{number}", "--json")
        assert (made.code, made.result["documents"], made.result["counts"].get("invalid_json")) == (0, 2, None)
    data.prepare(folder, out, tmp_path / "python", workers=1)
    assert data.read_manifest(tmp_path / "python")["documents"] == 2


def write_documents(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def warnings_of(done):
    return [line["text"] for line in done.lines if line["kind"] == "warning"]


def test_totals_and_copies_are_told(run, folder, tmp_path):
    own = [f"The object {n} is a value. It is returned by the function." for n in range(4)]
    corpus = write_documents(tmp_path / "c.jsonl", own + [text.upper().replace(". ", ".\r\n") for text in own * 2])
    argv = ("prepare", corpus, "--tokenizer", folder / "tok", "--workers", 1, "--out")
    done = run(*argv, tmp_path / "d")
    made = run(*argv, tmp_path / "json", "--json")
    found, manifest = made.result, data.read_manifest(tmp_path / "d")
    for key in ("documents", "duplicate_documents", "duplicate_tokens", "sentences", "tokens", "counts"):
        assert found[key] == manifest[key]
    assert (found["documents"], found["duplicate_documents"], found["sentences"]) == (4, 8, 8)
    assert found["duplicate_tokens"] == 2 * found["tokens"] == 2 * found["counts"]["tokens"]
    assert f"4 documents, 8 sentences, {found['tokens']:,} tokens in 1 shard" in done.out
    assert "8 duplicate documents dropped (66.7% of the tokens)" in done.out
    assert "0 documents of one sentence (0.0% of the tokens)" in done.out
    (warning,) = warnings_of(made)
    assert warning.startswith("66.7% of the documents were dropped, as they are copies of others")
    assert f"warning: {warning}" in done.err


def test_documents_of_one_sentence_are_told(run, folder, tmp_path):
    corpus = write_documents(
        tmp_path / "c.jsonl", ["The value is. It is not. It was."] * 2 + ["The value of the object"]
    )
    argv = ("prepare", corpus, "--tokenizer", folder / "tok", "--workers", 1, "--out")
    made = run(*argv, tmp_path / "json", "--json")
    (warning,) = warnings_of(made)
    share = made.result["one_sentence_tokens"] / made.result["tokens"]
    assert warning.startswith(f"50.0% of the documents are one sentence ({share:.1%} of the tokens): their pairs are")
    assert "--sentences lines" in warning
    assert f"1 document of one sentence ({share:.1%} of the tokens)" in run(*argv, tmp_path / "d").out


@pytest.mark.parametrize(("rule", "sentences"), [((), 4), (("--sentences", "lines"), 4), (("--sentences", "split"), 2)])
def test_sentences_end_where_asked(run, folder, tmp_path, rule, sentences):
    corpus = tmp_path / "c.txt"
    corpus.write_text("the value\nthe other one\n\nthe object\nthe function\n")
    argv = ("prepare", corpus, "--tokenizer", folder / "tok", "--workers", 1, "--out", tmp_path / "d", "--json")
    done = run(*argv, *rule)
    assert done.result["sentences"] == sentences
    assert bool(warnings_of(done)) == (sentences == 2)
    assert run(*argv, "--sentences", "line").code == 2


@pytest.fixture
def clock(monkeypatch):
    """clock.seconds pass between two looks at the clock of a dry run: none."""
    clock = SimpleNamespace(seconds=0.0, now=0.0)

    def look():
        clock.now += clock.seconds
        return clock.now

    monkeypatch.setattr("bert_fast.data.preview.time", SimpleNamespace(monotonic=look))
    return clock


@pytest.mark.usefixtures("clock")
def test_a_dry_run_shows_what_prepare_will_make(run, folder, tmp_path):
    """The same documents, sentences and tokens as prepare's, by source, and nothing is written."""
    (tmp_path / "a.txt").write_text("The cat sat. It was a cat!\nAnd a dog\n\nSecond text.\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "One here."}\nnone\n', encoding="utf-8")
    (tmp_path / "c.csv").write_text("body\nno text column\n", encoding="utf-8")
    sources = [tmp_path / "a.txt", tmp_path / "b.jsonl", folder / "corpus.jsonl"]
    before = sorted(tmp_path.rglob("*"))
    done = run("prepare", *sources, tmp_path / "c.csv", "--tokenizer", folder / "tok", "--dry-run", "--json")
    assert done.code == 1  # for the table's sake, which lacks the column
    assert [line["source"] for line in done.lines if line["kind"] == "error"] == [str(tmp_path / "c.csv")]
    assert sorted(tmp_path.rglob("*")) == before
    results = [line for line in done.lines if line["kind"] == "result"]
    assert [line["source"] for line in results] == [str(source) for source in sources]
    assert [line["whole"] for line in results] == [True, True, True]
    first = results[0]["documents"]
    assert [document["place"] for document in first] == [f"{tmp_path / 'a.txt'}, line {n}" for n in (1, 4)]
    assert [text for text, _ in first[0]["sentences"]] == ["The cat sat.", "It was a cat!", "And a dog"]
    tokenizer = data.load_tokenizer(folder / "tok")
    for document in first:
        for text, pieces in document["sentences"]:
            assert pieces == tokenizer.encode(text, add_special_tokens=False).tokens
    assert results[1]["read"]["invalid_json"] == 1
    for source, line in zip(sources, results, strict=True):
        made = tmp_path / f"of-{source.name}"
        assert run("prepare", source, "--tokenizer", folder / "tok", "--out", made, "--workers", 1, "--quiet").code == 0
        manifest = data.read_manifest(made)
        duplicates = manifest["duplicate_tokens"]
        assert line["read"]["documents"] == manifest["documents"] + manifest["duplicate_documents"]
        assert line["read"]["tokens"] == manifest["tokens"] + duplicates
        assert line["read"]["sentences"] == manifest["sentences"] or duplicates
    text = run("prepare", tmp_path / "a.txt", "--tokenizer", folder / "tok", "--dry-run").out
    assert "a.txt, line 4: 1 sentence\n    Second text.\n" in text
    assert "in all: 2 documents, 4 sentences" in text


def test_a_dry_run_stops_after_a_megabyte_or_two_seconds(run, folder, tmp_path, clock):
    (tmp_path / "long.txt").write_text("\n\n".join(f"Text number {n} is here." for n in range(60_000)))
    done = run("prepare", tmp_path / "long.txt", "--tokenizer", folder / "tok", "--dry-run", "--json")
    assert not done.result["whole"]
    assert done.result["read"]["bytes"] <= 1.01 * 2**20 < done.result["bytes"]
    text = run("prepare", tmp_path / "long.txt", "--tokenizer", folder / "tok", "--dry-run").out
    assert "million tokens" in text
    for clock.seconds, documents in ((0.75, 3), (60.0, 1)):  # the first document is shown, however long it took
        done = run("prepare", tmp_path / "long.txt", "--tokenizer", folder / "tok", "--dry-run", "--json")
        assert (done.result["read"]["documents"], done.result["whole"]) == (documents, False)


def test_a_dry_run_or_a_folder(run, folder):
    for given in ((), ("--dry-run", "--out", "d")):
        assert run("prepare", "x", "--tokenizer", folder / "tok", *given).code == 2
