"""The results of a run on a GPU: one JSON file, whole and valid after every row; its tables and pictures."""

import json
import math
import os
import time
import traceback
from pathlib import Path

from gpu_aims import OURS, aims_table, best_reference, step_of
from step_model import ceilings_of, markdown_table

INTERRUPTED = "its process died, or hung and was ended"  # of a case that was begun and has no row


class Results:
    """Rows by phase in one file, rewritten at once and in one piece whenever something is added.

    ``data`` holds what the run is about ("kind", "commit", "environment", "limits", ...), a list of rows for each of
    "operators", "steps", "profiles", "curves" and "tune", "parity", and the state of each phase. A case that has been
    begun is known, so that a process that continues after one that died does not begin it again.
    """

    def __init__(self, path: Path, data: dict | None = None):
        self.path = Path(path)
        self.data = json.loads(self.path.read_text(encoding="utf-8")) if data is None else data
        if data is not None:
            self.save()

    def save(self) -> None:
        """Write the file in one piece: who reads it, or is left with it, has the old or the new one."""
        part = self.path.with_name(self.path.name + ".part")
        with part.open("w", encoding="utf-8") as file:
            json.dump(plain(self.data), file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path)

    def reload(self) -> None:
        self.data = json.loads(self.path.read_text(encoding="utf-8"))

    def put(self, name: str, value) -> None:
        self.data[name] = value
        self.save()

    def add(self, table: str, row: dict) -> None:
        self.data.setdefault(table, []).append(row)
        self.save()

    def begun(self, phase: int) -> list[str]:
        """The cases of ``phase`` that were begun, in this process or in one before it."""
        return self.data.setdefault("begun", {}).setdefault(str(phase), [])

    def case(self, phase: int, key: str, table: str, facts: dict, measure) -> None:
        """Add the row(s) ``measure()`` gives, or one that says why it failed; nothing where the case was begun before.

        Each row gets ``facts``. Raises DeviceLost where the device answers no more: this process cannot go on.
        """
        if key in self.begun(phase):
            return
        self.begun(phase).append(key)
        self.save()
        start = time.monotonic()
        try:
            rows = measure()
        except Exception as error:
            # One case may fail for reasons of its own (out of memory, a peer's bug); its row says so, the others run.
            rows = {"failed": reason(error), "traceback": traceback.format_exc(limit=-6)}
        for row in rows if isinstance(rows, list) else [rows]:
            self.data.setdefault(table, []).append(facts | row)
        self.save()
        failed = rows.get("failed") if isinstance(rows, dict) else None
        print(f"   {key}: {failed or 'done'} ({time.monotonic() - start:.1f} s)", flush=True)
        if failed:
            raise_if_device_lost()


def plain(value):
    """``value`` with None for numbers that JSON does not have (NaN, infinities)."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class DeviceLost(RuntimeError):
    """The device answers with an error to everything: the process has to end, another can go on."""


def raise_if_device_lost() -> None:
    import torch

    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(str(error)) from error


def reason(error: BaseException) -> str:
    """The type and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


# --------------------------------------------------------------------------------------------------------------
# What a person reads


def _number(value, digits: int = 3) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def _percent(value) -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:.1f} %"


def limits_table(data: dict) -> str:
    limits = data.get("limits", {})
    rows = [
        [f"matrix product, {name}", _number(value), "TFLOP/s"]
        for name, value in limits.get("matmul_tflops", {}).items()
    ]
    for name, what, unit in (
        ("copy_gbs", "copy (read + written)", "GB/s"),
        ("launch_us", "launch from the host", "us"),
        ("graph_kernel_us", "one kernel after another in a graph", "us"),
    ):
        if name in limits:
            rows.append([what, _number(limits[name]), unit])
    return markdown_table(["limit", "measured", "unit"], rows)


def products_table(data: dict) -> str:
    limit = data.get("limits", {}).get("matmul_tflops", {}).get("bfloat16")
    rows = []
    for x in data.get("products", []):
        share = x["tflops"] / limit if limit and "tflops" in x else None
        other = _number(x.get("cublaslt_tflops"))
        rows.append([x["shape"], _number(x.get("tflops")), _number(x.get("ms")), _percent(share), other])
    header = ["product of a step, bfloat16", "TFLOP/s", "ms", "of the limit", "by cuBLASLt, TFLOP/s"]
    return markdown_table(header, rows)


def steps_table(data: dict) -> str:
    rows = data.get("steps", [])
    lines = []
    for x in rows:
        name = f"{x['model']} {x['seq']}, {x['lengths']}"
        if "failed" in x:
            lines.append([name, x["variant"], x["failed"].replace("|", "/"), *[""] * 8])
            continue
        best = best_reference(rows, x) if x["variant"].startswith("bert_fast") else None
        ratio = "" if best is None else f"{x['sequences_per_s'] / best['sequences_per_s']:.2f}x {best['variant']}"
        predicted = f"{x['predicted_ms']:.1f}" if x.get("predicted_ms") else ""
        lines.append([name, x["variant"], f"{x['sequences']}", f"{x['ms']['p50']:.1f}", predicted,
                      _number(x["sequences_per_s"]), f"{x['real_tokens_per_s'] / 1e3:.1f}k", _percent(x["mfu"]),
                      _percent(x.get("executed_share")), f"{x['peak_memory_mib']:.0f}", ratio])  # fmt: skip
    header = ["BERT", "variant", "sequences", "step ms", "predicted", "sequences/s", "real tokens/s", "MFU", "executed",
              "peak MiB", "against the best reference"]  # fmt: skip
    return markdown_table(header, lines)


def candidates_table(data: dict) -> str:
    """What a step gains from each candidate to become the default, beside ours as built."""
    rows = []
    for x in data.get("steps", []):
        if "differs" not in x:
            continue
        built = step_of(data, OURS, x["model"], x["seq"], x["lengths"])
        compared = ["", ""]
        if built and built["sequences"] == x["sequences"]:
            compared = [f"{built['ms']['p50']:.1f}", f"{built['ms']['p50'] / x['ms']['p50']:.3f}x"]
        differs = f"{_percent(x['differs']['loss'])}, {_percent(x['differs']['gradient'])}"
        rows.append([f"{x['model']} {x['seq']}, {x['lengths']}", x["variant"], f"{x['ms']['p50']:.1f}", *compared,
                     differs])  # fmt: skip
    header = ["BERT", "with", "step ms", "as built", "faster", "loss, worst gradient differ by"]
    left_out = [f"Not run: {name}: {why}." for name, why in data.get("candidates_left_out", {}).items()]
    return "\n\n".join([markdown_table(header, rows)] * bool(rows) + left_out)


MOST_KERNELS = 25  # lines of a profile; the others in one


def profiles_text(data: dict) -> str:
    """Of each profiled step the kernels that take longest."""
    parts = []
    for x in data.get("profiles", []):
        name = f"BERT-{x['model']} {x['seq']}, {x['lengths']}"
        if "failed" in x:
            parts.append(f"{name}: not profiled: {x['failed']}.")
            continue
        timed = step_of(data, OURS, x["model"], x["seq"], x["lengths"])
        of_step = f" of a step of {timed['ms']['p50']:.1f} ms" if timed else ""
        lines, others = x["kernels"][:MOST_KERNELS], x["kernels"][MOST_KERNELS:]
        if others:
            sums = {key: sum(line[key] for line in others) for key in ("calls", "us")}
            lines = [*lines, {"kernel": f"{len(others)} others", **sums}]
        rows = [
            [line["kernel"][:100].replace("|", "/"), _number(line["calls"]), _number(line["us"]),
             _percent(line["us"] / 1e3 / x["kernels_ms"])]
            for line in lines
        ]  # fmt: skip
        table = markdown_table(["kernel", "calls", "us", "of all kernels"], rows)
        parts.append(f"{name}: kernels and copies take {x['kernels_ms']:.1f} ms{of_step}, captured.\n\n{table}")
    return "\n\n".join(parts)


def operators_table(data: dict) -> str:
    """A line an operator, direction and size: ours, its share of the limit, what was predicted, and the others."""
    groups: dict[tuple, dict] = {}
    for x in data.get("operators", []):
        key = (x["model"], x["seq"], x["lengths"], x["operator"], x["direction"], x["dropout"])
        groups.setdefault(key, {})[x["contender"]] = x
    lines = []
    for (model, seq, lengths, operator, direction, dropout), found in groups.items():
        ours = found.get("bert_fast")
        others = {name: x for name, x in found.items() if name != "bert_fast"}
        size = f"{model} {seq}, {lengths}" if seq else model  # an optimiser knows no sequences
        cells = [size, f"{operator}, {direction}" + ("" if dropout or not seq else ", no dropout")]
        if ours is None or "failed" in ours:
            cells += ["failed" if ours else "", "", "", ""]
        else:
            rate = f"{ours['tflops']:.0f} TFLOP/s" if "tflops" in ours else f"{ours['gbs']:.0f} GB/s"
            predicted = _number(1e3 * ours["predicted_ms"]) if ours.get("predicted_ms") else ""
            cells += [_number(1e3 * ours["ms"]), predicted, rate, _percent(ours["share_of_limit"])]
        compared = (f"{name} {'failed' if 'failed' in x else _number(1e3 * x['ms'])}" for name, x in others.items())
        lines.append([*cells, ", ".join(compared)])
    header = ["BERT", "operator", "us", "predicted", "rate", "of the limit", "others, us"]
    return markdown_table(header, lines)


def parity_text(data: dict) -> str:
    parity = data.get("parity")
    if not parity:
        return "Parity on the GPU: not run."
    failed = "".join(f"\n- {x['test']}: {x['message']}" for x in parity.get("failed", []))
    state = "" if parity.get("finished") else f" when {parity.get('stopped', 'the time was up')}"
    counts = f"{parity.get('passed', 0)} tests passed, {len(parity.get('failed', []))} failed{state}"
    if "not_run" in parity:
        counts = f"the tests were not run, as {parity['not_run']}"
    text = f"Parity on the GPU: {counts}.{failed}"
    for model in parity.get("models", []):
        text += f"\n\nWhole model ({model['model']}, {model['dtype']}): "
        if "failed" in model:
            text += f"**not compared**: {model['failed']}."
            continue
        wrong = "" if model["passed"] == model["compared"] else "**not right**, "
        text += (
            f"{wrong}{model['passed']} of {model['compared']} within "
            f"1.5 times the reference's own error against float64; worst: {model['worst']}."
        )
    return text


def settings(changed: dict) -> str:
    """A launch configuration's constants in words."""
    return ", ".join(f"{name}={value}" for name, value in changed.items())


def tune_table(data: dict) -> str:
    rows = []
    for x in data.get("tune", []):
        best, write = x.get("best_us"), x.get("write", x.get("failed"))
        if write is None:  # cut off; what had been tried is known
            timed = [tried for tried in x["tried"] if "us" in tried]
            fastest = min(timed, key=lambda tried: tried["us"], default={"us": None, "changed": {}})
            best, changed = fastest["us"], settings(fastest["changed"])
            write = f"cut off after {len(x['tried'])} configurations; the fastest: {changed or 'none ran'}"
        rows.append([x["what"], "failed" if "failed" in x else _number(x["default_us"]), _number(best), write])
    return markdown_table(["kernel", "default us", "best us", "to write into the constants"], rows)


def left_out_text(data: dict) -> str:
    """What there was no time for."""
    steps, operators = data.get("steps_left_out", []), data.get("operators_left_out", 0)
    parts = ([f"of the whole steps {'; '.join(steps)}"] if steps else []) + (
        [f"the last {operators} cases of the operators"] if operators else []
    )
    return f"Left out, as the time was up: {', and '.join(parts)}." if parts else ""


def markdown(data: dict) -> str:
    """Everything that was measured, as text."""
    versions = data.get("environment", {}).get("versions", {})
    parts = [
        f"# {data.get('gpu', 'GPU')}, {data['date']}, commit {data['commit']}",
        "A trial on a CPU with tiny sizes: no figure here means anything." if data.get("smoke") else "",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        "`" + " ".join(data.get("command", [])) + "`",
        markdown_table(
            ["phase", "state", "seconds"],
            [[f"{p['phase']} {p['name']}", p["state"], f"{p['seconds']:.0f}"] for p in data.get("phases", [])],
        ),
    ]
    parts.append(left_out_text(data))
    parts += ["## Against the aims", aims_table(data)]
    for title, table, present in (
        ("Limits", limits_table, "limits"), ("Products", products_table, "products"),
        ("Whole steps", steps_table, "steps"),
        ("Candidates in a whole step", candidates_table, "steps"), ("What the profile says", profiles_text, "profiles"),
        ("Operators", operators_table, "operators"),
        ("Launch configurations", tune_table, "tune"),
    ):  # fmt: skip
        if data.get(present) and (text := table(data)):
            parts += [f"## {title}", text]
    parts += ["## Parity", parity_text(data)]
    for curve in data.get("curves", []):
        if "failed" not in curve:
            losses, last = curve["losses"], curve["losses"][-20:]
            parts.append(
                f"Loss of {curve['variant']} over {len(losses)} steps: {losses[0]:.3f} to {sum(last) / len(last):.3f} "
                f"(mean of the last {len(last)})."
            )
    errors = [f"```\n{p['error']}\n```" for p in data.get("phases", []) if p.get("error")]
    errors += [
        f"{table} {x.get('variant', x.get('contender', x.get('what', '')))}:\n```\n{x['traceback']}```"
        for table in ("products", "operators", "steps", "profiles", "curves", "tune")
        for x in data.get(table, [])
        if "traceback" in x
    ]
    errors += [
        f"whole model {x['model']} {x['dtype']}:\n```\n{x['traceback']}```"
        for x in data.get("parity", {}).get("models", [])
        if "traceback" in x
    ]
    if errors:
        parts += ["## What failed", *errors]
    return "\n\n".join(part for part in parts if part) + "\n"


def pictures(data: dict, stem: Path) -> list[Path]:
    """Writes a roofline, bars of throughput and loss curves, as far as there is data for each; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []

    def save(figure, name: str) -> None:
        path = stem.with_name(f"{stem.name}-{name}.png")
        figure.tight_layout()
        figure.savefig(path, dpi=130)
        pyplot.close(figure)
        written.append(path)

    points = [
        x for x in data.get("operators", []) if x["contender"] == "bert_fast" and x.get("bytes") and x.get("flops")
    ]
    if points:
        ceilings = ceilings_of(data)
        figure, axis = pyplot.subplots(figsize=(8, 5))
        intensities = [10**k for k in range(-2, 5)]
        roof = [min(ceilings.matmul, ceilings.copy * i) / 1e12 for i in intensities]
        axis.loglog(intensities, roof, color="#7f8c8d")
        for x in points:
            at = (x["flops"] / x["bytes"], x["flops"] / x["ms"] / 1e9)
            axis.loglog(*at, "o", color="#c0392b", markersize=4)
            axis.annotate(f"{x['operator']} {x['direction'][:3]}", at, fontsize=5)
        axis.set_xlabel("FLOP per byte")
        axis.set_ylabel("TFLOP/s")
        axis.spines[["top", "right"]].set_visible(False)
        save(figure, "roofline")
    steps = [x for x in data.get("steps", []) if "failed" not in x]
    sizes = list(dict.fromkeys((x["model"], x["seq"], x["lengths"]) for x in steps))
    if sizes:
        bars = [[x for x in steps if (x["model"], x["seq"], x["lengths"]) == size] for size in sizes]
        heights = [0.8 + 0.23 * len(rows) for rows in bars]  # inches: names one below the other
        figure, axes = pyplot.subplots(
            len(sizes), 1, figsize=(8, sum(heights)), squeeze=False, gridspec_kw={"height_ratios": heights}
        )
        for (model, seq, lengths), rows, axis in zip(sizes, bars, axes[:, 0], strict=True):
            colors = ["#c0392b" if x["variant"].startswith("bert_fast") else "#7f8c8d" for x in rows]
            axis.barh([x["variant"] for x in rows], [x["real_tokens_per_s"] / 1e3 for x in rows], color=colors)
            axis.invert_yaxis()
            axis.set_title(f"BERT-{model}, {seq}, {lengths} lengths: thousand real tokens/s", loc="left", fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
        save(figure, "throughput")
    curves = [x for x in data.get("curves", []) if "failed" not in x]
    if curves:
        figure, axis = pyplot.subplots(figsize=(8, 4))
        for curve in curves:
            axis.plot(curve["losses"], label=curve["variant"], linewidth=1)
        axis.set_xlabel("step")
        axis.set_ylabel("loss")
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
        save(figure, "loss")
    return written
