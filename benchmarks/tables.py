"""What a person reads: tables, on a terminal or in Markdown, the picture of a run, and its progress."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    facts, rates = found["environment"], found["limits"]["matmul_tflops"]
    versions, machine = facts["versions"], facts["machine"]
    console.print(f"[bold]bert_fast {versions['bert_fast']}[/bold], commit {found['commit']}, against transformers "
                  f"{versions['transformers']}, torch {versions['torch']}, Python {versions['python']}")  # fmt: skip
    name = facts["devices"][0] if device == "cuda" else machine["processor"]
    console.print(f"machine    {name}, {machine['threads']} threads, {machine['instruction set of torch']}")
    shown = ", ".join(f"{name} {value:.3f} TFLOP/s" for name, value in rates.items())
    console.print(f"limits     matrix product {shown}; copy {found['limits']['copy_gbs']:.1f} GB/s")
    console.print(f"operators  {', '.join(sorted({d[device] for d in facts['operators'].values()}))}")


def parity(found: dict) -> Table:
    """Of a summary (parity.py) the rows nearest to their bound."""
    rows = [
        [" of ".join(filter(None, (x["what"], x.get("contender")))),
         *("" if x[key] is None else f"{x[key]:.2e}" for key in ("error", "reference_error", "bound")),
         "ok" if x["passed"] else "FAILED"]
        for x in found["worst"]
    ]  # fmt: skip
    passed = found["compared"] - found["failed"]
    title = f"Parity, error against float64 (L2, relative): {passed} of {found['compared']} passed; the nearest to fail"
    return Table(["loss or gradient", "error", "reference's", "bound", ""], rows, title)


def name_of(row: dict) -> str:
    """A contender as a row has it, with the kernel that PyTorch picked for its attention."""
    name = row.get("key", row["contender"])
    return f"{name} ({row['attention']})" if row.get("attention") else name


def _spread(row: dict) -> str:
    return "{p50:.1f} ({p20:.1f}-{p80:.1f})".format(**{k: 1e3 * v for k, v in row["step_s"].items()})


STEP_COLUMNS: dict[str, Callable[[dict], str]] = {
    "lengths, dtype": lambda x: f"{x['lengths']}, {x['dtype']}",
    "BERT": lambda x: f"{x['model']} {x['seq']}, {x['lengths']}, {x['dtype']}, {x['optimizer']}",
    "contender": name_of,
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
    """A line for each kind of step of each run (its device, its rows): ours, and what it is beside each other."""
    lines = []
    for device, rows in runs:
        groups: dict[tuple, list[dict]] = {}
        for x in rows:
            groups.setdefault(tuple(x[key] for key in ("model", "seq", "lengths", "dtype", "optimizer")), []).append(x)
        for (model, seq, lengths, dtype, optimizer), found in groups.items():
            ours = next((x for x in found if x["contender"] == "bert_fast" and "failed" not in x), None)
            others = [x for x in found if x["contender"] != "bert_fast"]
            if ours is None:
                continue
            memory = [x["peak_memory_mib"] for x in others if x.get("peak_memory_mib")]
            peak = STEP_COLUMNS["peak MiB"](ours) + (f" ({min(memory):.0f} to {max(memory):.0f})" if memory else "")
            ratios = [f"{name_of(x)} {'failed' if 'failed' in x else times(x.get('ours_is'))}" for x in others]
            work = f"{ours.get('mode', 'train')} {model}, {ours['sequences']} x {seq}, {lengths}, {dtype}"
            work += "" if optimizer == "none" else f", {optimizer}"
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
    for (model, seq, lengths, operator, direction, dropout), found in groups.items():
        ours = found.get("bert_fast")
        size = f"{model} {seq}, {lengths}" if seq else model  # an optimiser knows no sequences
        cells = [size, f"{operator}, {direction}" + ("" if dropout or not seq else ", no dropout")]
        if ours is None or "failed" in ours:
            cells += ["failed" if ours else "", "", "", ""]
        else:
            rate = f"{number(ours['tflops'])} TFLOP/s" if "tflops" in ours else f"{number(ours['gbs'])} GB/s"
            predicted = number(1e3 * ours["predicted_ms"]) if ours.get("predicted_ms") else ""
            cells += [number(1e3 * ours["ms"]), predicted, rate, percent(ours["share_of_limit"])]
        others = []
        for name, x in found.items():
            if name != "bert_fast":
                ratio = f" ({x['ours_is']:.2f}x)" if x.get("ours_is") else ""
                others.append(f"{name} {'failed' if 'failed' in x else number(1e3 * x['ms'])}{ratio}")
        lines.append([*cells, ", ".join(others)])
        forward = groups.get((model, seq, lengths, operator, "forward", dropout), {})
        if direction == "backward" and forward:
            sums = {name: 1e3 * (x["ms"] + forward[name]["ms"]) for name, x in found.items()
                    if "ms" in x and "ms" in forward.get(name, {})}  # fmt: skip
            own = sums.pop("bert_fast", None)
            both = [f"{name} {number(us)}" + (f" ({us / own:.2f}x)" if own else "") for name, us in sums.items()]
            lines.append([size, f"{operator}, both", number(own), "", "", "", ", ".join(both)])
    return Table(["BERT", "operator", "us", "predicted", "rate", "of the limit", "others, us (ours is)"], lines)


def plot(path: str, groups: dict[str, list[dict]]) -> None:
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
