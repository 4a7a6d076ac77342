"""optimizer: AdamW and LAMB over all parameters in one launch a pass. Formulas: bert_fast/optim/reference.py.

Parameters are many tensors of very different sizes; a launch for each would cost more than the update. So a program
looks up where its work lies: ``chunks`` says which tensor and which piece of it, ``table`` at which addresses the
tensor's weights, gradients and moments are. Passes over memory, bytes an element with float32 parameters (16-bit ones
with masters: 2 less for every gradient, 2 more for the copy that is written last):

    norm      4    sum of squares of the gradients
    AdamW    28    reads w, g, m, v; writes w, m, v
    LAMB  24+16    moments, and sums of w^2 and u^2; a ratio a tensor; then w, with u computed again from m and v

Clipping factor, rates and the decision to skip (a clip of NaN) are made on the device, in one launch for all groups of
parameters that go together, and read there: nothing waits, and a step may be captured in a graph. No float atomics: a
program writes its sums to its own place, and they are added in one order.
"""

import functools
import math
from collections import OrderedDict
from itertools import accumulate

import torch
import triton
import triton.language as tl

from bert_fast import graph_memory
from bert_fast.kernels import rows
from bert_fast.optim.reference import by_dtype

Tensor = torch.Tensor

# 8 elements a thread and array: two 128-bit loads of float32 an array under way, and registers for two programs or more
# a multiprocessor (compile_report), so that one loads while another stores. Reasoned; no GPU measured it.
_CONFIG = {"BLOCK": 2048, "num_warps": 8, "num_stages": 1}
_PARAM, _MASTER, _GRAD, _EXP_AVG, _EXP_AVG_SQ = (tl.constexpr(i) for i in range(5))  # rows of a table
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _at(table_ptr, row, tensors, tensor, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in ``row`` of a table (rows, tensors); ALIGNED[row]: all addresses in it are multiples of 16."""
    pointer = tl.load(table_ptr + row * tensors + tensor).to(tl.pointer_type(DTYPE))
    if ALIGNED[row]:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _chunk(chunk_ptr, size_ptr, BLOCK: tl.constexpr):
    """This program's tensor, the offsets of its elements, the tensor's size, and whether all offsets are below it."""
    tensor = tl.load(chunk_ptr + 2 * tl.program_id(0))
    first = tl.load(chunk_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    size = tl.load(size_ptr + tensor)
    return tensor, first + tl.arange(0, BLOCK), size, first + BLOCK <= size


# A mask whose edge the compiler does not know splits an access into single elements, so whole chunks have none: every
# kernel has its work twice, and only a tensor's last chunk takes the masked one.
@triton.jit
def _load(pointer, offset, size, MASKED: tl.constexpr):
    x = tl.load(pointer + offset, mask=offset < size, other=0.0) if MASKED else tl.load(pointer + offset)
    return x.to(tl.float32)


@triton.jit
def _store(pointer, offset, size, x, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + offset, x.to(pointer.dtype.element_ty), mask=offset < size)
    else:
        tl.store(pointer + offset, x.to(pointer.dtype.element_ty))


@triton.jit
def _moments(
    table_ptr, tensors, tensor, offset, size, clip, beta1, rest1, beta2, rest2, DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Both moments after this step's gradient; stored, and returned."""
    grad_ptr = _at(table_ptr, _GRAD, tensors, tensor, DTYPE, ALIGNED)
    m_ptr = _at(table_ptr, _EXP_AVG, tensors, tensor, tl.float32, ALIGNED)
    v_ptr = _at(table_ptr, _EXP_AVG_SQ, tensors, tensor, tl.float32, ALIGNED)
    grad = _load(grad_ptr, offset, size, MASKED) * clip
    m = beta1 * _load(m_ptr, offset, size, MASKED) + rest1 * grad
    v = beta2 * _load(v_ptr, offset, size, MASKED) + rest2 * grad * grad
    _store(m_ptr, offset, size, m, MASKED)
    _store(v_ptr, offset, size, v, MASKED)
    return m, v


@triton.jit
def _direction(rate_ptr, tensor, m, v, eps):
    return tl.load(rate_ptr + 4 * tensor + 2) * m / (tl.load(rate_ptr + 4 * tensor + 3) * tl.sqrt_rn(v) + eps)


@triton.jit
def _store_weight(
    table_ptr, tensors, tensor, offset, size, w_ptr, w, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    _store(w_ptr, offset, size, w, MASKED)
    if DTYPE.primitive_bitwidth < 32:  # float32 parameters are their own masters
        _store(_at(table_ptr, _PARAM, tensors, tensor, DTYPE, ALIGNED), offset, size, w, MASKED)


@triton.jit
def _squares(table_ptr, partial_ptr, tensors, tensor, offset, size, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
             MASKED: tl.constexpr):  # fmt: skip
    x = _load(_at(table_ptr, 0, tensors, tensor, DTYPE, ALIGNED), offset, size, MASKED)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(x * x, 0))


@triton.jit(do_not_specialize=["tensors"])
def _optimizer_norm_kernel(
    table_ptr, size_ptr, chunk_ptr, partial_ptr, tensors, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, offset, size, whole = _chunk(chunk_ptr, size_ptr, BLOCK)
    if whole:
        _squares(table_ptr, partial_ptr, tensors, tensor, offset, size, DTYPE, ALIGNED, False)
    else:
        _squares(table_ptr, partial_ptr, tensors, tensor, offset, size, DTYPE, ALIGNED, True)


@triton.jit
def _number(x, THERE: tl.constexpr):
    return tl.load(x).to(tl.float32) if THERE else x


@triton.jit(do_not_specialize=["tensors", "max_grad_norm"])
def _optimizer_rates_kernel(
    step_ptr, norm_ptr, skipped_ptr, rate_ptr, clip_ptr, lrs, decays, firsts, max_grad_norm, tensors,
    LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, LRS_THERE: tl.constexpr, DECAYS_THERE: tl.constexpr,
    COUNTS: tl.constexpr, CLIPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A single program. Tuples have an element for each group of tensors that follow each other: its learning rate and
    weight decay, numbers, or addresses where they are on the device (THERE); its first tensor."""
    norm = tl.load(norm_ptr).to(tl.float32)
    finite = norm - norm == 0.0
    clip = 1.0
    if CLIPS:
        clip = tl.minimum(tl.div_rn(max_grad_norm, norm + 1e-6), 1.0)
    tl.store(clip_ptr, tl.where(finite, clip, float("nan")))
    if COUNTS:
        tl.store(skipped_ptr, tl.load(skipped_ptr) + tl.where(finite, 0, 1))
    for first in range(0, tensors, BLOCK):
        tensor = first + tl.arange(0, BLOCK)
        mask = tensor < tensors
        step = tl.load(step_ptr + tensor, mask=mask, other=0.0) + tl.where(finite, 1.0, 0.0)
        tl.store(step_ptr + tensor, step, mask=mask)
        t = tl.maximum(step, 1.0).to(tl.float64)  # a first step that is skipped leaves 0, and its rates unused
        row = rate_ptr + 4 * tensor
        lr = tl.zeros((BLOCK,), tl.float32)
        decay = tl.zeros((BLOCK,), tl.float32)
        for group in tl.static_range(len(firsts)):
            lr = tl.where(tensor >= firsts[group], _number(lrs[group], LRS_THERE[group]), lr)
            decay = tl.where(tensor >= firsts[group], _number(decays[group], DECAYS_THERE[group]), decay)
        tl.store(row, lr, mask=mask)
        tl.store(row + 1, decay, mask=mask)
        # 1 - beta^t is 1e-3 and more for any beta in use: in float64 it keeps far more digits than float32 has
        first_rate = 1.0 / (1.0 - tl.exp(t * LOG_BETA1))
        second_rate = 1.0 / tl.sqrt(1.0 - tl.exp(t * LOG_BETA2))
        tl.store(row + 2, first_rate.to(tl.float32), mask=mask)
        tl.store(row + 3, second_rate.to(tl.float32), mask=mask)


@triton.jit
def _adamw(
    table_ptr, rate_ptr, tensors, tensor, offset, size, clip, beta1, rest1, beta2, rest2, eps, DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    m, v = _moments(
        table_ptr, tensors, tensor, offset, size, clip, beta1, rest1, beta2, rest2, DTYPE, ALIGNED, MASKED
    )  # fmt: skip
    lr = tl.load(rate_ptr + 4 * tensor)
    kept = 1.0 - lr * tl.load(rate_ptr + 4 * tensor + 1)
    w_ptr = _at(table_ptr, _MASTER, tensors, tensor, tl.float32, ALIGNED)
    w = kept * _load(w_ptr, offset, size, MASKED) - lr * _direction(rate_ptr, tensor, m, v, eps)
    _store_weight(table_ptr, tensors, tensor, offset, size, w_ptr, w, DTYPE, ALIGNED, MASKED)


@triton.jit(do_not_specialize=["tensors"])
def _optimizer_adamw_kernel(
    table_ptr, size_ptr, chunk_ptr, rate_ptr, clip_ptr, tensors, beta1, rest1, beta2, rest2, eps, DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    clip = tl.load(clip_ptr)
    if clip == clip:
        tensor, offset, size, whole = _chunk(chunk_ptr, size_ptr, BLOCK)
        if whole:
            _adamw(
                table_ptr, rate_ptr, tensors, tensor, offset, size, clip, beta1, rest1, beta2, rest2, eps, DTYPE,
                ALIGNED, False,
            )  # fmt: skip
        else:
            _adamw(
                table_ptr, rate_ptr, tensors, tensor, offset, size, clip, beta1, rest1, beta2, rest2, eps, DTYPE,
                ALIGNED, True,
            )  # fmt: skip


@triton.jit
def _lamb_moments(
    table_ptr, rate_ptr, partial_ptr, tensors, tensor, offset, size, clip, beta1, rest1, beta2, rest2, eps,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    m, v = _moments(
        table_ptr, tensors, tensor, offset, size, clip, beta1, rest1, beta2, rest2, DTYPE, ALIGNED, MASKED
    )  # fmt: skip
    w = _load(_at(table_ptr, _MASTER, tensors, tensor, tl.float32, ALIGNED), offset, size, MASKED)
    u = _direction(rate_ptr, tensor, m, v, eps) + tl.load(rate_ptr + 4 * tensor + 1) * w
    if MASKED:
        u = tl.where(offset < size, u, 0.0)  # past the end 0 / eps, which is NaN where eps is 0
    tl.store(partial_ptr + 2 * tl.program_id(0), tl.sum(w * w, 0))
    tl.store(partial_ptr + 2 * tl.program_id(0) + 1, tl.sum(u * u, 0))


@triton.jit(do_not_specialize=["tensors"])
def _optimizer_lamb_moments_kernel(
    table_ptr, size_ptr, chunk_ptr, rate_ptr, clip_ptr, partial_ptr, tensors, beta1, rest1, beta2, rest2, eps,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    clip = tl.load(clip_ptr)
    if clip == clip:
        tensor, offset, size, whole = _chunk(chunk_ptr, size_ptr, BLOCK)
        if whole:
            _lamb_moments(
                table_ptr, rate_ptr, partial_ptr, tensors, tensor, offset, size, clip, beta1, rest1, beta2, rest2, eps,
                DTYPE, ALIGNED, False,
            )  # fmt: skip
        else:
            _lamb_moments(
                table_ptr, rate_ptr, partial_ptr, tensors, tensor, offset, size, clip, beta1, rest1, beta2, rest2, eps,
                DTYPE, ALIGNED, True,
            )  # fmt: skip


@triton.jit
def _optimizer_lamb_ratio_kernel(
    partial_ptr, start_ptr, rate_ptr, ratio_ptr, ADAPT_ALL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """ratio (tensors,): |w| / |u| of one tensor from the sums of its chunks."""
    tensor = tl.program_id(0)
    last = tl.load(start_ptr + tensor + 1)
    weights = tl.zeros((BLOCK,), tl.float32)
    updates = tl.zeros((BLOCK,), tl.float32)
    for first in range(tl.load(start_ptr + tensor), last, BLOCK):
        chunk = first + tl.arange(0, BLOCK)
        weights += tl.load(partial_ptr + 2 * chunk, mask=chunk < last, other=0.0)
        updates += tl.load(partial_ptr + 2 * chunk + 1, mask=chunk < last, other=0.0)
    w_square, u_square = tl.sum(weights, 0), tl.sum(updates, 0)
    adapts = (w_square > 0.0) & (u_square > 0.0)
    if not ADAPT_ALL:
        adapts = adapts & (tl.load(rate_ptr + 4 * tensor + 1) > 0.0)
    ratio = tl.sqrt_rn(w_square) / tl.sqrt_rn(tl.where(adapts, u_square, 1.0))
    tl.store(ratio_ptr + tensor, tl.where(adapts, ratio, 1.0))


@triton.jit
def _lamb_apply(
    table_ptr, rate_ptr, ratio_ptr, tensors, tensor, offset, size, eps, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    m = _load(_at(table_ptr, _EXP_AVG, tensors, tensor, tl.float32, ALIGNED), offset, size, MASKED)
    v = _load(_at(table_ptr, _EXP_AVG_SQ, tensors, tensor, tl.float32, ALIGNED), offset, size, MASKED)
    w_ptr = _at(table_ptr, _MASTER, tensors, tensor, tl.float32, ALIGNED)
    w = _load(w_ptr, offset, size, MASKED)
    u = _direction(rate_ptr, tensor, m, v, eps) + tl.load(rate_ptr + 4 * tensor + 1) * w
    w -= tl.load(rate_ptr + 4 * tensor) * tl.load(ratio_ptr + tensor) * u
    _store_weight(table_ptr, tensors, tensor, offset, size, w_ptr, w, DTYPE, ALIGNED, MASKED)


@triton.jit(do_not_specialize=["tensors"])
def _optimizer_lamb_apply_kernel(
    table_ptr, size_ptr, chunk_ptr, rate_ptr, clip_ptr, ratio_ptr, tensors, eps, DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    clip = tl.load(clip_ptr)
    if clip == clip:
        tensor, offset, size, whole = _chunk(chunk_ptr, size_ptr, BLOCK)
        if whole:
            _lamb_apply(table_ptr, rate_ptr, ratio_ptr, tensors, tensor, offset, size, eps, DTYPE, ALIGNED, False)
        else:
            _lamb_apply(table_ptr, rate_ptr, ratio_ptr, tensors, tensor, offset, size, eps, DTYPE, ALIGNED, True)


def _copied(table: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """``table`` in host memory and on ``device``, copied without waiting for it."""
    if device.type != "cuda":
        return table, table.to(device)
    pinned = table.pin_memory()
    return pinned, pinned.to(device, non_blocking=True)


def _cached(make):
    """Keeps what ``make`` gave for its last 64 arguments; what it gave while a graph was being recorded it keeps not:
    that is written when the graph is replayed, which may be never."""
    kept: OrderedDict = OrderedDict()

    @functools.wraps(make)
    def cached(*args):
        found = kept.get(args)
        if found is not None:
            kept.move_to_end(args)
        else:
            found = make(*args)
            if not graph_memory.recording(args[-1]):
                kept[args] = found
                if len(kept) > 64:
                    kept.popitem(last=False)
        return found

    return cached


@_cached
def _table(values: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    return _copied(torch.tensor(values, dtype=torch.int64), device)


@_cached
def _plan(sizes: tuple[int, ...], block: int, device: torch.device) -> tuple[tuple[Tensor, Tensor], ...]:
    """Tables of tensors of ``sizes`` elements: the sizes; each chunk's tensor and piece; each tensor's first chunk.

    Kept by the sizes, which are a few hundred: BERT-large has 160 000 chunks, too many to list in every step.
    """
    counts = torch.tensor([rows.cdiv(size, block) for size in sizes])
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    tensor = torch.repeat_interleave(counts)
    chunks = torch.stack([tensor, torch.arange(len(tensor)) - starts[tensor]], dim=1).int()
    return tuple(_copied(table, device) for table in (torch.tensor(sizes), chunks, starts))


def _held(tables: tuple[Tensor, Tensor]) -> Tensor:
    """The table on the device. Where a graph is being recorded it owns both: it outlives what the caches keep."""
    if graph_memory.recording(tables[1].device):
        graph_memory.keep(tables)
    return tables[1]


class _Work:
    """Lists of tensors that go together (element i of each has the size of ``lists[0][i]``), cut into chunks."""

    def __init__(self, lists: list[list[Tensor]]):
        first = lists[0]
        device, block = first[0].device, _CONFIG["BLOCK"]
        addresses = tuple(tuple(t.data_ptr() for t in tensors) for tensors in lists)
        sizes, chunks, self.starts = map(_held, _plan(tuple(t.numel() for t in first), block, device))
        self.programs, self.tensors, self.device = len(chunks), len(first), device
        self.arguments = {
            "table_ptr": _held(_table(addresses, device)),
            "size_ptr": sizes,
            "chunk_ptr": chunks,
            "tensors": len(first),
            "DTYPE": _DTYPES[first[0].dtype],
            # by kind of tensor: a gradient in another's bucket may lie 8 bytes off, weights and moments do not
            "ALIGNED": tuple(all(address % 16 == 0 for address in kind) for kind in addresses),
            **_CONFIG,
        }


def optimizer_norm(tensors) -> Tensor:
    """See bert_fast/optim/reference.py."""
    rows.check_tensors("optim", **{f"gradient {i}": t for i, t in enumerate(tensors)})
    parts = []
    for numbers in by_dtype(tensors).values():
        kept = [tensors[i].contiguous() for i in numbers]
        work = _Work([kept])
        partial = torch.empty(work.programs, dtype=torch.float32, device=work.device)
        if work.programs:
            _optimizer_norm_kernel[(work.programs,)](partial_ptr=partial, **work.arguments)
        parts.append(partial)
    together = parts[0] if len(parts) == 1 else torch.cat(parts)
    return together.sum(dtype=torch.float64).sqrt().float()


def optimizer_rates(steps, norm, skipped, groups, betas, max_grad_norm) -> tuple[Tensor, Tensor]:
    """See bert_fast/optim/reference.py; ``rates`` is float32."""
    rates, clip = steps.new_empty((len(steps), 4)), steps.new_empty(())
    beta1, beta2 = betas or (0.0, 0.0)  # a beta of 0 has no bias
    done = 0
    for start in range(0, len(groups), _MAX_GROUPS):
        counts, *numbers = zip(*groups[start : start + _MAX_GROUPS], strict=True)
        lrs, decays = (tuple(x.to(steps.device) if isinstance(x, Tensor) else float(x) for x in n) for n in numbers)
        lrs_there, decays_there = (tuple(isinstance(x, Tensor) for x in n) for n in numbers)
        *firsts, tensors = accumulate(counts, initial=0)
        _optimizer_rates_kernel[(1,)](
            step_ptr=steps[done:],
            norm_ptr=norm,
            skipped_ptr=skipped,
            rate_ptr=rates[done:],
            clip_ptr=clip,
            lrs=lrs,
            decays=decays,
            firsts=tuple(map(float, firsts)),  # integers in a tuple are compiled in, or that 16 divides them
            max_grad_norm=max_grad_norm or 0.0,
            tensors=tensors,
            LOG_BETA1=math.log(beta1) if beta1 else -math.inf,
            LOG_BETA2=math.log(beta2) if beta2 else -math.inf,
            LRS_THERE=lrs_there,
            DECAYS_THERE=decays_there,
            COUNTS=skipped is not None,
            CLIPS=max_grad_norm is not None,
            **_RATES_CONFIG,
        )
        done += tensors
        skipped = None  # it is counted once
    return rates, clip


_MAX_GROUPS = 32  # of one launch: the kernel is compiled for their number, and may have 4 KB of arguments
_RATES_CONFIG = {"BLOCK": 512, "num_warps": 4, "num_stages": 1}  # BERT-large has 398 tensors


def _works(params, masters, grads, exp_avgs, exp_avg_sqs, rates):
    """The work of each dtype of parameters, and its rates."""
    rows.check_tensors("optim", **{f"parameter {i}": t for i, t in enumerate(params)})
    kinds = by_dtype(params)
    for numbers in kinds.values():
        lists = [[tensors[i] for i in numbers] for tensors in (params, masters, grads, exp_avgs, exp_avg_sqs)]
        chosen = rates
        if len(kinds) > 1:
            chosen = rates[_held(_table((tuple(numbers),), rates.device))[0]]
        work = _Work(lists)
        if work.programs:
            yield work, chosen.contiguous()


def optimizer_adamw(params, masters, grads, exp_avgs, exp_avg_sqs, rates, clip, beta1, beta2, eps) -> None:
    """See bert_fast/optim/reference.py."""
    for work, chosen in _works(params, masters, grads, exp_avgs, exp_avg_sqs, rates):
        _optimizer_adamw_kernel[(work.programs,)](
            rate_ptr=chosen, clip_ptr=clip, beta1=beta1, rest1=1 - beta1, beta2=beta2, rest2=1 - beta2, eps=eps,
            **work.arguments,
        )  # fmt: skip


def optimizer_lamb(params, masters, grads, exp_avgs, exp_avg_sqs, rates, clip, beta1, beta2, eps, adapt_all) -> None:
    """See bert_fast/optim/reference.py."""
    for work, chosen in _works(params, masters, grads, exp_avgs, exp_avg_sqs, rates):
        partial = torch.empty((work.programs, 2), dtype=torch.float32, device=work.device)
        ratio = torch.empty(work.tensors, dtype=torch.float32, device=work.device)
        _optimizer_lamb_moments_kernel[(work.programs,)](
            rate_ptr=chosen, clip_ptr=clip, partial_ptr=partial, beta1=beta1, rest1=1 - beta1, beta2=beta2,
            rest2=1 - beta2, eps=eps, **work.arguments,
        )  # fmt: skip
        _optimizer_lamb_ratio_kernel[(work.tensors,)](
            partial_ptr=partial, start_ptr=work.starts, rate_ptr=chosen, ratio_ptr=ratio, ADAPT_ALL=adapt_all,
            **_RATIO_CONFIG,
        )  # fmt: skip
        _optimizer_lamb_apply_kernel[(work.programs,)](
            rate_ptr=chosen, clip_ptr=clip, ratio_ptr=ratio, eps=eps, **work.arguments
        )  # fmt: skip


_RATIO_CONFIG = {"BLOCK": 1024, "num_warps": 4, "num_stages": 1}  # BERT-large's word table has 15262 chunks
