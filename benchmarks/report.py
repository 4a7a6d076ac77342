"""Writes the measured tables of docs/performance.md from the files of benchmarks/results/, and the step model's.

    python benchmarks/report.py [--check]

What stands between the comments ``<!-- NAME: made by benchmarks/report.py -->`` and ``<!-- end of NAME -->`` is made
here and nowhere by hand; the names are whole-steps-cpu, measured-gpu and step-model. With --check nothing is written:
the exit status is 1 where the document is not what the files give. Of each device the newest file counts, of a GPU the
newest with whole steps where there is one, of a CPU the newest of each mode, length and dtype; trials
(``benchmarks/gpu.py --smoke``) and unfinished first phases are left out.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

# Works on a checkout that nobody installed; the siblings are scripts, not a package.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]

import gpu_results
import step_aims
import step_model
from gpu_aims import aims_table
from step_model import CASES, Ceilings, ceilings_of, markdown_table, operator_seconds
from workload import model_config

DOCUMENT = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"


def newest(kind: str, results: Path) -> list[tuple[Path, dict]]:
    """The files of ``kind`` ("cpu": of benchmarks/run.py, "gpu": of benchmarks/gpu.py) that count: of each folder the
    newest, of a CPU the newest of each kind of work (mode, tokens, dtype)."""
    found = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        files: dict[tuple, list[tuple[Path, dict]]] = {}
        for path in sorted(folder.glob("*.json")):
            data = json.loads(path.read_text(encoding="utf-8"))
            is_gpu = data.get("kind") == "gpu"
            if is_gpu == (kind == "gpu") and not data.get("smoke") and ("limits" in data or not is_gpu):
                work = () if is_gpu else tuple(data["work"][key] for key in ("mode", "seq", "dtype"))
                files.setdefault(work, []).append((path, data))
        for same in files.values():
            same.sort(key=lambda file: (bool(file[1].get("steps")), file[1].get("started", file[1].get("date", ""))))
            found.append(same[-1])
    return found


def link(path: Path, results: Path) -> str:
    """A Markdown link to a results file from docs/."""
    return f"[{path.parent.name}/{path.name}](../benchmarks/results/{path.relative_to(results).as_posix()})"


def whole_steps_cpu(results: Path) -> str:
    """A table of each CPU's run: throughput, share of the matrix-product rate, memory, and how ours compares."""
    parts = []
    for path, data in newest("cpu", results):
        work, facts = data["work"], data["environment"]
        speedups = {"full": data.get("speedup", {}), "wikipedia": data.get("speedup_wikipedia", {})}
        rows = []
        for row in data.get("throughput", []):
            padded = f", {row['padding']}" if row["padding"] == "longest" else ""
            cells = [f"{row['lengths']}, {row['dtype']}", row["name"] + padded]
            if "failed" in row:
                rows.append([*cells, row["failed"], "", "", "", ""])
                continue
            faster = speedups.get(row["lengths"], {}).get(row["name"] + padded)
            if row["dtype"] != work["dtype"]:
                faster = data.get("speedup_float32", {}).get(row["name"] + padded)
            memory = row["peak_memory_mib"]
            rows.append([*cells, f"{row['sequences_per_s']:.2f}", f"{row['real_tokens_per_s']:.0f}",
                         f"{100 * row['share_of_peak']:.0f} %", "" if memory is None else f"{memory:.0f}",
                         "" if faster is None else f"{faster:.2f}x"])  # fmt: skip
        header = [
            "lengths, dtype",
            "variant",
            "sequences/s",
            "real tokens/s",
            "of the matrix rate",
            "peak MiB",
            "ours is",
        ]
        limits = facts["limits"]
        rates = ", ".join(f"{name} {1e3 * value:.0f} GFLOP/s" for name, value in limits["matmul_tflops"].items())
        parts.append(
            f"BERT-{work['model']}, {work['mode']}, {work['batch']} x {work['seq']}, dropout 0.1, optimizer "
            f"{work['optimizer']}, {work['rounds']} rounds, on {facts['machine']['processor']} "
            f"({facts['machine']['instruction set of torch']}, {facts['machine']['threads']} threads; matrix product "
            f'{rates}, copy {limits["copy_gbs"]:.1f} GB/s); {link(path, results)}. "ours is": the paired median over '
            f"rounds of their time over ours.\n\n{markdown_table(header, rows)}"
        )
    return "\n\n".join(parts) or "Nothing has been measured."


def against_the_model(data: dict) -> str:
    """Each line that was measured alone: predicted at the stated ceilings, at those of the run, and as measured."""
    measured = ceilings_of(data)
    rows = []

    def add(size: str, line: str, seconds: Callable[[Ceilings], float], ms: float) -> None:
        stated, own = (1e6 * seconds(ceilings) for ceilings in (Ceilings(), measured))
        rows.append([size, line, f"{stated:.0f}", f"{own:.0f}", f"{1e3 * ms:.0f}", f"{1e3 * ms / own:.2f}x"])

    for row in data.get("products", []):
        if "failed" not in row:
            flops = 1e9 * row["tflops"] * row["ms"]
            add(
                row["model"],
                row["shape"].removeprefix(row["model"]).strip(),
                lambda c, n=flops: n / c.matmul,
                row["ms"],
            )
    for row in data.get("operators", []):
        if row["contender"] != "bert_fast" or "failed" in row:
            continue
        config = model_config(row["model"], dropout=0.1)
        line = f"{row['operator']}, {row['direction']}"
        if row["direction"] == "update":
            lines = step_model.update(config, "bfloat16", row["operator"])
            add(row["model"], line, lambda c, found=lines: sum(x.seconds(c) for x in found), row["ms"])
        elif row["dropout"] and (row["model"], row["seq"], row["lengths"]) in CASES:
            lengths = step_model.lengths_of(row["lengths"], row["seq"])
            add(f"{row['model']} {row['seq']}, {row['lengths']}", line, lambda c, g=config, n=lengths, r=row:
                operator_seconds(g, n, r["operator"], r["direction"], c), row["ms"])  # fmt: skip
    header = ["BERT", "operator", "predicted, us", "at the run's ceilings", "measured", "measured / predicted"]
    return markdown_table(header, rows) if rows else "No operator was measured."


def measured_gpu(results: Path) -> str:
    """What was measured on each GPU, with the step model's figures beside it; says so where nothing was."""
    parts = []
    for path, data in newest("gpu", results):
        versions = data.get("environment", {}).get("versions", {})
        parts += [
            f"### {data['gpu']}, commit {data['commit']}",
            f"{link(path, results)}, {data['date']}; "
            + ", ".join(f"{name} {version}" for name, version in versions.items()),
            gpu_results.limits_table(data),
            gpu_results.left_out_text(data),
        ]
        parts += ["Against the aims:", aims_table(data)]
        if data.get("steps"):
            parts += ["Whole steps:", gpu_results.steps_table(data)]
        if candidates := gpu_results.candidates_table(data):
            parts += ["Candidates in a whole step:", candidates]
        if data.get("profiles"):
            parts += ["What the profile says:", gpu_results.profiles_text(data)]
        if data.get("operators"):
            parts += ["Operators:", gpu_results.operators_table(data)]
        if data.get("operators") or data.get("products"):
            parts += ["The step model, line by line:", against_the_model(data)]
        parts.append(gpu_results.parity_text(data))
    return (
        "\n\n".join(filter(None, parts)) or "**Nothing has been measured on a GPU yet**, and no GPU figure is claimed."
    )


def step_model_text(results: Path) -> str:
    """The prediction: every case, the aims, what would change it, a case line by line, and the bytes that are kept."""
    stated = Ceilings()
    forward, backward = stated.attention_forward / 1e12, stated.attention_backward / 1e12
    return "\n\n".join(
        [
            f"At {stated.matmul / 1e12:.0f} TFLOP/s for products, {stated.copy / 1e12:.1f} TB/s read and written, "
            f"attention at {forward:.0f} TFLOP/s forward and {backward:.0f} backward, "
            f"{stated.instructions / 1e12:.1f}e12 instructions/s of a lane, {1e6 * stated.between_kernels:.0f} us from "
            f"one kernel to the next; captured, 16-bit weights, LAMB, dropout 0.1, {step_model.TOKENS} real tokens a "
            'step. MFU counts the full formula of every real token, "executed" what is computed of it: the last layer '
            "only where it is read.",
            step_model.summary(stated),
            "Against the aims:",
            step_aims.aims(stated),
            "What would have to be true: changes of the code that save time by the same count, BERT-large at 512, each "
            "alone and all together:",
            step_aims.ifs(stated),
            'BERT-large at 512, full lengths, line by line. "avoidable" is the share of the bytes that the operator\'s '
            "inputs and outputs alone do not need:",
            step_model.detail("large", 512, "full", stated),
            "Bytes per token and layer that are kept from the forward to the backward:",
            step_model.memory(),
        ]
    )


SECTIONS = {"whole-steps-cpu": whole_steps_cpu, "measured-gpu": measured_gpu, "step-model": step_model_text}


def rewritten(text: str, results: Path = RESULTS) -> str:
    """``text`` with every section made anew. Raises ValueError for a section whose comments are missing."""
    for name, make in SECTIONS.items():
        begin, end = f"<!-- {name}: made by benchmarks/report.py -->", f"<!-- end of {name} -->"
        pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"the document needs exactly one pair of comments {begin} ... {end}")
        body = f"{begin}\n\n{make(results)}\n\n{end}"
        text = pattern.sub(lambda _, body=body: body, text)
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the document is out of date")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    before = options.document.read_text(encoding="utf-8")
    try:
        after = rewritten(before, options.results)
    except ValueError as error:
        print(f"benchmarks/report.py: {options.document}: {error}", file=sys.stderr)
        return 2
    if options.check:
        if after != before:
            print(f"{options.document} is out of date: run python benchmarks/report.py", file=sys.stderr)
        return int(after != before)
    options.document.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
