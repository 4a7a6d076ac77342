"""Several sources as one stream: shares of tokens at every moment, and every source as if it were alone."""

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest

from bert_fast.data import PretrainingDataset, load_tokenizer, open_corpus
from bert_fast.data.graph_shapes import of_few_documents, sample_lengths
from bert_fast.data.loader import BatchMaker, load_updates, updates
from bert_fast.data.mixture import Mixture, start_of, stream_of
from bert_fast.data.phase import Phase
from bert_fast.data.places import place_of

SEQ = 32


@pytest.fixture(scope="module")
def mixture(prepared):
    """24 documents and six others, each with a random share of the tokens."""
    tokenizer = load_tokenizer(prepared / "data" / "tokenizer")
    datasets = [
        PretrainingDataset(open_corpus(prepared / name), tokenizer, max_length=SEQ, seed=5)
        for name in ("data", "other")
    ]
    shares = np.random.default_rng().dirichlet([2, 2]).clip(0.05, 0.95)
    return Mixture(("data", "other"), tuple(datasets), tuple((shares / shares.sum()).tolist()))


def alone(mixture, source: int, epoch: int) -> PretrainingDataset:
    """A source's samples of an epoch."""
    return mixture.datasets[source].replanned(epoch=epoch * len(mixture.datasets) + source)


def taken(stream, sizes) -> list[tuple[int, int]]:
    return [(int(e), int(i)) for size in sizes for update in [stream.take(0, size)] for e, i in zip(
        update.epochs, update.indices, strict=True)]  # fmt: skip


def test_the_tokens_are_as_the_shares_say_to_a_sample_at_every_moment(mixture):
    stream, tokens = stream_of(mixture, SEQ, start_of(mixture)), np.zeros(2)
    for size in np.random.default_rng().integers(1, 180, 200).tolist():
        update = stream.take(0, size)
        assert len(update) == size
        tokens += np.bincount(update.epochs % 2, update.lengths, minlength=2)
        assert update.after.tokens == tuple(tokens)
        assert abs(np.diff(tokens / mixture.shares)[0]) <= SEQ / min(mixture.shares)
    assert min(update.read) > 1  # each has been read through


def test_the_next_sample_is_of_the_source_that_is_furthest_behind(mixture):
    def of(source):
        for epoch in itertools.count():
            dataset = alone(mixture, source, epoch)
            for index in dataset.order().tolist():
                yield epoch * 2 + source, index, dataset.plan.length[index]

    sources, tokens, expected = [of(0), of(1)], [0, 0], []
    for _ in range(3 * sum(map(len, mixture.datasets))):
        source = int(np.argmin(np.divide(tokens, mixture.shares)))
        *sample, length = next(sources[source])
        expected.append(tuple(sample))
        tokens[source] += length
    for sizes in ([len(expected)], [1] * 100, [7] * (len(expected) // 7)):
        found = taken(stream_of(mixture, SEQ, start_of(mixture)), sizes)
        assert sorted(found) == sorted(expected[: sum(sizes)])  # an update's are ordered by source


def test_it_goes_on_from_any_place(mixture):
    phases = [Phase(SEQ, 0, 40, 37, 1e-3, 0, 0, 40), Phase(16, 40, 60, 21, 1e-3, 0, 0, 60)]
    whole = list(updates(mixture, phases, 0, start_of(mixture)))
    for cut in np.random.default_rng().integers(1, 60, 5).tolist():
        place = place_of(whole[cut - 1].after.as_dict())
        rest = updates(mixture, phases, cut, place.next_phase() if cut == 40 else place)
        for one, other in zip(rest, whole[cut:], strict=True):
            for name in ("epochs", "indices", "lengths", "rows"):
                assert np.array_equal(getattr(one, name), getattr(other, name))
            assert (one.after, one.read) == (other.after, other.read)


def test_every_sample_is_one_of_its_source_alone_and_once_an_epoch(mixture, prepared):
    """So a pair has both texts from one source."""
    phase = Phase(SEQ, 0, 12, 40, 1e-3, 0, 0, 12)
    maker = BatchMaker(mixture, [prepared / "data", prepared / "other"])
    works = load_updates(
        pickle.loads(pickle.dumps(maker)), updates(mixture, [phase], 0, start_of(mixture)), rank=0, ranks=1,
        tokens=512, workers=0, pin=False,
    )  # fmt: skip
    seen = Counter()
    for work in works:
        for slots, batch in zip(work.slots, work.batches, strict=True):
            ends = batch["cu_seq_lens_q"].tolist()
            by_slot = dict(zip(batch["sample_ids"].tolist(), itertools.pairwise(ends), strict=False))
            for slot in slots.tolist():
                key = int(work.update.epochs[slot]), int(work.update.indices[slot])
                seen[key] += 1
                sample = alone(mixture, key[0] % 2, key[0] // 2)[key[1]]
                begin, end = by_slot[slot]
                assert batch["input_ids"][0, begin:end].tolist() == sample.input_ids.tolist()
    assert max(seen.values()) == 1
    assert {key[0] % 2 for key in seen} == {0, 1}


def test_processes_have_the_samples_that_one_has_between_them(mixture, prepared):
    maker, phase = BatchMaker(mixture, [prepared / "data", prepared / "other"]), Phase(SEQ, 0, 5, 21, 1e-3, 0, 0, 5)

    def samples(rank: int, ranks: int) -> Counter:
        found = Counter()
        for work in load_updates(
            maker, updates(mixture, [phase], 0, start_of(mixture)), rank=rank, ranks=ranks, tokens=256, workers=0,
            pin=False,
        ):  # fmt: skip
            for batch in work.batches:
                ends = batch["cu_seq_lens_q"].tolist()
                for slot, (begin, end) in zip(batch["sample_ids"].tolist(), itertools.pairwise(ends), strict=False):
                    key = (work.update.step, slot, int(work.update.epochs[slot]), int(work.update.indices[slot]))
                    found[*key, batch["input_ids"][0, begin:end].numpy().tobytes()] += 1
        return found

    alone, shared = samples(0, 1), [samples(rank, 3) for rank in range(3)]
    assert sum(shared, Counter()) == alone
    assert max(alone.values()) == 1
    assert sum(alone.values()) == 5 * 21
    assert all(shared)


def test_equal_sources_have_different_pairs_and_masks(mixture):
    twice = Mixture(("a", "b"), (mixture.datasets[0],) * 2, (0.5, 0.5))
    update = stream_of(twice, SEQ, start_of(twice)).take(0, 64)
    rows = [{tuple(row) for row in update.rows[update.epochs == source].tolist()} for source in (0, 1)]
    offset = len(mixture.datasets[0].corpus.tokens)
    assert rows[0] != {(*(place - offset for place in row[:4]), row[4]) for row in rows[1]}


def test_one_source_is_read_as_without_a_mixture(mixture):
    only = Mixture(("a",), mixture.datasets[:1], (1.0,))
    phase = [Phase(SEQ, 0, 30, 33, 1e-3, 0, 0, 30)]
    for one, other in zip(
        updates(only, phase, 0, start_of(only)), updates(mixture.datasets[0], phase, 0, start_of(mixture.datasets[0])),
        strict=True,
    ):  # fmt: skip
        for name in ("epochs", "indices", "lengths", "masked", "rows"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


def test_lengths_for_shapes_are_in_proportion_as_well(mixture):
    lengths = sample_lengths(mixture, SEQ)
    own = [len(sample_lengths(dataset, SEQ)) for dataset in mixture.datasets]
    assert len(lengths) == pytest.approx(sum(own), abs=2)
    update = stream_of(mixture, SEQ, start_of(mixture)).take(0, 4 * len(lengths))
    assert lengths.mean() == pytest.approx(update.lengths.mean(), rel=0.03)
    assert len(of_few_documents(mixture).datasets) == 2
