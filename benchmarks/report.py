"""What results files say, in Markdown and pictures; writes docs/performance.md and the table of README.md.

    python benchmarks/report.py [--check]

docs/performance.md is made whole of performance_template.md. In README.md what stands between ``<!-- how-fast: made by
benchmarks/report.py -->`` and ``<!-- end of how-fast -->`` is made here and nowhere by hand. With --check nothing is
written: the exit status is 1 where a document is not what the files give. Of each device the newest file counts, of a
GPU the newest with whole steps where there is one, of a CPU the newest of each kind of work; trials and files
without limits are left out.
"""

import argparse
import json
import statistics
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from string import Template

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works on a checkout that is not installed

from benchmarks import tables
from benchmarks.predict import step_model
from benchmarks.predict.step_model import CASES, Ceilings, ceilings_of, operator_seconds
from benchmarks.results import FOLDER, ROOT, Results, reason
from benchmarks.tables import Table, number, percent, size_of
from benchmarks.tune import settings
from benchmarks.workload import TOKENS, lengths_of, model_config

TEMPLATE = Path(__file__).resolve().parent / "performance_template.md"
WORK = ("mode", "seq", "lengths", "dtype")  # what is measured of its own on a CPU
MOST_KERNELS = 25  # lines of a profile; the others in one


def newest(kind: str, results: Path) -> list[tuple[Path, dict]]:
    """The files of ``kind`` ("run" on a CPU, "gpu") that count: of each folder the newest, of a CPU the newest of each
    kind of WORK. Training that is not the product's own step (README.md there) does not."""
    found = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        files: dict[tuple, list[tuple[Path, dict]]] = {}
        for path in sorted(folder.glob("*.json")):
            data = json.loads(path.read_text(encoding="utf-8"))
            if (
                data["kind"] == kind
                and not data.get("smoke")
                and data.get("limits")
                and (kind == "gpu" or "work" in data)
                and not ("step" in data and data["work"]["mode"] == "train")
            ):
                work = tuple(data["work"][key] for key in WORK) if kind == "run" else ()
                files.setdefault(work, []).append((path, data))
        for same in files.values():
            same.sort(key=lambda file: (bool(file[1].get("steps")), file[1].get("started", file[1].get("date", ""))))
            found.append(same[-1])
    return found


def link(path: Path, results: Path) -> str:
    """A Markdown link to a results file from docs/."""
    return f"[{path.parent.name}/{path.name}](../benchmarks/results/{path.relative_to(results).as_posix()})"


def command(data: dict) -> str:
    """The command that measured ``data``, without where it wrote to."""
    words = list(data["command"])
    for option in ("--json", "--plot"):
        if option in words:
            at = words.index(option)
            del words[at : at + 2]
    return f"`python {' '.join(word for word in words if word != '--save')}`" if words else "command not recorded"


def how(path: Path, data: dict, results: Path) -> str:
    """A line of a list: the file of a run, and how it was measured."""
    versions, machine = data["environment"]["versions"], data["environment"].get("machine")
    device = data["device"]
    if data["kind"] == "run" and machine:
        device = f"{machine['processor']} ({machine['instruction set of torch']}, {machine['threads']} threads)"
    return (
        f"- {link(path, results)}: {device}, commit {data['commit']}, {command(data)}; torch {versions['torch']}, "
        f"transformers {versions['transformers']}; {tables.limits(data['limits'])}"
    )


def compared(runs: list[tuple[Path, dict]], results: Path) -> str:
    """One table of the whole steps of ``runs``, and of each run how it was measured."""
    table = tables.compared([(path.parent.name, data.get("steps", [])) for path, data in runs]).markdown()
    return "\n\n".join([table, "\n".join(how(path, data, results) for path, data in runs)])


def whole_steps_cpu(results: Path) -> str:
    runs = newest("run", results)
    return compared(runs, results) if runs else "Nothing has been measured."


def how_fast(results: Path) -> str:
    """README's table and picture: the newest run of training at 512 tokens, on whatever device."""
    runs = [run for run in newest("run", results) if run[1]["work"]["mode"] == "train" and run[1]["work"]["seq"] == 512]
    if not runs:
        return "Nothing has been measured."
    path, data = max(runs, key=lambda run: run[1].get("started", run[1]["date"]))
    work, machine, versions = data["work"], data["environment"]["machine"], data["environment"]["versions"]
    # docs/performance.md has all rows
    rows = [x for x in data["steps"] if x["dtype"] == work["dtype"] and x["contender"] != "hf-masked-head"]
    where = path.relative_to(results.parent.parent).as_posix()
    picture = f"\n\n![throughput and peak memory by contender]({where.removesuffix('.json')}.png)"
    return (
        f"BERT-{work['model']}, training steps of {work['batch']} x {work['seq']} tokens, {work['dtype']}, dropout "
        f"0.1, beside transformers {versions['transformers']} with torch {versions['torch']}, on {machine['threads']} "
        f"cores of a shared {machine['processor']} ({machine['instruction set of torch']}); commit {data['commit']}, "
        f'[its file]({where}). Contenders run interleaved in one process; "ours is" is the median over rounds of their '
        f"time over ours.\n\n{tables.steps(rows, tables.README).markdown()}"
        + (picture if path.with_suffix(".png").exists() else "")
        + fine_tuning(path.parent, results)
    )


def fine_tuning(folder: Path, results: Path) -> str:
    """README's sentence of the newest run of fine-tuning on the device of ``folder``, beside Trainer as published."""
    runs = [run for run in newest("run", results) if run[0].parent == folder and run[1]["work"]["mode"] == "finetune"]
    if not runs:
        return ""
    path, data = max(runs, key=lambda run: run[1]["started"])

    def beside(dtype: str) -> str:
        found: dict[str, list[str]] = {}
        for x in data["steps"]:
            if (x["contender"], x["dtype"]) == ("trainer", dtype):
                found.setdefault(x["lengths"], []).append(tables.times(x["ours_is"]))
        return ", ".join(f"{lengths} {' and '.join(each)}" for lengths, each in found.items())

    own, where = data["steps"][0]["dtype"], path.relative_to(results.parent.parent).as_posix()
    too = f"; in {own} too: {same}" if own != "float32" and (same := beside(own)) else ""
    return (
        f"\n\nFine-tuning and prediction in {own}, in real tokens a second over those of transformers' `Trainer` in "
        f"float32, its default: {beside('float32')}{too}; commit {data['commit']}, [its file]({where})."
    )


def against_the_model(data: dict) -> Table:
    """Each line that was measured alone: predicted at the stated ceilings, at those of the run, and as measured."""
    measured, expected, rows = ceilings_of(data), step_model.stated(data["device"]), []

    def add(size: str, line: str, seconds: Callable[[Ceilings], float], ms: float) -> None:
        stated, own = (1e6 * seconds(ceilings) for ceilings in (expected, measured))
        rows.append([size, line, f"{stated:.0f}", f"{own:.0f}", f"{1e3 * ms:.0f}", f"{1e3 * ms / own:.2f}x"])

    for row in data.get("products", []):
        flops = 1e9 * row["tflops"] * row["ms"]
        add(row["model"], row["shape"], lambda c, n=flops: n / c.matmul, row["ms"])
    for row in data.get("operators", []):
        if row["contender"] != "bert_fast" or "failed" in row or row["operator"] == "norm":
            continue
        config, line = model_config(row["model"], dropout=0.1), f"{row['operator']}, {row['direction']}"
        if row["direction"] == "update":
            lines = step_model.update(config, row["weights"], row["operator"])
            add(row["model"], f"{line}, {row['weights']}", lambda c, found=lines: sum(x.seconds(c) for x in found),
                row["ms"])  # fmt: skip
        elif row["dropout"] and (row["model"], row["seq"], row["lengths"]) in CASES:
            lengths = lengths_of(row["lengths"], row["seq"])
            add(f"{row['model']} {row['seq']}, {row['lengths']}", line, lambda c, g=config, n=lengths, r=row:
                operator_seconds(g, n, r["operator"], r["direction"], c), row["ms"])  # fmt: skip
    header = ["BERT", "operator", "predicted, us", "at the run's ceilings", "measured", "measured / predicted"]
    return Table(header, rows)


# --------------------------------------------------------------------------------------------------------------
# A run on a GPU


def products_table(data: dict) -> Table:
    limit = data.get("limits", {}).get("matmul_tflops", {}).get("bfloat16")
    return Table.of(data["products"], {
        "BERT": lambda x: x["model"], "product of a step": lambda x: x["shape"],
        "TFLOP/s": lambda x: number(x["tflops"]), "ms": lambda x: number(x["ms"]),
        "of the limit": lambda x: percent(x["tflops"] / limit if limit else None),
        "by cuBLASLt, TFLOP/s": lambda x: number(x.get("cublaslt_tflops")),
    })  # fmt: skip


def candidates_table(data: dict) -> Table:
    """What a step gains from each candidate to become the default, beside ours as built in the same rounds."""
    return Table.of([x for x in data["steps"] if "differs" in x and "ours_is" in x], {
        "BERT": size_of, "with": lambda x: x["contender"], "step ms": lambda x: f"{1e3 * x['step_s']['p50']:.1f}",
        "faster than as built": lambda x: f"{1 / x['ours_is']:.3f}x",
        "loss, worst gradient differ by": lambda x: ", ".join(percent(v, 1) for v in x["differs"].values()),
    })  # fmt: skip


def profiles_text(data: dict) -> str:
    """Of each profiled step the kernels that take longest."""
    parts = []
    for x in data["profiles"]:
        size = {key: x[key] for key in ("model", "seq", "lengths", "sequences")}
        timed = next((y for y in data.get("steps", []) if y["contender"] == "bert_fast" and size.items() <= y.items()
                      and "step_s" in y), None)  # fmt: skip
        of_step = f" of a step of {1e3 * timed['step_s']['p50']:.1f} ms" if timed else ""
        lines, others = x["kernels"][:MOST_KERNELS], x["kernels"][MOST_KERNELS:]
        if others:
            sums = {key: sum(line[key] for line in others) for key in ("calls", "us")}
            lines = [*lines, {"kernel": f"{len(others)} others", **sums}]
        table = Table.of(lines, {
            "kernel": lambda line: line["kernel"][:100], "calls": lambda line: number(line["calls"]),
            "us": lambda line: number(line["us"]),
            "of all kernels": lambda line, whole=x["kernels_s"]: percent(line["us"] / 1e6 / whole, 1),
        })  # fmt: skip
        parts.append(f"BERT-{size_of(x)}: kernels and copies take {1e3 * x['kernels_s']:.1f} ms{of_step}.\n\n"
                     + table.markdown())  # fmt: skip
    return "\n\n".join(parts)


def parity_text(data: dict) -> str:
    parts = []
    for x in data["parity"]:
        verdict = "" if x["passed"] else "**not right**, "
        worst = max(x["worst"], key=lambda row: (row["error"] is None, (row["error"] or 0.0) / (row["bound"] or 1.0)))
        error = "infinite" if worst["error"] is None else f"{worst['error']:.2e}"
        parts.append(
            f"- {x['what']}, {x['dtype']}: {verdict}{x['compared'] - x['failed']} of {x['compared']} within "
            f"their bounds against float64; the nearest: {worst['what']}, {error} of {worst['bound']:.2e}"
        )
    return "\n".join(parts)


def tests_text(data: dict) -> str:
    tests = data["tests"]
    if "not_run" in tests:
        return f"The suite's tests were not run, as {tests['not_run']}."
    failed = "".join(f"\n- {x['test']}: {x['message']}" for x in tests["failed"])
    state = "" if tests["finished"] else f" when {tests.get('stopped', 'their process was ended')}"
    return f"The suite's tests: {tests['passed']} passed, {len(tests['failed'])} failed{state}.{failed}"


def tune_table(data: dict) -> Table:
    def fastest(x: dict) -> dict:  # of what had been tried when it was cut off
        return min((t for t in x["tried"] if "us" in t), key=lambda t: t["us"], default={"changed": {}})

    return Table.of(data["tune"], {
        "kernel": lambda x: x["what"], "default us": lambda x: number(x["default_us"]),
        "best us": lambda x: number(x.get("best_us", fastest(x).get("us"))),
        "to write into the constants": lambda x: x.get("write") or (
            f"cut off after {len(x['tried'])} configurations; the fastest: "
            + (settings(fastest(x)["changed"]) or "none ran")
        ),
    })  # fmt: skip


def choices_table(data: dict) -> Table:
    """What won, and what is out; of the rest how many there were."""
    told = [x for x in data["choices"] if x["outcome"] not in ("slower", "within the margin")]
    rest = {"what": f"{len(data['choices']) - len(told)} more", "question": "", "outcome": "not faster"}
    return Table.of([*told, rest], {
        "for": lambda x: x["what"], "question": lambda x: x["question"], "outcome": lambda x: x["outcome"],
        "candidate": lambda x: "; ".join(f"{n} {settings(t)}" for n, t in x.get("candidate", {}).items()),
        "of the default's time": lambda x: number(max(x["ratios"])) if "ratios" in x else x.get("why", "")[:120],
    })  # fmt: skip


def curves_text(data: dict) -> str:
    return "\n\n".join(
        f"Loss of {x['contender']} over {len(x['losses'])} steps: {x['losses'][0]:.3f} to "
        f"{statistics.mean(x['losses'][-20:]):.3f} (mean of the last {len(x['losses'][-20:])})."
        for x in data["curves"]
    )


# title -> (table of the results, what makes its text)
PARTS: dict[str, tuple[str, Callable[[dict], "Table | str"]]] = {
    "Limits": ("limits", lambda data: tables.limits(data["limits"])),
    "Parity": ("parity", parity_text),
    "Tests": ("tests", tests_text),
    "Whole steps": ("steps", lambda data: tables.steps(data["steps"], tables.GPU)),
    "Candidates in a whole step": ("steps", candidates_table),
    "What the profile says": ("profiles", profiles_text),
    "Operators": ("operators", lambda data: tables.operators(data["operators"])),
    "Products of a step": ("products", products_table),
    "The step model, line by line": ("operators", against_the_model),
    "Loss curves": ("curves", curves_text),
    "Launch configurations": ("tune", tune_table),
    "Kernels chosen": ("choices", choices_table),
}


def gpu_text(data: dict, heading: str) -> str:
    """Every part of a run that there is, under ``heading`` (#s); and what was left out or failed."""
    parts = []
    for title, (key, make) in PARTS.items():
        made = make(data) if data.get(key) else ""
        if isinstance(made, Table):
            made = made.markdown() if made.rows else ""
        parts += [f"{heading} {title}", made] if made else []
    cases = data.get("cases", [])
    if late := [x["case"] for x in cases if x["state"] == "left out"]:
        parts.append(f"Left out, as there was no time for them: {'; '.join(late)}.")
    if wrong := [x for x in cases if x["state"] in ("failed", "lost")]:
        parts += [f"{heading} What failed", "\n".join(f"- {x['case']}: {x['error']}" for x in wrong)]
    return "\n\n".join(parts)


def measured_gpu(results: Path) -> str:
    """The whole steps of each GPU; says so where nothing was measured. The rest stands in the text beside the file."""
    runs = newest("gpu", results)
    return (
        compared(runs, results) if runs else "**Nothing has been measured on a GPU yet**, and no GPU figure is claimed."
    )


def beside(data: dict) -> str:
    """The text of a run's own file."""
    cases = Table(["case", "state", "seconds"], [
        [x["case"], x["state"], number(x.get("seconds"))] for x in data.get("cases", []) if x["state"] != "left out"
    ])  # fmt: skip
    versions = data["environment"]["versions"].items()
    return "\n\n".join(filter(None, (
        f"# {data['device']}, {data['date']}, commit {data['commit']}",
        "A trial on a CPU with tiny sizes: no figure here means anything." if data["smoke"] else "",
        ", ".join(f"{name} {version}" for name, version in versions), "`" + " ".join(data["command"]) + "`",
        cases.markdown(), gpu_text(data, "##"),
        *(f"{x['case']}:\n```\n{x['traceback']}```" for x in data.get("cases", []) if "traceback" in x),
    ))) + "\n"  # fmt: skip


def write_beside(found: Results) -> None:
    """The readable form beside the JSON, and the pictures where matplotlib is there. Neither is worth a run: what goes
    wrong here stands in the text."""
    stem = found.path.with_suffix("")
    try:
        text = beside(found.data)
    except Exception:
        text = f"The results are in {found.path.name}; making this text failed:\n\n```\n{traceback.format_exc()}```\n"
    try:
        text += "".join(f"\n![{path.stem}]({path.name})\n" for path in pictures(found.data, stem))
    except Exception as error:
        text += f"\nNo pictures: {reason(error)}.\n"
    stem.with_suffix(".md").write_text(text, encoding="utf-8")


def pictures(data: dict, stem: Path) -> list[Path]:
    """Writes a roofline, bars of throughput and loss curves, as far as there is data for each; returns the files."""

    def path(name: str) -> Path:
        return stem.with_name(f"{stem.name}-{name}.png")

    written = []
    if points := [x for x in data.get("operators", []) if x["contender"] == "bert_fast" and x.get("flops")]:
        ceilings = ceilings_of(data)
        with tables.picture(path("roofline"), "FLOP per byte", "TFLOP/s") as axis:
            intensities = [10**k for k in range(-2, 5)]
            roof = [min(ceilings.matmul, ceilings.copy * i) / 1e12 for i in intensities]
            axis.loglog(intensities, roof, color="#7f8c8d")
            for x in points:
                at = (x["flops"] / x["bytes"], x["flops"] / x["ms"] / 1e9)
                axis.loglog(*at, "o", color="#c0392b", markersize=4)
                axis.annotate(f"{x['operator']} {x['direction'][:3]}", at, fontsize=5)
        written.append(path("roofline"))
    groups: dict[str, list[dict]] = {}
    for x in data.get("steps", []):
        if "failed" not in x:
            groups.setdefault(f"BERT-{x['model']}, {x['seq']}, {x['lengths']} lengths, {x['optimizer']}", []).append(x)
    if groups:
        tables.plot(path("throughput"), groups)
        written.append(path("throughput"))
    if data.get("curves"):
        with tables.picture(path("loss"), "step", "loss") as axis:
            for x in data["curves"]:
                axis.plot(x["losses"], label=x["contender"], linewidth=1)
            axis.legend(frameon=False)
        written.append(path("loss"))
    return written


# --------------------------------------------------------------------------------------------------------------
# The document


def step_model_text(results: Path) -> str:
    """The prediction of every case, and the ceilings that it takes."""
    stated = step_model.DEVICES["H100"]
    forward, backward = stated.attention_forward / 1e12, stated.attention_backward / 1e12
    return (
        f"An H100, at {stated.matmul / 1e12:.0f} TFLOP/s for products, {stated.copy / 1e12:.1f} TB/s read and written, "
        f"attention at {forward:.0f} TFLOP/s forward and {backward:.0f} backward, "
        f"{stated.instructions / 1e12:.1f}e12 instructions/s of a lane, {1e6 * stated.between_kernels:.0f} us from "
        f"one kernel to the next; 16-bit weights, LAMB, dropout 0.1, {TOKENS} real tokens a step. MFU counts the full "
        'formula of every real token, "executed" what is computed of it: the last layer only where it is read.\n\n'
        + step_model.summary(stated)
        + "\n\nWhat each aim allows a step of BERT-large at 512 tokens, and what the products leave of it. An H100 and "
        "an H200 are charged rates that others measured, an A100 and a B200 those of their data sheets, which no "
        f"product and no copy reaches:\n\n{step_model.aims().markdown()}\n\n"
        "Its attention, each resource alone; the longest is "
        'the least that these kernels can take, "charged" is what the step has of it:\n\n'
        + step_model.attention_lines().markdown()
    )


def performance(results: Path) -> str:
    """docs/performance.md."""
    parts = {"cpu": whole_steps_cpu, "gpu": measured_gpu, "step_model": step_model_text}
    made = {name: make(results) for name, make in parts.items()}
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(made)


def readme(results: Path, document: Path = ROOT / "README.md") -> str:
    """The text of ``document`` with its table made anew. Raises ValueError where its comments are missing."""
    begin, end = "<!-- how-fast: made by benchmarks/report.py -->", "<!-- end of how-fast -->"
    before, found, rest = document.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed) or begin in after or end in after:
        raise ValueError(f"{document}: it needs exactly one pair of comments {begin} ... {end}")
    return f"{before}{begin}\n\n{how_fast(results)}\n\n{end}{after}"


DOCUMENTS = {ROOT / "README.md": readme, ROOT / "docs" / "performance.md": performance}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a document is out of date")
    parser.add_argument("--results", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    status = 0
    for document, make in DOCUMENTS.items():
        try:
            text = make(options.results)
        except ValueError as error:
            print(f"benchmarks/report.py: {error}", file=sys.stderr)
            return 2
        if not options.check:
            document.write_text(text, encoding="utf-8")
        elif text != document.read_text(encoding="utf-8"):
            print(f"{document} is out of date: run python benchmarks/report.py", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
