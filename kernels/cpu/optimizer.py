"""The optimisers in C++ (kernels/cpu/optimizer.cpp), with the signatures of bert_fast/optim/reference.py."""

import torch

from bert_fast.kernels.cpu import DTYPES, function
from bert_fast.optim.reference import by_dtype, optimizer_rates

Tensor = torch.Tensor

__all__ = ["optimizer_adamw", "optimizer_lamb", "optimizer_norm", "optimizer_rates"]

_norm = function("optimizer_norm", "ipplpi")
_update = function("optimizer_update", "iiplpffffffi")
_ADAMW, _LAMB, _LAMB_ADAPT_ALL = 0, 1, 2


def optimizer_norm(tensors) -> Tensor:
    """The L2 norm of all elements of all tensors, () float32; summed in float64."""
    total, part = 0.0, torch.empty((), dtype=torch.float64)
    for dtype, numbers in by_dtype(tensors).items():
        kept = [tensors[i].contiguous() for i in numbers]
        table = torch.tensor([[t.data_ptr() for t in kept], [t.numel() for t in kept]])
        _norm(DTYPES[dtype], table[0], table[1], len(kept), part, torch.get_num_threads())
        total += float(part)
    return torch.tensor(total**0.5)


def _step(kind: int, params, masters, grads, exp_avgs, exp_avg_sqs, rates, clip, beta1, beta2, eps) -> None:
    for dtype, numbers in by_dtype(params).items():
        lists = [[tensors[i] for i in numbers] for tensors in (params, masters, grads, exp_avgs, exp_avg_sqs)]
        table = [[t.data_ptr() for t in tensors] for tensors in lists]
        table.append([t.numel() for t in lists[0]])
        _update(
            kind, DTYPES[dtype], torch.tensor(table), len(numbers), rates[numbers].contiguous(), float(clip),
            beta1, 1 - beta1, beta2, 1 - beta2, eps, torch.get_num_threads(),
        )  # fmt: skip


def optimizer_adamw(params, masters, grads, exp_avgs, exp_avg_sqs, rates, clip, beta1, beta2, eps) -> None:
    """One step of AdamW, in place."""
    _step(_ADAMW, params, masters, grads, exp_avgs, exp_avg_sqs, rates, clip, beta1, beta2, eps)


def optimizer_lamb(params, masters, grads, exp_avgs, exp_avg_sqs, rates, clip, beta1, beta2, eps, adapt_all) -> None:
    """One step of LAMB, in place."""
    kind = _LAMB_ADAPT_ALL if adapt_all else _LAMB
    _step(kind, params, masters, grads, exp_avgs, exp_avg_sqs, rates, clip, beta1, beta2, eps)
