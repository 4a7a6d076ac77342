"""The command line as such: help, exit codes, one-line errors, output modes."""

import io
import json
import math
import os
import signal
import subprocess
import sys

import pytest

from bert_fast.cli import COMMANDS, build_parser
from bert_fast.cli import env as env_command
from bert_fast.output import Output, writable_folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(run, command):
    done = run(command, "--help")
    assert done.code == 0
    assert "examples:" in done.out
    assert f"bert-fast {command}" in done.out.partition("examples:")[2]
    assert "--quiet" in done.out
    assert "--json" in done.out


def test_help_tells_every_default(run):
    def told(command: str) -> str:
        return " ".join(run(command, "--help").out.split())

    assert "of pairs and masks (default: 0)" in told("evaluate")
    assert "(default: all)" in told("prepare")
    assert "sentences of one document [default: --nsp]" in told("pretrain")
    assert "mask whole words [default: --no-whole-word]" in told("pretrain")


def test_help_and_wrong_usage_import_nothing_heavy():
    code = """
import sys
from bert_fast.cli import main
assert main(["--help"]) == 0
assert main(["prepare", "x", "--colour", "red"]) == 2
heavy = {"torch", "transformers", "numpy", "tokenizers", "matplotlib", "rich"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ([], "COMMAND"),
        (["dance"], "dance"),
        (["prepare", "x", "--tokenizer", "t", "--out", "o", "--colour"], "--colour"),
        (["prepare", "x", "--out", "o"], "--tokenizer"),
        (["prepare", "x", "--tokenizer", "t", "--out", "o", "--shard", "2/2"], "--shard"),
        (["prepare", "x", "--tokenizer", "t", "--out", "o", "--shard", "half"], "I/N"),
        (["prepare", "x", "--tokenizer", "t", "--out", "o", "--workers", "x"], "'x' is no whole number of at least 1"),
        (["prepare", "x", "--tokenizer", "t", "--out", "o", "--language", "German"], "'German' is no code"),
        (["prepare", "x", "--tokenizer", "t", "--out", "o", "--language", "de_AT"], "'de_AT' is no code"),
        (["tokenizer", "x", "--out", "o", "--vocab-size", "many"], "--vocab-size"),
        (["tokenizer", "x", "--out", "o", "--vocab-size", "0"], "--vocab-size: '0' is no whole number of at least 1"),
        (["tokenizer", "x", "--out", "o", "--min-frequency", "-1"], "--min-frequency"),
        (["encode", "m", "--pooling", "middle"], "--pooling"),
        (["encode", "m", "--batch-tokens", "0"], "--batch-tokens"),
        (["evaluate", "m", "--data", "d", "--max-sequences", "0"], "--max-sequences"),
        (["evaluate", "m", "--data", "d", "--batch-tokens", "0"], "--batch-tokens"),
        (["fill-mask", "m", "a [MASK]", "--top-k", "0"], "--top-k"),
        (["finetune", "m", "--train", "t", "--validation", "v", "--batch-size", "0"], "--batch-size"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(run, argv, word):
    done = run(*argv)
    assert done.code == 2
    assert done.out == ""
    assert done.err.count("\n") == 1
    assert word in done.err
    assert "--help" in done.err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["fill-mask", "m", "--top-k", "3", "a [MASK]", "b [MASK]"], {"model": "m", "text": ["a [MASK]", "b [MASK]"]}),
        (["fill-mask", "--json", "m"], {"model": "m", "text": [], "json": True}),
        (["encode", "m", "--out", "v.npy", "in.txt"], {"model": "m", "file": "in.txt", "out": "v.npy"}),
        (["encode", "m"], {"model": "m", "file": None}),
        (["plot", "a", "--out", "p.png", "b"], {"runs": ["a", "b"], "out": "p.png"}),
        (
            ["tokenizer", "a", "--vocab-size", "30522", "b", "--out", "t", "-q"],
            {"corpus": ["a", "b"], "quiet": True, "vocab_size": 30522, "cased": False},
        ),
    ],
)
def test_options_may_stand_between_files_and_texts(argv, expected):
    options = vars(build_parser().parse_args(argv))
    assert {key: options[key] for key in expected} == expected


def failing(error):
    def run(options):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("the corpus\nis empty"), 1, "bert-fast env: error: the corpus is empty\n"),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), 1, "x.txt: No such file or directory\n"),
        (RuntimeError("matrix"), 1, "RuntimeError: matrix (unexpected: BERT_FAST_DEBUG=1 shows where it came from)\n"),
        (KeyError("x"), 1, "KeyError"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_is_one_line_with_its_exit_code(run, monkeypatch, error, code, text):
    monkeypatch.setattr(env_command, "run", failing(error))
    done = run("env")
    assert done.code == code
    assert text in done.err
    assert done.err.count("\n") == 1
    assert done.out == ""


def test_debugging_shows_the_traceback(run, monkeypatch):
    monkeypatch.setattr(env_command, "run", failing(ValueError("deep")))
    monkeypatch.setenv("BERT_FAST_DEBUG", "1")
    with pytest.raises(ValueError, match="deep"):
        run("env")


def test_sigterm_unwinds_and_gives_143(run, monkeypatch):
    unwound = []

    def command(options):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            unwound.append(True)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(env_command, "run", command)
    assert run("env").code == 143
    assert unwound == [True]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_closed_pipe_ends_the_command_without_a_word():
    code = "from bert_fast.output import Output\nimport sys, bert_fast.cli as c, bert_fast.cli.env as e\n"
    code += "def run(o):\n  while True: Output.of(o).result({}, 'line')\n"
    code += "e.run = run\nsys.exit(c.main(['env']))"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "line\n"
    child.stdout.close()
    assert child.stderr.read() == ""
    assert child.wait() == 1


def test_env_prints_the_report(run):
    assert "operators" in run("env").out
    report = run("env", "--json").result
    assert report["versions"]["bert_fast"]
    assert report["operators"]["attention"]["cpu"]


def test_output_modes(capsys):
    def talk(**mode):
        output = Output(command="talk", **mode)
        output.note("a note")
        output.warn("a warning")
        output.result({"loss": 1.5, "worst": [math.nan, {"x": math.inf}]}, "loss 1.5")
        return capsys.readouterr()

    assert talk() == ("loss 1.5\n", "a note\nbert-fast talk: warning: a warning\n")
    assert talk(quiet=True) == ("loss 1.5\n", "bert-fast talk: warning: a warning\n")
    assert talk(silent=True) == ("", "")
    result = {"kind": "result", "loss": 1.5, "worst": [None, {"x": None}]}
    out, err = talk(json=True)
    note, warning = {"kind": "note", "text": "a note"}, {"kind": "warning", "text": "a warning"}
    assert [json.loads(line) for line in out.splitlines()] == [note, warning, result]
    out, quiet_err = talk(json=True, quiet=True)
    assert [json.loads(line) for line in out.splitlines()] == [warning, result]
    assert err == quiet_err == ""


@pytest.mark.parametrize(("total", "left"), [(10, "left"), (None, "")])
def test_progress_has_rate_and_time_left(capsys, monkeypatch, total, left):
    clock = iter(range(0, 10_000, 15))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with Output().progress(total, "walking", "steps", done=2) as bar:
        bar.advance(3, "loss 0.5", loss=0.5)
        assert bar.rate > 0
    out, err = capsys.readouterr()
    assert out == ""
    line = err.splitlines()[0]
    assert line.startswith("walking 5 of 10 steps  0." if total else "walking 5 steps  0.")
    assert "steps/s" in line
    assert ("left" in line) == bool(left)
    assert line.endswith("loss 0.5")


def test_progress_in_the_other_modes(capsys):
    with Output(quiet=True).progress(2, "walking", "steps") as bar:
        bar.advance()
    assert capsys.readouterr() == ("", "")
    with Output(json=True).progress(2e6, "reading", "bytes") as bar:
        bar.advance(5e5, "text", documents=3)
        bar.advance(1.5e6, "text", documents=7)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["kind"] for line in lines] == ["progress", "progress"]
    assert lines[-1] | {"rate": 0, "seconds_left": 0} == {
        "kind": "progress", "what": "reading", "unit": "bytes", "done": 2e6, "total": 2e6, "rate": 0,
        "seconds_left": 0, "documents": 7,
    }  # fmt: skip


def test_progress_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", Terminal())
    output = Output()
    with output.progress(2e6, "reading", "bytes") as bar:
        bar.advance(1e6, "1 document")
        output.note("a note above the bar")
        bar.advance(1e6, "2 documents")
    shown = sys.stderr.getvalue()
    assert "a note above the bar" in shown
    assert "2.0 of 2.0 MB" in shown
    assert "MB/s" in shown
    assert "2 documents" in shown


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    assert writable_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        writable_folder(tmp_path / "file")
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "fixed").mkdir(mode=0o555)
        with pytest.raises(PermissionError, match="fixed"):
            writable_folder(tmp_path / "fixed")
