"""attention through the kernels that come with PyTorch: on a GPU FlashAttention 2 or cuDNN's, on a CPU its own.

Asked for by name: ``bert_fast.set_backend(attention="torch")``. Without dropout they compute what every backend does,
and what the flash kernel or the CPU's writes has the same bits each time. With dropout they draw masks of their own,
numbered by where an element lies: a run resumes exactly, but its masks depend on how an update is dealt into batches
and on this backend. What the backward needs to draw a mask again is a result of the forward; so dropout is an operator
of its own, ``library_attention``, and a GPU's alone.

``choice.of("attention.torch", ...)`` says which kernel serves on a GPU. Of cuDNN's backward PyTorch does not promise
that its bits repeat: bert_fast/tuning/ takes it where dropout by a library was asked for, and flash everywhere else.

Source: torch/_meta_registrations.py (shapes), aten/src/ATen/native/transformers/cuda/attention.cu and
aten/src/ATen/native/cudnn/MHA.cpp (packed sequences).
"""

import contextlib
import itertools

import torch

from bert_fast import choice, reference
from bert_fast.peers.flash_attn import zero_tail

Tensor = torch.Tensor
KERNELS = ("flash", "cudnn")
_DEFAULT = {"kernel": "flash"}
_aten = torch.ops.aten


def why_unfit(on_cpu: bool, dtype: torch.dtype, head_size: int, p: float) -> str | None:
    """Why PyTorch's kernels do not have such a case, on a CPU or a GPU, or None where they do."""
    if on_cpu:
        return f"PyTorch's kernel for a CPU has no dropout, and {p} was asked for" if p else None
    if dtype not in (torch.float16, torch.bfloat16):
        return f"PyTorch's kernels have float16 and bfloat16 on a GPU, not {dtype}"
    if head_size % 8:
        return f"PyTorch's kernels have head sizes that are multiples of 8, not {head_size}"
    return None


def _on_cpu(qkv: Tensor) -> bool:
    return qkv.device.type == "cpu"


def _check(qkv: Tensor, p: float) -> None:
    reason = why_unfit(_on_cpu(qkv), qkv.dtype, qkv.shape[3], p)
    if reason:
        raise NotImplementedError(f"bert_fast.attention: {reason}. Use another backend than torch")


def _without_dropout(p: float) -> None:
    if p:
        raise NotImplementedError(
            f"bert_fast.attention: the torch backend was asked for dropout {p}; its masks are the library's own, so "
            "dropout goes through bert_fast.ops.attention or torch.ops.bert_fast.library_attention_fwd"
        )


def attention_fwd(qkv, cu_seqlens, max_seqlen, row_key, rng_key, scale, p, site, bias=None):
    """See reference.attention_fwd. p = 0; on a GPU 16 bits and head sizes that are multiples of 8."""
    _without_dropout(p)
    return library_attention_fwd(qkv, cu_seqlens, max_seqlen, scale, 0.0)[:2]


def attention_bwd(
    grad_out, qkv, out, lse, cu_seqlens, max_seqlen, row_key, rng_key, scale, p, site, bias_dtype=None
):  # fmt: skip
    """See reference.attention_bwd. The gradient of the bias is a pass of its own over dq and dv as written."""
    _without_dropout(p)
    state = cu_seqlens.new_zeros(2, dtype=torch.int64)
    return library_attention_bwd(grad_out, qkv, out, lse, state, cu_seqlens, max_seqlen, scale, 0.0, bias_dtype)


def library_attention_fwd(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, p: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> out (T, A*D), lse (A, T), as reference.attention_fwd has them, and state int64 (2,), which names the mask."""
    _check(qkv, p)
    tokens, _, heads, size = qkv.shape
    state = cu_seqlens.new_zeros(2, dtype=torch.int64)
    if not tokens or not max_seqlen or cu_seqlens.numel() == 1:
        lse = qkv.new_zeros((heads, tokens), dtype=torch.promote_types(qkv.dtype, torch.float32))
        return qkv.new_zeros((tokens, heads * size)), lse, state
    if _on_cpu(qkv):
        return *_cpu_fwd(qkv, cu_seqlens, scale), state
    q, k, v = qkv.unbind(1)
    if choice.of("attention.torch", _DEFAULT)["kernel"] == "cudnn":
        out, lse, *_, seed, offset, _ = _aten._cudnn_attention_forward(
            *(x.contiguous() for x in (q, k, v)), None, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, True, p, False,
            False, scale=scale,
        )  # fmt: skip
        lse = lse.reshape(tokens, heads).T.contiguous()
        state = torch.stack([seed.reshape(()).long(), offset.reshape(()).long()])
    else:
        out, lse, drawn, *_ = _aten._flash_attention_forward(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, p, False, False, scale=scale
        )
        state = drawn.view(torch.int64) if p else state
    return zero_tail(out, cu_seqlens, 0).flatten(1), zero_tail(lse, cu_seqlens, 1), state


def library_attention_bwd(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    state: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    p: float,
    bias_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """-> gradients of qkv (T, 3, A, D) and of its bias, as reference.attention_bwd has them."""
    _check(qkv, p)
    tokens, _, heads, size = qkv.shape
    if not tokens or not max_seqlen or cu_seqlens.numel() == 1:
        grad_qkv = torch.zeros_like(qkv)
    elif _on_cpu(qkv):
        grad_qkv = _cpu_bwd(grad_out, qkv, out, lse, cu_seqlens, scale)
    else:
        shape = (tokens, heads, size)
        q, k, v = qkv.unbind(1)
        given = (grad_out.view(shape), q, k, v, out.view(shape))
        lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        if choice.of("attention.torch", _DEFAULT)["kernel"] == "cudnn":
            grads = _aten._cudnn_attention_backward(
                *(x.contiguous() for x in given), lse.T.contiguous()[..., None], state[0], state[1], None, *lengths, p,
                False, scale=scale,
            )  # fmt: skip
        else:
            with _deterministic():
                grads = _aten._flash_attention_backward(
                    *given, lse, *lengths, p, False, state.view(torch.uint64), state.new_empty(()).view(torch.uint64),
                    scale=scale,
                )  # fmt: skip
        grad_qkv = zero_tail(torch.stack(grads, 1), cu_seqlens, 0)
    return grad_qkv, reference.attention_grad_bias(grad_qkv, bias_dtype)


@contextlib.contextmanager
def _deterministic():
    """The flash backward adds in a fixed order meanwhile: it asks for PyTorch's global switch alone."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _cpu_fwd(qkv: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """A sequence after the other: the kernel has no packed ones."""
    tokens, _, heads, size = qkv.shape
    out = qkv.new_zeros((tokens, heads, size))
    lse = qkv.new_zeros((heads, tokens), dtype=torch.promote_types(qkv.dtype, torch.float32))
    for start, end in _sequences(cu_seqlens):
        q, k, v = qkv[start:end].permute(1, 2, 0, 3)[:, None]
        found, sums = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
        out[start:end], lse[:, start:end] = found[0].transpose(0, 1), sums[0]
    return out.flatten(1), lse


def _cpu_bwd(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    tokens, _, heads, size = qkv.shape
    grad_qkv = torch.zeros_like(qkv)
    grad_out, out = (x.view(tokens, heads, size).transpose(0, 1)[None] for x in (grad_out, out))
    for start, end in _sequences(cu_seqlens):
        q, k, v = qkv[start:end].permute(1, 2, 0, 3)[:, None]
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out[:, :, start:end], q, k, v, out[:, :, start:end], lse[None, :, start:end], 0.0, False, scale=scale
        )
        grad_qkv[start:end] = torch.stack([grad[0].transpose(0, 1) for grad in grads], 1)
    return grad_qkv


def _sequences(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    return [(start, end) for start, end in itertools.pairwise(cu_seqlens.tolist()) if end > start]
