"""attention through flash-attn 2 (https://github.com/Dao-AILab/flash-attention), to compare with.

Asked for by name: ``bert_fast.set_backend(attention="flash_attn")``. Without dropout alone: its mask comes
from its own generator and its own numbering, so it can't equal the other back ends'.
"""

import importlib
import importlib.metadata
import importlib.util

import torch

from bert_fast import reference

Tensor = torch.Tensor


def why_unavailable() -> str | None:
    """Why flash-attn cannot run here, or None where it can."""
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    version = importlib.metadata.version("flash_attn")
    if [int(part) for part in version.split(".")[:2]] < [2, 7]:
        return f"flash-attn {version} is installed, and the functions called here are those of 2.7 and later"
    if not torch.cuda.is_available():
        return "flash-attn needs a GPU, and none is visible to torch"
    return None


def _check(qkv: Tensor, p: float) -> None:
    if p != 0.0:
        raise NotImplementedError(
            f"bert_fast.attention: the flash_attn backend was asked for dropout {p}; flash-attn draws its own mask, "
            "which cannot equal this engine's. Set attention_probs_dropout_prob=0, or use the triton backend"
        )
    if qkv.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"bert_fast.attention: qkv has dtype {qkv.dtype}; the flash_attn backend has float16 and bfloat16. Use the "
            "triton backend"
        )
    if qkv.shape[3] % 8:
        raise ValueError(
            f"bert_fast.attention: the head size is {qkv.shape[3]}; the flash_attn backend has multiples of 8 up to "
            "256. Use the triton backend"
        )


def zero_tail(x: Tensor, cu_seqlens: Tensor, dim: int) -> Tensor:
    """``x`` with zeros past ``cu_seqlens[-1]``, where flash-attn writes nothing; without waiting for the device."""
    shape = [1] * x.dim()
    shape[dim] = -1
    inside = torch.arange(x.shape[dim], device=x.device) < cu_seqlens[-1]
    return torch.where(inside.view(shape), x, 0.0)


def attention_fwd(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    row_key: Tensor,
    rng_key: Tensor,
    scale: float,
    p: float,
    site: int,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See bert_fast/reference.py. fp16 and bf16, head sizes that are multiples of 8, p = 0."""
    _check(qkv, p)
    interface = importlib.import_module("flash_attn.flash_attn_interface")
    out, lse, *_ = interface._flash_attn_varlen_forward(
        *qkv.unbind(1),
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=False,
    )
    return zero_tail(out, cu_seqlens, 0).flatten(1), zero_tail(lse, cu_seqlens, 1)


def attention_bwd(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    row_key: Tensor,
    rng_key: Tensor,
    scale: float,
    p: float,
    site: int,
    bias_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """See bert_fast/reference.py. Deterministic, as the other back ends are.

    The gradient of the bias is a pass of its own over dq and dv as they were written.
    """
    _check(qkv, p)
    interface = importlib.import_module("flash_attn.flash_attn_interface")
    grad_qkv = torch.empty_like(qkv)
    grad_q, grad_k, grad_v = grad_qkv.unbind(1)
    shape = (qkv.shape[0], *qkv.shape[2:])
    interface._flash_attn_varlen_backward(
        grad_out.view(shape),
        *qkv.unbind(1),
        out.view(shape),
        lse,
        grad_q,
        grad_k,
        grad_v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=False,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=True,
    )
    grad_qkv = zero_tail(grad_qkv, cu_seqlens, 0)
    return grad_qkv, reference.attention_grad_bias(grad_qkv, bias_dtype)
