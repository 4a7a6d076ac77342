"""Runs on several prepared folders: their weights, exact resume, and what is said of each source."""

import dataclasses
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from bert_fast import optim
from bert_fast.cli import main
from bert_fast.data import load_tokenizer, prepare, read_documents, read_manifest, save_tokenizer, train_tokenizer
from bert_fast.data.places import Place
from bert_fast.run.config import ConfigError, resolve, sources
from bert_fast.run.dry_run import dry_run
from bert_fast.run.pretrain import pretrain
from bert_fast.run.resume import NotTheSameRun
from bert_fast.run.state import RunState
from bert_fast.train.step import Step
from tests.support.training_runs import losses, train, weights


@pytest.fixture(scope="module")
def notes(prepared, tmp_path_factory):
    """A folder of 16 other documents than ``data`` has, with the same tokenizer."""
    folder = tmp_path_factory.mktemp("notes")
    documents = sorted(read_documents(), key=len)[50:66]
    (folder / "notes.txt").write_text("\n\n".join("\n".join(d) for d in documents), encoding="utf-8")
    prepare(folder / "notes.txt", load_tokenizer(prepared / "tokenizer"), folder / "notes", workers=1)
    return folder / "notes"


@pytest.fixture
def two(configure, prepared, notes):
    """``two(**changes)``: a run on both, three tokens of ``data`` for each one of ``notes``."""

    def make(**changes):
        return configure(**{"data": (f"{prepared / 'data'}:3", f"{notes}:1"), **changes})

    return make


def killed_after(monkeypatch, updates: int):
    apply, done = Step.__call__, []

    def dying(self, *args, **kwargs):
        done.append(1)
        if len(done) == updates:
            os.kill(os.getpid(), signal.SIGTERM)
        return apply(self, *args, **kwargs)

    monkeypatch.setattr(Step, "__call__", dying)


@pytest.mark.parametrize(
    "options", [{}, {"phases": "16:5,32:7:batch=6", "nsp": False, "whole_word": True, "workers": 1}]
)
def test_stopped_runs_go_on_to_the_same_bits(two, tmp_path, monkeypatch, options):
    whole, pieces = two(out=str(tmp_path / "whole"), **options), two(**options)
    assert train(whole) == 0
    for updates in (3, 4):
        with monkeypatch.context() as patch:
            killed_after(patch, updates)
            assert train(pieces) == 143
    assert train(pieces) == 0
    assert weights(pieces, 12) == weights(whole, 12)
    assert losses(pieces, "train") == losses(whole, "train")
    assert losses(pieces)[-2:] == losses(whole)[-2:]


def test_what_each_source_has_is_reported(two, capsys):
    config = two(steps=60, checkpoint_every=60, mask_prob="0.2")
    assert pretrain(config) == 0
    *_, last = losses(config, "train")
    assert last["sources"]["data"]["share"] == pytest.approx(0.75, abs=0.02)
    assert last["sources"]["data"]["share"] + last["sources"]["notes"]["share"] == pytest.approx(1)
    (held,) = losses(config, "validation")
    by = held["sources"]
    for name in ("mlm_loss", "nsp_loss", "mlm_accuracy"):
        assert held[name] == pytest.approx(0.75 * by["data"][name] + 0.25 * by["notes"][name])
    assert held["perplexity"] == pytest.approx(np.exp(held["mlm_loss"]))
    assert held["sequences"] == by["data"]["sequences"] + by["notes"]["sequences"]
    said = capsys.readouterr().err
    assert "data, 75.0% of the tokens: " in said
    assert re.search(rf"notes {by['notes']['mlm_loss']:.4f}", said)

    card = (Path(config.out) / "model" / "README.md").read_text()
    assert "`data.txt`" in card
    assert "`notes.txt`" in card
    epochs = last["sources"]["notes"]["epochs"]
    assert f"notes {last['sources']['notes']['share']:.1%} in {epochs:.2f} epochs" in card
    assert f"`notes` alone: MLM loss {by['notes']['mlm_loss']:.4f}" in card

    facts = dry_run(dataclasses.replace(config, out=f"{config.out}-dry"))
    assert facts["data"]["sources"]["notes"]["share"] == 0.25
    assert facts["phases"][0]["epochs_of"]["notes"] == pytest.approx(epochs, rel=0.1)
    assert facts["phases"][0]["epochs_of"]["data"] == pytest.approx(last["sources"]["data"]["epochs"], rel=0.1)


def test_of_one_folder_the_weight_changes_nothing(configure, prepared, tmp_path):
    plain, weighted = configure(), configure(data=(f"{prepared / 'data'}:7",), out=str(tmp_path / "weighted"))
    assert train(plain) == train(weighted) == 0
    assert weights(plain, 12) == weights(weighted, 12)
    assert losses(plain) == losses(weighted)
    assert train(dataclasses.replace(weighted, data=plain.data, steps=13)) == 0


def test_without_weights_each_folder_counts_by_its_size(configure, prepared, notes):
    config = configure(data=(str(prepared / "data"), str(notes)), validation=0)
    found = dry_run(config)["data"]["sources"]
    tokens = [read_manifest(folder)["tokens"] for folder in (prepared / "data", notes)]
    assert found["notes"]["share"] == pytest.approx(tokens[1] / sum(tokens))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["{data}:0", "{notes}:1"], r"--data .*data:0: '0' is no weight, a number above 0"),
        (["{data}:-1", "{notes}:1"], "'-1' is no weight"),
        (["{data}:nan", "{notes}:1"], "'nan' is no weight"),
        (["{data}:inf", "{notes}:1"], "'inf' is no weight"),
        (["{data}:much", "{notes}"], "'much' is no weight"),
        (["{data}:", "{notes}"], "'' is no weight"),
        (["{data}:3", "{notes}"], "--data gives .*data a weight and others none"),
        (["{data}:3", "{data}:1"], "--data names .*data twice"),
        (["{data}:3", "{data}/../data:1"], "--data names .*data twice"),
        (["{data}:1e-10", "{notes}:1"], "--data .*data:1e-10: 1e-10 is not within 1e-09 and 1e.09"),
        (["{data}:1e308", "{notes}:1e308"], "1e308 is not within"),
        ([3, "{data}"], "--data takes text"),
        ([], "--data takes text"),
    ],
)
def test_what_is_wrong_with_weights_names_the_flag(configure, prepared, notes, data, message):
    given = [text if isinstance(text, int) else text.format(data=prepared / "data", notes=notes) for text in data]
    with pytest.raises(ConfigError, match=message):
        configure(data=given)
    if given:
        with pytest.raises(ConfigError, match=message.replace("--data", "--validation-data")):
            configure(validation_data=given)


def test_the_least_weight_is_still_drawn_from(configure, prepared, notes):
    config = configure(data=(f"{prepared / 'data'}:1e9", f"{notes}:1e-9"), steps=2)
    assert train(config) == 0
    assert 0 < losses(config, "train")[-1]["sources"]["notes"]["share"] < 0.2  # its first sample, and no other


def test_several_folders_are_validated_on_each_by_itself(configure, prepared, notes, capsys):
    folders = (f"{prepared / 'other'}:3", f"{notes}:1")
    config = configure(validation_data=folders, steps=4)
    assert pretrain(config) == 0
    (both,) = losses(config, "validation")
    assert list(both["sources"]) == ["other", "notes"]
    assert f"notes {both['sources']['notes']['mlm_loss']:.4f}" in capsys.readouterr().err
    for name in ("mlm_loss", "nsp_loss"):
        assert both[name] == pytest.approx(
            0.75 * both["sources"]["other"][name] + 0.25 * both["sources"]["notes"][name]
        )
    for name, folder in (("other", prepared / "other"), ("notes", notes)):
        alone = configure(validation_data=str(folder), steps=4, validation_sequences=2048, out=f"{config.out}-{name}")
        assert train(alone) == 0
        (line,) = losses(alone, "validation")
        assert {key: line[key] for key in both["sources"][name]} == both["sources"][name]
        assert weights(alone, 4) == weights(config, 4)
    card = (Path(config.out) / "model" / "README.md").read_text()
    assert "| `--validation-data` | other:3, notes:1 |" in card
    assert "name: other:3, notes:1" in card
    assert train(dataclasses.replace(config, steps=8)) == 0
    with pytest.raises(NotTheSameRun, match="--validation-data"):
        train(dataclasses.replace(config, validation_data=folders[:1], steps=8))


def test_nothing_is_held_out_beside_other_data_to_validate_on(configure, prepared, tmp_path):
    config = configure(validation_data=str(prepared / "other"), steps=2)
    assert train(config) == 0
    everything = configure(validation=0.0, steps=2, out=str(tmp_path / "everything"))
    assert train(everything) == 0
    assert weights(config, 2) == weights(everything, 2)


def test_validation_on_what_is_trained_on_is_told(two, prepared, notes, capsys):
    assert train(two(validation_data=(str(prepared / "other"), str(notes)), steps=1)) == 0
    said = capsys.readouterr().err
    assert f"--validation-data {notes} is trained on, too" in said
    assert said.count("is trained on, too") == 1


def test_validation_data_that_was_prepared_anew_is_not_the_same(configure, prepared, notes, tmp_path):
    (tmp_path / "held").symlink_to(prepared / "other")
    config = configure(validation_data=str(tmp_path / "held"), steps=4)
    assert train(config) == 0
    (tmp_path / "held").unlink()
    (tmp_path / "held").symlink_to(notes)
    with pytest.raises(NotTheSameRun, match="differs in --validation-data"):
        train(dataclasses.replace(config, steps=8))
    moved = dataclasses.replace(config, validation_data=str(prepared / "other"), steps=8)
    assert train(moved) == 0


@pytest.mark.parametrize("option", ["data", "validation_data"])
def test_a_folder_without_prepared_data_is_refused_by_the_name_of_its_flag(configure, prepared, option):
    with pytest.raises(FileNotFoundError, match=f"--{option.replace('_', '-')} nowhere: no nowhere/manifest.json"):
        train(configure(**{option: (str(prepared / "data"), "nowhere")}))


def test_a_folder_whose_name_has_a_colon_is_a_folder(configure, prepared, tmp_path):
    named = tmp_path / "data:3"
    named.symlink_to(prepared / "data")
    (tmp_path / "data").symlink_to(prepared / "other")
    assert sources(configure(data=str(named))) == {str(named): None}
    assert sources(configure(data=f"{named}:2.5")) == {str(named): 2.5}
    assert sources(configure(data=str(tmp_path / "no:where"))) == {str(tmp_path / "no:where"): None}
    assert train(configure(data=str(named), steps=1)) == 0


def test_another_tokenizer_is_refused_in_words(configure, prepared, notes, tmp_path):
    save_tokenizer(train_tokenizer(["other words than those"] * 3, 60), tmp_path / "tok")
    prepare(notes.parent / "notes.txt", tmp_path / "tok", tmp_path / "third", workers=1)
    with pytest.raises(ConfigError, match=r"--data .*third was prepared with another tokenizer than .*data \("):
        train(configure(data=(str(prepared / "data"), str(tmp_path / "third"))))
    (tmp_path / "one.txt").write_text("One document alone. It has two sentences.")
    prepare(tmp_path / "one.txt", load_tokenizer(prepared / "tokenizer"), tmp_path / "one", workers=1)
    with pytest.raises(ValueError, match=r"--data .*one: next-sentence prediction needs two documents"):
        train(configure(data=(str(prepared / "data"), str(tmp_path / "one"))))


def test_a_run_of_other_sources_is_refused_and_says_what_differs(two, prepared, notes):
    config = two(steps=4)
    assert train(config) == 0
    data = str(prepared / "data")
    for other, message in (
        ((f"{data}:1", f"{notes}:1"), "differs in the weights of --data:"),
        ((f"{notes}:1", f"{data}:3"), "differs in the order of --data:"),
        ((f"{data}:3", f"{prepared / 'other'}:1"), "the manifests of .* are not those it was trained on"),
        (data, "the manifests of .* are not those"),
    ):
        with pytest.raises(NotTheSameRun, match=message):
            train(dataclasses.replace(config, data=other, steps=8))
    assert train(dataclasses.replace(config, data=(f"{data}:6", f"{notes}:2"), steps=8)) == 0


def test_a_run_goes_on_with_another_mixture(configure, two, tmp_path, capsys):
    first = configure(steps=8, schedule="wsd")
    assert train(first) == 0
    options = {"continue_from": f"{first.out}/checkpoints/step-00000008", "out": str(tmp_path / "more"), "steps": 16}
    more = resolve(options | {"data": two().data})
    assert pretrain(more) == 0
    assert "is not the data of" in capsys.readouterr().err
    read = losses(more, "train")[-1]["sources"]
    assert read["data"]["share"] == pytest.approx(0.75, abs=0.05)
    again = resolve(options | {"data": [text.replace(":3", ":1") for text in two().data], "out": str(tmp_path / "e")}
                    | {"continue_from": f"{more.out}/checkpoints/step-00000012"})  # fmt: skip
    assert train(again) == 0
    assert losses(again, "train")[-1]["sources"]["data"]["share"] == pytest.approx(0.5, abs=0.1)


def test_samples_of_a_skipped_update_are_named_by_source(two, monkeypatch):
    config, norm = two(steps=2), optim.grad_norm
    monkeypatch.setattr(optim, "grad_norm", lambda parameters: norm(parameters) * float("nan"))
    assert train(config) == 0
    named = losses(config, "skipped")[0]["samples"]
    assert {sample[0] for sample in named} == {"data", "notes"}
    assert all(epoch == 0 and index >= 0 for _, epoch, index in named)


def test_from_the_command_line(two, prepared, notes, tmp_path, capsys):
    config = two(steps=4, track=None)
    options = {name: value for name, value in config.as_dict().items() if name != "data"}
    (tmp_path / "o.json").write_text(json.dumps(options))
    given = ["--data", f"{prepared / 'data'}:3", "--data", f"{notes}:1", "--config", str(tmp_path / "o.json")]
    given += ["--validation-data", str(prepared / "other"), "--validation-data", str(notes)]
    assert main(["pretrain", *given, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "notes, 25.0% of the tokens: " in out
    assert re.search(r"epochs of data, .* epochs of notes", out)
    assert main(["pretrain", *given, "--quiet"]) == 0
    assert resolve({}, Path(config.out) / "config.json").data == config.data
    assert main(["pretrain", "--config", f"{config.out}/config.json", "--quiet"]) == 0
    assert main(["evaluate", config.out, "--data", str(notes), "--device", "cpu"]) == 0
    assert "was trained on all of" in capsys.readouterr().err
    assert set(losses(config, "validation")[-1]["sources"]) == {"other", "notes"}


def test_a_state_of_before_there_were_several_sources_is_read():
    state = RunState(step=3, place=Place(1, 5)).as_dict()
    assert (state.pop("read"), state["place"]) == ([], {"epoch": 1, "position": 5})
    assert RunState.of(state) == RunState(step=3, place=Place(1, 5))
