"""bias_gelu in C++ (kernels/cpu/bias_gelu.cpp), with the signatures of bert_fast/reference.py."""

import torch

from bert_fast import reference
from bert_fast.kernels.cpu import DTYPES, function, parameter

_forward = function("bias_gelu_fwd", "iippplli")
_backward = function("bias_gelu_bwd", "iippppplli")


def bias_gelu_fwd(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (T, F), bias (F,) or None -> out (T, F) in x's dtype."""
    if torch.float64 in (x.dtype, None if bias is None else bias.dtype):
        return reference.bias_gelu_fwd(x, bias)
    b = parameter(bias, x.dtype)
    out = torch.empty_like(x)
    b_dtype = 0 if b is None else DTYPES[b.dtype]
    _forward(DTYPES[x.dtype], b_dtype, x, b, out, *x.shape, torch.get_num_threads())
    return out


def bias_gelu_bwd(
    grad_out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> gradients of x (T, F) and bias (F,) (empty without one)."""
    if torch.float64 in (x.dtype, None if bias is None else bias.dtype):
        return reference.bias_gelu_bwd(grad_out, x, bias)
    b = parameter(bias, x.dtype)
    grad_x = torch.empty_like(x)
    grad_b = None if b is None else torch.empty_like(b)
    b_dtype = 0 if b is None else DTYPES[b.dtype]
    _backward(DTYPES[x.dtype], b_dtype, grad_out, x, b, grad_x, grad_b, *x.shape, torch.get_num_threads())
    return grad_x, x.new_empty(0) if bias is None or grad_b is None else grad_b.to(bias.dtype)
