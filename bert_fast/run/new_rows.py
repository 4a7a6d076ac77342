"""Rows of a checkpoint's word table for the pieces that its tokenizer was extended by."""

import numpy as np
import torch
from tokenizers import Tokenizer

from bert_fast.data import Corpus, load_tokenizer
from bert_fast.data.extension import replaced_pieces, tokens_before
from bert_fast.data.pairs import document_tokens
from bert_fast.data.tokenizer import differences, find_tokenizer, vocabulary_rows, without_ids_from
from bert_fast.model import BertForPreTraining
from bert_fast.run.config import ConfigError

SAMPLE = 1 << 22  # tokens of whole documents, about, of which it is counted how much shorter they are


def base_tokenizer(source: str, tokenizer: Tokenizer) -> Tokenizer | None:
    """The tokenizer of ``source``, a folder or a name on the Hub, which ``tokenizer`` is, or has pieces beyond.

    None where ``source`` brings none; ConfigError where it gives other ids.
    """
    if (path := find_tokenizer(source)) is None:
        return None
    base = load_tokenizer(path)
    if differing := differences(without_ids_from(tokenizer, vocabulary_rows(base)), base):
        raise ConfigError(
            f"the data were prepared with another tokenizer than that of {source} ({'; '.join(differing)}): prepare "
            f"them with --tokenizer {path.parent}, or with what `bert-fast tokenizer CORPUS --extend {source}` makes"
        )
    return base


def start_new_rows(model: BertForPreTraining, base: Tokenizer, tokenizer: Tokenizer) -> int:
    """Makes the row and the bias of each piece that ``base`` lacks the mean of those of the pieces that it replaces.

    ``model`` has rows for all of ``tokenizer``, and those of ``base`` are trained. Returns the number of new pieces.
    """
    replaced, head = replaced_pieces(base, tokenizer), model.cls.predictions
    tables = (model.bert.embeddings.word_embeddings.weight, head.decoder.weight, head.decoder.bias, head.bias)
    with torch.no_grad():
        for table in {id(table): table for table in tables}.values():  # tied or not
            for new, old in replaced.items():
                table[new] = table[old].mean(0)
    return len(replaced)


def shortened(corpus: Corpus, base: Tokenizer, tokenizer: Tokenizer) -> str:
    """How much shorter the text of ``corpus`` is as ``tokenizer`` cuts it than as ``base`` does, in words."""
    every = -(-int(document_tokens(corpus).sum()) // SAMPLE)
    spans = corpus.sentence_ends[corpus.documents[::every]]
    ids = np.concatenate([np.asarray(corpus.tokens[begin:end]) for begin, end in spans])
    before = tokens_before(base, tokenizer, ids)
    of = "" if every == 1 else f", of one document in {every}"
    return f"{1 - len(ids) / before:.1%} shorter ({len(ids):,} tokens where there were {before:,}{of})"
