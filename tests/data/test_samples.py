"""Masks and batches: distributions on a real corpus, purity, and packed against padded; pairs are test_pairs.py's."""

import dataclasses

import numpy as np
import pytest

from bert_fast.data import (
    Corpus,
    PackedBatches,
    PretrainingCollator,
    PretrainingDataset,
    capacities,
    draw_wikipedia_lengths,
    masked_count,
    pack_samples,
    packed_loader,
    plan_batches,
)
from bert_fast.data.pairs import permutation
from tests.support.chi_squared import assert_fits

EPOCHS = 4


@pytest.fixture(scope="module")
def dataset(corpus, tokenizer):
    return PretrainingDataset(corpus, tokenizer, max_length=128, seed=7)


@pytest.fixture(scope="module")
def samples(dataset):
    """(plan, samples) of several epochs."""
    out = []
    for epoch in range(EPOCHS):
        dataset.set_epoch(epoch)
        out.append((dataset.plan, [dataset[i] for i in range(len(dataset))]))
    dataset.set_epoch(0)
    return out


def restored(sample):
    ids = sample.input_ids.copy()
    ids[sample.masked_positions] = sample.masked_labels
    return ids


def test_samples_hold_the_text_of_their_plan(samples, corpus, dataset):
    others = []
    for plan, drawn in samples:
        others.append(plan.b_document[plan.label == 1])
        for i, sample in enumerate(drawn):
            ids = restored(sample)
            assert len(ids) == plan.length[i] <= 128
            seps = np.flatnonzero(ids == dataset.special.sep)
            assert ids[0] == dataset.special.cls
            assert len(seps) == 2
            assert seps[1] == len(ids) - 1
            assert (sample.token_type_ids == (np.arange(len(ids)) > seps[0])).all()
            assert (ids[1 : seps[0]] == corpus.tokens[plan.a_start[i] : plan.a_end[i]]).all()
            assert (ids[seps[0] + 1 : -1] == corpus.tokens[plan.b_start[i] : plan.b_end[i]]).all()
            assert sample.next_sentence_label == plan.label[i]
    # another document is drawn evenly; the few that A comes from most are drawn a little less
    assert len(np.unique(np.concatenate(others))) > 0.9 * len(corpus.documents)


def test_masks(samples, dataset, tokenizer):
    cases, replaced, where = np.zeros(3), [], []
    for _, drawn in samples:
        for sample in drawn:
            n = len(sample.input_ids) - 3
            k = len(sample.masked_positions)
            assert k == max(1, round(0.15 * n)) == masked_count(n)
            assert (np.diff(sample.masked_positions) > 0).all()
            ids = restored(sample)
            assert not np.isin(ids[sample.masked_positions], [dataset.special.cls, dataset.special.sep]).any()
            seen = sample.input_ids[sample.masked_positions]
            mask = seen == dataset.special.mask
            kept = seen == sample.masked_labels
            cases += [mask.sum(), (~mask & ~kept).sum(), kept.sum()]
            replaced.append(seen[~mask & ~kept])
            if n >= 50:
                real = np.setdiff1d(
                    np.arange(len(ids)), np.flatnonzero(np.isin(ids, [dataset.special.cls, dataset.special.sep]))
                )
                where.append(np.searchsorted(real, sample.masked_positions) / n)
    v = dataset.vocab_size
    assert_fits(cases, [0.8 + 0.1 / v, 0.1 * (1 - 2 / v), 0.1 + 0.1 / v])
    assert_fits(np.bincount(np.concatenate(replaced) * 30 // v, minlength=30), np.ones(30))
    counts = np.histogram(np.concatenate(where), bins=5, range=(0, 1))[0]
    assert np.abs(counts / counts.sum() - 0.2).max() < 0.01


def test_pure_in_seed_epoch_index(corpus, tokenizer, samples):
    again = PretrainingDataset(corpus, tokenizer, max_length=128, seed=7)
    again.set_epoch(2)
    for i in (len(again) - 1, 5, 0):  # in any order
        for ours, before in zip(again[i], samples[2][1][i], strict=True):
            np.testing.assert_array_equal(ours, before)
    first, second = samples[0][1], samples[1][1]
    assert any(len(a.input_ids) != len(b.input_ids) for a, b in zip(first, second, strict=False))
    other = PretrainingDataset(corpus, tokenizer, max_length=128, seed=8)
    assert not np.array_equal(other.plan.label[:64], samples[0][0].label[:64])
    order = permutation(1000, seed=1, epoch=0)
    assert sorted(order) == list(range(1000))
    assert not np.array_equal(order, permutation(1000, seed=1, epoch=1))


def test_planned_anew_it_is_the_dataset_made_so(corpus, tokenizer):
    """Of another epoch, length and corpus; the one that was asked goes on as it was."""
    dataset = PretrainingDataset(corpus, tokenizer, max_length=128, seed=7)
    dataset.set_epoch(1)
    few = dataclasses.replace(corpus, documents=corpus.documents[::3])
    before, other = dataset[5], dataset.replanned(epoch=2, max_length=48, corpus=few)
    made = PretrainingDataset(few, tokenizer, max_length=48, seed=7)
    made.set_epoch(2)
    assert len(other) == len(made) != len(dataset)
    assert (other.order() == made.order()).all()
    for ours, expected in zip((*other[3], *dataset[5]), (*made[3], *before), strict=True):
        np.testing.assert_array_equal(ours, expected)
    assert (dataset.epoch, dataset.max_length, dataset.corpus) == (1, 128, corpus)
    assert dataset.replanned().epoch == 0


def test_whole_words(corpus, tokenizer):
    dataset = PretrainingDataset(corpus, tokenizer, max_length=64, whole_word=True)
    cases = np.zeros(3)
    total = wanted = 0
    for sample in dataset.__getitems__(range(len(dataset))):
        ids, chosen = restored(sample), set(sample.masked_positions.tolist())
        total, wanted = total + len(chosen), wanted + int(masked_count(len(ids) - 3))
        for p in range(2, len(ids) - 1):
            before_is_special = ids[p - 1] in (dataset.special.cls, dataset.special.sep)
            if dataset.continues[ids[p]] and not before_is_special:
                assert (p in chosen) == (p - 1 in chosen)
        seen = sample.input_ids[sample.masked_positions]
        mask, kept = seen == dataset.special.mask, seen == sample.masked_labels
        cases += [mask.sum(), (~mask & ~kept).sum(), kept.sum()]
    assert abs(total - wanted) < 5 * 2 * len(dataset) ** 0.5  # two tokens a sample are a standard deviation
    assert_fits(cases, [0.8, 0.1, 0.1])


@pytest.mark.parametrize("whole_word", [False, True])
def test_packed_batches_hold_whole_words_however_many_are_drawn(corpus, tokenizer, whole_word):
    dataset = PretrainingDataset(corpus, tokenizer, max_length=32, whole_word=whole_word)
    for size in (capacities(32, 32, 1, whole_word=whole_word), capacities(300, 32, whole_word=whole_word)):
        batches = PackedBatches(dataset, size, limit=600)
        order = dataset.order()[:600]
        assert sorted(np.concatenate(batches.bins)) == sorted(order)
        made = [(batch["masked_labels"] != -100).sum() for batch in packed_loader(batches, workers=0)]
        assert sum(made) == dataset.predicted(order).sum()


def test_without_nsp_there_is_no_second_text(corpus, tokenizer):
    dataset = PretrainingDataset(corpus, tokenizer, max_length=64, nsp=False)
    sample = dataset[3]
    assert sample.next_sentence_label == -100
    assert not sample.token_type_ids.any()
    assert "next_sentence_label" not in PretrainingCollator(tokenizer)([sample])


def test_packing_wastes_under_one_percent():
    lengths = draw_wikipedia_lengths(20_000, seed=3)
    for budget in (4096, 16384):
        size = capacities(budget, 512)
        order = permutation(len(lengths), seed=0, epoch=0)
        bins = plan_batches(lengths, order, size)
        assert sorted(np.concatenate(bins)) == list(range(len(lengths)))
        for members in bins:
            assert lengths[members].sum() <= size.tokens
            assert len(members) <= size.sequences
            assert masked_count(lengths[members] - 3).sum() <= size.masked
        assert 1 - lengths.sum() / (len(bins) * budget) < 0.01
    with pytest.raises(ValueError, match="budget"):
        plan_batches(np.array([9, 99]), [0, 1], capacities(50, 50))


def test_packed_equals_padded(dataset, tokenizer):
    size = capacities(1024, 128)
    chosen = [dataset[i] for i in (3, 0, 8, 5)]
    padded = PretrainingCollator(tokenizer)(chosen)
    packed = pack_samples(chosen, size, pad_id=dataset.special.pad)
    real = padded["attention_mask"].bool()
    lengths = padded["attention_mask"].sum(1)
    total = int(lengths.sum())
    for name in ("input_ids", "token_type_ids"):
        assert (packed[name][0, :total] == padded[name][real]).all()
    assert (packed["position_ids"][0, :total] == real.cumsum(1)[real] - 1).all()
    assert packed["cu_seq_lens_q"].tolist() == [0, *lengths.cumsum(0).tolist()] + [total] * (size.sequences - 4)
    assert packed["max_length_q"] == int(lengths.max())
    labels = np.full(size.tokens, -100)
    k = int((packed["masked_labels"] != -100).sum())
    labels[packed["masked_positions"][:k]] = packed["masked_labels"][:k]
    assert (labels[:total] == padded["labels"][real].numpy()).all()
    assert k == int((padded["labels"] != -100).sum())
    assert (packed["masked_labels"][k:] == -100).all()
    assert packed["cls_positions"][:4].tolist() == packed["cu_seq_lens_q"][:4].tolist()
    assert packed["next_sentence_label"].tolist() == padded["next_sentence_label"].tolist() + [-100] * (
        size.sequences - 4
    )
    assert packed["sample_ids"][:4].tolist() == [3, 0, 8, 5]
    with pytest.raises(ValueError, match="do not fit"):
        pack_samples(chosen * 20, size, pad_id=0)


def test_loader_gives_the_same_with_workers(dataset):
    batches = PackedBatches(dataset, capacities(4096, 128))
    assert sorted(np.concatenate(batches.bins)) == list(range(len(dataset)))
    for made, direct in zip(
        packed_loader(batches, batch_indices=[4, 1], workers=1), (batches[4], batches[1]), strict=True
    ):
        assert all((np.asarray(made[name]) == np.asarray(direct[name])).all() for name in direct)


def test_bad_corpora(corpus, tokenizer):
    with pytest.raises(ValueError, match="two documents"):
        PretrainingDataset(Corpus(corpus.tokens, corpus.sentence_ends, corpus.documents[:1]), tokenizer)
    words = Corpus(np.arange(9), np.arange(10), np.arange(9)[:, None] + [0, 1])
    with pytest.raises(ValueError, match="no document has two tokens"):
        PretrainingDataset(words, tokenizer)
    assert len(PretrainingDataset(words, tokenizer, nsp=False)) == 9
    for max_length, nsp in ((5, True), (3, False)):
        with pytest.raises(ValueError, match=f"max_length {max_length}"):
            PretrainingDataset(corpus, tokenizer, max_length=max_length, nsp=nsp)
