"""What tests of training look at: the weights and the metrics of a run."""

import hashlib
from pathlib import Path
from unittest import mock

from bert_fast.output import Output
from bert_fast.run.metrics import read_metrics
from bert_fast.run.pretrain import pretrain

TIMES = ("seconds", "real_tokens_per_s", "mfu")


def train(config) -> int:
    """The run without its picture, which takes longer than a dozen updates; ``pretrain`` itself draws it."""
    with mock.patch(f"{pretrain.__module__}.plot_runs"):
        return pretrain(config, Output(quiet=True, command="pretrain"))


def weights(config, step: int) -> str:
    """A checksum of the weights and the optimiser's state at ``step``."""
    folder = Path(config.out) / "checkpoints" / f"step-{step:08d}"
    files = [folder / "model.safetensors", *sorted(folder.glob("optimizer*"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def losses(config, kind: str | None = None) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = read_metrics(Path(config.out) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines if kind in (None, line["kind"])]
