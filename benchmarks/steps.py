"""A table of steps: every contender warmed up, timed in interleaved rounds, its rates and its memory."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks import clock, memory, tables
from benchmarks.contenders import CONTENDERS, Setting, build
from benchmarks.limits import NAMES
from benchmarks.workload import Batch, model_config
from bert_fast.flops import step_flops

DROPOUT = 0.1


@dataclass(frozen=True)
class Plan:
    """What a table is of. ``batch_of(sequences)`` gives its batch; ``lengths`` names theirs.

    ``limits`` are those of the machine (limits.py); with ``halve`` a batch that does not fit the memory of some
    contender is halved for all of them.
    """

    model: str
    lengths: str
    sequences: int
    batch_of: Callable[[int], Batch]
    setting: Setting
    limits: dict
    rounds: int
    halve: bool = False
    with_memory: bool = True


def label(name: str, padding: str, dtype: torch.dtype, train: bool) -> str:
    """A contender in tables: how it is padded where that is not the usual; of an encoder the precision."""
    parts = [name] + ["longest"] * (padding == "longest")
    return ", ".join(parts if train else [*parts, str(dtype).removeprefix("torch.")])


def measure(plan: Plan, entries: Sequence[tuple[str, str]], bar: "tables.Bar", title: str) -> list[dict]:
    """A row for each of ``entries`` (contender, padding); ours comes first. One that fails keeps its reason in its row.

    Raises what ours raises, and torch.OutOfMemoryError only where one sequence is too many.
    """
    while True:
        batch = plan.batch_of(plan.sequences)
        try:
            return _measure(plan, batch, entries, bar, title)
        except torch.OutOfMemoryError:
            if not plan.halve or plan.sequences < 2:
                raise
        plan = replace(plan, sequences=plan.sequences // 2)  # outside of the except: its traceback keeps tensors
        bar.phase(f"{title}: the memory does not hold it: {plan.sequences} sequences for all")
        release()


def release() -> None:
    """Give everything of the last table back."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _measure(plan: Plan, batch: Batch, entries, bar, title: str) -> list[dict]:
    setting, config = plan.setting, model_config(plan.model, dropout=DROPOUT)
    rows, steps, own = [], {}, clock.Clock(setting.device)
    for name, padding in entries:
        row = {"model": plan.model, "seq": batch.seq, "lengths": plan.lengths, "sequences": len(batch.lengths),
               "real_tokens": batch.real_tokens, "predicted": batch.predicted, "contender": name, "padding": padding,
               "dtype": NAMES[setting.dtype], "mode": "train" if setting.train else "encode",
               "optimizer": setting.optimizer}  # fmt: skip
        rows.append(row)
        bar.phase(f"{title}: warming up {name}")
        try:
            built = build(name, config, setting, padding=padding)
            row["dtype"] = str(built.computes_in).removeprefix("torch.")
            row["key"] = label(name, padding, built.computes_in, setting.train)
            if kernel := built.attention(batch):
                row["attention"] = kernel
            steps[row["key"]] = warmed_up(built, batch, row)
        except torch.OutOfMemoryError as error:
            if plan.halve:
                raise
            row["failed"] = str(error).strip().splitlines()[0][:60]
        except Exception as error:
            # A peer may fail for reasons of its own (no compiler, a bug): its row says so, the others run.
            if name == "bert_fast":
                raise
            row["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:60]}"
        row.setdefault("key", label(name, padding, setting.dtype, setting.train))
    bar.phase(f"{title}: {plan.rounds} rounds", total=plan.rounds * len(steps))
    times = clock.interleave(steps, plan.rounds, own.step, bar.tick)
    steps.clear()
    release()
    ours = next((row["key"] for row in rows if row["contender"] == "bert_fast" and row["key"] in times), None)
    for row in rows:
        if row["key"] in times:
            if plan.with_memory and setting.device == "cpu":
                bar.phase(f"{title}: peak memory of {row['key']}")
                row["peak_memory_mib"] = memory.in_a_process(
                    row["contender"], row["padding"], plan.model, batch, setting, DROPOUT
                )
            row |= rates(row, times[row["key"]], config, batch, plan)
            if ours and row["key"] != ours:
                row["ours_is"] = clock.paired_ratio(times[row["key"]], times[ours])
    return rows


def warmed_up(built, batch: Batch, row: dict) -> Callable[[], object]:
    """A step of ``built`` after its first one; on a GPU its peak memory is in ``row``."""
    if built.setting.device == "cpu":
        step = built.step(batch)
        step()
        return step
    with memory.PeakMemory("cuda") as peak:
        step = built.step(batch)
        # Preparing ours is no part of a step: its second rehearsal runs a forward beside all gradients that the first
        # has left. The first backward had no optimiser's state beside it, unless a rehearsal made that.
        peak.reset()
        step()
        step()
        clock.synchronize("cuda")
    row["peak_memory_mib"] = peak.mib
    return step


def rates(row: dict, times: list[float], config, batch: Batch, plan: Plan) -> dict:
    """What follows from the times of a row: per second, and of the machine's matrix-product rate in its dtype."""
    train = plan.setting.train
    step = clock.quantiles(times)
    executed = executed_flops(config, batch, row["contender"], row["padding"], plan.setting)
    full = step_flops(config, batch.lengths, batch.predicted if train else 0, train=train)
    limit = plan.limits["matmul_tflops"].get(row["dtype"])  # none of int8
    return {
        "step_s": step,
        "sequences_per_s": len(batch.lengths) / step["p50"],
        "real_tokens_per_s": batch.real_tokens / step["p50"],
        "executed_tflops": executed / step["p50"] / 1e12,
        "share_of_peak": executed / step["p50"] / limit / 1e12 if limit else None,
        "mfu": full / step["p50"] / limit / 1e12 if limit else None,
    }


def executed_flops(config, batch: Batch, name: str, padding: str, setting: Setting) -> int:
    """What a contender really computes: padding too where it pads, and the head wherever it runs it."""
    ours = CONTENDERS[name].ours is not None
    lengths = batch.lengths
    if not ours:
        lengths = [batch.seq if padding == "padded" else max(batch.lengths)] * len(batch.lengths)
    predicted = batch.predicted if ours or name == "hf-masked-head" else sum(lengths)
    read = None
    if ours and setting.train:  # the last layer at masked positions and, for NSP, at [CLS]
        read = batch.predicted + (len(lengths) if setting.nsp else 0)
    return step_flops(config, lengths, predicted if setting.train else 0, train=setting.train, read=read)


def best_published(rows: Sequence[dict]) -> list[str]:
    """The fastest contender of each other library and precision among ``rows``, of those that are published."""
    best: dict[tuple[str, str], str] = {}
    timed = [row for row in rows if "step_s" in row and CONTENDERS[row["contender"]].published]
    for row in sorted(timed, key=lambda row: row["step_s"]["p50"]):
        best.setdefault((CONTENDERS[row["contender"]].library, row["dtype"]), row["contender"])
    return list(best.values())
