"""The dataset and the collator in the stock ``transformers.Trainer``."""

import numpy as np
import pytest
from transformers import BertConfig, BertForPreTraining, BertTokenizerFast, Trainer, TrainingArguments

from bert_fast.data import PretrainingCollator, PretrainingDataset, encode_documents, prepare, save_tokenizer


def test_trainer_trains_on_dataset_and_collator(corpus, tokenizer, tmp_path):
    dataset = PretrainingDataset(corpus, tokenizer, max_length=32, seed=1)
    config = BertConfig(
        vocab_size=dataset.vocab_size,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        BertForPreTraining(config), arguments, train_dataset=dataset, data_collator=PretrainingCollator(tokenizer)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert losses[-1] < losses[0] - 0.5


def test_tokenizers_of_transformers_serve_as_well(documents, corpus, tokenizer, tmp_path):
    theirs = BertTokenizerFast.from_pretrained(save_tokenizer(tokenizer, tmp_path / "tok"))
    ours = [PretrainingDataset(corpus, t, max_length=32, seed=1, whole_word=True) for t in (tokenizer, theirs)]
    batches = [PretrainingCollator(t)([d[0], d[1]]) for t, d in zip((tokenizer, theirs), ours, strict=True)]
    for name, values in batches[0].items():
        assert (batches[1][name] == values).all(), name
    encoded = encode_documents(documents[:3], theirs)
    assert np.array_equal(encoded.tokens, encode_documents(documents[:3], tokenizer).tokens)
    (tmp_path / "corpus.txt").write_text("The assert statement. It fails.")
    assert prepare(tmp_path / "corpus.txt", theirs, tmp_path / "data", workers=1)["sentences"] == 2


def test_what_is_no_tokenizer_and_no_document_is_refused(documents, corpus, tokenizer):
    with pytest.raises(TypeError, match=r"a tokenizer is a .*, got str"):
        PretrainingDataset(corpus, "tok")
    with pytest.raises(TypeError, match="a document is a list of sentences, not a string"):
        encode_documents(["A text. With two sentences.", "Another."], tokenizer)
