"""A WordPiece vocabulary from text, trained with `tokenizers`."""

from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer, trainers

from bert_fast.data.tokenizer import SPECIAL_TOKENS, berts_tokenizer


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 30522,
    *,
    lowercase: bool = True,
    min_frequency: int = 2,
    limit_alphabet: int = 1000,
    strip_accents: bool | None = None,
) -> Tokenizer:
    """A WordPiece tokenizer of at most ``vocab_size`` pieces, five special tokens first, trained on ``texts``.

    Text is treated as BERT does: control characters removed, CJK characters apart, with ``lowercase`` also
    lower-cased and stripped of accents (``strip_accents`` True or False says otherwise); split at white space and
    punctuation. The most frequent ``limit_alphabet`` characters (at most a quarter of the vocabulary) are kept:
    raise it to about 8000 for Chinese. The same texts give the same vocabulary. ``texts`` are gone through twice: a
    one-pass iterator is read into memory first.
    Raises ValueError where the vocabulary cannot hold the special tokens or the texts hold no word.
    """
    if vocab_size <= len(SPECIAL_TOKENS):
        raise ValueError(f"vocab_size {vocab_size} leaves no room beside the {len(SPECIAL_TOKENS)} special tokens")
    if iter(texts) is texts:
        texts = list(texts)
    special = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
    tokenizer = berts_tokenizer(special, lowercase, strip_accents)
    # The trainer numbers "##x" in the order of a randomly seeded hash table and breaks ties by these numbers. Naming
    # them beforehand fixes both; they must not stay special tokens, so the vocabulary goes into a new tokenizer.
    alphabet = _alphabet(texts, tokenizer, min(limit_alphabet, max(1, vocab_size // 4)))
    continuing = [f"##{character}" for character in alphabet if _continues_word(character, tokenizer)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[*SPECIAL_TOKENS, *continuing],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return berts_tokenizer(tokenizer.get_vocab(with_added_tokens=True), lowercase, strip_accents)


def _alphabet(texts: Iterable[str], tokenizer: Tokenizer, limit: int) -> list[str]:
    """The ``limit`` most frequent characters of the normalized texts, white space left out, sorted."""
    counts: Counter = Counter()
    for text in texts:
        counts.update(tokenizer.normalizer.normalize_str(text))
    characters = sorted((-number, character) for character, number in counts.items() if not character.isspace())
    if not characters:
        raise ValueError("the texts hold no word to train a tokenizer on")
    return sorted(character for _, character in characters[:limit])


def _continues_word(character: str, tokenizer: Tokenizer) -> bool:
    """Whether ``character`` can stand inside a word: punctuation and CJK characters are always words by themselves."""
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(f"a{character}"))) == 1
