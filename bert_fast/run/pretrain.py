"""Pre-training from prepared data to RUN/model: the loop, top to bottom."""

import dataclasses
import errno
import importlib.util
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer

from bert_fast.data import load_tokenizer, open_corpus, read_manifest
from bert_fast.data.dataset import PretrainingDataset
from bert_fast.data.files import write_atomically
from bert_fast.data.graph_shapes import example, sizes_of_phases
from bert_fast.data.loader import BatchMaker, Work, load_updates, updates
from bert_fast.data.pairs import document_tokens, fewest_tokens
from bert_fast.data.phase import Phase
from bert_fast.data.tokenizer import differences
from bert_fast.data.updates import Place
from bert_fast.devices import has_matrix_unit, matmul_peak
from bert_fast.flops import step_flops
from bert_fast.output import Output
from bert_fast.run import checkpoint, new_model
from bert_fast.run.config import ConfigError, PretrainConfig, effective, mask_probs, mask_shares, phases
from bert_fast.run.export import description, export
from bert_fast.run.meter import Meter
from bert_fast.run.metrics import MetricsFile
from bert_fast.run.new_rows import base_tokenizer, shortened, start_new_rows
from bert_fast.run.optimizer import build_optimizer, load_state, owned, state_tensors
from bert_fast.run.plan import planned
from bert_fast.run.plot import plot_runs
from bert_fast.run.process import Stop, locked, stop_on_signals
from bert_fast.run.resume import identity, last_checkpoint, require_same_run
from bert_fast.run.validation import Validation, hold_out
from bert_fast.train import recorded
from bert_fast.train.distributed import Ranks, started
from bert_fast.train.schedule import learning_rate, phase_of
from bert_fast.train.step import Outcome, derived_seed

DONE, NOT_FINITE = 0, 3


def pretrain(config: PretrainConfig, output: Output | None = None) -> int:
    """Trains as ``config`` says, from the last good checkpoint in its ``out`` on, and returns the exit code.

    0: all updates done, RUN/model written; 3: too many updates in a row were not finite; 130, 138 and 143: stopped by
    SIGINT, SIGUSR1 and SIGTERM after a checkpoint. Raises ConfigError for options that make no sense together,
    NotTheSameRun, CheckpointError (a full disk) and what reading the data raises. Under torchrun all processes call it.
    """
    output = output or Output()
    with started(config.device) as ranks, locked(Path(config.out), ranks), stop_on_signals() as asked_to_stop:
        if not ranks.first:
            output = Output(silent=True)
        try:
            return _Run(config, ranks, output).train(asked_to_stop)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise checkpoint.disk_full(Path(config.out), error) from error


class _Run:
    """What a run consists of, ready to go on from its last checkpoint."""

    def __init__(self, config: PretrainConfig, ranks: Ranks, output: Output):
        self.ranks, self.output, self.folder = ranks, output, Path(config.out)
        before = last_checkpoint(config, ranks, output)
        self.given, self.config = config, planned(config, before)
        config = self.config
        self.phases = phases(config)
        self.total = self.phases[-1].last
        if any(phase.batch_size < ranks.world for phase in self.phases):
            raise ConfigError(f"--batch-size must give each of {ranks.world} processes a sequence")
        automatic = config.precision == "auto"
        self.bf16 = config.precision == "bf16" or (automatic and has_matrix_unit(ranks.device, torch.bfloat16))
        self.tokens = config.micro_tokens or (16384 if ranks.device.type == "cuda" else 4096)

        self.manifest, corpus = read_manifest(config.data), open_corpus(config.data)
        self.tokenizer = load_tokenizer(Path(config.data) / "tokenizer")
        corpus, held_out = hold_out(corpus, config.validation, seed=config.seed, nsp=config.nsp)
        if config.validation_data:
            held_out = self._other_corpus(config.validation_data)
        self.dataset = self._dataset(corpus, mask_prob=mask_probs(config)[0], mask_shares=mask_shares(config))
        self.validation = None
        if held_out is not None:
            self.validation = Validation(
                self._dataset(held_out),  # masked as published, so that curves of runs compare
                limit=config.validation_sequences, tokens=self.tokens, ranks=ranks,
                precision=self.precision,
            )  # fmt: skip

        longest = max(phase.seq for phase in self.phases)
        made = new_model.model_config(config, self.tokenizer, longest)
        self.identity = identity(config, self.tokenizer, made)
        if before is not None:
            require_same_run(self.given, before, self.identity, self.total, output)
        model_seed = derived_seed(config.seed, "weights")
        if before is None:
            base = base_tokenizer(config.init_from, self.tokenizer) if config.init_from else None
            self.model, notes = new_model.new_model(config, made, model_seed)
            for note in notes:
                output.note(note)
            if base is not None:
                self._start_new_rows(base)
            elif config.init_from:
                output.note(f"{config.init_from} has no tokenizer: whether the data's gives its ids is not known")
        else:
            self.model, _ = new_model.new_model(dataclasses.replace(config, init_from=None), made, model_seed)
        self.model.to(ranks.device)
        self.optimizer = build_optimizer(self.model, config, ranks)
        self.step, self.phase, self.place, self.skipped, self.seconds, self.validated = 0, 0, Place(), [0, 0], 0.0, None
        if before is not None:
            self._go_on_from(before)
        if ranks.first:
            options = effective(config.as_dict())
            write_atomically(self.folder / "config.json", (json.dumps(options, indent=1) + "\n").encode())
        # recorded or not: shapes decide the last bits of a product on a GPU
        self.sizes = sizes_of_phases(self.dataset, self.phases, self.tokens) if recorded.recordable(ranks) else None
        self.prepared: Phase | None = None  # whose shapes the step is ready to record
        self.model.recompute(config.recompute)
        self.update = recorded.make_step(
            self.model, self.optimizer, ranks, bf16=self.bf16, capture=config.capture, tell=output.warn
        )

    def _start_new_rows(self, base: Tokenizer) -> None:
        if number := start_new_rows(self.model, base, self.tokenizer):
            text = shortened(self.dataset.corpus, base, self.tokenizer)
            self.output.note(
                f"{number:,} pieces are new to {self.config.init_from}: the row and the bias of each begin as the mean "
                f"of those it replaces; they make text {text}"
            )

    @property
    def precision(self) -> str:
        return "bf16" if self.bf16 else "fp32"

    def train(self, asked_to_stop: Stop) -> int:
        """Updates, lines of metrics, validations and checkpoints, until the last update or a reason to stop."""
        config, ranks, output = self.config, self.ranks, self.output
        self.metrics = MetricsFile(self.folder, self.step) if ranks.first else None
        self.peak = (config.peak_tflops or 0) * 1e12 or matmul_peak(
            ranks.device, torch.bfloat16 if self.bf16 else torch.float32
        )
        self.meter = Meter()
        stop: str | int | None = None
        self._introduce()
        with output.progress(self.total, "pre-training", "updates", done=self.step) as self.bar:
            waiting: list[tuple[Work, float, int | torch.Tensor, Outcome]] = []
            for work in self.meter.timed(self._work()):
                stopping = asked_to_stop.signal is not None
                waiting.append((work, *self._one_update(work, stopping)))
                done = work.update.step + 1
                validating = self._every(config.validate_every or config.checkpoint_every, done)
                saving = self._every(config.checkpoint_every, done)
                # a GPU is asked for an update's numbers when it has the next one to do
                while len(waiting) > (0 if validating or saving or ranks.device.type == "cpu" else 1):
                    stop = self._account(*waiting.pop(0)) or stop
                if stop == "signal":
                    while waiting:
                        self._account(*waiting.pop(0))
                if stop == "not finite":
                    break
                self.validated = self._validate() if validating and self.validation else None
                if saving or stop:
                    self._save()
                if stop:
                    break
        return self._end(stop, asked_to_stop)

    def _work(self) -> Iterator[Work]:
        config, cuda = self.config, self.ranks.device.type == "cuda"
        workers = config.workers if config.workers is not None else (2 if cuda else 1)
        return load_updates(
            BatchMaker(self.dataset, config.data),
            updates(self.dataset, self.phases, self.step, self.place),
            rank=self.ranks.rank, ranks=self.ranks.world, tokens=self.tokens, workers=workers, pin=cuda,
            sizes=self.sizes,
        )  # fmt: skip

    def _prepare(self, phase: Phase) -> None:
        """The step gets to know the phase's shapes."""
        self.prepared = phase
        if self.sizes is None:
            return
        with self.meter.paused():
            pad = self.dataset.special.pad
            sizes = self.sizes[phase.seq, phase.batch_size]
            self.update.prepare([example(size, phase.seq, nsp=self.config.nsp, pad_id=pad) for size in sizes[::-1]])

    def _one_update(self, work: Work, stopping: bool) -> tuple[float, int | torch.Tensor, Outcome]:
        """The update's learning rate, how many tokens it predicts on all ranks, and what came of it."""
        config, step = self.config, work.update.step
        phase = self.phases[phase_of(step, self.phases)]
        if phase is not self.prepared:
            self._prepare(phase)
        lr = learning_rate(step, phase, schedule=config.schedule, power=config.power)
        predicted: int | torch.Tensor = int(work.update.masked.sum())
        if config.whole_word:  # how many tokens the words have that are drawn, only the batches know
            predicted = sum(int((batch["masked_labels"] >= 0).sum()) for batch in work.batches)
            if self.ranks.world > 1:
                predicted = self.ranks.sum(torch.full((), predicted, device=self.ranks.device))
        outcome = self.update(
            work.batches,
            seed=derived_seed(config.seed, "dropout", step),
            lr=lr,
            predicted=predicted,
            sequences=len(work.update) if config.nsp else 0,
            stop=stopping,
        )
        return lr, predicted, outcome

    def _account(self, work: Work, lr: float, predicted: int | torch.Tensor, outcome: Outcome) -> str | None:
        """Takes an update's numbers into counts, metrics and display; returns why the run must stop, or None."""
        update = work.update
        mlm, nsp, stops, norm = outcome.scalars.tolist()
        self.step, self.place, self.phase = update.step + 1, update.after, phase_of(update.step, self.phases)
        predicted, real = int(predicted), int((update.lengths - (3 if self.config.nsp else 2)).sum())
        flops = step_flops(self.model.config, update.lengths.tolist(), predicted, train=True)
        self.meter.count(int(update.lengths.sum()), flops)
        finite = all(map(_is_finite, (mlm, nsp, norm)))
        self.skipped = [self.skipped[0], 0] if finite else [self.skipped[0] + 1, self.skipped[1] + 1]
        nsp = nsp if self.config.nsp else None
        if not finite:
            self._report_skipped(work, outcome, mlm, norm)
        elif self._every(self.config.log_every, self.step):
            tokens, flops, seconds = self.meter.lap()
            self.seconds += seconds
            entry = {
                "epoch": update.after.epoch, "loss": mlm + (nsp or 0.0), "mlm_loss": mlm, "nsp_loss": nsp,
                "learning_rate": lr, "grad_norm": norm, "mask_prob": predicted / real,
                "real_tokens_per_s": tokens / seconds, "mfu": flops / seconds / (self.peak * self.ranks.world),
                "seconds": self.seconds,
            }  # fmt: skip
            if self.metrics:
                self.metrics.write("train", self.step, **entry)
            self.bar.update(self.step, _shown(entry), **{"step": self.step} | entry)
        if self.skipped[1] >= self.config.max_skipped:
            return "not finite"
        return "signal" if stops else None

    def _report_skipped(self, work: Work, outcome: Outcome, mlm: float, norm: float) -> None:
        """Names the samples: of the micro-batches whose loss was not finite, on any rank; else of the whole update."""
        update = work.update
        bad = torch.zeros(len(update), dtype=torch.int32)
        for slots, finite in zip(work.slots, outcome.finite.tolist(), strict=True):
            bad[torch.from_numpy(slots)] = int(not finite)
        bad = self.ranks.greatest(bad.to(self.ranks.device)).bool().cpu().numpy()
        reason = "the loss" if bad.any() else "the gradient"
        chosen = bad if bad.any() else ~bad
        samples = [[int(e), int(i)] for e, i in zip(update.epochs[chosen], update.indices[chosen], strict=True)]
        if self.metrics:
            self.metrics.write("skipped", self.step, reason=f"{reason} was not finite", samples=samples)
        self.output.warn(
            f"update {self.step} was skipped: {reason} was not finite (MLM loss {mlm:.4g}, gradient norm {norm:.4g}); "
            f"the weights are as before. Its samples (epoch, number): {samples[:20]}"
            + (f" and {len(samples) - 20} more, all in metrics.jsonl" if len(samples) > 20 else "")
        )

    def _validate(self) -> dict:
        with self.meter.paused():
            found = self.validation(self.model, self.phases[self.phase].seq)
        if self.metrics:
            self.metrics.write("validation", self.step, **found)
        text = f"update {self.step}: held-out "
        if found["masked"]:
            text += f"MLM loss {found['mlm_loss']:.4f}, perplexity {found['perplexity']:.1f}, "
            text += f"accuracy {found['mlm_accuracy']:.1%}"
        else:
            text += f"none of the {found['sequences']:,} sequences has a masked token, so there is no MLM loss"
        if found["nsp_loss"] is not None:
            text += f"; NSP loss {found['nsp_loss']:.4f}, accuracy {found['nsp_accuracy']:.1%}"
        self.output.note(text)
        return found

    def _every(self, interval: int, done: int) -> bool:
        return done % interval == 0 or done == self.total

    def _save(self) -> None:
        with self.meter.paused():
            if self.metrics:
                self.metrics.flush()
            model = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
            optimizer = state_tensors(self.optimizer, self.model)
            checkpoint.save(
                self.folder, self._state(), model, optimizer, self.ranks,
                description=description(self.model, self.tokenizer), keep=self.config.keep,
            )  # fmt: skip

    def _state(self) -> dict:
        return {
            "step": self.step,
            "phase": self.phase,
            "seq": self.phases[self.phase].seq,
            "place": self.place._asdict(),
            "skipped": self.skipped[0],
            "skipped_in_a_row": self.skipped[1],
            "seconds": self.seconds,
            "validation": self.validated,
            "precision": self.precision,
            "processes": self.ranks.world,
            "identity": self.identity,
            "options": self.given.as_dict(),
            "plan": {} if self.config is self.given else {"phases": self.config.phases},
        }

    def _go_on_from(self, before: checkpoint.Checkpoint) -> None:
        state = before.state
        mine = owned(self.optimizer, self.model)
        new_model.load_weights(self.model, before.tensors("model"))
        load_state(self.optimizer, self.model, before.tensors("optimizer", lambda name: name.partition("/")[2] in mine))
        self.step, self.place = state["step"], Place(**state["place"])
        self.skipped = [state["skipped"], state["skipped_in_a_row"]]
        self.seconds, self.validated, self.phase = state["seconds"], state["validation"], state["phase"]
        if self.step < self.total and phase_of(self.step, self.phases) != self.phase:
            self.place = Place(self.place.epoch + 1, 0)  # as the stream of updates does between two phases
        if state["identity"]["data"] != self.identity["data"]:
            self.place = Place()
            self.output.note(f"{self.config.data} is not the data of {before.folder}: it begins with its first epoch")
        self.output.note(f"going on from {before.folder}, update {self.step} of {self.total}")

    def _introduce(self) -> None:
        config, made = self.config, self.model.config
        self.output.note(
            f"{self.model.num_parameters():,} parameters ({made.num_hidden_layers} layers, hidden size "
            f"{made.hidden_size}, vocabulary {made.vocab_size}), {config.optimizer}, {self.precision} on "
            f"{self.ranks.world} x {self.ranks.device.type}; MFU against {self.peak / 1e12:.3g} TFLOP/s a process "
            + ("(--peak-tflops)" if config.peak_tflops else "(a matrix product, measured)")
        )
        self.output.note(_epoch(self.dataset))
        if self.validation is None:
            too_few = "too few documents, or none of those held out gives a sample"
            self.output.note("no validation: " + ("--validation is 0" if not config.validation else too_few))

    def _end(self, stop: str | None, asked_to_stop: Stop) -> int:
        reason = {None: "done", "not finite": "not finite", "signal": "stopped by a signal"}[stop]
        if self.metrics:
            self.metrics.write("end", self.step, reason=reason)
            self.metrics.close()
        if stop == "not finite":
            self.output.warn(
                f"stopped at update {self.step}: {self.config.max_skipped} updates in a row were not finite. Lower "
                "--lr or lengthen --warmup, and start again: the run goes on from its last checkpoint"
            )
            return NOT_FINITE
        if stop == "signal":
            self.output.note(f"stopped after update {self.step}; the same command goes on from there")
            return 128 + (asked_to_stop.signal or signal.SIGTERM)
        if self.ranks.first:
            state = self._state()
            folder = export(self.folder, self.model, self.tokenizer, self.config, manifest=self.manifest, state=state)
            facts = {"model": str(folder), "step": self.step, "data_time": self.meter.share_waiting}
            facts |= {"skipped": self.skipped[0], "validation": state["validation"]}
            text = f"{folder}: {self.step:,} updates, waiting for data {self.meter.share_waiting:.1%} of the time"
            self._plot()
            self.output.result(facts, text)
        self.ranks.wait()
        return DONE

    def _plot(self) -> None:
        """RUN/loss.png. The run is done with or without it."""
        if importlib.util.find_spec("matplotlib") is None:
            self.output.note("no loss.png: the package matplotlib is not installed")
            return
        try:
            plot_runs([self.folder], self.folder / "loss.png")
        except ValueError as error:  # nothing to draw
            self.output.note(f"no loss.png: {error}")

    def _dataset(self, corpus, **masking) -> PretrainingDataset:
        config = self.config
        return PretrainingDataset(
            corpus, self.tokenizer, max_length=self.phases[0].seq, seed=config.seed, nsp=config.nsp,
            whole_word=config.whole_word, short_seq_prob=config.short_seq_prob, **masking,
        )  # fmt: skip

    def _other_corpus(self, folder: str):
        if differing := differences(self.tokenizer, load_tokenizer(Path(folder) / "tokenizer")):
            raise ConfigError(
                f"--validation-data {folder} was prepared with another tokenizer than {self.config.data} "
                f"({'; '.join(differing)})"
            )
        return open_corpus(folder)


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


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")  # NaN compares false


def _shown(entry: dict) -> str:
    text = f"loss {entry['loss']:.4f}"
    if entry["nsp_loss"] is not None:
        text += f" (MLM {entry['mlm_loss']:.4f}, NSP {entry['nsp_loss']:.4f})"
    return (
        f"{text}  lr {entry['learning_rate']:.2e}  gradient {entry['grad_norm']:.2f}  "
        f"{entry['real_tokens_per_s']:,.0f} tokens/s  MFU {entry['mfu']:.1%}"
    )
