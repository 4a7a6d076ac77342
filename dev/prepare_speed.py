"""`prepare` beside what `tokenizers` alone reaches on the same text and cores; or the memory that `prepare` takes.

    python dev/prepare_speed.py [--corpus FILE] [--megabytes 12] [--workers 1 2] [--rounds 3] [--json]
    python dev/prepare_speed.py --memory --megabytes 500 --workers 2

Speed: every round runs both, for each number of workers on as many cores. `prepare` is timed as a user sees it, from
the start of its process to the manifest: it reads, splits sentences, encodes, drops duplicates, writes and flushes.
`tokenizers` is timed over `encode_batch_fast` of the same documents alone, each whole, already in memory, in as many
threads. "ratio" is the median over rounds of the time of tokenizers over that of `prepare`: above 1 ours is faster.
"of processor time" is the same of the time that the processors spent on them, which other work on them disturbs less.

Memory: one run, of which the resident memory of the process and its workers is read ten times a second.

Without --corpus the text is the Python language reference (`pydoc_data.topics`, each topic a document) again and again,
one word in 50 replaced by a number of up to 12 digits, so that no two documents are equal and new words keep coming.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Works on a checkout that is not installed. No torch here: this file is imported by the workers of `prepare`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MIB = 1 << 20
DOCUMENTS_A_BATCH = 256
SAMPLES_A_SECOND = 10


def write_reference(path: Path, megabytes: float, seed: int = 0) -> None:
    """At least ``megabytes`` of text, blank lines between documents."""
    from pydoc_data.topics import topics

    draw = random.Random(seed)
    documents = ["\n".join(line for line in topics[name].splitlines() if line.strip()) for name in sorted(topics)]
    words = [document.split(" ") for document in documents]
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            for document in words:
                changed = list(document)
                for place in draw.sample(range(len(changed)), -(-len(changed) // 50)):
                    changed[place] = str(draw.randrange(10**12))
                written += file.write(" ".join(changed) + "\n\n")


def run_prepare(corpus: str, tokenizer: str, out: str, workers: int, unit_bytes: int) -> None:
    from bert_fast.data import prepare

    prepare(corpus, tokenizer, out, workers=workers, unit_bytes=unit_bytes)


def run_tokenizers(corpus: str, tokenizer: str) -> tuple[float, float]:
    """Seconds, and seconds of processors, that encoding all documents takes, in RAYON_NUM_THREADS threads."""
    from bert_fast.data import load_tokenizer, stream_documents

    tokenizer = load_tokenizer(tokenizer)
    documents = [document.decode("utf-8", "replace") for document in stream_documents(corpus)]
    batches = [documents[i : i + DOCUMENTS_A_BATCH] for i in range(0, len(documents), DOCUMENTS_A_BATCH)]
    tokenizer.encode_batch_fast(["Threads are started."] * 100, add_special_tokens=False)
    start, busy = time.perf_counter(), time.process_time()
    for batch in batches:
        tokenizer.encode_batch_fast(batch, add_special_tokens=False)
    return time.perf_counter() - start, time.process_time() - busy


def child(*arguments, **environment) -> subprocess.Popen:
    """This script as a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps(arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment)


def finished(process: subprocess.Popen) -> str:
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a measured process failed with exit code {process.returncode}")
    return output


def processor_time_of_children() -> float:
    """Seconds, user and system, of the children that have ended, with theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def ratio(theirs: tuple[float, ...], ours: tuple[float, ...]) -> float:
    return statistics.median(other / own for other, own in zip(theirs, ours, strict=True))


def measure_speed(corpus: Path, tokenizer: Path, folder: Path, options: argparse.Namespace) -> list[dict]:
    """Medians and the ratio for each number of workers; the contenders take turns."""
    cores = sorted(os.sched_getaffinity(0))
    times: dict = {(name, workers): [] for workers in options.workers for name in ("prepare", "tokenizers")}
    for number in range(options.rounds):
        for workers in options.workers:
            os.sched_setaffinity(0, cores[:workers])
            out = folder / f"out-{workers}-{number}"
            start, busy = time.perf_counter(), processor_time_of_children()
            finished(child("prepare", str(corpus), str(tokenizer), str(out), workers, options.unit_bytes))
            busy = processor_time_of_children() - busy
            times["prepare", workers].append((time.perf_counter() - start, busy))
            taken = child("tokenizers", str(corpus), str(tokenizer), RAYON_NUM_THREADS=str(workers))
            times["tokenizers", workers].append(tuple(json.loads(finished(taken))))
            os.sched_setaffinity(0, cores)
    size = corpus.stat().st_size / 1e6
    rows = []
    for workers in options.workers:
        (ours, ours_busy), (theirs, theirs_busy) = (
            zip(*times[name, workers], strict=True) for name in ("prepare", "tokenizers")
        )
        row = {"workers": workers, "prepare_s": ours, "tokenizers_s": theirs, "ratio": ratio(theirs, ours)}
        row |= {"prepare_processor_s": ours_busy, "tokenizers_processor_s": theirs_busy}
        row["processor_ratio"] = ratio(theirs_busy, ours_busy)
        row |= {"prepare_mb_s": size / statistics.median(ours), "tokenizers_mb_s": size / statistics.median(theirs)}
        rows.append(row)
    return rows


def resident(pid: int) -> tuple[int, int]:
    """Bytes of a process that are resident, and those of them that are no pages of files; zeros where it has gone."""
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    return tuple(int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))


def children_of(pid: int) -> list[int]:
    try:
        return [int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def measure_memory(corpus: Path, tokenizer: Path, folder: Path, options: argparse.Namespace, workers: int) -> dict:
    """The peaks of one run, over time by quarters of the shards there are at the end, in MiB."""
    out = folder / "out"
    process = child("prepare", str(corpus), str(tokenizer), str(out), workers, options.unit_bytes)
    samples = []
    start = time.monotonic()
    while process.poll() is None:
        found = [resident(pid) for pid in [process.pid, *children_of(process.pid)]]
        total, anonymous = (sum(each) for each in zip(*found, strict=True))
        shards = len(list((out / "shards").glob("*.safetensors")))
        samples.append((shards, total, anonymous, found[0][1]))
        time.sleep(1 / SAMPLES_A_SECOND)
    seconds = time.monotonic() - start
    finished(process)
    last = samples[-1][0]
    peaks = []
    for quarter in range(1, 5):
        within = [sample for sample in samples if sample[0] <= last * quarter / 4]
        peaks.append([round(max(sample[i] for sample in within) / MIB) for i in (1, 2, 3)])
    return {"workers": workers, "seconds": seconds, "shards": last, "peaks_by_quarter_mib": peaks}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="text, JSON lines or Parquet (default: the Python reference)")
    parser.add_argument("--tokenizer", type=Path, help="(default: 8000 pieces trained on the reference)")
    parser.add_argument("--megabytes", type=float, default=12, help="of the reference")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--unit-bytes", type=int, default=MIB, help="of a shard's text; prepare's own is 8 MiB")
    parser.add_argument("--memory", action="store_true", help="measure memory instead, with the first of --workers")
    parser.add_argument("--work", type=Path, help="folder for corpus and shards (default: one that is removed)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, *arguments = options.child
        print(json.dumps(run_prepare(*arguments) if name == "prepare" else run_tokenizers(*arguments)))
        return 0
    cores = len(os.sched_getaffinity(0))
    if max(options.workers) > cores and not options.memory:
        parser.error(f"--workers {max(options.workers)}: there are {cores} cores to compare on")
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        return report(Path(folder), options)


def report(folder: Path, options: argparse.Namespace) -> int:
    from bert_fast.data import read_documents, save_tokenizer, train_tokenizer

    corpus, tokenizer = options.corpus or folder / "reference.txt", options.tokenizer or folder / "tokenizer"
    if options.tokenizer is None:
        sentences = (sentence for document in read_documents() for sentence in document)
        save_tokenizer(train_tokenizer(sentences, 8000), tokenizer)
    if options.corpus is None:
        write_reference(corpus, options.megabytes)
    facts = {"bytes": corpus.stat().st_size, "unit_bytes": options.unit_bytes}
    facts["load"] = os.getloadavg()[0]
    heading = f"{facts['bytes'] / 1e6:.1f} MB, units of {options.unit_bytes / MIB:g} MiB, load {facts['load']:.1f}"
    if options.memory:
        facts["memory"] = measure_memory(corpus, tokenizer, folder, options, options.workers[0])
        lines = [f"{heading}, {options.workers[0]} workers, {facts['memory']['seconds']:.0f} s, peaks in MiB"]
        lines.append(f"{'shards':>8} {'resident':>9} {'without file pages':>19} {'of it the caller':>17}")
        for quarter, peaks in enumerate(facts["memory"]["peaks_by_quarter_mib"], 1):
            done = facts["memory"]["shards"] * quarter // 4
            lines.append(f"{done:8} {peaks[0]:9} {peaks[1]:19} {peaks[2]:17}")
    else:
        facts["speed"] = measure_speed(corpus, tokenizer, folder, options)
        lines = [f"{heading}, {options.rounds} interleaved rounds, medians"]
        columns = f"{'workers':>8} {'prepare MB/s':>13} {'tokenizers MB/s':>16} {'ratio':>6} {'of processor time':>18}"
        lines.append(f"{columns}   of the rounds")
        for row in facts["speed"]:
            pairs = zip(row["prepare_s"], row["tokenizers_s"], strict=True)
            rounds = " ".join(f"{theirs / ours:.2f}" for ours, theirs in pairs)
            rates = f"{row['prepare_mb_s']:13.2f} {row['tokenizers_mb_s']:16.2f}"
            lines.append(f"{row['workers']:8} {rates} {row['ratio']:6.2f} {row['processor_ratio']:18.2f}   {rounds}")
    print(json.dumps(facts) if options.json else "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
