"""Other launch configurations than the kernels' own, timed; it prints what to write into the constants.

Nothing is changed. A configuration counts only where its results are those of the default one, to rounding.
"""

import itertools
import time

import torch

from benchmarks import clock
from benchmarks.operators import build_case, same
from benchmarks.results import Results, reason
from benchmarks.supervise import raise_if_device_lost
from benchmarks.workload import TOKENS, lengths_of
from bert_fast import choice, dispatch

REPEAT = 12
SECONDS_OF_A_CONFIGURATION = 3
# operator -> the launches that have a configuration of their own (OPERATOR.LAUNCH in bert_fast/choice.py), with the
# direction in which each runs
LAUNCHES = {
    "attention": (("fwd", "forward"), ("dq", "backward"), ("dkv", "backward")),
    "residual_layernorm": (("fwd", "forward"), ("bwd", "backward")),
    "bias_gelu": (("fwd", "forward"), ("bwd", "backward")),
    "embedding_layernorm": (("fwd", "forward"), ("bwd", "backward"), ("sum", "backward")),
    "feed_forward": (("fwd", "forward"), ("bwd", "backward")),
    "mlm_loss": (("fwd", "forward"), ("chunk", "forward")),  # chunk: positions whose logits exist at a time
}


def _grid(**choices) -> list[dict]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def configurations(operator: str, launch: str, capability: int = 90) -> list[dict]:
    """What to try in place of the launch's own configuration; keys that are left out stay as they are."""
    if operator == "feed_forward":  # two programs a multiprocessor, or one with twice the columns
        return [
            *_grid(num_stages=(2, 3), FLATTEN=(False, True)),
            *_grid(BLOCK_N=(256,), num_warps=(8,), PROGRAMS=(1,), num_stages=(3, 4), FLATTEN=(False, True)),
        ]
    if operator == "attention":
        # dq copies nothing ahead there: kernels/attention.py says why
        stages = (1,) if launch == "dq" and capability >= 100 else (1, 2, 3)
        return _grid(BLOCK_M=(64, 128), BLOCK_N=(64, 128), num_warps=(4, 8), num_stages=stages)
    if launch == "chunk":
        return _grid(cuda=(1024, 2048, 8192))
    if operator == "mlm_loss":
        return _grid(BLOCK_M=(1, 2, 4, 8), BLOCK_N=(1024, 2048, 4096), num_warps=(4, 8, 16))
    if operator == "bias_gelu":
        return _grid(BLOCK_M=(1, 2, 4, 8), BLOCK_N=(512, 1024), num_warps=(2, 4, 8))
    if launch == "sum":
        return _grid(RUN=(16, 32, 64), num_warps=(1, 2, 4))
    return _grid(BLOCK_M=(1, 2, 4, 8), num_warps=(2, 4, 8))


def furthest(rows: list[dict]) -> list[str]:
    """The operators of "operators", those furthest from their limit first."""
    shares: dict[str, float] = {}
    for row in rows:
        if row["contender"] == "bert_fast" and "failed" not in row and row["operator"] in LAUNCHES:
            share = row["share_of_limit"] or 0.0  # None where its limit could not be measured
            shares[row["operator"]] = min(share, shares.get(row["operator"], 1e9))
    return sorted(shares, key=shares.get)


def settings(changed: dict) -> str:
    """A launch configuration's constants in words."""
    return ", ".join(f"{name}={value}" for name, value in changed.items())


def sweep(
    results: Results, operator: str, launch: str, direction: str, *, device: str, model: str, seq: int, until: float,
    dtype: torch.dtype = torch.bfloat16, tokens: int = TOKENS, repeat: int = REPEAT, choices: list[dict] | None = None,
) -> None:  # fmt: skip
    """Adds a row to "tune", saved after each configuration: times in microseconds of the default and of every one of
    ``choices`` (default: configurations()) that runs and is right, and what to write."""
    epilogue = {f"feed_forward.{launch}_epilogue": {90: 1, 100: 1}} if operator == "feed_forward" else {}
    with choice.use(epilogue):
        case = build_case(operator, device, dtype, model=model, seq=seq, lengths=lengths_of("full", seq, tokens),
                          parameters=dtype)  # fmt: skip
        call = case.call(direction)
        own = clock.Clock(device)

        def microseconds() -> float:
            return 1e6 * clock.quantiles(own.calls(call, repeat))["p50"]

        expected, default = call(), microseconds()
        row = {"what": f"{operator} {launch}, {model} {seq}", "default_us": default, "tried": []}
        results.add("tune", row)
        capability = 10 * torch.cuda.get_device_capability()[0] if device == "cuda" else 90
        wanted = configurations(operator, launch, capability) if choices is None else choices
        for changed in wanted:
            if time.time() > until - SECONDS_OF_A_CONFIGURATION:
                break
            tried = {"changed": changed, "failed": "its process died, or hung and was ended"}
            row["tried"].append(tried)
            results.save()
            try:
                with choice.use({f"{operator}.{launch}": changed}):
                    found = {"us": microseconds()} if same(call(), expected) else {"wrong": True}
            except Exception as error:
                found = {"failed": reason(error)}  # too many registers, too much shared memory: not one to take
            del tried["failed"]
            tried.update(found)
            results.save()
            if "failed" in found:
                raise_if_device_lost()
        best = min((t for t in row["tried"] if "us" in t), key=lambda t: t["us"], default=None)
        if best is not None:  # the default once more, last: the clocks may have moved meanwhile
            default = min(default, microseconds())
    won = best is not None and best["us"] < 0.98 * default
    path = dispatch.TABLE[operator]["triton"].removeprefix("bert_fast.").replace(".", "/") + ".py"
    row |= {
        "default_us": default, "best_us": best["us"] if won else default, "left_out": len(wanted) - len(row["tried"]),
        "write": f"{'bert_fast/ops/mlm_loss.py' if launch == 'chunk' else path}, {launch} at {seq}: "
                 f"{settings(best['changed'])} ({default / best['us']:.2f}x)" if won else "leave it",
    }  # fmt: skip
    results.save()


def sweeps(results: Results, operators: list[str], **options) -> None:
    """Every launch of ``operators``."""
    for operator in operators:
        for launch, direction in LAUNCHES[operator]:
            if time.time() < options["until"] - 2 * SECONDS_OF_A_CONFIGURATION:
                sweep(results, operator, launch, direction, **options)
