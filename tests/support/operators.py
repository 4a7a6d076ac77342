"""The one harness of the operators' tests: an operator beside what a user of PyTorch writes, and beside float64."""

import torch

from bert_fast import dispatch
from tests.support.parity import assert_near_truth

HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32


def differentiate(function, inputs: dict, grad_out) -> dict[str, torch.Tensor]:
    """``function(**inputs)``, "out", and the gradient of each input NAME that is there, "d NAME"."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items() if t is not None}
    out = function(**{name: leaves.get(name) for name in inputs})
    if out.requires_grad:
        grads = torch.autograd.grad(out, list(leaves.values()), grad_out.to(out.dtype))
    else:  # of no sequence, plain PyTorch's result depends on nothing
        grads = map(torch.zeros_like, leaves.values())
    return {"out": out.detach(), **{f"d {name}": g for name, g in zip(leaves, grads, strict=True)}}


def of_backend(operator: str, backend: str, function, inputs: dict, grad_out) -> dict[str, torch.Tensor]:
    """``differentiate`` with ``backend`` behind the operator."""
    with dispatch.use_backend(**{operator: backend}):
        return differentiate(function, inputs, grad_out)


def compare(operator: str, backend: str, ours, composed, exact, inputs: dict, grad_out) -> dict[str, torch.Tensor]:
    """Output and gradients of ``ours``, held against those of ``composed``, what a user of PyTorch writes, and against
    the truth: ``exact`` of the same inputs in float64."""
    result = of_backend(operator, backend, ours, inputs, grad_out)
    same_dtype = differentiate(composed, inputs, grad_out)
    doubles = {name: None if t is None else t.double() for name, t in inputs.items()}
    truth = differentiate(exact, doubles, grad_out.double())
    for name, value in result.items():
        assert_near_truth(f"{name} ({backend})", value, same_dtype[name], truth[name])
    return result


def assert_same_bits(first, second) -> None:
    """Of two results of ``differentiate``, or of an operator."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        first, second = first.values(), second.values()
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(a, b), f"result {number} has other bits"
