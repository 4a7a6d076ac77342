"""sum_rows: rows summed by an index, out[r] = sum of x[t] over the t with index[t] = r.

    list      The t sorted (stable) by index: a row of ``out`` is a stretch of the list. Where each stretch starts is
              found by a search, so nothing waits for the device.
    runs      The list is cut into runs of a fixed length, one a program. A stretch inside one run is summed and written
              there. A longer one, as of a frequent token, has a piece in each of its runs: a row of a buffer. A run has
              up to two, of the stretch that comes from the run before (0) and of the one that goes on from here (1).
    pieces    A second kernel adds the pieces of a row, and writes zeros to rows that no t has.

Every row of ``out`` is written once, and the order of every sum follows from the index alone, so equal inputs give
equal bits. Bytes for (T, H) and R rows: 4 T H read, R H e written; pieces stay in the L2 cache.
"""

import torch
import triton
import triton.language as tl

from bert_fast.kernels import rows

Tensor = torch.Tensor

# Tiles of 32 pieces by 128 columns, 32 elements a thread. Reasoned; no GPU has measured it yet.
_PIECE_CONFIG = {"ROWS": 8, "BLOCK_R": 32, "BLOCK_N": 128, "num_warps": 4, "num_stages": 1}


def launch_config(columns: int) -> dict:
    """A run of 32 rows, longer than most stretches are, and 1024 columns, 8 a thread: so 32768 rows of BERT-large are a
    thousand programs, each with two rows under way. Reasoned; no GPU has measured it yet."""
    block_n = min(1024, max(8, rows.next_power_of_2(columns)))
    return {"RUN": 32, "BLOCK_N": block_n, "num_warps": max(1, block_n // 256), "num_stages": 1}


@triton.jit
def _write_row(out_ptr, row, total, column, inside, COLUMNS: tl.constexpr, ADD: tl.constexpr):
    """Write a row of ``out``, or add to it: rounded before, as a tensor of its own would be."""
    out_ptr += row.to(tl.int64) * COLUMNS + column
    total = total.to(out_ptr.dtype.element_ty)
    if ADD:
        total = tl.load(out_ptr, mask=inside, other=0.0).to(tl.float32) + total.to(tl.float32)
    tl.store(out_ptr, total, mask=inside)


@triton.jit(do_not_specialize=["count"])
def _sum_runs_kernel(
    x_ptr,  # (T, COLUMNS) fp32
    index_ptr,  # (T,) int32, sorted
    order_ptr,  # (T,) int64: the row of x
    start_ptr,  # (count + 1,) int32: where each row's stretch starts; the last one has no row
    out_ptr,  # (count, COLUMNS)
    piece_ptr,  # (runs, 2, COLUMNS) fp32
    count,
    COLUMNS: tl.constexpr,
    ADD: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    run = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < COLUMNS
    last = tl.load(start_ptr + count)
    start, end = run * RUN, tl.minimum(run * RUN + RUN, last)
    if start < end:
        before = tl.load(index_ptr + start - 1, mask=start > 0, other=-1)
        row = tl.load(index_ptr + start)
        total = tl.zeros((BLOCK_N,), tl.float32)
        following_x = tl.load(x_ptr + tl.load(order_ptr + start) * COLUMNS + column, mask=inside, other=0.0)
        for at in range(start, end):
            total += following_x
            # The next entry; past the run, where only its row counts, the last one again.
            entry = tl.load(order_ptr + tl.minimum(at + 1, end - 1))
            following_x = tl.load(x_ptr + entry * COLUMNS + column, mask=inside, other=0.0)
            following = tl.load(index_ptr + at + 1, mask=at + 1 < last, other=-1)
            if (following != row) | (at + 1 == end):
                if (row == before) | (row == following):
                    piece = 2 * run + (row != before).to(tl.int32)
                    tl.store(piece_ptr + piece.to(tl.int64) * COLUMNS + column, total, mask=inside)
                else:
                    _write_row(out_ptr, row, total, column, inside, COLUMNS, ADD)
                total = tl.zeros((BLOCK_N,), tl.float32)
            row = following


@triton.jit(do_not_specialize=["count"])
def _sum_pieces_kernel(
    piece_ptr,
    start_ptr,
    out_ptr,
    count,
    COLUMNS: tl.constexpr,
    ADD: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < COLUMNS
    for of_program in range(ROWS):
        row = tl.program_id(0) * ROWS + of_program
        start = tl.load(start_ptr + tl.minimum(row, count))
        end = tl.load(start_ptr + tl.minimum(row + 1, count))
        first_run, last_run = start // RUN, (end - 1) // RUN
        if start == end:
            if not ADD and row < count:
                _write_row(out_ptr, row, tl.zeros((BLOCK_N,), tl.float32), column, inside, COLUMNS, ADD)
        elif first_run < last_run:
            total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
            for block in range(first_run, last_run + 1, BLOCK_R):
                run = block + tl.arange(0, BLOCK_R)
                piece = 2 * run + (run == first_run).to(tl.int32)
                offset = piece[:, None].to(tl.int64) * COLUMNS + column[None, :]
                total += tl.load(piece_ptr + offset, mask=(run <= last_run)[:, None] & inside[None, :], other=0.0)
            _write_row(out_ptr, row, tl.sum(total, axis=0), column, inside, COLUMNS, ADD)


def sum_rows(x: Tensor, index: Tensor, out: Tensor, config: dict, *, add: bool = False) -> None:
    """Writes the sums of x's rows to ``out``, or adds them to it in place.

    x (T, H) float32; index (T,) int32, 0 .. R; out (R, H) floating. A row with the index R goes nowhere. Sums are in
    float32; with ``add`` they are rounded to out's dtype first, so that the bits are those of two tensors added.
    """
    (tokens, columns), count, device = x.shape, out.shape[0], x.device
    index, order = torch.sort(index, stable=True)
    start = torch.searchsorted(index, torch.arange(count + 1, dtype=torch.int32, device=device), out_int32=True)
    runs = rows.cdiv(tokens, config["RUN"])
    piece = torch.empty((runs, 2, columns), dtype=torch.float32, device=device)
    tensors = {"start_ptr": start, "out_ptr": out, "piece_ptr": piece, "count": count, "COLUMNS": columns, "ADD": add}
    if runs:
        grid = (runs, rows.cdiv(columns, config["BLOCK_N"]))
        _sum_runs_kernel[grid](x_ptr=x, index_ptr=index, order_ptr=order, **tensors, **config)
    if count:
        grid = (rows.cdiv(count, _PIECE_CONFIG["ROWS"]), rows.cdiv(columns, _PIECE_CONFIG["BLOCK_N"]))
        _sum_pieces_kernel[grid](**tensors, RUN=config["RUN"], **_PIECE_CONFIG)
