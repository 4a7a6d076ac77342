"""Phase 5: other launch configurations than the kernels' own, timed; what to write into the constants is printed.

Nothing is changed. A configuration counts only where its results are those of the default one, to rounding.
"""

import importlib
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from gpu_results import Results, reason
from operators import DROPOUT, Stopwatch, build_case
from step_model import TOKENS, lengths_of

from bert_fast import dispatch

REPEAT = 12
SECONDS_OF_A_CONFIGURATION = 3


def _grid(**choices) -> list[dict]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def configurations(operator: str, kernel: str, smoke: bool) -> list[dict]:
    """What to try in place of the kernel's own launch configuration; keys that are left out stay as they are."""
    if smoke:
        return [{"num_warps": 2}, {"num_warps": 8}]
    if operator == "attention":
        return _grid(BLOCK_M=(64, 128), BLOCK_N=(64, 128), num_warps=(4, 8), num_stages=(1, 2, 3))
    if operator == "mlm_loss":
        return _grid(BLOCK_M=(1, 2, 4, 8), BLOCK_N=(1024, 2048, 4096), num_warps=(4, 8, 16))
    if operator == "bias_gelu":
        return _grid(BLOCK_M=(1, 2, 4, 8), BLOCK_N=(512, 1024), num_warps=(2, 4, 8))
    return _grid(BLOCK_M=(1, 2, 4, 8), num_warps=(2, 4, 8))


# operator -> the launches that have a configuration of their own, with the direction in which each runs
KERNELS = {
    "attention": (("fwd", "forward"), ("dq", "backward"), ("dkv", "backward")),
    "residual_layernorm": (("fwd", "forward"), ("bwd", "backward")),
    "bias_gelu": (("fwd", "forward"), ("bwd", "backward")),
    "embedding_layernorm": (("fwd", "forward"), ("bwd", "backward")),
    "mlm_loss": (("fwd", "forward"),),
}


def replacement(operator: str, kernel: str, original: Callable, changed: dict) -> Callable:
    """A ``_launch_config`` that gives ``changed`` where the original is asked for ``kernel``."""

    def launch_config(*arguments) -> dict:
        config = original(*arguments)
        asked = {"attention": arguments[0], "mlm_loss": "fwd"}.get(operator, arguments[-1])
        return config | changed if asked == kernel else config

    return launch_config


def furthest(results: Results) -> list[str]:
    """The operators, those furthest from their limit first, as phase 3 found them."""
    shares: dict[str, float] = {}
    for row in results.data.get("operators", []):
        if row["contender"] == "bert_fast" and "failed" not in row and row["operator"] in KERNELS:
            shares[row["operator"]] = min(row["share_of_limit"], shares.get(row["operator"], 1e9))
    return sorted(KERNELS, key=lambda operator: shares.get(operator, 0.0))


def same(found, expected) -> bool:
    """Whether two results (a tensor or several) agree to the rounding of their dtype."""
    pairs = zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (found, expected)), strict=True)
    return all(
        float((a.detach().double() - b.detach().double()).norm())
        <= 4 * torch.finfo(b.dtype).eps * float(b.detach().double().norm()) + 1e-12
        for a, b in pairs
    )


def sweep(operator: str, kernel: str, direction: str, model: str, seq: int, options) -> dict:
    """Times of the default and of every configuration that runs and is right, in microseconds."""
    module = importlib.import_module(dispatch.TABLE[operator]["triton"])
    original = module._launch_config
    dtype = torch.float32 if options.smoke else torch.bfloat16
    lengths = lengths_of("full", seq, 64 if options.smoke else TOKENS)
    case = build_case(
        operator, options.device, dtype, model=model, seq=seq, lengths=lengths, dropout=DROPOUT, parameters=dtype
    )
    call = case.calls(direction)["bert_fast"]
    stopwatch, repeat = Stopwatch(options.device), 1 if options.smoke else REPEAT

    def microseconds() -> float:
        stopwatch(call)
        return 1e3 * statistics.median(stopwatch(call) for _ in range(repeat))

    expected, default = call(), microseconds()
    tried, left_out = [], 0
    try:
        for changed in configurations(operator, kernel, options.smoke):
            if time.time() > options.until - SECONDS_OF_A_CONFIGURATION:
                left_out += 1
                continue
            module._launch_config = replacement(operator, kernel, original, changed)
            try:
                row = (
                    {"changed": changed, "us": microseconds()}
                    if same(call(), expected)
                    else {"changed": changed, "wrong": True}
                )
            except Exception as error:
                row = {"changed": changed, "failed": reason(error)}  # too many registers or too much shared memory
            tried.append(row)
    finally:
        module._launch_config = original
    best = min((row for row in tried if "us" in row), key=lambda row: row["us"], default=None)
    again = default
    if best is not None:  # the default once more, last: the clocks may have moved meanwhile
        again = min(default, microseconds())
    won = best is not None and best["us"] < 0.98 * again
    path = module.__name__.replace("bert_fast.kernels.", "kernels/") + ".py"
    changed = ", ".join(f"{k}={v}" for k, v in best["changed"].items()) if won else ""
    return {
        "default_us": again,
        "best_us": best["us"] if won else again,
        "write": f"{path}, {kernel} at {seq}: {changed} ({again / best['us']:.2f}x)" if won else "leave it",
        "tried": tried,
        "left_out": left_out,
    }


def run(results: Results, options) -> None:
    """Fills "tune"."""
    if options.smoke:
        dispatch.set_backend("triton")
    sizes = [("micro", 24)] if options.smoke else [("large", 512), ("base", 128), ("base", 512)]
    operators = ["bias_gelu"] if options.smoke else furthest(results)
    for model, seq in sizes:
        for operator in operators:
            if seq == 128 and operator != "attention":
                continue  # the row operators know no sequences
            for kernel, direction in KERNELS[operator]:
                if time.time() > options.until - 2 * SECONDS_OF_A_CONFIGURATION:
                    return
                facts = {"what": f"{operator} {kernel}, {model} {seq}"}
                results.case(
                    5, facts["what"], "tune", facts,
                    lambda o=operator, k=kernel, d=direction, m=model, s=seq: sweep(o, k, d, m, s, options),
                )  # fmt: skip
                print(f"   {results.data['tune'][-1].get('write', '')}", flush=True)
