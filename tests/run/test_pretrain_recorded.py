"""Runs whose step is recorded: the bits of eager ones over phases and a resume; few shapes; what is told."""

import dataclasses

import numpy as np
import pytest
import torch

from bert_fast.data import PretrainingDataset, load_tokenizer, masked_count, open_corpus
from bert_fast.data.bins import fitted
from bert_fast.data.graph_shapes import example, phase_sizes, sample_lengths
from bert_fast.data.updates import Place, Stream
from bert_fast.train import cuda_graphs, recorded
from bert_fast.train.recorded import RecordedStep
from bert_fast.train.step import Step
from tests.support.parity import DEVICE
from tests.support.recorded_runs import Rerun
from tests.support.training_runs import losses, train, weights

PHASES = {"phases": "16:5:batch=8,32:7:batch=6", "micro_tokens": 64}


@pytest.fixture
def recorders(monkeypatch) -> list:
    """Those of the runs to come: the real ones where there is a GPU, else their stand-ins."""
    made = []
    kind = cuda_graphs.Recorder if DEVICE == "cuda" else Rerun

    def new(parameters):
        made.append(kind(parameters))
        return made[-1]

    monkeypatch.setattr(recorded, "Recorder", new)
    monkeypatch.setattr(recorded, "recordable", lambda ranks: True)
    return made


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


@pytest.mark.parametrize("options", [{}, {"nsp": False, "whole_word": True, "optimizer": "lamb", "precision": "bf16"}])
def test_recorded_and_eager_runs_are_the_same_bit_for_bit(configure, tmp_path, recorders, monkeypatch, options):
    """Over a phase change, and with a kill and a resume, recorded before it and eager after it and the other way."""
    options = {"device": DEVICE, **PHASES, **options}
    eager = configure(out=str(tmp_path / "eager"), capture=False, **options)
    assert train(eager) == 0
    assert recorders == []
    whole = configure(out=str(tmp_path / "whole"), **options)
    counts = []
    prepare = RecordedStep.prepare

    def counting(self, examples):
        counts.append(self.captured)
        prepare(self, examples)

    monkeypatch.setattr(RecordedStep, "prepare", counting)
    assert train(whole) == 0
    assert len(recorders) == 1
    assert len(counts) == 2  # one phase after the other
    assert counts[1] >= 2
    assert weights(whole, 12) == weights(eager, 12)
    assert losses(whole) == losses(eager)
    for first, then in ((True, False), (False, True), (True, True)):
        config = configure(out=str(tmp_path / f"{first}-{then}"), capture=first, **options)
        with monkeypatch.context() as patch:
            kind = RecordedStep if first else Step
            apply, done = kind.__call__, []

            def dying(self, *args, apply=apply, done=done, **kwargs):
                if len(done) == 7:
                    raise Killed
                done.append(1)
                return apply(self, *args, **kwargs)

            patch.setattr(kind, "__call__", dying)
            with pytest.raises(Killed):
                train(config)
        assert train(dataclasses.replace(config, capture=then)) == 0
        assert weights(config, 12) == weights(eager, 12)
        assert losses(config) == losses(eager)


@pytest.mark.skipif(DEVICE == "cuda", reason="the stand-in's")
def test_a_recording_that_fails_is_told_once_and_the_run_goes_on(configure, tmp_path, recorders, monkeypatch, capsys):
    eager = configure(out=str(tmp_path / "eager"), capture=False, **PHASES)
    assert train(eager) == 0
    capsys.readouterr()
    for broken in (0, 2):
        monkeypatch.setattr(Rerun, "broken", (broken,))
        config = configure(out=str(tmp_path / str(broken)), **PHASES)
        assert train(config) == 0
        assert capsys.readouterr().err.count("could not be recorded as a CUDA graph") == 1
        assert weights(config, 12) == weights(eager, 12)
        assert losses(config) == losses(eager)
        assert recorders[-1].recordings == broken + 1


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU is asked")
def test_without_a_gpu_nothing_is_recorded(configure):
    config = configure(steps=2)
    assert config.capture
    assert train(config) == 0  # the recorder would refuse


def stream_of(prepared, nsp: bool, seq: int) -> tuple[PretrainingDataset, Stream]:
    tokenizer = load_tokenizer(prepared / "data" / "tokenizer")
    dataset = PretrainingDataset(open_corpus(prepared / "data"), tokenizer, max_length=seq, nsp=nsp)
    return dataset, Stream(dataset, seq, Place())


@pytest.mark.parametrize(("nsp", "batch", "tokens"), [(True, 24, 256), (False, 24, 4096), (True, 1, 32), (True, 7, 40)])
def test_every_update_fits_one_of_few_shapes(prepared, nsp, batch, tokens):
    dataset, stream = stream_of(prepared, nsp, 32)
    lengths, special = sample_lengths(dataset, 32), 3 if nsp else 2
    sizes = phase_sizes(lengths, batch, max(tokens, 32), seq=32, special=special)
    assert sizes == phase_sizes(lengths, batch, max(tokens, 32), seq=32, special=special)
    assert 1 <= len(sizes) <= 3
    assert sizes == sorted(sizes)
    batches = []
    for step in range(40):
        update = stream.take(step, batch)
        parts, size = fitted(update.lengths, update.masked, sizes)
        assert size in sizes
        assert sorted(np.concatenate(parts).tolist()) == list(range(batch))
        for part in parts:
            has = update.lengths[part].sum(), len(part), update.masked[part].sum()
            assert all(a <= b for a, b in zip(has, size, strict=True))
        batches.append(len(parts))
    assert max(batches) <= min(batches) + 2


def test_little_of_a_shape_is_empty():
    """Lengths like a corpus': nine tenths of the target's length, the rest anything."""
    generator = np.random.default_rng(0)
    lengths = np.where(generator.random(20000) < 0.9, 128 - generator.integers(0, 20, 20000), 0)
    lengths = np.where(lengths == 0, generator.integers(10, 128, 20000), lengths)
    sizes = phase_sizes(lengths, 256, 16384, seq=128, special=3)

    filled = []
    for _ in range(50):
        drawn = lengths[generator.integers(0, len(lengths), 256)]
        parts, size = fitted(drawn, masked_count(drawn - 3), sizes)
        filled.append(drawn.sum() / (len(parts) * size.tokens))
    assert np.mean(filled) > 0.96


def test_an_example_is_shaped_as_the_batches(prepared):
    dataset, _ = stream_of(prepared, True, 32)
    (size, *_) = phase_sizes(sample_lengths(dataset, 32), 8, 128, seq=32, special=3)
    batch = example(size, 32, nsp=False, pad_id=0)
    assert "next_sentence_label" not in batch
    assert batch["max_length_q"] == 32
    assert batch["input_ids"].shape == (1, size.tokens)
    assert batch["masked_labels"].shape == (size.masked,)
    assert batch["cls_positions"].shape == (size.sequences,)
    assert batch["input_ids"].dtype == torch.int64
