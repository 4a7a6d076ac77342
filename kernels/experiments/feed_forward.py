"""feed_forward: out = GELU(x W_in^T + b) W_out^T, bias and GELU in the epilogue of the product beside them.

With z = x W_in^T, u = z + b and GELU as in bias_gelu.py:

    forward   z rounded and stored, a = GELU(u) from z as it is stored;    out = a W_out^T
    backward  d z = (d out W_out) * GELU'(u);  d b = sum over rows of d z;  d x, d W_in, d W_out from d z, x, d out, a

Each line's first product is a kernel here, its tiles finished where they lie in registers; the other products are the
library's. Saved: x, z, a, as for a product, bias_gelu and a product, whose numbers these are to rounding: the same z,
and a d a that is not rounded to 16 bits before the derivative is multiplied to it.

Both kernels for (T, H) x (H, F) in an e-byte dtype: 2 T H F FLOPs and (T H + H F + 2 T F) e bytes. A product and
bias_gelu move T F e bytes more forward, 2 T F e more backward. GELU's instructions (bias_gelu.py counts them) stay, at
BERT-large half as long as the product and more: they are free only while another program of the multiprocessor
multiplies, so a tile is small enough for two programs to share one.

A program takes tile after tile, 8 rows of tiles at a time, so that what programs read meanwhile fits the L2 cache.
(FLATTEN fetches a tile's first operands while the last tile is finished, for registers and shared memory; two programs
do that for each other.) Operands come and results go through tensor descriptors, by the tensor memory accelerator:
rows of a multiple of 16 bytes, no bounds to check. The epilogue runs over a quarter of the columns at a time, since
registers and shared memory hold no more. Sums for d b are one row a tile, added by a second kernel in a fixed order.
For compute capability 9.0 and 10.0 (without a tensor memory accelerator the descriptors' offsets alone spill).

Nothing here is used until FEED_FORWARD_EPILOGUE in bert_fast/dispatch.py says where: no GPU has measured it.

Sources: NVIDIA, CUTLASS documentation, "Efficient GEMM in CUDA" (persistent programs, order of tiles, epilogues).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from bert_fast import choice
from bert_fast.kernels import rows
from bert_fast.kernels.bias_gelu import bias_gelu_bwd, bias_gelu_fwd, gelu, gelu_slope
from bert_fast.reference import feed_forward_gradients

Tensor = torch.Tensor

CAPABILITIES = (90, 100)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _launch_config(dtype: torch.dtype, direction: str) -> dict:
    """Tiles of 128 x 128 and 4 warps, of which two programs share a multiprocessor by registers and by shared memory,
    on 9.0 and 10.0, in both directions ("fwd", "bwd"). Found by compiling ahead of time; no GPU has measured it yet.
    Exact products (float32) are on the ordinary units, where registers are the limit."""
    if dtype == torch.float32:
        config = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
    else:
        config = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    return config | {"ROW_TILES": 8, "FLATTEN": False, "PROGRAMS": 2}


@triton.jit
def _origin(
    tile, row_tiles, COLUMN_TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROW_TILES: tl.constexpr
):
    """The first row and column of ``tile``: down ROW_TILES rows of tiles, then the next column of them."""
    first = tile // (ROW_TILES * COLUMN_TILES) * ROW_TILES
    high = tl.minimum(row_tiles - first, ROW_TILES)
    place = tile % (ROW_TILES * COLUMN_TILES)
    return (first + place % high) * BLOCK_M, place // high * BLOCK_N


@triton.jit
def _halves(x):
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _quarters(x):
    """The columns of x in four parts, from left to right."""
    left, right = _halves(x)
    first, second = _halves(left)
    third, fourth = _halves(right)
    return first, second, third, fourth


@triton.jit
def _plus_bias(z, bias_ptr, column, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr):
    u = z.to(tl.float32)
    if HAS_BIAS:
        u += tl.load(bias_ptr + column, mask=column < COLUMNS, other=0.0).to(tl.float32)[None, :]
    return u


@triton.jit(do_not_specialize=["tokens"])
def _feed_forward_fwd_kernel(
    x_desc,  # (tokens, HIDDEN)
    weight_desc,  # (COLUMNS, HIDDEN)
    z_desc,  # (tokens, COLUMNS)
    out_desc,  # (tokens, COLUMNS)
    bias_ptr,
    tokens,
    HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROW_TILES: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    row_tiles = tl.cdiv(tokens, BLOCK_M)
    column_tiles: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    part: tl.constexpr = BLOCK_N // 4
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=FLATTEN):
        row, column = _origin(tile, row_tiles, column_tiles, BLOCK_M, BLOCK_N, ROW_TILES)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, HIDDEN, BLOCK_K):
            x = x_desc.load([row, k])
            weight = weight_desc.load([column, k])
            total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
        quarters = _quarters(total)
        for i in tl.static_range(4):
            z = quarters[i].to(z_desc.dtype)
            z_desc.store([row, column + i * part], z)
            u = _plus_bias(z, bias_ptr, column + i * part + tl.arange(0, part), COLUMNS, HAS_BIAS)
            out_desc.store([row, column + i * part], gelu(u, out_desc.dtype == tl.float32).to(out_desc.dtype))


@triton.jit(do_not_specialize=["tokens"])
def _feed_forward_bwd_kernel(
    grad_out_desc,  # (tokens, HIDDEN)
    weight_desc,  # (HIDDEN, COLUMNS)
    z_desc,  # (tokens, COLUMNS)
    grad_z_desc,  # (tokens, COLUMNS)
    bias_ptr,
    partial_ptr,  # (row tiles, COLUMNS) fp32: sums of d bias
    tokens,
    HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROW_TILES: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    row_tiles = tl.cdiv(tokens, BLOCK_M)
    column_tiles: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    part: tl.constexpr = BLOCK_N // 4
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=FLATTEN):
        row, column = _origin(tile, row_tiles, column_tiles, BLOCK_M, BLOCK_N, ROW_TILES)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, HIDDEN, BLOCK_K):
            grad_out = grad_out_desc.load([row, k])
            weight = weight_desc.load([k, column])
            total = tl.dot(grad_out, weight, total, input_precision="ieee")
        quarters = _quarters(total)
        for i in tl.static_range(4):
            columns = column + i * part + tl.arange(0, part)
            u = _plus_bias(z_desc.load([row, column + i * part]), bias_ptr, columns, COLUMNS, HAS_BIAS)
            grad_z = quarters[i] * gelu_slope(u, grad_z_desc.dtype == tl.float32)
            grad_z_desc.store([row, column + i * part], grad_z.to(grad_z_desc.dtype))
            if HAS_BIAS:  # rows past the end are zeros
                sums_ptr = partial_ptr + tl.cast(row // BLOCK_M, tl.int64) * COLUMNS
                tl.store(sums_ptr + columns, tl.sum(grad_z, axis=0), mask=columns < COLUMNS)


def _programs(device: torch.device, tiles: int, programs: int) -> int:
    """How many programs share the tiles, ``programs`` of them a multiprocessor; the interpreter has two of those."""
    count = rows.multiprocessors(device) if device.type == "cuda" else 2
    return min(tiles, programs * count)


def takes(columns: int, *matrices: Tensor) -> bool:
    """Whether the kernels have these operands and a result of ``columns``: one dtype of 16 or 32 bits, nothing empty,
    all rows at multiples of 16 bytes. What the device is, is not asked here."""
    dtype = matrices[0].dtype
    return dtype in _DTYPES and all(
        x.dtype == dtype
        and x.numel() > 0
        and x.is_contiguous()
        and (x.data_ptr() | x.shape[1] * x.itemsize | columns * x.itemsize) % 16 == 0
        for x in matrices
    )


def _require(columns: int, *matrices: Tensor) -> None:
    if not takes(columns, *matrices):
        found = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in matrices)
        raise ValueError(
            "bert_fast.feed_forward: the kernels have contiguous matrices of one dtype of bfloat16, float16 and "
            f"float32, not empty, all rows at multiples of 16 bytes, not {found} for {columns} columns; a product and "
            "bias_gelu have the others"
        )


def _descriptor(x: Tensor, height: int, width: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [height, width])


def product_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """x (T, H), weight (F, H), bias (F,) or None -> z = x weight^T and GELU(z + bias), both (T, F) in x's dtype.

    Raises ValueError for what ``takes`` has not.
    """
    tokens, columns = x.shape[0], weight.shape[0]
    _require(columns, x, weight)
    z = x.new_empty(tokens, columns)
    out = torch.empty_like(z)
    config = choice.of("feed_forward.fwd", _launch_config(x.dtype, "fwd"))
    m, n, k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    programs = _programs(x.device, rows.cdiv(tokens, m) * rows.cdiv(columns, n), config.pop("PROGRAMS"))
    with torch.cuda.device_of(x):
        _feed_forward_fwd_kernel[(programs,)](
            x_desc=_descriptor(x, m, k),
            weight_desc=_descriptor(weight, n, k),
            z_desc=_descriptor(z, m, n // 4),
            out_desc=_descriptor(out, m, n // 4),
            bias_ptr=x if bias is None else bias,
            tokens=tokens,
            HIDDEN=x.shape[1],
            COLUMNS=columns,
            HAS_BIAS=bias is not None,
            **config,
        )
    return z, out


def product_gelu_bwd(grad_out: Tensor, weight: Tensor, z: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """grad_out (T, H), weight (H, F), z (T, F), bias (F,) or None -> (grad_out weight) * GELU'(z + bias) (T, F), and
    its sum over rows in bias's dtype (empty without one). Raises ValueError for what ``takes`` has not."""
    tokens, columns = z.shape
    _require(columns, grad_out, weight, z)
    grad_z = torch.empty_like(z)
    config = choice.of("feed_forward.bwd", _launch_config(z.dtype, "bwd"))
    m, n, k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    row_tiles = rows.cdiv(tokens, m)
    programs = _programs(z.device, row_tiles * rows.cdiv(columns, n), config.pop("PROGRAMS"))
    partial = torch.empty((0 if bias is None else row_tiles, 1, columns), dtype=torch.float32, device=z.device)
    with torch.cuda.device_of(z):
        _feed_forward_bwd_kernel[(programs,)](
            grad_out_desc=_descriptor(grad_out, m, k),
            weight_desc=_descriptor(weight, k, n),
            z_desc=_descriptor(z, m, n // 4),
            grad_z_desc=_descriptor(grad_z, m, n // 4),
            bias_ptr=z if bias is None else bias,
            partial_ptr=partial,
            tokens=tokens,
            HIDDEN=grad_out.shape[1],
            COLUMNS=columns,
            HAS_BIAS=bias is not None,
            **config,
        )
        if bias is None:
            return grad_z, z.new_empty(0)
        grad_bias = torch.empty_like(bias)
        rows.sum_partials(partial, [grad_bias])
    return grad_z, grad_bias


def feed_forward_fwd(
    x: Tensor, weight_in: Tensor, bias: Tensor | None, weight_out: Tensor, in_epilogue: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See bert_fast/reference.py. ``in_epilogue``: by the kernel, where it takes the operands."""
    if in_epilogue and takes(weight_in.shape[0], x, weight_in):
        choice.served("feed_forward.fwd_epilogue")
        z, activated = product_gelu(x, weight_in, bias)
    else:
        z = F.linear(x, weight_in)
        activated = bias_gelu_fwd(z, bias)
    return F.linear(activated, weight_out), z, activated


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
    """See bert_fast/reference.py. ``in_epilogue``: by the kernel, where it takes the operands."""
    if in_epilogue and takes(z.shape[1], grad_out, weight_out, z):
        choice.served("feed_forward.bwd_epilogue")
        grad_z, grad_bias = product_gelu_bwd(grad_out, weight_out, z, bias)
    else:
        grad_z, grad_bias = bias_gelu_bwd(grad_out @ weight_out, z, bias)
    return feed_forward_gradients(grad_out, grad_z, grad_bias, x, weight_in, activated, wanted)
