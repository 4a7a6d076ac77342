"""Other launch configurations than the kernels' own, timed; it prints what to write into the constants.

Nothing is changed. A configuration counts only where its results are those of the default one, to rounding.
"""

import time

import torch

from benchmarks import clock
from benchmarks.operators import build_case, same
from benchmarks.results import Results, reason
from benchmarks.workload import TOKENS, lengths_of
from bert_fast import choice, dispatch
from bert_fast.supervised import raise_if_device_lost
from bert_fast.tuning.candidates import epilogue_tiles, launches

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


def configurations(operator: str, launch: str, capability: int = 90) -> list[dict]:
    """What to try in place of the launch's own configuration, the tuner's candidates; keys that are left out stay as
    they are."""
    name = f"{operator}.{launch}"
    if operator == "feed_forward":
        return [tile[name] for tile in epilogue_tiles(launch)]
    return [tile[name] for asked in launches(capability) for tile in asked.candidates if name in tile]


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
