"""embedding_layernorm: out = dropout(LayerNorm(word[id] + segment[s] + position[p])), one pass.

With M the dropout factor of an element (0 or 1 / keep, from kernels/philox.py, never stored):

    forward   z = word[id] + segment[s] + position[p];  xhat = (z - mean) * rstd;  out = M * (weight * xhat + bias)
    backward  d y = M * d out;  g = weight * d y;  d z = rstd * (g - mean(g) - xhat * mean(g * xhat))
              d weight = sum d y * xhat;  d bias = sum d y;  a table row's gradient = sum of d z of its tokens

Saved: mean and rstd in fp32; z is gathered again. Bytes for T tokens, e-byte tables, o-byte output: forward
T H (3 e + o), the position and segment rows mostly from cache; backward T H (3 e + o + 4) for d z in fp32, three
more reads of it for the three tables, and one write of each table's gradient.

The tables' gradients are one sum by sorted key. The rows of the three tables are numbered through (word,
position, segment); every token has a key in each, and an index out of range or ``padding_idx`` has the key past
the last, which no row reads. Keys are sorted (stable); the sorted list is cut into runs of fixed length.

    pass 1   a program for each run: where the whole run has one key, its sum is written to a buffer. So the hot
             rows ([CLS], [SEP], [MASK], both segments, early positions) are summed by many programs.
    pass 2   a program for each table row: the runs that are wholly its own from that buffer, the rest (less than
             a run at each end) from d z; no token: zero. Every row of every table is written exactly once.

A tied word table has a gradient from its other use, the MLM projection, too. Given that, pass 2 adds to it in place:
rows that no token has are then neither read nor written, and no gradient of the size of the table is made.

The order of every sum follows from the keys alone, so equal inputs give equal bits. Nothing waits for the device.
"""

import math

import torch
import triton
import triton.language as tl

from ..random import dropout_scale, dropout_threshold
from . import rows
from .rows import drop, normalize, normalize_bwd

Tensor = torch.Tensor


def _launch_config(columns: int, direction: str) -> dict:
    """As in residual_layernorm: 1024 elements forward, 2048 backward. Reasoned; no GPU has measured it yet."""
    return {**rows.row_tile(columns, 1024 if direction == "fwd" else 2048), "num_stages": 1}


def _table_config(columns: int) -> dict:
    """Tiles of 4 tokens by up to 1024 columns: most table rows have no token or one, so a wide tile would idle.

    Reasoned; no GPU has measured it yet.
    """
    block_n = min(1024, max(16, rows.next_power_of_2(columns)))
    return {"BLOCK_R": 4, "BLOCK_N": block_n, "num_warps": max(1, block_n // 256), "num_stages": 1}


def _run_length(tokens: int) -> int:
    """A power of two near sqrt(tokens), at least 32: then the hottest row is as long a sum in pass 1 as in pass 2."""
    return max(32, 1 << round(math.log2(max(1, tokens)) / 2))


@triton.jit
def _gather_sum(
    id_ptr,
    position_id_ptr,
    segment_id_ptr,
    word_ptr,
    position_ptr,
    segment_ptr,
    row,
    row_mask,
    column,
    words,
    positions,
    segments,
    COLUMNS: tl.constexpr,
):
    """z (BLOCK_M, BLOCK_N) fp32, 0 past the row's end; the three indices; whether all are in range (NaN z if not)."""
    word_id = tl.load(id_ptr + row, mask=row_mask, other=0)
    position_id = tl.load(position_id_ptr + row, mask=row_mask, other=0)
    segment_id = tl.load(segment_id_ptr + row, mask=row_mask, other=0)
    valid = (word_id >= 0) & (word_id < words)
    valid &= (position_id >= 0) & (position_id < positions)
    valid &= (segment_id >= 0) & (segment_id < segments)
    mask = (row_mask & valid)[:, None] & (column[None, :] < COLUMNS)
    z = tl.load(word_ptr + word_id[:, None] * COLUMNS + column[None, :], mask=mask, other=0.0).to(tl.float32)
    z += tl.load(segment_ptr + segment_id[:, None] * COLUMNS + column[None, :], mask=mask, other=0.0).to(tl.float32)
    z += tl.load(position_ptr + position_id[:, None] * COLUMNS + column[None, :], mask=mask, other=0.0).to(tl.float32)
    return z, word_id, position_id, segment_id, valid


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
    z, _, _, _, valid = _gather_sum(
        id_ptr, position_id_ptr, segment_id_ptr, word_ptr, position_ptr, segment_ptr, row, row_mask, column,
        words, positions, segments, COLUMNS,
    )  # fmt: skip
    normalized, mean, rstd = normalize(z, column_mask, eps, COLUMNS)
    tl.store(mean_ptr + row, mean, mask=row_mask)
    tl.store(rstd_ptr + row, rstd, mask=row_mask)
    weight = tl.load(weight_ptr + column[None, :], mask=column_mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column[None, :], mask=column_mask, other=0.0).to(tl.float32)
    y = normalized * weight + bias
    if HAS_DROPOUT:
        row_key = tl.load(row_key_ptr + row, mask=row_mask, other=0)
        y = drop(y, row_key, rng_key_ptr, threshold, scale, site, BLOCK_M, BLOCK_N)
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
    key_ptr,  # (3, tokens) int32: each token's row in the three tables, numbered through
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
    nowhere = words + positions + segments
    weight = tl.load(weight_ptr + column[None, :], mask=column_mask, other=0.0).to(tl.float32)
    sum_weight = tl.zeros((BLOCK_N,), tl.float32)
    sum_bias = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(tokens, BLOCK_M), tl.num_programs(0)):
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = row < tokens
        z, word_id, position_id, segment_id, valid = _gather_sum(
            id_ptr, position_id_ptr, segment_id_ptr, word_ptr, position_ptr, segment_ptr, row, row_mask, column,
            words, positions, segments, COLUMNS,
        )  # fmt: skip
        word_key = tl.where(valid & (word_id != padding_idx), word_id, nowhere)
        position_key = tl.where(valid, words + position_id, nowhere)
        segment_key = tl.where(valid, words + positions + segment_id, nowhere)
        tl.store(key_ptr + row, word_key, mask=row_mask)
        tl.store(key_ptr + tokens.to(tl.int64) + row, position_key, mask=row_mask)
        tl.store(key_ptr + 2 * tokens.to(tl.int64) + row, segment_key, mask=row_mask)

        mask = (row_mask & valid)[:, None] & column_mask
        offset = row[:, None].to(tl.int64) * COLUMNS + column[None, :]
        grad_y = tl.load(grad_out_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if HAS_DROPOUT:
            row_key = tl.load(row_key_ptr + row, mask=row_mask, other=0)
            grad_y = drop(grad_y, row_key, rng_key_ptr, threshold, scale, site, BLOCK_M, BLOCK_N)
        mean = tl.load(mean_ptr + row, mask=row_mask, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row_mask, other=0.0)
        normalized = tl.where(mask, (z - mean[:, None]) * rstd[:, None], 0.0)
        grad_z = normalize_bwd(grad_y * weight, normalized, rstd, COLUMNS)
        tl.store(grad_z_ptr + offset, grad_z, mask=mask)
        sum_weight += tl.sum(grad_y * normalized, axis=0)
        sum_bias += tl.sum(grad_y, axis=0)

    partial_ptr += tl.program_id(0).to(tl.int64) * 2 * COLUMNS
    inside = column < COLUMNS
    tl.store(partial_ptr + column, sum_weight, mask=inside)
    tl.store(partial_ptr + COLUMNS + column, sum_bias, mask=inside)


@triton.jit
def _add_tokens(total, grad_z_ptr, order_ptr, start, end, tokens, column, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr):
    """``total`` (BLOCK_R, BLOCK_N) plus the rows of d z at sorted places start .. end-1."""
    for place in range(start, end, BLOCK_R):
        places = place + tl.arange(0, BLOCK_R)
        inside = places < end
        token = tl.load(order_ptr + places, mask=inside, other=0).to(tl.int32) % tokens
        offset = token[:, None].to(tl.int64) * COLUMNS + column[None, :]
        total += tl.load(grad_z_ptr + offset, mask=inside[:, None] & (column[None, :] < COLUMNS), other=0.0)
    return total


@triton.jit(do_not_specialize=["tokens", "table_rows", "run"])
def _run_sum_kernel(
    grad_z_ptr,
    key_ptr,  # (3 * tokens,) int32, sorted
    order_ptr,  # (3 * tokens,) int64: where in the unsorted (3, tokens) keys
    run_sum_ptr,  # (runs, COLUMNS) fp32
    tokens,
    table_rows,
    run,
    COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    start = tl.program_id(0) * run
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.load(key_ptr + start)
    if (first == tl.load(key_ptr + start + run - 1)) & (first < table_rows):
        total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        total = _add_tokens(total, grad_z_ptr, order_ptr, start, start + run, tokens, column, COLUMNS, BLOCK_R)
        offset = tl.program_id(0).to(tl.int64) * COLUMNS + column
        tl.store(run_sum_ptr + offset, tl.sum(total, axis=0), mask=column < COLUMNS)


@triton.jit(do_not_specialize=["tokens", "words", "positions", "run"])
def _table_grad_kernel(
    grad_z_ptr,
    order_ptr,
    start_ptr,  # (table rows + 1,) int32: where each row's tokens start in the sorted keys
    run_sum_ptr,
    grad_word_ptr,
    grad_position_ptr,
    grad_segment_ptr,
    tokens,
    words,
    positions,
    run,
    COLUMNS: tl.constexpr,
    ADD_TO_WORD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    table_row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < COLUMNS
    start = tl.load(start_ptr + table_row)
    end = tl.load(start_ptr + table_row + 1)
    first_run, last_run = tl.cdiv(start, run), end // run  # the runs that are wholly this row's, if first < last
    head_end = tl.minimum(first_run * run, end)
    tail_start = tl.maximum(last_run * run, head_end)
    total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    total = _add_tokens(total, grad_z_ptr, order_ptr, start, head_end, tokens, column, COLUMNS, BLOCK_R)
    for first in range(first_run, last_run, BLOCK_R):
        runs = first + tl.arange(0, BLOCK_R)
        offset = runs[:, None].to(tl.int64) * COLUMNS + column[None, :]
        total += tl.load(run_sum_ptr + offset, mask=(runs[:, None] < last_run) & inside[None, :], other=0.0)
    total = _add_tokens(total, grad_z_ptr, order_ptr, tail_start, end, tokens, column, COLUMNS, BLOCK_R)
    total = tl.sum(total, axis=0)
    if table_row < words:
        grad_ptr = grad_word_ptr + table_row.to(tl.int64) * COLUMNS + column
        if ADD_TO_WORD:  # rounded before, as a gradient of its own would be
            inside &= start < end
            held = tl.load(grad_ptr, mask=inside, other=0.0).to(tl.float32)
            total = held + total.to(grad_word_ptr.dtype.element_ty).to(tl.float32)
        tl.store(grad_ptr, total, mask=inside)
    elif table_row < words + positions:
        tl.store(grad_position_ptr + (table_row - words).to(tl.int64) * COLUMNS + column, total, mask=inside)
    else:
        row = table_row - words - positions
        tl.store(grad_segment_ptr + row.to(tl.int64) * COLUMNS + column, total, mask=inside)


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
        config = _launch_config(columns, "fwd")
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See bert_fast/reference.py. A token with an index out of range adds to no gradient. TypeError for float64."""
    tokens, columns = grad_out.shape
    rows.check_tensors(
        "embedding_layernorm", columns, grad_out=grad_out, word=word, position=position, segment=segment, weight=weight,
        grad_word=grad_word,
    )  # fmt: skip
    device = word.device
    grad_z = torch.empty((tokens, columns), dtype=torch.float32, device=device)
    key = torch.empty((3, tokens), dtype=torch.int32, device=device)
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(weight)
    config = _launch_config(columns, "bwd")
    programs = rows.row_programs(device, rows.cdiv(tokens, config["BLOCK_M"]))
    partial = torch.empty((programs, 2, columns), dtype=torch.float32, device=device)
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
            key_ptr=key,
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
    rows.sum_partials(partial, [grad_weight, grad_bias])
    return *_table_grads(grad_z, key, word, position, segment, grad_word), grad_weight, grad_bias


def embedding_layernorm_bwd_add(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See bert_fast/reference.py."""
    return embedding_layernorm_bwd(*arguments)[1:]


def _table_grads(
    grad_z: Tensor, key: Tensor, word: Tensor, position: Tensor, segment: Tensor, grad_word: Tensor | None
) -> list[Tensor]:
    """Sum ``grad_z`` (T, H) into gradients of the three tables by ``key`` (3, T): see the two passes above."""
    tokens, columns = grad_z.shape
    add_to_word = grad_word is not None
    if not add_to_word:
        grad_word = torch.empty_like(word)
    grads = [grad_word, torch.empty_like(position), torch.empty_like(segment)]
    table_rows = sum(table.shape[0] for table in grads)
    key, order = torch.sort(key.view(-1), stable=True)
    numbers = torch.arange(table_rows + 1, dtype=torch.int32, device=key.device)
    starts = torch.searchsorted(key, numbers, out_int32=True)
    run = _run_length(tokens)
    runs = 3 * tokens // run
    run_sum = torch.empty((runs, columns), dtype=torch.float32, device=key.device)
    config = _table_config(columns)
    column_blocks = rows.cdiv(columns, config["BLOCK_N"])
    if runs:
        _run_sum_kernel[(runs, column_blocks)](
            grad_z_ptr=grad_z,
            key_ptr=key,
            order_ptr=order,
            run_sum_ptr=run_sum,
            tokens=tokens,
            table_rows=table_rows,
            run=run,
            COLUMNS=columns,
            **config,
        )
    if table_rows:
        _table_grad_kernel[(table_rows, column_blocks)](
            grad_z_ptr=grad_z,
            order_ptr=order,
            start_ptr=starts,
            run_sum_ptr=run_sum,
            grad_word_ptr=grads[0],
            grad_position_ptr=grads[1],
            grad_segment_ptr=grads[2],
            tokens=tokens,
            words=word.shape[0],
            positions=position.shape[0],
            run=run,
            COLUMNS=columns,
            ADD_TO_WORD=add_to_word,
            **config,
        )
    return grads


def aot_cases(capability: int) -> list[dict]:
    """The kernels' default configurations at BERT-base and -large, for ahead-of-time compilation.

    The output is bf16, tables and parameters fp32 (autocast). ``capability`` is 80, 90 or 100: one configuration
    serves all.
    """
    gather = dict.fromkeys(("id_ptr", "position_id_ptr", "segment_id_ptr", "row_key_ptr", "rng_key_ptr"), "*i64")
    tables = ("word_ptr", "position_ptr", "segment_ptr", "weight_ptr", "mean_ptr", "rstd_ptr")
    gather |= dict.fromkeys(tables, "*fp32")
    forward = gather | {"bias_ptr": "*fp32", "out_ptr": "*bf16"}
    backward = gather | {"grad_out_ptr": "*bf16", "grad_z_ptr": "*fp32", "key_ptr": "*i32", "partial_ptr": "*fp32"}
    sums = {"grad_z_ptr": "*fp32", "order_ptr": "*i64", "run_sum_ptr": "*fp32"}
    table = sums | {"start_ptr": "*i32"}
    grads = ("grad_word_ptr", "grad_position_ptr", "grad_segment_ptr")
    table, in_bf16 = table | dict.fromkeys(grads, "*fp32"), dict.fromkeys(grads, "*bf16")
    sizes = dict.fromkeys(("tokens", "words", "positions", "segments"), "i32")
    dropout = {"threshold": "i32", "scale": "fp32", "site": "i32"}
    cases = []
    for columns in (768, 1024):
        for p in (0.0, 0.1):
            at = f"H={columns} p={p}"
            constants = {"COLUMNS": columns, "HAS_DROPOUT": p > 0.0}
            for kernel, direction, pointers, more in (
                (_embedding_layernorm_fwd_kernel, "fwd", forward, {"eps": "fp32"}),
                (_embedding_layernorm_bwd_kernel, "bwd", backward, {"padding_idx": "i32"}),
            ):
                scalars = {**sizes, **dropout, **more}
                config = _launch_config(columns, direction)
                name = f"embedding_layernorm {direction} {at}"
                cases.append(rows.aot_case(kernel, name, pointers, scalars, constants, config))
        runs, of_rows = ("tokens", "table_rows", "run"), ("tokens", "words", "positions", "run")
        for kernel, name, pointers, scalars, constants in (
            (_run_sum_kernel, "run sums", sums | {"key_ptr": "*i32"}, runs, {}),
            (_table_grad_kernel, "table gradients", table, of_rows, {"ADD_TO_WORD": False}),
            (_table_grad_kernel, "table gradients added", table, of_rows, {"ADD_TO_WORD": True}),
            (_table_grad_kernel, "table gradients added bf16", table | in_bf16, of_rows, {"ADD_TO_WORD": True}),
        ):
            name = f"embedding_layernorm {name} H={columns}"
            config = _table_config(columns)
            types, constants = dict.fromkeys(scalars, "i32"), {"COLUMNS": columns} | constants
            cases.append(rows.aot_case(kernel, name, pointers, types, constants, config))
    return [*cases, rows.sum_partials_case("embedding_layernorm", 2, "*fp32")]
