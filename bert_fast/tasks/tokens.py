"""A tag for each word: encoded in overlapping windows, read from first pieces, judged by whole entities.

Source: BERT's section 5.3, whose classifier reads the first piece of a word; transformers' run_ner.py.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedConfig

from bert_fast.model import BertForTokenClassification
from bert_fast.tasks.entities import TAG, broken, entities, is_iob1, scheme_of, scores
from bert_fast.tasks.records import counted_in, names_of, refuse_columns
from bert_fast.tasks.tables import Source
from bert_fast.tasks.task import Item, Task
from bert_fast.tasks.windows import OVERLAP, Window, windows, with_marks, with_most_context
from bert_fast.tasks.words import COLUMNS, TAGS, WORDS, Sentence, read_sentences, unlabelled_sentences

IGNORED = -100  # a label that no loss reads
OUTSIDE = "O"


class Encoded(NamedTuple):
    """A text's windows, and for each of its words where it is judged: (window, place in its sequence).

    None stands for a word of which the tokenizer made no piece. ``spans`` are the words' characters in ``text``.
    """

    windows: list[Window]
    places: list[tuple[int, int] | None]
    text: str
    spans: list[tuple[int, int]]


def encode_texts(
    texts: Sequence[Sequence[str] | str], tokenizer: Tokenizer, max_length: int, *, overlap: int = OVERLAP,
    counts: Counter,
) -> list[Encoded]:  # fmt: skip
    """The sequences of texts in words, which a space is put between, and of texts whose words the tokenizer tells.

    ``counts`` gets how many of them take several windows ("windowed"), and how many words have no piece ("unseen").
    """
    found = []
    for text in texts:
        given = None if isinstance(text, str) else list(text)
        encoding = tokenizer.encode(text if given is None else given, is_pretokenized=given is not None)
        own = zip(encoding.word_ids, encoding.offsets, encoding.sequence_ids, strict=True)
        pieces = [(word, offsets) for word, offsets, number in own if number == 0]
        first = {word: piece for piece, (word, _) in reversed(list(enumerate(pieces))) if word is not None}
        if given is None:
            offsets = with_marks(cast(str, text), [offset for _, offset in pieces])
            ends = {word: end for (word, _), (_, end) in zip(pieces, offsets, strict=True)}
            spans = {word: (offsets[piece][0], ends[word]) for word, piece in first.items()}
        else:
            begins = accumulate((len(word) + 1 for word in given), initial=0)
            spans = {n: (begin, begin + len(word)) for n, (begin, word) in enumerate(zip(begins, given, strict=False))}
        words = sorted(spans)
        parts = windows(encoding, max_length, overlap=overlap)
        counts["windowed"] += len(parts) > 1
        counts["unseen"] += len(words) - len(first)
        places = [None if word not in first else _judged(first[word], parts) for word in words]
        joined = text if isinstance(text, str) else " ".join(text)
        found.append(Encoded(parts, places, joined, [spans[word] for word in words]))
    return found


def _judged(piece: int, parts: Sequence[Window]) -> tuple[int, int]:
    number = with_most_context(piece, parts)
    return number, parts[number].first + piece - parts[number].begin


def targets(encoded: Encoded, labels: Sequence[int]) -> list[list[int]]:
    """For each window the label of each place of its sequence; a word's stands once, elsewhere is -100."""
    found = [[IGNORED] * len(window.ids) for window in encoded.windows]
    for place, label in zip(encoded.places, labels, strict=True):
        if place is not None:
            found[place[0]][place[1]] = label
    return found


class Tagged(NamedTuple):
    """What is predicted for a text: the tag of each word, its probability, and its characters in ``text``.

    A word without a piece has the tag O, or None where that is no tag.
    """

    tags: list[str | None]
    probabilities: list[float]
    text: str
    spans: list[tuple[int, int]]


def described(tagged: Tagged, scheme: str | None) -> list[dict]:
    """The entities of a text with their characters in it; its words with their tags where no ``scheme`` marks any.

    A probability is the mean over its words' tags.
    """
    if scheme is None:
        groups = [(tag, number, number + 1) for number, tag in enumerate(tagged.tags)]
    else:
        groups = [(e.kind, e.begin, e.end) for e in entities(_known(tagged.tags), scheme)]
    found = []
    for kind, begin, end in groups:
        a, b = tagged.spans[begin][0], tagged.spans[end - 1][1]
        probability = sum(tagged.probabilities[begin:end]) / (end - begin)
        found.append({"label": kind, "text": tagged.text[a:b], "begin": a, "end": b, "probability": probability})
    return found


def _known(tags: Sequence[str | None]) -> list[str]:
    return [OUTSIDE if tag is None else tag for tag in tags]


def measured(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str | None]], scheme: str | None) -> dict:
    """The share of words with the right tag, and, of tags in a ``scheme``, :func:`.entities.scores`."""
    pairs = [pair for real, found in zip(truth, predicted, strict=True) for pair in zip(real, found, strict=True)]
    measures = {"accuracy": sum(real == found for real, found in pairs) / len(pairs)}
    if scheme is None:
        return measures
    return scores(truth, list(map(_known, predicted)), scheme) | measures


def doubts(sentences: Sequence[Sentence], name: str, labels: Sequence[str]) -> Iterator[str]:
    """What a user must know of the tags of ``name``'s sentences, which are to be of the scheme of ``labels``."""
    scheme = scheme_of(labels)
    if scheme is None:
        tags = {tag for sentence in sentences for tag in sentence.tags} - {OUTSIDE}
        marked = sorted(filter(TAG.fullmatch, tags))
        if marked and (other := sorted(tags - set(marked))):
            yield f"{name}: {marked[0]!r} marks entities and {other[0]!r} does not: words are judged alone"
        return
    if scheme == "BIO" and is_iob1(sentence.tags for sentence in sentences):
        yield f"{name}: the tags are IOB1, where B begins an entity only after another one of its kind"
        return
    wrong = [(s, *found) for s in sentences for found in broken(s.tags, scheme)]
    if wrong:
        sentence, place, what = wrong[0]
        yield (
            f"{name}: {len(wrong):,} tags break the scheme {scheme}, the first of the word {place + 1} "
            f"({sentence.words[place]!r}) of the sentence at {sentence.where}: {what}; entities are read as conlleval "
            "does"
        )


def tag_names(sentences: Iterable[Sentence]) -> list[str]:
    """The tags that occur, O first, then by name and prefix; ValueError for one alone."""
    tags = {tag for sentence in sentences for tag in sentence.tags}
    if len(tags) < 2:
        raise ValueError(f"words need two tags at least; the sentences have only {sorted(tags)[0]}")
    return sorted(tags, key=lambda tag: (tag != OUTSIDE, tag[2:] if tag[1:2] == "-" else tag, tag))


class Tokens(Task):
    """A tag for each word. ``overlap`` is how many pieces the windows over a long text share.

    A prediction is a :class:`Tagged`. The best epoch is that of the highest F1 of entities, and of the highest share of
    right tags where these mark no entities.
    """

    name, model, options = "tokens", BertForTokenClassification, ("overlap",)
    counted: ClassVar[dict[str, str]] = {
        "windowed": "texts in several windows of {seq} tokens",
        "unseen": "words of which the tokenizer makes no piece: nothing is learnt of them, and they are said to be O",
    }

    def __init__(self, overlap: int = OVERLAP):
        self.overlap = overlap
        self.left_out: dict[str, Counter] = {}  # of each file that was read

    @property
    def scheme(self) -> str | None:
        """That of the labels; see :func:`.entities.scheme_of`."""
        return scheme_of(self.labels)

    @property
    def metric(self) -> str:  # type: ignore[override]
        return "accuracy" if self.scheme is None else "f1"

    @classmethod
    def recognises(cls, path: Path) -> bool:
        if path.suffix.lower() in COLUMNS:
            return path.suffix.lower() != ".txt"  # which may be anything
        names = names_of(path)
        return bool(names & set(WORDS) and names & set(TAGS))

    def read(
        self, path: str | Path, *, text: str | None = None, label: str | Sequence[str] | None = None, **other
    ) -> list[Sentence]:
        """``text`` names or numbers the column of the words, ``label`` that of the tags."""
        refuse_columns(self.name, other)
        labels = [label] if label is None or isinstance(label, str) else label
        if len(labels) != 1:
            raise ValueError(f"a word has one tag: {' and '.join(map(repr, labels))} are several columns")
        self.left_out[str(path)] = Counter()
        return read_sentences(path, words=text, tags=labels[0], counts=self.left_out[str(path)])

    def unknown(self, example: Sentence) -> str | None:
        return next((tag for tag in example.tags if tag not in self.labels), None)

    def unlabelled(self, source: Source, *, text: str | None = None, pair: str | None = None) -> Iterator[Sentence]:
        refuse_columns(self.name, {"pair": pair})
        return unlabelled_sentences(source, text)

    def settle(self, train: list, validation: list) -> tuple[list, list, list[str]]:
        self.labels = tag_names(train)
        parts = {"training": train, "validation": validation}
        told = [text for name, part in parts.items() for text in doubts(part, name, self.labels)]
        for sentence in validation:
            if unknown := sorted(set(sentence.tags) - set(self.labels)):
                raise ValueError(f"{sentence.where}: the tag {unknown[0]!r}, which no training sentence has")
        if self.scheme is not None and all(tag == OUTSIDE for sentence in validation for tag in sentence.tags):
            told.append("validation has no entity: F1 is 0 whatever is said")
        return train, validation, told + counted_in(self.left_out)

    def config(self) -> dict[str, Any]:
        return {"window_overlap": self.overlap}

    def restore(self, config: PreTrainedConfig) -> None:
        super().restore(config)
        self.overlap = getattr(config, "window_overlap", self.overlap)

    def encode(self, examples: list, tokenizer: Tokenizer, max_length: int, counts: Counter) -> list[Item]:
        numbers = {name: number for number, name in enumerate(self.labels)}
        texts = [sentence.words for sentence in examples]
        items = []
        for number, one in enumerate(encode_texts(texts, tokenizer, max_length, overlap=self.overlap, counts=counts)):
            tags = examples[number].tags
            labels = targets(one, [numbers[tag] for tag in tags]) if tags else None
            for window, sequence in enumerate(one.windows):
                target = None if labels is None else labels[window]
                items.append(Item([(sequence.ids, sequence.segments)], number, target, (one, window)))
        return items

    def weight(self, items: Sequence[Item]) -> float:
        return sum(label != IGNORED for item in items for label in item.target)

    def targets(self, items: Sequence[Item]) -> dict[str, Tensor]:
        return {"labels": torch.tensor([label for item in items for label in item.target])[None]}

    def scores(self, output, items: Sequence[Item]) -> list[np.ndarray]:
        """(words judged in the window, tags) of each."""
        rows = output.logits[0].float().cpu().numpy()
        found, begin = [], 0
        for item in items:
            one, window = item.notes
            found.append(rows[[begin + place[1] for place in one.places if place is not None and place[0] == window]])
            begin += item.length
        return found

    def predictions(self, examples: list, items: Sequence[Item], scores: Sequence[np.ndarray]) -> list[Tagged]:
        without = (OUTSIDE if OUTSIDE in self.labels else None, 0.0)
        found: list[Tagged] = [Tagged([], [], "", [])] * len(examples)
        rows: dict[int, list] = {}
        for item, logits in zip(items, scores, strict=True):
            probabilities = torch.from_numpy(logits).softmax(dim=1).numpy()
            rows.setdefault(item.example, []).append(iter(probabilities))
            one, window = item.notes
            if window + 1 == len(one.windows):
                judged = []
                for place in one.places:
                    row = None if place is None else next(rows[item.example][place[0]])
                    judged.append(without if row is None else (self.labels[int(row.argmax())], float(row.max())))
                tags, sure = zip(*judged, strict=True) if judged else ((), ())
                found[item.example] = Tagged(list(tags), list(sure), one.text, one.spans)
        return found

    def metrics(self, examples: list, predictions: list) -> dict[str, Any]:
        """accuracy of words; f1, entity_precision, entity_recall and number of entities, over all and by "kinds"."""
        return measured([example.tags for example in examples], [tagged.tags for tagged in predictions], self.scheme)

    def about(self, train: list, validation: list) -> dict[str, Any]:
        """``majority``: the accuracy of always saying the most frequent tag of ``train``."""
        counts = Counter(tag for sentence in train for tag in sentence.tags)
        most = max(self.labels, key=counts.__getitem__)
        tags = [tag for sentence in validation for tag in sentence.tags]
        return {"majority": tags.count(most) / len(tags)}

    def told(self, metrics: dict) -> str:
        words = f"accuracy of words {100 * metrics['accuracy']:.2f} %"
        return words if self.scheme is None else f"F1 of entities {100 * metrics['f1']:.2f} %, {words}"

    def line(self, example, prediction) -> dict[str, Any]:
        return {"text": prediction.text, "entities" if self.scheme else "words": described(prediction, self.scheme)}
