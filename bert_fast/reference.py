"""Every fused operator in plain PyTorch: the specification of what a kernel computes, and the fallback.

The forwards (``*_fwd``) are differentiable by autograd, so a test's truth is the forward in float64 and
PyTorch's own derivative of it; the backwards (``*_bwd``) are the explicit formulas that kernels implement.
Shapes: T packed tokens of all sequences, B sequences, H hidden size, A heads, D head size, F intermediate
size, M masked positions, V vocabulary. Statistics and sums are in float32, or float64 where an input is.
``rng_key`` (1,) int64 and ``row_key`` (T,) int64 name the dropout mask (see bert_fast/dropout_mask.py); they are
not read where ``p`` is 0. ``site`` tells the dropouts of one forward pass apart.
"""

import itertools
import math

import torch

from bert_fast import dropout_mask
from bert_fast.products import long_product

Tensor = torch.Tensor


def _accumulate(x: Tensor) -> Tensor:
    """``x`` in the precision of sums and statistics."""
    return x if x.dtype == torch.float64 else x.float()


def divisor(count: Tensor) -> Tensor:
    """What a sum over ``count`` items is divided by; infinity for 0, so that it and its gradients are 0."""
    return count.where(count != 0, math.inf)


def _drop_hidden(x: Tensor, row_key: Tensor, rng_key: Tensor, p: float, site: int) -> Tensor:
    if p == 0.0:
        return x
    keep = dropout_mask.hidden_keep_mask(rng_key, row_key, x.shape[1], p, site)
    return torch.where(keep, x * dropout_mask.dropout_scale(p), 0.0)


def _normalize(z: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = z.mean(dim=1)
    centered = z - mean[:, None]
    rstd = torch.rsqrt(centered.square().mean(dim=1) + eps)
    return centered * rstd[:, None], mean, rstd


def _normalize_bwd(grad_normalized: Tensor, normalized: Tensor, rstd: Tensor) -> Tensor:
    """d z from d xhat: rstd * (g - mean(g) - xhat * mean(g * xhat))."""
    g = grad_normalized
    mean_g = g.mean(dim=1, keepdim=True)
    mean_gx = (g * normalized).mean(dim=1, keepdim=True)
    return rstd[:, None] * (g - mean_g - normalized * mean_gx)


def _segment_sum(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """Sum ``rows`` (T, H) into (size, H) by ``index`` (T,), in the order of T: deterministic on a CPU."""
    return rows.new_zeros(size, rows.shape[1]).index_add_(0, index, rows)


# --------------------------------------------------------------------------------------------------------------
# embedding_layernorm: out = dropout(LayerNorm(word[ids] + position[positions] + segment[segments]))


def embedding_layernorm_fwd(
    ids: Tensor,
    positions: Tensor,
    segments: Tensor,
    word: Tensor,
    position: Tensor,
    segment: Tensor,
    weight: Tensor,
    bias: Tensor,
    row_key: Tensor,
    rng_key: Tensor,
    eps: float,
    p: float,
    site: int,
    padding_idx: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """ids, positions, segments (T,) int64; tables (V, H), (P, H), (S, H) -> out (T, H) out_dtype, mean, rstd (T,).

    ``padding_idx`` matters to the backward alone.
    """
    words = torch.nn.functional.embedding(ids, word, padding_idx if padding_idx >= 0 else None)
    z = _accumulate(words) + _accumulate(segment[segments]) + _accumulate(position[positions])
    normalized, mean, rstd = _normalize(z, eps)
    y = normalized * _accumulate(weight) + _accumulate(bias)
    return _drop_hidden(y, row_key, rng_key, p, site).to(out_dtype), mean, rstd


def embedding_layernorm_bwd(
    grad_out: Tensor,
    ids: Tensor,
    positions: Tensor,
    segments: Tensor,
    word: Tensor,
    position: Tensor,
    segment: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    row_key: Tensor,
    rng_key: Tensor,
    p: float,
    site: int,
    padding_idx: int,
    grad_word: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of word, position, segment, weight, bias, each in its table's dtype.

    The row ``padding_idx`` of the word table gets no gradient (-1: every row does), as in ``nn.Embedding``.
    ``grad_word`` (V, H), contiguous, is a gradient of word from elsewhere: ours is added to it in place, rounded to
    its dtype before, so that the bits are those of two gradients made apart and added; it is then the first result.
    """
    z = _accumulate(word[ids]) + _accumulate(segment[segments]) + _accumulate(position[positions])
    normalized = (z - mean[:, None]) * rstd[:, None]
    grad_y = _drop_hidden(_accumulate(grad_out), row_key, rng_key, p, site)
    grad_z = _normalize_bwd(grad_y * _accumulate(weight), normalized, rstd)
    added = _segment_sum(grad_z, ids, word.shape[0])
    if padding_idx >= 0:
        added[padding_idx] = 0.0
    added = added.to(word.dtype)
    return (
        added if grad_word is None else grad_word.add_(added),
        _segment_sum(grad_z, positions, position.shape[0]).to(position.dtype),
        _segment_sum(grad_z, segments, segment.shape[0]).to(segment.dtype),
        (grad_y * normalized).sum(dim=0).to(weight.dtype),
        grad_y.sum(dim=0).to(weight.dtype),
    )


def embedding_layernorm_bwd_add(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """embedding_layernorm_bwd with its ``grad_word``, without returning that."""
    return embedding_layernorm_bwd(*arguments)[1:]


# --------------------------------------------------------------------------------------------------------------
# attention: per sequence and head, out = dropout(softmax(scale * q k^T)) v


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
    """qkv (T, 3, A, D), cu_seqlens (B+1,) int32 -> out (T, A*D), lse (A, T): log-sum-exp of the scaled scores.

    Bidirectional and block-diagonal: no token sees another sequence. Rows past ``cu_seqlens[-1]`` are
    written as zeros (lse too). No sequence is longer than ``max_seqlen``. ``bias`` (3, A, D) is in qkv already:
    nothing reads it here, the backward makes its gradient.
    """
    tokens, _, heads, size = qkv.shape
    outs, lses = [], []
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        if start == end:
            continue
        q, k, v = _accumulate(qkv[start:end]).permute(1, 2, 0, 3)  # each (A, S, D)
        scores = scale * (q @ k.transpose(1, 2))
        lse = scores.logsumexp(dim=-1)
        probabilities = _drop_attention(torch.exp(scores - lse[..., None]), row_key[start:end], rng_key, p, site)
        outs.append((probabilities @ v).transpose(0, 1).reshape(end - start, heads * size))
        lses.append(lse)
    tail = tokens - bounds[-1]
    outs.append(_accumulate(qkv.new_zeros(tail, heads * size)))
    lses.append(_accumulate(qkv.new_zeros(heads, tail)))
    return torch.cat(outs).to(qkv.dtype), torch.cat(lses, dim=1)


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
    """-> gradients of qkv (T, 3, A, D), zeros past ``cu_seqlens[-1]``, and of a bias (3, A, D) that qkv has in it, in
    ``bias_dtype``; empty (0,) where that is None.

    With P = exp(scores - lse), mask M (0 or 1/keep): dV = (P*M)^T dO, dP = M * (dO V^T),
    dS = P * (dP - rowsum(dO * out)), dQ = scale dS K, dK = scale dS^T Q.

    The bias's gradient is that of qkv summed over all tokens, before it is rounded. Of k it is 0: a vector added to
    every key adds one number to all scores of a query, which a softmax does not see. In terms of dK: out is (P*M) V, so
    rowsum(dO * out) is rowsum(P * dP), each row of dS sums to 0, and so does dS^T Q over the keys. A sum of the dK that
    is computed would give the rounding errors of that 0; zeros are returned.
    """
    _, _, heads, size = qkv.shape
    grad_qkv = torch.zeros_like(qkv, memory_format=torch.contiguous_format)
    grad_bias = _accumulate(qkv.new_zeros(qkv.shape[1:]))
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        if start == end:
            continue
        q, k, v = _accumulate(qkv[start:end]).permute(1, 2, 0, 3)
        grad_o = _accumulate(grad_out[start:end]).view(end - start, heads, size).transpose(0, 1)
        o = _accumulate(out[start:end]).view(end - start, heads, size).transpose(0, 1)
        probabilities = torch.exp(scale * (q @ k.transpose(1, 2)) - lse[:, start:end, None])
        grad_p = grad_o @ v.transpose(1, 2)
        dropped = probabilities
        if p > 0.0:
            keep = dropout_mask.attention_keep_mask(rng_key, row_key[start:end], heads, end - start, p, site)
            factor = keep.to(grad_p.dtype) * dropout_mask.dropout_scale(p)
            dropped, grad_p = probabilities * factor, grad_p * factor
        grad_s = probabilities * (grad_p - (grad_o * o).sum(dim=-1, keepdim=True))
        grads = (scale * (grad_s @ k), scale * (grad_s.transpose(1, 2) @ q), dropped.transpose(1, 2) @ grad_o)
        grad_qkv[start:end] = torch.stack(grads).permute(2, 0, 1, 3).to(qkv.dtype)
        grad_bias[0] += grads[0].sum(dim=1)
        grad_bias[2] += grads[2].sum(dim=1)
    return grad_qkv, qkv.new_empty(0) if bias_dtype is None else grad_bias.to(bias_dtype)


def attention_grad_bias(grad_qkv: Tensor, bias_dtype: torch.dtype | None) -> Tensor:
    """The second result of attention_bwd from its first (T, 3, A, D), for a backend that makes only that."""
    if bias_dtype is None:
        return grad_qkv.new_empty(0)
    grad_bias = grad_qkv.new_zeros(grad_qkv.shape[1:], dtype=bias_dtype)
    for i in (0, 2):
        grad_bias[i] = grad_qkv[:, i].sum(dim=0, dtype=_accumulate(grad_qkv[:0]).dtype)
    return grad_bias


def _drop_attention(probabilities: Tensor, row_key: Tensor, rng_key: Tensor, p: float, site: int) -> Tensor:
    if p == 0.0:
        return probabilities
    heads, _, keys = probabilities.shape
    keep = dropout_mask.attention_keep_mask(rng_key, row_key, heads, keys, p, site)
    return torch.where(keep, probabilities * dropout_mask.dropout_scale(p), 0.0)


# --------------------------------------------------------------------------------------------------------------
# residual_layernorm: out = LayerNorm(dropout(x + bias) + residual)


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
    """x (T, H), bias (H,) or None, residual (T, H) or None -> out (T, H), z (T, H), mean (T,), rstd (T,).

    ``z`` is the sum before the LayerNorm, kept for the backward. out and z have the residual's dtype (x's,
    where there is none), and the statistics are those of z as stored, so that both directions see one z.
    """
    z = _accumulate(x)
    if bias is not None:
        z = z + _accumulate(bias)
    z = _drop_hidden(z, row_key, rng_key, p, site)
    if residual is not None:
        z = z + _accumulate(residual)
    dtype = x.dtype if residual is None else residual.dtype
    z = z.to(dtype, copy=z is x)  # an operator's output must not be its input
    normalized, mean, rstd = _normalize(_accumulate(z), eps)
    out = normalized * _accumulate(weight) + _accumulate(ln_bias)
    return out.to(dtype), z, mean, rstd


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
    """-> gradients of x (x_dtype), residual (z's dtype), bias, weight, ln_bias (weight's dtype).

    Where ``p`` is 0 and the dtypes agree, x's gradient *is* the residual's: it is returned empty (0, H), and
    the caller uses the residual's. Without a bias its gradient is empty (0,).
    """
    normalized = (_accumulate(z) - mean[:, None]) * rstd[:, None]
    grad_out = _accumulate(grad_out)
    grad_z = _normalize_bwd(grad_out * _accumulate(weight), normalized, rstd)
    grad_x = _drop_hidden(grad_z, row_key, rng_key, p, site)
    grad_bias = grad_x.sum(dim=0).to(weight.dtype) if has_bias else weight.new_empty(0)
    same = p == 0.0 and x_dtype == z.dtype
    return (
        z.new_empty(0, z.shape[1]) if same else grad_x.to(x_dtype),
        grad_z.to(z.dtype),
        grad_bias,
        (grad_out * normalized).sum(dim=0).to(weight.dtype),
        grad_out.sum(dim=0).to(weight.dtype),
    )


# --------------------------------------------------------------------------------------------------------------
# bias_gelu: out = GELU(x + bias), GELU(u) = u * Phi(u) with the exact normal distribution function


def bias_gelu_fwd(x: Tensor, bias: Tensor | None) -> Tensor:
    """x (T, F), bias (F,) or None -> out (T, F) in x's dtype."""
    u = _accumulate(x) if bias is None else _accumulate(x) + _accumulate(bias)
    return (0.5 * u * (1.0 + torch.erf(u * math.sqrt(0.5)))).to(x.dtype)


def bias_gelu_bwd(grad_out: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """-> gradients of x (T, F) and bias (F,) (empty without one): GELU'(u) = Phi(u) + u phi(u)."""
    u = _accumulate(x) if bias is None else _accumulate(x) + _accumulate(bias)
    cdf = 0.5 * (1.0 + torch.erf(u * math.sqrt(0.5)))
    pdf = torch.exp(-0.5 * u * u) * (1.0 / math.sqrt(2.0 * math.pi))
    grad_x = _accumulate(grad_out) * (cdf + u * pdf)
    grad_bias = x.new_empty(0) if bias is None else grad_x.sum(dim=0).to(bias.dtype)
    return grad_x.to(x.dtype), grad_bias


# --------------------------------------------------------------------------------------------------------------
# feed_forward: out = GELU(x weight_in^T + bias) weight_out^T


def feed_forward_fwd(
    x: Tensor, weight_in: Tensor, bias: Tensor | None, weight_out: Tensor, in_epilogue: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, H), weight_in (F, H), bias (F,) or None, weight_out (H, F) -> out (T, H), z = x weight_in^T (T, F), and
    activated = GELU(z + bias) of z as it is stored (T, F), all in x's dtype, which the weights have too.

    ``in_epilogue`` asks a backend that can to compute GELU within the product before it; the others need not care.
    """
    z = x @ weight_in.T
    activated = bias_gelu_fwd(z, bias)
    return activated @ weight_out.T, z, activated


def feed_forward_bwd(
    grad_out: Tensor,
    x: Tensor,
    weight_in: Tensor,
    bias: Tensor | None,
    weight_out: Tensor,
    z: Tensor,
    activated: Tensor,
    wanted: list[bool],
    in_epilogue: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of x, weight_in, bias, weight_out. ``wanted`` says of x and the two weights whether theirs is; one
    that is not, and that of no bias, is empty (0,). ``in_epilogue`` as above: GELU' within the product before it.
    """
    grad_z, grad_bias = bias_gelu_bwd(grad_out @ weight_out, z, bias)
    return feed_forward_gradients(grad_out, grad_z, grad_bias, x, weight_in, activated, wanted)


def feed_forward_gradients(
    grad_out: Tensor,
    grad_z: Tensor,
    grad_bias: Tensor,
    x: Tensor,
    weight_in: Tensor,
    activated: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What feed_forward_bwd returns, from those of z and bias: the products that are alike in every backend."""
    for_x, for_weight_in, for_weight_out = wanted
    return (
        grad_z @ weight_in if for_x else grad_z.new_empty(0),
        grad_z.T @ x if for_weight_in else grad_z.new_empty(0),
        grad_bias,
        grad_out.T @ activated if for_weight_out else grad_z.new_empty(0),
    )


# --------------------------------------------------------------------------------------------------------------
# mlm_loss: cross-entropy of hidden @ word^T + bias at masked positions, and its gradients in the same pass


def mlm_loss_fwd(
    hidden: Tensor,
    word: Tensor,
    bias: Tensor,
    labels: Tensor,
    normalizer: Tensor | None,
    ignore_index: int,
    chunk: int,
    with_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (M, H), word (V, H), bias (V,), labels (M,) int64 -> loss () float32 and, ``with_grads``, the
    gradients of loss with respect to hidden, word and bias, each in its input's dtype (else empty).

    loss = sum over labels != ignore_index of (logsumexp(logits) - logits[label]) / normalizer; the default
    normalizer is the number of such labels, and the loss is 0 with zero gradients where it is 0. It has one element.
    Logits are held for at most ``chunk`` positions. Products are in hidden's dtype:
    d logits = (softmax - onehot) / normalizer, d hidden = d logits @ word, d word = d logits^T @ hidden.
    """
    exact = hidden.dtype == torch.float64
    total = torch.float64 if exact else torch.float32
    valid = labels != ignore_index
    count = divisor(valid.sum() if normalizer is None else normalizer.reshape(()))
    table, table_bias = word.to(hidden.dtype), bias.to(total)
    grad_hidden = torch.empty_like(hidden) if with_grads else hidden.new_empty(0)
    grad_word = torch.zeros(word.shape if with_grads else (0,), dtype=total, device=word.device)
    grad_bias = torch.zeros(bias.shape if with_grads else (0,), dtype=total, device=bias.device)
    loss = torch.zeros((), dtype=total, device=hidden.device)
    for start in range(0, hidden.shape[0], chunk):
        rows = slice(start, start + chunk)
        logits = (hidden[rows] @ table.T).to(total) + table_bias
        target = labels[rows].where(valid[rows], 0)[:, None]
        lse = logits.logsumexp(dim=1)
        loss = loss + (lse - logits.gather(1, target)[:, 0]).where(valid[rows], 0.0).sum()
        if with_grads:
            grad_logits = torch.exp(logits - lse[:, None])
            grad_logits.scatter_add_(1, target, torch.full_like(target, -1, dtype=total))
            grad_logits = torch.where(valid[rows, None], grad_logits / count, 0.0)
            grad_bias += grad_logits.sum(dim=0)
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[rows] = long_product(grad_logits, table)
            grad_word += (grad_logits.T @ hidden[rows]).to(total)
    return loss / count, grad_hidden, grad_word.to(word.dtype), grad_bias.to(bias.dtype)


def mlm_loss_bwd(grad_loss: Tensor, grad_hidden: Tensor, grad_word: Tensor, grad_bias: Tensor) -> tuple[Tensor, ...]:
    """The forward's gradients times ``grad_loss`` (), as new tensors."""
    return tuple((_accumulate(g) * grad_loss).to(g.dtype) for g in (grad_hidden, grad_word, grad_bias))


def mlm_loss_bwd_(grad_loss: Tensor, grad_hidden: Tensor, grad_word: Tensor, grad_bias: Tensor) -> None:
    """mlm_loss_bwd in place. No pass where the factor is one and lies on a CPU, where reading it costs nothing."""
    if grad_loss.device.type == "cpu" and float(grad_loss) == 1.0:
        return
    for g in (grad_hidden, grad_word, grad_bias):
        g.copy_(_accumulate(g) * grad_loss)
