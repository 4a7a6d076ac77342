"""Raw text to batches for masked language modelling and next-sentence prediction."""

from importlib import import_module

from bert_fast.data.bins import Capacities, capacities, plan_batches
from bert_fast.data.corpus import read_documents, stream_documents
from bert_fast.data.extension import extend_tokenizer
from bert_fast.data.lengths import draw_wikipedia_lengths, wikipedia_lengths
from bert_fast.data.masking import masked_count
from bert_fast.data.paths import expand_paths
from bert_fast.data.prepare import prepare
from bert_fast.data.sentences import split_sentences
from bert_fast.data.shards import open_corpus, prepared_files, read_manifest
from bert_fast.data.tokenizer import load_tokenizer, save_tokenizer, special_ids, tokenizer_files
from bert_fast.data.vocabulary import train_tokenizer

# Imported when first asked for: torch takes seconds to import, and the processes of ``prepare`` need none of it.
_WITH_TORCH = {
    "Corpus": "pairs",
    "PackedBatches": "dataset",
    "PretrainingCollator": "dataset",
    "PretrainingDataset": "dataset",
    "Sample": "batches",
    "encode_documents": "dataset",
    "pack_samples": "batches",
    "packed_loader": "dataset",
    "pad_samples": "batches",
    "plan_epoch": "pairs",
}

__all__ = [
    "Capacities",
    "Corpus",
    "PackedBatches",
    "PretrainingCollator",
    "PretrainingDataset",
    "Sample",
    "capacities",
    "draw_wikipedia_lengths",
    "encode_documents",
    "expand_paths",
    "extend_tokenizer",
    "load_tokenizer",
    "masked_count",
    "open_corpus",
    "pack_samples",
    "packed_loader",
    "pad_samples",
    "plan_batches",
    "plan_epoch",
    "prepare",
    "prepared_files",
    "read_documents",
    "read_manifest",
    "save_tokenizer",
    "special_ids",
    "split_sentences",
    "stream_documents",
    "tokenizer_files",
    "train_tokenizer",
    "wikipedia_lengths",
]


def __getattr__(name: str):
    if name in _WITH_TORCH:
        return getattr(import_module(f"bert_fast.data.{_WITH_TORCH[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
