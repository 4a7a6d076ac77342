"""feed_forward: a layer's two products and the GELU between them, an experiment (kernels/experiments/)."""

import torch

from bert_fast import choice, dispatch
from bert_fast.linear import product_dtype
from bert_fast.ops.checks import check_floating, check_like, contiguous
from bert_fast.ops.register import call, define, differentiate, first_output

Tensor = torch.Tensor


def _fake(x, weight_in, bias, weight_out, in_epilogue):
    z = x.new_empty((x.shape[0], weight_in.shape[0]))
    return x.new_empty((x.shape[0], weight_out.shape[0])), z, torch.empty_like(z)


def _bwd_fake(grad_out, x, weight_in, bias, weight_out, z, activated, wanted, in_epilogue):
    grad_x, grad_in, grad_out_weight = (
        torch.empty_like(t) if w else z.new_empty(0) for t, w in zip((x, weight_in, weight_out), wanted, strict=True)
    )
    return grad_x, grad_in, z.new_empty(0) if bias is None else torch.empty_like(bias), grad_out_weight


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], *output[1:])


def _backward(ctx, grad_out, *_):
    for_x, for_weight_in, _, for_weight_out, _ = ctx.needs_input_grad
    grad_x, grad_weight_in, grad_bias, grad_weight_out = call(
        "feed_forward_bwd",
        grad_out.contiguous(),
        *ctx.saved_tensors,
        [for_x, for_weight_in, for_weight_out],
        dispatch.in_epilogue("bwd", grad_out),
    )
    return (
        grad_x if for_x else None,
        grad_weight_in if for_weight_in else None,
        None if ctx.saved_tensors[2] is None else grad_bias,
        grad_weight_out if for_weight_out else None,
        None,
    )


define(
    "feed_forward",
    "fwd",
    "(Tensor x, Tensor weight_in, Tensor? bias, Tensor weight_out, bool in_epilogue) -> (Tensor, Tensor, Tensor)",
    _fake,
)
define(
    "feed_forward",
    "bwd",
    "(Tensor grad_out, Tensor x, Tensor weight_in, Tensor? bias, Tensor weight_out, Tensor z, Tensor activated, "
    "bool[] wanted, bool in_epilogue) -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
)
differentiate("feed_forward", _setup, _backward)


def fuses_feed_forward(x: Tensor) -> bool:
    """Whether a model has to compute the feed-forward of ``x`` by ``feed_forward``: where FEED_FORWARD_EPILOGUE in
    bert_fast/dispatch.py names this GPU, in 16 bits, in forwards that are not compiled."""
    if not (dispatch.FEED_FORWARD_EPILOGUE or choice.active()) or torch.compiler.is_compiling():
        return False
    sixteen_bits = product_dtype(x) in (torch.float16, torch.bfloat16)
    return sixteen_bits and any(dispatch.in_epilogue(direction, x) for direction in ("fwd", "bwd"))


def feed_forward(x: Tensor, weight_in: Tensor, bias: Tensor | None, weight_out: Tensor) -> Tensor:
    """GELU(x weight_in^T + bias) weight_out^T (T, H), the bias of the second product left to what follows.

    x (T, H), weight_in (F, H), bias (F,), weight_out (H, F) floating. Products are in x's dtype, under autocast in
    autocast's, as a linear layer's are, and so is the result.
    Raises ValueError or TypeError for shapes, devices and dtypes that do not fit.
    """
    name = "feed_forward"
    check_like(name, x.device, x=(x, (-1, -1)), weight_in=(weight_in, (-1, x.shape[-1])))
    columns = weight_in.shape[0]
    check_like(name, x.device, bias=(bias, (columns,)), weight_out=(weight_out, (-1, columns)))
    check_floating(name, x=x, weight_in=weight_in, bias=bias, weight_out=weight_out)
    dtype = product_dtype(x)
    return first_output(
        name, x.to(dtype).contiguous(), weight_in.to(dtype).contiguous(), contiguous(bias),
        weight_out.to(dtype).contiguous(), dispatch.in_epilogue("fwd", x),
    )  # fmt: skip
