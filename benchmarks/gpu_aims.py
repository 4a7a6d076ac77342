"""The project's aims for a GPU against what a run measured: by how much each is reached or missed."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from step_model import ceilings_of, markdown_table

# What is required, and the aim where there is one beyond; step_aims.py holds the step model's predictions against them.
LARGE_EXECUTED = (0.60, 0.70)  # full length 512, share of the matrix-product rate
LARGE_TOKENS = (272e3, 290e3)  # Wikipedia's lengths at 512, real tokens/s
FASTER = {("large", "full"): (1.5,), ("large", "wikipedia"): (3.0,), ("base", "full"): (1.7,),
          ("base", "wikipedia"): (3.4,)}  # fmt: skip  # at 512, times the best reference's sequences/s
BASE_EXECUTED = (0.55,)  # full length 128
BETWEEN_KERNELS = (0.05,)  # of a step of base at 8 x 128, at most
BANDWIDTH = {"forward": (0.85,), "backward": (0.75,), "update": (0.80,)}  # of the copy's
ATTENTION = {"forward": (340e12,), "backward": (250e12,)}  # FLOP/s at 512, without dropout
WITH_DROPOUT = (0.90,)  # of attention's rate without
MLM_LOSS = (1.00,)  # its three products' time, of its own
MEMORY = (0.50,)  # of hf-sdpa's peak, at most

OURS = "bert_fast captured"
REFERENCES = ("hf-sdpa", "hf-eager", "hf-masked-head", "hf-compile")
ROW_OPERATORS = ("embedding_layernorm", "residual_layernorm", "bias_gelu")
OPTIMIZERS = ("lamb", "adamw")
PRODUCTS = "three products"  # the contender of mlm_loss that has nothing else to do
SMALL = "8 full"  # lengths of a batch so small that launches count


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def times(value: float) -> str:
    return f"{value:.2f}x"


def thousand(value: float) -> str:
    return f"{value / 1e3:.0f}k"


def tera(value: float) -> str:
    return f"{value / 1e12:.0f} TFLOP/s"


@dataclass(frozen=True)
class Aim:
    """``required``: a bound and the aim beyond it, where there is one; ``measured`` and what the step model has for it
    at the run's ceilings, None where they are not known. ``missing``: what could make the measured value less yet."""

    what: str
    write: Callable[[float], str]
    required: tuple[float, ...]
    measured: float | None = None
    predicted: float | None = None
    missing: str = ""
    at_most: bool = False

    def line(self) -> list[str]:
        bound = "at most" if self.at_most else "at least"
        asked = f"{bound} {', aim '.join(map(self.write, self.required))}"
        predicted = "" if self.predicted is None else self.write(self.predicted)
        if self.measured is None or math.isnan(self.measured):
            return [self.what, asked, "not measured", predicted, ""]
        return [self.what, asked, self.write(self.measured), predicted, self.verdict(self.measured)]

    def verdict(self, measured: float) -> str:
        """Of what is required and of the aim beyond."""
        told = []
        for required in self.required:
            if not (measured <= required if self.at_most else measured >= required):
                told.append(f"missed: {measured / required:.2f} of it")
            else:
                told.append("open" if self.missing else "reached")
        return "; aim ".join(told) + (f"; {self.missing}" if self.missing else "")


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


def aims(data: dict) -> Iterator[Aim]:
    """Every aim, measured or not."""
    yield from _steps(data)
    yield from _factors(data)
    yield from _operators(data)
    yield from _attention(data)
    yield from _mlm_loss(data)
    for model in ("large", "base"):
        ours, theirs = (step_of(data, variant, model, 512, "full") for variant in (OURS, "hf-sdpa"))
        share = None
        if ours and theirs and ours["sequences"] == theirs["sequences"]:
            share = ours["peak_memory_mib"] / theirs["peak_memory_mib"]
        yield Aim(f"{model}, full 512: peak memory, of hf-sdpa's", percent, MEMORY, share, at_most=True)


def _steps(data: dict) -> Iterator[Aim]:
    for model, seq, lengths, key, what, write, required in (
        ("large", 512, "full", "executed_share", "executed FLOPs of the matrix-product rate", percent, LARGE_EXECUTED),
        ("large", 512, "wikipedia", "real_tokens_per_s", "real tokens/s", thousand, LARGE_TOKENS),
        ("base", 128, "full", "executed_share", "executed FLOPs of the matrix-product rate", percent, BASE_EXECUTED),
    ):  # fmt: skip
        row = step_of(data, OURS, model, seq, lengths) or {}
        measured = row.get(key)
        predicted = _at_prediction(measured, row.get("ms", {}).get("p50"), row.get("predicted_ms"))
        yield Aim(f"{model}, {lengths} {seq}: {what}", write, required, measured, predicted)
    small = step_of(data, OURS, "base", 128, SMALL) or {}
    gaps = 1 - small["kernels_ms"] / small["ms"]["p50"] if small.get("kernels_ms") else None
    yield Aim("base, 8 x 128: the step's time in which no kernel runs", percent, BETWEEN_KERNELS, gaps, at_most=True)


def _at_prediction(rate: float | None, ms: float | None, predicted_ms: float | None) -> float | None:
    """``rate`` if what took ``ms`` took what the step model predicts."""
    return rate * ms / predicted_ms if rate is not None and ms and predicted_ms else None


def _factors(data: dict) -> Iterator[Aim]:
    """Against the best of all references: one that was not measured could still turn out to be it."""
    for (model, lengths), required in FASTER.items():
        size = {"model": model, "seq": 512, "lengths": lengths}
        row = step_of(data, OURS, **size)
        best = row and best_reference(data["steps"], row)
        if not best:
            yield Aim(f"{model}, {lengths} 512: against the best reference", times, required)
            continue
        tried = {x["variant"] for x in data["steps"] if size.items() <= x.items()}
        missing = ", ".join(
            f"{name} {'failed' if name in tried else 'was not measured'}"
            for name in REFERENCES if step_of(data, name, **size) is None
        )  # fmt: skip
        ratio = row["sequences_per_s"] / best["sequences_per_s"]
        what = f"against {best['variant']}, the best {'of those measured' if missing else 'there'}"
        yield Aim(f"{model}, {lengths} 512: {what}", times, required, ratio, missing=missing)


def _ours(data: dict) -> list[dict]:
    """The rows of our operators that did not fail."""
    return [x for x in data.get("operators", []) if x["contender"] == "bert_fast" and "failed" not in x]


def _operators(data: dict) -> Iterator[Aim]:
    """An operator that is limited by memory is as good as where it is worst, of the sizes at 512."""
    for direction, required in BANDWIDTH.items():
        for operator in OPTIMIZERS if direction == "update" else ROW_OPERATORS:
            rows = [
                x for x in _ours(data)
                if (x["operator"], x["direction"]) == (operator, direction) and x["seq"] in (0, 512)
                and x.get("share_of_limit") is not None
            ]  # fmt: skip
            what = f"{operator}, {direction}: of the copy bandwidth"
            if not rows:
                yield Aim(what, percent, required)
                continue
            worst = min(rows, key=lambda x: x["share_of_limit"])
            share = worst["share_of_limit"]
            where = " ".join(filter(None, (worst["model"], worst["lengths"])))
            predicted = _at_prediction(share, worst.get("ms"), worst.get("predicted_ms"))
            yield Aim(f"{what}, least at {where}", percent, required, share, predicted)


def _attention(data: dict) -> Iterator[Aim]:
    rows = {
        (x["model"], x["direction"], bool(x["dropout"])): x
        for x in _ours(data) if x["operator"] == "attention" and (x["seq"], x["lengths"]) == (512, "full")
    }  # fmt: skip
    for direction, required in ATTENTION.items():
        for model in ("large", "base"):
            without, dropout = (rows.get((model, direction, p), {}) for p in (False, True))
            rate = 1e12 * without["tflops"] if without else None
            predicted = _at_prediction(rate, without.get("ms"), without.get("predicted_ms"))
            what = f"attention, {model}, full 512, {direction}"
            yield Aim(f"{what}, no dropout", tera, required, rate, predicted)
            share = dropout["tflops"] / without["tflops"] if dropout and without else None
            both = without.get("predicted_ms"), dropout.get("predicted_ms")
            yield Aim(
                f"{what}: with dropout, of that", percent, WITH_DROPOUT, share, both[0] / both[1] if all(both) else None
            )


def _mlm_loss(data: dict) -> Iterator[Aim]:
    for model in ("large", "base"):
        found = {
            x["contender"]: x for x in data.get("operators", [])
            if (x["operator"], x["direction"], x["model"]) == ("mlm_loss", "forward", model) and "failed" not in x
            and (x["seq"], x["lengths"]) == (512, "full")
        }  # fmt: skip
        ours, products = found.get("bert_fast", {}), found.get(PRODUCTS)
        share = products["ms"] / ours["ms"] if ours and products else None
        predicted = None
        if ours.get("predicted_ms"):
            predicted = 1e3 * ours["flops"] / ceilings_of(data).matmul / ours["predicted_ms"]
        what = f"mlm_loss, {model}, full 512: its three products alone, of its time"
        yield Aim(what, percent, MLM_LOSS, share, predicted)


def aims_table(data: dict) -> str:
    """A line an aim: what is required, what was measured and predicted, and whether that reaches it."""
    return markdown_table(["aim", "required", "measured", "predicted", ""], [aim.line() for aim in aims(data)])
