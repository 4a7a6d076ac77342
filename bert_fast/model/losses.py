"""Losses as transformers computes them, and right under gradient accumulation too."""

import torch
import torch.nn.functional as F

from ..reference import divisor

Tensor = torch.Tensor


def as_tensor(count, like: Tensor) -> Tensor | None:
    """A number of items, int or tensor, as one float element on ``like``'s device."""
    if count is None:
        return None
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.as_tensor(count, device=like.device).to(dtype).reshape(())


def cross_entropy(logits: Tensor, labels: Tensor, count=None, ignore_index: int = -100) -> Tensor:
    """Cross-entropy of logits (N, C) and labels (N,): the sum over labels != ignore_index divided by ``count``.

    ``count`` (int or tensor) defaults to their number; a count of 0 gives 0, not NaN.
    """
    total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    items = (labels != ignore_index).sum() if count is None else as_tensor(count, logits)
    return (total / divisor(items)).to(total.dtype)


def elementwise(loss, prediction: Tensor, target: Tensor, count=None) -> Tensor:
    """``loss`` (mse_loss, binary_cross_entropy_with_logits) averaged over its elements, or divided by ``count``; 0
    where there is none."""
    if count is None and prediction.numel():
        return loss(prediction, target)
    total = loss(prediction, target, reduction="sum")
    return total if count is None else (total / divisor(as_tensor(count, prediction))).to(total.dtype)


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
