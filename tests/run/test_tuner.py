"""What serves in a run's phases: from where, said and written down, the same after a resume and on every rank. The
device is made up, and so is what is decided on it."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bert_fast
from bert_fast import choice
from bert_fast.output import Output
from bert_fast.run import checkpoint, tune, tuner
from bert_fast.run.config import ConfigError, phases
from bert_fast.run.pretrain import pretrain
from bert_fast.train.distributed import Ranks
from bert_fast.tuning import store
from bert_fast.tuning.rule import Decision
from tests.support.rendezvous import meeting
from tests.support.run_processes import ENVIRONMENT, ROOT
from tests.support.training_runs import losses, train

DEFAULT = {"tile": 64}


class Made:
    """A machine that says what it is, decides what it is told to, and counts."""

    def __init__(self, monkeypatch, tmp_path):
        self.name, self.chosen, self.rows, self.asked = "one", [("made", DEFAULT, {"tile": 1})], [], []
        monkeypatch.setenv("BERT_FAST_CACHE", str(tmp_path / "kept"))
        monkeypatch.setattr(store, "machine", lambda device: {"device": self.name})
        monkeypatch.setattr(tuner, "decide_now", self.decide)
        monkeypatch.setattr(tuner.Tuner, "tunes", lambda run: run.config.tune != "off")

    def decide(self, sizes, device, stopped=lambda: False) -> Decision:
        self.asked.append(sizes)
        found = Decision(self.chosen, self.rows)
        if not found.wrong and not stopped():
            store.write(tuner.key_of(sizes, device), self.chosen, self.rows)
        return Decision(self.chosen, self.rows)


@pytest.fixture
def made(monkeypatch, tmp_path):
    return Made(monkeypatch, tmp_path)


@pytest.fixture
def served(monkeypatch):
    """What served in each update."""
    found = []
    step = tuner.Tuner.settle

    def settle(self, *phase):
        step(self, *phase)
        found.append(choice.of("made", DEFAULT)["tile"])

    monkeypatch.setattr(tuner.Tuner, "settle", settle)
    return found


def kernels(config) -> dict:
    return checkpoint.newest(Path(config.out))[0].state["kernels"]


def test_a_phase_is_decided_once_and_written_down(configure, made, served):
    config = configure(phases="16:4,32:8:batch=6")
    assert train(config) == 0
    assert [(sizes.longest, sizes.dtype, sizes.attention) for sizes in made.asked] == [
        (16, "float32", "auto"), (32, "float32", "auto"),
    ]  # fmt: skip
    for sizes in made.asked:
        assert 0 < max(sizes.lengths) <= sizes.longest
        assert list(sizes.lengths) == sorted(sizes.lengths, reverse=True)
        assert sizes.masked >= len(sizes.lengths)
    assert served == [1, 1]
    assert {name: kept["chosen"] for name, kept in kernels(config).items()} == {
        "16:8": [["made", DEFAULT, {"tile": 1}]], "32:6": [["made", DEFAULT, {"tile": 1}]],
    }  # fmt: skip
    assert not choice.active()  # what served in a run ends with it


def resumed(configure, made, served, **options) -> None:
    """A run that stops after 4 of 12 updates and goes on with another decision at hand, both here and in the cache."""
    config = configure(steps=4, schedule="constant")
    assert train(config) == 0
    made.chosen = [("made", DEFAULT, {"tile": 2})]
    for sizes in made.asked[:1]:
        store.write(tuner.key_of(sizes, torch.device("cpu")), [("made", DEFAULT, {"tile": 3})], [])
    assert train(dataclasses.replace(config, steps=12, **options)) == 0


def test_a_run_that_resumes_has_what_it_recorded(configure, made, served):
    resumed(configure, made, served)
    assert (served, len(made.asked)) == ([1, 1], 1)


def test_again_decides_anew_and_records_that(configure, made, served):
    resumed(configure, made, served, tune="again")
    assert (served, len(made.asked)) == ([1, 2], 2)
    assert kernels(configure())["32:8"]["chosen"] == [["made", DEFAULT, {"tile": 2}]]


def test_off_takes_the_defaults(configure, made, served):
    resumed(configure, made, served, tune="off")
    assert (served, len(made.asked)) == ([1, 64], 1)


def test_another_machine_decides_anew_and_says_so(configure, made, served, capsys):
    config = configure(steps=4, schedule="constant")
    assert train(config) == 0
    made.name, made.chosen = "two", [("made", DEFAULT, {"tile": 2})]
    assert pretrain(dataclasses.replace(config, steps=12), Output(command="pretrain")) == 0
    assert "the kernels recorded for 32:8 were chosen on another device" in capsys.readouterr().err
    assert served == [1, 2]
    assert kernels(config)["32:8"]["key"]["machine"] == {"device": "two"}


def test_another_run_takes_what_the_machine_knows(configure, made, served, tmp_path):
    assert train(configure(steps=4)) == 0
    assert train(configure(steps=4, out=str(tmp_path / "other"))) == 0
    assert (served, len(made.asked)) == ([1, 1], 1)
    assert kernels(configure(out=str(tmp_path / "other"))) == kernels(configure())


def of_tuner(configure, capsys, ranks=None, dropout=0.1, recorded=None, **options) -> tuple[tuner.Tuner, str]:
    """A tuner, and what it has said."""
    model = bert_fast.BertConfig(
        hidden_size=64, num_attention_heads=2, intermediate_size=128, vocab_size=99,
        attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    found = tuner.Tuner(
        configure(**options), ranks or Ranks(0, 1, torch.device("cpu")), Output(command="pretrain"), model,
        bf16=False, tokens=256, recorded=recorded or {},
    )  # fmt: skip
    return found, capsys.readouterr().err


def test_a_default_that_is_wrong_is_said_loudly_and_again_at_each_start(configure, made, capsys):
    made.rows = [{"question": "attention fwd", "candidate": {}, "outcome": "default wrong", "why": "out is off by 7"}]
    found, _ = of_tuner(configure, capsys)
    with choice.held():
        found.settle(phases(found.config)[0], torch.tensor([5, 9]).numpy())
    said = capsys.readouterr().err
    assert "WRONG on this device" in said
    assert "attention fwd: out is off by 7" in said
    again, _ = of_tuner(configure, capsys, recorded=found.state)
    with choice.held():
        again.settle(phases(found.config)[0], torch.tensor([5, 9]).numpy())
    assert "WRONG on this device" in capsys.readouterr().err
    assert len(made.asked) == 1


def test_a_choice_that_a_signal_cut_short_is_made_again(configure, made, capsys):
    found, _ = of_tuner(configure, capsys)
    found.stopped = lambda: True
    with choice.held():
        found.settle(phases(found.config)[0], torch.tensor([5, 9]).numpy())
        again, _ = of_tuner(configure, capsys, recorded=found.state)
        again.settle(phases(found.config)[0], torch.tensor([5, 9]).numpy())
    assert len(made.asked) == 2
    assert again.state["32:8"]["key"] is not None
    assert "another device" not in capsys.readouterr().err


def test_where_nothing_could_be_tried_the_reason_is_said(configure, made, capsys):
    made.chosen, made.rows = [], [{"question": "q", "candidate": {}, "outcome": "hung", "why": "its process ended"}]
    found, _ = of_tuner(configure, capsys)
    with choice.held():
        found.settle(phases(found.config)[0], torch.tensor([5, 9]).numpy())
    assert "no kernel could be tried: its process ended" in capsys.readouterr().err


def test_on_a_cpu_nothing_is_tried(configure, capsys, monkeypatch):
    monkeypatch.setattr(tuner, "decide_now", None)
    for asked in ("auto", "off", "again"):
        found, _ = of_tuner(configure, capsys, tune=asked)
        found.settle(phases(found.config)[0], torch.tensor([5, 9]).numpy())
        assert ("nothing to choose on a CPU" in capsys.readouterr().err) == (asked == "again")
        assert found.state == {}


def test_attention_by_a_library_is_said_or_refused(configure, capsys):
    with pytest.raises(ConfigError, match="--attention library: PyTorch's kernel for a CPU has no dropout"):
        of_tuner(configure, capsys, attention="library")
    found, said = of_tuner(configure, capsys, attention="library", dropout=0.0)
    assert not found.masks_by_place
    assert "attention is PyTorch's (--attention library)\n" in said
    assert "attention is PyTorch's" not in of_tuner(configure, capsys)[1]


@pytest.mark.parametrize("recompute", ["nothing", "layers"])
def test_masks_of_a_library_are_said_to_depend_on_how_updates_are_dealt(configure, capsys, monkeypatch, recompute):
    monkeypatch.setattr(tuner, "why_no_library", lambda *case: None)
    if recompute == "layers":
        with pytest.raises(ConfigError, match="--recompute layers"):
            of_tuner(configure, capsys, attention="library", recompute=recompute)
        return
    found, said = of_tuner(configure, capsys, attention="library", recompute=recompute)
    assert found.masks_by_place
    assert "its dropout masks depend on how updates are dealt" in said


def test_a_run_by_the_library_has_the_losses_of_one_by_the_engine(configure, tmp_path):
    """On a CPU, without dropout, in float32: to rounding."""
    own = configure(dropout=0.0)
    library = configure(dropout=0.0, attention="library", out=str(tmp_path / "library"))
    assert train(own) == train(library) == 0
    for ours, theirs in zip(losses(own, "train"), losses(library, "train"), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)


@pytest.mark.parametrize(("name", "value"), [("tune", "always"), ("attention", "flash"), ("tune", ""), ("tune", True)])
def test_wrong_values_are_refused_by_name(configure, name, value):
    with pytest.raises(ConfigError, match=f"--{name}"):
        configure(**{name: value})


def test_ranks_agree_on_what_the_first_has_decided(tmp_path):
    """Two processes, of which each would decide for itself another thing."""
    command = [sys.executable, str(ROOT / "tests" / "support" / "tuned_ranks.py")]
    with meeting(2) as shared:
        environment = ENVIRONMENT | shared | {"BERT_FAST_CACHE": str(tmp_path)}
        ranks = [
            subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["100 that of rank 0\n"] * 2


def rows() -> list[dict]:
    tried = [
        ({"attention.fwd": {"BLOCK_M": 128}}, "won", {"seconds": 2e-4, "ratios": [0.9, 0.9]}),
        ({"attention.fwd": {"BLOCK_M": 32}}, "failed", {"why": "OutOfResources: shared memory"}),
        ({"attention.fwd": {"BLOCK_M": 16}}, "left out", {}),
    ]
    return [{"question": "attention fwd", "candidate": c, "outcome": how} | more for c, how, more in tried]


def test_tune_shows_what_was_tried_and_keeps_it_for_the_run(configure, made, served, capsys, monkeypatch):
    monkeypatch.setattr(tune, "on_gpu", lambda ranks: True)
    monkeypatch.setattr(tune, "decide_now", lambda sizes, device, tell: made.decide(sizes, device))
    monkeypatch.setattr(tune, "questions", lambda sizes, capability: [])
    monkeypatch.setattr(store, "machine", lambda device: {"capability": 90})
    made.rows = rows()
    config = configure(phases="16:4,32:8:batch=6")
    facts = tune.tune(config, Output(command="tune"))
    said = capsys.readouterr().out
    assert [(phase["seq"], phase["kept"]) for phase in facts["phases"]] == [(16, False), (32, False)]
    assert "fwd BLOCK_M=128, 200 us" in said
    assert "failed: fwd BLOCK_M=32: OutOfResources: shared memory" in said
    again = tune.tune(config, Output(command="tune"))
    assert [phase["kept"] for phase in again["phases"]] == [True, True]
    assert [phase["chosen"] for phase in again["phases"]] == [made.chosen] * 2
    assert not Path(config.out).exists()
    assert train(config) == 0
    assert (served, len(made.asked)) == ([1, 1], 2)  # the run has found both
    assert not tune.tune(dataclasses.replace(config, tune="again"), Output(command="tune"))["phases"][0]["kept"]


def test_tune_needs_a_gpu(configure):
    with pytest.raises(ValueError, match="there is no GPU here"):
        tune.tune(configure())
