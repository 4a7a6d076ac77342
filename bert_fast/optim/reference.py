"""The optimisers' updates in plain PyTorch: the specification of every backend, and the fallback.

A backend has ``optimizer_norm`` over a list of tensors on one device, ``optimizer_rates``, which makes of a norm what
follows for parameters of the same betas, and an update over lists of tensors. Lists go together: element i of each
belongs to parameter i. All updates are in place.

    params         the model's parameters, float32 or in 16 bits
    masters        float32 weights that are updated; where ``params[i]`` is float32 itself, the same tensor
    grads          gradients, in their parameter's dtype
    exp_avgs       first moments, float32        exp_avg_sqs    second moments, float32
    rates          (n, 4) float32, a row per parameter: learning rate, weight decay, 1 / (1 - beta1^t) and
                   1 / sqrt(1 - beta2^t) for its step t (1 and 1 without bias correction)
    clip           () float32: the factor of all gradients; NaN means that nothing at all is changed

(float64 in place of float32 where a parameter is float64.) With g = clip * grad:

    AdamW   m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2
            w = (1 - lr * decay) w - lr * c1 m / (c2 sqrt(v) + eps)
    LAMB    m and v as above;   u = c1 m / (c2 sqrt(v) + eps) + decay * w
            w = w - lr * ratio * u,   ratio = |w| / |u| of the whole parameter, and 1 where either norm is 0

``adapt_all`` gives every parameter LAMB's ratio; without it those that do not decay (bias and LayerNorm) have ratio 1.

Sources: I. Loshchilov and F. Hutter, "Decoupled Weight Decay Regularization", ICLR 2019. Y. You et al., "Large Batch
Optimization for Deep Learning: Training BERT in 76 minutes", ICLR 2020, algorithm 2.
"""

import math
from collections.abc import Sequence

import torch

Tensor = torch.Tensor
Tensors = Sequence[Tensor]


def by_dtype(tensors: Tensors) -> dict[torch.dtype, list[int]]:
    """Which of ``tensors`` have which dtype: a kernel takes those of one."""
    found: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(tensors):
        found.setdefault(tensor.dtype, []).append(i)
    return found


def optimizer_norm(tensors: Tensors) -> Tensor:
    """The L2 norm of all elements of all tensors, () float32 (float64 where one tensor is)."""
    total = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    squares = torch.stack([t.double().square().sum() for t in tensors])
    return squares.sum().sqrt().to(total)


def optimizer_rates(
    steps: Tensor,
    norm: Tensor,
    skipped: Tensor | None,
    groups: Sequence[tuple[int, float | Tensor, float | Tensor]],
    betas: tuple[float, float] | None,
    max_grad_norm: float | None,
) -> tuple[Tensor, Tensor]:
    """``rates`` (n, 4) and ``clip`` () of the parameters whose updates are counted in ``steps`` (n,) float32.

    Where ``norm`` () is finite ``steps`` goes up by one, and else ``skipped`` () int64, if it is given. ``groups`` has
    (count, learning rate, weight decay) of each group of parameters that follow each other, n in all and none empty;
    rate and decay are numbers, or tensors () on the device. ``betas`` are None without bias correction,
    ``max_grad_norm`` is what gradients are clipped to. ``rates`` is float64, or float32 rounded from it.
    """
    finite = norm.isfinite()
    steps += finite
    if skipped is not None:
        skipped += ~finite
    clip = torch.ones_like(norm) if max_grad_norm is None else (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    t = steps.double().clamp(min=1)  # a first step that is skipped leaves 0, and its rates unused
    rates = t.new_ones((len(t), 4))
    for rows, (_, *numbers) in zip(rates.split([count for count, *_ in groups]), groups, strict=True):
        for column, value in enumerate(numbers):
            if isinstance(value, Tensor):
                rows[:, column] = value.to(rates)
            else:
                rows[:, column].fill_(value)
    for column, beta, power in zip((2, 3), betas or (), (-1.0, -0.5), strict=False):
        if beta > 0:
            rates[:, column] = (-torch.expm1(t * math.log(beta))) ** power
    return rates, torch.where(finite, clip, torch.nan)


def _moments(grad: Tensor, m: Tensor, v: Tensor, clip: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    g = grad.to(m.dtype) * clip
    return beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g


def _write(param: Tensor, master: Tensor, m: Tensor, v: Tensor, clip: Tensor, new: tuple[Tensor, Tensor, Tensor]):
    """Puts the new weights and moments in place unless ``clip`` is NaN; the weights' copy in 16 bits last."""
    kept = clip.isnan()
    for old, value in zip((master, m, v), new, strict=True):
        old.copy_(torch.where(kept, old, value))
    if param is not master:
        param.copy_(torch.where(kept, param, master.to(param.dtype)))


def optimizer_adamw(
    params: Tensors,
    masters: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    rates: Tensor,
    clip: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One step of AdamW."""
    for param, w, grad, m, v, (lr, decay, c1, c2) in zip(
        params, masters, grads, exp_avgs, exp_avg_sqs, rates, strict=True
    ):
        new_m, new_v = _moments(grad, m, v, clip, beta1, beta2)
        new_w = (1 - lr * decay) * w - lr * c1 * new_m / (c2 * new_v.sqrt() + eps)
        _write(param, w, m, v, clip, (new_w, new_m, new_v))


def optimizer_lamb(
    params: Tensors,
    masters: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    rates: Tensor,
    clip: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    adapt_all: bool,
) -> None:
    """One step of LAMB."""
    for param, w, grad, m, v, (lr, decay, c1, c2) in zip(
        params, masters, grads, exp_avgs, exp_avg_sqs, rates, strict=True
    ):
        new_m, new_v = _moments(grad, m, v, clip, beta1, beta2)
        update = c1 * new_m / (c2 * new_v.sqrt() + eps) + decay * w
        w_norm, u_norm = w.double().norm(), update.double().norm()
        adapts = (w_norm > 0) & (u_norm > 0)
        if not adapt_all:
            adapts &= decay > 0
        ratio = torch.where(adapts, w_norm / u_norm, 1.0).to(w.dtype)
        _write(param, w, m, v, clip, (w - lr * ratio * update, new_m, new_v))
