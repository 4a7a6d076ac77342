"""The command line ``bert-fast``: one module a command, each with ``add_parser(subparsers)`` and ``run(options)``.

Exit codes: 0 done; 1 failed for a reason that the message gives; 2 wrong usage; 3 training stopped because losses
were not finite; 130 Ctrl-C; 138 SIGUSR1 (pretrain); 143 SIGTERM. An error is one line on stderr; ``BERT_FAST_DEBUG=1``
shows where it came from. A command's module imports torch and the rest inside ``run``, so ``--help`` answers at once.
"""

import argparse
import importlib
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from bert_fast import __version__, extras

FAILED, USAGE, NOT_FINITE, INTERRUPTED, TERMINATED = 1, 2, 3, 130, 143

# How DataLoader reports an error of one of its processes, before the traceback.
IN_A_WORKER = re.compile(r"Caught \w+ in DataLoader worker process ")

# In the order in which they are used; the name of a command is that of its module, with "-" for "_".
COMMANDS = (
    "tokenizer",
    "prepare",
    "tune",
    "pretrain",
    "plot",
    "evaluate",
    "fill-mask",
    "encode",
    "export",
    "finetune",
    "predict",
    "glue",
    "verify",
    "env",
)

EPILOG = """\
from text to a filled mask:
  bert-fast tokenizer corpus/ --vocab-size 30522 --out tok
  bert-fast prepare corpus/ --tokenizer tok --out data
  bert-fast pretrain --data data --out run --model base
  bert-fast fill-mask run "The capital of France is [MASK]."

bert-fast COMMAND --help explains a command, with examples. Exit codes: 0 done, 1 failed (the message says why),
2 wrong usage, 3 stopped because losses were not finite, 130 Ctrl-C, 138 SIGUSR1 (pretrain), 143 SIGTERM.
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and that takes options between a command's files and texts."""

    _intermixing = False

    def parse_known_args(self, args=None, namespace=None):
        """Plain argparse takes `MODEL --top-k 3 TEXT` for a command without TEXT, and TEXT for a mistake."""
        if self._subparsers is not None or self._intermixing:  # the second: called by the method below
            return super().parse_known_args(args, namespace)
        self._intermixing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._intermixing = False

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class Terminated(BaseException):
    """SIGTERM arrived: unwinds like KeyboardInterrupt, so that worker processes end and files are closed."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(
        prog="bert-fast",
        description="Pre-train BERT fast: from raw text to a checkpoint that transformers loads.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"bert_fast {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for name in COMMANDS:
        importlib.import_module(f"{__name__}.{name.replace('-', '_')}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        options = build_parser().parse_args(argv)
    except SystemExit as stop:  # --help, --version and wrong usage
        return int(stop.code or 0)
    try:
        with _sigterm_unwinds():
            return options.run(options) or 0
    except KeyboardInterrupt:
        print(f"bert-fast {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Terminated:
        print(f"bert-fast {options.command}: terminated", file=sys.stderr)
        return TERMINATED
    except BrokenPipeError:  # the reader of a pipe has gone (`| head`), and messages with it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:  # whatever it is, a user gets one line and an exit code; the traceback on demand
        if os.environ.get("BERT_FAST_DEBUG"):
            raise
        print(f"bert-fast {options.command}: error: {_one_line(error)}", file=sys.stderr)
        return FAILED


def _one_line(error: Exception) -> str:
    text = str(error)
    if IN_A_WORKER.match(text):  # DataLoader appends the traceback; the message is its last line
        text = text.rstrip().rpartition("\n")[2].partition(": ")[2]
    message = " ".join(text.split())
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    if isinstance(error, (OSError, ValueError, extras.ExtraMissing)) and message:
        return message
    return f"{type(error).__name__}: {message} (unexpected: BERT_FAST_DEBUG=1 shows where it came from)"


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Turns SIGTERM into :class:`Terminated` meanwhile; a command may install its own handler on top."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread
        return

    def unwind(signum, frame):
        raise Terminated

    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
