"""Weights of a checkpoint into one of this package's classes: all that it needs, or an error that names what is wrong.

transformers draws at random what it finds missing or of another shape, and leaves out what has no place; what it
would report of that is checked and raised here.
"""

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError
from transformers import logging as transformers_logging

from bert_fast.run import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

M = TypeVar("M", bound="PreTrainedModel")


class UnfitWeights(ValueError):
    """The tensors of a checkpoint are not those that the model needs; the message names them."""


def read_weights(
    cls: type[M], source: str | Path, *, optional: Sequence[str] = (), drawn: Sequence[str] = (), **arguments
) -> tuple[M, list[str], list[str]]:
    """(a ``cls`` with the weights of ``source``, names of those drawn at random, names of tensors without a place).

    ``source`` is a Hugging Face folder or a name on the Hub, ``arguments`` go to ``cls.from_pretrained``. Weights
    whose names begin with one of ``optional`` may be missing; those of ``drawn`` may have another shape, too. Raises
    UnfitWeights where others are missing or of another shape, where the encoder has tensors that the configuration
    has no place for, and where one is not finite; ValueError where they cannot be read; OSError where there are none.
    """
    with silent_transformers(), readable_weights(source):
        loaded: Any = cls.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **arguments)
    model, loading = loaded
    missing, unused = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    mismatched = {name: shapes for name, *shapes in sorted(loading["mismatched_keys"])}
    if wrong := [name for name in mismatched if not name.startswith(tuple(drawn))]:
        theirs, ours = map(tuple, mismatched[wrong[0]])
        raise UnfitWeights(
            f"{source}: {wrong[0]} has the shape {theirs} in the file and {ours} by its config.json"
            f"{_and_more(wrong)}: they do not belong together"
        )
    if needed := [name for name in missing if not name.startswith((*optional, *drawn))]:
        prefixed = next((name for name in unused if name.endswith(f".{needed[0]}")), None)
        hint = "" if prefixed is None else f"; the file has {prefixed}: rename its tensors without that prefix"
        others = f" and {len(needed) - 1} more are" if len(needed) > 1 else " is"
        raise UnfitWeights(
            f"{source} has no weights for {cls.__name__}: {needed[0]}{others} missing and would be random{hint}"
        )
    if placeless := [name for name in unused if _of_the_encoder(name)]:
        raise UnfitWeights(
            f"{source}: {placeless[0]}{_and_more(placeless)} would not be used: by its config.json the model has no "
            "such weights, and without them it is another model"
        )
    random = {*missing, *mismatched}
    for name, tensor in model.state_dict().items():
        if name not in random and tensor.is_floating_point() and not (finite := tensor.isfinite()).all():
            raise UnfitWeights(
                f"{source}: {(~finite).sum():,} of the {tensor.numel():,} numbers of {name} are NaN or infinite: what "
                "the model says means nothing; take an earlier checkpoint"
            )
    return model, sorted(random), unused


def _and_more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _of_the_encoder(name: str) -> bool:
    """Whether a tensor changes hidden states; numbers of positions and types were once saved as ``..._ids``."""
    return name.removeprefix("bert.").startswith(("embeddings.", "encoder.")) and not name.endswith("_ids")


@contextmanager
def readable_weights(source: str | Path) -> Iterator[None]:
    """ValueError where the weights of ``source`` are cut short, damaged, or a pickle of more than tensors.

    The checksums of a run's checkpoint are compared first.
    """
    if (Path(source) / "checksums.json").is_file():
        try:
            checkpoint.read(Path(source))
        except (OSError, ValueError) as error:
            raise ValueError(f"checkpoint {source} is damaged: {error}") from error
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"the weights in {source} are damaged or cut short: {error}") from error
    except (pickle.UnpicklingError, EOFError) as error:  # torch's own message proposes to run what the file says
        raise ValueError(
            f"the weights in {source} are a pickle that is damaged, or holds more than tensors and might run code; it "
            "was not loaded: have them as model.safetensors"
        ) from error


@contextmanager
def silent_transformers() -> Iterator[None]:
    """No progress bars and no reports of transformers meanwhile."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
