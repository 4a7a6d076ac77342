"""The benchmark: does bert_fast compute what transformers computes, and how fast? On real text, in one process.

    python benchmarks/run.py --seq 512

Parity comes first: where it fails no speed is printed and the exit status is 1. Bad arguments or a corpus that
cannot be used end with status 2. The batches are sentence pairs of a real corpus, masked as BERT's.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

# Works on a checkout that nobody installed; the siblings are scripts, not a package.
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import exported
import measure
import tables
import torch
import transformers
import variants
from numerical_parity import compare, compare_encodings
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from workload import MODELS, Workload, model_config, random_batch

from bert_fast.env import environment
from bert_fast.flops import step_flops
from bert_fast.train.devices import has_matrix_unit

DROPOUT = 0.1
STARTED = time.perf_counter()
TIMED_SECONDS = 200  # of interleaved rounds at full length that the default batch is chosen for
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="base", help="BERT's size (default base)")
    parser.add_argument("--seq", type=int, default=512, help="tokens of a full sequence (default 512)")
    parser.add_argument("--batch", type=int, help="sequences a step (default: what fits the time)")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto",
                        help="autocast dtype; auto: bfloat16 where it is multiplied faster, else float32")  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--lengths", choices=("full", "wikipedia", "corpus"), default="full",
                        help="lengths of the sequences; full adds a table at Wikipedia's lengths")  # fmt: skip
    parser.add_argument("--mode", choices=("train", "encode"), default="train")
    parser.add_argument(
        "--optimizer",
        choices=("none", "adamw", "lamb"),
        default="none",
        help="clipping and an update in the step: bert_fast.optim's for ours, PyTorch's own AdamW and "
        "a LAMB of PyTorch's operations for the peers",
    )
    parser.add_argument("--peers", default=",".join(variants.DEFAULT_PEERS), help="comma-separated: "
                        + "; ".join(f"{name} ({variants.DESCRIPTIONS[name]})" for name in variants.PEERS))  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--corpus", help="text to take the batches from (default: Python's language reference)")
    parser.add_argument("--no-nsp", action="store_true", help="masked language modelling alone")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory (a child process each)")
    parser.add_argument("--kernels", action="store_true", help="each operator alone instead of whole steps")
    parser.add_argument("--json", metavar="PATH", help="write the results there")
    parser.add_argument("--plot", metavar="PATH", help="write a picture of throughput and memory there")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.rounds < 1 or options.seq < 8 or (options.batch is not None and options.batch < 1):
        parser.error("--rounds and --batch are at least 1, --seq at least 8")
    limit = transformers.BertConfig().max_position_embeddings
    if options.seq > limit:
        parser.error(f"--seq {options.seq} is longer than the model's {limit} positions")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    options.peers = [peer for peer in options.peers.split(",") if peer]
    for peer in options.peers:
        if peer not in variants.PEERS:
            parser.error(f"--peers: unknown {peer!r}; the peers are {', '.join(variants.PEERS)}")
    options.nsp, options.train = not options.no_nsp, options.mode == "train"
    if options.dtype == "auto":
        hardware = has_matrix_unit(torch.device(options.device), torch.bfloat16)
        options.dtype = "bfloat16" if hardware else "float32"
        options.why_dtype = "" if hardware else " (bfloat16 is not multiplied faster here; --dtype bfloat16 forces it)"
    else:
        options.why_dtype = ""
    return options


def usable_peers(options: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """The peers that run, and why the others do not."""
    why = {peer: variants.why_unavailable(peer, options.device) for peer in options.peers}
    if not options.train or options.no_nsp:
        why["hf-masked-head"] = "it is for MLM + NSP training"
    if options.train:
        why |= dict.fromkeys(exported.PACKAGES, "it encodes only: --mode encode")
    return [p for p in options.peers if why.get(p) is None], {p: why[p] for p in options.peers if why.get(p)}


def default_batch(options: argparse.Namespace, config, rate: float, peers: int) -> int:
    """The largest power of two whose warm-up and rounds fit TIMED_SECONDS at half of the matrix rate."""
    full = step_flops(config, [options.seq], options.seq, train=options.train)
    most = TIMED_SECONDS * 0.5 * rate / (full * (options.rounds + 1) * (peers + 1))
    batch = 1
    while batch * 2 <= min(most, 64):
        batch *= 2
    return batch


class Bar:
    """A progress bar on a terminal, a line for every new phase elsewhere."""

    def __enter__(self):
        self.live = tables.console.is_terminal
        if self.live:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.progress = Progress(*columns, console=tables.console, transient=True)
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


def label(name: str, padding: str) -> str:
    """A variant's name in tables and ratios; how it is padded is said where it is not the usual."""
    return f"{name}, {padding}" if padding == "longest" else name


def computes_in(name: str, dtype: torch.dtype) -> torch.dtype:
    """What the variant ``name`` multiplies in where ``dtype`` is asked for."""
    return exported.computes_in(name, dtype) if name in exported.PACKAGES else dtype


def executed_flops(options, config, batch, name: str, padding: str) -> int:
    """What a variant really computes: padding too where it pads, and the head wherever it runs it."""
    if padding == "packed":
        lengths = batch.lengths
    else:
        lengths = [batch.seq if padding == "padded" else max(batch.lengths)] * len(batch.lengths)
    everywhere = name not in ("bert_fast", "hf-masked-head")
    predicted = sum(lengths) if everywhere else batch.predicted
    read = None
    if name == "bert_fast" and options.train:  # the last layer at masked positions and, for NSP, at [CLS]
        read = batch.predicted + (len(lengths) if options.nsp else 0)
    return step_flops(config, lengths, predicted if options.train else 0, train=options.train, read=read)


def timed_table(
    options, config, batch, entries: list[tuple[str, str]], dtype, peaks, bar, title: str, with_memory: bool
):
    """Times ``entries`` (variant, padding) interleaved; returns table rows and ours-over-theirs ratios by key.

    ``peaks`` holds the matrix rate by dtype. A variant that fails keeps its reason in its row.
    """
    steps, failed = {}, {}
    for name, padding in entries:
        key = label(name, padding)
        bar.phase(f"{title}: warming up {key}")
        try:
            variant = variants.build(
                name, config, options.device, train=options.train, nsp=options.nsp, padding=padding, dtype=dtype
            )
            step = variants.make_step(
                variant, batch, options.device, dtype, train=options.train, optimizer=options.optimizer
            )
            step()
            steps[key] = step
        except Exception as error:
            # A peer may fail for reasons of its own (no compiler, out of memory): its row says so, the others run.
            if name == "bert_fast":
                raise
            failed[key] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:60]}"
    bar.phase(f"{title}: {options.rounds} rounds", total=options.rounds * len(steps))
    times = measure.interleave(steps, options.rounds, options.device, bar.tick)
    steps.clear()

    memory = dict.fromkeys(times)
    if with_memory and not options.no_memory:
        shape = {
            "model": options.model, "seq": batch.seq, "lengths": batch.lengths, "predicted": batch.predicted,
            "device": options.device, "dtype": NAMES[dtype], "train": options.train,
            "nsp": options.nsp, "optimizer": options.optimizer,
        }  # fmt: skip
        for name, padding in entries:
            if label(name, padding) in times:
                bar.phase(f"{title}: peak memory of {label(name, padding)}")
                memory[label(name, padding)] = measure.peak_memory_mib({**shape, "name": name, "padding": padding})

    rows, ratios = [], {}
    full = step_flops(
        config, [batch.seq] * len(batch.lengths), batch.predicted if options.train else 0, train=options.train
    )
    for name, padding in entries:
        key = label(name, padding)
        multiplies_in = computes_in(name, dtype)
        row = {"name": name, "padding": padding, "key": key, "dtype": NAMES[multiplies_in]}
        if key in failed:
            rows.append(row | {"failed": failed[key]})
            continue
        step = measure.quantiles(times[key])
        executed = executed_flops(options, config, batch, name, padding)
        rows.append(
            row
            | {
                "step_s": step,
                "sequences_per_s": len(batch.lengths) / step["p50"],
                "real_tokens_per_s": batch.real_tokens / step["p50"],
                "executed_tflops": executed / step["p50"] / 1e12,
                "share_of_peak": executed / step["p50"] / peaks[multiplies_in],
                "mfu": full / step["p50"] / peaks[multiplies_in],
                "peak_memory_mib": memory[key],
            }
        )
        if name != "bert_fast":
            ratios[key] = measure.paired_ratio(times[key], times["bert_fast"])
    return rows, ratios


def memory_of(text: str) -> int:
    """In a child process: the peak memory of one variant's step, on a batch of the same shape, printed in MiB."""
    a = json.loads(text)
    config = model_config(a["model"], dropout=DROPOUT)
    dtype = DTYPES[a["dtype"]]
    variant = variants.build(
        a["name"], config, a["device"], train=a["train"], nsp=a["nsp"], padding=a["padding"], dtype=dtype
    )
    batch = random_batch(a["lengths"], a["predicted"], a["seq"], a["device"], nsp=a["nsp"])
    step = variants.make_step(variant, batch, a["device"], dtype, train=a["train"], optimizer=a["optimizer"])
    with measure.PeakMemory(a["device"]) as peak:
        step()
    print(peak.mib)
    return 0


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    if options.memory_of:
        return memory_of(options.memory_of)
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter is for tests; it must not be timed
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    dtype, device = DTYPES[options.dtype], options.device
    facts = environment()
    say = tables.console.print

    if not options.kernels:
        with Bar() as bar:
            bar.phase("reading the corpus and training its tokenizer")
            try:
                work = Workload(options.corpus, nsp=options.nsp)
            except (OSError, ValueError) as error:
                print(f"benchmarks/run.py: {error}", file=sys.stderr)
                return 2
    with Bar() as bar:
        bar.phase("measuring the machine: matrix products and copies")
        peaks = {kind: measure.matmul_rate(device, kind) for kind in {dtype, torch.float32}}
        copy = measure.copy_rate(device)
    versions = facts["versions"]
    say(
        f"[bold]bert_fast {versions['bert_fast']}[/bold] against transformers {versions['transformers']}, torch "
        f"{versions['torch']}, Python {versions['python']}"
    )
    say(f"machine    {facts['devices'][0] if device == 'cuda' else facts['machine']['processor']}, "
        f"{facts['machine']['threads']} threads, {facts['machine']['instruction set of torch']}")  # fmt: skip
    say(f"limits     matrix product {', '.join(f'{NAMES[k]} {v / 1e12:.3f} TFLOP/s' for k, v in peaks.items())}; "
        f"copy {copy / 1e9:.1f} GB/s")  # fmt: skip
    say(f"operators  {', '.join(sorted({d[device] for d in facts['operators'].values()}))}")

    limits = {"matmul_tflops": {NAMES[k]: v / 1e12 for k, v in peaks.items()}, "copy_gbs": copy / 1e9}

    if options.kernels:
        from operators import measure_operators, print_operators

        limits["matmul_tflops"] = limits["matmul_tflops"][options.dtype]
        with Bar() as bar:
            bar.phase("operators")
            rows = measure_operators(
                device, dtype, model=options.model, seq=options.seq, batch=options.batch or 2, rounds=options.rounds,
                limits=limits, progress=bar.phase,
            )  # fmt: skip
        print_operators(rows)
        if options.json:
            Path(options.json).write_text(
                json.dumps({"environment": facts, "limits": limits, "operators": rows}, indent=1)
            )
        return 0

    peers, missing = usable_peers(options)
    config = model_config(options.model, dropout=DROPOUT)
    size = options.batch or default_batch(options, config, peaks[dtype], len(peers))
    try:
        batch = work.batch(size, options.seq, options.lengths, device)
        wikipedia = work.batch(max(2, size), options.seq, "wikipedia", device) if options.lengths == "full" else None
        check = work.parity_batch(options.seq, device)
    except ValueError as error:
        print(f"benchmarks/run.py: {error}", file=sys.stderr)
        return 2
    say(f"corpus     {work.name}: {work.documents} documents, {work.tokens} tokens")
    say(f"work       BERT-{options.model}, {options.mode}, batch {size} x {options.seq}, {options.lengths} lengths, "
        f"{batch.real_tokens} real tokens, {batch.predicted} predicted, dropout {DROPOUT}, optimizer "
        f"{options.optimizer}, {options.dtype}{options.why_dtype}")  # fmt: skip
    for peer, why in missing.items():
        say(f"left out   {peer}: {why}")
    say()

    with Bar() as bar:
        plain = model_config(options.model, dropout=0.0)
        if options.train:
            parity = compare(plain, check, device, dtype, nsp=options.nsp, progress=bar.phase)
        else:
            others = [peer for peer in peers if variants.library(peer) != "transformers"]
            parity, failed = compare_encodings(plain, check, device, dtype, others, progress=bar.phase)
            peers = [peer for peer in peers if peer not in failed]
    if options.train:
        tables.show_parity(parity)
    else:
        for peer, why in failed.items():
            say(f"left out   {peer}: {why}")
        tables.show_encoding_parity(parity)
    passed = all(row["passed"] for row in parity)
    results = {
        "environment": facts | {"limits": limits},
        "work": {
            "model": options.model, "seq": options.seq, "batch": size, "lengths": options.lengths,
            "real_tokens": batch.real_tokens, "masked": batch.predicted, "dtype": options.dtype, "mode": options.mode,
            "optimizer": options.optimizer, "rounds": options.rounds, "corpus": work.name,
            "parity_lengths": check.lengths,
        },
        "parity": {"passed": passed, "rows": parity},
        "throughput": [],
        "speedup": {},
    }  # fmt: skip
    if passed:
        groups = time_everything(options, config, batch, wikipedia, peers, dtype, peaks, results)
        if options.plot:
            tables.plot(options.plot, groups)
    else:
        print("benchmarks/run.py: parity failed, so no speed is measured", file=sys.stderr)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")
    say(f"{time.perf_counter() - STARTED:.0f} s in all")
    return 0 if passed else 1


def time_everything(options, config, batch, wikipedia, peers, dtype, peaks, results) -> dict[str, list[dict]]:
    """The tables of a run, shown as they come and added to ``results``; returns them by title."""
    groups = {}

    def table(title: str, batch, entries, dtype, lengths: str) -> tuple[list[dict], dict]:
        with Bar() as bar:
            rows, ratios = timed_table(
                options, config, batch, entries, dtype, peaks, bar, title, with_memory=not groups
            )
        tables.show_throughput(title, rows, ratios)
        for row in rows:
            results["throughput"].append({k: v for k, v in row.items() if k != "key"} | {"lengths": lengths})
        groups[title] = rows
        return rows, ratios

    shape = f"{len(batch.lengths)} x {options.seq}"
    rows, results["speedup"] = table(
        f"{options.lengths} lengths, {shape}, {options.dtype}", batch,
        [("bert_fast", "packed"), *((peer, "padded") for peer in peers)], dtype, options.lengths,
    )  # fmt: skip
    best = {}  # of each library
    timed = [row for row in rows if row["name"] != "bert_fast" and "failed" not in row]
    for row in sorted(timed, key=lambda row: row["step_s"]["p50"]):
        best.setdefault(variants.library(row["name"]), row["name"])
    if wikipedia is not None:
        mean = wikipedia.real_tokens / len(wikipedia.lengths)
        entries = [("bert_fast", "packed")]
        entries += [(name, padding) for name in best.values() for padding in ("padded", "longest")]
        _, results["speedup_wikipedia"] = table(
            f"Wikipedia's lengths (mean {mean:.0f}), {len(wikipedia.lengths)} x {options.seq}, {options.dtype}",
            wikipedia, entries, dtype, "wikipedia",
        )  # fmt: skip
    if dtype != torch.float32:
        entries = [("bert_fast", "packed"), *((peer, "padded") for peer in ("hf-sdpa",) if peer in peers)]
        _, results["speedup_float32"] = table(
            f"{options.lengths} lengths, {shape}, float32 (the reference's default)", batch, entries, torch.float32,
            options.lengths,
        )  # fmt: skip
    return groups


if __name__ == "__main__":
    sys.exit(main())
