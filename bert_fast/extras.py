"""Packages that only part of this one needs: where one is missing, the extra that brings it is named."""

from importlib import import_module
from types import ModuleType

BROUGHT_BY = {
    "accelerate": "pretrain",
    "datasets": "datasets",
    "matplotlib": "plot",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "pyarrow": "pretrain",  # and finetune
    "rich": "pretrain",
    "scipy": "finetune",
    "sentencex": "pretrain",
    "seqeval": "finetune",
    "sklearn": "finetune",
}
INSTALLED_AS = {"sklearn": "scikit-learn"}  # where pip calls a package otherwise than Python


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
        named, extra = INSTALLED_AS.get(package, package), BROUGHT_BY[package]
        raise ExtraMissing(
            f"{named} is not installed, which this needs: pip install 'bert_fast[{extra}]'", name=package
        ) from error
