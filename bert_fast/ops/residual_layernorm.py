"""residual_layernorm: bias, dropout, the residual and LayerNorm after a product."""

import torch

from bert_fast.ops.checks import check_floating, check_like, contiguous, dropout_keys
from bert_fast.ops.register import call, define, differentiate, first_output, total_dtype

Tensor = torch.Tensor


def _fake(x, bias, residual, *_):
    out = torch.empty_like(x if residual is None else residual, memory_format=torch.contiguous_format)
    mean = x.new_empty((x.shape[0],), dtype=total_dtype(x))
    return out, torch.empty_like(out), mean, torch.empty_like(mean)


def _bwd_fake(grad_out, z, mean, rstd, weight, row_key, rng_key, p, site, x_dtype, has_bias):
    same = p == 0.0 and x_dtype == z.dtype
    grad_x = z.new_empty((0 if same else z.shape[0], z.shape[1]), dtype=z.dtype if same else x_dtype)
    grad_bias = weight.new_empty(weight.shape if has_bias else (0,))
    return grad_x, torch.empty_like(z), grad_bias, torch.empty_like(weight), torch.empty_like(weight)


def _setup(ctx, inputs, output):
    x, bias, residual, weight, _, row_key, rng_key, _, ctx.p, ctx.site = inputs
    ctx.x_dtype, ctx.has_bias, ctx.has_residual = x.dtype, bias is not None, residual is not None
    ctx.save_for_backward(*output[1:], weight, row_key, rng_key)


def _backward(ctx, grad_out, *_):
    grad_x, grad_residual, grad_bias, grad_weight, grad_ln_bias = call(
        "residual_layernorm_bwd", grad_out.contiguous(), *ctx.saved_tensors, ctx.p, ctx.site, ctx.x_dtype, ctx.has_bias
    )
    if ctx.p == 0.0 and ctx.x_dtype == grad_residual.dtype:
        grad_x = grad_residual
    return (
        grad_x,
        grad_bias if ctx.has_bias else None,
        grad_residual if ctx.has_residual else None,
        grad_weight,
        grad_ln_bias,
        *(None,) * 5,
    )


define(
    "residual_layernorm",
    "fwd",
    "(Tensor x, Tensor? bias, Tensor? residual, Tensor weight, Tensor ln_bias, Tensor row_key, Tensor rng_key, "
    "float eps, float p, int site) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
define(
    "residual_layernorm",
    "bwd",
    "(Tensor grad_out, Tensor z, Tensor mean, Tensor rstd, Tensor weight, Tensor row_key, Tensor rng_key, float p, "
    "int site, ScalarType x_dtype, bool has_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
)
differentiate("residual_layernorm", _setup, _backward)


def residual_layernorm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    *,
    bias: Tensor | None = None,
    eps: float,
    p: float = 0.0,
    row_key: Tensor | None = None,
    rng_key: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """LayerNorm(dropout(x + bias) + residual) (T, H), in the residual's dtype (x's, where there is none).

    x and residual (T, H), bias, weight and ln_bias (H,), floating; row_key (T,) and rng_key (1,) int64 name
    the mask where p > 0. Raises ValueError or TypeError for shapes, devices and dtypes that do not fit.
    """
    name = "residual_layernorm"
    check_like(name, x.device, x=(x, (-1, -1)))
    columns = x.shape[1]
    check_like(name, x.device, residual=(residual, tuple(x.shape)), bias=(bias, (columns,)),
                weight=(weight, (columns,)), ln_bias=(ln_bias, (columns,)))  # fmt: skip
    check_floating(name, x=x, residual=residual, bias=bias, weight=weight, ln_bias=ln_bias)
    row_key, rng_key = dropout_keys(name, p, row_key, rng_key, x)
    return first_output(
        name, x.contiguous(), contiguous(bias), contiguous(residual), weight.contiguous(), ln_bias.contiguous(),
        row_key, rng_key, eps, p, site,
    )  # fmt: skip
