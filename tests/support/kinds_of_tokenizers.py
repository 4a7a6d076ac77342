"""Tokenizers of a dozen kinds that pre-training accepts, each trained on the same texts."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from bert_fast.data.tokenizer import SPECIAL_TOKENS, berts_tokenizer, special_ids

TEXTS = [
    "The CAFÉ, in Zürich: 3.50 CHF for ﬁve! \uff26\uff55ll width",
    "don't stop-believing in unbelievable re-encoded things; see [URL] or [Url] and x[URL]y",
    "我们去公园 today й ї が",
    "a\tb\x0bc \x1f d\u00a0e \u200b\ufeff f",
    "supercalifragilistic" * 6 + " short " + "y" * 31,
    "one [unused1] two [unused1]. now here, no\x0bw here",
]


def _bert(texts, **settings) -> Tokenizer:
    """BERT's, its normalizer changed by ``settings`` of ``normalizers.BertNormalizer``."""
    tokenizer = berts_tokenizer({token: number for number, token in enumerate(SPECIAL_TOKENS)}, True)
    tokenizer.normalizer = normalizers.BertNormalizer(**settings)
    return _trained(tokenizer, texts)


def _trained(tokenizer: Tokenizer, texts, **settings) -> Tokenizer:
    if isinstance(tokenizer.model, models.BPE):
        kind = trainers.BpeTrainer
        settings["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    else:
        kind = trainers.WordPieceTrainer
    trainer = kind(vocab_size=900, special_tokens=list(SPECIAL_TOKENS), show_progress=False, **settings)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _word_piece(texts, normalizer, pre_tokenizer, prefix="##", longest=100) -> Tokenizer:
    """As people make them with `tokenizers`: without a post-processor."""
    tokenizer = Tokenizer(
        models.WordPiece(unk_token="[UNK]", continuing_subword_prefix=prefix, max_input_chars_per_word=longest)
    )
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.WordPiece(prefix=prefix)
    return _trained(tokenizer, texts, continuing_subword_prefix=prefix)


def _byte_level(texts) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, texts)


def _with_added_tokens(texts) -> Tokenizer:
    tokenizer = _bert(texts, lowercase=True)
    tokenizer.add_tokens([AddedToken("[URL]", normalized=False), AddedToken("now here", normalized=True)])
    tokenizer.add_special_tokens(["[unused1]"])
    return tokenizer


def _cut_and_padded(texts) -> Tokenizer:
    tokenizer = _bert(texts, lowercase=False)
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(direction="left", length=20)
    return tokenizer


def _berts_processing(texts) -> Tokenizer:
    tokenizer = _bert(texts, lowercase=True)
    ids = special_ids(tokenizer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids.sep), ("[CLS]", ids.cls))
    return tokenizer


_berts_splits, _sequence = pre_tokenizers.BertPreTokenizer, normalizers.Sequence
_folded = [normalizers.NFKC(), normalizers.Lowercase()]
KINDS = {
    "uncased": lambda texts: _bert(texts, lowercase=True),
    "cased": lambda texts: _bert(texts, lowercase=False),
    "accents kept": lambda texts: _bert(texts, lowercase=True, strip_accents=False),
    "Chinese together": lambda texts: _bert(texts, lowercase=True, handle_chinese_chars=False),
    "BertProcessing": _berts_processing,
    "truncation and padding": _cut_and_padded,
    "text not cleaned": lambda texts: _bert(texts, clean_text=False, lowercase=True),
    "NFKC, lower case": lambda texts: _word_piece(texts, _sequence(_folded), _berts_splits()),
    "Lowercase": lambda texts: _word_piece(texts, normalizers.Lowercase(), _berts_splits()),
    "StripAccents": lambda texts: _word_piece(
        texts, _sequence([normalizers.NFD(), normalizers.StripAccents()]), _berts_splits()
    ),
    "no normalizer": lambda texts: _word_piece(texts, None, pre_tokenizers.Whitespace()),
    "WhitespaceSplit": lambda texts: _word_piece(texts, normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()),
    "Digits": lambda texts: _word_piece(
        texts, normalizers.BertNormalizer(), pre_tokenizers.Sequence([_berts_splits(), pre_tokenizers.Digits(True)])
    ),
    "Split": lambda texts: _word_piece(
        texts, normalizers.BertNormalizer(), pre_tokenizers.Split(Regex(r"\s+|-"), "removed")
    ),
    "another prefix": lambda texts: _word_piece(texts, normalizers.BertNormalizer(), _berts_splits(), prefix="@@"),
    "short words": lambda texts: _word_piece(texts, normalizers.BertNormalizer(), _berts_splits(), longest=20),
    "byte-level BPE": _byte_level,
    "added tokens": _with_added_tokens,
}
PLAIN = ("uncased", "cased", "accents kept", "Chinese together", "BertProcessing", "truncation and padding")


def training_ids(encoder, tokenizer: Tokenizer, *texts: str) -> tuple[list[int], list[int]]:
    """(ids, types) of [CLS] A [SEP] or [CLS] A [SEP] B [SEP], as pre-training puts a SentenceEncoder's ids together."""
    special = special_ids(tokenizer)
    ids, types = [special.cls], [0]
    for kind, text in enumerate(texts):
        part = [*encoder([text])[0].tolist(), special.sep]
        ids, types = ids + part, types + [kind] * len(part)
    return ids, types
