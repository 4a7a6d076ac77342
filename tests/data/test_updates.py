"""Which samples form an update, and how they are dealt: all of them, once, whatever the ranks."""

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_fast.data import Capacities, PretrainingDataset, load_tokenizer, masked_count, open_corpus
from bert_fast.data.bins import deal, micro_batches
from bert_fast.data.loader import BatchMaker, Order, Parcel, load_updates, updates
from bert_fast.data.phase import Phase
from bert_fast.data.updates import Place, Stream

SEQ = 32


@pytest.fixture(scope="module")
def dataset(prepared):
    tokenizer = load_tokenizer(prepared / "data" / "tokenizer")
    return PretrainingDataset(open_corpus(prepared / "data"), tokenizer, max_length=SEQ, seed=3)


def of_epoch(dataset, epoch: int) -> PretrainingDataset:
    return dataset.replanned(epoch=epoch)


def phase(steps: int, batch: int, seq: int = SEQ, first: int = 0) -> Phase:
    return Phase(seq, first, first + steps, batch, 1e-3, 0, 0, first + steps)


def samples(works) -> list[tuple[int, int]]:
    return [pair for work in works for pair in zip(work.epochs.tolist(), work.indices.tolist(), strict=True)]


def test_updates_go_through_every_sample_of_an_epoch_once_and_on_into_the_next(dataset):
    sizes = [len(of_epoch(dataset, epoch)) for epoch in range(3)]
    batch = 48
    seen = Counter(samples(updates(dataset, [phase(sum(sizes) // batch + 1, batch)], 0, Place())))
    assert max(seen.values()) == 1
    for epoch, size in enumerate(sizes):
        assert {index for e, index in seen if e == epoch} == set(range(size))


def test_the_order_is_that_of_the_dataset(dataset):
    update = Stream(dataset, SEQ, Place(1, 5)).take(9, 20)
    second = of_epoch(dataset, 1)
    assert update.indices.tolist() == second.order()[5:25].tolist()
    assert update.lengths.tolist() == second.plan.length[update.indices].tolist()
    assert update.after == Place(1, 25)
    assert update.masked.tolist() == masked_count(update.lengths - 3).tolist()


def test_a_stream_goes_on_from_any_place(dataset):
    whole = list(updates(dataset, [phase(60, 48)], 0, Place()))
    for cut in (1, 17, 41):
        rest = list(updates(dataset, [phase(60, 48)], cut, whole[cut - 1].after))
        assert samples(rest) == samples(whole[cut:])
        assert [update.step for update in rest] == list(range(cut, 60))


def test_the_next_epoch_is_planned_meanwhile_and_its_errors_are_told(dataset, monkeypatch):
    stream = Stream(dataset, SEQ, Place())
    stream.take(0, len(stream.order) // 2 - 1)
    assert stream.next is None  # nothing is planned for a run that may not need it
    stream.take(1, 2)
    planned, order = stream.next.result()
    second = of_epoch(dataset, 1)
    assert planned.epoch == 1
    assert order.tolist() == second.order().tolist()
    assert planned.plan.a_start.tolist() == second.plan.a_start.tolist()
    stream.take(2, len(stream.order) // 2 + 1)
    assert stream.dataset is planned

    def fails(self, epoch):
        raise OSError("the disk is gone")

    monkeypatch.setattr(PretrainingDataset, "set_epoch", fails)
    with pytest.raises(OSError, match="the disk is gone"):
        stream.take(3, 2 * len(stream.order))


def test_an_update_larger_than_an_epoch(dataset):
    size = len(dataset)
    update = Stream(dataset, SEQ, Place()).take(0, 2 * size)
    assert len(set(samples([update]))) == 2 * size
    assert update.after.epoch >= 1


def test_a_phase_begins_a_new_epoch_at_its_own_length(dataset):
    found = list(updates(dataset, [phase(3, 8), phase(2, 4, seq=16, first=3)], 0, Place()))
    assert [update.seq for update in found] == [32, 32, 32, 16, 16]
    assert found[3].epochs.tolist() == [1] * 4
    assert max(found[3].lengths) <= 16
    assert samples(updates(dataset, [phase(3, 8), phase(2, 4, seq=16, first=3)], 3, Place(1, 0))) == samples(found[3:])


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(3, 512), min_size=1, max_size=200),
    ranks=st.integers(1, 9),
    tokens=st.integers(512, 4096),
)
def test_dealing_loses_nothing_and_balances(lengths, ranks, tokens):
    lengths = np.array(lengths)
    parts = deal(lengths, ranks)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
    sums = [int(lengths[part].sum()) for part in parts]
    assert max(sums) - min(sums) <= lengths.max()
    for part in filter(len, parts):
        batches = micro_batches(lengths, part, tokens)
        assert sorted(np.concatenate(batches).tolist()) == sorted(part.tolist())
        assert all(len(batch) and lengths[batch].sum() <= tokens for batch in batches)
        assert all((np.diff(lengths[batch]) <= 0).all() for batch in batches)  # attention begins with the longest


def test_many_sequences_balance_to_a_token_in_a_thousand():
    lengths = np.random.default_rng(0).integers(5, 128, 4096)
    sums = [lengths[part].sum() for part in deal(lengths, 8)]
    assert max(sums) - min(sums) <= sums[0] / 1000


def test_a_sequence_beyond_the_budget_is_refused():
    with pytest.raises(ValueError, match="40 tokens does not fit a micro-batch of 32"):
        micro_batches(np.array([40]), np.array([0]), 32)


@pytest.mark.parametrize(("ranks", "tokens", "workers"), [(1, 64, 0), (3, 96, 0), (1, 4096, 2)])
def test_batches_hold_the_updates_samples_whatever_ranks_and_workers(dataset, prepared, ranks, tokens, workers):
    steps, batch = 4, 30
    start = Place(0, len(dataset) - 40)  # the second update spans two epochs
    expected = list(updates(dataset, [phase(steps, batch)], 0, start))
    assert len(set(expected[1].epochs.tolist())) == 2
    epochs = [of_epoch(dataset, epoch) for epoch in range(3)]
    works = [
        list(
            load_updates(
                BatchMaker(dataset, prepared / "data"), updates(dataset, [phase(steps, batch)], 0, start),
                rank=rank, ranks=ranks, tokens=tokens, workers=workers, pin=False,
            )
        )
        for rank in range(ranks)
    ]  # fmt: skip
    for number, update in enumerate(expected):
        slots = []
        for work in itertools.chain.from_iterable(rank[number : number + 1] for rank in works):
            for members, made in zip(work.slots, work.batches, strict=True):
                assert made["cu_seq_lens_q"].diff().tolist() == update.lengths[members].tolist()
                assert made["sample_ids"].tolist() == members.tolist()
                assert made["input_ids"].shape[1] % 64 == 0
                ids = made["input_ids"][0].tolist()
                for slot, begin in zip(members.tolist(), made["cu_seq_lens_q"].tolist()[:-1], strict=True):
                    sample = epochs[update.epochs[slot]][update.indices[slot]]
                    assert ids[begin : begin + len(sample.input_ids)] == sample.input_ids.tolist()
                slots += members.tolist()
        assert sorted(slots) == list(range(batch))


def test_a_batch_of_whole_words_has_room_for_as_many_as_are_drawn(prepared):
    """What was expected of them is a size; a batch that has more gets a larger one, and no mask is lost."""
    tokenizer = load_tokenizer(prepared / "data" / "tokenizer")
    whole = PretrainingDataset(open_corpus(prepared / "data"), tokenizer, max_length=SEQ, whole_word=True)
    sizes = set()
    works = load_updates(
        BatchMaker(whole),
        updates(whole, [phase(40, 5)], 0, Place()),
        rank=0,
        ranks=1,
        tokens=4096,
        workers=0,
        pin=False,
    )
    for work in works:
        (batch,) = work.batches
        made = (batch["masked_labels"] != -100).sum()
        if work.update.epochs.max() == 0:
            assert made == whole.predicted(work.update.indices).sum()
        expected = -(-work.update.masked.sum() // 16) * 16
        assert len(batch["masked_labels"]) == max(expected, -(-int(made) // 16) * 16)
        sizes.add(len(batch["masked_labels"]) > expected)
    assert sizes == {False, True}


def test_a_worker_opens_the_corpus_itself(dataset, prepared):
    """What travels to a worker that was not forked has neither corpus nor plan, and makes the same batches."""
    maker = BatchMaker(dataset, prepared / "data")
    update = Stream(dataset, SEQ, Place(2)).take(0, 9)
    order = Order(np.arange(9), update.epochs, update.indices, update.rows, Capacities(512, 9, 80), update.mask_prob)
    travelled, whole = pickle.dumps(maker), pickle.dumps(dataset)
    for kind in (b"Corpus", b"Plan"):
        assert kind in whole
        assert kind not in travelled
    expected, made = maker[order], pickle.loads(travelled)[order]
    assert list(made) == list(expected)
    assert all((made[name] == value).all() for name, value in expected.items() if isinstance(value, torch.Tensor))


def test_a_batch_travels_as_one_block(dataset, prepared):
    """Between processes one tensor is handed over, and the batch is what was made: names, dtypes, shapes, numbers."""
    maker = BatchMaker(dataset, prepared / "data")
    update = Stream(dataset, SEQ, Place()).take(0, 7)
    order = Order(np.arange(7), update.epochs, update.indices, update.rows, Capacities(256, 9, 48), update.mask_prob)
    batch = maker[order]
    opened = Parcel.of(batch).opened()
    assert list(opened) == list(batch)
    for name, value in batch.items():
        if isinstance(value, int):
            assert opened[name] == value
            continue
        assert (opened[name].dtype, opened[name].shape) == (value.dtype, value.shape)
        assert (opened[name] == value).all()
        assert opened[name].data_ptr() % Parcel.ALIGNMENT == 0
    assert len({value.untyped_storage().data_ptr() for value in opened.values() if not isinstance(value, int)}) == 1
    assert {value.dtype for value in opened.values() if not isinstance(value, int)} == {torch.int32, torch.int64}
