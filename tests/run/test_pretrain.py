"""Whole runs, in this process: exact resume, what is refused, losses that are not finite, a full disk, RUN/model."""

import dataclasses
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import transformers

import bert_fast
from bert_fast import optim
from bert_fast.data import PretrainingDataset, load_tokenizer, open_corpus, pad_samples, prepare, read_manifest
from bert_fast.data.files import FolderInUse
from bert_fast.output import Output
from bert_fast.run import checkpoint, metrics, new_model, pretrain
from bert_fast.run.checkpoint import CheckpointError
from bert_fast.run.config import ConfigError, resolve
from bert_fast.run.resume import NotTheSameRun
from bert_fast.run.validation import hold_out
from bert_fast.train.step import Step
from tests.support.training_runs import losses, train, weights


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


def kill_after(monkeypatch, updates: int) -> None:
    """The process dies after so many updates of this start."""
    done = []
    apply = Step.__call__

    def dying(self, *args, **kwargs):
        if len(done) == updates:
            raise Killed
        done.append(1)
        return apply(self, *args, **kwargs)

    monkeypatch.setattr(Step, "__call__", dying)


@pytest.mark.parametrize(
    "options", [{}, {"phases": "16:5,32:7:batch=6", "nsp": False, "whole_word": True, "mask_prob": "0.4:0.1"}]
)
def test_resumed_runs_are_bit_for_bit_the_uninterrupted_one(configure, tmp_path, monkeypatch, options):
    whole = configure(out=str(tmp_path / "whole"), **options)
    assert train(whole) == 0
    pieces = configure(**options)
    for updates in (2, 7, 3):  # before the first checkpoint, in the middle, and again from the same one
        with monkeypatch.context() as patch:
            kill_after(patch, updates)
            with pytest.raises(Killed):
                train(pieces)
    assert train(pieces) == 0
    assert weights(pieces, 12) == weights(whole, 12)
    assert losses(pieces) == losses(whole)
    assert [line["step"] for line in losses(whole, "train")] == list(range(1, 13))
    assert [line["step"] for line in losses(whole, "validation")] == [4, 8, 12]


@pytest.mark.parametrize("whole_word", [False, True])
def test_a_masking_rate_that_falls(configure, prepared, whole_word):
    """Every phase begins at the first rate and ends at the second; validation is masked as published."""
    options = {"phases": "32:7:batch=64,32:5:batch=64", "whole_word": whole_word, "validate_every": 12}
    assert train(configure(mask_prob="0.5:0.2", mask_shares="50:25:25", **options)) == 0
    found = [line["mask_prob"] for line in losses(configure(), "train")]
    expected = [0.5 - 0.05 * i for i in range(7)] + [0.5 - 0.075 * i for i in range(5)]
    assert found == pytest.approx(expected, abs=0.04 if whole_word else 0.02)  # of some 29 tokens
    (validated,) = losses(configure(), "validation")
    dataset = PretrainingDataset(open_corpus(prepared / "data"), load_tokenizer(prepared / "tokenizer"), max_length=32)
    _, held_out = hold_out(dataset.corpus, 0.1, seed=0, nsp=True)
    published = PretrainingDataset(held_out, load_tokenizer(prepared / "tokenizer"), max_length=32)
    if not whole_word:
        assert validated["masked"] == published.predicted(published.order()).sum()


def test_a_finished_run_is_done_at_once_and_grows_with_steps(configure):
    config = configure()
    train(config)
    before = weights(config, 12)
    assert train(config) == 0
    assert weights(config, 12) == before
    assert train(dataclasses.replace(config, steps=15)) == 0
    assert [line["step"] for line in losses(config, "train")] == list(range(1, 16))
    with pytest.raises(ConfigError, match="update 15 already"):
        train(config)


def test_a_damaged_newest_checkpoint_is_passed_over(configure, tmp_path, capsys):
    whole, config = configure(out=str(tmp_path / "whole")), configure()
    train(whole)
    train(dataclasses.replace(config, steps=12))
    path = checkpoint.folder_of(Path(config.out), 12) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert train(config) == 0
    told = capsys.readouterr().err
    assert "step-00000012 is damaged and passed over: model.safetensors has" in told
    assert weights(config, 12) == weights(whole, 12)
    assert losses(config) == losses(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"--seed \(was 0, now 1\)"),
        ({"nsp": False}, "--nsp"),
        ({"model": "tiny"}, r"the model's hidden_size \(was 32, now 128\)"),
        ({"optimizer": "lamb"}, r"--optimizer \(was adamw, now lamb\)"),
        ({"resume": "never"}, "has a run already"),
    ],
)
def test_a_run_of_something_else_is_refused_by_name(configure, changes, message):
    config = configure(steps=4)
    train(config)
    before = weights(config, 4)
    with pytest.raises(NotTheSameRun, match=message):
        train(dataclasses.replace(config, **changes))
    assert weights(config, 4) == before
    assert [line["step"] for line in losses(config, "train")] == [1, 2, 3, 4]


def test_other_data_and_tokenizer_are_refused(configure, prepared, as_first_version, tmp_path):
    config = configure(steps=4)
    train(config)
    with pytest.raises(NotTheSameRun, match=r"the data .*is not the one it was trained on"):
        train(dataclasses.replace(config, data=str(prepared / "other")))
    moved = tmp_path / "moved"
    shutil.copytree(prepared / "data", moved)
    assert train(dataclasses.replace(config, data=str(moved), steps=5)) == 0  # the same data elsewhere are the same
    as_first_version(moved)  # whose manifest does not tell of another tokenizer
    config = dataclasses.replace(config, data=str(moved), out=str(tmp_path / "first"))
    train(config)
    text = (moved / "tokenizer" / "tokenizer.json").read_text()
    (moved / "tokenizer" / "tokenizer.json").write_text(text.replace('"lowercase": true', '"lowercase": false'))
    assert text != (moved / "tokenizer" / "tokenizer.json").read_text()
    with pytest.raises(NotTheSameRun, match="differs in the tokenizer"):
        train(dataclasses.replace(config, steps=6))


def test_other_options_are_told_and_go_on(configure, capsys):
    config = configure(steps=4)
    train(config)
    assert train(dataclasses.replace(config, steps=6, lr=5e-4)) == 0
    assert "--lr (was 0.001, now 0.0005)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"warmup": 5.0}, r"\(5 and 0 updates\) do not fit into the 2 updates"),
        ({"schedule": "wsd", "decay_steps": 3.0, "warmup": 0.0}, r"\(0 and 3 updates\) do not fit into the 2"),
        ({"phases": "16:1,32:1:warmup=2"}, r"\(2 and 0 updates\) do not fit into the 1"),
    ],
)
def test_a_schedule_that_does_not_fit_into_its_updates_is_told(configure, capsys, options, told):
    assert train(configure(steps=2, **options)) == 0
    assert re.search(f"--warmup and --decay-steps {told}", capsys.readouterr().err)
    assert train(configure(steps=2, warmup=1.0, out=configure().out + "-fits")) == 0
    assert "do not fit" not in capsys.readouterr().err


def test_a_run_that_died_before_its_first_checkpoint_is_not_overwritten_by_another(configure, monkeypatch):
    config = configure()
    with monkeypatch.context() as patch:
        kill_after(patch, 1)
        with pytest.raises(Killed):
            train(config)
    with pytest.raises(NotTheSameRun, match="another --model"):
        train(dataclasses.replace(config, model="tiny"))


def test_one_run_at_a_time(configure):
    config = configure(steps=4)
    folder = Path(config.out)
    folder.mkdir()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        import fcntl

        with (folder / ".lock").open("wb") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            os.write(write, b"x")
            signal.pause()
    try:
        os.read(read, 1)
        with pytest.raises(FolderInUse, match="another process trains in"):
            train(config)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert train(config) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_signals_save_and_leave_and_the_run_goes_on(configure, tmp_path, monkeypatch, number, code):
    whole, config = configure(out=str(tmp_path / "whole")), configure()
    train(whole)
    apply = Step.__call__
    done = []

    def interrupted(self, *args, **kwargs):
        done.append(1)
        if len(done) == 6:
            os.kill(os.getpid(), number)
        return apply(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", interrupted)
        handler = signal.getsignal(number)
        assert train(config) == code
        assert signal.getsignal(number) == handler
    stopped = losses(config)[-1]
    assert stopped["kind"] == "end"
    assert stopped["step"] in (6, 7)  # the update at hand, or the one after it
    assert checkpoint.newest(Path(config.out))[0].step == stopped["step"]
    assert train(config) == 0
    assert weights(config, 12) == weights(whole, 12)
    assert losses(config) == losses(whole)


def poison(monkeypatch, updates: set[int]) -> None:
    """The gradient of these updates (counted from 1) is NaN."""
    norm, calls = optim.grad_norm, []

    def broken(parameters):
        calls.append(1)
        found = norm(parameters)
        return found * float("nan") if len(calls) in updates else found

    monkeypatch.setattr(optim, "grad_norm", broken)


def test_an_update_that_is_not_finite_is_skipped_and_its_samples_are_named(configure, monkeypatch, capsys):
    config = configure()
    poison(monkeypatch, {3, 7, 8})
    assert train(dataclasses.replace(config, max_skipped=3)) == 0
    skipped = losses(config, "skipped")
    assert [line["step"] for line in skipped] == [3, 7, 8]
    assert all(len(line["samples"]) == config.batch_size and line["reason"] for line in skipped)
    assert len({tuple(sample) for line in skipped for sample in line["samples"]}) == 3 * config.batch_size
    assert [line["step"] for line in losses(config, "train")] == [1, 2, 4, 5, 6, 9, 10, 11, 12]
    assert "update 7 was skipped: the gradient was not finite" in capsys.readouterr().err
    model = bert_fast.BertForPreTraining.from_pretrained(Path(config.out) / "model")
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def test_too_many_in_a_row_stop_the_run_with_its_own_exit_code(configure, monkeypatch, capsys):
    config = configure(max_skipped=3)
    with monkeypatch.context() as patch:
        poison(patch, {2, 6, 7, 8, 9})
        assert train(config) == 3
    assert "stopped at update 8: 3 updates in a row were not finite" in capsys.readouterr().err
    assert losses(config)[-1] == {"kind": "end", "step": 8, "reason": "not finite"}
    assert not (Path(config.out) / "model").exists()
    assert train(config) == 0  # from the checkpoint of update 4 on


def test_only_the_micro_batch_at_fault_is_named(configure, monkeypatch):
    config = configure(steps=2, batch_size=8, micro_tokens=64)
    differentiate, calls = Step._differentiate, []

    def broken(self, batch, *into):
        calls.append(batch["sample_ids"].tolist())
        parts = differentiate(self, batch, *into)
        if len(calls) == 2:
            parts *= float("nan")
            for p in self.parameters:
                p.grad *= float("nan")
        return parts

    monkeypatch.setattr(Step, "_differentiate", broken)
    assert train(config) == 0
    (line,) = losses(config, "skipped")
    assert line["reason"] == "the loss was not finite"
    assert len(line["samples"]) == len(calls[1]) < config.batch_size


def test_a_full_disk_stops_with_the_last_checkpoint_whole(configure, tmp_path, monkeypatch):
    whole, config = configure(out=str(tmp_path / "whole")), configure()
    train(whole)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = checkpoint.os.fsync
    with monkeypatch.context() as patch:  # room for the first checkpoint, and for half of the second
        flushed = []
        patch.setattr(
            checkpoint.os, "fsync", lambda handle: flushed.append(real(handle)) if len(flushed) < 16 else full()
        )
        with pytest.raises(CheckpointError, match=r"the disk is full .*The last checkpoint, step-00000004, is whole"):
            train(config)
    assert [path.name for path in (Path(config.out) / "checkpoints").iterdir()] == ["step-00000004"]
    with monkeypatch.context() as patch:  # no room for a line of metrics
        patch.setattr(metrics.EventFile, "scalars", full)
        with pytest.raises(CheckpointError, match="the disk is full"):
            train(config)
    assert train(config) == 0
    assert weights(config, 12) == weights(whole, 12)
    assert losses(config) == losses(whole)


def test_the_resolved_configuration_starts_the_same_run(configure, tmp_path):
    config = configure(steps=4, lr=3e-4)
    train(config)
    again = resolve({"out": str(tmp_path / "again")}, Path(config.out) / "config.json")
    assert dataclasses.replace(again, out=config.out) == config
    train(again)
    assert losses(again) == losses(config)


def test_a_run_of_phases_goes_on_from_its_resolved_configuration(configure, capsys):
    config = configure(phases="16:2,32:4", seq=64, steps=9)
    train(config)
    again = resolve({"phases": "16:2,32:6"}, Path(config.out) / "config.json")
    assert train(again) == 0
    assert "--phases (was 16:2,32:4, now 16:2,32:6)" in (told := capsys.readouterr().err)
    assert train(resolve({}, Path(config.out) / "config.json")) == 0
    assert "--seq" not in told + capsys.readouterr().err
    assert [line["step"] for line in losses(config, "train")] == list(range(1, 9))


def test_the_model_is_a_plain_hugging_face_folder(configure, prepared):
    config = configure()
    train(config)
    folder = Path(config.out) / "model"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
    }  # fmt: skip
    theirs, info = transformers.BertForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ours = bert_fast.BertForPreTraining.from_pretrained(folder)
    tokenizer = load_tokenizer(prepared / "data" / "tokenizer")
    dataset = PretrainingDataset(open_corpus(prepared / "data"), tokenizer, max_length=32)
    batch = pad_samples([dataset[i] for i in range(6)], pad_id=dataset.special.pad)
    with torch.no_grad():
        a, b = theirs.eval()(**batch), ours.eval()(**batch)
    attended = batch["attention_mask"].bool()
    torch.testing.assert_close(b.prediction_logits[attended], a.prediction_logits[attended], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(b.seq_relationship_logits, a.seq_relationship_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(b.loss, a.loss, rtol=1e-5, atol=1e-6)
    found = checkpoint.newest(Path(config.out))[0].tensors("model")
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, found[name]), name
    again = transformers.AutoTokenizer.from_pretrained(folder)
    assert again("the print statement")["input_ids"] == tokenizer.encode("the print statement").ids


@pytest.mark.parametrize("folder", ["model", "checkpoints/step-00000004"])
def test_continued_pre_training_from_a_checkpoint(configure, prepared, tmp_path, capsys, folder):
    first = configure(steps=4)
    train(first)
    source = tmp_path / "run" / folder
    onward = configure(out=str(tmp_path / "onward"), init_from=str(source), steps=2, lr=0.0)
    assert train(onward) == 0
    before, after = (
        bert_fast.BertForPreTraining.from_pretrained(run) for run in (source, tmp_path / "onward" / "model")
    )
    for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b), name
    # a checkpoint without the head of next-sentence prediction
    transformers.BertForMaskedLM.from_pretrained(source).save_pretrained(tmp_path / "mlm")
    capsys.readouterr()
    config = configure(out=str(tmp_path / "headless"), init_from=str(tmp_path / "mlm"), steps=2)
    assert pretrain.pretrain(config) == 0
    told = capsys.readouterr().err
    assert "cls.seq_relationship.weight" in told
    assert "drawn at random" in told
    assert "LOAD REPORT" not in told  # transformers': what it would say is said above
    assert pretrain.pretrain(dataclasses.replace(config, out=str(tmp_path / "quiet")), Output(quiet=True)) == 0
    assert capsys.readouterr().err == ""


def test_a_checkpoint_that_would_leave_the_encoder_random_is_refused(configure, prepared, tmp_path):
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    other = transformers.RobertaForMaskedLM(transformers.RobertaConfig(vocab_size=300, **size))
    other.save_pretrained(tmp_path / "roberta")
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=300, **{**size, "num_hidden_layers": 1}))
    bert.save_pretrained(tmp_path / "shallow")
    about = json.loads((tmp_path / "shallow" / "config.json").read_text())
    (tmp_path / "shallow" / "config.json").write_text(json.dumps({**about, "num_hidden_layers": 2}))
    bert.config.save_pretrained(tmp_path / "weightless")
    for source, message in (
        ("roberta", "roberta is a model of type 'roberta'; this engine trains BERT"),
        ("shallow", "no weights for BertForPreTraining: bert.encoder.layer.1.attention.* and 15 more are missing"),
        ("weightless", "--init-from .*weightless: .*model.safetensors"),
        ("nowhere/nothing", "nowhere/nothing is no checkpoint of transformers"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(configure(init_from=str(tmp_path / source)))
    with pytest.raises(ConfigError, match=r"config\.json is a model of type 'roberta'"):
        train(configure(model=str(tmp_path / "roberta" / "config.json")))


def test_a_run_whose_samples_were_drawn_by_another_rule_is_refused(configure, tmp_path):
    """A checkpoint of the rule before, and of a version before rules had numbers; its weights begin another run."""
    config = configure(steps=4)
    train(config)
    folder = checkpoint.folder_of(Path(config.out), 4)
    state = json.loads((folder / "state.json").read_text())
    sums, rule = json.loads((folder / "checksums.json").read_text()), state["identity"].pop("rule")
    for before in ({"rule": rule - 1}, {}):
        state_json = json.dumps(state | {"identity": state["identity"] | before}).encode()
        (folder / "state.json").write_bytes(state_json)
        digest = hashlib.blake2b(state_json, digest_size=16).hexdigest()
        sums["state.json"] = {"bytes": len(state_json), "blake2b": digest}
        (folder / "checksums.json").write_text(json.dumps(sums))
        with pytest.raises(NotTheSameRun, match=f"draws other samples .* --init-from {folder} and another --out"):
            train(dataclasses.replace(config, steps=8))
    assert checkpoint.newest(Path(config.out))[0].step == 4
    assert train(configure(out=str(tmp_path / "onward"), init_from=str(folder), steps=2)) == 0


def test_what_an_epoch_holds_is_told_of_the_first_phase(configure, prepared, capsys):
    assert pretrain.pretrain(configure(phases="16:1,32:1", seq=64, validation=0.0)) == 0
    told = capsys.readouterr().err
    tokens = read_manifest(prepared / "data")["tokens"]
    assert "samples an epoch at 16 tokens" in told
    assert f"they hold 100.00% of the {tokens:,} in 24 documents" in told
    assert "left out" not in told


def documents_of(folder: Path, documents: list[str], tokenizer) -> str:
    """Prepared data of ``documents`` of a sentence or more."""
    (folder / "corpus.txt").write_text("\n\n".join(documents), encoding="utf-8")
    prepare(folder / "corpus.txt", tokenizer, folder / "corpus", workers=1)
    return str(folder / "corpus")


@pytest.fixture
def words(prepared) -> list[str]:
    """Words that are a token of the vocabulary each."""
    return [w for w in load_tokenizer(prepared / "tokenizer").get_vocab() if w.isalpha() and len(w) > 1]


def test_documents_of_one_sentence_give_pairs_whichever_are_held_out(configure, prepared, words, tmp_path):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    documents = [" ".join(words[i : i + 9]) + "." for i in range(30)]
    documents[::2] = [f"{text} {text.upper()}" for text in documents[::2]]
    folder = documents_of(tmp_path, documents, tokenizer)
    for seed in range(3):
        config = configure(data=folder, out=str(tmp_path / f"run-{seed}"), seed=seed, steps=2, validation=0.01)
        assert train(config) == 0
        (line,) = losses(config, "validation")
        assert line["sequences"] > 0


def test_held_out_documents_that_give_no_pair_leave_the_run_without_validation(
    configure, prepared, words, tmp_path, capsys
):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    folder = documents_of(tmp_path, [*words[:40], *(" ".join(words[i : i + 9]) + "." for i in range(10))], tokenizer)
    corpus, validated = open_corpus(folder), []
    for seed in range(12):
        learned, held_out = hold_out(corpus, 0.05, seed=seed, nsp=True)
        validated.append(held_out is not None)
        for part in (learned, held_out) if held_out else (learned,):
            assert len(PretrainingDataset(part, tokenizer, max_length=32))
    assert 0 < sum(validated) < 12
    config = configure(data=folder, steps=2, validation=0.05, seed=validated.index(False))
    assert pretrain.pretrain(config) == 0
    told = capsys.readouterr().err
    assert "no validation: too few documents, or none of those held out gives a sample" in told
    assert "; 40 documents of one token, which no pair can hold, are left out" in told


def test_updates_and_validations_without_a_masked_token(configure, prepared, tmp_path, capsys):
    """Documents of one word of many pieces: of whole words an update of one sequence often predicts none."""
    generator = random.Random(0)
    spelled = ["".join(generator.choice("abcdefgh") for _ in range(70)) for _ in range(60)]
    folder = documents_of(tmp_path, spelled, load_tokenizer(prepared / "tokenizer"))
    config = configure(
        data=folder, whole_word=True, batch_size=1, validation_sequences=1, validate_every=1, checkpoint_every=1, keep=1
    )
    assert pretrain.pretrain(config, Output()) == 0
    updates, validations = losses(config, "train"), losses(config, "validation")
    assert [line["step"] for line in updates] == list(range(1, 13))
    assert losses(config, "skipped") == []
    without = [line for line in updates if line["mlm_loss"] == 0]
    assert 0 < len(without) < 12
    assert all(line["nsp_loss"] > 0 and line["grad_norm"] > 0 for line in without)
    model = bert_fast.BertForPreTraining.from_pretrained(Path(config.out) / "model")
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    told = capsys.readouterr().err
    if validations[0]["masked"] == 0:
        assert "held-out none of the 1 sequences has a masked token" in told
    assert [line["mlm_loss"] is None for line in validations] == [line["masked"] == 0 for line in validations]


def test_new_weights_have_the_spread_that_was_asked_for(configure, prepared):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    for asked, spread in ((None, 0.02), (0.05, 0.05)):
        config = configure(initializer_range=asked, dropout=0.25)
        made = new_model.model_config(config, tokenizer, 32)
        model, _ = new_model.new_model(config, made, 0)
        assert model.bert.embeddings.word_embeddings.weight[1:].std().item() == pytest.approx(spread, rel=0.1)
        assert (model.config.hidden_dropout_prob, model.config.attention_probs_dropout_prob) == (0.25, 0.25)


def test_a_checkpoint_of_another_vocabulary_is_refused(configure, tmp_path, prepared):
    config = transformers.BertConfig.from_json_file(prepared / "tiny.json")
    config.vocab_size = 100
    transformers.BertForPreTraining(config).save_pretrained(tmp_path / "small")
    with pytest.raises(ConfigError, match="has a vocabulary of 100, the data's tokenizer"):
        train(configure(init_from=str(tmp_path / "small")))
    config.vocab_size = 1000
    transformers.BertForPreTraining(config).save_pretrained(tmp_path / "other")
    vocabulary = (prepared / "tokenizer" / "vocab.txt").read_text().splitlines()
    vocabulary[-1], vocabulary[-2] = vocabulary[-2], vocabulary[-1]
    (tmp_path / "other" / "vocab.txt").write_text("".join(f"{piece}\n" for piece in vocabulary))
    with pytest.raises(ConfigError, match="2 tokens have other ids there"):
        train(configure(init_from=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "huge"}, "--model huge is none of tiny, mini, small, base, large, and no file"),
        ({"seq": 65}, "sequences of 65 tokens, but the model has 64 positions"),
        ({"phases": "32:3,128:1"}, "128 tokens"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_written(configure, changes, message):
    config = configure(**changes)
    with pytest.raises(ConfigError, match=message):
        train(config)
    assert not (Path(config.out) / "config.json").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 3}, r"num_layers \(did you mean num_hidden_layers\?\)$"),
        ({"heads": 2, "intermediate_sise": 9}, r"heads \(did .* num_attention_heads\?\), .* intermediate_size\?\)$"),
        ({"hidden": 3, "colour": "red"}, "colour, hidden$"),  # it might be one of several
    ],
)
def test_a_model_file_with_unknown_names_is_refused(configure, prepared, tmp_path, fields, message):
    known = json.loads((prepared / "tiny.json").read_text())
    (tmp_path / "size.json").write_text(json.dumps({**known, **fields}))
    with pytest.raises(ConfigError, match=rf"^--model .*size\.json: BertConfig does not know {message}"):
        train(configure(model=str(tmp_path / "size.json")))


def test_model_files_of_published_models_are_taken(configure, prepared, tmp_path):
    fields = {"architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "directionality": "bidi",
              "hidden_size": 48, "model_type": "bert", "num_attention_heads": 3, "num_labels": 3, "do_sample": False,
              "pooler_type": "first_token_transform", "position_embedding_type": "absolute", "torch_dtype": "float32",
              "gradient_checkpointing": False, "transformers_version": "4.6.0.dev0", "_name_or_path": "x",
              "_num_labels": 3, "use_cache": True, "vocab_size": 7, "return_logits": True}  # fmt: skip
    for name, content in (("published", fields), ("ours", transformers.BertConfig(hidden_size=48).to_dict())):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        config = configure(model=str(tmp_path / f"{name}.json"))
        assert new_model.model_config(config, load_tokenizer(prepared / "tokenizer"), 32).hidden_size == 48


def test_validation_on_other_data_and_none_at_all(configure, prepared):
    config = configure(steps=4, validation_data=str(prepared / "other"))
    train(config)
    (line,) = losses(config, "validation")
    assert line["sequences"] > 10
    without = configure(out=config.out + "-without", steps=4, validation=0.0)
    train(without)
    assert losses(without, "validation") == []
    assert "Not validated" in (Path(without.out) / "model" / "README.md").read_text()


def test_json_lines_and_the_picture(configure, tmp_path, capsys):
    from bert_fast.output import Output

    assert pretrain.pretrain(configure(steps=4), Output(json=True, command="pretrain")) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["kind"] == "result"
    assert lines[-1]["step"] == 4
    assert any(line["kind"] == "progress" and line["mlm_loss"] > 0 for line in lines)
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
