"""What a person reads: tables, on a terminal or in Markdown, the picture of a run, and its progress."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

console = Console()
if not console.is_terminal:
    console = Console(width=160)  # a file or a log: wide enough for every column
STARTED = time.perf_counter()


@dataclass(frozen=True)
class Table:
    """Cells of text; the first column is aligned to the left, the others to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""

    @classmethod
    def of(cls, rows: Sequence[dict], columns: dict[str, Callable[[dict], str]], title: str = "") -> "Table":
        """A line for each of ``rows``; ``columns`` are what each is called and the text that it has of a row."""
        return cls(list(columns), [[text(row) for text in columns.values()] for row in rows], title)

    def markdown(self) -> str:
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        text = "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)
        return f"{self.title}\n\n{text}" if self.title else text

    def show(self) -> None:
        table = RichTable(title=self.title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
        for number, column in enumerate(self.header):
            table.add_column(column, justify="left" if number == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        console.print()


def number(value: float | None, digits: int = 3) -> str:
    """Three digits, and all those before the point."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def percent(value: float | None, digits: int = 0) -> str:
    return "" if value is None or value != value else f"{100 * value:.{digits}f} %"


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


# --------------------------------------------------------------------------------------------------------------
# Tables


def introduce(found: dict, device: str) -> None:
    """What runs here: versions, the machine and its limits, the operators' backends."""
    facts = found["environment"]
    versions, machine = facts["versions"], facts["machine"]
    console.print(f"[bold]bert_fast {versions['bert_fast']}[/bold], commit {found['commit']}, against transformers "
                  f"{versions['transformers']}, torch {versions['torch']}, Python {versions['python']}")  # fmt: skip
    name = facts["devices"][0] if device == "cuda" else machine["processor"]
    console.print(f"machine    {name}, {machine['threads']} threads, {machine['instruction set of torch']}")
    console.print(f"limits     {limits(found['limits'])}")
    console.print(f"operators  {', '.join(sorted({d[device] for d in facts['operators'].values()}))}")


def limits(found: dict) -> str:
    """What limits.py measured, in words."""
    parts = [f"matrix product {', '.join(f'{k} {number(v)}' for k, v in found['matmul_tflops'].items())} TFLOP/s"]
    for name, what, unit in (("copy_gbs", "copy", "GB/s"), ("launch_us", "a launch from the host", "us"),
                             ("graph_kernel_us", "a kernel after another in a graph", "us")):  # fmt: skip
        parts += [f"{what} {number(found[name])} {unit}"] if name in found else []
    return ", ".join(parts)


def parity(found: dict) -> Table:
    """Of a summary (parity.py) the rows nearest to their bound."""
    passed = found["compared"] - found["failed"]
    title = f"Parity, error against float64 (L2, relative): {passed} of {found['compared']} passed; the nearest to fail"
    return Table.of(found["worst"], {
        "loss or gradient": lambda x: " of ".join(filter(None, (x["what"], x.get("contender")))),
        **{name: lambda x, key=key: "" if x[key] is None else f"{x[key]:.2e}" for name, key in
           (("error", "error"), ("reference's", "reference_error"), ("bound", "bound"))},
        "": lambda x: "ok" if x["passed"] else "FAILED",
    }, title)  # fmt: skip


def size_of(row: dict) -> str:
    """BERT and its lengths as a row has them; an optimiser knows no sequences."""
    return f"{row['model']} {row['seq']}, {row['lengths']}" if row["seq"] else row["model"]


def name_of(row: dict) -> str:
    """A contender as a row has it, with the kernel that PyTorch picked for its attention."""
    name = row.get("key", row["contender"])
    return f"{name} ({row['attention']})" if row.get("attention") else name


def _spread(row: dict) -> str:
    return "{p50:.1f} ({p20:.1f}-{p80:.1f})".format(**{k: 1e3 * v for k, v in row["step_s"].items()})


STEP_COLUMNS: dict[str, Callable[[dict], str]] = {
    "lengths, dtype": lambda x: f"{x['lengths']}, {x['dtype']}",
    "BERT": lambda x: f"{size_of(x)}, {x['dtype']}, {x['optimizer']}",
    "contender": name_of,
    "padding": lambda x: x["padding"],
    "dtype": lambda x: x["dtype"],
    "sequences": lambda x: f"{x['sequences']}",
    "step ms (p20-p80)": _spread,
    "predicted": lambda x: "" if x.get("predicted_s") is None else f"{1e3 * x['predicted_s']:.1f}",
    "sequences/s": lambda x: f"{x['sequences_per_s']:.2f}",
    "real tokens/s": lambda x: f"{x['real_tokens_per_s']:.0f}",
    "TFLOP/s": lambda x: number(x["executed_tflops"]),
    "of the matrix rate": lambda x: percent(x["share_of_peak"]),
    "MFU": lambda x: percent(x["mfu"]),
    "peak MiB": lambda x: "" if x.get("peak_memory_mib") is None else f"{x['peak_memory_mib']:.0f}",
    "ours is": lambda x: times(x.get("ours_is")),
}
RUN = ("contender", "step ms (p20-p80)", "sequences/s", "real tokens/s", "TFLOP/s", "of the matrix rate", "MFU",
       "peak MiB", "ours is")  # fmt: skip
FINETUNE = ("contender", "padding", "dtype", *(column for column in RUN[1:] if column != "peak MiB"))
README = ("lengths, dtype", "contender", "sequences/s", "peak MiB", "ours is")
GPU = ("BERT", "contender", "sequences", "step ms (p20-p80)", "predicted", "sequences/s", "real tokens/s",
       "of the matrix rate", "MFU", "peak MiB", "ours is")  # fmt: skip
ALWAYS = ("lengths, dtype", "BERT", "contender", "sequences")  # also of what failed


def steps(rows: Sequence[dict], columns: Sequence[str] = RUN, title: str = "") -> Table:
    """A line for each row of steps.py; what failed says why. Of encoders the last column names our precision."""
    lines = []
    for x in rows:
        if "failed" in x:
            kept = [STEP_COLUMNS[c](x) if c in ALWAYS else "" for c in columns]
            kept[next(n for n, c in enumerate(columns) if c not in ALWAYS)] = x["failed"]
            lines.append(kept)
            continue
        lines.append([STEP_COLUMNS[c](x) for c in columns])
    own = next((x["dtype"] for x in rows if x["contender"] == "bert_fast" and x.get("mode") == "encode"), None)
    if own:
        columns = [f"ours ({own}) is" if c == "ours is" else c for c in columns]
    return Table(columns, lines, title)


def compared(runs: Sequence[tuple[str, Sequence[dict]]]) -> Table:
    """A line for each table of steps of each run (its device, its rows): ours, and what it is beside each other.

    A table begins with ours. But for pre-training each has its precision beside it, as a peer's may be another.
    """
    lines = []
    for device, rows in runs:
        starts = [n for n, x in enumerate(rows) if x["contender"] == "bert_fast"]
        for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
            ours, *others = rows[start:end]
            mode = ours.get("mode", "train")
            memory = [x["peak_memory_mib"] for x in others if x.get("peak_memory_mib")]
            peak = STEP_COLUMNS["peak MiB"](ours) + (f" ({min(memory):.0f} to {max(memory):.0f})" if memory else "")
            names = [f"{name_of(x)}, {x['dtype']}" if mode != "train" and x["dtype"] not in name_of(x) else name_of(x)
                     for x in others]  # fmt: skip
            ratios = [f"{name} {'failed' if 'failed' in x else times(x.get('ours_is'))}"
                      for name, x in zip(names, others, strict=True)]  # fmt: skip
            work = f"{mode} {ours['model']}, {ours['sequences']} x {ours['seq']}"
            work += f", {ours['lengths']}, {ours['dtype']}"
            work += "" if ours["optimizer"] == "none" else f", {ours['optimizer']}"
            cells = [STEP_COLUMNS[c](ours) for c in ("sequences/s", "real tokens/s", "of the matrix rate")]
            lines.append([device, work, *cells, peak, "; ".join(ratios)])
    header = ["device", "step", "sequences/s", "real tokens/s", "of the matrix rate", "peak MiB (others)", "ours is"]
    return Table(header, lines)


def operators(rows: Sequence[dict]) -> Table:
    """A line an operator, direction and size: ours, its share of the limit, what was predicted, and the others; and the
    sum of both directions, where some make in the one what others make in the other."""
    groups: dict[tuple, dict] = {}
    for x in rows:
        key = (x["model"], x["seq"], x["lengths"], x["operator"], x["direction"], x["dropout"])
        groups.setdefault(key, {})[x["contender"]] = x
    lines = []
    for (*size, operator, direction, dropout), found in groups.items():
        ours = found.get("bert_fast", {})
        x = next(iter(found.values()))
        cells = [size_of(x), f"{operator}, {direction}" + ("" if dropout or not x["seq"] else ", no dropout")]
        if "ms" in ours:
            rate = f"{number(ours['tflops'])} TFLOP/s" if "tflops" in ours else f"{number(ours['gbs'])} GB/s"
            predicted = number(1e3 * ours["predicted_ms"]) if ours.get("predicted_ms") else ""
            cells += [number(1e3 * ours["ms"]), predicted, rate, percent(ours["share_of_limit"])]
        else:
            cells += ["failed" if ours else "", "", "", ""]
        forward = groups.get((*size, operator, "forward", dropout), {}) if direction == "backward" else {}
        others = {name: "failed" if "failed" in x else beside(x["ms"], x.get("ours_is"))
                  for name, x in found.items() if name != "bert_fast"}  # fmt: skip
        lines.append([*cells, ", ".join(f"{name} {text}" for name, text in others.items())])
        if forward:
            sums = {n: x["ms"] + forward[n]["ms"] for n, x in found.items() if "ms" in x and "ms" in forward.get(n, {})}
            own = sums.pop("bert_fast", None)
            both = [f"{name} {beside(ms, ms / own if own else None)}" for name, ms in sums.items()]
            lines.append([cells[0], f"{operator}, both", number(1e3 * own) if own else "", "", "", "", ", ".join(both)])
    return Table(["BERT", "operator", "us", "predicted", "rate", "of the limit", "others, us (ours is)"], lines)


def beside(ms: float, ours_is: float | None) -> str:
    """The time of another in us, and how often it is ours."""
    return number(1e3 * ms) + (f" ({times(ours_is)})" if ours_is else "")


@contextlib.contextmanager
def picture(path: str | Path, x: str, y: str, size: tuple[float, float] = (8, 4.5)):
    """Axes to draw into; written to ``path`` at the end of the block."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=size)
    yield axis
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot(path: str | Path, groups: dict[str, list[dict]]) -> None:
    """A picture of throughput (real tokens/s) and peak memory by contender, one pair of panels a group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = {title: [row for row in rows if "failed" not in row] for title, rows in groups.items()}
    heights = [1.1 + 0.33 * len(rows) for rows in groups.values()]  # inches: names one below the other
    figure, axes = pyplot.subplots(
        len(groups), 2, figsize=(11, sum(heights)), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for (title, rows), (left, right) in zip(groups.items(), axes, strict=True):
        colors = ["#c0392b" if row["contender"].startswith("bert_fast") else "#7f8c8d" for row in rows]
        for axis, key, what in (
            (left, "real_tokens_per_s", "real tokens/s (more is better)"),
            (right, "peak_memory_mib", "peak memory, MiB (less is better)"),
        ):
            axis.set_visible(any(row.get(key) for row in rows))  # memory is measured of the first table alone
            axis.barh([name_of(row) for row in rows], [row.get(key) or 0 for row in rows], color=colors)
            axis.invert_yaxis()
            axis.set_xlabel(what)
            axis.spines[["top", "right"]].set_visible(False)
        left.set_title(title, loc="left", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


# --------------------------------------------------------------------------------------------------------------
# Progress


class Bar:
    """A progress bar on a terminal, a line for every new phase elsewhere."""

    def __enter__(self):
        self.live = console.is_terminal
        if self.live:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.progress = Progress(*columns, console=console, transient=True)
            self.progress.start()
            self.task = self.progress.add_task("", total=None)
        return self

    def __exit__(self, *_):
        if self.live:
            self.progress.stop()

    def phase(self, text: str, total: int | None = None) -> None:
        if self.live:
            self.progress.reset(self.task, description=text, total=total)
        else:
            print(f".. {time.perf_counter() - STARTED:3.0f} s  {text}", flush=True)

    def tick(self, _name: str) -> None:
        if self.live:
            self.progress.advance(self.task)
