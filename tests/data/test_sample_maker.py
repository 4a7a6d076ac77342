"""Samples made many at a time against the same written down for one, token by token."""

from dataclasses import replace

import numpy as np
import pytest
from torch.utils.data import DataLoader

from bert_fast.data import PretrainingCollator, PretrainingDataset
from bert_fast.data.masking import choose_tokens, choose_words, masked_count
from bert_fast.data.samples import random_words
from tests.support.chi_squared import assert_fits


def by_the_book(dataset, index):
    """(input_ids, token_type_ids, masked_positions, masked_labels) in plain Python."""
    plan, tokens = dataset.plan, dataset.corpus.tokens.tolist()
    source = np.random.Philox(key=np.array([dataset.seed % 2**64, dataset.epoch << 32 | index], dtype=np.uint64))
    texts = [tokens[plan.a_start[index] : plan.a_end[index]], tokens[plan.b_start[index] : plan.b_end[index]]]
    ids, segments, begins = [dataset.special.cls], [0], [False]
    for number, text in enumerate(texts if dataset.nsp else texts[:1]):
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
    units.sort(key=lambda unit: keys[unit[0]])
    wanted = int(masked_count(len(real)))
    if dataset.continues is None:
        chosen = sorted(place for (place,) in units[:wanted])
        bits = dict(zip(chosen, source.random_raw(wanted).tolist(), strict=True))
    else:  # the words that begin within so many tokens from a random one on, around a circle
        bits = dict(zip(real, source.random_raw(len(real)).tolist(), strict=True))
        turn = (source.random_raw() >> 32) * len(real) >> 32
        ahead = np.cumsum([0, *(len(unit) for unit in units)]).tolist()
        taken = [unit for unit, before in zip(units, ahead, strict=False) if (before + turn) % len(real) < wanted]
        chosen = sorted(place for unit in taken for place in unit)
    labels = [ids[place] for place in chosen]
    for place in chosen:
        case, drawn = (bits[place] & 0xFFFFFFFF) / 2**32, (bits[place] >> 32) * len(dataset.vocabulary) >> 32
        ids[place] = dataset.special.mask if case < 0.8 else dataset.vocabulary[drawn] if case < 0.9 else ids[place]
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
    chosen = choose_tokens(keys, np.array([20, 10, 3]), np.array([3, 2, 1]))
    assert np.flatnonzero(chosen).tolist() == [0, 1, 2, 20, 21, 31]


@pytest.mark.parametrize(("tokens", "mask_prob"), [(29, 0.15), (61, 0.15), (125, 0.15), (509, 0.15), (61, 0.4)])
def test_words_of_every_length_have_the_same_chance(tokens, mask_prob):
    """Chi-squared over the lengths 1 to 14, at 29 tokens three times what is predicted of them."""
    generator = np.random.default_rng(tokens)
    samples = 400_000 // tokens
    counts, begins, sizes = np.full(samples, tokens), np.zeros((samples, tokens), dtype=bool), []
    for row in begins:
        ends = np.cumsum(generator.integers(1, 15, tokens))
        row[[0, *ends[ends < tokens]]] = True
        sizes.append(np.diff(np.flatnonzero(row), append=tokens))
    sizes = np.concatenate(sizes)
    keys = generator.integers(0, 2**64, samples * tokens, dtype=np.uint64)
    wanted = masked_count(counts, mask_prob)
    chosen = choose_words(keys, generator.integers(0, tokens, samples), counts, wanted, begins.ravel())
    first = np.flatnonzero(begins.ravel())
    np.testing.assert_array_equal(np.repeat(chosen[first], sizes), chosen)  # whole words
    taken, all_of_them = (np.bincount(of, minlength=15)[1:] for of in (sizes[chosen[first]], sizes))
    assert_fits(taken, all_of_them)
    assert (
        abs(chosen.mean() - wanted[0] / tokens) < 5 * 4 / tokens / samples**0.5
    )  # four tokens a sample are a standard deviation
    assert chosen.reshape(samples, tokens).sum(axis=1).max() < wanted[0] + 14


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
