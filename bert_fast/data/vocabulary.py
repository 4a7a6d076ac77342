"""A WordPiece vocabulary from text, trained with `tokenizers`."""

import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, models, trainers

from bert_fast.data.tokenizer import LONGEST_WORD, SPECIAL_TOKENS, berts_tokenizer, strips_accents
from bert_fast.text import has_mark, shared_marks

# Of normalized text: what may hold a word that is too long. ASCII's punctuation always ends one.
LONG = re.compile(rf"[^\s!-/:-@\[-`{{-~]{{{LONGEST_WORD + 1},}}")


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 30522,
    *,
    lowercase: bool = True,
    min_frequency: int = 2,
    limit_alphabet: int = 1000,
    strip_accents: bool | None = None,
    counts: Counter | None = None,
) -> Tokenizer:
    """A WordPiece tokenizer of at most ``vocab_size`` pieces, five special tokens first, trained on ``texts``.

    Text is treated as BERT does: control characters removed, CJK characters apart, with ``lowercase`` also
    lower-cased and stripped of accents (``strip_accents`` True or False says otherwise); split at white space and
    punctuation. The most frequent ``limit_alphabet`` characters, or as many of them as fit in the vocabulary, are
    kept: raise it to about 8000 for Chinese. Words of more than 100 characters are left out: they are [UNK] whatever
    is learned of them. The same texts give the same vocabulary. ``texts`` are gone through twice: a one-pass iterator
    is read into memory first.

    ``counts`` gets, in characters of the normalized text without white space: ``characters``; ``characters_dropped``,
    not kept, of ``alphabet_dropped`` different ones; and ``long_words``, with their ``long_word_characters``. Of the
    ``text_characters``, those of the texts as they are, it gets ``marks_stripped``, vowel signs and other marks that
    are taken with the accents (see :func:`bert_fast.text.strippable_marks`).

    Raises ValueError where the vocabulary cannot hold the special tokens or the texts hold no word. What ends the wait
    (KeyboardInterrupt) is raised at once.
    """
    if vocab_size <= len(SPECIAL_TOKENS):
        raise ValueError(f"vocab_size {vocab_size} leaves no room beside the {len(SPECIAL_TOKENS)} special tokens")
    if iter(texts) is texts:
        texts = list(texts)
    counts = Counter() if counts is None else counts
    berts = berts_tokenizer({token: number for number, token in enumerate(SPECIAL_TOKENS)}, lowercase, strip_accents)
    # The trainer numbers "##x" in the order of a randomly seeded hash table and breaks ties by these numbers. Naming
    # them beforehand fixes both; they must not stay special tokens, so the vocabulary goes into a new tokenizer.
    alphabet, continuing = _alphabet(texts, berts, limit_alphabet, vocab_size - len(SPECIAL_TOKENS), counts)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[*SPECIAL_TOKENS, *continuing],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # without added tokens: "[SEP]" in a text is text
    learner.pre_tokenizer = berts.pre_tokenizer
    _train(learner, trainer, _without_long_words(texts, berts, counts))
    return berts_tokenizer(learner.get_vocab(with_added_tokens=True), lowercase, strip_accents)


def _alphabet(
    texts: Iterable[str], berts: Tokenizer, limit: int, room: int, counts: Counter
) -> tuple[list[str], list[str]]:
    """(the most frequent characters of the normalized texts that fit in ``room``, sorted, their "##x" forms)."""
    written: Counter = Counter()
    marks = 0
    for text in texts:
        written.update(text)
        marks += shared_marks(text)
    numbers: Counter = Counter()  # BERT's normalizer takes each character by itself
    for character, number in written.items():
        for normal in berts.normalizer.normalize_str(character):
            if not normal.isspace():
                numbers[normal] += number
    if not numbers:
        raise ValueError("the texts hold no word to train a tokenizer on")
    frequent = [character for _, character in sorted((-number, character) for character, number in numbers.items())]
    kept: dict[str, bool] = {}  # and whether it can continue a word
    for character in frequent[:limit]:
        continues = _continues_word(character, berts)
        if (room := room - 1 - continues) < 0:
            break
        kept[character] = continues
    counts["characters"] = numbers.total()
    counts["alphabet_dropped"] = len(numbers) - len(kept)
    counts["characters_dropped"] = sum(number for character, number in numbers.items() if character not in kept)
    counts["text_characters"] = written.total()
    if strips_accents(berts):
        counts["marks_stripped"] = marks + sum(number for character, number in written.items() if has_mark(character))
    alphabet = sorted(kept)
    return alphabet, [f"##{character}" for character in alphabet if kept[character]]


def _continues_word(character: str, tokenizer: Tokenizer) -> bool:
    """Whether ``character`` can stand inside a word: punctuation and CJK characters are always words by themselves."""
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(f"a{character}"))) == 1


def _without_long_words(texts: Iterable[str], berts: Tokenizer, counts: Counter) -> Iterator[str]:
    """The normalized ``texts`` without the words that are always [UNK]; joining their pieces takes quadratic time."""

    def shortened(stretch: re.Match) -> str:
        words = [word for word, _ in berts.pre_tokenizer.pre_tokenize_str(stretch[0])]
        long = [word for word in words if len(word) > LONGEST_WORD]
        counts.update(long_words=len(long), long_word_characters=sum(map(len, long)))
        return " ".join(word for word in words if len(word) <= LONGEST_WORD)

    for text in texts:
        yield LONG.sub(shortened, berts.normalizer.normalize_str(text))


def _train(tokenizer: Tokenizer, trainer: trainers.Trainer, texts: Iterator[str]) -> None:
    """Trains in another thread: a signal is acted on in this one, which native code would keep waiting for minutes."""
    errors: list[BaseException] = []
    left, done = threading.Event(), threading.Event()

    def given() -> Iterator[str]:
        for text in texts:
            if left.is_set():
                raise RuntimeError("nobody waits for this tokenizer")
            yield text

    def work() -> None:
        try:
            tokenizer.train_from_iterator(given(), trainer)
        except BaseException as error:
            errors.append(error)
        done.set()

    threading.Thread(target=work, daemon=True).start()
    try:
        done.wait()  # Thread.join, once interrupted, takes the thread for ended
    except BaseException:
        left.set()
        done.wait(1)  # out of Python, where the interpreter's end would abort the thread; native code may go on
        raise
    if errors:
        raise errors[0]
