"""The optimisers alone on BERT's parameters, ours beside PyTorch's and apex's; gradients clipped to norm 1."""

from collections.abc import Callable

import torch

import bert_fast
from benchmarks import clock
from benchmarks.contenders import ForeachLamb
from benchmarks.operators import Work, rate_of, timed
from benchmarks.workload import model_config
from bert_fast import dispatch, optim

# What each is compared with, and bytes an element of float32 weights that it has to move: the norm reads g; AdamW reads
# w, g, m, v and writes w, m, v; LAMB reads those, writes m and v, then reads w, m, v and writes w. PyTorch's clipping
# reads g for the norm, then reads and writes it. With weights and gradients of 16 bits, ours keeps float32 weights
# besides, PyTorch and apex do not: they move less than half.
CONTENDERS = {
    "norm": {"bert_fast": 4, "torch norm and clipping": 12},
    "adamw": {"bert_fast": 32, "torch AdamW, fused": 40, "torch AdamW, foreach": None},
    "lamb": {"bert_fast": 44, "LAMB in PyTorch": None, "apex FusedLAMB": None},
}
SIXTEEN_BITS = {"norm": 2, "adamw": 30, "lamb": 42}  # of ours: two of gradients twice, two of weights written besides


def update_of(model: torch.nn.Module, operator: str, contender: str) -> Callable[[], object]:
    """A function that does one whole update of ``model`` as ``contender`` does it."""
    groups = optim.parameter_groups(model)
    parameters = [p for group in groups for p in group["params"]]

    def clip() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)

    def clipped(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def update() -> None:
            clip()
            optimizer.step()

        return update

    if operator == "norm":
        return (lambda: optim.grad_norm(parameters)) if contender == "bert_fast" else clip
    if contender == "bert_fast":
        return {"adamw": optim.AdamW, "lamb": optim.Lamb}[operator](groups, lr=1e-6, max_grad_norm=1.0).step
    if contender == "LAMB in PyTorch":
        return clipped(ForeachLamb(groups))
    if contender == "apex FusedLAMB":
        from apex.optimizers import FusedLAMB

        return FusedLAMB(parameters, lr=1e-6, max_grad_norm=1.0).step
    return clipped(torch.optim.AdamW(groups, lr=1e-6, **{contender.rpartition(" ")[2]: True}))


def measure(
    own: clock.Clock, model: str, *, limits: dict, rounds: int, weights: torch.dtype = torch.float32
) -> list[dict]:
    """A row for each contender of each optimiser, as operators.py has them; gradients have the dtype of ``weights``."""
    with torch.device(own.device):
        module = bert_fast.BertForPreTraining(model_config(model, dropout=0.0)).to(weights)
    for p in module.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    elements, rows = sum(p.numel() for p in module.parameters()), []
    for operator, contenders in CONTENDERS.items():
        here = [n for n in contenders if n != "apex FusedLAMB" or dispatch.why_unavailable("apex") is None]
        calls = {name: update_of(module, operator, name) for name in here}
        for call in calls.values():
            own.calls(call, 1)
        times = clock.interleave(calls, rounds, own.call)
        for name in here:
            row = {"model": model, "seq": 0, "lengths": "", "dropout": 0.0, "operator": operator,
                   "direction": "update", "shape": f"{elements} parameters of {weights.itemsize} bytes",
                   "contender": name, "backend": name, "weights": str(weights).removeprefix("torch.")}  # fmt: skip
            row |= timed(times[name])
            moved = contenders[name] if weights == torch.float32 else SIXTEEN_BITS[operator] * (name == "bert_fast")
            if moved:
                work = Work(bytes=moved * elements)
                row |= rate_of(work, 1e-3 * row["ms"], limits, weights) | {"flops": 12 * elements, "bytes": work.bytes}
            if name != "bert_fast":
                row["ours_is"] = clock.paired_ratio(times[name], times["bert_fast"])
            rows.append(row)
    return rows
