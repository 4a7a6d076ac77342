"""residual_layernorm in C++ (kernels/cpu/residual_layernorm.cpp), with the signatures of bert_fast/reference.py."""

import torch

from bert_fast import dropout_mask, reference
from bert_fast.kernels.cpu import DTYPES, function

Tensor = torch.Tensor

_forward = function("residual_layernorm_fwd", "iippppppppp" + "llf" + "plii" + "fi")
_backward = function("residual_layernorm_bwd", "iipppppppp" + "ll" + "plii" + "fi")


def _native(x: torch.dtype, z: torch.dtype) -> bool:
    """Whether the compiled code has these dtypes: z float32, or both the same."""
    return x in DTYPES and z in DTYPES and z in (torch.float32, x)


def _dropout(row_key: Tensor, rng_key: Tensor, p: float, site: int) -> tuple:
    if p == 0.0:
        return None, 0, 0, 0, 1.0
    return row_key, int(rng_key), site, dropout_mask.dropout_threshold(p), dropout_mask.dropout_scale(p)


def residual_layernorm_fwd(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    row_key: Tensor,
    rng_key: Tensor,
    eps: float,
    p: float,
    site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> out, z (T, H) in the residual's dtype (x's without one), mean, rstd (T,) float32."""
    dtype = x.dtype if residual is None else residual.dtype
    if not _native(x.dtype, dtype) or torch.float64 in (weight.dtype, ln_bias.dtype):
        return reference.residual_layernorm_fwd(x, bias, residual, weight, ln_bias, row_key, rng_key, eps, p, site)
    out, z = torch.empty_like(x, dtype=dtype), torch.empty_like(x, dtype=dtype)
    mean = torch.empty(x.shape[0])
    rstd = torch.empty_like(mean)
    b = None if bias is None else bias.float()
    _forward(
        DTYPES[x.dtype], DTYPES[dtype], x, b, residual, weight.float(), ln_bias.float(), out, z, mean, rstd, *x.shape,
        eps, *_dropout(row_key, rng_key, p, site), torch.get_num_threads(),
    )  # fmt: skip
    return out, z, mean, rstd


def residual_layernorm_bwd(
    grad_out: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    row_key: Tensor,
    rng_key: Tensor,
    p: float,
    site: int,
    x_dtype: torch.dtype,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of x (empty where it is the residual's), residual, bias, weight, ln_bias."""
    native = _native(x_dtype, z.dtype) and grad_out.dtype == z.dtype and mean.dtype == torch.float32
    if not native or weight.dtype == torch.float64:
        return reference.residual_layernorm_bwd(
            grad_out, z, mean, rstd, weight, row_key, rng_key, p, site, x_dtype, has_bias
        )
    same = p == 0.0 and x_dtype == z.dtype
    grad_x = None if same else torch.empty_like(z, dtype=x_dtype)
    grad_residual = torch.empty_like(z)
    grads = torch.empty(3, z.shape[1])
    _backward(
        DTYPES[x_dtype], DTYPES[z.dtype], grad_out, z, mean, rstd, weight.float(), grad_x, grad_residual, grads,
        *z.shape, *_dropout(row_key, rng_key, p, site), torch.get_num_threads(),
    )  # fmt: skip
    grad_weight, grad_ln_bias, grad_bias = (g.to(weight.dtype, copy=True) for g in grads)
    if grad_x is None:
        grad_x = z.new_empty(0, z.shape[1])
    return grad_x, grad_residual, grad_bias if has_bias else weight.new_empty(0), grad_weight, grad_ln_bias
