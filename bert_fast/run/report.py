"""What a run tells: lines of metrics.jsonl, progress, notes and warnings."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from bert_fast.data.dataset import PretrainingDataset
from bert_fast.data.loader import Work
from bert_fast.data.mixture import Mixture
from bert_fast.data.pairs import document_tokens, fewest_tokens
from bert_fast.output import Output
from bert_fast.run.config import PretrainConfig
from bert_fast.run.metrics import MetricsFile, numbers
from bert_fast.run.tracking import Trackers
from bert_fast.train.distributed import Ranks
from bert_fast.train.step import Outcome


class Report:
    """Tells of the run in ``folder``, which goes on from update ``step``. Only the first process writes metrics, and
    the ``output`` of the others is silent; ``trackers`` get its numbers."""

    def __init__(
        self, folder: Path, config: PretrainConfig, ranks: Ranks, output: Output, trackers: Trackers, step: int
    ):
        self.config, self.ranks, self.output, self.trackers = config, ranks, output, trackers
        self.metrics = MetricsFile(folder, step) if ranks.first else None

    def introduce(
        self, model: PreTrainedModel, dataset: PretrainingDataset | Mixture, *, precision: str, peak: float,
        validates: bool,
    ) -> None:  # fmt: skip
        """What is trained, on what; ``peak`` in FLOP/s a process."""
        config, made = self.config, model.config
        self.output.note(
            f"{model.num_parameters():,} parameters ({made.num_hidden_layers} layers, hidden size "
            f"{made.hidden_size}, vocabulary {made.vocab_size}), {config.optimizer}, {precision} on "
            f"{self.ranks.world} x {self.ranks.device.type}; MFU against {peak / 1e12:.3g} TFLOP/s a process "
            + ("(--peak-tflops)" if config.peak_tflops else "(a matrix product, measured)")
        )
        self.names = dataset.names if isinstance(dataset, Mixture) else ()
        if isinstance(dataset, Mixture):
            for name, source, share in zip(dataset.names, dataset.datasets, dataset.shares, strict=True):
                self.output.note(f"{name}, {share:.1%} of the tokens: {_epoch(source)}")
        else:
            self.output.note(_epoch(dataset))
        if not validates:
            too_few = "too few documents, or none of those held out gives a sample"
            self.output.note("no validation: " + ("--validation is 0" if not config.validation else too_few))

    @contextmanager
    def progress(self, total: int, done: int) -> Iterator[None]:
        """Shows meanwhile how far the run is."""
        with self.output.progress(total, "pre-training", "updates", done=done) as self._bar:
            yield

    def expect(self, total: int) -> None:
        """The run has another number of updates than before."""
        self._bar.total = total

    def trained(self, step: int, entry: dict) -> None:
        """The numbers of update ``step``, and how fast the run is."""
        self._write("train", step, **entry)
        self._bar.update(step, _shown(entry), **{"step": step} | entry)

    def skipped(self, step: int, work: Work, outcome: Outcome) -> None:
        """Names the samples: of the micro-batches whose loss was not finite, on any rank; else of the whole update."""
        update = work.update
        bad = torch.zeros(len(update), dtype=torch.int32)
        for slots, finite in zip(work.slots, outcome.finite.tolist(), strict=True):
            bad[torch.from_numpy(slots)] = int(not finite)
        anywhere = self.ranks.greatest(bad.to(self.ranks.device)).bool().cpu().numpy()
        reason = "the loss" if anywhere.any() else "the gradient"
        chosen = anywhere if anywhere.any() else ~anywhere
        number = len(self.names) or 1  # of sources, whose epochs are numbered in turn
        samples = [
            [*self.names[e % number : e % number + 1], e // number, i]
            for e, i in zip(update.epochs[chosen].tolist(), update.indices[chosen].tolist(), strict=True)
        ]
        self._write("skipped", step, reason=f"{reason} was not finite", samples=samples)
        mlm, _, _, norm = outcome.scalars.tolist()
        self.output.warn(
            f"update {step} was skipped: {reason} was not finite (MLM loss {mlm:.4g}, gradient norm {norm:.4g}); "
            f"the weights are as before. Its samples ({'source, ' if self.names else ''}epoch, number): {samples[:20]}"
            + (f" and {len(samples) - 20} more, all in metrics.jsonl" if len(samples) > 20 else "")
        )

    def validated(self, step: int, found: dict) -> None:
        """What ``bert_fast.train.evaluation.evaluate`` found on the held-out documents."""
        self._write("validation", step, **found)
        text = f"update {step}: held-out "
        if found["masked"]:
            text += f"MLM loss {found['mlm_loss']:.4f}, perplexity {found['perplexity']:.1f}, "
            text += f"accuracy {found['mlm_accuracy']:.1%}"
        else:
            text += f"none of the {found['sequences']:,} sequences has a masked token, so there is no MLM loss"
        if found["nsp_loss"] is not None:
            text += f"; NSP loss {found['nsp_loss']:.4f}, accuracy {found['nsp_accuracy']:.1%}"
        parts = [(name, values["mlm_loss"]) for name, values in found.get("sources", {}).items()]
        text += "".join(f"; {name} {loss:.4f}" for name, loss in parts if loss is not None)
        self.output.note(text)

    def ended(self, step: int, stop: str | None) -> None:
        """Why the run ends after update ``step``: all are done (None), "signal" or "not finite"."""
        reason = {None: "done", "not finite": "not finite", "signal": "stopped by a signal"}[stop]
        self._write("end", step, reason=reason)
        if self.metrics:
            self.metrics.close()
        if stop == "not finite":
            self.output.warn(
                f"stopped at update {step}: {self.config.max_skipped} updates in a row were not finite. Lower "
                "--lr or lengthen --warmup, and start again: the run goes on from its last checkpoint"
            )
        if stop == "signal":
            self.output.note(f"stopped after update {step}; the same command goes on from there")

    def flush(self) -> None:
        """Every line so far is on the disk."""
        if self.metrics:
            self.metrics.flush()

    def _write(self, kind: str, step: int, **values) -> None:
        if self.metrics:
            self.metrics.write(kind, step, **values)
            self.trackers.log(step, numbers(kind, values))


def _epoch(dataset: PretrainingDataset) -> str:
    """What the samples of an epoch hold of the corpus."""
    tokens, plan = document_tokens(dataset.corpus), dataset.plan
    text = (
        f"{len(plan):,} samples an epoch at {dataset.max_length} tokens, {plan.length.sum():,} tokens; they hold "
        f"{plan.held / tokens.sum():.2%} of the {tokens.sum():,} in {len(tokens):,} documents"
    )
    left_out = tokens < fewest_tokens(dataset.nsp)
    if left_out.any():
        text += f"; {left_out.sum():,} documents of one token, which no pair can hold, are left out"
    return text


def _shown(entry: dict) -> str:
    text = f"loss {entry['loss']:.4f}"
    if entry["nsp_loss"] is not None:
        text += f" (MLM {entry['mlm_loss']:.4f}, NSP {entry['nsp_loss']:.4f})"
    for name, read in entry.get("sources", {}).items():
        text += f"  {name} {read['share']:.1%}, {read['epochs']:.2f} epochs"
    return (
        f"{text}  lr {entry['learning_rate']:.2e}  gradient {entry['grad_norm']:.2f}  "
        f"{entry['real_tokens_per_s']:,.0f} tokens/s  MFU {entry['mfu']:.1%}"
    )
