"""Losses as transformers computes them, and right under gradient accumulation too."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from bert_fast.model.idcheck import naming
from bert_fast.ops import out_of_range
from bert_fast.reference import divisor

Tensor = torch.Tensor


def as_tensor(count, like: Tensor) -> Tensor | None:
    """A number of items, int or tensor, as one float element on ``like``'s device."""
    if count is None:
        return None
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.as_tensor(count, device=like.device).to(dtype).reshape(())


def check_labels(name: str, labels: Tensor, expected: Sequence[int]) -> None:
    """Raise TypeError for labels that are no integers, ValueError for another number than a shape ``expected`` has."""
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {labels.dtype}, expected int64")
    if labels.numel() != math.prod(expected):
        raise ValueError(f"{name} has shape {tuple(labels.shape)}, expected {tuple(expected)}")


def cross_entropy(
    logits: Tensor, labels: Tensor, count=None, ignore_index: int = -100, *, name: str = "labels",
    given: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Cross-entropy of logits (N, C) and labels, N of them: the sum over labels != ignore_index divided by ``count``.

    ``count`` (int or tensor) defaults to their number; a count of 0 gives 0, not NaN. Errors speak of ``name``, and of
    places in ``given`` where labels are only a part of what the caller gave.
    """
    given = labels if given is None else given
    check_labels(name, labels, logits.shape[:1])
    labels = labels.reshape(-1).long()
    with naming(lambda: out_of_range(name, given, logits.shape[1], ignore_index)):
        total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    items = as_tensor(count, logits)
    return (total / divisor((labels != ignore_index).sum() if items is None else items)).to(total.dtype)


def elementwise(loss, prediction: Tensor, target: Tensor, count=None) -> Tensor:
    """``loss`` (mse_loss, binary_cross_entropy_with_logits) averaged over its elements, or divided by ``count``; 0
    where there is none. ValueError where one has more elements than the other."""
    if prediction.numel() != target.numel():
        raise ValueError(f"labels has {target.numel()} elements, expected {prediction.numel()}, those of the logits")
    if count is None and prediction.numel():
        return loss(prediction, target)
    total, items = loss(prediction, target, reduction="sum"), as_tensor(count, prediction)
    return total if items is None else (total / divisor(items)).to(total.dtype)


class _WithZeroGradients(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(loss, *parameters):
        return loss.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad_loss):
        return grad_loss, *(torch.zeros_like(p) for p in ctx.saved_tensors)


def with_zero_gradients(loss: Tensor, parameters) -> Tensor:
    """``loss``, whose backward also gives ``parameters``, which it does not use, gradients of zero.

    DistributedDataParallel waits for a gradient of every parameter that an output of the model depends on.
    """
    return _WithZeroGradients.apply(loss, *(p for p in parameters if p.requires_grad))
