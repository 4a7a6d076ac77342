"""Experiment trackers (``--track wandb,mlflow``): those of accelerate, which get every line of the run's metrics."""

import json
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import redirect_stdout
from operator import attrgetter
from pathlib import Path

from bert_fast import extras
from bert_fast.data.files import write_atomically
from bert_fast.output import Output
from bert_fast.run.config import ConfigError, PretrainConfig, effective, trackers
from bert_fast.train.distributed import Ranks

# What a tracker is told of the run's folder, beside the project.
ARGUMENTS: dict[str, Callable[[Path], dict]] = {
    "dvclive": lambda run: {"dir": str(run / "dvclive")},
    "mlflow": lambda run: {"run_name": run.name},
    "wandb": lambda run: {"name": run.name, "dir": str(run)},
}

# Trackers that go on with a run of theirs: where it has its id, and the arguments that take it up again.
GOES_ON: dict[str, tuple[Callable, Callable[[str], dict]]] = {
    "mlflow": (attrgetter("info.run_id"), lambda known: {"run_id": known}),
    "wandb": (attrgetter("id"), lambda known: {"id": known, "resume": "allow"}),
}


def require_installed(config: PretrainConfig) -> None:
    """Raises ConfigError for a tracker of ``--track`` that accelerate does not know, or whose package is missing."""
    for name in trackers(config):
        tracking = extras.load("accelerate.tracking")
        if name == "tensorboard":
            raise ConfigError("--track tensorboard: every run writes RUN/tensorboard already: leave it out")
        if name not in tracking.LOGGER_TYPE_TO_CLASS:
            known = sorted(set(tracking.LOGGER_TYPE_TO_CLASS) - {"tensorboard"})
            raise ConfigError(f"--track {name}: the trackers are {', '.join(known)}")
        if name in tracking.LoggerType and name not in map(str, tracking.get_available_trackers()):
            package = name.replace("_", "-")
            raise ConfigError(f"--track {name}: the package {package} is not installed: pip install {package}")


class Trackers:
    """The trackers of a run that goes on from update ``step``, for a with statement. Only the first process has them.

    RUN/trackers.json keeps the ids of what is tracked, so that a run that goes on is tracked in the same place where
    the tracker can do that (``GOES_ON``). Each tracker works on a thread of its own, so that no server holds the run
    up; one that fails is told of once and left out.
    """

    def __init__(self, config: PretrainConfig, step: int, ranks: Ranks, output: Output):
        self.output, self.path = output, Path(config.out) / "trackers.json"
        self.known = json.loads(self.path.read_text(encoding="utf-8")) if step and self.path.is_file() else {}
        self.tracked = [_Tracked(name, config, self.known.get(name)) for name in trackers(config) if ranks.first]

    def __enter__(self) -> "Trackers":
        self._together(_Tracked.start)
        self._tell()
        if ids := {tracked.name: tracked.id for tracked in self.tracked if tracked.id}:
            write_atomically(self.path, (json.dumps(self.known | ids, indent=1) + "\n").encode())
        return self

    def __exit__(self, *error) -> None:
        with redirect_stdout(sys.stderr):  # what mlflow says at the end is no result of the command
            self._together(_Tracked.finish)
        self._tell()
        for tracked in self.tracked:
            tracked.thread.shutdown()

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """``numbers`` by name, of update ``step``; returns at once."""
        for tracked in self.tracked if numbers else ():
            tracked.call(_Tracked.log, step, numbers)
        self._tell()

    def _together(self, what: Callable) -> None:
        """Does it on every tracker and waits."""
        for future in [tracked.call(what) for tracked in self.tracked]:
            future.result()

    def _tell(self) -> None:
        for tracked in self.tracked:
            if tracked.error is not None and not tracked.told:
                tracked.told = True
                self.output.warn(
                    f"--track {tracked.name} failed and is left out of this run ({type(tracked.error).__name__}: "
                    f"{tracked.error}); metrics.jsonl has every number"
                )


class _Tracked:
    """What one tracker has of the run; ``known`` is the id of what it has already."""

    def __init__(self, name: str, config: PretrainConfig, known: str | None):
        self.name, self.config, self.id = name, config, known
        self.error: BaseException | None = None
        self.told = False
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=f"track-{name}")  # mlflow's run belongs to a thread

    def call(self, what: Callable, *arguments) -> Future:
        return self.thread.submit(self._try, what, *arguments)

    def _try(self, what: Callable, *arguments) -> None:
        if self.error is not None:
            return
        try:
            what(self, *arguments)
        except (Exception, SystemExit) as error:
            self.error = error

    def start(self) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # accelerate's logging asks for it
        run, made = Path(self.config.out), LOGGER_TYPE_TO_CLASS[self.name]
        arguments = ARGUMENTS.get(self.name, lambda run: {})(run)
        id_of, again = GOES_ON.get(self.name, (lambda tracker: None, lambda known: {}))
        if self.id is not None:
            arguments |= again(self.id)
        where = [str(run)] if made.requires_logging_directory else []
        self.tracker = made(self.config.track_project, *where, **arguments)
        self.tracker.main_process_only = False  # else accelerate looks which process this is, at every call
        self.tracker.start()
        if self.id is None:
            self.tracker.store_init_configuration(effective(self.config.as_dict()))
        self.id = id_of(self.tracker.tracker)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.tracker.log(numbers, step=step)

    def finish(self) -> None:
        self.tracker.finish()
