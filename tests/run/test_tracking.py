"""Trackers: what they get, going on, one that fails; wandb offline and mlflow with a file, where they are installed."""

import json
import time
from pathlib import Path

import pytest
import torch

from bert_fast.output import Output
from bert_fast.run import metrics
from bert_fast.run.config import ConfigError, effective
from bert_fast.run.dry_run import dry_run
from bert_fast.run.metrics import read_metrics
from bert_fast.run.tracking import GOES_ON, Trackers
from bert_fast.train.distributed import Ranks
from tests.support.training_runs import train

tracking = pytest.importorskip("accelerate.tracking")

FIRST = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def made(monkeypatch):
    """The trackers "stand_in" (which needs a folder) and "other" that runs have made, in order."""
    found = []

    class StandIn(tracking.GeneralTracker):
        name = "stand_in"
        requires_logging_directory = True
        fails_at = None

        def __init__(self, project, folder=None):
            self.project, self.folder, self.logged, self.config, self.finished = project, folder, [], None, 0
            super().__init__()
            found.append(self)

        tracker = property(lambda self: self)
        id = "made-here"

        @tracking.on_main_process
        def store_init_configuration(self, values):
            self.config = values

        @tracking.on_main_process
        def log(self, values, step=None):
            if self.fails_at is not None and step >= self.fails_at:
                raise ConnectionError("the server is gone")
            self.logged.append((step, values))

        def finish(self):
            self.finished += 1

    class Other(StandIn):
        name = "other"
        requires_logging_directory = False

    for kind in (StandIn, Other):
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, kind.name, kind)
    found.append(StandIn)
    return found


def expected(config) -> list:
    """Every number of metrics.jsonl, by update."""
    lines = read_metrics(Path(config.out) / "metrics.jsonl")
    return [
        (line["step"], found)
        for line in lines
        if (found := metrics.numbers(line["kind"], {k: v for k, v in line.items() if k not in ("kind", "step")}))
    ]


def test_trackers_get_the_options_and_every_number_of_the_metrics(configure, made):
    config = configure(track="stand_in, other", track_project="a project")
    assert train(config) == 0
    _, *trackers = made
    assert {(t.name, t.project, t.folder) for t in trackers} == {
        ("stand_in", "a project", config.out), ("other", "a project", None),
    }  # fmt: skip
    for tracker in trackers:
        assert tracker.logged == expected(config)
        assert [step for step, _ in tracker.logged] == sorted([*range(1, 13), 4, 8, 12])
        assert tracker.config == effective(config.as_dict())
        assert tracker.finished == 1
    assert tracker.logged[0][1].keys() >= {"train/loss", "train/learning_rate", "train/grad_norm", "train/mfu"}


def test_a_run_that_goes_on_is_tracked_in_the_same_place(configure, made, monkeypatch):
    StandIn = made[0]
    monkeypatch.setitem(GOES_ON, "stand_in", (lambda tracker: tracker.id, lambda known: {"known": known}))
    taken = []

    def again(self, project, folder=None, known=None):
        taken.append(known)
        init(self, project, folder)

    init = StandIn.__init__
    monkeypatch.setattr(StandIn, "__init__", again)
    config = configure(steps=4, track="stand_in,other")
    train(config)
    assert json.loads((Path(config.out) / "trackers.json").read_text()) == {"stand_in": "made-here"}
    train(configure(steps=8, track="stand_in,other"))
    train(configure(out=config.out + "-2", steps=4, track="stand_in"))
    with Trackers(configure(track="other"), 8, FIRST, Output(silent=True)):
        pass
    assert json.loads((Path(config.out) / "trackers.json").read_text()) == {"stand_in": "made-here"}
    _, first, other, second, other_again, elsewhere, _ = made
    assert taken == [None, None, "made-here", None, None, None]
    assert first.config
    assert second.config is None  # a tracker such as mlflow refuses other values
    assert other_again.config
    assert elsewhere.config
    assert [step for step, _ in second.logged] == [5, 6, 7, 8, 8]
    assert [step for step, _ in first.logged + second.logged] == [step for step, _ in expected(config)]
    assert other.finished == other_again.finished == 1


@pytest.mark.parametrize("when", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_told_of_once_and_stops_nothing(configure, made, monkeypatch, capsys, when):
    def fail(*_, **__):
        raise SystemExit("the server is gone")

    if when == "log":
        made[0].fails_at = 3
    else:
        monkeypatch.setattr(made[0], when, fail)
        monkeypatch.setattr(tracking.LOGGER_TYPE_TO_CLASS["other"], when, getattr(tracking.GeneralTracker, when))
    tracking.LOGGER_TYPE_TO_CLASS["other"].fails_at = None
    config = configure(track="stand_in,other")
    assert train(config) == 0
    told = capsys.readouterr().err
    assert told.count("the server is gone") == 1
    assert "--track stand_in failed" in told
    trackers = {tracker.name: tracker for tracker in made[1:]}
    assert trackers["other"].logged == expected(config)
    numbers = {"start": 0, "log": 2, "finish": 15}[when]
    assert len(trackers["stand_in"].logged) == numbers
    assert (Path(config.out) / "model" / "model.safetensors").exists()


def test_only_the_first_process_tracks(configure, made):
    ranks = Ranks(1, 2, torch.device("cpu"))
    with Trackers(configure(track="stand_in"), 0, ranks, Output(silent=True)) as trackers:
        trackers.log(1, {"loss": 1.0})
    assert len(made) == 1


def test_at_the_end_trackers_print_no_results_and_warnings_stay_json(configure, made, monkeypatch, capsys):
    def fail(self):
        print("look at it there")
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(made[0], "finish", fail)
    with Trackers(configure(track="stand_in"), 0, FIRST, Output(json=True)):
        pass
    out, err = capsys.readouterr()
    assert [json.loads(line)["kind"] for line in out.splitlines()] == ["warning"]
    assert "look at it there" in err


def test_a_tracker_is_finished_when_the_run_is_not(configure, made, monkeypatch):
    def fail(*_):
        raise ValueError("on the way")

    monkeypatch.setattr("bert_fast.run.report.Report.validated", fail)
    with pytest.raises(ValueError, match="on the way"):
        train(configure(track="stand_in"))
    assert made[1].finished == 1
    assert len(made[1].logged) == 4


@pytest.mark.parametrize(
    ("track", "message"),
    [
        ("tensorbord", "--track tensorbord: the trackers are aim,"),
        ("tensorboard", "every run writes RUN/tensorboard"),
        ("comet_ml", "--track comet_ml: the package comet-ml is not installed: pip install comet-ml"),
    ],
)
def test_what_is_not_there_is_refused_before_the_run(configure, monkeypatch, track, message):
    monkeypatch.setattr(tracking, "_available_trackers", [])
    config = configure(track=track)
    for command in (train, dry_run):
        with pytest.raises(ConfigError, match=message):
            command(config)
    assert not (Path(config.out) / "config.json").exists()


def test_wandb_offline(configure, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = {"track": "wandb", "log_every": 2}
    assert train(configure(steps=4, **options)) == 0
    known = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    assert train(configure(steps=8, **options)) == 0
    stored = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{known}/run-{known}.wandb"))
    assert len(stored) == 2
    assert json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"] == known
    assert wandb.run is None
    until = time.monotonic() + 300  # wandb's own process writes the file
    while b"validation/mlm_loss" not in stored[1].read_bytes() and time.monotonic() < until:
        time.sleep(0.1)
    for path in stored:
        assert b"train/mlm_loss" in path.read_bytes()
        assert b"validation/mlm_loss" in path.read_bytes()


def test_mlflow_in_a_file(configure, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    before = mlflow.get_tracking_uri()
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    try:
        config = configure(track="mlflow", track_project="one")
        assert train(configure(steps=4, track="mlflow", track_project="one")) == 0
        assert train(config) == 0
        client = mlflow.MlflowClient()
        (run,) = client.search_runs([mlflow.get_experiment_by_name("one").experiment_id])
        assert json.loads((tmp_path / "run" / "trackers.json").read_text()) == {"mlflow": run.info.run_id}
        assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
        for name in ("train/mlm_loss", "validation/mlm_loss"):
            history = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
            assert sorted(history) == [(step, found[name]) for step, found in expected(config) if name in found]
        assert run.data.params["lr"] == "0.001"
    finally:
        mlflow.set_tracking_uri(before)
