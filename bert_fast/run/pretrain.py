"""Pre-training from prepared data to RUN/model: the loop, top to bottom."""

import contextlib
import copy
import dataclasses
import errno
import importlib.util
import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from bert_fast import choice, use_backend
from bert_fast.data import Corpus
from bert_fast.data.dataset import PretrainingDataset
from bert_fast.data.files import write_atomically
from bert_fast.data.graph_shapes import examples, sample_lengths, sizes_of_phases, spaced_documents
from bert_fast.data.loader import BatchMaker, Work, load_updates, updates
from bert_fast.data.mixture import Mixture, start_of
from bert_fast.data.phase import Phase
from bert_fast.devices import in_bfloat16, matmul_peak
from bert_fast.flops import step_flops
from bert_fast.model import BertForPreTraining
from bert_fast.output import Output
from bert_fast.run import checkpoint, hub, new_model
from bert_fast.run.budget import Budget
from bert_fast.run.config import ConfigError, PretrainConfig, effective, mask_probs, mask_shares, phases
from bert_fast.run.export import description, export
from bert_fast.run.meter import Meter
from bert_fast.run.new_rows import base_tokenizer, shortened, start_new_rows
from bert_fast.run.optimizer import build_optimizer, load_state, owned, state_tensors
from bert_fast.run.plan import PLANNED, planned
from bert_fast.run.plot import plot_runs
from bert_fast.run.process import Stop, locked, stop_on_signals
from bert_fast.run.rehearsal import Costs, Rehearsal, rehearsed
from bert_fast.run.report import Report
from bert_fast.run.resume import identity, last_checkpoint, require_same_run
from bert_fast.run.sources import described, open_sources, open_validation
from bert_fast.run.state import RunState
from bert_fast.run.tracking import Trackers, require_installed
from bert_fast.run.tuner import Tuner
from bert_fast.run.validation import Validation, ValidationBySource
from bert_fast.train import recorded
from bert_fast.train.distributed import Ranks, started
from bert_fast.train.schedule import learning_rate, phase_of
from bert_fast.train.step import Outcome, Step, derived_seed

REHEARSED = 0.2  # of the hours of a budget, about, at most

DONE, UPLOAD_FAILED, NOT_FINITE = 0, 1, 3


def pretrain(config: PretrainConfig, output: Output | None = None) -> int:
    """Trains as ``config`` says, from the last good checkpoint in its ``out`` on, and returns the exit code.

    0: all updates done, RUN/model written; 1: that, too, but it could not be uploaded (--push-to-hub); 3: too many
    updates in a row were not finite; 130, 138 and 143: stopped by SIGINT, SIGUSR1 and SIGTERM after a checkpoint.
    Raises ConfigError for options that make no sense together or cannot be had here, NotTheSameRun, CheckpointError (a
    full disk) and what reading the data raises. Under torchrun all processes call it.
    """
    output = output or Output()
    with started(config.device) as ranks, locked(Path(config.out), ranks), stop_on_signals() as asked_to_stop, \
            contextlib.ExitStack() as stack:  # fmt: skip
        if not ranks.first:
            output = Output(silent=True)
        try:
            if ranks.first:
                require_installed(config)
                hub.require_login(config, output)
            stack.enter_context(kernels_of(config))
            run = Run(config, ranks, output)
            with Trackers(run.config, run.state.step, ranks, output) as trackers:
                code = run.train(asked_to_stop, trackers)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise checkpoint.disk_full(Path(config.out), error) from error
    # no process waits for the upload
    uploads = code == DONE and config.push_to_hub and ranks.first
    return UPLOAD_FAILED if uploads and not hub.push(config, output) else code


@contextlib.contextmanager
def kernels_of(config: PretrainConfig) -> Iterator[None]:
    """For the length of a ``with`` block a run with ``config`` says which kernels serve."""
    named = {"attention": "torch"} if config.attention == "library" else {}
    with choice.held(), use_backend(**named) if named else contextlib.nullcontext():
        yield


class Run:
    """What a run consists of, ready to go on from its last checkpoint; ``few`` of its documents stand for its data."""

    def __init__(self, config: PretrainConfig, ranks: Ranks, output: Output, *, few: bool = False):
        self.began = time.perf_counter()
        self.ranks, self.output, self.folder = ranks, output, Path(config.out)
        self.before = before = last_checkpoint(config, ranks, output)
        self.given, self.config = config, planned(config, before)
        config = self.config
        self.phases = phases(config)
        if any(phase.batch_size < ranks.world for phase in self.phases):
            raise ConfigError(f"--batch-size must give each of {ranks.world} processes a sequence")
        self.bf16 = in_bfloat16(config.precision, ranks.device)
        self.tokens = config.micro_tokens or (16384 if ranks.device.type == "cuda" else 4096)

        self.sources, self.tokenizer = open_sources(config)
        masking = {"mask_prob": mask_probs(config)[0], "mask_shares": mask_shares(config)}
        self.dataset = self._mixed([source.corpus for source in self.sources], few=few, **masking)
        self.validation = self._validation(few=few)

        longest = max(phase.seq for phase in self.phases)
        made = new_model.model_config(config, self.tokenizer, longest)
        self.identity = identity(config, self.tokenizer, made)
        if before is not None:
            require_same_run(self.given, before, self.identity, self.total, output)
        self._warn_of_rates()
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
        self.model.to(ranks.device)  # type: ignore[arg-type]  # transformers wraps it, and its types lose self
        self.optimizer = build_optimizer(self.model, config, ranks)
        self.state = RunState(place=start_of(self.dataset))
        if before is not None:
            self._go_on_from(before)
        # recorded or not: shapes decide the last bits of a product on a GPU
        self.sizes = sizes_of_phases(self.dataset, self.phases, self.tokens) if recorded.recordable(ranks) else None
        self.prepared: tuple[int, int] | None = None  # length and batch size whose shapes the step is ready to record
        self.model.recompute(config.recompute)
        self.budget: Budget | None = None
        recorded_choices = {} if before is None else before.state.get("kernels", {})
        self.tuner = Tuner(
            config, ranks, output, self.model.config, bf16=self.bf16, tokens=self.tokens, recorded=recorded_choices,
            decides=not few,
        )  # fmt: skip
        self.step = self._step(self.model, self.optimizer, tell=output.warn)

    def _warn_of_rates(self) -> None:
        """Of a schedule whose parts do not fit into its updates."""
        for phase in {phase.schedule_first: phase for phase in self.phases}.values():
            number, decay = phase.schedule_last - phase.schedule_first, max(phase.decay, self.config.decay_steps or 0)
            if phase.warmup + decay > number:
                self.output.warn(
                    f"--warmup and --decay-steps ({phase.warmup:,} and {decay:,.0f} updates) do not fit into the "
                    f"{number:,} updates of their schedule: the learning rate does not reach {phase.lr:g}, or jumps"
                )

    def _step(self, model: BertForPreTraining, optimizer: torch.optim.Optimizer, **told) -> Step:
        return recorded.make_step(
            model, optimizer, self.ranks, bf16=self.bf16, capture=self.config.capture,
            masks_by_place=self.tuner.masks_by_place, **told,
        )  # fmt: skip

    def _settle(self, phase: Phase) -> None:
        self.tuner.settle(phase, sample_lengths(self.dataset, phase.seq))

    def _start_new_rows(self, base: Tokenizer) -> None:
        if number := start_new_rows(self.model, base, self.tokenizer):
            several = len(self.sources) > 1
            text = ", ".join(
                (f"of {source.name} " if several else "") + shortened(dataset.corpus, base, self.tokenizer)
                for source, dataset in zip(self.sources, self.datasets, strict=True)
            )
            self.output.note(
                f"{number:,} pieces are new to {self.config.init_from}: the row and the bias of each begin as the mean "
                f"of those it replaces; they make text {text}"
            )

    def rehearsal(self, step: Step) -> Rehearsal:
        """With which ``step`` is measured on this run's data."""
        return Rehearsal(step, self.dataset, self.ranks, self.tokens, self.sizes, self._settle)

    def plan_in_time(self, costs: Costs | None = None) -> None:
        """The phases become those that end in time; ``costs`` are measured with a copy of the model unless given."""
        config, state, before, spent = self.config, self.state, self.before, 0.0
        if before is not None and before.folder.parent.parent == self.folder:
            spent = before.state.get("spent") or state.seconds
        if costs is None:
            model = copy.deepcopy(self.model)
            step = self._step(model, build_optimizer(model, config, self.ranks))
            left = self.phases_left
            most = REHEARSED * config.max_hours * 3600 / len(left) if config.max_hours else 0.0
            costs = rehearsed(self.rehearsal(step), left, self.validation, most=most)
            spent += time.perf_counter() - self.began
        self.budget = budget = Budget(config, spent, costs)
        budget.agree(self.ranks)
        if before is None and config.replan:
            self.output.note(f"--replan {config.replan} is left out: --max-hours plans the run anew")
        plan = budget.first_plan(config) if before is None else budget.new_plan(config, state.step)
        self.output.note(budget.told(config, plan, state.step))
        self.config, self.phases = plan, phases(plan)

    def _plan_again(self) -> None:
        """At a decision of the budget: what is left of the plan may become shorter or longer."""
        budget, before, step = self.budget, self.config, self.state.step
        assert budget is not None  # else there is no decision
        budget.measure(step, self.meter)
        budget.agree(self.ranks)
        plan = budget.new_plan(before, step)
        if plan is not before:
            self.output.note(budget.told(before, plan, step))
            self.config, self.phases = plan, phases(plan)
            self._write_options()
            self.report.expect(self.total)
        budget.watch(step, self.phases, self.meter)

    def _write_options(self) -> None:
        if self.ranks.first:
            options = effective(self.config.as_dict())
            write_atomically(self.folder / "config.json", (json.dumps(options, indent=1) + "\n").encode())

    @property
    def datasets(self) -> Sequence[PretrainingDataset]:
        """That of each source."""
        return self.dataset.datasets if isinstance(self.dataset, Mixture) else [self.dataset]

    @property
    def total(self) -> int:
        """The updates of all phases."""
        return self.phases[-1].last

    @property
    def phases_left(self) -> list[Phase]:
        """Those that have updates to do."""
        return [phase for phase in self.phases if self.state.step < phase.last]

    @property
    def precision(self) -> str:
        return "bf16" if self.bf16 else "fp32"

    def train(self, asked_to_stop: Stop, trackers: Trackers) -> int:
        """Updates, lines of metrics, validations and checkpoints, until the last update or a reason to stop."""
        config, on_cpu = self.config, self.ranks.device.type == "cpu"
        if config.max_hours and self.state.step < self.total:
            self.plan_in_time()
        self._write_options()
        self.report = Report(self.folder, config, self.ranks, self.output, trackers, self.state.step)
        self.peak = (config.peak_tflops or 0) * 1e12 or matmul_peak(
            self.ranks.device, torch.bfloat16 if self.bf16 else torch.float32
        )
        self.meter = Meter()
        self.tuner.stopped = lambda: asked_to_stop.signal is not None
        self.report.introduce(
            self.model, self.dataset, precision=self.precision, peak=self.peak, validates=self.validation is not None
        )
        if self.budget:
            self.budget.watch(self.state.step, self.phases, self.meter)
        stop, waiting = None, []
        with self.report.progress(self.total, self.state.step):
            for work in self.meter.timed(self._work()):
                number = work.update.step
                phase = self.phases[phase_of(number, self.phases)]
                if (phase.seq, phase.batch_size) != self.prepared:
                    self._prepare(phase)
                lr = learning_rate(number, phase, schedule=config.schedule, power=config.power)
                predicted = self._predicted(work)
                outcome = self.step(
                    work.batches,
                    seed=derived_seed(config.seed, "dropout", number),
                    lr=lr,
                    predicted=predicted,
                    sequences=len(work.update) if config.nsp else 0,
                    stop=asked_to_stop.signal is not None,
                )
                waiting.append((work, lr, predicted, outcome))
                validating = self._every(config.validate_every or config.checkpoint_every, number + 1)
                saving = self._every(config.checkpoint_every, number + 1)
                planning = self.budget is not None and number + 1 == self.budget.next < self.total
                # a GPU is asked for an update's numbers when it has the next one to do
                at_once = on_cpu or validating or saving or planning
                while waiting and (at_once or stop == "signal" or len(waiting) > 1):
                    reason = self._account(*waiting.pop(0))
                    stop = stop or reason
                if stop == "not finite":
                    break
                if validating and self.validation:
                    self._validate()
                if saving or stop:
                    self._save()
                if stop:
                    break
                if planning:
                    self._plan_again()
        return self._end(stop, asked_to_stop)

    def _work(self) -> Iterator[Work]:
        config, cuda = self.config, self.ranks.device.type == "cuda"
        workers = config.workers if config.workers is not None else (2 if cuda else 1)
        plan = None
        while plan is not self.phases:  # updates that were made ahead are of the plan that was
            plan, step, place = self.phases, self.state.step, self.state.place
            if step < self.total and phase_of(step, plan) != self.state.phase:
                place = place.next_phase()  # as the stream of updates does between two phases
            maker = BatchMaker(self.dataset, [source.folder for source in self.sources])
            for work in load_updates(
                maker, updates(self.dataset, plan, step, place),
                rank=self.ranks.rank, ranks=self.ranks.world, tokens=self.tokens, workers=workers, pin=cuda,
                sizes=self.sizes,
            ):  # fmt: skip
                yield work
                if plan is not self.phases:
                    break

    def _prepare(self, phase: Phase) -> None:
        """The fastest kernels for the phase serve, and the step gets to know its shapes."""
        self.prepared = phase.seq, phase.batch_size
        with self.meter.paused("preparing"):
            self._settle(phase)
            if self.sizes is None:
                return
            self.step.prepare(examples(self.dataset, self.sizes[phase.seq, phase.batch_size], phase.seq))

    def _predicted(self, work: Work) -> int | torch.Tensor:
        """How many tokens of the update are predicted, over all ranks."""
        if not self.config.whole_word:
            return int(work.update.masked.sum())
        # how many tokens the words have that are drawn, only the batches know
        predicted = sum(int((batch["masked_labels"] >= 0).sum()) for batch in work.batches)
        if self.ranks.world == 1:
            return predicted
        return self.ranks.sum(torch.full((), predicted, device=self.ranks.device))

    def _account(self, work: Work, lr: float, predicted: int | torch.Tensor, outcome: Outcome) -> str | None:
        """Takes an update's numbers into state and report; returns why the run must stop, or None."""
        update, state = work.update, self.state
        mlm, nsp, stops, norm = outcome.scalars.tolist()
        finite = all(map(math.isfinite, (mlm, nsp, norm)))
        state.count(update, phase_of(update.step, self.phases), finite=finite)
        predicted, real = int(predicted), int(self.dataset.real(update.lengths).sum())
        flops = step_flops(self.model.config, update.lengths.tolist(), predicted, train=True)
        self.meter.count(int(update.lengths.sum()), flops)
        if not finite:
            self.report.skipped(state.step, work, outcome)
        elif self._every(self.config.log_every, state.step):
            tokens, flops, seconds = self.meter.lap()
            state.seconds += seconds
            nsp = nsp if self.config.nsp else None
            entry = {
                "epoch": update.after.epoch, "loss": mlm + (nsp or 0.0), "mlm_loss": mlm, "nsp_loss": nsp,
                "learning_rate": lr, "grad_norm": norm, "mask_prob": predicted / real,
                "real_tokens_per_s": tokens / seconds, "mfu": flops / seconds / (self.peak * self.ranks.world),
                "seconds": state.seconds,
            }  # fmt: skip
            if state.read:
                entry["sources"] = self._read()
            self.report.trained(state.step, entry)
        if state.skipped_in_a_row >= self.config.max_skipped:
            return "not finite"
        return "signal" if stops else None

    def _read(self) -> dict:
        """Of each of several sources, its part of the tokens of the phase so far and the epochs of it."""
        read = self.state.read[-1]
        return {
            source.name: {"share": tokens / sum(read["tokens"]), "epochs": epochs}
            for source, tokens, epochs in zip(self.sources, read["tokens"], read["epochs"], strict=True)
        }

    def _validate(self) -> None:
        assert self.validation is not None
        with self.meter.paused("validation"):
            self.state.validation = self.validation(self.model, self.phases[self.state.phase].seq)
        self.report.validated(self.state.step, self.state.validation)

    def _every(self, interval: int, done: int) -> bool:
        return done % interval == 0 or done == self.total

    def _save(self) -> None:
        with self.meter.paused("checkpoint"):
            self.report.flush()
            model = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
            optimizer = state_tensors(self.optimizer, self.model)
            checkpoint.save(
                self.folder, self._state(), model, optimizer, self.ranks,
                description=description(self.model, self.tokenizer), keep=self.config.keep,
            )  # fmt: skip

    def _state(self) -> dict:
        return self.state.as_dict() | {
            "seq": self.phases[self.state.phase].seq,
            "precision": self.precision,
            "processes": self.ranks.world,
            "identity": self.identity,
            "options": self.given.as_dict(),
            "plan": {name: getattr(self.config, name) for name in PLANNED} if self.budget or self.config.origin else {},
            "spent": self.budget.spent if self.budget else None,
            "kernels": self.tuner.state,
        }

    def _go_on_from(self, before: checkpoint.Checkpoint) -> None:
        mine = owned(self.optimizer, self.model)
        new_model.load_weights(self.model, before.tensors("model"))
        load_state(self.optimizer, self.model, before.tensors("optimizer", lambda name: name.partition("/")[2] in mine))
        self.state = state = RunState.of(before.state)
        if before.state["identity"]["data"] != self.identity["data"]:
            state.place, state.read = start_of(self.dataset), []
            self.output.note(
                f"{described(self.config)} is not the data of {before.folder}: it begins with its first epoch"
            )
        self.output.note(f"going on from {before.folder}, update {state.step} of {self.total}")

    def _end(self, stop: str | None, asked_to_stop: Stop) -> int:
        self.report.ended(self.state.step, stop)
        if stop == "not finite":
            return NOT_FINITE
        if stop == "signal":
            return 128 + (asked_to_stop.signal or signal.SIGTERM)
        if self.ranks.first:
            state = self._state()
            self._plot()  # the card shows it
            folder = export(self.folder, self.model, self.tokenizer, self.config, sources=self.sources, state=state)
            facts = {"model": str(folder), "step": state["step"], "data_time": self.meter.share_waiting}
            facts |= {"skipped": state["skipped"], "validation": state["validation"]}
            text = f"{folder}: {state['step']:,} updates, waiting for data {self.meter.share_waiting:.1%} of the time"
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

    def _mixed(self, corpora: list[Corpus], *, few: bool, **masking) -> PretrainingDataset | Mixture:
        """The dataset of one source, or the mixture of several; with ``few`` of some of their documents."""
        if few:  # an epoch of all would be planned, for minutes
            corpora = [spaced_documents(corpus, nsp=self.config.nsp) for corpus in corpora]
        if len(corpora) == 1:
            return self._dataset(corpora[0], **masking)
        datasets = []
        for source, corpus in zip(self.sources, corpora, strict=True):
            try:
                datasets.append(self._dataset(corpus, **masking))
            except ValueError as error:
                raise ValueError(f"--data {source.folder}: {error}") from error
        names, shares = zip(*((source.name, source.share) for source in self.sources), strict=True)
        return Mixture(names, tuple(datasets), shares)

    def _validation(self, *, few: bool) -> Validation | ValidationBySource | None:
        """On the held-out documents of each source, or on those of --validation-data; none with ``few``."""
        config, limit = self.config, self.config.validation_sequences
        if config.validation_data:
            found = open_validation(config, self.tokenizer, self.sources[0].folder)
            held = {source.name: source.corpus for source in found}
            trained_on = [source.manifest for source in self.sources]
            for source in found:
                if source.manifest in trained_on:
                    self.output.warn(
                        f"--validation-data {source.folder} is trained on, too: its loss is of what the model remembers"
                    )
        else:
            found = self.sources
            held = {source.name: source.held_out for source in found if source.held_out is not None}
        self.held_out = list(held.values())
        if few or not held:
            return None
        if len(found) == 1:
            return self._validates(held[found[0].name], limit)
        for source in found:
            if source.name not in held:
                self.output.note(f"no validation on {source.name}: it has too few documents to hold any out")
        parts = {name: self._validates(corpus, max(1, limit // len(held))) for name, corpus in held.items()}
        return ValidationBySource(parts, {source.name: source.share for source in found})

    def _validates(self, corpus: Corpus, limit: int) -> Validation:
        return Validation(
            self._dataset(corpus),  # masked as published, so that curves of runs compare
            limit=limit, tokens=self.tokens, ranks=self.ranks, precision=self.precision,
        )  # fmt: skip
