"""What a person reads: the tables and the picture of a benchmark's results."""

from rich.console import Console
from rich.table import Table

console = Console()
if not console.is_terminal:
    console = Console(width=120)  # a file or a log: wide enough for every column


def show_parity(rows: list[dict]) -> None:
    """The loss, the gradients with the largest share of their bound, and how many there are."""
    gradients = sorted(rows[1:], key=lambda row: row["error"] / row["bound"], reverse=True)
    shown = [rows[0] | {"shown": rows[0]["what"]}, *(row | {"shown": f"d {row['what']}"} for row in gradients[:4])]
    console.print(_parity_table(shown, "ours"))
    passed = sum(row["passed"] for row in rows)
    console.print(
        f"{passed} of {len(rows)} passed (the loss and {len(rows) - 1} gradients; the worst four are shown)\n"
    )


def show_encoding_parity(rows: list[dict]) -> None:
    """Every output of ours and of other libraries' encoders."""
    console.print(_parity_table([row | {"shown": f"{row['what']} of {row['variant']}"} for row in rows], "error"))
    console.print(f"{sum(row['passed'] for row in rows)} of {len(rows)} passed (at the real tokens)\n")


def _parity_table(rows: list[dict], error: str) -> Table:
    table = Table(title="Parity: error against float64 (L2, relative)", title_justify="left")
    table.add_column("what")
    for column in (error, "reference", "bound"):
        table.add_column(column, justify="right")
    table.add_column("")
    for row in rows:
        numbers = [f"{row[key]:.2e}" for key in ("error", "reference_error", "bound")]
        table.add_row(row["shown"], *numbers, "ok" if row["passed"] else "[bold]FAILED[/bold]")
    return table


def show_throughput(title: str, rows: list[dict], ratios: dict[str, float]) -> None:
    """One row a variant; the last column says how many times faster ours is in the same rounds."""
    table = Table(title=title, title_justify="left")
    table.add_column("variant")
    for column in ("step s (p20 p50 p80)", "seq/s", "real tok/s", "TFLOP/s", "of matmul", "MFU", "peak MiB", "ours is"):
        table.add_column(column, justify="right")
    for row in rows:
        name = row["key"]
        if "failed" in row:
            table.add_row(name, row["failed"], *[""] * 7)
            continue
        step = row["step_s"]
        memory = row["peak_memory_mib"]
        ratio = ratios.get(row["key"])
        table.add_row(
            name,
            f"{step['p20']:.3f} {step['p50']:.3f} {step['p80']:.3f}",
            f"{row['sequences_per_s']:.2f}",
            f"{row['real_tokens_per_s']:.0f}",
            f"{row['executed_tflops']:.3f}",
            f"{100 * row['share_of_peak']:.0f} %",
            f"{100 * row['mfu']:.0f} %",
            "" if memory is None else f"{memory:.0f}",
            "" if ratio is None else f"{ratio:.2f}x",
        )
    console.print(table)


def plot(path: str, groups: dict[str, list[dict]]) -> None:
    """A picture of throughput (real tokens/s) and peak memory by variant, one pair of panels a group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = {title: [row for row in rows if "failed" not in row] for title, rows in groups.items()}
    figure, axes = pyplot.subplots(len(groups), 2, figsize=(11, 0.9 + 2.4 * len(groups)), squeeze=False)
    for (title, rows), (left, right) in zip(groups.items(), axes, strict=True):
        names = [row["key"].replace(", ", "\n") for row in rows]
        colors = ["#c0392b" if row["name"] == "bert_fast" else "#7f8c8d" for row in rows]
        for axis, key, label in (
            (left, "real_tokens_per_s", "real tokens/s (more is better)"),
            (right, "peak_memory_mib", "peak memory, MiB (less is better)"),
        ):
            axis.barh(names, [row[key] or 0 for row in rows], color=colors)
            axis.invert_yaxis()
            axis.set_xlabel(label)
            axis.spines[["top", "right"]].set_visible(False)
        left.set_title(title, loc="left", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
