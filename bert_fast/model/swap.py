"""transformers' modules onto this engine, by swapping their classes: parameters, names and hooks stay."""

from torch import nn
from transformers.models.bert import modeling_bert as hf
from transformers.utils import logging

from bert_fast.model import fusable, layers

logger = logging.get_logger(__name__)
PARTS = {
    getattr(hf, name): getattr(layers, name)
    for name in (
        "BertEmbeddings", "BertSelfAttention", "BertSelfOutput", "BertOutput", "BertAttention", "BertIntermediate",
        "BertLayer", "BertEncoder", "BertPredictionHeadTransform",
    )
}  # fmt: skip
MODELS: dict[type, type] = {}  # transformers' model classes -> ours; filled where ours are defined


def refuse_unsupported(config) -> None:
    """Raise ValueError for what a BertConfig can ask for and this engine does not have."""
    instead = "use the class of transformers.models.bert for this model"
    if getattr(config, "is_decoder", False):
        raise ValueError(f"bert_fast has no decoder (config.is_decoder=True): {instead}")
    if getattr(config, "add_cross_attention", False):
        raise ValueError(f"bert_fast has no cross-attention (config.add_cross_attention=True): {instead}")
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    if kind != "absolute":
        raise ValueError(
            f"bert_fast has absolute positions only (config.position_embedding_type={kind!r}): use a version of "
            "transformers before 5, which computes relative positions, or train with 'absolute'"
        )


def refuse_other_code(kind: type, config, trusted: bool | None) -> None:
    """Raise ValueError where an Auto class was to run code that a checkpoint brings, and took ``kind`` in place of it.

    transformers prefers a class that is registered (bert_fast.register) to the code of a checkpoint, though the caller
    trusts that. Where it was not asked for, a message says what is not run.
    """
    named = getattr(config, "auto_map", None)
    if not named or kind not in MODELS.values():
        return
    what = f"the checkpoint names code of its own ({', '.join(map(str, named.values()))})"
    if trusted:
        raise ValueError(
            f"bert_fast: {what}, which trust_remote_code=True asks for and bert_fast's {kind.__name__} would replace: "
            "call bert_fast.unregister() before it is loaded"
        )
    logger.warning_once(f"bert_fast: {what}; it is not run, {kind.__name__} is built as it is here")


def swap_classes(root: nn.Module) -> None:
    """Give every module below and including ``root`` that is exactly transformers' the class of ours."""
    for module in root.modules():
        ours = PARTS.get(type(module)) or MODELS.get(type(module))
        if ours is not None:
            module.__class__ = ours
        release(module)


def release(module: nn.Module) -> None:
    """Take off the hooks with which transformers' forward records hidden states and attention weights, once it was
    asked for some: they stay and look at every later forward. It puts them on again where it needs them."""
    module.__dict__.pop("_output_capturing_hooks_installed", None)
    for key, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__name__", "") == "output_capturing_hook":
            del module._forward_hooks[key]


def accelerate(model: nn.Module) -> nn.Module:
    """Put a loaded transformers BERT on this engine, in place, and return it.

    ``model`` is one of the eight BERT classes of transformers or any module that contains one (a sentence-transformers
    pipeline, a model of your own with a ``BertModel`` inside). The Parameter objects, the state dict, hooks and
    optimisers that hold the parameters stay as they are; outputs are equal, but 0 at positions that no mask attends.
    Raises ValueError where there is no BERT or its configuration is not supported (decoder, cross-attention),
    TypeError for subclasses of a BERT's inner parts, whose own code would be lost, and for a forward that was put on an
    instance (accelerate's ``cpu_offload`` and ``Accelerator.prepare`` do so) or on transformers' class. Nothing is
    changed then.
    """
    found = False
    for name, module in model.named_modules():
        where = f"{name or 'the model'} ({type(module).__module__}.{type(module).__qualname__})"
        kind = type(module)
        if kind in MODELS.values() or kind in PARTS.values():
            found = True
            continue
        if kind is hf.BertCrossAttention or kind is hf.BertLMHeadModel:
            raise ValueError(f"bert_fast.accelerate: {where} is a decoder's; bert_fast has encoders only")
        if kind in MODELS:
            refuse_unsupported(module.config)
        inner = (hf.BertModel, *PARTS)
        if kind not in MODELS and kind not in PARTS and isinstance(module, inner):
            raise TypeError(
                f"bert_fast.accelerate: {where} is a subclass of transformers' BERT with code of its own, which this "
                "engine would not run; use transformers for it, or subclass bert_fast's class instead"
            )
        if (kind in MODELS or kind in PARTS) and ("forward" in module.__dict__ or not fusable.as_made(kind)):
            raise TypeError(
                f"bert_fast.accelerate: the forward of {where} was replaced, on this instance or on its class, by your "
                "own code or by accelerate (offloading, Accelerator.prepare), and would be lost or go on being "
                "transformers'; call bert_fast.accelerate first and replace it on the instance after"
            )
        found = found or kind is hf.BertModel
    if not found:
        raise ValueError(
            f"bert_fast.accelerate: no transformers.models.bert BertModel in {type(model).__qualname__}; only BERT is "
            "supported"
        )
    swap_classes(model)
    return model
