"""Samples made many at a time against the same written down for one, token by token."""

from dataclasses import replace

import numpy as np
import pytest
from torch.utils.data import DataLoader

from bert_fast.data import PretrainingCollator, PretrainingDataset
from bert_fast.data.masking import choose_tokens, choose_words, masked_count
from bert_fast.data.samples import random_words


def by_the_book(dataset, index):
    """(input_ids, token_type_ids, masked_positions, masked_labels) in plain Python."""
    plan, ends, tokens = dataset.plan, dataset.corpus.sentence_ends, dataset.corpus.tokens.tolist()
    source = np.random.Philox(key=np.array([dataset.seed % 2**64, dataset.epoch << 32 | index], dtype=np.uint64))
    texts = [tokens[ends[plan.a_start[index]] : ends[plan.a_end[index]]]]
    if dataset.nsp:
        texts.append(tokens[ends[plan.b_start[index]] : ends[plan.b_end[index]]])
    kept = [len(text) for text in texts]
    while sum(kept) > dataset.max_length - len(texts) - 1:
        kept[kept.index(max(kept)) if kept[0] != kept[-1] else -1] -= 1
    cuts = [len(text) - left for text, left in zip(texts, kept, strict=True)]
    words = source.random_raw((sum(cuts) + 63) // 64).astype("<u8")
    coins = np.unpackbits(words.view(np.uint8)).tolist()
    ids, segments, begins = [dataset.special.cls], [0], [False]
    for number, (text, cut) in enumerate(zip(texts, cuts, strict=True)):
        front, coins = sum(coins[:cut]), coins[cut:]
        text = text[front : len(text) - (cut - front)]
        goes_on = [False if dataset.continues is None else bool(dataset.continues[token]) for token in text]
        ids += [*text, dataset.special.sep]
        segments += [number] * (len(text) + 1)
        begins += [True, *(not piece for piece in goes_on[1:]), False]
    real = [place for place, token in enumerate(ids) if token not in (dataset.special.cls, dataset.special.sep)]
    keys = dict(zip(real, source.random_raw(len(real)).tolist(), strict=True))
    units = []
    for place in real:
        if begins[place] or dataset.continues is None:
            units.append([])
        units[-1].append(place)
    chosen, wanted = [], int(masked_count(len(real)))
    bits = source.random_raw(wanted).tolist()
    for unit in sorted(units, key=lambda unit: keys[unit[0]]):
        if len(chosen) + len(unit) <= wanted:
            chosen += unit
    chosen.sort()
    labels = [ids[place] for place in chosen]
    for place, word in zip(chosen, bits, strict=False):
        case, drawn = (word & 0xFFFFFFFF) / 2**32, (word >> 32) * dataset.vocab_size >> 32
        ids[place] = dataset.special.mask if case < 0.8 else drawn if case < 0.9 else ids[place]
    return ids, segments, chosen, labels


@pytest.mark.parametrize(
    ("max_length", "options"),
    [(128, {}), (32, {}), (512, {"nsp": False}), (64, {"whole_word": True}), (48, {"nsp": False, "whole_word": True})],
)
def test_samples_are_those_of_the_definition(corpus, tokenizer, max_length, options):
    dataset = PretrainingDataset(corpus, tokenizer, max_length=max_length, seed=-3, **options)
    dataset.set_epoch(2)
    indices = np.concatenate([[len(dataset) - 1, 0, 7, 7], dataset.order()[:60]])
    for index, made in zip(indices.tolist(), dataset.__getitems__(indices), strict=True):
        expected = by_the_book(dataset, index)
        assert [values.tolist() for values in made[:4]] == [list(values) for values in expected]
        assert all(values.dtype == np.int64 for values in made[:4])
        assert made.index == index
        assert made.next_sentence_label == dataset.plan.label[index]
        for values, alone in zip(made[:4], dataset[index][:4], strict=True):
            np.testing.assert_array_equal(values, alone)


def test_a_sample_owns_its_memory(corpus, tokenizer):
    dataset = PretrainingDataset(corpus, tokenizer, max_length=64)
    first, second = dataset.__getitems__([0, 1])
    before = second.input_ids.copy()
    first.input_ids[:] = -1
    np.testing.assert_array_equal(second.input_ids, before)
    assert (dataset[0].input_ids >= 0).all()


def test_bad_indices_are_named(corpus, tokenizer):
    dataset = PretrainingDataset(corpus, tokenizer, max_length=64)
    for bad in (-1, len(dataset)):
        with pytest.raises(IndexError, match=f"sample {bad} of {len(dataset)}"):
            dataset[bad]


def test_dataloader_asks_for_many_at_a_time(corpus, tokenizer):
    dataset = PretrainingDataset(corpus, tokenizer, max_length=64)
    collate = PretrainingCollator(tokenizer)
    batch = next(iter(DataLoader(dataset, batch_size=8, collate_fn=collate)))
    expected = collate([dataset[index] for index in range(8)])
    assert all((batch[name] == expected[name]).all() for name in expected)


def test_random_words_are_philox():
    counts = np.array([5, 1, 130, 0, 4])
    indices = np.array([9, 0, 2**31, 4, 9])
    words = random_words(-1, 3, indices, counts)
    expected = [
        np.random.Philox(key=np.array([2**64 - 1, 3 << 32 | index], dtype=np.uint64)).random_raw(count)
        for index, count in zip(indices.tolist(), counts.tolist(), strict=True)
    ]
    np.testing.assert_array_equal(words, np.concatenate(expected))


def test_of_equal_keys_the_first_win():
    keys = np.array([5] * 20 + [2**64 - 1] * 10 + [3, 1, 2], dtype=np.uint64)
    chosen = choose_tokens(keys, np.array([20, 10, 3]))
    assert np.flatnonzero(chosen).tolist() == [0, 1, 2, 20, 21, 31]


def test_words_that_do_not_fit_are_passed_over():
    begins = np.array([1, 0, 0, 1] + [1] * 6 + [1] + [0] * 9, dtype=bool)
    keys = np.arange(20, dtype=np.uint64)
    chosen = choose_words(keys, np.array([10, 10]), begins)  # 2 of each sample's 10
    assert np.flatnonzero(chosen).tolist() == [3, 4]


def test_shards_are_read_where_samples_are_made(corpus, tokenizer):
    """A corpus that knows slices alone, as shards do, and none past its end."""

    class Slices:
        def __getitem__(self, which):
            assert 0 <= which.start < which.stop <= len(corpus.tokens)
            return corpus.tokens[which]

    dataset = PretrainingDataset(replace(corpus, tokens=Slices()), tokenizer, max_length=96, nsp=False)
    whole = PretrainingDataset(corpus, tokenizer, max_length=96, nsp=False)
    last = len(dataset) - 1
    np.testing.assert_array_equal(dataset[last].input_ids, whole[last].input_ids)
