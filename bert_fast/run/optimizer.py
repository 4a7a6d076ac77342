"""The optimiser of a run, sharded over its processes, and its state by the names of parameters."""

from typing import Any

import torch
from torch import nn

from bert_fast import optim
from bert_fast.run.config import PretrainConfig
from bert_fast.train.distributed import Ranks


def build_optimizer(model: nn.Module, config: PretrainConfig, ranks: Ranks) -> torch.optim.Optimizer:
    """The optimiser of ``config`` over ``model``'s parameters, its state sharded over a machine's processes."""
    groups = optim.parameter_groups(model, weight_decay=config.weight_decay)
    kind = optim.AdamW if config.optimizer == "adamw" else optim.Lamb
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.clip or None,
        "bias_correction": config.bias_correction,
    }
    if kind is optim.Lamb:
        options["variant"] = "nvidia" if config.optimizer == "lamb-nvidia" else "published"
    if ranks.world == 1:
        return kind(groups, **options)
    from torch.distributed.optim import ZeroRedundancyOptimizer  # here: it takes a second to import

    return ZeroRedundancyOptimizer(groups, kind, process_group=ranks.machine, **options)


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """This process's part of the optimiser's state: tensors as KEY/PARAMETER, sorted by that name."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    own = _local(optimizer)
    found = {
        f"{key}/{names[parameter]}": value
        for parameter, state in own.state.items()
        for key, value in state.items()
        if torch.is_tensor(value)
    }
    return dict(sorted(found.items()))


def load_state(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Puts back what :func:`state_tensors` of any number of processes gave; takes what belongs to this one."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_parameter: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        key, _, parameter = name.partition("/")
        by_parameter.setdefault(parameter, {})[key] = value
    own = _local(optimizer)
    state, number = {}, 0
    for group in own.param_groups:
        for parameter in group["params"]:
            if names[parameter] in by_parameter:
                state[number] = by_parameter[names[parameter]]
            number += 1
    own.load_state_dict({"state": state, "param_groups": own.state_dict()["param_groups"]})


def owned(optimizer: torch.optim.Optimizer, model: nn.Module) -> set[str]:
    """The names of the parameters whose state this process holds."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter] for group in _local(optimizer).param_groups for parameter in group["params"]}


def _local(optimizer: Any) -> torch.optim.Optimizer:
    return optimizer if isinstance(optimizer, optim.AdamW | optim.Lamb) else optimizer.optim
