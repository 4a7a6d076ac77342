"""The project's aims for a GPU against what a run measured: by how much each is reached or missed."""

from collections.abc import Callable, Iterator

from step_model import markdown_table

# What is required, and the aim where there is one beyond; step_aims.py holds the step model's predictions against them.
LARGE_EXECUTED = (0.60, 0.70)  # full length 512, share of the matrix-product rate
LARGE_TOKENS = (272e3, 290e3)  # Wikipedia's lengths at 512, real tokens/s
BASE_EXECUTED = (0.55,)  # full length 128
ATTENTION = {"forward": (340e12,), "backward": (250e12,)}  # FLOP/s at 512, without dropout
WITH_DROPOUT = (0.90,)  # of attention's rate without
BETWEEN_KERNELS = (0.05,)  # of a step of base at 8 x 128, at most

OURS = "bert_fast captured"
ROW_OPERATORS = ("embedding_layernorm", "residual_layernorm", "bias_gelu")
SMALL = "8 full"  # lengths of a batch so small that launches count


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def times(value: float) -> str:
    return f"{value:.2f}x"


def thousand(value: float) -> str:
    return f"{value / 1e3:.0f}k"


def tera(value: float) -> str:
    return f"{value / 1e12:.0f} TFLOP/s"


# (what, how it is written, what is required and the aim beyond, what was measured)
Aim = tuple[str, Callable[[float], str], tuple[float, ...], float]


def step_of(data: dict, variant: str, model: str, seq: int, lengths: str) -> dict | None:
    """The row of a whole step that did not fail."""
    wanted = {"variant": variant, "model": model, "seq": seq, "lengths": lengths}
    return next((x for x in data.get("steps", []) if "failed" not in x and wanted.items() <= x.items()), None)


def best_reference(rows: list[dict], row: dict) -> dict | None:
    """The fastest reference variant at the same model, length and lengths as ``row``, by sequences/s."""
    same = [
        x for x in rows
        if "failed" not in x and not x["variant"].startswith("bert_fast")
        and all(x[k] == row[k] for k in ("model", "seq", "lengths"))
    ]  # fmt: skip
    return max(same, key=lambda x: x["sequences_per_s"], default=None)


def at_least(data: dict) -> Iterator[Aim]:
    """The aims that are lower bounds, as far as the run has what they are about."""
    for model, seq, lengths, key, write, required in (
        ("large", 512, "full", "executed_share", percent, LARGE_EXECUTED),
        ("large", 512, "wikipedia", "real_tokens_per_s", thousand, LARGE_TOKENS),
        ("base", 128, "full", "executed_share", percent, BASE_EXECUTED),
    ):
        row = step_of(data, OURS, model, seq, lengths)
        if row is not None and row.get(key) is not None:
            what = {"executed_share": "executed FLOPs of the matrix-product rate", "real_tokens_per_s": "real tokens/s"}
            yield f"{model}, {lengths} {seq}: {what[key]}", write, required, row[key]
    for model, lengths, required in (
        ("large", "full", 1.5), ("large", "wikipedia", 3.0), ("base", "full", 1.7), ("base", "wikipedia", 3.4),
    ):  # fmt: skip
        row = step_of(data, OURS, model, 512, lengths)
        best = row and best_reference(data["steps"], row)
        if best:
            ratio = row["sequences_per_s"] / best["sequences_per_s"]
            yield f"{model}, {lengths} 512: against {best['variant']}, the best there", times, (required,), ratio
    yield from _operators(data)


def _operators(data: dict) -> Iterator[Aim]:
    ours = [x for x in data.get("operators", []) if x["contender"] == "bert_fast" and "failed" not in x]
    for direction, names, required in (
        ("forward", ROW_OPERATORS, 0.85), ("backward", ROW_OPERATORS, 0.75), ("update", ("adamw", "lamb"), 0.80),
    ):  # fmt: skip
        rows = [
            x for x in ours if x["operator"] in names and x["direction"] == direction and x["seq"] in (0, 512)
            and x.get("share_of_limit") is not None
        ]  # fmt: skip
        if rows:
            worst = min(rows, key=lambda x: x["share_of_limit"])
            which = " ".join(filter(None, (worst["operator"], worst["model"], worst["lengths"])))
            yield f"bandwidth, {direction}; the least is {which}", percent, (required,), worst["share_of_limit"]
    rates = {
        (x["model"], x["direction"], bool(x["dropout"])): 1e12 * x["tflops"]
        for x in ours if x["operator"] == "attention" and (x["seq"], x["lengths"]) == (512, "full")
    }  # fmt: skip
    for direction, required in ATTENTION.items():
        for model in ("large", "base"):
            without, dropout = (rates.get((model, direction, p)) for p in (False, True))
            if without is not None:
                yield f"attention, {model}, full 512, {direction}, no dropout", tera, required, without
                if dropout is not None:
                    name = f"attention, {model}, full 512, {direction}: with dropout, of that"
                    yield name, percent, WITH_DROPOUT, dropout / without


def at_most(data: dict) -> Iterator[Aim]:
    """The aims that are upper bounds."""
    small = step_of(data, OURS, "base", 128, SMALL)
    if small is not None and small.get("kernels_ms"):
        gaps = 1 - small["kernels_ms"] / small["ms"]["p50"]
        yield "base, 8 x 128: the step's time in which no kernel runs", percent, BETWEEN_KERNELS, gaps
    for model in ("large", "base"):
        ours, theirs = (step_of(data, variant, model, 512, "full") for variant in (OURS, "hf-sdpa"))
        if ours and theirs and ours["sequences"] == theirs["sequences"]:
            share = ours["peak_memory_mib"] / theirs["peak_memory_mib"]
            yield f"{model}, full 512: peak memory, of hf-sdpa's", percent, (0.50,), share


def aims_table(data: dict) -> str:
    """A line an aim: what is required, what was measured, and whether that reaches it; "" where nothing is known."""
    rows = []
    for bound, reached, found in (("at least", float.__ge__, at_least(data)), ("at most", float.__le__, at_most(data))):
        for what, write, required, value in found:
            asked = f"{bound} {', aim '.join(map(write, required))}"
            verdict = "reached" if reached(float(value), required[0]) else f"missed: {value / required[0]:.2f} of it"
            rows.append([what, asked, write(value), verdict])
    return markdown_table(["aim", "required", "measured", ""], rows) if rows else ""
