"""Draws on a real corpus against their distributions, finer than test_samples does: chi-squared, fixed seeds."""

import math

import numpy as np
import pytest

from bert_fast.data import Corpus, PretrainingDataset, plan_epoch
from tests.support.chi_squared import assert_alike, assert_fits

EPOCHS = 4
SAMPLES = 800  # of each epoch


@pytest.fixture(scope="module")
def drawn(corpus, tokenizer):
    """(dataset, plans, samples of full length) of several epochs; every token is a sentence, so most are full."""
    ends = np.asarray(corpus.sentence_ends)
    corpus = Corpus(corpus.tokens, np.arange(ends[-1] + 1), ends[corpus.documents])
    dataset = PretrainingDataset(corpus, tokenizer, max_length=128, seed=11)
    plans, samples = [], []
    for epoch in range(EPOCHS):
        dataset.set_epoch(epoch)
        plans.append(dataset.plan)
        if epoch < 3:
            samples += [dataset[i] for i in np.flatnonzero(dataset.plan.length == 128)[:SAMPLES]]
    return dataset, plans, samples


def test_masked_positions_are_uniform(drawn):
    _, _, samples = drawn
    first_sep = np.array([int((sample.token_type_ids == 0).sum()) - 1 for sample in samples])
    rank = [s.masked_positions - 1 - (s.masked_positions > sep) for s, sep in zip(samples, first_sep, strict=True)]
    assert {len(one) for one in rank} == {19}  # round(0.15 * 125)
    counts = np.bincount(np.concatenate(rank), minlength=125)
    assert len(counts) == 125
    # 19 of 125 are drawn without putting back, so a position's count varies as a binomial one
    expected = len(samples) * 19 / 125
    assert expected > 100
    statistic = ((counts - expected) ** 2 / expected).sum() / (1 - 19 / 125) * (124 / 125)
    assert abs(statistic - 124) < 5 * math.sqrt(2 * 124), statistic


def test_replaced_tokens_are_uniform_over_the_vocabulary(drawn):
    dataset, _, samples = drawn
    seen = np.concatenate([sample.input_ids[sample.masked_positions] for sample in samples])
    labels = np.concatenate([sample.masked_labels for sample in samples])
    replaced = seen[(seen != dataset.special.mask) & (seen != labels)]
    bins = np.bincount(replaced * 100 // dataset.vocab_size, minlength=100)
    assert_fits(bins, np.bincount(dataset.vocabulary * 100 // dataset.vocab_size))
    # and whatever token it replaces
    common = np.argsort(np.bincount(labels))[-20:]
    cases = np.stack([seen == dataset.special.mask, seen == labels], axis=1)
    for token in common:
        masked, kept = cases[labels == token].sum(axis=0)
        total = int((labels == token).sum())
        assert_fits([masked, kept, total - masked - kept], [0.8, 0.1, 0.1])


def test_other_documents_texts_lie_where_those_that_follow_an_a_do(drawn):
    """In as many of each document's places, in which they cannot be told from a B that follows."""
    dataset, plans, _ = drawn
    document, b_document, start, label = (
        np.concatenate([getattr(plan, name) for plan in plans])
        for name in ("document", "b_document", "b_start", "label")
    )
    assert (document != b_document)[label == 1].all()
    counts = np.stack([np.bincount(b_document[label == k], minlength=len(dataset.corpus.documents)) for k in (0, 1)])
    of_all = counts[0] / counts[0].sum()  # of one that has many, its own pairs take none
    some = (of_all < 0.04) & (counts.sum(axis=0) >= 20)
    assert some.sum() > 20
    assert_alike(*counts[:, some])
    first, last = dataset.corpus.documents[b_document].T
    tenth = (start - first) * 10 // (last - first)
    assert_alike(*(np.bincount(tenth[(label == k) & (last - first >= 20)], minlength=10) for k in (0, 1)))


def test_labels_are_even_wherever_the_pair_stands(drawn):
    _, plans, _ = drawn
    label = np.concatenate([plan.label for plan in plans])
    first = np.concatenate([np.diff(plan.document, prepend=-1) != 0 for plan in plans])
    assert_fits([(label == 0).sum(), (label == 1).sum()], [0.5, 0.5])
    assert_fits([(label[first] == 0).sum(), (label[first] == 1).sum()], [0.5, 0.5])


def test_one_in_ten_targets_is_shorter_and_uniform():
    # sentences of one token, so that a sample has exactly the tokens of its target; long documents, so none ends it
    documents = np.arange(500)[:, None] * 1000 + [0, 1000]
    corpus = Corpus(np.zeros(500_000, np.uint16), np.arange(500_001), documents)
    for probability in (0.1, 1.0):
        plan = plan_epoch(corpus, seed=3, epoch=0, max_length=67, short_seq_prob=probability)
        room = documents[plan.document, 1] - plan.a_start, documents[plan.b_document, 1] - plan.b_start
        inside = (room[0] > 64) & ((plan.label == 0) | (room[1] > 64))  # known before the target is drawn
        counts = np.bincount(plan.length[inside] - 3, minlength=65)
        assert counts[:2].sum() == 0
        short = probability / 63  # 2 .. 64 tokens alike
        assert_fits(counts[2:], [short] * 62 + [1 - probability + short])


@pytest.mark.parametrize(
    ("mask_prob", "shares"), [(0.3, (0.6, 0.3, 0.1)), (0.4, (1.0, 0.0, 0.0)), (0.07, (0, 0.5, 0.5))]
)
def test_other_rates_and_shares(drawn, corpus, tokenizer, mask_prob, shares):
    """As many tokens as the rate says, those of a lower rate among them, replaced by the shares."""
    options = {"max_length": 128, "seed": 11, "mask_shares": shares}
    dataset = PretrainingDataset(corpus, tokenizer, mask_prob=mask_prob, **options)
    lower = PretrainingDataset(corpus, tokenizer, mask_prob=mask_prob / 2, **options)
    samples, fewer = (d.__getitems__(range(600)) for d in (dataset, lower))
    for sample, part in zip(samples, fewer, strict=True):
        n = len(sample.input_ids) - 3
        assert len(sample.masked_positions) == max(1, round(mask_prob * n))
        assert len(part.masked_positions) == max(1, round(mask_prob / 2 * n))
        assert set(part.masked_positions) <= set(sample.masked_positions)
    seen = np.concatenate([sample.input_ids[sample.masked_positions] for sample in samples])
    labels = np.concatenate([sample.masked_labels for sample in samples])
    assert not np.isin(seen[(seen != dataset.special.mask) & (seen != labels)], list(dataset.special)).any()
    masked, kept = int((seen == dataset.special.mask).sum()), int((seen == labels).sum())
    found = np.array([masked, len(seen) - masked - kept, kept])
    possible = np.array(shares) > 0
    assert not found[~possible].any()
    if possible.sum() > 1:
        assert_fits(found[possible], np.array(shares)[possible])


@pytest.mark.parametrize("wrong", [{"mask_prob": 0.0}, {"mask_prob": 1}, {"mask_shares": (0.8, 0.1)},
                                   {"mask_shares": (0.9, 0.2, -0.1)}, {"mask_shares": (0.8, 0.1, 0.2)}])  # fmt: skip
def test_what_is_no_share_is_refused(corpus, tokenizer, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PretrainingDataset(corpus, tokenizer, **wrong)
