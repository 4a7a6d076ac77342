"""bias_gelu: a product's bias and GELU."""

import contextlib

import torch

from bert_fast.ops.checks import check_floating, check_like, contiguous
from bert_fast.ops.register import call, define, differentiate, first_output, nodes

Tensor = torch.Tensor


def _bwd_fake(grad_out, x, bias):
    return torch.empty_like(x), x.new_empty(0) if bias is None else torch.empty_like(bias)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_out):
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = call("bias_gelu_bwd", grad_out.contiguous(), x, bias)
    return grad_x, None if bias is None else grad_bias


define("bias_gelu", "fwd", "(Tensor x, Tensor? bias) -> Tensor", lambda x, bias: torch.empty_like(x))
define("bias_gelu", "bwd", "(Tensor grad_out, Tensor x, Tensor? bias) -> (Tensor, Tensor)", _bwd_fake)
differentiate("bias_gelu", _setup, _backward)


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU(x + bias) with the exact normal distribution function; x (T, F), bias (F,) -> (T, F) in x's dtype.

    Raises ValueError or TypeError for shapes, devices and dtypes that do not fit.
    """
    check_like("bias_gelu", x.device, x=(x, (-1, -1)))
    check_like("bias_gelu", x.device, bias=(bias, (x.shape[1],)))
    check_floating("bias_gelu", x=x, bias=bias)
    return first_output("bias_gelu", x.contiguous(), contiguous(bias))


def recompute_on_backward(y: Tensor) -> contextlib.AbstractContextManager:
    """Around the use of ``y``, what ``bias_gelu`` gave: a backward that needs it computes it again, to the same bits.

    It is made from what bias_gelu's own backward keeps, so nothing is kept for it. Where ``y`` has no such origin (no
    gradient, a forward that is compiled) it is kept as ever.
    """
    node = y.grad_fn
    if not isinstance(node, nodes["bias_gelu"]._backward_cls):
        return contextlib.nullcontext()
    place, shape, dtype = y.data_ptr(), y.shape, y.dtype

    def pack(kept: Tensor):
        return node if (kept.data_ptr(), kept.shape, kept.dtype) == (place, shape, dtype) else kept

    def unpack(kept) -> Tensor:
        return call("bias_gelu_fwd", *kept.saved_tensors) if kept is node else kept

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
