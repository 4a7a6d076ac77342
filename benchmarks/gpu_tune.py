"""Phase 5: other launch configurations than the kernels' own, timed; what to write into the constants is printed.

Nothing is changed. A configuration counts only where its results are those of the default one, to rounding.
"""

import contextlib
import importlib
import itertools
import statistics
import time
from unittest import mock

import gpu_feed_forward
import torch
from gpu_results import INTERRUPTED, Results, raise_if_device_lost, reason, settings
from operators import DROPOUT, Stopwatch, build_case
from step_model import TOKENS, lengths_of
from workload import model_config

from bert_fast import dispatch, ops

REPEAT = 12
SECONDS_OF_A_CONFIGURATION = 3


def _grid(**choices) -> list[dict]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def configurations(operator: str, kernel: str, smoke: bool) -> list[dict]:
    """What to try in place of the kernel's own launch configuration; keys that are left out stay as they are."""
    if smoke:
        return [{"num_warps": 2}, {"num_warps": 8}]
    if kernel in HOPPER:
        return [{HOPPER[kernel]: {90: 1}}]
    if operator == "feed_forward":  # two programs a multiprocessor, or one with twice the columns
        return [
            *_grid(num_stages=(2, 3), FLATTEN=(False, True)),
            *_grid(BLOCK_N=(256,), num_warps=(8,), PROGRAMS=(1,), num_stages=(3, 4), FLATTEN=(False, True)),
        ]
    if operator == "attention":
        return _grid(BLOCK_M=(64, 128), BLOCK_N=(64, 128), num_warps=(4, 8), num_stages=(1, 2, 3))
    if kernel == "chunk":
        return _grid(MLM_CHUNK=({"cuda": 1024}, {"cuda": 2048}, {"cuda": 8192}))
    if operator == "mlm_loss":
        return _grid(BLOCK_M=(1, 2, 4, 8), BLOCK_N=(1024, 2048, 4096), num_warps=(4, 8, 16))
    if operator == "bias_gelu":
        return _grid(BLOCK_M=(1, 2, 4, 8), BLOCK_N=(512, 1024), num_warps=(2, 4, 8))
    if (operator, kernel) == ("embedding_layernorm", "bwd"):
        return _grid(RUN=(8, 16, 32), num_warps=(1, 2))
    return _grid(BLOCK_M=(1, 2, 4, 8), num_warps=(2, 4, 8))


# attention_hopper.py's kernels, in place of fwd and of dq and dkv -> the tables in attention.py that put them there
HOPPER = {"asynchronous": "ASYNCHRONOUS_FORWARD", "one_pass": "ONE_PASS_BACKWARD"}
# operator -> the launches that have a configuration of their own, with the direction in which each runs
KERNELS = {
    "attention": (
        ("fwd", "forward"),
        ("dq", "backward"),
        ("dkv", "backward"),
        ("asynchronous", "forward"),
        ("one_pass", "backward"),
    ),
    "residual_layernorm": (("fwd", "forward"), ("bwd", "backward")),
    "bias_gelu": (("fwd", "forward"), ("bwd", "backward")),
    "embedding_layernorm": (("fwd", "forward"), ("bwd", "backward")),
    # in place of the library's product and bias_gelu, which is what runs today
    "feed_forward": (("fwd", "forward"), ("bwd", "backward")),
    "mlm_loss": (("fwd", "forward"), ("chunk", "forward")),  # chunk: positions whose logits exist at a time
}


@contextlib.contextmanager
def applied(operator: str, kernel: str, changed: dict):
    """``changed`` in place of what ``kernel`` is launched with, for the length of a ``with`` block."""
    module = ops if kernel == "chunk" else importlib.import_module(dispatch.TABLE[operator]["triton"])
    if kernel == "chunk" or kernel in HOPPER:  # the table that says so
        with mock.patch.multiple(module, **changed):
            yield
        return
    original = module._launch_config

    def launch_config(*arguments) -> dict:
        config = original(*arguments)
        asked = {"attention": arguments[0], "mlm_loss": "fwd"}.get(operator, arguments[-1])
        return config | changed if asked == kernel else config

    with mock.patch.object(module, "_launch_config", launch_config):
        yield


def furthest(results: Results) -> list[str]:
    """The operators, those furthest from their limit first, as phase 3 found them."""
    shares: dict[str, float] = {}
    for row in results.data.get("operators", []):
        if row["contender"] == "bert_fast" and "failed" not in row and row["operator"] in KERNELS:
            share = row["share_of_limit"] or 0.0  # None where its limit could not be measured
            shares[row["operator"]] = min(share, shares.get(row["operator"], 1e9))
    return sorted(KERNELS, key=lambda operator: shares.get(operator, 0.0))


def same(found, expected) -> bool:
    """Whether two results (a tensor or several) agree to the rounding of their dtype."""
    pairs = zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (found, expected)), strict=True)
    return all(
        float((a.detach().double() - b.detach().double()).norm())
        <= max(4 * torch.finfo(b.dtype).eps, 1e-5) * float(b.detach().double().norm()) + 1e-12
        for a, b in pairs
    )


def sweep_name(operator: str, kernel: str, model: str, seq: int) -> str:
    return f"{operator} {kernel}, {model} {seq}"


def row_of(results: Results, what: str) -> dict | None:
    """The row of a sweep as far as it came; None before its first configuration. One without "write" was cut off."""
    return next((row for row in results.data.get("tune", []) if row["what"] == what and "tried" in row), None)


def begin(results: Results, what: str, changed: dict) -> None:
    """A configuration is a case of its own to who supervises: which one hung is told, and it is not begun again."""
    results.begun(5).append(f"{what}: {settings(changed)}")
    results.save()


def record_interrupted(results: Results, row: dict, choices: list[dict]) -> None:
    """Add to what was tried the one of ``choices`` that a process before this one began and did not end."""
    begun = sum(key.startswith(f"{row['what']}: ") for key in results.begun(5))
    if begun > len(row["tried"]):
        changed = choices[len(row["tried"])]
        row["tried"].append({"changed": changed, "failed": INTERRUPTED})
        results.save()


def sweep(operator: str, kernel: str, direction: str, model: str, seq: int, options, results: Results) -> list[dict]:
    """Times of the default and of every configuration that runs and is right, in microseconds.

    They are in its row of "tune", saved after each, and not in what is returned: no further rows. Where a process
    before this one was ended in the middle, the sweep goes on in that row.
    """
    dtype = torch.float32 if options.smoke else torch.bfloat16
    lengths = lengths_of("full", seq, 64 if options.smoke else TOKENS)
    if operator == "feed_forward":
        config = model_config(model, dropout=0.0)
        found = gpu_feed_forward.calls(config, sum(lengths), dtype, options.device, direction)
        call, candidate = found["bert_fast"], found["epilogue"]
    else:
        case = build_case(
            operator, options.device, dtype, model=model, seq=seq, lengths=lengths, dropout=DROPOUT, parameters=dtype
        )
        call = candidate = case.calls(direction)["bert_fast"]
    stopwatch, repeat = Stopwatch(options.device), 1 if options.smoke else REPEAT

    def microseconds(call) -> float:
        stopwatch(call)
        return 1e3 * statistics.median(stopwatch(call) for _ in range(repeat))

    expected, default = call(), microseconds(call)
    what = sweep_name(operator, kernel, model, seq)
    row = row_of(results, what)
    if row is None:
        row = {"what": what, "default_us": default, "tried": []}
        results.add("tune", row)
    default, tried, left_out = min(default, row["default_us"]), row["tried"], 0
    for changed in configurations(operator, kernel, options.smoke)[len(tried) :]:
        if time.time() > options.until - SECONDS_OF_A_CONFIGURATION:
            left_out += 1
            continue
        begin(results, what, changed)
        try:
            with applied(operator, kernel, changed):
                found = {"us": microseconds(candidate)} if same(candidate(), expected) else {"wrong": True}
        except Exception as error:
            found = {"failed": reason(error)}  # too many registers, too much shared memory: not one to take
        tried.append({"changed": changed, **found})
        results.save()
        if "failed" in found:
            raise_if_device_lost()
    best = min((row for row in tried if "us" in row), key=lambda row: row["us"], default=None)
    again = default
    if best is not None:  # the default once more, last: the clocks may have moved meanwhile
        again = min(default, microseconds(call))
    won = best is not None and best["us"] < 0.98 * again
    path = dispatch.TABLE[operator]["triton"].replace("bert_fast.kernels.", "kernels/") + ".py"
    path = "bert_fast/ops.py" if kernel == "chunk" else path
    path = f"FEED_FORWARD_EPILOGUE in bert_fast/dispatch.py and {path}" if operator == "feed_forward" else path
    changed = settings(best["changed"]) if won else ""
    row |= {
        "default_us": again,
        "best_us": best["us"] if won else again,
        "write": f"{path}, {kernel} at {seq}: {changed} ({again / best['us']:.2f}x)" if won else "leave it",
        "left_out": left_out,
    }
    results.save()
    print(f"   {row['write']}", flush=True)
    return []


def run(results: Results, options) -> None:
    """Fills "tune"."""
    if options.smoke:
        dispatch.set_backend("triton")
    sizes = [("micro", 24)] if options.smoke else [("large", 512), ("base", 128), ("base", 512)]
    operators = ["bias_gelu", "feed_forward"] if options.smoke else furthest(results)
    for model, seq in sizes:
        for operator in operators:
            if seq == 128 and operator != "attention":
                continue  # the row operators know no sequences
            if operator == "feed_forward" and not gpu_feed_forward.available():
                continue
            for kernel, direction in KERNELS[operator]:
                if time.time() > options.until - 2 * SECONDS_OF_A_CONFIGURATION:
                    return
                key = what = sweep_name(operator, kernel, model, seq)
                if row := row_of(results, what):
                    if "write" in row:
                        continue
                    record_interrupted(results, row, configurations(operator, kernel, options.smoke))
                    key = f"{what}, from configuration {len(row['tried']) + 1}"
                results.case(
                    5, key, "tune", {"what": what},
                    lambda o=operator, k=kernel, d=direction, m=model, s=seq: sweep(o, k, d, m, s, options, results),
                )  # fmt: skip
