"""Whether calling a module is all that its class does: what may be fused, skipped or run on rows.

An operator reads the parameters of several modules at once only while each of them is what it seems to be. A hook, a
parametrisation, another class (LoRA, quantisation, offloading) or a forward of one's own has to be called instead.
"""

from typing import TypeGuard, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook as hooked_globally
from transformers.activations import GELUActivation

Tensor = torch.Tensor
M = TypeVar("M", bound=nn.Module)

_ROW_WISE = {nn.Linear, nn.LayerNorm, nn.Dropout, nn.Identity, nn.ModuleDict, nn.ParameterDict}
_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")


def _hooked(module: nn.Module, harmless=None) -> bool:
    """Calling ``module`` does more than its class's forward; forward hooks that are ``harmless`` do not count."""
    hooks = module._forward_hooks
    return bool(
        (hooks and not all(hook is harmless for hook in hooks.values()))
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def unhooked(module: nn.Module) -> bool:
    """``module`` and all in it are without hooks."""
    return not any(_hooked(m) for m in module.modules())


def plain(module: nn.Module | None, kind: type[M]) -> TypeGuard[M]:
    """``module`` is exactly ``kind``, and calling it does nothing but its forward."""
    return type(module) is kind and not _hooked(module)


def as_made(kind: type[nn.Module]) -> bool:
    """The forward of ``kind`` is its library's, and not one that was put on the class."""
    return kind.forward.__module__ == kind.__module__


def untouched(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """``plain``, without a hook of all modules or a forward put on the class: no code of one's own sees what is in
    ``module``."""
    return plain(module, kind) and as_made(kind) and not hooked_globally()


def runs(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Calling ``module`` runs the forward of ``kind``, whatever hooks there are. A class of FSDP2's has it too."""
    return getattr(type(module), "forward", None) is kind.forward and "forward" not in module.__dict__


def unwatched(output: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """``output``, a layer's second half, is exactly ``kind``, and no hook sees the gradients of what it multiplies and
    of the residual: without dropout they are the same memory."""
    return type(output) is kind and type(output.dense) is nn.Linear and unhooked(output)


def _holds_only(module: nn.Module, origins: tuple[str, ...]) -> bool:
    """``module`` and all in it are without hooks and of torch's ``_ROW_WISE`` or of Python modules named in
    ``origins``."""
    return all(
        (type(m) in _ROW_WISE or type(m).__module__.startswith(origins)) and not _hooked(m)
        for m in (module.modules() if module._modules else (module,))
    )


def row_wise(module: nn.Module) -> bool:
    """Each row that ``module`` gives depends on that row of its input alone, and no code of one's own sees it: torch's
    own modules, with an adapter by peft or without."""
    return not hooked_globally() and _holds_only(module, (*_ACTIVATIONS, "peft."))


def keyed(layer: nn.Module) -> bool:
    """Nothing in an encoder's ``layer`` draws random numbers but the operators by their keys, as far as one can know:
    all is this engine's, torch's or an activation of transformers, without hooks."""
    return _holds_only(layer, (*_ACTIVATIONS, "bert_fast.model.layers"))


def requires_grad(module: nn.Module, given, output: Tensor) -> None:
    """A hook: what comes out has a gradient, with which a checkpointed layer or an adapter can begin."""
    output.requires_grad_(True)


def plain_table(embedding: nn.Module) -> TypeGuard[nn.Embedding]:
    """Looking rows up in ``embedding`` is reading its table. ``requires_grad`` does nothing to rows of a table that is
    trained."""
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        return False
    return not _hooked(embedding, requires_grad if embedding.weight.requires_grad else None)


def plain_layernorm(norm: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """``norm`` is a plain LayerNorm with weight and bias, which the operators read."""
    return plain(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None


def is_gelu(activation) -> bool:
    """GELU by the normal distribution function, without hooks."""
    return isinstance(activation, nn.Module) and plain(activation, GELUActivation)


def dropout_p(dropout: nn.Module) -> float:
    """The probability with which ``dropout`` drops now; 0 for a module that has to be called itself."""
    return float(dropout.p) if plain(dropout, nn.Dropout) and dropout.training else 0.0
