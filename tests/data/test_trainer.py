"""The dataset and the collator in the stock ``transformers.Trainer``."""

from transformers import BertConfig, BertForPreTraining, Trainer, TrainingArguments

from bert_fast.data import PretrainingCollator, PretrainingDataset


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
