"""The benchmark: does bert_fast compute what transformers computes, and how fast? On real text, in one process.

    python benchmarks/run.py --seq 512

Ours is the step of `bert-fast pretrain`, with its defaults on this device. Parity comes first: where it fails no speed
is printed and the exit status is 1. Bad arguments or a corpus that cannot be used end with status 2. The batches are
sentence pairs of a real corpus, masked as BERT's.
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works on a checkout that is not installed

import torch
import transformers

from benchmarks import finetuning, limits, operators, options, parity, results, steps, tables
from benchmarks.clock import Clock
from benchmarks.workload import Batch, Workload

say = tables.console.print


def main(argv: list[str] | None = None) -> int:
    asked = options.arguments(__doc__, argv)
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter is for tests; it must not be timed
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    found = results.begun("run", asked.device, ["benchmarks/run.py", *(sys.argv[1:] if argv is None else argv)])
    with tables.Bar() as bar:
        bar.phase("measuring the machine: matrix products and copies")
        found["limits"] = limits.measure(Clock(asked.device), {asked.setting.dtype, torch.float32})
    what = "kernels" if asked.kernels else asked.mode
    suffix = {"train": str(asked.seq), "finetune": what}.get(what, f"{asked.seq}-{what}")
    path = results.new_path(found, suffix) if asked.save else Path(asked.json) if asked.json else None
    file = results.Results(path, found)
    tables.introduce(found, asked.device)
    if asked.kernels:
        with tables.Bar() as bar:
            file.put("operators", operators.measure_operators(
                asked.device, asked.setting.dtype, model=asked.model, seq=asked.seq, batch=asked.batch or 2,
                rounds=asked.rounds, limits=found["limits"], progress=bar.phase,
            ))  # fmt: skip
        tables.operators(found["operators"]).show()
        say(operators.NOTE)
        return 0
    if asked.mode == "finetune":
        return finetuning.compare(asked, file)
    try:
        with tables.Bar() as bar:
            bar.phase("reading the corpus and training its tokenizer")
            work = Workload(asked.corpus, nsp=asked.setting.nsp)
        found["work"], check = options.size(asked, work, found["limits"])
    except (OSError, ValueError) as error:
        print(f"benchmarks/run.py: {error}", file=sys.stderr)
        return 2
    say(f"corpus     {work.name}: {work.documents} documents, {work.tokens} tokens")
    say("work       BERT-{model}, {mode}, batch {batch} x {seq}, {lengths} lengths, {real_tokens} real tokens, "
        "{masked} predicted, dropout {dropout}, optimizer {optimizer}, {dtype}".format_map(found["work"])
        + asked.why_dtype)  # fmt: skip
    status = compare(asked, work, check, file)
    say(f"{time.perf_counter() - tables.STARTED:.0f} s in all" + (f"; {path}" if path else ""))
    return status


def compare(asked, work: Workload, check: Batch, file: results.Results) -> int:
    """Parity, then the tables; the exit status."""
    with tables.Bar() as bar:
        rows, failed = parity.gate(asked.model, check, asked.setting, asked.peers, bar.phase)
    asked.peers = [peer for peer in asked.peers if peer not in failed]
    for peer, why in (asked.missing | failed).items():
        say(f"left out   {peer}: {why}")
    file.data["steps"], verdict = [], parity.summary(rows, most=5 if asked.setting.train else len(rows))
    file.put("parity", verdict)
    tables.parity(verdict).show()
    if not verdict["passed"]:
        print("benchmarks/run.py: parity failed, so no speed is measured", file=sys.stderr)
        return 1
    groups = timed(asked, work, file)
    if asked.plot or asked.save:
        tables.plot(asked.plot or file.path.with_suffix(".png"), groups)
    return 0


def timed(asked, work: Workload, file: results.Results) -> dict[str, list[dict]]:
    """The tables of a run, shown and saved as they come; returns their rows by title."""
    groups: dict[str, list[dict]] = {}

    def table(lengths: str, sequences: int, entries: list[tuple[str, str]], dtype: torch.dtype, what: str) -> list:
        plan = steps.Plan(
            model=asked.model, lengths=lengths, sequences=sequences, setting=replace(asked.setting, dtype=dtype),
            batch_of=lambda n: work.batch(n, asked.seq, lengths, asked.device), limits=file.data["limits"],
            rounds=asked.rounds, halve=asked.device == "cuda" and asked.batch is None,
            with_memory=not asked.no_memory and not groups,
        )  # fmt: skip
        title = f"{what}, BERT-{asked.model}, {asked.mode}, x {asked.seq}, {limits.NAMES[dtype]}"
        with tables.Bar() as bar:
            rows = steps.measure(plan, [("bert_fast", "packed"), *entries], bar, title)
        title = title.replace(" x ", f" {rows[0]['sequences']} x ", 1)
        tables.steps(rows, title=title).show()
        file.add("steps", *rows)
        groups[title] = rows
        return rows

    usual = [(peer, "packed" if peer.startswith("bert_fast") else "padded") for peer in asked.peers]
    rows = table(asked.lengths, file.data["work"]["batch"], usual, asked.setting.dtype, f"{asked.lengths} lengths")
    size = rows[0]["sequences"]
    if asked.lengths == "full":
        best = [(name, padding) for name in steps.best_published(rows) for padding in ("padded", "longest")]
        table("wikipedia", max(2, size), best, asked.setting.dtype, "Wikipedia's lengths, beside the best as published")
    if asked.setting.dtype != torch.float32:
        sdpa = [("hf-sdpa", "padded")] * ("hf-sdpa" in asked.peers)
        table(asked.lengths, size, sdpa, torch.float32, f"{asked.lengths} lengths (float32 is the reference's default)")
    return groups


if __name__ == "__main__":
    sys.exit(main())
