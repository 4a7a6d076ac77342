"""Raw text to batches for masked language modelling and next-sentence prediction."""

from bert_fast.data.batches import Sample, pack_samples, pad_samples
from bert_fast.data.corpus import expand_paths, read_documents, stream_documents
from bert_fast.data.dataset import (
    PackedBatches,
    PretrainingCollator,
    PretrainingDataset,
    encode_documents,
    packed_loader,
)
from bert_fast.data.lengths import draw_wikipedia_lengths, wikipedia_lengths
from bert_fast.data.masking import masked_count
from bert_fast.data.packing import Capacities, capacities, plan_batches
from bert_fast.data.pairs import Corpus, plan_epoch
from bert_fast.data.prepare import prepare
from bert_fast.data.sentences import split_sentences
from bert_fast.data.shards import open_corpus, read_manifest
from bert_fast.data.tokenizer import load_tokenizer, save_tokenizer, special_ids, train_tokenizer

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
    "load_tokenizer",
    "masked_count",
    "open_corpus",
    "pack_samples",
    "packed_loader",
    "pad_samples",
    "plan_batches",
    "plan_epoch",
    "prepare",
    "read_documents",
    "read_manifest",
    "save_tokenizer",
    "special_ids",
    "split_sentences",
    "stream_documents",
    "train_tokenizer",
    "wikipedia_lengths",
]
