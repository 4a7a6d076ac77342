"""What a command prints: results on stdout, progress and notes on stderr; or JSON lines, or as little as possible."""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bert_fast import extras
from bert_fast.text import well_formed

# Seconds between two lines of progress where stderr is a file or a pipe, and between two in JSON mode.
LINE_EVERY = 10.0
JSON_EVERY = 1.0


def add_command(
    subparsers, name: str, run: Callable[[argparse.Namespace], int | None], summary: str, *, details: str, examples: str
) -> argparse.ArgumentParser:
    """A sub-command's parser with --quiet and --json; its --help ends with ``examples``."""
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. {details}",
        epilog=f"examples:\n{_indented(examples)}",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    printing = parser.add_argument_group("output")
    printing.add_argument("-q", "--quiet", action="store_true", help="no progress and no notes: the result alone")
    printing.add_argument("--json", action="store_true", help='JSON lines on stdout, each with its "kind"')
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Wraps the description, keeps the examples' lines, and shows defaults that are not empty."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:\n"):
            return "".join(indent + line for line in text.splitlines(keepends=True))
        return super()._fill_text(text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False or isinstance(action.default, list):
            return action.help or ""
        return super()._get_help_string(action) or ""


def _indented(examples: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in examples.strip().splitlines())


class Output:
    """Prints for one command, in the mode that its options ask for.

    normal   results on stdout, progress (rich) and notes on stderr
    quiet    results on stdout; on stderr warnings alone
    json     JSON lines on stdout: {"kind": "progress" | "note" | "warning" | "error" | "result" or what the result
             names, ...}; with quiet, results, errors and warnings alone. Numbers that JSON cannot say (NaN,
             infinity) are null.

    A process that must not speak (a rank other than the first) uses ``Output(silent=True)``.
    """

    def __init__(self, *, quiet: bool = False, json: bool = False, silent: bool = False, command: str = ""):
        self.quiet, self.json, self.silent, self.command = quiet, json, silent, command
        self._bar: Progress | None = None

    @classmethod
    def of(cls, options: argparse.Namespace, *, silent: bool = False) -> "Output":
        """The output that parsed ``options`` (see :func:`add_command`) ask for."""
        return cls(quiet=options.quiet, json=options.json, silent=silent, command=options.command)

    def result(self, facts: dict, text: str | None = None) -> None:
        """What was asked for: ``text`` in the normal and quiet modes (nothing where None), ``facts`` as JSON."""
        if self.silent:
            return
        if self.json:
            self.json_line({"kind": "result"} | facts)
        elif text is not None:
            self._aside(lambda: print(well_formed(text)[0], flush=True))

    def note(self, text: str) -> None:
        """What is good to know while it runs."""
        if self.silent or self.quiet:
            return
        if self.json:
            self.json_line({"kind": "note", "text": text})
        else:
            self._aside(lambda: print(text, file=sys.stderr, flush=True))

    def error(self, facts: dict, text: str) -> None:
        """One of many results that failed, while the command goes on to the others."""
        if self.silent:
            return
        if self.json:
            self.json_line({"kind": "error"} | facts)
        else:
            self._aside(lambda: print(f"bert-fast {self.command}: error: {text}", file=sys.stderr, flush=True))

    def warn(self, text: str) -> None:
        """What a user must know although the command goes on."""
        if self.silent:
            return
        if self.json:
            self.json_line({"kind": "warning", "text": text})
        else:
            self._aside(lambda: print(f"bert-fast {self.command}: warning: {text}", file=sys.stderr, flush=True))

    @contextmanager
    def progress(self, total: float | None, what: str, unit: str, *, done: float = 0) -> Iterator["Progress"]:
        """A :class:`Progress` of ``total`` units (None: not known), ``done`` of them before this run.

        ``unit`` is a plural such as "steps"; "bytes" are shown as MB.
        """
        if self.silent or self.quiet:
            yield Progress(total, what, unit, done)
            return
        if self.json:
            bar: Progress = _JsonProgress(total, what, unit, done, self.json_line)
        elif sys.stderr.isatty():
            bar = _TerminalProgress(total, what, unit, done)
        else:
            bar = _LineProgress(total, what, unit, done)
        before, self._bar = self._bar, bar
        try:
            bar.start()
            yield bar
        finally:
            bar.stop()
            self._bar = before

    def _aside(self, write: Callable[[], None]) -> None:
        """Prints above a live bar, not into it."""
        if self._bar is None:
            write()
        else:
            self._bar.aside(write)

    @staticmethod
    def json_line(facts: dict) -> None:
        """One JSON line on stdout, whatever the mode: for results that have no other form."""
        print(well_formed(json.dumps(_finite(facts), ensure_ascii=False, allow_nan=False))[0], flush=True)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Progress:
    """How far a task is. This one keeps count and shows nothing; its subclasses show it."""

    def __init__(self, total: float | None, what: str, unit: str, done: float = 0):
        self.total, self.what, self.unit = total, what, unit
        self.done, self.text = done, ""
        self.facts: dict[str, Any] = {}
        self._began, self._done_before = time.monotonic(), done

    def advance(self, units: float = 1, text: str | None = None, **facts) -> None:
        """``units`` more are done; ``text`` (losses, counts) is shown beside, ``facts`` go into a JSON line."""
        self.update(self.done + units, text, **facts)

    def update(self, done: float, text: str | None = None, **facts) -> None:
        """``done`` units are done in all."""
        self.done = done
        self.text = self.text if text is None else text
        self.facts = facts or self.facts
        self.show()

    @property
    def rate(self) -> float:
        """Units a second, of this run."""
        return (self.done - self._done_before) / max(time.monotonic() - self._began, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """None where the total or the rate is not known."""
        if self.total is None or self.done <= self._done_before:
            return None
        return max(self.total - self.done, 0) / self.rate

    def start(self) -> None:
        """Begins to show."""

    def show(self) -> None:
        """Shows the new state, as often as is fit."""

    def stop(self) -> None:
        """Shows the last state."""

    def aside(self, write: Callable[[], None]) -> None:
        """Calls ``write``, which prints, so that it does not disturb what is shown."""
        write()

    def line(self) -> str:
        """The state in one line."""
        parts = [f"{self.what} {_count(self.done, self.unit, self.total)}", f"{_rate(self.rate, self.unit)}"]
        if self.total is not None and self.done >= self.total:
            parts.append(f"in {_duration(time.monotonic() - self._began)}")
        elif self.seconds_left is not None:
            parts.append(f"{_duration(self.seconds_left)} left")
        return "  ".join([*parts, self.text]).rstrip()


class _TimedProgress(Progress):
    """Prints the state at most every ``every`` seconds, and the last one where it has not been printed."""

    every: float

    def __init__(self, total, what, unit, done):
        super().__init__(total, what, unit, done)
        self._shown_at, self._shown = -math.inf, None

    def show(self) -> None:
        if time.monotonic() - self._shown_at >= self.every:
            self._print()

    def stop(self) -> None:
        if self.done != self._shown and self.done > self._done_before:
            self._print()

    def _print(self) -> None:
        self._shown_at, self._shown = time.monotonic(), self.done
        self.write()

    def write(self) -> None:
        """Prints the state."""
        raise NotImplementedError


class _LineProgress(_TimedProgress):
    """A plain line on stderr every ten seconds and at the end: stderr is a file or a pipe."""

    every = LINE_EVERY

    def start(self) -> None:
        self._shown_at = time.monotonic()

    def write(self) -> None:
        print(self.line(), file=sys.stderr, flush=True)


class _JsonProgress(_TimedProgress):
    """{"kind": "progress", "what", "unit", "done", "total", "rate", "seconds_left", ...} at most once a second."""

    every = JSON_EVERY

    def __init__(self, total, what, unit, done, write: Callable[[dict], None]):
        super().__init__(total, what, unit, done)
        self._write = write

    def write(self) -> None:
        state = {"what": self.what, "unit": self.unit, "done": self.done, "total": self.total}
        state |= {"rate": round(self.rate, 3), "seconds_left": _rounded(self.seconds_left)}
        self._write({"kind": "progress"} | state | self.facts)


class _TerminalProgress(Progress):
    """A live bar on a terminal."""

    def start(self) -> None:
        rich, console = extras.load("rich.progress"), extras.load("rich.console").Console(stderr=True)
        columns = [rich.TextColumn("{task.description}"), rich.BarColumn() if self.total else rich.SpinnerColumn()]
        columns.append(rich.TextColumn("{task.fields[state]}", markup=False))
        self._bars = rich.Progress(*columns, console=console, transient=False)
        self._task = self._bars.add_task(self.what, total=self.total, completed=self.done, state="")
        self._bars.start()

    def show(self) -> None:
        self._bars.update(self._task, completed=self.done, state=self.line().removeprefix(f"{self.what} "))

    def stop(self) -> None:
        self._bars.stop()

    def aside(self, write: Callable[[], None]) -> None:
        self._bars.stop()
        write()
        self._bars.start()


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def _count(done: float, unit: str, total: float | None) -> str:
    scale, name, digits = (1e6, "MB", 1) if unit == "bytes" else (1, unit, 0)
    of = "" if total is None else f" of {total / scale:,.{digits}f}"
    return f"{done / scale:,.{digits}f}{of} {name}"


def _rate(rate: float, unit: str) -> str:
    if unit == "bytes":
        return f"{rate / 1e6:,.2f} MB/s"
    return f"{rate:,.0f} {unit}/s" if rate >= 20 else f"{rate:.2f} {unit}/s"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def writable_folder(path: str | Path) -> Path:
    """Makes the folder and checks that files can be made in it, before any work is done; OSError that names it."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        pass
    return path
