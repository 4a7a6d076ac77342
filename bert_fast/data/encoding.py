"""Sentences to token ids, each encoded by itself, several times as fast as `tokenizers` does it.

BERT's tokenizer cleans, splits and looks up every word apart from its neighbours, so the ids of a sentence are those
of its stretches between white space, one after another, and a stretch seen before need not be encoded again. In
real text nearly all have been seen before. Any other kind of tokenizer encodes whole sentences.
"""

import json
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from sys import getsizeof

import numpy as np
from tokenizers import Tokenizer

from bert_fast.data.tokenizer import SPECIAL_TOKENS, strips_accents
from bert_fast.text import SHARED_MARK, has_mark, shared_marks, strippable_marks

# str.split takes these control characters for white space; BERT's clean_text removes them, joining what is around.
REMOVED = dict.fromkeys([0x0B, 0x0C, 0x1C, 0x1D, 0x1E, 0x1F, 0x85])
BATCH_CHARACTERS = 1 << 18  # sentences of about so many characters are cut into words at a time
KNOWN_BYTES = 64 << 20  # the known stretches are forgotten when they take more memory than this
LOST = ("long_words", "marks_stripped")
ENTRY_BYTES = 120  # of a dictionary's tables, an entry, just after they have grown


class SentenceEncoder:
    """``encoder(sentences)`` gives the ids of every sentence encoded alone, without special tokens around it.

    Text that looks like one of BERT's special tokens ("[SEP]") is text; other added tokens ("[URL]") have their ids
    there. The tokenizer's own truncation and padding are off. ``lost`` has two counts for each sentence of the last
    call: ``long_words``, which are [UNK] for their length alone, whatever the vocabulary, and ``marks_stripped``, vowel
    signs and other marks that the tokenizer takes for accents (see :func:`bert_fast.text.strippable_marks`).
    ``dtype`` of the ids is uint16, or uint32 where the vocabulary has larger ids. Memory beside input and result is
    bounded by about 64 MiB for the stretches that are known and 64 MiB for a batch.
    """

    def __init__(self, tokenizer: Tokenizer):
        described = json.loads(tokenizer.to_str())
        for token in described["added_tokens"]:
            token["special"] = token["content"] in SPECIAL_TOKENS  # what is special is text here
        self.tokenizer = Tokenizer.from_str(json.dumps(described))
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        largest = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        self.dtype = np.dtype(np.uint16 if largest < 1 << 16 else np.uint32)
        self.by_word = encodes_words_apart(self.tokenizer)
        self.added = any(not token["special"] for token in described["added_tokens"])
        self.known: dict[str, bytes] = {}  # a stretch without white space -> its ids as bytes of ``dtype``
        self.known_bytes = 0
        self.longest = getattr(self.tokenizer.model, "max_input_chars_per_word", None)  # of WordPiece alone
        self.unknown = np.array(self.tokenizer.token_to_id("[UNK]") or 0, self.dtype).tobytes()
        self.long: dict[str, int] = {}  # of the known stretches, those with words that are too long, and how many
        self.strips_accents = strips_accents(self.tokenizer)
        self.marked: set[str] = set()  # characters of known stretches that have a mark, or are one
        self.lost: dict[str, list[int]] = {}

    def __call__(self, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids ``dtype`` (tokens,) of all sentences one after another, lengths int64 (sentences,), some perhaps 0)."""
        self.lost = {name: [] for name in LOST}
        encode = self._by_word if self.by_word else self._whole
        encoded = list(chain.from_iterable(map(encode, _batches(sentences))))
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded)) // self.dtype.itemsize
        return np.frombuffer(b"".join(encoded), dtype=self.dtype), lengths

    def _whole(self, sentences: Sequence[str]) -> list[bytes]:
        encoded = self._encoded(sentences)
        self.lost["long_words"] += map(self._long_in, sentences, encoded)
        self.lost["marks_stripped"] += map(strippable_marks if self.strips_accents else lambda _: 0, sentences)
        return encoded

    def _long_in(self, text: str, ids: bytes) -> int:
        """How many words of ``text`` are too long."""
        if self.longest is None or 4 * len(text) <= self.longest or self.unknown not in ids:
            return 0  # normalizing makes at most four characters of one
        normal = text if self.tokenizer.normalizer is None else self.tokenizer.normalizer.normalize_str(text)
        return sum(len(word) > self.longest for word, _ in self.tokenizer.pre_tokenizer.pre_tokenize_str(normal))

    def _encoded(self, sentences: Sequence[str]) -> list[bytes]:
        code = "H" if self.dtype == np.uint16 else "I"
        return [
            array(code, e.ids).tobytes() for e in self.tokenizer.encode_batch_fast(sentences, add_special_tokens=False)
        ]

    def _by_word(self, sentences: Sequence[str]) -> list[bytes]:
        if self.known_bytes > KNOWN_BYTES:
            self.known.clear()
            self.long.clear()
            self.known_bytes = 0
        text = "\n".join(sentences)
        if any(chr(mark) in text for mark in REMOVED):
            if self.added:  # they are looked for before anything is removed
                return self._whole(sentences)
            sentences = [sentence.translate(REMOVED) for sentence in sentences]
        words = [sentence.split() for sentence in sentences]
        stretches = set(chain.from_iterable(words))
        unseen = list(stretches.difference(self.known))
        for word, ids in zip(unseen, self._encoded(unseen), strict=True):
            self.known[word] = ids
            self.known_bytes += getsizeof(word) + getsizeof(ids) + ENTRY_BYTES
            if number := self._long_in(word, ids):
                self.long[word] = number
        if self.strips_accents:
            self.marked.update(filter(_is_marked, set("".join(unseen))))
        none = [0] * len(words)
        some = not self.long.keys().isdisjoint(stretches)
        self.lost["long_words"] += [sum(map(self.long.get, one, repeat(0))) for one in words] if some else none
        marked = [character for character in self.marked if character in text]
        self.lost["marks_stripped"] += _marks(sentences, marked) if marked else none
        return [b"".join(map(self.known.__getitem__, one)) for one in words]


def _is_marked(character: str) -> bool:
    return has_mark(character) or SHARED_MARK.match(character) is not None


def _marks(sentences: Sequence[str], marked: Sequence[str]) -> list[int]:
    """:func:`bert_fast.text.strippable_marks` of each of ``sentences``, of which ``marked`` are the characters."""
    own = list(filter(has_mark, marked))
    numbers = [sum(map(sentence.count, own)) for sentence in sentences]
    if len(own) == len(marked):
        return numbers
    return [number + shared_marks(sentence) for number, sentence in zip(numbers, sentences, strict=True)]


def _batches(sentences: Sequence[str]) -> Iterator[Sequence[str]]:
    start = characters = 0
    for number, sentence in enumerate(sentences, 1):
        characters += len(sentence)
        if characters >= BATCH_CHARACTERS:
            yield sentences[start:number]
            start, characters = number, 0
    if start < len(sentences):
        yield sentences[start:]


def encodes_words_apart(tokenizer: Tokenizer) -> bool:
    """Whether ``tokenizer`` is BERT's: cleaned text, split at white space, WordPiece, added tokens between white space.

    Then white space always ends a word, and nothing on one side of it changes the ids on the other.
    """
    made_of = json.loads(tokenizer.to_str())
    normalizer = made_of["normalizer"] or {}
    return (
        normalizer.get("type") == "BertNormalizer"
        and normalizer["clean_text"]
        and (made_of["pre_tokenizer"] or {}).get("type") == "BertPreTokenizer"
        and made_of["model"]["type"] == "WordPiece"
        and all(_within_a_stretch(token, tokenizer) for token in made_of["added_tokens"])
    )


def _within_a_stretch(token: dict, tokenizer: Tokenizer) -> bool:
    """Whether an added token is text, or found between white space alone, with nothing of it."""
    if token["content"] in SPECIAL_TOKENS:
        return True
    forms = token["content"] + (tokenizer.normalizer.normalize_str(token["content"]) if token["normalized"] else "")
    return forms.split() == [forms] and not token["lstrip"] and not token["rstrip"]
