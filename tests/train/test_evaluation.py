"""Evaluation against transformers on padded batches, and against itself in other batches."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

import bert_fast
from bert_fast import data
from bert_fast.train.evaluation import evaluate, summarize, sums, unigram_loss

SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def documents():
    return data.read_documents()[:12]


@pytest.fixture(scope="module")
def tokenizer(documents):
    return data.train_tokenizer([s for document in documents for s in document], 600)


@pytest.fixture(scope="module")
def samples(documents, tokenizer):
    return data.PretrainingDataset(data.encode_documents(documents, tokenizer), tokenizer, max_length=48, seed=3)


def build(cls, samples, **changes):
    torch.manual_seed(0)
    config = bert_fast.BertConfig(vocab_size=samples.vocab_size, max_position_embeddings=48, **SIZES, **changes)
    return cls(config)


def test_equals_transformers_on_the_padded_samples(samples):
    model = build(bert_fast.BertForPreTraining, samples).train()
    model.bert.encoder.layer[0].eval()
    found = evaluate(model, data.PackedBatches(samples, data.capacities(200, 48)))
    assert model.training
    assert not model.bert.encoder.layer[0].training

    reference = build(transformers.BertForPreTraining, samples).eval()
    reference.load_state_dict(model.state_dict())
    batch = data.pad_samples([samples[i] for i in range(len(samples))], pad_id=0)
    labels, pairs = batch.pop("labels"), batch.pop("next_sentence_label")
    with torch.no_grad():
        outputs = reference(**batch)
    masked = labels != -100
    scores = outputs.prediction_logits[masked]
    mlm = F.cross_entropy(scores.double(), labels[masked]).item()
    assert found["mlm_loss"] == pytest.approx(mlm, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(mlm), rel=1e-4)
    assert found["mlm_accuracy"] == pytest.approx((scores.argmax(-1) == labels[masked]).double().mean().item())
    nsp = outputs.seq_relationship_logits
    assert found["nsp_loss"] == pytest.approx(F.cross_entropy(nsp.double(), pairs).item(), rel=1e-5)
    assert found["nsp_accuracy"] == pytest.approx((nsp.argmax(-1) == pairs).double().mean().item())
    assert (found["masked"], found["sequences"]) == (int(masked.sum()), len(samples))


def test_does_not_depend_on_how_samples_are_batched(samples):
    model = build(bert_fast.BertForPreTraining, samples)
    few = evaluate(model, data.PackedBatches(samples, data.capacities(4096, 48)))
    batches = data.PackedBatches(samples, data.capacities(64, 48))
    many = evaluate(model, batches)
    halves = sums(model, [batches[i] for i in range(0, len(batches), 2)])
    halves = halves + sums(model, [batches[i] for i in range(1, len(batches), 2)])
    for other in (many, summarize(halves)):
        assert other == pytest.approx(few, rel=1e-5)


def test_without_next_sentence_labels_and_without_that_head(samples, tokenizer):
    plain = data.PretrainingDataset(samples.corpus, tokenizer, max_length=48, nsp=False)
    found = evaluate(build(bert_fast.BertForMaskedLM, samples), data.PackedBatches(plain, data.capacities(200, 48)))
    assert found["nsp_loss"] is None
    assert found["nsp_accuracy"] is None
    with_labels = evaluate(build(bert_fast.BertForMaskedLM, samples), [_first(samples)])
    assert with_labels["nsp_loss"] is None
    assert evaluate(build(bert_fast.BertForPreTraining, samples), [_first(samples)])["nsp_loss"] > 0


def test_bf16_is_near_and_bad_input_is_refused(samples):
    model = build(bert_fast.BertForPreTraining, samples)
    exact = evaluate(model, [_first(samples)])
    assert evaluate(model, [_first(samples)], precision="bf16")["mlm_loss"] == pytest.approx(
        exact["mlm_loss"], rel=0.02
    )
    with pytest.raises(ValueError, match="the batches hold no sequence"):
        evaluate(model, [])
    with pytest.raises(ValueError, match="fp16"):
        evaluate(model, [], precision="fp16")


def test_batches_without_a_mask_have_no_mlm_loss(samples):
    batch = dict(_first(samples))
    batch["masked_labels"] = torch.full_like(batch["masked_labels"], -100)
    found = evaluate(build(bert_fast.BertForPreTraining, samples), [batch])
    assert (found["mlm_loss"], found["perplexity"], found["mlm_accuracy"], found["masked"]) == (None, None, None, 0)
    assert found["nsp_loss"] == evaluate(build(bert_fast.BertForPreTraining, samples), [_first(samples)])["nsp_loss"]
    assert unigram_loss(np.ones(samples.vocab_size), [batch]) is None


def test_a_loss_that_is_not_finite_is_told(samples):
    model = build(bert_fast.BertForPreTraining, samples)
    with torch.no_grad():
        model.cls.predictions.bias.fill_(math.nan)
    found = evaluate(model, [_first(samples)])
    assert math.isnan(found["mlm_loss"])
    assert not math.isfinite(found["perplexity"])


def test_unigram_loss_is_the_cross_entropy_of_smoothed_counts(samples):
    batches = [_first(samples)]
    counts = np.bincount(samples.corpus.tokens, minlength=samples.vocab_size)
    labels = batches[0]["masked_labels"]
    scores = torch.from_numpy(np.log((counts + 1) / (counts + 1).sum())).expand(len(labels), -1)
    expected = F.cross_entropy(scores, labels, ignore_index=-100).item()
    assert unigram_loss(counts, batches) == pytest.approx(expected, rel=1e-9)
    uniform = unigram_loss(np.zeros(samples.vocab_size), batches)
    assert uniform == pytest.approx(math.log(samples.vocab_size))
    assert expected < uniform


def _first(samples) -> dict:
    return data.PackedBatches(samples, data.capacities(200, 48))[0]
