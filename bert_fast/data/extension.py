"""More pieces for the tokenizer of a checkpoint: those that save most tokens on text of a domain.

Pieces are chosen one after another, each the one that saves most tokens beside those chosen before, where WordPiece
cuts the words with it, longest piece first. Any part of a word may be one. A piece also moves where the rest of a word
is cut, for better or worse, so words are cut anew and nothing is estimated.

That a checkpoint adapts to a domain with pieces of it behind its own: Hong et al., AVocaDo (arXiv 2110.13434), and
Sachidananda et al., Efficient Domain Adaptation of Language Models via Adaptive Tokenization (arXiv 2109.07460). New
rows that are the means of those they replace: the latter, and Gee et al., Fast Vocabulary Transfer (arXiv 2402.09977).
"""

import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from heapq import heapify, heappop, heappush, nlargest
from itertools import accumulate
from typing import cast

import numpy as np
from tokenizers import Tokenizer

from bert_fast.data.encoding import REMOVED, encodes_words_apart
from bert_fast.data.tokenizer import SPECIAL_TOKENS, continuation_table, vocabulary_rows

STRETCHES = 1 << 18  # of text between white space, different ones: cut into words when they are so many
MOST_WORDS = 1 << 21  # different words that are counted; beyond, the rarer half is forgotten
CHOSEN_FOR = 1 << 23  # sum over words of their letters times their pieces: there are fewer candidates than half of it
UNKNOWN = 1 << 40  # the tokens of a word that becomes [UNK], where pieces are chosen: more than any other could save


def extend_tokenizer(
    tokenizer: Tokenizer,
    texts: Iterable[str],
    add: int,
    *,
    min_frequency: int = 5,
    counts: Counter | None = None,
    progress: Callable[[int], object] = lambda number: None,
) -> Tokenizer:
    """``tokenizer``, a WordPiece, with ``add`` pieces more, those that save most tokens on ``texts``.

    All its ids stay, and the new ones follow the largest. Text without a new piece in it keeps its ids, and no word
    that is counted becomes [UNK]. They are fewer than ``add`` where no other piece occurs ``min_frequency`` times and
    saves a token. The same texts, which are gone through once, give the same pieces. Memory is bounded: of more than
    two million different words the rarer half is forgotten, and pieces are chosen for the most frequent of the words
    that are several pieces, about 300,000 of English.

    ``counts`` gets ``pieces_added``; of the words, ``words``, ``tokens_before`` and ``tokens``, as ``tokenizer`` and as
    the new one cuts them, and ``unknown_words``, [UNK] to the new one; and ``words_forgotten``. ``progress`` gets the
    number of pieces chosen so far. ValueError for another kind of tokenizer, and where ``texts`` hold no word.
    """
    require_extendable(tokenizer)
    counts = Counter() if counts is None else counts
    words = _counted_words(tokenizer, texts, counts)
    if not words:
        raise ValueError("the texts hold no word to choose pieces for")
    described, first = json.loads(tokenizer.to_str()), vocabulary_rows(tokenizer)
    cutter = Cutter(tokenizer)
    chosen = _chosen(_divided(words, cutter), cutter, add, min_frequency, progress)
    vocabulary = described["model"]["vocab"]
    # `tokenizers` gives an added token that the model lacks the number of the model's tokens, whatever its id was
    vocabulary |= {token["content"]: token["id"] for token in described["added_tokens"]}
    vocabulary |= {piece: number for number, piece in enumerate(chosen, first)}
    extended = Tokenizer.from_str(json.dumps(described))
    before, after = (one.model.tokenize for one in (tokenizer, extended))
    counts["pieces_added"] = len(chosen)
    for word, number in words.items():
        pieces = after(word)
        counts["words"] += number
        counts["tokens_before"] += number * len(before(word))
        counts["tokens"] += number * len(pieces)
        counts["unknown_words"] += number * (pieces[0].value == "[UNK]")
    return extended


def require_extendable(tokenizer: Tokenizer) -> None:
    """ValueError where :func:`extend_tokenizer` cannot add pieces so that all other text keeps its ids."""
    described = json.loads(tokenizer.to_str())
    model = described["model"]
    if model["type"] != "WordPiece" or not model["continuing_subword_prefix"]:
        raise ValueError(
            f"pieces can be added to a WordPiece whose pieces say that they continue a word, as BERT's ## does; this "
            f"tokenizer is {model['type']} without: prepare the data with it as it is, or train a vocabulary and a "
            "model of your own"
        )
    for token in described["added_tokens"]:
        content = token["content"]
        if content not in model["vocab"] and len(_words(tokenizer, content)) < 2:
            raise ValueError(
                f"the added token {content!r} lies behind the WordPiece vocabulary: to keep its id {token['id']} it "
                f"would have to go there, and be found within words: take it out, or rename it as [{content}]"
            )


def replaced_pieces(base: Tokenizer, extended: Tokenizer) -> dict[int, list[int]]:
    """Of each id that ``extended`` has beyond those of ``base``: the ids that ``base`` makes of its text.

    The piece of a word's middle is cut as in a word's middle. [UNK]'s id alone where ``base`` knows a character not.
    """
    first, ids = vocabulary_rows(base), base.get_vocab(with_added_tokens=True)
    if not (new := sorted((number, piece) for piece, number in extended.get_vocab().items() if number >= first)):
        return {}
    cutter = Cutter(base)
    return {number: [ids[part] for part in cutter.pieces(piece) or ["[UNK]"]] for number, piece in new}


def tokens_before(base: Tokenizer, extended: Tokenizer, ids: np.ndarray) -> int:
    """How many tokens ``base`` makes of the whole words of which ``extended`` made ``ids``, integers (tokens,)."""
    first, continues = vocabulary_rows(base), continuation_table(extended)
    word = np.cumsum(~continues[ids])
    starts = np.searchsorted(word, changed := np.unique(word[ids >= first]))
    ends = np.searchsorted(word, changed, side="right")
    found = Counter(tuple(ids[a:b].tolist()) for a, b in zip(starts, ends, strict=True))
    prefix, cut = extended.model.continuing_subword_prefix, base.model.tokenize
    saved = 0
    for pieces, number in found.items():
        head, *rest = (cast(str, extended.id_to_token(piece)) for piece in pieces)
        saved += number * (len(cut(head + "".join(piece.removeprefix(prefix) for piece in rest))) - len(pieces))
    return len(ids) + saved


class Cutter:
    """WordPiece's way to cut words, at each place the longest piece of the vocabulary, which may grow."""

    def __init__(self, tokenizer: Tokenizer):
        self.prefix = tokenizer.model.continuing_subword_prefix
        self.longest_word = tokenizer.model.max_input_chars_per_word
        self.first: set[str] = set()
        self.inner: set[str] = set()  # without the prefix
        self.longest = 0
        for piece in tokenizer.get_vocab(with_added_tokens=False):
            self.add(piece)

    def add(self, piece: str) -> None:
        """``piece`` is in the vocabulary, too."""
        self.first.add(piece)
        if piece.startswith(self.prefix):
            self.inner.add(piece.removeprefix(self.prefix))
        self.longest = max(self.longest, len(piece))

    def remove(self, piece: str) -> None:
        """``piece`` is in the vocabulary no more."""
        self.first.remove(piece)
        self.inner.discard(piece.removeprefix(self.prefix))

    def end(self, word: str, start: int) -> int:
        """Where the longest piece ends that begins at ``start``; 0 where there is none."""
        known = self.inner if start else self.first
        for end in range(min(len(word), start + self.longest), start, -1):
            if word[start:end] in known:
                return end
        return 0

    def ends(self, word: str, start: int = 0) -> list[int]:
        """Where the pieces of ``word`` end, from ``start`` on; empty where they would be [UNK]."""
        if len(word) - start > self.longest_word:
            return []
        found = [start]
        while found[-1] < len(word):
            if not (end := self.end(word, found[-1])):
                return []
            found.append(end)
        return found[1:]

    def pieces(self, piece: str) -> list[str]:
        """The pieces of the text of ``piece``, which continues a word if it says so; empty where it would be [UNK]."""
        inner = piece.startswith(self.prefix)
        word, start = (f"-{piece.removeprefix(self.prefix)}", 1) if inner else (piece, 0)
        ends = self.ends(word, start)
        return [(self.prefix if a else "") + word[a:b] for a, b in zip([start, *ends], ends, strict=False)]

    def saved(self, word: str) -> dict[str, int]:
        """By how many tokens each piece would shorten ``word``, of all that would change how it is cut.

        Minus :data:`UNKNOWN` and more, where it would be [UNK].
        """
        ends = [self.end(word, place) for place in range(len(word))]
        left = [0] * (len(word) + 1)  # tokens of the rest from each place on
        for place in reversed(range(len(word))):
            left[place] = 1 + left[ends[place]] if ends[place] else UNKNOWN
        found: dict[str, int] = {}
        start = 0
        while start < len(word):
            for end in range(ends[start] + 1, len(word) + 1):
                text = word[start:end]
                piece = self.prefix + text if start else text
                if piece in found or (not start and piece.startswith(self.prefix)):
                    continue
                again = start and word.find(text, start + 1) > 0
                found[piece] = left[0] - self._tokens_with(text, word) if again else left[start] - 1 - left[end]
            start = ends[start]
        return found

    def _tokens_with(self, inner: str, word: str) -> int:
        """The tokens of ``word`` with one piece more, for places within words."""
        longest = self.longest
        self.inner.add(inner)
        self.longest = max(longest, len(inner))
        tokens = len(self.ends(word)) or UNKNOWN
        self.inner.remove(inner)
        self.longest = longest
        return tokens


class _Candidates:
    """Every piece that would change how some of ``words`` are cut: how many tokens it saves, and how often it is used.

    ``words`` are numbers by word, and ``cutter`` cuts them. A piece that is used less than ``least`` times is no
    candidate. Those that save ``floor`` tokens or more are in a queue, most often a small part of all.
    """

    def __init__(self, words: Mapping[str, int], cutter: Cutter, least: int, queued: int):
        self.words, self.cutter, self.least, self.queued = words, cutter, least, queued
        self.saved: Counter = Counter()
        self.used: Counter = Counter()
        self._count(words, 1)
        self.queue: list[tuple[int, str]] = []
        self.floor = UNKNOWN
        self.listed, self.text = list(words), "\n".join(["", *words, ""])
        self.begins = list(accumulate((len(word) + 1 for word in words), initial=1))

    def _count(self, words: Iterable[str], times: int) -> set[str]:
        """Counts ``words``, or takes them out again; returns the pieces that would change how they are cut."""
        found = set()
        for word in words:
            for piece, tokens in self.cutter.saved(word).items():
                self.saved[piece] += times * self.words[word] * tokens
                self.used[piece] += times * self.words[word]
                found.add(piece)
        return found

    def change(self, piece: str, change: Callable[[str], None]) -> None:
        """Calls ``change(piece)``, a method of the cutter."""
        inner = piece.removeprefix(self.cutter.prefix)
        places = _places(self.text, inner if inner != piece else f"\n{piece}")
        # all that hold it: elsewhere than where they are cut so far it may change what another piece saves
        held = [self.listed[n] for n in sorted({bisect_right(self.begins, place + 1) - 1 for place in places})]
        changed = self._count(held, -1)
        change(piece)
        for other in changed | self._count(held, 1):
            if not self.used[other]:
                del self.used[other], self.saved[other]
            elif self._fit(other):
                heappush(self.queue, (-self.saved[other], other))

    def _fit(self, piece: str) -> bool:
        return self.saved[piece] >= self.floor and self.used[piece] >= self.least

    def best(self) -> str | None:
        """The candidate that saves most tokens, of several the first by name; None where none saves one."""
        while True:
            while self.queue:
                tokens, piece = heappop(self.queue)
                if self.saved[piece] == -tokens and self._fit(piece):  # not changed since
                    return piece
            if self.floor == 1:
                return None
            fit = (tokens for piece, tokens in self.saved.items() if self.used[piece] >= self.least)
            self.floor = max(1, min(nlargest(self.queued, fit), default=1))
            self.queued *= 2
            self.queue = [(-tokens, piece) for piece, tokens in self.saved.items() if self._fit(piece)]
            heapify(self.queue)


def _chosen(
    words: Mapping[str, int], cutter: Cutter, add: int, min_frequency: int, progress: Callable[[int], object]
) -> list[str]:
    """The pieces that save most tokens of ``words`` and their numbers, in the order in which ``cutter`` gets them."""
    candidates = _Candidates(words, cutter, min_frequency, 4 * add + 1000)
    chosen: list[str] = []
    while True:
        while len(chosen) < add and (piece := candidates.best()) is not None:
            candidates.change(piece, cutter.add)
            chosen.append(piece)
            progress(len(chosen))
        used = {piece for word in words for piece in cutter.pieces(word)}
        if used.issuperset(chosen):
            return chosen
        for piece in chosen:  # longer ones have taken its places
            if piece not in used:
                candidates.change(piece, cutter.remove)
        chosen = [piece for piece in chosen if piece in used]


def _places(text: str, part: str) -> Iterator[int]:
    """Where ``part`` begins in ``text``, each place."""
    place = text.find(part)
    while place >= 0:
        yield place
        place = text.find(part, place + 1)


def _divided(words: Mapping[str, int], cutter: Cutter) -> dict[str, int]:
    """Of ``words`` of several pieces each the most frequent ones, and all those that a new piece might make [UNK]."""
    letters = {letter for piece in cutter.inner for letter in piece}
    letters |= {letter for piece in cutter.first for letter in piece[1:]}
    loose = letters - cutter.inner  # cut only together with others
    found, room = {}, CHOSEN_FOR
    for word in sorted(words, key=words.__getitem__, reverse=True):
        number = len(cutter.ends(word))
        if number > 1 and "\n" not in word and (room > 0 or not loose.isdisjoint(word[1:])):
            found[word] = words[word]
            room -= number * len(word)
    return found


def _counted_words(tokenizer: Tokenizer, texts: Iterable[str], counts: Counter) -> Counter:
    """How often each word of ``texts`` occurs, as ``tokenizer`` gives them to WordPiece; ``counts`` as promised."""
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    others = re.compile("|".join(re.escape(content) for content in added if content not in SPECIAL_TOKENS) or "(?!)")
    apart = encodes_words_apart(tokenizer)
    words: Counter = Counter()
    stretches: Counter = Counter()

    def take_in() -> None:
        for stretch, number in stretches.items():
            for word in _words(tokenizer, stretch):
                words[word] += number
        stretches.clear()
        if len(words) > MOST_WORDS:
            frequent = dict(words.most_common(MOST_WORDS // 2))
            counts["words_forgotten"] += words.total() - sum(frequent.values())
            words.clear()
            words.update(frequent)

    for text in texts:
        text = others.sub(" ", text)
        stretches.update(text.translate(REMOVED).split() if apart else [text])
        if not apart or len(stretches) > STRETCHES:
            take_in()
    take_in()
    return words


def _words(tokenizer: Tokenizer, text: str) -> list[str]:
    """What ``tokenizer`` gives to its WordPiece of a text without added tokens."""
    normal = text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [normal] if normal else []
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]
