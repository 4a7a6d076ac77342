"""attention: softmax attention inside each of the packed sequences."""

import itertools
import math

import torch

from bert_fast import dispatch
from bert_fast.ops.checks import check_floating, check_like, contiguous, dropout_keys, require
from bert_fast.ops.register import call, define, differentiate, first_output, total_dtype, transformed

Tensor = torch.Tensor


def _fake(qkv, *_):
    tokens, _, heads, size = qkv.shape
    return qkv.new_empty((tokens, heads * size)), qkv.new_empty((heads, tokens), dtype=total_dtype(qkv))


def _check_cu_seqlens(qkv, cu_seqlens, max_seqlen, *_):
    ends = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    if ends[0] != 0 or min(lengths, default=0) < 0 or ends[-1] > qkv.shape[0]:
        raise ValueError(
            f"bert_fast.attention: cu_seqlens must start at 0, never fall, and end at or before the {qkv.shape[0]} "
            f"tokens of qkv; it is {ends}"
        )
    if (longest := max(lengths, default=0)) > max_seqlen:
        raise ValueError(
            f"bert_fast.attention: max_seqlen is {max_seqlen}, but sequence {lengths.index(longest)} of cu_seqlens "
            f"has {longest} tokens"
        )


def _setup(ctx, inputs, output):
    qkv, cu_seqlens, ctx.max_seqlen, row_key, rng_key, ctx.scale, ctx.p, ctx.site, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(qkv, *output, cu_seqlens, row_key, rng_key)


def _backward(ctx, grad_out, *_):
    qkv, out, lse, cu_seqlens, row_key, rng_key = ctx.saved_tensors
    bias_dtype = ctx.bias_dtype if ctx.needs_input_grad[-1] else None
    grad_qkv, grad_bias = call(
        "attention_bwd", grad_out.contiguous(), qkv, out, lse, cu_seqlens, ctx.max_seqlen, row_key, rng_key, ctx.scale,
        ctx.p, ctx.site, bias_dtype,
    )  # fmt: skip
    return grad_qkv, *(None,) * 7, None if bias_dtype is None else grad_bias


def _bwd_fake(grad_out, qkv, *rest):
    *_, bias_dtype = rest
    grad_bias = qkv.new_empty(0 if bias_dtype is None else qkv.shape[1:], dtype=bias_dtype)
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), grad_bias


define(
    "attention",
    "fwd",
    "(Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, Tensor row_key, Tensor rng_key, float scale, float p, "
    "int site, Tensor? bias) -> (Tensor, Tensor)",
    _fake,
    _check_cu_seqlens,
)
define(
    "attention",
    "bwd",
    "(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens, SymInt max_seqlen, Tensor row_key, "
    "Tensor rng_key, float scale, float p, int site, ScalarType? bias_dtype) -> (Tensor, Tensor)",
    _bwd_fake,
)
differentiate("attention", _setup, _backward)


def _library_fake(qkv, *_):
    return *_fake(qkv), qkv.new_empty(2, dtype=torch.int64)


def _library_setup(ctx, inputs, output):
    qkv, cu_seqlens, ctx.max_seqlen, ctx.scale, ctx.p, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(qkv, *output, cu_seqlens)


def _library_backward(ctx, grad_out, *_):
    *saved, cu_seqlens = ctx.saved_tensors
    bias_dtype = ctx.bias_dtype if ctx.needs_input_grad[-1] else None
    grad_qkv, grad_bias = call(
        "library_attention_bwd", grad_out.contiguous(), *saved, cu_seqlens, ctx.max_seqlen, ctx.scale, ctx.p, bias_dtype
    )
    return grad_qkv, *(None,) * 4, None if bias_dtype is None else grad_bias


# attention with dropout by PyTorch's kernels, whose forward tells their backward which mask it drew
define(
    "library_attention",
    "fwd",
    "(Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, float scale, float p, Tensor? bias) -> "
    "(Tensor, Tensor, Tensor)",
    _library_fake,
    _check_cu_seqlens,
    dispatch.library_attention,
    (torch.Tag.nondeterministic_seeded,),
)
define(
    "library_attention",
    "bwd",
    "(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, Tensor state, Tensor cu_seqlens, SymInt max_seqlen, "
    "float scale, float p, ScalarType? bias_dtype) -> (Tensor, Tensor)",
    _bwd_fake,
    only=dispatch.library_attention,
)
differentiate("library_attention", _library_setup, _library_backward)


def require_masks_again(x: Tensor, p: float, checkpoint) -> None:
    """Raises NotImplementedError where ``checkpoint`` (a partial of PyTorch's) would compute a layer of ``x`` again
    with other masks than it had: attention's are a library's, and its generator is not put back."""
    again = getattr(checkpoint, "keywords", {}).get("preserve_rng_state", True)
    if p > 0.0 and not again and dispatch.attention_by_library():
        raise NotImplementedError(
            'bert_fast.attention: recompute("layers") does not put torch\'s generator back, from which the torch '
            'backend draws its masks. Use another backend of attention, or recompute "gelu" or "nothing"'
        )


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    p: float = 0.0,
    row_key: Tensor | None = None,
    rng_key: Tensor | None = None,
    site: int = 0,
    bias: Tensor | None = None,
) -> Tensor:
    """Bidirectional attention of packed sequences: per sequence and head dropout(softmax(scale q k^T)) v.

    qkv (T, 3, A, D) floating, D <= 256; cu_seqlens (B+1,) int32: sequence i is tokens cu_seqlens[i] ..
    cu_seqlens[i+1]-1; max_seqlen bounds their lengths; scale defaults to D**-0.5. Returns (T, A*D), zero past
    cu_seqlens[-1]. No token sees another sequence. row_key (T,) and rng_key (1,) int64 name the mask where p > 0.
    ``bias`` (3, A, D) or (3*A*D,), floating, is one that qkv has in it already, from a product that was given it
    detached: it changes nothing here, and the backward gives its gradient, qkv's summed over all tokens in float32
    (float64), without a pass of its own. Of k it is exactly 0, as no softmax sees what is added to every key.
    Where the backend is PyTorch's and p > 0, the masks are that library's own, drawn by torch's generator.
    Raises ValueError or TypeError for shapes, devices and dtypes that do not fit and, on a CPU, for cu_seqlens
    that do not add up.
    """
    name = "attention"
    check_like(name, qkv.device, qkv=(qkv, (-1, 3, -1, -1)), cu_seqlens=(cu_seqlens, (-1,)))
    check_floating(name, qkv=qkv, bias=bias)
    require(
        cu_seqlens.dtype == torch.int32, name, f"cu_seqlens has dtype {cu_seqlens.dtype}, expected int32", TypeError
    )
    require(cu_seqlens.shape[0] >= 1, name, "cu_seqlens is empty; without any sequence it is [0]")
    require(1 <= qkv.shape[3] <= 256, name, f"the head size is {qkv.shape[3]}, supported are 1 to 256")
    if bias is not None and bias.dim() == 1:
        check_like(name, qkv.device, bias=(bias, (math.prod(qkv.shape[1:]),)))
        bias = bias.reshape(qkv.shape[1:])
    check_like(name, qkv.device, bias=(bias, tuple(qkv.shape[1:])))
    row_key, rng_key = dropout_keys(name, p, row_key, rng_key, qkv)
    if bias is not None and transformed():
        qkv = qkv + (bias - bias.detach())  # nothing, with the bias's gradient
    scale = qkv.shape[3] ** -0.5 if scale is None else scale
    qkv, cu_seqlens, bias = qkv.contiguous(), cu_seqlens.contiguous(), contiguous(bias)
    if p > 0.0 and dispatch.attention_by_library() and not transformed():
        return first_output("library_attention", qkv, cu_seqlens, max_seqlen, scale, p, bias)
    return first_output(name, qkv, cu_seqlens, max_seqlen, row_key, rng_key, scale, p, site, bias)
