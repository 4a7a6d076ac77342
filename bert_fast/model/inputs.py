"""What a caller gives a BertModel: checked, and as the rows of a Layout with their positions and segments."""

from typing import Any, TypedDict

import torch

from bert_fast import dropout_mask, packing
from bert_fast.linear import autocasts
from bert_fast.model import idcheck
from bert_fast.packing import Layout

Tensor = torch.Tensor


class ModelKwargs(TypedDict, total=False):
    """What the models take beside the arguments that they name; transformers' tools read from it what they can give.

    It is transformers' TransformersKwargs as far as an encoder has a use for it, and this engine's own.
    """

    num_items_in_batch: Tensor | int | None
    output_hidden_states: bool | None
    output_attentions: bool | None
    return_dict: bool | None
    cu_seq_lens_q: Tensor | None
    cu_seq_lens_k: Tensor | None
    max_length_q: int | None
    max_length_k: int | None
    cls_positions: Tensor | None
    hidden_dtype: torch.dtype | None
    masked_labels: Tensor | None
    masked_positions: Tensor | None
    num_sequences_in_batch: Tensor | int | None
    rows: Any
    sample_ids: Tensor | None


def refuse_decoders(**given) -> None:
    """ValueError for an argument of ``given`` that only a decoder has a use for."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"bert_fast.BertModel has no decoder: {name} cannot be given; use transformers' class")


def source_of(config, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """input_ids (B, S) or inputs_embeds (B, S, H), whichever is given: one of them has to be."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    if inputs_embeds is not None:
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != config.hidden_size:
            raise ValueError(
                f"inputs_embeds has shape {tuple(inputs_embeds.shape)}, expected (batch, length, {config.hidden_size})"
            )
        return inputs_embeds
    assert input_ids is not None
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected (batch, length)")
    _require_integers("input_ids", input_ids)
    return input_ids


def check_hidden_dtype(hidden_dtype: torch.dtype | None, parameters: torch.dtype, source: Tensor) -> None:
    """ValueError for a dtype of hidden states that neither ``parameters`` nor their products have."""
    kind = source.device.type
    products = torch.get_autocast_dtype(kind) if autocasts(source.device) else parameters
    if hidden_dtype not in (None, parameters, products):
        raise ValueError(
            f"hidden_dtype={hidden_dtype} is neither the parameters' dtype nor that of their products, "
            f"{products}: call the model under torch.autocast({kind!r}, {hidden_dtype})"
        )


def layout_of(
    source: Tensor, mask: Tensor | None, position_ids: Tensor | None, heads: int, read: Tensor | None, pools: bool, /,
    *, sample_ids: Tensor | None = None, cu_seq_lens_q: Tensor | None = None, max_length_q: int | None = None,
    cls_positions: Tensor | None = None, cu_seq_lens_k: Tensor | None = None, seq_idx: Tensor | None = None, **_,
) -> Layout:  # fmt: skip
    """Where the rows of ``source`` (B, S) or (B, S, H) lie, by ``mask`` or by what packed input says.

    ``read`` (B, S) bool and ``pools`` are those of ``packing.masked_layout``; ``heads`` are a mask's (B, heads, S, S).
    The others, and more that are not for here, are arguments of BertModel.forward.
    """
    batch, length = source.shape[:2]
    _check_positions(position_ids, batch, length)
    if mask is not None and mask.device != source.device:
        mask = mask.to(source.device)  # as transformers does
    alone = [name for name, value in (("cu_seq_lens_k", cu_seq_lens_k), ("seq_idx", seq_idx)) if value is not None]
    if cu_seq_lens_q is not None:
        longest = _check_packed(batch, mask, cu_seq_lens_q, max_length_q)
        cu_seqlens = cu_seq_lens_q.int()
        return packing.packed_layout(cu_seqlens, longest, length, samples=sample_ids, first=cls_positions)
    if alone and position_ids is None:
        raise ValueError(f"{alone[0]} alone does not part sequences: pass position_ids, or cu_seq_lens_q")
    if mask is None:
        layout = packing.flattened_layout(position_ids, batch, sample_ids)
        return layout or packing.full_layout(batch, length, source.device, sample_ids)
    if mask.dim() == 2:
        if tuple(mask.shape) != (batch, length):
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, expected {(batch, length)}, that of the input"
            )
        return packing.masked_layout(mask, samples=sample_ids, read=read, pools=pools)
    if mask.dim() != 4:
        raise ValueError(f"attention_mask has {mask.dim()} dimensions, expected 2 (padding) or 4 (any)")
    layout = packing.full_layout(batch, length, source.device, sample_ids)
    layout.bias, layout.explicit = _bias_of(mask, batch, heads, length), True
    return layout


def _check_packed(batch: int, mask: Tensor | None, cu_seq_lens_q: Tensor, max_length_q: int | None) -> int:
    """ValueError where packed input does not fit; its ``max_length_q``."""
    if batch != 1:
        raise ValueError(f"packed input (cu_seq_lens_q) has a batch of 1, but this one has {batch}")
    if packing.mapped(cu_seq_lens_q):
        raise ValueError("cu_seq_lens_q differs from sample to sample of torch.func.vmap: pass padded input to it")
    if mask is not None:
        raise ValueError("packed input (cu_seq_lens_q) takes no attention_mask: leave out padding instead")
    if max_length_q is None:
        raise ValueError("packed input needs max_length_q, the length of the longest sequence, with cu_seq_lens_q")
    return max_length_q


def _check_positions(position_ids: Tensor | None, batch: int, length: int) -> None:
    if position_ids is None:
        return
    if position_ids.shape[-1] != length or position_ids.numel() not in (length, batch * length):
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}, expected {(batch, length)} or {(1, length)}"
        )
    _require_integers("position_ids", position_ids)


def _require_integers(name: str, values: Tensor) -> None:
    if values.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} has dtype {values.dtype}, expected int64 or int32")


def _bias_of(mask: Tensor, batch: int, heads: int, length: int) -> Tensor:
    """What attention adds to its scores for a 4-dimensional ``mask``."""
    fits = mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)
    if not (fits and mask.shape[2] in (1, length) and mask.shape[3] == length):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, expected ({batch} or 1, {heads} or 1, {length} or 1, "
            f"{length})"
        )
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)
    if not mask.is_floating_point():
        raise TypeError(
            f"a 4-D attention_mask has dtype {mask.dtype}, expected bool (True: attended) or floating (added)"
        )
    return mask


def with_weights(layout: Layout) -> None:
    """``layout`` for attention whose weights the caller asks for: computed densely, with a bias for what it leaves
    out."""
    if layout.explicit:
        return
    layout.explicit = True
    if layout.packed:
        layout.bias = packing.attention_bias(packing.same_sequence(layout), torch.float32)
    elif layout.mask is not None:
        layout.bias = packing.attention_bias(layout.mask[:, None, None, :], torch.float32)


def positions_of(layout: Layout, position_ids: Tensor | None, batch: int, length: int, table: int) -> Tensor:
    """int64 (T,): the position of each row, those of ``position_ids`` or from 0 on, of a ``table`` of positions."""
    if position_ids is not None:
        return packing.pack(layout, torch.atleast_2d(position_ids).flatten(0, -2).expand(batch, length)).long()
    if layout.packed:
        real = packing.attended(layout)
        assert real is not None  # packed rows may have an unused tail
        return (layout.row_key & dropout_mask.MASK32).where(real[0], 0)
    if length > table:
        raise ValueError(
            f"the input has {length} positions, the model's table {table} (config.max_position_embeddings): "
            "truncate the input"
        )
    return packing.pack(layout, torch.arange(length, device=layout.row_key.device).expand(batch, length))


def segments_of(layout: Layout, token_type_ids: Tensor | None, batch: int, length: int) -> Tensor:
    """int64 (T,): the segment of each row, 0 where ``token_type_ids`` is None."""
    if token_type_ids is None:
        return torch.zeros_like(layout.row_key)
    if tuple(token_type_ids.shape) not in ((batch, length), (1, length)):
        raise ValueError(f"token_type_ids has shape {tuple(token_type_ids.shape)}, expected {(batch, length)}")
    _require_integers("token_type_ids", token_type_ids)
    return packing.pack(layout, token_type_ids.expand(batch, length)).long()


def misplaced(config, layout: Layout, input_ids, token_type_ids, position_ids) -> IndexError | None:
    """The error for what the caller gave, where the embedding found an index out of range."""
    attended = None if layout.indices is None else layout.mask
    error = idcheck.misplaced(config, attended, input_ids, token_type_ids, position_ids)
    lengths, table = layout.cu_seqlens.diff(), config.max_position_embeddings
    if error is not None or not layout.packed or not (lengths > table).any():
        return error
    longest = int(lengths.argmax())
    return IndexError(
        f"sequence {longest} of cu_seq_lens_q has {int(lengths[longest])} tokens, the model's table of positions "
        f"{table} (config.max_position_embeddings): cut it"
    )
