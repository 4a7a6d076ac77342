"""Every option of pre-training: one dataclass, from which flags, configuration files and their checks are made.

Needs neither torch nor transformers, so that ``--help`` answers at once.
"""

import dataclasses
import json
import tomllib
import types
import typing
from pathlib import Path

if typing.TYPE_CHECKING:
    from bert_fast.data.phase import Phase

SIZES = {  # hidden layers, hidden size, attention heads; the feed-forward is four times as wide
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}

# Of a checkpoint's run by one that begins there.
NOT_INHERITED = ("out", "resume", "decay_from", "continue_from", "push_to_hub", "max_hours", "replan")

INSTEAD = {"seq": "phases", "steps": "phases", "model": "init_from"}  # an option, and what is read in its place if set

WEIGHTS = (1e-9, 1e9)  # of folders: shares of the tokens are then numbers that can be reckoned with

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class ConfigError(ValueError):
    """An option, or options together, that make no sense; the message names them."""


def option(default, group: str, text: str, metavar: str | None = None, choices: tuple | None = None):
    """A field of :class:`PretrainConfig` with what a flag needs to know of it."""
    return dataclasses.field(
        default=default, metadata={"group": group, "help": text, "metavar": metavar, "choices": choices}
    )


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """The options of ``bert-fast pretrain``; the text of each is its documentation."""

    data: str | tuple[str, ...] = option(
        "", "data", "folder that `bert-fast prepare` wrote; of several, --data DIR:WEIGHT for each, tokens are in "
        "proportion to the weights, or without weights to what each folder holds", "DIR[:WEIGHT]",
    )  # fmt: skip
    out: str = option("", "data", "the run's folder: checkpoints, metrics, the model", "RUN")
    nsp: bool = option(True, "data", "next-sentence prediction; without it a sample is sentences of one document")
    whole_word: bool = option(False, "data", "mask whole words")
    mask_prob: str = option(
        "0.15", "data", "share of a sample's tokens that is predicted; 0.30:0.15 falls from the first to the second, "
        "linearly over each phase; validation is at 0.15 whatever this is", "P|P:P",
    )  # fmt: skip
    mask_shares: str = option(
        "80:10:10", "data", "percent of the predicted tokens that the model sees as [MASK], as a random token, and as "
        "they are", "M:R:K",
    )  # fmt: skip
    short_seq_prob: float = option(0.1, "data", "share of samples whose target length is shorter than --seq", "P")
    validation: float = option(0.01, "data", "share of the documents held out for validation; 0: none", "SHARE")
    validation_data: str | tuple[str, ...] | None = option(
        None, "data", "prepared folder to validate on instead, so that nothing is held out; of several each by itself, "
        "and their mean by weight, or without weights by size", "DIR[:WEIGHT]",
    )  # fmt: skip
    validation_sequences: int = option(4096, "data", "validate on at most so many sequences", "N")
    workers: int | None = option(None, "data", "processes that make batches [default: 2 with a GPU, else 1]", "N")

    model: str = option("base", "model", f"{', '.join(SIZES)}, or a BertConfig as a JSON file", "SIZE|FILE")
    init_from: str | None = option(
        None, "model", "go on from a BERT checkpoint of transformers (folder or name on the Hub)", "MODEL"
    )
    dropout: float | None = option(None, "model", "dropout of hidden states and attention [default: the model's]", "P")
    initializer_range: float | None = option(
        None, "model", "standard deviation of new weights; narrow models learn sooner with 0.05 [default: the model's, "
        "which is 0.02 where nothing is said]", "STD",
    )  # fmt: skip

    steps: int = option(1_000_000, "updates", "updates in all", "N")
    batch_size: int = option(256, "updates", "sequences an update, over all processes", "N")
    seq: int = option(128, "updates", "longest sequence, in tokens", "N")
    phases: str | None = option(
        None,
        "updates",
        "SEQ:STEPS of each phase, instead of --seq and --steps; a phase may set a batch size of its own, and a "
        "learning rate or warm-up, which starts a schedule of its own: 128:900000,512:100000 or "
        "128:7038:lr=6e-3:warmup=0.2843:batch=65536,512:1563:lr=4e-3:warmup=0.128:batch=32768",
        "PHASES",
    )
    max_hours: float | None = option(
        None, "updates", "hours of all starts together, in which the run ends: --steps or --phases say in which "
        "proportion, this machine's speed how many updates; 0: no such budget", "H",
    )  # fmt: skip
    replan: str | None = option(
        None, "updates", "AT:N: from update AT on, N updates do what is left of --steps or --phases; a run with "
        "--max-hours writes it to its config.json where its speed changes", "CHANGES",
    )  # fmt: skip
    micro_tokens: int | None = option(
        None, "updates", "tokens of one forward pass, at most [default: 16384 on a GPU, else 4096]", "N"
    )
    decay_from: str | None = option(
        None, "updates", "begin at this checkpoint of a run's stable phase (--schedule wsd or constant), with its "
        "optimiser and that run's options, and decay to 0 over --decay-steps updates", "CHECKPOINT",
    )  # fmt: skip
    continue_from: str | None = option(
        None, "updates", "begin at this checkpoint, with its optimiser and its run's options, and go on to --steps or "
        "--phases, which count its updates; --data may be other data", "CHECKPOINT",
    )  # fmt: skip
    seed: int = option(0, "updates", "of weights, samples, masks and dropout", "N")

    optimizer: str = option(
        "adamw", "optimizer", "lamb is LAMB as published, lamb-nvidia the variant that clips first",
        choices=("adamw", "lamb", "lamb-nvidia"),
    )  # fmt: skip
    lr: float = option(1e-4, "optimizer", "highest learning rate", "LR")
    warmup: float = option(0.01, "optimizer", "updates of linear warm-up; below 1: share of the updates", "N")
    schedule: str = option(
        "linear", "optimizer", "decay of the learning rate to 0 after the warm-up; wsd stays at --lr until the last "
        "--decay-steps",
        choices=("linear", "polynomial", "cosine", "constant", "wsd"),
    )  # fmt: skip
    decay_steps: float | None = option(
        None, "optimizer", "updates over which wsd decays, the last of a schedule; below 1: share of its updates "
        "[default: none]", "N",
    )  # fmt: skip
    power: float = option(0.5, "optimizer", "of the polynomial decay", "P")
    beta1: float = option(0.9, "optimizer", "decay of the first moment", "B")
    beta2: float = option(0.999, "optimizer", "decay of the second moment", "B")
    eps: float = option(1e-6, "optimizer", "added to the root of the second moment", "E")
    bias_correction: bool = option(True, "optimizer", "correct the moments' bias; BERT's own AdamW did not")
    weight_decay: float = option(0.01, "optimizer", "of all but biases and LayerNorm", "W")
    clip: float = option(1.0, "optimizer", "highest norm of the gradient; 0: no clipping", "NORM")
    max_skipped: int = option(
        10, "optimizer", "stop (exit code 3) after so many updates in a row whose loss or gradient was not finite", "N"
    )

    device: str = option("auto", "device", "auto takes a GPU where there is one", choices=("auto", "cuda", "cpu"))
    precision: str = option(
        "auto", "device", "bf16: products and hidden states in bfloat16, weights in float32; auto: bf16 where it is "
        "multiplied faster",
        choices=("auto", "fp32", "bf16"),
    )  # fmt: skip
    recompute: str = option(
        "nothing", "device", "what the backward computes again, to keep less: gelu's output, or all of a layer but its "
        "input; the numbers are the same",
        choices=("nothing", "gelu", "layers"),
    )  # fmt: skip
    attention: str = option(
        "auto", "device", "library: PyTorch's kernels, with dropout masks that depend on how an update is dealt; own: "
        "never; auto: without dropout whichever is faster",
        choices=("auto", "own", "library"),
    )  # fmt: skip
    tune: str = option(
        "auto", "device", "on a GPU, choose kernels by trying them at the start of a phase: auto takes what the run or "
        "this machine has chosen before, again does not, off takes the defaults",
        choices=("auto", "off", "again"),
    )  # fmt: skip
    capture: bool = option(
        True,
        "device",
        "record the step as CUDA graphs, on a GPU that trains alone; without it the numbers are the same, and your "
        "forward hooks run in every update, not once",
    )
    peak_tflops: float | None = option(
        None, "device", "peak that MFU is taken against [default: a matrix product timed at the start]", "T"
    )

    log_every: int = option(10, "run", "updates between two lines of metrics", "N")
    validate_every: int | None = option(None, "run", "updates between validations [default: --checkpoint-every]", "N")
    checkpoint_every: int = option(1000, "run", "updates between checkpoints", "N")
    keep: int = option(2, "run", "newest checkpoints to keep; the best by validation is kept beside them", "N")
    resume: str = option(
        "auto", "run", "auto: go on from the last good checkpoint in --out; never: refuse a folder that has a run",
        choices=("auto", "never"),
    )  # fmt: skip

    track: str | None = option(
        None, "sharing", "send every number of metrics.jsonl to these trackers, too, with accelerate: aim, clearml, "
        "comet_ml, dvclive, mlflow, swanlab, trackio, wandb; several by comma", "NAMES",
    )  # fmt: skip
    track_project: str = option("bert_fast", "sharing", "project (or experiment) of the trackers", "NAME")
    push_to_hub: str | None = option(
        None, "sharing", "upload RUN/model to this repository of the Hugging Face Hub at the end; exit code 1 where "
        "that fails", "USER/NAME",
    )  # fmt: skip
    hub_private: bool = option(True, "sharing", "make that repository private, where there is none yet")

    def __post_init__(self):
        for field, kind in fields():
            value = getattr(self, field.name)
            if value is None and not optional(field):
                raise ConfigError(f"{flag(field.name)} needs a value")
            if value is not None:
                object.__setattr__(self, field.name, _converted(field, kind, value))
        if not self.data or not self.out:
            raise ConfigError("--data and --out are needed: the prepared data and the run's folder")
        for name in ("seq", "steps", "batch_size", "max_skipped", "log_every", "checkpoint_every", "keep"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("validate_every", "micro_tokens"):
            _require(self, name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        _require(self, "validation_sequences", self.validation_sequences >= 1, "at least 1")
        for name in ("warmup", "lr", "power", "weight_decay", "clip"):
            _require(self, name, 0 <= getattr(self, name) < float("inf"), "a number of at least 0")
        _require(self, "short_seq_prob", 0 <= self.short_seq_prob <= 1, "between 0 and 1")
        sources(self)
        sources(self, "validation_data")
        mask_probs(self)
        mask_shares(self)
        trackers(self)
        _require(self, "dropout", self.dropout is None or 0 <= self.dropout < 1, "at least 0 and below 1")
        _require(self, "initializer_range", self.initializer_range is None or self.initializer_range > 0, "above 0")
        for name in ("validation", "beta1", "beta2"):
            _require(self, name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        _require(self, "eps", self.eps > 0, "above 0")
        _require(self, "seed", 0 <= self.seed < 2**63, "at least 0 and below 2**63")
        _require(self, "workers", self.workers is None or self.workers >= 0, "at least 0")
        _require(self, "decay_steps", self.decay_steps is None or 0 < self.decay_steps < float("inf"), "above 0")
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ConfigError(f"--decay-steps needs --schedule wsd; --schedule is {self.schedule}")
        _require(self, "max_hours", 0 <= (self.max_hours or 0) < float("inf"), "at least 0")
        self._require_origin()
        _require(self, "peak_tflops", self.peak_tflops is None or self.peak_tflops > 0, "above 0")
        for field, kind in fields():
            if kind is float:
                _require(self, field.name, abs(getattr(self, field.name) or 0) < float("inf"), "finite")

    def _require_origin(self) -> None:
        if self.decay_from and self.continue_from:
            raise ConfigError("--decay-from and --continue-from are two places to begin at: leave one out")
        if self.decay_from and self.max_hours:
            raise ConfigError("--max-hours beside --decay-from, whose length is --decay-steps: leave one out")
        if self.decay_from and not (self.decay_steps and self.decay_steps >= 1):
            raise ConfigError("--decay-from needs --decay-steps, the updates of the decay, at least 1")
        if self.origin and Path(self.origin).resolve().parent.parent == Path(self.out).resolve():
            which = "decay_from" if self.decay_from else "continue_from"
            raise ConfigError(f"{flag(which)} {self.origin} is a checkpoint of --out {self.out}: choose another --out")

    @property
    def share_held_out(self) -> float:
        """The share of the documents that is held out: none where other data is validated on."""
        return 0.0 if self.validation_data else self.validation

    @property
    def origin(self) -> str | None:
        """The checkpoint of another run that this one begins at."""
        return self.decay_from or self.continue_from

    def as_dict(self) -> dict:
        """Options by name, as a configuration file has them; those that are not set are left out."""
        found = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def flag(name: str) -> str:
    """The flag of an option: ``batch_size`` is ``--batch-size``."""
    return "--" + name.replace("_", "-")


def fields() -> list[tuple[dataclasses.Field, type]]:
    """Every option's field and the type of its values."""
    hints = typing.get_type_hints(PretrainConfig)
    found = []
    for field in dataclasses.fields(PretrainConfig):
        kinds = typing.get_args(hints[field.name]) or (hints[field.name],)
        found.append((field, next(kind for kind in kinds if kind is not types.NoneType)))
    return found


def optional(field: dataclasses.Field) -> bool:
    """Whether the option may be left unset (None)."""
    return field.default is None


def several(field: dataclasses.Field) -> bool:
    """Whether the option may be given several times."""
    return field.name in ("data", "validation_data")


def read_config(path: str | Path) -> dict:
    """Options of a TOML or JSON file, by name (``batch_size`` or ``batch-size``); ConfigError for any it has wrong."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no configuration file {path}")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no table of options")
    values = {name.replace("-", "_"): value for name, value in values.items()}
    known = {field.name for field, _ in fields()}
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"{path}: unknown option {', '.join(unknown)}; the options are {', '.join(sorted(known))}")
    return values


def resolve(flags: dict, file: str | Path | None = None) -> PretrainConfig:
    """The configuration of a command line: flags over the file's options over the defaults.

    A flag goes before an option of the file, too, in whose place it is read (``INSTEAD``). ConfigError for an option
    that was given beside the one in its place and contradicts it; what a file has as by default was not given. A run
    that begins at another run's checkpoint has that run's options as defaults.
    """
    values = read_config(file) if file else {}
    values = _inherited({**values, **flags}) | values
    values = {name: value for name, value in values.items() if INSTEAD.get(name) not in flags}
    given = {field.name for field, _ in fields() if values.get(field.name, field.default) != field.default} | set(flags)
    config = PretrainConfig(**{**values, **flags})
    _require_no_contradiction(config, given)
    return config


def _inherited(options: dict) -> dict:
    """What a run with ``options`` takes from the run whose checkpoint it begins at; took, where that is gone."""
    origin = options.get("decay_from") or options.get("continue_from")
    if not origin:
        return {}
    state, own = Path(origin) / "state.json", Path(options.get("out", "")) / "config.json"
    try:
        if state.is_file() or not own.is_file():
            found = json.loads(state.read_text(encoding="utf-8"))
            found = effective(found["options"] | found.get("plan", {}))
        else:
            found = json.loads(own.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError) as error:
        which = "decay_from" if options.get("decay_from") else "continue_from"
        raise ConfigError(f"{flag(which)} {origin} is no checkpoint of a run (RUN/checkpoints/step-...)") from error
    known = {field.name for field, _ in fields()} - set(NOT_INHERITED)
    found = {name: value for name, value in found.items() if name in known}
    return found | ({"schedule": "wsd"} if options.get("decay_from") and found.get("schedule") == "constant" else {})


def effective(options: dict) -> dict:
    """``options`` by name without those that are not read, since another one is in their place."""
    return {name: value for name, value in options.items() if not options.get(INSTEAD.get(name))}


def phases(config: PretrainConfig) -> list["Phase"]:
    """The phases of a run, in order; one of ``--seq`` and ``--steps`` where none are given. ConfigError if wrong."""
    from bert_fast.data.phase import Phase, paced  # its package imports tokenizers, which `--help` needs not wait for

    drafts = [_parsed(text, config) for text in (config.phases or f"{config.seq}:{config.steps}").split(",")]
    found, first, probs = [], 0, mask_probs(config)
    for number, draft in enumerate(drafts):
        if number == 0 or draft["own"]:
            schedule_first = first
            steps = draft["steps"]
            for later in drafts[number + 1 :]:
                if later["own"]:
                    break
                steps += later["steps"]
            shared = {
                "lr": draft["lr"],
                "warmup": _updates(draft["warmup"], steps),
                "decay": min(_updates(config.decay_steps or 0, steps), steps),
                "schedule_first": schedule_first,
                "schedule_last": schedule_first + steps,
            }
        found.append(Phase(draft["seq"], first, first + draft["steps"], draft["batch"], **shared, mask_probs=probs))
        first += draft["steps"]
    try:
        return paced(found, [_change(text) for text in (config.replan or "").split(",") if text])
    except ValueError as error:
        raise ConfigError(f"--replan {config.replan}: {error}") from error


def _change(text: str) -> tuple[int, int]:
    at, _, number = text.partition(":")
    try:
        return int(at), int(number)
    except ValueError:
        raise ValueError(f"{text!r} is not AT:N, two whole numbers") from None


def sources(config: PretrainConfig, name: str = "data") -> dict[str, float | None]:
    """The folders of ``--data``, or of another option, and their weights, None where none is given. ConfigError if
    wrong.

    What is a folder has no weight, whatever its name: of a folder "a:3" the weight 2 is "a:3:2".
    """
    found: dict[str, float | None] = {}
    real: set[Path] = set()
    texts = getattr(config, name) or ()
    for text in [texts] if isinstance(texts, str) else texts:
        folder, colon, number = text.rpartition(":")
        weight = None
        if not colon or Path(text).exists() or not (_is_number(number) or Path(folder).exists()):
            folder = text
        elif not _is_number(number) or not 0 < float(number) < float("inf"):
            raise ConfigError(f"{flag(name)} {text}: {number!r} is no weight, a number above 0")
        elif not WEIGHTS[0] <= (weight := float(number)) <= WEIGHTS[1]:
            raise ConfigError(f"{flag(name)} {text}: {number} is not within {WEIGHTS[0]:g} and {WEIGHTS[1]:g}")
        if Path(folder).resolve() in real:
            raise ConfigError(f"{flag(name)} names {folder} twice: one of a higher weight counts for more")
        real.add(Path(folder).resolve())
        found[folder] = weight
    given = [folder for folder, weight in found.items() if weight is not None]
    if given and len(given) < len(found):
        raise ConfigError(f"{flag(name)} gives {', '.join(given)} a weight and others none: give each one, or none")
    return found


def _is_number(text: str) -> bool:
    return bool(_numbers(text))


def mask_probs(config: PretrainConfig) -> tuple[float, float]:
    """The shares of tokens that a phase's first and last update predict. ConfigError if wrong."""
    found = _numbers(config.mask_prob)
    _require(config, "mask_prob", len(found) in (1, 2), "a share, or two as 0.30:0.15")
    _require(config, "mask_prob", all(0 < p < 1 for p in found), "above 0 and below 1")
    return found[0], found[-1]


def mask_shares(config: PretrainConfig) -> tuple[float, float, float]:
    """The shares of predicted tokens that become [MASK], become a random token, and stay. ConfigError if wrong."""
    found = _numbers(config.mask_shares)
    right = len(found) == 3 and all(0 <= percent <= 100 for percent in found) and abs(sum(found) - 100) < 1e-9
    _require(config, "mask_shares", right, "three percentages that sum to 100, as 80:10:10")
    masked, random, kept = (percent / 100 for percent in found)
    return masked, random, kept


def trackers(config: PretrainConfig) -> list[str]:
    """The names of ``--track``. ConfigError where one is empty or stands there twice."""
    found = [] if config.track is None else [name.strip() for name in config.track.split(",")]
    _require(config, "track", all(found) and len(set(found)) == len(found), "names by comma, each once")
    return found


def _numbers(text: str) -> list[float]:
    """The numbers between colons; none where one of them is no number."""
    try:
        return [float(part) for part in text.split(":")]
    except ValueError:
        return []


def _updates(number: float, of: int) -> int:
    """A number of updates, where one below 1 is a share ``of`` so many."""
    return round(number * of if number < 1 else number)


def _parsed(text: str, config: PretrainConfig) -> dict:
    parts = [part.strip() for part in text.split(":")]
    try:
        if len(parts) < 2:
            raise ValueError("it needs SEQ:STEPS")
        draft: dict[str, typing.Any] = {"seq": int(parts[0]), "steps": int(parts[1]), "own": False}
        draft |= {"lr": config.lr, "warmup": config.warmup, "batch": config.batch_size}
        for part in parts[2:]:
            name, _, value = part.partition("=")
            if name not in ("lr", "warmup", "batch"):
                raise ValueError(f"{part!r} is none of lr=, warmup=, batch=")
            draft[name] = int(value) if name == "batch" else float(value)
            draft["own"] = draft["own"] or name != "batch"
        rates = all(0 <= draft[name] < float("inf") for name in ("lr", "warmup"))  # false for NaN
        if min(draft["seq"], draft["steps"], draft["batch"]) < 1 or not rates:
            raise ValueError("lengths, steps and batch sizes are at least 1, rates and warm-up at least 0")
    except ValueError as error:
        raise ConfigError(f"--phases: {text!r} is not a phase: {error}") from error
    return draft


def _require_no_contradiction(config: PretrainConfig, given: set[str]) -> None:
    if config.init_from and "model" in given:
        raise ConfigError(
            f"--model {config.model} beside --init-from {config.init_from}, which is the model: leave one out"
        )
    if config.phases:
        found = phases(config)
        for name, of_phases in (("seq", max(phase.seq for phase in found)), ("steps", found[-1].last)):
            if name in given and getattr(config, name) != of_phases:
                raise ConfigError(
                    f"{flag(name)} {getattr(config, name)} contradicts --phases {config.phases}, where it is "
                    f"{of_phases}: leave one out"
                )


def _converted(field: dataclasses.Field, kind: type, value):
    choices = field.metadata["choices"]
    right = isinstance(value, kind) and not (kind is not bool and isinstance(value, bool))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        right, value = True, float(value)
    if field.name == "mask_prob" and isinstance(value, float):  # a file's number
        right, value = True, str(value)
    if several(field) and isinstance(value, list | tuple) and value:
        right, value = all(isinstance(part, str) for part in value), value[0] if len(value) == 1 else tuple(value)
    if not right:
        raise ConfigError(f"{flag(field.name)} takes {KINDS[kind]}, got {value!r}")
    if choices and value not in choices:
        raise ConfigError(f"{flag(field.name)} is one of {', '.join(choices)}, got {value!r}")
    return value


def _require(config: PretrainConfig, name: str, right: bool, what: str) -> None:
    if not right:
        raise ConfigError(f"{flag(name)} must be {what}, got {getattr(config, name)!r}")
