"""The picture of a run's losses, or of several runs, from their metrics.jsonl."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bert_fast.pictures import picture_path, written_picture
from bert_fast.run.metrics import read_metrics

# The smoothed line's window: its standard deviation as a share of the run's lines, and at least so many lines.
WINDOW_SHARE, WINDOW_LINES = 0.01, 2.0


def read_losses(run: str | Path) -> dict[str, list[dict]]:
    """The lines of RUN/metrics.jsonl (or of a .jsonl file) by kind: {"train": [...], "validation": [...], ...}.

    Raises FileNotFoundError where there is no such file, ValueError for a line that is not one of metrics.
    """
    path = Path(run) / "metrics.jsonl" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: {run} is no run of `bert-fast pretrain`")
    found: dict[str, list[dict]] = {}
    for number, line in enumerate(read_metrics(path), 1):
        if not isinstance(line, dict) or not {"kind", "step"} <= set(line):
            raise ValueError(f"{path}: line {number} is no line of metrics")
        found.setdefault(line["kind"], []).append(line)
    return found


def smooth(values: np.ndarray, width: float) -> np.ndarray:
    """``values`` (n,), finite, under a normal window of standard deviation ``width``, without lag; what lies outside
    counts for nothing."""
    reach = np.arange(-round(3 * width), round(3 * width) + 1)
    window = np.exp(-0.5 * (reach / width) ** 2)
    inside = slice(len(reach) // 2, len(reach) // 2 + len(values))
    return np.convolve(values, window)[inside] / np.convolve(np.ones(len(values)), window)[inside]


def plot_runs(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Draws the losses of ``runs`` (folders with metrics.jsonl) into the picture ``out`` (.png, .svg, .pdf).

    MLM loss above, NSP loss below where a run has it: training, raw faint and smoothed, against updates; validation
    as points. Each run has its colour. Raises ValueError where no run has a line to draw.
    """
    out = picture_path(out)
    metrics = {Path(run): read_losses(run) for run in runs}
    drawn = [run for run, kinds in metrics.items() if kinds.get("train") or kinds.get("validation")]
    if not drawn:
        raise ValueError(f"nothing to draw: {', '.join(map(str, metrics))} have no losses yet")
    losses = [
        (key, title)
        for key, title in (("mlm_loss", "masked-token (MLM) loss"), ("nsp_loss", "next-sentence (NSP) loss"))
        if any(_points(metrics[run], kind, key)[0].size for run in drawn for kind in ("train", "validation"))
    ]
    if not losses:
        raise ValueError(f"nothing to draw: {', '.join(map(str, drawn))} have no finite loss")
    names = [run.name or str(run) for run in drawn]
    if len(set(names)) < len(names):
        names = [str(run) for run in drawn]
    heights = [2.2, 1][: len(losses)]
    with written_picture(out, (9, 2.6 + 1.4 * sum(heights))) as figure:
        all_axes = figure.subplots(len(losses), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (key, title) in zip(all_axes, losses, strict=True):
            for number, (run, name) in enumerate(zip(drawn, names, strict=True)):
                _draw(axes, metrics[run], key, f"C{number % 10}", name)
            axes.set_ylabel(title)
            axes.grid(alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        all_axes[0].legend(frameon=False, fontsize=9)
        all_axes[-1].set_xlabel("update")
    return out


def _points(kinds: dict[str, list[dict]], kind: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(updates, values) of the lines that have a finite number at ``key``; a step repeated by a resume counts once."""
    latest = {line["step"]: line[key] for line in kinds.get(kind, []) if isinstance(line.get(key), (int, float))}
    steps = np.array([step for step in sorted(latest) if math.isfinite(latest[step])], dtype=np.int64)
    return steps, np.array([latest[step] for step in steps.tolist()], dtype=np.float64)


def _draw(axes, kinds: dict[str, list[dict]], key: str, color: str, name: str) -> None:
    steps, values = _points(kinds, "train", key)
    if len(steps):
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        width = max(WINDOW_LINES, WINDOW_SHARE * len(steps))
        axes.plot(steps, smooth(values, width), color=color, linewidth=1.8, label=f"{name}: training, smoothed")
    steps, values = _points(kinds, "validation", key)
    if len(steps):
        label = f"{name}: validation (last {values[-1]:.3f})"
        axes.plot(steps, values, "o", color=color, markeredgecolor="black", markersize=5, label=label)
