"""mlm_loss: softmax cross-entropy of hidden @ word^T + bias at masked positions, with its gradients in one pass.

Positions are dealt evenly into chunks of at most ``chunk``, so logits exist for at most that many. Per chunk, with n
the normalizer:

    library product   logits   = hidden @ word^T                    (chunk, V) in hidden's dtype
    one Triton pass   lse      = log sum exp(logits + bias)         online: running maximum and sum, fp32
                      loss     = lse - (logits + bias)[label]
                      d logits = (softmax - onehot) / n             written over the logits; 0 where ignored
                      d bias  += column sums of d logits, before they are rounded
    library products  d hidden = d logits @ word,   d word += d logits^T @ hidden      accumulated in fp32

The gradients cost three matrix products here; computed again in a backward they would cost five. No element is dropped
by its size. Every sum has a fixed order: no atomics.

Bytes of the pass for a chunk of C rows and e-byte logits: C V e read for the statistics, C V e read again for the
gradient (four rows, 240 KB at V = 30522: from L2) and C V e written; the sums of d bias add C V (one fp32 row per
four rows). Memory: C V e for the logits, C V for those sums, one copy of the table in 16-bit dtypes, its fp32 gradient.

16-bit dtypes: the vocabulary is padded to a multiple of 128 inside, since products whose extents are no multiple of 8
leave the fast path of the libraries; the table is copied once per call (under autocast that is the cast it needs
anyhow), its padding is zero rows, and the padded columns get probability 0. Logits stay in hidden's dtype, as
PyTorch's own product gives them: each is off by at most half a unit in its last place (2^-9 of its size in bf16, 2^-12
in fp16), which moves a probability by as much times the logit, at random from one to the next. fp32 logits would not
carry that error, but double the bytes of the widest tensor of the model and could not be overwritten by a gradient
that the next products can read. Everything after the logits is fp32. In fp16 d logits is left undivided by n until
after the products, or small probabilities would underflow.

Source of the online softmax: M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax", 2018.
"""

import torch
import triton
import triton.language as tl

from bert_fast import choice
from bert_fast.kernels import rows
from bert_fast.products import multiply
from bert_fast.reference import divisor

Tensor = torch.Tensor

_PAD = 128


def _launch_config(vocabulary: int) -> dict:
    """Four rows by 1024 columns, 8 warps: 16 elements a thread. Reasoned; no GPU has measured it yet.

    Four rows: a chunk of 1024 gives 256 programs, and the buffer of d bias sums stays a quarter of fp32 logits.
    """
    block_n = min(1024, max(16, rows.next_power_of_2(vocabulary)))
    return {"BLOCK_M": 4, "BLOCK_N": block_n, "num_warps": max(1, min(8, 4 * block_n // 256)), "num_stages": 1}


@triton.jit(do_not_specialize=["count", "ignore_index"])
def _mlm_loss_kernel(
    logits_ptr,  # (count, STRIDE): overwritten by their gradient
    bias_ptr,
    labels_ptr,
    scale_ptr,  # (1,) fp32: the factor of d logits
    row_loss_ptr,
    partial_ptr,  # (programs, STRIDE) fp32: sums of d bias
    count,
    ignore_index,
    VOCABULARY: tl.constexpr,
    STRIDE: tl.constexpr,
    WITH_GRADS: tl.constexpr,
    FIRST_CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_chunk = row < count
    label = tl.load(labels_ptr + row, mask=in_chunk, other=0)
    counted = in_chunk & (label != ignore_index)
    in_range = (label >= 0) & (label < VOCABULARY)
    row_start = row.to(tl.int64) * STRIDE
    # Read before any column of the row is overwritten.
    has_target = counted & in_range
    target = tl.load(logits_ptr + row_start + label, mask=has_target, other=0.0).to(tl.float32)
    target += tl.load(bias_ptr + label, mask=has_target, other=0.0).to(tl.float32)

    # Each lane keeps its own maximum and sum; lanes meet once, after the loop. Finite, so that an empty lane's
    # exp(maximum - row maximum) is 0 and not NaN.
    maximum = tl.full((BLOCK_M, BLOCK_N), -3.0e38, tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, VOCABULARY, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        inside = column < VOCABULARY
        # What is padded is read too, and not counted: an edge at a multiple of 128 keeps accesses 16 bytes wide.
        mask = counted[:, None] & (column < STRIDE)[None, :]
        x = tl.load(logits_ptr + row_start[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        x = tl.where(inside[None, :], x, -float("inf"))
        higher = tl.maximum(maximum, x)
        total = total * tl.exp(maximum - higher) + tl.exp(x - higher)
        maximum = higher
    row_maximum = tl.max(maximum, axis=1)
    row_total = tl.sum(total * tl.exp(maximum - row_maximum[:, None]), axis=1)
    lse = row_maximum + tl.log(row_total)
    loss = tl.where(in_range, lse - target, float("nan"))
    tl.store(row_loss_ptr + row, tl.where(counted, loss, 0.0), mask=in_chunk)

    if WITH_GRADS:
        scale = tl.where(in_range, tl.load(scale_ptr), float("nan"))
        tl.debug_barrier()  # no warp writes a gradient before every warp has read the logits
        partial_row = partial_ptr + tl.program_id(0).to(tl.int64) * STRIDE
        for start in range(0, STRIDE, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            inside, in_row = column < VOCABULARY, column < STRIDE
            offset = row_start[:, None] + column[None, :]
            x = tl.load(logits_ptr + offset, mask=counted[:, None] & in_row[None, :], other=0.0).to(tl.float32)
            x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            grad = tl.exp(x - lse[:, None]) - tl.where(column[None, :] == label[:, None], 1.0, 0.0)
            grad = tl.where(counted[:, None] & inside[None, :], grad * scale[:, None], 0.0)
            tl.store(logits_ptr + offset, grad, mask=in_chunk[:, None] & in_row[None, :])
            column_sum = tl.sum(grad, axis=0)
            if not FIRST_CHUNK:
                column_sum += tl.load(partial_row + column, mask=in_row, other=0.0)
            tl.store(partial_row + column, column_sum, mask=in_row)


@triton.jit
def _scale_kernel(
    scale_ptr,  # () any floating dtype
    first_ptr,
    second_ptr,
    third_ptr,
    first_out_ptr,
    second_out_ptr,
    third_out_ptr,
    first_size,
    second_size,
    third_size,
    first_blocks,
    second_blocks,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scale = tl.load(scale_ptr).to(tl.float32)
    if IN_PLACE & (scale == 1.0):  # as nearly always: nothing is read or written, and the host need not know
        return
    block = tl.program_id(0)
    if block < first_blocks:
        offset = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offset < first_size
        tl.store(first_out_ptr + offset, tl.load(first_ptr + offset, mask=mask).to(tl.float32) * scale, mask=mask)
    elif block < first_blocks + second_blocks:
        offset = (block - first_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offset < second_size
        tl.store(second_out_ptr + offset, tl.load(second_ptr + offset, mask=mask).to(tl.float32) * scale, mask=mask)
    else:
        offset = (block - first_blocks - second_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offset < third_size
        tl.store(third_out_ptr + offset, tl.load(third_ptr + offset, mask=mask).to(tl.float32) * scale, mask=mask)


_SCALE_CONFIG = {"BLOCK": 2048, "num_warps": 4, "num_stages": 1}  # 16 elements a thread; not measured


def _product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a @ b, or out += a @ b with ``add``; sums in fp32 whatever a's dtype, rounded once to out's."""
    if a.is_cuda or a.dtype == out.dtype == torch.float32:
        multiply(a, b, out, add=add)
    else:  # a CPU (Triton's interpreter), whose sums of 16-bit products are not a GPU's
        out.copy_(torch.addmm(out.float(), a.float(), b.float(), beta=1 if add else 0))


def _even(positions: int, chunk: int) -> int:
    """Positions a chunk when all are dealt into as few as ``chunk`` allows, whole tiles of 128 where they fit."""
    share = rows.cdiv(max(positions, 1), max(1, rows.cdiv(positions, chunk)))
    return min(chunk, max(positions, 1), rows.cdiv(share, _PAD) * _PAD)


def _padded_table(word: Tensor, dtype: torch.dtype) -> Tensor:
    """The word table in ``dtype``; in 16 bits with zero rows up to a multiple of 128."""
    vocabulary, columns = word.shape
    width = vocabulary if dtype == torch.float32 else rows.cdiv(vocabulary, _PAD) * _PAD
    if width == vocabulary:
        return word.to(dtype)
    table = torch.empty((width, columns), dtype=dtype, device=word.device)
    table[:vocabulary].copy_(word)
    table[vocabulary:].zero_()
    return table


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
    """See bert_fast/reference.py. TypeError for float64. A label out of range makes loss and gradients NaN."""
    rows.check_tensors("mlm_loss", hidden=hidden, word=word, bias=bias)
    (positions, columns), vocabulary, device = hidden.shape, word.shape[0], hidden.device
    if normalizer is None:
        normalizer = (labels != ignore_index).sum()
    inverse = divisor(normalizer).reshape(1).float().reciprocal()
    # fp16 has too few exponents for probabilities over thousands of positions: divide after the products.
    divide_late = hidden.dtype == torch.float16
    scale = torch.ones_like(inverse) if divide_late else inverse

    table = _padded_table(word, hidden.dtype)
    width = table.shape[0]
    stride = rows.cdiv(vocabulary, _PAD) * _PAD  # rows of logits start at aligned addresses in every dtype
    chunk = _even(positions, chunk)
    config = choice.of("mlm_loss.fwd", _launch_config(vocabulary))
    logits = torch.empty((chunk, stride), dtype=hidden.dtype, device=device)
    row_loss = torch.empty(positions, dtype=torch.float32, device=device)
    partial = row_loss.new_empty((rows.cdiv(chunk, config["BLOCK_M"]) if with_grads else 0, stride))
    grad_hidden = torch.empty_like(hidden) if with_grads else hidden.new_empty(0)
    grad_word = row_loss.new_empty((width, columns) if with_grads else (0,))
    chunk_grad = row_loss.new_empty((chunk, columns) if with_grads else (0, columns))

    for start in range(0, positions, chunk):
        count = min(chunk, positions - start)
        part = hidden[start : start + count]
        chunk_logits = logits[:count, :width]
        _product(part, table.T, chunk_logits)
        _mlm_loss_kernel[(rows.cdiv(count, config["BLOCK_M"]),)](
            logits_ptr=logits,
            bias_ptr=bias,
            labels_ptr=labels[start:],
            scale_ptr=scale,
            row_loss_ptr=row_loss[start:],
            partial_ptr=partial,
            count=count,
            ignore_index=ignore_index,
            VOCABULARY=vocabulary,
            STRIDE=stride,
            WITH_GRADS=with_grads,
            FIRST_CHUNK=start == 0,
            **config,
        )
        if with_grads:
            _product(chunk_logits, table, chunk_grad[:count])
            factor = inverse if divide_late else 1.0
            torch.mul(chunk_grad[:count], factor, out=grad_hidden[start : start + count])
            _product(chunk_logits.T, part, grad_word, add=start > 0)

    loss = row_loss.sum() * inverse[0]
    if not with_grads:
        return loss, grad_hidden, word.new_empty(0), bias.new_empty(0)
    if positions == 0:
        return loss, grad_hidden, torch.zeros_like(word), torch.zeros_like(bias)
    grad_bias, grad_word = partial[:, :vocabulary].sum(dim=0), grad_word[:vocabulary]
    if divide_late:
        grad_bias, grad_word = grad_bias * inverse, grad_word.mul_(inverse)
    return loss, grad_hidden, grad_word.to(word.dtype), grad_bias.to(bias.dtype)


def mlm_loss_bwd(grad_loss: Tensor, grad_hidden: Tensor, grad_word: Tensor, grad_bias: Tensor) -> tuple[Tensor, ...]:
    """See bert_fast/reference.py: the three gradients times ``grad_loss``, in one launch. TypeError for float64."""
    grads = (grad_hidden, grad_word, grad_bias)
    outs = tuple(torch.empty_like(g) for g in grads)
    _scale(grad_loss, grads, outs)
    return outs


def mlm_loss_bwd_(grad_loss: Tensor, grad_hidden: Tensor, grad_word: Tensor, grad_bias: Tensor) -> None:
    """See bert_fast/reference.py: in one launch, which touches nothing where the factor is one."""
    grads = (grad_hidden, grad_word, grad_bias)
    _scale(grad_loss, grads, grads)


def _scale(factor: Tensor, grads: tuple[Tensor, ...], outs: tuple[Tensor, ...]) -> None:
    """outs = factor * grads, three tensors each; they may be the same."""
    rows.check_tensors("mlm_loss", grad_hidden=grads[0], grad_word=grads[1], grad_bias=grads[2])
    blocks = [rows.cdiv(g.numel(), _SCALE_CONFIG["BLOCK"]) for g in grads]
    if sum(blocks):
        _scale_kernel[(sum(blocks),)](
            scale_ptr=factor,
            first_ptr=grads[0],
            second_ptr=grads[1],
            third_ptr=grads[2],
            first_out_ptr=outs[0],
            second_out_ptr=outs[1],
            third_out_ptr=outs[2],
            first_size=grads[0].numel(),
            second_size=grads[1].numel(),
            third_size=grads[2].numel(),
            first_blocks=blocks[0],
            second_blocks=blocks[1],
            IN_PLACE=outs is grads,
            **_SCALE_CONFIG,
        )
