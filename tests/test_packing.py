"""Packing: what goes in comes out, in the same place, and only that."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_fast import dropout_mask, packing
from tests.support.parity import DEVICE


def masks():
    """Any mask (B, S), rows without tokens and empty batches included."""
    return st.integers(0, 5).flatmap(
        lambda rows: st.integers(1, 9).flatmap(
            lambda columns: st.lists(
                st.lists(st.integers(0, 1), min_size=columns, max_size=columns), min_size=rows, max_size=rows
            ).map(lambda values: torch.tensor(values, device=DEVICE).reshape(rows, columns).long())
        )
    )


@settings(max_examples=150, deadline=None)
@given(masks(), st.integers(0, 2**31))
def test_round_trip(mask, seed):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(*mask.shape, 3, generator=generator).to(DEVICE)
    layout = packing.masked_layout(mask)
    rows = packing.pack(layout, dense)
    assert torch.equal(rows, dense[mask.bool()])
    assert torch.equal(packing.unpack(layout, rows), dense * mask[..., None])
    lengths = mask.sum(1)
    assert torch.equal(layout.cu_seqlens.long().diff(), lengths)
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.max_seqlen >= int(lengths.max() if len(lengths) else 0)
    keys = [sample << 32 | position for sample, n in enumerate(lengths.tolist()) for position in range(n)]
    assert layout.row_key.tolist() == keys
    places = mask.flatten().nonzero()[:, 0]
    assert packing.rows_of(layout, places).tolist() == list(range(len(places)))


@settings(max_examples=100, deadline=None)
@given(masks(), st.data())
def test_places_that_are_read_become_rows(mask, data):
    read = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=mask.numel(), max_size=mask.numel())), dtype=torch.bool
    ).reshape(mask.shape).to(DEVICE)  # fmt: skip
    pools = data.draw(st.booleans())
    layout = packing.masked_layout(mask, read=read, pools=pools)
    outside = bool((read & (mask == 0)).any()) or (pools and mask.numel() > 0 and bool((mask[:, 0] == 0).any()))
    assert layout.explicit == outside
    if outside:
        assert layout.indices is None
        assert torch.equal(layout.bias[:, 0, 0] == 0, mask.bool())
        assert layout.bias.isfinite().all()
    elif pools and layout.indices is not None:
        places = torch.arange(mask.numel(), device=DEVICE).view(mask.shape)
        starts = torch.arange(mask.shape[0], device=DEVICE) * mask.shape[1]
        assert torch.equal(packing.pack(layout, places)[layout.first], starts)


def test_gradients_go_back_to_their_places_and_nowhere_else():
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]], device=DEVICE)
    layout = packing.masked_layout(mask)
    dense = torch.randn(3, 4, 2, device=DEVICE, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(dense)
    (packing.unpack(layout, packing.pack(layout, dense).square()) * weight).sum().backward()
    assert torch.allclose(dense.grad, (2 * dense * weight * mask[..., None]).detach())


def test_packed_layout_with_room_to_spare():
    cu_seqlens = torch.tensor([0, 3, 5, 5, 5], dtype=torch.int32, device=DEVICE)
    layout = packing.packed_layout(cu_seqlens, 3, 8)
    assert (layout.row_key[:5] & dropout_mask.MASK32).tolist() == [0, 1, 2, 0, 1]
    assert (layout.row_key[:5] >> 32).tolist() == [0, 0, 0, 1, 1]
    assert layout.first.tolist() == [0, 3, 5, 5]
    same = packing.same_sequence(layout)[0, 0]
    assert same[:3, :3].all()
    assert not same[:3, 3:].any()
    assert not same[3:5, 5:].any()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(0, 3), st.sampled_from([torch.int32, torch.int64])
)
def test_positions_that_begin_again_part_sequences(lengths, start, dtype):
    positions = torch.cat([torch.arange(start, start + n) for n in lengths]).to(DEVICE, dtype)
    layout = packing.flattened_layout(positions[None], 1)
    if len(lengths) == 1 or max(lengths) == 1:
        assert layout is None
        return
    assert layout.packed
    assert layout.cu_seqlens.diff().tolist() == lengths
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.max_seqlen == max(lengths)
    assert packing.flattened_layout(positions[None], 2) is None


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_a_mask_of_ones_is_the_full_layout(dtype):
    layout = packing.masked_layout(torch.ones(2, 3, dtype=dtype, device=DEVICE))
    assert layout.indices is None
    assert not layout.explicit
    assert torch.equal(layout.row_key, packing.full_layout(2, 3, torch.device(DEVICE)).row_key)
