"""embedding_layernorm: out = dropout(LayerNorm(word[id] + segment[s] + position[p])), one pass.

With M the dropout factor of an element (0 or 1 / keep, from kernels/philox.py, never stored):

    forward   z = word[id] + segment[s] + position[p];  xhat = (z - mean) * rstd;  out = M * (weight * xhat + bias)
    backward  d y = M * d out;  g = weight * d y;  d z = rstd * (g - mean(g) - xhat * mean(g * xhat))
              d weight = sum d y * xhat;  d bias = sum d y;  a table row's gradient = sum of d z of its tokens

Saved: mean and rstd in fp32; z is gathered again. The backward writes d z in fp32 and, for each table, the row that a
token adds to; then kernels/sum_rows.py sums d z for each of the three. Bytes for T tokens, e-byte tables, o-byte
output: forward T H (e + o), the position and segment rows from cache; backward T H (e + o + 4), three times 4 T H, and
each table's gradient. It runs once in a step: sums without a stored d z move a third of that, in twice the lines.

A tied word table has a gradient from its other use, the MLM projection, too. Given that, the sums are added to it in
place: rows that no token has are then neither read nor written, and no gradient of the size of the table is made.

The order of every sum follows from the indices alone, so equal inputs give equal bits. Nothing waits for the device.
"""

import torch
import triton
import triton.language as tl

from bert_fast import choice
from bert_fast.dropout_mask import dropout_scale, dropout_threshold
from bert_fast.kernels import rows
from bert_fast.kernels.rows import drop, normalize, normalize_bwd
from bert_fast.kernels.sum_rows import launch_config, sum_rows

Tensor = torch.Tensor


_ELEMENTS = 4096  # that the backward has under way on a multiprocessor at a time


def _launch_config(columns: int, direction: str) -> dict:
    """A warp a row of 1024 elements; two backward, which keeps sums in registers. No GPU has measured it yet."""
    return {**rows.row_tile(columns, 1024 if direction == "fwd" else 512), "num_stages": 1}


@triton.jit
def _indices(id_ptr, position_id_ptr, segment_id_ptr, token, inside, words, positions, segments):
    """Of tokens: word, position and segment, and whether all three are in range."""
    word_id = tl.load(id_ptr + token, mask=inside, other=0)
    position_id = tl.load(position_id_ptr + token, mask=inside, other=0)
    segment_id = tl.load(segment_id_ptr + token, mask=inside, other=0)
    valid = (word_id >= 0) & (word_id < words)
    valid &= (position_id >= 0) & (position_id < positions)
    valid &= (segment_id >= 0) & (segment_id < segments)
    return word_id, position_id, segment_id, valid


@triton.jit
def _gather(table_ptr, row, column, mask, COLUMNS: tl.constexpr):
    """Rows of a table, in fp32."""
    return tl.load(table_ptr + row[:, None] * COLUMNS + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "words", "positions", "segments", "threshold", "site"])
def _embedding_layernorm_fwd_kernel(
    id_ptr,
    position_id_ptr,
    segment_id_ptr,
    word_ptr,
    position_ptr,
    segment_ptr,
    weight_ptr,
    bias_ptr,
    row_key_ptr,
    rng_key_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    tokens,
    words,
    positions,
    segments,
    eps,
    threshold,
    scale,
    site,
    COLUMNS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    row_mask, column_mask = row < tokens, column[None, :] < COLUMNS
    word_id, position_id, segment_id, valid = _indices(
        id_ptr, position_id_ptr, segment_id_ptr, row, row_mask, words, positions, segments
    )
    mask = (row_mask & valid)[:, None] & column_mask
    z = _gather(word_ptr, word_id, column, mask, COLUMNS)
    z += _gather(segment_ptr, segment_id, column, mask, COLUMNS)
    z += _gather(position_ptr, position_id, column, mask, COLUMNS)
    normalized, mean, rstd = normalize(z, column_mask, eps, COLUMNS)
    tl.store(mean_ptr + row, mean, mask=row_mask)
    tl.store(rstd_ptr + row, rstd, mask=row_mask)
    weight = tl.load(weight_ptr + column[None, :], mask=column_mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column[None, :], mask=column_mask, other=0.0).to(tl.float32)
    y = normalized * weight + bias
    if HAS_DROPOUT:
        row_key = tl.load(row_key_ptr + row, mask=row_mask, other=0)
        y = drop(y, row_key, tl.load(rng_key_ptr), threshold, scale, site, BLOCK_M, BLOCK_N)
    y = tl.where(valid[:, None], y, float("nan"))  # after dropout, so that no element of such a row looks right
    offset = row[:, None].to(tl.int64) * COLUMNS + column[None, :]
    tl.store(out_ptr + offset, y, mask=row_mask[:, None] & column_mask)


@triton.jit(do_not_specialize=["tokens", "words", "positions", "segments", "padding_idx", "threshold", "site"])
def _embedding_layernorm_bwd_kernel(
    grad_out_ptr,
    id_ptr,
    position_id_ptr,
    segment_id_ptr,
    word_ptr,
    position_ptr,
    segment_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    row_key_ptr,
    rng_key_ptr,
    grad_z_ptr,  # (tokens, COLUMNS) fp32
    index_ptr,  # (3, tokens) int32: the row of each table that a token adds to; how many there are where to none
    partial_ptr,  # (programs, 2, COLUMNS) fp32: sums of d weight, d bias
    tokens,
    words,
    positions,
    segments,
    padding_idx,
    threshold,
    scale,
    site,
    COLUMNS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    column = tl.arange(0, BLOCK_N)
    column_mask = column[None, :] < COLUMNS
    weight = tl.load(weight_ptr + column[None, :], mask=column_mask, other=0.0).to(tl.float32)
    sum_weight = tl.zeros((BLOCK_N,), tl.float32)
    sum_bias = tl.zeros((BLOCK_N,), tl.float32)
    rng_key = 0
    if HAS_DROPOUT:
        rng_key = tl.load(rng_key_ptr)
    for tile in range(tl.program_id(0), tl.cdiv(tokens, BLOCK_M), tl.num_programs(0)):
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = row < tokens
        word_id, position_id, segment_id, valid = _indices(
            id_ptr, position_id_ptr, segment_id_ptr, row, row_mask, words, positions, segments
        )
        tl.store(index_ptr + row, tl.where(valid & (word_id != padding_idx), word_id, words), mask=row_mask)
        tl.store(index_ptr + tokens + row, tl.where(valid, position_id, positions), mask=row_mask)
        tl.store(index_ptr + 2 * tokens + row, tl.where(valid, segment_id, segments), mask=row_mask)

        valid &= row_mask
        mask = valid[:, None] & column_mask
        offset = row[:, None].to(tl.int64) * COLUMNS + column[None, :]
        grad_y = tl.load(grad_out_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        z = _gather(word_ptr, word_id, column, mask, COLUMNS)
        z += _gather(segment_ptr, segment_id, column, mask, COLUMNS)
        z += _gather(position_ptr, position_id, column, mask, COLUMNS)
        mean = tl.load(mean_ptr + row, mask=valid, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=valid, other=0.0)
        if HAS_DROPOUT:
            row_key = tl.load(row_key_ptr + row, mask=row_mask, other=0)
            grad_y = drop(grad_y, row_key, rng_key, threshold, scale, site, BLOCK_M, BLOCK_N)
        normalized = tl.where(mask, (z - mean[:, None]) * rstd[:, None], 0.0)
        grad_z = normalize_bwd(grad_y * weight, normalized, rstd, COLUMNS)
        tl.store(grad_z_ptr + offset, grad_z, mask=mask)
        sum_weight += tl.sum(grad_y * normalized, axis=0)
        sum_bias += tl.sum(grad_y, axis=0)

    partial_ptr += tl.program_id(0).to(tl.int64) * 2 * COLUMNS
    inside = column < COLUMNS
    tl.store(partial_ptr + column, sum_weight, mask=inside)
    tl.store(partial_ptr + COLUMNS + column, sum_bias, mask=inside)


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
    """See bert_fast/reference.py. The row of an index out of range is NaN. TypeError for float64."""
    tokens, columns = ids.shape[0], word.shape[1]
    out = torch.empty((tokens, columns), dtype=out_dtype, device=word.device)
    rows.check_tensors(
        "embedding_layernorm", columns, word=word, position=position, segment=segment, weight=weight, bias=bias, out=out
    )
    mean = torch.empty(tokens, dtype=torch.float32, device=word.device)
    rstd = torch.empty_like(mean)
    if tokens:
        config = choice.of("embedding_layernorm.fwd", _launch_config(columns, "fwd"))
        _embedding_layernorm_fwd_kernel[(rows.cdiv(tokens, config["BLOCK_M"]),)](
            id_ptr=ids,
            position_id_ptr=positions,
            segment_id_ptr=segments,
            word_ptr=word,
            position_ptr=position,
            segment_ptr=segment,
            weight_ptr=weight,
            bias_ptr=bias,
            row_key_ptr=row_key,
            rng_key_ptr=rng_key,
            out_ptr=out,
            mean_ptr=mean,
            rstd_ptr=rstd,
            tokens=tokens,
            words=word.shape[0],
            positions=position.shape[0],
            segments=segment.shape[0],
            eps=eps,
            threshold=dropout_threshold(p),
            scale=dropout_scale(p),
            site=site,
            COLUMNS=columns,
            HAS_DROPOUT=p > 0.0,
            **config,
        )
    return out, mean, rstd


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
) -> tuple[Tensor, ...]:
    """See bert_fast/reference.py. A token with an index out of range adds to no gradient. TypeError for float64."""
    tokens, columns = grad_out.shape
    rows.check_tensors(
        "embedding_layernorm", columns, grad_out=grad_out, word=word, position=position, segment=segment, weight=weight,
        grad_word=grad_word,
    )  # fmt: skip
    tables = (word, position, segment)
    grad_z = torch.empty((tokens, columns), dtype=torch.float32, device=word.device)
    index = torch.empty((3, tokens), dtype=torch.int32, device=word.device)
    config = choice.of("embedding_layernorm.bwd", _launch_config(columns, "bwd"))
    programs = rows.tile_programs(word.device, tokens, config, _ELEMENTS)
    partial = torch.empty((programs, 2, columns), dtype=torch.float32, device=word.device)
    if tokens:
        _embedding_layernorm_bwd_kernel[(programs,)](
            grad_out_ptr=grad_out,
            id_ptr=ids,
            position_id_ptr=positions,
            segment_id_ptr=segments,
            word_ptr=word,
            position_ptr=position,
            segment_ptr=segment,
            weight_ptr=weight,
            mean_ptr=mean,
            rstd_ptr=rstd,
            row_key_ptr=row_key,
            rng_key_ptr=rng_key,
            grad_z_ptr=grad_z,
            index_ptr=index,
            partial_ptr=partial,
            tokens=tokens,
            words=word.shape[0],
            positions=position.shape[0],
            segments=segment.shape[0],
            padding_idx=padding_idx,
            threshold=dropout_threshold(p),
            scale=dropout_scale(p),
            site=site,
            COLUMNS=columns,
            HAS_DROPOUT=p > 0.0,
            **config,
        )
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(weight)
    rows.sum_partials(partial, [grad_weight, grad_bias])
    grads = [torch.empty_like(word) if grad_word is None else grad_word, *map(torch.empty_like, tables[1:])]
    config = choice.of("embedding_layernorm.sum", launch_config(columns))
    for which, grad in enumerate(grads):
        sum_rows(grad_z, index[which], grad, config, add=grad is grad_word)
    return *grads, grad_weight, grad_bias


def embedding_layernorm_bwd_add(*arguments) -> tuple[Tensor, ...]:
    """See bert_fast/reference.py."""
    return embedding_layernorm_bwd(*arguments)[1:]
