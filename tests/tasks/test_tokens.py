"""Words to pieces and back: labels of first pieces, each word judged once, entities with their characters."""

import random
from collections import Counter

import numpy as np

from bert_fast.data.tokenizer import SPECIAL_TOKENS, berts_tokenizer
from bert_fast.tasks.tokens import IGNORED, Tokens, described, encode_texts, measured, targets
from bert_fast.tasks.words import Sentence

PIECES = ["anna", "##s", "paris", "in", ".", "lives", "re", "##al"]
TOKENIZER = berts_tokenizer({token: n for n, token in enumerate([*SPECIAL_TOKENS, *PIECES])}, lowercase=True)
NAMES = ["O", "B-PER", "I-PER", "B-LOC"]


def predicted(words, labels, names=NAMES, max_length=32, **options):
    """What a model whose logits say ``labels`` of the words, and another label of all other places, predicts."""
    task, counts = Tokens(**options), Counter()
    task.labels = names
    sentences = [Sentence(words, (), "file, line 1")]
    items = task.encode(sentences, TOKENIZER, max_length, counts)
    (encoded,) = {id(item.notes[0]): item.notes[0] for item in items}.values()
    scores = [np.zeros((0, len(names)), np.float32)] * len(items)
    for place, label in zip(encoded.places, labels, strict=True):
        if place is not None:
            row = np.where(np.arange(len(names)) == label, np.log(0.7), np.log(0.1)).astype(np.float32)
            scores[place[0]] = np.vstack([scores[place[0]], row])
    (found,) = task.predictions(sentences, items, scores)
    return found, counts


def test_labels_stand_at_first_pieces_alone():
    counts = Counter()
    (encoded,) = encode_texts([["Annas", "lives", "\u200b", "Paris"]], TOKENIZER, 16, counts=counts)
    (target,) = targets(encoded, [1, 0, 2, 3])
    assert target == [IGNORED, 1, IGNORED, 0, 3, IGNORED]
    assert counts["unseen"] == 1


def test_each_word_of_a_long_text_is_labelled_and_judged_once():
    words = random.choices(["Annas", "real", "Paris", ".", "lives"], k=100)
    labels = random.choices(range(4), k=100)
    counts = Counter()
    (encoded,) = encode_texts([words], TOKENIZER, 24, overlap=8, counts=counts)
    assert counts["windowed"] == 1
    assert len(encoded.windows) > 5
    found = targets(encoded, labels)
    assert sum(label != IGNORED for target in found for label in target) == 100
    for word, (window, place) in zip(words, encoded.places, strict=True):
        first = TOKENIZER.encode(word, add_special_tokens=False).ids[0]
        assert encoded.windows[window].ids[place] == first
        near = min(place, len(encoded.windows[window].ids) - 1 - place)
        inner = 0 < window < len(encoded.windows) - 1
        assert not inner or near >= 4  # half of what windows share
    tagged, _ = predicted(tuple(words), labels, max_length=24, overlap=8)
    assert tagged.tags == [NAMES[label] for label in labels]


def test_entities_have_the_characters_of_the_text():
    text = "  Annas real lives in\tPARIS."
    tagged, _ = predicted(text, [1, 2, 0, 0, 3, 0])
    found = described(tagged, "BIO")
    assert [(e["label"], e["text"], text[e["begin"] : e["end"]]) for e in found] == [
        ("PER", "Annas real", "Annas real"), ("LOC", "PARIS", "PARIS")
    ]  # fmt: skip
    assert all(abs(e["probability"] - 0.7) < 1e-6 for e in found)
    words = described(tagged, None)
    assert [(e["label"], e["text"]) for e in words][2:4] == [("O", "lives"), ("O", "in")]


def test_words_are_joined_by_spaces():
    (encoded,) = encode_texts([["Annas", "in", "Paris"]], TOKENIZER, 16, counts=Counter())
    assert encoded.text == "Annas in Paris"
    assert [encoded.text[a:b] for a, b in encoded.spans] == ["Annas", "in", "Paris"]


def test_a_word_without_a_piece_is_o_or_wrong():
    tagged, counts = predicted(("Annas", "\u200b"), [1, 1])
    assert tagged.tags == ["B-PER", "O"]
    assert counts["unseen"] == 1
    assert predicted(("Annas", "\u200b"), [1, 1], ["VERB", "NOUN", "ADP", "X"])[0].tags == ["NOUN", None]
    assert measured([["NOUN", "NOUN"]], [["NOUN", None]], None) == {"accuracy": 0.5}


def test_a_special_token_in_a_text_is_a_word():
    for words in ("Annas [SEP] lives", ("Annas", "[SEP]", "lives")):
        tagged, _ = predicted(words, [1, 0, 3])
        assert tagged.tags == ["B-PER", "O", "B-LOC"]
        assert [tagged.text[a:b] for a, b in tagged.spans] == ["Annas", "[SEP]", "lives"]


def test_a_text_without_words_has_no_entities():
    tagged, _ = predicted("\u200b", [])
    assert (tagged.tags, described(tagged, "BIO")) == ([], [])


def test_measures_of_words_and_entities():
    measures = measured([["B-PER", "I-PER", "O", "B-LOC"]], [["B-PER", "O", "O", "B-LOC"]], "BIO")
    assert (measures["accuracy"], measures["f1"], measures["kinds"]["LOC"]["f1"]) == (0.75, 0.5, 1.0)


def test_a_mark_of_a_stripped_accent_is_part_of_its_word():
    tagged, _ = predicted("Anna\u0301 lives in Paris\u0302\u0327.", [1, 0, 0, 3, 0])
    found = [tagged.text[begin:end] for begin, end in tagged.spans]
    assert found == ["Anna\u0301", "lives", "in", "Paris\u0302\u0327", "."]
