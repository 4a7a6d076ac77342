"""transformers' Auto classes give this engine's models: registered for BertConfig, and given back."""

from typing import Any, NamedTuple

from transformers import BertConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import logging

from bert_fast.model import swap

logger = logging.get_logger(__name__)


class Registration(NamedTuple):
    """Auto classes by name: those that give this engine's class, and those that give another for a BertConfig."""

    covered: dict[str, type]
    left: dict[str, Any]


def _given() -> dict[Any, Any]:
    """What each of transformers' Auto classes gives for a BertConfig, where it knows one."""
    kinds: list[Any] = [kind for kind in vars(modeling_auto).values() if isinstance(kind, type)]
    autos = [kind for kind in kinds if issubclass(kind, _BaseAutoModelClass) and kind._model_mapping is not None]
    return {auto: auto._model_mapping[BertConfig] for auto in autos if BertConfig in auto._model_mapping}


def register() -> Registration:
    """Let transformers' ``AutoModel``, ``AutoModelForMaskedLM`` and the rest give this engine's classes for BERT.

    After it, whatever loads a BERT by an Auto class runs on this engine: transformers' example scripts and pipelines,
    sentence-transformers, code of your own. Calling it again changes nothing; :func:`unregister` is the way back.
    What it does not cover stays as it is, and is in ``left`` of what it returns and in a message, once: BERT as a
    decoder (``AutoModelForCausalLM``), a class that someone else registered for BertConfig, and classes that are
    imported by name, as ``transformers.BertModel``. :func:`bert_fast.accelerate` takes a model that is loaded.
    """
    for auto, kind in _given().items():
        if kind in swap.MODELS:
            _registered(auto)[BertConfig] = swap.MODELS[kind]
    found = {auto.__name__: kind for auto, kind in _given().items()}
    ours = set(swap.MODELS.values())
    covered = {name: kind for name, kind in found.items() if kind in ours}
    left = {name: kind for name, kind in found.items() if kind not in ours}
    stays = [f"{name} still gives {getattr(kind, '__name__', kind)}" for name, kind in left.items()]
    stays += ["classes that are imported by name, as transformers.BertModel, stay transformers'"]
    logger.warning_once(
        f"bert_fast.register: transformers' Auto classes give bert_fast's models for BERT; {'; '.join(stays)}"
    )
    return Registration(covered, left)


def unregister() -> None:
    """The way back from :func:`register`: the Auto classes give transformers' classes again. Models that are loaded
    stay what they are."""
    for auto, kind in _given().items():
        if kind in swap.MODELS.values():
            del _registered(auto)[BertConfig]


def _registered(auto: Any) -> dict[type, Any]:
    """What is registered with an Auto class. Its ``register`` leaves out transformers' own configurations before 5.19,
    without a word."""
    return auto._model_mapping._extra_content
