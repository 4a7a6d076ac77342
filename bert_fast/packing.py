"""Padded batches to packed tokens and back.

A batch is packed once, before the embedding: its T attended tokens, sequence after sequence, are the rows of
every activation inside the model (T, H). A ``Layout`` says where each row came from. Padding comes back only at
the edge, where a caller asks for dense outputs; positions that were not attended are 0 there.
"""

import dataclasses

import torch
from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensor

from bert_fast import dropout_mask

Tensor = torch.Tensor


@dataclasses.dataclass
class Layout:
    """Where the T rows of a packed batch lie.

    ``batch`` x ``length`` is the shape of the dense batch that came in ((1, T) for packed input).
    ``cu_seqlens`` (B+1,) int32 and ``max_seqlen`` bound the sequences, ``row_key`` (T,) int64 is each row's
    ``sample << 32 | position in the sample`` (bert_fast/dropout_mask.py). ``indices`` (T,) int64 are the rows' places
    in the flattened dense batch, None where every place is a row. ``mask`` (B, S) bool says which places are attended,
    None where all are. ``bias`` is what attention adds to its scores (B or 1, heads or 1, S or 1, S) where it cannot be
    said by ``cu_seqlens``: such batches, and those whose attention weights are asked for (``explicit``), compute
    attention densely. ``shown`` (B, S) bool are the places whose rows come out, the others as 0; None: all do.
    ``first`` (B,) int64 are the rows that the pooler reads, None for the first of each ``length`` rows. ``packed``:
    several sequences came in as one, end to end; ``several`` () bool says so where that is not known. ``rng_key`` (1,)
    int64 is the key of this forward pass's dropout masks, None where nothing is dropped.
    """

    batch: int
    length: int
    cu_seqlens: Tensor
    max_seqlen: int
    row_key: Tensor
    indices: Tensor | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    explicit: bool = False
    shown: Tensor | None = None
    first: Tensor | None = None
    packed: bool = False
    several: Tensor | None = None
    rng_key: Tensor | None = None


def unreadable(x: Tensor) -> bool:
    """Whether no value of ``x`` may be read: a program is being recorded, which is for any input of these shapes; under
    torch.func.vmap ``x`` is one of several at once; or there are no values, on the meta device and in fake tensors."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return True
    if torch.compiler.is_compiling():  # breaks the graph where a value is read, which a transform cannot
        return torch._C._are_functorch_transforms_active()
    return mapped(x) or x.is_meta or isinstance(x, FakeTensor)


def mapped(x: Tensor) -> bool:
    """Whether ``x`` is one of several tensors at once, under torch.func.vmap."""
    while not torch.compiler.is_compiling() and _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return False


def full_layout(batch: int, length: int, device: torch.device, samples: Tensor | None = None) -> Layout:
    """The layout of a batch without padding: row ``b * length + s`` is position ``s`` of sequence ``b``."""
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    row_key = dropout_mask.row_keys(cu_seqlens, batch * length, samples)
    return Layout(batch, length, cu_seqlens, length, row_key)


def masked_layout(
    mask: Tensor, *, samples: Tensor | None = None, read: Tensor | None = None, pools: bool = False
) -> Layout:
    """The layout of a padded batch by its ``mask`` (B, S), attended where not 0; holes may be anywhere.

    ``read`` (B, S) bool are positions whose outputs will be read (labels), and ``pools`` says that position 0
    of every sequence will be: where one of them is not attended, every position becomes a row, and attention
    gets a bias that leaves out the keys that are not attended, which is what transformers computes.
    """
    attended = mask != 0
    batch, length = mask.shape
    lengths = attended.sum(dim=1)
    outside = torch.zeros((), dtype=torch.bool, device=mask.device)
    if read is not None:
        outside = outside | (read & ~attended).any()
    if pools and batch and length:
        outside = outside | ~attended[:, 0].all()
    longest = lengths.max() if batch else lengths.sum()
    numbers = torch.stack([lengths.sum(), longest, outside.long()])
    if unreadable(numbers):
        layout = _unpacked_layout(attended, samples)
        layout.shown = attended | outside
        return layout
    # The one synchronisation that a mask costs: how many rows there are decides the shapes of everything below.
    total, longest, outside = numbers.tolist()
    if total == batch * length:
        return full_layout(batch, length, mask.device, samples)
    if outside:
        return _unpacked_layout(attended, samples)
    cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=mask.device)
    torch.cumsum(lengths, 0, out=cu_seqlens[1:])
    indices = torch.nonzero_static(attended.flatten(), size=total)[:, 0]
    layout = Layout(
        batch, length, cu_seqlens, longest, dropout_mask.row_keys(cu_seqlens, total, samples), indices, attended
    )
    layout.first = cu_seqlens[:-1].long() if pools else None
    return layout


def _unpacked_layout(attended: Tensor, samples: Tensor | None) -> Layout:
    """Every place is a row, and a bias in attention leaves out the keys that are not ``attended`` (B, S)."""
    batch, length = attended.shape
    layout = full_layout(batch, length, attended.device, samples)
    layout.bias = attention_bias(attended[:, None, None, :], torch.float32)
    layout.mask, layout.explicit = attended, True
    return layout


def packed_layout(
    cu_seqlens: Tensor, max_seqlen: int, tokens: int, *, samples: Tensor | None = None, first: Tensor | None = None
) -> Layout:
    """The layout of ``tokens`` rows that are packed already; rows past ``cu_seqlens[-1]`` belong to no sequence."""
    row_key = dropout_mask.row_keys(cu_seqlens, tokens, samples)
    if first is None:  # a sequence without tokens starts where the next one does, the last of them past the end
        first = cu_seqlens[:-1].long().clamp(max=max(tokens - 1, 0))
    return Layout(1, tokens, cu_seqlens, max_seqlen, row_key, first=first, packed=True)


def flattened_layout(positions: Tensor | None, batch: int, samples: Tensor | None = None) -> Layout | None:
    """The layout of sequences that nothing but ``positions`` (T,) or (1, T), of a batch of 1, parts: each goes up by
    one and begins at 0, or where the first does; the first may go on from an earlier batch. None where they do not say
    that there are several, or go up nowhere.

    Source: transformers' DataCollatorWithFlattening, and what its flash attention makes of such positions.
    """
    if positions is None or batch != 1 or positions.numel() < 2:
        return None
    tokens, positions = positions.numel(), positions.reshape(-1)
    begins = positions == positions[:1].where((positions != 0).all(), 0)
    begins[0] = True
    row = torch.arange(tokens, device=positions.device)
    longest = (row - row.where(begins, 0).cummax(0).values).amax() + 1
    several = (begins[1:] | (positions.diff() == 1)).all() & begins[1:].any() & (longest > 1)
    if unreadable(positions):
        layout = full_layout(1, tokens, positions.device, samples)
        sequence = begins.cumsum(0)
        together = (sequence[:, None] == sequence) | ~several
        layout.bias = attention_bias(together[None, None], torch.float32)
        layout.several, layout.explicit = several, True
        return layout
    # The one synchronisation that they cost, as a mask does.
    count, longest, several = torch.stack([begins.sum(), longest, several]).tolist()
    if not several:
        return None
    starts = torch.nonzero_static(begins, size=count)[:, 0]
    cu_seqlens = torch.nn.functional.pad(starts, (0, 1), value=tokens).int()
    return packed_layout(cu_seqlens, longest, tokens, samples=samples)


def attention_bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where ``allowed``, else the lowest finite number: a query that may see nothing sees everything alike."""
    bias = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return bias.masked_fill(~allowed, torch.finfo(dtype).min)


def same_sequence(layout: Layout) -> Tensor:
    """Bool (1, 1, T, T): which tokens of packed input are in one sequence."""
    index = torch.arange(layout.length, device=layout.cu_seqlens.device)
    sequence = torch.searchsorted(layout.cu_seqlens[1:].long(), index, right=True)
    return (sequence[:, None] == sequence[None, :])[None, None]


def attended(layout: Layout) -> Tensor | None:
    """Bool (B, S): the places of real tokens; None where all are."""
    if layout.packed:
        return (torch.arange(layout.length, device=layout.cu_seqlens.device) < layout.cu_seqlens[-1])[None]
    return layout.mask


def sequences(layout: Layout) -> tuple[Tensor, Tensor]:
    """Packed input as a padded batch, a line for each sequence: the rows (B, max_seqlen) int64, and bool, which are
    real."""
    starts, lengths = layout.cu_seqlens[:-1, None].long(), layout.cu_seqlens.diff()[:, None]
    column = torch.arange(layout.max_seqlen, device=starts.device)
    return (starts + column).clamp(max=max(layout.length - 1, 0)), column < lengths


def by_sequence(layout: Layout, rows: Tensor, value: float = 0.0) -> Tensor:
    """The rows (T, ...) of packed input as (B, max_seqlen, ...), filled up with ``value``."""
    places, real = sequences(layout)
    return rows[places].masked_fill(~real.view(*real.shape, *(1,) * (rows.dim() - 1)), value)


def pack(layout: Layout, dense: Tensor) -> Tensor:
    """The rows (T, ...) of ``dense`` (B, S, ...)."""
    rows = dense.flatten(0, 1)
    return rows if layout.indices is None else rows.index_select(0, layout.indices)


def unpack(layout: Layout, rows: Tensor) -> Tensor:
    """Rows (T, ...) back in a dense (B, S, ...) that a caller sees, 0 where nothing was attended."""
    if layout.shown is not None:
        rows = rows.where(layout.shown.view(-1, *(1,) * (rows.dim() - 1)), 0)
    return spread(layout, rows)


def spread(layout: Layout, rows: Tensor) -> Tensor:
    """Rows (T, ...) back in a dense (B, S, ...), 0 at places that are no rows."""
    if layout.indices is not None:
        dense = rows.new_zeros(layout.batch * layout.length, *rows.shape[1:])
        rows = dense.index_copy(0, layout.indices, rows)
    return rows.unflatten(0, (layout.batch, layout.length))


def select(layout: Layout, rows: Tensor) -> Layout:
    """``layout`` for the rows (R,) alone: their keys name their dropout masks. It holds for row operators only."""
    return dataclasses.replace(layout, row_key=layout.row_key.index_select(0, rows))


def rows_of(layout: Layout, places: Tensor) -> Tensor:
    """The rows (M,) of places (M,) in the flattened dense batch, each of them attended."""
    if layout.indices is None:
        return places
    inverse = places.new_zeros(layout.batch * layout.length)
    inverse[layout.indices] = torch.arange(layout.indices.shape[0], device=places.device)
    return inverse.index_select(0, places)
