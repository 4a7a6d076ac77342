"""What the row operators share: LayerNorm of a tile of rows, sums over rows, launch shapes, checks.

A tile is BLOCK_M whole rows: the hidden size is padded to a power of two inside the program, so that a row is
read once and its statistics are exact two-pass sums in registers. Sums over the rows of a batch (gradients of
parameters) have no atomics: each program keeps its own sum, writes it as one row of an fp32 buffer, and a
second kernel adds the rows in a fixed order, so equal inputs give equal bits.
"""

import functools

import torch
import triton
import triton.language as tl

from bert_fast.kernels.philox import hidden_halves

MAX_COLUMNS = 8192  # a whole row in the registers of one program
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_tensors(operator: str, columns: int | None = None, **tensors: torch.Tensor | None) -> None:
    """Raise TypeError for a dtype and ValueError for a row length that the Triton kernels do not have."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in _DTYPES:
            raise TypeError(
                f"bert_fast.{operator}: {name} has dtype {tensor.dtype}; the triton backend has float16, bfloat16 and "
                f'float32. For float64 use the reference: bert_fast.set_backend({operator}="reference")'
            )
    if columns is not None and not 1 <= columns <= MAX_COLUMNS:
        raise ValueError(
            f"bert_fast.{operator}: rows have {columns} elements; the triton backend has 1 to {MAX_COLUMNS}. For other "
            f'sizes use the reference: bert_fast.set_backend({operator}="reference")'
        )


# Triton has these two as functions of its language, which cost the host of every launch several times as much.
def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def capability(device: torch.device) -> int:
    """The compute capability of a GPU, 10 times the major number plus the minor one; 80 for the interpreter."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def row_tile(columns: int, elements: int = 1024) -> dict:
    """BLOCK_M, BLOCK_N and num_warps of a tile of one row, or of up to 32 that are narrower than 256 elements.

    Up to ``elements`` are one warp's, so sums over a row are exchanged between the lanes of a warp, without shared
    memory and barriers; a wider row has a warp for each ``elements``. A thread holds 8 neighbouring elements (one
    128-bit access in 16-bit dtypes, one Philox call), and up to elements / 256 times that. What a warp holds past the
    row costs nothing where it is a whole 256 elements, as at 768. Reasoned and counted; no GPU has measured it yet.
    """
    block_n = max(8, next_power_of_2(columns))
    block_m = min(32, elements // block_n) if block_n < 256 else 1
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": max(1, block_n // elements)}


def row_programs(device: torch.device, tiles: int, each: int = 4) -> int:
    """How many programs share ``tiles`` tiles where each keeps its own sum over rows: ``each`` a multiprocessor.

    They should all be there at once, with enough loads under way to cover the memory's latency, while the buffer of
    their sums stays a few per cent of the traffic. Reasoned, not measured. It depends on the device alone, so the
    order of the sums, and their bits, do too.
    """
    return min(tiles, each * multiprocessors(device) if device.type == "cuda" else 4)


def tile_programs(device: torch.device, tokens: int, config: dict, elements: int) -> int:
    """``row_programs`` of ``tokens`` rows in tiles of ``row_tile``, with ``elements`` elements of them under way on a
    multiprocessor at a time: as many as its registers hold (dev/occupancy.json has what fits)."""
    each = min(16, max(1, elements // (config["BLOCK_M"] * config["BLOCK_N"])))
    return row_programs(device, cdiv(tokens, config["BLOCK_M"]), each)


@triton.jit
def drop(x, row_key, rng_key, threshold, scale, site, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Hidden dropout of a tile whose columns start at 0: kept elements times ``scale``, the others 0."""
    halves = hidden_halves(rng_key, row_key, 0, site, BLOCK_M, BLOCK_N)
    return tl.where(halves >= threshold, x * scale, 0.0)


@triton.jit
def normalize(z, column_mask, eps, COLUMNS: tl.constexpr):
    """xhat, mean, rstd of each row of z, which is 0 outside ``column_mask``; xhat is 0 there too."""
    mean = tl.sum(z, axis=1) / COLUMNS
    centered = tl.where(column_mask, z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, axis=1) / COLUMNS + eps)
    return centered * rstd[:, None], mean, rstd


@triton.jit
def normalize_bwd(grad_normalized, normalized, rstd, COLUMNS: tl.constexpr):
    """d z = rstd * (g - mean(g) - xhat * mean(g * xhat)); g and xhat are 0 outside the row."""
    mean_g = tl.sum(grad_normalized, axis=1) / COLUMNS
    mean_gx = tl.sum(grad_normalized * normalized, axis=1) / COLUMNS
    return rstd[:, None] * (grad_normalized - mean_g[:, None] - normalized * mean_gx[:, None])


@triton.jit(do_not_specialize=["programs"])
def _sum_partials_kernel(
    partial_ptr,  # (programs, OUTPUTS, columns) fp32
    first_ptr,
    second_ptr,
    third_ptr,
    programs,
    columns,
    OUTPUTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    which = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < columns
    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, programs, BLOCK_P):
        program = start + tl.arange(0, BLOCK_P)
        offset = (program[:, None] * OUTPUTS + which).to(tl.int64) * columns + column[None, :]
        total += tl.load(partial_ptr + offset, mask=(program[:, None] < programs) & inside[None, :], other=0.0)
    total = tl.sum(total, axis=0)
    if which == 0:
        tl.store(first_ptr + column, total, mask=inside)
    elif which == 1:
        tl.store(second_ptr + column, total, mask=inside)
    else:
        tl.store(third_ptr + column, total, mask=inside)


# 32 columns are one 128-byte line of fp32; with a block of 256 rows a thread has 8 loads of 16 bytes under way, and the
# rows of eight programs on each of 132 multiprocessors are five blocks. Not measured.
_SUM_CONFIG = {"BLOCK_P": 256, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}


def sum_partials(partial: torch.Tensor, outputs: list[torch.Tensor]) -> None:
    """Sum ``partial`` (programs, len(outputs), columns) fp32 over programs into the 1 to 3 ``outputs`` (columns,)."""
    programs, count, columns = partial.shape
    first, second, third = (*outputs, *(outputs[:1] * (3 - count)))
    _sum_partials_kernel[(cdiv(columns, _SUM_CONFIG["BLOCK_N"]), count)](
        partial_ptr=partial,
        first_ptr=first,
        second_ptr=second,
        third_ptr=third,
        programs=programs,
        columns=columns,
        OUTPUTS=count,
        **_SUM_CONFIG,
    )
