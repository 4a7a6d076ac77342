"""Schemes of tags, what breaks them, and entities as seqeval and conlleval find them."""

import random

import pytest
from seqeval.metrics.sequence_labeling import get_entities

from bert_fast.tasks.entities import Entity, broken, entities, is_iob1, scheme_of, scores


@pytest.mark.parametrize(
    ("tags", "scheme"),
    [
        ("O B-PER I-PER", "BIO"),
        ("O I-PER I-LOC", "IO"),
        ("O PER LOC", "IO"),
        ("O B-PER I-PER E-PER S-LOC", "BIOES"),
        ("O S-PER", "BIOES"),
        ("O B-PER L-PER U-LOC", "BILOU"),
        ("NOUN VERB", None),
        ("O B-PER MISC", None),
        ("O", None),
    ],
)
def test_the_scheme_is_told_from_the_tags(tags, scheme):
    assert scheme_of(tags.split()) == scheme


@pytest.mark.parametrize(
    ("tags", "scheme", "found"),
    [
        ("B-PER I-PER O B-LOC B-LOC", "BIO", [("PER", 0, 2), ("LOC", 3, 4), ("LOC", 4, 5)]),
        ("I-PER I-PER B-PER I-LOC", "BIO", [("PER", 0, 2), ("PER", 2, 3), ("LOC", 3, 4)]),
        ("PER PER O LOC PER", "IO", [("PER", 0, 2), ("LOC", 3, 4), ("PER", 4, 5)]),
        ("B-PER I-PER E-PER S-PER E-PER", "BIOES", [("PER", 0, 3), ("PER", 3, 4), ("PER", 4, 5)]),
        ("B-PER L-PER U-PER", "BILOU", [("PER", 0, 2), ("PER", 2, 3)]),
        ("B-A-B I-A-B", "BIO", [("A-B", 0, 2)]),
    ],
)
def test_entities_of_each_scheme(tags, scheme, found):
    assert entities(tags.split(), scheme) == [Entity(*entity) for entity in found]


def f1(truth, predicted):
    real, found = ({(n, e) for n, row in enumerate(rows) for e in row} for rows in (truth, predicted))
    return 2 * len(real & found) / (len(real) + len(found)) if real or found else 0


@pytest.mark.parametrize(("scheme", "prefixes"), [("BIO", "BI"), ("IO", "I"), ("BIOES", "BIES"), ("BILOU", "BILU")])
def test_entities_are_those_that_seqeval_judges(scheme, prefixes):
    """Tags at random, most of which break their scheme: what is predicted as an entity is what the F1 is of."""
    tags = ["O", *(f"{prefix}-{kind}" for prefix in prefixes for kind in ("PER", "LOC"))]
    if scheme == "IO":
        tags += ["PER"]
    for _ in range(30):
        truth = [random.choices(tags, k=random.randint(1, 12)) for _ in range(8)]
        found = [[random.choice((tag, random.choice(tags))) for tag in row] for row in truth]
        measures = scores(truth, found, scheme)
        pairs = [[entities(row, scheme) for row in rows] for rows in (truth, found)]
        assert measures["f1"] == pytest.approx(f1(*pairs))
        assert measures["entities"] == sum(map(len, pairs[0]))
        for kind, row in measures["kinds"].items():
            assert row["f1"] == pytest.approx(f1(*([[e for e in r if e.kind == kind] for r in rows] for rows in pairs)))


def test_entities_of_the_default_mode_of_seqeval():
    for _ in range(100):
        row = random.choices(["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in ("PER", "LOC"))], k=12)
        assert [(e.kind, e.begin, e.end - 1) for e in entities(row, "BIOES")] == get_entities(row)


def test_scores_without_an_entity_are_0():
    assert scores([["O", "O"]], [["O", "O"]], "BIO")["f1"] == 0
    assert scores([["B-PER", "O"]], [["O", "O"]], "BIO")["f1"] == 0
    assert scores([["O", "O"]], [["B-PER", "O"]], "BIO")["f1"] == 0


def test_scores_of_seqevals_own_example():
    """The example of seqeval's README: F1 0.50, MISC 0, PER 1."""
    truth = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    found = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    measures = scores(truth, found, "BIO")
    kinds = measures.pop("kinds")
    assert measures == {"f1": 0.5, "entity_precision": 0.5, "entity_recall": 0.5, "entities": 2}
    assert {kind: numbers["f1"] for kind, numbers in kinds.items()} == {"MISC": 0.0, "PER": 1.0}


@pytest.mark.parametrize(
    ("tags", "scheme", "places"),
    [
        ("B-PER I-PER O B-LOC I-LOC", "BIO", []),
        ("O I-PER", "BIO", [1]),
        ("B-PER I-LOC", "BIO", [1]),
        ("B-PER E-PER S-LOC O B-PER I-PER E-PER", "BIOES", []),
        ("B-PER O", "BIOES", [0]),
        ("B-PER", "BIOES", [0]),
        ("S-PER I-PER E-PER", "BIOES", [1]),
        ("B-PER S-PER", "BIOES", [0]),
        ("B-PER L-PER U-PER", "BILOU", []),
        ("B-PER U-PER", "BILOU", [0]),
        ("PER LOC O", "IO", []),
    ],
)
def test_what_breaks_a_scheme_is_placed(tags, scheme, places):
    assert sorted({place for place, _ in broken(tags.split(), scheme)}) == places


def test_iob1_is_told_from_iob2():
    assert is_iob1([["I-PER", "O"], ["I-PER", "B-PER"]])
    assert not is_iob1([["B-PER", "O"], ["I-PER"]])
    assert not is_iob1([["I-PER", "O"]])
