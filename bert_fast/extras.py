"""Packages that only part of this one needs: where one is missing, the extra that brings it is named."""

from importlib import import_module
from types import ModuleType

BROUGHT_BY = {
    "accelerate": "pretrain",
    "datasets": "datasets",
    "matplotlib": "plot",
    "pyarrow": "pretrain",
    "rich": "pretrain",
    "sentencex": "pretrain",
}


class ExtraMissing(ModuleNotFoundError):
    """An optional package is not installed; the message says how to get it."""


def load(name: str) -> ModuleType:
    """The module ``name`` of an optional package. Raises ExtraMissing where that is not installed."""
    package = name.partition(".")[0]
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ExtraMissing(
            f"{package} is not installed, which this needs: pip install 'bert_fast[{BROUGHT_BY[package]}]'",
            name=package,
        ) from error
