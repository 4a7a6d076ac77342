"""bert_fast: pre-train BERT fast, as a drop-in for transformers."""

__version__ = "0.1.0"
