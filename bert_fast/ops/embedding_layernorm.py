"""embedding_layernorm: the three embeddings of every token, their sum normalised."""

import torch

from bert_fast.ops.checks import check_floating, check_like, check_range, dropout_keys, require
from bert_fast.ops.register import call, define, differentiate, first_output, total_dtype
from bert_fast.ops.table_gradient import embedded_table

Tensor = torch.Tensor


def _fake(ids, positions, segments, word, *rest):
    rows, out_dtype = ids.shape[0], rest[-1]
    mean = word.new_empty((rows,), dtype=total_dtype(word))
    return word.new_empty((rows, word.shape[1]), dtype=out_dtype), mean, torch.empty_like(mean)


def _check(ids, positions, segments, word, position, segment, *_):
    check_range("embedding_layernorm", "ids", ids, word.shape[0])
    check_range("embedding_layernorm", "positions", positions, position.shape[0])
    check_range("embedding_layernorm", "segments", segments, segment.shape[0])


def _setup(ctx, inputs, output):
    *tensors, row_key, rng_key, _, ctx.p, ctx.site, ctx.padding_idx, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(*tensors[:7], mean, rstd, row_key, rng_key)


def _backward(ctx, grad_out, *_):
    grads = call("embedding_layernorm_bwd", grad_out.contiguous(), *ctx.saved_tensors, ctx.p, ctx.site, ctx.padding_idx)
    return None, None, None, *grads, None, None, None, None, None, None, None


def _bwd_fake(grad_out, ids, positions, segments, word, position, segment, weight, *_):
    tables = (word, position, segment, weight, weight)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tables)


define(
    "embedding_layernorm",
    "fwd",
    "(Tensor ids, Tensor positions, Tensor segments, Tensor word, Tensor position, Tensor segment, Tensor weight, "
    "Tensor bias, Tensor row_key, Tensor rng_key, float eps, float p, int site, int padding_idx, "
    "ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
    _fake,
    _check,
)
define(
    "embedding_layernorm",
    "bwd",
    "(Tensor grad_out, Tensor ids, Tensor positions, Tensor segments, Tensor word, Tensor position, Tensor segment, "
    "Tensor weight, Tensor mean, Tensor rstd, Tensor row_key, Tensor rng_key, float p, int site, int padding_idx) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
)
define(
    "embedding_layernorm",
    "bwd_add",  # bwd, but the gradient of word is added to the last argument
    "(Tensor grad_out, Tensor ids, Tensor positions, Tensor segments, Tensor word, Tensor position, Tensor segment, "
    "Tensor weight, Tensor mean, Tensor rstd, Tensor row_key, Tensor rng_key, float p, int site, int padding_idx, "
    "Tensor(a!) grad_word) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda *args: _bwd_fake(*args)[1:],
)
differentiate("embedding_layernorm", _setup, _backward)


class _EmbeddingLayerNormAndTable(torch.autograd.Function):
    """embedding_layernorm whose word table is an output too: the gradient of that one is what ours is added to."""

    @staticmethod
    def forward(ctx, *inputs):
        output = call("embedding_layernorm_fwd", *inputs)
        ctx.set_materialize_grads(False)  # a table without a reader has no gradient
        _setup(ctx, inputs, output)
        return output[0], inputs[3].detach()

    @staticmethod
    def backward(ctx, grad_out, grad_word):
        if grad_word is None:
            return _backward(ctx, grad_out)
        if torch.is_grad_enabled() and grad_out is not None:  # create_graph: the operator refuses a second derivative
            grads = list(_backward(ctx, grad_out))
            grads[3] = grads[3] + grad_word
            return tuple(grads)
        grad_word, grads = grad_word.contiguous(), (None,) * 4
        if grad_out is not None:
            grads = call(
                "embedding_layernorm_bwd_add", grad_out.contiguous(), *ctx.saved_tensors, ctx.p, ctx.site,
                ctx.padding_idx, grad_word,
            )  # fmt: skip
        return None, None, None, grad_word, *grads, None, None, None, None, None, None, None


def embedding_layernorm(
    ids: Tensor,
    positions: Tensor,
    segments: Tensor,
    word: Tensor,
    position: Tensor,
    segment: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    p: float = 0.0,
    row_key: Tensor | None = None,
    rng_key: Tensor | None = None,
    site: int = 0,
    padding_idx: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """dropout(LayerNorm(word[ids] + position[positions] + segment[segments])) (T, H) in one pass.

    ids, positions, segments (T,) int64; word (V, H), position (P, H), segment (S, H), weight and bias (H,)
    floating; row_key (T,) and rng_key (1,) int64 name the mask where p > 0. ``out_dtype`` defaults to word's.
    Raises ValueError or TypeError for shapes, devices and dtypes that do not fit, IndexError for indices out
    of range on a CPU; on a GPU the row of an index out of range is NaN.
    """
    name, rows, device = "embedding_layernorm", ids.shape[0], word.device
    check_like(name, device, ids=(ids, (-1,)), positions=(positions, (rows,)), segments=(segments, (rows,)))
    for what, index in (("ids", ids), ("positions", positions), ("segments", segments)):
        require(index.dtype == torch.int64, name, f"{what} has dtype {index.dtype}, expected int64", TypeError)
    check_like(name, device, word=(word, (-1, -1)))
    columns = word.shape[1]
    check_like(name, device, position=(position, (-1, columns)), segment=(segment, (-1, columns)),
                weight=(weight, (columns,)), bias=(bias, (columns,)))  # fmt: skip
    check_floating(name, word=word, position=position, segment=segment, weight=weight, bias=bias)
    row_key, rng_key = dropout_keys(name, p, row_key, rng_key, ids)
    arguments = (
        ids.contiguous(), positions.contiguous(), segments.contiguous(), word.contiguous(), position.contiguous(),
        segment.contiguous(), weight.contiguous(), bias.contiguous(), row_key, rng_key, eps, p, site,
        -1 if padding_idx is None else padding_idx, out_dtype or word.dtype,
    )  # fmt: skip
    embedded = embedded_table()
    if embedded is not None and word.requires_grad:
        out, given_on = _EmbeddingLayerNormAndTable.apply(*arguments)
        embedded[:] = word, given_on
        return out
    return first_output("embedding_layernorm", *arguments)
