"""What is kept of decisions: found again for the very same key, by the drop-in for its model, and never half."""

import json
import os

import pytest
import torch

from bert_fast import BertConfig, choice
from bert_fast.tuning import store

HERE = {"device": "made", "capability": 90, "kernels": "abc"}
SIZES = {"hidden": 64, "inner": 128, "heads": 2, "vocabulary": 300, "longest": 32, "attention": "auto"}
KEY = {"machine": HERE, "sizes": SIZES | {"dropout": (0.1, 0.1)}}
CHOSEN = [("attention.one_pass", {}, {90: 512}), ("attention.fwd", {"BLOCK_M": 64}, {"BLOCK_M": 128})]
CONFIG = BertConfig(hidden_size=64, intermediate_size=128, num_attention_heads=2, vocab_size=300)


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("BERT_FAST_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(store, "machine", lambda device: HERE)
    with choice.held():
        monkeypatch.setattr(choice, "_held", False)
        yield tmp_path / "kept"


def test_a_decision_is_found_again_as_it_was(folder):
    assert store.read(KEY) is None
    path = store.write(KEY, CHOSEN, [{"question": "q"}])
    assert path.parent == folder
    found = store.read(json.loads(json.dumps(KEY)))
    assert (found["chosen"], found["rows"]) == (CHOSEN, [{"question": "q"}])
    assert [p.name for p in folder.iterdir()] == [path.name]  # nothing is left beside it


@pytest.mark.parametrize("part", ["machine", "sizes"])
@pytest.mark.parametrize("name", ["device", "kernels", "hidden", "dropout", "longest"])
def test_another_key_finds_nothing(part, name):
    store.write(KEY, CHOSEN, [])
    other = KEY | {part: KEY[part] | {name: "another"}}
    assert store.read(other) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"chosen"', '"other"'),
        lambda text: text.replace('"attention.fwd"', "7"),
        lambda text: json.dumps(json.loads(text) | {"chosen": [["attention.fwd", {}]]}),
        lambda text: json.dumps(json.loads(text) | {"chosen": [["attention.fwd", {}, 3]]}),
        lambda text: json.dumps(json.loads(text) | {"key": KEY | {"machine": HERE | {"device": "another"}}}),
        lambda text: "\x00" * 9,
    ],
)
def test_a_damaged_file_is_as_none(damage):
    path = store.write(KEY, CHOSEN, [])
    path.write_text(damage(path.read_text()))
    assert store.read(KEY) is None
    store.settle_kept(CONFIG, torch.device("cpu"))
    assert not choice.active()
    assert store.read(KEY) is None
    store.write(KEY, CHOSEN, [])
    assert store.read(KEY)["chosen"] == CHOSEN


def test_a_folder_that_cannot_be_written_to_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BERT_FAST_CACHE", str(tmp_path / "file" / "below"))
    assert store.write(KEY, CHOSEN, []) is None
    assert store.read(KEY) is None
    store.settle_kept(CONFIG, torch.device("cpu"))


def test_what_is_shipped_serves_where_the_user_has_nothing_of_his_own(monkeypatch, tmp_path, folder):
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("BERT_FAST_CACHE", str(tmp_path / "shipped"))
    store.write(KEY, CHOSEN, [])
    monkeypatch.setenv("BERT_FAST_CACHE", str(folder))
    assert store.read(KEY)["chosen"] == CHOSEN
    store.write(KEY, [], [])
    assert store.read(KEY)["chosen"] == []


def test_the_drop_in_takes_up_what_was_decided_for_its_model_on_its_machine():
    store.write(KEY, CHOSEN, [])
    store.write(KEY | {"machine": HERE | {"device": "another"}}, [("a", {}, {"x": 1})], [])
    store.write(KEY | {"sizes": SIZES | {"hidden": 65}}, [("b", {}, {"x": 1})], [])
    store.write(KEY | {"sizes": SIZES | {"attention": "library"}}, [("attention.torch", {}, {"kernel": "cudnn"})], [])
    newest = store.write(
        KEY | {"sizes": SIZES | {"longest": 16}}, [("attention.fwd", {"BLOCK_M": 64}, {"BLOCK_M": 32})], []
    )
    os.utime(newest, (2e9, 2e9))
    store.settle_kept(CONFIG, torch.device("cpu"))
    assert choice.of("attention.fwd", {"BLOCK_M": 64}) == {"BLOCK_M": 32}
    assert choice.of("attention.fwd", {"BLOCK_M": 16}) == {"BLOCK_M": 16}  # of another case nothing was decided
    assert choice.of("attention.one_pass", {}) == {90: 512}
    assert [choice.of(name, {}) for name in ("a", "b", "attention.torch")] == [{}] * 3


def test_a_run_says_itself_what_serves():
    store.write(KEY, CHOSEN, [])
    with choice.held():
        store.settle_kept(CONFIG, torch.device("cpu"))
        assert not choice.active()
    store.settle_kept(CONFIG, torch.device("cpu"))
    assert choice.active()
    with choice.held():
        assert not choice.active()
        choice.settle([("c", {}, {"x": 1})])
    assert choice.of("c", {}) == {}
    assert choice.of("attention.one_pass", {}) == {90: 512}


def test_the_hash_is_of_all_that_is_chosen_from(monkeypatch, tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "peers").mkdir()
    (tmp_path / "peers" / "torch_attention.py").write_text("1")
    (tmp_path / "kernels" / "a.py").write_text("1")
    monkeypatch.setattr(store, "ROOT", tmp_path)
    hashes = {store.kernels_hash.__wrapped__()}
    for path in ("kernels/a.py", "peers/torch_attention.py"):
        (tmp_path / path).write_text("2")
        hashes.add(store.kernels_hash.__wrapped__())
    assert len(hashes) == 3
