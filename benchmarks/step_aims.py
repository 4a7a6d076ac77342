"""What the step model predicts against the project's aims for a GPU, and what would have to be true for them to hold.

    python benchmarks/step_aims.py [--results FILE]

A prediction, not a measurement. ``IFS`` are changes of the code that would save time by the model's own count, each
applied to the lines of benchmarks/step_model.py. An aim that the model misses at the ceilings cannot be met by tuning.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

# Works on a checkout that nobody installed; the siblings are scripts, not a package.
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from gpu_aims import (
    ATTENTION,
    BANDWIDTH,
    BASE_EXECUTED,
    BETWEEN_KERNELS,
    LARGE_EXECUTED,
    LARGE_TOKENS,
    MLM_LOSS,
    OPTIMIZERS,
    ROW_OPERATORS,
    WITH_DROPOUT,
    tera,
    thousand,
)
from operators import WORK
from step_model import (
    BITS,
    DROPOUT_ASYNCHRONOUS,
    DROPOUT_DKV,
    DROPOUT_DQ,
    DROPOUT_FORWARD,
    DROPOUT_ONE_PASS,
    Ceilings,
    Entry,
    Prediction,
    attention,
    ceilings_of,
    lengths_of,
    markdown_table,
    operator_seconds,
    predict,
    step,
    update,
)
from workload import model_config

# --------------------------------------------------------------------------------------------------------------
# If the code were otherwise: a function from a line of the step to what it would be then


def five_products(x: Entry) -> Entry:
    if (x.operator, x.direction) == ("attention", "backward"):
        return replace(x, flops=x.flops * 5 / 7, kernels=x.kernels - 1)
    if (x.operator, x.direction) == (f"attention{BITS}", "backward"):
        return replace(x, instructions=x.instructions * DROPOUT_ONE_PASS / (DROPOUT_DQ + DROPOUT_DKV))
    return x


def asynchronous_forward(x: Entry) -> Entry:
    """The rate that is charged for the products already supposes that they overlap with the rest."""
    if (x.operator, x.direction) == (f"attention{BITS}", "forward"):
        return replace(x, instructions=x.instructions * DROPOUT_ASYNCHRONOUS / DROPOUT_FORWARD)
    return x


def hidden_bits(x: Entry) -> Entry:
    return replace(x, instructions=0) if x.operator == f"attention{BITS}" else x


def gelu_in_products(x: Entry) -> Entry:
    """The product writes its sum beside its GELU, and the product of the backward reads the sum."""
    if x.operator != "bias_gelu":
        return x
    return replace(x, bytes=x.bytes / {"forward": 2, "backward": 3}[x.direction], instructions=0, kernels=0)


def twice_the_batch(x: Entry) -> Entry:
    return replace(x, times=x.times / 2) if x.direction == "update" else x


IFS: dict[str, Callable[[Entry], Entry]] = {
    "attention's backward makes scores and d P once: five products, bits of dropout drawn once": five_products,
    "the bits of dropout are drawn while the tensor cores work": hidden_bits,
    "GELU in the epilogue of the product before it, its derivative in the one behind": gelu_in_products,
    "an update every 65536 tokens, not 32768": twice_the_batch,
}


def slower(x: Entry) -> Entry:
    """What is likely: products of BERT's shapes and attention at 90 % of their rates, memory at 85 % of the copy's."""
    return replace(x, flops=x.flops / 0.9, bytes=x.bytes / 0.85)


# --------------------------------------------------------------------------------------------------------------
# Tables


def predicted(model: str, lengths: Sequence[int], ceilings: Ceilings, *changes: Callable[[Entry], Entry]) -> Prediction:
    """The step of ``model`` over sequences of ``lengths`` tokens with every line changed by ``changes`` in turn."""
    config = model_config(model, dropout=0.1)
    lines = step(config, lengths)
    for change in changes:
        lines = [change(line) for line in lines]
    return predict(config, lengths, lines, ceilings)


def ifs(ceilings: Ceilings) -> str:
    """What each change would give alone, and all of them, for BERT-large at 512."""
    full, packed = lengths_of("full", 512), lengths_of("wikipedia", 512)
    everything = tuple(IFS.values())
    cases = {"as built": (), **{name: (change,) for name, change in IFS.items()}, "all of these": everything,
             "as built, products and attention at 90 % of their rates, memory at 85 %": (slower,),
             "all of these, at 90 % and 85 %": (*everything, slower)}  # fmt: skip
    rows = []
    for name, changes in cases.items():
        whole, real = (predicted("large", lengths, ceilings, *changes) for lengths in (full, packed))
        cells = f"{1e3 * whole.seconds:.1f}", f"{whole.sequences_per_s:.0f}", f"{100 * whole.executed:.1f} %"
        rows.append([name, *cells, f"{real.tokens_per_s / 1e3:.0f}k"])
    return markdown_table(["if", "step ms, full", "sequences/s", "executed", "real tokens/s, Wikipedia"], rows)


def gaps(p: Prediction, ceilings: Ceilings) -> float:
    """The share of a captured step that goes by between one kernel and the next."""
    return p.launches * ceilings.between_kernels / p.seconds


def attention_rates(ceilings: Ceilings, *changes: Callable[[Entry], Entry]) -> tuple[float, float]:
    """Of attention at 512: the backward's FLOP/s without dropout, counted as five products; the share of the rate of
    both directions that is left with dropout."""
    lines = attention(model_config("large", dropout=0.1), lengths_of("full", 512))
    least = 10 / 14 * next(x.times * x.flops for x in lines if x.direction == "backward")
    for change in changes:
        lines = [change(line) for line in lines]
    plain = [x for x in lines if not x.operator.endswith(BITS)]
    without = sum(x.seconds(ceilings) for x in plain)
    backward = sum(x.seconds(ceilings) for x in plain if x.direction == "backward")
    return least / backward, without / sum(x.seconds(ceilings) for x in lines)


def alone(ceilings: Ceilings) -> Iterator[tuple[str, tuple[float, ...], float]]:
    """(operator, what is required, predicted) of BERT-large at 512, each operator alone: what it needs at the rate of
    its limit, of its time. An optimiser needs what it moves."""
    config, lengths = model_config("large", dropout=0.1), lengths_of("full", 512)
    for direction in ("forward", "backward"):
        for operator in ROW_OPERATORS:
            needed = WORK[operator](config, lengths, 2, 2)[direction].bytes / ceilings.copy
            seconds = operator_seconds(config, lengths, operator, direction, ceilings)
            yield f"{operator}, {direction}: of the copy bandwidth", BANDWIDTH[direction], needed / seconds
    for optimizer in OPTIMIZERS:
        lines = update(config, "bfloat16", optimizer)
        needed = sum(x.bytes for x in lines) / ceilings.copy
        predicted = needed / sum(x.seconds(ceilings) for x in lines)
        yield f"{optimizer}, update: of the copy bandwidth", BANDWIDTH["update"], predicted
    needed = WORK["mlm_loss"](config, lengths, 2, 2)["forward"].flops / ceilings.matmul
    predicted = needed / operator_seconds(config, lengths, "mlm_loss", "forward", ceilings)
    yield "mlm_loss, forward: its three products alone, of its time", MLM_LOSS, predicted


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def aims(ceilings: Ceilings) -> str:
    """Each aim that the model has something to say about: required, as built, and with every change of IFS."""
    every = tuple(IFS.values())
    sizes = (("large", lengths_of("full", 512)), ("large", lengths_of("wikipedia", 512)),
             ("base", lengths_of("full", 128)))  # fmt: skip
    built, otherwise = ([predicted(m, n, ceilings, *changes) for m, n in sizes] for changes in ((), every))
    rates, other_rates = attention_rates(ceilings), attention_rates(ceilings, *every)
    rows = []
    for name, unit, required, found in (
        ("large, full 512: executed share of the matrix-product rate", percent, LARGE_EXECUTED,
         (built[0].executed, otherwise[0].executed)),
        ("large, Wikipedia's lengths at 512: real tokens/s", thousand, LARGE_TOKENS,
         (built[1].tokens_per_s, otherwise[1].tokens_per_s)),
        ("base, full 128: executed share", percent, BASE_EXECUTED, (built[2].executed, otherwise[2].executed)),
        ("attention's backward at 512, without dropout", tera, ATTENTION["backward"], (rates[0], other_rates[0])),
        ("attention with dropout: of the rate without", percent, WITH_DROPOUT, (rates[1], other_rates[1])),
    ):  # fmt: skip
        needs = [", ".join(percent(aim / value) for aim in required) for value in found]
        predictions = [f"{unit(value)} ({need})" for value, need in zip(found, needs, strict=True)]
        rows.append([name, ", aim ".join(map(unit, required)), *predictions])
    for name, required, share in alone(ceilings):
        need = ", ".join(percent(aim / share) for aim in required)
        rows.append([name, percent(*required), f"{percent(share)} ({need})", ""])
    small = predicted("base", [128] * 8, ceilings)
    rows.append(
        [
            "base, 8 x 128, captured: time between kernels",
            f"below {percent(*BETWEEN_KERNELS)}",
            percent(gaps(small, ceilings)),
            "",
        ]
    )
    table = markdown_table(["aim", "required", "predicted as built", "with every if"], rows)
    host, host_large = (1e3 * p.launches * ceilings.launch for p in (small, built[0]))
    return (
        f"{table}\n\nIn brackets: the share of the ceilings that is needed on average; above 100 % is out of reach. "
        f"Launches a step: {small.launches:.0f} (base), {built[0].launches:.0f} (large). Eager, at "
        f"{1e6 * ceilings.launch:.0f} us of the host for each, they take {host:.1f} and {host_large:.1f} ms: a step of "
        f"base at 8 x 128 ({1e3 * small.seconds:.1f} ms captured) waits for the host, one of large at 64 x 512 "
        f"({1e3 * built[0].seconds:.0f} ms) does not."
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="a file of benchmarks/gpu.py: its ceilings in place of the stated")
    options = parser.parse_args(arguments)
    ceilings = Ceilings()
    if options.results:
        ceilings = ceilings_of(json.loads(options.results.read_text(encoding="utf-8")))
    print(f"A prediction, at {ceilings}\n\n{aims(ceilings)}\n\nBERT-large at 512\n\n{ifs(ceilings)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
